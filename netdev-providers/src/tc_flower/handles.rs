//! Handles of the rules of one prio: which are taken, how many, and which lane writes their rules.
//!
//! A handle is given back only when the kernel has acknowledged the delete, and comes round again
//! last, so that a report of an old dump is not taken for a new rule's.

use std::collections::VecDeque;
use std::num::NonZeroU32;

use super::uapi::Handle;
use crate::contract::types::Cookie;

/// The highest handle that can be taken over. Handles are given from 1 on: an engine that died with
/// a higher one had more rules than that.
pub(super) const MAX_OCCUPIED: u32 = 1 << 23;

/// One of the lanes that a port's rules are written through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LaneNumber(u8);

/// More lanes than this are of no use to anybody.
pub(super) const MAX_LANES: usize = 64;

impl LaneNumber {
    /// The lane, of so many, of whatever has this hash.
    #[expect(clippy::cast_possible_truncation, reason = "below MAX_LANES")]
    pub(super) fn of_hash(hash: u64, lanes: usize) -> Self {
        Self((hash % lanes.clamp(1, MAX_LANES) as u64) as u8)
    }

    pub(super) fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// The cookie of a rule, but for the instance, which is this provider's: it comes to a word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Owner(u64);

impl Owner {
    /// Epochs begin at 1.
    const NOBODY: Self = Self(0);

    const fn of(cookie: Cookie) -> Self {
        Self(cookie.epoch.0 << 1 | cookie.direction as u64)
    }
}

/// The handles of one prio.
#[derive(Debug, Default)]
pub(super) struct Handles {
    /// Whether handle `index + 1` is taken, 64 to a word.
    taken: Vec<u64>,
    /// The lane of the rule that has, or had, handle `index + 1`.
    lanes: Vec<LaneNumber>,
    /// How many have ever been in use: handles 1 to `used`.
    used: u32,
    free: VecDeque<u32>,
    /// Whose rule has handle `index + 1`; nobody's in particular until it is given to one.
    owners: Vec<Owner>,
    live: u32,
}

impl Handles {
    /// A handle that is not in use, for a rule of this lane. `None` after 2^32 - 2 of them.
    pub(super) fn take(&mut self, lane: LaneNumber) -> Option<Handle> {
        let index = match self.free.pop_front() {
            Some(index) => index,
            None => {
                let index = self.used;
                self.used = index.checked_add(1).filter(|&u| u < u32::MAX)?;
                if (index as usize) / 64 == self.taken.len() {
                    self.taken.push(0);
                }
                self.lanes.push(lane);
                index
            }
        };
        *self.lanes.get_mut(index as usize)? = lane;
        *self.word(index)? |= Self::bit(index);
        self.live += 1;
        NonZeroU32::new(index + 1).map(Handle)
    }

    /// Takes this handle, which somebody gave to a rule that stands. False when it is taken already,
    /// or beyond [`MAX_OCCUPIED`].
    pub(super) fn occupy(&mut self, handle: Handle) -> bool {
        let index = handle.0.get() - 1;
        if index >= MAX_OCCUPIED || self.is_taken(handle) {
            return false;
        }
        if index < self.used {
            self.free.retain(|&f| f != index);
        } else {
            self.free.extend(self.used..index);
            self.used = index + 1;
            self.taken.resize((index as usize) / 64 + 1, 0);
            self.lanes.resize(index as usize + 1, LaneNumber::default());
        }
        if let Some(word) = self.word(index) {
            *word |= Self::bit(index);
            self.live += 1;
        }
        true
    }

    /// The rule with this handle has this cookie.
    pub(super) fn give_to(&mut self, handle: Handle, cookie: Cookie) {
        let index = handle.0.get() as usize - 1;
        if index < self.used as usize {
            if self.owners.len() <= index {
                self.owners.resize(index + 1, Owner::NOBODY);
            }
            if let Some(owner) = self.owners.get_mut(index) {
                *owner = Owner::of(cookie);
            }
        }
    }

