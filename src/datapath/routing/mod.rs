//! What the kernel datapath knows of links, routes and neighbours, through rtnetlink.
//!
//! * [`links`]: the netdevs, kept up to date by the monitor;
//! * [`fdb`]: what bridges have learnt, likewise;
//! * [`stack`]: from a netdev that routes down to the real one, and its tag;
//! * [`monitor`]: the events (`rtnetlink`, on a thread of its own), `nexthops` among them;
//! * [`bridged`]: where a bridge sends the frames of one direction;
//! * [`path`]: where the packets of one direction go, asked of the kernel for each.

pub mod bridged;
pub mod fdb;
pub mod links;
pub mod monitor;
mod nexthops;
pub mod path;
pub mod stack;
