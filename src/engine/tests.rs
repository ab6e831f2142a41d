//! The engine's contract, sentence by sentence, on dummy providers.

mod capacity;
mod faults;
mod model;
mod reconcile;

use std::sync::Mutex as StdMutex;
use std::time::Duration;

use netdev_providers::dummy::{Call, DummyClass, DummyRule};
use netdev_providers::{
    Forward, Leftover, MacAddr, MacRewrite, Permanence, Reason, Rejection, Request,
};

use super::datapath::{Path, PathHint, PathSpec, Sight};
use super::reconcile::{Recognised, Reconciled};
use super::slot::SlotState;
use super::usage::{Strays, Usage};
use super::worker::Offer;
use super::*;

/// A busy machine takes its time, above all to print where something panicked on purpose.
const PATIENCE: Duration = Duration::from_secs(60);

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
}

impl Datapath for TestDatapath {
    fn resolve(&self, sight: &Sight, _: &PathHint) -> Result<Path, Rejection> {
        if let Some(r) = self.refuse.lock().unwrap().clone() {
            return Err(r);
        }
        let egress = self.egress.lock().unwrap().unwrap_or_else(|| ifindex(99));
        Ok(path(&sight.conn, sight.direction, egress))
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
        },
        next_hop: None,
        iif: None,
        oif: None,
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

    fn port(&self, n: u32) -> Generation {
        self.engine.port_add(new_port(n)).unwrap()
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
        let table = self.engine.0.publication.table();
        for _ in 0..3 {
            for port in table.iter().filter(|p| p.binding.is_some()) {
                collect(vec![ask(port, Command::Barrier)], PATIENCE);
            }
        }
    }

    /// The same where operations stay with the provider: the queue is empty.
    fn drained(&self, dummy: &DummyClass, pending: usize) {
        wait_for(|| dummy.pending().len() == pending);
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

// ---- registration ----

#[test]
fn a_second_class_of_a_name_is_refused() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    let again = b.engine.register(Arc::new(DummyClass::new("dummy")));
    assert!(matches!(again, Err(RegistryError::Duplicate("dummy"))));
}

#[test]
fn a_class_whose_init_fails_is_not_registered() {
    let dummy = DummyClass::new("dummy");
    dummy.fail_init(Some(Fault::new("no such hardware")));
    let b = Bench::new(&[]);
    assert!(matches!(
        b.engine.register(Arc::new(dummy.clone())),
        Err(RegistryError::Init { class: "dummy", .. })
    ));
    assert!(b.engine.classes().is_empty());
    dummy.fail_init(None);
    b.engine.register(Arc::new(dummy)).unwrap();
}

#[test]
fn a_class_in_use_is_not_unregistered_and_deinit_comes_at_the_end() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    assert!(matches!(b.engine.unregister("dummy"), Err(RegistryError::InUse { .. })));
    assert!(dummy.is_initialised());
    b.engine.port_del(ifindex(1)).unwrap();
    b.engine.unregister("dummy").unwrap();
    assert!(!dummy.is_initialised());
    assert!(matches!(b.engine.unregister("dummy"), Err(RegistryError::Unknown { .. })));
}

// ---- binding ----

#[test]
fn the_first_class_that_accepts_is_bound_and_refusals_are_kept() {
    let (first, second) = (DummyClass::new("first"), DummyClass::new("second"));
    first.decline(Some(ifindex(1)), "not this netdev");
    let b = Bench::new(&[&first, &second]);
    b.port(1);
    b.port(2);
    let ports = b.engine.ports();
    assert_eq!(ports[0].provider, Some("second"));
    assert_eq!(ports[0].refusals.len(), 1);
    assert_eq!(ports[0].refusals[0].class, "first");
    assert_eq!(ports[0].refusals[0].why, "not this netdev");
    assert_eq!(ports[1].provider, Some("first"));
    assert!(ports[1].refusals.is_empty());
}

#[test]
fn operations_are_timed_from_the_hand_over_to_the_result() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conn = b.conn(1);
    b.install(1, &conn, Original);
    b.engine.conn_del(&conn);
    b.settle();
    let latency = &b.engine.ports()[0].latency;
    let kinds: Vec<_> = latency.iter().map(|l| (l.op, l.count)).collect();
    assert_eq!(kinds, [(latency::OpKind::Add, 1), (latency::OpKind::Delete, 1)]);
    // What lies with the provider is not forgotten: it counts once it has a result.
    dummy.set_latency(Some(Duration::from_millis(1)));
    let second = b.conn(2);
    assert_eq!(b.offer(1, &second, Original), Offer::Queued);
    b.drained(&dummy, 1);
    std::thread::sleep(Duration::from_millis(3));
    dummy.advance(Duration::from_millis(1));
    b.settle();
    let slowest = b.engine.ports()[0].latency.iter().map(|l| l.below_us).max();
    assert!(slowest >= Some(2048), "{slowest:?}");
}

