//! How long providers take for what they are given: a histogram per kind of operation, from the
//! hand-over to the result. What stands in front in the same batch is part of it.
//!
//! Buckets double: a distribution over six decades in 24 counters, at the cost of one atomic add.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use netdev_providers::Request;

/// Below 1 us, 2 us, ... 2^22 us (4 s), and above.
const BUCKETS: usize = 24;

/// Kinds of operations that are timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// A rule is made.
    Add,
    /// A rule is taken away.
    Delete,
}

impl OpKind {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Add, Self::Delete];

    /// The name in output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Delete => "delete",
        }
    }

    pub(super) const fn of(request: &Request) -> Option<Self> {
        match request {
            Request::Add { .. } | Request::Track { .. } | Request::Adopt { .. } => Some(Self::Add),
            Request::Delete { .. } => Some(Self::Delete),
            _ => None,
        }
    }
}

/// One bucket that is not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatencyBucket {
    /// Which operations.
    pub op: OpKind,
    /// They took less than so many microseconds, and not less than half of it; `u64::MAX` for what
    /// took longer than all that is told apart.
    pub below_us: u64,
    /// How many.
    pub count: u64,
}

/// Histograms of one port. Lock-free: completions come on any thread.
#[derive(Debug, Default)]
pub(super) struct Latencies([[AtomicU64; BUCKETS]; 2]);

impl Latencies {
    pub(super) fn record(&self, op: OpKind, took: Duration) {
        self.0[op as usize][bucket(took)].fetch_add(1, Ordering::Relaxed);
    }

    /// What is not empty.
    pub(super) fn buckets(&self) -> Vec<LatencyBucket> {
        OpKind::ALL
            .into_iter()
            .flat_map(|op| {
                self.0[op as usize].iter().enumerate().filter_map(move |(i, n)| {
                    let count = n.load(Ordering::Relaxed);
                    let below_us = if i + 1 < BUCKETS { 1 << i } else { u64::MAX };
                    (count > 0).then_some(LatencyBucket { op, below_us, count })
                })
            })
            .collect()
    }
}

fn bucket(took: Duration) -> usize {
    let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    // The number of bits: 0 for less than one, 1 for 1, 2 for 2 and 3, 3 for 4 to 7.
    (us.checked_ilog2().map_or(0, |log| log as usize + 1)).min(BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_duration_falls_between_the_bounds_of_its_bucket(us in 0u64..1 << 40) {
            let latencies = Latencies::default();
            latencies.record(OpKind::Delete, Duration::from_micros(us));
            let [b] = latencies.buckets()[..] else { panic!("one bucket") };
            prop_assert_eq!((b.op, b.count), (OpKind::Delete, 1));
            prop_assert!(us < b.below_us);
            prop_assert!(b.below_us == u64::MAX || us >= b.below_us / 2);
            prop_assert_eq!(b.below_us == u64::MAX, us >= 1 << (BUCKETS - 2));
        }
    }
}
