//! What "lazy, per netdev" gains: the engine, simulated at the scale of the Internet. Run by `scripts/bench scale`,
//! which says what comes out.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "shares and times of a simulation"
)]

#[allow(dead_code, reason = "what other suites want of it")]
#[path = "../report.rs"]
mod report;
mod simulation;
mod traffic;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use rand::SeedableRng;
use rand::rngs::StdRng;

use report::{Bar, Figure, Report};
use simulation::{Outcome, Setting, Strategy, Threshold, run};

const USAGE: &str = "scale [--quick] [--out FILE] [--data FILE] [ONLY]

  --quick      a tenth of the connections: to see that it runs, not to believe the figures
  --out FILE   write the figures there as JSON
  --data FILE  write what the picture shows there: tab separated
  ONLY         only settings whose name has this in it, e.g. '64 netdevs, 1k entries'";

const STRATEGIES: [(Strategy, &str); 3] =
    [(Strategy::All, "all netdevs"), (Strategy::Path, "the path's two"), (Strategy::Lazy, "lazy")];
const THRESHOLDS: [Threshold; 3] = [
    Threshold { name: "first packet", packets: 1, bytes: 0.0 },
    Threshold { name: "20 packets", packets: 20, bytes: 0.0 },
    Threshold { name: "100 kB", packets: 1, bytes: 100_000.0 },
];
const TABLES: [(usize, &str); 4] = [(64, "64"), (1 << 10, "1k"), (1 << 15, "32k"), (1 << 20, "1M")];
/// Netdevs, whether answers come by any uplink, and connections a second: fewer where all are told of all.
const WORLDS: [(usize, bool, f64); 4] =
    [(2, false, 1000.0), (8, false, 500.0), (8, true, 500.0), (64, true, 200.0)];
const SEED: u64 = 20_210_201;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let (mut quick, mut out, mut data) = (false, None::<PathBuf>, None::<PathBuf>);
    let mut only = String::new();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--bench" => {} // cargo says so
            "--quick" => quick = true,
            "--out" => out = args.next().map(PathBuf::from),
            "--data" => data = args.next().map(PathBuf::from),
            _ if only.is_empty() && !arg.starts_with('-') => only = arg,
            _ => {
                eprintln!("usage: {USAGE}");
                return ExitCode::from(2);
            }
        }
    }
    if let Err(why) = traffic::Traffic::new().check(&mut StdRng::seed_from_u64(SEED)) {
        eprintln!("the traffic is not what is published: {why}");
        return ExitCode::FAILURE;
    }
    let results = simulate(if quick { 0.1 } else { 1.0 }, &only);
    let written = print(&results)
        .and_then(|()| out.map_or(Ok(()), |out| figures(&results).write(&out)))
        .and_then(|()| data.map_or(Ok(()), |data| std::fs::write(data, tabbed(&results))));
    if let Err(e) = written {
        eprintln!("{e}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

type Row = (Setting, &'static str, &'static str, Outcome);

fn simulate(part: f64, only: &str) -> Vec<Row> {
    let mut rows = Vec::new();
    for (netdevs, any_uplink, per_second) in WORLDS {
        for threshold in THRESHOLDS {
            for (table, entries) in TABLES {
                for (strategy, name) in STRATEGIES {
                    let setting = Setting {
                        strategy,
                        threshold,
                        table,
                        netdevs,
                        any_uplink,
                        per_second: per_second * part,
                        warm_s: 60,
                        measured_s: 60,
                    };
                    let label = label(&setting, name, entries);
                    if !label.contains(only) {
                        continue;
                    }
                    let outcome = run(setting, SEED);
                    assert!(
                        outcome.violations == 0,
                        "the engine broke its promises: {setting:?} {outcome:?}"
                    );
                    eprintln!("  {label}: {}", said(&outcome));
                    rows.push((setting, name, entries, outcome));
                }
            }
        }
    }
    rows
}

fn world(setting: &Setting) -> String {
    format!("{} netdevs{}", setting.netdevs, if setting.any_uplink { ", any uplink" } else { "" })
}

fn label(setting: &Setting, strategy: &str, entries: &str) -> String {
    format!("{}, {} entries, from {}, {strategy}", world(setting), entries, setting.threshold.name)
}

fn share(part: u64, of: u64) -> f64 {
    part as f64 / of.max(1) as f64
}

fn said(o: &Outcome) -> String {
    format!(
        "{:.3} rules/connection, {:.1} % in hardware, {:.0} rules/netdev, {} evictions, {} of {} connections",
        share(o.rules, o.connections),
        100.0 * share(o.in_hardware, o.packets),
        o.occupied,
        o.evictions,
        o.packets,
        o.connections,
    )
}

/// Rules that are of no use to anybody, in per cent of those written.
fn useless(o: &Outcome) -> f64 {
    100.0 * share(o.useless, o.rules)
}

fn per_thousand(part: u64, o: &Outcome) -> f64 {
    1000.0 * share(part, o.connections)
}

fn print(results: &[Row]) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{:24} {:12} {:5} {:14} {:>8} {:>8} {:>7} {:>9} {:>8} {:>9} {:>9}",
        "netdevs",
        "from",
        "table",
        "offloaded on",
        "rules/",
        "useless",
        "in hw",
        "rules",
        "most",
        "evicted",
        "refused"
    )?;
    writeln!(
        out,
        "{:24} {:12} {:5} {:14} {:>8} {:>8} {:>7} {:>9} {:>8} {:>9} {:>9}",
        "", "", "", "", "conn", "%", "%", "mean", "", "/1k conn", "/1k conn"
    )?;
    for (setting, strategy, entries, o) in results {
        writeln!(
            out,
            "{:24} {:12} {:5} {:14} {:8.3} {:8.1} {:7.1} {:9.0} {:8} {:9.1} {:9.1}",
            world(setting),
            setting.threshold.name,
            entries,
            strategy,
            share(o.rules, o.connections),
            useless(o),
            100.0 * share(o.in_hardware, o.packets),
            o.occupied,
            o.most,
            per_thousand(o.evictions, o),
            per_thousand(o.refused, o),
        )?;
    }
    writeln!(out, "\n{}", traffic::ASSUMED)
}

