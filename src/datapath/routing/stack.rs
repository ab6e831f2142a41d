//! The stack of netdevs between the one that routes and the one that frames arrive on or leave by,
//! as `dev_fill_forward_path` follows it in the kernel.
//!
//! ```text
//!   bond0.10   routes: its MAC address and its neighbours are those of the frames
//!      |       one tag
//!    bond0     active-backup: its active port
//!      |
//!    eth0      the real netdev: rules stand here, and redirect to here
//! ```
//! Going down is a question of **whose** frames: those of one neighbour, which a bridge has learnt
//! behind one of its ports; or those that have arrived on one real netdev.
//!
//! What cannot be followed exactly is a [`Problem`], and the direction stays on the slow path: two
//! tags, tags of 802.1ad, tags whose priority is mapped, bridges that filter VLANs, netdevs that
//! make other frames (tunnels) or share the netdev below (macvlan). The bottom is found all the same
//! where it can be, so that the refusal is kept, and shown, where the connection would have been
//! offloaded.

use netdev_providers::{Ifindex, MacAddr, Reason, Rejection, VlanId};

use super::fdb::{Behind, Fdb};
use super::links::{Layer, Link, Links};

/// Whose frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frames {
    /// Those to or from this neighbour.
    Of(MacAddr),
    /// Those that have arrived on this real netdev.
    On(Ifindex),
}

/// What stands below a netdev.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stack {
    /// The real netdev at the bottom.
    pub real: Link,
    /// The tag that frames have there.
    pub vlan: Option<VlanId>,
    /// The smallest MTU from top to bottom.
    pub mtu: u32,
    /// Why frames cannot be redirected past the netdevs above, where that is so.
    pub problem: Option<Problem>,
}

/// Why a stack cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// It may pass: a netdev is down, an address not learnt yet.
    pub passing: bool,
    /// In words.
    pub why: String,
}

impl Problem {
    fn lasting(why: String) -> Self {
        Self { passing: false, why }
    }

    fn passing(why: String) -> Self {
        Self { passing: true, why }
    }

    /// As a refusal: for this reason, unless it may pass.
    #[must_use]
    pub fn reject(self, reason: Reason) -> Rejection {
        Rejection::with_detail(if self.passing { Reason::Busy } else { reason }, self.why)
    }
}

/// More netdevs than anybody stacks: the kernel allows 8 (`MAX_NEST_DEV`).
const MAX_DEPTH: usize = 8;

/// Goes down from a netdev that routes.
///
/// # Errors
/// When the bottom cannot be found.
pub fn descend(links: &Links, fdb: &Fdb, top: Ifindex, frames: Frames) -> Result<Stack, Problem> {
    let link = get(links, top)?;
    // A port of a bridge or a bond that routes by itself: frames get to its controller first.
    // (One of a VRF routes by itself, for the VRF.)
    let controller = link.controller.and_then(Ifindex::new).filter(|c| !links.is_vrf(*c));
    let problem = controller.map(|controller| {
        Problem::lasting(format!("{} is enslaved to {}", link.name, links.name(controller)))
    });
    go_down(links, fdb, link, frames, problem)
}

/// Goes down from a port of a bridge, which forwards the frames.
///
/// # Errors
/// When the bottom cannot be found.
pub fn descend_port(
    links: &Links,
    fdb: &Fdb,
    port: Ifindex,
    frames: Frames,
) -> Result<Stack, Problem> {
    let link = get(links, port)?;
    let problem = not_forwarding(&link);
    go_down(links, fdb, link, frames, problem)
}

