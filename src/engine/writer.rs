//! The writer of one port: the thread that takes what workers queued, has it prepared and carried
//! out by the provider, and follows up what completes.
//!
//! Order: commands are taken first in, first out, and operations are submitted in that order, so
//! the delete of an old rule precedes the add of a new one with the same match. A slot's word and
//! its detail change together under the detail's lock.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use netdev_providers::{
    Cookie, Direction, Done, Fault, Flow, Leftover, Observed, Operation, Outcome, Permanence,
    Provider, Reason, Rejection, Request, Ticket,
};

use super::capacity::{Candidate, Pace, Place};
use super::conn::{ConnClaim, ConnHandle, Detail, Moment, PathTaken, Slot};
use super::contain::contained;
use super::datapath::{Path, PathSpec, Sight, SlotChange, flow};
use super::latency::OpKind;
use super::port::{Port, Shape};
use super::queue::{Command, Stopped};
use super::reconcile::{self, Found, Recognised, Reconciled, Tally};
use super::slot::{AfterAdd, OpNumber, SlotState, Unwind};
use super::{Engine, Shared};

/// Operations handed to the provider at once. Large enough to fill a few sends, small enough that a
/// delete does not wait long behind it.
const BATCH: usize = 256;
/// First pause after a transient refusal; doubles with each, up to [`RETRY_MAX_MS`].
const RETRY_MIN_MS: u64 = 100;
const RETRY_MAX_MS: u64 = 30_000;
/// Deletes that fail are repeated this often before the port is called faulty.
const DELETE_ATTEMPTS: u16 = 6;

pub(super) struct Writer {
    port: Arc<Port>,
    provider: Arc<dyn Provider>,
    shared: Arc<Shared>,
    timers: BinaryHeap<Reverse<Timer>>,
    rearm: Vec<Sight>,
}

/// Something to be looked at again: a rejected slot, or a delete that failed.
struct Timer {
    at_ms: u64,
    conn: ConnHandle,
    direction: Direction,
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        self.at_ms == other.at_ms
    }
}
impl Eq for Timer {}
impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timer {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at_ms.cmp(&other.at_ms)
    }
}

/// An operation on its way to the provider.
enum Staged {
    Add { sight: Sight, op: OpNumber, path: Path, flow: Box<Flow>, found: Option<Found> },
    Other(Operation),
}

impl Writer {
    pub(super) fn new(port: Arc<Port>, provider: Arc<dyn Provider>, shared: Arc<Shared>) -> Self {
        Self { port, provider, shared, timers: BinaryHeap::new(), rearm: Vec::new() }
    }

    /// Runs until [`Command::Stop`].
    pub(super) fn run(mut self) {
        self.port.queue.set_writer();
        let mut staged = Vec::new();
        loop {
            let mut taken = 0;
            while taken < BATCH
                && let Some(command) = self.port.queue.pop()
            {
                taken += 1;
                match command {
                    Command::Stop(answer) => {
                        self.submit(&mut staged);
                        let _ = answer.send(self.stop());
                        return;
                    }
                    Command::Flush(answer) => {
                        self.submit(&mut staged);
                        let flushed = self.flush();
                        self.tell_rearm();
                        let _ = answer.send(flushed);
                    }
                    Command::Repair => {
                        self.submit(&mut staged);
                        if let Err(panicked) = self.guarded(|p| p.submit(Vec::new())) {
                            tracing::error!(port = %self.port.netdev, "repair: {panicked}");
                        }
                    }
                    Command::Reconcile(answer) => {
                        self.submit(&mut staged);
                        let reconciled = self.reconcile(&mut staged);
                        self.tell_rearm();
                        if let Some(answer) = answer {
                            let _ = answer.send(reconciled);
                        }
                    }
                    Command::Barrier(answer) => {
                        self.submit(&mut staged);
                        self.settle();
                        self.tell_rearm();
                        let _ = answer.send(0);
                    }
                    Command::Retract(egress, answer) => {
                        self.submit(&mut staged);
                        let _ = answer.send(self.retract(egress, &mut staged));
                    }
                    other => self.stage(other, &mut staged),
                }
            }
            self.submit(&mut staged);
            self.port.queue.finished(taken);
            let next = self.run_timers(&mut staged);
            self.submit(&mut staged);
            self.tell_rearm();
            if taken == 0 {
                self.port.queue.park(next);
            }
        }
    }

