//! What a port holds: its slots, and where their rules lead.

use std::collections::HashMap;

use netdev_providers::{Direction, Generation, Ifindex};

use super::conn::{ConnHandle, Slot, warm};

/// The slots of a port that are not empty, by where their rules lead: so that a flush of the port costs what
/// the port holds and nothing else, and the rules that forward into a given netdev are found without a
/// search.
///
/// Each slot keeps its place in its list ([`Slot::place`]), which this port's lock guards; that it has one, its
/// detail says. A slot can be taken over by another port while an old one, whose provider never came back,
/// still lists it: so a place is taken for a hint, and what is removed is looked at first.
#[derive(Debug)]
pub(super) struct Held {
    /// The life of the port that this belongs to.
    generation: Generation,
    lists: HashMap<Where, List, ahash::RandomState>,
    len: usize,
}

/// Which list: there is one for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Where {
    /// `None`: it leads nowhere (yet).
    egress: Option<Ifindex>,
    direction: Direction,
}

/// Handles in chunks, so that many of them grow by one chunk, and are read one chunk at a time.
#[derive(Debug, Default)]
struct List {
    /// All but the last are full.
    chunks: Vec<Vec<ConnHandle>>,
}

/// How many handles make a chunk: 4 kB, and copied in some microseconds.
const CHUNK: usize = 512;

impl List {
    fn len(&self) -> usize {
        self.chunks.last().map_or(0, |last| (self.chunks.len() - 1) * CHUNK + last.len())
    }

    fn get(&self, place: usize) -> Option<&ConnHandle> {
        self.chunks.get(place / CHUNK)?.get(place % CHUNK)
    }

    fn push(&mut self, conn: ConnHandle) {
        match self.chunks.last_mut() {
            Some(last) if last.len() < CHUNK => last.push(conn),
            first => {
                // Small lists stay small.
                let room = if first.is_some() { CHUNK } else { 4 };
                let mut chunk = Vec::with_capacity(room);
                chunk.push(conn);
                self.chunks.push(chunk);
            }
        }
    }

    /// Takes the one at this place, which the last one gets. `None`: there is none there.
    fn swap_remove(&mut self, place: usize) -> Option<ConnHandle> {
        self.get(place)?;
        let last = self.chunks.last_mut()?.pop()?;
        if self.chunks.last().is_some_and(Vec::is_empty) {
            self.chunks.pop();
        }
        match self.chunks.get_mut(place / CHUNK).and_then(|chunk| chunk.get_mut(place % CHUNK)) {
            Some(at) => Some(std::mem::replace(at, last)),
            // It was the last one itself.
            None => Some(last),
        }
    }

    fn iter(&self) -> impl Iterator<Item = &ConnHandle> {
        self.chunks.iter().flatten()
    }
}

/// Where somebody is who goes through all that a port holds, a part at a time.
///
/// What stays where it is is not missed, whatever comes and goes between two parts: each list is gone through
/// from its end, so that what takes the place of something that went has been seen. It may be seen twice.
#[derive(Debug)]
pub(super) struct Walk {
    /// The lists that are left, the next one last.
    lists: Vec<(Where, usize)>,
}

impl Held {
    pub(super) fn new(generation: Generation) -> Self {
        Self { generation, lists: HashMap::default(), len: 0 }
    }

    /// A slot is not empty any more. It leads nowhere yet.
    pub(super) fn insert(&mut self, conn: &ConnHandle, slot: Slot<'_>, direction: Direction) {
        self.insert_at(Where { egress: None, direction }, conn, slot);
    }

    fn insert_at(&mut self, at: Where, conn: &ConnHandle, slot: Slot<'_>) {
        let list = self.lists.entry(at).or_default();
        slot.place.set(list.len());
        list.push(conn.clone());
        self.len += 1;
    }

    /// The rule of a slot leads elsewhere than before.
    pub(super) fn lead(
        &mut self,
        conn: &ConnHandle,
        slot: Slot<'_>,
        direction: Direction,
        [from, to]: [Option<Ifindex>; 2],
    ) {
        if from != to && self.remove(conn, slot, direction, from) {
            self.insert_at(Where { egress: to, direction }, conn, slot);
        }
    }

