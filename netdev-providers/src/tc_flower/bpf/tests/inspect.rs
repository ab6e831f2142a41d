//! The program of the guards, against what the stack would say.

use super::super::inspect::{TO_THE_FLOWS, TO_THE_STACK, assemble};
use super::*;

/// Whether a flow's rule may have the packet, or no flow has such packets at all.
#[derive(Debug, PartialEq, Eq)]
enum Stack {
    Forwards,
    DoesOtherwise,
    IsNotAsked,
}

/// What `ip_rcv_core`, `ip6_rcv_core`, `tcp_error` and `udp_error` say to a frame.
fn asked(frame: &[u8], family: Family, gso: bool) -> Stack {
    use Stack::*;
    let ip = &frame[14..];
    let half = |at: usize| usize::from(u16::from_be_bytes([ip[at], ip[at + 1]]));
    let v6 = family.is_ipv6();
    let (header, proto, hops, said) =
        if v6 { (40, ip[6], ip[7], 40 + half(4)) } else { (20, ip[9], ip[8], half(2)) };
    match proto {
        6 | 17 => {}
        0 | 43 | 60 if v6 => return DoesOtherwise,
        _ => return IsNotAsked,
    }
    if !v6 && ip[0] == 0x45 && half(6) & 0x3fff != 0 {
        return IsNotAsked;
    }
    let sum_is_right = v6 || fold(sum(&ip[..20])) == 0;
    let first = if v6 { ip[0] >> 4 == 6 } else { ip[0] == 0x45 };
    if !first || hops < 2 || !sum_is_right {
        return DoesOtherwise;
    }
    let none = if v6 { said == 40 } else { said == 0 };
    let total = if none && gso { ip.len() } else { said };
    let padding = ip.len() > total && ip.len() <= 46;
    if total > ip.len() || total < header + 8 || (ip.len() > total && !padding) || (none && !gso) {
        return DoesOtherwise;
    }
    let l4 = &ip[header..total];
    let whole = match proto {
        6 => l4.len() >= 20 && (20..=l4.len()).contains(&(usize::from(l4[12] >> 4) * 4)),
        _ => (8..=l4.len()).contains(&half(header + 4)),
    };
    if whole { Forwards } else { DoesOtherwise }
}

fn verdict(bytes: &[u8], family: Family, gso: bool) -> i32 {
    let protocol = family.ip_ethertype().to_be();
    let mut packet =
        Packet { protocol, gso_size: if gso { 1400 } else { 0 }, ..Packet::new(bytes.to_vec()) };
    let verdict = run(&assemble(family), &mut packet, usize::MAX);
    assert_eq!((&packet.bytes[..], packet.priority), (bytes, 77), "it changes nothing");
    verdict
}

/// A good frame with so much payload.
fn frame(family: Family, proto: u8, payload: usize) -> Vec<u8> {
    let l4 = if proto == 6 { 20 } else { 8 } + payload;
    let (mut b, at) = if family.is_ipv6() {
        let mut b = vec![0; 14 + 40 + l4];
        (b[14], b[20], b[21]) = (0x60, proto, 64);
        b[18..20].copy_from_slice(&u16::try_from(l4).unwrap().to_be_bytes());
        (b, 54)
    } else {
        let mut b = vec![0; 14 + 20 + l4];
        (b[14], b[22], b[23]) = (0x45, 64, proto);
        b[16..18].copy_from_slice(&u16::try_from(20 + l4).unwrap().to_be_bytes());
        (b, 34)
    };
    match proto {
        6 => b[at + 12] = 0x50,
        _ => b[at + 4..at + 6].copy_from_slice(&u16::try_from(l4).unwrap().to_be_bytes()),
    }
    finish_header(&mut b, family);
    b
}

