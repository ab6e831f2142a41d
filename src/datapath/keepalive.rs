//! Usage: conntrack does not see packets that rules forward, so its timeouts are written from the
//! counters; the neighbour cache does not see them either, so neighbours in use are kept probed.
//!
//! **A bridge does not learn from frames that rules carry past it.** What it has learnt would age out
//! (after 300 s by default), frames that still go through it be flooded, and every rule to that host
//! be taken back at once, since nobody would know where it is. So bridges are told of the senders
//! whose rules have carried something, no others and no more often: a host that is silent is forgotten
//! when it would have been, and its rules go then; and nobody is kept who has been seen elsewhere
//! meanwhile.
//!
//! **Counters of a NIC can stand still** although its rules forward: read from the hardware now and
//! then only, or never. A connection in use would look idle then, and its conntrack entry would expire
//! under it. So a connection of which the NIC says nothing is taken back into software a little before
//! it expires ([`last_chance_ms`]): if there are packets, conntrack sees them, and they are sights, so
//! that it is offloaded again; if there are none, it was idle, and expires as it would have. Counters
//! of the kernel's own rules are believed.

use std::collections::{HashMap, HashSet};
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use netdev_providers::{Ifindex, L4Proto, MacAddr};
use nix::errno::Errno;

use super::TICK;
use super::backend::{Shared, ct_id};
use super::ends;
use super::netfilter::conntrack::{CtUpdate, Timeouts, timeouts};
use super::pacing::{SweepBounds, Swept};
use super::routing::bridged;
use super::routing::fdb::Behind;
use crate::engine::Engine;
use crate::engine::conn::ConnHandle;
use crate::engine::slot::SlotState;
use crate::engine::usage::{Strays, Sweep, Usage};

/// Connections are compared with conntrack's table this often: entries made before our event socket
/// existed have no end events (`nf_conntrack_events` = 2).
const COMPARE_EVERY: Duration = Duration::from_secs(60);

pub(super) struct Keeper {
    backend: Shared,
    engine: Engine,
    strays: Strays,
    compared: Instant,
    bounds: SweepBounds,
    /// Before the present sweep.
    pause: Duration,
}

impl Keeper {
    pub(super) fn new(backend: Shared, engine: Engine, bounds: SweepBounds) -> Self {
        Self {
            backend,
            engine,
            strays: Strays::default(),
            compared: Instant::now(),
            bounds,
            pause: bounds.busy,
        }
    }

