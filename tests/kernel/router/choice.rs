//! Which class a port gets that has no list, and what becomes of the rules of a daemon that chose another.

use super::*;

/// Why classes did not get the port: each in its words.
fn refusals(r: &Router, port: &str) -> Vec<(String, String)> {
    let port = r.port(port);
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let all = port["refusals"].as_array().cloned().unwrap_or_default();
    all.iter().map(|refusal| (text(&refusal["class"]), text(&refusal["why"]))).collect()
}

#[test]
fn a_netdev_that_ebpf_declines_gets_tc_flower_in_software() {
    let mut r = Router::new("choice-flower");
    // XDP would not see the tags that a veth takes off.
    r.start_by_default("[ebpf]\nmode = \"xdp\"\n[[port]]\nmatch = \"?an\"\n");
    let port = r.port("lan");
    assert_eq!(port["provider"], "tc-flower", "{port}");
    assert!(port["chosen"].to_string().contains("the first that accepts"), "{port}");
    let refused = refusals(&r, "lan");
    let asked: Vec<_> = refused.iter().map(|(class, why)| (&**class, &**why)).collect();
    let in_hardware = |class: &str| {
        let mut of = asked.iter().filter(|(c, _)| *c == class);
        of.next().is_some_and(|(_, why)| why.starts_with("in hardware: "))
    };
    assert!(["ebpf", "tc-flower", "nf-flowtable"].iter().all(|c| in_hardware(c)), "{asked:?}");
    let [.., ("ebpf", why)] = asked[..] else { panic!("{asked:?}") };
    assert!(why.contains("rxvlan off"), "{why}");
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    assert_eq!((r.rules("lan"), r.rules("wan")), (1, 1));
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    assert_eq!(
        r.run("tc qdisc show dev lan clsact; tc qdisc show dev lan ingress; nft list tables"),
        ""
    );
}

/// An upgrade: what ports get by default is another class than before, or it was named before.
#[test]
fn the_rules_of_a_killed_daemon_go_when_the_netdev_becomes_another_classes() {
    let mut r = Router::new("choice-left");
    ebpf::with_bpffs(&r);
    let flower =
        |r: &Router| r.run("tc filter show dev lan ingress; tc filter show dev wan ingress");
    // Of this network namespace: other tests have theirs.
    let pinned = |r: &Router| {
        r.run("find /sys/fs/bpf -path \"*/ctoffload/$(stat -L -c %i /proc/self/ns/net)/*\" -name current_flows")
    };
    let port = "[[port]]\nmatch = \"?an\"\n";
    let by_flower = format!("{port}providers = [\"tc-flower\"]\n");
    let mut c = r.connect();
    // Found out by what `tc` and bpffs show: whose rules there are.
    for (first, then) in [(&*by_flower, port), (port, &*by_flower)] {
        r.start_by_default(first);
        let before = r.port("lan")["provider"].clone();
        r.wait_installed(&BOTH, &mut c);
        r.signal(Signal::SIGKILL);
        assert_eq!((r.rules("lan"), r.rules("wan")), (1, 1), "rules outlive the process");
        assert_eq!(before == "tc-flower", flower(&r).contains("flower"), "{before}");
        assert_eq!(before == "ebpf", !pinned(&r).is_empty(), "{before}");
        r.start_by_default(then);
        for name in ["lan", "wan"] {
            let port = r.port(name);
            assert_ne!(port["provider"], before, "{port}");
            assert_eq!(port["in_front"].as_array().map(Vec::len), Some(0), "{port}");
        }
        let now = r.port("lan")["provider"].clone();
        // Its guards. (Before 6.6 ebpf's program is a filter, too.)
        let is_guard = |line: &str| {
            line.contains(" bpf ") && line.contains(" handle ") && !line.contains("ctoffload_flows")
        };
        let shown = flower(&r);
        assert_eq!(now == "tc-flower", shown.lines().any(is_guard), "{now}: {shown}");
        assert_eq!(now == "ebpf", !pinned(&r).is_empty(), "{now}");
        r.wait_installed(&BOTH, &mut c);
        assert_eq!((r.rules("lan"), r.rules("wan")), (1, 1), "of the one class alone");
        r.exchange_by_rules(&mut c, 100_000);
        assert_eq!(r.signal(Signal::SIGTERM), Some(0));
        assert_eq!((r.rules("lan"), r.rules("wan"), &*pinned(&r)), (0, 0, ""));
        // Whoever made a qdisc has gone with it.
        assert_eq!(r.run("tc qdisc show dev lan clsact; tc qdisc show dev lan ingress"), "");
    }
}
