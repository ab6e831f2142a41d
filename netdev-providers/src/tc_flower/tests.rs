//! The bytes: against an encoder and a decoder generated from the kernel's own specifications, against
//! a model of what the kernel does with them, and as a real kernel gave them back.

use std::net::IpAddr;
use std::num::NonZeroU32;

use netlink_bindings::tc;
use netlink_bindings::tc::{ActOptionsMsg, OptionsMsg};
use proptest::prelude::*;

use super::actions::{Action, ActionList, NatForm};
use super::bpf::tests::not_loaded;
use super::encode::flow_keys;
use super::parse::Filter;
use super::prios::{Prios, Use};
use super::rule::{self, Form, Place};
use super::template::{Subject, Templates};
use super::uapi::*;
use super::{guard, rule::rule_id, rule::split_rule_id};
use crate::contract::flow::{Above, Flow, FlowMatch, Forward, MacRewrite};
use crate::contract::provider::Counters;
use crate::contract::types::{
    Cookie, Direction, Epoch, Ifindex, Instance, L4Proto, MacAddr, Tuple, VlanId, Zone,
};
use crate::netlink::wire::{AttrIter, Message, MessageIter, Received};

mod requests;

fn cookie() -> Cookie {
    let instance = Instance(NonZeroU32::new(0x1234_5678).unwrap());
    Cookie { instance, epoch: Epoch(7), direction: Direction::Reply }
}

fn place(family: Family) -> Place {
    let prio = Prios::new(0xc100).unwrap().of(Use::Flows, family);
    Place { ifindex: Ifindex::new(2).unwrap(), prio, family }
}

fn handle(n: u32) -> Handle {
    Handle(NonZeroU32::new(n).unwrap())
}

fn example() -> Flow {
    let tuple: Tuple = "tcp 10.0.1.2:4000 > 10.0.2.2:80".parse().unwrap();
    Flow {
        zone: Zone(0),
        direction: Direction::Reply,
        ingress_mtu: 1500,
        matches: FlowMatch { eth_dst: Some(MacAddr([2, 0, 0, 0, 1, 1])), vlan: None, tuple },
        forward: Forward {
            egress: Ifindex::new(3).unwrap(),
            vlan: None,
            mtu: 1500,
            tuple,
            macs: Some(MacRewrite {
                src: MacAddr([2, 0, 0, 0, 2, 1]),
                dst: MacAddr([2, 0, 0, 0, 2, 2]),
            }),
            egress_decides: false,
        },
        above: Above::default(),
    }
}

prop_compose! {
    fn any_mac()(m: [u8; 6]) -> MacAddr {
        MacAddr(m)
    }
}

prop_compose! {
    fn any_flow()(
        udp: bool,
        v6: bool,
        a: [[u8; 16]; 4],
        // Equal ports on both sides are as likely as not, so that NAT of one port only occurs.
        ports: [u16; 4],
        keep: [bool; 4],
        eth_dst in proptest::option::of(any_mac()),
        macs in proptest::option::of((any_mac(), any_mac())),
        egress in 1u32..0x7fff_ffff,
        vlans in [proptest::option::of(1u16..4095), proptest::option::of(1u16..4095)],
        mtu in 1400u32..1600,
    ) -> Flow {
        let ip = |x: [u8; 16]| -> IpAddr {
            if v6 { x.into() } else { [x[0], x[1], x[2], x[3]].into() }
        };
        let proto = if udp { L4Proto::Udp } else { L4Proto::Tcp };
        let from = (ip(a[0]), ports[0], ip(a[1]), ports[1]);
        let to = (
            if keep[0] { from.0 } else { ip(a[2]) },
            if keep[1] { from.1 } else { ports[2] },
            if keep[2] { from.2 } else { ip(a[3]) },
            if keep[3] { from.3 } else { ports[3] },
        );
        let tuple = |t: (IpAddr, u16, IpAddr, u16)| Tuple::new(proto, t.0, t.1, t.2, t.3).unwrap();
        Flow {
            zone: Zone(0),
            direction: Direction::Original,
            ingress_mtu: 1500,
            matches: FlowMatch { eth_dst, vlan: vlans[0].and_then(VlanId::new), tuple: tuple(from) },
            forward: Forward {
                egress: Ifindex::new(egress).unwrap(),
                vlan: vlans[1].and_then(VlanId::new),
                mtu,
                tuple: tuple(to),
                macs: macs.map(|(src, dst)| MacRewrite { src, dst }),
                egress_decides: false,
            },
            above: Above::default(),
        }
    }
}

