//! The MAC table: where each station was last seen.
//!
//! Read for every packet and hardly ever changed: readers have a snapshot and look whether it is
//! still the present one, which is one load; who learns something makes a new table. Only the
//! time of the last packet is written in place, and that at most once in [`REFRESH_MS`].

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::{ArcSwap, Cache};
use netdev_providers::MacAddr;

/// Stations that are remembered; more are flooded to.
const STATIONS: usize = 4096;
/// A station that has been silent for so long is forgotten.
const AGE_MS: u64 = 300_000;
const REFRESH_MS: u64 = 1000;

#[derive(Debug)]
pub(crate) struct Station {
    /// Index of its port.
    pub(crate) port: usize,
    seen_ms: AtomicU64,
}

type Table = HashMap<MacAddr, Arc<Station>>;

/// A reader's snapshot; one per packet thread.
pub(crate) type Reader = Cache<Arc<ArcSwap<Table>>, Arc<Table>>;

#[derive(Default)]
pub(crate) struct Macs {
    table: Arc<ArcSwap<Table>>,
    change: Mutex<()>,
}

impl Macs {
    pub(crate) fn reader(&self) -> Reader {
        Cache::new(Arc::clone(&self.table))
    }

    fn change<R>(&self, f: impl FnOnce(&mut Table) -> R) -> R {
        let _one_at_a_time = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = Table::clone(&self.table.load());
        let result = f(&mut table);
        self.table.store(Arc::new(table));
        result
    }

    /// A frame from this station came in on this port. True when it was on **another** port
    /// before: then rules that forward to it are wrong.
    #[inline]
    pub(crate) fn learn(&self, seen: &Table, mac: MacAddr, port: usize, now_ms: u64) -> bool {
        match seen.get(&mac) {
            Some(s) if s.port == port => {
                s.refresh(now_ms);
                false
            }
            _ => self.learn_new(mac, port, now_ms),
        }
    }

    #[cold]
    fn learn_new(&self, mac: MacAddr, port: usize, now_ms: u64) -> bool {
        if mac.is_multicast() || self.table.load().len() >= STATIONS {
            return false;
        }
        self.change(|table| {
            let station = Station { port, seen_ms: AtomicU64::new(now_ms) };
            table.insert(mac, Arc::new(station)).is_some_and(|old| old.port != port)
        })
    }

    /// This station sends, though nobody sees it in software.
    pub(crate) fn refresh(&self, mac: MacAddr, now_ms: u64) {
        if let Some(station) = self.table.load().get(&mac) {
            station.refresh(now_ms);
        }
    }

    /// Forgets the stations of a port.
    pub(crate) fn forget_port(&self, port: usize) {
        self.change(|table| table.retain(|_, s| s.port != port));
    }

    /// Forgets who has been silent for too long, and returns them.
    pub(crate) fn age(&self, now_ms: u64) -> Vec<MacAddr> {
        let old = |s: &Station| s.seen_ms.load(Ordering::Relaxed) + AGE_MS < now_ms;
        let silent: Vec<_> =
            self.table.load().iter().filter(|(_, s)| old(s)).map(|(mac, _)| *mac).collect();
        if !silent.is_empty() {
            self.change(|table| table.retain(|mac, _| !silent.contains(mac)));
        }
        silent
    }
}

impl Station {
    fn refresh(&self, now_ms: u64) {
        if self.seen_ms.load(Ordering::Relaxed) + REFRESH_MS < now_ms {
            self.seen_ms.store(now_ms, Ordering::Relaxed);
        }
    }
}
