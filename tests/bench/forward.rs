//! Benchmarks of forwarding: packets of 64 bytes through a router, by the kernel's slow path, by rules of
//! the tc-flower provider in software, by nf_tables' own flowtable, and by a NIC. Run by `scripts/bench
//! forward`, which says what comes out, in the lab.

#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

#[path = "kernel/generator.rs"]
mod generator;
#[allow(dead_code, reason = "shared with the other suites")]
mod measure;
#[allow(dead_code, reason = "shared with the other suites")]
mod report;
#[path = "kernel/setting.rs"]
mod setting;
#[allow(dead_code, reason = "shared with the other suites")]
#[path = "kernel/world.rs"]
mod world;

use std::fs::File;
use std::net::{SocketAddr, UdpSocket};
use std::process::{Command, ExitCode};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use generator::{Generator, udp_frame};
use measure::Samples;
use netdev_providers::tc_flower::TcFlowerClass;
use netdev_providers::{
    Above, Cookie, Direction, Done, Epoch, Flow, FlowMatch, Forward, Generation, HwFlags, Instance,
    L4Proto, MacAddr, MacRewrite, Netdev, Operation, Outcome, Provider, ProviderClass, Request,
    Ticket, Tuple, Zone,
};
use nix::sched::{CloneFlags, setns};
use report::{Bar, Figure, Report};
use setting::Setting;
use world::{ifindex, sh};

const USAGE: &str = "forward --on WHERE [--native] [--nic] [--quick] [--out FILE]

  --on WHERE  the machine's name in the figures, e.g. 'emulated 6.12'
  --native    at the machine's own speed: the bar for that
  --nic       also through a NIC (tests/simnic)
  --quick     few packets and rounds: to see that it runs, not to believe the figures
  --out FILE  write the figures there as JSON";

const LAN: MacAddr = MacAddr([2, 0, 0, 0, 1, 1]);
const CLIENT: MacAddr = MacAddr([2, 0, 0, 0, 1, 2]);
const WAN: MacAddr = MacAddr([2, 0, 0, 0, 2, 1]);
const SERVER: MacAddr = MacAddr([2, 0, 0, 0, 2, 2]);
/// The connection: what the client sends from and to.
const FROM: ([u8; 4], u16) = ([10, 0, 1, 2], 4000);
const TO: ([u8; 4], u16) = ([10, 0, 2, 2], 5300);

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
        // Another router: the first one has the same addresses.
        world::private_network();
        hardware(&mut report, &setting.on, setting.quick);
    }
    report::finish(&report, setting.out.as_deref())
}

/// `client c0 --- LAN0 [router: this thread's namespace] WAN0 --- s0 server`
struct Net {
    lan: String,
    wan: String,
}

impl Net {
    /// `link` makes a port of the first name with a wire of the second.
    fn new(name: &str, link: impl Fn(&str, MacAddr, &str, MacAddr) -> String) -> Self {
        let (lan, wan) = (format!("lan{name}"), format!("wan{name}"));
        let (c, s) = (format!("c{name}"), format!("s{name}"));
        // Nothing is on the wires but what is sent here: no IPv6, and neighbours that need not be asked.
        let quiet = "sh -c '! test -e /proc/sys/net/ipv6 || sysctl -qw net.ipv6.conf.default.disable_ipv6=1'";
        sh(&format!("{quiet} && sysctl -qw net.ipv4.ip_forward=1"));
        sh(&link(&lan, LAN, &c, CLIENT));
        sh(&link(&wan, WAN, &s, SERVER));
        for (port, wire, net, mac, far) in [(&lan, &c, 1, LAN, CLIENT), (&wan, &s, 2, WAN, SERVER)]
        {
            sh(&format!(
                "ip netns add {wire} && ip netns exec {wire} {quiet} && ip link set {wire} netns {wire}
                 ip addr add 10.0.{net}.1/24 dev {port} && ip link set {port} up
                 ip -n {wire} link set lo up && ip -n {wire} link set {wire} up
                 ip -n {wire} addr add 10.0.{net}.2/24 dev {wire}
                 ip -n {wire} route add default via 10.0.{net}.1
                 ip -n {wire} neigh replace 10.0.{net}.1 lladdr {mac} dev {wire}
                 ip neigh replace 10.0.{net}.2 lladdr {far} dev {port}"
            ));
        }
        Self { lan, wan }
    }