fn go_down(
    links: &Links,
    fdb: &Fdb,
    mut link: Link,
    frames: Frames,
    mut problem: Option<Problem>,
) -> Result<Stack, Problem> {
    let (mut vlan, mut mtu) = (None, link.mtu);
    // The first problem is the one to be told.
    let note = |problem: &mut Option<Problem>, p: Problem| {
        problem.get_or_insert(p);
    };
    // Also where the bottom cannot be found.
    let first = |problem: &Option<Problem>, p: Problem| problem.clone().unwrap_or(p);
    for _ in 0..MAX_DEPTH {
        let name = &link.name;
        if link.mac.is_none() {
            let why = match &link.layer {
                Layer::Other { kind, .. } => format!("{name} is a {kind}"),
                _ => format!("{name} is not an Ethernet netdev"),
            };
            return Err(first(&problem, Problem::lasting(why)));
        }
        if !link.up {
            note(&mut problem, Problem::passing(format!("{name} is down")));
        }
        let below = match &link.layer {
            Layer::Real => return Ok(Stack { real: link, vlan, mtu, problem }),
            Layer::Vlan { lower, id, dot1q, qos } => {
                if !*dot1q {
                    let why = format!("{name} has tags of 802.1ad");
                    note(&mut problem, Problem::lasting(why));
                }
                if *qos {
                    let why = format!("{name} maps the priority of its tags (qos-map)");
                    note(&mut problem, Problem::lasting(why));
                }
                match (vlan, VlanId::new(*id)) {
                    (None, Some(id)) => vlan = Some(id),
                    (None, None) => {
                        note(&mut problem, Problem::lasting(format!("{name} has VLAN {id}")));
                    }
                    (Some(_), _) => {
                        let why = format!("two VLAN tags: the second is {name}'s (QinQ)");
                        note(&mut problem, Problem::lasting(why));
                    }
                }
                lower.ok_or_else(|| {
                    let why = format!("what is below {name} is in another network namespace");
                    first(&problem, Problem::lasting(why))
                })?
            }
            Layer::Bridge { vlan_filtering } => {
                if *vlan_filtering {
                    let why = format!("bridge {name} filters VLANs");
                    note(&mut problem, Problem::lasting(why));
                }
                bridge_port(links, fdb, &link, frames).map_err(|p| first(&problem, p))?
            }
            Layer::Vrf => {
                return Err(first(&problem, Problem::lasting(format!("{name} is a VRF"))));
            }
            Layer::ActiveBackup { active } => active
                .ok_or_else(|| Problem::passing(format!("bond {name} has no active port")))
                .map_err(|p| first(&problem, p))?,
            Layer::Other { kind, lower } => {
                let p = Problem::lasting(format!("{name} is a {kind}"));
                let Some(lower) = *lower else { return Err(first(&problem, p)) };
                note(&mut problem, p);
                lower
            }
        };
        let was_bridge = matches!(link.layer, Layer::Bridge { .. });
        link = get(links, below)?;
        mtu = mtu.min(link.mtu);
        if let (true, Some(p)) = (was_bridge, not_forwarding(&link)) {
            note(&mut problem, p);
        }
    }
    Err(Problem::lasting(format!("more than {MAX_DEPTH} netdevs above each other")))
}

fn not_forwarding(port: &Link) -> Option<Problem> {
    (!port.port.forwarding)
        .then(|| Problem::passing(format!("{} does not forward (spanning tree)", port.name)))
}

fn get(links: &Links, ifindex: Ifindex) -> Result<Link, Problem> {
    // A netdev that is not known is about to be, or about to be forgotten.
    links
        .get(ifindex)
        .ok_or_else(|| Problem::passing(format!("netdev {ifindex} is not known (yet)")))
}

pub(super) fn bridge_port(
    links: &Links,
    fdb: &Fdb,
    bridge: &Link,
    frames: Frames,
) -> Result<Ifindex, Problem> {
    let name = &bridge.name;
    match frames {
        Frames::Of(mac) => match fdb.get(bridge.ifindex, mac) {
            Some(Behind::Port(port)) => Ok(port),
            Some(Behind::Itself) => {
                Err(Problem::lasting(format!("{mac} is an address of bridge {name} itself")))
            }
            None => Err(Problem::passing(format!("bridge {name} has not learnt {mac}"))),
        },
        Frames::On(real) => {
            let leads_there = |port: &Ifindex| {
                *port == real || descend_from_port(links, fdb, *port, real).is_some()
            };
            let ports: Vec<_> =
                links.ports_of(bridge.ifindex).into_iter().filter(leads_there).collect();
            match ports[..] {
                [port] => Ok(port),
                [] => Err(Problem::passing(format!(
                    "{} is not below bridge {name} (any more)",
                    links.name(real)
                ))),
                _ => Err(Problem::lasting(format!(
                    "{} is below bridge {name} more than once",
                    links.name(real)
                ))),
            }
        }
    }
}

