//! Match keys of flower: which packets a rule takes.
//!
//! Every flow of one family and protocol has the same keys with full masks, because flower keeps
//! one hash table per distinct mask and walks the masks in a row, dissecting the packet anew for
//! each (`fl_classify`): two masks per prio, one for TCP and one for UDP, and twice that at most,
//! when routed and bridged flows stand on one port. Tagged flows have prios of their own.

use std::net::IpAddr;

use super::uapi::*;
use crate::contract::flow::FlowMatch;
use crate::contract::types::L4Proto;
use crate::netlink::wire::Message;

/// FIN, SYN, RST and ACK (TCP flags as flower sees them: bytes 12 and 13 of the TCP header with the data
/// offset masked off): the first three belong to conntrack, and what has not even the last, or a header
/// that is cut short, whose flags flower reads as 0, conntrack calls invalid (`tcp_error`).
const TCP_FLAGS: u16 = 0x0017;
const ONLY_ACK: u16 = 0x0010;

/// Writes the keys into the options of a flower rule.
pub(super) fn flow_keys(m: &mut Message<'_>, flow: &FlowMatch) {
    let tuple = &flow.tuple;
    let family = Family::of(flow);
    m.be16(TCA_FLOWER_KEY_ETH_TYPE, family.ethertype());
    if let Some(vlan) = flow.vlan {
        m.u16(TCA_FLOWER_KEY_VLAN_ID, vlan.get());
        // Of what stands behind the first tag, so a frame with two of them is none of ours.
        m.be16(TCA_FLOWER_KEY_VLAN_ETH_TYPE, family.ip_ethertype());
    }
    if let Some(mac) = flow.eth_dst {
        m.attr(TCA_FLOWER_KEY_ETH_DST, &mac.0);
        m.attr(TCA_FLOWER_KEY_ETH_DST_MASK, &[0xff; 6]);
    }
    m.u8(TCA_FLOWER_KEY_IP_PROTO, tuple.proto().number());
    match (tuple.src(), tuple.dst()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            m.attr(TCA_FLOWER_KEY_IPV4_SRC, &src.octets());
            m.attr(TCA_FLOWER_KEY_IPV4_SRC_MASK, &[0xff; 4]);
            m.attr(TCA_FLOWER_KEY_IPV4_DST, &dst.octets());
            m.attr(TCA_FLOWER_KEY_IPV4_DST_MASK, &[0xff; 4]);
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            m.attr(TCA_FLOWER_KEY_IPV6_SRC, &src.octets());
            m.attr(TCA_FLOWER_KEY_IPV6_SRC_MASK, &[0xff; 16]);
            m.attr(TCA_FLOWER_KEY_IPV6_DST, &dst.octets());
            m.attr(TCA_FLOWER_KEY_IPV6_DST_MASK, &[0xff; 16]);
        }
        // `Tuple::new` makes no such tuple.
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {}
    }
    let (src, src_mask, dst, dst_mask) = match tuple.proto() {
        L4Proto::Tcp => (
            TCA_FLOWER_KEY_TCP_SRC,
            TCA_FLOWER_KEY_TCP_SRC_MASK,
            TCA_FLOWER_KEY_TCP_DST,
            TCA_FLOWER_KEY_TCP_DST_MASK,
        ),
        L4Proto::Udp => (
            TCA_FLOWER_KEY_UDP_SRC,
            TCA_FLOWER_KEY_UDP_SRC_MASK,
            TCA_FLOWER_KEY_UDP_DST,
            TCA_FLOWER_KEY_UDP_DST_MASK,
        ),
    };
    m.be16(src, tuple.sport()).be16(src_mask, 0xffff);
    m.be16(dst, tuple.dport()).be16(dst_mask, 0xffff);
    // Value 0 under the mask: not a fragment.
    m.be32(TCA_FLOWER_KEY_FLAGS, 0);
    m.be32(TCA_FLOWER_KEY_FLAGS_MASK, TCA_FLOWER_KEY_FLAGS_IS_FRAGMENT);
    if tuple.proto() == L4Proto::Tcp {
        m.be16(TCA_FLOWER_KEY_TCP_FLAGS, ONLY_ACK);
        m.be16(TCA_FLOWER_KEY_TCP_FLAGS_MASK, TCP_FLAGS);
    }
}
