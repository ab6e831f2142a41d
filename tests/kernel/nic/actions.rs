//! What a rule matches and does, frame by frame.

use super::{Nic, PORT};

const TO_UDP: &str = "protocol ip flower skip_sw ip_proto udp dst_port 5001";

#[test]
fn a_rule_drops_traps_or_passes() {
    let nic = Nic::new("gact");
    let udp = nic.udp();
    assert!(udp.arrives(), "the host forwards");
    let host_rx = nic.netdev("p0", "rx").0;
    for (action, arrives) in [("drop", false), ("trap", true), ("pass", true)] {
        nic.filter(0, &format!("pref 1 {TO_UDP} action {action}"));
        let before = nic.netdev("p0", "rx").0;
        assert_eq!(udp.arrives(), arrives, "{action}");
        assert_eq!(nic.netdev("p0", "rx").0 - before, u64::from(arrives), "{action}");
        assert_eq!(nic.counted(0, 1, 0).0, 1, "{action}");
        nic.run("tc filter del dev p0 ingress pref 1");
    }
    assert_eq!(nic.netdev("p0", "rx").0, host_rx + 2);
    assert_eq!(nic.counter(0, "dropped"), 1);
    assert_eq!(nic.counter(0, "trapped"), 2);
}

#[test]
fn the_lowest_preference_wins_and_goto_leads_on() {
    let nic = Nic::new("goto");
    let udp = nic.udp();
    nic.filter(0, &format!("pref 5 {TO_UDP} action drop"));
    nic.filter(0, "pref 4 protocol ip flower skip_sw src_ip 10.0.0.0/24 action goto chain 3");
    nic.filter(0, &format!("chain 3 pref 9 {TO_UDP} action drop"));
    nic.filter(0, "chain 3 pref 8 protocol ip flower skip_sw ip_proto udp src_port 1 action pass");
    assert!(!udp.arrives());
    assert_eq!((nic.counted(0, 4, 0).0, nic.counted(0, 9, 3).0), (1, 1));
    assert_eq!((nic.counted(0, 5, 0).0, nic.counted(0, 8, 3).0), (0, 0));
    nic.run("tc filter del dev p0 ingress chain 3 pref 9");
    assert!(udp.arrives(), "what misses in a later chain is the host's");
    nic.run("tc filter del dev p0 ingress pref 4");
    assert!(!udp.arrives());
    nic.filter(0, &format!("pref 1 {TO_UDP} src_ip 10.0.0.2 action pass"));
    nic.filter(0, &format!("pref 1 {TO_UDP} src_ip 10.0.0.3 action drop"));
    assert!(udp.arrives(), "of one mask the key decides");
}

#[test]
fn a_filter_is_replaced_without_a_gap() {
    let nic = Nic::new("replace");
    let udp = nic.udp();
    nic.filter(0, &format!("pref 1 handle 1 {TO_UDP} action drop"));
    assert!(!udp.arrives());
    nic.run(&format!("tc filter replace dev p0 ingress pref 1 handle 1 {TO_UDP} action pass"));
    assert!(udp.arrives());
    assert_eq!(nic.rules(0).len(), 1);
}

