//! The writer of a port: from a batch of operations to their results, through one or several lanes.
//!
//! A port's rules are written through several sockets at once, its **lanes**: the kernel works on rules
//! of one netdev in parallel (`cls_flower` takes no RTNL). Which lane an operation goes through
//! is told by the tuple that the rule matches, so operations of one match stay in order: the lane of a
//! rule is remembered with its handle, for its delete. A batch is dealt out, its lanes run side by side
//! on this thread and on such of the class as are there, and the batch is over when the last of them is: so nobody but the
//! thread that submits ever has to do with anything but one lane.
//!
//! The deletes of a batch go first, and its adds when they are done: a NIC that is full has room for a rule
//! only when the one that gives way is gone, and that may be another lane's.

use std::collections::hash_map::DefaultHasher;
use std::collections::{HashMap, HashSet};
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex};

use tracing::warn;

use super::handles::{Handles, LaneNumber};
use super::hook::Hook;
use super::lane::{Lane, Pending, What, added};
use super::plan::{Plan, lock};
use super::prios::Use;
use super::rule::{Place, rule_id, split_rule_id};
use super::same::Signature;
use super::threads::{Helpers, Threads};
use super::uapi::*;
use super::watch::{Standing, Watch};
use crate::contract::flow::{Flow, Tracked};
use crate::contract::operation::{Done, Operation, Outcome, Request, Ticket};
use crate::contract::reason::{Reason, Rejection};
use crate::contract::types::{Cookie, RuleId, Tuple};

/// Rules that a dead engine wrote and that are ours now, by what the engine calls them: in the
/// kernel they keep their cookie, so that nothing about them has to be written.
pub(super) type Adopted = Arc<Mutex<HashMap<RuleId, Cookie>>>;

/// Fewer operations than this are not worth waking other threads for.
const WORTH_SHARING: usize = 16;

/// Who adds and deletes.
#[derive(Debug)]
pub(super) struct Writer {
    /// For what concerns all rules of the port.
    pub(super) hook: Hook,
    pub(super) made_qdisc: bool,
    pub(super) watch: Watch,
    pub(super) standing: Standing,
    /// Priority tags are taken off.
    pub(super) tags_off: bool,
    /// The engine is to be told that the rules which it thinks are there are not.
    pub(super) rules_gone: bool,
    /// By family.
    pub(super) handles: [Handles; 4],
    /// Rules of dead engines that nobody has decided about: their handles are taken.
    pub(super) left: HashSet<RuleId>,
    /// Those of them that were read, what they do, and whether the NIC has them.
    pub(super) observed: HashMap<RuleId, (Option<Signature>, Option<bool>)>,
    pub(super) adopted: Adopted,
    /// Rules that the kernel may have and that must go: an exchange failed half-way, and so did
    /// asking. Their handles stay taken.
    pub(super) unsettled: Vec<(Place, Handle)>,
    lanes: Vec<Lane>,
    /// Those of the batch, which wait for its deletes.
    adds: Vec<Pending>,
    /// Who helps to run lanes, if there are several, and by what plan.
    helpers: Helpers,
    plan: Arc<Plan>,
}

impl Writer {
    /// A lane for each of the sockets; `hook` is for all else.
    pub(super) fn new(
        plan: &Arc<Plan>,
        hook: Hook,
        lanes: Vec<Hook>,
        threads: Arc<Threads>,
        adopted: Adopted,
        watch: Watch,
    ) -> Self {
        let mut handles: [Handles; 4] = std::array::from_fn(|_| Handles::default());
        for &rule in &plan.found.left {
            if let Some((prio, handle)) = split_rule_id(rule)
                && let Some(family) = plan.found.prios.flows_at(prio)
            {
                handles[family.index()].occupy(handle);
            }
        }
        Self {
            lanes: lanes.into_iter().map(Lane::new).collect(),
            adds: Vec::new(),
            helpers: Helpers::new(threads),
            plan: Arc::clone(plan),
            hook,
            made_qdisc: plan.found.made_qdisc,
            watch,
            standing: Standing::default(),
            // Where a netdev with the number 0 stands above, a look finds that out.
            tags_off: plan.found.tags,
            rules_gone: false,
            handles,
            left: plan.found.left.iter().copied().collect(),
            observed: HashMap::new(),
            adopted,
            unsettled: Vec::new(),
        }
    }

