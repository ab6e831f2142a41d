use std::net::{Ipv4Addr, Ipv6Addr};

use netdev_providers::{Tuple, Zone};
use proptest::prelude::*;

use super::*;

fn key(zone: u16, tuple: &str) -> ConnKey {
    ConnKey { zone: Zone(zone), original: tuple.parse().unwrap() }
}

fn never() -> Rule {
    Rule { verdict: Verdict::Never, ..Rule::default() }
}

fn only(rule: Rule) -> Admission {
    Admission { rules: vec![rule], ..Admission::default() }
}

fn nets(list: &[&str]) -> Vec<IpNet> {
    list.iter().map(|n| n.parse().unwrap()).collect()
}

const WEB: &str = "tcp 10.0.0.2:40000 > 198.51.100.7:443";

#[test]
fn without_rules_everything_is_admitted_and_with_the_other_default_nothing() {
    assert_eq!(Admission::default().admit("eth0", &key(0, WEB), &Said::default()), Ok(()));
    let closed = Admission { default: Verdict::Never, ..Admission::default() };
    let refused = closed.admit("eth0", &key(0, WEB), &Said::default()).unwrap_err();
    assert_eq!(refused.reason, Reason::NotAdmitted);
    assert_eq!(
        refused.detail.as_deref(),
        Some("no [[admit]] rule matches, and the default says never")
    );
}

#[test]
fn a_refusal_names_the_first_rule_that_matches() {
    let elsewhere = Rule { line: 3, destination: nets(&["203.0.113.0/24"]), ..never() };
    let port = Rule { line: 7, destination_ports: vec![400..=500], ..never() };
    let all = Rule { line: 11, ..never() };
    let a = Admission { rules: vec![elsewhere, port, all], ..Admission::default() };
    assert_eq!(
        a.admit("eth0", &key(0, WEB), &Said::default()).unwrap_err().detail.as_deref(),
        Some("[[admit]] rule 2, line 7 of the configuration says never")
    );
}

#[test]
fn an_exception_stands_before_what_it_is_an_exception_of() {
    let one = Rule { destination: nets(&["198.51.100.7/32"]), ..Rule::default() };
    let rest = Rule { destination: nets(&["198.51.100.0/24"]), ..never() };
    let a = Admission { rules: vec![one, rest], ..Admission::default() };
    assert_eq!(a.admit("eth0", &key(0, WEB), &Said::default()), Ok(()));
    assert!(
        a.admit("eth0", &key(0, "tcp 10.0.0.2:40000 > 198.51.100.8:443"), &Said::default())
            .is_err()
    );
}

#[test]
fn each_field_is_tested_and_all_must_hold() {
    let rule = Rule {
        netdev: Some(glob::Pattern::new("wan*").unwrap()),
        source: nets(&["10.0.0.0/8"]),
        destination: nets(&["198.51.100.0/24", "2001:db8::/32"]),
        protocol: Some(L4Proto::Tcp),
        source_ports: vec![1024..=65535],
        destination_ports: vec![80..=80, 443..=444],
        zones: vec![0..=0, 5..=9],
        ..never()
    };
    let a = only(rule);
    let refused =
        |port: &str, zone, tuple| a.admit(port, &key(zone, tuple), &Said::default()).is_err();
    assert!(refused("wan2", 0, WEB));
    assert!(refused("wan2", 7, WEB));
    assert!(!refused("lan", 0, WEB));
    assert!(!refused("wan2", 4, WEB));
    assert!(!refused("wan2", 0, "udp 10.0.0.2:40000 > 198.51.100.7:443"));
    assert!(!refused("wan2", 0, "tcp 11.0.0.2:40000 > 198.51.100.7:443"));
    assert!(!refused("wan2", 0, "tcp 10.0.0.2:40000 > 198.51.101.7:443"));
    assert!(!refused("wan2", 0, "tcp 10.0.0.2:40000 > 198.51.100.7:445"));
    assert!(!refused("wan2", 0, "tcp 10.0.0.2:1023 > 198.51.100.7:443"));
    // The original tuple, not any tuple: a server's own connection to the outside is another one.
    assert!(!refused("wan2", 0, "tcp 198.51.100.7:443 > 10.0.0.2:40000"));
}

