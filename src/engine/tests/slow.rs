//! Providers that are slow, and not broken: they go on by themselves, and nobody else has to wait.

use super::*;

/// So slow is slow here; machines that are busy are not to be taken for it.
const SOON: Duration = Duration::from_millis(300);

fn limits() -> Limits {
    Limits { port_del: SOON, complete: SOON, ..Limits::default() }
}

/// For those where nothing may seem slow, on a machine that stands still for a moment itself.
const LATER: Duration = Duration::from_millis(1500);

fn patient() -> Limits {
    Limits { port_del: LATER, complete: LATER, ..Limits::default() }
}

fn port(b: &Bench, n: u32) -> view::PortView {
    b.engine.port_view(ifindex(n)).unwrap()
}

#[test]
fn who_waits_for_a_slow_port_does_not_fault_it() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::with_limits(&[&dummy], limits());
    b.port(1);
    b.port(2);
    *b.datapath.egress.lock().unwrap() = Some(ifindex(2));
    b.install(1, &b.conn(1), Original);
    dummy.hang_on(Call::Submit, ifindex(1));
    assert_eq!(b.offer(1, &b.conn(2), Original), Offer::Queued);
    wait_for(|| dummy.held() == 1);
    // Everything that administration asks of it.
    assert!(b.engine.port_add(new_port(3)).is_ok());
    b.engine.retract_egress(ifindex(2));
    b.engine.flush(&FlushFilter::default()).unwrap();
    b.engine.flush(&FlushFilter { zone: Some(Zone(0)), ..Default::default() }).unwrap();
    let reconciled = b.engine.reconcile(Some(ifindex(1))).unwrap().remove(0).1;
    assert!(reconciled.fault.unwrap().to_string().contains("slow"));
    let deleted = b.engine.port_del(ifindex(2)).unwrap();
    assert!(deleted.faults.is_empty(), "it has refused nothing: {:?}", deleted.faults);
    let slow = port(&b, 1);
    assert_eq!(slow.fault, None);
    assert!(slow.slow.unwrap().since >= SOON);
    // It takes nothing new meanwhile, and goes on by itself.
    assert_eq!(b.offer(1, &b.conn(3), Original), Offer::Refused(Reason::ProviderSlow));
    dummy.let_go();
    wait_for(|| port(&b, 1).slow.is_none() && dummy.rules(ifindex(1)).is_empty());
    *b.datapath.egress.lock().unwrap() = None;
    b.install(1, &b.conn(3), Original);
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn a_port_that_goes_on_is_not_slow_however_long_it_takes() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::with_limits(&[&dummy], patient());
    b.port(1);
    let conns: Vec<_> = (0..8).map(|n| b.conn(n)).collect();
    conns.iter().for_each(|c| b.install(1, c, Original));
    let each = Duration::from_millis(4);
    dummy.set_service_time(ifindex(1), Some(each));
    let flush = std::thread::spawn({
        let engine = b.engine.clone();
        let zone = Some(Zone(0));
        move || engine.flush(&FlushFilter { zone, ..Default::default() }).unwrap()
    });
    wait_for(|| dummy.pending().len() == conns.len());
    // Each comes well within the limit, and all together long after it.
    let began = Instant::now();
    for _ in 0..conns.len() {
        std::thread::sleep(LATER / 4);
        assert_eq!(port(&b, 1).slow, None);
        assert_eq!(dummy.advance(each), 1);
    }
    assert!(began.elapsed() >= LATER * 2);
    assert_eq!(flush.join().unwrap()[0].1, 8);
}

