//! What is written, read back by a decoder that others made.

use netlink_bindings::nftables::{
    ChainAttrs, ExprListAttrs, ExprOps, FlowtableAttrs, RuleAttrs, SetAttrs, TableAttrs,
};
use proptest::prelude::*;

use super::key::{ConnId, Key, SetOf, load, load_opposite};
use super::readback::goes_on;
use super::table::describe;
use crate::contract::flow::{Above, Flow, FlowMatch, Forward, MacRewrite};
use crate::contract::types::{Direction, Ifindex, MacAddr, Tuple, Zone};
use crate::netlink::link::Link;
use crate::netlink::netfilter::conntrack::{CtEntry, CtStatus, TcpState};
use crate::netlink::netfilter::nft::*;
use crate::netlink::socket::{Family, Socket};
use crate::netlink::wire::{AttrIter, Message, MessageIter};

fn ifindex(n: u32) -> Ifindex {
    Ifindex::new(n).unwrap()
}

fn built(hardware: bool) -> Vec<u8> {
    let mut socket = Socket::open(Family::Netfilter).unwrap();
    let mut t = Transaction::new(&mut socket);
    let port = Link {
        ifindex: ifindex(7),
        name: "eth0".to_owned(),
        hardware_type: 1,
        kind: None,
        bus: None,
        controller: None,
    };
    describe(&mut t, "ctoffload_flow", &port, hardware);
    t.bytes().to_vec()
}

#[test]
fn the_table_is_what_an_independent_decoder_reads() {
    for hardware in [false, true] {
        let bytes = built(hardware);
        let (mut sets, mut rules) = (Vec::new(), 0);
        for m in MessageIter::new(&bytes) {
            let attrs = m.payload.get(4..).unwrap();
            match m.ty & 0xff {
                NFT_MSG_NEWTABLE => {
                    let t = TableAttrs::new(attrs);
                    assert_eq!(t.get_name().unwrap(), c"ctoffload_flow");
                    assert_eq!(t.get_flags().unwrap(), 2, "it has an owner");
                }
                NFT_MSG_NEWFLOWTABLE => {
                    let f = FlowtableAttrs::new(attrs);
                    assert_eq!(f.get_name().unwrap(), c"f0");
                    assert_eq!(f.get_flags().unwrap(), if hardware { 3 } else { 2 });
                    let hook = f.get_hook().unwrap();
                    assert_eq!((hook.get_num().unwrap(), hook.get_priority().unwrap()), (0, 1000));
                    let devices: Vec<_> = hook.get_devs().unwrap().get_name().collect();
                    assert_eq!(devices, [c"eth0"]);
                }
                NFT_MSG_NEWSET => {
                    let s = SetAttrs::new(attrs);
                    assert_eq!(s.get_flags().unwrap(), 0, "no rule adds elements");
                    let name = s.get_name().unwrap().to_str().unwrap().to_owned();
                    sets.push((name, s.get_key_len().unwrap()));
                }
                NFT_MSG_NEWCHAIN => {
                    let c = ChainAttrs::new(attrs);
                    if c.get_name().unwrap() == c"select" {
                        assert_eq!(c.get_policy().unwrap(), NF_ACCEPT);
                        let hook = c.get_hook().unwrap();
                        let at = (hook.get_num().unwrap(), hook.get_priority().unwrap());
                        assert_eq!(at, (NF_INET_FORWARD, 1000));
                    } else {
                        assert!(c.get_hook().is_err());
                    }
                }
                NFT_MSG_NEWRULE => {
                    rules += 1;
                    let r = RuleAttrs::new(attrs);
                    assert!(r.clone().all(|a| a.is_ok()));
                    let expressions = r.get_expressions().unwrap();
                    assert!(expressions.clone().all(|e| e.is_ok()));
                    let flow = expressions.get_elem().any(|e| {
                        matches!(e.get_data(), Ok(ExprOps::FlowOffload(f)) if f.get_name().unwrap() == c"f0")
                    });
                    assert_eq!(flow, r.get_chain().unwrap() == c"offload");
                }
                NFT_MSG_NEWSETELEM | NFNL_MSG_BATCH_BEGIN => {}
                other => panic!("{other}"),
            }
        }
        let sets: Vec<_> = sets.iter().map(|(n, l)| (&**n, *l)).collect();
        let want = [("ports", 4), ("orig4", 32), ("reply4", 32), ("orig6", 56), ("reply6", 56)];
        assert_eq!(sets, want);
        assert_eq!(rules, 10);
    }
}

