//! What the backend does by itself; what it does to an engine is in the engine's tests.

use std::num::NonZeroU32;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::*;
use crate::contract::class::{BindError, ProviderClass};
use crate::contract::flow::{Above, Flow, FlowMatch, Forward};
use crate::contract::operation::{Done, Operation, Outcome, Request, Ticket};
use crate::contract::provider::{Counters, Fault, Provider};
use crate::contract::reason::Reason;
use crate::contract::types::{
    Cookie, Direction, Epoch, Generation, Ifindex, Instance, Netdev, RuleId, Zone,
};

const INSTANCE: Instance = Instance(NonZeroU32::MIN);

fn netdev(ifindex: u32) -> Netdev {
    Netdev {
        ifindex: Ifindex::new(ifindex).unwrap(),
        generation: Generation::new(1).unwrap(),
        name: format!("eth{ifindex}"),
        hw_flags: Default::default(),
    }
}

fn cookie(n: u64) -> Cookie {
    Cookie { instance: INSTANCE, epoch: Epoch(n), direction: Direction::Original }
}

fn flow(n: u64) -> Flow {
    let tuple = format!("tcp 192.0.2.1:{n} > 198.51.100.2:80").parse().unwrap();
    Flow {
        zone: Zone(0),
        direction: Direction::Original,
        ingress_mtu: 1500,
        matches: FlowMatch { eth_dst: None, vlan: None, tuple },
        forward: Forward {
            egress: Ifindex::new(9).unwrap(),
            vlan: None,
            mtu: 1500,
            tuple,
            macs: None,
            egress_decides: false,
        },
        above: Above::default(),
    }
}

fn add(n: u64) -> Request {
    Request::Add { cookie: cookie(n), flow: Box::new(flow(n)) }
}

type Results = mpsc::Receiver<(usize, Outcome)>;

fn submit(provider: &dyn Provider, requests: Vec<Request>) -> Results {
    let (tx, rx) = mpsc::channel();
    let batch = requests.into_iter().enumerate().map(|(i, request)| {
        let tx = tx.clone();
        let ticket = Ticket::new(Box::new(move |o: Outcome| drop(tx.send((i, o)))));
        Operation { request, ticket }
    });
    provider.submit(batch.collect());
    rx
}

fn bound(ifindex: u32) -> (DummyClass, Arc<dyn Provider>) {
    let class = DummyClass::default();
    class.init().unwrap();
    let provider = class.bind(&netdev(ifindex), INSTANCE).unwrap();
    (class, provider)
}

fn ifindex(n: u32) -> Ifindex {
    Ifindex::new(n).unwrap()
}

