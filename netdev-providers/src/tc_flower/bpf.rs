//! Two tiny programs that keep L4 checksums right when a NAT rule runs in software.
//!
//! # Why `csum` cannot
//! `act_csum` computes a checksum anew, and leaves GSO packets alone ("computed after
//! segmentation"). But the checksum field of such a packet (`CHECKSUM_PARTIAL`) holds the sum of the
//! pseudo header, with the **old** addresses, which `pedit` does not touch: after an address was
//! rewritten, every segment leaves with a wrong checksum, unless the next device is one that never
//! verifies it (veth).
//!
//! # What is done instead
//! `before` the `pedit`, a program takes addresses and ports as they are out of the checksum;
//! `after` it, another adds them as they are then. No constants of a connection are in the
//! programs, so there is one per (family, protocol, phase) and process, eight in all, without maps,
//! and without a branch but for errors. `bpf_l4_csum_replace` knows the four states of a packet
//! (`inet_proto_csum_replace_by_diff`): the addresses are given with `BPF_F_PSEUDO_HDR`, which
//! adjusts a `PARTIAL` field as what it is, a pseudo-header sum, and the others as a checksum; the
//! ports without it, which leaves a `PARTIAL` field alone. `BPF_F_MARK_MANGLED_0` leaves a UDP
//! checksum of 0 ("none") and never makes one.
//!
//! With `CHECKSUM_COMPLETE` the sum over the whole packet is adjusted too. For IPv6 that is wrong,
//! since no header checksum takes the change of the addresses back, and `BPF_F_IPV6` says so only
//! to newer kernels; `bpf_csum_update` takes it back on all of them.
//!
//! At ingress `act_bpf` pushes the MAC header before it runs a program, so offsets count from it:
//! the guards keep options and extension headers away, so L4 stands at 14 + 20 or 14 + 40. A VLAN tag
//! is not in the way: it stands beside the packet (`skb_vlan_untag` in `__netif_receive_skb_core`),
//! and has been popped before.

use std::ffi::{CStr, c_int};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::uapi::Family;
use crate::contract::types::L4Proto;

/// Before or after the packet is rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Before = 0,
    After = 1,
}

/// A loaded program.
#[derive(Debug)]
pub(super) struct NatProgram {
    fd: OwnedFd,
    name: &'static CStr,
}

impl NatProgram {
    pub(super) fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    pub(super) fn name_with_nul(&self) -> &'static [u8] {
        self.name.to_bytes_with_nul()
    }
}

/// All of them.
#[derive(Debug)]
pub(super) struct NatPrograms([NatProgram; 8]);

impl NatPrograms {
    /// Loads them.
    ///
    /// # Errors
    /// The bpf system call's, with the verifier's words if it has any.
    pub(super) fn load() -> io::Result<Self> {
        Self::each(load_program)
    }

    fn each(make: impl Fn(&CStr, &[Insn]) -> io::Result<OwnedFd>) -> io::Result<Self> {
        use {Family::*, L4Proto::*, Phase::*};
        let load = |family, proto, phase, name| {
            let fd = make(name, &assemble(family, proto, phase))?;
            Ok::<_, io::Error>(NatProgram { fd, name })
        };
        // In the order of `index`.
        Ok(Self([
            load(Ipv4, Tcp, Before, c"nat4_tcp_before")?,
            load(Ipv4, Tcp, After, c"nat4_tcp_after")?,
            load(Ipv4, Udp, Before, c"nat4_udp_before")?,
            load(Ipv4, Udp, After, c"nat4_udp_after")?,
            load(Ipv6, Tcp, Before, c"nat6_tcp_before")?,
            load(Ipv6, Tcp, After, c"nat6_tcp_after")?,
            load(Ipv6, Udp, Before, c"nat6_udp_before")?,
            load(Ipv6, Udp, After, c"nat6_udp_after")?,
        ]))
    }

    /// The two that go around the `pedit` of such a flow.
    pub(super) fn pair(&self, family: Family, proto: L4Proto) -> (&NatProgram, &NatProgram) {
        let at = |phase| &self.0[index(family, proto, phase)];
        (at(Phase::Before), at(Phase::After))
    }
}

