//! What a port does that has no room for more rules, and what becomes of counters.

use proptest::prelude::*;

use super::*;
use crate::engine::capacity::{IDLE_MS, PROBE_EVERY_MS};

/// A port with room for so many rules.
fn port_of(b: &Bench, capacity: u32) -> Generation {
    b.engine.port_add(NewPort { capacity: Some(capacity), ..new_port(1) }).unwrap()
}

fn advance(b: &Bench, ms: u64) {
    b.clock.fetch_add(ms, Ordering::SeqCst);
}

/// Carries so many packets on the rules of each connection, and sweeps, a second later.
fn sweep_after(b: &Bench, dummy: &DummyClass, carried: &[(&ConnHandle, u64)]) {
    advance(b, 1000);
    for (conn, packets) in carried {
        let cookie = b.engine.0.cookie(conn, Original);
        dummy.carry(ifindex(1), cookie, *packets, packets * 100);
    }
    b.engine.sweep(&mut Strays::default());
}

/// Offers a connection whose packets are so far apart until it is installed, or so many times.
fn insist(b: &Bench, conn: &ConnHandle, apart_ms: u64, times: u32) -> bool {
    for _ in 0..times {
        advance(b, apart_ms);
        b.offer(1, conn, Original);
        b.settle();
        let slot = b.engine.slots(conn)[0].clone();
        if slot.state == SlotState::Installed {
            return true;
        }
        assert_eq!(slot.rejection.unwrap().reason, Reason::TableFull);
        advance(b, slot.retry_in_ms.unwrap() + 1);
        b.settle();
        wait_for(|| b.engine.slots(conn).is_empty());
    }
    false
}

#[test]
fn an_idle_rule_gives_way_to_anybody_and_its_sight_is_rearmed() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    port_of(&b, 2);
    let [idle, busy, newcomer] = [1, 2, 3].map(|n| b.conn(n));
    b.install(1, &idle, Original);
    b.install(1, &busy, Original);
    for _ in 0..3 {
        sweep_after(&b, &dummy, &[(&busy, 1)]);
    }
    assert!(!insist(&b, &newcomer, 0, 1), "the idle one has not been idle for long enough");
    for _ in 0..10 {
        sweep_after(&b, &dummy, &[(&busy, 1)]);
    }
    b.rearmed();
    b.install(1, &newcomer, Original);
    assert!(b.engine.slots(&idle).is_empty());
    assert_eq!(b.rearmed(), [(ifindex(1), 1, Original)]);
    assert_eq!(b.state(1, &busy, Original), Some(SlotState::Installed));
    let port = &b.engine.ports()[0];
    assert_eq!((port.capacity, port.capacity_learnt, port.evictions), (Some(2), false, 1));
    assert_eq!(dummy.rules(ifindex(1)).len(), 2);
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn a_rule_that_one_sweep_has_seen_gives_way_to_nobody() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    port_of(&b, 1);
    let (first, newcomer) = (b.conn(1), b.conn(2));
    b.install(1, &first, Original);
    // It has carried nothing for long, and that was not measured yet.
    advance(&b, IDLE_MS);
    sweep_after(&b, &dummy, &[]);
    assert!(!insist(&b, &newcomer, 0, 1));
    assert_eq!(b.state(1, &first, Original), Some(SlotState::Installed));
    sweep_after(&b, &dummy, &[]);
    assert!(insist(&b, &newcomer, 0, 1));
    assert_eq!(b.state(1, &first, Original), None);
}

#[test]
fn a_busier_connection_gets_the_place_of_a_slower_one_once_its_sights_have_told() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    port_of(&b, 2);
    let [slow, fast, newcomer] = [1, 2, 3].map(|n| b.conn(n));
    b.install(1, &slow, Original);
    b.install(1, &fast, Original);
    for _ in 0..3 {
        sweep_after(&b, &dummy, &[(&slow, 3), (&fast, 10_000)]);
    }
    // Its packets come 20 ms apart: 50 in a second. Known after two pauses.
    assert!(!insist(&b, &newcomer, 20, 2));
    assert!(insist(&b, &newcomer, 20, 1));
    assert!(b.engine.slots(&slow).is_empty());
    assert_eq!(b.state(1, &fast, Original), Some(SlotState::Installed));
    // Another of the same pace finds nobody that is slower by enough.
    let another = b.conn(4);
    for _ in 0..3 {
        sweep_after(&b, &dummy, &[(&newcomer, 50), (&fast, 10_000)]);
    }
    assert!(!insist(&b, &another, 20, 5));
    assert_eq!(b.engine.ports()[0].evictions, 1);
}

#[test]
fn a_rule_is_as_fast_as_it_is_now_whatever_it_has_carried() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    port_of(&b, 1);
    let [once_fast, early, late] = [1, 2, 3].map(|n| b.conn(n));
    b.install(1, &once_fast, Original);
    sweep_after(&b, &dummy, &[(&once_fast, 1)]);
    sweep_after(&b, &dummy, &[(&once_fast, 10_000)]);
    assert!(!insist(&b, &early, 20, 3), "a burst is not forgotten at once");
    for _ in 0..15 {
        sweep_after(&b, &dummy, &[(&once_fast, 1)]);
    }
    assert!(insist(&b, &late, 20, 3));
    assert_eq!(b.state(1, &once_fast, Original), None);
}

