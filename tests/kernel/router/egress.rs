//! What stands where packets leave decides about those that rules forward, too, or they are not forwarded by rules.

use super::beside::{explained, index, program, raw, try_bpf};
use super::*;

/// Without classes that any kernel here could lack.
const SHAPER: &str = "root handle 1: tbf rate 1gbit burst 100k latency 50ms";

/// A router whose netdevs take XDP although they are veths, and a connection that it carries.
fn by_xdp(test: &str, config: &str) -> (Router, Connection) {
    let mut r = Router::new(test);
    for dev in ["lan", "wan"] {
        let host = r.host(dev);
        r.run(&format!("ethtool -K {dev} rxvlan off"));
        r.run(&format!("ip netns exec {host} ethtool -K e0 tx off txvlan off gro on"));
    }
    r.start_with(&format!(
        "[ebpf]\nmode = \"xdp\"\n[[port]]\nmatch = \"?an\"\nproviders = [\"ebpf\"]\n{config}"
    ));
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    assert!(r.port("lan")["about"].to_string().contains("native XDP"), "{}", r.port("lan"));
    (r, c)
}

#[test]
fn xdp_passes_nobody_by_at_egress() {
    let (mut r, mut c) = by_xdp("egress-xdp", "");
    r.exchange_by_rules(&mut c, 1000);
    let mut refused = |come: &str, who: &str, go: &str| {
        r.run(come);
        r.wait_refused(("lan", "original"), "others-at-egress", "XDP", &mut c);
        assert_eq!((r.rules("lan"), r.installed()), (0, vec!["wan reply".to_owned()]), "{come}");
        let told = explained(&r);
        assert!(told.contains(&format!("{who} at wan")), "{told}");
        c.ping();
        r.run(go);
        r.wait_installed(&BOTH, &mut c);
        r.exchange_by_rules(&mut c, 1000);
    };
    refused(&format!("tc qdisc add dev wan {SHAPER}"), "qdisc tbf 1:", "tc qdisc del dev wan root");
    refused(
        "tc qdisc add dev wan clsact && tc filter add dev wan egress prio 9 bpf da bytecode '1,6 0 0 4294967295'",
        "bpf at prio 9 (all)",
        "tc filter del dev wan egress prio 9",
    );
    // Its qdisc goes with all of its filters.
    refused(
        "tc filter add dev wan egress prio 60000 bpf da bytecode '1,6 0 0 4294967295'",
        "bpf at prio 60000 (all)",
        "tc qdisc del dev wan clsact",
    );
    // Somebody who only queues is nobody, until he has a filter. (A kernel may lack the queue with classes for one.)
    r.run("tc qdisc add dev wan root handle 7: pfifo limit 100");
    std::thread::sleep(Duration::from_millis(500));
    r.wait_installed(&BOTH, &mut c);
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
}

#[test]
fn programs_of_tcx_at_egress_are_found_though_nobody_announces_them() {
    let (mut r, mut c) = by_xdp("egress-tcx", "");
    let wan = index(&r, "wan");
    let meter = program(3, -1, "meter");
    // BPF_LINK_CREATE, with attach type BPF_TCX_EGRESS.
    let Ok(link) = try_bpf(28, &[(0, raw(&meter)), (4, wan), (8, 47)], &[], "") else {
        return println!("not checked: this kernel has no tcx");
    };
    r.wait_refused(("lan", "original"), "others-at-egress", "XDP", &mut c);
    let told = explained(&r);
    assert!(told.contains("tcx program meter (id "), "{told}");
    drop(link);
    r.wait_installed(&BOTH, &mut c);
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
}

#[test]
fn what_may_be_passed_by_is_named_in_the_configuration_and_read_anew() {
    let (mut r, mut c) = by_xdp("egress-named", "[admission]\nbypass-egress = [\"w*\"]\n");
    r.run(&format!("tc qdisc add dev wan {SHAPER}"));
    std::thread::sleep(Duration::from_millis(500));
    r.wait_installed(&BOTH, &mut c);
    r.exchange_by_rules(&mut c, 1000);
    r.configure(
        "[ebpf]\nmode = \"xdp\"\n[[port]]\nmatch = \"?an\"\nproviders = [\"ebpf\"]\n[admission]\nbypass-egress = [\"lan\"]\n",
    );
    let pid = i32::try_from(r.daemon.as_ref().expect("a daemon").id()).expect("a pid");
    kill(Pid::from_raw(pid), Signal::SIGHUP).expect("kill");
    r.wait_refused(("lan", "original"), "others-at-egress", "XDP", &mut c);
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
}

/// Rules in software leave through the stack: what stands at egress of the netdev that they send to sees their packets.
fn rules_in_software_leave_through_the_stack(provider: &str) {
    let mut r = Router::new(&format!("egress-{provider}"));
    r.start_by(provider);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    r.run(&format!("tc qdisc add dev wan {SHAPER}"));
    r.run("tc qdisc add dev wan clsact 2>/dev/null || true");
    let filter = |verdict: u32| {
        format!(
            "tc filter replace dev wan egress prio 9 handle 1 bpf da bytecode '1,6 0 0 {verdict}'"
        )
    };
    r.run(&filter(u32::MAX));
    std::thread::sleep(Duration::from_millis(500));
    r.wait_installed(&BOTH, &mut c);
    r.exchange_by_rules(&mut c, 100_000);
    let shaped = || {
        let shown = r.run("tc -s qdisc show dev wan root");
        let sent =
            shown.split("Sent ").nth(1).and_then(|s| s.split(' ').next()?.parse::<u64>().ok());
        sent.expect("bytes sent")
    };
    let before = shaped();
    r.exchange_by_rules(&mut c, 100_000);
    assert!(shaped() >= before + 100_000, "the shaper has seen them");
    // TC_ACT_SHOT
    r.run(&filter(2));
    wait_until("the filter drops them", || !c.is_alive());
    r.run("tc filter del dev wan egress prio 9; tc qdisc del dev wan root");
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
}

/// What stands above the netdev that rules send to, at the one that the route leads to, no rule gives packets to.
fn what_stands_above_is_passed_by_no_rule(provider: &str) {
    let mut r = Router::new(&format!("above-{provider}"));
    r.put_in_vlan("wan", 20);
    r.start_by(provider);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    r.run(&format!("tc qdisc add dev wan.20 {SHAPER}"));
    r.wait_refused(("lan", "original"), "others-at-egress", "qdisc tbf 1: at wan.20", &mut c);
    assert_eq!(r.installed(), ["wan reply"]);
    r.run("tc qdisc del dev wan.20 root");
    r.wait_installed(&BOTH, &mut c);
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
}

#[test]
fn rules_of_ebpf_at_tcx_leave_through_the_stack() {
    rules_in_software_leave_through_the_stack("ebpf");
}

#[test]
fn rules_of_tc_flower_in_software_leave_through_the_stack() {
    rules_in_software_leave_through_the_stack("tc-flower");
}

#[test]
fn what_stands_above_is_passed_by_no_rule_of_ebpf_in_a_vlan() {
    what_stands_above_is_passed_by_no_rule("ebpf");
}

#[test]
fn what_stands_above_is_passed_by_no_rule_of_tc_flower_in_a_vlan() {
    what_stands_above_is_passed_by_no_rule("tc-flower");
}
