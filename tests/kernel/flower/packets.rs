//! Packets made and taken apart byte by byte.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use netdev_providers::{L4Proto, MacAddr, Tuple};
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{setsockopt, sockopt};

use super::{CLIENT, LAN};

/// A raw socket on one netdev of the calling thread's namespace.
pub(crate) struct Wire(OwnedFd);

const SOL_PACKET: i32 = 263;
const PACKET_AUXDATA: i32 = 8;
const PACKET_VNET_HDR: i32 = 15;
const TP_STATUS_VLAN_VALID: u32 = 1 << 4;

impl Wire {
    pub(crate) fn open(name: &str, vnet_hdr: bool) -> Self {
        let protocol = i32::from((libc::ETH_P_ALL as u16).to_be());
        // SAFETY: a system call without pointers; the descriptor is new and nobody else's.
        let fd = unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, protocol);
            assert!(fd >= 0, "AF_PACKET");
            OwnedFd::from_raw_fd(fd)
        };
        let int = |level, option, value: i32| {
            // SAFETY: `value` is an int, and lives through the call.
            let r = unsafe {
                libc::setsockopt(fd.as_raw_fd(), level, option, (&raw const value).cast(), 4)
            };
            assert_eq!(r, 0, "setsockopt");
        };
        int(SOL_PACKET, PACKET_AUXDATA, 1);
        setsockopt(&fd, sockopt::RcvBufForce, &(16 << 20)).unwrap();
        if vnet_hdr {
            int(SOL_PACKET, PACKET_VNET_HDR, 1);
        }
        // SAFETY: all zeros is a valid sockaddr_ll, and the length given is its size.
        unsafe {
            let mut at: libc::sockaddr_ll = std::mem::zeroed();
            at.sll_family = libc::AF_PACKET as u16;
            at.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
            at.sll_ifindex = i32::try_from(if_nametoindex(name).unwrap()).unwrap();
            let len = size_of::<libc::sockaddr_ll>() as u32;
            assert_eq!(libc::bind(fd.as_raw_fd(), (&raw const at).cast(), len), 0, "bind");
        }
        Self(fd)
    }

    pub(crate) fn send(&self, bytes: &[u8]) {
        let n = nix::unistd::write(&self.0, bytes).unwrap();
        assert_eq!(n, bytes.len());
    }

    /// The next frame, with the VLAN tag that the kernel has taken out of it put back.
    pub(super) fn receive_one(&self, buf: &mut [u8]) -> nix::Result<Vec<u8>> {
        // struct cmsghdr and struct tpacket_auxdata: status, two lengths, two offsets, TCI, TPID.
        let mut control = [0u64; 8];
        let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        // SAFETY: all zeros is a valid msghdr; what it is then pointed to (one iovec over `buf`, and
        // `control`) outlives the call. Of the control messages only the header that
        // `CMSG_FIRSTHDR` finds within `control`, and the 20 bytes behind it, are read.
        let (n, aux) = unsafe {
            let mut msg: libc::msghdr = std::mem::zeroed();
            msg.msg_iov = &raw mut iov;
            msg.msg_iovlen = 1;
            msg.msg_control = control.as_mut_ptr().cast();
            msg.msg_controllen = size_of_val(&control);
            let n = libc::recvmsg(self.0.as_raw_fd(), &raw mut msg, libc::MSG_DONTWAIT);
            let n = nix::errno::Errno::result(n)?;
            let header = libc::CMSG_FIRSTHDR(&raw const msg);
            let aux = (!header.is_null() && (*header).cmsg_level == SOL_PACKET)
                .then(|| libc::CMSG_DATA(header).cast::<[u8; 20]>().read_unaligned());
            (n as usize, aux)
        };
        let mut frame = buf[..n].to_vec();
        if let Some(aux) = aux
            && u32::from_ne_bytes([aux[0], aux[1], aux[2], aux[3]]) & TP_STATUS_VLAN_VALID != 0
        {
            let half = |at: usize| u16::from_ne_bytes([aux[at], aux[at + 1]]).to_be_bytes();
            frame.splice(12..12, [half(18), half(16)].concat());
        }
        Ok(frame)
    }

    /// Frames that arrive until `within` has passed without one that `want` wants, at most `max`.
    pub(crate) fn receive(
        &self,
        max: usize,
        within: Duration,
        want: impl Fn(&[u8]) -> bool,
    ) -> Vec<Vec<u8>> {
        let mut got = Vec::new();
        let mut until = Instant::now() + within;
        let mut buf = vec![0; 70_000];
        while got.len() < max && Instant::now() < until {
            match self.receive_one(&mut buf) {
                Ok(frame) => {
                    if want(&frame) {
                        got.push(frame);
                        until = Instant::now() + within;
                    }
                }
                Err(nix::errno::Errno::EAGAIN) => std::thread::sleep(Duration::from_millis(2)),
                Err(e) => panic!("recv: {e}"),
            }
        }
        got
    }
}

