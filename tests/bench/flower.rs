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
#[path = "kernel/world.rs"]
mod world;

use std::fmt::Write as _;
use std::fs::File;
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use measure::{Samples, cpus};
use ours::{Ours, rule_ids};
use report::{Bar, Figure, Report};

const USAGE: &str = "flower --on WHERE [--native] [--quick] [--out FILE]

  --on WHERE  the machine's name in the figures, e.g. 'emulated 6.12'
  --native    at the machine's own speed: the bars for that
  --quick     few rules and rounds: to see that it runs, not to believe the figures
  --out FILE  write the figures there as JSON";

/// The prio of the rules that are not ours.
const PRIO: u16 = 0x1000;

struct Setting {
    on: String,
    native: bool,
    quick: bool,
    files: PathBuf,
}

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let (mut on, mut native, mut quick, mut out) = (None, false, false, None::<PathBuf>);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--bench" => {} // cargo says so
            "--on" => on = args.next(),
            "--native" => native = true,
            "--quick" => quick = true,
            "--out" => out = args.next().map(PathBuf::from),
            _ => {
                eprintln!("usage: {USAGE}");
                return ExitCode::from(2);
            }
        }
    }
    let Some(on) = on else {
        eprintln!("usage: {USAGE}");
        return ExitCode::from(2);
    };
    let files = std::env::temp_dir();
    let setting = Setting { on, native, quick, files };
    let mut report = Report::default();
    world::private_network();
    network();
    suite(&setting, &mut report);
    report::finish(&report, out.as_deref())
}

/// Three netdevs, one per contestant, and two that rules redirect to.
fn network() {
    for name in ["ours0", "ours1", "tc0", "bare0", "out0"] {
        world::sh(&format!(
            "ip link add {name} address 02:00:00:00:01:01 type veth peer name {name}p &&
             ip link set {name} up && ip link set {name}p up"
        ));
    }
    world::sh("tc qdisc add dev tc0 clsact && tc qdisc add dev bare0 clsact");
}

fn suite(setting: &Setting, report: &mut Report) {
    let ours = Ours::bind("ours0", "out0");
    let template = bare::Template::catch(&ours);
    let sizes: &[(u32, usize)] = match (setting.quick, setting.native) {
        (true, _) => &[(500, 2)],
        (false, true) => &[(1000, 15), (20_000, 7), (100_000, 3)],
        (false, false) => &[(1000, 7), (20_000, 3), (100_000, 1)],
    };
    for &(count, rounds) in sizes {
        let last = (count, rounds) == *sizes.last().unwrap();
        inserts(setting, report, &ours, &template, count, rounds, last);
    }
    two_writers(setting, report, ours);
}

/// One line per rule, for `tc -batch`.
fn batch_file(setting: &Setting, verb: &str, count: u32) -> PathBuf {
    let mut text = String::new();
    for n in 0..count {
        writeln!(text, "{}", rules::tc_line(verb, "tc0", PRIO, n, "out0")).unwrap();
    }
    let path = setting.files.join(format!("{verb}.tc"));
    std::fs::write(&path, text).unwrap();
    path
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

fn inserts(
    setting: &Setting,
    report: &mut Report,
    ours: &Ours,
    template: &bare::Template,
    count: u32,
    rounds: usize,
    whole: bool,
) {
    let (add, del) = (batch_file(setting, "add", count), batch_file(setting, "del", count));
    let (mut insert, mut delete) = (Rounds::default(), Rounds::default());
    let (mut flush, mut sweep) = (Rounds::default(), Rounds::default());
    let before = world::count_filters("ours0");
    let push = |samples: &mut Samples, took: Duration| samples.push(took.as_secs_f64());
    for round in 0..rounds {
        let prepared = ours.prepare_adds(count);
        let prebuilt = bare::prebuild(template, count, "bare0");
        let (took, done) = ours.run(prepared);
        push(&mut insert.ours, took);
        push(&mut insert.bare, bare::send(&prebuilt));
        push(&mut insert.tc, world::tc_batch(&add));
        if round == 0 {
            // Nobody wins by writing less than the others.
            let found = ["ours0", "bare0", "tc0"].map(world::count_filters);
            let rules = count as usize;
            assert_eq!(found, [before + rules, rules, rules], "rules of ours, bare and tc");
        }
        let (took, reported) = ours.sweep();
        assert_eq!(reported, u64::from(count));
        push(&mut sweep.ours, took);
        push(&mut sweep.tc, tc_sweep());
        push(&mut flush.bare, world::tc_flush("bare0"));
        let rules = rule_ids(&done);
        push(&mut delete.ours, ours.run(ours.prepare_deletes(&rules)).0);
        push(&mut delete.tc, world::tc_batch(&del));
        // Again, for the flush.
        ours.run(ours.prepare_adds(count));
        bare::send(&prebuilt);
        let (took, flushed) = ours.flush();
        assert_eq!(flushed, u64::from(count));
        push(&mut flush.ours, took);
        push(&mut flush.tc, world::tc_flush("bare0"));
    }
    let on = &setting.on;
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
    let flush_bar = Bar::AtMost(1.2);
    let flushed = Figure::new(
        format!("flush {count}, over one `tc filter del` ({on})"),
        flush.ours.over(&flush.tc).median(),
        "x",
    )
    .peer("ours ms", flush.ours.median().map(|s| s * 1e3))
    .peer("tc ms", flush.tc.median().map(|s| s * 1e3));
    let swept = Figure::new(
        format!("usage of {count}, times `tc -s filter show` ({on})"),
        sweep.tc.over(&sweep.ours).median(),
        "x",
    )
    .peer("ours ms", sweep.ours.median().map(|s| s * 1e3))
    .peer("tc ms", sweep.tc.median().map(|s| s * 1e3));
    // The bars are for 100k rules; smaller tables are shown for their own sake.
    report.add(if whole { flushed.bar(flush_bar) } else { flushed });
    report.add(if whole { swept.bar(Bar::AtLeast(5.0)) } else { swept });
}

fn tc_sweep() -> Duration {
    let null = File::create("/dev/null").unwrap();
    world::time_program("tc", &["-s", "filter", "show", "dev", "tc0", "ingress"], Stdio::from(null))
}

/// Two ports, a writer each, against one after the other.
fn two_writers(setting: &Setting, report: &mut Report, one: Ours) {
    let name = format!("insert, two writers over one ({})", setting.on);
    let bar = Bar::AtLeast(1.6);
    if cpus().len() < 2 {
        report.add(Figure::new(name, None, "x").note("one processor"));
        return;
    }
    let other = Ours::bind("ours1", "out0");
    let (count, rounds) = if setting.quick { (500, 2) } else { (10_000, 5) };
    let (mut alone, mut together) = (Samples::default(), Samples::default());
    for _ in 0..rounds {
        alone.push(one.run(one.prepare_adds(count)).0.as_secs_f64());
        one.flush();
        let work = [(&one, one.prepare_adds(count)), (&other, other.prepare_adds(count))];
        let started = std::time::Instant::now();
        std::thread::scope(|s| {
            for (writer, prepared) in work {
                s.spawn(move || writer.run(prepared));
            }
        });
        together.push(started.elapsed().as_secs_f64());
        one.flush();
        other.flush();
    }
    // Twice the rules in the time that `together` took.
    let ratio = alone.over(&together).median().map(|r| r * 2.0);
    report.add(
        Figure::new(name, ratio, "x")
            .bar(bar)
            .peer("one/s", per_second(count, &alone))
            .peer("two/s", per_second(count * 2, &together)),
    );
}
