//! Identifiers and small values. Each kernel number has a type of its own, so that an ifindex
//! cannot be passed where a generation or a zone is meant.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::{NonZeroU16, NonZeroU32};
use std::str::FromStr;

/// A kernel interface index. Positive in the kernel (`int`, never 0); **reused** after a netdev is
/// deleted, so it identifies a netdev only together with a [`Generation`].
///
/// A port of a userspace datapath may have none (a DPDK port, a vhost-user socket): it is named by a
/// [`local`](Self::local) number, which no netdev can have. Backends of the kernel refuse those.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ifindex(NonZeroU32);

impl Ifindex {
    /// `None` for 0 and for what does not fit the kernel's `int`.
    #[must_use]
    pub const fn new(raw: u32) -> Option<Self> {
        if raw > i32::MAX as u32 {
            return None;
        }
        match NonZeroU32::new(raw) {
            Some(n) => Some(Self(n)),
            None => None,
        }
    }

    /// The name of a port that is no netdev of the kernel's; the datapath gives the numbers. `None` from
    /// 2^31 on.
    #[must_use]
    pub const fn local(number: u32) -> Option<Self> {
        match NonZeroU32::new(Self::LOCAL | number) {
            Some(n) if number < Self::LOCAL => Some(Self(n)),
            _ => None,
        }
    }

    /// What the kernel gives to nobody: its indexes are positive `int`s.
    const LOCAL: u32 = 1 << 31;

    /// True for an index of the kernel's, false for a [`local`](Self::local) number.
    #[must_use]
    pub const fn is_netdev(self) -> bool {
        self.0.get() < Self::LOCAL
    }

    /// The number as the kernel knows it; of a [`local`](Self::local) one, with 2^31 added.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for Ifindex {
    /// A local number as `local 3`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_netdev() {
            self.0.fmt(f)
        } else {
            write!(f, "local {}", self.0.get() - Self::LOCAL)
        }
    }
}

/// Which life of a port this is. Drawn by the engine from one counter at every port-add and never
/// used again while the engine lives, so a completion, a cookie or a cached view that carries an
/// older generation can be told apart from the present port, even when the ifindex is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Generation(NonZeroU32);

impl Generation {
    /// `None` for 0, which stands for "no generation".
    #[must_use]
    pub const fn new(raw: u32) -> Option<Self> {
        match NonZeroU32::new(raw) {
            Some(n) => Some(Self(n)),
            None => None,
        }
    }

    /// The bare number, from 1 on.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// Group bit of IEEE 802: broadcast and multicast.
    #[must_use]
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The identifier of an 802.1Q VLAN: 1 to 4094. 0 stands for "no VLAN, only a priority", and 4095 is
/// reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VlanId(NonZeroU16);

impl VlanId {
    /// VLAN 1.
    pub const MIN: Self = Self(NonZeroU16::MIN);

    /// `None` for what no VLAN can have.
    #[must_use]
    pub const fn new(raw: u16) -> Option<Self> {
        match NonZeroU16::new(raw) {
            Some(n) if raw < 4095 => Some(Self(n)),
            _ => None,
        }
    }

    /// The bare number.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0.get()
    }
}

impl fmt::Display for VlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A conntrack zone (`struct nf_conntrack_zone`), 0 by default. The same tuple in two zones is two
/// connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Zone(pub u16);

impl fmt::Display for Zone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Direction of a packet within its connection (`enum ip_conntrack_dir`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// As the packet that created the connection.
    Original = 0,
    /// The answers.
    Reply = 1,
}

impl Direction {
    /// Both, in the kernel's order.
    pub const BOTH: [Self; 2] = [Self::Original, Self::Reply];

    /// The other one.
    #[must_use]
    pub const fn opposite(self) -> Self {
        match self {
            Self::Original => Self::Reply,
            Self::Reply => Self::Original,
        }
    }

    /// 0 for original, 1 for reply: an array index, and the kernel's own value.
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Original => "original",
            Self::Reply => "reply",
        })
    }
}

/// Transport protocols that can be offloaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum L4Proto {
    /// Protocol 6.
    Tcp,
    /// Protocol 17.
    Udp,
}

impl L4Proto {
    /// The protocol number of the IP header, when it is one of ours.
    #[must_use]
    pub const fn from_number(n: u8) -> Option<Self> {
        match n {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            _ => None,
        }
    }

    /// The protocol number of the IP header.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

impl fmt::Display for L4Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// Addresses and ports of one direction of a connection. Source and destination are always of one
/// address family: [`Tuple::new`] refuses anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tuple {
    proto: L4Proto,
    sport: u16,
    dport: u16,
    src: IpAddr,
    dst: IpAddr,
}

