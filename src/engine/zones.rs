//! The cold index: connections by zone and tuple, in either direction. Never on the packet path.
//!
//! Each zone that was ever heard of has tables of its own, so that what is asked of a zone costs what it has.
//! A table has a handle for each connection and nothing else: what is compared stands in the connection. The
//! tables, in shards behind locks, are dashmap's, used by the hash: there is no key beside the value.
//!
//! Shards are many, because somebody who goes through them all, or finds one full, holds its lock for as long
//! as that takes: some thousand connections at most, where [`Zones::new`] is told how many there may be.

use std::hash::Hash;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use ahash::RandomState;
use dashmap::{DashMap, SharedValue};
use netdev_providers::{Tuple, Zone};

use super::conn::{ConnHandle, ConnKey};
use super::prefetch::prefetch;
use super::sync::{self, fence};
use super::tuples::Name;

/// Connections that a shard is to have at most, or about.
const PER_SHARD: usize = 1 << 11;
/// Shards of the default zone, at most; a shard takes 128 bytes.
const MAX_SHARDS: usize = 1 << 10;
/// Shards of any other zone, of which there may be many.
const ZONE_SHARDS: usize = 1 << 6;

/// Look-ups that wait for memory together: as many packets as datapaths take at a time.
const BURST: usize = 32;
/// Of 8 bytes, in 64.
const HANDLES_PER_LINE: usize = 8;

/// Handles by a hash that follows from the connection.
#[derive(Debug)]
struct Handles(DashMap<(), ConnHandle, RandomState>);

/// Where a table is read first for a hash, as hashbrown lays it out: handles grow down from the control bytes,
/// one of those for each.
struct Start {
    control: *const u8,
    handle: *const ConnHandle,
}

impl Start {
    fn new(table: *const u8, places: usize, hash: u64) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "the lower bits are the place")]
        let place = hash as usize & (places - 1);
        let control = table.cast::<ConnHandle>().wrapping_add(places);
        Self {
            control: control.cast::<u8>().wrapping_add(place),
            handle: control.wrapping_sub(place + 1),
        }
    }

    /// Asks for the first handles from there on.
    #[inline]
    fn prefetch_handles(&self) {
        prefetch(self.handle);
        prefetch(self.handle.wrapping_sub(HANDLES_PER_LINE));
    }
}

/// What becomes of an attempt to enter a connection.
pub(super) enum Entered {
    /// One was there that is as good.
    Found(ConnHandle),
    New(ConnHandle),
    /// In the place of another one, which is none any more.
    Instead(ConnHandle, ConnHandle),
    /// There is to be none.
    None,
}

impl Handles {
    fn new(hasher: &RandomState, shards: usize) -> Self {
        Self(DashMap::with_hasher_and_shard_amount(hasher.clone(), shards))
    }

    fn hash(&self, of: &impl Hash) -> (u64, usize) {
        let hash = self.0.hasher().hash_one(of);
        #[expect(clippy::cast_possible_truncation, reason = "the shard is chosen by what is left")]
        let shard = self.0.determine_shard(hash as usize);
        (hash, shard)
    }

    /// Where no cache holds the table, it waits for memory twice: for control bytes and handles at once, and then
    /// for the connection, all that it needs of that at once.
    fn get(&self, name: &Name, is_it: impl Fn(&ConnHandle) -> bool) -> Option<ConnHandle> {
        let (hash, shard) = self.hash(name);
        let table = self.0.shards()[shard].read();
        let (handles, _) = table.allocation_info();
        Start::new(handles.as_ptr().cast_const(), table.buckets(), hash).prefetch_handles();
        let is_it = |conn: &ConnHandle| {
            conn.prefetch_count();
            is_it(conn)
        };
        table.get(hash, |(_, conn)| is_it(conn.get())).map(|(_, conn)| conn.get().clone())
    }

    /// As [`get`](Self::get), of what was asked for before.
    fn get_hashed(
        &self,
        hash: u64,
        shard: usize,
        is_it: impl Fn(&ConnHandle) -> bool,
    ) -> Option<ConnHandle> {
        let table = self.0.shards()[shard].read();
        table.get(hash, |(_, conn)| is_it(conn.get())).map(|(_, conn)| conn.get().clone())
    }

