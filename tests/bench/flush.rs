//! What takes rules away costs what it takes, whatever else there is: the flush of a port, one by zone or tuple,
//! a port's delete.

use std::time::Instant;

use ctoffload::engine::FlushFilter;
use ctoffload::engine::conn::ConnHandle;
use netdev_providers::{Direction, Zone};

use crate::measure::{Samples, nanos};
use crate::packets;
use crate::report::{Bar, Figure, Report};
use crate::world::{World, key};

/// The port that is flushed, and the one that holds the rest.
const FLUSHED: u32 = 1;
const REST: u32 = 2;
const ONE: [Direction; 1] = [Direction::Original];
/// The zone of the connections that are flushed by it.
const ZONE: Zone = Zone(7);

/// Time of what takes these away from the port, in nanoseconds.
fn taking(world: &World, held: &[ConnHandle], take: impl FnOnce() -> u64) -> f64 {
    world.install(FLUSHED, held, &ONE);
    // Until the port's thread is asleep, as it is when nothing happens.
    std::thread::sleep(std::time::Duration::from_millis(2));
    let started = Instant::now();
    let flushed = take();
    let took = started.elapsed();
    assert_eq!(flushed, held.len() as u64);
    nanos(took)
}

/// Time of one flush of a port that holds these, in nanoseconds.
fn flush(world: &World, held: &[ConnHandle]) -> f64 {
    taking(world, held, || world.flush(FLUSHED))
}

/// By zone; by one connection's original tuple, without the zone; by its reply tuple, behind NAT; a port's delete.
fn takes(world: &World, zoned: &[ConnHandle]) -> [f64; 4] {
    let by = |filter: FlushFilter| world.flush_by(&filter);
    let tuple = |tuple| FlushFilter { tuple: Some(tuple), ..FlushFilter::default() };
    let zone = FlushFilter { zone: Some(ZONE), ..FlushFilter::default() };
    let took = [
        taking(world, zoned, || by(zone)),
        taking(world, &zoned[..1], || by(tuple(zoned[0].key().original))),
        taking(world, &zoned[..1], || by(tuple(zoned[0].reply()))),
        taking(world, zoned, || world.del_port(FLUSHED)),
    ];
    world.add_port(FLUSHED);
    took
}

/// Time of one flush of an empty port, from many.
fn flush_empty(world: &World) -> f64 {
    const TIMES: u32 = 64;
    let started = Instant::now();
    for _ in 0..TIMES {
        assert_eq!(world.flush(FLUSHED), 0);
    }
    nanos(started.elapsed()) / f64::from(TIMES)
}

pub(crate) fn flushes(report: &mut Report, rounds: usize, rest: u32) {
    let crowded = World::new(2);
    let quiet = World::new(2);
    let (few, many_more) = (rest / 10, rest / 10..rest);
    // The same connections in both worlds, and in one of them nine times as many on another port.
    let [conns, same] = [&quiet, &crowded].map(|w| w.conns(0..few));
    let others = crowded.conns(many_more);
    crowded.install(REST, &others, &ONE);
    // A tuple of these is no other's: the zone is another.
    let zoned = [&quiet, &crowded].map(|w| w.conns_in(ZONE, rest + 1..rest + 1001));
    assert!(crowded.engine.conn(&key(rest + 1)).is_none());
    let mut taken: [[Samples; 2]; 4] = Default::default();
    let mut empty: [Samples; 2] = Default::default();
    let mut thousand: [Samples; 2] = Default::default();
    let mut many: [Samples; 2] = Default::default();
    for round in 0..rounds {
        for (n, (world, conns)) in [(&quiet, &conns), (&crowded, &same)].into_iter().enumerate() {
            empty[n].push(flush_empty(world));
            thousand[n].push(flush(world, &conns[..1000]));
            if round % 4 == 0 {
                many[n].push(flush(world, conns));
                let took = takes(world, &zoned[n]);
                taken.iter_mut().zip(took).for_each(|(samples, took)| samples[n].push(took));
            }
        }
    }
    report.add(
        Figure::new(format!("flush of an empty port beside {rest}"), empty[1].median(), "ns")
            .bar(Bar::Below(1000.0))
            .peer("with nothing beside it", empty[0].median()),
    );
    let name = format!("flush of 1,000 beside {rest}");
    let micros = |s: &Samples| s.median().map(|ns| ns / 1e3);
    report.add(
        Figure::new(name.clone(), micros(&thousand[1]), "us")
            .peer("with nothing beside it", micros(&thousand[0])),
    );
    report.add(
        Figure::new(
            format!("{name}, over with nothing beside it"),
            thousand[1].over(&thousand[0]).median(),
            "x",
        )
        .bar(Bar::AtMost(1.2)),
    );
    report.add(
        Figure::new(format!("flush of {} beside {rest}", rest / 10), micros(&many[1]), "us")
            .peer("with nothing beside it", micros(&many[0])),
    );
    report.add(Figure::new(
        format!("flush of {} beside {rest}, over with nothing beside it", rest / 10),
        many[1].over(&many[0]).median(),
        "x",
    ));
    let what = [
        "flush of 1,000 by their zone",
        "flush of one by its original tuple, in any zone",
        "flush of one by its reply tuple behind NAT, in any zone",
        "delete of a port with 1,000",
    ];
    for (what, samples) in what.into_iter().zip(&taken) {
        let name = format!("{what}, beside {rest}");
        report.add(
            Figure::new(name.clone(), micros(&samples[1]), "us")
                .peer("beside a tenth", micros(&samples[0])),
        );
        report.add(
            Figure::new(
                format!("{name}, over beside a tenth"),
                samples[1].over(&samples[0]).median(),
                "x",
            )
            .bar(Bar::AtMost(1.2)),
        );
    }
    drop(zoned);
    drop(quiet);
    // The crowd is of use once more: port 2 holds one slot of each.
    packets::decided_in_memory(report, &crowded, REST, &others);
}