#[test]
fn a_bound_netdev_is_not_bound_again() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    let generation = b.port(1);
    let again = b.engine.port_add(new_port(1));
    assert!(matches!(again, Err(PortAddError::AlreadyBound { .. })));
    assert_eq!(b.engine.ports().len(), 1);
    assert_eq!(b.engine.ports()[0].netdev.generation, generation);
}

#[test]
fn none_attaches_without_a_provider_and_offers_are_no_ops() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    let providers = Some(vec![NO_PROVIDER.to_owned()]);
    b.engine.port_add(NewPort { providers, ..new_port(1) }).unwrap();
    let conn = b.conn(1);
    assert_eq!(b.offer(1, &conn, Original), Offer::Unbound);
    assert_eq!(dummy.requests(), 0);
    b.engine.port_del(ifindex(1)).unwrap();
}

#[test]
fn a_port_may_name_its_classes_and_their_order() {
    let (first, second) = (DummyClass::new("first"), DummyClass::new("second"));
    let b = Bench::new(&[&first, &second]);
    let named = |n, names: &[&str]| NewPort {
        providers: Some(names.iter().map(|n| (*n).to_owned()).collect()),
        ..new_port(n)
    };
    b.engine.port_add(named(1, &["second", "first"])).unwrap();
    second.decline(Some(ifindex(2)), "not this one");
    b.engine.port_add(named(2, &["second"])).unwrap();
    let ports = b.engine.ports();
    assert_eq!((ports[0].provider, ports[1].provider), (Some("second"), None));
    assert_eq!(ports[1].refusals.len(), 1, "the first was not asked for");
    let unknown = b.engine.port_add(named(3, &["first", "third"]));
    assert!(matches!(unknown, Err(PortAddError::Registry(RegistryError::Unknown { .. }))));
    assert_eq!((b.engine.ports().len(), first.ports().len()), (2, 0), "nothing has changed");
}

#[test]
fn a_class_that_fails_is_passed_over_as_one_that_declines() {
    let (first, second) = (DummyClass::new("first"), DummyClass::new("second"));
    first.fail_bind(Some(Fault::new("adding the clsact qdisc")));
    let b = Bench::new(&[&first, &second]);
    b.port(1);
    let port = b.engine.ports().remove(0);
    assert_eq!(port.provider, Some("second"));
    assert_eq!(port.refusals[0].why, "adding the clsact qdisc");
}

// ---- policy ----

#[test]
fn a_policy_check_tells_what_an_offer_would_end_with_and_changes_nothing() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conn = b.conn(1);
    let worker = b.engine.worker();
    let check = |conn: &ConnHandle, egress| {
        let path = path(conn, Original, ifindex(egress));
        let port = worker.port(ifindex(1)).unwrap();
        port.can_offload(conn, Original, &path).map_err(|r| r.reason)
    };
    assert_eq!(check(&conn, 99), Ok(()));
    // By the provider ...
    dummy.refuse_shapes(Some(Reason::MtuMismatch.into()));
    assert_eq!(check(&conn, 99), Err(Reason::MtuMismatch));
    dummy.refuse_shapes(None);
    // ... by what is known of the shape ...
    dummy.fail_next(1, Rejection::with_detail(Reason::Unsupported, "no redirect to p98"));
    *b.datapath.egress.lock().unwrap() = Some(ifindex(98));
    b.offer(1, &b.conn(2), Original);
    b.settle();
    assert_eq!((check(&conn, 98), check(&conn, 99)), (Err(Reason::Unsupported), Ok(())));
    // ... and by the connection.
    b.engine.conn_del(&conn);
    assert_eq!(check(&conn, 99), Err(Reason::ConnState));
    assert!(b.engine.slots(&conn).is_empty());
    let refused: u64 = b.engine.ports()[0].reasons.iter().map(|(_, n)| n).sum();
    assert_eq!((dummy.requests(), refused), (1, 1), "of the one offer");
    // A port whose provider panics, and one without: asked, not offered to.
    dummy.panic_after(Call::CanOffload, 0);
    assert_eq!(check(&b.conn(3), 99), Err(Reason::ProviderFault));
    assert!(b.engine.ports()[0].fault.is_some());
    let providers = Some(vec![NO_PROVIDER.to_owned()]);
    b.engine.port_add(NewPort { providers, ..new_port(2) }).unwrap();
    let (worker, conn) = (b.engine.worker(), b.conn(4));
    let unbound = worker.port(ifindex(2)).unwrap();
    let refusal = unbound.can_offload(&conn, Original, &path(&conn, Original, ifindex(99)));
    assert_eq!(refusal.unwrap_err().reason, Reason::NoProvider);
}

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
    dummy.set_latency(Some(Duration::MAX));
    let conn = b.conn(1);
    b.offer(1, &conn, Original);
    b.drained(&dummy, 1);
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
    let new = b.engine.conn_create(*old.key(), *old.reply(), 4711).unwrap();
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
        present = b.engine.conn_create(*present.key(), *present.reply(), tag).unwrap();
        assert_eq!(b.offer(1, &present, Original), Offer::Queued);
    }
    dummy.let_go();
    b.settle();
    assert_eq!(b.state(1, &present, Original), Some(SlotState::Installed));
    assert_eq!(dummy.rules(ifindex(1)).len(), 2);
    assert!(b.engine.ports()[0].reasons.is_empty(), "{:?}", b.engine.ports()[0].reasons);
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
    dummy.set_latency(Some(Duration::MAX));
    let conn = b.conn(1);
    b.offer(1, &conn, Original);
    b.drained(&dummy, 1);
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
    assert_eq!(b.engine.ports()[0].adds, 1, "the old one is not counted as the new one's");
}

