//! What generic netlink tells of a netdev: features (`ethtool -k`), and what XDP can do with it.

use nix::errno::Errno;

use super::error::NetlinkError;
use super::socket::{ACK, Family, REQUEST, Socket};
use super::wire::{Message, Received};
use crate::contract::types::Ifindex;

/// Size of `struct genlmsghdr`.
const GENLMSGHDR_LEN: usize = 4;
// linux/genetlink.h
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
// linux/ethtool_netlink.h
const ETHTOOL_MSG_FEATURES_GET: u8 = 11;
const ETHTOOL_A_FEATURES_HEADER: u16 = 1;
const ETHTOOL_A_FEATURES_ACTIVE: u16 = 4;
const ETHTOOL_A_HEADER_DEV_INDEX: u16 = 1;
const ETHTOOL_A_BITSET_BITS: u16 = 3;
const ETHTOOL_A_BITSET_BIT_NAME: u16 = 2;
// linux/netdev.h, from 6.3 on
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;

/// What XDP can do with a netdev (`enum netdev_xdp_act`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XdpFeatures(pub u64);

impl XdpFeatures {
    /// Frames can be redirected to it.
    #[must_use]
    pub const fn sends(self) -> bool {
        self.0 & 4 != 0
    }

    /// Also those that lie in several buffers.
    #[must_use]
    pub const fn sends_fragments(self) -> bool {
        self.0 & 64 != 0
    }
}

fn request(
    socket: &mut Socket,
    (family, command, version): (u16, u8, u8),
    attributes: impl FnOnce(&mut Message<'_>),
    each: impl FnMut(Received<'_>),
) -> Result<(), NetlinkError> {
    let seq = socket.next_seq();
    let mut buf = Vec::with_capacity(64);
    let mut m = Message::new(&mut buf, family, REQUEST | ACK, seq);
    m.raw(&[command, version, 0, 0]);
    attributes(&mut m);
    m.finish();
    socket.request(&buf, seq, each)
}

/// Asks a family by its name. `None`: this kernel has none.
fn ask(
    family: &str,
    command: u8,
    attributes: impl FnOnce(&mut Message<'_>),
    each: impl FnMut(Received<'_>),
) -> Result<Option<()>, NetlinkError> {
    let mut socket = Socket::open(Family::Generic)?;
    let mut id = None;
    let found = request(
        &mut socket,
        (GENL_ID_CTRL, CTRL_CMD_GETFAMILY, 2),
        |m| _ = m.str(CTRL_ATTR_FAMILY_NAME, family),
        |m| id = m.attrs(GENLMSGHDR_LEN).find_type(CTRL_ATTR_FAMILY_ID).and_then(|a| a.u16()),
    );
    match (found, id) {
        (Err(e), _) if e.errno() == Some(Errno::ENOENT) => Ok(None),
        (Err(e), _) => Err(e),
        (Ok(()), None) => Err(NetlinkError::Malformed("a family without an id")),
        (Ok(()), Some(id)) => request(&mut socket, (id, command, 1), attributes, each).map(Some),
    }
}

/// Whether a feature of a netdev is on, by the name that the kernel gives it: `rx-vlan-hw-parse`.
///
/// # Errors
/// A failure of the exchange, ENODEV when the netdev is gone.
pub fn has_feature(ifindex: Ifindex, name: &str) -> Result<bool, NetlinkError> {
    let mut on = false;
    ask(
        "ethtool",
        ETHTOOL_MSG_FEATURES_GET,
        |m| {
            m.nested(ETHTOOL_A_FEATURES_HEADER, |m| {
                m.u32(ETHTOOL_A_HEADER_DEV_INDEX, ifindex.get());
            });
        },
        |m| {
            let active = m.attrs(GENLMSGHDR_LEN).find_type(ETHTOOL_A_FEATURES_ACTIVE);
            let bits = active.and_then(|a| a.nested().find_type(ETHTOOL_A_BITSET_BITS));
            // A list without a mask: of those that are on.
            on |= bits.is_some_and(|bits| {
                bits.nested().any(|bit| {
                    let bit = bit.nested().find_type(ETHTOOL_A_BITSET_BIT_NAME);
                    bit.and_then(|a| a.str()) == Some(name)
                })
            });
        },
    )?
    .ok_or(NetlinkError::Malformed("this kernel has no ethtool netlink"))?;
    Ok(on)
}

/// What XDP can do with a netdev. `None`: this kernel does not tell (before 6.3).
///
/// # Errors
/// A failure of the exchange, ENODEV when the netdev is gone.
pub fn xdp_features(ifindex: Ifindex) -> Result<Option<XdpFeatures>, NetlinkError> {
    let mut features = None;
    let asked = ask(
        "netdev",
        NETDEV_CMD_DEV_GET,
        |m| _ = m.u32(NETDEV_A_DEV_IFINDEX, ifindex.get()),
        |m| {
            let found = m.attrs(GENLMSGHDR_LEN).find_type(NETDEV_A_DEV_XDP_FEATURES);
            features = found.and_then(|a| a.u64()).map(XdpFeatures);
        },
    )?;
    Ok(asked.and(features))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_netdev_has_features_and_is_nothing_that_xdp_sends_to() {
        let lo = Ifindex::new(1).unwrap();
        assert!(has_feature(lo, "rx-checksum").unwrap());
        assert!(!has_feature(lo, "rx-vlan-hw-parse").unwrap());
        if let Some(features) = xdp_features(lo).unwrap() {
            assert!(!features.sends(), "{features:?}");
        }
        let none = Ifindex::new(i32::MAX as u32).unwrap();
        assert_eq!(has_feature(none, "rx-checksum").unwrap_err().errno(), Some(Errno::ENODEV));
    }
}
