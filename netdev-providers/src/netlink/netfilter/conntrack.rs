//! Entries of conntrack as ctnetlink writes them: what an entry says, and how one is named in a
//! request.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use super::{SUBSYS_CTNETLINK, msg_type, nfgenmsg};
use crate::contract::provider::Counters;
use crate::contract::types::{Direction, L4Proto, Tuple, Zone};
use crate::netlink::socket::REQUEST;
use crate::netlink::wire::{Message, Nested};

// linux/netfilter/nfnetlink_conntrack.h: enum cntl_msg_types
/// `IPCTNL_MSG_CT_NEW`.
pub const IPCTNL_MSG_CT_NEW: u16 = 0;
/// `IPCTNL_MSG_CT_GET`.
pub const IPCTNL_MSG_CT_GET: u16 = 1;
/// `IPCTNL_MSG_CT_DELETE`.
pub const IPCTNL_MSG_CT_DELETE: u16 = 2;
// enum ctattr_type
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
/// `CTA_STATUS`.
pub const CTA_STATUS: u16 = 3;
/// `CTA_PROTOINFO`.
pub const CTA_PROTOINFO: u16 = 4;
const CTA_HELP: u16 = 5;
/// `CTA_TIMEOUT`, in seconds.
pub const CTA_TIMEOUT: u16 = 7;
const CTA_MARK: u16 = 8;
const CTA_COUNTERS_ORIG: u16 = 9;
const CTA_COUNTERS_REPLY: u16 = 10;
const CTA_LABELS: u16 = 22;
/// `CTA_ID`.
pub const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_STATUS_MASK: u16 = 26;
// enum ctattr_tuple, ctattr_ip, ctattr_l4proto
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_TUPLE_ZONE: u16 = 3;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
// enum ctattr_counters
const CTA_COUNTERS_PACKETS: u16 = 1;
const CTA_COUNTERS_BYTES: u16 = 2;
// enum ctattr_protoinfo, ctattr_protoinfo_tcp
/// `CTA_PROTOINFO_TCP`.
pub const CTA_PROTOINFO_TCP: u16 = 1;
/// `CTA_PROTOINFO_TCP_STATE`.
pub const CTA_PROTOINFO_TCP_STATE: u16 = 1;
/// `CTA_PROTOINFO_TCP_FLAGS_ORIGINAL`.
pub const CTA_PROTOINFO_TCP_FLAGS_ORIGINAL: u16 = 4;
/// `CTA_PROTOINFO_TCP_FLAGS_REPLY`.
pub const CTA_PROTOINFO_TCP_FLAGS_REPLY: u16 = 5;
/// `IP_CT_TCP_FLAG_BE_LIBERAL` (`linux/netfilter/nf_conntrack_tcp.h`).
pub const IP_CT_TCP_FLAG_BE_LIBERAL: u8 = 0x08;
/// `IP_CT_TCP_FLAG_MAXACK_SET` (the same file): a RST is compared with the highest acknowledgement that
/// conntrack has seen, and not believed when it is not there.
pub const IP_CT_TCP_FLAG_MAXACK_SET: u8 = 0x20;
/// `AF_INET` as `nfgen_family`.
pub const AF_INET: u8 = 2;
/// `AF_INET6` as `nfgen_family`.
pub const AF_INET6: u8 = 10;

/// The kernel's id of an entry (`nf_ct_get_id`), as `conntrack -o id` and `nft` show it: a hash
/// over the entry's address and its original tuple. It tells an entry from another at one time; an
/// entry that follows upon a dead one can, with the same tuple, get the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CtId(pub u32);

impl fmt::Display for CtId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// `enum ip_conntrack_status` (`linux/netfilter/nf_conntrack_common.h`).
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct CtStatus(pub u32);

