//! A model of the machine that programs run on, and of the kernel's helpers, for tests.

use super::assembler::Insn;

/// Sums of 16 or 32 bits in ones' complement, as `csum_add` and `csum_fold` make them.
pub(crate) fn add(a: u32, b: u32) -> u32 {
    let (sum, carry) = a.overflowing_add(b);
    sum + u32::from(carry)
}

pub(crate) fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).fold(0, |s, w| {
        add(s, u32::from(u16::from_ne_bytes([w[0], w.get(1).copied().unwrap_or(0)])))
    })
}

pub(crate) fn fold(mut sum: u32) -> u16 {
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
pub(crate) fn same(a: u32, b: u32) -> bool {
    fold(a) % 0xffff == fold(b) % 0xffff
}

/// What the kernel knows of the checksum of a packet (`skb->ip_summed`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// Nothing: the field is right.
    Nothing,
    /// The field holds the sum of the pseudo header, and is finished when the packet is sent.
    Partial,
    /// The sum of all from the IP header on.
    Complete(u32),
}

pub(crate) struct Packet {
    /// From the MAC header on.
    pub(crate) bytes: Vec<u8>,
    pub(crate) known: Known,
    /// The ethertype, in network order.
    pub(crate) protocol: u16,
    pub(crate) gso_size: u32,
    pub(crate) priority: u32,
}

impl Packet {
    /// Neither verified nor to be segmented.
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        let known = Known::Nothing;
        Self { bytes, known, protocol: 0x0800_u16.to_be(), gso_size: 0, priority: 77 }
    }
}

const CONTEXT: u64 = 0x7000_0000;
const MAP: u64 = 0x6000_0000;
const FAULT: u64 = -14i64 as u64;

struct Machine<'p> {
    packet: &'p mut Packet,
    /// The value of the one map.
    map: &'p [u8],
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
            let off = i16::from_ne_bytes([o0, o1]);
            let (a, b) = (self.regs[dst], self.regs[src]);
            match code {
                0xbf => self.regs[dst] = b,
                0xb7 => self.regs[dst] = imm,
                0x18 => {
                    assert_eq!((src, off, program[at]), (2, 0, [0; 8]), "the value of a map");
                    self.regs[dst] = MAP;
                    at += 1;
                }
                0x07 => self.regs[dst] = a.wrapping_add(imm),
                0x0f => self.regs[dst] = a.wrapping_add(b),
                0x57 => self.regs[dst] = a & imm,
                0x77 => self.regs[dst] = a >> imm,
                0x7f => self.regs[dst] = a >> b,
                0xa7 => self.regs[dst] = a ^ imm,
                0xdc => {
                    assert_eq!(imm, 16);
                    self.regs[dst] = u16::from_be((a & 0xffff) as u16).into();
                }
                0x61 if b == CONTEXT => {
                    self.regs[dst] = match off {
                        0 => self.packet.bytes.len() as u64,
                        16 => self.packet.protocol.into(),
                        176 => self.packet.gso_size.into(),
                        other => panic!("field {other} of the context"),
                    };
                }
                0x61 | 0x69 | 0x71 => {
                    let len = match code {
                        0x61 => 4,
                        0x69 => 2,
                        _ => 1,
                    };
                    let at = b.wrapping_add_signed(off.into());
                    assert_eq!(at % len, 0, "aligned");
                    let mut bytes = [0; 8];
                    let memory = match at.checked_sub(MAP) {
                        Some(at) => {
                            &self.map[usize::try_from(at).unwrap()..]
                                [..usize::try_from(len).unwrap()]
                        }
                        None => self.at(at, len),
                    };
                    // Of a little-endian machine, as those are that tests run on.
                    bytes[..memory.len()].copy_from_slice(memory);
                    self.regs[dst] = u64::from_le_bytes(bytes);
                }
                0x63 => {
                    assert_eq!((a, off), (CONTEXT, 32), "all that is written of the context");
                    self.packet.priority = half(b);
                }
                0x6b => {
                    let at = a.wrapping_add_signed(off.into());
                    self.at(at, 2).copy_from_slice(&b.to_le_bytes()[..2]);
                }
                0x05 | 0x15 | 0x1d | 0x25 | 0x2d | 0x55 | 0x5d | 0xa5 => {
                    let with = if code & 0x08 != 0 { b } else { imm };
                    let jumps = match code & 0xf0 {
                        0x00 => true,
                        0x10 => a == with,
                        0x20 => a > with,
                        0x50 => a != with,
                        _ => a < with,
                    };
                    assert!(off > 0, "a jump to somewhere");
                    at += if jumps { usize::try_from(off).unwrap() } else { 0 };
                }
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
            // bpf_skb_store_bytes(skb, offset, from, len, flags)
            9 => {
                assert_eq!((a, e), (CONTEXT, 0));
                if self.fails() {
                    return FAULT;
                }
                let bytes = self.at(c, d).to_vec();
                let to = usize::try_from(b).unwrap();
                self.packet.bytes[to..to + bytes.len()].copy_from_slice(&bytes);
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

/// What the program returns; of its calls that can fail so many succeed.
pub(crate) fn run(program: &[Insn], packet: &mut Packet, succeed: usize) -> i32 {
    run_with_map(program, packet, succeed, &[])
}

/// The same of one that has a map with this value.
pub(crate) fn run_with_map(
    program: &[Insn],
    packet: &mut Packet,
    succeed: usize,
    map: &[u8],
) -> i32 {
    let mut regs = [0xdead_beef_dead_beef; 11];
    (regs[1], regs[10]) = (CONTEXT, 512);
    Machine { packet, map, stack: [0x55; 512], regs, succeed }.run(program)
}
