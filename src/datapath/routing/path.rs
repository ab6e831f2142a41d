//! Where the packets of one direction go: asked of the kernel, with the addresses, ports and mark
//! that its own routing decision was made with, so that policy routing and route exceptions are
//! answered as they are applied.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use netdev_providers::netlink::socket::{ACK, REQUEST};
use netdev_providers::netlink::wire::{Message, Received};
use netdev_providers::netlink::{Family, NetlinkError, Socket};
use netdev_providers::{Forward, Ifindex, MacAddr, MacRewrite, Reason, Rejection};
use netlink_packet_core::{DefaultNla, Emitable, Parseable};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteType, RouteVia,
};

use super::answers::{Answers, By, Changes, Question, Route};
use super::bridged;
use super::fdb::Fdb;
use super::ipsec::Ipsec;
use super::links::{Layer, Links};
use super::marks::{AtRouting, Doubt, Marks};
use super::neighbour;
use super::stack::{Frames, Stack, descend, routes_for};
use super::switches::Switches;
use super::tos::Named;
use crate::datapath::pool::Pool;
use crate::engine::datapath::{Path, PathHint, Sight};

const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
/// `struct rtmsg`.
const ROUTE_HEADER: usize = 12;
// linux/rtnetlink.h
const RTA_OIF: u16 = 4;
const RTA_MULTIPATH: u16 = 9;
const RTA_NH_ID: u16 = 30;
const RTA_FLOWLABEL: u16 = 31;

/// Who asks the kernel waits for nobody while there are no more of them.
const SOCKETS: usize = 4;

/// Switches of IPv4 (`net.ipv4.conf.*`) that a route look-up obeys and that are not announced: whether packets from an
/// address of the router itself, or from or to 127.0.0.0/8, are routed, and whether the reverse path is looked for
/// with the packet's mark.
const QUIET: [&str; 3] = ["accept_local", "route_localnet", "src_valid_mark"];

/// Switches of IPv6 (`net.ipv6.conf.*`) that are not announced when they are changed by hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Switched6 {
    /// Its own MTU, which can be below the netdev's; `None`: there is no IPv6 on the netdev.
    mtu: Option<u32>,
    /// What arrives there, or would leave, is dropped (`ip6_rcv_core`, `ip6_output`).
    disabled: bool,
}

/// Resolves paths with blocking requests of its own sockets, where nobody has asked the same before.
pub struct PathResolver {
    links: Links,
    fdb: Fdb,
    switches: Switches,
    ipsec: Ipsec,
    tos: Named,
    marks: Marks,
    answers: Answers,
    sockets: Pool<Socket, SOCKETS>,
    /// Switches of netdevs that packets are routed on, as first read or last looked at.
    switched: Mutex<HashMap<Ifindex, [Option<String>; QUIET.len()]>>,
    /// The same of IPv6, of netdevs that paths come by or lead to.
    switched6: Mutex<HashMap<Ifindex, Switched6>>,
    /// What chooses among the next hops of IPv4's and IPv6's routes and is in no look-up, as last looked at.
    unasked: Mutex<[Option<&'static str>; 2]>,
    /// A group of next hops can be one that looks at how idle flows are.
    resilient: AtomicBool,
}

impl PathResolver {
    /// Opens its sockets in the network namespace of the calling thread. `changes`: of all that paths are resolved
    /// from.
    ///
    /// # Errors
    /// When the kernel refuses a socket.
    pub fn new(
        changes: Changes,
        links: Links,
        fdb: Fdb,
        switches: Switches,
        ipsec: Ipsec,
        tos: Named,
        marks: Marks,
    ) -> Result<Self, NetlinkError> {
        let sockets = Pool::of(|| Socket::open(Family::Route))?;
        let unasked = Mutex::new([false, true].map(unasked));
        let (switched, switched6) = (Mutex::default(), Mutex::default());
        Ok(Self {
            links,
            fdb,
            switches,
            ipsec,
            tos,
            marks,
            answers: Answers::new(changes),
            sockets,
            switched,
            switched6,
            unasked,
            resilient: AtomicBool::new(false),
        })
    }

