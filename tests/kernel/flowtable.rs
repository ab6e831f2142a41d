//! nf-flowtable against the kernel: which direction of a connection crosses the forward hook, and
//! when; what is left of it afterwards.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use netdev_providers::nf_flowtable::{NfFlowtableClass, NfFlowtableConfig};
use netdev_providers::{
    Above, BindError, Cookie, Direction, Done, Epoch, Flow, FlowMatch, Forward, HwFlags, Instance,
    L4Proto, MacAddr, MacRewrite, Outcome, Provider, ProviderClass, Reason, Request, RuleId,
    RuleReport, Tuple, Zone,
};

use crate::flower::{Wire, parse};
use crate::host::Host;
use crate::netns::NetNs;
use crate::release::flowtable_wants_both;
use crate::router::reset_counters;
use crate::submit::{ifindex, netdev, submit};
use crate::wait::{PATIENCE, wait_until};

mod hardware;

/// `client --- lan0 [router: the test's thread] wan0 --- server`; packets of either direction are
/// counted in the forward hook.
struct Net {
    client: Host,
    server: Host,
    ns: NetNs,
}

impl Net {
    fn new() -> Self {
        Self::with("veth")
    }

    /// With netdevs of this kind, which come in pairs.
    fn with(kind: &str) -> Self {
        let ns = NetNs::new();
        let (client, server) = (Host::new(), Host::new());
        ns.run(
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv6.conf.all.accept_dad=0",
        );
        for (host, dev, n) in [(&client, "lan0", 1), (&server, "wan0", 2)] {
            ns.run(&format!(
                "set -e; ip link add name {dev} type {kind} peer name e0 netns {}
                 ip addr add 10.0.{n}.1/24 dev {dev}; ip addr add fd0{n}::1/64 dev {dev} nodad
                 ip link set {dev} up",
                host.tid
            ));
            host.sh(&format!(
                "ip link set lo up; ip addr add 10.0.{n}.2/24 dev e0
                 ip addr add fd0{n}::2/64 dev e0 nodad; ip link set e0 up
                 ip route add default via 10.0.{n}.1; ip -6 route add default via fd0{n}::1"
            ));
        }
        ns.run(
            "nft '
             table inet watch {
               counter lan { }
               counter wan { }
               chain forward { type filter hook forward priority 0
                 meta l4proto { tcp, udp } iif lan0 counter name lan
                 meta l4proto { tcp, udp } iif wan0 counter name wan
               }
             }
             '",
        );
        Self { client, server, ns }
    }

    /// Packets in the forward hook since the last call, by ingress netdev.
    fn forwarded(&self) -> (u64, u64) {
        reset_counters(|line| self.ns.try_run(line), ["lan", "wan"]).into()
    }

    /// Packets that have crossed the forward hook while it talked so much, by ingress netdev.
    fn forwarded_of(&self, c: &mut Connection, talk: usize) -> (u64, u64) {
        self.forwarded();
        c.talk(talk);
        self.forwarded()
    }

    /// What a connection says from now on passes the forward hook by. (An acknowledgement can be on
    /// its way through when the entry is made.)
    fn wait_passing_by(&self, c: &mut Connection) {
        wait_until("the forward hook sees none of it", || self.forwarded_of(c, 20) == (0, 0));
    }

    /// Whether conntrack says that the connection is in a flowtable.
    fn is_offloaded(&self, c: &Connection) -> bool {
        self.entry(c).contains("[OFFLOAD]")
    }

    fn entry(&self, c: &Connection) -> String {
        let family = if c.original.is_ipv6() { "ipv6" } else { "ipv4" };
        let proto = c.original.proto();
        self.ns.run(&format!(
            "conntrack -L -f {family} -p {proto} --sport {} 2>/dev/null",
            c.original.sport()
        ))
    }

