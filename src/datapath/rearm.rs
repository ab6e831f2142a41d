//! Re-arming: elements of the ledger that are to go, so that the next packet of each is sighted again.
//!
//! **A transaction of nf_tables is dear to others.** Each bumps the generation of the ruleset, and who
//! is just listing it (`nft list ruleset`, `iptables-nft`) begins anew. So they are few, and fewer the
//! longer there is something to do:
//!
//! - What waits for its next packet (a rule was taken back, an offer is to be repeated) is gathered for
//!   [`GATHER`]. While such transactions follow each other, the pause between them doubles, up to
//!   [`PAUSE_MAX`]: a listing that takes less than that comes to its end. Where connections go back to
//!   the stack every so often (`[revalidate] every`), the pause is a small part of that at most: else they
//!   would spend their lives there.
//! - What has ended waits for nobody, and what was taken back because it is silent can wait: if a packet comes after
//!   all, the stack forwards it as well. They go along with the next transaction, or when a good part of the ledger is
//!   such elements, or after a time. (An id that the kernel gives to a successor with the same addresses within that
//!   time is sighted when they have gone.)
//!
//! **Elements that stand are dear to them too**: a listing has every one of them, some 40 us each. So that time is some
//! [`LISTINGS`] times as long as a listing takes here: long enough that few are interrupted, short enough that the
//! elements of so many connections as end meanwhile are a small part of it.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::TICK;
use super::netfilter::ledger::LedgerKey;

/// How long keys are gathered after a time without any.
const GATHER: Duration = Duration::from_millis(100);
/// The longest pause between two transactions while there is something to do all the time.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// So long without a transaction, and the next is made after [`GATHER`] again.
const CALM: Duration = Duration::from_secs(10);
/// How long elements may stay that nobody waits for: at most, and while it is not known how long a listing takes; ...
const LATER: Duration = Duration::from_secs(60);
/// ... at least; ...
const LATER_MIN: Duration = Duration::from_secs(1);
/// ... and otherwise so many times as long as `nft list ruleset` takes, ...
const LISTINGS: u32 = 8;
/// ... which is some so many times as long as it takes us to read the rules (measured with 2,000 rules and a set of 3,000).
const NFT: u32 = 15;
/// ... if they are not this part of the ledger.
const PART: usize = 4;

/// What is to be re-armed. Any thread puts keys in; one ([`run`]) takes them.
#[derive(Debug)]
pub(super) struct Rearm {
    pending: Mutex<Pending>,
    changed: Condvar,
}

#[derive(Debug)]
struct Pending {
    keys: HashSet<LedgerKey, ahash::RandomState>,
    /// How many elements that nobody waits for make it worth a transaction.
    later_at_most: usize,
    /// How long they may stay.
    later_for: Duration,
    /// The longest pause, by how long decisions stand; and by that and by `later_for`.
    pause_by_every: Duration,
    pause_max: Duration,
    /// Since when something waits for its next packet.
    awaited: Option<Instant>,
    /// Since when there is something that nobody waits for.
    later: Option<Instant>,
    /// The ledger is to be compared with what is known.
    compare: bool,
    /// The last transaction, and the pause after it.
    last: Option<Instant>,
    pause: Duration,
}

impl Pending {
    fn new(later_at_most: usize, pause_max: Duration) -> Self {
        Self {
            keys: HashSet::default(),
            later_at_most,
            later_for: LATER,
            pause_by_every: pause_max,
            pause_max,
            awaited: None,
            later: None,
            compare: false,
            last: None,
            pause: GATHER,
        }
    }

    /// When the next transaction is to be made; `None`: there is nothing to do.
    fn due(&self) -> Option<Instant> {
        let later = self.later.map(|since| {
            if self.keys.len() >= self.later_at_most { since } else { since + self.later_for }
        });
        let awaited = self.awaited.map(|since| since + GATHER);
        let wanted = awaited.into_iter().chain(later).min()?;
        Some(self.last.map_or(wanted, |last| wanted.max(last + self.pause)))
    }

    fn bound_pause(&mut self) {
        self.pause_max = self.pause_by_every.min(self.later_for).max(GATHER);
    }

    /// Takes all of it: a transaction is made now.
    fn take(&mut self, now: Instant) -> Vec<LedgerKey> {
        let calm = self.last.is_none_or(|last| now.saturating_duration_since(last) >= CALM);
        self.pause = if calm { GATHER } else { self.pause.saturating_mul(2).min(self.pause_max) };
        (self.last, self.awaited, self.later) = (Some(now), None, None);
        std::mem::take(&mut self.keys).into_iter().collect()
    }
}

