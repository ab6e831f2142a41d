//! The transaction of a slot: all that belongs to one direction of one connection on one port changes together,
//! here and nowhere else.
//!
//! | what | where |
//! |---|---|
//! | its state, which packet threads read | the word ([`slot`](super::slot)) |
//! | its rule, and what is known of it | the detail, behind a lock |
//! | that the port holds it, and where its rule leads | [`Held`](super::held::Held) |
//! | that it has one of the port's places | [`Port::rules`] |
//! | what its rule carried, once that is gone | the pasts of the port and of the connection |
//! | the mark that an adopted rule has in the backend | [`Port::adopted`] |
//!
//! A change is made under the detail's lock, so that whoever holds it sees them agree. What follows from it (the
//! delete behind an add that was cancelled, a pause, a sight that is to be armed again) is queued for the port's
//! thread before the lock is released, and who watches is told.

use std::sync::atomic::{AtomicU64, Ordering};

use netdev_providers::{
    Direction, Done, Ifindex, Leftover, Outcome, Permanence, Reason, Rejection, RuleId, RuleReport,
};

use super::Shared;
use super::conn::{ConnHandle, PathTaken, Slot};
use super::counters::Counts;
use super::datapath::SlotChange;
use super::detail::{Detail, Moment, Said};
use super::lines::Line;
use super::pace::Pace;
use super::port::Port;
use super::queue::Command;
use super::reconcile::as_adopted;
use super::shapes::Shape;
use super::slot::{AfterAdd, OpNumber, SlotState, Unwind};
use super::taken::TakenBack;

/// First pause after a transient refusal; doubles with each, up to [`RETRY_MAX_MS`].
const RETRY_MIN_MS: u64 = 100;
const RETRY_MAX_MS: u64 = 30_000;

/// The slot of a direction of a connection on a port.
#[derive(Clone, Copy)]
pub(super) struct PortSlot<'a> {
    shared: &'a Shared,
    port: &'a Port,
    conn: &'a ConnHandle,
    d: Direction,
    slot: Slot<'a>,
}

/// What is to be done about a slot whose pause is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// Nothing: something else has happened to it since.
    Nothing,
    /// Its delete is to be tried again.
    Delete,
    /// It is empty: its sight is to be armed again.
    Rearm,
}

/// What a rule that a sweep reported is to its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reported {
    /// Its rule. `moved`: it has carried packets since the sweep before.
    Its { moved: bool, in_hw: Option<bool> },
    /// Perhaps its rule: an add whose completion is on its way.
    Underway,
    /// None of its.
    Stray,
}

/// How a slot stands when a sweep has heard of all rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Swept {
    /// The pace of its rule and when that was last used, where it has been measured.
    pub(super) measured: Option<(Pace, u64)>,
    /// It has a rule that the provider should have reported, and has not.
    pub(super) is_lost: bool,
}

impl<'a> PortSlot<'a> {
    /// `None`: the direction has not been seen on this port.
    pub(super) fn find(
        shared: &'a Shared,
        port: &'a Port,
        conn: &'a ConnHandle,
        d: Direction,
    ) -> Option<Self> {
        let slot = conn.slot(port.generation(), d)?;
        Some(Self { shared, port, conn, d, slot })
    }

    fn follow_up(&self, command: impl FnOnce(ConnHandle, Direction) -> Command) {
        self.port.queue.push(command(self.conn.clone(), self.d));
    }

    fn tell(&self, change: SlotChange<'_>) {
        self.shared.datapath.slot_changed(&self.port.netdev, self.conn, self.d, change);
    }

    /// The slot is empty: its detail is cleared, its traffic goes to the port's past and the
    /// connection's. Why its rule went stays.
    fn forget(&self, detail: &mut Detail) {
        self.leave(detail);
        if detail.is_held() {
            let egress = detail.path.as_ref().map(|p| p.egress);
            self.port.held().remove(self.conn, self.slot, self.d, egress);
        }
        // One that has no rule (any more) was told when it lost it.
        let at_ms = if detail.is_held() { self.shared.clock.now_ms() } else { detail.used_ms };
        *detail = Detail::of_taken(detail.taken, at_ms);
    }

