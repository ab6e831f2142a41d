//! One of a port's writers: operations written into a buffer, sent with others, acknowledged or
//! refused, sent again in another form, completed.
//!
//! What is to be done about the port as a whole, the lane leaves to [`super::writer`]: handles that are
//! free again, operations that found the qdisc removed, those of which it is not known what became of
//! them.

use nix::errno::Errno;
use tracing::{debug, warn};

use super::found::Mode;
use super::hook::{Hook, means_no_such_rule};
use super::plan::Plan;
use super::rule::{self, Place, needs_programs, rule_id};
use super::template::{Subject, Templates};
use super::uapi::*;
use crate::contract::flow::Flow;
use crate::contract::operation::{Done, Outcome, Ticket};
use crate::contract::reason::{Reason, Rejection};
use crate::contract::types::Cookie;
use crate::netlink::error::{KernelError, NetlinkError};

/// More bytes than this wait for nothing: the kernel refuses a send that is longer than the socket's
/// send buffer, which is 208 kB by default. A message has a kilobyte at most.
const SEND_MAX: usize = 128 * 1024;

/// An operation on its way.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) ticket: Ticket,
    pub(super) place: Place,
    pub(super) handle: Handle,
    pub(super) what: What,
}

#[derive(Debug)]
pub(super) enum What {
    Add {
        cookie: Cookie,
        flow: Box<Flow>,
        software: bool,
        /// Why it is not in the NIC, in the driver's words.
        nic_said: Option<Box<str>>,
    },
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

/// What lanes leave to the port.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// No rule has these any more.
    pub(super) freed: Vec<(Place, Handle)>,
    /// Adds that found the qdisc removed.
    pub(super) homeless: Vec<Pending>,
    /// Sent, and the exchange failed.
    pub(super) unknown: Vec<Pending>,
}

/// A socket, and what goes through it.
#[derive(Debug)]
pub(super) struct Lane {
    hook: Hook,
    /// To be written.
    inbox: Vec<Pending>,
    /// What is in the buffer, in order.
    pending: Vec<Pending>,
    first_seq: u32,
    /// Where the last message in the buffer begins.
    last_at: usize,
    templates: Templates,
    left: Left,
}

impl Lane {
    pub(super) fn new(hook: Hook) -> Self {
        Self {
            hook,
            inbox: Vec::new(),
            pending: Vec::new(),
            first_seq: 0,
            last_at: 0,
            templates: Templates::default(),
            left: Left::default(),
        }
    }

    pub(super) fn push(&mut self, p: Pending) {
        self.inbox.push(p);
    }

    /// How many operations wait.
    pub(super) fn waiting(&self) -> usize {
        self.inbox.len()
    }

    /// Takes what waits, unsent.
    pub(super) fn take_waiting(&mut self) -> Vec<Pending> {
        std::mem::take(&mut self.inbox)
    }

    pub(super) fn take_left(&mut self) -> Left {
        std::mem::take(&mut self.left)
    }

    /// After an exchange that failed: goes on with another socket.
    pub(super) fn reopen(&mut self) -> Result<(), NetlinkError> {
        self.hook = Hook::open(self.hook.ifindex)?;
        Ok(())
    }

