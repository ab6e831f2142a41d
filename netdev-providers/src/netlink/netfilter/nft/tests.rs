//! Expressions, elements and messages, read by a decoder that others made, or byte for byte what `nft`
//! 1.0.6 sends, where that decoder does not know them.

use netlink_bindings::nftables::{
    ExprListAttrs, ExprOps, IterableExprListAttrs, IterableExprLookupAttrs, RuleAttrs, SetAttrs,
    SetelemListAttrs,
};
use nix::errno::Errno;

use super::expr::{self, Cmp, NFT_REG_1, NFT_REG32_01};
use super::set::{element_keys, element_packets, elements};
use super::table::{self, NetdevSet};
use super::*;
use crate::contract::types::{Direction, Ifindex};
use crate::netlink::error::KernelError;
use crate::netlink::netfilter::unhex;
use crate::netlink::socket::{CREATE, EXCL, Family, Socket};
use crate::netlink::wire::{AttrIter, MessageIter};

/// What is written, without the header of a message.
fn written(fill: impl FnOnce(&mut Message<'_>)) -> Vec<u8> {
    let mut buf = Vec::new();
    let mut m = Message::new(&mut buf, 0, 0, 0);
    fill(&mut m);
    m.finish();
    buf.split_off(16)
}

/// Register, number of the set, flags. The specification that the decoder is made from numbers them
/// otherwise than the kernel does (`enum nft_lookup_attributes`).
fn looked_up(e: &IterableExprLookupAttrs<'_>) -> (u32, u32, u32) {
    let attrs = AttrIter::new(e.get_buf());
    let number = |ty| attrs.find_type(ty).and_then(|a| a.be32());
    (number(2).unwrap(), number(4).unwrap(), number(5).unwrap_or(0))
}

/// The one expression that was written.
fn expression(fill: impl FnOnce(&mut Message<'_>), read: impl FnOnce(ExprOps<'_>)) {
    let bytes = written(fill);
    let list: IterableExprListAttrs<'_> = ExprListAttrs::new(&bytes);
    let mut elems = list.get_elem();
    read(elems.next().unwrap().get_data().unwrap());
    assert!(elems.next().is_none());
}

#[test]
fn what_loads_a_register_says_what_and_into_which() {
    expression(
        |m| expr::meta(m, expr::NFT_META_OIF, NFT_REG32_01),
        |e| {
            let ExprOps::Meta(e) = e else { panic!("{e:?}") };
            assert_eq!((e.get_key().unwrap(), e.get_dreg().unwrap()), (5, 9));
        },
    );
    expression(
        |m| expr::ct(m, expr::NFT_CT_STATUS, NFT_REG_1),
        |e| {
            let ExprOps::Ct(e) = e else { panic!("{e:?}") };
            assert_eq!((e.get_key().unwrap(), e.get_dreg().unwrap()), (2, 1));
            assert!(e.get_direction().is_err());
        },
    );
    for (direction, number) in [(Direction::Original, 0), (Direction::Reply, 1)] {
        expression(
            |m| expr::ct_of(m, expr::NFT_CT_ZONE, direction, NFT_REG32_01),
            |e| {
                let ExprOps::Ct(e) = e else { panic!("{e:?}") };
                assert_eq!((e.get_key().unwrap(), e.get_dreg().unwrap()), (17, 9));
                assert_eq!(e.get_direction().unwrap(), number);
            },
        );
    }
    expression(
        |m| expr::payload(m, expr::NFT_PAYLOAD_TRANSPORT_HEADER, 13, 1),
        |e| {
            let ExprOps::Payload(e) = e else { panic!("{e:?}") };
            assert_eq!((e.get_dreg().unwrap(), e.get_base().unwrap()), (1, 2));
            assert_eq!((e.get_offset().unwrap(), e.get_len().unwrap()), (13, 1));
        },
    );
}

#[test]
fn what_tests_a_register_says_how() {
    expression(
        |m| expr::cmp(m, Cmp::Neq, &[1, 2]),
        |e| {
            let ExprOps::Cmp(e) = e else { panic!("{e:?}") };
            assert_eq!((e.get_sreg().unwrap(), e.get_op().unwrap()), (1, 1));
            assert_eq!(e.get_data().unwrap().get_value().unwrap(), [1, 2]);
        },
    );
    expression(
        |m| expr::mask(m, &[0xf0, 0, 1, 2]),
        |e| {
            let ExprOps::Bitwise(e) = e else { panic!("{e:?}") };
            assert_eq!((e.get_sreg().unwrap(), e.get_dreg().unwrap()), (1, 1));
            assert_eq!(e.get_len().unwrap(), 4);
            assert_eq!(e.get_mask().unwrap().get_value().unwrap(), [0xf0, 0, 1, 2]);
            assert_eq!(e.get_xor().unwrap().get_value().unwrap(), [0; 4]);
        },
    );
    for inverted in [false, true] {
        let lookup = if inverted { expr::lookup_not } else { expr::lookup };
        expression(
            |m| lookup(m, "ports", 3),
            |e| {
                let ExprOps::Lookup(e) = e else { panic!("{e:?}") };
                assert_eq!(e.get_set().unwrap(), c"ports");
                assert_eq!(looked_up(&e), (1, 3, u32::from(inverted)));
            },
        );
    }
}

#[test]
fn what_ends_a_rule_says_where_packets_go() {
    let verdict = |fill: fn(&mut Message<'_>), code: i32, chain: Option<&std::ffi::CStr>| {
        expression(fill, |e| {
            let ExprOps::Immediate(e) = e else { panic!("{e:?}") };
            assert_eq!(e.get_dreg().unwrap(), 0);
            let verdict = e.get_data().unwrap().get_verdict().unwrap();
            assert_eq!(verdict.get_code().unwrap().cast_signed(), code);
            assert_eq!(verdict.get_chain().ok(), chain);
        });
    };
    verdict(expr::accept, 1, None);
    verdict(|m| expr::goto(m, "offload"), -4, Some(c"offload"));
    expression(
        |m| expr::flow_offload(m, "f7"),
        |e| {
            let ExprOps::FlowOffload(e) = e else { panic!("{e:?}") };
            assert_eq!(e.get_name().unwrap(), c"f7");
        },
    );
    expression(
        |m| expr::log(m, 0x4d, 64),
        |e| {
            let ExprOps::Log(e) = e else { panic!("{e:?}") };
            assert_eq!((e.get_group().unwrap(), e.get_snaplen().unwrap()), (0x4d, 64));
            assert_eq!(e.get_qthreshold().unwrap(), 1);
        },
    );
}

/// `rt ipsec`; `ct bytes < 100000` between load and comparison; `add @sighted { ... }`.
#[test]
fn what_the_decoder_does_not_know_is_the_bytes_of_nft() {
    let rt = "20000180 0700010072740000 14000280 0800020000000004 0800010000000001";
    assert_eq!(written(|m| expr::rt(m, expr::NFT_RT_XFRM, NFT_REG_1)), unhex(rt));
    let byteorder = "\
        40000180 0e00010062797465 6f72646572000000 2c000280 0800010000000001 \
        0800020000000001 0800030000000001 0800040000000008 0800050000000008";
    assert_eq!(written(expr::to_be64), unhex(byteorder));
    let dynset = "\
        9c0001800b00010064796e7365740000 8c000280 0800040000000001 0800030000000000 \
        0c0001007369676874656400 0800020000000002 5c000a80 \
        14000180 0c000100636f756e74657200 04000280 44000180 0a0001006c696d6974000000 \
        34000280 0c0001000000000000000001 0c0002000000000000000e10 0800030000000001 \
        0800040000000000 0800050000000000 0800090000000002";
    assert_eq!(written(|m| expr::add_counting_once_an_hour(m, "sighted", 2)), unhex(dynset));
}

#[test]
fn elements_are_named_by_table_set_and_key() {
    let keys = [[1, 2, 3, 4], [5, 6, 7, 8]];
    let bytes = written(|m| elements(m, "t", "s", keys.iter()));
    let list = SetelemListAttrs::new(&bytes);
    assert_eq!((list.get_table().unwrap(), list.get_set().unwrap()), (c"t", c"s"));
    let told: Vec<_> = list
        .get_elements()
        .unwrap()
        .get_elem()
        .map(|e| e.get_key().unwrap().get_value().unwrap().to_vec())
        .collect();
    assert_eq!(told, keys);
}

/// A message of a dump: with each element the numbers that its counters say, each behind a `limit`.
fn dump(elements: &[(&[u8], &[u64])]) -> Vec<u8> {
    const KEY: u16 = 1;
    const EXPRESSIONS: u16 = 11;
    let mut buf = Vec::new();
    let mut m = Message::new(&mut buf, msg_type(SUBSYS_NFTABLES, NFT_MSG_NEWSETELEM), 0, 1);
    m.raw(&nfgenmsg(NFPROTO_INET, 0)).str(set::NFTA_SET_ELEM_LIST_SET, "sighted");
    m.nested(set::NFTA_SET_ELEM_LIST_ELEMENTS, |m| {
        for (key, counters) in elements {
            m.nested(NFTA_LIST_ELEM, |m| {
                m.nested(KEY, |m| _ = m.attr(NFTA_DATA_VALUE, key));
                m.nested(EXPRESSIONS, |m| {
                    for packets in *counters {
                        m.nested(NFTA_LIST_ELEM, |m| {
                            m.str(1, "limit").nested(2, |m| _ = m.be64(1, 99).be64(2, 98));
                        });
                        // Bytes, packets.
                        m.nested(NFTA_LIST_ELEM, |m| {
                            let data = |m: &mut Message<'_>| _ = m.be64(1, 1).be64(2, *packets);
                            m.str(1, "counter").nested(2, data);
                        });
                    }
                });
            });
        }
        // Padding of the kernel's.
        m.attr(NFTA_LIST_ELEM + 1, &[]);
    });
    m.finish();
    buf
}

#[test]
fn a_dump_tells_the_keys_and_what_their_counters_have_counted() {
    let buf = dump(&[(&[1, 2], &[7]), (&[3, 4], &[]), (&[5, 6], &[1 << 40])]);
    let m = MessageIter::new(&buf).next().unwrap();
    assert_eq!(element_keys(&m).collect::<Vec<_>>(), [[1, 2], [3, 4], [5, 6]]);
    let counted: Vec<_> = element_packets(&m).collect();
    assert_eq!(counted, [(&[1, 2][..], 7), (&[5, 6], 1 << 40)], "one has no counter");
    let buf = dump(&[]);
    let m = MessageIter::new(&buf).next().unwrap();
    assert_eq!((element_keys(&m).count(), element_packets(&m).count()), (0, 0));
}

const STEP: Step = Step::new("a step", "nothing");

/// Type, flags, family and attributes of each message of a transaction, without its beginning.
fn messages(fill: impl FnOnce(&mut Transaction<'_>)) -> Vec<(u16, u16, u8, Vec<u8>)> {
    let mut socket = Socket::open(Family::Netfilter).unwrap();
    let mut t = Transaction::new(&mut socket);
    fill(&mut t);
    let all: Vec<_> = MessageIter::new(t.bytes()).collect();
    assert_eq!((all[0].ty, all[0].flags), (NFNL_MSG_BATCH_BEGIN, REQUEST));
    assert_eq!(all[0].payload, [0, 0, 0, 10], "of nf_tables");
    // One number after the other: answers are told apart by them.
    assert!(all.windows(2).all(|pair| pair[1].seq == pair[0].seq + 1));
    all[1..]
        .iter()
        .map(|m| {
            assert_eq!(m.ty >> 8, 10);
            (m.ty & 0xff, m.flags, m.payload[0], m.payload[4..].to_vec())
        })
        .collect()
}

#[test]
fn messages_are_of_the_family_that_was_named_last() {
    let told = messages(|t| {
        t.add(STEP, 3, 0, |_| {});
        t.of_family(NFPROTO_BRIDGE);
        t.add(STEP, 4, CREATE, |m| _ = m.u8(1, 9));
        t.add(STEP, 5, 0, |_| {});
    });
    let head: Vec<_> = told.iter().map(|(ty, flags, family, _)| (*ty, *flags, *family)).collect();
    assert_eq!(head, [(3, 1, NFPROTO_INET), (4, 0x401, NFPROTO_BRIDGE), (5, 1, NFPROTO_BRIDGE)]);
    assert_eq!(told[1].3, [5, 0, 1, 0, 9, 0, 0, 0].map(|b: u8| b));
}

/// What is made must not be there yet; what is put in may; what is deleted has neither flag.
#[test]
fn what_is_made_is_made_anew() {
    let ports = NetdevSet { name: "ports", id: 3 };
    let eth = [7, 9].map(|n| Ifindex::new(n).unwrap());
    let told = messages(|t| {
        table::make_owned(t, STEP, "t");
        ports.make(t, STEP, "t");
        ports.add(t, STEP, "t", &eth);
        ports.delete(t, STEP, "t", &eth[..1]);
        table::make_base_chain(t, STEP, "t", "c", (NF_INET_FORWARD, -5));
        table::append_rule(t, STEP, "t", "c", |m| {
            ports.if_in(m, expr::NFT_META_IIF);
            ports.unless_in(m, expr::NFT_META_OIF);
        });
        table::delete(t, STEP, "t");
    });
    let head: Vec<_> = told.iter().map(|(ty, flags, ..)| (*ty, flags & !REQUEST)).collect();
    let wanted = [
        (NFT_MSG_NEWTABLE, CREATE | EXCL),
        (NFT_MSG_NEWSET, CREATE | EXCL),
        (NFT_MSG_NEWSETELEM, CREATE),
        (NFT_MSG_DELSETELEM, 0),
        (NFT_MSG_NEWCHAIN, CREATE | EXCL),
        (NFT_MSG_NEWRULE, CREATE | APPEND),
        (NFT_MSG_DELTABLE, 0),
    ];
    assert_eq!(head, wanted);

    let set = SetAttrs::new(&told[1].3);
    // The decoder leaves it in network order.
    assert_eq!((set.get_name().unwrap(), set.get_id().map(u32::from_be).unwrap()), (c"ports", 3));
    assert_eq!(set.get_key_len().unwrap(), 4);
    let keys = |n: usize| {
        let list = SetelemListAttrs::new(&told[n].3);
        assert_eq!(list.get_set().unwrap(), c"ports");
        let key = |e: netlink_bindings::nftables::IterableSetelemAttrs<'_>| {
            e.get_key().unwrap().get_value().unwrap().to_vec()
        };
        list.get_elements().unwrap().get_elem().map(key).collect::<Vec<_>>()
    };
    // As the registers have them: in host order.
    assert_eq!(keys(2), [7u32.to_ne_bytes(), 9u32.to_ne_bytes()]);
    assert_eq!(keys(3), [7u32.to_ne_bytes()]);

    let rule = RuleAttrs::new(&told[5].3);
    assert_eq!((rule.get_table().unwrap(), rule.get_chain().unwrap()), (c"t", c"c"));
    let all: Vec<_> =
        rule.get_expressions().unwrap().get_elem().map(|e| e.get_data().unwrap()).collect();
    let [ExprOps::Meta(iif), ExprOps::Lookup(is), ExprOps::Meta(oif), ExprOps::Lookup(not)] =
        &all[..]
    else {
        panic!("{all:?}")
    };
    assert_eq!((iif.get_key().unwrap(), oif.get_key().unwrap()), (4, 5));
    assert_eq!((looked_up(is), looked_up(not)), ((1, 3, 0), (1, 3, 1)));
}

#[test]
fn the_first_that_was_refused_is_told() {
    let no = |errno| Err(KernelError { errno, extack: None });
    let step = |what| Step::new(what, "nothing");
    assert_eq!(first_refusal(vec![]), None);
    assert_eq!(first_refusal(vec![(step("a"), Ok(())), (step("b"), Ok(()))]), None);
    let answers =
        vec![(step("a"), Ok(())), (step("b"), no(Errno::EBUSY)), (step("c"), no(Errno::EPERM))];
    let (which, e) = first_refusal(answers).unwrap();
    assert_eq!((which.what, e.errno), ("b", Errno::EBUSY));
}

#[test]
fn a_transaction_of_nothing_is_not_sent() {
    let mut socket = Socket::open(Family::Netfilter).unwrap();
    let before = socket.next_seq();
    assert_eq!(Transaction::new(&mut socket).commit().unwrap(), []);
    assert_eq!(socket.next_seq(), before + 2);
}