#[test]
fn vlan_tags_are_pushed_popped_and_modified() {
    let nic = Nic::new("vlan");
    let udp = nic.udp();
    // The receiver is behind VLAN 7 as well, the sender can send in VLAN 5.
    let (h0, h1) = (nic.host(0), nic.host(1));
    nic.run(&format!(
        "ip -n {h1} link add link w1 name w1.7 type vlan id 7
         ip -n {h1} link set w1.7 up && ip -n {h1} addr add 10.7.0.2/24 dev w1.7
         ip -n {h0} link add link w0 name w0.5 type vlan id 5
         ip -n {h0} link set w0.5 up && ip -n {h0} addr add 10.5.0.2/24 dev w0.5
         ip -n {h0} neigh add 10.5.0.1 lladdr 02:00:00:00:00:01 dev w0.5
         ip -n {h0} route add 10.55.0.0/16 via 10.5.0.1
         ip -n {h1} addr add 10.55.0.2/32 dev lo"
    ));
    let vlan5 =
        "protocol 802.1q flower skip_sw vlan_id 5 vlan_ethtype ipv4 ip_proto udp dst_ip 10.55.0.2";
    let send = |what: &str| {
        let before = nic.netdev("w1", "rx").1;
        assert!(udp.arrives_at(&format!("10.55.0.2:{PORT}"), 100), "{what}");
        nic.netdev("w1", "rx").1 - before
    };
    let edit = |edit: &str| format!("{edit} pipe action csum ip4h");

    // Routed by the kernel the host knows no VLAN 5.
    assert!(!udp.arrives_at(&format!("10.55.0.2:{PORT}"), 100));
    nic.route(0, 1, vlan5, &edit("pipe action vlan pop"));
    assert_eq!(send("pop"), 142, "untagged");
    nic.run("tc filter del dev p0 ingress pref 1");
    nic.route(0, 1, vlan5, &edit("pipe action vlan modify id 7"));
    assert_eq!(send("modify"), 146, "one tag");
    nic.run("tc filter del dev p0 ingress pref 1");
    nic.route(0, 1, vlan5, &edit("pipe action vlan pop pipe action vlan push id 7"));
    assert_eq!(send("pop and push"), 146, "one tag");
    nic.run("tc filter del dev p0 ingress pref 1");

    // Two tags: the receiver has VLAN 7 inside VLAN 8.
    nic.run(&format!(
        "ip -n {h1} link add link w1 name w1.8 type vlan proto 802.1ad id 8 && ip -n {h1} link set w1.8 up
         ip -n {h1} link add link w1.8 name w1.87 type vlan id 7 && ip -n {h1} link set w1.87 up
         ip -n {h1} addr add 10.87.0.2/24 dev w1.87"
    ));
    nic.route(
        0,
        1,
        vlan5,
        &edit("pipe action vlan modify id 7 pipe action vlan push id 8 protocol 802.1ad"),
    );
    assert_eq!(send("two tags"), 150);
    let got = nic.run(&format!("ip -n {h1} -j -s link show w1.87"));
    assert!(got.contains("\"rx\":{\"bytes\":128,\"packets\":1"), "{got}");
    // A rule for untagged frames is none for tagged ones.
    nic.run("tc filter del dev p0 ingress pref 1");
    nic.route(0, 1, "protocol ip flower skip_sw ip_proto udp dst_ip 10.55.0.2", &edit(""));
    assert!(!udp.arrives_at(&format!("10.55.0.2:{PORT}"), 100));
    assert_eq!(nic.counted(0, 1, 0).0, 0);
}

#[test]
fn what_ends_its_ttl_is_the_hosts() {
    let nic = Nic::new("ttl");
    let udp = nic.udp();
    nic.route(0, 1, TO_UDP, "pipe action csum ip4h");
    udp.from.set_ttl(1).unwrap();
    assert!(!udp.arrives());
    assert_eq!(nic.counted(0, 1, 0).0, 0);
    assert_eq!(nic.counter(0, "exceptions"), 1);
    assert_eq!(nic.nstat(0, "IcmpInTimeExcds"), 1);
    udp.from.set_ttl(2).unwrap();
    assert!(udp.arrives());
    assert_eq!(nic.counted(0, 1, 0).0, 1);
}

#[test]
fn what_is_too_long_for_the_way_out_is_the_hosts() {
    let nic = Nic::new("mtu");
    let udp = nic.udp();
    let host = nic.host(1);
    nic.route(0, 1, TO_UDP, "pipe action csum ip4h");
    nic.run(&format!("ip link set p1 mtu 1000 && ip -n {host} link set w1 mtu 1000"));
    let to = format!("10.1.0.2:{PORT}");
    assert!(udp.arrives_at(&to, 972), "1000 bytes of IP fit");
    assert_eq!(nic.counted(0, 1, 0).0, 1);
    // Linux sends with DF: the host says what fits, and the sender goes by that.
    assert!(!udp.arrives_at(&to, 973));
    assert_eq!(nic.counter(0, "exceptions"), 1);
    let mtu = nic.run(&format!("ip -n {} route get 10.1.0.2", nic.host(0)));
    assert!(mtu.contains("mtu 1000"), "{mtu}");
}

#[test]
fn fragments_have_no_ports() {
    let nic = Nic::new("frag");
    let udp = nic.udp();
    nic.route(0, 2, TO_UDP, "pipe action csum ip4h");
    assert!(udp.arrives_at(&format!("10.1.0.2:{PORT}"), 3000), "by way of the host");
    assert_eq!(nic.counted(0, 2, 0).0, 0);
    nic.filter(0, "pref 1 protocol ip flower skip_sw ip_flags frag/firstfrag action pass");
    assert!(udp.arrives_at(&format!("10.1.0.2:{PORT}"), 3000));
    assert_eq!(nic.counted(0, 1, 0).0, 1, "there is one first fragment");
    // A route that leaves addresses and ports alone takes fragments too.
    nic.run("tc filter del dev p0 ingress");
    nic.route(
        0,
        1,
        "protocol ip flower skip_sw dst_ip 10.1.0.2 ip_flags frag",
        "pipe action csum ip4h",
    );
    let before = nic.netdev("p0", "rx");
    assert!(udp.arrives_at(&format!("10.1.0.2:{PORT}"), 3000));
    assert_eq!(nic.netdev("p0", "rx"), before);
    assert_eq!(nic.counted(0, 1, 0).0, 3);
}

