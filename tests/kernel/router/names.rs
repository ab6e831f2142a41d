//! Netdevs of which the kernel says things that are no text.

use super::*;

#[test]
fn a_netdev_whose_alias_is_no_text_is_a_netdev_like_any_other() {
    let mut r = Router::new("alias");
    let alias = |r: &Router, dev: &str, bytes: &str| {
        r.run(&format!("ip link set {dev} alias \"$(printf '{bytes}')\""));
    };
    alias(&r, "wan", "\\377\\376 uplink");
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    // Changes of it are heard: the rule that leads to it looks at the length.
    let host = r.host("wan");
    r.run(&format!("ip -n {host} link set e0 mtu 1400 && ip link set wan mtu 1400"));
    wait_until("its MTU is heard of", || {
        c.ping();
        r.run("tc filter show dev lan ingress").contains("police") && r.installed() == BOTH
    });
    c.exchange(100_000);
    // And so is an alias that comes later, with all that comes after it.
    alias(&r, "lan", "\\200");
    r.run("ip link set wan down");
    wait_until("nothing redirects into wan", || r.rules("lan") == 0);
    // One that appears, and is made a port by hand.
    r.run("ip link add dmz type veth peer name dmz0");
    alias(&r, "dmz", "\\303\\050");
    wait_until("it is known", || {
        r.cli(&["port", "add", "dmz", "--provider", "tc-flower"]).status.success()
    });
    assert_eq!(r.port("dmz")["provider"], "tc-flower");
}
