//! What the kernel datapath speaks with netfilter, all by netlink and never by running a tool.
//!
//! | module | what it is |
//! |---|---|
//! | [`ledger`] | the nf_tables table whose rule sights each (netdev, connection, direction) once |
//! | [`nflog`] | reads the packets that the rule logs: the sights |
//! | [`hooks`] | who else stands in a hook, and in which order |
//! | [`conntrack`] | connections: their end (events), what they are (get, dump), and their refresh |
//!
//! Order at start: [`nflog::SightLog::open`] **before** [`ledger::Ledger::install`], because a
//! sight that is logged while nobody is bound to the group stands in the ledger and is logged to
//! nobody (the ledger's dump finds it again). [`conntrack::CtEvents`] before both: the kernel
//! reports events only of entries that were created while somebody listened
//! (`net.netfilter.nf_conntrack_events` = 2).
//!
//! Every socket serves the network namespace of the thread that opened it, and blocks: each wants
//! a thread of its own. The codecs of nf_tables and of conntrack's entries are in
//! [`netdev_providers::netlink::netfilter`]: a provider speaks with both as well.

pub mod conntrack;
pub mod hooks;
pub mod ledger;
pub mod nflog;

/// Bytes of a hex text, for the messages captured from real kernels.
#[cfg(test)]
fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}
