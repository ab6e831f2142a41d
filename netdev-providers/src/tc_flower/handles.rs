//! Handles of the rules of one prio: which are taken, and how many.
//!
//! A handle is given back only when the kernel has acknowledged the delete, and comes round again
//! last, so that a report of an old dump is not taken for a new rule's.

use std::collections::VecDeque;
use std::num::NonZeroU32;

use super::uapi::Handle;

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

    #[test]
    fn an_unknown_handle_is_passed_over() {
        let mut handles = Handles::default();
        handles.give_back(Handle(NonZeroU32::MAX));
        assert_eq!(handles.live(), 0);
    }
}
