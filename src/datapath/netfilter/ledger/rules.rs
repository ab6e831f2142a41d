//! What the tables of the ledger are made of.

use netdev_providers::Direction;
use netdev_providers::netlink::Message;
use netdev_providers::netlink::netfilter::nft::expr::{self, Cmp};
use netdev_providers::netlink::netfilter::nft::table::{self, NFT_TYPE_IFINDEX, NetdevSet};
use netdev_providers::netlink::netfilter::nft::*;
use netdev_providers::netlink::socket::{CREATE, EXCL};

use super::LedgerConfig;
use crate::datapath::netfilter::conntrack::CtStatus;

/// What `nft` calls the key type (its `enum datatypes`; the kernel does not care): the concatenation
/// `iface_index . integer . ct_dir . invalid`, six bits each (`nft` has no type for the port of any protocol).
const NFT_TYPE_SIGHTED: u32 = NFT_TYPE_IFINDEX << 18 | 4 << 12 | 27 << 6;
/// What `nft` 1.0.6 stores beside a set so that it can list it:
/// `typeof meta iif . ct id . ct direction . ct original proto-src`. It has room for no fifth.
const SIGHTED_USERDATA: &[u8] = &[
    0x00, 0x04, 0x00, 0x00, 0x00, 0x00, 0x03, 0x5a, 0x00, 0x04, 0x0d, 0x00, 0x00, 0x00, 0x01, 0x52,
    0x00, 0x0e, 0x00, 0x04, 0x09, 0x00, 0x00, 0x00, 0x01, 0x06, 0x00, 0x04, 0x04, 0x00, 0x00, 0x00,
    0x01, 0x14, 0x00, 0x04, 0x0c, 0x00, 0x00, 0x00, 0x01, 0x0c, 0x00, 0x04, 0x17, 0x00, 0x00, 0x00,
    0x01, 0x04, 0xff, 0xff, 0xff, 0xff, 0x02, 0x14, 0x00, 0x04, 0x0c, 0x00, 0x00, 0x00, 0x01, 0x0c,
    0x00, 0x04, 0x01, 0x00, 0x00, 0x00, 0x01, 0x04, 0xff, 0xff, 0xff, 0xff, 0x03, 0x14, 0x00, 0x04,
    0x0c, 0x00, 0x00, 0x00, 0x01, 0x0c, 0x00, 0x04, 0x0b, 0x00, 0x00, 0x00, 0x01, 0x04, 0x00, 0x00,
    0x00, 0x00,
];

pub(super) const PORTS: &str = "ports";
pub(super) const SIGHTED: &str = "sighted";
pub(super) const SIGHTED_KEY_LEN: u32 = 16;
/// In the forward hook: what comes out of an IPsec tunnel has its token taken before it can be sighted.
const FROM_IPSEC: &str = "from-ipsec";
/// The chain that sights, in each table.
pub const CHAIN: &str = "sight";
/// Behind every other chain of the hook, so that only what all of them accepted is sighted. A hook of
/// equal priority goes in front of those that are there (`nf_hook_entries_grow`): one of others that
/// had this priority before us is behind us.
pub(super) const PRIORITY: i32 = i32::MAX;
// linux/if_ether.h
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
/// The L3 and L4 headers: 40 + 20 bytes in IPv6, rounded up.
const SNAPLEN: u32 = 64;

/// The flag, in byte 13 of the header (RFC 9293).
pub const TCP_RST: u8 = 0x04;
/// A RST that conntrack believes leaves so many milliseconds (its default for CLOSE; where that was made longer, more
/// are logged, which is harmless).
const CLOSE_MS: u32 = 10_000;
/// RSTs that are logged at most in a second: more are somebody's flood, and sights are not to be lost for it.
const RESETS_PER_SECOND: u32 = 1000;

pub(super) const NEEDS_NFT: &str = "nf_tables (CONFIG_NF_TABLES)";
const NEEDS_INET: &str = "family inet of nf_tables (CONFIG_NF_TABLES_INET)";
const NEEDS_BRIDGE: &str = "family bridge of nf_tables (CONFIG_NF_TABLES_BRIDGE)";
const NEEDS_BRIDGE_CT: &str =
    "nft_ct and nf_conntrack_bridge (CONFIG_NFT_CT, CONFIG_NF_CONNTRACK_BRIDGE)";
