//! The program of the guards: whether a packet is one that the stack would forward as it is.
//!
//! It looks at every TCP and UDP packet of a port before the flows' rules do, as `ip_rcv_core`,
//! `ip6_rcv_core` and conntrack do (`tcp_error`, `udp_error`), and leaves to the stack what these would
//! drop, cut, answer, or call invalid:
//!
//! | | IPv4 | IPv6 |
//! |---|---|---|
//! | version, header length | 4, 5 words: no options | 6 |
//! | TTL, hop limit | 2 and more | 2 and more |
//! | header checksum | right | |
//! | length | within the frame; nothing behind it but the padding of short frames | within the frame; nothing behind it |
//! | extension headers | | hop-by-hop, routing, destination: none in front |
//! | TCP | a data offset of 5 words and more, within the packet | the same |
//! | UDP | a length of 8 and more, within the packet | the same |
//!
//! Fragments and other protocols are no flow's, and not judged: filters behind ours see them. So is
//! whatever is not what the ethertype of its prio says: a frame with two tags.
//!
//! Not looked at: the L4 checksum, over all the bytes of a packet, which conntrack does verify
//! (`nf_conntrack_checksum`); no rule makes a wrong one right.
//!
//! The length of what GRO has put together beyond 64 kB is 0 in the header; then that of the frame counts,
//! as for the stack.

use crate::bpf::assembler::{Assembler, Context, If, Insn, Label, Reg::*, Width};
use crate::tc_flower::uapi::*;

/// A verdict of a program of `cls_bpf`: no match, the next filter is asked.
pub(super) const TO_THE_FLOWS: i32 = 0;
/// A match: the filter's action is carried out, which passes the packet on to the stack.
pub(super) const TO_THE_STACK: i32 = -1;

const ETH: i32 = 14;
/// What an Ethernet frame has at least behind its header: what is shorter is padded.
const SHORTEST: i32 = 46;
// linux/in.h
const IPPROTO_TCP: i32 = 6;
const IPPROTO_UDP: i32 = 17;

/// Where a family's header has what, and how long it is.
struct Header {
    len: i16,
    protocol: i16,
    total: i16,
    time_to_live: i16,
}

pub(super) fn assemble(family: Family) -> Vec<Insn> {
    let header = if family.is_ipv6() {
        Header { len: 40, protocol: 6, total: 4, time_to_live: 7 }
    } else {
        Header { len: 20, protocol: 9, total: 2, time_to_live: 8 }
    };
    let mut a = Assembler::default();
    let [stack, flows] = [a.label(), a.label()];
    a.mov(R6, R1);
    a.load_context(R0, R6, Context::Protocol);
    a.jump_if(If::NotEqual, R0, i32::from(family.ip_ethertype().to_be()), flows);
    // The header and the first 8 bytes of L4, which is all of UDP's.
    let loaded = header.len + 8;
    a.load_bytes(ETH, loaded.into(), loaded.into());
    a.jump_if(If::NotEqual, R0, 0, stack);
    let at = |field: i16| field - loaded;

    let ours = a.label();
    a.load(Width::Byte, R1, R10, at(header.protocol));
    a.jump_if(If::Equal, R1, IPPROTO_TCP, ours);
    a.jump_if(If::Equal, R1, IPPROTO_UDP, ours);
    if family.is_ipv6() {
        // Those that flower passes over on its way to L4.
        for extension in [0, 43, 60] {
            a.jump_if(If::Equal, R1, extension, stack);
        }
    }
    a.jump(flows);
    a.place(ours);
    a.load(Width::Byte, R1, R10, at(0));
    if family.is_ipv6() {
        a.and(R1, 0xf0);
        a.jump_if(If::NotEqual, R1, 0x60, stack);
    } else {
        a.jump_if(If::NotEqual, R1, 0x45, stack);
        a.load(Width::Half, R1, R10, at(6));
        a.be16_to_host(R1);
        a.and(R1, 0x3fff); // more fragments, offset
        a.jump_if(If::NotEqual, R1, 0, flows);
    }
    a.load(Width::Byte, R1, R10, at(header.time_to_live));
    a.jump_if(If::Less, R1, 2, stack);
    if !family.is_ipv6() {
        a.sum_of_header(R1, R2, loaded);
        a.jump_if(If::NotEqual, R1, 0xffff, stack);
    }
    length(&mut a, &header, at(header.total), family, stack);
    l4(&mut a, &header, at(header.protocol), at(header.len + 4), stack);
    a.place(flows);
    a.ret(TO_THE_FLOWS);
    a.place(stack);
    a.ret(TO_THE_STACK);
    a.finish()
}

/// Leaves in R7 how many bytes L4 has.
fn length(a: &mut Assembler, header: &Header, total: i16, family: Family, stack: Label) {
    // In R8 what the frame has room for, counted as the header counts.
    let counted_from = if family.is_ipv6() { i32::from(header.len) } else { 0 };
    a.load_context(R8, R6, Context::Len);
    a.add(R8, -(ETH + counted_from));
    a.load(Width::Half, R7, R10, total);
    a.be16_to_host(R7);
    let [said, cut] = [a.label(), a.label()];
    a.jump_if(If::NotEqual, R7, 0, said);
    a.load_context(R1, R6, Context::GsoSize);
    a.jump_if(If::Equal, R1, 0, stack);
    a.mov(R7, R8);
    a.place(said);
    a.jump_if_reg(If::Greater, R7, R8, stack);
    a.jump_if_reg(If::Equal, R7, R8, cut);
    a.jump_if(If::Greater, R8, SHORTEST - counted_from, stack);
    a.place(cut);
    if !family.is_ipv6() {
        // One that is shorter than its header wraps around: the stack's answer comes first.
        a.jump_if(If::Less, R7, i32::from(header.len), stack);
        a.add(R7, -i32::from(header.len));
    }
}

fn l4(a: &mut Assembler, header: &Header, protocol: i16, udp_length: i16, stack: Label) {
    let [tcp, done] = [a.label(), a.label()];
    a.load(Width::Byte, R1, R10, protocol);
    a.jump_if(If::Equal, R1, IPPROTO_TCP, tcp);
    a.load(Width::Half, R1, R10, udp_length);
    a.be16_to_host(R1);
    a.jump_if(If::Less, R1, 8, stack);
    a.jump_if_reg(If::Greater, R1, R7, stack);
    a.jump(done);
    a.place(tcp);
    let below = i32::from(header.len) + 16;
    a.load_bytes(ETH + i32::from(header.len) + 12, 1, below);
    a.jump_if(If::NotEqual, R0, 0, stack);
    a.load(Width::Byte, R1, R10, -header.len - 16);
    // Words in the upper half of the byte: bytes.
    a.and(R1, 0xf0);
    a.shift_right(R1, 2);
    a.jump_if(If::Less, R1, 20, stack);
    a.jump_if_reg(If::Greater, R1, R7, stack);
    a.place(done);
}
