//! What a worker does for a packet: the slot is decided (almost every packet), or the packet is the
//! first sight of its connection on the port.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ctoffload::engine::conn::ConnHandle;
use ctoffload::engine::datapath::{PathHint, PathSpec};
use ctoffload::engine::worker::{Offer, PortRef, Worker};
use netdev_providers::Direction;

use crate::capi::{CApi, Hired};
use crate::heap;
use crate::measure::{Samples, cpus, nanos, pin, together, until_clean};
use crate::peers::{self, Context, Locked, OneMutex, OneRwLock, PeerConn};
use crate::report::{Bar, Figure, Report};
use crate::world::{World, ifindex, wait_for};

/// Packets that are taken from a netdev at once.
const BATCH: usize = 32;
/// Connections whose packets alternate: what fits into the first-level cache, as the connections of
/// a batch do that the datapath has just looked up.
const HOT: u32 = 64;
const PORT: u32 = 1;

/// A way to treat packets of connections that are decided.
trait Contestant: Sync {
    type View;
    fn view(&self) -> Self::View;
    /// Goes through all packets that many times; returns how many were not decided.
    fn run(&self, view: &mut Self::View, times: usize) -> usize;
}

struct Ours {
    world: World,
    packets: Vec<(ConnHandle, Direction)>,
}

impl Ours {
    fn new(conns: u32) -> Self {
        let world = World::new(2);
        let conns = world.conns(0..conns);
        world.install(PORT, &conns, &Direction::BOTH);
        let packets = conns.iter().flat_map(|c| Direction::BOTH.map(|d| (c.clone(), d))).collect();
        Self { world, packets }
    }
}

impl Contestant for Ours {
    type View = Worker;
    fn view(&self) -> Worker {
        self.world.engine.worker()
    }
    #[inline(never)]
    fn run(&self, worker: &mut Worker, times: usize) -> usize {
        let mut undecided = 0;
        for _ in 0..times {
            for batch in self.packets.chunks(BATCH) {
                worker.quiescent();
                let Some(port) = worker.port(ifindex(PORT)) else { return usize::MAX };
                for (conn, d) in batch {
                    if !port.is_decided(conn, *d) {
                        undecided += 1;
                    }
                }
            }
        }
        undecided
    }
}

/// The same, but each worker has an engine and connections of its own: nothing is shared, so this
/// is what two CPUs of this machine can do.
struct Apart {
    own: [Ours; 2],
    next: AtomicUsize,
}

impl Apart {
    fn new(conns: u32) -> Self {
        Self { own: [Ours::new(conns), Ours::new(conns)], next: AtomicUsize::new(0) }
    }
}

impl Contestant for Apart {
    type View = (usize, Worker);
    fn view(&self) -> Self::View {
        let n = self.next.fetch_add(1, Ordering::Relaxed) % self.own.len();
        (n, self.own[n].view())
    }
    fn run(&self, (n, worker): &mut Self::View, times: usize) -> usize {
        self.own[*n].run(worker, times)
    }
}

struct Listed<L> {
    list: L,
    packets: Vec<(Arc<PeerConn>, Direction)>,
}

impl<L: Locked> Listed<L> {
    fn new(conns: u32) -> Self {
        let conns: Vec<Arc<PeerConn>> = (0..conns).map(|_| Arc::default()).collect();
        let packets = conns.iter().flat_map(|c| Direction::BOTH.map(|d| (Arc::clone(c), d)));
        let listed = Self { packets: packets.collect(), list: L::new(peers::list(false)) };
        listed.run(&mut (), 1);
        listed.list.drain();
        listed
    }
}

impl<L: Locked> Contestant for Listed<L> {
    type View = ();
    fn view(&self) {}
    #[inline(never)]
    fn run(&self, (): &mut (), times: usize) -> usize {
        let mut queued = 0;
        for _ in 0..times {
            for (conn, direction) in &self.packets {
                let ctx = Context { conn, direction: *direction, ifindex: PORT };
                queued += usize::from(self.list.conn_add(&ctx));
            }
        }
        queued
    }
}