    /// The rule is gone: its traffic is the port's past and the connection's.
    fn leave(&self, detail: &Detail) {
        self.past(detail);
        if let Some(rule) = detail.rule() {
            self.port.adopted().remove(&rule);
        }
    }

    fn past(&self, detail: &Detail) {
        self.port.counters.past(detail.packets, detail.bytes);
        self.conn.past_traffic(detail.packets, detail.bytes);
    }

    // ---- an add ----

    /// The offer's turn has come. `None`: it was cancelled meanwhile, and the slot is empty.
    pub(super) fn dispatch_add(&self) -> Option<OpNumber> {
        let mut detail = self.slot.detail();
        let op = self.slot.word.dispatch_add(self.port.generation())?;
        // Of a port whose provider never came back: the slot was taken over, and this was not.
        if detail.rule().is_some() || detail.is_held() {
            self.conn.past_traffic(detail.packets, detail.bytes);
            *detail = Detail::default();
        }
        self.port.held().insert(self.conn, self.slot, self.d);
        detail.set_held();
        Some(op)
    }

    /// The path that its rule is to be made for (`None`: none after all), for those who look for the rules that
    /// a change concerns.
    pub(super) fn note_path(&self, path: Option<PathTaken>) {
        let path = path.map(|path| self.port.paths().kept(path));
        let mut detail = self.slot.detail();
        let [before, now] = [&detail.path, &path].map(|p| p.as_ref().map(|p| p.egress));
        if detail.is_held() {
            self.port.held().lead(self.conn, self.slot, self.d, [before, now]);
        }
        detail.path = path;
    }

    /// How fast the connection is, as far as its sights tell: the time since its sight was armed, twice.
    pub(super) fn pace_of_newcomer(&self, now_ms: u64) -> Pace {
        let mut detail = self.slot.detail();
        let pace = Pace::of(1, now_ms.saturating_sub(detail.used_ms));
        match detail.attempts() {
            // Never refused: nothing is known of it.
            0 => Pace::UNKNOWN,
            1 => {
                detail.pace = pace;
                Pace::UNKNOWN
            }
            _ => {
                detail.pace = detail.pace.min(pace);
                detail.pace
            }
        }
    }

    /// It has one of the port's places from now on.
    pub(super) fn take_place(&self) {
        self.port.rules.fetch_add(1, Ordering::SeqCst);
    }

    /// Somebody wants it gone since its add was dispatched.
    pub(super) fn is_cancelled(&self) -> bool {
        self.slot.word.load().is_cancelled()
    }

    /// The add is not to be made after all. It has a place.
    pub(super) fn withdraw(&self, op: OpNumber, rejection: Rejection) {
        self.port.gave_up_place();
        self.refused(op, rejection);
    }

    /// The add has come back.
    pub(super) fn added(&self, op: OpNumber, shape: Shape, outcome: Outcome) {
        match outcome {
            Ok(Done::Added { rule, in_hw, nic_said }) => {
                self.port.capacity.took(self.port.rules.load(Ordering::SeqCst));
                self.installed(op, rule, in_hw, nic_said);
            }
            Ok(_) => {
                let why = "the provider answered an add with the result of another operation";
                self.withdraw(op, Rejection::with_detail(Reason::ProviderFault, why));
            }
            Err(rejection) => {
                self.port.gave_up_place();
                self.port.shapes().note_refused(shape, &rejection);
                if rejection.reason == Reason::TableFull {
                    let rules = self.port.rules.load(Ordering::SeqCst);
                    let (words, now) = (&rejection.detail, self.shared.clock.now_ms());
                    self.port.capacity.refused(rules, words.as_deref(), now);
                }
                self.refused(op, rejection);
            }
        }
    }

