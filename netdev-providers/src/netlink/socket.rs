//! A blocking netlink socket to the kernel.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use netlink_sys::SocketAddr;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use tracing::trace;

use super::datagrams::Datagrams;
use super::error::{KernelError, NetlinkError};
use super::wire::{MessageIter, NLMSG_HDRLEN, Received, align};

/// Which part of the kernel a socket talks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `NETLINK_ROUTE`: links, routes, neighbours, TC.
    Route,
    /// `NETLINK_NETFILTER`: nf_tables, conntrack, NFLOG.
    Netfilter,
    /// `NETLINK_XFRM`: IPsec policies and states.
    Xfrm,
    /// `NETLINK_GENERIC`: ethtool, netdevs' XDP.
    Generic,
}

/// `libc` has the constants of `struct nlmsghdr` as `int`; the fields have 16 bits.
#[expect(clippy::cast_possible_truncation, reason = "all of them fit")]
const fn header_field(constant: libc::c_int) -> u16 {
    constant as u16
}

/// `NLM_F_REQUEST`.
pub const REQUEST: u16 = header_field(libc::NLM_F_REQUEST);
/// `NLM_F_ACK`.
pub const ACK: u16 = header_field(libc::NLM_F_ACK);
/// `NLM_F_DUMP`.
pub const DUMP: u16 = header_field(libc::NLM_F_DUMP);
/// `NLM_F_CREATE`.
pub const CREATE: u16 = header_field(libc::NLM_F_CREATE);
/// `NLM_F_EXCL`.
pub const EXCL: u16 = header_field(libc::NLM_F_EXCL);
const DUMP_INTR: u16 = header_field(libc::NLM_F_DUMP_INTR);
const CAPPED: u16 = 0x100; // NLM_F_CAPPED: the request is not repeated in the error message
const ACK_TLVS: u16 = 0x200; // NLM_F_ACK_TLVS: attributes follow
const NLMSG_ERROR: u16 = header_field(libc::NLMSG_ERROR);
const NLMSG_DONE: u16 = header_field(libc::NLMSG_DONE);
const NLMSG_NOOP: u16 = header_field(libc::NLMSG_NOOP);
const NLMSGERR_ATTR_MSG: u16 = 1;

/// The largest datagram the kernel makes for a dump is 32 kB (`NLMSG_GOODSIZE`, and
/// `max_recvmsg_len` capped at 32 kB); requests of a batch come back one by one.
const RECV_BUF: usize = 64 * 1024;
/// Room for the acknowledgements of the largest batch, in the kernel's accounting of small
/// messages (about 800 bytes each); the default of 212 kB holds 256 of them.
const SOCKET_RCVBUF: usize = 8 * 1024 * 1024;
/// The kernel answers in micro- to milliseconds; a driver that programs hardware may take long.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// How the kernel answered one request.
pub type Ack = Result<(), KernelError>;

/// A netlink socket.
pub struct Socket {
    inner: netlink_sys::Socket,
    seq: u32,
    buf: Vec<u8>,
    datagrams: Datagrams,
    warnings: Vec<(usize, Box<str>)>,
}

impl Socket {
    /// Opens a socket with extended ACKs, capped ACKs and a large receive buffer, for the network
    /// namespace of the calling thread. Its port id is of the kernel's choice: the process id, as
    /// long as no other socket has it.
    ///
    /// # Errors
    /// When the kernel has no such family or refuses the socket.
    pub fn open(family: Family) -> Result<Self, NetlinkError> {
        Self::open_and(family, |inner| inner.bind_auto().map(drop))
    }

    /// The same with a port id that no socket has had: drawn at random, and no process's id.
    ///
    /// For what the kernel keeps by port id, such as a table with an owner. When a socket is closed, the
    /// kernel first frees its port id, then takes away what was the socket's (`netlink_release`:
    /// `netlink_remove`, then the notifier, `nft_rcv_nl_event`); in between the next socket can get the
    /// same id, and make a table, which then goes too.
    ///
    /// # Errors
    /// Those of [`open`](Self::open), and when there are no random numbers.
    pub fn open_with_new_port_id(family: Family) -> Result<Self, NetlinkError> {
        Self::open_and(family, |inner| {
            loop {
                // Process ids are below.
                let id = getrandom::u32()? | 1 << 31;
                match inner.bind(&SocketAddr::new(id, 0)) {
                    Err(e) if e.kind() == io::ErrorKind::AddrInUse => {}
                    bound => return bound,
                }
            }
        })
    }

