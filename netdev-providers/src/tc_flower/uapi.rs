//! Numbers of the kernel's TC interface, each group with the header that it is from. Written out
//! here because `libc` has few of them.

use std::num::NonZeroU32;

use crate::contract::flow::FlowMatch;
use crate::netlink::wire::Received;

// linux/rtnetlink.h: messages
pub(super) const RTM_NEWLINK: u16 = 16;
pub(super) const RTM_GETLINK: u16 = 18;
pub(super) const RTM_NEWQDISC: u16 = 36;
pub(super) const RTM_DELQDISC: u16 = 37;
pub(super) const RTM_GETQDISC: u16 = 38;
pub(super) const RTM_NEWTFILTER: u16 = 44;
pub(super) const RTM_DELTFILTER: u16 = 45;
pub(super) const RTM_GETTFILTER: u16 = 46;

// linux/rtnetlink.h: attributes behind struct tcmsg
pub(super) const TCA_KIND: u16 = 1;
pub(super) const TCA_OPTIONS: u16 = 2;
pub(super) const TCA_CHAIN: u16 = 11;
pub(super) const TCA_INGRESS_BLOCK: u16 = 13;
pub(super) const TCA_DUMP_FLAGS: u16 = 15;
/// Only kind, cookie, counters and classifier flags in a dump.
pub(super) const TCA_DUMP_FLAGS_TERSE: u32 = 1;

// linux/pkt_sched.h: the handle of `clsact` and of `ingress`, the parent to create them at, and
// the parents of filters.
pub(super) const INGRESS_QDISC_HANDLE: u32 = 0xffff_0000;
pub(super) const TC_H_CLSACT: u32 = 0xffff_fff1;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)`. `ingress` takes it too: its class lookup
/// (`ingress_find` in sch_ingress.c) says yes to any minor number, and there is but one block.
pub(super) const PARENT_INGRESS: u32 = 0xffff_fff2;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_EGRESS)`.
pub(super) use crate::netlink::tc::PARENT_EGRESS;

// linux/pkt_cls.h: verdicts
/// The next filter is asked.
pub(super) const TC_ACT_UNSPEC: i32 = -1;
pub(super) const TC_ACT_OK: i32 = 0;
pub(super) const TC_ACT_SHOT: i32 = 2;
pub(super) const TC_ACT_PIPE: i32 = 3;
pub(super) const TC_ACT_STOLEN: i32 = 4;

// linux/pkt_cls.h: flags of a rule
pub(super) const TCA_CLS_FLAGS_SKIP_HW: u32 = 1;
pub(super) const TCA_CLS_FLAGS_SKIP_SW: u32 = 1 << 1;
pub(super) const TCA_CLS_FLAGS_IN_HW: u32 = 1 << 2;
pub(super) const TCA_CLS_FLAGS_NOT_IN_HW: u32 = 1 << 3;
/// The driver's words are wanted also where its refusal is none of the rule.
pub(super) const TCA_CLS_FLAGS_VERBOSE: u32 = 1 << 4;

// linux/pkt_cls.h: attributes of an action
pub(super) const TCA_ACT_KIND: u16 = 1;
pub(super) const TCA_ACT_OPTIONS: u16 = 2;
pub(super) const TCA_ACT_STATS: u16 = 4;
pub(super) const TCA_ACT_COOKIE: u16 = 6;
pub(super) const TCA_ACT_FLAGS: u16 = 7;
/// One set of counters under a lock instead of one per processor.
pub(super) const TCA_ACT_FLAGS_NO_PERCPU_STATS: u32 = 1;

// linux/gen_stats.h
pub(super) const TCA_STATS_BASIC: u16 = 1;
pub(super) const TCA_STATS_PKT64: u16 = 8;

// linux/pkt_cls.h: u32
pub(super) const TCA_U32_SEL: u16 = 5;
pub(super) const TCA_U32_ACT: u16 = 7;

// linux/pkt_cls.h: bpf, the classifier
pub(super) const TCA_BPF_ACT: u16 = 1;
pub(super) const TCA_BPF_FD: u16 = 6;
pub(super) const TCA_BPF_NAME: u16 = 7;
pub(super) const TCA_BPF_FLAGS_GEN: u16 = 9;

