//! Link, neighbour, route and address events, those of switches and of IPsec's policies. `rtnetlink` runs on a single-threaded runtime on a
//! thread of its own; what matters goes into a channel, in the order of the kernel.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt};
use netdev_providers::netlink::socket::{DUMP, REQUEST};
use netdev_providers::netlink::tc::{self, TcEvent};
use netdev_providers::netlink::{Family, Message, NetlinkError, Socket};
use netdev_providers::{Ifindex, MacAddr};
use netlink_packet_core::{NetlinkPayload, Nla};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage, LinkProtoInfoBridge};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::MulticastGroup;
use rtnetlink::sys::AsyncSocket;
use rtnetlink::sys::protocols::{NETLINK_ROUTE, NETLINK_XFRM};
use tokio::sync::oneshot;

use super::events::Events;
use super::fdb::Behind;
use super::links::{BridgePort, Link};
use super::marks::{self, Mark};
use super::switches::{RTM_GETNETCONF, SwitchEvent};
use super::tolerant::Tolerant;
use super::tos::{self, Told};
use super::{ipsec, nexthops, switches};

/// Something changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetEvent {
    /// A netdev is there, or something of it changed.
    Link(Link),
    /// A netdev is gone.
    LinkGone(Ifindex),
    /// A neighbour has (now) this MAC address; `None`: it is gone or unreachable.
    Neighbour {
        /// On which netdev.
        ifindex: Ifindex,
        /// Its address.
        address: IpAddr,
        /// Where packets for it are to be sent.
        mac: Option<MacAddr>,
    },
    /// A bridge has (now) learnt this MAC address there; `None`: it is forgotten.
    Learnt {
        /// Which bridge.
        bridge: Ifindex,
        /// The address.
        mac: MacAddr,
        /// Where frames for it are sent.
        behind: Option<Behind>,
    },
    /// What a port of a bridge may do.
    BridgePort(Ifindex, BridgePort),
    /// A switch of forwarding, or another one that routing obeys, changed or is read.
    Switch(SwitchEvent),
    /// What a rule or a route tells from others: a value of the ToS, a flow label, flows that it shares out.
    Told(Told),
    /// A mark that a rule tells from others.
    Mark(Mark),
    /// There is a resilient group of next hops.
    Resilient,
    /// IPsec's policies changed, or are to be read.
    Policies,
    /// Others have done something at the ingress hook of a netdev: a qdisc, a filter in front of rules; `None`:
    /// of which one is not known.
    Ingress(Option<Ifindex>),
    /// Others have done something where packets leave: a qdisc, filters.
    Egress,
    /// Routes to this prefix changed: for a rule and for an address, to the whole of its family.
    Routes((IpAddr, u8)),
    /// Events were lost: everything may have changed. The links that there are follow as
    /// [`Link`](Self::Link), then [`Synced`](Self::Synced).
    Lost,
    /// The links that there are have all been sent.
    Synced,
}

/// How often in a row it is tried to listen anew.
const TRIES: u32 = 5;
/// Who has listened for so long has listened.
const LISTENED: Duration = Duration::from_secs(10);

/// Runs until `stop` is signalled or nobody listens any more. Sends all links first.
///
/// # Errors
/// When the runtime cannot be set up; when the sockets cannot, or the links cannot be dumped, or events cannot be
/// received, several times in a row.
pub fn run(
    events: &Sender<NetEvent>,
    tc_prio: u16,
    mut stop: oneshot::Receiver<()>,
) -> io::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    runtime.block_on(async {
        let mut failed = 0;
        loop {
            let began = Instant::now();
            let ended = tokio::select! {
                ended = listen(events, tc_prio) => ended,
                _ = &mut stop => return Ok(()),
            };
            // Whatever flooded us is given a moment; the kernel's state is read anew.
            let pause = match ended {
                Ok(Ended::NobodyListens) => return Ok(()),
                Ok(Ended::Lost) => {
                    failed = 0;
                    Duration::from_millis(20)
                }
                Err(e) => {
                    failed = if began.elapsed() >= LISTENED { 1 } else { failed + 1 };
                    if failed >= TRIES {
                        return Err(e);
                    }
                    tracing::error!("rtnetlink events: {e}; listening anew");
                    Duration::from_millis(100)
                }
            };
            if events.send(NetEvent::Lost).is_err() {
                return Ok(());
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = &mut stop => return Ok(()),
            }
        }
    })
}

