//! What concerns a port's rules as a whole: those that a dead engine left, guards that somebody
//! removed, the flush, the end.

use std::num::NonZeroU32;

use nix::errno::Errno;
use tracing::warn;

use super::found::Guards;
use super::guard;
use super::parse::Filter;
use super::plan::{Plan, lock};
use super::prios::Use;
use super::probe;
use super::rule::{self, rule_id, split_rule_id};
use super::same::{self, Signature};
use super::uapi::*;
use super::watch::Standing;
use super::writer::Writer;
use crate::contract::flow::Flow;
use crate::contract::provider::{Fault, Leftover, Observed};
use crate::contract::types::Cookie;
use crate::netlink::error::NetlinkError;

impl Writer {
    /// Reads what stands beside our own rules.
    pub(super) fn observe(&mut self, plan: &Plan) -> Result<Observed, Fault> {
        let Self { hook, handles, left, .. } = self;
        let mut seen = (Observed::default(), Vec::new());
        let read = |f: Filter<'_>, seen: &mut (Observed, Vec<_>)| {
            if !f.is_rule() {
                return;
            }
            let Some((cookie, counters)) = f.ours() else {
                seen.0.foreign += 1;
                return;
            };
            let Some(handle) = f.at.handle.try_into().ok().map(Handle) else { return };
            let Some(family) = plan.found.prios.flows_at(Prio(f.at.prio)).filter(|_| f.chain == 0)
            else {
                return;
            };
            let rule = rule_id(Prio(f.at.prio), handle);
            let held = handles[family.index()].is_taken(handle) && !left.contains(&rule);
            if !held && !guard::is_guard(&cookie) {
                let options = f.options();
                let tuple = same::tuple_of(&options);
                seen.0.leftovers.push(Leftover { rule, cookie, tuple, counters });
                let what = (Signature::of_dump(options), f.in_hw());
                seen.1.push((rule, what, family, handle, tuple));
            }
        };
        hook.repeated(
            &mut seen,
            |seen| *seen = Default::default(),
            |hook, seen| hook.filters(PARENT_INGRESS, |f| read(f, seen)),
        )
        .map_err(|e| e.into_fault("reading what stands on the netdev"))?;
        let (found, rules) = seen;
        self.observed.clear();
        for (rule, what, family, handle, tuple) in rules {
            self.handles(family).occupy(handle);
            // Its delete stays in order with what is added for the same packets.
            if let Some(lane) = tuple.map(|t| self.lane_of(&t)) {
                self.handles(family).assign(handle, lane);
            }
            self.left.insert(rule);
            self.observed.insert(rule, what);
        }
        Ok(found)
    }

    /// Whether a rule that stands is what an add of this flow would make, in one of the forms that
    /// it can end up in.
    pub(super) fn would_be(
        &self,
        plan: &Plan,
        flow: &Flow,
        cookie: Cookie,
        stands: Signature,
    ) -> bool {
        if plan.can_offload(flow).is_err() {
            return false;
        }
        let place = self.place(plan, Family::of(&flow.matches));
        [plan.is_for_software(flow), true].into_iter().any(|software| {
            let mut buf = Vec::new();
            let form = plan.form(flow, software);
            rule::add(&mut buf, 0, place, Handle(NonZeroU32::MIN), flow, cookie, form);
            Signature::of_message(&buf, &same::program_tag) == Some(stands)
        })
    }

    /// A VLAN device with the number 0 may have come, or gone.
    pub(super) fn look_for_vlan_0(&mut self, plan: &Plan) {
        if self.standing != Standing::Firm || !plan.found.tags {
            return;
        }
        let guards = Guards { instance: plan.instance, made_qdisc: self.made_qdisc };
        let looked = self.hook.has_vlan_0_above().and_then(|above| {
            if above == self.tags_off {
                self.tags_off = probe::priority_tags(&mut self.hook, &plan.found, guards)?;
            }
            Ok(())
        });
        if let Err(e) = looked {
            warn!(ifindex = %self.hook.ifindex, "priority tags: {e}");
        }
    }

    /// Gives the NIC its guards anew.
    pub(super) fn renew_guards(&mut self, plan: &Plan) -> bool {
        let guards = Guards { instance: plan.instance, made_qdisc: self.made_qdisc };
        probe::renew_hardware_guards(&mut self.hook, &plan.found, guards)
            .inspect_err(
                |e| warn!(ifindex = %self.hook.ifindex, "giving the NIC its guards anew: {e}"),
            )
            .is_ok()
    }

    pub(super) fn flush(&mut self, plan: &Plan) -> Result<u64, Fault> {
        let mut count = 0;
        let mut result = Ok(());
        for family in Family::ALL {
            // A prio that we have nothing at may be somebody else's by now.
            if self.handles(family).live() == 0 {
                continue;
            }
            let prio = plan.found.prios.of(Use::Flows, family);
            match self.hook.delete_all(prio, family) {
                Ok(()) => {
                    self.unsettled.retain(|(place, _)| place.family != family);
                    let left = self.left.len();
                    self.left.retain(|&r| split_rule_id(r).is_none_or(|(p, _)| p != prio));
                    self.observed.retain(|&r, _| split_rule_id(r).is_none_or(|(p, _)| p != prio));
                    lock(&self.adopted)
                        .retain(|&r, _| split_rule_id(r).is_none_or(|(p, _)| p != prio));
                    count += u64::from(self.handles(family).give_all_back());
                    // Nobody has been told of these.
                    count -= (left - self.left.len()) as u64;
                }
                Err(e) => result = Err(e.into_fault("removing the rules of the port")),
            }
        }
        result.map(|()| count)
    }

    pub(super) fn release(&mut self, plan: &Plan) -> Result<(), Fault> {
        self.hear(plan);
        let mut result = self.flush(plan).map(drop);
        let mut note = |r: Result<(), NetlinkError>, what: &str| {
            if let Err(e) = r
                && e.errno() != Some(Errno::ENODEV)
                && result.is_ok()
            {
                result = Err(e.into_fault(what));
            }
        };
        note(
            self.hook.delete_all(plan.found.prios.tags(), Family::TaggedIpv4),
            "removing what takes priority tags off",
        );
        for (what, family, prio) in plan.found.prios.all() {
            if plan.found.has_guards_at(what, family) {
                note(self.hook.delete_all(prio, family), "removing the guards of the port");
            }
        }
        if self.made_qdisc {
            note(self.hook.delete_unused_qdisc(), "removing the ingress qdisc");
        }
        result
    }
}
