//! What the kernel tells of the BPF programs of others, by `bpf(2)`: nothing is loaded or changed here.

use std::ffi::{CStr, c_long};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::contract::types::Ifindex;

// linux/bpf.h
const BPF_PROG_GET_FD_BY_ID: c_long = 13;
const BPF_OBJ_GET_INFO_BY_FD: c_long = 15;
const BPF_PROG_QUERY: c_long = 16;
const BPF_TCX_INGRESS: u32 = 46;
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

/// The ids of the programs that are attached to a netdev's ingress by tcx, in their order: the first 16 of
/// them. None before Linux 6.6.
#[must_use]
pub(crate) fn tcx_ingress(ifindex: Ifindex) -> Vec<u32> {
    let mut ids = [0_u32; AT_MOST as usize];
    let mut attr = Attr::new()
        .u32(0, ifindex.get())
        .u32(4, BPF_TCX_INGRESS)
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

/// The name of a program; `None` where it has none, or is gone.
#[must_use]
pub(crate) fn program_name(id: u32) -> Option<String> {
    // SAFETY: no pointer is in it.
    let fd = unsafe { bpf(BPF_PROG_GET_FD_BY_ID, &mut Attr::new().u32(0, id)) }.ok()?;
    // SAFETY: the system call has just made this descriptor (close-on-exec), and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(RawFd::try_from(fd).ok()?) };
    // struct bpf_prog_info: pointers in it that are null are not written to.
    const NAME: usize = 64;
    const NAME_LEN: usize = 16;
    const WORDS: u8 = 16;
    let mut info = [0_u64; WORDS as usize];
    let fd_number = u32::try_from(fd.as_raw_fd()).ok()?;
    let mut attr =
        Attr::new().u32(0, fd_number).u32(4, u32::from(WORDS) * 8).pointer(8, info.as_mut_ptr());
    // SAFETY: `info` points to as many bytes as `info_len` says; all of it is 0, so that no pointer and no length
    // of an array is in it.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }.ok()?;
    let bytes: Vec<u8> = info.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let mut name = [0; NAME_LEN + 1];
    name[..NAME_LEN].copy_from_slice(bytes.get(NAME..NAME + NAME_LEN)?);
    let name = CStr::from_bytes_until_nul(&name).ok()?.to_string_lossy().into_owned();
    (!name.is_empty()).then_some(name)
}
