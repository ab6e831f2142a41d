//! How long a packet thread waits for somebody who lists all connections.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::measure::{Samples, cpu_ns, cpus, nanos, pin, preemptions};
use crate::report::{Bar, Figure, Report};
use crate::world::{World, key};

/// The longest of many makings and endings of connections, one after the other, until it is over; those
/// during which this thread lost its CPU do not count.
fn longest(world: &World, mut next: u32, is_over: impl Fn() -> bool) -> f64 {
    let mut longest = 0.0_f64;
    let mut before = preemptions();
    while !is_over() {
        for _ in 0..16 {
            let key = key(next);
            next += 1;
            let started = Instant::now();
            world.engine.conn_del(&world.conn(key));
            let took = nanos(started.elapsed());
            let after = preemptions();
            if after == before {
                longest = longest.max(took);
            }
            before = after;
        }
    }
    longest
}

pub(crate) fn dump(report: &mut Report, rounds: usize, population: u32) {
    let cpus = cpus();
    let world = World::new(1);
    drop(world.conns(0..population));
    let [mut during, mut alone, mut took, mut part]: [Samples; 4] = Default::default();
    for _ in 0..rounds {
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let lister = scope.spawn(|| {
                pin(cpus[0]);
                let started = Instant::now();
                let n = world.engine.conns().filter(|c| !c.is_dead()).count();
                let took = nanos(started.elapsed()) / 1e6;
                // The same once more, part by part: whatever lock there is is held in one of them.
                let (mut conns, mut longest) = (world.engine.conns(), 0.0_f64);
                loop {
                    let mut is_over = false;
                    let ns = cpu_ns(|| is_over = conns.next().is_none());
                    longest = longest.max(ns);
                    if is_over {
                        break;
                    }
                }
                is_over.store(true, Ordering::SeqCst);
                assert!(n >= population as usize);
                (took, longest / 1e3)
            });
            pin(cpus[cpus.len().min(2) - 1]);
            during.push(longest(&world, population, || is_over.load(Ordering::SeqCst)) / 1e3);
            let (listed, longest) = lister.join().expect("it lists them");
            took.push(listed);
            part.push(longest);
        });
        let until = Instant::now() + std::time::Duration::from_millis(100);
        alone.push(longest(&world, population, || Instant::now() >= until) / 1e3);
    }
    report.add(
        Figure::new(
            format!("the longest that making and ending a connection takes while {population} are listed"),
            during.median(),
            "us",
        )
        .bar(Bar::AtMost(1000.0))
        .peer("while nobody lists", alone.median())
        .note(
            "by the clock: where the machine has other work, the one who lists loses its CPU with a lock held",
        ),
    );
    report.add(
        Figure::new(
            format!("the longest part of a list of {population}, in which a lock is held"),
            part.median(),
            "us of CPU time",
        )
        .bar(Bar::AtMost(1000.0)),
    );
    report.add(Figure::new(format!("{population} connections listed"), took.median(), "ms"));
}
