//! What became of connections: their entries in conntrack.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::key::ConnId;
use crate::netlink::error::NetlinkError;
use crate::netlink::netfilter::conntrack::{
    CtEntry, IPCTNL_MSG_CT_GET, TcpState, about, offloaded_only,
};
use crate::netlink::netfilter::{NFGENMSG_LEN, SUBSYS_CTNETLINK, msg_type, nfgenmsg};
use crate::netlink::socket::{ACK, DUMP, Family, REQUEST, Socket};
use crate::netlink::wire::Message;

/// Requests in one send.
const GETS_PER_SEND: usize = 64;
/// The sweeps of several ports that follow each other within this time share one dump.
const FRESH: Duration = Duration::from_millis(500);
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// Reads conntrack in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(super) struct Readback {
    socket: Socket,
    dumped: Option<(Instant, HashMap<ConnId, CtEntry>)>,
}

impl Readback {
    pub(super) fn open() -> Result<Self, NetlinkError> {
        Ok(Self { socket: Socket::open(Family::Netfilter)?, dumped: None })
    }

    /// The entries of these connections, in order; `None` where there is none any more.
    pub(super) fn get(&mut self, conns: &[ConnId]) -> Result<Vec<Option<CtEntry>>, NetlinkError> {
        let mut found = vec![None; conns.len()];
        let mut buf = Vec::new();
        for (chunk, found) in conns.chunks(GETS_PER_SEND).zip(found.chunks_mut(GETS_PER_SEND)) {
            buf.clear();
            let mut first = 0;
            for (i, conn) in chunk.iter().enumerate() {
                let seq = self.socket.next_seq();
                if i == 0 {
                    first = seq;
                }
                let ack = if i + 1 == chunk.len() { ACK } else { 0 };
                about(&mut buf, IPCTNL_MSG_CT_GET, ack, seq, conn.zone, &conn.original).finish();
            }
            self.socket.send(&buf)?;
            let mut refused = None;
            let mut ended = false;
            while !ended {
                self.socket.recv(ANSWER_WITHIN, |messages| {
                    for m in messages {
                        let index = m.seq.wrapping_sub(first) as usize;
                        let Some(slot) = found.get_mut(index) else { continue };
                        match m.ack() {
                            Some(ack) => {
                                ended |= index + 1 == chunk.len();
                                refused = ack
                                    .err()
                                    .filter(|e| e.errno != Errno::ENOENT)
                                    .or(refused.take());
                            }
                            None => {
                                let family = m.payload.first().copied().unwrap_or(0);
                                // The kernel finds an entry by its reply tuple too.
                                *slot = CtEntry::parse(family, m.attrs(NFGENMSG_LEN))
                                    .filter(|e| e.original == chunk[index].original);
                            }
                        }
                    }
                })?;
            }
            if let Some(e) = refused {
                return Err(e.into());
            }
        }
        Ok(found)
    }

    /// Runs `f` on the connections that are in a flowtable now, or were some hundred milliseconds
    /// ago.
    pub(super) fn offloaded<R>(
        &mut self,
        f: impl FnOnce(&HashMap<ConnId, CtEntry>) -> R,
    ) -> Result<R, NetlinkError> {
        if let Some((at, entries)) = &self.dumped
            && at.elapsed() < FRESH
        {
            return Ok(f(entries));
        }
        let mut entries = HashMap::new();
        let seq = self.socket.next_seq();
        let mut buf = Vec::with_capacity(64);
        let ty = msg_type(SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET);
        let mut m = Message::new(&mut buf, ty, REQUEST | DUMP, seq);
        m.raw(&nfgenmsg(0, 0));
        offloaded_only(&mut m);
        m.finish();
        self.socket.dump(&buf, seq, |m| {
            let family = m.payload.first().copied().unwrap_or(0);
            let entry = CtEntry::parse(family, m.attrs(NFGENMSG_LEN));
            if let Some(e) = entry.filter(|e| e.status.offload()) {
                entries.insert(ConnId { zone: e.zone, original: e.original }, e);
            }
        })?;
        let (_, entries) = self.dumped.insert((Instant::now(), entries));
        Ok(f(entries))
    }
}

/// Whether the flowtable's entry of this connection lives, and will not end by itself soon: a
/// connection that is closing has a FIN to come.
pub(super) fn goes_on(entry: &CtEntry) -> bool {
    entry.status.offload()
        && !entry.status.dying()
        && entry.tcp_state.is_none_or(|s| s == TcpState::Established)
}
