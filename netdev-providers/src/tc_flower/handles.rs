//! Handles of the rules of one prio: which are taken, and how many.
//!
//! A handle is given back only when the kernel has acknowledged the delete, and comes round again
//! last, so that a report of an old dump is not taken for a new rule's.

use std::collections::VecDeque;
use std::num::NonZeroU32;

use super::uapi::Handle;

/// The highest handle that can be taken over. Handles are given from 1 on: an engine that died with
/// a higher one had more rules than that.
pub(super) const MAX_OCCUPIED: u32 = 1 << 23;

/// The handles of one prio.
#[derive(Debug, Default)]
pub(super) struct Handles {
    /// Whether handle `index + 1` is taken, 64 to a word.
    taken: Vec<u64>,
    /// How many have ever been in use: handles 1 to `used`.
    used: u32,
    free: VecDeque<u32>,
    live: u32,
}

impl Handles {
    /// A handle that is not in use. `None` after 2^32 - 2 of them.
    pub(super) fn take(&mut self) -> Option<Handle> {
        let index = match self.free.pop_front() {
            Some(index) => index,
            None => {
                let index = self.used;
                self.used = index.checked_add(1).filter(|&u| u < u32::MAX)?;
                if (index as usize) / 64 == self.taken.len() {
                    self.taken.push(0);
                }
                index
            }
        };
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
        }
        if let Some(word) = self.word(index) {
            *word |= Self::bit(index);
            self.live += 1;
        }
        true
    }

    /// Whether the handle is in use.
    pub(super) fn is_taken(&self, handle: Handle) -> bool {
        let index = handle.0.get() - 1;
        self.taken.get((index as usize) / 64).is_some_and(|word| word & Self::bit(index) != 0)
    }

    /// Gives a handle back; one that is not in use is passed over.
    pub(super) fn give_back(&mut self, handle: Handle) {
        let index = handle.0.get() - 1;
        let bit = Self::bit(index);
        match self.word(index) {
            Some(word) if *word & bit != 0 => *word &= !bit,
            _ => return,
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

    proptest! {
        #[test]
        fn no_handle_is_given_twice(ops in proptest::collection::vec(any::<Option<u8>>(), 0..400)) {
            let mut handles = Handles::default();
            let mut mine: Vec<u32> = Vec::new();
            let mut seen = HashSet::new();
            for op in ops {
                match op {
                    None => {
                        let h = handles.take().unwrap().0.get();
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
            let mut mine: HashSet<u32> = (0..3).map(|_| handles.take().unwrap().0.get()).collect();
            for h in occupied {
                let fresh = mine.insert(h);
                let handle = Handle(NonZeroU32::new(h).unwrap());
                prop_assert_eq!(handles.occupy(handle), fresh);
                prop_assert!(handles.is_taken(handle));
            }
            for _ in 0..takes {
                prop_assert!(mine.insert(handles.take().unwrap().0.get()));
            }
            prop_assert_eq!(handles.live() as usize, mine.len());
        }
    }

    #[test]
    fn an_unknown_handle_is_passed_over() {
        let mut handles = Handles::default();
        handles.give_back(Handle(NonZeroU32::MAX));
        assert_eq!(handles.live(), 0);
    }
}
