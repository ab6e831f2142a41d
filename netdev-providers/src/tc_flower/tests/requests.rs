//! Requests about rules, and the guards, against the generated encoder and decoder.

use netlink_bindings::builtin::BuiltinBitfield32;
use netlink_bindings::tc::Tcmsg;

use super::*;

/// The `struct tcmsg` of a place, as the generated encoder has it.
fn header(at: Place, handle: u32) -> Tcmsg {
    let mut header = Tcmsg::new();
    header.ifindex = at.ifindex.get().try_into().unwrap();
    header.handle = handle;
    header.parent = 0xffff_fff2;
    header.info = u32::from(at.prio.0) << 16 | u32::from(at.family.ethertype().to_be());
    header
}

/// The message that `ours` appends has this type and these flags, and the payload that `theirs` makes.
#[track_caller]
fn same(ty: u16, flags: u16, ours: impl FnOnce(&mut Vec<u8>), theirs: impl FnOnce(&mut Vec<u8>)) {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    ours(&mut a);
    theirs(&mut b);
    // The generated encoder leaves the last attribute without its padding.
    b.resize(b.len().next_multiple_of(4), 0);
    let m = only_message(&a);
    assert_eq!((m.ty, m.flags, m.seq, m.payload), (ty, flags, 9, &b[..]));
}

#[test]
fn requests_about_rules_are_those_of_the_generated_encoder() {
    const REQUEST: u16 = 1;
    const ACK: u16 = 4;
    const DUMP: u16 = 0x300;
    for family in Family::ALL {
        let at = place(family);
        for (kind, name) in [(&b"flower\0"[..], c"flower"), (b"u32\0", c"u32")] {
            same(
                RTM_DELTFILTER,
                REQUEST,
                |buf| rule::delete_of_kind(buf, 9, at, handle(5), kind),
                |buf| {
                    tc::OpDeltfilterDo::encode_request(buf, &header(at, 5)).push_kind(name);
                },
            );
        }
        same(
            RTM_DELTFILTER,
            REQUEST,
            |buf| rule::delete(buf, 9, at, handle(5)),
            |buf| {
                tc::OpDeltfilterDo::encode_request(buf, &header(at, 5)).push_kind(c"flower");
            },
        );
        same(
            RTM_DELTFILTER,
            REQUEST | ACK,
            |buf| rule::delete_all(buf, 9, at),
            |buf| drop(tc::OpDeltfilterDo::encode_request(buf, &header(at, 0))),
        );
        same(
            RTM_GETTFILTER,
            REQUEST | ACK,
            |buf| rule::get(buf, 9, at, handle(5)),
            |buf| {
                tc::OpGettfilterDo::encode_request(buf, &header(at, 5)).push_kind(c"flower");
            },
        );
        let terse = BuiltinBitfield32 { value: 1, selector: 1 };
        same(
            RTM_GETTFILTER,
            REQUEST | DUMP,
            |buf| rule::dump(buf, 9, at, true),
            |buf| {
                tc::OpGettfilterDump::encode_request(buf, &header(at, 0))
                    .push_chain(0)
                    .push_dump_flags(terse);
            },
        );
        same(
            RTM_GETTFILTER,
            REQUEST | DUMP,
            |buf| rule::dump(buf, 9, at, false),
            |buf| {
                tc::OpGettfilterDump::encode_request(buf, &header(at, 0)).push_chain(0);
            },
        );
    }
    let mut everything = Tcmsg::new();
    everything.ifindex = 2;
    everything.parent = 0xffff_fff2;
    same(
        RTM_GETTFILTER,
        REQUEST | DUMP,
        |buf| rule::dump_all(buf, 9, Ifindex::new(2).unwrap(), PARENT_INGRESS),
        |buf| drop(tc::OpGettfilterDump::encode_request(buf, &everything)),
    );
}