fn index(family: Family, proto: L4Proto, phase: Phase) -> usize {
    usize::from(family.is_ipv6()) * 4 + usize::from(proto == L4Proto::Udp) * 2 + phase as usize
}

// linux/bpf.h
const BPF_PROG_LOAD: c_int = 5;
const BPF_PROG_TYPE_SCHED_ACT: u32 = 4;
const BPF_FUNC_L4_CSUM_REPLACE: i32 = 11;
const BPF_FUNC_SKB_LOAD_BYTES: i32 = 26;
const BPF_FUNC_CSUM_DIFF: i32 = 28;
const BPF_FUNC_CSUM_UPDATE: i32 = 40;
const BPF_F_PSEUDO_HDR: i32 = 1 << 4;
const BPF_F_MARK_MANGLED_0: i32 = 1 << 5;
const TC_ACT_OK: i32 = 0;
const TC_ACT_SHOT: i32 = 2;
const TC_ACT_PIPE: i32 = 3;

/// Registers: results come in R0, R1 to R5 are arguments, R6 to R9 survive calls, R10 is the end
/// of the stack frame.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Reg {
    R0 = 0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R10 = 10,
}
use Reg::*;

/// `struct bpf_insn`: code, the two registers, offset, immediate.
type Insn = [u8; 8];

fn insn(code: u8, dst: Reg, src: Reg, off: i16, imm: i32) -> Insn {
    let (dst, src) = (dst as u8, src as u8);
    // Two bit fields of four bits, dst first: the lower half of the byte where the least
    // significant come first.
    let regs = if cfg!(target_endian = "little") { src << 4 | dst } else { dst << 4 | src };
    let ([o0, o1], [i0, i1, i2, i3]) = (off.to_ne_bytes(), imm.to_ne_bytes());
    [code, regs, o0, o1, i0, i1, i2, i3]
}

/// The few instructions that the programs are made of.
struct Assembler(Vec<Insn>);

impl Assembler {
    /// `dst = src`
    fn mov(&mut self, dst: Reg, src: Reg) {
        self.0.push(insn(0xbf, dst, src, 0, 0)); // BPF_ALU64 | BPF_MOV | BPF_X
    }
    /// `dst = imm`
    fn set(&mut self, dst: Reg, imm: i32) {
        self.0.push(insn(0xb7, dst, R0, 0, imm)); // BPF_ALU64 | BPF_MOV | BPF_K
    }
    /// `dst = end of the stack frame - below`
    fn stack(&mut self, dst: Reg, below: i32) {
        self.mov(dst, R10);
        self.0.push(insn(0x07, dst, R0, 0, -below)); // BPF_ALU64 | BPF_ADD | BPF_K
    }
    fn call(&mut self, function: i32) {
        self.0.push(insn(0x85, R0, R0, 0, function)); // BPF_JMP | BPF_CALL
    }
    /// `if R0 != 0 { return verdict }`
    fn give_up_on_error(&mut self, verdict: i32) {
        self.0.push(insn(0x15, R0, R0, 2, 0)); // BPF_JMP | BPF_JEQ | BPF_K, over the next two
        self.ret(verdict);
    }
    fn ret(&mut self, verdict: i32) {
        self.set(R0, verdict);
        self.0.push(insn(0x95, R0, R0, 0, 0)); // BPF_JMP | BPF_EXIT
    }

    /// Loads `len` bytes of the packet onto the stack and leaves in R7 what they are to add to the
    /// sum: `-bytes` before, `+bytes` after.
    fn diff(&mut self, phase: Phase, at: i32, len: i32, on_error: i32) {
        self.mov(R1, R6);
        self.set(R2, at);
        self.stack(R3, len);
        self.set(R4, len);
        self.call(BPF_FUNC_SKB_LOAD_BYTES);
        self.give_up_on_error(on_error);
        // bpf_csum_diff(from, from_size, to, to_size, seed)
        match phase {
            Phase::Before => {
                self.stack(R1, len);
                self.set(R2, len);
                self.set(R3, 0);
                self.set(R4, 0);
            }
            Phase::After => {
                self.set(R1, 0);
                self.set(R2, 0);
                self.stack(R3, len);
                self.set(R4, len);
            }
        }
        self.set(R5, 0);
        self.call(BPF_FUNC_CSUM_DIFF);
        self.mov(R7, R0);
    }

