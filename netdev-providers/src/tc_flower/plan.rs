//! What one netdev's rules are like: which flows are offered, in which form, and what is known of
//! them. Nothing here changes while the port lives, but for what the NIC has said, and what others do around
//! the rules ([`Around`]).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tracing::info;

use super::actions::NatForm;
use super::capability::Capabilities;
use super::found::{Found, Mode};
use super::hook::QdiscKind;
use super::rule::{Form, needs_programs};
use super::uapi::*;
use crate::contract::flow::Flow;
use crate::contract::reason::{Reason, Rejection};
use crate::contract::types::Instance;
use crate::netlink::front::InFront;

/// What does not change while the port lives.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) instance: Instance,
    pub(super) found: Found,
    /// What rules the netdev takes, and in which form.
    pub(super) capabilities: Capabilities,
    pub(super) batch: usize,
    /// What is made where there is no ingress qdisc.
    pub(super) qdisc: QdiscKind,
    /// Why the NIC did not take the last rule that went to software for it.
    pub(super) nic_said: Mutex<Option<Box<str>>>,
    pub(super) around: Around,
}

/// What stands around a port's rules, and changes as others will.
#[derive(Debug, Default)]
pub(super) struct Around {
    /// Who packets pass before they come to the rules.
    front: Mutex<Vec<InFront>>,
    /// Rules in the NIC would be in front of some of them.
    overtaken: AtomicBool,
    /// The kind of the ingress qdisc, and whether we made it; `None`: there is none at present.
    pub(super) qdisc: Mutex<Option<(String, bool)>>,
}

impl Around {
    pub(super) fn front(&self) -> Vec<InFront> {
        lock(&self.front).clone()
    }

    /// Says who is in front now.
    pub(super) fn set_front(&self, front: Vec<InFront>) {
        *lock(&self.front) = front;
    }

    /// Whether rules in the NIC would be in front of these.
    pub(super) fn would_overtake(front: &[InFront]) -> bool {
        front.iter().any(|f| !f.in_nic)
    }

    /// Rules in the NIC would be in front of somebody: from now on there are to be none.
    pub(super) fn is_overtaken(&self) -> bool {
        self.overtaken.load(Ordering::Acquire)
    }

    pub(super) fn set_overtaken(&self, yes: bool) {
        self.overtaken.store(yes, Ordering::Release);
    }
}

impl Plan {
    pub(super) fn new(
        instance: Instance,
        (found, capabilities): (Found, Capabilities),
        batch: usize,
        qdisc: QdiscKind,
    ) -> Self {
        let around = Around::default();
        *lock(&around.qdisc) = Some((found.qdisc_kind.clone(), found.made_qdisc));
        Self { instance, found, capabilities, batch, qdisc, nic_said: Mutex::default(), around }
    }

    pub(super) fn can_offload(&self, flow: &Flow) -> Result<(), Rejection> {
        flow.check_netdevs()?;
        let (from, to) = (&flow.matches.tuple, &flow.forward.tuple);
        if from.is_ipv6() != to.is_ipv6() || from.proto() != to.proto() {
            return Err(Rejection::with_detail(
                Reason::Unsupported,
                "the address family or the protocol changes on the way",
            ));
        }
        let found = &self.found;
        if found.mode == Mode::Hardware && self.around.is_overtaken() {
            return Err(Rejection::with_detail(
                Reason::OthersInFront,
                "rules of this port are in the NIC only: see `ctoffload port show` for who is in front in software",
            ));
        }
        if found.mode == Mode::Hardware {
            flow.check_egress("rules of this port, which are in the NIC only,")?;
        }
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
        if needs_programs(flow)
            && self.is_for_software(flow)
            && let Err(why) = found.rule_programs()
        {
            let reason = if flow.has_nat() { Reason::NatChecksum } else { Reason::Unsupported };
            return Err(Rejection::with_detail(reason, why));
        }
        // In the kernel's or the driver's words.
        self.capabilities.refusal(flow).map_or(Ok(()), Err)
    }

    /// True when the flow's rule is kept out of hardware from the start: what it needs is told apart
    /// in software only, or somebody is in front there, or where the packets leave.
    pub(super) fn is_for_software(&self, flow: &Flow) -> bool {
        !self.found.mode.has_hardware()
            || self.around.is_overtaken()
            || flow.forward.egress_decides
            || flow.may_exceed_mtu()
            || (flow.matches.vlan.is_some() && !self.found.tagged_in_hw)
    }

    /// The form of a flow's rule. One that needs programs in software is either for hardware or for
    /// software; `software` asks for the latter.
    pub(super) fn form(&self, flow: &Flow, software: bool) -> Form<'_> {
        let form = |flags, nat, header| Form {
            flags,
            nat,
            header,
            percpu_stats: self.found.percpu_stats(flags),
        };
        if !needs_programs(flow) {
            let flags = if software { TCA_CLS_FLAGS_SKIP_HW } else { self.found.mode.flags() };
            return form(flags, None, None);
        }
        match self.found.rule_programs() {
            Ok(programs) if software => {
                let nat = flow.has_nat().then(|| {
                    let family = Family::of(&flow.matches);
                    let (before, after) = programs.nat(family, flow.matches.tuple.proto());
                    NatForm::Software { before, after }
                });
                let header = flow.is_routed_ipv4().then(|| programs.header());
                form(TCA_CLS_FLAGS_SKIP_HW, nat, header)
            }
            _ => form(TCA_CLS_FLAGS_SKIP_SW, flow.has_nat().then_some(NatForm::Hardware), None),
        }
    }

    /// Remembers why a rule is in software only.
    pub(super) fn nic_refused(&self, words: &str) {
        let mut said = lock(&self.nic_said);
        if said.as_deref() != Some(words) {
            info!("in software only: {words}");
            *said = Some(words.into());
        }
    }

    /// Whether the NIC has a rule that the kernel has just taken, where that is known at once.
    pub(super) fn in_hw(&self, flow: &Flow, software: bool) -> Option<bool> {
        match self.found.mode {
            Mode::Software => Some(false),
            Mode::Hardware => Some(true),
            Mode::Both if software => Some(false),
            Mode::Both if needs_programs(flow) => Some(true),
            Mode::Both => None,
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in a completion leaves the state whole: see `Writer::send`.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
