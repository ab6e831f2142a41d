//! A packet generator: one frame again and again, from a transmit ring (TPACKET_V2) around the queueing
//! discipline. One system call sends the whole ring, so that what is measured is the path behind it.
//! (pktgen would do, but user-mode Linux has none.)

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use netdev_providers::Ifindex;

/// Frames in the ring, and the room of each.
const FRAMES: usize = 256;
const FRAME_LEN: usize = 2048;
/// Where a frame's data stands: behind `struct tpacket2_hdr` (`TPACKET2_HDRLEN` less the address that
/// is only for receiving), as `tpacket_fill_skb` looks for it.
const DATA: usize = 32;
/// Offsets in `struct tpacket2_hdr`.
const STATUS: usize = 0;
const LEN: usize = 4;
const TP_STATUS_SEND_REQUEST: u32 = 1;

pub(crate) struct Generator {
    fd: OwnedFd,
    ring: *mut u8,
}

// SAFETY: the mapping belongs to the value; no method depends on the thread.
unsafe impl Send for Generator {}

impl Generator {
    /// Sends on this netdev of the calling thread's network namespace.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub(crate) fn open(ifindex: Ifindex, frame: &[u8]) -> io::Result<Self> {
        assert!(frame.len() <= FRAME_LEN - DATA, "a frame of {} bytes", frame.len());
        // SAFETY: a system call without pointers; the descriptor is new and nobody else's.
        let fd = unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        let version = libc::tpacket_versions::TPACKET_V2 as i32;
        option(&fd, libc::PACKET_VERSION, &version)?;
        option(&fd, libc::PACKET_QDISC_BYPASS, &1i32)?;
        let request = libc::tpacket_req {
            tp_block_size: (FRAMES * FRAME_LEN) as u32,
            tp_block_nr: 1,
            tp_frame_size: FRAME_LEN as u32,
            tp_frame_nr: FRAMES as u32,
        };
        option(&fd, libc::PACKET_TX_RING, &request)?;
        // SAFETY: a new mapping, of the length that the ring was made with; the result is checked.
        let ring = unsafe {
            let flags = libc::MAP_SHARED;
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), FRAMES * FRAME_LEN, prot, flags, fd.as_raw_fd(), 0)
        };
        if ring == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let generator = Self { fd, ring: ring.cast() };
        for n in 0..FRAMES {
            // SAFETY: the frame fits its room (asserted above), which is within the mapping.
            unsafe {
                let at = generator.ring.add(n * FRAME_LEN);
                std::ptr::copy_nonoverlapping(frame.as_ptr(), at.add(DATA), frame.len());
                at.add(LEN).cast::<u32>().write_volatile(frame.len() as u32);
            }
        }
        // SAFETY: all zeroes is a value of this plain C structure.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = libc::AF_PACKET as u16;
        to.sll_protocol = (libc::ETH_P_IP as u16).to_be();
        to.sll_ifindex = ifindex.get().cast_signed();
        let len = size_of_val(&to) as libc::socklen_t;
        // SAFETY: the pointer and the length are those of a structure that lives through the call.
        let bound = unsafe { libc::bind(generator.fd.as_raw_fd(), (&raw const to).cast(), len) };
        if bound == 0 { Ok(generator) } else { Err(io::Error::last_os_error()) }
    }

    /// Sends the frame `rounds` times [`FRAMES`] times, and returns how often that is.
    ///
    /// # Errors
    /// What the kernel says of a send.
    pub(crate) fn send(&mut self, rounds: usize) -> io::Result<u64> {
        for _ in 0..rounds {
            for n in 0..FRAMES {
                // SAFETY: within the mapping, and aligned: frames begin at multiples of 2048.
                unsafe {
                    let status = self.ring.add(n * FRAME_LEN + STATUS).cast::<u32>();
                    status.write_volatile(TP_STATUS_SEND_REQUEST);
                }
            }
            // Blocks until the ring has been sent.
            // SAFETY: no buffer is passed.
            let sent = unsafe { libc::send(self.fd.as_raw_fd(), std::ptr::null(), 0, 0) };
            if sent < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok((rounds * FRAMES) as u64)
    }
}

impl Drop for Generator {
    fn drop(&mut self) {
        // SAFETY: the mapping of `open`, which nobody else has.
        unsafe { libc::munmap(self.ring.cast(), FRAMES * FRAME_LEN) };
    }
}

fn option<T>(fd: &OwnedFd, option: i32, value: &T) -> io::Result<()> {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes at a valid reference to a plain value.
    let rc = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_PACKET,
            option,
            std::ptr::from_ref(value).cast(),
            len,
        )
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// An Ethernet frame of 60 bytes (64 with its FCS): UDP in IPv4, without a UDP checksum.
pub(crate) fn udp_frame(
    dst: [u8; 6],
    src: [u8; 6],
    from: ([u8; 4], u16),
    to: ([u8; 4], u16),
) -> Vec<u8> {
    let mut f = Vec::with_capacity(60);
    f.extend(dst);
    f.extend(src);
    f.extend([0x08, 0x00]);
    let mut ip = [0u8; 20];
    ip[0] = 0x45;
    ip[2..4].copy_from_slice(&46u16.to_be_bytes());
    ip[8] = 64;
    ip[9] = 17;
    ip[12..16].copy_from_slice(&from.0);
    ip[16..20].copy_from_slice(&to.0);
    let sum = ip.chunks(2).fold(0u32, |sum, w| sum + u32::from(u16::from_be_bytes([w[0], w[1]])));
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    f.extend(ip);
    f.extend(from.1.to_be_bytes());
    f.extend(to.1.to_be_bytes());
    f.extend(26u16.to_be_bytes());
    f.resize(60, 0);
    f
}
