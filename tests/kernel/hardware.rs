//! tc-flower and the engine on a NIC that offloads: `tests/simnic`, in the machine of
//! `scripts/lab --nic`.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ctoffload::engine::clock::Clock;
use ctoffload::engine::conn::{ConnHandle, ConnKey};
use ctoffload::engine::datapath::{NoDatapath, Path, PathSpec};
use ctoffload::engine::slot::SlotState;
use ctoffload::engine::usage::Strays;
use ctoffload::engine::{Engine, Limits, NewPort};
use netdev_providers::tc_flower::{TcFlowerClass, TcFlowerConfig};
use netdev_providers::{
    Above, Cookie, Direction, Done, Epoch, Flow, FlowMatch, Forward, HwFlags, Instance, MacAddr,
    MacRewrite, Outcome, Provider, ProviderClass, Reason, Repaired, Request, Tuple, VlanId, Zone,
};

use crate::netns::NetNs;
use crate::shown::as_shown;
use crate::submit::{ifindex, netdev, submit};

const ROUTER: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
const NEXT_HOP: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);

/// Two ports of one NIC, `p0` and `p1`.
struct Nic(NetNs);

impl Nic {
    fn new() -> Self {
        assert!(std::env::var_os("CTOFFLOAD_SIMNIC").is_some(), "this needs scripts/lab --nic");
        let ns = NetNs::new();
        for i in 0..2 {
            ns.run(&format!(
                "ip link add name p{i} type simnic peer name w{i} && ip link set p{i} up && ip link set w{i} up"
            ));
        }
        Self(ns)
    }

    fn dir(&self, port: &str) -> String {
        let text = self.0.run(&format!("ip -d -j link show {port}"));
        let link: serde_json::Value = serde_json::from_str(&text).unwrap();
        let name = link[0]["phys_port_name"].as_str().expect("a phys_port_name");
        format!("/sys/kernel/debug/simnic/{name}")
    }

    fn set(&self, port: &str, knob: &str, value: &str) {
        std::fs::write(format!("{}/{knob}", self.dir(port)), value).unwrap();
    }

    /// Rules that the hardware has.
    fn rules(&self, port: &str) -> usize {
        let text = std::fs::read_to_string(format!("{}/rules", self.dir(port))).unwrap();
        text.lines().filter(|l| l.split_whitespace().any(|w| w == "active")).count()
    }
}

fn instance(n: u32) -> Instance {
    Instance(NonZeroU32::new(n).unwrap())
}

/// With several writers, whatever the machine has.
fn class() -> TcFlowerClass {
    TcFlowerClass::new(TcFlowerConfig { writers: NonZeroUsize::new(3), ..Default::default() })
}

fn bind(name: &str, hw_flags: HwFlags, n: u32) -> Arc<dyn Provider> {
    class().bind(&netdev(name, hw_flags), instance(n)).unwrap()
}

fn forward(tuple: Tuple) -> Forward {
    Forward {
        egress: ifindex("p1"),
        vlan: None,
        mtu: 1500,
        tuple,
        macs: Some(MacRewrite { src: ROUTER, dst: NEXT_HOP }),
        egress_decides: false,
    }
}

fn flow(text: &str) -> Flow {
    let tuple = text.parse().unwrap();
    Flow {
        zone: Zone(0),
        direction: Direction::Original,
        ingress_mtu: 1500,
        matches: FlowMatch { eth_dst: Some(ROUTER), vlan: None, tuple },
        forward: forward(tuple),
        above: Above::default(),
    }
}

fn cookie(n: u32, epoch: u64) -> Cookie {
    Cookie { instance: instance(n), epoch: Epoch(epoch), direction: Direction::Original }
}

fn submit_one(provider: &dyn Provider, request: Request) -> Outcome {
    submit(provider, vec![request]).remove(0)
}

