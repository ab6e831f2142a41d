//! The offload state of (connection, port, direction), as one atomic word.
//!
//! ```text
//!            claim           dispatch, add done
//!   Empty ---------> Pending ------------------> Installed
//!     ^               |   \                          |
//!     |     cancelled |    \ add refused             | delete
//!     +---------------+     v                        v
//!     +------------------ Rejected                Deleting
//!     |   retry is due                               |
//!     +----------------------------------------------+  delete acknowledged
//! ```
//!
//! A slot is **keyed** by a claim with the generation of its port, and keeps that key as long as the
//! connection or the port lives, in every state. A claim takes over the slot of a port that was gone
//! when its own was added: so all workers of a port agree on which slot is theirs (what may be taken
//! over is fixed when a port is added, and keys only ever give way to later ones), one
//! compare-and-exchange decides who makes the rule, and a port that is added again and again costs a
//! connection one slot. Whatever found a slot before it was taken over finds, with its transition,
//! another's key, and changes nothing.
//!
//! All transitions are methods of [`SlotWord`]; each says what the caller has to do next, and none
//! can be made from a state that it does not fit.

use std::sync::atomic::Ordering;

use netdev_providers::{Generation, Reason};

use super::sync::AtomicU64;

/// States of a slot (see the [module](self)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SlotState {
    /// Nothing is installed, nothing is under way.
    Empty = 0,
    /// An add is queued or in flight.
    Pending = 1,
    /// The rule is there.
    Installed = 2,
    /// A delete is queued or in flight.
    Deleting = 3,
    /// The last add was refused.
    Rejected = 4,
}

impl SlotState {
    /// Those that a slot can be seen in: an empty one is not told.
    pub const SHOWN: [Self; 4] = [Self::Pending, Self::Installed, Self::Deleting, Self::Rejected];

    /// The name in output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Pending => "pending",
            Self::Installed => "installed",
            Self::Deleting => "deleting",
            Self::Rejected => "rejected",
        }
    }
}

// Layout of the word, from bit 0: generation 32, state 3, flags 3, 2 not used, reason 8, operation 16.
const GENERATION: u64 = 0xffff_ffff;
const STATE_SHIFT: u32 = 32;
const STATE: u64 = 0x7 << STATE_SHIFT;
/// The operation of a Pending or Deleting slot has been handed to the provider.
const IN_FLIGHT: u64 = 1 << 35;
/// A delete was asked for while the add was pending.
const CANCEL: u64 = 1 << 36;
/// The provider has been told of the reply.
const REPLY_SENT: u64 = 1 << 37;
const REASON_SHIFT: u32 = 40;
const REASON: u64 = 0xff << REASON_SHIFT;
const OP_SHIFT: u32 = 48;
const OP_ONE: u64 = 1 << OP_SHIFT;

/// A reading of a slot's word. From bit 0: the generation of the slot's port (32 bits), the
/// [state](SlotState) (3); the rest is the engine's own. A packet thread has nothing to do where the
/// generation is its port's and the state is not [`Empty`](SlotState::Empty).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Snapshot(u64);

impl Snapshot {
    /// Its state.
    #[must_use]
    pub const fn state(self) -> SlotState {
        match (self.0 & STATE) >> STATE_SHIFT {
            1 => SlotState::Pending,
            2 => SlotState::Installed,
            3 => SlotState::Deleting,
            4 => SlotState::Rejected,
            _ => SlotState::Empty,
        }
    }

    /// The generation of the port that the slot belongs to; `None` before the first claim.
    #[must_use]
    pub const fn generation(self) -> Option<Generation> {
        Generation::new((self.0 & GENERATION) as u32)
    }

    /// Why the slot was rejected.
    #[must_use]
    pub const fn reason(self) -> Option<Reason> {
        Reason::from_number(((self.0 & REASON) >> REASON_SHIFT) as u8)
    }

    /// True when a packet thread has nothing to do for a packet that belongs to this slot and this
    /// port.
    #[must_use]
    pub const fn is_decided(self, port: Generation) -> bool {
        (self.0 & GENERATION) == port.get() as u64 && (self.0 & STATE) != 0
    }

    /// True while an operation of this slot is with the provider.
    #[must_use]
    pub const fn in_flight(self) -> bool {
        self.0 & IN_FLIGHT != 0
    }

