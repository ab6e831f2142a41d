//! Ports: netdevs attached to the engine, each bound to one provider for its whole life.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use netdev_providers::{
    Cookie, Direction, Fault, Generation, Ifindex, Netdev, Provider, Reason, Rejection, RuleId,
    RuleReport,
};

use super::Limits;
use super::capacity::Capacity;
use super::conn::ConnHandle;
use super::contain::contained;
use super::counters::{Counts, PortCounters};
use super::datapath::Work;
use super::held::Held;
use super::lines::Lines;
use super::paths::Paths;
use super::progress::{Progress, Slow};
use super::queue::Queue;
use super::shapes::{Shape, Shapes};

/// Why the class of a port is the one that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chosen {
    /// The first of the port's list that accepts.
    Listed,
    /// Without a list: the first whose rules the NIC carries.
    InHardware,
    /// Without a list: the first that accepts, since no NIC carries rules, or none is to.
    First,
}

/// Why an earlier class did not bind a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Which class.
    pub class: &'static str,
    /// In its own words; `in hardware: ...` where it was asked only for what a NIC carries.
    pub why: String,
}

/// The class that bound a port, and what it made.
pub(super) struct Binding {
    pub class: &'static str,
    pub chosen: Chosen,
    pub provider: Arc<dyn Provider>,
}

/// What a provider reported of its rules.
pub(super) struct Dump {
    /// When it was asked.
    pub(super) started_ms: u64,
    pub(super) reports: Vec<RuleReport>,
    pub(super) result: Result<(), Fault>,
}

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
    /// It was stopped: nobody calls its provider any more.
    pub ended: AtomicBool,
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
    paths: Mutex<Paths>,
    shapes: Mutex<Shapes>,
    /// Log lines about its rules.
    pub lines: Lines,
}

impl Port {
    pub(super) fn new(
        netdev: Netdev,
        binding: Option<Binding>,
        refusals: Vec<Refusal>,
        contemporaries: impl Iterator<Item = Generation>,
        limits: &Limits,
        capacity: Option<u32>,
        all: Arc<Counts>,
    ) -> Self {
        let mut contemporaries: Box<[_]> = contemporaries.collect();
        contemporaries.sort_unstable();
        let generation = netdev.generation;
        Self {
            netdev,
            binding,
            refusals,
            queue: Queue::new(limits.queue),
            counters: PortCounters::new(all),
            rules: AtomicU64::new(0),
            capacity: Capacity::new(capacity),
            swept_ms: AtomicU64::new(0),
            progress: Progress::new(limits.complete),
            draining: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            swept: AtomicBool::new(false),
            late_dump: Mutex::default(),
            guests: AtomicUsize::new(0),
            contemporaries,
            held: Mutex::new(Held::new(generation)),
            fault: Mutex::default(),
            adopted: Mutex::default(),
            paths: Mutex::default(),
            shapes: Mutex::default(),
            lines: Lines::default(),
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

    /// The same for who goes on without an answer: one that panics makes its port faulty.
    pub(super) fn ask<R>(&self, call: impl FnOnce(&dyn Provider) -> R) -> Option<R> {
        match self.visit(call)? {
            Ok(answer) => Some(answer),
            Err(panicked) => {
                self.set_fault(panicked);
                None
            }
        }
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

    /// All that it holds. Whoever is not through waits for a part of it at most to be copied.
    pub(super) fn all_held(&self) -> Vec<(ConnHandle, Direction)> {
        let mut all = Vec::new();
        self.walk_held(|part| all.extend(part));
        all
    }

    /// Shows all that it holds, in parts, behind no lock. What is held all the time is shown; it may be shown
    /// twice.
    pub(super) fn walk_held(&self, mut show: impl FnMut(Vec<(ConnHandle, Direction)>)) {
        let mut walk = self.held().walk();
        loop {
            // The lock is not held behind this.
            let part = self.held().next_part(&mut walk);
            match part {
                Some(part) => show(part),
                None => return,
            }
        }
    }

    /// The paths that its rules were made for.
    pub(super) fn paths(&self) -> MutexGuard<'_, Paths> {
        self.paths.lock().unwrap_or_else(PoisonError::into_inner)
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
        if let Some(rejection) = self.shapes().refused(&Shape::of_work(work)) {
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

    /// What the backend does not take, whatever the addresses are.
    pub(super) fn shapes(&self) -> MutexGuard<'_, Shapes> {
        self.shapes.lock().unwrap_or_else(PoisonError::into_inner)
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
