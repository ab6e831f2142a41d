//! Connections and the slots that hang on them.
//!
//! A datapath keeps a [`ConnHandle`] in its own connection object; asking whether a direction is
//! decided on a port is then one atomic load, without a hash. Datapaths that have no object of
//! their own find the handle by key in the engine ([`Engine::conn`](super::Engine::conn)).

use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::ops::Deref;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use netdev_providers::{
    Counters, Direction, Epoch, Generation, Ifindex, MacAddr, Rejection, RuleId, Tuple, Zone,
};

use super::pace::Pace;
use super::slot::{Claim, SlotWord};
use super::sync::{AtomicBool, AtomicU64, Mutex, MutexGuard, OnceLock, fence};

/// How many ports one direction of one connection can be seen on. A bound on memory: beyond it offers
/// are rejected with `too-many-ports`. Slots of ports that are gone are used again.
const MAX_PORTS: usize = 16;

/// What identifies a connection among the living.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnKey {
    /// Its conntrack zone.
    pub zone: Zone,
    /// The tuple of its first packet.
    pub original: Tuple,
}

impl Hash for ConnKey {
    /// In two words for IPv4: a hash of the fields one by one is most of the cost of a look-up.
    fn hash<H: Hasher>(&self, state: &mut H) {
        let t = &self.original;
        state.write_u64(
            u64::from(self.zone.0) << 48
                | u64::from(t.proto().number()) << 32
                | u64::from(t.sport()) << 16
                | u64::from(t.dport()),
        );
        match (t.src(), t.dst()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                state.write_u64(u64::from(src.to_bits()) << 32 | u64::from(dst.to_bits()));
            }
            (src, dst) => {
                for address in [src, dst] {
                    match address {
                        IpAddr::V4(a) => state.write_u32(a.to_bits()),
                        IpAddr::V6(a) => state.write_u128(a.to_bits()),
                    }
                }
            }
        }
    }
}

/// A time on the engine's clock, or none, in eight bytes: slots are many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Moment(Option<NonZeroU64>);

impl Moment {
    pub(super) const fn at(ms: u64) -> Self {
        // The end of time is a millisecond early.
        Self(NonZeroU64::new(ms.saturating_add(1)))
    }

    pub(super) fn ms(self) -> Option<u64> {
        self.0.map(|n| n.get() - 1)
    }
}

/// What the slow parts of the engine know of a slot. Behind a lock that packet threads never take.
#[derive(Debug, Default)]
pub(super) struct Detail {
    /// The rule, from the completion of the add to that of the delete.
    pub rule: Option<RuleId>,
    /// Where the rule forwards to.
    pub path: Option<PathTaken>,
    pub in_hw: Option<bool>,
    pub said: Option<Box<Said>>,
    /// Transient refusals in a row.
    pub attempts: u16,
    /// Of the rule, as sweeps measured it; before it is installed, of the connection, as its sights
    /// tell it.
    pub pace: Pace,
    pub retry_at: Moment,
    /// When a sweep last saw the counters move; before the first time, when it was installed; before
    /// that, when its sight was re-armed.
    pub used_ms: u64,
    pub packets: u64,
    pub bytes: u64,
    /// The last sweep that saw the rule.
    pub sweep: u32,
}

/// What there is to be told of a slot, beside its state.
#[derive(Debug)]
pub(super) enum Said {
    /// Why it is rejected, or will be when its rule is gone.
    Rejected(Rejection),
    /// Why its rule is still there though it is to go.
    Undeleted(Rejection),
    /// Why the NIC did not take its rule, in the driver's words.
    ByNic(Box<str>),
}

/// The path that a rule was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathTaken {
    /// Where the packets are sent.
    pub egress: Ifindex,
    /// The neighbour they are sent to, where there is one.
    pub next_hop: Option<IpAddr>,
    /// The MAC address they are sent to; of bridged ones, the one that they arrive with.
    pub dst_mac: Option<MacAddr>,
    /// The netdev above the port that the packets arrive on, where there is one.
    pub iif: Option<Ifindex>,
    /// The netdev above [`egress`](Self::egress) that they are routed to, where there is one.
    pub oif: Option<Ifindex>,
    /// See [`Path::answer`](super::datapath::Path::answer).
    pub answer: u16,
    /// True when addresses or ports are rewritten.
    pub nat: bool,
    /// True when a bridge forwards the packets, and nobody routes them.
    pub bridged: bool,
}

/// One slot of a connection; see [`super::slot`].
#[derive(Clone, Copy)]
pub(super) struct Slot<'a> {
    pub word: &'a SlotWord,
    rest: &'a Rest,
}

