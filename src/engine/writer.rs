//! The writer of one port: the thread that takes what workers queued, has it prepared and carried
//! out by the provider, and follows up what completes.
//!
//! Order: commands are taken first in, first out, and operations are submitted in that order, so
//! the delete of an old rule precedes the add of a new one with the same match.
//!
//! `completion` is what completions do to slots, `flush` how the port is emptied, `adopt` what becomes
//! of rules that engines that died have left.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use netdev_providers::{
    Direction, Done, Flow, Operation, Outcome, Provider, Reason, Rejection, Request, Ticket,
};

use super::Shared;
use super::capacity::{Candidate, Pace, Place};
use super::conn::{ConnHandle, Moment, PathTaken, Slot};
use super::contain::contained;
use super::datapath::{Path, PathSpec, Sight, flow};
use super::latency::OpKind;
use super::port::{Port, Shape};
use super::queue::Command;
use super::reconcile::{self, Found};
use super::slot::{OpNumber, SlotState, Unwind};
pub(super) use completion::{forget, refute, unwind};
use completion::{settle_added, settle_deleted, settle_refused, settle_undeleted};

mod adopt;
mod completion;
mod flush;

/// Operations handed to the provider at once. Large enough to fill a few sends, small enough that a
/// delete does not wait long behind it.
const BATCH: usize = 256;
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
                                    let (words, now) = (&rejection.detail, shared.clock.now_ms());
                                    port.capacity.refused(rules, words.as_deref(), now);
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
}

fn taken(path: &Path, flow: &Flow) -> PathTaken {
    PathTaken {
        egress: path.forward.egress,
        next_hop: path.next_hop,
        dst_mac: path.forward.macs.map(|m| m.dst).or(path.eth_dst),
        iif: path.iif,
        oif: path.oif,
        nat: flow.has_nat(),
        bridged: path.forward.macs.is_none(),
    }
}
