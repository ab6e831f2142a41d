//! The programs run, on a model of the machine and of the kernel's helpers.

use std::fs::File;

use proptest::prelude::*;

use super::*;
use crate::bpf::load::tests::is_not_for_us;
use crate::bpf::machine::{Known, Packet, add, fold, run, same, sum};

mod header;
mod inspect;

/// The programs without the privilege to load them: their descriptors are of nothing.
pub(in super::super) fn not_loaded() -> Programs {
    Programs::each(|_, _, _| Ok(File::open("/dev/null")?.into())).unwrap()
}

const PROTOS: [L4Proto; 2] = [L4Proto::Tcp, L4Proto::Udp];
const PHASES: [Phase; 2] = [Phase::Before, Phase::After];

/// Where things stand in a packet: its addresses, L4, the checksum of L4.
struct Layout {
    addresses: std::ops::Range<usize>,
    l4: usize,
    check: usize,
}

fn layout(family: Family, proto: L4Proto) -> Layout {
    let (addresses, l4) = if family.is_ipv6() { (22..54, 54) } else { (26..34, 34) };
    Layout { addresses, l4, check: l4 + if proto == L4Proto::Tcp { 16 } else { 6 } }
}

/// The sum of the pseudo header.
fn pseudo(packet: &[u8], proto: L4Proto, l: &Layout) -> u32 {
    let len = u16::try_from(packet.len() - l.l4).unwrap();
    let rest = u32::from(len.to_be()) + u32::from(u16::from(proto.number()).to_be());
    add(sum(&packet[l.addresses.clone()]), rest)
}

/// Puts the header checksum of IPv4 right.
fn finish_header(packet: &mut [u8], family: Family) {
    if !family.is_ipv6() {
        packet[24..26].fill(0);
        let check = fold(sum(&packet[14..34]));
        packet[24..26].copy_from_slice(&check.to_ne_bytes());
    }
}

fn set(packet: &mut [u8], at: usize, value: u16) {
    packet[at..at + 2].copy_from_slice(&value.to_ne_bytes());
}

fn get(packet: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([packet[at], packet[at + 1]])
}

proptest! {
    /// A packet with a right checksum, in whichever way the kernel knows it, has one behind the two
    /// programs, whatever was rewritten between them.
    #[test]
    fn a_right_checksum_stays_right(
        v6: bool, udp: bool, known in 0..3,
        mut bytes in proptest::collection::vec(any::<u8>(), 54 + 20..200),
        addresses: [u8; 32], ports: [u8; 4],
    ) {
        let family = Family::of_ip(v6);
        let proto = if udp { L4Proto::Udp } else { L4Proto::Tcp };
        let l = layout(family, proto);
        set(&mut bytes, l.check, 0);
        let sum_of_pseudo = pseudo(&bytes, proto, &l);
        let check = match known {
            1 => !fold(sum_of_pseudo),
            _ => fold(add(sum_of_pseudo, sum(&bytes[l.l4..]))),
        };
        set(&mut bytes, l.check, if udp && check == 0 { 0xffff } else { check });
        finish_header(&mut bytes, family);
        let known = match known {
            0 => Known::Nothing,
            1 => Known::Partial,
            _ => Known::Complete(sum(&bytes[14..])),
        };
        let mut packet = Packet { known, ..Packet::new(bytes) };

        let pipe = run(&nat::assemble(family, proto, Phase::Before), &mut packet, usize::MAX);
        prop_assert_eq!(pipe, 3);
        let len = l.addresses.len();
        packet.bytes[l.addresses.clone()].copy_from_slice(&addresses[..len]);
        packet.bytes[l.l4..l.l4 + 4].copy_from_slice(&ports);
        finish_header(&mut packet.bytes, family);
        let pipe = run(&nat::assemble(family, proto, Phase::After), &mut packet, usize::MAX);
        prop_assert_eq!(pipe, 3);

        let sum_of_pseudo = pseudo(&packet.bytes, proto, &l);
        if packet.known == Known::Partial {
            prop_assert!(same(get(&packet.bytes, l.check).into(), sum_of_pseudo));
        } else {
            prop_assert_eq!(fold(add(sum_of_pseudo, sum(&packet.bytes[l.l4..]))), 0);
            prop_assert!(!udp || get(&packet.bytes, l.check) != 0, "that is none");
        }
        if let Known::Complete(known) = packet.known {
            prop_assert!(same(known, sum(&packet.bytes[14..])));
        }
    }

    #[test]
    fn a_udp_packet_without_a_checksum_gets_none(
        v6: bool, mut bytes in proptest::collection::vec(any::<u8>(), 54 + 20),
    ) {
        let family = Family::of_ip(v6);
        let l = layout(family, L4Proto::Udp);
        set(&mut bytes, l.check, 0);
        let mut packet = Packet::new(bytes);
        for phase in PHASES {
            prop_assert_eq!(run(&nat::assemble(family, L4Proto::Udp, phase), &mut packet, usize::MAX), 3);
            prop_assert_eq!(get(&packet.bytes, l.check), 0);
            packet.bytes[l.addresses.clone()].fill(7);
        }
    }
}

/// Before, the packet goes up the stack (`pass`); after, half rewritten, it must not go on.
#[test]
fn a_helper_that_fails_ends_a_program() {
    for (family, proto) in Family::UNTAGGED.into_iter().flat_map(|f| PROTOS.map(|p| (f, p))) {
        for (phase, verdict) in [(Phase::Before, 0), (Phase::After, 2)] {
            let program = nat::assemble(family, proto, phase);
            // Two loads, two replacements.
            for (succeed, want) in [verdict, verdict, verdict, verdict, 3].into_iter().enumerate() {
                let mut packet = Packet::new(vec![1; 80]);
                assert_eq!(run(&program, &mut packet, succeed), want, "{phase:?} {succeed}");
            }
            let mut short = Packet::new(vec![1; 30]);
            assert_eq!(run(&program, &mut short, usize::MAX), verdict, "{phase:?}");
        }
    }
}

#[test]
fn the_programs_of_a_flow_are_those_of_its_family_and_protocol() {
    let programs = not_loaded();
    for (family, number) in
        [(Family::Ipv4, 4), (Family::TaggedIpv4, 4), (Family::Ipv6, 6), (Family::TaggedIpv6, 6)]
    {
        for proto in PROTOS {
            let (before, after) = programs.nat(family, proto);
            let name = |when| format!("nat{number}_{proto}_{when}\0");
            assert_eq!(before.name_with_nul(), name("before").as_bytes());
            assert_eq!(after.name_with_nul(), name("after").as_bytes());
            assert!(after.name_with_nul().len() <= 16 && before.raw_fd() != after.raw_fd());
        }
        let name = format!("inspect{number}\0");
        assert_eq!(programs.inspect(family).name_with_nul(), name.as_bytes());
    }
}

#[test]
fn the_verifier_accepts_every_program() {
    match Programs::load() {
        Ok(_) => {}
        Err(e) if is_not_for_us(&e) => {}
        Err(e) => panic!("{e}"),
    }
}
