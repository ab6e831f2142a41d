//! The engine: which connection is offloaded on which netdev, and in what state.
//!
//! ```text
//!   datapath           worker            port writer             provider
//!   sees a packet --> one atomic load    resolves the path,
//!                     decided? done.     prepares, batches  -->  netlink
//!                     claim, queue  -->                     <--  completions, usage
//! ```
//!
//! * [`slot`]: the state of (connection, port, direction), one atomic word;
//! * [`conn`], `tuples`, `detail`: connections, and the slots on them;
//! * [`index`], `zones`: how they are found by zone and tuple;
//! * `state`: the transaction of a slot, which nobody else changes but by it;
//! * [`worker`]: packet threads and their view of the ports (`table`);
//! * `port`, `queue`, `writer`, `threads`: a port, what is asked of it, who does it, and on what thread;
//! * `held`, `paths`, `shapes`, `counters`: what a port holds, where that leads, what it does not take, has done;
//! * `ports`, `flush`: ports that come and go, and what takes rules away from them;
//! * [`progress`]: whether a port's provider goes on;
//! * [`registry`], `bind`: provider classes, and which of them a netdev gets;
//! * [`datapath`]: what the engine asks of the datapath;
//! * [`capacity`], `pace`: how many rules a port may have, and which give way;
//! * [`latency`]: how long providers take;
//! * `doubt`: rules that the NIC says it has, and that do nothing;
//! * [`reconcile`]: what engines that died have left;
//! * [`usage`]: what rules carried, and when a connection was last used.
//!
//! # Threads
//! [`Engine`] and [`ConnHandle`] are `Send + Sync` and cheap to clone; a [`Worker`] is `Send` and
//! belongs to one thread at a time; a [`PortRef`](worker::PortRef) lives on the worker's thread from
//! one quiescent state to the next.
//!
//! | call | thread | cost |
//! |---|---|---|
//! | [`PortRef::is_decided`](worker::PortRef::is_decided) | packet thread | one atomic load, one more for each further port of the direction |
//! | [`Worker::quiescent`], [`Worker::port`] | packet thread, once per batch | one atomic load; one look into a table |
//! | [`PortRef::conn_add`](worker::PortRef::conn_add), [`conn_seen`](worker::PortRef::conn_seen), [`offer_batch`](worker::PortRef::offer_batch), [`conn_established`](worker::PortRef::conn_established) | packet thread | no lock; a compare-and-exchange, a push; a system call when the port's thread sleeps, of a batch once |
//! | [`PortRef::can_offload`](worker::PortRef::can_offload) | any | a call of the provider's, two short locks |
//! | [`Engine::conn_create`], [`conn`](Engine::conn), [`conn_del`](Engine::conn_del), [`conn_retract`](Engine::conn_retract), [`slot_retract`](Engine::slot_retract) | any | a lock of one shard of the index, one of each slot that holds something; never waits for a provider |
//! | [`Engine::conn_update`], [`slots`](Engine::slots) | any, not on the way of packets | a lock of each slot |
//! | [`Engine::ports`], [`conns`](Engine::conns), [`classes`](Engine::classes) | any, not on the way of packets | as much as there is to tell of |
//! | [`Engine::port_add`], [`port_del`](Engine::port_del), [`register`](Engine::register), [`unregister`](Engine::unregister), [`close`](Engine::close) | administration: one change of the ports at a time, but what they wait for | **blocks**, bounded by [`Limits`] where it waits for workers and providers |
//! | [`Engine::flush`], [`retract_egress`](Engine::retract_egress), [`sweep`](Engine::sweep) | administration | **blocks**, bounded by [`Limits`] |
//!
//! Nothing that blocks may be called by a worker that is online: it would wait for itself. Nor may
//! the callbacks of a [`Datapath`].
//!
//! # Ownership
//! The engine owns ports, providers and, in its index, a handle of every living connection. A
//! datapath that keeps a [`ConnHandle`] keeps the connection's memory, but not its life:
//! [`Engine::conn_del`] ends it for all. Everything that is returned (views, filters, reports, errors)
//! is a value of the caller's own, taken at one moment.
//!
//! # Errors
//! An error means that nothing has changed. What a provider refuses is no error of a call: it is kept
//! by the slot ([`view::SlotView::rejection`]), and packets take the slow path. What a provider does
//! wrong (it panics, or breaks the contract) is kept by the port ([`view::PortView::fault`]); that it is
//! slow passes ([`view::PortView::slow`]). No call panics.

