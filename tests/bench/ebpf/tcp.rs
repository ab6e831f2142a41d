//! TCP through a router of veths, whose ends send large segments in one piece: by the slow path, and by rules at tcx on
//! both ports.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use netdev_providers::ebpf::Mode;
use netdev_providers::{
    Above, Direction, Flow, FlowMatch, Forward, Ifindex, MacAddr, MacRewrite, Tuple, Zone,
};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::gettid;

use super::class;
use super::measure::Samples;
use super::ours::Ours;
use super::report::{Figure, Report};
use super::setting::Setting;
use super::world::sh;

const LAN: MacAddr = MacAddr([2, 0, 0, 0, 3, 1]);
const CLIENT: MacAddr = MacAddr([2, 0, 0, 0, 3, 2]);
const WAN: MacAddr = MacAddr([2, 0, 0, 0, 4, 1]);
const SERVER: MacAddr = MacAddr([2, 0, 0, 0, 4, 2]);
const FROM: &str = "10.77.1.2";
/// The first connection is from this port, the next from the next.
const PORT: u16 = 4001;
/// There are rules for so many connections.
const CONNECTIONS: u32 = 64;
const TO: &str = "10.77.2.2:5001";
/// What is written at once.
const BLOCK: usize = 256 << 10;

/// A host behind a port of the router: a thread in a network namespace of its own.
struct Host(JoinHandle<()>);

impl Host {
    /// `netdev` is moved there, and `lines` are run there before `work`.
    fn new(netdev: &str, lines: String, work: impl FnOnce() + Send + 'static) -> Self {
        let (born, told) = channel();
        let (go, gone) = channel::<()>();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            born.send(gettid()).unwrap();
            gone.recv().unwrap();
            sh(&lines);
            work();
        });
        let tid = told.recv().unwrap();
        sh(&format!("ip link set {netdev} netns {tid}"));
        go.send(()).unwrap();
        Self(thread)
    }
}

/// Bytes per second of each connection, from its first byte to its last.
fn serve(rates: &Sender<f64>, ready: &Sender<()>) {
    let listener = TcpListener::bind(TO).unwrap();
    ready.send(()).unwrap();
    let mut buf = vec![0; BLOCK];
    for stream in listener.incoming() {
        let (mut stream, mut bytes) = (stream.unwrap(), 0);
        let mut times: Option<(Instant, Instant)> = None;
        while let Ok(n @ 1..) = stream.read(&mut buf) {
            let now = Instant::now();
            times = Some((times.map_or(now, |t| t.0), now));
            bytes += n;
        }
        let Some((first, last)) = times else { return };
        if rates.send(bytes as f64 / (last - first).as_secs_f64()).is_err() {
            return;
        }
    }
}

/// Sends for as long as it is told, once for each time; a connection without a byte ends the server.
fn send(times: &Receiver<Duration>) {
    let to: SocketAddr = TO.parse().unwrap();
    let block = vec![7; BLOCK];
    for port in PORT.. {
        let time = times.recv();
        sh(&format!("echo {port} {port} > /proc/sys/net/ipv4/ip_local_port_range"));
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(10)).unwrap();
        let Ok(time) = time else { return };
        let end = Instant::now() + time;
        while Instant::now() < end {
            stream.write_all(&block).unwrap();
        }
        stream.shutdown(Shutdown::Write).unwrap();
        // Until all has arrived.
        stream.read_to_end(&mut Vec::new()).unwrap();
    }
}

fn original(n: u32, egress: Ifindex) -> Flow {
    flow(n, Direction::Original, egress)
}

fn reply(n: u32, egress: Ifindex) -> Flow {
    flow(n, Direction::Reply, egress)
}

fn flow(n: u32, direction: Direction, egress: Ifindex) -> Flow {
    let from = format!("{FROM}:{}", u32::from(PORT) + n);
    let (tuple, arrives, src, dst) = match direction {
        Direction::Original => (format!("tcp {from} > {TO}"), LAN, WAN, SERVER),
        Direction::Reply => (format!("tcp {TO} > {from}"), WAN, LAN, CLIENT),
    };
    let tuple: Tuple = tuple.parse().unwrap();
    let macs = Some(MacRewrite { src, dst });
    Flow {
        zone: Zone(0),
        direction,
        ingress_mtu: 1500,
        matches: FlowMatch { eth_dst: Some(arrives), vlan: None, tuple },
        forward: Forward { egress, vlan: None, mtu: 1500, tuple, macs, egress_decides: false },
        above: Above::default(),
    }
}

/// Packets that this router's IPv4 has forwarded.
fn slowly_forwarded() -> u64 {
    let shown = sh("awk '/^Ip: [0-9]/ { print $7 }' /proc/thread-self/net/snmp");
    shown.trim().parse().unwrap()
}

pub(crate) fn throughput(setting: &Setting, report: &mut Report) {
    // As the daemon does for what is offloaded: conntrack does not see these packets, and goes on.
    sh(&format!(
        "ip link add lan1 address {LAN} type veth peer name c1 address {CLIENT}
         ip link add wan1 address {WAN} type veth peer name s1 address {SERVER}
         ip addr add 10.77.1.1/24 dev lan1; ip addr add 10.77.2.1/24 dev wan1
         ip link set lan1 up; ip link set wan1 up
         echo 1 > /proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal"
    ));
    let up = |dev: &str, net: u32| {
        format!(
            "ip addr add 10.77.{net}.2/24 dev {dev}; ip link set {dev} up
             ip route add default via 10.77.{net}.1"
        )
    };
    let ((told, rates), (ready, listening)) = (channel(), channel());
    let server = Host::new("s1", up("s1", 2), move || serve(&told, &ready));
    listening.recv().unwrap();
    let (go, times) = channel();
    let client = Host::new("c1", up("c1", 1), move || send(&times));
    let go_once = |seconds: u64| {
        let before = slowly_forwarded();
        go.send(Duration::from_secs(seconds)).unwrap();
        let rate: f64 = rates.recv().unwrap();
        (rate, slowly_forwarded() - before)
    };
    let (rounds, seconds) = if setting.quick { (1, 1) } else { (7, 2) };
    go_once(1);
    let (mut slow, mut tcx) = (Samples::default(), Samples::default());
    for _ in 0..rounds {
        let (rate, by_stack) = go_once(seconds);
        slow.push(rate);
        let ports = [("lan1", "wan1"), ("wan1", "lan1")]
            .map(|(port, egress)| Ours::bind_to(&class(Mode::Tcx, CONNECTIONS), port, egress));
        ports[0].run(ports[0].prepare_adds_of(CONNECTIONS, original));
        ports[1].run(ports[1].prepare_adds_of(CONNECTIONS, reply));
        let (rate, past_rules) = go_once(seconds);
        tcx.push(rate);
        assert!(past_rules * 100 < by_stack, "{past_rules} and {by_stack} packets by the stack");
    }
    let gbit = |s: &Samples| s.median().map(|r| r * 8.0 / 1e9);
    let name = format!("TCP, large segments, tcx over the slow path ({})", setting.on);
    report.add(
        Figure::new(name, tcx.over(&slow).median(), "x")
            .peer("tcx Gbit/s", gbit(&tcx))
            .peer("slow path Gbit/s", gbit(&slow))
            .note("sender, router and receiver share the machine"),
    );
    drop(go);
    client.0.join().unwrap();
    server.0.join().unwrap();
}
