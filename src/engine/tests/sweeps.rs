//! Sweeps once more: what they find lost, what counts twice, and what is told meanwhile.

use super::*;
use crate::engine::conn::Conn;
use crate::engine::reconcile::as_adopted;

fn carry(b: &Bench, dummy: &DummyClass, conn: &ConnHandle, packets: u64, bytes: u64) {
    assert!(dummy.carry(ifindex(1), b.engine.0.cookie(conn, Original), packets, bytes));
}

fn sweep(b: &Bench) -> crate::engine::usage::Sweep {
    b.clock.fetch_add(1000, Ordering::SeqCst);
    b.engine.sweep(&mut Strays::default())
}

fn traffic(conn: &Conn) -> (u64, u64) {
    (conn.traffic().packets, conn.traffic().bytes)
}

#[test]
fn a_rule_that_stood_still_is_counted_once_however_often_it_is_swept() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let (one, two) = (b.conn(1), b.conn(2));
    b.install(1, &one, Original);
    b.install(1, &two, Original);
    carry(&b, &dummy, &one, 10, 1000);
    carry(&b, &dummy, &two, 1, 60);
    assert_eq!(sweep(&b).used.len(), 2);
    for _ in 0..3 {
        let sweep = sweep(&b);
        assert_eq!((sweep.used.len(), sweep.still.len(), sweep.rules), (0, 2, 2));
        assert_eq!((traffic(&one), traffic(&two)), ((10, 1000), (1, 60)));
        let port = &b.engine.ports()[0];
        assert_eq!((port.packets, port.bytes, port.in_hw), (11, 1060, 2));
        let usage = b.engine.conn_update(&one);
        assert!(matches!(usage, Usage::LastUsed { packets: 10, bytes: 1000, .. }), "{usage:?}");
    }
}

/// Counters that began anew are found by packets or by bytes, whichever fell.
#[test]
fn counters_that_began_anew_take_nothing_away() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conn = b.conn(1);
    b.install(1, &conn, Original);
    carry(&b, &dummy, &conn, 2, 3000);
    sweep(&b);
    dummy.reset_counters(ifindex(1));
    carry(&b, &dummy, &conn, 3, 200);
    sweep(&b);
    assert_eq!(traffic(&conn), (5, 3200), "more packets, and fewer bytes");
    dummy.reset_counters(ifindex(1));
    carry(&b, &dummy, &conn, 1, 5000);
    sweep(&b);
    assert_eq!(traffic(&conn), (6, 8200), "fewer packets, and more bytes");
    let port = &b.engine.ports()[0];
    assert_eq!((port.packets, port.bytes), (6, 8200));
}

#[test]
fn only_a_rule_that_stood_before_the_sweep_began_can_be_lost() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let (stolen, stays) = (b.conn(1), b.conn(2));
    b.install(1, &stolen, Original);
    b.install(1, &stays, Original);
    assert!(dummy.steal(ifindex(1), b.engine.0.cookie(&stolen, Original)));
    // It was installed in the millisecond in which the sweep began, or the one before.
    for at in [1000, 1001] {
        b.clock.store(at, Ordering::SeqCst);
        assert_eq!(b.engine.sweep(&mut Strays::default()).lost, 0, "at {at}");
    }
    b.clock.store(1002, Ordering::SeqCst);
    assert_eq!(b.engine.sweep(&mut Strays::default()).lost, 1);
    b.settle();
    assert!(b.engine.slots(&stolen).is_empty());
    assert_eq!(b.state(1, &stays, Original), Some(SlotState::Installed));
    assert_eq!(b.engine.sweep(&mut Strays::default()).lost, 0, "once");
}

#[test]
fn a_rule_that_nobody_holds_is_deleted_when_two_sweeps_have_seen_it() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let (conn, other) = (b.conn(1), b.conn(2));
    b.install(1, &other, Original);
    b.install(1, &conn, Original);
    // The slot forgets, the backend does not.
    let generation = b.engine.ports()[0].netdev.generation;
    let slot = conn.slot(generation, Original).unwrap();
    slot.word.reset(generation);
    slot.detail().set_rule(None);
    let mut strays = Strays::default();
    let found = |strays: &mut Strays| {
        b.clock.fetch_add(1000, Ordering::SeqCst);
        let sweep = b.engine.sweep(strays);
        b.settle();
        (sweep.strays, sweep.rules, dummy.rules(ifindex(1)).len())
    };
    assert_eq!(found(&mut strays), (1, 2, 2), "it may be on its way");
    assert_eq!(found(&mut Strays::default()), (1, 2, 2), "to another sweeper it is new");
    assert_eq!(found(&mut strays), (1, 2, 1));
    assert_eq!(found(&mut strays), (0, 1, 1));
    assert_eq!(b.state(1, &other, Original), Some(SlotState::Installed));
}

