//! What bind does on a netdev: makes the ingress hook, clears what a dead engine left, puts up the
//! guards and tries a rule. Whatever it made is taken away again when it fails.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::Arc;

use nix::errno::Errno;
use tracing::{debug, info};

use super::actions::{Action, ActionList, NatForm};
use super::bpf::NatPrograms;
use super::guard;
use super::hook::Hook;
use super::prios::{Prios, Use};
use super::rule::{self, Form, Place};
use super::uapi::*;
use crate::contract::class::BindError;
use crate::contract::flow::{Flow, FlowMatch, Forward, MacRewrite};
use crate::contract::types::{
    Cookie, Direction, HwFlags, Ifindex, Instance, L4Proto, MacAddr, Tuple, Zone,
};
use crate::netlink::error::NetlinkError;

/// What bind is to find out.
pub(super) struct Wanted {
    pub(super) instance: Instance,
    pub(super) hw_flags: HwFlags,
    pub(super) prio_base: u16,
    pub(super) percpu_stats: bool,
    pub(super) nat: Result<Arc<NatPrograms>, String>,
}

/// Where the rules of a port run. Resolved at bind: hardware only counts where the NIC has taken a
/// guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Software,
    Hardware,
    Both,
}

impl Mode {
    pub(super) const fn flags(self) -> u32 {
        match self {
            Self::Software => TCA_CLS_FLAGS_SKIP_HW,
            Self::Hardware => TCA_CLS_FLAGS_SKIP_SW,
            Self::Both => 0,
        }
    }

    pub(super) const fn has_hardware(self) -> bool {
        !matches!(self, Self::Software)
    }

    pub(super) const fn has_software(self) -> bool {
        !matches!(self, Self::Hardware)
    }
}

/// What bind found out.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) prios: Prios,
    pub(super) mode: Mode,
    /// Why there is no hardware, where some was wished for.
    pub(super) no_hardware: Option<String>,
    /// `clsact` or `ingress`.
    pub(super) qdisc_kind: String,
    pub(super) made_qdisc: bool,
    pub(super) percpu_stats: bool,
    pub(super) nat: Result<Arc<NatPrograms>, String>,
}

impl Found {
    /// Whether guards stand at a prio of this use.
    pub(super) const fn has_guards_at(&self, what: Use) -> bool {
        match what {
            Use::HardwareGuards => self.mode.has_hardware(),
            Use::SoftwareGuards => self.mode.has_software(),
            Use::Flows => false,
        }
    }
}

/// Probes the netdev and prepares it.
pub(super) fn bind(hook: &mut Hook, wanted: &Wanted) -> Result<Found, BindError> {
    let hardware_type = hook.hardware_type().map_err(|e| failed("reading the link", e))?;
    if hardware_type != ARPHRD_ETHER {
        return Err(BindError::Declined(format!(
            "not an Ethernet netdev (hardware type {hardware_type})"
        )));
    }
    let mut made_qdisc = hook.add_clsact().map_err(|e| match e.errno() {
        // The kind is looked up by name first, then its module is asked for.
        Some(Errno::ENOENT | Errno::EOPNOTSUPP) => BindError::Declined(format!(
            "the kernel has no clsact qdisc (sch_ingress: CONFIG_NET_SCH_INGRESS): {e}"
        )),
        _ => failed("adding the clsact qdisc", e),
    })?;
    match prepare(hook, wanted, &mut made_qdisc) {
        Ok(found) => Ok(found),
        Err((e, prios)) => {
            if let Some(prios) = prios {
                remove_prios(hook, prios);
            }
            if made_qdisc && let Err(e) = hook.delete_unused_clsact() {
                debug!("removing the clsact qdisc after a failed bind: {e}");
            }
            Err(e)
        }
    }
}

/// The error, and the prios that something may stand at.
type Undo = (BindError, Option<Prios>);

