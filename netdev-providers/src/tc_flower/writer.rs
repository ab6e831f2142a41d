//! The life of an operation: written into the buffer, sent with others, acknowledged or refused,
//! sent again in another form, completed.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use tracing::{debug, warn};

use super::handles::Handles;
use super::hook::{Hook, means_no_such_rule};
use super::plan::{Plan, lock};
use super::prios::Use;
use super::probe::Mode;
use super::rule::{self, Place, rule_id, split_rule_id};
use super::same::Signature;
use super::template::{Subject, Templates};
use super::uapi::*;
use crate::contract::flow::Flow;
use crate::contract::operation::{Done, Operation, Outcome, Request, Ticket};
use crate::contract::reason::{Reason, Rejection};
use crate::contract::types::{Cookie, RuleId};
use crate::netlink::error::KernelError;

/// Rules that a dead engine wrote and that are ours now, by what the engine calls them: in the
/// kernel they keep their cookie, so that nothing about them has to be written.
pub(super) type Adopted = Arc<Mutex<HashMap<RuleId, Cookie>>>;

/// More bytes than this wait for nothing: the kernel refuses a send that is longer than the socket's
/// send buffer, which is 208 kB by default. A message has a kilobyte at most.
const SEND_MAX: usize = 128 * 1024;

/// An operation that has been written into the buffer.
#[derive(Debug)]
struct Pending {
    ticket: Ticket,
    place: Place,
    handle: Handle,
    what: What,
}

#[derive(Debug)]
enum What {
    Add { cookie: Cookie, flow: Box<Flow>, software: bool, again: bool },
    Delete,
}

/// What one batch learns about the netdev when something fails, so that it asks once.
#[derive(Debug, Default)]
struct Circumstances {
    gone: Option<bool>,
    qdisc_gone: Option<bool>,
}

impl Circumstances {
    fn gone(&mut self, hook: &mut Hook) -> bool {
        *self.gone.get_or_insert_with(|| hook.is_gone())
    }

    fn qdisc_gone(&mut self, hook: &mut Hook) -> bool {
        *self.qdisc_gone.get_or_insert_with(|| matches!(hook.qdisc(), Ok(None)))
    }
}

/// Who adds and deletes.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) hook: Hook,
    pub(super) made_qdisc: bool,
    /// By family.
    pub(super) handles: [Handles; 4],
    /// Rules of dead engines that nobody has decided about: their handles are taken.
    pub(super) left: HashSet<RuleId>,
    /// Those of them that were read, what they do, and whether the NIC has them.
    pub(super) observed: HashMap<RuleId, (Option<Signature>, Option<bool>)>,
    pub(super) adopted: Adopted,
    /// What is in the buffer, in order.
    pending: Vec<Pending>,
    first_seq: u32,
    /// Where the last message in the buffer begins.
    last_at: usize,
    templates: Templates,
    /// Rules that the kernel may have and that must go: an exchange failed half-way, and so did
    /// asking. Their handles stay taken.
    pub(super) unsettled: Vec<(Place, Handle)>,
}

