//! Events of nexthop objects (`ip nexthop`), which the codec of everything else does not decode.
//!
//! Routes change with the object that they use. Of that the kernel tells as of routes (`RTM_NEWROUTE`) only
//! where an object was replaced, and only with `net.ipv4.nexthop_compat_mode`, the default
//! (`nexthop_replace_notify`). Where an object was deleted, IPv4's routes are gone without a word
//! (`__remove_nexthop_fib`, `fib_table_flush`).
//!
//! In a **resilient** group a flow changes its next hop when its bucket has been idle for a while and there is another
//! that should have it (`nh_res_table_upkeep`). Packets that go by rules do not make a bucket busy: flows would be
//! moved that would not have been.

use std::io;

use netdev_providers::netlink::socket::{DUMP, REQUEST};
use netdev_providers::netlink::wire::{Message, Received};
use netdev_providers::netlink::{Family, NetlinkError, Socket};

/// `RTNLGRP_NEXTHOP` (`linux/rtnetlink.h`).
pub(super) const GROUP: u32 = 32;
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_DELNEXTHOP: u16 = 105;
const RTM_GETNEXTHOP: u16 = 106;
/// `struct nhmsg`.
const HEADER: usize = 8;
// linux/nexthop.h
const NHA_GROUP: u16 = 2;
const NHA_GROUP_TYPE: u16 = 3;
const NEXTHOP_GRP_TYPE_RES: u16 = 1;

/// Whether a message of this type tells that an object was made, changed or deleted.
pub(super) const fn tells_of_one(ty: u16) -> bool {
    matches!(ty, RTM_NEWNEXTHOP | RTM_DELNEXTHOP)
}

/// Whether a message tells of a resilient group.
pub(super) fn is_resilient(m: &Received<'_>) -> bool {
    let ty = || m.attrs(HEADER).find_type(NHA_GROUP_TYPE)?.payload.first_chunk().copied();
    m.ty == RTM_NEWNEXTHOP && ty().map(u16::from_ne_bytes) == Some(NEXTHOP_GRP_TYPE_RES)
}

/// Whether a message tells of a group.
pub(super) fn is_group(m: &Received<'_>) -> bool {
    m.ty == RTM_NEWNEXTHOP && m.attrs(HEADER).find_type(NHA_GROUP).is_some()
}

/// The groups of the network namespace of the calling thread: whether there is one, and whether one is resilient.
///
/// # Errors
/// A failure of the exchange.
pub(super) fn groups() -> io::Result<(bool, bool)> {
    let mut socket = Socket::open(Family::Route).map_err(io::Error::other)?;
    let (mut buf, seq) = (Vec::new(), socket.next_seq());
    let mut m = Message::new(&mut buf, RTM_GETNEXTHOP, REQUEST | DUMP, seq);
    m.raw(&[0; HEADER]);
    m.finish();
    let (mut any, mut resilient) = (false, false);
    let dumped = socket.dump(&buf, seq, |m| {
        any |= is_group(&m);
        resilient |= is_resilient(&m);
    });
    match dumped {
        // What came meanwhile was announced.
        Ok(()) | Err(NetlinkError::Interrupted | NetlinkError::Kernel(_)) => Ok((any, resilient)),
        Err(e) => Err(io::Error::other(e)),
    }
}

#[cfg(test)]
mod tests {
    use netdev_providers::netlink::MessageIter;

    use super::*;

    #[test]
    fn a_group_says_whether_it_is_resilient() {
        let resilient = |message, ty: Option<u16>| {
            let mut buf = Vec::new();
            let mut m = Message::new(&mut buf, message, 0, 0);
            m.raw(&[0; HEADER]);
            if let Some(ty) = ty {
                m.attr(NHA_GROUP_TYPE, &ty.to_ne_bytes());
            }
            m.finish();
            is_resilient(&MessageIter::new(&buf).next().unwrap())
        };
        let mut buf = Vec::new();
        let mut m = Message::new(&mut buf, RTM_NEWNEXTHOP, 0, 0);
        m.raw(&[0; HEADER]).attr(NHA_GROUP, &[0; 8]);
        m.finish();
        assert!(is_group(&MessageIter::new(&buf).next().unwrap()));
        assert!(resilient(RTM_NEWNEXTHOP, Some(NEXTHOP_GRP_TYPE_RES)));
        assert!(!resilient(RTM_NEWNEXTHOP, Some(0)) && !resilient(RTM_NEWNEXTHOP, None));
        assert!(!resilient(RTM_DELNEXTHOP, Some(NEXTHOP_GRP_TYPE_RES)));
    }

    #[test]
    fn a_nexthop_is_told_from_other_messages() {
        assert!(tells_of_one(RTM_NEWNEXTHOP) && tells_of_one(RTM_DELNEXTHOP));
        // RTM_NEWROUTE, RTM_GETNEXTHOP.
        assert!(!tells_of_one(24) && !tells_of_one(106));
    }
}
