//! Several datagrams of a socket in one system call: of a socket that is told of many small things (events, log
//! messages, answers to a batch), most of the time went into asking for the next.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sys::socket::{MsgFlags, MultiHeaders, NetlinkAddr, recvmmsg};

/// What the kernel makes that is no part of a dump is no longer: `NLMSG_DEFAULT_SIZE` and `NFULNL_NLBUFSIZ_DEFAULT`
/// are a page, or 8 kB where pages are larger.
const LONGEST: usize = 8192;
/// So many are received at once.
const AT_ONCE: usize = 32;

/// Where datagrams are received to.
#[derive(Default)]
pub(super) struct Datagrams {
    /// Taken when it is first used: most sockets have no need of it.
    room: Vec<u8>,
}

/// What there was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Received {
    /// Datagrams of the kernel that were read.
    pub(super) read: usize,
    /// Datagrams of other processes, which were not: any may send to a port id.
    pub(super) passed_over: usize,
    /// Some were longer than any the kernel makes: what they said is lost.
    pub(super) too_long: bool,
    /// There may be more.
    pub(super) more: bool,
}

impl Datagrams {
    /// Receives what is there now, and hands each to `read`, in order.
    ///
    /// # Errors
    /// Those of the system call: EAGAIN when there is nothing.
    pub(super) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        mut read: impl FnMut(&[u8]),
    ) -> io::Result<Received> {
        self.room.resize(LONGEST * AT_ONCE, 0);
        let mut parts: Vec<_> =
            self.room.chunks_exact_mut(LONGEST).map(|part| [IoSliceMut::new(part)]).collect();
        let mut headers = MultiHeaders::<NetlinkAddr>::preallocate(parts.len(), None);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
        let datagrams = recvmmsg(socket.as_raw_fd(), &mut headers, parts.iter_mut(), flags, None)?;
        let mut received = Received::default();
        for datagram in datagrams {
            if datagram.address.is_none_or(|from| from.pid() != 0) {
                received.passed_over += 1;
            } else if datagram.flags.contains(MsgFlags::MSG_TRUNC) {
                received.read += 1;
                received.too_long = true;
            } else {
                received.read += 1;
                datagram.iovs().for_each(&mut read);
            }
        }
        received.more = received.read + received.passed_over == AT_ONCE;
        Ok(received)
    }
}
