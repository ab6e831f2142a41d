//! The bound: a loop that sends messages which were all made before the clock started, and asks for
//! one acknowledgement, of the last. Its messages are the provider's own, byte for byte but for what
//! is particular to a rule: one is taken from the wire (an nlmon netdev) and patched.

use std::io::Read;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{RcvBufForce, SndBufForce};

use super::ours::Ours;
use super::rules;
use super::world::{ifindex, sh};

const RTM_NEWTFILTER: u16 = 44;
const NLMSG_ERROR: u16 = 2;
const NLM_F_ACK: u16 = 4;
/// Messages in one send: as many as the provider's.
const PER_SEND: usize = 256;
/// Offsets in a `struct nlmsghdr` and the `struct tcmsg` behind it.
const FLAGS: usize = 6;
const SEQ: usize = 8;
const IFINDEX: usize = 20;
const HANDLE: usize = 24;

/// A rule's message, and where in it stands what differs from rule to rule.
pub(crate) struct Template {
    message: Vec<u8>,
    source_at: Vec<usize>,
    epoch_at: Vec<usize>,
}

/// The number of the rule that is caught on the wire: its source address and its epoch are like
/// nothing else in the message.
const PATTERN: u32 = 0x00a1_b2c3;

impl Template {
    /// Has our provider add one rule on the netdev, and catches the message.
    pub(crate) fn catch(ours: &Ours) -> Self {
        sh("ip link add nlmon0 type nlmon && ip link set nlmon0 up");
        let mut wire = Monitor::open("nlmon0");
        let (_, done) = ours.run(ours.prepare_adds_from(PATTERN, 1));
        assert_eq!(done.len(), 1);
        let message = wire.message_of_type(RTM_NEWTFILTER);
        ours.flush();
        sh("ip link del nlmon0");
        let find = |what: &[u8]| -> Vec<usize> {
            (0..message.len()).filter(|&at| message[at..].starts_with(what)).collect()
        };
        let source_at = find(&rules::source(PATTERN).octets());
        let epoch_at = find(&(u64::from(PATTERN) + 1).to_be_bytes());
        assert_eq!(source_at.len(), 1, "the source address stands once in a rule without NAT");
        assert!(!epoch_at.is_empty(), "the cookie is in it");
        Self { message, source_at, epoch_at }
    }

    fn patched(&self, n: u32, ifindex: u32) -> Vec<u8> {
        let mut m = self.message.clone();
        let flags = u16::from_ne_bytes([m[FLAGS], m[FLAGS + 1]]) & !NLM_F_ACK;
        m[FLAGS..FLAGS + 2].copy_from_slice(&flags.to_ne_bytes());
        m[SEQ..SEQ + 4].copy_from_slice(&(n + 1).to_ne_bytes());
        m[IFINDEX..IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
        m[HANDLE..HANDLE + 4].copy_from_slice(&(n + 1).to_ne_bytes());
        for &at in &self.source_at {
            m[at..at + 4].copy_from_slice(&rules::source(n).octets());
        }
        for &at in &self.epoch_at {
            m[at..at + 8].copy_from_slice(&(u64::from(n) + 1).to_be_bytes());
        }
        m
    }
}

/// What one send carries.
pub(crate) struct Prebuilt(Vec<Vec<u8>>);

pub(crate) fn prebuild(template: &Template, numbers: Range<u32>, netdev: &str) -> Prebuilt {
    let ifindex = ifindex(netdev).get();
    let numbers: Vec<u32> = numbers.collect();
    let mut sends: Vec<Vec<u8>> = numbers
        .chunks(PER_SEND)
        .map(|chunk| chunk.iter().flat_map(|&n| template.patched(n, ifindex)).collect())
        .collect();
    if let Some(last) = sends.last_mut() {
        let at = last.len() - template.message.len();
        let flags = u16::from_ne_bytes([last[at + FLAGS], last[at + FLAGS + 1]]) | NLM_F_ACK;
        last[at + FLAGS..at + FLAGS + 2].copy_from_slice(&flags.to_ne_bytes());
    }
    Prebuilt(sends)
}

/// Sends all and waits for the one acknowledgement.
///
/// # Panics
/// When the kernel refuses a rule.
pub(crate) fn send(prebuilt: &Prebuilt) -> Duration {
    let mut socket = std::fs::File::from(netlink_route());
    let mut answer = vec![0; 65536];
    let started = Instant::now();
    for datagram in &prebuilt.0 {
        // SAFETY: the pointer and the length are those of a slice that lives through the call.
        let sent =
            unsafe { libc::send(socket.as_raw_fd(), datagram.as_ptr().cast(), datagram.len(), 0) };
        assert_eq!(usize::try_from(sent), Ok(datagram.len()), "send");
    }
    let got = socket.read(&mut answer).expect("an acknowledgement");
    let took = started.elapsed();
    assert!(got >= 20, "a message");
    assert_eq!(u16::from_ne_bytes([answer[4], answer[5]]), NLMSG_ERROR);
    let errno = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    assert_eq!(errno, 0, "the kernel's answer");
    took
}

fn netlink_route() -> OwnedFd {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    let fd = open_socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE);
    setsockopt(&fd, SndBufForce, &(4 << 20)).expect("SO_SNDBUFFORCE");
    setsockopt(&fd, RcvBufForce, &(4 << 20)).expect("SO_RCVBUFFORCE");
    fd
}

fn open_socket(family: i32, kind: i32, protocol: i32) -> OwnedFd {
    // SAFETY: a system call without pointers; the descriptor is new and nobody else's.
    unsafe {
        let fd = libc::socket(family, kind, protocol);
        assert!(fd >= 0, "socket: {}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    }
}

/// Sees the netlink messages of this network namespace.
struct Monitor(std::fs::File);

impl Monitor {
    fn open(name: &str) -> Self {
        let protocol = u16::try_from(libc::ETH_P_ALL).expect("small").to_be();
        let fd = open_socket(libc::AF_PACKET, libc::SOCK_DGRAM, i32::from(protocol));
        let index = i32::try_from(ifindex(name).get()).expect("small");
        // SAFETY: all zeroes is a value of this plain C structure.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = u16::try_from(libc::AF_PACKET).expect("small");
        to.sll_protocol = protocol;
        to.sll_ifindex = index;
        let len = libc::socklen_t::try_from(size_of_val(&to)).expect("small");
        // SAFETY: the pointer and the length are those of a structure that lives through the call.
        let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const to).cast(), len) };
        assert_eq!(bound, 0, "bind: {}", std::io::Error::last_os_error());
        Self(fd.into())
    }

    /// The first message of this type that is sent.
    fn message_of_type(&mut self, ty: u16) -> Vec<u8> {
        let mut buf = vec![0; 1 << 18];
        loop {
            let got = self.0.read(&mut buf).expect("a netlink datagram");
            let mut rest = &buf[..got];
            while rest.len() >= 16 {
                let len = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
                if len < 16 || len > rest.len() {
                    break;
                }
                if u16::from_ne_bytes([rest[4], rest[5]]) == ty {
                    return rest[..len].to_vec();
                }
                rest = &rest[len.next_multiple_of(4).min(rest.len())..];
            }
        }
    }
}
