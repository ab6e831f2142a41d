//! Netdevs that are enslaved to a VRF: packets are routed as the VRF's, by its table.

use super::*;

impl Router {
    /// `lan` and `wan` are of VRF `red`, from which nothing falls through to the main table.
    fn with_vrf(&self) {
        self.run(
            "ip link add red type vrf table 77 && ip link set red up
             ip route add unreachable default metric 4278198272 table 77
             ip link set lan master red && ip link set wan master red",
        );
    }

    fn wait_alive(&self, c: &mut Connection) {
        wait_until("it goes on", || {
            println!("{:?}", self.slots());
            c.is_alive()
        });
        // What was sent meanwhile comes back late.
        c.stream.set_read_timeout(Some(Duration::from_millis(500))).expect("a time-out");
        while c.stream.read(&mut [0; 64]).is_ok_and(|n| n > 0) {}
        c.stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    }
}

#[test]
fn connections_of_a_vrf_are_offloaded_by_its_routes_and_switches() {
    let mut r = Router::new("vrf");
    r.with_vrf();
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    r.exchange_by_rules(&mut c, 50_000);
    let conns = r.conns();
    assert_eq!(conns[0]["slots"][0]["iif"], "red", "{conns}");
    // The table of the VRF.
    r.run("ip route add prohibit 10.2.0.2/32 table 77");
    wait_until("nothing goes by rules where the VRF has no route", || r.rules("lan") == 0);
    assert!(!c.is_alive());
    r.run("ip route del prohibit 10.2.0.2/32 table 77");
    r.wait_alive(&mut c);
    r.wait_installed(&BOTH, &mut c);
    // Forwarding is switched for the netdev; that of the VRF is not asked.
    r.run("sysctl -qw net.ipv4.conf.red.forwarding=0");
    c.ping();
    r.run("sysctl -qw net.ipv4.conf.lan.forwarding=0");
    wait_until("it is forwarded no more", || r.rules("lan") == 0);
    assert!(!c.is_alive());
    r.run("sysctl -qw net.ipv4.conf.lan.forwarding=1");
    r.wait_alive(&mut c);
    r.wait_installed(&BOTH, &mut c);
    // A netdev leaves the VRF: there is no way between the two any more.
    r.run("ip link set wan nomaster");
    wait_until("no rule goes on as if it had not", || r.rules("lan") + r.rules("wan") == 0);
    assert!(!c.is_alive());
    r.run("ip link set wan master red");
    r.wait_alive(&mut c);
    r.wait_installed(&BOTH, &mut c);
    // The VRF goes, and what was its is routed by the main table.
    r.run("ip link del red");
    r.wait_alive(&mut c);
    r.wait_installed(&BOTH, &mut c);
    assert_eq!(r.conns()[0]["slots"][0]["iif"], Value::Null);
    r.exchange_by_rules(&mut c, 50_000);
}

#[test]
fn a_vrf_that_a_netdev_is_below_more_than_once_is_refused_with_its_name() {
    let mut r = Router::new("vrf-vlans");
    r.put_in_vlan("lan", 10);
    r.run("ip link add lan.11 link lan type vlan id 11 && ip link set lan.11 up");
    r.run(
        "ip link add red type vrf table 77 && ip link set red up
         ip link set lan.10 master red && ip link set wan master red",
    );
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    r.exchange_by_rules(&mut c, 50_000);
    r.run("ip link set lan.11 master red");
    let at = ("lan", "original");
    r.wait_refused(at, "ingress-unsupported", "lan is below VRF red more than once", &mut c);
    r.run("ip link set lan.11 nomaster");
    r.wait_installed(&BOTH, &mut c);
}

#[test]
fn ipv6_connections_of_a_vrf_are_offloaded_by_its_routes() {
    let mut r = Router::new("vrf6");
    r.with_vrf();
    r.with_ipv6();
    r.run("ip -6 route add unreachable default metric 4278198272 table 77");
    r.start(&PORTS);
    let mut c = r.connect_through("[fd02::2]:5003", "wan", "[fd02::2]:5003");
    r.wait_installed(&BOTH, &mut c);
    r.run("ip -6 route add prohibit fd02::2/128 table 77");
    wait_until("nothing goes by rules where the VRF has no route", || r.rules("lan") == 0);
    assert!(!c.is_alive());
    r.run("ip -6 route del prohibit fd02::2/128 table 77");
    r.wait_alive(&mut c);
    r.wait_installed(&BOTH, &mut c);
}

/// The kernel's flowtable would have entries for packets that arrive on the VRF, which none does.
#[test]
fn a_flowtable_refuses_what_is_routed_for_a_vrf() {
    let mut r = Router::new("vrf-flowtable");
    r.with_vrf();
    r.start_with("[[port]]\nmatch = \"?an\"\nproviders = [\"nf-flowtable\"]\n");
    let mut c = r.connect();
    for at in [("lan", "original"), ("wan", "reply")] {
        r.wait_refused(at, "ingress-unsupported", "does not look below a VRF", &mut c);
    }
}
