//! Packets that must not be redirected: each is sent by hand to a router that has a rule for its
//! flow, and is seen on the slow path, with what the slow path answers.

use super::*;
use netdev_providers::VlanId;

scenarios! { all:
    what_is_for_the_slow_path_is_seen_there,
    what_is_damaged_is_left_to_the_stack,
    the_sender_hears_that_the_time_to_live_is_over,
    what_is_too_long_for_the_way_out_gets_the_answer_of_the_slow_path,
}

scenarios! { with_an_skb:
    a_packet_has_the_priority_that_the_router_gives_it,
}

/// A router that forwards, counts what gets to its stack, and has a rule for every flow.
struct Router {
    net: Net,
    port: Port,
    /// The tag that frames have on the way to it.
    vlan: Option<u16>,
}

impl Router {
    fn of(backend: Backend, vlan: Option<u16>) -> Self {
        let net = Net::of(backend);
        let arrives_on = if vlan.is_some() { "lan0.10" } else { "lan0" };
        if let Some(id) = vlan {
            net.ns.run(&format!(
                "ip link add link lan0 name lan0.10 type vlan id {id}
                 ip addr del 10.0.1.1/24 dev lan0; ip addr del fd01::1/64 dev lan0
                 ip addr add 10.0.1.1/24 dev lan0.10; ip addr add fd01::1/64 dev lan0.10 nodad
                 ip link set lan0.10 up"
            ));
            net.client.sh(&format!(
                "ip link add link c0 name c0.10 type vlan id {id}
                 ip addr flush dev c0
                 ip addr add 10.0.1.2/24 dev c0.10; ip addr add fd01::2/64 dev c0.10 nodad
                 ip link set c0.10 up
                 ip route replace default via 10.0.1.1; ip -6 route replace default via fd01::1"
            ));
        }
        net.ns.run(&format!(
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
             sysctl -qw net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0
             ip neigh replace 10.0.1.2 lladdr {CLIENT} dev {arrives_on} nud permanent
             ip neigh replace fd01::2 lladdr {CLIENT} dev {arrives_on} nud permanent
             ip neigh replace 10.0.2.2 lladdr {SERVER} dev wan0 nud permanent
             ip neigh replace fd02::2 lladdr {SERVER} dev wan0 nud permanent
             nft add table inet t; nft add counter inet t seen
             nft add chain inet t pre '{{ type filter hook prerouting priority -500; }}'
             nft add rule inet t pre iifname {arrives_on} meta l4proto '{{ tcp, udp }}' counter name seen"
        ));
        let port = net.bind("lan0");
        Self { net, port, vlan }
    }

    fn flow(&self, t: Tuple) -> Flow {
        let mut flow = flow(t, t);
        flow.matches.vlan = self.vlan.and_then(VlanId::new);
        flow
    }

    fn packet(&self, name: &str) -> Packet {
        let tags = self.vlan.map(|id| (0x8100, id)).into_iter().collect();
        Packet { tags, ..Packet::new(tuple(name)) }
    }

    /// Packets that the rules have taken.
    fn taken(&self) -> u64 {
        self.port.usage().iter().map(|r| r.counters.packets).sum()
    }

    /// Packets that got to the stack.
    fn seen(&self) -> u64 {
        let text = self.net.ns.run("nft list counter inet t seen");
        let mut words = text.split_whitespace().skip_while(|w| *w != "packets");
        words.nth(1).unwrap().parse().unwrap()
    }

    /// Sends a packet and returns the type and code of the ICMP message that comes back within this time.
    fn answer(&self, packet: &Packet, within: Duration) -> Option<(u8, u8)> {
        let frame = packet.frame(false);
        let got = self.net.client.call(move || {
            let wire = Wire::open("c0", false);
            wire.send(&frame);
            let is_error = |f: &[u8]| icmp_error(f).is_some();
            wire.receive(1, within, is_error)
        });
        got.first().and_then(|f| icmp_error(f))
    }
}

/// Type and code of an ICMP error that the router sends to the client.
fn icmp_error(frame: &[u8]) -> Option<(u8, u8)> {
    if frame.get(..6)? != CLIENT.0 {
        return None;
    }
    let at = if frame.get(12..14)? == [0x81, 0] { 16 } else { 12 };
    let (proto, src, icmp) = match frame.get(at..at + 2)? {
        [8, 0] => (*frame.get(at + 11)?, frame.get(at + 14..at + 18)?, frame.get(at + 22..)?),
        [0x86, 0xdd] => (*frame.get(at + 8)?, frame.get(at + 10..at + 26)?, frame.get(at + 42..)?),
        _ => return None,
    };
    let router: [IpAddr; 2] = ["10.0.1.1".parse().unwrap(), "fd01::1".parse().unwrap()];
    if !router.iter().any(|ip| octets(*ip) == src) {
        return None;
    }
    let is_error = match proto {
        1 => matches!(icmp.first()?, 3 | 11 | 12),
        58 => *icmp.first()? < 128,
        _ => false,
    };
    is_error.then(|| Some((*icmp.first()?, *icmp.get(1)?)))?
}