    /// A connection from the client to port 80 of this address, which may be translated to the
    /// server's.
    fn connect(&self, proto: L4Proto, to: &str) -> Connection {
        let to: IpAddr = to.parse().unwrap();
        let any: IpAddr = if to.is_ipv6() { "::".parse() } else { "0.0.0.0".parse() }.unwrap();
        let ends: [Box<dyn Pipe>; 2] = match proto {
            L4Proto::Tcp => {
                let listener = self.server.call(move || TcpListener::bind((any, 80)).unwrap());
                let a = self.client.call(move || TcpStream::connect((to, 80)).unwrap());
                let (b, _) = listener.accept().unwrap();
                for s in [&a, &b] {
                    s.set_read_timeout(Some(PATIENCE)).unwrap();
                    s.set_nodelay(true).unwrap();
                }
                [Box::new(a), Box::new(b)]
            }
            L4Proto::Udp => {
                let b = self.server.call(move || UdpSocket::bind((any, 80)).unwrap());
                let a = self.client.call(move || {
                    let a = UdpSocket::bind((any, 0)).unwrap();
                    a.connect((to, 80)).unwrap();
                    a
                });
                a.send(b"hello").unwrap();
                b.set_read_timeout(Some(PATIENCE)).unwrap();
                let (_, from) = b.recv_from(&mut [0; 16]).unwrap();
                b.connect(from).unwrap();
                a.set_read_timeout(Some(PATIENCE)).unwrap();
                [Box::new(a), Box::new(b)]
            }
        };
        let (local, _) = ends[0].addresses();
        let (server, from) = ends[1].addresses();
        let tuple = |src: SocketAddr, dst: SocketAddr| {
            Tuple::new(proto, src.ip(), src.port(), dst.ip(), dst.port()).unwrap()
        };
        let original = tuple(local, SocketAddr::new(to, 80));
        Connection { original, reply: tuple(server, from), ends }
    }

    fn class(&self) -> NfFlowtableClass {
        NfFlowtableClass::default()
    }

    fn bind(&self, class: &NfFlowtableClass, name: &str) -> Port {
        self.try_bind(class, name, HwFlags::Both).unwrap()
    }

    fn try_bind(
        &self,
        class: &NfFlowtableClass,
        name: &str,
        hw_flags: HwFlags,
    ) -> Result<Port, BindError> {
        Ok(Port { provider: class.bind(&netdev(name, hw_flags), instance())? })
    }

    /// Original packets come in on `lan0`, replies on `wan0`.
    fn flow(&self, c: &Connection, direction: Direction) -> Flow {
        let egress = if direction == Direction::Original { "wan0" } else { "lan0" };
        let (arriving, opposite) = match direction {
            Direction::Original => (c.original, c.reply),
            Direction::Reply => (c.reply, c.original),
        };
        Flow {
            zone: Zone(0),
            direction,
            ingress_mtu: 1500,
            matches: FlowMatch { eth_dst: Some(MacAddr([2; 6])), vlan: None, tuple: arriving },
            forward: Forward {
                egress: ifindex(egress),
                vlan: None,
                mtu: 1500,
                tuple: opposite.inverted(),
                macs: Some(MacRewrite { src: MacAddr([2; 6]), dst: MacAddr([4; 6]) }),
                egress_decides: false,
            },
            above: Above::default(),
        }
    }
}

/// One end of a connection.
trait Pipe: Send {
    fn addresses(&self) -> (SocketAddr, SocketAddr);
    fn put(&mut self);
    fn take(&mut self);
}

impl Pipe for TcpStream {
    fn addresses(&self) -> (SocketAddr, SocketAddr) {
        (self.local_addr().unwrap(), self.peer_addr().unwrap())
    }
    fn put(&mut self) {
        self.write_all(b"ping").unwrap();
    }
    fn take(&mut self) {
        self.read_exact(&mut [0; 4]).unwrap();
    }
}

impl Pipe for UdpSocket {
    fn addresses(&self) -> (SocketAddr, SocketAddr) {
        (self.local_addr().unwrap(), self.peer_addr().unwrap())
    }
    fn put(&mut self) {
        self.send(b"ping").unwrap();
    }
    fn take(&mut self) {
        self.recv(&mut [0; 16]).unwrap();
    }
}

