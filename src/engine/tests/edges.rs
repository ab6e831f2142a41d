//! What comes late, twice, out of order, or to somebody else.

use std::sync::Arc;

use netdev_providers::{BindError, Provider, ProviderClass};

use super::*;
use crate::engine::state::PortSlot;

/// A class that declines every netdev, and remembers which it was asked to clear.
#[derive(Default)]
struct Clearing {
    asked: StdMutex<Vec<Ifindex>>,
    fails: bool,
}

impl ProviderClass for Clearing {
    fn name(&self) -> &'static str {
        if self.fails { "failing" } else { "clearing" }
    }
    fn bind(&self, _: &Netdev, _: Instance) -> Result<Arc<dyn Provider>, BindError> {
        Err(BindError::Declined("none of mine".to_owned()))
    }
    fn clear_leftovers(&self, ifindex: Ifindex) -> Result<u64, Fault> {
        self.asked.lock().unwrap().push(ifindex);
        if self.fails { Err(Fault::new("no such netdev")) } else { Ok(3) }
    }
}

#[test]
fn what_dead_engines_left_on_a_netdev_that_is_no_port_is_cleared_by_every_class() {
    let failing = Arc::new(Clearing { fails: true, ..Clearing::default() });
    let clearing = Arc::new(Clearing::default());
    let b = Bench::new(&[]);
    b.engine.register(Arc::clone(&failing) as Arc<dyn ProviderClass>).unwrap();
    b.engine.register(Arc::clone(&clearing) as Arc<dyn ProviderClass>).unwrap();
    b.engine.clear_leftovers(ifindex(7));
    // Where a netdev becomes a port that nobody takes, too; and then there is nothing more to be cleared.
    b.port(8);
    b.engine.clear_leftovers(ifindex(8));
    for class in [&failing, &clearing] {
        assert_eq!(*class.asked.lock().unwrap(), [ifindex(7), ifindex(8)]);
    }
}

#[test]
fn the_pause_that_ends_first_ends_first_whichever_began_first() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let [early, late] = [1, 2].map(|n| b.conn(n));
    let refused = |conn: &ConnHandle| {
        dummy.fail_next(1, Reason::Busy);
        assert_eq!(b.offer(1, conn, Original), Offer::Queued);
        b.settle();
        b.engine.slots(conn)[0].retry_in_ms.unwrap()
    };
    // The third refusal of one, with a pause of 400 ms at least; then the first one of another.
    for _ in 0..2 {
        b.clock.fetch_add(refused(&early) + 1, Ordering::SeqCst);
        b.settle();
        wait_for(|| b.rearmed() == [(ifindex(1), 1, Original)]);
    }
    assert!(refused(&early) >= 400);
    let soon = refused(&late);
    assert!((100..=125).contains(&soon), "{soon}");
    b.clock.fetch_add(soon - 1, Ordering::SeqCst);
    b.settle();
    assert_eq!(b.rearmed(), [], "not before its time");
    b.clock.fetch_add(1, Ordering::SeqCst);
    b.settle();
    wait_for(|| b.rearmed() == [(ifindex(1), 2, Original)]);
    assert_eq!(b.state(1, &early, Original), Some(SlotState::Rejected));
    b.clock.fetch_add(500, Ordering::SeqCst);
    b.settle();
    wait_for(|| b.rearmed() == [(ifindex(1), 1, Original)]);
}

#[test]
fn a_flush_of_one_port_by_zone_or_tuple_leaves_the_other_ports_alone() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    b.port(2);
    let (one, two) = (b.conn(1), b.conn(2));
    for n in [1, 2] {
        b.install(n, &one, Original);
        b.install(n, &two, Original);
    }
    let reply = Some(one.reply());
    let filter = FlushFilter { port: Some(ifindex(2)), tuple: reply, ..Default::default() };
    let flushed = b.engine.flush(&filter).unwrap();
    let counts: Vec<_> = flushed.iter().map(|(n, count)| (n.ifindex, *count)).collect();
    assert_eq!(counts, [(ifindex(2), 1)], "a tuple is that of either direction");
    assert_eq!(dummy.rules(ifindex(1)).len(), 2);
    assert_eq!(b.state(2, &two, Original), Some(SlotState::Installed));
    let other = FlushFilter { zone: Some(Zone(3)), tuple: reply, ..Default::default() };
    assert!(b.engine.flush(&other).unwrap().is_empty());
    let zone = FlushFilter { zone: Some(Zone(0)), ..Default::default() };
    let counts: Vec<_> = b.engine.flush(&zone).unwrap().iter().map(|(_, n)| *n).collect();
    assert_eq!(counts, [2, 1]);
}

