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
//! `after` it, another adds them as they are then. So a checksum that was wrong stays wrong. No constants of a connection are in the
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

use crate::bpf::assembler::{Assembler, Insn, Reg::*};
use crate::contract::types::L4Proto;
use crate::tc_flower::uapi::*;

/// Before or after the packet is rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Before = 0,
    After = 1,
}

// linux/bpf.h
const BPF_F_PSEUDO_HDR: i32 = 1 << 4;
const BPF_F_MARK_MANGLED_0: i32 = 1 << 5;

/// Loads `len` bytes of the packet onto the stack and leaves in R7 what they are to add to the
/// sum: `-bytes` before, `+bytes` after.
fn diff(a: &mut Assembler, phase: Phase, at: i32, len: i32, on_error: i32) {
    a.load_bytes(at, len, len);
    a.give_up_on_error(on_error);
    match phase {
        Phase::Before => {
            a.stack(R1, len);
            a.set(R2, len);
            a.set(R3, 0);
            a.set(R4, 0);
        }
        Phase::After => {
            a.set(R1, 0);
            a.set(R2, 0);
            a.stack(R3, len);
            a.set(R4, len);
        }
    }
    a.set(R5, 0);
    a.csum_diff();
    a.mov(R7, R0);
}

pub(super) fn assemble(family: Family, proto: L4Proto, phase: Phase) -> Vec<Insn> {
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
    let mut a = Assembler::default();
    a.mov(R6, R1);
    diff(&mut a, phase, addresses, addresses_len, on_error);
    a.l4_csum_replace(check, BPF_F_PSEUDO_HDR | keep_zero);
    a.give_up_on_error(on_error);
    if family.is_ipv6() {
        a.csum_update(); // ENOTSUPP unless CHECKSUM_COMPLETE
    }
    diff(&mut a, phase, l4, 4, on_error);
    a.l4_csum_replace(check, keep_zero);
    a.give_up_on_error(on_error);
    a.ret(TC_ACT_PIPE);
    a.finish()
}
