//! The ledger, the log and conntrack against the kernel: a router with three links, hosts in
//! network namespaces of their own.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use ctoffload::datapath::netfilter::conntrack::{
    Conntrack, CtEntry, CtEvent, CtEvents, CtUpdate, TcpState, timeouts,
};
use ctoffload::datapath::netfilter::ledger::{Hook, Ledger, LedgerConfig, LedgerError, LedgerKey};
use ctoffload::datapath::netfilter::nflog::{NflogError, Sight, SightLog};
use netdev_providers::{Direction, Ifindex, L4Proto, Tuple, Zone};
use nix::errno::Errno;

use crate::host::Host;
use crate::netns::NetNs;

const GROUP: u16 = 77;
const SOON: Duration = Duration::from_secs(10);
const QUIET: Duration = Duration::from_millis(300);

/// A router with three links, `r0` to `r2`, each to a host with 10.0.N.2 and fd00:N::2.
struct Router {
    ns: NetNs,
    hosts: [Host; 3],
    ports: [Ifindex; 3],
}

impl Router {
    fn new() -> Self {
        let ns = NetNs::new();
        ns.run("echo 1 > /proc/sys/net/ipv4/ip_forward");
        ns.run("echo 1 > /proc/sys/net/ipv6/conf/all/forwarding");
        let hosts = [Host::new(), Host::new(), Host::new()];
        let mut ports = Vec::new();
        for (n, host) in hosts.iter().enumerate() {
            let tid = host.tid;
            ns.run(&format!(
                "set -e; ip link add r{n} type veth peer name e0 netns {tid}
                 ip addr add 10.0.{n}.1/24 dev r{n}
                 ip addr add fd00:{n}::1/64 dev r{n} nodad
                 ip link set r{n} up"
            ));
            host.sh(&format!(
                "ip link set lo up
                 ip addr add 10.0.{n}.2/24 dev e0
                 ip addr add fd00:{n}::2/64 dev e0 nodad
                 ip link set e0 up
                 ip route add default via 10.0.{n}.1
                 ip -6 route add default via fd00:{n}::1"
            ));
            let index = ns.run(&format!("ip -o link show r{n} | cut -d: -f1"));
            ports.push(Ifindex::new(index.trim().parse().unwrap()).unwrap());
        }
        Self { ns, hosts, ports: ports.try_into().unwrap() }
    }

    fn ledger(&self, config: LedgerConfig) -> Ledger {
        let mut ledger = Ledger::install(LedgerConfig { group: GROUP, ..config }).unwrap();
        for port in self.ports {
            ledger.port_add(port).unwrap();
        }
        ledger
    }

    /// An open TCP connection from one host to another, both ends; the address may be of the
    /// router when it does NAT.
    fn tcp(&self, from: usize, to: usize, target: &str) -> (TcpStream, TcpStream) {
        let ip: IpAddr = target.parse().unwrap();
        let any = if ip.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let listener = self.hosts[to].call(move || TcpListener::bind(any).unwrap());
        let port = listener.local_addr().unwrap().port();
        let client = self.hosts[from]
            .call(move || TcpStream::connect_timeout(&SocketAddr::new(ip, port), SOON).unwrap());
        let (server, _) = listener.accept().unwrap();
        for s in [&client, &server] {
            s.set_read_timeout(Some(SOON)).unwrap();
            s.set_nodelay(true).unwrap();
        }
        (client, server)
    }
}