    /// True when a delete was asked for while the add was pending.
    #[must_use]
    pub const fn is_cancelled(self) -> bool {
        self.has(CANCEL)
    }

    const fn with_state(self, s: SlotState) -> Self {
        Self((self.0 & !STATE) | ((s as u64) << STATE_SHIFT))
    }
    const fn clear(self, bits: u64) -> Self {
        Self(self.0 & !bits)
    }
    const fn set(self, bits: u64) -> Self {
        Self(self.0 | bits)
    }
    const fn has(self, bits: u64) -> bool {
        self.0 & bits != 0
    }
    /// Which operation this is: a completion that carries another number is late.
    const fn op(self) -> OpNumber {
        OpNumber((self.0 >> OP_SHIFT) as u16)
    }
    const fn empty(self) -> Self {
        self.with_state(SlotState::Empty).clear(IN_FLIGHT | CANCEL | REPLY_SENT | REASON)
    }
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.state())?;
        for (bit, name) in [(IN_FLIGHT, "in-flight"), (CANCEL, "cancel"), (REPLY_SENT, "sent")] {
            if self.has(bit) {
                write!(f, "+{name}")?;
            }
        }
        Ok(())
    }
}

/// Numbers the operations of one slot, so that a late completion is recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpNumber(u16);

/// What became of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The caller owns the add and must queue it.
    Won,
    /// This port's slot is decided already.
    Decided,
    /// The slot belongs to another port: look at the next one.
    Other,
}

/// What a request to delete leaves to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unwind {
    /// Nothing was installed or pending.
    Nothing,
    /// It was Rejected and is Empty now: it may be offered again.
    Reopened,
    /// The pending add will be taken back by whoever holds it.
    Cancelling,
    /// The caller must queue the delete.
    Delete,
}

/// What a finished add leaves to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterAdd {
    /// The rule is there; if the reply was seen meanwhile the provider is to be told.
    Settled,
    /// The add was cancelled while it was in flight: the slot is Deleting, queue the delete.
    Delete,
    /// The slot has moved on: this completion is of a dead operation. What it installed must go.
    Late,
}

/// The atomic word of a slot.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct SlotWord(AtomicU64);

impl SlotWord {
    /// Reads the word. One load; this is all that a packet thread does for a decided slot.
    #[must_use]
    #[inline]
    pub fn load(&self) -> Snapshot {
        Snapshot(self.0.load(Ordering::Acquire))
    }

    fn update<R>(&self, mut f: impl FnMut(Snapshot) -> (Option<Snapshot>, R)) -> R {
        let mut old = self.0.load(Ordering::Acquire);
        loop {
            let (new, result) = f(Snapshot(old));
            let Some(new) = new else { return result };
            match self.0.compare_exchange_weak(old, new.0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return result,
                Err(now) => old = now,
            }
        }
    }

    /// The same, of a slot that is this port's.
    fn update_of<R>(
        &self,
        port: Generation,
        other: R,
        mut f: impl FnMut(Snapshot) -> (Option<Snapshot>, R),
    ) -> R
    where
        R: Copy,
    {
        self.update(|s| if s.generation() == Some(port) { f(s) } else { (None, other) })
    }

    /// Claims the slot for the port: Empty (or never keyed, or of a port that is `gone`) becomes
    /// Pending for exactly one caller.
    pub fn claim(&self, port: Generation, gone: impl Fn(Generation) -> bool) -> Claim {
        let key = u64::from(port.get());
        self.update(|s| {
            match s.generation() {
                Some(other) if other != port && !gone(other) => return (None, Claim::Other),
                Some(own) if own == port && s.state() != SlotState::Empty => {
                    return (None, Claim::Decided);
                }
                _ => {}
            }
            // The operation number wraps into nothing: it is the topmost field.
            let next = Snapshot(((s.empty().0 & !GENERATION) | key).wrapping_add(OP_ONE));
            (Some(next.with_state(SlotState::Pending)), Claim::Won)
        })
    }

    /// The holder of a queued add asks to hand it to the provider. `None`: it was cancelled, the
    /// slot is Empty again.
    pub fn dispatch_add(&self, port: Generation) -> Option<OpNumber> {
        self.update_of(port, None, |s| {
            if s.state() != SlotState::Pending || s.has(IN_FLIGHT) {
                (None, None)
            } else if s.has(CANCEL) {
                (Some(s.empty()), None)
            } else {
                (Some(s.set(IN_FLIGHT)), Some(s.op()))
            }
        })
    }

