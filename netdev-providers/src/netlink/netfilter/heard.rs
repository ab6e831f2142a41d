//! Events of conntrack that a socket is to be given: those of some connections, and no others.
//!
//! On a router most connections are short, and of no concern to whoever listens; but each tells of itself when it is
//! answered and when it ends, and whoever listens is woken, reads and throws away. Here the kernel does: a socket
//! filter looks up the id of the connection (`CTA_ID`) in a map that says which are wanted. As the id is a hash of the
//! kernel's, its lowest bits choose a counter; events of others that have the same come along now and then. What is
//! no event of a connection, or cannot be read, is let through.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::conntrack::{CTA_ID, CtId, IPCTNL_MSG_CT_DELETE, IPCTNL_MSG_CT_NEW};
use super::{NFGENMSG_LEN, SUBSYS_CTNETLINK, msg_type};
use crate::bpf::assembler::{Assembler, Context, If, Insn, Reg::*, Width};
use crate::bpf::load::load_program;
use crate::bpf::tally::{Tally, attach};
use crate::netlink::Socket;
use crate::netlink::wire::NLMSG_HDRLEN;

// linux/bpf.h
const BPF_PROG_TYPE_SOCKET_FILTER: u32 = 1;
/// Both tuples, the zone and the id: with room for what later kernels may put in front.
const ATTRIBUTES: usize = 8;
/// Of the attribute, with its header.
const ID_LENGTH: i32 = 8;
/// Not a byte of it is kept; all of it is.
const DROP: i32 = 0;
const KEEP: i32 = -1;

/// Connections whose events are wanted.
#[derive(Debug)]
pub struct Heard {
    wanted: Arc<Tally>,
    program: OwnedFd,
}

/// As long as it lives, the connection's events are wanted.
#[derive(Debug)]
pub struct Wanted {
    wanted: Arc<Tally>,
    number: u32,
}

impl Heard {
    /// Nothing is wanted yet.
    ///
    /// # Errors
    /// The kernel lacks BPF, or does not let this process use it.
    pub fn new() -> io::Result<Self> {
        let wanted = Arc::new(Tally::new()?);
        let program = assemble(wanted.raw_fd());
        let program = load_program(BPF_PROG_TYPE_SOCKET_FILTER, c"heard", &program)?;
        Ok(Self { wanted, program })
    }

    /// From now on the socket is given events of those connections alone.
    ///
    /// # Errors
    /// That of the system call.
    pub fn filter(&self, socket: &Socket) -> io::Result<()> {
        attach(socket.as_fd(), &self.program)
    }

    /// Events of this connection are wanted: those from now on.
    #[must_use]
    pub fn of(&self, id: CtId) -> Wanted {
        let number = number(id);
        self.wanted.add(number);
        Wanted { wanted: Arc::clone(&self.wanted), number }
    }
}

impl Drop for Wanted {
    fn drop(&mut self) {
        self.wanted.remove(self.number);
    }
}

/// As the program loads it.
fn number(id: CtId) -> u32 {
    u32::from_ne_bytes(id.0.to_be_bytes())
}