/// What there is of a slot beside its word.
#[derive(Debug, Default)]
struct Rest {
    detail: Mutex<Detail>,
    next: OnceLock<Box<Further>>,
}

/// The slot of one more port.
#[derive(Debug, Default)]
struct Further {
    word: SlotWord,
    rest: Rest,
}

impl Further {
    fn slot(&self) -> Slot<'_> {
        Slot { word: &self.word, rest: &self.rest }
    }
}

impl<'a> Slot<'a> {
    pub(super) fn detail(self) -> MutexGuard<'a, Detail> {
        // A panic of somebody who held it leaves plain values behind, all of them valid.
        self.rest.detail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(self) -> Option<Self> {
        self.rest.next.get().map(|further| further.slot())
    }

    fn next_or_new(self) -> Self {
        self.rest.next.get_or_init(Box::default).slot()
    }
}

/// Traffic of a connection's rules that are gone, so that what it carried never becomes less.
#[derive(Debug, Default)]
struct Past {
    packets: AtomicU64,
    bytes: AtomicU64,
}

/// One connection. Made by [`Engine::conn_create`](super::Engine::conn_create); its memory lasts as
/// long as somebody holds a handle or an operation of it is under way.
///
/// The first 16 bytes are for whoever reads a slot's word without this crate's code (the C header): the words
/// of both directions, side by side, laid out as [`Snapshot`](super::slot::Snapshot) says.
#[derive(Debug)]
#[repr(C)]
pub struct Conn {
    /// The word of each direction's first slot.
    words: [SlotWord; 2],
    /// The rest of these slots; further ports hang on them.
    rests: [Rest; 2],
    past: Past,
    epoch: Epoch,
    tag: u64,
    created_ms: u64,
    key: ConnKey,
    reply: Tuple,
    dead: AtomicBool,
    /// A reply has been seen, anywhere: for the connection's whole life.
    replied: AtomicBool,
}

/// A counted reference to a connection. Clone it into the datapath's own object.
#[derive(Clone)]
pub struct ConnHandle(Arc<Conn>);

impl Deref for ConnHandle {
    type Target = Conn;
    fn deref(&self) -> &Conn {
        &self.0
    }
}

impl fmt::Display for ConnHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (zone {}, epoch {})", self.key.original, self.key.zone, self.epoch)
    }
}

impl fmt::Debug for ConnHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConnHandle({self})")
    }
}

/// Of who keeps it as a bare pointer (`Arc::into_raw`), and back.
impl From<Arc<Conn>> for ConnHandle {
    fn from(conn: Arc<Conn>) -> Self {
        Self(conn)
    }
}

impl From<ConnHandle> for Arc<Conn> {
    fn from(handle: ConnHandle) -> Self {
        handle.0
    }
}

impl ConnHandle {
    pub(super) fn new(key: ConnKey, reply: Tuple, epoch: Epoch, tag: u64, created_ms: u64) -> Self {
        Self(Arc::new(Conn {
            words: Default::default(),
            rests: Default::default(),
            past: Past::default(),
            epoch,
            tag,
            created_ms,
            key,
            reply,
            dead: AtomicBool::new(false),
            replied: AtomicBool::new(false),
        }))
    }

    /// The bare pointer, for who counts no reference: as long as somebody else does, it is what
    /// `Arc::into_raw` would give.
    #[must_use]
    pub fn as_ptr(&self) -> *const Conn {
        Arc::as_ptr(&self.0)
    }

    /// True when both are the same incarnation of the same connection.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// What became of an attempt to claim a slot of a connection.
pub(super) enum ConnClaim<'a> {
    Won(Slot<'a>),
    Decided,
    /// The connection has ended.
    Dead,
    Full,
}

impl Conn {
    /// Zone and original tuple.
    #[must_use]
    pub const fn key(&self) -> &ConnKey {
        &self.key
    }
    /// The tuple of its answers: where it is not the original inverted, there is NAT.
    #[must_use]
    pub const fn reply(&self) -> &Tuple {
        &self.reply
    }
    /// Which incarnation it is.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }
    /// The datapath's own mark (the kernel datapath: the conntrack id).
    #[must_use]
    pub const fn tag(&self) -> u64 {
        self.tag
    }
    /// When the engine first heard of it, on the engine's clock.
    #[must_use]
    pub const fn created_ms(&self) -> u64 {
        self.created_ms
    }
    /// True after [`Engine::conn_del`](super::Engine::conn_del).
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// True when a reply has been seen on any port.
    #[must_use]
    pub fn has_replied(&self) -> bool {
        self.replied.load(Ordering::Acquire)
    }