    fn stage(&mut self, command: Command, staged: &mut Vec<Staged>) {
        match command {
            Command::Add(conn, d, path) => self.stage_add(&conn, d, path, None, staged),
            Command::Delete(conn, d) => self.stage_delete(&conn, d, staged),
            Command::Established(conn, d) => self.stage_established(conn, d, staged),
            Command::Rejected(conn, d) => self.arm_retry(conn, d),
            Command::Rearm(conn, d) => self.push_rearm(conn, d),
            Command::DeleteRule(rule, cookie) => {
                let port = Arc::clone(&self.port);
                staged.push(Staged::Other(self.operation(
                    Request::Delete { rule, cookie },
                    move |outcome| {
                        if let Err(e) = outcome {
                            tracing::warn!(port = %port.netdev, %cookie, "stray rule not deleted: {e}");
                        }
                    },
                )));
            }
            Command::Barrier(_)
            | Command::Reconcile(_)
            | Command::Repair
            | Command::Flush(_)
            | Command::Retract(..)
            | Command::Stop(_) => {
                unreachable!("handled by run")
            }
        }
    }

    fn slot<'a>(&self, conn: &'a ConnHandle, d: Direction) -> Option<&'a Slot> {
        conn.slot(self.port.generation(), d)
    }

    fn sight(&self, conn: ConnHandle, direction: Direction) -> Sight {
        Sight { ifindex: self.port.ifindex(), generation: self.port.generation(), conn, direction }
    }

    fn push_rearm(&mut self, conn: ConnHandle, d: Direction) {
        // The datapath forgets an ended connection by itself.
        if !conn.is_dead() {
            let sight = self.sight(conn, d);
            self.rearm.push(sight);
        }
    }

    fn stage_add(
        &mut self,
        conn: &ConnHandle,
        d: Direction,
        spec: PathSpec,
        found: Option<Found>,
        staged: &mut Vec<Staged>,
    ) {
        let Some(slot) = self.slot(conn, d) else { return };
        let op = {
            let detail = slot.detail();
            let Some(op) = slot.word.dispatch_add() else {
                drop(detail);
                self.push_rearm(conn.clone(), d);
                if let Some(found) = &found {
                    self.remove_found(found, staged);
                }
                return;
            };
            self.port.held().insert(conn.clone(), d);
            op
        };
        let sight = self.sight(conn.clone(), d);
        let ready = self.path_and_flow(&sight, spec).and_then(|ready| {
            // What is there already has its place.
            if found.is_none() {
                self.make_room(slot, staged)?;
            }
            Ok(ready)
        });
        match ready {
            Ok((path, flow)) => {
                self.port.rules.fetch_add(1, Ordering::SeqCst);
                {
                    let mut detail = slot.detail();
                    detail.path = Some(taken(&path, &flow));
                    self.port.held().set_egress(conn, d, path.forward.egress);
                }
                staged.push(Staged::Add { sight, op, path, flow, found });
            }
            Err(rejection) => {
                if let Some(found) = &found {
                    self.remove_found(found, staged);
                }
                settle_refused(&self.shared, &self.port, conn, d, op, rejection);
            }
        }
    }

    fn remove_found(&self, found: &Found, staged: &mut Vec<Staged>) {
        staged.push(Staged::Other(self.removal(&found.leftover, &found.tally)));
    }

    fn removal(&self, leftover: &Leftover, tally: &Arc<Tally>) -> Operation {
        let operation = |request, then| self.operation(request, then);
        reconcile::removal(leftover, operation, Arc::clone(&self.port), Arc::clone(tally))
    }

    /// Adopts or removes what engines that died have left.
    fn reconcile(&mut self, staged: &mut Vec<Staged>) -> Reconciled {
        self.settle();
        let fault = |fault| Reconciled { fault: Some(fault), ..Reconciled::default() };
        let observed = match self.guarded(|p| p.observe()) {
            Ok(Ok(observed)) => observed,
            Ok(Err(e)) => {
                tracing::warn!(port = %self.port.netdev, "reconciliation: {e}");
                return fault(e);
            }
            Err(panicked) => return fault(Fault::new(panicked.to_string())),
        };
        let Observed { leftovers, foreign } = observed;
        let engine = Engine(Arc::clone(&self.shared));
        let create = |key, reply, tag| engine.conn_create(key, reply, tag);
        let recognised = if leftovers.is_empty() {
            Vec::new()
        } else {
            self.shared.datapath.recognise(&self.port.netdev, &leftovers, &create)
        };
        let mut recognised = recognised.into_iter();
        let tally = Arc::new(Tally::default());
        for leftover in leftovers {
            let claimed = recognised.next().flatten().filter(|r| {
                // Another rule may be there or on its way already, or this one twice.
                matches!(r.conn.claim(self.port.generation(), r.direction), ConnClaim::Won(_))
            });
            match claimed {
                Some(Recognised { conn, direction, path }) => {
                    let found = Found { leftover, tally: Arc::clone(&tally) };
                    self.stage_add(&conn, direction, path, Some(found), staged);
                }
                None => staged.push(Staged::Other(self.removal(&leftover, &tally))),
            }
            if staged.len() >= BATCH {
                self.submit(staged);
            }
        }
        self.submit(staged);
        self.settle();
        let (adopted, removed) = tally.counts();
        if adopted + removed > 0 {
            tracing::info!(port = %self.port.netdev, adopted, removed, foreign, "reconciled");
        }
        Reconciled { adopted, removed, foreign, fault: None }
    }

    /// Finds a place for the rule of this slot on a port that may be full.
    fn make_room(&mut self, slot: &Slot, staged: &mut Vec<Staged>) -> Result<(), Rejection> {
        let now = self.shared.clock.now_ms();
        let newcomer = {
            let mut detail = slot.detail();
            let pace = Pace::of(1, now.saturating_sub(detail.used_ms));
            match detail.attempts {
                // Never refused: nothing is known of it.
                0 => Pace::UNKNOWN,
                1 => {
                    detail.pace = pace;
                    Pace::UNKNOWN
                }
                _ => {
                    detail.pace = detail.pace.min(pace);
                    detail.pace
                }
            }
        };
        loop {
            let rules = self.port.rules.load(Ordering::SeqCst);
            let Candidate { conn, direction: d, used_ms, .. } =
                match self.port.capacity.place(rules, newcomer, now) {
                    Place::Free => return Ok(()),
                    Place::None(rejection) => return Err(rejection),
                    Place::Of(candidate) => candidate,
                };
            // It may have gone, or have been replaced, since the sweep.
            let stands = self.slot(&conn, d).is_some_and(|s| {
                let detail = s.detail();
                s.word.load().state() == SlotState::Installed && detail.used_ms == used_ms
            });
            if stands && unwind(&self.port, &conn, d) == Unwind::Delete {
                tracing::debug!(port = %self.port.netdev, %conn, %d, "gives way");
                self.port.counters.evictions.fetch_add(1, Ordering::Relaxed);
                self.stage_delete(&conn, d, staged);
            }
        }
    }

    fn path_and_flow(&self, sight: &Sight, spec: PathSpec) -> Result<(Path, Box<Flow>), Rejection> {
        self.port.takes_any()?;
        let path = match spec {
            PathSpec::Known(path) => *path,
            PathSpec::Resolve(hint) => self.shared.datapath.resolve(sight, &hint)?,
            PathSpec::Refused(rejection) => return Err(*rejection),
        };
        let flow = Box::new(flow(&sight.conn, sight.direction, &path));
        self.port.takes(&flow, &*self.provider)?;
        Ok((path, flow))
    }

    fn stage_delete(&mut self, conn: &ConnHandle, d: Direction, staged: &mut Vec<Staged>) {
        let Some(slot) = self.slot(conn, d) else { return };
        let (op, rule) = {
            let detail = slot.detail();
            let Some(op) = slot.word.dispatch_delete() else { return };
            (op, detail.rule)
        };
        let Some(rule) = rule else {
            settle_deleted(&self.shared, &self.port, conn, d, op);
            return;
        };
        let cookie = self.shared.cookie(conn, d);
        let (shared, port, conn) = (Arc::clone(&self.shared), Arc::clone(&self.port), conn.clone());
        // What is submitted behind the delete can have its place.
        port.gave_up_place();
        staged.push(Staged::Other(self.operation(Request::Delete { rule, cookie }, {
            move |outcome| match outcome {
                Ok(_) => settle_deleted(&shared, &port, &conn, d, op),
                Err(e) => {
                    port.rules.fetch_add(1, Ordering::SeqCst);
                    settle_undeleted(&shared, &port, &conn, d, op, &e);
                }
            }
        })));
    }

    fn stage_established(&self, conn: ConnHandle, d: Direction, staged: &mut Vec<Staged>) {
        let Some(slot) = self.slot(&conn, d) else { return };
        let (op, rule) = {
            let detail = slot.detail();
            let Some(rule) = detail.rule else { return };
            let Some(op) = slot.word.dispatch_established() else { return };
            (op, rule)
        };
        let cookie = self.shared.cookie(&conn, d);
        let port = Arc::clone(&self.port);
        // Informative only: a refusal changes nothing.
        let then = move |_| {
            let must_go = conn.slot(port.generation(), d).is_some_and(|s| s.word.established(op));
            if must_go {
                port.queue.push_first(Command::Delete(conn, d));
            }
        };
        let request = Request::Established { rule, cookie };
        staged.push(Staged::Other(self.operation(request, then)));
    }

    /// An operation whose completion is accounted for.
    fn operation(
        &self,
        request: Request,
        then: impl FnOnce(Outcome) + Send + 'static,
    ) -> Operation {
        self.port.in_flight.fetch_add(1, Ordering::SeqCst);
        let port = Arc::clone(&self.port);
        let (kind, started) = (OpKind::of(&request), Instant::now());
        let completion = move |outcome: Outcome| {
            if let Some(kind) = kind {
                port.counters.latencies.record(kind, started.elapsed());
            }
            then(outcome);
            port.in_flight.fetch_sub(1, Ordering::SeqCst);
            port.queue.wake();
        };
        Operation { request, ticket: Ticket::new(Box::new(completion)) }
    }

    fn submit(&mut self, staged: &mut Vec<Staged>) {
        if staged.is_empty() {
            return;
        }
        let sights: Vec<Sight> = staged
            .iter()
            .filter_map(|s| match s {
                Staged::Add { sight, .. } => Some(sight.clone()),
                Staged::Other(_) => None,
            })
            .collect();
        let mut prepared =
            if sights.is_empty() { Vec::new() } else { self.shared.datapath.prepare(&sights) }
                .into_iter();
        let mut batch = Vec::with_capacity(staged.len());
        for s in staged.drain(..) {
            match s {
                Staged::Other(operation) => batch.push(operation),
                Staged::Add { sight, op, path, flow, found } => {
                    let ready = prepared.next().unwrap_or(Ok(()));
                    let (shared, port) = (Arc::clone(&self.shared), Arc::clone(&self.port));
                    let (conn, d) = (sight.conn, sight.direction);
                    // Cancelled since it was staged: its successor may be in this very batch.
                    let cancelled = conn
                        .slot(port.generation(), d)
                        .is_some_and(|s| s.word.load().is_cancelled());
                    let ready = if cancelled { Err(Reason::Cancelled.into()) } else { ready };
                    if let Err(rejection) = ready {
                        port.gave_up_place();
                        if let Some(found) = &found {
                            batch.push(self.removal(&found.leftover, &found.tally));
                        }
                        settle_refused(&shared, &port, &conn, d, op, rejection);
                        continue;
                    }
                    let cookie = shared.cookie(&conn, d);
                    let path = taken(&path, &flow);
                    if let Some(found) = found {
                        let request = found.request(cookie, flow);
                        batch.push(self.operation(request, move |outcome| {
                            match reconcile::is_adopted(&outcome, found.leftover.rule) {
                                Ok(()) => {
                                    settle_added(
                                        &shared, &port, &conn, d, op, path, cookie, outcome,
                                    );
                                    found.adopted(&port, &conn, d);
                                }
                                Err(why) => {
                                    port.gave_up_place();
                                    found.not_adopted(&shared, &port, &conn, d, op, &why);
                                }
                            }
                        }));
                        continue;
                    }
                    let shape = Shape::of(&flow);
                    batch.push(self.operation(Request::Add { cookie, flow }, move |outcome| {
                        match &outcome {
                            Ok(Done::Added { .. }) => {
                                port.capacity.took(port.rules.load(Ordering::SeqCst));
                            }
                            Ok(_) => port.gave_up_place(),
                            Err(rejection) => {
                                port.gave_up_place();
                                port.note_refused_shape(shape, rejection);
                                if rejection.reason == Reason::TableFull {
                                    let rules = port.rules.load(Ordering::SeqCst);
                                    port.capacity.refused(rules, shared.clock.now_ms());
                                }
                            }
                        }
                        settle_added(&shared, &port, &conn, d, op, path, cookie, outcome);
                    }));
                }
            }
        }
        if !batch.is_empty()
            && let Err(panicked) = self.guarded(|p| p.submit(batch))
        {
            tracing::error!(port = %self.port.netdev, "submit: {panicked}");
        }
    }

    /// Calls the provider; a panic marks the port faulty instead of ending the thread. What the
    /// provider held of the batch is dropped while it unwinds, and so completes as a fault.
    fn guarded<R>(&self, call: impl FnOnce(&dyn Provider) -> R) -> Result<R, Rejection> {
        contained(|| call(&*self.provider)).map_err(|why| self.port.panicked(why))
    }

    fn arm_retry(&mut self, conn: ConnHandle, d: Direction) {
        let at = self.slot(&conn, d).and_then(|s| s.detail().retry_at.ms());
        if let Some(at_ms) = at {
            self.timers.push(Reverse(Timer { at_ms, conn, direction: d }));
        }
    }

    /// Looks at what is due; returns how long nothing else will be.
    fn run_timers(&mut self, staged: &mut Vec<Staged>) -> Duration {
        let now = self.shared.clock.now_ms();
        while let Some(Reverse(t)) = self.timers.peek() {
            if t.at_ms > now {
                return Duration::from_millis((t.at_ms - now).min(1000));
            }
            let Some(Reverse(Timer { conn, direction: d, .. })) = self.timers.pop() else { break };
            let Some(slot) = self.slot(&conn, d) else { continue };
            let mut detail = slot.detail();
            if detail.retry_at.ms().is_none_or(|at| at > now) {
                continue; // something else happened to the slot since
            }
            detail.retry_at = Moment::default();
            if slot.word.load().state() == SlotState::Deleting {
                drop(detail);
                self.stage_delete(&conn, d, staged);
            } else if slot.word.retry() {
                // The number of attempts stays: the next pause is longer. How long the next packet
                // takes from now on tells the connection's pace.
                let (attempts, pace) = (detail.attempts, detail.pace);
                forget(&self.port, &conn, d, &mut detail);
                (detail.attempts, detail.pace, detail.used_ms) = (attempts, pace, now);
                drop(detail);
                self.push_rearm(conn, d);
            }
        }
        Duration::from_secs(1)
    }

    fn tell_rearm(&mut self) {
        if !self.rearm.is_empty() {
            self.shared.datapath.rearm(&std::mem::take(&mut self.rearm));
        }
    }

    /// Waits for what is with the provider. False when it takes too long.
    fn settle(&self) -> bool {
        let at_most = self.shared.limits.complete;
        let deadline = Instant::now() + at_most;
        while self.port.in_flight.load(Ordering::SeqCst) > 0 {
            if Instant::now() >= deadline {
                self.port.set_fault(format!(
                    "{} operations without a result after {at_most:?}",
                    self.port.in_flight.load(Ordering::SeqCst),
                ));
                return false;
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
        true
    }

    /// Waits for a sweep that is asking the provider. False when it takes too long.
    fn swept(&self) -> bool {
        let deadline = Instant::now() + self.shared.limits.complete;
        while self.port.swept.load(Ordering::SeqCst) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
        true
    }

    fn retract(&mut self, egress: netdev_providers::Ifindex, staged: &mut Vec<Staged>) -> u64 {
        let mut n = 0;
        let towards = self.port.held().towards(egress);
        for (conn, d) in towards {
            match unwind(&self.port, &conn, d) {
                Unwind::Delete => {
                    n += 1;
                    self.stage_delete(&conn, d, staged);
                }
                Unwind::Cancelling => n += 1,
                Unwind::Reopened | Unwind::Nothing => self.push_rearm(conn, d),
            }
        }
        self.submit(staged);
        self.settle();
        n
    }

    fn flush(&mut self) -> u64 {
        self.settle();
        self.port.forget_refused_shapes();
        let flushed = match self.guarded(|p| p.flush()) {
            Ok(Ok(n)) => n,
            Ok(Err(fault)) => {
                tracing::warn!(port = %self.port.netdev, "flush: {fault}");
                return self.flush_one_by_one();
            }
            Err(_) => return self.flush_one_by_one(),
        };
        self.port.rules.store(0, Ordering::SeqCst);
        let held = self.port.held().take_all();
        for (conn, d) in held {
            if let Some(slot) = self.slot(&conn, d) {
                let mut detail = slot.detail();
                slot.word.reset();
                forget(&self.port, &conn, d, &mut detail);
            }
            self.push_rearm(conn, d);
        }
        flushed
    }

    /// The backend could not flush: every rule is deleted by itself.
    fn flush_one_by_one(&mut self) -> u64 {
        let (mut n, mut staged) = (0, Vec::new());
        let held = self.port.held().all();
        for (conn, d) in held {
            match unwind(&self.port, &conn, d) {
                Unwind::Delete => {
                    n += 1;
                    self.stage_delete(&conn, d, &mut staged);
                }
                // Its add did not complete in time: the delete follows it.
                Unwind::Cancelling => {}
                // It was rejected, and may be offered again like all others.
                Unwind::Reopened | Unwind::Nothing => self.push_rearm(conn, d),
            }
        }
        self.submit(&mut staged);
        self.settle();
        n
    }

    fn stop(mut self) -> Stopped {
        let mut stopped = Stopped { flushed: self.flush(), faults: Vec::new() };
        // What was queued behind: offers of workers that were late, deletes of what is flushed.
        while let Some(command) = self.port.queue.pop() {
            match command {
                Command::Add(conn, d, _) | Command::Delete(conn, d) => {
                    if let Some(slot) = self.slot(&conn, d) {
                        let mut detail = slot.detail();
                        slot.word.reset();
                        forget(&self.port, &conn, d, &mut detail);
                    }
                }
                Command::Barrier(answer) | Command::Flush(answer) | Command::Retract(_, answer) => {
                    let _ = answer.send(0);
                }
                Command::Stop(answer) => {
                    let _ = answer.send(Stopped::default());
                }
                Command::Established(..)
                | Command::Rejected(..)
                | Command::Rearm(..)
                | Command::Repair
                | Command::Reconcile(_)
                | Command::DeleteRule(..) => {}
            }
        }
        // The last call: a sweep that is under way comes to its end first.
        if !self.swept() {
            let why = "a sweep has not come back: the provider is released under it";
            stopped.faults.push(Fault::new(why));
        }
        match self.guarded(|p| p.release()) {
            Ok(Ok(())) => {}
            Ok(Err(fault)) => stopped.faults.push(fault),
            Err(rejection) => stopped.faults.push(Fault::new(rejection.to_string())),
        }
        // Slots of this port are rearmed too: the kernel's ledger must forget the netdev.
        self.tell_rearm();
        stopped
    }
}

fn taken(path: &Path, flow: &Flow) -> PathTaken {
    PathTaken {
        egress: path.forward.egress,
        next_hop: path.next_hop,
        dst_mac: path.forward.macs.map(|m| m.dst),
        iif: path.iif,
        oif: path.oif,
        nat: flow.has_nat(),
    }
}

/// The slot is empty: its detail is cleared, its traffic goes to the port's past and the
/// connection's.
pub(super) fn forget(port: &Port, conn: &ConnHandle, d: Direction, detail: &mut Detail) {
    leave(port, conn, detail);
    port.held().remove(conn, d, detail.path.map(|p| p.egress));
    *detail = Detail::default();
}

/// The rule is gone: its traffic is the port's past and the connection's.
fn leave(port: &Port, conn: &ConnHandle, detail: &Detail) {
    port.counters.past(detail.packets, detail.bytes);
    conn.past_traffic(detail.packets, detail.bytes);
    if let Some(rule) = detail.rule {
        port.adopted().remove(&rule);
    }
}

/// Asks for the deletion of an installed rule that does nothing, after which the slot is rejected
/// for a while. False: the slot has moved on.
pub(super) fn refute(
    port: &Port,
    conn: &ConnHandle,
    d: Direction,
    rejection: Rejection,
    retry_at_ms: u64,
) -> bool {
    let Some(slot) = conn.slot(port.generation(), d) else { return false };
    let mut detail = slot.detail();
    if slot.word.load().state() != SlotState::Installed || slot.word.unwind() != Unwind::Delete {
        return false;
    }
    detail.rejection = Some(Box::new(rejection));
    detail.retry_at = Moment::at(retry_at_ms);
    port.queue.push(Command::Delete(conn.clone(), d));
    true
}

/// Asks for the slot to become empty; what is installed is left to be deleted by the caller.
pub(super) fn unwind(port: &Port, conn: &ConnHandle, d: Direction) -> Unwind {
    let Some(slot) = conn.slot(port.generation(), d) else { return Unwind::Nothing };
    let mut detail = slot.detail();
    let left = slot.word.unwind();
    if left == Unwind::Reopened {
        forget(port, conn, d, &mut detail);
    }
    left
}

fn settle_refused(
    shared: &Shared,
    port: &Port,
    conn: &ConnHandle,
    d: Direction,
    op: OpNumber,
    rejection: Rejection,
) {
    let Some(slot) = conn.slot(port.generation(), d) else { return };
    let mut detail = slot.detail();
    if slot.word.refused(op, rejection.reason) {
        tracing::debug!(port = %port.netdev, %conn, %d, "refused: {rejection}");
        port.counters.count(rejection.reason);
        shared.datapath.slot_changed(&port.netdev, conn, d, SlotChange::Rejected(&rejection));
        detail.attempts = detail.attempts.saturating_add(1);
        if rejection.reason.permanence() == Permanence::Transient {
            let at = shared.clock.now_ms() + backoff_ms(detail.attempts);
            detail.retry_at = Moment::at(at);
            port.queue.push(Command::Rejected(conn.clone(), d));
        }
        detail.rejection = Some(Box::new(rejection));
    } else if slot.word.load().state() == SlotState::Empty {
        forget(port, conn, d, &mut detail);
        port.queue.push(Command::Rearm(conn.clone(), d));
    }
}

/// Doubles with every attempt, with a quarter of jitter so that a full table is not asked by
/// everybody at once.
fn backoff_ms(attempts: u16) -> u64 {
    static SEED: AtomicU64 = AtomicU64::new(0x9e37_79b9_7f4a_7c15);
    let base = (RETRY_MIN_MS << attempts.saturating_sub(1).min(16)).min(RETRY_MAX_MS);
    let mut x = SEED.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9); // splitmix64
    x ^= x >> 27;
    base + x % (base / 4 + 1)
}