#[test]
fn other_header_fields_are_matched() {
    let nic = Nic::new("keys");
    let udp = nic.udp();
    let matches = [
        "src_mac 02:00:00:00:00:02 dst_mac 02:00:00:00:00:01",
        "dst_mac 02:00:00:00:00:00/ff:ff:ff:ff:ff:00",
        "src_ip 10.0.0.2 dst_ip 10.1.0.0/16",
        "ip_proto udp src_port 5000",
        "ip_tos 0",
        "ip_ttl 64",
        "ip_flags nofrag",
        "indev p0",
    ];
    for rule in matches {
        nic.filter(0, &format!("pref 1 protocol ip flower skip_sw {rule} action drop"));
        assert!(!udp.arrives(), "{rule}");
        nic.run("tc filter del dev p0 ingress");
    }
    let others = [
        "src_mac 02:00:00:00:00:03",
        "src_ip 10.0.0.3",
        "ip_proto udp src_port 5002",
        "ip_tos 0x10",
        "ip_ttl 63",
        "ip_flags frag",
        "ip_proto tcp tcp_flags 0x0/0x5",
    ];
    for rule in others {
        nic.filter(0, &format!("pref 1 protocol ip flower skip_sw {rule} action drop"));
        assert!(udp.arrives(), "{rule}");
        nic.run("tc filter del dev p0 ingress");
    }
    // FIN and RST miss a rule for neither; SYN does not.
    nic.filter(
        0,
        "pref 1 protocol ip flower skip_sw ip_proto tcp tcp_flags 0x0/0x5 action goto chain 1",
    );
    nic.filter(0, "pref 2 protocol ip flower skip_sw ip_proto tcp action pass");
    let c = nic.connect("10.1.0.2");
    assert_eq!(nic.counted(0, 2, 0).0, 0);
    c.close();
    assert_ne!(nic.counted(0, 2, 0).0, 0);
}

#[test]
fn what_the_nic_cannot_do_is_refused_with_a_reason() {
    let nic = Nic::new("refuse");
    let refused = [
        ("protocol ip flower skip_sw ip_proto icmp type 8 action drop", "ICMP"),
        ("protocol ip flower skip_sw ip_proto tcp dst_port 1-9 action drop", "port ranges"),
        ("protocol arp flower skip_sw arp_op request action drop", "ARP"),
        ("protocol ip flower skip_sw enc_key_id 1 action drop", "tunnel key"),
        ("protocol all flower skip_sw num_of_vlans 1 action drop", "number of VLAN tags"),
        ("protocol ip flower skip_sw indev p1 action drop", "another ingress netdev"),
        ("protocol ip flower skip_sw action mirred egress redirect dev lo", "no port of this NIC"),
        ("protocol ip flower skip_sw action mirred egress mirror dev p1", "mirroring"),
        (
            "protocol ip flower skip_sw action police rate 1mbit burst 10k conform-exceed drop/pass",
            "police",
        ),
        (
            "protocol ip flower skip_sw action pedit ex munge ip ihl set 6 pipe action drop",
            "header field",
        ),
        (
            "protocol ip flower skip_sw action pedit ex munge ip tos add 1 pipe action drop",
            "pedit add",
        ),
        (
            "protocol ip flower skip_sw action pedit ex munge ip ttl set 9 pipe action pass",
            "but redirect",
        ),
        (
            "protocol ip flower skip_sw action vlan push id 5 pipe action goto chain 1",
            "but redirect",
        ),
        ("protocol ip flower skip_sw action vlan push id 5", "must end with"),
        ("chain 2 protocol ip flower skip_sw action goto chain 1", "not a later one"),
        ("protocol ip flower skip_sw action drop hw_stats disabled", "hw_stats"),
    ];
    for (rule, reason) in refused {
        let error = nic.fails(&format!("tc filter add dev p0 ingress pref 1 {rule}"));
        assert!(error.contains("simnic: ") && error.contains(reason), "{rule}: {error}");
        assert!(nic.rules(0).is_empty(), "{rule}");
    }
    // Without skip_sw the rule is the kernel's alone.
    nic.filter(0, "pref 1 protocol ip flower ip_proto icmp type 8 action drop");
    assert!(nic.show(0, 1, 0).contains("not_in_hw"));
    let egress = nic.fails("tc filter add dev p0 egress protocol ip flower skip_sw action drop");
    assert!(!egress.is_empty());
}
