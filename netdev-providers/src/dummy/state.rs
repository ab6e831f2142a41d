//! What the backend holds: ports, rules, pending operations, and what it was told to do wrong.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::time::Duration;

use crate::contract::flow::{Flow, FlowMatch, Tracked};
use crate::contract::operation::{Done, Operation, Outcome, Request, Ticket};
use crate::contract::provider::{Counters, Fault};
use crate::contract::reason::{Reason, Rejection};
use crate::contract::types::{Cookie, Generation, Ifindex, Instance, RuleId};

/// A rule that is installed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DummyRule {
    /// The name the engine got for it.
    pub rule: RuleId,
    /// The mark the engine gave it.
    pub cookie: Cookie,
    /// What was asked for.
    pub flow: Flow,
    /// What the test says it carried.
    pub counters: Counters,
    /// How often `Established` was delivered.
    pub established: u32,
}

/// An operation that has not completed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pending {
    /// The netdev whose provider has it.
    pub ifindex: Ifindex,
    /// What was asked for.
    pub request: Request,
    /// When it completes by the clock of the test.
    pub due: Duration,
}

/// Calls of a class or a provider, as they can be made to panic or to hang.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    /// `init`
    Init,
    /// `deinit`
    Deinit,
    /// `bind`
    Bind,
    /// `bind_in_hardware`
    BindInHardware,
    /// `can_offload`
    CanOffload,
    /// `submit`
    Submit,
    /// `observe`
    Observe,
    /// `usage`
    Usage,
    /// `flush`
    Flush,
    /// `release`
    Release,
    /// `describe`
    Describe,
}

/// A port, from bind to release.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) generation: Generation,
    pub(super) instance: Instance,
    rules: BTreeMap<u64, DummyRule>,
    /// Of an engine that died.
    left: BTreeMap<u64, DummyRule>,
    by_match: HashMap<FlowMatch, u64>,
    by_cookie: HashMap<Cookie, u64>,
    next_rule: u64,
    /// Names of rules that are gone: the one that went last is given first, so that whoever takes a
    /// name for a rule is found out.
    free: Vec<u64>,
    /// When the operations that it was given are done, as far as it takes its time for each.
    busy_until: Duration,
    pub(super) unplugged: bool,
}

impl Port {
    pub(super) fn new(
        generation: Generation,
        instance: Instance,
        left: impl IntoIterator<Item = DummyRule>,
    ) -> Self {
        let left: BTreeMap<_, _> =
            (1..).zip(left).map(|(n, rule)| (n, DummyRule { rule: RuleId(n), ..rule })).collect();
        Self {
            generation,
            instance,
            rules: BTreeMap::new(),
            by_match: HashMap::new(),
            by_cookie: HashMap::new(),
            next_rule: 1 + left.len() as u64,
            left,
            free: Vec::new(),
            busy_until: Duration::ZERO,
            unplugged: false,
        }
    }

    pub(super) fn leave(&mut self, rule: DummyRule) {
        let name = self.next_rule;
        self.next_rule += 1;
        self.left.insert(name, DummyRule { rule: RuleId(name), ..rule });
    }

    pub(super) fn left(&self) -> impl Iterator<Item = &DummyRule> {
        self.left.values()
    }

    fn adopt(&mut self, found: RuleId, cookie: Cookie, flow: Flow, in_hw: Option<bool>) -> Outcome {
        match self.left.remove(&found.0) {
            Some(rule) if rule.flow == flow => {
                self.by_match.insert(flow.matches, found.0);
                self.by_cookie.insert(cookie, found.0);
                self.rules.insert(found.0, DummyRule { cookie, ..rule });
                Ok(Done::added(found, in_hw))
            }
            _ => Err(Reason::Conflict.into()),
        }
    }

    pub(super) fn rules(&self) -> impl Iterator<Item = &DummyRule> {
        self.rules.values()
    }