#[test]
fn a_prefix_of_one_family_holds_nothing_of_the_other() {
    let v6 = key(0, "udp [2001:db8::1]:53 > [2001:db8::2]:53");
    assert_eq!(
        only(Rule { source: nets(&["0.0.0.0/0"]), ..never() }).admit("a", &v6, &Said::default()),
        Ok(())
    );
    assert!(
        only(Rule { source: nets(&["::/0"]), ..never() })
            .admit("a", &v6, &Said::default())
            .is_err()
    );
    let mapped = key(0, "udp [::ffff:10.0.0.1]:53 > [2001:db8::2]:53");
    assert_eq!(
        only(Rule { source: nets(&["10.0.0.0/8"]), ..never() }).admit(
            "a",
            &mapped,
            &Said::default()
        ),
        Ok(())
    );
}

/// Whether the first `len` bits are the same, one by one.
fn holds(net: IpAddr, len: u8, address: IpAddr) -> bool {
    fn bits(a: IpAddr) -> Vec<bool> {
        let bytes = match a {
            IpAddr::V4(a) => a.octets().to_vec(),
            IpAddr::V6(a) => a.octets().to_vec(),
        };
        bytes.iter().flat_map(|b| (0..8).rev().map(move |i| b >> i & 1 == 1)).collect()
    }
    net.is_ipv4() == address.is_ipv4()
        && bits(net).iter().zip(bits(address)).take(len.into()).all(|(a, b)| *a == b)
}

/// Addresses that often share a prefix: few bits differ.
fn address() -> impl Strategy<Value = IpAddr> {
    let near = |bits: u32| 0u32..bits;
    prop_oneof![
        (near(32), any::<bool>()).prop_map(|(bit, flip)| {
            IpAddr::V4(Ipv4Addr::from_bits(0x0a14_1e28 ^ u32::from(flip) << bit))
        }),
        (near(128), any::<bool>()).prop_map(|(bit, flip)| {
            let base = 0x2001_0db8_0000_0000_0000_0000_0000_0001_u128;
            IpAddr::V6(Ipv6Addr::from_bits(base ^ u128::from(flip) << bit))
        }),
    ]
}

type Prefix = (IpAddr, u8);

fn prefix() -> impl Strategy<Value = Prefix> {
    (address(), 0u8..=128).prop_map(|(a, len)| (a, len % if a.is_ipv4() { 33 } else { 129 }))
}

/// A rule as its tests by hand: no prefix type, no pattern type.
#[derive(Clone, Debug)]
struct Plain {
    port: Option<bool>,
    source: Vec<Prefix>,
    destination: Vec<Prefix>,
    protocol: Option<L4Proto>,
    ports: Vec<(u16, u16)>,
    zones: Vec<(u16, u16)>,
    never: bool,
}

impl Plain {
    fn matches(&self, port: &str, k: &ConnKey) -> bool {
        let t = &k.original;
        let within = |list: &[(u16, u16)], n| {
            list.is_empty() || list.iter().any(|(from, to)| *from <= n && n <= *to)
        };
        let inside = |list: &[Prefix], a| {
            list.is_empty() || list.iter().any(|(net, len)| holds(*net, *len, a))
        };
        self.port.is_none_or(|is_wan| port.starts_with("wan") == is_wan)
            && inside(&self.source, t.src())
            && inside(&self.destination, t.dst())
            && (self.protocol.is_none() || self.protocol == Some(t.proto()))
            && within(&self.ports, t.dport())
            && within(&self.zones, k.zone.0)
    }

    fn rule(&self) -> Rule {
        let nets = |list: &[Prefix]| {
            list.iter().map(|(a, len)| IpNet::new(*a, *len).unwrap().trunc()).collect()
        };
        let ranges = |list: &[(u16, u16)]| list.iter().map(|(from, to)| *from..=*to).collect();
        Rule {
            line: 1,
            netdev: self
                .port
                .map(|is_wan| glob::Pattern::new(if is_wan { "wan*" } else { "lan*" }).unwrap()),
            source: nets(&self.source),
            destination: nets(&self.destination),
            protocol: self.protocol,
            source_ports: Vec::new(),
            destination_ports: ranges(&self.ports),
            zones: ranges(&self.zones),
            verdict: if self.never { Verdict::Never } else { Verdict::Offload },
            ..Rule::default()
        }
    }
}

fn proto() -> impl Strategy<Value = L4Proto> {
    prop_oneof![Just(L4Proto::Tcp), Just(L4Proto::Udp)]
}

