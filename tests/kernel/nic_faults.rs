//! The daemon on a router whose netdevs are ports of a NIC that offloads (`tests/simnic`), and what
//! becomes of connections when the NIC is not what it should be. They need the machine of
//! `scripts/lab --nic`.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::router::{BOTH, Connection, Router};
use crate::wait::wait_until;

const PORTS: [&str; 2] = ["lan", "wan"];

/// A router with the daemon on it.
struct Hardware {
    router: Router,
}

impl Hardware {
    /// Its ports are to be used in this way (`offload` in the configuration), after the knobs of the
    /// NIC were set.
    fn start(test: &str, offload: &str, knobs: &[(&str, &str)]) -> Self {
        Self::without_daemon(test, knobs).daemon(offload)
    }

    fn without_daemon(test: &str, knobs: &[(&str, &str)]) -> Self {
        assert!(std::env::var_os("CTOFFLOAD_SIMNIC").is_some(), "this needs scripts/lab --nic");
        let hardware = Self { router: Router::of(test, "simnic") };
        hardware.router.run(
            "nft 'add table inet count; add counter inet count seen; add chain inet count host { type filter hook prerouting priority raw; }; add rule inet count host meta l4proto { tcp, udp } counter name seen'",
        );
        for (knob, value) in knobs {
            PORTS.iter().for_each(|port| hardware.set(port, knob, value));
        }
        hardware
    }

    fn daemon(mut self, offload: &str) -> Self {
        self.router.start_with(&format!(
            "[usage]\nsweep-seconds = 1\nsweep-max-seconds = 1\n[[port]]\nmatch = \"?an\"\noffload = \"{offload}\"\n"
        ));
        wait_until("the ports are there", || self.ports().len() == PORTS.len());
        self
    }

    fn ports(&self) -> Vec<Value> {
        self.router.ports()
    }

    fn port(&self, name: &str) -> Value {
        self.router.port(name)
    }

    /// Rejections on a port for this reason, so far.
    fn rejections(&self, port: &str, reason: &str) -> u64 {
        let port = self.port(port);
        let reasons = port["reasons"].as_array().cloned().unwrap_or_default();
        let found = reasons.iter().find(|r| r["reason"] == reason);
        found.and_then(|r| r["count"].as_u64()).unwrap_or(0)
    }

    /// Those of the first connection.
    fn slots(&self) -> Vec<Value> {
        self.router.conns()[0]["slots"].as_array().cloned().unwrap_or_default()
    }

    fn slot(&self, port: &str) -> Value {
        self.slots().into_iter().find(|s| s["port"] == port).unwrap_or_default()
    }

    /// Of the one connection that there is: ports with a rule that the NIC is said to have.
    fn in_hardware(&self) -> Vec<String> {
        let mut slots = self.slots();
        slots.retain(|s| s["state"] == "installed" && s["in_hw"] == true);
        slots.iter().filter_map(|s| s["port"].as_str().map(str::to_owned)).collect()
    }

    fn knob(&self, port: &str, knob: &str) -> PathBuf {
        let links: Value =
            serde_json::from_str(&self.router.run(&format!("ip -d -j link show {port}")))
                .expect("JSON");
        let dir = links[0]["phys_port_name"].as_str().expect("a port of the NIC").to_owned();
        ["/sys/kernel/debug/simnic", &dir, knob].iter().collect()
    }

    fn set(&self, port: &str, knob: &str, value: &str) {
        std::fs::write(self.knob(port, knob), value).expect("a knob");
    }

    fn read(&self, port: &str, knob: &str) -> String {
        std::fs::read_to_string(self.knob(port, knob)).expect("a knob")
    }

    /// How many rules of a port are in this state, guards and all.
    fn rules(&self, port: &str, state: &str) -> usize {
        let rules = self.read(port, "rules");
        rules.lines().filter(|l| l.split_whitespace().any(|w| w == state)).count()
    }

    /// TCP and UDP packets that the host has seen of the test.
    fn host_packets(&self) -> u64 {
        let listed = self.router.run("nft list counter inet count seen");
        let words: Vec<_> = listed.split_whitespace().collect();
        let at = words.iter().position(|w| *w == "packets").expect("a counter");
        words[at + 1].parse().expect("a number")
    }