enum Ended {
    NobodyListens,
    Lost,
}

/// Events during the dump queue up in the same socket, so nothing is missed between the two.
async fn listen(events: &Sender<NetEvent>, tc_prio: u16) -> io::Result<Ended> {
    const RCVBUF: usize = 4 << 20;
    let (mut connection, handle, mut messages) =
        rtnetlink::new_multicast_connection_with_socket::<Tolerant>(&[
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
        ])?;
    let [v4, v6] = switches::GROUPS;
    let others = Events::open(NETLINK_ROUTE, &[nexthops::GROUP, v4, v6])?;
    let ingress =
        Events::open_filtered(NETLINK_ROUTE, tc::GROUP, |s| tc::listen(s, tc_prio, None))?;
    let policies = match Events::open(NETLINK_XFRM, &[ipsec::GROUP]) {
        Ok(policies) => Some(policies),
        // Without IPsec, or without what tells of it (`xfrm_user`): nobody can make a policy.
        Err(e) if e.raw_os_error() == Some(libc::EPROTONOSUPPORT) => None,
        Err(e) => return Err(e),
    };
    let sockets = [connection.socket_mut().socket_ref(), others.socket(), ingress.socket()];
    for socket in sockets.into_iter().chain(policies.as_ref().map(Events::socket)) {
        // The limit of net.core.rmem_max is what we get without CAP_NET_ADMIN; loss is noticed.
        let _ = setsockopt(socket, sockopt::RcvBufForce, &RCVBUF);
    }
    let connection = tokio::spawn(connection);
    let ended = async {
        if events.send(NetEvent::Policies).is_err() || !send_switches(events)? {
            return Ok(Ended::NobodyListens);
        }
        // Who does not listen any more is found below.
        tos::read(|told| drop(events.send(NetEvent::Told(told))))?;
        let (group, resilient) = nexthops::groups()?;
        let shared = group.then_some(NetEvent::Told(Told::Shared));
        let mut told = shared.into_iter().chain(resilient.then_some(NetEvent::Resilient));
        if told.any(|event| events.send(event).is_err()) {
            return Ok(Ended::NobodyListens);
        }
        marks::read(|mark| drop(events.send(NetEvent::Mark(mark))))?;
        let mut links = handle.link().get().execute();
        while let Some(link) = links.try_next().await.map_err(io::Error::other)? {
            if !send_link(events, &link) {
                return Ok(Ended::NobodyListens);
            }
        }
        let mut learnt =
            handle.neighbours().get().set_address_family(AddressFamily::Bridge).execute();
        while let Some(entry) = learnt.next().await {
            match entry {
                Ok(entry) if fdb_entry(&entry, false).is_some_and(|e| events.send(e).is_err()) => {
                    return Ok(Ended::NobodyListens);
                }
                Ok(_) => {}
                // A namespace without any netdev that could have entries.
                Err(e) => {
                    tracing::debug!("reading the forwarding databases: {e}");
                    break;
                }
            }
        }
        if events.send(NetEvent::Synced).is_err() {
            return Ok(Ended::NobodyListens);
        }
        loop {
            let somebody_listens = tokio::select! {
                message = messages.next() => match message {
                    None => return Ok(Ended::Lost),
                    Some((_, from)) if from.port_number() != 0 => true, // not the kernel
                    Some((message, _)) => match message.payload {
                        NetlinkPayload::Overrun(_) => return Ok(Ended::Lost),
                        NetlinkPayload::InnerMessage(m) => translate(events, &m),
                        _ => true,
                    },
                },
                datagram = others.next() => match datagram {
                    Ok(datagram) if datagram.messages().any(|m| switches::is_unreadable(&m)) => {
                        return Ok(Ended::Lost);
                    }
                    Ok(datagram) => datagram.messages().all(|m| {
                        if let Some(switch) = SwitchEvent::parse(&m) {
                            return events.send(NetEvent::Switch(switch)).is_ok();
                        }
                        let shared = nexthops::is_group(&m).then_some(NetEvent::Told(Told::Shared));
                        let resilient = nexthops::is_resilient(&m).then_some(NetEvent::Resilient);
                        if shared.into_iter().chain(resilient).any(|e| events.send(e).is_err()) {
                            return false;
                        }
                        // An object of one family can be that of the other's routes.
                        !nexthops::tells_of_one(m.ty)
                            || [AddressFamily::Inet, AddressFamily::Inet6]
                                .into_iter()
                                .filter_map(whole)
                                .all(|prefix| events.send(NetEvent::Routes(prefix)).is_ok())
                    }),
                    Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => return Ok(Ended::Lost),
                    Err(e) => return Err(e),
                },
                datagram = ingress.next() => match datagram {
                    Ok(datagram) => datagram.messages().filter_map(|m| TcEvent::parse(&m)).all(|e| {
                        let ingress = NetEvent::Ingress(Some(e.ifindex));
                        (!e.change.is_at_ingress() || events.send(ingress).is_ok())
                            && (!e.change.is_at_egress() || events.send(NetEvent::Egress).is_ok())
                    }),
                    Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {
                        events.send(NetEvent::Ingress(None)).is_ok()
                            && events.send(NetEvent::Egress).is_ok()
                    }
                    Err(e) => return Err(e),
                },
                datagram = changed(policies.as_ref()) => match datagram {
                    Ok(()) => events.send(NetEvent::Policies).is_ok(),
                    Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => return Ok(Ended::Lost),
                    Err(e) => return Err(e),
                },
            };
            if !somebody_listens {
                return Ok(Ended::NobodyListens);
            }
        }
    }
    .await;
    connection.abort();
    ended
}

