//! How things are timed: in rounds that alternate the contestants, by the clock or by the CPU time
//! of the thread, without what other processes did to it meanwhile.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

/// Many measurements of one thing, one a round; NaN where a round gave none.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// `None` when nothing was measured.
    pub(crate) fn median(&self) -> Option<f64> {
        let mut sorted: Vec<f64> = self.finite().collect();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => None,
            n if n % 2 == 1 => Some(sorted[middle]),
            _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
        }
    }

    /// Without the rounds in which nothing could be measured (NaN).
    fn finite(&self) -> impl Iterator<Item = f64> {
        self.0.iter().copied().filter(|v| v.is_finite())
    }

    /// Each measurement divided by the one that the other contestant made in the same round: what
    /// the machine's speed did between rounds falls out.
    pub(crate) fn over(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(a, b)| a / b).collect())
    }
}

/// CPU time of the calling thread.
pub(crate) fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// CPU time that this thread takes for it. The time while other processes had the CPU does not
/// count; neither does time spent blocked, so this is for work that never blocks.
pub(crate) fn cpu_ns(work: impl FnOnce()) -> f64 {
    let started = cpu_time();
    work();
    nanos(cpu_time().saturating_sub(started))
}

pub(crate) fn nanos(d: Duration) -> f64 {
    d.as_secs_f64() * 1e9
}

/// How often the kernel took the CPU away from this thread for somebody else.
pub(crate) fn preemptions() -> i64 {
    // SAFETY: all zeroes is a value of this plain C structure.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a structure that lives through the call.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    usage.ru_nivcsw
}

/// The CPUs that this process may use.
pub(crate) fn cpus() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else { return vec![0] };
    (0..CpuSet::count()).filter(|&n| set.is_set(n).unwrap_or(false)).collect()
}

/// Keeps the calling thread on one CPU.
pub(crate) fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    if set.set(cpu).is_ok() {
        let _ = sched_setaffinity(Pid::from_raw(0), &set);
    }
}

/// Runs the same work at once on one thread per given CPU, and returns the time of the slowest.
/// Each thread makes its own view first (`prepare`), warms up with one run, and starts with the
/// others. `None` when the measurement is not clean: a thread lost its CPU to somebody else, or
/// they did not start together.
pub(crate) fn together<V>(
    cpus: &[usize],
    prepare: impl Fn() -> V + Sync,
    work: impl Fn(&mut V) + Sync,
) -> Option<Duration> {
    let ready = AtomicUsize::new(0);
    let spans: Vec<(Instant, Instant, bool)> = std::thread::scope(|scope| {
        let threads: Vec<_> = cpus
            .iter()
            .map(|&cpu| {
                let (prepare, work, ready) = (&prepare, &work, &ready);
                scope.spawn(move || {
                    pin(cpu);
                    let mut view = prepare();
                    work(&mut view);
                    ready.fetch_add(1, Ordering::SeqCst);
                    while ready.load(Ordering::SeqCst) < cpus.len() {
                        std::hint::spin_loop();
                    }
                    let before = preemptions();
                    let started = Instant::now();
                    work(&mut view);
                    let ended = Instant::now();
                    (started, ended, preemptions() == before)
                })
            })
            .collect();
        threads.into_iter().filter_map(|t| t.join().ok()).collect()
    });
    let first = spans.iter().map(|s| s.0).min()?;
    let last_started = spans.iter().map(|s| s.0).max()?;
    let took = spans.iter().map(|s| s.1).max()?.saturating_duration_since(first);
    let clean = spans.len() == cpus.len() && spans.iter().all(|s| s.2);
    (clean && last_started.saturating_duration_since(first) < took / 20).then_some(took)
}

/// Repeats a measurement until it is clean; `None` after many attempts.
pub(crate) fn until_clean<T>(mut measure: impl FnMut() -> Option<T>) -> Option<T> {
    (0..200).find_map(|_| measure())
}

/// Numbers that look random and are the same in every run (splitmix64).
pub(crate) struct Shuffle(pub u64);

impl Shuffle {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for n in (1..items.len()).rev() {
            items.swap(n, (self.next() % (n as u64 + 1)) as usize);
        }
    }
}