#[expect(clippy::too_many_arguments, reason = "the parts of one operation")]
fn settle_added(
    shared: &Shared,
    port: &Port,
    conn: &ConnHandle,
    d: Direction,
    op: OpNumber,
    path: PathTaken,
    cookie: Cookie,
    outcome: Outcome,
) {
    let (rule, in_hw) = match outcome {
        Ok(Done::Added { rule, in_hw }) => (rule, in_hw),
        Ok(_) => {
            let why = "the provider answered an add with the result of another operation";
            let rejection = Rejection::with_detail(Reason::ProviderFault, why);
            return settle_refused(shared, port, conn, d, op, rejection);
        }
        Err(rejection) => return settle_refused(shared, port, conn, d, op, rejection),
    };
    let Some(slot) = conn.slot(port.generation(), d) else { return };
    let mut detail = slot.detail();
    let after = slot.word.added(op);
    if after == AfterAdd::Late {
        port.gave_up_place();
        port.queue.push(Command::DeleteRule(rule, cookie));
        return;
    }
    port.counters.adds.fetch_add(1, Ordering::Relaxed);
    tracing::debug!(port = %port.netdev, %conn, %d, "installed");
    shared.datapath.slot_changed(&port.netdev, conn, d, SlotChange::Installed);
    detail.rule = Some(rule);
    detail.in_hw = in_hw;
    detail.path = Some(path);
    detail.used_ms = shared.clock.now_ms();
    detail.attempts = 0;
    detail.pace = Pace::UNKNOWN;
    match after {
        AfterAdd::TellReply => port.queue.push(Command::Established(conn.clone(), d)),
        AfterAdd::Delete => port.queue.push_first(Command::Delete(conn.clone(), d)),
        AfterAdd::Settled | AfterAdd::Late => {}
    }
}

