//! Elements of sets.

use super::expr::counted;
use super::{NFTA_DATA_VALUE, NFTA_LIST_ELEM};
use crate::netlink::netfilter::NFGENMSG_LEN;
use crate::netlink::wire::{Attr, Message, Received};

// enum nft_set_elem_list_attributes, nft_set_elem_attributes
/// `NFTA_SET_ELEM_LIST_TABLE`.
pub const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
/// `NFTA_SET_ELEM_LIST_SET`.
pub const NFTA_SET_ELEM_LIST_SET: u16 = 2;
/// `NFTA_SET_ELEM_LIST_ELEMENTS`.
pub const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_EXPRESSIONS: u16 = 11;

/// The attributes of a message about elements of a set.
pub fn elements<K: AsRef<[u8]>>(
    m: &mut Message<'_>,
    table: &str,
    set: &str,
    keys: impl Iterator<Item = K>,
) {
    m.str(NFTA_SET_ELEM_LIST_TABLE, table).str(NFTA_SET_ELEM_LIST_SET, set);
    m.nested(NFTA_SET_ELEM_LIST_ELEMENTS, |m| {
        for key in keys {
            m.nested(NFTA_LIST_ELEM, |m| {
                m.nested(NFTA_SET_ELEM_KEY, |m| {
                    m.attr(NFTA_DATA_VALUE, key.as_ref());
                });
            });
        }
    });
}

/// The elements in one message of a set's dump.
fn dumped<'a>(m: &Received<'a>) -> impl Iterator<Item = Attr<'a>> + use<'a> {
    m.attrs(NFGENMSG_LEN)
        .filter(|a| a.ty == NFTA_SET_ELEM_LIST_ELEMENTS)
        .flat_map(|list| list.nested().filter(|a| a.ty == NFTA_LIST_ELEM))
}

fn key_of<'a>(element: &Attr<'a>) -> Option<&'a [u8]> {
    let key = element.nested().find_type(NFTA_SET_ELEM_KEY)?;
    Some(key.nested().find_type(NFTA_DATA_VALUE)?.payload)
}

/// The keys in one message of a set's dump.
pub fn element_keys<'a>(m: &Received<'a>) -> impl Iterator<Item = &'a [u8]> + use<'a> {
    dumped(m).filter_map(|e| key_of(&e))
}

/// The same, with the packets that a `counter` among several expressions of the element counted.
pub fn element_packets<'a>(m: &Received<'a>) -> impl Iterator<Item = (&'a [u8], u64)> + use<'a> {
    dumped(m).filter_map(|e| {
        let expressions = e.nested().find_type(NFTA_SET_ELEM_EXPRESSIONS)?;
        Some((key_of(&e)?, expressions.nested().find_map(|x| counted(&x))?))
    })
}
