//! Benchmarks of the tc-flower provider on a real kernel. Run by `scripts/bench flower`, which says
//! what comes out, in the lab: it needs root and the TC modules.

#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

#[path = "kernel/bare.rs"]
mod bare;
#[allow(dead_code, reason = "shared with the other suites")]
mod measure;
#[path = "kernel/ours.rs"]
mod ours;
#[allow(dead_code, reason = "shared with the other suites")]
mod report;
#[path = "kernel/rules.rs"]
mod rules;
#[path = "kernel/setting.rs"]
mod setting;
#[path = "kernel/world.rs"]
mod world;

use std::fmt::Write as _;
use std::fs::File;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use measure::{Samples, cpus};
use netdev_providers::tc_flower::{TcFlowerClass, TcFlowerConfig};
use ours::{Ours, rule_ids};
use report::{Bar, Figure, Report};
use setting::Setting;

const USAGE: &str = "flower --on WHERE [--native] [--writers] [--quick] [--out FILE]

  --on WHERE  the machine's name in the figures, e.g. 'emulated 6.12'
  --native    at the machine's own speed: the bars for that
  --writers   two writers against one alone: this needs two processors
  --quick     few rules and rounds: to see that it runs, not to believe the figures
  --out FILE  write the figures there as JSON";

const WRITERS: &str = "--writers";

/// The prio of the rules that are not ours.
const PRIO: u16 = 0x1000;

fn main() -> ExitCode {
    let setting = match Setting::read(USAGE, &[WRITERS]) {
        Ok(setting) => setting,
        Err(status) => return status,
    };
    let mut report = Report::default();
    world::private_network();
    network();
    if setting.has(WRITERS) {
        two_writers(&setting, &mut report);
    } else {
        one_writer(&setting, &mut report);
    }
    report::finish(&report, setting.out.as_deref())
}

/// Netdevs for the contestants, and one that rules redirect to.
fn network() {
    for name in [
        "ours0",
        "ours1",
        "two0",
        "percpu0",
        "percpu1",
        "percputwo0",
        "tc0",
        "bare0",
        "bare1",
        "out0",
    ] {
        world::sh(&format!(
            "ip link add {name} address 02:00:00:00:01:01 type veth peer name {name}p &&
             ip link set {name} up && ip link set {name}p up"
        ));
    }
    for name in ["tc0", "bare0", "bare1"] {
        world::sh(&format!("tc qdisc add dev {name} clsact"));
    }
}

fn one_writer(setting: &Setting, report: &mut Report) {
    let ours = Ours::bind("ours0", "out0");
    let template = bare::Template::catch(&ours);
    let sizes: &[(u32, usize)] = match (setting.quick, setting.native) {
        (true, _) => &[(500, 3)],
        (false, true) => &[(1000, 15), (20_000, 9), (100_000, 3)],
        (false, false) => &[(1000, 15), (20_000, 7), (100_000, 3)],
    };
    for &(count, rounds) in sizes {
        let mut contest = Contest::new(&ours, &template, count);
        for round in 0..rounds {
            contest.round(round);
        }
        let last = (count, rounds) == *sizes.last().unwrap();
        contest.report(setting, report, last);
    }
}

/// Lines in one file: `tc` does not give back what it needs for each, and of a process in user-mode
/// Linux the host can map 64k pages.
const LINES: u32 = 20_000;

/// One line per rule, for `tc -batch`.
fn batch_files(verb: &str, count: u32) -> Vec<PathBuf> {
    let starts = (0..count).step_by(LINES as usize);
    let file = |first: u32| {
        let mut text = String::new();
        for n in first..count.min(first + LINES) {
            writeln!(text, "{}", rules::tc_line(verb, "tc0", PRIO, n, "out0")).unwrap();
        }
        let path = std::env::temp_dir().join(format!("{verb}-{first}.tc"));
        std::fs::write(&path, text).unwrap();
        path
    };
    starts.map(file).collect()
}