    /// Whether the host sees nothing of ten round trips of each. Some rules are taken back now and then,
    /// on purpose, and are there again at the next packet: this is to be waited for.
    fn passes_the_host_by(&self, connections: &mut [Connection]) -> bool {
        let before = self.host_packets();
        for _ in 0..10 {
            connections.iter_mut().for_each(Connection::ping);
        }
        self.host_packets() == before
    }

    /// Both directions go by the NIC, which is said to have them. (What is read back of a rule for both
    /// is read by the sweep.)
    fn wait_in_hardware(&self, c: &mut Connection) {
        wait_until("the host sees nothing of it, and the NIC is said to have it", || {
            self.passes_the_host_by(std::slice::from_mut(c)) && self.in_hardware() == PORTS
        });
    }
}

#[test]
fn hardware_that_was_reset_gets_its_rules_again_guards_and_all() {
    let h = Hardware::start("reset", "skip-sw", &[]);
    let mut c = h.router.connect();
    h.wait_in_hardware(&mut c);
    let there = PORTS.map(|port| h.rules(port, "active"));
    assert_eq!(there, [5, 5], "a flow, and four guards");
    for port in PORTS {
        h.set(port, "reset", "1");
        assert_eq!((h.rules(port, "active"), h.rules(port, "lost")), (0, 5));
    }
    assert_eq!(h.router.rules("lan"), 1 + 4, "tc goes on showing them");
    wait_until("the rules are in the NIC again", || {
        c.ping();
        PORTS.iter().all(|port| h.rules(port, "active") == 5 && h.rules(port, "lost") == 0)
    });
    h.wait_in_hardware(&mut c);
    for port in PORTS {
        assert_eq!(h.rejections(port, "no-effect"), 1, "{}", h.port(port));
    }
}

/// Of all ports, those of other tests too.
fn reload_the_nic() {
    let reload = ["--net=/proc/1/ns/net", "devlink", "dev", "reload", "platform/simnic"];
    let told = Command::new("nsenter").args(reload).args(["action", "fw_activate"]).output();
    let told = told.expect("nsenter, of util-linux, and devlink, of iproute2");
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
}

/// As the reset does, and the links go down meanwhile, by which rules are taken back before anybody sees that they
/// do nothing.
#[test]
fn alone_a_nic_that_was_reloaded_gets_its_rules_again_guards_and_all() {
    let h = Hardware::start("reload", "skip-sw", &[]);
    let mut c = h.router.connect();
    for _ in 0..3 {
        h.wait_in_hardware(&mut c);
        reload_the_nic();
        wait_until("the guards are in the NIC again, before any packet", || {
            PORTS.iter().all(|port| h.rules(port, "active") >= 4)
        });
        wait_until("a flow and four guards are in the NIC again", || {
            c.ping();
            PORTS.iter().all(|port| h.rules(port, "active") == 5 && h.rules(port, "lost") == 0)
        });
    }
    h.wait_in_hardware(&mut c);
}

#[test]
fn a_rule_that_the_nic_accepts_and_does_not_act_on_is_found_out() {
    let h = Hardware::start("silent", "skip-sw", &[("silent", "1")]);
    let mut c = h.router.connect();
    wait_until("it was found twice, and is left alone for a while", || {
        c.ping();
        h.rejections("lan", "no-effect") >= 2 && h.slot("lan")["state"] == "rejected"
    });
    let slot = h.slot("lan");
    assert_eq!(slot["reason"], "no-effect", "{slot}");
    let detail = slot["detail"].as_str().expect("a detail");
    assert!(detail.contains("the counters of the rule stood still"), "{detail}");
    PORTS.iter().for_each(|port| h.set(port, "silent", "0"));
    h.wait_in_hardware(&mut c);
}

