//! Benchmarks of the whole daemon on the machine's own kernel, in a network namespace, with ports of ebpf: how long it
//! is from the packet that makes a connection eligible to its rule; how many connections a second are offloaded and
//! ended; what processor time each costs; with an empty conntrack table, and beside a million entries of others. Run
//! by `scripts/bench offload`, which says what comes out: it needs root.
//!
//! Connections are frames: half of them UDP (question, answer, another packet), half TCP (handshake, a packet each
//! way, FIN both ways), between 10,000 clients and 100 servers, both behind a next hop. They are sent into the far
//! ends of the router's two veths, and what the router forwards is dropped where it arrives. Of each connection both
//! directions are offloaded, each on its netdev.
//!
//! **The clock of the latency** is CLOCK_MONOTONIC of this process: read before the system call that sends the packet
//! which makes a connection eligible, and again when a look-up in the port's BPF map, made every 20 us or so, finds
//! the entry. So it has in it the way of the packet through the router, the log message, all that the daemon does, and
//! up to one such pause; what the daemon says of itself it does not rely on.
//!
//! **A rate is sustained** when for as long as it lasts nothing is lost (sights, conntrack's events), 99 of 100 of
//! the directions get their rule before their connection ends, and a second after the last end no rule, no connection
//! and nothing that waits is left. The generator, and the router's own work for its packets, share the processors with
//! the daemon: where these cannot make a rate, that is said, and is the end of the search. What they make with no
//! daemon at all stands beside it.
//!
//! **Processor time of a connection** is that of all threads of the daemon's process, in user mode and in its system
//! calls: what the kernel does for conntrack's answers and events, for BPF maps and for nf_tables on its behalf. What
//! the router's packets cost (the log message of a sight among them) is the generator's, in whose system calls they
//! are forwarded.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss
)]

#[path = "offload/conntrack.rs"]
mod conntrack;
#[path = "offload/daemon.rs"]
mod daemon;
#[path = "offload/frames.rs"]
mod frames;
#[path = "offload/load.rs"]
mod load;
#[allow(dead_code, reason = "shared with the other suites")]
mod measure;
#[allow(dead_code, reason = "shared with the other suites")]
mod report;
#[allow(dead_code, reason = "shared with the other suites")]
#[path = "kernel/setting.rs"]
mod setting;
#[path = "offload/table.rs"]
mod table;
#[allow(dead_code, reason = "shared with the other suites")]
#[path = "kernel/world.rs"]
mod world;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use conntrack::{Ender, Foreign};
use ctoffload::datapath::netfilter::ledger::{Ledger, LedgerConfig};
use daemon::Daemon;
use frames::{NEXT_HOP_MACS, ROUTER_MACS, Sender, arriving, eligible_at, opening, tuple};
use load::{Ends, Made};
use measure::Shuffle;
use report::{Bar, Figure, Report};
use setting::Setting;
use table::Table;
use world::{ifindex, private_network, sh};

const USAGE: &str = "offload --on WHERE [--quick] [--out FILE] [PART...]

  --on WHERE      the machine's name in the figures, e.g. 'own 6.18'
  --quick         some seconds of each: to see that it runs, not to believe the figures
  --out FILE      write the figures there as JSON
  PART            of latency, rate, cost; default: all";

