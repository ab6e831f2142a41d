//! Classes, and how a port is bound to one of them.

use std::sync::Arc;

use netdev_providers::{BindError, Flow, Provider, ProviderClass};

use nix::errno::Errno;

use super::*;
use crate::engine::view::Chosen;

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

#[test]
fn the_first_class_that_accepts_is_bound_and_refusals_are_kept() {
    let (first, second) = (DummyClass::new("first"), DummyClass::new("second"));
    first.decline(Some(ifindex(1)), "not this netdev");
    let b = Bench::new(&[&first, &second]);
    b.port(1);
    b.port(2);
    let ports = b.engine.ports();
    let no_hardware = "in hardware: the NIC does not carry its rules";
    let refused = |n: usize| ports[n].refusals.iter().map(|r| (r.class, r.why.as_str()));
    let in_hardware = [("first", no_hardware), ("second", no_hardware)];
    assert_eq!(ports[0].provider, Some("second"));
    let then = [("first", "not this netdev")];
    assert!(refused(0).eq(in_hardware.into_iter().chain(then)), "{:?}", ports[0].refusals);
    assert_eq!(ports[1].provider, Some("first"));
    assert!(refused(1).eq(in_hardware), "{:?}", ports[1].refusals);
    assert_eq!([0, 1].map(|n| ports[n].chosen), [Some(Chosen::First); 2]);
}

#[test]
fn without_a_list_what_a_nic_carries_goes_before_what_stands_first() {
    let (first, second, third) =
        (DummyClass::new("first"), DummyClass::new("second"), DummyClass::new("third"));
    let b = Bench::new(&[&first, &second, &third]);
    for n in 1..=4 {
        second.carry_in_hardware(ifindex(n));
        third.carry_in_hardware(ifindex(n));
    }
    let listed = |list: &[&str]| Some(list.iter().map(|n| (*n).to_owned()).collect());
    b.port(1);
    b.engine.port_add(NewPort { hw_flags: HwFlags::SkipHw, ..new_port(2) }).unwrap();
    // A list is followed as it stands, and hardware that is asked for is there in the first round.
    b.engine.port_add(NewPort { providers: listed(&["first", "second"]), ..new_port(3) }).unwrap();
    b.engine.port_add(NewPort { hw_flags: HwFlags::SkipSw, ..new_port(4) }).unwrap();
    // Declined and broken in hardware, it is asked once more for all that it has.
    second.decline(Some(ifindex(5)), "not this one");
    third.carry_in_hardware(ifindex(5));
    third.panic_after(Call::BindInHardware, 0);
    b.port(5);
    let ports = b.engine.ports();
    let got: Vec<_> = ports.iter().map(|p| (p.provider, p.chosen)).collect();
    let why = |n: usize| ports[n].refusals.iter().map(|r| r.why.as_str()).collect::<Vec<_>>();
    let no_hardware = "in hardware: the NIC does not carry its rules";
    assert_eq!(
        got,
        [
            (Some("second"), Some(Chosen::InHardware)),
            (Some("first"), Some(Chosen::First)),
            (Some("first"), Some(Chosen::Listed)),
            (Some("second"), Some(Chosen::InHardware)),
            (Some("first"), Some(Chosen::First)),
        ]
    );
    assert_eq!([0, 1, 2, 3].map(|n| why(n).len()), [1, 0, 0, 1]);
    assert_eq!(why(0), [no_hardware]);
    assert_eq!(why(4)[..2], [no_hardware; 2]);
    assert!(why(4)[2].starts_with("in hardware: ") && why(4)[2].contains("panic"), "{:?}", why(4));
    let bound = [&first, &second, &third].map(|class| class.ports().len());
    assert_eq!(bound, [3, 2, 0], "whoever was asked in vain has no port");
}

/// A class that binds every netdev, and has something left of a dead engine on one.
struct Leaving {
    name: &'static str,
    /// What is there, as it was found by those who bound the netdev.
    left: Arc<StdMutex<u64>>,
    log: Arc<StdMutex<Vec<String>>>,
    declines: bool,
}

struct Inert(Arc<StdMutex<Vec<String>>>);

impl Provider for Inert {
    fn can_offload(&self, _: &Flow) -> Result<(), Rejection> {
        Ok(())
    }
    fn submit(&self, _: Vec<netdev_providers::Operation>) {}
    fn usage(&self, _: &mut dyn FnMut(netdev_providers::RuleReport)) -> Result<(), Fault> {
        Ok(())
    }
    fn flush(&self) -> Result<u64, Fault> {
        Ok(0)
    }
    fn release(&self) -> Result<(), Fault> {
        self.0.lock().unwrap().push("release".into());
        Ok(())
    }
}

impl ProviderClass for Leaving {
    fn name(&self) -> &'static str {
        self.name
    }
    fn bind(&self, _: &Netdev, _: Instance) -> Result<Arc<dyn Provider>, BindError> {
        self.log.lock().unwrap().push(format!("{} binds", self.name));
        if self.declines {
            return Err(BindError::Declined("not this one".into()));
        }
        Ok(Arc::new(Inert(Arc::clone(&self.log))))
    }
    fn has_leftovers(&self, _: Ifindex) -> bool {
        *self.left.lock().unwrap() > 0
    }
    fn clear_leftovers(&self, ifindex: Ifindex) -> Result<u64, Fault> {
        let left = std::mem::take(&mut *self.left.lock().unwrap());
        self.log.lock().unwrap().push(format!("{} clears {ifindex}: {left}", self.name));
        Ok(left)
    }
}

