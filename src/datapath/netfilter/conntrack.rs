//! Connections: what they are, when they end, and how their life is prolonged (ctnetlink).

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use netdev_providers::netlink::error::KernelError;
use netdev_providers::netlink::netfilter::conntrack::{
    CTA_ID, CTA_PROTOINFO, CTA_PROTOINFO_TCP, CTA_PROTOINFO_TCP_FLAGS_ORIGINAL,
    CTA_PROTOINFO_TCP_FLAGS_REPLY, CTA_PROTOINFO_TCP_STATE, CTA_STATUS, CTA_TIMEOUT,
    IP_CT_TCP_FLAG_BE_LIBERAL, IP_CT_TCP_FLAG_MAXACK_SET, IPCTNL_MSG_CT_DELETE, IPCTNL_MSG_CT_GET,
    IPCTNL_MSG_CT_NEW, about, is_other_protocol,
};
pub use netdev_providers::netlink::netfilter::conntrack::{CtEntry, CtId, CtStatus, TcpState};
use netdev_providers::netlink::netfilter::heard::Heard;
use netdev_providers::netlink::netfilter::{NFGENMSG_LEN, SUBSYS_CTNETLINK, msg_type, nfgenmsg};
use netdev_providers::netlink::socket::{ACK, Ack, DUMP, EXCL, REQUEST};
use netdev_providers::netlink::wire::{AttrIter, MessageIter};
use netdev_providers::netlink::{Family, Message, NetlinkError, Socket};
use netdev_providers::{Direction, L4Proto, Tuple, Zone};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};

// linux/netfilter/nfnetlink_conntrack.h
const IPCTNL_MSG_CT_GET_STATS: u16 = 5;
// enum ctattr_stats_global
const CTA_STATS_GLOBAL_ENTRIES: u16 = 1;
const CTA_STATS_GLOBAL_MAX_ENTRIES: u16 = 2;
// linux/netfilter/nfnetlink.h: enum nfnetlink_groups
const NFNLGRP_CONNTRACK_NEW: u32 = 1;
const NFNLGRP_CONNTRACK_UPDATE: u32 = 2;
const NFNLGRP_CONNTRACK_DESTROY: u32 = 3;

/// Updates, or questions, in one send.
const UPDATES_PER_SEND: usize = 64;
const EVENT_RCVBUF: usize = 32 * 1024 * 1024;
const DATAGRAMS_PER_READ: usize = 256;

/// Why connections cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum ConntrackError {
    /// `CAP_NET_ADMIN` in the user namespace of the network namespace is needed.
    #[error("conntrack by netlink needs CAP_NET_ADMIN")]
    NotPermitted,
    /// The kernel lacks ctnetlink.
    #[error(
        "the kernel lacks nf_conntrack_netlink (CONFIG_NF_CT_NETLINK, CONFIG_NF_CONNTRACK_EVENTS)"
    )]
    Unsupported(#[source] KernelError),
    /// A timeout of the namespace cannot be read: nf_conntrack is not loaded.
    #[error("reading {path}")]
    Timeouts {
        /// The file.
        path: String,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// The exchange failed, or the kernel refused it.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

/// A change of one entry. What is `None` stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CtUpdate {
    /// [`CtEntry::zone`].
    pub zone: Zone,
    /// [`CtEntry::original`].
    pub original: Tuple,
    /// From now on; whole seconds are written. A later packet in software sets the entry's timeout
    /// back to that of its state.
    pub timeout: Option<Duration>,
    /// Whether TCP windows go unchecked, in both directions; the state is not touched. Ignored for
    /// UDP.
    ///
    /// Windows that moved while packets went past the kernel are never learned again: after the
    /// flag is cleared on such a connection its packets become INVALID. Leave it set when an
    /// offload ends, as the kernel's own flowtable does.
    pub liberal: Option<bool>,
    /// Forgets what each direction has acknowledged, as the kernel's own flowtable does: it is old once
    /// packets went past the kernel, and a RST that is compared with it is not believed
    /// (`nf_conntrack_tcp_packet`: the connection stays ESTABLISHED), or is INVALID when it is
    /// 2^31 bytes behind. The next packet within the window that conntrack knows sets it again. Ignored
    /// for UDP.
    pub forget_acked: bool,
    /// The TCP state. Ignored for UDP.
    pub tcp_state: Option<TcpState>,
    /// All status bits of the entry, and more; the kernel refuses (EBUSY) what takes one back.
    pub status: Option<CtStatus>,
}

impl CtUpdate {
    /// One that changes nothing. Like every update it comes back as an event if the entry has events.
    #[must_use]
    pub const fn of(zone: Zone, original: Tuple) -> Self {
        Self {
            zone,
            original,
            timeout: None,
            liberal: None,
            forget_acked: false,
            tcp_state: None,
            status: None,
        }
    }
}

fn put_update(buf: &mut Vec<u8>, seq: u32, flags: u16, u: &CtUpdate) {
    // Without NLM_F_CREATE: a change, or ENOENT.
    let mut m = about(buf, IPCTNL_MSG_CT_NEW, flags, seq, u.zone, &u.original);
    if let Some(timeout) = u.timeout {
        m.be32(CTA_TIMEOUT, u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX));
    }
    if let Some(status) = u.status {
        m.be32(CTA_STATUS, status.0);
    }
    // struct nf_ct_tcp_flags: flags, mask
    let (mut flags, mut mask) = (0, 0);
    if let Some(liberal) = u.liberal {
        mask |= IP_CT_TCP_FLAG_BE_LIBERAL;
        flags |= if liberal { IP_CT_TCP_FLAG_BE_LIBERAL } else { 0 };
    }
    if u.forget_acked {
        mask |= IP_CT_TCP_FLAG_MAXACK_SET;
    }
    if u.original.proto() == L4Proto::Tcp && (mask != 0 || u.tcp_state.is_some()) {
        m.nested(CTA_PROTOINFO, |m| {
            m.nested(CTA_PROTOINFO_TCP, |m| {
                if let Some(state) = u.tcp_state {
                    m.u8(CTA_PROTOINFO_TCP_STATE, state as u8);
                }
                for ty in [CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, CTA_PROTOINFO_TCP_FLAGS_REPLY] {
                    m.attr(ty, &[flags, mask]);
                }
            });
        });
    }
    m.finish();
}