/// A connection, both ends of it.
struct Connection {
    original: Tuple,
    reply: Tuple,
    ends: [Box<dyn Pipe>; 2],
}

impl Connection {
    /// A packet there and one back, so many times.
    fn talk(&mut self, times: usize) {
        let [a, b] = &mut self.ends;
        for _ in 0..times {
            a.put();
            b.take();
            b.put();
            a.take();
        }
    }
}

struct Port {
    provider: Arc<dyn Provider>,
}

impl Port {
    fn submit(&self, requests: Vec<Request>) -> Vec<Outcome> {
        submit(&*self.provider, requests)
    }

    fn add(&self, epoch: u64, flow: Flow) -> RuleId {
        match self.try_add(epoch, flow) {
            Ok(Done::Added { rule, .. }) => rule,
            other => panic!("{other:?}"),
        }
    }

    fn try_add(&self, epoch: u64, flow: Flow) -> Outcome {
        let cookie = cookie(epoch, flow.direction);
        self.submit(vec![Request::Add { cookie, flow: Box::new(flow) }]).remove(0)
    }

    fn delete(&self, epoch: u64, direction: Direction, rule: RuleId) {
        let request = Request::Delete { rule, cookie: cookie(epoch, direction) };
        assert_eq!(self.submit(vec![request]), [Ok(Done::Deleted)]);
    }

    fn usage(&self) -> Vec<RuleReport> {
        let mut reports = Vec::new();
        self.provider.usage(&mut |r| reports.push(r)).unwrap();
        reports
    }
}

fn instance() -> Instance {
    Instance(NonZeroU32::new(1).unwrap())
}

fn cookie(epoch: u64, direction: Direction) -> Cookie {
    Cookie { instance: instance(), epoch: Epoch(epoch), direction }
}

const ORIGINAL: Direction = Direction::Original;
const REPLY: Direction = Direction::Reply;
const PROTOCOLS: [(L4Proto, &str); 4] = [
    (L4Proto::Tcp, "10.0.2.2"),
    (L4Proto::Udp, "10.0.2.2"),
    (L4Proto::Tcp, "fd02::2"),
    (L4Proto::Udp, "fd02::2"),
];

/// A datagram of this connection from the client, with a header checksum that is right or wrong.
fn datagram(c: &Connection, to: MacAddr, damaged: bool) -> Vec<u8> {
    let (IpAddr::V4(src), IpAddr::V4(dst)) = (c.original.src(), c.original.dst()) else { panic!() };
    let mut ip = [0x45, 0, 0, 32, 0, 1, 0, 0, 64, 17, 0, 0].to_vec();
    ip.extend([src.octets(), dst.octets()].concat());
    let sum: u32 = ip.chunks(2).map(|b| u32::from(u16::from_be_bytes([b[0], b[1]]))).sum();
    let check = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    ip[10..12].copy_from_slice(&(check ^ u16::from(damaged)).to_be_bytes());
    let (sport, dport) = (c.original.sport().to_be_bytes(), c.original.dport().to_be_bytes());
    let udp = [&sport[..], &dport, &[0, 12, 0, 0], b"ping"].concat();
    [&to.0[..], &[2, 0, 0, 0, 9, 9], &[8, 0], &ip, &udp].concat()
}

