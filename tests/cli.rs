//! The program as a person runs it, against a server with fixed data.
//!
//! As root each test has a network namespace of its own, so that the program finds the daemon where
//! it always is. Without root the daemon gets a port id of its own in the present namespace, and
//! runs as the present user. No test is skipped: the few that have to change users fail without
//! root, and say so.

// clippy.toml allows it in tests, but does not see that this whole file is one.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use ctoffload::control::info::*;
use ctoffload::control::{
    Access, ConnDump, ConnFilter, ControlError, ControlHandler, ErrorKind, Found, PORT_ID,
    Publisher, Server, ServerError, Subscription, Target, Waker,
};
use netdev_providers::{Direction, Reason, Tuple, Zone};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, geteuid};
use serde_json::Value;

const READERS: u32 = 4242;

struct Fake;

fn tuple() -> Tuple {
    "tcp 10.0.0.1:1234 > 10.9.0.2:80".parse().unwrap()
}

fn port(name: &str) -> PortInfo {
    PortInfo {
        ifindex: 3,
        name: name.into(),
        generation: 1,
        provider: Some("tc-flower".into()),
        about: "driver mlx5_core, hw-tc-offload on".into(),
        capabilities: vec![CapabilityInfo {
            name: "flow ipv4 tcp nat".into(),
            software: None,
            software_why: None,
            hardware: Some(false),
            hardware_why: Some("Unsupported action (EOPNOTSUPP)".into()),
        }],
        offload: "both".into(),
        state: "bound".into(),
        fault: None,
        slow: None,
        undeleted: 0,
        in_front: vec!["matchall at prio 10 (all): mirred".into()],
        chosen: None,
        refusals: vec![],
        pending: 2,
        installed: 1200,
        rejected: 12,
        in_hw: 1188,
        capacity: Some(1200),
        capacity_learnt: true,
        evictions: 3,
        sights: 1311,
        adds: 1255,
        deletes: 55,
        flushed: 7,
        packets: 123_456,
        bytes: 98_765_432,
        reasons: vec![
            ReasonCount { reason: "table-full".into(), count: 10 },
            ReasonCount { reason: "busy".into(), count: 4 },
        ],
        latency: vec![
            LatencyCount { op: "add".into(), below_us: Some(64), count: 1200 },
            LatencyCount { op: "add".into(), below_us: None, count: 55 },
        ],
    }
}

fn slot(port: &str, direction: Direction) -> SlotInfo {
    SlotInfo {
        port: port.into(),
        ifindex: 3,
        generation: 1,
        direction,
        state: "installed".into(),
        reason: None,
        detail: None,
        retry_in_ms: None,
        egress: Some("eth1".into()),
        egress_ifindex: Some(4),
        iif: None,
        oif: Some("eth1.20".into()),
        vlan_in: None,
        vlan_out: Some(20),
        dst_mac: Some("02:00:00:00:00:01".into()),
        bridged: false,
        nat: true,
        in_hw: Some(true),
        nic_said: None,
        packets: 321,
        bytes: 45_678,
        idle_ms: Some(1500),
        cookie: Some("c70f0100deadbeef0000000000000007".into()),
        rule: Some("pref 4002 handle 0x1".into()),
    }
}

fn conn() -> ConnInfo {
    ConnInfo {
        epoch: 7,
        zone: 0,
        packets: 77,
        bytes: 7700,
        ct_id: Some(471_147),
        original: tuple(),
        reply: "tcp 10.9.0.2:80 > 192.0.2.1:61000".parse().unwrap(),
        age_ms: 12_300,
        idle_ms: Some(1_500),
        slots: vec![
            slot("eth0", Direction::Original),
            SlotInfo {
                ifindex: 4,
                generation: 2,
                state: "rejected".into(),
                reason: Some(Reason::TableFull.name().into()),
                detail: Some("No space left on device".into()),
                retry_in_ms: Some(1200),
                egress: None,
                egress_ifindex: None,
                iif: Some("br0".into()),
                oif: None,
                vlan_out: None,
                dst_mac: None,
                nat: false,
                in_hw: None,
                packets: 0,
                bytes: 0,
                idle_ms: None,
                cookie: None,
                rule: None,
                ..slot("eth1", Direction::Reply)
            },
        ],
    }
}

impl ControlHandler for Fake {
    fn ports(&self) -> Result<Vec<PortInfo>, ControlError> {
        let mut unbound = PortInfo {
            ifindex: 12,
            generation: 3,
            provider: None,
            state: "unbound".into(),
            refusals: vec![Refusal {
                class: "tc-flower".into(),
                why: "the kernel has no cls_flower: modprobe cls_flower".into(),
            }],
            reasons: vec![],
            ..port("wwan0")
        };
        unbound.about.clear();
        Ok(vec![port("eth0"), unbound])
    }

    fn conns(&self, filter: &ConnFilter) -> Result<ConnDump, ControlError> {
        if filter.port.as_deref().is_some_and(|p| !p.starts_with("eth")) {
            return Err(ControlError::not_found("no such port"));
        }
        if filter.count {
            return Ok(Box::new([Found::Nothing, Found::Count(1234)].into_iter()));
        }
        // What has come of everything else is told in words.
        if filter.provider.is_some() {
            return Err(ControlError::invalid(format!("{filter:?}")));
        }
        let n = match filter.zone {
            Some(9) => 3000,
            Some(8) => 0,
            _ => 1,
        };
        let known = filter.tuple.is_none_or(|t| t == conn().original || t == conn().reply);
        let slow = filter.zone == Some(7);
        Ok(Box::new((0..n).filter(move |_| known).map(|_| Found::Conn(conn())).chain(
            // Looks for more, for ever.
            std::iter::repeat_n(Found::Nothing, if slow { usize::MAX } else { 0 }),
        )))
    }

