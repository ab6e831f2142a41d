//! The program of IPv4 rules.

use super::*;

/// What `ip_forward` makes of a ToS, from the table in route.c.
fn rt_tos2priority(tos: u8) -> u32 {
    const BESTEFFORT: u32 = 0;
    const BULK: u32 = 2;
    const INTERACTIVE_BULK: u32 = 4;
    const INTERACTIVE: u32 = 6;
    let table = [[BESTEFFORT; 4], [BULK; 4], [INTERACTIVE; 4], [INTERACTIVE_BULK; 4]].concat();
    table[usize::from(tos & 0x1e) >> 1]
}

proptest! {
    #[test]
    fn the_header_is_put_right_and_the_priority_is_that_of_the_tos(
        bytes in proptest::collection::vec(any::<u8>(), 34..100), tos: u8,
    ) {
        let mut packet = Packet::new(bytes.clone());
        packet.bytes[15] = tos;
        let mut want = packet.bytes.clone();
        finish_header(&mut want, Family::Ipv4);
        prop_assert_eq!(run(&super::super::header::assemble(), &mut packet, usize::MAX), 3);
        prop_assert_eq!(packet.priority, rt_tos2priority(tos));
        prop_assert_eq!(packet.bytes, want);
    }
}

#[test]
fn a_packet_that_is_too_short_or_cannot_be_written_goes_no_further() {
    let program = super::super::header::assemble();
    for (len, succeed) in [(33, usize::MAX), (34, 0), (34, 1)] {
        let mut packet = Packet::new(vec![1; len]);
        assert_eq!(run(&program, &mut packet, succeed), 2, "{len} {succeed}");
    }
    assert_eq!(run(&program, &mut Packet::new(vec![1; 34]), 2), 3);
}