/// A flowtable corrects the header checksum for the TTL, and does not look whether it was right: what is
/// damaged stays damaged, where a router drops it. It is the kernel's, and told in the README.
#[test]
fn flowtable_what_is_damaged_stays_damaged() {
    let net = Net::new();
    let class = net.class();
    let (lan, wan) = (net.bind(&class, "lan0"), net.bind(&class, "wan0"));
    let mut c = net.connect(L4Proto::Udp, "10.0.2.2");
    c.talk(5);
    let link = net.ns.run("ip -o link show dev lan0");
    let address = link.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
    let bytes: Vec<u8> = address.split(':').map(|b| u8::from_str_radix(b, 16).unwrap()).collect();
    let router = MacAddr(bytes.try_into().unwrap());
    // How many of three arrive, and whether their checksums are right.
    let passes = |c: &Connection, damaged: bool| {
        let (frame, from) = (datagram(c, router, damaged), c.original.src());
        let within = if damaged { Duration::from_secs(1) } else { PATIENCE };
        let (ready_tx, ready) = std::sync::mpsc::channel();
        let seen = net.server.start(move || {
            let wire = Wire::open("e0", false);
            ready_tx.send(()).unwrap();
            let is_it =
                |f: &[u8]| parse(f).is_some_and(|s| s.payload == b"ping" && s.tuple.src() == from);
            let got = wire.receive(3, within, is_it);
            got.iter().map(|f| parse(f).unwrap().ip_checksum_right).collect::<Vec<_>>()
        });
        ready.recv().unwrap();
        net.client.call(move || {
            let wire = Wire::open("e0", false);
            (0..3).for_each(|_| wire.send(&frame));
        });
        seen.recv().unwrap()
    };
    assert_eq!((passes(&c, false), passes(&c, true)), (vec![true; 3], vec![]), "the slow path");
    lan.add(1, net.flow(&c, ORIGINAL));
    wan.add(1, net.flow(&c, REPLY));
    wait_until("it is offloaded", || {
        c.talk(1);
        net.is_offloaded(&c)
    });
    assert_eq!((passes(&c, false), passes(&c, true)), (vec![true; 3], vec![false; 3]));
}

/// The condition of the rule: neither netdev before both have seen it, then both at once; and
/// neither again when one of them has gone.
#[test]
fn flowtable_between_two_ports_a_connection_is_offloaded_when_both_have_seen_it() {
    let net = Net::new();
    for (n, (proto, to)) in (1..).zip(PROTOCOLS) {
        let class = net.class();
        let (lan, wan) = (net.bind(&class, "lan0"), net.bind(&class, "wan0"));
        let mut c = net.connect(proto, to);
        c.talk(5);
        lan.add(n, net.flow(&c, ORIGINAL));
        let (there, back) = net.forwarded_of(&mut c, 20);
        assert!(!net.is_offloaded(&c), "{}", net.entry(&c));
        assert!(
            there >= 20 && back >= 20,
            "{proto} {to}: one port has not seen it: {there}, {back}"
        );

        let reply = wan.add(n, net.flow(&c, REPLY));
        wait_until("it is offloaded", || {
            c.talk(1);
            net.is_offloaded(&c)
        });
        net.wait_passing_by(&mut c);

        wan.delete(n, REPLY, reply);
        wait_until("it is back on the slow path", || !net.is_offloaded(&c));
        let (there, back) = net.forwarded_of(&mut c, 20);
        assert!(there >= 20 && back >= 20, "{proto} {to}: {there}, {back}");
        assert!(!net.is_offloaded(&c), "what is not selected any more is not offloaded again");

        wan.add(n, net.flow(&c, REPLY));
        wait_until("it is offloaded again", || {
            c.talk(1);
            net.is_offloaded(&c)
        });
        assert_eq!(lan.provider.flush().unwrap(), 1);
        wait_until("a flush of either port takes it back", || !net.is_offloaded(&c));
        c.talk(5);
        lan.provider.release().unwrap();
        wan.provider.release().unwrap();
        assert!(!net.ns.run("nft list tables").contains("ctoffload"));
    }
}

