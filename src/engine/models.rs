//! Models of what the engine's threads do at once, for [loom](https://docs.rs/loom): it runs each
//! of them under every interleaving and with every value that the memory model lets a load return,
//! and reports a failed assertion, a data race, or a deadlock with the schedule that led to it.
//!
//! ```text
//! RUSTFLAGS="--cfg ctoffload_loom" CARGO_TARGET_DIR=target/loom \
//!     cargo test --profile model --no-default-features --lib engine::models
//! ```
//!
//! The code under test is the engine's own, compiled on loom's types (see `sync.rs`). Atomics and
//! locks of `std` elsewhere (counters, `Port::held`, `Port::progress`) take part as they are: loom
//! does not see them.
//!
//! * An access with `SeqCst` is to loom one with `AcqRel`; only **fences** are sequentially consistent.
//!   So whatever has to hold between "write mine, read yours" on two threads is written with fences in
//!   the engine, and checked here. To loom two such fences also synchronise, which they do not do by
//!   themselves: what rests on nothing else would go unnoticed.
//! * [`exhaustive`] tries everything. Where that takes too long, [`bounded`] tries every schedule with
//!   at most so many preemptions (a switch where the thread could have gone on; blocking, yielding and
//!   ending cost nothing), still with every value of every load.
//! * Nothing here needs a random scheduler such as shuttle's, which knows sequential consistency only
//!   and would see none of the missing fences.
//!
//! A model is worth something only when it can fail. What each of them was seen to find is said at
//! each, under *Finds*.

use std::cell::Cell;
use std::num::NonZeroU32;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use loom::cell::UnsafeCell;
use loom::thread;
use netdev_providers::{
    Cookie, Direction, Done, Epoch, Fault, Flow, Forward, Generation, HwFlags, Ifindex, Instance,
    Netdev, Operation, Provider, Rejection, Request, RuleId, RuleReport, Tuple, Zone,
};

use super::clock::Clock;
use super::conn::{ConnClaim, ConnHandle, ConnKey};
use super::datapath::{NoDatapath, Path, PathSpec};
use super::port::{Binding, Port};
use super::queue::{Command, End, Job, Queue, Stopped};
use super::slot::{AfterAdd, SlotState, SlotWord, Unwind};
use super::table::PortTable;
use super::worker::{Offer, Publication, Worker};
use super::writer::{After, Writer};
use super::zones::{Entered, Zones};
use super::{Engine, Limits};

const D: Direction = Direction::Original;

/// Every schedule.
fn exhaustive(model: impl Fn() + Send + Sync + 'static) {
    loom::model::Builder::new().check(model);
}

/// Every schedule with at most so many preemptions.
fn bounded(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 10_000;
    builder.check(model);
}

fn generation(n: u32) -> Generation {
    Generation::new(n).unwrap()
}

fn ifindex(n: u32) -> Ifindex {
    Ifindex::new(n).unwrap()
}

/// No port is gone.
fn nobody(_: Generation) -> bool {
    false
}

fn key() -> ConnKey {
    let original: Tuple = "tcp 192.0.2.1:1000 > 198.51.100.1:80".parse().unwrap();
    ConnKey { zone: Zone(0), original }
}

fn conn() -> ConnHandle {
    ConnHandle::new(key(), key().original.inverted(), Epoch(1), 0, 0)
}

// ---- (1) claims ----

/// Two workers of one port and one of another offer the same direction: each port has one owner,
/// and one slot.
///
/// Finds: a claim that loads and stores instead of comparing and exchanging.
#[test]
fn a_slot_has_one_owner() {
    exhaustive(|| {
        let c = conn();
        let claim =
            |c: &ConnHandle, n| matches!(c.claim(generation(n), D, nobody), ConnClaim::Won(_));
        let threads = [1, 2].map(|n| {
            let c = c.clone();
            thread::spawn(move || claim(&c, n))
        });
        let here = claim(&c, 1);
        let [first, second] = threads.map(|t| t.join().unwrap());
        assert!(first != here, "port 1 must have one owner");
        assert!(second, "port 2 must have one owner");
        let mut keys: Vec<_> = c.all_slots().map(|(_, g, _)| g.get()).collect();
        keys.sort_unstable();
        assert_eq!(keys, [1, 2]);
    });
}