/// Nanoseconds per packet of all threads together, from one clean run of about 200 us.
fn per_packet<C: Contestant>(c: &C, packets: usize, times: usize, cpus: &[usize]) -> Option<f64> {
    let took = until_clean(|| {
        together(cpus, || c.view(), |view| assert_eq!(c.run(view, times), 0, "all are decided"))
    })?;
    Some(nanos(took) / (packets * times * cpus.len()) as f64)
}

pub(crate) fn decided(report: &mut Report, rounds: usize) {
    let ours = Ours::new(HOT);
    let apart = Apart::new(HOT);
    let mutex: Listed<OneMutex> = Listed::new(HOT);
    let rwlock: Listed<OneRwLock> = Listed::new(HOT);
    let packets = ours.packets.len();
    let cpus = cpus();
    // By contestant: one worker, two workers.
    let mut samples: [[Samples; 2]; 4] = Default::default();
    for _ in 0..rounds {
        for (n, threads) in [&cpus[..1], &cpus[..cpus.len().min(2)]].into_iter().enumerate() {
            let round = [
                per_packet(&ours, packets, 1500, threads),
                per_packet(&mutex, packets, 64, threads),
                per_packet(&rwlock, packets, 64, threads),
                per_packet(&apart, packets, 1500, threads),
            ];
            for (samples, value) in samples.iter_mut().zip(round) {
                // A round without a clean run counts for nobody; NaN keeps the rounds aligned.
                samples[n].push(value.unwrap_or(f64::NAN));
            }
        }
    }
    let [ours, mutex, rwlock, apart] = samples;
    let peers = |f: Figure, of: &dyn Fn(&[Samples; 2]) -> Option<f64>| {
        f.peer(OneMutex::NAME, of(&mutex)).peer(OneRwLock::NAME, of(&rwlock))
    };
    let one = |s: &[Samples; 2]| s[0].median();
    let two = |s: &[Samples; 2]| s[1].median();
    report.add(
        peers(Figure::new("decided slot, one worker", one(&ours), "ns/packet"), &one)
            .bar(Bar::AtMost(2.0)),
    );
    if cpus.len() < 2 {
        report.add(
            Figure::new("decided slot, two workers over one", None, "x")
                .bar(Bar::AtLeast(1.9))
                .note("this machine has one CPU"),
        );
        return;
    }
    report.add(peers(
        Figure::new("decided slot, two workers together", two(&ours), "ns/packet"),
        &two,
    ));
    let gain = |s: &[Samples; 2]| s[0].over(&s[1]).median();
    report.add(
        peers(Figure::new("decided slot, two workers over one", gain(&ours), "x"), &gain)
            .bar(Bar::AtLeast(1.9))
            .peer("nothing shared", gain(&apart))
            .note(
                "nothing shared: an engine for each worker, all that this machine's CPUs can gain",
            ),
    );
    report.add(
        Figure::new(
            "decided slot, two workers: shared over nothing shared",
            ours[1].over(&apart[1]).median(),
            "x",
        )
        .bar(Bar::AtMost(1.05)),
    );
    for (n, workers) in ["one worker", "two workers"].into_iter().enumerate() {
        report.add(
            Figure::new(
                format!("decided slot, {workers}: one mutex over ours"),
                mutex[n].over(&ours[n]).median(),
                "x",
            )
            .peer("one rwlock over ours", rwlock[n].over(&ours[n]).median()),
        );
    }
}

