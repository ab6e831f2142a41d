//! The small parts by themselves: keys, moments, shapes, tables, what is shown of them.

use std::hash::{Hash, Hasher};

use netdev_providers::{Above, Epoch, Flow, FlowMatch, L4Proto, VlanId};

use super::*;
use crate::engine::conn::ConnClaim;
use crate::engine::counters::PortCounters;
use crate::engine::datapath::{NoDatapath, SlotChange};
use crate::engine::detail::Moment;
use crate::engine::latency::OpKind;
use crate::engine::queue::{Command, Queue};
use crate::engine::shapes::{MAX_SHAPES, Shape};
use crate::engine::sync::{Patience, thread_number};

/// A hasher that keeps what it is given.
#[derive(Default)]
struct Words(Vec<u128>);

impl Hasher for Words {
    fn finish(&self) -> u64 {
        0
    }
    fn write(&mut self, bytes: &[u8]) {
        panic!("word by word, not {bytes:?}");
    }
    fn write_u32(&mut self, n: u32) {
        self.0.push(n.into());
    }
    fn write_u64(&mut self, n: u64) {
        self.0.push(n.into());
    }
    fn write_u128(&mut self, n: u128) {
        self.0.push(n);
    }
}

fn words(zone: u16, tuple: &str) -> Vec<u128> {
    let mut words = Words::default();
    ConnKey { zone: Zone(zone), original: tuple.parse().unwrap() }.hash(&mut words);
    words.0
}

#[test]
fn a_key_is_hashed_whole_and_in_two_words_for_ipv4() {
    let v4 = words(0x1234, "udp 192.0.2.1:22136 > 198.51.100.2:39612");
    assert_eq!(v4, [0x1234_0011_5678_9abc, 0xc000_0201_c633_6402]);
    let v6 = words(0x1234, "udp [2001:db8::1]:22136 > [2001:db8::2]:39612");
    assert_eq!(v6, [0x1234_0111_5678_9abc, 0x2001_0db8 << 32, 1, 0x2001_0db8 << 32, 2]);
}

#[test]
fn a_moment_is_the_one_it_was_made_for() {
    assert_eq!(Moment::default().ms(), None);
    assert_eq!([0, 1, 7].map(|ms| Moment::at(ms).ms()), [Some(0), Some(1), Some(7)]);
    assert_eq!(Moment::at(u64::MAX).ms(), Some(u64::MAX - 1), "the end of time is early");
}

#[test]
fn offers_that_come_while_those_that_wait_are_taken_stay() {
    let b = Bench::new(&[]);
    let queue = Queue::new(16);
    let offer = |n| {
        let path = PathSpec::Resolve(PathHint::default());
        assert!(queue.put_add(usize::from(n), b.conn(n), Original, path));
    };
    let retracted = |n| queue.push(Command::Retracted(ifindex(n)));
    retracted(10);
    offer(1);
    retracted(11);
    offer(2);
    retracted(12);
    let mut taken = Vec::new();
    queue.take_offers(|command| {
        // Workers go on.
        offer(100);
        taken.push(match command {
            Command::Add(conn, ..) => conn.tag(),
            _ => 0,
        });
    });
    assert_eq!(taken, [1, 2], "and nothing else");
    assert_eq!(queue.pending(), 2);
    for n in 10..13 {
        assert!(matches!(queue.pop(), Some(Command::Retracted(to)) if to == ifindex(n)));
    }
    assert!(matches!(queue.pop(), Some(Command::Add(..))));
    // Where nobody offers anything nothing is taken.
    let queue = Queue::new(16);
    queue.push(Command::Repair);
    queue.take_offers(|_| panic!("what waits for its turn has it"));
    assert!(queue.pop().is_some());
}