/// A worker claims while the connection ends. Either the claim is not won, or the end sees the slot
/// and cancels the add, which whoever takes it from the queue then notices.
fn claim_against_end(first_port: Option<u32>) {
    exhaustive(move || {
        let c = conn();
        if let Some(n) = first_port {
            // What is fought for is then the second slot of the direction, which is only being made.
            assert!(matches!(c.claim(generation(n), D, nobody), ConnClaim::Won(_)));
        }
        let worker = {
            let c = c.clone();
            thread::spawn(move || matches!(c.claim(generation(1), D, nobody), ConnClaim::Won(_)))
        };
        // As `Engine::conn_del` does.
        assert!(c.end());
        for (_, _, slot) in c.all_slots() {
            assert_ne!(
                slot.word.unwind(generation(1)),
                Unwind::Delete,
                "nothing has been dispatched"
            );
        }
        let won = worker.join().unwrap();
        let slot = c.slot(generation(1), D).unwrap();
        if won {
            assert_eq!(
                slot.word.dispatch_add(generation(1)),
                None,
                "an add of a dead connection goes on"
            );
        }
        assert_eq!(slot.word.load().state(), SlotState::Empty);
    });
}

/// Finds: no fence in `Conn::claim`, none in `Conn::end`; `dead` not looked at after the claim.
#[test]
fn a_claim_and_the_end_of_the_connection_see_each_other() {
    claim_against_end(None);
}

/// The same, where `end` has to find a slot that is only being hung on the connection.
#[test]
fn a_claim_of_a_new_slot_and_the_end_of_the_connection_see_each_other() {
    claim_against_end(Some(9));
}

// ---- (2) publication and grace period ----

fn port(n: u32, binding: Option<Binding>) -> Port {
    let netdev = Netdev {
        ifindex: ifindex(n),
        generation: generation(n),
        name: String::new(),
        hw_flags: HwFlags::Both,
    };
    let limits = Limits { queue: 16, ..Limits::default() };
    Port::new(netdev, binding, Vec::new(), std::iter::empty(), &limits, None, Arc::default())
}

/// Port 1, and something that is released after its grace period: loom reports a use that is not
/// ordered before the release.
#[derive(Clone)]
struct Ports {
    publication: Arc<Publication>,
    resource: Rc<UnsafeCell<()>>,
}

impl Ports {
    fn new() -> Self {
        let publication = Arc::new(Publication::default());
        publication.publish(PortTable::default().with(Arc::new(port(1, None))));
        Self { publication, resource: Rc::new(UnsafeCell::new(())) }
    }

    fn worker(&self) -> Worker {
        Worker::new(Arc::clone(&self.publication))
    }

    /// What a worker does between two quiescent states.
    fn batch(&self, worker: &Worker) {
        if worker.port(ifindex(1)).is_some() {
            self.resource.with(|_| ());
        }
    }

    fn delete_port(&self) {
        let version = self.publication.publish(PortTable::default());
        assert!(self.publication.wait(version, Duration::MAX));
        self.resource.with_mut(|_| ());
    }
}

/// Finds: a version published before its table, or without releasing it; a worker that says what it
/// has seen without releasing what it did before; `wait` that does not acquire that.
#[test]
fn a_port_is_released_after_the_batches_that_use_it() {
    exhaustive(|| {
        let ports = Ports::new();
        let mut worker = ports.worker();
        let thread = {
            let ports = ports.clone();
            thread::spawn(move || {
                ports.batch(&worker);
                worker.quiescent();
                ports.batch(&worker);
                worker.quiescent();
            })
        };
        ports.delete_port();
        thread.join().unwrap();
    });
}

