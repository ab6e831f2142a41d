//! Benchmarks of the engine alone: no kernel, no packets, a provider that costs nothing. Run by
//! `scripts/bench engine`, which says what comes out.

#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

mod capi;
mod dump;
mod flush;
mod heap;
mod measure;
mod packets;
mod peers;
mod ports;
mod report;
mod table;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;

use report::Report;

#[global_allocator]
static HEAP: heap::Counting = heap::Counting;

const USAGE: &str = "engine [--quick] [--out FILE] [PART...]

  --quick     fewer rounds: to see that it runs, not to believe the figures
  --out FILE  write the figures there as JSON
  PART        only these of: decided, capi, counted, sight, strangers, table, memory, flush,
              ports, dump";

const PARTS: [&str; 10] = [
    "decided",
    "capi",
    "counted",
    "sight",
    "strangers",
    "table",
    "memory",
    "flush",
    "ports",
    "dump",
];

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let (mut quick, mut out, mut parts) = (false, None::<PathBuf>, Vec::new());
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--bench" => {} // cargo says so
            "--quick" => quick = true,
            "--out" => out = args.next().map(PathBuf::from),
            "--alone" => {
                let (contestant, times) = (args.next(), args.next().and_then(|n| n.parse().ok()));
                packets::alone(&contestant.unwrap_or_default(), times.unwrap_or(1));
                return ExitCode::SUCCESS;
            }
            part if PARTS.contains(&part) => parts.push(arg),
            _ => {
                eprintln!("usage: {USAGE}");
                return ExitCode::from(2);
            }
        }
    }
    let rounds = |full: usize| if quick { full / 10 + 1 } else { full };
    let million = if quick { 100_000 } else { 1_000_000 };
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|p| p == part);
    let mut report = Report::default();
    if wanted("decided") {
        packets::decided(&mut report, rounds(60));
        packets::decided_allocates(&mut report);
    }
    if wanted("capi") {
        packets::decided_in_c(&mut report, rounds(60));
    }
    if wanted("counted") {
        packets::decided_counted(&mut report);
    }
    if wanted("sight") {
        // On a thread of its own: it is kept on one CPU, and the others are not.
        std::thread::scope(|s| s.spawn(|| packets::first_sight(&mut report, rounds(100))).join())
            .expect("first sights are measured");
    }
    if wanted("strangers") {
        packets::strangers(&mut report);
    }
    if wanted("table") {
        table::create_and_find(&mut report, rounds(30), million / 100);
        table::create_and_find(&mut report, rounds(7), million);
    }
    if wanted("memory") {
        table::memory(&mut report, million);
    }
    if wanted("flush") {
        flush::flushes(&mut report, rounds(40), million);
    }
    if wanted("ports") {
        ports::ports(&mut report, rounds(20));
    }
    if wanted("dump") {
        // On a thread of its own: it is kept on one CPU.
        std::thread::scope(|s| s.spawn(|| dump::dump(&mut report, rounds(10), million)).join())
            .expect("connections are listed");
    }
    report::finish(&report, out.as_deref())
}
