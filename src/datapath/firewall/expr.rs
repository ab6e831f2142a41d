//! Expressions of rules of nf_tables, as the kernel shows them: names, attributes, numbers
//! (`linux/netfilter/nf_tables.h`, `linux/netfilter/nf_conntrack_tuple_common.h`).

use netdev_providers::netlink::netfilter::nft::NFTA_LIST_ELEM;
use netdev_providers::netlink::wire::{Attr, Nested};

use crate::datapath::skipped::Skipped;

// enum nft_expr_attributes, nft_data_attributes, nft_verdict_attributes
pub(super) const NFTA_EXPR_NAME: u16 = 1;
pub(super) const NFTA_EXPR_DATA: u16 = 2;
pub(super) const NFTA_DATA_VERDICT: u16 = 2;
pub(super) const NFTA_VERDICT_CODE: u16 = 1;
pub(super) const NFTA_VERDICT_CHAIN: u16 = 2;
// of single expressions
pub(super) const NFTA_IMMEDIATE_DATA: u16 = 2;
pub(super) const NFTA_LOOKUP_SET: u16 = 1;
pub(super) const NFTA_LOOKUP_SREG: u16 = 2;
pub(super) const NFTA_LOOKUP_DREG: u16 = 3;
pub(super) const NFTA_DYNSET_SET_NAME: u16 = 1;
pub(super) const NFTA_OBJREF_IMM_TYPE: u16 = 1;
pub(super) const NFTA_OBJREF_IMM_NAME: u16 = 2;
pub(super) const NFTA_OBJREF_SET_NAME: u16 = 4;
pub(super) const NFTA_META_KEY: u16 = 2;
pub(super) const NFTA_META_SREG: u16 = 3;
pub(super) const NFTA_CT_KEY: u16 = 2;
pub(super) const NFTA_CT_DIRECTION: u16 = 3;
pub(super) const NFTA_CT_SREG: u16 = 4;
pub(super) const NFTA_PAYLOAD_DREG: u16 = 1;
pub(super) const NFTA_PAYLOAD_BASE: u16 = 2;
pub(super) const NFTA_PAYLOAD_OFFSET: u16 = 3;
pub(super) const NFTA_PAYLOAD_LEN: u16 = 4;
pub(super) const NFTA_PAYLOAD_SREG: u16 = 5;
pub(super) const NFTA_EXTHDR_SREG: u16 = 7;
pub(super) const NFTA_CMP_SREG: u16 = 1;
pub(super) const NFTA_CMP_OP: u16 = 2;
pub(super) const NFTA_CMP_DATA: u16 = 3;
pub(super) const NFTA_BITWISE_SREG: u16 = 1;
pub(super) const NFTA_BITWISE_DREG: u16 = 2;
pub(super) const NFTA_BITWISE_MASK: u16 = 4;
// of `match` and `target`
pub(super) const NFTA_XT_NAME: u16 = 1;
pub(super) const NFTA_XT_REV: u16 = 2;
pub(super) const NFTA_XT_INFO: u16 = 3;
// enum nft_registers, nft_verdicts, nft_cmp_ops
pub(super) const NFT_REG_VERDICT: u32 = 0;
pub(super) const NF_DROP: u32 = 0;
pub(super) const NFT_CONTINUE: u32 = 0xffff_ffff;
pub(super) const NFT_JUMP: u32 = 0xffff_fffd;
pub(super) const NFT_GOTO: u32 = 0xffff_fffc;
pub(super) const NFT_RETURN: u32 = 0xffff_fffb;
pub(super) const NFT_CMP_EQ: u32 = 0;
pub(super) const NFT_CMP_NEQ: u32 = 1;
// enum nft_payload_bases
pub(super) const LINK_LAYER: u32 = 0;
pub(super) const NETWORK: u32 = 1;
pub(super) const TRANSPORT: u32 = 2;
// enum nft_meta_keys
pub(super) const NFT_META_PRIORITY: u32 = 2;
pub(super) const NFT_META_MARK: u32 = 3;
pub(super) const NFT_META_IIF: u32 = 4;
pub(super) const NFT_META_IIFNAME: u32 = 6;
pub(super) const NFT_META_L4PROTO: u32 = 16;
pub(super) const NFT_META_TIME_NS: u32 = 30;
pub(super) const NFT_META_TIME_HOUR: u32 = 32;
// enum nft_ct_keys
pub(super) const NFT_CT_STATE: u32 = 0;
pub(super) const NFT_CT_PKTS: u32 = 14;
pub(super) const NFT_CT_AVGPKT: u32 = 16;
pub(super) const NFT_CT_ZONE: u32 = 17;
/// `NF_CT_STATE_BIT(IP_CT_ESTABLISHED)`: what offloaded packets are in, of either direction.
pub(super) const ESTABLISHED: u32 = 2;

/// The expressions of a rule or an element: the name of each, and its attributes.
pub(super) fn each<'a>(expressions: Nested<'a>) -> impl Iterator<Item = (&'a str, Nested<'a>)> {
    expressions.filter(|a| a.ty == NFTA_LIST_ELEM).filter_map(|e| {
        let name = e.nested().find_type(NFTA_EXPR_NAME)?.str()?;
        let data = e.nested().find_type(NFTA_EXPR_DATA).map_or(Nested::new(&[]), |d| d.nested());
        Some((name, data))
    })
}

/// What a match of iptables (`-m`) asks for of each packet that a decision cannot stand on for good.
pub(super) fn asked_by_match(name: &str) -> Option<Skipped> {
    Some(match name {
        "limit" | "hashlimit" => Skipped::Limit,
        "quota" => Skipped::Quota,
        "connbytes" => Skipped::CtBytes,
        "connlimit" => Skipped::CtCount,
        "recent" => Skipped::SetUpdate,
        "time" => Skipped::Time,
        "statistic" => Skipped::Random,
        "set" => Skipped::Ipset,
        _ => return None,
    })
}

/// A number of an expression.
pub(super) fn number(data: &Nested<'_>, ty: u16) -> Option<u32> {
    data.find_type(ty).and_then(|a: Attr<'_>| a.be32())
}

/// The chain that data with a verdict leads to.
pub(super) fn verdict_chain(data: Nested<'_>) -> Option<String> {
    let verdict = data.find_type(NFTA_DATA_VERDICT)?;
    Some(verdict.nested().find_type(NFTA_VERDICT_CHAIN)?.str()?.to_owned())
}

/// The verdict that data are.
pub(super) fn verdict_code(data: Nested<'_>) -> Option<u32> {
    data.find_type(NFTA_DATA_VERDICT)?.nested().find_type(NFTA_VERDICT_CODE)?.be32()
}
