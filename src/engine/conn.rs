//! Connections and the slots that hang on them.
//!
//! A datapath keeps a [`ConnHandle`] in its own connection object; asking whether a direction is
//! decided on a port is then one atomic load, without a hash. Datapaths that have no object of
//! their own find the handle by key in the engine ([`Engine::conn`](super::Engine::conn)).

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU32, Ordering};

use netdev_providers::{Counters, Direction, Epoch, Generation, Tuple};
use triomphe::Arc;

use super::detail::Detail;
pub use super::paths::PathTaken;
use super::prefetch::prefetch;
use super::slot::{Claim, SlotWord};
use super::sync::{AtomicBool, AtomicU64, Mutex, MutexGuard, OnceBox, fence};
pub use super::tuples::ConnKey;
use super::tuples::Tuples;

/// How many ports one direction of one connection can be seen on. A bound on memory: beyond it offers
/// are rejected with `too-many-ports`. Slots of ports that are gone are used again.
const MAX_PORTS: usize = 16;

/// Where in its port's list a slot is. Guarded by the lock of that list.
#[derive(Debug, Default)]
pub(super) struct Place(AtomicU32);

impl Place {
    pub(super) fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed) as usize
    }

    /// It is a hint: what does not fit is found without it.
    pub(super) fn set(&self, place: usize) {
        self.0.store(u32::try_from(place).unwrap_or(u32::MAX), Ordering::Relaxed);
    }
}

/// One slot of a connection; see [`super::slot`].
#[derive(Clone, Copy)]
pub(super) struct Slot<'a> {
    pub word: &'a SlotWord,
    pub place: &'a Place,
    detail: Lock<'a>,
}

/// Where the detail of a slot is.
#[derive(Clone, Copy)]
enum Lock<'a> {
    /// Beside that of the other direction's first slot, behind one lock.
    First(&'a Mutex<[Detail; 2]>, Direction),
    Further(&'a Mutex<Detail>),
}

/// The detail of a slot, locked.
pub(super) enum DetailGuard<'a> {
    First(MutexGuard<'a, [Detail; 2]>, Direction),
    Further(MutexGuard<'a, Detail>),
}

impl Deref for DetailGuard<'_> {
    type Target = Detail;
    fn deref(&self) -> &Detail {
        match self {
            Self::First(both, d) => &both[d.index()],
            Self::Further(detail) => detail,
        }
    }
}

impl DerefMut for DetailGuard<'_> {
    fn deref_mut(&mut self) -> &mut Detail {
        match self {
            Self::First(both, d) => &mut both[d.index()],
            Self::Further(detail) => detail,
        }
    }
}

impl<'a> Slot<'a> {
    pub(super) fn detail(self) -> DetailGuard<'a> {
        // A panic of somebody who held it leaves plain values behind, all of them valid.
        match self.detail {
            Lock::First(both, d) => {
                DetailGuard::First(both.lock().unwrap_or_else(PoisonError::into_inner), d)
            }
            Lock::Further(detail) => {
                DetailGuard::Further(detail.lock().unwrap_or_else(PoisonError::into_inner))
            }
        }
    }
}

/// The slot of one more port. They hang on the connection in a chain, those of both directions.
#[derive(Debug)]
struct Further {
    word: SlotWord,
    detail: Mutex<Detail>,
    next: OnceBox<Further>,
    place: Place,
    direction: Direction,
}

impl Further {
    fn new(direction: Direction) -> Box<Self> {
        Box::new(Self {
            word: SlotWord::default(),
            detail: Mutex::default(),
            next: OnceBox::default(),
            place: Place::default(),
            direction,
        })
    }