/// What hangs for good fails the test, and does not keep it: sooner as `scripts/mutants` builds.
fn wait_for(done: impl Fn() -> bool) {
    let patience = if option_env!("CTOFFLOAD_TEST_HURRY").is_some() { 5 } else { 20 };
    let deadline = Instant::now() + Duration::from_secs(patience);
    while !done() {
        assert!(Instant::now() < deadline, "it did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn joined<T>(thread: JoinHandle<T>) -> T {
    wait_for(|| thread.is_finished());
    thread.join().unwrap()
}

/// The outcome of one operation that completes at once.
fn one(provider: &dyn Provider, request: Request) -> Outcome {
    submit(provider, vec![request]).try_recv().expect("it is done").1
}

fn refused(provider: &dyn Provider, request: Request) -> Option<Reason> {
    one(provider, request).err().map(|why| why.reason)
}

fn packets(provider: &dyn Provider) -> Vec<(u64, u64)> {
    let mut packets = Vec::new();
    provider.usage(&mut |r| packets.push((r.counters.packets, r.counters.bytes))).unwrap();
    packets
}

/// What is noted by what is done, which is one thing.
fn noted(class: &DummyClass, what: impl FnOnce()) -> String {
    let before = class.violations().len();
    what();
    let new = class.violations().split_off(before);
    assert_eq!(new.len(), 1, "{new:?}");
    new.join("")
}

#[test]
fn rules_come_are_counted_and_go() {
    let (class, p) = bound(3);
    let ifindex = Ifindex::new(3).unwrap();
    let got: Vec<_> = submit(&*p, vec![add(1), add(2), add(2)]).try_iter().collect();
    assert_eq!(got[0], (0, Ok(Done::added(RuleId(1), Some(true)))));
    assert_eq!(got[2].1.as_ref().unwrap_err().reason, Reason::Conflict);
    assert_eq!(class.rules(ifindex).len(), 2);
    assert!(class.carry(ifindex, cookie(2), 3, 300));
    assert!(!class.carry(ifindex, cookie(7), 3, 300));
    let mut reports = Vec::new();
    p.usage(&mut |r| reports.push((r.cookie, r.counters.packets))).unwrap();
    assert_eq!(reports, [(cookie(1), 0), (cookie(2), 3)]);
    let delete = Request::Delete { rule: RuleId(1), cookie: cookie(1) };
    assert_eq!(submit(&*p, vec![delete.clone()]).try_recv().unwrap().1, Ok(Done::Deleted));
    assert_eq!(submit(&*p, vec![delete]).try_recv().unwrap().1, Ok(Done::Deleted), "ENOENT");
    assert_eq!(p.flush().unwrap(), 1);
    p.release().unwrap();
    class.deinit();
    // The second add(2) stood in one batch with the first: that is what the promise forbids.
    assert_eq!(class.violations().len(), 1, "{:?}", class.violations());
}

#[test]
fn pending_operations_complete_by_the_clock_or_out_of_order() {
    let (class, p) = bound(3);
    class.set_latency(Some(Duration::from_millis(5)));
    let results = submit(&*p, vec![add(1), add(2), add(3)]);
    assert_eq!(class.pending().len(), 3);
    assert_eq!(class.advance(Duration::from_millis(4)), 0);
    assert!(class.release_nth(1));
    assert_eq!(results.try_recv().unwrap().0, 1);
    assert!(class.lose_nth(1));
    assert_eq!(results.try_recv().unwrap().1.unwrap_err().reason, Reason::ProviderFault);
    assert_eq!(class.advance(Duration::from_millis(1)), 1);
    assert_eq!(results.try_recv().unwrap().0, 0);
    assert_eq!(class.rules(Ifindex::new(3).unwrap()).len(), 2);
}

#[test]
fn a_slow_netdev_takes_its_time_for_each_operation_and_others_do_not_wait_for_it() {
    let (class, p) = bound(3);
    let fast = class.bind(&netdev(4), INSTANCE).unwrap();
    let slow = Ifindex::new(3).unwrap();
    class.set_service_time(slow, Some(Duration::from_millis(4)));
    let results = submit(&*p, vec![add(1), add(2), add(3)]);
    assert_eq!(submit(&*fast, vec![add(1)]).try_iter().count(), 1);
    assert_eq!(results.try_iter().count(), 0);
    assert_eq!(class.advance(Duration::from_millis(9)), 2);
    assert_eq!(results.try_iter().count(), 2);
    class.set_service_time(slow, None);
    assert_eq!(results.try_iter().count(), 1, "what waited for its turn is done");
}

#[test]
fn the_name_of_a_rule_that_is_gone_is_the_next_ones() {
    let (class, p) = bound(3);
    let rule_of = |n| match submit(&*p, vec![add(n)]).try_recv().unwrap().1.unwrap() {
        Done::Added { rule, .. } => rule,
        other => panic!("{other:?}"),
    };
    let (first, second) = (rule_of(1), rule_of(2));
    for (rule, n) in [(first, 1), (second, 2)] {
        let cookie = add(n).cookie();
        submit(&*p, vec![Request::Delete { rule, cookie }]);
    }
    assert_eq!((rule_of(3), rule_of(4)), (second, first), "last in, first out");
    assert!(class.violations().is_empty(), "{:?}", class.violations());
}

#[test]
fn a_late_call_comes_back_with_what_was_true_when_it_began() {
    let (class, p) = bound(3);
    submit(&*p, vec![add(1)]);
    class.be_late(Call::Usage, Ifindex::new(3));
    let sweep = std::thread::spawn({
        let p = Arc::clone(&p);
        move || {
            let mut reports = Vec::new();
            p.usage(&mut |r| reports.push(r)).unwrap();
            reports.len()
        }
    });
    wait_for(|| class.held() == 1);
    submit(&*p, vec![add(2)]);
    class.let_go();
    assert_eq!(joined(sweep), 1);
}

#[test]
fn it_fails_declines_and_panics_on_demand() {
    let (class, p) = bound(3);
    class.fail_after(1, Reason::Busy);
    class.set_capacity(1);
    let reasons: Vec<_> = submit(&*p, vec![add(1), add(2), add(3)])
        .try_iter()
        .map(|(_, o)| o.err().map(|e| e.reason))
        .collect();
    assert_eq!(reasons, [None, Some(Reason::Busy), Some(Reason::TableFull)]);
    class.panic_after(Call::Usage, 1);
    p.usage(&mut |_| ()).unwrap();
    let usage = std::panic::AssertUnwindSafe(|| p.usage(&mut |_| ()));
    assert!(std::panic::catch_unwind(usage).is_err());
    class.decline(Ifindex::new(4), "not today");
    assert!(matches!(class.bind(&netdev(4), INSTANCE), Err(BindError::Declined(_))));
    class.fail_init(Some(Fault::new("no device")));
    assert!(class.init().is_err());
    class.unplug(Ifindex::new(3).unwrap());
    let outcome = submit(&*p, vec![add(9)]).try_recv().unwrap().1;
    assert_eq!(outcome.unwrap_err().reason, Reason::NetdevGone);
}

#[test]
fn broken_promises_are_noted() {
    let (class, p) = bound(3);
    class.set_latency(Some(Duration::MAX));
    let _results = submit(&*p, vec![add(1)]);
    let _ = p.flush();
    assert_eq!(class.violations().len(), 1);
    p.release().unwrap();
    let _ = p.flush();
    assert_eq!(class.violations().len(), 2);
}

#[test]
fn two_classes_know_nothing_of_each_other() {
    let (a, p) = bound(3);
    let b = DummyClass::new("other");
    submit(&*p, vec![add(1)]);
    assert_eq!((a.requests(), b.requests()), (1, 0));
    assert!(b.ports().is_empty());
}

#[test]
fn a_class_is_initialised_before_netdevs_are_bound_and_until_none_is() {
    let class = DummyClass::default();
    assert_eq!((class.name(), class.is_initialised()), ("dummy", false));
    assert!(format!("{class:?}").contains("dummy"), "{class:?}");
    let early = noted(&class, || drop(class.bind(&netdev(3), INSTANCE).unwrap()));
    assert!(early.contains("before init"), "{early}");
    class.init().unwrap();
    assert!(class.is_initialised());
    assert!(noted(&class, || class.init().unwrap()).contains("init twice"));
    assert!(noted(&class, || drop(class.bind(&netdev(3), INSTANCE))).contains("bound already"));
    assert_eq!(class.ports(), [ifindex(3)]);
    assert!(noted(&class, || class.deinit()).contains("while a port is bound"));
    assert!(!class.is_initialised());
    class.state().ports.clear();
    assert!(noted(&class, || class.deinit()).contains("without init"));
}

#[test]
fn a_class_declines_and_fails_until_it_is_told_otherwise() {
    let class = DummyClass::default();
    class.fail_init(Some(Fault::new("no device")));
    assert_eq!(class.init(), Err(Fault::new("no device")));
    assert!(!class.is_initialised());
    class.fail_init(None);
    class.init().unwrap();
    class.decline(None, "not today");
    class.decline(Some(ifindex(3)), "not this one");
    let why = |n| match class.bind(&netdev(n), INSTANCE) {
        Ok(_) => "bound".to_owned(),
        Err(BindError::Declined(why)) => why,
        Err(BindError::Failed(fault)) => fault.to_string(),
    };
    assert_eq!([3, 4].map(why), ["not this one", "not today"]);
    class.accept();
    class.fail_bind(Some(Fault::new("no memory")));
    assert_eq!(why(3), "no memory");
    assert!(class.ports().is_empty());
    class.fail_bind(None);
    assert_eq!(why(3), "bound");
    assert!(class.violations().is_empty(), "{:?}", class.violations());
}

#[test]
fn calls_behind_the_release_are_noted_and_find_nothing() {
    let (class, p) = bound(3);
    one(&*p, add(1)).unwrap();
    p.release().unwrap();
    assert!(class.ports().is_empty() && class.rules(ifindex(3)).is_empty());
    assert!(noted(&class, || assert_eq!(p.flush(), Ok(0))).contains("Flush on"));
    assert!(noted(&class, || p.release().unwrap()).contains("Release on"));
    assert!(noted(&class, || assert!(packets(&*p).is_empty())).contains("Usage on"));
    assert!(
        noted(&class, || assert!(p.observe().unwrap().leftovers.is_empty())).contains("Observe")
    );
    let gone = noted(&class, || assert_eq!(refused(&*p, add(2)), Some(Reason::NetdevGone)));
    assert!(gone.contains("submit on") && gone.contains("after release"), "{gone}");
    // Its successor on the netdev is somebody else.
    let later = Netdev { generation: Generation::new(2).unwrap(), ..netdev(3) };
    let successor = class.bind(&later, INSTANCE).unwrap();
    one(&*successor, add(1)).unwrap();
    assert!(noted(&class, || assert_eq!(p.flush(), Ok(0))).contains("after release"));
    assert_eq!(class.rules(ifindex(3)).len(), 1);
}

#[test]
fn operations_that_break_a_promise_are_noted() {
    let (class, p) = bound(3);
    let Ok(Done::Added { rule, .. }) = one(&*p, add(1)) else { panic!("not added") };
    let established = |rule, n| Request::Established { rule, cookie: cookie(n) };
    assert_eq!(one(&*p, established(rule, 1)), Ok(Done::Noted));
    assert_eq!(class.rules(ifindex(3))[0].established, 1);
    assert!(class.violations().is_empty(), "{:?}", class.violations());
    let twice = noted(&class, || drop(one(&*p, established(rule, 1))));
    assert!(twice.contains("established twice"), "{twice}");
    let nothing = noted(&class, || drop(one(&*p, established(RuleId(77), 7))));
    assert!(nothing.contains("not installed"), "{nothing}");
    // The name of a rule with the cookie of another: it stays.
    let delete = Request::Delete { rule, cookie: cookie(2) };
    assert!(noted(&class, || drop(one(&*p, delete))).contains("is another's"));
    assert_eq!(class.rules(ifindex(3)).len(), 1);
    let again = noted(&class, || assert_eq!(refused(&*p, add(1)), Some(Reason::Conflict)));
    assert!(again.contains("although it is there"), "{again}");
    let foreign = Cookie { instance: Instance(NonZeroU32::MAX), ..cookie(9) };
    let strange = Request::Add { cookie: foreign, flow: Box::new(flow(9)) };
    assert!(noted(&class, || drop(one(&*p, strange))).contains("another instance"));
    class.set_latency(Some(Duration::MAX));
    let _first = submit(&*p, vec![add(5)]);
    let both = noted(&class, || drop(submit(&*p, vec![add(5)])));
    assert!(both.contains("two operations on"), "{both}");
    assert_eq!(class.requests(), 9);
}

#[test]
fn what_is_lost_or_done_is_in_flight_no_more() {
    let (class, p) = bound(3);
    class.set_latency(Some(Duration::MAX));
    let lost = submit(&*p, vec![add(1)]);
    assert!(class.lose_nth(0) && !class.lose_nth(0));
    assert_eq!(lost.try_recv().unwrap().1.unwrap_err().reason, Reason::ProviderFault);
    let done = submit(&*p, vec![add(1)]);
    assert!(!class.release_nth(1), "there is one only");
    assert!(class.release_nth(0));
    assert!(done.try_recv().unwrap().1.is_ok());
    let rule = class.rules(ifindex(3))[0].rule;
    let gone = submit(&*p, vec![Request::Delete { rule, cookie: cookie(1) }]);
    assert_eq!((class.release_pending(), class.release_pending()), (1, 0));
    assert_eq!(gone.try_recv().unwrap().1, Ok(Done::Deleted));
    assert!(class.pending().is_empty());
    assert!(class.violations().is_empty(), "{:?}", class.violations());
}

#[test]
fn failures_come_in_the_order_in_which_they_were_asked_for_and_have_no_effect() {
    let (class, p) = bound(3);
    class.fail_next(2, Reason::Busy);
    class.fail_after(2, Reason::Conflict);
    let reasons: Vec<_> = (1..=6).map(|n| refused(&*p, add(n))).collect();
    let busy = Some(Reason::Busy);
    assert_eq!(reasons, [busy, busy, None, None, Some(Reason::Conflict), None]);
    assert_eq!(class.rules(ifindex(3)).len(), 3);
    class.panic_after(Call::Describe, 1);
    class.panic_after(Call::Observe, 0);
    let panics =
        |call: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).is_err();
    let describe = || panics(&|| assert_eq!(p.describe(), "in memory"));
    assert!(panics(&|| drop(p.observe())) && !panics(&|| drop(p.observe())));
    assert_eq!([describe(), describe(), describe()], [false, true, false]);
}

#[test]
fn a_flush_or_a_sweep_that_fails_says_so() {
    let (class, p) = bound(3);
    (1..=5).for_each(|n| drop(one(&*p, add(n)).unwrap()));
    class.fail_flush(Some(Fault::new("busy")));
    assert_eq!(p.flush(), Err(Fault::new("busy")));
    class.fail_usage(Some(Fault::new("interrupted")));
    let mut half = Vec::new();
    assert_eq!(p.usage(&mut |r| half.push(r.rule.0)), Err(Fault::new("interrupted")));
    assert_eq!(half, [1, 2], "half of them");
    class.fail_usage(None);
    assert_eq!(packets(&*p).len(), 5);
    class.fail_flush(None);
    assert_eq!((p.flush(), packets(&*p).len()), (Ok(5), 0));
    // What was removed at once can be added again, by the names that have become free.
    let names: std::collections::BTreeSet<_> = (1..=5)
        .map(|n| match one(&*p, add(n)) {
            Ok(Done::Added { rule, .. }) => rule.0,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(Vec::from_iter(names), [1, 2, 3, 4, 5]);
    assert!(class.violations().is_empty(), "{:?}", class.violations());
}

#[test]
fn the_hardware_and_the_driver_say_what_the_test_sets() {
    let (class, p) = bound(3);
    let added = |n| match one(&*p, add(n)) {
        Ok(Done::Added { in_hw, nic_said, .. }) => (in_hw, nic_said),
        other => panic!("{other:?}"),
    };
    assert_eq!(added(1), (Some(true), None));
    class.set_in_hw(None);
    class.set_nic_said(Some("no room"));
    assert_eq!(added(2), (None, Some("no room".into())));
    class.set_in_hw(Some(false));
    class.set_nic_said(None);
    assert_eq!(added(3), (Some(false), None));
    let mut in_hw = Vec::new();
    p.usage(&mut |r| in_hw.push(r.in_hw)).unwrap();
    assert_eq!(in_hw, [Some(false); 3], "as it is when it is read back");
    assert_eq!(class.suspected(), 0);
    p.hardware_suspect();
    p.hardware_suspect();
    assert_eq!(class.suspected(), 2);
    assert_eq!(p.can_offload(&flow(4)), Ok(()));
    class.refuse_shapes(Some(Reason::Unsupported.into()));
    assert_eq!(p.can_offload(&flow(4)).unwrap_err().reason, Reason::Unsupported);
}

#[test]
fn rules_carry_what_they_are_told_and_may_be_reset_or_stolen() {
    let (class, p) = bound(3);
    let _other = class.bind(&netdev(4), INSTANCE).unwrap();
    (1..=2).for_each(|n| drop(one(&*p, add(n)).unwrap()));
    assert!(
        class.carry(ifindex(3), cookie(1), 3, 300) && class.carry(ifindex(3), cookie(1), 4, 50)
    );
    assert!(!class.carry(ifindex(4), cookie(1), 1, 1) && !class.carry(ifindex(5), cookie(1), 1, 1));
    assert_eq!(packets(&*p), [(7, 350), (0, 0)]);
    class.reset_counters(ifindex(4));
    assert_eq!(packets(&*p)[0], (7, 350));
    class.reset_counters(ifindex(3));
    assert_eq!(packets(&*p), [(0, 0), (0, 0)]);
    assert!(!class.steal(ifindex(4), cookie(1)) && !class.steal(ifindex(5), cookie(1)));
    assert!(class.steal(ifindex(3), cookie(1)) && !class.steal(ifindex(3), cookie(1)));
    assert_eq!(class.rules(ifindex(3)).len(), 1);
    assert!(!class.carry(ifindex(3), cookie(1), 1, 1));
    one(&*p, add(1)).unwrap();
    assert!(class.violations().is_empty(), "{:?}", class.violations());
}

#[test]
fn a_netdev_that_is_unplugged_has_no_rules_and_takes_none() {
    let (class, p) = bound(3);
    let other = class.bind(&netdev(4), INSTANCE).unwrap();
    for p in [&p, &other] {
        one(&**p, add(1)).unwrap();
    }
    class.unplug(ifindex(3));
    assert_eq!((class.rules(ifindex(3)).len(), class.rules(ifindex(4)).len()), (0, 1));
    assert_eq!(refused(&*p, add(2)), Some(Reason::NetdevGone));
    let delete = Request::Delete { rule: RuleId(1), cookie: cookie(1) };
    assert_eq!(one(&*p, delete), Ok(Done::Deleted), "ENODEV");
    assert!(one(&*other, add(2)).is_ok());
}

#[test]
fn what_an_engine_that_died_has_left_is_found_adopted_or_removed() {
    let class = DummyClass::default();
    class.init().unwrap();
    let dead = |n| Cookie { instance: Instance(NonZeroU32::MAX), ..cookie(n) };
    let carried = Counters { packets: 8, bytes: 800 };
    for n in 1..=3 {
        class.leave(ifindex(3), dead(n), flow(n), carried);
    }
    class.set_foreign(4);
    class.set_capacity(4);
    let p = class.bind(&netdev(3), INSTANCE).unwrap();
    let seen = p.observe().unwrap();
    assert_eq!(seen.foreign, 4);
    let found: Vec<_> = seen.leftovers.iter().map(|l| (l.rule.0, l.cookie, l.counters)).collect();
    assert_eq!(found, [1, 2, 3].map(|n| (n, dead(n), carried)));
    assert_eq!(seen.leftovers[0].tuple, Some(flow(1).matches.tuple));
    assert!(packets(&*p).is_empty() && class.rules(ifindex(3)).is_empty());
    // They are in the way, and take places.
    assert_eq!(refused(&*p, add(2)), Some(Reason::Conflict));
    let Ok(Done::Added { rule, .. }) = one(&*p, add(4)) else { panic!("there is a place") };
    assert_eq!(rule, RuleId(4));
    assert_eq!(refused(&*p, add(5)), Some(Reason::TableFull));
    // One that does the same is the new engine's, with what it has counted.
    let adopt = |found, n| Request::Adopt { found, cookie: cookie(n), flow: Box::new(flow(n)) };
    assert_eq!(one(&*p, adopt(RuleId(1), 1)), Ok(Done::added(RuleId(1), Some(true))));
    assert_eq!(class.rules(ifindex(3))[0].cookie, cookie(1), "the mark is the new one's too");
    assert_eq!(packets(&*p), [(8, 800), (0, 0)]);
    assert!(class.carry(ifindex(3), cookie(1), 1, 100));
    assert_eq!(refused(&*p, add(1)), Some(Reason::Conflict));
    let again = class.violations();
    assert!(again.len() == 1 && again[0].contains("although it is there"), "{again:?}");
    // One that does something else is gone, as is one that is to go.
    assert_eq!(refused(&*p, adopt(RuleId(2), 3)), Some(Reason::Conflict));
    assert_eq!(one(&*p, Request::Delete { rule: RuleId(3), cookie: dead(3) }), Ok(Done::Deleted));
    assert!(p.observe().unwrap().leftovers.is_empty());
    assert_eq!(refused(&*p, adopt(RuleId(3), 3)), Some(Reason::Conflict), "there is none");
    assert_eq!(class.violations().len(), 1, "{:?}", class.violations());
    for n in [2, 3] {
        one(&*p, add(n)).unwrap();
    }
    assert_eq!(p.flush(), Ok(4));
    // One that comes to light later has a name that no other has had.
    class.leave(ifindex(3), dead(9), flow(9), carried);
    let late = p.observe().unwrap().leftovers;
    assert_eq!(late.iter().map(|l| (l.rule.0, l.cookie)).collect::<Vec<_>>(), [(6, dead(9))]);
    class.leave(ifindex(3), dead(8), flow(8), carried);
    let names: Vec<_> = p.observe().unwrap().leftovers.iter().map(|l| l.rule.0).collect();
    assert_eq!(names, [6, 7]);
    // The next bind finds nothing of it.
    p.release().unwrap();
    assert!(class.bind(&netdev(3), INSTANCE).unwrap().observe().unwrap().leftovers.is_empty());
}

#[test]
fn an_operation_is_due_when_those_before_it_are_through_and_its_latency_is_over() {
    let (class, p) = bound(3);
    let ms = Duration::from_millis;
    class.advance(ms(100));
    assert_eq!(class.now(), ms(100));
    class.set_latency(Some(ms(5)));
    let _plain = submit(&*p, vec![add(1), add(2)]);
    class.set_service_time(ifindex(3), Some(ms(10)));
    let _queued = submit(&*p, vec![add(3), add(4)]);
    let due = || class.pending().iter().map(|w| w.due.as_millis()).collect::<Vec<_>>();
    assert_eq!(due(), [105, 105, 115, 125]);
    assert!(class.pending().iter().all(|w| w.ifindex == ifindex(3)));
    assert_eq!(class.advance(ms(5)), 2);
    assert_eq!(class.advance(ms(25)), 2);
    // It has been idle since: its time begins anew.
    let _later = submit(&*p, vec![add(5)]);
    assert_eq!(due(), [145]);
    assert_eq!((class.advance(ms(14)), class.advance(ms(1))), (0, 1));
    // What waits when it takes no time any more is done at once, on that netdev.
    let other = class.bind(&netdev(4), INSTANCE).unwrap();
    let (_mine, _others) = (submit(&*p, vec![add(6)]), submit(&*other, vec![add(6)]));
    class.set_service_time(ifindex(4), None);
    assert_eq!(class.pending().len(), 2, "it took none before either");
    class.set_service_time(ifindex(3), None);
    let waiting: Vec<_> = class.pending().iter().map(|w| w.ifindex).collect();
    assert_eq!(waiting, [ifindex(4)]);
    class.set_service_time(ifindex(3), Some(ms(10)));
    let _fresh = submit(&*p, vec![add(7)]);
    assert_eq!(due(), [150, 160]);
}

#[test]
fn calls_that_hang_or_are_late_are_those_of_the_netdev_that_was_named() {
    let (class, p) = bound(3);
    let other = class.bind(&netdev(4), INSTANCE).unwrap();
    class.hang_on(Call::Flush, ifindex(3));
    class.be_late(Call::Submit, Some(ifindex(3)));
    assert_eq!(other.flush(), Ok(0));
    one(&*other, add(1)).unwrap();
    assert_eq!(class.held(), 0);
    let held = |call: fn(&dyn Provider)| {
        let p = Arc::clone(&p);
        let before = class.held();
        let thread = std::thread::spawn(move || call(&*p));
        wait_for(|| class.held() > before);
        thread
    };
    let flush = held(|p| assert_eq!(p.flush(), Ok(1), "it has done nothing while it hung"));
    let submit = held(|p| drop(one(p, add(1)).unwrap()));
    assert_eq!((class.held(), class.rules(ifindex(3)).len()), (2, 1), "the one is late only");
    class.let_go();
    joined(flush);
    joined(submit);
    assert_eq!(class.held(), 0);
    class.hang(Call::Flush);
    let flush = held(|p| assert!(p.flush().is_ok()));
    class.let_go();
    joined(flush);
    assert_eq!(other.flush(), Ok(1), "and nothing is kept any more");
}