/// Tags that frames arrive with: none, and one, where the kernel has VLAN devices (Debian's have).
fn tags() -> Vec<Option<u16>> {
    let ns = NetNs::new();
    ns.run("ip link add v0 type veth peer name v1");
    if ns.try_run("ip link add link v0 name v0.10 type vlan id 10").status.success() {
        return vec![None, Some(10)];
    }
    println!("not checked with tags: this kernel has no VLAN devices");
    vec![None]
}

const ALL: [&str; 4] = [TCP4, UDP4, TCP6, UDP6];

fn what_is_for_the_slow_path_is_seen_there(backend: Backend) {
    for vlan in tags() {
        let r = Router::of(backend, vlan);
        for (epoch, t) in ALL.into_iter().map(tuple).enumerate() {
            r.port.add(epoch as u64, r.flow(t));
        }
        let mut cases: Vec<(String, Packet)> = Vec::new();
        for name in ALL {
            for ttl in [0, 1] {
                cases.push((format!("TTL {ttl}"), Packet { ttl, ..r.packet(name) }));
            }
            let v6 = tuple(name).is_ipv6();
            let group = if v6 { [0x33, 0x33, 0, 0, 0, 1] } else { [1, 0, 0x5e, 0, 0, 1] };
            for (what, mac) in [("broadcast", [0xff; 6]), ("multicast", group)] {
                cases.push((what.into(), Packet { eth_dst: MacAddr(mac), ..r.packet(name) }));
            }
        }
        for name in [TCP4, TCP6] {
            for (what, flag) in [("FIN", 1), ("SYN", 2), ("RST", 4)] {
                let packet = Packet { tcp_flags: 0x10 | flag, ..r.packet(name) };
                cases.push((what.into(), packet));
            }
        }
        for name in [TCP4, UDP4] {
            for words in [1, 2, 3, 10] {
                let options = [vec![1; words * 4 - 1], vec![0]].concat();
                cases.push((
                    format!("{words} words of options"),
                    Packet { options, ..r.packet(name) },
                ));
            }
            cases.push(("a first fragment".into(), Packet { fragment: 0x2000, ..r.packet(name) }));
            cases.push(("a later fragment".into(), Packet { fragment: 0x0010, ..r.packet(name) }));
        }
        for name in [TCP6, UDP6] {
            for kind in [0, 43, 60, 44] {
                cases.push((
                    format!("extension header {kind}"),
                    r.packet(name).with_extension(kind),
                ));
            }
        }
        for (what, packet) in &cases {
            r.net.send(packet.frame(false));
            assert_eq!(r.taken(), 0, "{what}: {packet:?} was taken\n{}", r.net.filters("lan0"));
        }
        assert_eq!(r.seen(), cases.len() as u64, "each got to the stack");
        // What is for the rules does not get there.
        for (n, name) in ALL.into_iter().enumerate() {
            let packet = r.packet(name);
            assert_eq!(r.net.pass(packet.frame(false), false, packet.tuple, 1).len(), 1, "{name}");
            assert_eq!(r.taken(), n as u64 + 1, "{name}");
        }
        assert_eq!(r.seen(), cases.len() as u64);
    }
}

/// The frame with bytes of its IP packet changed, and the header checksum of IPv4 put right again.
fn changed(frame: &[u8], l3: usize, change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
    let (head, ip) = frame.split_at(l3);
    let mut ip = ip.to_vec();
    change(&mut ip);
    if ip[0] >> 4 == 4 {
        ip[10..12].fill(0);
        let check = !packets::sum(0, &ip[..20]);
        ip[10..12].copy_from_slice(&check.to_be_bytes());
    }
    [head, &ip].concat()
}