/// The message that adds the flow, for hardware, where no program is needed for NAT.
fn add_message(flow: &Flow, flags: u32) -> Vec<u8> {
    let nat = flow.has_nat().then_some(NatForm::Hardware);
    let form = Form { flags, nat, header: None, percpu_stats: true };
    let mut buf = Vec::new();
    let family = Family::of(&flow.matches);
    rule::add(&mut buf, 9, place(family), handle(5), flow, cookie(), form);
    buf
}

fn only_message(buf: &[u8]) -> Received<'_> {
    let mut messages = MessageIter::new(buf);
    let m = messages.next().unwrap();
    assert_eq!(messages.next(), None);
    m
}

#[test]
fn a_whole_message_is_what_the_kernel_took() {
    let want = "\
        70010000 2c00 0106 09000000 00000000 00000000 02000000 05000000 f2ffffff 080004c1 \
        0b000100 666c6f77657200 00 4001 0200 \
        06000800 0800 0000 0a000400 020000000101 0000 0a000500 ffffffffffff 0000 \
        05000900 06 000000 08000a00 0a000102 08000b00 ffffffff 08000c00 0a000202 08000d00 ffffffff \
        06001200 0fa0 0000 06002300 ffff 0000 06001300 0050 0000 06002400 ffff 0000 \
        08002f00 00000000 08003000 00000001 06004700 0010 0000 06004800 0017 0000 08001600 01000000";
    let want: String = want.split_whitespace().collect();
    let got: String =
        add_message(&example(), TCA_CLS_FLAGS_SKIP_HW).iter().map(|b| format!("{b:02x}")).collect();
    if cfg!(target_endian = "little") {
        // Lengths, which stand in the first word and in TCA_OPTIONS, cover the actions too.
        assert_eq!(&got[8..72], &want[8..72]);
        let keys = want.find("06000800").unwrap();
        assert_eq!(&got[keys..want.len()], &want[keys..]);
    }
}

