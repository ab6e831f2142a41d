//! What the slow parts of the engine know of a slot. Compact, since there are two for each of a million
//! connections: what an installed rule does not need is made when something is to be said.

use std::num::NonZeroU64;
use std::sync::Arc;

use netdev_providers::{Reason, Rejection, RuleId};

use super::pace::Pace;
use super::paths::PathTaken;
use super::taken::TakenBack;

/// A time on the engine's clock, or none, in eight bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Moment(Option<NonZeroU64>);

impl Moment {
    pub(super) const fn at(ms: u64) -> Self {
        // The end of time is a millisecond early.
        Self(NonZeroU64::new(ms.saturating_add(1)))
    }

    pub(super) fn ms(self) -> Option<u64> {
        self.0.map(|n| n.get() - 1)
    }
}

/// What there is to be told of a slot, beside its state.
#[derive(Debug)]
pub(super) enum Said {
    /// Why it is rejected, or will be when its rule is gone.
    Rejected(Rejection),
    /// Why its rule is still there though it is to go.
    Undeleted(Rejection),
    /// Why the NIC did not take its rule, in the driver's words.
    ByNic(Box<str>),
}

/// What is known of a slot whose offer, or whose delete, did not simply succeed.
#[derive(Debug, Default)]
struct Trouble {
    said: Option<Said>,
    /// Refusals in a row.
    attempts: u16,
    retry_at: Moment,
}

/// What is known of the rule, in bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Flags(u8);

impl Flags {
    /// There is one.
    const RULE: Self = Self(1);
    /// It is known whether the NIC has it.
    const HW_KNOWN: Self = Self(2);
    /// The NIC has it.
    const IN_HW: Self = Self(4);
    /// The port lists the slot.
    const HELD: Self = Self(8);

    const fn has(self, flag: Self) -> bool {
        self.0 & flag.0 != 0
    }

    fn set(&mut self, flag: Self, on: bool) {
        self.0 = if on { self.0 | flag.0 } else { self.0 & !flag.0 };
    }
}

/// What is known of a slot. Behind a lock that packet threads never take.
#[derive(Debug, Default)]
pub(super) struct Detail {
    rule: u64,
    /// Where the rule forwards to.
    pub path: Option<Arc<PathTaken>>,
    trouble: Option<Box<Trouble>>,
    /// When a sweep last saw the counters move; before the first time, when it was installed; before
    /// that, when its sight was re-armed, or its rule taken back.
    pub used_ms: u64,
    pub packets: u64,
    pub bytes: u64,
    /// The last sweep that saw the rule.
    pub sweep: u32,
    /// Of the rule, as sweeps measured it; before it is installed, of the connection, as its sights
    /// tell it.
    pub pace: Pace,
    flags: Flags,
    /// Why the rule is to go, or went last, while there is no other since. It went at [`used_ms`](Self::used_ms), then.
    pub taken: Option<TakenBack>,
    /// Why the last offer was refused, while there is no rule and no new offer since.
    pub refused: Option<Reason>,
}

impl Detail {
    /// The rule, from the completion of the add to that of the delete.
    pub(super) fn rule(&self) -> Option<RuleId> {
        self.flags.has(Flags::RULE).then_some(RuleId(self.rule))
    }

    pub(super) fn set_rule(&mut self, rule: Option<RuleId>) {
        self.flags.set(Flags::RULE, rule.is_some());
        self.rule = rule.map_or(0, |RuleId(rule)| rule);
    }

    pub(super) fn in_hw(&self) -> Option<bool> {
        self.flags.has(Flags::HW_KNOWN).then_some(self.flags.has(Flags::IN_HW))
    }

    pub(super) fn set_in_hw(&mut self, in_hw: Option<bool>) {
        self.flags.set(Flags::HW_KNOWN, in_hw.is_some());
        self.flags.set(Flags::IN_HW, in_hw == Some(true));
    }

    /// Whether the port lists the slot among what it holds.
    pub(super) fn is_held(&self) -> bool {
        self.flags.has(Flags::HELD)
    }