    /// Carries out what waits. After an exchange that failed the rest goes on waiting.
    pub(super) fn run(&mut self, plan: &Plan) {
        let mut waiting = std::mem::take(&mut self.inbox).into_iter();
        loop {
            for p in waiting.by_ref() {
                self.write(plan, p);
                if self.pending.len() >= plan.batch || self.hook.buf.len() >= SEND_MAX {
                    break;
                }
            }
            if self.pending.is_empty() {
                return;
            }
            let again = self.send(plan);
            if !self.left.unknown.is_empty() {
                self.inbox.extend(waiting);
                return;
            }
            for p in again {
                self.write(plan, p);
            }
        }
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

    /// Sends what is in the buffer and completes what is decided; returns what is to be sent again,
    /// changed.
    fn send(&mut self, plan: &Plan) -> Vec<Pending> {
        rule::ask_for_ack(&mut self.hook.buf, self.last_at);
        let count = self.pending.len();
        let acks = self.hook.socket.batch(&self.hook.buf, self.first_seq, count);
        // From here on nothing is in the buffer, whatever a completion does.
        let sent = std::mem::replace(&mut self.pending, Vec::with_capacity(count));
        let mut said = self.hook.socket.take_warnings().into_iter().peekable();
        match acks {
            Ok(acks) => {
                let mut now = Circumstances::default();
                let mut again = Vec::new();
                for (n, (mut p, ack)) in sent.into_iter().zip(acks).enumerate() {
                    if let (What::Add { nic_said, .. }, Some((_, words))) =
                        (&mut p.what, said.next_if(|&(of, _)| of == n))
                    {
                        plan.nic_refused(&words);
                        *nic_said = Some(words);
                    }
                    match ack {
                        Ok(()) => self.succeeded(plan, p),
                        Err(e) => again.extend(self.refused(plan, p, e, &mut now)),
                    }
                }
                again
            }
            Err(e) => {
                warn!(ifindex = %self.hook.ifindex, "a batch of {count} rules failed half-way: {e}");
                self.left.unknown.extend(sent);
                Vec::new()
            }
        }
    }

    fn succeeded(&mut self, plan: &Plan, p: Pending) {
        let outcome = match p.what {
            What::Delete => {
                self.left.freed.push((p.place, p.handle));
                Done::Deleted
            }
            What::Add { flow, software, nic_said, .. } => {
                added(plan, &flow, software, nic_said, p.place, p.handle)
            }
        };
        p.ticket.complete(Ok(outcome));
    }

    /// Completes what the kernel refused, or gives it back to be tried in another way.
    fn refused(
        &mut self,
        plan: &Plan,
        mut p: Pending,
        e: KernelError,
        now: &mut Circumstances,
    ) -> Option<Pending> {
        debug!(ifindex = %self.hook.ifindex, handle = p.handle.0, what = ?p.what, "refused: {e}");
        // What a request about a filter gets when the qdisc is not there (`__tcf_qdisc_find`).
        let qdisc_gone = e.errno == Errno::EINVAL && now.qdisc_gone(&mut self.hook);
        let outcome: Outcome = match &mut p.what {
            What::Delete if means_no_such_rule(&e) || qdisc_gone => {
                self.left.freed.push((p.place, p.handle));
                Ok(Done::Deleted)
            }
            What::Delete => Err(e.into()),
            What::Add { .. } if qdisc_gone => {
                self.left.homeless.push(p);
                return None;
            }
            What::Add { flow, software, nic_said, .. }
                if needs_programs(flow)
                    && !*software
                    && plan.found.mode == Mode::Both
                    && plan.found.rule_programs().is_ok()
                    && !matches!(e.errno, Errno::EEXIST | Errno::ENODEV) =>
            {
                *software = true;
                let words = e.extack.clone().unwrap_or_else(|| e.to_string().into());
                plan.nic_refused(&words);
                *nic_said = Some(words);
                return Some(p);
            }
            What::Add { flow, .. } => {
                self.left.freed.push((p.place, p.handle));
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
                        if let (Mode::Both, true, Err(no_programs)) =
                            (plan.found.mode, needs_programs(flow), plan.found.rule_programs())
                        {
                            let nic = why.to_string();
                            if flow.has_nat() {
                                why.reason = Reason::NatChecksum;
                            }
                            why.detail = Some(format!("{no_programs}; in hardware: {nic}").into());
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
}

/// The result of an add that the kernel has taken.
pub(super) fn added(
    plan: &Plan,
    flow: &Flow,
    software: bool,
    nic_said: Option<Box<str>>,
    place: Place,
    handle: Handle,
) -> Done {
    let (rule, in_hw) = (rule_id(place.prio, handle), plan.in_hw(flow, software));
    Done::Added { rule, in_hw, nic_said }
}
