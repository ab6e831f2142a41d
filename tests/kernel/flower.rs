//! The tc-flower provider on a real kernel: a router between a client and a server, each in a network
//! namespace of its own, and packets made byte by byte, so that nothing but the rules can have done
//! what is seen.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test: clippy spares the test functions, but not what they call"
)]

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::num::{NonZeroU32, NonZeroUsize};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use netdev_providers::tc_flower::{TcFlowerClass, TcFlowerConfig};
use netdev_providers::{
    Above, BindError, Cookie, Direction, Done, Epoch, Flow, FlowMatch, Forward, HwFlags, Ifindex,
    Instance, L4Proto, MacAddr, MacRewrite, Netdev, Outcome, Provider, ProviderClass, Reason,
    Request, RuleId, RuleReport, Tuple, Zone,
};
use nix::sys::socket::{setsockopt, sockopt};

use crate::host::Host;
use crate::netns::NetNs;
use crate::shown::as_shown;
use crate::submit::{ifindex, netdev, submit};

pub(crate) mod backend;
mod nat;
mod occupants;
mod packets;
mod slow_path;
mod tagged;

use self::backend::{Backend, scenarios, tells_what_xdp_sends_to};
use self::packets::octets;
pub(crate) use self::packets::{Packet, Seen, Wire, parse};

const LAN: MacAddr = MacAddr([2, 0, 0, 0, 1, 1]);
const CLIENT: MacAddr = MacAddr([2, 0, 0, 0, 1, 2]);
const WAN: MacAddr = MacAddr([2, 0, 0, 0, 2, 1]);
const SERVER: MacAddr = MacAddr([2, 0, 0, 0, 2, 2]);

/// Nobody's protocol: IEEE Std 802, local experimental EtherType 1.
const MARKER: u16 = 0x88b5;

/// What is on its way is there by then, however much else there is to do.
const ARRIVES: Duration = Duration::from_secs(10);

// --- A network ------------------------------------------------------------------------------------

/// `client c0 --- lan0 [router: the test's thread] wan0 --- s0 server`
pub(crate) struct Net {
    pub(crate) client: Host,
    pub(crate) server: Host,
    pub(crate) ns: NetNs,
    backend: Backend,
    /// A port that was bound so that XDP can send to it, and not asked for yet.
    egress: RefCell<Option<Arc<dyn Provider>>>,
}

impl Net {
    fn new() -> Self {
        Self::of(Backend::Flower)
    }

    pub(crate) fn of(backend: Backend) -> Self {
        let ns = NetNs::new();
        let (client, server) = (Host::new(), Host::new());
        ns.run(&format!(
            "ip link add lan0 address {LAN} type veth peer name c0 address {CLIENT} netns {}
             ip link add wan0 address {WAN} type veth peer name s0 address {SERVER} netns {}
             sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0
             ip addr add 10.0.1.1/24 dev lan0; ip addr add fd01::1/64 dev lan0 nodad
             ip addr add 10.0.2.1/24 dev wan0; ip addr add fd02::1/64 dev wan0 nodad
             ip link set lan0 up; ip link set wan0 up",
            client.tid, server.tid
        ));
        for (host, dev, net) in [(&client, "c0", 1), (&server, "s0", 2)] {
            host.sh(&format!(
                "ip link set lo up; ip link set {dev} up
                 ip addr add 10.0.{net}.2/24 dev {dev}
                 ip addr add fd0{net}::2/64 dev {dev} nodad
                 ip route add default via 10.0.{net}.1
                 ip -6 route add default via fd0{net}::1"
            ));
        }
        backend.prepare(&ns, &client, &server);
        Self { client, server, ns, backend, egress: RefCell::default() }
    }

    /// A provider on one of the router's netdevs.
    fn bind(&self, name: &str) -> Port {
        if self.backend != Backend::Flower {
            let (class, instance) = (self.backend.class(), instance(1));
            let bind = |name| class.bind(&netdev(name, HwFlags::Both), instance).unwrap();
            let mut egress = self.egress.borrow_mut();
            let provider = match egress.take() {
                Some(provider) if name == "wan0" => provider,
                _ => bind(name),
            };
            if self.backend == Backend::Xdp && !tells_what_xdp_sends_to() && name == "lan0" {
                *egress = Some(bind("wan0"));
            }
            assert!(provider.describe().contains(self.backend.place()), "{}", provider.describe());
            return Port { provider, instance };
        }
        self.try_bind(name, HwFlags::Both, 1).unwrap()
    }

