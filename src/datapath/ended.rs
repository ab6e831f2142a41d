//! Connections that have ended lately, for who asks why one is not offloaded any more.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use netdev_providers::Tuple;

use crate::engine::conn::{ConnHandle, ConnKey};

/// How many are remembered: enough for a person who has just seen one, in bounded memory.
const REMEMBERED: usize = 4096;

/// A connection that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Which one.
    pub key: ConnKey,
    /// Its reply tuple.
    pub reply: Tuple,
    /// What its rules have carried.
    pub packets: u64,
    /// It was closed by its ends; otherwise its entry went: it expired, or somebody deleted it.
    pub closed: bool,
    /// When.
    pub at: Instant,
}

impl Ended {
    /// How long ago.
    #[must_use]
    pub fn ago(&self) -> Duration {
        self.at.elapsed()
    }
}

/// The last of them.
#[derive(Debug, Default)]
pub(super) struct Ends(Mutex<VecDeque<Ended>>);

impl Ends {
    pub(super) fn note(&self, conn: &ConnHandle, closed: bool) {
        let packets = conn.traffic().packets;
        let (key, reply, at) = (conn.key(), conn.reply(), Instant::now());
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if last.len() == REMEMBERED {
            last.pop_front();
        }
        last.push_back(Ended { key, reply, packets, closed, at });
    }

    /// The last one that had one of these tuples, in either direction.
    pub(super) fn find(&self, tuples: &[Tuple]) -> Option<Ended> {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_meant = |e: &&Ended| tuples.iter().any(|t| *t == e.key.original || *t == e.reply);
        last.iter().rev().find(is_meant).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::clock::Clock;
    use crate::engine::datapath::NoDatapath;
    use crate::engine::{Engine, Limits};
    use netdev_providers::Zone;
    use std::num::NonZeroU32;
    use std::sync::Arc;

    #[test]
    fn the_last_ones_are_found_by_either_tuple_and_no_more_are_kept() {
        let limits = Limits { connections: 2 * REMEMBERED, ..Limits::default() };
        let engine = Engine::new(NonZeroU32::MIN, Arc::new(NoDatapath), limits, Clock::default());
        let ends = Ends::default();
        let tuple = |n: usize| -> Tuple {
            format!("tcp 10.0.0.1:{} > 10.0.{}.2:80", n % 4096 + 1, n / 4096).parse().unwrap()
        };
        let reply: Tuple = "tcp 10.9.0.2:80 > 192.0.2.1:7".parse().unwrap();
        for n in 0..=REMEMBERED {
            let key = ConnKey { zone: Zone(0), original: tuple(n) };
            let of = if n == REMEMBERED { reply } else { tuple(n).inverted() };
            ends.note(&engine.conn_create(key, of, 0).unwrap(), n % 2 == 0);
        }
        assert_eq!(ends.find(&[tuple(0)]), None, "the oldest has given way");
        assert_eq!(
            ends.find(&[tuple(1)]).map(|e| (e.key.original, e.closed)),
            Some((tuple(1), false))
        );
        let last = ends.find(&[reply]).unwrap();
        assert_eq!((last.key.original, last.closed), (tuple(REMEMBERED), true));
        assert!(last.ago() < Duration::from_secs(60));
    }
}
