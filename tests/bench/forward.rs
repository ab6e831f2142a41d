//! Benchmarks of forwarding: packets of 64 bytes through a router, by the kernel's slow path, by rules of
//! the tc-flower provider in software, by a flower rule that rewrites nothing, by those of the ebpf provider at tcx, by
//! nf_tables' own flowtable, by that of the nf-flowtable provider, and by a NIC. pktgen hands them to a
//! port's stack as a driver would, and before the other port's driver they end, so that what is measured is
//! the router between. Run by `scripts/bench forward`, which says what comes out, in the lab.

#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

#[allow(dead_code, reason = "shared with the other suites")]
mod measure;
#[path = "kernel/pktgen.rs"]
mod pktgen;
#[allow(dead_code, reason = "shared with the other suites")]
mod report;
#[path = "kernel/setting.rs"]
mod setting;
#[allow(dead_code, reason = "shared with the other suites")]
#[path = "kernel/world.rs"]
mod world;

use std::fs::File;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use measure::Samples;
use netdev_providers::ebpf::{EbpfClass, EbpfConfig, Mode};
use netdev_providers::nf_flowtable::NfFlowtableClass;
use netdev_providers::tc_flower::TcFlowerClass;
use netdev_providers::{
    Above, Cookie, Direction, Done, Epoch, Flow, FlowMatch, Forward, Generation, HwFlags, Instance,
    L4Proto, MacAddr, MacRewrite, Netdev, Operation, Outcome, Provider, ProviderClass, Request,
    Ticket, Tuple, Zone,
};
use nix::sched::{CloneFlags, setns};
use pktgen::{Generator, Into, Stream};
use report::{Bar, Figure, Report};
use setting::Setting;
use world::{ifindex, sh};

const USAGE: &str = "forward --on WHERE [--native] [--nic] [--quick] [--out FILE]

  --on WHERE  the machine's name in the figures, e.g. 'emulated 6.12'
  --native    at the machine's own speed: the bar for that
  --nic       also through a NIC (tests/simnic)
  --quick     few packets and rounds: to see that it runs, not to believe the figures
  --out FILE  write the figures there as JSON";

/// The router's ports, and the far ends of their wires.
const LAN_PORT: &str = "lan0";
const WAN_PORT: &str = "wan0";
const CLIENT_END: &str = "c0";
const SERVER_END: &str = "s0";
const LAN: MacAddr = MacAddr([2, 0, 0, 0, 1, 1]);
const CLIENT: MacAddr = MacAddr([2, 0, 0, 0, 1, 2]);
const WAN: MacAddr = MacAddr([2, 0, 0, 0, 2, 1]);
const SERVER: MacAddr = MacAddr([2, 0, 0, 0, 2, 2]);
/// The connection: what the client sends from and to.
const FROM: ([u8; 4], u16) = ([10, 0, 1, 2], 4000);
const TO: ([u8; 4], u16) = ([10, 0, 2, 2], 5300);

/// How often each contestant sends in a round.
const GOES: u64 = 5;

const NIC: &str = "--nic";

fn main() -> ExitCode {
    let setting = match Setting::read(USAGE, &[NIC]) {
        Ok(setting) => setting,
        Err(status) => return status,
    };
    let mut report = Report::default();
    world::private_network();
    rates(&mut report, &setting.on, setting.native, setting.quick);
    if setting.has(NIC) {
        // Another router: the first one has the same addresses and names.
        sh("ip netns del c0 && ip netns del s0");
        world::private_network();
        hardware(&mut report, &setting.on, setting.quick);
    }
    report::finish(&report, setting.out.as_deref())
}

/// `client c0 --- lan0 [router: the calling thread's network namespace] wan0 --- s0 server`, of netdevs of
/// that kind. The client and the server have a network namespace each. Nothing is on their wires but what
/// is sent here: no IPv6, and neighbours that need not be asked.
fn router(kind: &str) {
    let quiet = "test ! -e /proc/sys/net/ipv6 || sysctl -qw net.ipv6.conf.default.disable_ipv6=1";
    sh(&format!("{quiet}; sysctl -qw net.ipv4.ip_forward=1"));
    for (port, mac, wire, far, net) in
        [(LAN_PORT, LAN, CLIENT_END, CLIENT, 1), (WAN_PORT, WAN, SERVER_END, SERVER, 2)]
    {
        sh(&format!(
            "set -e
             ip link add name {port} address {mac} type {kind} peer name {wire} address {far}
             ip netns add {wire}; ip netns exec {wire} sh -c '{quiet}'; ip link set {wire} netns {wire}
             ip -n {wire} link set {wire} up; ip link set {port} up
             ip addr add 10.0.{net}.1/24 dev {port}
             ip neigh replace 10.0.{net}.2 lladdr {far} dev {port}"
        ));
    }
}

