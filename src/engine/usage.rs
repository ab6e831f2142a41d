//! What rules carried, and when a connection was last used.
//!
//! A **sweep** asks every provider for the counters of its rules. A counter that moved means that
//! the connection was used since the sweep before; the time of the sweep is taken, so an expiry
//! computed from it is never too early and at most one sweep too late.
//!
//! A sweep also finds what is not as it should be: a rule that no slot stands for (seen by two
//! sweeps in a row: it is deleted), and a slot whose rule is gone (somebody removed it: the slot is
//! emptied, so that the next packet offers it again), and a rule that the NIC says it has and that
//! does nothing (see `doubt`).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError, SendError, Sender};
use std::time::Duration;

use netdev_providers::{Cookie, Direction, Epoch, Fault, Generation, Provider, RuleId, RuleReport};

use super::Engine;
use super::capacity::{Candidate, Slowest};
use super::conn::ConnHandle;
use super::contain::contained;
use super::doubt::Doubts;
use super::lines::Line;
use super::port::{Dump, Port};
use super::queue::Command;
use super::slot::SlotState;
use super::state::{PortSlot, Reported, Swept};
use super::taken::TakenBack;

/// Whether, and when, a connection was last used by rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// No rule of it is installed: what the datapath itself saw is all there is.
    NotOffloaded,
    /// Something is under way: ask again, and do not let it expire meanwhile.
    Unknown,
    /// By rules on one or more ports.
    LastUsed {
        /// When, on the engine's clock: never in the future. A rule that carried nothing counts
        /// from its installation.
        at_ms: u64,
        /// Packets that its present rules carried.
        packets: u64,
        /// Bytes that its present rules carried.
        bytes: u64,
    },
}

/// When a connection may expire: never earlier than it would have without offload.
///
/// `expiry_ms` is its present expiry, `timeout_ms` that of its state.
#[must_use]
pub fn extended_expiry(expiry_ms: u64, usage: Usage, timeout_ms: u64, now_ms: u64) -> u64 {
    match usage {
        Usage::NotOffloaded => expiry_ms,
        Usage::Unknown => expiry_ms.max(now_ms.saturating_add(timeout_ms)),
        Usage::LastUsed { at_ms, .. } => {
            expiry_ms.max(at_ms.min(now_ms).saturating_add(timeout_ms))
        }
    }
}

/// What a sweep found.
#[derive(Debug, Default)]
pub struct Sweep {
    /// Connections used since the sweep before, each once.
    pub used: Vec<ConnHandle>,
    /// Connections of rules that the NIC has and whose counters have not moved since the sweep before:
    /// idle ones, and such as the NIC keeps no counters for. Maybe more than once.
    pub still: Vec<ConnHandle>,
    /// Rules reported.
    pub rules: u64,
    /// Rules that no slot stands for.
    pub strays: u64,
    /// Slots whose rule was gone.
    pub lost: u64,
    /// Slots whose rule the NIC says it has, and that does nothing.
    pub without_effect: u64,
    /// Ports that could not be swept to the end.
    pub faults: Vec<(String, Fault)>,
}

