//! What is read back: last use, counters, rules that are gone, or that do nothing.

use super::*;

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
    // What both directions carried is the connection's.
    assert!(dummy.carry(ifindex(1), dummy.rules(ifindex(1))[0].cookie, 5, 1000));
    b.clock.store(30_000, Ordering::SeqCst);
    b.engine.sweep(&mut strays);
    let both = Usage::LastUsed { at_ms: 30_000, packets: 8, bytes: 1300 };
    assert_eq!(b.engine.conn_update(&conn), both);
}

#[test]
fn a_pending_connection_is_unknown_so_that_it_does_not_expire() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conn = b.in_flight(&dummy);
    assert_eq!(b.engine.conn_update(&conn), Usage::Unknown);
    dummy.release_pending();
    b.settle();
    // Nor while its rule is on the way out: it may have carried something since the last sweep.
    b.engine.conn_retract(&conn, TakenBack::Asked);
    b.drained(&dummy, 1);
    assert_eq!(b.engine.conn_update(&conn), Usage::Unknown);
    dummy.release_pending();
    b.settle();
    assert_eq!(b.engine.conn_update(&conn), Usage::NotOffloaded);
}

#[test]
fn a_sweep_takes_no_slot_for_lost_that_has_no_rule() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let (refused, pending) = (b.conn(1), b.conn(2));
    dummy.fail_next(1, Reason::Busy);
    assert_eq!(b.offer(1, &refused, Original), Offer::Queued);
    b.settle();
    dummy.set_latency(Some(Duration::MAX));
    assert_eq!(b.offer(1, &pending, Original), Offer::Queued);
    b.drained(&dummy, 1);
    // The pause of the one that was refused is not over.
    b.clock.fetch_add(50, Ordering::SeqCst);
    let mut strays = Strays::default();
    for _ in 0..2 {
        let sweep = b.engine.sweep(&mut strays);
        assert_eq!((sweep.lost, sweep.strays), (0, 0));
    }
    assert_eq!(b.state(1, &refused, Original), Some(SlotState::Rejected));
    assert_eq!(b.rearmed(), []);
    dummy.release_pending();
    b.settle();
    assert_eq!(b.state(1, &pending, Original), Some(SlotState::Installed), "nobody cancelled it");
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

/// A reset of the device takes the link down and up again.
#[test]
fn a_link_that_returns_has_the_provider_give_the_nic_what_it_may_have_lost() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conn = b.conn(1);
    b.install(1, &conn, Original);
    dummy.steal_all(ifindex(1));
    b.engine.link_returned(ifindex(1));
    assert_eq!(dummy.suspected(), 1);
    b.settle();
    let state = b.state(1, &conn, Original);
    assert_ne!(state, Some(SlotState::Installed), "it looks at once, and waits for no add");
    b.engine.link_returned(ifindex(2));
    assert_eq!(dummy.suspected(), 1, "no port");
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

/// A rule in software that somebody else leaves no packet to.
#[test]
fn a_rule_in_software_that_does_nothing_is_deleted_where_others_see_packets_first() {
    let dummy = DummyClass::new("dummy");
    dummy.set_in_hw(Some(false));
    let (b, conn, mut strays) = seen_in_software(&dummy);
    for _ in 0..3 {
        assert_eq!(b.engine.sweep(&mut strays).without_effect, 0, "nobody is in front");
    }
    dummy.set_in_front(&["matchall at prio 1 (all): gact"]);
    let mut seen = 1010;
    assert_eq!(b.engine.sweep(&mut strays).without_effect, 0, "since now");
    seen += 10;
    b.datapath.forwarded.store(seen, Ordering::SeqCst);
    assert_eq!(b.engine.sweep(&mut strays).without_effect, 1);
    b.settle();
    let slot = b.engine.slots(&conn).remove(0);
    let why = slot.rejection.expect("a rejection");
    assert_eq!(why.reason, Reason::NoEffect);
    assert!(why.to_string().contains("matchall at prio 1 (all): gact sees packets first"), "{why}");
}

#[test]
fn a_rule_in_hardware_that_does_nothing_is_deleted_and_comes_back_after_a_pause() {
    let dummy = DummyClass::new("dummy");
    let (b, conn, mut strays) = seen_in_software(&dummy);
    assert_eq!(dummy.suspected(), 0);
    assert_eq!(b.engine.sweep(&mut strays).without_effect, 1);
    assert_eq!(dummy.suspected(), 1, "the provider may look at what else the NIC has lost");
    b.settle();
    assert!(dummy.rules(ifindex(1)).is_empty());
    assert_eq!(b.state(1, &conn, Original), Some(SlotState::Rejected));
    let slot = b.engine.slots(&conn).remove(0);
    let why = slot.rejection.expect("a rejection");
    assert_eq!(why.reason, Reason::NoEffect);
    assert!(why.to_string().contains("10 packets"), "{why}");
    assert_eq!(slot.retry_in_ms, Some(100));
    assert_eq!(b.engine.ports()[0].totals.reasons, [(Reason::NoEffect, 1)]);
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
    assert_eq!(b.engine.ports()[0].totals.reasons, []);
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
    assert_eq!(b.engine.ports()[0].totals.reasons, []);
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

#[test]
fn rules_that_others_have_removed_all_at_once_are_offered_again() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    b.port(2);
    let conns: Vec<_> = (1..4).map(|n| b.conn(n)).collect();
    for conn in &conns {
        b.install(1, conn, Original);
        b.install(2, conn, Reply);
    }
    dummy.set_in_front(&["matchall at prio 1 (all)"]);
    assert_eq!(b.engine.ports()[0].in_front, ["matchall at prio 1 (all)"]);
    // Nothing has happened to it.
    b.engine.put_in_order(ifindex(1));
    b.settle();
    assert!(conns.iter().all(|c| b.state(1, c, Original) == Some(SlotState::Installed)));
    dummy.steal_all(ifindex(1));
    b.engine.put_in_order(ifindex(1));
    b.settle();
    let rearmed = b.rearmed();
    for conn in &conns {
        assert_eq!(b.state(1, conn, Original), None);
        assert_eq!(b.state(2, conn, Reply), Some(SlotState::Installed), "another port's");
        assert!(rearmed.contains(&(ifindex(1), conn.epoch().0, Original)), "it is sighted again");
    }
    assert_eq!(b.engine.ports()[0].slots.installed, 0);
    b.install(1, &conns[0], Original);
    assert_eq!(dummy.rules(ifindex(1)).len(), 1);
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}
