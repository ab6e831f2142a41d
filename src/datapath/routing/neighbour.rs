//! Neighbours, and what bridges have learnt: asked for, and told that they are in use.
//!
//! **Of others nothing is changed.** What the kernel itself has found out by ARP and neighbour discovery
//! ages, and has to be told that packets go there which it does not see. What an administrator or a
//! control plane has put there does not age, and telling the kernel of it changes it:
//!
//! | entry | what `NTF_USE` would do to it | so |
//! |---|---|---|
//! | neighbour `PERMANENT` | takes the permanence off it and asks for the host by ARP (`__neigh_update`: `old & ~NUD_PERMANENT`): one that answers none is cut off | never written to |
//! | neighbour `NOARP` | nothing good: there is nothing to ask | never |
//! | neighbour `extern_learn`, `managed`, `extern_valid` | takes the flag off it | never |
//! | neighbour `REACHABLE`, `DELAY`, `PROBE` | nothing that the kernel is not about to do | not written to |
//! | neighbour `STALE` | is probed | told |
//! | fdb entry `static`, `permanent`, `sticky`, `extern_learn`, `locked`, `offloaded`, of any VLAN of the bridge | becomes a user's, moves to another port, is no NIC's any more (`br_fdb_update`) | never |
//! | fdb entry that the bridge has learnt | is young again | told |
//!
//! The entry is read right before it is told of, through the same socket. What somebody changes between
//! these two calls, some microseconds, is not seen: of entries that were stale just then.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netdev_providers::netlink::socket::{ACK, CREATE, DUMP, REQUEST};
use netdev_providers::netlink::wire::{Message, Received};
use netdev_providers::netlink::{NetlinkError, Socket};
use netdev_providers::{Ifindex, MacAddr};
use nix::errno::Errno;

const RTM_NEWNEIGH: u16 = 28;
const RTM_GETNEIGH: u16 = 30;

// linux/neighbour.h
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NDA_FLAGS_EXT: u16 = 15;
const NUD_REACHABLE: u16 = 0x02;
const NUD_STALE: u16 = 0x04;
/// `NUD_VALID`: packets may be sent to it.
const NUD_VALID: u16 = 0x80 | 0x40 | NUD_REACHABLE | 0x10 | NUD_STALE | 0x08;
/// Treat the neighbour as used, so that it is probed and kept; a bridge's entry as seen.
const NTF_USE: u8 = 0x01;
/// Of a netdev's own list, not the bridge's.
const NTF_SELF: u8 = 0x02;
/// The bridge's entry, not one of the netdev itself.
const NTF_MASTER: u8 = 0x04;
const NTF_EXT_LEARNED: u8 = 0x10;
const NTF_OFFLOADED: u8 = 0x20;
const NTF_STICKY: u8 = 0x40;
/// `struct ndmsg`.
const NDMSG: usize = 12;

/// An entry, as far as it concerns us. Attributes that we do not know do not matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    ifindex: u32,
    state: u16,
    flags: u8,
    /// `NTF_EXT_*`: managed, locked, and what kernels to come have.
    flags_ext: u32,
    /// Of a neighbour.
    address: Option<IpAddr>,
    mac: Option<MacAddr>,
}

impl Entry {
    fn of(m: &Received<'_>) -> Option<Self> {
        if m.ty != RTM_NEWNEIGH {
            return None;
        }
        let h: &[u8; NDMSG] = m.fixed()?;
        let attrs = m.attrs(NDMSG);
        let address = attrs.find_type(NDA_DST).and_then(|a| {
            <[u8; 4]>::try_from(a.payload)
                .map(|b| Ipv4Addr::from(b).into())
                .or_else(|_| <[u8; 16]>::try_from(a.payload).map(|b| Ipv6Addr::from(b).into()))
                .ok()
        });
        Some(Self {
            ifindex: u32::from_ne_bytes([h[4], h[5], h[6], h[7]]),
            state: u16::from_ne_bytes([h[8], h[9]]),
            flags: h[10],
            flags_ext: attrs.find_type(NDA_FLAGS_EXT).and_then(|a| a.u32()).unwrap_or(0),
            address,
            mac: attrs.find_type(NDA_LLADDR).and_then(|a| a.payload.try_into().ok()).map(MacAddr),
        })
    }

    fn usable_mac(&self) -> Option<MacAddr> {
        self.mac.filter(|_| self.state & NUD_VALID != 0)
    }

