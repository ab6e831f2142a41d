//! Elements of the selecting sets.

use std::net::IpAddr;

use crate::contract::flow::Flow;
use crate::contract::types::{Direction, Ifindex, Tuple, Zone};
use crate::netlink::netfilter::nft::expr::{self, NFT_REG32_00};
use crate::netlink::wire::Message;

/// One of the four selecting sets: of a family and a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct SetOf {
    pub(super) ipv6: bool,
    pub(super) direction: Direction,
}

/// Length of a key with IPv4 addresses.
const LEN4: usize = 32;
/// Length of a key with IPv6 addresses.
const LEN6: usize = 56;

impl SetOf {
    pub(super) const ALL: [Self; 4] = [
        Self { ipv6: false, direction: Direction::Original },
        Self { ipv6: false, direction: Direction::Reply },
        Self { ipv6: true, direction: Direction::Original },
        Self { ipv6: true, direction: Direction::Reply },
    ];

    pub(super) const fn name(self) -> &'static str {
        match (self.direction, self.ipv6) {
            (Direction::Original, false) => "orig4",
            (Direction::Reply, false) => "reply4",
            (Direction::Original, true) => "orig6",
            (Direction::Reply, true) => "reply6",
        }
    }

    /// Its number within the transaction that makes it.
    pub(super) const fn id(self) -> u32 {
        2 + self.direction as u32 + 2 * self.ipv6 as u32
    }

    pub(super) const fn key_len(self) -> usize {
        if self.ipv6 { LEN6 } else { LEN4 }
    }

    pub(super) const fn opposite(self) -> Self {
        Self { direction: self.direction.opposite(), ..self }
    }
}

/// A connection as both the key and a request to ctnetlink name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ConnId {
    pub(super) zone: Zone,
    pub(super) original: Tuple,
}

impl ConnId {
    /// The connection of a flow: what leaves as an answer is the original tuple turned round.
    pub(super) const fn of(flow: &Flow) -> Self {
        let original = match flow.direction {
            Direction::Original => flow.matches.tuple,
            Direction::Reply => flow.forward.tuple.inverted(),
        };
        Self { zone: flow.zone, original }
    }
}

/// An element: its set, and the bytes as the rule has them in its registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) set: SetOf,
    bytes: [u8; LEN6],
}

impl Key {
    pub(super) fn new(port: Ifindex, flow: &Flow) -> Self {
        let ConnId { zone, original } = ConnId::of(flow);
        let mut bytes = [0; LEN6];
        // What the forward hook sees: the netdevs that route.
        let iif = flow.above.iif.unwrap_or(port);
        let oif = flow.above.oif.unwrap_or(flow.forward.egress);
        bytes[..4].copy_from_slice(&iif.get().to_ne_bytes());
        bytes[4..8].copy_from_slice(&oif.get().to_ne_bytes());
        bytes[8] = original.proto().number();
        bytes[12..14].copy_from_slice(&zone.0.to_ne_bytes());
        bytes[16..18].copy_from_slice(&original.sport().to_be_bytes());
        bytes[20..22].copy_from_slice(&original.dport().to_be_bytes());
        match (original.src(), original.dst()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                bytes[24..28].copy_from_slice(&src.octets());
                bytes[28..32].copy_from_slice(&dst.octets());
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                bytes[24..40].copy_from_slice(&src.octets());
                bytes[40..56].copy_from_slice(&dst.octets());
            }
            _ => {} // a Tuple is of one family
        }
        let set = SetOf { ipv6: original.is_ipv6(), direction: flow.direction };
        Self { set, bytes }
    }
}

impl AsRef<[u8]> for Key {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.set.key_len()]
    }
}

/// Loads what the packet's element would be into the registers from the first on: what
/// [`Key::new`] writes.
pub(super) fn load(m: &mut Message<'_>, ipv6: bool) {
    let reg = |n: u32| NFT_REG32_00 + n;
    expr::meta(m, expr::NFT_META_IIF, reg(0));
    expr::meta(m, expr::NFT_META_OIF, reg(1));
    expr::meta(m, expr::NFT_META_L4PROTO, reg(2));
    let original = |m: &mut Message<'_>, key, n| {
        expr::ct_of(m, key, Direction::Original, reg(n));
    };
    original(m, expr::NFT_CT_ZONE, 3);
    original(m, expr::NFT_CT_PROTO_SRC, 4);
    original(m, expr::NFT_CT_PROTO_DST, 5);
    if ipv6 {
        original(m, expr::NFT_CT_SRC_IP6, 6);
        original(m, expr::NFT_CT_DST_IP6, 10);
    } else {
        original(m, expr::NFT_CT_SRC_IP, 6);
        original(m, expr::NFT_CT_DST_IP, 7);
    }
}

/// Turns the netdevs round: the element of the opposite direction.
pub(super) fn load_opposite(m: &mut Message<'_>) {
    expr::meta(m, expr::NFT_META_OIF, NFT_REG32_00);
    expr::meta(m, expr::NFT_META_IIF, NFT_REG32_00 + 1);
}