/// Sets of one transaction have numbers of their own, and a rule names a set by both.
#[test]
fn rules_look_up_the_sets_that_they_name() {
    let bytes = built(false);
    let all: Vec<_> = MessageIter::new(&bytes).collect();
    let mut sets = std::collections::HashMap::new();
    for m in all.iter().filter(|m| m.ty & 0xff == NFT_MSG_NEWSET) {
        let s = SetAttrs::new(&m.payload[4..]);
        // The decoder leaves it in network order.
        let id = u32::from_be(s.get_id().unwrap());
        assert!(id != 0 && sets.insert(id, s.get_name().unwrap()).is_none(), "{id} twice");
    }
    let mut looked_up = Vec::new();
    for m in all.iter().filter(|m| m.ty & 0xff == NFT_MSG_NEWRULE) {
        let rule = RuleAttrs::new(&m.payload[4..]);
        for e in rule.get_expressions().unwrap().get_elem() {
            if let Ok(ExprOps::Lookup(e)) = e.get_data() {
                // NFTA_LOOKUP_SET_ID, which the decoder takes for another.
                let id = AttrIter::new(e.get_buf()).find_type(4).and_then(|a| a.be32()).unwrap();
                assert_eq!(sets[&id], e.get_set().unwrap());
                looked_up.push(e.get_set().unwrap().to_str().unwrap());
            }
        }
    }
    // Other netdevs; then, for each set: to no port, and between ports.
    let mut wanted = vec!["ports"];
    for (one, other) in
        [("orig4", "reply4"), ("reply4", "orig4"), ("orig6", "reply6"), ("reply6", "orig6")]
    {
        wanted.extend(["ports", one, one, other]);
    }
    assert_eq!(looked_up, wanted);
}

/// Where a register's 4 bytes stand in a key, counted from the first.
fn place_of(register: u32) -> usize {
    usize::try_from(register - 8).unwrap() * 4
}

/// The registers are filled so that the packet's element is the one that was added.
#[test]
fn what_is_loaded_stands_where_the_key_has_it() {
    for (ipv6, tuple) in
        [(false, "udp 10.1.2.3:258 > 10.4.5.6:772"), (true, "udp [1:2:3::4]:258 > [5:6:7::8]:772")]
    {
        let key = Key::new(ifindex(7), &flow(tuple, tuple, Direction::Original));
        let tuple: Tuple = tuple.parse().unwrap();
        let octets = |a: std::net::IpAddr| match a {
            std::net::IpAddr::V4(a) => a.octets().to_vec(),
            std::net::IpAddr::V6(a) => a.octets().to_vec(),
        };
        let mut bytes = Vec::new();
        let mut m = Message::new(&mut bytes, 0, 0, 0);
        load(&mut m, ipv6);
        m.finish();
        let mut expected = vec![0; key.as_ref().len()];
        for e in ExprListAttrs::new(&bytes[16..]).get_elem() {
            let (register, value) = match e.get_data().unwrap() {
                ExprOps::Meta(e) => {
                    let value = match e.get_key().unwrap() {
                        4 => 7u32.to_ne_bytes().to_vec(), // iif
                        5 => 9u32.to_ne_bytes().to_vec(), // oif
                        16 => vec![17],                   // l4proto
                        other => panic!("{other}"),
                    };
                    (e.get_dreg().unwrap(), value)
                }
                ExprOps::Ct(e) => {
                    assert_eq!(e.get_direction().unwrap(), 0);
                    let value = match e.get_key().unwrap() {
                        17 => 3u16.to_ne_bytes().to_vec(),          // zone
                        11 => tuple.sport().to_be_bytes().to_vec(), // proto-src
                        12 => tuple.dport().to_be_bytes().to_vec(), // proto-dst
                        19 | 21 => octets(tuple.src()),
                        20 | 22 => octets(tuple.dst()),
                        other => panic!("{other}"),
                    };
                    (e.get_dreg().unwrap(), value)
                }
                other => panic!("{other:?}"),
            };
            expected[place_of(register)..][..value.len()].copy_from_slice(&value);
        }
        assert_eq!(key.as_ref(), expected);
    }
}