    /// Whether it is a neighbour that the kernel has found out by itself and is to be told of.
    const fn is_to_be_told_of(&self) -> bool {
        self.state == NUD_STALE && self.flags & NTF_EXT_LEARNED == 0 && self.flags_ext == 0
    }

    /// Whether it is an entry that a bridge has learnt from frames, and nobody else has a part in.
    const fn is_learnt(&self) -> bool {
        const OTHERS: u8 = NTF_EXT_LEARNED | NTF_OFFLOADED | NTF_STICKY;
        matches!(self.state, NUD_REACHABLE | NUD_STALE)
            && self.flags & OTHERS == 0
            && self.flags_ext == 0
    }
}

/// `None`: there is none.
fn get(
    socket: &mut Socket,
    ifindex: Ifindex,
    address: IpAddr,
) -> Result<Option<Entry>, NetlinkError> {
    let seq = socket.next_seq();
    let message = neighbour_request(RTM_GETNEIGH, ifindex, address, 0, seq);
    let mut entry = None;
    let answered = socket.request(&message, seq, |m| {
        entry = entry.or(Entry::of(&m).filter(|e| e.address == Some(address)));
    });
    match answered {
        Ok(()) => Ok(entry),
        // Not known yet: the packet that was seen makes the kernel ask for it.
        Err(NetlinkError::Kernel(k)) if k.errno == Errno::ENOENT => Ok(None),
        Err(e) => Err(e),
    }
}

/// The MAC address of a neighbour that packets may be sent to.
pub(super) fn look_up(
    socket: &mut Socket,
    ifindex: Ifindex,
    address: IpAddr,
) -> Result<Option<MacAddr>, NetlinkError> {
    Ok(get(socket, ifindex, address)?.and_then(|e| e.usable_mac()))
}

/// Tells the kernel that a neighbour is in use, though it does not see the packets: it is probed if it
/// has grown stale, and its having moved or gone is told. Not of those that are others'.
pub(super) fn keep(
    socket: &mut Socket,
    ifindex: Ifindex,
    address: IpAddr,
) -> Result<(), NetlinkError> {
    if !get(socket, ifindex, address)?.is_some_and(|e| e.is_to_be_told_of()) {
        return Ok(());
    }
    let seq = socket.next_seq();
    let message = neighbour_request(RTM_NEWNEIGH, ifindex, address, NTF_USE, seq);
    socket.request(&message, seq, |_| {})
}

/// Tells bridges that they have seen these senders on these of their ports, as they would have
/// themselves had the frames not gone by rules: what they have learnt stays. Not of those of which
/// somebody else has said, for whatever VLAN, where they are.
///
/// (The kernel notes it for each VLAN of the port as well, which a bridge that does not filter
/// VLANs has by default, with the number 1.)
pub(super) fn keep_learnt(
    socket: &mut Socket,
    bridge: Ifindex,
    seen: &[(Ifindex, MacAddr)],
) -> Result<(), NetlinkError> {
    let (mut learnt, mut others) = (HashSet::new(), HashSet::new());
    let seq = socket.next_seq();
    socket.dump(&fdb_dump_request(bridge, seq), seq, |m| {
        let Some(entry) = Entry::of(&m).filter(|e| e.flags & NTF_SELF == 0) else { return };
        let (Some(mac), Some(port)) = (entry.mac, Ifindex::new(entry.ifindex)) else { return };
        if entry.is_learnt() {
            learnt.insert((port, mac));
        } else {
            others.insert(mac);
        }
    })?;
    for (port, mac) in seen.iter().filter(|s| learnt.contains(s) && !others.contains(&s.1)) {
        let seq = socket.next_seq();
        socket.request(&fdb_request(*port, *mac, seq), seq, |_| {})?;
    }
    Ok(())
}

fn header(family: i32, ifindex: Ifindex, state: u16, flags: u8) -> [u8; NDMSG] {
    let mut header = [0; NDMSG];
    header[0] = u8::try_from(family).unwrap_or(0);
    header[4..8].copy_from_slice(&ifindex.get().to_ne_bytes());
    header[8..10].copy_from_slice(&state.to_ne_bytes());
    header[10] = flags;
    header
}

fn neighbour_request(ty: u16, ifindex: Ifindex, address: IpAddr, flags: u8, seq: u32) -> Vec<u8> {
    let mut buf = Vec::new();
    let mut m = Message::new(&mut buf, ty, REQUEST | ACK, seq);
    let family = if address.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET };
    m.raw(&header(family, ifindex, 0, flags));
    match address {
        IpAddr::V4(a) => m.attr(NDA_DST, &a.octets()),
        IpAddr::V6(a) => m.attr(NDA_DST, &a.octets()),
    };
    m.finish();
    buf
}