proptest! {
    #[test]
    fn match_keys_are_those_of_the_generated_encoder(flow in any_flow()) {
        let mut ours = Vec::new();
        let mut m = Message::new(&mut ours, 0, 0, 0);
        flow_keys(&mut m, &flow.matches);
        m.finish();

        let t = flow.matches.tuple;
        let mut theirs = Vec::new();
        let mut p = tc::PushFlowerAttrs::new(&mut theirs)
            .push_key_eth_type(Family::of(&flow.matches).ethertype());
        if let Some(vlan) = flow.matches.vlan {
            // The generated encoder has the id in network order; the kernel reads it in host order
            // (`nla_get_u16` in `fl_set_key_vlan`).
            p = p.push_key_vlan_id(vlan.get().to_be());
            p = p.push_key_vlan_eth_type(if t.is_ipv6() { 0x86dd } else { 0x0800 });
        }
        if let Some(mac) = flow.matches.eth_dst {
            p = p.push_key_eth_dst(&mac.0).push_key_eth_dst_mask(&[0xff; 6]);
        }
        p = p.push_key_ip_proto(t.proto().number());
        p = match (t.src(), t.dst()) {
            (IpAddr::V4(s), IpAddr::V4(d)) => p
                .push_key_ipv4_src(s)
                .push_key_ipv4_src_mask([0xff; 4].into())
                .push_key_ipv4_dst(d)
                .push_key_ipv4_dst_mask([0xff; 4].into()),
            (IpAddr::V6(s), IpAddr::V6(d)) => p
                .push_key_ipv6_src(&s.octets())
                .push_key_ipv6_src_mask(&[0xff; 16])
                .push_key_ipv6_dst(&d.octets())
                .push_key_ipv6_dst_mask(&[0xff; 16]),
            _ => unreachable!(),
        };
        p = match t.proto() {
            L4Proto::Tcp => p
                .push_key_tcp_src(t.sport())
                .push_key_tcp_src_mask(0xffff)
                .push_key_tcp_dst(t.dport())
                .push_key_tcp_dst_mask(0xffff),
            L4Proto::Udp => p
                .push_key_udp_src(t.sport())
                .push_key_udp_src_mask(0xffff)
                .push_key_udp_dst(t.dport())
                .push_key_udp_dst_mask(0xffff),
        };
        p = p.push_key_flags(0).push_key_flags_mask(1);
        if t.proto() == L4Proto::Tcp {
            p = p.push_key_tcp_flags(0x10).push_key_tcp_flags_mask(0x17);
        }
        p.end_nested();
        // The generated encoder leaves the last attribute without its padding.
        theirs.resize(theirs.len().next_multiple_of(4), 0);
        prop_assert_eq!(&ours[16..], &theirs[..]);
    }

    #[test]
    fn the_generated_decoder_understands_every_action(flow in any_flow(), flags in 0u32..3) {
        let buf = add_message(&flow, flags);
        let m = only_message(&buf);
        prop_assert_eq!((m.ty, m.flags, m.seq), (44, 0x601, 9));
        let (header, attrs) = tc::OpNewtfilterDo::decode_request(m.payload);
        let v6 = flow.matches.tuple.is_ipv6();
        prop_assert_eq!(header.ifindex, 2);
        prop_assert_eq!(header.handle, 5);
        prop_assert_eq!(header.parent, 0xffff_fff2);
        let tagged = flow.matches.vlan.is_some();
        let ethertype = if tagged { 0x8100_u16 } else if v6 { 0x86dd } else { 0x0800 };
        let prio = if v6 { 0xc105 } else { 0xc104 } + if tagged { 6 } else { 0 };
        prop_assert_eq!(header.info, prio << 16 | u32::from(ethertype.to_be()));
        prop_assert_eq!(attrs.get_kind().unwrap(), c"flower");
        let OptionsMsg::Flower(options) = attrs.get_options().unwrap() else { unreachable!() };
        prop_assert_eq!(options.get_flags().unwrap_or(0), flags);
        let mut kinds = Vec::new();
        for action in options.get_act().unwrap() {
            kinds.push(action.get_kind().unwrap().to_str().unwrap().to_owned());
            let parms = match action.get_options().unwrap() {
                ActOptionsMsg::Police(o) => {
                    let tbf = o.get_tbf().unwrap();
                    prop_assert_eq!((tbf.action, tbf.limit, tbf.burst), (0, 0, 0));
                    prop_assert_eq!(tbf.mtu, flow.forward.mtu + 14);
                    prop_assert_eq!((tbf.rate.rate, tbf.peakrate.rate), (0, 0));
                    prop_assert_eq!(o.get_result().unwrap(), 3);
                    continue;
                }
                ActOptionsMsg::Vlan(o) => {
                    let parms = o.get_parms().unwrap();
                    match (parms.v_action, kinds.len()) {
                        // The first of all, or behind the check of the length.
                        (1, 1 | 2) => prop_assert!(o.get_push_vlan_id().is_err()),
                        (2, _) => {
                            prop_assert_eq!(o.get_push_vlan_protocol().unwrap().to_be(), 0x8100);
                            let id = o.get_push_vlan_id().unwrap();
                            prop_assert_eq!(Some(id), flow.forward.vlan.map(VlanId::get));
                        }
                        other => prop_assert!(false, "{:?}", other),
                    }
                    prop_assert_eq!(parms.action, 3);
                    continue;
                }
                ActOptionsMsg::Pedit(o) => o.get_parms_ex().unwrap(),
                ActOptionsMsg::Csum(o) => o.get_parms().unwrap(),
                ActOptionsMsg::Mirred(o) => {
                    prop_assert_eq!(action.get_cookie().unwrap(), &cookie().to_bytes()[..]);
                    let parms = o.get_parms().unwrap();
                    prop_assert_eq!(&parms[20..24], &1i32.to_ne_bytes());
                    prop_assert_eq!(&parms[24..], &flow.forward.egress.get().to_ne_bytes());
                    parms
                }
                _ => unreachable!(),
            };
            let verdict = if kinds.last().unwrap() == "mirred" { 4i32 } else { 3 };
            prop_assert_eq!(&parms[8..12], &verdict.to_ne_bytes());
        }
        let routed = flow.forward.macs.is_some();
        let (from, to) = (&flow.matches.tuple, &flow.forward.tuple);
        let addresses = from.src() != to.src() || from.dst() != to.dst();
        let mut want = Vec::new();
        if flow.ingress_mtu > flow.forward.mtu {
            want.push("police");
        }
        if tagged {
            want.push("vlan");
        }
        if routed || flow.has_nat() {
            want.push("pedit");
        }
        if flow.has_nat() || (!v6 && (routed || addresses)) {
            want.push("csum");
        }
        if flow.forward.vlan.is_some() {
            want.push("vlan");
        }
        want.push("mirred");
        prop_assert_eq!(kinds, want);
    }

    /// A model of `tcf_pedit_act`, run over a header of random bytes.
    #[test]
    fn pedit_rewrites_what_it_should_and_nothing_else(
        flow in any_flow(),
        hardware: bool,
        mut packet in proptest::collection::vec(any::<u8>(), 14 + 40 + 20),
    ) {
        let (from, to) = (flow.matches.tuple, flow.forward.tuple);
        let l4 = if from.is_ipv6() { 54 } else { 34 };
        let (src, dst, ttl, len) = if from.is_ipv6() { (22, 38, 21, 16) } else { (26, 30, 22, 4) };
        let bytes = |a: IpAddr| match a {
            IpAddr::V4(a) => a.octets().to_vec(),
            IpAddr::V6(a) => a.octets().to_vec(),
        };
        // The packet is one of the flow's.
        packet[src..src + len].copy_from_slice(&bytes(from.src()));
        packet[dst..dst + len].copy_from_slice(&bytes(from.dst()));
        packet[l4..l4 + 2].copy_from_slice(&from.sport().to_be_bytes());
        packet[l4 + 2..l4 + 4].copy_from_slice(&from.dport().to_be_bytes());
        let mut want = packet.clone();
        want[src..src + len].copy_from_slice(&bytes(to.src()));
        want[dst..dst + len].copy_from_slice(&bytes(to.dst()));
        want[l4..l4 + 2].copy_from_slice(&to.sport().to_be_bytes());
        want[l4 + 2..l4 + 4].copy_from_slice(&to.dport().to_be_bytes());
        if let Some(macs) = flow.forward.macs {
            want[..6].copy_from_slice(&macs.dst.0);
            want[6..12].copy_from_slice(&macs.src.0);
            want[ttl] = want[ttl].wrapping_sub(1);
        }

        let form = Form {
            flags: 0,
            nat: hardware.then_some(NatForm::Hardware),
            header: None,
            percpu_stats: false,
        };
        let mut buf = Vec::new();
        rule::add(&mut buf, 1, place(Family::Ipv4), handle(1), &flow, cookie(), form);
        let action = |kind: &str| {
            let options = only_message(&buf).attrs(20).find_type(TCA_OPTIONS).unwrap().nested();
            let actions = options.find_type(TCA_FLOWER_ACT).unwrap().nested();
            actions
                .map(|a| a.nested())
                .find(|a| a.find_type(TCA_ACT_KIND).unwrap().str() == Some(kind))
        };
        if let Some(pedit) = action("pedit") {
            run_pedit(pedit.find_type(TCA_ACT_OPTIONS).unwrap().nested(), &mut packet, l4);
        }
        prop_assert_eq!(packet, want);
    }

    /// One set of templates meets many flows of many shapes, as a port's does.
    #[test]
    fn a_patched_template_is_the_message_that_the_encoder_writes(
        flows in proptest::collection::vec((any_flow(), 1u32.., any::<u64>(), 1u32.., any::<bool>()), 1..40),
        seq: u32,
        flags in 0u32..3,
    ) {
        let mut templates = Templates::default();
        let (mut patched, mut fresh) = (Vec::new(), Vec::new());
        for (flow, h, epoch, instance, reply) in &flows {
            let direction = if *reply { Direction::Reply } else { Direction::Original };
            let instance = Instance(NonZeroU32::new(*instance).unwrap());
            let cookie = Cookie { instance, epoch: Epoch(*epoch), direction };
            let nat = flow.has_nat().then_some(NatForm::Hardware);
            let form = Form { flags, nat, header: None, percpu_stats: *epoch % 2 == 0 };
            let at = place(Family::of(&flow.matches));
            let subject = Subject { seq, handle: handle(*h), cookie, flow };
            templates.add(&mut patched, at, form, &subject);
            rule::add(&mut fresh, seq, at, handle(*h), flow, cookie, form);
            prop_assert_eq!(&patched, &fresh);
        }
        let (shapes, with_template) = templates.counts();
        prop_assert_eq!(shapes, with_template, "a shape that is encoded one by one");
        prop_assert!(shapes > 0);
    }

    #[test]
    fn rule_names_read_back(h in 1u32.., v6: bool) {
        let at = place(if v6 { Family::TaggedIpv6 } else { Family::Ipv4 }).prio;
        prop_assert_eq!(split_rule_id(rule_id(at, handle(h))), Some((at, handle(h))));
    }

    #[test]
    fn no_bytes_make_the_dump_reader_panic(b in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut buf = Vec::new();
        let mut m = Message::new(&mut buf, RTM_NEWTFILTER, 0, 1);
        m.raw(&b);
        m.finish();
        if let Some(f) = Filter::of(&only_message(&buf)) {
            let _ = (f.is_rule(), f.ours(), f.in_hw());
        }
    }
}