    fn installed(
        &self,
        op: OpNumber,
        rule: RuleId,
        in_hw: Option<bool>,
        nic_said: Option<Box<str>>,
    ) {
        let mut detail = self.slot.detail();
        let after = self.slot.word.added(op);
        if after == AfterAdd::Late {
            self.port.gave_up_place();
            let cookie = self.shared.cookie(self.conn, self.d);
            self.port.queue.push(Command::DeleteRule(rule, cookie));
            return;
        }
        self.port.counters.count(Counts::added);
        tracing::debug!(port = %self.port.netdev, conn = %self.conn, d = %self.d, "installed");
        self.tell(SlotChange::Installed);
        detail.set_rule(Some(rule));
        detail.set_in_hw(in_hw);
        detail.forget_trouble();
        if let Some(words) = nic_said {
            detail.say(Said::ByNic(words));
        }
        detail.used_ms = self.shared.clock.now_ms();
        detail.pace = Pace::UNKNOWN;
        if after == AfterAdd::Delete {
            self.follow_up(Command::Delete);
            return;
        }
        (detail.taken, detail.refused) = (None, None);
        if self.conn.replied_by_now() && self.slot.word.reply_seen(self.port.generation()) {
            self.follow_up(Command::Established);
        }
    }

    /// The add was refused, by whomever.
    pub(super) fn refused(&self, op: OpNumber, rejection: Rejection) {
        let mut detail = self.slot.detail();
        if self.slot.word.refused(op, rejection.reason) {
            tracing::debug!(port = %self.port.netdev, conn = %self.conn, d = %self.d, "refused: {rejection}");
            self.port.counters.count(|counts| counts.refused(rejection.reason));
            self.tell(SlotChange::Rejected(&rejection));
            detail.count_attempt();
            if rejection.reason.permanence() == Permanence::Transient {
                self.pause(&mut detail);
            }
            detail.say(Said::Rejected(rejection));
        } else if self.slot.word.load().state() == SlotState::Empty {
            self.forget(&mut detail);
            self.follow_up(Command::Rearm);
        }
    }

    /// It is looked at again after a while, the longer the more often that did not help.
    fn pause(&self, detail: &mut Detail) {
        let at = self.shared.clock.now_ms() + backoff_ms(detail.attempts());
        detail.set_retry_at(Moment::at(at));
        self.follow_up(Command::Rejected);
    }

    // ---- a rule that was there already ----

    /// The adoption has come back. False: the rule is another than it would be now, and gone.
    pub(super) fn adopted(&self, op: OpNumber, found: &Leftover, outcome: Outcome) -> bool {
        match as_adopted(outcome, found.rule) {
            Ok((in_hw, nic_said)) => {
                self.installed(op, found.rule, in_hw, nic_said);
                self.count_on_from(found);
                true
            }
            Err(why) => {
                self.not_adopted(op, &why);
                false
            }
        }
    }

    fn count_on_from(&self, found: &Leftover) {
        let mut detail = self.slot.detail();
        if detail.rule() == Some(found.rule) {
            self.port.adopted().insert(found.rule, found.cookie);
            // It counts on from where it is: what it carried before is not news to a sweep.
            detail.packets = found.counters.packets;
            detail.bytes = found.counters.bytes;
        }
    }

    /// The slot is open again.
    fn not_adopted(&self, op: OpNumber, why: &Rejection) {
        self.port.gave_up_place();
        tracing::debug!(port = %self.port.netdev, conn = %self.conn, d = %self.d, "not adopted: {why}");
        let mut detail = self.slot.detail();
        if self.slot.word.refused(op, why.reason) {
            self.slot.word.retry(self.port.generation());
        }
        if self.slot.word.load().state() == SlotState::Empty {
            self.forget(&mut detail);
            drop(detail);
            self.tell(SlotChange::Deleted);
            self.follow_up(Command::Rearm);
        }
    }

    // ---- the first reply ----

    /// The provider is to be told of the first reply; of which rule.
    pub(super) fn dispatch_established(&self) -> Option<(OpNumber, RuleId)> {
        let detail = self.slot.detail();
        let rule = detail.rule()?;
        Some((self.slot.word.dispatch_established(self.port.generation())?, rule))
    }

