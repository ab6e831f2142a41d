//! Our contestant: the provider, called as a port's writer calls it.

use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use netdev_providers::tc_flower::TcFlowerClass;
use netdev_providers::{
    Done, Flow, Ifindex, Instance, Operation, Outcome, Provider, ProviderClass, Request, RuleId,
    Ticket,
};

use super::rules;
use super::world;

/// What the engine hands over at once.
const BATCH: usize = 256;

pub(crate) struct Ours {
    provider: Arc<dyn Provider>,
    instance: Instance,
    egress: Ifindex,
}

/// Operations made beforehand: making them is the engine's work, not the provider's.
pub(crate) struct Prepared {
    batches: Vec<Vec<Operation>>,
    results: mpsc::Receiver<(u32, Outcome)>,
    count: usize,
}

impl Prepared {
    /// The same, handed over one operation at a time.
    #[allow(dead_code, reason = "not in every suite that has this file")]
    pub(crate) fn one_by_one(mut self) -> Self {
        self.batches = self.batches.into_iter().flatten().map(|op| vec![op]).collect();
        self
    }
}

impl Ours {
    pub(crate) fn bind(netdev: &str, egress: &str) -> Self {
        Self::bind_to(&TcFlowerClass::default(), netdev, egress)
    }

    pub(crate) fn bind_to(class: &dyn ProviderClass, netdev: &str, egress: &str) -> Self {
        let instance = Instance(1.try_into().expect("not 0"));
        let provider = class.bind(&world::netdev(netdev), instance);
        let provider = provider.unwrap_or_else(|e| panic!("{netdev} is not bound: {e}"));
        Self { provider, instance, egress: world::ifindex(egress) }
    }

    fn prepare(&self, requests: impl ExactSizeIterator<Item = Request>) -> Prepared {
        let (tx, results) = mpsc::channel();
        let count = requests.len();
        let mut batches = Vec::with_capacity(count / BATCH + 1);
        let mut batch = Vec::with_capacity(BATCH);
        for (n, request) in requests.enumerate() {
            let (tx, n) = (tx.clone(), u32::try_from(n).expect("few"));
            let ticket = Ticket::new(Box::new(move |outcome: Outcome| {
                let _ = tx.send((n, outcome));
            }));
            batch.push(Operation { request, ticket });
            if batch.len() == BATCH {
                batches.push(std::mem::replace(&mut batch, Vec::with_capacity(BATCH)));
            }
        }
        batches.push(batch);
        Prepared { batches, results, count }
    }

    pub(crate) fn prepare_adds(&self, count: u32) -> Prepared {
        self.prepare_adds_from(0, count)
    }

    pub(crate) fn prepare_adds_from(&self, first: u32, count: u32) -> Prepared {
        self.prepare((first..first + count).map(|n| {
            let flow: Box<Flow> = Box::new(rules::flow(n, self.egress));
            Request::Add { cookie: rules::cookie(n, self.instance), flow }
        }))
    }

    /// Adds of other rules than those that all contestants write.
    #[allow(dead_code, reason = "not in every suite that has this file")]
    pub(crate) fn prepare_adds_of(&self, count: u32, flow: fn(u32, Ifindex) -> Flow) -> Prepared {
        self.prepare((0..count).map(|n| Request::Add {
            cookie: rules::cookie(n, self.instance),
            flow: Box::new(flow(n, self.egress)),
        }))
    }

    pub(crate) fn prepare_deletes(&self, rules: &[RuleId]) -> Prepared {
        let cookies = (0..).map(|n| rules::cookie(n, self.instance));
        let requests: Vec<_> = rules
            .iter()
            .zip(cookies)
            .map(|(&rule, cookie)| Request::Delete { rule, cookie })
            .collect();
        self.prepare(requests.into_iter())
    }

    /// Hands all over and waits for the last result; how long that took, and the outcomes in order.
    pub(crate) fn run(&self, prepared: Prepared) -> (Duration, Vec<Done>) {
        let Prepared { batches, results, count } = prepared;
        let started = Instant::now();
        for batch in batches {
            self.provider.submit(batch);
        }
        // A provider that completes later does so at the latest when it is asked again.
        self.provider.submit(Vec::new());
        let took = started.elapsed();
        let mut done: Vec<(u32, Done)> = results
            .iter()
            .map(|(n, outcome)| (n, outcome.unwrap_or_else(|e| panic!("operation {n}: {e}"))))
            .collect();
        assert_eq!(done.len(), count, "every operation has a result");
        done.sort_by_key(|(n, _)| *n);
        (took, done.into_iter().map(|(_, d)| d).collect())
    }

    pub(crate) fn flush(&self) -> (Duration, u64) {
        let started = Instant::now();
        let flushed = self.provider.flush().expect("flushed");
        (started.elapsed(), flushed)
    }

    /// One sweep: how long it took and how many rules it reported.
    pub(crate) fn sweep(&self) -> (Duration, u64) {
        let started = Instant::now();
        let mut rules = 0;
        self.provider.usage(&mut |_| rules += 1).expect("a sweep");
        (started.elapsed(), rules)
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        let _ = self.provider.release();
    }
}

pub(crate) fn rule_ids(done: &[Done]) -> Vec<RuleId> {
    done.iter()
        .map(|d| match d {
            Done::Added { rule, .. } => *rule,
            other => panic!("not an add: {other:?}"),
        })
        .collect()
}
