//! The provider of one netdev.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use tracing::{debug, info, warn};

use super::actions::NatForm;
use super::handles::Handles;
use super::hook::{Hook, means_no_such_rule};
use super::parse::Filter;
use super::prios::Use;
use super::probe::{self, Found, Guards, Mode};
use super::rule::{self, Form, Place, rule_id, split_rule_id};
use super::same::{self, Signature};
use super::template::{Subject, Templates};
use super::uapi::*;
use crate::contract::flow::Flow;
use crate::contract::operation::{Done, Operation, Outcome, Request, Ticket};
use crate::contract::provider::{Capability, Fault, Leftover, Observed, Provider, RuleReport};
use crate::contract::reason::{Reason, Rejection};
use crate::contract::types::{Cookie, Instance, RuleId};
use crate::netlink::error::{KernelError, NetlinkError};

/// What does not change while the port lives.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) instance: Instance,
    pub(super) found: Found,
    pub(super) batch: usize,
    /// Why the NIC did not take the last rule that went to software for it.
    pub(super) nic_said: Mutex<Option<Box<str>>>,
}

/// The provider of one netdev.
#[derive(Debug)]
pub(super) struct TcFlower {
    plan: Plan,
    /// Set by a sweep that did not find the guards: somebody removed the qdisc.
    guards_lost: AtomicBool,
    /// Set when the NIC may have lost what it was given: the guards in it too.
    hardware_suspect: AtomicBool,
    writer: Mutex<Writer>,
    reader: Mutex<Hook>,
    adopted: Adopted,
}

/// Rules that a dead engine wrote and that are ours now, by what the engine calls them: in the
/// kernel they keep their cookie, so that nothing about them has to be written.
type Adopted = Arc<Mutex<HashMap<RuleId, Cookie>>>;

impl TcFlower {
    pub(super) fn new(plan: Plan, writer: Hook, reader: Hook) -> Self {
        let mut handles: [Handles; 4] = std::array::from_fn(|_| Handles::default());
        for &rule in &plan.found.left {
            if let Some((prio, handle)) = split_rule_id(rule)
                && let Some(family) = plan.found.prios.flows_at(prio)
            {
                handles[family.index()].occupy(handle);
            }
        }
        let adopted = Adopted::default();
        let writer = Writer {
            hook: writer,
            made_qdisc: plan.found.made_qdisc,
            handles,
            left: plan.found.left.iter().copied().collect(),
            observed: HashMap::new(),
            adopted: Arc::clone(&adopted),
            pending: Vec::with_capacity(plan.batch),
            first_seq: 0,
            last_at: 0,
            templates: Templates::default(),
            unsettled: Vec::new(),
        };
        Self {
            plan,
            guards_lost: AtomicBool::new(false),
            hardware_suspect: AtomicBool::new(false),
            writer: Mutex::new(writer),
            reader: Mutex::new(reader),
            adopted,
        }
    }
}

impl Provider for TcFlower {
    fn can_offload(&self, flow: &Flow) -> Result<(), Rejection> {
        self.plan.can_offload(flow)
    }

    fn submit(&self, batch: Vec<Operation>) {
        let mut w = lock(&self.writer);
        w.settle();
        if self.hardware_suspect.swap(false, Ordering::AcqRel) && !w.renew_guards(&self.plan) {
            self.guards_lost.store(true, Ordering::Release);
        }
        if self.guards_lost.swap(false, Ordering::AcqRel) && !w.restore_guards(&self.plan) {
            self.guards_lost.store(true, Ordering::Release);
            for op in batch {
                if matches!(op.request, Request::Add { .. }) {
                    op.complete(Err(Rejection::with_detail(
                        Reason::Busy,
                        "the guards of the port were removed and cannot be put up again",
                    )));
                } else {
                    w.accept(&self.plan, op);
                }
            }
        } else {
            for op in batch {
                w.accept(&self.plan, op);
            }
        }
        w.send_all(&self.plan);
    }