/// A close takes effect at once, unless a child that another test is just starting still holds a
/// copy of the descriptor; and an emulated machine loads its first modules slowly.
fn until(mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + SOON * 4;
    while !holds() {
        assert!(Instant::now() < end, "it never holds");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Bytes there and back.
fn talk(a: &mut TcpStream, b: &mut TcpStream) {
    let mut got = [0; 4];
    for _ in 0..3 {
        a.write_all(b"ping").unwrap();
        b.read_exact(&mut got).unwrap();
        b.write_all(b"pong").unwrap();
        a.read_exact(&mut got).unwrap();
    }
}

/// Everything that is logged until nothing comes for a while.
fn sights(log: &mut SightLog) -> Vec<Sight> {
    let mut all = Vec::new();
    loop {
        let read = log.next(QUIET).unwrap();
        assert!(!read.lost);
        if read.sights.is_empty() {
            return all;
        }
        all.extend(read.sights);
    }
}

/// Who saw what: netdev, connection, direction. Where the kernel does not log the connection it is
/// looked up.
fn seen(log: &mut SightLog, ct: &mut Conntrack) -> Vec<LedgerKey> {
    let mut keys: Vec<_> = sights(log)
        .into_iter()
        .map(|s| {
            let found = ct.find_forwarded(Zone(0), &s.forward_tuple().unwrap()).unwrap();
            let (entry, direction) = found.expect("the connection of a sight");
            assert_eq!(s.ct.is_some(), log.has_conntrack());
            if let Some(logged) = s.ct {
                assert_eq!((logged.id, logged.original), (entry.id, entry.original));
                assert_eq!(s.direction, Some(direction));
            }
            assert_eq!(s.hw_header.unwrap()[12], if entry.original.is_ipv6() { 0x86 } else { 8 });
            LedgerKey { hook: s.hook, iif: s.in_dev, ct_id: entry.id.unwrap(), direction }
        })
        .collect();
    keys.sort_unstable();
    keys
}

fn tuple_of(s: &TcpStream, proto: L4Proto) -> Tuple {
    let (l, p) = (s.local_addr().unwrap(), s.peer_addr().unwrap());
    Tuple::new(proto, l.ip(), l.port(), p.ip(), p.port()).unwrap()
}

fn entry(ct: &mut Conntrack, s: &TcpStream) -> CtEntry {
    ct.get(Zone(0), &tuple_of(s, L4Proto::Tcp)).unwrap().expect("a connection")
}

fn both_directions(e: &CtEntry, from: Ifindex, to: Ifindex) -> [LedgerKey; 2] {
    both_directions_in(Hook::Inet, e, from, to)
}

fn both_directions_in(hook: Hook, e: &CtEntry, from: Ifindex, to: Ifindex) -> [LedgerKey; 2] {
    let ct_id = e.id.unwrap();
    [
        LedgerKey { hook, iif: from, ct_id, direction: Direction::Original },
        LedgerKey { hook, iif: to, ct_id, direction: Direction::Reply },
    ]
}

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
    let many: Vec<_> = (0..3000)
        .map(|n| LedgerKey { ct_id: ctoffload::datapath::netfilter::conntrack::CtId(n), ..want[0] })
        .collect();
    ledger.rearm(&many).unwrap();
    ledger.remove().unwrap();
    assert!(!r.ns.run("nft list tables").contains("ctoffload"));
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
            assert_eq!(sight.forward_tuple(), entry.in_forward(key.direction));
            let found = ct.find_forwarded(Zone(0), &sight.forward_tuple().unwrap()).unwrap();
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

#[test]
fn netfilter_the_table_lives_and_dies_with_its_owner() {
    let r = Router::new();
    r.ns.run("nft add table inet user");
    let user = r.ns.run("nft list ruleset");
    let config = LedgerConfig { group: GROUP, ..LedgerConfig::default() };
    let ledger = Ledger::install(config.clone()).unwrap();
    let listed = r.ns.run("nft list table inet ctoffload");
    for part in [
        "typeof iif . ct id . ct direction",
        "type filter hook forward priority filter + 10; policy accept;",
        "add @sighted { iif . ct id . ct direction counter limit rate 1/hour burst 1 packets } \
         log group 77 snaplen 64 queue-threshold 1",
        "iif != @ports accept",
    ] {
        assert!(listed.contains(part), "{part}\n{listed}");
    }
    println!("{listed}");
    // The second one, even from elsewhere.
    assert!(matches!(Ledger::install(config.clone()), Err(LedgerError::AlreadyOwned { .. })));
    // Others cannot touch it, and a flush of everything passes it over.
    assert!(!r.ns.try_run("nft add chain inet ctoffload x").status.success());
    assert!(!r.ns.try_run("nft delete table inet ctoffload").status.success());
    r.ns.run("nft flush ruleset; nft add table inet user");
    assert_eq!(r.ns.run("nft list table inet ctoffload"), listed);
    // A close of the socket, as the kernel does after kill -9.
    drop(ledger);
    until(|| r.ns.run("nft list ruleset") == user);
    // A person's table of that name is left alone.
    r.ns.run("nft add table inet ctoffload");
    assert!(matches!(Ledger::install(config.clone()), Err(LedgerError::TableExists { .. })));
    r.ns.run("nft delete table inet ctoffload");
    Ledger::install(config).unwrap().remove().unwrap();
    assert_eq!(r.ns.run("nft list ruleset"), user);
}

#[test]
fn netfilter_a_killed_owner_leaves_no_table() {
    let r = Router::new();
    // Another process owns the table: this program again, with only the test below.
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "netfilter::netfilter_owner_for_the_test_of_its_kill", "--nocapture"])
        .env("CTOFFLOAD_TEST_OWNER", "1")
        .spawn()
        .unwrap();
    until(|| r.ns.run("nft list tables").contains("ctoffload"));
    let refused = Ledger::install(LedgerConfig::default());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(matches!(refused, Err(LedgerError::AlreadyOwned { .. })), "{refused:?}");
    until(|| !r.ns.run("nft list tables").contains("ctoffload"));
    Ledger::install(LedgerConfig::default()).unwrap();
}

