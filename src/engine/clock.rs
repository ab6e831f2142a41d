//! One clock for everything that has a time: monotonic, in milliseconds since the engine started.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// The engine's clock.
#[derive(Clone, Debug)]
pub enum Clock {
    /// `CLOCK_MONOTONIC`, counted from this instant.
    System(Instant),
    /// Driven by a test.
    Manual(Arc<AtomicU64>),
}

impl Default for Clock {
    fn default() -> Self {
        Self::System(Instant::now())
    }
}

impl Clock {
    /// Milliseconds since the engine started.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        match self {
            Self::System(start) => u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX),
            Self::Manual(now) => now.load(Ordering::SeqCst),
        }
    }
}