fn prepare(hook: &mut Hook, wanted: &Wanted, made_qdisc: &mut bool) -> Result<Found, Undo> {
    let qdisc = hook
        .qdisc()
        .map_err(|e| (failed("reading the ingress qdisc", e), None))?
        .ok_or_else(|| (BindError::Declined("the clsact qdisc is gone again".into()), None))?;
    if let Some(block) = qdisc.shared_block {
        return Err((
            BindError::Declined(format!("its ingress filters are in shared block {block}")),
            None,
        ));
    }
    if !matches!(qdisc.kind.as_str(), "clsact" | "ingress") {
        return Err((BindError::Declined(format!("its ingress qdisc is {}", qdisc.kind)), None));
    }
    let cleared =
        clear_leftovers(hook).map_err(|e| (failed("removing what a dead engine left", e), None))?;
    *made_qdisc |= cleared.made_qdisc;
    let prios = free_prios(wanted.prio_base, &cleared.foreign).map_err(|e| (e, None))?;
    let mut found = Found {
        prios,
        mode: Mode::Software,
        no_hardware: None,
        qdisc_kind: qdisc.kind,
        made_qdisc: *made_qdisc,
        percpu_stats: wanted.percpu_stats,
        nat: wanted.nat.clone(),
    };
    install(hook, wanted, &mut found).map_err(|e| (e, Some(prios)))?;
    Ok(found)
}

/// Guards and a trial rule.
fn install(hook: &mut Hook, wanted: &Wanted, found: &mut Found) -> Result<(), BindError> {
    let guards = Guards { instance: wanted.instance, made_qdisc: found.made_qdisc };
    if wanted.hw_flags != HwFlags::SkipHw {
        match hardware_guards(hook, found, guards) {
            Ok(()) if wanted.hw_flags == HwFlags::SkipSw => found.mode = Mode::Hardware,
            Ok(()) => found.mode = Mode::Both,
            Err(e) if wanted.hw_flags == HwFlags::SkipSw => {
                return Err(BindError::Declined(format!(
                    "hardware only (skip_sw), and the NIC does not take the TTL guard: {e}"
                )));
            }
            Err(e) => {
                for family in Family::BOTH {
                    let _ = hook.delete_all(found.prios.of(Use::HardwareGuards, family), family);
                }
                found.no_hardware = Some(e.to_string());
            }
        }
    }
    if found.mode.has_software() {
        software_guards(hook, found, guards).map_err(|e| {
            // "TC classifier not found", or "Failed to load TC action module".
            let module = if e.to_string().contains("action") {
                Action::Gact.module()
            } else {
                "cls_u32: CONFIG_NET_CLS_U32"
            };
            missing("u32", e, module)
        })?;
        try_rules(hook, found, guards)?;
    }
    Ok(())
}

/// What the cookies of guards say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guards {
    pub(super) instance: Instance,
    pub(super) made_qdisc: bool,
}

impl Guards {
    fn cookie(self) -> Cookie {
        guard::cookie(self.instance, self.made_qdisc)
    }
}

/// Puts up all the guards of a port.
pub(super) fn put_up_guards(
    hook: &mut Hook,
    found: &Found,
    guards: Guards,
) -> Result<(), NetlinkError> {
    if found.mode.has_hardware() {
        hardware_guards(hook, found, guards)?;
    }
    if found.mode.has_software() {
        software_guards(hook, found, guards)?;
    }
    Ok(())
}

/// True when every prio that should have guards has one.
pub(super) fn guards_stand(hook: &mut Hook, found: &Found) -> Result<bool, NetlinkError> {
    for (what, family, prio) in found.prios.all().filter(|&(what, ..)| found.has_guards_at(what)) {
        let mut stands = false;
        hook.filters_at(prio, family, |f| {
            stands |= f.ours().is_some_and(|(cookie, _)| is_guard(&cookie));
        })?;
        if !stands {
            debug!(prio = prio.0, ?what, "no guard");
            return Ok(false);
        }
    }
    Ok(true)
}

fn hardware_guards(hook: &mut Hook, found: &Found, guards: Guards) -> Result<(), NetlinkError> {
    for family in Family::BOTH {
        let prio = found.prios.of(Use::HardwareGuards, family);
        hook.request(|buf, seq, ifindex| {
            guard::flower_ttl(buf, seq, ifindex, prio, family, guards.cookie());
        })?;
    }
    Ok(())
}

fn software_guards(hook: &mut Hook, found: &Found, guards: Guards) -> Result<(), NetlinkError> {
    for family in Family::BOTH {
        let prio = found.prios.of(Use::SoftwareGuards, family);
        for &knode in guard::knodes(family) {
            hook.request(|buf, seq, ifindex| {
                guard::u32(buf, seq, ifindex, prio, family, knode, guards.cookie());
            })?;
        }
    }
    Ok(())
}

