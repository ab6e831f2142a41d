//! Whole messages about rules: add, delete, delete all of a prio, get, dump.

use super::actions::{ActionList, NatForm};
use super::bpf::Program;
use super::encode::flow_keys;
use super::uapi::*;
use crate::contract::flow::{Flow, FlowMatch};
use crate::contract::types::{Cookie, Ifindex, RuleId};
use crate::netlink::socket::{ACK, CREATE, DUMP, EXCL, REQUEST};
use crate::netlink::wire::Message;

/// Where a rule stands on the netdev's ingress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) ifindex: Ifindex,
    pub(super) prio: Prio,
    pub(super) family: Family,
}

impl Place {
    fn tcmsg(self, handle: Option<Handle>) -> [u8; TcMsg::LEN] {
        TcMsg {
            ifindex: self.ifindex.get(),
            handle: handle.map_or(0, |h| h.0.get()),
            parent: PARENT_INGRESS,
            prio: self.prio.0,
            ethertype: self.family.ethertype(),
        }
        .to_bytes()
    }
}

/// Where the rule runs and how its checksums are kept right.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form<'p> {
    /// `TCA_CLS_FLAGS_*`: neither of `SKIP_HW` and `SKIP_SW` for hardware and software.
    pub(super) flags: u32,
    /// `None` for a flow without NAT.
    pub(super) nat: Option<NatForm<'p>>,
    /// What does the rest of what `ip_forward` does, in software. `None`: the header checksum of IPv4 is
    /// computed by `csum`.
    pub(super) header: Option<&'p Program>,
    /// Whether actions count per processor.
    pub(super) percpu_stats: bool,
}

/// What the engine calls a rule: prio and handle.
pub(super) fn rule_id(prio: Prio, handle: Handle) -> RuleId {
    RuleId(u64::from(prio.0) << 32 | u64::from(handle.0.get()))
}

/// The prio and the handle of a rule that [`rule_id`] named.
pub(super) fn split_rule_id(rule: RuleId) -> Option<(Prio, Handle)> {
    let prio = u16::try_from(rule.0 >> 32).ok()?;
    let handle = u32::try_from(rule.0 & u64::from(u32::MAX)).ok()?;
    Some((Prio(prio), Handle(handle.try_into().ok()?)))
}

/// Appends the message that adds a flow's rule. It must not exist yet. No answer is asked for.
pub(super) fn add(
    buf: &mut Vec<u8>,
    seq: u32,
    place: Place,
    handle: Handle,
    flow: &Flow,
    cookie: Cookie,
    form: Form<'_>,
) {
    let cookie = cookie.to_bytes();
    add_with(buf, seq, place, handle, &flow.matches, form.flags, |m| {
        ActionList::new(m, form.percpu_stats).flow(flow, (form.nat, form.header), &cookie);
    });
}

/// The same with other actions.
pub(super) fn add_with(
    buf: &mut Vec<u8>,
    seq: u32,
    place: Place,
    handle: Handle,
    matches: &FlowMatch,
    flags: u32,
    actions: impl FnOnce(&mut Message<'_>),
) {
    let mut m = Message::new(buf, RTM_NEWTFILTER, REQUEST | CREATE | EXCL, seq);
    m.raw(&place.tcmsg(Some(handle)));
    m.attr(TCA_KIND, b"flower\0");
    m.nested_plain(TCA_OPTIONS, |m| {
        flow_keys(m, matches);
        if flags != 0 {
            m.u32(TCA_FLOWER_FLAGS, flags);
        }
        m.nested_plain(TCA_FLOWER_ACT, actions);
    });
    m.finish();
}

/// Appends the message that deletes one rule. No answer is asked for.
pub(super) fn delete(buf: &mut Vec<u8>, seq: u32, place: Place, handle: Handle) {
    delete_of_kind(buf, seq, place, handle, b"flower\0");
}

/// The same for a rule of another classifier; `kind` with its terminating NUL.
pub(super) fn delete_of_kind(
    buf: &mut Vec<u8>,
    seq: u32,
    place: Place,
    handle: Handle,
    kind: &[u8],
) {
    let mut m = Message::new(buf, RTM_DELTFILTER, REQUEST, seq);
    m.raw(&place.tcmsg(Some(handle)));
    // With the kind the kernel need not take the RTNL for an unlocked classifier.
    m.attr(TCA_KIND, kind);
    m.finish();
}

/// Appends the message that deletes every rule of a prio and ethertype.
pub(super) fn delete_all(buf: &mut Vec<u8>, seq: u32, place: Place) {
    let mut m = Message::new(buf, RTM_DELTFILTER, REQUEST | ACK, seq);
    m.raw(&place.tcmsg(None));
    m.finish();
}

/// Appends the message that asks for one rule.
pub(super) fn get(buf: &mut Vec<u8>, seq: u32, place: Place, handle: Handle) {
    let mut m = Message::new(buf, RTM_GETTFILTER, REQUEST | ACK, seq);
    m.raw(&place.tcmsg(Some(handle)));
    m.attr(TCA_KIND, b"flower\0");
    m.finish();
}

/// Appends the message that asks for every rule of a prio (`tcf_chain_dump` filters by prio and
/// protocol): in full, or kind, cookie, counters and flags only.
pub(super) fn dump(buf: &mut Vec<u8>, seq: u32, place: Place, terse: bool) {
    let mut m = Message::new(buf, RTM_GETTFILTER, REQUEST | DUMP, seq);
    m.raw(&place.tcmsg(None));
    m.u32(TCA_CHAIN, 0);
    if terse {
        let [a, b, c, d] = TCA_DUMP_FLAGS_TERSE.to_ne_bytes();
        m.attr(TCA_DUMP_FLAGS, &[a, b, c, d, a, b, c, d]); // struct nla_bitfield32
    }
    m.finish();
}

/// Appends the message that asks for every rule at one parent in full.
pub(super) fn dump_all(buf: &mut Vec<u8>, seq: u32, ifindex: Ifindex, parent: u32) {
    let mut m = Message::new(buf, RTM_GETTFILTER, REQUEST | DUMP, seq);
    m.raw(&TcMsg { ifindex: ifindex.get(), handle: 0, parent, prio: 0, ethertype: 0 }.to_bytes());
    m.finish();
}

/// Makes the last message of a batch ask for an acknowledgement; `at` is where it begins.
pub(super) fn ask_for_ack(buf: &mut [u8], at: usize) {
    if let Some(flags) = buf.get_mut(at + 6..at + 8) {
        let with = u16::from_ne_bytes([flags[0], flags[1]]) | ACK;
        flags.copy_from_slice(&with.to_ne_bytes());
    }
}

/// True when the flow's rule in software has actions that no NIC takes: it is another than in hardware.
pub(super) fn needs_programs(flow: &Flow) -> bool {
    flow.has_nat() || flow.is_routed_ipv4()
}
