//! The headers of a frame, read as smoltcp does: every access is checked, nothing is copied but
//! what is asked for, and no input can make it panic.

use std::net::{Ipv4Addr, Ipv6Addr};

use netdev_providers::{L4Proto, MacAddr, Tuple};

const ETHERNET_LEN: usize = 14;
/// Bytes of `struct virtio_net_hdr`, which the kernel puts in front of every frame.
pub(crate) const VNET_LEN: usize = 10;

/// `N` bytes at an offset, where there are so many.
fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_be_bytes)
}

/// The Ethernet header, and of TCP and UDP what a connection table wants to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) dst: MacAddr,
    pub(crate) src: MacAddr,
    pub(crate) ethertype: u16,
    /// `None` for whatever is switched without being tracked: ARP, ICMP, fragments, IPv6 packets
    /// with extension headers, and what is cut short. Rules do not take these either.
    pub(crate) segment: Option<Segment>,
}

/// One TCP segment or UDP datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) tuple: Tuple,
    /// Flags of TCP, 0 for UDP.
    pub(crate) flags: u8,
    /// Bytes behind the L4 header.
    pub(crate) payload: usize,
}

pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const ACK: u8 = 0x10;

impl Frame {
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let ethertype = u16_at(bytes, 12)?;
        let l3 = bytes.get(ETHERNET_LEN..)?;
        Some(Self {
            dst: MacAddr(array(bytes, 0)?),
            src: MacAddr(array(bytes, 6)?),
            ethertype,
            segment: match i32::from(ethertype) {
                libc::ETH_P_IP => ipv4(l3),
                libc::ETH_P_IPV6 => ipv6(l3),
                _ => None,
            },
        })
    }
}

fn ipv4(b: &[u8]) -> Option<Segment> {
    let first = *b.first()?;
    let header = usize::from(first & 0xf) * 4;
    let total = usize::from(u16_at(b, 2)?);
    let fragment = u16_at(b, 6)? & 0x3fff; // more fragments, or an offset
    if first >> 4 != 4 || header < 20 || fragment != 0 {
        return None;
    }
    let (src, dst) = (Ipv4Addr::from(array::<4>(b, 12)?), Ipv4Addr::from(array::<4>(b, 16)?));
    // What is behind the total length is padding of a short frame.
    let l4 = b.get(header..total)?;
    segment(*b.get(9)?, l4, |proto, sport, dport| {
        Tuple::new(proto, src.into(), sport, dst.into(), dport)
    })
}

fn ipv6(b: &[u8]) -> Option<Segment> {
    if b.first()? >> 4 != 6 {
        return None;
    }
    let length = usize::from(u16_at(b, 4)?);
    let (src, dst) = (Ipv6Addr::from(array::<16>(b, 8)?), Ipv6Addr::from(array::<16>(b, 24)?));
    let l4 = b.get(40..40 + length)?;
    segment(*b.get(6)?, l4, |proto, sport, dport| {
        Tuple::new(proto, src.into(), sport, dst.into(), dport)
    })
}

fn segment(
    proto: u8,
    l4: &[u8],
    tuple: impl FnOnce(L4Proto, u16, u16) -> Option<Tuple>,
) -> Option<Segment> {
    let proto = L4Proto::from_number(proto)?;
    let tuple = tuple(proto, u16_at(l4, 0)?, u16_at(l4, 2)?)?;
    let (header, flags) = match proto {
        L4Proto::Tcp => {
            let header = usize::from(*l4.get(12)? >> 4) * 4;
            (if header < 20 { return None } else { header }, *l4.get(13)?)
        }
        L4Proto::Udp => {
            let length = usize::from(u16_at(l4, 4)?);
            (if length < 8 || length > l4.len() { return None } else { 8 }, 0)
        }
    };
    Some(Segment { tuple, flags, payload: l4.len().checked_sub(header)? })
}

/// How many packets this frame will be on a wire: a virtual netdev hands over what the sender left
/// to segmentation offload as one. tc counts them in the same way (`bstats_update`).
pub(crate) fn packets_on_the_wire(vnet: &[u8], segment: Option<&Segment>) -> u64 {
    const GSO_NONE: u8 = 0;
    let size = array(vnet, 4).map_or(0, u16::from_ne_bytes);
    match (vnet.get(1), segment) {
        (Some(&gso), Some(s)) if gso != GSO_NONE && size != 0 => {
            s.payload.div_ceil(usize::from(size)).max(1) as u64
        }
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tcp4(flags: u8, payload: usize) -> Vec<u8> {
        let mut b = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
        let total = u16::try_from(40 + payload).unwrap().to_be_bytes();
        b.extend([0x45, 0, total[0], total[1], 0, 1, 0x40, 0, 64, 6, 0, 0]);
        b.extend([192, 0, 2, 1, 198, 51, 100, 2]);
        b.extend([0x10, 0x68, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
        b.resize(b.len() + payload, 7);
        b
    }

    #[test]
    fn a_tcp_segment_is_read() {
        let frame = Frame::parse(&tcp4(SYN, 100)).unwrap();
        assert_eq!(frame.dst, MacAddr([2, 0, 0, 0, 0, 2]));
        let s = frame.segment.unwrap();
        assert_eq!(s.tuple, "tcp 192.0.2.1:4200 > 198.51.100.2:80".parse().unwrap());
        assert_eq!((s.flags, s.payload), (SYN, 100));
    }

    #[test]
    fn padding_is_not_payload() {
        let mut b = tcp4(ACK, 0);
        b.resize(60, 0);
        assert_eq!(Frame::parse(&b).unwrap().segment.unwrap().payload, 0);
    }

    #[test]
    fn fragments_are_not_tracked() {
        for (at, value) in [(20, 0x20), (21, 1)] {
            let mut b = tcp4(0, 0);
            b[at] = value;
            assert_eq!(Frame::parse(&b).unwrap().segment, None);
        }
    }

    #[test]
    fn segments_are_counted_as_they_leave() {
        let s = Frame::parse(&tcp4(ACK, 3000)).unwrap().segment;
        let [a, b] = 1448u16.to_ne_bytes();
        assert_eq!(packets_on_the_wire(&[0, 1, 0, 0, a, b, 0, 0, 0, 0], s.as_ref()), 3);
        assert_eq!(packets_on_the_wire(&[0; 10], s.as_ref()), 1);
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(b in proptest::collection::vec(any::<u8>(), 0..120), cut in 0usize..75, at in 0usize..54, value: u8) {
            let _ = Frame::parse(&b);
            let mut b = tcp4(0, 20);
            b[at] = value;
            let _ = Frame::parse(&b[..b.len() - cut]);
        }
    }
}
