//! Ports: netdevs attached to the engine, each bound to one provider for its whole life.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use netdev_providers::{
    Cookie, Direction, Epoch, Fault, Flow, Generation, Ifindex, L4Proto, Netdev, Provider, Reason,
    Rejection, RuleId, RuleReport, Tracked, Tuple,
};

use super::Limits;
use super::capacity::Capacity;
use super::conn::ConnHandle;
use super::contain::contained;
use super::datapath::Work;
use super::latency::Latencies;
use super::progress::{Progress, Slow};
use super::queue::Queue;

/// Why an earlier class did not bind a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Which class.
    pub class: &'static str,
    /// In its own words.
    pub why: String,
}

/// The class that bound a port, and what it made.
pub(super) struct Binding {
    pub class: &'static str,
    pub provider: Arc<dyn Provider>,
}

/// Counts of one port. Relaxed: each is read by itself, for people.
#[derive(Debug, Default)]
pub(super) struct PortCounters {
    pub sights: AtomicU64,
    pub adds: AtomicU64,
    pub deletes: AtomicU64,
    /// Rules that gave way to those of busier connections.
    pub evictions: AtomicU64,
    /// Traffic of rules that are gone.
    pub past_packets: AtomicU64,
    pub past_bytes: AtomicU64,
    pub latencies: Latencies,
    reasons: ReasonCounters,
}

/// One counter per reason code.
struct ReasonCounters([AtomicU64; 64]);

impl Default for ReasonCounters {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl fmt::Debug for ReasonCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReasonCounters")
    }
}

impl PortCounters {
    pub(super) fn count(&self, reason: Reason) {
        if let Some(c) = self.reasons.0.get(usize::from(reason as u8)) {
            c.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Traffic of a rule that is gone.
    pub(super) fn past(&self, packets: u64, bytes: u64) {
        self.past_packets.fetch_add(packets, Ordering::Relaxed);
        self.past_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn reasons(&self) -> Vec<(Reason, u64)> {
        Reason::ALL
            .iter()
            .filter_map(|&r| {
                let n = self.reasons.0.get(usize::from(r as u8))?.load(Ordering::Relaxed);
                (n > 0).then_some((r, n))
            })
            .collect()
    }
}

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

    fn leads_to(&self, egress: Ifindex) -> bool {
        self.by_egress.contains_key(&egress)
    }

    pub(super) fn towards(&self, egress: Ifindex) -> Vec<(ConnHandle, Direction)> {
        let keys = self.by_egress.get(&egress).into_iter().flatten();
        keys.filter_map(|key| Some((self.slots.get(key)?.clone(), key.direction()))).collect()
    }
}

/// What a provider reported of its rules.
pub(super) struct Dump {
    /// When it was asked.
    pub(super) started_ms: u64,
    pub(super) reports: Vec<RuleReport>,
    pub(super) result: Result<(), Fault>,
}

/// What a flow needs of a backend, whatever its addresses are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    ipv6: bool,
    proto: L4Proto,
    routed: bool,
    new_src: bool,
    new_dst: bool,
    new_ports: bool,
    vlan_in: bool,
    vlan_out: bool,
    /// None: it is only tracked.
    egress: Option<Ifindex>,
}

impl Shape {
    pub(super) fn of_work(work: &Work) -> Self {
        match work {
            Work::Forward(flow) => Self::of(flow),
            Work::Track(tracked) => Self::of_tracked(tracked),
        }
    }

    fn of_tracked(tracked: &Tracked) -> Self {
        let (from, to) = (&tracked.matches.tuple, &tracked.tuple);
        Self { vlan_in: tracked.matches.vlan.is_some(), ..Self::of_tuples(from, to) }
    }

    fn of_tuples(from: &Tuple, to: &Tuple) -> Self {
        Self {
            ipv6: from.is_ipv6(),
            proto: from.proto(),
            routed: false,
            new_src: from.src() != to.src(),
            new_dst: from.dst() != to.dst(),
            new_ports: (from.sport(), from.dport()) != (to.sport(), to.dport()),
            vlan_in: false,
            vlan_out: false,
            egress: None,
        }
    }