/// Of what was not reported nothing is known.
#[test]
fn a_sweep_that_fails_half_way_takes_nothing_for_lost() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conns = [1, 2].map(|n| b.conn(n));
    conns.iter().for_each(|c| b.install(1, c, Original));
    conns.iter().for_each(|c| carry(&b, &dummy, c, 1, 60));
    dummy.fail_usage(Some(Fault::new("interrupted")));
    let failed = sweep(&b);
    assert_eq!((failed.rules, failed.used.len(), failed.lost), (1, 1, 0));
    let faults: Vec<_> = failed.faults.iter().map(|(port, why)| (&**port, &*why.what)).collect();
    assert_eq!(faults, [("p1", "interrupted")]);
    dummy.fail_usage(None);
    let swept = sweep(&b);
    assert_eq!((swept.rules, swept.used.len(), swept.lost), (2, 1, 0), "{:?}", swept.faults);
}

/// What one sweep found strange is still strange when the next one learns nothing.
#[test]
fn a_sweep_that_has_no_answer_forgets_no_stray() {
    let dummy = DummyClass::new("dummy");
    let soon = Duration::from_millis(300);
    let b = Bench::with_limits(&[&dummy], Limits { complete: soon, ..Limits::default() });
    let generation = b.port(1);
    let conn = b.conn(1);
    b.install(1, &conn, Original);
    let slot = conn.slot(generation, Original).unwrap();
    slot.word.reset(generation);
    slot.detail().set_rule(None);
    let mut strays = Strays::default();
    assert_eq!(b.engine.sweep(&mut strays).strays, 1);
    dummy.hang(Call::Usage);
    assert_eq!(b.engine.sweep(&mut strays).faults.len(), 1);
    dummy.let_go();
    let table = b.engine.0.publication.table();
    wait_for(|| !table.get(ifindex(1)).unwrap().swept.load(Ordering::SeqCst));
    assert_eq!(b.engine.sweep(&mut strays).strays, 1);
    b.settle();
    assert!(dummy.rules(ifindex(1)).is_empty());
}

#[test]
fn what_is_installed_tells_more_than_what_is_on_its_way() {
    for first in Direction::BOTH {
        let dummy = DummyClass::new("dummy");
        let b = Bench::new(&[&dummy]);
        b.port(1);
        let conn = b.conn(1);
        b.install(1, &conn, first);
        dummy.set_latency(Some(Duration::MAX));
        assert_eq!(b.offer(1, &conn, first.opposite()), Offer::Queued);
        b.drained(&dummy, 1);
        let usage = b.engine.conn_update(&conn);
        assert!(matches!(usage, Usage::LastUsed { at_ms: 1000, .. }), "{first}: {usage:?}");
        dummy.set_latency(None);
        dummy.release_pending();
        b.settle();
    }
}

#[test]
fn why_a_rule_is_not_there_is_told_when_it_is_not_there() {
    let dummy = DummyClass::new("dummy");
    dummy.set_in_hw(Some(false));
    dummy.set_nic_said(Some("no room"));
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conn = b.conn(1);
    b.install(1, &conn, Original);
    let said = |b: &Bench| {
        let slot = b.engine.slots(&conn).remove(0);
        (slot.state, slot.nic_said.as_deref().map(str::to_owned), slot.rejection.map(|r| r.reason))
    };
    assert_eq!(said(&b), (SlotState::Installed, Some("no room".to_owned()), None));
    assert_eq!(b.engine.ports()[0].in_hw, 0);
    dummy.set_latency(Some(Duration::MAX));
    b.engine.conn_retract(&conn, TakenBack::Asked);
    b.drained(&dummy, 1);
    assert_eq!(said(&b), (SlotState::Deleting, None, None), "nothing of a rule that goes");
    dummy.set_latency(None);
    dummy.release_pending();
    b.settle();
    // One that is taken back because it does nothing is rejected when it is gone.
    dummy.set_in_hw(Some(true));
    dummy.set_nic_said(None);
    b.install(1, &conn, Original);
    let mut strays = Strays::default();
    b.engine.sweep(&mut strays);
    b.datapath.forwarded.store(3, Ordering::SeqCst);
    dummy.set_latency(Some(Duration::MAX));
    assert_eq!(b.engine.sweep(&mut strays).without_effect, 1);
    b.drained(&dummy, 1);
    assert_eq!(said(&b), (SlotState::Deleting, None, None));
    dummy.set_latency(None);
    dummy.release_pending();
    b.settle();
    assert_eq!(said(&b), (SlotState::Rejected, None, Some(Reason::NoEffect)));
    let path = b.engine.slots(&conn)[0].path.expect("the way it did not take");
    assert_eq!(path.egress, ifindex(99));
}

