//! What bind does on a netdev: makes the ingress hook, has what a dead engine left sorted out, puts up the
//! guards and tries a rule. Whatever it made is taken away again when it fails.

use std::num::NonZeroU32;
use std::sync::Arc;

use nix::errno::Errno;
use tracing::debug;

use super::actions::{Action, ActionList, NatForm};
use super::bpf::Programs;
use super::capability::{Capabilities, Shape, trial_flow};
use super::found::{Found, Guards, Mode};
use super::guard::{self, is_guard};
use super::hook::{Hook, QdiscKind};
use super::occupants::{Left, Occupants, clear};
use super::prios::{Prios, Use};
use super::rule::{self, Form, Place};
use super::uapi::*;
use crate::contract::class::BindError;
use crate::contract::flow::{Flow, FlowMatch, Forward};
use crate::contract::types::{HwFlags, Instance, L4Proto, VlanId};
use crate::netlink::error::NetlinkError;
use crate::netlink::modules::Lacking;

/// What bind is to find out.
pub(super) struct Wanted<'a> {
    pub(super) instance: Instance,
    pub(super) hw_flags: HwFlags,
    pub(super) prio_base: u16,
    /// What is made where there is none.
    pub(super) qdisc: QdiscKind,
    pub(super) percpu_stats: bool,
    pub(super) programs: &'a dyn Fn() -> Result<Arc<Programs>, String>,
    /// Only if the NIC carries rules; and whether the kernel was found to lack flower.
    pub(super) in_hardware: Option<&'a Lacking>,
}

/// Probes the netdev and prepares it.
pub(super) fn bind(
    hook: &mut Hook,
    wanted: &Wanted<'_>,
) -> Result<(Found, Capabilities), BindError> {
    let hardware_type = hook.hardware_type().map_err(|e| failed("reading the link", e))?;
    if hardware_type != ARPHRD_ETHER {
        return Err(BindError::Declined(format!(
            "not an Ethernet netdev (hardware type {hardware_type})"
        )));
    }
    let mut made_qdisc = hook.add_qdisc(wanted.qdisc).map_err(|e| match e.errno() {
        // The kind is looked up by name first, then its module is asked for.
        Some(Errno::ENOENT | Errno::EOPNOTSUPP) => BindError::Declined(format!(
            "the kernel has no {} qdisc (sch_ingress: CONFIG_NET_SCH_INGRESS): {e}",
            wanted.qdisc.name()
        )),
        _ => failed("adding the ingress qdisc", e),
    })?;
    match prepare(hook, wanted, &mut made_qdisc) {
        Ok(prepared) => Ok(prepared),
        Err((e, prios)) => {
            if let Some(prios) = prios {
                remove_prios(hook, prios);
            }
            if made_qdisc && let Err(e) = hook.delete_unused_qdisc() {
                debug!("removing the ingress qdisc after a failed bind: {e}");
            }
            Err(e)
        }
    }
}

/// The error, and the prios that something may stand at.
type Undo = (BindError, Option<Prios>);

fn prepare(
    hook: &mut Hook,
    wanted: &Wanted<'_>,
    made_qdisc: &mut bool,
) -> Result<(Found, Capabilities), Undo> {
    let qdisc = hook
        .qdisc()
        .map_err(|e| (failed("reading the ingress qdisc", e), None))?
        .ok_or_else(|| (BindError::Declined("the ingress qdisc is gone again".into()), None))?;
    if let Some(block) = qdisc.shared_block {
        return Err((
            BindError::Declined(format!("its ingress filters are in shared block {block}")),
            None,
        ));
    }
    if QdiscKind::named(&qdisc.kind).is_none() {
        return Err((BindError::Declined(format!("its ingress qdisc is {}", qdisc.kind)), None));
    }
    let occupants =
        Occupants::read(hook).map_err(|e| (failed("reading the ingress filters", e), None))?;
    *made_qdisc |= occupants.made_qdisc();
    let prios = match free_prios(wanted.prio_base, &occupants.foreign()) {
        Ok(prios) => prios,
        Err(e) => {
            // There will be no port here: nothing of a dead engine is to stay.
            let _ = clear(hook, occupants, None);
            return Err((e, None));
        }
    };
    let mut found = Found {
        prios,
        mode: Mode::Hardware,
        no_hardware: None,
        qdisc_kind: qdisc.kind,
        made_qdisc: *made_qdisc,
        percpu_stats: wanted.percpu_stats,
        programs: Err("not loaded yet".into()),
        act_bpf: Ok(()),
        left: Vec::new(),
        vlan: Ok(()),
        tagged_in_hw: false,
        length: Ok(()),
        tags: true,
    };
    if let Some(lacking) = wanted.in_hardware {
        // Nothing of a dead engine has been touched so far: another class may be asked next, or this one again.
        is_carried(hook, wanted, &found, &occupants, lacking).map_err(|e| (e, None))?;
    }
    let (left, _) = clear(hook, occupants, Some(prios))
        .map_err(|e| (failed("removing what a dead engine left", e), Some(prios)))?;
    found.mode = Mode::Software;
    found.left.clone_from(&left.flows);
    found.programs = (wanted.programs)();
    let taken = install(hook, wanted, &mut found, &left).map_err(|e| (e, Some(prios)))?;
    Ok((found, taken))
}