    /// Asks for what [`get`](Self::get) will read first of the shard's table: its control bytes, and the first
    /// handles from there on. Where somebody writes to the shard, nothing is asked for.
    fn prefetch_place(&self, hash: u64, shard: usize) {
        let Some(table) = self.0.shards()[shard].try_read() else { return };
        let (handles, _) = table.allocation_info();
        let start = Start::new(handles.as_ptr().cast_const(), table.buckets(), hash);
        drop(table);
        prefetch(start.control);
        start.prefetch_handles();
    }

    /// Asks for what is compared of each connection that it may be.
    fn prefetch_conns(&self, hash: u64, shard: usize) {
        let Some(table) = self.0.shards()[shard].try_read() else { return };
        table.get(hash, |(_, conn)| {
            conn.get().prefetch();
            false
        });
    }

    /// All that are meant, of those with this name.
    fn get_all(&self, name: &Name, is_it: impl Fn(&ConnHandle) -> bool) -> Vec<ConnHandle> {
        let (hash, shard) = self.hash(name);
        let table = self.0.shards()[shard].read();
        let mut all: Vec<ConnHandle> = Vec::new();
        loop {
            let is_new = |conn: &ConnHandle| is_it(conn) && !all.iter().any(|c| c.is_same(conn));
            match table.get(hash, |(_, conn)| is_new(conn.get())) {
                Some((_, conn)) => all.push(conn.get().clone()),
                None => return all,
            }
        }
    }

    /// Enters what `make` makes, unless there is one that `is_it`; whether that `is_as_good` decides which of the
    /// two stays.
    fn enter(
        &self,
        name: &Name,
        is_as_good: impl FnOnce(&ConnHandle) -> bool,
        make: impl FnOnce(bool) -> Option<ConnHandle>,
    ) -> Entered {
        let (hash, shard) = self.hash(name);
        let mut table = self.0.shards()[shard].write();
        if let Some((_, there)) = table.get_mut(hash, |(_, c)| c.get().tuples().is_named(name)) {
            if is_as_good(there.get()) {
                return Entered::Found(there.get().clone());
            }
            let Some(conn) = make(true) else { return Entered::None };
            let old = std::mem::replace(there.get_mut(), conn.clone());
            return Entered::Instead(conn, old);
        }
        let Some(conn) = make(false) else { return Entered::None };
        table.insert(hash, ((), SharedValue::new(conn.clone())), |(_, c)| {
            self.0.hasher().hash_one(c.get().tuples())
        });
        Entered::New(conn)
    }

    /// Enters one more, whatever is there.
    fn add(&self, name: &Name, conn: ConnHandle, name_of: impl Fn(&ConnHandle) -> Name) {
        let (hash, shard) = self.hash(name);
        self.0.shards()[shard].write().insert(hash, ((), SharedValue::new(conn)), |(_, c)| {
            self.0.hasher().hash_one(name_of(c.get()))
        });
    }

    fn remove(&self, name: &impl Hash, conn: &ConnHandle) -> Option<ConnHandle> {
        let (hash, shard) = self.hash(name);
        let mut table = self.0.shards()[shard].write();
        let removed = table.remove_entry(hash, |(_, c)| c.get().is_same(conn));
        drop(table);
        removed.map(|(_, conn)| conn.into_inner())
    }

    /// What one shard has; `None` when there is no such shard.
    fn part(&self, shard: usize) -> Option<Vec<ConnHandle>> {
        let table = self.0.shards().get(shard)?.read().clone();
        Some(table.into_iter().map(|(_, conn)| conn.into_inner()).collect())
    }

    /// Takes all, a shard at a time, and shows each.
    fn take_all(&self, mut taken: impl FnMut(ConnHandle)) {
        for shard in self.0.shards() {
            let all = std::mem::take(&mut *shard.write());
            all.into_iter().for_each(|(_, conn)| taken(conn.into_inner()));
        }
    }
}

/// The connections of one zone.
#[derive(Debug)]
struct OneZone {
    by_original: Handles,
    /// Those behind NAT: what answers others come with is known from their original tuples.
    by_reply: sync::OnceLock<Handles>,
    hasher: RandomState,
    shards: usize,
}

impl OneZone {
    fn new(hasher: &RandomState, shards: usize) -> Self {
        let by_original = Handles::new(hasher, shards);
        Self { by_original, by_reply: sync::OnceLock::new(), hasher: hasher.clone(), shards }
    }