    fn providers(&self) -> Result<Vec<ProviderInfo>, ControlError> {
        Ok(vec![ProviderInfo {
            class: "tc-flower".into(),
            priority: 10,
            ports: 1,
            note: "rules of the TC flower classifier".into(),
        }])
    }

    fn stats(&self) -> Result<Stats, ControlError> {
        Ok(Stats {
            instance: 0xdead_beef,
            uptime_ms: 61_000,
            connections: 601,
            slots_installed: 1200,
            slots_pending: 2,
            slots_rejected: 13,
            sights: 1311,
            sights_lost: 5,
            ledger_elements: 1309,
            ledger_size: 65_536,
            conntrack_events: 4004,
            conntrack_lost: 6,
            sweeps: 61,
            last_sweep_ms: 8,
            sweep_pause_ms: 5000,
            adds: 1255,
            deletes: 55,
            flushed: 7,
            add_failures: 14,
            reasons: vec![
                ReasonCount { reason: "table-full".into(), count: 10 },
                ReasonCount { reason: "busy".into(), count: 4 },
            ],
            latency: port("eth0").latency,
        })
    }

    fn lint(&self) -> Result<Vec<LintInfo>, ControlError> {
        let rule = |n| format!("table inet fw chain forward handle {n}");
        let of = |name: &str, decides, places: Vec<String>| LintInfo {
            name: name.into(),
            decides,
            skips: format!("words about {name}"),
            advice: format!("advice about {name}"),
            count: places.len() as u64,
            places,
        };
        let many = (1000..1007).map(rule).collect();
        let counters = LintInfo { count: 4321, ..of("counter", false, many) };
        Ok(vec![of("limit", true, vec![rule(7)]), counters])
    }

    fn explain(&self, tuple: &Tuple, _: Option<Zone>) -> Result<Explain, ControlError> {
        if *tuple == conn().original || *tuple == conn().reply {
            let verdicts = vec![PortVerdict {
                port: "wwan0".into(),
                ifindex: 12,
                direction: Direction::Reply,
                verdict: "no packet of this direction has been seen here".into(),
                matters: false,
                cause: None,
                help: None,
                in_front: Vec::new(),
            }];
            let summary = Summary {
                offloaded: Offloaded::Partly,
                sentence: "offloaded in one direction: original on eth0; not the reply direction: table-full on eth1".into(),
                cause: Some("table-full".into()),
                help: Some("raise the NIC's flow table limit".into()),
            };
            return Ok(Explain { summary, conn: Some(conn()), verdicts });
        }
        let of = |offloaded, sentence: &str| Summary {
            offloaded,
            sentence: sentence.into(),
            ..Summary::default()
        };
        let summary = match tuple.sport() {
            1 => of(Offloaded::Unknown, "not offloaded: there is no such connection"),
            2 => of(Offloaded::Not, "not offloaded: it is closing"),
            _ => of(Offloaded::Both, "offloaded in both directions"),
        };
        Ok(Explain { summary, ..Explain::default() })
    }

    fn flush(&self, request: &FlushRequest) -> Result<Flushed, ControlError> {
        let count = if request.all { 1200 } else { 1 };
        Ok(Flushed { count, ports: vec![PortFlushed { port: "eth0".into(), count }] })
    }

    fn reconcile(&self, request: &ReconcileRequest) -> Result<Vec<PortReconciled>, ControlError> {
        let done = |port: &str, fault: Option<&str>| PortReconciled {
            port: port.into(),
            adopted: 12,
            removed: 3,
            foreign: 1,
            fault: fault.map(str::to_owned),
        };
        match request.port.as_deref() {
            None => Ok(vec![done("eth0", None), done("wwan0", None)]),
            Some("eth0") => Ok(vec![done("eth0", None)]),
            Some("wwan0") => Ok(vec![done("wwan0", Some("reading what stands: ENODEV"))]),
            Some(_) => Err(ControlError::not_found("there is no such port")),
        }
    }

    fn reload(&self) -> Result<Reloaded, ControlError> {
        Ok(Reloaded {
            file: "/etc/x.toml".into(),
            kept: vec!["[sight] ledger-size".into(), "[limits] queue".into()],
            ports_changed: true,
            flushed: Some(12),
        })
    }

    fn port_add(&self, request: &PortAddRequest) -> Result<PortInfo, ControlError> {
        match (request.name.as_str(), request.offload.as_deref()) {
            ("eth0", _) => {
                Err(ControlError::new(ErrorKind::AlreadyBound, "bound to tc-flower already"))
            }
            ("lo", _) => Err(ControlError::new(ErrorKind::Unsupported, "not an Ethernet netdev")),
            ("nosuch", _) => Err(ControlError::not_found("no such netdev")),
            (name, Some("skip_sw")) if request.providers == ["tc-flower"] => Ok(port(name)),
            (_, other) => Err(ControlError::invalid(format!("{:?} {other:?}", request.providers))),
        }
    }

    fn port_del(&self, request: &PortDelRequest) -> Result<(), ControlError> {
        if request.name == "eth0" { Ok(()) } else { Err(ControlError::not_found("no such port")) }
    }
}

