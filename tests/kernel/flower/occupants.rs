//! What else is on the netdev: filters of others and of dead engines; and what others do to ours.

use std::time::Instant;

use netdev_providers::Repaired;
use netdev_providers::tc_flower::QdiscKind;

use super::*;
use crate::wait::wait_until;

#[test]
fn foreign_filters_are_left_alone_and_given_way_to() {
    let net = Net::new();
    net.ns.run(
        "tc qdisc add dev lan0 clsact
         tc filter add dev lan0 ingress protocol ip flower ip_proto tcp dst_port 22 action pass
         tc filter add dev lan0 ingress prio 49412 protocol ip matchall action pass
         tc filter add dev lan0 egress protocol ip flower ip_proto tcp dst_port 22 action pass",
    );
    let foreign = net.ns.run("tc filter show dev lan0 ingress");
    let port = net.bind("lan0");
    assert!(port.provider.describe().contains("prios 49420-49431"), "{}", port.provider.describe());
    port.add(1, flow(tuple(TCP4), tuple(TCP4)));
    assert_eq!(port.packets(1), 0);
    assert_eq!(port.provider.flush().unwrap(), 1);
    port.provider.release().unwrap();
    assert_eq!(net.ns.run("tc filter show dev lan0 ingress"), foreign);
    assert!(net.ns.run("tc qdisc show dev lan0").contains("clsact"));
}

#[test]
fn the_qdisc_stays_while_somebody_else_uses_it() {
    let net = Net::new();
    for (kind, hook) in [
        (QdiscKind::Ingress, "ingress"),
        (QdiscKind::Clsact, "ingress"),
        (QdiscKind::Clsact, "egress"),
    ] {
        let class = TcFlowerClass::new(TcFlowerConfig { qdisc: kind, ..Default::default() });
        let provider = class.bind(&netdev("lan0", HwFlags::Both), instance(1)).unwrap();
        net.ns.run(&format!(
            "tc filter add dev lan0 {hook} protocol ip flower ip_proto tcp action pass"
        ));
        provider.release().unwrap();
        let qdiscs = net.ns.run("tc qdisc show dev lan0");
        assert!(qdiscs.contains(&format!("qdisc {} ffff:", kind.name())), "{qdiscs}");
        let left = net.ns.run(&format!("tc filter show dev lan0 {hook}"));
        assert_eq!(left.matches("handle 0x1").count(), 1, "theirs: {left}");
        net.ns.run(&format!("tc qdisc del dev lan0 {}", kind.name()));
    }
}

/// How the scripts of shapers begin (SQM, wondershaper, FireQOS): what is there is removed.
const SHAPER: &str = "tc qdisc del dev lan0 ingress && tc qdisc add dev lan0 handle ffff: ingress";

#[test]
fn a_shaper_that_starts_beside_our_rules_gets_a_qdisc_of_its_own_and_keeps_it() {
    let net = Net::new();
    let port = net.bind("lan0");
    let t = tuple(TCP4);
    let rule = port.add(1, flow(t, t));
    net.ns.run(&format!(
        "{SHAPER} && tc filter add dev lan0 parent ffff: protocol all prio 10 u32 match u32 0 0 action continue"
    ));
    // No rule without guards, although nobody has told the provider.
    let fresh = port.add(2, flow(t, t));
    assert_eq!(guards(&net), GUARDS);
    assert_eq!(port.provider.repair(), Repaired::RulesGone, "the engine flushes the port");
    assert_eq!(port.provider.repair(), Repaired::AsItWas);
    assert_eq!(port.provider.in_front(), ["u32 at prio 10 (all): gact"]);
    let about = port.provider.describe();
    assert!(about.contains("ingress qdisc, not ours"), "{about}");
    // What was before has the handle of what is now.
    assert_eq!(port.delete(1, rule), Ok(Done::Deleted));
    assert_eq!((rule, port.usage().len()), (fresh, 1));
    let seen = net.pass(Packet::new(t).frame(false), false, t, 1);
    assert_eq!((seen.len(), seen[0].src, port.packets(2)), (1, WAN, 1), "by the rule");
    net.ns.run("tc filter del dev lan0 ingress prio 10");
    assert_eq!(port.provider.repair(), Repaired::AsItWas);
    assert_eq!(port.provider.in_front(), <[String; 0]>::default());
    port.provider.release().unwrap();
    assert!(net.ns.run("tc qdisc show dev lan0").contains("qdisc ingress ffff:"), "it is theirs");
    assert!(net.ns.run("tc filter show dev lan0 ingress").is_empty());
}

