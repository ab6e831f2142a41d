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
//! * [`conn`]: connections, and the slots on them;
//! * [`worker`]: packet threads and their view of the ports;
//! * `port`, `queue`, `writer`: a port, what is asked of it, the thread that does it;
//! * [`registry`]: provider classes;
//! * [`datapath`]: what the engine asks of the datapath;
//! * [`capacity`]: how many rules a port may have, and which give way;
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
//! | [`Worker::quiescent`], [`Worker::port`] | packet thread, once per batch | one atomic load; a search in a sorted array |
//! | [`PortRef::conn_add`](worker::PortRef::conn_add), [`conn_seen`](worker::PortRef::conn_seen), [`conn_established`](worker::PortRef::conn_established) | packet thread | no lock; a compare-and-exchange, a push; a system call when the port's thread sleeps |
//! | [`PortRef::can_offload`](worker::PortRef::can_offload) | any | a call of the provider's, two short locks |
//! | [`Engine::conn_create`], [`conn`](Engine::conn), [`conn_del`](Engine::conn_del), [`conn_retract`](Engine::conn_retract), [`slot_retract`](Engine::slot_retract) | any | a lock of one shard of the index, one of each slot that holds something; never waits for a provider |
//! | [`Engine::conn_update`], [`slots`](Engine::slots) | any, not on the way of packets | a lock of each slot |
//! | [`Engine::ports`], [`conns`](Engine::conns), [`classes`](Engine::classes) | any, not on the way of packets | as much as there is to tell of |
//! | [`Engine::port_add`], [`port_del`](Engine::port_del), [`register`](Engine::register), [`unregister`](Engine::unregister), [`close`](Engine::close) | administration: one at a time, others wait | **blocks**, bounded by [`Limits`] where it waits for workers and providers |
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
//! wrong is kept by the port ([`view::PortView::fault`]). No call panics.

pub mod capacity;
pub mod clock;
pub mod conn;
mod contain;
pub mod datapath;
mod doubt;
pub mod latency;
mod port;
mod queue;
pub mod reconcile;
pub mod registry;
pub mod slot;
mod sync;
pub mod usage;
pub mod view;
pub mod worker;
mod writer;

#[cfg(test)]
#[cfg(ctoffload_loom)]
mod models;
#[cfg(test)]
#[cfg(not(ctoffload_loom))]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use netdev_providers::{
    BindError, Cookie, Direction, Epoch, Fault, Generation, HwFlags, Ifindex, Instance, Netdev,
    ProviderClass, Tuple, Zone,
};

use self::clock::Clock;
use self::conn::{ConnHandle, ConnKey};
use self::contain::contained;
use self::datapath::Datapath;
use self::port::{Binding, Port, Refusal};
use self::queue::{Command, Stopped};
use self::registry::{Registry, RegistryError};
use self::slot::Unwind;
use self::worker::{Publication, Worker};

/// The name that stands for "no provider" in a list of classes.
pub const NO_PROVIDER: &str = "none";

/// Bounds of an engine.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections kept.
    pub connections: usize,
    /// Offers waiting per port.
    pub queue: usize,
    /// How long a port-delete waits for each of: the workers, the port's own flush, the deletes on
    /// other ports.
    pub port_del: Duration,
    /// How long a provider may take for what it was given, before a flush goes on without it and
    /// the port is marked faulty.
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
    /// The classes to try, in this order; `None`: all, by priority. `["none"]`: no provider.
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
}