    fn open_and(
        family: Family,
        bind: impl FnOnce(&mut netlink_sys::Socket) -> io::Result<()>,
    ) -> Result<Self, NetlinkError> {
        let protocol = match family {
            Family::Route => libc::NETLINK_ROUTE,
            Family::Netfilter => libc::NETLINK_NETFILTER,
            Family::Xfrm => libc::NETLINK_XFRM,
            Family::Generic => libc::NETLINK_GENERIC,
        };
        let io = |call| move |source| NetlinkError::Io { call, source };
        let mut inner = netlink_sys::Socket::new(protocol as isize).map_err(io("socket"))?;
        bind(&mut inner).map_err(io("bind"))?;
        inner.set_ext_ack(true).map_err(io("setsockopt(NETLINK_EXT_ACK)"))?;
        inner.set_cap_ack(true).map_err(io("setsockopt(NETLINK_CAP_ACK)"))?;
        let (buf, datagrams) = (vec![0; RECV_BUF], Datagrams::default());
        let socket = Self { inner, seq: 0, buf, datagrams, warnings: Vec::new() };
        // Without CAP_NET_ADMIN the limit of net.core.rmem_max holds, which is enough for reading.
        if setsockopt(&socket.inner, sockopt::RcvBufForce, &SOCKET_RCVBUF).is_err() {
            let _ = setsockopt(&socket.inner, sockopt::RcvBuf, &SOCKET_RCVBUF);
        }
        Ok(socket)
    }

    /// Refuses dump requests that ask for more than the kernel filters by
    /// (`NETLINK_GET_STRICT_CHK`), so that a filtered dump is really filtered.
    ///
    /// # Errors
    /// When the kernel is older than 4.20.
    pub fn strict(self) -> Result<Self, NetlinkError> {
        self.inner.set_netlink_get_strict_chk(true).map_err(|source| NetlinkError::Io {
            call: "setsockopt(NETLINK_GET_STRICT_CHK)",
            source,
        })?;
        Ok(self)
    }

    /// Joins a multicast group.
    ///
    /// # Errors
    /// When the group does not exist or needs a privilege.
    pub fn join(&self, group: u32) -> Result<(), NetlinkError> {
        self.inner.add_membership(group).map_err(|source| NetlinkError::Io {
            call: "setsockopt(NETLINK_ADD_MEMBERSHIP)",
            source,
        })
    }

    /// The port id: what notifications of changes made through this socket
    /// carry as their origin.
    ///
    /// # Errors
    /// When the socket does not tell.
    pub fn port_id(&self) -> Result<u32, NetlinkError> {
        let mut address = SocketAddr::new(0, 0);
        self.inner
            .get_address(&mut address)
            .map_err(|source| NetlinkError::Io { call: "getsockname", source })?;
        Ok(address.port_number())
    }

    /// A sequence number not used before on this socket.
    pub fn next_seq(&mut self) -> u32 {
        // 0 is what the kernel puts into notifications.
        self.seq = self.seq.wrapping_add(1).max(1);
        self.seq
    }

    /// Sends one or more messages in one system call.
    ///
    /// # Errors
    /// When the kernel does not take them.
    pub fn send(&self, messages: &[u8]) -> Result<(), NetlinkError> {
        trace!(len = messages.len(), "netlink send");
        let n = retry_on_eintr(|| self.inner.send_to(messages, &SocketAddr::new(0, 0), 0))
            .map_err(|source| NetlinkError::Io { call: "sendmsg", source })?;
        if n == messages.len() { Ok(()) } else { Err(NetlinkError::Malformed("short send")) }
    }

