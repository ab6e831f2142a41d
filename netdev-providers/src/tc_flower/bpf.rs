//! The programs of rules and guards in software, and how they are loaded: `nat` keeps L4 checksums right,
//! `header` does to an IPv4 header what `ip_forward` does, `inspect` leaves to the stack what it would not
//! forward, `tags` finds priority tags. None has constants of a connection, or maps: they are loaded once in a process.

use std::ffi::{CStr, c_int};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use self::assembler::Insn;
use self::nat::Phase;
use super::uapi::Family;
use crate::contract::types::L4Proto;

mod assembler;
mod header;
mod inspect;
mod nat;
mod tags;

/// A loaded program.
#[derive(Debug)]
pub(super) struct Program {
    fd: OwnedFd,
    name: &'static CStr,
}

impl Program {
    pub(super) fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    pub(super) fn name_with_nul(&self) -> &'static [u8] {
        self.name.to_bytes_with_nul()
    }
}

/// All of them.
#[derive(Debug)]
pub(super) struct Programs {
    nat: [Program; 8],
    header: Program,
    inspect: [Program; 2],
    tags: Program,
}

impl Programs {
    /// Loads them.
    ///
    /// # Errors
    /// The bpf system call's, with the verifier's words if it has any.
    pub(super) fn load() -> io::Result<Self> {
        Self::each(load_program)
    }

    fn each(make: impl Fn(u32, &CStr, &[Insn]) -> io::Result<OwnedFd>) -> io::Result<Self> {
        use {Family::*, L4Proto::*, Phase::*};
        let load = |ty, name, program: &[Insn]| {
            let fd = make(ty, name, program)?;
            Ok::<_, io::Error>(Program { fd, name })
        };
        let nat = |family, proto, phase, name| {
            load(BPF_PROG_TYPE_SCHED_ACT, name, &nat::assemble(family, proto, phase))
        };
        let inspect =
            |family, name| load(BPF_PROG_TYPE_SCHED_CLS, name, &inspect::assemble(family));
        Ok(Self {
            // In the order of `index`.
            nat: [
                nat(Ipv4, Tcp, Before, c"nat4_tcp_before")?,
                nat(Ipv4, Tcp, After, c"nat4_tcp_after")?,
                nat(Ipv4, Udp, Before, c"nat4_udp_before")?,
                nat(Ipv4, Udp, After, c"nat4_udp_after")?,
                nat(Ipv6, Tcp, Before, c"nat6_tcp_before")?,
                nat(Ipv6, Tcp, After, c"nat6_tcp_after")?,
                nat(Ipv6, Udp, Before, c"nat6_udp_before")?,
                nat(Ipv6, Udp, After, c"nat6_udp_after")?,
            ],
            header: load(BPF_PROG_TYPE_SCHED_ACT, c"header4", &header::assemble())?,
            inspect: [inspect(Ipv4, c"inspect4")?, inspect(Ipv6, c"inspect6")?],
            tags: load(BPF_PROG_TYPE_SCHED_CLS, c"priority_tag", &tags::assemble())?,
        })
    }

    /// The two that go around the `pedit` of such a flow with NAT.
    pub(super) fn nat(&self, family: Family, proto: L4Proto) -> (&Program, &Program) {
        let at = |phase| &self.nat[index(family, proto, phase)];
        (at(Phase::Before), at(Phase::After))
    }

    /// That of routed IPv4 flows.
    pub(super) const fn header(&self) -> &Program {
        &self.header
    }

    /// That which finds priority tags.
    pub(super) const fn tags(&self) -> &Program {
        &self.tags
    }

    /// That of the guard of a family.
    pub(super) fn inspect(&self, family: Family) -> &Program {
        &self.inspect[usize::from(family.is_ipv6())]
    }
}

fn index(family: Family, proto: L4Proto, phase: Phase) -> usize {
    usize::from(family.is_ipv6()) * 4 + usize::from(proto == L4Proto::Udp) * 2 + phase as usize
}

// linux/bpf.h
const BPF_PROG_LOAD: c_int = 5;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_PROG_TYPE_SCHED_ACT: u32 = 4;

/// `union bpf_attr` of `BPF_PROG_LOAD`, as far as it is used.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
}

fn load_program(prog_type: u32, name: &CStr, insns: &[Insn]) -> io::Result<OwnedFd> {
    let mut attr = ProgLoad {
        prog_type,
        insn_cnt: u32::try_from(insns.len()).unwrap_or(u32::MAX),
        insns: insns.as_ptr().expose_provenance() as u64,
        license: c"Apache-2.0".as_ptr().expose_provenance() as u64,
        ..ProgLoad::default()
    };
    // At most 15 bytes and a NUL: the kernel refuses what is longer.
    for (to, from) in attr.prog_name.iter_mut().zip(name.to_bytes()) {
        *to = *from;
    }
    let error = match bpf_prog_load(&attr) {
        Ok(fd) => return Ok(fd),
        Err(e) => e,
    };
    // Once more for the verifier's words, of which the last line says it.
    let mut log = vec![0u8; 64 * 1024];
    attr.log_level = 1;
    attr.log_size = u32::try_from(log.len()).unwrap_or(0);
    attr.log_buf = log.as_mut_ptr().expose_provenance() as u64;
    let _ = bpf_prog_load(&attr);
    match last_words(&log) {
        Some(words) => Err(io::Error::new(error.kind(), format!("{error}: {words}"))),
        None => Err(error),
    }
}

/// What the verifier says at the end of its log, which ends with a NUL, before its statistics.
fn last_words(log: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(log.split(|&b| b == 0).next()?).into_owned();
    let line = text.lines().rev().find(|l| !l.is_empty() && !l.starts_with("processed"))?;
    Some(line.to_owned())
}

fn bpf_prog_load(attr: &ProgLoad) -> io::Result<OwnedFd> {
    // SAFETY: `attr` is the start of a `union bpf_attr`, of the size given, and what it points to
    // (instructions, licence, and the log buffer if there is one) outlives the call, which reads
    // `insn_cnt` instructions of 8 bytes and a NUL-terminated string, and writes at most `log_size`
    // bytes of log.
    let fd = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, std::ptr::from_ref(attr), size_of::<ProgLoad>())
    };
    let fd = RawFd::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the system call has just made this descriptor (close-on-exec), and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod machine;
#[cfg(test)]
pub(super) mod tests;