/// `cargo test --release -p netdev-providers -- --ignored --nocapture cost`
#[test]
#[ignore = "a measurement"]
fn the_cost_of_a_message() {
    let mut flow = example();
    flow.forward.tuple = "tcp 10.0.2.1:5000 > 10.0.2.2:80".parse().unwrap();
    let form = Form { flags: 0, nat: Some(NatForm::Hardware), header: None, percpu_stats: true };
    let mut templates = Templates::default();
    let mut buf = Vec::new();
    for round in 0..6 {
        let mut each = |f: &mut dyn FnMut(&mut Vec<u8>, u32)| {
            let start = std::time::Instant::now();
            for n in 1..=100_000 {
                buf.clear();
                f(&mut buf, n);
                std::hint::black_box(&buf);
            }
            start.elapsed().as_nanos() / 100_000
        };
        let at = place(Family::Ipv4);
        let ns = if round % 2 == 0 {
            each(&mut |buf, n| rule::add(buf, n, at, handle(n), &flow, cookie(), form))
        } else {
            each(&mut |buf, n| {
                let subject = Subject { seq: n, handle: handle(n), cookie: cookie(), flow: &flow };
                templates.add(buf, at, form, &subject);
            })
        };
        println!("{} {ns} ns", if round % 2 == 0 { "encoded" } else { "patched" });
    }
}

