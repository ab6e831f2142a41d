//! The engine's contract, sentence by sentence, on dummy providers.

mod binding;
mod capacity;
mod edges;
mod faults;
mod model;
mod parts;
mod places;
mod reconcile;
mod rejections;
mod removal;
mod slow;
mod sweeps;
mod track;
mod usage;

use std::sync::Mutex as StdMutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use netdev_providers::dummy::{Call, DummyClass, DummyRule};
use netdev_providers::{
    Epoch, Forward, Generation, Leftover, MacAddr, MacRewrite, Netdev, Permanence, Reason,
    Rejection, Request,
};

use super::ask::Asked;
use super::conn::ConnKey;
use super::datapath::{Path, PathHint, PathSpec, Recognised, Sight, SlotChange};
use super::queue::Command;
use super::reconcile::Reconciled;
use super::slot::SlotState;
use super::usage::{Strays, Usage};
use super::worker::Offer;
use super::*;

/// As `scripts/mutants` builds: what does not happen soon will not happen.
const HURRY: bool = option_env!("CTOFFLOAD_TEST_HURRY").is_some();

/// A busy machine takes its time, above all to print where something panicked on purpose.
const PATIENCE: Duration = Duration::from_secs(if HURRY { 15 } else { 60 });

/// Rules by port, epoch and whether they are of replies; and what was told without news.
type Follower = (std::collections::BTreeSet<(String, u64, bool)>, Vec<String>);

/// A datapath that answers what the test sets, and remembers what it is told.
#[derive(Default)]
struct TestDatapath {
    rearmed: StdMutex<Vec<(Ifindex, u64, Direction)>>,
    egress: StdMutex<Option<Ifindex>>,
    refuse: StdMutex<Option<Rejection>>,
    unprepared: StdMutex<Option<Rejection>>,
    /// What rules that a dead engine left are recognised as, by their tuple.
    living: StdMutex<Vec<(Tuple, u16)>>,
    /// Packets of every slot that it has forwarded itself.
    forwarded: AtomicU64,
    /// The next path is refused so, and what it is refused for has gone by then.
    refuse_too_late: StdMutex<Option<Rejection>>,
    changes: AtomicU64,
    /// Whether it panics when it is asked for a path.
    panics: AtomicBool,
    /// What it was told of ports whose thread has panicked.
    port_panics: StdMutex<Vec<String>>,
    /// What it was told of slots: port, tag, direction, what became of it.
    told: StdMutex<Vec<String>>,
    /// The rules that there are, for all that it was told.
    follower: StdMutex<Follower>,
}

impl Datapath for TestDatapath {
    fn resolve(&self, sight: &Sight, _: &PathHint) -> Result<Path, Rejection> {
        assert!(!self.panics.load(Ordering::SeqCst), "resolve panics on demand");
        if let Some(r) = self.refuse.lock().unwrap().clone() {
            return Err(r);
        }
        if let Some(r) = self.refuse_too_late.lock().unwrap().take() {
            self.changes.fetch_add(1, Ordering::SeqCst);
            return Err(r);
        }
        let egress = self.egress.lock().unwrap().unwrap_or_else(|| ifindex(99));
        Ok(path(&sight.conn, sight.direction, egress))
    }
    fn changes(&self) -> u64 {
        self.changes.load(Ordering::SeqCst)
    }
    fn prepare(&self, sights: &[Sight]) -> Vec<Result<(), Rejection>> {
        let result = self.unprepared.lock().unwrap().clone().map_or(Ok(()), Err);
        vec![result; sights.len()]
    }
    fn recognise(
        &self,
        _: &Netdev,
        leftovers: &[Leftover],
        create: &dyn Fn(ConnKey, Tuple, u64) -> Option<ConnHandle>,
    ) -> Vec<Option<Recognised>> {
        let living = self.living.lock().unwrap();
        leftovers
            .iter()
            .map(|l| {
                let (original, n) = living.iter().find(|(t, _)| Some(*t) == l.tuple)?;
                let key = ConnKey { zone: Zone(0), original: *original };
                let conn = create(key, original.inverted(), u64::from(*n))?;
                let path = PathSpec::Resolve(PathHint::default());
                Some(Recognised { conn, direction: l.cookie.direction, path })
            })
            .collect()
    }
    fn forwarded_itself(&self, sights: &[Sight]) -> Vec<Option<u64>> {
        vec![Some(self.forwarded.load(Ordering::SeqCst)); sights.len()]
    }
    fn port_panicked(&self, port: &Netdev, words: &str) {
        self.port_panics.lock().unwrap().push(format!("{}: {words}", port.name));
    }
    fn slot_changed(&self, port: &Netdev, conn: &ConnHandle, d: Direction, change: SlotChange<'_>) {
        let what = match change {
            SlotChange::Installed => "installed".to_owned(),
            SlotChange::Rejected(why) => format!("rejected: {}", why.reason),
            SlotChange::Deleted => "deleted".to_owned(),
        };
        let told = format!("{} {} {d} {what}", port.name, conn.tag());
        let rule = (port.name.clone(), conn.epoch().0, d == Direction::Reply);
        let (rules, wrong) = &mut *self.follower.lock().unwrap();
        let is_news = match change {
            SlotChange::Installed => rules.insert(rule),
            SlotChange::Deleted => rules.remove(&rule),
            // Also of a rule that did nothing.
            SlotChange::Rejected(_) => {
                rules.remove(&rule);
                true
            }
        };
        if !is_news {
            wrong.push(told.clone());
        }
        self.told.lock().unwrap().push(told);
    }
    fn rearm(&self, sights: &[Sight]) {
        let mut rearmed = self.rearmed.lock().unwrap();
        rearmed.extend(sights.iter().map(|s| (s.ifindex, s.conn.tag(), s.direction)));
    }
}