/// Finds: no fence in `Worker::online`, none in `Publication::wait`; an `online` that does not say
/// that it is there before it loads the table; a version that is read after the table, or without
/// acquiring it.
#[test]
fn a_worker_that_comes_online_is_waited_for_or_sees_the_new_table() {
    exhaustive(|| {
        let ports = Ports::new();
        let mut worker = ports.worker();
        worker.offline();
        let thread = {
            let ports = ports.clone();
            thread::spawn(move || {
                worker.online();
                ports.batch(&worker);
                worker.offline();
                worker
            })
        };
        ports.delete_port();
        drop(thread.join().unwrap());
    });
}

/// Finds: an `offline` that does not say so (nobody comes back, and the wait never ends), or does
/// not release what was done before it.
#[test]
fn a_worker_that_is_offline_is_not_waited_for() {
    exhaustive(|| {
        let ports = Ports::new();
        let (mut worker, mut sleeper) = (ports.worker(), ports.worker());
        sleeper.offline();
        let thread = {
            let ports = ports.clone();
            thread::spawn(move || {
                ports.batch(&worker);
                worker.offline();
                worker
            })
        };
        ports.delete_port();
        drop((thread.join().unwrap(), sleeper));
    });
}

/// Finds: a worker that is forgotten without its last batch having been waited for.
#[test]
fn a_worker_may_come_and_go() {
    exhaustive(|| {
        let ports = Ports::new();
        let thread = {
            let ports = ports.clone();
            thread::spawn(move || ports.batch(&ports.worker()))
        };
        ports.delete_port();
        thread.join().unwrap();
    });
}

/// Every change has a grace period of its own, also when the worker reloads between the two.
#[test]
fn each_of_two_changes_has_its_grace_period() {
    bounded(4, || {
        let ports = Ports::new();
        let mut worker = ports.worker();
        let thread = {
            let ports = ports.clone();
            thread::spawn(move || {
                for _ in 0..2 {
                    ports.batch(&worker);
                    worker.quiescent();
                }
            })
        };
        let other =
            PortTable::default().with(Arc::new(port(1, None))).with(Arc::new(port(2, None)));
        ports.publication.publish(other);
        ports.delete_port();
        thread.join().unwrap();
    });
}

// ---- (3) the queue's sleep ----

const COOKIE: Cookie =
    Cookie { instance: Instance(NonZeroU32::MIN), epoch: Epoch(1), direction: Direction::Original };

/// Takes so many commands, as `Writer::run` does. In a model nobody wakes up because time passes: a
/// wake-up that is lost leaves this thread asleep for ever.
fn take(queue: &Queue, count: usize) {
    let mut taken = 0;
    while taken < count {
        match queue.pop() {
            Some(_) => taken += 1,
            None => queue.park(Duration::from_secs(1)),
        }
    }
}

/// Finds: no fence in `Queue::park`, none in `Queue::wake`; a sleep without a second look at the
/// queue; a look at the queue before `sleeping` is set; a wake-up before the push; `sleeping` set
/// without releasing which thread it is.
#[test]
fn no_wake_up_is_lost() {
    exhaustive(|| {
        let queue = Arc::new(Queue::new(16));
        let writer = {
            let queue = Arc::clone(&queue);
            thread::spawn(move || {
                queue.set_writer();
                take(&queue, 2);
            })
        };
        // The second finds the writer awake, asleep again, or falling asleep.
        queue.push(Command::DeleteRule(RuleId(1), COOKIE));
        queue.push(Command::DeleteRule(RuleId(2), COOKIE));
        writer.join().unwrap();
    });
}

/// One of several who push makes the system call; it must not be none of them.
/// Several offers of which the writer is told once, behind the last.
///
/// Finds: no fence in `Queue::park`, none in `Queue::wake`; one that is told of before it is put.
#[test]
fn no_wake_up_is_lost_behind_a_batch() {
    exhaustive(|| {
        let queue = Arc::new(Queue::new(16));
        let writer = {
            let queue = Arc::clone(&queue);
            thread::spawn(move || {
                queue.set_writer();
                take(&queue, 2);
            })
        };
        for lane in 0..2 {
            assert!(queue.put_add(lane, conn(), D, known_path()));
        }
        queue.wake();
        writer.join().unwrap();
    });
}