    pub(super) fn handles(&mut self, family: Family) -> &mut Handles {
        &mut self.handles[family.index()]
    }

    pub(super) fn place(&self, plan: &Plan, family: Family) -> Place {
        let prio = plan.found.prios.of(Use::Flows, family);
        Place { ifindex: self.hook.ifindex, prio, family }
    }

    /// The lane of rules that match this tuple.
    pub(super) fn lane_of(&self, tuple: &Tuple) -> LaneNumber {
        let mut hasher = DefaultHasher::new();
        tuple.hash(&mut hasher);
        LaneNumber::of_hash(hasher.finish(), self.lanes.len())
    }

    /// Takes an operation of a batch, or completes it where there is nothing to send.
    pub(super) fn accept(&mut self, plan: &Plan, op: Operation) {
        let Operation { request, ticket } = op;
        let (place, handle, what) = match request {
            Request::Established { .. } => return ticket.complete(Ok(Done::Noted)),
            Request::Track { .. } => return ticket.complete(Err(Tracked::unsupported())),
            Request::Delete { rule, cookie } => {
                let Some((prio, handle)) = split_rule_id(rule) else {
                    return ticket.complete(Ok(Done::Deleted));
                };
                let Some(family) = plan.found.prios.flows_at(prio) else {
                    // No rule of this port.
                    return ticket.complete(Ok(Done::Deleted));
                };
                // Its handle may be another's by now: that of the cookie is gone, as asked for.
                if !self.handles(family).is_of(handle, cookie) {
                    return ticket.complete(Ok(Done::Deleted));
                }
                self.left.remove(&rule);
                self.observed.remove(&rule);
                (self.place(plan, family), handle, What::Delete)
            }
            Request::Add { cookie, flow } => match self.prepare_add(plan, cookie, flow) {
                Ok(add) => add,
                Err(why) => return ticket.complete(Err(why)),
            },
            Request::Adopt { found, cookie, flow } => {
                self.left.remove(&found);
                if let Some((Some(stands), in_hw)) = self.observed.remove(&found)
                    && self.would_be(plan, &flow, cookie, stands)
                {
                    lock(&self.adopted).insert(found, cookie);
                    if let Some((_, handle)) = split_rule_id(found) {
                        self.handles(Family::of(&flow.matches)).give_to(handle, cookie);
                    }
                    return ticket.complete(Ok(Done::added(found, in_hw)));
                }
                let different = Ticket::new(Box::new(move |deleted: Outcome| {
                    ticket.complete(Err(deleted.err().unwrap_or_else(|| {
                        Rejection::with_detail(
                            Reason::Conflict,
                            "the rule is not what it would be now",
                        )
                    })));
                }));
                let request = Request::Delete { rule: found, cookie };
                return self.accept(plan, Operation { request, ticket: different });
            }
        };
        let p = Pending { ticket, place, handle, what };
        match p.what {
            What::Delete => self.deal(p),
            What::Add { .. } => self.adds.push(p),
        }
    }

    fn prepare_add(
        &mut self,
        plan: &Plan,
        cookie: Cookie,
        flow: Box<Flow>,
    ) -> Result<(Place, Handle, What), Rejection> {
        plan.can_offload(&flow)?;
        let family = Family::of(&flow.matches);
        let lane = self.lane_of(&flow.matches.tuple);
        let handle = self.handles(family).take(lane).ok_or(Reason::TableFull)?;
        self.handles(family).give_to(handle, cookie);
        let software = plan.is_for_software(&flow);
        let what = What::Add { cookie, flow, software, nic_said: None };
        Ok((self.place(plan, family), handle, what))
    }

    /// To the lane that its rule is written through.
    fn deal(&mut self, p: Pending) {
        let lane = self.handles(p.place.family).lane_of(p.handle);
        // Otherwise the ticket tells that nobody took it.
        if let Some(lane) = self.lanes.get_mut(lane.index()) {
            lane.push(p);
        }
    }

    /// Carries out what was accepted, until nothing is left.
    pub(super) fn send_all(&mut self, plan: &Plan) {
        self.run(plan);
        for p in std::mem::take(&mut self.adds) {
            self.deal(p);
        }
        self.run(plan);
    }

