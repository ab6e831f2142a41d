//! What the kernel backends share: bytes of messages ([`wire`]), a blocking socket that checks the
//! sender, the sequence and every error ([`socket`]), errors that keep the kernel's words
//! ([`error`]), what generic netlink tells of a netdev ([`generic`]), patience with modules that are being loaded ([`modules`]), what others have at the ingress
//! hooks of netdevs ([`front`]) and at egress ([`egress`]), and what they do there ([`tc`]); and the codecs of nf_tables and conntrack
//! ([`netfilter`]).
//!
//! Messages that are sent by the thousand are encoded here, in place; everything that is read or
//! written seldom goes through `netlink-packet-route` (in the engine's crate).

mod datagrams;
pub mod egress;
pub mod error;
pub mod front;
pub mod generic;
pub mod link;
pub mod modules;
pub mod netfilter;
pub mod socket;
pub mod tc;
pub mod wire;

pub use error::NetlinkError;
pub use socket::{Ack, Family, Socket};
pub use wire::{Attr, AttrIter, Message, MessageIter, Nested};