/// Whether the NIC carries rules: the guard of untagged frames, and a flow's of some shape. Leaves everything as it was.
fn is_carried(
    hook: &mut Hook,
    wanted: &Wanted<'_>,
    found: &Found,
    occupants: &Occupants,
    lacking: &Lacking,
) -> Result<(), BindError> {
    let guards = Guards { instance: wanted.instance, made_qdisc: found.made_qdisc };
    let family = Family::Ipv4;
    let prio = found.prios.of(Use::HardwareGuards, family);
    // That of a dead engine is one that the NIC has taken.
    if !occupants.has_ours_at(prio) {
        hook.request_unless_lacking(lacking, |buf, seq, ifindex| {
            guard::flower_ttl(buf, seq, ifindex, prio, family, guards.cookie());
        })
        .map_err(|e| BindError::Declined(format!("the NIC does not take the TTL guard: {e}")))?;
        hook.delete_all(prio, family).map_err(|e| failed("removing a trial rule", e))?;
    }
    Capabilities::carried(hook, found, guards)
        .map_err(|e| failed("trying a rule in the NIC", e))?
        .map_err(|e| BindError::Declined(format!("the NIC does not take a rule for a flow: {e}")))
}

/// Guards and trial rules, which tell what the netdev takes. The guards of a dead engine stand until ours do.
fn install(
    hook: &mut Hook,
    wanted: &Wanted<'_>,
    found: &mut Found,
    left: &Left,
) -> Result<Capabilities, BindError> {
    let guards = Guards { instance: wanted.instance, made_qdisc: found.made_qdisc };
    if wanted.hw_flags != HwFlags::SkipHw {
        match hardware_guards(hook, found, guards, left, Family::UNTAGGED) {
            Ok(()) => {
                let only = wanted.hw_flags == HwFlags::SkipSw;
                found.mode = if only { Mode::Hardware } else { Mode::Both };
                tagged_hardware_guards(hook, found, guards, left);
            }
            Err(e) if wanted.hw_flags == HwFlags::SkipSw => {
                return Err(BindError::Declined(format!(
                    "hardware only (skip_sw), and the NIC does not take the TTL guard: {e}"
                )));
            }
            Err(e) => {
                take_down(hook, found, Use::HardwareGuards, Family::UNTAGGED);
                found.no_hardware = Some(e.to_string());
            }
        }
    }
    if found.mode.has_software() {
        let programs = found.programs.as_ref().map_err(|e| BindError::Declined(e.clone()))?;
        software_guards(hook, found, programs, guards, Family::UNTAGGED).map_err(|e| {
            // "TC classifier not found", or "Failed to load TC action module".
            let module = if e.to_string().contains("action") {
                Action::Gact.module()
            } else {
                "cls_bpf: CONFIG_NET_CLS_BPF"
            };
            missing("bpf", e, module)
        })?;
        try_rules(hook, found, guards)?;
        tagged_software_guards(hook, found, guards);
        if let Err(e) = priority_tags(hook, found, guards) {
            debug!("priority tags are not taken off: {e}");
            found.tags = false;
        }
    } else {
        found.length = Err("a length is told apart in software only (skip_sw)".into());
        found.tags = false;
    }
    let taken = Capabilities::find(hook, found, guards)
        .map_err(|e| failed("finding out which rules the netdev takes", e))?;
    for (what, family, prio, handles) in &left.guards {
        let cleared = match what {
            _ if !found.has_guards_at(*what, *family) => hook.delete_all(*prio, *family),
            Use::SoftwareGuards => handles
                .iter()
                .try_for_each(|&h| hook.delete_of_kind(*prio, *family, h, guard::kind(*what))),
            _ => Ok(()),
        };
        cleared.map_err(|e| failed("removing the guards of a dead engine", e))?;
    }
    Ok(taken)
}

