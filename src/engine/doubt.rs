//! Rules that do nothing: in a NIC that says it has them, and in software behind somebody else.
//!
//! A NIC can lose what it was given (its firmware is reset, and the kernel goes on saying `in_hw`), or
//! accept a rule and never act on it. Packets then reach the host, which forwards them: nothing is
//! lost but speed, and nobody says a word. What tells is that the datapath **itself** forwards
//! packets of the slot ([`Datapath::forwarded_itself`]) while the counters of its rule stand still.
//!
//! | the rule's counters | software sees packets | taken for |
//! |---|---|---|
//! | move | whether or not | a rule that works: the rest is what no rule is for (fragments, say) |
//! | stand still | no | an idle connection, or counters that are not kept up: the rule stays |
//! | stand still | yes, [`ENOUGH`] of them | a rule that does nothing |
//!
//! In software that is looked at where filters or programs of others see the packets first
//! ([`Provider::in_front`](netdev_providers::Provider::in_front)): one of them may hand each past our rules
//! (`action pass`). Alone, a rule in software is met.
//!
//! Such a rule is deleted, and added again at the next packet that is seen after a pause: a moment at
//! first, longer each time that it does not help ([`pause_ms`]). Meanwhile the slot is rejected with
//! [`Reason::NoEffect`]. A flow all of whose packets are such as no rule is for ends there too, and
//! costs nothing more there.
//!
//! What a NIC lost is noticed slot by slot, each when packets of it come by, two sweeps later at most;
//! rules of silent connections stay lost until then.
//!
//! Not noticed: a NIC that counts packets and loses them.

use std::collections::HashMap;

use netdev_providers::{Direction, Epoch, Generation, Reason, Rejection};

use super::Engine;
use super::conn::ConnHandle;
use super::datapath::Sight;
use super::port::Port;
use super::state::PortSlot;

#[cfg(doc)]
use super::datapath::Datapath;

/// How many packets software must have seen. More than those that were on their way up while the
/// rule was installed: and few, so that slow connections are noticed too.
const ENOUGH: u64 = 3;

/// How long the slot is left alone after its rule was found without effect for the n-th time in a
/// row, from 0.
const fn pause_ms(n: u8) -> u64 {
    match n {
        0 => 100,
        1 => 3_000,
        2 => 60_000,
        _ => 600_000,
    }
}

/// What is remembered of slots whose counters stand still, from sweep to sweep.
#[derive(Debug, Default)]
pub(super) struct Doubts(HashMap<(Generation, Epoch, Direction), Doubt>);

#[derive(Debug)]
struct Doubt {
    conn: ConnHandle,
    /// What software had seen when the counters were first found standing still.
    since: Option<u64>,
    /// How often the rule was found without effect, in a row.
    found: u8,
    /// The last sweep that looked at it.
    sweep: u32,
}

/// What a look at a slot says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Finding {
    /// Nothing, so far.
    Open,
    /// The rule does nothing: software has seen that many packets meanwhile, and it is the n-th time
    /// in a row, from 0.
    NoEffect { packets: u64, before: u8 },
}

impl Doubt {
    fn look(&mut self, seen: u64) -> Finding {
        let since = *self.since.get_or_insert(seen);
        match seen.checked_sub(since) {
            Some(packets) if packets >= ENOUGH => {
                let before = self.found;
                self.found = before.saturating_add(1);
                self.since = None;
                Finding::NoEffect { packets, before }
            }
            Some(_) => Finding::Open,
            // Armed anew, and counted from there.
            None => {
                self.since = Some(0);
                self.look(seen)
            }
        }
    }
}

impl Doubts {
    /// The rule's counters have moved: it works.
    pub(super) fn dispel(&mut self, port: Generation, conn: &ConnHandle, d: Direction) {
        self.0.remove(&(port, conn.epoch(), d));
    }

    fn look(&mut self, sight: &Sight, seen: u64, sweep: u32) -> Finding {
        let key = (sight.generation, sight.conn.epoch(), sight.direction);
        let doubt = self.0.entry(key).or_insert_with(|| Doubt {
            conn: sight.conn.clone(),
            since: None,
            found: 0,
            sweep,
        });
        doubt.sweep = sweep;
        doubt.look(seen)
    }

    /// Forgets what this sweep did not look at, but for slots whose rule was found without effect
    /// before: their connection's end is waited for.
    pub(super) fn settle(&mut self, sweep: u32) {
        self.0.retain(|_, d| d.sweep == sweep || (d.found > 0 && !d.conn.is_dead()));
    }
}