    fn try_bind(&self, name: &str, hw_flags: HwFlags, instance: u32) -> Result<Port, BindError> {
        let netdev = netdev(name, hw_flags);
        // Several writers, whatever the machine has.
        let config = TcFlowerConfig { writers: NonZeroUsize::new(3), ..Default::default() };
        let class = TcFlowerClass::new(config);
        let provider = class.bind(&netdev, self::instance(instance))?;
        Ok(Port { provider, instance: self::instance(instance) })
    }

    fn filters(&self, name: &str) -> String {
        self.ns.run(&format!("tc -d -s filter show dev {name} ingress"))
    }
}

impl Net {
    /// Sends a frame from the client, and returns what of `tuple` the server receives.
    pub(crate) fn pass(
        &self,
        bytes: Vec<u8>,
        vnet_hdr: bool,
        tuple: Tuple,
        max: usize,
    ) -> Vec<Seen> {
        self.pass_all(vec![bytes], vnet_hdr, tuple, max)
    }

    /// The same with several, one after the other.
    fn pass_all(
        &self,
        frames: Vec<Vec<u8>>,
        vnet_hdr: bool,
        tuple: Tuple,
        max: usize,
    ) -> Vec<Seen> {
        let within = if max == 0 { Duration::from_millis(100) } else { ARRIVES };
        let (ready_tx, ready) = mpsc::channel();
        let (sent, sent_rx) = mpsc::channel();
        let seen = self.server.start(move || {
            let wire = Wire::open("s0", false);
            ready_tx.send(()).unwrap();
            sent_rx.recv().unwrap();
            let is_wanted = |f: &[u8]| parse(f).is_some_and(|s| s.tuple == tuple);
            let got = wire.receive(max.max(1), within, is_wanted);
            got.iter().filter_map(|f| parse(f)).collect()
        });
        ready.recv().unwrap();
        self.send_by(vnet_hdr, frames);
        sent.send(()).unwrap();
        seen.recv().unwrap()
    }

    /// Sends a frame from the client, and returns when the router has done with it what it does at its ingress: it
    /// has a marker behind the frame by then. (A machine with much to do may leave frames for later.)
    pub(crate) fn send(&self, frame: Vec<u8>) {
        self.send_by(false, vec![frame]);
    }

    fn send_by(&self, vnet_hdr: bool, frames: Vec<Vec<u8>>) {
        let wire = Wire::open("lan0", false);
        let mut marker = [LAN.0, CLIENT.0].concat();
        marker.extend_from_slice(&MARKER.to_be_bytes());
        marker.resize(60, 0);
        self.client.call(move || {
            let wire = Wire::open("c0", vnet_hdr);
            frames.iter().for_each(|frame| wire.send(frame));
            Wire::open("c0", false).send(&marker);
        });
        let is_marker = |f: &[u8]| f[12..].starts_with(&MARKER.to_be_bytes());
        assert_eq!(wire.receive(1, ARRIVES, is_marker).len(), 1, "the marker arrives");
    }

    /// Sends one run of datagrams from a socket of the client, to be segmented into 1400 bytes each
    /// (`UDP_SEGMENT`), and returns what of `to` the server receives.
    fn pass_datagrams(&self, from: Tuple, to: Tuple, max: usize) -> Vec<Seen> {
        let (ready_tx, ready) = mpsc::channel();
        let seen = self.server.start(move || {
            let wire = Wire::open("s0", false);
            ready_tx.send(()).unwrap();
            let is_wanted = |f: &[u8]| parse(f).is_some_and(|s| s.tuple == to);
            let got = wire.receive(max, ARRIVES, is_wanted);
            got.iter().filter_map(|f| parse(f)).collect()
        });
        ready.recv().unwrap();
        self.client.call(move || {
            let socket = UdpSocket::bind((from.src(), from.sport())).unwrap();
            setsockopt(&socket, sockopt::UdpGsoSegment, &1400).unwrap();
            assert_eq!(socket.send_to(&[9; 4200], (from.dst(), from.dport())).unwrap(), 4200);
        });
        seen.recv().unwrap()
    }
}