/// What everything in the engine shares.
pub(crate) struct Shared {
    instance: Instance,
    clock: Clock,
    limits: Limits,
    datapath: Arc<dyn Datapath>,
    publication: Arc<Publication>,
    /// The cold index: first packets and administration, never the packet path.
    by_key: DashMap<ConnKey, ConnHandle, ahash::RandomState>,
    conn_count: AtomicUsize,
    next_epoch: AtomicU64,
    next_generation: AtomicU32,
    sweeps: AtomicU32,
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
    writers: HashMap<Generation, JoinHandle<()>>,
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
            limits,
            datapath,
            publication: Arc::default(),
            by_key: DashMap::with_hasher(ahash::RandomState::new()),
            conn_count: AtomicUsize::new(0),
            next_epoch: AtomicU64::new(1),
            next_generation: AtomicU32::new(1),
            sweeps: AtomicU32::new(0),
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
        self.admin().registry.register(class)
    }

    /// Unregisters a class and calls its `deinit`.
    ///
    /// # Errors
    /// While a port is bound to it, and when there is no such class.
    pub fn unregister(&self, name: &str) -> Result<(), RegistryError> {
        let mut admin = self.admin();
        let table = self.0.publication.table();
        let user = table.iter().find(|p| p.binding.as_ref().is_some_and(|b| b.class == name));
        if let Some(port) = user {
            return Err(RegistryError::InUse {
                class: name.to_owned(),
                port: port.netdev.name.clone(),
            });
        }
        admin.registry.unregister(name)
    }

    // ---- ports ----

    /// Attaches a netdev and binds it, for its whole life, to the first class that accepts it. When
    /// none does, the port is attached without a provider and its refusals are kept.
    ///
    /// # Errors
    /// [`PortAddError`]; nothing has changed then.
    pub fn port_add(&self, new: NewPort) -> Result<Generation, PortAddError> {
        let mut admin = self.admin();
        let table = self.0.publication.table();
        if let Some(port) = table.get(new.ifindex) {
            let provider = port.binding.as_ref().map_or(NO_PROVIDER, |b| b.class);
            return Err(PortAddError::AlreadyBound {
                name: port.netdev.name.clone(),
                provider: provider.to_owned(),
            });
        }
        let classes = match &new.providers {
            Some(names) if names.iter().any(|n| n == NO_PROVIDER) => Vec::new(),
            names => admin.registry.select(names.as_deref())?,
        };
        // 2^32 port-adds without a restart do not happen; if they did, 0 would be skipped.
        let generation = loop {
            let n = self.0.next_generation.fetch_add(1, Ordering::Relaxed);
            if let Some(g) = Generation::new(n) {
                break g;
            }
        };
        let netdev =
            Netdev { ifindex: new.ifindex, generation, name: new.name, hw_flags: new.hw_flags };
        let mut refusals = Vec::new();
        let binding = classes.iter().find_map(|class| {
            let why = match contained(|| class.bind(&netdev, self.0.instance)) {
                Ok(Ok(provider)) => return Some(Binding { class: class.name(), provider }),
                Ok(Err(BindError::Declined(why))) | Err(why) => why,
                Ok(Err(BindError::Failed(fault))) => fault.to_string(),
            };
            tracing::info!(port = %netdev, class = class.name(), why, "not bound");
            refusals.push(Refusal { class: class.name(), why });
            None
        });
        let port =
            Arc::new(Port::new(netdev, binding, refusals, self.0.limits.queue, new.capacity));
        if let Some(binding) = &port.binding {
            // Before any offer: what a dead engine left may have the same match.
            port.queue.push(Command::Reconcile(None));
            let writer = writer::Writer::new(
                Arc::clone(&port),
                Arc::clone(&binding.provider),
                Arc::clone(&self.0),
            );
            let thread = std::thread::Builder::new()
                .name(format!("port-{}", port.netdev.name))
                .spawn(move || writer.run());
            match thread {
                Ok(handle) => admin.writers.insert(generation, handle),
                Err(e) => {
                    let released = contained(|| binding.provider.release());
                    if let Ok(Err(fault)) | Err(fault) = released.map_err(Fault::new) {
                        tracing::warn!(port = %port.netdev, "release: {fault}");
                    }
                    return Err(PortAddError::Thread(e));
                }
            };
        }
        tracing::info!(
            port = %port.netdev,
            provider = port.binding.as_ref().map_or(NO_PROVIDER, |b| b.class),
            "port added"
        );
        self.0.publication.publish(table.with(port));
        Ok(generation)
    }

    /// Removes what engines that died have left on a netdev that is not a port. Blocks.
    pub fn clear_leftovers(&self, ifindex: Ifindex) {
        let admin = self.admin();
        if self.0.publication.table().get(ifindex).is_some() {
            return;
        }
        for class in admin.registry.select(None).unwrap_or_default() {
            let cleared = contained(|| class.clear_leftovers(ifindex));
            match cleared.unwrap_or_else(|panicked| Err(Fault::new(panicked))) {
                Ok(0) => {}
                Ok(rules) => {
                    tracing::info!(%ifindex, class = class.name(), rules, "left by a dead engine: removed");
                }
                Err(fault) => {
                    tracing::warn!(%ifindex, class = class.name(), "leftovers of a dead engine: {fault}");
                }
            }
        }
    }

    /// Deletes a port: no worker offers on it any more, rules on other ports that forward into it
    /// go, its own rules go, the provider is released. Blocks, within the bounds of
    /// [`Limits::port_del`]; touches no other connection's rules.
    ///
    /// The deletes on other ports are started before this port's own flush, because a rule that
    /// redirects into a netdev that is gone drops packets, while the flushed port only slows them;
    /// they are repeated once no worker can offer towards the netdev any more. A datapath that
    /// gives paths itself ([`PathSpec::Known`](datapath::PathSpec::Known)) must have stopped to
    /// choose this egress by the next quiescent state of each worker.
    ///
    /// # Errors
    /// When there is no such port.
    pub fn port_del(&self, ifindex: Ifindex) -> Result<PortDeleted, NoSuchPort> {
        let mut admin = self.admin();
        let table = self.0.publication.table();
        let port = Arc::clone(table.get(ifindex).ok_or(NoSuchPort(ifindex))?);
        port.draining.store(true, Ordering::SeqCst);
        let rest = table.without(port.generation());
        let others = start_retract(rest.iter(), ifindex);
        let version = self.0.publication.publish(rest);
        let at_most = self.0.limits.port_del;
        let mut deleted = PortDeleted::default();
        if !self.0.publication.wait(version, at_most) {
            tracing::warn!(port = %port.netdev, "a worker has not passed a quiescent state in {at_most:?}");
        }
        // A worker that was in the middle of a batch may have offered towards this netdev behind
        // the first retraction; none does any more.
        let table = self.0.publication.table();
        let late = start_retract(table.iter(), ifindex);
        if let Some(handle) = admin.writers.remove(&port.generation()) {
            let (tx, rx) = mpsc::channel();
            port.queue.push(Command::Stop(tx));
            match rx.recv_timeout(at_most + at_most) {
                Ok(Stopped { flushed, faults }) => {
                    deleted.flushed = flushed;
                    deleted.faults = faults;
                    let _ = handle.join();
                }
                Err(_) => deleted.faults.push(Fault::new(format!(
                    "{}: the provider did not finish in time; it is abandoned",
                    port.netdev
                ))),
            }
        }
        deleted.retracted = collect(others, at_most) + collect(late, at_most);
        tracing::info!(
            port = %port.netdev,
            flushed = deleted.flushed,
            retracted = deleted.retracted,
            "port deleted"
        );
        Ok(deleted)
    }

    /// Deletes every port, and all connections.
    pub fn close(&self) -> Vec<PortDeleted> {
        let ports: Vec<_> = self.0.publication.table().iter().map(|p| p.ifindex()).collect();
        let deleted = ports.into_iter().filter_map(|i| self.port_del(i).ok()).collect();
        self.0.by_key.iter().for_each(|c| {
            c.end();
        });
        self.0.by_key.clear();
        self.0.conn_count.store(0, Ordering::Relaxed);
        deleted
    }

    /// Removes the rules of all ports that forward into this netdev (a port or not), because it is
    /// gone or down. Blocks until they are gone; returns how many there were.
    pub fn retract_egress(&self, egress: Ifindex) -> u64 {
        let table = self.0.publication.table();
        collect(start_retract(table.iter(), egress), self.0.limits.port_del)
    }

    /// A view of the ports for one more packet thread.
    #[must_use]
    pub fn worker(&self) -> Worker {
        Worker::new(Arc::clone(&self.0.publication))
    }

    // ---- connections ----

    /// The connection of this key; made when there is none. `None` when as many are kept as may be.
    ///
    /// `tag` is the datapath's own mark. A connection of the same key and another tag is a
    /// predecessor whose end was missed: it is ended now, and a new one, with a new epoch, made.
    #[must_use]
    pub fn conn_create(&self, key: ConnKey, reply: Tuple, tag: u64) -> Option<ConnHandle> {
        let (conn, old) = match self.0.by_key.entry(key) {
            Entry::Occupied(e) if e.get().tag() == tag && !e.get().is_dead() => {
                return Some(e.get().clone());
            }
            Entry::Occupied(mut e) => {
                let conn = self.new_conn(key, reply, tag);
                let old = e.insert(conn.clone());
                (conn, Some(old))
            }
            Entry::Vacant(e) => {
                if self.0.conn_count.fetch_add(1, Ordering::Relaxed) >= self.0.limits.connections {
                    self.0.conn_count.fetch_sub(1, Ordering::Relaxed);
                    return None;
                }
                let conn = self.new_conn(key, reply, tag);
                e.insert(conn.clone());
                (conn, None)
            }
        };
        if let Some(old) = old {
            self.conn_del(&old);
        }
        Some(conn)
    }

    fn new_conn(&self, key: ConnKey, reply: Tuple, tag: u64) -> ConnHandle {
        let epoch = Epoch(self.0.next_epoch.fetch_add(1, Ordering::Relaxed));
        ConnHandle::new(key, reply, epoch, tag, self.0.clock.now_ms())
    }

    /// The living connection of this key.
    #[must_use]
    pub fn conn(&self, key: &ConnKey) -> Option<ConnHandle> {
        self.0.by_key.get(key).map(|c| c.clone())
    }

    /// All living connections, as of some moment during the call.
    #[must_use]
    pub fn conns(&self) -> Vec<ConnHandle> {
        self.0.by_key.iter().map(|c| c.clone()).collect()
    }

    /// How many connections live.
    #[must_use]
    pub fn conn_count(&self) -> usize {
        self.0.conn_count.load(Ordering::Relaxed)
    }

    /// The connection has ended: deletes its rules, on the ports that hold something of it and no
    /// others. Does not wait for them; returns how many there were.
    pub fn conn_del(&self, conn: &ConnHandle) -> usize {
        if !conn.end() {
            return 0;
        }
        if self.0.by_key.remove_if(conn.key(), |_, c| c.is_same(conn)).is_some() {
            self.0.conn_count.fetch_sub(1, Ordering::Relaxed);
        }
        let table = self.0.publication.table();
        conn.all_slots().filter(|(d, g, _)| self.unwind_slot(&table, conn, *d, *g)).count()
    }

    /// Takes the connection off the hardware: deletes its rules; it lives on in software, and the
    /// next packet on each port offers it again. Returns how many rules there were.
    pub fn conn_retract(&self, conn: &ConnHandle) -> usize {
        let table = self.0.publication.table();
        conn.all_slots().filter(|(d, g, _)| self.unwind_slot(&table, conn, *d, *g)).count()
    }

    /// The same for one slot, because what its rule was made from has changed. True when there was
    /// something.
    pub fn slot_retract(&self, conn: &ConnHandle, d: Direction, port: Generation) -> bool {
        self.unwind_slot(&self.0.publication.table(), conn, d, port)
    }

    fn unwind_slot(
        &self,
        table: &port::PortTable,
        conn: &ConnHandle,
        d: Direction,
        generation: Generation,
    ) -> bool {
        // The slots of a port that is gone have been reset by its flush.
        let Some(port) = table.by_generation(generation) else { return false };
        match writer::unwind(port, conn, d) {
            Unwind::Delete => {
                port.queue.push(Command::Delete(conn.clone(), d));
                true
            }
            Unwind::Cancelling => true,
            Unwind::Reopened => {
                if !conn.is_dead() {
                    port.queue.push(Command::Rearm(conn.clone(), d));
                }
                false
            }
            Unwind::Nothing => false,
        }
    }

    // ---- flush ----

    /// Removes rules; the connections live on in software, and come back when they are seen again.
    /// Without a zone or a tuple, ports are flushed as a whole, in a few messages each. Blocks until
    /// the rules are gone; returns how many there were on each port that had some.
    ///
    /// # Errors
    /// When there is no such port.
    pub fn flush(&self, filter: &FlushFilter) -> Result<Vec<(Netdev, u64)>, NoSuchPort> {
        let table = self.0.publication.table();
        let ports: Vec<&Arc<Port>> = match filter.port {
            Some(ifindex) => vec![table.get(ifindex).ok_or(NoSuchPort(ifindex))?],
            None => table.iter().collect(),
        };
        let ports = ports.into_iter().filter(|p| p.binding.is_some());
        let at_most = self.0.limits.port_del * 2;
        let counts: Vec<(Netdev, u64)> = if filter.zone.is_none() && filter.tuple.is_none() {
            let asked: Vec<_> = ports
                .inspect(|p| p.forget_refused_shapes())
                .filter(|p| !p.is_empty())
                .map(|p| (p, ask(p, Command::Flush)))
                .collect();
            asked
                .into_iter()
                .map(|(p, answer)| (p.netdev.clone(), collect(vec![answer], at_most)))
                .collect()
        } else {
            let conns = self.conns();
            let matching: Vec<_> = conns
                .iter()
                .filter(|c| filter.zone.is_none_or(|z| z == c.key().zone))
                .filter(|c| filter.tuple.is_none_or(|t| t == c.key().original || t == *c.reply()))
                .collect();
            let unwound: Vec<_> = ports
                .map(|p| {
                    let slots = matching.iter().flat_map(|c| {
                        Direction::BOTH.map(|d| self.unwind_slot(&table, c, d, p.generation()))
                    });
                    let count = slots.filter(|had| *had).count() as u64;
                    (p, count, ask(p, Command::Barrier))
                })
                .collect();
            // An add that was in flight is followed by its delete when it completes: once behind
            // the first barrier, so that it is behind a second one that everything has gone.
            let settled: Vec<_> = unwound
                .into_iter()
                .map(|(p, count, answer)| {
                    collect(vec![answer], at_most);
                    (p, count, ask(p, Command::Barrier))
                })
                .collect();
            settled
                .into_iter()
                .map(|(p, count, answer)| {
                    collect(vec![answer], at_most);
                    (p.netdev.clone(), count)
                })
                .collect()
        };
        Ok(counts.into_iter().filter(|(_, n)| *n > 0).collect())
    }
}

