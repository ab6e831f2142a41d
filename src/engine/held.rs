//! What a port holds: its slots, and where their rules lead.

use std::collections::{HashMap, HashSet};

use netdev_providers::{Direction, Epoch, Ifindex};

use super::conn::ConnHandle;

/// The slots of a port that are not empty, so that a flush of the port costs what the port holds
/// and nothing else, and the rules that forward into a given netdev are found without a search.
#[derive(Debug, Default)]
pub(super) struct Held {
    slots: HashMap<HeldKey, ConnHandle, ahash::RandomState>,
    by_egress: HashMap<Ifindex, HashSet<HeldKey, ahash::RandomState>>,
}

/// Epoch and direction in one word: there is one for every slot, twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct HeldKey(u64);

impl HeldKey {
    fn new(epoch: Epoch, d: Direction) -> Self {
        Self(epoch.0 << 1 | d as u64)
    }

    fn direction(self) -> Direction {
        if self.0 & 1 == 0 { Direction::Original } else { Direction::Reply }
    }
}

impl Held {
    pub(super) fn insert(&mut self, conn: ConnHandle, d: Direction) {
        self.slots.insert(HeldKey::new(conn.epoch(), d), conn);
    }

    pub(super) fn set_egress(&mut self, conn: &ConnHandle, d: Direction, egress: Ifindex) {
        self.by_egress.entry(egress).or_default().insert(HeldKey::new(conn.epoch(), d));
    }

    pub(super) fn remove(&mut self, conn: &ConnHandle, d: Direction, egress: Option<Ifindex>) {
        self.slots.remove(&HeldKey::new(conn.epoch(), d));
        if let Some(egress) = egress {
            self.clear_egress(conn, d, egress);
        }
    }

    /// The slot's rule is not to lead there after all.
    pub(super) fn clear_egress(&mut self, conn: &ConnHandle, d: Direction, egress: Ifindex) {
        if let Some(set) = self.by_egress.get_mut(&egress) {
            set.remove(&HeldKey::new(conn.epoch(), d));
            if set.is_empty() {
                self.by_egress.remove(&egress);
            }
        }
    }

    /// The connection, living or ending, of a slot that is held.
    pub(super) fn get(&self, epoch: Epoch, d: Direction) -> Option<ConnHandle> {
        self.slots.get(&HeldKey::new(epoch, d)).cloned()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Takes all, and the memory with it.
    pub(super) fn take_all(&mut self) -> Vec<(ConnHandle, Direction)> {
        let Self { slots, .. } = std::mem::take(self);
        slots.into_iter().map(|(key, conn)| (conn, key.direction())).collect()
    }

    pub(super) fn all(&self) -> Vec<(ConnHandle, Direction)> {
        self.slots.iter().map(|(key, conn)| (conn.clone(), key.direction())).collect()
    }

    pub(super) fn leads_to(&self, egress: Ifindex) -> bool {
        self.by_egress.contains_key(&egress)
    }

    pub(super) fn towards(&self, egress: Ifindex) -> Vec<(ConnHandle, Direction)> {
        let keys = self.by_egress.get(&egress).into_iter().flatten();
        keys.filter_map(|key| Some((self.slots.get(key)?.clone(), key.direction()))).collect()
    }
}
