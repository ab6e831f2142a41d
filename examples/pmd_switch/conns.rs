//! The switch's own connection table. Each connection carries the engine's [`ConnHandle`], so that
//! "is there anything to do for the offload of this packet" is one atomic load on an object that
//! the packet's thread has in its hands anyway.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use ctoffload::engine::Engine;
use ctoffload::engine::conn::{ConnHandle, ConnKey};
use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use netdev_providers::{Direction, Ifindex, L4Proto, MacAddr, Tuple, Zone};

use super::packet::{ACK, FIN, RST, SYN, Segment};

/// How long a connection may be silent, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timeouts {
    pub(crate) new: u64,
    pub(crate) tcp: u64,
    pub(crate) udp: u64,
    pub(crate) closing: u64,
}

impl Default for Timeouts {
    fn default() -> Self {
        // RFC 5382, RFC 4787.
        Self { new: 30_000, tcp: 7_440_000, udp: 300_000, closing: 10_000 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum State {
    /// No answer yet.
    New = 0,
    /// Both ends have spoken.
    Answered = 1,
    /// FIN or RST was seen: no rules any more.
    Closing = 2,
    /// Out of the table: whoever still holds it looks the tuple up again.
    Gone = 3,
}

/// A connection.
pub(crate) struct Conn {
    pub(crate) original: Tuple,
    /// The port of its first packet.
    pub(crate) ingress: Ifindex,
    /// `None` when the engine has as many as it may.
    pub(crate) offload: Option<ConnHandle>,
    state: AtomicU8,
    /// The last packet that was seen **in software**.
    seen_ms: AtomicU64,
    /// What the sweeps made of it; see [`ctoffload::engine::usage::extended_expiry`].
    expiry_ms: AtomicU64,
    /// The destination MAC address of the present rule, by direction; 0: none.
    towards: [AtomicU64; 2],
}

impl Conn {
    pub(crate) fn state(&self) -> State {
        match self.state.load(Ordering::Acquire) {
            0 => State::New,
            1 => State::Answered,
            2 => State::Closing,
            _ => State::Gone,
        }
    }

    /// States only ever go up. True for whoever made the change.
    fn advance(&self, to: State) -> bool {
        self.state.fetch_max(to as u8, Ordering::AcqRel) < to as u8
    }

    pub(crate) fn answered(&self) -> bool {
        self.state() == State::New && self.advance(State::Answered)
    }

    pub(crate) fn closing(&self) -> bool {
        self.advance(State::Closing)
    }

    /// A packet was seen. Once in 100 ms is enough: both ends' threads share the line.
    pub(crate) fn touch(&self, now_ms: u64) {
        if self.seen_ms.load(Ordering::Relaxed) + 100 < now_ms {
            self.seen_ms.store(now_ms, Ordering::Relaxed);
        }
    }

    pub(crate) fn timeout_ms(&self, t: &Timeouts) -> u64 {
        match (self.state(), self.original.proto()) {
            (State::New, _) => t.new,
            (State::Answered, L4Proto::Tcp) => t.tcp,
            (State::Answered, L4Proto::Udp) => t.udp,
            (State::Closing | State::Gone, _) => t.closing,
        }
    }

    /// When it expires, by what software has seen and by what sweeps have found until now.
    pub(crate) fn expiry_ms(&self, t: &Timeouts) -> u64 {
        let software = self.seen_ms.load(Ordering::Relaxed) + self.timeout_ms(t);
        // The long time of an open connection is void once it closes.
        let open = self.state() < State::Closing;
        software.max(if open { self.expiry_ms.load(Ordering::Relaxed) } else { 0 })
    }

    /// A sweep has found that it expires then.
    pub(crate) fn set_expiry_ms(&self, at_ms: u64) {
        self.expiry_ms.store(at_ms, Ordering::Relaxed);
    }

    /// The station that the packets of this direction go to, by the rule.
    pub(crate) fn towards(&self, d: Direction) -> Option<MacAddr> {
        match self.towards[d.index()].load(Ordering::Relaxed).to_be_bytes() {
            [0, 0, 0, 0, 0, 0, 0, 0] => None,
            [_, _, mac @ ..] => Some(MacAddr(mac)),
        }
    }

    pub(crate) fn set_towards(&self, d: Direction, mac: MacAddr) {
        let [a, b, c, x, y, z] = mac.0;
        let number = u64::from_be_bytes([0, 0, a, b, c, x, y, z]);
        self.towards[d.index()].store(number, Ordering::Relaxed);
    }
}

/// All connections, under a key that both directions have in common.
pub(crate) struct Conns {
    engine: Engine,
    table: DashMap<Tuple, Arc<Conn>>,
    limit: usize,
    tags: AtomicU64,
    full: AtomicBool,
    pub(crate) created: AtomicU64,
    pub(crate) expired: AtomicU64,
}

fn key(tuple: &Tuple) -> Tuple {
    (*tuple).min(tuple.inverted())
}

/// A connection that was looked up.
pub(crate) struct Found {
    pub(crate) conn: Arc<Conn>,
    pub(crate) direction: Direction,
    /// This packet created it.
    pub(crate) created: bool,
}

impl Conns {
    pub(crate) fn new(engine: Engine, limit: usize) -> Self {
        Self {
            engine,
            table: DashMap::new(),
            limit,
            tags: AtomicU64::new(1),
            full: AtomicBool::new(false),
            created: AtomicU64::new(0),
            expired: AtomicU64::new(0),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    /// The connection of a segment; made when there is none, but not for a FIN or RST. `None` too
    /// when the table is full: then the packet is forwarded and that is all.
    pub(crate) fn find(&self, s: &Segment, ingress: Ifindex, now_ms: u64) -> Option<Found> {
        let full = self.full.load(Ordering::Relaxed);
        match self.table.entry(key(&s.tuple)) {
            Entry::Occupied(mut e) => {
                let conn = Arc::clone(e.get());
                // A port that is used again before the old connection has timed out.
                if conn.state() >= State::Closing && s.flags & (SYN | ACK | RST) == SYN {
                    conn.advance(State::Gone);
                    let conn = self.create(s, ingress, now_ms);
                    e.insert(Arc::clone(&conn));
                    return Some(Found { conn, direction: Direction::Original, created: true });
                }
                let original = s.tuple == conn.original;
                let direction = if original { Direction::Original } else { Direction::Reply };
                Some(Found { conn, direction, created: false })
            }
            Entry::Vacant(e) if !full && s.flags & (FIN | RST) == 0 => {
                let conn = self.create(s, ingress, now_ms);
                e.insert(Arc::clone(&conn));
                Some(Found { conn, direction: Direction::Original, created: true })
            }
            Entry::Vacant(_) => None,
        }
    }

    fn create(&self, s: &Segment, ingress: Ifindex, now_ms: u64) -> Arc<Conn> {
        self.created.fetch_add(1, Ordering::Relaxed);
        let original = s.tuple;
        // The tag makes this incarnation another one for the engine, should it still know a
        // predecessor of the same tuple: that one's rules go then.
        let tag = self.tags.fetch_add(1, Ordering::Relaxed);
        let key = ConnKey { zone: Zone(0), original };
        // No NAT in a switch: the answers have the inverted tuple.
        let offload = self.engine.conn_create(key, original.inverted(), tag);
        Arc::new(Conn {
            original,
            ingress,
            offload,
            state: AtomicU8::new(State::New as u8),
            seen_ms: AtomicU64::new(now_ms),
            expiry_ms: AtomicU64::new(0),
            towards: Default::default(),
        })
    }

    /// Those of one moment. Clones, so that nothing of the table is locked while they are looked at.
    pub(crate) fn all(&self) -> Vec<Arc<Conn>> {
        self.table.iter().map(|e| Arc::clone(e.value())).collect()
    }

    /// Takes a connection out, and its rules.
    pub(crate) fn remove(&self, conn: &Arc<Conn>) {
        self.table.remove_if(&key(&conn.original), |_, c| Arc::ptr_eq(c, conn));
        conn.advance(State::Gone);
        if let Some(handle) = &conn.offload {
            self.engine.conn_del(handle);
        }
    }

    /// Looks whether there is room, which is not for every packet to find out.
    pub(crate) fn check_limit(&self) {
        self.full.store(self.table.len() >= self.limit, Ordering::Relaxed);
    }
}
