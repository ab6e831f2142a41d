//! Translated flows: addresses, ports, and the checksums over them.

use super::*;

scenarios! { all:
    nat_keeps_every_checksum_right,
    a_translated_tcp_connection_goes_on_when_the_router_no_longer_forwards,
}

/// Payloads of one word with which the checksum before or after the rewrite is 0xffff, 0, or one
/// beside them.
fn special_words(packet: &Packet, to: Tuple) -> Vec<u16> {
    let base = |tuple: Tuple| {
        let frame = Packet { tuple, payload: vec![0, 0], ..packet.clone() }.frame(false);
        parse(&frame).unwrap().l4_check
    };
    let (before, after) = (base(packet.tuple), base(to));
    [before, before.wrapping_add(1), after].to_vec()
}

/// NAT of every kind, over packets in every state that a checksum can be in.
fn nat_keeps_every_checksum_right(backend: Backend) {
    let net = Net::of(backend);
    // What leaves is completed and segmented in software: what the server captures is what would be
    // on a wire. What arrives is left in the state in which it was sent.
    net.ns.run("ethtool -K wan0 tx off tso off gso off tx-udp-segmentation off");
    net.server.sh("ethtool -K s0 rx off gro off");
    let port = net.bind("lan0");
    let pairs = [
        // Both addresses and both ports; source only (SNAT); destination only; one port only.
        (TCP4, "tcp 10.0.2.1:5000 > 10.0.2.77:8080"),
        (TCP4, "tcp 10.0.2.1:4000 > 10.0.2.2:80"),
        (TCP4, "tcp 10.0.1.2:4000 > 10.0.2.77:80"),
        (TCP4, "tcp 10.0.1.2:4001 > 10.0.2.2:80"),
        (UDP4, "udp 10.0.2.1:5000 > 10.0.2.77:5353"),
        (UDP4, "udp 10.0.1.2:4000 > 10.0.2.2:54"),
        (TCP6, "tcp [fd02::1]:5000 > [fd02::77]:8080"),
        (TCP6, "tcp [fd02::1]:4000 > [fd02::2]:80"),
        (UDP6, "udp [fd02::1]:5000 > [fd02::77]:5353"),
        (UDP6, "udp [fd01::2]:4000 > [fd02::2]:5353"),
    ];
    for (epoch, (arrival, departure)) in pairs.into_iter().enumerate() {
        let (epoch, from, to) = (epoch as u64, tuple(arrival), tuple(departure));
        let rule = port.add(epoch, flow(from, to));
        let check = |what: &str, seen: &[Seen], bytes: usize| {
            let payload: usize = seen.iter().map(|s| s.payload.len()).sum();
            assert_eq!(payload, bytes, "{what} {from} -> {to}");
            for s in seen {
                assert!(s.ip_checksum_right && s.l4_checksum_right, "{what} {from} -> {to}: {s:?}");
                assert_eq!((s.ttl, s.src, s.dst), (63, WAN, SERVER));
            }
        };
        let packet = Packet::new(from);
        check("complete", &net.pass(packet.frame(false), false, to, 1), 101);
        // The same without "the checksum has been verified on arrival".
        net.ns.run("ethtool -K lan0 rx off");
        check("unverified", &net.pass(packet.frame(false), false, to, 1), 101);
        net.ns.run("ethtool -K lan0 rx on");
        check("partial", &net.pass(packet.unfinished(0), true, to, 1), 101);
        let long = Packet { payload: (0..4200).map(|i| i as u8).collect(), ..packet.clone() };
        let bytes = long.unfinished(1400);
        match from.proto() {
            L4Proto::Tcp => check("GSO", &net.pass(bytes, true, to, 3), 4200),
            // Without checksums by the netdev, which XDP on a veth wants, older kernels refuse to send such a run.
            L4Proto::Udp if backend == Backend::Xdp => {}
            L4Proto::Udp => check("UDP GSO", &net.pass_datagrams(from, to, 3), 4200),
        }
        // Payloads that make checksums and intermediate sums hit their special values.
        for word in special_words(&packet, to) {
            let odd = Packet { payload: word.to_be_bytes().to_vec(), ..packet.clone() };
            check("special", &net.pass(odd.frame(false), false, to, 1), 2);
        }
        if from.proto() == L4Proto::Udp && !from.is_ipv6() {
            let none = Packet { no_checksum: true, ..packet.clone() };
            let seen = net.pass(none.frame(false), false, to, 1);
            assert_eq!(seen.len(), 1);
            assert_eq!(seen[0].l4_check, 0, "no checksum stays none");
        }
        assert_eq!(port.delete(epoch, rule), Ok(Done::Deleted));
    }
}