/// The same with so many connections that each packet finds its connection in memory, not in a
/// cache: the datapath, which looked the connection up, has paid for that already or pays it here.
pub(crate) fn decided_in_memory(
    report: &mut Report,
    world: &World,
    port: u32,
    conns: &[ConnHandle],
) {
    let mut order: Vec<&ConnHandle> = conns.iter().collect();
    crate::measure::Shuffle(1).shuffle(&mut order);
    let mut worker = world.engine.worker();
    let mut samples = Samples::default();
    for part in order.chunks(order.len() / 16 + 1) {
        let ns = crate::measure::cpu_ns(|| {
            for batch in part.chunks(BATCH) {
                worker.quiescent();
                let port = worker.port(ifindex(port)).expect("a port");
                let n = batch.iter().filter(|c| port.is_decided(c, Direction::Original)).count();
                assert_eq!(n, batch.len());
            }
        });
        samples.push(ns / part.len() as f64);
    }
    report.add(Figure::new(
        format!("decided slot, {} connections in random order", conns.len()),
        samples.median(),
        "ns/packet",
    ));
}

/// The allocator's view of the decided path.
pub(crate) fn decided_allocates(report: &mut Report) {
    let ours = Ours::new(HOT);
    let mut view = ours.view();
    let heap = heap::counted(|| assert_eq!(ours.run(&mut view, 1000), 0));
    report.add(
        Figure::new("decided slot, allocator calls", Some(heap.calls as f64), "in 128,000 packets")
            .bar(Bar::AtMost(0.0)),
    );
}

impl Contestant for CApi {
    type View = Hired;
    fn view(&self) -> Hired {
        self.hire()
    }
    fn run(&self, view: &mut Hired, times: usize) -> usize {
        Self::run(self, view, times)
    }
}

/// What a packet of a decided connection costs a C program, beside a Rust one.
pub(crate) fn decided_in_c(report: &mut Report, rounds: usize) {
    let figure = |value| Figure::new("decided slot, by the C header", value, "ns/packet");
    let over = |value| {
        Figure::new("decided slot, by the C header over Rust", value, "x").bar(Bar::AtMost(1.2))
    };
    let in_c = match CApi::new(HOT) {
        Ok(in_c) => in_c,
        Err(why) => {
            report.add(over(None).note(why));
            return;
        }
    };
    let ours = Ours::new(HOT);
    let (packets, cpus) = (ours.packets.len(), cpus());
    let mut samples: [Samples; 2] = Default::default();
    for _ in 0..rounds {
        let round = [
            per_packet(&in_c, packets, 1500, &cpus[..1]),
            per_packet(&ours, packets, 1500, &cpus[..1]),
        ];
        for (samples, value) in samples.iter_mut().zip(round) {
            samples.push(value.unwrap_or(f64::NAN));
        }
    }
    let [in_c, ours] = samples;
    report.add(figure(in_c.median()).peer("Rust", ours.median()));
    report.add(over(in_c.over(&ours).median()));
}

/// One contestant alone, for an instrument that watches the whole process.
pub(crate) fn alone(contestant: &str, times: usize) {
    let undecided = match contestant {
        "ours" => {
            let c = Ours::new(HOT);
            c.run(&mut c.view(), times)
        }
        "C" => {
            let c = CApi::new(HOT).unwrap_or_else(|why| panic!("{why}"));
            c.run(&mut c.hire(), times)
        }
        "mutex" => Listed::<OneMutex>::new(HOT).run(&mut (), times),
        "rwlock" => Listed::<OneRwLock>::new(HOT).run(&mut (), times),
        other => panic!("no contestant '{other}'"),
    };
    assert_eq!(undecided, 0);
}

