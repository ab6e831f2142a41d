//! What stands at the ingress hook when a port is bound: other people's filters, and what engines that
//! died have left, which is kept where this port's rules will stand and removed elsewhere.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use tracing::info;

use super::guard::{self, is_guard};
use super::handles::MAX_OCCUPIED;
use super::hook::Hook;
use super::prios::{Prios, Use};
use super::rule;
use super::uapi::*;
use crate::contract::types::RuleId;
use crate::netlink::error::NetlinkError;

/// Who has which prio of the ingress hook.
#[derive(Debug, Default)]
struct Occupant {
    kind: String,
    foreign: u32,
    made_qdisc: bool,
    /// Handles of ours, and whether each is a guard's.
    ours: Vec<(u32, bool)>,
}

/// What stands at the ingress hook, by chain, prio and ethertype.
#[derive(Debug, Default)]
pub(super) struct Occupants(BTreeMap<(u32, u16, u16), Occupant>);

impl Occupants {
    pub(super) fn read(hook: &mut Hook) -> Result<Self, NetlinkError> {
        let mut occupants = Self::default();
        hook.repeated(
            &mut occupants,
            |o| o.0.clear(),
            |hook, o| {
                hook.filters(PARENT_INGRESS, |f| {
                    let entry = o.0.entry((f.chain, f.at.prio, f.at.ethertype)).or_default();
                    if entry.kind.is_empty() {
                        f.kind.clone_into(&mut entry.kind);
                    }
                    if !f.is_rule() {
                        return;
                    }
                    match f.ours() {
                        Some((cookie, _)) => {
                            entry.ours.push((f.at.handle, is_guard(&cookie)));
                            entry.made_qdisc |= cookie.epoch == guard::GUARD_AND_QDISC;
                        }
                        None => entry.foreign += 1,
                    }
                })
            },
        )?;
        Ok(occupants)
    }

    /// Prios of chain 0 that somebody else has (also), and the kind of classifier there.
    pub(super) fn foreign(&self) -> Vec<(u16, String)> {
        self.0
            .iter()
            .filter(|((chain, ..), o)| *chain == 0 && (o.foreign > 0 || o.ours.is_empty()))
            .map(|(&(_, prio, _), o)| (prio, o.kind.clone()))
            .collect()
    }

    /// A dead engine has left something.
    pub(super) fn has_ours(&self) -> bool {
        self.0.values().any(|o| !o.ours.is_empty())
    }

    /// A dead engine has left something at this prio.
    pub(super) fn has_ours_at(&self, prio: Prio) -> bool {
        self.0.iter().any(|((chain, p, _), o)| *chain == 0 && *p == prio.0 && !o.ours.is_empty())
    }

    /// A dead engine made the qdisc: it is ours to remove.
    pub(super) fn made_qdisc(&self) -> bool {
        self.0.values().any(|o| o.made_qdisc)
    }
}

/// What dead engines have left at the prios that are ours now.
#[derive(Debug, Default)]
pub(super) struct Left {
    pub(super) guards: Vec<(Use, Family, Prio, Vec<Handle>)>,
    pub(super) flows: Vec<RuleId>,
}

impl Left {
    pub(super) fn guards_at(&self, prio: Prio) -> &[Handle] {
        self.guards.iter().find(|(.., p, _)| *p == prio).map_or(&[], |(.., handles)| handles)
    }
}

/// What was removed.
#[derive(Debug, Default)]
pub(super) struct Cleared {
    /// Rules of dead engines.
    pub(super) removed: u64,
    /// A dead engine made the qdisc: it is ours to remove.
    pub(super) made_qdisc: bool,
}

/// Removes the rules of dead engines.
pub(super) fn clear_leftovers(hook: &mut Hook) -> Result<Cleared, NetlinkError> {
    let occupants = Occupants::read(hook)?;
    let made_qdisc = occupants.made_qdisc();
    let (_, removed) = clear(hook, occupants, None)?;
    Ok(Cleared { removed, made_qdisc })
}

/// Removes the rules of dead engines, but for those that stand where the rules of this port will;
/// returns how many it removed.
pub(super) fn clear(
    hook: &mut Hook,
    occupants: Occupants,
    keep: Option<Prios>,
) -> Result<(Left, u64), NetlinkError> {
    let (mut left, mut removed) = (Left::default(), 0);
    for ((chain, prio, ethertype), o) in occupants.0 {
        if o.ours.is_empty() {
            continue;
        }
        let prio = Prio(prio);
        // What takes priority tags off is put there anew.
        if chain == 0 && o.foreign == 0 && keep.is_some_and(|p| p.tags() == prio) {
            continue;
        }
        // A delete names no more of the family than the ethertype.
        let fits = |f: &Family| f.ethertype() == ethertype;
        let at = keep.and_then(|p| p.all().find(|&(_, f, at)| at == prio && fits(&f)));
        let family = at.map(|(_, f, _)| f).or_else(|| Family::ALL.into_iter().find(fits));
        let Some(family) = family else { continue };
        let what = keep
            .filter(|_| chain == 0 && o.foreign == 0)
            .and_then(|prios| prios.all().find(|&(_, f, p)| (f, p) == (family, prio)));
        let handle = |h: u32| NonZeroU32::new(h).map(Handle);
        match what {
            Some((Use::Flows, ..)) if o.kind == "flower" => {
                for (h, is_guard) in o.ours {
                    let Some(h) = handle(h) else { continue };
                    // The cookie of a guard is on a trial rule.
                    if is_guard || h.0.get() > MAX_OCCUPIED {
                        removed += 1;
                        hook.delete(prio, family, h)?;
                    } else {
                        left.flows.push(rule::rule_id(prio, h));
                    }
                }
            }
            // Of another kind of classifier than ours nothing can stand there beside ours: guards of
            // another version fall before ours stand.
            Some((what @ (Use::HardwareGuards | Use::SoftwareGuards), ..))
                if o.kind == guard::kind(what) =>
            {
                let handles = o.ours.iter().filter_map(|&(h, _)| handle(h)).collect();
                left.guards.push((what, family, prio, handles));
            }
            _ => {
                removed += o.ours.len() as u64;
                if o.foreign == 0 {
                    hook.delete_all(prio, family)?;
                    continue;
                }
                for h in o.ours.iter().filter_map(|&(h, _)| handle(h)) {
                    hook.delete_of_kind(prio, family, h, &o.kind)?;
                }
            }
        }
    }
    if removed > 0 {
        info!(rules = removed, "removed what a dead engine left");
    }
    if !left.flows.is_empty() {
        info!(rules = left.flows.len(), "a dead engine has left rules, which go on forwarding");
    }
    Ok((left, removed))
}
