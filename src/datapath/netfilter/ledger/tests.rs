use netdev_providers::netlink::wire::{AttrIter, MessageIter};
use netlink_bindings::nftables::{ChainAttrs, ExprOps, RuleAttrs, SetAttrs, TableAttrs};
use proptest::prelude::*;

use super::*;
use crate::datapath::netfilter::unhex;

/// A dump of a set with such keys and eight elements, from a Linux 6.18.
const ELEMENTS: &str = "\
    140300000c0a0200190000000eaa18fb010000050e00010063746f66666c6f61640000000c00020073696768 \
    74656400e40203005c000100140001001000010002000000fb84d7aa01000000440007000a0001006c696d69 \
    74000000340002000c00010000000000000000010c0002000000000000000e10080003000000000108000400 \
    0000000008000500000000005c000100140001001000010003000000fb84d7aa00000000440007000a000100 \
    6c696d6974000000340002000c00010000000000000000010c0002000000000000000e100800030000000001 \
    080004000000000008000500000000005c0001001400010010000100040000005ddc14a50000000044000700 \
    0a0001006c696d6974000000340002000c00010000000000000000010c0002000000000000000e1008000300 \
    00000001080004000000000008000500000000005c0001001400010010000100020000004da4420400000000 \
    440007000a0001006c696d6974000000340002000c00010000000000000000010c0002000000000000000e10 \
    0800030000000001080004000000000008000500000000005c0001001400010010000100030000004da44204 \
    01000000440007000a0001006c696d6974000000340002000c00010000000000000000010c00020000000000 \
    00000e100800030000000001080004000000000008000500000000005c000100140001001000010003000000 \
    5ddc14a501000000440007000a0001006c696d6974000000340002000c00010000000000000000010c000200 \
    0000000000000e100800030000000001080004000000000008000500000000005c0001001400010010000100 \
    0300000067863ce801000000440007000a0001006c696d6974000000340002000c0001000000000000000001 \
    0c0002000000000000000e100800030000000001080004000000000008000500000000005c00010014000100 \
    100001000200000067863ce800000000440007000a0001006c696d6974000000340002000c00010000000000 \
    000000010c0002000000000000000e10080003000000000108000400000000000800050000000000";

fn built(config: &LedgerConfig) -> Vec<u8> {
    built_in(Hook::Inet, config)
}

fn built_in(hook: Hook, config: &LedgerConfig) -> Vec<u8> {
    described(&[hook], config, true)
}

fn described(hooks: &[Hook], config: &LedgerConfig, with_xfrm: bool) -> Vec<u8> {
    let mut socket = Socket::open(Family::Netfilter).unwrap();
    let mut t = Transaction::new(&mut socket);
    for hook in hooks {
        describe(&mut t, config, *hook, with_xfrm);
    }
    t.bytes().to_vec()
}

#[test]
fn the_table_is_what_an_independent_decoder_reads() {
    // In a bridge, and in a kernel without IPsec, without the two on that.
    for (hook, family, with_xfrm, rules) in [
        (Hook::Inet, 1, true, 11),
        (Hook::Inet, 1, false, 9),
        (Hook::Bridge, 7, true, 9),
        (Hook::Bridge, 7, false, 9),
    ] {
        is_read(hook, family, with_xfrm, rules);
    }
}

