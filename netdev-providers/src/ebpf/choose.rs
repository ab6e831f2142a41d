//! Where a netdev is to have its program.

use super::place::Place;
use crate::contract::types::Ifindex;
use crate::netlink::error::NetlinkError;
use crate::netlink::front::{ALL, PARENT_INGRESS, filters};
use crate::netlink::generic::has_feature;
use crate::netlink::link::Link;

/// How a port is to forward, where the operator wants to say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// By XDP of the driver, or not at all.
    Xdp,
    /// On an skb: by tcx, or by a filter.
    Tcx,
}

/// A feature of netdevs: the tag is taken out of the frame on arrival (`ethtool -K NAME rxvlan on`).
const RX_VLAN: &str = "rx-vlan-hw-parse";
/// Devices whose other end is a machine like this one: what it sends is not cut into packets on the way, until the
/// driver has an XDP program.
const VIRTUAL_BUSES: [&str; 3] = ["virtio", "xen", "vmbus"];

/// The places to be tried, in order, and why not XDP, where it is not among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) places: Vec<Place>,
    pub(super) not_xdp: Option<String>,
}

impl Choice {
    pub(super) fn of(link: &Link, wanted: Option<Mode>) -> Result<Self, NetlinkError> {
        let not_xdp = match wanted {
            Some(Mode::Tcx) => Some("it is not asked for".to_owned()),
            Some(Mode::Xdp) => no_tags(link.ifindex)?,
            None => match unsuitable(link) {
                Some(why) => Some(why),
                None => no_tags(link.ifindex)?,
            },
        };
        let mut places = Vec::new();
        if not_xdp.is_none() {
            places.push(Place::Xdp);
        }
        if wanted != Some(Mode::Xdp) {
            // tcx is in front of all filters.
            if filters(link.ifindex, PARENT_INGRESS, ALL)?.is_empty() {
                places.push(Place::Tcx);
            }
            places.push(Place::Clsact);
        }
        Ok(Self { places, not_xdp })
    }
}

/// Why XDP is no good idea on such a netdev, unless it is asked for.
fn unsuitable(link: &Link) -> Option<String> {
    let sent_large = "what its other end sends in one piece would have to be cut first";
    match (&link.kind, &link.bus) {
        (Some(kind), _) => Some(format!("a {kind}: {sent_large}")),
        (None, Some(bus)) if VIRTUAL_BUSES.contains(&bus.as_str()) => {
            Some(format!("a device of {bus}: {sent_large}"))
        }
        (None, Some(_)) => None,
        (None, None) => Some("it belongs to no device".to_owned()),
    }
}

/// Why XDP would not see VLAN tags.
fn no_tags(ifindex: Ifindex) -> Result<Option<String>, NetlinkError> {
    let hidden = has_feature(ifindex, RX_VLAN)?;
    Ok(hidden.then(|| {
        "the NIC takes VLAN tags off, which XDP then does not see (ethtool -K NAME rxvlan off)"
            .to_owned()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xdp_is_for_nics_unless_it_is_asked_for() {
        let link = |kind: Option<&str>, bus: Option<&str>| Link {
            ifindex: Ifindex::new(1).unwrap(),
            name: "eth0".into(),
            hardware_type: 1,
            kind: kind.map(str::to_owned),
            bus: bus.map(str::to_owned),
            controller: None,
        };
        assert_eq!(unsuitable(&link(None, Some("pci"))), None);
        assert_eq!(unsuitable(&link(None, Some("usb"))), None);
        for (kind, bus) in
            [(Some("veth"), None), (Some("tun"), None), (None, Some("virtio")), (None, None)]
        {
            assert!(unsuitable(&link(kind, bus)).is_some(), "{kind:?} {bus:?}");
        }
    }
}
