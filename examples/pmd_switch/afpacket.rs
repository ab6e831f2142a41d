//! AF_PACKET: a receive ring (TPACKET_V3) per port and ethertype, and one socket to send.
//!
//! # Why not ETH_P_ALL
//! What a `tc` rule redirects must not reach the switch as well, or it would be delivered twice.
//! `__netif_receive_skb_core` (net/core/dev.c) goes through a received packet in this order:
//!
//! 1. XDP (generic),
//! 2. the **taps**: `ptype_all`, where a socket bound to `ETH_P_ALL` stands,
//! 3. `sch_handle_ingress`: **our rules**; what they redirect ends here,
//! 4. netfilter ingress, VLAN devices, the netdev's rx handler (bridge, macvlan),
//! 5. the **protocols**: `ptype_base` and the netdev's `ptype_specific`.
//!
//! So an `ETH_P_ALL` socket sees every packet that a rule forwards, and an AF_XDP socket takes
//! every packet before a rule could (it is the choice where rules live in the NIC alone). A
//! socket bound to one ethertype *and* one netdev is in `ptype_specific` (`ptype_head`): it sees
//! exactly what no rule took, and never what leaves (`dev_queue_xmit_nit` knows `ptype_all` only).
//! Hence one socket for each of IPv4, IPv6 and ARP; what else is on the wire is not switched.
//!
//! Nothing is delivered twice, but packets of a new rule overtake those that wait in a ring at that
//! moment. TCP takes that in its stride, as it does when a route changes.
//!
//! The price: behind step 4 a VLAN tag that no VLAN device took has been stripped, and nothing tells
//! (`__vlan_hwaccel_clear_tag`). Ports of this switch are access ports: keep tags away from them.
//!
//! # Offloads of the sender
//! On a veth pair nobody computes checksums and segments are up to 64 KB long, unless a wire makes
//! it necessary. With `PACKET_VNET_HDR` each frame has a `struct virtio_net_hdr` in front that
//! tells what is left to do; frame and header go out as they came in, in one piece, uncopied.

#![expect(
    clippy::cast_possible_truncation,
    reason = "constants of C headers and sizes of structures: the kernel's types are smaller"
)]

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::atomic::{AtomicU32, Ordering};

use netdev_providers::Ifindex;

use super::packet::VNET_LEN;

/// What is switched.
pub(crate) const ETHERTYPES: [u16; 3] =
    [libc::ETH_P_IP as u16, libc::ETH_P_IPV6 as u16, libc::ETH_P_ARP as u16];

/// A block takes the longest frame (64 KB).
const BLOCK_LEN: usize = 1 << 17;
/// As a block that is not full is handed over too, this is how many [`BLOCK_TIMEOUT_MS`] we may be
/// kept from running before frames are lost.
const BLOCKS: usize = 64;
/// A block that is not full is handed over after so many milliseconds.
const BLOCK_TIMEOUT_MS: u32 = 1;

// struct tpacket_block_desc and struct tpacket3_hdr of linux/if_packet.h, as offsets in bytes: a
// slice with checked reads instead of pointers to structures.
const BLOCK_STATUS: usize = 8;
const BLOCK_PACKETS: usize = 12;
const BLOCK_FIRST: usize = 16;
const FRAME_NEXT: usize = 0;
const FRAME_SNAPLEN: usize = 12;
const FRAME_LEN: usize = 16;
const FRAME_MAC: usize = 24;