    /// A connection was entered that may have NAT.
    fn add_reply(&self, conn: &ConnHandle) {
        if !conn.tuples().has_nat() {
            return;
        }
        let by_reply = self.by_reply.get_or_init(|| Handles::new(&self.hasher, self.shards));
        let name = conn.tuples().reply_name();
        by_reply.add(&name, conn.clone(), |c| c.tuples().reply_name());
        fence(Ordering::SeqCst);
        // It may have ended meanwhile, and was not found here by who took it out. That one ended it, with a fence,
        // and then looked whether there is this table at all, for which it takes no lock: with a fence between the
        // two here as well, one of us sees the other.
        if conn.is_dead() {
            by_reply.remove(&name, conn);
        }
    }

    fn remove(&self, conn: &ConnHandle) -> bool {
        if let Some(by_reply) = self.by_reply.get()
            && conn.tuples().has_nat()
        {
            by_reply.remove(&conn.tuples().reply_name(), conn);
        }
        self.by_original.remove(conn.tuples(), conn).is_some()
    }

    /// Those with this tuple in either direction, the one whose original tuple it is first.
    fn of_tuple(&self, zone: Zone, tuple: &Tuple) -> Vec<ConnHandle> {
        let (name, inverted) = (Name::new(zone, tuple), Name::new(zone, &tuple.inverted()));
        let original = self.by_original.get(&name, |c| c.tuples().is_named(&name));
        let without_nat = self
            .by_original
            .get(&inverted, |c| c.tuples().is_named(&inverted) && !c.tuples().has_nat());
        let by_reply = self.by_reply.get();
        let answered =
            by_reply.map(|handles| handles.get_all(&name, |c| c.tuples().is_answered_as(&name)));
        let mut all: Vec<ConnHandle> = original.into_iter().collect();
        for conn in without_nat.into_iter().chain(answered.into_iter().flatten()) {
            if !all.iter().any(|c| c.is_same(&conn)) {
                all.push(conn);
            }
        }
        all
    }
}

/// 256 zones that have the upper half of their number in common.
type Page = [OnceLock<Box<OneZone>>; 256];

/// All connections that live.
#[derive(Debug)]
pub(super) struct Zones {
    pages: Box<[OnceLock<Box<Page>>; 256]>,
    hasher: RandomState,
    /// Of the default zone.
    shards: usize,
}

impl Zones {
    /// For so many connections at most.
    pub(super) fn new(connections: usize) -> Self {
        let shards = (connections / PER_SHARD).clamp(ZONE_SHARDS, MAX_SHARDS).next_power_of_two();
        let pages = Box::new([const { OnceLock::new() }; 256]);
        Self { pages, hasher: RandomState::new(), shards }
    }

    fn get(&self, zone: Zone) -> Option<&OneZone> {
        let [page, n] = zone.0.to_be_bytes().map(usize::from);
        Some(self.pages[page].get()?[n].get()?)
    }

    fn get_or_new(&self, zone: Zone) -> &OneZone {
        let [page, n] = zone.0.to_be_bytes().map(usize::from);
        let page = self.pages[page].get_or_init(|| Box::new([const { OnceLock::new() }; 256]));
        let shards = if zone == Zone::default() { self.shards } else { ZONE_SHARDS };
        page[n].get_or_init(|| Box::new(OneZone::new(&self.hasher, shards)))
    }

    /// The zones that were heard of, from this one on.
    fn from(&self, first: u16) -> impl Iterator<Item = Zone> {
        let [page, n] = first.to_be_bytes();
        (page..=u8::MAX).flat_map(move |p| {
            let known = self.pages[usize::from(p)].get();
            let first = if p == page { n } else { 0 };
            known.into_iter().flat_map(move |known| {
                let is_known = move |n: &u8| known[usize::from(*n)].get().is_some();
                (first..=u8::MAX).filter(is_known).map(move |n| Zone(u16::from_be_bytes([p, n])))
            })
        })
    }

    pub(super) fn find(&self, key: &ConnKey) -> Option<ConnHandle> {
        let name = Name::from(key);
        self.get(key.zone)?.by_original.get(&name, |c| c.tuples().is_named(&name))
    }