impl Tuple {
    /// `None` when the two addresses are of different families.
    #[must_use]
    pub const fn new(
        proto: L4Proto,
        src: IpAddr,
        sport: u16,
        dst: IpAddr,
        dport: u16,
    ) -> Option<Self> {
        match (src, dst) {
            (IpAddr::V4(_), IpAddr::V4(_)) | (IpAddr::V6(_), IpAddr::V6(_)) => {
                Some(Self { proto, sport, dport, src, dst })
            }
            _ => None,
        }
    }

    /// Transport protocol.
    #[must_use]
    pub const fn proto(&self) -> L4Proto {
        self.proto
    }
    /// Source address.
    #[must_use]
    pub const fn src(&self) -> IpAddr {
        self.src
    }
    /// Destination address.
    #[must_use]
    pub const fn dst(&self) -> IpAddr {
        self.dst
    }
    /// Source port.
    #[must_use]
    pub const fn sport(&self) -> u16 {
        self.sport
    }
    /// Destination port.
    #[must_use]
    pub const fn dport(&self) -> u16 {
        self.dport
    }
    /// True for IPv6.
    #[must_use]
    pub const fn is_ipv6(&self) -> bool {
        self.src.is_ipv6()
    }

    /// Source and destination exchanged: the tuple of an answer where there is no NAT.
    #[must_use]
    pub const fn inverted(&self) -> Self {
        Self {
            proto: self.proto,
            sport: self.dport,
            dport: self.sport,
            src: self.dst,
            dst: self.src,
        }
    }
}

impl fmt::Display for Tuple {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} > {}",
            self.proto,
            SocketAddr::new(self.src, self.sport),
            SocketAddr::new(self.dst, self.dport)
        )
    }
}

/// Why a text is not a tuple.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseTupleError {
    /// It is none.
    #[error("'{0}' is not a tuple: expected e.g. `tcp 192.0.2.1:4242 > 198.51.100.2:80`")]
    Malformed(String),
    /// It is one of ICMP, which is never offloaded.
    #[error(
        "ICMP is not offloaded: rules match its type and code, not the identifier that tells one echo from another"
    )]
    Icmp,
}

impl FromStr for Tuple {
    type Err = ParseTupleError;

    /// Parses what `Display` writes, and the same with `,` or nothing but blanks for `>`:
    /// `tcp 192.0.2.1:4242 > 198.51.100.2:80`, `udp,[2001:db8::1]:53,[2001:db8::2]:53`.
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let err = || ParseTupleError::Malformed(s.to_owned());
        let mut words =
            s.split(|c: char| c.is_whitespace() || c == ',' || c == '>').filter(|w| !w.is_empty());
        let proto = words.next();
        if matches!(proto, Some("icmp" | "icmpv6")) {
            return Err(ParseTupleError::Icmp);
        }
        let (Some(proto), Some(src), Some(dst), None) =
            (proto, words.next(), words.next(), words.next())
        else {
            return Err(err());
        };
        let proto = match proto {
            "tcp" => L4Proto::Tcp,
            "udp" => L4Proto::Udp,
            _ => return Err(err()),
        };
        let src: SocketAddr = src.parse().map_err(|_| err())?;
        let dst: SocketAddr = dst.parse().map_err(|_| err())?;
        Self::new(proto, src.ip(), src.port(), dst.ip(), dst.port()).ok_or_else(err)
    }
}

/// Which engine wrote a rule: drawn at random when an engine starts, never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Instance(pub NonZeroU32);

/// Which incarnation of which connection: drawn from one counter per engine and never used again,
/// so that a tuple that comes back after its connection died is never mistaken for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The 16 bytes that mark a rule as ours (`TCA_ACT_COOKIE`, at most `TC_COOKIE_MAX_SIZE` = 16).
///
/// Layout, big-endian: magic `C7 0F`, version 1, direction, instance (4), epoch (8). A rule
/// without such a cookie is somebody else's and is never touched; a rule with a cookie of another
/// instance was left by an engine that died.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cookie {
    /// The engine that wrote the rule.
    pub instance: Instance,
    /// The connection it was written for.
    pub epoch: Epoch,
    /// The direction it forwards.
    pub direction: Direction,
}

impl Cookie {
    const MAGIC: [u8; 3] = [0xc7, 0x0f, 1];

    /// The bytes that go into the rule.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        let mut b = [0; 16];
        b[..3].copy_from_slice(&Self::MAGIC);
        b[3] = self.direction as u8;
        b[4..8].copy_from_slice(&self.instance.0.get().to_be_bytes());
        b[8..].copy_from_slice(&self.epoch.0.to_be_bytes());
        b
    }

    /// `None` when the bytes are not a cookie of ours.
    #[must_use]
    pub fn from_bytes(b: &[u8]) -> Option<Self> {
        let b: &[u8; 16] = b.try_into().ok()?;
        if b[..3] != Self::MAGIC {
            return None;
        }
        let direction = match b[3] {
            0 => Direction::Original,
            1 => Direction::Reply,
            _ => return None,
        };
        let instance = NonZeroU32::new(u32::from_be_bytes([b[4], b[5], b[6], b[7]]))?;
        let epoch = u64::from_be_bytes([b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]]);
        Some(Self { instance: Instance(instance), epoch: Epoch(epoch), direction })
    }
}

