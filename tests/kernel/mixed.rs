//! Ports of different providers in one connection, as the daemon runs them: tc-flower on one netdev,
//! nf-flowtable on the other, none on a third.

use std::fs::File;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::release::{flowtable_wants_both, hear_of_ends_soon};
use crate::router::{BOTH, Connection, Router, reset_counters};
use crate::wait::wait_until;

const FLOWER: &str = "tc-flower";
const FLOWTABLE: &str = "nf-flowtable";
const EBPF: &str = "ebpf";

/// A router whose forward hook counts, with a second way to the host behind `wan`, by `wan2`.
fn router(test: &str) -> Router {
    let r = Router::new(test);
    let host = r.host("wan");
    r.run(&format!(
        "set -e; ip link add wan2 type veth peer name e1 netns {host}
         ip addr add 10.3.0.1/24 dev wan2; ip link set wan2 up
         ip -n {host} addr add 10.3.0.2/24 dev e1; ip -n {host} link set e1 up"
    ));
    r.run(
        "nft '
         table inet watch {
           counter lan { }
           counter wan { }
           counter wan2 { }
           chain forward { type filter hook forward priority -10
             ip protocol tcp iifname lan counter name lan
             ip protocol tcp iifname wan counter name wan
             ip protocol tcp iifname wan2 counter name wan2
           }
         }
         '",
    );
    r
}

/// Each netdev with its providers.
fn config(ports: &[(&str, &[&str])]) -> String {
    let mut text = String::from("[usage]\nsweep-seconds = 1\nsweep-max-seconds = 1\n");
    for (name, providers) in ports {
        text += &format!("[[port]]\nmatch = \"{name}\"\nproviders = {providers:?}\n");
    }
    text
}

/// The daemon answers before it has all its ports.
fn start(r: &mut Router, ports: &[(&str, &[&str])]) {
    r.start_with(&config(ports));
    wait_until("the ports are there", || r.ports().len() == ports.len());
    hear_of_ends_soon(|line| r.run(line));
}

/// Whether a port of this provider offloads what leaves by one of the other.
fn takes(provider: &str, egress: Option<&str>) -> bool {
    match provider {
        FLOWTABLE => !flowtable_wants_both() || egress == Some(FLOWTABLE),
        _ => true,
    }
}

/// Waits for the slots of a connection, of which it is known which are offloaded: the others are refused by
/// the flowtable, and say so.
fn wait_slots(r: &Router, c: &mut Connection, slots: &[(&str, &str, bool)]) {
    let taken: Vec<_> = slots.iter().filter(|s| s.2).map(|s| format!("{} {}", s.0, s.1)).collect();
    r.wait_installed(&taken.iter().map(|s| &**s).collect::<Vec<_>>(), c);
    for (port, direction, _) in slots.iter().filter(|s| !s.2) {
        r.wait_refused((port, direction), "egress-unsupported", "both netdevs", c);
    }
}

/// Packets in the forward hook since the last call, of each ingress netdev.
fn forwarded(r: &Router) -> [u64; 3] {
    reset_counters(|line| r.try_run(line), ["lan", "wan", "wan2"])
}

/// Packets of a conversation that cross the forward hook, by ingress netdev. `installed` is said
/// when the element is in; the entry is made by the next packet.
fn crossing(r: &Router, c: &mut Connection) -> [bool; 3] {
    c.ping();
    c.ping();
    forwarded(r);
    (0..10).for_each(|_| c.ping());
    forwarded(r).map(|n| n >= 10)
}

fn wait_crossing(r: &Router, c: &mut Connection, want: [bool; 3]) {
    wait_until(&format!("{want:?} cross the forward hook"), || crossing(r, c) == want);
}

fn provider(r: &Router, port: &str) -> Value {
    r.port(port)["provider"].clone()
}

