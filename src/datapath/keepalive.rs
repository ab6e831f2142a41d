//! Usage: conntrack does not see packets that rules forward, so its timeouts are written from the
//! counters; the neighbour cache does not see them either, so neighbours in use are kept probed.

use std::collections::{HashMap, HashSet};
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use netdev_providers::L4Proto;
use nix::errno::Errno;

use super::TICK;
use super::backend::{Shared, ct_id};
use super::ends;
use super::netfilter::conntrack::{CtUpdate, timeouts};
use super::pacing::{SweepBounds, Swept};
use crate::engine::Engine;
use crate::engine::conn::ConnHandle;
use crate::engine::usage::{Strays, Sweep};

/// Connections are compared with conntrack's table this often: entries made before our event socket
/// existed have no end events (`nf_conntrack_events` = 2).
const COMPARE_EVERY: Duration = Duration::from_secs(60);

pub(super) struct Keeper {
    backend: Shared,
    engine: Engine,
    strays: Strays,
    compared: Instant,
}

impl Keeper {
    pub(super) fn new(backend: Shared, engine: Engine) -> Self {
        Self { backend, engine, strays: Strays::default(), compared: Instant::now() }
    }

    pub(super) fn run(mut self, bounds: SweepBounds, stop: &AtomicBool) {
        let mut pause = bounds.busy;
        let mut next = Instant::now() + pause;
        while !stop.load(Ordering::Relaxed) {
            let left = next.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                std::thread::sleep(left.min(TICK));
                continue;
            }
            let started = Instant::now();
            let (moved, shortest_timeout) = self.sweep();
            let took = started.elapsed();
            let counts = self.backend.counts();
            counts.sweeps.fetch_add(1, Ordering::Relaxed);
            let ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
            counts.last_sweep_ms.store(ms, Ordering::Relaxed);
            pause = bounds.pause(pause, &Swept { took, moved, shortest_timeout });
            let ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
            counts.sweep_pause_ms.store(ms, Ordering::Relaxed);
            next = Instant::now() + pause;
        }
    }

    /// Whether any rule had carried something, and the shortest timeout of what is offloaded.
    fn sweep(&mut self) -> (bool, Option<Duration>) {
        let sweep = self.engine.sweep(&mut self.strays);
        for (port, fault) in &sweep.faults {
            tracing::warn!(port, "usage could not be read: {fault}");
        }
        self.extend(&sweep.used);
        self.keep_neighbours(&sweep.used);
        if self.compared.elapsed() >= COMPARE_EVERY {
            self.compared = Instant::now();
            ends::compare(&self.backend, &self.engine);
        }
        (!sweep.used.is_empty(), self.shortest_timeout(&sweep))
    }

    fn shortest_timeout(&self, sweep: &Sweep) -> Option<Duration> {
        if sweep.rules == 0 {
            return None;
        }
        // What a timeout policy has set can be longer: that does no harm here.
        timeouts().ok().map(|t| t.udp_stream.min(t.tcp_established))
    }

    /// `expiry = max(expiry, last use + timeout of the state)`: the last use is now, within one
    /// sweep, and nothing can have set a later expiry than the state's timeout from now.
    fn extend(&self, used: &[ConnHandle]) {
        let state_timeouts = match timeouts() {
            Ok(t) => t,
            Err(e) => {
                tracing::warn!("conntrack timeouts are not kept up: {e}");
                return;
            }
        };
        let mut updates = Vec::with_capacity(used.len());
        for conn in used {
            let key = conn.key();
            let learnt = ct_id(conn).and_then(|id| self.backend.known.get(&id)?.timeout);
            let stream = match key.original.proto() {
                L4Proto::Tcp => state_timeouts.tcp_established,
                L4Proto::Udp => state_timeouts.udp_stream,
            };
            let timeout = timeout_of(learnt, stream);
            updates.push(CtUpdate {
                zone: key.zone,
                original: key.original,
                timeout: Some(timeout),
                liberal: None,
            });
        }
        let acks = match self.backend.conntrack().update(&updates) {
            Ok(acks) => acks,
            Err(e) => {
                tracing::warn!("conntrack timeouts could not be written: {e}");
                return;
            }
        };
        for (conn, ack) in used.iter().zip(acks) {
            match ack {
                Ok(()) => {}
                Err(e) if e.errno == Errno::ENOENT => {
                    if let Some(id) = ct_id(conn) {
                        ends::destroyed(&self.backend, &self.engine, id);
                    }
                }
                Err(e) => tracing::debug!(%conn, "timeout not written: {e}"),
            }
        }
    }

    /// Neighbours of rules that carried packets are in use, whatever the kernel sees of it. Rules
    /// made with a MAC address that is not the neighbour's any more are taken back.
    fn keep_neighbours(&self, used: &[ConnHandle]) {
        let mut keep = HashSet::new();
        let macs: HashMap<_, _> =
            self.backend.neighbours.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for conn in used {
            for slot in self.engine.slots(conn) {
                let Some(path) = slot.path else { continue };
                let Some(next_hop) = path.next_hop else { continue };
                keep.insert((path.egress, next_hop));
                if macs.get(&(path.egress, next_hop)).copied() != path.dst_mac {
                    self.engine.slot_retract(conn, slot.direction, slot.netdev.generation);
                }
            }
        }
        self.backend.resolver().keep_neighbours(keep);
    }
}

/// The timeout that an offloaded connection is kept up with. What conntrack itself had set when the
/// connection was sighted can be longer than the namespace's, by a timeout policy. It can also be
/// shorter, and then says nothing: TCP with data that was not yet acknowledged, UDP that was not yet
/// a stream.
fn timeout_of(learnt: Option<Duration>, namespace: Duration) -> Duration {
    learnt.unwrap_or_default().max(namespace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_of_unacknowledged_data_is_not_taken_for_the_states() {
        let established = Duration::from_secs(432_000);
        assert_eq!(timeout_of(Some(Duration::from_secs(300)), established), established);
        assert_eq!(timeout_of(None, established), established);
        let policy = Duration::from_secs(500_000);
        assert_eq!(timeout_of(Some(policy), established), policy);
    }
}
