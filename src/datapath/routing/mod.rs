//! What the kernel datapath knows of links, routes and neighbours, through rtnetlink.
//!
//! * [`links`]: the netdevs, kept up to date by the monitor;
//! * [`fdb`]: what bridges have learnt, likewise;
//! * [`stack`]: from a netdev that routes down to the real one, and its tag;
//! * `tolerant`: the socket that they come by, which leaves out what a codec cannot read;
//! * [`switches`]: which netdevs' packets are forwarded, likewise;
//! * [`tos`], [`marks`]: what else rules tell packets apart by, [`masked`]: where they do it by some bits,
//!   `dump`: how they are asked for;
//! * [`ipsec`]: the policies of IPsec;
//! * [`monitor`]: the events (`rtnetlink`, on a thread of its own), `nexthops` among them;
//! * [`bridged`]: where a bridge sends the frames of one direction;
//! * `neighbour`: MAC addresses of neighbours, and which of them are told that they are in use;
//! * [`path`]: where the packets of one direction go, asked of the kernel for each; [`towards`]: the same for people;
//! * [`answers`]: what it has answered, for as long as nothing changes.

pub mod answers;
pub mod bridged;
mod dump;
pub mod egress;
mod events;
pub mod fdb;
pub mod ipsec;
pub mod links;
pub mod marks;
pub mod masked;
pub mod monitor;
mod neighbour;
mod nexthops;
pub mod path;
pub mod stack;
pub mod switches;
mod tolerant;
pub mod tos;
pub mod towards;