/// Packets that `ip_rcv` drops or cuts, or that conntrack calls invalid: the stack does with them what it
/// does. None of the wrong header checksums arrives, wrong or made right.
fn what_is_damaged_is_left_to_the_stack(backend: Backend) {
    for vlan in tags() {
        let r = Router::of(backend, vlan);
        let mut damaged = 0;
        for (epoch, name) in ALL.into_iter().enumerate() {
            let t = tuple(name);
            r.port.add(epoch as u64, r.flow(t));
            let packet = r.packet(name);
            let (good, l3) = (packet.frame(false), packet.l3_at());
            let (v6, l4) = (t.is_ipv6(), packet.l3_len());
            let with = |change: &dyn Fn(&mut Vec<u8>)| changed(&good, l3, change);
            let length_at = if v6 { 4 } else { 2 };
            let longer = |ip: &mut Vec<u8>, at: usize, by: i16| {
                let old = u16::from_be_bytes([ip[at], ip[at + 1]]);
                ip[at..at + 2].copy_from_slice(&old.wrapping_add_signed(by).to_be_bytes());
            };
            let mut cases: Vec<(&str, Vec<u8>)> = vec![
                ("longer than the frame", with(&|ip| longer(ip, length_at, 1))),
                ("bytes behind it", with(&|ip| ip.extend([0; 7]))),
                ("another version", with(&|ip| ip[0] ^= 0x20)),
            ];
            match t.proto() {
                L4Proto::Tcp => {
                    cases.push(("a data offset of 4 words", with(&|ip| ip[l4 + 12] = 0x40)));
                    cases.push((
                        "a data offset beyond the packet",
                        with(&|ip| {
                            longer(ip, length_at, -101);
                            ip.truncate(l4 + 20);
                            ip[l4 + 12] = 0x70;
                            ip.resize(46.max(l4 + 20), 0);
                        }),
                    ));
                    cases.push(("no flags", with(&|ip| ip[l4 + 13] = 0)));
                    cases.push(("no ACK", with(&|ip| ip[l4 + 13] = 0x08)));
                }
                L4Proto::Udp => {
                    cases.push(("a UDP length of 7", with(&|ip| ip[l4 + 5] = 7)));
                    cases.push((
                        "a UDP length beyond the packet",
                        with(&|ip| longer(ip, l4 + 4, 1)),
                    ));
                }
            }
            if !v6 {
                for at in [1, 4, 8, 10, 11] {
                    let mut frame = good.clone();
                    frame[l3 + at] ^= 0x04;
                    cases.push(("a wrong header checksum", frame));
                }
            }
            for (what, frame) in cases {
                if what.ends_with("header checksum") {
                    assert_eq!(r.net.pass(frame, false, t, 0).len(), 0, "{what}: {name}");
                    damaged += 1;
                } else {
                    r.net.send(frame);
                }
                assert_eq!(r.taken(), epoch as u64, "{what}: {name}\n{}", r.net.filters("lan0"));
            }
            // What is behind the packet only because frames have a least length is nobody's fault.
            let short = Packet { payload: Vec::new(), ..packet.clone() };
            let mut frame = short.frame(false);
            frame.resize(frame.len().max(l3 + 46), 0);
            assert_eq!(r.net.pass(frame, false, t, 1).len(), 1, "{name}");
            assert_eq!(r.taken(), epoch as u64 + 1, "{name}");
        }
        assert_eq!(damaged, 10);
    }
}

/// Which band of the qdisc on the way out packets with a ToS take: as many by the rule as by the stack.
fn a_packet_has_the_priority_that_the_router_gives_it(backend: Backend) {
    const EACH: usize = 4;
    let bands = |r: &Router| -> Vec<u64> {
        let text = r.net.ns.run("tc -s class show dev wan0");
        let sent = text.lines().filter_map(|l| l.trim().strip_prefix("Sent "));
        let packets = |l: &str| l.split_whitespace().nth(2).unwrap().parse().unwrap();
        sent.map(packets).take(4).collect()
    };
    for vlan in tags() {
        let r = Router::of(backend, vlan);
        // What the router says itself (neighbour discovery) has the priority of control.
        r.net.ns.run(
            "tc qdisc add dev wan0 root handle 1: prio bands 5 \
               priomap 0 4 1 4 2 4 3 4 4 4 4 4 4 4 4 4",
        );
        for (n, name) in ALL.into_iter().enumerate() {
            let t = tuple(name);
            let packet = r.packet(name);
            let l3 = packet.l3_at();
            let mut took: Vec<Vec<Option<usize>>> = Vec::new();
            for offloaded in [false, true] {
                let rule = offloaded.then(|| r.port.add(n as u64, r.flow(t)));
                let (mut of_tos, mut before) = (Vec::new(), bands(&r));
                for tos in [0, 0x02, 0x08, 0x10, 0x18, 0x20, 0x48, 0xb8, 0xe0] {
                    let frame = changed(&packet.frame(false), l3, |ip| {
                        if t.is_ipv6() {
                            (ip[0], ip[1]) = (0x60 | tos >> 4, tos << 4);
                        } else {
                            ip[1] = tos;
                        }
                    });
                    let seen = r.net.pass_all(vec![frame; EACH], false, t, EACH);
                    assert_eq!(seen.len(), EACH, "{name}");
                    let after = bands(&r);
                    let grown = |(a, b): (&u64, &u64)| b - a >= EACH as u64;
                    of_tos.push(before.iter().zip(&after).position(grown));
                    before = after;
                }
                if let Some(rule) = rule {
                    let packets = r.port.packets(n as u64);
                    assert_eq!(packets, 9 * EACH as u64, "{name}: by the rule");
                    r.port.delete(n as u64, rule).unwrap();
                }
                took.push(of_tos);
            }
            assert_eq!(took[0], took[1], "{name}: by the stack, by the rule");
            let different = took[0].iter().collect::<std::collections::HashSet<_>>().len();
            assert_eq!(different, if t.is_ipv6() { 1 } else { 4 }, "{name}: {took:?}");
        }
    }
}