    /// A reply was seen. Whoever calls this looks at the slot then; whoever has installed a rule looks
    /// at [`replied_by_now`](Self::replied_by_now) then: with a fence between the two on both sides, one of
    /// them sees the other.
    pub(super) fn note_reply(&self) {
        if !self.has_replied() {
            self.replied.store(true, Ordering::Release);
        }
        fence(Ordering::SeqCst);
    }

    /// The same question, of one who has just installed a rule.
    pub(super) fn replied_by_now(&self) -> bool {
        fence(Ordering::SeqCst); // see `note_reply`
        self.has_replied()
    }

    /// A rule of it is gone, or its counters have begun anew. Called with the slot's detail locked,
    /// and before that forgets them.
    pub(super) fn past_traffic(&self, packets: u64, bytes: u64) {
        if packets > 0 || bytes > 0 {
            self.past.bytes.fetch_add(bytes, Ordering::AcqRel);
            self.past.packets.fetch_add(packets, Ordering::AcqRel);
        }
    }

    /// What all its rules carried, past and present, on all ports, as of the last sweep. Never less
    /// than it was.
    #[must_use]
    pub fn traffic(&self) -> Counters {
        let past = || {
            let packets = self.past.packets.load(Ordering::Acquire);
            (packets, self.past.bytes.load(Ordering::Acquire))
        };
        // Counters move from a slot to the past while we look: then we look again. Sweeps and
        // deletes are rare; should they not be, what has moved is missed once, rather than counted
        // twice.
        let mut before = past();
        for _ in 0..8 {
            let mut sum = Counters { packets: before.0, bytes: before.1 };
            for (_, _, slot) in self.all_slots() {
                let detail = slot.detail();
                sum.packets += detail.packets;
                sum.bytes += detail.bytes;
            }
            let after = past();
            if after == before {
                return sum;
            }
            before = after;
        }
        Counters { packets: before.0, bytes: before.1 }
    }

    /// The tuple of this direction's packets when they arrive.
    #[must_use]
    pub const fn arriving(&self, d: Direction) -> &Tuple {
        match d {
            Direction::Original => &self.key.original,
            Direction::Reply => &self.reply,
        }
    }

    /// The tuple of this direction's packets when they leave, after NAT.
    #[must_use]
    pub const fn leaving(&self, d: Direction) -> Tuple {
        match d {
            Direction::Original => self.reply.inverted(),
            Direction::Reply => self.key.original.inverted(),
        }
    }

    /// Whether a packet thread has nothing (more) to do for this direction on this port. One atomic
    /// load when the port was the first to see the direction; no lock, no write.
    #[inline]
    #[must_use]
    pub fn is_decided(&self, port: Generation, d: Direction) -> bool {
        self.words[d.index()].load().is_decided(port) || self.is_decided_further(port, d)
    }

    #[cold]
    fn is_decided_further(&self, port: Generation, d: Direction) -> bool {
        self.slots_of(d).skip(1).any(|slot| slot.word.load().is_decided(port))
    }

    fn first_slot(&self, d: Direction) -> Slot<'_> {
        Slot { word: &self.words[d.index()], rest: &self.rests[d.index()] }
    }

