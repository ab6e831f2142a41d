//! What is logged, once, and what is not.

use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd};

use ctoffload::datapath::netfilter::conntrack::CtId;
use ctoffload::datapath::netfilter::ledger::LedgerError;

use super::*;

#[test]
fn netfilter_one_log_per_netdev_connection_and_direction() {
    let r = Router::new();
    let mut log = SightLog::open(GROUP).unwrap();
    let mut ledger = r.ledger(LedgerConfig::default());
    let mut ct = Conntrack::open().unwrap();

    // The last ACK of a handshake has made the connection assured before it reaches the forward
    // hook, so it is the first sight of the original direction already.
    let mut want = Vec::new();
    let mut open = Vec::new();
    for (from, to, target) in
        [(0, 1, "10.0.1.2"), (0, 1, "10.0.1.2"), (2, 1, "10.0.1.2"), (1, 0, "fd00:0::2")]
    {
        let (mut c, mut s) = r.tcp(from, to, target);
        talk(&mut c, &mut s);
        want.extend(both_directions(&entry(&mut ct, &c), r.ports[from], r.ports[to]));
        open.push((c, s));
    }
    want.sort_unstable();
    assert_eq!(seen(&mut log, &mut ct), want);
    assert_eq!(ledger.sighted().unwrap(), want);
    assert_eq!(ledger.len().unwrap(), want.len());
    let mut ports = r.ports;
    ports.sort_unstable();
    assert_eq!(ledger.ports().unwrap(), ports);

    // A thousand packets more: nothing.
    for (c, s) in &mut open {
        for _ in 0..100 {
            talk(c, s);
        }
    }
    assert_eq!(seen(&mut log, &mut ct), []);
    // But they are counted, each in its element.
    let counted = ledger.counted().unwrap();
    assert_eq!(counted.len(), want.len());
    assert!(want.iter().all(|k| counted[k] > 100), "{counted:?}");

    // Re-armed: one more each, and only of these; what is not there, and what comes twice, does not
    // matter.
    let mut missing = want[0];
    missing.ct_id.0 ^= 1;
    ledger.rearm(&[want[0], missing, want[3], want[0]]).unwrap();
    let mut left = want.clone();
    left.retain(|k| ![want[0], want[3]].contains(k));
    assert_eq!(ledger.sighted().unwrap(), left);
    for (c, s) in &mut open {
        talk(c, s);
    }
    let mut again = [want[0], want[3]];
    again.sort_unstable();
    assert_eq!(seen(&mut log, &mut ct), again);
    assert_eq!(ledger.sighted().unwrap(), want);
    let counted = ledger.counted().unwrap();
    let afresh: Vec<_> = want.iter().filter(|k| counted[k] < 100).copied().collect();
    assert_eq!(afresh, again);

    ledger.rearm(&want).unwrap();
    assert!(ledger.is_empty().unwrap());
    // Many missing ones at once, more than a message or a send holds.
    let many: Vec<_> = (0..3000).map(|n| LedgerKey { ct_id: CtId(n), ..want[0] }).collect();
    ledger.rearm(&many).unwrap();
    // Of connections that have their id in common, too: the port is another's.
    for (c, s) in &mut open {
        talk(c, s);
    }
    let own = ledger.sighted().unwrap();
    assert_eq!(own, want);
    let others: Vec<_> = want.iter().map(|k| LedgerKey { sport: k.sport ^ 1, ..*k }).collect();
    ledger.rearm(&others).unwrap();
    assert_eq!(ledger.sighted().unwrap(), own);
    ledger.remove().unwrap();
    assert!(!r.ns.run("nft list tables").contains("ctoffload"));
}

#[test]
fn netfilter_only_ports_are_sighted() {
    let r = Router::new();
    let mut log = SightLog::open(GROUP).unwrap();
    let mut ledger = r.ledger(LedgerConfig::default());
    let mut ct = Conntrack::open().unwrap();
    ledger.port_del(r.ports[1]).unwrap();
    ledger.port_del(r.ports[1]).unwrap();
    ledger.port_add(r.ports[0]).unwrap();
    let (mut c, mut s) = r.tcp(0, 1, "10.0.1.2");
    talk(&mut c, &mut s);
    let [original, reply] = both_directions(&entry(&mut ct, &c), r.ports[0], r.ports[1]);
    assert_eq!(seen(&mut log, &mut ct), [original]);
    ledger.port_add(r.ports[1]).unwrap();
    talk(&mut c, &mut s);
    assert_eq!(seen(&mut log, &mut ct), [reply]);
}