/// Where the other netdev is no port of ours, nobody is waited for, and only the port's own
/// direction leaves the slow path. A kernel that makes no such entry is not asked to, until the other
/// netdev is a port.
#[test]
fn flowtable_beside_a_netdev_of_another_kind_its_own_direction_alone_is_offloaded() {
    let net = Net::new();
    for (n, (proto, to)) in (1..).zip(PROTOCOLS) {
        for (dev, direction) in [("lan0", ORIGINAL), ("wan0", REPLY)] {
            let class = net.class();
            let port = net.bind(&class, dev);
            let mut c = net.connect(proto, to);
            c.talk(5);
            if flowtable_wants_both() {
                assert!(port.provider.describe().contains("between its ports"));
                let why = port.try_add(n, net.flow(&c, direction)).unwrap_err();
                assert_eq!(why.reason, Reason::EgressUnsupported);
                assert!(why.detail.unwrap().contains("both netdevs"));
                let (there, back) = net.forwarded_of(&mut c, 20);
                assert!(there >= 20 && back >= 20, "{there}, {back}");
                let others = if dev == "lan0" { "wan0" } else { "lan0" };
                let other = net.bind(&class, others);
                port.add(n, net.flow(&c, direction));
                other.add(n, net.flow(&c, direction.opposite()));
                wait_until("it is offloaded between two ports", || {
                    c.talk(1);
                    net.is_offloaded(&c)
                });
                net.wait_passing_by(&mut c);
                other.provider.release().unwrap();
                port.provider.release().unwrap();
                wait_until("the table takes its entries along", || !net.is_offloaded(&c));
                c.talk(5);
                continue;
            }
            assert!(!port.provider.describe().contains("between its ports"));
            port.add(n, net.flow(&c, direction));
            wait_until("it is offloaded", || {
                c.talk(1);
                net.is_offloaded(&c)
            });
            wait_until(
                "its own direction passes the forward hook by, and the other does not",
                || {
                    let (there, back) = net.forwarded_of(&mut c, 20);
                    let (ours, others) =
                        if direction == ORIGINAL { (there, back) } else { (back, there) };
                    ours == 0 && others >= 20
                },
            );
            port.provider.release().unwrap();
            wait_until("the table takes its entries along", || !net.is_offloaded(&c));
            c.talk(5);
        }
    }
}

/// The provider takes kernels by their version for such as make entries of one netdev alone, or not:
/// this is what they do, without it.
#[test]
fn flowtable_of_one_netdev_has_entries_or_not_as_the_provider_takes_this_kernel() {
    let net = Net::new();
    net.ns.run(
        "nft '
         table inet user {
           flowtable f { hook ingress priority 0; devices = { lan0 }; }
           chain forward { type filter hook forward priority 0; tcp dport 80 counter flow add @f; }
         }
         '",
    );
    let mut c = net.connect(L4Proto::Tcp, "10.0.2.2");
    if flowtable_wants_both() {
        let (there, back) = net.forwarded_of(&mut c, 100);
        assert!(there >= 100 && back >= 100, "{there}, {back}");
        assert!(!net.is_offloaded(&c), "{}", net.entry(&c));
        // It is not that the rule or the connection was no good.
        net.ns.run("nft 'add flowtable inet user f { devices = { wan0 }; }'");
    }
    wait_until("it is offloaded", || {
        c.talk(1);
        net.is_offloaded(&c)
    });
}

/// The path is part of the element: packets that go another way make no entry.
#[test]
fn flowtable_a_path_that_nobody_has_sighted_is_not_offloaded() {
    let net = Net::new();
    let class = net.class();
    net.ns.run("ip link add name other0 type veth peer name far0 && ip link set other0 up");
    let [lan, wan, other] = ["lan0", "wan0", "other0"].map(|dev| net.bind(&class, dev));
    let mut c = net.connect(L4Proto::Tcp, "10.0.2.2");
    c.talk(5);
    // The replies leave by another netdev than the original packets came in on.
    lan.add(1, net.flow(&c, ORIGINAL));
    let mut bent = net.flow(&c, REPLY);
    bent.forward.egress = ifindex("other0");
    wan.add(1, bent);
    let (there, back) = net.forwarded_of(&mut c, 20);
    assert!(!net.is_offloaded(&c));
    assert!(there >= 20 && back >= 20);
    for port in [lan, wan, other] {
        port.provider.release().unwrap();
    }
}