    /// Receives one datagram from the kernel and hands it to `read`; those of other processes are
    /// passed over (any process may send to a port id).
    ///
    /// # Errors
    /// [`NetlinkError::TimedOut`]; ENOBUFS when the kernel had to drop messages for us.
    pub fn recv<R>(
        &mut self,
        within: Duration,
        read: impl FnOnce(MessageIter<'_>) -> R,
    ) -> Result<R, NetlinkError> {
        let n = self.when_readable(within, "recvmsg", |s| {
            let mut space = &mut s.buf[..];
            // MSG_TRUNC: the true length of a datagram that does not fit.
            let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
            let (n, from) = s.inner.recv_from(&mut space, flags)?;
            if from.port_number() != 0 {
                trace!(port = from.port_number(), "datagram of another process passed over");
                return Ok(None);
            }
            Ok(Some(n))
        })?;
        let Some(datagram) = self.buf.get(..n) else {
            return Err(NetlinkError::Malformed("a datagram longer than any the kernel makes"));
        };
        Ok(read(MessageIter::new(datagram)))
    }

    /// Receives, as soon as there is something that counts: `receive`, which does not wait, says `None` of what does
    /// not.
    fn when_readable<R>(
        &mut self,
        within: Duration,
        call: &'static str,
        mut receive: impl FnMut(&mut Self) -> io::Result<Option<R>>,
    ) -> Result<R, NetlinkError> {
        let deadline = Instant::now() + within;
        loop {
            // Most answers are there when the send returns: the kernel handles requests in it.
            match receive(self) {
                Ok(Some(received)) => return Ok(received),
                Ok(None) => continue,
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
                Err(source) => return Err(NetlinkError::Io { call, source }),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !wait_readable(self.inner.as_fd(), left)? {
                return Err(NetlinkError::TimedOut(within.as_millis()));
            }
        }
    }

    /// Waits for a datagram from the kernel, then receives those that are there, up to some dozens, in one system call,
    /// and hands each to `read`. Not for answers to a dump, which are too long for it. Returns whether there may be
    /// more.
    ///
    /// # Errors
    /// As [`recv`](Self::recv). What could be read has been handed to `read` all the same.
    pub fn recv_some(
        &mut self,
        within: Duration,
        mut read: impl FnMut(MessageIter<'_>),
    ) -> Result<bool, NetlinkError> {
        let received = self.when_readable(within, "recvmmsg", |s| {
            let fd = s.inner.as_fd();
            let received = s.datagrams.receive(fd, |datagram| read(MessageIter::new(datagram)))?;
            if received.passed_over > 0 {
                trace!(count = received.passed_over, "datagrams of others passed over");
            }
            Ok((received.read > 0).then_some(received))
        })?;
        if received.too_long {
            return Err(NetlinkError::Malformed("a datagram longer than any the kernel makes"));
        }
        Ok(received.more)
    }

    /// Sends one request that asks for an acknowledgement (`NLM_F_ACK`), and waits for it. Further
    /// messages that answer it (`NLM_F_ECHO`, a get) go to `each`.
    ///
    /// # Errors
    /// The kernel's refusal, or a failure of the exchange.
    pub fn request(
        &mut self,
        message: &[u8],
        seq: u32,
        mut each: impl FnMut(Received<'_>),
    ) -> Result<(), NetlinkError> {
        self.send(message)?;
        let mut end: Option<Ack> = None;
        while end.is_none() {
            self.recv(ANSWER_WITHIN, |messages| {
                for m in messages.filter(|m| m.seq == seq) {
                    match m.ty {
                        NLMSG_ERROR => end = Some(parse_ack(&m)),
                        NLMSG_NOOP => {}
                        _ => each(m),
                    }
                }
            })?;
        }
        Ok(end.unwrap_or(Ok(()))?)
    }

    /// Sends a dump request and hands every message of the answer to `each`.
    ///
    /// # Errors
    /// [`NetlinkError::Interrupted`] when what was dumped changed meanwhile (everything has been
    /// handed to `each` all the same), the kernel's refusal, or a failure of the exchange.
    pub fn dump(
        &mut self,
        message: &[u8],
        seq: u32,
        mut each: impl FnMut(Received<'_>),
    ) -> Result<(), NetlinkError> {
        self.dump_on(message, seq, |m| {
            each(m);
            true
        })
    }

    /// The same until `each` has had enough and says so with `false`. The rest of the answer stays
    /// in the socket, whose last use this therefore is.
    ///
    /// # Errors
    /// Those of [`dump`](Self::dump).
    pub fn dump_while(
        mut self,
        message: &[u8],
        seq: u32,
        each: impl FnMut(Received<'_>) -> bool,
    ) -> Result<(), NetlinkError> {
        self.dump_on(message, seq, each)
    }

    fn dump_on(
        &mut self,
        message: &[u8],
        seq: u32,
        mut each: impl FnMut(Received<'_>) -> bool,
    ) -> Result<(), NetlinkError> {
        self.send(message)?;
        let mut end: Option<Ack> = None;
        let (mut interrupted, mut enough) = (false, false);
        while end.is_none() && !enough {
            self.recv(ANSWER_WITHIN, |messages| {
                for m in messages.filter(|m| m.seq == seq) {
                    interrupted |= m.flags & DUMP_INTR != 0;
                    match m.ty {
                        NLMSG_DONE => end = Some(parse_done(&m)),
                        NLMSG_ERROR => end = Some(parse_ack(&m)),
                        NLMSG_NOOP => {}
                        _ if !enough => enough = !each(m),
                        _ => {}
                    }
                }
            })?;
        }
        end.unwrap_or(Ok(()))?;
        if interrupted { Err(NetlinkError::Interrupted) } else { Ok(()) }
    }

    /// Sends a buffer of `count` requests with consecutive sequence numbers from `first_seq`, of
    /// which **the last alone** asks for an acknowledgement, and returns one result each. The
    /// kernel reports a failure even of a request that asked for no acknowledgement; silence before
    /// the last answer means success, because requests of one send are handled in order.
    ///
    /// # Errors
    /// When the exchange itself failed: then it is not known which requests took effect.
    pub fn batch(
        &mut self,
        messages: &[u8],
        first_seq: u32,
        count: usize,
    ) -> Result<Vec<Ack>, NetlinkError> {
        self.batch_with(messages, first_seq, count, |_, _| {})
    }

    /// The same for requests that are answered with a message (a get, no dump): each answer goes to `each`, with
    /// which request it answers, counted from 0.
    ///
    /// # Errors
    /// As [`batch`](Self::batch).
    pub fn batch_with(
        &mut self,
        messages: &[u8],
        first_seq: u32,
        count: usize,
        mut each: impl FnMut(usize, Received<'_>),
    ) -> Result<Vec<Ack>, NetlinkError> {
        let mut acks: Vec<Ack> = vec![Ok(()); count];
        if count == 0 {
            return Ok(acks);
        }
        self.send(messages)?;
        let mut ended = false;
        self.warnings.clear();
        let mut warnings = Vec::new();
        while !ended {
            self.recv_some(ANSWER_WITHIN, |answers| {
                for m in answers {
                    let index = m.seq.wrapping_sub(first_seq) as usize;
                    if m.ty != NLMSG_ERROR {
                        // Notifications have sequence numbers of nobody.
                        if index < count && m.ty != NLMSG_NOOP {
                            each(index, m);
                        }
                        continue;
                    }
                    if let Some(ack) = acks.get_mut(index) {
                        *ack = parse_ack(&m);
                        if let (Ok(()), Some(words)) = (&*ack, words_of(&m)) {
                            warnings.push((index, words.into()));
                        }
                        ended |= index + 1 == count;
                    }
                }
            })?;
        }
        self.warnings = warnings;
        Ok(acks)
    }

    /// What the kernel said, in the last [`batch`](Self::batch), of requests that were a success all the
    /// same: which of them, counted from 0 and in order, and the words. Once. Only requests that ask for
    /// an acknowledgement get such words.
    pub fn take_warnings(&mut self) -> Vec<(usize, Box<str>)> {
        std::mem::take(&mut self.warnings)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Socket").field("fd", &self.inner.as_raw_fd()).finish_non_exhaustive()
    }
}

fn wait_readable(fd: BorrowedFd<'_>, within: Duration) -> Result<bool, NetlinkError> {
    // Rounded up, so that a rest below a millisecond is not spun away; zero is a look, no wait.
    let ms = if within.is_zero() { 0 } else { within.as_millis().saturating_add(1) };
    let timeout = PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
        Ok(0) => Ok(false),
        Ok(_) | Err(Errno::EINTR) => Ok(true),
        Err(e) => Err(NetlinkError::Io { call: "poll", source: e.into() }),
    }
}

fn retry_on_eintr(mut f: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match f() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

impl Received<'_> {
    /// What an acknowledgement or an error message says; `None` for every other message.
    #[must_use]
    pub fn ack(&self) -> Option<Ack> {
        (self.ty == NLMSG_ERROR).then(|| parse_ack(self))
    }
}

/// `struct nlmsgerr`: the error, negative or 0, the header of the request, and with
/// `NLM_F_ACK_TLVS` attributes behind it.
fn parse_ack(m: &Received<'_>) -> Ack {
    let Some(code) = m.payload.first_chunk().map(|b| i32::from_ne_bytes(*b)) else {
        return Err(KernelError { errno: Errno::EBADMSG, extack: None });
    };
    if code == 0 {
        return Ok(());
    }
    Err(KernelError {
        errno: Errno::from_raw(code.wrapping_neg()),
        extack: words_of(m).map(Into::into),
    })
}

/// The extended ACK of an answer, in words.
fn words_of<'a>(m: &Received<'a>) -> Option<&'a str> {
    if m.flags & ACK_TLVS == 0 {
        return None;
    }
    let quoted = if m.flags & CAPPED != 0 {
        NLMSG_HDRLEN
    } else {
        // The whole request is quoted; its length is in its header.
        m.payload
            .get(4..)
            .and_then(|b| b.first_chunk().map(|b| u32::from_ne_bytes(*b) as usize))
            .unwrap_or(NLMSG_HDRLEN)
    };
    m.attrs(4 + align(quoted)).find_type(NLMSGERR_ATTR_MSG).and_then(|a| a.str())
}

/// `NLMSG_DONE` carries the dump's error, and with `NLM_F_ACK_TLVS` attributes behind it.
fn parse_done(m: &Received<'_>) -> Ack {
    let code = m.payload.first_chunk().map_or(0, |b| i32::from_ne_bytes(*b));
    if code >= 0 {
        return Ok(());
    }
    let extack = (m.flags & ACK_TLVS != 0)
        .then(|| m.attrs(4).find_type(NLMSGERR_ATTR_MSG).and_then(|a| a.str()));
    Err(KernelError {
        errno: Errno::from_raw(code.wrapping_neg()),
        extack: extack.flatten().map(Into::into),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::wire::Message;

    const RTM_GETLINK: u16 = 18;

    #[test]
    fn the_kernel_answers_a_dump_of_links() {
        let mut s = Socket::open(Family::Route).unwrap();
        let seq = s.next_seq();
        let mut buf = Vec::new();
        let mut m = Message::new(&mut buf, RTM_GETLINK, REQUEST | DUMP, seq);
        m.raw(&[0; 16]);
        m.finish();
        let mut names = Vec::new();
        s.dump(&buf, seq, |m| {
            names.extend(m.attrs(16).find_type(3).and_then(|a| a.str()).map(str::to_owned));
        })
        .unwrap();
        assert!(names.iter().any(|n| n == "lo"), "{names:?}");
    }

    #[test]
    fn a_new_port_id_is_no_process_and_not_that_of_the_socket_before() {
        let id = || {
            let socket = Socket::open_with_new_port_id(Family::Route).unwrap();
            socket.port_id().unwrap()
        };
        let (first, second) = (id(), id());
        assert_ne!(first, second);
        assert!(i32::try_from(first).is_err() && i32::try_from(second).is_err());
    }

    #[test]
    fn errors_of_a_batch_go_to_the_request_that_failed() {
        let mut s = Socket::open(Family::Route).unwrap();
        let first = s.next_seq();
        let mut buf = Vec::new();
        // A get of lo, of an index that does not exist, and of lo again.
        for (i, index) in [1i32, i32::MAX, 1].into_iter().enumerate() {
            let seq = if i == 0 { first } else { s.next_seq() };
            let flags = REQUEST | if i == 2 { ACK } else { 0 };
            let mut header = [0u8; 16];
            header[4..8].copy_from_slice(&index.to_ne_bytes());
            let mut m = Message::new(&mut buf, RTM_GETLINK, flags, seq);
            m.raw(&header);
            m.finish();
        }
        let acks = s.batch(&buf, first, 3).unwrap();
        let errnos: Vec<_> = acks.into_iter().map(|a| a.err().map(|e| e.errno)).collect();
        assert_eq!(errnos, [None, Some(Errno::ENODEV), None]);
    }

    fn get_link(seq: u32, index: i32) -> Vec<u8> {
        let mut header = [0u8; 16];
        header[4..8].copy_from_slice(&index.to_ne_bytes());
        let mut buf = Vec::new();
        let mut m = Message::new(&mut buf, RTM_GETLINK, REQUEST, seq);
        m.raw(&header);
        m.finish();
        buf
    }

    #[test]
    fn what_is_there_is_received_in_order_and_what_others_sent_is_not() {
        let mut s = Socket::open(Family::Route).unwrap();
        let other = Socket::open(Family::Route).unwrap();
        let to_us = SocketAddr::new(s.port_id().unwrap(), 0);
        // More than fit into one read; between them those of somebody else.
        for seq in 1..=40 {
            s.send(&get_link(seq, 1)).unwrap();
            let sent = other.inner.send_to(&get_link(seq + 1000, 1), &to_us, 0);
            // Sending to others takes a privilege.
            assert!(sent.is_ok() || !nix::unistd::geteuid().is_root(), "{sent:?}");
        }
        let mut seqs = Vec::new();
        let mut reads = 0;
        while s
            .recv_some(Duration::from_secs(5), |messages| seqs.extend(messages.map(|m| m.seq)))
            .unwrap()
        {
            reads += 1;
            assert!(reads < 40);
        }
        assert_eq!(seqs, (1..=40).collect::<Vec<_>>());
        let nothing = s.recv_some(Duration::ZERO, |_| panic!("there is nothing"));
        assert!(matches!(nothing, Err(NetlinkError::TimedOut(_))), "{nothing:?}");
    }
}