#[test]
fn netfilter_udp_is_sighted_after_a_reply_or_one_way_if_asked() {
    let r = Router::new();
    let mut log = SightLog::open(GROUP).unwrap();
    for one_way in [false, true] {
        let ledger = r.ledger(LedgerConfig { one_way_udp: one_way, ..LedgerConfig::default() });
        let server = r.hosts[1].call(|| UdpSocket::bind("10.0.1.2:0").unwrap());
        let client = r.hosts[0].call(|| UdpSocket::bind("10.0.0.2:0").unwrap());
        server.set_read_timeout(Some(SOON)).unwrap();
        client.set_read_timeout(Some(SOON)).unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        let mut buf = [0; 8];
        for _ in 0..5 {
            client.send(b"x").unwrap();
            server.recv(&mut buf).unwrap();
        }
        let before = sights(&mut log);
        assert_eq!(before.len(), usize::from(one_way), "{before:?}");
        // A fragmented datagram is reassembled before the forward hook, and is a sight like others.
        server.send_to(&[7; 4000], client.local_addr().unwrap()).unwrap();
        let mut big = [0; 5000];
        assert_eq!(client.recv(&mut big).unwrap(), 4000);
        for _ in 0..5 {
            client.send(b"x").unwrap();
            server.recv(&mut buf).unwrap();
        }
        let after = sights(&mut log);
        let devs: Vec<_> = after.iter().map(|s| s.in_dev).collect();
        assert_eq!(devs.len(), 2 - usize::from(one_way), "{after:?}");
        assert!(devs.contains(&r.ports[1]));
        ledger.remove().unwrap();
    }
}

#[test]
fn netfilter_handshakes_are_no_sights() {
    let r = Router::new();
    let mut log = SightLog::open(GROUP).unwrap();
    let _ledger = r.ledger(LedgerConfig::default());
    // Refused: SYN and RST only.
    let refused =
        r.hosts[0].call(|| TcpStream::connect_timeout(&"10.0.1.2:9".parse().unwrap(), SOON));
    assert!(refused.is_err());
    assert_eq!(sights(&mut log), []);
    // A filter drops what is behind SYN and SYN+ACK: never assured as far as the ledger sees, for
    // it stands behind the filter.
    r.ns.run(
        "nft 'table inet user { chain f { type filter hook forward priority 0; \
         tcp flags & (syn|rst) == 0 drop; }; }'",
    );
    let (c, s) = {
        let listener = r.hosts[1].call(|| TcpListener::bind("10.0.1.2:0").unwrap());
        let addr = listener.local_addr().unwrap();
        (r.hosts[0].call(move || TcpStream::connect_timeout(&addr, SOON).unwrap()), listener)
    };
    (&c).write_all(b"never arrives").unwrap();
    assert_eq!(sights(&mut log), []);
    drop((c, s));
}

/// None: they are taken away.
fn set_ip_options(socket: &UdpSocket, options: &[u8]) {
    let fd = socket.as_fd().as_raw_fd();
    let len = libc::socklen_t::try_from(options.len()).unwrap();
    // SAFETY: the pointer and the length are those of a slice that lives through the call.
    let set = unsafe {
        libc::setsockopt(fd, libc::IPPROTO_IP, libc::IP_OPTIONS, options.as_ptr().cast(), len)
    };
    assert_eq!(set, 0);
}

#[test]
fn netfilter_packets_with_options_are_no_sights() {
    let r = Router::new();
    let mut log = SightLog::open(GROUP).unwrap();
    let _ledger = r.ledger(LedgerConfig { one_way_udp: true, ..LedgerConfig::default() });
    let client = r.hosts[0].call(|| UdpSocket::bind("10.0.0.2:0").unwrap());
    let server = r.hosts[1].call(|| UdpSocket::bind("10.0.1.2:0").unwrap());
    client.connect(server.local_addr().unwrap()).unwrap();
    // Four no-operation options.
    set_ip_options(&client, &[1; 4]);
    for _ in 0..5 {
        client.send(b"x").unwrap();
    }
    assert_eq!(sights(&mut log), []);
    set_ip_options(&client, &[]);
    for _ in 0..5 {
        client.send(b"x").unwrap();
    }
    assert_eq!(sights(&mut log).len(), 1);
}

#[test]
fn netfilter_a_full_ledger_is_silent_and_shows_it() {
    let r = Router::new();
    let mut log = SightLog::open(GROUP).unwrap();
    let mut ledger = r.ledger(LedgerConfig { size: 3, ..LedgerConfig::default() });
    let mut open: Vec<_> = (0..4).map(|_| r.tcp(0, 1, "10.0.1.2")).collect();
    for (c, s) in &mut open {
        talk(c, s);
    }
    assert_eq!(sights(&mut log).len(), 3);
    assert_eq!((ledger.len().unwrap(), ledger.size()), (3, 3));
    // Room for one again.
    let keys = ledger.sighted().unwrap();
    ledger.rearm(&keys[..1]).unwrap();
    for (c, s) in &mut open {
        talk(c, s);
    }
    assert_eq!(sights(&mut log).len(), 1);
    assert_eq!(ledger.len().unwrap(), 3);
}

