//! How many rules a port may have, and which of them gives way when there is no place left.
//!
//! # The limit
//! Configured ([`NewPort::capacity`](super::NewPort)), or learnt: when the provider says that its
//! table is full, the limit is what the port has then. Behind a learnt limit one add every
//! [`PROBE_EVERY_MS`] is let through, so that a table that has room again (several ports may share it)
//! is noticed. Each that succeeds doubles how many are, so that the limit follows at the speed at which
//! places become free; the next refusal ends that. A flush forgets what was learnt.
//!
//! # Who gives way
//! Every sweep measures the **pace** of each rule, in packets per second on a logarithmic scale. A
//! pause of one sweep halves it, so that a connection that comes in bursts is not taken for a slow
//! one. From the rules of a port that is full, a sweep picks the [`CANDIDATES`] slowest; between two
//! sweeps no more than these are looked at. One of them gives way to a newcomer
//! * when it has carried nothing for [`IDLE_MS`], or
//! * when the newcomer has at least twice its pace.
//!
//! A newcomer's pace is told by its sights: after a refusal its sight is re-armed, and the next
//! packet comes after a pause that is the longer the slower the connection is. Two such pauses are
//! needed, and the slower pace of the two counts.
//!
//! # Why it does not thrash
//! A rule is not touched before two sweeps have seen it; a newcomer must be twice as fast; and who
//! has given way starts anew, with refusals whose pause doubles. So rules of the same pace never
//! replace each other, however many there are.

use std::collections::BinaryHeap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use netdev_providers::{Direction, Reason, Rejection};

use super::conn::ConnHandle;
use super::pace::Pace;

/// Rules that can give way between two sweeps.
pub const CANDIDATES: usize = 256;
/// A rule that has carried nothing for so long gives way to anybody.
pub const IDLE_MS: u64 = 10_000;
/// In so many milliseconds one add (at first) is let through although the provider has said that it is full.
pub const PROBE_EVERY_MS: u64 = 100;

/// A rule that may have to give way.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub(super) pace: Pace,
    pub(super) used_ms: u64,
    pub(super) conn: ConnHandle,
    pub(super) direction: Direction,
}

impl Candidate {
    /// The slowest is the least; among equals the one that was used last is the greatest.
    fn rank(&self) -> (Pace, u64) {
        (self.pace, self.used_ms)
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.rank() == other.rank()
    }
}
impl Eq for Candidate {}
impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.rank().cmp(&other.rank())
    }
}

/// The slowest of what it is shown.
#[derive(Debug, Default)]
pub(super) struct Slowest(BinaryHeap<Candidate>);

impl Slowest {
    pub(super) fn show(&mut self, candidate: Candidate) {
        if self.0.len() < CANDIDATES {
            self.0.push(candidate);
        } else if self.0.peek().is_some_and(|fastest| candidate < *fastest) {
            self.0.pop();
            self.0.push(candidate);
        }
    }

    /// The slowest last, to be popped first.
    fn into_stack(self) -> Vec<Candidate> {
        let mut all = self.0.into_sorted_vec();
        all.reverse();
        all
    }
}

#[derive(Debug, Default)]
struct State {
    learnt: Option<u64>,
    /// What the provider said when its table was full, for those that are not even tried.
    words: Option<Box<str>>,
    probed_ms: u64,
    /// How many are let through in a time, and how many have been in this one.
    probes: u64,
    probed: u64,
    candidates: Vec<Candidate>,
}

/// The limit of one port.
#[derive(Debug, Default)]
pub(super) struct Capacity {
    configured: Option<u64>,
    state: Mutex<State>,
}

/// What an add has to do for its place.
#[derive(Debug)]
pub(super) enum Place {
    /// There is one.
    Free,
    /// This rule might give way: it must be looked at whether it still stands.
    Of(Candidate),
    None(Rejection),
}

