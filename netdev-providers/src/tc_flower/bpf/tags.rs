//! The program that finds priority tags: whether a frame for this netdev's own address carries a tag of VLAN 0,
//! which is none: it tells a priority, and the stack takes it off on arrival. (Frames for others, which a bridge
//! forwards or a guest is given, keep theirs.)

use crate::bpf::assembler::{Assembler, Context, If, Insn, Reg::*};

/// A verdict of a program of `cls_bpf`: no match, the next filter is asked.
const NO: i32 = 0;
/// A match: the filter's action is carried out.
const YES: i32 = -1;
/// linux/if_packet.h
const PACKET_HOST: i32 = 0;
const VLAN_ID: i32 = 0xfff;

pub(super) fn assemble() -> Vec<Insn> {
    let mut a = Assembler::default();
    let no = a.label();
    a.load_context(R2, R1, Context::PacketType);
    a.jump_if(If::NotEqual, R2, PACKET_HOST, no);
    a.load_context(R2, R1, Context::VlanPresent);
    a.jump_if(If::Equal, R2, 0, no);
    a.load_context(R2, R1, Context::VlanTci);
    a.and(R2, VLAN_ID);
    a.jump_if(If::NotEqual, R2, 0, no);
    a.ret(YES);
    a.place(no);
    a.ret(NO);
    a.finish()
}