/// Whatever a message of this group tells: all policies are read anew.
async fn changed(policies: Option<&Events>) -> io::Result<()> {
    match policies {
        Some(policies) => policies.next().await.map(|_| ()),
        None => std::future::pending().await,
    }
}

/// All switches as they are. False when nobody listens any more.
fn send_switches(events: &Sender<NetEvent>) -> io::Result<bool> {
    let mut socket = Socket::open(Family::Route).map_err(io::Error::other)?;
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut tries = 0;
        loop {
            let (mut buf, seq) = (Vec::new(), socket.next_seq());
            let mut m = Message::new(&mut buf, RTM_GETNETCONF, REQUEST | DUMP, seq);
            m.raw(&[u8::try_from(family).unwrap_or(0), 0, 0, 0]);
            m.finish();
            let mut somebody_listens = true;
            let dumped = socket.dump(&buf, seq, |m| {
                if let Some(switch) = SwitchEvent::parse(&m) {
                    somebody_listens &= events.send(NetEvent::Switch(switch)).is_ok();
                }
            });
            tries += 1;
            match dumped {
                _ if !somebody_listens => return Ok(false),
                Err(NetlinkError::Interrupted) if tries < 10 => {}
                // A kernel without IPv6.
                Err(NetlinkError::Kernel(_)) if family == libc::AF_INET6 => break,
                Ok(()) => break,
                Err(e) => return Err(io::Error::other(e)),
            }
        }
    }
    Ok(true)
}

fn send_link(events: &Sender<NetEvent>, m: &LinkMessage) -> bool {
    Link::from_message(m).is_none_or(|link| events.send(NetEvent::Link(link)).is_ok())
}

/// False when nobody listens any more.
fn translate(events: &Sender<NetEvent>, message: &RouteNetlinkMessage) -> bool {
    let named = match message {
        RouteNetlinkMessage::NewRule(m) => tos::of_rule(m),
        RouteNetlinkMessage::NewRoute(m) => tos::of_route(m),
        _ => Vec::new(),
    };
    let mark = match message {
        RouteNetlinkMessage::NewRule(m) => marks::of_rule(m),
        _ => None,
    };
    if mark.is_some_and(|mark| events.send(NetEvent::Mark(mark)).is_err()) {
        return false;
    }
    // Before the change itself: the routes that it concerns are then asked for by these too.
    if named.into_iter().any(|told| events.send(NetEvent::Told(told)).is_err()) {
        return false;
    }
    let event = match message {
        // A bridge announces its ports with AF_BRIDGE too: those are not about the netdev itself,
        // but about its being a port.
        RouteNetlinkMessage::NewLink(m) if u8::from(m.header.interface_family) != 0 => {
            bridge_port(m)
        }
        RouteNetlinkMessage::DelLink(m) if u8::from(m.header.interface_family) != 0 => None,
        RouteNetlinkMessage::NewLink(m) => return send_link(events, m),
        RouteNetlinkMessage::DelLink(m) => Ifindex::new(m.header.index).map(NetEvent::LinkGone),
        RouteNetlinkMessage::NewNeighbour(m) if m.header.family == AddressFamily::Bridge => {
            fdb_entry(m, false)
        }
        RouteNetlinkMessage::DelNeighbour(m) if m.header.family == AddressFamily::Bridge => {
            fdb_entry(m, true)
        }
        RouteNetlinkMessage::NewNeighbour(m) => neighbour(m, false),
        RouteNetlinkMessage::DelNeighbour(m) => neighbour(m, true),
        RouteNetlinkMessage::NewRoute(m) | RouteNetlinkMessage::DelRoute(m) => {
            prefix(m).map(NetEvent::Routes)
        }
        RouteNetlinkMessage::NewRule(m) | RouteNetlinkMessage::DelRule(m) => {
            whole(m.header.family).map(NetEvent::Routes)
        }
        RouteNetlinkMessage::NewAddress(m) | RouteNetlinkMessage::DelAddress(m) => {
            whole(m.header.family).map(NetEvent::Routes)
        }
        _ => None,
    };
    event.is_none_or(|e| events.send(e).is_ok())
}