// ---- rejections ----

#[test]
fn a_permanent_rejection_is_kept_with_its_words_and_not_repeated() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    dummy.refuse_shapes(Some(Rejection::with_detail(Reason::Unsupported, "no IPv9 here")));
    let conn = b.conn(1);
    assert_eq!(b.offer(1, &conn, Original), Offer::Queued);
    b.settle();
    let slots = b.engine.slots(&conn);
    assert_eq!(slots[0].state, SlotState::Rejected);
    let rejection = slots[0].rejection.clone().unwrap();
    assert_eq!(
        (rejection.reason, rejection.detail.as_deref()),
        (Reason::Unsupported, Some("no IPv9 here"))
    );
    assert_eq!(b.offer(1, &conn, Original), Offer::Decided);
    b.clock.fetch_add(1_000_000, Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(b.offer(1, &conn, Original), Offer::Decided);
    assert_eq!(b.engine.ports()[0].reasons, [(Reason::Unsupported, 1)]);
    assert_eq!(dummy.requests(), 0);
}

#[test]
fn a_shape_the_backend_does_not_support_is_asked_once_and_again_after_a_flush() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    dummy.fail_next(1, Rejection::with_detail(Reason::Unsupported, "no redirect to p99"));
    for n in 1..4 {
        let conn = b.conn(n);
        b.offer(1, &conn, Original);
        b.settle();
        let rejection = b.engine.slots(&conn)[0].rejection.clone().unwrap();
        assert_eq!(rejection.detail.as_deref(), Some("no redirect to p99"));
    }
    assert_eq!(dummy.requests(), 1);
    *b.datapath.egress.lock().unwrap() = Some(ifindex(98));
    b.install(1, &b.conn(4), Original);
    *b.datapath.egress.lock().unwrap() = None;
    b.engine.flush(&FlushFilter::default()).unwrap();
    b.install(1, &b.conn(1), Original);
}

#[test]
fn what_completes_after_its_slot_has_moved_on_is_uninstalled() {
    let dummy = DummyClass::new("dummy");
    let limits = Limits { complete: Duration::from_millis(50), ..Limits::default() };
    let b = Bench::with_limits(&[&dummy], limits);
    b.port(1);
    dummy.set_latency(Some(Duration::MAX));
    let conn = b.conn(1);
    b.offer(1, &conn, Original);
    b.drained(&dummy, 1);
    // The flush does not wait for ever: the slot is emptied, the port is called faulty.
    b.engine.flush(&FlushFilter::default()).unwrap();
    assert!(b.engine.slots(&conn).is_empty());
    assert!(b.engine.ports()[0].fault.as_deref().unwrap().contains("without a result"));
    dummy.set_latency(None);
    dummy.release_pending();
    wait_for(|| dummy.requests() == 2 && dummy.rules(ifindex(1)).is_empty());
}

#[test]
fn a_transient_rejection_is_rearmed_after_a_pause_that_grows() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    dummy.set_capacity(0);
    let conn = b.conn(1);
    let mut pauses = Vec::new();
    for _ in 0..4 {
        assert_eq!(b.offer(1, &conn, Original), Offer::Queued);
        b.settle();
        let slot = b.engine.slots(&conn)[0].clone();
        assert_eq!(slot.state, SlotState::Rejected);
        assert_eq!(b.offer(1, &conn, Original), Offer::Decided, "not before the pause is over");
        let pause = slot.retry_in_ms.unwrap();
        pauses.push(pause);
        b.clock.fetch_add(pause + 1, Ordering::SeqCst);
        b.settle();
        wait_for(|| b.engine.slots(&conn).is_empty());
        assert_eq!(b.rearmed(), [(ifindex(1), 1, Original)]);
    }
    assert!(pauses.windows(2).all(|w| w[1] > w[0]), "{pauses:?}");
    dummy.set_capacity(1);
    b.install(1, &conn, Original);
}