fn run_pedit(options: AttrIter<'_>, packet: &mut [u8], l4: usize) {
    let parms = options.find_type(TCA_PEDIT_PARMS_EX).unwrap().payload;
    let n = usize::from(parms[20]);
    let keys: Vec<&[u8]> = parms[24..].chunks_exact(24).collect();
    let ex: Vec<_> =
        options.find_type(TCA_PEDIT_KEYS_EX).unwrap().nested().map(|k| k.nested()).collect();
    assert_eq!((keys.len(), ex.len()), (n, n));
    for (key, ex) in keys.iter().zip(ex) {
        let word = |i: usize| u32::from_ne_bytes(key[i * 4..i * 4 + 4].try_into().unwrap());
        let (mask, value, at) = (word(0), word(1), word(2) as usize);
        assert_eq!((at % 4, word(3), word(4), word(5)), (0, 0, 0, 0));
        let base = match ex.find_type(TCA_PEDIT_KEY_EX_HTYPE).unwrap().u16().unwrap() {
            1 => 0,
            2 | 3 => 14,
            4 | 5 => l4,
            other => panic!("header type {other}"),
        };
        let bytes: &mut [u8; 4] = packet[base + at..].first_chunk_mut().unwrap();
        let old = u32::from_ne_bytes(*bytes);
        let new = match ex.find_type(TCA_PEDIT_KEY_EX_CMD).unwrap().u16().unwrap() {
            0 => value,
            1 => old.wrapping_add(value) & !mask,
            other => panic!("command {other}"),
        };
        *bytes = ((old & mask) ^ new).to_ne_bytes();
    }
}