#[test]
fn a_connection_tells_who_it_is_and_since_when() {
    let b = Bench::new(&[]);
    b.clock.store(4711, Ordering::SeqCst);
    let conn = b.conn(7);
    assert_eq!(conn.created_ms(), 4711);
    assert_eq!((conn.tag(), conn.epoch()), (7, Epoch(1)));
    let who = "tcp 192.0.2.8:7 > 198.51.100.1:80 (zone 0, epoch 1)";
    assert_eq!(conn.to_string(), who);
    assert_eq!(format!("{conn:?}"), format!("ConnHandle({who})"));
    let other = b.conn(8);
    assert!(conn.is_same(&conn.clone()) && !conn.is_same(&other));
    assert_eq!(b.engine.conn_count(), 2);
    assert_eq!(b.engine.conns().count(), 2);
    b.engine.conn_del(&conn);
    assert_eq!(b.engine.conn_count(), 1);
    assert!(b.engine.conn(&conn.key()).is_none());
    assert!(b.engine.conn(&other.key()).is_some_and(|c| c.is_same(&other)));
}

#[test]
fn the_engine_tells_whose_rules_are_its_own() {
    let b = Bench::new(&[]);
    assert_eq!(b.engine.instance(), Instance(NonZeroU32::new(7).unwrap()));
    assert!(format!("{:?}", b.engine).contains("Instance(7)"), "{:?}", b.engine);
    b.clock.store(12, Ordering::SeqCst);
    assert_eq!(b.engine.now_ms(), 12);
    let system = Clock::default();
    std::thread::sleep(Duration::from_millis(5));
    let now = system.now_ms();
    assert!((5..60_000).contains(&now), "milliseconds since it was made: {now}");
}

#[test]
fn as_many_connections_are_kept_as_may_be() {
    let b = Bench::with_limits(&[], Limits { connections: 2, ..Limits::default() });
    let (one, _two) = (b.conn(1), b.conn(2));
    let original: Tuple = "tcp 192.0.2.99:9 > 198.51.100.1:80".parse().unwrap();
    let key = ConnKey { zone: Zone(0), original };
    assert!(b.engine.conn_create(key, original.inverted(), 3).is_none());
    assert_eq!(b.engine.conn_count(), 2, "what was not made is not counted");
    assert!(b.engine.conn_create(one.key(), one.reply(), 1).is_some_and(|c| c.is_same(&one)));
    b.engine.conn_del(&one);
    assert!(b.engine.conn_create(key, original.inverted(), 3).is_some());
}

#[test]
fn traffic_of_a_backend_that_counts_packets_or_bytes_only_is_kept_too() {
    let conn = Bench::new(&[]).conn(1);
    conn.past_traffic(5, 0);
    conn.past_traffic(0, 70);
    conn.past_traffic(0, 0);
    assert_eq!((conn.traffic().packets, conn.traffic().bytes), (5, 70));
}

#[test]
fn a_datapath_that_promises_nothing_is_asked_and_told_nothing() {
    let conn = Bench::new(&[]).conn(1);
    let (ifindex, generation) = (ifindex(1), Generation::new(1).unwrap());
    let sight = Sight { ifindex, generation, conn: conn.clone(), direction: Original };
    let sights = [sight.clone(), sight];
    assert_eq!(NoDatapath.prepare(&sights), [Ok(()), Ok(())]);
    assert_eq!(NoDatapath.forwarded_itself(&sights), [None, None]);
    let refused = NoDatapath.resolve(&sights[0], &PathHint::default()).unwrap_err();
    assert_eq!(refused.reason, Reason::NoRoute);
    let netdev =
        Netdev { ifindex, generation, name: "p1".to_owned(), hw_flags: HwFlags::default() };
    let cookie = Cookie {
        instance: Instance(NonZeroU32::new(1).unwrap()),
        epoch: Epoch(1),
        direction: Original,
    };
    let leftover = Leftover {
        rule: netdev_providers::RuleId(1),
        cookie,
        tuple: None,
        counters: netdev_providers::Counters::default(),
    };
    let found = NoDatapath.recognise(&netdev, &[leftover.clone(), leftover], &|_, _, _| None);
    assert!(found.len() == 2 && found.iter().all(Option::is_none));
    NoDatapath.slot_changed(&netdev, &conn, Original, SlotChange::Installed);
}