fn ifindex(n: u32) -> Ifindex {
    Ifindex::new(n).unwrap()
}

fn new_port(n: u32) -> NewPort {
    let name = format!("p{n}");
    NewPort { ifindex: ifindex(n), name, hw_flags: HwFlags::Both, providers: None, capacity: None }
}

fn path(conn: &ConnHandle, d: Direction, egress: Ifindex) -> Path {
    Path {
        eth_dst: Some(MacAddr([2, 0, 0, 0, 0, 1])),
        vlan: None,
        ingress_mtu: 1500,
        forward: Forward {
            egress,
            vlan: None,
            mtu: 1500,
            tuple: conn.leaving(d),
            macs: Some(MacRewrite { src: MacAddr([2; 6]), dst: MacAddr([4; 6]) }),
            egress_decides: false,
        },
        next_hop: None,
        iif: None,
        oif: None,
        answer: 0,
    }
}

struct Bench {
    engine: Engine,
    datapath: Arc<TestDatapath>,
    clock: Arc<AtomicU64>,
}

impl Bench {
    fn new(classes: &[&DummyClass]) -> Self {
        Self::with_limits(classes, Limits { port_del: PATIENCE, ..Limits::default() })
    }

    fn with_limits(classes: &[&DummyClass], limits: Limits) -> Self {
        let datapath = Arc::new(TestDatapath::default());
        let clock = Arc::new(AtomicU64::new(1000));
        let engine = Engine::new(
            NonZeroU32::new(7).unwrap(),
            Arc::clone(&datapath) as Arc<dyn Datapath>,
            limits,
            Clock::Manual(Arc::clone(&clock)),
        );
        for class in classes {
            engine.register(Arc::new((*class).clone())).unwrap();
        }
        Self { engine, datapath, clock }
    }

    /// On a busy machine the thread of the port before may not have let go of the netdev yet.
    fn port(&self, n: u32) -> Generation {
        let mut added = None;
        wait_for(|| {
            added = match self.engine.port_add(new_port(n)) {
                Ok(generation) => Some(generation),
                Err(PortAddError::Busy(_)) => None,
                Err(e) => panic!("{e}"),
            };
            added.is_some()
        });
        added.unwrap()
    }

    fn conn(&self, n: u16) -> ConnHandle {
        let original =
            format!("tcp 192.0.2.{}:{} > 198.51.100.1:80", n % 250 + 1, n).parse().unwrap();
        let key = ConnKey { zone: Zone(0), original };
        self.engine.conn_create(key, original.inverted(), u64::from(n)).unwrap()
    }

    fn offer(&self, n: u32, conn: &ConnHandle, d: Direction) -> Offer {
        let worker = self.engine.worker();
        let port = worker.port(ifindex(n)).unwrap();
        port.conn_seen(conn, d, PathSpec::Resolve(PathHint::default()))
    }

    /// Everything queued so far has been carried out.
    fn settle(&self) {
        for _ in 0..3 {
            assert!(self.engine.synchronize());
        }
    }

