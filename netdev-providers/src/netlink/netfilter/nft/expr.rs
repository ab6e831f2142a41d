//! The nf_tables expressions (`linux/netfilter/nf_tables.h`) that rules of ours are made of.
//!
//! All numbers of nf_tables attributes are in network order; data that goes into registers is as
//! the packet or the kernel has it.

use super::{NFTA_DATA_VALUE, NFTA_LIST_ELEM};
use crate::contract::types::Direction;
use crate::netlink::wire::{Attr, Message};

// enum nft_expr_attributes
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
// enum nft_data_attributes, nft_verdict_attributes
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_VERDICT_CHAIN: u16 = 2;
/// `NFT_GOTO` (-4).
const NFT_GOTO: u32 = 0xffff_fffc;
const NF_ACCEPT: u32 = 1; // linux/netfilter.h
// enum nft_registers: the verdict, the first of 16 bytes, and the second to fourth of 4 bytes
// (NFT_REG32_01 to 03 are bytes 4..8, 8..12 and 12..16 of NFT_REG_1).
const NFT_REG_VERDICT: u32 = 0;
/// `NFT_REG_1`.
pub const NFT_REG_1: u32 = 1;
/// `NFT_REG32_00`: the first 4 bytes of `NFT_REG_1`. Fifteen more follow.
pub const NFT_REG32_00: u32 = 8;
/// `NFT_REG32_01`.
pub const NFT_REG32_01: u32 = 9;
/// `NFT_REG32_02`.
pub const NFT_REG32_02: u32 = 10;
/// `NFT_REG32_03`.
pub const NFT_REG32_03: u32 = 11;
// enum nft_meta_keys
/// `NFT_META_PROTOCOL`: the ethertype, in network order.
pub const NFT_META_PROTOCOL: u32 = 1;
/// `NFT_META_IIF`.
pub const NFT_META_IIF: u32 = 4;
/// `NFT_META_OIF`.
pub const NFT_META_OIF: u32 = 5;
/// `NFT_META_NFPROTO`.
pub const NFT_META_NFPROTO: u32 = 15;
/// `NFT_META_L4PROTO`.
pub const NFT_META_L4PROTO: u32 = 16;
/// `NFT_META_PKTTYPE`.
pub const NFT_META_PKTTYPE: u32 = 19;
/// `NFT_META_SECPATH`.
pub const NFT_META_SECPATH: u32 = 25;
// enum nft_ct_keys
/// `NFT_CT_DIRECTION`.
pub const NFT_CT_DIRECTION: u32 = 1;
/// `NFT_CT_STATUS`.
pub const NFT_CT_STATUS: u32 = 2;
/// `NFT_CT_EXPIRATION`: the milliseconds that the entry has left, in host order.
pub const NFT_CT_EXPIRATION: u32 = 5;
/// `NFT_CT_PROTO_SRC`.
pub const NFT_CT_PROTO_SRC: u32 = 11;
/// `NFT_CT_PROTO_DST`.
pub const NFT_CT_PROTO_DST: u32 = 12;
/// `NFT_CT_PKTS`.
pub const NFT_CT_PKTS: u32 = 14;
/// `NFT_CT_BYTES`.
pub const NFT_CT_BYTES: u32 = 15;
/// `NFT_CT_ZONE`.
pub const NFT_CT_ZONE: u32 = 17;
/// `NFT_CT_SRC_IP`.
pub const NFT_CT_SRC_IP: u32 = 19;
/// `NFT_CT_DST_IP`.
pub const NFT_CT_DST_IP: u32 = 20;
/// `NFT_CT_SRC_IP6`.
pub const NFT_CT_SRC_IP6: u32 = 21;
/// `NFT_CT_DST_IP6`.
pub const NFT_CT_DST_IP6: u32 = 22;
/// `NFT_CT_ID`.
pub const NFT_CT_ID: u32 = 23;
// enum nft_rt_keys
/// `NFT_RT_XFRM`.
pub const NFT_RT_XFRM: u32 = 4;
// enum nft_payload_bases
/// `NFT_PAYLOAD_NETWORK_HEADER`.
pub const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;
/// `NFT_PAYLOAD_TRANSPORT_HEADER`.
pub const NFT_PAYLOAD_TRANSPORT_HEADER: u32 = 2;
// enum nft_lookup_flags
const NFT_LOOKUP_F_INV: u32 = 1;

