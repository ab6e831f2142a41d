//! What the bench itself does to conntrack: entries of others, and the end of its own.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};

use netdev_providers::netlink::netfilter::conntrack::{
    CTA_TIMEOUT, IPCTNL_MSG_CT_DELETE, IPCTNL_MSG_CT_NEW, about,
};
use netdev_providers::netlink::socket::{ACK, CREATE, EXCL};
use netdev_providers::netlink::{Family, Socket};
use netdev_providers::{L4Proto, Tuple, Zone};
use nix::sched::{CloneFlags, unshare};

use crate::sh;

// linux/netfilter/nfnetlink_conntrack.h
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;

const SERVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);
/// Messages of one send.
const BATCH: usize = 64;

/// Entries that are nobody's who is measured: some in this network namespace, and the rest in others, where there is
/// room for no more.
pub(crate) struct Foreign {
    here: u32,
    elsewhere: u32,
    _namespaces: Vec<File>,
}

impl Foreign {
    /// So many. conntrack's table is one for all network namespaces, with a limit of entries for each, which is the
    /// machine's: it stays as it is. This namespace gets as many as leave half of it to what is measured.
    pub(crate) fn make(count: u32) -> Self {
        let limit = sh("cat /proc/sys/net/netfilter/nf_conntrack_max");
        let limit: u32 = limit.trim().parse().expect("a number");
        let here = count.min(limit / 2);
        insert(here);
        let mut namespaces = Vec::new();
        let mut left = count - here;
        while left > 0 {
            let some = left.min(limit / 10 * 9);
            let there = std::thread::spawn(move || {
                unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
                insert(some);
                File::open("/proc/thread-self/ns/net").expect("a network namespace")
            });
            namespaces.push(there.join().expect("entries of another namespace"));
            left -= some;
        }
        Self { here, elsewhere: count - here, _namespaces: namespaces }
    }

    /// Where they are, in words.
    pub(crate) fn note(&self) -> String {
        match self.elsewhere {
            0 => String::new(),
            n => format!(
                "{} of them in the router's network namespace, where nf_conntrack_max has no room for more, and {n} in others: the table is one for all",
                self.here
            ),
        }
    }
}

fn socket() -> Socket {
    Socket::open(Family::Netfilter).expect("ctnetlink")
}

fn insert(count: u32) {
    let (mut socket, mut buf) = (socket(), Vec::new());
    let numbers: Vec<u32> = (0..count).collect();
    for some in numbers.chunks(BATCH) {
        buf.clear();
        let first = socket.next_seq();
        for (i, &n) in some.iter().enumerate() {
            let seq = if i == 0 { first } else { socket.next_seq() };
            let [_, a, b, c] = n.to_be_bytes();
            let (client, server) = (Ipv4Addr::new(172, 16 | (a & 15), b, c), SERVER);
            let of = |a| IpAddr::V4(a);
            let tuple = Tuple::new(L4Proto::Udp, of(client), 5000, of(server), 53);
            let tuple = tuple.expect("both are IPv4");
            let flags = CREATE | EXCL | if i + 1 == some.len() { ACK } else { 0 };
            let mut m = about(&mut buf, IPCTNL_MSG_CT_NEW, flags, seq, Zone(0), &tuple);
            m.nested(CTA_TUPLE_REPLY, |m| {
                m.nested(CTA_TUPLE_IP, |m| {
                    m.attr(CTA_IP_V4_SRC, &server.octets()).attr(CTA_IP_V4_DST, &client.octets());
                });
                m.nested(CTA_TUPLE_PROTO, |m| {
                    m.u8(CTA_PROTO_NUM, L4Proto::Udp.number());
                    m.be16(CTA_PROTO_SRC_PORT, 53).be16(CTA_PROTO_DST_PORT, 5000);
                });
            });
            m.be32(CTA_TIMEOUT, 86_400);
            m.finish();
        }
        let acks = socket.batch(&buf, first, some.len()).expect("ctnetlink");
        assert!(acks.iter().all(Result::is_ok), "{:?}", acks.iter().find(|a| a.is_err()));
    }
}

/// Ends entries.
pub(crate) struct Ender(Socket, Vec<u8>);

impl Ender {
    pub(crate) fn open() -> Self {
        Self(socket(), Vec::new())
    }

    /// Those with these original tuples, as their time-out would. How many were there.
    pub(crate) fn end(&mut self, tuples: &[Tuple]) -> usize {
        let Self(socket, buf) = self;
        let mut ended = 0;
        for some in tuples.chunks(BATCH) {
            buf.clear();
            let first = socket.next_seq();
            for (i, tuple) in some.iter().enumerate() {
                let seq = if i == 0 { first } else { socket.next_seq() };
                let flags = if i + 1 == some.len() { ACK } else { 0 };
                about(buf, IPCTNL_MSG_CT_DELETE, flags, seq, Zone(0), tuple).finish();
            }
            let acks = socket.batch(buf, first, some.len()).expect("ctnetlink");
            ended += acks.iter().filter(|a| a.is_ok()).count();
        }
        ended
    }
}