impl Writer {
    pub(super) fn new(plan: &Plan, hook: Hook, adopted: Adopted) -> Self {
        let mut handles: [Handles; 4] = std::array::from_fn(|_| Handles::default());
        for &rule in &plan.found.left {
            if let Some((prio, handle)) = split_rule_id(rule)
                && let Some(family) = plan.found.prios.flows_at(prio)
            {
                handles[family.index()].occupy(handle);
            }
        }
        Self {
            hook,
            made_qdisc: plan.found.made_qdisc,
            handles,
            left: plan.found.left.iter().copied().collect(),
            observed: HashMap::new(),
            adopted,
            pending: Vec::with_capacity(plan.batch),
            first_seq: 0,
            last_at: 0,
            templates: Templates::default(),
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

    /// Writes an operation into the buffer, or completes it where there is nothing to send.
    pub(super) fn accept(&mut self, plan: &Plan, op: Operation) {
        let Operation { request, ticket } = op;
        let (place, handle, what) = match request {
            Request::Established { .. } => return ticket.complete(Ok(Done::Noted)),
            Request::Delete { rule, .. } => {
                let Some((prio, handle)) = split_rule_id(rule) else {
                    return ticket.complete(Ok(Done::Deleted));
                };
                let Some(family) = plan.found.prios.flows_at(prio) else {
                    // No rule of this port.
                    return ticket.complete(Ok(Done::Deleted));
                };
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
                    return ticket.complete(Ok(Done::Added { rule: found, in_hw }));
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
        self.write(plan, Pending { ticket, place, handle, what });
        if self.pending.len() >= plan.batch || self.hook.buf.len() >= SEND_MAX {
            self.send_all(plan);
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
        let handle = self.handles(family).take().ok_or(Reason::TableFull)?;
        let software = plan.is_for_software(&flow);
        let what = What::Add { cookie, flow, software, again: false };
        Ok((self.place(plan, family), handle, what))
    }

    fn write(&mut self, plan: &Plan, p: Pending) {
        let seq = self.hook.socket.next_seq();
        if self.pending.is_empty() {
            self.first_seq = seq;
            self.hook.buf.clear();
        }
        self.last_at = self.hook.buf.len();
        match &p.what {
            What::Delete => rule::delete(&mut self.hook.buf, seq, p.place, p.handle),
            What::Add { cookie, flow, software, .. } => {
                let form = plan.form(flow, *software);
                let subject = Subject { seq, handle: p.handle, cookie: *cookie, flow };
                self.templates.add(&mut self.hook.buf, p.place, form, &subject);
                // The NIC's words come with an acknowledgement only.
                if form.flags & TCA_CLS_FLAGS_VERBOSE != 0 {
                    rule::ask_for_ack(&mut self.hook.buf, self.last_at);
                }
            }
        }
        self.pending.push(p);
    }

    /// Sends what is in the buffer, and what has to be sent again, until nothing is left.
    pub(super) fn send_all(&mut self, plan: &Plan) {
        while !self.pending.is_empty() {
            let again = self.send(plan);
            for p in again {
                self.write(plan, p);
            }
        }
    }

    /// Sends what is in the buffer and completes what is decided; returns what is to be sent again,
    /// changed.
    fn send(&mut self, plan: &Plan) -> Vec<Pending> {
        rule::ask_for_ack(&mut self.hook.buf, self.last_at);
        let count = self.pending.len();
        let acks = self.hook.socket.batch(&self.hook.buf, self.first_seq, count);
        // From here on nothing is in the buffer, whatever a completion does.
        let mut sent = std::mem::replace(&mut self.pending, Vec::with_capacity(plan.batch));
        let mut again = Vec::new();
        let mut restore = false;
        if let Some(words) = self.hook.socket.take_warning() {
            plan.nic_refused(&words);
        }
        match acks {
            Ok(acks) => {
                let mut now = Circumstances::default();
                for (p, ack) in sent.drain(..).zip(acks) {
                    match ack {
                        Ok(()) => self.succeeded(plan, p),
                        Err(e) => {
                            if let Some((p, lost)) = self.refused(plan, p, e, &mut now) {
                                restore |= lost;
                                again.push(p);
                            }
                        }
                    }
                }
            }
            Err(e) => {
                warn!(ifindex = %self.hook.ifindex, "a batch of {count} rules failed half-way: {e}");
                if let Ok(hook) = Hook::open(self.hook.ifindex) {
                    self.hook = hook;
                }
                for p in sent.drain(..) {
                    self.ask_what_became_of(plan, p);
                }
            }
        }
        if restore && !self.restore_guards(plan) {
            for p in again.drain(..) {
                self.handles(p.place.family).give_back(p.handle);
                p.ticket.complete(Err(Rejection::with_detail(
                    Reason::Busy,
                    "the qdisc of the port was removed and cannot be made again",
                )));
            }
        }
        again
    }

    /// The rule is gone: its handle can be another's.
    fn deleted(&mut self, place: Place, handle: Handle) {
        lock(&self.adopted).remove(&rule_id(place.prio, handle));
        self.handles(place.family).give_back(handle);
    }

    fn succeeded(&mut self, plan: &Plan, p: Pending) {
        let outcome = match &p.what {
            What::Delete => {
                self.deleted(p.place, p.handle);
                Done::Deleted
            }
            What::Add { flow, software, .. } => Done::Added {
                rule: rule_id(p.place.prio, p.handle),
                in_hw: plan.in_hw(flow, *software),
            },
        };
        p.ticket.complete(Ok(outcome));
    }

    /// Completes what the kernel refused, or gives it back to be tried in another way, with whether
    /// the qdisc is to be made again before.
    fn refused(
        &mut self,
        plan: &Plan,
        mut p: Pending,
        e: KernelError,
        now: &mut Circumstances,
    ) -> Option<(Pending, bool)> {
        debug!(ifindex = %self.hook.ifindex, handle = p.handle.0, what = ?p.what, "refused: {e}");
        // What a request about a filter gets when the qdisc is not there (`__tcf_qdisc_find`).
        let qdisc_gone = e.errno == Errno::EINVAL && now.qdisc_gone(&mut self.hook);
        let outcome: Outcome = match &mut p.what {
            What::Delete if means_no_such_rule(&e) || qdisc_gone => {
                self.deleted(p.place, p.handle);
                Ok(Done::Deleted)
            }
            What::Delete => Err(e.into()),
            What::Add { again, .. } if qdisc_gone && !*again => {
                *again = true;
                return Some((p, true));
            }
            What::Add { flow, software, .. }
                if flow.has_nat()
                    && !*software
                    && plan.found.mode == Mode::Both
                    && plan.found.nat.is_ok()
                    && !matches!(e.errno, Errno::EEXIST | Errno::ENODEV) =>
            {
                *software = true;
                plan.nic_refused(&e.to_string());
                return Some((p, false));
            }
            What::Add { flow, .. } => {
                self.handles(p.place.family).give_back(p.handle);
                Err(match e.errno {
                    // Of the netdev, or of the one to redirect to (`tcf_mirred_init`).
                    Errno::ENODEV if !now.gone(&mut self.hook) => Rejection::with_detail(
                        Reason::EgressUnsupported,
                        format!("no netdev with ifindex {} to redirect to", flow.forward.egress),
                    ),
                    Errno::EEXIST => Rejection {
                        reason: Reason::Conflict,
                        errno: Some(e.errno),
                        detail: Some(e.extack.unwrap_or_else(|| {
                            "a rule with the same match is there already".into()
                        })),
                    },
                    _ => {
                        let mut why = Rejection::from(e);
                        if let (Mode::Both, true, Err(no_nat)) =
                            (plan.found.mode, flow.has_nat(), &plan.found.nat)
                        {
                            let nic = why.to_string();
                            why.reason = Reason::NatChecksum;
                            why.detail = Some(format!("{no_nat}; in hardware: {nic}").into());
                        }
                        if plan.found.mode == Mode::Hardware
                            && matches!(why.reason, Reason::Unsupported | Reason::Refused)
                        {
                            why.reason = Reason::NotInHardware;
                        }
                        why
                    }
                })
            }
        };
        p.ticket.complete(outcome);
        None
    }

    /// After an exchange that failed half-way: asks the kernel whether the rule is there, and
    /// completes the operation accordingly.
    fn ask_what_became_of(&mut self, plan: &Plan, p: Pending) {
        let Place { prio, family, .. } = p.place;
        match p.what {
            What::Delete => match self.hook.delete(prio, family, p.handle) {
                Ok(()) => {
                    self.deleted(p.place, p.handle);
                    p.ticket.complete(Ok(Done::Deleted));
                }
                Err(e) => {
                    p.ticket.complete(Err(Rejection::with_detail(Reason::Busy, e.to_string())));
                }
            },
            What::Add { cookie, .. } => {
                let there = self.hook.filter(prio, family, p.handle, |f| f.ours());
                match there {
                    Ok(Some(Some((found, _)))) if found == cookie => self.succeeded(plan, p),
                    Ok(_) => {
                        self.handles(family).give_back(p.handle);
                        p.ticket.complete(Err(Reason::Busy.into()));
                    }
                    Err(e) => {
                        self.unsettled.push((p.place, p.handle));
                        p.ticket.complete(Err(Rejection::with_detail(Reason::Busy, e.to_string())));
                    }
                }
            }
        }
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
