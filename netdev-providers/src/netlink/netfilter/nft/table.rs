//! What tables of ours are made of, whatever they are for: a table with an owner, a set of netdevs, a
//! base chain, rules.

use super::expr;
use super::set::elements;
use super::*;
use crate::contract::types::Ifindex;
use crate::netlink::socket::{CREATE, EXCL};

/// What `nft` calls the key type `iface_index` (its `enum datatypes`; the kernel does not care).
pub const NFT_TYPE_IFINDEX: u32 = 20;
/// What `nft` 1.0.6 stores beside a set so that it can list it: the byte order of the key.
const HOST_ORDER: &[u8] = &[0x00, 0x04, 0x01, 0x00, 0x00, 0x00];

/// A set of netdevs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetdevSet {
    /// Its name.
    pub name: &'static str,
    /// Its number within the transaction that makes it.
    pub id: u32,
}

impl NetdevSet {
    /// Makes it, empty.
    pub fn make(self, t: &mut Transaction<'_>, step: Step, table: &str) {
        t.add(step, NFT_MSG_NEWSET, CREATE | EXCL, |m| {
            m.str(NFTA_SET_TABLE, table)
                .str(NFTA_SET_NAME, self.name)
                .be32(NFTA_SET_FLAGS, 0)
                .be32(NFTA_SET_KEY_TYPE, NFT_TYPE_IFINDEX)
                .be32(NFTA_SET_KEY_LEN, 4)
                .be32(NFTA_SET_ID, self.id)
                .attr(NFTA_SET_USERDATA, HOST_ORDER);
        });
    }

    /// Puts netdevs in.
    pub fn add(self, t: &mut Transaction<'_>, step: Step, table: &str, netdevs: &[Ifindex]) {
        t.add(step, NFT_MSG_NEWSETELEM, CREATE, |m| self.elements(m, table, netdevs));
    }

    /// Takes netdevs out, which must be in.
    pub fn delete(self, t: &mut Transaction<'_>, step: Step, table: &str, netdevs: &[Ifindex]) {
        t.add(step, NFT_MSG_DELSETELEM, 0, |m| self.elements(m, table, netdevs));
    }

    fn elements(self, m: &mut Message<'_>, table: &str, netdevs: &[Ifindex]) {
        elements(m, table, self.name, netdevs.iter().map(|i| i.get().to_ne_bytes()));
    }

    /// The rest of a rule holds for packets whose ingress (`NFT_META_IIF`) or egress netdev
    /// (`NFT_META_OIF`) is in the set.
    pub fn if_in(self, m: &mut Message<'_>, netdev: u32) {
        expr::meta(m, netdev, expr::NFT_REG_1);
        expr::lookup(m, self.name, self.id);
    }

    /// The same for those that are not in it.
    pub fn unless_in(self, m: &mut Message<'_>, netdev: u32) {
        expr::meta(m, netdev, expr::NFT_REG_1);
        expr::lookup_not(m, self.name, self.id);
    }
}

/// Makes a table that belongs to the socket of the transaction ([`NFT_TABLE_F_OWNER`]).
pub fn make_owned(t: &mut Transaction<'_>, step: Step, table: &str) {
    t.add(step, NFT_MSG_NEWTABLE, CREATE | EXCL, |m| {
        m.str(NFTA_TABLE_NAME, table).be32(NFTA_TABLE_FLAGS, NFT_TABLE_F_OWNER);
    });
}

/// Deletes a table with all that is in it.
pub fn delete(t: &mut Transaction<'_>, step: Step, table: &str) {
    t.add(step, NFT_MSG_DELTABLE, 0, |m| {
        m.str(NFTA_TABLE_NAME, table);
    });
}

/// Makes a base chain of type `filter` in a hook, whose policy is to accept.
pub fn make_base_chain(
    t: &mut Transaction<'_>,
    step: Step,
    table: &str,
    chain: &str,
    (hook, priority): (u32, i32),
) {
    t.add(step, NFT_MSG_NEWCHAIN, CREATE | EXCL, |m| {
        m.str(NFTA_CHAIN_TABLE, table)
            .str(NFTA_CHAIN_NAME, chain)
            .str(NFTA_CHAIN_TYPE, "filter")
            .be32(NFTA_CHAIN_POLICY, NF_ACCEPT)
            .nested(NFTA_CHAIN_HOOK, |m| {
                m.be32(NFTA_HOOK_HOOKNUM, hook).be32(NFTA_HOOK_PRIORITY, priority.cast_unsigned());
            });
    });
}

/// Puts a rule at the end of a chain.
pub fn append_rule(
    t: &mut Transaction<'_>,
    step: Step,
    table: &str,
    chain: &str,
    fill: impl FnOnce(&mut Message<'_>),
) {
    t.add(step, NFT_MSG_NEWRULE, CREATE | APPEND, |m| {
        m.str(NFTA_RULE_TABLE, table).str(NFTA_RULE_CHAIN, chain);
        m.nested(NFTA_RULE_EXPRESSIONS, fill);
    });
}
