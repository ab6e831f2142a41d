//! The ports at one moment.

use std::collections::HashMap;
use std::sync::Arc;

use netdev_providers::{Generation, Ifindex};

use super::port::Port;

/// Where the port of an ifindex is, in a table of its own that workers look into for every batch: one cache
/// line, most often, however many ports there are.
#[derive(Clone, Debug)]
struct ByIfindex(
    /// Ifindex (0: none) in the lower half, place in the upper one; at least half of them are empty, and there
    /// are 2^n, from 2 on.
    Box<[u64]>,
);

impl ByIfindex {
    fn new(ifindexes: impl ExactSizeIterator<Item = Ifindex>) -> Self {
        let len = (2 * ifindexes.len()).next_power_of_two().max(2);
        let mut table = Self(vec![0; len].into());
        for (ifindex, place) in ifindexes.zip(0u64..) {
            let mut at = table.first(ifindex.get());
            while table.0[at] != 0 {
                at = (at + 1) % len;
            }
            table.0[at] = place << 32 | u64::from(ifindex.get());
        }
        table
    }

    /// Where the search begins. (Netdevs have numbers in a row: they are spread by the golden ratio.)
    #[inline]
    fn first(&self, ifindex: u32) -> usize {
        let shift = u32::BITS - self.0.len().trailing_zeros();
        (ifindex.wrapping_mul(0x9e37_79b9) >> (shift % u32::BITS)) as usize
    }

    #[inline]
    fn get(&self, ifindex: Ifindex) -> Option<usize> {
        let (ifindex, mask) = (ifindex.get(), self.0.len() - 1);
        let mut at = self.first(ifindex);
        loop {
            let entry = *self.0.get(at)?;
            #[expect(clippy::cast_possible_truncation, reason = "the lower half, the upper half")]
            let (there, place) = (entry as u32, (entry >> 32) as usize);
            if there == ifindex {
                return Some(place);
            }
            if there == 0 {
                return None;
            }
            at = (at + 1) & mask;
        }
    }
}

impl Default for ByIfindex {
    fn default() -> Self {
        Self::new([].into_iter())
    }
}

/// The ports, as workers see them. Never changed: a change makes a new table.
#[derive(Clone, Debug, Default)]
pub(super) struct PortTable {
    /// Sorted by ifindex.
    ports: Vec<Arc<Port>>,
    by_ifindex: ByIfindex,
    /// Where each of them is.
    generations: HashMap<Generation, usize, ahash::RandomState>,
}

impl PortTable {
    fn new(ports: Vec<Arc<Port>>) -> Self {
        let by_ifindex = ByIfindex::new(ports.iter().map(|p| p.ifindex()));
        let generations = ports.iter().enumerate().map(|(at, p)| (p.generation(), at)).collect();
        Self { ports, by_ifindex, generations }
    }

    pub(super) fn get(&self, ifindex: Ifindex) -> Option<&Arc<Port>> {
        self.ports.get(self.by_ifindex.get(ifindex)?)
    }

    pub(super) fn by_generation(&self, generation: Generation) -> Option<&Arc<Port>> {
        self.ports.get(*self.generations.get(&generation)?)
    }

    pub(super) fn iter(&self) -> std::slice::Iter<'_, Arc<Port>> {
        self.ports.iter()
    }

    pub(super) fn with(&self, port: Arc<Port>) -> Self {
        let mut ports = self.ports.clone();
        let at = ports.partition_point(|p| p.ifindex() < port.ifindex());
        ports.insert(at, port);
        Self::new(ports)
    }

    pub(super) fn without(&self, generation: Generation) -> Self {
        Self::new(self.ports.iter().filter(|p| p.generation() != generation).cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn each_port_is_found_and_no_other(numbers in proptest::collection::btree_set(prop_oneof![1u32..200, 1u32..1 << 31], 0..300), other in 1u32..1 << 31) {
            let ifindexes: Vec<_> = numbers.iter().map(|n| Ifindex::new(*n).unwrap()).collect();
            let table = ByIfindex::new(ifindexes.iter().copied());
            for (place, ifindex) in ifindexes.iter().enumerate() {
                prop_assert_eq!(table.get(*ifindex), Some(place));
            }
            prop_assert_eq!(table.get(Ifindex::new(other).unwrap()).is_some(), numbers.contains(&other));
        }
    }
}
