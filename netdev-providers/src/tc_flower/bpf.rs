//! The programs of rules and guards in software, and how they are loaded: `nat` keeps L4 checksums right,
//! `header` does to an IPv4 header what `ip_forward` does, `inspect` leaves to the stack what it would not
//! forward, `tags` finds priority tags. None has constants of a connection, or maps: they are loaded once in a process.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use self::nat::Phase;
use super::uapi::Family;
use crate::bpf::assembler::Insn;
use crate::bpf::load::load_program;
use crate::contract::types::L4Proto;

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
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_PROG_TYPE_SCHED_ACT: u32 = 4;

#[cfg(test)]
pub(super) mod tests;