#[test]
fn who_deletes_a_port_waits_as_long_as_what_is_in_flight_comes_back() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::with_limits(&[&dummy], patient());
    b.port(1);
    let each = Duration::from_millis(4);
    dummy.set_service_time(ifindex(1), Some(each));
    let conns: Vec<_> = (0..8).map(|n| b.conn(n)).collect();
    conns.iter().for_each(|c| assert_eq!(b.offer(1, c, Original), Offer::Queued));
    b.drained(&dummy, conns.len());
    let deleting = std::thread::spawn({
        let engine = b.engine.clone();
        move || engine.port_del(ifindex(1)).unwrap()
    });
    // Each comes well within the limit, and all together long after it.
    for _ in 0..conns.len() {
        std::thread::sleep(LATER / 4);
        assert_eq!(dummy.advance(each), 1);
    }
    let deleted = deleting.join().unwrap();
    assert!(deleted.faults.is_empty(), "{:?}", deleted.faults);
    assert_eq!(deleted.flushed, 8);
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn operations_that_do_not_come_back_make_a_port_slow_until_they_do() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::with_limits(&[&dummy], limits());
    b.port(1);
    b.port(2);
    dummy.set_service_time(ifindex(1), Some(Duration::from_secs(1)));
    b.offer(1, &b.conn(1), Original);
    b.drained(&dummy, 1);
    std::thread::sleep(SOON * 2);
    let slow = port(&b, 1).slow.unwrap();
    assert!(slow.to_string().starts_with("slow since 0."), "{slow}");
    assert_eq!(b.offer(1, &b.conn(2), Original), Offer::Refused(Reason::ProviderSlow));
    b.engine.worker().port(ifindex(2)).map(|p| p.conn_seen(&b.conn(2), Original, hint())).unwrap();
    wait_for(|| dummy.rules(ifindex(2)).len() == 1);
    assert_eq!(dummy.advance(Duration::from_secs(1)), 1);
    assert_eq!(port(&b, 1).slow, None);
    dummy.set_service_time(ifindex(1), None);
    b.install(1, &b.conn(2), Original);
}

#[test]
fn a_delete_that_does_not_come_back_is_not_told_as_one_that_was_refused() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::with_limits(&[&dummy], limits());
    b.port(1);
    b.port(2);
    *b.datapath.egress.lock().unwrap() = Some(ifindex(2));
    b.install(1, &b.conn(1), Original);
    dummy.set_latency(Some(Duration::MAX));
    let deleted = b.engine.port_del(ifindex(2)).unwrap();
    assert_eq!((deleted.retracted, deleted.faults.len()), (1, 0), "{:?}", deleted.faults);
    assert_eq!(dummy.rules(ifindex(1)).len(), 1);
    dummy.release_pending();
    wait_for(|| dummy.rules(ifindex(1)).is_empty());
}

fn hint() -> PathSpec {
    PathSpec::Resolve(PathHint::default())
}

#[test]
fn offers_behind_what_does_not_go_on_are_few_though_nobody_looks() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::with_limits(&[&dummy], limits());
    b.port(1);
    dummy.hang(Call::Submit);
    b.offer(1, &b.conn(0), Original);
    wait_for(|| dummy.held() == 1);
    std::thread::sleep(SOON * 2);
    let queued = (1..1000).filter(|n| b.offer(1, &b.conn(*n), Original) == Offer::Queued).count();
    // The time is looked at behind as many as that, and not for each.
    assert_eq!(queued, 64);
    dummy.let_go();
    b.settle();
    assert_eq!(dummy.rules(ifindex(1)).len(), queued + 1);
}

#[test]
fn what_a_sweep_did_not_wait_for_is_taken_by_the_next() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::with_limits(&[&dummy], limits());
    b.port(1);
    let conn = b.conn(1);
    b.install(1, &conn, Original);
    dummy.carry(ifindex(1), dummy.rules(ifindex(1))[0].cookie, 3, 300);
    dummy.be_late(Call::Usage, None);
    let mut strays = Strays::default();
    b.clock.fetch_add(1000, Ordering::SeqCst);
    assert_eq!(b.engine.sweep(&mut strays).faults.len(), 1);
    assert_eq!(port(&b, 1).fault, None);
    dummy.let_go();
    let table = b.engine.0.publication.table();
    let port = table.get(ifindex(1)).unwrap();
    wait_for(|| !port.swept.load(Ordering::SeqCst));
    // Were it lost, sweeps that always take longer than the limit would never tell anything.
    dummy.hang(Call::Usage);
    let sweep = b.engine.sweep(&mut strays);
    assert!(sweep.faults.is_empty() && sweep.used[0].is_same(&conn), "{sweep:?}");
    dummy.let_go();
}

