//! Netdevs above the ports: VLAN devices, bridges, bonds, and what is refused.

use super::*;

impl Router {
    /// Moves the network behind a netdev into a VLAN.
    pub(crate) fn put_in_vlan(&self, dev: &str, id: u16) {
        let net = if dev == "lan" { 1 } else { 2 };
        let host = self.host(dev);
        self.run(&format!(
            "ip addr flush dev {dev}
             ip link add link {dev} name {dev}.{id} type vlan id {id}
             ip addr add 10.{net}.0.1/24 dev {dev}.{id} && ip link set {dev}.{id} up"
        ));
        self.run(&format!(
            "ip -n {host} addr flush dev e0
             ip -n {host} link add link e0 name e0.{id} type vlan id {id}
             ip -n {host} addr add 10.{net}.0.2/24 dev e0.{id} && ip -n {host} link set e0.{id} up
             ip -n {host} route replace default via 10.{net}.0.1"
        ));
    }

    /// Gives the host behind `wan` a second cable, to `wan2`. There both are ports of a bridge, and
    /// here of `above`, which has the addresses. The second is up or down.
    pub(super) fn two_cables(&self, above: &str, kind: &str, second: &str) {
        let host = self.host("wan");
        self.run(&format!(
            "ip link add wan2 type veth peer name e1 netns {host}
             ip -n {host} addr flush dev e0
             ip -n {host} link add hub type bridge && ip -n {host} link set hub up
             for e in e0 e1; do ip -n {host} link set $e master hub; done
             ip -n {host} link set e0 up; ip -n {host} link set e1 {second}
             ip -n {host} addr add 10.2.0.2/24 dev hub
             ip -n {host} route replace default via 10.2.0.1
             ip addr flush dev wan && ip link set wan down
             ip link add {above} type {kind}
             ip link set wan master {above} && ip link set wan2 master {above}
             ip link set wan up && ip link set wan2 up
             ip link set {above} up && ip addr add 10.2.0.1/24 dev {above}"
        ));
    }

    fn filters(&self, dev: &str) -> String {
        self.run(&format!("tc filter show dev {dev} ingress"))
    }

    /// Waits until these are installed, and the rule on lan leads to `dev`. (Both at once: a netdev that has just come up is heard of late,
    /// and takes rules back that are soon there again.)
    fn wait_redirected(&self, dev: &str, want: &[&str], connection: &mut Connection) {
        let redirect = format!("Redirect to device {dev})");
        wait_until(&format!("{want:?} installed, by {dev}"), || {
            connection.ping();
            self.filters("lan").contains(&redirect) && self.installed() == want
        });
    }
}

#[test]
fn connections_of_vlan_devices_are_offloaded_on_the_ports_below() {
    let mut r = Router::new("vlan");
    r.put_in_vlan("lan", 10);
    r.put_in_vlan("wan", 20);
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    let text = r.filters("lan");
    for part in ["vlan_id 10", "vlan  pop pipe", "vlan  push id 20", "Redirect to device wan)"] {
        assert!(text.contains(part), "no {part} in {text}");
    }
    r.exchange_by_rules(&mut c, 300_000);
    let shown = String::from_utf8(r.cli(&["conn", "show"]).stdout).expect("text");
    assert!(shown.contains("lan (lan.10)") && shown.contains("-> wan (wan.20)"), "{shown}");
    // A VLAN device that goes down, and comes back.
    r.run("ip link set wan.20 down");
    wait_until("nothing redirects into the VLAN", || r.rules("lan") == 0);
    r.run("ip link set wan.20 up");
    r.wait_installed(&BOTH, &mut c);
    // Another MAC address above the port than its own.
    r.run("ip link set lan.10 address 02:00:00:00:00:99");
    r.run(&format!("ip -n {} neigh flush dev e0.10", r.host("lan")));
    wait_until("the rules are for the new MAC address", || {
        c.ping();
        r.filters("lan").contains("dst_mac 02:00:00:00:00:99") && r.installed() == BOTH
    });
    r.exchange_by_rules(&mut c, 100_000);
    // A smaller MTU above the port than its own: what is too long is told apart.
    r.run("ip link set wan.20 mtu 1400");
    wait_until("the rule looks at the length", || {
        c.ping();
        r.filters("lan").contains("police") && r.installed() == BOTH
    });
    c.exchange(300_000);
    // The end of a VLAN device takes the rules of both directions along.
    r.run("ip link del lan.10");
    wait_until("no rules are left", || r.rules("lan") + r.rules("wan") == 0);
}

