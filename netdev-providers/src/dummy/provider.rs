//! The provider of one netdev.

use super::handle::DummyClass;
use super::state::{Call, State, complete};
use crate::contract::flow::Flow;
use crate::contract::operation::Operation;
use crate::contract::provider::{Fault, Leftover, Observed, Provider, RuleReport};
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

    fn release(&self) -> Result<(), Fault> {
        self.class.enter(Call::Release, Some(self.ifindex));
        let mut state = self.class.state();
        if self.check_bound(&mut state, Call::Release) {
            state.ports.remove(&self.ifindex);
        }
        Ok(())
    }

    fn describe(&self) -> String {
        self.class.enter(Call::Describe, Some(self.ifindex));
        "in memory".into()
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;
    use std::sync::{Arc, mpsc};
    use std::time::Duration;

    use super::*;
    use crate::contract::class::{BindError, ProviderClass};
    use crate::contract::flow::{Above, FlowMatch, Forward};
    use crate::contract::operation::{Done, Outcome, Request, Ticket};
    use crate::contract::reason::Reason;
    use crate::contract::types::{Cookie, Direction, Epoch, Instance, Netdev, RuleId, Zone};

    const INSTANCE: Instance = Instance(NonZeroU32::MIN);

    fn netdev(ifindex: u32) -> Netdev {
        Netdev {
            ifindex: Ifindex::new(ifindex).unwrap(),
            generation: Generation::new(1).unwrap(),
            name: format!("eth{ifindex}"),
            hw_flags: Default::default(),
        }
    }

    fn cookie(n: u64) -> Cookie {
        Cookie { instance: INSTANCE, epoch: Epoch(n), direction: Direction::Original }
    }

    fn add(n: u64) -> Request {
        let tuple = format!("tcp 192.0.2.1:{n} > 198.51.100.2:80").parse().unwrap();
        Request::Add {
            cookie: cookie(n),
            flow: Box::new(Flow {
                zone: Zone(0),
                direction: Direction::Original,
                ingress_mtu: 1500,
                matches: FlowMatch { eth_dst: None, vlan: None, tuple },
                forward: Forward {
                    egress: Ifindex::new(9).unwrap(),
                    vlan: None,
                    mtu: 1500,
                    tuple,
                    macs: None,
                },
                above: Above::default(),
            }),
        }
    }

    type Results = mpsc::Receiver<(usize, Outcome)>;

    fn submit(provider: &dyn Provider, requests: Vec<Request>) -> Results {
        let (tx, rx) = mpsc::channel();
        let batch = requests.into_iter().enumerate().map(|(i, request)| {
            let tx = tx.clone();
            let ticket = Ticket::new(Box::new(move |o: Outcome| drop(tx.send((i, o)))));
            Operation { request, ticket }
        });
        provider.submit(batch.collect());
        rx
    }

    fn bound(ifindex: u32) -> (DummyClass, Arc<dyn Provider>) {
        let class = DummyClass::default();
        class.init().unwrap();
        let provider = class.bind(&netdev(ifindex), INSTANCE).unwrap();
        (class, provider)
    }

    #[test]
    fn rules_come_are_counted_and_go() {
        let (class, p) = bound(3);
        let ifindex = Ifindex::new(3).unwrap();
        let got: Vec<_> = submit(&*p, vec![add(1), add(2), add(2)]).iter().collect();
        assert_eq!(got[0], (0, Ok(Done::added(RuleId(1), Some(true)))));
        assert_eq!(got[2].1.as_ref().unwrap_err().reason, Reason::Conflict);
        assert_eq!(class.rules(ifindex).len(), 2);
        assert!(class.carry(ifindex, cookie(2), 3, 300));
        assert!(!class.carry(ifindex, cookie(7), 3, 300));
        let mut reports = Vec::new();
        p.usage(&mut |r| reports.push((r.cookie, r.counters.packets))).unwrap();
        assert_eq!(reports, [(cookie(1), 0), (cookie(2), 3)]);
        let delete = Request::Delete { rule: RuleId(1), cookie: cookie(1) };
        assert_eq!(submit(&*p, vec![delete.clone()]).recv().unwrap().1, Ok(Done::Deleted));
        assert_eq!(submit(&*p, vec![delete]).recv().unwrap().1, Ok(Done::Deleted), "ENOENT");
        assert_eq!(p.flush().unwrap(), 1);
        p.release().unwrap();
        class.deinit();
        // The second add(2) stood in one batch with the first: that is what the promise forbids.
        assert_eq!(class.violations().len(), 1, "{:?}", class.violations());
    }

    #[test]
    fn pending_operations_complete_by_the_clock_or_out_of_order() {
        let (class, p) = bound(3);
        class.set_latency(Some(Duration::from_millis(5)));
        let results = submit(&*p, vec![add(1), add(2), add(3)]);
        assert_eq!(class.pending().len(), 3);
        assert_eq!(class.advance(Duration::from_millis(4)), 0);
        assert!(class.release_nth(1));
        assert_eq!(results.recv().unwrap().0, 1);
        assert!(class.lose_nth(1));
        assert_eq!(results.recv().unwrap().1.unwrap_err().reason, Reason::ProviderFault);
        assert_eq!(class.advance(Duration::from_millis(1)), 1);
        assert_eq!(results.recv().unwrap().0, 0);
        assert_eq!(class.rules(Ifindex::new(3).unwrap()).len(), 2);
    }

    #[test]
    fn a_slow_netdev_takes_its_time_for_each_operation_and_others_do_not_wait_for_it() {
        let (class, p) = bound(3);
        let fast = class.bind(&netdev(4), INSTANCE).unwrap();
        let slow = Ifindex::new(3).unwrap();
        class.set_service_time(slow, Some(Duration::from_millis(4)));
        let results = submit(&*p, vec![add(1), add(2), add(3)]);
        assert_eq!(submit(&*fast, vec![add(1)]).try_iter().count(), 1);
        assert_eq!(results.try_iter().count(), 0);
        assert_eq!(class.advance(Duration::from_millis(9)), 2);
        assert_eq!(results.try_iter().count(), 2);
        class.set_service_time(slow, None);
        assert_eq!(results.try_iter().count(), 1, "what waited for its turn is done");
    }

    #[test]
    fn the_name_of_a_rule_that_is_gone_is_the_next_ones() {
        let (class, p) = bound(3);
        let rule_of = |n| match submit(&*p, vec![add(n)]).recv().unwrap().1.unwrap() {
            Done::Added { rule, .. } => rule,
            other => panic!("{other:?}"),
        };
        let (first, second) = (rule_of(1), rule_of(2));
        for (rule, n) in [(first, 1), (second, 2)] {
            let cookie = add(n).cookie();
            submit(&*p, vec![Request::Delete { rule, cookie }]);
        }
        assert_eq!((rule_of(3), rule_of(4)), (second, first), "last in, first out");
        assert!(class.violations().is_empty(), "{:?}", class.violations());
    }

    #[test]
    fn a_late_call_comes_back_with_what_was_true_when_it_began() {
        let (class, p) = bound(3);
        submit(&*p, vec![add(1)]);
        class.be_late(Call::Usage, Ifindex::new(3));
        let sweep = std::thread::spawn({
            let p = Arc::clone(&p);
            move || {
                let mut reports = Vec::new();
                p.usage(&mut |r| reports.push(r)).unwrap();
                reports.len()
            }
        });
        while class.held() == 0 {
            std::thread::yield_now();
        }
        submit(&*p, vec![add(2)]);
        class.let_go();
        assert_eq!(sweep.join().unwrap(), 1);
    }

    #[test]
    fn it_fails_declines_and_panics_on_demand() {
        let (class, p) = bound(3);
        class.fail_after(1, Reason::Busy);
        class.set_capacity(1);
        let reasons: Vec<_> = submit(&*p, vec![add(1), add(2), add(3)])
            .iter()
            .map(|(_, o)| o.err().map(|e| e.reason))
            .collect();
        assert_eq!(reasons, [None, Some(Reason::Busy), Some(Reason::TableFull)]);
        class.panic_after(Call::Usage, 1);
        p.usage(&mut |_| ()).unwrap();
        let usage = std::panic::AssertUnwindSafe(|| p.usage(&mut |_| ()));
        assert!(std::panic::catch_unwind(usage).is_err());
        class.decline(Ifindex::new(4), "not today");
        assert!(matches!(class.bind(&netdev(4), INSTANCE), Err(BindError::Declined(_))));
        class.fail_init(Some(Fault::new("no device")));
        assert!(class.init().is_err());
        class.unplug(Ifindex::new(3).unwrap());
        let outcome = submit(&*p, vec![add(9)]).recv().unwrap().1;
        assert_eq!(outcome.unwrap_err().reason, Reason::NetdevGone);
    }

    #[test]
    fn broken_promises_are_noted() {
        let (class, p) = bound(3);
        class.set_latency(Some(Duration::MAX));
        let _results = submit(&*p, vec![add(1)]);
        let _ = p.flush();
        assert_eq!(class.violations().len(), 1);
        p.release().unwrap();
        let _ = p.flush();
        assert_eq!(class.violations().len(), 2);
    }

    #[test]
    fn two_classes_know_nothing_of_each_other() {
        let (a, p) = bound(3);
        let b = DummyClass::new("other");
        submit(&*p, vec![add(1)]);
        assert_eq!((a.requests(), b.requests()), (1, 0));
        assert!(b.ports().is_empty());
    }
}