#[test]
fn what_waits_behind_a_slow_provider_is_counted_as_pending() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    dummy.hang(Call::Submit);
    assert_eq!(b.offer(1, &b.conn(1), Original), Offer::Queued);
    wait_for(|| b.engine.ports()[0].slots.pending == 1);
    // Before, the first is on its way to the provider, with others perhaps.
    wait_for(|| dummy.held() == 1);
    for n in 2..5 {
        assert_eq!(b.offer(1, &b.conn(n), Original), Offer::Queued);
    }
    assert_eq!(b.engine.ports()[0].slots.pending, 4);
    dummy.let_go();
    b.settle();
    let slots = b.engine.ports()[0].slots;
    assert_eq!((slots.pending, slots.installed), (0, 4));
}

#[test]
fn an_adoption_is_one_of_the_rule_that_was_found() {
    use netdev_providers::{Done, RuleId};
    let found = RuleId(5);
    assert_eq!(as_adopted(Ok(Done::added(found, Some(true))), found), Ok((Some(true), None)));
    for wrong in [Done::added(RuleId(6), None), Done::Deleted, Done::Noted] {
        let why = as_adopted(Ok(wrong.clone()), found).unwrap_err();
        assert_eq!(why.reason, Reason::ProviderFault, "{wrong:?}");
    }
    let conflict = Rejection::with_detail(Reason::Conflict, "another path");
    assert_eq!(as_adopted(Err(conflict.clone()), found), Err(conflict));
}

/// Workers: who is waited for.
#[test]
fn a_worker_that_was_away_is_waited_for_when_it_is_back() {
    let dummy = DummyClass::new("dummy");
    let limits = Limits { port_del: Duration::from_millis(50), ..Limits::default() };
    let b = Bench::with_limits(&[&dummy], limits);
    let mut worker = b.engine.worker();
    worker.offline();
    b.port(1);
    b.engine.port_del(ifindex(1)).unwrap();
    b.port(1);
    worker.online();
    let started = Instant::now();
    b.engine.port_del(ifindex(1)).unwrap();
    assert!(started.elapsed() >= Duration::from_millis(50), "{:?}", started.elapsed());
    assert!(worker.port(ifindex(1)).is_some(), "it has the port until it says that it is through");
    worker.quiescent();
    assert!(worker.port(ifindex(1)).is_none());
}

#[test]
fn a_port_delete_goes_on_as_soon_as_every_worker_is_through() {
    let dummy = DummyClass::new("dummy");
    let limits = Limits { port_del: Duration::from_secs(60), ..Limits::default() };
    let b = Bench::with_limits(&[&dummy], limits);
    b.port(1);
    let mut workers = [b.engine.worker(), b.engine.worker()];
    let started = Instant::now();
    let deleting = std::thread::spawn({
        let engine = b.engine.clone();
        move || engine.port_del(ifindex(1)).unwrap()
    });
    wait_for(|| b.engine.port(ifindex(1)).is_none());
    workers[0].quiescent();
    std::thread::sleep(Duration::from_millis(20));
    assert!(!deleting.is_finished(), "the other one has not been through");
    workers[1].quiescent();
    deleting.join().unwrap();
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    // Nor is one waited for that has nothing new to see.
    b.port(2);
    workers.iter_mut().for_each(Worker::quiescent);
    b.engine.retract_egress(ifindex(9));
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
}