    /// The same of one port.
    fn settle_one(&self, n: u32) {
        let table = self.engine.0.publication.table();
        let port = table.get(ifindex(n)).unwrap();
        Asked::of(port, Command::Barrier).wait(PATIENCE).unwrap();
    }

    /// The same where operations stay with the provider: the queue is empty.
    fn drained(&self, dummy: &DummyClass, pending: usize) {
        wait_for(|| dummy.pending().len() == pending);
    }

    /// A connection whose add the first port's provider has, and keeps until it is told to go on.
    fn in_flight(&self, dummy: &DummyClass) -> ConnHandle {
        dummy.set_latency(Some(Duration::MAX));
        let conn = self.conn(1);
        self.offer(1, &conn, Original);
        self.drained(dummy, 1);
        conn
    }

    fn install(&self, n: u32, conn: &ConnHandle, d: Direction) {
        assert_eq!(self.offer(n, conn, d), Offer::Queued);
        self.settle();
        assert_eq!(self.state(n, conn, d), Some(SlotState::Installed));
    }

    fn state(&self, n: u32, conn: &ConnHandle, d: Direction) -> Option<SlotState> {
        self.engine
            .slots(conn)
            .into_iter()
            .find(|s| s.netdev.ifindex == ifindex(n) && s.direction == d)
            .map(|s| s.state)
    }

    fn rearmed(&self) -> Vec<(Ifindex, u64, Direction)> {
        std::mem::take(&mut *self.datapath.rearmed.lock().unwrap())
    }
}

fn wait_for(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "it did not happen within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

use Direction::{Original, Reply};

// ---- add, seen ----

#[test]
fn a_connection_is_offloaded_where_it_was_seen_and_nowhere_else() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    b.port(2);
    b.port(3);
    let conn = b.conn(1);
    b.install(1, &conn, Original);
    assert_eq!(dummy.rules(ifindex(1)).len(), 1);
    assert!(dummy.rules(ifindex(2)).is_empty());
    b.install(2, &conn, Reply);
    assert_eq!(dummy.rules(ifindex(2)).len(), 1);
    assert_eq!(dummy.requests(), 2, "no operation on the netdev that never saw it");
    assert!(dummy.rules(ifindex(3)).is_empty());
}

#[test]
fn both_directions_may_arrive_on_one_port_and_one_direction_on_several() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    b.port(2);
    let conn = b.conn(1);
    b.install(1, &conn, Original);
    b.install(1, &conn, Reply);
    b.install(2, &conn, Original);
    assert_eq!(b.engine.slots(&conn).len(), 3);
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn workers_that_see_the_same_packet_make_one_rule() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    for n in 0..200 {
        let conn = b.conn(n);
        let queued: usize = std::thread::scope(|s| {
            let offers: Vec<_> =
                (0..2).map(|_| s.spawn(|| b.offer(1, &conn, Original) == Offer::Queued)).collect();
            offers.into_iter().map(|t| usize::from(t.join().unwrap())).sum()
        });
        assert_eq!(queued, 1);
    }
    b.settle();
    assert_eq!(dummy.rules(ifindex(1)).len(), 200);
}

// ---- cancel, late ----

