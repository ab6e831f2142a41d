//! What the kernel datapath speaks with netfilter, all by netlink and never by running a tool.
//!
//! | module | what it is |
//! |---|---|
//! | [`ledger`] | the nf_tables table whose rule sights each (netdev, connection, direction) once |
//! | [`nflog`] | reads the packets that the rule logs: the sights |
//! | [`conntrack`] | connections: their end (events), what they are (get, dump), and their refresh |
//!
//! Order at start: [`nflog::SightLog::open`] **before** [`ledger::Ledger::install`], because a
//! sight that is logged while nobody is bound to the group stands in the ledger and is logged to
//! nobody (the ledger's dump finds it again). [`conntrack::CtEvents`] before both: the kernel
//! reports events only of entries that were created while somebody listened
//! (`net.netfilter.nf_conntrack_events` = 2).
//!
//! Every socket serves the network namespace of the thread that opened it, and blocks: each wants
//! a thread of its own.

pub mod conntrack;
pub mod ledger;
pub mod nflog;
mod nft;

/// `struct nfgenmsg` (`linux/netfilter/nfnetlink.h`): family, version, resource id.
const NFGENMSG_LEN: usize = 4;
/// `NFNL_SUBSYS_CTNETLINK`.
const SUBSYS_CTNETLINK: u16 = 1;
/// `NFNL_SUBSYS_ULOG`.
const SUBSYS_ULOG: u16 = 4;
/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYS_NFTABLES: u16 = 10;

/// `nlmsg_type` of a message of a subsystem.
const fn msg_type(subsys: u16, msg: u16) -> u16 {
    subsys << 8 | msg
}

/// `struct nfgenmsg`, version `NFNETLINK_V0`; the resource id is in network order.
const fn nfgenmsg(family: u8, res_id: u16) -> [u8; NFGENMSG_LEN] {
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