    /// Adds R7 to the checksum at `at`.
    fn replace(&mut self, at: i32, flags: i32, on_error: i32) {
        self.mov(R1, R6);
        self.set(R2, at);
        self.set(R3, 0);
        self.mov(R4, R7);
        self.set(R5, flags);
        self.call(BPF_FUNC_L4_CSUM_REPLACE);
        self.give_up_on_error(on_error);
    }
}

fn assemble(family: Family, proto: L4Proto, phase: Phase) -> Vec<Insn> {
    const ETH_HLEN: i32 = 14;
    let (addresses, addresses_len, l4) = if family.is_ipv6() {
        (ETH_HLEN + 8, 32, ETH_HLEN + 40)
    } else {
        (ETH_HLEN + 12, 8, ETH_HLEN + 20)
    };
    let (check, keep_zero) = match proto {
        L4Proto::Tcp => (l4 + 16, 0),
        L4Proto::Udp => (l4 + 6, BPF_F_MARK_MANGLED_0),
    };
    // Before, nothing is changed yet: a packet too short for a checksum, or no memory, and the
    // packet goes the slow way. After, it cannot fail any more (the same bytes have just been made
    // writable); a packet half rewritten must not go on.
    let on_error = match phase {
        Phase::Before => TC_ACT_OK,
        Phase::After => TC_ACT_SHOT,
    };
    let mut a = Assembler(Vec::with_capacity(64));
    a.mov(R6, R1);
    a.diff(phase, addresses, addresses_len, on_error);
    a.replace(check, BPF_F_PSEUDO_HDR | keep_zero, on_error);
    if family.is_ipv6() {
        a.mov(R1, R6);
        a.mov(R2, R7);
        a.call(BPF_FUNC_CSUM_UPDATE); // ENOTSUPP unless CHECKSUM_COMPLETE
    }
    a.diff(phase, l4, 4, on_error);
    a.replace(check, keep_zero, on_error);
    a.ret(TC_ACT_PIPE);
    a.0
}

/// `union bpf_attr` of `BPF_PROG_LOAD`, as far as it is used.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
}

fn load_program(name: &CStr, insns: &[Insn]) -> io::Result<OwnedFd> {
    let mut attr = ProgLoad {
        prog_type: BPF_PROG_TYPE_SCHED_ACT,
        insn_cnt: u32::try_from(insns.len()).unwrap_or(u32::MAX),
        insns: insns.as_ptr().expose_provenance() as u64,
        license: c"Apache-2.0".as_ptr().expose_provenance() as u64,
        ..ProgLoad::default()
    };
    // At most 15 bytes and a NUL: the kernel refuses what is longer.
    for (to, from) in attr.prog_name.iter_mut().zip(name.to_bytes()) {
        *to = *from;
    }
    let error = match bpf_prog_load(&attr) {
        Ok(fd) => return Ok(fd),
        Err(e) => e,
    };
    // Once more for the verifier's words, of which the last line says it.
    let mut log = vec![0u8; 64 * 1024];
    attr.log_level = 1;
    attr.log_size = u32::try_from(log.len()).unwrap_or(0);
    attr.log_buf = log.as_mut_ptr().expose_provenance() as u64;
    let _ = bpf_prog_load(&attr);
    match last_words(&log) {
        Some(words) => Err(io::Error::new(error.kind(), format!("{error}: {words}"))),
        None => Err(error),
    }
}

/// What the verifier says at the end of its log, which ends with a NUL, before its statistics.
fn last_words(log: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(log.split(|&b| b == 0).next()?).into_owned();
    let line = text.lines().rev().find(|l| !l.is_empty() && !l.starts_with("processed"))?;
    Some(line.to_owned())
}

fn bpf_prog_load(attr: &ProgLoad) -> io::Result<OwnedFd> {
    // SAFETY: `attr` is the start of a `union bpf_attr`, of the size given, and what it points to
    // (instructions, licence, and the log buffer if there is one) outlives the call, which reads
    // `insn_cnt` instructions of 8 bytes and a NUL-terminated string, and writes at most `log_size`
    // bytes of log.
    let fd = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, std::ptr::from_ref(attr), size_of::<ProgLoad>())
    };
    let fd = RawFd::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the system call has just made this descriptor (close-on-exec), and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
pub(super) mod tests;