/// How full the table is, and how full it may get (`nf_conntrack_count`, `nf_conntrack_max`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CtUsage {
    /// Entries of this network namespace.
    pub entries: u32,
    /// The limit.
    pub max: u32,
}

/// Reads and changes entries of the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Conntrack {
    socket: Socket,
}

impl Conntrack {
    /// Opens it, and loads the kernel's module where that is needed.
    ///
    /// # Errors
    /// Missing privilege, or a kernel without ctnetlink.
    pub fn open() -> Result<Self, ConntrackError> {
        let mut this = Self { socket: Socket::open(Family::Netfilter)? };
        this.usage()?;
        Ok(this)
    }

    /// How many entries there are.
    ///
    /// # Errors
    /// A failure of the exchange.
    pub fn usage(&mut self) -> Result<CtUsage, ConntrackError> {
        let seq = self.socket.next_seq();
        let mut buf = Vec::with_capacity(32);
        let ty = msg_type(SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET_STATS);
        let mut m = Message::new(&mut buf, ty, REQUEST | ACK, seq);
        m.raw(&nfgenmsg(0, 0));
        m.finish();
        let mut usage = CtUsage::default();
        self.socket
            .request(&buf, seq, |m| {
                let number = |ty| m.attrs(NFGENMSG_LEN).find_type(ty).and_then(|a| a.be32());
                usage.entries = number(CTA_STATS_GLOBAL_ENTRIES).unwrap_or(0);
                usage.max = number(CTA_STATS_GLOBAL_MAX_ENTRIES).unwrap_or(0);
            })
            .map_err(|e| match (e.errno(), e) {
                (Some(Errno::EPERM), _) => ConntrackError::NotPermitted,
                // The answer of nfnetlink when there is no such subsystem.
                (Some(Errno::EINVAL | Errno::EOPNOTSUPP), NetlinkError::Kernel(k)) => {
                    ConntrackError::Unsupported(k)
                }
                (_, e) => e.into(),
            })?;
        Ok(usage)
    }

    /// The netlink port id of this socket: the origin of the update events that
    /// [`update`](Self::update) causes ([`CtEvents::ignore_updates_of`]).
    ///
    /// # Errors
    /// When the socket does not tell.
    pub fn port(&self) -> Result<u32, ConntrackError> {
        Ok(self.socket.port_id()?)
    }

    /// The connection of this zone and original tuple.
    ///
    /// # Errors
    /// A failure of the exchange; a connection that does not exist is `None`.
    pub fn get(&mut self, zone: Zone, original: &Tuple) -> Result<Option<CtEntry>, ConntrackError> {
        // The kernel finds an entry by its reply tuple too.
        Ok(self.by_any_tuple(zone, original)?.filter(|e| e.original == *original))
    }

