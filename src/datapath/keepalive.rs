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
//! under it. So what looks idle is taken back into software a little before it expires: if there are
//! packets, conntrack sees them, and they are sights, so that it is offloaded again; if there are none,
//! it was idle, and expires as it would have.
//!
//! What is written to conntrack, and when, is decided in [`super::life`].

use std::collections::{HashMap, HashSet};
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use netdev_providers::{Ifindex, MacAddr};

use super::TICK;
use super::backend::Shared;
use super::ends::{self, Over};
use super::lives::Lives;
use super::netfilter::conntrack::{Conntrack, CtId};
use super::pacing::Swept;
use super::resets::Resets;
use super::routing::bridged;
use super::routing::fdb::Behind;
use crate::engine::Engine;
use crate::engine::conn::{ConnHandle, ConnKey};
use crate::engine::slot::SlotState;
use crate::engine::taken::TakenBack;
use crate::engine::usage::Strays;

/// Connections that have no events (made before our event socket existed, or `nf_conntrack_events` is
/// 0) and no rules are looked at this often.
const COMPARE_EVERY: Duration = Duration::from_secs(60);
/// How many of them in one tick.
const COMPARED_AT_ONCE: usize = 512;

pub(super) struct Keeper {
    backend: Shared,
    engine: Engine,
    /// Nobody else waits for this one.
    conntrack: Conntrack,
    lives: Lives,
    resets: Resets,
    strays: Strays,
    compared: Instant,
    to_compare: Vec<(ConnKey, CtId)>,
    /// Before the present sweep.
    pause: Duration,
}

impl Keeper {
    pub(super) fn new(backend: Shared, engine: Engine, conntrack: Conntrack) -> Self {
        let pause = backend.tunables().sweeps.busy;
        Self {
            backend,
            engine,
            conntrack,
            lives: Lives::default(),
            resets: Resets::default(),
            strays: Strays::default(),
            compared: Instant::now(),
            to_compare: Vec::new(),
            pause,
        }
    }

    pub(super) fn run(mut self, stop: &AtomicBool) {
        let (mut swept, mut took) = (Instant::now(), Duration::ZERO);
        let mut next = swept + self.pause;
        while !stop.load(Ordering::Relaxed) {
            let left = next.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                std::thread::sleep(left.min(TICK));
                // What has come since the last sweep may not have so long.
                if let Some(shortest) = self.look() {
                    let soon = Swept { took, moved: true, shortest_timeout: Some(shortest) };
                    next =
                        next.min(swept + self.backend.tunables().sweeps.pause(self.pause, &soon));
                }
                continue;
            }
            let started = Instant::now();
            let (moved, shortest_timeout) = self.sweep();
            (swept, took) = (Instant::now(), started.elapsed());
            let counts = self.backend.counts();
            counts.sweeps.fetch_add(1, Ordering::Relaxed);
            let ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
            counts.last_sweep_ms.store(ms, Ordering::Relaxed);
            self.pause = self
                .backend
                .tunables()
                .sweeps
                .pause(self.pause, &Swept { took, moved, shortest_timeout });
            let ms = u64::try_from(self.pause.as_millis()).unwrap_or(u64::MAX);
            self.backend.counts().sweep_pause_ms.store(ms, Ordering::Relaxed);
            next = Instant::now() + self.pause;
            self.look();
        }
    }

    /// What is to be done between sweeps as well. The shortest timeout of what has got rules meanwhile.
    fn look(&mut self) -> Option<Duration> {
        let shortest =
            self.lives.look(&self.backend, &self.engine, &mut self.conntrack, self.pause);
        self.resets.look(&self.backend, &mut self.conntrack);
        self.compare();
        shortest
    }

    /// Ends what conntrack does not have any more, or has closed, without having told.
    fn compare(&mut self) {
        let lost = self.backend.events_lost.swap(false, Ordering::AcqRel);
        if lost || self.compared.elapsed() >= COMPARE_EVERY {
            self.compared = Instant::now();
            let known = self.backend.known.iter().filter(|k| lost || !k.evented);
            self.to_compare = known.map(|k| (*k.key(), k.id)).collect();
        }
        let now = self.to_compare.len().saturating_sub(COMPARED_AT_ONCE);
        let some = self.to_compare.split_off(now);
        if some.is_empty() {
            return;
        }
        let wanted: Vec<_> = some.iter().map(|(k, _)| (k.zone, k.original)).collect();
        match self.conntrack.get_many(&wanted) {
            Ok(entries) => {
                let mut over = Over::default();
                for ((key, id), entry) in some.into_iter().zip(entries) {
                    match entry.filter(|e| e.id == Some(id)) {
                        None => over.destroyed(&self.backend, &key, id),
                        Some(entry) => {
                            ends::remarked(&self.backend, &self.engine, &entry, false);
                            over.updated(&self.backend, &entry);
                        }
                    }
                }
                over.end(&self.backend, &self.engine);
            }
            Err(e) => tracing::warn!("connections were not compared with conntrack's table: {e}"),
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
        self.keep_neighbours(&sweep.used);
        self.keep_learnt(&sweep.used);
        self.lives.swept(self.engine.now_ms());
        (!sweep.used.is_empty(), self.lives.shortest_timeout())
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
                    let generation = slot.netdev.generation;
                    let why = TakenBack::Neighbour;
                    self.engine.slot_retract(conn, slot.direction, generation, why);
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
                    let generation = slot.netdev.generation;
                    self.engine.slot_retract(conn, slot.direction, generation, TakenBack::Bridge);
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
