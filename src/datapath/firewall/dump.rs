//! The ruleset of nf_tables, read whole: chains, sets, rules in their order, and the elements of verdict maps.

use netdev_providers::netlink::netfilter::NFGENMSG_LEN;
use netdev_providers::netlink::netfilter::nft::{
    NFT_MSG_GETSET, NFT_MSG_GETSETELEM, NFTA_SET_NAME, NFTA_SET_TABLE, get_of,
};
use netdev_providers::netlink::socket::DUMP;
use netdev_providers::netlink::wire::Received;
use netdev_providers::netlink::{NetlinkError, Socket};

// enum nf_tables_msg_types
const NFT_MSG_GETCHAIN: u16 = 4;
const NFT_MSG_GETRULE: u16 = 7;
// enum nft_set_elem_list_attributes
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
// enum nft_set_attributes, nft_data_types
const NFTA_SET_DATA_TYPE: u16 = 6;
const NFT_DATA_VERDICT: u32 = 0xffff_ff00;
/// How often a part that a change interrupted is read again.
const TRIES: u32 = 20;

/// Who takes what is read.
pub(crate) trait Reader {
    /// A part begins, perhaps again: what was read of it is not all, or not as it is.
    fn begin(&mut self, part: Part<'_>);
    /// A message of it.
    fn message(&mut self, m: &Received<'_>);
    /// What was read of it last may not be as it is: a change interrupted it each time, or the kernel refused.
    fn failed(&mut self, error: NetlinkError);
}

/// What is read at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part<'a> {
    /// All chains.
    Chains,
    /// All sets.
    Sets,
    /// All rules.
    Rules,
    /// The elements of a verdict map, by family, table and name.
    Elements(u8, &'a str, &'a str),
}

impl Part<'_> {
    const fn request(self) -> (u8, u16) {
        match self {
            Self::Chains => (0, NFT_MSG_GETCHAIN),
            Self::Sets => (0, NFT_MSG_GETSET),
            Self::Rules => (0, NFT_MSG_GETRULE),
            Self::Elements(family, ..) => (family, NFT_MSG_GETSETELEM),
        }
    }
}

/// Reads all tables but those that `skipped` says.
pub(crate) fn read(socket: &mut Socket, skipped: impl Fn(&str) -> bool, to: &mut impl Reader) {
    let mut maps = Vec::new();
    part(socket, &skipped, Part::Chains, to, |_| {});
    part(socket, &skipped, Part::Sets, to, |m| {
        let attrs = m.attrs(NFGENMSG_LEN);
        let text = |ty| Some(attrs.find_type(ty)?.str()?.to_owned());
        let data = attrs.find_type(NFTA_SET_DATA_TYPE).and_then(|a| a.be32());
        if data == Some(NFT_DATA_VERDICT)
            && let (Some(&family), Some(table), Some(name)) =
                (m.payload.first(), text(NFTA_SET_TABLE), text(NFTA_SET_NAME))
        {
            maps.push((family, table, name));
        }
    });
    part(socket, &skipped, Part::Rules, to, |_| {});
    maps.sort();
    maps.dedup();
    for (family, table, set) in &maps {
        part(socket, &skipped, Part::Elements(*family, table, set), to, |_| {});
    }
}

fn part(
    socket: &mut Socket,
    skipped: &impl Fn(&str) -> bool,
    part: Part<'_>,
    to: &mut impl Reader,
    mut also: impl FnMut(&Received<'_>),
) {
    let (family, get) = part.request();
    for tried in 1.. {
        to.begin(part);
        let seq = socket.next_seq();
        let buf = get_of(family, get, DUMP, seq, |m| {
            if let Part::Elements(_, table, set) = part {
                m.str(NFTA_SET_ELEM_LIST_TABLE, table).str(NFTA_SET_ELEM_LIST_SET, set);
            }
        });
        let done = socket.dump(&buf, seq, |m| {
            // Chains, sets, rules and elements name their table in the same attribute.
            let table = m.attrs(NFGENMSG_LEN).find_type(NFTA_SET_TABLE).and_then(|a| a.str());
            if !table.is_some_and(skipped) {
                also(&m);
                to.message(&m);
            }
        });
        match done {
            Ok(()) => return,
            Err(NetlinkError::Interrupted) if tried < TRIES => {}
            Err(e) => return to.failed(e),
        }
    }
}