#[test]
fn what_the_datapath_refuses_is_rejected_and_asked_again_after_a_flush_only() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conn = b.conn(1);
    let refusal = Rejection::with_detail(Reason::NotAdmitted, "rule 7");
    let refused = || PathSpec::Refused(Box::new(refusal.clone()));
    let worker = b.engine.worker();
    let port = worker.port(ifindex(1)).unwrap();
    assert_eq!(port.conn_seen(&conn, Original, refused()), Offer::Queued);
    b.settle();
    let slot = b.engine.slots(&conn)[0].clone();
    assert_eq!((slot.state, slot.rejection), (SlotState::Rejected, Some(refusal.clone())));
    assert_eq!(slot.retry_in_ms, None);
    assert!(port.is_decided(&conn, Original), "no packet asks again");
    assert_eq!(b.engine.ports()[0].reasons, [(Reason::NotAdmitted, 1)]);
    assert_eq!(dummy.requests(), 0, "the provider is not asked");
    b.engine.flush(&FlushFilter::default()).unwrap();
    assert!(b.engine.slots(&conn).is_empty());
    assert_eq!(b.rearmed(), [(ifindex(1), 1, Original)]);
    b.install(1, &conn, Original);
}

#[test]
fn a_full_queue_is_a_refusal_that_leaves_the_slot_open() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::with_limits(&[&dummy], Limits { queue: 0, ..Limits::default() });
    b.port(1);
    let conn = b.conn(1);
    assert_eq!(b.offer(1, &conn, Original), Offer::Refused(Reason::QueueFull));
    assert!(b.engine.slots(&conn).is_empty());
    assert_eq!(b.engine.ports()[0].reasons, [(Reason::QueueFull, 1)]);
}

#[test]
fn a_connection_that_there_is_no_room_for_is_counted_where_it_was_seen() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::with_limits(&[&dummy], Limits { connections: 1, ..Limits::default() });
    b.port(1);
    let first = b.conn(1);
    let original = "tcp 192.0.2.9:9 > 198.51.100.1:80".parse().unwrap();
    let key = ConnKey { zone: Zone(0), original };
    assert!(b.engine.conn_create(key, original.inverted(), 9).is_none());
    b.engine.worker().port(ifindex(1)).unwrap().conn_table_full();
    assert_eq!(b.engine.ports()[0].reasons, [(Reason::ConnTableFull, 1)]);
    // The bound is on those that live.
    b.engine.conn_del(&first);
    assert!(b.engine.conn_create(key, original.inverted(), 9).is_some());
}

#[test]
fn what_the_datapath_cannot_resolve_or_prepare_stays_on_the_slow_path() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    *b.datapath.refuse.lock().unwrap() = Some(Reason::NoRoute.into());
    let unrouted = b.conn(1);
    b.offer(1, &unrouted, Original);
    b.settle();
    *b.datapath.refuse.lock().unwrap() = None;
    *b.datapath.unprepared.lock().unwrap() = Some(Reason::ConnState.into());
    let gone = b.conn(2);
    b.offer(1, &gone, Original);
    b.settle();
    let reason = |c| b.engine.slots(c)[0].rejection.clone().unwrap().reason;
    assert_eq!((reason(&unrouted), reason(&gone)), (Reason::NoRoute, Reason::ConnState));
    assert_eq!(dummy.requests(), 0);
}

#[test]
fn one_ports_failure_changes_no_other_slot() {
    let (good, bad) = (DummyClass::new("good"), DummyClass::new("bad"));
    good.decline(Some(ifindex(2)), "only port 1");
    bad.fail_next(1, Reason::Refused);
    let b = Bench::new(&[&good, &bad]);
    b.port(1);
    b.port(2);
    let conn = b.conn(1);
    b.install(1, &conn, Original);
    b.offer(2, &conn, Reply);
    b.settle();
    assert_eq!(b.state(2, &conn, Reply), Some(SlotState::Rejected));
    assert_eq!(b.state(1, &conn, Original), Some(SlotState::Installed));
}

#[test]
fn a_provider_that_panics_makes_its_port_faulty_and_no_other() {
    let (good, bad) = (DummyClass::new("good"), DummyClass::new("bad"));
    good.decline(Some(ifindex(2)), "only port 1");
    let b = Bench::new(&[&good, &bad]);
    b.port(1);
    b.port(2);
    bad.panic_after(Call::Submit, 0);
    let conn = b.conn(1);
    b.offer(2, &conn, Original);
    b.settle();
    let ports = b.engine.ports();
    assert!(ports[1].fault.as_deref().unwrap().contains("panicked"), "{:?}", ports[1].fault);
    assert_eq!(ports[0].fault, None);
    let slot = b.engine.slots(&conn).remove(0);
    assert_eq!(slot.rejection.unwrap().reason, Reason::ProviderFault);
    b.install(1, &b.conn(2), Original);
    b.engine.port_del(ifindex(2)).unwrap();
}