    pub(super) fn of(flow: &Flow) -> Self {
        Self {
            routed: flow.forward.macs.is_some(),
            vlan_in: flow.matches.vlan.is_some(),
            vlan_out: flow.forward.vlan.is_some(),
            egress: Some(flow.forward.egress),
            ..Self::of_tuples(&flow.matches.tuple, &flow.forward.tuple)
        }
    }
}

/// Shapes remembered per port. There are 256 for one egress netdev; beyond the bound flows are just
/// offered.
pub(super) const MAX_SHAPES: usize = 1024;

/// A netdev attached to the engine.
pub(super) struct Port {
    pub netdev: Netdev,
    pub binding: Option<Binding>,
    pub refusals: Vec<Refusal>,
    pub queue: Queue,
    pub counters: PortCounters,
    /// Rules that the provider has, or is being given, less those that are being deleted.
    pub rules: AtomicU64,
    pub capacity: Capacity,
    /// When the sweep before began.
    pub swept_ms: AtomicU64,
    /// What is with the provider, and since when nothing has come back.
    pub progress: Progress,
    /// Being deleted: nothing new is taken.
    pub draining: AtomicBool,
    /// A sweep has asked the provider and has no answer yet.
    pub swept: AtomicBool,
    /// What came back to a sweep that did not wait for it any more: for the next one.
    late_dump: Mutex<Option<Dump>>,
    /// Calls of the provider that are neither the port's thread's nor a sweep's.
    guests: AtomicUsize,
    /// The ports that lived when this one was added, sorted.
    contemporaries: Box<[Generation]>,
    held: Mutex<Held>,
    fault: Mutex<Option<String>>,
    /// The marks that adopted rules have in the backend.
    adopted: Mutex<HashMap<RuleId, Cookie>>,
    /// Shapes that the backend does not support: the negative cache. Until the next flush.
    refused_shapes: Mutex<HashMap<Shape, Rejection>>,
}

impl Port {
    pub(super) fn new(
        netdev: Netdev,
        binding: Option<Binding>,
        refusals: Vec<Refusal>,
        contemporaries: &PortTable,
        limits: &Limits,
        capacity: Option<u32>,
    ) -> Self {
        let mut contemporaries: Box<[_]> = contemporaries.iter().map(|p| p.generation()).collect();
        contemporaries.sort_unstable();
        Self {
            netdev,
            binding,
            refusals,
            queue: Queue::new(limits.queue),
            counters: PortCounters::default(),
            rules: AtomicU64::new(0),
            capacity: Capacity::new(capacity),
            swept_ms: AtomicU64::new(0),
            progress: Progress::new(limits.complete),
            draining: AtomicBool::new(false),
            swept: AtomicBool::new(false),
            late_dump: Mutex::default(),
            guests: AtomicUsize::new(0),
            contemporaries,
            held: Mutex::default(),
            fault: Mutex::default(),
            adopted: Mutex::default(),
            refused_shapes: Mutex::default(),
        }
    }

    pub(super) fn ifindex(&self) -> Ifindex {
        self.netdev.ifindex
    }

    pub(super) fn generation(&self) -> Generation {
        self.netdev.generation
    }

    pub(super) fn late_dump(&self) -> MutexGuard<'_, Option<Dump>> {
        self.late_dump.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the port of this generation was gone when this one was added.
    pub(super) fn outlives(&self, other: Generation) -> bool {
        other < self.generation() && self.contemporaries.binary_search(&other).is_err()
    }

    /// What the port is slow with, if it is.
    pub(super) fn slow(&self) -> Option<Slow> {
        let (slow, changed) = self.progress.look();
        if changed {
            match &slow {
                Some(slow) => {
                    tracing::warn!(port = %self.netdev, "{slow}; nothing is offered meanwhile")
                }
                None => tracing::info!(port = %self.netdev, "the provider has come back"),
            }
        }
        slow
    }

    /// The same where nobody may look at the time for nothing.
    pub(super) fn is_slow(&self) -> bool {
        self.progress.hint() && self.slow().is_some()
    }

    /// Calls the provider from elsewhere than the port's thread or a sweep. `None` when the port is
    /// being deleted, or has none; what it panicked with, if it did.
    pub(super) fn visit<R>(
        &self,
        call: impl FnOnce(&dyn Provider) -> R,
    ) -> Option<Result<R, String>> {
        let provider = &self.binding.as_ref()?.provider;
        // Whoever releases the provider has set `draining` and then waits for guests: one of the two
        // sees the other.
        self.guests.fetch_add(1, Ordering::SeqCst);
        let result =
            (!self.draining.load(Ordering::SeqCst)).then(|| contained(|| call(&**provider)));
        self.guests.fetch_sub(1, Ordering::SeqCst);
        result
    }