#[test]
fn hardware_probing_is_of_this_netdev_and_leaves_nothing_behind() {
    let nic = Nic::new();
    nic.set("p0", "unsupported", "match-ipv6 act-csum");
    let answer = |provider: &dyn Provider, name: &str| {
        let all = provider.capabilities();
        let found = all.iter().find(|c| c.name == name).unwrap_or_else(|| panic!("{all:?}"));
        (found.software.clone(), found.hardware.clone())
    };
    let p0 = bind("p0", HwFlags::Both, 1);
    let p1 = bind("p1", HwFlags::Both, 1);
    assert_eq!((nic.rules("p0"), nic.rules("p1")), (4, 4), "the TTL guards alone");
    let text = nic.0.run("tc filter show dev p0 ingress");
    assert!(!text.contains("mirred"), "{text}");
    for shape in
        ["match ipv4 tcp", "flow ipv4 udp nat", "flow ipv6 tcp", "action csum", "action vlan"]
    {
        assert_eq!(answer(&*p1, shape), (Some(Ok(())), Some(Ok(()))), "{shape} on p1");
    }
    assert_eq!(answer(&*p1, "action police"), (Some(Ok(())), None), "never in hardware");
    assert_eq!(answer(&*p0, "match ipv4 tcp").1, Some(Ok(())));
    for shape in ["match ipv6 udp", "flow ipv6 tcp", "flow ipv4 tcp", "action csum"] {
        let (software, hardware) = answer(&*p0, shape);
        assert_eq!(software, Some(Ok(())), "{shape}");
        let why = hardware.unwrap().unwrap_err();
        assert!(why.contains("EOPNOTSUPP"), "{shape}: {why}");
    }
    // What software takes is offered.
    assert_eq!(p0.can_offload(&flow("udp [fd01::2]:1 > [fd02::2]:2")), Ok(()));
    p0.release().unwrap();

    nic.set("p0", "unsupported", "match-ipv6");
    let p0 = bind("p0", HwFlags::SkipSw, 2);
    let refused = p0.can_offload(&flow("tcp [fd01::2]:1 > [fd02::2]:2")).unwrap_err();
    assert_eq!(refused.reason, Reason::NotInHardware);
    assert!(refused.detail.as_deref().is_some_and(|d| d.contains("IPv6")), "{refused}");
    assert_eq!(answer(&*p0, "flow ipv4 tcp").0, None, "not tried where it puts no rules");
    let v4 = flow("tcp 10.0.1.2:1 > 10.0.2.2:2");
    let request = Request::Add { cookie: cookie(2, 1), flow: Box::new(v4) };
    assert!(matches!(submit_one(&*p0, request), Ok(Done::Added { in_hw: Some(true), .. })));
    assert_eq!(nic.rules("p0"), 5);
    p0.release().unwrap();
    assert_eq!(nic.rules("p0"), 0);
}

#[test]
fn hardware_that_cannot_change_tags_serves_what_has_none() {
    let nic = Nic::new();
    nic.set("p0", "unsupported", "act-vlan");
    let port = bind("p0", HwFlags::SkipSw, 1);
    let capabilities = port.capabilities();
    for (ip, proto) in [("ipv4", "tcp"), ("ipv4", "udp"), ("ipv6", "tcp"), ("ipv6", "udp")] {
        for does in ["from vlan", "to vlan"] {
            let name = format!("flow {ip} {proto} {does}");
            let found = capabilities.iter().find(|c| c.name == name).expect("a line of the table");
            assert_eq!(found.software, None, "not tried where it puts no rules");
            let why = found.hardware.clone().unwrap().unwrap_err();
            assert!(why.contains("changing VLAN tags (vlan) is not supported"), "{name}: {why}");
        }
    }
    let action =
        capabilities.iter().find(|c| c.name == "action vlan").expect("a line of the table");
    assert!(action.hardware.clone().unwrap().is_err(), "{action:?}");
    let vlan = VlanId::new(10);
    let plain = flow("tcp 10.0.1.2:1 > 10.0.2.2:2");
    let mut tagged = [plain; 2];
    tagged[0].matches.vlan = vlan;
    tagged[1].forward.vlan = vlan;
    for flow in &tagged {
        let refused = port.can_offload(flow).unwrap_err();
        assert_eq!(refused.reason, Reason::NotInHardware);
        assert!(refused.detail.is_some_and(|d| d.contains("VLAN tags")), "the driver's words");
    }
    assert_eq!(port.can_offload(&plain), Ok(()));
    port.release().unwrap();

    nic.set("p0", "unsupported", "\n");
    let port = bind("p0", HwFlags::SkipSw, 2);
    let all = port.capabilities();
    let tags = all.iter().filter(|c| c.name.starts_with("flow") && c.name.ends_with("vlan"));
    assert_eq!(tags.filter(|c| c.hardware == Some(Ok(()))).count(), 8, "{all:?}");
    for (epoch, flow) in (1..).zip(tagged) {
        let request = Request::Add { cookie: cookie(2, epoch), flow: Box::new(flow) };
        assert!(matches!(submit_one(&*port, request), Ok(Done::Added { in_hw: Some(true), .. })));
    }
    port.release().unwrap();
    assert_eq!(nic.rules("p0"), 0);
}