/// Nothing by itself: the process that the test above kills, in the namespace it was started in.
#[test]
fn netfilter_owner_for_the_test_of_its_kill() {
    if std::env::var_os("CTOFFLOAD_TEST_OWNER").is_some() {
        let _ledger = Ledger::install(LedgerConfig::default()).unwrap();
        thread::sleep(SOON * 6);
    }
}

#[test]
fn netfilter_a_group_in_use_is_told() {
    let _ns = NetNs::new();
    let first = SightLog::open(GROUP).unwrap();
    match SightLog::open(GROUP) {
        Err(NflogError::GroupInUse { group, port }) => assert!(group == GROUP && port != 0),
        other => panic!("{other:?}"),
    }
    drop(first);
    until(|| SightLog::open(GROUP).is_ok());
}

/// Events in their order; what is passed over on the way to one that is wanted is gone.
struct Events {
    from: CtEvents,
    read: std::collections::VecDeque<CtEvent>,
}

impl Events {
    fn wait(&mut self, wanted: impl Fn(&CtEvent) -> bool) -> CtEvent {
        let until = Instant::now() + SOON;
        while Instant::now() < until {
            if let Some(e) = self.read.pop_front() {
                if wanted(&e) {
                    return e;
                }
                continue;
            }
            self.read.extend(self.from.next(QUIET).unwrap().events);
        }
        panic!("no such event");
    }
}

#[test]
fn netfilter_events_tell_of_a_close_and_of_a_deletion() {
    let r = Router::new();
    let mut events = Events { from: CtEvents::open(true).unwrap(), read: Default::default() };
    let _ledger = r.ledger(LedgerConfig::default());
    let mut ct = Conntrack::open().unwrap();
    assert_eq!(ct.usage().unwrap().entries, 0);

    let (mut c, mut s) = r.tcp(0, 1, "10.0.1.2");
    talk(&mut c, &mut s);
    let closing = entry(&mut ct, &c);
    assert!(closing.status.assured() && closing.status.seen_reply() && !closing.status.dying());
    assert_eq!(closing.tcp_state, Some(TcpState::Established));
    assert_eq!(closing.reply, closing.original.inverted());
    drop((c, s));
    let of = |e: &CtEvent| e.entry().id == closing.id;
    events.wait(|e| matches!(e, CtEvent::New(_)) && of(e));
    events.wait(|e| {
        matches!(e, CtEvent::Update(u) if u.tcp_state == Some(TcpState::FinWait)) && of(e)
    });

    let (c, _s) = r.tcp(2, 1, "10.0.1.2");
    let gone = entry(&mut ct, &c);
    r.ns.run(&format!("conntrack -D -p tcp --orig-port-src {}", gone.original.sport()));
    let end = events.wait(|e| matches!(e, CtEvent::Destroy(_)));
    assert_eq!((end.entry().id, end.entry().original), (gone.id, gone.original));
    assert_eq!(ct.get(Zone(0), &gone.original).unwrap(), None);

    // By us: only when it is the one that is meant.
    let (c, _s) = r.tcp(2, 1, "10.0.1.2");
    let e = entry(&mut ct, &c);
    assert!(!ct.delete(Zone(0), &e.original, gone.id).unwrap());
    assert!(ct.dump().unwrap().iter().any(|d| d.id == e.id && d.original == e.original));
    assert!(ct.delete(Zone(0), &e.original, e.id).unwrap());
    assert!(!ct.delete(Zone(0), &e.original, None).unwrap());
    events.wait(|d| matches!(d, CtEvent::Destroy(_)) && d.entry().id == e.id);
}

