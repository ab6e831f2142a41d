//! What it costs those who have to do with one port that there are many.

use std::time::Instant;

use ctoffload::engine::conn::ConnHandle;
use ctoffload::engine::usage::Strays;
use netdev_providers::Direction;

use crate::measure::{Samples, Shuffle, cpu_ns, nanos};
use crate::report::{Bar, Figure, Report};
use crate::world::{World, ifindex};

const FEW: u32 = 2;
const MANY: u32 = 1000;
/// Connections that are asked about in a round.
const CONNS: u32 = 2000;

/// Threads of this process.
fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count)
}

/// What one does with ports and connections: few ports, many.
#[derive(Default)]
struct Took {
    port: [Samples; 2],
    update: [Samples; 2],
    slots: [Samples; 2],
    del: [Samples; 2],
    add_and_del: [Samples; 2],
    sweep: [Samples; 2],
}

impl Took {
    fn round(&mut self, n: usize, world: &World, ports: u32, first: u32) {
        let port = ports / 2;
        let conns: Vec<ConnHandle> = world.conns(first..first + CONNS);
        world.install(port, &conns, &Direction::BOTH);
        let each = |ns: f64| ns / f64::from(CONNS);
        let mut order: Vec<u32> = (0..CONNS).map(|n| n % ports + 1).collect();
        Shuffle(3).shuffle(&mut order);
        let worker = world.engine.worker();
        self.port[n].push(each(cpu_ns(|| {
            for port in &order {
                assert!(worker.port(ifindex(std::hint::black_box(*port))).is_some());
            }
        })));
        drop(worker);
        self.update[n].push(each(cpu_ns(|| {
            for conn in &conns {
                std::hint::black_box(world.engine.conn_update(conn));
            }
        })));
        self.slots[n].push(each(cpu_ns(|| {
            for conn in &conns {
                assert_eq!(world.engine.slots(conn).len(), 2);
            }
        })));
        // The port's thread is busy elsewhere: what is timed is the caller's part.
        world.provider(port).close();
        self.del[n].push(each(cpu_ns(|| {
            for conn in &conns {
                assert_eq!(world.engine.conn_del(conn), 2);
            }
        })));
        world.provider(port).open();
        world.flush(port);
        self.sweep[n].push(cpu_ns(|| {
            world.engine.sweep(&mut Strays::default());
        }));
        let started = Instant::now();
        world.del_port(port);
        world.add_port(port);
        self.add_and_del[n].push(nanos(started.elapsed()));
    }
}

pub(crate) fn ports(report: &mut Report, rounds: usize) {
    let before = threads();
    let few = World::new(FEW);
    let started = Instant::now();
    let many = World::new(MANY);
    let made = started.elapsed();
    // Until those that had to look at what is there have nothing more to do.
    std::thread::sleep(std::time::Duration::from_secs(4));
    report.add(
        Figure::new(
            format!("threads of {MANY} ports, and {FEW} of another engine, at rest"),
            Some((threads() - before) as f64),
            "threads",
        )
        .bar(Bar::AtMost(4.0)),
    );
    report.add(Figure::new(
        format!("{MANY} ports added, each"),
        Some(nanos(made) / 1e3 / f64::from(MANY)),
        "us",
    ));
    let mut took = Took::default();
    for round in 0..rounds {
        for (n, world, ports) in [(0, &few, FEW), (1, &many, MANY)] {
            let first = u32::try_from(round).unwrap_or_default() * CONNS;
            took.round(n, world, ports, first);
        }
    }
    report.add(Figure::new(
        "threads of the same right after use",
        Some((threads() - before) as f64),
        "threads",
    ));
    let peer = format!("with {FEW} ports");
    let mut figure = |what: &str, samples: &[Samples; 2], bar: Option<f64>| {
        let name = format!("{what}, {MANY} ports");
        report.add(
            Figure::new(name.clone(), samples[1].median(), "ns")
                .peer(peer.clone(), samples[0].median()),
        );
        if let Some(bar) = bar {
            report.add(
                Figure::new(
                    format!("{name}, over {FEW} ports"),
                    samples[1].over(&samples[0]).median(),
                    "x",
                )
                .bar(Bar::AtMost(bar)),
            );
        }
    };
    figure("a port found by its ifindex", &took.port, None);
    figure("conn_update, two slots", &took.update, Some(1.5));
    figure("slots, two slots", &took.slots, Some(1.5));
    figure("conn_del, two slots", &took.del, Some(1.5));
    figure("a port deleted and added", &took.add_and_del, None);
    figure("a sweep of ports without rules", &took.sweep, None);
}