/// Instructions, memory reads and memory writes of one contestant, per packet, counted by
/// callgrind: the difference between a long and a short run of the same process.
fn counted_by_callgrind(contestant: &str) -> Result<[f64; 3], String> {
    const SHORT: usize = 500;
    const LONG: usize = 10_500;
    let run = |times: usize| -> Result<Vec<f64>, String> {
        let out = std::env::temp_dir().join(format!("ctoffload-bench-{}", std::process::id()));
        let program = std::env::current_exe().map_err(|e| e.to_string())?;
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--cache-sim=yes", "--fair-sched=yes"])
            .arg(format!("--callgrind-out-file={}", out.display()))
            .arg(program)
            .args(["--alone", contestant, &times.to_string()])
            .output()
            .map_err(|e| format!("valgrind could not be run: {e}"))?;
        let text = std::fs::read_to_string(&out).unwrap_or_default();
        let _ = std::fs::remove_file(&out);
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        let line = |name: &str| text.lines().rev().find_map(|l| l.strip_prefix(name));
        let events: Vec<&str> = line("events:").unwrap_or_default().split_whitespace().collect();
        let totals: Vec<f64> = line("totals:")
            .unwrap_or_default()
            .split_whitespace()
            .filter_map(|n| n.parse().ok())
            .collect();
        ["Ir", "Dr", "Dw"]
            .map(|name| events.iter().position(|e| *e == name).and_then(|at| totals.get(at)))
            .into_iter()
            .map(|n| n.copied().ok_or_else(|| "callgrind wrote no totals".to_owned()))
            .collect()
    };
    let (short, long) = (run(SHORT)?, run(LONG)?);
    let packets = ((LONG - SHORT) * HOT as usize * Direction::BOTH.len()) as f64;
    Ok(std::array::from_fn(|n| (long[n] - short[n]) / packets))
}

pub(crate) fn decided_counted(report: &mut Report) {
    let names = ["ours", "mutex", "rwlock"];
    let counts: Vec<_> = names.iter().map(|c| counted_by_callgrind(c)).collect();
    let what = ["instructions", "memory reads", "memory writes"];
    for (n, what) in what.into_iter().enumerate() {
        let of = |c: usize| counts[c].as_ref().ok().map(|v| v[n]);
        let mut figure = Figure::new(format!("decided slot, {what}"), of(0), "/packet")
            .peer(OneMutex::NAME, of(1))
            .peer(OneRwLock::NAME, of(2));
        if n == 2 {
            figure = figure
                .bar(Bar::AtMost(0.05))
                .note("the worker's own stack, for one call in a batch of 32; none per packet");
        }
        if let Err(why) = &counts[0] {
            figure = figure.note(why.clone());
        }
        report.add(figure);
    }
}

// ---- first sight ----

pub(crate) fn first_sight(report: &mut Report, rounds: usize) {
    let cpus = cpus();
    pin(cpus[0]);
    let mut busy = Samples::default();
    let mut batched = Samples::default();
    let mut running = Samples::default();
    let mut asleep = Samples::default();
    let mut peers: [Samples; 2] = Default::default();
    let world = World::new(2);
    let mutex = OneMutex::new(peers::list(false));
    let rwlock = OneRwLock::new(peers::list(false));
    let mut first = 0;
    for _ in 0..rounds {
        // The writer is with its provider: what it does is not measured, nor does it disturb.
        world.provider(PORT).close();
        fresh(&world, &mut first, 16, BATCH, &mut busy);
        fresh_batched(&world, &mut first, 16, &mut batched);
        world.provider(PORT).open();
        settle(&world, first);
        // The writer takes what is queued, on another CPU where there is one.
        fresh(&world, &mut first, 16, BATCH, &mut running);
        settle(&world, first);
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(1));
            fresh(&world, &mut first, 1, 1, &mut asleep);
            settle(&world, first);
        }
        fresh_listed(&mutex, 16, &mut peers[0]);
        fresh_listed(&rwlock, 16, &mut peers[1]);
    }
    drop(world);
    let [ours, batches, mutex, rwlock] = first_sight_together(&cpus, rounds);
    let figure = |name: &str, samples: &Samples| {
        Figure::new(format!("first sight to queued, {name}"), samples.median(), "ns")
            .bar(Bar::AtMost(150.0))
    };
    report.add(
        figure("writer busy", &busy)
            .peer(OneMutex::NAME, peers[0].median())
            .peer(OneRwLock::NAME, peers[1].median()),
    );
    report.add(figure("writer busy, in batches of 32", &batched));
    report.add(figure("writer running", &running));
    report.add(
        figure("two workers on one port, each with its own connections", &ours)
            .peer(OneMutex::NAME, mutex.median())
            .peer(OneRwLock::NAME, rwlock.median())
            .note("one worker's time for one of its sights, while the other has its own"),
    );
    report.add(figure("two workers on one port, each in batches of 32", &batches));
    report.add(figure("writer asleep", &asleep).note(
        "a single sight after silence wakes the port's thread: one futex call of the kernel; in a \
         batch it is paid once",
    ));
}

