//! What is counted of a port, for people.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use netdev_providers::Reason;

use super::latency::Latencies;

/// Counts of what has become of rules and offers: of one port, or of all there have ever been. They only rise, and rules
/// are as many as were added less those deleted and flushed. Relaxed: each is read by itself, for people.
#[derive(Debug, Default)]
pub(super) struct Counts {
    adds: AtomicU64,
    deletes: AtomicU64,
    flushed: AtomicU64,
    reasons: ReasonCounters,
}

/// A reading of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Rules installed, or adopted.
    pub adds: u64,
    /// Rules that went one by one, also those that somebody else had removed.
    pub deletes: u64,
    /// Rules that went all at once, with everything that their port had.
    pub flushed: u64,
    /// Offers refused, and rules that did nothing, by reason.
    pub reasons: Vec<(Reason, u64)>,
}

impl Counts {
    pub(super) fn added(&self) {
        self.adds.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn deleted(&self) {
        self.deletes.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn flushed(&self) {
        self.flushed.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn refused(&self, reason: Reason) {
        if let Some(c) = self.reasons.0.get(usize::from(reason as u8)) {
            c.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn read(&self) -> Totals {
        let reasons = Reason::ALL.iter().filter_map(|&r| {
            let n = self.reasons.0.get(usize::from(r as u8))?.load(Ordering::Relaxed);
            (n > 0).then_some((r, n))
        });
        Totals {
            adds: self.adds.load(Ordering::Relaxed),
            deletes: self.deletes.load(Ordering::Relaxed),
            flushed: self.flushed.load(Ordering::Relaxed),
            reasons: reasons.collect(),
        }
    }
}

/// Counts of one port.
#[derive(Debug)]
pub(super) struct PortCounters {
    counts: Counts,
    /// Of all ports that there have ever been.
    all: Arc<Counts>,
    /// Rules that gave way to those of busier connections.
    pub evictions: AtomicU64,
    /// Traffic of rules that are gone.
    pub past_packets: AtomicU64,
    pub past_bytes: AtomicU64,
    pub latencies: Latencies,
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
    pub(super) fn new(all: Arc<Counts>) -> Self {
        Self {
            counts: Counts::default(),
            all,
            evictions: AtomicU64::default(),
            past_packets: AtomicU64::default(),
            past_bytes: AtomicU64::default(),
            latencies: Latencies::default(),
        }
    }

    /// For the port, and for all.
    pub(super) fn count(&self, what: impl Fn(&Counts)) {
        what(&self.counts);
        what(&self.all);
    }

    pub(super) fn read(&self) -> Totals {
        self.counts.read()
    }

    /// Traffic of a rule that is gone.
    pub(super) fn past(&self, packets: u64, bytes: u64) {
        self.past_packets.fetch_add(packets, Ordering::Relaxed);
        self.past_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}
