//! Connections in memory: made, found, and what they weigh.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use dashmap::DashMap;

use ctoffload::engine::conn::{ConnHandle, ConnKey};
use netdev_providers::{Direction, Tuple};

use crate::heap;
use crate::measure::{Samples, Shuffle, cpu_ns};
use crate::report::{Bar, Figure, Report};
use crate::world::{World, key, key6, natted};

/// The table that one would write first: a mutex, the standard map, an object per connection.
#[derive(Default)]
struct PlainTable(Mutex<HashMap<ConnKey, Arc<Plain>>>);

/// As large as it must be to know a connection, without any slot.
struct Plain {
    _key: ConnKey,
    _reply: Tuple,
}

impl PlainTable {
    fn create(&self, key: ConnKey) -> Arc<Plain> {
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let conn = map
            .entry(key)
            .or_insert_with(|| Arc::new(Plain { _key: key, _reply: key.original.inverted() }));
        Arc::clone(conn)
    }
    fn find(&self, key: &ConnKey) -> Option<Arc<Plain>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }
}

/// No table can be faster than this one: the engine's hash, nothing shared, no lock, no reference
/// counted, a number for the connection. What it cannot do, memory cannot.
type BareTable = HashMap<ConnKey, u32, ahash::RandomState>;

/// The same, with an object for each connection, as large as the engine's, of which a look-up reads a word: who
/// looks a connection up wants something of it, and its memory is waited for.
type BareObjects = HashMap<ConnKey, Box<[u64; 33]>, ahash::RandomState>;

/// The same hash table as the engine's, sharded and behind its locks, with nothing around it.
type ShardedTable = DashMap<ConnKey, u32, ahash::RandomState>;

/// Packets that a datapath takes at a time.
const BURST: usize = 32;

pub(crate) fn create_and_find(report: &mut Report, rounds: usize, population: u32) {
    let keys: Vec<ConnKey> = (0..population).map(key).collect();
    let mut order: Vec<ConnKey> = keys.clone();
    Shuffle(7).shuffle(&mut order);
    let mut create: [Samples; 5] = Default::default();
    let mut find: [Samples; 5] = Default::default();
    let mut find_burst = Samples::default();
    let n = f64::from(population);
    // Small tables are gone through often enough to be timed.
    let passes = (1 << 18) / population + 1;
    for _ in 0..rounds {
        let (mut ns, mut found, mut burst) = (0.0, 0.0, 0.0);
        for _ in 0..passes {
            let world = World::new(0);
            ns += cpu_ns(|| keys.iter().for_each(|k| drop(world.conn(*k))));
            burst += cpu_ns(|| {
                for keys in order.chunks(BURST) {
                    world.engine.conns_by_key(std::hint::black_box(keys), |_, conn| {
                        assert!(conn.is_some());
                    });
                }
            });
            found += cpu_ns(|| {
                for k in &order {
                    assert!(world.engine.conn(std::hint::black_box(k)).is_some());
                }
            });
        }
        create[0].push(ns / n / f64::from(passes));
        find[0].push(found / n / f64::from(passes));
        find_burst.push(burst / n / f64::from(passes));
        let (mut ns, mut found) = (0.0, 0.0);
        for _ in 0..passes {
            let table = PlainTable::default();
            ns += cpu_ns(|| keys.iter().for_each(|k| drop(table.create(*k))));
            found += cpu_ns(|| {
                for k in &order {
                    assert!(table.find(std::hint::black_box(k)).is_some());
                }
            });
        }
        create[1].push(ns / n / f64::from(passes));
        find[1].push(found / n / f64::from(passes));
        let (mut ns, mut found) = (0.0, 0.0);
        for _ in 0..passes {
            let mut table = BareTable::default();
            ns += cpu_ns(|| {
                for (k, n) in keys.iter().zip(0..) {
                    table.insert(*k, n);
                }
            });
            found += cpu_ns(|| {
                for k in &order {
                    assert!(std::hint::black_box(&table).contains_key(k));
                }
            });
        }
        create[2].push(ns / n / f64::from(passes));
        find[2].push(found / n / f64::from(passes));
        let (mut ns, mut found) = (0.0, 0.0);
        for _ in 0..passes {
            let table = ShardedTable::default();
            ns += cpu_ns(|| {
                for (k, n) in keys.iter().zip(0..) {
                    table.insert(*k, n);
                }
            });
            found += cpu_ns(|| {
                for k in &order {
                    assert!(std::hint::black_box(&table).contains_key(k));
                }
            });
        }
        create[3].push(ns / n / f64::from(passes));
        find[3].push(found / n / f64::from(passes));
        let (mut ns, mut found) = (0.0, 0.0);
        for _ in 0..passes {
            let mut table = BareObjects::default();
            ns += cpu_ns(|| {
                for (k, n) in keys.iter().zip(0..) {
                    table.insert(*k, Box::new([n; 33]));
                }
            });
            found += cpu_ns(|| {
                for k in &order {
                    let object = std::hint::black_box(&table).get(k);
                    assert!(object.is_some_and(|words| words[0] < u64::from(population)));
                }
            });
        }
        create[4].push(ns / n / f64::from(passes));
        find[4].push(found / n / f64::from(passes));
    }
    let note = if population >= 100_000 {
        "each meets memory that no cache holds: compare with the table that has nothing but the hash"
    } else {
        ""
    };
    let figure = |what: String, samples: &[Samples; 5]| {
        let [ours, mutex, bare, sharded, objects] =
            samples.each_ref().map(|s| s.median().map(|ns| 1e3 / ns));
        Figure::new(what, ours, "M/s/core")
            .peer("a mutex over std's HashMap", mutex)
            .peer("the same hash, one owner, no object", bare)
            .peer("the same, sharded behind locks", sharded)
            .peer("one owner, an object of 264 bytes each, a word of it read", objects)
            .note(note)
    };
    let over_bare = |what: String, samples: &[Samples; 5]| {
        Figure::new(
            format!("{what}, over the same hash with nothing around it"),
            samples[2].over(&samples[0]).median(),
            "x",
        )
        .peer("the same hash, sharded behind locks, over it", samples[2].over(&samples[3]).median())
        .peer("ours over that one", samples[3].over(&samples[0]).median())
        .peer("the same hash, and an object each, over it", samples[2].over(&samples[4]).median())
        .peer("ours over the one with objects", samples[4].over(&samples[0]).median())
    };
    let created = format!("create, {population} connections");
    let found = format!("look up, {population} connections in random order, one by one");
    report.add(figure(created.clone(), &create));
    report.add(figure(found.clone(), &find));
    let one_by_one = find.clone();
    find[0] = find_burst;
    let bursts = format!("look up, {population} connections in random order, in bursts of {BURST}");
    report.add(figure(bursts.clone(), &find));
    if population >= 100_000 {
        report.add(over_bare(created, &create).bar(Bar::AtLeast(0.75)));
        report.add(over_bare(found, &one_by_one).bar(Bar::AtLeast(0.6)));
        report.add(over_bare(bursts, &find).bar(Bar::AtLeast(0.6)));
    }
}

