//! The netdevs of the NIC, and rules whose ports change or go.

use super::{Nic, wait_until};

const TO_UDP: &str = "protocol ip flower skip_sw ip_proto udp dst_port 5001";

#[test]
fn all_ports_are_one_switch_and_offload_can_be_switched_off() {
    let nic = Nic::new("switch");
    let id = |i| {
        let text = nic.run(&format!("ip -d -j link show p{i}"));
        let link: serde_json::Value = serde_json::from_str(&text).unwrap();
        link[0]["phys_switch_id"].as_str().map(str::to_owned)
    };
    assert!(id(0).is_some());
    assert_eq!(id(0), id(1));
    assert!(nic.run("ethtool -i p0").contains("driver: simnic"));
    nic.filter(0, &format!("pref 1 {TO_UDP} action drop"));
    let _ = nic.ns.try_run("ethtool -K p0 hw-tc-offload off");
    assert!(nic.run("ethtool -k p0").contains("hw-tc-offload: on"), "there is a rule");
    // The core remembers what was wanted, and does nothing when that is asked for again.
    nic.run(
        "tc filter del dev p0 ingress
         ethtool -K p0 hw-tc-offload on || true
         ethtool -K p0 hw-tc-offload off",
    );
    nic.fails(&format!("tc filter add dev p0 ingress pref 1 {TO_UDP} action drop"));
    assert!(nic.rules(0).is_empty());
    nic.run("ethtool -K p0 hw-tc-offload on");
    nic.filter(0, &format!("pref 1 {TO_UDP} action drop"));
    let host = nic.host(0);
    let wire = nic.run(&format!("ip netns exec {host} ethtool -k w0"));
    for off in ["tx-checksumming", "tcp-segmentation-offload", "hw-tc-offload"] {
        assert!(wire.contains(&format!("{off}: off")), "{wire}");
    }
}

#[test]
fn a_redirect_to_a_port_that_is_down_or_gone_loses_the_frame() {
    let nic = Nic::new("gone");
    let udp = nic.udp();
    nic.route(0, 1, TO_UDP, "pipe action csum ip4h");
    assert!(udp.arrives());
    nic.run("ip link set p1 down");
    assert!(!udp.arrives());
    nic.run("ip link set p1 up");
    wait_until("the link is up", || nic.has_carrier(1));
    assert!(udp.arrives());
    nic.run("ip link del p1");
    assert!(!udp.arrives());
    assert_eq!(nic.counter(0, "target_gone"), 2);
    assert_eq!(nic.rules(0)[0].0, "tc active");
    nic.run("tc filter del dev p0 ingress");
}

#[test]
fn a_port_that_is_down_forwards_nothing() {
    let nic = Nic::new("down");
    let udp = nic.udp();
    nic.route(0, 1, TO_UDP, "pipe action csum ip4h");
    let before = nic.counter(0, "wire_rx");
    nic.run("ip link set p0 down");
    let _ = udp.from.send_to(b"x", "10.1.0.2:5001");
    assert_eq!(nic.counter(0, "wire_rx"), before);
}

#[test]
fn rules_follow_a_shared_block_and_a_port_to_another_namespace() {
    let nic = Nic::new("block");
    nic.run("tc qdisc del dev p0 clsact && tc qdisc add dev p0 ingress_block 7 clsact");
    nic.run(&format!("tc filter add block 7 pref 1 {TO_UDP} action drop"));
    nic.run("tc qdisc del dev p1 clsact && tc qdisc add dev p1 ingress_block 7 clsact");
    assert!(nic.run("tc filter show block 7").contains("in_hw_count 2"));
    assert_eq!((nic.rules(0).len(), nic.rules(1).len()), (1, 1));
    nic.run("tc qdisc del dev p0 clsact");
    assert_eq!((nic.rules(0).len(), nic.rules(1).len()), (0, 1));
    nic.run(&format!("ip link set p1 netns {}", nic.host(0)));
    assert!(nic.rules(1).is_empty(), "the port left its rules behind");
    nic.run(&format!("ip -n {} link del p1", nic.host(0)));
}