    /// The add succeeded.
    pub fn added(&self, op: OpNumber) -> AfterAdd {
        self.update(|s| {
            if s.state() != SlotState::Pending || !s.has(IN_FLIGHT) || s.op() != op {
                return (None, AfterAdd::Late);
            }
            if s.has(CANCEL) {
                let next = s.with_state(SlotState::Deleting).clear(IN_FLIGHT | CANCEL);
                return (Some(next), AfterAdd::Delete);
            }
            (Some(s.with_state(SlotState::Installed).clear(IN_FLIGHT)), AfterAdd::Settled)
        })
    }

    /// The pending add was refused, before it was dispatched or by the provider. False: the slot
    /// has moved on (late), or the add was cancelled and the slot is Empty.
    pub fn refused(&self, op: OpNumber, reason: Reason) -> bool {
        self.update(|s| {
            if s.state() != SlotState::Pending || s.op() != op {
                (None, false)
            } else if s.has(CANCEL) {
                (Some(s.empty()), false)
            } else {
                let next = s.empty().with_state(SlotState::Rejected);
                (Some(next.set((reason as u64) << REASON_SHIFT)), true)
            }
        })
    }

    /// A queue was full: the caller of a won claim takes it back.
    pub fn unclaim(&self, port: Generation) {
        self.update_of(port, (), |s| {
            let queued = s.state() == SlotState::Pending && !s.has(IN_FLIGHT);
            (queued.then(|| s.empty()), ())
        });
    }

    /// A delete is wanted: by the connection's end, a flush, or a change of the path.
    pub fn unwind(&self, port: Generation) -> Unwind {
        self.update_of(port, Unwind::Nothing, |s| match s.state() {
            SlotState::Empty | SlotState::Deleting => (None, Unwind::Nothing),
            SlotState::Rejected => (Some(s.empty()), Unwind::Reopened),
            SlotState::Pending => (Some(s.set(CANCEL)), Unwind::Cancelling),
            // The provider is being told of the reply: the delete follows.
            SlotState::Installed if s.has(IN_FLIGHT) => (Some(s.set(CANCEL)), Unwind::Cancelling),
            SlotState::Installed => (Some(s.with_state(SlotState::Deleting)), Unwind::Delete),
        })
    }

    /// The holder of a queued delete hands it to the provider. `None`: the slot has moved on.
    pub fn dispatch_delete(&self, port: Generation) -> Option<OpNumber> {
        self.update_of(port, None, |s| {
            if s.state() != SlotState::Deleting || s.has(IN_FLIGHT) {
                (None, None)
            } else {
                (Some(s.set(IN_FLIGHT)), Some(s.op()))
            }
        })
    }

    /// The provider could not carry out the delete: it is queued again.
    pub fn delete_failed(&self, op: OpNumber) -> bool {
        self.update(|s| {
            let ok = s.state() == SlotState::Deleting && s.has(IN_FLIGHT) && s.op() == op;
            (ok.then(|| s.clear(IN_FLIGHT)), ok)
        })
    }

    /// The delete was acknowledged: the slot is Empty. False: the slot has moved on.
    pub fn deleted(&self, op: OpNumber) -> bool {
        self.update(|s| {
            let ok = s.state() == SlotState::Deleting && s.has(IN_FLIGHT) && s.op() == op;
            (ok.then(|| s.empty()), ok)
        })
    }

    /// The delete was acknowledged, and the slot is not to be offered again for now: Rejected. False:
    /// the slot has moved on.
    pub fn deleted_because(&self, op: OpNumber, reason: Reason) -> bool {
        self.update(|s| {
            let ok = s.state() == SlotState::Deleting && s.has(IN_FLIGHT) && s.op() == op;
            let next = s.empty().with_state(SlotState::Rejected);
            (ok.then(|| next.set((reason as u64) << REASON_SHIFT)), ok)
        })
    }

    /// A rejected slot may be tried again. True when it was Rejected and is Empty now.
    pub fn retry(&self, port: Generation) -> bool {
        self.update_of(port, false, |s| {
            let ok = s.state() == SlotState::Rejected;
            (ok.then(|| s.empty()), ok)
        })
    }

