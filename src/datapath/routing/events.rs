//! Multicast groups of netlink whose messages no codec reads for us.

use std::io;

use netdev_providers::netlink::MessageIter;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, Socket, TokioSocket};

/// A socket that is in some groups.
pub(super) struct Events(TokioSocket);

impl Events {
    /// Of the network namespace of the calling thread.
    ///
    /// # Errors
    /// EPROTONOSUPPORT: the kernel has none of it, or lacks the module.
    pub(super) fn open(protocol: isize, groups: &[u32]) -> io::Result<Self> {
        let mut socket = TokioSocket::new(protocol)?;
        socket.socket_mut().bind_auto()?;
        for group in groups {
            socket.socket_mut().add_membership(*group)?;
        }
        Ok(Self(socket))
    }

    /// The same of one group, of which `filter` has the kernel keep messages out of the socket.
    pub(super) fn open_filtered(
        protocol: isize,
        group: u32,
        filter: impl FnOnce(&Socket) -> io::Result<()>,
    ) -> io::Result<Self> {
        let mut socket = TokioSocket::new(protocol)?;
        socket.socket_mut().bind_auto()?;
        filter(socket.socket_ref())?;
        socket.socket_mut().add_membership(group)?;
        Ok(Self(socket))
    }

    pub(super) fn socket(&self) -> &Socket {
        self.0.socket_ref()
    }

    /// The next datagram of the kernel; dropped before it is there, this loses nothing.
    ///
    /// # Errors
    /// ENOBUFS: messages were lost.
    pub(super) async fn next(&self) -> io::Result<Datagram> {
        loop {
            let (bytes, from) = self.0.recv_from_full().await?;
            if from.port_number() == 0 {
                return Ok(Datagram(bytes));
            }
        }
    }
}

/// What came in one piece.
pub(super) struct Datagram(Vec<u8>);

impl Datagram {
    pub(super) fn messages(&self) -> MessageIter<'_> {
        MessageIter::new(&self.0)
    }
}