/// A frame from this address has come in on this port of a bridge (`br_fdb_update`).
fn fdb_request(port: Ifindex, mac: MacAddr, seq: u32) -> Vec<u8> {
    let mut buf = Vec::new();
    let mut m = Message::new(&mut buf, RTM_NEWNEIGH, REQUEST | ACK | CREATE, seq);
    m.raw(&header(libc::AF_BRIDGE, port, NUD_REACHABLE, NTF_MASTER | NTF_USE));
    m.attr(NDA_LLADDR, &mac.0);
    m.finish();
    buf
}

/// All entries of a bridge.
fn fdb_dump_request(bridge: Ifindex, seq: u32) -> Vec<u8> {
    let mut buf = Vec::new();
    let mut m = Message::new(&mut buf, RTM_GETNEIGH, REQUEST | DUMP, seq);
    // `struct ifinfomsg` and IFLA_MASTER: what is read from
    // sockets without strict checking (`valid_fdb_dump_legacy`).
    const IFLA_MASTER: u16 = 10;
    let mut ifinfomsg = [0; 16];
    ifinfomsg[0] = u8::try_from(libc::AF_BRIDGE).unwrap_or(0);
    m.raw(&ifinfomsg);
    m.u32(IFLA_MASTER, bridge.get());
    m.finish();
    buf
}

#[cfg(test)]
mod tests {
    use netdev_providers::netlink::wire::MessageIter;

    use super::*;

    fn entry(state: u16, flags: u8, flags_ext: u32) -> Entry {
        let address = "10.0.0.1".parse().unwrap();
        let mut buf = Vec::new();
        let mut m = Message::new(&mut buf, RTM_NEWNEIGH, 0, 1);
        m.raw(&header(libc::AF_INET, Ifindex::new(7).unwrap(), state, flags));
        m.attr(NDA_DST, &[10, 0, 0, 1]);
        m.attr(NDA_LLADDR, &[2, 0, 0, 0, 0, 1]);
        // Of a kernel to come.
        m.attr(999, b"\xff\xfe");
        m.u32(NDA_FLAGS_EXT, flags_ext);
        m.finish();
        let entry = Entry::of(&MessageIter::new(&buf).next().unwrap()).unwrap();
        assert_eq!((entry.ifindex, entry.address), (7, Some(address)));
        entry
    }

    #[test]
    fn only_what_the_kernel_has_found_out_and_grew_stale_is_told_of() {
        const NUD_PERMANENT: u16 = 0x80;
        const NUD_NOARP: u16 = 0x40;
        const NTF_EXT_MANAGED: u32 = 1;
        assert!(entry(NUD_STALE, 0, 0).is_to_be_told_of());
        const NTF_ROUTER: u8 = 0x80;
        assert!(entry(NUD_STALE, NTF_ROUTER, 0).is_to_be_told_of());
        for state in [0, 1, NUD_REACHABLE, 8, 0x10, 0x20, NUD_NOARP, NUD_PERMANENT] {
            assert!(!entry(state, 0, 0).is_to_be_told_of(), "{state}");
        }
        assert!(!entry(NUD_STALE, NTF_EXT_LEARNED, 0).is_to_be_told_of());
        assert!(!entry(NUD_STALE, 0, NTF_EXT_MANAGED).is_to_be_told_of());
        let mac = Some(MacAddr([2, 0, 0, 0, 0, 1]));
        for state in [NUD_REACHABLE, NUD_STALE, 8, 0x10, NUD_NOARP, NUD_PERMANENT] {
            assert_eq!(entry(state, 0, 0).usable_mac(), mac, "{state}");
        }
        for state in [0, 1, 0x20] {
            assert_eq!(entry(state, 0, 0).usable_mac(), None, "{state}");
        }
        assert!(entry(NUD_REACHABLE, NTF_MASTER, 0).is_learnt());
        for other in [
            entry(NUD_NOARP, 0, 0),
            entry(NUD_PERMANENT, 0, 0),
            entry(NUD_REACHABLE, NTF_EXT_LEARNED, 0),
            entry(NUD_REACHABLE, NTF_STICKY, 0),
            entry(NUD_REACHABLE, 0, 2),
        ] {
            assert!(!other.is_learnt(), "{other:?}");
        }
    }
}
