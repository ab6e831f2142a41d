//! The paths that a port's rules were made for. Many rules lead to few neighbours, so each path is kept once.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use netdev_providers::{Ifindex, MacAddr};

/// The path that a rule was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PathTaken {
    /// Where the packets are sent.
    pub egress: Ifindex,
    /// The neighbour they are sent to, where there is one.
    pub next_hop: Option<IpAddr>,
    /// The MAC address they are sent to; of bridged ones, the one that they arrive with.
    pub dst_mac: Option<MacAddr>,
    /// The netdev above the port that the packets arrive on, where there is one.
    pub iif: Option<Ifindex>,
    /// The netdev above [`egress`](Self::egress) that they are routed to, where there is one.
    pub oif: Option<Ifindex>,
    /// See [`Path::answer`](super::datapath::Path::answer).
    pub answer: u16,
    /// True when addresses or ports are rewritten.
    pub nat: bool,
    /// True when a bridge forwards the packets, and nobody routes them.
    pub bridged: bool,
}

/// How many are kept before it is looked which of them nobody has any more.
const FEW: usize = 64;

/// The paths of one port.
#[derive(Debug, Default)]
pub(super) struct Paths {
    known: HashSet<Arc<PathTaken>, ahash::RandomState>,
    /// At how many it is looked again.
    enough: usize,
}

impl Paths {
    /// The one that is kept for all.
    pub(super) fn kept(&mut self, path: PathTaken) -> Arc<PathTaken> {
        if let Some(known) = self.known.get(&path) {
            return Arc::clone(known);
        }
        if self.known.len() >= self.enough {
            self.known.retain(|path| Arc::strong_count(path) > 1);
            self.enough = FEW.max(2 * self.known.len());
        }
        let path = Arc::new(path);
        self.known.insert(Arc::clone(&path));
        path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(answer: u16) -> PathTaken {
        PathTaken {
            egress: Ifindex::new(1).unwrap(),
            next_hop: None,
            dst_mac: None,
            iif: None,
            oif: None,
            answer,
            nat: false,
            bridged: false,
        }
    }

    #[test]
    fn one_path_is_kept_for_all_who_take_it_and_as_long_as_one_does() {
        let mut paths = Paths::default();
        let one = paths.kept(path(1));
        assert!(Arc::ptr_eq(&one, &paths.kept(path(1))));
        assert_ne!(one, paths.kept(path(2)));
        for n in 0..10_000 {
            paths.kept(path(n));
            assert!(paths.known.len() <= FEW);
        }
        assert!(Arc::ptr_eq(&one, &paths.kept(path(1))), "somebody has it");
        let all: Vec<_> = (0..10_000).map(|n| paths.kept(path(n))).collect();
        assert_eq!((paths.known.len(), all.len()), (10_000, 10_000));
        drop(all);
        (0..20_000).for_each(|n| drop(paths.kept(path(n))));
        assert!(paths.known.len() <= FEW, "{}", paths.known.len());
    }

    #[test]
    fn it_is_looked_who_has_a_path_when_they_are_twice_as_many_and_not_for_each() {
        let mut paths = Paths::default();
        let all: Vec<_> = (0..200).map(|n| paths.kept(path(n))).collect();
        drop(all);
        (200..256).for_each(|n| drop(paths.kept(path(n))));
        assert_eq!(paths.known.len(), 256);
        paths.kept(path(256));
        assert_eq!(paths.known.len(), 1);
    }
}