#[test]
fn flowtable_translated_connections_are_offloaded_both_ways() {
    let net = Net::new();
    net.ns.run(
        "nft '
         table inet t {
           chain pre { type nat hook prerouting priority -100
             ip daddr 10.0.1.1 tcp dport 80 dnat ip to 10.0.2.2
             ip6 daddr fd01::1 tcp dport 80 dnat ip6 to fd02::2
           }
           chain post { type nat hook postrouting priority 100; oifname wan0 masquerade; }
         }
         '",
    );
    for (n, to) in (1..).zip(["10.0.2.2", "10.0.1.1", "fd02::2", "fd01::1"]) {
        let class = net.class();
        let (lan, wan) = (net.bind(&class, "lan0"), net.bind(&class, "wan0"));
        let mut c = net.connect(L4Proto::Tcp, to);
        assert_ne!(c.original, c.reply.inverted());
        c.talk(5);
        lan.add(n, net.flow(&c, ORIGINAL));
        wan.add(n, net.flow(&c, REPLY));
        wait_until("it is offloaded", || {
            c.talk(1);
            net.is_offloaded(&c)
        });
        net.wait_passing_by(&mut c);
        lan.provider.release().unwrap();
        wan.provider.release().unwrap();
        c.talk(5);
    }
}

/// conntrack counts what the flowtable forwards, while a port is bound.
#[test]
fn flowtable_counters_are_those_of_conntrack() {
    let net = Net::new();
    let class = net.class();
    let acct = "cat /proc/sys/net/netfilter/nf_conntrack_acct";
    let (lan, wan) = (net.bind(&class, "lan0"), net.bind(&class, "wan0"));
    assert_eq!(net.ns.run(acct), "1\n");
    let mut c = net.connect(L4Proto::Tcp, "10.0.2.2");
    c.talk(50);
    let original = lan.add(1, net.flow(&c, ORIGINAL));
    wan.add(1, net.flow(&c, REPLY));
    wait_until("it is offloaded", || {
        c.talk(1);
        net.is_offloaded(&c)
    });
    // Sweeps that follow each other closely see the same.
    thread::sleep(Duration::from_secs(1));
    let before = lan.usage()[0];
    assert_eq!((before.rule, before.cookie), (original, cookie(1, ORIGINAL)));
    assert_eq!(before.in_hw, Some(false));
    assert!(before.counters.packets < 50, "counted from the add on: {before:?}");
    c.talk(100);
    thread::sleep(Duration::from_secs(1));
    let after = lan.usage()[0].counters;
    assert!(after.packets >= before.counters.packets + 100, "{before:?}, {after:?}");
    assert!(wan.usage()[0].counters.packets >= 100);
    lan.provider.release().unwrap();
    assert_eq!(net.ns.run(acct), "1\n", "another port is bound");
    wan.provider.release().unwrap();
    assert_eq!(net.ns.run(acct), "0\n");
}

#[test]
fn flowtable_renewing_it_brings_other_connections_back() {
    let net = Net::new();
    let class = net.class();
    let (lan, wan) = (net.bind(&class, "lan0"), net.bind(&class, "wan0"));
    let mut keep = net.connect(L4Proto::Udp, "10.0.2.2");
    keep.talk(5);
    lan.add(1, net.flow(&keep, ORIGINAL));
    wan.add(1, net.flow(&keep, REPLY));
    let mut end = net.connect(L4Proto::Tcp, "10.0.2.2");
    end.talk(5);
    let rule = lan.add(2, net.flow(&end, ORIGINAL));
    wan.add(2, net.flow(&end, REPLY));
    wait_until("both are offloaded", || {
        keep.talk(1);
        end.talk(1);
        net.is_offloaded(&keep) && net.is_offloaded(&end)
    });
    let name = |net: &Net| net.ns.run("nft list flowtables | grep flowtable");
    let before = name(&net);
    lan.delete(2, ORIGINAL, rule);
    assert_ne!(name(&net), before, "renewed");
    wait_until("one is back on the slow path, the other is offloaded", || {
        keep.talk(1);
        end.talk(1);
        net.is_offloaded(&keep) && !net.is_offloaded(&end)
    });
    net.wait_passing_by(&mut keep);
    lan.provider.release().unwrap();
    wan.provider.release().unwrap();
}