#[test]
fn removals_overtake_what_waits_to_be_added() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    b.port(2);
    let (ended, towards) = (b.conn(1), b.conn(2));
    b.install(1, &ended, Original);
    *b.datapath.egress.lock().unwrap() = Some(ifindex(2));
    b.install(1, &towards, Original);
    dummy.hang_on(Call::Submit, ifindex(1));
    b.offer(1, &b.conn(3), Original);
    wait_for(|| dummy.held() == 1);
    *b.datapath.egress.lock().unwrap() = None;
    for n in 100..1100 {
        assert_eq!(b.offer(1, &b.conn(n), Original), Offer::Queued);
    }
    assert_eq!(b.engine.conn_del(&ended), 1);
    let retract = std::thread::spawn({
        let engine = b.engine.clone();
        move || engine.retract_egress(ifindex(2))
    });
    let queue = b.engine.0.publication.table();
    let queue = &queue.get(ifindex(1)).unwrap().queue;
    wait_for(|| queue.removals() == 2);
    assert_eq!(queue.pending(), 1000);
    // One batch after the other.
    dummy.set_latency(Some(Duration::MAX));
    dummy.let_go();
    // The add that is with it, and both deletes: those of a retraction in a batch of their own.
    wait_for(|| dummy.pending().len() >= 3);
    let first: Vec<_> = dummy.pending().into_iter().map(|p| p.request).collect();
    let deletes = first.iter().filter(|r| matches!(r, Request::Delete { .. })).count();
    assert!(deletes == 2 && first.len() == 3, "{first:?}");
    dummy.set_latency(None);
    dummy.release_pending();
    // That of the rule that was there, and that of the one that was being added.
    assert_eq!(retract.join().unwrap(), 2);
    b.settle();
    assert_eq!(dummy.rules(ifindex(1)).len(), 1000);
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn an_add_that_waited_while_its_egress_was_retracted_does_not_come_behind_it() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    b.port(2);
    dummy.hang_on(Call::Submit, ifindex(1));
    b.offer(1, &b.conn(1), Original);
    wait_for(|| dummy.held() == 1);
    // Its path was told with the offer, and nobody asks for it again.
    let conn = b.conn(2);
    let known = PathSpec::Known(Box::new(path(&conn, Original, ifindex(2))));
    let worker = b.engine.worker();
    assert_eq!(worker.port(ifindex(1)).unwrap().conn_seen(&conn, Original, known), Offer::Queued);
    drop(worker);
    let deleting = std::thread::spawn({
        let engine = b.engine.clone();
        move || engine.port_del(ifindex(2)).unwrap()
    });
    wait_for(|| b.engine.port(ifindex(2)).is_none());
    dummy.let_go();
    deleting.join().unwrap();
    b.settle();
    let rules = dummy.rules(ifindex(1));
    assert!(rules.iter().all(|r| r.flow.forward.egress != ifindex(2)), "{rules:?}");
    // When the netdev is there again it is nothing special.
    b.port(2);
    b.engine.flush(&FlushFilter::default()).unwrap();
    let known = PathSpec::Known(Box::new(path(&conn, Original, ifindex(2))));
    let worker = b.engine.worker();
    assert_eq!(worker.port(ifindex(1)).unwrap().conn_seen(&conn, Original, known), Offer::Queued);
    b.settle();
    assert_eq!(b.state(1, &conn, Original), Some(SlotState::Installed));
}

#[test]
fn a_flush_takes_back_what_waits_and_it_may_come_again() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    dummy.hang(Call::Submit);
    b.offer(1, &b.conn(0), Original);
    wait_for(|| dummy.held() == 1);
    let conns: Vec<_> = (1..1001).map(|n| b.conn(n)).collect();
    conns.iter().for_each(|c| assert_eq!(b.offer(1, c, Original), Offer::Queued));
    let flush = std::thread::spawn({
        let engine = b.engine.clone();
        move || engine.flush(&FlushFilter::default()).unwrap()
    });
    let table = b.engine.0.publication.table();
    wait_for(|| table.get(ifindex(1)).unwrap().queue.removals() == 1);
    dummy.let_go();
    assert_eq!(flush.join().unwrap()[0].1, 1, "the one that was being added");
    b.settle();
    assert_eq!(dummy.requests(), 1, "what waited was never written");
    // The next flush finds nothing, and asks nobody.
    wait_for(|| table.get(ifindex(1)).unwrap().is_empty());
    assert_eq!(b.rearmed().len(), 1001);
    assert!(conns.iter().all(|c| b.engine.slots(c).is_empty()));
    b.install(1, &conns[7], Original);
}

