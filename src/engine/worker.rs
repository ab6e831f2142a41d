//! Workers: the threads that see packets. Each has its own view of the ports and looks, once per
//! batch, whether it is still the present one; nothing on the way of a packet is locked or written.
//!
//! A writer that takes a port away publishes a new table and waits until every worker that is
//! online has passed a **quiescent state** ([`Worker::quiescent`]) since, so that no worker still
//! offers on the old port. Workers never wait for writers. A worker that blocks (in a poll, say)
//! goes [`offline`](Worker::offline) first, and nobody waits for it.
//!
//! The scheme is that of OVS's PMD threads, which reload their cached ports at reconfiguration,
//! with quiescent states as in OVS `lib/ovs-rcu.h`.

use std::borrow::Borrow;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use netdev_providers::{Direction, Generation, Ifindex, Reason, Rejection};

use super::conn::{ConnClaim, ConnHandle};
use super::datapath::{Arrival, Path, PathSpec, Work, flow, tracked};
use super::port::Port;
use super::queue::{Command, Queue};
use super::sync::{ArcSwap, AtomicU64, Mutex, Patience, fence, thread_number};
use super::table::PortTable;

/// Nobody waits for this worker, now (it may come back) or ever again.
const OFFLINE: u64 = u64::MAX - 1;
const GONE: u64 = u64::MAX;

/// What one worker has seen, on a cache line of its own.
#[repr(align(128))]
struct Seen(AtomicU64);

/// The published port table and who reads it.
pub(super) struct Publication {
    table: ArcSwap<PortTable>,
    version: AtomicU64,
    workers: Mutex<Vec<Arc<Seen>>>,
}

impl Default for Publication {
    fn default() -> Self {
        Self {
            table: ArcSwap::from_pointee(PortTable::default()),
            version: AtomicU64::new(1),
            workers: Mutex::default(),
        }
    }
}

impl Publication {
    pub(super) fn table(&self) -> Arc<PortTable> {
        self.table.load_full()
    }

    /// Publishes a table; returns its version, for [`wait`](Self::wait).
    pub(super) fn publish(&self, table: PortTable) -> u64 {
        self.table.store(Arc::new(table));
        self.version.fetch_add(1, Ordering::Release) + 1
    }

    /// Waits until every online worker has seen this version. False when the time is over first.
    pub(super) fn wait(&self, version: u64, at_most: Duration) -> bool {
        let mut patience = Patience::new(at_most);
        // Pairs with the fence in `online`: either we see the worker, or it sees what is published.
        fence(Ordering::SeqCst);
        loop {
            let behind = {
                let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
                // Acquire, of a worker that has gone too: what it did comes before what we do next.
                workers.retain(|w| w.0.load(Ordering::Acquire) != GONE);
                workers.iter().any(|w| w.0.load(Ordering::Acquire) < version)
            };
            if !behind {
                return true;
            }
            if !patience.pause() {
                return false;
            }
        }
    }
}

/// What became of an offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// The add is queued: this worker was the first to see the direction on the port.
    Queued,
    /// The slot is decided: pending, installed, being deleted, or rejected.
    Decided,
    /// Refused at once. The slot is Empty, a later packet may try again.
    Refused(Reason),
    /// The port has no provider, or is none.
    Unbound,
}

/// A thread's view of the engine. Not shared: one per thread (`Send`, but every method that can
/// change the view takes `&mut self`).
pub struct Worker {
    publication: Arc<Publication>,
    seen: Arc<Seen>,
    version: u64,
    table: Arc<PortTable>,
}

impl Worker {
    pub(super) fn new(publication: Arc<Publication>) -> Self {
        let seen = Arc::new(Seen(AtomicU64::new(OFFLINE)));
        {
            let mut workers = publication.workers.lock().unwrap_or_else(PoisonError::into_inner);
            // Whoever waits for workers takes this lock, so what those did that have gone comes
            // before what it does next.
            workers.retain(|w| w.0.load(Ordering::Acquire) != GONE);
            workers.push(Arc::clone(&seen));
        }
        let mut w = Self { publication, seen, version: 0, table: Arc::default() };
        w.online();
        w
    }