/// The one's-complement sum of RFC 1071, not complemented.
pub(super) fn sum(start: u32, bytes: &[u8]) -> u16 {
    let mut s = u64::from(start);
    for pair in bytes.chunks(2) {
        s += u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while s > 0xffff {
        s = (s & 0xffff) + (s >> 16);
    }
    s as u16
}

pub(super) fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

pub(super) fn pseudo_header(src: &[u8], dst: &[u8], proto: u8, len: usize) -> u32 {
    let addresses = sum(0, &[src, dst].concat());
    u32::from(addresses) + u32::from(proto) + u32::try_from(len).unwrap()
}

/// How a packet that is sent looks, beyond its tuple.
#[derive(Clone, Debug)]
pub(crate) struct Packet {
    pub(super) tuple: Tuple,
    pub(super) ttl: u8,
    pub(super) tcp_flags: u8,
    /// IPv4 options, a multiple of 4 bytes.
    pub(super) options: Vec<u8>,
    /// IPv6 extension headers: the type of the first, and all their bytes (whose last next-header
    /// field is to be filled in by the caller).
    pub(super) extension: Option<(u8, Vec<u8>)>,
    /// The fragment field of IPv4: flags and offset.
    pub(super) fragment: u16,
    pub(super) payload: Vec<u8>,
    /// UDP without a checksum.
    pub(super) no_checksum: bool,
    pub(super) eth_dst: MacAddr,
    /// VLAN tags, the outermost first: ethertype and TCI.
    pub(super) tags: Vec<(u16, u16)>,
}

impl Packet {
    pub(crate) fn new(tuple: Tuple) -> Self {
        Self {
            tuple,
            ttl: 64,
            tcp_flags: 0x18, // PSH, ACK
            options: Vec::new(),
            extension: None,
            fragment: 0,
            payload: (0..101).collect(),
            no_checksum: false,
            eth_dst: LAN,
            tags: Vec::new(),
        }
    }

    /// With a hop-by-hop (0), routing (43) or destination (60) header of 8 bytes with padding, or a
    /// fragment header (44) that says "whole packet".
    pub(super) fn with_extension(self, kind: u8) -> Self {
        let next = self.tuple.proto().number();
        let bytes = match kind {
            44 => vec![next, 0, 0, 0, 0, 0, 0, 9],
            43 => vec![next, 0, 0, 0, 0, 0, 0, 0],
            _ => vec![next, 0, 1, 4, 0, 0, 0, 0],
        };
        Self { extension: Some((kind, bytes)), ..self }
    }

    /// Where the IP header begins.
    pub(super) fn l3_at(&self) -> usize {
        14 + 4 * self.tags.len()
    }

    pub(super) fn l3_len(&self) -> usize {
        let extension = self.extension.as_ref().map_or(0, |(_, b)| b.len());
        if self.tuple.is_ipv6() { 40 + extension } else { 20 + self.options.len() }
    }

    pub(super) fn l4_header_len(&self) -> usize {
        match self.tuple.proto() {
            L4Proto::Tcp => 20,
            L4Proto::Udp => 8,
        }
    }

    /// Offset of the checksum within the L4 header.
    pub(super) fn check_at(&self) -> usize {
        match self.tuple.proto() {
            L4Proto::Tcp => 16,
            L4Proto::Udp => 6,
        }
    }

    /// The frame; `partial`: with the pseudo-header sum where the L4 checksum belongs.
    pub(crate) fn frame(&self, partial: bool) -> Vec<u8> {
        let t = &self.tuple;
        let mut l4 = [t.sport().to_be_bytes(), t.dport().to_be_bytes()].concat();
        let len = self.l4_header_len() + self.payload.len();
        match t.proto() {
            L4Proto::Tcp => {
                l4.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, self.tcp_flags, 0xff, 0, 0, 0, 0, 0]);
            }
            L4Proto::Udp => {
                l4.extend(u16::try_from(len).unwrap().to_be_bytes());
                l4.extend([0, 0]);
            }
        }
        l4.extend(&self.payload);
        let (src, dst) = (octets(t.src()), octets(t.dst()));
        let pseudo = pseudo_header(&src, &dst, t.proto().number(), len);
        let check = if partial {
            sum(pseudo, &[])
        } else if self.no_checksum {
            0
        } else {
            match !sum(pseudo, &l4) {
                0 => 0xffff,
                c => c,
            }
        };
        let at = self.check_at();
        l4[at..at + 2].copy_from_slice(&check.to_be_bytes());

        let mut f = [self.eth_dst.0, CLIENT.0].concat();
        for (ethertype, tci) in &self.tags {
            f.extend([ethertype.to_be_bytes(), tci.to_be_bytes()].concat());
        }
        if t.is_ipv6() {
            let (first, extension) = self.extension.clone().unwrap_or((t.proto().number(), vec![]));
            f.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            f.extend(u16::try_from(extension.len() + l4.len()).unwrap().to_be_bytes());
            f.extend([first, self.ttl]);
            f.extend([src, dst, extension].concat());
        } else {
            let ihl = 5 + self.options.len() / 4;
            let mut ip = vec![0x40 | u8::try_from(ihl).unwrap(), 0];
            ip.extend(u16::try_from(ihl * 4 + l4.len()).unwrap().to_be_bytes());
            ip.extend([0x12, 0x34]);
            ip.extend(self.fragment.to_be_bytes());
            ip.extend([self.ttl, t.proto().number(), 0, 0]);
            ip.extend([src, dst, self.options.clone()].concat());
            let check = !sum(0, &ip);
            ip[10..12].copy_from_slice(&check.to_be_bytes());
            f.extend([8, 0]);
            f.extend(ip);
        }
        f.extend(l4);
        f
    }

    /// The frame as a stack leaves it to the netdev to finish, behind a header that says how
    /// (`PACKET_VNET_HDR`): the checksum, and segments of `gso` bytes of payload, if not 0.
    pub(super) fn unfinished(&self, gso: u16) -> Vec<u8> {
        [self.vnet_header(gso).to_vec(), self.frame(true)].concat()
    }

    /// `struct virtio_net_hdr`.
    fn vnet_header(&self, gso: u16) -> [u8; 10] {
        let mut h = [0; 10];
        h[0] = 1; // VIRTIO_NET_HDR_F_NEEDS_CSUM
        let start = self.l3_at() + self.l3_len();
        h[6..8].copy_from_slice(&u16::try_from(start).unwrap().to_ne_bytes());
        h[8..10].copy_from_slice(&u16::try_from(self.check_at()).unwrap().to_ne_bytes());
        if gso != 0 {
            h[1] = match (self.tuple.proto(), self.tuple.is_ipv6()) {
                (L4Proto::Tcp, false) => 1, // VIRTIO_NET_HDR_GSO_TCPV4
                (L4Proto::Tcp, true) => 4,  // VIRTIO_NET_HDR_GSO_TCPV6
                (L4Proto::Udp, _) => 5,     // VIRTIO_NET_HDR_GSO_UDP_L4
            };
            let headers = self.l3_at() + self.l3_len() + self.l4_header_len();
            h[2..4].copy_from_slice(&u16::try_from(headers).unwrap().to_ne_bytes());
            h[4..6].copy_from_slice(&gso.to_ne_bytes());
        }
        h
    }
}

