//! `bpf(2)`: what the kernel tells of the programs of others, and operations on many entries of a map at once, which
//! no library has; programs of ours that have no source but instructions ([`assembler`], [`load`]), and counters that
//! they read ([`tally`]).

use std::ffi::{CStr, c_long};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::contract::types::Ifindex;

#[cfg_attr(not(feature = "tc-flower"), allow(dead_code, reason = "most of it is for its programs"))]
pub(crate) mod assembler;
pub(crate) mod load;
#[cfg(test)]
#[cfg_attr(not(feature = "tc-flower"), allow(dead_code, reason = "most of it is for its programs"))]
pub(crate) mod machine;
pub(crate) mod tally;

// linux/bpf.h
#[cfg(feature = "ebpf")]
const BPF_OBJ_GET: c_long = 7;
const BPF_PROG_GET_FD_BY_ID: c_long = 13;
const BPF_OBJ_GET_INFO_BY_FD: c_long = 15;
const BPF_PROG_QUERY: c_long = 16;
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;
#[cfg(feature = "ebpf")]
const BPF_MAP_LOOKUP_BATCH: c_long = 24;
#[cfg(feature = "ebpf")]
const BPF_MAP_UPDATE_BATCH: c_long = 26;
#[cfg(feature = "ebpf")]
const BPF_MAP_DELETE_BATCH: c_long = 27;
#[cfg(feature = "ebpf")]
const BPF_LINK_GET_FD_BY_ID: c_long = 30;
#[cfg(feature = "ebpf")]
const BPF_LINK_DETACH: c_long = 34;
/// As many programs of one netdev are asked for.
const AT_MOST: u8 = 16;

/// The start of `union bpf_attr`, as these three commands have it: 32 bytes are enough for each of them.
#[repr(C, align(8))]
struct Attr([u8; 64]);

impl Attr {
    fn new() -> Self {
        Self([0; 64])
    }

    fn u32(mut self, at: usize, value: u32) -> Self {
        self.0[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        self
    }

    /// Reads what the kernel has written there.
    #[cfg(feature = "ebpf")]
    fn u32_at(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.0[at..at + 4]);
        u32::from_ne_bytes(bytes)
    }

    fn pointer<T>(mut self, at: usize, to: *mut T) -> Self {
        self.0[at..at + 8].copy_from_slice(&(to.expose_provenance() as u64).to_ne_bytes());
        self
    }
}