    /// As [`find`](Self::find) of each, in their order. What all of a burst need of the memory is asked for
    /// before any of it is waited for.
    pub(super) fn find_each(
        &self,
        keys: &[ConnKey],
        mut found: impl FnMut(usize, Option<ConnHandle>),
    ) {
        let mut looked_up = 0;
        for burst in keys.chunks(BURST) {
            let mut places = [None; BURST];
            for (place, key) in places.iter_mut().zip(burst) {
                *place = self.get(key.zone).map(|zone| {
                    let (hash, shard) = zone.by_original.hash(key);
                    zone.by_original.prefetch_place(hash, shard);
                    (&zone.by_original, hash, shard)
                });
            }
            for (handles, hash, shard) in places.iter().flatten() {
                handles.prefetch_conns(*hash, *shard);
            }
            for (place, key) in places.iter().zip(burst) {
                let conn = place.and_then(|(handles, hash, shard)| {
                    let name = Name::from(key);
                    handles.get_hashed(hash, shard, |c| c.tuples().is_named(&name))
                });
                found(looked_up, conn);
                looked_up += 1;
            }
        }
    }

    /// Enters what `make` makes, which is told whether it is in the place of another one: unless one is there
    /// that `is_as_good`.
    pub(super) fn enter(
        &self,
        key: &ConnKey,
        is_as_good: impl FnOnce(&ConnHandle) -> bool,
        make: impl FnOnce(bool) -> Option<ConnHandle>,
    ) -> Entered {
        let zone = self.get_or_new(key.zone);
        let entered = zone.by_original.enter(&Name::from(key), is_as_good, make);
        if let Entered::New(conn) | Entered::Instead(conn, _) = &entered {
            zone.add_reply(conn);
        }
        entered
    }

    /// Takes one out that has ended. False: it was not there any more.
    pub(super) fn remove(&self, conn: &ConnHandle) -> bool {
        self.get(conn.tuples().zone()).is_some_and(|zone| zone.remove(conn))
    }

    /// Those with this tuple in either direction, in this zone or in any.
    pub(super) fn of_tuple(&self, tuple: &Tuple, zone: Option<Zone>) -> Vec<ConnHandle> {
        let in_zone = |zone: Zone| self.get(zone).map(|known| known.of_tuple(zone, tuple));
        match zone {
            Some(zone) => in_zone(zone).unwrap_or_default(),
            None => self.from(0).filter_map(in_zone).flatten().collect(),
        }
    }

    pub(super) fn take_all(&self, mut taken: impl FnMut(ConnHandle)) {
        for zone in self.from(0).filter_map(|zone| self.get(zone)) {
            zone.by_original.take_all(&mut taken);
            if let Some(by_reply) = zone.by_reply.get() {
                by_reply.take_all(drop);
            }
        }
    }

    /// The next part for somebody who goes through them.
    pub(super) fn next_part(&self, walk: &mut Walk) -> Option<Vec<ConnHandle>> {
        loop {
            let (zone, shard) = walk.next?;
            if let Some(part) = self.get(zone).and_then(|zone| zone.by_original.part(shard)) {
                walk.next = Some((zone, shard + 1));
                return Some(part);
            }
            let others = || self.from(zone.0.checked_add(1)?).next();
            walk.next = if walk.is_of_one { None } else { others().map(|zone| (zone, 0)) };
        }
    }
}

/// Where somebody is who goes through connections, a shard at a time: what lives all the time is seen once.
#[derive(Debug)]
pub(super) struct Walk {
    next: Option<(Zone, usize)>,
    is_of_one: bool,
}

