//! Netdevs, as far as a provider asks about them: by index, what they are called now.

use nix::errno::Errno;

use super::error::NetlinkError;
use super::socket::{ACK, Family, REQUEST, Socket};
use super::wire::Message;
use crate::contract::types::Ifindex;

// linux/rtnetlink.h, linux/if_link.h
pub(super) const RTM_NEWLINK: u16 = 16;
pub(super) const RTM_GETLINK: u16 = 18;
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_PARENT_DEV_BUS_NAME: u16 = 57;
const IFLA_INFO_KIND: u16 = 1;
/// Size of `struct ifinfomsg`.
pub(super) const IFINFOMSG_LEN: usize = 16;

/// A netdev.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub ifindex: Ifindex,
    /// Its name now: it may have another by the time it is used.
    pub name: String,
    /// Its hardware type (`ARPHRD_*`).
    pub hardware_type: u16,
    /// What it is (`bond`, `vlan`, `veth` …); a physical device has no kind.
    pub kind: Option<String>,
    /// The bus of the device that it belongs to (`pci`, `virtio`, `usb`); one made in software has none.
    pub bus: Option<String>,
    /// The netdev that it is enslaved to: a bridge, a bond.
    pub controller: Option<Ifindex>,
}

/// Reads netdevs of the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Links(Socket);

impl Links {
    /// Opens a socket.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self(Socket::open(Family::Route)?))
    }

    /// The netdev with this index; `None` when there is none.
    ///
    /// # Errors
    /// A failure of the exchange.
    pub fn get(&mut self, ifindex: Ifindex) -> Result<Option<Link>, NetlinkError> {
        let seq = self.0.next_seq();
        let mut buf = Vec::with_capacity(32);
        let mut m = Message::new(&mut buf, RTM_GETLINK, REQUEST | ACK, seq);
        let mut ifinfomsg = [0; IFINFOMSG_LEN];
        ifinfomsg[4..8].copy_from_slice(&ifindex.get().to_ne_bytes());
        m.raw(&ifinfomsg);
        m.finish();
        let mut found = None;
        let asked = self.0.request(&buf, seq, |m| {
            let attr = |ty| m.attrs(IFINFOMSG_LEN).find_type(ty);
            let name = attr(IFLA_IFNAME).and_then(|a| a.str());
            if let (RTM_NEWLINK, Some(b), Some(name)) = (m.ty, m.fixed::<IFINFOMSG_LEN>(), name) {
                let kind = attr(IFLA_LINKINFO).and_then(|a| a.nested().find_type(IFLA_INFO_KIND));
                found = Some(Link {
                    ifindex,
                    name: name.to_owned(),
                    hardware_type: u16::from_ne_bytes([b[2], b[3]]),
                    kind: kind.and_then(|a| a.str()).map(str::to_owned),
                    bus: attr(IFLA_PARENT_DEV_BUS_NAME).and_then(|a| a.str()).map(str::to_owned),
                    controller: attr(IFLA_MASTER).and_then(|a| a.u32()).and_then(Ifindex::new),
                });
            }
        });
        match asked {
            Ok(()) => Ok(found),
            Err(e) if e.errno() == Some(Errno::ENODEV) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_netdev_reads_and_one_that_is_not_there_is_none() {
        let mut links = Links::open().unwrap();
        let lo = links.get(Ifindex::new(1).unwrap()).unwrap().unwrap();
        assert_eq!((&*lo.name, lo.hardware_type), ("lo", 772)); // ARPHRD_LOOPBACK
        assert_eq!(links.get(Ifindex::new(i32::MAX as u32).unwrap()).unwrap(), None);
    }
}