    pub(super) fn set_held(&mut self) {
        self.flags.set(Flags::HELD, true);
    }

    pub(super) fn said(&self) -> Option<&Said> {
        self.trouble.as_ref()?.said.as_ref()
    }

    pub(super) fn say(&mut self, said: Said) {
        self.trouble().said = Some(said);
    }

    pub(super) fn take_said(&mut self) -> Option<Said> {
        self.trouble.as_mut()?.said.take()
    }

    /// Refusals in a row.
    pub(super) fn attempts(&self) -> u16 {
        self.trouble.as_ref().map_or(0, |trouble| trouble.attempts)
    }

    /// One more.
    pub(super) fn count_attempt(&mut self) -> u16 {
        let attempts = &mut self.trouble().attempts;
        *attempts = attempts.saturating_add(1);
        *attempts
    }

    /// When the slot is looked at again.
    pub(super) fn retry_at(&self) -> Moment {
        self.trouble.as_ref().map_or(Moment::default(), |trouble| trouble.retry_at)
    }

    pub(super) fn set_retry_at(&mut self, at: Moment) {
        if at != self.retry_at() {
            self.trouble().retry_at = at;
        }
    }

    /// All is well: nothing is said, nothing was refused.
    pub(super) fn forget_trouble(&mut self) {
        self.trouble = None;
    }

    fn trouble(&mut self) -> &mut Trouble {
        self.trouble.get_or_insert_default()
    }

    /// What is known of an empty slot whose rule has just been taken back.
    pub(super) fn of_taken(taken: Option<TakenBack>, at_ms: u64) -> Self {
        let used_ms = if taken.is_some() { at_ms } else { 0 };
        Self { taken, used_ms, ..Self::default() }
    }

    /// What is known of an empty slot whose last offers were refused so often.
    pub(super) fn of_refused(
        attempts: u16,
        refused: Option<Reason>,
        pace: Pace,
        now_ms: u64,
    ) -> Self {
        let mut detail = Self { pace, refused, used_ms: now_ms, ..Self::default() };
        if attempts > 0 {
            detail.trouble().attempts = attempts;
        }
        detail
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use netdev_providers::Reason;

    #[test]
    fn a_detail_takes_seven_words() {
        assert_eq!(size_of::<Detail>(), 56);
    }

    #[test]
    fn a_rule_may_have_any_name_and_the_nic_may_have_it_or_not() {
        let mut d = Detail::default();
        assert_eq!((d.rule(), d.in_hw()), (None, None));
        for rule in [None, Some(RuleId(0)), Some(RuleId(u64::MAX))] {
            for in_hw in [None, Some(false), Some(true)] {
                d.set_rule(rule);
                d.set_in_hw(in_hw);
                assert_eq!((d.rule(), d.in_hw()), (rule, in_hw));
            }
        }
    }

    #[test]
    fn trouble_is_kept_while_there_is_some() {
        let mut d = Detail::default();
        d.set_retry_at(Moment::default());
        assert!(d.trouble.is_none(), "nothing is to be said of it");
        assert_eq!((d.count_attempt(), d.count_attempt(), d.attempts()), (1, 2, 2));
        d.set_retry_at(Moment::at(0));
        assert_eq!(d.retry_at().ms(), Some(0));
        d.say(Said::Rejected(Reason::Busy.into()));
        assert!(matches!(d.said(), Some(Said::Rejected(_))));
        assert!(d.take_said().is_some() && d.said().is_none() && d.take_said().is_none());
        d.forget_trouble();
        assert_eq!((d.attempts(), d.retry_at()), (0, Moment::default()));
        let refused = Detail::of_refused(3, Some(Reason::TableFull), Pace(5), 7);
        assert_eq!((refused.attempts(), refused.pace, refused.used_ms), (3, Pace(5), 7));
        assert!(Detail::of_refused(0, None, Pace::UNKNOWN, 7).trouble.is_none());
    }
}