#[test]
fn a_vlan_on_one_side_only() {
    let mut r = Router::new("untag");
    r.put_in_vlan("wan", 20);
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    assert!(!r.filters("lan").contains("vlan  pop pipe"), "{}", r.filters("lan"));
    assert!(!r.filters("wan").contains("vlan  push"), "{}", r.filters("wan"));
    r.exchange_by_rules(&mut c, 300_000);
    // The same network moves to another VLAN of the same port.
    let host = r.host("wan");
    r.run(&format!(
        "ip link add link wan name wan.30 type vlan id 30
         ip link del wan.20 && ip addr add 10.2.0.1/24 dev wan.30 && ip link set wan.30 up
         ip -n {host} link add link e0 name e0.30 type vlan id 30
         ip -n {host} link del e0.20
         ip -n {host} addr add 10.2.0.2/24 dev e0.30 && ip -n {host} link set e0.30 up
         ip -n {host} route replace default via 10.2.0.1"
    ));
    wait_until("the rule puts the new tag on", || {
        c.ping();
        r.filters("lan").contains("push id 30") && r.installed() == BOTH
    });
    r.exchange_by_rules(&mut c, 100_000);
}

#[test]
fn what_a_tag_cannot_express_is_refused_with_a_reason() {
    let mut r = Router::new("qinq");
    let host = r.host("wan");
    r.run(&format!(
        "ip addr flush dev wan; ip -n {host} addr flush dev e0
         ip link add link wan name wan.10 type vlan id 10 && ip link set wan.10 up
         ip link add link wan.10 name wan.10.20 type vlan id 20
         ip addr add 10.2.0.1/24 dev wan.10.20 && ip link set wan.10.20 up
         ip -n {host} link add link e0 name e0.10 type vlan id 10 && ip -n {host} link set e0.10 up
         ip -n {host} link add link e0.10 name e0.20 type vlan id 20
         ip -n {host} addr add 10.2.0.2/24 dev e0.20 && ip -n {host} link set e0.20 up
         ip -n {host} route replace default via 10.2.0.1"
    ));
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_refused(("lan", "original"), "egress-unsupported", "QinQ", &mut c);
    r.wait_refused(("wan", "reply"), "ingress-unsupported", "QinQ", &mut c);
    // A VLAN device is no port, and says where its connections are offloaded.
    let added = r.cli(&["port", "add", "wan.10"]);
    assert_eq!(added.status.code(), Some(7));
    let why = String::from_utf8_lossy(&added.stderr).into_owned();
    assert!(why.contains("offloaded on wan"), "{why}");
}

#[test]
fn a_bridge_leads_to_the_port_behind_which_the_neighbour_is() {
    let mut r = Router::new("bridge");
    // One cable at a time: there is no spanning tree.
    r.two_cables("br0", "bridge", "down");
    let host = r.host("wan");
    r.start(&["--port", "lan", "--port", "wan", "--port", "wan2"]);
    let mut c = r.connect();
    r.wait_redirected("wan", &BOTH, &mut c);
    r.exchange_by_rules(&mut c, 300_000);
    // The host moves to the other port.
    r.run(&format!("ip -n {host} link set e0 down; ip -n {host} link set e1 up"));
    wait_until("the rules have moved along", || {
        c.ping();
        r.filters("lan").contains("Redirect to device wan2)")
            && r.installed().contains(&"wan2 reply".to_owned())
    });
    r.exchange_by_rules(&mut c, 100_000);
    // Ports with VLANs of their own are not followed.
    r.run("ip link set br0 type bridge vlan_filtering 1");
    r.wait_refused(("lan", "original"), "egress-unsupported", "filters VLANs", &mut c);
    wait_until("no rules are left", || r.rules("lan") + r.rules("wan2") == 0);
}

#[test]
fn a_bond_leads_to_its_active_port_or_is_one_itself() {
    let mut r = Router::new("bond");
    r.two_cables("bond0", "bond mode active-backup miimon 100", "up");
    wait_until("the port can be made the active one", || {
        r.ns.try_run("ip link set bond0 type bond active_slave wan").status.success()
    });
    r.start(&["--port", "lan", "--port", "wan", "--port", "wan2"]);
    let mut c = r.connect();
    r.wait_redirected("wan", &BOTH, &mut c);
    r.exchange_by_rules(&mut c, 300_000);
    r.run("ip link set bond0 type bond active_slave wan2");
    r.wait_redirected("wan2", &["lan original", "wan2 reply"], &mut c);
    r.exchange_by_rules(&mut c, 100_000);
    assert_eq!(r.cli(&["port", "add", "bond0"]).status.code(), Some(7));
    c.close();
    r.signal(Signal::SIGTERM);
    // A bond that balances takes any frame: it is a port as it is, in software.
    r.run(
        "ip addr flush dev bond0
         ip link set wan nomaster && ip link set wan2 nomaster && ip link del bond0
         ip link set wan2 down && ip link set wan down
         ip link add bond1 type bond mode balance-xor miimon 100
         ip link set wan master bond1 && ip link set wan up
         ip link set bond1 up && ip addr add 10.2.0.1/24 dev bond1",
    );
    r.start(&["--port", "lan", "--port", "bond1"]);
    let mut c = r.connect();
    r.wait_installed(&["bond1 reply", "lan original"], &mut c);
    r.exchange_by_rules(&mut c, 100_000);
}