/// Packets that a netdev has received; `at` may be an option of ip(8).
fn received(at: &str, netdev: &str) -> u64 {
    let counted = sh(&format!("ip {at} -s -j link show {netdev} | jq '.[].stats64.rx.packets'"));
    counted.trim().parse().unwrap()
}

/// Takes what is to leave by `wan0`, and counts it: no wire, and nobody behind it, has a share in what is
/// measured.
const SINK: &str =
    "tc qdisc add dev wan0 clsact && tc filter add dev wan0 egress matchall action trap";

fn sunk() -> u64 {
    let packets = ".[].options.actions[]?.stats.packets";
    let counted = sh(&format!("tc -s -j filter show dev wan0 egress | jq '[{packets}] | add'"));
    counted.trim().parse().unwrap()
}

/// What the client says to the server.
fn question() -> Stream {
    Stream { macs: [CLIENT, LAN].map(|mac| mac.to_string()), from: FROM, to: TO }
}

fn answer() -> Stream {
    Stream { macs: [SERVER, WAN].map(|mac| mac.to_string()), from: TO, to: FROM }
}

/// A packet each way: conntrack knows all that there is to know.
fn converse() {
    for (port, stream) in [(LAN_PORT, question()), (WAN_PORT, answer())] {
        Generator::new(port, Into::Stack, &stream).send(1);
    }
}

/// Which way packets take.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Slow,
    /// Around it: what is forwarded there is not counted as forwarded.
    Fast,
}

/// Sends, and says how many packets were forwarded per second; all must, and by that way.
fn rate(count: u64, way: Way) -> f64 {
    let (before, slowly_before) = (sunk(), slowly_forwarded());
    let (sent, rate) = fastest(count);
    let (forwarded, slowly) = (sunk() - before, slowly_forwarded() - slowly_before);
    assert_eq!(forwarded, sent, "packets that left");
    assert_eq!(slowly, if way == Way::Slow { sent } else { 0 }, "packets on the slow path");
    rate
}

/// How many packets are sent in all, and per second in the fastest of a few goes: in the others the
/// machine did something else as well.
fn fastest(count: u64) -> (u64, f64) {
    let generator = Generator::new(LAN_PORT, Into::Stack, &question());
    let took = (0..GOES).map(|_| generator.send(count)).min();
    (GOES * count, count as f64 / took.expect("a few").as_secs_f64())
}

