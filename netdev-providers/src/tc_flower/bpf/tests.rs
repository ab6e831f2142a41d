//! The programs run, on a model of the machine and of the kernel's helpers.

use std::fs::File;

use proptest::prelude::*;

use super::*;

/// The eight programs without the privilege to load them: their descriptors are of nothing.
pub(in super::super) fn not_loaded() -> NatPrograms {
    NatPrograms::each(|_, _| Ok(File::open("/dev/null")?.into())).unwrap()
}

const PROTOS: [L4Proto; 2] = [L4Proto::Tcp, L4Proto::Udp];
const PHASES: [Phase; 2] = [Phase::Before, Phase::After];

/// Sums of 16 or 32 bits in ones' complement, as `csum_add` and `csum_fold` make them.
fn add(a: u32, b: u32) -> u32 {
    let (sum, carry) = a.overflowing_add(b);
    sum + u32::from(carry)
}

fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).fold(0, |s, w| {
        add(s, u32::from(u16::from_ne_bytes([w[0], w.get(1).copied().unwrap_or(0)])))
    })
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// The lower half of a register.
fn half(n: u64) -> u32 {
    u32::try_from(n & u64::from(u32::MAX)).unwrap()
}

/// A sum that is known to be the same as another: 0 is 0xffff too.
fn same(a: u32, b: u32) -> bool {
    fold(a) % 0xffff == fold(b) % 0xffff
}

/// What the kernel knows of the checksum of a packet (`skb->ip_summed`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// Nothing: the field is right.
    Nothing,
    /// The field holds the sum of the pseudo header, and is finished when the packet is sent.
    Partial,
    /// The sum of all from the IP header on.
    Complete(u32),
}

struct Packet {
    bytes: Vec<u8>,
    known: Known,
}

const CONTEXT: u64 = 0x7000_0000;
const FAULT: u64 = -14i64 as u64;

struct Machine<'p> {
    packet: &'p mut Packet,
    stack: [u8; 512],
    regs: [u64; 11],
    /// How many calls that can fail succeed yet.
    succeed: usize,
}