    pub(super) fn by_cookie(&mut self, cookie: Cookie) -> Option<&mut DummyRule> {
        self.rules.get_mut(self.by_cookie.get(&cookie)?)
    }

    pub(super) fn reset_counters(&mut self) {
        self.rules.values_mut().for_each(|r| r.counters = Counters::default());
    }

    pub(super) fn remove(&mut self, rule: RuleId) -> bool {
        if self.left.remove(&rule.0).is_some() {
            self.free.push(rule.0);
            return true;
        }
        let Some(r) = self.rules.remove(&rule.0) else { return false };
        self.by_match.remove(&r.flow.matches);
        self.by_cookie.remove(&r.cookie);
        self.free.push(rule.0);
        true
    }

    /// Removes every rule and returns how many there were.
    pub(super) fn clear(&mut self) -> u64 {
        let left = std::mem::take(&mut self.left);
        self.by_match.clear();
        self.by_cookie.clear();
        let rules = std::mem::take(&mut self.rules);
        self.free.extend(left.into_keys().chain(rules.keys().copied()));
        rules.len() as u64
    }

    fn add(&mut self, cookie: Cookie, flow: Flow, capacity: usize) -> Result<RuleId, Rejection> {
        if self.by_match.contains_key(&flow.matches)
            || self.left.values().any(|r| r.flow.matches == flow.matches)
        {
            return Err(Reason::Conflict.into());
        }
        if self.rules.len() + self.left.len() >= capacity {
            return Err(Reason::TableFull.into());
        }
        let rule = RuleId(self.free.pop().unwrap_or(self.next_rule));
        self.next_rule = self.next_rule.max(rule.0 + 1);
        self.by_match.insert(flow.matches, rule.0);
        self.by_cookie.insert(cookie, rule.0);
        let counters = Counters::default();
        self.rules.insert(rule.0, DummyRule { rule, cookie, flow, counters, established: 0 });
        Ok(rule)
    }
}

pub(super) struct Waiting {
    pub(super) pending: Pending,
    pub(super) generation: Generation,
    pub(super) ticket: Ticket,
}

pub(super) struct State {
    pub(super) now: Duration,
    pub(super) latency: Option<Duration>,
    /// How long each operation of a netdev takes.
    pub(super) service: BTreeMap<Ifindex, Duration>,
    pub(super) capacity: usize,
    pub(super) in_hw: Option<bool>,
    pub(super) nic_said: Option<Box<str>>,
    pub(super) ports: BTreeMap<Ifindex, Port>,
    /// What an engine that died has left, until the netdev is bound; and what others have there.
    pub(super) left: BTreeMap<Ifindex, Vec<DummyRule>>,
    pub(super) foreign: u64,
    pub(super) outlives: bool,
    /// Who is in front of every netdev's rules; netdevs whose rules others have removed, until that is told.
    pub(super) in_front: Vec<String>,
    pub(super) emptied: BTreeSet<Ifindex>,
    /// In the order of submission.
    pub(super) waiting: VecDeque<Waiting>,
    in_flight: HashSet<(Ifindex, Cookie)>,
    /// How many completions are still to succeed before the next failure, and the failure.
    pub(super) failures: VecDeque<(u64, Rejection)>,
    pub(super) panics: Vec<(Call, u64)>,
    pub(super) hanging: HashSet<(Call, Option<Ifindex>)>,
    pub(super) late: HashSet<(Call, Option<Ifindex>)>,
    /// How many calls are being held.
    pub(super) held: usize,
    pub(super) shape_refusal: Option<Rejection>,
    pub(super) decline: BTreeMap<Option<Ifindex>, String>,
    /// Netdevs whose NIC has its rules.
    pub(super) hardware: BTreeSet<Ifindex>,
    /// How many binds fail, and how.
    pub(super) bind_fault: Option<(u32, Fault)>,
    pub(super) init_fault: Option<Fault>,
    pub(super) flush_fault: Option<Fault>,
    pub(super) usage_fault: Option<Fault>,
    pub(super) initialised: bool,
    pub(super) requests: u64,
    pub(super) suspected: u64,
    pub(super) violations: Vec<String>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            now: Duration::ZERO,
            latency: None,
            service: BTreeMap::new(),
            capacity: usize::MAX,
            in_hw: Some(true),
            nic_said: None,
            ports: BTreeMap::new(),
            left: BTreeMap::new(),
            foreign: 0,
            outlives: false,
            in_front: Vec::new(),
            emptied: BTreeSet::new(),
            waiting: VecDeque::new(),
            in_flight: HashSet::new(),
            failures: VecDeque::new(),
            panics: Vec::new(),
            hanging: HashSet::new(),
            late: HashSet::new(),
            held: 0,
            shape_refusal: None,
            decline: BTreeMap::new(),
            hardware: BTreeSet::new(),
            bind_fault: None,
            init_fault: None,
            flush_fault: None,
            usage_fault: None,
            initialised: false,
            requests: 0,
            suspected: 0,
            violations: Vec::new(),
        }
    }
}