/// A daemon, and how to talk to it.
struct Bed {
    port_id: u32,
    publisher: Option<Publisher>,
    stop: Arc<AtomicBool>,
    waker: Option<Waker>,
    thread: Option<JoinHandle<()>>,
}

impl Bed {
    fn without_daemon() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let mut port_id = PORT_ID;
        if geteuid().is_root() {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
        } else {
            port_id = 0x1000_0000 + std::process::id() * 64 + NEXT.fetch_add(1, Ordering::Relaxed);
        }
        Self { port_id, publisher: None, stop: Arc::default(), waker: None, thread: None }
    }

    fn new() -> Self {
        let mut bed = Self::without_daemon();
        bed.serve();
        bed
    }

    fn serve(&mut self) {
        let access = Access { group: Some(Gid::from_raw(READERS)) };
        let server = Server::bind_to(self.port_id, access).unwrap();
        self.publisher = Some(server.publisher());
        self.waker = Some(server.waker());
        let stop = Arc::clone(&self.stop);
        self.thread = Some(std::thread::spawn(move || {
            server.run(&Fake, || stop.load(Ordering::Relaxed)).unwrap();
        }));
    }

    fn command(&self, line: &str) -> Command {
        self.command_of(env!("CARGO_BIN_EXE_ctoffload"), line)
    }

    fn command_of(&self, program: &str, line: &str) -> Command {
        let mut command = Command::new(program);
        command.args(line.split_whitespace());
        if !geteuid().is_root() {
            command.args(["--port-id", &self.port_id.to_string()]);
            command.args(["--daemon-uid", &geteuid().to_string()]);
        }
        command
    }

    fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    /// What it prints when it succeeds.
    fn ok(&self, line: &str) -> String {
        let out = self.run(line);
        assert!(out.status.success(), "`{line}`: {}", text(&out.stderr));
        assert!(out.stderr.is_empty(), "`{line}`: {}", text(&out.stderr));
        text(&out.stdout)
    }

    fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.ok(&format!("-j {line}"))).unwrap()
    }

    /// The one line of its error, when it fails with this exit code.
    fn fails(&self, line: &str, code: i32) -> String {
        fails(&self.run(line), line, code)
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let (Some(waker), Some(thread)) = (self.waker.take(), self.thread.take()) {
            waker.wake();
            let result = thread.join();
            assert!(result.is_ok() || std::thread::panicking());
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn fails(out: &Output, line: &str, code: i32) -> String {
    let stderr = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "`{line}`: {stderr}");
    assert!(out.stdout.is_empty(), "`{line}` prints {}", text(&out.stdout));
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr.trim_end().to_owned()
}

#[test]
fn without_a_daemon_it_says_so() {
    let bed = Bed::without_daemon();
    for line in ["stats", "port show", "explain tcp 1.1.1.1:1 2.2.2.2:2", "flush --all", "-j conn"]
    {
        let e = bed.fails(line, 3);
        assert!(e.starts_with("ctoffload: "), "{e}");
        assert!(e.ends_with(": the daemon is not running in this network namespace"), "{e}");
    }
}

#[test]
fn a_wrong_command_line_is_exit_code_2() {
    let bed = Bed::without_daemon();
    for line in [
        "",
        "nonsense",
        "p",
        "flush",
        "flush --all --port eth0",
        "port add",
        "port add a/b",
        "port add eth0 --offload maybe",
        "explain",
        "explain tcp 10.0.0.1:1",
        "explain icmp 10.0.0.1:1 10.0.0.2:2",
        "conn show --zone 70000",
        "conn show --count --limit 3",
        "-jp conn show -o",
        "-j stats --openmetrics",
        "-p stats",
    ] {
        let out = bed.run(line);
        assert_eq!(out.status.code(), Some(2), "`{line}`: {}", text(&out.stderr));
        assert!(out.stdout.is_empty() && !out.stderr.is_empty(), "`{line}`");
    }
}

#[test]
fn help_tells_the_exit_codes_and_is_no_failure() {
    let bed = Bed::without_daemon();
    let help = bed.ok("--help");
    for line in ["3  the daemon is not running", "7  not supported", "explain"] {
        assert!(help.contains(line), "{help}");
    }
    assert!(bed.ok("flush --help").contains("ctoffload flush --port eth0"));
    assert!(!help.contains('\x1b'), "no colour into a pipe");
}

#[test]
fn ports_are_a_table_and_one_port_is_told_in_full() {
    let bed = Bed::new();
    let table = bed.ok("port show");
    let lines: Vec<_> = table.lines().collect();
    assert!(lines[0].starts_with("PORT   IFINDEX  STATE"), "{table}");
    assert_eq!(
        lines[1],
        "eth0         3  bound    tc-flower  both          1200   1188        2        12"
    );
    for told in [
        "eth0: in front of its rules: matchall at prio 10 (all): mirred",
        "wwan0: tc-flower declined: the kernel has no cls_flower",
    ] {
        assert!(lines[3..].iter().any(|line| line.starts_with(told)), "{table}");
    }
    let one = bed.ok("port show eth0");
    assert!(one.contains("1200 installed (1188 in hardware), 2 pending, 12 rejected"), "{one}");
    assert!(one.contains("table-full 10, busy 4"), "{one}");
    assert_eq!(bed.ok("po"), table, "abbreviated, and `show` by itself");
}

#[test]
fn changes_end_with_the_right_exit_codes() {
    let bed = Bed::new();
    let added = bed.ok("port add eth7 --provider tc-flower --offload skip-sw");
    assert!(added.starts_with("eth7 is a port, bound to tc-flower"), "{added}");
    assert_eq!(bed.ok("port del eth0"), "eth0 is no port any more\n");
    let e = bed.fails("port add eth0", 6);
    assert_eq!(e, "ctoffload: port add eth0: bound to tc-flower already");
    assert_eq!(bed.fails("port add lo", 7), "ctoffload: port add lo: not an Ethernet netdev");
    bed.fails("port add nosuch", 5);
    bed.fails("port add eth8 --provider nonsense", 2);
    bed.fails("port del eth9", 5);
    bed.fails("port show eth9", 5);
    bed.fails("conn show --port wwan0", 5);
    bed.fails("conn show tcp 10.0.0.1:1 10.0.0.2:2", 5);
}

#[test]
fn connections_show_their_slots() {
    let bed = Bed::new();
    let out = bed.ok("conn show");
    let want = "\
tcp 10.0.0.1:1234 > 10.9.0.2:80  nat, reply tcp 10.9.0.2:80 > 192.0.2.1:61000  age 12.3s  idle 1.5s
    eth0        original  installed  -> eth1 (eth1.20) 02:00:00:00:00:01  nat  hardware  321 packets 45.6 kB, idle 1.5s
    eth1 (br0)  reply     rejected                                                       table-full: No space left on device, retry in 1.2s
";
    assert_eq!(out, want, "\n{out}");
    let many = bed.json("conn show --zone 9");
    assert_eq!(many.as_array().unwrap().len(), 3000);
    let one = bed.ok("conn show tcp 10.9.0.2:80 192.0.2.1:61000");
    assert_eq!(one, out, "by its reply tuple");
}

#[test]
fn explain_tells_why_and_what_to_do() {
    let bed = Bed::new();
    let out = text(&bed.run("explain tcp 10.0.0.1:1234 > 10.9.0.2:80").stdout).to_owned();
    for part in [
        "offloaded in one direction: original on eth0; not the reply direction: table-full on eth1.\n    what to do  raise the NIC's flow table limit\n",
        "zone 0: known for 12.3s, last packet 1.5s ago",
        "NAT: replies arrive as tcp 10.9.0.2:80 > 192.0.2.1:61000.",
        "eth0, original direction: offloaded.",
        "installed, in hardware",
        "eth1 (ifindex 4), below eth1.20, VLAN 20, next hop 02:00:00:00:00:01",
        "br0, above eth1",
        "eth1, reply direction: not offloaded",
        "table-full: The backend's table is full.",
        "\"No space left on device\"",
        "in 1.2s",
    ] {
        assert!(out.contains(part), "{part}:\n{out}");
    }
    assert!(!out.contains("wwan0"), "it has nothing to do with it:\n{out}");
    let part = "wwan0, reply direction: no packet of this direction has been seen here.";
    let all = bed.run("explain -v tcp 10.0.0.1:1234 > 10.9.0.2:80");
    assert!(text(&all.stdout).contains(part), "{}", text(&all.stdout));
    for (sport, status, sentence) in [
        (1234, 10, "offloaded in one direction"),
        (1, 5, "not offloaded: there is no such connection.\n"),
        (2, 11, "not offloaded: it is closing.\n"),
        (3, 0, "offloaded in both directions.\n"),
    ] {
        let out = bed.run(&format!("explain tcp 10.0.0.1:{sport} > 10.9.0.2:80"));
        assert_eq!(out.status.code(), Some(status), "{}", text(&out.stdout));
        assert!(text(&out.stdout).starts_with(sentence), "{}", text(&out.stdout));
    }
}

#[test]
fn what_offloaded_packets_skip_is_told_by_kind_with_where_it_stands() {
    let bed = Bed::new();
    let out = bed.run("lint");
    assert_eq!(out.status.code(), Some(12));
    let out = text(&out.stdout);
    let first = "limit: words about limit\n    table inet fw chain forward handle 7\n  what can be done: advice about limit\n\ncounter: ";
    assert!(out.starts_with(first), "{out}");
    assert!(out.contains("handle 1004\n    and 4316 more (-v: all)\n"), "{out}");
    let out = text(&bed.run("lint -v").stdout);
    assert!(out.contains("handle 1006\n    and 4314 more\n"), "{out}");
}

#[test]
fn a_flush_tells_how_many() {
    let bed = Bed::new();
    assert_eq!(bed.ok("flush --all"), "1200 rules removed\n    eth0  1200\n");
    assert_eq!(
        bed.ok("flush tcp,10.0.0.1:1234,10.9.0.2:80").lines().next(),
        Some("1 rule removed")
    );
    let json = bed.json("flush --port eth0");
    assert_eq!(json, serde_json::json!({"count": 1, "ports": [{"port": "eth0", "count": 1}]}));
}

#[test]
fn a_reconciliation_tells_what_was_done_on_each_port() {
    let bed = Bed::new();
    let out = bed.ok("reconcile");
    assert_eq!(
        out,
        "PORT   ADOPTED  REMOVED  FOREIGN\neth0        12        3        1\nwwan0       12        3        1\n"
    );
    assert_eq!(bed.json("reconcile --port eth0")[0]["adopted"], 12);
    let failed = bed.run("reconcile --port wwan0");
    assert_eq!(failed.status.code(), Some(1));
    assert!(
        text(&failed.stdout).contains("wwan0: reading what stands"),
        "{}",
        text(&failed.stdout)
    );
    assert_eq!(bed.run("reconcile --port nosuch").status.code(), Some(5));
}

#[test]
fn reload_tells_what_was_changed_and_what_not() {
    let bed = Bed::new();
    let out = bed.ok("reload");
    assert!(out.starts_with("/etc/x.toml was read anew\n"), "{out}");
    for words in
        ["left as they were: [sight] ledger-size, [limits] queue", "[[port]] holds", "12 rules"]
    {
        assert!(out.contains(words), "{words}: {out}");
    }
    assert_eq!(bed.json("reload")["kept"][1], "[limits] queue");
}

/// All of it, by name.
#[test]
fn a_filter_reaches_the_daemon() {
    let bed = Bed::new();
    let e = bed.fails(
        "conn show --provider ebpf --port eth0 --zone 3 --proto udp --src 10.0.0.0/8 --dst 2001:db8::1 --sport 7 \
         --dport 1000-2000 --state rejected --reason table-full --egress eth1 --nat snat --idle 30 --bytes 1000 \
         --sort idle --limit 10",
        2,
    );
    let want = "ConnFilter { port: Some(\"eth0\"), zone: Some(3), tuple: None, proto: Some(Udp), src: Some(10.0.0.0/8), \
                dst: Some(2001:db8::1/128), sport: Some(PortRange { from: 7, to: 7 }), \
                dport: Some(PortRange { from: 1000, to: 2000 }), state: Some(\"rejected\"), \
                reason: Some(\"table-full\"), provider: Some(\"ebpf\"), egress: Some(\"eth1\"), nat: Some(Snat), \
                idle_ms: Some(30000), bytes: Some(1000), sort: Some(Idle), limit: Some(10), count: false }";
    assert_eq!(e, format!("ctoffload: conn show: {want}"));
    assert_eq!(bed.ok("conn show --count --state rejected"), "1234\n");
    assert_eq!(bed.json("conn show --count"), serde_json::json!({"count": 1234}));
}

#[test]
fn a_wrong_value_of_a_filter_is_named_and_so_is_what_comes_near() {
    let bed = Bed::without_daemon();
    for (line, told) in [
        ("--proto icmp", &["'icmp'", "--proto", "tcp, udp"][..]),
        ("--src 10.0.0.300", &["'10.0.0.300'", "--src", "an address, or ADDRESS/LENGTH"]),
        ("--dst 10.0.0.0/33", &["'10.0.0.0/33'", "--dst", "an address, or ADDRESS/LENGTH"]),
        ("--sport 70000", &["'70000'", "--sport", "a number from 0 to 65535"]),
        ("--dport 20-10", &["'20-10'", "--dport", "the first port is above the last"]),
        ("--state gone", &["'gone'", "--state", "pending, installed, deleting, rejected"]),
        ("--reason table-ful", &["'table-ful'", "--reason", "'table-full'"]),
        ("--port a/b", &["'a/b'", "--port"]),
        ("--egress a/b", &["'a/b'", "--egress"]),
        ("--zone x", &["'x'", "--zone"]),
        ("--nat both", &["'both'", "--nat", "snat, dnat, any, none"]),
        ("--idle 1m", &["'1m'", "--idle"]),
        ("--bytes -1", &["'-1'"]),
        ("--sort size", &["'size'", "--sort", "bytes"]),
        ("--limit many", &["'many'", "--limit"]),
    ] {
        let out = bed.run(&format!("conn show {line}"));
        let e = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "`{line}`: {e}");
        assert!(told.iter().all(|part| e.contains(part)), "`{line}`: {e}");
    }
    let help = bed.ok("conn show --help");
    for option in "port zone proto src dst sport dport state reason provider egress nat idle bytes sort limit count oneline".split(' ') {
        assert!(help.contains(&format!("--{option}")), "{option}: {help}");
    }
}