    /// Claims the slot of (port, direction), making one where there is none. Slots of ports that were
    /// `gone` when this one was added are taken over.
    pub(super) fn claim(
        &self,
        port: Generation,
        d: Direction,
        gone: impl Fn(Generation) -> bool,
    ) -> ConnClaim<'_> {
        let mut slot = self.first_slot(d);
        for more in (0..MAX_PORTS).rev() {
            match slot.word.claim(port, &gone) {
                Claim::Won => {
                    // `end` sets `dead`, and its caller then unwinds every slot that it finds; a claim
                    // is made and then looks at `dead`. With a fence between the two on both sides
                    // one of them sees the other. (Sequentially consistent accesses would not do:
                    // finding a slot is an acquiring load.)
                    fence(Ordering::SeqCst);
                    if self.is_dead() {
                        slot.word.unclaim(port);
                        return ConnClaim::Dead;
                    }
                    return ConnClaim::Won(slot);
                }
                Claim::Decided => return ConnClaim::Decided,
                Claim::Other if more > 0 => slot = slot.next_or_new(),
                Claim::Other => break,
            }
        }
        ConnClaim::Full
    }

    /// No claim succeeds from now on that the caller does not see. True for the first caller.
    pub(super) fn end(&self) -> bool {
        let first = !self.dead.swap(true, Ordering::AcqRel);
        fence(Ordering::SeqCst); // see `claim`
        first
    }

    /// The slot of (port, direction), where there is one.
    pub(super) fn slot(&self, port: Generation, d: Direction) -> Option<Slot<'_>> {
        self.slots_of(d).find(|s| s.word.load().generation() == Some(port))
    }

    pub(super) fn slots_of(&self, d: Direction) -> impl Iterator<Item = Slot<'_>> {
        std::iter::successors(Some(self.first_slot(d)), |slot| slot.next())
    }

    /// Every slot that was ever claimed, with its direction and the generation of its port.
    pub(super) fn all_slots(&self) -> impl Iterator<Item = (Direction, Generation, Slot<'_>)> {
        Direction::BOTH.into_iter().flat_map(|d| {
            self.slots_of(d).filter_map(move |s| Some((d, s.word.load().generation()?, s)))
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::engine::slot::SlotState;

    pub(crate) fn conn() -> ConnHandle {
        let original: Tuple = "tcp 192.0.2.1:1000 > 198.51.100.2:80".parse().unwrap();
        let reply: Tuple = "tcp 198.51.100.2:80 > 203.0.113.1:2000".parse().unwrap();
        ConnHandle::new(ConnKey { zone: Zone(0), original }, reply, Epoch(1), 0, 0)
    }

    /// No port is gone.
    fn nobody(_: Generation) -> bool {
        false
    }

    #[test]
    fn a_port_that_comes_back_again_and_again_has_the_first_slot_each_time() {
        let c = conn();
        let d = Direction::Original;
        for n in 1..100 {
            let g = Generation::new(n).unwrap();
            assert!(matches!(c.claim(g, d, |old| old < g), ConnClaim::Won(_)));
            assert!(c.words[d.index()].load().is_decided(g));
        }
        assert_eq!(c.all_slots().count(), 1);
    }

    #[test]
    fn tuples_of_both_directions_follow_the_nat() {
        let c = conn();
        assert_eq!(
            c.leaving(Direction::Original).to_string(),
            "tcp 203.0.113.1:2000 > 198.51.100.2:80"
        );
        assert_eq!(c.leaving(Direction::Reply).to_string(), "tcp 198.51.100.2:80 > 192.0.2.1:1000");
    }

    #[test]
    fn every_port_and_direction_has_a_slot_of_its_own_up_to_a_bound() {
        let c = conn();
        for d in Direction::BOTH {
            for n in (1u32..).take(MAX_PORTS) {
                let g = Generation::new(n).unwrap();
                assert!(!c.is_decided(g, d));
                assert!(matches!(c.claim(g, d, nobody), ConnClaim::Won(_)));
                assert!(matches!(c.claim(g, d, nobody), ConnClaim::Decided));
                assert!(c.is_decided(g, d));
            }
            let one_more = Generation::new(1000).unwrap();
            assert!(matches!(c.claim(one_more, d, nobody), ConnClaim::Full));
        }
        assert_eq!(c.all_slots().count(), 2 * MAX_PORTS);
        assert_eq!(Direction::BOTH.map(|d| c.slots_of(d).count()), [MAX_PORTS; 2]);
    }

    #[test]
    fn an_ended_connection_gives_no_slot() {
        let c = conn();
        assert!(c.end());
        assert!(!c.end());
        let g = Generation::new(1).unwrap();
        assert!(matches!(c.claim(g, Direction::Reply, nobody), ConnClaim::Dead));
        let slot = c.slot(g, Direction::Reply).unwrap();
        assert_eq!(slot.word.load().state(), SlotState::Empty);
    }

    #[test]
    fn a_slot_takes_at_most_200_bytes() {
        // The rest is for what a port keeps of it: 26 bytes in tables that are 7/16 full at worst.
        assert!(size_of::<Further>() + 26 * 16 / 7 <= 200, "{}", size_of::<Further>());
    }

    #[test]
    fn a_handle_is_a_bare_pointer_and_back() {
        let c = conn();
        let pointer = c.as_ptr();
        assert!(std::ptr::eq(pointer, &*c));
        let shared: Arc<Conn> = c.clone().into();
        assert!(std::ptr::eq(pointer, Arc::as_ptr(&shared)));
        assert!(ConnHandle::from(shared).is_same(&c));
    }

    #[test]
    fn the_words_stand_where_others_look_for_them() {
        assert_eq!(std::mem::offset_of!(Conn, words), 0);
        assert_eq!((size_of::<SlotWord>(), align_of::<Conn>()), (8, 8));
        let (c, g) = (conn(), Generation::new(0x0102_0304).unwrap());
        assert!(matches!(c.claim(g, Direction::Reply, nobody), ConnClaim::Won(_)));
        assert_eq!(c.words[1].load().state(), SlotState::Pending);
        assert!(!c.words[0].load().is_decided(g) && c.words[1].load().is_decided(g));
    }
}