/// A writer that has nothing to do leaves its thread, and somebody pushes: either it stays, or a thread is
/// started for it, one, and finds what was pushed.
///
/// Finds: no fence in `Queue::rest`, none in `Queue::wake`; no second look at the queue behind the fence; a
/// job that is put down after the state says so; an exchange that is a store.
#[test]
fn a_writer_that_rests_is_started_when_something_is_pushed() {
    exhaustive(|| {
        let queue = Arc::new(Queue::new(16));
        let started = Arc::new(loom::sync::atomic::AtomicUsize::new(0));
        queue.set_start({
            let started = Arc::clone(&started);
            Box::new(move || {
                started.fetch_add(1, Ordering::SeqCst);
            })
        });
        let rests = {
            let queue = Arc::clone(&queue);
            thread::spawn(move || queue.rest(Job(Box::new(|| None))))
        };
        queue.push(Command::DeleteRule(RuleId(1), COOKIE));
        let stays = rests.join().unwrap().is_some();
        let started = started.load(Ordering::SeqCst);
        // What was pushed before it rests keeps it, what is pushed afterwards starts it.
        assert_eq!(usize::from(stays) + started, 1);
        assert_eq!(queue.take_job().is_some(), !stays, "whoever is started has it");
        assert!(queue.pop().is_some());
    });
}

/// What comes behind the offers that wait, of two threads, comes behind all of them.
///
/// Finds: counts of one lane only; a turn that is given before the offers are taken; a lane that is made
/// without being seen.
#[test]
fn what_comes_behind_the_offers_has_its_turn_and_not_before() {
    bounded(3, || {
        let queue = Arc::new(Queue::new(16));
        assert!(queue.put_add(0, conn(), D, known_path()));
        let other = {
            let queue = Arc::clone(&queue);
            thread::spawn(move || {
                assert!(queue.put_add(1, conn(), D, known_path()));
                queue.push(Command::Retracted(ifindex(2)));
            })
        };
        let mut taken = Vec::new();
        while taken.len() < 3 {
            match queue.pop() {
                Some(command) => taken.push(matches!(command, Command::Retracted(_))),
                None => thread::yield_now(),
            }
        }
        other.join().unwrap();
        assert_eq!(taken, [false, false, true]);
    });
}

#[test]
fn no_wake_up_is_lost_among_several_who_push() {
    bounded(4, || {
        let queue = Arc::new(Queue::new(16));
        let pushers = [1, 2].map(|n| {
            let queue = Arc::clone(&queue);
            thread::spawn(move || queue.push(Command::DeleteRule(RuleId(n), COOKIE)))
        });
        queue.set_writer();
        take(&queue, 2);
        pushers.into_iter().for_each(|t| t.join().unwrap());
    });
}

/// Finds: a bound that is looked at before it is counted.
#[test]
fn no_more_offers_wait_than_may() {
    exhaustive(|| {
        let queue = Arc::new(Queue::new(1));
        let c = conn();
        let thread = {
            let (queue, c) = (Arc::clone(&queue), c.clone());
            thread::spawn(move || queue.put_add(0, c, D, known_path()))
        };
        let here = queue.put_add(0, c, D, known_path());
        assert!(thread.join().unwrap() != here);
        assert_eq!(queue.pending(), 1);
        assert!(queue.pop().is_some() && queue.pop().is_none());
        assert_eq!(queue.pending(), 0);
    });
}