    /// Whether the handle is in use for the rule of this cookie, or for one of which that is not known.
    pub(super) fn is_of(&self, handle: Handle, cookie: Cookie) -> bool {
        let owner = self.owners.get(handle.0.get() as usize - 1).copied().unwrap_or_default();
        self.is_taken(handle) && (owner == Owner::NOBODY || owner == Owner::of(cookie))
    }

    /// Whether the handle is in use.
    pub(super) fn is_taken(&self, handle: Handle) -> bool {
        let index = handle.0.get() - 1;
        self.taken.get((index as usize) / 64).is_some_and(|word| word & Self::bit(index) != 0)
    }

    /// The lane that the rule with this handle is written through.
    pub(super) fn lane_of(&self, handle: Handle) -> LaneNumber {
        self.lanes.get(handle.0.get() as usize - 1).copied().unwrap_or_default()
    }

    /// Says which lane a rule is written through whose handle was [occupied](Self::occupy).
    pub(super) fn assign(&mut self, handle: Handle, lane: LaneNumber) {
        if let Some(known) = self.lanes.get_mut(handle.0.get() as usize - 1) {
            *known = lane;
        }
    }

    /// Gives a handle back; one that is not in use is passed over.
    pub(super) fn give_back(&mut self, handle: Handle) {
        let index = handle.0.get() - 1;
        let bit = Self::bit(index);
        match self.word(index) {
            Some(word) if *word & bit != 0 => *word &= !bit,
            _ => return,
        }
        if let Some(owner) = self.owners.get_mut(index as usize) {
            *owner = Owner::NOBODY;
        }
        self.live -= 1;
        self.free.push_back(index);
    }

    /// Gives all back, and returns how many there were.
    pub(super) fn give_all_back(&mut self) -> u32 {
        std::mem::take(self).live
    }

    /// How many are in use.
    pub(super) const fn live(&self) -> u32 {
        self.live
    }

    fn word(&mut self, index: u32) -> Option<&mut u64> {
        self.taken.get_mut((index as usize) / 64)
    }

