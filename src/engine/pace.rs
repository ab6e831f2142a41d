//! How fast a rule carries packets, as sweeps measure it.

/// Packets per second, as four times the binary logarithm of 1 + 16 times that many; so that a rule
/// with one packet in a minute is told apart from one with none, and it fits a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Pace(pub(super) u8);

impl Default for Pace {
    fn default() -> Self {
        Self::UNKNOWN
    }
}

impl Pace {
    /// Not measured yet.
    pub(super) const UNKNOWN: Self = Self(u8::MAX);
    /// Twice as fast, or half.
    const OCTAVE: u8 = 4;

    pub(super) fn of(packets: u64, ms: u64) -> Self {
        let per_second = packets as f64 * 1000.0 / ms.max(1) as f64;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
        let scaled = (f64::from(Self::OCTAVE) * (1.0 + 16.0 * per_second).log2()).round() as u8;
        Self(scaled.min(u8::MAX - 1))
    }

    pub(super) fn is_known(self) -> bool {
        self != Self::UNKNOWN
    }

    /// What a sweep has measured now, and what was known before.
    pub(super) fn after(self, measured: Self) -> Self {
        if self.is_known() {
            measured.max(Self(self.0.saturating_sub(Self::OCTAVE)))
        } else {
            measured
        }
    }

    /// At least twice as fast, as far as both are known.
    pub(super) fn beats(self, other: Self) -> bool {
        self.is_known() && other.is_known() && self.0 >= other.0.saturating_add(Self::OCTAVE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_faster_rule_has_no_lower_pace_and_twice_the_rate_beats(packets in 1u64..1 << 30, ms in 1u64..100_000) {
            let (once, twice) = (Pace::of(packets, ms), Pace::of(packets.saturating_mul(2), ms));
            prop_assert!(once <= twice);
            prop_assert!(Pace::of(packets.saturating_mul(3), ms).beats(once) || once.0 < 8);
            prop_assert!(!once.beats(once) && !once.beats(twice));
        }
    }

    #[test]
    fn a_pause_of_one_sweep_halves_the_pace() {
        let fast = Pace::of(1000, 1000);
        let after = fast.after(Pace::of(0, 1000));
        assert_eq!(after.0, fast.0 - Pace::OCTAVE);
        assert_eq!(Pace::UNKNOWN.after(fast), fast);
        assert_eq!(Pace::of(0, 1000).after(fast), fast);
    }

    #[test]
    fn what_is_not_known_beats_nothing_and_is_not_beaten() {
        let fast = Pace::of(1 << 30, 1);
        assert!(!Pace::UNKNOWN.beats(Pace::of(0, 1)) && !fast.beats(Pace::UNKNOWN));
        assert!(fast.is_known() && fast.beats(Pace::of(0, 1)));
    }
}