/// Whoever finds nothing unfinished sees all that was made of what it pushed.
///
/// Finds: a command that is called finished before it is, or counted after it is pushed; `finished`
/// that does not release, `is_finished` that does not acquire.
#[test]
fn what_is_finished_can_be_seen() {
    exhaustive(|| {
        let queue = Arc::new(Queue::new(16));
        let work = Rc::new(UnsafeCell::new(()));
        let writer = {
            let (queue, work) = (Arc::clone(&queue), Rc::clone(&work));
            thread::spawn(move || {
                while let Some(command) = queue.pop() {
                    if matches!(command, Command::DeleteRule(RuleId(1), _)) {
                        work.with_mut(|_| ());
                    }
                    queue.finished(1);
                }
            })
        };
        let other = {
            let queue = Arc::clone(&queue);
            thread::spawn(move || queue.push(Command::DeleteRule(RuleId(2), COOKIE)))
        };
        queue.push(Command::DeleteRule(RuleId(1), COOKIE));
        if queue.is_finished() {
            work.with_mut(|_| ());
        }
        writer.join().unwrap();
        other.join().unwrap();
    });
}

// ---- (4) an add, its completion, and whoever wants it gone ----

/// One slot and the backend's side of it.
struct Backend {
    conn: ConnHandle,
    word: SlotWord,
    /// Has one operation at a time: loom reports two that are not ordered.
    provider: UnsafeCell<()>,
    // Changed in one step with the operation of loom's in front of the change.
    rules: Cell<i32>,
    deletes: Cell<i32>,
    told: Cell<i32>,
}

fn count(c: &Cell<i32>, by: i32) {
    c.set(c.get() + by);
}

impl Backend {
    /// Claimed, and not yet dispatched.
    fn claimed() -> Rc<Self> {
        let b = Rc::new(Self {
            conn: conn(),
            word: SlotWord::default(),
            provider: UnsafeCell::new(()),
            rules: Cell::default(),
            deletes: Cell::default(),
            told: Cell::default(),
        });
        b.word.claim(generation(1), nobody);
        b
    }

    /// The port's writer, and the provider's completion.
    fn add(&self) {
        if let Some(op) = self.word.dispatch_add(generation(1)) {
            self.provider.with_mut(|_| count(&self.rules, 1));
            match self.word.added(op) {
                AfterAdd::Settled => {
                    if self.conn.replied_by_now() && self.word.reply_seen(generation(1)) {
                        self.tell();
                    }
                }
                AfterAdd::Delete => self.delete(),
                AfterAdd::Late => panic!("nobody has reset the slot"),
            }
        }
    }

    fn delete(&self) {
        count(&self.deletes, 1);
        let op = self
            .word
            .dispatch_delete(generation(1))
            .expect("a delete that was asked for is dispatched");
        self.provider.with_mut(|_| count(&self.rules, -1));
        assert!(self.word.deleted(op));
    }

    fn unwind(&self) {
        if self.word.unwind(generation(1)) == Unwind::Delete {
            self.delete();
        }
    }

    fn reply(&self) {
        self.conn.note_reply();
        if self.word.reply_seen(generation(1)) {
            self.tell();
        }
    }

    fn tell(&self) {
        if let Some(op) = self.word.dispatch_established(generation(1)) {
            assert_eq!(self.rules.get(), 1, "the provider is told of a rule that it has");
            self.provider.with_mut(|_| count(&self.told, 1));
            if self.word.established(op) {
                self.delete();
            }
        }
    }

    /// Runs these on threads of their own while this one adds.
    fn against(self: &Rc<Self>, others: &[fn(&Self)]) {
        let threads: Vec<_> = others
            .iter()
            .map(|&other| {
                let b = Rc::clone(self);
                thread::spawn(move || other(&b))
            })
            .collect();
        self.add();
        threads.into_iter().for_each(|t| t.join().unwrap());
    }

    fn check_gone(&self) {
        assert_eq!(self.word.load().state(), SlotState::Empty);
        assert_eq!(self.rules.get(), 0, "a rule that nobody deletes");
        assert!(self.deletes.get() <= 1);
    }
}