    /// The path of a direction on a port.
    ///
    /// # Errors
    /// Why it cannot be offloaded.
    pub fn resolve(&self, sight: &Sight, hint: &PathHint) -> Result<Path, Rejection> {
        let arriving = sight.conn.arriving(sight.direction);
        let leaving = sight.conn.leaving(sight.direction);
        if hint.bridged {
            let tuples = (arriving, leaving);
            return bridged::resolve(&self.links, &self.fdb, sight.ifindex, tuples, hint);
        }
        let iif = hint.ingress.unwrap_or(sight.ifindex);
        // The router's interface: of a VRF, which packets are routed on, the one enslaved to it.
        let l3 = routes_for(&self.links, &self.fdb, iif, sight.ifindex)
            .map_err(|p| p.reject(Reason::IngressUnsupported))?;
        let (in_mac, arrival) =
            self.stack(l3, Frames::On(sight.ifindex), Reason::IngressUnsupported)?;
        if let Some(mac) = hint.eth_dst
            && mac != in_mac
        {
            let name = self.links.name(l3);
            let bridge =
                self.links.get(l3).is_some_and(|l| matches!(l.layer, Layer::Bridge { .. }));
            return Err(if bridge {
                // Netfilter shows us what a bridge forwards too (`br_netfilter`).
                let why = format!("frames for {mac}, not for {name} itself: bridged, not routed");
                Rejection::with_detail(Reason::IngressUnsupported, why)
            } else {
                // A neighbour that does not know yet of a new MAC address.
                let why = format!("frames for {mac}, not for {in_mac}, which is {name}'s");
                Rejection::with_detail(Reason::Busy, why)
            });
        }
        if arrival.real.ifindex != sight.ifindex {
            let why = format!("{} is above {} now", self.links.name(l3), arrival.real.name);
            return Err(Rejection::with_detail(Reason::Busy, why));
        }
        if let Some(switch) = self.switches.off(l3, leaving.is_ipv6()) {
            let why = format!("net.{} is 0", switch.replace('*', &self.links.name(l3)));
            return Err(Rejection::with_detail(Reason::NotForwarded, why));
        }
        if leaving.is_ipv6() {
            self.ipv6_of(l3)?;
        } else {
            let mut switched = self.switched.lock().unwrap_or_else(PoisonError::into_inner);
            // Not if other ones were seen before: older paths were resolved with those.
            switched.entry(l3).or_insert_with(|| self.quiet_switches(l3));
        }
        if self.ipsec.concerns(&arriving, &leaving) {
            return Err(Reason::IpsecPolicy.into());
        }
        // Of a VRF, IPv4 asks as for the netdev that is enslaved to it (`ip_rcv_finish`), IPv6 as for the VRF itself
        // (`ip6_route_input`): by both it is the VRF's table.
        let arrived = if leaving.is_ipv6() { iif } else { l3 };
        let route = self.route(&Question::of(arrived, hint.mark, &arriving, &leaving))?;
        if let Some(seen) = hint.egress
            && seen != route.egress
        {
            // A route that changed between the packet and now, or a redirect by the ruleset.
            return Err(Rejection::with_detail(
                Reason::Busy,
                format!(
                    "the packet was sent to {}, the route says {}",
                    self.links.name(seen),
                    self.links.name(route.egress)
                ),
            ));
        }
        let oif = route.egress;
        // What cannot be followed whoever the neighbour is, is told before he is asked for.
        let next_hop = route.gateway.unwrap_or(leaving.dst());
        let neighbour = self.mac_of(oif, next_hop).map_err(|e| reject(e, "neighbour look-up"))?;
        let out_of = |mac| self.stack(oif, Frames::Of(mac), Reason::EgressUnsupported);
        let unresolved = || {
            let at = format!("{next_hop} on {}", self.links.name(oif));
            Rejection::with_detail(Reason::NeighbourUnresolved, at)
        };
        let Some(neighbour) = neighbour else {
            return Err(match out_of(MacAddr::default()) {
                Err(why) if why.reason == Reason::EgressUnsupported => why,
                _ => unresolved(),
            });
        };
        let (out_mac, departure) = out_of(neighbour)?;
        let egress = departure.real.ifindex;
        let mut mtu = route.mtu.unwrap_or(u32::MAX).min(departure.mtu);
        if leaving.is_ipv6() {
            // The route's counts only where it is locked (`ip6_dst_mtu_maybe_forward`): what is below both
            // certainly passes.
            mtu = mtu.min(self.ipv6_of(oif)?.mtu.unwrap_or(u32::MAX));
        }
        Ok(Path {
            eth_dst: Some(in_mac),
            vlan: arrival.vlan,
            // A netdev above takes what the real one receives, whatever its own MTU is.
            ingress_mtu: arrival.real.mtu,
            forward: Forward {
                egress,
                vlan: departure.vlan,
                mtu,
                tuple: leaving,
                macs: Some(MacRewrite { src: out_mac, dst: neighbour }),
                egress_decides: false,
            },
            next_hop: Some(next_hop),
            iif: (iif != sight.ifindex).then_some(iif),
            oif: (oif != egress).then_some(oif),
            // No packet is longer.
            answer: u16::try_from(mtu).unwrap_or(u16::MAX),
        })
    }