    fn observe(&self) -> Result<Observed, Fault> {
        lock(&self.writer).observe(&self.plan)
    }

    fn usage(&self, report: &mut dyn FnMut(RuleReport)) -> Result<(), Fault> {
        let mut hook = lock(&self.reader);
        let fault = |e: NetlinkError| e.into_fault("reading the rules");
        let adopted = lock(&self.adopted).clone();
        for family in Family::ALL {
            let prio = self.plan.found.prios.of(Use::Flows, family);
            let read = |f: Filter<'_>| {
                let rule = rule_id(prio, Handle(f.at.handle.try_into().ok()?));
                let (cookie, counters) = f.ours().filter(|(c, _)| !probe::is_guard(c))?;
                // A handle can have been adopted and given to a rule of our own since.
                let cookie = if cookie.instance == self.plan.instance {
                    cookie
                } else {
                    *adopted.get(&rule)?
                };
                Some(RuleReport { cookie, rule, counters, in_hw: f.in_hw() })
            };
            // Nothing is reported twice, also when a change makes the dump begin anew.
            let mut reports = Vec::new();
            let dumped = hook.repeated(&mut reports, Vec::clear, |hook, reports| {
                hook.filters_terse(prio, family, |f| reports.extend(read(f)))
            });
            reports.into_iter().for_each(&mut *report);
            dumped.map_err(fault)?;
        }
        match probe::guards_stand(&mut hook, &self.plan.found) {
            Ok(true) => Ok(()),
            Ok(false) => {
                self.guards_lost.store(true, Ordering::Release);
                if hook.is_gone() {
                    return Err(Fault {
                        what: "reading the rules".into(),
                        errno: Some(Errno::ENODEV),
                        detail: None,
                    });
                }
                Err(Fault::new("somebody removed the guards (or the qdisc) of the port"))
            }
            Err(e) => Err(fault(e)),
        }
    }

    fn hardware_suspect(&self) {
        self.hardware_suspect.store(true, Ordering::Release);
    }

    fn flush(&self) -> Result<u64, Fault> {
        lock(&self.writer).flush(&self.plan)
    }

    fn release(&self) -> Result<(), Fault> {
        lock(&self.writer).release(&self.plan)
    }

    fn capabilities(&self) -> Vec<Capability> {
        self.plan.found.capabilities.table()
    }

    fn describe(&self) -> String {
        let found = &self.plan.found;
        let mut text = match found.mode {
            Mode::Software => "rules in software (skip_hw)".to_owned(),
            Mode::Hardware => "rules in hardware only (skip_sw)".to_owned(),
            Mode::Both => "rules in hardware and software".to_owned(),
        };
        if let Some(why) = &found.no_hardware {
            text += &format!(", because the NIC does not take the TTL guard: {why}");
        }
        if let Some(words) = &*lock(&self.plan.nic_said) {
            text += &format!("; the NIC did not take all of them: {words}");
        }
        let whose = if found.made_qdisc { "ours" } else { "not ours" };
        text += &format!("; prios {}; {} qdisc, {whose}", found.prios, found.qdisc_kind);
        if found.mode.has_software()
            && let Err(why) = &found.nat
        {
            text += &format!("; no NAT: {why}");
        }
        if let Err(why) = &found.vlan {
            text += &format!("; no VLAN tags: {why}");
        }
        if let Err(why) = &found.length {
            text += &format!("; no smaller MTU on departure: {why}");
        }
        text
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in a completion leaves the state whole: see `Writer::send`.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Plan {
    fn can_offload(&self, flow: &Flow) -> Result<(), Rejection> {
        let (from, to) = (&flow.matches.tuple, &flow.forward.tuple);
        if from.is_ipv6() != to.is_ipv6() || from.proto() != to.proto() {
            return Err(Rejection::with_detail(
                Reason::Unsupported,
                "the address family or the protocol changes on the way",
            ));
        }
        let found = &self.found;
        if let (true, Err(why)) = (flow.has_vlan(), &found.vlan) {
            return Err(Rejection::with_detail(Reason::Unsupported, why.as_str()));
        }
        if flow.may_exceed_mtu()
            && let Err(why) = &found.length
        {
            let (from, to) = (flow.ingress_mtu, flow.forward.mtu);
            return Err(Rejection::with_detail(
                Reason::MtuMismatch,
                format!("MTU {from} on arrival, {to} on departure, and {why}"),
            ));
        }
        if flow.has_nat()
            && self.is_for_software(flow)
            && let Err(why) = &found.nat
        {
            return Err(Rejection::with_detail(Reason::NatChecksum, why.as_str()));
        }
        // In the kernel's or the driver's words.
        self.found.capabilities.refusal(flow).map_or(Ok(()), Err)
    }

    /// True when the flow's rule is kept out of hardware from the start: what it needs is told apart
    /// in software only.
    fn is_for_software(&self, flow: &Flow) -> bool {
        !self.found.mode.has_hardware()
            || flow.may_exceed_mtu()
            || (flow.matches.vlan.is_some() && !self.found.tagged_in_hw)
    }

    /// The form of a flow's rule. A NAT rule is either for hardware or for software, since their
    /// checksums are kept right in different ways; `software` asks for the latter.
    fn form(&self, flow: &Flow, software: bool) -> Form<'_> {
        let percpu_stats = self.found.percpu_stats;
        if !flow.has_nat() {
            let flags = if software { TCA_CLS_FLAGS_SKIP_HW } else { self.found.mode.flags() };
            return Form { flags, nat: None, percpu_stats };
        }
        match &self.found.nat {
            Ok(programs) if software => {
                let family = Family::of(&flow.matches);
                let (before, after) = programs.pair(family, flow.matches.tuple.proto());
                let nat = Some(NatForm::Software { before, after });
                Form { flags: TCA_CLS_FLAGS_SKIP_HW, nat, percpu_stats }
            }
            _ => Form { flags: TCA_CLS_FLAGS_SKIP_SW, nat: Some(NatForm::Hardware), percpu_stats },
        }
    }

    /// Remembers why a rule is in software only.
    fn nic_refused(&self, words: &str) {
        let mut said = lock(&self.nic_said);
        if said.as_deref() != Some(words) {
            info!("in software only: {words}");
            *said = Some(words.into());
        }
    }

    /// Whether the NIC has a rule that the kernel has just taken, where that is known at once.
    fn in_hw(&self, flow: &Flow, software: bool) -> Option<bool> {
        match self.found.mode {
            Mode::Software => Some(false),
            Mode::Hardware => Some(true),
            Mode::Both if software => Some(false),
            Mode::Both if flow.has_nat() => Some(true),
            Mode::Both => None,
        }
    }
}

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
struct Writer {
    hook: Hook,
    made_qdisc: bool,
    /// By family.
    handles: [Handles; 4],
    /// Rules of dead engines that nobody has decided about: their handles are taken.
    left: HashSet<RuleId>,
    /// Those of them that were read, what they do, and whether the NIC has them.
    observed: HashMap<RuleId, (Option<Signature>, Option<bool>)>,
    adopted: Adopted,
    /// What is in the buffer, in order.
    pending: Vec<Pending>,
    first_seq: u32,
    /// Where the last message in the buffer begins.
    last_at: usize,
    templates: Templates,
    /// Rules that the kernel may have and that must go: an exchange failed half-way, and so did
    /// asking. Their handles stay taken.
    unsettled: Vec<(Place, Handle)>,
}

