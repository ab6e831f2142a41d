//! What a provider is asked to offload: which packets, and what is done to them.

use super::reason::{Reason, Rejection};
use super::types::{Direction, Ifindex, MacAddr, Tuple, VlanId, Zone};

/// The packets of one direction of one connection, as they arrive on the port.
///
/// A provider must match **exactly** these and leave to the slow path whatever it cannot tell
/// apart: fragments, packets with IPv4 options or IPv6 extension headers, TTL or hop limit 0 and 1,
/// TCP packets with SYN, FIN or RST, packets longer than [`Forward::mtu`], frames with another VLAN
/// tag than [`vlan`](Self::vlan), with one more, or with one where there should be none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowMatch {
    /// Destination MAC address the packets carry: the port's own, where they are routed; where they
    /// are bridged, the receiver's. `None`: any.
    pub eth_dst: Option<MacAddr>,
    /// The one 802.1Q tag they carry (with whatever priority); `None`: they are not tagged.
    pub vlan: Option<VlanId>,
    /// Addresses and ports on arrival.
    pub tuple: Tuple,
}

/// New Ethernet addresses of a routed packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacRewrite {
    /// The egress netdev's.
    pub src: MacAddr,
    /// The next hop's.
    pub dst: MacAddr,
}

/// Where the packets go and what they look like when they leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// The netdev to send on. It need not be a port.
    pub egress: Ifindex,
    /// The 802.1Q tag they leave with, with priority 0; the one they arrived with is taken off.
    /// `None`: they leave untagged.
    pub vlan: Option<VlanId>,
    /// The longest IP packet, in bytes, that may be sent on this path: the smaller of the egress
    /// netdev's MTU and the route's.
    pub mtu: u32,
    /// Addresses and ports on departure: where they differ from [`FlowMatch::tuple`], that is NAT.
    pub tuple: Tuple,
    /// New MAC addresses, and with them one taken off the TTL or hop limit: a routed packet.
    /// `None`: a bridged one, left as it is.
    pub macs: Option<MacRewrite>,
    /// Something stands where packets leave the egress netdev and decides about them: a queueing discipline
    /// that shapes or classifies, filters or programs at its egress. A rule must give packets to it, as the
    /// kernel's `dev_queue_xmit` does; one that would send them past it (in a NIC, by XDP) is to be refused,
    /// with [`Reason::OthersAtEgress`].
    pub egress_decides: bool,
}

/// The netdevs that route the packets (of bridged ones, the ports of the bridge), where they are not
/// those that the packets pass but stand above them: VLAN devices, bridges, bonds. For backends that
/// select what the kernel routes; a rule on the netdev needs nothing of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Above {
    /// Above the port, on arrival. `None`: it is the port.
    pub iif: Option<Ifindex>,
    /// Above [`Forward::egress`], on departure. `None`: it is that.
    pub oif: Option<Ifindex>,
}

/// One direction of one connection on one port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The connection's zone.
    pub zone: Zone,
    /// Which of its directions.
    pub direction: Direction,
    /// The longest IP packet, in bytes, that can arrive on the port.
    pub ingress_mtu: u32,
    /// Which packets.
    pub matches: FlowMatch,
    /// What is done to them.
    pub forward: Forward,
    /// Who routes them.
    pub above: Above,
}

/// One direction of one connection on one port, of which the backend is only to **keep track**: packets
/// that match are known to be of this connection, in its state, and go on through whatever else the
/// datapath has put there, which decides where they go (`rte_flow`'s conntrack, say). So nothing is said
/// of an egress, of MAC addresses or a TTL.
///
/// What a provider must leave to the slow path is said at [`FlowMatch`]; there is no MTU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tracked {
    /// The connection's zone.
    pub zone: Zone,
    /// Which of its directions.
    pub direction: Direction,
    /// Which packets.
    pub matches: FlowMatch,
    /// Addresses and ports that the connection gives them: where they differ from
    /// [`FlowMatch::tuple`], that is NAT, which is the rule's to do.
    pub tuple: Tuple,
}

impl Tracked {
    /// What a backend answers whose rules forward, and do nothing less.
    #[must_use]
    pub fn unsupported() -> Rejection {
        let why = "a rule of this backend forwards: it does not only keep track";
        Rejection::with_detail(Reason::Unsupported, why)
    }
}

impl Flow {
    /// Refuses what leads to a port that the kernel has no netdev for: a backend of the kernel's cannot
    /// redirect there.
    ///
    /// # Errors
    /// [`Reason::EgressUnsupported`], or [`Reason::IngressUnsupported`].
    pub fn check_netdevs(&self) -> Result<(), Rejection> {
        let is_local = |netdev: Option<Ifindex>| netdev.is_some_and(|n| !n.is_netdev());
        let reason = if is_local(Some(self.forward.egress)) || is_local(self.above.oif) {
            Reason::EgressUnsupported
        } else if is_local(self.above.iif) {
            Reason::IngressUnsupported
        } else {
            return Ok(());
        };
        Err(Rejection::with_detail(reason, "a port of the datapath's own, and no netdev"))
    }

    /// True when addresses or ports change on the way.
    #[must_use]
    pub fn has_nat(&self) -> bool {
        self.matches.tuple != self.forward.tuple
    }

    /// Refuses what has to leave through the kernel's queueing disciplines and hooks: for rules that send packets
    /// past them. `rules` says of which that is so.
    ///
    /// # Errors
    /// [`Reason::OthersAtEgress`].
    pub fn check_egress(&self, rules: &str) -> Result<(), Rejection> {
        if !self.forward.egress_decides {
            return Ok(());
        }
        let why = format!(
            "{rules} would pass by what stands at the egress of the netdev that the packets leave by"
        );
        Err(Rejection::with_detail(Reason::OthersAtEgress, why))
    }

    /// True when the packets are IPv4, and a router forwards them: `ip_forward` is what is done to them.
    #[must_use]
    pub const fn is_routed_ipv4(&self) -> bool {
        self.forward.macs.is_some() && !self.matches.tuple.is_ipv6()
    }

    /// True when packets can arrive that are longer than may be sent.
    #[must_use]
    pub const fn may_exceed_mtu(&self) -> bool {
        self.ingress_mtu > self.forward.mtu
    }

    /// True when the packets carry a VLAN tag, on arrival or on departure.
    #[must_use]
    pub const fn has_vlan(&self) -> bool {
        self.matches.vlan.is_some() || self.forward.vlan.is_some()
    }
}
