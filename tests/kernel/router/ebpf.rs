//! The daemon with ports of ebpf: on every kernel that has BPF, without a virtual machine.

use std::collections::BTreeSet;

use ctoffload::control::info::EventKind;
use ctoffload::control::{Subscription, Target};

use super::*;

const EBPF: &str = "ebpf";

/// What outlives a daemon is pinned in bpffs, which distributions mount.
pub(super) fn with_bpffs(r: &Router) {
    r.run("mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf");
}

#[test]
fn a_connection_has_its_rules_for_as_long_as_it_lives() {
    let mut r = Router::new("ebpf-life");
    r.start_by(EBPF);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    assert_eq!((r.rules("lan"), r.rules("wan")), (1, 1));
    r.exchange_by_rules(&mut c, 100_000);
    let port = r.json(&["port", "show", "lan"]);
    assert!(port.to_string().contains("BPF, "), "{port}");
    let slots = r.conns()[0]["slots"].clone();
    assert!(slots[0]["rule"].as_str().is_some_and(|rule| rule.starts_with("entry ")), "{slots}");
    wait_until("its packets are counted", || {
        r.conns()[0]["bytes"].as_u64().is_some_and(|bytes| bytes > 200_000)
    });
    c.close();
    wait_until("the rules are gone", || r.rules("lan") + r.rules("wan") == 0);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    c.ping();
    assert_eq!((r.rules("lan"), r.rules("wan")), (0, 0));
    assert_eq!(r.run("tc qdisc show dev lan clsact; nft list tables"), "");
}

#[test]
fn a_veth_that_has_no_list_gets_ebpf_and_is_shown_with_the_reasons() {
    let mut r = Router::new("ebpf-default");
    r.run("nft add table inet watch");
    r.start_by_default("[[port]]\nmatch = \"?an\"\n");
    let port = r.port("lan");
    assert_eq!(port["provider"], EBPF, "{port}");
    let out = r.cli(&["port", "show", "lan"]);
    let shown = String::from_utf8_lossy(&out.stdout).into_owned();
    let chosen = "by default: the first that accepts, as the NIC carries no rules";
    let why = ["declined    tc-flower: in hardware: ", "declined    nf-flowtable: in hardware: "];
    for words in [chosen].iter().chain(&why) {
        assert!(shown.contains(words), "no '{words}' in {shown}");
    }
    // Whoever was asked in vain has left nothing.
    assert_eq!(r.run("nft list tables"), "table inet watch\ntable inet ctoffload\n");
    if shown.contains("tcx") {
        assert_eq!(r.run("tc qdisc show dev lan clsact; tc qdisc show dev lan ingress"), "");
    }
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    // For hardware only it is none's, and nothing is there.
    assert!(r.cli(&["port", "del", "wan"]).status.success());
    let out = r.cli(&["port", "add", "wan", "--offload", "skip-sw"]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(7), "{said}");
    assert!(said.contains("ebpf declined: in hardware: a program"), "{said}");
    assert_eq!(r.run("tc qdisc show dev wan clsact; tc qdisc show dev wan ingress"), "");
    assert!(r.cli(&["port", "add", "wan"]).status.success());
    r.wait_installed(&BOTH, &mut c);
    // Where hardware is not asked for, nobody is asked for it.
    assert!(r.cli(&["port", "del", "wan"]).status.success());
    assert!(r.cli(&["port", "add", "wan", "--offload", "skip-hw"]).status.success());
    let port = r.port("wan");
    assert_eq!(
        (&port["provider"], port["refusals"].as_array().map(Vec::len)),
        (&EBPF.into(), Some(0))
    );
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
}