/// A frame as it was received.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) dst: MacAddr,
    pub(super) src: MacAddr,
    /// VLAN tags, the outermost first: ethertype and TCI.
    pub(super) tags: Vec<(u16, u16)>,
    pub(crate) tuple: Tuple,
    pub(super) ttl: u8,
    pub(crate) ip_checksum_right: bool,
    pub(super) l4_check: u16,
    pub(crate) l4_checksum_right: bool,
    pub(crate) payload: Vec<u8>,
}

/// `None` for frames that are not plain TCP or UDP over IP.
pub(crate) fn parse(frame: &[u8]) -> Option<Seen> {
    let mac = |at: usize| Some(MacAddr(frame.get(at..at + 6)?.try_into().ok()?));
    let mut tags = Vec::new();
    let mut rest = frame.get(12..)?;
    while let &[0x81, 0, t0, t1, ..] | &[0x88, 0xa8, t0, t1, ..] = rest {
        tags.push((u16::from_be_bytes([rest[0], rest[1]]), u16::from_be_bytes([t0, t1])));
        rest = &rest[4..];
    }
    let ip = rest.get(2..)?;
    let (proto, ttl, src, dst, l4, ip_ok): (_, _, IpAddr, IpAddr, _, _) = match rest.get(..2)? {
        [8, 0] => {
            let header = ip.get(..usize::from(ip.first()? & 15) * 4)?;
            let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
            let a = |at: usize| -> [u8; 4] { header[at..at + 4].try_into().unwrap() };
            let (src, dst) = (Ipv4Addr::from(a(12)), Ipv4Addr::from(a(16)));
            let ok = sum(0, header) == 0xffff;
            (ip[9], ip[8], src.into(), dst.into(), ip.get(header.len()..total)?, ok)
        }
        [0x86, 0xdd] => {
            let total = 40 + usize::from(u16::from_be_bytes([*ip.get(4)?, *ip.get(5)?]));
            let a = |at: usize| -> Option<[u8; 16]> { ip.get(at..at + 16)?.try_into().ok() };
            let (src, dst) = (Ipv6Addr::from(a(8)?), Ipv6Addr::from(a(24)?));
            (ip[6], ip[7], src.into(), dst.into(), ip.get(40..total)?, true)
        }
        _ => return None,
    };
    let proto = L4Proto::from_number(proto)?;
    let (header, at) = if proto == L4Proto::Tcp { (20, 16) } else { (8, 6) };
    let port = |at: usize| Some(u16::from_be_bytes([*l4.get(at)?, *l4.get(at + 1)?]));
    let pseudo = pseudo_header(&octets(src), &octets(dst), proto.number(), l4.len());
    Some(Seen {
        dst: mac(0)?,
        src: mac(6)?,
        tags,
        tuple: Tuple::new(proto, src, port(0)?, dst, port(2)?)?,
        ttl,
        ip_checksum_right: ip_ok,
        l4_check: port(at)?,
        l4_checksum_right: sum(pseudo, l4) == 0xffff,
        payload: l4.get(header..)?.to_vec(),
    })
}
