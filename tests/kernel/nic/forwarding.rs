//! Whole connections through the hardware, and what the host sees of them.

use std::io::{Read, Write};

use super::{LOST, Nic, PORT};
use crate::wait::{PATIENCE, wait_until};

const LEN: usize = 1 << 20;

/// Counts the host's packets of our TCP connections.
/// Counts what reaches the host before anything in there takes it: also a flowtable in software, which does
/// not leave FIN and RST to the rest (6.14).
fn watch_host(nic: &Nic) {
    nic.run(&format!(
        "nft 'add table netdev seen; add chain netdev seen c {{ type filter hook ingress devices = {{ p0, p1 }} priority -500; }}; add rule netdev seen c meta l4proto tcp th sport {PORT} counter; add rule netdev seen c meta l4proto tcp th dport {PORT} counter'"
    ));
}

fn host_saw(nic: &Nic) -> u64 {
    let text = nic.run("nft list chain netdev seen c");
    let counts = text.split("counter packets ").skip(1);
    counts.map(|t| t.split(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

#[test]
fn a_pair_of_redirects_forwards_a_connection_and_the_host_stands_still() {
    let nic = Nic::new("pair");
    watch_host(&nic);
    let there = format!(
        "protocol ip flower skip_sw dst_mac 02:00:00:00:00:01 ip_proto tcp dst_ip 10.1.0.2 dst_port {PORT} ip_flags nofrag"
    );
    let back = format!(
        "protocol ip flower skip_sw dst_mac 02:00:00:00:01:01 ip_proto tcp src_ip 10.1.0.2 src_port {PORT}"
    );
    nic.route(0, 1, &there, "pipe action csum ip4h");
    nic.route(1, 1, &back, "pipe action csum ip4h");
    let all = ["p0", "p1", "w0", "w1"].map(|d| (d, nic.netdev(d, "rx"), nic.netdev(d, "tx")));
    nic.tcp("10.1.0.2", LEN);

    for (name, rx, tx) in &all[..2] {
        assert_eq!((nic.netdev(name, "rx"), nic.netdev(name, "tx")), (*rx, *tx), "{name}");
    }
    assert_eq!(host_saw(&nic), 0);
    for i in 0..2 {
        let sent = nic.netdev(&format!("w{i}"), "tx");
        let on_wire = (sent.0 - all[2 + i].2.0, sent.1 - all[2 + i].2.1);
        assert!(on_wire.1 > LEN as u64 && on_wire.0 > LEN as u64 / 1460);
        assert_eq!(nic.counted(i, 1, 0), on_wire, "the counters of p{i}'s rule");
        assert_eq!(nic.counter(i, "redirected"), on_wire.0);
        let rule = nic.show(i, 1, 0);
        assert!(rule.contains("in_hw in_hw_count 1") && rule.contains("used_hw_stats"), "{rule}");
    }
}

#[test]
fn a_pair_of_redirects_forwards_ipv6() {
    let nic = Nic::with_ipv6("pair6");
    watch_host(&nic);
    for (i, way) in ["dst_ip fd01::2", "src_ip fd01::2"].iter().enumerate() {
        nic.route(i, 1, &format!("protocol ipv6 flower skip_sw ip_proto tcp {way}"), "");
    }
    nic.tcp("[fd01::2]", LEN);
    assert_eq!(host_saw(&nic), 0);
    for i in 0..2 {
        let (packets, bytes) = nic.counted(i, 1, 0);
        assert_eq!(nic.counter(i, "redirected"), packets);
        assert!(bytes > LEN as u64);
    }
}

#[test]
fn addresses_and_ports_are_translated_and_the_receiver_checks_the_sums() {
    let nic = Nic::new("nat");
    watch_host(&nic);
    // 203.0.113.1:5999 is the server, 198.51.100.1:1024.. is the client for it.
    nic.route(
        0,
        1,
        "protocol ip flower skip_sw ip_proto tcp dst_ip 203.0.113.1 dst_port 5001",
        "munge ip dst set 10.1.0.2 munge ip src set 198.51.100.1 munge tcp dport set 5001 pipe action csum ip4h and tcp",
    );
    nic.route(
        1,
        1,
        "protocol ip flower skip_sw ip_proto tcp dst_ip 198.51.100.1 src_port 5001",
        "munge ip src set 203.0.113.1 munge ip dst set 10.0.0.2 munge tcp sport set 5001 pipe action csum ip4h and tcp",
    );
    nic.tcp("203.0.113.1", LEN);
    assert_eq!(host_saw(&nic), 0);
    let udp = nic.udp();
    let edit = "munge ip dst set 10.1.0.2 munge udp dport set 5001";
    let to = |port| format!("protocol ip flower skip_sw ip_proto udp dst_port {port}");
    nic.route(0, 2, &to(6000), &format!("{edit} pipe action csum ip4h and udp"));
    nic.route(0, 2, &to(6001), &format!("{edit} pipe action csum ip4h"));
    nic.route(0, 2, &to(6002), &format!("{edit} pipe action csum udp"));
    assert!(udp.arrives_at("203.0.113.1:6000", 777));
    assert!(!udp.arrives_at("203.0.113.1:6001", 777), "nobody asked for the UDP checksum");
    assert!(!udp.arrives_at("203.0.113.1:6002", 777), "nobody asked for the IP checksum");
    assert_eq!(nic.counted(0, 2, 0).0, 1);
    assert_eq!((nic.nstat(1, "UdpInCsumErrors"), nic.nstat(1, "IpExtInCsumErrors")), (1, 1));
}

/// A flowtable of both ports, for what is established.
fn flowtable(nic: &Nic, nat: &str) {
    nic.run(&format!(
        "nft -f - <<'END'
         table inet f {{
           flowtable ft {{ hook ingress priority 0; devices = {{ p0, p1 }}; flags offload; }}
           chain forward {{ type filter hook forward priority 0; policy accept;
             meta l4proto {{ tcp, udp }} ct state established flow add @ft; }}
           {nat}
         }}
END"
    ));
}

fn offloads(nic: &Nic, to: &str, client: &str) {
    watch_host(nic);
    let mut c = nic.connect(to);
    wait_until("the connection is in hardware, both ways", || {
        c.exchange(1);
        let entry = nic.run(&format!("conntrack -L -p tcp -s {client} 2>/dev/null || true"));
        let entry6 =
            nic.run(&format!("conntrack -L -f ipv6 -p tcp -s {client} 2>/dev/null || true"));
        (entry + &entry6).contains("[HW_OFFLOAD]")
            && (0..2).all(|i| nic.rules(i).iter().any(|r| r.0 == "ft active"))
    });
    // What was under way to the host's stack at that moment has passed it.
    c.exchange(1);
    let (saw, p0, p1) = (host_saw(nic), nic.netdev("p0", "rx"), nic.netdev("p1", "rx"));
    c.exchange(LEN);
    assert_eq!(host_saw(nic), saw, "the host has seen a packet of it");
    if client.contains('.') {
        assert_eq!((nic.netdev("p0", "rx"), nic.netdev("p1", "rx")), (p0, p1));
    }
    for i in 0..2 {
        let (_, (packets, bytes)) = nic.rules(i)[0].clone();
        assert!(packets > 100 && bytes > LEN as u64, "{packets} packets, {bytes} bytes");
    }
    c.close();
    assert!(host_saw(nic) > saw, "FIN is for the host");
    nic.run("nft delete table inet f");
    assert!((0..2).all(|i| nic.rules(i).is_empty()), "nothing is left of the flowtable's rules");
}

#[test]
fn a_flowtable_is_offloaded_and_says_so_in_conntrack() {
    let nic = Nic::new("ft4");
    flowtable(&nic, "");
    offloads(&nic, "10.1.0.2", "10.0.0.2");
}

#[test]
fn a_flowtable_is_offloaded_with_nat_both_ways() {
    let nic = Nic::new("ftnat");
    flowtable(
        &nic,
        "chain pre { type nat hook prerouting priority -100; ip daddr 203.0.113.1 dnat ip to 10.1.0.2; }
         chain post { type nat hook postrouting priority 100; oifname p1 snat ip to 10.1.0.77; }",
    );
    let host = nic.host(1);
    nic.run(&format!("ip -n {host} neigh add 10.1.0.77 lladdr 02:00:00:00:01:01 dev w1"));
    offloads(&nic, "203.0.113.1", "10.0.0.2");
}

#[test]
fn a_flowtable_is_offloaded_for_ipv6() {
    let nic = Nic::with_ipv6("ft6");
    flowtable(&nic, "");
    offloads(&nic, "[fd01::2]", "fd00::2");
}

#[test]
fn rules_of_tc_come_before_those_of_a_flowtable_on_one_port() {
    let nic = Nic::new("ftandtc");
    flowtable(&nic, "");
    let mut c = nic.connect("10.1.0.2");
    wait_until("the connection is in hardware", || {
        c.exchange(1);
        nic.rules(0).iter().any(|r| r.0 == "ft active")
    });
    nic.filter(0, "pref 1 protocol ip flower skip_sw ip_proto tcp dst_port 5001 action drop");
    let dropped = nic.counter(0, "dropped");
    c.stream.write_all(b"x").unwrap();
    c.stream.set_read_timeout(Some(LOST)).unwrap();
    c.stream.read_exact(&mut [0]).expect_err("TC drops it");
    assert!(nic.counter(0, "dropped") > dropped);
    nic.run("tc filter del dev p0 ingress pref 1");
    c.stream.set_read_timeout(Some(PATIENCE)).unwrap();
    c.stream.read_exact(&mut [0]).expect("it is sent again");
    c.close();
}
