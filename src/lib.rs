//! A per-netdev, lazy connection-offload engine for Linux.
//!
//! A connection is offloaded on the netdev that received its packet, and on no other; every other
//! netdev offloads it on its own time, when it first sees a packet of it. Each netdev is bound to
//! one offload provider for its whole life. Packet threads take no lock.
//!
//! Two programs are made of this crate: `ctoffloadd`, for which **the kernel** is the datapath
//! (`datapath`, `daemon`), and `ctoffload`, which inspects it (`control`, `cli`). The
//! [`engine`] is also a library for **userspace datapaths**, and this page is about that.
//!
//! # Features
//! | feature | what it brings |
//! |---|---|
//! | `programs` (default) | the two programs, and what they are made of: `datapath`, `control`, `daemon`, `cli`; with netlink, tokio and clap |
//!
//! Who links the engine takes it with `default-features = false`: [`engine`], and the contract
//! ([`providers`]), with neither netlink nor a runtime. Which backends come with it is said to
//! `netdev-providers`: its features are `tc-flower`, `nf-flowtable` and `dummy`.
//!
//! From C there is `libctoffload`: `src/capi/include/ctoffload.h`.
//!
//! # Words
//! A **port** is a netdev attached to the engine; ([`Ifindex`], [`Generation`]) identify it, because
//! the kernel reuses ifindexes. A **provider** is the offload backend of one port. A **connection** is
//! one conntrack entry: zone, original tuple, reply tuple. A **slot** is the offload state of
//! (connection, port, direction). A **worker** is a thread that sees packets.
//!
//! # A datapath in five steps
//! ```
//! use std::num::NonZeroU32;
//! use std::sync::Arc;
//!
//! use ctoffload::engine::clock::Clock;
//! use ctoffload::engine::conn::ConnKey;
//! use ctoffload::engine::datapath::{NoDatapath, Path, PathSpec};
//! use ctoffload::engine::{Engine, Limits, NewPort};
//! use netdev_providers::dummy::DummyClass;
//! use netdev_providers::{Direction, Forward, HwFlags, Ifindex, Tuple, Zone};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // 1. An engine, and the kinds of backend it may use, best first. (Draw the instance at random.)
//! let instance = NonZeroU32::MIN;
//! let engine = Engine::new(instance, Arc::new(NoDatapath), Limits::default(), Clock::default());
//! engine.register(Arc::new(DummyClass::new("dummy")))?;
//!
//! // 2. Ports. Each is bound, for its whole life, to the first class that accepts the netdev.
//! let (p1, p2) = (Ifindex::new(1).unwrap(), Ifindex::new(2).unwrap());
//! for (ifindex, name) in [(p1, "p1"), (p2, "p2")] {
//!     let hw_flags = HwFlags::Both;
//!     engine.port_add(NewPort { ifindex, name: name.into(), hw_flags, providers: None, capacity: None })?;
//! }
//!
//! // 3. One worker per packet thread.
//! let mut worker = engine.worker();
//!
//! // 4. A connection, made when the datapath makes its own. Keep the handle in that object.
//! let original: Tuple = "tcp 192.0.2.1:4242 > 198.51.100.2:80".parse()?;
//! let key = ConnKey { zone: Zone(0), original };
//! let conn = engine.conn_create(key, original.inverted(), 0).expect("room for it");
//!
//! // 5. Once per batch: a quiescent state, and the port. Then, for every packet, one atomic load;
//! //    and once in the life of a connection on this port, an offer.
//! worker.quiescent();
//! let port = worker.port(p1).expect("a port");
//! if !port.is_decided(&conn, Direction::Original) {
//!     let (vlan, macs, egress_decides) = (None, None, false);
//!     let forward = Forward { egress: p2, vlan, mtu: 1500, tuple: original, macs, egress_decides };
//!     let path = Path {
//!         eth_dst: None,
//!         vlan: None,
//!         ingress_mtu: 1500,
//!         forward,
//!         next_hop: None,
//!         iif: None,
//!         oif: None,
//!         answer: 0,
//!     };
//!     let _ = port.conn_add(&conn, Direction::Original, PathSpec::Known(Box::new(path)));
//! }
//! assert!(port.is_decided(&conn, Direction::Original));
//!
//! // The end of the connection, and of everything. (Before it blocks, a worker goes offline: then
//! // nobody waits for it.)
//! worker.offline();
//! engine.conn_del(&conn);
//! engine.close();
//! # Ok(())
//! # }
//! ```
//! `examples/pmd_switch` is a whole userspace switch that does this with real packets.
//!
//! * [`PortRef::is_bound`](engine::worker::PortRef::is_bound) comes before a path is looked for: a port
//!   without a provider takes none.
//! * The undecided ones among a batch of packets are offered by
//!   [`PortRef::offer_batch`](engine::worker::PortRef::offer_batch), which wakes the port's thread once.
//! * A port that is no netdev of the kernel's (DPDK, vhost-user) is named by a
//!   [local](netdev_providers::Ifindex::local) number.
//! * A datapath whose rules keep track of connections, and leave it to others where packets go (`rte_flow`'s
//!   conntrack), offers [`PathSpec::Track`](engine::datapath::PathSpec::Track).
//!
//! # What the engine promises
//! * **Only where it was seen.** An offer goes to the port that received the packet; no other port
//!   does any work for the connection.
//! * **Once.** Two workers that see the same packet make one rule: one atomic claim per slot.
//! * **Never a drop.** Whatever fails, packets take the slow path. Every refusal has a
//!   [`Reason`], counted per port and kept per slot. Transient ones are offered again, after a pause
//!   that doubles; permanent ones are not.
//! * **Bounded ends.** [`Engine::port_del`](engine::Engine::port_del) waits until every worker that
//!   is online has passed a quiescent state, and no longer than it is told to; it flushes that port,
//!   and the rules of others that lead into it.
//! * **No mix-up.** Generations and epochs are never used twice: what completes late is recognised
//!   and uninstalled.
//! * **Contained.** A provider that panics, or does not answer, makes its port faulty; others go on.
//!
//! # What the packet path costs
//! [`PortRef::is_decided`](engine::worker::PortRef::is_decided) is one atomic load of a word in the
//! connection's own memory: no lock, no write, no allocation, no system call. `scripts/bench engine`
//! measures it, beside one mutex and one rwlock over a list of providers.
//!
//! [`Ifindex`]: netdev_providers::Ifindex
//! [`Generation`]: netdev_providers::Generation
//! [`Reason`]: netdev_providers::Reason

#![deny(unsafe_code)] // but for a hint to the processor, in `engine`

pub use netdev_providers as providers;

// `ctoffload_only`: what `scripts/mutants` builds hundreds of times is one part, with what it stands on.
#[cfg(all(feature = "programs", not(any(ctoffload_loom, ctoffload_only))))]
pub mod cli;
#[cfg(feature = "programs")]
#[cfg(not(any(ctoffload_loom, ctoffload_only = "engine", ctoffload_only = "datapath")))]
pub mod control;
#[cfg(all(feature = "programs", not(any(ctoffload_loom, ctoffload_only))))]
pub mod daemon;
#[cfg(feature = "programs")]
#[cfg(not(any(ctoffload_loom, ctoffload_only = "engine", ctoffload_only = "control")))]
pub mod datapath;
#[cfg(not(ctoffload_only = "control"))]
pub mod engine;
#[cfg(feature = "programs")]
#[cfg(not(any(ctoffload_loom, ctoffload_only = "engine", ctoffload_only = "control")))]
mod one_line;