    const fn bit(index: u32) -> u64 {
        1 << (index % 64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    use crate::contract::types::{Direction, Epoch, Instance};

    proptest! {
        #[test]
        fn no_handle_is_given_twice(ops in proptest::collection::vec(any::<Option<u8>>(), 0..400)) {
            let mut handles = Handles::default();
            let mut mine: Vec<u32> = Vec::new();
            let mut seen = HashSet::new();
            for op in ops {
                match op {
                    None => {
                        let h = handles.take(LaneNumber::default()).unwrap().0.get();
                        prop_assert!(seen.insert(h));
                        mine.push(h);
                    }
                    Some(n) if !mine.is_empty() => {
                        let h = mine.swap_remove(usize::from(n) % mine.len());
                        seen.remove(&h);
                        let handle = Handle(NonZeroU32::new(h).unwrap());
                        handles.give_back(handle);
                        handles.give_back(handle); // twice is passed over
                    }
                    Some(_) => {}
                }
                prop_assert_eq!(handles.live() as usize, mine.len());
            }
            prop_assert_eq!(handles.give_all_back() as usize, mine.len());
            prop_assert_eq!(handles.live(), 0);
        }
    }

    proptest! {
        #[test]
        fn occupied_handles_are_not_given(occupied in proptest::collection::vec(1u32..200, 0..50), takes in 0usize..300) {
            let mut handles = Handles::default();
            let mut mine: HashSet<u32> = (0..3).map(|_| handles.take(LaneNumber::default()).unwrap().0.get()).collect();
            for h in occupied {
                let fresh = mine.insert(h);
                let handle = Handle(NonZeroU32::new(h).unwrap());
                prop_assert_eq!(handles.occupy(handle), fresh);
                prop_assert!(handles.is_taken(handle));
            }
            for _ in 0..takes {
                prop_assert!(mine.insert(handles.take(LaneNumber::default()).unwrap().0.get()));
            }
            prop_assert_eq!(handles.live() as usize, mine.len());
        }
    }

    #[test]
    fn the_lane_of_a_rule_is_remembered_with_its_handle() {
        let (first, third) = (LaneNumber::of_hash(0, 4), LaneNumber::of_hash(6, 4));
        assert_eq!((first.index(), third.index()), (0, 2));
        let mut handles = Handles::default();
        let (a, b) = (handles.take(third).unwrap(), handles.take(first).unwrap());
        assert_eq!((handles.lane_of(a), handles.lane_of(b)), (third, first));
        // The handle comes round again, for a rule of another lane.
        handles.give_back(a);
        let c = handles.take(first).unwrap();
        assert_eq!((c, handles.lane_of(c)), (a, first));
        let far = Handle(NonZeroU32::new(100).unwrap());
        assert!(handles.occupy(far));
        assert_eq!(handles.lane_of(far), first);
        handles.assign(far, third);
        assert_eq!(handles.lane_of(far), third);
        assert_eq!(handles.lane_of(Handle(NonZeroU32::MAX)), first);
    }

    #[test]
    fn a_handle_is_of_whom_it_was_given_to_last() {
        let cookie = |n, direction| Cookie {
            instance: Instance(NonZeroU32::MIN),
            epoch: Epoch(n),
            direction,
        };
        let (a, b) = (cookie(1, Direction::Original), cookie(1, Direction::Reply));
        let mut handles = Handles::default();
        let h = handles.take(LaneNumber::default()).unwrap();
        assert!(handles.is_of(h, a) && handles.is_of(h, b), "a dead engine's may be anybody's");
        handles.give_to(h, a);
        assert!(handles.is_of(h, a) && !handles.is_of(h, b));
        handles.give_back(h);
        assert!(!handles.is_of(h, a), "the rule is gone");
        assert_eq!(handles.take(LaneNumber::default()), Some(h));
        assert!(handles.is_of(h, b), "whose it is will be known");
        handles.give_to(h, b);
        assert!(!handles.is_of(h, a) && handles.is_of(h, b));
    }

    #[test]
    fn an_unknown_handle_is_passed_over() {
        let mut handles = Handles::default();
        handles.give_back(Handle(NonZeroU32::MAX));
        assert_eq!(handles.live(), 0);
        let cookie = |n| Cookie {
            instance: Instance(NonZeroU32::MIN),
            epoch: Epoch(n),
            direction: Direction::Original,
        };
        let next = Handle(NonZeroU32::MIN);
        handles.give_to(next, cookie(1));
        assert_eq!(handles.take(LaneNumber::default()), Some(next));
        assert!(handles.is_of(next, cookie(2)), "it was nobody's then");
    }

    /// 64 of them to a word, whichever way they were taken.
    #[test]
    fn handles_take_a_bit_each() {
        let handle = |n| Handle(NonZeroU32::new(n).unwrap());
        let mut occupied = Handles::default();
        for (n, words) in [(1, 1), (64, 1), (65, 2), (200, 4)] {
            assert!(occupied.occupy(handle(n)));
            assert_eq!((occupied.taken.len(), occupied.lanes.len()), (words, n as usize));
        }
        let mut taken = Handles::default();
        (0..129).for_each(|_| assert!(taken.take(LaneNumber::default()).is_some()));
        assert_eq!((taken.taken.len(), taken.lanes.len(), taken.live()), (3, 129, 129));
        assert!(taken.is_taken(handle(129)) && !taken.is_taken(handle(130)));
        assert!(!occupied.occupy(handle(MAX_OCCUPIED + 1)), "an engine that had so many rules");
        assert!(!occupied.is_taken(handle(MAX_OCCUPIED + 1)));
    }
}