#[test]
fn a_killed_daemons_rules_are_adopted_without_a_gap_or_removed() {
    let mut r = Router::new("ebpf-adopt");
    with_bpffs(&r);
    r.run("nft add table inet watch && nft add counter inet watch slow && nft 'add chain inet watch forward { type filter hook forward priority -10; }' && nft 'add rule inet watch forward tcp flags & (fin|syn|rst) == 0 counter name slow'");
    let slow = |r: &Router| r.run("nft list counter inet watch slow");
    r.start_by(EBPF);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    r.exchange_by_rules(&mut c, 100);
    let before = slow(&r);
    c.ping();
    r.signal(Signal::SIGKILL);
    assert_eq!((r.rules("lan"), r.rules("wan")), (1, 1), "rules outlive the process");
    c.ping();
    r.start_by(EBPF);
    c.ping();
    wait_until("both are adopted", || r.installed() == BOTH);
    c.ping();
    assert_eq!(slow(&r), before, "no packet took the slow path meanwhile");
    wait_until("their counters go on", || r.conns()[0]["packets"].as_u64().is_some_and(|n| n >= 8));
    // The connection ends while nobody looks.
    r.signal(Signal::SIGKILL);
    r.run("conntrack -D -p tcp --dport 5001");
    r.start_by(EBPF);
    wait_until("its rules are gone", || r.rules("lan") + r.rules("wan") == 0);
    r.wait_installed(&BOTH, &mut c);
    // And where there is no port any more.
    r.signal(Signal::SIGKILL);
    r.start_with("[[port]]\nmatch = \"lan\"\nproviders = [\"ebpf\"]\n");
    wait_until("the rule on wan is gone", || r.rules("wan") == 0);
    r.wait_installed(&["lan original"], &mut c);
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    assert_eq!((r.rules("lan"), r.rules("wan")), (0, 0));
    c.ping();
}

#[test]
fn what_changes_around_a_port_takes_its_rules_along_and_they_come_back() {
    let mut r = Router::new("ebpf-changes");
    r.start_by(EBPF);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    r.run("ip link set wan down");
    wait_until("nothing redirects into wan", || r.rules("lan") == 0);
    r.run("ip link set wan up");
    r.wait_installed(&BOTH, &mut c);
    r.run("conntrack -D -p tcp --dport 5001");
    wait_until("the rules are gone", || r.rules("lan") + r.rules("wan") == 0);
    r.wait_installed(&BOTH, &mut c);
    // A smaller MTU on the way out: what is too long is left to the stack.
    let host = r.host("wan");
    r.run(&format!("ip -n {host} link set e0 mtu 1400 && ip link set wan mtu 1400"));
    wait_until("rules of the new length", || {
        c.ping();
        r.installed() == BOTH
    });
    c.exchange(200_000);
    // A port that goes, and comes again.
    assert!(r.cli(&["port", "del", "wan"]).status.success());
    assert_eq!((r.rules("wan"), r.rules("lan")), (0, 0));
    assert!(r.cli(&["port", "add", "wan", "--provider", EBPF]).status.success());
    r.wait_installed(&BOTH, &mut c);
    // Somebody else's filter, which would not see the packets: `explain` says so. (Before 6.6 ours is a filter itself,
    // behind all others.)
    if r.run("tc qdisc show dev lan clsact").is_empty() {
        r.run("tc qdisc add dev lan clsact && tc filter add dev lan ingress prio 1 bpf bytecode '1,6 0 0 0'");
        r.wait_refused(("lan", "original"), "others-in-front", "behind ours", &mut c);
        assert_eq!(r.rules("lan"), 0);
        r.run("tc qdisc del dev lan clsact");
        r.wait_installed(&BOTH, &mut c);
    }
}

