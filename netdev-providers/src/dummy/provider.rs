//! The provider of one netdev.

use super::handle::DummyClass;
use super::state::{Call, State, complete};
use crate::contract::flow::Flow;
use crate::contract::operation::Operation;
use crate::contract::provider::{Fault, Leftover, Observed, Provider, Repaired, RuleReport};
use crate::contract::reason::Rejection;
use crate::contract::types::{Generation, Ifindex};

pub(super) struct Dummy {
    class: DummyClass,
    ifindex: Ifindex,
    generation: Generation,
}

impl Dummy {
    pub(super) const fn new(class: DummyClass, ifindex: Ifindex, generation: Generation) -> Self {
        Self { class, ifindex, generation }
    }

    fn check_bound(&self, state: &mut State, call: Call) -> bool {
        let bound = state.port(self.ifindex, self.generation).is_some();
        if !bound {
            state.violation(format!("{call:?} on {} after release", self.ifindex));
        }
        bound
    }
}

impl Provider for Dummy {
    fn can_offload(&self, _flow: &Flow) -> Result<(), Rejection> {
        self.class.enter(Call::CanOffload, Some(self.ifindex));
        self.class.state().shape_refusal.clone().map_or(Ok(()), Err)
    }

    fn submit(&self, batch: Vec<Operation>) {
        self.class.enter(Call::Submit, Some(self.ifindex));
        let decided = self.class.state().submit(self.ifindex, self.generation, batch);
        self.class.come_back(Call::Submit, self.ifindex);
        complete(decided);
    }

    fn repair(&self) -> Repaired {
        self.submit(Vec::new());
        let emptied = self.class.state().emptied.remove(&self.ifindex);
        if emptied { Repaired::RulesGone } else { Repaired::AsItWas }
    }

    fn in_front(&self) -> Vec<String> {
        self.class.state().in_front.clone()
    }

    fn observe(&self) -> Result<Observed, Fault> {
        self.class.enter(Call::Observe, Some(self.ifindex));
        let mut state = self.class.state();
        self.check_bound(&mut state, Call::Observe);
        let foreign = state.foreign;
        let leftovers = state.port(self.ifindex, self.generation).map_or_else(Vec::new, |p| {
            p.left()
                .map(|r| Leftover {
                    rule: r.rule,
                    cookie: r.cookie,
                    tuple: Some(r.flow.matches.tuple),
                    counters: r.counters,
                })
                .collect()
        });
        Ok(Observed { leftovers, foreign })
    }

    fn usage(&self, report: &mut dyn FnMut(RuleReport)) -> Result<(), Fault> {
        self.class.enter(Call::Usage, Some(self.ifindex));
        let (reports, fault) = {
            let mut state = self.class.state();
            self.check_bound(&mut state, Call::Usage);
            let (fault, in_hw) = (state.usage_fault.clone(), state.in_hw);
            let reports: Vec<RuleReport> = state
                .port(self.ifindex, self.generation)
                .into_iter()
                .flat_map(|p| p.rules())
                .map(|r| RuleReport { cookie: r.cookie, rule: r.rule, counters: r.counters, in_hw })
                .collect();
            (reports, fault)
        };
        self.class.come_back(Call::Usage, self.ifindex);
        let n = if fault.is_some() { reports.len() / 2 } else { reports.len() };
        reports.into_iter().take(n).for_each(report);
        fault.map_or(Ok(()), Err)
    }

    fn flush(&self) -> Result<u64, Fault> {
        self.class.enter(Call::Flush, Some(self.ifindex));
        let mut state = self.class.state();
        if !self.check_bound(&mut state, Call::Flush) {
            return Ok(0);
        }
        if state.waiting.iter().any(|w| w.pending.ifindex == self.ifindex) {
            state.violation(format!("flush of {} with operations in flight", self.ifindex));
        }
        if let Some(fault) = &state.flush_fault {
            return Err(fault.clone());
        }
        Ok(state.port(self.ifindex, self.generation).map_or(0, |p| p.clear()))
    }

    fn outlives(&self) -> bool {
        self.class.state().outlives
    }

    fn release(&self) -> Result<(), Fault> {
        self.class.enter(Call::Release, Some(self.ifindex));
        let mut state = self.class.state();
        if self.check_bound(&mut state, Call::Release) {
            state.ports.remove(&self.ifindex);
        }
        Ok(())
    }

    fn hardware_suspect(&self) {
        self.class.state().suspected += 1;
    }

    fn describe(&self) -> String {
        self.class.enter(Call::Describe, Some(self.ifindex));
        "in memory".into()
    }
}