fn take_down(hook: &mut Hook, found: &Found, what: Use, families: [Family; 2]) {
    for family in families {
        if let Err(e) = hook.delete_all(found.prios.of(what, family), family) {
            debug!("removing guards: {e}");
        }
    }
}

/// A NIC that takes the guard for untagged frames only serves flows that arrive untagged.
fn tagged_hardware_guards(hook: &mut Hook, found: &mut Found, guards: Guards, left: &Left) {
    match hardware_guards(hook, found, guards, left, Family::TAGGED) {
        Ok(()) => found.tagged_in_hw = true,
        Err(e) => {
            take_down(hook, found, Use::HardwareGuards, Family::TAGGED);
            if !found.mode.has_software() {
                found.vlan =
                    Err(format!("the NIC does not take the TTL guard for tagged frames: {e}"));
            }
        }
    }
}

/// Without `act_vlan` the port still serves flows without tags.
fn tagged_software_guards(hook: &mut Hook, found: &mut Found, guards: Guards) {
    if found.vlan.is_err() {
        return;
    }
    let Ok(programs) = found.programs.clone() else { return };
    if let Err(e) = software_guards(hook, found, &programs, guards, Family::TAGGED) {
        take_down(hook, found, Use::SoftwareGuards, Family::TAGGED);
        found.vlan = Err(format!("the kernel does not take a guard for tagged frames: {e}"));
    }
}

/// Has priority tags taken off where they are to be, and nowhere else. Whether they are now.
pub(super) fn priority_tags(
    hook: &mut Hook,
    found: &Found,
    guards: Guards,
) -> Result<bool, NetlinkError> {
    let prio = found.prios.tags();
    hook.delete_all(prio, Family::TaggedIpv4)?;
    let (true, Ok(programs)) = (found.tags, &found.programs) else { return Ok(false) };
    if found.vlan.is_err() || hook.has_vlan_0_above()? {
        return Ok(false);
    }
    hook.request(|buf, seq, ifindex| {
        guard::priority_tags(buf, seq, ifindex, prio, programs.tags(), guards.cookie());
    })?;
    Ok(true)
}

/// Puts up all the guards of a port.
pub(super) fn put_up_guards(
    hook: &mut Hook,
    found: &Found,
    guards: Guards,
) -> Result<(), NetlinkError> {
    priority_tags(hook, found, guards)?;
    let none = Left::default();
    hardware_guards(hook, found, guards, &none, found.guarded(Use::HardwareGuards))?;
    let Ok(programs) = &found.programs else { return Ok(()) };
    software_guards(hook, found, programs, guards, found.guarded(Use::SoftwareGuards))
}

/// Gives the NIC the guards that it should have, whether or not it has them.
pub(super) fn renew_hardware_guards(
    hook: &mut Hook,
    found: &Found,
    guards: Guards,
) -> Result<(), NetlinkError> {
    let families = found.guarded(Use::HardwareGuards);
    hardware_guards(hook, found, guards, &Left::default(), families)
}