/// An operation whose outcome is decided, to be completed once the lock is released.
pub(super) type Decided = (Ticket, Outcome);

/// Hands out the results, with nothing locked: whoever gets one may call back. Returns how many.
pub(super) fn complete(decided: Vec<Decided>) -> usize {
    let n = decided.len();
    for (ticket, outcome) in decided {
        ticket.complete(outcome);
    }
    n
}

impl State {
    pub(super) fn violation(&mut self, what: String) {
        self.violations.push(what);
    }

    /// The port, if this life of it is bound.
    pub(super) fn port(&mut self, ifindex: Ifindex, generation: Generation) -> Option<&mut Port> {
        self.ports.get_mut(&ifindex).filter(|p| p.generation == generation)
    }

    /// True when this call is to panic.
    pub(super) fn panics_now(&mut self, call: Call) -> bool {
        let Some(at) = self.panics.iter().position(|(c, _)| *c == call) else { return false };
        if self.panics[at].1 == 0 {
            self.panics.remove(at);
            return true;
        }
        self.panics[at].1 -= 1;
        false
    }

    /// Takes a batch in, and decides what completes at once.
    pub(super) fn submit(
        &mut self,
        ifindex: Ifindex,
        generation: Generation,
        batch: Vec<Operation>,
    ) -> Vec<Decided> {
        self.requests += batch.len() as u64;
        let bound = self.port(ifindex, generation).is_some();
        if !bound {
            self.violation(format!("submit on {ifindex} after release"));
        }
        for Operation { request, ticket } in batch {
            let due = self.due(ifindex, generation);
            let pending = Pending { ifindex, request, due };
            self.check_promises(&pending);
            self.waiting.push_back(Waiting { pending, generation, ticket });
        }
        if self.latency.is_none() { self.decide_due() } else { Vec::new() }
    }

    /// When an operation that is submitted now completes.
    fn due(&mut self, ifindex: Ifindex, generation: Generation) -> Duration {
        let (now, latency) = (self.now, self.latency.unwrap_or_default());
        let service = self.service.get(&ifindex).copied();
        match (service, self.port(ifindex, generation)) {
            (Some(service), Some(port)) => {
                port.busy_until = port.busy_until.max(now).saturating_add(service);
                port.busy_until.saturating_add(latency)
            }
            _ => now.saturating_add(latency),
        }
    }

    fn check_promises(&mut self, new: &Pending) {
        let cookie = new.request.cookie();
        if !self.in_flight.insert((new.ifindex, cookie)) {
            self.violation(format!("two operations on {cookie} of {} in flight", new.ifindex));
        }
        let Some(port) = self.ports.get(&new.ifindex) else { return };
        let of_a_dead_one =
            matches!(new.request, Request::Delete { rule, .. } if port.left.contains_key(&rule.0));
        if of_a_dead_one {
            return;
        }
        if cookie.instance != port.instance {
            self.violation(format!("{cookie} is of another instance"));
        } else if matches!(new.request, Request::Add { .. }) && port.by_cookie.contains_key(&cookie)
        {
            self.violation(format!("{cookie} added on {} although it is there", new.ifindex));
        }
    }

