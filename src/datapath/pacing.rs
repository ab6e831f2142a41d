//! How long to wait between two sweeps of the rules' counters.
//!
//! A sweep is what finds out that a connection is in use; conntrack's entry must not expire in the
//! meantime. It also costs time, on every port. So, in this order:
//!
//! 1. `sweep-seconds` while rules carry packets. While none does, each pause is twice as long as the
//!    one before.
//! 2. At least 20 times as long as the sweep took: it takes no more than a twentieth of a processor.
//! 3. At most a quarter of the shortest timeout that offloaded connections have: each is looked at
//!    several times before it can expire. This is stronger than 2.
//! 4. Never below what the sweep took itself, never below a second (or `sweep-seconds`), and never
//!    above `sweep-max-seconds`.

use std::time::Duration;

/// The bounds, as configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SweepBounds {
    /// While rules carry packets.
    pub busy: Duration,
    /// At most.
    pub max: Duration,
}

/// What the last sweep was like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Swept {
    pub(super) took: Duration,
    /// Some rule had carried something.
    pub(super) moved: bool,
    /// The shortest timeout of the connections that have rules.
    pub(super) shortest_timeout: Option<Duration>,
}

impl SweepBounds {
    /// The pause after a sweep, given the pause before it.
    pub(super) fn pause(&self, before: Duration, swept: &Swept) -> Duration {
        let max = self.max.max(self.busy);
        let mut pause = if swept.moved { self.busy } else { before.saturating_mul(2) };
        pause = pause.max(swept.took.saturating_mul(20));
        if let Some(timeout) = swept.shortest_timeout {
            pause = pause.min(timeout / 4);
        }
        pause.max(swept.took).max(Duration::from_secs(1).min(self.busy)).min(max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOUNDS: SweepBounds =
        SweepBounds { busy: Duration::from_secs(5), max: Duration::from_secs(60) };

    fn pause(before: u64, took_ms: u64, moved: bool, timeout: Option<u64>) -> f64 {
        let swept = Swept {
            took: Duration::from_millis(took_ms),
            moved,
            shortest_timeout: timeout.map(Duration::from_secs),
        };
        BOUNDS.pause(Duration::from_secs(before), &swept).as_secs_f64()
    }

    #[test]
    fn quiet_rules_are_looked_at_less_and_less_often_and_busy_ones_at_once_again() {
        assert_eq!(pause(5, 1, false, None), 10.0);
        assert_eq!(pause(10, 1, false, None), 20.0);
        assert_eq!(pause(40, 1, false, None), 60.0);
        assert_eq!(pause(60, 1, true, None), 5.0);
    }

    #[test]
    fn what_costs_much_is_done_less_often_but_not_so_that_connections_expire() {
        assert_eq!(pause(5, 1000, true, None), 20.0);
        assert_eq!(pause(5, 1000, true, Some(12)), 3.0);
        assert_eq!(pause(5, 1, true, Some(2)), 1.0);
        assert_eq!(pause(5, 4000, true, Some(12)), 4.0, "not without a pause at all");
    }

    proptest! {
        #[test]
        fn the_pause_keeps_to_its_bounds(busy in 1u64..3600, max in 1u64..3600, before in 0u64..7200, took in 0u64..100_000, moved: bool, timeout in proptest::option::of(0u64..500_000)) {
            let bounds = SweepBounds { busy: Duration::from_secs(busy), max: Duration::from_secs(max) };
            let took = Duration::from_millis(took);
            let shortest_timeout = timeout.map(Duration::from_secs);
            let swept = Swept { took, moved, shortest_timeout };
            let pause = bounds.pause(Duration::from_secs(before), &swept);
            prop_assert!(pause >= Duration::from_secs(1).min(bounds.busy));
            prop_assert!(pause <= bounds.max.max(bounds.busy));
            if let Some(t) = shortest_timeout {
                prop_assert!(pause <= (t / 4).max(took).max(Duration::from_secs(1)));
            }
        }
    }
}