// ---- delete, flush ----

#[test]
fn delete_goes_only_to_slots_that_hold_something() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    b.port(2);
    let conn = b.conn(1);
    b.install(1, &conn, Original);
    dummy.set_capacity(0);
    b.offer(2, &conn, Reply);
    b.settle();
    let before = dummy.requests();
    assert_eq!(b.engine.conn_del(&conn), 1);
    b.settle();
    assert_eq!(dummy.requests(), before + 1);
    assert!(b.engine.slots(&conn).is_empty());
    assert_eq!(b.engine.conn_del(&conn), 0, "idempotent");
    assert_eq!(b.offer(1, &conn, Original), Offer::Refused(Reason::ConnState));
    assert!(b.rearmed().is_empty(), "an ended connection is not sighted again");
}

#[test]
fn a_port_delete_flushes_that_port_and_retracts_what_forwards_into_it() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    b.port(2);
    b.port(3);
    let (to_2, to_3) = (b.conn(1), b.conn(2));
    *b.datapath.egress.lock().unwrap() = Some(ifindex(2));
    b.install(1, &to_2, Original);
    *b.datapath.egress.lock().unwrap() = Some(ifindex(3));
    b.install(1, &to_3, Original);
    *b.datapath.egress.lock().unwrap() = Some(ifindex(1));
    b.install(2, &to_2, Reply);
    b.rearmed();
    let deleted = b.engine.port_del(ifindex(2)).unwrap();
    assert_eq!((deleted.flushed, deleted.retracted), (1, 1));
    assert!(deleted.faults.is_empty());
    b.settle();
    assert_eq!(dummy.rules(ifindex(1)).len(), 1, "what goes elsewhere stays");
    assert_eq!(b.state(1, &to_3, Original), Some(SlotState::Installed));
    assert_eq!(b.state(1, &to_2, Original), None, "and can come back by another way");
    assert!(!to_2.is_dead(), "the connection lives on in software");
    assert!(b.rearmed().contains(&(ifindex(1), 1, Original)));
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn a_port_delete_is_bounded_even_if_a_worker_never_passes_a_quiescent_state() {
    let dummy = DummyClass::new("dummy");
    let limits = Limits { port_del: Duration::from_millis(50), ..Limits::default() };
    let b = Bench::with_limits(&[&dummy], limits);
    b.port(1);
    let mut stuck = b.engine.worker();
    let mut gone = b.engine.worker();
    gone.offline();
    let conn = b.conn(1);
    let started = Instant::now();
    b.engine.port_del(ifindex(1)).unwrap();
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(50), "it waits for the online worker: {took:?}");
    // The stuck worker still holds its view: what it offers now ends nowhere, and harms nobody.
    let offer = stuck.port(ifindex(1)).unwrap().conn_seen(
        &conn,
        Original,
        PathSpec::Resolve(PathHint::default()),
    );
    assert_eq!(offer, Offer::Queued);
    assert_eq!(b.engine.conn_update(&conn), Usage::NotOffloaded, "nothing keeps it alive");
    stuck.quiescent();
    assert!(stuck.port(ifindex(1)).is_none());
    b.port(1);
    b.engine.port_del(ifindex(1)).unwrap();
    assert_eq!(dummy.requests(), 0);
}

#[test]
fn a_port_delete_does_not_wait_for_a_worker_that_is_offline() {
    let dummy = DummyClass::new("dummy");
    let limits = Limits { port_del: Duration::from_secs(60), ..Limits::default() };
    let b = Bench::with_limits(&[&dummy], limits);
    b.port(1);
    let mut worker = b.engine.worker();
    worker.offline();
    assert!(worker.port(ifindex(1)).is_none(), "it has nothing to offer on");
    let started = Instant::now();
    b.engine.port_del(ifindex(1)).unwrap();
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    b.port(1);
    worker.online();
    assert!(worker.port(ifindex(1)).is_some());
    drop(worker);
    b.engine.port_del(ifindex(1)).unwrap();
    assert!(started.elapsed() < Duration::from_secs(30), "nor for one that is gone");
}