mod ask;
mod bind;
pub mod capacity;
pub mod clock;
pub mod conn;
pub(crate) mod contain;
mod counters;
pub mod datapath;
mod detail;
mod doubt;
mod flush;
mod held;
pub mod index;
pub mod latency;
mod lines;
mod pace;
mod paths;
mod port;
mod ports;
mod prefetch;
pub mod progress;
mod queue;
pub mod reconcile;
pub mod registry;
mod shapes;
pub mod slot;
mod state;
mod sync;
mod table;
pub mod taken;
mod threads;
mod tuples;
pub mod usage;
pub mod view;
pub mod worker;
mod writer;
mod zones;

#[cfg(test)]
#[cfg(ctoffload_loom)]
mod models;
#[cfg(test)]
#[cfg(not(ctoffload_loom))]
mod tests;

use std::fmt;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use netdev_providers::{
    Cookie, Direction, Fault, HwFlags, Ifindex, Instance, ProviderClass, Tuple, Zone,
};

use self::clock::Clock;
use self::conn::ConnHandle;
use self::counters::Counts;
use self::datapath::Datapath;
use self::port::Port;
use self::registry::{Registry, RegistryError};
use self::taken::TakenBack;
use self::threads::Threads;
use self::worker::{Publication, Worker};
use self::zones::Zones;

/// The name that stands for "no provider" in a list of classes.
pub const NO_PROVIDER: &str = "none";

/// Bounds of an engine.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections kept.
    pub connections: usize,
    /// Offers of one packet thread waiting per port (of two that share a lane, when there are more than 16).
    pub queue: usize,
    /// How long administration waits for workers, and for a port that does not go on: counted from the
    /// port's last progress. What was asked for is done when the port goes on.
    pub port_del: Duration,
    /// How long nothing of what a provider was given may come back, before its port is
    /// [slow](progress::Slow) and takes no offers until something does.
    pub complete: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1 << 20,
            queue: 1 << 16,
            port_del: Duration::from_secs(5),
            complete: Duration::from_secs(5),
        }
    }
}

/// A netdev to be attached.
#[derive(Clone, Debug)]
pub struct NewPort {
    /// Its index.
    pub ifindex: Ifindex,
    /// Its name, for people.
    pub name: String,
    /// Where its rules may live.
    pub hw_flags: HwFlags,
    /// The classes to try, in this order; `None`: all, those first whose rules a NIC carries. `["none"]`: no
    /// provider.
    pub providers: Option<Vec<String>>,
    /// How many rules it may have; `None`: until the provider says that there is no more room.
    pub capacity: Option<u32>,
}

/// Why a port was not added.
#[derive(Debug, thiserror::Error)]
pub enum PortAddError {
    /// The netdev is a port already: it keeps its provider (EEXIST).
    #[error("{name} is bound already, to {provider}: delete the port first")]
    AlreadyBound {
        /// Its name.
        name: String,
        /// The class that has it, or `none`.
        provider: String,
    },
    /// A class that was asked for does not exist.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A port of this netdev is still being deleted, or its provider has not come back yet (EBUSY): it
    /// would take the new one's rules for its own.
    #[error("ifindex {0} was a port whose provider has not come back yet")]
    Busy(Ifindex),
    /// The thread that would serve it could not be started.
    #[error("the port's thread could not be started")]
    Thread(#[source] std::io::Error),
}

/// How a port-delete went. The port is gone in any case.
#[derive(Debug, Default)]
pub struct PortDeleted {
    /// Rules flushed on the port.
    pub flushed: u64,
    /// Rules deleted on other ports because they forwarded into it.
    pub retracted: u64,
    /// Rules that go on forwarding, for the next engine to adopt ([`Engine::leave`]).
    pub left: u64,
    /// What went wrong on the way.
    pub faults: Vec<Fault>,
}

/// There is no such port (ENODEV).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no port with ifindex {0}")]
pub struct NoSuchPort(pub Ifindex);

/// Which slots a flush empties.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlushFilter {
    /// Only slots of this port.
    pub port: Option<Ifindex>,
    /// Only connections of this zone.
    pub zone: Option<Zone>,
    /// Only the connection with this tuple, in its original or its reply direction.
    pub tuple: Option<Tuple>,
    /// Why, for those who ask for a connection later.
    pub why: TakenBack,
}

