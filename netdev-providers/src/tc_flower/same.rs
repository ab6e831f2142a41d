//! Whether a rule that the kernel dumps is the one that we would write.
//!
//! Both, the dump and our message, are brought into one form: the match keys by number, the flags
//! that are the rule's own, and of each action, in order, its kind and its parameters without what
//! the kernel counts or chooses (index, reference counts, times, statistics, and our cookie). A key
//! or a parameter that we do not know is part of the form, so a rule that somebody narrowed or
//! extended is another rule. What cannot be compared is not the same.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::os::fd::RawFd;

use super::uapi::*;
use crate::contract::types::{L4Proto, Tuple};
use crate::netlink::wire::{Attr, AttrIter, MessageIter};

/// A rule in the common form, in 16 bytes: there may be many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Signature(u64, u64);

impl Signature {
    fn of_form(form: &[u8]) -> Self {
        let half = |salt: u8| {
            let mut h = DefaultHasher::new();
            salt.hash(&mut h);
            form.hash(&mut h);
            h.finish()
        };
        Self(half(0), half(1))
    }

    /// Of a rule's options in a dump.
    pub(super) fn of_dump(options: AttrIter<'_>) -> Option<Self> {
        form(options, &|_| None).map(|f| Self::of_form(&f))
    }

    /// Of the one message of ours in the buffer. `tag` is what the kernel calls a program.
    pub(super) fn of_message(buf: &[u8], tag: &dyn Fn(RawFd) -> Option<[u8; 8]>) -> Option<Self> {
        let m = MessageIter::new(buf).next()?;
        let options = m.attrs(TcMsg::LEN).find_type(TCA_OPTIONS)?.nested();
        form(options, tag).map(|f| Self::of_form(&f))
    }
}

fn push(form: &mut Vec<u8>, ty: u16, payload: &[u8]) {
    form.extend_from_slice(&ty.to_ne_bytes());
    form.extend_from_slice(&(payload.len() as u64).to_ne_bytes());
    form.extend_from_slice(payload);
}

fn form(options: AttrIter<'_>, tag: &dyn Fn(RawFd) -> Option<[u8; 8]>) -> Option<Vec<u8>> {
    let mut form = Vec::with_capacity(1024);
    let mut keys: Vec<Attr<'_>> = Vec::with_capacity(24);
    let (mut flags, mut actions) = (0, AttrIter::new(&[]));
    for a in options {
        match a.ty {
            TCA_FLOWER_ACT => actions = a.nested(),
            TCA_FLOWER_FLAGS => flags = a.u32()?,
            TCA_FLOWER_IN_HW_COUNT => {}
            _ => keys.push(a),
        }
    }
    keys.sort_by_key(|a| a.ty);
    keys.iter().for_each(|a| push(&mut form, a.ty, a.payload));
    let own = flags & (TCA_CLS_FLAGS_SKIP_HW | TCA_CLS_FLAGS_SKIP_SW);
    push(&mut form, TCA_FLOWER_FLAGS, &own.to_ne_bytes());
    for action in actions {
        let attrs = action.nested();
        let kind = attrs.find_type(TCA_ACT_KIND)?.str()?;
        push(&mut form, TCA_ACT_KIND, kind.as_bytes());
        parameters(&mut form, kind, attrs.find_type(TCA_ACT_OPTIONS)?.nested(), tag)?;
    }
    Some(form)
}

/// Which attribute of an action holds the struct that begins with `tc_gen`, and which the times.
fn layout(kind: &str) -> Option<(u16, u16)> {
    Some(match kind {
        "csum" => (TCA_CSUM_PARMS, 2),
        "pedit" => (TCA_PEDIT_PARMS_EX, 1),
        "mirred" => (TCA_MIRRED_PARMS, 1),
        "gact" | "vlan" => (TCA_GACT_PARMS, 1),
        "bpf" => (TCA_ACT_BPF_PARMS, 1),
        _ => return None,
    })
}

fn parameters(
    form: &mut Vec<u8>,
    kind: &str,
    options: AttrIter<'_>,
    tag: &dyn Fn(RawFd) -> Option<[u8; 8]>,
) -> Option<()> {
    let (parms, times) = layout(kind)?;
    let mut rest: Vec<Attr<'_>> = Vec::new();
    let mut program = None;
    for a in options {
        match a.ty {
            ty if ty == parms => {
                // index and capab; refcnt and bindcnt.
                let mut b = a.payload.to_vec();
                b.get_mut(..8)?.fill(0);
                b.get_mut(12..20)?.fill(0);
                push(form, ty, &b);
            }
            ty if ty == times => {}
            TCA_ACT_BPF_ID if kind == "bpf" => {}
            TCA_ACT_BPF_TAG if kind == "bpf" => program = a.payload.first_chunk().copied(),
            TCA_ACT_BPF_FD if kind == "bpf" => {
                program = Some(tag(RawFd::try_from(a.u32()?).ok()?)?);
            }
            // Padding.
            _ if a.payload.is_empty() => {}
            _ => rest.push(a),
        }
    }
    rest.sort_by_key(|a| a.ty);
    for a in rest {
        if kind == "pedit" && a.ty == TCA_PEDIT_KEYS_EX {
            // Nested twice; the flag that says so is in our messages and not in all dumps.
            for b in a.nested().flat_map(|key| key.nested()) {
                push(form, b.ty, b.payload);
            }
        } else {
            push(form, a.ty, a.payload);
        }
    }
    if kind == "bpf" {
        push(form, TCA_ACT_BPF_TAG, &program?);
    }
    Some(())
}

/// What the kernel calls a program of ours: a digest of its instructions.
pub(super) fn program_tag(fd: RawFd) -> Option<[u8; 8]> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
    let hex = info.lines().find_map(|l| l.strip_prefix("prog_tag:"))?.trim();
    let mut tag = [0; 8];
    for (byte, at) in tag.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(hex.get(at..at + 2)?, 16).ok()?;
    }
    Some(tag)
}

/// The tuple that a rule matches, where it matches exactly one.
pub(super) fn tuple_of(options: &AttrIter<'_>) -> Option<Tuple> {
    let attr = |ty| options.find_type(ty);
    let v4 = |ty| attr(ty).and_then(|a| Some(IpAddr::from(*a.payload.first_chunk::<4>()?)));
    let v6 = |ty| attr(ty).and_then(|a| Some(IpAddr::from(*a.payload.first_chunk::<16>()?)));
    let proto = L4Proto::from_number(attr(TCA_FLOWER_KEY_IP_PROTO)?.u8()?)?;
    let (src, dst) = match v4(TCA_FLOWER_KEY_IPV4_SRC) {
        Some(src) => (src, v4(TCA_FLOWER_KEY_IPV4_DST)?),
        None => (v6(TCA_FLOWER_KEY_IPV6_SRC)?, v6(TCA_FLOWER_KEY_IPV6_DST)?),
    };
    let ports = [
        (TCA_FLOWER_KEY_TCP_SRC, TCA_FLOWER_KEY_TCP_DST),
        (TCA_FLOWER_KEY_UDP_SRC, TCA_FLOWER_KEY_UDP_DST),
    ];
    let (sport, dport) =
        ports.iter().find_map(|&(s, d)| Some((attr(s)?.be16()?, attr(d)?.be16()?)))?;
    Tuple::new(proto, src, sport, dst, dport)
}