    /// It was told. That is informative only: a refusal changes nothing.
    pub(super) fn established(&self, op: OpNumber) {
        if self.slot.word.established(op) {
            self.follow_up(Command::Delete);
        }
    }

    // ---- a delete ----

    /// Asks for the slot to become empty; what is installed is left to be deleted by the caller.
    pub(super) fn unwind(&self, why: TakenBack) -> Unwind {
        let mut detail = self.slot.detail();
        let left = self.slot.word.unwind(self.port.generation());
        match left {
            Unwind::Delete | Unwind::Cancelling => detail.taken = Some(why),
            Unwind::Reopened => self.forget(&mut detail),
            Unwind::Nothing => {}
        }
        left
    }

    /// The same, and queues what is to be done. True when there was something.
    pub(super) fn retract(&self, why: TakenBack) -> bool {
        let (had_one, command) = self.unwound(why);
        if let Some(command) = command {
            self.port.queue.push(command);
        }
        had_one
    }

    /// The same; what the port's thread is to do is for the caller to queue.
    pub(super) fn unwound(&self, why: TakenBack) -> (bool, Option<Command>) {
        let whose = || (self.conn.clone(), self.d);
        match self.unwind(why) {
            Unwind::Delete => {
                let (conn, d) = whose();
                (true, Some(Command::Delete(conn, d)))
            }
            Unwind::Cancelling => (true, None),
            Unwind::Reopened if !self.conn.is_dead() => {
                let (conn, d) = whose();
                (false, Some(Command::Rearm(conn, d)))
            }
            Unwind::Reopened | Unwind::Nothing => (false, None),
        }
    }

    /// Asks for the deletion of an installed rule that does nothing, after which the slot is rejected
    /// for a while. False: the slot has moved on.
    pub(super) fn refute(&self, rejection: Rejection, retry_at_ms: u64) -> bool {
        let mut detail = self.slot.detail();
        if self.slot.word.load().state() != SlotState::Installed
            || self.slot.word.unwind(self.port.generation()) != Unwind::Delete
        {
            return false;
        }
        detail.say(Said::Rejected(rejection));
        detail.set_retry_at(Moment::at(retry_at_ms));
        self.follow_up(Command::Delete);
        true
    }

    /// Whether the rule is the one that a sweep saw, and has not been used since.
    pub(super) fn is_as_swept(&self, used_ms: u64) -> bool {
        let detail = self.slot.detail();
        self.slot.word.load().state() == SlotState::Installed && detail.used_ms == used_ms
    }

    /// Whether it was refused for this reason.
    pub(super) fn is_rejected_for(&self, reason: Reason) -> bool {
        let now = self.slot.word.load();
        now.state() == SlotState::Rejected && now.reason() == Some(reason)
    }

    /// The delete's turn has come: the rule, whose place is another's from now on. `None`: there is nothing to
    /// be deleted (any more).
    pub(super) fn dispatch_delete(&self) -> Option<(OpNumber, RuleId)> {
        let (op, rule) = {
            let detail = self.slot.detail();
            (self.slot.word.dispatch_delete(self.port.generation())?, detail.rule())
        };
        let Some(rule) = rule else {
            self.deleted(op);
            return None;
        };
        // What is submitted behind the delete can have it.
        self.port.gave_up_place();
        Some((op, rule))
    }

    /// The rule is gone.
    pub(super) fn deleted(&self, op: OpNumber) {
        let mut detail = self.slot.detail();
        if let Some(Said::Rejected(rejection)) = detail.take_said()
            && !self.conn.is_dead()
        {
            if self.slot.word.deleted_because(op, rejection.reason) {
                self.port.counters.count(Counts::deleted);
                self.refuted(&mut detail, rejection);
            }
            return;
        }
        if self.slot.word.deleted(op) {
            self.port.counters.count(Counts::deleted);
            tracing::debug!(port = %self.port.netdev, conn = %self.conn, d = %self.d, "deleted");
            self.tell(SlotChange::Deleted);
            self.forget(&mut detail);
            drop(detail);
            if !self.conn.is_dead() {
                self.follow_up(Command::Rearm);
            }
        }
    }