#[test]
fn what_a_shaper_replaces_or_finds_there_is_as_good_as_its_own() {
    let net = Net::new();
    let port = net.bind("lan0");
    let t = tuple(TCP4);
    port.add(1, flow(t, t));
    net.ns.run(
        "tc qdisc replace dev lan0 handle ffff: ingress
         tc filter add dev lan0 parent ffff: protocol ip prio 10 flower dst_ip 192.0.2.1 action drop",
    );
    assert_eq!(port.provider.repair(), Repaired::AsItWas);
    assert_eq!(port.provider.in_front(), ["flower at prio 10 (ip): gact"]);
    assert_eq!(net.pass(Packet::new(t).frame(false), false, t, 1).len(), 1);
    assert_eq!(port.packets(1), 1);
    port.provider.release().unwrap();
    let left = net.ns.run("tc filter show dev lan0 ingress");
    assert!(left.contains("192.0.2.1") && !left.contains("mirred"), "{left}");
}

#[test]
fn who_removes_our_qdisc_is_given_time_and_then_it_comes_back() {
    let net = Net::new();
    let port = net.bind("lan0");
    let t = tuple(TCP4);
    let rule = port.add(1, flow(t, t));
    net.ns.run("tc qdisc del dev lan0 ingress");
    let began = Instant::now();
    let refused = port.try_add(2, flow(t, t)).unwrap_err();
    assert_eq!(refused.reason, Reason::Busy);
    assert!(refused.detail.as_deref().is_some_and(|d| d.contains("given time")), "{refused}");
    assert!(!net.ns.run("tc qdisc show dev lan0").contains("ffff:"), "room for another");
    assert!(port.provider.describe().contains("given time"), "{}", port.provider.describe());
    assert_eq!(port.provider.repair(), Repaired::RulesGone);
    assert_eq!(port.delete(1, rule), Ok(Done::Deleted));
    let fault = port.provider.usage(&mut |_| ()).unwrap_err();
    assert!(fault.to_string().contains("removed"), "{fault}");
    wait_until("ours is there again", || {
        assert_eq!(port.provider.repair(), Repaired::AsItWas);
        net.ns.run("tc qdisc show dev lan0").contains("qdisc ingress ffff:")
    });
    let paused = began.elapsed();
    assert!(paused >= Duration::from_millis(1500), "{paused:?}");
    port.add(3, flow(t, t));
    assert_eq!(guards(&net), GUARDS);
    assert_eq!(net.pass(Packet::new(t).frame(false), false, t, 1).len(), 1);
    port.provider.release().unwrap();
    assert!(!net.ns.run("tc qdisc show dev lan0").contains("ffff:"), "the second one is ours too");
}

#[test]
fn no_rule_is_added_without_guards_when_somebody_removed_all_filters() {
    let net = Net::new();
    let port = net.bind("lan0");
    let t = tuple(TCP4);
    port.add(1, flow(t, t));
    net.ns.run("tc filter del dev lan0 ingress");
    assert_eq!(guards(&net), 0);
    let udp = tuple(UDP6);
    port.add(2, flow(udp, udp));
    assert_eq!(guards(&net), GUARDS, "{}", net.filters("lan0"));
    port.provider.release().unwrap();
    assert!(!net.ns.run("tc qdisc show dev lan0").contains("ffff:"));
}

/// Of a port in software, and what takes priority tags off.
const GUARDS: usize = 4 + 1;

fn guards(net: &Net) -> usize {
    net.filters("lan0").matches("cookie c70f010000000001ffff").count()
}

#[test]
fn an_ingress_qdisc_does_as_well() {
    let net = Net::new();
    net.ns.run("tc qdisc add dev lan0 ingress");
    let port = net.bind("lan0");
    let t = tuple(TCP4);
    port.add(1, flow(t, t));
    assert_eq!(net.pass(Packet::new(t).frame(false), false, t, 1).len(), 1);
    assert_eq!(port.packets(1), 1);
    port.provider.release().unwrap();
    assert!(net.ns.run("tc qdisc show dev lan0").contains("qdisc ingress"));
    assert!(net.ns.run("tc filter show dev lan0 ingress").is_empty());
}