#[test]
fn what_a_dead_engine_left_of_another_class_goes_and_the_netdev_is_looked_at_once_more() {
    let log = Arc::new(StdMutex::new(Vec::new()));
    let [of_first, of_second] = [0, 2].map(|left| Arc::new(StdMutex::new(left)));
    let class = |name, left: &Arc<_>, declines| Leaving {
        name,
        left: Arc::clone(left),
        log: Arc::clone(&log),
        declines,
    };
    let b = Bench::new(&[]);
    b.engine.register(Arc::new(class("first", &of_first, false))).unwrap();
    b.engine.register(Arc::new(class("second", &of_second, false))).unwrap();
    b.engine.register(Arc::new(class("never", &Arc::default(), true))).unwrap();
    let logged = || std::mem::take(&mut *log.lock().unwrap());
    b.port(1);
    assert_eq!(
        logged(),
        ["first binds", "release", "second clears 1: 2", "never clears 1: 0", "first binds"]
    );
    // Nothing of others is left: it is bound, with what is its own.
    *of_first.lock().unwrap() = 3;
    b.port(2);
    assert_eq!(logged(), ["first binds", "second clears 2: 0", "never clears 2: 0"]);
    assert_eq!(*of_first.lock().unwrap(), 3);
    // Nobody has the netdev, or nobody is to: nothing is left there.
    let named = |list: &[&str]| Some(list.iter().map(|n| (*n).to_owned()).collect());
    b.engine.port_add(NewPort { providers: named(&["never"]), ..new_port(3) }).unwrap();
    let cleared = ["first clears 3: 3", "second clears 3: 0", "never clears 3: 0"];
    assert_eq!(logged(), [&["never binds"], &cleared[..]].concat());
    b.engine.port_add(NewPort { providers: named(&[NO_PROVIDER]), ..new_port(4) }).unwrap();
    assert_eq!(logged().len(), 3);
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
    b.port(2);
    let worker = b.engine.worker();
    assert_eq!([1, 2].map(|n| worker.port(ifindex(n)).unwrap().is_bound()), [false, true]);
    drop(worker);
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
    assert_eq!(port.refusals[2].why, "adding the clsact qdisc");
}

#[test]
fn a_class_that_fails_because_the_kernel_is_busy_is_asked_again_and_not_for_ever() {
    let (first, second) = (DummyClass::new("first"), DummyClass::new("second"));
    let b = Bench::new(&[&first, &second]);
    let busy = || Fault { errno: Some(Errno::ENOBUFS), ..Fault::new("reading the link") };
    first.fail_next_binds(2, busy());
    b.port(1);
    assert_eq!(b.engine.ports()[0].provider, Some("first"));
    first.fail_bind(Some(busy()));
    b.port(2);
    let port = b.engine.ports().remove(1);
    assert_eq!(port.provider, Some("second"));
    first.fail_next_binds(1, Fault { errno: Some(Errno::EINVAL), ..Fault::new("the qdisc") });
    b.port(3);
    assert_eq!(b.engine.ports()[2].provider, Some("second"), "what would fail again is not");
}

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
    let refused: u64 = b.engine.ports()[0].totals.reasons.iter().map(|(_, n)| n).sum();
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

#[test]
fn a_batch_of_offers_does_what_as_many_offers_do() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let conns: Vec<_> = (1..=32).map(|n| b.conn(n)).collect();
    b.engine.conn_del(&conns[31]);
    let mut worker = b.engine.worker();
    worker.quiescent();
    let port = worker.port(ifindex(1)).unwrap();
    let offer = |c, d| (c, d, PathSpec::Known(Box::new(path(c, d, ifindex(99)))));
    let mut told = Vec::new();
    // One of them twice.
    let offers = conns.iter().chain(&conns[..1]).map(|c| offer(c, Original));
    port.offer_batch(offers, |offer| told.push(offer));
    assert_eq!(told[..31], [Offer::Queued; 31]);
    assert_eq!(told[31..], [Offer::Refused(Reason::ConnState), Offer::Decided]);
    // Whoever offers may panic in the middle: what is queued by then is carried out.
    let more: Vec<_> = (101..=102).map(|n| b.conn(n)).collect();
    let panics = more.iter().enumerate().map(|(n, c)| {
        assert!(n == 0, "on purpose");
        offer(c, Reply)
    });
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        port.offer_batch(panics, |_| ());
    }));
    assert!(result.is_err());
    wait_for(|| dummy.rules(ifindex(1)).len() == 32);
    // The provider has it before the engine has heard of that.
    wait_for(|| b.engine.slots(&more[0])[0].state == SlotState::Installed);
    // The port's thread sleeps by now, and is woken by one that queues all that it offers.
    b.settle();
    std::thread::sleep(Duration::from_millis(100));
    let late = [b.conn(201), b.conn(202)];
    port.offer_batch(late.iter().map(|c| offer(c, Original)), |offer| {
        assert_eq!(offer, Offer::Queued);
    });
    wait_for(|| dummy.rules(ifindex(1)).len() == 34);
    worker.offline();
}