/// `enum nft_cmp_ops`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cmp {
    /// Equal.
    Eq = 0,
    /// Not equal.
    Neq = 1,
    /// Less, as numbers in network order are ([`to_be64`], [`to_be32`]).
    Lt = 2,
    /// Greater, likewise.
    Gt = 4,
}

fn expr(m: &mut Message<'_>, name: &str, data: impl FnOnce(&mut Message<'_>)) {
    m.nested(NFTA_LIST_ELEM, |m| {
        m.str(NFTA_EXPR_NAME, name).nested(NFTA_EXPR_DATA, data);
    });
}

/// A load of a key into a register; meta, ct and rt number their attributes alike (DREG 1, KEY 2
/// for meta and ct; `rt` the same).
fn load(m: &mut Message<'_>, name: &str, key: u32, dreg: u32) {
    expr(m, name, |m| {
        m.be32(2, key).be32(1, dreg);
    });
}

/// `meta KEY` into a register.
pub fn meta(m: &mut Message<'_>, key: u32, dreg: u32) {
    load(m, "meta", key, dreg);
}

/// `ct KEY` into a register.
pub fn ct(m: &mut Message<'_>, key: u32, dreg: u32) {
    load(m, "ct", key, dreg);
}

/// `ct original KEY` or `ct reply KEY` into a register.
pub fn ct_of(m: &mut Message<'_>, key: u32, direction: Direction, dreg: u32) {
    expr(m, "ct", |m| {
        // NFTA_CT_KEY, _DREG, _DIRECTION
        m.be32(2, key).be32(1, dreg).u8(3, direction as u8);
    });
}

/// `rt KEY` into a register.
pub fn rt(m: &mut Message<'_>, key: u32, dreg: u32) {
    load(m, "rt", key, dreg);
}

/// Bytes of the packet into register 1.
pub fn payload(m: &mut Message<'_>, base: u32, offset: u32, len: u32) {
    expr(m, "payload", |m| {
        // NFTA_PAYLOAD_DREG, _BASE, _OFFSET, _LEN
        m.be32(1, NFT_REG_1).be32(2, base).be32(3, offset).be32(4, len);
    });
}

/// Register 1 compared with bytes; the rule ends here when it does not hold.
pub fn cmp(m: &mut Message<'_>, op: Cmp, data: &[u8]) {
    expr(m, "cmp", |m| {
        // NFTA_CMP_SREG, _OP, _DATA
        m.be32(1, NFT_REG_1).be32(2, op as u32).nested(3, |m| {
            m.attr(NFTA_DATA_VALUE, data);
        });
    });
}

/// The 64 bits of register 1 from host into network order, in place: what [`cmp`] can order.
pub fn to_be64(m: &mut Message<'_>) {
    hton(m, 8);
}

/// The 32 bits of register 1 from host into network order, in place.
pub fn to_be32(m: &mut Message<'_>) {
    hton(m, 4);
}

fn hton(m: &mut Message<'_>, len: u32) {
    const NFT_BYTEORDER_HTON: u32 = 1;
    expr(m, "byteorder", |m| {
        // NFTA_BYTEORDER_SREG, _DREG, _OP, _LEN, _SIZE
        m.be32(1, NFT_REG_1).be32(2, NFT_REG_1).be32(3, NFT_BYTEORDER_HTON);
        m.be32(4, len).be32(5, len);
    });
}

/// Register 1 masked in place.
pub fn mask(m: &mut Message<'_>, mask: &[u8]) {
    let zero = [0; 16];
    expr(m, "bitwise", |m| {
        #[expect(clippy::cast_possible_truncation, reason = "at most 16")]
        let len = mask.len() as u32;
        // NFTA_BITWISE_SREG, _DREG, _LEN, _MASK, _XOR; the operation is NFT_BITWISE_BOOL (_MASK_XOR)
        m.be32(1, NFT_REG_1).be32(2, NFT_REG_1).be32(3, len);
        m.nested(4, |m| {
            m.attr(NFTA_DATA_VALUE, mask);
        });
        m.nested(5, |m| {
            m.attr(NFTA_DATA_VALUE, &zero[..mask.len()]);
        });
    });
}

/// The rule ends here when register 1 is in the set.
pub fn lookup_not(m: &mut Message<'_>, set: &str, set_id: u32) {
    expr(m, "lookup", |m| {
        // NFTA_LOOKUP_SREG, _SET, _SET_ID, _FLAGS
        m.be32(2, NFT_REG_1).str(1, set).be32(4, set_id).be32(5, NFT_LOOKUP_F_INV);
    });
}