fn the_sender_hears_that_the_time_to_live_is_over(backend: Backend) {
    for vlan in tags() {
        let r = Router::of(backend, vlan);
        for (epoch, name) in ALL.into_iter().enumerate() {
            r.port.add(epoch as u64, r.flow(tuple(name)));
            let packet = Packet { ttl: 1, ..r.packet(name) };
            let exceeded = if packet.tuple.is_ipv6() { (3, 0) } else { (11, 0) };
            assert_eq!(r.answer(&packet, ARRIVES), Some(exceeded), "{name}");
        }
        assert_eq!(r.taken(), 0);
    }
}

/// The netdev to the server has the smaller MTU. What fits takes the rule; what does not, by a single
/// byte, gets the answer of the slow path, and so does what would not once it is segmented.
fn what_is_too_long_for_the_way_out_gets_the_answer_of_the_slow_path(backend: Backend) {
    const MTU: u32 = 1400;
    for vlan in tags() {
        let r = Router::of(backend, vlan);
        r.net.ns.run(&format!("ip link set wan0 mtu {MTU}"));
        for (epoch, name) in ALL.into_iter().enumerate() {
            let epoch = epoch as u64;
            let t = tuple(name);
            let mut flow = r.flow(t);
            flow.forward.mtu = MTU;
            r.port.add(epoch, flow);
            let headers = Packet::new(t).l3_len() + Packet::new(t).l4_header_len();
            // With "don't fragment" in IPv4.
            let of_length = |length: u32| Packet {
                payload: vec![7; length as usize - headers],
                fragment: if t.is_ipv6() { 0 } else { 0x4000 },
                ..r.packet(name)
            };
            let fits = of_length(MTU);
            assert_eq!(r.net.pass(fits.frame(false), false, t, 1).len(), 1, "{name}");
            assert_eq!(r.port.packets(epoch), 1, "{name}\n{}", r.net.filters("lan0"));
            let before = r.seen();
            let too_big = if t.is_ipv6() { (2, 0) } else { (3, 4) };
            assert_eq!(r.answer(&of_length(MTU + 1), ARRIVES), Some(too_big), "{name}");
            assert_eq!((r.port.packets(epoch), r.seen()), (1, before + 1), "{name}");
            if !t.is_ipv6() {
                // Without it the slow path makes fragments, which no TCP or UDP header tells apart.
                let cut = Packet { fragment: 0, ..of_length(MTU + 1) };
                assert_eq!(r.answer(&cut, Duration::from_millis(1500)), None, "{name}");
                assert_eq!((r.port.packets(epoch), r.seen()), (1, before + 2), "{name}");
            }
            // What is sent in one piece is cut before XDP is given it.
            if t.proto() != L4Proto::Tcp || backend == Backend::Xdp {
                continue;
            }
            // Segments that fit, and segments that are a byte too long, in one large packet each.
            let segmented = |segment: u32| {
                let gso = (segment as usize - headers) as u16;
                let packet = Packet { payload: vec![7; usize::from(gso) * 3], ..of_length(MTU) };
                packet.unfinished(gso)
            };
            let before = r.seen();
            assert_eq!(r.net.pass(segmented(MTU), true, t, 1).len(), 1, "{name}");
            assert!(r.port.packets(epoch) > 1 && r.seen() == before, "{name}");
            let taken = r.port.packets(epoch);
            assert_eq!(r.net.pass(segmented(MTU + 1), true, t, 0).len(), 0, "{name}");
            assert_eq!((r.port.packets(epoch), r.seen()), (taken, before + 1), "{name}");
        }
    }
}