fn pause_max(every: Duration) -> Duration {
    if every.is_zero() { PAUSE_MAX } else { PAUSE_MAX.min(every / 20).max(GATHER) }
}

impl Rearm {
    /// For ledgers of this size, and for decisions that stand so long (zero: as long as they like).
    pub(super) fn new(ledger_size: u32, every: Duration) -> Self {
        let pending = Mutex::new(Pending::new(ledger_size as usize / PART, pause_max(every)));
        Self { pending, changed: Condvar::new() }
    }

    /// Decisions stand so long from now on.
    pub(super) fn set_every(&self, every: Duration) {
        let mut p = self.pending();
        p.pause_by_every = pause_max(every);
        p.bound_pause();
    }

    /// It has taken us so long to read the ruleset.
    pub(super) fn ruleset_took(&self, read: Duration) {
        let mut p = self.pending();
        p.later_for = (read * NFT * LISTINGS).clamp(LATER_MIN, LATER);
        p.bound_pause();
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next packet of each is to be sighted again, soon.
    pub(super) fn soon(&self, keys: impl IntoIterator<Item = LedgerKey>) {
        let mut keys = keys.into_iter().peekable();
        if keys.peek().is_some() {
            self.put(|p| {
                p.keys.extend(keys);
                p.awaited.get_or_insert_with(Instant::now);
            });
        }
    }

    /// Of connections that have ended, or are silent: nobody waits for them.
    pub(super) fn later(&self, keys: impl IntoIterator<Item = LedgerKey>) {
        self.put(|p| {
            let before = p.keys.len();
            p.keys.extend(keys);
            if p.keys.len() > before {
                p.later.get_or_insert_with(Instant::now);
            }
        });
    }

    /// Wakes the thread where it would sleep too long otherwise, and not for each of many.
    fn put(&self, change: impl FnOnce(&mut Pending)) {
        let mut p = self.pending();
        let before = p.due();
        change(&mut p);
        if p.due().is_some_and(|due| before.is_none_or(|before| due < before)) {
            self.changed.notify_one();
        }
    }

    /// The ledger is to be compared with what is known: a log message may have been lost.
    pub(super) fn compare(&self) {
        self.pending().compare = true;
        self.changed.notify_one();
    }

    /// Waits until there is something to do: keys, and whether to compare.
    fn next(&self) -> (Vec<LedgerKey>, bool) {
        let p = self.pending();
        let left = |p: &Pending| {
            let due = p.due().map_or(TICK, |at| at.saturating_duration_since(Instant::now()));
            if p.compare { Duration::ZERO } else { due.min(TICK) }
        };
        let wait = left(&p);
        let mut p = if wait.is_zero() {
            p
        } else {
            self.changed.wait_timeout(p, wait).unwrap_or_else(PoisonError::into_inner).0
        };
        let now = Instant::now();
        let keys = if p.due().is_some_and(|at| at <= now) { p.take(now) } else { Vec::new() };
        (keys, std::mem::take(&mut p.compare))
    }

    /// The thread that has the transactions made, and the ledger read.
    pub(super) fn run(
        &self,
        stop: &AtomicBool,
        delete: impl Fn(&[LedgerKey]),
        compare_ledger: impl Fn(),
    ) {
        while !stop.load(Ordering::Relaxed) {
            let (keys, compare) = self.next();
            delete(&keys);
            if compare {
                compare_ledger();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use netdev_providers::{Direction, Ifindex};

    use super::*;
    use crate::datapath::netfilter::conntrack::CtId;
    use crate::datapath::netfilter::ledger::Hook;

    fn keys(n: std::ops::Range<u32>) -> impl Iterator<Item = LedgerKey> {
        let iif = Ifindex::new(2).unwrap();
        let direction = Direction::Original;
        n.map(move |n| LedgerKey { hook: Hook::Inet, iif, ct_id: CtId(n), sport: 80, direction })
    }

    /// Puts in what each step brings, every `step`, and says when transactions were made.
    fn transactions(
        steps: u32,
        step: Duration,
        mut bring: impl FnMut(&mut Pending, u32, Instant),
    ) -> Vec<Duration> {
        let (start, mut p, mut made) = (Instant::now(), Pending::new(1000, PAUSE_MAX), Vec::new());
        for n in 0..steps {
            let now = start + step * n;
            bring(&mut p, n, now);
            if p.due().is_some_and(|at| at <= now) {
                p.take(now);
                made.push(now - start);
            }
        }
        made
    }

    #[test]
    fn connections_that_end_make_few_transactions_however_many_they_are() {
        // 10 a second for minutes: below the bound, one in a minute.
        let few = transactions(1900, Duration::from_millis(100), |p, n, now| {
            p.keys.extend(keys(n..n + 1));
            p.later.get_or_insert(now);
        });
        assert_eq!(few.iter().map(Duration::as_secs).collect::<Vec<_>>(), [60, 120, 180]);
        // 10,000 a second: whenever a quarter of the ledger is full of them, and not more often than
        // a listing takes.
        let many = transactions(1200, Duration::from_millis(100), |p, n, now| {
            p.keys.extend(keys(n * 1000..(n + 1) * 1000));
            p.later.get_or_insert(now);
        });
        assert!(many.len() < 35, "{many:?}");
        assert!(many.windows(2).skip(8).all(|w| w[1] - w[0] >= PAUSE_MAX), "{many:?}");
    }

    #[test]
    fn what_waits_for_its_packet_goes_soon_and_in_a_row_more_and_more_seldom() {
        let all_the_time = transactions(6000, Duration::from_millis(10), |p, n, now| {
            p.keys.extend(keys(n..n + 1));
            p.awaited.get_or_insert(now);
        });
        assert_eq!(all_the_time[0], GATHER);
        assert!(all_the_time[1] - all_the_time[0] <= GATHER * 2, "{all_the_time:?}");
        assert!(all_the_time.len() < 20, "{all_the_time:?}");
        // Once in a while: each after it was gathered.
        let once_in_a_while = transactions(6000, Duration::from_millis(10), |p, n, now| {
            if n % 1500 == 0 {
                p.keys.extend(keys(n..n + 1));
                p.awaited.get_or_insert(now);
            }
        });
        let want: Vec<_> = (0..4).map(|n| Duration::from_secs(15) * n + GATHER).collect();
        assert_eq!(once_in_a_while, want);
    }

    #[test]
    fn pauses_are_a_small_part_of_how_long_a_decision_stands() {
        let most = |seconds| Rearm::new(1000, Duration::from_secs(seconds)).pending().pause_max;
        assert_eq!(most(0), PAUSE_MAX);
        assert_eq!(most(3600), PAUSE_MAX);
        assert_eq!(most(60), Duration::from_secs(3));
        assert_eq!(most(6), Duration::from_millis(300));
        assert_eq!(most(1), GATHER);
    }

    #[test]
    fn elements_that_nobody_waits_for_stay_for_some_listings_of_the_ruleset() {
        let bounds = |read_ms, every| {
            let rearm = Rearm::new(1000, Duration::from_secs(every));
            rearm.ruleset_took(Duration::from_millis(read_ms));
            let p = rearm.pending();
            (p.later_for.as_millis(), p.pause_max.as_millis())
        };
        assert_eq!(bounds(0, 0), (1000, 1000));
        assert_eq!(bounds(20, 0), (2400, 2400));
        assert_eq!(bounds(100, 0), (12_000, 5000));
        assert_eq!(bounds(9000, 0), (60_000, 5000));
        assert_eq!(bounds(100, 6), (12_000, 300), "decisions stand for no more");
        let rearm = Rearm::new(1000, Duration::ZERO);
        rearm.ruleset_took(Duration::ZERO);
        rearm.set_every(Duration::from_secs(6));
        assert_eq!(rearm.pending().pause_max.as_millis(), 300);
        // Many end all the time, and each transaction comes so long after the one before.
        let (mut p, start) = (Pending::new(100_000, PAUSE_MAX), Instant::now());
        (p.later_for, p.pause_max) = (LATER_MIN, LATER_MIN);
        let mut made = Vec::new();
        for n in 0..600 {
            let now = start + Duration::from_millis(100) * n;
            p.keys.extend(keys(n..n + 1));
            p.later.get_or_insert(now);
            if p.due().is_some_and(|at| at <= now) {
                made.push(now - start);
                p.take(now);
            }
        }
        assert!(made.windows(2).all(|w| w[1] - w[0] >= LATER_MIN), "{made:?}");
        assert!(made.len() > 50, "{made:?}");
    }

    #[test]
    fn a_key_that_had_time_and_is_awaited_now_goes_soon() {
        let rearm = Rearm::new(1000, Duration::ZERO);
        rearm.later(keys(0..1));
        assert!(rearm.pending().due().unwrap() > Instant::now() + LATER / 2);
        rearm.soon(keys(0..1));
        assert!(rearm.pending().due().unwrap() <= Instant::now() + GATHER);
        rearm.soon([]);
        rearm.pending().take(Instant::now());
        rearm.soon([]);
        assert_eq!(rearm.pending().due(), None);
    }
}
