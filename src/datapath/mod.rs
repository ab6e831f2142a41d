//! The kernel as the datapath: it forwards, tracks connections, and shows what it sees.
//!
//! ```text
//!  end of postrouting    nft set "sighted" + NFLOG   conntrack events   rtnetlink events
//!  (a packet in              |                            |                  |
//!   software)                v                            v                  v
//!                         sights ---- offers ---->     ends            changes
//!                                        \               |                  |
//!                                         v              v                  v
//!                                        engine: ports, slots, writers
//!                                         ^              |
//!            resolve, prepare, rearm ----/               +--> sweeps: usage -> conntrack timeouts
//! ```
//!
//! | module | its thread |
//! |---|---|
//! | [`backend`] | none: callbacks on the engine's port threads |
//! | [`admission`] | none: which connections may be offloaded, asked by `sights` |
//! | `sights` | reads NFLOG, is a worker of the engine; by `identify`, which connections sights are of |
//! | `rearm` | deletes elements of the ledger, a little at a time, and compares it with what is known |
//! | `ends` | reads conntrack events |
//! | `changes` | reads link, neighbour and route events; attaches and detaches ports; by `egress`, who stands where packets leave |
//! | `ruleset` | follows the firewall, since offloaded packets no longer pass it: nf_tables events, who stands in the hooks |
//! | `firewall` | none: what a decision of the firewall stands on, and what a change concerns |
//! | [`supervisor`] | none: whether one of these has ended, without which nothing may be offloaded |
//! | `keepalive` | sweeps usage, keeps conntrack entries and neighbours alive; by `life` (what is written to conntrack, and when: decisions alone) and `lives`; `resets` are closed by conntrack, and may live |
//! | [`inspect`], `ended` | none: what is known of a connection, for who asks |
//! | [`lint`] | none: what offloaded packets go without on this machine, by the kinds of [`skipped`] |
//! | [`netfilter`], [`routing`] | none: what they speak with the kernel |

pub mod admission;
pub mod backend;
mod changes;
mod config;
mod egress;
pub mod ended;
mod ends;
mod firewall;
mod identify;
pub mod inspect;
mod keepalive;
mod life;
pub mod lint;
mod lives;
pub mod netfilter;
mod pacing;
mod pool;
mod rearm;
mod resets;
pub mod routing;
mod ruleset;
mod sights;
pub mod skipped;
pub mod supervisor;

use std::convert::Infallible;
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use netdev_providers::netlink::NetlinkError;
use netdev_providers::{Generation, HwFlags, Ifindex};
use tokio::sync::oneshot;

pub use self::backend::{Backend, Counts, Observer};
pub use self::config::{Config, MIN_PACKETS, OnRulesetChange, Revalidation, Tunables};
use self::identify::Identifier;
use self::netfilter::conntrack::{Conntrack, ConntrackError, CtEvents};
use self::netfilter::ledger::LedgerError;
use self::netfilter::nflog::{NflogError, SightLog};
pub use self::pacing::SweepBounds;
use self::routing::links::Link;
use self::routing::monitor::{self, NetEvent};
use self::routing::stack::not_a_port;
use self::supervisor::{Ended, Supervisor};
use crate::engine::{Engine, NewPort, NoSuchPort, PortAddError, PortDeleted};

/// How ports are attached when netdevs appear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortSpec {
    /// The classes to try, in this order; `None`: all.
    pub providers: Option<Vec<String>>,
    /// Where rules may live.
    pub hw_flags: HwFlags,
    /// How many rules there may be; `None`: until the provider says that there is no more room.
    pub capacity: Option<u32>,
}

/// Decides by its name whether, and how, a netdev becomes a port.
pub type PortPolicy = Arc<dyn Fn(&str) -> Option<PortSpec> + Send + Sync>;

