//! The offload-provider contract of ctoffload, and the backends that implement it.
//!
//! A **provider class** ([`ProviderClass`]) is a kind of backend, registered with an engine by
//! name. When a netdev is added to the engine as a port, the classes are asked in an order
//! ([`ProviderClass`] says which) whether they can serve *that* netdev; the first that accepts makes a **provider**
//! ([`Provider`]), which lives exactly as long as the port. The engine then hands the provider
//! [`Operation`]s: add this flow, delete that rule.
//!
//! | module | what it is |
//! |---|---|
//! | [`contract`] | the traits and values of the contract: start at [`contract::provider`] |
//! | [`ebpf`] | a BPF program and a table for each port: XDP, tcx |
//! | [`nf_flowtable`] | the kernel's flowtable of nf_tables, in software or in hardware |
//! | [`tc_flower`] | rules of the Linux TC flower classifier, in software or in NIC hardware |
//! | [`dummy`] | in memory, with capacity, latency and failures on demand |
//! | [`netlink`] | what the kernel backends share: messages, requests, batches, extended ACKs |
//!
//! This crate knows nothing of the engine: a vendor can implement a provider against it alone. Each
//! backend is a feature of its name (`tc-flower`, `nf-flowtable`, `ebpf`, `dummy`; all four by default), and
//! [`netlink`] one that the first three bring: with `default-features = false` the contract is all there
//! is, and nothing of netlink is built.
//!
//! Values of the contract own what they hold, and can be sent to and shared between threads; who
//! calls what, on which thread, is said in the [traits](contract::provider).
//!
//! # Unsafe code
//! In `bpf.rs` and below it, where `bpf(2)` is called: nothing but pointers handed to the kernel, descriptors taken from
//! it and one map that it shares, so that there is nothing for Miri to interpret; and one promise to them in
//! `ebpf/maps.rs`. Everywhere else it is denied.

#![deny(unsafe_code)]

#[cfg(feature = "netlink")]
#[allow(unsafe_code, reason = "calls bpf(2), and takes the descriptors that it returns")]
mod bpf;
pub mod contract;
#[cfg(feature = "dummy")]
pub mod dummy;
#[cfg(feature = "ebpf")]
pub mod ebpf;
#[cfg(feature = "netlink")]
pub mod netlink;
#[cfg(feature = "nf-flowtable")]
pub mod nf_flowtable;
#[cfg(feature = "tc-flower")]
pub mod tc_flower;

pub use contract::{
    class::{BindError, ProviderClass},
    flow::{Above, Flow, FlowMatch, Forward, MacRewrite, Tracked},
    operation::{Done, Operation, Outcome, Request, Ticket},
    provider::{Capability, Counters, Fault, Leftover, Observed, Provider, Repaired, RuleReport},
    reason::{Permanence, Reason, Rejection},
    types::{
        Cookie, Direction, Epoch, Generation, HwFlags, Ifindex, Instance, L4Proto, MacAddr, Netdev,
        RuleId, Tuple, VlanId, Zone,
    },
};
