//! Each knob does what it says.

use std::time::{Duration, Instant};

use super::{Nic, wait_until};

const TO_UDP: &str = "protocol ip flower skip_sw ip_proto udp dst_port 5001";

/// Adds a rule for some destination, or says why that failed.
fn add(nic: &Nic, n: usize) -> Result<(), String> {
    let rule = format!("protocol ip flower skip_sw ip_proto udp dst_ip 192.0.2.{n} action drop");
    let out = nic.ns.try_run(&format!("tc filter add dev p0 ingress pref 3 {rule}"));
    if out.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&out.stderr).into_owned())
    }
}

#[test]
fn capacity() {
    let nic = Nic::new("capacity");
    nic.set(0, "capacity", "3");
    for n in 1..=3 {
        add(&nic, n).unwrap();
    }
    let error = add(&nic, 4).unwrap_err();
    assert!(error.contains("simnic: the flow table is full"), "{error}");
    assert_eq!(nic.counter(0, "occupied"), 3);
    // Without skip_sw it is the kernel's alone.
    nic.filter(0, "pref 3 protocol ip flower ip_proto udp dst_ip 192.0.2.9 action drop");
    assert!(nic.show(0, 3, 0).contains("not_in_hw"));
    nic.run("tc filter del dev p0 ingress pref 3 handle 1 protocol ip flower");
    add(&nic, 4).unwrap();
    nic.set(0, "capacity", "0");
    add(&nic, 5).unwrap();
}

#[test]
fn insert_latency() {
    let nic = Nic::new("latency");
    nic.set(0, "insert_latency_us", "700000");
    let started = Instant::now();
    add(&nic, 1).unwrap();
    add(&nic, 2).unwrap();
    assert!(started.elapsed() >= Duration::from_millis(1400));
}

#[test]
fn the_nth_insert_fails() {
    let nic = Nic::new("failadd");
    nic.set(0, "fail_insert", "2 12");
    add(&nic, 1).unwrap();
    let error = add(&nic, 2).unwrap_err();
    assert!(error.contains("Cannot allocate memory"), "{error}");
    add(&nic, 2).unwrap();
    nic.set(0, "fail_insert", "1 16 2");
    for _ in 0..2 {
        assert!(add(&nic, 3).unwrap_err().contains("busy"));
    }
    add(&nic, 3).unwrap();
    nic.set(0, "fail_insert", "1 5 0");
    for _ in 0..3 {
        assert!(add(&nic, 4).unwrap_err().contains("Input/output error"));
    }
    nic.set(0, "fail_insert", "0");
    assert_eq!(nic.get(0, "fail_insert"), "0");
    add(&nic, 4).unwrap();
    for wrong in ["1", "x", "1 0", "1 5000"] {
        nic.try_set(0, "fail_insert", wrong).expect_err(wrong);
    }
}

#[test]
fn a_delete_that_fails_leaves_the_rule_acting_until_a_reset() {
    let nic = Nic::new("faildel");
    let udp = nic.udp();
    nic.filter(0, &format!("pref 1 {TO_UDP} action drop"));
    nic.set(0, "fail_delete", "1 5");
    nic.run("tc filter del dev p0 ingress pref 1");
    assert_eq!(nic.rules(0)[0].0, "tc orphan");
    assert!(!udp.arrives());
    assert_eq!(nic.counter(0, "occupied"), 1);
    nic.filter(0, &format!("pref 1 {TO_UDP} action drop"));
    nic.run("tc filter del dev p0 ingress pref 1");
    assert_eq!(nic.rules(0).len(), 1, "the next delete does not fail");
    nic.set(0, "reset", "1");
    assert!(udp.arrives());
    assert!(nic.rules(0).is_empty());
}

#[test]
fn counters_fail_freeze_and_lag() {
    let nic = Nic::new("stats");
    let udp = nic.udp();
    nic.filter(0, &format!("pref 1 {TO_UDP} action drop"));
    let counted = || nic.counted(0, 1, 0).0;
    assert!(!udp.arrives());
    nic.set(0, "fail_stats", "1 5");
    assert_eq!(counted(), 0);
    assert_eq!(counted(), 1);

    nic.set(0, "stats_frozen", "1");
    assert!(!udp.arrives());
    assert_eq!(counted(), 1);
    nic.set(0, "stats_frozen", "0");
    assert_eq!(counted(), 2);

    let immediate = format!("pref 2 {TO_UDP} action drop hw_stats immediate");
    nic.filter(0, &immediate);
    nic.run("tc filter del dev p0 ingress pref 2");
    nic.set(0, "stats_interval_ms", "3600000");
    assert!(!udp.arrives());
    assert_eq!(counted(), 2, "read an hour ago at most");
    let error = nic.fails(&format!("tc filter add dev p0 ingress {immediate}"));
    assert!(error.contains("hw_stats"), "{error}");
    nic.filter(0, &format!("pref 2 {TO_UDP} action drop hw_stats delayed"));
    nic.set(0, "stats_interval_ms", "1");
    wait_until("the counters are read", || counted() == 3);
}