fn set_option<T>(fd: &OwnedFd, level: i32, option: i32, value: &T) -> io::Result<()> {
    // SAFETY: the kernel reads size_of::<T>() bytes at a valid reference; T is one of the plain
    // structures and numbers of the calls below.
    let rc = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A packet socket. With protocol 0 it receives nothing until it is bound.
fn socket() -> io::Result<OwnedFd> {
    // SAFETY: a system call without pointers; the descriptor is new and nobody else's.
    let fd = unsafe {
        let fd = libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            0,
        );
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    set_option(&fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, &1i32)?;
    Ok(fd)
}

fn address(ifindex: Ifindex, ethertype: u16) -> libc::sockaddr_ll {
    // SAFETY: all zeros is a value of this structure of numbers.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ethertype.to_be();
    address.sll_ifindex = ifindex.get().cast_signed();
    address
}

/// Frames of one ethertype that arrive on one netdev, in memory shared with the kernel. Blocks go
/// round: the kernel fills one while we have another.
pub(crate) struct Ring {
    fd: OwnedFd,
    map: NonNull<u8>,
    blocks: usize,
    next: usize,
}

// SAFETY: the mapping belongs to the value and is reached through it alone; no method depends on
// the thread.
unsafe impl Send for Ring {}

impl Ring {
    pub(crate) fn open(ifindex: Ifindex, ethertype: u16) -> io::Result<Self> {
        let fd = socket()?;
        let blocks: usize = if i32::from(ethertype) == libc::ETH_P_ARP { 4 } else { BLOCKS };
        set_option(
            &fd,
            libc::SOL_PACKET,
            libc::PACKET_VERSION,
            &(libc::tpacket_versions::TPACKET_V3 as i32),
        )?;
        // SAFETY: all zeros is a value of this structure of numbers.
        let mut request: libc::tpacket_req3 = unsafe { zeroed() };
        request.tp_block_size = BLOCK_LEN as u32;
        request.tp_block_nr = blocks as u32;
        // Frames of V3 are as long as they are; the kernel wants the numbers to fit all the same.
        request.tp_frame_size = 2048;
        request.tp_frame_nr = (BLOCK_LEN / 2048 * blocks) as u32;
        request.tp_retire_blk_tov = BLOCK_TIMEOUT_MS;
        set_option(&fd, libc::SOL_PACKET, libc::PACKET_RX_RING, &request)?;
        // A switch receives what is meant for others.
        // SAFETY: as above.
        let mut membership: libc::packet_mreq = unsafe { zeroed() };
        membership.mr_ifindex = ifindex.get().cast_signed();
        membership.mr_type = libc::PACKET_MR_PROMISC as u16;
        set_option(&fd, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &membership)?;
        // SAFETY: a new mapping at an address of the kernel's choice, of the length that was asked
        // for above.
        let map = unsafe {
            libc::mmap(
                ptr::null_mut(),
                blocks * BLOCK_LEN,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let map = NonNull::new(map.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let ring = Self { fd, map, blocks, next: 0 };
        let address = address(ifindex, ethertype);
        // Last, so that whatever arrives finds the ring.
        // SAFETY: the kernel reads a structure of this length.
        let rc = unsafe {
            libc::bind(
                ring.fd.as_raw_fd(),
                ptr::from_ref(&address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        if rc == 0 { Ok(ring) } else { Err(io::Error::last_os_error()) }
    }

    fn status(&self, block: usize) -> &AtomicU32 {
        // SAFETY: within the mapping (block < blocks), aligned (blocks are pages), and accessed
        // atomically by us and the kernel alike; the mapping lives as long as self.
        unsafe {
            AtomicU32::from_ptr(self.map.add(block * BLOCK_LEN + BLOCK_STATUS).cast().as_ptr())
        }
    }

    /// The next block of frames, if the kernel has handed one over.
    pub(crate) fn block(&mut self) -> Option<Block<'_>> {
        let ours = self.status(self.next).load(Ordering::Acquire) & libc::TP_STATUS_USER != 0;
        ours.then(|| Block { ring: self })
    }

    /// Frames that found the ring full, since the last call.
    pub(crate) fn drops(&self) -> u64 {
        #[repr(C)]
        #[derive(Default)]
        struct Stats {
            packets: u32,
            drops: u32,
            freezes: u32,
        }
        let (mut stats, mut len) = (Stats::default(), size_of::<Stats>() as libc::socklen_t);
        // SAFETY: the kernel writes at most `len` bytes into a structure of numbers of that length.
        let rc = unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                ptr::from_mut(&mut stats).cast(),
                &raw mut len,
            )
        };
        if rc == 0 { u64::from(stats.drops) } else { 0 }
    }

    /// Forgets an error of the socket (ENETDOWN when its netdev went down), for which poll would
    /// return at once for ever. The kernel binds the socket again when the netdev comes back.
    pub(crate) fn clear_error(&self) {
        let _ = nix::sys::socket::getsockopt(&self.fd, nix::sys::socket::sockopt::SocketError);
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `open`; nothing borrows from it any more.
        unsafe { libc::munmap(self.map.as_ptr().cast(), self.blocks * BLOCK_LEN) };
    }
}

/// A block of frames; goes back to the kernel when it is dropped.
pub(crate) struct Block<'r> {
    ring: &'r mut Ring,
}

/// Where a frame is in its block: the virtio header, and the frame behind it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    at: usize,
    len: usize,
}

impl Block<'_> {
    fn bytes(&self) -> &[u8] {
        // SAFETY: within the mapping; the kernel does not write to a block while its status says
        // that it is ours, which is until `drop`, and the slice cannot outlive self.
        unsafe {
            slice::from_raw_parts(self.ring.map.add(self.ring.next * BLOCK_LEN).as_ptr(), BLOCK_LEN)
        }
    }

    fn u32_at(&self, at: usize) -> Option<usize> {
        let bytes = self.bytes().get(at..)?.first_chunk()?;
        usize::try_from(u32::from_ne_bytes(*bytes)).ok()
    }

    /// Where the frames are. `None` for one that came in cut short.
    pub(crate) fn frames(&self) -> impl Iterator<Item = Option<Span>> {
        let left = self.u32_at(BLOCK_PACKETS).unwrap_or(0);
        let mut at = self.u32_at(BLOCK_FIRST).unwrap_or(0);
        (0..left).map(move |_| {
            let header = at;
            at = header.saturating_add(self.u32_at(header.saturating_add(FRAME_NEXT))?);
            self.span(header)
        })
    }

    fn span(&self, header: usize) -> Option<Span> {
        let bytes = self.bytes();
        let field = header.checked_add(FRAME_MAC)?;
        let mac = u16::from_ne_bytes(*bytes.get(field..)?.first_chunk()?);
        let at = header.checked_add(usize::from(mac))?.checked_sub(VNET_LEN)?;
        let len = self.u32_at(header.checked_add(FRAME_SNAPLEN)?)?;
        if len != self.u32_at(header.checked_add(FRAME_LEN)?)? {
            return None;
        }
        let span = Span { at, len: len.checked_add(VNET_LEN)? };
        bytes.get(span.at..span.at.checked_add(span.len)?)?;
        Some(span)
    }

    /// The virtio header and the frame.
    pub(crate) fn frame(&self, span: Span) -> (&[u8], &[u8]) {
        self.bytes()
            .get(span.at..)
            .and_then(|b| b.get(..span.len))
            .and_then(|b| b.split_at_checked(VNET_LEN))
            .unwrap_or_default()
    }
}

impl Drop for Block<'_> {
    fn drop(&mut self) {
        self.ring.status(self.ring.next).store(libc::TP_STATUS_KERNEL, Ordering::Release);
        self.ring.next = (self.ring.next + 1) % self.ring.blocks;
    }
}