fn flow() -> Flow {
    let tuple: Tuple = "tcp 192.0.2.1:1000 > 198.51.100.2:80".parse().unwrap();
    Flow {
        zone: Zone(0),
        direction: Original,
        ingress_mtu: 1500,
        matches: FlowMatch { eth_dst: None, vlan: None, tuple },
        forward: Forward {
            egress: ifindex(2),
            vlan: None,
            mtu: 1500,
            tuple,
            macs: None,
            egress_decides: false,
        },
        above: Above::default(),
    }
}

/// What a backend does not take in one shape it may take in another: each part of a shape counts, and
/// addresses and ports do not.
#[test]
fn shapes_differ_by_what_a_backend_has_to_do() {
    let tuple = |s: &str| s.parse::<Tuple>().unwrap();
    let mut shapes = std::collections::HashSet::from([Shape::of(&flow())]);
    let mut other = |change: &dyn Fn(&mut Flow)| {
        let mut flow = flow();
        change(&mut flow);
        assert!(shapes.insert(Shape::of(&flow)), "the same shape as before: {flow:?}");
    };
    other(&|f| f.forward.tuple = tuple("tcp 203.0.113.1:1000 > 198.51.100.2:80"));
    other(&|f| f.forward.tuple = tuple("tcp 192.0.2.1:1000 > 203.0.113.1:80"));
    other(&|f| f.forward.tuple = tuple("tcp 192.0.2.1:1001 > 198.51.100.2:80"));
    other(&|f| {
        f.matches.tuple = tuple("udp 192.0.2.1:1000 > 198.51.100.2:80");
        f.forward.tuple = f.matches.tuple;
    });
    other(&|f| {
        f.matches.tuple = tuple("tcp [2001:db8::1]:1000 > [2001:db8::2]:80");
        f.forward.tuple = f.matches.tuple;
    });
    other(&|f| f.matches.vlan = Some(VlanId::MIN));
    other(&|f| f.forward.vlan = Some(VlanId::MIN));
    other(&|f| f.forward.macs = Some(MacRewrite { src: MacAddr([2; 6]), dst: MacAddr([4; 6]) }));
    other(&|f| f.forward.egress = ifindex(3));
    let mut elsewhere = flow();
    elsewhere.matches.tuple = tuple("tcp 192.0.2.77:7 > 198.51.100.77:77");
    elsewhere.forward.tuple = elsewhere.matches.tuple;
    assert!(!shapes.insert(Shape::of(&elsewhere)));
    assert_eq!(L4Proto::from_number(6), Some(L4Proto::Tcp));
}

/// A NIC may refuse each flow for another shape.
#[test]
fn as_many_refused_shapes_are_remembered_as_there_may_be() {
    let b = Bench::new(&[]);
    b.engine
        .port_add(NewPort { providers: Some(vec![NO_PROVIDER.into()]), ..new_port(1) })
        .unwrap();
    let table = b.engine.0.publication.table();
    let port = table.get(ifindex(1)).unwrap();
    let shapes: Vec<_> = (1..)
        .map(|n| {
            let mut flow = flow();
            flow.forward.egress = ifindex(n);
            Shape::of(&flow)
        })
        .take(MAX_SHAPES + 1)
        .collect();
    for shape in &shapes {
        port.shapes().note_refused(*shape, &Reason::Unsupported.into());
    }
    let remembered = shapes.iter().filter(|s| port.shapes().refused(s).is_some()).count();
    assert_eq!(remembered, MAX_SHAPES);
    // One that lasts no longer than the moment is none of the shape's.
    port.shapes().forget();
    port.shapes().note_refused(shapes[0], &Reason::Busy.into());
    assert_eq!(port.shapes().refused(&shapes[0]), None);
}