    /// Decides everything that is due by the clock, in the order of submission.
    pub(super) fn decide_due(&mut self) -> Vec<Decided> {
        let mut decided = Vec::new();
        let mut later = VecDeque::new();
        while let Some(w) = self.waiting.pop_front() {
            if w.pending.due <= self.now {
                decided.push(self.decide(w));
            } else {
                later.push_back(w);
            }
        }
        self.waiting = later;
        decided
    }

    /// What waits on this netdev for nothing but its turn is due now, and decided.
    pub(super) fn hurry(&mut self, ifindex: Ifindex) -> Vec<Decided> {
        if let Some(port) = self.ports.get_mut(&ifindex) {
            port.busy_until = Duration::ZERO;
        }
        let now = self.now;
        for w in self.waiting.iter_mut().filter(|w| w.pending.ifindex == ifindex) {
            w.pending.due = w.pending.due.min(now);
        }
        self.decide_due()
    }

    /// Takes the operation at this place out, without a result.
    pub(super) fn lose(&mut self, n: usize) -> Option<Waiting> {
        let w = self.waiting.remove(n)?;
        self.in_flight.remove(&(w.pending.ifindex, w.pending.request.cookie()));
        Some(w)
    }

    /// Carries one operation out.
    pub(super) fn decide(&mut self, w: Waiting) -> Decided {
        let Waiting { pending, generation, ticket } = w;
        self.in_flight.remove(&(pending.ifindex, pending.request.cookie()));
        if let Some((skip, _)) = self.failures.front_mut() {
            if *skip > 0 {
                *skip -= 1;
            } else if let Some((_, why)) = self.failures.pop_front() {
                return (ticket, Err(why));
            }
        }
        let (capacity, in_hw, words) = (self.capacity, self.in_hw, self.nic_said.clone());
        let Pending { ifindex, request, .. } = pending;
        let mut unknown = None;
        let outcome = match self.port(ifindex, generation) {
            None => Err(Reason::NetdevGone.into()),
            Some(port) if port.unplugged => match request {
                Request::Delete { .. } => Ok(Done::Deleted),
                _ => Err(Reason::NetdevGone.into()),
            },
            Some(port) => match request {
                Request::Add { cookie, flow } => port
                    .add(cookie, *flow, capacity)
                    .map(|rule| Done::Added { rule, in_hw, nic_said: words }),
                Request::Track { .. } => Err(Tracked::unsupported()),
                Request::Adopt { found, cookie, flow } => port.adopt(found, cookie, *flow, in_hw),
                Request::Delete { rule, cookie } => {
                    match port.rules.get(&rule.0) {
                        Some(r) if r.cookie == cookie => {
                            port.remove(rule);
                        }
                        Some(_) => unknown = Some((cookie, "is another's")),
                        // Somebody else may have removed it: ENOENT. Or an engine that died left it.
                        None => {
                            port.remove(rule);
                        }
                    }
                    Ok(Done::Deleted)
                }
                Request::Established { rule, cookie } => {
                    match port.rules.get_mut(&rule.0) {
                        Some(r) => {
                            r.established += 1;
                            if r.established > 1 {
                                unknown = Some((cookie, "was established twice"));
                            }
                        }
                        None => unknown = Some((cookie, "was established but is not installed")),
                    }
                    Ok(Done::Noted)
                }
            },
        };
        if let Some((cookie, what)) = unknown {
            self.violation(format!("{cookie} on {ifindex} {what}"));
        }
        (ticket, outcome)
    }
}
