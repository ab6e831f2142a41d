//! What an engine that died has left on a netdev.

use netdev_providers::{Counters, Flow};

use super::*;
use crate::engine::datapath::flow;

const DEAD: Instance = Instance(NonZeroU32::new(4711).unwrap());

fn cookie(epoch: u64) -> Cookie {
    Cookie { instance: DEAD, epoch: Epoch(epoch), direction: Original }
}

/// The flow of the connection `n` of [`Bench::conn`], as this engine would offload it.
fn flow_of(n: u16) -> Flow {
    let original: Tuple =
        format!("tcp 192.0.2.{}:{} > 198.51.100.1:80", n % 250 + 1, n).parse().unwrap();
    let key = ConnKey { zone: Zone(0), original };
    let conn = ConnHandle::new(key, original.inverted(), Epoch(0), 0, 0);
    flow(&conn, Original, &path(&conn, Original, ifindex(99)))
}

fn leave(dummy: &DummyClass, n: u16, epoch: u64, flow: Flow) {
    let counters = Counters { packets: 100 * u64::from(n), bytes: 10_000 };
    dummy.leave(ifindex(1), cookie(epoch), flow, counters);
}

fn lives(b: &Bench, n: u16) {
    b.datapath.living.lock().unwrap().push((flow_of(n).matches.tuple, n));
}