#[test]
fn what_a_dead_engine_left_goes_on_and_is_adopted_if_it_is_what_it_would_be() {
    let net = Net::new();
    let dead = net.try_bind("lan0", HwFlags::Both, 1).unwrap();
    let (tcp, udp) = (tuple(TCP4), tuple(UDP6));
    let nat = (tuple("tcp 10.0.1.2:4009 > 10.0.2.2:80"), tuple("tcp 10.0.2.1:5009 > 10.0.2.2:80"));
    let nat6 = (tuple(TCP6), tuple("tcp [fd02::1]:5000 > [fd02::2]:80"));
    dead.add(1, flow(tcp, tcp));
    dead.add(2, flow(udp, udp));
    dead.add(3, flow(nat.0, nat.1));
    dead.add(4, flow(nat6.0, nat6.1));
    net.ns
        .run("tc filter add dev lan0 ingress prio 7 protocol ip flower dst_ip 1.2.3.4 action pass");
    drop(dead);
    let passes = |what: &str| {
        let seen = net.pass(Packet::new(tcp).frame(false), false, tcp, 1);
        assert_eq!(seen.len(), 1, "{what}");
        assert_eq!(seen[0].src, WAN, "{what}: by the rule");
    };
    passes("without an engine");
    let port = net.try_bind("lan0", HwFlags::Both, 2).unwrap();
    passes("with one that has not looked yet");
    assert_eq!(port.usage(), [], "none of them is its own yet");
    let mut observed = port.provider.observe().unwrap();
    assert_eq!(observed.foreign, 1);
    observed.leftovers.sort_by_key(|l| l.cookie.epoch);
    let tuples: Vec<_> = observed.leftovers.iter().map(|l| l.tuple.unwrap()).collect();
    assert_eq!(tuples, [tcp, udp, nat.0, nat6.0]);
    assert_eq!(observed.leftovers[0].counters.packets, 2);
    assert!(observed.leftovers.iter().all(|l| l.cookie.instance == instance(1)));

    let mut elsewhere = flow(udp, udp);
    elsewhere.forward.macs = Some(MacRewrite { src: WAN, dst: CLIENT });
    let flows = [flow(tcp, tcp), elsewhere, flow(nat.0, nat.1), flow(nat6.0, nat6.1)];
    let adopt = |(l, flow): (&netdev_providers::Leftover, Flow)| Request::Adopt {
        found: l.rule,
        cookie: port.cookie(l.cookie.epoch.0 + 10),
        flow: Box::new(flow),
    };
    let outcomes = port.submit(observed.leftovers.iter().zip(flows).map(adopt).collect());
    let text = net.filters("lan0");
    for (n, outcome) in outcomes.iter().enumerate() {
        match outcome {
            Ok(Done::Added { rule, in_hw: Some(false), .. }) if n != 1 => {
                assert_eq!(*rule, observed.leftovers[n].rule);
            }
            Err(why) if n == 1 => assert_eq!(why.reason, Reason::Conflict),
            other => panic!("{n}: {other:?}\n{text}"),
        }
    }
    passes("adopted");
    assert_eq!(port.packets(11), 3, "it counts on");
    let mut cookies: Vec<_> = port.usage().iter().map(|r| r.cookie.epoch.0).collect();
    cookies.sort_unstable();
    assert_eq!(cookies, [11, 13, 14]);
    assert!(!text.contains("cookie c70f0100000000010000000000000002"), "{text}");
    assert!(text.contains("pref 7 "), "{text}");
    assert_eq!(text.matches(" name inspect").count(), 4, "a guard for each family: {text}");
    assert_eq!(
        text.matches("cookie c70f010000000002ffff").count(),
        GUARDS,
        "all of them ours: {text}"
    );
    assert_eq!(port.provider.observe().unwrap().leftovers, []);

    // From now on they are rules like any other, and their handles are taken.
    let fresh = port.add(20, flow(tuple(UDP4), tuple(UDP4)));
    assert!(observed.leftovers.iter().all(|l| l.rule != fresh), "a handle given twice");
    assert_eq!(port.delete(11, observed.leftovers[0].rule), Ok(Done::Deleted));
    assert!(!net.filters("lan0").contains("cookie c70f0100000000010000000000000001"));
    assert_eq!(port.provider.flush().unwrap(), 3);
    net.ns.run("tc filter del dev lan0 ingress prio 7");
    port.provider.release().unwrap();
    assert!(!net.ns.run("tc qdisc show dev lan0").contains("ffff:"), "inherited from the dead one");
}

/// At one prio there is one kind of classifier: guards of a version that had others make room for ours.
#[test]
fn guards_of_another_kind_that_a_dead_engine_left_give_way() {
    let net = Net::new();
    let dead = net.bind("lan0");
    let t = tuple(TCP4);
    dead.add(1, flow(t, t));
    drop(dead);
    net.ns.run(
        "set -e
         tc filter del dev lan0 ingress prio 49410 protocol ip
         tc filter add dev lan0 ingress prio 49410 protocol ip u32 match u32 0 0xfe000000 at 8 \
           action pass cookie c70f010000000001ffffffffffffffff",
    );
    let port = net.try_bind("lan0", HwFlags::Both, 2).unwrap();
    let text = net.filters("lan0");
    assert!(!text.contains("u32"), "{text}");
    assert_eq!(text.matches(" name inspect").count(), 4, "{text}");
    assert_eq!(port.provider.observe().unwrap().leftovers.len(), 1, "its rule stands");
    assert_eq!(net.pass(Packet::new(t).frame(false), false, t, 1).len(), 1);
}