#[test]
fn a_sweep_deletes_no_rule_that_has_the_name_of_one_that_is_gone() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let mut strays = Strays::default();
    // Twice, one after the other: a connection that ends between the dump and its processing, under the
    // name that the next one gets.
    for n in 1..=2 {
        let brief = b.conn(n);
        b.install(1, &brief, Original);
        dummy.be_late(Call::Usage, None);
        let sweep = std::thread::spawn({
            let engine = b.engine.clone();
            move || {
                let sweep = engine.sweep(&mut strays);
                (sweep, strays)
            }
        });
        wait_for(|| dummy.held() == 1);
        b.engine.conn_del(&brief);
        b.settle();
        if n == 2 {
            b.install(1, &b.conn(3), Original);
        }
        dummy.let_go();
        let (swept, s) = sweep.join().unwrap();
        strays = s;
        assert_eq!(swept.strays, 1);
        b.settle();
    }
    // Nobody has deleted the third one's rule, and violations would tell of the attempt.
    assert_eq!(dummy.rules(ifindex(1)).len(), 1);
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
    assert_eq!(b.state(1, &b.conn(3), Original), Some(SlotState::Installed));
}

#[test]
fn closing_stops_all_ports_at_once_and_deletes_nothing_one_by_one() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    b.port(2);
    for n in 0..300 {
        let conn = b.conn(n);
        *b.datapath.egress.lock().unwrap() = Some(ifindex(2));
        assert_eq!(b.offer(1, &conn, Original), Offer::Queued);
        b.settle_one(1);
        *b.datapath.egress.lock().unwrap() = Some(ifindex(1));
        assert_eq!(b.offer(2, &conn, Reply), Offer::Queued);
        b.settle_one(2);
    }
    let requests = dummy.requests();
    dummy.hang(Call::Flush);
    let closing = std::thread::spawn({
        let engine = b.engine.clone();
        move || engine.close()
    });
    wait_for(|| dummy.held() == 2);
    dummy.let_go();
    let deleted = closing.join().unwrap();
    assert_eq!(deleted.iter().map(|d| d.flushed).collect::<Vec<_>>(), [300, 300]);
    assert!(deleted.iter().all(|d| d.faults.is_empty()));
    assert_eq!(dummy.requests(), requests, "a flush each, and no delete");
    assert!(dummy.ports().is_empty() && b.engine.conn_count() == 0);
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn a_provider_is_released_under_a_call_that_does_not_come_back_in_time_and_that_is_said() {
    for call in [Call::Usage, Call::Describe] {
        let dummy = DummyClass::new("dummy");
        let b = Bench::with_limits(&[&dummy], Limits { port_del: PATIENCE, ..limits() });
        b.port(1);
        dummy.hang(call);
        let asking = std::thread::spawn({
            let engine = b.engine.clone();
            move || match call {
                Call::Usage => drop(engine.sweep(&mut Strays::default())),
                _ => drop(engine.ports()),
            }
        });
        wait_for(|| dummy.held() == 1);
        std::thread::sleep(SOON * 2 / 3);
        let began = Instant::now();
        let deleted = b.engine.port_del(ifindex(1)).unwrap();
        assert!(began.elapsed() >= SOON, "its time runs from here: {:?}", began.elapsed());
        assert_eq!(deleted.faults.len(), 1, "{:?}", deleted.faults);
        assert!(deleted.faults[0].to_string().contains("is released under it"), "{call:?}");
        assert!(dummy.ports().is_empty());
        dummy.let_go();
        asking.join().unwrap();
    }
    // Of operations it is known how many there are.
    let dummy = DummyClass::new("dummy");
    let b = Bench::with_limits(&[&dummy], Limits { port_del: PATIENCE, ..limits() });
    b.port(1);
    b.in_flight(&dummy);
    let faults = b.engine.port_del(ifindex(1)).unwrap().faults;
    assert_eq!(faults.len(), 1, "{faults:?}");
    let words = faults[0].to_string();
    assert!(words.contains("operations without a result: 1; the provider is released"), "{words}");
    assert!(dummy.ports().is_empty());
    dummy.release_pending();
}