fn tc_batches(files: &[PathBuf]) -> Duration {
    files.iter().map(|file| world::tc_batch(file)).sum()
}

/// Seconds of each contestant, round by round.
#[derive(Default)]
struct Rounds {
    ours: Samples,
    tc: Samples,
    bare: Samples,
}

fn per_second(count: u32, seconds: &Samples) -> Option<f64> {
    seconds.median().map(|s| f64::from(count) / s)
}

fn push(samples: &mut Samples, took: Duration) {
    samples.push(took.as_secs_f64());
}

/// So many rules, written and removed by each contestant in turn. Each has the kernel to itself: the rules
/// of the others are gone, and what they took is free again. Each finds it as the others do: as many rules
/// of a bare loop have just been there. Whoever comes behind `tc`, which takes seconds, would find memory
/// and caches cold, and whoever comes behind us would find them warm.
struct Contest<'a> {
    ours: &'a Ours,
    prebuilt: bare::Prebuilt,
    add: Vec<PathBuf>,
    del: Vec<PathBuf>,
    count: u32,
    /// What stands at our port when there is no flow.
    guards: usize,
    insert: Rounds,
    delete: Rounds,
    flush: Rounds,
    sweep: Rounds,
}

impl<'a> Contest<'a> {
    fn new(ours: &'a Ours, template: &bare::Template, count: u32) -> Self {
        Self {
            ours,
            prebuilt: bare::prebuild(template, 0..count, "bare0"),
            add: batch_files("add", count),
            del: batch_files("del", count),
            count,
            guards: world::count_filters("ours0"),
            insert: Rounds::default(),
            delete: Rounds::default(),
            flush: Rounds::default(),
            sweep: Rounds::default(),
        }
    }

    fn round(&mut self, round: usize) {
        for turn in 0..3 {
            let counted = round == 0;
            bare::send(&self.prebuilt);
            world::tc_flush("bare0");
            world::let_the_kernel_finish();
            match (round + turn) % 3 {
                0 => self.ours(counted),
                1 => self.bare(counted),
                _ => self.tc(counted),
            }
            world::let_the_kernel_finish();
        }
    }

    /// Nobody wins by writing less than the others.
    fn check(&self, counted: bool, netdev: &str, beside: usize) {
        if counted {
            let want = beside + self.count as usize;
            assert_eq!(world::count_filters(netdev), want, "rules of {netdev}");
        }
    }

    fn ours(&mut self, counted: bool) {
        let (took, done) = self.ours.run(self.ours.prepare_adds(self.count));
        push(&mut self.insert.ours, took);
        self.check(counted, "ours0", self.guards);
        let (took, reported) = self.ours.sweep();
        assert_eq!(reported, u64::from(self.count));
        push(&mut self.sweep.ours, took);
        let deletes = self.ours.prepare_deletes(&rule_ids(&done));
        push(&mut self.delete.ours, self.ours.run(deletes).0);
        // Again, for the flush.
        world::let_the_kernel_finish();
        self.ours.run(self.ours.prepare_adds(self.count));
        let (took, flushed) = self.ours.flush();
        assert_eq!(flushed, u64::from(self.count));
        push(&mut self.flush.ours, took);
    }

    fn bare(&mut self, counted: bool) {
        push(&mut self.insert.bare, bare::send(&self.prebuilt));
        self.check(counted, "bare0", 0);
        push(&mut self.flush.tc, world::tc_flush("bare0"));
    }

    fn tc(&mut self, counted: bool) {
        push(&mut self.insert.tc, tc_batches(&self.add));
        self.check(counted, "tc0", 0);
        push(&mut self.sweep.tc, tc_sweep());
        push(&mut self.delete.tc, tc_batches(&self.del));
    }