#[test]
fn lists_are_an_array_or_lines_and_nothing_is_told_where_nobody_parses_it() {
    let bed = Bed::new();
    let array = bed.json("conn show --zone 9");
    let lines = bed.ok("-j conn show -o --zone 9");
    let lines: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(Value::from(lines), array);
    let one = bed.ok("conn show --oneline");
    assert_eq!(one.trim_end().replace('\\', "\n"), bed.ok("conn show").trim_end());
    assert_eq!(one.lines().count(), 1);
    // Nothing: an empty array, no line, and to people a word.
    assert_eq!(bed.ok("-j conn show --zone 8"), "[]\n");
    assert_eq!(bed.ok("-jp conn show --zone 8"), "[]\n");
    assert_eq!(bed.ok("-j conn show -o --zone 8"), "");
    let out = bed.run("conn show --zone 8");
    assert_eq!((out.status.code(), text(&out.stdout)), (Some(0), String::new()));
    assert_eq!(text(&out.stderr), "ctoffload: conn show: there is no connection that fits\n");
}

/// The daemon goes on searching; what it has found is there, and whoever has seen enough is rid of it.
#[test]
fn connections_are_printed_as_they_are_found() {
    let bed = Bed::new();
    for line in ["conn show --zone 7", "-j conn show --zone 7"] {
        let mut child = bed.command(line).stdout(Stdio::piped()).spawn().unwrap();
        let mut first = [0; 4];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
        assert!(first == *b"tcp " || first == *b"[{\"e", "{first:?}");
        assert!(child.try_wait().unwrap().is_none(), "it goes on");
        assert!(bed.ok("stats").contains("deadbeef"), "and nobody waits for it");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

/// Prometheus' own parser of the format: each family with its type and unit, and its samples.
const PARSE: &str = "
import json, sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse
out = [{'name': f.name, 'type': f.type, 'unit': f.unit, 'help': f.documentation,
        'samples': [[s.name, s.labels, s.value] for s in f.samples]} for f in parse(sys.stdin.read())]
json.dump(out, sys.stdout)
";

/// It stands beside what is told without it: every number of `stats` and of `port show`.
#[test]
fn metrics_are_what_prometheus_reads_and_count_what_stats_and_ports_do() {
    let bed = Bed::new();
    let metrics = bed.ok("stats --openmetrics");
    let mut python = Command::new("/usr/bin/python3")
        .args(["-c", PARSE])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut python.stdin.take().unwrap(), metrics.as_bytes()).unwrap();
    let parsed = python.wait_with_output().unwrap();
    let e = text(&parsed.stderr);
    assert!(
        parsed.status.success(),
        "(this needs Debian's python3-prometheus-client)\n{e}\n{metrics}"
    );
    let families: Vec<Value> = serde_json::from_slice(&parsed.stdout).unwrap();
    let mut samples = std::collections::BTreeMap::new();
    for family in &families {
        let (name, unit) = (family["name"].as_str().unwrap(), family["unit"].as_str().unwrap());
        assert!(
            name.starts_with("ctoffload_") && !family["help"].as_str().unwrap().is_empty(),
            "{family}"
        );
        let has_unit = name.ends_with("_seconds") || name.ends_with("_bytes");
        assert_eq!(has_unit, !unit.is_empty(), "{family}");
        for sample in family["samples"].as_array().unwrap() {
            let labels = sample[1].as_object().unwrap();
            let known = [
                "netdev",
                "provider",
                "reason",
                "state",
                "op",
                "le",
                "instance",
                "ctoffload_port_state",
            ];
            assert!(labels.keys().all(|l| known.contains(&l.as_str())), "{sample}");
            let labels: Vec<_> =
                labels.iter().map(|(k, v)| format!("{k}={}", v.as_str().unwrap())).collect();
            let key = format!("{} {}", &sample[0].as_str().unwrap()[10..], labels.join(" "));
            assert!(
                samples.insert(key.trim_end().to_owned(), sample[2].as_f64().unwrap()).is_none(),
                "twice: {sample}"
            );
        }
    }
    let mut expect = |key: String, value: &Value, per: f64| {
        let got = samples.remove(&key).unwrap_or_else(|| panic!("{key} is not in {metrics}"));
        let value = value.as_bool().map(f64::from).or(value.as_f64()).unwrap();
        assert!((got - value / per).abs() < 1e-9, "{key}: {got} is not {value}");
    };
    let stats = bed.json("stats");
    expect("daemon_info instance=deadbeef".into(), &1.into(), 1.0);
    for (metric, field, per) in [
        ("uptime_seconds", "uptime_ms", 1000.0),
        ("connections", "connections", 1.0),
        ("slots state=installed", "slots_installed", 1.0),
        ("slots state=pending", "slots_pending", 1.0),
        ("slots state=rejected", "slots_rejected", 1.0),
        ("sights_total", "sights", 1.0),
        ("sights_lost_total", "sights_lost", 1.0),
        ("ledger_elements", "ledger_elements", 1.0),
        ("ledger_size", "ledger_size", 1.0),
        ("conntrack_events_total", "conntrack_events", 1.0),
        ("conntrack_events_lost_total", "conntrack_lost", 1.0),
        ("sweeps_total", "sweeps", 1.0),
        ("last_sweep_seconds", "last_sweep_ms", 1000.0),
        ("sweep_pause_seconds", "sweep_pause_ms", 1000.0),
        ("rules_added_total", "adds", 1.0),
        ("rules_deleted_total", "deletes", 1.0),
        ("rules_flushed_total", "flushed", 1.0),
    ] {
        expect(metric.into(), &stats[field], per);
    }
    for reason in Reason::ALL {
        let counted =
            stats["reasons"].as_array().unwrap().iter().find(|r| r["reason"] == reason.name());
        let count = counted.map_or(&Value::Null, |r| &r["count"]);
        let zero = Value::from(0);
        expect(
            format!("rejections_total reason={reason}"),
            if count.is_null() { &zero } else { count },
            1.0,
        );
    }
    for port in bed.json("port show").as_array().unwrap() {
        let of = format!(
            "netdev={} provider={}",
            port["name"].as_str().unwrap(),
            port["provider"].as_str().unwrap_or("none")
        );
        for (metric, field) in [
            ("port_rules_in_hardware", "in_hw"),
            ("port_rules_capacity", "capacity"),
            ("port_capacity_learnt", "capacity_learnt"),
            ("port_rules_undeleted", "undeleted"),
            ("port_evictions_total", "evictions"),
            ("port_sights_total", "sights"),
            ("port_rules_added_total", "adds"),
            ("port_rules_deleted_total", "deletes"),
            ("port_rules_flushed_total", "flushed"),
            ("port_forwarded_packets_total", "packets"),
            ("port_forwarded_bytes_total", "bytes"),
        ] {
            expect(format!("{metric} {of}"), &port[field], 1.0);
        }
        for (metric, field) in [("port_refusals", "refusals"), ("port_others_in_front", "in_front")]
        {
            expect(format!("{metric} {of}"), &port[field].as_array().unwrap().len().into(), 1.0);
        }
        for state in ["installed", "pending", "rejected"] {
            expect(format!("port_slots {of} state={state}"), &port[state], 1.0);
        }
        for state in ["bound", "unbound", "draining", "slow", "faulty"] {
            let is = port["state"] == state;
            expect(format!("port_state ctoffload_port_state={state} {of}"), &is.into(), 1.0);
        }
        for r in port["reasons"].as_array().unwrap() {
            expect(
                format!("port_rejections_total {of} reason={}", r["reason"].as_str().unwrap()),
                &r["count"],
                1.0,
            );
        }
        for op in ["add", "delete"] {
            let mut below = 0;
            for n in 0..=23 {
                let bound = 1u64 << n;
                let timed = port["latency"].as_array().unwrap().iter().filter(|b| b["op"] == op);
                below = timed
                    .filter(|b| n == 23 || b["below_us"].as_u64().is_some_and(|us| us <= bound))
                    .map(|b| b["count"].as_u64().unwrap())
                    .sum();
                let le = if n == 23 {
                    "+Inf".to_owned()
                } else {
                    format!("{}.{:06}", bound / 1_000_000, bound % 1_000_000)
                };
                let (netdev, rest) = of.split_once(' ').unwrap();
                expect(
                    format!(
                        "port_operation_duration_seconds_bucket le={le} {netdev} op={op} {rest}"
                    ),
                    &below.into(),
                    1.0,
                );
            }
            assert!(op == "delete" || below > 0);
        }
    }
    assert!(samples.is_empty(), "nobody asked for {samples:?}");
}

/// Every name and number of the JSON is in the text too (times are there in other words, and the
/// instance as the cookies have it).
#[test]
fn json_and_text_tell_the_same_facts() {
    fn leaves(key: &str, value: &Value, out: &mut Vec<String>) {
        match value {
            // In the text that is a sentence.
            Value::String(_) if key == "offloaded" => {}
            Value::Object(o) => o.iter().for_each(|(k, v)| leaves(k, v, out)),
            Value::Array(a) => a.iter().for_each(|v| leaves(key, v, out)),
            Value::String(s) => out.push(s.clone()),
            Value::Number(n) if !key.ends_with("_ms") && key != "instance" => {
                out.push(n.to_string())
            }
            _ => {}
        }
    }
    let bed = Bed::new();
    for line in [
        "port show",
        "port show eth0",
        "conn show",
        "conn show --count",
        "provider show",
        "stats",
        "flush --all",
        "reconcile",
        "reload",
        "explain tcp 10.0.0.1:1234 10.9.0.2:80",
        "lint",
        "port add eth7 --provider tc-flower --offload skip-sw",
    ] {
        // How far a connection is offloaded is in the exit code as well, and whether packets skip what decides.
        let code = match line.split(' ').next() {
            Some("explain") => 10,
            Some("lint") => 12,
            _ => 0,
        };
        let said = |line: &str| {
            let out = bed.run(line);
            assert_eq!(out.status.code(), Some(code), "`{line}`: {}", text(&out.stderr));
            text(&out.stdout)
        };
        let human = said(&format!("-s {line}{}", if code > 0 { " -v" } else { "" }));
        let json: Value = serde_json::from_str(&said(&format!("-j {line}"))).unwrap();
        let mut facts = Vec::new();
        leaves("", &json, &mut facts);
        assert!(!facts.is_empty());
        for fact in facts {
            assert!(human.contains(&fact), "`{line}`: {fact} is not in\n{human}");
        }
        let pretty = said(&format!("-jp {line}"));
        assert!(pretty.lines().count() > 1);
        assert_eq!(serde_json::from_str::<Value>(&pretty).unwrap(), json);
    }
    assert!(bed.ok("stats").contains("deadbeef"));
    let tuple = &bed.json("conn show")[0]["original"];
    assert_eq!(
        *tuple,
        serde_json::json!({"proto": "tcp", "src": "10.0.0.1", "sport": 1234, "dst": "10.9.0.2", "dport": 80})
    );
}

#[test]
fn a_reader_that_goes_is_no_failure() {
    let bed = Bed::new();
    let mut child = bed
        .command("conn show --zone 9")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
    assert!(first.starts_with("tcp "));
    let out = child.wait_with_output().unwrap();
    assert_eq!((out.status.code(), text(&out.stderr)), (Some(0), String::new()));
}

#[test]
fn an_answer_of_another_user_is_not_believed() {
    let bed = Bed::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ctoffload"));
    let other = geteuid().as_raw() + 1;
    let (port_id, other) = (bed.port_id.to_string(), other.to_string());
    command.args(["stats", "--port-id", &port_id, "--daemon-uid", &other]);
    let e = fails(&command.output().unwrap(), "stats", 1);
    assert!(e.contains("answers in the daemon's place"), "{e}");
}

#[test]
fn events_are_printed_as_they_come() {
    let bed = Bed::new();
    if !geteuid().is_root() {
        // The kernel keeps multicasts for CAP_NET_ADMIN, and that is what is said.
        let e = bed.fails("monitor", 4);
        assert!(e.contains("CAP_NET_ADMIN"), "{e}");
        return;
    }
    for (line, want) in [
        (
            "monitor",
            "rejected eth1 reply tcp 10.0.0.1:1234 > 10.9.0.2:80 table-full (No space left)",
        ),
        ("-j monitor", "{\"kind\":\"rejected\",\"port\":\"eth1\""),
    ] {
        let mut child = bed.command(line).stdout(Stdio::piped()).spawn().unwrap();
        let publisher = bed.publisher.clone().unwrap();
        let done = Arc::new(AtomicBool::new(false));
        let publishing = std::thread::spawn({
            let done = Arc::clone(&done);
            move || {
                while !done.load(Ordering::Relaxed) {
                    publisher.publish(Event {
                        kind: EventKind::Rejected,
                        port: Some("eth1".into()),
                        tuple: Some(tuple()),
                        direction: Some(Direction::Reply),
                        reason: Some("table-full".into()),
                        detail: Some("No space left".into()),
                        ..Event::default()
                    });
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        });
        let mut first = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
        done.store(true, Ordering::Relaxed);
        child.kill().unwrap();
        child.wait().unwrap();
        publishing.join().unwrap();
        assert!(first.starts_with(want), "{first}");
    }
}

/// A program, where another user can run it.
fn copy_for_others(program: &Path) -> (String, impl Drop) {
    struct Remove(std::path::PathBuf);
    impl Drop for Remove {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("ctoffload-cli-{}-{n}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o755)).unwrap();
    let to = dir.join("ctoffload");
    // By another process: a copy of our own would be open for writing in whatever the other tests
    // fork meanwhile, and then cannot be run (ETXTBSY).
    assert!(Command::new("cp").args([program, &to]).status().unwrap().success());
    (to.display().to_string(), Remove(dir))
}

fn needs_root() {
    assert!(geteuid().is_root(), "this test changes users: run it as root");
}

#[test]
fn other_users_may_do_nothing() {
    needs_root();
    let bed = Bed::new();
    let (program, _remove) = copy_for_others(Path::new(env!("CARGO_BIN_EXE_ctoffload")));
    for line in ["stats", "conn show", "flush --all", "port del eth0", "monitor"] {
        let out = bed.command_of(&program, line).uid(54321).gid(54321).output().unwrap();
        let e = fails(&out, line, 4);
        assert!(e.contains("only"), "{e}");
    }
}

#[test]
fn the_group_may_read_and_change_nothing() {
    needs_root();
    let bed = Bed::new();
    let (program, _remove) = copy_for_others(Path::new(env!("CARGO_BIN_EXE_ctoffload")));
    let run = |line: &str| bed.command_of(&program, line).uid(54321).gid(READERS).output().unwrap();
    for line in ["stats", "conn show", "port show", "explain tcp 10.0.0.1:3 10.9.0.2:80"] {
        let out = run(line);
        assert!(out.status.success(), "`{line}`: {}", text(&out.stderr));
    }
    assert_eq!(run("lint").status.code(), Some(12));
    for line in ["flush --all", "port add eth7", "port del eth0"] {
        let e = fails(&run(line), line, 4);
        assert!(e.ends_with("only root may change anything"), "{e}");
    }
}

/// Whoever holds the daemon's port id without being root, while this is done.
fn with_squatter(then: impl FnOnce()) {
    let this = std::env::current_exe().unwrap();
    let (program, _remove) = copy_for_others(&this);
    let mut squatter = Command::new(program)
        .args(["--exact", "squatter", "--ignored", "--nocapture"])
        .uid(54321)
        .gid(54321)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Kept open: the test harness in there has more to say at the end.
    let mut said = BufReader::new(squatter.stdout.take().unwrap()).lines();
    assert!(said.by_ref().map_while(Result::ok).any(|line| line.contains("squatting")));
    then();
    drop(squatter.stdin.take());
    assert!(squatter.wait().unwrap().success());
}

#[test]
fn a_squatter_is_not_believed() {
    needs_root();
    let bed = Bed::without_daemon();
    with_squatter(|| {
        let e = bed.fails("stats", 1);
        assert!(e.contains("of uid 54321 answers in the daemon's place: expected uid 0"), "{e}");
    });
}

#[test]
fn a_squatter_keeps_no_daemon_away_and_nobody_from_finding_it() {
    needs_root();
    let mut bed = Bed::without_daemon();
    with_squatter(|| {
        bed.serve();
        assert!(bed.ok("stats").contains("deadbeef"));
        assert_eq!(bed.ok("port del eth0"), "eth0 is no port any more\n");
        let second = Server::bind(Access::default()).map(|_| ());
        assert!(matches!(second, Err(ServerError::AlreadyRunning { .. })), "{second:?}");
        // Events too come from where the daemon is.
        let target = Target { patience: Duration::from_secs(60), ..Target::default() };
        let mut events = Subscription::open(target).unwrap();
        bed.publisher.as_ref().unwrap().publish(Event::default());
        assert!(events.next(Duration::from_secs(60)).unwrap().is_some());
    });
    assert!(bed.ok("stats").contains("deadbeef"), "the known port id is nobody's now");
    let second = Server::bind(Access::default()).map(|_| ());
    assert!(matches!(second, Err(ServerError::AlreadyRunning { .. })), "{second:?}");
}

#[test]
#[ignore = "the other process of the tests with a squatter, which run it"]
fn squatter() {
    let server = Server::bind(Access::default()).unwrap();
    let (gone, waker) = (AtomicBool::new(false), server.waker());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = std::io::stdin().read_line(&mut String::new());
            gone.store(true, Ordering::Relaxed);
            waker.wake();
        });
        println!("squatting");
        server.run(&Fake, || gone.load(Ordering::Relaxed)).unwrap();
    });
}