    /// Whether somebody else than the port's thread is calling the provider.
    pub(super) fn is_visited(&self) -> bool {
        self.guests.load(Ordering::SeqCst) > 0 || self.swept.load(Ordering::SeqCst)
    }

    /// Whether rules may forward into this netdev, or are about to.
    pub(super) fn may_lead_to(&self, egress: Ifindex) -> bool {
        // In the order of `is_empty`.
        let idle = || self.progress.operations.out() == 0;
        !(idle() && self.queue.is_finished() && idle()) || self.held().leads_to(egress)
    }

    pub(super) fn adopted(&self) -> MutexGuard<'_, HashMap<RuleId, Cookie>> {
        self.adopted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One rule less.
    pub(super) fn gave_up_place(&self) {
        let _ = self.rules.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
    }

    pub(super) fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True when a flush would find nothing: no slot, nothing on the way to the provider or with it.
    /// What was pushed before this call is taken into account; nobody is waited for.
    pub(super) fn is_empty(&self) -> bool {
        // A slot moves from the queue to `held`, and a rule without a slot between the provider
        // and the queue: looked at in this order, neither is missed on its way.
        let idle = || self.progress.operations.out() == 0;
        idle() && self.queue.is_finished() && idle() && self.held().is_empty() && !self.is_faulty()
    }

    /// Whether anything is offloaded on this port at all.
    pub(super) fn takes_any(&self) -> Result<(), Rejection> {
        if self.draining.load(Ordering::SeqCst) {
            return Err(Reason::Cancelled.into());
        }
        if let Some(fault) = self.fault() {
            return Err(Rejection::with_detail(Reason::ProviderFault, fault));
        }
        match self.slow() {
            Some(slow) => Err(Rejection::with_detail(Reason::ProviderSlow, slow.to_string())),
            None => Ok(()),
        }
    }

    /// Whether this would be handed to the provider: the policy check.
    pub(super) fn takes(&self, work: &Work, provider: &dyn Provider) -> Result<(), Rejection> {
        self.takes_any()?;
        // A shape that this port's backend does not take is not offered again and again.
        if let Some(rejection) = self.refused_shape(&Shape::of_work(work)) {
            return Err(rejection);
        }
        contained(|| match work {
            Work::Forward(flow) => provider.can_offload(flow),
            Work::Track(tracked) => provider.can_track(tracked),
        })
        .unwrap_or_else(|why| Err(self.panicked(why)))
    }

    /// The provider has panicked: nothing more is offloaded here.
    pub(super) fn panicked(&self, why: String) -> Rejection {
        self.set_fault(why.clone());
        Rejection::with_detail(Reason::ProviderFault, why)
    }

    fn is_faulty(&self) -> bool {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn shapes(&self) -> MutexGuard<'_, HashMap<Shape, Rejection>> {
        self.refused_shapes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why flows of this shape are not offered; `None`: they are.
    pub(super) fn refused_shape(&self, shape: &Shape) -> Option<Rejection> {
        self.shapes().get(shape).cloned()
    }

    /// Remembers a refusal that is about the shape, and not about this one flow.
    pub(super) fn note_refused_shape(&self, shape: Shape, rejection: &Rejection) {
        // An error of the firmware's (EIO, EINVAL) may be about this one rule, or this moment.
        let lasting = matches!(rejection.errno, None | Some(Errno::EOPNOTSUPP));
        if lasting && matches!(rejection.reason, Reason::Unsupported | Reason::NotInHardware) {
            let mut shapes = self.shapes();
            if shapes.len() < MAX_SHAPES {
                shapes.insert(shape, rejection.clone());
            }
        }
    }

    /// The netdev is gone or down, and may be another's when it comes back.
    pub(super) fn forget_shapes_towards(&self, egress: Ifindex) {
        self.shapes().retain(|shape, _| shape.egress != Some(egress));
    }

    /// Everything may be tried again.
    pub(super) fn forget_refused_shapes(&self) {
        self.shapes().clear();
    }

    pub(super) fn fault(&self) -> Option<String> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Marks the port faulty: offers stop. The first reason is kept.
    pub(super) fn set_fault(&self, why: String) {
        tracing::error!(port = %self.netdev, why, "port is faulty: nothing more is offloaded on it");
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Port({})", self.netdev)
    }
}

/// The ports at one moment, as workers see them. Never changed: a change makes a new table.
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
