//! Numbers that rules tell apart by some of their bits (`value/mask`), and the few of them that stand for all.
//!
//! Rules are looked at one after the other, and the first that fits decides; so two numbers have the same answer when
//! the same rules fit them. Of several rules with masks any may fit together with any other (`fwmark 1/1` and
//! `fwmark 2/2`: 3 fits both), so that to ask for what each of them names is not to ask for all.

use std::collections::{BTreeSet, HashSet};

/// What a rule tells from the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Masked {
    value: u32,
    mask: u32,
}

impl Masked {
    /// `None`: a mask without bits tells nothing apart.
    #[must_use]
    pub const fn new(value: u32, mask: u32) -> Option<Self> {
        if mask == 0 { None } else { Some(Self { value: value & mask, mask }) }
    }

    const fn fits(self, part: u32, bits: u32) -> bool {
        self.mask & bits == 0 || self.value & bits == part
    }
}

/// One number for every choice of rules that fit it, 0 the first. `None`: they are more than `at_most`.
#[must_use]
pub fn representatives(named: &BTreeSet<Masked>, at_most: usize) -> Option<Vec<u32>> {
    let mut some = vec![(0, vec![true; named.len()])];
    for bits in parts(named) {
        let mut met = HashSet::new();
        let mut more = Vec::new();
        for part in values(named, bits) {
            for (number, fit) in &some {
                let fits = named.iter().zip(fit).map(|(m, fit)| *fit && m.fits(part, bits));
                let fits: Vec<_> = fits.collect();
                if met.insert(fits.clone()) {
                    more.push((number | part, fits));
                }
                // The rest of the bits can make some of them the same again, but not so many.
                if more.len() > at_most.saturating_mul(8) {
                    return None;
                }
            }
        }
        some = more;
    }
    let numbers: Vec<_> = some.into_iter().map(|(number, _)| number).collect();
    (numbers.len() <= at_most).then_some(numbers)
}

/// The bits that masks are made of: each mask has all of such a part, or nothing of it.
fn parts(named: &BTreeSet<Masked>) -> Vec<u32> {
    let mut parts = vec![u32::MAX];
    for m in named {
        parts = parts.into_iter().flat_map(|p| [p & m.mask, p & !m.mask]).collect();
        parts.retain(|p| *p != 0);
    }
    parts.retain(|p| named.iter().any(|m| m.mask & p != 0));
    parts
}

/// What these bits can be, as far as rules tell: 0, each value that one names, and one that none does.
fn values(named: &BTreeSet<Masked>, bits: u32) -> Vec<u32> {
    let told: BTreeSet<u32> =
        named.iter().filter(|m| m.mask & bits != 0).map(|m| m.value & bits).collect();
    // All that the bits can be, in order.
    let mut all = std::iter::successors(Some(0), |n: &u32| {
        Some(n.wrapping_sub(bits) & bits).filter(|next| *next != 0)
    });
    let other = all.find(|n| !told.contains(n));
    let others = told.iter().copied().chain(other).filter(|n| *n != 0);
    std::iter::once(0).chain(others).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(named: &[(u32, u32)]) -> BTreeSet<Masked> {
        named.iter().filter_map(|&(value, mask)| Masked::new(value, mask)).collect()
    }

    fn of(named: &[(u32, u32)]) -> Option<Vec<u32>> {
        representatives(&set(named), 64)
    }

    #[test]
    fn without_masks_each_value_stands_for_itself() {
        assert_eq!(of(&[]), Some(vec![0]));
        assert_eq!(of(&[(7, u32::MAX), (9, u32::MAX)]), Some(vec![0, 7, 9]));
        assert_eq!(of(&[(5, 0)]), Some(vec![0]), "it tells nothing apart");
        // What only 0 has: one that is not 0 stands for the others.
        assert_eq!(of(&[(0, 0xff)]), Some(vec![0, 1]));
        assert_eq!(
            of(&[(0x107, 0xff)]),
            Some(vec![0, 7]),
            "what the mask leaves out does not count"
        );
    }

    #[test]
    fn bits_that_rules_name_are_combined() {
        let mut two = of(&[(1, 1), (2, 2)]).unwrap();
        assert_eq!(two[0], 0);
        two.sort_unstable();
        assert_eq!(two, [0, 1, 2, 3]);
        // Fields: two values of one and one of the other.
        let mut fields = of(&[(0x100, 0x300), (0x200, 0x300), (0x8000, 0x8000)]).unwrap();
        fields.sort_unstable();
        assert_eq!(fields, [0, 0x100, 0x200, 0x8000, 0x8100, 0x8200]);
        // A value that is told apart whole, beside a bit: with the bit, without, and neither.
        let mut beside = of(&[(7, u32::MAX), (1, 1)]).unwrap();
        beside.sort_unstable();
        assert_eq!(beside, [0, 1, 7]);
    }

    #[test]
    fn more_than_can_be_asked_for_are_none() {
        let bits = |n: u32| (0..n).map(|b| (1 << b, 1 << b)).collect::<Vec<_>>();
        assert_eq!(of(&bits(6)).map(|all| all.len()), Some(64));
        assert_eq!(of(&bits(7)), None);
        assert_eq!(of(&bits(32)), None, "and that is found out at once");
        let many: Vec<_> = (1..=64).map(|n| (n, u32::MAX)).collect();
        assert_eq!(of(&many[..63]).map(|all| all.len()), Some(64));
        assert_eq!(of(&many), None);
    }

    proptest! {
        #[test]
        fn every_choice_of_rules_that_some_number_fits_has_one_number(
            named in proptest::collection::vec((0u32..256, 0u32..256), 0..6)
        ) {
            let named = set(&named);
            let fits = |number: u32| -> Vec<bool> {
                named.iter().map(|m| (number ^ m.value) & m.mask == 0).collect()
            };
            let all: HashSet<_> = (0..256).map(fits).collect();
            let some = representatives(&named, 256).unwrap();
            prop_assert_eq!(some[0], 0);
            prop_assert_eq!(some.len(), all.len());
            let met: HashSet<_> = some.into_iter().map(fits).collect();
            prop_assert_eq!(met, all);
        }
    }
}
