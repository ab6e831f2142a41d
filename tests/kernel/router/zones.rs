//! Conntrack zones: connections with one tuple, in several of them.

use super::*;

const RULE: &str =
    "nft 'table inet z { chain pre { type filter hook prerouting priority -300; }; }'";

/// Netdevs choose zones: rules match netdevs, and take each connection for what it is.
#[test]
fn connections_in_zones_that_netdevs_choose_are_offloaded() {
    let mut r = Router::new("zoned");
    r.run(&format!("{RULE} && nft 'add rule inet z pre iifname {{ lan, wan }} ct zone set 7'"));
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    assert_eq!(r.conns()[0]["zone"], 7);
    r.exchange_by_rules(&mut c, 10_000);
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
}

/// A rule would take the packets of both: `ct zone set` by the mark, by who sent it, and by what leads past
/// it; on the netdevs that it is about, and for as long as there is such a thing.
#[test]
fn connections_are_not_offloaded_where_something_else_chooses_zones() {
    let mut r = Router::new("unclear");
    r.run(RULE);
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    let (out, back) = (("lan", "original"), ("wan", "reply"));
    for (rule, words) in [
        ("meta mark 7 ct zone set 7", "chain pre of table z chooses conntrack zones by the mark"),
        ("ether saddr 02:00:00:00:09:09 ct zone set 7", "by the sender's MAC address"),
        ("iifname lan ip dscp 12 ct zone set 7", "by other parts of the packet"),
    ] {
        r.run(&format!("nft 'add rule inet z pre {rule}'"));
        r.wait_refused(out, "zone-unclear", words, &mut c);
        if rule.starts_with("iifname") {
            r.wait_installed(&["wan reply"], &mut c);
        } else {
            r.wait_refused(back, "zone-unclear", words, &mut c);
        }
        r.run("nft flush chain inet z pre");
        r.wait_installed(&BOTH, &mut c);
    }
    // There when the daemon starts; and by a tool of iptables.
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    r.run("iptables-nft -t raw -A PREROUTING -i lan -m mark --mark 7 -j CT --zone 7");
    r.start(&PORTS);
    r.wait_refused(out, "zone-unclear", "table raw", &mut c);
    r.wait_installed(&["wan reply"], &mut c);
    r.run("iptables-nft -t raw -F PREROUTING");
    r.wait_installed(&BOTH, &mut c);
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
}