/// The state of a bridge's port (`br_ifinfo_notify`).
fn bridge_port(m: &LinkMessage) -> Option<NetEvent> {
    // linux/if_link.h: IFLA_BRPORT_*
    const STATE: u16 = 1;
    const MODE: u16 = 4;
    const ISOLATED: u16 = 33;
    const LOCKED: u16 = 39;
    const BR_STATE_FORWARDING: u8 = 3;
    let ifindex = Ifindex::new(m.header.index)?;
    m.attributes.iter().find_map(|a| {
        let LinkAttribute::ProtoInfoBridge(infos) = a else { return None };
        let byte = |kind| {
            infos.iter().find_map(|i| match i {
                LinkProtoInfoBridge::Other(nla) if nla.kind() == kind && nla.value_len() == 1 => {
                    let mut value = [0];
                    nla.emit_value(&mut value);
                    Some(value[0])
                }
                _ => None,
            })
        };
        let is_set = |kind| byte(kind).is_some_and(|b| b != 0);
        let port = BridgePort {
            forwarding: byte(STATE)? == BR_STATE_FORWARDING,
            isolated: is_set(ISOLATED),
            hairpin: is_set(MODE),
            locked: is_set(LOCKED),
        };
        Some(NetEvent::BridgePort(ifindex, port))
    })
}

/// An entry of a bridge's forwarding database, unless it is one for a single VLAN, or one of a
/// netdev's own list of addresses.
fn fdb_entry(m: &NeighbourMessage, gone: bool) -> Option<NetEvent> {
    if m.header.flags.contains(NeighbourFlags::Own) {
        return None;
    }
    let (mut bridge, mut mac) = (None, None);
    for a in &m.attributes {
        match a {
            NeighbourAttribute::Controller(index) => bridge = Ifindex::new(*index),
            NeighbourAttribute::LinkLayerAddress(b) => {
                mac = b.as_slice().try_into().ok().map(MacAddr);
            }
            NeighbourAttribute::Vlan(_) => return None,
            _ => {}
        }
    }
    let (bridge, port) = (bridge?, Ifindex::new(m.header.ifindex)?);
    // Of the bridge's own addresses, and those of its ports (`BR_FDB_LOCAL`).
    let own = port == bridge || m.header.state == NeighbourState::Permanent;
    let behind = if own { Behind::Itself } else { Behind::Port(port) };
    Some(NetEvent::Learnt { bridge, mac: mac?, behind: (!gone).then_some(behind) })
}