/// The connection ends while its add is under way.
///
/// Finds: `unwind` that does not set CANCEL; `added` or `dispatch_add` that do not look at it;
/// transitions that are not one exchange, or that do not release and acquire.
#[test]
fn a_cancel_is_never_lost() {
    exhaustive(|| {
        let b = Backend::claimed();
        b.against(&[Backend::unwind]);
        b.check_gone();
    });
}

/// The connection ends while its path changes and its add is under way.
///
/// Finds: `unwind` that asks for the delete of a slot that is Deleting.
#[test]
fn a_delete_is_made_once() {
    bounded(4, || {
        let b = Backend::claimed();
        b.against(&[Backend::unwind, Backend::unwind]);
        b.check_gone();
    });
}

/// The connection ends while its reply is seen and its add is under way.
///
/// Finds: `unwind` of a slot whose provider is being told, and does not wait for that; `established`
/// that does not look at CANCEL.
#[test]
fn a_delete_waits_for_the_message_about_the_reply() {
    bounded(4, || {
        let b = Backend::claimed();
        b.against(&[Backend::unwind, Backend::reply]);
        b.check_gone();
    });
}

/// Finds: a reply seen that does not set REPLY_SENT; no fence in `Conn::note_reply`, none in
/// `Conn::replied_by_now`.
#[test]
fn a_reply_is_told_once_and_after_installation() {
    bounded(4, || {
        let b = Backend::claimed();
        b.against(&[Backend::reply, Backend::reply]);
        assert_eq!(b.told.get(), 1);
    });
}

/// A flush gave up waiting for an add, and the slot was claimed again: its completion either came
/// before, and then the flush saw the rule, or it is late, and then its rule is deleted by itself.
///
/// Finds: `added` that does not compare the operation's number; a claim that does not count it.
#[test]
fn a_late_completion_is_recognised() {
    exhaustive(|| {
        let b = Backend::claimed();
        let old = b.word.dispatch_add(generation(1)).unwrap();
        let flush = {
            let b = Rc::clone(&b);
            thread::spawn(move || {
                let before = b.word.reset(generation(1));
                b.word.claim(generation(1), nobody);
                (before, b.word.dispatch_add(generation(1)).unwrap())
            })
        };
        let late = b.word.added(old) == AfterAdd::Late;
        let (before, new) = flush.join().unwrap();
        assert_eq!(late, before == Some(SlotState::Pending));
        assert_eq!(b.word.added(new), AfterAdd::Settled);
    });
}

// ---- the index ----

/// One that has heard of the zone: loom does not see the locks of `std` by which one thread learns of a zone that
/// another one has made.
fn index() -> Arc<Zones> {
    let zones = Zones::new(1);
    assert!(matches!(zones.enter(&key(), |_| true, |_| None), Entered::None));
    Arc::new(zones)
}

/// A connection behind NAT ends while it is entered: by the tuple of its answers it is found as long as it
/// lives, and not when both are done.
///
/// Finds: `add_reply` without its look at the connection's end, or without the fence before that; `Conn::end` without
/// its own.
#[test]
fn what_ends_while_it_is_entered_is_not_found_by_its_answers() {
    exhaustive(|| {
        let answers: Tuple = "tcp 198.51.100.1:80 > 203.0.113.9:1000".parse().unwrap();
        let (zones, conn) = (index(), ConnHandle::new(key(), answers, Epoch(1), 0, 0));
        let ended = {
            let zones = Arc::clone(&zones);
            thread::spawn(move || {
                // What the engine does when one is deleted.
                zones.find(&key()).is_some_and(|conn| conn.end() && zones.remove(&conn))
            })
        };
        assert!(matches!(zones.enter(&key(), |_| true, |_| Some(conn.clone())), Entered::New(_)));
        let ended = ended.join().unwrap();
        assert_eq!(zones.find(&key()).is_some(), !ended);
        assert_eq!(zones.of_tuple(&answers, None).len(), usize::from(!ended));
    });
}