    /// A slot whose rule led there is empty. False: all were taken meanwhile.
    pub(super) fn remove(
        &mut self,
        conn: &ConnHandle,
        slot: Slot<'_>,
        direction: Direction,
        egress: Option<Ifindex>,
    ) -> bool {
        let at = Where { egress, direction };
        let Some(list) = self.lists.get_mut(&at) else { return false };
        let place = slot.place.get();
        let is_here = |c: &ConnHandle| c.is_same(conn);
        let place = if list.get(place).is_some_and(is_here) {
            place
        } else if let Some(place) = list.iter().position(is_here) {
            place
        } else {
            return false;
        };
        list.swap_remove(place);
        self.len -= 1;
        if let Some(moved) = list.get(place)
            && let Some(moved) = moved.slot(self.generation, direction)
        {
            moved.place.set(place);
        }
        // That of those that lead nowhere is of use again at once.
        if list.len() == 0 && egress.is_some() {
            self.lists.remove(&at);
        }
        true
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes all, and the memory with it.
    pub(super) fn take_all(&mut self) -> Vec<(ConnHandle, Direction)> {
        let mut all = Vec::with_capacity(std::mem::take(&mut self.len));
        for (at, list) in std::mem::take(&mut self.lists) {
            all.extend(list.chunks.into_iter().flatten().map(|conn| (conn, at.direction)));
        }
        all
    }

    /// Begins to go through all that is held now.
    pub(super) fn walk(&self) -> Walk {
        let mut lists: Vec<_> = self.lists.iter().map(|(at, list)| (*at, list.len())).collect();
        // Those that lead nowhere come last: a slot goes from there to one that leads somewhere.
        lists.sort_unstable_by_key(|(at, _)| at.egress.is_some());
        Walk { lists }
    }

    /// The next part, of a chunk at most; `None` when all have been seen.
    pub(super) fn next_part(&self, walk: &mut Walk) -> Option<Vec<(ConnHandle, Direction)>> {
        while let Some((at, left)) = walk.lists.last_mut() {
            // What was behind the end, if there is less than before, has been seen.
            let list = self.lists.get(at);
            let Some(last) = list.map_or(0, List::len).min(*left).checked_sub(1) else {
                walk.lists.pop();
                continue;
            };
            *left = last / CHUNK * CHUNK;
            let chunk = list.and_then(|list| list.chunks.get(last / CHUNK));
            let part = chunk.map_or(&[][..], |chunk| &chunk[..=last % CHUNK]);
            warm(part);
            return Some(part.iter().map(|conn| (conn.clone(), at.direction)).collect());
        }
        None
    }

    pub(super) fn leads_to(&self, egress: Ifindex) -> bool {
        Direction::BOTH
            .iter()
            .any(|&direction| self.lists.contains_key(&Where { egress: Some(egress), direction }))
    }

    pub(super) fn towards(&self, egress: Ifindex) -> Vec<(ConnHandle, Direction)> {
        let mut towards = Vec::new();
        for direction in Direction::BOTH {
            let list = self.lists.get(&Where { egress: Some(egress), direction });
            towards.extend(list.into_iter().flat_map(List::iter).map(|c| (c.clone(), direction)));
        }
        towards
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::engine::conn::tests::conn;
    use netdev_providers::Epoch;

    fn generation(n: u32) -> Generation {
        Generation::new(n).unwrap()
    }

    /// Connections whose slots are this port's.
    fn conns(n: usize, port: Generation) -> Vec<ConnHandle> {
        let known = conn();
        (0..n as u64)
            .map(|n| {
                let conn = ConnHandle::new(known.key(), known.reply(), Epoch(n), n, 0);
                for d in Direction::BOTH {
                    conn.claim(port, d, |_| false);
                }
                conn
            })
            .collect()
    }

    fn egress(n: u8) -> Option<Ifindex> {
        Ifindex::new(u32::from(n))
    }

    /// What is held, by epoch and direction, and where it leads.
    type Expected = BTreeMap<(u64, bool), u8>;

    fn named(all: impl IntoIterator<Item = (ConnHandle, Direction)>) -> Vec<(u64, bool)> {
        let mut named: Vec<_> =
            all.into_iter().map(|(c, d)| (c.epoch().0, d == Direction::Reply)).collect();
        named.sort_unstable();
        named.dedup();
        named
    }

    fn walked(held: &Held) -> Vec<(u64, bool)> {
        let mut walk = held.walk();
        named(std::iter::from_fn(|| held.next_part(&mut walk)).flatten())
    }

    fn check(held: &Held, expected: &Expected) -> Result<(), TestCaseError> {
        prop_assert_eq!(walked(held), expected.keys().copied().collect::<Vec<_>>());
        prop_assert_eq!(held.is_empty(), expected.is_empty());
        for n in 1..4 {
            let to = egress(n).unwrap();
            let towards: Vec<_> =
                expected.iter().filter(|(_, e)| **e == n).map(|(slot, _)| *slot).collect();
            prop_assert_eq!(held.leads_to(to), !towards.is_empty());
            prop_assert_eq!(named(held.towards(to)), towards);
        }
        Ok(())
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Lead(usize, bool, u8),
        Remove(usize, bool),
        TakeAll,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            20 => (0usize..8, any::<bool>(), 0u8..4).prop_map(|(n, r, e)| Step::Lead(n, r, e)),
            10 => (0usize..8, any::<bool>()).prop_map(|(n, r)| Step::Remove(n, r)),
            1 => Just(Step::TakeAll),
        ]
    }

    proptest! {
        #[test]
        fn what_is_held_is_found_where_it_leads(steps in proptest::collection::vec(step(), 0..80)) {
            let port = generation(7);
            let (mut held, conns, mut expected) = (Held::new(port), conns(8, port), Expected::new());
            for step in steps {
                match step {
                    Step::Lead(n, reply, to) => {
                        let d = if reply { Direction::Reply } else { Direction::Original };
                        let slot = conns[n].slot(port, d).unwrap();
                        let from = expected.insert((n as u64, reply), to).unwrap_or_else(|| {
                            held.insert(&conns[n], slot, d);
                            0
                        });
                        held.lead(&conns[n], slot, d, [egress(from), egress(to)]);
                    }
                    Step::Remove(n, reply) => {
                        let d = if reply { Direction::Reply } else { Direction::Original };
                        if let Some(from) = expected.remove(&(n as u64, reply)) {
                            let slot = conns[n].slot(port, d).unwrap();
                            prop_assert!(held.remove(&conns[n], slot, d, egress(from)));
                        }
                    }
                    Step::TakeAll => {
                        let all: Vec<_> = expected.keys().copied().collect();
                        prop_assert_eq!(named(held.take_all()), all);
                        expected.clear();
                    }
                }
                check(&held, &expected)?;
            }
        }

        /// Whatever comes and goes between two parts.
        #[test]
        fn who_walks_misses_nothing_that_stays(goes in proptest::collection::vec((any::<bool>(), 0usize..2000), 0..200), every in 1usize..50) {
            let port = generation(7);
            let (mut held, conns) = (Held::new(port), conns(2000, port));
            let d = Direction::Original;
            for (n, conn) in conns.iter().take(1500).enumerate() {
                held.insert(conn, conn.slot(port, d).unwrap(), d);
                let to = egress(u8::try_from(n % 2).unwrap());
                held.lead(conn, conn.slot(port, d).unwrap(), d, [None, to]);
            }
            let mut stays: Vec<bool> = vec![true; 1500];
            let (mut goes, mut seen, mut walk) = (goes.chunks(every), Vec::new(), held.walk());
            while let Some(part) = held.next_part(&mut walk) {
                prop_assert!(part.len() <= CHUNK);
                seen.extend(part);
                for &(comes, n) in goes.next().unwrap_or_default() {
                    let slot = conns[n].slot(port, d).unwrap();
                    if n >= 1500 && comes {
                        held.remove(&conns[n], slot, d, None);
                        held.insert(&conns[n], slot, d);
                    } else if n < 1500 && stays[n] {
                        stays[n] = false;
                        prop_assert!(held.remove(&conns[n], slot, d, egress(u8::try_from(n % 2).unwrap())));
                    }
                }
            }
            let seen = named(seen);
            for n in (0..1500).filter(|n| stays[*n]) {
                prop_assert!(seen.binary_search(&(n as u64, false)).is_ok(), "{n}");
            }
        }
    }

    #[test]
    fn a_slot_that_another_port_has_taken_over_is_removed_from_the_right_list() {
        let (old, new) = (generation(1), generation(2));
        let d = Direction::Original;
        let conns = conns(3, old);
        let (mut before, mut now) = (Held::new(old), Held::new(new));
        for conn in &conns {
            before.insert(conn, conn.slot(old, d).unwrap(), d);
        }
        // The one that was last has the new port's first place; an old one goes, and the last gets its place.
        assert!(matches!(
            conns[2].claim(new, d, |g| g == old),
            crate::engine::conn::ConnClaim::Won(_)
        ));
        let taken_over = conns[2].slot(new, d).unwrap();
        now.insert(&conns[2], taken_over, d);
        assert!(before.remove(&conns[0], conns[0].slot(old, d).unwrap(), d, None));
        assert_eq!(taken_over.place.get(), 0);
        taken_over.place.set(17);
        assert!(now.remove(&conns[2], taken_over, d, None), "a wrong place is no loss");
        assert!(now.is_empty());
        assert_eq!(named(before.take_all()), [(1, false), (2, false)]);
    }
}