#[test]
fn a_port_without_a_provider_is_told_nothing() {
    let b = Bench::new(&[]);
    let none = || Some(vec![NO_PROVIDER.to_owned()]);
    b.engine.port_add(NewPort { providers: none(), ..new_port(1) }).unwrap();
    let table = b.engine.0.publication.table();
    let port = table.get(ifindex(1)).unwrap();
    // As if something of it were on its way, and might lead anywhere.
    port.progress.operations.begin();
    assert!(port.may_lead_to(ifindex(2)));
    b.engine.port_add(NewPort { providers: none(), ..new_port(2) }).unwrap();
    b.engine.put_in_order(ifindex(1));
    assert!(port.queue.is_finished(), "nobody would take it out of there");
}

/// Others have the processor meanwhile.
#[test]
fn who_waits_looks_less_and_less_often_until_the_time_is_over() {
    let mut patience = Patience::new(Duration::from_millis(100));
    let looks = std::iter::from_fn(|| patience.pause().then_some(())).count();
    assert!((1..200).contains(&looks), "{looks}");
    assert!(!Patience::new(Duration::ZERO).pause());
    assert!(Patience::new(Duration::MAX).pause(), "no time is too long");
}

/// Who adds or deletes a port asks those that may lead there, and nobody else.
#[test]
fn a_port_may_lead_where_a_rule_of_it_does_or_one_that_is_on_its_way() {
    let b = Bench::new(&[]);
    let none = Some(vec![NO_PROVIDER.to_owned()]);
    b.engine.port_add(NewPort { providers: none, ..new_port(1) }).unwrap();
    let table = b.engine.0.publication.table();
    // No thread of its own: what is queued stays there.
    let port = table.get(ifindex(1)).unwrap();
    let leads = || [7, 8].map(|n| port.may_lead_to(ifindex(n)));
    assert_eq!(leads(), [false, false]);
    let conn = b.conn(1);
    let generation = port.generation();
    assert!(matches!(conn.claim(generation, Original, |_| false), ConnClaim::Won(_)));
    let slot = conn.slot(generation, Original).unwrap();
    port.held().insert(&conn, slot, Original);
    assert_eq!(leads(), [false, false], "rejected before a path was known");
    port.held().lead(&conn, slot, Original, [None, Some(ifindex(7))]);
    assert_eq!(leads(), [true, false]);
    port.queue.push(Command::Repair);
    assert_eq!(leads(), [true, true], "it may be an offer");
    port.queue.pop();
    port.queue.finished(1);
    assert_eq!(leads(), [true, false]);
    port.progress.operations.begin();
    assert_eq!(leads(), [true, true], "and this an add");
    port.progress.operations.end();
    port.held().lead(&conn, slot, Original, [Some(ifindex(7)), None]);
    assert_eq!(leads(), [false, false]);
}

#[test]
fn refusals_are_counted_by_their_reason() {
    let all = Arc::<Counts>::default();
    let counters = PortCounters::new(Arc::clone(&all));
    assert!(counters.read().reasons.is_empty());
    for reason in [Reason::Busy, Reason::NoEffect, Reason::Busy] {
        counters.count(|counts| counts.refused(reason));
    }
    assert_eq!(counters.read().reasons, [(Reason::Busy, 2), (Reason::NoEffect, 1)]);
    assert_eq!(all.read(), counters.read(), "of the one port that there is");
    counters.past(3, 300);
    counters.past(1, 100);
    let past = (&counters.past_packets, &counters.past_bytes);
    assert_eq!((past.0.load(Ordering::SeqCst), past.1.load(Ordering::SeqCst)), (4, 400));
    assert!(format!("{counters:?}").contains("ReasonCounters"));
}

