//! Netdevs of our own, in a network namespace of our own, and the programs that contestants are.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use netdev_providers::{Generation, HwFlags, Ifindex, Netdev};
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};

/// Puts the calling thread, and all that it starts from now on, into a fresh network namespace.
pub(crate) fn private_network() {
    unshare(CloneFlags::CLONE_NEWNET).expect("unshare(CLONE_NEWNET): this needs root");
    sh("ip link set lo up");
}

/// Runs a command line; what it prints is returned.
///
/// # Panics
/// When it fails.
pub(crate) fn sh(line: &str) -> String {
    let out = Command::new("sh").args(["-c", line]).output().expect("sh");
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    assert!(out.status.success(), "`{line}`: {}{}", text(&out.stderr), text(&out.stdout));
    text(&out.stdout)
}

/// How long a program takes, its start included. What it prints goes to `output`.
///
/// # Panics
/// When it fails.
pub(crate) fn time_program(program: &str, args: &[&str], output: Stdio) -> Duration {
    let started = Instant::now();
    let status = Command::new(program).args(args).stdout(output).status().expect(program);
    assert!(status.success(), "{program} {args:?}: {status}");
    started.elapsed()
}

/// `tc -batch FILE`.
pub(crate) fn tc_batch(file: &Path) -> Duration {
    time_program("tc", &["-batch", file.to_str().expect("UTF-8")], Stdio::null())
}

/// `tc filter del dev NETDEV ingress`: every filter that is there.
pub(crate) fn tc_flush(netdev: &str) -> Duration {
    time_program("tc", &["filter", "del", "dev", netdev, "ingress"], Stdio::null())
}

pub(crate) fn ifindex(name: &str) -> Ifindex {
    Ifindex::new(if_nametoindex(name).expect(name)).expect("an ifindex")
}

pub(crate) fn netdev(name: &str) -> Netdev {
    Netdev {
        ifindex: ifindex(name),
        generation: Generation::new(1).expect("not 0"),
        name: name.into(),
        hw_flags: HwFlags::SkipHw,
    }
}

/// Waits until the kernel is idle. What is deleted it frees later, and for long: a rule's memory after a
/// grace period, by a worker, which would take time from whoever comes next.
///
/// # Panics
/// When that is not so after a minute.
pub(crate) fn let_the_kernel_finish() {
    const LOOK: Duration = Duration::from_millis(200);
    let patience = Instant::now() + Duration::from_secs(60);
    let mut before = processor_time();
    loop {
        std::thread::sleep(LOOK);
        let now = processor_time();
        let (idle, all) = (now.0 - before.0, now.1 - before.1);
        if idle * 20 >= all * 19 {
            return;
        }
        assert!(Instant::now() < patience, "the kernel is not idle: {idle} of {all} ticks");
        before = now;
    }
}

/// Ticks of all processors since the start: idle ones, and all (`cpu` in proc_stat(5)).
fn processor_time() -> (u64, u64) {
    let stat = std::fs::read_to_string("/proc/stat").expect("/proc/stat");
    let all = stat.lines().next().and_then(|line| line.strip_prefix("cpu ")).expect("all of them");
    // user, nice, system, idle, iowait, irq, softirq, steal; guests are counted as users too.
    let ticks = all.split_whitespace().take(8).map(|n| n.parse().expect("a number"));
    let ticks: Vec<u64> = ticks.collect();
    (ticks[3] + ticks[4], ticks.iter().sum())
}

/// How many filters stand at a netdev's ingress: `tc` lists each with its handle.
pub(crate) fn count_filters(netdev: &str) -> usize {
    let shown = sh(&format!("tc filter show dev {netdev} ingress | grep -c 'handle 0x' || true"));
    shown.trim().parse().expect("a count")
}