impl fmt::Display for Cookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for b in self.to_bytes() {
            write!(f, "{b:02x}")?;
        }
        Ok(())
    }
}

/// A provider's own name for a rule it installed; opaque to the engine, unique on the port while
/// the rule exists (tc-flower: prio and handle).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RuleId(pub u64);

/// Where the rules of a port may live (`TCA_CLS_FLAGS_SKIP_HW`, `TCA_CLS_FLAGS_SKIP_SW`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum HwFlags {
    /// In hardware where the NIC takes the rule, and in software.
    #[default]
    Both,
    /// In hardware only: a rule that the NIC refuses is refused.
    SkipSw,
    /// In software only.
    SkipHw,
}

impl fmt::Display for HwFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Both => "both",
            Self::SkipSw => "skip_sw",
            Self::SkipHw => "skip_hw",
        })
    }
}

/// A Linux network device as it is handed to a provider class for binding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netdev {
    /// Its index in the network namespace of the engine.
    pub ifindex: Ifindex,
    /// Which life of the port this is.
    pub generation: Generation,
    /// Its name at port-add. For people only: it can change while the port lives.
    pub name: String,
    /// Where the operator wants its rules.
    pub hw_flags: HwFlags,
}

impl fmt::Display for Netdev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.ifindex.is_netdev() { "ifindex " } else { "" };
        write!(f, "{} ({what}{}, generation {})", self.name, self.ifindex, self.generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_tuple_reads_back_what_it_writes(udp: bool, a: [u8; 16], b: [u8; 16], v6: bool, sport: u16, dport: u16) {
            let ip = |x: [u8; 16]| if v6 { IpAddr::from(x) } else { IpAddr::from([x[0], x[1], x[2], x[3]]) };
            let proto = if udp { L4Proto::Udp } else { L4Proto::Tcp };
            let t = Tuple::new(proto, ip(a), sport, ip(b), dport).unwrap();
            prop_assert_eq!(t.to_string().parse::<Tuple>().unwrap(), t);
            prop_assert_eq!(t.inverted().inverted(), t);
        }

        #[test]
        fn a_cookie_reads_back_what_it_writes(instance in 1u32.., epoch: u64, reply: bool) {
            let direction = if reply { Direction::Reply } else { Direction::Original };
            let c = Cookie { instance: Instance(NonZeroU32::new(instance).unwrap()), epoch: Epoch(epoch), direction };
            prop_assert_eq!(Cookie::from_bytes(&c.to_bytes()), Some(c));
        }

        #[test]
        fn foreign_bytes_are_no_cookie_of_ours(b in proptest::collection::vec(any::<u8>(), 0..24)) {
            prop_assume!(!b.starts_with(&[0xc7, 0x0f, 1]));
            prop_assert_eq!(Cookie::from_bytes(&b), None);
        }

        #[test]
        fn no_text_makes_the_tuple_parser_panic(s in ".*") {
            let _ = s.parse::<Tuple>();
        }
    }

    #[test]
    fn who_asks_for_an_echo_is_told_why_it_is_not_offloaded() {
        let why = "icmp 192.0.2.1 198.51.100.2 8".parse::<Tuple>().unwrap_err();
        assert!(why.to_string().contains("identifier"), "{why}");
    }

    #[test]
    fn a_tuple_of_two_families_is_refused() {
        assert!("tcp 192.0.2.1:1 > [2001:db8::1]:2".parse::<Tuple>().is_err());
    }

    #[test]
    fn only_numbers_that_a_vlan_can_have_are_vlan_ids() {
        assert_eq!(VlanId::new(0), None);
        assert_eq!(VlanId::new(4095), None);
        assert_eq!(VlanId::new(1).map(VlanId::get), Some(1));
        assert_eq!(VlanId::new(4094).map(VlanId::get), Some(4094));
    }

    #[test]
    fn ifindex_zero_and_negative_are_refused() {
        assert_eq!(Ifindex::new(0), None);
        assert_eq!(Ifindex::new(0x8000_0000), None);
        assert_eq!(Ifindex::new(7).map(Ifindex::get), Some(7));
        assert!(Ifindex::new(i32::MAX as u32).unwrap().is_netdev());
    }

    #[test]
    fn a_local_number_is_that_of_no_netdev() {
        for n in [0, 3, i32::MAX as u32] {
            let port = Ifindex::local(n).unwrap();
            assert!(!port.is_netdev());
            assert_eq!((Ifindex::new(port.get()), port.to_string()), (None, format!("local {n}")));
        }
        assert_eq!(Ifindex::local(1 << 31), None);
        assert_ne!(Ifindex::local(7), Ifindex::new(7));
        assert_eq!(Ifindex::new(7).unwrap().to_string(), "7");
    }
}
