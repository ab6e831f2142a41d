//! The netfilter family: what nf_tables, conntrack and the packet log have in common, and the codecs
//! of the first two.
//!
//! | module | what it is |
//! |---|---|
//! | [`nft`] | nf_tables: transactions, expressions of rules, elements of sets |
//! | [`conntrack`] | entries of conntrack |
//! | [`heard`] | which of them a socket is told of |

pub mod conntrack;
pub mod heard;
pub mod nft;

/// Size of `struct nfgenmsg` (`linux/netfilter/nfnetlink.h`): family, version, resource id.
pub const NFGENMSG_LEN: usize = 4;
/// `NFNL_SUBSYS_CTNETLINK`.
pub const SUBSYS_CTNETLINK: u16 = 1;
/// `NFNL_SUBSYS_ULOG`.
pub const SUBSYS_ULOG: u16 = 4;
/// `NFNL_SUBSYS_NFTABLES`.
pub const SUBSYS_NFTABLES: u16 = 10;
/// `NFNL_SUBSYS_HOOK`, since 5.14.
pub const SUBSYS_HOOK: u16 = 12;

/// `nlmsg_type` of a message of a subsystem.
#[must_use]
pub const fn msg_type(subsys: u16, msg: u16) -> u16 {
    subsys << 8 | msg
}

/// `struct nfgenmsg`, version `NFNETLINK_V0`; the resource id is in network order.
#[must_use]
pub const fn nfgenmsg(family: u8, res_id: u16) -> [u8; NFGENMSG_LEN] {
    let id = res_id.to_be_bytes();
    [family, 0, id[0], id[1]]
}

/// Bytes of a hex text, for the messages captured from real kernels.
#[cfg(test)]
fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}