impl CtStatus {
    /// `IPS_EXPECTED`: a helper foresaw it.
    pub const EXPECTED: u32 = 1;
    /// `IPS_SEEN_REPLY`.
    pub const SEEN_REPLY: u32 = 1 << 1;
    /// `IPS_ASSURED`: not dropped early; TCP after the handshake, UDP after some traffic.
    pub const ASSURED: u32 = 1 << 2;
    /// `IPS_CONFIRMED`: in the table.
    pub const CONFIRMED: u32 = 1 << 3;
    /// `IPS_SRC_NAT`.
    pub const SRC_NAT: u32 = 1 << 4;
    /// `IPS_DST_NAT`.
    pub const DST_NAT: u32 = 1 << 5;
    /// `IPS_SEQ_ADJUST`: a helper changes lengths, so sequence numbers are rewritten.
    pub const SEQ_ADJUST: u32 = 1 << 6;
    /// `IPS_DYING`.
    pub const DYING: u32 = 1 << 9;
    /// `IPS_FIXED_TIMEOUT`: a write of the timeout is refused (EPERM).
    pub const FIXED_TIMEOUT: u32 = 1 << 10;
    /// `IPS_TEMPLATE`.
    pub const TEMPLATE: u32 = 1 << 11;
    /// `IPS_NAT_CLASH`: one of two entries for a UDP packet that raced.
    pub const NAT_CLASH: u32 = 1 << 12;
    /// `IPS_HELPER`: a helper was attached by a rule.
    pub const HELPER: u32 = 1 << 13;
    /// `IPS_OFFLOAD`: in a flowtable.
    pub const OFFLOAD: u32 = 1 << 14;
    /// `IPS_HW_OFFLOAD`: in the hardware, by a flowtable.
    pub const HW_OFFLOAD: u32 = 1 << 15;

    const fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }
    /// [`ASSURED`](Self::ASSURED).
    #[must_use]
    pub const fn assured(self) -> bool {
        self.has(Self::ASSURED)
    }
    /// [`SEEN_REPLY`](Self::SEEN_REPLY).
    #[must_use]
    pub const fn seen_reply(self) -> bool {
        self.has(Self::SEEN_REPLY)
    }
    /// [`CONFIRMED`](Self::CONFIRMED).
    #[must_use]
    pub const fn confirmed(self) -> bool {
        self.has(Self::CONFIRMED)
    }
    /// [`DYING`](Self::DYING).
    #[must_use]
    pub const fn dying(self) -> bool {
        self.has(Self::DYING)
    }
    /// [`FIXED_TIMEOUT`](Self::FIXED_TIMEOUT).
    #[must_use]
    pub const fn fixed_timeout(self) -> bool {
        self.has(Self::FIXED_TIMEOUT)
    }
    /// [`SEQ_ADJUST`](Self::SEQ_ADJUST).
    #[must_use]
    pub const fn seq_adjust(self) -> bool {
        self.has(Self::SEQ_ADJUST)
    }
    /// [`NAT_CLASH`](Self::NAT_CLASH).
    #[must_use]
    pub const fn nat_clash(self) -> bool {
        self.has(Self::NAT_CLASH)
    }
    /// [`HELPER`](Self::HELPER).
    #[must_use]
    pub const fn helper(self) -> bool {
        self.has(Self::HELPER)
    }
    /// [`SRC_NAT`](Self::SRC_NAT).
    #[must_use]
    pub const fn snat(self) -> bool {
        self.has(Self::SRC_NAT)
    }
    /// [`DST_NAT`](Self::DST_NAT).
    #[must_use]
    pub const fn dnat(self) -> bool {
        self.has(Self::DST_NAT)
    }
    /// [`OFFLOAD`](Self::OFFLOAD).
    #[must_use]
    pub const fn offload(self) -> bool {
        self.has(Self::OFFLOAD)
    }
    /// [`HW_OFFLOAD`](Self::HW_OFFLOAD).
    #[must_use]
    pub const fn hw_offload(self) -> bool {
        self.has(Self::HW_OFFLOAD)
    }
}

impl fmt::Debug for CtStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CtStatus({:#x})", self.0)
    }
}

/// `enum tcp_conntrack` (`linux/netfilter/nf_conntrack_tcp.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[expect(missing_docs, reason = "the names are the kernel's")]
pub enum TcpState {
    None = 0,
    SynSent = 1,
    SynRecv = 2,
    Established = 3,
    FinWait = 4,
    CloseWait = 5,
    LastAck = 6,
    TimeWait = 7,
    Close = 8,
    /// A simultaneous open.
    SynSent2 = 9,
}

