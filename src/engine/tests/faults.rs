//! Providers that panic, or do not come back: contained, whatever they were called for.

use super::*;

/// Port 1 is served by the class that misbehaves, port 2 by one that does not.
fn bench(bad: &DummyClass, good: &DummyClass, limits: Limits) -> Bench {
    bad.decline(Some(ifindex(2)), "only port 1");
    let b = Bench::with_limits(&[bad, good], limits);
    b.port(1);
    b.port(2);
    b
}

fn classes() -> (DummyClass, DummyClass) {
    (DummyClass::new("bad"), DummyClass::new("good"))
}

fn impatient() -> Limits {
    // Nothing of the machine's load: who hangs, hangs for good.
    let soon = Duration::from_secs(if HURRY { 1 } else { 3 });
    Limits { port_del: soon, complete: soon, ..Limits::default() }
}

/// The fault of port 1; port 2 has none, and is of use.
fn only_fault(b: &Bench) -> String {
    let ports = b.engine.ports();
    let good = ports.iter().find(|p| p.netdev.ifindex == ifindex(2)).unwrap();
    assert_eq!((&good.fault, &good.slow), (&None, &None));
    let fresh = b.conn(99);
    b.engine.conn_retract(&fresh, TakenBack::Asked);
    settle(b, 2);
    install(b, 2, &fresh, Original);
    ports[0].fault.clone().unwrap_or_default()
}

/// What port 1 is slow with.
fn slow(b: &Bench) -> String {
    b.engine.ports()[0].slow.as_ref().map(ToString::to_string).unwrap_or_default()
}

/// What is queued for the port has been carried out, and what that led to.
fn settle(b: &Bench, n: u32) {
    let table = b.engine.0.publication.table();
    for _ in 0..2 {
        let port = table.get(ifindex(n)).unwrap();
        Asked::of(port, Command::Barrier).wait(PATIENCE).unwrap();
    }
}

/// As [`Bench::install`], without waiting for the other port.
fn install(b: &Bench, n: u32, conn: &ConnHandle, d: Direction) {
    assert_eq!(b.offer(n, conn, d), Offer::Queued);
    settle(b, n);
    assert_eq!(b.state(n, conn, d), Some(SlotState::Installed));
}

#[test]
fn a_class_that_panics_when_it_is_registered_is_not() {
    let (bad, _) = classes();
    bad.panic_after(Call::Init, 0);
    let b = Bench::new(&[]);
    match b.engine.register(Arc::new(bad.clone())) {
        Err(RegistryError::Init { class: "bad", source }) => {
            assert!(source.to_string().contains("panicked"), "{source}");
        }
        other => panic!("{other:?}"),
    }
    assert!(b.engine.classes().is_empty());
    b.engine.register(Arc::new(bad.clone())).unwrap();
    bad.panic_after(Call::Deinit, 0);
    b.engine.unregister("bad").unwrap();
    assert!(b.engine.classes().is_empty());
}

#[test]
fn a_class_that_panics_in_bind_is_passed_over_with_its_words() {
    let (bad, good) = classes();
    bad.panic_after(Call::Bind, 0);
    let b = Bench::new(&[&bad, &good]);
    b.port(1);
    let port = b.engine.ports().remove(0);
    assert_eq!(port.provider, Some("good"));
    assert!(port.refusals[2].why.contains("Bind panics on demand"), "{:?}", port.refusals);
    install(&b, 1, &b.conn(1), Original);
}

#[test]
fn a_provider_that_panics_while_it_is_asked_makes_its_port_faulty() {
    let (bad, good) = classes();
    let b = bench(&bad, &good, Limits::default());
    bad.panic_after(Call::CanOffload, 0);
    let conn = b.conn(1);
    assert_eq!(b.offer(1, &conn, Original), Offer::Queued);
    settle(&b, 1);
    let rejection = b.engine.slots(&conn).remove(0).rejection.unwrap();
    assert_eq!(rejection.reason, Reason::ProviderFault);
    assert!(only_fault(&b).contains("CanOffload panics on demand"));
    // Nothing more is handed to it.
    assert_eq!(b.offer(1, &b.conn(2), Original), Offer::Queued);
    settle(&b, 1);
    assert_eq!(bad.requests(), 0);
    bad.panic_after(Call::Describe, 0);
    assert!(b.engine.ports()[0].about.contains("panicked"));
}