#[test]
fn addresses_and_ports_are_translated_both_ways() {
    const LENGTH: usize = 200_000;
    let mut r = Router::new("ebpf-nat");
    r.run(
        "nft add table ip t
         nft add chain ip t pre '{ type nat hook prerouting priority -100; }'
         nft add chain ip t post '{ type nat hook postrouting priority 100; }'
         nft add rule ip t pre iifname lan ip daddr 10.1.0.1 tcp dport 80 dnat to 10.2.0.2:5001
         nft add rule ip t post oifname wan tcp dport 5001 snat to 10.2.0.1:7000-7010",
    );
    r.start_by(EBPF);
    let mut c = r.connect_through("10.1.0.1:80", "wan", "10.2.0.2:5001");
    r.wait_installed(&BOTH, &mut c);
    r.exchange_by_rules(&mut c, LENGTH);
    // What arrives is verified by the hosts, in software.
    for dev in ["lan", "wan"] {
        let host = r.host(dev);
        r.run(&format!(
            "ethtool -K {dev} tx off tso off gso off; ip netns exec {host} ethtool -K e0 rx off"
        ));
    }
    r.exchange_by_rules(&mut c, LENGTH);
}

#[test]
fn a_port_of_ebpf_is_one_beside_others_and_is_shown_with_its_place() {
    let mut r = Router::new("ebpf-shown");
    r.start_with("[ebpf]\nmode = \"xdp\"\n[[port]]\nmatch = \"lan\"\nproviders = [\"ebpf\"]\n");
    let out = r.cli(&["port", "show", "lan"]);
    let shown = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(shown.contains("rxvlan off"), "a veth takes tags off: {shown}");
    r.run("ethtool -K lan rxvlan off");
    assert!(r.cli(&["port", "del", "lan"]).status.success());
    assert!(r.cli(&["port", "add", "lan", "--provider", EBPF]).status.success());
    let out = r.cli(&["port", "show", "lan"]);
    let shown = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(shown.contains("native XDP"), "{shown}");
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
}

/// What a follower of events has, of one connection: the port and the direction of each rule.
fn follow(events: &mut Subscription, rules: &mut BTreeSet<(String, String)>) {
    while let Some(notice) = events.next(Duration::from_millis(100)).expect("events") {
        let event = notice.into_event();
        let rule = (
            event.port.clone().unwrap_or_default(),
            event.direction.map(|d| d.to_string()).unwrap_or_default(),
        );
        assert_ne!(event.kind, EventKind::Lost, "{event:?}");
        match event.kind {
            EventKind::Installed => assert!(rules.insert(rule), "twice: {event:?}"),
            EventKind::Deleted => assert!(rules.remove(&rule), "it was not there: {event:?}"),
            _ => {}
        }
    }
}

#[test]
fn whoever_follows_the_events_has_the_rules_that_are_shown() {
    let mut r = Router::new("ebpf-follow");
    r.start_by(EBPF);
    let mut events = Subscription::open(Target::default()).expect("a subscription");
    let mut rules = BTreeSet::new();
    let shown = |r: &Router| -> BTreeSet<_> {
        let slots = r.slots().into_iter().filter(|(_, _, state, _)| state == "installed");
        slots.map(|(port, direction, _, _)| (port, direction)).collect()
    };
    let mut c = r.connect();
    for what in [
        "ctoffload flush --all",
        "nft add table inet other; nft 'add chain inet other f { type filter hook forward priority 0; }'; nft add rule inet other f tcp dport 9 drop",
        "ctoffload port del lan",
    ] {
        r.wait_installed(&BOTH, &mut c);
        follow(&mut events, &mut rules);
        assert_eq!((rules.len(), &rules), (2, &shown(&r)), "before {what}");
        let deleted = what.strip_prefix("ctoffload ");
        match deleted.map(|args| args.split(' ').collect::<Vec<_>>()) {
            Some(args) => assert!(r.cli(&args).status.success(), "{what}"),
            None => drop(r.run(what)),
        }
        wait_until("rules go", || shown(&r).is_empty() || what.contains("port del"));
        wait_until("whoever follows is told", || {
            follow(&mut events, &mut rules);
            rules == shown(&r)
        });
        assert!(rules.len() < 2, "{what}: {rules:?}");
    }
}