impl TcpState {
    /// `None` for numbers that the kernel does not show.
    #[must_use]
    pub const fn from_number(n: u8) -> Option<Self> {
        Some(match n {
            0 => Self::None,
            1 => Self::SynSent,
            2 => Self::SynRecv,
            3 => Self::Established,
            4 => Self::FinWait,
            5 => Self::CloseWait,
            6 => Self::LastAck,
            7 => Self::TimeWait,
            8 => Self::Close,
            9 => Self::SynSent2,
            _ => return None,
        })
    }
}

/// A TCP or UDP connection as the kernel tells it. What an event leaves out is `None`, or empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CtEntry {
    /// The kernel's id.
    pub id: Option<CtId>,
    /// The zone that the **original** tuple is unique in, and is looked up in: the entry's zone, or
    /// that of its original direction (`ct original zone set`); 0 where the zone holds for replies
    /// only.
    pub zone: Zone,
    /// As the packet that created it.
    pub original: Tuple,
    /// As the answers come in: differs from the inverted original by the NAT.
    pub reply: Tuple,
    /// Status bits.
    pub status: CtStatus,
    /// TCP only, and only where the kernel tells it: an event tells it when it changed.
    pub tcp_state: Option<TcpState>,
    /// Whether TCP windows go unchecked, original and reply direction (`IP_CT_TCP_FLAG_BE_LIBERAL`);
    /// where [`tcp_state`](Self::tcp_state) is told, except in destroy events.
    pub tcp_liberal: [bool; 2],
    /// Whether a RST against this direction is compared with what it has acknowledged
    /// (`IP_CT_TCP_FLAG_MAXACK_SET`); told where [`tcp_liberal`](Self::tcp_liberal) is.
    pub tcp_maxack: [bool; 2],
    /// Until the entry expires; not in destroy events.
    pub timeout: Option<Duration>,
    /// The connection's mark.
    pub mark: u32,
    /// Its labels, the one with the number `n` as bit `n`, where they are told: of an event, because they changed;
    /// where an entry is asked for, when it has any.
    pub labels: Option<u128>,
    /// A helper looks into it: the status bit, or a helper that came with the expectation.
    pub helper: bool,
    /// What each direction carried, original and reply; only where conntrack counts
    /// (`net.netfilter.nf_conntrack_acct` was on when the entry was made).
    pub counters: Option<[Counters; 2]>,
}

/// `struct nf_conn_labels`: words of the kernel's, whose lowest bits come first.
fn parse_labels(bytes: &[u8]) -> u128 {
    let word = |n: usize| bytes.get(n * 8..)?.first_chunk().map(|b| u64::from_ne_bytes(*b));
    let [low, high] = [0, 1].map(|n| word(n).unwrap_or(0));
    u128::from(high) << 64 | u128::from(low)
}