#[test]
fn a_rule_that_works_is_not_doubted_because_its_counters_stand_still() {
    let h = Hardware::start("frozen", "skip-sw", &[("stats_frozen", "1")]);
    let mut c = h.router.connect();
    h.wait_in_hardware(&mut c);
    let sweeps = || h.router.stats()["sweeps"].as_u64().expect("a number");
    let (seen, until) = (h.host_packets(), sweeps() + 6);
    wait_until("some sweeps", || {
        c.ping();
        sweeps() >= until
    });
    assert_eq!(h.host_packets(), seen);
    assert_eq!(h.slot("lan")["packets"], 0);
    assert_eq!(h.rejections("lan", "no-effect") + h.rejections("wan", "no-effect"), 0);
}

#[test]
fn a_connection_in_use_does_not_expire_because_the_nic_says_nothing_of_it() {
    let h = Hardware::start("expiry", "skip-sw", &[("stats_frozen", "1")]);
    h.router.run("sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_established=10");
    let mut c = h.router.connect();
    h.wait_in_hardware(&mut c);
    let id = || {
        let entry = h.router.run("conntrack -L -p tcp --dport 5001 -o id 2>/dev/null");
        entry.split_whitespace().find(|w| w.starts_with("id=")).expect("an id").to_owned()
    };
    let (before, until) = (id(), Instant::now() + Duration::from_secs(24));
    while Instant::now() < until {
        c.ping();
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(id(), before, "it is the same entry, which has been kept alive");
    h.wait_in_hardware(&mut c);
}

#[test]
fn a_nic_that_fails_at_times_is_asked_again() {
    let h = Hardware::start("fails", "skip-sw", &[]);
    // EBUSY, twice; a delete that fails (the kernel does not tell); statistics that cannot be read.
    PORTS.iter().for_each(|port| h.set(port, "fail_insert", "1 16 2"));
    let mut c = h.router.connect();
    h.wait_in_hardware(&mut c);
    assert_eq!(h.rejections("lan", "busy"), 2, "{}", h.port("lan"));
    PORTS.iter().for_each(|port| h.set(port, "fail_delete", "1 5 0"));
    PORTS.iter().for_each(|port| h.set(port, "fail_stats", "1 5 0"));
    c.close();
    wait_until("the rules are gone", || h.router.installed().is_empty());
    let mut c = h.router.connect_to(5002);
    h.wait_in_hardware(&mut c);
    for port in PORTS {
        assert_eq!(h.port(port)["fault"], Value::Null);
        assert_eq!(h.rejections(port, "no-effect"), 0);
    }
}

/// EIO is no answer about the rule.
#[test]
fn a_nic_whose_device_fails_is_told_as_that_and_asked_again() {
    let h = Hardware::start("eio", "skip-sw", &[]);
    PORTS.iter().for_each(|port| h.set(port, "fail_insert", "1 5 0"));
    let mut c = h.router.connect();
    h.router.wait_refused(("lan", "original"), "device-error", "EIO", &mut c);
    PORTS.iter().for_each(|port| h.set(port, "fail_insert", "0"));
    h.wait_in_hardware(&mut c);
}

#[test]
fn what_a_nic_cannot_do_is_refused_in_its_words_or_done_in_software() {
    let cannot = [("unsupported", "act-csum")];
    let words = "simnic: updating checksums (csum) is not supported";
    let h = Hardware::start("cannot", "skip-sw", &cannot);
    let mut c = h.router.connect();
    wait_until("it is refused", || {
        c.ping();
        h.slot("lan")["state"] == "rejected"
    });
    let slot = h.slot("lan");
    assert_eq!(slot["reason"], "not-in-hardware");
    assert!(slot["detail"].to_string().contains(words), "{slot}");
    drop(h);

    let h = Hardware::start("canboth", "both", &cannot);
    let mut c = h.router.connect();
    h.router.wait_installed(&BOTH, &mut c);
    wait_until("it is read back that the NIC does not have it", || {
        c.ping();
        h.slot("lan")["in_hw"] == false
    });
    let port = h.port("lan");
    assert_eq!(port["in_hw"], 0);
    assert!(port["about"].to_string().contains(words), "{port}");
    assert!(h.slot("lan")["nic_said"].to_string().contains(words), "{}", h.slot("lan"));
    let rules = h.router.run("tc filter show dev lan ingress pref 49412");
    assert!(rules.contains("  not_in_hw") && rules.contains("  skip_hw"), "{rules}");
    wait_until("software rules forward it in front of the host's stack", || {
        h.passes_the_host_by(std::slice::from_mut(&mut c))
    });
}

#[test]
fn what_has_to_leave_through_the_stack_is_in_software_or_refused() {
    const SHAPER: &str = "root handle 1: tbf rate 1gbit burst 100k latency 50ms";
    let mut h = Hardware::start("leaves", "both", &[]);
    let mut c = h.router.connect();
    h.wait_in_hardware(&mut c);
    h.router.run(&format!("tc qdisc add dev wan {SHAPER}"));
    wait_until("what leaves there is in software, and nothing else", || {
        c.ping();
        h.router.installed() == BOTH && h.in_hardware() == ["wan"]
    });
    h.router.run("tc qdisc del dev wan root");
    h.wait_in_hardware(&mut c);
    assert_eq!(h.router.signal(Signal::SIGTERM), Some(0));
    h = h.daemon("skip-sw");
    h.wait_in_hardware(&mut c);
    h.router.run(&format!("tc qdisc add dev wan {SHAPER}"));
    h.router.wait_refused(("lan", "original"), "others-at-egress", "in the NIC only", &mut c);
    assert_eq!(h.in_hardware(), ["wan"]);
    h.router.run("tc qdisc del dev wan root");
    h.wait_in_hardware(&mut c);
}

#[test]
fn rules_of_a_port_for_both_are_in_the_nic_where_it_takes_them_and_nowhere_else() {
    let h = Hardware::start("both", "both", &[]);
    let mut c = h.router.connect();
    h.wait_in_hardware(&mut c);
    let rules = h.router.run("tc filter show dev lan ingress pref 49412");
    assert!(rules.contains("  in_hw ") && rules.contains("  skip_sw"), "{rules}");
    assert_eq!(h.port("lan")["in_hw"], 1);
    let told = String::from_utf8(h.router.cli(&["lint"]).stdout).expect("text");
    assert!(told.contains("in-hardware: ") && told.contains("    port lan\n"), "{told}");
}

#[test]
fn tags_are_changed_in_the_nic() {
    let h = Hardware::without_daemon("nicvlan", &[]);
    h.router.put_in_vlan("lan", 10);
    h.router.put_in_vlan("wan", 20);
    let h = h.daemon("skip-sw");
    let mut c = h.router.connect();
    h.wait_in_hardware(&mut c);
    let rules = h.router.run("tc filter show dev lan ingress");
    for part in ["vlan_id 10", "vlan  pop pipe", "vlan  push id 20", "  in_hw "] {
        assert!(rules.contains(part), "no {part} in {rules}");
    }
}

#[test]
fn a_nic_gets_tc_flower_without_a_list_while_it_carries_its_rules() {
    const PORT: &str = "[[port]]\nmatch = \"?an\"\n";
    let mut h = Hardware::without_daemon("default", &[]);
    let bound = |h: &Hardware| PORTS.map(|p| h.port(p)["provider"].clone());
    h.router.start_by_default(PORT);
    assert_eq!(bound(&h), ["tc-flower"; 2], "{}", h.port("lan"));
    assert!(h.port("lan")["chosen"].to_string().contains("the NIC carries"), "{}", h.port("lan"));
    let mut c = h.router.connect();
    h.wait_in_hardware(&mut c);
    // Its rules are adopted, and asked for again they are found there.
    h.router.signal(Signal::SIGKILL);
    let before = h.rules("lan", "active");
    h.router.start_by_default(PORT);
    assert_eq!(bound(&h), ["tc-flower"; 2], "{}", h.port("lan"));
    h.wait_in_hardware(&mut c);
    assert_eq!(h.rules("lan", "active"), before);
    assert_eq!(h.router.signal(Signal::SIGTERM), Some(0));
    let wants = |h: &mut Hardware, class: &str, words: &str| {
        h.router.start_by_default(PORT);
        assert_eq!(bound(h), [class; 2], "{}", h.port("lan"));
        let refused = h.port("lan")["refusals"].to_string();
        assert!(refused.contains(words), "no '{words}' in {refused}");
        // No trial has stayed there.
        assert_eq!(h.rules("lan", "active"), 0);
        assert_eq!(h.router.signal(Signal::SIGTERM), Some(0));
    };
    // A NIC that takes none of it, or only what is of no use, offloads by a flowtable alone.
    for (knob, words) in [
        ("match-ttl", "the NIC does not take the TTL guard"),
        ("act-redirect", "the NIC does not take a rule for a flow"),
    ] {
        PORTS.iter().for_each(|port| h.set(port, "unsupported", knob));
        wants(&mut h, "nf-flowtable", words);
        PORTS.iter().for_each(|port| h.set(port, "unsupported", ""));
    }
    // One that is switched off is a netdev like any other.
    h.router.run("ethtool -K lan hw-tc-offload off; ethtool -K wan hw-tc-offload off");
    wants(&mut h, "ebpf", "the NIC does not take the TTL guard");
}

#[test]
fn a_nic_that_cannot_guard_the_ttl_gets_no_rules() {
    let cannot = [("unsupported", "match-ttl")];
    let words = "simnic: match on the TTL (ip_ttl) is not supported";
    let h = Hardware::start("guard", "skip-sw", &cannot);
    let port = h.port("lan");
    assert_eq!(port["provider"], Value::Null);
    assert!(port["refusals"].to_string().contains(words), "{port}");
    drop(h);
    let h = Hardware::start("guardboth", "both", &cannot);
    assert!(h.port("lan")["about"].to_string().contains(words), "{}", h.port("lan"));
    let mut c = h.router.connect();
    h.router.wait_installed(&BOTH, &mut c);
    assert_eq!(h.slot("lan")["in_hw"], false);
}

#[test]
fn a_slow_nic_holds_nothing_up() {
    let h = Hardware::start("slow", "skip-sw", &[("insert_latency_us", "100000")]);
    let mut connections: Vec<_> = (5001..=5004).map(|port| h.router.connect_to(port)).collect();
    wait_until("all are in hardware", || {
        connections.iter_mut().for_each(Connection::ping);
        h.router.installed().len() == 8
    });
}

#[test]
fn a_cable_that_is_pulled_and_plugged_in_again() {
    let h = Hardware::start("flap", "skip-sw", &[]);
    let mut c = h.router.connect();
    h.wait_in_hardware(&mut c);
    h.set("wan", "link_flap_ms", "500");
    h.wait_in_hardware(&mut c);
}

#[test]
fn what_finds_the_table_full_is_carried_by_the_host_and_gets_its_place_when_others_leave() {
    // Room for the four guards and for two flows.
    let h = Hardware::start("full", "skip-sw", &[("capacity", "6")]);
    let mut connections: Vec<_> = (5001..=5004).map(|port| h.router.connect_to(port)).collect();
    let states = || {
        let slots = h.router.slots().into_iter().filter(|s| s.0 == "lan");
        let of = |state: &str, reason: &str| {
            slots.clone().filter(|s| s.2 == state && s.3 == reason).count()
        };
        (of("installed", ""), of("rejected", "table-full"))
    };
    let talk = |connections: &mut Vec<Connection>| {
        connections.iter_mut().for_each(Connection::ping);
        states()
    };
    wait_until("two are in hardware, and two are not", || talk(&mut connections) == (2, 2));
    assert_eq!(h.rules("lan", "active"), 6);
    wait_until("the NIC's words are kept for both that are not", || {
        connections.iter_mut().for_each(Connection::ping);
        let conns = h.router.conns();
        let slots = conns.as_array().into_iter().flatten().flat_map(|c| c["slots"].as_array());
        let refused = slots.flatten().filter(|s| s["port"] == "lan" && s["state"] == "rejected");
        let why = refused.filter_map(|s| s["detail"].as_str());
        why.filter(|why| why.contains("simnic: the flow table is full")).count() == 2
    });
    // Those that are in hardware leave.
    let conns = h.router.conns();
    let inside: Vec<u64> = conns
        .as_array()
        .expect("connections")
        .iter()
        .filter(|c| {
            let slots = c["slots"].as_array().cloned().unwrap_or_default();
            slots.iter().any(|s| s["port"] == "lan" && s["state"] == "installed")
        })
        .filter_map(|c| c["original"]["dport"].as_u64())
        .collect();
    let mut left = Vec::new();
    for (port, c) in (5001..).zip(connections) {
        if inside.contains(&port) { c.close() } else { left.push(c) }
    }
    wait_until("the others have their places", || talk(&mut left) == (2, 0));
    assert!(h.rejections("lan", "table-full") >= 2);
}

#[test]
fn what_finds_the_table_full_on_a_port_for_both_is_in_software() {
    let h = Hardware::start("fullboth", "both", &[("capacity", "5")]);
    let mut connections: Vec<_> = (5001..=5002).map(|port| h.router.connect_to(port)).collect();
    wait_until("both are offloaded, and the NIC is said to have one of them", || {
        connections.iter_mut().for_each(Connection::ping);
        h.router.installed().len() == 4 && h.port("lan")["in_hw"] == 1
    });
    assert_eq!(h.rules("lan", "active"), 5, "four guards, and a flow");
    let words = "simnic: the flow table is full";
    let about = h.port("lan")["about"].to_string();
    assert!(about.contains(words), "{about}");
    // Of each it is known whether the NIC has it, and why not.
    let conns = h.router.conns();
    let conns = conns.as_array().expect("connections");
    let told = (5001..=5002).map(|port| {
        let address = format!("10.2.0.2:{port}");
        let conn = conns.iter().find(|c| c["original"]["dport"] == port).expect("a connection");
        let source = format!("10.1.0.2:{}", conn["original"]["sport"]);
        let out = h.router.cli(&["explain", "tcp", &source, &address]);
        String::from_utf8_lossy(&out.stdout).into_owned()
    });
    let told: Vec<String> = told.collect();
    let lan = |text: &String| {
        let part = text.split("\n\n").find(|part| part.starts_with("lan, original"));
        part.expect("the slot on lan").to_owned()
    };
    let full = format!("the NIC     does not have it: \"{words}\"");
    assert_eq!(told.iter().filter(|t| lan(t).contains(&full)).count(), 1, "{told:?}");
    assert_eq!(told.iter().filter(|t| lan(t).contains("in hardware")).count(), 1, "{told:?}");
    wait_until("one goes by the NIC, and one by rules in software", || {
        h.passes_the_host_by(&mut connections)
    });
}

#[test]
fn counters_that_lag_are_read_all_the_same() {
    let h = Hardware::start("lag", "skip-sw", &[("stats_interval_ms", "3000")]);
    let mut c = h.router.connect();
    h.wait_in_hardware(&mut c);
    let packets = || h.slot("lan")["packets"].as_u64().expect("a number");
    let mut steps = vec![packets()];
    wait_until("they have moved three times", || {
        c.ping();
        if steps.last() != Some(&packets()) {
            steps.push(packets());
        }
        steps.len() > 3
    });
    assert!(steps.is_sorted(), "{steps:?}");
    assert_eq!(h.rejections("lan", "no-effect") + h.rejections("wan", "no-effect"), 0);
    h.wait_in_hardware(&mut c);
}

#[test]
fn a_port_of_a_nic_that_loses_what_it_counts_can_be_taken_away() {
    let h = Hardware::start("loses", "skip-sw", &[("silent", "2")]);
    let mut c = h.router.connect();
    wait_until("nothing arrives any more", || !c.is_alive());
    // Its counters move, and software sees nothing: no one can tell.
    assert_eq!(h.rejections("lan", "no-effect") + h.rejections("wan", "no-effect"), 0);
    for port in PORTS {
        assert!(h.router.cli(&["port", "del", port]).status.success());
        assert_eq!(h.rules(port, "active") + h.rules(port, "silent"), 0);
    }
    wait_until("the host carries it", || c.is_alive());
}