#[test]
fn netfilter_timeout_and_liberal_are_written() {
    let r = Router::new();
    let mut events = CtEvents::open(false).unwrap();
    let _ledger = r.ledger(LedgerConfig::default());
    let mut ct = Conntrack::open().unwrap();
    events.ignore_updates_of(ct.port().unwrap());
    let open: Vec<_> = (0..70).map(|_| r.tcp(0, 1, "10.0.1.2")).collect();
    let mut updates: Vec<_> = open
        .iter()
        .map(|(c, _)| CtUpdate {
            zone: Zone(0),
            original: tuple_of(c, L4Proto::Tcp),
            timeout: Some(Duration::from_secs(1234)),
            liberal: Some(true),
        })
        .collect();
    let nobody =
        Tuple::new(L4Proto::Tcp, "192.0.2.1".parse().unwrap(), 1, "192.0.2.2".parse().unwrap(), 2)
            .unwrap();
    updates.insert(3, CtUpdate { original: nobody, ..updates[0] });
    while !events.next(QUIET).unwrap().events.is_empty() {}
    let acks = ct.update(&updates).unwrap();
    assert_eq!(acks.len(), 71);
    for (i, ack) in acks.iter().enumerate() {
        assert_eq!(ack.as_ref().err().map(|e| e.errno), (i == 3).then_some(Errno::ENOENT));
    }
    for (c, _) in &open {
        let e = entry(&mut ct, c);
        let left = e.timeout.unwrap().as_secs();
        assert!((1200..=1234).contains(&left), "{left}");
        assert_eq!(e.tcp_liberal, [true, true]);
        assert_eq!(e.tcp_state, Some(TcpState::Established));
    }
    assert!(r.ns.run("conntrack -L -p tcp 2>/dev/null").contains(" 12"));
    // Our own updates are no news.
    assert_eq!(events.next(QUIET).unwrap().events, []);

    let back = CtUpdate { timeout: None, liberal: Some(false), ..updates[0] };
    assert_eq!(ct.update(&[back]).unwrap(), [Ok(())]);
    let e = entry(&mut ct, &open[0].0);
    assert_eq!(e.tcp_liberal, [false, false]);
    assert!(e.timeout.unwrap().as_secs() > 1000);

    let t = timeouts().unwrap();
    assert_eq!(t.udp, Duration::from_secs(30));
    assert_eq!(t.udp_stream, Duration::from_secs(120));
    r.ns.run("echo 777 > /proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established");
    assert_eq!(timeouts().unwrap().tcp_established, Duration::from_secs(777));
}