impl Engine {
    /// Looks at slots of a port whose rules the NIC has, or others are in front of, and whose counters stand still.
    pub(super) fn doubt(
        &self,
        port: &Port,
        still: Vec<(ConnHandle, Direction)>,
        in_front: &[String],
        sweep: u32,
        doubts: &mut Doubts,
    ) -> u64 {
        if still.is_empty() {
            return 0;
        }
        let sights: Vec<Sight> = still
            .into_iter()
            .map(|(conn, direction)| Sight {
                ifindex: port.ifindex(),
                generation: port.generation(),
                conn,
                direction,
            })
            .collect();
        let mut refuted = 0;
        for (sight, seen) in sights.iter().zip(self.0.datapath.forwarded_itself(&sights)) {
            let Some(seen) = seen else { continue };
            let Finding::NoEffect { packets, before } = doubts.look(sight, seen, sweep) else {
                continue;
            };
            let nic = "the NIC does not have it any more, or does not act on it";
            let cause = if in_front.is_empty() {
                nic.to_owned()
            } else {
                format!("{} sees packets first; or {nic}", in_front.join(", "))
            };
            let why = format!(
                "software saw {packets} packets while the counters of the rule stood still: {cause}"
            );
            let rejection = Rejection::with_detail(Reason::NoEffect, why);
            let retry_at = self.now_ms() + pause_ms(before);
            let slot = PortSlot::find(&self.0, port, &sight.conn, sight.direction);
            if slot.is_some_and(|slot| slot.refute(rejection, retry_at)) {
                refuted += 1;
            }
        }
        refuted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doubt() -> Doubt {
        let conn = crate::engine::conn::tests::conn();
        Doubt { conn, since: None, found: 0, sweep: 0 }
    }

    #[test]
    fn what_software_saw_before_says_nothing_and_few_packets_add_up() {
        let mut d = doubt();
        assert_eq!(d.look(1000), Finding::Open);
        assert_eq!(d.look(1000), Finding::Open, "idle, or counters that are not kept up");
        assert_eq!(d.look(1002), Finding::Open);
        assert_eq!(d.look(1003), Finding::NoEffect { packets: 3, before: 0 });
    }

    #[test]
    fn a_slot_that_was_armed_anew_counts_from_there() {
        let mut d = doubt();
        assert_eq!(d.look(1000), Finding::Open);
        assert_eq!(d.look(2), Finding::Open);
        assert_eq!(d.look(3), Finding::NoEffect { packets: 3, before: 0 });
    }

    #[test]
    fn the_pause_is_longer_each_time_that_it_did_not_help() {
        let mut d = doubt();
        let mut pauses = Vec::new();
        for seen in [0, 10, 20, 30, 40, 50, 60, 70, 80, 90] {
            if let Finding::NoEffect { before, .. } = d.look(seen) {
                pauses.push(pause_ms(before));
            }
        }
        assert_eq!(pauses, [100, 3_000, 60_000, 600_000, 600_000]);
    }

    fn sight(n: u64) -> Sight {
        let known = crate::engine::conn::tests::conn();
        let conn = ConnHandle::new(known.key(), known.reply(), Epoch(n), n, 0);
        let generation = Generation::new(1).unwrap();
        let ifindex = netdev_providers::Ifindex::new(1).unwrap();
        Sight { ifindex, generation, conn, direction: Direction::Original }
    }

    #[test]
    fn what_was_found_without_effect_is_remembered_until_it_works_or_ends() {
        let mut doubts = Doubts::default();
        let (open, found, works) = (sight(1), sight(2), sight(3));
        for (sight, seen) in [(&open, 0), (&found, 0), (&found, 3), (&works, 0), (&works, 3)] {
            doubts.look(sight, seen, 1);
        }
        doubts.settle(1);
        assert_eq!(doubts.0.len(), 3, "this sweep has looked at all of them");
        doubts.settle(2);
        assert_eq!(doubts.0.len(), 2, "the next one not: it has only the ones that were found");
        let again = Finding::NoEffect { packets: 3, before: 1 };
        assert_eq!(
            (doubts.look(&found, 10, 3), doubts.look(&found, 13, 3)),
            (Finding::Open, again)
        );
        doubts.dispel(works.generation, &works.conn, Direction::Original);
        let anew = Finding::NoEffect { packets: 3, before: 0 };
        assert_eq!((doubts.look(&works, 10, 3), doubts.look(&works, 13, 3)), (Finding::Open, anew));
        assert!(found.conn.end());
        doubts.settle(4);
        let left: Vec<_> = doubts.0.keys().map(|(_, epoch, _)| *epoch).collect();
        assert_eq!(left, [works.conn.epoch()], "nobody waits for one that has ended");
    }
}