    /// The rule is gone because it did nothing: the slot stays rejected for the pause that was set when
    /// that was noticed.
    fn refuted(&self, detail: &mut Detail, rejection: Rejection) {
        if self.port.lines.is_told(Line::NoEffect, self.shared.clock.now_ms()) {
            tracing::warn!(port = %self.port.netdev, conn = %self.conn, d = %self.d, "{rejection}");
        }
        self.port.counters.count(|counts| counts.refused(rejection.reason));
        self.tell(SlotChange::Rejected(&rejection));
        let retry_at = detail.retry_at().ms().unwrap_or_else(|| self.shared.clock.now_ms());
        self.leave(detail);
        let path = detail.path.take();
        *detail = Detail::default();
        detail.path = path;
        detail.set_held();
        detail.set_retry_at(Moment::at(retry_at));
        detail.say(Said::Rejected(rejection));
        self.follow_up(Command::Rejected);
    }

    /// The provider has not deleted the rule, which has its place still.
    pub(super) fn undeleted(&self, op: OpNumber, rejection: &Rejection) {
        self.port.rules.fetch_add(1, Ordering::SeqCst);
        let mut detail = self.slot.detail();
        if !self.slot.word.delete_failed(op) {
            return;
        }
        let attempts = detail.count_attempt();
        // It is tried until the port goes. Not every time is news.
        if attempts.is_power_of_two()
            && self.port.lines.is_told(Line::Undeleted, self.shared.clock.now_ms())
        {
            tracing::warn!(port = %self.port.netdev, conn = %self.conn, d = %self.d, attempts, "a rule is not deleted: {rejection}");
        }
        // Of one that did nothing, the reason of that stays.
        if !matches!(detail.said(), Some(Said::Rejected(_))) {
            detail.say(Said::Undeleted(rejection.clone()));
        }
        self.pause(&mut detail);
    }

    /// Whether its rule is to go, and was not deleted though the provider was asked to.
    pub(super) fn is_undeleted(&self) -> bool {
        let (detail, now) = (self.slot.detail(), self.slot.word.load());
        now.state() == SlotState::Deleting && !now.in_flight() && detail.attempts() > 0
    }

    /// The slot is empty, whatever it was: the provider has no rule of it, and gets none.
    pub(super) fn reset(&self, why: TakenBack) {
        let mut detail = self.slot.detail();
        if let Some(before) = self.slot.word.reset(self.port.generation()) {
            if matches!(before, SlotState::Pending | SlotState::Installed) {
                detail.taken = Some(why);
            }
            if detail.rule().is_some() {
                self.port.counters.count(Counts::flushed);
                self.tell(SlotChange::Deleted);
            }
            self.forget(&mut detail);
        }
    }

    // ---- pauses ----

    /// When its pause is over.
    pub(super) fn retry_at_ms(&self) -> Option<u64> {
        self.slot.detail().retry_at().ms()
    }

    /// What is due by now. A rejected slot is empty afterwards.
    pub(super) fn retry(&self, now_ms: u64) -> Due {
        let mut detail = self.slot.detail();
        if detail.retry_at().ms().is_none_or(|at| at > now_ms) {
            return Due::Nothing;
        }
        detail.set_retry_at(Moment::default());
        if self.slot.word.load().state() == SlotState::Deleting {
            return Due::Delete;
        }
        if !self.slot.word.retry(self.port.generation()) {
            return Due::Nothing;
        }
        // The number of attempts stays: the next pause is longer. How long the next packet
        // takes from now on tells the connection's pace.
        let (attempts, pace) = (detail.attempts(), detail.pace);
        let refused = match detail.said() {
            Some(Said::Rejected(why)) => Some(why.reason),
            _ => None,
        };
        self.forget(&mut detail);
        *detail = Detail::of_refused(attempts, refused, pace, now_ms);
        Due::Rearm
    }

