//! Ports that come and go.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use netdev_providers::{Fault, Generation, Ifindex, Netdev};

use super::ask::{Asked, NoAnswer};
use super::bind::{bind, clear, release};
use super::port::Port;
use super::queue::{Command, End, Stopped};
use super::state::undeleted_towards;
use super::table::PortTable;
use super::writer::Writer;
use super::{Admin, Engine, NO_PROVIDER, NewPort, NoSuchPort, PortAddError, PortDeleted};

impl Engine {
    /// Attaches a netdev and binds it, for its whole life, to the first class that accepts it: of
    /// [its list](NewPort::providers), or without one of those whose rules a NIC carries
    /// ([`ProviderClass::bind_in_hardware`](netdev_providers::ProviderClass::bind_in_hardware)), then of all. When
    /// none does, the port is attached without a provider. Refusals are kept. What engines that died have left
    /// there of other classes is removed.
    ///
    /// # Errors
    /// [`PortAddError`]; nothing has changed then.
    pub fn port_add(&self, new: NewPort) -> Result<Generation, PortAddError> {
        let mut admin = self.admin();
        let table = self.0.publication.table();
        if let Some(port) = table.get(new.ifindex) {
            let provider = port.binding.as_ref().map_or(NO_PROVIDER, |b| b.class);
            return Err(PortAddError::AlreadyBound {
                name: port.netdev.name.clone(),
                provider: provider.to_owned(),
            });
        }
        if admin.leaving().iter().any(|port| port.ifindex() == new.ifindex) {
            return Err(PortAddError::Busy(new.ifindex));
        }
        // Behind "none" nothing is tried.
        let names = new.providers.as_ref().map(|names| {
            let tried = names.iter().position(|n| n == NO_PROVIDER).unwrap_or(names.len());
            &names[..tried]
        });
        let classes = admin.registry.select(names)?;
        // 2^32 port-adds without a restart do not happen; if they did, 0 would be skipped.
        let generation = loop {
            let n = self.0.next_generation.fetch_add(1, Ordering::Relaxed);
            if let Some(g) = Generation::new(n) {
                break g;
            }
        };
        let netdev =
            Netdev { ifindex: new.ifindex, generation, name: new.name, hw_flags: new.hw_flags };
        let (all, by_default) = (admin.registry.select(None)?, names.is_none());
        let (binding, refusals) = bind(&netdev, self.0.instance, &classes, by_default, &all);
        let limits = &self.0.limits;
        let living = table.iter().map(|p| p.generation());
        let (capacity, all) = (new.capacity, Arc::clone(&self.0.totals));
        let port = Arc::new(Port::new(netdev, binding, refusals, living, limits, capacity, all));
        if let Some(binding) = &port.binding {
            // Before any offer: what a dead engine left may have the same match.
            port.queue.push(Command::Reconcile(None));
            Writer::new(Arc::clone(&port), Arc::clone(&binding.provider), Arc::clone(&self.0))
                .begin();
            if let Err(e) = self.0.threads.serve(&port) {
                drop(port.queue.take_job());
                release(&port.netdev, &*binding.provider);
                return Err(PortAddError::Thread(e));
            }
        }
        tracing::info!(
            port = %port.netdev,
            provider = port.binding.as_ref().map_or(NO_PROVIDER, |b| b.class),
            "port added"
        );
        self.0.publication.publish(table.with(port));
        for other in table.iter().filter(|p| p.binding.is_some() && p.may_lead_to(new.ifindex)) {
            other.queue.push(Command::Joined(new.ifindex));
        }
        Ok(generation)
    }

    /// Something about the netdev has changed that its provider may have to follow: its name, its ingress
    /// qdisc, filters and programs of others.
    pub fn put_in_order(&self, ifindex: Ifindex) {
        let table = self.0.publication.table();
        if let Some(port) = table.get(ifindex).filter(|p| p.binding.is_some()) {
            port.queue.push(Command::Repair);
        }
    }

    /// The link of the netdev has come back. Its device may have been reset meanwhile (`devlink dev reload`,
    /// `ethtool --reset`, firmware that recovers), and so have lost what it was given: the provider gives it anew
    /// what stands there beside the rules of connections
    /// ([`Provider::hardware_suspect`](netdev_providers::Provider::hardware_suspect)), before it adds anything else,
    /// and without waiting for that. Rules that were lost are found by sweeps, as always.
    pub fn link_returned(&self, ifindex: Ifindex) {
        let table = self.0.publication.table();
        let Some(port) = table.get(ifindex) else { return };
        if port.ask(|provider| provider.hardware_suspect()).is_some() {
            port.queue.push(Command::Repair);
        }
    }