fn neighbour(m: &NeighbourMessage, gone: bool) -> Option<NetEvent> {
    let ifindex = Ifindex::new(m.header.ifindex)?;
    let address = m.attributes.iter().find_map(|a| match a {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => Some(IpAddr::from(*a)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => Some(IpAddr::from(*a)),
        _ => None,
    })?;
    let mac = if gone { None } else { usable_mac(m) };
    Some(NetEvent::Neighbour { ifindex, address, mac })
}

/// The MAC address of a neighbour that packets may be sent to (`NUD_VALID`).
fn usable_mac(m: &NeighbourMessage) -> Option<MacAddr> {
    let valid = matches!(
        m.header.state,
        NeighbourState::Reachable
            | NeighbourState::Stale
            | NeighbourState::Delay
            | NeighbourState::Probe
            | NeighbourState::Noarp
            | NeighbourState::Permanent
    );
    m.attributes.iter().filter(|_| valid).find_map(|a| match a {
        NeighbourAttribute::LinkLayerAddress(b) => b.as_slice().try_into().ok().map(MacAddr),
        _ => None,
    })
}

/// Where a route leads to. A default route has no attribute for it.
fn prefix(m: &RouteMessage) -> Option<(IpAddr, u8)> {
    let length = m.header.destination_prefix_length;
    let destination = m.attributes.iter().find_map(|a| match a {
        RouteAttribute::Destination(RouteAddress::Inet(a)) => Some((IpAddr::from(*a), length)),
        RouteAttribute::Destination(RouteAddress::Inet6(a)) => Some((IpAddr::from(*a), length)),
        _ => None,
    });
    destination.or_else(|| whole(m.header.address_family))
}

/// All addresses of a family. Of families without (MPLS) nothing that we do depends.
fn whole(family: AddressFamily) -> Option<(IpAddr, u8)> {
    match family {
        AddressFamily::Inet => Some((Ipv4Addr::UNSPECIFIED.into(), 0)),
        AddressFamily::Inet6 => Some((Ipv6Addr::UNSPECIFIED.into(), 0)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::DefaultNla;
    use netlink_packet_route::address::AddressMessage;

    use super::*;

    #[test]
    fn what_a_port_of_a_bridge_may_do_is_read() {
        let port = |attributes: &[(u16, u8)]| {
            let mut m = LinkMessage::default();
            m.header.interface_family = AddressFamily::Bridge;
            m.header.index = 7;
            let nla = |(kind, value): &(u16, u8)| {
                LinkProtoInfoBridge::Other(DefaultNla::new(*kind, vec![*value]))
            };
            let infos = attributes.iter().map(nla).collect();
            m.attributes = vec![LinkAttribute::ProtoInfoBridge(infos)];
            bridge_port(&m)
        };
        let event = |port| Some(NetEvent::BridgePort(Ifindex::new(7).unwrap(), port));
        let default = BridgePort::default();
        assert_eq!(port(&[(1, 3), (4, 0), (33, 0), (39, 0)]), event(default));
        assert_eq!(port(&[(1, 1)]), event(BridgePort { forwarding: false, ..default }));
        assert_eq!(port(&[(1, 3), (4, 1)]), event(BridgePort { hairpin: true, ..default }));
        assert_eq!(port(&[(1, 3), (33, 1)]), event(BridgePort { isolated: true, ..default }));
        assert_eq!(port(&[(1, 3), (39, 1)]), event(BridgePort { locked: true, ..default }));
        // Not about the port itself: its VLANs.
        assert_eq!(port(&[]), None);
    }

    #[test]
    fn a_change_concerns_its_own_family() {
        let routes = |message| {
            let (tx, rx) = std::sync::mpsc::channel();
            assert!(translate(&tx, &message));
            match rx.try_recv() {
                Ok(NetEvent::Routes(prefix)) => Some(prefix),
                Ok(other) => panic!("{other:?}"),
                Err(_) => None,
            }
        };
        let route = |family, length, attributes: &[RouteAttribute]| {
            let mut m = RouteMessage::default();
            m.header.address_family = family;
            m.header.destination_prefix_length = length;
            m.attributes = attributes.to_vec();
            routes(RouteNetlinkMessage::NewRoute(m))
        };
        let address = |family| {
            let mut m = AddressMessage::default();
            m.header.family = family;
            routes(RouteNetlinkMessage::NewAddress(m))
        };
        let all = |a: &str| Some((a.parse().unwrap(), 0));
        let network = RouteAttribute::Destination(RouteAddress::Inet([10, 0, 0, 0].into()));
        let prefix = Some(("10.0.0.0".parse().unwrap(), 8));
        assert_eq!(route(AddressFamily::Inet, 8, &[network]), prefix);
        assert_eq!(route(AddressFamily::Inet6, 0, &[]), all("::"));
        assert_eq!(address(AddressFamily::Inet), all("0.0.0.0"));
        assert_eq!(address(AddressFamily::Inet6), all("::"));
        assert_eq!(route(AddressFamily::Mpls, 20, &[]), None);
    }
}
