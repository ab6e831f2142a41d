//! Where a bridge sends the frames of one direction: found in what is known of the bridge, nobody is
//! asked.
//!
//! A rule for bridged frames matches the MAC address that they are sent to, beside the tuple: a
//! connection can cross a bridge twice, to a router behind one of its ports and, routed, back; and the
//! port behind which that address was learnt is the only one that frames for it leave by.
//!
//! What a rule carries the bridge does not see, and so does not learn from: that is made up for, see
//! [`PathResolver::keep_learnt`](super::path::PathResolver::keep_learnt).

use netdev_providers::{Forward, Ifindex, Reason, Rejection, Tuple};

use super::fdb::Fdb;
use super::links::{Layer, Link, Links};
use super::stack::{Frames, bridge_port, descend_port};
use crate::engine::datapath::{Path, PathHint};

/// The path of frames that have arrived on a real netdev, with these addresses and ports on arrival
/// and on departure.
///
/// # Errors
/// Why they cannot be offloaded.
pub fn resolve(
    links: &Links,
    fdb: &Fdb,
    real: Ifindex,
    (arriving, leaving): (Tuple, Tuple),
    hint: &PathHint,
) -> Result<Path, Rejection> {
    let refuse = |reason, why: String| Err(Rejection::with_detail(reason, why));
    let iif = hint.ingress.unwrap_or(real);
    let Some((port, bridge)) = port_of(links, iif) else {
        return refuse(
            Reason::Busy,
            format!("{} is no port of a bridge (any more)", links.name(iif)),
        );
    };
    let name = &bridge.name;
    if matches!(bridge.layer, Layer::Bridge { vlan_filtering: true }) {
        let why = format!("bridge {name} filters VLANs");
        return refuse(Reason::IngressUnsupported, why);
    }
    if let Some(id) = hint.vlan {
        let why = format!("bridge {name} forwards it with the tag of VLAN {id}");
        return refuse(Reason::IngressUnsupported, why);
    }
    if arriving != leaving {
        // By br_netfilter, which shows a bridge's packets to the stack's hooks.
        let why = format!("bridge {name} forwards it, and addresses or ports are translated");
        return refuse(Reason::IngressUnsupported, why);
    }
    let Some(mac) = hint.eth_dst else {
        return refuse(Reason::Busy, format!("whom {name} forwards it to is not known"));
    };
    let arrival = descend_port(links, fdb, iif, Frames::On(real))
        .map_err(|p| p.reject(Reason::IngressUnsupported))?;
    if let Some(problem) = arrival.problem {
        return Err(problem.reject(Reason::IngressUnsupported));
    }
    if arrival.real.ifindex != real {
        let why = format!("{} is above {} now", links.name(iif), arrival.real.name);
        return refuse(Reason::Busy, why);
    }
    let oif = bridge_port(links, fdb, &bridge, Frames::Of(mac))
        .map_err(|p| p.reject(Reason::EgressUnsupported))?;
    if let Some(seen) = hint.egress
        && seen != oif
    {
        // Flooded, or the address has moved since.
        let (seen, oif) = (links.name(seen), links.name(oif));
        return refuse(Reason::Busy, format!("it was sent to {seen}, but {mac} is behind {oif}"));
    }
    let to = links.get(oif).map(|l| l.port).unwrap_or_default();
    if (port.port.isolated && to.isolated) || (iif == oif && !port.port.hairpin) {
        let (from, to) = (links.name(iif), links.name(oif));
        return refuse(Reason::Busy, format!("bridge {name} forwards nothing from {from} to {to}"));
    }
    let departure = descend_port(links, fdb, oif, Frames::Of(mac))
        .map_err(|p| p.reject(Reason::EgressUnsupported))?;
    if let Some(problem) = departure.problem {
        return Err(problem.reject(Reason::EgressUnsupported));
    }
    let egress = departure.real.ifindex;
    Ok(Path {
        eth_dst: Some(mac),
        vlan: arrival.vlan,
        ingress_mtu: arrival.real.mtu,
        forward: Forward {
            egress,
            vlan: departure.vlan,
            mtu: departure.mtu,
            tuple: leaving,
            macs: None,
            egress_decides: false,
        },
        next_hop: None,
        iif: (iif != real).then_some(iif),
        oif: (oif != egress).then_some(oif),
        answer: 0,
    })
}

/// A port of a bridge, and that bridge.
#[must_use]
pub fn port_of(links: &Links, port: Ifindex) -> Option<(Link, Link)> {
    let port = links.get(port)?;
    let bridge = links.get(Ifindex::new(port.controller?)?)?;
    matches!(bridge.layer, Layer::Bridge { .. }).then_some((port, bridge))
}

#[cfg(test)]
mod tests {
    use netdev_providers::VlanId;

    use super::*;
    use crate::datapath::routing::fdb::Behind;
    use crate::datapath::routing::links::BridgePort;
    use crate::datapath::routing::stack::tests::{self, ifindex, mac};

    fn link(n: u32, controller: Option<u32>, layer: Layer) -> Link {
        Link { controller, ..tests::link(n, layer) }
    }