    fn client(&self) -> String {
        self.lan.replace("lan", "c")
    }

    fn server(&self) -> String {
        self.wan.replace("wan", "s")
    }

    /// A question and an answer, by sockets: conntrack and the neighbours know all that there is to
    /// know.
    fn converse(&self) {
        let at = |(ip, port): ([u8; 4], u16)| SocketAddr::from((ip, port));
        let (ready, asked) = mpsc::channel();
        let server = self.server();
        let answering = std::thread::spawn(move || {
            inside(&server);
            let socket = UdpSocket::bind(at(TO)).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            ready.send(()).unwrap();
            let (_, who) = socket.recv_from(&mut [0; 16]).expect("the client's question");
            socket.send_to(b"answer", who).unwrap();
        });
        asked.recv().unwrap();
        let client = self.client();
        std::thread::spawn(move || {
            inside(&client);
            let socket = UdpSocket::bind(at(FROM)).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            socket.send_to(b"question", at(TO)).unwrap();
            socket.recv(&mut [0; 16]).expect("the server's answer");
        })
        .join()
        .unwrap();
        answering.join().unwrap();
        // From now on packets are only counted: nobody answers, with an ICMP error for instance.
        let (s, wire) = (self.server(), self.server());
        sh(&format!(
            "ip netns exec {s} tc qdisc replace dev {wire} clsact
             ip netns exec {s} tc filter replace dev {wire} ingress prio 1 handle 1 protocol all matchall action drop"
        ));
    }

    fn forget_server_filter(&self) {
        let (s, wire) = (self.server(), self.server());
        sh(&format!("ip netns exec {s} tc qdisc del dev {wire} clsact 2>/dev/null || true"));
    }

    fn generator(&self) -> Generator {
        let client = self.client();
        std::thread::spawn(move || {
            inside(&client);
            let frame = udp_frame(LAN.0, CLIENT.0, FROM, TO);
            Generator::open(ifindex(&client), &frame).expect("a transmit ring")
        })
        .join()
        .unwrap()
    }

    /// Packets that have arrived at the server's end of the wire.
    fn arrived(&self) -> u64 {
        let server = self.server();
        received(&format!("-n {server}"), &server)
    }
}

/// Packets that a netdev has received, in the network namespace that this option of ip(8) names.
fn received(netns: &str, netdev: &str) -> u64 {
    let counted =
        sh(&format!("ip {netns} -s -j link show dev {netdev} | jq '.[].stats64.rx.packets'"));
    counted.trim().parse().unwrap()
}

fn inside(netns: &str) {
    let file = File::open(format!("/run/netns/{netns}")).expect("a network namespace");
    setns(file, CloneFlags::CLONE_NEWNET).unwrap();
}

fn veth() -> Net {
    Net::new("0", |port, mac, wire, far| {
        format!("ip link add {port} address {mac} type veth peer name {wire} address {far}")
    })
}

/// Which way packets take.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Slow,
    /// Around it: what is forwarded there is not counted as forwarded.
    Fast,
}

