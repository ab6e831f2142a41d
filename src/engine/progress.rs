//! How far a port's provider has come: what tells one that is slow from one that has nothing to do.
//!
//! A provider is **slow** while something that it was given has not come back, and nothing else of the
//! same kind has either, for longer than [`Limits::complete`](super::Limits::complete). Time runs from
//! the last progress, never from when somebody began to wait. A slow port takes no offers, and goes
//! on by itself: whatever comes back is progress.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A flush or a sweep is one call, and takes the longer the more rules there are: so much of it, beyond
/// the limit, is allowed for each (measured on an emulated machine: 40 microseconds for a flush).
const PER_RULE: Duration = Duration::from_micros(100);

/// What of a kind is with the provider, and when some of it last came back.
#[derive(Debug)]
pub(super) struct Lane {
    epoch: Instant,
    out: AtomicUsize,
    last_us: AtomicU64,
    allowed_us: AtomicU64,
}

impl Lane {
    fn new(epoch: Instant) -> Self {
        Self {
            epoch,
            out: AtomicUsize::new(0),
            last_us: AtomicU64::new(0),
            allowed_us: AtomicU64::new(0),
        }
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// One more is with the provider.
    pub(super) fn begin(&self) {
        // The first: what was before is no measure.
        if self.out.load(Ordering::SeqCst) == 0 {
            self.step();
        }
        self.out.fetch_add(1, Ordering::SeqCst);
    }

    /// It goes on.
    pub(super) fn step(&self) {
        self.last_us.fetch_max(self.now_us(), Ordering::SeqCst);
    }

    /// One has come back.
    pub(super) fn end(&self) {
        self.step();
        self.out.fetch_sub(1, Ordering::SeqCst);
    }

    /// How many are out.
    pub(super) fn out(&self) -> usize {
        self.out.load(Ordering::SeqCst)
    }

    /// What begins now concerns so many rules at once.
    pub(super) fn allow(&self, rules: u64) {
        let rules = u32::try_from(rules).unwrap_or(u32::MAX);
        let allowed = PER_RULE.saturating_mul(rules).as_micros();
        self.allowed_us.store(u64::try_from(allowed).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// For how long nothing has come back beyond what is allowed; none where nothing is out.
    fn still_for(&self) -> Option<Duration> {
        if self.out() == 0 {
            return None;
        }
        let last = self.last_us.load(Ordering::SeqCst);
        let still = self.now_us().saturating_sub(last);
        // It may have come back since, and something else gone out: then this was no measure.
        let same = self.out() > 0 && self.last_us.load(Ordering::SeqCst) == last;
        same.then(|| Duration::from_micros(still))
    }

    /// Whether nothing has come back for longer than this, and what is allowed beyond it.
    pub(super) fn is_stuck(&self, limit: Duration) -> bool {
        let allowed = Duration::from_micros(self.allowed_us.load(Ordering::Relaxed));
        self.still_for().is_some_and(|still| still > limit.saturating_add(allowed))
    }
}

/// A port that is slow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slow {
    /// How long ago something last came back.
    pub since: Duration,
    /// What has not.
    pub what: String,
}

impl fmt::Display for Slow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slow since {:.1} s: {}", self.since.as_secs_f64(), self.what)
    }
}

/// The progress of one port.
#[derive(Debug)]
pub(super) struct Progress {
    limit: Duration,
    /// The port's own thread, from waking up to falling asleep: it goes on with every command.
    pub(super) thread: Lane,
    /// Operations.
    pub(super) operations: Lane,
    /// Sweeps.
    pub(super) sweeps: Lane,
    /// Somebody found it slow, and nobody has found since that it is not: a hint, for those who
    /// cannot look at the time.
    hint: AtomicBool,
}

impl Progress {
    pub(super) fn new(limit: Duration) -> Self {
        let epoch = Instant::now();
        Self {
            limit,
            thread: Lane::new(epoch),
            operations: Lane::new(epoch),
            sweeps: Lane::new(epoch),
            hint: AtomicBool::new(false),
        }
    }

    /// How long something may be out.
    pub(super) fn limit(&self) -> Duration {
        self.limit
    }

    /// Looks at the time, and leaves the hint. True, and false, once for each change.
    pub(super) fn look(&self) -> (Option<Slow>, bool) {
        let lanes = [&self.thread, &self.operations, &self.sweeps];
        let stuck = lanes.into_iter().position(|lane| lane.is_stuck(self.limit));
        let slow = stuck.and_then(|n| {
            let what = match n {
                0 => "the provider, or the datapath, has not come back from a call".to_owned(),
                1 => format!("operations without a result: {}", self.operations.out()),
                _ => "a sweep has not come back".to_owned(),
            };
            Some(Slow { since: lanes[n].still_for()?, what })
        });
        let changed = self.hint.load(Ordering::Relaxed) != slow.is_some()
            && self.hint.swap(slow.is_some(), Ordering::Relaxed) != slow.is_some();
        (slow, changed)
    }

    /// Whether somebody found it slow: then it is worth a [`look`](Self::look).
    pub(super) fn hint(&self) -> bool {
        self.hint.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More than any machine makes a test wait.
    const LIMIT: Duration = Duration::from_secs(100);

    /// So much time passes.
    fn pass(lane: &mut Lane, time: Duration) {
        lane.epoch -= time;
    }

    #[test]
    fn time_runs_from_the_last_progress_and_only_while_something_is_out() {
        let mut lane = Lane::new(Instant::now());
        pass(&mut lane, LIMIT * 2);
        assert!(!lane.is_stuck(LIMIT), "nothing is out");
        lane.begin();
        assert!(!lane.is_stuck(LIMIT), "it has just begun");
        pass(&mut lane, LIMIT * 2);
        assert!(lane.is_stuck(LIMIT));
        lane.begin();
        assert!(lane.is_stuck(LIMIT), "what is given to it is no progress");
        lane.end();
        assert!(!lane.is_stuck(LIMIT), "what comes back is");
        pass(&mut lane, LIMIT * 2);
        assert!(lane.is_stuck(LIMIT), "the other one is still out");
        // A hundred microseconds for each.
        lane.allow(2_000_000);
        assert!(!lane.is_stuck(LIMIT), "of two million rules that is no wonder");
        lane.end();
        lane.allow(0);
        assert!(!lane.is_stuck(LIMIT));
    }

    #[test]
    fn a_port_goes_on_by_itself_and_each_change_is_told_once() {
        let mut p = Progress::new(LIMIT);
        assert_eq!(p.look(), (None, false));
        p.operations.begin();
        pass(&mut p.operations, LIMIT * 3);
        let (slow, changed) = p.look();
        let slow = slow.unwrap();
        assert!(changed && p.hint() && slow.since >= LIMIT * 3);
        assert!(slow.to_string().contains("operations without a result: 1"), "{slow}");
        assert!(!p.look().1);
        p.operations.end();
        assert_eq!(p.look(), (None, true));
        assert!(!p.hint());
    }
}
