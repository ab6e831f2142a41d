//! nf_tables (`linux/netfilter/nf_tables.h`): tables of ours, in family `inet` and in family `bridge`.
//!
//! | module | what it is |
//! |---|---|
//! | [`transaction`] | several changes that take effect together, or not at all |
//! | [`expr`] | expressions of rules |
//! | [`set`] | elements of sets |
//! | [`table`] | what tables of ours have in common |
//!
//! All numbers in attributes are in network order; data that goes into registers, and keys of sets,
//! are as the packet or the kernel has them.

pub mod expr;
pub mod set;
pub mod table;
pub mod transaction;

pub use transaction::{Step, Transaction, first_refusal};

use super::{SUBSYS_NFTABLES, msg_type, nfgenmsg};
use crate::netlink::socket::REQUEST;
use crate::netlink::wire::Message;

// linux/netfilter/nfnetlink.h
/// `NFNL_MSG_BATCH_BEGIN`.
pub const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
/// `NFNL_MSG_BATCH_END`.
pub const NFNL_MSG_BATCH_END: u16 = 0x11;
// enum nf_tables_msg_types
/// `NFT_MSG_NEWTABLE`.
pub const NFT_MSG_NEWTABLE: u16 = 0;
/// `NFT_MSG_GETTABLE`.
pub const NFT_MSG_GETTABLE: u16 = 1;
/// `NFT_MSG_DELTABLE`.
pub const NFT_MSG_DELTABLE: u16 = 2;
/// `NFT_MSG_NEWCHAIN`.
pub const NFT_MSG_NEWCHAIN: u16 = 3;
/// `NFT_MSG_NEWRULE`.
pub const NFT_MSG_NEWRULE: u16 = 6;
/// `NFT_MSG_DELRULE`.
pub const NFT_MSG_DELRULE: u16 = 8;
/// `NFT_MSG_NEWSET`.
pub const NFT_MSG_NEWSET: u16 = 9;
/// `NFT_MSG_GETSET`.
pub const NFT_MSG_GETSET: u16 = 10;
/// `NFT_MSG_NEWSETELEM`.
pub const NFT_MSG_NEWSETELEM: u16 = 12;
/// `NFT_MSG_GETSETELEM`.
pub const NFT_MSG_GETSETELEM: u16 = 13;
/// `NFT_MSG_DELSETELEM`.
pub const NFT_MSG_DELSETELEM: u16 = 14;
/// `NFT_MSG_NEWFLOWTABLE`.
pub const NFT_MSG_NEWFLOWTABLE: u16 = 22;
/// `NFT_MSG_DELFLOWTABLE`.
pub const NFT_MSG_DELFLOWTABLE: u16 = 24;
/// `NFT_MSG_DESTROYSETELEM`, since 6.3.
pub const NFT_MSG_DESTROYSETELEM: u16 = 30;
// enum nft_table_attributes, nft_table_flags
/// `NFTA_TABLE_NAME`.
pub const NFTA_TABLE_NAME: u16 = 1;
/// `NFTA_TABLE_FLAGS`.
pub const NFTA_TABLE_FLAGS: u16 = 2;
/// `NFT_TABLE_F_OWNER`: the table belongs to the socket that made it. Others can list it; they
/// cannot change it, `flush ruleset` passes it over, and the kernel removes it when the socket
/// closes.
pub const NFT_TABLE_F_OWNER: u32 = 2;
// enum nft_chain_attributes, nft_hook_attributes
/// `NFTA_CHAIN_TABLE`.
pub const NFTA_CHAIN_TABLE: u16 = 1;
/// `NFTA_CHAIN_NAME`.
pub const NFTA_CHAIN_NAME: u16 = 3;
/// `NFTA_CHAIN_HOOK`.
pub const NFTA_CHAIN_HOOK: u16 = 4;
/// `NFTA_CHAIN_POLICY`.
pub const NFTA_CHAIN_POLICY: u16 = 5;
/// `NFTA_CHAIN_TYPE`.
pub const NFTA_CHAIN_TYPE: u16 = 7;
/// `NFTA_HOOK_HOOKNUM`.
pub const NFTA_HOOK_HOOKNUM: u16 = 1;
/// `NFTA_HOOK_PRIORITY`.
pub const NFTA_HOOK_PRIORITY: u16 = 2;
/// `NF_INET_FORWARD` (`linux/netfilter.h`), and `NF_BR_FORWARD` (`linux/netfilter_bridge.h`).
pub const NF_INET_FORWARD: u32 = 2;
/// `NF_INET_POST_ROUTING` (`linux/netfilter.h`).
pub const NF_INET_POST_ROUTING: u32 = 4;
/// `NF_ACCEPT`.
pub const NF_ACCEPT: u32 = 1;
// enum nft_set_attributes, nft_set_desc_attributes, nft_set_flags
/// `NFTA_SET_TABLE`.
pub const NFTA_SET_TABLE: u16 = 1;
/// `NFTA_SET_NAME`.
pub const NFTA_SET_NAME: u16 = 2;
/// `NFTA_SET_FLAGS`.
pub const NFTA_SET_FLAGS: u16 = 3;
/// `NFTA_SET_KEY_TYPE`.
pub const NFTA_SET_KEY_TYPE: u16 = 4;
/// `NFTA_SET_KEY_LEN`.
pub const NFTA_SET_KEY_LEN: u16 = 5;
/// `NFTA_SET_DESC`.
pub const NFTA_SET_DESC: u16 = 9;
/// `NFTA_SET_ID`.
pub const NFTA_SET_ID: u16 = 10;
/// `NFTA_SET_USERDATA`.
pub const NFTA_SET_USERDATA: u16 = 13;
/// `NFTA_SET_COUNT`, of newer kernels only.
pub const NFTA_SET_COUNT: u16 = 20;
/// `NFTA_SET_DESC_SIZE`.
pub const NFTA_SET_DESC_SIZE: u16 = 1;
/// `NFT_SET_EVAL`: rules add elements.
pub const NFT_SET_EVAL: u32 = 0x20;
// enum nft_rule_attributes
/// `NFTA_RULE_TABLE`.
pub const NFTA_RULE_TABLE: u16 = 1;
/// `NFTA_RULE_CHAIN`.
pub const NFTA_RULE_CHAIN: u16 = 2;
/// `NFTA_RULE_EXPRESSIONS`.
pub const NFTA_RULE_EXPRESSIONS: u16 = 4;
// enum nft_flowtable_attributes, nft_flowtable_hook_attributes, nft_devices_attributes
/// `NFTA_FLOWTABLE_TABLE`.
pub const NFTA_FLOWTABLE_TABLE: u16 = 1;
/// `NFTA_FLOWTABLE_NAME`.
pub const NFTA_FLOWTABLE_NAME: u16 = 2;
/// `NFTA_FLOWTABLE_HOOK`.
pub const NFTA_FLOWTABLE_HOOK: u16 = 3;
/// `NFTA_FLOWTABLE_FLAGS`.
pub const NFTA_FLOWTABLE_FLAGS: u16 = 7;
/// `NFTA_FLOWTABLE_HOOK_NUM`.
pub const NFTA_FLOWTABLE_HOOK_NUM: u16 = 1;
/// `NFTA_FLOWTABLE_HOOK_PRIORITY`.
pub const NFTA_FLOWTABLE_HOOK_PRIORITY: u16 = 2;
/// `NFTA_FLOWTABLE_HOOK_DEVS`.
pub const NFTA_FLOWTABLE_HOOK_DEVS: u16 = 3;
/// `NFTA_DEVICE_NAME`.
pub const NFTA_DEVICE_NAME: u16 = 1;
/// `NFT_FLOWTABLE_HW_OFFLOAD`: entries go to the netdevs' drivers too.
pub const NFT_FLOWTABLE_HW_OFFLOAD: u32 = 1;
/// `NFT_FLOWTABLE_COUNTER`: packets count in conntrack, where it counts.
pub const NFT_FLOWTABLE_COUNTER: u32 = 2;
/// `NF_NETDEV_INGRESS` (`linux/netfilter.h`).
pub const NF_NETDEV_INGRESS: u32 = 0;
// enum nft_list_attributes, nft_data_attributes
/// `NFTA_LIST_ELEM`.
pub const NFTA_LIST_ELEM: u16 = 1;
/// `NFTA_DATA_VALUE`.
pub const NFTA_DATA_VALUE: u16 = 1;