/// Offers towards the port go on until the workers have seen that it goes: behind the first look for
/// rules that forward into it.
#[test]
fn no_rule_into_a_port_outlives_it_however_late_it_was_offered() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    b.port(2);
    *b.datapath.egress.lock().unwrap() = Some(ifindex(2));
    let mut worker = b.engine.worker();
    let deleting = std::thread::spawn({
        let engine = b.engine.clone();
        move || engine.port_del(ifindex(2)).unwrap()
    });
    // It is unpublished, and the first retraction has been carried out: it found nothing.
    wait_for(|| b.engine.port(ifindex(2)).is_none());
    let table = b.engine.0.publication.table();
    let port = table.get(ifindex(1)).unwrap();
    collect(vec![ask(port, Command::Barrier)], PATIENCE);
    let conn = b.conn(1);
    let offer = worker.port(ifindex(1)).unwrap().conn_seen(
        &conn,
        Original,
        PathSpec::Resolve(PathHint::default()),
    );
    assert_eq!(offer, Offer::Queued);
    wait_for(|| dummy.rules(ifindex(1)).len() == 1);
    worker.quiescent();
    assert_eq!(deleting.join().unwrap().retracted, 1);
    assert!(dummy.rules(ifindex(1)).is_empty());
}

#[test]
fn flush_removes_all_or_one_port_or_what_matches_and_says_how_many() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    b.port(2);
    let conns: Vec<_> = (0..5).map(|n| b.conn(n)).collect();
    let install_all = || {
        for c in &conns {
            b.install(1, c, Original);
            b.install(2, c, Reply);
        }
    };
    let count = |f: FlushFilter| {
        b.engine.flush(&f).unwrap().iter().map(|(n, c)| (n.ifindex.get(), *c)).collect::<Vec<_>>()
    };
    install_all();
    assert_eq!(count(FlushFilter::default()), [(1, 5), (2, 5)]);
    assert!(dummy.rules(ifindex(1)).is_empty());
    assert_eq!(b.rearmed().len(), 10);
    install_all();
    assert_eq!(count(FlushFilter { port: Some(ifindex(2)), ..Default::default() }), [(2, 5)]);
    assert_eq!(dummy.rules(ifindex(1)).len(), 5);
    let tuple = Some(conns[3].key().original);
    assert_eq!(count(FlushFilter { tuple, ..Default::default() }), [(1, 1)]);
    assert_eq!(dummy.rules(ifindex(1)).len(), 4);
    assert!(count(FlushFilter { zone: Some(Zone(9)), ..Default::default() }).is_empty());
    let key = ConnKey { zone: Zone(9), original: conns[3].key().original };
    let elsewhere = b.engine.conn_create(key, key.original.inverted(), 9).unwrap();
    b.engine.flush(&FlushFilter::default()).unwrap();
    b.install(1, &elsewhere, Original);
    b.install(1, &conns[2], Original);
    let zone_9 = FlushFilter { zone: Some(Zone(9)), ..Default::default() };
    assert_eq!(count(zone_9), [(1, 1)]);
    assert_eq!(b.state(1, &conns[2], Original), Some(SlotState::Installed));
    let both = FlushFilter { zone: Some(Zone(0)), tuple, port: Some(ifindex(1)) };
    assert!(count(both).is_empty(), "all of the filter has to match");
    let unknown = FlushFilter { port: Some(ifindex(77)), ..Default::default() };
    assert_eq!(b.engine.flush(&unknown).unwrap_err(), NoSuchPort(ifindex(77)));
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn a_flush_right_behind_an_offer_finds_it() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    // An empty port is answered for without its thread: only when it is empty.
    for n in 1..=300 {
        let conn = b.conn(n);
        assert_eq!(b.offer(1, &conn, Direction::Original), Offer::Queued);
        b.engine.flush(&FlushFilter::default()).unwrap();
        assert!(b.engine.slots(&conn).is_empty());
        assert!(b.engine.flush(&FlushFilter::default()).unwrap().is_empty());
    }
    assert!(dummy.rules(ifindex(1)).is_empty());
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn a_backend_that_cannot_flush_is_emptied_rule_by_rule() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    for n in 0..5 {
        b.install(1, &b.conn(n), Original);
    }
    dummy.fail_flush(Some(Fault::new("the device is busy")));
    assert_eq!(b.engine.flush(&FlushFilter::default()).unwrap()[0].1, 5);
    assert!(dummy.rules(ifindex(1)).is_empty());
}

#[test]
fn what_a_backend_rejected_is_rearmed_also_where_it_cannot_flush() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    b.install(1, &b.conn(1), Original);
    dummy.refuse_shapes(Some(Reason::Unsupported.into()));
    b.offer(1, &b.conn(2), Original);
    b.settle();
    dummy.fail_flush(Some(Fault::new("the device is busy")));
    b.rearmed();
    assert_eq!(b.engine.flush(&FlushFilter::default()).unwrap()[0].1, 1);
    b.settle();
    let mut rearmed = b.rearmed();
    rearmed.sort_unstable_by_key(|r| r.1);
    assert_eq!(rearmed, [(ifindex(1), 1, Original), (ifindex(1), 2, Original)]);
    assert!(b.engine.slots(&b.conn(2)).is_empty());
}