/// What slots weigh, with everything that stands for them: in the connection, in the port's list,
/// in the indices. The connection itself, without slots, is counted apart.
pub(crate) fn memory(report: &mut Report, population: u32) {
    let n = f64::from(population);
    let world = World::new(3);
    let mut conns: Vec<ConnHandle> = Vec::with_capacity(population as usize);
    let bare = heap::counted(|| conns.extend((0..population).map(|n| world.conn(key(n)))));
    let first = heap::counted(|| world.install(1, &conns, &Direction::BOTH));
    let second = heap::counted(|| world.install(2, &conns, &Direction::BOTH));
    let third = heap::counted(|| world.install(3, &conns, &Direction::BOTH));
    let per_slot = |h: heap::Heap| h.bytes as f64 / n / 2.0;
    report.add(Figure::new(
        format!("memory per connection, before any slot, {population} connections"),
        Some(bare.bytes as f64 / n),
        "bytes",
    ));
    report.add(
        Figure::new("memory per installed slot, further port", Some(per_slot(third)), "bytes")
            .bar(Bar::AtMost(200.0)),
    );
    report.add(
        Figure::new("memory per installed slot, second port", Some(per_slot(second)), "bytes")
            .bar(Bar::AtMost(200.0)),
    );
    report.add(Figure::new(
        "memory per installed slot, first port, beyond the connection's own",
        Some(per_slot(first)),
        "bytes",
    ));
    report.add(
        Figure::new(
            "memory per connection with both slots installed on one port",
            Some((bare.bytes + first.bytes) as f64 / n),
            "bytes",
        )
        .bar(Bar::AtMost(320.0)),
    );
    drop((conns, world));
    let natted = |key: ConnKey| natted(&key.original);
    memory_of(report, "IPv4 behind NAT", population, |n| (key(n), natted(key(n))));
    memory_of(report, "IPv6", population, |n| (key6(n), key6(n).original.inverted()));
}

/// The same of another kind of connections.
fn memory_of(
    report: &mut Report,
    kind: &str,
    population: u32,
    of: impl Fn(u32) -> (ConnKey, Tuple),
) {
    let world = World::new(1);
    let mut conns: Vec<ConnHandle> = Vec::with_capacity(population as usize);
    let heap = heap::counted(|| {
        conns.extend((0..population).map(|n| {
            let (key, reply) = of(n);
            world.engine.conn_create(key, reply, 0).expect("room for it")
        }));
        world.install(1, &conns, &Direction::BOTH);
    });
    let name = format!("memory per connection with both slots installed on one port, {kind}");
    let bytes = heap.bytes as f64 / f64::from(population);
    report.add(Figure::new(name, Some(bytes), "bytes").bar(Bar::AtMost(320.0)));
}
