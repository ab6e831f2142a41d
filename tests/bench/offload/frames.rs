//! Connections as the far ends of a router see them: the frames of each step of a short life, and who sends them.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use netdev_providers::{Ifindex, L4Proto, Tuple};

/// Hosts behind each side of the router.
pub(crate) const CLIENTS: u32 = 10_000;
const SERVERS: u32 = 100;
/// Of the router, on either side; and of the next hop there, which is no netdev of this machine: what the router
/// sends there is dropped where it arrives.
pub(crate) const ROUTER_MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 1, 1], [2, 0, 0, 0, 2, 1]];
pub(crate) const NEXT_HOP_MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 1, 9], [2, 0, 0, 0, 2, 9]];

/// A frame without its checksum.
pub(crate) const FRAME: usize = 60;

/// What a packet is in the life of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The first of each direction: from here on it can be offloaded once more was seen of it.
    Open,
    Answer,
    /// Completes what makes TCP eligible; what more UDP has to say.
    Go,
    /// TCP's first data.
    Data,
    Fin,
    FinBack,
    LastAck,
}

impl Step {
    /// Whether the client sends it.
    pub(crate) const fn is_clients(self) -> bool {
        matches!(self, Self::Open | Self::Go | Self::Fin | Self::LastAck)
    }

    /// Flags, sequence number and acknowledgement of TCP: both sides count from 0, the answer has 6 bytes.
    const fn tcp(self) -> (u8, u32, u32) {
        const FIN: u8 = 1;
        const SYN: u8 = 2;
        const ACK: u8 = 16;
        match self {
            Self::Open => (SYN, 0, 0),
            Self::Answer => (SYN | ACK, 0, 1),
            Self::Go => (ACK, 1, 1),
            Self::Data => (ACK, 1, 1),
            Self::Fin => (FIN | ACK, 1, 1),
            Self::FinBack => (FIN | ACK, 1, 2),
            Self::LastAck => (ACK, 2, 2),
        }
    }
}

/// The steps that a connection of this number takes until both of its directions can have been sighted.
pub(crate) const fn opening(n: u32) -> &'static [Step] {
    if is_tcp(n) {
        &[Step::Open, Step::Answer, Step::Go, Step::Data]
    } else {
        &[Step::Open, Step::Answer, Step::Go]
    }
}

/// The steps that end it; of UDP there are none.
pub(crate) const fn closing(n: u32) -> &'static [Step] {
    if is_tcp(n) { &[Step::Fin, Step::FinBack, Step::LastAck] } else { &[] }
}

/// The step that makes it eligible.
pub(crate) const fn eligible_at(n: u32) -> Step {
    if is_tcp(n) { Step::Go } else { Step::Answer }
}

/// Every other one.
const fn is_tcp(n: u32) -> bool {
    n % 2 == 1
}

/// The original tuple of connection number n, which no other below 500 million has.
pub(crate) fn tuple(n: u32) -> Tuple {
    let (proto, k) = (if is_tcp(n) { L4Proto::Tcp } else { L4Proto::Udp }, n / 2);
    let client = k % CLIENTS;
    let [_, _, a, b] = client.to_be_bytes();
    let source = IpAddr::V4(Ipv4Addr::new(10, 1, a, b));
    let server = IpAddr::V4(Ipv4Addr::new(
        198,
        51,
        100,
        1 + (k.wrapping_mul(2_654_435_761) >> 16) as u8 % SERVERS as u8,
    ));
    let port = 1024 + (k / CLIENTS % 60_000) as u16;
    let service = if is_tcp(n) { 443 } else { 53 };
    Tuple::new(proto, source, port, server, service).expect("both are IPv4")
}

/// How it arrives at the router.
pub(crate) fn arriving(n: u32, step: Step) -> Tuple {
    if step.is_clients() { tuple(n) } else { tuple(n).inverted() }
}