    /// Waits until all that was offered or asked for before has been carried out on every port, and what was due
    /// by the engine's clock has been looked after: for who drives the clock itself, or wants to see what became
    /// of its offers. The packet path has no use for it. Blocks; false when a port has not gone on within
    /// [`Limits::port_del`](super::Limits::port_del): the others have been waited for all the same.
    #[must_use]
    pub fn synchronize(&self) -> bool {
        let table = self.0.publication.table();
        let asked: Vec<_> = table
            .iter()
            .filter(|p| p.binding.is_some())
            .map(|port| Asked::of(port, Command::Barrier))
            .collect();
        let at_most = self.0.limits.port_del;
        let slow = |asked: Asked<u64>| asked.wait(at_most) == Err(NoAnswer::Slow);
        asked.into_iter().map(slow).filter(|is_slow| *is_slow).count() == 0
    }

    /// Removes what engines that died have left on a netdev that is not to become a port. Blocks.
    pub fn clear_leftovers(&self, ifindex: Ifindex) {
        let admin = self.admin();
        if self.0.publication.table().get(ifindex).is_some() {
            return;
        }
        clear(&admin.registry.select(None).unwrap_or_default(), None, ifindex);
    }

    /// Deletes a port: no worker offers on it any more, rules on other ports that forward into it
    /// go, its own rules go, the provider is released. Blocks, within the bounds of
    /// [`Limits::port_del`](super::Limits::port_del); touches no other connection's rules.
    ///
    /// The deletes on other ports are started before this port's own flush, because a rule that
    /// redirects into a netdev that is gone drops packets, while the flushed port only slows them;
    /// they are repeated once no worker can offer towards the netdev any more. A datapath that
    /// gives paths itself ([`PathSpec::Known`](super::datapath::PathSpec::Known)) must have stopped to
    /// choose this egress by the next quiescent state of each worker.
    /// A delete that the backend refuses is tried again at once, a few times; what is left then is told
    /// ([`PortDeleted::faults`]), and tried until it is gone.
    ///
    /// A provider that has not come back by then is abandoned: it does what it was asked for when it
    /// does, and the netdev cannot be added again before ([`PortAddError::Busy`]).
    ///
    /// # Errors
    /// When there is no such port.
    pub fn port_del(&self, ifindex: Ifindex) -> Result<PortDeleted, NoSuchPort> {
        let (port, mut retracting, version) = {
            let mut admin = self.admin();
            let table = self.0.publication.table();
            let port = Arc::clone(table.get(ifindex).ok_or(NoSuchPort(ifindex))?);
            port.draining.store(true, Ordering::SeqCst);
            admin.leave(&port);
            let rest = table.without(port.generation());
            let retracting = start_retract(rest.iter(), ifindex);
            (port, retracting, self.0.publication.publish(rest))
        };
        // From here on nobody who adds or deletes another port has to wait for this one.
        self.wait_for_workers(version);
        // A worker that was in the middle of a batch may have offered towards this netdev behind
        // the first retraction; none does any more.
        retracting.extend(start_retract(self.0.publication.table().iter(), ifindex));
        let mut deleted = self.stopped(&port, stop(&port, End::Flush));
        // Nothing of the others leads there.
        let mut led: Vec<_> = retracting.iter().map(|asked| Arc::clone(&asked.port)).collect();
        led.sort_unstable_by_key(|port| port.generation());
        led.dedup_by_key(|port| port.generation());
        deleted.retracted = self.retracted(retracting);
        for other in led {
            let left = undeleted_towards(&self.0, &other, ifindex).len();
            if left > 0 {
                deleted.faults.push(Fault::new(format!(
                    "{}: {left} rules that forward into it are not deleted yet: each is tried until it is",
                    other.netdev
                )));
            }
        }
        tracing::info!(
            port = %port.netdev,
            flushed = deleted.flushed,
            retracted = deleted.retracted,
            "port deleted"
        );
        Ok(deleted)
    }

