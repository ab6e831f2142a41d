//! Guards: rules in front of the flows that send to the slow path what flower cannot tell apart.
//!
//! Their action is `pass` (`TC_ACT_OK`): the classification ends, the packet goes on up the stack.
//! On the action stands a [`Cookie`] with one of two epochs that no connection has
//! ([`GUARD`], [`GUARD_AND_QDISC`]), so that guards of a dead engine are recognised.
//!
//! | what | where rules run in software | where rules run in hardware |
//! |---|---|---|
//! | TTL, hop limit 0 and 1 | u32 | flower, `skip_sw` |
//! | IPv4 options | u32 | not told apart |
//! | IPv6 hop-by-hop, routing, destination headers in front | u32 | not told apart |
//!
//! They stand twice: for untagged and for tagged frames.
//!
//! In software all of it is u32, which compares a word of the header; one more flower prio would
//! have every packet dissected once more, before the flows are even looked at. In hardware the TTL
//! guard has to be flower, which drivers take; being `skip_sw` it is not asked in software for a result,
//! and a port without hardware has none.
//!
//! **What hardware does not tell apart.** Flower has no key for the header length or for extension
//! headers. A NIC that parses beyond IPv4 options or IPv6 extension headers and finds the ports
//! there takes such packets for the flow's: they are forwarded with their options unread.
//! Most NICs do not parse beyond them and then send the packet to the host.
//!
//! Flower's own dissector (`__skb_flow_dissect`) passes over the IPv6 headers 0, 43 and 60 and goes
//! on to L4, hence the three guards; a fragment header (44) it reports as a fragment, which the flows
//! exclude, and any other it does not pass over.

use std::num::NonZeroU32;

use super::actions::ActionList;
use super::uapi::*;
use crate::contract::types::{Cookie, Direction, Epoch, Ifindex, Instance};
use crate::netlink::socket::{ACK, CREATE, EXCL, REQUEST};
use crate::netlink::wire::Message;

/// The epoch of a guard.
pub(super) const GUARD: Epoch = Epoch(u64::MAX - 1);
/// The epoch of a guard on a qdisc that the engine made itself: its successor may remove it.
pub(super) const GUARD_AND_QDISC: Epoch = Epoch(u64::MAX);

/// The cookie of a guard.
pub(super) fn cookie(instance: Instance, made_qdisc: bool) -> Cookie {
    let epoch = if made_qdisc { GUARD_AND_QDISC } else { GUARD };
    Cookie { instance, epoch, direction: Direction::Original }
}

/// One u32 comparison: at a byte offset from the network header, `word & mask == value`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Knode {
    at: i32,
    mask: u32,
    value: u32,
}

/// TTL below 2.
const TTL: Knode = Knode { at: 8, mask: 0xfe00_0000, value: 0 };
/// Header length 8 to 15 words.
const IHL_8_TO_15: Knode = Knode { at: 0, mask: 0x0800_0000, value: 0x0800_0000 };
/// Header length 6 or 7 words.
const IHL_6_7: Knode = Knode { at: 0, mask: 0x0e00_0000, value: 0x0600_0000 };
/// Hop limit below 2.
const HOP_LIMIT: Knode = Knode { at: 4, mask: 0x0000_00fe, value: 0 };
const fn next_header(number: u32) -> Knode {
    Knode { at: 4, mask: 0x0000_ff00, value: number << 8 }
}

/// The first four bits of the header: what a tagged frame carries. The prio of tagged frames says
/// nothing of that. Where a tag was taken off, the network header is what stood behind it; something
/// else than IP that begins with these bits would be passed on up the stack, where it goes anyway.
const VERSION_4: Knode = Knode { at: 0, mask: 0xf000_0000, value: 0x4000_0000 };
const VERSION_6: Knode = Knode { at: 0, mask: 0xf000_0000, value: 0x6000_0000 };

const IPV4: &[Knode] = &[TTL, IHL_8_TO_15, IHL_6_7];
const IPV6: &[Knode] = &[HOP_LIMIT, next_header(0), next_header(43), next_header(60)];

/// The comparisons of a family.
pub(super) const fn knodes(family: Family) -> &'static [Knode] {
    if family.is_ipv6() { IPV6 } else { IPV4 }
}

/// What is compared before, where the prio does not do it.
const fn version(family: Family) -> Option<Knode> {
    match family {
        Family::Ipv4 | Family::Ipv6 => None,
        Family::TaggedIpv4 => Some(VERSION_4),
        Family::TaggedIpv6 => Some(VERSION_6),
    }
}