/// What everything in the engine shares.
pub(crate) struct Shared {
    instance: Instance,
    clock: Clock,
    limits: Limits,
    datapath: Arc<dyn Datapath>,
    publication: Arc<Publication>,
    /// The cold index: first packets and administration, never the packet path.
    conns: Zones,
    conn_count: AtomicUsize,
    next_epoch: AtomicU64,
    next_generation: AtomicU32,
    sweeps: AtomicU32,
    /// What all ports have done, also those that are gone.
    totals: Arc<Counts>,
    /// The names of the registered classes, for those who only look.
    classes: Mutex<Vec<&'static str>>,
    threads: Threads,
    admin: Mutex<Admin>,
}

impl Shared {
    fn cookie(&self, conn: &ConnHandle, direction: Direction) -> Cookie {
        Cookie { instance: self.instance, epoch: conn.epoch(), direction }
    }
}

/// What only one thread at a time may change.
#[derive(Default)]
struct Admin {
    registry: Registry,
    leaving: Vec<Arc<Port>>,
}

impl Admin {
    /// The ports that are on their way out: being deleted, or given up before their provider had come
    /// back.
    fn leaving(&mut self) -> &mut Vec<Arc<Port>> {
        self.leaving.retain(|port| !port.ended.load(Ordering::SeqCst));
        &mut self.leaving
    }
}

/// The engine. Clones are the same engine. Dropping the last clone closes nothing: the port threads
/// hold it, and rules stay where they are. Call [`close`](Engine::close).
#[derive(Clone)]
pub struct Engine(Arc<Shared>);

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("instance", &self.0.instance).finish_non_exhaustive()
    }
}

impl Engine {
    /// An engine without classes and ports. `instance` marks its rules: draw it at random.
    #[must_use]
    pub fn new(
        instance: NonZeroU32,
        datapath: Arc<dyn Datapath>,
        limits: Limits,
        clock: Clock,
    ) -> Self {
        Self(Arc::new(Shared {
            instance: Instance(instance),
            clock,
            conns: Zones::new(limits.connections),
            limits,
            datapath,
            publication: Arc::default(),
            conn_count: AtomicUsize::new(0),
            next_epoch: AtomicU64::new(1),
            next_generation: AtomicU32::new(1),
            sweeps: AtomicU32::new(0),
            totals: Arc::default(),
            classes: Mutex::default(),
            threads: Threads::default(),
            admin: Mutex::default(),
        }))
    }

    /// What marks this engine's rules.
    #[must_use]
    pub fn instance(&self) -> Instance {
        self.0.instance
    }

    /// The engine's clock.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        self.0.clock.now_ms()
    }

    fn admin(&self) -> MutexGuard<'_, Admin> {
        self.0.admin.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- classes ----

    /// Registers a class; its priority is below those registered before.
    ///
    /// # Errors
    /// A duplicate name, or a failing `init`: then it is not registered.
    pub fn register(&self, class: Arc<dyn ProviderClass>) -> Result<(), RegistryError> {
        let mut admin = self.admin();
        admin.registry.register(class)?;
        *self.class_names() = admin.registry.names();
        Ok(())
    }

    fn class_names(&self) -> MutexGuard<'_, Vec<&'static str>> {
        self.0.classes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Unregisters a class and calls its `deinit`.
    ///
    /// # Errors
    /// While a port is bound to it, or was and its provider has not come back yet, and when there is no such class.
    pub fn unregister(&self, name: &str) -> Result<(), RegistryError> {
        let mut admin = self.admin();
        let table = self.0.publication.table();
        let uses = |p: &&Arc<Port>| p.binding.as_ref().is_some_and(|b| b.class == name);
        if let Some(port) = table.iter().chain(admin.leaving().iter()).find(uses) {
            return Err(RegistryError::InUse {
                class: name.to_owned(),
                port: port.netdev.name.clone(),
            });
        }
        admin.registry.unregister(name)?;
        *self.class_names() = admin.registry.names();
        Ok(())
    }

    /// A view of the ports for one more packet thread.
    #[must_use]
    pub fn worker(&self) -> Worker {
        Worker::new(Arc::clone(&self.0.publication))
    }
}