#[test]
fn netfilter_nat_shows_in_the_tuples() {
    let r = Router::new();
    r.ns.run(
        "nft 'table ip nat { \
           chain pre { type nat hook prerouting priority -100; iifname r2 tcp dport 1-65535 \
             ip daddr 10.0.2.1 dnat to 10.0.1.2; }; \
           chain post { type nat hook postrouting priority 100; oifname r1 masquerade; }; }'",
    );
    let mut log = SightLog::open(GROUP).unwrap();
    let _ledger = r.ledger(LedgerConfig::default());
    let mut ct = Conntrack::open().unwrap();

    let (mut c, mut s) = r.tcp(0, 1, "10.0.1.2");
    talk(&mut c, &mut s);
    let e = entry(&mut ct, &c);
    assert!(e.status.snat() && !e.status.dnat());
    assert_eq!(e.reply, tuple_of(&s, L4Proto::Tcp));
    assert_eq!(e.reply.dst(), "10.0.1.1".parse::<IpAddr>().unwrap());
    assert_eq!(e.outgoing(Direction::Original), e.reply.inverted());
    let mut want = both_directions(&e, r.ports[0], r.ports[1]);
    want.sort_unstable();
    assert_eq!(seen(&mut log, &mut ct), want);

    // Both kinds of NAT: the packet in the forward hook has neither tuple of the entry.
    let (mut c, mut s) = r.tcp(2, 1, "10.0.2.1");
    talk(&mut c, &mut s);
    let e = entry(&mut ct, &c);
    assert!(e.status.snat() && e.status.dnat());
    let logged = sights(&mut log);
    assert_eq!(logged.len(), 2);
    for sight in logged {
        let tuple = sight.forward_tuple().unwrap();
        assert_eq!(ct.find_forwarded(Zone(0), &tuple).unwrap(), None);
        let direction =
            Direction::BOTH.into_iter().find(|d| e.in_forward(*d) == Some(tuple)).unwrap();
        assert_eq!(sight.in_dev, [r.ports[2], r.ports[1]][direction.index()]);
        if log.has_conntrack() {
            assert_eq!(sight.direction, Some(direction));
            assert_eq!(sight.ct.unwrap().id, e.id);
        }
    }
}

#[test]
fn netfilter_zones() {
    let r = Router::new();
    r.ns.run(
        "nft 'table inet z { chain pre { type filter hook prerouting priority -300; \
           iifname r0 tcp dport 7000 ct zone set 5; iifname r1 tcp sport 7000 ct zone set 5; \
           iifname r2 tcp dport 7001 ct original zone set 9; }; }'",
    );
    let mut log = SightLog::open(GROUP).unwrap();
    let _ledger = r.ledger(LedgerConfig::default());
    let mut ct = Conntrack::open().unwrap();
    for (port, zone, from) in [(7000, Zone(5), 0), (7001, Zone(9), 2)] {
        let addr: SocketAddr = format!("10.0.1.2:{port}").parse().unwrap();
        let listener = r.hosts[1].call(move || TcpListener::bind(addr).unwrap());
        let mut c = r.hosts[from].call(move || TcpStream::connect_timeout(&addr, SOON).unwrap());
        let (mut s, _) = listener.accept().unwrap();
        talk(&mut c, &mut s);
        let tuple = tuple_of(&c, L4Proto::Tcp);
        assert_eq!(ct.get(Zone(0), &tuple).unwrap(), None);
        let e = ct.get(zone, &tuple).unwrap().expect("by its zone");
        assert_eq!((e.zone, e.original), (zone, tuple));
        assert!(ct.dump().unwrap().iter().any(|d| d.id == e.id && d.zone == zone));
        let update = CtUpdate {
            zone,
            original: tuple,
            timeout: Some(Duration::from_secs(99)),
            liberal: None,
        };
        assert_eq!(ct.update(&[update]).unwrap(), [Ok(())]);
        assert!(ct.get(zone, &tuple).unwrap().unwrap().timeout.unwrap().as_secs() <= 99);
        let logged = sights(&mut log);
        assert_eq!(logged.len(), 2);
        if log.has_conntrack() {
            assert!(logged.iter().all(|s| s.ct.as_ref().unwrap().zone == zone));
        }
        assert!(ct.delete(zone, &tuple, e.id).unwrap());
    }
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
    // SAFETY: a pointer to four bytes and their length.
    let set = unsafe {
        let fd = std::os::fd::AsRawFd::as_raw_fd(&client.as_fd());
        libc::setsockopt(fd, libc::IPPROTO_IP, libc::IP_OPTIONS, [1u8; 4].as_ptr().cast(), 4)
    };
    assert_eq!(set, 0);
    for _ in 0..5 {
        client.send(b"x").unwrap();
    }
    assert_eq!(sights(&mut log), []);
    // SAFETY: no bytes: the options are taken away.
    let unset = unsafe {
        let fd = std::os::fd::AsRawFd::as_raw_fd(&client.as_fd());
        libc::setsockopt(fd, libc::IPPROTO_IP, libc::IP_OPTIONS, [1u8; 4].as_ptr().cast(), 0)
    };
    assert_eq!(unset, 0);
    for _ in 0..5 {
        client.send(b"x").unwrap();
    }
    assert_eq!(sights(&mut log).len(), 1);
}