const PARTS: [&str; 3] = ["latency", "rate", "cost"];
/// Entries of others, with which all is measured.
const FOREIGN: [u32; 2] = [0, 1_000_000];
/// What is sustained is looked for from here on.
const FIRST_RATE: u32 = 5_000;
/// Where the cost of a connection is compared from one version to another.
const STEADY_RATE: u32 = 10_000;
/// More than two processors make.
const TOO_MANY: u32 = 100_000;
/// The number of the first connection that is made without a daemon: no other has it.
const FIRST_ALONE: u32 = 300_000_000;
/// A rule comes within that, or the packet is taken for lost.
const PATIENCE: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let setting = match Setting::read(USAGE, &PARTS) {
        Ok(setting) => setting,
        Err(status) => return status,
    };
    // What is waited for by the clock is not waited for some 50 us longer.
    // SAFETY: no pointers.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
    private_network();
    let macs = [ROUTER_MACS, NEXT_HOP_MACS].map(|macs| macs.map(mac));
    let [[lan, wan], [lan_hop, wan_hop]] = macs;
    sh(&format!(
        "ip link add lan0 address {lan} type veth peer name c0
         ip link add wan0 address {wan} type veth peer name s0
         for n in lan0 wan0 c0 s0; do echo 1 > /proc/sys/net/ipv6/conf/$n/disable_ipv6; ip link set $n up; done
         ip addr add 192.0.2.1/30 dev lan0; ip addr add 203.0.113.1/24 dev wan0
         ip neigh add 192.0.2.2 lladdr {lan_hop} dev lan0; ip neigh add 203.0.113.2 lladdr {wan_hop} dev wan0
         ip route add 10.1.0.0/16 via 192.0.2.2; ip route add 198.51.100.0/24 via 203.0.113.2
         echo 1 > /proc/sys/net/ipv4/ip_forward"
    ));
    let mut report = Report::default();
    if wants(&setting, "rate") {
        without_daemon(&setting, &mut report);
    }
    for foreign in FOREIGN {
        Run::of(&setting, foreign).all(&mut report);
    }
    report::finish(&report, setting.out.as_deref())
}

/// What the generator and the router make of the same connections while nobody offloads them: more than that no daemon
/// beside them can be asked for. conntrack is switched on by a ledger that sights on no netdev.
fn without_daemon(setting: &Setting, report: &mut Report) {
    let ledger = Ledger::install(LedgerConfig::default()).expect("a ledger");
    let ends = Ends { client: Sender::open(ifindex("c0")), server: Sender::open(ifindex("s0")) };
    let lasting = Duration::from_secs(if setting.quick { 1 } else { 2 });
    let (mut made, mut each) = (measure::Samples::default(), measure::Samples::default());
    let mut first = FIRST_ALONE;
    for _ in 0..3 {
        let cpu = own_cpu();
        let all = load::run(&ends, first, TOO_MANY, lasting);
        first += all.connections;
        let spent = own_cpu().saturating_sub(cpu);
        made.push(f64::from(all.connections) / all.took.as_secs_f64());
        each.push(spent.as_secs_f64() * 1e6 / f64::from(all.connections));
    }
    let name = |what: &str| format!("{what}, no daemon ({})", setting.on);
    report.add(Figure::new(name("connections made and ended"), made.median(), "/s"));
    let note = "of the generator, with the router's work for its packets".to_owned();
    report.add(Figure::new(name("processor time of a connection"), each.median(), "us").note(note));
    ledger.remove().expect("the ledger goes");
}

/// Processor time of this process so far.
fn own_cpu() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID)
        .expect("the clock of this process")
        .into()
}