impl Capacity {
    pub(super) fn new(configured: Option<u32>) -> Self {
        Self { configured: configured.map(u64::from), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The limit, and whether it was learnt.
    pub(super) fn limit(&self) -> Option<(u64, bool)> {
        let learnt = self.state().learnt;
        match (self.configured, learnt) {
            (Some(c), Some(l)) if l < c => Some((l, true)),
            (Some(c), _) => Some((c, false)),
            (None, l) => l.map(|l| (l, true)),
        }
    }

    /// Looks for a place, on a port that has so many rules.
    pub(super) fn place(&self, rules: u64, newcomer: Pace, now_ms: u64) -> Place {
        let Some((limit, learnt)) = self.limit().filter(|(limit, _)| rules >= *limit) else {
            return Place::Free;
        };
        let mut state = self.state();
        let gives_way =
            |c: &Candidate| now_ms.saturating_sub(c.used_ms) >= IDLE_MS || newcomer.beats(c.pace);
        // The slowest is asked; those behind it are faster, but may have been idle for longer.
        if let Some(at) = state.candidates.iter().rposition(gives_way) {
            return Place::Of(state.candidates.remove(at));
        }
        if learnt {
            if now_ms >= state.probed_ms.saturating_add(PROBE_EVERY_MS) {
                (state.probed_ms, state.probed) = (now_ms, 0);
            }
            if state.probed < state.probes.max(1) {
                state.probed += 1;
                return Place::Free;
            }
        }
        let how = match &state.words {
            Some(words) if learnt => format!("learnt from the provider: {words}"),
            _ if learnt => "learnt from the provider".to_owned(),
            _ => "configured".to_owned(),
        };
        Place::None(Rejection::with_detail(
            Reason::TableFull,
            format!("{rules} rules of {limit} ({how}), and none that is idle or much slower"),
        ))
    }

    /// A sweep has looked at all rules.
    pub(super) fn swept(&self, slowest: Slowest) {
        self.state().candidates = slowest.into_stack();
    }

    /// The provider says, perhaps in words, that its table is full; the port has so many rules.
    pub(super) fn refused(&self, rules: u64, words: Option<&str>, now_ms: u64) {
        let mut state = self.state();
        state.learnt = Some(rules);
        state.words = words.map(Into::into);
        // It has just been tried.
        (state.probed_ms, state.probes, state.probed) = (now_ms, 1, 1);
    }

    /// Everything may be tried again.
    pub(super) fn forget_learnt(&self) {
        *self.state() = State::default();
    }

    /// The provider took a rule; the port has so many now.
    pub(super) fn took(&self, rules: u64) {
        let mut state = self.state();
        if state.learnt.is_some_and(|learnt| rules > learnt) {
            state.learnt = Some(rules);
            state.probes = state.probes.saturating_mul(2).max(2);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_slowest_are_kept(paces in proptest::collection::vec(0u8..200, 0..1000)) {
            let conn = super::super::conn::tests::conn();
            let mut slowest = Slowest::default();
            for (i, p) in paces.iter().enumerate() {
                let (conn, direction) = (conn.clone(), Direction::Original);
                slowest.show(Candidate { pace: Pace(*p), used_ms: i as u64, conn, direction });
            }
            let mut want: Vec<_> = paces.iter().enumerate().map(|(i, p)| (*p, i as u64)).collect();
            want.sort_unstable();
            want.truncate(CANDIDATES);
            want.reverse();
            let got: Vec<_> = slowest.into_stack().iter().map(|c| (c.pace.0, c.used_ms)).collect();
            prop_assert_eq!(got, want);
        }
    }

    #[test]
    fn a_learnt_limit_follows_the_places_that_become_free() {
        let capacity = Capacity::new(None);
        capacity.refused(10, None, 0);
        let (mut rules, mut rounds) = (10, 0);
        while rules < 100_010 {
            rounds += 1;
            let now = rounds * PROBE_EVERY_MS;
            // The adds of a batch are decided about before the first of them completes.
            let batch = (0..256)
                .filter(|_| matches!(capacity.place(rules, Pace::UNKNOWN, now), Place::Free))
                .count() as u64;
            for _ in 0..batch {
                rules += 1;
                capacity.took(rules);
            }
        }
        assert!(rounds < 500, "{rounds} tenths of a second");
        capacity.refused(rules, None, rounds * PROBE_EVERY_MS);
        let now = (rounds + 1) * PROBE_EVERY_MS;
        assert!(matches!(capacity.place(rules, Pace::UNKNOWN, now), Place::Free));
        assert!(
            matches!(capacity.place(rules, Pace::UNKNOWN, now), Place::None(_)),
            "one at a time"
        );
        capacity.forget_learnt();
        assert_eq!(capacity.limit(), None);
    }
}
