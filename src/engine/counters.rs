//! What is counted of a port, for people.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use netdev_providers::Reason;

use super::latency::Latencies;

/// Counts of one port. Relaxed: each is read by itself, for people.
#[derive(Debug, Default)]
pub(super) struct PortCounters {
    pub adds: AtomicU64,
    pub deletes: AtomicU64,
    /// Rules that gave way to those of busier connections.
    pub evictions: AtomicU64,
    /// Traffic of rules that are gone.
    pub past_packets: AtomicU64,
    pub past_bytes: AtomicU64,
    pub latencies: Latencies,
    reasons: ReasonCounters,
}

/// One counter per reason code.
struct ReasonCounters([AtomicU64; 64]);

impl Default for ReasonCounters {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl fmt::Debug for ReasonCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReasonCounters")
    }
}

impl PortCounters {
    pub(super) fn count(&self, reason: Reason) {
        if let Some(c) = self.reasons.0.get(usize::from(reason as u8)) {
            c.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Traffic of a rule that is gone.
    pub(super) fn past(&self, packets: u64, bytes: u64) {
        self.past_packets.fetch_add(packets, Ordering::Relaxed);
        self.past_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn reasons(&self) -> Vec<(Reason, u64)> {
        Reason::ALL
            .iter()
            .filter_map(|&r| {
                let n = self.reasons.0.get(usize::from(r as u8))?.load(Ordering::Relaxed);
                (n > 0).then_some((r, n))
            })
            .collect()
    }
}