    fn socket(&self) -> MutexGuard<'_, Socket> {
        self.sockets.one()
    }

    /// The MAC address that packets for a neighbour are sent to, if they can be.
    fn mac_of(&self, oif: Ifindex, next_hop: IpAddr) -> Result<Option<MacAddr>, NetlinkError> {
        if let Some(mac) = self.answers.neighbour(oif, next_hop) {
            return Ok(Some(mac));
        }
        let asked = self.answers.asking();
        let mac = neighbour::look_up(&mut self.socket(), oif, next_hop)?;
        if let Some(mac) = mac {
            self.answers.note_neighbour(asked, oif, next_hop, mac);
        }
        Ok(mac)
    }

    /// How much of a packet its route depends on.
    fn routed_by(&self, ipv6: bool) -> By {
        if self.tos.looks_closer(ipv6) {
            By::Tuple
        } else if ipv6 || self.tos.shares() {
            By::Addresses
        } else {
            By::Destination
        }
    }

    /// The route that packets have, whatever their ToS is.
    fn route(&self, question: &Question) -> Result<Route, Rejection> {
        let ipv6 = question.destination.is_ipv6();
        // In this order: who changes what it depends on counts that afterwards.
        let asked = self.answers.asking();
        let by = self.routed_by(ipv6);
        if let Some(route) = self.answers.route(question, by) {
            return Ok(route);
        }
        let mut socket = self.socket();
        let mut request = RouteMessage::default();
        let (family, bits) =
            if ipv6 { (AddressFamily::Inet6, 128) } else { (AddressFamily::Inet, 32) };
        request.header.address_family = family;
        request.header.destination_prefix_length = bits;
        request.header.source_prefix_length = bits;
        let (proto, sport, dport) = question.rest;
        request.attributes = vec![
            RouteAttribute::Destination(RouteAddress::from(question.destination)),
            RouteAttribute::Source(RouteAddress::from(question.source)),
            RouteAttribute::Iif(question.arrived.get()),
            RouteAttribute::IpProto(proto),
            RouteAttribute::Sport(sport),
            RouteAttribute::Dport(dport),
        ];
        let route = self.route_of_all(&mut socket, &request, question.mark)?;
        let unasked = *self.unasked.lock().unwrap_or_else(PoisonError::into_inner);
        let by_policy =
            unasked[usize::from(ipv6)].map(|by| (by, "net.*.fib_multipath_hash_policy"));
        let by_idleness = || {
            let resilient = self.resilient.load(Ordering::Relaxed);
            resilient.then_some(("how idle a flow is", "a resilient group, `ip nexthop`"))
        };
        if let Some((by, see)) = by_policy.or_else(by_idleness)
            && self.has_next_hops(&mut socket, &request, question.mark)?
        {
            let why = format!(
                "the route has several next hops, and {by} chooses among them ({})",
                see.replace('*', if ipv6 { "ipv6" } else { "ipv4" }),
            );
            return Err(Rejection::with_detail(Reason::HashRouted, why));
        }
        self.answers.note_route(asked, question, by, route);
        Ok(route)
    }

