use std::net::IpAddr;

use netdev_providers::netlink::netfilter::conntrack::{AF_INET, AF_INET6};
use netlink_bindings::conntrack::ConntrackAttrs;
use proptest::prelude::*;

use super::*;
use crate::datapath::netfilter::unhex;

/// `IPCTNL_MSG_CT_NEW` as an event of a new connection, from a Linux 6.18.
const NEW: &str = "\
    c4000000000100060000000000000000020000003400018014000180080001000a000002080002000a000102 \
    1c000280050001000600000006000200a5f0000006000300b00b00003400028014000180080001000a000102 \
    080002000a0000021c000280050001000600000006000200b00b000006000300a5f0000008000c0029bc9ae5 \
    08000300000000080800070000000078300004802c0001800500010001000000050002000a00000005000300 \
    0000000006000400030000000600050000000000";
/// The same as an event of a change (the FIN), from the same.
const UPDATE: &str = "\
    c4000000000100000000000000000000020000003400018014000180080001000a000202080002000a000102 \
    1c000280050001000600000006000200cb8200000600030080e100003400028014000180080001000a000102 \
    080002000a0002021c00028005000100060000000600020080e1000006000300cb82000008000c00e14b108a \
    080003000000000e0800070000069780300004802c0001800500010003000000050002000a00000005000300 \
    0a00000006000400230000000600050023000000";
/// `IPCTNL_MSG_CT_DELETE` as an event, from the same.
const DESTROY: &str = "\
    a40000000201000000000000ae5f20d5020000003400018014000180080001000a000202080002000a000102 \
    1c000280050001000600000006000200c6ae00000600030088f100003400028014000180080001000a000102 \
    080002000a0002021c00028005000100060000000600020088f1000006000300c6ae000008000c0032c44003 \
    080003000000020e080007000006977f100004800c0001800500010003000000";
/// The answer to a get of an IPv6 connection, from the same.
const GET: &str = "\
    040100000001020005000000e043c79c0a0000004c0001802c00018014000300fd0000010000000000000000 \
    0000000214000400fd0000000000000000000000000000021c000280050001000600000006000200e06a0000 \
    06000300b32d00004c0002802c00018014000300fd00000000000000000000000000000214000400fd000001 \
    0000000000000000000000021c000280050001000600000006000200b32d000006000300e06a000008000300 \
    0000000e080008000000000008000c00fb84d7aa08000b0000000002080007000000012c300004802c000180 \
    0500010003000000050002000a000000050003000a00000006000400230000000600050033000000";

fn events(hex: &str, ours: Option<u32>) -> Vec<CtEvent> {
    let mut read = EventRead::default();
    assert!(!read_events(MessageIter::new(&unhex(hex)), ours.as_slice(), &mut read));
    assert_eq!(read.own, []);
    read.events
}

#[test]
fn an_event_that_cannot_be_read_is_a_loss_and_one_of_another_protocol_is_none() {
    let protocol = unhex("0500010006000000"); // CTA_PROTO_NUM: TCP
    let event = unhex(DESTROY);
    let places: Vec<_> = event.windows(8).enumerate().filter(|(_, w)| *w == protocol).collect();
    let changed = |with: u8| {
        let mut other = event.clone();
        for (at, _) in &places {
            other[at + 4] = with;
        }
        let mut read = EventRead::default();
        (read_events(MessageIter::new(&other), &[], &mut read), read.events.len())
    };
    assert_eq!((places.len(), changed(6)), (2, (false, 1)));
    assert_eq!(changed(1), (false, 0), "ICMP");
    // Of a family that has no such addresses.
    let mut unreadable = event.clone();
    unreadable[16] = 10;
    let mut read = EventRead::default();
    assert!(read_events(MessageIter::new(&unreadable), &[], &mut read));
    assert_eq!(read.events, []);
}

fn tuple(s: &str) -> Tuple {
    s.parse().unwrap()
}

#[test]
fn captured_events_read_as_conntrack_shows_them() {
    let original = tuple("tcp 10.0.0.2:42480 > 10.0.1.2:45067");
    let [CtEvent::New(new)] = &events(NEW, None)[..] else { panic!() };
    assert_eq!((new.original, new.reply), (original, original.inverted()));
    assert_eq!(new.id, Some(CtId(0x29bc9ae5)));
    assert_eq!(new.tcp_state, Some(TcpState::SynSent));
    assert_eq!((new.zone, new.mark, new.helper), (Zone(0), 0, false));
    assert!(new.status.confirmed() && !new.status.assured());

    let [CtEvent::Update(update)] = &events(UPDATE, Some(77))[..] else { panic!() };
    assert!(update.status.assured() && update.status.seen_reply());
    assert_eq!(update.timeout, Some(Duration::from_secs(432000)));
    assert_eq!(update.tcp_state, TcpState::from_number(3));

    let [CtEvent::Destroy(gone)] = &events(DESTROY, None)[..] else { panic!() };
    assert_eq!(gone.original, tuple("tcp 10.0.2.2:50862 > 10.0.1.2:35057"));
    assert!(gone.status.dying());
    assert_eq!(gone.timeout, Some(Duration::from_secs(431999)));
}