    /// The backend has lost everything of this port (flush, release): whatever the state, the slot
    /// is Empty, and completions still to come are late. Returns the state before; none when the slot
    /// is another port's by now.
    pub fn reset(&self, port: Generation) -> Option<SlotState> {
        self.update_of(port, None, |s| {
            let before = s.state();
            ((before != SlotState::Empty).then(|| s.empty()), Some(before))
        })
    }

    /// The holder of a queued message about the reply hands it to the provider. `None`: the slot
    /// has moved on.
    pub fn dispatch_established(&self, port: Generation) -> Option<OpNumber> {
        self.update_of(port, None, |s| {
            if s.state() != SlotState::Installed || s.has(IN_FLIGHT) {
                (None, None)
            } else {
                (Some(s.set(IN_FLIGHT)), Some(s.op()))
            }
        })
    }

    /// The provider has been told. True: a delete was asked for meanwhile, the slot is Deleting,
    /// queue the delete.
    pub fn established(&self, op: OpNumber) -> bool {
        self.update(|s| {
            if s.state() != SlotState::Installed || !s.has(IN_FLIGHT) || s.op() != op {
                (None, false)
            } else if s.has(CANCEL) {
                let next = s.with_state(SlotState::Deleting).clear(IN_FLIGHT | CANCEL);
                (Some(next), true)
            } else {
                (Some(s.clear(IN_FLIGHT)), false)
            }
        })
    }

    /// A reply was seen. True when the provider must be told now: the slot is Installed and it was
    /// not told before. That it was seen is the connection's to remember.
    pub fn reply_seen(&self, port: Generation) -> bool {
        self.update_of(port, false, |s| {
            let tell = s.state() == SlotState::Installed && !s.has(REPLY_SENT);
            (tell.then(|| s.set(REPLY_SENT)), tell)
        })
    }
}