#[test]
fn the_opposite_element_has_the_netdevs_the_other_way_round() {
    let mut bytes = Vec::new();
    let mut m = Message::new(&mut bytes, 0, 0, 0);
    load_opposite(&mut m);
    m.finish();
    let loaded: Vec<_> = ExprListAttrs::new(&bytes[16..])
        .get_elem()
        .map(|e| match e.get_data().unwrap() {
            ExprOps::Meta(e) => (e.get_key().unwrap(), place_of(e.get_dreg().unwrap())),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(loaded, [(5, 0), (4, 4)], "oif, iif");
    for set in SetOf::ALL {
        let opposite = set.opposite();
        assert_eq!((opposite.ipv6, opposite.opposite()), (set.ipv6, set));
        assert_ne!(opposite, set);
    }
}

fn flow(arriving: &str, leaving: &str, direction: Direction) -> Flow {
    Flow {
        zone: Zone(3),
        direction,
        ingress_mtu: 1500,
        matches: FlowMatch { eth_dst: None, vlan: None, tuple: arriving.parse().unwrap() },
        forward: Forward {
            egress: ifindex(9),
            vlan: None,
            mtu: 1500,
            tuple: leaving.parse().unwrap(),
            macs: Some(MacRewrite { src: MacAddr([2; 6]), dst: MacAddr([4; 6]) }),
            egress_decides: false,
        },
        above: Above::default(),
    }
}

/// Both directions of a connection, with source and destination translated.
const THERE: (&str, &str) =
    ("tcp 10.0.0.2:4242 > 192.0.2.1:80", "tcp 192.0.2.9:5000 > 10.0.1.2:8080");
const BACK: (&str, &str) =
    ("tcp 10.0.1.2:8080 > 192.0.2.9:5000", "tcp 192.0.2.1:80 > 10.0.0.2:4242");

#[test]
fn both_directions_name_the_connection_by_its_original_tuple() {
    let there = flow(THERE.0, THERE.1, Direction::Original);
    let back = flow(BACK.0, BACK.1, Direction::Reply);
    assert_eq!(ConnId::of(&there), ConnId::of(&back));
    assert_eq!(ConnId::of(&there).original, THERE.0.parse::<Tuple>().unwrap());
}

#[test]
fn a_key_is_what_the_registers_hold() {
    let key = Key::new(ifindex(7), &flow(THERE.0, THERE.1, Direction::Original));
    assert_eq!(key.set.name(), "orig4");
    let mut want = Vec::new();
    want.extend(7u32.to_ne_bytes()); // meta iif
    want.extend(9u32.to_ne_bytes()); // meta oif
    want.extend([6, 0, 0, 0]); // meta l4proto
    want.extend(3u16.to_ne_bytes()); // ct original zone
    want.extend([0, 0]);
    want.extend([0x10, 0x92, 0, 0]); // ct original proto-src
    want.extend([0, 80, 0, 0]); // ct original proto-dst
    want.extend([10, 0, 0, 2, 192, 0, 2, 1]);
    assert_eq!(key.as_ref(), want);
}

#[test]
fn a_key_names_the_netdevs_that_route() {
    let mut flow = flow(THERE.0, THERE.1, Direction::Original);
    flow.above = Above { iif: Some(ifindex(70)), oif: Some(ifindex(90)) };
    let key = Key::new(ifindex(7), &flow);
    assert_eq!(key.as_ref()[..8], [70u32.to_ne_bytes(), 90u32.to_ne_bytes()].concat());
}

proptest! {
    /// Whatever differs between two flows of a port makes another element.
    #[test]
    fn keys_of_different_connections_differ(
        a in (any::<[u8; 4]>(), any::<u16>(), any::<u16>(), any::<bool>()),
        b in (any::<[u8; 4]>(), any::<u16>(), any::<u16>(), any::<bool>()),
    ) {
        let key = |(ip, sport, zone, udp): ([u8; 4], u16, u16, bool)| {
            let proto = if udp { "udp" } else { "tcp" };
            let ip = std::net::Ipv4Addr::from(ip);
            let tuple = format!("{proto} {ip}:{sport} > 192.0.2.1:80");
            let mut flow = flow(&tuple, &tuple, Direction::Original);
            flow.zone = Zone(zone);
            Key::new(ifindex(7), &flow)
        };
        prop_assert_eq!(key(a) == key(b), a == b);
    }

    #[test]
    fn a_key_of_ipv6_is_as_long_as_its_set_says(src: [u8; 16], dst: [u8; 16], reply: bool) {
        let (src, dst) = (std::net::Ipv6Addr::from(src), std::net::Ipv6Addr::from(dst));
        let tuple = format!("udp [{src}]:1 > [{dst}]:2");
        let direction = if reply { Direction::Reply } else { Direction::Original };
        let key = Key::new(ifindex(1), &flow(&tuple, &tuple, direction));
        let set = SetOf { ipv6: true, direction };
        prop_assert_eq!((key.set, key.as_ref().len()), (set, set.key_len()));
        prop_assert!(SetOf::ALL.contains(&set.opposite()));
    }
}

#[test]
fn an_entry_goes_on_unless_its_connection_is_ending() {
    let entry = |status, tcp_state| CtEntry {
        id: None,
        zone: Zone(0),
        original: THERE.0.parse().unwrap(),
        reply: BACK.0.parse().unwrap(),
        status: CtStatus(status),
        tcp_state,
        tcp_liberal: [true; 2],
        tcp_maxack: [false; 2],
        timeout: None,
        mark: 0,
        labels: None,
        helper: false,
        counters: None,
    };
    assert!(goes_on(&entry(CtStatus::OFFLOAD, Some(TcpState::Established))));
    assert!(goes_on(&entry(CtStatus::OFFLOAD, None)));
    assert!(!goes_on(&entry(CtStatus::OFFLOAD, Some(TcpState::FinWait))));
    assert!(!goes_on(&entry(CtStatus::OFFLOAD | CtStatus::DYING, None)));
    assert!(!goes_on(&entry(CtStatus::ASSURED, Some(TcpState::Established))));
}
