//! What goes, when a connection, a port, the datapath or somebody who flushes says so; and nothing else.

use super::*;
use crate::engine::view::{Past, PortView};

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
fn connections_that_end_together_each_lose_what_they_have_once() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    b.port(2);
    let [both, one, none] = [1, 2, 3].map(|n| b.conn(n));
    b.install(1, &both, Original);
    b.install(2, &both, Reply);
    b.install(2, &one, Reply);
    let lives = b.conn(4);
    b.install(1, &lives, Original);
    assert_eq!(b.engine.conns_del([&both, &one, &none, &both]), 3);
    b.settle();
    assert_eq!([1, 2].map(|n| dummy.rules(ifindex(n)).len()), [1, 0]);
    assert_eq!(b.engine.conn_count(), 1);
    assert_eq!(b.engine.conns_del([&both, &one]), 0, "idempotent");
    assert_eq!(b.engine.conns_del([]), 0);
    assert!(b.rearmed().is_empty(), "an ended connection is not sighted again");
}

#[test]
fn one_slot_is_retracted_and_no_other_of_its_connection() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    let [first, second] = [1, 2].map(|n| b.port(n));
    let conn = b.conn(1);
    b.install(1, &conn, Original);
    b.install(1, &conn, Reply);
    b.install(2, &conn, Reply);
    b.rearmed();
    assert!(b.engine.slot_retract(&conn, Reply, first, TakenBack::Asked));
    b.settle();
    assert_eq!([1, 2].map(|n| dummy.rules(ifindex(n)).len()), [1, 1]);
    assert_eq!(b.state(1, &conn, Original), Some(SlotState::Installed));
    assert_eq!(b.rearmed().len(), 1, "its next packet offers it again");
    // There is nothing of it any more; there never was; there is no such port.
    assert!(!b.engine.slot_retract(&conn, Reply, first, TakenBack::Asked));
    assert!(!b.engine.slot_retract(&conn, Original, second, TakenBack::Asked));
    b.engine.port_del(ifindex(2)).unwrap();
    assert!(!b.engine.slot_retract(&conn, Reply, second, TakenBack::Asked));
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

/// A rule into a netdev that is gone drops packets.
#[test]
fn what_leads_into_a_port_that_goes_is_deleted_though_the_backend_refuses_at_first() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    b.port(2);
    *b.datapath.egress.lock().unwrap() = Some(ifindex(2));
    let conns = [1, 2, 3].map(|n| b.conn(n));
    conns.iter().for_each(|c| b.install(1, c, Original));
    dummy.fail_next(5, Reason::Busy);
    let deleted = b.engine.port_del(ifindex(2)).unwrap();
    assert_eq!((deleted.retracted, deleted.faults.len()), (3, 0), "{:?}", deleted.faults);
    assert!(dummy.rules(ifindex(1)).is_empty());
    b.settle();
    assert!(conns.iter().all(|c| b.engine.slots(c).is_empty()));
    // One that goes on to refuse keeps nobody; that is said, and it is tried until it is done.
    b.port(2);
    b.install(1, &conns[0], Original);
    dummy.fail_next(20, Reason::Busy);
    let deleted = b.engine.port_del(ifindex(2)).unwrap();
    assert_eq!((deleted.retracted, deleted.faults.len()), (1, 1), "{:?}", deleted.faults);
    let words = deleted.faults[0].to_string();
    assert!(words.contains("p1") && words.contains("1 rules that forward into it"), "{words}");
    assert_eq!(dummy.rules(ifindex(1)).len(), 1);
    wait_for(|| {
        b.clock.fetch_add(60_000, Ordering::SeqCst);
        b.settle();
        dummy.rules(ifindex(1)).is_empty()
    });
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
    Asked::of(port, Command::Barrier).wait(PATIENCE).unwrap();
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
    let port = Some(ifindex(1));
    let both = FlushFilter { zone: Some(Zone(0)), tuple, port, ..FlushFilter::default() };
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
    let conn = b.in_flight(&dummy);
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