/// Packets that this router's IPv4 has forwarded (`ForwDatagrams`).
fn slowly_forwarded() -> u64 {
    let counters = std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
    let mut lines = counters.lines().filter_map(|line| line.strip_prefix("Ip: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let mut columns = names.split(' ').zip(values.split(' '));
    columns.find(|(name, _)| *name == "ForwDatagrams").unwrap().1.parse().unwrap()
}

/// The ruleset that packets meet on the slow path: conntrack, a NAT hook, a filter.
const SLOW: &str = "nft 'table ip fw {
    chain post { type nat hook postrouting priority 100; oifname \"nosuch0\" masquerade; }
    chain forwarding { type filter hook forward priority 0; ct state established,related accept; accept; }
}'";
const NO_RULESET: &str = "nft delete table ip fw";
/// The same with a flowtable that takes the connection.
const FLOWTABLE: &str = "nft 'table ip fw {
    flowtable f { hook ingress priority 0; devices = { lan0, wan0 }; }
    chain post { type nat hook postrouting priority 100; oifname \"nosuch0\" masquerade; }
    chain forwarding { type filter hook forward priority 0; ip protocol udp flow add @f; ct state established,related accept; accept; }
}'";

/// Matches what a rule of ours does, and only redirects: the most that flower can do for a packet.
fn redirect_alone() -> String {
    let [from, to] = [FROM, TO].map(|(address, _)| std::net::Ipv4Addr::from(address));
    let ports = format!("src_port {} dst_port {}", FROM.1, TO.1);
    format!(
        "tc qdisc add dev {LAN_PORT} clsact && tc filter add dev {LAN_PORT} ingress protocol ip \
         flower skip_hw dst_mac {LAN} ip_proto udp src_ip {from} dst_ip {to} {ports} ip_flags nofrag \
         action mirred egress redirect dev {WAN_PORT}"
    )
}

fn rates(report: &mut Report, on: &str, native: bool, quick: bool) {
    router("veth");
    sh(SINK);
    let (count, rounds) = match (quick, native) {
        (true, true) => (20_000, 3),
        (true, false) => (2_000, 3),
        (false, true) => (100_000, 21),
        (false, false) => (5_000, 21),
    };
    let (mut slow, mut ours) = (Samples::default(), Samples::default());
    let (mut flowtable, mut alone) = (Samples::default(), Samples::default());
    let (mut our_flowtable, mut redirected) = (Samples::default(), Samples::default());
    let mut tcx = Samples::default();
    for _ in 0..rounds {
        sh(SLOW);
        converse();
        slow.push(rate(count, Way::Slow));
        {
            // The same connection, in the same ruleset, with a rule on the netdev that it arrives at.
            let port = bind(&TcFlowerClass::default(), LAN_PORT, HwFlags::SkipHw);
            add(&port, Direction::Original);
            ours.push(rate(count, Way::Fast));
            release(&port);
        }
        // User-mode Linux has no JIT: its figures of BPF would say nothing.
        if !native {
            let class = EbpfConfig {
                mode: Some(Mode::Tcx),
                pins: "/nowhere".into(),
                ..EbpfConfig::default()
            };
            let port = bind(&EbpfClass::new(class), LAN_PORT, HwFlags::SkipHw);
            add(&port, Direction::Original);
            tcx.push(rate(count, Way::Fast));
            release(&port);
        }
        sh(&redirect_alone());
        redirected.push(rate(count, Way::Fast));
        sh(NO_CLSACT);
        // The provider's table is of family inet, which the kernel for the machine's own speed lacks.
        if !native {
            let class = NfFlowtableClass::default();
            let ports = [LAN_PORT, WAN_PORT].map(|port| bind(&class, port, HwFlags::SkipHw));
            add(&ports[0], Direction::Original);
            add(&ports[1], Direction::Reply);
            converse();
            our_flowtable.push(rate(count, Way::Fast));
            ports.iter().for_each(release);
        }
        sh(NO_RULESET);
        sh(FLOWTABLE);
        converse();
        flowtable.push(rate(count, Way::Fast));
        sh(NO_RULESET);
        alone.push(dropped(count));
    }
    let name = format!("64-byte packets, flower over the slow path ({on})");
    let figure = Figure::new(name, ours.over(&slow).median(), "x")
        .peer("flower pps", ours.median())
        .peer("slow path pps", slow.median())
        .peer("dropped on arrival pps", alone.median())
        .note("'dropped on arrival': what the generator and the arrival take, in all of them");
    report.add(if native { figure } else { figure.bar(Bar::AtLeast(1.3)) });
    if !native {
        report.add(
            Figure::new(
                format!("64-byte packets, ebpf at tcx over nft flowtable ({on})"),
                tcx.over(&flowtable).median(),
                "x",
            )
            .bar(Bar::AtLeast(1.1))
            .peer("tcx pps", tcx.median())
            .peer("flowtable pps", flowtable.median()),
        );
    }
    report.add(
        Figure::new(
            format!("64-byte packets, flower over nft flowtable ({on})"),
            ours.over(&flowtable).median(),
            "x",
        )
        .peer("flower pps", ours.median())
        .peer("flowtable pps", flowtable.median()),
    );
    for (than, what) in [(&slow, "the slow path"), (&flowtable, "nft flowtable")] {
        let name = format!("64-byte packets, a flower rule that only redirects over {what} ({on})");
        report.add(
            Figure::new(name, redirected.over(than).median(), "x")
                .peer("only redirects pps", redirected.median())
                .peer("flower pps", ours.median())
                .note("it rewrites nothing: the most that flower can do for a packet"),
        );
    }
    if !native {
        report.add(
            Figure::new(
                format!("64-byte packets, nf-flowtable over the slow path ({on})"),
                our_flowtable.over(&slow).median(),
                "x",
            )
            .peer("nf-flowtable pps", our_flowtable.median())
            .peer("nft flowtable pps", flowtable.median())
            .peer("slow path pps", slow.median()),
        );
    }
}

/// What the generator can do: everything is dropped where it arrives.
fn dropped(count: u64) -> f64 {
    sh(&format!(
        "tc qdisc add dev {LAN_PORT} clsact && tc filter add dev {LAN_PORT} ingress matchall action drop"
    ));
    let (_, rate) = fastest(count);
    sh(NO_CLSACT);
    rate
}

const NO_CLSACT: &str = "tc qdisc del dev lan0 clsact";

fn bind(class: &dyn ProviderClass, name: &str, hw_flags: HwFlags) -> Arc<dyn Provider> {
    let netdev = Netdev {
        ifindex: ifindex(name),
        generation: Generation::new(1).unwrap(),
        name: name.into(),
        hw_flags,
    };
    let instance = Instance(1.try_into().unwrap());
    class.bind(&netdev, instance).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn release(port: &Arc<dyn Provider>) {
    port.flush().expect("flushed");
    port.release().expect("released");
}

/// Adds one direction of the connection, on the port that its packets arrive at.
fn add(port: &Arc<dyn Provider>, direction: Direction) {
    let (from, to, arrives, leaves, egress) = match direction {
        Direction::Original => (FROM, TO, LAN, MacRewrite { src: WAN, dst: SERVER }, WAN_PORT),
        Direction::Reply => (TO, FROM, WAN, MacRewrite { src: LAN, dst: CLIENT }, LAN_PORT),
    };
    let tuple = Tuple::new(L4Proto::Udp, from.0.into(), from.1, to.0.into(), to.1).unwrap();
    let flow = Flow {
        zone: Zone(0),
        direction,
        ingress_mtu: 1500,
        matches: FlowMatch { eth_dst: Some(arrives), vlan: None, tuple },
        forward: Forward {
            egress: ifindex(egress),
            vlan: None,
            mtu: 1500,
            tuple,
            macs: Some(leaves),
            egress_decides: false,
        },
        above: Above::default(),
    };
    port.can_offload(&flow).expect("a flow that can be offloaded");
    let instance = Instance(1.try_into().unwrap());
    let cookie = Cookie { instance, epoch: Epoch(1), direction };
    let (tx, rx) = mpsc::channel();
    let ticket = Ticket::new(Box::new(move |o: Outcome| tx.send(o).unwrap()));
    port.submit(vec![Operation { request: Request::Add { cookie, flow: Box::new(flow) }, ticket }]);
    port.submit(Vec::new());
    match rx.recv().unwrap() {
        Ok(Done::Added { .. }) => {}
        other => panic!("the rule was not added: {other:?}"),
    }
}

/// Through the NIC, from wire to wire: how many of the packets the host sees.
fn hardware(report: &mut Report, on: &str, quick: bool) {
    let (c, s) = (CLIENT_END, SERVER_END);
    router("simnic");
    sh(SLOW);
    converse();
    let count = if quick { 2_000 } else { 25_000 };
    let port = bind(&TcFlowerClass::default(), LAN_PORT, HwFlags::SkipSw);
    add(&port, Direction::Original);
    let seen = || received("", LAN_PORT);
    let arrived = || received(&format!("-n {s}"), s);
    let (host_before, wire_before) = (seen(), arrived());
    let send = || {
        let netns = File::open(format!("/run/netns/{c}")).expect("a network namespace");
        setns(netns, CloneFlags::CLONE_NEWNET).unwrap();
        Generator::new(c, Into::Wire, &question()).send(count);
    };
    std::thread::scope(|scope| scope.spawn(send).join().unwrap());
    std::thread::sleep(Duration::from_millis(500));
    let (host, wire) = (seen() - host_before, arrived() - wire_before);
    assert_eq!(wire, count, "packets on the far wire");
    port.release().expect("released");
    sh(NO_RULESET);
    report.add(
        Figure::new(
            format!("packets that the host sees, rules in a NIC ({on})"),
            Some(host as f64),
            "packets",
        )
        .bar(Bar::AtMost(0.0))
        .peer("forwarded by the NIC", Some(wire as f64)),
    );
}
