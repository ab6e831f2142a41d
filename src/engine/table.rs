//! The ports at one moment.

use std::collections::HashMap;
use std::sync::Arc;

use netdev_providers::{Generation, Ifindex};

use super::port::Port;

/// The ports, as workers see them. Never changed: a change makes a new table.
#[derive(Clone, Debug, Default)]
pub(super) struct PortTable {
    /// Sorted by ifindex.
    ports: Vec<Arc<Port>>,
    /// Theirs, apart, so that a search touches nothing but them.
    ifindexes: Vec<Ifindex>,
    /// Where each of them is.
    generations: HashMap<Generation, usize, ahash::RandomState>,
}

impl PortTable {
    fn new(ports: Vec<Arc<Port>>) -> Self {
        let ifindexes = ports.iter().map(|p| p.ifindex()).collect();
        let generations = ports.iter().enumerate().map(|(at, p)| (p.generation(), at)).collect();
        Self { ports, ifindexes, generations }
    }

    pub(super) fn get(&self, ifindex: Ifindex) -> Option<&Arc<Port>> {
        self.ports.get(self.ifindexes.binary_search(&ifindex).ok()?)
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