#[test]
fn a_provider_that_panics_in_a_sweep_does_not_keep_the_others_from_it() {
    let (bad, good) = classes();
    let b = bench(&bad, &good, Limits::default());
    let (one, two) = (b.conn(1), b.conn(2));
    install(&b, 1, &one, Original);
    install(&b, 2, &two, Original);
    assert!(good.carry(ifindex(2), good.rules(ifindex(2))[0].cookie, 5, 500));
    bad.panic_after(Call::Usage, 0);
    b.clock.fetch_add(1000, Ordering::SeqCst);
    let sweep = b.engine.sweep(&mut Strays::default());
    assert!(sweep.used.iter().any(|c| c.is_same(&two)));
    assert!(sweep.faults[0].1.to_string().contains("panicked"), "{:?}", sweep.faults);
    assert!(only_fault(&b).contains("Usage panics on demand"));
    assert_eq!(b.state(1, &one, Original), Some(SlotState::Installed), "unknown is not gone");
}

#[test]
fn a_provider_that_hangs_in_a_sweep_does_not_keep_the_others_from_it() {
    let (bad, good) = classes();
    let b = bench(&bad, &good, impatient());
    let two = b.conn(2);
    install(&b, 2, &two, Original);
    let cookie = good.rules(ifindex(2))[0].cookie;
    bad.hang(Call::Usage);
    for packets in 1..4 {
        assert!(good.carry(ifindex(2), cookie, 1, 100));
        b.clock.fetch_add(1000, Ordering::SeqCst);
        let sweep = b.engine.sweep(&mut Strays::default());
        assert!(sweep.used.iter().any(|c| c.is_same(&two)), "sweep {packets}");
        assert_eq!(sweep.faults.len(), 1, "{:?}", sweep.faults);
    }
    assert_eq!(only_fault(&b), "", "it is slow, not broken");
    assert!(slow(&b).contains("a sweep has not come back"));
    assert_eq!(b.offer(1, &b.conn(3), Original), Offer::Refused(Reason::ProviderSlow));
    bad.let_go();
    wait_for(|| b.engine.sweep(&mut Strays::default()).faults.is_empty());
    install(&b, 1, &b.conn(3), Original);
}

#[test]
fn a_provider_that_hangs_in_submit_is_given_up_and_the_others_go_on() {
    let (bad, good) = classes();
    let b = bench(&bad, &good, impatient());
    bad.hang(Call::Submit);
    let conn = b.conn(1);
    assert_eq!(b.offer(1, &conn, Original), Offer::Queued);
    // A flush would take it back while it waits.
    wait_for(|| bad.held() == 1);
    install(&b, 2, &conn, Reply);
    let started = Instant::now();
    let flushed = b.engine.flush(&FlushFilter::default()).unwrap();
    assert!(flushed.iter().any(|(n, count)| (n.ifindex, *count) == (ifindex(2), 1)), "{flushed:?}");
    assert_eq!(only_fault(&b), "", "it is slow, not broken");
    assert!(slow(&b).contains("has not come back from a call"));
    let deleted = b.engine.port_del(ifindex(1)).unwrap();
    assert!(deleted.faults[0].to_string().contains("abandoned"), "{:?}", deleted.faults);
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    assert!(b.engine.slots(&conn).iter().all(|s| s.netdev.ifindex == ifindex(2)));
    // Its successor would lose its rules to it; and its class is needed.
    assert!(matches!(b.engine.port_add(new_port(1)), Err(PortAddError::Busy(_))));
    assert!(matches!(b.engine.unregister("bad"), Err(RegistryError::InUse { .. })));
    // When it comes back after all it is put in order, and released.
    bad.let_go();
    wait_for(|| bad.ports().is_empty());
    wait_for(|| b.engine.port_add(new_port(1)).is_ok());
    install(&b, 1, &conn, Original);
    assert_eq!(bad.rules(ifindex(1)).len(), 1);
    b.engine.port_del(ifindex(1)).unwrap();
    assert!(bad.rules(ifindex(1)).is_empty());
    assert!(bad.violations().is_empty(), "{:?}", bad.violations());
}