#[test]
fn nothing_is_left_in_a_slot_whose_ports_provider_never_came_back() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::with_limits(&[&dummy], limits());
    b.port(1);
    let (carried, refused) = (b.conn(1), b.conn(2));
    b.install(1, &carried, Original);
    assert!(dummy.carry(ifindex(1), dummy.rules(ifindex(1))[0].cookie, 3, 300));
    b.clock.fetch_add(1000, Ordering::SeqCst);
    b.engine.sweep(&mut Strays::default());
    *b.datapath.refuse.lock().unwrap() = Some(Reason::Busy.into());
    let pause = |n| {
        assert_eq!(b.offer(n, &refused, Original), Offer::Queued);
        b.settle_one(n);
        b.engine.slots(&refused)[0].retry_in_ms.unwrap()
    };
    assert!(pause(1) < 200);
    dummy.hang_on(Call::Flush, ifindex(1));
    let deleted = b.engine.port_del(ifindex(1)).unwrap();
    assert!(deleted.faults[0].to_string().contains("abandoned"), "{:?}", deleted.faults);
    b.port(2);
    assert!(pause(2) < 200, "it is the first time there");
    *b.datapath.refuse.lock().unwrap() = None;
    assert_eq!(b.offer(2, &carried, Original), Offer::Queued);
    b.settle_one(2);
    assert_eq!(carried.all_slots().count(), 1, "the slot is used again");
    assert_eq!(b.engine.slots(&carried)[0].packets, 0);
    assert_eq!(carried.traffic().packets, 3, "and what it has carried is not forgotten");
    // What the old one does at its end is nothing to the new one's slots.
    dummy.let_go();
    wait_for(|| dummy.ports() == [ifindex(2)]);
    assert_eq!(b.state(2, &carried, Original), Some(SlotState::Installed));
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn closing_says_what_it_left_and_where() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::with_limits(&[&dummy], limits());
    b.port(1);
    b.port(2);
    b.install(1, &b.conn(1), Original);
    b.install(2, &b.conn(1), Reply);
    dummy.hang_on(Call::Flush, ifindex(1));
    let faults: Vec<_> = b.engine.close().into_iter().flat_map(|d| d.faults).collect();
    assert_eq!(faults.len(), 1, "{faults:?}");
    let words = faults[0].to_string();
    assert!(words.contains("p1") && words.contains("up to 1 rules are left"), "{words}");
    assert!(dummy.rules(ifindex(2)).is_empty());
    dummy.let_go();
    wait_for(|| dummy.ports().is_empty());
}

#[test]
fn a_connection_that_ends_while_all_is_closed_is_counted_once() {
    for _ in 0..50 {
        let b = Bench::new(&[]);
        let conns: Vec<_> = (0..50).map(|n| b.conn(n)).collect();
        std::thread::scope(|s| {
            s.spawn(|| b.engine.close());
            s.spawn(|| conns.iter().for_each(|c| assert!(b.engine.conn_del(c) == 0)));
        });
        assert_eq!(b.engine.conn_count(), 0);
    }
}

