//! Benchmarks of the nf-flowtable provider: elements written in batches, one by one, and by `nft -f`.
//! Run by `scripts/bench flowtable`, which says what comes out, in the lab: it needs root and the modules
//! of nf_tables' flowtable. How fast packets are forwarded is a matter of `scripts/bench forward`.

#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

#[allow(dead_code, reason = "shared with the other suites")]
mod measure;
#[allow(dead_code, reason = "shared with the other suites")]
#[path = "kernel/ours.rs"]
mod ours;
#[allow(dead_code, reason = "shared with the other suites")]
mod report;
#[allow(dead_code, reason = "shared with the other suites")]
#[path = "kernel/rules.rs"]
mod rules;
#[allow(dead_code, reason = "shared with the other suites")]
#[path = "kernel/setting.rs"]
mod setting;
#[allow(dead_code, reason = "shared with the other suites")]
#[path = "kernel/world.rs"]
mod world;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use measure::Samples;
use netdev_providers::nf_flowtable::NfFlowtableClass;
use ours::{Ours, rule_ids};
use report::{Bar, Figure, Report};
use setting::Setting;

const USAGE: &str = "flowtable --on WHERE [--quick] [--out FILE]

  --on WHERE  the machine's name in the figures, e.g. 'emulated 6.12'
  --quick     few elements and rounds: to see that it runs, not to believe the figures
  --out FILE  write the figures there as JSON";

fn main() -> ExitCode {
    let setting = match Setting::read(USAGE, &[]) {
        Ok(setting) => setting,
        Err(status) => return status,
    };
    let mut report = Report::default();
    world::private_network();
    world::sh(
        "ip link add ours0 type veth peer name ours0p && ip link set ours0 up && ip link set ours0p up
         ip link add out0 type veth peer name out0p && ip link set out0 up && ip link set out0p up",
    );
    let sizes: &[(u32, usize)] =
        if setting.quick { &[(500, 2)] } else { &[(1000, 7), (20_000, 3)] };
    for &(count, rounds) in sizes {
        elements(&setting.on, &mut report, count, rounds);
    }
    report::finish(&report, setting.out.as_deref())
}

/// The elements as a file for `nft -f`: one transaction. Its keys lack the netdevs and the zone, for
/// which `nft` has no room in the type of a set.
fn nft_file(verb: &str, count: u32) -> PathBuf {
    let mut text = format!("{verb} element inet peer conns {{\n");
    for n in 0..count {
        let (source, sport) = (rules::source(n), rules::SPORT);
        writeln!(text, "udp . {source} . 203.0.113.80 . {sport} . 443,").unwrap();
    }
    text += "}\n";
    let path = std::env::temp_dir().join(format!("{verb}.nft"));
    std::fs::write(&path, text).unwrap();
    path
}

fn nft(file: &Path) -> Duration {
    world::time_program("nft", &["-f", file.to_str().unwrap()], Stdio::null())
}

fn elements(on: &str, report: &mut Report, count: u32, rounds: usize) {
    world::sh(
        "nft 'table inet peer { set conns { type inet_proto . ipv4_addr . ipv4_addr . inet_service . inet_service; }; }'",
    );
    let ours = Ours::bind_to(&NfFlowtableClass::default(), "ours0", "out0");
    let (add, delete) = (nft_file("add", count), nft_file("delete", count));
    let (mut batched, mut single, mut by_nft) =
        (Samples::default(), Samples::default(), Samples::default());
    let (mut flush, mut sweep) = (Samples::default(), Samples::default());
    let (mut deleted, mut deleted_by_nft) = (Samples::default(), Samples::default());
    for round in 0..rounds {
        let (took, done) = ours.run(ours.prepare_adds(count));
        batched.push(took.as_secs_f64());
        by_nft.push(nft(&add).as_secs_f64());
        if round == 0 {
            // Nobody wins by writing less than the others.
            let sets = ["inet ctoffload_flow orig4", "inet peer conns"].map(|set| {
                let listed = world::sh(&format!(
                    "nft -j list set {set} | jq '[.nftables[].set? // empty | .elem[]?] | length'"
                ));
                listed.trim().parse::<u32>().unwrap()
            });
            assert_eq!(sets, [count; 2], "elements of ours and of nft");
        }
        let (took, reported) = ours.sweep();
        assert_eq!(reported, u64::from(count));
        sweep.push(took.as_secs_f64());
        deleted.push(ours.run(ours.prepare_deletes(&rule_ids(&done))).0.as_secs_f64());
        deleted_by_nft.push(nft(&delete).as_secs_f64());
        single.push(ours.run(ours.prepare_adds(count).one_by_one()).0.as_secs_f64());
        let (took, flushed) = ours.flush();
        assert_eq!(flushed, u64::from(count));
        flush.push(took.as_secs_f64());
    }
    let per_second = |s: &Samples| s.median().map(|s| f64::from(count) / s);
    let ms = |s: &Samples| s.median().map(|s| s * 1e3);
    report.add(
        Figure::new(
            format!("add {count}, batches of 256, times one by one ({on})"),
            single.over(&batched).median(),
            "x",
        )
        .bar(Bar::AtLeast(1.0))
        .peer("batched/s", per_second(&batched))
        .peer("one by one/s", per_second(&single)),
    );
    report.add(
        Figure::new(
            format!("add {count}, batches of 256, times nft -f ({on})"),
            by_nft.over(&batched).median(),
            "x",
        )
        .peer("ours/s", per_second(&batched))
        .peer("nft -f/s", per_second(&by_nft))
        .note("nft: one transaction, smaller keys, and its start"),
    );
    report.add(
        Figure::new(
            format!("delete {count}, batches of 256, times nft -f ({on})"),
            deleted_by_nft.over(&deleted).median(),
            "x",
        )
        .peer("ours/s", per_second(&deleted))
        .peer("nft -f/s", per_second(&deleted_by_nft)),
    );
    report.add(Figure::new(format!("flush {count} ({on})"), ms(&flush), "ms"));
    report.add(Figure::new(format!("usage of {count} ({on})"), ms(&sweep), "ms"));
    drop(ours);
    world::sh("nft delete table inet peer");
}
