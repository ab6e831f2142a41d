//! The writer of one port: the thread that takes what workers queued, has it prepared and carried
//! out by the provider, and follows up what completes.
//!
//! Order: removals are taken first, each lot first in, first out, and operations are submitted in that
//! order. The delete of an old rule precedes the add of a new one with the same match, which cannot
//! have been queued before it.
//!
//! What any of this does to a slot is [`PortSlot`]'s. `flush` is how the port is emptied, `adopt` what becomes
//! of rules that engines that died have left.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use netdev_providers::{
    Cookie, Direction, Flow, Ifindex, Operation, Outcome, Provider, Reason, Rejection, Repaired,
    Request, RuleId, Ticket,
};

use super::Shared;
use super::capacity::{Candidate, Place};
use super::conn::{ConnHandle, PathTaken};
use super::contain::{caught, contained};
use super::datapath::{Datapath, Path, PathSpec, Sight, Work, flow, tracked};
use super::latency::OpKind;
use super::lines::Line;
use super::port::Port;
use super::queue::{Command, End, Job, Stopped};
use super::reconcile::Found;
use super::shapes::Shape;
use super::slot::{OpNumber, Unwind};
use super::state::{Due, PortSlot};
use super::taken::TakenBack;

mod adopt;
mod flush;

/// Operations handed to the provider at once. Large enough to fill a few sends, small enough that a
/// delete does not wait long behind it.
const BATCH: usize = 256;
/// How long a thread stays without anything to do. (In a model no time passes.)
const LINGER: Duration = if cfg!(ctoffload_loom) { Duration::MAX } else { Duration::from_secs(2) };
/// How often a path is resolved while changes come in between.
const RESOLVE_ATTEMPTS: usize = 5;

pub(super) struct Writer {
    port: Arc<Port>,
    provider: Arc<dyn Provider>,
    shared: Arc<Shared>,
    timers: BinaryHeap<Reverse<Timer>>,
    rearm: Vec<Sight>,
    /// Taken from the queue before their turn came.
    deferred: VecDeque<Command>,
    /// Commands carried out in this round.
    done: usize,
    /// Netdevs that rules must not lead to, from a retraction until the adds that waited then are
    /// through. (The end of it can overtake its beginning: then it is below 0.)
    retracting: HashMap<Ifindex, i32>,
}

/// How a writer leaves its thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// For good.
    Stopped,
    /// Until it has something to do.
    Rest,
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
    Add { sight: Sight, op: OpNumber, work: Work, found: Option<Found> },
    Other(Operation),
}

impl Writer {
    pub(super) fn new(port: Arc<Port>, provider: Arc<dyn Provider>, shared: Arc<Shared>) -> Self {
        Self {
            port,
            provider,
            shared,
            timers: BinaryHeap::new(),
            rearm: Vec::new(),
            deferred: VecDeque::new(),
            done: 0,
            retracting: HashMap::new(),
        }
    }

    /// Has the port served by whatever thread is [started](super::threads::Threads::serve) for it.
    pub(super) fn begin(self) {
        let port = Arc::clone(&self.port);
        port.queue.set_job(self.job());
    }

    fn job(self) -> Job {
        Job(Box::new(move || self.run()))
    }

    /// Runs until [`Command::Stop`], or until there is nothing to do. A panic of our own costs the port its offers,
    /// not its end: rules are there that somebody has to take back.
    fn run(mut self) -> Option<Job> {
        let port = Arc::clone(&self.port);
        loop {
            match caught(|| self.serve()) {
                Ok(After::Stopped) => return None,
                Ok(After::Rest) => return port.queue.rest(self.job()),
                Err(words) => self.panicked(&words),
            }
        }
    }

    fn panicked(&mut self, words: &str) {
        let port = Arc::clone(&self.port);
        port.set_fault(format!("its thread panicked: {words}"));
        // It may be one of them that it panics at, again and again.
        self.timers.clear();
        self.port.queue.finished(std::mem::take(&mut self.done));
        port.progress.thread.end();
        let shared = Arc::clone(&self.shared);
        let _ = caught(|| shared.datapath.port_panicked(&port.netdev, words));
    }