/// Netfilter shows what a bridge forwards to the forward hook, where it is asked to (by a module that asks
/// in every namespace).
#[test]
fn alone_what_a_bridge_forwards_stays_with_the_bridge() {
    let mut r = Router::new("bridged");
    let host = r.host("lan");
    r.run(&format!(
        "modprobe br_netfilter && sysctl -qw net.bridge.bridge-nf-call-iptables=1
         ip addr flush dev lan; ip addr flush dev wan
         ip link add br0 type bridge && ip link set br0 up && ip addr add 10.2.0.1/24 dev br0
         ip link set lan master br0 && ip link set wan master br0
         ip -n {host} addr flush dev e0 && ip -n {host} addr add 10.2.0.3/24 dev e0"
    ));
    // What br_netfilter shows to the stack's hooks has no netdev of arrival at the end of postrouting:
    // nothing is sighted. That the hooks are shown it at all is counted.
    r.run("nft 'table ip seen { chain c { type filter hook postrouting priority 0; tcp dport 0-65535 counter; }; }'");
    r.start(&PORTS);
    let mut c = r.connect();
    for _ in 0..3 {
        c.exchange(100_000);
        std::thread::sleep(Duration::from_secs(1));
    }
    assert!(!r.run("nft list table ip seen").contains("packets 0 "), "the hook is passed");
    assert_eq!(r.json(&["conn", "show"]), serde_json::json!([]), "nothing is sighted");
    assert_eq!(r.rules("lan") + r.rules("wan"), 0);
}

#[test]
fn tunnels_and_netdevs_that_share_another_are_refused_with_a_reason() {
    let mut r = Router::new("tunnel");
    let host = r.host("wan");
    let tunnel = |r: &Router, kind: &str, local: &str| {
        r.run(&format!(
            "ip link add t0 type {kind} {local} 10.2.0.1 remote 10.2.0.2
             ip addr add 10.9.0.1/24 dev t0 && ip link set t0 up
             ip -n {host} link add t0 type {kind} {local} 10.2.0.2 remote 10.2.0.1
             ip -n {host} addr add 10.9.0.2/24 dev t0 && ip -n {host} link set t0 up"
        ));
    };
    let shared = |r: &Router, kind: &str| {
        r.run(&format!(
            "ip link add link wan name t0 type {kind}
             ip addr add 10.9.0.1/24 dev t0 && ip link set t0 up
             ip -n {host} addr add 10.9.0.2/24 dev e0
             ip -n {host} route replace 10.1.0.0/24 via 10.9.0.1"
        ));
    };
    r.start(&PORTS);
    for (kind, why) in [
        ("gre", "t0 is a gre"),
        ("ipip", "t0 is a ipip"),
        ("vxlan id 7 dstport 4789", "t0 is a vxlan"),
        ("gretap", "t0 is a gretap"),
        ("macvlan", "t0 is a macvlan"),
        ("ipvlan mode l2", "t0 is a ipvlan"),
    ] {
        match kind {
            "macvlan" | "ipvlan mode l2" => shared(&r, kind),
            _ => tunnel(&r, kind, "local"),
        }
        let mut c = r.connect_through("10.9.0.2:5001", "wan", "10.9.0.2:5001");
        r.wait_refused(("lan", "original"), "egress-unsupported", why, &mut c);
        // (An ipvlan gets from the netdev below what is for its own address only.)
        if kind == "macvlan" {
            r.wait_refused(("wan", "reply"), "ingress-unsupported", why, &mut c);
        }
        c.exchange(10_000);
        c.close();
        r.run("ip link del t0; conntrack -D -p tcp --dport 5001 2>/dev/null || true");
        let _ = r.ns.try_run(&format!("ip -n {host} link del t0"));
        let _ = r.ns.try_run(&format!("ip -n {host} addr del 10.9.0.2/24 dev e0"));
    }
    // A route that puts labels on.
    r.run(&format!(
        "modprobe mpls_iptunnel; modprobe mpls_router
         ip route add 10.9.0.2/32 encap mpls 100 via 10.2.0.2 dev wan
         ip netns exec {host} sysctl -qw net.mpls.platform_labels=1000 net.mpls.conf.e0.input=1
         ip -n {host} addr add 10.9.0.2/32 dev lo && ip -n {host} link set lo up
         ip -n {host} -M route add 100 dev lo"
    ));
    let mut c = r.connect_through("10.9.0.2:5001", "wan", "10.9.0.2:5001");
    r.wait_refused(("lan", "original"), "egress-unsupported", "encapsulates", &mut c);
}