    fn slot(&self) -> Slot<'_> {
        Slot { word: &self.word, place: &self.place, detail: Lock::Further(&self.detail) }
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
/// of both directions, side by side, laid out as [`Snapshot`](super::slot::Snapshot) says. Behind them, most
/// often in the same cache line, stands what a look-up compares.
#[derive(Debug)]
#[repr(C)]
pub struct Conn {
    /// The word of each direction's first slot.
    words: [SlotWord; 2],
    tuples: Tuples,
    places: [Place; 2],
    /// Of both first slots. One lock, which nobody takes while holding it, and no packet thread ever.
    details: Mutex<[Detail; 2]>,
    /// The slots of further ports.
    further: OnceBox<Further>,
    past: Past,
    epoch: Epoch,
    tag: u64,
    created_ms: u64,
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
        let ConnKey { zone, original } = self.key();
        write!(f, "{original} (zone {zone}, epoch {})", self.epoch)
    }
}

impl fmt::Debug for ConnHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConnHandle({self})")
    }
}

/// What a handle is, for who keeps it as a bare pointer (`ConnArc::into_raw`).
pub type ConnArc = Arc<Conn>;

impl From<ConnArc> for ConnHandle {
    fn from(conn: ConnArc) -> Self {
        Self(conn)
    }
}

impl From<ConnHandle> for ConnArc {
    fn from(handle: ConnHandle) -> Self {
        handle.0
    }
}

impl ConnHandle {
    pub(super) fn new(key: ConnKey, reply: Tuple, epoch: Epoch, tag: u64, created_ms: u64) -> Self {
        Self(Arc::new(Conn {
            words: Default::default(),
            tuples: Tuples::new(&key, &reply),
            places: Default::default(),
            details: Mutex::default(),
            further: OnceBox::default(),
            past: Past::default(),
            epoch,
            tag,
            created_ms,
            dead: AtomicBool::new(false),
            replied: AtomicBool::new(false),
        }))
    }

    /// The bare pointer, for who counts no reference: as long as somebody else does, it is what
    /// `ConnArc::into_raw` would give.
    #[must_use]
    pub fn as_ptr(&self) -> *const Conn {
        Arc::as_ptr(&self.0)
    }

    /// Asks the processor for what a look-up compares, and counts: the references, the words and the beginning of
    /// the tuples, which may be in two lines.
    pub(super) fn prefetch(&self) {
        let start = self.as_ptr().cast::<u8>();
        prefetch(start);
        prefetch(start.wrapping_add(size_of::<[SlotWord; 2]>() + 2 * size_of::<u64>() - 1));
    }

    /// The same for the references alone, by who compares at once: they may be in the line before what is
    /// compared, and are counted only behind the comparison.
    #[inline]
    pub(super) fn prefetch_count(&self) {
        prefetch(self.as_ptr());
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
    pub fn key(&self) -> ConnKey {
        ConnKey { zone: self.tuples.zone(), original: self.tuples.original() }
    }
    /// The tuple of its answers: where it is not the original inverted, there is NAT.
    #[must_use]
    pub fn reply(&self) -> Tuple {
        self.tuples.reply()
    }
    pub(super) const fn tuples(&self) -> &Tuples {
        &self.tuples
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
    pub fn arriving(&self, d: Direction) -> Tuple {
        match d {
            Direction::Original => self.tuples.original(),
            Direction::Reply => self.tuples.reply(),
        }
    }

    /// The tuple of this direction's packets when they leave, after NAT.
    #[must_use]
    pub fn leaving(&self, d: Direction) -> Tuple {
        self.arriving(d.opposite()).inverted()
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
        self.further_of(d).any(|slot| slot.word.load().is_decided(port))
    }

    fn first_slot(&self, d: Direction) -> Slot<'_> {
        let n = d.index();
        Slot { word: &self.words[n], place: &self.places[n], detail: Lock::First(&self.details, d) }
    }

    fn further_of(&self, d: Direction) -> impl Iterator<Item = Slot<'_>> {
        let chain = std::iter::successors(self.further.get(), |further| further.next.get());
        chain.filter(move |further| further.direction == d).map(Further::slot)
    }