    pub(super) fn run(mut self, stop: &AtomicBool) {
        let mut next = Instant::now() + self.pause;
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
            self.pause = self.bounds.pause(self.pause, &Swept { took, moved, shortest_timeout });
            let ms = u64::try_from(self.pause.as_millis()).unwrap_or(u64::MAX);
            self.backend.counts().sweep_pause_ms.store(ms, Ordering::Relaxed);
            next = Instant::now() + self.pause;
        }
    }

    /// Whether any rule had carried something, and the shortest timeout of what is offloaded.
    fn sweep(&mut self) -> (bool, Option<Duration>) {
        let sweep = self.engine.sweep(&mut self.strays);
        for (port, fault) in &sweep.faults {
            tracing::warn!(port, "usage could not be read: {fault}");
        }
        if sweep.without_effect > 0 {
            tracing::warn!(
                slots = sweep.without_effect,
                "rules that a NIC says it has do nothing: was it reset?"
            );
        }
        self.extend(&sweep.used);
        self.keep_neighbours(&sweep.used);
        self.keep_learnt(&sweep.used);
        self.give_last_chances(&sweep.still);
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
            let timeout = self.timeout(conn, &state_timeouts);
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

    fn timeout(&self, conn: &ConnHandle, namespace: &Timeouts) -> Duration {
        let learnt = ct_id(conn).and_then(|id| self.backend.known.get(&id)?.timeout);
        let stream = match conn.key().original.proto() {
            L4Proto::Tcp => namespace.tcp_established,
            L4Proto::Udp => namespace.udp_stream,
        };
        timeout_of(learnt, stream)
    }

    /// Takes back what would expire soon for all that the NIC says of it.
    fn give_last_chances(&self, still: &[ConnHandle]) {
        if still.is_empty() {
            return;
        }
        let Ok(namespace) = timeouts() else { return };
        let now = self.engine.now_ms();
        for conn in still {
            let Usage::LastUsed { at_ms, .. } = self.engine.conn_update(conn) else { continue };
            let timeout = self.timeout(conn, &namespace);
            if now >= last_chance_ms(at_ms, timeout, self.pause) && !conn.is_dead() {
                tracing::debug!(%conn, "seems idle, and expires soon: software is to see whether it is");
                self.engine.conn_retract(conn);
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
                let neighbour = (path.oif.unwrap_or(path.egress), next_hop);
                keep.insert(neighbour);
                if macs.get(&neighbour).copied() != path.dst_mac {
                    self.engine.slot_retract(conn, slot.direction, slot.netdev.generation);
                }
            }
        }
        self.backend.resolver().keep_neighbours(keep);
    }

    /// Senders of bridged frames that rules have carried since the last sweep are where they were.
    /// Rules that send frames where the bridge would not are taken back: it may have learnt another
    /// way while they were made.
    fn keep_learnt(&self, used: &[ConnHandle]) {
        if !self.backend.config().bridged {
            return;
        }
        let since_last = u64::try_from(self.pause.as_millis()).unwrap_or(u64::MAX);
        let (links, fdb) = (self.backend.links(), self.backend.fdb());
        let mut seen: HashMap<Ifindex, HashSet<(Ifindex, MacAddr)>> = HashMap::new();
        for conn in used {
            for slot in self.engine.slots(conn) {
                let Some(path) = slot.path.filter(|p| p.bridged) else { continue };
                if slot.state == SlotState::Installed
                    && !self.backend.is_still_bridged(conn, &slot, &path)
                {
                    self.engine.slot_retract(conn, slot.direction, slot.netdev.generation);
                    continue;
                }
                if slot.idle_ms.is_none_or(|idle| idle >= since_last) {
                    continue;
                }
                let port = path.iif.unwrap_or(slot.netdev.ifindex);
                let Some(from) = self.backend.bridged_from(conn, &slot) else { continue };
                let Some((_, bridge)) = bridged::port_of(links, port) else { continue };
                if fdb.get(bridge.ifindex, from) == Some(Behind::Port(port)) {
                    seen.entry(bridge.ifindex).or_default().insert((port, from));
                }
            }
        }
        let seen = seen.into_iter().map(|(bridge, of)| (bridge, of.into_iter().collect()));
        self.backend.resolver().keep_learnt(&seen.collect());
    }
}

/// The timeout that an offloaded connection is kept up with. What conntrack itself had set when the
/// connection was sighted can be longer than the namespace's, by a timeout policy. It can also be
/// shorter, and then says nothing: TCP with data that was not yet acknowledged, UDP that was not yet
/// a stream.
fn timeout_of(learnt: Option<Duration>, namespace: Duration) -> Duration {
    learnt.unwrap_or_default().max(namespace)
}

/// When a connection that was last seen used then is taken back into software. Before it expires, by
/// the longest time until the next sweep and some seconds for a packet to come by; and not before half
/// of its timeout has passed.
fn last_chance_ms(used_ms: u64, timeout: Duration, pause: Duration) -> u64 {
    let before = pause.saturating_mul(2).saturating_add(Duration::from_secs(5)).min(timeout / 2);
    let after = timeout.saturating_sub(before);
    used_ms.saturating_add(u64::try_from(after.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_chance_comes_before_the_end_and_in_the_second_half() {
        let s = Duration::from_secs;
        assert_eq!(last_chance_ms(1000, s(120), s(5)), 1000 + 105_000);
        assert_eq!(last_chance_ms(0, s(12), s(5)), 6000);
        assert_eq!(last_chance_ms(u64::MAX, s(12), s(5)), u64::MAX);
    }

    #[test]
    fn a_timeout_of_unacknowledged_data_is_not_taken_for_the_states() {
        let established = Duration::from_secs(432_000);
        assert_eq!(timeout_of(Some(Duration::from_secs(300)), established), established);
        assert_eq!(timeout_of(None, established), established);
        let policy = Duration::from_secs(500_000);
        assert_eq!(timeout_of(Some(policy), established), policy);
    }
}
