//! What is refused: why, what of the slot is left, and when it is asked again.

use super::*;

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
    assert_eq!(b.engine.ports()[0].totals.reasons, [(Reason::Unsupported, 1)]);
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

/// A flowtable takes what leaves by another of its ports, and by no other netdev.
#[test]
fn a_shape_is_asked_for_again_when_the_netdev_that_it_leads_to_has_gone() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let towards = |egress, n| {
        *b.datapath.egress.lock().unwrap() = Some(ifindex(egress));
        let conn = b.conn(n);
        assert_eq!(b.offer(1, &conn, Original), Offer::Queued);
        b.settle();
        b.state(1, &conn, Original)
    };
    dummy.fail_next(2, Reason::Unsupported);
    let (rejected, installed) = (Some(SlotState::Rejected), Some(SlotState::Installed));
    assert_eq!([towards(50, 1), towards(51, 2), towards(50, 3)], [rejected; 3]);
    assert_eq!(dummy.requests(), 2, "it is remembered");
    // When it comes back it may be another netdev.
    b.engine.retract_egress(ifindex(50));
    assert_eq!(towards(51, 4), rejected, "that of the other one is what it was");
    assert_eq!(towards(50, 5), installed);
    assert_eq!(dummy.requests(), 3);
}

#[test]
fn what_its_egress_was_refused_for_is_offered_again_when_that_becomes_a_port() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let [installed, refused, unsupported, elsewhere] = [1, 2, 3, 4].map(|n| b.conn(n));
    let lead_to = |n| *b.datapath.egress.lock().unwrap() = Some(ifindex(n));
    lead_to(2);
    b.install(1, &installed, Original);
    for (to, conn, reason) in [
        (2, &refused, Reason::EgressUnsupported),
        (2, &unsupported, Reason::Refused),
        (3, &elsewhere, Reason::EgressUnsupported),
    ] {
        lead_to(to);
        dummy.fail_next(1, reason);
        b.offer(1, conn, Original);
        b.settle();
        assert_eq!(b.state(1, conn, Original), Some(SlotState::Rejected));
    }
    let requests = dummy.requests();
    b.rearmed();
    b.port(2);
    b.settle();
    assert_eq!(b.rearmed(), [(ifindex(1), 2, Original)]);
    assert_eq!(b.state(1, &refused, Original), None);
    assert_eq!(b.state(1, &installed, Original), Some(SlotState::Installed));
    assert_eq!(b.state(1, &unsupported, Original), Some(SlotState::Rejected));
    assert_eq!(b.state(1, &elsewhere, Original), Some(SlotState::Rejected));
    assert_eq!(dummy.requests(), requests, "what stands is left alone");
    lead_to(2);
    b.install(1, &refused, Original);
}

#[test]
fn what_completes_after_its_slot_has_moved_on_is_uninstalled() {
    let dummy = DummyClass::new("dummy");
    let limits = Limits { complete: Duration::from_millis(50), ..Limits::default() };
    let b = Bench::with_limits(&[&dummy], limits);
    b.port(1);
    let conn = b.in_flight(&dummy);
    // The flush does not wait for ever: its delete follows the add, whenever that comes back. A provider
    // that has operations is not asked to flush.
    b.engine.flush(&FlushFilter::default()).unwrap();
    assert_eq!(b.engine.ports()[0].fault, None);
    // (Until the port's thread sleeps again it may be that which is slow: here, where processors are short.)
    let words = || b.engine.ports()[0].slow.clone().map(|slow| slow.what);
    wait_for(|| words().is_some_and(|what| what == "operations without a result: 1"));
    dummy.set_latency(None);
    dummy.release_pending();
    wait_for(|| dummy.requests() == 2 && dummy.rules(ifindex(1)).is_empty());
    wait_for(|| b.engine.slots(&conn).is_empty());
    assert_eq!(b.engine.ports()[0].slow, None);
    b.install(1, &conn, Original);
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
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
    assert_eq!(b.engine.ports()[0].totals.reasons, [(Reason::NotAdmitted, 1)]);
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
    assert_eq!(b.engine.ports()[0].totals.reasons, [(Reason::QueueFull, 1)]);
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
    assert_eq!(b.engine.ports()[0].totals.reasons, [(Reason::ConnTableFull, 1)]);
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

/// What is asked of the dummy is what comes, and then: tests stand on it.
#[test]
fn a_failure_that_was_asked_for_later_comes_later() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    dummy.fail_after(2, Reason::Unsupported);
    let states: Vec<_> = (0..4)
        .map(|n| {
            let conn = b.conn(n);
            b.offer(1, &conn, Original);
            b.settle();
            b.state(1, &conn, Original)
        })
        .collect();
    let (stands, refused) = (Some(SlotState::Installed), Some(SlotState::Rejected));
    // The fourth has the shape of the one that was refused.
    assert_eq!(states, [stands, stands, refused, refused]);
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
