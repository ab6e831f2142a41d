//! The ledger, the log and conntrack against the kernel: a router with three links, hosts in
//! network namespaces of their own.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use ctoffload::datapath::netfilter::conntrack::{Conntrack, CtEntry};
use ctoffload::datapath::netfilter::ledger::{Hook, Ledger, LedgerConfig, LedgerKey};
use ctoffload::datapath::netfilter::nflog::{Sight, SightLog};
use netdev_providers::{Direction, Ifindex, L4Proto, Tuple, Zone};

use crate::host::Host;
use crate::netns::NetNs;

mod conntrack;
mod sights;
mod table;

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
            let found = ct.find_leaving(Zone(0), &[s.leaving_tuple().unwrap()]).unwrap().remove(0);
            let (entry, direction) = found.expect("the connection of a sight");
            assert_eq!(s.ct.is_some(), log.has_conntrack());
            if let Some(logged) = s.ct {
                assert_eq!((logged.id, logged.original), (entry.id, entry.original));
                assert_eq!(s.direction, Some(direction));
            }
            assert_eq!(s.hw_header.unwrap()[12], if entry.original.is_ipv6() { 0x86 } else { 8 });
            let (ct_id, sport) = (entry.id.unwrap(), entry.original.sport());
            LedgerKey { hook: s.hook, iif: s.in_dev, ct_id, sport, direction }
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
    let (ct_id, sport) = (e.id.unwrap(), e.original.sport());
    [
        LedgerKey { hook, iif: from, ct_id, sport, direction: Direction::Original },
        LedgerKey { hook, iif: to, ct_id, sport, direction: Direction::Reply },
    ]
}