impl CtEntry {
    /// Reads an entry: `None` when it is neither TCP nor UDP, or not well-formed. `family` is the
    /// `nfgen_family` of the message, which tells the addresses' family.
    #[must_use]
    pub fn parse(family: u8, attrs: Nested<'_>) -> Option<Self> {
        let mut original = None;
        let mut reply = None;
        let (mut zone, mut tuple_zone) = (None, None);
        let mut id = None;
        let mut status = CtStatus::default();
        let mut timeout = None;
        let mut mark = 0;
        let mut labels = None;
        let mut helper = false;
        let mut protoinfo = None;
        let mut counters = [None; 2];
        for a in attrs {
            match a.ty {
                CTA_TUPLE_ORIG => {
                    original = Some(parse_tuple(family, a.nested())?);
                    tuple_zone = a.nested().find_type(CTA_TUPLE_ZONE).and_then(|a| a.be16());
                }
                CTA_TUPLE_REPLY => reply = Some(parse_tuple(family, a.nested())?),
                CTA_ZONE => zone = a.be16(),
                CTA_ID => id = a.be32().map(CtId),
                CTA_STATUS => status = CtStatus(a.be32()?),
                CTA_TIMEOUT => timeout = a.be32().map(|s| Duration::from_secs(s.into())),
                CTA_MARK => mark = a.be32()?,
                CTA_LABELS => labels = Some(parse_labels(a.payload)),
                CTA_HELP => helper = true,
                CTA_COUNTERS_ORIG => counters[0] = parse_counters(a.nested()),
                CTA_COUNTERS_REPLY => counters[1] = parse_counters(a.nested()),
                CTA_PROTOINFO => protoinfo = a.nested().find_type(CTA_PROTOINFO_TCP),
                _ => {}
            }
        }
        let (original, reply) = (original?, reply?);
        let mut tcp_state = None;
        let mut tcp_flags = [0; 2];
        for a in protoinfo.iter().flat_map(|p| p.nested()) {
            match a.ty {
                CTA_PROTOINFO_TCP_STATE => tcp_state = a.u8().and_then(TcpState::from_number),
                // struct nf_ct_tcp_flags: flags, mask
                CTA_PROTOINFO_TCP_FLAGS_ORIGINAL => tcp_flags[0] = a.u8().unwrap_or(0),
                CTA_PROTOINFO_TCP_FLAGS_REPLY => tcp_flags[1] = a.u8().unwrap_or(0),
                _ => {}
            }
        }
        let helper = helper || status.helper();
        let zone = Zone(zone.or(tuple_zone).unwrap_or(0));
        Some(Self {
            id,
            zone,
            original,
            reply,
            status,
            tcp_state,
            tcp_liberal: tcp_flags.map(|f| f & IP_CT_TCP_FLAG_BE_LIBERAL != 0),
            tcp_maxack: tcp_flags.map(|f| f & IP_CT_TCP_FLAG_MAXACK_SET != 0),
            timeout,
            mark,
            labels,
            helper,
            counters: counters[0].zip(counters[1]).map(<[_; 2]>::from),
        })
    }

    /// Addresses and ports of its packets as they come in: before any NAT.
    #[must_use]
    pub const fn incoming(&self, direction: Direction) -> Tuple {
        match direction {
            Direction::Original => self.original,
            Direction::Reply => self.reply,
        }
    }

    /// Addresses and ports of its packets as they go out: after all NAT.
    #[must_use]
    pub const fn outgoing(&self, direction: Direction) -> Tuple {
        self.incoming(direction.opposite()).inverted()
    }
}

fn parse_counters(attrs: Nested<'_>) -> Option<Counters> {
    let number = |ty| attrs.find_type(ty)?.be64();
    Some(Counters { packets: number(CTA_COUNTERS_PACKETS)?, bytes: number(CTA_COUNTERS_BYTES)? })
}

/// Whether these attributes are of an entry that is neither TCP's nor UDP's. One of those that
/// [`CtEntry::parse`] makes nothing of is one that cannot be read.
#[must_use]
pub fn is_other_protocol(attrs: Nested<'_>) -> bool {
    let number = attrs
        .find_type(CTA_TUPLE_ORIG)
        .and_then(|a| a.nested().find_type(CTA_TUPLE_PROTO))
        .and_then(|a| a.nested().find_type(CTA_PROTO_NUM))
        .and_then(|a| a.u8());
    number.is_some_and(|n| L4Proto::from_number(n).is_none())
}

fn parse_tuple(family: u8, attrs: Nested<'_>) -> Option<Tuple> {
    let ip = attrs.find_type(CTA_TUPLE_IP)?.nested();
    let proto = attrs.find_type(CTA_TUPLE_PROTO)?.nested();
    let number = proto.find_type(CTA_PROTO_NUM)?.u8()?;
    let l4 = L4Proto::from_number(number)?;
    let (src, dst): (IpAddr, IpAddr) = match family {
        AF_INET => {
            let get = |ty| -> Option<IpAddr> {
                let b: [u8; 4] = ip.find_type(ty)?.payload.try_into().ok()?;
                Some(Ipv4Addr::from(b).into())
            };
            (get(CTA_IP_V4_SRC)?, get(CTA_IP_V4_DST)?)
        }
        AF_INET6 => {
            let get = |ty| -> Option<IpAddr> {
                let b: [u8; 16] = ip.find_type(ty)?.payload.try_into().ok()?;
                Some(Ipv6Addr::from(b).into())
            };
            (get(CTA_IP_V6_SRC)?, get(CTA_IP_V6_DST)?)
        }
        _ => return None,
    };
    let port = |ty| proto.find_type(ty)?.be16();
    Tuple::new(l4, src, port(CTA_PROTO_SRC_PORT)?, dst, port(CTA_PROTO_DST_PORT)?)
}

