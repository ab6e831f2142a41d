//! A BPF program for each port and a table of its own: in software the fastest path that Linux has, and no more of
//! the kernel than BPF.
//!
//! ```text
//!   driver ─ XDP ────────────┐                     a frame, before there is an skb
//!     skb ─ tcx ─────────────┤                     behind the programs that are there
//!           filters ─ cls_bpf┤                     before Linux 6.6, and behind filters of others
//!                            ├─ guards ─ tuple, tag ─ hash map ─ rewrite ─ redirect
//!           the stack  ◄─────┘ what is not found, does not fit, cannot be sent
//! ```
//! Both forms of the program are one file of C, `bpf/flows.bpf.c`: what it looks at and what it does is said there.
//!
//! # Which place
//! What a netdev can have best is found out by trial when it is bound: **native XDP** where it belongs to a NIC; **tcx**
//! where it is a veth, a tap, or a device of a hypervisor, whose other end sends large packets in one piece as long as
//! there is no XDP program; a filter of **cls_bpf** where the kernel has no tcx, or where others have filters, which would
//! be behind it. Generic XDP is never used. One of the modes can be asked for ([`EbpfConfig::mode`]).
//!
//! # Beside other tools
//! A netdev takes one XDP program: where there is one of somebody else's, it stays, and ours is put behind it. So are
//! programs of tcx. What is **behind** our program would not see the packets that it forwards: while programs or filters
//! of others are there, nothing is offloaded ([`Reason::OthersInFront`](crate::Reason::OthersInFront)), and the table
//! is empty.
//!
//! # Failure means the stack
//! No drop is in the program. A netdev to redirect to is looked up in a map that the kernel takes netdevs out of when they
//! go; what cannot be written (memory, no room for a tag) is found out before anything has been written.
//!
//! # What to know before relying on it
//! * **XDP and VLAN tags.** XDP sees a tag only if it is in the frame: with `rxvlan` on, XDP is not used. On veth, where
//!   it has to be asked for, `txvlan` of the other end has to be off too.
//! * **XDP on veth** loses what the skb knew: the other end must compute its checksums (`tx off`).
//! * **XDP sends to netdevs that can**: the kernel tells from 6.3 on; before, to those that have a native XDP program
//!   themselves. Others are refused ([`Reason::EgressUnsupported`](crate::Reason::EgressUnsupported)).
//! * **A netdev to redirect to that is down** drops, as with rules of tc-flower: whoever adds rules must delete them when
//!   it goes down.
//! * **Priority tags** (VLAN 0) go up the stack.
//! * **In XDP there is no `skb->priority`**, and neither qdisc nor filter at egress: flows whose packets have to meet some
//!   there are refused ([`Forward::egress_decides`](crate::Forward::egress_decides)).
//! * **A wrong L4 checksum** is looked for nowhere, and stays wrong.
//!
//! # Restart
//! Maps and link are pinned in bpffs ([`EbpfConfig::pins`]), so that rules go on forwarding when their engine has died. Who binds
//! the netdev again takes them over where the netdev's program is one that uses these maps, and puts its own program in
//! the place of that one at once, whatever version it was; what has another layout is removed. Without a bpffs rules
//! end with the process (but for a filter, which then forwards until the netdev is bound again).
//!
//! # How the code is cut
//! `bpf/` the program, `entry` keys and values, `maps` the kernel's tables, `table` ours, `object` how the program is
//! loaded, `pins` what outlives the process, `choose` where a netdev is to have its program, `place` how it is put
//! there, with `clsact` for filters, `shared` what all threads see, `writer` a batch from its operations to its results,
//! `provider`, `class`.

mod choose;
mod class;
mod clsact;
mod entry;
mod maps;
mod object;
mod pins;
mod place;
mod provider;
mod shared;
mod table;
mod writer;

pub use class::{EbpfClass, EbpfConfig, Mode};
