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
    tag_in(&std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?)
}

fn tag_in(info: &str) -> Option<[u8; 8]> {
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

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;
    use crate::netlink::wire::Message;
    use crate::tc_flower::bpf::Programs;

    type Fill<'a> = &'a dyn Fn(&mut Message<'_>);

    fn attributes(fill: Fill<'_>) -> Vec<u8> {
        let mut buf = Vec::new();
        let mut m = Message::new(&mut buf, 0, 0, 0);
        fill(&mut m);
        m.finish();
        buf.split_off(16)
    }

    fn signature(fill: Fill<'_>) -> Option<Signature> {
        Signature::of_dump(AttrIter::new(&attributes(fill)))
    }

    /// A rule with one key and these flags and actions.
    fn rule(flags: u32, actions: &[(&str, Fill<'_>)]) -> Option<Signature> {
        signature(&|m| {
            m.u8(TCA_FLOWER_KEY_IP_PROTO, 6);
            acts(m, actions);
            m.u32(TCA_FLOWER_FLAGS, flags);
        })
    }

    fn acts(m: &mut Message<'_>, actions: &[(&str, Fill<'_>)]) {
        m.nested(TCA_FLOWER_ACT, |m| {
            for (n, (kind, options)) in (1..).zip(actions) {
                m.nested(n, |m| {
                    m.str(TCA_ACT_KIND, kind).nested(TCA_ACT_OPTIONS, |m| options(m));
                    // What counts, and what marks it.
                    m.attr(TCA_ACT_COOKIE, &[u8::try_from(n).unwrap(); 16]);
                });
            }
        });
    }

    /// `struct tc_mirred`: index, capab, action, refcnt, bindcnt, eaction, ifindex.
    fn mirred(words: [u32; 7]) -> impl Fn(&mut Message<'_>) {
        move |m| {
            m.attr(TCA_MIRRED_PARMS, &words.map(u32::to_ne_bytes).concat());
        }
    }

    #[test]
    fn keys_are_compared_whatever_their_order_and_a_further_one_makes_another_rule() {
        let keys = |list: &[(u16, u8)]| {
            signature(&|m| list.iter().for_each(|(ty, v)| _ = m.u8(*ty, *v))).unwrap()
        };
        let (proto, ttl) = (TCA_FLOWER_KEY_IP_PROTO, TCA_FLOWER_KEY_IP_TTL);
        assert_eq!(keys(&[(proto, 6), (ttl, 1)]), keys(&[(ttl, 1), (proto, 6)]));
        let others: [&[(u16, u8)]; 3] =
            [&[(proto, 6)], &[(proto, 6), (ttl, 2)], &[(proto, 17), (ttl, 1)]];
        for other in others {
            assert_ne!(keys(&[(proto, 6), (ttl, 1)]), keys(other), "{other:?}");
        }
    }

    #[test]
    fn of_the_flags_only_where_the_rule_may_be_is_its_own() {
        let plain = rule(0, &[]);
        assert!(plain.is_some());
        for kernels in [TCA_CLS_FLAGS_IN_HW, TCA_CLS_FLAGS_NOT_IN_HW] {
            assert_eq!(rule(kernels, &[]), plain);
        }
        let own = [TCA_CLS_FLAGS_SKIP_HW, TCA_CLS_FLAGS_SKIP_SW].map(|f| rule(f, &[]));
        assert!(own[0] != plain && own[1] != plain && own[0] != own[1]);
        let counted = signature(&|m| {
            m.u8(TCA_FLOWER_KEY_IP_PROTO, 6).u32(TCA_FLOWER_IN_HW_COUNT, 3);
            acts(m, &[]);
        });
        assert_eq!(counted, plain);
    }

    #[test]
    fn what_the_kernel_chooses_and_counts_in_an_action_is_left_out_and_nothing_else() {
        let mine = rule(0, &[("mirred", &mirred([0, 0, 4, 0, 0, 1, 9]))]);
        assert!(mine.is_some());
        let dumped = rule(
            0,
            &[("mirred", &|m| {
                mirred([77, 5, 4, 1, 2, 1, 9])(m);
                // Times, and padding.
                m.attr(1, &[9; 32]).attr(3, &[]);
            })],
        );
        assert_eq!(dumped, mine);
        for other in [[0, 0, 3, 0, 0, 1, 9], [0, 0, 4, 0, 0, 2, 9], [0, 0, 4, 0, 0, 1, 8]] {
            assert_ne!(rule(0, &[("mirred", &mirred(other))]), mine, "{other:?}");
        }
        let more = rule(
            0,
            &[("mirred", &|m| {
                mirred([0, 0, 4, 0, 0, 1, 9])(m);
                m.u32(7, 1);
            })],
        );
        assert_ne!(more, mine, "a parameter that we do not know");
        assert_eq!(
            rule(0, &[("mirred", &|m| _ = m.attr(TCA_MIRRED_PARMS, &[0; 16]))]),
            None,
            "too short"
        );
    }

    /// Each kind has the struct that all begin with under a number of its own, and the times.
    #[test]
    fn of_every_kind_of_action_the_parameters_count_and_the_times_do_not() {
        let kinds =
            [("csum", 1, 2), ("pedit", 4, 1), ("mirred", 2, 1), ("gact", 2, 1), ("vlan", 2, 1)];
        for (kind, parms, times) in kinds {
            let with = |index: u8, verdict: u8, last: u8, time: u8| {
                let mut b = [0; 24];
                (b[0], b[8], b[12], b[23]) = (index, verdict, index, last);
                rule(0, &[(kind, &|m| _ = m.attr(parms, &b).attr(times, &[time; 32]))])
            };
            let mine = with(0, 3, 5, 0);
            assert!(mine.is_some(), "{kind}");
            assert_eq!(with(7, 3, 5, 9), mine, "{kind}: what the kernel counts and chooses");
            assert_ne!(with(0, 4, 5, 0), mine, "{kind}: another verdict");
            assert_ne!(with(0, 3, 6, 0), mine, "{kind}: another parameter");
            // Numbers that mean something else in the action `bpf`, and one of nobody.
            for ty in [5, 7, 8, 9] {
                let more = |value: u32| {
                    rule(0, &[(kind, &|m| _ = m.attr(parms, &[0; 24]).u32(ty, value))])
                };
                let nested = (kind, ty) == ("pedit", TCA_PEDIT_KEYS_EX);
                assert_eq!(more(1) == more(2), nested, "{kind}, {ty}");
            }
        }
    }

    #[test]
    fn a_tag_is_what_the_kernel_says_of_a_descriptor() {
        let info = "pos:\t0\nprog_type:\t4\nprog_tag:\t01a0b2c3d4e5f6ff\nmemlock:\t4096\n";
        assert_eq!(tag_in(info), Some([0x01, 0xa0, 0xb2, 0xc3, 0xd4, 0xe5, 0xf6, 0xff]));
        assert_eq!(tag_in("prog_tag:\t01a0\n"), None, "cut short");
        assert_eq!(tag_in("prog_tag:\tno number ...\n"), None);
        assert_eq!(tag_in("pos:\t0\n"), None, "of no program");
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(program_tag(file.as_raw_fd()), None);
        // Without the privilege to load them the kernel tests of the lab decide.
        let Ok(programs) = Programs::load() else { return };
        let (before, after) = programs.nat(Family::Ipv4, L4Proto::Tcp);
        let tags = [before, after].map(|p| program_tag(p.raw_fd()).unwrap());
        assert!(tags[0] != tags[1] && !tags.contains(&[0; 8]), "{tags:?}");
    }

    #[test]
    fn a_tuple_is_read_where_the_rule_matches_exactly_one() {
        let tuple = |fill: Fill<'_>| tuple_of(&AttrIter::new(&attributes(fill)));
        let v4 = |m: &mut Message<'_>| {
            m.attr(TCA_FLOWER_KEY_IPV4_SRC, &[10, 0, 0, 1]);
            m.attr(TCA_FLOWER_KEY_IPV4_DST, &[10, 0, 0, 2]);
        };
        let tcp = |m: &mut Message<'_>| {
            m.u8(TCA_FLOWER_KEY_IP_PROTO, 6);
            m.be16(TCA_FLOWER_KEY_TCP_SRC, 4000).be16(TCA_FLOWER_KEY_TCP_DST, 80);
        };
        let wanted = |s: &str| Some(s.parse::<Tuple>().unwrap());
        let both = tuple(&|m| {
            v4(m);
            tcp(m);
        });
        assert_eq!(both, wanted("tcp 10.0.0.1:4000 > 10.0.0.2:80"));
        let v6 = tuple(&|m| {
            let (mut src, mut dst) = ([0; 16], [0; 16]);
            (src[15], dst[15]) = (1, 2);
            m.u8(TCA_FLOWER_KEY_IP_PROTO, 17);
            m.attr(TCA_FLOWER_KEY_IPV6_SRC, &src).attr(TCA_FLOWER_KEY_IPV6_DST, &dst);
            m.be16(TCA_FLOWER_KEY_UDP_SRC, 5).be16(TCA_FLOWER_KEY_UDP_DST, 6);
        });
        assert_eq!(v6, wanted("udp [::1]:5 > [::2]:6"));
        assert_eq!(tuple(&v4), None, "without ports");
        assert_eq!(tuple(&tcp), None, "without addresses");
    }

    #[test]
    fn actions_are_compared_in_their_order_and_by_their_kind() {
        let (gact, mirred) =
            (&|m: &mut Message<'_>| _ = m.attr(TCA_GACT_PARMS, &[0; 20]), &mirred([0; 7]));
        let two = rule(0, &[("gact", gact), ("mirred", mirred)]);
        assert_eq!(two, rule(0, &[("gact", gact), ("mirred", mirred)]));
        assert_ne!(two, rule(0, &[("mirred", mirred), ("gact", gact)]));
        assert_ne!(two, rule(0, &[("gact", gact)]));
        assert_ne!(rule(0, &[("gact", gact)]), rule(0, &[("vlan", gact)]));
        assert_eq!(rule(0, &[("connmark", gact)]), None, "what cannot be compared is not the same");
    }

    #[test]
    fn the_keys_of_pedit_are_the_same_with_and_without_the_flag_of_nested_attributes() {
        let pedit = |flag: bool, offset: u16| {
            rule(
                0,
                &[("pedit", &|m| {
                    m.attr(TCA_PEDIT_PARMS_EX, &[0; 24]);
                    let key = |m: &mut Message<'_>| _ = m.u16(1, offset);
                    if flag {
                        m.nested(TCA_PEDIT_KEYS_EX, |m| _ = m.nested(1, key));
                    } else {
                        m.nested_plain(TCA_PEDIT_KEYS_EX, |m| _ = m.nested_plain(1, key));
                    }
                })],
            )
        };
        assert!(pedit(true, 1).is_some());
        assert_eq!(pedit(true, 1), pedit(false, 1));
        assert_ne!(pedit(true, 1), pedit(true, 2));
    }

    /// The kernel tells a program by its tag, we give it by a descriptor.
    #[test]
    fn a_program_is_the_one_that_the_kernel_calls_the_same() {
        let tag_of = |fd: RawFd| (fd == 5).then_some([7; 8]);
        let ours = |fd: u32| {
            let mut buf = Vec::new();
            let mut m = Message::new(&mut buf, RTM_NEWTFILTER, 0, 1);
            m.raw(&[0; TcMsg::LEN]);
            m.nested(TCA_OPTIONS, |m| {
                acts(
                    m,
                    &[("bpf", &|m| {
                        _ = m.attr(TCA_ACT_BPF_PARMS, &[0; 20]).u32(TCA_ACT_BPF_FD, fd)
                    })],
                );
            });
            m.finish();
            Signature::of_message(&buf, &tag_of)
        };
        let dumped = |tag: Option<u8>| {
            signature(&|m| {
                acts(
                    m,
                    &[("bpf", &|m| {
                        m.attr(TCA_ACT_BPF_PARMS, &[0; 20]).u32(TCA_ACT_BPF_ID, 99);
                        if let Some(tag) = tag {
                            m.attr(TCA_ACT_BPF_TAG, &[tag; 8]);
                        }
                    })],
                );
            })
        };
        assert!(ours(5).is_some());
        assert_eq!(dumped(Some(7)), ours(5));
        assert_ne!(dumped(Some(8)), ours(5));
        assert_eq!((dumped(None), ours(6)), (None, None), "a program that nobody can name");
    }
}
