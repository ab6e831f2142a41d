//! The few instructions that the programs are made of, and the kernel's helpers that they call.

// linux/bpf.h
const FUNC_SKB_STORE_BYTES: i32 = 9;
const FUNC_L4_CSUM_REPLACE: i32 = 11;
const FUNC_SKB_LOAD_BYTES: i32 = 26;
const FUNC_CSUM_DIFF: i32 = 28;
const FUNC_CSUM_UPDATE: i32 = 40;

/// Registers: results come in R0, R1 to R5 are arguments, R6 to R9 survive calls, R10 is the end
/// of the stack frame.
#[derive(Clone, Copy)]
#[repr(u8)]
pub(crate) enum Reg {
    R0 = 0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R10 = 10,
}
use Reg::*;

/// Fields of `struct __sk_buff`, the context, by their offset.
#[derive(Clone, Copy)]
#[repr(i16)]
pub(crate) enum Context {
    /// Of the frame, from the MAC header on.
    Len = 0,
    /// For whom it is (`PACKET_*`).
    PacketType = 4,
    /// The ethertype behind the first tag, in network order.
    Protocol = 16,
    /// Not 0 where a tag was taken out of the frame, and what was in it.
    VlanPresent = 20,
    VlanTci = 24,
    /// `skb->priority`.
    Priority = 32,
    /// Not 0 for what will be segmented when it is sent.
    GsoSize = 176,
}

/// `struct bpf_insn`: code, the two registers, offset, immediate.
pub(crate) type Insn = [u8; 8];

pub(crate) fn insn(code: u8, dst: Reg, src: Reg, off: i16, imm: i32) -> Insn {
    let (dst, src) = (dst as u8, src as u8);
    // Two bit fields of four bits, dst first: the lower half of the byte where the least
    // significant come first.
    let regs = if cfg!(target_endian = "little") { src << 4 | dst } else { dst << 4 | src };
    let ([o0, o1], [i0, i1, i2, i3]) = (off.to_ne_bytes(), imm.to_ne_bytes());
    [code, regs, o0, o1, i0, i1, i2, i3]
}

/// A place further on that jumps lead to.
#[derive(Clone, Copy)]
pub(crate) struct Label(usize);

/// A comparison of numbers without sign (`BPF_JMP | BPF_J* | BPF_K`).
#[derive(Clone, Copy)]
#[repr(u8)]
pub(crate) enum If {
    Equal = 0x15,
    Greater = 0x25,
    NotEqual = 0x55,
    Less = 0xa5,
}

/// So many bytes of memory (`BPF_LDX | BPF_MEM | BPF_*`).
#[derive(Clone, Copy)]
#[repr(u8)]
pub(crate) enum Width {
    Word = 0x61,
    Half = 0x69,
    Byte = 0x71,
}

/// A program being written.
#[derive(Default)]
pub(crate) struct Assembler {
    program: Vec<Insn>,
    /// Where each label stands, once that is known.
    labels: Vec<Option<usize>>,
    /// The instructions that jump, and to which label.
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    fn push(&mut self, code: u8, dst: Reg, src: Reg, off: i16, imm: i32) {
        self.program.push(insn(code, dst, src, off, imm));
    }

    /// `dst = src`
    pub(crate) fn mov(&mut self, dst: Reg, src: Reg) {
        self.push(0xbf, dst, src, 0, 0); // BPF_ALU64 | BPF_MOV | BPF_X
    }
    /// `dst = imm`
    pub(crate) fn set(&mut self, dst: Reg, imm: i32) {
        self.push(0xb7, dst, R0, 0, imm); // BPF_ALU64 | BPF_MOV | BPF_K
    }
    /// `dst += imm`
    pub(crate) fn add(&mut self, dst: Reg, imm: i32) {
        self.push(0x07, dst, R0, 0, imm); // BPF_ALU64 | BPF_ADD | BPF_K
    }
    /// `dst += src`
    pub(crate) fn add_reg(&mut self, dst: Reg, src: Reg) {
        self.push(0x0f, dst, src, 0, 0); // BPF_ALU64 | BPF_ADD | BPF_X
    }
    /// `dst &= imm`
    pub(crate) fn and(&mut self, dst: Reg, imm: i32) {
        self.push(0x57, dst, R0, 0, imm); // BPF_ALU64 | BPF_AND | BPF_K
    }
    /// `dst ^= imm`
    pub(crate) fn xor(&mut self, dst: Reg, imm: i32) {
        self.push(0xa7, dst, R0, 0, imm); // BPF_ALU64 | BPF_XOR | BPF_K
    }
    /// `dst >>= imm`
    pub(crate) fn shift_right(&mut self, dst: Reg, imm: i32) {
        self.push(0x77, dst, R0, 0, imm); // BPF_ALU64 | BPF_RSH | BPF_K
    }
    /// `dst >>= src`
    pub(crate) fn shift_right_reg(&mut self, dst: Reg, src: Reg) {
        self.push(0x7f, dst, src, 0, 0); // BPF_ALU64 | BPF_RSH | BPF_X
    }
    /// 16 bits of `dst`, from the order of the network to that of the machine.
    pub(crate) fn be16_to_host(&mut self, dst: Reg) {
        self.push(0xdc, dst, R0, 0, 16); // BPF_ALU | BPF_END | BPF_TO_BE
    }
    /// `dst = end of the stack frame - below`
    pub(crate) fn stack(&mut self, dst: Reg, below: i32) {
        self.mov(dst, R10);
        self.add(dst, -below);
    }
    /// `dst = address of the value of the map that has this descriptor` (an array's, of one entry).
    pub(crate) fn map_value(&mut self, dst: Reg, map: i32) {
        // BPF_LD | BPF_DW | BPF_IMM, which is two instructions long, with BPF_PSEUDO_MAP_VALUE.
        self.push(0x18, dst, R2, 0, map);
        self.push(0, R0, R0, 0, 0);
    }
    /// `dst = memory at base + off`
    pub(crate) fn load(&mut self, width: Width, dst: Reg, base: Reg, off: i16) {
        self.push(width as u8, dst, base, off, 0);
    }
    /// Two bytes of memory at `base + off` become those of `src`.
    pub(crate) fn store_half(&mut self, base: Reg, off: i16, src: Reg) {
        self.push(0x6b, base, src, off, 0); // BPF_STX | BPF_MEM | BPF_H
    }
    /// `dst = context.field`
    pub(crate) fn load_context(&mut self, dst: Reg, context: Reg, field: Context) {
        self.load(Width::Word, dst, context, field as i16);
    }
    /// `context.field = src`
    pub(crate) fn store_context(&mut self, context: Reg, field: Context, src: Reg) {
        self.push(0x63, context, src, field as i16, 0); // BPF_STX | BPF_MEM | BPF_W
    }

