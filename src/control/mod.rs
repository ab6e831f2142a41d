//! The control protocol between the CLI and the daemon: what is said ([`info`], [`filter`]), by whom
//! ([`client`], [`server`]), and how it looks on the wire ([`wire`]).
//!
//! # Transport
//! `NETLINK_USERSOCK` datagrams of at most [`wire::MAX_DATAGRAM`] bytes, in one network namespace:
//! a daemon is found by the port id [`PORT_ID`], or, where somebody else has that, by the multicast group
//! [`wire::DAEMON_GROUP`], in which only privileged processes can be; and only from inside the namespace it
//! serves.
//!
//! # Framing
//! As generic netlink: `nlmsghdr`, `genlmsghdr` (command, version), nested attributes. A request is
//! one message in one datagram. The answer is an `NLMSG_ERROR` (errno 0: done, nothing to tell;
//! otherwise the errno and an `NLMSGERR_ATTR_MSG` text), or objects with `NLM_F_MULTI` closed by
//! `NLMSG_DONE`. After each datagram that does not close the answer, **the client asks for the
//! next** ([`wire::Command::Next`]): the daemon keeps no queue for a slow reader, and no datagram
//! goes to a port id whose owner has not just asked for it. So a client may take its time (a pager), and nothing more
//! is made for one that has gone.
//!
//! A request with an attribute that the daemon does not know is refused; of an answer, a client passes over those that
//! it does not know.
//!
//! # Connections
//! [`wire::Command::GetConns`] takes the attributes of a [`filter::ConnFilter`] and is answered by one
//! [`wire::Command::Conn`] for each connection that fits, as they are found, or by one
//! [`wire::Command::ConnCount`]. The daemon walks its table a piece at a time, holds no lock between two of them, and
//! keeps nothing of what it has told; only to sort, it keeps 32 bytes of each connection that fits, of no more
//! than twice the limit where there is one. Where nothing is found for some milliseconds it says
//! [`wire::Command::Searching`], and serves others meanwhile.
//!
//! # Trust
//! Any local user can send to any port id of this protocol, squat a free one, and multicast
//! (`NL_CFG_F_NONROOT_SEND` in `net/netlink/af_netlink.c`), but not join a group. So neither side believes `nlmsg_pid`
//! or the sender's port id: both look at the `SCM_CREDENTIALS` that the kernel attaches to each
//! datagram. See [`access`] for what the daemon allows whom. The client takes answers and events
//! from root only, or from the uid it was told ([`Target::daemon_uid`], [`Target::also_uid`]).

pub mod access;
mod attrs;
pub mod client;
pub mod error;
pub mod events;
pub mod filter;
pub mod info;
mod presence;
pub mod server;
mod socket;
#[cfg(test)]
mod tests;
pub mod wire;

pub use access::Access;
pub use client::{Client, Conns, Target};
pub use error::{ClientError, ControlError, ErrorKind, ServerError};
pub use events::{Notice, Publisher, Subscription};
pub use filter::ConnFilter;
pub use server::{ConnDump, ControlHandler, Found, Server, Waker};
pub use wire::PORT_ID;