    /// Claims the slot of (port, direction), making one where there is none. Slots of ports that were
    /// `gone` when this one was added are taken over.
    pub(super) fn claim(
        &self,
        port: Generation,
        d: Direction,
        gone: impl Fn(Generation) -> bool,
    ) -> ConnClaim<'_> {
        if let Some(claim) = self.claim_slot(self.first_slot(d), port, &gone) {
            return claim;
        }
        let (mut end, mut slots) = (&self.further, 1);
        while slots < MAX_PORTS {
            // Somebody else may hang one there at the same moment, of either direction.
            let further = end.get_or_init(|| Further::new(d));
            end = &further.next;
            if further.direction != d {
                continue;
            }
            slots += 1;
            if let Some(claim) = self.claim_slot(further.slot(), port, &gone) {
                return claim;
            }
        }
        ConnClaim::Full
    }

    /// `None`: the slot is another port's.
    fn claim_slot<'a>(
        &self,
        slot: Slot<'a>,
        port: Generation,
        gone: impl Fn(Generation) -> bool,
    ) -> Option<ConnClaim<'a>> {
        match slot.word.claim(port, gone) {
            Claim::Won => {
                // `end` sets `dead`, and its caller then unwinds every slot that it finds; a claim
                // is made and then looks at `dead`. With a fence between the two on both sides
                // one of them sees the other. (Sequentially consistent accesses would not do:
                // finding a slot is an acquiring load.)
                fence(Ordering::SeqCst);
                if self.is_dead() {
                    slot.word.unclaim(port);
                    return Some(ConnClaim::Dead);
                }
                Some(ConnClaim::Won(slot))
            }
            Claim::Decided => Some(ConnClaim::Decided),
            Claim::Other => None,
        }
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
        std::iter::once(self.first_slot(d)).chain(self.further_of(d))
    }

    /// Every slot that was ever claimed, with its direction and the generation of its port.
    pub(super) fn all_slots(&self) -> impl Iterator<Item = (Direction, Generation, Slot<'_>)> {
        Direction::BOTH.into_iter().flat_map(|d| {
            self.slots_of(d).filter_map(move |s| Some((d, s.word.load().generation()?, s)))
        })
    }
}

/// Reads of each, before somebody counts one more reference to each: these reads wait for memory all at once,
/// and the counts, each behind the other, find it in a cache.
pub(super) fn warm<'a>(conns: impl IntoIterator<Item = &'a ConnHandle>) {
    for conn in conns {
        std::hint::black_box(conn.words[0].load());
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::engine::slot::SlotState;
    use netdev_providers::Zone;

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
    fn a_connection_with_both_slots_takes_at_most_264_bytes_and_a_further_slot_104() {
        // With the reference count. A port keeps eight bytes more of each slot, the index nine in tables that are
        // 7/16 full at worst: 301 at worst.
        assert!(size_of::<Conn>() + 8 <= 264, "{}", size_of::<Conn>());
        assert!(size_of::<Further>() <= 104, "{}", size_of::<Further>());
    }

    #[test]
    fn a_handle_is_a_bare_pointer_and_back() {
        let c = conn();
        let pointer = c.as_ptr();
        assert!(std::ptr::eq(pointer, &*c));
        let shared: ConnArc = c.clone().into();
        assert!(std::ptr::eq(pointer, &*shared));
        assert!(ConnHandle::from(shared).is_same(&c));
    }

    #[test]
    fn further_slots_of_both_directions_hang_in_one_chain_and_are_told_apart() {
        let c = conn();
        let g = |n| Generation::new(n).unwrap();
        for n in 1..5 {
            for d in
                if n % 2 == 0 { Direction::BOTH } else { [Direction::Reply, Direction::Original] }
            {
                assert!(matches!(c.claim(g(n), d, nobody), ConnClaim::Won(_)));
                c.slot(g(n), d).unwrap().detail().used_ms = u64::from(n) * 2 + d as u64;
            }
        }
        for n in 1..5 {
            for d in Direction::BOTH {
                let used_ms = c.slot(g(n), d).unwrap().detail().used_ms;
                assert_eq!(used_ms, u64::from(n) * 2 + d as u64);
            }
        }
        let keys = |d| c.slots_of(d).map(|s| s.word.load().generation().unwrap().get());
        assert_eq!(Direction::BOTH.map(|d| keys(d).collect::<Vec<_>>()), [[1, 2, 3, 4]; 2]);
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
