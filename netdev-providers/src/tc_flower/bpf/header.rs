//! What `ip_forward` does to a packet beside taking one off its TTL: the program of IPv4 rules in
//! software, in the place of `csum`.
//!
//! It puts the header checksum right, whatever of the header was rewritten: the guards have left a wrong
//! one to the stack. And it sets `skb->priority` from the ToS, as `ip_forward` does
//! (`rt_tos2priority`), with each packet anew: qdiscs and drivers choose bands and queues by it. `ip6_forward`
//! does not, nor does a bridge.

use crate::bpf::assembler::{Assembler, Context, Insn, Reg::*, Width};
use crate::tc_flower::uapi::*;

/// `ip_tos2prio`, by the two bits of `IPTOS_TOS_MASK` that count, four bits for each: best effort (0),
/// bulk (2), interactive (6), interactive bulk (4).
const PRIORITIES: i32 = 0x4620;

pub(super) fn assemble() -> Vec<Insn> {
    const ETH: i32 = 14;
    // The guard has read the same bytes, and what was rewritten was made writable: this does not fail; a
    // packet half rewritten must not go on.
    let mut a = Assembler::default();
    a.mov(R6, R1);
    a.load_bytes(ETH, 20, 20);
    a.give_up_on_error(TC_ACT_SHOT);
    a.load(Width::Byte, R1, R10, 1 - 20);
    a.and(R1, 0x18);
    a.shift_right(R1, 1);
    a.set(R2, PRIORITIES);
    a.shift_right_reg(R2, R1);
    a.and(R2, 0x0f);
    a.store_context(R6, Context::Priority, R2);
    a.set(R1, 0);
    a.store_half(R10, 10 - 20, R1);
    a.sum_of_header(R1, R2, 20);
    a.xor(R1, 0xffff);
    a.store_half(R10, 10 - 20, R1);
    a.store_bytes(ETH + 10, 2, 10);
    a.give_up_on_error(TC_ACT_SHOT);
    a.ret(TC_ACT_PIPE);
    a.finish()
}
