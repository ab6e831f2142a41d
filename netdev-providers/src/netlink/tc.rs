//! What is done at the hooks of netdevs, as the kernel announces it (`RTNLGRP_TC`): qdiscs that come and go, and
//! filters.
//!
//! Every rule that a provider writes is announced too, tens of thousands a second. A socket filter of the
//! kernel keeps those out of the socket: by their prio, which is behind those of others ([`listen`]).

use std::io;
use std::os::fd::AsFd;

use socket2::{SockFilter, SockRef};

use super::wire::Received;
use crate::contract::types::Ifindex;

/// `RTNLGRP_TC`.
pub const GROUP: u32 = 4;

// linux/rtnetlink.h
pub(super) const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
/// `TC_H_INGRESS` (linux/pkt_sched.h): the parent of the one qdisc that has an ingress hook, `ingress` or
/// `clsact`.
pub(super) const TC_H_INGRESS: u32 = 0xffff_fff1;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_EGRESS)`: the parent of filters at egress.
pub(crate) const PARENT_EGRESS: u32 = 0xffff_fff3;
/// The upper half of a parent that is the qdisc with the ingress hook.
const MAJOR_INGRESS: u16 = 0xffff;

// Where fields stand in a message: behind `struct nlmsghdr`, of 16 bytes, is `struct tcmsg`.
const AT_TYPE: u32 = 4;
const AT_IFINDEX: u32 = 20;
const AT_HANDLE: u32 = 24;
const AT_PARENT: u32 = 28;
/// The prio is the upper half of `tcm_info`, in host order.
const AT_PRIO: u32 = if cfg!(target_endian = "little") { 34 } else { 32 };
/// The upper half of `tcm_parent`.
const AT_MAJOR: u32 = if cfg!(target_endian = "little") { AT_PARENT + 2 } else { AT_PARENT };

/// A change at a hook of a netdev.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcEvent {
    /// Of which netdev.
    pub ifindex: Ifindex,
    /// The port id of the socket that asked for it.
    pub origin: u32,
    /// What.
    pub change: TcChange,
}

/// What has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcChange {
    /// There is a qdisc with an ingress hook now.
    QdiscMade,
    /// There is none any more: its filters are gone with it.
    QdiscRemoved,
    /// A qdisc that packets leave through came, changed, or has gone.
    EgressQdisc,
    /// A filter was added or removed.
    Filter {
        /// Where, as whoever asked for it said: `ffff:fff2` is ingress.
        parent: u32,
        /// Its prio.
        prio: u16,
        /// It is not one filter, but all of the prio that have gone.
        all_gone: bool,
    },
}

impl TcEvent {
    /// Reads a message; `None` when it tells of something else.
    #[must_use]
    pub fn parse(m: &Received<'_>) -> Option<Self> {
        let b: &[u8; 20] = m.fixed()?;
        let word = |at: usize| u32::from_ne_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let (handle, parent) = (word(8), word(12));
        let change = match m.ty {
            RTM_NEWQDISC if parent == TC_H_INGRESS => TcChange::QdiscMade,
            RTM_DELQDISC if parent == TC_H_INGRESS => TcChange::QdiscRemoved,
            RTM_NEWQDISC | RTM_DELQDISC => TcChange::EgressQdisc,
            RTM_NEWTFILTER | RTM_DELTFILTER => TcChange::Filter {
                parent,
                prio: u16::try_from(word(16) >> 16).ok()?,
                all_gone: m.ty == RTM_DELTFILTER && handle == 0,
            },
            _ => return None,
        };
        Some(Self { ifindex: Ifindex::new(word(4))?, origin: m.port, change })
    }
}

impl TcChange {
    /// It can concern packets that arrive.
    #[must_use]
    pub const fn is_at_ingress(self) -> bool {
        match self {
            Self::QdiscMade | Self::QdiscRemoved => true,
            Self::EgressQdisc => false,
            // An `ingress` qdisc takes filters for egress among its own.
            Self::Filter { parent, .. } => parent >> 16 == MAJOR_INGRESS as u32,
        }
    }

    /// It can concern packets that leave. (A qdisc that comes has no filters yet.)
    #[must_use]
    pub const fn is_at_egress(self) -> bool {
        match self {
            Self::QdiscRemoved | Self::EgressQdisc => true,
            Self::QdiscMade => false,
            Self::Filter { parent, .. } => {
                parent == PARENT_EGRESS || parent >> 16 != MAJOR_INGRESS as u32
            }
        }
    }
}

/// Has the kernel keep from this socket, which is to join [`GROUP`], all messages but those that tell of
/// a qdisc, of a filter at ingress with a smaller prio than `below`, of one at egress, and of a prio whose
/// filters have all gone; of all netdevs, or of one.
///
/// # Errors
/// That of the system call.
pub fn listen(socket: impl AsFd, below: u16, of: Option<Ifindex>) -> io::Result<()> {
    SockRef::from(&socket).attach_filter(&program(below, of))
}

/// A program of classic BPF. It loads in network byte order, and the kernel writes these messages in its own.
fn program(below: u16, of: Option<Ifindex>) -> Vec<SockFilter> {
    // linux/bpf_common.h
    const LD_W: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const LD_H: u16 = 0x28;
    const LD_B: u16 = 0x30;
    const LSH: u16 = 0x64; // BPF_ALU | BPF_LSH | BPF_K
    const OR_X: u16 = 0x4c;
    const TAX: u16 = 0x07;
    const JEQ: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const JGE: u16 = 0x35;
    const RET: u16 = 0x06;
    let word = |n: u32| u32::from_be_bytes(n.to_ne_bytes());
    let half = |n: u16| u32::from(u16::from_be_bytes(n.to_ne_bytes()));
    let op = |code, k| SockFilter::new(code, 0, 0, k);
    let (high, low) = if cfg!(target_endian = "little") {
        (AT_PRIO + 1, AT_PRIO)
    } else {
        (AT_PRIO, AT_PRIO + 1)
    };
    let jump = |code, yes, no, k| SockFilter::new(code, yes, no, k);
    // How far a jump goes is counted from the next instruction.
    vec![
        /* 0 */ op(LD_H, AT_TYPE),
        /* 1 */ jump(JEQ, 15, 0, half(RTM_NEWQDISC)),
        /* 2 */ jump(JEQ, 14, 0, half(RTM_DELQDISC)),
        /* 3 */ jump(JEQ, 3, 0, half(RTM_NEWTFILTER)),
        /* 4 */ jump(JEQ, 0, 14, half(RTM_DELTFILTER)),
        // A filter that has gone, or all of its prio.
        /* 5 */ op(LD_W, AT_HANDLE),
        /* 6 */ jump(JEQ, 10, 0, 0),
        // A filter: at egress, of a qdisc that packets leave through, or at ingress.
        /* 7 */
        op(LD_W, AT_PARENT),
        /* 8 */ jump(JEQ, 8, 0, word(PARENT_EGRESS)),
        /* 9 */ op(LD_H, AT_MAJOR),
        /* 10 */ jump(JEQ, 0, 6, half(MAJOR_INGRESS)),
        /* 11 */ op(LD_B, high),
        /* 12 */ op(LSH, 8),
        /* 13 */ op(TAX, 0),
        /* 14 */ op(LD_B, low),
        /* 15 */ op(OR_X, 0),
        /* 16 */ jump(JGE, 2, 0, u32::from(below)),
        // Of which netdev.
        /* 17 */ op(LD_W, AT_IFINDEX),
        /* 18 */ jump(JEQ, 1, u8::from(of.is_none()), of.map_or(0, |i| word(i.get()))),
        /* 19 */ op(RET, 0),
        /* 20 */ op(RET, u32::MAX),
    ]
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use netlink_sys::{Socket, SocketAddr};

    use super::*;
    use crate::netlink::wire::{Message, MessageIter};

    const INGRESS: u32 = 0xffff_fff2;

    /// `struct tcmsg` of these.
    fn message(ty: u16, ifindex: u32, handle: u32, parent: u32, prio: u16) -> Vec<u8> {
        let mut tcmsg = [0; 20];
        let info = u32::from(prio) << 16 | u32::from(0x0800_u16.to_be());
        for (at, word) in [(4, ifindex), (8, handle), (12, parent), (16, info)] {
            tcmsg[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        }
        let mut buf = Vec::new();
        let mut m = Message::new(&mut buf, ty, 0, 0);
        m.raw(&tcmsg);
        m.finish();
        buf
    }

    fn event(bytes: &[u8]) -> Option<TcEvent> {
        TcEvent::parse(&MessageIter::new(bytes).next().unwrap())
    }

    /// What the socket filter lets through, of messages that another socket sends.
    fn passed(of: Option<u32>, sent: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let protocol = libc::NETLINK_USERSOCK as isize;
        let mut socket = Socket::new(protocol).unwrap();
        let to = socket.bind_auto().unwrap();
        let end = message(RTM_NEWQDISC, of.unwrap_or(1), 0, TC_H_INGRESS, 0);
        listen(socket.as_fd(), 0xc100, of.and_then(Ifindex::new)).unwrap();
        let sender = Socket::new(protocol).unwrap();
        let to = SocketAddr::new(to.port_number(), 0);
        let mut got = Vec::new();
        for m in sent.iter().chain([&end]) {
            sender.send_to(m, &to, 0).unwrap();
        }
        loop {
            let (bytes, _) = socket.recv_from_full().unwrap();
            if bytes == end {
                return got;
            }
            got.push(bytes);
        }
    }

    #[test]
    fn of_filters_at_ingress_only_those_in_front_get_through_and_prios_that_have_gone() {
        let qdiscs = [
            message(RTM_NEWQDISC, 7, 0xffff_0000, TC_H_INGRESS, 0),
            message(RTM_DELQDISC, 7, 0xffff_0000, TC_H_INGRESS, 0),
            message(RTM_NEWQDISC, 7, 0x0001_0000, 0xffff_ffff, 0),
            message(RTM_DELQDISC, 7, 0x0001_0000, 0x0001_0001, 0),
        ];
        let filters = [
            message(RTM_NEWTFILTER, 7, 1, INGRESS, 1),
            message(RTM_NEWTFILTER, 7, 1, 0xffff_0000, 0xc0ff),
            message(RTM_DELTFILTER, 7, 0x8000_0001, INGRESS, 0x00ff),
            message(RTM_DELTFILTER, 7, 0, INGRESS, 0xc105),
            message(RTM_NEWTFILTER, 7, 1, PARENT_EGRESS, 0xffff),
            message(RTM_DELTFILTER, 7, 1, PARENT_EGRESS, 0xc104),
            message(RTM_NEWTFILTER, 7, 1, 0x0001_0000, 0xc104),
            message(RTM_NEWTFILTER, 7, 1, 0xfffe_fff2, 0xc104),
        ];
        let others = [
            message(RTM_NEWTFILTER, 7, 1, INGRESS, 0xc100),
            message(RTM_NEWTFILTER, 7, 1, INGRESS, 0xffff),
            message(RTM_DELTFILTER, 7, 1, INGRESS, 0xc104),
            message(40, 7, 1, TC_H_INGRESS, 1),
        ];
        let wanted = [&qdiscs[..], &filters].concat();
        let all = [&others[..2], &wanted, &others[2..]].concat();
        assert_eq!(passed(None, &all), wanted);
        assert_eq!(passed(Some(7), &all), wanted);
        assert_eq!(passed(Some(0x0700_0000), &all), <[Vec<u8>; 0]>::default());
        assert_eq!(passed(Some(8), &all), <[Vec<u8>; 0]>::default());
    }

    #[test]
    fn messages_say_what_has_changed_and_where() {
        let of = |change| {
            let ifindex = Ifindex::new(7).unwrap();
            Some(TcEvent { ifindex, origin: 0, change })
        };
        let made = message(RTM_NEWQDISC, 7, 0xffff_0000, TC_H_INGRESS, 0);
        assert_eq!(event(&made), of(TcChange::QdiscMade));
        let removed = message(RTM_DELQDISC, 7, 0xffff_0000, TC_H_INGRESS, 0);
        assert_eq!(event(&removed), of(TcChange::QdiscRemoved));
        let filter = |prio, all_gone| of(TcChange::Filter { parent: INGRESS, prio, all_gone });
        assert_eq!(event(&message(RTM_NEWTFILTER, 7, 0, INGRESS, 10)), filter(10, false));
        assert_eq!(event(&message(RTM_DELTFILTER, 7, 9, INGRESS, 10)), filter(10, false));
        assert_eq!(event(&message(RTM_DELTFILTER, 7, 0, INGRESS, 0xc105)), filter(0xc105, true));
        let root = message(RTM_NEWQDISC, 7, 0x0001_0000, 0xffff_ffff, 0);
        assert_eq!(event(&root), of(TcChange::EgressQdisc));
        assert_eq!(event(&message(16, 7, 0, TC_H_INGRESS, 0)), None);
        let short = &removed[..28];
        let mut short = short.to_vec();
        short[0..4].copy_from_slice(&28_u32.to_ne_bytes());
        assert_eq!(event(&short), None);
    }

    #[test]
    fn a_change_is_at_ingress_or_at_egress_or_can_be_at_both() {
        let filter = |parent| TcChange::Filter { parent, prio: 1, all_gone: false };
        let both = |c: TcChange| (c.is_at_ingress(), c.is_at_egress());
        assert_eq!(both(TcChange::QdiscMade), (true, false));
        assert_eq!(both(TcChange::QdiscRemoved), (true, true));
        assert_eq!(both(TcChange::EgressQdisc), (false, true));
        assert_eq!(both(filter(INGRESS)), (true, false));
        assert_eq!(both(filter(0xffff_0000)), (true, false));
        assert_eq!(both(filter(PARENT_EGRESS)), (true, true));
        assert_eq!(both(filter(0x0001_0000)), (false, true));
    }
}