/// `act_csum` in the place of the programs: this is what they are for.
#[test]
fn a_csum_action_would_leave_gso_packets_wrong() {
    let net = Net::new();
    net.ns.run("ethtool -K wan0 tx off tso off gso off");
    net.ns.run(&format!(
        "tc qdisc add dev lan0 clsact
         tc filter add dev lan0 ingress protocol ip flower skip_hw ip_proto tcp dst_port 80 \
           action pedit ex munge eth dst set {SERVER} munge ip src set 10.0.2.1 pipe \
           action csum ip and tcp pipe action mirred egress redirect dev wan0"
    ));
    let to = tuple("tcp 10.0.2.1:4000 > 10.0.2.2:80");
    let long = Packet { payload: vec![7; 4200], ..Packet::new(tuple(TCP4)) };
    let bytes = long.unfinished(1400);
    let seen = net.pass(bytes, true, to, 3);
    assert_eq!(seen.len(), 3);
    assert!(seen.iter().all(|s| !s.l4_checksum_right), "{seen:?}");
}

/// A real connection, translated by the rules alone once it stands: the router stops forwarding.
fn a_translated_tcp_connection_goes_on_when_the_router_no_longer_forwards(backend: Backend) {
    const LENGTH: usize = 300_000;
    let net = Net::of(backend);
    net.ns.run(
        "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
         nft add table inet t
         nft add chain inet t post '{ type nat hook postrouting priority 100; }'
         nft add rule inet t post ip saddr 10.0.1.2 tcp dport 80 snat ip to 10.0.2.1:5000
         nft add rule inet t post ip6 saddr fd01::2 tcp dport 80 snat ip6 to '[fd02::1]:5000'
         ethtool -K wan0 tx off tso off gso off gro on
         ethtool -K lan0 tx off tso off gso off gro on",
    );
    // Received checksums are verified by the stacks, in software.
    net.client.sh("ethtool -K c0 rx off");
    net.server.sh("ethtool -K s0 rx off");
    for (arrival, departure) in
        [(TCP4, "tcp 10.0.2.1:5000 > 10.0.2.2:80"), (TCP6, "tcp [fd02::1]:5000 > [fd02::2]:80")]
    {
        let (arrival, departure) = (tuple(arrival), tuple(departure));
        let (port_tx, port) = mpsc::channel();
        let (arrived_tx, arrived) = mpsc::channel::<()>();
        let server_at = SocketAddr::new(departure.dst(), 80);
        net.server.start(move || {
            let listener = TcpListener::bind(server_at).unwrap();
            port_tx.send(None).unwrap();
            let (mut stream, peer) = listener.accept().unwrap();
            port_tx.send(Some(peer)).unwrap();
            // Sends everything back, and closes only when it has arrived: the last data would go with
            // the FIN, the slow way, which is blocked here.
            let mut buf = vec![0; 65536];
            let mut left = LENGTH;
            while left > 0 {
                let n = stream.read(&mut buf).unwrap();
                stream.write_all(&buf[..n]).unwrap();
                left -= n;
            }
            let _ = arrived.recv();
        });
        port.recv().unwrap();
        let mut stream = net.client.call(move || TcpStream::connect(server_at).unwrap());
        let peer = port.recv().unwrap().unwrap();
        assert_eq!(peer, SocketAddr::new(departure.src(), 5000));
        let sport = stream.local_addr().unwrap().port();
        let tuple_at =
            |port: u16| Tuple::new(L4Proto::Tcp, arrival.src(), port, arrival.dst(), 80).unwrap();
        let (lan, wan) = (net.bind("lan0"), net.bind("wan0"));
        lan.add(1, flow(tuple_at(sport), departure));
        wan.add(
            1,
            Flow {
                direction: Direction::Reply,
                matches: FlowMatch { eth_dst: Some(WAN), vlan: None, tuple: departure.inverted() },
                forward: Forward {
                    egress: ifindex("lan0"),
                    vlan: None,
                    mtu: 1500,
                    tuple: tuple_at(sport).inverted(),
                    macs: Some(MacRewrite { src: LAN, dst: CLIENT }),
                    egress_decides: false,
                },
                ..flow(departure, departure)
            },
        );
        net.ns.run("sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0");
        let data: Vec<u8> = (0..LENGTH).map(|i| (i % 251) as u8).collect();
        let sent = data.clone();
        let mut writer = stream.try_clone().unwrap();
        let writing = std::thread::spawn(move || writer.write_all(&sent).unwrap());
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut back = vec![0; data.len()];
        if let Err(e) = stream.read_exact(&mut back) {
            let (lan, wan) = (net.filters("lan0"), net.filters("wan0"));
            let stack = "ss -tin; nstat -az | grep -E 'Retrans|CsumErr|InErrs|Discards|TCPAbort'";
            let (client, server) = (net.client.sh(stack), net.server.sh(stack));
            panic!("{e}\n{lan}\n{wan}\nclient:\n{client}\nserver:\n{server}");
        }
        drop(arrived_tx);
        writing.join().unwrap();
        assert!(back == data);
        let cookie = |p: &Port| p.usage()[0].counters;
        let (there, back) = (cookie(&lan), cookie(&wan));
        println!("{arrival}: {there:?} there, {back:?} back");
        assert!(there.bytes > LENGTH as u64 && back.bytes > LENGTH as u64);
        lan.provider.release().unwrap();
        wan.provider.release().unwrap();
        net.ns.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        drop(stream);
    }
}