impl Machine<'_> {
    fn run(mut self, program: &[Insn]) -> i32 {
        let mut at = 0;
        loop {
            let [code, regs, o0, o1, i0, i1, i2, i3] = program[at];
            let (low, high) = (usize::from(regs & 15), usize::from(regs >> 4));
            let (dst, src) = if cfg!(target_endian = "little") { (low, high) } else { (high, low) };
            let imm = i64::from(i32::from_ne_bytes([i0, i1, i2, i3])).cast_unsigned();
            at += 1;
            match code {
                0xbf => self.regs[dst] = self.regs[src],
                0xb7 => self.regs[dst] = imm,
                0x07 => self.regs[dst] = self.regs[dst].wrapping_add(imm),
                0x15 if self.regs[dst] == imm => {
                    at += usize::try_from(i16::from_ne_bytes([o0, o1])).unwrap();
                }
                0x15 => {}
                0x85 => {
                    self.regs[0] = self.call(imm);
                    self.regs[1..6].fill(0xdead_beef_dead_beef);
                }
                0x95 => return half(self.regs[0]).cast_signed(),
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    /// So many bytes at an address of the stack.
    fn at(&mut self, address: u64, len: u64) -> &mut [u8] {
        let (address, len) = (usize::try_from(address).unwrap(), usize::try_from(len).unwrap());
        &mut self.stack[address..address + len]
    }

    fn fails(&mut self) -> bool {
        let fails = self.succeed == 0;
        self.succeed = self.succeed.saturating_sub(1);
        fails
    }

    fn call(&mut self, function: u64) -> u64 {
        let [_, a, b, c, d, e, ..] = self.regs;
        match function {
            // bpf_skb_load_bytes(skb, offset, to, len)
            26 => {
                assert_eq!(a, CONTEXT);
                let from = usize::try_from(b).unwrap();
                let bytes = self.packet.bytes.get(from..from + usize::try_from(d).unwrap());
                let Some(bytes) = bytes.map(<[u8]>::to_vec) else { return FAULT };
                if self.fails() {
                    return FAULT;
                }
                self.at(c, d).copy_from_slice(&bytes);
                0
            }
            // bpf_csum_diff(from, from_size, to, to_size, seed)
            28 => {
                let taken: Vec<u8> = self.at(a, b).iter().map(|b| !b).collect();
                let added = sum(self.at(c, d));
                add(add(sum(&taken), added), half(e)).into()
            }
            // bpf_l4_csum_replace(skb, offset, from, to, flags)
            11 => {
                assert_eq!((a, c), (CONTEXT, 0));
                let at = usize::try_from(b).unwrap();
                if self.fails() {
                    return FAULT;
                }
                self.replace(at, half(d), e & 1 << 4 != 0, e & 1 << 5 != 0);
                assert_eq!(e & !(3 << 4), 0);
                0
            }
            // bpf_csum_update(skb, csum)
            40 => {
                assert_eq!(a, CONTEXT);
                if let Known::Complete(sum) = &mut self.packet.known {
                    *sum = add(*sum, half(b));
                }
                -524i64 as u64
            }
            other => panic!("helper {other}"),
        }
    }

    /// `inet_proto_csum_replace_by_diff`, and what `bpf_l4_csum_replace` does around it.
    fn replace(&mut self, at: usize, diff: u32, pseudo: bool, keep_zero: bool) {
        let field = u16::from_ne_bytes([self.packet.bytes[at], self.packet.bytes[at + 1]]);
        if keep_zero && field == 0 {
            return;
        }
        let mut new = match &mut self.packet.known {
            Known::Partial if pseudo => !fold(add(diff, field.into())),
            Known::Partial => field,
            Known::Complete(sum) if pseudo => {
                *sum = !add(diff, !*sum);
                fold(add(diff, (!field).into()))
            }
            _ => fold(add(diff, (!field).into())),
        };
        if keep_zero && new == 0 {
            new = 0xffff;
        }
        self.packet.bytes[at..at + 2].copy_from_slice(&new.to_ne_bytes());
    }
}

fn run(program: &[Insn], packet: &mut Packet, succeed: usize) -> i32 {
    let mut regs = [0xdead_beef_dead_beef; 11];
    (regs[1], regs[10]) = (CONTEXT, 512);
    Machine { packet, stack: [0x55; 512], regs, succeed }.run(program)
}

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
        let mut packet = Packet { bytes, known };

        let pipe = run(&assemble(family, proto, Phase::Before), &mut packet, usize::MAX);
        prop_assert_eq!(pipe, 3);
        let len = l.addresses.len();
        packet.bytes[l.addresses.clone()].copy_from_slice(&addresses[..len]);
        packet.bytes[l.l4..l.l4 + 4].copy_from_slice(&ports);
        finish_header(&mut packet.bytes, family);
        let pipe = run(&assemble(family, proto, Phase::After), &mut packet, usize::MAX);
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
        let mut packet = Packet { bytes, known: Known::Nothing };
        for phase in PHASES {
            prop_assert_eq!(run(&assemble(family, L4Proto::Udp, phase), &mut packet, usize::MAX), 3);
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
            let program = assemble(family, proto, phase);
            // Two loads, two replacements.
            for (succeed, want) in [verdict, verdict, verdict, verdict, 3].into_iter().enumerate() {
                let mut packet = Packet { bytes: vec![1; 80], known: Known::Nothing };
                assert_eq!(run(&program, &mut packet, succeed), want, "{phase:?} {succeed}");
            }
            let mut short = Packet { bytes: vec![1; 30], known: Known::Nothing };
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
            let (before, after) = programs.pair(family, proto);
            let name = |when| format!("nat{number}_{proto}_{when}\0");
            assert_eq!(before.name_with_nul(), name("before").as_bytes());
            assert_eq!(after.name_with_nul(), name("after").as_bytes());
            assert!(after.name_with_nul().len() <= 16 && before.raw_fd() != after.raw_fd());
        }
    }
}

#[test]
fn of_the_verifiers_log_the_last_line_counts_before_its_statistics() {
    let log = b"0: (95) exit\nR0 !read_ok\nprocessed 1 insns (limit 1000000)\n\n\0\0junk\n";
    assert_eq!(last_words(log).as_deref(), Some("R0 !read_ok"));
    assert_eq!(last_words(b"processed 1 insns\n\0"), None);
    assert_eq!(last_words(&[0; 64]), None);
}

/// No privilege or no bpf(): the kernel tests of the lab decide then.
fn is_not_for_us(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EPERM | libc::ENOSYS))
}

#[test]
fn the_verifier_accepts_every_program() {
    match NatPrograms::load() {
        Ok(_) => {}
        Err(e) if is_not_for_us(&e) => {}
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn a_program_that_the_verifier_refuses_is_refused_in_its_words() {
    // It returns what nobody has set.
    let e = load_program(c"nothing", &[insn(0x95, R0, R0, 0, 0)]).unwrap_err();
    assert!(is_not_for_us(&e) || e.to_string().contains("R0 !read_ok"), "{e}");
}