// linux/pkt_cls.h: flower
pub(super) const TCA_FLOWER_ACT: u16 = 3;
pub(super) const TCA_FLOWER_KEY_ETH_DST: u16 = 4;
pub(super) const TCA_FLOWER_KEY_ETH_DST_MASK: u16 = 5;
pub(super) const TCA_FLOWER_KEY_ETH_TYPE: u16 = 8;
pub(super) const TCA_FLOWER_KEY_IP_PROTO: u16 = 9;
pub(super) const TCA_FLOWER_KEY_IPV4_SRC: u16 = 10;
pub(super) const TCA_FLOWER_KEY_IPV4_SRC_MASK: u16 = 11;
pub(super) const TCA_FLOWER_KEY_IPV4_DST: u16 = 12;
pub(super) const TCA_FLOWER_KEY_IPV4_DST_MASK: u16 = 13;
pub(super) const TCA_FLOWER_KEY_IPV6_SRC: u16 = 14;
pub(super) const TCA_FLOWER_KEY_IPV6_SRC_MASK: u16 = 15;
pub(super) const TCA_FLOWER_KEY_IPV6_DST: u16 = 16;
pub(super) const TCA_FLOWER_KEY_IPV6_DST_MASK: u16 = 17;
pub(super) const TCA_FLOWER_KEY_TCP_SRC: u16 = 18;
pub(super) const TCA_FLOWER_KEY_TCP_DST: u16 = 19;
pub(super) const TCA_FLOWER_KEY_UDP_SRC: u16 = 20;
pub(super) const TCA_FLOWER_KEY_UDP_DST: u16 = 21;
pub(super) const TCA_FLOWER_FLAGS: u16 = 22;
pub(super) const TCA_FLOWER_KEY_VLAN_ID: u16 = 23;
pub(super) const TCA_FLOWER_KEY_VLAN_ETH_TYPE: u16 = 25;
pub(super) const TCA_FLOWER_KEY_TCP_SRC_MASK: u16 = 35;
pub(super) const TCA_FLOWER_KEY_TCP_DST_MASK: u16 = 36;
pub(super) const TCA_FLOWER_KEY_UDP_SRC_MASK: u16 = 37;
pub(super) const TCA_FLOWER_KEY_UDP_DST_MASK: u16 = 38;
pub(super) const TCA_FLOWER_KEY_FLAGS: u16 = 47;
pub(super) const TCA_FLOWER_KEY_FLAGS_MASK: u16 = 48;
pub(super) const TCA_FLOWER_KEY_TCP_FLAGS: u16 = 71;
pub(super) const TCA_FLOWER_KEY_TCP_FLAGS_MASK: u16 = 72;
pub(super) const TCA_FLOWER_KEY_IP_TTL: u16 = 75;
pub(super) const TCA_FLOWER_KEY_IP_TTL_MASK: u16 = 76;
pub(super) const TCA_FLOWER_IN_HW_COUNT: u16 = 86;
pub(super) const TCA_FLOWER_KEY_FLAGS_IS_FRAGMENT: u32 = 1;

// linux/tc_act/tc_gact.h
pub(super) const TCA_GACT_PARMS: u16 = 2;

// linux/tc_act/tc_mirred.h
pub(super) const TCA_MIRRED_PARMS: u16 = 2;
pub(super) const TCA_EGRESS_REDIR: i32 = 1;

// linux/tc_act/tc_vlan.h
pub(super) const TCA_VLAN_PARMS: u16 = 2;
pub(super) const TCA_VLAN_PUSH_VLAN_ID: u16 = 3;
pub(super) const TCA_VLAN_PUSH_VLAN_PROTOCOL: u16 = 4;
pub(super) const TCA_VLAN_ACT_POP: i32 = 1;
pub(super) const TCA_VLAN_ACT_PUSH: i32 = 2;

// linux/pkt_cls.h: attributes of the police action
pub(super) const TCA_POLICE_TBF: u16 = 1;
pub(super) const TCA_POLICE_RESULT: u16 = 5;

// linux/tc_act/tc_csum.h
pub(super) const TCA_CSUM_PARMS: u16 = 1;
pub(super) const TCA_CSUM_UPDATE_FLAG_IPV4HDR: u32 = 1;
pub(super) const TCA_CSUM_UPDATE_FLAG_TCP: u32 = 8;
pub(super) const TCA_CSUM_UPDATE_FLAG_UDP: u32 = 16;

// linux/tc_act/tc_pedit.h
pub(super) const TCA_PEDIT_PARMS_EX: u16 = 4;
pub(super) const TCA_PEDIT_KEYS_EX: u16 = 5;
pub(super) const TCA_PEDIT_KEY_EX: u16 = 6;
pub(super) const TCA_PEDIT_KEY_EX_HTYPE: u16 = 1;
pub(super) const TCA_PEDIT_KEY_EX_CMD: u16 = 2;

// linux/tc_act/tc_bpf.h
pub(super) const TCA_ACT_BPF_PARMS: u16 = 2;
pub(super) const TCA_ACT_BPF_FD: u16 = 5;
pub(super) const TCA_ACT_BPF_NAME: u16 = 6;
pub(super) const TCA_ACT_BPF_TAG: u16 = 8;
pub(super) const TCA_ACT_BPF_ID: u16 = 9;

// linux/if_arp.h
pub(super) const ARPHRD_ETHER: u16 = 1;

// linux/if_ether.h
pub(super) const ETH_HLEN: u32 = 14;
pub(super) const ETH_P_8021Q: u16 = 0x8100;

/// What the rules of one prio are about: an address family, in frames with a VLAN tag or without.
///
/// A prio takes one ethertype, and what it compares with that is the **outermost** one: a tagged
/// frame is 802.1Q there, whatever is inside (`tcf_classify`, `skb_protocol`). So rules for
/// untagged frames never meet a tagged one, and those for tagged frames say what is inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Ipv4 = 0,
    Ipv6 = 1,
    TaggedIpv4 = 2,
    TaggedIpv6 = 3,
}