#[test]
fn why_a_slot_is_empty_is_told_until_it_has_a_rule() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    let generation = b.port(1);
    let conn = b.conn(1);
    let told = |b: &Bench| -> Vec<_> {
        b.engine.past(&conn).into_iter().map(|p| (p.direction, p.why, p.ago_ms)).collect()
    };
    assert_eq!(told(&b), []);
    b.install(1, &conn, Original);
    assert_eq!(told(&b), [], "it stands");
    assert!(b.engine.slot_retract(&conn, Original, generation, TakenBack::Route));
    b.settle();
    b.clock.fetch_add(3000, Ordering::SeqCst);
    assert_eq!(told(&b), [(Original, Past::TakenBack(TakenBack::Route), 3000)]);
    // A refusal is a reason of its own.
    dummy.set_capacity(0);
    b.offer(1, &conn, Original);
    b.settle();
    assert_eq!(told(&b), []);
    dummy.set_capacity(10);
    b.clock.fetch_add(60_000, Ordering::SeqCst);
    b.settle();
    assert_eq!(told(&b), [(Original, Past::Refused(Reason::TableFull), 0)], "its pause is over");
    b.install(1, &conn, Original);
    assert_eq!(told(&b), []);
    // By a flush of all, which asks nobody for the slots one by one.
    let why = TakenBack::Firewall;
    b.engine.flush(&FlushFilter { why, ..FlushFilter::default() }).unwrap();
    assert_eq!(told(&b), [(Original, Past::TakenBack(why), 0)]);
    // An add that has not come back when it is taken back.
    dummy.set_latency(Some(Duration::from_secs(3600)));
    b.offer(1, &conn, Original);
    wait_for(|| !dummy.pending().is_empty());
    assert!(b.engine.slot_retract(&conn, Original, generation, TakenBack::Mark));
    dummy.set_latency(None);
    dummy.release_pending();
    b.settle();
    assert_eq!(told(&b), [(Original, Past::TakenBack(TakenBack::Mark), 0)]);
    // Somebody else removes it.
    b.install(1, &conn, Original);
    dummy.steal_all(ifindex(1));
    b.clock.fetch_add(10, Ordering::SeqCst);
    b.engine.sweep(&mut Strays::default());
    b.settle();
    assert_eq!(told(&b).first().map(|t| t.1), Some(Past::TakenBack(TakenBack::Lost)));
}

#[test]
fn what_became_of_rules_adds_up_and_never_becomes_less_also_when_ports_go() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    let mut before = b.engine.totals();
    let mut check = |b: &Bench, what: &str| {
        b.settle();
        let now = b.engine.totals();
        // Also those that are to go, and are still there.
        let there = |p: &PortView| p.slots.installed + p.slots.deleting;
        let there: u64 = b.engine.ports().iter().map(there).sum();
        assert_eq!(now.adds, now.deletes + now.flushed + there, "{what}: {now:?}, {there} there");
        let rises = now.adds >= before.adds
            && now.deletes >= before.deletes
            && now.flushed >= before.flushed;
        assert!(rises, "{what}: {before:?}, {now:?}");
        before = now;
    };
    let conns: Vec<_> = (1..=6).map(|n| b.conn(n)).collect();
    for round in 0..3 {
        b.port(1);
        b.port(2);
        for conn in &conns {
            b.install(1, conn, Original);
            b.install(2, conn, Reply);
        }
        check(&b, "installed");
        b.engine.conn_retract(&conns[0], TakenBack::Asked);
        check(&b, "one retracted");
        dummy.fail_next(1, Reason::Busy);
        b.engine.conn_retract(&conns[1], TakenBack::Asked);
        b.clock.fetch_add(60_000, Ordering::SeqCst);
        check(&b, "one deleted at the second try");
        dummy.steal_all(ifindex(2));
        b.clock.fetch_add(10, Ordering::SeqCst);
        b.engine.sweep(&mut Strays::default());
        check(&b, "somebody else has removed some");
        b.engine.flush(&FlushFilter { port: Some(ifindex(1)), ..FlushFilter::default() }).unwrap();
        check(&b, "a port flushed");
        b.install(1, &conns[2], Original);
        b.engine.port_del(ifindex(1)).unwrap();
        check(&b, "a port gone");
        b.engine.port_del(ifindex(2)).unwrap();
        check(&b, "all gone");
        assert_eq!(b.engine.totals().adds, 13 * (round + 1));
    }
}