#[test]
fn adds_and_deletes_are_timed_and_an_adoption_is_an_add() {
    let b = Bench::new(&[]);
    let (cookie, flow) = (b.engine.0.cookie(&b.conn(1), Original), Box::new(flow()));
    let rule = netdev_providers::RuleId(1);
    let add = Request::Add { cookie, flow: flow.clone() };
    let adopt = Request::Adopt { found: rule, cookie, flow };
    assert_eq!([add, adopt].map(|r| OpKind::of(&r)), [Some(OpKind::Add), Some(OpKind::Add)]);
    assert_eq!(OpKind::of(&Request::Delete { rule, cookie }), Some(OpKind::Delete));
    assert_eq!(OpKind::of(&Request::Established { rule, cookie }), None);
    assert_eq!(OpKind::ALL.map(OpKind::name), ["add", "delete"]);
}

#[test]
fn ports_are_found_and_listed_by_ifindex_whatever_order_they_came_in() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    let generations = [5, 1, 9, 3].map(|n| (n, b.port(n)));
    let listed: Vec<_> = b.engine.ports().iter().map(|p| p.netdev.ifindex.get()).collect();
    assert_eq!(listed, [1, 3, 5, 9]);
    let table = b.engine.0.publication.table();
    for (n, generation) in generations {
        let (netdev, class) = b.engine.port(ifindex(n)).unwrap();
        assert_eq!(
            (netdev.name, netdev.generation, class),
            (format!("p{n}"), generation, Some("dummy"))
        );
        assert_eq!(table.by_generation(generation).unwrap().ifindex(), ifindex(n));
        let shown = format!("{:?}", table.get(ifindex(n)).unwrap());
        assert!(shown.starts_with(&format!("Port(p{n} ")), "{shown}");
    }
    assert!(b.engine.port(ifindex(2)).is_none());
    assert_eq!(b.engine.classes(), [("dummy", 4)]);
    b.engine.port_del(ifindex(5)).unwrap();
    let listed: Vec<_> = b.engine.ports().iter().map(|p| p.netdev.ifindex.get()).collect();
    assert_eq!(listed, [1, 3, 9]);
    assert_eq!(b.engine.classes(), [("dummy", 3)]);
}

#[test]
fn a_port_counts_its_slots_by_state_and_what_is_in_hardware() {
    let dummy = DummyClass::new("dummy");
    let b = Bench::new(&[&dummy]);
    b.port(1);
    let [one, two, gone] = [1, 2, 3].map(|n| b.conn(n));
    for conn in [&one, &two, &gone] {
        b.install(1, conn, Original);
    }
    dummy.refuse_shapes(Some(Reason::MtuMismatch.into()));
    let refused = [4, 5].map(|n| b.conn(n));
    for conn in &refused {
        assert_eq!(b.offer(1, conn, Reply), Offer::Queued);
    }
    b.settle();
    dummy.refuse_shapes(None);
    dummy.set_latency(Some(Duration::MAX));
    b.engine.conn_del(&gone);
    assert_eq!(b.offer(1, &b.conn(6), Original), Offer::Queued);
    b.drained(&dummy, 2);
    let slots = b.engine.ports()[0].slots;
    assert_eq!((slots.pending, slots.installed, slots.deleting, slots.rejected), (1, 2, 1, 2));
    dummy.set_latency(None);
    dummy.release_pending();
    b.settle();
    let port = &b.engine.ports()[0];
    let slots = &port.slots;
    assert_eq!((slots.pending, slots.installed, slots.deleting, slots.rejected), (0, 3, 0, 2));
    assert_eq!((port.sights, port.totals.adds, port.totals.deletes), (6, 4, 1));
    assert!(b.engine.is_installed(&one, Original, port.netdev.generation));
    assert!(!b.engine.is_installed(&one, Reply, port.netdev.generation));
    assert!(!b.engine.is_installed(&refused[0], Reply, port.netdev.generation));
}

