//! The netdevs of the network namespace.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use netdev_providers::{Ifindex, MacAddr};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage};

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
    /// `IFLA_INFO_KIND`: `veth`, `bridge` …; physical devices have none.
    pub kind: Option<String>,
    /// It is enslaved (bridge, bond, VRF …) to this netdev.
    pub controller: Option<u32>,
}

/// Netdev kinds that frames can be redirected from and to as they are. Others change frames on the
/// way (VLAN, tunnels), choose a port themselves (bridge, bond, team) or have no Ethernet.
const PLAIN_KINDS: [&str; 4] = ["veth", "dummy", "netdevsim", "simnic"];

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
            kind: None,
            controller: None,
        };
        let ethernet = m.header.link_layer_type == LinkLayerType::Ether
            && !m.header.flags.contains(LinkFlags::Loopback);
        for a in &m.attributes {
            match a {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Address(bytes) if ethernet => {
                    link.mac = bytes.as_slice().try_into().ok().map(MacAddr);
                }
                LinkAttribute::Controller(index) if *index != 0 => link.controller = Some(*index),
                LinkAttribute::LinkInfo(infos) => {
                    link.kind = infos.iter().find_map(|i| match i {
                        LinkInfo::Kind(kind) => Some(kind.to_string()),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        Some(link)
    }

    /// Why frames cannot be redirected from or to this netdev; `None` when they can.
    #[must_use]
    pub fn unsuitable(&self) -> Option<String> {
        let name = &self.name;
        if self.mac.is_none() {
            return Some(format!("{name} is not an Ethernet netdev"));
        }
        if let Some(kind) = &self.kind
            && !PLAIN_KINDS.contains(&kind.as_str())
        {
            return Some(format!("{name} is a {kind}, which is not supported yet"));
        }
        if self.controller.is_some() {
            return Some(format!(
                "{name} is enslaved to a bridge, bond or VRF, which is not supported yet"
            ));
        }
        None
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
}
