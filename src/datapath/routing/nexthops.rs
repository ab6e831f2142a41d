//! Events of nexthop objects (`ip nexthop`), which the codec of everything else does not decode.
//!
//! Routes change with the object that they use. Of that the kernel tells as of routes (`RTM_NEWROUTE`) only
//! where an object was replaced, and only with `net.ipv4.nexthop_compat_mode`, the default
//! (`nexthop_replace_notify`). Where an object was deleted, IPv4's routes are gone without a word
//! (`__remove_nexthop_fib`, `fib_table_flush`).

use std::io;

use netdev_providers::netlink::MessageIter;
use rtnetlink::MulticastGroup;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, Socket, TokioSocket};

/// `linux/rtnetlink.h`.
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_DELNEXTHOP: u16 = 105;

/// The group of these events.
pub(super) struct NexthopEvents(TokioSocket);

impl NexthopEvents {
    /// Of the network namespace of the calling thread.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        socket.socket_mut().bind_auto()?;
        socket.socket_mut().add_membership(MulticastGroup::Nexthop as u32)?;
        Ok(Self(socket))
    }

    pub(super) fn socket(&self) -> &Socket {
        self.0.socket_ref()
    }

    /// Comes back when an object was made, changed or deleted; dropped before, it loses nothing.
    ///
    /// # Errors
    /// ENOBUFS: events were lost.
    pub(super) async fn changed(&self) -> io::Result<()> {
        loop {
            let (bytes, from) = self.0.recv_from_full().await?;
            if from.port_number() == 0 && tells_of_one(&bytes) {
                return Ok(());
            }
        }
    }
}

fn tells_of_one(bytes: &[u8]) -> bool {
    MessageIter::new(bytes).any(|m| matches!(m.ty, RTM_NEWNEXTHOP | RTM_DELNEXTHOP))
}

#[cfg(test)]
mod tests {
    use netdev_providers::netlink::Message;

    use super::*;

    #[test]
    fn a_nexthop_is_told_from_other_messages() {
        let message = |ty| {
            let mut buf = Vec::new();
            let mut m = Message::new(&mut buf, ty, 0, 0);
            m.raw(&[2, 0, 0, 0, 0, 0, 0, 0]);
            m.finish();
            buf
        };
        assert!(tells_of_one(&message(RTM_NEWNEXTHOP)) && tells_of_one(&message(RTM_DELNEXTHOP)));
        // RTM_NEWROUTE; and what is cut short.
        assert!(!tells_of_one(&message(24)));
        assert!(!tells_of_one(&message(RTM_NEWNEXTHOP)[..20]) && !tells_of_one(&[]));
    }
}
