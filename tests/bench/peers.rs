//! The designs that the engine is measured against: **one lock over a list of providers, taken for
//! every connection**, once as a mutex and once as a reader-writer lock. Each provider in the list
//! is asked whether it can offload, and if so is called; what it then does is the same as ours:
//! look at the connection's state (decided: done), or mark it and queue it.
//!
//! They are built to be fast: the state is one atomic in the connection (no table of the provider,
//! no lock of the connection), the locks are the standard library's futex locks, and the provider
//! that will take the connection comes first in the list.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use netdev_providers::Direction;

/// What such a design keeps in a connection.
#[derive(Default)]
pub(crate) struct PeerConn {
    state: [AtomicU8; 2],
}

/// What a call is about.
pub(crate) struct Context<'a> {
    pub conn: &'a Arc<PeerConn>,
    pub direction: Direction,
    pub ifindex: u32,
}

/// A provider as those designs have it: one for all netdevs.
pub(crate) trait ListedProvider: Send + Sync {
    fn can_offload(&self, ctx: &Context<'_>) -> bool;
    /// True when the connection was queued by this call.
    fn conn_add(&self, ctx: &Context<'_>) -> bool;
    /// What it has queued, taken out.
    fn drain(&self) -> usize;
    /// Calls so far.
    fn calls(&self) -> u64;
}

/// Takes what arrives on netdevs of even or odd ifindex.
pub(crate) struct Taker {
    parity: u32,
    queue: Mutex<VecDeque<(Arc<PeerConn>, Direction)>>,
    calls: std::sync::atomic::AtomicU64,
    counts: bool,
}

impl Taker {
    pub(crate) fn new(parity: u32, counts: bool) -> Self {
        Self { parity, queue: Mutex::default(), calls: 0.into(), counts }
    }
    fn count(&self) {
        if self.counts {
            self.calls.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl ListedProvider for Taker {
    fn can_offload(&self, ctx: &Context<'_>) -> bool {
        self.count();
        ctx.ifindex % 2 == self.parity
    }

    fn conn_add(&self, ctx: &Context<'_>) -> bool {
        self.count();
        let state = &ctx.conn.state[ctx.direction.index()];
        if state.load(Ordering::Acquire) != 0 || state.swap(1, Ordering::AcqRel) != 0 {
            return false;
        }
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.push_back((Arc::clone(ctx.conn), ctx.direction));
        true
    }

    fn drain(&self) -> usize {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.drain(..).count()
    }

    fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }
}

type List = Vec<Box<dyn ListedProvider>>;

/// Two providers, as a system has them that offers two ways to offload.
pub(crate) fn list(counts: bool) -> List {
    vec![Box::new(Taker::new(1, counts)), Box::new(Taker::new(0, counts))]
}

fn call_all(list: &List, ctx: &Context<'_>) -> bool {
    let mut queued = false;
    for provider in list {
        if provider.can_offload(ctx) {
            queued |= provider.conn_add(ctx);
        }
    }
    queued
}

/// A list of providers behind a lock.
pub(crate) trait Locked: Sync {
    const NAME: &str;
    fn new(list: List) -> Self;
    /// What happens for every packet. True when the connection was queued.
    fn conn_add(&self, ctx: &Context<'_>) -> bool;
    fn drain(&self) -> usize;
    fn calls(&self) -> Vec<u64>;
}

/// The first design: one mutex.
pub(crate) struct OneMutex(Mutex<List>);

impl Locked for OneMutex {
    const NAME: &str = "one mutex";
    fn new(list: List) -> Self {
        Self(Mutex::new(list))
    }
    #[inline]
    fn conn_add(&self, ctx: &Context<'_>) -> bool {
        call_all(&self.0.lock().unwrap_or_else(PoisonError::into_inner), ctx)
    }
    fn drain(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|p| p.drain()).sum()
    }
    fn calls(&self) -> Vec<u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|p| p.calls()).collect()
    }
}

/// Its successor: one reader-writer lock, taken for reading.
pub(crate) struct OneRwLock(RwLock<List>);

impl Locked for OneRwLock {
    const NAME: &str = "one rwlock";
    fn new(list: List) -> Self {
        Self(RwLock::new(list))
    }
    #[inline]
    fn conn_add(&self, ctx: &Context<'_>) -> bool {
        call_all(&self.0.read().unwrap_or_else(PoisonError::into_inner), ctx)
    }
    fn drain(&self) -> usize {
        self.0.read().unwrap_or_else(PoisonError::into_inner).iter().map(|p| p.drain()).sum()
    }
    fn calls(&self) -> Vec<u64> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).iter().map(|p| p.calls()).collect()
    }
}