/// Tries a rule with every key and action of each family, and takes it away again. Without the
/// programs for NAT, or without `act_bpf`, the port still serves flows without NAT.
fn try_rules(hook: &mut Hook, found: &mut Found, guards: Guards) -> Result<(), BindError> {
    for family in Family::BOTH {
        if let Err(e) = try_rule(hook, found, guards, family, false) {
            let module = name_missing(hook, found, guards, family);
            return Err(missing("flower", e, module));
        }
        if found.nat.is_ok()
            && let Err(e) = try_rule(hook, found, guards, family, true)
        {
            found.nat = Err(format!(
                "the kernel does not take the bpf action (act_bpf: CONFIG_NET_ACT_BPF): {e}"
            ));
        }
    }
    Ok(())
}

fn try_rule(
    hook: &mut Hook,
    found: &Found,
    guards: Guards,
    family: Family,
    nat: bool,
) -> Result<(), NetlinkError> {
    let flow = trial_flow(hook.ifindex, family, nat);
    let prio = found.prios.of(Use::Flows, family);
    let handle = Handle(NonZeroU32::MAX);
    let nat = match (&found.nat, nat) {
        (Ok(programs), true) => {
            let (before, after) = programs.pair(family, L4Proto::Tcp);
            Some(NatForm::Software { before, after })
        }
        _ => None,
    };
    let form = Form { flags: TCA_CLS_FLAGS_SKIP_HW, nat, percpu_stats: found.percpu_stats };
    hook.request(|buf, seq, ifindex| {
        let cookie = guards.cookie();
        rule::add(buf, seq, Place { ifindex, prio, family }, handle, &flow, cookie, form);
        rule::ask_for_ack(buf, 0);
    })?;
    hook.delete(prio, family, handle)
}

/// After a trial rule was refused: which module it is for want of, found by trying its actions one
/// by one.
fn name_missing(hook: &mut Hook, found: &Found, guards: Guards, family: Family) -> &'static str {
    let flow = trial_flow(hook.ifindex, family, false);
    let prio = found.prios.of(Use::Flows, family);
    let handle = Handle(NonZeroU32::MAX);
    let mut refused = Vec::new();
    for action in Action::ALL {
        let tried = hook.request(|buf, seq, ifindex| {
            let (place, flags) = (Place { ifindex, prio, family }, TCA_CLS_FLAGS_SKIP_HW);
            rule::add_with(buf, seq, place, handle, &flow.matches, flags, |m| {
                ActionList::new(m, true).one(&flow, action, &guards.cookie().to_bytes());
            });
            rule::ask_for_ack(buf, 0);
        });
        match tried {
            Ok(()) => {
                if let Err(e) = hook.delete(prio, family, handle) {
                    debug!("removing a trial rule: {e}");
                }
            }
            Err(_) => refused.push(action),
        }
    }
    match refused.as_slice() {
        // Not even with the action that the guards have.
        [Action::Gact, ..] => "cls_flower: CONFIG_NET_CLS_FLOWER",
        [first, ..] => first.module(),
        [] => "all of its parts are there",
    }
}

/// A flow that no packet belongs to: all its addresses and ports are 0.
fn trial_flow(ifindex: Ifindex, family: Family, nat: bool) -> Flow {
    let (zero, other): (IpAddr, IpAddr) = match family {
        Family::Ipv4 => (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::LOCALHOST.into()),
        Family::Ipv6 => (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::LOCALHOST.into()),
    };
    let tuple = |dst, port| {
        #[expect(clippy::expect_used, reason = "both addresses are of one family")]
        Tuple::new(L4Proto::Tcp, zero, 0, dst, port).expect("one family")
    };
    Flow {
        zone: Zone(0),
        direction: Direction::Original,
        ingress_mtu: 0,
        matches: FlowMatch { eth_dst: Some(MacAddr::default()), vlan: None, tuple: tuple(zero, 0) },
        forward: Forward {
            egress: ifindex,
            vlan: None,
            mtu: 0,
            tuple: if nat { tuple(other, 1) } else { tuple(zero, 0) },
            macs: Some(MacRewrite { src: MacAddr::default(), dst: MacAddr::default() }),
        },
    }
}

/// Who has which prio of the ingress hook.
#[derive(Debug, Default)]
struct Occupant {
    kind: String,
    ethertype: u16,
    ours: u32,
    foreign: u32,
    made_qdisc: bool,
    /// Handles of ours, for the case that they stand among foreign ones.
    handles: Vec<u32>,
}