/// The kinds of a rule's actions in software, and the descriptors and names of its programs.
fn software_actions(flow: &Flow) -> (Vec<std::ffi::CString>, Vec<(i32, std::ffi::CString)>) {
    let programs = not_loaded();
    let family = Family::of(&flow.matches);
    let (before, after) = programs.nat(family, L4Proto::Tcp);
    let form = Form {
        flags: TCA_CLS_FLAGS_SKIP_HW,
        nat: flow.has_nat().then_some(NatForm::Software { before, after }),
        header: Some(programs.header()),
        percpu_stats: true,
    };
    let mut buf = Vec::new();
    rule::add(&mut buf, 1, place(family), handle(1), flow, cookie(), form);
    let (_, attrs) = tc::OpNewtfilterDo::decode_request(only_message(&buf).payload);
    let OptionsMsg::Flower(options) = attrs.get_options().unwrap() else { unreachable!() };
    let (mut kinds, mut named) = (Vec::new(), Vec::new());
    for action in options.get_act().unwrap() {
        kinds.push(action.get_kind().unwrap().to_owned());
        if let Ok(ActOptionsMsg::Bpf(o)) = action.get_options() {
            named.push((o.get_fd().unwrap().cast_signed(), o.get_name().unwrap().to_owned()));
            assert_eq!(&o.get_parms().unwrap()[8..12], &3i32.to_ne_bytes());
        }
    }
    let known = [before, after, programs.header()].map(|p| p.raw_fd());
    assert!(named.iter().all(|(fd, _)| known.contains(fd)), "{named:?}");
    (kinds, named)
}

#[test]
fn a_rule_in_software_has_its_programs_where_they_belong() {
    let of = |flow: &Flow| {
        let (kinds, named) = software_actions(flow);
        let kinds: Vec<_> = kinds.iter().map(|k| k.to_str().unwrap().to_owned()).collect();
        let names: Vec<_> = named.iter().map(|(_, n)| n.to_str().unwrap().to_owned()).collect();
        (kinds.join(" "), names.join(" "))
    };
    let want = |kinds: &str, names: &str| (kinds.to_owned(), names.to_owned());
    let mut flow = example();
    assert_eq!(of(&flow), want("pedit bpf mirred", "header4"));
    flow.forward.macs = None;
    assert_eq!(of(&flow), want("mirred", ""), "a bridge leaves the packet as it is");
    let mut nat = example();
    nat.forward.tuple = "tcp 10.0.2.1:5000 > 10.0.2.2:80".parse().unwrap();
    let programs = "nat4_tcp_before nat4_tcp_after header4";
    assert_eq!(of(&nat), want("bpf pedit bpf bpf mirred", programs));
    let mut v6 = example();
    v6.matches.tuple = "tcp [fd01::2]:4000 > [fd02::2]:80".parse().unwrap();
    v6.forward.tuple = v6.matches.tuple;
    assert_eq!(of(&v6), want("pedit mirred", ""), "ip6_forward sets no priority");
    v6.forward.tuple = "tcp [fd02::1]:4000 > [fd02::2]:80".parse().unwrap();
    assert_eq!(of(&v6), want("bpf pedit bpf mirred", "nat6_tcp_before nat6_tcp_after"));
}

/// The actions of a message, as attributes.
fn actions_of(buf: &[u8]) -> Vec<(u16, AttrIter<'_>)> {
    let options = only_message(buf).attrs(20).find_type(TCA_OPTIONS).unwrap().nested();
    let actions = options.find_type(TCA_FLOWER_ACT).unwrap().nested();
    actions.map(|a| (a.ty, a.nested())).collect()
}

#[test]
fn actions_are_numbered_and_count_per_processor_where_they_are_told_to() {
    for percpu_stats in [true, false] {
        let mut flow = example();
        flow.forward.vlan = VlanId::new(7);
        let form = Form { flags: 0, nat: None, header: None, percpu_stats };
        let mut buf = Vec::new();
        rule::add(&mut buf, 1, place(Family::Ipv4), handle(1), &flow, cookie(), form);
        let actions = actions_of(&buf);
        assert_eq!(actions.iter().map(|(n, _)| *n).collect::<Vec<_>>(), [1, 2, 3, 4]);
        for (n, action) in actions {
            // struct nla_bitfield32: value, selector.
            let flags = action.find_type(TCA_ACT_FLAGS).map(|a| a.payload.to_vec());
            let none = [1u32.to_ne_bytes(), 1u32.to_ne_bytes()].concat();
            assert_eq!(flags, (!percpu_stats).then_some(none), "action {n}");
        }
    }
}