fn settle_deleted(shared: &Shared, port: &Port, conn: &ConnHandle, d: Direction, op: OpNumber) {
    let Some(slot) = conn.slot(port.generation(), d) else { return };
    let mut detail = slot.detail();
    if let Some(rejection) = detail.rejection.take()
        && !conn.is_dead()
    {
        if slot.word.deleted_because(op, rejection.reason) {
            port.counters.deletes.fetch_add(1, Ordering::Relaxed);
            settle_refuted(shared, port, conn, d, &mut detail, rejection);
        }
        return;
    }
    if slot.word.deleted(op) {
        port.counters.deletes.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(port = %port.netdev, %conn, %d, "deleted");
        shared.datapath.slot_changed(&port.netdev, conn, d, SlotChange::Deleted);
        forget(port, conn, d, &mut detail);
        drop(detail);
        if !conn.is_dead() {
            port.queue.push(Command::Rearm(conn.clone(), d));
        }
    }
}

/// The rule is gone because it did nothing: the slot stays rejected for the pause that was set when
/// that was noticed.
fn settle_refuted(
    shared: &Shared,
    port: &Port,
    conn: &ConnHandle,
    d: Direction,
    detail: &mut Detail,
    rejection: Box<Rejection>,
) {
    tracing::warn!(port = %port.netdev, %conn, %d, "{rejection}");
    port.counters.count(rejection.reason);
    shared.datapath.slot_changed(&port.netdev, conn, d, SlotChange::Rejected(&rejection));
    let retry_at = detail.retry_at.ms().unwrap_or_else(|| shared.clock.now_ms());
    leave(port, conn, detail);
    *detail = Detail {
        path: detail.path,
        rejection: Some(rejection),
        retry_at: Moment::at(retry_at),
        ..Detail::default()
    };
    port.queue.push(Command::Rejected(conn.clone(), d));
}