impl Walk {
    /// Of one zone, or of all.
    pub(super) fn of(zone: Option<Zone>) -> Self {
        Self { next: Some((zone.unwrap_or_default(), 0)), is_of_one: zone.is_some() }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use netdev_providers::{Epoch, Tuple};
    use proptest::prelude::*;

    use super::*;

    /// Few, so that they meet. Some are others', inverted.
    fn tuple(n: u8) -> Tuple {
        let text = match n % 6 {
            0 => "tcp 192.0.2.1:1 > 198.51.100.1:80",
            1 => "tcp 198.51.100.1:80 > 192.0.2.1:1",
            2 => "udp 192.0.2.1:1 > 198.51.100.1:80",
            3 => "tcp 198.51.100.1:80 > 203.0.113.9:1",
            4 => "tcp [2001:db8::1]:1 > [2001:db8::2]:80",
            _ => "tcp [2001:db8::2]:80 > [2001:db8::9]:1",
        };
        text.parse().unwrap()
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        /// Zone, tuple, reply (`None`: no NAT), tag.
        Create(u16, u8, Option<u8>, u64),
        /// One of those that are there.
        Remove(usize),
        TakeAll,
    }

    fn step() -> impl Strategy<Value = Step> {
        let zone = prop_oneof![Just(0u16), Just(1), Just(255), Just(256), Just(u16::MAX)];
        let nat = prop_oneof![Just(None), (0u8..6).prop_map(Some)];
        prop_oneof![
            20 => (zone, 0u8..6, nat, 0u64..2).prop_map(|(z, t, n, tag)| Step::Create(z, t, n, tag)),
            8 => any::<usize>().prop_map(Step::Remove),
            1 => Just(Step::TakeAll),
        ]
    }

    fn all(zones: &Zones, zone: Option<Zone>) -> Vec<u64> {
        let mut walk = Walk::of(zone);
        epochs(std::iter::from_fn(|| zones.next_part(&mut walk)).flatten())
    }

    fn epochs(conns: impl IntoIterator<Item = ConnHandle>) -> Vec<u64> {
        let mut epochs: Vec<_> = conns.into_iter().map(|c| c.epoch().0).collect();
        epochs.sort_unstable();
        epochs
    }

    proptest! {
        /// Against a map, and a search through all of it.
        #[test]
        fn each_is_found_by_what_it_is(steps in proptest::collection::vec(step(), 0..60)) {
            let zones = Zones::new(1 << 12);
            let mut living: BTreeMap<ConnKey, ConnHandle> = BTreeMap::new();
            let mut next = 0;
            for step in steps {
                match step {
                    Step::Create(zone, t, nat, tag) => {
                        let key = ConnKey { zone: Zone(zone), original: tuple(t) };
                        let reply = match nat {
                            Some(n) if tuple(n).is_ipv6() == tuple(t).is_ipv6() => tuple(n),
                            _ => tuple(t).inverted(),
                        };
                        next += 1;
                        let conn = ConnHandle::new(key, reply, Epoch(next), tag, 0);
                        let mut replaces = None;
                        let entered = zones.enter(&key, |c| c.tag() == tag, |instead| {
                            replaces = Some(instead);
                            Some(conn.clone())
                        });
                        let there = living.get(&key).cloned();
                        match (entered, there) {
                            (Entered::Found(found), Some(there)) => {
                                prop_assert!(found.is_same(&there) && found.tag() == tag);
                            }
                            (Entered::New(new), None) => {
                                prop_assert!(new.is_same(&conn) && replaces == Some(false));
                                living.insert(key, conn);
                            }
                            (Entered::Instead(new, old), Some(there)) => {
                                prop_assert!(new.is_same(&conn) && replaces == Some(true));
                                prop_assert!(old.is_same(&there) && old.tag() != tag);
                                // As the engine does.
                                prop_assert!(old.end() && !zones.remove(&old));
                                living.insert(key, conn);
                            }
                            _ => prop_assert!(false, "there was none, or one"),
                        }
                    }
                    Step::Remove(n) => {
                        if let Some(conn) = living.values().nth(n % living.len().max(1)).cloned() {
                            prop_assert!(conn.end() && zones.remove(&conn) && !zones.remove(&conn));
                            living.remove(&conn.key());
                        }
                    }
                    Step::TakeAll => {
                        let mut taken = Vec::new();
                        zones.take_all(|conn| taken.push(conn));
                        prop_assert_eq!(epochs(taken), epochs(living.values().cloned()));
                        living.clear();
                    }
                }
                prop_assert_eq!(all(&zones, None), epochs(living.values().cloned()));
                for zone in [0, 1, 255, 256, 300, u16::MAX].map(Zone) {
                    let of_zone = || living.values().filter(|c| c.key().zone == zone).cloned();
                    prop_assert_eq!(all(&zones, Some(zone)), epochs(of_zone()));
                    for t in (0..6).map(tuple) {
                        let key = ConnKey { zone, original: t };
                        let found = zones.find(&key).map(|c| c.epoch().0);
                        // Of a burst, and of more than one.
                        let mut each = Vec::new();
                        let keys = [0, 1, 255, 0].map(|z| ConnKey { zone: Zone(z), original: t });
                        let keys = [[key; 4], keys].concat().repeat(5);
                        zones.find_each(&keys, |n, c| each.push((n, c.map(|c| c.epoch().0))));
                        let one_by_one = keys.iter().map(|k| zones.find(k).map(|c| c.epoch().0));
                        prop_assert_eq!(each, one_by_one.enumerate().collect::<Vec<_>>());
                        prop_assert_eq!(found, living.get(&key).map(|c| c.epoch().0));
                        let is_of = |c: &ConnHandle| c.key().original == t || c.reply() == t;
                        let of_tuple = zones.of_tuple(&t, Some(zone));
                        if let Some(conn) = living.get(&key) {
                            prop_assert!(of_tuple[0].is_same(conn), "the one that it is of comes first");
                        }
                        prop_assert_eq!(epochs(of_tuple), epochs(of_zone().filter(is_of)));
                        let anywhere = living.values().filter(|c| is_of(c)).cloned();
                        prop_assert_eq!(epochs(zones.of_tuple(&t, None)), epochs(anywhere));
                    }
                }
            }
        }
    }

    #[test]
    fn none_is_entered_where_there_is_to_be_none() {
        let zones = Zones::new(1);
        let key = ConnKey { zone: Zone(5), original: tuple(0) };
        assert!(matches!(zones.enter(&key, |_| true, |_| None), Entered::None));
        assert!(zones.find(&key).is_none() && all(&zones, None).is_empty());
    }

    fn conn_of(zone: u16, n: u32) -> ConnHandle {
        let [src, dst] = [n, !n].map(|bits| std::net::Ipv4Addr::from_bits(bits).into());
        let original = Tuple::new(netdev_providers::L4Proto::Tcp, src, 1, dst, 2).unwrap();
        let key = ConnKey { zone: Zone(zone), original };
        ConnHandle::new(key, original.inverted(), Epoch(n.into()), 0, 0)
    }

    /// How many connections each part has, for somebody who goes through a zone.
    fn parts(zones: &Zones, zone: u16) -> Vec<usize> {
        let mut walk = Walk::of(Some(Zone(zone)));
        std::iter::from_fn(|| zones.next_part(&mut walk)).map(|part| part.len()).collect()
    }

    /// So that nobody holds a lock for long; and many zones do not cost what a large one does.
    #[test]
    fn a_shard_has_few_connections_and_a_zone_beside_the_default_one_few_shards() {
        let zones = Zones::new(1 << 19);
        for n in 0..10_000 {
            let conn = conn_of(u16::from(n % 5 == 0), n);
            zones.enter(&conn.key(), |_| true, |_| Some(conn.clone()));
        }
        let [default, other] = [0, 1].map(|zone| parts(&zones, zone));
        assert_eq!((default.len(), other.len()), ((1 << 19) / PER_SHARD, ZONE_SHARDS));
        assert_eq!([&default, &other].map(|parts| parts.iter().sum::<usize>()), [8000, 2000]);
        // Some 30 of each.
        assert!(default.iter().chain(&other).all(|n| *n < 200), "{default:?} {other:?}");
    }

    /// Who walks sees what stays, once, whatever comes and goes meanwhile, and tables that grow.
    #[test]
    fn who_walks_sees_each_that_stays_once() {
        let zones = Zones::new(1 << 16);
        let create = |n: u32| {
            let conn = conn_of((n % 3) as u16, n);
            zones.enter(&conn.key(), |_| true, |_| Some(conn.clone()));
            conn
        };
        let conns: Vec<_> = (0..3000).map(create).collect();
        let (mut walk, mut seen, mut next) = (Walk::of(None), Vec::new(), 3000);
        let mut goes = conns.iter().step_by(2);
        while let Some(part) = zones.next_part(&mut walk) {
            seen.extend(part.iter().map(|c| c.epoch().0));
            for _ in 0..40 {
                create(next);
                next += 1;
                if let Some(conn) = goes.next() {
                    assert!(conn.end() && zones.remove(conn));
                }
            }
        }
        seen.sort_unstable();
        let stay = conns.iter().skip(1).step_by(2).map(|c| c.epoch().0);
        for epoch in stay {
            let at = seen.partition_point(|e| *e < epoch);
            assert_eq!(seen[at..].iter().take_while(|e| **e == epoch).count(), 1, "{epoch}");
        }
    }
}