    /// A place that is yet to come.
    pub(crate) fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }
    /// Here it is.
    pub(crate) fn place(&mut self, label: Label) {
        let here = self.program.len();
        if let Some(at) = self.labels.get_mut(label.0) {
            *at = Some(here);
        }
    }
    pub(crate) fn jump(&mut self, to: Label) {
        self.jumps.push((self.program.len(), to));
        self.push(0x05, R0, R0, 0, 0); // BPF_JMP | BPF_JA
    }
    pub(crate) fn jump_if(&mut self, what: If, dst: Reg, imm: i32, to: Label) {
        self.jumps.push((self.program.len(), to));
        self.push(what as u8, dst, R0, 0, imm);
    }
    pub(crate) fn jump_if_reg(&mut self, what: If, dst: Reg, src: Reg, to: Label) {
        self.jumps.push((self.program.len(), to));
        self.push(what as u8 | 0x08, dst, src, 0, 0); // BPF_X
    }

    /// `if R0 != 0 { return verdict }`
    pub(crate) fn give_up_on_error(&mut self, verdict: i32) {
        let go_on = self.label();
        self.jump_if(If::Equal, R0, 0, go_on);
        self.ret(verdict);
        self.place(go_on);
    }
    pub(crate) fn ret(&mut self, verdict: i32) {
        self.set(R0, verdict);
        self.push(0x95, R0, R0, 0, 0); // BPF_JMP | BPF_EXIT
    }

    fn call(&mut self, function: i32) {
        self.push(0x85, R0, R0, 0, function); // BPF_JMP | BPF_CALL
    }

    /// Copies `len` bytes of the packet, whose context is in R6, to the stack at `below` its end.
    /// R0 is not 0 afterwards when the packet has no such bytes.
    pub(crate) fn load_bytes(&mut self, at: i32, len: i32, below: i32) {
        self.set(R2, at);
        self.load_bytes_at_r2(len, below);
    }
    /// The same from where R2 says.
    pub(crate) fn load_bytes_at_r2(&mut self, len: i32, below: i32) {
        self.mov(R1, R6);
        self.stack(R3, below);
        self.set(R4, len);
        self.call(FUNC_SKB_LOAD_BYTES);
    }
    /// The other way round.
    pub(crate) fn store_bytes(&mut self, at: i32, len: i32, below: i32) {
        self.mov(R1, R6);
        self.set(R2, at);
        self.stack(R3, below);
        self.set(R4, len);
        self.set(R5, 0);
        self.call(FUNC_SKB_STORE_BYTES);
    }
    /// `R0 = bpf_csum_diff(from, from_size, to, to_size, seed)`, from R1 to R5.
    pub(crate) fn csum_diff(&mut self) {
        self.call(FUNC_CSUM_DIFF);
    }
    /// Adds R7 to the L4 checksum at `at` of the packet in R6.
    pub(crate) fn l4_csum_replace(&mut self, at: i32, flags: i32) {
        self.mov(R1, R6);
        self.set(R2, at);
        self.set(R3, 0);
        self.mov(R4, R7);
        self.set(R5, flags);
        self.call(FUNC_L4_CSUM_REPLACE);
    }
    /// Adds R7 to the sum that the kernel has of the whole packet in R6, if it has one.
    pub(crate) fn csum_update(&mut self) {
        self.mov(R1, R6);
        self.mov(R2, R7);
        self.call(FUNC_CSUM_UPDATE);
    }

    /// Leaves in `sum` the ones' complement sum of the five words at `below` the end of the stack:
    /// 0xffff over an IPv4 header whose checksum is right. `other` is lost.
    pub(crate) fn sum_of_header(&mut self, sum: Reg, other: Reg, below: i16) {
        self.load(Width::Word, sum, R10, -below);
        for at in [4, 8, 12, 16] {
            self.load(Width::Word, other, R10, at - below);
            self.add_reg(sum, other);
        }
        // Less than 35 bits, then 20, then 17, then 16.
        for _ in 0..3 {
            self.mov(other, sum);
            self.shift_right(other, 16);
            self.and(sum, 0xffff);
            self.add_reg(sum, other);
        }
    }

    /// The program, with the jumps in it. One that leads nowhere stays an offset of 0.
    pub(crate) fn finish(mut self) -> Vec<Insn> {
        for (at, Label(to)) in self.jumps {
            let to = self.labels.get(to).copied().flatten();
            let off = to.and_then(|to| i16::try_from(to.checked_sub(at + 1)?).ok());
            if let (Some(off), Some([_, _, o0, o1, ..])) = (off, self.program.get_mut(at)) {
                [*o0, *o1] = off.to_ne_bytes();
            }
        }
        self.program
    }
}