    /// The route that packets have whatever their ToS is, with each mark that they can have had when they were
    /// routed.
    fn route_of_all(
        &self,
        socket: &mut Socket,
        request: &RouteMessage,
        seen: Option<u32>,
    ) -> Result<Route, Rejection> {
        let ipv6 = request.header.address_family == AddressFamily::Inet6;
        let (marks, doubt) = match self.marks.at_routing(seen, ipv6) {
            AtRouting::Known(mark) => (vec![mark], None),
            AtRouting::AnyOf(marks, doubt) => (marks, Some(doubt)),
            AtRouting::Any(doubt) => return Err(by_mark(&doubt, TOO_MANY)),
        };
        let values = self.tos.of(ipv6);
        let Some(labels) = self.tos.flow_labels(ipv6) else {
            let why = format!("routes go by flow labels, and {TOO_MANY}");
            return Err(Rejection::with_detail(Reason::TosRouted, why));
        };
        let mut route = None;
        for mark in marks {
            let mut request = with_mark(request, mark);
            let of_mark = look_up_route(socket, &request);
            for &label in &labels {
                let labelled = with_flow_label(&request, label);
                if look_up_route(socket, &labelled).ok() != of_mark.as_ref().ok().copied() {
                    let why = format!("packets of flow label {label:#07x} have another route");
                    return Err(Rejection::with_detail(Reason::TosRouted, why));
                }
            }
            for &tos in &values {
                request.header.tos = tos;
                if look_up_route(socket, &request).ok() != of_mark.as_ref().ok().copied() {
                    let why = format!("packets of ToS {tos:#04x} have another route");
                    return Err(Rejection::with_detail(Reason::TosRouted, why));
                }
            }
            let first = route.get_or_insert_with(|| of_mark.clone());
            if let Some(doubt) = &doubt
                && first.as_ref().ok() != of_mark.as_ref().ok()
            {
                let other = format!("packets of mark {mark:#x} have another route");
                return Err(by_mark(doubt, &other));
            }
        }
        route.unwrap_or_else(|| Err(Reason::NoRoute.into()))
    }