    /// Nothing is held from before this call: once per batch of packets. One load when the ports
    /// have not changed.
    #[inline]
    pub fn quiescent(&mut self) {
        if !self.is_current() {
            self.reload();
        }
    }

    /// Whether no port has come or gone since the last quiescent state: then one now would change nothing.
    #[inline]
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.publication.version.load(Ordering::Acquire) == self.version
    }

    #[cold]
    fn reload(&mut self) {
        loop {
            let version = self.publication.version.load(Ordering::Acquire);
            self.table = self.publication.table();
            // Only now is the old table let go: whoever waits for this version may proceed.
            self.seen.0.store(version, Ordering::Release);
            self.version = version;
            if self.publication.version.load(Ordering::Acquire) == version {
                return;
            }
        }
    }

    /// About to block: nobody waits for this worker until it is [`online`](Self::online) again. It
    /// must not offer meanwhile.
    pub fn offline(&mut self) {
        self.table = Arc::default();
        self.version = 0;
        self.seen.0.store(OFFLINE, Ordering::Release);
    }

    /// Back from blocking: reads the present ports.
    pub fn online(&mut self) {
        self.seen.0.store(0, Ordering::Relaxed);
        // Pairs with the fence in `wait`.
        fence(Ordering::SeqCst);
        self.reload();
    }

    /// The port of this netdev, as of the last quiescent state. Look it up once per batch.
    #[must_use]
    pub fn port(&self, ifindex: Ifindex) -> Option<PortRef<'_>> {
        self.table.get(ifindex).map(|port| PortRef { generation: port.generation(), port })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.seen.0.store(GONE, Ordering::Release);
    }
}

/// A port as a worker sees it; cannot outlive the next quiescent state.
#[derive(Clone, Copy)]
pub struct PortRef<'a> {
    generation: Generation,
    port: &'a Arc<Port>,
}