impl Engine {
    /// Sweeps all ports. One thread at a time; blocks, for [`Limits::complete`](super::Limits) beyond its
    /// last report per provider that does not answer, the first time. What it reports when it
    /// comes back is taken by the next sweep.
    pub fn sweep(&self, strays: &mut Strays) -> Sweep {
        // At one a second they last for a century.
        let id = self.0.sweeps.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let mut sweep = Sweep::default();
        let mut used = HashSet::new();
        let before = std::mem::take(&mut strays.seen);
        for port in self.0.publication.table().iter() {
            let Some(binding) = &port.binding else { continue };
            self.tell_of_many(port);
            let dump = match self.dump_of(port, &binding.provider, &mut strays.asker) {
                Some(Ok(dump)) => dump,
                Some(Err(fault)) => {
                    // Of the rules nothing is known, so what was strange about them still is.
                    let of_it = before.iter().filter(|s| s.port == port.generation());
                    strays.seen.extend(of_it.copied());
                    sweep.faults.push((port.netdev.name.clone(), fault));
                    continue;
                }
                None => continue,
            };
            let Dump { started_ms, reports, result } = dump;
            sweep.rules += reports.len() as u64;
            // What the port held when its provider was asked and holds still; the rest is noticed by the next
            // sweep.
            let mut held = HeldSlots::default();
            port.walk_held(|part| {
                held.extend(part.into_iter().map(|(conn, d)| ((conn.epoch(), d), conn)))
            });
            let in_front = port.ask(|provider| provider.in_front()).unwrap_or_default();
            let mut look = Look {
                port,
                in_front: &in_front,
                id,
                sweep: &mut sweep,
                used: &mut used,
                before: &before,
                seen: &mut strays.seen,
                doubts: &mut strays.doubts,
                still: Vec::new(),
                held: &held,
            };
            for report in reports {
                self.reported(&mut look, report);
            }
            let still = look.still;
            sweep.still.extend(still.iter().map(|(conn, _)| conn.clone()));
            let without_effect = self.doubt(port, still, &in_front, id, &mut strays.doubts);
            if without_effect > 0 {
                sweep.without_effect += without_effect;
                port.ask(|provider| provider.hardware_suspect());
            }
            match result {
                Ok(()) => sweep.lost += self.find_lost(port, held, id, started_ms),
                Err(fault) => {
                    port.queue.push(Command::Repair);
                    sweep.faults.push((port.netdev.name.clone(), fault));
                }
            }
        }
        strays.doubts.settle(id);
        sweep
    }

    /// Says of how many rules there would have been a line each, and how many offers were refused.
    fn tell_of_many(&self, port: &Port) {
        let now_ms = self.now_ms();
        for (line, count) in port.lines.due(now_ms) {
            tracing::warn!(port = %port.netdev, count, "{}", line.words());
        }
        for (reason, count) in port.lines.refusals(&port.counters.read().reasons, now_ms) {
            tracing::warn!(port = %port.netdev, %reason, count, "offers were refused: {}", reason.help());
        }
    }

    /// What the provider reports; `None` when its port is being deleted. It is asked on another thread:
    /// one that panics makes its port faulty, one that does not come back makes it slow, and the
    /// others are swept all the same.
    fn dump_of(
        &self,
        port: &Arc<Port>,
        provider: &Arc<dyn Provider>,
        asker: &mut Asker,
    ) -> Option<Result<Dump, Fault>> {
        // That of an earlier sweep goes first: it says less than a new one, but in the right order.
        if let Some(late) = port.late_dump().take() {
            return Some(Ok(late));
        }
        if port.swept.swap(true, Ordering::SeqCst) {
            let why = "the provider has not come back from an earlier sweep";
            return Some(Err(Fault::new(why)));
        }
        // Whoever releases the provider has set `draining` and then waits for `swept`: one of the two
        // sees the other.
        if port.draining.load(Ordering::SeqCst) {
            port.swept.store(false, Ordering::SeqCst);
            return None;
        }
        let (tx, rx) = mpsc::channel();
        let started_ms = self.0.clock.now_ms();
        port.progress.sweeps.allow(port.rules.load(Ordering::SeqCst));
        port.progress.sweeps.begin();
        let asked = asker.ask(Box::new({
            let (port, provider) = (Arc::clone(port), Arc::clone(provider));
            move || {
                let mut reports = Vec::new();
                let sweeps = &port.progress.sweeps;
                let result = contained(|| {
                    provider.usage(&mut |report| {
                        // The clock is not looked at for each.
                        if reports.len().is_multiple_of(256) {
                            sweeps.step();
                        }
                        reports.push(report);
                    })
                });
                let result = result.unwrap_or_else(|panicked| {
                    port.set_fault(panicked.clone());
                    Err(Fault::new(panicked))
                });
                *port.late_dump() = Some(Dump { started_ms, reports, result });
                sweeps.end();
                port.swept.store(false, Ordering::SeqCst);
                // Nobody listens any more when it took too long.
                let _ = tx.send(());
            }
        }));
        if let Err(e) = asked {
            port.progress.sweeps.end();
            port.swept.store(false, Ordering::SeqCst);
            return Some(Err(Fault::new(format!("a thread for the sweep: {e}"))));
        }
        let at_most = port.progress.limit();
        let look_every = at_most.min(Duration::from_millis(100));
        while let Err(RecvTimeoutError::Timeout) = rx.recv_timeout(look_every) {
            if port.progress.sweeps.is_stuck(at_most) {
                break;
            }
        }
        if let Some(dump) = port.late_dump().take() {
            return Some(Ok(dump));
        }
        port.slow();
        asker.give_up();
        Some(Err(Fault::new(format!("the provider has not reported its rules within {at_most:?}"))))
    }

