//! Actions: what a rule does to its packets.
//!
//! The order is that of the design: VLAN pop, MAC addresses, NAT, one off the TTL (all three in one
//! `pedit`), checksums, VLAN push, redirect. Around the `pedit` of a NAT rule in software stand two `bpf`
//! actions that keep the L4 checksum right, and in the place of `csum` another for the IPv4 header and
//! `skb->priority`; see [`super::bpf`] for why `csum` cannot.
//!
//! # police
//! Where packets can arrive that are longer than may be sent, a `police` without a rate stands first:
//! what is longer than its `mtu` gets the verdict `pass` and goes up the stack, untouched, where it
//! is fragmented or answered with an ICMP error; the rest goes on to the next action. This is exact
//! (`tcf_police_mtu_check`, since Linux 5.19): of a single packet the kernel compares the length
//! with the Ethernet header, without the tag, which stands beside the packet; of a GSO packet that
//! of the longest segment it will be cut into, as the forwarding code does.
//!
//! # pedit
//! A key is a 32-bit word at an offset that is a multiple of 4: `word = (word & mask) ^ value`,
//! with the **mask being the bits to keep**, words in memory order (`tcf_pedit_act`). `add` is
//! `(word + value) & !mask` on the word as a number of the machine, so adding 0xff in one byte takes
//! one off it and the carry falls into bytes that are masked out, on either endianness.
//!
//! Ports are addressed in two ways. Rules that run in software say "IPv4 header + 20" or "IPv6
//! header + 40": before Linux 6.4 (and the stable series that took "act_pedit: Parse L3 Header for
//! L4 offset", 6.1.36 among them) a key of type TCP or UDP is applied at `skb->transport_header`,
//! which nothing has set yet when a packet arrives. The guards keep away whatever has options or
//! extension headers, so the fixed offset is right on every kernel. Rules for hardware say "TCP"
//! or "UDP", which is what drivers translate.

use std::net::IpAddr;

use super::bpf::Program;
use super::uapi::*;
use crate::contract::flow::Flow;
use crate::contract::types::{Ifindex, L4Proto, VlanId};
use crate::netlink::wire::Message;

/// How the L4 checksum of a NAT rule is kept right.
#[derive(Clone, Copy, Debug)]
pub(super) enum NatForm<'p> {
    /// By programs around the `pedit`.
    Software { before: &'p Program, after: &'p Program },
    /// By `csum`: the NIC computes it anew.
    Hardware,
}

/// What is done to the tag.
#[derive(Clone, Copy, Debug)]
enum Vlan {
    Pop,
    Push(VlanId),
}

/// The actions that rules are made of; `bpf`, for NAT and IPv4 in software, is looked for apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Gact,
    Pedit,
    Csum,
    Mirred,
    Vlan,
    Police,
}

impl Action {
    /// Those that every port needs.
    pub(super) const ALL: [Self; 4] = [Self::Gact, Self::Pedit, Self::Csum, Self::Mirred];

    /// What the kernel calls it.
    pub(super) const fn kind(self) -> &'static str {
        match self {
            Self::Gact => "gact",
            Self::Pedit => "pedit",
            Self::Csum => "csum",
            Self::Mirred => "mirred",
            Self::Vlan => "vlan",
            Self::Police => "police",
        }
    }

    /// The module that brings it, and the kernel option that makes the module.
    pub(super) const fn module(self) -> &'static str {
        match self {
            Self::Gact => "act_gact: CONFIG_NET_ACT_GACT",
            Self::Pedit => "act_pedit: CONFIG_NET_ACT_PEDIT",
            Self::Csum => "act_csum: CONFIG_NET_ACT_CSUM",
            Self::Mirred => "act_mirred: CONFIG_NET_ACT_MIRRED",
            Self::Vlan => "act_vlan: CONFIG_NET_ACT_VLAN",
            Self::Police => "act_police: CONFIG_NET_ACT_POLICE",
        }
    }
}

/// The list of actions being written: each stands under its number, from 1 on.
#[derive(Debug)]
pub(super) struct ActionList<'m, 'b> {
    m: &'m mut Message<'b>,
    next: u16,
    percpu_stats: bool,
}

impl<'m, 'b> ActionList<'m, 'b> {
    pub(super) fn new(m: &'m mut Message<'b>, percpu_stats: bool) -> Self {
        Self { m, next: 1, percpu_stats }
    }