/// Puts the frame of a step together.
pub(crate) fn frame(n: u32, step: Step) -> [u8; FRAME] {
    let tuple = arriving(n, step);
    let side = usize::from(!step.is_clients());
    let octets = |a: IpAddr| match a {
        IpAddr::V4(a) => a.octets(),
        IpAddr::V6(_) => unreachable!("made of IPv4"),
    };
    let mut f = [0; FRAME];
    f[..6].copy_from_slice(&ROUTER_MACS[side]);
    f[6..12].copy_from_slice(&NEXT_HOP_MACS[side]);
    f[12..14].copy_from_slice(&[8, 0]);
    let ip = &mut f[14..];
    // 46 bytes: 20 of IP, of TCP or UDP the rest.
    ip[0] = 0x45;
    ip[3] = 46;
    ip[6] = 0x40;
    ip[8] = 64;
    ip[9] = tuple.proto().number();
    ip[12..16].copy_from_slice(&octets(tuple.src()));
    ip[16..20].copy_from_slice(&octets(tuple.dst()));
    let sum = checksum(&ip[..20], 0);
    ip[10..12].copy_from_slice(&sum);
    let tcp = tuple.proto() == L4Proto::Tcp;
    // A segment of TCP carries nothing: what is left of the frame is padding.
    let l4_len = if tcp { 20 } else { 26 };
    if tcp {
        ip[3] = 40;
        ip[10..12].fill(0);
        let sum = checksum(&ip[..20], 0);
        ip[10..12].copy_from_slice(&sum);
    }
    ip[20..22].copy_from_slice(&tuple.sport().to_be_bytes());
    ip[22..24].copy_from_slice(&tuple.dport().to_be_bytes());
    let at = if tcp {
        let (flags, seq, ack) = step.tcp();
        ip[24..28].copy_from_slice(&seq.to_be_bytes());
        ip[28..32].copy_from_slice(&ack.to_be_bytes());
        ip[32] = 5 << 4;
        ip[33] = flags;
        ip[34..36].copy_from_slice(&8192_u16.to_be_bytes());
        36
    } else {
        ip[24..26].copy_from_slice(&26_u16.to_be_bytes());
        26
    };
    let pseudo = u32::from(tuple.proto().number()) + l4_len;
    let of_addresses: u32 =
        ip[12..20].chunks_exact(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    let sum = checksum(&ip[20..20 + l4_len as usize], pseudo + of_addresses);
    ip[at..at + 2].copy_from_slice(&sum);
    f
}

fn checksum(words: &[u8], before: u32) -> [u8; 2] {
    let words = words.chunks_exact(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])));
    let mut sum = before + words.sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// Sends frames out of a netdev, as they are.
pub(crate) struct Sender(OwnedFd);

impl Sender {
    pub(crate) fn open(netdev: Ifindex) -> Self {
        // SAFETY: no pointers.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        assert!(fd >= 0, "a packet socket: {}", io::Error::last_os_error());
        // SAFETY: it was opened here, and is nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: all zeroes is a value of this plain C structure.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = libc::AF_PACKET as u16;
        to.sll_ifindex = netdev.get().cast_signed();
        // SAFETY: the pointer is to a structure of this length, which lives through the call.
        let bound =
            unsafe { libc::bind(fd, (&raw const to).cast(), size_of_val(&to) as libc::socklen_t) };
        assert_eq!(bound, 0, "bind: {}", io::Error::last_os_error());
        let on: libc::c_int = 1;
        // SAFETY: the pointer is to a number of this length, which lives through the call.
        let set = unsafe {
            libc::setsockopt(
                fd,
                libc::SOL_PACKET,
                libc::PACKET_QDISC_BYPASS,
                (&raw const on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        };
        assert_eq!(set, 0, "PACKET_QDISC_BYPASS: {}", io::Error::last_os_error());
        Self(socket)
    }

    /// All of them, in order.
    pub(crate) fn send(&self, frames: &mut [[u8; FRAME]]) {
        let mut parts: Vec<_> = frames
            .iter_mut()
            .map(|f| libc::iovec { iov_base: f.as_mut_ptr().cast(), iov_len: FRAME })
            .collect();
        let mut messages: Vec<libc::mmsghdr> = parts
            .iter_mut()
            .map(|part| {
                // SAFETY: all zeroes is a value of this plain C structure.
                let mut m: libc::mmsghdr = unsafe { std::mem::zeroed() };
                m.msg_hdr.msg_iov = part;
                m.msg_hdr.msg_iovlen = 1;
                m
            })
            .collect();
        let mut left = &mut messages[..];
        while !left.is_empty() {
            // SAFETY: each message points to a part, and each part to a frame; all live through the call.
            let sent = unsafe {
                libc::sendmmsg(self.0.as_raw_fd(), left.as_mut_ptr(), left.len() as u32, 0)
            };
            match usize::try_from(sent) {
                Ok(sent) => left = &mut left[sent..],
                Err(_) => {
                    let e = io::Error::last_os_error();
                    assert!(
                        matches!(e.raw_os_error(), Some(libc::ENOBUFS | libc::EINTR)),
                        "sendmmsg: {e}"
                    );
                }
            }
        }
    }
}