/// The rule goes on when what stands in the registers from the first on is in the set.
pub fn lookup(m: &mut Message<'_>, set: &str, set_id: u32) {
    expr(m, "lookup", |m| {
        // NFTA_LOOKUP_SREG, _SET, _SET_ID
        m.be32(2, NFT_REG_1).str(1, set).be32(4, set_id);
    });
}

/// `goto chain`.
pub fn goto(m: &mut Message<'_>, chain: &str) {
    expr(m, "immediate", |m| {
        // NFTA_IMMEDIATE_DREG, _DATA
        m.be32(1, NFT_REG_VERDICT).nested(2, |m| {
            m.nested(NFTA_DATA_VERDICT, |m| {
                m.be32(NFTA_VERDICT_CODE, NFT_GOTO).str(NFTA_VERDICT_CHAIN, chain);
            });
        });
    });
}

/// `flow add @flowtable`.
pub fn flow_offload(m: &mut Message<'_>, flowtable: &str) {
    expr(m, "flow_offload", |m| {
        // NFTA_FLOW_TABLE_NAME
        m.str(1, flowtable);
    });
}

/// The verdict `accept`.
pub fn accept(m: &mut Message<'_>) {
    expr(m, "immediate", |m| {
        // NFTA_IMMEDIATE_DREG, _DATA
        m.be32(1, NFT_REG_VERDICT).nested(2, |m| {
            m.nested(NFTA_DATA_VERDICT, |m| {
                m.be32(NFTA_VERDICT_CODE, NF_ACCEPT);
            });
        });
    });
}

/// `add @set { <register 1> counter limit rate 1/hour burst 1 packets }`: every packet is counted
/// in its element, and the rule goes on only for the one that got the element's token.
///
/// The kernel evaluates the expressions of an element in their order and stops at the first that
/// ends the rule (`nft_set_elem_update_expr`), so the counter stands in front.
pub fn add_counting_once_an_hour(m: &mut Message<'_>, set: &str, set_id: u32) {
    const NFT_DYNSET_OP_ADD: u32 = 0;
    const NFT_DYNSET_F_EXPR: u32 = 2;
    expr(m, "dynset", |m| {
        // NFTA_DYNSET_SREG_KEY, _OP, _SET_NAME, _SET_ID, _EXPRESSIONS, _FLAGS
        m.be32(4, NFT_REG_1).be32(3, NFT_DYNSET_OP_ADD).str(1, set).be32(2, set_id);
        m.nested(10, |m| {
            expr(m, COUNTER, |_| {});
            limit(m, (1, 3600), 1);
        });
        m.be32(9, NFT_DYNSET_F_EXPR);
    });
}

/// `limit rate N/second burst N packets`: the rule ends here when more come.
pub fn limit_per_second(m: &mut Message<'_>, packets: u32) {
    limit(m, (packets.into(), 1), packets);
}

/// So many packets in so many seconds.
fn limit(m: &mut Message<'_>, (packets, seconds): (u64, u64), burst: u32) {
    expr(m, "limit", |m| {
        // NFTA_LIMIT_RATE, _UNIT (seconds), _BURST, _TYPE (NFT_LIMIT_PKTS), _FLAGS
        m.be64(1, packets).be64(2, seconds).be32(3, burst).be32(4, 0).be32(5, 0);
    });
}

const COUNTER: &str = "counter";

/// The packets of a `counter` in a dump; `None` for every other expression.
pub(super) fn counted(expr: &Attr<'_>) -> Option<u64> {
    const NFTA_COUNTER_PACKETS: u16 = 2;
    let attrs = expr.nested();
    if attrs.find_type(NFTA_EXPR_NAME)?.str()? != COUNTER {
        return None;
    }
    attrs.find_type(NFTA_EXPR_DATA)?.nested().find_type(NFTA_COUNTER_PACKETS)?.be64()
}

/// `log group G snaplen S queue-threshold 1`.
pub fn log(m: &mut Message<'_>, group: u16, snaplen: u32) {
    expr(m, "log", |m| {
        // NFTA_LOG_GROUP, _SNAPLEN, _QTHRESHOLD
        m.be16(1, group).be32(3, snaplen).be16(4, 1);
    });
}