/// The netdev whose MAC address and neighbours are those of packets that were routed on this one, and that arrived on
/// this real netdev: itself, or, of a VRF, the one enslaved to it.
///
/// # Errors
/// When there is none, or when there are several (VLAN devices of one port in one VRF): which of them it was, nobody
/// can tell.
pub fn routes_for(
    links: &Links,
    fdb: &Fdb,
    iif: Ifindex,
    real: Ifindex,
) -> Result<Ifindex, Problem> {
    if !links.is_vrf(iif) {
        return Ok(iif);
    }
    let leads_there = |enslaved: &Ifindex| {
        descend(links, fdb, *enslaved, Frames::On(real)).is_ok_and(|s| s.real.ifindex == real)
    };
    let found: Vec<_> = links.ports_of(iif).into_iter().filter(leads_there).collect();
    match found[..] {
        [enslaved] => Ok(enslaved),
        [] => Err(Problem::passing(format!(
            "{} is not below VRF {} (any more)",
            links.name(real),
            links.name(iif)
        ))),
        _ => Err(Problem::lasting(format!(
            "{} is below VRF {} more than once",
            links.name(real),
            links.name(iif)
        ))),
    }
}

/// The real netdev on which frames for this MAC address arrive that are routed on a VRF, if it can be told.
#[must_use]
pub fn enters_vrf_on(
    links: &Links,
    fdb: &Fdb,
    vrf: Ifindex,
    to: MacAddr,
    from: Frames,
) -> Option<Ifindex> {
    let enslaved = links.ports_of(vrf).into_iter();
    let of_mac = enslaved.filter(|i| links.get(*i).is_some_and(|l| l.mac == Some(to)));
    let mut real = of_mac.map(|i| Some(descend(links, fdb, i, from).ok()?.real.ifindex));
    let first = real.next()??;
    real.all(|other| other == Some(first)).then_some(first)
}

/// Whether a netdev that is no bridge stands on this real one.
fn descend_from_port(links: &Links, fdb: &Fdb, port: Ifindex, real: Ifindex) -> Option<()> {
    match links.get(port)?.layer {
        // A bridge cannot be the port of a bridge.
        Layer::Real | Layer::Bridge { .. } | Layer::Vrf => None,
        Layer::Vlan { .. } | Layer::ActiveBackup { .. } | Layer::Other { .. } => {
            let stack = descend(links, fdb, port, Frames::On(real)).ok()?;
            (stack.real.ifindex == real).then_some(())
        }
    }
}