fn mac(mac: [u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

/// Whether a part was asked for, or none was and so all are.
fn wants(setting: &Setting, part: &str) -> bool {
    setting.has(part) || !PARTS.iter().any(|part| setting.has(part))
}

/// All that is measured beside so many entries of others.
struct Run<'a> {
    setting: &'a Setting,
    count: u32,
    foreign: Foreign,
    daemon: Daemon,
    ends: Ends,
    /// The number of the next connection.
    next: u32,
}

/// What a rate came to.
struct Outcome {
    made: Made,
    cpu: Duration,
    threads: Vec<(String, Duration)>,
    /// All were offloaded: what it cost was the cost of that.
    is_offloaded: bool,
    /// Why it is not sustained.
    short: Option<String>,
}

impl<'a> Run<'a> {
    fn of(setting: &'a Setting, count: u32) -> Self {
        // The events of entries that are made while nobody listens are nobody's.
        let foreign = Foreign::make(count);
        let daemon = Daemon::start(["lan0", "wan0"]);
        let ends =
            Ends { client: Sender::open(ifindex("c0")), server: Sender::open(ifindex("s0")) };
        let mut this = Self { setting, count, foreign, daemon, ends, next: 0 };
        // What comes first (threads, tables, caches) is not measured.
        this.at(1000, Duration::from_millis(500));
        this
    }

    fn all(&mut self, report: &mut Report) {
        if wants(self.setting, "latency") {
            self.latency(report);
        }
        if wants(self.setting, "cost") {
            self.cost(report);
        }
        if wants(self.setting, "rate") {
            self.sustained(report);
        }
    }

    fn name(&self, what: &str) -> String {
        let foreign = if self.count == 0 { "0" } else { "1M" };
        format!("{what}, {foreign} foreign entries ({})", self.setting.on)
    }

    fn latency(&mut self, report: &mut Report) {
        let tables = [Table::of("lan0"), Table::of("wan0")];
        let mut ender = Ender::open();
        let (mut random, mut took) = (Shuffle(1), Vec::new());
        for _ in 0..if self.setting.quick { 300 } else { 4000 } {
            let n = self.next;
            self.next += 1;
            // Not in step with anything.
            std::thread::sleep(Duration::from_micros(200 + random.next() % 2000));
            let last = eligible_at(n);
            let mut sent = Instant::now();
            for &step in opening(n).iter().take_while(|&&step| step != last).chain([&last]) {
                sent = Instant::now();
                self.ends.step(n..n + 1, step, opening);
            }
            let (rule, table) = (arriving(n, last), &tables[usize::from(!last.is_clients())]);
            while !table.has(&rule) {
                assert!(sent.elapsed() < PATIENCE, "no rule for {rule} within {PATIENCE:?}");
                std::thread::sleep(Duration::from_micros(10));
            }
            took.push(sent.elapsed().as_secs_f64() * 1e3);
            assert_eq!(ender.end(&[tuple(n)]), 1, "its entry is there to be ended");
        }
        took.sort_by(f64::total_cmp);
        let at = |share: f64| took.get((took.len() as f64 * share) as usize).copied();
        for (share, name, bar) in [(0.5, "p50", 1.0), (0.99, "p99", 10.0)] {
            let name = self.name(&format!("first eligible packet to rule, {name}"));
            let figure = Figure::new(name, at(share), "ms").bar(Bar::AtMost(bar));
            report.add(figure.note(self.foreign.note()));
        }
    }

    /// Looks for the highest rate that is sustained.
    fn sustained(&mut self, report: &mut Report) {
        let lasting = Duration::from_secs(if self.setting.quick { 1 } else { 5 });
        let (mut held, mut failed, mut rate) = (None::<u32>, None::<u32>, FIRST_RATE);
        let mut why = String::new();
        let refinements = if self.setting.quick { 1 } else { 4 };
        let mut tries = 0;
        while tries < refinements || failed.is_none() {
            let outcome = self.at(rate, lasting);
            match outcome.short {
                None => held = Some(rate),
                Some(short) => {
                    why = format!("at {rate} a second: {short}");
                    failed = Some(rate);
                }
            }
            rate = match (held, failed) {
                (Some(held), None) => held * 2,
                (held, Some(failed)) => {
                    tries += 1;
                    u32::midpoint(held.unwrap_or(0), failed)
                }
                (None, None) => rate,
            };
        }
        let figure =
            Figure::new(self.name("connections offloaded and ended"), held.map(f64::from), "/s");
        report.add(figure.bar(Bar::AtLeast(50_000.0)).note(why));
    }

    /// What a connection costs at a rate that is no trouble.
    fn cost(&mut self, report: &mut Report) {
        let lasting = Duration::from_secs(if self.setting.quick { 1 } else { 5 });
        let rounds = if self.setting.quick { 1 } else { 3 };
        let (mut cost, mut threads, mut short) = (measure::Samples::default(), Vec::new(), None);
        for _ in 0..rounds {
            let outcome = self.at(STEADY_RATE, lasting);
            let each = outcome.cpu.as_secs_f64() * 1e6 / f64::from(outcome.made.connections);
            cost.push(if outcome.is_offloaded { each } else { f64::NAN });
            threads = outcome.threads;
            short = short.or(outcome.short);
        }
        let per =
            |d: Duration| d.as_secs_f64() * 1e6 / (f64::from(STEADY_RATE) * lasting.as_secs_f64());
        let mut words: Vec<_> = threads.iter().map(|(n, d)| (n, per(*d))).collect();
        words.sort_by(|a, b| b.1.total_cmp(&a.1));
        let words: Vec<_> =
            words.iter().filter(|t| t.1 >= 0.05).map(|(n, us)| format!("{n} {us:.1}")).collect();
        let note =
            words.join(", ") + &short.map_or(String::new(), |s| format!("; NOT sustained: {s}"));
        let name = self.name(&format!("processor time of a connection at {STEADY_RATE}/s"));
        report.add(Figure::new(name, cost.median(), "us").bar(Bar::AtMost(12.0)).note(note));
    }

    /// Connections at a rate, and whether it is sustained.
    fn at(&mut self, rate: u32, lasting: Duration) -> Outcome {
        let before = self.daemon.stats();
        let (cpu, threads) = (self.daemon.cpu(), self.daemon.cpu_of_threads());
        let made = load::run(&self.ends, self.next, rate, lasting);
        self.next += made.connections;
        let ended = Instant::now();
        let left = loop {
            let left: u64 = self.daemon.ports().iter().map(|p| p.installed + p.pending).sum();
            if left == 0 || ended.elapsed() >= Duration::from_secs(1) {
                break left;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let cpu = self.daemon.cpu().saturating_sub(cpu);
        let now = self.daemon.cpu_of_threads();
        let threads = now
            .into_iter()
            .map(|(name, on_cpu)| {
                let before = threads.iter().find(|t| t.0 == name).map_or(Duration::ZERO, |t| t.1);
                (name, on_cpu.saturating_sub(before))
            })
            .collect();
        let after = self.daemon.stats();
        let (wanted, adds) = (2 * u64::from(made.connections), after.adds - before.adds);
        let lost = after.sights_lost - before.sights_lost;
        let events_lost = after.conntrack_lost - before.conntrack_lost;
        let is_offloaded = made.ended == made.connections as usize && adds * 100 >= wanted * 99;
        let short = if made.took > lasting.mul_f64(1.02) {
            let could = f64::from(made.connections) / made.took.as_secs_f64();
            Some(format!("the generator and the router made no more than {could:.0}"))
        } else if made.ended < made.connections as usize {
            let lost = made.connections as usize - made.ended;
            Some(format!("{lost} connections lost packets before the router"))
        } else if lost + events_lost > 0 {
            Some(format!("sights were lost {lost} times, events {events_lost} times"))
        } else if adds * 100 < wanted * 99 {
            Some(format!("{adds} rules of {wanted} came before the end"))
        } else if left + after.connections > 0 {
            Some(format!(
                "a second later {left} slots and {} connections were left",
                after.connections
            ))
        } else {
            None
        };
        self.settle();
        Outcome { made, cpu, threads, is_offloaded, short }
    }

    /// Waits until nothing is left of it.
    fn settle(&self) {
        let patience = Instant::now() + Duration::from_secs(60);
        loop {
            let ports = self.daemon.ports();
            let left: u64 = ports.iter().map(|p| p.installed + p.pending).sum();
            if left == 0 && self.daemon.stats().connections == 0 {
                break;
            }
            assert!(Instant::now() < patience, "{left} slots are left after a minute");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}