    /// Carries out what was dealt.
    fn run(&mut self, plan: &Plan) {
        while self.lanes.iter().any(|lane| lane.waiting() > 0) {
            self.run_lanes(plan);
            let mut homeless = Vec::new();
            let (mut unknown, mut unsent) = (Vec::new(), Vec::new());
            let mut freed = Vec::new();
            for lane in &mut self.lanes {
                let left = lane.take_left();
                freed.extend(left.freed);
                homeless.extend(left.homeless);
                if !left.unknown.is_empty()
                    && let Err(e) = lane.reopen()
                {
                    warn!(ifindex = %self.hook.ifindex, "another socket: {e}");
                    unsent.extend(lane.take_waiting());
                }
                unknown.extend(left.unknown);
            }
            for (place, handle) in freed {
                self.freed(place, handle);
            }
            if !unknown.is_empty()
                && let Ok(hook) = Hook::open(self.hook.ifindex)
            {
                // Whatever befell the lane's socket may have befallen this one.
                if let Ok(port) = hook.socket.port_id() {
                    self.watch.is_ours(port);
                }
                self.hook = hook;
            }
            for p in unknown {
                self.ask_what_became_of(plan, p);
            }
            for p in unsent {
                self.give_up(p, "no socket to the kernel");
            }
            for p in homeless {
                self.suspect();
                self.give_up(p, "the qdisc of the port was removed");
            }
        }
    }

    fn run_lanes(&mut self, plan: &Plan) {
        let waiting = self.lanes.iter().map(Lane::waiting);
        let (busy, all) = waiting.fold((0, 0), |(n, sum), w| (n + usize::from(w > 0), sum + w));
        if busy < 2 || all < WORTH_SHARING {
            self.lanes.iter_mut().filter(|l| l.waiting() > 0).for_each(|lane| lane.run(plan));
            return;
        }
        let plan = Arc::clone(&self.plan);
        let lanes = std::mem::take(&mut self.lanes);
        self.lanes = self.helpers.on_each(lanes, move |lane| {
            if lane.waiting() > 0 {
                lane.run(&plan);
            }
        });
    }

    /// No rule has it any more: it can be another's.
    fn freed(&mut self, place: Place, handle: Handle) {
        lock(&self.adopted).remove(&rule_id(place.prio, handle));
        self.handles(place.family).give_back(handle);
    }

    /// What was not sent will not be.
    fn give_up(&mut self, p: Pending, why: &str) {
        if matches!(p.what, What::Add { .. }) {
            self.handles(p.place.family).give_back(p.handle);
        }
        p.ticket.complete(Err(Rejection::with_detail(Reason::Busy, why)));
    }

    /// After an exchange that failed half-way: asks the kernel whether the rule is there, and
    /// completes the operation accordingly.
    fn ask_what_became_of(&mut self, plan: &Plan, p: Pending) {
        let Place { prio, family, .. } = p.place;
        let outcome = match p.what {
            What::Delete => match self.hook.delete(prio, family, p.handle) {
                Ok(()) => {
                    self.freed(p.place, p.handle);
                    Ok(Done::Deleted)
                }
                Err(e) => Err(Rejection::with_detail(Reason::Busy, e.to_string())),
            },
            What::Add { cookie, flow, software, nic_said, .. } => {
                let there = self.hook.filter(prio, family, p.handle, |f| f.ours());
                match there {
                    Ok(Some(Some((found, _)))) if found == cookie => {
                        Ok(added(plan, &flow, software, nic_said, p.place, p.handle))
                    }
                    Ok(_) => {
                        self.handles(family).give_back(p.handle);
                        Err(Reason::Busy.into())
                    }
                    Err(e) => {
                        self.unsettled.push((p.place, p.handle));
                        Err(Rejection::with_detail(Reason::Busy, e.to_string()))
                    }
                }
            }
        };
        p.ticket.complete(outcome);
    }

    /// Deletes the rules of which it is not known whether they are there.
    pub(super) fn settle(&mut self) {
        for (place, handle) in std::mem::take(&mut self.unsettled) {
            match self.hook.delete(place.prio, place.family, handle) {
                Ok(()) => self.handles(place.family).give_back(handle),
                Err(_) => self.unsettled.push((place, handle)),
            }
        }
    }
}
