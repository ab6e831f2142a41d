//! What the kernel datapath knows of links, routes and neighbours, through rtnetlink.
//!
//! * [`links`]: the netdevs, kept up to date by the monitor;
//! * [`monitor`]: the events (`rtnetlink`, on a thread of its own);
//! * [`path`]: where the packets of one direction go, asked of the kernel for each.

pub mod links;
pub mod monitor;
pub mod path;