/// Sights of each of two workers in a measurement.
const SIGHTS: usize = 512;

/// What a first sight takes while another worker has first sights on the same port: ours, ours in batches,
/// mutex, rwlock.
fn first_sight_together(cpus: &[usize], rounds: usize) -> [Samples; 4] {
    let mut samples: [Samples; 4] = Default::default();
    let [Some(&a), Some(&b)] = [cpus.first(), cpus.get(1)] else { return samples };
    let world = World::new(1);
    let next = AtomicU32::new(0);
    for _ in 0..rounds {
        let took = [
            ours_together(&world, [a, b], &next, |port, conns| {
                for conn in conns {
                    let spec = PathSpec::Resolve(PathHint::default());
                    assert_eq!(port.conn_add(conn, Direction::Original, spec), Offer::Queued);
                }
            }),
            ours_together(&world, [a, b], &next, |port, conns| {
                for batch in conns.chunks(BATCH) {
                    assert_eq!(offer_batch(port, batch), batch.len());
                }
            }),
            listed_together::<OneMutex>(a, b, SIGHTS),
            listed_together::<OneRwLock>(a, b, SIGHTS),
        ];
        for (samples, took) in samples.iter_mut().zip(took) {
            samples.push(took.map_or(f64::NAN, |t| nanos(t) / SIGHTS as f64));
        }
    }
    samples
}