/// What is at the ingress hook once the rules of dead engines are gone.
#[derive(Debug, Default)]
pub(super) struct Cleared {
    /// Rules of dead engines.
    pub(super) removed: u64,
    /// A dead engine made the qdisc: it is ours to remove.
    pub(super) made_qdisc: bool,
    /// Prios of chain 0 that somebody else has, and the kind of classifier there.
    foreign: Vec<(u16, String)>,
}

/// Removes the rules of dead engines.
pub(super) fn clear_leftovers(hook: &mut Hook) -> Result<Cleared, NetlinkError> {
    let mut occupants: BTreeMap<(u32, u16, u16), Occupant> = BTreeMap::new();
    let collect = |occupants: &mut BTreeMap<_, Occupant>, f: super::parse::Filter<'_>| {
        let entry = occupants.entry((f.chain, f.at.prio, f.at.ethertype)).or_default();
        if entry.kind.is_empty() {
            f.kind.clone_into(&mut entry.kind);
            entry.ethertype = f.at.ethertype;
        }
        if !f.is_rule() {
            return;
        }
        match f.ours() {
            Some((cookie, _)) => {
                entry.ours += 1;
                entry.handles.push(f.at.handle);
                entry.made_qdisc |= cookie.epoch == guard::GUARD_AND_QDISC;
            }
            None => entry.foreign += 1,
        }
    };
    for attempt in 1.. {
        occupants.clear();
        match hook.filters(PARENT_INGRESS, |f| collect(&mut occupants, f)) {
            Err(NetlinkError::Interrupted) if attempt < 4 => {}
            Err(e) => return Err(e),
            Ok(()) => break,
        }
    }
    let mut cleared = Cleared::default();
    for ((chain, prio, ethertype), o) in occupants {
        if o.ours == 0 {
            if chain == 0 {
                cleared.foreign.push((prio, o.kind));
            }
            continue;
        }
        cleared.made_qdisc |= o.made_qdisc;
        cleared.removed += u64::from(o.ours);
        info!(prio, rules = o.ours, "removing what a dead engine left");
        let family = Family::of(ethertype == Family::Ipv6.ethertype());
        if o.foreign == 0 {
            hook.delete_all(Prio(prio), family)?;
        } else {
            cleared.foreign.push((prio, o.kind));
            for handle in o.handles.iter().filter_map(|&h| NonZeroU32::new(h).map(Handle)) {
                hook.delete(Prio(prio), family, handle)?;
            }
        }
    }
    Ok(cleared)
}

/// Finds a block of prios that nobody else is at.
fn free_prios(base: u16, foreign: &[(u16, String)]) -> Result<Prios, BindError> {
    let mut prios = Prios::new(base);
    for _ in 0..16 {
        let Some(p) = prios else { break };
        match foreign.iter().find(|(prio, _)| p.contains(*prio)) {
            None => return Ok(p),
            Some((prio, kind)) => {
                debug!(prio, kind, "a prio of ours is taken");
                prios = p.next();
            }
        }
    }
    let who: Vec<String> =
        foreign.iter().map(|(prio, kind)| format!("{kind} at prio {prio}")).collect();
    Err(BindError::Declined(format!("no six free prios from {base} on: {}", who.join(", "))))
}

/// Removes every rule at the prios. Goes on after a failure.
pub(super) fn remove_prios(hook: &mut Hook, prios: Prios) {
    for (_, family, prio) in prios.all() {
        if let Err(e) = hook.delete_all(prio, family) {
            debug!(prio = prio.0, "removing rules after a failed bind: {e}");
        }
    }
}

fn failed(what: &str, e: NetlinkError) -> BindError {
    BindError::Failed(e.into_fault(what))
}

/// Something that the kernel does not have, or another failure.
fn missing(what: &str, e: NetlinkError, modules: &str) -> BindError {
    match e.errno() {
        // ENOENT: "TC classifier not found", "Failed to load TC action module".
        Some(Errno::ENOENT | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::EPROTONOSUPPORT) => {
            BindError::Declined(format!("the kernel does not take a {what} rule ({e}): {modules}"))
        }
        _ => failed(&format!("adding a {what} rule"), e),
    }
}

/// True when the cookie is a guard's.
pub(super) fn is_guard(cookie: &Cookie) -> bool {
    matches!(cookie.epoch, guard::GUARD | guard::GUARD_AND_QDISC)
}
