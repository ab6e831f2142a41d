//! Benchmarks of the ebpf provider on the machine's own kernel: rules added, deleted, flushed, their usage read; and
//! packets of 64 bytes through a router, beside the slow path, an skb that is made and dropped at once, a frame that
//! is dropped before there is an skb, and a redirect of XDP that looks nothing up. Frames come from
//! `BPF_PROG_TEST_RUN`, as if the driver of the port had received them, and end before the stack of the other port's
//! far end. Run by `scripts/bench ebpf`, which says what comes out: it needs root and clang.

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
#[path = "ebpf/tcp.rs"]
mod tcp;
#[allow(dead_code, reason = "shared with the other suites")]
#[path = "kernel/world.rs"]
mod world;

use std::process::ExitCode;
use std::time::Duration;

use aya::maps::xdp::DevMapHash;
use aya::maps::{Array, ProgramArray};
use aya::programs::tc::TcAttachOptions;
use aya::programs::xdp::XdpMode;
use aya::programs::{
    LinkOrder, ProgramFd, SchedClassifier, TcAttachType, TestRun, TestRunAttrs, TestRunOptions,
    Xdp, loaded_programs,
};
use aya::{Ebpf, EbpfLoader};
use measure::{Samples, cpu_time, cpus, pin};
use netdev_providers::Flow;
use netdev_providers::ebpf::{EbpfClass, EbpfConfig, Mode};
use ours::{Ours, rule_ids};
use report::{Bar, Figure, Report};
use setting::Setting;
use world::{ifindex, sh};

const USAGE: &str = "ebpf --on WHERE [--quick] [--out FILE]

  --on WHERE  the machine's name in the figures, e.g. 'own 6.18'
  --quick     few packets and rounds: to see that it runs, not to believe the figures
  --out FILE  write the figures there as JSON

FRAMES_OBJECT names the object made of tests/bench/ebpf/frames.bpf.c.";

const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;

