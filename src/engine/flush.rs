//! Takes rules away: all, those of a port, or those of some connections. The connections live on.

use std::sync::Arc;

use netdev_providers::{Fault, Ifindex, Netdev};

use super::ask::{Asked, NoAnswer};
use super::conn::ConnHandle;
use super::port::Port;
use super::queue::Command;
use super::reconcile::Reconciled;
use super::taken::TakenBack;
use super::{Engine, FlushFilter, NoSuchPort};

impl Engine {
    /// Removes rules; the connections live on in software, and come back when they are seen again.
    /// Without a zone or a tuple, ports are flushed as a whole, in a few messages each, and what waits
    /// to be added is taken back. Blocks until the rules are gone; returns how many there were on
    /// each port that had some. A port that does not go on is not waited for, and does it when it does.
    ///
    /// # Errors
    /// When there is no such port.
    pub fn flush(&self, filter: &FlushFilter) -> Result<Vec<(Netdev, u64)>, NoSuchPort> {
        let ports = self.ports_of(filter.port)?;
        let counts = if filter.zone.is_none() && filter.tuple.is_none() {
            self.flush_ports(&ports, filter.why)
        } else {
            self.flush_conns(&ports, &self.conns_of(filter.tuple.as_ref(), filter.zone), filter.why)
        };
        Ok(counts.into_iter().filter(|(_, n)| *n > 0).collect())
    }

    /// The ports with a provider: all, or this one.
    fn ports_of(&self, port: Option<Ifindex>) -> Result<Vec<Arc<Port>>, NoSuchPort> {
        let table = self.0.publication.table();
        let ports = match port {
            Some(ifindex) => vec![table.get(ifindex).ok_or(NoSuchPort(ifindex))?],
            None => table.iter().collect(),
        };
        Ok(ports.into_iter().filter(|p| p.binding.is_some()).cloned().collect())
    }

    fn flush_ports(&self, ports: &[Arc<Port>], why: TakenBack) -> Vec<(Netdev, u64)> {
        let asked: Vec<_> = ports
            .iter()
            .inspect(|p| {
                p.shapes().forget();
                p.capacity.forget_learnt();
            })
            .filter(|p| !p.is_empty())
            .map(|p| Asked::of(p, |tx| Command::Flush(why, tx)))
            .collect();
        self.collected(asked)
    }

    fn flush_conns(
        &self,
        ports: &[Arc<Port>],
        conns: &[ConnHandle],
        why: TakenBack,
    ) -> Vec<(Netdev, u64)> {
        let table = self.0.publication.table();
        let mut counts = vec![0; ports.len()];
        let mut touched = vec![false; ports.len()];
        let mut at: Vec<_> = ports.iter().enumerate().map(|(n, p)| (p.generation(), n)).collect();
        at.sort_unstable();
        for conn in conns {
            for (d, generation, _) in conn.all_slots() {
                let Ok(found) = at.binary_search_by_key(&generation, |(g, _)| *g) else { continue };
                let n = at[found].1;
                touched[n] = true;
                counts[n] += u64::from(self.unwind_slot(&table, conn, d, generation, why));
            }
        }
        let asked = ports
            .iter()
            .zip(touched)
            .filter(|(_, touched)| *touched)
            .map(|(p, _)| Asked::of(p, Command::Settle))
            .collect();
        self.collected(asked);
        ports.iter().map(|p| p.netdev.clone()).zip(counts).collect()
    }

    fn collected(&self, asked: Vec<Asked<u64>>) -> Vec<(Netdev, u64)> {
        let at_most = self.0.limits.port_del;
        asked
            .into_iter()
            .map(|asked| (asked.port.netdev.clone(), asked.wait(at_most).unwrap_or(0)))
            .collect()
    }

    /// Reconciles one port, or all, and returns what was done. Blocks until it is, as long as the port
    /// goes on.
    ///
    /// # Errors
    /// When there is no such port.
    pub fn reconcile(
        &self,
        port: Option<Ifindex>,
    ) -> Result<Vec<(Netdev, Reconciled)>, NoSuchPort> {
        let asked: Vec<_> = self
            .ports_of(port)?
            .iter()
            .map(|p| Asked::of(p, |tx| Command::Reconcile(Some(tx))))
            .collect();
        let at_most = self.0.limits.port_del;
        let answer = |asked: Asked<Reconciled>| {
            let netdev = asked.port.netdev.clone();
            let reconciled = asked.wait(at_most).unwrap_or_else(|why| Reconciled {
                fault: Some(Fault::new(match why {
                    NoAnswer::Slow => "the port is slow: it is reconciled when it goes on",
                    NoAnswer::Gone => "the port was deleted meanwhile",
                })),
                ..Reconciled::default()
            });
            (netdev, reconciled)
        };
        Ok(asked.into_iter().map(answer).collect())
    }
}