    pub(super) fn serve(&mut self) -> After {
        let port = Arc::clone(&self.port);
        port.queue.set_writer();
        let mut staged = Vec::new();
        let mut idle_since = None;
        loop {
            port.progress.thread.begin();
            let mut taken = 0;
            while taken < BATCH
                && let Some(command) = self.next()
            {
                taken += 1;
                port.progress.thread.step();
                if let Some((end, answer)) = self.carry_out(command, &mut staged) {
                    let stopped = self.stop(end, &mut staged);
                    port.progress.thread.end();
                    port.ended.store(true, Ordering::SeqCst);
                    let _ = answer.send(stopped);
                    return After::Stopped;
                }
            }
            self.submit(&mut staged);
            self.port.queue.finished(std::mem::take(&mut self.done));
            let next = self.run_timers(&mut staged);
            self.submit(&mut staged);
            self.tell_rearm();
            port.progress.thread.end();
            if taken > 0 {
                idle_since = None;
                continue;
            }
            let idle = idle_since.get_or_insert_with(Instant::now).elapsed();
            if idle >= LINGER && self.timers.is_empty() && port.progress.operations.out() == 0 {
                return After::Rest;
            }
            self.port.queue.park(next.min(LINGER));
        }
    }

    fn next(&mut self) -> Option<Command> {
        let command = self.deferred.pop_front().or_else(|| self.port.queue.pop())?;
        self.done += 1;
        Some(command)
    }

    /// Carries a command out, or stages it. Returns what end is wanted and who wants to hear of it, if this is it.
    fn carry_out(
        &mut self,
        command: Command,
        staged: &mut Vec<Staged>,
    ) -> Option<(End, Sender<Stopped>)> {
        match command {
            Command::Add(conn, d, path) => self.stage_add(&conn, d, path, None, staged),
            Command::Delete(conn, d) => self.stage_delete(&conn, d, staged),
            Command::DeleteRule(rule, cookie) => self.stage_delete_rule(rule, cookie, staged),
            Command::Established(conn, d) => self.stage_established(conn, d, staged),
            Command::Rejected(conn, d) => self.arm_retry(conn, d),
            Command::Rearm(conn, d) => self.push_rearm(conn, d),
            Command::Retracted(egress) => self.count_retraction(egress, -1),
            Command::Joined(netdev) => {
                self.submit(staged);
                self.reconsider(netdev, staged);
            }
            Command::Stop(end, answer) => return Some((end, answer)),
            Command::Flush(why, answer) => {
                let flushed = self.flush(why, staged);
                self.tell_rearm();
                let _ = answer.send(flushed);
            }
            Command::Repair => {
                self.submit(staged);
                match self.guarded(|p| p.repair()) {
                    Ok(Repaired::AsItWas) => {}
                    Ok(Repaired::RulesGone) => {
                        let rules = self.flush(TakenBack::Port, staged);
                        self.tell_rearm();
                        tracing::info!(port = %self.port.netdev, rules, "rules were gone, or had to go");
                    }
                    Err(panicked) => {
                        tracing::error!(port = %self.port.netdev, "repair: {panicked}")
                    }
                }
            }
            Command::Reconcile(answer) => {
                self.submit(staged);
                let reconciled = self.reconcile(staged);
                self.tell_rearm();
                if let Some(answer) = answer {
                    let _ = answer.send(reconciled);
                }
            }
            #[cfg(test)]
            Command::Panic => panic!("on purpose"),
            Command::Barrier(answer) => {
                self.submit(staged);
                self.settle();
                self.run_timers(staged);
                self.submit(staged);
                self.settle();
                self.tell_rearm();
                let _ = answer.send(0);
            }
            Command::Settle(answer) => {
                self.finish_removals(staged);
                self.tell_rearm();
                let _ = answer.send(0);
            }
            Command::Retract(egress, answer) => {
                let _ = answer.send(self.retract(egress, staged));
            }
        }
        None
    }

    fn count_retraction(&mut self, egress: Ifindex, by: i32) {
        let count = self.retracting.entry(egress).or_default();
        *count += by;
        if *count == 0 {
            self.retracting.remove(&egress);
        }
    }

    fn stage_delete_rule(&self, rule: RuleId, cookie: Cookie, staged: &mut Vec<Staged>) {
        let (port, shared) = (Arc::clone(&self.port), Arc::clone(&self.shared));
        let then = move |outcome: Outcome| {
            if let Err(e) = outcome
                && port.lines.is_told(Line::StrayUndeleted, shared.clock.now_ms())
            {
                tracing::warn!(port = %port.netdev, %cookie, "stray rule not deleted: {e}");
            }
        };
        staged.push(Staged::Other(self.operation(Request::Delete { rule, cookie }, then)));
    }