fn figures(results: &[Row]) -> Report {
    let mut report = Report::default();
    for (setting, strategy, entries, o) in results {
        let name = label(setting, strategy, entries);
        let figure = |what: &str, value: f64, unit| {
            Figure::new(format!("{name}: {what}"), Some(value), unit)
        };
        report.add_silently(figure(
            "rules written",
            share(o.rules, o.connections),
            "per connection",
        ));
        let of_no_use = figure("rules where no packet of it arrives", useless(o), "%");
        report.add_silently(match setting.strategy {
            // No operation on a netdev that never saw the connection.
            Strategy::Lazy => of_no_use.bar(Bar::AtMost(0.0)),
            Strategy::All | Strategy::Path => of_no_use,
        });
        report.add_silently(figure(
            "packets in hardware",
            100.0 * share(o.in_hardware, o.packets),
            "%",
        ));
        report.add_silently(figure("rules of a netdev, mean", o.occupied, "rules"));
        report.add_silently(figure("rules of a netdev, most", o.most as f64, "rules"));
        report.add_silently(figure(
            "evictions",
            per_thousand(o.evictions, o),
            "per 1,000 connections",
        ));
        report.add_silently(figure(
            "refused, table full",
            per_thousand(o.refused, o),
            "per 1,000 connections",
        ));
    }
    report
}

/// What the picture shows, for gnuplot.
fn tabbed(results: &[Row]) -> String {
    let mut text = String::from(
        "netdevs\tany_uplink\tfrom\ttable\tstrategy\trules\tuseless\tin_hw\toccupied\n",
    );
    for (setting, strategy, _, o) in results {
        text += &format!(
            "{}\t{}\t{}\t{}\t{strategy}\t{:.4}\t{:.2}\t{:.3}\t{:.1}\n",
            setting.netdevs,
            u8::from(setting.any_uplink),
            setting.threshold.name,
            setting.table,
            share(o.rules, o.connections),
            useless(o),
            100.0 * share(o.in_hardware, o.packets),
            o.occupied,
        );
    }
    text
}