    /// Whether the route of packets has several next hops, with one of the marks that they can have had.
    fn has_next_hops(
        &self,
        socket: &mut Socket,
        request: &RouteMessage,
        seen: Option<u32>,
    ) -> Result<bool, Rejection> {
        let ipv6 = request.header.address_family == AddressFamily::Inet6;
        let marks = match self.marks.at_routing(seen, ipv6) {
            AtRouting::Known(mark) => vec![mark],
            AtRouting::AnyOf(marks, _) => marks,
            AtRouting::Any(doubt) => return Err(by_mark(&doubt, TOO_MANY)),
        };
        for mark in marks {
            if has_next_hops(socket, with_mark(request, mark))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Notes that there is a resilient group of next hops; true when that is news. One that has gone costs a look-up
    /// where a route has several next hops, and keeps those in software.
    pub fn resilient(&self) -> bool {
        !self.resilient.swap(true, Ordering::Relaxed)
    }

    /// Looks at what the kernel tells nobody of: true when paths may be others since the last look.
    pub fn look(&self) -> bool {
        let mut seen = self.switched6.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = false;
        seen.retain(|netdev, before| {
            let now = self.quiet_switches6(*netdev);
            changed |= now != *before;
            *before = now;
            self.links.get(*netdev).is_some()
        });
        drop(seen);
        let mut switched = self.switched.lock().unwrap_or_else(PoisonError::into_inner);
        switched.retain(|netdev, before| {
            let now = self.quiet_switches(*netdev);
            changed |= now != *before;
            *before = now;
            self.links.get(*netdev).is_some()
        });
        drop(switched);
        let now = [false, true].map(unasked);
        let mut before = self.unasked.lock().unwrap_or_else(PoisonError::into_inner);
        changed |= *before != now;
        *before = now;
        changed
    }

    /// What the switches say of which nobody tells.
    fn quiet_switches(&self, netdev: Ifindex) -> [Option<String>; QUIET.len()] {
        let name = self.links.name(netdev);
        // That of `all` is added to it by the kernel.
        QUIET.map(|switch| {
            let of = |whose: &str| {
                std::fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{whose}/{switch}")).ok()
            };
            Some(of(&name)? + &of("all")?)
        })
    }

    /// IPv6's switches of a netdev that a path comes by or leads to, which are looked at from now on.
    ///
    /// # Errors
    /// IPv6 is disabled there.
    fn ipv6_of(&self, netdev: Ifindex) -> Result<Switched6, Rejection> {
        let mut seen = self.switched6.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that older paths were resolved with, if there are any: a change is found for all of them.
        let now = *seen.entry(netdev).or_insert_with(|| self.quiet_switches6(netdev));
        drop(seen);
        let name = || self.links.name(netdev);
        let why = match now {
            Switched6 { disabled: true, .. } => {
                format!("net.ipv6.conf.{}.disable_ipv6 is 1", name())
            }
            Switched6 { mtu: None, .. } => {
                format!("there is no IPv6 on {} (with an MTU below 1280 there is none)", name())
            }
            _ => return Ok(now),
        };
        Err(Rejection::with_detail(Reason::NotForwarded, why))
    }

    fn quiet_switches6(&self, netdev: Ifindex) -> Switched6 {
        let name = self.links.get(netdev).map(|l| l.name);
        let read = |switch: &str| -> Option<u32> {
            let file = format!("/proc/sys/net/ipv6/conf/{}/{switch}", name.as_ref()?);
            std::fs::read_to_string(file).ok()?.trim().parse().ok()
        };
        Switched6 { mtu: read("mtu"), disabled: read("disable_ipv6").is_some_and(|d| d != 0) }
    }

    /// The MAC address of a netdev that routes, and what stands below it.
    fn stack(
        &self,
        top: Ifindex,
        frames: Frames,
        reason: Reason,
    ) -> Result<(MacAddr, Stack), Rejection> {
        let mut stack =
            descend(&self.links, &self.fdb, top, frames).map_err(|p| p.reject(reason))?;
        match (stack.problem.take(), self.links.get(top).and_then(|l| l.mac)) {
            (Some(problem), _) => Err(problem.reject(reason)),
            (None, Some(mac)) => Ok((mac, stack)),
            (None, None) => Err(Reason::Busy.into()),
        }
    }

    /// The MAC address that packets for a neighbour are sent to now; `None`: there is none, or it cannot
    /// be told.
    pub fn neighbour(&self, ifindex: Ifindex, address: IpAddr) -> Option<MacAddr> {
        let mut socket = self.socket();
        neighbour::look_up(&mut socket, ifindex, address).ok().flatten()
    }

    /// Tells the kernel that neighbours are in use, though it does not see the packets: it probes
    /// those that have grown stale, and says so when one has moved or is gone. Those that are not the
    /// kernel's own are left alone.
    pub fn keep_neighbours(&self, used: impl IntoIterator<Item = (Ifindex, IpAddr)>) {
        let mut socket = self.socket();
        for (ifindex, address) in used {
            if let Err(e) = neighbour::keep(&mut socket, ifindex, address) {
                tracing::debug!(%ifindex, %address, "neighbour not refreshed: {e}");
            }
        }
    }

    /// Tells bridges that they have seen these senders on these of their ports, as they would have
    /// themselves had the frames not gone by rules: what they have learnt stays. Entries that are not
    /// the bridge's own are left alone.
    pub fn keep_learnt(&self, seen: &HashMap<Ifindex, Vec<(Ifindex, MacAddr)>>) {
        let mut socket = self.socket();
        for (bridge, seen) in seen {
            if let Err(e) = neighbour::keep_learnt(&mut socket, *bridge, seen) {
                tracing::debug!(%bridge, "a bridge was not told: {e}");
            }
        }
    }
}

fn reject(e: NetlinkError, what: &str) -> Rejection {
    match e {
        NetlinkError::Kernel(k) => Rejection::from(k),
        other => Rejection::with_detail(Reason::Busy, format!("{what}: {other}")),
    }
}

/// What chooses among several next hops of a route and is in no look-up, by `fib_multipath_hash_policy` of a
/// family; `None`: nothing.
fn unasked(ipv6: bool) -> Option<&'static str> {
    let family = if ipv6 { "ipv6" } else { "ipv4" };
    let file = format!("/proc/sys/net/{family}/fib_multipath_hash_policy");
    hashed(ipv6, std::fs::read_to_string(file).ok()?.trim())
}

/// The same, by the policy (`fib_multipath_hash`, `rt6_multipath_hash`).
fn hashed(ipv6: bool, policy: &str) -> Option<&'static str> {
    match (policy, ipv6) {
        // By addresses: from a packet as from a look-up.
        ("0" | "2", false) => None,
        ("0" | "2", true) => Some("the flow label"),
        // By addresses and ports, if the packet has no hash yet (`skb->l4_hash`).
        ("1", _) => Some("the hash that the netdev gave the packet"),
        // By fields, which are hashed once more when they are a packet's (`fib_multipath_custom_hash_skb`).
        _ => Some("a hash that look-ups do not have"),
    }
}