#[test]
fn the_rule_of_a_living_connection_is_adopted_with_its_counters_and_its_mark() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    leave(&dummy, 1, 7, flow_of(1));
    lives(&b, 1);
    b.port(1);
    b.settle();
    let conn = b.conn(1);
    assert_eq!(b.state(1, &conn, Original), Some(SlotState::Installed));
    assert_eq!(b.engine.slots(&conn)[0].cookie, cookie(7), "as it stands in the backend");
    assert_eq!(conn.traffic().packets, 100);
    assert_eq!(b.engine.ports()[0].packets, 100);
    // What it carried before is not news.
    b.clock.fetch_add(5000, Ordering::SeqCst);
    assert!(b.engine.sweep(&mut Strays::default()).used.is_empty());
    dummy.carry(ifindex(1), b.engine.0.cookie(&conn, Original), 1, 100);
    let sweep = b.engine.sweep(&mut Strays::default());
    assert_eq!((sweep.used.len(), sweep.strays, sweep.lost), (1, 0, 0));
    assert_eq!(conn.traffic().packets, 101);
    // From now on it is a rule like any other.
    assert_eq!(b.offer(1, &conn, Original), Offer::Decided);
    b.engine.conn_del(&conn);
    b.settle();
    assert!(dummy.rules(ifindex(1)).is_empty());
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn what_belongs_to_nobody_or_leads_elsewhere_is_removed_and_offered_anew() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    leave(&dummy, 1, 7, flow_of(1)); // its connection has ended
    let mut moved = flow_of(2);
    moved.forward.egress = ifindex(98);
    leave(&dummy, 2, 8, moved);
    lives(&b, 2);
    // Two rules for one slot: the first is taken.
    leave(&dummy, 3, 9, flow_of(3));
    leave(&dummy, 3, 10, flow_of(3));
    lives(&b, 3);
    dummy.set_foreign(5);
    b.port(1);
    b.settle();
    let conns = [1, 2, 3].map(|n| b.conn(n));
    let cookies: Vec<_> = dummy.rules(ifindex(1)).iter().map(|r| r.cookie).collect();
    assert_eq!(cookies, [b.engine.0.cookie(&conns[2], Original)]);
    assert!(b.engine.slots(&conns[1]).is_empty());
    assert_eq!(b.rearmed(), [(ifindex(1), 2, Original)]);
    assert_eq!(b.engine.ports()[0].totals.reasons, [], "nothing was rejected");
    b.install(1, &conns[0], Original);
    b.install(1, &conns[1], Original);
    // On demand there is nothing more to do, and others' rules are counted.
    let done = b.engine.reconcile(None).unwrap();
    let (netdev, what) = &done[0];
    assert_eq!((done.len(), netdev.ifindex), (1, ifindex(1)));
    assert_eq!(*what, Reconciled { foreign: 5, ..Reconciled::default() });
    assert!(b.engine.reconcile(Some(ifindex(2))).is_err());
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn what_a_reconciliation_has_done_is_told_in_numbers() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    b.settle();
    // What comes to light later: two of living connections, one that leads elsewhere, two of nobody.
    for n in 1..=5 {
        let mut flow = flow_of(n);
        if n == 3 {
            flow.forward.egress = ifindex(98);
        }
        leave(&dummy, n, u64::from(n), flow);
        if n <= 3 {
            lives(&b, n);
        }
    }
    dummy.set_foreign(4);
    let done = b.engine.reconcile(Some(ifindex(1))).unwrap().remove(0).1;
    assert_eq!(done, Reconciled { adopted: 2, removed: 3, foreign: 4, fault: None });
    assert_eq!(dummy.rules(ifindex(1)).len(), 2);
    let again = b.engine.reconcile(None).unwrap().remove(0).1;
    assert_eq!(again, Reconciled { foreign: 4, ..Reconciled::default() });
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn what_cannot_be_offloaded_now_is_not_left_standing() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    for (n, epoch) in [(1, 7), (2, 8)] {
        leave(&dummy, n, epoch, flow_of(n));
        lives(&b, n);
    }
    *b.datapath.refuse.lock().unwrap() = Some(Reason::NoRoute.into());
    b.port(1);
    b.settle();
    assert!(dummy.rules(ifindex(1)).is_empty());
    let slot = &b.engine.slots(&b.conn(1))[0];
    assert_eq!(slot.rejection.as_ref().map(|r| r.reason), Some(Reason::NoRoute));
    let done = b.engine.reconcile(Some(ifindex(1))).unwrap();
    assert_eq!(done[0].1, Reconciled::default(), "the delete was made at the start");
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn an_offer_that_comes_at_once_waits_for_the_reconciliation() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    for n in 1..=300 {
        leave(&dummy, n, u64::from(n), flow_of(n));
        if n % 2 == 0 {
            lives(&b, n);
        }
    }
    b.port(1);
    // The same match as a rule that stands: in conflict with it, were it not gone before.
    let conns: Vec<_> = (1..=300).map(|n| b.conn(n)).collect();
    for conn in &conns {
        b.offer(1, conn, Original);
    }
    b.settle();
    assert_eq!(b.engine.ports()[0].totals.reasons, []);
    assert_eq!(dummy.rules(ifindex(1)).len(), 300);
    for conn in &conns {
        assert_eq!(b.state(1, conn, Original), Some(SlotState::Installed));
    }
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn an_engine_that_leaves_lets_stand_what_outlives_it_and_nothing_else() {
    let (lasting, fleeting) = (DummyClass::new("lasting"), DummyClass::new("fleeting"));
    lasting.set_outlives(true);
    let b = Bench::new(&[&lasting, &fleeting]);
    for (n, class) in [(1, "lasting"), (2, "fleeting")] {
        let providers = Some(vec![class.to_owned()]);
        b.engine.port_add(NewPort { providers, ..new_port(n) }).unwrap();
    }
    let conns = [1, 2, 3].map(|n| b.conn(n));
    for conn in &conns {
        b.install(1, conn, Original);
        b.install(2, conn, Original);
    }
    // What has ended goes.
    b.engine.conn_del(&conns[2]);
    let left = b.engine.leave();
    let numbers: Vec<_> = left.iter().map(|(n, d)| (n.ifindex, d.left, d.flushed)).collect();
    assert_eq!(numbers, [(ifindex(1), 2, 0), (ifindex(2), 0, 2)]);
    assert!(left.iter().all(|(_, d)| d.faults.is_empty()), "{left:?}");
    assert_eq!(lasting.rules(ifindex(1)).len(), 2);
    assert_eq!(lasting.ports(), [ifindex(1)], "it is not released");
    assert!(fleeting.rules(ifindex(2)).is_empty() && fleeting.ports().is_empty());
    assert!(b.engine.ports().is_empty());
}

#[test]
fn what_should_have_gone_and_is_still_there_is_not_left_to_anybody() {
    let dummy = DummyClass::new("dummy");
    dummy.set_outlives(true);
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conns = [1, 2].map(|n| b.conn(n));
    conns.iter().for_each(|conn| b.install(1, conn, Original));
    dummy.fail_next(1, Reason::Busy);
    b.engine.conn_del(&conns[0]);
    b.settle();
    assert_eq!(dummy.rules(ifindex(1)).len(), 2, "one was not deleted");
    let left = b.engine.leave();
    assert_eq!((left[0].1.left, left[0].1.flushed), (0, 2));
    assert!(dummy.rules(ifindex(1)).is_empty() && dummy.ports().is_empty());
}