#[test]
fn an_action_alone_is_of_the_kind_that_it_is_called_by_and_so_is_its_module() {
    for action in [Action::Vlan, Action::Police].into_iter().chain(Action::ALL) {
        let mut buf = Vec::new();
        let at = place(Family::Ipv4);
        rule::add_with(&mut buf, 1, at, handle(1), &example().matches, 0, |m| {
            ActionList::new(m, true).one(&example(), action, &cookie().to_bytes());
        });
        let [(1, one)] = &actions_of(&buf)[..] else { panic!("{action:?}") };
        let kind = one.find_type(TCA_ACT_KIND).unwrap().str().unwrap();
        assert_eq!(kind, action.kind());
        let option = kind.to_uppercase();
        assert_eq!(action.module(), format!("act_{kind}: CONFIG_NET_ACT_{option}"));
    }
}

/// The payload of a message of Linux 6.12, in hexadecimal.
fn captured(hex: &str) -> Vec<u8> {
    let payload: Vec<u8> = (0..hex.len() / 2)
        .map(|i| u8::from_str_radix(&hex[i * 2..i * 2 + 2], 16).unwrap())
        .collect();
    let mut buf = Vec::new();
    let mut m = Message::new(&mut buf, RTM_NEWTFILTER, 0, 1);
    m.raw(&payload);
    m.finish();
    buf
}

#[test]
#[cfg(target_endian = "little")]
fn dumps_of_a_real_kernel_are_understood() {
    // A rule of `example()`, as a terse dump gives it; the counters, 3 packets of 300 bytes, are put
    // in by hand.
    let terse = captured(concat!(
        "000000000200000001000000f2ffffff080004c10b000100666c6f776572000008000b000000000020010200",
        "080016000900000014010300540001000a000100706564697400000044000400140001000000000000000000",
        "0000000000000000140007000000000000000000000000000000000018000300000000000000000000000000",
        "000000000000000054000200090001006373756d000000004400040014000100000000000000000000000000",
        "0000000014000700000000000000000000000000000000001800030000000000000000000000000000000000",
        "00000000680003000b0001006d6972726564000044000400140001002c010000000000000300000000000000",
        "1400070000000000000000000000000000000000180003000000000000000000000000000000000000000000",
        "14000600c70f0101123456780000000000000007",
    ));
    let m = only_message(&terse);
    let f = Filter::of(&m).unwrap();
    assert_eq!((f.kind, f.chain, f.is_rule()), ("flower", 0, true));
    assert_eq!((f.at.prio, f.at.ethertype, f.at.handle), (0xc104, 0x0800, 1));
    assert_eq!(f.ours(), Some((cookie(), Counters { packets: 3, bytes: 300 })));
    assert_eq!(f.in_hw(), Some(false));

    // What stands for the prio as a whole, and for a hash table of u32.
    let prio = captured(
        "000000000200000000000000f2ffffff080004c10b000100666c6f776572000008000b0000000000",
    );
    assert!(!Filter::of(&only_message(&prio)).unwrap().is_rule());
    let table = captured(concat!(
        "000000000200000000000080f2ffffff080002c1080001007533320008000b00000000000c0002000800040001",
        "000000",
    ));
    let m = only_message(&table);
    assert!(!Filter::of(&m).unwrap().is_rule());

    // The guard of TTL 0 and 1, in full.
    let u32 = captured(concat!(
        "000000000200000000080080f2ffffff080002c1080001007533320008000b00000000001401020024000500",
        "01000100000000000000000000000000fe000000000000000800000000000000080002000000008008000b00",
        "09000000c0000700bc0001000900010067616374000000004400040014000100000000000000000000000000",
        "0000000014000700000000000000000000000000000000001800030000000000000000000000000000000000",
        "0000000014000600c70f010012345678ffffffffffffffff0c000700020000000200000008000a0000000000",
        "4000020018000200010000000000000000000000010000000100000024000100a400000000000000a4000000",
        "00000000000000000000000000000000000000001c0009000000000000000000000000000000000000000000",
        "00000000",
    ));
    let m = only_message(&u32);
    let f = Filter::of(&m).unwrap();
    assert!(f.is_rule());
    let (cookie, _) = f.ours().unwrap();
    assert_eq!(cookie.epoch, guard::GUARD_AND_QDISC);
}