fn with_flow_label(request: &RouteMessage, label: u32) -> RouteMessage {
    let mut request = request.clone();
    let label = DefaultNla::new(RTA_FLOWLABEL, label.to_be_bytes().to_vec());
    request.attributes.push(RouteAttribute::Other(label));
    request
}

fn with_mark(request: &RouteMessage, mark: u32) -> RouteMessage {
    let mut request = request.clone();
    request.attributes.push(RouteAttribute::Mark(mark));
    request
}

/// Of marks, or of flow labels.
const TOO_MANY: &str = "rules tell more of them apart than are asked for";

/// The refusal of packets that may have another route by their mark.
fn by_mark(doubt: &Doubt, why: &str) -> Rejection {
    match doubt {
        Doubt::SetLate(by) => {
            let why = format!("{by} sets marks after the routing decision, and {why}");
            Rejection::with_detail(Reason::MarkRouted, why)
        }
        // The next packet tells.
        Doubt::Unseen => {
            let why = format!("the mark of its packets has not been seen, and {why}");
            Rejection::with_detail(Reason::Busy, why)
        }
    }
}

/// Whether the route of these packets has several next hops.
fn has_next_hops(socket: &mut Socket, mut request: RouteMessage) -> Result<bool, Rejection> {
    request.header.flags |= RouteFlags::FibMatch;
    let mut several = false;
    ask_for_route(socket, &request, |m| several |= names_next_hops(m))?;
    Ok(several)
}

/// Whether a route as it stands in the table has several of them: they are listed, or stand in a nexthop
/// object that is not shown (`net.ipv4.nexthop_compat_mode` is 0), which may be a group.
fn names_next_hops(m: &Received<'_>) -> bool {
    let has = |ty| m.attrs(ROUTE_HEADER).find_type(ty).is_some();
    has(RTA_MULTIPATH) || (has(RTA_NH_ID) && !has(RTA_OIF))
}

fn look_up_route(socket: &mut Socket, request: &RouteMessage) -> Result<Route, Rejection> {
    let mut answer: Option<Result<Route, Rejection>> = None;
    ask_for_route(socket, request, |m| answer = Some(parse_route(m)))?;
    answer.unwrap_or_else(|| Err(Reason::NoRoute.into()))
}