#[test]
fn flowtable_many_elements_go_in_batches_and_are_swept_flushed_and_bounded() {
    const MANY: u16 = 1300;
    let net = Net::new();
    let config = NfFlowtableConfig { max_rules: usize::from(MANY), ..Default::default() };
    let class = NfFlowtableClass::new(config);
    let (lan, wan) = (net.bind(&class, "lan0"), net.bind(&class, "wan0"));
    let flow_of = |port: u16, v6: bool| {
        let text = if v6 {
            format!("udp [fd01::2]:{port} > [fd02::2]:53")
        } else {
            format!("udp 10.0.1.2:{port} > 10.0.2.2:53")
        };
        let tuple: Tuple = text.parse().unwrap();
        let c = Connection { original: tuple, reply: tuple.inverted(), ends: pipes() };
        net.flow(&c, ORIGINAL)
    };
    let requests = (0..MANY)
        .map(|n| Request::Add {
            cookie: cookie(n.into(), ORIGINAL),
            flow: Box::new(flow_of(n + 1, n % 3 == 0)),
        })
        .collect();
    let added = lan.submit(requests);
    assert!(added.iter().all(|a| matches!(a, Ok(Done::Added { .. }))));
    assert_eq!(lan.usage().len(), usize::from(MANY));
    let one_more =
        Request::Add { cookie: cookie(9999, ORIGINAL), flow: Box::new(flow_of(60000, false)) };
    let full = lan.submit(vec![one_more]).remove(0).unwrap_err();
    assert_eq!(full.reason, Reason::TableFull);
    let elements = |net: &Net, set: &str| {
        net.ns
            .run(&format!("nft -j list set inet ctoffload_flow {set}"))
            .matches("\"elem\"")
            .count()
    };
    assert_eq!(elements(&net, "orig4") + elements(&net, "orig6"), 2, "both sets have elements");
    assert_eq!(lan.provider.flush().unwrap(), u64::from(MANY));
    assert_eq!(lan.usage(), []);
    assert_eq!(elements(&net, "orig4") + elements(&net, "orig6"), 0);
    lan.provider.release().unwrap();
    wan.provider.release().unwrap();
}

fn pipes() -> [Box<dyn Pipe>; 2] {
    let socket = || Box::new(UdpSocket::bind("127.0.0.1:0").unwrap());
    [socket(), socket()]
}

#[test]
fn flowtable_the_users_ruleset_and_ours_do_not_touch_each_other() {
    let net = Net::new();
    // A flowtable of the user's own, on the same netdevs.
    net.ns.run(
        "nft '
         table inet user {
           flowtable f { hook ingress priority 0; devices = { lan0, wan0 }; }
           chain forward { type filter hook forward priority 0; tcp dport 443 flow add @f; }
         }
         '",
    );
    let before = net.ns.run("nft list table inet user");
    let class = net.class();
    let (lan, wan) = (net.bind(&class, "lan0"), net.bind(&class, "wan0"));
    assert_eq!(net.ns.run("nft list table inet user"), before);
    let mut c = net.connect(L4Proto::Tcp, "10.0.2.2");
    c.talk(5);
    lan.add(1, net.flow(&c, ORIGINAL));
    wan.add(1, net.flow(&c, REPLY));
    let refused = net.ns.try_run("nft delete table inet ctoffload_flow");
    assert!(!refused.status.success());
    net.ns.run("nft flush ruleset");
    assert_eq!(net.ns.run("nft list tables"), "table inet ctoffload_flow\n");
    wait_until("it is offloaded all the same", || {
        c.talk(1);
        net.is_offloaded(&c)
    });
    assert_eq!(lan.usage().len(), 1);
    let other = net.class();
    let Err(BindError::Declined(why)) = net.try_bind(&other, "lan0", HwFlags::Both) else {
        panic!()
    };
    assert!(why.contains("another process"), "{why}");
    lan.provider.release().unwrap();
    wan.provider.release().unwrap();
    assert_eq!(net.ns.run("nft list tables"), "");
    // A table of that name which is a person's.
    net.ns.run("nft add table inet ctoffload_flow");
    let Err(BindError::Declined(why)) = net.try_bind(&other, "lan0", HwFlags::Both) else {
        panic!()
    };
    assert!(why.contains("not ours"), "{why}");
    assert_eq!(net.ns.run("nft list tables"), "table inet ctoffload_flow\n");
}