    /// Bridge 9 with ports 1, 2, and 4, which is VLAN 40 of 3. Host 71 is behind 1, and so on.
    fn world() -> (Links, Fdb) {
        let links = Links::default();
        let vlan = Layer::Vlan { lower: Some(ifindex(3)), id: 40, dot1q: true, qos: false };
        for link in [
            link(1, Some(9), Layer::Real),
            link(2, Some(9), Layer::Real),
            link(3, None, Layer::Real),
            link(4, Some(9), vlan),
            link(9, None, Layer::Bridge { vlan_filtering: false }),
        ] {
            links.set(link);
        }
        let fdb = Fdb::default();
        for (host, port) in [(71, 1), (72, 2), (74, 4)] {
            fdb.set(ifindex(9), mac(host), Some(Behind::Port(ifindex(port))));
        }
        fdb.set(ifindex(9), mac(9), Some(Behind::Itself));
        (links, fdb)
    }

    fn tuple() -> Tuple {
        "tcp 10.0.0.1:4000 > 10.0.0.2:80".parse().unwrap()
    }

    fn to(host: u8) -> PathHint {
        PathHint { eth_dst: Some(mac(host)), bridged: true, ..PathHint::default() }
    }

    fn found((links, fdb): &(Links, Fdb), real: u32, hint: &PathHint) -> Result<Path, Rejection> {
        resolve(links, fdb, ifindex(real), (tuple(), tuple()), hint)
    }

    fn refusal(world: &(Links, Fdb), hint: &PathHint) -> (Reason, String) {
        let r = found(world, 1, hint).unwrap_err();
        (r.reason, r.detail.unwrap_or_default().to_string())
    }

    #[test]
    fn frames_leave_by_the_port_behind_which_their_receiver_is_and_stay_as_they_are() {
        let world = world();
        let hint = PathHint { egress: Some(ifindex(2)), ..to(72) };
        let path = found(&world, 1, &hint).unwrap();
        assert_eq!((path.eth_dst, path.vlan, path.next_hop), (Some(mac(72)), None, None));
        assert_eq!((path.forward.egress, path.forward.vlan), (ifindex(2), None));
        assert_eq!((path.forward.macs, path.forward.tuple), (None, tuple()));
        assert_eq!((path.iif, path.oif), (None, None));
    }

    #[test]
    fn a_port_that_is_a_vlan_device_is_followed_down() {
        let world = world();
        world.0.set(Link { mtu: 1400, ..world.0.get(ifindex(4)).unwrap() });
        let there = found(&world, 1, &to(74)).unwrap();
        assert_eq!((there.forward.egress, there.oif), (ifindex(3), Some(ifindex(4))));
        assert_eq!((there.forward.vlan, there.forward.mtu), (VlanId::new(40), 1400));
        let hint = PathHint { ingress: Some(ifindex(4)), ..to(71) };
        let back = found(&world, 3, &hint).unwrap();
        assert_eq!((back.vlan, back.iif), (VlanId::new(40), Some(ifindex(4))));
        assert_eq!((back.forward.egress, back.forward.vlan), (ifindex(1), None));
    }

    #[test]
    fn what_a_bridge_does_not_do_is_not_done_for_it() {
        let world = world();
        let (links, fdb) = &world;
        let busy = |hint: &PathHint, why: &str| {
            let (reason, words) = refusal(&world, hint);
            assert!(reason == Reason::Busy && words.contains(why), "{reason}: {words}");
        };
        busy(&to(79), "has not learnt");
        busy(&PathHint { egress: Some(ifindex(4)), ..to(72) }, "is behind n2");
        busy(&PathHint { eth_dst: None, ..to(72) }, "not known");
        busy(&to(71), "nothing from n1 to n1");
        let set = |n, port| links.set(Link { port, ..links.get(ifindex(n)).unwrap() });
        set(1, BridgePort { hairpin: true, ..BridgePort::default() });
        assert!(found(&world, 1, &to(71)).is_ok());
        let isolated = BridgePort { isolated: true, ..BridgePort::default() };
        set(1, isolated);
        assert!(found(&world, 1, &to(72)).is_ok());
        set(2, isolated);
        busy(&to(72), "nothing from n1 to n2");
        for n in [1, 2] {
            set(1, BridgePort::default());
            set(2, BridgePort::default());
            set(n, BridgePort { forwarding: false, ..BridgePort::default() });
            busy(&to(72), "spanning tree");
        }
        fdb.set(ifindex(9), mac(72), None);
        busy(&to(72), "has not learnt");
        links.set(link(1, None, Layer::Real));
        busy(&to(74), "no port of a bridge");
    }

    #[test]
    fn what_cannot_be_bridged_exactly_is_refused() {
        let world = world();
        let refused = |hint: &PathHint, reason: Reason, why: &str| {
            let (r, words) = refusal(&world, hint);
            assert!(r == reason && words.contains(why), "{r}: {words}");
        };
        let tagged = PathHint { vlan: Some(7), ..to(72) };
        refused(&tagged, Reason::IngressUnsupported, "VLAN 7");
        refused(&to(9), Reason::EgressUnsupported, "itself");
        let nat = "tcp 10.0.0.1:4000 > 10.0.0.3:80".parse().unwrap();
        let (links, fdb) = &world;
        let translated = resolve(links, fdb, ifindex(1), (tuple(), nat), &to(72)).unwrap_err();
        assert_eq!(translated.reason, Reason::IngressUnsupported);
        links.set(link(2, Some(9), Layer::Other { kind: "vxlan".into(), lower: None }));
        refused(&to(72), Reason::EgressUnsupported, "vxlan");
        links.set(link(9, None, Layer::Bridge { vlan_filtering: true }));
        refused(&tagged, Reason::IngressUnsupported, "filters VLANs");
    }
}
