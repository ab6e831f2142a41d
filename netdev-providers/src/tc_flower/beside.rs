//! Beside other tools: a qdisc that they remove, one that they make in its place, filters that they put in
//! front.
//!
//! A shaper that starts removes the ingress qdisc of the netdev, whoever made it, and makes its own a few
//! milliseconds later, which it cannot where there is one. So who removed ours is given time for that
//! ([`STAND_ASIDE`]); what comes in its place is used and never removed, and when nothing comes, ours does.
//! Meanwhile nothing is offloaded, and packets take the slow path.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::found::Guards;
use super::hook::{Hook, QdiscKind};
use super::plan::{Around, Plan, lock};
use super::prios::Use;
use super::probe;
use super::watch::Standing;
use super::writer::Writer;
use crate::contract::reason::{Reason, Rejection};
use crate::netlink::error::NetlinkError;
use crate::netlink::front::in_front;

/// How long nothing is made where somebody has removed our qdisc.
pub(super) const STAND_ASIDE: Duration = Duration::from_secs(2);

impl Writer {
    /// Hears what others have done since the last time.
    pub(super) fn hear(&mut self, plan: &Plan) {
        let seen = self.watch.seen();
        // A qdisc that nobody has removed has our guards; of one that has none it is not known whose it is.
        let mut stands = || probe::guards_stand(&mut self.hook, &plan.found).unwrap_or(false);
        if seen.qdisc_removed || (seen.lost && !stands()) {
            self.taken_away(plan);
        } else if seen.guards_suspect && self.standing == Standing::Firm {
            self.standing = Standing::Suspect;
        }
        if let Some(prio) = seen.egress
            && self.qdisc_is(QdiscKind::Ingress, plan)
        {
            warn!(
                ifindex = %self.hook.ifindex, prio,
                "somebody added a filter for egress, and the qdisc that we made has only an ingress hook: it is among the filters of ingress; `[tc-flower] qdisc = \"clsact\"` is for such tools"
            );
        }
        if seen.front {
            self.look_in_front(plan);
        }
    }

    fn qdisc_is(&self, kind: QdiscKind, plan: &Plan) -> bool {
        self.made_qdisc
            && lock(&plan.around.qdisc).as_ref().is_some_and(|(name, _)| name == kind.name())
    }

    /// Whether the guards stand, in the eyes of somebody else.
    pub(super) fn suspect(&mut self) {
        if self.standing == Standing::Firm {
            self.standing = Standing::Suspect;
        }
    }

    /// Somebody has removed the qdisc, and all rules with it. Not called while a batch is under way.
    fn taken_away(&mut self, plan: &Plan) {
        let rules: u32 = self.handles.iter_mut().map(|h| h.give_all_back()).sum();
        self.left.clear();
        self.observed.clear();
        self.unsettled.clear();
        lock(&self.adopted).clear();
        self.made_qdisc = false;
        *lock(&plan.around.qdisc) = None;
        self.rules_gone = true;
        if !matches!(self.standing, Standing::Aside(_)) {
            self.standing = Standing::Aside(Instant::now());
        }
        warn!(ifindex = %self.hook.ifindex, rules, "somebody removed the ingress qdisc of the port");
    }

    /// Sees to it that the guards stand.
    ///
    /// # Errors
    /// When nothing can be added at present: what is told of an add.
    pub(super) fn settle_down(&mut self, plan: &Plan) -> Result<(), Rejection> {
        if self.standing == Standing::Firm {
            return Ok(());
        }
        let busy = |why: &str| Err(Rejection::with_detail(Reason::Busy, why));
        let cannot = "the guards of the port were removed and cannot be put up again";
        let qdisc = match self.hook.qdisc() {
            Ok(qdisc) => qdisc,
            Err(e) => {
                warn!(ifindex = %self.hook.ifindex, "reading the ingress qdisc: {e}");
                return busy(cannot);
            }
        };
        if let Some(q) = &qdisc
            && (q.shared_block.is_some() || QdiscKind::named(&q.kind).is_none())
        {
            return busy("somebody made an ingress qdisc that rules cannot be added to");
        }
        if qdisc.is_none() {
            let Standing::Aside(since) = self.standing else {
                // It was not heard of.
                self.taken_away(plan);
                return self.settle_down(plan);
            };
            if since.elapsed() < STAND_ASIDE {
                return busy(
                    "somebody removed the ingress qdisc of the port, and is given time to make another",
                );
            }
        }
        match self.put_up(plan, qdisc.is_none()) {
            Ok(()) => {
                self.standing = Standing::Firm;
                Ok(())
            }
            Err(e) => {
                warn!(ifindex = %self.hook.ifindex, "putting up the guards: {e}");
                busy(cannot)
            }
        }
    }

    /// The guards are removed first, so that none stands twice.
    fn put_up(&mut self, plan: &Plan, make: bool) -> Result<(), NetlinkError> {
        let Self { hook, .. } = self;
        if make && hook.add_qdisc(plan.qdisc)? {
            self.made_qdisc = true;
        }
        for (what, family, prio) in plan.found.prios.all() {
            if what != Use::Flows {
                hook.delete_all(prio, family)?;
            }
        }
        let guards = Guards { instance: plan.instance, made_qdisc: self.made_qdisc };
        probe::put_up_guards(hook, &plan.found, guards)?;
        self.tags_off = plan.found.tags;
        let kind = hook.qdisc()?.map(|q| q.kind).unwrap_or_default();
        let whose = if self.made_qdisc { "ours" } else { "somebody else's" };
        info!(ifindex = %hook.ifindex, qdisc = kind, whose, "the guards of the port stand again");
        *lock(&plan.around.qdisc) = Some((kind, self.made_qdisc));
        Ok(())
    }

    /// Reads who is in front. Rules that the NIC has and that would be in front of them are removed.
    pub(super) fn look_in_front(&mut self, plan: &Plan) {
        let front = match in_front(self.hook.ifindex, plan.found.prios.first()) {
            Ok(front) => front,
            Err(e) => {
                info!(ifindex = %self.hook.ifindex, "who is in front of the rules: {e}");
                return;
            }
        };
        let overtaken = plan.found.mode.has_hardware() && Around::would_overtake(&front);
        let names: Vec<_> = front.iter().map(|f| f.what.as_str()).collect();
        if front != plan.around.front() {
            info!(ifindex = %self.hook.ifindex, ?names, "in front of the rules");
        }
        if overtaken != plan.around.is_overtaken() {
            let what = if overtaken { "rules leave the NIC" } else { "the NIC takes rules again" };
            warn!(ifindex = %self.hook.ifindex, ?names, "{what}: of who is in front");
            plan.around.set_overtaken(overtaken);
            if let Err(fault) = self.flush(plan) {
                warn!(ifindex = %self.hook.ifindex, "{fault}");
            }
            // Those that could not be removed, the engine's flush goes on with.
            self.rules_gone = true;
        }
        plan.around.set_front(front);
    }
}

/// Who is in front when the port is bound.
pub(super) fn look_first(hook: &Hook, plan: &Plan) -> Result<(), NetlinkError> {
    let front = in_front(hook.ifindex, plan.found.prios.first())?;
    let overtaken = plan.found.mode.has_hardware() && Around::would_overtake(&front);
    plan.around.set_overtaken(overtaken);
    plan.around.set_front(front);
    Ok(())
}