#[test]
fn ports_that_come_back_twenty_times_cost_a_connection_nothing() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    let stays = b.port(2);
    let conn = b.conn(1);
    b.install(2, &conn, Original);
    for n in 0..20 {
        let generation = b.port(1);
        b.install(1, &conn, Original);
        // Where it only was seen, and nothing is held any more, it is the same.
        b.install(1, &conn, Reply);
        b.engine.slot_retract(&conn, Reply, generation, TakenBack::Asked);
        b.settle();
        assert!(conn.is_decided(generation, Original) && conn.is_decided(stays, Original));
        assert_eq!(conn.all_slots().count(), 3, "after {n} times");
        b.engine.port_del(ifindex(1)).unwrap();
    }
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn a_reply_is_remembered_whatever_becomes_of_the_rule() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conn = b.in_flight(&dummy);
    b.engine.worker().port(ifindex(1)).unwrap().conn_established(&conn, Original);
    dummy.set_latency(None);
    dummy.fail_next(1, Reason::Busy);
    dummy.release_pending();
    b.settle();
    assert_eq!(b.state(1, &conn, Original), Some(SlotState::Rejected));
    for _ in 0..2 {
        b.engine.flush(&FlushFilter::default()).unwrap();
        b.install(1, &conn, Original);
        assert_eq!(dummy.rules(ifindex(1))[0].established, 1);
        b.engine.conn_retract(&conn, TakenBack::Asked);
        b.settle();
    }
    assert!(conn.has_replied());
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn a_delete_that_fails_is_tried_until_it_is_done_and_shown() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conn = b.conn(1);
    b.install(1, &conn, Original);
    dummy.fail_next(20, Rejection::with_detail(Reason::Busy, "the firmware is asleep"));
    b.engine.conn_retract(&conn, TakenBack::Asked);
    let mut shown = 0;
    wait_for(|| {
        b.clock.fetch_add(60_000, Ordering::SeqCst);
        b.settle();
        let port = port(&b, 1);
        assert_eq!(port.fault, None);
        if let Some(slot) = b.engine.slots(&conn).first() {
            assert_eq!(slot.state, SlotState::Deleting);
            if let Some(why) = &slot.rejection {
                assert!(why.to_string().contains("asleep"));
                assert_eq!(port.undeleted, 1);
                assert!(matches!(b.engine.conn_update(&conn), Usage::LastUsed { .. }));
                shown += 1;
            }
        }
        dummy.rules(ifindex(1)).is_empty()
    });
    assert!(shown > 0);
    b.settle();
    assert_eq!(port(&b, 1).undeleted, 0);
    b.install(1, &conn, Original);
}

#[test]
fn a_datapath_that_panics_is_contained() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    b.install(1, &b.conn(1), Original);
    b.datapath.panics.store(true, Ordering::SeqCst);
    b.offer(1, &b.conn(2), Original);
    b.settle();
    b.datapath.panics.store(false, Ordering::SeqCst);
    assert!(port(&b, 1).fault.unwrap().contains("the datapath panicked"));
    // The thread lives: what is there can be taken away.
    assert_eq!(b.engine.flush(&FlushFilter::default()).unwrap()[0].1, 1);
    assert!(b.engine.port_del(ifindex(1)).unwrap().faults.is_empty());
}

#[test]
fn no_limit_is_too_long() {
    let dummy = DummyClass::new("dummy");
    let limits = Limits { port_del: Duration::MAX, complete: Duration::MAX, ..Limits::default() };
    let b = Bench::with_limits(&[&dummy], limits);
    b.port(1);
    b.install(1, &b.conn(1), Original);
    b.engine.flush(&FlushFilter::default()).unwrap();
    assert!(b.engine.port_del(ifindex(1)).unwrap().faults.is_empty());
}

#[test]
fn nobody_waits_for_a_port_that_does_not_go_on_but_who_deletes_it() {
    let dummy = DummyClass::new("dummy");
    let patient = Limits { port_del: PATIENCE, complete: PATIENCE, ..Limits::default() };
    let b = Bench::with_limits(&[&dummy], patient);
    b.port(1);
    b.port(2);
    b.install(1, &b.conn(1), Original);
    dummy.hang_on(Call::Flush, ifindex(1));
    let deleting = std::thread::spawn({
        let engine = b.engine.clone();
        move || engine.port_del(ifindex(1)).unwrap()
    });
    wait_for(|| dummy.held() == 1);
    let began = Instant::now();
    assert!(matches!(b.engine.port_add(new_port(1)), Err(PortAddError::Busy(_))));
    b.port(3);
    b.engine.port_del(ifindex(2)).unwrap();
    assert_eq!(b.engine.classes(), [("dummy", 1)]);
    assert_eq!(b.engine.ports().len(), 1);
    assert!(b.engine.sweep(&mut Strays::default()).faults.is_empty());
    assert!(began.elapsed() < PATIENCE / 2 && !deleting.is_finished());
    dummy.let_go();
    assert!(deleting.join().unwrap().faults.is_empty());
    b.port(1);
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}