#[test]
fn a_connection_that_ends_while_its_add_is_in_flight_leaves_no_rule() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conn = b.in_flight(&dummy);
    assert_eq!(b.engine.conn_del(&conn), 1);
    dummy.set_latency(None);
    dummy.release_pending();
    wait_for(|| dummy.rules(ifindex(1)).is_empty() && b.engine.slots(&conn).is_empty());
    assert_eq!(dummy.requests(), 2, "the add, and the delete that followed it");
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn a_tuple_that_comes_back_is_another_connection() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let old = b.conn(1);
    b.install(1, &old, Original);
    // The same tuple, with another id of the datapath: the end of the old one was missed.
    let new = b.engine.conn_create(old.key(), old.reply(), 4711).unwrap();
    assert!(!new.is_same(&old));
    assert!(old.is_dead());
    assert!(new.epoch() > old.epoch());
    b.install(1, &new, Original);
    let rules = dummy.rules(ifindex(1));
    assert_eq!(rules.len(), 1);
    assert_eq!(rules[0].cookie.epoch, new.epoch());
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn operations_of_one_match_are_carried_out_in_the_order_they_were_asked_for() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let mut present = b.conn(1);
    b.install(1, &present, Original);
    // The port's thread is kept busy, so that what follows comes to it as one batch.
    dummy.hang(Call::Submit);
    assert_eq!(b.offer(1, &b.conn(2), Original), Offer::Queued);
    for tag in 100..104 {
        present = b.engine.conn_create(present.key(), present.reply(), tag).unwrap();
        assert_eq!(b.offer(1, &present, Original), Offer::Queued);
    }
    dummy.let_go();
    b.settle();
    assert_eq!(b.state(1, &present, Original), Some(SlotState::Installed));
    assert_eq!(dummy.rules(ifindex(1)).len(), 2);
    assert!(
        b.engine.ports()[0].totals.reasons.is_empty(),
        "{:?}",
        b.engine.ports()[0].totals.reasons
    );
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn a_port_added_again_is_a_new_generation_that_inherits_nothing() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    let first = b.port(1);
    let conn = b.conn(1);
    b.install(1, &conn, Original);
    b.engine.port_del(ifindex(1)).unwrap();
    let second = b.port(1);
    assert!(second > first);
    assert!(dummy.rules(ifindex(1)).is_empty());
    assert!(b.engine.slots(&conn).is_empty());
    b.install(1, &conn, Original);
}

#[test]
fn a_completion_for_a_generation_that_is_gone_is_nothing_to_its_successor() {
    let dummy = DummyClass::new("dummy");
    let soon = Duration::from_millis(50);
    let limits = Limits { port_del: soon, complete: soon, ..Limits::default() };
    let b = Bench::with_limits(&[&dummy], limits);
    b.port(1);
    let conn = b.in_flight(&dummy);
    b.engine.port_del(ifindex(1)).unwrap();
    b.port(1);
    dummy.set_latency(None);
    // Of the same ifindex, the same connection and the same match, and in flight still.
    b.install(1, &conn, Original);
    let rule = b.engine.slots(&conn).remove(0).rule;
    dummy.release_pending();
    b.settle();
    assert_eq!(b.engine.slots(&conn).len(), 1);
    assert_eq!(b.engine.slots(&conn)[0].rule, rule);
    assert_eq!(dummy.rules(ifindex(1)).len(), 1);
    assert_eq!(b.engine.ports()[0].totals.adds, 1, "the old one is not counted as the new one's");
}

// ---- established ----

#[test]
fn a_delete_follows_the_message_about_the_reply() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conn = b.conn(1);
    b.install(1, &conn, Original);
    dummy.set_latency(Some(Duration::MAX));
    let worker = b.engine.worker();
    worker.port(ifindex(1)).unwrap().conn_established(&conn, Original);
    b.drained(&dummy, 1);
    b.engine.conn_del(&conn);
    dummy.set_latency(None);
    dummy.release_pending();
    wait_for(|| dummy.rules(ifindex(1)).is_empty());
    assert_eq!(dummy.requests(), 3);
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn the_reply_is_told_once_and_only_after_the_rule_is_installed() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conn = b.in_flight(&dummy);
    let worker = b.engine.worker();
    let port = worker.port(ifindex(1)).unwrap();
    for _ in 0..3 {
        port.conn_established(&conn, Original);
    }
    assert_eq!(dummy.requests(), 1, "latched while the add is pending");
    dummy.set_latency(None);
    dummy.release_pending();
    b.settle();
    assert_eq!(dummy.requests(), 2);
    port.conn_established(&conn, Original);
    b.settle();
    assert_eq!(dummy.requests(), 2, "at most once");
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn who_watches_is_told_what_becomes_of_a_slot() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let (one, two) = (b.conn(1), b.conn(2));
    b.install(1, &one, Reply);
    dummy.fail_next(1, Reason::Unsupported);
    b.offer(1, &two, Original);
    b.settle();
    b.engine.conn_retract(&one, TakenBack::Asked);
    b.settle();
    let told = std::mem::take(&mut *b.datapath.told.lock().unwrap());
    assert_eq!(
        told,
        ["p1 1 reply installed", "p1 2 original rejected: unsupported", "p1 1 reply deleted"]
    );
}

#[test]
fn what_is_refused_for_what_has_just_gone_is_asked_again() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    *b.datapath.refuse_too_late.lock().unwrap() = Some(Reason::IpsecPolicy.into());
    b.install(1, &b.conn(1), Original);
}
