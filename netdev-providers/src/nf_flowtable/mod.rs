//! The kernel's flowtable (`nf_flow_table`): packets of a connection go from the ingress hook of one
//! netdev to the next, past conntrack, routing and the firewall; in hardware where the driver takes
//! the table.
//!
//! ```text
//! table inet ctoffload_flow {                    # owned by our socket: gone when it closes
//!   flowtable f0 { hook ingress priority 1000; devices = { <ports> }; counter; }
//!   set ports  { type iface_index; }              # and the netdevs above them that route
//!   set orig4  { iif . oif . l4proto . zone . ports . addresses; }   # and reply4, orig6, reply6
//!   chain select { type filter hook forward priority 1000; policy accept;
//!     iif != @ports accept
//!     ct direction original  oif != @ports  <iif . oif . ct original ...> @orig4  goto offload
//!     ct direction original  <iif . oif . ...> @orig4  <oif . iif . ...> @reply4  goto offload
//!     ...                                        # the same for replies, and for IPv6
//!   }
//!   chain offload { flow add @f0; }
//! }
//! ```
//! What is a rule to the engine is an **element** here, of the set of its direction: "the port with
//! this ifindex has seen this direction of this connection, leaving by that netdev". Only the
//! provider writes the sets; it knows nothing but its own port.
//!
//! # Which netdev is offloaded, and when
//! A flowtable is coarser than a rule of tc. `flow add` makes **one** entry with both directions, each
//! keyed by its ingress netdev; a connection can be in one flowtable at a time (`IPS_OFFLOAD` is
//! tested and set), and a packet is looked up on the netdevs of that flowtable only. So all ports that
//! use this class share one flowtable, and an entry serves both of the connection's netdevs at once.
//! That a netdev offloads only what it has seen is kept by **the condition of the rule**: a packet that
//! goes from port A to
//! * a netdev that is no port of this class (of another provider, or of none) makes the entry as soon
//!   as A has its element: the entry's other direction is never looked up there;
//! * a port B of this class makes the entry once B has its element for the other direction too, and
//!   leads back to A. Until then both stay on the slow path.
//!
//! **From Linux 7.2 on** the kernel makes an entry only where both netdevs are in the flowtable
//! (`nft_dev_forward_path`). To put the other one in would offload what it has not seen, on a netdev of
//! another provider. So the first of the two is refused there
//! ([`EgressUnsupported`](crate::contract::reason::Reason::EgressUnsupported)), and offered again when that
//! netdev becomes a port of this class. The kernel is told by its version, since nothing else tells.
//!
//! The element names the egress, so an entry is never made for a path that no port has sighted. Where
//! the two directions take different netdevs of this class the rule holds for neither, and the
//! connection stays on the slow path: the kernel's entry would bend one direction to the other's path.
//!
//! # Netdevs above a port
//! A VLAN device or a bridge that routes is what the forward hook sees, so it is what an element
//! names, and it stands in the set of ports beside the port below it. The kernel finds the port by
//! itself when it makes the entry (`dev_fill_forward_path`), with the tag. It does not look below a
//! bond: a connection that is routed on a bond above the port is refused. So is one that leaves by a
//! bridge which has ports of this class and others, to one of the others.
//!
//! # How a deletion takes effect
//! The kernel lets nobody delete an entry. It ends by itself when its connection ends (FIN or RST before
//! 6.14, or an entry of conntrack that dies), when its route is replaced, when a netdev of it goes down, or after
//! `nf_flowtable_tcp_timeout` or `_udp_timeout` (30 s) without a packet. A delete removes the element,
//! and then looks (`IPS_OFFLOAD`) whether the entry has ended. If it has not, and the connection is not
//! closing anyway, the flowtable is **renewed**: one transaction puts a new one in the place of the
//! old, and all entries end with that. The other connections' elements still stand, so that each is
//! back after one packet on the slow path (a driver that takes one flowtable at a time sees the old
//! one go first). Deletes of one batch share a renewal. So does a port
//! that is added: entries of before would serve it at once. A delete whose
//! evaluation overlaps with a packet on another processor is caught by the next usage sweep.
//!
//! # What can be read back
//! That an element is in is acknowledged by the kernel. Whether its connection is in the flowtable is
//! `IPS_OFFLOAD`, and whether hardware has it `IPS_HW_OFFLOAD`: read by every sweep, with the counters.
//! Those are conntrack's (`net.netfilter.nf_conntrack_acct`, which is switched on while a port is
//! bound, unless it is configured otherwise): of connections that began before there are none.
//! While an entry lives the kernel keeps the timeouts of conntrack up by itself.
//!
//! # What to know
//! * **FIN and RST** take the slow path before Linux 6.14, and end the entry. From then on they go through
//!   the flowtable, and conntrack hears nothing of them: the entry ends after its timeout without a packet,
//!   conntrack then has the connection as closed (`nf_conntrack_tcp_timeout_close`, 10 s), and its element
//!   goes with it.
//! * **Names.** From 6.16 on a flowtable is about the names of netdevs: one that is renamed leaves it. The
//!   flowtable is renewed when that is found, at the latest by the next sweep.
//! * **Packets too long** for the path, fragments, options and TTL 1 take the slow path: told apart by the
//!   kernel, so no MTU is refused.
//! * **MAC addresses** are the neighbour's at the time of each packet, in software. The destination
//!   address on arrival is not looked at: a frame that was flooded to a port is forwarded.
//! * **`flush ruleset`** passes the table over, as it does every table that has an owner; so no other
//!   process can remove or change it.
//! * **Hardware.** The `offload` flag holds for a flowtable with all its netdevs: it is on while every
//!   port wants it and its driver takes it, and off from the first that does not. A port asked to be
//!   in hardware only is declined: a flowtable forwards in software whatever hardware has not, as
//!   when its table is full. **A NIC that was reset** loses no packet either, but is not noticed: the
//!   kernel offers the entry again with every refresh, a driver that has it in its book refuses, and
//!   `IPS_HW_OFFLOAD` stands. A new flowtable brings hardware back: a flush of the port, say.
//!
//! # How the code is cut
//! `key` elements, `table` the table and its transactions, `readback` conntrack, `shared` what the ports have
//! in common, `provider`, `class`.

mod class;
mod key;
mod provider;
mod readback;
mod shared;
mod table;

pub use class::NfFlowtableClass;
pub use shared::NfFlowtableConfig;

#[cfg(test)]
mod tests;