fn main() -> ExitCode {
    let setting = match Setting::read(USAGE, &[]) {
        Ok(setting) => setting,
        Err(status) => return status,
    };
    let mut report = Report::default();
    world::private_network();
    sh("ip link add lan0 address 02:00:00:00:01:01 type veth peer name c0
        ip link add wan0 address 02:00:00:00:02:01 numtxqueues 2 numrxqueues 2 type veth peer name s0 numtxqueues 2 numrxqueues 2
        for n in lan0 wan0; do ethtool -K $n rxvlan off >/dev/null; done
        ip link set lan0 up; ip link set c0 up; ip link set wan0 up; ip link set s0 up
        ip addr add 10.0.0.1/8 dev lan0; ip addr add 203.0.113.1/24 dev wan0
        ip neigh add 203.0.113.80 lladdr 02:00:00:00:02:02 dev wan0
        echo 1 > /proc/sys/net/ipv4/ip_forward
        nft 'table ip t { chain post { type nat hook postrouting priority 100; }; chain f { type filter hook forward priority 0; ct state invalid drop; }; }'");
    // While this thread may use all processors, as those that it starts.
    tcp::throughput(&setting, &mut report);
    let all = cpus();
    if let Some(&cpu) = all.first() {
        pin(cpu);
    }
    let sizes: &[u32] = if setting.quick { &[1000] } else { &[1, 1000, 100_000, 1_000_000] };
    for &count in sizes {
        if count > 1 {
            tables(&setting, &mut report, count);
        }
        forwarding(&setting, &mut report, count);
    }
    if let &[first, second, ..] = &all[..] {
        let sizes: &[u32] = if setting.quick { &[1000] } else { &[1, 100_000] };
        for &flows in sizes {
            two_processors(&setting, &mut report, flows, [first, second]);
        }
    }
    report::finish(&report, setting.out.as_deref())
}

/// A port that has room for so many rules.
fn class(mode: Mode, rules: u32) -> EbpfClass {
    let default = EbpfConfig::default();
    let max_rules = rules.max(default.max_rules);
    EbpfClass::new(EbpfConfig { mode: Some(mode), max_rules, pins: "/nowhere".into() })
}

fn tables(setting: &Setting, report: &mut Report, count: u32) {
    let ours = Ours::bind_to(&class(Mode::Tcx, count), "lan0", "wan0");
    let [mut add, mut delete, mut flush, mut sweep] = [(); 4].map(|()| Samples::default());
    for _ in 0..if setting.quick { 2 } else { 5 } {
        // By the thread's own time: neither waits for anybody.
        let cpu = |work: &mut dyn FnMut()| {
            let before = cpu_time();
            work();
            (cpu_time() - before).as_secs_f64()
        };
        let mut prepared = Some(ours.prepare_adds(count));
        let mut done = Vec::new();
        add.push(cpu(&mut || done = ours.run(prepared.take().unwrap()).1));
        sweep.push(cpu(&mut || assert_eq!(ours.sweep().1, u64::from(count))));
        let mut prepared = Some(ours.prepare_deletes(&rule_ids(&done)));
        delete.push(cpu(&mut || drop(ours.run(prepared.take().unwrap()))));
        assert_eq!(ours.sweep().1, 0);
        ours.run(ours.prepare_adds(count));
        flush.push(cpu(&mut || assert_eq!(ours.flush().1, u64::from(count))));
    }
    let on = &setting.on;
    let is_barred = count == 100_000;
    let mut figure = |what: &str, value: Option<f64>, unit, bar: Bar| {
        let figure = Figure::new(format!("{what} {count} ({on})"), value, unit);
        report.add(if is_barred { figure.bar(bar) } else { figure });
    };
    let per_second = |s: &Samples| s.median().map(|s| f64::from(count) / s);
    let ms = |s: &Samples| s.median().map(|s| s * 1e3);
    figure("insert, one writer,", per_second(&add), "/s", Bar::AtLeast(500_000.0));
    figure("delete, one writer,", per_second(&delete), "/s", Bar::AtLeast(500_000.0));
    figure("flush of", ms(&flush), "ms", Bar::Below(5.0));
    figure("usage sweep of", ms(&sweep), "ms", Bar::Below(20.0));
}

/// The programs of `frames.bpf.c`.
struct Frames {
    object: Ebpf,
    target: ProgramArray<aya::maps::MapData>,
}

impl Frames {
    fn load() -> Self {
        let file = std::env::var("FRAMES_OBJECT").expect("FRAMES_OBJECT: see scripts/bench");
        let mut object = EbpfLoader::new().btf(None).load_file(file).unwrap();
        for name in ["generate", "redirect", "drop_frame"] {
            let program: &mut Xdp = object.program_mut(name).unwrap().try_into().unwrap();
            program.load().unwrap();
        }
        let program: &mut SchedClassifier =
            object.program_mut("drop_skb").unwrap().try_into().unwrap();
        program.load().unwrap();
        let target = ProgramArray::try_from(object.take_map("target").unwrap()).unwrap();
        let mut out = DevMapHash::try_from(object.take_map("out").unwrap()).unwrap();
        out.insert(0, ifindex("wan0").get(), None, 0).unwrap();
        // The map lives by the program.
        Self { object, target }
    }

    fn xdp(&mut self, name: &str) -> &mut Xdp {
        self.object.program_mut(name).unwrap().try_into().unwrap()
    }

    fn set(&mut self, flows: u32, verdict: u32) {
        let map = self.object.map_mut("setting").unwrap();
        let mut array = Array::<_, [u32; 4]>::try_from(map).unwrap();
        array.set(0, [flows, verdict, 1, 0], 0).unwrap();
    }

    /// Frames per second that the processor works: for this thread, and in softirqs, where the far end's driver is.
    fn run(&mut self, to: Option<&ProgramFd>, flows: u32, verdict: u32, frames: u32) -> f64 {
        self.set(flows, verdict);
        match to {
            Some(program) => self.target.set(0, program, 0).unwrap(),
            None => drop(self.target.clear_index(&0)),
        }
        let data = [0; 60];
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let ctx = [0, data.len() as u32, 0, ifindex("lan0").get(), 0, 0];
        let ctx: Vec<u8> = ctx.iter().flat_map(|n: &u32| n.to_ne_bytes()).collect();
        let before = (cpu_time(), softirqs());
        let options = TestRunOptions {
            data_in: Some(&data),
            ctx_in: Some(&ctx),
            repeat: frames,
            attrs: TestRunAttrs::new().xdp_live_frames(64),
            ..TestRunOptions::new()
        };
        self.xdp("generate").test_run(options).unwrap();
        let worked = (cpu_time() - before.0) + (softirqs() - before.1);
        f64::from(frames) / worked.as_secs_f64()
    }
}

/// Time in softirqs of the processor that this runs on (proc_stat(5), in ticks of 10 ms).
fn softirqs() -> Duration {
    let cpu = nix::sched::sched_getcpu().unwrap();
    let stat = std::fs::read_to_string("/proc/stat").unwrap();
    let line = stat.lines().find(|l| l.starts_with(&format!("cpu{cpu} "))).unwrap();
    Duration::from_millis(line.split_whitespace().nth(7).unwrap().parse::<u64>().unwrap() * 10)
}

/// The program of the provider that was bound last.
fn ours_in_xdp() -> ProgramFd {
    let ours = loaded_programs().filter_map(Result::ok).filter(|p| p.name() == b"forward_xdp");
    ours.max_by_key(|p| p.id()).expect("it is loaded").fd().unwrap()
}

/// With addresses and ports rewritten.
fn translated(n: u32, egress: netdev_providers::Ifindex) -> Flow {
    let mut flow = rules::flow(n, egress);
    let to = format!("udp 203.0.113.1:{} > 203.0.113.80:8443", 1024 + n % 60_000);
    flow.forward.tuple = to.parse().unwrap();
    flow
}

fn forwarding(setting: &Setting, report: &mut Report, flows: u32) {
    // Of conntrack's table there is one for all namespaces: the machine's limit stays as it is, and a slow path that
    // conntrack has no room for does without it, and is the faster for that.
    let limit = sh("cat /proc/sys/net/netfilter/nf_conntrack_max").trim().parse::<u32>().unwrap();
    if flows > limit / 4 {
        sh("nft 'add table ip t; delete table ip t'");
    }
    let mut frames = Frames::load();
    let sink = frames.xdp("drop_frame").attach("s0", XdpMode::Driver).unwrap();
    let xdp = Ours::bind_to(&class(Mode::Xdp, flows), "lan0", "wan0");
    let program = ours_in_xdp();
    let without = frames.xdp("redirect").fd().unwrap().try_clone().unwrap();
    let names =
        ["slow", "tcx", "xdp", "xdp with NAT", "no look-up", "skb dropped", "frame dropped"];
    let mut rates = names.map(|_| Samples::default());
    let (rounds, many) = if setting.quick { (2, 50_000) } else { (5, 2_000_000) };
    let forwarded = || -> u64 {
        let told = "ethtool -S s0 | awk '/xdp_drops/ { n += $2 } END { print n + 0 }'";
        sh(told).trim().parse().unwrap()
    };
    for _ in 0..rounds {
        rates[0].push(frames.run(None, flows, XDP_PASS, many / 4));
        {
            let tcx = Ours::bind_to(&class(Mode::Tcx, flows), "lan0", "wan0");
            tcx.run(tcx.prepare_adds(flows));
            rates[1].push(frames.run(None, flows, XDP_PASS, many / 2));
        }
        xdp.run(xdp.prepare_adds(flows));
        let before = forwarded();
        rates[2].push(frames.run(Some(&program), flows, XDP_PASS, many));
        assert!(forwarded() - before > u64::from(many) / 2, "frames leave");
        xdp.flush();
        xdp.run(xdp.prepare_adds_of(flows, translated));
        rates[3].push(frames.run(Some(&program), flows, XDP_PASS, many));
        xdp.flush();
        rates[4].push(frames.run(Some(&without), flows, XDP_PASS, many));
        {
            let drop_skb: &mut SchedClassifier =
                frames.object.program_mut("drop_skb").unwrap().try_into().unwrap();
            let last = TcAttachOptions::TcxOrder(LinkOrder::last());
            let link = drop_skb.attach_with_options("lan0", TcAttachType::Ingress, last).unwrap();
            rates[5].push(frames.run(None, flows, XDP_PASS, many));
            let drop_skb: &mut SchedClassifier =
                frames.object.program_mut("drop_skb").unwrap().try_into().unwrap();
            drop_skb.detach(link).unwrap();
        }
        rates[6].push(frames.run(None, flows, XDP_DROP, many));
    }
    let on = &setting.on;
    for (name, rate) in names.iter().zip(&rates) {
        let mpps = rate.median().map(|r| r / 1e6);
        report.add(Figure::new(format!("{name}, {flows} flows ({on})"), mpps, "Mpps"));
    }
    let mut over = |what: &str, a: usize, b: usize, bar: f64| {
        let ratio = rates[a].over(&rates[b]).median();
        let figure = Figure::new(format!("{what}, {flows} flows ({on})"), ratio, "x");
        report.add(if flows == 100_000 { figure.bar(Bar::AtLeast(bar)) } else { figure });
    };
    over("XDP, times the slow path", 2, 0, 4.0);
    over("XDP, times an skb dropped at tc", 2, 5, 1.7);
    over("XDP, over a redirect without look-up", 2, 4, 0.85);
    over("XDP with NAT, over without", 3, 2, 0.9);
    over("tcx, times the slow path", 1, 0, 1.0);
    drop(xdp);
    frames.xdp("drop_frame").detach(sink).unwrap();
}

/// The same flows on two processors at once: a rule counts in one place, whoever forwards.
fn two_processors(setting: &Setting, report: &mut Report, flows: u32, on: [usize; 2]) {
    let mut frames = [Frames::load(), Frames::load()];
    let sink = frames[0].xdp("drop_frame").attach("s0", XdpMode::Driver).unwrap();
    let xdp = Ours::bind_to(&class(Mode::Xdp, flows), "lan0", "wan0");
    let program = ours_in_xdp();
    xdp.run(xdp.prepare_adds(flows));
    let (mut one, mut two) = (Samples::default(), Samples::default());
    let (rounds, many) = if setting.quick { (2, 50_000) } else { (7, 2_000_000) };
    for _ in 0..rounds {
        one.push(frames[0].run(Some(&program), flows, XDP_PASS, many));
        let [first, second] = &mut frames;
        let together = std::thread::scope(|scope| {
            let go = [(first, on[0]), (second, on[1])].map(|(frames, cpu)| {
                let program = &program;
                scope.spawn(move || {
                    pin(cpu);
                    frames.run(Some(program), flows, XDP_PASS, many)
                })
            });
            go.map(|thread| thread.join().unwrap()).iter().sum()
        });
        two.push(together);
    }
    let mpps = |s: &Samples| s.median().map(|r| r / 1e6);
    let name = format!("XDP, two processors over one, {flows} flows ({})", setting.on);
    report.add(
        Figure::new(name, two.over(&one).median(), "x")
            .peer("two Mpps", mpps(&two))
            .peer("one Mpps", mpps(&one)),
    );
    drop(xdp);
    frames[0].xdp("drop_frame").detach(sink).unwrap();
}