fn ask_for_route(
    socket: &mut Socket,
    request: &RouteMessage,
    mut each: impl FnMut(&Received<'_>),
) -> Result<(), Rejection> {
    let seq = socket.next_seq();
    let mut buf = Vec::new();
    let mut payload = vec![0; request.buffer_len()];
    request.emit(&mut payload);
    let mut m = Message::new(&mut buf, RTM_GETROUTE, REQUEST | ACK, seq);
    m.raw(&payload);
    m.finish();
    // As a batch of one: answer and acknowledgement come in one read.
    let answered = socket.batch_with(&buf, seq, 1, |_, m| {
        if m.ty == RTM_NEWROUTE {
            each(&m);
        }
    });
    answered.and_then(|acks| acks.into_iter().try_for_each(|ack| Ok(ack?))).map_err(|e| match e {
        // EHOSTUNREACH, ENETUNREACH, EACCES (prohibit), EINVAL (blackhole, martian source),
        // EXDEV (reverse-path filter): the kernel would not forward the packet.
        NetlinkError::Kernel(k) => {
            Rejection { reason: Reason::NoRoute, errno: Some(k.errno), detail: k.extack }
        }
        other => reject(other, "route look-up"),
    })
}

fn parse_route(m: &Received<'_>) -> Result<Route, Rejection> {
    let message = RouteMessage::parse(m.payload)
        .map_err(|e| Rejection::with_detail(Reason::NoRoute, format!("route answer: {e}")))?;
    match message.header.kind {
        RouteType::Unicast => {}
        RouteType::Local | RouteType::Broadcast | RouteType::Anycast | RouteType::Multicast => {
            let kind = format!("{:?}", message.header.kind).to_lowercase();
            return Err(Rejection::with_detail(Reason::NotForwarded, format!("a {kind} route")));
        }
        kind => {
            return Err(Rejection::with_detail(Reason::NoRoute, format!("a {kind:?} route")));
        }
    }
    let (mut egress, mut gateway, mut mtu) = (None, None, None);
    for a in &message.attributes {
        match a {
            RouteAttribute::Oif(index) => egress = Ifindex::new(*index),
            RouteAttribute::Gateway(RouteAddress::Inet(a))
            | RouteAttribute::Via(RouteVia::Inet(a)) => gateway = Some(IpAddr::from(*a)),
            RouteAttribute::Gateway(RouteAddress::Inet6(a))
            | RouteAttribute::Via(RouteVia::Inet6(a)) => gateway = Some(IpAddr::from(*a)),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|m| match m {
                    RouteMetric::Mtu(mtu) if *mtu > 0 => Some(*mtu),
                    _ => None,
                });
            }
            RouteAttribute::EncapType(_) | RouteAttribute::Encap(_) => {
                let why = "the route encapsulates (lightweight tunnel)";
                return Err(Rejection::with_detail(Reason::EgressUnsupported, why));
            }
            _ => {}
        }
    }
    let egress = egress.ok_or(Reason::NoRoute)?;
    Ok(Route { egress, gateway, mtu })
}

#[cfg(test)]
mod tests {
    use netdev_providers::netlink::MessageIter;

    use super::*;

    #[test]
    fn what_chooses_among_next_hops_can_be_asked_where_it_is_addresses_alone() {
        for policy in ["0", "2"] {
            assert_eq!(hashed(false, policy), None, "{policy}");
            assert_eq!(hashed(true, policy), Some("the flow label"), "{policy}");
        }
        for ipv6 in [false, true] {
            assert!(hashed(ipv6, "1").is_some_and(|by| by.contains("netdev")));
            assert!(hashed(ipv6, "3").is_some() && hashed(ipv6, "?").is_some());
        }
    }

    #[test]
    fn next_hops_are_listed_or_stand_in_an_object_that_is_not_shown() {
        let names = |attributes: &[u16]| {
            let mut buf = Vec::new();
            let mut m = Message::new(&mut buf, RTM_NEWROUTE, 0, 0);
            m.raw(&[0; ROUTE_HEADER]);
            for ty in attributes {
                m.u32(*ty, 1);
            }
            m.finish();
            names_next_hops(&MessageIter::new(&buf).next().unwrap())
        };
        assert!(!names(&[RTA_OIF]) && !names(&[RTA_NH_ID, RTA_OIF]) && !names(&[]));
        assert!(names(&[RTA_MULTIPATH]) && names(&[RTA_NH_ID, RTA_MULTIPATH]));
        assert!(names(&[RTA_NH_ID]));
    }
}