/// The same where all are taken out while the first behind NAT is entered.
///
/// Finds: the same.
#[test]
fn nothing_is_found_by_its_answers_when_all_were_taken_out() {
    exhaustive(|| {
        let answers: Tuple = "tcp 198.51.100.1:80 > 203.0.113.9:1000".parse().unwrap();
        let (zones, conn) = (index(), ConnHandle::new(key(), answers, Epoch(1), 0, 0));
        let taken = {
            let zones = Arc::clone(&zones);
            thread::spawn(move || {
                let mut taken = 0;
                zones.take_all(|conn| taken += usize::from(conn.end()));
                taken
            })
        };
        zones.enter(&key(), |_| true, |_| Some(conn.clone()));
        let taken = taken.join().unwrap();
        assert_eq!(zones.find(&key()).is_some(), taken == 0);
        assert_eq!(zones.of_tuple(&answers, None).len(), 1 - taken);
    });
}

// ---- all of it: worker, queue, writer, provider ----

/// Keeps what it is given until somebody has it [completed](Self::complete), or does it at once.
#[derive(Default)]
struct ModelProvider {
    at_once: bool,
    given: loom::sync::Mutex<Vec<Operation>>,
    rules: Mutex<Vec<RuleId>>,
    adds: AtomicU64,
    deletes: AtomicU64,
}

impl ModelProvider {
    fn complete(&self) {
        let given = std::mem::take(&mut *self.given.lock().unwrap());
        for operation in given {
            let done = match &operation.request {
                Request::Add { .. } | Request::Track { .. } => {
                    let rule = RuleId(self.adds.fetch_add(1, Ordering::Relaxed));
                    self.rules.lock().unwrap().push(rule);
                    Done::added(rule, None)
                }
                Request::Delete { rule, .. } => {
                    self.deletes.fetch_add(1, Ordering::Relaxed);
                    self.rules.lock().unwrap().retain(|r| r != rule);
                    Done::Deleted
                }
                // Nothing was observed, so nothing is to be adopted.
                Request::Adopt { found, .. } => Done::added(*found, None),
                Request::Established { .. } => Done::Noted,
            };
            operation.complete(Ok(done));
        }
    }
}

impl Provider for ModelProvider {
    fn can_offload(&self, _: &Flow) -> Result<(), Rejection> {
        Ok(())
    }
    fn submit(&self, batch: Vec<Operation>) {
        self.given.lock().unwrap().extend(batch);
        if self.at_once {
            self.complete();
        }
    }
    fn usage(&self, _: &mut dyn FnMut(RuleReport)) -> Result<(), Fault> {
        Ok(())
    }
    fn flush(&self) -> Result<u64, Fault> {
        Ok(self.rules.lock().unwrap().drain(..).count() as u64)
    }
    fn release(&self) -> Result<(), Fault> {
        Ok(())
    }
}

fn known_path() -> PathSpec {
    let forward = Forward {
        egress: ifindex(9),
        vlan: None,
        mtu: 1500,
        tuple: key().original,
        macs: None,
        egress_decides: false,
    };
    PathSpec::Known(Box::new(Path {
        eth_dst: None,
        vlan: None,
        ingress_mtu: 1500,
        forward,
        next_hop: None,
        iif: None,
        oif: None,
        answer: 0,
    }))
}

/// An engine with one port, whose writer runs.
struct Bench {
    engine: Engine,
    conn: ConnHandle,
    provider: Arc<ModelProvider>,
    port: Arc<Port>,
    writer: thread::JoinHandle<After>,
}

impl Bench {
    fn new(at_once: bool) -> Self {
        let engine = Engine::new(
            NonZeroU32::MIN,
            Arc::new(NoDatapath),
            Limits::default(),
            Clock::Manual(Arc::new(AtomicU64::new(1000))),
        );
        let provider = Arc::new(ModelProvider { at_once, ..ModelProvider::default() });
        let chosen = super::port::Chosen::Listed;
        let binding = Binding { class: "model", chosen, provider: Arc::clone(&provider) as _ };
        let port = Arc::new(port(1, Some(binding)));
        let mut writer =
            Writer::new(Arc::clone(&port), Arc::clone(&provider) as _, Arc::clone(&engine.0));
        // Not `run`, which goes on behind a panic: those of the model checker are its verdict.
        let writer = thread::spawn(move || writer.serve());
        engine.0.publication.publish(PortTable::default().with(Arc::clone(&port)));
        let conn = engine.conn_create(key(), key().original.inverted(), 1).unwrap();
        Self { engine, conn, provider, port, writer }
    }

