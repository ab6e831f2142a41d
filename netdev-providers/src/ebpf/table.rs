//! The table of a port, on our side: which rule has which number and which packets, so that a rule can be deleted by
//! its number and what is there already is told before the kernel is asked. What a rule does stands in the kernel only.

use std::hash::{BuildHasher, RandomState};

use hashbrown::HashTable;

use super::entry::{Key, RuleNumber};
use crate::contract::types::Cookie;

/// A rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) key: Key,
    /// What the engine calls it.
    pub(super) cookie: Cookie,
    /// A dead engine wrote it, and nobody has decided about it yet.
    pub(super) left: bool,
}

/// Why there is no room for a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoRoom {
    /// There is one for the same packets.
    Taken,
    /// There are as many as the map takes.
    Full,
}

/// All rules of a port.
#[derive(Debug)]
pub(super) struct Table {
    /// By number.
    rules: Vec<Option<Rule>>,
    /// Numbers that are free, below the length of that.
    free: Vec<RuleNumber>,
    by_key: HashTable<RuleNumber>,
    hasher: RandomState,
    capacity: usize,
}

impl Table {
    pub(super) fn new(capacity: u32) -> Self {
        Self {
            rules: Vec::new(),
            free: Vec::new(),
            by_key: HashTable::new(),
            hasher: RandomState::new(),
            capacity: capacity as usize,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Those of this engine.
    pub(super) fn own(&self) -> usize {
        self.rules.iter().flatten().filter(|r| !r.left).count()
    }

    pub(super) fn get(&self, number: RuleNumber) -> Option<&Rule> {
        self.rules.get(number.0 as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, number: RuleNumber) -> Option<&mut Rule> {
        self.rules.get_mut(number.0 as usize)?.as_mut()
    }

    /// Gives a new rule its number.
    pub(super) fn insert(&mut self, rule: Rule) -> Result<RuleNumber, NoRoom> {
        if self.has(&rule.key) {
            return Err(NoRoom::Taken);
        }
        if self.len() >= self.capacity {
            return Err(NoRoom::Full);
        }
        let number = match self.free.pop() {
            Some(number) => number,
            None => {
                let number = u32::try_from(self.rules.len()).map_err(|_| NoRoom::Full)?;
                self.rules.push(None);
                RuleNumber(number)
            }
        };
        self.put(number, rule);
        Ok(number)
    }

    /// Takes rules over that have their numbers already, into a table that is empty; returns those whose number is
    /// none that we would give, or another's.
    pub(super) fn take_over(&mut self, rules: Vec<(RuleNumber, Rule)>) -> Vec<Rule> {
        let mut refused = Vec::new();
        for (number, rule) in rules {
            let at = number.0 as usize;
            if at >= self.capacity || self.get(number).is_some() || self.has(&rule.key) {
                refused.push(rule);
                continue;
            }
            if at >= self.rules.len() {
                self.rules.resize(at + 1, None);
            }
            self.put(number, rule);
        }
        let numbers = (0..).map(RuleNumber).zip(&self.rules);
        self.free = numbers.filter(|(_, rule)| rule.is_none()).map(|(n, _)| n).collect();
        refused
    }

    /// Its number is free again.
    pub(super) fn remove(&mut self, number: RuleNumber) {
        let Some(rule) = self.rules.get_mut(number.0 as usize).and_then(Option::take) else {
            return;
        };
        if let Ok(entry) = self.by_key.find_entry(self.hasher.hash_one(rule.key), |&n| n == number)
        {
            entry.remove();
        }
        self.free.push(number);
    }

    pub(super) fn clear(&mut self) {
        self.rules = Vec::new();
        self.free = Vec::new();
        self.by_key = HashTable::new();
    }

    fn has(&self, key: &Key) -> bool {
        let is_same = |n: &RuleNumber| self.get(*n).is_some_and(|r| r.key == *key);
        self.by_key.find(self.hasher.hash_one(key), is_same).is_some()
    }

    fn put(&mut self, number: RuleNumber, rule: Rule) {
        let Self { rules, by_key, hasher, .. } = self;
        rules[number.0 as usize] = Some(rule);
        by_key.insert_unique(hasher.hash_one(rule.key), number, |n| {
            rules[n.0 as usize].map_or(0, |r| hasher.hash_one(r.key))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::types::{Direction, Epoch, Instance};
    use proptest::prelude::*;
    use std::collections::HashMap;
    use std::num::NonZeroU32;

    fn rule(n: u8) -> Rule {
        let instance = Instance(NonZeroU32::MIN);
        let cookie = Cookie { instance, epoch: Epoch(n.into()), direction: Direction::Original };
        Rule { key: Key([n; super::super::entry::KEY]), cookie, left: false }
    }

    proptest! {
        #[test]
        fn it_does_what_a_map_of_numbers_and_one_of_packets_would(
            capacity in 0u32..12,
            left in proptest::collection::vec((0u8..12, 0u32..16), 0..8),
            steps in proptest::collection::vec((any::<bool>(), 0u8..12, 0u32..16), 0..60),
        ) {
            let mut table = Table::new(capacity);
            let mut model: HashMap<u32, Rule> = HashMap::new();
            let refused = table.take_over(left.iter().map(|&(n, at)| (RuleNumber(at), rule(n))).collect());
            let mut wanted = Vec::new();
            for (n, at) in left {
                let taken = model.values().any(|r| r.key == rule(n).key);
                if taken || at >= capacity || model.contains_key(&at) {
                    wanted.push(rule(n));
                } else {
                    model.insert(at, rule(n));
                }
            }
            prop_assert_eq!(refused, wanted);
            for (add, n, at) in steps {
                let taken = model.values().any(|r| r.key == rule(n).key);
                if add {
                    match table.insert(rule(n)) {
                        Ok(number) => {
                            prop_assert!(!taken && model.len() < capacity as usize);
                            prop_assert!(number.0 < capacity);
                            prop_assert_eq!(model.insert(number.0, rule(n)), None);
                        }
                        Err(NoRoom::Taken) => prop_assert!(taken),
                        Err(NoRoom::Full) => prop_assert!(!taken && model.len() == capacity as usize),
                    }
                } else {
                    table.remove(RuleNumber(at));
                    model.remove(&at);
                }
                prop_assert_eq!(table.len(), model.len());
                prop_assert_eq!(table.own(), model.len());
                for at in 0..16 {
                    prop_assert_eq!(table.get(RuleNumber(at)), model.get(&at));
                }
            }
            table.clear();
            prop_assert_eq!(table.len(), 0);
            prop_assert_eq!(table.insert(rule(1)).is_ok(), capacity > 0);
        }
    }
}