fn put_tuple(m: &mut Message<'_>, ty: u16, t: &Tuple) {
    m.nested(ty, |m| {
        m.nested(CTA_TUPLE_IP, |m| match (t.src(), t.dst()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                m.attr(CTA_IP_V4_SRC, &src.octets()).attr(CTA_IP_V4_DST, &dst.octets());
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                m.attr(CTA_IP_V6_SRC, &src.octets()).attr(CTA_IP_V6_DST, &dst.octets());
            }
            _ => {} // a Tuple is of one family
        })
        .nested(CTA_TUPLE_PROTO, |m| {
            m.u8(CTA_PROTO_NUM, t.proto().number())
                .be16(CTA_PROTO_SRC_PORT, t.sport())
                .be16(CTA_PROTO_DST_PORT, t.dport());
        });
    });
}

/// Starts a message about the entry of (zone, original tuple).
///
/// Zone 0 is what the kernel assumes without the attribute; a number means an entry whose zone
/// holds for both directions, and finds one whose zone holds for the original direction as well.
pub fn about<'b>(
    buf: &'b mut Vec<u8>,
    msg: u16,
    flags: u16,
    seq: u32,
    zone: Zone,
    original: &Tuple,
) -> Message<'b> {
    let family = if original.is_ipv6() { AF_INET6 } else { AF_INET };
    let mut m = Message::new(buf, msg_type(SUBSYS_CTNETLINK, msg), REQUEST | flags, seq);
    m.raw(&nfgenmsg(family, 0));
    put_tuple(&mut m, CTA_TUPLE_ORIG, original);
    if zone != Zone(0) {
        m.be16(CTA_ZONE, zone.0);
    }
    m
}