/// R6: the context; R7: the length of the datagram; R8: where the next attribute begins.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "a header's length and a mask of 20 bits"
)]
fn assemble(map: i32) -> Vec<Insn> {
    const EVENTS: [u16; 2] = [
        msg_type(SUBSYS_CTNETLINK, IPCTNL_MSG_CT_NEW),
        msg_type(SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE),
    ];
    // linux/netlink.h: what of an attribute's type is not a flag.
    const NLA_TYPE_MASK: i32 = 0x3fff;
    let mut a = Assembler::default();
    let [keep, event, found, wanted] = [(); 4].map(|()| a.label());
    a.mov(R6, R1);
    a.load_context(R7, R6, Context::Len);
    // Length and type of the message.
    a.load_bytes(0, 8, 8);
    a.jump_if(If::NotEqual, R0, 0, keep);
    a.load(Width::Word, R1, R10, -8);
    // There is another one behind it.
    a.jump_if_reg(If::NotEqual, R1, R7, keep);
    a.load(Width::Half, R1, R10, -4);
    for ty in EVENTS {
        a.jump_if(If::Equal, R1, ty.into(), event);
    }
    a.ret(KEEP);
    a.place(event);
    a.set(R8, (NLMSG_HDRLEN + NFGENMSG_LEN) as i32);
    for _ in 0..ATTRIBUTES {
        // Length and type, and four bytes of the value.
        a.mov(R2, R8);
        a.load_bytes_at_r2(8, 8);
        a.jump_if(If::NotEqual, R0, 0, keep);
        a.load(Width::Half, R1, R10, -6);
        a.and(R1, NLA_TYPE_MASK);
        a.jump_if(If::Equal, R1, CTA_ID.into(), found);
        a.load(Width::Half, R1, R10, -8);
        a.jump_if(If::Less, R1, 4, keep);
        a.add(R1, 3);
        a.and(R1, !3);
        a.add_reg(R8, R1);
    }
    a.place(keep);
    a.ret(KEEP);
    a.place(found);
    a.load(Width::Half, R1, R10, -8);
    a.jump_if(If::NotEqual, R1, ID_LENGTH, wanted);
    a.load(Width::Word, R1, R10, -4);
    a.and(R1, (Tally::SIZE - 1) as i32);
    a.map_value(R2, map);
    a.add_reg(R2, R1);
    a.load(Width::Byte, R1, R2, 0);
    a.jump_if(If::NotEqual, R1, 0, wanted);
    a.ret(DROP);
    a.place(wanted);
    a.ret(KEEP);
    a.finish()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::os::unix::net::UnixDatagram;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::super::unhex;
    use super::*;
    use crate::bpf::load::tests::is_not_for_us;
    use crate::bpf::machine::{Packet, run_with_map};
    use crate::contract::types::{L4Proto, Tuple, Zone};
    use crate::netlink::MessageIter;
    use crate::netlink::netfilter::conntrack::about;

    /// `IPCTNL_MSG_CT_NEW` as an event of a change (the FIN), from a Linux 6.18.
    const UPDATE: &str = "\
        c4000000000100000000000000000000020000003400018014000180080001000a000202080002000a000102 \
        1c000280050001000600000006000200cb8200000600030080e100003400028014000180080001000a000102 \
        080002000a0002021c00028005000100060000000600020080e1000006000300cb82000008000c00e14b108a \
        080003000000000e0800070000069780300004802c0001800500010003000000050002000a00000005000300 \
        0a00000006000400230000000600050023000000";
    const UPDATED: CtId = CtId(0xe14b_108a);
    /// `IPCTNL_MSG_CT_DELETE` as an event, from the same.
    const DESTROY: &str = "\
        a40000000201000000000000ae5f20d5020000003400018014000180080001000a000202080002000a000102 \
        1c000280050001000600000006000200c6ae00000600030088f100003400028014000180080001000a000102 \
        080002000a0002021c00028005000100060000000600020088f1000006000300c6ae000008000c0032c44003 \
        080003000000020e080007000006977f100004800c0001800500010003000000";
    const DESTROYED: CtId = CtId(0x32c4_4003);

    fn is_kept(bytes: &[u8], wanted: &[CtId]) -> bool {
        let mut map = vec![0; Tally::SIZE];
        for id in wanted {
            map[number(*id) as usize % Tally::SIZE] = 1;
        }
        match run_with_map(&assemble(3), &mut Packet::new(bytes.to_vec()), usize::MAX, &map) {
            DROP => false,
            KEEP => true,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn events_of_wanted_connections_are_kept_and_no_others() {
        for (hex, id) in [(UPDATE, UPDATED), (DESTROY, DESTROYED)] {
            let event = unhex(hex);
            assert!(!is_kept(&event, &[]));
            assert!(is_kept(&event, &[id]));
            for bit in 0..20 {
                assert!(!is_kept(&event, &[CtId(id.0 ^ (1u32 << bit).to_be())]), "bit {bit}");
            }
            assert!(is_kept(&event, &[UPDATED, DESTROYED]));
        }
    }

    #[test]
    fn what_is_no_event_of_one_connection_is_kept() {
        let event = unhex(DESTROY);
        assert!(!is_kept(&event, &[]), "control");
        // Another message of the subsystem, and another subsystem's; an error.
        for ty in [0x105_u16, 0xa00, 2] {
            let mut other = event.clone();
            other[4..6].copy_from_slice(&ty.to_ne_bytes());
            assert!(is_kept(&other, &[]), "{ty:#x}");
        }
        assert!(is_kept(&[&event[..], &event[..]].concat(), &[]), "two of them");
        assert!(is_kept(&[], &[]));
        // Without an id, or cut off before it.
        let id_at = event.windows(4).position(|w| w == [8, 0, CTA_ID.to_le_bytes()[0], 0]).unwrap();
        let mut without = event.clone();
        without[id_at + 2] = 99;
        assert!(is_kept(&without, &[]));
        let mut short = event[..id_at + 4].to_vec();
        short[..4].copy_from_slice(&(u32::try_from(id_at).unwrap() + 4).to_ne_bytes());
        assert!(is_kept(&short, &[]));
        // A length that leads nowhere.
        let mut stuck = event;
        stuck[20..22].copy_from_slice(&3_u16.to_ne_bytes());
        assert!(is_kept(&stuck, &[]));
    }

    #[test]
    fn an_id_behind_a_zone_and_flags_of_attributes_is_found() {
        let at = |host, port| (Ipv4Addr::new(192, 0, 2, host).into(), port);
        let ((src, sport), (dst, dport)) = (at(1, 1000), at(2, 80));
        let original = Tuple::new(L4Proto::Udp, src, sport, dst, dport).unwrap();
        let mut event = Vec::new();
        let mut m = about(&mut event, IPCTNL_MSG_CT_DELETE, 0, 0, Zone(9), &original);
        m.be32(CTA_ID | 1 << 14, 77 << 24);
        m.finish();
        assert!(is_kept(&event, &[CtId(77 << 24)]) && !is_kept(&event, &[CtId(78 << 24)]));
    }

    /// And counts what is wanted, and what is no more.
    #[test]
    fn the_kernel_takes_the_program_and_shares_the_counters() {
        let heard = match Heard::new() {
            Err(e) if is_not_for_us(&e) => return,
            heard => heard.unwrap(),
        };
        let counted = |id| heard.wanted.count(number(id));
        let both = [heard.of(UPDATED), heard.of(UPDATED)];
        assert_eq!([counted(UPDATED), counted(DESTROYED)], [2, 0]);
        let [first, last] = both;
        drop(first);
        assert_eq!(counted(UPDATED), 1);
        drop(last);
        assert_eq!(counted(UPDATED), 0);
    }

    /// By the kernel, of whatever socket the datagrams are.
    #[test]
    fn a_socket_is_given_events_of_what_is_wanted_now_and_what_is_no_event() {
        let heard = match Heard::new() {
            Err(e) if is_not_for_us(&e) => return,
            heard => heard.unwrap(),
        };
        let (to, from) = UnixDatagram::pair().unwrap();
        from.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        attach(from.as_fd(), &heard.program).unwrap();
        let given = || {
            let mut given = Vec::new();
            for datagram in [unhex(UPDATE), unhex(DESTROY), vec![0; 4]] {
                to.send(&datagram).unwrap();
            }
            loop {
                let mut datagram = [0; 256];
                let len = from.recv(&mut datagram).unwrap();
                given.push(len);
                if len == 4 {
                    return given;
                }
            }
        };
        let [update, destroy] = [UPDATE, DESTROY].map(|event| unhex(event).len());
        assert_eq!(given(), [4]);
        let wanted = heard.of(UPDATED);
        assert_eq!(given(), [update, 4]);
        let both = (heard.of(DESTROYED), wanted);
        assert_eq!(given(), [update, destroy, 4]);
        drop(both);
        assert_eq!(given(), [4]);
        // What is no socket cannot have one.
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(attach(file.as_fd(), &heard.program).is_err());
    }

    proptest! {
        /// Whatever has been done to an event: it is dropped only for the id that is read in it.
        #[test]
        fn nothing_is_dropped_but_events_of_others(
            update: bool, changes in proptest::collection::vec((0usize..196, any::<u8>()), 0..4),
        ) {
            let mut event = unhex(if update { UPDATE } else { DESTROY });
            for (at, byte) in changes {
                if let Some(b) = event.get_mut(at) {
                    *b = byte;
                }
            }
            let id = MessageIter::new(&event)
                .next()
                .and_then(|m| m.attrs(NFGENMSG_LEN).find_type(CTA_ID)?.be32());
            if !is_kept(&event, &[]) {
                let id = id.map(CtId);
                prop_assert!(id.is_some(), "no id");
                prop_assert!(is_kept(&event, id.as_slice()));
            }
        }
    }
}