fn settle_undeleted(
    shared: &Shared,
    port: &Port,
    conn: &ConnHandle,
    d: Direction,
    op: OpNumber,
    rejection: &Rejection,
) {
    let Some(slot) = conn.slot(port.generation(), d) else { return };
    let mut detail = slot.detail();
    if !slot.word.delete_failed(op) {
        return;
    }
    detail.attempts = detail.attempts.saturating_add(1);
    if detail.attempts >= DELETE_ATTEMPTS {
        port.set_fault(format!("a rule cannot be deleted: {rejection}"));
        return;
    }
    detail.retry_at = Moment::at(shared.clock.now_ms() + backoff_ms(detail.attempts));
    port.queue.push(Command::Rejected(conn.clone(), d));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_doubles_up_to_a_bound_and_is_not_the_same_for_all() {
        for attempts in [1, 2, 5, 9, 10, 17, 1000, u16::MAX] {
            let base = RETRY_MAX_MS.min(RETRY_MIN_MS << (attempts - 1).min(16));
            let pauses: Vec<u64> = (0..200).map(|_| backoff_ms(attempts)).collect();
            assert!(pauses.iter().all(|p| (base..=base + base / 4).contains(p)), "{pauses:?}");
            let different: std::collections::HashSet<_> = pauses.iter().collect();
            assert!(different.len() > 10, "no jitter: {different:?}");
        }
    }
}