#[cfg(test)]
mod transitions;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn generation(n: u32) -> Generation {
        Generation::new(n).unwrap()
    }

    /// No port is gone.
    fn nobody(_: Generation) -> bool {
        false
    }

    #[test]
    fn a_claim_is_won_once_and_keys_the_slot() {
        let s = SlotWord::default();
        assert_eq!(s.claim(generation(7), nobody), Claim::Won);
        assert_eq!(s.claim(generation(7), nobody), Claim::Decided);
        assert_eq!(s.claim(generation(8), nobody), Claim::Other);
        s.reset(generation(7));
        assert_eq!(s.claim(generation(8), nobody), Claim::Other, "keyed even when empty");
        assert_eq!(s.claim(generation(7), nobody), Claim::Won);
    }

    #[test]
    fn the_slot_of_a_port_that_is_gone_is_taken_over_in_any_state_and_no_more_its_own() {
        for installed in [false, true] {
            let s = SlotWord::default();
            s.claim(generation(7), nobody);
            let old = s.dispatch_add(generation(7)).unwrap();
            if installed {
                s.added(old);
            }
            assert_eq!(s.claim(generation(9), |g| g == generation(7)), Claim::Won);
            assert_eq!(s.claim(generation(9), |g| g == generation(7)), Claim::Decided);
            assert_eq!(s.claim(generation(7), nobody), Claim::Other);
            assert_eq!(s.added(old), AfterAdd::Late);
            assert_eq!(s.unwind(generation(7)), Unwind::Nothing);
            assert_eq!(s.reset(generation(7)), None);
            assert_eq!(s.dispatch_add(generation(7)), None);
            s.unclaim(generation(7));
            assert!(!s.retry(generation(7)) && !s.reply_seen(generation(7)));
            let op = s.dispatch_add(generation(9)).unwrap();
            assert_eq!(s.added(op), AfterAdd::Settled);
        }
    }

    #[test]
    fn a_delete_before_dispatch_cancels_the_add() {
        let s = SlotWord::default();
        s.claim(generation(1), nobody);
        assert_eq!(s.unwind(generation(1)), Unwind::Cancelling);
        assert_eq!(s.dispatch_add(generation(1)), None);
        assert_eq!(s.load().state(), SlotState::Empty);
    }

    #[test]
    fn a_delete_in_flight_follows_the_add() {
        let s = SlotWord::default();
        s.claim(generation(1), nobody);
        let op = s.dispatch_add(generation(1)).unwrap();
        assert_eq!(s.unwind(generation(1)), Unwind::Cancelling);
        assert_eq!(s.added(op), AfterAdd::Delete);
        assert_eq!(s.load().state(), SlotState::Deleting);
        let op = s.dispatch_delete(generation(1)).unwrap();
        assert!(s.delete_failed(op));
        let op = s.dispatch_delete(generation(1)).unwrap();
        assert!(s.deleted(op));
        assert_eq!(s.load().state(), SlotState::Empty);
    }

    #[test]
    fn a_completion_of_an_older_operation_is_late() {
        let s = SlotWord::default();
        s.claim(generation(1), nobody);
        let old = s.dispatch_add(generation(1)).unwrap();
        s.reset(generation(1));
        assert_eq!(s.added(old), AfterAdd::Late);
        s.claim(generation(1), nobody);
        let new = s.dispatch_add(generation(1)).unwrap();
        assert_eq!(s.added(old), AfterAdd::Late);
        assert!(!s.refused(old, Reason::Busy));
        assert_eq!(s.added(new), AfterAdd::Settled);
    }

    #[test]
    fn a_reply_is_told_at_most_once_and_only_after_installation() {
        let s = SlotWord::default();
        for _ in 0..2 {
            s.claim(generation(1), nobody);
            assert!(!s.reply_seen(generation(1)), "nothing is installed");
            let op = s.dispatch_add(generation(1)).unwrap();
            assert_eq!(s.added(op), AfterAdd::Settled);
            assert!(s.reply_seen(generation(1)));
            assert!(!s.reply_seen(generation(1)));
            s.reset(generation(1));
        }
    }

    #[test]
    fn a_delete_waits_for_the_message_about_the_reply() {
        let s = SlotWord::default();
        s.claim(generation(1), nobody);
        let op = s.dispatch_add(generation(1)).unwrap();
        assert_eq!(s.added(op), AfterAdd::Settled);
        assert!(s.reply_seen(generation(1)));
        let op = s.dispatch_established(generation(1)).unwrap();
        assert_eq!(s.unwind(generation(1)), Unwind::Cancelling);
        assert_eq!(s.dispatch_delete(generation(1)), None);
        assert!(s.established(op));
        assert!(s.dispatch_delete(generation(1)).is_some());
    }

    #[test]
    fn a_rejection_keeps_its_reason_until_the_retry() {
        let s = SlotWord::default();
        s.claim(generation(1), nobody);
        let op = s.dispatch_add(generation(1)).unwrap();
        assert!(s.refused(op, Reason::TableFull));
        assert_eq!(s.load().reason(), Some(Reason::TableFull));
        assert!(s.load().is_decided(generation(1)));
        assert!(s.retry(generation(1)));
        assert!(!s.load().is_decided(generation(1)));
        assert_eq!(s.load().reason(), None);
    }

    proptest! {
        /// Whatever happens in whatever order: one operation in flight at most, and a slot is never
        /// emptied behind an installed rule without a delete having been asked for.
        #[test]
        fn no_order_of_events_loses_a_rule(events in proptest::collection::vec(0u8..8, 0..64)) {
            let s = SlotWord::default();
            let (mut ops, mut rules, mut deletes) = (Vec::new(), 0i32, 0i32);
            for e in events {
                match e {
                    0 => { s.claim(generation(1), nobody); }
                    1 => if let Some(op) = s.dispatch_add(generation(1)) {
                        prop_assert!(ops.is_empty(), "two adds in flight");
                        ops.push(op);
                    },
                    2 => if let Some(op) = ops.pop() {
                        rules += 1;
                        match s.added(op) {
                            AfterAdd::Delete | AfterAdd::Late => deletes += 1,
                            AfterAdd::Settled => {}
                        }
                    },
                    3 => if let Some(op) = ops.pop() { s.refused(op, Reason::Busy); },
                    4 => if s.unwind(generation(1)) == Unwind::Delete { deletes += 1; },
                    5 => if let Some(op) = s.dispatch_delete(generation(1)) {
                        prop_assert!(deletes == 1 && s.deleted(op));
                        deletes -= 1;
                        rules -= 1;
                    },
                    6 => { s.retry(generation(1)); }
                    _ => { s.reply_seen(generation(1)); }
                }
                let state = s.load().state();
                prop_assert_eq!(rules, i32::from(matches!(state, SlotState::Installed | SlotState::Deleting)));
                prop_assert_eq!(deletes, i32::from(state == SlotState::Deleting));
                prop_assert!(ops.is_empty() || (s.load().in_flight() && state == SlotState::Pending));
            }
        }
    }
}