const NEEDS_CT: &str = "nft_ct (CONFIG_NFT_CT) and nf_conntrack (CONFIG_NF_CONNTRACK)";
const NEEDS_LOG: &str = "nft_ct, nft_limit, nft_log and nfnetlink_log (CONFIG_NFT_CT, \
                         CONFIG_NFT_LIMIT, CONFIG_NFT_LOG, CONFIG_NETFILTER_NETLINK_LOG)";
pub(super) const NEEDS_XFRM: &str = "CONFIG_XFRM";

/// The hook that a packet has passed: each has a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hook {
    /// The stack's postrouting, where nothing but the egress netdev is left: the packet was routed.
    Inet,
    /// A bridge's forward hook: the frame was bridged, and nobody routed it. (The bridge's postrouting
    /// is not told the ingress port.)
    Bridge,
}

impl Hook {
    /// Both of them.
    pub const BOTH: [Self; 2] = [Self::Inet, Self::Bridge];

    pub(super) const fn family(self) -> u8 {
        match self {
            Self::Inet => NFPROTO_INET,
            Self::Bridge => NFPROTO_BRIDGE,
        }
    }

    /// The hook's number in its family.
    pub(super) const fn number(self) -> u32 {
        match self {
            Self::Inet => NF_INET_POST_ROUTING,
            Self::Bridge => NF_INET_FORWARD,
        }
    }

    /// The set of netdevs; sets of one transaction have different numbers.
    pub(super) const fn ports(self) -> NetdevSet {
        NetdevSet { name: PORTS, id: 2 * self as u32 + 1 }
    }

    const fn sighted_id(self) -> u32 {
        2 * self as u32 + 2
    }

    pub(super) const fn steps(self) -> Steps {
        match self {
            Self::Inet => Steps {
                table: Step::new("the table", NEEDS_NFT),
                chain: Step::new("the chain", NEEDS_INET),
                conntrack: Step::new("the rule on conntrack status", NEEDS_CT),
            },
            Self::Bridge => Steps {
                table: Step::new("the table for bridges", NEEDS_NFT),
                chain: Step::new("the chain for bridges", NEEDS_BRIDGE),
                conntrack: Step::new("the rule on conntrack status in bridges", NEEDS_BRIDGE_CT),
            },
        }
    }
}

impl std::fmt::Display for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Inet => "inet",
            Self::Bridge => "bridge",
        })
    }
}

/// Steps of a table that fail for reasons of its family.
pub(super) struct Steps {
    pub(super) table: Step,
    chain: Step,
    conntrack: Step,
}