/// The writers of a port do not overtake one another where the same packets are matched.
#[test]
fn what_a_dead_engine_left_is_removed_before_its_match_is_taken_again() {
    let net = Net::new();
    let dead = net.bind("lan0");
    let flow_of = |n: u64| {
        let t = tuple(&format!("udp 10.0.1.2:{} > 10.0.2.2:53", 1000 + n));
        Box::new(flow(t, t))
    };
    let adds = (0..200).map(|n| Request::Add { cookie: dead.cookie(n), flow: flow_of(n) });
    assert!(dead.submit(adds.collect()).iter().all(Result::is_ok));
    drop(dead);
    let port = net.try_bind("lan0", HwFlags::Both, 2).unwrap();
    let left = port.provider.observe().unwrap().leftovers;
    assert_eq!(left.len(), 200);
    let renewed = left.iter().flat_map(|l| {
        let (n, rule) = (l.cookie.epoch.0, l.rule);
        let cookie = port.cookie(n);
        [Request::Delete { rule, cookie }, Request::Add { cookie, flow: flow_of(n) }]
    });
    let outcomes = port.submit(renewed.collect());
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    assert_eq!((port.usage().len(), port.provider.flush()), (200, Ok(200)));
}

#[test]
fn a_bind_that_declines_leaves_nothing_behind() {
    let net = Net::new();
    let declined = |name: &str, flags| match net.try_bind(name, flags, 1) {
        Err(BindError::Declined(why)) => why,
        other => panic!("{:?}", other.map(|p| p.provider.describe())),
    };
    assert!(declined("lo", HwFlags::Both).contains("Ethernet"));
    // veth has no hardware.
    let why = declined("lan0", HwFlags::SkipSw);
    assert!(why.contains("NIC"), "{why}");
    assert!(!net.ns.run("tc qdisc show dev lan0").contains("ffff:"));
    net.ns.run("tc qdisc add dev lan0 ingress_block 7 clsact");
    let why = declined("lan0", HwFlags::Both);
    assert!(why.contains("block 7"), "{why}");
    assert!(net.ns.run("tc qdisc show dev lan0").contains("clsact"));
    let gone = Netdev { ifindex: Ifindex::new(4711).unwrap(), ..netdev("lan0", HwFlags::Both) };
    let Err(BindError::Failed(fault)) = TcFlowerClass::default().bind(&gone, instance(1)) else {
        panic!("bound to nothing");
    };
    assert!(fault.is_netdev_gone(), "{fault}");
}

#[test]
fn nobody_has_room_for_our_prios() {
    let net = Net::new();
    net.ns.run(
        "tc qdisc add dev lan0 clsact
         tc filter add dev lan0 ingress prio 65530 protocol ip matchall action pass",
    );
    let class = TcFlowerClass::new(TcFlowerConfig { prio_base: 65530, ..Default::default() });
    let Err(BindError::Declined(why)) = class.bind(&netdev("lan0", HwFlags::Both), instance(1))
    else {
        panic!("bound");
    };
    assert!(why.contains("matchall at prio 65530"), "{why}");
}

#[test]
fn a_netdev_that_goes_is_no_failure_of_deletes() {
    let net = Net::new();
    let port = Arc::new(net.bind("lan0"));
    let t = tuple(TCP4);
    let rule = port.add(1, flow(t, t));
    // In the middle of a stream of adds.
    let stream = {
        let port = Arc::clone(&port);
        let flow = flow(t, t);
        std::thread::spawn(move || {
            let mut last = None;
            for n in 0..2000u16 {
                let t = Tuple::new(
                    L4Proto::Udp,
                    Ipv4Addr::new(10, 0, 1, 2).into(),
                    n,
                    Ipv4Addr::new(10, 0, 2, 2).into(),
                    53,
                )
                .unwrap();
                let mut f = flow;
                f.matches.tuple = t;
                f.forward.tuple = t;
                last = Some(port.try_add(u64::from(n) + 10, f));
                if matches!(&last, Some(Err(_))) {
                    break;
                }
            }
            last.unwrap()
        })
    };
    std::thread::sleep(Duration::from_millis(50));
    net.ns.run("ip link del lan0");
    let last = stream.join().unwrap();
    assert_eq!(last.unwrap_err().reason, Reason::NetdevGone);
    assert_eq!(port.delete(1, rule), Ok(Done::Deleted));
    let fault = port.provider.usage(&mut |_| ()).unwrap_err();
    assert!(fault.is_netdev_gone(), "{fault}");
    port.provider.flush().unwrap();
    port.provider.release().unwrap();
}
