//! Entries of others, in the neighbour table and in forwarding databases: they stay as they are.

use super::*;

const EVERY_SECOND: &str = "[usage]\nsweep-seconds = 1\nsweep-max-seconds = 1\n[sight]\nbridged = true\n[[port]]\nmatch = \"?an\"\n";

impl Router {
    /// Keeps the connection busy, by rules, through so many sweeps.
    fn sweep_busy(&self, c: &mut Connection, sweeps: u64) {
        let swept = || self.stats()["sweeps"].as_u64().expect("a number");
        let before = swept();
        wait_until("sweeps", || {
            c.ping();
            swept() >= before + sweeps
        });
    }
}

#[test]
fn a_neighbour_of_others_stays_as_it_is_and_one_of_the_kernels_own_is_kept() {
    let mut r = Router::new("neigh");
    let wan = r.host("wan");
    let mac = r.run(&format!("ip netns exec {wan} cat /sys/class/net/e0/address"));
    let set = |r: &Router, how: &str| {
        r.run(&format!("ip neigh replace 10.2.0.2 lladdr {} dev wan {how}", mac.trim()));
    };
    // A host that answers no ARP.
    let own: Value = serde_json::from_str(&r.run("ip -j link show wan")).expect("JSON");
    let own = own[0]["address"].as_str().expect("an address");
    r.run(&format!(
        "ip -n {wan} link set e0 arp off
         ip -n {wan} neigh replace 10.2.0.1 lladdr {own} dev e0 nud permanent"
    ));
    set(&r, "nud permanent");
    r.start_with(EVERY_SECOND);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    let adds = |r: &Router| r.stats()["adds"].clone();
    let before = adds(&r);
    let shown = |r: &Router| r.run("ip neigh show nud all 10.2.0.2 dev wan");
    for (how, stays) in [("nud permanent", "PERMANENT"), ("nud noarp", "NOARP")] {
        set(&r, how);
        r.sweep_busy(&mut c, 5);
        assert!(shown(&r).contains(stays), "{how}: {}", shown(&r));
    }
    r.run(&format!("ip -n {wan} link set e0 arp on"));
    for (how, stays) in [
        ("nud stale extern_learn", "extern_learn"),
        ("nud reachable extern_learn", "extern_learn"),
        ("managed", "managed"),
    ] {
        set(&r, how);
        r.sweep_busy(&mut c, 3);
        assert!(shown(&r).contains(stays), "{how}: {}", shown(&r));
    }
    // The kernel's own: no packet of the connection passes the stack, and it is probed all the same.
    r.run("ip neigh del 10.2.0.2 dev wan");
    wait_until("its rules are gone", || r.installed().is_empty() || r.rules("lan") == 0);
    r.wait_installed(&BOTH, &mut c);
    set(&r, "nud stale");
    wait_until("it is probed", || {
        c.ping();
        shown(&r).contains("REACHABLE")
    });
    assert!(adds(&r) != before, "one was added after its neighbour was deleted");
}

#[test]
fn what_others_have_put_into_a_forwarding_database_stays_there() {
    let mut r = Router::new("fdb");
    r.bridge();
    let (lan, wan) = (r.mac("lan"), r.mac("wan"));
    // Of the one the bridge knows by itself where it is, but not of VLAN 1, which it does not use; the
    // other is the control plane's.
    r.run(&format!(
        "bridge fdb add {lan} dev wan master static vlan 1
         bridge fdb replace {wan} dev wan master dynamic extern_learn"
    ));
    r.start_with(EVERY_SECOND);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    let shown = || {
        let text = r.run("bridge fdb show br br0");
        let mut lines: Vec<_> =
            text.lines().filter(|l| l.contains(&lan) || l.contains(&wan)).collect();
        lines.sort_unstable();
        lines.join("\n")
    };
    let before = shown();
    assert!(before.contains("vlan 1 ") && before.contains("extern_learn"), "{before}");
    r.sweep_busy(&mut c, 5);
    assert_eq!(shown(), before);
}