#[test]
fn last_use_is_the_hardwares() {
    let nic = Nic::new("used");
    let udp = nic.udp();
    nic.filter(0, &format!("pref 1 {TO_UDP} action drop"));
    let used = || {
        let text = nic.show(0, 1, 0);
        let line = text.lines().find(|l| l.contains(" used ")).unwrap().to_owned();
        let (_, used) = line.split_once(" used ").unwrap();
        used.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    wait_until("nobody uses it", || used() >= 8);
    assert!(!udp.arrives());
    assert!(used() < 8);
}

#[test]
fn unsupported_keys_and_actions() {
    let nic = Nic::new("unsupported");
    let names = nic.get(0, "unsupported_names");
    assert!(names.lines().count() > 20, "{names}");
    nic.set(0, "unsupported", "match-ports act-redirect act-csum act-ttl");
    assert_eq!(nic.get(0, "unsupported"), "match-ports act-ttl act-csum act-redirect");
    let route = "action pedit ex munge ip ttl add 0xff pipe action csum ip4h pipe action mirred egress redirect dev p1";
    let refused = [
        (TO_UDP, "action drop", "match on ports"),
        ("protocol ip flower skip_sw", "action mirred egress redirect dev p1", "redirecting"),
        ("protocol ip flower skip_sw", "action csum ip4h pipe action drop", "updating checksums"),
        ("protocol ip flower skip_sw", route, "decrementing the TTL"),
    ];
    for (matches, action, reason) in refused {
        let error = nic.fails(&format!("tc filter add dev p0 ingress pref 1 {matches} {action}"));
        assert!(error.contains(reason) && error.contains("not supported"), "{error}");
    }
    nic.filter(0, "pref 1 protocol ip flower skip_sw ip_proto udp action drop");
    nic.set(0, "unsupported", "\n");
    nic.filter(0, &format!("pref 2 {TO_UDP} {route}"));
    nic.try_set(0, "unsupported", "match-everything").expect_err("there is no such name");
}

#[test]
fn silent_rules_are_accepted_and_do_nothing() {
    let nic = Nic::new("silent");
    let udp = nic.udp();
    nic.set(0, "silent", "1");
    nic.filter(0, &format!("pref 1 {TO_UDP} action drop"));
    assert!(nic.show(0, 1, 0).contains("in_hw in_hw_count 1"));
    assert!(udp.arrives());
    assert_eq!((nic.counted(0, 1, 0).0, nic.counter(0, "occupied")), (0, 1));
    nic.run("tc filter del dev p0 ingress pref 1");

    nic.set(0, "silent", "2");
    nic.route(0, 1, TO_UDP, "pipe action csum ip4h");
    assert!(!udp.arrives());
    assert_eq!(nic.counted(0, 1, 0).0, 1, "it counts, and forwards nothing");
    nic.set(0, "silent", "0");
    nic.run("tc filter del dev p0 ingress pref 1");
    nic.route(0, 1, TO_UDP, "pipe action csum ip4h");
    assert!(udp.arrives());
    nic.try_set(0, "silent", "3").expect_err("there are only three");
}

#[test]
fn a_reset_loses_all_rules_and_tells_nobody() {
    let nic = Nic::new("reset");
    let udp = nic.udp();
    nic.set(0, "capacity", "1");
    nic.filter(0, &format!("pref 1 {TO_UDP} action drop"));
    assert!(!udp.arrives());
    nic.set(0, "reset", "1");
    assert!(udp.arrives());
    assert!(nic.show(0, 1, 0).contains("in_hw in_hw_count 1"), "the kernel does not know");
    assert_eq!(nic.counted(0, 1, 0).0, 1, "and its counters stand still");
    assert_eq!((nic.rules(0)[0].0.as_str(), nic.counter(0, "occupied")), ("tc lost", 0));
    // There is room again, and the lost rule can be deleted.
    nic.filter(0, &format!("pref 2 {TO_UDP} action drop"));
    assert!(!udp.arrives());
    nic.run("tc filter del dev p0 ingress pref 1");
    assert_eq!(nic.rules(0).len(), 1);
}

#[test]
fn the_cable_is_pulled() {
    let nic = Nic::new("cable");
    let udp = nic.udp();
    nic.route(0, 1, TO_UDP, "pipe action csum ip4h");
    nic.set(1, "link", "0");
    wait_until("the carrier is gone", || !nic.has_carrier(1));
    assert!(!udp.arrives());
    assert_eq!(nic.counter(0, "target_gone"), 1);
    nic.set(1, "link", "1");
    wait_until("the carrier is back", || nic.has_carrier(1));
    assert!(udp.arrives());
    nic.set(1, "link_flap_ms", "6000");
    wait_until("the carrier is gone", || !nic.has_carrier(1));
    wait_until("the carrier is back", || nic.has_carrier(1));
    assert!(udp.arrives());
}