pub(crate) fn instance(n: u32) -> Instance {
    Instance(NonZeroU32::new(n).unwrap())
}

/// A bound provider, called as the engine calls it.
pub(crate) struct Port {
    pub(crate) provider: Arc<dyn Provider>,
    pub(crate) instance: Instance,
}

impl Port {
    pub(crate) fn cookie(&self, epoch: u64) -> Cookie {
        Cookie { instance: self.instance, epoch: Epoch(epoch), direction: Direction::Original }
    }

    pub(crate) fn submit(&self, requests: Vec<Request>) -> Vec<Outcome> {
        submit(&*self.provider, requests)
    }

    pub(crate) fn try_add(&self, epoch: u64, flow: Flow) -> Outcome {
        let request = Request::Add { cookie: self.cookie(epoch), flow: Box::new(flow) };
        self.submit(vec![request]).remove(0)
    }

    pub(crate) fn add(&self, epoch: u64, flow: Flow) -> RuleId {
        match self.try_add(epoch, flow) {
            Ok(Done::Added { rule, .. }) => rule,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn delete(&self, epoch: u64, rule: RuleId) -> Outcome {
        self.submit(vec![Request::Delete { rule, cookie: self.cookie(epoch) }]).remove(0)
    }

    pub(crate) fn usage(&self) -> Vec<RuleReport> {
        let mut reports = Vec::new();
        self.provider.usage(&mut |r| reports.push(r)).unwrap();
        reports
    }

    /// Packets that the rule of this epoch has carried.
    pub(crate) fn packets(&self, epoch: u64) -> u64 {
        let cookie = self.cookie(epoch);
        self.usage().iter().find(|r| r.cookie == cookie).expect("a rule").counters.packets
    }
}

pub(crate) fn tuple(text: &str) -> Tuple {
    text.parse().unwrap()
}

/// From the client to the server, on lan0, routed to wan0.
pub(crate) fn flow(arrival: Tuple, departure: Tuple) -> Flow {
    Flow {
        zone: Zone(0),
        direction: Direction::Original,
        ingress_mtu: 1500,
        matches: FlowMatch { eth_dst: Some(LAN), vlan: None, tuple: arrival },
        forward: Forward {
            egress: ifindex("wan0"),
            vlan: None,
            mtu: 1500,
            tuple: departure,
            macs: Some(MacRewrite { src: WAN, dst: SERVER }),
            egress_decides: false,
        },
        above: Above::default(),
    }
}

pub(crate) const TCP4: &str = "tcp 10.0.1.2:4000 > 10.0.2.2:80";
pub(crate) const UDP4: &str = "udp 10.0.1.2:4000 > 10.0.2.2:53";
pub(crate) const TCP6: &str = "tcp [fd01::2]:4000 > [fd02::2]:80";
pub(crate) const UDP6: &str = "udp [fd01::2]:4000 > [fd02::2]:53";

// --- Rules ----------------------------------------------------------------------------------------

scenarios! { all:
    a_routed_packet_is_redirected_with_new_macs_and_one_less_ttl,
    what_a_rule_must_not_take_goes_up_the_stack,
    a_bridged_flow_is_left_as_it_is,
}

#[test]
fn rules_read_back_as_they_were_meant() {
    let net = Net::new();
    let port = net.bind("lan0");
    port.add(1, flow(tuple(TCP4), tuple(TCP4)));
    port.add(2, flow(tuple(UDP6), tuple(UDP6)));
    port.add(3, flow(tuple(UDP4), tuple("udp 10.0.2.1:5000 > 10.0.2.2:5353")));
    let text = net.filters("lan0");
    println!("{}\n{text}", port.provider.describe());
    for line in [
        "filter protocol ip pref 49410 bpf",
        "filter protocol ipv6 pref 49411 bpf",
        "filter protocol ip pref 49412 flower chain 0 handle 0x1",
        "filter protocol ipv6 pref 49413 flower chain 0 handle 0x1",
        "dst_mac 02:00:00:00:01:01",
        "eth_type ipv4",
        "ip_proto tcp",
        "dst_ip 10.0.2.2",
        "src_ip 10.0.1.2",
        "dst_port 80",
        "src_port 4000",
        "tcp_flags 0x10/17",
        "ip_flags nofrag",
        "mirred (Egress Redirect to device wan0) stolen",
        "inspect4",
        "inspect6",
        "header4",
        "cookie c70f010000000001",
        "nat4_udp_before",
        "nat4_udp_after",
        "src_ip fd01::2",
    ] {
        assert!(text.contains(line), "no `{line}` in\n{text}");
    }
    assert_eq!(port.usage().len(), 3);
    assert_eq!(port.provider.flush().unwrap(), 3);
    assert_eq!(port.usage().len(), 0);
    port.provider.release().unwrap();
    assert_eq!(net.ns.run("tc qdisc show dev lan0").matches("ffff:").count(), 0);
}

/// Of IPv4 those for hardware are compared: in software `tc` cannot write our programs.
#[test]
fn tc_shows_our_rules_as_it_shows_those_that_are_written_with_it() {
    let net = Net::new();
    let port = net.bind("lan0");
    let macs = format!("munge eth dst set {SERVER} munge eth src set {WAN}");
    let to = "no_percpu action mirred egress redirect dev wan0 no_percpu";
    net.ns.run("tc qdisc add dev wan0 clsact");
    for (pref, ip, ours, matches, actions) in [
        (
            49413,
            "ipv6",
            TCP6,
            "ip_proto tcp dst_ip fd02::2 src_ip fd01::2 dst_port 80 src_port 4000 tcp_flags 0x10/0x17",
            "munge ip6 hoplimit add 0xff pipe",
        ),
        (
            49413,
            "ipv6",
            UDP6,
            "ip_proto udp dst_ip fd02::2 src_ip fd01::2 dst_port 53 src_port 4000",
            "munge ip6 hoplimit add 0xff pipe",
        ),
    ] {
        let rule = port.add(1, flow(tuple(ours), tuple(ours)));
        net.ns.run(&format!(
            "tc filter add dev wan0 ingress protocol {ip} pref {pref} handle 1 flower skip_hw \
             dst_mac {LAN} {matches} ip_flags nofrag action pedit ex {macs} {actions} {to}"
        ));
        let show = |dev: &str| net.ns.run(&format!("tc filter show dev {dev} ingress pref {pref}"));
        assert_eq!(as_shown(&show("lan0")), as_shown(&show("wan0")));
        port.delete(1, rule).unwrap();
        net.ns.run("tc filter del dev wan0 ingress");
    }
}

fn a_routed_packet_is_redirected_with_new_macs_and_one_less_ttl(backend: Backend) {
    let net = Net::of(backend);
    let port = net.bind("lan0");
    for (epoch, t) in [TCP4, UDP4, TCP6, UDP6].into_iter().map(tuple).enumerate() {
        let epoch = epoch as u64;
        let packet = Packet::new(t);
        // The router does not forward: without a rule nothing arrives.
        assert_eq!(net.pass(packet.frame(false), false, t, 0).len(), 0, "{t}");
        let rule = port.add(epoch, flow(t, t));
        let seen = net.pass(packet.frame(false), false, t, 1).pop().expect("a packet");
        assert_eq!((seen.dst, seen.src, seen.ttl), (SERVER, WAN, 63), "{t}");
        assert!(seen.ip_checksum_right && seen.l4_checksum_right, "{t} {seen:?}");
        assert_eq!(seen.payload, packet.payload);
        assert_eq!(port.packets(epoch), 1);
        assert_eq!(port.delete(epoch, rule), Ok(Done::Deleted));
        assert_eq!(net.pass(packet.frame(false), false, t, 0).len(), 0, "{t} after the delete");
    }
}

/// What goes up the stack whatever rules there are.
fn cases_for_the_stack() -> Vec<(String, Packet)> {
    let of = |name: &str| Packet::new(tuple(name));
    let mut cases: Vec<(String, Packet)> = Vec::new();
    for name in [TCP4, UDP4, TCP6, UDP6] {
        for ttl in [0, 1] {
            cases.push((format!("TTL {ttl}"), Packet { ttl, ..of(name) }));
        }
        let other = MacAddr([2, 0, 0, 0, 1, 3]);
        cases.push(("another MAC address".into(), Packet { eth_dst: other, ..of(name) }));
    }
    for name in [TCP4, TCP6] {
        for (what, flag) in [("FIN", 1), ("SYN", 2), ("RST", 4)] {
            cases.push((what.into(), Packet { tcp_flags: 0x10 | flag, ..of(name) }));
        }
    }
    for name in [TCP4, UDP4] {
        for words in 1..=10 {
            let options = [vec![1; words * 4 - 1], vec![0]].concat();
            cases.push((format!("{words} words of options"), Packet { options, ..of(name) }));
        }
        cases.push(("a first fragment".into(), Packet { fragment: 0x2000, ..of(name) }));
        cases.push(("a later fragment".into(), Packet { fragment: 0x0010, ..of(name) }));
    }
    for name in [TCP6, UDP6] {
        for kind in [0, 43, 60, 44] {
            cases.push((format!("extension header {kind}"), of(name).with_extension(kind)));
        }
    }
    cases
}

fn what_a_rule_must_not_take_goes_up_the_stack(backend: Backend) {
    let net = Net::of(backend);
    let port = net.bind("lan0");
    for (epoch, t) in [TCP4, UDP4, TCP6, UDP6].into_iter().map(tuple).enumerate() {
        port.add(epoch as u64, flow(t, t));
    }
    let (of, cases) = (|name: &str| Packet::new(tuple(name)), cases_for_the_stack());
    let taken = || port.usage().iter().map(|r| r.counters.packets).sum::<u64>();
    for (what, packet) in &cases {
        net.send(packet.frame(false));
        assert_eq!(taken(), 0, "{what}: {packet:?} was taken\n{}", net.filters("lan0"));
    }
    // TTL 2 is the first that is forwarded, and it leaves with 1; ECE, PSH, URG are no obstacles.
    let packet = Packet { ttl: 2, tcp_flags: 0x78, ..of(TCP4) };
    assert_eq!(net.pass(packet.frame(false), false, packet.tuple, 1)[0].ttl, 1);
    let packet = Packet { ttl: 2, ..of(UDP6) };
    assert_eq!(net.pass(packet.frame(false), false, packet.tuple, 1)[0].ttl, 1);
    assert_eq!(taken(), 2);
}

#[test]
fn without_the_guards_all_that_they_are_there_for_would_be_taken() {
    let net = Net::new();
    let port = net.bind("lan0");
    for (epoch, t) in [TCP4, UDP4, TCP6, UDP6].into_iter().map(tuple).enumerate() {
        port.add(epoch as u64, flow(t, t));
    }
    let taken = || {
        let mut packets = 0;
        // Fails, after it has reported the rules.
        let _ = port.provider.usage(&mut |r| packets += r.counters.packets);
        packets
    };
    net.ns.run(
        "tc filter del dev lan0 ingress prio 49410 protocol ip
         tc filter del dev lan0 ingress prio 49411 protocol ipv6",
    );
    for (what, packet) in &cases_for_the_stack() {
        let guarded = what.starts_with("TTL")
            || what.ends_with("options")
            || (what.starts_with("extension") && !what.ends_with("44"));
        let before = taken();
        net.send(packet.frame(false));
        assert_eq!(taken() > before, guarded, "{what}: {packet:?}");
    }
}

fn a_bridged_flow_is_left_as_it_is(backend: Backend) {
    let net = Net::of(backend);
    let port = net.bind("lan0");
    let t = tuple(TCP4);
    let mut bridged = flow(t, t);
    bridged.matches.eth_dst = None;
    bridged.forward.macs = None;
    port.add(1, bridged);
    let seen = net.pass(Packet::new(t).frame(false), false, t, 1).pop().expect("a packet");
    assert_eq!((seen.dst, seen.src, seen.ttl), (LAN, CLIENT, 64));
}

#[test]
fn alone_a_large_batch_gives_every_operation_its_own_result() {
    let net = Net::new();
    let port = net.bind("lan0");
    let flow_of = |n: u16| {
        let t = Tuple::new(
            L4Proto::Udp,
            Ipv4Addr::new(10, 0, 1, 2).into(),
            10_000 + n,
            Ipv4Addr::new(10, 0, 2, 2).into(),
            53,
        );
        flow(t.unwrap(), t.unwrap())
    };
    let add = |epoch: u64, f: Flow| Request::Add { cookie: port.cookie(epoch), flow: Box::new(f) };
    // 300 adds, of which some are refused: a match that is there already, an egress that does not
    // exist, an MTU that is too small.
    let mut requests = Vec::new();
    for n in 0..300u16 {
        let mut f = flow_of(n);
        match n % 50 {
            7 => f = flow_of(n - 1),
            13 => f.forward.egress = Ifindex::new(9999).unwrap(),
            29 => f.forward.tuple = tuple(TCP4),
            _ => {}
        }
        requests.push(add(u64::from(n), f));
    }
    let outcomes = port.submit(requests);
    let mut rules = Vec::new();
    for (n, outcome) in outcomes.iter().enumerate() {
        let reason = outcome.as_ref().err().map(|r| r.reason);
        match n % 50 {
            7 => assert_eq!(reason, Some(Reason::Conflict), "{n} {outcome:?}"),
            13 => assert_eq!(reason, Some(Reason::EgressUnsupported), "{n} {outcome:?}"),
            29 => assert_eq!(reason, Some(Reason::Unsupported), "{n} {outcome:?}"),
            _ => match outcome {
                Ok(Done::Added { rule, in_hw: Some(false), .. }) => rules.push((n as u64, *rule)),
                other => panic!("{n}: {other:?}"),
            },
        }
    }
    assert!(outcomes[7].as_ref().unwrap_err().detail.is_some());
    assert_eq!(port.usage().len(), rules.len());
    // Deletes and adds of the same tuple, mixed in one batch, in order.
    let mut requests = Vec::new();
    for &(epoch, rule) in &rules {
        requests.push(Request::Delete { rule, cookie: port.cookie(epoch) });
        requests.push(add(epoch + 1000, flow_of(epoch as u16)));
    }
    let outcomes = port.submit(requests);
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    let usage = port.usage();
    assert_eq!(usage.len(), rules.len());
    assert!(usage.iter().all(|r| r.cookie.epoch.0 >= 1000 && r.in_hw == Some(false)));
    // A rule that somebody else deleted: its delete succeeds.
    let one = usage[0];
    net.ns.run(&format!(
        "tc filter del dev lan0 ingress protocol ip pref 49412 handle {} flower",
        one.rule.0 & 0xffff_ffff
    ));
    assert_eq!(port.delete(one.cookie.epoch.0, one.rule), Ok(Done::Deleted));
    assert_eq!(port.provider.flush().unwrap(), rules.len() as u64 - 1);
    assert_eq!(port.provider.flush().unwrap(), 0);
    assert!(!net.filters("lan0").contains("flower"));
}

/// More refusals than the socket's receive buffer has room for: the kernel's answers are lost, and
/// what became of each operation is asked for.
#[test]
fn a_half_acknowledged_batch_is_settled_rule_by_rule() {
    let net = Net::new();
    let port = net.bind("lan0");
    let flow_of = |n: u16| {
        let t: Tuple = tuple(&format!("udp 10.0.1.2:{} > 10.0.2.2:53", 1000 + n));
        flow(t, t)
    };
    let first = port.add(1000, flow_of(0));
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let fd: i32 = entry.unwrap().file_name().to_str().unwrap().parse().unwrap();
        // SAFETY: should the descriptor be closed meanwhile, the calls fail, which is passed over.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
        let name = nix::sys::socket::getsockname::<nix::sys::socket::NetlinkAddr>(fd.as_raw_fd());
        if name.is_ok() {
            let _ = setsockopt(&fd, sockopt::RcvBuf, &1);
        }
    }
    // Every second one is there already.
    let requests = (1..=64u16)
        .map(|n| Request::Add {
            cookie: port.cookie(u64::from(n)),
            flow: Box::new(flow_of(if n % 2 == 0 { 0 } else { n })),
        })
        .collect();
    for (n, outcome) in (1u64..).zip(port.submit(requests)) {
        match outcome {
            Ok(Done::Added { .. }) if n % 2 == 1 => {}
            Err(why) if n % 2 == 0 && why.reason == Reason::Busy => {}
            other => panic!("{n}: {other:?}"),
        }
    }
    assert_eq!(port.usage().len(), 33);
    assert_eq!(port.delete(1000, first), Ok(Done::Deleted));
    assert_eq!(port.provider.flush().unwrap(), 32);
}
