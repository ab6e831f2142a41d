//! Guards: rules in front of the flows that send to the slow path what flower cannot tell apart.
//!
//! Their action is `pass` (`TC_ACT_OK`): the classification ends, the packet goes on up the stack.
//! On the action stands a [`Cookie`] with one of two epochs that no connection has
//! ([`GUARD`], [`GUARD_AND_QDISC`]), so that guards of a dead engine are recognised.
//!
//! | what | where rules run in software | where rules run in hardware |
//! |---|---|---|
//! | TTL, hop limit 0 and 1 | bpf | flower, `skip_sw` |
//! | IPv4 options | bpf | not told apart |
//! | IPv6 hop-by-hop, routing, destination headers in front | bpf | not told apart |
//! | a wrong IPv4 header checksum | bpf | not told apart |
//! | a length beyond the packet, or bytes behind it | bpf | not told apart |
//! | TCP and UDP headers that conntrack calls invalid | bpf | not told apart |
//!
//! They stand twice: for untagged and for tagged frames.
//!
//! In front of all that, in software, **priority tags** are taken off (802.1Q with VLAN 0, which is no VLAN): the
//! stack does that to every frame that it is given, but behind the ingress hook, where rules for untagged frames
//! would not match. Only of frames for the netdev's own address, and of none where a VLAN device with the number 0
//! stands on it, which is given them.
//!
//! In software all of it is one program of `cls_bpf` for a family (see [`super::bpf`]), which reads the
//! header once; one more flower prio would have every packet dissected once more, before the flows are
//! even looked at. In hardware the TTL guard has to be flower, which drivers take; being `skip_sw` it is
//! not asked in software for a result, and a port without hardware has none.
//!
//! **What hardware does not tell apart.** Flower has no key for the header length, for checksums, for
//! lengths or for extension headers. A NIC that parses beyond IPv4 options or IPv6 extension headers and
//! finds the ports there takes such packets for the flow's: they are forwarded with their options unread.
//! Most NICs do not parse beyond them and then send the packet to the host. And what a NIC does with a
//! packet whose header checksum is wrong is its own affair: one that computes it anew makes it right.
//!
//! Flower's own dissector (`__skb_flow_dissect`) passes over the IPv6 headers 0, 43 and 60 and goes
//! on to L4; a fragment header (44) it reports as a fragment, which the flows exclude, and any other
//! it does not pass over.

use std::num::NonZeroU32;

use super::actions::ActionList;
use super::bpf::Program;
use super::prios::Use;
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

/// The kind of classifier that guards are.
pub(super) const fn kind(what: Use) -> &'static str {
    match what {
        Use::SoftwareGuards => "bpf",
        Use::HardwareGuards | Use::Flows => "flower",
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

/// Appends the guard in software. The kernel chooses the handle: one that a dead engine has left stands
/// beside it until it is removed.
pub(super) fn software(
    buf: &mut Vec<u8>,
    seq: u32,
    ifindex: Ifindex,
    prio: Prio,
    family: Family,
    program: &Program,
    cookie: Cookie,
) {
    let flags = REQUEST | ACK | CREATE | EXCL;
    let mut m = start(buf, seq, flags, (ifindex, prio, family), None);
    m.str(TCA_KIND, kind(Use::SoftwareGuards));
    m.nested_plain(TCA_OPTIONS, |m| {
        m.attr(TCA_BPF_FD, &program.raw_fd().to_ne_bytes());
        m.attr(TCA_BPF_NAME, program.name_with_nul());
        m.u32(TCA_BPF_FLAGS_GEN, TCA_CLS_FLAGS_SKIP_HW);
        m.nested_plain(TCA_BPF_ACT, |m| {
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

/// Appends what takes priority tags off in front of all other rules, for software only. It is no guard, but stands
/// and goes with them, and has their cookie.
pub(super) fn priority_tags(
    buf: &mut Vec<u8>,
    seq: u32,
    ifindex: Ifindex,
    prio: Prio,
    program: &Program,
    cookie: Cookie,
) {
    let flags = REQUEST | ACK | CREATE | EXCL;
    let place = (ifindex, prio, Family::TaggedIpv4);
    let mut m = start(buf, seq, flags, place, NonZeroU32::new(1));
    m.attr(TCA_KIND, b"bpf\0");
    m.nested_plain(TCA_OPTIONS, |m| {
        m.attr(TCA_BPF_FD, &program.raw_fd().to_ne_bytes());
        m.attr(TCA_BPF_NAME, program.name_with_nul());
        m.u32(TCA_BPF_FLAGS_GEN, TCA_CLS_FLAGS_SKIP_HW);
        m.nested_plain(TCA_BPF_ACT, |m| {
            ActionList::new(m, true).pop_and_go_on(&cookie.to_bytes());
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