fn start<'b>(
    buf: &'b mut Vec<u8>,
    seq: u32,
    flags: u16,
    (ifindex, prio, family): (Ifindex, Prio, Family),
    handle: Option<NonZeroU32>,
) -> Message<'b> {
    let mut m = Message::new(buf, RTM_NEWTFILTER, flags, seq);
    let tcmsg = TcMsg {
        ifindex: ifindex.get(),
        handle: handle.map_or(0, NonZeroU32::get),
        parent: PARENT_INGRESS,
        prio: prio.0,
        ethertype: family.ethertype(),
    };
    m.raw(&tcmsg.to_bytes());
    m
}

/// Appends a u32 guard, for software only. The kernel chooses the handle, since it numbers the hash
/// tables of all u32 filters of a netdev together.
pub(super) fn u32(
    buf: &mut Vec<u8>,
    seq: u32,
    ifindex: Ifindex,
    prio: Prio,
    family: Family,
    knode: Knode,
    cookie: Cookie,
) {
    let flags = REQUEST | ACK | CREATE | EXCL;
    let mut m = start(buf, seq, flags, (ifindex, prio, family), None);
    // struct tc_u32_sel with one or two struct tc_u32_key; mask and value are big-endian.
    let mut sel = [0; 16 + 2 * 16];
    sel[0] = TC_U32_TERMINAL;
    let mut len = 16;
    for key in version(family).into_iter().chain([knode]) {
        sel[len..len + 4].copy_from_slice(&key.mask.to_be_bytes());
        sel[len + 4..len + 8].copy_from_slice(&key.value.to_be_bytes());
        sel[len + 8..len + 12].copy_from_slice(&key.at.to_ne_bytes());
        len += 16;
        sel[2] += 1; // nkeys
    }
    m.attr(TCA_KIND, b"u32\0");
    m.nested_plain(TCA_OPTIONS, |m| {
        m.attr(TCA_U32_SEL, &sel[..len]);
        m.u32(TCA_U32_FLAGS, TCA_CLS_FLAGS_SKIP_HW);
        m.nested_plain(TCA_U32_ACT, |m| {
            ActionList::new(m, true).pass(&cookie.to_bytes());
        });
    });
    m.finish();
}

/// Appends the flower guard of TTL or hop limit 0 and 1, for hardware only. One that is there already
/// is replaced, so that the NIC is given it anew, and at no time is without.
pub(super) fn flower_ttl(
    buf: &mut Vec<u8>,
    seq: u32,
    ifindex: Ifindex,
    prio: Prio,
    family: Family,
    cookie: Cookie,
) {
    let flags = REQUEST | ACK | CREATE;
    let mut m = start(buf, seq, flags, (ifindex, prio, family), NonZeroU32::new(1));
    m.attr(TCA_KIND, b"flower\0");
    m.nested_plain(TCA_OPTIONS, |m| {
        m.be16(TCA_FLOWER_KEY_ETH_TYPE, family.ethertype());
        if family.is_tagged() {
            m.be16(TCA_FLOWER_KEY_VLAN_ETH_TYPE, family.ip_ethertype());
        }
        m.u8(TCA_FLOWER_KEY_IP_TTL, 0);
        m.u8(TCA_FLOWER_KEY_IP_TTL_MASK, 0xfe);
        m.u32(TCA_FLOWER_FLAGS, TCA_CLS_FLAGS_SKIP_SW);
        m.nested_plain(TCA_FLOWER_ACT, |m| {
            ActionList::new(m, true).pass(&cookie.to_bytes());
        });
    });
    m.finish();
}

/// True when the cookie is a guard's.
pub(super) fn is_guard(cookie: &Cookie) -> bool {
    matches!(cookie.epoch, GUARD | GUARD_AND_QDISC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guard_is_told_from_a_flow_and_says_who_made_the_qdisc() {
        let instance = Instance(NonZeroU32::MIN);
        let (others, ours) = (cookie(instance, false), cookie(instance, true));
        assert_ne!(others, ours);
        assert_eq!(ours.epoch, GUARD_AND_QDISC);
        for guard in [others, ours] {
            // As it is read back.
            assert!(is_guard(&Cookie::from_bytes(&guard.to_bytes()).unwrap()));
        }
        // Epochs of connections are counted from 1 on.
        for epoch in [1, u64::MAX / 2] {
            assert!(!is_guard(&Cookie { epoch: Epoch(epoch), ..ours }));
        }
    }
}