impl PortRef<'_> {
    /// Which life of the port this is.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// Whether the port has a provider. Where it has none, every offer is [`Offer::Unbound`]: a datapath
    /// that asks here first need not even look for a path.
    #[inline]
    #[must_use]
    pub fn is_bound(&self) -> bool {
        self.port.binding.is_some()
    }

    /// Whether packets of this direction on this port need nothing more from the worker: the test
    /// for the packet path. One atomic load; no lock, no write, no system call.
    #[inline]
    #[must_use]
    pub fn is_decided(&self, conn: &ConnHandle, d: Direction) -> bool {
        conn.is_decided(self.generation, d)
    }

    /// The connection was created by a packet of this direction that arrived here: offers it to
    /// this port's provider, and to no other. Idempotent: one claim per slot.
    #[must_use]
    pub fn conn_add(&self, conn: &ConnHandle, d: Direction, path: PathSpec) -> Offer {
        self.offer(conn, d, path)
    }

    /// A packet of an existing connection was seen here: the lazy add of a later port. The same
    /// offer as [`conn_add`](Self::conn_add).
    #[must_use]
    pub fn conn_seen(&self, conn: &ConnHandle, d: Direction, path: PathSpec) -> Offer {
        self.offer(conn, d, path)
    }

    /// Offers several directions, as [`conn_add`](Self::conn_add) does one after the other, and wakes the
    /// port's thread once, behind the last that it has to look at: for the undecided ones among a batch of
    /// packets. What became of each is told in order.
    pub fn offer_batch<C: Borrow<ConnHandle>>(
        &self,
        offers: impl IntoIterator<Item = (C, Direction, PathSpec)>,
        mut told: impl FnMut(Offer),
    ) {
        /// Whatever the caller's code does meanwhile, what is queued does not lie there unheard of.
        struct Wake<'a> {
            queue: &'a Queue,
            is_due: bool,
        }
        impl Drop for Wake<'_> {
            fn drop(&mut self) {
                if self.is_due {
                    self.queue.wake();
                }
            }
        }
        let mut wake = Wake { queue: &self.port.queue, is_due: false };
        for (conn, d, path) in offers {
            let offer = self.put(conn.borrow(), d, path);
            wake.is_due |= offer == Offer::Queued;
            told(offer);
        }
    }

    /// Whether this port's provider would take the direction by this path, without an offer: the
    /// policy check. Nothing is queued or counted, and the slot stays as it is.
    ///
    /// For any thread. It costs a call of the provider's, which is cheap and does not block, and two
    /// locks of the port that are held for a moment: nothing for the way of every packet.
    ///
    /// # Errors
    /// The rejection that an offer would end with, as far as that can be told beforehand. `Ok` is
    /// no promise.
    pub fn can_offload(
        &self,
        conn: &ConnHandle,
        d: Direction,
        path: &Path,
    ) -> Result<(), Rejection> {
        self.takes(conn, || Work::Forward(Box::new(flow(conn, d, path))))
    }

    /// The same for an offer of [`PathSpec::Track`].
    ///
    /// # Errors
    /// As [`can_offload`](Self::can_offload).
    pub fn can_track(
        &self,
        conn: &ConnHandle,
        d: Direction,
        arrival: Arrival,
    ) -> Result<(), Rejection> {
        self.takes(conn, || Work::Track(Box::new(tracked(conn, d, arrival))))
    }

    fn takes(&self, conn: &ConnHandle, work: impl FnOnce() -> Work) -> Result<(), Rejection> {
        if !self.is_bound() {
            return Err(Reason::NoProvider.into());
        }
        if conn.is_dead() {
            return Err(Reason::ConnState.into());
        }
        let work = work();
        let asked = self.port.visit(|provider| self.port.takes(&work, provider));
        // It is being deleted; or what panicked was none of the provider's.
        asked.and_then(Result::ok).unwrap_or_else(|| Err(Reason::Cancelled.into()))
    }

    fn offer(&self, conn: &ConnHandle, d: Direction, path: PathSpec) -> Offer {
        let offer = self.put(conn, d, path);
        if offer == Offer::Queued {
            self.port.queue.wake();
        }
        offer
    }

    /// An offer of which the port's thread is not told yet.
    fn put(&self, conn: &ConnHandle, d: Direction, path: PathSpec) -> Offer {
        if !self.is_bound() {
            return Offer::Unbound;
        }
        if self.is_decided(conn, d) {
            return Offer::Decided;
        }
        match conn.claim(self.generation, d, |g| self.port.outlives(g)) {
            ConnClaim::Decided => Offer::Decided,
            ConnClaim::Dead => Offer::Refused(Reason::ConnState),
            ConnClaim::Full => self.refuse(Reason::TooManyPorts),
            ConnClaim::Won(slot) => {
                let lane = thread_number();
                let refused = if self.is_slow(lane) {
                    Reason::ProviderSlow
                } else if self.port.queue.put_add(lane, conn.clone(), d, path) {
                    return Offer::Queued;
                } else {
                    Reason::QueueFull
                };
                slot.word.unclaim(self.generation);
                self.refuse(refused)
            }
        }
    }

    /// Looks at the time for one in so many offers that find others waiting: somebody has to, and no
    /// more than this of them may come behind what does not go on.
    fn is_slow(&self, lane: usize) -> bool {
        const EVERY: usize = 64;
        let waiting = self.port.queue.pending_of(lane);
        if waiting > 0 && waiting.is_multiple_of(EVERY) {
            return self.port.slow().is_some();
        }
        self.port.is_slow()
    }

    /// The datapath could not make a connection for a packet that was seen here
    /// ([`Engine::conn_create`](super::Engine::conn_create) gave none): counted for the port, as
    /// there is no slot to keep it. For any thread.
    pub fn conn_table_full(&self) {
        self.port.counters.count(|counts| counts.refused(Reason::ConnTableFull));
    }

    fn refuse(&self, reason: Reason) -> Offer {
        self.port.counters.count(|counts| counts.refused(reason));
        Offer::Refused(reason)
    }

    /// A reply of the connection was seen. That is remembered for the connection's life, whatever
    /// becomes of its rules, and told to providers at most once per rule, after it is installed: now,
    /// where direction `d` on this port has one.
    pub fn conn_established(&self, conn: &ConnHandle, d: Direction) {
        conn.note_reply();
        if let Some(slot) = conn.slot(self.generation, d)
            && slot.word.reply_seen(self.generation)
        {
            self.port.queue.push(Command::Established(conn.clone(), d));
        }
    }
}