/// True when every prio that should have guards has one.
pub(super) fn guards_stand(hook: &mut Hook, found: &Found) -> Result<bool, NetlinkError> {
    let guarded = |&(what, family, _): &_| found.has_guards_at(what, family);
    for (what, family, prio) in found.prios.all().filter(guarded) {
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

/// A guard that a dead engine left is the one that would be put up, and stays.
fn hardware_guards(
    hook: &mut Hook,
    found: &Found,
    guards: Guards,
    left: &Left,
    families: impl IntoIterator<Item = Family>,
) -> Result<(), NetlinkError> {
    for family in families {
        let prio = found.prios.of(Use::HardwareGuards, family);
        if !left.guards_at(prio).is_empty() {
            continue;
        }
        hook.request(|buf, seq, ifindex| {
            guard::flower_ttl(buf, seq, ifindex, prio, family, guards.cookie());
        })?;
    }
    Ok(())
}

fn software_guards(
    hook: &mut Hook,
    found: &Found,
    programs: &Programs,
    guards: Guards,
    families: impl IntoIterator<Item = Family>,
) -> Result<(), NetlinkError> {
    for family in families {
        let prio = found.prios.of(Use::SoftwareGuards, family);
        hook.request(|buf, seq, ifindex| {
            let program = programs.inspect(family);
            guard::software(buf, seq, ifindex, prio, family, program, guards.cookie());
        })?;
    }
    Ok(())
}

/// Tries a rule with every key and action of each family, and takes it away again. Without
/// `act_bpf`, `act_vlan` or `act_police`, the port still serves the flows that do not need them.
fn try_rules(hook: &mut Hook, found: &mut Found, guards: Guards) -> Result<(), BindError> {
    for family in Family::UNTAGGED {
        let trial = |nat| trial_flow(hook.ifindex, Shape::new(family.is_ipv6(), L4Proto::Tcp, nat));
        let (plain, translated) = (trial(false), trial(true));
        if let Err(e) = try_rule(hook, found, guards, &plain) {
            let module = name_missing(hook, found, guards, family);
            return Err(missing("flower", e, module));
        }
        if found.act_bpf.is_ok()
            && let Err(e) = try_rule(hook, found, guards, &translated)
        {
            found.act_bpf = Err(format!(
                "the kernel does not take the bpf action (act_bpf: CONFIG_NET_ACT_BPF): {e}"
            ));
        }
        let refused = |what: &str, action: Action, e| {
            Err(format!("the kernel does not take {what} ({}): {e}", action.module()))
        };
        if found.length.is_ok()
            && let Err(e) = try_rule(hook, found, guards, &Flow { ingress_mtu: 1, ..plain })
        {
            found.length = refused("a check of the length", Action::Police, e);
        }
        if found.vlan.is_ok()
            && let Err(e) = try_rule(hook, found, guards, &tagged(plain))
        {
            found.vlan = refused("a rule for tagged frames", Action::Vlan, e);
        }
    }
    Ok(())
}

fn try_rule(
    hook: &mut Hook,
    found: &Found,
    guards: Guards,
    flow: &Flow,
) -> Result<(), NetlinkError> {
    let family = Family::of(&flow.matches);
    let prio = found.prios.of(Use::Flows, family);
    let handle = Handle(NonZeroU32::MAX);
    // Those without NAT are tried without programs, so that what else is missing is told apart.
    let (nat, header) = match &found.programs {
        Ok(programs) if flow.has_nat() => {
            let (before, after) = programs.nat(family, L4Proto::Tcp);
            let header = flow.is_routed_ipv4().then(|| programs.header());
            (Some(NatForm::Software { before, after }), header)
        }
        _ => (None, None),
    };
    let form = Form {
        flags: TCA_CLS_FLAGS_SKIP_HW,
        nat,
        header,
        percpu_stats: found.percpu_stats(TCA_CLS_FLAGS_SKIP_HW),
    };
    hook.request(|buf, seq, ifindex| {
        let cookie = guards.cookie();
        rule::add(buf, seq, Place { ifindex, prio, family }, handle, flow, cookie, form);
        rule::ask_for_ack(buf, 0);
    })?;
    hook.delete(prio, family, handle)
}

/// After a trial rule was refused: which module it is for want of, found by trying its actions one
/// by one.
fn name_missing(hook: &mut Hook, found: &Found, guards: Guards, family: Family) -> &'static str {
    let flow = trial_flow(hook.ifindex, Shape::new(family.is_ipv6(), L4Proto::Tcp, false));
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

/// The same with a tag on arrival and on departure.
fn tagged(flow: Flow) -> Flow {
    let vlan = VlanId::new(1);
    Flow {
        matches: FlowMatch { vlan, ..flow.matches },
        forward: Forward { vlan, ..flow.forward },
        ..flow
    }
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
    Err(BindError::Declined(format!(
        "no {} free prios in a row from {base} on: {}",
        Prios::COUNT,
        who.join(", ")
    )))
}

/// Removes every rule at the prios. Goes on after a failure.
pub(super) fn remove_prios(hook: &mut Hook, prios: Prios) {
    if let Err(e) = hook.delete_all(prios.tags(), Family::TaggedIpv4) {
        debug!("removing what takes priority tags off: {e}");
    }
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