fn ours_together(
    world: &World,
    cpus: [usize; 2],
    next: &AtomicU32,
    offer: impl Fn(&PortRef<'_>, &[ConnHandle]) + Sync,
) -> Option<Duration> {
    let fresh = || {
        let n = next.fetch_add(SIGHTS as u32, Ordering::Relaxed);
        world.conns(n..n + SIGHTS as u32)
    };
    world.provider(PORT).close();
    let took = until_clean(|| {
        together(
            &cpus,
            || (world.engine.worker(), vec![fresh(), fresh()]),
            |(worker, trains)| {
                let conns = trains.pop().expect("one to warm up, one to measure");
                offer(&worker.port(ifindex(PORT)).expect("a port"), &conns);
            },
        )
    });
    world.provider(PORT).open();
    settle(world, next.load(Ordering::Relaxed));
    took
}

/// Returns how many were queued.
fn offer_batch(port: &PortRef<'_>, conns: &[ConnHandle]) -> usize {
    let mut queued = 0;
    let offers =
        conns.iter().map(|c| (c, Direction::Original, PathSpec::Resolve(PathHint::default())));
    port.offer_batch(offers, |offer| queued += usize::from(offer == Offer::Queued));
    queued
}

fn listed_together<L: Locked>(a: usize, b: usize, sights: usize) -> Option<Duration> {
    let list = L::new(peers::list(false));
    until_clean(|| {
        let took = together(
            &[a, b],
            || [0; 2].map(|_| (0..sights).map(|_| Arc::default()).collect::<Vec<_>>()).to_vec(),
            |trains| {
                for conn in &trains.pop().expect("one to warm up, one to measure") {
                    let ctx = Context { conn, direction: Direction::Original, ifindex: PORT };
                    assert!(list.conn_add(&ctx));
                }
            },
        );
        list.drain();
        took
    })
}

fn settle(world: &World, adds: u32) {
    wait_for(|| world.provider(PORT).adds() == u64::from(adds));
}

/// Connections are made, as the packets do that create them, and then offered in batches; the
/// offers are timed.
fn fresh(world: &World, first: &mut u32, batches: usize, size: usize, samples: &mut Samples) {
    let mut worker = world.engine.worker();
    for _ in 0..batches {
        let conns = world.conns(*first..*first + size as u32);
        *first += size as u32;
        let started = Instant::now();
        worker.quiescent();
        let port = worker.port(ifindex(PORT)).expect("a port");
        let mut queued = 0;
        for conn in &conns {
            let spec = PathSpec::Resolve(PathHint::default());
            queued += usize::from(port.conn_add(conn, Direction::Original, spec) == Offer::Queued);
        }
        let took = started.elapsed();
        assert_eq!(queued, size);
        samples.push(nanos(took) / size as f64);
    }
}

/// The same, the offers of a batch at once.
fn fresh_batched(world: &World, first: &mut u32, batches: usize, samples: &mut Samples) {
    let mut worker = world.engine.worker();
    for _ in 0..batches {
        let conns = world.conns(*first..*first + BATCH as u32);
        *first += BATCH as u32;
        let started = Instant::now();
        worker.quiescent();
        let queued = offer_batch(&worker.port(ifindex(PORT)).expect("a port"), &conns);
        let took = started.elapsed();
        assert_eq!(queued, BATCH);
        samples.push(nanos(took) / BATCH as f64);
    }
}

fn fresh_listed<L: Locked>(list: &L, batches: usize, samples: &mut Samples) {
    for _ in 0..batches {
        let conns: Vec<Arc<PeerConn>> = (0..BATCH).map(|_| Arc::default()).collect();
        let started = Instant::now();
        let mut queued = 0;
        for conn in &conns {
            let ctx = Context { conn, direction: Direction::Original, ifindex: PORT };
            queued += usize::from(list.conn_add(&ctx));
        }
        let took = started.elapsed();
        assert_eq!(queued, BATCH);
        samples.push(nanos(took) / BATCH as f64);
    }
    list.drain();
}

/// A connection lives and dies on port 1: what port 2's provider hears of it.
pub(crate) fn strangers(report: &mut Report) {
    const CONNS: u32 = 1000;
    let world = World::new(2);
    let mut conns = world.conns(0..CONNS);
    world.install(1, &conns, &Direction::BOTH);
    {
        let worker = world.engine.worker();
        let port = worker.port(ifindex(1)).expect("a port");
        for conn in &conns {
            port.conn_established(conn, Direction::Original);
            let _ = world.engine.conn_update(conn);
        }
    }
    world.engine.sweep(&mut ctoffload::engine::usage::Strays::default());
    for conn in conns.drain(..conns.len() / 2) {
        world.engine.conn_del(&conn);
    }
    world.flush(1);
    for conn in conns {
        world.engine.conn_del(&conn);
    }
    let ours = world.provider(2).calls();
    let [mutex, rwlock] =
        [listed_strangers::<OneMutex>(CONNS), listed_strangers::<OneRwLock>(CONNS)];
    report.add(
        Figure::new(
            "operations on a netdev that never saw the connection",
            Some(ours as f64),
            "in 1,000 connections",
        )
        .bar(Bar::AtMost(0.0))
        .peer(OneMutex::NAME, Some(mutex as f64))
        .peer(OneRwLock::NAME, Some(rwlock as f64)),
    );
}

/// Calls of the provider that does not serve the netdev, for the offers alone.
fn listed_strangers<L: Locked>(conns: u32) -> u64 {
    let list = L::new(peers::list(true));
    for _ in 0..conns {
        let conn = Arc::default();
        for direction in Direction::BOTH {
            list.conn_add(&Context { conn: &conn, direction, ifindex: PORT });
        }
    }
    list.calls()[1]
}