#[test]
fn a_flush_by_filter_returns_when_what_was_in_flight_is_gone_too() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    dummy.set_latency(Some(Duration::MAX));
    let conn = b.conn(1);
    b.offer(1, &conn, Original);
    b.drained(&dummy, 1);
    let tuple = Some(conn.key().original);
    let flush = std::thread::spawn({
        let engine = b.engine.clone();
        move || engine.flush(&FlushFilter { tuple, ..Default::default() }).unwrap()
    });
    // Time enough for it to find the add in flight.
    std::thread::sleep(Duration::from_millis(50));
    assert!(!flush.is_finished());
    assert!(dummy.release_nth(0));
    wait_for(
        || matches!(dummy.pending().first(), Some(p) if matches!(p.request, Request::Delete { .. })),
    );
    std::thread::sleep(Duration::from_millis(50));
    assert!(!flush.is_finished(), "the delete that follows the add is still to come");
    dummy.set_latency(None);
    dummy.release_pending();
    assert_eq!(flush.join().unwrap()[0].1, 1);
    assert!(dummy.rules(ifindex(1)).is_empty());
    assert!(b.engine.slots(&conn).is_empty());
}

#[test]
fn closing_flushes_every_port() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    b.port(2);
    b.install(1, &b.conn(1), Original);
    b.install(2, &b.conn(1), Reply);
    assert_eq!(b.engine.close().iter().map(|d| d.flushed).sum::<u64>(), 2);
    assert!(b.engine.ports().is_empty());
    assert_eq!(b.engine.conn_count(), 0);
    assert!(dummy.ports().is_empty());
}

// ---- usage ----

#[test]
fn the_last_use_is_the_latest_over_all_slots_and_counts_from_install() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    b.port(2);
    let conn = b.conn(1);
    assert_eq!(b.engine.conn_update(&conn), Usage::NotOffloaded);
    b.install(1, &conn, Original);
    b.install(2, &conn, Reply);
    let last = |b: &Bench| match b.engine.conn_update(&conn) {
        Usage::LastUsed { at_ms, packets, .. } => (at_ms, packets),
        other => panic!("{other:?}"),
    };
    assert_eq!(last(&b), (1000, 0), "never used: counts from install");
    let mut strays = Strays::default();
    b.clock.store(5000, Ordering::SeqCst);
    assert!(b.engine.sweep(&mut strays).used.is_empty());
    let cookie = dummy.rules(ifindex(2))[0].cookie;
    assert!(dummy.carry(ifindex(2), cookie, 3, 300));
    b.clock.store(9000, Ordering::SeqCst);
    let sweep = b.engine.sweep(&mut strays);
    assert_eq!(sweep.used.len(), 1);
    assert_eq!(last(&b), (9000, 3));
    b.clock.store(20_000, Ordering::SeqCst);
    assert!(b.engine.sweep(&mut strays).used.is_empty(), "nothing moved");
    assert_eq!(last(&b), (9000, 3));
    b.clock.store(7000, Ordering::SeqCst);
    assert_eq!(last(&b), (7000, 3), "never in the future, whatever the clock does");
}

#[test]
fn a_pending_connection_is_unknown_so_that_it_does_not_expire() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    dummy.set_latency(Some(Duration::MAX));
    let conn = b.conn(1);
    b.offer(1, &conn, Original);
    b.drained(&dummy, 1);
    assert_eq!(b.engine.conn_update(&conn), Usage::Unknown);
    dummy.release_pending();
    b.settle();
    // Nor while its rule is on the way out: it may have carried something since the last sweep.
    b.engine.conn_retract(&conn);
    b.drained(&dummy, 1);
    assert_eq!(b.engine.conn_update(&conn), Usage::Unknown);
    dummy.release_pending();
    b.settle();
    assert_eq!(b.engine.conn_update(&conn), Usage::NotOffloaded);
}

#[test]
fn a_rule_that_somebody_removed_is_noticed_and_its_sight_rearmed() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conn = b.conn(1);
    b.install(1, &conn, Original);
    b.rearmed();
    assert!(dummy.steal(ifindex(1), dummy.rules(ifindex(1))[0].cookie));
    b.clock.fetch_add(5000, Ordering::SeqCst);
    assert_eq!(b.engine.sweep(&mut Strays::default()).lost, 1);
    b.settle();
    assert_eq!(b.rearmed(), [(ifindex(1), 1, Original)]);
    b.install(1, &conn, Original);
}

/// A port with a rule that the NIC says it has, its first sweep done; then software sees packets.
fn seen_in_software(dummy: &DummyClass) -> (Bench, ConnHandle, Strays) {
    let b = Bench::new(&[dummy]);
    b.port(1);
    let conn = b.conn(1);
    b.install(1, &conn, Original);
    b.rearmed();
    b.datapath.forwarded.store(1000, Ordering::SeqCst);
    let mut strays = Strays::default();
    assert_eq!(b.engine.sweep(&mut strays).without_effect, 0, "what was seen before says nothing");
    b.datapath.forwarded.store(1010, Ordering::SeqCst);
    (b, conn, strays)
}