/// One `gact` with our cookie, whose verdict is `pass`.
fn is_pass<'a>(mut actions: impl Iterator<Item = tc::IterableActAttrs<'a>>) -> bool {
    let action = actions.next().unwrap();
    let ActOptionsMsg::Gact(options) = action.get_options().unwrap() else { return false };
    assert_eq!(action.get_kind().unwrap(), c"gact");
    assert_eq!(action.get_cookie().unwrap(), &cookie().to_bytes()[..]);
    assert_eq!(options.get_parms().unwrap().action, 0);
    actions.next().is_none()
}

#[test]
fn the_generated_decoder_understands_the_guards() {
    let prio = Prio(0xc100);
    let ifindex = Ifindex::new(2).unwrap();
    for family in Family::ALL {
        let want = header(Place { ifindex, prio, family }, 0);
        let mut buf = Vec::new();
        guard::flower_ttl(&mut buf, 9, ifindex, prio, family, cookie());
        let m = only_message(&buf);
        // Made, or put in the place of the one that is there.
        assert_eq!((m.ty, m.flags), (RTM_NEWTFILTER, 0x405));
        let (got, attrs) = tc::OpNewtfilterDo::decode_request(m.payload);
        assert_eq!((got.ifindex, got.handle, got.parent, got.info), (2, 1, want.parent, want.info));
        let OptionsMsg::Flower(o) = attrs.get_options().unwrap() else { panic!("not flower") };
        assert_eq!(o.get_key_eth_type().unwrap(), family.ethertype());
        let inner = family.is_tagged().then(|| family.ip_ethertype());
        assert_eq!(o.get_key_vlan_eth_type().ok(), inner);
        assert_eq!((o.get_key_ip_ttl().unwrap(), o.get_key_ip_ttl_mask().unwrap()), (0, 0xfe));
        assert_eq!(o.get_flags().unwrap(), TCA_CLS_FLAGS_SKIP_SW);
        assert!(is_pass(o.get_act().unwrap()));

        let mut buf = Vec::new();
        let programs = not_loaded();
        let program = programs.inspect(family);
        guard::software(&mut buf, 9, ifindex, prio, family, program, cookie());
        let m = only_message(&buf);
        assert_eq!((m.ty, m.flags), (RTM_NEWTFILTER, 0x605));
        let (got, attrs) = tc::OpNewtfilterDo::decode_request(m.payload);
        assert_eq!((got.handle, got.info), (0, want.info), "the kernel chooses the handle");
        let OptionsMsg::Bpf(o) = attrs.get_options().unwrap() else { panic!("not bpf") };
        assert_eq!(o.get_flags_gen().unwrap(), TCA_CLS_FLAGS_SKIP_HW);
        assert!(o.get_flags().is_err(), "its result is a match, and no verdict");
        assert_eq!(o.get_fd().unwrap().cast_signed(), program.raw_fd());
        let name = if family.is_ipv6() { c"inspect6" } else { c"inspect4" };
        assert_eq!(o.get_name().unwrap(), name);
        assert!(is_pass(o.get_act().unwrap()));
    }
}

#[test]
fn the_last_message_of_a_batch_asks_for_an_answer() {
    let at = place(Family::Ipv4);
    let mut buf = Vec::new();
    rule::delete(&mut buf, 1, at, handle(1));
    let second = buf.len();
    rule::delete(&mut buf, 2, at, handle(2));
    let flags = |buf: &[u8]| MessageIter::new(buf).map(|m| m.flags).collect::<Vec<_>>();
    let before = buf.clone();
    // What asks already goes on asking.
    for _ in 0..2 {
        rule::ask_for_ack(&mut buf, second);
        assert_eq!(flags(&buf), [1, 5]);
    }
    buf[second + 6..second + 8].copy_from_slice(&before[second + 6..second + 8]);
    assert_eq!(buf, before, "nothing else has changed");
    rule::ask_for_ack(&mut buf, second + 1000);
    assert_eq!(buf, before, "there is no message");
}