    /// The connections, and the directions in them, of packets that have these tuples when they leave, after all NAT,
    /// in order: for kernels that do not log the connection with the packet. Those of another zone are not found this
    /// way: then compare [`CtEntry::outgoing`] over a [`dump`](Self::dump). Of a connection whose both directions are
    /// among them it is asked once.
    ///
    /// # Errors
    /// A failure of the exchange; a connection that does not exist is `None`.
    pub fn find_leaving(
        &mut self,
        zone: Zone,
        seen: &[Tuple],
    ) -> Result<Vec<Option<(CtEntry, Direction)>>, ConntrackError> {
        let mut found = vec![None; seen.len()];
        // Without NAT the one direction's tuple is the other's, the other way round; with NAT it can also be that of
        // another connection, which is asked for in the second round.
        let mut asked: HashMap<Tuple, usize, ahash::RandomState> = HashMap::default();
        let mut wanted = Vec::with_capacity(seen.len());
        let mut whose = Vec::with_capacity(seen.len());
        for tuple in seen {
            let answer = asked.get(&tuple.inverted()).copied().unwrap_or_else(|| {
                *asked.entry(*tuple).or_insert_with(|| {
                    // The other direction's packets arrive with it the other way round, which is a tuple of the
                    // entry: the kernel finds it by either.
                    wanted.push((zone, tuple.inverted()));
                    wanted.len() - 1
                })
            });
            whose.push(answer);
        }
        let of = |entry: &Option<CtEntry>, leaving: &Tuple| {
            let entry = entry.as_ref()?;
            let d = Direction::BOTH.into_iter().find(|d| entry.outgoing(*d) == *leaving)?;
            Some((entry.clone(), d))
        };
        let answers = self.ask(&wanted)?;
        let mut again = Vec::new();
        for (n, answer) in whose.into_iter().enumerate() {
            found[n] = of(&answers[answer], &seen[n]);
            if found[n].is_none() && wanted[answer].1 != seen[n].inverted() {
                again.push(n);
            }
        }
        if !again.is_empty() {
            let wanted: Vec<_> = again.iter().map(|&n| (zone, seen[n].inverted())).collect();
            for (n, answer) in again.into_iter().zip(self.ask(&wanted)?) {
                found[n] = of(&answer, &seen[n]);
            }
        }
        Ok(found)
    }