/// Sends, and says how many packets arrived per second; all must, and by that way.
fn rate(net: &Net, generator: &mut Generator, rings: usize, way: Way) -> f64 {
    generator.send(2).expect("sent");
    let (before, slowly_before) = (net.arrived(), slowly_forwarded());
    let started = Instant::now();
    let sent = generator.send(rings).expect("sent");
    let took = started.elapsed().as_secs_f64();
    let (arrived, slowly) = (net.arrived() - before, slowly_forwarded() - slowly_before);
    assert!(arrived * 100 >= sent * 99, "{arrived} of {sent} packets arrived");
    let expected = if way == Way::Slow { sent } else { 0 };
    assert_eq!(slowly, expected, "packets of {sent} on the slow path");
    arrived as f64 / took
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
/// The same where nf_tables has no IPv4 (user-mode Linux).
const SLOW_IPTABLES: &str = "
    iptables-legacy -t nat -A POSTROUTING -o nosuch0 -j MASQUERADE &&
    iptables-legacy -A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT";
const NO_IPTABLES: &str = "iptables-legacy -t nat -F && iptables-legacy -F";
const NO_NFT: &str = "nft delete table ip fw";
/// The same with a flowtable that takes the connection.
const FLOWTABLE: &str = "nft 'table ip fw {
    flowtable f { hook ingress priority 0; devices = { lan0, wan0 }; }
    chain post { type nat hook postrouting priority 100; oifname \"nosuch0\" masquerade; }
    chain forwarding { type filter hook forward priority 0; ip protocol udp flow add @f; ct state established,related accept; accept; }
}'";

/// What of nf_tables the kernel has, asked with the least that needs it: a ruleset above that fails is
/// an error, not a kernel that lacks something.
struct NfTables {
    ipv4: bool,
    flow: bool,
}

impl NfTables {
    fn of_this_kernel() -> Self {
        let chain = "chain c { type filter hook forward priority 0;";
        Self {
            ipv4: Self::takes(&format!("{chain} }}")),
            flow: Self::takes(&format!(
                "flowtable f {{ hook ingress priority 0; devices = {{ lo }}; }}; {chain} ip protocol udp flow add @f; }}"
            )),
        }
    }

    fn takes(table: &str) -> bool {
        let probe = format!("table ip probe {{ {table}; }}");
        let checked = Command::new("nft").args(["--check", &probe]).output().expect("nft");
        let said = String::from_utf8_lossy(&checked.stderr);
        // What the kernel refuses, and not nft itself.
        assert!(
            checked.status.success() || said.contains("Could not process rule"),
            "nft --check '{probe}': {said}"
        );
        checked.status.success()
    }
}

fn rates(report: &mut Report, on: &str, native: bool, quick: bool) {
    let net = veth();
    let mut generator = net.generator();
    let (rings, rounds) = match (quick, native) {
        (true, _) => (8, 2),
        (_, true) => (2000, 9),
        (_, false) => (40, 15),
    };
    let (mut slow, mut ours) = (Samples::default(), Samples::default());
    let (mut flowtable, mut alone) = (Samples::default(), Samples::default());
    let nf_tables = NfTables::of_this_kernel();
    let (slow_path, no_slow_path) =
        if nf_tables.ipv4 { (SLOW, NO_NFT) } else { (SLOW_IPTABLES, NO_IPTABLES) };
    for _ in 0..rounds {
        sh(slow_path);
        net.converse();
        slow.push(rate(&net, &mut generator, rings, Way::Slow));
        {
            // The same connection, in the same ruleset, with a rule on the netdev that it arrives at.
            let port = bind(&net.lan, HwFlags::SkipHw);
            add(&port, &net);
            ours.push(rate(&net, &mut generator, rings, Way::Fast));
            port.flush().expect("flushed");
            port.release().expect("released");
        }
        net.forget_server_filter();
        sh(no_slow_path);
        if nf_tables.flow {
            sh(FLOWTABLE);
            net.converse();
            flowtable.push(rate(&net, &mut generator, rings, Way::Fast));
            net.forget_server_filter();
            sh(NO_NFT);
        } else {
            flowtable.push(f64::NAN);
        }
        alone.push(generator_alone(&net, &mut generator, rings));
    }
    let name = format!("64-byte packets, flower over the slow path ({on})");
    let figure = Figure::new(name, ours.over(&slow).median(), "x")
        .peer("flower pps", ours.median())
        .peer("slow path pps", slow.median())
        .peer("dropped on arrival pps", alone.median())
        .note("'dropped on arrival': what the generator and the wire take, in all of them");
    report.add(if native { figure.bar(Bar::AtLeast(1.8)) } else { figure });
    let name = format!("64-byte packets, flower over nft flowtable ({on})");
    let figure = Figure::new(name, ours.over(&flowtable).median(), "x")
        .bar(Bar::AtLeast(1.0))
        .peer("flowtable pps", flowtable.median());
    report.add(if nf_tables.flow {
        figure
    } else {
        figure.note("this kernel has no flow expression")
    });
}

/// What the generator can do: everything is dropped where it arrives.
fn generator_alone(net: &Net, generator: &mut Generator, rings: usize) -> f64 {
    let lan = &net.lan;
    sh(&format!(
        "tc qdisc add dev {lan} clsact && tc filter add dev {lan} ingress matchall action drop"
    ));
    generator.send(2).expect("sent");
    let started = Instant::now();
    let sent = generator.send(rings).expect("sent");
    let rate = sent as f64 / started.elapsed().as_secs_f64();
    sh(&format!("tc qdisc del dev {lan} clsact"));
    rate
}

fn bind(name: &str, hw_flags: HwFlags) -> Arc<dyn Provider> {
    let netdev = Netdev {
        ifindex: ifindex(name),
        generation: Generation::new(1).unwrap(),
        name: name.into(),
        hw_flags,
    };
    let instance = Instance(1.try_into().unwrap());
    TcFlowerClass::default().bind(&netdev, instance).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Adds the rule of the connection's original direction.
fn add(port: &Arc<dyn Provider>, net: &Net) {
    let tuple = Tuple::new(L4Proto::Udp, FROM.0.into(), FROM.1, TO.0.into(), TO.1).unwrap();
    let flow = Flow {
        zone: Zone(0),
        direction: Direction::Original,
        ingress_mtu: 1500,
        matches: FlowMatch { eth_dst: Some(LAN), vlan: None, tuple },
        forward: Forward {
            egress: ifindex(&net.wan),
            vlan: None,
            mtu: 1500,
            tuple,
            macs: Some(MacRewrite { src: WAN, dst: SERVER }),
        },
        above: Above::default(),
    };
    port.can_offload(&flow).expect("a flow that can be offloaded");
    let instance = Instance(1.try_into().unwrap());
    let cookie = Cookie { instance, epoch: Epoch(1), direction: Direction::Original };
    let (tx, rx) = mpsc::channel();
    let ticket = Ticket::new(Box::new(move |o: Outcome| tx.send(o).unwrap()));
    port.submit(vec![Operation { request: Request::Add { cookie, flow: Box::new(flow) }, ticket }]);
    port.submit(Vec::new());
    match rx.recv().unwrap() {
        Ok(Done::Added { .. }) => {}
        other => panic!("the rule was not added: {other:?}"),
    }
}

/// Through the NIC: how many of the packets the host sees.
fn hardware(report: &mut Report, on: &str, quick: bool) {
    let net = Net::new("1", |port, mac, wire, far| {
        format!("ip link add name {port} address {mac} type simnic peer name {wire} address {far}")
    });
    let rings = if quick { 8 } else { 100 };
    sh(SLOW);
    net.converse();
    let mut generator = net.generator();
    let port = bind(&net.lan, HwFlags::SkipSw);
    add(&port, &net);
    let seen = || received("", &net.lan);
    let (host_before, wire_before) = (seen(), net.arrived());
    let sent = generator.send(rings).expect("sent");
    std::thread::sleep(Duration::from_millis(500));
    let (host, wire) = (seen() - host_before, net.arrived() - wire_before);
    assert_eq!(wire, sent, "packets on the far wire");
    port.release().expect("released");
    sh(NO_NFT);
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
