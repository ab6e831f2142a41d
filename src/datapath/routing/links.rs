//! The netdevs of the network namespace, each with what stands below it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, RwLock};

use netdev_providers::{Ifindex, MacAddr};
use netlink_packet_route::link::{
    BondMode, BridgePortState, InfoBond, InfoBridge, InfoBridgePort, InfoData, InfoPortData,
    InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp,
    VlanProtocol,
};

/// One netdev.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub ifindex: Ifindex,
    /// Its present name.
    pub name: String,
    /// Its MAC address, when it is an Ethernet netdev.
    pub mac: Option<MacAddr>,
    /// Its MTU in bytes: the longest IP packet.
    pub mtu: u32,
    /// `IFF_UP`.
    pub up: bool,
    /// There is somebody at the other end of the cable (`IFF_LOWER_UP`).
    pub carrier: bool,
    /// How often that has come (`IFLA_CARRIER_UP_COUNT`): by this a carrier is known that was lost for less time than
    /// the kernel gathers such changes for (`linkwatch`).
    pub carrier_ups: u32,
    /// It is enslaved (bridge, bond, VRF …) to this netdev.
    pub controller: Option<u32>,
    /// What it may do as a port of a bridge, where it is one.
    pub port: BridgePort,
    /// What becomes of frames that are sent to it.
    pub layer: Layer,
    /// The ids of the XDP programs that see what arrives on it first.
    pub xdp: Vec<u32>,
}

/// Which frames a bridge forwards from and to one of its ports. Of a netdev that is no port: the
/// default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BridgePort {
    /// Those that it learns the way of (`BR_STATE_FORWARDING`), or none.
    pub forwarding: bool,
    /// None to other ports that are isolated too.
    pub isolated: bool,
    /// Also back out of this port.
    pub hairpin: bool,
    /// From it, those of senders only that are known to be behind it.
    pub locked: bool,
}

impl Default for BridgePort {
    fn default() -> Self {
        Self { forwarding: true, isolated: false, hairpin: false, locked: false }
    }
}

/// What a netdev does with the frames that it is given to send, and so what stands below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layer {
    /// It sends them as they are: frames can be redirected from and to it.
    Real,
    /// It puts a tag on them and gives them to the netdev below.
    Vlan {
        /// The netdev below; `None` where that is in another network namespace.
        lower: Option<Ifindex>,
        /// The tag's number, as the kernel has it.
        id: u16,
        /// The tag is one of 802.1Q, not of 802.1ad.
        dot1q: bool,
        /// A map between priorities of the tag and of the packet is set (`ip link … qos-map`).
        qos: bool,
    },
    /// It gives them to the port behind which their receiver was learnt.
    Bridge {
        /// Ports have VLANs (`vlan_filtering`).
        vlan_filtering: bool,
    },
    /// A bond in mode active-backup: gives them to its active port.
    ActiveBackup {
        /// That port, where there is one.
        active: Option<Ifindex>,
    },
    /// A VRF: packets that arrive on the netdevs that are enslaved to it are routed as if they had arrived on it, by
    /// its own table. It sends nothing itself that is forwarded.
    Vrf,
    /// It makes other frames of them (tunnels), or is another kind of port to the netdev below
    /// (macvlan).
    Other {
        /// Its kind, as `ip -d link` shows it.
        kind: String,
        /// The netdev that its frames arrive on as they are, where it is of such a kind.
        lower: Option<Ifindex>,
    },
}

/// Netdev kinds that frames can be redirected from and to as they are. (Physical devices have no
/// kind.) A bond that balances is one of them: it chooses a port for every frame that it is given.
const REAL_KINDS: [&str; 5] = ["veth", "dummy", "netdevsim", "simnic", "bond"];
/// Kinds that get frames of the netdev below unchanged, by their destination address.
const SHARING_KINDS: [&str; 4] = ["macvlan", "macvtap", "ipvlan", "ipvtap"];

impl Link {
    /// Reads a link message; `None` when it is not about a netdev of the namespace.
    #[must_use]
    pub fn from_message(m: &LinkMessage) -> Option<Self> {
        let mut link = Self {
            ifindex: Ifindex::new(m.header.index)?,
            name: String::new(),
            mac: None,
            mtu: 0,
            up: m.header.flags.contains(LinkFlags::Up),
            carrier: m.header.flags.contains(LinkFlags::LowerUp),
            carrier_ups: 0,
            controller: None,
            port: BridgePort::default(),
            layer: Layer::Real,
            xdp: Vec::new(),
        };
        let ethernet = m.header.link_layer_type == LinkLayerType::Ether
            && !m.header.flags.contains(LinkFlags::Loopback);
        let (mut lower, mut elsewhere, mut infos) = (None, false, &[][..]);
        for a in &m.attributes {
            match a {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::CarrierUpCount(count) => link.carrier_ups = *count,
                LinkAttribute::Address(bytes) if ethernet => {
                    link.mac = bytes.as_slice().try_into().ok().map(MacAddr);
                }
                LinkAttribute::Controller(index) if *index != 0 => link.controller = Some(*index),
                LinkAttribute::Link(index) => lower = Ifindex::new(*index),
                LinkAttribute::Xdp(attributes) => link.xdp = xdp_programs(attributes),
                LinkAttribute::LinkNetNsId(_) => elsewhere = true,
                LinkAttribute::LinkInfo(i) => infos = i,
                _ => {}
            }
        }
        link.layer = Layer::of(infos, lower.filter(|_| !elsewhere));
        for i in infos {
            if let LinkInfo::PortData(InfoPortData::BridgePort(attributes)) = i {
                link.port = BridgePort::of(attributes);
            }
        }
        Some(link)
    }
}