    /// Deletes every port, all at once, and all connections. Nothing is retracted one by one: the ports
    /// that rules forward into go together with those that have the rules.
    pub fn close(&self) -> Vec<PortDeleted> {
        self.end(End::Flush).into_iter().map(|(_, deleted)| deleted).collect()
    }

    /// As [`close`](Self::close), but rules go on forwarding, for the next engine to adopt, on the ports whose
    /// provider's [outlive](netdev_providers::Provider::outlives) the process: [`PortDeleted::left`] says how many.
    /// What is waiting to be removed is, and what is waiting to be made is not made. Where rules cannot stay, or one
    /// could not be removed, the port is flushed. Until there is a next engine nobody follows what the rules stand on.
    pub fn leave(&self) -> Vec<(Netdev, PortDeleted)> {
        self.end(End::Leave)
    }

    fn end(&self, end: End) -> Vec<(Netdev, PortDeleted)> {
        let (table, version) = {
            let mut admin = self.admin();
            let table = self.0.publication.table();
            for port in table.iter() {
                port.draining.store(true, Ordering::SeqCst);
                admin.leave(port);
            }
            (table, self.0.publication.publish(PortTable::default()))
        };
        self.wait_for_workers(version);
        let stopping: Vec<_> = table.iter().map(|port| (port, stop(port, end))).collect();
        let deleted = stopping
            .into_iter()
            .map(|(port, stopping)| (port.netdev.clone(), self.stopped(port, stopping)))
            .collect();
        self.end_all();
        deleted
    }

    /// Waits until no worker sees an older table.
    fn wait_for_workers(&self, version: u64) {
        let at_most = self.0.limits.port_del;
        if !self.0.publication.wait(version, at_most) {
            tracing::warn!("a worker has not passed a quiescent state in {at_most:?}");
        }
    }

    /// Waits for the end of a port that was told to stop.
    fn stopped(&self, port: &Arc<Port>, stopping: Option<Asked<Stopped>>) -> PortDeleted {
        let mut deleted = PortDeleted::default();
        let Some(stopping) = stopping else { return deleted };
        match stopping.wait(self.0.limits.port_del) {
            Ok(Stopped { flushed, left, faults }) => {
                deleted.flushed = flushed;
                deleted.left = left;
                deleted.faults = faults;
            }
            Err(why) => {
                let rules = port.rules.load(Ordering::SeqCst);
                let port = &port.netdev;
                deleted.faults.push(Fault::new(match why {
                    NoAnswer::Slow => format!(
                        "{port}: the provider has not come back; it is abandoned, and up to {rules} rules are left until it does"
                    ),
                    NoAnswer::Gone => {
                        format!("{port}: its thread has ended; up to {rules} rules are left")
                    }
                }));
            }
        }
        deleted
    }

    /// Removes the rules of all ports that forward into this netdev (a port or not), because it is
    /// gone or down. Blocks until they are gone; returns how many there were. A port that does not go
    /// on is not waited for, and does it when it does.
    pub fn retract_egress(&self, egress: Ifindex) -> u64 {
        self.retracted(start_retract(self.0.publication.table().iter(), egress))
    }

    fn retracted(&self, retracting: Vec<Asked<u64>>) -> u64 {
        let at_most: Duration = self.0.limits.port_del;
        retracting.into_iter().filter_map(|asked| asked.wait(at_most).ok()).sum()
    }
}

impl Admin {
    fn leave(&mut self, port: &Arc<Port>) {
        if port.binding.is_some() {
            self.leaving.push(Arc::clone(port));
        }
    }
}

fn stop(port: &Arc<Port>, end: End) -> Option<Asked<Stopped>> {
    port.binding.as_ref()?;
    // Its flush is one call, which may take long: it is waited for accordingly.
    port.progress.thread.allow(port.rules.load(Ordering::SeqCst));
    Some(Asked::of(port, |tx| Command::Stop(end, tx)))
}

/// Only of ports that can have something.
fn start_retract<'a>(
    ports: impl Iterator<Item = &'a Arc<Port>>,
    egress: Ifindex,
) -> Vec<Asked<u64>> {
    ports
        .filter(|p| p.binding.is_some())
        .filter(|p| {
            p.shapes().forget_towards(egress);
            p.may_lead_to(egress)
        })
        .map(|p| {
            let asked = Asked::of(p, |tx| Command::Retract(egress, tx));
            // Behind the adds that wait now.
            p.queue.push(Command::Retracted(egress));
            asked
        })
        .collect()
}