#[test]
fn hardware_rules_of_a_dead_engine_stay_in_the_nic_and_are_adopted() {
    let nic = Nic::new();
    let dead = bind("p0", HwFlags::SkipSw, 1);
    let nat = Flow {
        forward: forward("tcp 10.0.2.1:5000 > 10.0.2.2:80".parse().unwrap()),
        ..flow("tcp 10.0.1.2:4000 > 10.0.2.2:80")
    };
    for (epoch, flow) in [(1, nat), (2, flow("udp [fd01::2]:1 > [fd02::2]:2"))] {
        let request = Request::Add { cookie: cookie(1, epoch), flow: Box::new(flow) };
        assert!(submit_one(&*dead, request).is_ok());
    }
    drop(dead);
    let port = bind("p0", HwFlags::SkipSw, 2);
    assert_eq!(nic.rules("p0"), 6, "four guards, two flows");
    let mut left = port.observe().unwrap().leftovers;
    left.sort_by_key(|l| l.cookie.epoch);
    let adopt = |at: usize, flow: Flow| {
        let found = left[at].rule;
        submit_one(&*port, Request::Adopt { found, cookie: cookie(2, 9), flow: Box::new(flow) })
    };
    assert_eq!(adopt(0, nat), Ok(Done::added(left[0].rule, Some(true))));
    let other = flow("udp [fd01::2]:1 > [fd02::2]:3");
    assert_eq!(adopt(1, other).unwrap_err().reason, Reason::Conflict);
    assert_eq!(nic.rules("p0"), 5);
    port.release().unwrap();
    assert_eq!(nic.rules("p0"), 0);
}

#[test]
fn tc_shows_our_hardware_rules_as_it_shows_those_that_are_written_with_it() {
    let nic = Nic::new();
    let config = TcFlowerConfig { percpu_stats: true, ..TcFlowerConfig::default() };
    let netdev = netdev("p0", HwFlags::SkipSw);
    let port = TcFlowerClass::new(config).bind(&netdev, instance(1)).unwrap();
    let macs = format!("pedit ex munge eth dst set {NEXT_HOP} munge eth src set {ROUTER}");
    // Nothing of such a rule runs in software: its actions have no counters per processor, asked for or not.
    let to = "no_percpu action mirred egress redirect dev p1 no_percpu";
    for (arrival, departure, matches, actions) in [
        (
            "tcp 10.0.1.2:4000 > 10.0.2.2:80",
            "tcp 10.0.2.1:5000 > 10.0.2.2:80",
            "pref 49412 protocol ip flower skip_sw dst_mac {us} ip_proto tcp dst_ip 10.0.2.2 src_ip 10.0.1.2 \
             dst_port 80 src_port 4000 tcp_flags 0x10/0x17 ip_flags nofrag",
            "munge ip src set 10.0.2.1 munge tcp sport set 5000 munge ip ttl dec pipe \
             no_percpu action csum ip4h and tcp pipe",
        ),
        (
            "udp 10.0.1.2:4000 > 10.0.2.9:80",
            "udp 10.0.1.2:4000 > 10.0.2.2:8080",
            "pref 49412 protocol ip flower skip_sw dst_mac {us} ip_proto udp dst_ip 10.0.2.9 src_ip 10.0.1.2 \
             dst_port 80 src_port 4000 ip_flags nofrag",
            "munge ip dst set 10.0.2.2 munge udp dport set 8080 munge ip ttl dec pipe \
             no_percpu action csum ip4h and udp pipe",
        ),
        (
            "udp [fd01::2]:4000 > [fd02::2]:53",
            "udp [fd01::2]:4000 > [fd02::2]:53",
            "pref 49413 protocol ipv6 flower skip_sw dst_mac {us} ip_proto udp dst_ip fd02::2 src_ip fd01::2 \
             dst_port 53 src_port 4000 ip_flags nofrag",
            "munge ip6 hoplimit add 0xff pipe",
        ),
    ] {
        let flow = Flow { forward: forward(departure.parse().unwrap()), ..flow(arrival) };
        let request = Request::Add { cookie: cookie(1, 1), flow: Box::new(flow) };
        let Ok(Done::Added { rule, .. }) = submit_one(&*port, request) else { panic!("{arrival}") };
        let matches = matches.replace("{us}", &ROUTER.to_string());
        let pref = matches.split(' ').nth(1).unwrap();
        let show = || as_shown(&nic.0.run(&format!("tc filter show dev p0 ingress pref {pref}")));
        let ours = show();
        submit_one(&*port, Request::Delete { rule, cookie: cookie(1, 1) }).unwrap();
        nic.0.run(&format!(
            "tc filter add dev p0 ingress handle 1 {matches} action {macs} {actions} {to}"
        ));
        assert_eq!(ours, show());
        nic.0.run(&format!("tc filter del dev p0 ingress pref {pref}"));
    }
    port.release().unwrap();
    assert_eq!(nic.rules("p0"), 0);
}