#[test]
fn a_rule_in_hardware_that_does_nothing_is_deleted_and_comes_back_after_a_pause() {
    let dummy = DummyClass::new("dummy");
    let (b, conn, mut strays) = seen_in_software(&dummy);
    assert_eq!(b.engine.sweep(&mut strays).without_effect, 1);
    b.settle();
    assert!(dummy.rules(ifindex(1)).is_empty());
    assert_eq!(b.state(1, &conn, Original), Some(SlotState::Rejected));
    let slot = b.engine.slots(&conn).remove(0);
    let why = slot.rejection.expect("a rejection");
    assert_eq!(why.reason, Reason::NoEffect);
    assert!(why.to_string().contains("10 packets"), "{why}");
    assert_eq!(slot.retry_in_ms, Some(100));
    assert_eq!(b.engine.ports()[0].reasons, [(Reason::NoEffect, 1)]);
    assert_eq!(b.rearmed(), []);
    b.clock.fetch_add(100, Ordering::SeqCst);
    wait_for(|| b.rearmed() == [(ifindex(1), 1, Original)]);
    b.install(1, &conn, Original);
    // It does not help: the pause is longer.
    b.engine.sweep(&mut strays);
    b.datapath.forwarded.store(1020, Ordering::SeqCst);
    assert_eq!(b.engine.sweep(&mut strays).without_effect, 1);
    b.settle();
    assert_eq!(b.engine.slots(&conn)[0].retry_in_ms, Some(3000));
    // A connection that ends leaves nothing behind.
    b.engine.conn_del(&conn);
    b.settle();
    assert_eq!(b.state(1, &conn, Original), None);
}

#[test]
fn a_rule_that_carries_packets_or_is_software_is_not_doubted() {
    let dummy = DummyClass::new("dummy");
    let (b, conn, mut strays) = seen_in_software(&dummy);
    assert!(dummy.carry(ifindex(1), dummy.rules(ifindex(1))[0].cookie, 1, 100));
    assert_eq!(b.engine.sweep(&mut strays).without_effect, 0);
    assert_eq!(b.state(1, &conn, Original), Some(SlotState::Installed));
    let software = DummyClass::new("dummy");
    software.set_in_hw(Some(false));
    let (b, conn, mut strays) = seen_in_software(&software);
    assert_eq!(b.engine.sweep(&mut strays).without_effect, 0);
    assert_eq!(b.state(1, &conn, Original), Some(SlotState::Installed));
}

#[test]
fn what_the_nic_said_is_told_as_long_as_it_does_not_have_the_rule() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conn = b.conn(1);
    dummy.set_in_hw(None);
    dummy.set_nic_said(Some("no room"));
    b.install(1, &conn, Original);
    let told = || b.engine.slots(&conn)[0].nic_said.clone();
    assert_eq!(told().as_deref(), Some("no room"));
    // The sweep reads back that it has it after all.
    dummy.set_in_hw(Some(true));
    b.engine.sweep(&mut Strays::default());
    assert_eq!(told(), None);
    // It is no reason for anything: the slot is empty after a delete, and may be offered again.
    b.engine.flush(&FlushFilter { zone: Some(Zone(0)), ..Default::default() }).unwrap();
    assert_eq!(b.state(1, &conn, Original), None);
    assert_eq!(b.rearmed(), [(ifindex(1), 1, Original)]);
    assert_eq!(b.engine.ports()[0].reasons, []);
}

#[test]
fn a_connection_that_ends_while_its_rule_is_taken_back_leaves_no_slot() {
    let dummy = DummyClass::new("dummy");
    let (b, conn, mut strays) = seen_in_software(&dummy);
    dummy.set_latency(Some(Duration::MAX));
    assert_eq!(b.engine.sweep(&mut strays).without_effect, 1);
    b.drained(&dummy, 1);
    b.engine.conn_del(&conn);
    dummy.release_pending();
    wait_for(|| b.state(1, &conn, Original).is_none());
    assert_eq!(b.engine.ports()[0].reasons, []);
}

#[test]
fn a_rule_whose_delete_is_under_way_is_no_stray() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conn = b.conn(1);
    b.install(1, &conn, Original);
    dummy.set_latency(Some(Duration::MAX));
    b.engine.conn_del(&conn);
    b.drained(&dummy, 1);
    let mut strays = Strays::default();
    for _ in 0..3 {
        assert_eq!(b.engine.sweep(&mut strays).strays, 0);
    }
    assert_eq!(dummy.requests(), 2, "the add and its delete");
    dummy.release_pending();
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
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
    dummy.set_latency(Some(Duration::MAX));
    let conn = b.conn(1);
    b.offer(1, &conn, Original);
    b.drained(&dummy, 1);
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