#[test]
fn a_rule_that_came_again_since_the_sweep_does_not_give_way() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    port_of(&b, 1);
    let (again, newcomer) = (b.conn(1), b.conn(2));
    b.install(1, &again, Original);
    for _ in 0..12 {
        sweep_after(&b, &dummy, &[]);
    }
    // The sweep has found it idle; that was the one before.
    b.engine.conn_retract(&again, TakenBack::Asked);
    b.settle();
    b.install(1, &again, Original);
    assert!(!insist(&b, &newcomer, 0, 1));
    assert_eq!(b.state(1, &again, Original), Some(SlotState::Installed));
    assert_eq!(b.engine.ports()[0].evictions, 0);
}

#[test]
fn a_full_table_is_learnt_and_so_is_one_that_has_become_larger() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    dummy.set_capacity(2);
    let conns: Vec<_> = (1..=6).map(|n| b.conn(n)).collect();
    b.install(1, &conns[0], Original);
    b.install(1, &conns[1], Original);
    assert_eq!(b.engine.ports()[0].capacity, None);
    assert!(!insist(&b, &conns[2], 0, 1));
    let learnt = |b: &Bench| {
        let port = &b.engine.ports()[0];
        (port.capacity, port.capacity_learnt)
    };
    assert_eq!(learnt(&b), (Some(2), true));
    // The provider is not asked for each of many newcomers.
    advance(&b, PROBE_EVERY_MS);
    let asked = dummy.requests();
    for conn in &conns[3..] {
        b.offer(1, conn, Original);
    }
    b.settle();
    assert_eq!(dummy.requests(), asked + 1);
    dummy.set_capacity(3);
    advance(&b, 60_000);
    b.settle();
    wait_for(|| b.engine.slots(&conns[2]).is_empty());
    b.install(1, &conns[2], Original);
    assert_eq!(learnt(&b), (Some(3), true));
}

#[test]
fn what_a_connection_has_carried_is_never_less_than_it_was() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conn = b.conn(1);
    b.install(1, &conn, Original);
    sweep_after(&b, &dummy, &[(&conn, 10)]);
    assert_eq!((conn.traffic().packets, conn.traffic().bytes), (10, 1000));
    // Its rule goes and comes again.
    b.engine.conn_retract(&conn, TakenBack::Asked);
    b.settle();
    assert_eq!(conn.traffic().packets, 10);
    b.install(1, &conn, Original);
    assert_eq!(conn.traffic().packets, 10);
    sweep_after(&b, &dummy, &[(&conn, 5)]);
    assert_eq!((conn.traffic().packets, conn.traffic().bytes), (15, 1500));
    // Its counters begin anew behind our back, and it is in use.
    dummy.reset_counters(ifindex(1));
    sweep_after(&b, &dummy, &[(&conn, 2)]);
    assert_eq!((conn.traffic().packets, conn.traffic().bytes), (17, 1700));
    let now = b.engine.now_ms();
    assert!(matches!(b.engine.conn_update(&conn), Usage::LastUsed { at_ms, .. } if at_ms == now));
    b.engine.flush(&FlushFilter::default()).unwrap();
    assert_eq!(conn.traffic().packets, 17);
    let port = &b.engine.ports()[0];
    assert_eq!((port.packets, port.bytes), (17, 1700));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever comes, a port never has more rules than it may; and connections of one pace, many
    /// more than there are places, do not push each other out.
    #[test]
    fn the_limit_holds_and_equals_do_not_thrash(
        capacity in 1u32..6,
        offers in proptest::collection::vec((1u16..20, 0u64..400), 1..120),
    ) {
        let dummy = DummyClass::new("dummy");
        // A table as large as the limit: one rule more, and the provider would say so.
        dummy.set_capacity(capacity as usize);
        let b = Bench::new(&[&dummy]);
        port_of(&b, capacity);
        let conns: Vec<_> = (0..20).map(|n| b.conn(n)).collect();
        let mut since_sweep = 0;
        for (n, pause) in offers {
            advance(&b, pause);
            since_sweep += pause;
            b.offer(1, &conns[usize::from(n)], Original);
            b.settle();
            prop_assert!(dummy.rules(ifindex(1)).len() <= capacity as usize);
            if since_sweep >= 1000 {
                since_sweep = 0;
                // Every rule carries as much as a packet every 200 ms makes.
                let all: Vec<_> = conns.iter().map(|c| (c, 5)).collect();
                sweep_after(&b, &dummy, &all);
            }
        }
        let port = &b.engine.ports()[0];
        prop_assert!(!port.capacity_learnt, "the provider was never asked for more");
        prop_assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
        let present: u64 = port.slots.installed;
        prop_assert_eq!(present, dummy.rules(ifindex(1)).len() as u64);
    }
}

#[test]
fn many_connections_of_one_pace_leave_the_rules_where_they_are() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    port_of(&b, 4);
    let conns: Vec<_> = (1..=12).map(|n| b.conn(n)).collect();
    // Ten packets in a second, each of them, for a minute.
    for tick in 0..600 {
        advance(&b, 100);
        for conn in &conns {
            b.offer(1, conn, Original);
        }
        b.settle();
        if tick % 10 == 9 {
            for conn in &conns {
                dummy.carry(ifindex(1), b.engine.0.cookie(conn, Original), 10, 1000);
            }
            b.engine.sweep(&mut Strays::default());
        }
    }
    assert_eq!(b.engine.ports()[0].evictions, 0);
    assert_eq!(dummy.rules(ifindex(1)).len(), 4);
}
