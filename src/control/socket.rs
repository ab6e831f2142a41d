//! `NETLINK_USERSOCK` datagrams with their senders' credentials.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType,
    UnixCredentials, bind, connect, getsockname, recvmsg, sendmsg, setsockopt, socket, sockopt,
};

use super::wire::MAX_DATAGRAM;

/// Room for a burst of datagrams. Anybody can fill it with rubbish; the more there is, the longer
/// that takes.
const RECEIVE_BUFFER: usize = 1024 * 1024;

/// A socket of the network namespace that the calling thread is in.
pub(super) struct Socket(OwnedFd);

/// A datagram.
pub(super) struct Received {
    /// The port id it came from: where to answer. **Says nothing about who that is.**
    pub(super) port_id: u32,
    /// Who sent it, as the kernel says: the sending process's pid and real uid and gid, translated
    /// into our user namespace (where they have no translation: 65534). A sender may put its
    /// effective or saved ids there instead, and only one with `CAP_SETUID` anything else
    /// (`scm_check_creds`).
    pub(super) sender: UnixCredentials,
    /// How long it is; longer than the buffer: it was cut.
    pub(super) len: usize,
    pub(super) truncated: bool,
}

fn group_mask(group: u32) -> u32 {
    1 << (group - 1)
}

impl Socket {
    pub(super) fn open() -> Result<Self, (&'static str, Errno)> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkUserSock,
        )
        .map_err(|e| ("socket", e))?;
        setsockopt(&fd, sockopt::PassCred, &true).map_err(|e| ("setsockopt(SO_PASSCRED)", e))?;
        // The first needs CAP_NET_ADMIN; the second is capped at net.core.rmem_max.
        if setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            let _ = setsockopt(&fd, sockopt::RcvBuf, &RECEIVE_BUFFER);
        }
        Ok(Self(fd))
    }

    /// Takes a port id; 0: any. Fails with `EADDRINUSE` when it is taken.
    pub(super) fn bind(&self, port_id: u32) -> Result<(), Errno> {
        bind(self.0.as_raw_fd(), &NetlinkAddr::new(port_id, 0))
    }

    /// Takes a port id, 0: any, and joins a multicast group. `NETLINK_USERSOCK` lets anybody send to
    /// groups but has no `NL_CFG_F_NONROOT_RECV`: without `CAP_NET_ADMIN` this is `EPERM`, whether the
    /// port id is taken or not.
    pub(super) fn bind_in_group(&self, port_id: u32, group: u32) -> Result<(), Errno> {
        bind(self.0.as_raw_fd(), &NetlinkAddr::new(port_id, group_mask(group)))
    }

    /// The port id that it was bound to.
    pub(super) fn port_id(&self) -> Result<u32, Errno> {
        getsockname::<NetlinkAddr>(self.0.as_raw_fd()).map(|address| address.pid())
    }

    /// From now on the kernel refuses unicasts to us from any other port id
    /// (`netlink_getsockbyportid`). Multicasts come from anywhere still.
    pub(super) fn connect(&self, port_id: u32) -> Result<(), Errno> {
        connect(self.0.as_raw_fd(), &NetlinkAddr::new(port_id, 0))
    }

    fn send(&self, to: Option<&NetlinkAddr>, datagram: &[u8]) -> Result<(), Errno> {
        let iov = [IoSlice::new(datagram)];
        loop {
            match sendmsg(self.0.as_raw_fd(), &iov, &[], MsgFlags::MSG_DONTWAIT, to) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// To the port id this socket is connected to. `ECONNREFUSED`: nobody has it. `EAGAIN`: its
    /// owner does not read.
    pub(super) fn send_connected(&self, datagram: &[u8]) -> Result<(), Errno> {
        self.send(None, datagram)
    }

    /// To a port id. Errors as [`Self::send_connected`].
    pub(super) fn send_to(&self, port_id: u32, datagram: &[u8]) -> Result<(), Errno> {
        self.send(Some(&NetlinkAddr::new(port_id, 0)), datagram)
    }

    /// To whoever listens to a group. A listener whose buffer is full gets `ENOBUFS` from its next
    /// receive; the sender is not told.
    pub(super) fn multicast(&self, group: u32, datagram: &[u8]) -> Result<(), Errno> {
        match self.send(Some(&NetlinkAddr::new(0, group_mask(group))), datagram) {
            // `netlink_sendmsg` multicasts and then unicasts to the port id 0 as well: the kernel's
            // end, which this protocol does not have.
            Err(Errno::ECONNREFUSED) => Ok(()),
            other => other,
        }
    }

    /// The next datagram, without waiting: `EAGAIN` when there is none, `ENOBUFS` once after
    /// multicasts were lost. One without credentials is nobody's, and skipped.
    pub(super) fn receive(&self, buf: &mut [u8]) -> Result<Received, Errno> {
        loop {
            let mut space = cmsg_space!(UnixCredentials);
            let mut iov = [IoSliceMut::new(buf)];
            let got = recvmsg::<NetlinkAddr>(
                self.0.as_raw_fd(),
                &mut iov,
                Some(&mut space),
                MsgFlags::MSG_DONTWAIT,
            );
            let got = match got {
                Ok(got) => got,
                Err(Errno::EINTR) => continue,
                Err(e) => return Err(e),
            };
            let sender = got.cmsgs().ok().and_then(|mut all| {
                all.find_map(|c| match c {
                    ControlMessageOwned::ScmCredentials(c) => Some(c),
                    _ => None,
                })
            });
            if let (Some(sender), Some(address)) = (sender, got.address) {
                return Ok(Received {
                    port_id: address.pid(),
                    sender,
                    len: got.bytes,
                    truncated: got.flags.contains(MsgFlags::MSG_TRUNC),
                });
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A buffer that holds any datagram of the protocol.
pub(super) fn buffer() -> Vec<u8> {
    vec![0; MAX_DATAGRAM]
}