    fn slot<'a>(&'a self, conn: &'a ConnHandle, d: Direction) -> Option<PortSlot<'a>> {
        PortSlot::find(&self.shared, &self.port, conn, d)
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
        let (shared, port) = (Arc::clone(&self.shared), Arc::clone(&self.port));
        let Some(slot) = PortSlot::find(&shared, &port, conn, d) else { return };
        // What is there forwards: it is none of what only keeps track.
        let found = found.filter(|found| {
            let is_kept = !matches!(spec, PathSpec::Track(_));
            if !is_kept {
                self.remove_found(found, staged);
            }
            is_kept
        });
        let Some(op) = slot.dispatch_add() else {
            self.push_rearm(conn.clone(), d);
            if let Some(found) = &found {
                self.remove_found(found, staged);
            }
            return;
        };
        let sight = self.sight(conn.clone(), d);
        let ready = self.stable_work(&slot, &sight, spec).and_then(|work| {
            // What is there already has its place.
            if found.is_none()
                && let Err(full) = self.make_room(&slot, staged)
            {
                slot.note_path(None);
                return Err(full);
            }
            Ok(work)
        });
        match ready {
            Ok(work) => {
                slot.take_place();
                staged.push(Staged::Add { sight, op, work, found });
            }
            Err(rejection) => {
                if let Some(found) = &found {
                    self.remove_found(found, staged);
                }
                slot.refused(op, rejection);
            }
        }
    }

    /// Finds a place for the rule of this slot on a port that may be full.
    fn make_room(
        &mut self,
        slot: &PortSlot<'_>,
        staged: &mut Vec<Staged>,
    ) -> Result<(), Rejection> {
        let now = self.shared.clock.now_ms();
        let newcomer = slot.pace_of_newcomer(now);
        loop {
            let rules = self.port.rules.load(Ordering::SeqCst);
            let Candidate { conn, direction: d, used_ms, .. } =
                match self.port.capacity.place(rules, newcomer, now) {
                    Place::Free => return Ok(()),
                    Place::None(rejection) => return Err(rejection),
                    Place::Of(candidate) => candidate,
                };
            // It may have gone, or have been replaced, since the sweep.
            let stands = self.slot(&conn, d).filter(|s| s.is_as_swept(used_ms));
            if stands.is_some_and(|s| s.unwind(TakenBack::Evicted) == Unwind::Delete) {
                tracing::debug!(port = %self.port.netdev, %conn, %d, "gives way");
                self.port.counters.evictions.fetch_add(1, Ordering::Relaxed);
                self.stage_delete(&conn, d, staged);
            }
        }
    }

    /// What is to be asked of the provider. Its path is noted in the slot, for those who look for rules that a
    /// change concerns: either they find it there, or it is resolved after the change.
    fn stable_work(
        &self,
        slot: &PortSlot<'_>,
        sight: &Sight,
        spec: PathSpec,
    ) -> Result<Work, Rejection> {
        for _ in 0..RESOLVE_ATTEMPTS {
            let changes = self.shared.datapath.changes();
            let (path, work) = match self.path_and_work(sight, spec.clone()) {
                // What it was refused for may be gone, and who looked for refusals has not found this one.
                Err(_) if self.shared.datapath.changes() != changes => continue,
                resolved => resolved?,
            };
            slot.note_path(path);
            if self.shared.datapath.changes() == changes {
                return Ok(work);
            }
            slot.note_path(None);
        }
        let why = "routes, neighbours or policies changed each time that its path was resolved";
        Err(Rejection::with_detail(Reason::Busy, why))
    }

    fn path_and_work(
        &self,
        sight: &Sight,
        spec: PathSpec,
    ) -> Result<(Option<PathTaken>, Work), Rejection> {
        self.port.takes_any()?;
        let path = match spec {
            PathSpec::Known(path) => *path,
            PathSpec::Track(arrival) => {
                let work = Work::Track(Box::new(tracked(&sight.conn, sight.direction, *arrival)));
                self.port.takes(&work, &*self.provider)?;
                return Ok((None, work));
            }
            PathSpec::Resolve(hint) => {
                self.asked(|datapath| datapath.resolve(sight, &hint)).unwrap_or_else(Err)?
            }
            PathSpec::Refused(rejection) => return Err(*rejection),
        };
        if self.retracting.contains_key(&path.forward.egress) {
            let why = "the netdev that the packets leave by went down or was deleted";
            return Err(Rejection::with_detail(Reason::Cancelled, why));
        }
        let flow = Box::new(flow(&sight.conn, sight.direction, &path));
        let taken = taken(&path, &flow);
        let work = Work::Forward(flow);
        self.port.takes(&work, &*self.provider)?;
        Ok((Some(taken), work))
    }

    fn stage_delete(&self, conn: &ConnHandle, d: Direction, staged: &mut Vec<Staged>) {
        let Some((op, rule)) = self.slot(conn, d).and_then(|s| s.dispatch_delete()) else { return };
        let cookie = self.shared.cookie(conn, d);
        let then = self.of_slot(conn.clone(), d, move |slot, outcome| match outcome {
            Ok(_) => slot.deleted(op),
            Err(e) => slot.undeleted(op, &e),
        });
        staged.push(Staged::Other(self.operation(Request::Delete { rule, cookie }, then)));
    }