#[test]
fn a_retraction_takes_what_leads_there_and_nothing_else_and_says_how_many() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    b.port(2);
    let conns: Vec<_> = (1..=5).map(|n| b.conn(n)).collect();
    for (n, conn) in conns.iter().enumerate() {
        *b.datapath.egress.lock().unwrap() = Some(ifindex(if n < 3 { 50 } else { 51 }));
        b.install(1, conn, Original);
        b.install(2, conn, Reply);
    }
    assert_eq!(b.engine.retract_egress(ifindex(52)), 0);
    assert_eq!(b.engine.retract_egress(ifindex(50)), 6);
    assert_eq!((dummy.rules(ifindex(1)).len(), dummy.rules(ifindex(2)).len()), (2, 2));
    b.settle();
    assert_eq!(b.rearmed().len(), 6);
    // What is in flight counts too: it goes as soon as it is there.
    dummy.set_latency(Some(Duration::MAX));
    *b.datapath.egress.lock().unwrap() = Some(ifindex(50));
    assert_eq!(b.offer(1, &conns[0], Original), Offer::Queued);
    b.drained(&dummy, 1);
    let retract = std::thread::spawn({
        let engine = b.engine.clone();
        move || engine.retract_egress(ifindex(50))
    });
    let slot = conns[0].slot(b.engine.ports()[0].netdev.generation, Original).unwrap();
    wait_for(|| slot.word.load().is_cancelled());
    dummy.set_latency(None);
    dummy.release_pending();
    assert_eq!(retract.join().unwrap(), 1);
    wait_for(|| dummy.rules(ifindex(1)).len() == 2);
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn a_port_whose_removals_are_through_has_nothing_left_to_do() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let table = b.engine.0.publication.table();
    let port = table.get(ifindex(1)).unwrap();
    // Installed, in flight, and waiting behind it: each goes another way.
    let conns = [1, 2, 3].map(|n| b.conn(n));
    b.install(1, &conns[0], Original);
    let retract: [fn(&Engine) -> u64; 3] = [
        |engine| engine.retract_egress(ifindex(99)),
        |engine| {
            let zone = FlushFilter { zone: Some(Zone(0)), ..Default::default() };
            engine.flush(&zone).unwrap().iter().map(|(_, n)| n).sum()
        },
        |engine| engine.flush(&FlushFilter::default()).unwrap().iter().map(|(_, n)| n).sum(),
    ];
    for retract in retract {
        dummy.set_latency(Some(Duration::MAX));
        assert_eq!(b.offer(1, &conns[1], Original), Offer::Queued);
        b.drained(&dummy, 1);
        dummy.hang(Call::Submit);
        assert_eq!(b.offer(1, &conns[2], Original), Offer::Queued);
        wait_for(|| dummy.held() == 1);
        let retracting = std::thread::spawn({
            let engine = b.engine.clone();
            move || retract(&engine)
        });
        wait_for(|| port.queue.removals() > 0);
        dummy.set_latency(None);
        dummy.let_go();
        while !retracting.is_finished() {
            dummy.release_pending();
            std::thread::yield_now();
        }
        assert_eq!(retracting.join().unwrap(), 3);
        // Then a flush asks nobody, and whoever adds a port has not to tell this one.
        wait_for(|| port.is_empty());
        assert!(dummy.rules(ifindex(1)).is_empty() && !port.may_lead_to(ifindex(99)));
        b.install(1, &conns[0], Original);
    }
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

