//! The same packets with another backend: what a rule does to them is the contract's, and not flower's.

use std::num::NonZeroU32;
use std::sync::Arc;

use netdev_providers::ebpf::{EbpfClass, EbpfConfig, Mode};
use netdev_providers::{HwFlags, Instance, Provider, ProviderClass};

use crate::host::Host;
use crate::netns::NetNs;
use crate::release::is_at_least;
use crate::submit::netdev;

/// Whose rules the router has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    Flower,
    /// A BPF program at tcx, where the kernel has it.
    Tcx,
    /// The same behind a filter of somebody else.
    Clsact,
    Xdp,
}

impl Backend {
    pub(crate) fn class(self) -> EbpfClass {
        let mode = match self {
            Self::Xdp => Some(Mode::Xdp),
            _ => None,
        };
        // In no bpffs: nothing is to outlive a test.
        EbpfClass::new(EbpfConfig { mode, pins: "/tmp/none".into(), ..EbpfConfig::default() })
    }

    /// What such a port says of itself.
    pub(crate) fn place(self) -> &'static str {
        match self {
            Self::Flower => "rules",
            Self::Tcx if has_tcx() => "BPF, tcx",
            Self::Tcx | Self::Clsact => "BPF, cls_bpf",
            Self::Xdp => "BPF, native XDP",
        }
    }

    /// What there has to be before such a port is bound.
    pub(super) fn prepare(self, ns: &NetNs, client: &Host, server: &Host) {
        match self {
            Self::Flower | Self::Tcx => {}
            Self::Clsact => {
                // "No match", in classic BPF.
                ns.run("tc qdisc add dev lan0 clsact");
                ns.run("tc qdisc add dev wan0 clsact");
                for dev in ["lan0", "wan0"] {
                    ns.run(&format!(
                        "tc filter add dev {dev} ingress prio 1 bpf bytecode '1,6 0 0 0'"
                    ));
                }
            }
            Self::Xdp => {
                // A veth gives a program of XDP what a wire would bring: tags in the frame, checksums.
                ns.run("ethtool -K lan0 rxvlan off && ethtool -K wan0 rxvlan off");
                for (host, dev) in [(client, "c0"), (server, "s0")] {
                    host.sh(&format!("ethtool -K {dev} txvlan off tx off rxvlan off"));
                    // And is sent to by XDP when it has a program itself.
                    host.call(move || pass_all(dev));
                }
            }
        }
    }
}

fn has_tcx() -> bool {
    is_at_least((6, 6))
}

/// The kernel tells which netdevs XDP can send to. Where it does not, they have to have a program themselves.
pub(crate) fn tells_what_xdp_sends_to() -> bool {
    is_at_least((6, 3))
}

/// Ours with an empty table.
fn pass_all(dev: &str) {
    let instance = Instance(NonZeroU32::MIN);
    let provider: Arc<dyn Provider> =
        Backend::Xdp.class().bind(&netdev(dev, HwFlags::Both), instance).expect("XDP");
    // As long as the netdev.
    std::mem::forget(provider);
}

/// Tests of what is to be the same with every backend: one of each.
macro_rules! scenarios {
    (all: $($name:ident),* $(,)?) => {
        scenarios! { @skb $($name)* }
        scenarios! { @of xdp Xdp $($name)* }
    };
    // Nobody would see it of XDP.
    (with_an_skb: $($name:ident),* $(,)?) => {
        mod of_an_skb {
            use super::*;
            scenarios! { @skb $($name)* }
        }
    };
    (@skb $($name:ident)*) => {
        scenarios! { @of by_flower Flower $($name)* }
        scenarios! { @of tcx Tcx $($name)* }
        scenarios! { @of clsact Clsact $($name)* }
    };
    (@of $module:ident $backend:ident $($name:ident)*) => {
        mod $module {
            $(#[test] fn $name() { super::$name(super::Backend::$backend) })*
        }
    };
}
pub(super) use scenarios;