    fn reported(&self, look: &mut Look<'_>, report: RuleReport) {
        let RuleReport { cookie, rule, .. } = report;
        let port = look.port;
        // A connection that is ending has slots until its deletes are acknowledged.
        if let Some(conn) = look.held.get(&(cookie.epoch, cookie.direction))
            && let Some(slot) = PortSlot::find(&self.0, port, conn, cookie.direction)
        {
            match slot.reported(&report, look.id, port.swept_ms.load(Ordering::Relaxed)) {
                Reported::Its { moved: true, .. } => {
                    if look.used.insert(conn.epoch().0) {
                        look.sweep.used.push(conn.clone());
                    }
                    look.doubts.dispel(port.generation(), conn, cookie.direction);
                    return;
                }
                Reported::Its { in_hw, .. } => {
                    if in_hw == Some(true) || !look.in_front.is_empty() {
                        look.still.push((conn.clone(), cookie.direction));
                    }
                    return;
                }
                Reported::Underway => return,
                Reported::Stray => {}
            }
        }
        look.sweep.strays += 1;
        let stray = Stray { port: port.generation(), rule, cookie };
        if look.before.contains(&stray) {
            if port.lines.is_told(Line::Stray, self.now_ms()) {
                tracing::warn!(port = %port.netdev, %cookie, "a rule of ours that nobody holds is deleted");
            }
            port.queue.push(Command::DeleteRule(rule, cookie));
        } else {
            look.seen.insert(stray);
        }
    }

    /// What was installed before the sweep began and is not reported by it; and the slowest of those
    /// that stand, which may have to give way.
    fn find_lost(&self, port: &Arc<Port>, held: HeldSlots, id: u32, started_ms: u64) -> u64 {
        let mut lost = 0;
        let mut slowest = Slowest::default();
        for ((_, d), conn) in held {
            let Some(slot) = PortSlot::find(&self.0, port, &conn, d) else { continue };
            let Swept { measured, is_lost } = slot.swept(id, started_ms);
            if let Some((pace, used_ms)) = measured {
                slowest.show(Candidate { pace, used_ms, conn: conn.clone(), direction: d });
            }
            if is_lost && slot.retract(TakenBack::Lost) {
                if port.lines.is_told(Line::Removed, self.now_ms()) {
                    tracing::warn!(port = %port.netdev, %conn, %d, "the rule was removed by somebody else");
                }
                lost += 1;
            }
        }
        port.capacity.swept(slowest);
        port.swept_ms.store(started_ms, Ordering::Relaxed);
        lost
    }

    /// When the connection was last used: the latest over its slots.
    #[must_use]
    pub fn conn_update(&self, conn: &ConnHandle) -> Usage {
        let mut usage = Usage::NotOffloaded;
        let table = self.0.publication.table();
        for (_, generation, slot) in conn.all_slots() {
            // What a worker that was late has offered on a port that is gone stays as it is, for
            // ever: it must not keep the connection from expiring.
            if table.by_generation(generation).is_none() {
                continue;
            }
            let detail = slot.detail();
            let word = slot.word.load();
            if word.generation() != Some(generation) {
                continue;
            }
            match word.state() {
                // One that is to go and cannot be deleted carries packets as before.
                state @ (SlotState::Installed | SlotState::Deleting)
                    if state == SlotState::Installed || detail.attempts() > 0 =>
                {
                    let at = detail.used_ms.min(self.now_ms());
                    let (mut at_ms, mut packets, mut bytes) = (at, detail.packets, detail.bytes);
                    if let Usage::LastUsed { at_ms: a, packets: p, bytes: b } = usage {
                        (at_ms, packets, bytes) = (at_ms.max(a), packets + p, bytes + b);
                    }
                    usage = Usage::LastUsed { at_ms, packets, bytes };
                }
                SlotState::Pending | SlotState::Deleting if usage == Usage::NotOffloaded => {
                    usage = Usage::Unknown;
                }
                _ => {}
            }
        }
        usage
    }