    /// The connection that has this tuple in one of its directions.
    ///
    /// # Errors
    /// A failure of the exchange; a connection that does not exist is `None`.
    pub fn by_any_tuple(
        &mut self,
        zone: Zone,
        tuple: &Tuple,
    ) -> Result<Option<CtEntry>, ConntrackError> {
        let seq = self.socket.next_seq();
        let mut buf = Vec::with_capacity(128);
        about(&mut buf, IPCTNL_MSG_CT_GET, ACK, seq, zone, tuple).finish();
        let mut found = None;
        let done = self.socket.request(&buf, seq, |m| {
            found = m.payload.first().and_then(|f| CtEntry::parse(*f, m.attrs(NFGENMSG_LEN)));
        });
        match done {
            Ok(()) => Ok(found),
            Err(e) if e.errno() == Some(Errno::ENOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// The connections of these zones and original tuples, in order; `None` where there is none (any
    /// more). One send and few receives for 64 of them.
    ///
    /// # Errors
    /// A failure of the exchange.
    pub fn get_many(
        &mut self,
        wanted: &[(Zone, Tuple)],
    ) -> Result<Vec<Option<CtEntry>>, ConntrackError> {
        let mut found = self.ask(wanted)?;
        for (found, (_, original)) in found.iter_mut().zip(wanted) {
            // The kernel finds an entry by its reply tuple too.
            found.take_if(|e| e.original != *original);
        }
        Ok(found)
    }

    /// The connections that have these tuples in one of their directions, in order.
    fn ask(&mut self, wanted: &[(Zone, Tuple)]) -> Result<Vec<Option<CtEntry>>, ConntrackError> {
        let mut found = vec![None; wanted.len()];
        let mut buf = Vec::new();
        for (wanted, found) in
            wanted.chunks(UPDATES_PER_SEND).zip(found.chunks_mut(UPDATES_PER_SEND))
        {
            buf.clear();
            let mut first = 0;
            for (i, (zone, tuple)) in wanted.iter().enumerate() {
                let seq = self.socket.next_seq();
                if i == 0 {
                    first = seq;
                }
                let flags = if i + 1 == wanted.len() { ACK } else { 0 };
                about(&mut buf, IPCTNL_MSG_CT_GET, flags, seq, *zone, tuple).finish();
            }
            let refused = self.socket.batch_with(&buf, first, wanted.len(), |i, m| {
                found[i] =
                    m.payload.first().and_then(|f| CtEntry::parse(*f, m.attrs(NFGENMSG_LEN)));
            })?;
            for ack in refused {
                match ack {
                    Ok(()) => {}
                    Err(e) if e.errno == Errno::ENOENT => {}
                    Err(e) => return Err(NetlinkError::from(e).into()),
                }
            }
        }
        Ok(found)
    }

    /// All TCP and UDP connections of the namespace. The table changes during the dump: what comes
    /// or goes meanwhile may be missing, and an entry may come twice.
    ///
    /// # Errors
    /// A failure of the exchange.
    pub fn dump(&mut self) -> Result<Vec<CtEntry>, ConntrackError> {
        let mut entries = Vec::new();
        self.dump_each(|e| entries.push(e))?;
        Ok(entries)
    }

    /// The same, one at a time: a full table is hundreds of megabytes of them.
    ///
    /// # Errors
    /// A failure of the exchange.
    pub fn dump_each(&mut self, mut each: impl FnMut(CtEntry)) -> Result<(), ConntrackError> {
        let seq = self.socket.next_seq();
        let mut buf = Vec::with_capacity(32);
        let ty = msg_type(SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET);
        let mut m = Message::new(&mut buf, ty, REQUEST | DUMP, seq);
        m.raw(&nfgenmsg(0, 0));
        m.finish();
        self.socket.dump(&buf, seq, |m| {
            let entry = m.payload.first().and_then(|f| CtEntry::parse(*f, m.attrs(NFGENMSG_LEN)));
            entry.into_iter().for_each(&mut each);
        })?;
        Ok(())
    }

    /// Changes entries; one answer each, in order. ENOENT: the connection is gone; EPERM: its
    /// timeout is fixed; ETIME: it is dying.
    ///
    /// An entry is found by zone and original tuple, not by its id: a connection that took the
    /// place of another gets the change. [`get`](Self::get) tells.
    ///
    /// # Errors
    /// A failure of the exchange; then it is not known which changes took effect.
    pub fn update(&mut self, updates: &[CtUpdate]) -> Result<Vec<Ack>, ConntrackError> {
        let mut acks = Vec::with_capacity(updates.len());
        let mut buf = Vec::new();
        for chunk in updates.chunks(UPDATES_PER_SEND) {
            buf.clear();
            let mut first = 0;
            for (i, update) in chunk.iter().enumerate() {
                let seq = self.socket.next_seq();
                if i == 0 {
                    first = seq;
                }
                let flags = if i + 1 == chunk.len() { ACK } else { 0 };
                put_update(&mut buf, seq, flags, update);
            }
            acks.extend(self.socket.batch(&buf, first, chunk.len())?);
        }
        Ok(acks)
    }

    /// [`update`](Self::update) of entries that may have ended meanwhile: what the kernel refuses is logged, and no more.
    ///
    /// # Errors
    /// A failure of the exchange.
    pub fn update_what_is_there(&mut self, updates: &[CtUpdate]) -> Result<(), ConntrackError> {
        for (update, ack) in updates.iter().zip(self.update(updates)?) {
            if let Err(e) = ack {
                tracing::debug!(original = %update.original, "not written: {e}");
            }
        }
        Ok(())
    }

    /// Ends a connection, if it is still the one of this id. `false` when it is gone, or replaced.
    ///
    /// # Errors
    /// A failure of the exchange.
    pub fn delete(
        &mut self,
        zone: Zone,
        original: &Tuple,
        id: Option<CtId>,
    ) -> Result<bool, ConntrackError> {
        let seq = self.socket.next_seq();
        let mut buf = Vec::with_capacity(128);
        let mut m = about(&mut buf, IPCTNL_MSG_CT_DELETE, ACK, seq, zone, original);
        if let Some(id) = id {
            m.be32(CTA_ID, id.0);
        }
        m.finish();
        match self.socket.request(&buf, seq, |_| {}) {
            Ok(()) => Ok(true),
            Err(e) if e.errno() == Some(Errno::ENOENT) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }
}

/// Something that happened to a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CtEvent {
    /// It was created.
    New(CtEntry),
    /// It changed: status, TCP state, mark.
    Update(CtEntry),
    /// It ended: by its protocol, its timeout, or by hand.
    Destroy(CtEntry),
}

impl CtEvent {
    /// The connection.
    #[must_use]
    pub const fn entry(&self) -> &CtEntry {
        match self {
            Self::New(e) | Self::Update(e) | Self::Destroy(e) => e,
        }
    }
}

/// What one read brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventRead {
    /// The events, in order; none when the time ran out.
    pub events: Vec<CtEvent>,
    /// What updates of ours have changed ([`CtEvents::ignore_updates_of`]). That it is told says that
    /// the entry has events.
    pub own: Vec<CtEntry>,
    /// Events were lost (the receive buffer was full), or cannot be read: compare with a
    /// [`Conntrack::dump`].
    pub lost: bool,
}

/// Events of TCP and UDP connections in the network namespace of the thread that opened it.
///
/// With `net.netfilter.nf_conntrack_events` = 2, the default since 6.0, the kernel prepares for
/// events only those entries that are created **while somebody listens** (in any process): of
/// entries older than this socket no event is certain, not even their end. With 0 there are none.
/// So open this first, and find the end of older entries by [`Conntrack::get`] or a dump.
#[derive(Debug)]
pub struct CtEvents {
    socket: Socket,
    ours: Vec<u32>,
}

impl CtEvents {
    /// Listens for updates and ends, and for new connections if asked.
    ///
    /// # Errors
    /// Missing privilege, or a kernel without ctnetlink.
    pub fn open(with_new: bool) -> Result<Self, ConntrackError> {
        Conntrack::open()?;
        let socket = Socket::open(Family::Netfilter)?;
        grow_buffer(&socket, EVENT_RCVBUF);
        socket.join(NFNLGRP_CONNTRACK_UPDATE)?;
        socket.join(NFNLGRP_CONNTRACK_DESTROY)?;
        if with_new {
            socket.join(NFNLGRP_CONNTRACK_NEW)?;
        }
        Ok(Self { socket, ours: Vec::new() })
    }

    /// Tells updates that this netlink port caused from others ([`EventRead::own`]): every
    /// [`Conntrack::update`] of ours comes back as an event, and carries no news.
    pub fn ignore_updates_of(&mut self, port: u32) {
        self.ours.push(port);
    }

    /// Has the kernel keep from us what is told of any other connection.
    ///
    /// # Errors
    /// That of the system call.
    pub fn hear_only_of(&self, heard: &Heard) -> io::Result<()> {
        heard.filter(&self.socket)
    }

    /// Waits for events, then takes all that are there, up to some hundreds.
    ///
    /// # Errors
    /// A failure of the socket. Lost events are no error, but [`EventRead::lost`].
    pub fn next(&mut self, within: Duration) -> Result<EventRead, ConntrackError> {
        let mut read = EventRead::default();
        let ours = &self.ours;
        let drained = drain(&mut self.socket, within, DATAGRAMS_PER_READ, |messages| {
            read_events(messages, ours, &mut read)
        })?;
        read.lost = drained.lost;
        Ok(read)
    }
}

impl AsFd for CtEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Reads one datagram; `true` when something of it cannot be read.
fn read_events(messages: MessageIter<'_>, ours: &[u32], read: &mut EventRead) -> bool {
    const NEW: u16 = msg_type(SUBSYS_CTNETLINK, IPCTNL_MSG_CT_NEW);
    const DELETE: u16 = msg_type(SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE);
    let mut lost = false;
    for m in messages {
        let kind = match m.ty {
            // NLM_F_CREATE | NLM_F_EXCL mark a new one.
            NEW if m.flags & EXCL != 0 => CtEvent::New,
            NEW => CtEvent::Update,
            DELETE => CtEvent::Destroy,
            _ => continue,
        };
        let attrs: AttrIter<'_> = m.attrs(NFGENMSG_LEN);
        let entry = m.payload.first().and_then(|&family| CtEntry::parse(family, attrs));
        let Some(entry) = entry else {
            lost |= !is_other_protocol(m.attrs(NFGENMSG_LEN));
            continue;
        };
        // The port is that of the request which caused the event; 0 for what packets caused.
        match kind(entry) {
            CtEvent::Update(entry) if m.port != 0 && ours.contains(&m.port) => read.own.push(entry),
            event => read.events.push(event),
        }
    }
    lost
}

/// How a socket was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Drained {
    /// Something was lost: the kernel said so, or who read.
    pub(super) lost: bool,
    /// Nothing was left.
    pub(super) emptied: bool,
}

/// Reads what is there, waiting for the first datagram only, and not much more than so many. `read` says whether
/// something was lost.
pub(super) fn drain(
    socket: &mut Socket,
    within: Duration,
    datagrams: usize,
    mut read: impl FnMut(MessageIter<'_>) -> bool,
) -> Result<Drained, NetlinkError> {
    let mut drained = Drained::default();
    let (mut count, mut wait) = (0, within);
    while count < datagrams && !drained.emptied {
        let some = socket.recv_some(std::mem::take(&mut wait), |messages| {
            count += 1;
            drained.lost |= read(messages);
        });
        match some {
            Ok(more) => drained.emptied = !more,
            Err(NetlinkError::TimedOut(_)) => drained.emptied = true,
            // Told once; the messages that did fit follow.
            Err(e) if e.errno() == Some(Errno::ENOBUFS) => drained.lost = true,
            Err(e) => return Err(e),
        }
    }
    Ok(drained)
}

/// Makes the receive buffer larger, as far as privilege allows.
pub(super) fn grow_buffer(socket: &Socket, bytes: usize) {
    if setsockopt(socket, sockopt::RcvBufForce, &bytes).is_err() {
        let _ = setsockopt(socket, sockopt::RcvBuf, &bytes);
    }
}

/// How long an idle entry lives, by its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// `nf_conntrack_tcp_timeout_established`.
    pub tcp_established: Duration,
    /// `nf_conntrack_tcp_timeout_fin_wait`.
    pub tcp_fin_wait: Duration,
    /// `nf_conntrack_tcp_timeout_close_wait`.
    pub tcp_close_wait: Duration,
    /// `nf_conntrack_tcp_timeout_last_ack`.
    pub tcp_last_ack: Duration,
    /// `nf_conntrack_tcp_timeout_time_wait`.
    pub tcp_time_wait: Duration,
    /// `nf_conntrack_tcp_timeout_close`: after a RST, be it believed or not.
    pub tcp_close: Duration,
    /// `nf_conntrack_udp_timeout`: UDP that is not (yet) assured.
    pub udp: Duration,
    /// `nf_conntrack_udp_timeout_stream`: UDP that is assured.
    pub udp_stream: Duration,
}

impl Timeouts {
    /// Of a TCP connection that is closing or closed; `None` of one that is not.
    #[must_use]
    pub const fn closing(&self, state: TcpState) -> Option<Duration> {
        match state {
            TcpState::FinWait => Some(self.tcp_fin_wait),
            TcpState::CloseWait => Some(self.tcp_close_wait),
            TcpState::LastAck => Some(self.tcp_last_ack),
            TcpState::TimeWait => Some(self.tcp_time_wait),
            TcpState::Close => Some(self.tcp_close),
            TcpState::None
            | TcpState::SynSent
            | TcpState::SynRecv
            | TcpState::Established
            | TcpState::SynSent2 => None,
        }
    }
}

/// The timeouts of the network namespace of the calling thread. A timeout policy (`ct timeout`) may
/// give a connection others.
///
/// # Errors
/// When nf_conntrack is not loaded.
pub fn timeouts() -> Result<Timeouts, ConntrackError> {
    let read = |name: &str| {
        let path = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
        let parsed = std::fs::read_to_string(&path)
            .and_then(|text| text.trim().parse().map_err(io::Error::other));
        match parsed {
            Ok(seconds) => Ok(Duration::from_secs(seconds)),
            Err(source) => Err(ConntrackError::Timeouts { path, source }),
        }
    };
    Ok(Timeouts {
        tcp_established: read("tcp_timeout_established")?,
        tcp_fin_wait: read("tcp_timeout_fin_wait")?,
        tcp_close_wait: read("tcp_timeout_close_wait")?,
        tcp_last_ack: read("tcp_timeout_last_ack")?,
        tcp_time_wait: read("tcp_timeout_time_wait")?,
        tcp_close: read("tcp_timeout_close")?,
        udp: read("udp_timeout")?,
        udp_stream: read("udp_timeout_stream")?,
    })
}

/// Whether conntrack counts the packets and bytes of connections that come into being now, in the
/// network namespace of the calling thread.
///
/// # Errors
/// When nf_conntrack is not loaded.
pub fn accounting() -> io::Result<bool> {
    let text = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_acct")?;
    Ok(text.trim() != "0")
}

#[cfg(test)]
mod tests;
