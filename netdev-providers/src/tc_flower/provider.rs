//! The provider of one netdev: what the engine calls, and the sweep of its rules.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;

use super::beside;
use super::capability::Capabilities;
use super::found::Mode;
use super::guard;
use super::hook::Hook;
use super::parse::Filter;
use super::plan::{Around, Plan, lock};
use super::prios::Use;
use super::probe;
use super::rule::rule_id;
use super::threads::Threads;
use super::uapi::*;
use super::watch::Watch;
use super::writer::{Adopted, Writer};
use crate::contract::flow::Flow;
use crate::contract::operation::{Operation, Request};
use crate::contract::provider::{Capability, Fault, Observed, Provider, Repaired, RuleReport};
use crate::contract::reason::Rejection;
use crate::contract::types::Ifindex;
use crate::netlink::error::NetlinkError;
use crate::netlink::front::in_front;

/// The provider of one netdev.
#[derive(Debug)]
pub(super) struct TcFlower {
    plan: Arc<Plan>,
    /// Set by a sweep that did not find the guards: somebody removed the qdisc.
    guards_lost: AtomicBool,
    /// Set when the NIC may have lost what it was given: the guards in it too.
    hardware_suspect: AtomicBool,
    writer: Mutex<Writer>,
    reader: Mutex<Hook>,
    adopted: Adopted,
}

/// The sockets of one port.
#[derive(Debug)]
pub(super) struct Sockets {
    /// For what concerns all rules.
    pub(super) hook: Hook,
    /// For sweeps.
    pub(super) reader: Hook,
    /// For adds and deletes.
    pub(super) lanes: Vec<Hook>,
}

impl Sockets {
    pub(super) fn open(ifindex: Ifindex, lanes: usize) -> Result<Self, NetlinkError> {
        Ok(Self {
            hook: Hook::open(ifindex)?,
            reader: Hook::open(ifindex)?,
            lanes: (0..lanes).map(|_| Hook::open(ifindex)).collect::<Result<_, _>>()?,
        })
    }
}

impl TcFlower {
    /// # Errors
    /// When nobody would hear of what others do; what bind made is taken away again.
    pub(super) fn new(
        plan: Arc<Plan>,
        sockets: Sockets,
        threads: Arc<Threads>,
    ) -> Result<Self, NetlinkError> {
        let Sockets { mut hook, reader, lanes } = sockets;
        let watched = Watch::open(hook.ifindex, plan.found.prios).and_then(|mut watch| {
            watch.is_ours(hook.socket.port_id()?);
            // What has come before the watch is seen by this.
            beside::look_first(&hook, &plan)?;
            if probe::guards_stand(&mut hook, &plan.found)? {
                Ok(watch)
            } else {
                Err(NetlinkError::Malformed("the guards are gone again"))
            }
        });
        let watch = watched.inspect_err(|_| {
            probe::remove_prios(&mut hook, plan.found.prios);
            if plan.found.made_qdisc {
                let _ = hook.delete_unused_qdisc();
            }
        })?;
        let adopted = Adopted::default();
        let writer = Writer::new(&plan, hook, lanes, threads, Arc::clone(&adopted), watch);
        Ok(Self {
            plan,
            guards_lost: AtomicBool::new(false),
            hardware_suspect: AtomicBool::new(false),
            writer: Mutex::new(writer),
            reader: Mutex::new(reader),
            adopted,
        })
    }
}

impl TcFlower {
    /// What nobody tells (tcx, XDP by a link) a sweep finds out.
    fn look_in_front(&self, ifindex: Ifindex) -> Result<(), Fault> {
        let (around, found) = (&self.plan.around, &self.plan.found);
        let front = in_front(ifindex, found.prios.first())
            .map_err(|e| e.into_fault("reading who is in front of the rules"))?;
        let overtaken = found.mode.has_hardware() && Around::would_overtake(&front);
        let changed = overtaken != around.is_overtaken();
        around.set_front(front);
        if changed {
            // The writer does what is to be done.
            return Err(Fault::new("others have come in front of the rules, or have gone"));
        }
        Ok(())
    }
}

impl Provider for TcFlower {
    fn can_offload(&self, flow: &Flow) -> Result<(), Rejection> {
        self.plan.can_offload(flow)
    }

    fn submit(&self, batch: Vec<Operation>) {
        let mut w = lock(&self.writer);
        w.settle();
        w.hear(&self.plan);
        if self.hardware_suspect.swap(false, Ordering::AcqRel) && !w.renew_guards(&self.plan) {
            w.suspect();
        }
        if self.guards_lost.swap(false, Ordering::AcqRel) {
            w.suspect();
        }
        let ready = w.settle_down(&self.plan);
        for op in batch {
            match &ready {
                Err(why) if matches!(op.request, Request::Add { .. }) => {
                    op.complete(Err(why.clone()));
                }
                _ => w.accept(&self.plan, op),
            }
        }
        w.send_all(&self.plan);
        // Whatever was made in the place of the qdisc meanwhile took the rules, and has no guards.
        w.hear(&self.plan);
        let _ = w.settle_down(&self.plan);
    }

    fn repair(&self) -> Repaired {
        self.submit(Vec::new());
        let mut w = lock(&self.writer);
        w.look_for_vlan_0(&self.plan);
        w.look_in_front(&self.plan);
        if std::mem::take(&mut w.rules_gone) { Repaired::RulesGone } else { Repaired::AsItWas }
    }

    fn in_front(&self) -> Vec<String> {
        self.plan.around.front().into_iter().map(|f| f.what).collect()
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
                let (cookie, counters) = f.ours().filter(|(c, _)| !guard::is_guard(c))?;
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
            Ok(true) => self.look_in_front(hook.ifindex),
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

    fn outlives(&self) -> bool {
        true
    }

    fn release(&self) -> Result<(), Fault> {
        lock(&self.writer).release(&self.plan)
    }

    fn capabilities(&self) -> Vec<Capability> {
        let found = &self.plan.found;
        let mut all = self.plan.capabilities.table();
        all.extend(Capabilities::by_nature(found.mode));
        all
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
        text += &format!("; prios {}; ", found.prios);
        match &*lock(&self.plan.around.qdisc) {
            Some((kind, true)) => text += &format!("{kind} qdisc, ours"),
            Some((kind, false)) => text += &format!("{kind} qdisc, not ours"),
            None => {
                text += "no ingress qdisc: somebody removed it, and is given time to make another"
            }
        }
        if self.plan.around.is_overtaken() {
            text += "; none in hardware, because others are in front whom the NIC has not";
        }
        if found.mode.has_software()
            && let Err(why) = found.rule_programs()
        {
            text += &format!("; no NAT in software, and no IPv4: {why}");
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