/// How long the threads of this name have had a processor, in nanoseconds.
fn processor_ns(name: &str) -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten().map(|task| task.path());
    let named = tasks.filter(|task| {
        std::fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name)
    });
    let times = named.map(|task| std::fs::read_to_string(task.join("schedstat")).unwrap());
    times.map(|time| time.split(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

#[test]
fn a_port_that_has_nothing_to_do_sleeps() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.engine.port_add(NewPort { name: "idle".to_owned(), ..new_port(1) }).unwrap();
    b.install(1, &b.conn(1), Original);
    let before = processor_ns("port-idle");
    assert!(before > 0, "it has done something");
    std::thread::sleep(Duration::from_millis(200));
    let spent = processor_ns("port-idle") - before;
    assert!(spent < 10_000_000, "{spent} ns");
}

#[test]
fn an_add_that_was_taken_back_and_fails_then_may_be_offered_again() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conn = b.in_flight(&dummy);
    assert_eq!(b.engine.conn_retract(&conn, TakenBack::Asked), 1);
    dummy.set_latency(None);
    dummy.fail_next(1, Reason::Busy);
    dummy.release_pending();
    b.settle();
    assert_eq!(b.state(1, &conn, Original), None);
    assert_eq!(b.rearmed(), [(ifindex(1), 1, Original)]);
    assert_eq!(b.engine.ports()[0].totals.reasons, [], "nobody waits for what was refused");
    b.install(1, &conn, Original);
}

#[test]
fn only_a_rule_that_stands_can_be_found_to_do_nothing() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conn = b.in_flight(&dummy);
    let table = b.engine.0.publication.table();
    let port = table.get(ifindex(1)).unwrap();
    let slot = PortSlot::find(&b.engine.0, port, &conn, Original).unwrap();
    let refute = || slot.refute(Reason::NoEffect.into(), 60_000);
    assert!(!refute(), "it is being added");
    dummy.release_pending();
    b.settle();
    assert_eq!(b.state(1, &conn, Original), Some(SlotState::Installed));
    // While the provider is told of the reply its delete has to wait, and nothing is said about it.
    b.engine.worker().port(ifindex(1)).unwrap().conn_established(&conn, Original);
    b.drained(&dummy, 1);
    assert!(!refute());
    dummy.set_latency(None);
    dummy.release_pending();
    wait_for(|| b.state(1, &conn, Original).is_none());
    b.install(1, &conn, Original);
    assert!(refute());
    assert!(!refute(), "once");
    b.settle();
    assert_eq!(b.state(1, &conn, Original), Some(SlotState::Rejected));
    assert_eq!(b.engine.ports()[0].totals.reasons, [(Reason::NoEffect, 1)]);
    assert!(dummy.violations().is_empty(), "{:?}", dummy.violations());
}

#[test]
fn a_connection_whose_slots_are_all_taken_is_offered_on_no_further_port() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    let conn = b.conn(1);
    for n in 1..=17 {
        b.port(n);
    }
    for n in 1..=16 {
        b.install(n, &conn, Original);
        let worker = b.engine.worker();
        assert!(worker.port(ifindex(n)).unwrap().is_decided(&conn, Original));
        assert!(!worker.port(ifindex(n)).unwrap().is_decided(&conn, Reply));
    }
    assert_eq!(b.offer(17, &conn, Original), Offer::Refused(Reason::TooManyPorts));
    let ports = b.engine.ports();
    assert_eq!(ports[16].totals.reasons, [(Reason::TooManyPorts, 1)]);
    assert_eq!(ports[16].sights, 0);
    b.install(17, &conn, Reply);
}

#[test]
fn a_reconciliation_that_could_not_read_the_netdev_says_so_and_changes_nothing() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conn = b.conn(1);
    b.install(1, &conn, Original);
    dummy.panic_after(Call::Observe, 0);
    let done = b.engine.reconcile(Some(ifindex(1))).unwrap().remove(0).1;
    assert!(done.fault.unwrap().to_string().contains("panicked"));
    assert_eq!((done.adopted, done.removed, done.foreign), (0, 0, 0));
    assert_eq!(b.state(1, &conn, Original), Some(SlotState::Installed));
}