fn xdp_programs(attributes: &[LinkXdp]) -> Vec<u32> {
    let ids = attributes.iter().filter_map(|a| match a {
        LinkXdp::ProgId(id)
        | LinkXdp::DrvProgId(id)
        | LinkXdp::SkbProgId(id)
        | LinkXdp::HwProgId(id) => Some(*id),
        _ => None,
    });
    ids.collect()
}

impl BridgePort {
    fn of(attributes: &[InfoBridgePort]) -> Self {
        let mut port = Self::default();
        for a in attributes {
            match a {
                InfoBridgePort::State(s) => port.forwarding = *s == BridgePortState::Forwarding,
                InfoBridgePort::Isolated(yes) => port.isolated = *yes,
                InfoBridgePort::HairpinMode(yes) => port.hairpin = *yes,
                InfoBridgePort::Locked(yes) => port.locked = *yes,
                _ => {}
            }
        }
        port
    }
}

impl Layer {
    fn of(infos: &[LinkInfo], lower: Option<Ifindex>) -> Self {
        let kind = infos.iter().find_map(|i| match i {
            LinkInfo::Kind(kind) => Some(kind.to_string()),
            _ => None,
        });
        let Some(kind) = kind else { return Self::Real };
        let data = infos.iter().find_map(|i| match i {
            LinkInfo::Data(data) => Some(data),
            _ => None,
        });
        match data {
            Some(InfoData::Vlan(v)) => Self::vlan(v, lower),
            Some(InfoData::Bridge(b)) => Self::Bridge {
                vlan_filtering: b.iter().any(|a| matches!(a, InfoBridge::VlanFiltering(true))),
            },
            Some(InfoData::Bond(b))
                if b.iter().any(|a| matches!(a, InfoBond::Mode(BondMode::ActiveBackup))) =>
            {
                Self::ActiveBackup {
                    active: b.iter().find_map(|a| match a {
                        InfoBond::ActivePort(index) => Ifindex::new(*index),
                        _ => None,
                    }),
                }
            }
            _ if kind == "vrf" => Self::Vrf,
            _ if REAL_KINDS.contains(&kind.as_str()) => Self::Real,
            _ => {
                let lower = lower.filter(|_| SHARING_KINDS.contains(&kind.as_str()));
                Self::Other { kind, lower }
            }
        }
    }

    fn vlan(attributes: &[InfoVlan], lower: Option<Ifindex>) -> Self {
        let (mut id, mut dot1q, mut qos) = (0, false, false);
        for a in attributes {
            match a {
                InfoVlan::Id(n) => id = *n,
                InfoVlan::Protocol(p) => dot1q = *p == VlanProtocol::Ieee8021Q,
                InfoVlan::EgressQos(map) | InfoVlan::IngressQos(map) => qos |= !map.is_empty(),
                _ => {}
            }
        }
        Self::Vlan { lower, id, dot1q, qos }
    }
}

/// All netdevs, shared between the monitor, which writes, and those who resolve paths.
#[derive(Clone, Debug, Default)]
pub struct Links(Arc<RwLock<BTreeMap<Ifindex, Link>>>);

impl Links {
    /// The netdev with this index.
    #[must_use]
    pub fn get(&self, ifindex: Ifindex) -> Option<Link> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&ifindex).cloned()
    }

    /// The netdev with this name.
    #[must_use]
    pub fn by_name(&self, name: &str) -> Option<Link> {
        let links = self.0.read().unwrap_or_else(PoisonError::into_inner);
        links.values().find(|l| l.name == name).cloned()
    }

    /// The present name of a netdev, or its index where it is gone.
    #[must_use]
    pub fn name(&self, ifindex: Ifindex) -> String {
        self.get(ifindex).map_or_else(|| format!("if{ifindex}"), |l| l.name)
    }

    /// All netdevs, by index.
    #[must_use]
    pub fn all(&self) -> Vec<Link> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Stores a netdev and returns what was known of it before.
    pub fn set(&self, link: Link) -> Option<Link> {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(link.ifindex, link)
    }

    /// Forgets a netdev.
    pub fn remove(&self, ifindex: Ifindex) -> Option<Link> {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&ifindex)
    }

    /// The netdevs that can have this one below them, whichever way their frames go at present:
    /// VLAN devices on it, the bridge, the bond or the VRF that it is a port of, and what stands on those.
    #[must_use]
    pub fn above(&self, ifindex: Ifindex) -> BTreeSet<Ifindex> {
        let links = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut found = BTreeSet::new();
        let mut from = vec![ifindex];
        while let Some(lower) = from.pop() {
            let controller = links.get(&lower).and_then(|l| Ifindex::new(l.controller?));
            for link in links.values() {
                let stands_on_it = match &link.layer {
                    Layer::Vlan { lower: below, .. } | Layer::Other { lower: below, .. } => {
                        *below == Some(lower)
                    }
                    Layer::Bridge { .. } | Layer::ActiveBackup { .. } | Layer::Vrf => {
                        controller == Some(link.ifindex)
                    }
                    Layer::Real => false,
                };
                if stands_on_it && link.ifindex != ifindex && found.insert(link.ifindex) {
                    from.push(link.ifindex);
                }
            }
        }
        found
    }

    /// Whether this is a VRF.
    #[must_use]
    pub fn is_vrf(&self, ifindex: Ifindex) -> bool {
        self.get(ifindex).is_some_and(|l| l.layer == Layer::Vrf)
    }

    /// The ports of a bridge or a bond, or what is enslaved to a VRF.
    #[must_use]
    pub fn ports_of(&self, controller: Ifindex) -> Vec<Ifindex> {
        let links = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let is_port = |l: &&Link| l.controller == Some(controller.get());
        links.values().filter(is_port).map(|l| l.ifindex).collect()
    }
}
