//! Rules of the Linux TC flower classifier on a netdev's ingress: in NIC hardware where the NIC takes
//! them, in the kernel's software classifier where it does not.
//!
//! ```text
//! ingress qdisc of the port, or the ingress of its clsact, chain 0
//!   other people's filters                        (lower prios: asked first)
//!   prio base-1 802.1q        bpf, skip_hw        priority tag (VLAN 0): taken off, goes on
//!   prio base+0 ip, +1 ipv6   flower, skip_sw     TTL 0 and 1: pass       (hardware ports)
//!   prio base+2 ip, +3 ipv6   bpf, skip_hw        TTL, options, ...: pass (software ports)
//!   prio base+4 ip, +5 ipv6   flower              one rule per flow
//!   prio base+6 to +11        802.1q              the same three for tagged frames
//! ```
//! A flow's rule matches the exact tuple, unfragmented, and of TCP only segments with ACK and without SYN,
//! FIN and RST; it takes the VLAN tag off, rewrites MAC addresses, addresses and ports, takes one off the TTL,
//! puts a VLAN tag on and redirects to the egress netdev. Everything else goes up the stack as if there were no rules.
//!
//! A port that is bound again after its engine died finds the old rules where it would put its own:
//! they go on forwarding until they are taken over or removed, and the guards never fall.
//!
//! # Beside other tools
//! The ingress qdisc that is there is used; where there is none, an `ingress` is made, which shapers can
//! replace by theirs ([`QdiscKind`]). What we did not make, or somebody else has filters at, stays at the
//! end. When the qdisc is removed under the rules, they are gone; a moment later, for whoever removed it
//! may be about to make another, the guards are put up in what is there then. Who is **in front** (filters
//! with smaller prios, XDP, tcx) is told; rules in the NIC would be in front of them, so while somebody is whom the
//! NIC has not, they are in software, or are refused ([`Reason::OthersInFront`](crate::Reason::OthersInFront)).
//!
//! # What to know before relying on it
//! * **Length.** Flower has no key for it: flows whose path has a smaller MTU than the port have a
//!   `police` in front, in software only (`skip_hw`), which lets packets that are too long go up the
//!   stack. Without act_police, and on a port for hardware only, they are refused
//!   ([`Reason::MtuMismatch`](crate::Reason::MtuMismatch)).
//! * **VLAN.** One 802.1Q tag is matched, taken off, put on; a frame with two is none of ours. What
//!   arrives tagged with any priority leaves with priority 0.
//! * **Priority tags** (VLAN 0) are taken off in software, as the stack does a moment later, so that rules for
//!   untagged frames match: of frames for the netdev's own address. A NIC does not match them.
//! * **Options and extension headers, wrong header checksums and lengths** are told apart by the guards, in
//!   software only: the stack gets what it would drop, cut, answer, or call invalid. What a NIC does with
//!   them is its own affair: see `guard.rs`. A wrong L4 checksum is looked for nowhere, and stays wrong in
//!   software; a NIC that computes it anew (NAT) makes it right.
//! * **A NIC that says no.** On a port for hardware and software a rule that the NIC refuses is in
//!   software only, and reads back `not_in_hw`; what the driver said is kept with the rule, and for the
//!   port (rules that stand in both ask for it, `verbose`). On a port for hardware only it is refused, in these words.
//! * **TTL.** A port is used for hardware only if the NIC takes the guard for TTL 0 and 1.
//! * **NAT, and routed IPv4.** A rule is either for hardware (`skip_sw`, the NIC computes checksums) or for
//!   software (`skip_hw`, BPF programs keep them right, and set `skb->priority` from the ToS as
//!   `ip_forward` does: see `bpf.rs`); on a port with hardware the former is tried first. Without act_bpf
//!   there is none in software ([`Reason::NatChecksum`](crate::Reason::NatChecksum),
//!   [`Reason::Unsupported`](crate::Reason::Unsupported)), and without cls_bpf and bpf() no guard.
//! * **The last data of a TCP connection** often stands in a segment with FIN and goes the slow way:
//!   conntrack must let it pass (TCP liberal), although it has not seen what came before.
//! * **A device below a `redirect`** that is down drops: whoever adds rules must delete them when the
//!   egress netdev goes down.
//! * Packets with `CHECKSUM_COMPLETE` over IPv6 leave with the sum of the old hop limit, as with any
//!   `pedit` of it: a virtual receiver computes it again (and the kernel may log "hw csum failure").
//!
//! # How the code is cut
//! `uapi` numbers of the kernel headers, `prios` where rules stand, `encode` match keys, `actions`,
//! `bpf` the programs, `guard`, `rule` whole messages, `template` the same without encoding
//! them anew, `parse` dumps, `same` whether a dumped rule is what we would write, `hook` requests on one
//! netdev, `probe` what bind does, `occupants` what it finds there, `found` and `capability` what it finds
//! out, `plan` what that means for a flow, `handles`, `writer` a batch from the queue to its results, `lane`
//! one of the sockets that it goes through, `upkeep` what concerns all rules of a port, `watch` what others
//! do meanwhile, `beside` what becomes of the port then, `provider`, `class`.

mod actions;
mod beside;
mod bpf;
mod capability;
mod class;
mod encode;
mod found;
mod guard;
mod handles;
mod hook;
mod lane;
mod occupants;
mod parse;
mod plan;
mod prios;
mod probe;
mod provider;
mod rule;
mod same;
mod template;
mod threads;
mod uapi;
mod upkeep;
mod watch;
mod writer;

pub use class::{QdiscKind, TcFlowerClass, TcFlowerConfig};

#[cfg(test)]
mod tests;