    fn report(&self, setting: &Setting, report: &mut Report, last: bool) {
        let Self { count, insert, delete, flush, sweep, .. } = self;
        let (count, on) = (*count, &setting.on);
        let over_tc = insert.tc.over(&insert.ours).median();
        report.add(
            Figure::new(format!("insert {count}, times tc -batch ({on})"), over_tc, "x")
                .bar(Bar::AtLeast(if setting.native { 6.0 } else { 3.0 }))
                .peer("ours/s", per_second(count, &insert.ours))
                .peer("tc -batch/s", per_second(count, &insert.tc)),
        );
        report.add(
            Figure::new(
                format!("insert {count}, over a bare loop ({on})"),
                insert.ours.over(&insert.bare).median(),
                "x",
            )
            .bar(Bar::AtMost(1.3))
            .peer("bare/s", per_second(count, &insert.bare)),
        );
        report.add(
            Figure::new(
                format!("delete {count} one by one, times tc -batch ({on})"),
                delete.tc.over(&delete.ours).median(),
                "x",
            )
            .peer("ours/s", per_second(count, &delete.ours))
            .peer("tc -batch/s", per_second(count, &delete.tc)),
        );
        let milliseconds = |seconds: &Samples| seconds.median().map(|s| s * 1e3);
        let flushed = Figure::new(
            format!("flush {count}, over one `tc filter del` ({on})"),
            flush.ours.over(&flush.tc).median(),
            "x",
        )
        .peer("ours ms", milliseconds(&flush.ours))
        .peer("tc ms", milliseconds(&flush.tc));
        let swept = Figure::new(
            format!("usage of {count}, times `tc -s filter show` ({on})"),
            sweep.tc.over(&sweep.ours).median(),
            "x",
        )
        .peer("ours ms", milliseconds(&sweep.ours))
        .peer("tc ms", milliseconds(&sweep.tc));
        // The bars are for 100k rules; smaller tables are shown for their own sake.
        report.add(if last { flushed.bar(Bar::AtMost(1.2)) } else { flushed });
        report.add(if last { swept.bar(Bar::AtLeast(5.0)) } else { swept });
    }
}

fn tc_sweep() -> Duration {
    let null = File::create("/dev/null").unwrap();
    world::time_program("tc", &["-s", "filter", "show", "dev", "tc0", "ingress"], Stdio::from(null))
}

/// Two writers at once against one, which has half as much to do.
struct Pair<'a> {
    name: &'static str,
    bar: Option<Bar>,
    /// How long it takes so many writers to write so many rules each, which are gone again afterwards.
    write: Box<dyn Fn(usize, u32) -> Duration + 'a>,
    one: Samples,
    two: Samples,
}

impl<'a> Pair<'a> {
    fn new(name: &'static str, write: impl Fn(usize, u32) -> Duration + 'a) -> Self {
        let (one, two) = (Samples::default(), Samples::default());
        Self { name, bar: None, write: Box::new(write), one, two }
    }

    /// Ports, a writer each.
    fn of_ports(name: &'static str, ports: &'a [Ours; 2]) -> Self {
        Self::new(name, move |writers, count| {
            let work: Vec<_> = ports[..writers]
                .iter()
                .map(|port| {
                    let adds = port.prepare_adds(count);
                    move || drop(port.run(adds))
                })
                .collect();
            let took = at_once(work);
            for port in ports {
                port.flush();
            }
            took
        })
    }