#[test]
fn our_own_updates_are_passed_over_and_nothing_else_is() {
    let mut mine = unhex(UPDATE);
    mine[12..16].copy_from_slice(&77u32.to_ne_bytes());
    let mut read = EventRead::default();
    read_events(MessageIter::new(&mine), &[76, 77], &mut read);
    assert_eq!(read.events, []);
    assert_eq!(read.own.len(), 1, "it has events, as our own update shows");
    read_events(MessageIter::new(&mine), &[78], &mut read);
    assert_eq!((read.events.len(), read.own.len()), (1, 1));
    // The end of a connection is news whoever caused it.
    let mut end = unhex(DESTROY);
    end[12..16].copy_from_slice(&77u32.to_ne_bytes());
    read_events(MessageIter::new(&end), &[77], &mut read);
    assert_eq!((read.events.len(), read.own.len()), (2, 1));
}

#[test]
fn a_captured_ipv6_entry_reads() {
    let bytes = unhex(GET);
    let m = MessageIter::new(&bytes).next().unwrap();
    let e = CtEntry::parse(AF_INET6, m.attrs(NFGENMSG_LEN)).unwrap();
    assert_eq!(e.original, tuple("tcp [fd00:1::2]:57450 > [fd00::2]:45869"));
    assert_eq!(e.tcp_state, Some(TcpState::Established));
    assert_eq!((e.tcp_liberal, e.tcp_maxack), ([false, false], [true, true]));
    assert_eq!(e.outgoing(Direction::Original), e.original);
    assert_eq!(e.outgoing(Direction::Reply), e.reply);
    // The family tells the addresses' size.
    assert_eq!(CtEntry::parse(AF_INET, m.attrs(NFGENMSG_LEN)), None);
}

proptest! {
    #[test]
    fn an_update_says_what_an_independent_decoder_reads(
        v6: bool, udp: bool, src: [u8; 16], dst: [u8; 16], sport: u16, dport: u16, zone: u16,
        secs in proptest::option::of(any::<u64>()), liberal in proptest::option::of(any::<bool>()),
        forget: bool, state in proptest::option::of(0u8..10), status in proptest::option::of(any::<u32>()),
    ) {
        let ip = |b: [u8; 16]| -> IpAddr {
            if v6 { b.into() } else { [b[0], b[1], b[2], b[3]].into() }
        };
        let proto = if udp { L4Proto::Udp } else { L4Proto::Tcp };
        let original = Tuple::new(proto, ip(src), sport, ip(dst), dport).unwrap();
        let update = CtUpdate {
            timeout: secs.map(Duration::from_secs),
            liberal,
            forget_acked: forget,
            tcp_state: state.map(|s| TcpState::from_number(s).unwrap()),
            status: status.map(CtStatus),
            ..CtUpdate::of(Zone(zone), original)
        };
        let mut buf = Vec::new();
        put_update(&mut buf, 1, ACK, &update);
        prop_assert_eq!(buf.len() % 4, 0);
        let attrs = ConntrackAttrs::new(&buf[20..]);
        prop_assert!(attrs.clone().all(|a| a.is_ok()));
        let t = attrs.get_tuple_orig().unwrap();
        let (i, p) = (t.get_tuple_ip().unwrap(), t.get_tuple_proto().unwrap());
        if v6 {
            prop_assert_eq!(IpAddr::from(i.get_ip_v6_src().unwrap()), original.src());
            prop_assert_eq!(IpAddr::from(i.get_ip_v6_dst().unwrap()), original.dst());
        } else {
            prop_assert_eq!(IpAddr::from(i.get_ip_v4_src().unwrap()), original.src());
            prop_assert_eq!(IpAddr::from(i.get_ip_v4_dst().unwrap()), original.dst());
        }
        prop_assert_eq!(p.get_proto_num().unwrap(), proto.number());
        prop_assert_eq!(p.get_proto_src_port().unwrap(), sport);
        prop_assert_eq!(p.get_proto_dst_port().unwrap(), dport);
        prop_assert_eq!(attrs.get_zone().unwrap_or(0), zone);
        prop_assert_eq!(
            attrs.get_timeout().ok(),
            secs.map(|s| u32::try_from(s).unwrap_or(u32::MAX))
        );
        let tcp = attrs.get_protoinfo().and_then(|p| p.get_protoinfo_tcp()).ok();
        let flags = |f: netlink_bindings::conntrack::NfCtTcpFlagsMask| (f.flags, f.mask);
        let mask = if liberal.is_some() { 8 } else { 0 } | if forget { 0x20 } else { 0 };
        let any = !udp && (mask != 0 || state.is_some());
        let want = any.then_some((if liberal == Some(true) { 8 } else { 0 }, mask));
        prop_assert_eq!(
            tcp.as_ref().map(|t| flags(t.get_tcp_flags_original().unwrap())), want
        );
        prop_assert_eq!(tcp.as_ref().map(|t| flags(t.get_tcp_flags_reply().unwrap())), want);
        prop_assert_eq!(tcp.and_then(|t| t.get_tcp_state().ok()), state.filter(|_| !udp));
        prop_assert_eq!(attrs.get_status().ok(), status);
    }

    #[test]
    fn no_bytes_make_the_parser_panic(
        b in proptest::collection::vec(any::<u8>(), 0..300), family: u8,
    ) {
        let _ = CtEntry::parse(family, AttrIter::new(&b));
        let _ = CtEntry::parse(AF_INET, AttrIter::new(&b));
    }

    #[test]
    fn no_damage_to_a_real_message_makes_the_reader_panic(
        at in 0usize..196, with: u8, cut in 0usize..212,
    ) {
        for hex in [NEW, UPDATE, DESTROY, GET] {
            let mut bytes = unhex(hex);
            let end = cut.min(bytes.len());
            bytes[at.min(end.max(1) - 1)] = with;
            read_events(MessageIter::new(&bytes[..end]), &[], &mut EventRead::default());
        }
    }
}
