//! By which netdev the router reaches an address: for who wants to know where a connection's packets come from that
//! nobody has seen yet. Without marks, ToS and policies, so an answer for people, and none that rules are made from.

use std::net::IpAddr;

use netdev_providers::Ifindex;
use netdev_providers::netlink::socket::{ACK, REQUEST};
use netdev_providers::netlink::{Family, Message, NetlinkError, Socket};
use netlink_packet_core::{Emitable, Parseable};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};

const RTM_GETROUTE: u16 = 26;

/// Where an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Towards {
    /// It is the router's own, or a broadcast or multicast address.
    Local,
    /// Behind this netdev.
    By(Ifindex),
    /// The router knows no way there.
    Nowhere,
}

/// Asks the kernel, in the network namespace of the calling thread.
///
/// # Errors
/// A failure of the socket or of the exchange.
pub fn towards(address: IpAddr) -> Result<Towards, NetlinkError> {
    let mut socket = Socket::open(Family::Route)?;
    let (family, bits) =
        if address.is_ipv6() { (AddressFamily::Inet6, 128) } else { (AddressFamily::Inet, 32) };
    let mut request = RouteMessage::default();
    request.header.address_family = family;
    request.header.destination_prefix_length = bits;
    request.attributes.push(RouteAttribute::Destination(RouteAddress::from(address)));
    let mut payload = vec![0; request.buffer_len()];
    request.emit(&mut payload);
    let (seq, mut buf) = (socket.next_seq(), Vec::new());
    let mut m = Message::new(&mut buf, RTM_GETROUTE, REQUEST | ACK, seq);
    m.raw(&payload);
    m.finish();
    let mut found = Towards::Nowhere;
    let asked = socket.request(&buf, seq, |m| {
        if let Ok(route) = RouteMessage::parse(m.payload) {
            found = of_route(&route);
        }
    });
    match asked {
        Ok(()) => Ok(found),
        // ENETUNREACH, EHOSTUNREACH, EACCES, EINVAL: unreachable, prohibit, blackhole.
        Err(NetlinkError::Kernel(_)) => Ok(Towards::Nowhere),
        Err(e) => Err(e),
    }
}

fn of_route(route: &RouteMessage) -> Towards {
    let oif = route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Oif(oif) => Ifindex::new(*oif),
        _ => None,
    });
    match (route.header.kind, oif) {
        (RouteType::Unicast, Some(oif)) => Towards::By(oif),
        (
            RouteType::Local | RouteType::Broadcast | RouteType::Anycast | RouteType::Multicast,
            _,
        ) => Towards::Local,
        _ => Towards::Nowhere,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_addresses_are_the_routers_own() {
        assert_eq!(towards("127.0.0.1".parse().unwrap()).unwrap(), Towards::Local);
    }
}