/// Two hosts behind a bridge, and one that the router routes to.
#[test]
fn netfilter_a_bridge_shows_its_ports_the_connection_and_the_tag() {
    let r = Router::new();
    let mac = |host: usize| {
        let link = r.hosts[host].sh("ip -br link show e0");
        link.split_whitespace().nth(2).unwrap().to_owned()
    };
    r.ns.run(
        "set -e; ip link add br0 type bridge; ip link set br0 up
         for r in r0 r1; do ip addr flush dev $r; ip link set $r master br0; done
         ip addr add 10.0.0.1/24 dev br0; ip addr add fd00:0::1/64 dev br0 nodad",
    );
    r.hosts[1].sh(
        "ip addr flush dev e0; ip addr add 10.0.0.3/24 dev e0; ip addr add fd00:0::3/64 dev e0 nodad
         ip link add link e0 name e0.7 type vlan id 7; ip link set e0.7 up
         ip addr add 10.0.7.3/24 dev e0.7",
    );
    r.hosts[0].sh("ip link add link e0 name e0.7 type vlan id 7; ip link set e0.7 up
         ip addr add 10.0.7.2/24 dev e0.7");
    let mut log = SightLog::open(GROUP).unwrap();
    let mut ledger = r.ledger(LedgerConfig { bridged: true, ..LedgerConfig::default() });
    let bridge = r.ns.run("ip -o link show br0 | cut -d: -f1");
    ledger.port_add(Ifindex::new(bridge.trim().parse().unwrap()).unwrap()).unwrap();
    let mut ct = Conntrack::open().unwrap();

    let mut want = Vec::new();
    let mut open = Vec::new();
    for (target, vlan) in [("10.0.0.3", None), ("fd00:0::3", None), ("10.0.7.3", Some(7))] {
        let (mut c, mut s) = r.tcp(0, 1, target);
        talk(&mut c, &mut s);
        let entry = entry(&mut ct, &c);
        let keys = both_directions_in(Hook::Bridge, &entry, r.ports[0], r.ports[1]);
        let [there, back] = &sights(&mut log)[..] else { panic!("two sights to {target}") };
        for (sight, key, out, hosts) in
            [(there, keys[0], r.ports[1], [1, 0]), (back, keys[1], r.ports[0], [0, 1])]
        {
            assert_eq!((sight.hook, sight.in_dev, sight.out_dev), (key.hook, key.iif, Some(out)));
            assert_eq!(sight.vlan, vlan);
            let header = sight.hw_header.unwrap();
            let macs = [0, 6].map(|at| header[at..at + 6].iter().map(|b| format!("{b:02x}")));
            let macs = macs.map(|bytes| bytes.collect::<Vec<_>>().join(":"));
            assert_eq!(macs, hosts.map(mac));
            assert_eq!(sight.leaving_tuple(), Some(entry.outgoing(key.direction)));
            let found =
                ct.find_leaving(Zone(0), &[sight.leaving_tuple().unwrap()]).unwrap().remove(0);
            assert_eq!(found.map(|(e, d)| (e.id, d)), Some((entry.id, key.direction)));
            assert_eq!(sight.ct.is_some(), log.has_conntrack());
            assert_eq!(sight.ct.as_ref().map(|e| e.original), Some(entry.original));
        }
        want.extend(keys);
        open.push((c, s));
    }
    // What is routed is sighted where it is routed, in the other table.
    let (mut c, mut s) = r.tcp(0, 2, "10.0.2.2");
    talk(&mut c, &mut s);
    let routed = both_directions(&entry(&mut ct, &c), ledger.ports().unwrap()[3], r.ports[2]);
    let mut routed = routed.to_vec();
    routed.sort_unstable();
    assert_eq!(seen(&mut log, &mut ct), routed);
    want.extend(routed);
    open.push((c, s));
    want.sort_unstable();
    assert_eq!(ledger.sighted().unwrap(), want);
    assert_eq!(ledger.len().unwrap(), want.len());
    let counted = ledger.counted().unwrap();
    assert!(counted.len() == want.len() && want.iter().all(|k| counted[k] > 2), "{counted:?}");

    // Re-armed in the table that each is in, and only there.
    let other = |k: &LedgerKey| LedgerKey {
        hook: if k.hook == Hook::Inet { Hook::Bridge } else { Hook::Inet },
        ..*k
    };
    let others: Vec<_> = want.iter().map(other).collect();
    ledger.rearm(&others).unwrap();
    assert_eq!(ledger.sighted().unwrap(), want);
    let again = [want[0], want[2], want[3]];
    ledger.rearm(&again).unwrap();
    for (c, s) in &mut open {
        talk(c, s);
    }
    assert_eq!(seen(&mut log, &mut ct), again);
    assert_eq!(r.ns.run("nft list tables"), "table inet ctoffload\ntable bridge ctoffload\n");
    ledger.remove().unwrap();
    assert_eq!(r.ns.run("nft list tables"), "");
    // Whose table it is, and what is in the way, is told with its family.
    r.ns.run("nft add table bridge ctoffload");
    let refused = Ledger::install(LedgerConfig { bridged: true, ..LedgerConfig::default() });
    let Err(LedgerError::TableExists { table }) = refused else { panic!("{refused:?}") };
    assert_eq!(table, "bridge ctoffload");
    assert!(!r.ns.run("nft list tables").contains("inet"));
}