impl Writer {
    fn handles(&mut self, family: Family) -> &mut Handles {
        &mut self.handles[family.index()]
    }

    fn place(&self, plan: &Plan, family: Family) -> Place {
        let prio = plan.found.prios.of(Use::Flows, family);
        Place { ifindex: self.hook.ifindex, prio, family }
    }

    /// Writes an operation into the buffer, or completes it where there is nothing to send.
    fn accept(&mut self, plan: &Plan, op: Operation) {
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
        if self.pending.len() >= plan.batch {
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

    /// Whether a rule that stands is what an add of this flow would make, in one of the forms that
    /// it can end up in.
    fn would_be(&self, plan: &Plan, flow: &Flow, cookie: Cookie, stands: Signature) -> bool {
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

    /// Reads what stands beside our own rules.
    fn observe(&mut self, plan: &Plan) -> Result<Observed, Fault> {
        let Self { hook, handles, left, observed, .. } = self;
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
            if !held && !probe::is_guard(&cookie) {
                let options = f.options();
                let tuple = same::tuple_of(&options);
                seen.0.leftovers.push(Leftover { rule, cookie, tuple, counters });
                seen.1.push((rule, (Signature::of_dump(options), f.in_hw()), family, handle));
            }
        };
        hook.repeated(
            &mut seen,
            |seen| *seen = Default::default(),
            |hook, seen| hook.filters(PARENT_INGRESS, |f| read(f, seen)),
        )
        .map_err(|e| e.into_fault("reading what stands on the netdev"))?;
        let (found, rules) = seen;
        observed.clear();
        for (rule, what, family, handle) in rules {
            handles[family.index()].occupy(handle);
            left.insert(rule);
            observed.insert(rule, what);
        }
        Ok(found)
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
    fn send_all(&mut self, plan: &Plan) {
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
    fn settle(&mut self) {
        for (place, handle) in std::mem::take(&mut self.unsettled) {
            match self.hook.delete(place.prio, place.family, handle) {
                Ok(()) => self.handles(place.family).give_back(handle),
                Err(_) => self.unsettled.push((place, handle)),
            }
        }
    }

    /// Gives the NIC its guards anew.
    fn renew_guards(&mut self, plan: &Plan) -> bool {
        let guards = Guards { instance: plan.instance, made_qdisc: self.made_qdisc };
        probe::renew_hardware_guards(&mut self.hook, &plan.found, guards)
            .inspect_err(
                |e| warn!(ifindex = %self.hook.ifindex, "giving the NIC its guards anew: {e}"),
            )
            .is_ok()
    }

    /// Makes the qdisc again if it is gone, and the guards. They are removed first, so that none
    /// stands twice.
    fn restore_guards(&mut self, plan: &Plan) -> bool {
        warn!(ifindex = %self.hook.ifindex, "the guards of the port were removed by somebody else");
        let restored = self.hook.add_clsact().and_then(|made| {
            self.made_qdisc |= made;
            for (what, family, prio) in plan.found.prios.all() {
                if what != Use::Flows {
                    self.hook.delete_all(prio, family)?;
                }
            }
            let guards = Guards { instance: plan.instance, made_qdisc: self.made_qdisc };
            probe::put_up_guards(&mut self.hook, &plan.found, guards)
        });
        restored
            .inspect_err(|e| warn!(ifindex = %self.hook.ifindex, "putting them up again: {e}"))
            .is_ok()
    }

    fn flush(&mut self, plan: &Plan) -> Result<u64, Fault> {
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

    fn release(&mut self, plan: &Plan) -> Result<(), Fault> {
        let mut result = self.flush(plan).map(drop);
        let mut note = |r: Result<(), NetlinkError>, what: &str| {
            if let Err(e) = r
                && e.errno() != Some(Errno::ENODEV)
                && result.is_ok()
            {
                result = Err(e.into_fault(what));
            }
        };
        for (what, family, prio) in plan.found.prios.all() {
            if plan.found.has_guards_at(what, family) {
                note(self.hook.delete_all(prio, family), "removing the guards of the port");
            }
        }
        if self.made_qdisc {
            note(self.hook.delete_unused_clsact(), "removing the clsact qdisc");
        }
        result
    }
}