fn plain() -> impl Strategy<Value = Plain> {
    let prefixes = || proptest::collection::vec(prefix(), 0..3);
    let ranges = || {
        let range = (0u16..8, 0u16..4).prop_map(|(from, more)| (from, from + more));
        proptest::collection::vec(range, 0..3)
    };
    (
        proptest::option::of(any::<bool>()),
        prefixes(),
        prefixes(),
        proptest::option::of(proto()),
        ranges(),
        ranges(),
        any::<bool>(),
    )
        .prop_map(|(port, source, destination, protocol, ports, zones, never)| Plain {
            port,
            source,
            destination,
            protocol,
            ports,
            zones,
            never,
        })
}

proptest! {
    #[test]
    fn a_prefix_holds_the_addresses_whose_first_bits_are_its_own((net, len) in prefix(), a in address()) {
        let ipnet = IpNet::new(net, len).unwrap().trunc();
        prop_assert_eq!(ipnet.contains(&a), holds(net, len, a));
    }

    /// The verdict is that of the first rule that matches when each is asked by hand, alone; what
    /// stands behind it does not matter.
    #[test]
    fn the_first_rule_that_matches_wins(
        rules in proptest::collection::vec(plain(), 0..8),
        never_by_default: bool,
        proto in proto(),
        (src, dst) in (address(), address()),
        dport in 0u16..8,
        zone in 0u16..8,
        port in prop_oneof![Just("wan0"), Just("lan0")],
    ) {
        let Some(original) = Tuple::new(proto, src, 9, dst, dport) else { return Ok(()) };
        let k = ConnKey { zone: Zone(zone), original };
        let default = if never_by_default { Verdict::Never } else { Verdict::Offload };
        let policy = Admission { rules: rules.iter().map(Plain::rule).collect(), default };
        let first = rules.iter().position(|r| r.matches(port, &k));
        let (verdict, by) = policy.verdict(port, &k, &Said::default());
        match first {
            None => prop_assert_eq!((verdict, by), (default, Decider::Default)),
            Some(i) => {
                prop_assert_eq!(by, Decider::Rule { number: i + 1, line: 1 });
                prop_assert_eq!(verdict == Verdict::Never, rules[i].never);
                let cut = Admission { rules: policy.rules[..=i].to_vec(), default };
                prop_assert_eq!(cut.verdict(port, &k, &Said::default()), (verdict, by));
            }
        }
        prop_assert_eq!(policy.admit(port, &k, &Said::default()).is_ok(), verdict == Verdict::Offload);
    }
}

#[test]
fn each_bit_of_what_the_firewall_has_said_is_tested_under_its_mask() {
    let said = Said { ct_mark: 0x15, labels: 1 << 127, mark: 0x8000_0001, dscp: 63 };
    let refused = |rule: Rule| only(rule).admit("a", &key(0, WEB), &said).is_err();
    let masked = |value, mask| Some(Masked { value, mask });
    assert!(refused(Rule { ct_mark: masked(0x10, 0xf0), ..never() }));
    assert!(!refused(Rule { ct_mark: masked(0x10, 0xff), ..never() }));
    assert!(!refused(Rule { ct_mark: masked(0, 0x10), ..never() }));
    assert!(refused(Rule { ct_mark: masked(0, 0), ..never() }), "no bit of it");
    assert!(refused(Rule { mark: masked(0x8000_0000, 0x8000_0000), ..never() }));
    assert!(!refused(Rule { mark: masked(0x8000_0000, u32::MAX), ..never() }));
    let label = |n: u32| Some(Masked { value: 1 << n, mask: 1 << n });
    assert!(refused(Rule { ct_label: label(127), ..never() }));
    assert!(!refused(Rule { ct_label: label(63), ..never() }));
    assert!(refused(Rule { dscp: vec![0..=0, 60..=63], ..never() }));
    assert!(!refused(Rule { dscp: vec![0..=62], ..never() }));
    // Only what a packet has to tell keeps a rule from being adopted.
    assert!(only(Rule { mark: masked(1, 1), ..never() }).looks_at_packets());
    assert!(only(Rule { dscp: vec![0..=0], ..never() }).looks_at_packets());
    assert!(
        !only(Rule { ct_mark: masked(1, 1), ct_label: label(1), ..never() }).looks_at_packets()
    );
}