    /// `kind` with its terminating NUL.
    fn push(
        &mut self,
        kind: &[u8],
        cookie: Option<&[u8; 16]>,
        options: impl FnOnce(&mut Message<'b>),
    ) {
        let percpu_stats = self.percpu_stats;
        self.m.nested_plain(self.next, |m| {
            m.attr(TCA_ACT_KIND, kind);
            m.nested_plain(TCA_ACT_OPTIONS, options);
            if let Some(cookie) = cookie {
                m.attr(TCA_ACT_COOKIE, cookie);
            }
            if !percpu_stats {
                // struct nla_bitfield32: value, selector
                let [a, b, c, d] = TCA_ACT_FLAGS_NO_PERCPU_STATS.to_ne_bytes();
                m.attr(TCA_ACT_FLAGS, &[a, b, c, d, a, b, c, d]);
            }
        });
        self.next += 1;
    }

    /// Ends the classification: the packet goes on up the stack.
    pub(super) fn pass(&mut self, cookie: &[u8; 16]) {
        self.push(b"gact\0", Some(cookie), |m| {
            m.attr(TCA_GACT_PARMS, &tc_gen(TC_ACT_OK));
        });
    }

    fn pedit(&mut self, keys: &PeditKeys) {
        self.push(b"pedit\0", None, |m| {
            m.attr(TCA_PEDIT_PARMS_EX, keys.parms());
            m.nested(TCA_PEDIT_KEYS_EX, |m| {
                for &(htype, cmd) in &keys.ex[..keys.len] {
                    m.nested(TCA_PEDIT_KEY_EX, |m| {
                        m.u16(TCA_PEDIT_KEY_EX_HTYPE, htype as u16);
                        m.u16(TCA_PEDIT_KEY_EX_CMD, cmd as u16);
                    });
                }
            });
        });
    }

    fn csum(&mut self, update: u32) {
        let mut parms = [0; 24];
        parms[..20].copy_from_slice(&tc_gen(TC_ACT_PIPE));
        parms[20..].copy_from_slice(&update.to_ne_bytes());
        self.push(b"csum\0", None, |m| {
            m.attr(TCA_CSUM_PARMS, &parms);
        });
    }

    fn bpf(&mut self, program: &Program) {
        self.push(b"bpf\0", None, |m| {
            m.attr(TCA_ACT_BPF_PARMS, &tc_gen(TC_ACT_PIPE));
            m.attr(TCA_ACT_BPF_FD, &program.raw_fd().to_ne_bytes());
            m.attr(TCA_ACT_BPF_NAME, program.name_with_nul());
        });
    }

    /// Lets only IP packets of at most this length go on to the next action.
    fn police(&mut self, mtu: u32) {
        // struct tc_police: index, action (of what exceeds), limit, burst, mtu, two rates, ...
        let mut parms = [0; 56];
        parms[4..8].copy_from_slice(&TC_ACT_OK.to_ne_bytes());
        parms[16..20].copy_from_slice(&mtu.saturating_add(ETH_HLEN).to_ne_bytes());
        self.push(b"police\0", None, |m| {
            m.attr(TCA_POLICE_TBF, &parms);
            m.attr(TCA_POLICE_RESULT, &TC_ACT_PIPE.to_ne_bytes());
        });
    }

    /// Takes the tag off, and lets the next filter be asked.
    pub(super) fn pop_and_go_on(&mut self, cookie: &[u8; 16]) {
        let mut parms = [0; 24];
        parms[..20].copy_from_slice(&tc_gen(TC_ACT_UNSPEC));
        parms[20..].copy_from_slice(&TCA_VLAN_ACT_POP.to_ne_bytes());
        self.push(b"vlan\0", Some(cookie), |m| _ = m.attr(TCA_VLAN_PARMS, &parms));
    }

    fn vlan(&mut self, what: Vlan) {
        let mut parms = [0; 24];
        parms[..20].copy_from_slice(&tc_gen(TC_ACT_PIPE));
        let action = match what {
            Vlan::Pop => TCA_VLAN_ACT_POP,
            Vlan::Push(_) => TCA_VLAN_ACT_PUSH,
        };
        parms[20..].copy_from_slice(&action.to_ne_bytes());
        self.push(b"vlan\0", None, |m| {
            m.attr(TCA_VLAN_PARMS, &parms);
            if let Vlan::Push(id) = what {
                m.u16(TCA_VLAN_PUSH_VLAN_ID, id.get());
                m.be16(TCA_VLAN_PUSH_VLAN_PROTOCOL, ETH_P_8021Q);
            }
        });
    }

    fn redirect(&mut self, egress: Ifindex, cookie: &[u8; 16]) {
        let mut parms = [0; 28];
        parms[..20].copy_from_slice(&tc_gen(TC_ACT_STOLEN));
        parms[20..24].copy_from_slice(&TCA_EGRESS_REDIR.to_ne_bytes());
        parms[24..].copy_from_slice(&egress.get().to_ne_bytes());
        self.push(b"mirred\0", Some(cookie), |m| {
            m.attr(TCA_MIRRED_PARMS, &parms);
        });
    }

    /// One action alone, to find out whether the kernel has it.
    pub(super) fn one(&mut self, flow: &Flow, which: Action, cookie: &[u8; 16]) {
        match which {
            Action::Gact => self.pass(cookie),
            Action::Pedit => self.pedit(&PeditKeys::of(flow, None)),
            Action::Csum => self.csum(TCA_CSUM_UPDATE_FLAG_IPV4HDR),
            Action::Police => self.police(flow.forward.mtu),
            Action::Vlan => self.vlan(Vlan::Push(VlanId::MIN)),
            Action::Mirred => self.redirect(flow.forward.egress, cookie),
        }
    }

    /// The actions of a flow. The cookie stands on the last, whose counters are the rule's.
    pub(super) fn flow(
        &mut self,
        flow: &Flow,
        (nat, header): (Option<NatForm<'_>>, Option<&Program>),
        cookie: &[u8; 16],
    ) {
        let keys = PeditKeys::of(flow, nat);
        let nat = nat.filter(|_| flow.has_nat());
        if flow.may_exceed_mtu() {
            self.police(flow.forward.mtu);
        }
        if flow.matches.vlan.is_some() {
            self.vlan(Vlan::Pop);
        }
        if let Some(NatForm::Software { before, .. }) = nat {
            self.bpf(before);
        }
        if keys.len > 0 {
            self.pedit(&keys);
        }
        if let Some(NatForm::Software { after, .. }) = nat {
            self.bpf(after);
        }
        let update = checksums_to_update(flow, nat);
        match header {
            Some(program) if flow.is_routed_ipv4() => self.bpf(program),
            _ if update != 0 => self.csum(update),
            _ => {}
        }
        if let Some(id) = flow.forward.vlan {
            self.vlan(Vlan::Push(id));
        }
        self.redirect(flow.forward.egress, cookie);
    }
}

/// `update_flags` of a `csum`, 0 for none.
fn checksums_to_update(flow: &Flow, nat: Option<NatForm<'_>>) -> u32 {
    let (from, to) = (&flow.matches.tuple, &flow.forward.tuple);
    let addresses = from.src() != to.src() || from.dst() != to.dst();
    let mut update = 0;
    if !from.is_ipv6() && (addresses || flow.forward.macs.is_some()) {
        update |= TCA_CSUM_UPDATE_FLAG_IPV4HDR;
    }
    if matches!(nat, Some(NatForm::Hardware)) {
        update |= match from.proto() {
            L4Proto::Tcp => TCA_CSUM_UPDATE_FLAG_TCP,
            L4Proto::Udp => TCA_CSUM_UPDATE_FLAG_UDP,
        };
    }
    update
}

/// The fields that every action's parameters begin with (`tc_gen` in linux/pkt_cls.h): index,
/// capab, action, refcnt, bindcnt.
fn tc_gen(verdict: i32) -> [u8; 20] {
    let mut b = [0; 20];
    b[8..12].copy_from_slice(&verdict.to_ne_bytes());
    b
}

/// `enum pedit_header_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
enum HeaderType {
    Eth = 1,
    Ip4 = 2,
    Ip6 = 3,
    Tcp = 4,
    Udp = 5,
}

/// `enum pedit_cmd`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
enum Command {
    Set = 0,
    Add = 1,
}

/// Three words of MAC addresses, one of TTL, twice four of IPv6 addresses, one of ports.
const MAX_KEYS: usize = 13;
/// `struct tc_pedit_sel` without keys: `tc_gen`, nkeys, flags, padding.
const SEL_LEN: usize = 24;
/// `struct tc_pedit_key`: mask, val, off, at, offmask, shift.
const KEY_LEN: usize = 24;

/// The keys of one `pedit`, in the kernel's layout.
#[derive(Debug)]
struct PeditKeys {
    len: usize,
    parms: [u8; SEL_LEN + MAX_KEYS * KEY_LEN],
    ex: [(HeaderType, Command); MAX_KEYS],
}

impl PeditKeys {
    fn of(flow: &Flow, nat: Option<NatForm<'_>>) -> Self {
        let mut keys = Self {
            len: 0,
            parms: [0; SEL_LEN + MAX_KEYS * KEY_LEN],
            ex: [(HeaderType::Eth, Command::Set); MAX_KEYS],
        };
        keys.parms[..20].copy_from_slice(&tc_gen(TC_ACT_PIPE));
        if let Some(macs) = flow.forward.macs {
            let ([d0, d1, d2, d3, d4, d5], [s0, s1, s2, s3, s4, s5]) = (macs.dst.0, macs.src.0);
            keys.set(HeaderType::Eth, 0, [d0, d1, d2, d3], [0xff; 4]);
            keys.set(HeaderType::Eth, 4, [d4, d5, s0, s1], [0xff; 4]);
            keys.set(HeaderType::Eth, 8, [s2, s3, s4, s5], [0xff; 4]);
        }
        keys.nat(flow, nat);
        if flow.forward.macs.is_some() {
            // One taken off, by adding 255 in the byte.
            if flow.matches.tuple.is_ipv6() {
                keys.push(HeaderType::Ip6, Command::Add, 4, [0, 0, 0, 0xff], [0, 0, 0, 0xff]);
            } else {
                keys.push(HeaderType::Ip4, Command::Add, 8, [0xff, 0, 0, 0], [0xff, 0, 0, 0]);
            }
        }
        keys
    }

    fn nat(&mut self, flow: &Flow, nat: Option<NatForm<'_>>) {
        let (from, to) = (&flow.matches.tuple, &flow.forward.tuple);
        // Offsets of the source and destination address in their headers.
        for (old, new, at4, at6) in [(from.src(), to.src(), 12, 8), (from.dst(), to.dst(), 16, 24)]
        {
            match new {
                _ if new == old => {}
                IpAddr::V4(a) => self.set(HeaderType::Ip4, at4, a.octets(), [0xff; 4]),
                IpAddr::V6(a) => {
                    for (word, at) in a.octets().chunks_exact(4).zip((at6..).step_by(4)) {
                        let [a, b, c, d] = *word else { continue };
                        self.set(HeaderType::Ip6, at, [a, b, c, d], [0xff; 4]);
                    }
                }
            }
        }
        let mask_of = |changed: bool| if changed { 0xff } else { 0 };
        let (s, d) = (mask_of(from.sport() != to.sport()), mask_of(from.dport() != to.dport()));
        if s | d != 0 {
            let [s0, s1] = to.sport().to_be_bytes();
            let [d0, d1] = to.dport().to_be_bytes();
            let (htype, at) = match (nat, from.is_ipv6(), from.proto()) {
                (Some(NatForm::Hardware), _, L4Proto::Tcp) => (HeaderType::Tcp, 0),
                (Some(NatForm::Hardware), _, L4Proto::Udp) => (HeaderType::Udp, 0),
                (_, false, _) => (HeaderType::Ip4, 20),
                (_, true, _) => (HeaderType::Ip6, 40),
            };
            self.set(htype, at, [s0, s1, d0, d1], [s, s, d, d]);
        }
    }

    fn set(&mut self, htype: HeaderType, at: u32, value: [u8; 4], change: [u8; 4]) {
        let mut masked = value;
        for (v, c) in masked.iter_mut().zip(change) {
            *v &= c;
        }
        self.push(htype, Command::Set, at, masked, change);
    }

    /// `value` and `change` (the bits that change) in the order of the bytes in the packet.
    fn push(&mut self, htype: HeaderType, cmd: Command, at: u32, value: [u8; 4], change: [u8; 4]) {
        let Some(ex) = self.ex.get_mut(self.len) else { return };
        *ex = (htype, cmd);
        let key = &mut self.parms[SEL_LEN + self.len * KEY_LEN..][..KEY_LEN];
        key[..4].copy_from_slice(&(!u32::from_ne_bytes(change)).to_ne_bytes());
        key[4..8].copy_from_slice(&value);
        key[8..12].copy_from_slice(&at.to_ne_bytes());
        self.len += 1;
        // nkeys
        self.parms[20] += 1;
    }

    fn parms(&self) -> &[u8] {
        &self.parms[..SEL_LEN + self.len * KEY_LEN]
    }
}
