//! A map of small counters that a program reads and this process writes, without a system call for each.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU8, Ordering};

use super::{Attr, bpf};

// linux/bpf.h
const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_F_MMAPABLE: u32 = 1 << 10;
/// A number, as of all arrays.
const KEY_SIZE: u32 = 4;
// asm-generic/socket.h
const SO_ATTACH_BPF: libc::c_int = 50;

/// One byte for each number below [`SIZE`](Self::SIZE): how often it was counted. At 255 it stays there.
#[derive(Debug)]
pub(crate) struct Tally {
    map: OwnedFd,
    counters: &'static [AtomicU8],
}

impl Tally {
    /// A megabyte, all of it one value of the map.
    pub(crate) const SIZE: usize = 1 << 20;

    /// With nothing counted.
    ///
    /// # Errors
    /// Those of the system calls: the kernel lacks BPF or is older than 5.5, or this may not use it.
    pub(crate) fn new() -> io::Result<Self> {
        let size = u32::try_from(Self::SIZE).map_err(io::Error::other)?;
        let mut attr = Attr::new()
            .u32(0, BPF_MAP_TYPE_ARRAY)
            .u32(4, KEY_SIZE)
            .u32(8, size)
            .u32(12, 1)
            .u32(16, BPF_F_MMAPABLE);
        // SAFETY: no pointer is in it.
        let fd = unsafe { bpf(BPF_MAP_CREATE, &mut attr) }?;
        let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: the system call has just made this descriptor (close-on-exec), and nobody else has it.
        let map = unsafe { OwnedFd::from_raw_fd(fd) };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, at no address that is asked for.
        let at = unsafe {
            let null = std::ptr::null_mut();
            libc::mmap(null, Self::SIZE, protection, libc::MAP_SHARED, map.as_raw_fd(), 0)
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: so many bytes are mapped there until `drop`, behind which nobody has the reference; all that is
        // done with them, here and by programs, is atomic.
        let counters = unsafe { std::slice::from_raw_parts(at.cast::<AtomicU8>(), Self::SIZE) };
        Ok(Self { map, counters })
    }

    /// What a program knows the map by when it is loaded.
    pub(crate) fn raw_fd(&self) -> RawFd {
        self.map.as_raw_fd()
    }

    /// Counts a number, of which the lowest bits count.
    pub(crate) fn add(&self, number: u32) {
        self.change(number, more);
    }

    /// Counts it no more.
    pub(crate) fn remove(&self, number: u32) {
        self.change(number, less);
    }

    /// How often it was.
    #[cfg(test)]
    pub(crate) fn count(&self, number: u32) -> u8 {
        self.counters[number as usize % Self::SIZE].load(Ordering::SeqCst)
    }

    fn change(&self, number: u32, change: impl FnMut(u8) -> Option<u8>) {
        if let Some(counter) = self.counters.get(number as usize % Self::SIZE) {
            let _ = counter.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change);
        }
    }
}

/// `None`: it stays.
fn more(count: u8) -> Option<u8> {
    count.checked_add(1)
}

/// The same. Where there was no more room to count, nobody knows how many there are.
fn less(count: u8) -> Option<u8> {
    if count == u8::MAX { None } else { count.checked_sub(1) }
}

impl Drop for Tally {
    fn drop(&mut self) {
        let at = self.counters.as_ptr().cast_mut().cast();
        // SAFETY: `new` has mapped it, and nobody has a reference to it.
        let _ = unsafe { libc::munmap(at, self.counters.len()) };
    }
}

/// Has a program decide what of what arrives a socket is given.
///
/// # Errors
/// That of the system call.
pub(crate) fn attach(socket: BorrowedFd<'_>, program: &OwnedFd) -> io::Result<()> {
    let fd = program.as_raw_fd();
    #[expect(clippy::cast_possible_truncation, reason = "four bytes")]
    let len = size_of::<RawFd>() as libc::socklen_t;
    // SAFETY: the value is an int, as this option takes, and lives during the call.
    let set = unsafe {
        let value = (&raw const fd).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_ATTACH_BPF, value, len)
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_too_often_is_counted_for_good() {
        assert_eq!([more(0), more(253), more(254)], [Some(1), Some(254), Some(255)]);
        assert_eq!([less(1), less(254)], [Some(0), Some(253)]);
        assert_eq!([more(255), less(255), less(0)], [None; 3]);
    }
}