/// `NLM_F_APPEND`.
pub const APPEND: u16 = 0x800;
/// `NFPROTO_INET` (`linux/netfilter.h`).
pub const NFPROTO_INET: u8 = 1;
/// `NFPROTO_IPV4`.
pub const NFPROTO_IPV4: u8 = 2;
/// `NFPROTO_BRIDGE`.
pub const NFPROTO_BRIDGE: u8 = 7;
/// `NFPROTO_IPV6`.
pub const NFPROTO_IPV6: u8 = 10;

/// A request that reads of family `inet`, outside of a transaction.
pub fn get(msg: u16, flags: u16, seq: u32, fill: impl FnOnce(&mut Message<'_>)) -> Vec<u8> {
    get_of(NFPROTO_INET, msg, flags, seq, fill)
}

/// The same of any family.
pub fn get_of(
    family: u8,
    msg: u16,
    flags: u16,
    seq: u32,
    fill: impl FnOnce(&mut Message<'_>),
) -> Vec<u8> {
    let mut buf = Vec::with_capacity(128);
    let mut m = Message::new(&mut buf, msg_type(SUBSYS_NFTABLES, msg), REQUEST | flags, seq);
    m.raw(&nfgenmsg(family, 0));
    fill(&mut m);
    m.finish();
    buf
}

#[cfg(test)]
mod tests;