fn ok(r: &Router, args: &[&str]) {
    let out = r.cli(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn mixed_each_netdev_offloads_its_own_direction_with_its_own_provider() {
    each_offloads_its_own(&[
        ("mix1", FLOWER, FLOWTABLE),
        ("mix2", FLOWTABLE, FLOWER),
        ("mix3", FLOWTABLE, FLOWTABLE),
    ]);
}

#[test]
fn mixed_ebpf_offloads_its_own_direction_beside_the_others() {
    each_offloads_its_own(&[("mix4", EBPF, FLOWER), ("mix5", FLOWTABLE, EBPF)]);
}

#[test]
fn mixed_ebpf_on_both_offloads_each_by_itself() {
    each_offloads_its_own(&[("mix6", EBPF, EBPF)]);
}

fn each_offloads_its_own(cases: &[(&str, &str, &str)]) {
    for &(test, lan, wan) in cases {
        let mut r = router(test);
        start(&mut r, &[("lan", &[lan]), ("wan", &[wan])]);
        assert_eq!((provider(&r, "lan"), provider(&r, "wan")), (lan.into(), wan.into()));
        let mut c = r.connect();
        let (on_lan, on_wan) = (takes(lan, Some(wan)), takes(wan, Some(lan)));
        let both = |r: &Router, c: &mut Connection| {
            wait_slots(r, c, &[("lan", "original", on_lan), ("wan", "reply", on_wan)]);
            wait_crossing(r, c, [!on_lan, !on_wan, false]);
        };
        both(&r, &mut c);
        let rules = |provider: &str| usize::from(provider != FLOWTABLE);
        assert_eq!((r.rules("lan"), r.rules("wan")), (rules(lan), rules(wan)));
        // The kernel's entry may have gone again on a slow machine: the next packet makes it.
        let in_flowtable = [lan, wan].contains(&FLOWTABLE) && on_lan && on_wan;
        wait_until(&format!("conntrack says OFFLOAD: {in_flowtable}"), || {
            c.ping();
            let entry = r.run("conntrack -L -p tcp --dport 5001 2>/dev/null");
            entry.contains("OFFLOAD") == in_flowtable
        });

        // Either port goes, and comes back. The other's direction stays where it is, if it can alone.
        ok(&r, &["port", "del", "wan"]);
        wait_slots(&r, &mut c, &[("lan", "original", takes(lan, None))]);
        wait_crossing(&r, &mut c, [!takes(lan, None), true, false]);
        ok(&r, &["port", "add", "wan"]);
        both(&r, &mut c);
        ok(&r, &["port", "del", "lan"]);
        wait_slots(&r, &mut c, &[("wan", "reply", takes(wan, None))]);
        wait_crossing(&r, &mut c, [true, !takes(wan, None), false]);
        ok(&r, &["port", "add", "lan"]);
        both(&r, &mut c);

        c.close();
        wait_until("nothing is left of the connection", || r.slots().is_empty());
        if [lan, wan].contains(&FLOWTABLE) {
            let sets = r.run("nft list table inet ctoffload_flow");
            assert!(!sets.contains("elements = { 0x"), "{sets}");
        }
        assert_eq!(r.signal(Signal::SIGTERM), Some(0));
        assert_eq!(r.run("nft list tables"), "table inet watch\n");
    }
}

#[test]
fn mixed_a_port_of_no_provider_stays_on_the_slow_path() {
    let mut r = router("none");
    start(&mut r, &[("lan", &[FLOWTABLE]), ("wan", &["none"])]);
    assert_eq!(provider(&r, "wan"), Value::Null);
    let mut c = r.connect();
    let alone = takes(FLOWTABLE, None);
    wait_slots(&r, &mut c, &[("lan", "original", alone)]);
    wait_crossing(&r, &mut c, [!alone, true, false]);
    ok(&r, &["port", "del", "lan"]);
    ok(&r, &["port", "add", "lan", "--provider", "none"]);
    wait_crossing(&r, &mut c, [true, true, false]);
    assert_eq!(r.installed(), [""; 0]);
}

#[test]
fn mixed_a_connection_moves_from_one_provider_to_another() {
    for (test, lan, wan, wan2) in [
        ("move1", FLOWER, FLOWTABLE, FLOWER),
        ("move2", FLOWTABLE, FLOWTABLE, FLOWER),
        ("move3", FLOWTABLE, FLOWER, FLOWTABLE),
        ("move4", FLOWTABLE, FLOWTABLE, FLOWTABLE),
    ] {
        let mut r = router(test);
        let host = r.host("wan");
        let ports: [(&str, &[&str]); 3] = [("lan", &[lan]), ("wan", &[wan]), ("wan2", &[wan2])];
        start(&mut r, &ports);
        let mut c = r.connect();
        let by = |r: &Router, c: &mut Connection, name: &str, provider: &str| {
            let (there, back) = (takes(lan, Some(provider)), takes(provider, Some(lan)));
            wait_slots(r, c, &[("lan", "original", there), (name, "reply", back)]);
            wait_crossing(r, c, [!there, name == "wan" && !back, name == "wan2" && !back]);
        };
        by(&r, &mut c, "wan", wan);
        r.run(&format!(
            "ip -n {host} route replace 10.1.0.0/24 via 10.3.0.1 dev e1
             ip route replace 10.2.0.2 via 10.3.0.2 dev wan2"
        ));
        by(&r, &mut c, "wan2", wan2);
        r.run(&format!("ip route del 10.2.0.2 && ip -n {host} route del 10.1.0.0/24"));
        by(&r, &mut c, "wan", wan);
        // And by force: the netdev goes.
        r.run(&format!(
            "ip -n {host} route replace 10.1.0.0/24 via 10.3.0.1 dev e1
             ip route replace 10.2.0.2 via 10.3.0.2 dev wan2; ip link del wan"
        ));
        // The host's address went with the link that it was on.
        r.run(&format!("ip -n {host} addr add 10.2.0.2/32 dev lo; ip -n {host} link set lo up"));
        by(&r, &mut c, "wan2", wan2);
    }
}

#[test]
fn mixed_a_change_of_the_firewall_reaches_connections_in_the_flowtable() {
    let mut r = router("wall2");
    start(&mut r, &[("lan", &[FLOWTABLE]), ("wan", &[FLOWTABLE])]);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    wait_crossing(&r, &mut c, [false; 3]);
    r.run("nft add table inet wall && nft 'add chain inet wall forward { type filter hook forward priority 0; }'");
    r.run("nft add rule inet wall forward tcp dport 5001 drop");
    wait_until("the firewall stops it", || !c.is_alive());
    let entry = r.run("conntrack -L -p tcp --dport 5001 2>/dev/null");
    assert!(!entry.contains("OFFLOAD"), "{entry}");
    r.run("nft delete table inet wall");
    wait_until("it goes on", || c.is_alive());
    r.wait_installed(&BOTH, &mut c);
    wait_crossing(&r, &mut c, [false; 3]);
}

/// Tables with an owner are passed over: nothing is to be repaired. The rest is as configured.
#[test]
fn mixed_a_flush_of_the_ruleset_is_noticed_reported_and_survived() {
    for (test, on_change) in [("flush1", "flush"), ("flush2", "keep")] {
        let mut r = router(test);
        let config = config(&[("lan", &[FLOWTABLE]), ("wan", &[FLOWTABLE])]);
        let file = r.configure(&format!("[sight]\non-ruleset-change = \"{on_change}\"\n{config}"));
        let log = format!("{file}.log");
        r.start_logging(&["--config", &file], File::create(&log).expect("a file").into());
        let mut c = r.connect();
        r.wait_installed(&BOTH, &mut c);
        let adds = |r: &Router| r.stats()["adds"].as_u64().expect("a number");
        let before = adds(&r);
        r.run("nft flush ruleset");
        let ours = "table inet ctoffload\ntable inet ctoffload_flow\n";
        assert_eq!(r.run("nft list tables"), ours);
        wait_until("it is reported", || {
            std::fs::read_to_string(&log).is_ok_and(|log| log.contains("tables were deleted"))
        });
        if on_change == "flush" {
            wait_until("connections were taken back, and are offloaded again", || {
                c.ping();
                adds(&r) > before && r.installed() == BOTH
            });
        } else {
            c.ping();
            assert_eq!((adds(&r), r.installed()), (before, BOTH.map(String::from).to_vec()));
        }
        let entry = || r.run("conntrack -L -p tcp --dport 5001 2>/dev/null");
        wait_until("the flowtable has it", || {
            c.ping();
            entry().contains("OFFLOAD")
        });
        assert_eq!(r.signal(Signal::SIGTERM), Some(0));
        assert_eq!(r.run("nft list tables"), "");
    }
}

/// The classes of a netdev are asked in the order of the configuration; what declined is shown.
#[test]
fn mixed_a_class_that_declines_leaves_the_port_to_the_next_and_is_shown_with_its_reason() {
    let mut r = router("decline");
    r.run("nft add table inet ctoffload_flow");
    start(&mut r, &[("lan", &[FLOWTABLE, FLOWER]), ("wan", &[FLOWER, FLOWTABLE])]);
    assert_eq!((provider(&r, "lan"), provider(&r, "wan")), (FLOWER.into(), FLOWER.into()));
    let shown = |port: &str| {
        let out = r.cli(&["port", "show", port]);
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    let (lan, wan) = (shown("lan"), shown("wan"));
    assert!(lan.contains(FLOWTABLE) && lan.contains("exists and is not ours"), "{lan}");
    assert!(!wan.contains(FLOWTABLE), "{wan}");
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    assert_eq!(r.run("nft list tables"), "table inet watch\ntable inet ctoffload_flow\n");
}

#[test]
fn mixed_what_is_asked_for_by_hand_is_bound_or_refused_with_the_reasons() {
    let mut r = router("hand");
    r.start_by_default("[[port]]\nmatch = \"wan\"\n");
    assert_eq!(provider(&r, "wan"), EBPF, "the best that a veth can have");
    ok(&r, &["port", "add", "lan", "--provider", FLOWTABLE]);
    assert_eq!(provider(&r, "lan"), FLOWTABLE);
    let refused = |args: &[&str], status: i32| {
        let out = r.cli(args);
        assert_eq!(out.status.code(), Some(status), "{out:?}");
        String::from_utf8_lossy(&out.stderr).into_owned()
    };
    let words =
        refused(&["port", "add", "wan2", "--provider", FLOWTABLE, "--offload", "skip-sw"], 7);
    assert!(words.contains("nf-flowtable declined") && words.contains("hardware"), "{words}");
    let words = refused(&["port", "add", "lo"], 7);
    assert!(
        words.contains("tc-flower declined") && words.contains("nf-flowtable declined"),
        "{words}"
    );
    let words = refused(&["port", "add", "wan2", "--provider", "nf-flow"], 2);
    assert!(words.contains("nf-flow"), "{words}");
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    assert_eq!(r.run("nft list tables"), "table inet watch\n");
}

/// A connection that ends by itself costs the others nothing.
#[test]
fn mixed_the_flowtable_is_renewed_only_where_an_entry_would_live_on() {
    let mut r = router("renew");
    start(&mut r, &[("lan", &[FLOWTABLE]), ("wan", &[FLOWTABLE])]);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    wait_crossing(&r, &mut c, [false; 3]);
    let flowtable = |r: &Router| r.run("nft list flowtables | grep 'flowtable f'");
    let before = flowtable(&r);
    // One that is silent is left where it is, for as long as the kernel keeps it.
    let adds = r.stats()["adds"].clone();
    for _ in 0..3 {
        std::thread::sleep(Duration::from_secs(3));
        c.ping();
    }
    assert_eq!((flowtable(&r), &r.stats()["adds"]), (before.clone(), &adds));
    c.close();
    wait_until("nothing is left of the connection", || r.slots().is_empty());
    assert_eq!(flowtable(&r), before);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    wait_crossing(&r, &mut c, [false; 3]);
    ok(&r, &["flush", "--all"]);
    assert_ne!(flowtable(&r), before);
    r.wait_installed(&BOTH, &mut c);
    wait_crossing(&r, &mut c, [false; 3]);
}

/// The kernel's flowtable does not look below a bond: nothing is selected that would never be found.
#[test]
fn mixed_the_flowtable_refuses_what_is_routed_on_a_bond_and_says_so() {
    let mut r = router("bond2");
    r.run(
        "set -e
         ip link add bond0 type bond mode active-backup
         ip addr del 10.1.0.1/24 dev lan; ip link set lan down; ip link set lan master bond0
         ip link set lan up; ip link set bond0 up; ip addr add 10.1.0.1/24 dev bond0",
    );
    start(&mut r, &[("lan", &[FLOWTABLE]), ("wan", &[FLOWER])]);
    let mut c = r.connect();
    r.wait_refused(("lan", "original"), "ingress-unsupported", "below a bond", &mut c);
    r.wait_installed(&["wan reply"], &mut c);
    let sets = r.run("nft list table inet ctoffload_flow");
    assert!(!sets.contains("elements = { 0x"), "{sets}");
}