proptest! {
    /// Good frames of which a few bytes of the headers are others, with the checksum right or not, cut
    /// short or with something behind them.
    #[test]
    fn what_the_stack_would_not_forward_as_it_is_is_left_to_it(
        v6: bool, udp: bool, payload in 0usize..60, gso: bool, checksum: bool, resize in -9isize..20,
        harm in proptest::collection::vec((0usize..36, any::<u8>()), 0..3),
        zero_length: bool,
    ) {
        let family = Family::of_ip(v6);
        let mut bytes = frame(family, if udp { 17 } else { 6 }, payload);
        let l4 = if v6 { 54 } else { 34 };
        for (at, value) in harm {
            // Of the IP header, or of L4.
            let at = if at < 20 { 14 + at } else { l4 + at - 20 };
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        if zero_length {
            let at = if v6 { 18 } else { 16 };
            bytes[at..at + 2].fill(0);
        }
        if checksum {
            finish_header(&mut bytes, family);
        }
        // Not shorter than what the program reads at once: those are left to the stack, below.
        let least = l4 + 8;
        bytes.resize(bytes.len().saturating_add_signed(resize).max(least), 0);
        let want = match asked(&bytes, family, gso) {
            Stack::Forwards | Stack::IsNotAsked => TO_THE_FLOWS,
            Stack::DoesOtherwise => TO_THE_STACK,
        };
        prop_assert_eq!(verdict(&bytes, family, gso), want, "{:x?}", bytes);
    }
}

#[test]
fn a_wrong_header_checksum_is_left_to_the_stack_whichever_bit_is_wrong() {
    for proto in [6, 17] {
        let good = frame(Family::Ipv4, proto, 100);
        assert_eq!(verdict(&good, Family::Ipv4, false), TO_THE_FLOWS);
        for bit in 0..160 {
            let mut bad = good.clone();
            bad[14 + bit / 8] ^= 1 << (bit % 8);
            // The protocol, and what makes a fragment of it, says that no flow has it.
            let is_asked = asked(&bad, Family::Ipv4, false) != Stack::IsNotAsked;
            let want = if is_asked { TO_THE_STACK } else { TO_THE_FLOWS };
            assert_eq!(verdict(&bad, Family::Ipv4, false), want, "bit {bit}");
        }
    }
}

#[test]
fn options_and_times_to_live_and_extension_headers_are_left_to_the_stack() {
    let with = |family: Family, at: usize, value: u8| {
        let mut bytes = frame(family, 6, 100);
        bytes[at] = value;
        finish_header(&mut bytes, family);
        verdict(&bytes, family, false) == TO_THE_STACK
    };
    for first in 0..=255 {
        assert_eq!(with(Family::Ipv4, 14, first), first != 0x45, "{first:#x}");
        assert_eq!(with(Family::Ipv6, 14, first), first >> 4 != 6, "{first:#x}");
        assert_eq!(with(Family::Ipv4, 22, first), first < 2, "TTL {first}");
        assert_eq!(with(Family::Ipv6, 21, first), first < 2, "hop limit {first}");
    }
    for next in (0..=255).filter(|n| ![6, 17].contains(n)) {
        let extension = [0, 43, 60].contains(&next);
        assert_eq!(with(Family::Ipv6, 20, next), extension, "next header {next}");
    }
}

#[test]
fn a_frame_that_carries_something_else_is_nobodys() {
    for (family, other) in [(Family::TaggedIpv4, 0x8100_u16), (Family::TaggedIpv6, 0x0800)] {
        let mut packet = Packet { protocol: other.to_be(), ..Packet::new(vec![0; 80]) };
        assert_eq!(run(&assemble(family), &mut packet, usize::MAX), TO_THE_FLOWS);
    }
}

/// Too short to be read, or it cannot be.
#[test]
fn what_cannot_be_read_is_left_to_the_stack() {
    for (family, proto) in Family::UNTAGGED.into_iter().flat_map(|f| [(f, 6), (f, 17)]) {
        let good = frame(family, proto, 100);
        let l4 = if family.is_ipv6() { 54 } else { 34 };
        for len in 14..l4 + 8 {
            assert_eq!(verdict(&good[..len], family, false), TO_THE_STACK, "{len}");
        }
        let protocol = family.ip_ethertype().to_be();
        let reads = if proto == 6 { 2 } else { 1 };
        for (succeed, want) in [(reads - 1, TO_THE_STACK), (reads, TO_THE_FLOWS)] {
            let mut packet = Packet { protocol, ..Packet::new(good.clone()) };
            assert_eq!(run(&assemble(family), &mut packet, succeed), want, "{proto} {succeed}");
        }
    }
}
