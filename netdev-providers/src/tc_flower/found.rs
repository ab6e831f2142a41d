//! What bind found out about a netdev, and the cookies of the guards that it put up.

use std::sync::Arc;

use super::bpf::Programs;
use super::guard;
use super::prios::{Prios, Use};
use super::uapi::*;
use crate::contract::types::{Cookie, Instance, RuleId};

/// Where the rules of a port run. Resolved at bind: hardware only counts where the NIC has taken a
/// guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Software,
    Hardware,
    Both,
}

impl Mode {
    pub(super) const fn flags(self) -> u32 {
        match self {
            Self::Software => TCA_CLS_FLAGS_SKIP_HW,
            Self::Hardware => TCA_CLS_FLAGS_SKIP_SW,
            Self::Both => TCA_CLS_FLAGS_VERBOSE,
        }
    }

    pub(super) const fn has_hardware(self) -> bool {
        !matches!(self, Self::Software)
    }

    pub(super) const fn has_software(self) -> bool {
        !matches!(self, Self::Hardware)
    }
}

/// What bind found out.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) prios: Prios,
    pub(super) mode: Mode,
    /// Why there is no hardware, where some was wished for.
    pub(super) no_hardware: Option<String>,
    /// `clsact` or `ingress`.
    pub(super) qdisc_kind: String,
    pub(super) made_qdisc: bool,
    /// Whether actions that run in software count per processor.
    pub(super) percpu_stats: bool,
    /// Those of guards and rules, or why they could not be loaded.
    pub(super) programs: Result<Arc<Programs>, String>,
    /// Why rules in software have none, where that is so.
    pub(super) act_bpf: Result<(), String>,
    /// Flows' rules of dead engines, which go on forwarding.
    pub(super) left: Vec<RuleId>,
    /// Why flows with VLAN tags are refused, where they are.
    pub(super) vlan: Result<(), String>,
    /// The NIC takes the guards for tagged frames too.
    pub(super) tagged_in_hw: bool,
    /// Why packets that are too long for the way out cannot be told apart, where that is so.
    pub(super) length: Result<(), String>,
    /// Priority tags are taken off.
    pub(super) tags: bool,
}

impl Found {
    /// Whether guards stand at a prio of this use.
    pub(super) const fn has_guards_at(&self, what: Use, family: Family) -> bool {
        let tagged = family.is_tagged();
        match what {
            Use::HardwareGuards => self.mode.has_hardware() && (!tagged || self.tagged_in_hw),
            Use::SoftwareGuards => self.mode.has_software() && (!tagged || self.vlan.is_ok()),
            Use::Flows => false,
        }
    }

    /// Whether the actions of a rule with these flags count per processor. Where they never run there
    /// is nothing to contend for, and most of what adding a rule costs to save.
    pub(super) const fn percpu_stats(&self, flags: u32) -> bool {
        self.percpu_stats && flags & TCA_CLS_FLAGS_SKIP_SW == 0
    }

    /// The programs that rules in software have.
    pub(super) fn rule_programs(&self) -> Result<&Programs, &str> {
        let programs = self.programs.as_deref().map_err(String::as_str)?;
        self.act_bpf.as_ref().map(|()| programs).map_err(String::as_str)
    }

    /// The families whose guards stand at a prio of this use.
    pub(super) fn guarded(&self, what: Use) -> impl Iterator<Item = Family> {
        let found = Family::ALL.map(|f| (f, self.has_guards_at(what, f)));
        found.into_iter().filter_map(|(f, has)| has.then_some(f))
    }
}

/// What the cookies of guards say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guards {
    pub(super) instance: Instance,
    pub(super) made_qdisc: bool,
}

impl Guards {
    pub(super) fn cookie(self) -> Cookie {
        guard::cookie(self.instance, self.made_qdisc)
    }
}

#[cfg(test)]
impl Found {
    /// Of a netdev that takes everything there, in this mode.
    pub(super) fn everything(mode: Mode) -> Self {
        let programs = super::bpf::tests::not_loaded();
        Self {
            prios: Prios::new(0xc100).expect("it fits"),
            mode,
            no_hardware: None,
            qdisc_kind: "clsact".to_owned(),
            made_qdisc: true,
            percpu_stats: true,
            programs: Ok(Arc::new(programs)),
            act_bpf: Ok(()),
            left: Vec::new(),
            vlan: Ok(()),
            tagged_in_hw: mode.has_hardware(),
            length: Ok(()),
            tags: false,
        }
    }

    /// The same with a difference.
    pub(super) fn but(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}