/// An engine with a clock that the test drives, and `p0` as its port.
struct World {
    engine: Engine,
    clock: Arc<AtomicU64>,
}

impl World {
    fn new(capacity: Option<u32>) -> Self {
        let clock = Arc::new(AtomicU64::new(1000));
        let engine = Engine::new(
            NonZeroU32::MIN,
            Arc::new(NoDatapath),
            Limits::default(),
            Clock::Manual(Arc::clone(&clock)),
        );
        engine.register(Arc::new(class())).unwrap();
        let new = NewPort {
            ifindex: ifindex("p0"),
            name: "p0".into(),
            hw_flags: HwFlags::SkipSw,
            providers: None,
            capacity,
        };
        engine.port_add(new).unwrap();
        assert_eq!(
            engine.ports()[0].provider,
            Some("tc-flower"),
            "{:?}",
            engine.ports()[0].refusals
        );
        Self { engine, clock }
    }

    fn conn(&self, n: u16) -> ConnHandle {
        let original: Tuple = format!("tcp 10.0.1.2:{n} > 10.0.2.2:80").parse().unwrap();
        let key = ConnKey { zone: Zone(0), original };
        self.engine.conn_create(key, original.inverted(), u64::from(n)).unwrap()
    }

    /// Offers it, and returns what became of that.
    fn offer(&self, conn: &ConnHandle) -> (SlotState, Option<Reason>) {
        let path = Path {
            eth_dst: Some(ROUTER),
            vlan: None,
            ingress_mtu: 1500,
            forward: forward(conn.key().original),
            next_hop: None,
            iif: None,
            oif: None,
            answer: 0,
        };
        let worker = self.engine.worker();
        let port = worker.port(ifindex("p0")).unwrap();
        let _ = port.conn_seen(conn, Direction::Original, PathSpec::Known(Box::new(path)));
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let slot = self.engine.slots(conn).into_iter().next();
            match slot.map(|s| (s.state, s.rejection.map(|r| r.reason))) {
                Some(done @ (SlotState::Installed | SlotState::Rejected, _)) => return done,
                other => assert!(Instant::now() < deadline, "{other:?}"),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn hardware_that_is_full_teaches_the_port_its_capacity_and_idle_rules_give_way() {
    let nic = Nic::new();
    let w = World::new(None);
    // Four guards, and three flows.
    nic.set("p0", "capacity", "7");
    let conns: Vec<_> = (1..=5).map(|n| w.conn(n)).collect();
    for conn in &conns[..3] {
        assert_eq!(w.offer(conn), (SlotState::Installed, None));
    }
    assert_eq!(w.offer(&conns[3]), (SlotState::Rejected, Some(Reason::TableFull)));
    let port = &w.engine.ports()[0];
    assert_eq!((port.capacity, port.capacity_learnt), (Some(3), true));
    for _ in 0..13 {
        w.clock.fetch_add(1000, Ordering::SeqCst);
        let sweep = w.engine.sweep(&mut Strays::default());
        assert_eq!((sweep.rules, sweep.faults.len()), (3, 0));
    }
    // None of them has carried anything for more than ten seconds.
    assert_eq!(w.offer(&conns[4]), (SlotState::Installed, None));
    assert_eq!(nic.rules("p0"), 7, "one went, one came");
    let port = &w.engine.ports()[0];
    assert_eq!((port.slots.installed, port.evictions), (3, 1));
    assert!(w.engine.close().iter().all(|d| d.faults.is_empty()));
    assert_eq!(nic.rules("p0"), 0);
}

/// Whichever of the port's writers the two are given to.
#[test]
fn hardware_that_is_full_has_room_for_what_comes_behind_the_delete_that_makes_it() {
    let nic = Nic::new();
    let port = bind("p0", HwFlags::SkipSw, 1);
    nic.set("p0", "capacity", "12");
    let add = |epoch: u64| {
        let flow = Box::new(flow(&format!("tcp 10.0.1.2:{} > 10.0.2.2:80", 1000 + epoch)));
        Request::Add { cookie: cookie(1, epoch), flow }
    };
    let added = submit(&*port, (0..8).map(add).collect());
    let rules = (0..8).zip(added).map(|(epoch, outcome)| match outcome {
        Ok(Done::Added { rule, .. }) => (epoch, rule),
        other => panic!("{epoch}: {other:?}"),
    });
    assert_eq!(submit_one(&*port, add(8)).unwrap_err().reason, Reason::TableFull);
    let changes = rules.flat_map(|(epoch, rule)| {
        [Request::Delete { rule, cookie: cookie(1, epoch) }, add(100 + epoch)]
    });
    let outcomes = submit(&*port, changes.collect());
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    assert_eq!(nic.rules("p0"), 12);
    port.release().unwrap();
}

#[test]
fn hardware_is_not_asked_for_more_than_was_configured() {
    let nic = Nic::new();
    let w = World::new(Some(2));
    for n in 1..=2 {
        assert_eq!(w.offer(&w.conn(n)), (SlotState::Installed, None));
    }
    assert_eq!(w.offer(&w.conn(3)), (SlotState::Rejected, Some(Reason::TableFull)));
    assert_eq!(nic.rules("p0"), 6);
    let port = &w.engine.ports()[0];
    assert_eq!((port.capacity, port.capacity_learnt), (Some(2), false));
    w.engine.close();
}

/// What software would have done with a packet first, a rule in the NIC does not pass by.
#[test]
fn rules_leave_the_nic_while_others_are_in_front_in_software() {
    let nic = Nic::new();
    let udp = "udp 10.0.1.2:1 > 10.0.2.2:2";
    let theirs = "tc filter add dev p0 ingress prio 5 protocol ip";
    let add = |p0: &Arc<dyn Provider>, epoch| {
        let request = Request::Add { cookie: cookie(1, epoch), flow: Box::new(flow(udp)) };
        submit_one(&**p0, request)
    };
    let guards = 4;
    for (n, in_front) in
        (0..).zip(["u32 match u32 0 0 action continue", "matchall skip_hw action continue"])
    {
        let p0 = bind("p0", HwFlags::Both, 1);
        add(&p0, 1).unwrap();
        assert_eq!(nic.rules("p0"), guards + 1);
        // The NIC has this one too, and in front of ours.
        nic.0.run(&format!("{theirs} flower dst_ip 192.0.2.1 action drop"));
        assert_eq!(p0.repair(), Repaired::AsItWas);
        assert_eq!(nic.rules("p0"), guards + 2);
        assert_eq!(p0.in_front(), ["flower at prio 5 (ip): gact"]);
        nic.0.run(&format!("tc filter del dev p0 ingress prio 5 && {theirs} {in_front}"));
        assert_eq!(p0.repair(), Repaired::RulesGone, "{in_front}");
        assert_eq!(nic.rules("p0"), guards, "{in_front}");
        assert!(p0.describe().contains("none in hardware"), "{}", p0.describe());
        match add(&p0, 2) {
            Ok(Done::Added { in_hw: Some(false), .. }) => {}
            other => panic!("{in_front}: {other:?}"),
        }
        assert_eq!(nic.rules("p0"), guards, "behind it, in software");
        // A sweep finds what nobody has told of.
        if n == 0 {
            nic.0.run("tc filter del dev p0 ingress prio 5");
            let fault = p0.usage(&mut |_| ()).unwrap_err();
            assert!(fault.to_string().contains("in front"), "{fault}");
        } else {
            nic.0.run("tc filter del dev p0 ingress prio 5");
        }
        assert_eq!(p0.repair(), Repaired::RulesGone);
        add(&p0, 3).unwrap();
        assert_eq!(nic.rules("p0"), guards + 1);
        p0.release().unwrap();
    }
    // Where there are no rules in software, there are none.
    let p0 = bind("p0", HwFlags::SkipSw, 1);
    add(&p0, 1).unwrap();
    nic.0.run(&format!("{theirs} matchall skip_hw action continue"));
    assert_eq!(p0.repair(), Repaired::RulesGone);
    assert_eq!(nic.rules("p0"), guards);
    let refused = p0.can_offload(&flow(udp)).unwrap_err();
    assert_eq!(refused.reason, Reason::OthersInFront);
    assert_eq!(add(&p0, 2).unwrap_err().reason, Reason::OthersInFront);
    p0.release().unwrap();
    // Likewise when it was there before.
    nic.0.run(&format!(
        "tc qdisc add dev p0 clsact || true; {theirs} matchall skip_hw action continue || true"
    ));
    let p0 = bind("p0", HwFlags::SkipSw, 1);
    assert_eq!(add(&p0, 1).unwrap_err().reason, Reason::OthersInFront);
    p0.release().unwrap();
}