    /// One port, with one writer and with two.
    fn of_one_port(name: &'static str, ports: [&'a Ours; 2]) -> Self {
        Self::new(name, move |writers, count| {
            let port = ports[writers - 1];
            let adds = port.prepare_adds(count * u32::try_from(writers).unwrap());
            let took = port.run(adds).0;
            port.flush();
            took
        })
    }

    /// Bare loops, on these netdevs.
    fn of_bare_loops(
        name: &'static str,
        template: &'a bare::Template,
        netdevs: [&'static str; 2],
    ) -> Self {
        Self::new(name, move |writers, count| {
            let sends: Vec<_> = (0..)
                .zip(&netdevs[..writers])
                .map(|(n, netdev)| bare::prebuild(template, n * count..(n + 1) * count, netdev))
                .collect();
            let took = at_once(sends.iter().map(|send| || _ = bare::send(send)).collect());
            let mut used = netdevs[..writers].to_vec();
            used.dedup();
            for netdev in used {
                world::tc_flush(netdev);
            }
            took
        })
    }

    /// What two have written together, in the time of half of it by one.
    fn figure(&self, count: u32, on: &str) -> Figure {
        let Self { name, bar, one, two, .. } = self;
        // Twice the rules in the time that two took.
        let ratio = one.over(two).median().map(|r| r * 2.0);
        let both = count * 2;
        let name = format!("insert {both}, two writers over one: {name} ({on})");
        let figure = Figure::new(name, ratio, "x")
            .peer("one/s", per_second(count, one))
            .peer("two/s", per_second(both, two));
        match bar {
            Some(bar) => figure.bar(*bar),
            None => figure,
        }
    }
}

fn at_once(work: Vec<impl FnOnce() + Send>) -> Duration {
    let started = std::time::Instant::now();
    std::thread::scope(|s| work.into_iter().for_each(|writer| drop(s.spawn(writer))));
    started.elapsed()
}

fn with_writers(netdev: &str, writers: usize, percpu_stats: bool) -> Ours {
    let writers = NonZeroUsize::new(writers);
    let config = TcFlowerConfig { writers, percpu_stats, ..TcFlowerConfig::default() };
    Ours::bind_to(&TcFlowerClass::new(config), netdev, "out0")
}

/// Ports with a writer each, a port with two, and what the kernel makes of two who write: to two
/// netdevs, and to one.
fn two_writers(setting: &Setting, report: &mut Report) {
    if cpus().len() < 2 {
        let name = format!("insert, two writers over one ({})", setting.on);
        let why = "one processor: two writers take turns";
        report.add(Figure::new(name, None, "x").bar(Bar::AtLeast(1.6)).note(why));
        return;
    }
    let ports = ["ours0", "ours1"].map(|netdev| with_writers(netdev, 1, false));
    let template = bare::Template::catch(&ports[0]);
    let percpu = ["percpu0", "percpu1"].map(|netdev| with_writers(netdev, 1, true));
    let two = with_writers("two0", 2, false);
    let two_percpu = with_writers("percputwo0", 2, true);
    // Of each writer: two write a thousand, twenty thousand, a hundred thousand.
    let sizes: &[(u32, usize)] =
        if setting.quick { &[(250, 2)] } else { &[(500, 15), (10_000, 9), (50_000, 3)] };
    for &(count, rounds) in sizes {
        let mut pairs = [
            Pair::of_ports("two ports", &ports),
            Pair::of_ports("two ports, counters per processor", &percpu),
            Pair::of_one_port("one port", [&ports[0], &two]),
            Pair::of_one_port("one port, counters per processor", [&percpu[0], &two_percpu]),
            Pair::of_bare_loops("bare loops, two netdevs", &template, ["bare0", "bare1"]),
            Pair::of_bare_loops("bare loops, one netdev", &template, ["bare0", "bare0"]),
        ];
        pairs[0].bar = Some(Bar::AtLeast(1.6));
        pairs[2].bar = Some(Bar::AtLeast(1.6));
        contest(&mut pairs, count, rounds);
        pairs.into_iter().for_each(|pair| report.add(pair.figure(count, &setting.on)));
    }
}

/// Each pair in turn, round by round; one writer and two come first as often.
fn contest(pairs: &mut [Pair<'_>], count: u32, rounds: usize) {
    for round in 0..rounds {
        for turn in 0..pairs.len() {
            let at = (round + turn) % pairs.len();
            let pair = &mut pairs[at];
            for writers in if round % 2 == 0 { [1, 2] } else { [2, 1] } {
                world::let_the_kernel_finish();
                let took = (pair.write)(writers, count);
                push(if writers == 1 { &mut pair.one } else { &mut pair.two }, took);
            }
        }
    }
}