#[test]
fn a_flush_that_panics_is_made_rule_by_rule() {
    let (bad, good) = classes();
    let b = bench(&bad, &good, Limits::default());
    let conn = b.conn(1);
    install(&b, 1, &conn, Original);
    bad.panic_after(Call::Flush, 0);
    assert_eq!(b.engine.flush(&FlushFilter::default()).unwrap()[0].1, 1);
    assert!(bad.rules(ifindex(1)).is_empty());
    assert!(only_fault(&b).contains("Flush panics on demand"));
}

#[test]
fn a_provider_that_panics_when_it_is_released_is_reported_and_gone() {
    let (bad, good) = classes();
    let b = bench(&bad, &good, Limits::default());
    bad.panic_after(Call::Release, 0);
    let deleted = b.engine.port_del(ifindex(1)).unwrap();
    assert!(deleted.faults[0].to_string().contains("panicked"), "{:?}", deleted.faults);
    assert_eq!(b.engine.ports().len(), 1);
}

#[test]
fn a_provider_is_released_behind_a_sweep_that_asks_it() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    dummy.hang(Call::Usage);
    let sweep = std::thread::spawn({
        let engine = b.engine.clone();
        move || engine.sweep(&mut Strays::default()).faults.len()
    });
    let port = Arc::clone(b.engine.0.publication.table().get(ifindex(1)).unwrap());
    wait_for(|| port.swept.load(Ordering::SeqCst));
    let deleting = std::thread::spawn({
        let engine = b.engine.clone();
        move || engine.port_del(ifindex(1)).unwrap()
    });
    wait_for(|| b.engine.ports().is_empty());
    std::thread::sleep(Duration::from_millis(20));
    dummy.let_go();
    let deleted = deleting.join().unwrap();
    assert!(deleted.faults.is_empty(), "{:?}", deleted.faults);
    assert_eq!(sweep.join().unwrap(), 0);
    // Among them would be a call behind the release.
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
    assert!(b.engine.sweep(&mut Strays::default()).faults.is_empty());
}

#[test]
fn a_port_that_is_being_deleted_is_not_swept_any_more() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    // As a sweep finds it that has read the list of ports before.
    let port = Arc::clone(b.engine.0.publication.table().get(ifindex(1)).unwrap());
    port.draining.store(true, Ordering::SeqCst);
    dummy.panic_after(Call::Usage, 0);
    assert!(b.engine.sweep(&mut Strays::default()).faults.is_empty());
    assert!(!port.swept.load(Ordering::SeqCst));
    port.draining.store(false, Ordering::SeqCst);
    assert_eq!(b.engine.sweep(&mut Strays::default()).faults.len(), 1);
}

#[test]
fn a_port_whose_thread_panics_takes_no_offers_and_its_rules_can_be_taken_back() {
    let (bad, good) = classes();
    let b = bench(&bad, &good, Limits { port_del: PATIENCE, ..Limits::default() });
    let (held, again) = (b.conn(1), b.conn(2));
    install(&b, 1, &held, Original);
    install(&b, 1, &again, Original);
    for _ in 0..2 {
        b.engine.0.publication.table().get(ifindex(1)).unwrap().queue.push(Command::Panic);
        settle(&b, 1);
    }
    assert_eq!(only_fault(&b), "its thread panicked: on purpose");
    assert_eq!(*b.datapath.port_panics.lock().unwrap(), ["p1: on purpose"; 2]);
    assert_eq!(slow(&b), "", "it goes on");
    let fresh = b.conn(3);
    b.offer(1, &fresh, Original);
    settle(&b, 1);
    assert_ne!(b.state(1, &fresh, Original), Some(SlotState::Installed));
    // One alone, all, and for good.
    assert_eq!(b.engine.conn_del(&held), 1);
    settle(&b, 1);
    assert_eq!(bad.rules(ifindex(1)).len(), 1);
    let deleted = b.engine.port_del(ifindex(1)).unwrap();
    assert_eq!((deleted.flushed, deleted.faults.len()), (1, 0), "{deleted:?}");
    assert!(bad.rules(ifindex(1)).is_empty());
}
