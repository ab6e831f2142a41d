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
use std::process::ExitCode;
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
        sh(&format!("ip netns add {c} && ip netns add {s} && sysctl -qw net.ipv4.ip_forward=1"));
        sh(&link(&lan, LAN, &c, CLIENT));
        sh(&link(&wan, WAN, &s, SERVER));
        for (port, wire, net) in [(&lan, &c, 1), (&wan, &s, 2)] {
            sh(&format!(
                "ip link set {wire} netns {wire}
                 ip addr add 10.0.{net}.1/24 dev {port} && ip link set {port} up
                 ip -n {wire} link set lo up && ip -n {wire} link set {wire} up
                 ip -n {wire} addr add 10.0.{net}.2/24 dev {wire}
                 ip -n {wire} route add default via 10.0.{net}.1"
            ));
        }
        // What arrives at the server is counted by its netdev, and goes no further.
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
        let (s, wire) = (self.server(), self.server());
        let text =
            sh(&format!("ip netns exec {s} cat /sys/class/net/{wire}/statistics/rx_packets"));
        text.trim().parse().unwrap()
    }
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

/// Sends, and says how many packets arrived per second; all must.
fn rate(net: &Net, generator: &mut Generator, rings: usize) -> f64 {
    generator.send(2).expect("sent");
    let before = net.arrived();
    let started = Instant::now();
    let sent = generator.send(rings).expect("sent");
    let took = started.elapsed().as_secs_f64();
    let arrived = net.arrived() - before;
    assert!(arrived * 100 >= sent * 99, "{arrived} of {sent} packets arrived");
    arrived as f64 / took
}

/// How a contestant is set up, and taken away again.
const SLOW: &str = "nft 'table ip fw {
    chain post { type nat hook postrouting priority 100; oifname \"nosuch0\" masquerade; }
    chain fwd { type filter hook forward priority 0; ct state established,related accept; accept; }
}'";
/// The same where nf_tables has no IPv4 (user-mode Linux).
const SLOW_IPTABLES: &str = "
    iptables-legacy -t nat -A POSTROUTING -o nosuch0 -j MASQUERADE &&
    iptables-legacy -A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT";
const NO_IPTABLES: &str = "iptables-legacy -t nat -F && iptables-legacy -F";
const NO_NFT: &str = "nft delete table ip fw";
const FLOWTABLE: &str = "nft 'table ip fw {
    flowtable f { hook ingress priority 0; devices = { lan0, wan0 }; }
    chain post { type nat hook postrouting priority 100; oifname \"nosuch0\" masquerade; }
    chain fwd { type filter hook forward priority 0; ip protocol udp flow add @f; ct state established,related accept; accept; }
}'";

fn rates(report: &mut Report, on: &str, native: bool, quick: bool) {
    let net = veth();
    let mut generator = net.generator();
    let (rings, rounds) = match (quick, native) {
        (true, _) => (8, 2),
        (_, true) => (2000, 9),
        (_, false) => (100, 7),
    };
    let (mut slow, mut ours) = (Samples::default(), Samples::default());
    let (mut flowtable, mut alone) = (Samples::default(), Samples::default());
    let works = |line: &str| {
        let line = format!("{{ {line}; }} >/dev/null 2>&1");
        std::process::Command::new("sh").args(["-c", &line]).status().unwrap().success()
    };
    let has_flowtable = works(&format!("{FLOWTABLE} && {NO_NFT}"));
    let (slow_path, no_slow_path) = if works(&format!("{SLOW} && {NO_NFT}")) {
        (SLOW, NO_NFT)
    } else {
        (SLOW_IPTABLES, NO_IPTABLES)
    };
    for _ in 0..rounds {
        sh(slow_path);
        net.converse();
        slow.push(rate(&net, &mut generator, rings));
        {
            // The same connection, in the same ruleset, with a rule on the netdev that it arrives at.
            let port = bind(&net.lan, HwFlags::SkipHw);
            add(&port, &net);
            ours.push(rate(&net, &mut generator, rings));
            port.flush().expect("flushed");
            port.release().expect("released");
        }
        net.forget_server_filter();
        sh(no_slow_path);
        if has_flowtable {
            sh(FLOWTABLE);
            net.converse();
            flowtable.push(rate(&net, &mut generator, rings));
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
    report.add(if has_flowtable {
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
    let seen = || -> u64 {
        let counters = sh(&format!("cat /sys/class/net/{}/statistics/rx_packets", net.lan));
        counters.trim().parse().unwrap()
    };
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