/// Of whom something was asked, and where the answer comes.
type Answer = (Arc<Port>, Receiver<u64>);

fn start_retract<'a>(ports: impl Iterator<Item = &'a Arc<Port>>, egress: Ifindex) -> Vec<Answer> {
    ports
        .filter(|p| p.binding.is_some())
        .map(|p| ask(p, |tx| Command::Retract(egress, tx)))
        .collect()
}

fn ask(port: &Arc<Port>, command: impl FnOnce(mpsc::Sender<u64>) -> Command) -> Answer {
    let (tx, rx) = mpsc::channel();
    port.queue.push(command(tx));
    (Arc::clone(port), rx)
}

/// A port that does not answer within the time has a provider that does not come back: it is
/// marked faulty.
fn collect(answers: Vec<Answer>, at_most: Duration) -> u64 {
    let deadline = Instant::now() + at_most;
    let left = || deadline.saturating_duration_since(Instant::now());
    answers
        .into_iter()
        .filter_map(|(port, rx)| match rx.recv_timeout(left()) {
            Ok(n) => Some(n),
            Err(RecvTimeoutError::Timeout) => {
                port.set_fault(format!("the provider has not come back within {at_most:?}"));
                None
            }
            // The port was deleted meanwhile, and everything with it.
            Err(RecvTimeoutError::Disconnected) => None,
        })
        .sum()
}