/// The system call.
///
/// # Safety
/// Every pointer in the attribute is null, or to so many bytes, which nothing else uses, as the attribute says.
unsafe fn bpf(command: c_long, attr: &mut Attr) -> io::Result<c_long> {
    // SAFETY: the kernel reads and writes no more of `attr` than the size says, and what it points to is the
    // caller's promise.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<Attr>())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Takes away the program that a pinned link holds, now. When a pin is removed the kernel lets go of the link later, on a
/// thread of its own, and packets pass the program until then.
///
/// # Errors
/// There is no such pin, or it is of something else.
#[cfg(feature = "ebpf")]
pub(crate) fn detach_pinned(link: &CStr) -> io::Result<()> {
    let mut attr = Attr::new().pointer(0, link.as_ptr().cast_mut());
    // SAFETY: `pathname` is a string that ends with 0 and lives during the call; the kernel only reads it.
    detach(unsafe { bpf(BPF_OBJ_GET, &mut attr) }?)
}

/// The same of a link that has no pin, by its id: another process that is being forked may have its descriptor for a
/// moment longer than we.
///
/// # Errors
/// There is no such link, or one may not ask for it.
#[cfg(feature = "ebpf")]
pub(crate) fn detach_link(id: u32) -> io::Result<()> {
    let mut attr = Attr::new().u32(0, id);
    // SAFETY: no pointer is in it.
    detach(unsafe { bpf(BPF_LINK_GET_FD_BY_ID, &mut attr) }?)
}

/// `link`: a descriptor that the kernel has just opened for us.
#[cfg(feature = "ebpf")]
fn detach(link: c_long) -> io::Result<()> {
    let fd = RawFd::try_from(link).map_err(io::Error::other)?;
    // SAFETY: the kernel has just opened it, for us alone.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut attr = Attr::new().u32(0, fd.as_raw_fd().cast_unsigned());
    // SAFETY: no pointer is in it.
    unsafe { bpf(BPF_LINK_DETACH, &mut attr) }.map(drop)
}

/// The ids of the programs that are attached to a netdev's ingress by tcx, in their order: the first 16 of
/// them. None before Linux 6.6.
#[must_use]
pub(crate) fn tcx_ingress(ifindex: Ifindex) -> Vec<u32> {
    attached(ifindex, BPF_TCX_INGRESS)
}

/// The same at its egress.
#[must_use]
pub(crate) fn tcx_egress(ifindex: Ifindex) -> Vec<u32> {
    attached(ifindex, BPF_TCX_EGRESS)
}

fn attached(ifindex: Ifindex, hook: u32) -> Vec<u32> {
    let mut ids = [0_u32; AT_MOST as usize];
    let mut attr = Attr::new()
        .u32(0, ifindex.get())
        .u32(4, hook)
        .pointer(16, ids.as_mut_ptr())
        .u32(24, AT_MOST.into());
    // SAFETY: `prog_ids` points to as many numbers as `prog_cnt` says, which live during the call.
    let queried = unsafe { bpf(BPF_PROG_QUERY, &mut attr) };
    match queried {
        Ok(_) => {}
        // More than there is room for: the room is filled.
        Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => {}
        Err(_) => return Vec::new(),
    }
    ids.into_iter().take_while(|&id| id != 0).collect()
}

/// `struct bpf_prog_info`, up to the name.
const INFO_WORDS: usize = 16;
const INFO_NR_MAP_IDS: usize = 52;
const INFO_NAME: usize = 64;

/// What the kernel tells of a program, and the ids of maps that it uses; `None` where it is gone.
fn program_info(id: u32, maps: &mut [u32]) -> Option<[u8; INFO_WORDS * 8]> {
    // SAFETY: no pointer is in it.
    let fd = unsafe { bpf(BPF_PROG_GET_FD_BY_ID, &mut Attr::new().u32(0, id)) }.ok()?;
    // SAFETY: the system call has just made this descriptor (close-on-exec), and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(RawFd::try_from(fd).ok()?) };
    // Pointers in it that are null are not written to.
    let mut info = [0_u64; INFO_WORDS];
    let count = u64::from(u32::try_from(maps.len()).ok()?);
    if count > 0 {
        // `created_by_uid`, which is written, is the other half of the word.
        info[INFO_NR_MAP_IDS / 8] =
            if cfg!(target_endian = "little") { count << 32 } else { count };
        info[INFO_NR_MAP_IDS / 8 + 1] = maps.as_mut_ptr().expose_provenance() as u64;
    }
    let fd_number = u32::try_from(fd.as_raw_fd()).ok()?;
    let len = u32::try_from(size_of_val(&info)).ok()?;
    let mut attr = Attr::new().u32(0, fd_number).u32(4, len).pointer(8, info.as_mut_ptr());
    // SAFETY: `info` points to as many bytes as `info_len` says; the one pointer in it is to as many numbers as the
    // number before it says.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }.ok()?;
    let mut bytes = [0; INFO_WORDS * 8];
    for (to, word) in bytes.chunks_exact_mut(8).zip(info) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    Some(bytes)
}

/// The name of a program; `None` where it has none, or is gone.
#[must_use]
pub(crate) fn program_name(id: u32) -> Option<String> {
    let info = program_info(id, &mut [])?;
    let mut name = [0; 17];
    name[..16].copy_from_slice(info.get(INFO_NAME..INFO_NAME + 16)?);
    let name = CStr::from_bytes_until_nul(&name).ok()?.to_string_lossy().into_owned();
    (!name.is_empty()).then_some(name)
}

/// The ids of the maps that a program uses: the first 16 of them.
#[cfg(feature = "ebpf")]
#[must_use]
pub(crate) fn program_maps(id: u32) -> Vec<u32> {
    let mut maps = [0; AT_MOST as usize];
    if program_info(id, &mut maps).is_none() {
        return Vec::new();
    }
    maps.into_iter().take_while(|&id| id != 0).collect()
}

/// Entries of a map, many at a time.
#[cfg(feature = "ebpf")]
pub(crate) mod batch {
    use std::os::fd::{AsRawFd, BorrowedFd};

    use super::{
        Attr, BPF_MAP_DELETE_BATCH, BPF_MAP_LOOKUP_BATCH, BPF_MAP_UPDATE_BATCH, bpf, c_long, io,
    };

    // `struct { ... } batch` of `union bpf_attr`.
    const IN_BATCH: usize = 0;
    const OUT_BATCH: usize = 8;
    const KEYS: usize = 16;
    const VALUES: usize = 24;
    const COUNT: usize = 32;
    const MAP_FD: usize = 36;

    /// A hash map whose keys are `K` bytes long, and its values `V`. (With other lengths than the map's the kernel
    /// would read and write beyond: [`of`](Self::of) is where that is decided.)
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Map<'a, const K: usize, const V: usize>(BorrowedFd<'a>);

    /// Where a look-up goes on.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Position(u32);

    impl<'a, const K: usize, const V: usize> Map<'a, K, V> {
        /// # Safety
        /// The map is a hash map, and its keys and values are so long.
        pub(crate) unsafe fn of(fd: BorrowedFd<'a>) -> Self {
            Self(fd)
        }

        fn attr(self, keys: *mut [u8; K], values: *mut [u8; V], count: usize) -> Attr {
            let fd = u32::try_from(self.0.as_raw_fd()).unwrap_or(u32::MAX);
            let attr = Attr::new().u32(MAP_FD, fd).pointer(KEYS, keys).pointer(VALUES, values);
            attr.u32(COUNT, u32::try_from(count).unwrap_or(0))
        }

        /// Adds or replaces entries, up to the first that is refused: how many were written, and why the next was not.
        pub(crate) fn update(
            self,
            keys: &[[u8; K]],
            values: &[[u8; V]],
        ) -> (usize, io::Result<()>) {
            assert_eq!(keys.len(), values.len(), "a value for each key");
            let attr = self.attr(keys.as_ptr().cast_mut(), values.as_ptr().cast_mut(), keys.len());
            // SAFETY: the kernel reads as many keys and values as `count` says, which live during the call, and
            // writes to neither.
            unsafe { Self::carry_out(BPF_MAP_UPDATE_BATCH, attr, keys.len()) }
        }

        /// Removes entries, up to the first that is refused (ENOENT: it is not there).
        pub(crate) fn delete(self, keys: &[[u8; K]]) -> (usize, io::Result<()>) {
            let attr = self.attr(keys.as_ptr().cast_mut(), std::ptr::null_mut(), keys.len());
            // SAFETY: as above; no value is looked at.
            unsafe { Self::carry_out(BPF_MAP_DELETE_BATCH, attr, keys.len()) }
        }

        /// # Safety
        /// As [`bpf`].
        unsafe fn carry_out(command: c_long, mut attr: Attr, of: usize) -> (usize, io::Result<()>) {
            if of == 0 {
                return (0, Ok(()));
            }
            // SAFETY: the caller's.
            let done = unsafe { bpf(command, &mut attr) };
            match done {
                Ok(_) => (of, Ok(())),
                // What is refused as a whole has the number as it was.
                Err(e) => {
                    (Some(attr.u32_at(COUNT) as usize).filter(|&n| n < of).unwrap_or(0), Err(e))
                }
            }
        }

        /// Reads entries from a position on (`None`: from the beginning), as many as there is room for; returns how many
        /// there are, and where to go on, if that was not the end. What is added meanwhile may be missed, and what is
        /// there is read once.
        ///
        /// # Errors
        /// ENOSPC: there is no room for all that have one hash.
        pub(crate) fn read(
            self,
            from: Option<Position>,
            keys: &mut [[u8; K]],
            values: &mut [[u8; V]],
        ) -> io::Result<(usize, Option<Position>)> {
            let room = keys.len().min(values.len());
            let (mut begin, mut next) = (from.map_or(0, |p| p.0), 0_u32);
            let mut attr = self.attr(keys.as_mut_ptr(), values.as_mut_ptr(), room);
            if from.is_some() {
                attr = attr.pointer(IN_BATCH, &raw mut begin);
            }
            attr = attr.pointer(OUT_BATCH, &raw mut next);
            // SAFETY: the kernel writes as many keys and values as `count` says at most, and a position of a hash
            // map, which is 32 bits; all of them live during the call.
            let read = unsafe { bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) };
            let count = (attr.u32_at(COUNT) as usize).min(room);
            match read {
                Ok(_) => Ok((count, Some(Position(next)))),
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok((count, None)),
                Err(e) => Err(e),
            }
        }
    }
}