    /// Whether any rule of this direction is installed on the port.
    #[must_use]
    pub fn is_installed(
        &self,
        conn: &ConnHandle,
        d: Direction,
        port: netdev_providers::Generation,
    ) -> bool {
        conn.slot(port, d).is_some_and(|s| s.word.load().state() == SlotState::Installed)
    }
}

/// What one sweep leaves for the next, kept by whoever sweeps: rules without a slot, slots whose rule
/// may do nothing, and the thread that asks providers.
#[derive(Debug, Default)]
pub struct Strays {
    seen: HashSet<Stray>,
    doubts: Doubts,
    asker: Asker,
}

/// A rule that no slot stands for. By its cookie too, which is never used twice, while a backend may give
/// the name of a rule that is gone to the next: what two sweeps found under one name need not be one
/// rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Stray {
    port: Generation,
    rule: RuleId,
    cookie: Cookie,
}

/// What looking at one port's reports needs.
struct Look<'a> {
    port: &'a Arc<Port>,
    id: u32,
    sweep: &'a mut Sweep,
    used: &'a mut HashSet<u64>,
    before: &'a HashSet<Stray>,
    seen: &'a mut HashSet<Stray>,
    doubts: &'a mut Doubts,
    /// Filters or programs of others see its packets first, and may leave none for its rules.
    in_front: &'a [String],
    still: Vec<(ConnHandle, Direction)>,
    held: &'a HeldSlots,
}

/// What a port holds, by what marks its rules.
type HeldSlots = HashMap<(Epoch, Direction), ConnHandle, ahash::RandomState>;

/// A call that may not come back.
type Call = Box<dyn FnOnce() + Send>;

/// The thread that asks providers, one after the other, for whoever sweeps; made when there is none,
/// and left to itself when a provider does not come back.
#[derive(Debug, Default)]
struct Asker(Option<Sender<Call>>);

impl Asker {
    fn ask(&mut self, call: Call) -> std::io::Result<()> {
        let call = match &self.0 {
            Some(asker) => match asker.send(call) {
                Ok(()) => return Ok(()),
                Err(SendError(call)) => call,
            },
            None => call,
        };
        let (tx, rx) = mpsc::channel::<Call>();
        std::thread::Builder::new()
            .name("usage".into())
            .spawn(move || rx.into_iter().for_each(|call| call()))?;
        // It has just been made, and waits for this.
        let _ = tx.send(call);
        self.0 = Some(tx);
        Ok(())
    }

    /// It ends by itself when the provider comes back.
    fn give_up(&mut self) {
        self.0 = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn no_timeout_is_too_long() {
        let used = Usage::LastUsed { at_ms: 9, packets: 1, bytes: 1 };
        for usage in [used, Usage::Unknown] {
            assert_eq!(extended_expiry(7, usage, u64::MAX, 10), u64::MAX);
        }
        assert_eq!(extended_expiry(7, Usage::NotOffloaded, u64::MAX, 10), 7);
        assert_eq!(extended_expiry(7, Usage::Unknown, 5, 10), 15, "it is not to expire meanwhile");
    }

    proptest! {
        #[test]
        fn expiry_is_never_shortened_and_the_future_is_clamped(expiry in 0u64..1 << 40, at in 0u64..1 << 40, timeout in 0u64..1 << 30, now in 0u64..1 << 40) {
            let used = Usage::LastUsed { at_ms: at, packets: 1, bytes: 1 };
            let new = extended_expiry(expiry, used, timeout, now);
            prop_assert!(new >= expiry);
            prop_assert!(new <= expiry.max(now + timeout));
            prop_assert!(new >= at.min(now) + timeout);
        }
    }
}