/// A frame of the present block that is to leave.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outgoing {
    pub(crate) span: Span,
    pub(crate) egress: Ifindex,
    pub(crate) ethertype: u16,
}

/// Sends on any netdev.
pub(crate) struct Sender(OwnedFd);

/// Frames handed to the kernel in one call.
const SEND_BATCH: usize = 64;

impl Sender {
    pub(crate) fn open() -> io::Result<Self> {
        let fd = socket()?;
        set_option(&fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &(8i32 << 20))?;
        Ok(Self(fd))
    }

    /// Sends frames of a block, straight from it; returns how many were dropped, because the egress
    /// netdev is down, has a smaller MTU or no room. A switch does not wait.
    pub(crate) fn send(&self, block: &Block<'_>, frames: &[Outgoing]) -> u64 {
        let mut dropped = 0;
        for frames in frames.chunks(SEND_BATCH) {
            let mut addresses: [libc::sockaddr_ll; SEND_BATCH];
            let mut pieces: [libc::iovec; SEND_BATCH];
            let mut messages: [libc::mmsghdr; SEND_BATCH];
            // SAFETY: all zeros is a value of each of these structures of numbers and pointers.
            (addresses, pieces, messages) = unsafe { (zeroed(), zeroed(), zeroed()) };
            let slots = addresses.iter_mut().zip(&mut pieces).zip(&mut messages);
            for (out, ((to, piece), message)) in frames.iter().zip(slots) {
                let bytes = block.bytes().get(out.span.at..).unwrap_or_default();
                let bytes = bytes.get(..out.span.len).unwrap_or_default();
                *to = address(out.egress, out.ethertype);
                piece.iov_base = bytes.as_ptr().cast_mut().cast();
                piece.iov_len = bytes.len();
                message.msg_hdr.msg_name = ptr::from_mut(to).cast();
                message.msg_hdr.msg_namelen = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
                message.msg_hdr.msg_iov = piece;
                message.msg_hdr.msg_iovlen = 1;
            }
            let mut rest = messages.get_mut(..frames.len()).unwrap_or_default();
            while !rest.is_empty() {
                // SAFETY: `rest` is as long as told, and each message points to an address and a
                // piece of this stack frame; the kernel only reads what the pieces point to, which
                // is in the block.
                let sent = unsafe {
                    libc::sendmmsg(
                        self.0.as_raw_fd(),
                        rest.as_mut_ptr(),
                        rest.len() as libc::c_uint,
                        libc::MSG_DONTWAIT,
                    )
                };
                // An error is about the first of the rest.
                let done = usize::try_from(sent).unwrap_or_else(|_| {
                    dropped += 1;
                    1
                });
                rest = rest.get_mut(done.max(1)..).unwrap_or_default();
            }
        }
        dropped
    }
}