fn is_read(hook: Hook, family: u8, with_xfrm: bool, want_rules: usize) {
    let config = LedgerConfig { size: 1000, min_bytes: u64::MAX, ..LedgerConfig::default() };
    let bytes = described(&[hook], &config, with_xfrm);
    let mut rules = 0;
    for m in MessageIter::new(&bytes) {
        let attrs = m.payload.get(4..).unwrap();
        if m.ty != NFNL_MSG_BATCH_BEGIN {
            assert_eq!(m.payload[0], family);
            // Made anew, but for the rules, which are appended.
            let made = if m.ty & 0xff == NFT_MSG_NEWRULE { 0xc01 } else { 0x601 };
            assert_eq!(m.flags, made);
        }
        match m.ty & 0xff {
            NFT_MSG_NEWTABLE => {
                let t = TableAttrs::new(attrs);
                assert_eq!(t.get_name().unwrap(), c"ctoffload");
                assert_eq!(t.get_flags().unwrap(), 2);
            }
            NFT_MSG_NEWCHAIN => {
                let c = ChainAttrs::new(attrs);
                let ipsec = c.get_name().unwrap() == c"from-ipsec";
                assert!(ipsec && with_xfrm || c.get_name().unwrap() == c"sight");
                assert_eq!(c.get_type().unwrap(), c"filter");
                assert_eq!(c.get_policy().unwrap(), 1);
                let at = c.get_hook().unwrap();
                let number = if hook == Hook::Inet && !ipsec { 4 } else { 2 };
                assert_eq!(
                    (at.get_num().unwrap(), at.get_priority().unwrap()),
                    (number, 0x7fff_ffff)
                );
            }
            NFT_MSG_NEWSET => {
                let s = SetAttrs::new(attrs);
                let sighted = s.get_name().unwrap() == c"sighted";
                assert_eq!(s.get_key_len().unwrap(), if sighted { 16 } else { 4 });
                assert_eq!(s.get_flags().unwrap(), if sighted { 0x20 } else { 0 });
                let size = s.get_desc().and_then(|d| d.get_size()).ok();
                assert_eq!(size, sighted.then_some(1000));
            }
            NFT_MSG_NEWRULE => {
                rules += 1;
                let r = RuleAttrs::new(attrs);
                let chain = r.get_chain().unwrap();
                assert!(chain == c"sight" || (chain == c"from-ipsec" && hook == Hook::Inet));
                assert!(r.clone().all(|a| a.is_ok()));
                assert!(r.get_expressions().unwrap().all(|e| e.is_ok()));
            }
            NFNL_MSG_BATCH_BEGIN => assert_eq!(m.payload, [0, 0, 0, 10]),
            other => panic!("{other}"),
        }
    }
    assert_eq!(rules, want_rules);
}

/// `nft list` shows keys by the type that the set says it has: four of its numbers, six bits each.
#[test]
fn the_type_of_a_sights_key_is_netdev_number_direction_and_port() {
    let bytes = built(&LedgerConfig::default());
    let types: Vec<_> = MessageIter::new(&bytes)
        .filter(|m| m.ty & 0xff == NFT_MSG_NEWSET)
        .filter_map(|m| m.attrs(4).find_type(NFTA_SET_KEY_TYPE)?.be32())
        .collect();
    // iface_index 20, integer 4, ct_dir 27, and none for a port; the other set is one of netdevs.
    assert_eq!(types, [20, 20 << 18 | 4 << 12 | 27 << 6]);
}

/// One transaction makes the sets of both tables: each has a number of its own.
#[test]
fn sets_of_both_tables_have_numbers_of_their_own() {
    let bytes = described(&Hook::BOTH, &LedgerConfig::default(), true);
    let sets: Vec<_> = MessageIter::new(&bytes)
        .filter(|m| m.ty & 0xff == NFT_MSG_NEWSET)
        .map(|m| {
            let s = SetAttrs::new(&m.payload[4..]);
            // The decoder leaves it in network order.
            (m.payload[0], s.get_name().unwrap().to_owned(), u32::from_be(s.get_id().unwrap()))
        })
        .collect();
    let numbers: std::collections::HashSet<_> = sets.iter().map(|(_, _, id)| *id).collect();
    assert_eq!((sets.len(), numbers.len(), numbers.contains(&0)), (4, 4, false));
    for m in MessageIter::new(&bytes).filter(|m| m.ty & 0xff == NFT_MSG_NEWRULE) {
        for e in RuleAttrs::new(&m.payload[4..]).get_expressions().unwrap().get_elem() {
            if let Ok(ExprOps::Lookup(e)) = e.get_data() {
                // NFTA_LOOKUP_SET_ID, which the decoder takes for another.
                let id = AttrIter::new(e.get_buf()).find_type(4).and_then(|a| a.be32()).unwrap();
                let set = (m.payload[0], e.get_set().unwrap().to_owned(), id);
                assert!(sets.contains(&set), "{set:?}");
            }
        }
    }
}