    /// A worker on a thread of its own, which offers the connection once. Then the thread is the
    /// provider's.
    fn offer(&self) -> thread::JoinHandle<Offer> {
        let (worker, conn, provider) =
            (self.engine.worker(), self.conn.clone(), Arc::clone(&self.provider));
        thread::spawn(move || {
            let offer = match worker.port(ifindex(1)) {
                Some(port) => port.conn_seen(&conn, D, known_path()),
                None => Offer::Unbound,
            };
            drop(worker);
            if !provider.at_once {
                thread::yield_now();
                provider.complete();
            }
            offer
        })
    }

    /// Lets the writer and the provider go on until nothing of the connection is under way.
    fn settle(&self) {
        while matches!(self.state(), SlotState::Pending | SlotState::Deleting) {
            thread::yield_now();
            self.provider.complete();
        }
    }

    fn state(&self) -> SlotState {
        let slot = self.conn.slot(generation(1), D);
        slot.map_or(SlotState::Empty, |s| s.word.load().state())
    }

    /// The rest of `Engine::port_del`, whose waiting for an answer loom cannot see.
    fn stop(self) -> (Stopped, Arc<ModelProvider>) {
        let (tx, rx) = mpsc::channel();
        self.port.queue.push(Command::Stop(End::Flush, tx));
        assert_eq!(self.writer.join().unwrap(), After::Stopped);
        assert!(self.port.queue.pop().is_none(), "a command that nobody carries out");
        assert!(self.port.fault().is_none());
        (rx.try_recv().unwrap(), self.provider)
    }
}

/// A worker offers a connection while it ends: whatever the writer is doing meanwhile, what was
/// installed is deleted, once, and nothing remains.
fn ended_while_offered(preemptions: usize, at_once: bool) {
    bounded(preemptions, move || {
        let bench = Bench::new(at_once);
        let offer = bench.offer();
        bench.engine.conn_del(&bench.conn);
        let offer = offer.join().unwrap();
        assert!(matches!(offer, Offer::Queued | Offer::Refused(_)), "{offer:?}");
        bench.settle();
        assert_eq!(bench.state(), SlotState::Empty);
        let (stopped, provider) = bench.stop();
        assert_eq!(stopped.flushed, 0);
        let (adds, deletes) = (&provider.adds, &provider.deletes);
        assert!(adds.load(Ordering::Relaxed) <= 1);
        assert_eq!(adds.load(Ordering::Relaxed), deletes.load(Ordering::Relaxed));
    });
}

#[test]
fn nothing_remains_of_a_connection_that_ends_while_it_is_offered() {
    ended_while_offered(3, true);
}

/// The same with a provider that completes on a thread of its own.
#[test]
fn nothing_remains_of_it_when_the_provider_takes_its_time() {
    ended_while_offered(2, false);
}

/// A port is deleted while a worker offers on it: the grace period sees to it that no offer comes
/// after the writer's end.
#[test]
fn nothing_remains_on_a_port_that_is_deleted_while_it_is_offered_to() {
    bounded(3, || {
        let bench = Bench::new(true);
        let offer = bench.offer();
        let version = bench.engine.0.publication.publish(PortTable::default());
        assert!(bench.engine.0.publication.wait(version, Duration::MAX));
        let conn = bench.conn.clone();
        let (_, provider) = bench.stop();
        offer.join().unwrap();
        let slot = conn.slot(generation(1), D);
        assert!(slot.is_none_or(|s| s.word.load().state() == SlotState::Empty));
        assert!(provider.rules.lock().unwrap().is_empty());
    });
}
