//! Shapes of flows that a port's backend does not take: the negative cache, until the next flush.

use std::collections::HashMap;

use netdev_providers::{Flow, Ifindex, L4Proto, Reason, Rejection, Tracked, Tuple};
use nix::errno::Errno;

use super::datapath::Work;

/// What a flow needs of a backend, whatever its addresses are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    ipv6: bool,
    proto: L4Proto,
    routed: bool,
    new_src: bool,
    new_dst: bool,
    new_ports: bool,
    vlan_in: bool,
    vlan_out: bool,
    /// None: it is only tracked.
    egress: Option<Ifindex>,
}

impl Shape {
    pub(super) fn of_work(work: &Work) -> Self {
        match work {
            Work::Forward(flow) => Self::of(flow),
            Work::Track(tracked) => Self::of_tracked(tracked),
        }
    }

    fn of_tracked(tracked: &Tracked) -> Self {
        let (from, to) = (&tracked.matches.tuple, &tracked.tuple);
        Self { vlan_in: tracked.matches.vlan.is_some(), ..Self::of_tuples(from, to) }
    }

    fn of_tuples(from: &Tuple, to: &Tuple) -> Self {
        Self {
            ipv6: from.is_ipv6(),
            proto: from.proto(),
            routed: false,
            new_src: from.src() != to.src(),
            new_dst: from.dst() != to.dst(),
            new_ports: (from.sport(), from.dport()) != (to.sport(), to.dport()),
            vlan_in: false,
            vlan_out: false,
            egress: None,
        }
    }

    pub(super) fn of(flow: &Flow) -> Self {
        Self {
            routed: flow.forward.macs.is_some(),
            vlan_in: flow.matches.vlan.is_some(),
            vlan_out: flow.forward.vlan.is_some(),
            egress: Some(flow.forward.egress),
            ..Self::of_tuples(&flow.matches.tuple, &flow.forward.tuple)
        }
    }
}

/// Shapes remembered per port. There are 256 for one egress netdev; beyond the bound flows are just
/// offered.
pub(super) const MAX_SHAPES: usize = 1024;

/// What was refused because of its shape.
#[derive(Debug, Default)]
pub(super) struct Shapes(HashMap<Shape, Rejection>);

impl Shapes {
    /// Why flows of this shape are not offered; `None`: they are.
    pub(super) fn refused(&self, shape: &Shape) -> Option<Rejection> {
        self.0.get(shape).cloned()
    }

    /// Remembers a refusal that is about the shape, and not about this one flow.
    pub(super) fn note_refused(&mut self, shape: Shape, rejection: &Rejection) {
        // An error of the firmware's (EIO, EINVAL) may be about this one rule, or this moment.
        let lasting = matches!(rejection.errno, None | Some(Errno::EOPNOTSUPP));
        let by_shape = matches!(rejection.reason, Reason::Unsupported | Reason::NotInHardware);
        if lasting && by_shape && self.0.len() < MAX_SHAPES {
            self.0.insert(shape, rejection.clone());
        }
    }

    /// The netdev is gone or down, and may be another's when it comes back.
    pub(super) fn forget_towards(&mut self, egress: Ifindex) {
        self.0.retain(|shape, _| shape.egress != Some(egress));
    }

    /// Everything may be tried again.
    pub(super) fn forget(&mut self) {
        self.0.clear();
    }
}