/// The messages that make the table of a hook.
pub(super) fn describe(
    t: &mut Transaction<'_>,
    config: &LedgerConfig,
    hook: Hook,
    with_xfrm: bool,
) {
    let table = config.table.as_str();
    let steps = hook.steps();
    t.of_family(hook.family());
    table::make_owned(t, steps.table, table);
    hook.ports().make(t, Step::new("the set of ports", NEEDS_NFT), table);
    t.add(Step::new("the set of sights", NEEDS_NFT), NFT_MSG_NEWSET, CREATE | EXCL, |m| {
        m.str(NFTA_SET_TABLE, table)
            .str(NFTA_SET_NAME, SIGHTED)
            .be32(NFTA_SET_FLAGS, NFT_SET_EVAL)
            .be32(NFTA_SET_KEY_TYPE, NFT_TYPE_SIGHTED)
            .be32(NFTA_SET_KEY_LEN, SIGHTED_KEY_LEN)
            .be32(NFTA_SET_ID, hook.sighted_id())
            .nested(NFTA_SET_DESC, |m| {
                m.be32(NFTA_SET_DESC_SIZE, config.size);
            })
            .attr(NFTA_SET_USERDATA, SIGHTED_USERDATA);
    });
    table::make_base_chain(t, steps.chain, table, CHAIN, (hook.number(), PRIORITY));
    let mut rule = |step, fill: &dyn Fn(&mut Message<'_>)| {
        table::append_rule(t, step, table, CHAIN, fill);
    };
    rule(Step::new("the rule on ports", NEEDS_NFT), &|m| {
        hook.ports().unless_in(m, expr::NFT_META_IIF);
        expr::accept(m);
    });
    // What nft_flow_offload.c and TC cannot offload, and what is offloaded or dying already.
    let mut never = CtStatus::SEQ_ADJUST
        | CtStatus::DYING
        | CtStatus::TEMPLATE
        | CtStatus::NAT_CLASH
        | CtStatus::HELPER;
    if config.skip_offloaded {
        never |= CtStatus::OFFLOAD | CtStatus::HW_OFFLOAD;
    }
    rule(steps.conntrack, &|m| {
        expr::ct(m, expr::NFT_CT_STATUS, expr::NFT_REG_1);
        expr::mask(m, &never.to_ne_bytes());
        expr::cmp(m, Cmp::Neq, &0u32.to_ne_bytes());
        expr::accept(m);
    });
    if config.min_packets > 0 {
        rule(Step::new("the rule on packets", NEEDS_CT), &|m| {
            expr::ct(m, expr::NFT_CT_PKTS, expr::NFT_REG_1);
            expr::cmp(m, Cmp::Neq, &0u64.to_be_bytes());
            expr::to_be64(m);
            expr::cmp(m, Cmp::Lt, &config.min_packets.to_be_bytes());
            expr::accept(m);
        });
    }
    if config.min_bytes > 0 {
        rule(Step::new("the rule on bytes", NEEDS_CT), &|m| {
            expr::ct(m, expr::NFT_CT_BYTES, expr::NFT_REG_1);
            expr::to_be64(m);
            expr::cmp(m, Cmp::Lt, &config.min_bytes.to_be_bytes());
            expr::accept(m);
        });
    }
    // A bridge does not look into IPsec.
    if with_xfrm && hook == Hook::Inet {
        let xfrm = |what| Step { what, needs: NEEDS_XFRM, optional: true };
        rule(xfrm("the rule on packets into IPsec"), &|m| {
            expr::rt(m, expr::NFT_RT_XFRM, expr::NFT_REG_1);
            expr::cmp(m, Cmp::Eq, &[1]);
            expr::accept(m);
        });
    }
    // PACKET_HOST: it was for us, to route it. PACKET_OTHERHOST: it was for somebody else.
    let unicast = match hook {
        Hook::Inet => 0,
        Hook::Bridge => 3,
    };
    rule(Step::new("the rule on multicast", NEEDS_NFT), &|m| {
        expr::meta(m, expr::NFT_META_PKTTYPE, expr::NFT_REG_1);
        expr::cmp(m, Cmp::Neq, &[unicast]);
        expr::accept(m);
    });
    // In a bridge the protocol of netfilter is the bridge's, whatever the frame carries.
    let is_of = |m: &mut Message<'_>, nfproto: u8, ethertype: u16| match hook {
        Hook::Inet => {
            expr::meta(m, expr::NFT_META_NFPROTO, expr::NFT_REG_1);
            expr::cmp(m, Cmp::Eq, &[nfproto]);
        }
        Hook::Bridge => {
            expr::meta(m, expr::NFT_META_PROTOCOL, expr::NFT_REG_1);
            expr::cmp(m, Cmp::Eq, &ethertype.to_be_bytes());
        }
    };
    rule(Step::new("the rule on IPv4 options", NEEDS_NFT), &|m| {
        is_of(m, NFPROTO_IPV4, ETH_P_IP);
        expr::payload(m, expr::NFT_PAYLOAD_NETWORK_HEADER, 0, 1);
        expr::mask(m, &[0x0f]);
        expr::cmp(m, Cmp::Neq, &[5]);
        expr::accept(m);
    });
    rule(Step::new("the rule on IPv6 extension headers", NEEDS_NFT), &|m| {
        is_of(m, NFPROTO_IPV6, ETH_P_IPV6);
        expr::payload(m, expr::NFT_PAYLOAD_NETWORK_HEADER, 6, 1);
        expr::cmp(m, Cmp::Neq, &[6]);
        expr::cmp(m, Cmp::Neq, &[17]);
        expr::accept(m);
    });
    let once = |m: &mut Message<'_>| {
        take_token(m, hook);
        expr::log(m, config.group, SNAPLEN);
    };
    let status = |m: &mut Message<'_>, bits: u32| {
        expr::ct(m, expr::NFT_CT_STATUS, expr::NFT_REG_1);
        expr::mask(m, &bits.to_ne_bytes());
        expr::cmp(m, Cmp::Neq, &0u32.to_ne_bytes());
    };
    rule(Step::new("the rule on TCP", NEEDS_LOG), &|m| {
        expr::meta(m, expr::NFT_META_L4PROTO, expr::NFT_REG_1);
        expr::cmp(m, Cmp::Eq, &[6]);
        status(m, CtStatus::ASSURED);
        expr::payload(m, expr::NFT_PAYLOAD_TRANSPORT_HEADER, 13, 1);
        expr::mask(m, &[0x07]); // RST | SYN | FIN
        expr::cmp(m, Cmp::Eq, &[0]);
        once(m);
    });
    // Of a connection that is offloaded conntrack may not believe a RST, and tells nobody (see `ends::unbelieved`).
    rule(Step::new("the rule on RST", NEEDS_LOG), &|m| {
        expr::meta(m, expr::NFT_META_L4PROTO, expr::NFT_REG_1);
        expr::cmp(m, Cmp::Eq, &[6]);
        status(m, CtStatus::ASSURED);
        expr::payload(m, expr::NFT_PAYLOAD_TRANSPORT_HEADER, 13, 1);
        expr::mask(m, &[TCP_RST]);
        expr::cmp(m, Cmp::Neq, &[0]);
        expr::ct(m, expr::NFT_CT_EXPIRATION, expr::NFT_REG_1);
        expr::to_be32(m);
        expr::cmp(m, Cmp::Gt, &CLOSE_MS.to_be_bytes());
        expr::limit_per_second(m, RESETS_PER_SECOND);
        expr::log(m, config.group, SNAPLEN);
    });
    rule(Step::new("the rule on UDP", NEEDS_LOG), &|m| {
        expr::meta(m, expr::NFT_META_L4PROTO, expr::NFT_REG_1);
        expr::cmp(m, Cmp::Eq, &[17]);
        if !config.one_way_udp {
            status(m, CtStatus::SEEN_REPLY);
        }
        once(m);
    });
    if with_xfrm && hook == Hook::Inet {
        // Postrouting is not told where a packet came from.
        let step =
            Step { what: "the chain on packets from IPsec", needs: NEEDS_XFRM, optional: true };
        table::make_base_chain(t, step, table, FROM_IPSEC, (NF_INET_FORWARD, PRIORITY));
        table::append_rule(t, step, table, FROM_IPSEC, |m| {
            hook.ports().if_in(m, expr::NFT_META_IIF);
            expr::meta(m, expr::NFT_META_SECPATH, expr::NFT_REG_1);
            expr::cmp(m, Cmp::Eq, &[1]);
            take_token(m, hook);
        });
    }
}

/// `add @sighted { iif . ct id . ct direction . ct original proto-src ... }`: the rest of the rule holds once
/// for each.
fn take_token(m: &mut Message<'_>, hook: Hook) {
    expr::meta(m, expr::NFT_META_IIF, expr::NFT_REG_1);
    expr::ct(m, expr::NFT_CT_ID, expr::NFT_REG32_01);
    expr::ct(m, expr::NFT_CT_DIRECTION, expr::NFT_REG32_02);
    expr::ct_of(m, expr::NFT_CT_PROTO_SRC, Direction::Original, expr::NFT_REG32_03);
    expr::add_counting_once_an_hour(m, SIGHTED, hook.sighted_id());
}