/// Why a netdev cannot be a port, although it is an Ethernet netdev: its connections are offloaded
/// below it. `None` when it can.
#[must_use]
pub fn not_a_port(links: &Links, link: &Link) -> Option<String> {
    let name = &link.name;
    match &link.layer {
        Layer::Real => None,
        Layer::Vlan { lower, .. } => {
            let below = lower.map_or_else(|| "another namespace".to_owned(), |l| links.name(l));
            Some(format!("{name} is a VLAN device: its connections are offloaded on {below}"))
        }
        Layer::Bridge { .. } => Some(format!(
            "{name} is a bridge: its connections are offloaded on the ports that they arrive on"
        )),
        Layer::ActiveBackup { .. } => Some(format!(
            "{name} is a bond in mode active-backup: its connections are offloaded on its ports"
        )),
        Layer::Vrf => Some(format!(
            "{name} is a VRF: its connections are offloaded on the netdevs that are enslaved to it"
        )),
        Layer::Other { kind, .. } => Some(format!("{name} is a {kind}")),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::datapath::routing::links::BridgePort;

    pub(in super::super) fn ifindex(n: u32) -> Ifindex {
        Ifindex::new(n).unwrap()
    }

    pub(in super::super) fn mac(n: u8) -> MacAddr {
        MacAddr([2, 0, 0, 0, 0, n])
    }

    pub(crate) fn link(n: u32, layer: Layer) -> Link {
        Link {
            ifindex: ifindex(n),
            name: format!("n{n}"),
            mac: Some(mac(u8::try_from(n).unwrap())),
            mtu: 1500,
            up: true,
            carrier: true,
            carrier_ups: 1,
            controller: None,
            port: BridgePort::default(),
            layer,
            xdp: Vec::new(),
        }
    }

    fn vlan(lower: u32, id: u16) -> Layer {
        Layer::Vlan { lower: Some(ifindex(lower)), id, dot1q: true, qos: false }
    }

    fn port_of(controller: u32, link: Link) -> Link {
        Link { controller: Some(controller), ..link }
    }

    fn links(all: impl IntoIterator<Item = Link>) -> Links {
        let links = Links::default();
        for link in all {
            links.set(link);
        }
        links
    }

    const BRIDGE: Layer = Layer::Bridge { vlan_filtering: false };

    /// What is found below a netdev: the real one, its tag, and the problem.
    fn found(links: &Links, fdb: &Fdb, top: u32, frames: Frames) -> (u32, Option<u16>, String) {
        match descend(links, fdb, ifindex(top), frames) {
            Ok(s) => {
                let why = s.problem.map(|p| p.why).unwrap_or_default();
                (s.real.ifindex.get(), s.vlan.map(VlanId::get), why)
            }
            Err(p) => (0, None, p.why),
        }
    }

    #[test]
    fn a_real_netdev_is_its_own_bottom() {
        let links = links([link(1, Layer::Real)]);
        let any = Frames::Of(mac(9));
        assert_eq!(found(&links, &Fdb::default(), 1, any), (1, None, String::new()));
        assert_eq!(found(&links, &Fdb::default(), 2, any).2, "netdev 2 is not known (yet)");
    }

    #[test]
    fn a_vlan_device_stands_on_a_tag() {
        let links = links([
            link(1, Layer::Real),
            link(2, vlan(1, 10)),
            Link { mtu: 1400, ..link(3, vlan(1, 11)) },
        ]);
        let any = Frames::Of(mac(9));
        assert_eq!(found(&links, &Fdb::default(), 2, any), (1, Some(10), String::new()));
        assert_eq!(descend(&links, &Fdb::default(), ifindex(3), any).unwrap().mtu, 1400);
        assert_eq!(links.above(ifindex(1)), [2, 3].map(ifindex).into());
    }

    #[test]
    fn what_a_tag_cannot_express_is_refused() {
        let with = |layer| {
            let links = links([link(1, Layer::Real), link(2, vlan(1, 10)), link(3, layer)]);
            found(&links, &Fdb::default(), 3, Frames::Of(mac(9)))
        };
        let odd = |dot1q, qos, id| Layer::Vlan { lower: Some(ifindex(1)), id, dot1q, qos };
        assert!(with(odd(false, false, 10)).2.contains("802.1ad"));
        assert!(with(odd(true, true, 10)).2.contains("priority"));
        assert!(with(odd(true, false, 0)).2.contains("VLAN 0"));
        // The bottom is found all the same, for the refusal to be kept there.
        let (real, _, why) = with(vlan(2, 20));
        assert_eq!(real, 1);
        assert!(why.contains("QinQ"), "{why}");
        let elsewhere = Layer::Vlan { lower: None, id: 10, dot1q: true, qos: false };
        assert!(with(elsewhere).2.contains("another network namespace"));
    }

    #[test]
    fn a_bridge_leads_to_where_an_address_was_learnt() {
        let links = links([
            port_of(9, link(1, Layer::Real)),
            port_of(9, link(3, vlan(2, 20))),
            link(2, Layer::Real),
            link(9, BRIDGE),
            link(10, vlan(9, 30)),
        ]);
        let fdb = Fdb::default();
        let to = |fdb: &Fdb, n| found(&links, fdb, 9, Frames::Of(mac(n)));
        assert!(to(&fdb, 70).2.contains("has not learnt"));
        fdb.set(ifindex(9), mac(70), Some(Behind::Port(ifindex(1))));
        fdb.set(ifindex(9), mac(71), Some(Behind::Port(ifindex(3))));
        fdb.set(ifindex(9), mac(72), Some(Behind::Itself));
        assert_eq!(to(&fdb, 70), (1, None, String::new()));
        assert_eq!(to(&fdb, 71), (2, Some(20), String::new()));
        assert!(to(&fdb, 72).2.contains("itself"));
        // What arrived on a port has come through that port, whatever is learnt.
        assert_eq!(found(&links, &fdb, 9, Frames::On(ifindex(1))), (1, None, String::new()));
        assert_eq!(found(&links, &fdb, 9, Frames::On(ifindex(2))), (2, Some(20), String::new()));
        assert!(found(&links, &fdb, 9, Frames::On(ifindex(7))).2.contains("not below"));
        // A VLAN device on the bridge: one tag behind port 1, two behind port 3.
        let on_top = |n| found(&links, &fdb, 10, Frames::Of(mac(n)));
        assert_eq!(on_top(70), (1, Some(30), String::new()));
        assert!(on_top(71).2.contains("QinQ"));
        assert_eq!(links.above(ifindex(2)), [3, 9, 10].map(ifindex).into());
        links.set(link(9, Layer::Bridge { vlan_filtering: true }));
        assert!(to(&fdb, 70).2.contains("filters VLANs"));
        assert!(to(&fdb, 75).2.contains("filters VLANs"), "not that the address is unknown");
        links.set(link(9, BRIDGE));
        let port = BridgePort { forwarding: false, ..BridgePort::default() };
        links.set(Link { port, ..port_of(9, link(1, Layer::Real)) });
        assert!(to(&fdb, 70).2.contains("spanning tree"));
        fdb.forget(ifindex(3));
        assert!(to(&fdb, 71).2.contains("has not learnt"));
    }

    #[test]
    fn a_port_that_is_below_a_bridge_twice_is_ambiguous() {
        let links = links([
            port_of(9, link(1, Layer::Real)),
            port_of(9, link(2, vlan(1, 20))),
            link(9, BRIDGE),
        ]);
        let (_, _, why) = found(&links, &Fdb::default(), 9, Frames::On(ifindex(1)));
        assert!(why.contains("more than once"), "{why}");
    }

    #[test]
    fn a_vrf_is_routed_on_by_those_that_are_enslaved_to_it() {
        let all = [
            port_of(9, link(1, Layer::Real)),
            port_of(9, link(4, vlan(2, 10))),
            link(2, Layer::Real),
            link(3, Layer::Real),
            link(9, Layer::Vrf),
        ];
        let (links, fdb) = (links(all), Fdb::default());
        let routes = |links: &Links, real| {
            routes_for(links, &fdb, ifindex(9), ifindex(real)).map(Ifindex::get).map_err(|p| p.why)
        };
        assert_eq!((routes(&links, 1), routes(&links, 2)), (Ok(1), Ok(4)));
        assert_eq!(routes(&links, 3), Err("n3 is not below VRF n9 (any more)".into()));
        assert_eq!(routes_for(&links, &fdb, ifindex(3), ifindex(3)), Ok(ifindex(3)));
        assert_eq!(links.above(ifindex(2)), [4, 9].map(ifindex).into());
        // What is enslaved to a VRF is a netdev like others; the VRF itself sends nothing.
        let any = Frames::Of(mac(70));
        assert_eq!(found(&links, &fdb, 1, any), (1, None, String::new()));
        assert_eq!(found(&links, &fdb, 9, any).2, "n9 is a VRF");
        let enters = |links: &Links, to| {
            enters_vrf_on(links, &fdb, ifindex(9), mac(to), any).map(Ifindex::get)
        };
        assert_eq!([1, 4, 2, 7].map(|m| enters(&links, m)), [Some(1), Some(2), None, None]);
        // Two of one port, which have its MAC address: the port can be told, which of them it was cannot.
        links.set(Link { mac: Some(mac(4)), ..port_of(9, link(5, vlan(2, 11))) });
        assert_eq!(enters(&links, 4), Some(2));
        assert_eq!(routes(&links, 2), Err("n2 is below VRF n9 more than once".into()));
        // Of two ports.
        links.set(Link { mac: Some(mac(4)), ..port_of(9, link(6, vlan(3, 11))) });
        assert_eq!(enters(&links, 4), None);
    }

    #[test]
    fn a_bond_leads_to_its_active_port() {
        let bond = |active: Option<u32>| Layer::ActiveBackup { active: active.map(ifindex) };
        let links = links([
            port_of(9, link(1, Layer::Real)),
            port_of(9, link(2, Layer::Real)),
            link(9, bond(Some(2))),
            link(10, vlan(9, 10)),
        ]);
        let any = Frames::Of(mac(70));
        assert_eq!(found(&links, &Fdb::default(), 10, any), (2, Some(10), String::new()));
        assert_eq!(links.above(ifindex(1)), [9, 10].map(ifindex).into());
        links.set(link(9, bond(None)));
        let problem = descend(&links, &Fdb::default(), ifindex(9), any).unwrap_err();
        assert!(problem.passing && problem.why.contains("no active port"));
    }

    #[test]
    fn tunnels_and_shared_netdevs_are_refused() {
        let other = |kind: &str, lower: Option<u32>| Layer::Other {
            kind: kind.into(),
            lower: lower.map(ifindex),
        };
        let links = links([
            link(1, Layer::Real),
            link(2, other("vxlan", None)),
            link(3, other("macvlan", Some(1))),
            Link { mac: None, ..link(4, other("gre", None)) },
            Link { up: false, ..link(5, vlan(1, 10)) },
        ]);
        let any = Frames::Of(mac(9));
        let fdb = Fdb::default();
        assert_eq!(found(&links, &fdb, 2, any), (0, None, "n2 is a vxlan".into()));
        assert_eq!(found(&links, &fdb, 3, any), (1, None, "n3 is a macvlan".into()));
        assert_eq!(found(&links, &fdb, 4, any), (0, None, "n4 is a gre".into()));
        assert_eq!(found(&links, &fdb, 5, any), (1, Some(10), "n5 is down".into()));
        let enslaved = links.get(ifindex(1)).map(|l| port_of(2, l)).unwrap();
        links.set(enslaved);
        assert_eq!(found(&links, &fdb, 1, any).2, "n1 is enslaved to n2");
    }

    #[test]
    fn only_a_real_netdev_can_be_a_port() {
        let links = links([link(1, Layer::Real)]);
        let why = |layer| not_a_port(&links, &link(9, layer));
        assert_eq!(why(Layer::Real), None);
        let said = |layer, words: &str| {
            let why = why(layer).unwrap();
            assert!(why.starts_with("n9 is a ") && why.contains(words), "{why}");
        };
        said(vlan(1, 10), "offloaded on n1");
        let elsewhere = Layer::Vlan { lower: None, id: 10, dot1q: true, qos: false };
        said(elsewhere, "offloaded on another namespace");
        said(BRIDGE, "offloaded on the ports that they arrive on");
        said(Layer::ActiveBackup { active: None }, "offloaded on its ports");
        said(Layer::Vrf, "enslaved to it");
        said(Layer::Other { kind: "vxlan".into(), lower: None }, "vxlan");
    }
}