impl Family {
    pub(super) const ALL: [Self; 4] = [Self::Ipv4, Self::Ipv6, Self::TaggedIpv4, Self::TaggedIpv6];
    pub(super) const UNTAGGED: [Self; 2] = [Self::Ipv4, Self::Ipv6];
    pub(super) const TAGGED: [Self; 2] = [Self::TaggedIpv4, Self::TaggedIpv6];

    /// Of the packets that a flow matches.
    pub(super) const fn of(flow: &FlowMatch) -> Self {
        match (flow.vlan.is_some(), flow.tuple.is_ipv6()) {
            (false, false) => Self::Ipv4,
            (false, true) => Self::Ipv6,
            (true, false) => Self::TaggedIpv4,
            (true, true) => Self::TaggedIpv6,
        }
    }

    /// Of untagged packets.
    pub(super) const fn of_ip(ipv6: bool) -> Self {
        if ipv6 { Self::Ipv6 } else { Self::Ipv4 }
    }

    pub(super) const fn is_ipv6(self) -> bool {
        matches!(self, Self::Ipv6 | Self::TaggedIpv6)
    }

    pub(super) const fn is_tagged(self) -> bool {
        matches!(self, Self::TaggedIpv4 | Self::TaggedIpv6)
    }

    /// The ethertype of the IP header (linux/if_ether.h).
    pub(super) const fn ip_ethertype(self) -> u16 {
        if self.is_ipv6() { 0x86dd } else { 0x0800 }
    }

    /// The ethertype of the prio.
    pub(super) const fn ethertype(self) -> u16 {
        if self.is_tagged() { ETH_P_8021Q } else { self.ip_ethertype() }
    }

    pub(super) const fn index(self) -> usize {
        self as usize
    }
}

/// The preference of a filter. Lower is asked earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Prio(pub(super) u16);

/// The handle of a rule within its prio, never 0 (which stands for "all" in a delete).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Handle(pub(super) NonZeroU32);

/// `struct tcmsg`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TcMsg {
    pub(super) ifindex: u32,
    pub(super) handle: u32,
    pub(super) parent: u32,
    pub(super) prio: u16,
    /// In host order; in network order on the wire.
    pub(super) ethertype: u16,
}

impl TcMsg {
    pub(super) const LEN: usize = 20;

    pub(super) fn to_bytes(self) -> [u8; Self::LEN] {
        let mut b = [0; Self::LEN];
        let info = u32::from(self.prio) << 16 | u32::from(self.ethertype.to_be());
        b[4..8].copy_from_slice(&self.ifindex.to_ne_bytes());
        b[8..12].copy_from_slice(&self.handle.to_ne_bytes());
        b[12..16].copy_from_slice(&self.parent.to_ne_bytes());
        b[16..20].copy_from_slice(&info.to_ne_bytes());
        b
    }

    pub(super) fn from_message(m: &Received<'_>) -> Option<Self> {
        let b: &[u8; Self::LEN] = m.fixed()?;
        let word = |at: usize| u32::from_ne_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let [p0, p1, e0, e1] = word(16).to_be_bytes();
        Some(Self {
            ifindex: word(4),
            handle: word(8),
            parent: word(12),
            prio: u16::from_be_bytes([p0, p1]),
            ethertype: u16::from_be(u16::from_be_bytes([e0, e1])),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::wire::{Message, MessageIter};

    #[test]
    fn flags_of_a_rule_have_the_kernels_numbers() {
        assert_eq!([TCA_CLS_FLAGS_SKIP_HW, TCA_CLS_FLAGS_SKIP_SW], [1, 2]);
        assert_eq!([TCA_CLS_FLAGS_IN_HW, TCA_CLS_FLAGS_NOT_IN_HW], [4, 8]);
        assert_eq!(TCA_CLS_FLAGS_VERBOSE, 16);
    }

    #[test]
    fn families_are_numbered_as_they_are_listed() {
        assert_eq!(Family::ALL.map(Family::index), [0, 1, 2, 3]);
    }

    #[test]
    fn a_tcmsg_reads_back_what_it_writes() {
        let want = TcMsg {
            ifindex: 7,
            handle: 9,
            parent: PARENT_INGRESS,
            prio: 0xc104,
            ethertype: 0x86dd,
        };
        let mut buf = Vec::new();
        let mut m = Message::new(&mut buf, RTM_NEWTFILTER, 0, 1);
        m.raw(&want.to_bytes());
        m.finish();
        let got = MessageIter::new(&buf).next().unwrap();
        assert_eq!(TcMsg::from_message(&got), Some(want));
        // The ethertype stands in network order in the lower half of tcm_info.
        assert_eq!(&buf[32..36], &(0xc104_0000 | u32::from(0x86dd_u16.to_be())).to_ne_bytes());
    }
}