    // ---- sweeps ----

    /// A sweep, by its number, has heard of a rule with this slot's cookie. The sweep before began at
    /// `before_ms`.
    pub(super) fn reported(&self, report: &RuleReport, sweep: u32, before_ms: u64) -> Reported {
        let mut detail = self.slot.detail();
        if detail.rule() != Some(report.rule) {
            return match self.slot.word.load().state() {
                SlotState::Empty => Reported::Stray,
                _ => Reported::Underway,
            };
        }
        let counters = report.counters;
        let seen_before = detail.sweep != 0;
        detail.sweep = sweep;
        let in_hw = report.in_hw.or(detail.in_hw());
        detail.set_in_hw(in_hw);
        let now = self.shared.clock.now_ms();
        // Somebody replaced the rule, or the NIC was reset: they count from 0 again.
        if counters.packets < detail.packets || counters.bytes < detail.bytes {
            self.past(&detail);
            (detail.packets, detail.bytes) = (0, 0);
        }
        let carried = counters.packets - detail.packets;
        // From the second sweep on a whole interval was measured.
        if seen_before {
            let interval = now.saturating_sub(before_ms);
            detail.pace = detail.pace.after(Pace::of(carried, interval));
        }
        if carried > 0 {
            detail.used_ms = now;
        }
        (detail.packets, detail.bytes) = (counters.packets, counters.bytes);
        Reported::Its { moved: carried > 0, in_hw }
    }

    /// A sweep, by its number, that began at `started_ms`, has heard of all rules.
    pub(super) fn swept(&self, sweep: u32, started_ms: u64) -> Swept {
        let detail = self.slot.detail();
        let installed = self.slot.word.load().state() == SlotState::Installed;
        let measured = installed && detail.pace.is_known();
        Swept {
            measured: measured.then_some((detail.pace, detail.used_ms)),
            is_lost: installed && detail.sweep < sweep && detail.used_ms + 1 < started_ms,
        }
    }
}

/// The slots of a port whose rules forward into this netdev, and could not be deleted so far.
pub(super) fn undeleted_towards(
    shared: &Shared,
    port: &Port,
    egress: Ifindex,
) -> Vec<(ConnHandle, Direction)> {
    let mut towards = port.held().towards(egress);
    towards.retain(|(conn, d)| {
        PortSlot::find(shared, port, conn, *d).is_some_and(|slot| slot.is_undeleted())
    });
    towards
}

/// Doubles with every attempt, with a quarter of jitter so that a full table is not asked by
/// everybody at once.
fn backoff_ms(attempts: u16) -> u64 {
    static SEED: AtomicU64 = AtomicU64::new(0x9e37_79b9_7f4a_7c15);
    let base = (RETRY_MIN_MS << attempts.saturating_sub(1).min(16)).min(RETRY_MAX_MS);
    let mut x = SEED.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9); // splitmix64
    x ^= x >> 27;
    base + x % (base / 4 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_doubles_up_to_a_bound_and_is_not_the_same_for_all() {
        for attempts in [1, 2, 5, 9, 10, 17, 1000, u16::MAX] {
            let base = RETRY_MAX_MS.min(RETRY_MIN_MS << (attempts - 1).min(16));
            let pauses: Vec<u64> = (0..200).map(|_| backoff_ms(attempts)).collect();
            assert!(pauses.iter().all(|p| (base..=base + base / 4).contains(p)), "{pauses:?}");
            let different: std::collections::HashSet<_> = pauses.iter().collect();
            assert!(different.len() > 10, "no jitter: {different:?}");
        }
    }

    #[test]
    fn the_pause_is_spread_over_a_quarter_of_itself() {
        let pauses: std::collections::BTreeSet<u64> = (0..3000).map(|_| backoff_ms(1)).collect();
        assert_eq!((pauses.first(), pauses.last()), (Some(&100), Some(&125)));
    }
}