#[test]
fn a_port_is_empty_when_nothing_is_held_queued_or_with_the_provider_and_nothing_is_wrong() {
    let b = Bench::new(&[]);
    let providers = Some(vec![NO_PROVIDER.to_owned()]);
    b.engine.port_add(NewPort { providers, ..new_port(1) }).unwrap();
    let table = b.engine.0.publication.table();
    // No thread of its own: what is queued stays there.
    let port = table.get(ifindex(1)).unwrap();
    assert!(port.is_empty());
    port.progress.operations.begin();
    assert!(!port.is_empty());
    port.progress.operations.end();
    let conn = b.conn(1);
    assert!(matches!(conn.claim(port.generation(), Original, |_| false), ConnClaim::Won(_)));
    let slot = conn.slot(port.generation(), Original).unwrap();
    port.held().insert(&conn, slot, Original);
    assert!(!port.is_empty());
    port.held().remove(&conn, slot, Original, None);
    assert!(port.is_empty());
    port.set_fault("it hangs".to_owned());
    assert!(!port.is_empty(), "nobody knows what it has");
    let another =
        b.engine.port_add(NewPort { providers: Some(vec![NO_PROVIDER.to_owned()]), ..new_port(2) });
    another.unwrap();
    let table = b.engine.0.publication.table();
    let port = table.get(ifindex(2)).unwrap();
    port.queue.push(Command::Repair);
    assert!(!port.is_empty());
    port.queue.pop();
    assert!(!port.is_empty(), "taken, and not carried out yet");
    port.queue.finished(1);
    assert!(port.is_empty());
}

/// It chooses the lane of its offers: two threads that have first sights at the same time write none in common.
#[test]
fn each_thread_has_a_number_of_its_own_and_keeps_it() {
    let twice = || (thread_number(), thread_number());
    let here = twice();
    let there = std::thread::spawn(twice).join().unwrap();
    assert!(here.0 == here.1 && there.0 == there.1 && here.0 != there.0, "{here:?} {there:?}");
}

#[test]
fn the_writer_is_told_of_a_batch_when_it_is_whole() {
    let b = Bench::new(&[]);
    let queue = Arc::new(Queue::new(64));
    let (taken, takes) = std::sync::mpsc::channel();
    let (asleep, is_asleep) = std::sync::mpsc::channel();
    let writer = {
        let queue = Arc::clone(&queue);
        std::thread::spawn(move || {
            queue.set_writer();
            for n in 1..=32 {
                while queue.pop().is_none() {
                    asleep.send(()).unwrap();
                    queue.park(PATIENCE);
                }
                taken.send(n).unwrap();
            }
        })
    };
    is_asleep.recv().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    for n in 1..=32 {
        assert!(queue.put_add(0, b.conn(n), Original, PathSpec::Resolve(PathHint::default())));
    }
    let early = takes.recv_timeout(Duration::from_millis(50));
    queue.wake();
    assert_eq!(takes.iter().last(), Some(32));
    writer.join().unwrap();
    assert!(early.is_err(), "it was told of the first");
    assert!(is_asleep.try_recv().is_err(), "it slept among them");
}

#[test]
fn what_took_longer_is_in_a_later_bucket_and_each_is_twice_the_one_before() {
    let latencies = crate::engine::latency::Latencies::default();
    let us = Duration::from_micros;
    let took = [Duration::from_nanos(999), us(1), us(2), us(3), us(4), us(1 << 21), us(1 << 22)];
    for took in took.into_iter().chain([Duration::MAX]) {
        latencies.record(OpKind::Delete, took);
    }
    let buckets: Vec<_> = latencies.buckets().iter().map(|b| (b.op, b.below_us, b.count)).collect();
    let delete = |below_us, count| (OpKind::Delete, below_us, count);
    assert_eq!(
        buckets,
        [
            delete(1, 1),
            delete(2, 1),
            delete(4, 2),
            delete(8, 1),
            delete(1 << 22, 1),
            delete(u64::MAX, 2)
        ]
    );
}