/// Asks a dump for connections that are in a flowtable, and no others (kernels since 5.17).
pub fn offloaded_only(m: &mut Message<'_>) {
    m.be32(CTA_STATUS, CtStatus::OFFLOAD).be32(CTA_STATUS_MASK, CtStatus::OFFLOAD);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::wire::MessageIter;

    fn tuple(s: &str) -> Tuple {
        s.parse().unwrap()
    }

    /// What the kernel would say of an entry with these tuples, and with whatever is filled in.
    fn parsed(
        original: &Tuple,
        reply: &Tuple,
        fill: impl FnOnce(&mut Message<'_>),
    ) -> Option<CtEntry> {
        let mut buf = Vec::new();
        let mut m = about(&mut buf, IPCTNL_MSG_CT_NEW, 0, 1, Zone(0), original);
        put_tuple(&mut m, CTA_TUPLE_REPLY, reply);
        fill(&mut m);
        m.finish();
        let m = MessageIter::new(&buf).next()?;
        CtEntry::parse(m.payload[0], m.attrs(4))
    }

    #[test]
    fn an_entry_is_named_by_family_tuple_and_a_zone_that_is_not_0() {
        let named = |zone, t: &Tuple| {
            let mut buf = Vec::new();
            about(&mut buf, IPCTNL_MSG_CT_DELETE, 0x100, 77, zone, t).finish();
            let m = MessageIter::new(&buf).next().unwrap();
            assert_eq!((m.ty, m.flags, m.seq), (1 << 8 | IPCTNL_MSG_CT_DELETE, 0x101, 77));
            let told = m.attrs(4).find_type(CTA_TUPLE_ORIG).unwrap();
            let zone = m.attrs(4).find_type(CTA_ZONE).and_then(|a| a.be16());
            (m.payload[0], zone, parse_tuple(m.payload[0], told.nested()))
        };
        let (v4, v6) = (
            tuple("udp 192.0.2.1:53 > 198.51.100.2:5353"),
            tuple("tcp [2001:db8::1]:1 > [2001:db8::2]:2"),
        );
        assert_eq!(named(Zone(0), &v4), (AF_INET, None, Some(v4)));
        assert_eq!(named(Zone(9), &v6), (AF_INET6, Some(9), Some(v6)));
        let mut buf = Vec::new();
        about(&mut buf, IPCTNL_MSG_CT_GET, 0, 1, Zone(0), &v4).finish();
        let m = MessageIter::new(&buf).next().unwrap();
        let told = m.attrs(4).find_type(CTA_TUPLE_ORIG).unwrap();
        assert_eq!(parse_tuple(AF_INET6, told.nested()), None, "addresses of another family");
        assert_eq!(parse_tuple(1, told.nested()), None);
    }

    #[test]
    fn all_that_an_entry_says_is_read() {
        let original = tuple("tcp 192.0.2.1:1000 > 203.0.113.9:80");
        let reply = tuple("tcp 198.51.100.2:8080 > 203.0.113.1:2000");
        let e = parsed(&original, &reply, |m| {
            m.be32(CTA_ID, 0x0102_0304).be32(CTA_STATUS, CtStatus::ASSURED).be32(CTA_TIMEOUT, 300);
            m.be32(CTA_MARK, 7).be16(CTA_ZONE, 5);
            for (ty, n) in [(CTA_COUNTERS_ORIG, 10), (CTA_COUNTERS_REPLY, 20)] {
                m.nested(ty, |m| {
                    m.be64(CTA_COUNTERS_PACKETS, n).be64(CTA_COUNTERS_BYTES, n * 100);
                });
            }
            m.nested(CTA_PROTOINFO, |m| {
                m.nested(CTA_PROTOINFO_TCP, |m| {
                    m.u8(CTA_PROTOINFO_TCP_STATE, 3);
                    m.attr(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, &[0x08 | 1, 0]);
                    m.attr(CTA_PROTOINFO_TCP_FLAGS_REPLY, &[0xf7, 0]);
                });
            });
        })
        .unwrap();
        let counters = |packets| Counters { packets, bytes: packets * 100 };
        let wanted = CtEntry {
            id: Some(CtId(0x0102_0304)),
            zone: Zone(5),
            original,
            reply,
            status: CtStatus(CtStatus::ASSURED),
            tcp_state: Some(TcpState::Established),
            tcp_liberal: [true, false],
            tcp_maxack: [false, true],
            timeout: Some(Duration::from_secs(300)),
            mark: 7,
            labels: None,
            helper: false,
            counters: Some([counters(10), counters(20)]),
        };
        assert_eq!(e, wanted);
        assert_eq!(CtId(77).to_string(), "77");
        // Before any NAT, and behind all of it.
        let directions = Direction::BOTH;
        assert_eq!(directions.map(|d| e.incoming(d)), [original, reply]);
        let out = [
            tuple("tcp 203.0.113.1:2000 > 198.51.100.2:8080"),
            tuple("tcp 203.0.113.9:80 > 192.0.2.1:1000"),
        ];
        assert_eq!(directions.map(|d| e.outgoing(d)), out);
    }

    #[test]
    fn what_an_entry_does_not_say_is_not_made_up() {
        let t = tuple("udp [2001:db8::1]:1 > [2001:db8::2]:2");
        let bare = parsed(&t, &t.inverted(), |_| {}).unwrap();
        assert_eq!((bare.id, bare.zone, bare.timeout, bare.mark), (None, Zone(0), None, 0));
        assert_eq!((bare.tcp_state, bare.tcp_liberal, bare.helper), (None, [false; 2], false));
        let counted = parsed(&t, &t.inverted(), |m| {
            m.nested(CTA_COUNTERS_ORIG, |m| {
                m.be64(CTA_COUNTERS_PACKETS, 1).be64(CTA_COUNTERS_BYTES, 1);
            });
        });
        assert_eq!(counted.unwrap().counters, None, "of one direction only");
        assert!(
            parsed(&t, &t.inverted(), |m| {
                m.nested(CTA_HELP, |_| {});
            })
            .unwrap()
            .helper
        );
        assert!(
            parsed(&t, &t.inverted(), |m| {
                m.be32(CTA_STATUS, CtStatus::HELPER);
            })
            .unwrap()
            .helper
        );
        let labels = |bytes: &[u8]| {
            parsed(&t, &t.inverted(), |m| _ = m.attr(CTA_LABELS, bytes)).unwrap().labels
        };
        assert_eq!((bare.labels, labels(&[0; 16])), (None, Some(0)));
        let words = [1_u64 << 3, 1 << 63].map(u64::to_ne_bytes).concat();
        assert_eq!(labels(&words), Some(1 << 3 | 1 << 127));
        // A kernel that has fewer.
        assert_eq!(labels(&words[..8]), Some(1 << 3));
        let mut buf = Vec::new();
        about(&mut buf, IPCTNL_MSG_CT_NEW, 0, 1, Zone(0), &t).finish();
        let m = MessageIter::new(&buf).next().unwrap();
        assert_eq!(CtEntry::parse(AF_INET6, m.attrs(4)), None, "without a reply");
    }

    /// `ct original zone set`: the zone stands in the tuple.
    #[test]
    fn the_zone_of_the_original_direction_counts_and_the_entrys_own_first() {
        let t = tuple("udp 192.0.2.1:1 > 198.51.100.2:2");
        let zoned = |entry: Option<u16>| {
            let mut buf = Vec::new();
            let mut m = Message::new(&mut buf, 0, 0, 1);
            m.raw(&nfgenmsg(AF_INET, 0));
            let at = m.offset();
            put_tuple(&mut m, CTA_TUPLE_ORIG, &t);
            m.be16(CTA_TUPLE_ZONE, 8);
            let len = u16::try_from(m.offset() - at).unwrap();
            put_tuple(&mut m, CTA_TUPLE_REPLY, &t.inverted());
            if let Some(zone) = entry {
                m.be16(CTA_ZONE, zone);
            }
            m.finish();
            buf[at..at + 2].copy_from_slice(&len.to_ne_bytes());
            let m = MessageIter::new(&buf).next().unwrap();
            CtEntry::parse(AF_INET, m.attrs(4)).unwrap().zone
        };
        assert_eq!((zoned(None), zoned(Some(3))), (Zone(8), Zone(3)));
    }

    #[test]
    fn each_status_bit_is_the_kernels() {
        type Is = fn(CtStatus) -> bool;
        let bits: [(u32, Is); 12] = [
            (1, CtStatus::seen_reply),
            (2, CtStatus::assured),
            (3, CtStatus::confirmed),
            (4, CtStatus::snat),
            (5, CtStatus::dnat),
            (6, CtStatus::seq_adjust),
            (9, CtStatus::dying),
            (10, CtStatus::fixed_timeout),
            (12, CtStatus::nat_clash),
            (13, CtStatus::helper),
            (14, CtStatus::offload),
            (15, CtStatus::hw_offload),
        ];
        for (bit, is) in bits {
            assert!(is(CtStatus(1 << bit)) && is(CtStatus(u32::MAX)), "bit {bit}");
            assert!(!is(CtStatus(!(1 << bit))) && !is(CtStatus(0)), "bit {bit}");
        }
        assert_eq!(CtStatus::TEMPLATE, 1 << 11);
        assert_eq!(format!("{:?}", CtStatus(0x8002)), "CtStatus(0x8002)");
    }

    #[test]
    fn states_of_tcp_have_the_kernels_numbers() {
        for n in 0..=9 {
            assert_eq!(TcpState::from_number(n).map(|s| s as u8), Some(n));
        }
        assert_eq!(TcpState::from_number(10), None);
    }

    #[test]
    fn a_dump_can_be_of_what_is_in_a_flowtable() {
        let mut buf = Vec::new();
        let mut m = Message::new(&mut buf, 0, 0, 1);
        offloaded_only(&mut m);
        m.finish();
        let m = MessageIter::new(&buf).next().unwrap();
        let attr = |ty| m.attrs(0).find_type(ty).and_then(|a| a.be32());
        assert_eq!((attr(CTA_STATUS), attr(CTA_STATUS_MASK)), (Some(1 << 14), Some(1 << 14)));
    }
}