    fn stage_established(&self, conn: ConnHandle, d: Direction, staged: &mut Vec<Staged>) {
        let dispatched = self.slot(&conn, d).and_then(|s| s.dispatch_established());
        let Some((op, rule)) = dispatched else { return };
        let cookie = self.shared.cookie(&conn, d);
        let then = self.of_slot(conn, d, move |slot, _| slot.established(op));
        let request = Request::Established { rule, cookie };
        staged.push(Staged::Other(self.operation(request, then)));
    }

    /// What becomes of a slot when its operation has completed, on whichever thread.
    fn of_slot(
        &self,
        conn: ConnHandle,
        d: Direction,
        then: impl FnOnce(PortSlot<'_>, Outcome) + Send + 'static,
    ) -> impl FnOnce(Outcome) + Send + 'static {
        let (shared, port) = (Arc::clone(&self.shared), Arc::clone(&self.port));
        move |outcome| {
            if let Some(slot) = PortSlot::find(&shared, &port, &conn, d) {
                then(slot, outcome);
            }
        }
    }

    /// An operation whose completion is accounted for.
    fn operation(
        &self,
        request: Request,
        then: impl FnOnce(Outcome) + Send + 'static,
    ) -> Operation {
        self.port.progress.operations.begin();
        let port = Arc::clone(&self.port);
        let (kind, started) = (OpKind::of(&request), Instant::now());
        let completion = move |outcome: Outcome| {
            if let Some(kind) = kind {
                port.counters.latencies.record(kind, started.elapsed());
            }
            then(outcome);
            port.progress.operations.end();
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
        let prepare = |sights: &[Sight]| {
            self.asked(|datapath| datapath.prepare(sights))
                .unwrap_or_else(|why| vec![Err(why); sights.len()])
        };
        let mut prepared =
            if sights.is_empty() { Vec::new() } else { prepare(&sights) }.into_iter();
        let mut batch = Vec::with_capacity(staged.len());
        for s in staged.drain(..) {
            match s {
                Staged::Other(operation) => batch.push(operation),
                Staged::Add { sight, op, work, found } => {
                    let ready = prepared.next().unwrap_or(Ok(()));
                    let (conn, d) = (sight.conn, sight.direction);
                    let Some(slot) = self.slot(&conn, d) else { continue };
                    // Cancelled since it was staged: its successor may be in this very batch.
                    let ready =
                        if slot.is_cancelled() { Err(Reason::Cancelled.into()) } else { ready };
                    if let Err(rejection) = ready {
                        if let Some(found) = &found {
                            batch.push(self.removal(&found.leftover, &found.tally));
                        }
                        slot.withdraw(op, rejection);
                        continue;
                    }
                    let cookie = self.shared.cookie(&conn, d);
                    let shape = Shape::of_work(&work);
                    let request = match (work, &found) {
                        (Work::Forward(flow), Some(found)) => found.request(cookie, flow),
                        (Work::Forward(flow), None) => Request::Add { cookie, flow },
                        (Work::Track(tracked), _) => Request::Track { cookie, tracked },
                    };
                    let then = self.of_slot(conn, d, move |slot, outcome| match found {
                        None => slot.added(op, shape, outcome),
                        Some(Found { leftover, tally }) => {
                            if slot.adopted(op, &leftover, outcome) {
                                tally.adopted();
                            } else {
                                tally.removed();
                            }
                        }
                    });
                    batch.push(self.operation(request, then));
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

    /// Calls the datapath; its panic is contained in the same way.
    fn asked<R>(&self, call: impl FnOnce(&dyn Datapath) -> R) -> Result<R, Rejection> {
        contained(|| call(&*self.shared.datapath)).map_err(|why| {
            let why = why.replacen("the provider", "the datapath", 1);
            self.port.panicked(why)
        })
    }

    fn arm_retry(&mut self, conn: ConnHandle, d: Direction) {
        let at = self.slot(&conn, d).and_then(|s| s.retry_at_ms());
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
            match self.slot(&conn, d).map(|s| s.retry(now)) {
                Some(Due::Delete) => self.stage_delete(&conn, d, staged),
                Some(Due::Rearm) => self.push_rearm(conn, d),
                Some(Due::Nothing) | None => {}
            }
        }
        // Until somebody asks for something.
        Duration::from_secs(3600)
    }

    fn tell_rearm(&mut self) {
        if !self.rearm.is_empty() {
            let rearm = std::mem::take(&mut self.rearm);
            if let Err(panicked) = self.asked(|datapath| datapath.rearm(&rearm)) {
                tracing::error!(port = %self.port.netdev, "rearm: {panicked}");
            }
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
        answer: path.answer,
        nat: flow.has_nat(),
        bridged: path.forward.macs.is_none(),
    }
}