#[test]
fn flowtable_a_netdev_that_goes_is_no_failure() {
    let net = Net::new();
    let class = net.class();
    let (lan, wan) = (net.bind(&class, "lan0"), net.bind(&class, "wan0"));
    let mut c = net.connect(L4Proto::Udp, "10.0.2.2");
    c.talk(5);
    lan.add(1, net.flow(&c, ORIGINAL));
    wan.add(1, net.flow(&c, REPLY));
    wait_until("it is offloaded", || {
        c.talk(1);
        net.is_offloaded(&c)
    });
    // Down: the kernel ends the entry; the elements stand.
    net.ns.run("ip link set wan0 down");
    wait_until("its entry ends with the link", || !net.is_offloaded(&c));
    net.ns.run("ip link set wan0 up");
    wait_until("it is offloaded again", || {
        c.talk(1);
        net.is_offloaded(&c)
    });
    // 6.1 renames only what is down.
    net.ns.run("ip link set lan0 down && ip link set lan0 name lan9 && ip link set lan9 up");
    // As the engine does when the netdev is renamed, and after a sweep that finds it.
    lan.submit(Vec::new());
    lan.usage();
    let devices = |net: &Net| {
        let shown = net.ns.run("nft list flowtables");
        shown.lines().find(|l| l.contains("devices")).map(str::trim).map(str::to_owned)
    };
    assert_eq!(devices(&net).as_deref(), Some("devices = { lan9, wan0 }"));
    net.ns.run("ip link set wan0 name wan9 || { ip link set wan0 down; ip link set wan0 name wan9; ip link set wan9 up; }");
    let found = wan.provider.usage(&mut |_| {});
    let why = found.unwrap_err().to_string();
    assert!(why.contains("another name"), "{why}");
    wan.submit(Vec::new());
    assert_eq!(devices(&net).as_deref(), Some("devices = { lan9, wan9 }"));
    c.talk(5);
    wait_until("it is offloaded under other names", || {
        c.talk(1);
        net.is_offloaded(&c)
    });
    net.ns.run("ip link del wan9");
    wan.provider.flush().unwrap();
    wan.provider.release().unwrap();
    assert_eq!(devices(&net).as_deref(), Some("devices = { lan9 }"));
    // The name is nobody's: the next netdev that has it is not the flowtable's.
    net.ns.run("ip link add wan9 type veth peer name far9 && ip link set wan9 up");
    assert_eq!(devices(&net).as_deref(), Some("devices = { lan9 }"));
    lan.provider.release().unwrap();
    assert!(!net.ns.run("nft list tables").contains("ctoffload"));
}

#[test]
fn flowtable_a_netdev_that_it_cannot_serve_is_declined_with_the_reason() {
    let net = Net::new();
    let class = net.class();
    let declined = |name: &str, flags| match net.try_bind(&class, name, flags) {
        Err(BindError::Declined(why)) => why,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("bound"),
    };
    assert!(declined("lo", HwFlags::Both).contains("Ethernet"));
    assert!(declined("lan0", HwFlags::SkipSw).contains("skip_sw"));
    assert!(!net.ns.run("nft list tables").contains("ctoffload"), "nothing is left behind");
}