/// Why the kernel datapath could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The sight ledger.
    #[error("sight ledger")]
    Ledger(#[from] LedgerError),
    /// The packet log.
    #[error("sight log")]
    Nflog(#[from] NflogError),
    /// conntrack.
    #[error("conntrack")]
    Conntrack(#[from] ConntrackError),
    /// `min-bytes` without counters to read.
    #[error(
        "min-bytes needs conntrack's counters: `sysctl net.netfilter.nf_conntrack_acct=1`, and a kernel that has it"
    )]
    Accounting,
    /// Routes and neighbours.
    #[error("rtnetlink")]
    Route(#[source] NetlinkError),
    /// nf_tables events.
    #[error("nf_tables events")]
    Ruleset(#[source] NetlinkError),
    /// The links could not be read within the time allowed.
    #[error("the netdevs of this namespace could not be read")]
    Links,
    /// A thread could not be started.
    #[error("thread")]
    Thread(#[from] std::io::Error),
    /// A thread ended at once.
    #[error(transparent)]
    Ended(#[from] Ended),
}

/// Why a netdev was not attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Its connections are offloaded below it, or nowhere.
    #[error("{0}")]
    NotAPort(String),
    /// The engine did not take it.
    #[error(transparent)]
    Engine(#[from] PortAddError),
}

/// What a daemon has left to the next one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Rules that go on forwarding.
    pub rules: u64,
    /// Rules that went: of providers whose rules end with the process, and of ports where they could not stay.
    pub flushed: u64,
    /// What may be left besides, or went wrong, in words.
    pub faults: Vec<String>,
}

/// The running datapath. [`stop`](Self::stop) it; a drop leaves its threads to the process's end.
pub struct KernelDatapath {
    backend: Arc<Backend>,
    engine: Engine,
    supervisor: Supervisor,
    stop: Arc<AtomicBool>,
    stop_monitor: Option<oneshot::Sender<()>>,
    /// Kept until the stop: `changes` ends with the last of them, and is not to be thought the one that
    /// ended first where it was `monitor`.
    net_events: Option<Sender<NetEvent>>,
    threads: Vec<JoinHandle<()>>,
}

/// How often threads that wait for the kernel look whether they are to stop.
const TICK: Duration = Duration::from_millis(200);
/// How long the netdevs that are there may take at the start: binding them loads kernel modules and
/// finds out what each takes, which is seconds on a busy machine.
const FIRST_SYNC: Duration = Duration::from_secs(60);

impl KernelDatapath {
    /// Starts the threads: ports are attached by `policy`, now and when netdevs appear. Returns
    /// after the netdevs that are there have been looked at. When the supervisor tells that one of
    /// them has ended, what is offloaded is nobody's any more: [`stop`](Self::stop).
    ///
    /// # Errors
    /// When a socket or a thread cannot be made; what was started is stopped again.
    pub fn start(
        backend: Arc<Backend>,
        engine: Engine,
        policy: PortPolicy,
        supervisor: &Supervisor,
    ) -> Result<Self, DatapathError> {
        let stop = Arc::new(AtomicBool::new(false));
        let (stop_monitor, monitor_stopped) = oneshot::channel();
        let (events, net_events): (Sender<NetEvent>, Receiver<NetEvent>) = mpsc::channel();
        let mut datapath = Self {
            backend: Arc::clone(&backend),
            engine: engine.clone(),
            supervisor: supervisor.clone(),
            stop: Arc::clone(&stop),
            stop_monitor: Some(stop_monitor),
            net_events: Some(events.clone()),
            threads: Vec::new(),
        };
        backend.set_supervisor(supervisor.clone());
        let log = SightLog::open(backend.config().nflog_group)?;
        let mut ct_events = CtEvents::open(false)?;
        if let Some(heard) = backend.heard()
            && let Err(e) = ct_events.hear_only_of(heard)
        {
            tracing::info!("events of all connections are read: {e}");
        }
        let (keepers, identifier) = (Conntrack::open()?, Identifier::open()?);
        for port in backend.conntrack_ports()?.into_iter().chain([keepers.port()?]) {
            ct_events.ignore_updates_of(port);
        }
        let (synced, first_sync) = mpsc::channel();

        datapath.spawn("sights", {
            let (backend, engine, stop) = (Arc::clone(&backend), engine.clone(), Arc::clone(&stop));
            move || sights::Reader::new(backend, engine, log, identifier).run(&stop)
        })?;
        datapath.spawn("ends", {
            let (backend, engine, stop) = (Arc::clone(&backend), engine.clone(), Arc::clone(&stop));
            move || ends::run(&backend, &engine, ct_events, &stop)
        })?;
        datapath.spawn("rearm", {
            let (backend, stop) = (Arc::clone(&backend), Arc::clone(&stop));
            move || {
                let delete = |keys: &[_]| backend.delete_elements(keys);
                backend.rearming().run(&stop, delete, || backend.compare_ledger());
                Ok::<_, Infallible>(())
            }
        })?;
        let watch = ruleset::Watch::open(Arc::clone(&backend)).map_err(DatapathError::Ruleset)?;
        datapath.spawn("ruleset", {
            let (engine, stop) = (engine.clone(), Arc::clone(&stop));
            move || watch.run(&engine, &stop)
        })?;
        let tc_prio = backend.config().tc_prio;
        datapath.spawn("monitor", move || monitor::run(&events, tc_prio, monitor_stopped))?;
        datapath.spawn("changes", {
            let (backend, engine) = (Arc::clone(&backend), engine.clone());
            move || {
                changes::Changes::new(backend, engine, policy, synced).run(&net_events);
                Ok::<_, Infallible>(())
            }
        })?;
        datapath.spawn("keepalive", {
            let stop = Arc::clone(&stop);
            move || {
                keepalive::Keeper::new(backend, engine, keepers).run(&stop);
                Ok::<_, Infallible>(())
            }
        })?;
        if let Err(e) = datapath.wait_synced(&first_sync) {
            for left in datapath.stop() {
                tracing::warn!("while closing: {left}");
            }
            return Err(e);
        }
        Ok(datapath)
    }

    fn wait_synced(&self, first_sync: &Receiver<()>) -> Result<(), DatapathError> {
        let deadline = Instant::now() + FIRST_SYNC;
        while first_sync.recv_timeout(TICK).is_err() {
            if let Some(ended) = self.supervisor.ended() {
                return Err(ended.into());
            }
            if Instant::now() >= deadline {
                return Err(DatapathError::Links);
            }
        }
        Ok(())
    }

    fn spawn<E: Error>(
        &mut self,
        name: &str,
        f: impl FnOnce() -> Result<(), E> + Send + 'static,
    ) -> std::io::Result<()> {
        self.threads.push(self.supervisor.spawn(name, f)?);
        Ok(())
    }

    /// Attaches a netdev that is there. By hand: the policy is not asked.
    ///
    /// # Errors
    /// When it is a port already, a class asked for does not exist, or connections are offloaded
    /// below it.
    pub fn attach(&self, link: &Link, spec: PortSpec) -> Result<Generation, AttachError> {
        attach(&self.backend, &self.engine, link, spec)
    }

    /// Detaches a port. The netdev stays.
    ///
    /// # Errors
    /// When there is no such port.
    pub fn detach(&self, ifindex: Ifindex) -> Result<PortDeleted, NoSuchPort> {
        detach(&self.backend, &self.engine, ifindex)
    }

    /// Ends sighting, removes every rule and everything else of ours from the kernel, and ends the
    /// threads. Returns what may be left, in words. Idempotent.
    pub fn stop(&mut self) -> Vec<String> {
        if !self.end() {
            return Vec::new();
        }
        let faults = self.engine.close().into_iter().flat_map(|deleted| deleted.faults);
        faults.map(|fault| fault.to_string()).collect()
    }

    /// As [`stop`](Self::stop), but rules that outlive the process go on forwarding, for the next daemon to adopt.
    /// Until then nobody follows what they stand on: the firewall, routes, neighbours, and how long conntrack keeps
    /// their connections.
    pub fn leave(&mut self) -> Left {
        let mut left = Left::default();
        if !self.end() {
            return left;
        }
        for (netdev, deleted) in self.engine.leave() {
            left.rules += deleted.left;
            left.flushed += deleted.flushed;
            let faults = deleted.faults.iter().map(|fault| format!("{netdev}: {fault}"));
            left.faults.extend(faults);
        }
        left
    }

    /// Ends sighting, and the threads. False: that was done.
    fn end(&mut self) -> bool {
        if self.stop.swap(true, Ordering::SeqCst) {
            return false;
        }
        self.supervisor.stopping();
        // First the ledger: what is flushed below must not be sighted again.
        self.backend.remove_ledger();
        if let Some(stop) = self.stop_monitor.take() {
            let _ = stop.send(());
        }
        self.net_events = None;
        for thread in self.threads.drain(..) {
            // How it ended is the supervisor's to tell.
            let _ = thread.join();
        }
        true
    }
}

fn attach(
    backend: &Backend,
    engine: &Engine,
    link: &Link,
    spec: PortSpec,
) -> Result<Generation, AttachError> {
    if let Some(why) = not_a_port(backend.links(), link) {
        return Err(AttachError::NotAPort(why));
    }
    let generation = engine.port_add(NewPort {
        ifindex: link.ifindex,
        name: link.name.clone(),
        hw_flags: spec.hw_flags,
        providers: spec.providers,
        capacity: spec.capacity,
    })?;
    // Only now: what is sighted on a netdev that is no port yet would be offered to nobody.
    watch(backend, engine);
    // Packets of netdevs above it may have been sighted when it was none.
    if !backend.links().above(link.ifindex).is_empty() {
        backend.forget_netdev(link.ifindex);
    }
    if let (Some(observer), Some((netdev, class))) = (backend.observer(), engine.port(link.ifindex))
    {
        observer.port_added(&netdev, class);
    }
    Ok(generation)
}

/// Lets packets of the ports, and of what stands above them now, be sighted.
fn watch(backend: &Backend, engine: &Engine) {
    let links = backend.links().all();
    let ports = links.iter().map(|l| l.ifindex).filter(|&i| engine.port(i).is_some());
    backend.watch(ports);
}

fn detach(backend: &Backend, engine: &Engine, ifindex: Ifindex) -> Result<PortDeleted, NoSuchPort> {
    let port = engine.port(ifindex);
    let deleted = engine.port_del(ifindex)?;
    if let (Some(observer), Some((netdev, _))) = (backend.observer(), port) {
        observer.port_deleted(&netdev, &deleted);
    }
    watch(backend, engine);
    backend.forget_netdev(ifindex);
    Ok(deleted)
}

impl Drop for KernelDatapath {
    fn drop(&mut self) {
        for left in self.stop() {
            tracing::warn!("while closing: {left}");
        }
    }
}