#[test]
fn bridges_have_a_table_where_it_was_asked_for() {
    let hooks = |bridged| {
        let config = LedgerConfig { bridged, ..LedgerConfig::default() };
        config.hooks().map(|h| h.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(hooks(false), ["inet"]);
    assert_eq!(hooks(true), ["inet", "bridge"]);
}

/// `ct status`, for what cannot be offloaded, for TCP, for RST, for UDP.
#[test]
fn udp_without_a_reply_is_sighted_if_asked_for() {
    let tests_of_status = |one_way_udp| {
        let bytes = built(&LedgerConfig { one_way_udp, ..LedgerConfig::default() });
        let mut tests = 0;
        for m in MessageIter::new(&bytes).filter(|m| m.ty & 0xff == NFT_MSG_NEWRULE) {
            for e in RuleAttrs::new(&m.payload[4..]).get_expressions().unwrap().get_elem() {
                let Ok(ExprOps::Ct(e)) = e.get_data() else { continue };
                tests += u32::from(e.get_key().unwrap() == 2);
            }
        }
        tests
    };
    assert_eq!((tests_of_status(false), tests_of_status(true)), (4, 3));
}

/// Only then is the installation tried again when modules have come.
#[test]
fn what_is_absent_may_come_and_what_was_refused_is_refused() {
    let lacks = |errno| LedgerError::Unsupported {
        what: "a part",
        needs: NEEDS_NFT,
        source: KernelError { errno, extack: None },
    };
    assert!(lacks(Errno::ENOENT).is_of_something_absent());
    assert!(!lacks(Errno::EOPNOTSUPP).is_of_something_absent());
    let source = KernelError { errno: Errno::ENOENT, extack: None };
    assert!(!LedgerError::Refused { what: "a part", source }.is_of_something_absent());
    assert!(!LedgerError::NotPermitted.is_of_something_absent());
}

#[test]
fn what_cannot_be_offloaded_is_told_by_its_status_and_what_is_already_if_asked_for() {
    let masked_with = |bits: u32, config: &LedgerConfig| {
        let (bytes, bits) = (built(config), bits.to_ne_bytes());
        bytes.windows(4).any(|w| w == bits)
    };
    // SEQ_ADJUST, DYING, TEMPLATE, NAT_CLASH, HELPER; and OFFLOAD, HW_OFFLOAD.
    let never = 1 << 6 | 1 << 9 | 1 << 11 | 1 << 12 | 1 << 13;
    let offloaded = never | 1 << 14 | 1 << 15;
    for skip_offloaded in [false, true] {
        let config = LedgerConfig { skip_offloaded, ..LedgerConfig::default() };
        assert_eq!(masked_with(never, &config), !skip_offloaded);
        assert_eq!(masked_with(offloaded, &config), skip_offloaded);
    }
}

/// Their beginnings, byte for byte what `nft` 1.0.6 sends for `meta protocol ip`, `meta protocol ip6`
/// and `meta pkttype != other` in family `bridge`.
#[test]
fn the_tests_of_a_frame_are_the_bytes_of_nft() {
    let meta = |key: &str| {
        format!("240001800900010 06d657461 00000000 14000280 08000200 {key} 0800010000000001")
    };
    let cmp = |op: &str, data: &str| {
        format!("2c000180 08000100636d7000 20000280 0800010000000001 08000200{op} 0c000380 {data}")
    };
    let bytes = built_in(Hook::Bridge, &LedgerConfig::default());
    for (key, op, data) in [
        ("00000001", "00000000", "06000100 08000000"),
        ("00000001", "00000000", "06000100 86dd0000"),
        ("00000013", "00000001", "05000100 03000000"),
    ] {
        let of_nft = unhex(&(meta(key) + &cmp(op, data)));
        assert!(bytes.windows(of_nft.len()).any(|w| w == of_nft), "{key} {data}");
    }
}

#[test]
fn the_test_of_packets_lets_those_pass_that_are_not_counted() {
    let of = |min_packets| built(&LedgerConfig { min_packets, ..LedgerConfig::default() });
    // ct packets into register 1; != 0; htonl; < 20; accept
    let of_nft = unhex(
        "20000180 0700010063740000 14000280 080002000000000e 0800010000000001 \
         2c000180 08000100636d7000 20000280 0800010000000001 0800020000000001 \
         0c000380 0000000000000000",
    );
    let load = &of_nft[..32];
    let with = of(20);
    assert!(with.windows(load.len()).any(|w| w == load));
    assert!(with.windows(8).any(|w| w == 20u64.to_be_bytes()));
    assert!(!of(0).windows(load.len()).any(|w| w == load));
}

/// The rule on bytes, byte for byte what `nft` 1.0.6 sends for `ct bytes < 100000 accept`, less its
/// verdict.
#[test]
fn the_test_of_bytes_is_the_bytes_of_nft() {
    let of_nft = unhex(
        "20000180 0700010063740000 14000280 080002000000000f 0800010000000001 \
         40000180 0e00010062797465 6f72646572000000 2c000280 0800010000000001 \
         0800020000000001 0800030000000001 0800040000000008 0800050000000008 \
         30000180 08000100636d7000 24000280 0800010000000001 0800020000000002 \
         10000380 0c00010000000000000186a0",
    );
    let of = |min_bytes| built(&LedgerConfig { min_bytes, ..LedgerConfig::default() });
    let with = of(100_000);
    assert!(with.windows(of_nft.len()).any(|w| w == of_nft));
    let load = &of_nft[..32];
    assert!(!of(0).windows(load.len()).any(|w| w == load));
}

/// The end of the rule on RST, byte for byte what `nft` 1.0.6 sends for `ct expiration > 10s limit rate 1000/second
/// burst 1000 packets log group 77 snaplen 64 queue-threshold 1`.
#[test]
fn the_rule_on_rst_ends_in_the_bytes_of_nft() {
    let of_nft = unhex(
        "20000180 0700010063740000 14000280 0800020000000005 0800010000000001 \
         40000180 0e00010062797465 6f72646572000000 2c000280 0800010000000001 \
         0800020000000001 0800030000000001 0800040000000004 0800050000000004 \
         2c000180 08000100636d7000 20000280 0800010000000001 0800020000000004 \
         0c000380 0800010000002710 \
         44000180 0a0001006c696d6974000000 34000280 0c00010000000000000003e8 \
         0c0002000000000000000001 08000300000003e8 0800040000000000 0800050000000000 \
         28000180 080001006c6f6700 1c000280 06000100004d0000 0800030000000040 0600040000010000",
    );
    for hook in Hook::BOTH {
        let bytes = built_in(hook, &LedgerConfig { group: 77, ..LedgerConfig::default() });
        assert!(bytes.windows(of_nft.len()).any(|w| w == of_nft), "{hook}");
    }
}

/// The rule on UDP, byte for byte what `nft` 1.0.6 sends for its part that is the same: dynset
/// and log.
#[test]
fn dynset_and_log_are_the_bytes_of_nft() {
    let of_nft = unhex(
        "9c0001800b00010064796e7365740000 8c000280 0800040000000001 0800030000000000 \
         0c0001007369676874656400 0800020000000002 5c000a80 \
         14000180 0c000100636f756e74657200 04000280 44000180 0a0001006c696d6974000000 \
         34000280 0c0001000000000000000001 0c0002000000000000000e10 0800030000000001 \
         0800040000000000 0800050000000000 0800090000000002 \
         28000180080001006c6f6700 1c000280 06000100004d0000 0800030000000040 0600040000010000",
    );
    let bytes = built(&LedgerConfig { group: 77, ..LedgerConfig::default() });
    assert!(bytes.windows(of_nft.len()).any(|w| w == of_nft));
    // The set of the other table has another number; nothing else differs.
    let bridge = built_in(Hook::Bridge, &LedgerConfig { group: 77, ..LedgerConfig::default() });
    let mut of_bridge = of_nft;
    let at = of_bridge.windows(8).position(|w| w == [8, 0, 2, 0, 0, 0, 0, 2]).unwrap();
    of_bridge[at + 7] = 4;
    assert!(bridge.ends_with(&of_bridge));
}

#[test]
fn a_captured_dump_reads() {
    let bytes = unhex(ELEMENTS);
    let m = MessageIter::new(&bytes).next().unwrap();
    // Captured when keys ended with the direction.
    let keys: Vec<_> = element_keys(&m)
        .filter_map(|k| LedgerKey::from_bytes(Hook::Inet, &[k, &[0x1f, 0x90, 0, 0]].concat()))
        .collect();
    assert_eq!(keys.len(), 8);
    let first = LedgerKey {
        hook: Hook::Inet,
        iif: Ifindex::new(2).unwrap(),
        ct_id: CtId(0xfb84_d7aa),
        sport: 8080,
        direction: Direction::Reply,
    };
    assert_eq!(keys[0], first);
}

proptest! {
    #[test]
    fn a_key_reads_back(iif in 1u32..=i32::MAX as u32, id: u32, sport: u16, reply: bool) {
        let direction = if reply { Direction::Reply } else { Direction::Original };
        let (iif, ct_id) = (Ifindex::new(iif).unwrap(), CtId(id));
        let key = LedgerKey { hook: Hook::Bridge, iif, ct_id, sport, direction };
        prop_assert_eq!(LedgerKey::from_bytes(Hook::Bridge, &key.to_bytes()), Some(key));
    }

    #[test]
    fn no_bytes_make_the_readers_panic(b in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = LedgerKey::from_bytes(Hook::Inet, &b);
        for m in MessageIter::new(&b) {
            let _ = element_keys(&m).filter_map(|k| LedgerKey::from_bytes(Hook::Inet, k)).count();
        }
    }

    #[test]
    fn no_damage_to_a_real_dump_makes_the_reader_panic(at in 0usize..788, with: u8) {
        let mut bytes = unhex(ELEMENTS);
        bytes[at] = with;
        for m in MessageIter::new(&bytes) {
            let _ = element_keys(&m).filter_map(|k| LedgerKey::from_bytes(Hook::Inet, k)).count();
        }
    }
}
