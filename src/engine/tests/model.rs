//! A model of the engine: random operations on several workers, ports and providers, and the
//! invariants that hold whatever their order.
//!
//! What the engine does is compared with a reference that knows nothing of states: which slots were
//! sighted, which of them may be sighted again, and which connections and ports live. Every rule must
//! stand for a sight, every sight must end in a rule, in a permanent refusal, or in its being re-armed.

use std::collections::{HashMap as StdHashMap, HashSet};

use proptest::prelude::*;

use super::super::view::SlotView;
use super::*;

const WORKERS: usize = 2;
/// Classes: the first serves ports 1 and 2, the second port 3.
const PROVIDERS: usize = 2;

#[derive(Clone, Debug)]
enum Step {
    /// Worker, port, connection, reply: with the view of the ports that the worker has.
    Offer(usize, u32, u16, bool),
    Quiescent(usize),
    Offline(usize),
    Online(usize),
    End(u16),
    Retract(u16),
    FlushPort(u32),
    /// While it waits for the workers they go on offering on what they see.
    PortDel(u32, [(u32, u16, bool); WORKERS]),
    PortAdd(u32),
    // Of one of the providers:
    Release(usize, usize),
    ReleaseAll(usize),
    Lose(usize, usize),
    FailNext(usize, Reason),
    Capacity(usize, usize),
    Delay(usize, bool),
    Tick(u64),
    /// Packets on the rule of port and connection.
    Carry(u32, u16, bool),
    Sweep,
    /// A sweep reads the rules of this port, and is not done with them until the other step.
    SweepBegins(u32),
    SweepEnds,
    /// The port is deleted and added again, so many times, and sees a connection each time.
    PortAgain(u32, u32, u16),
    /// Operations of this port take their time, or do no more.
    Slow(u32, bool),
    /// Paths lead into this port from now on.
    Towards(u32),
}

fn step() -> impl Strategy<Value = Step> {
    let (port, conn, worker) = (1u32..4, 0u16..6, 0..WORKERS);
    let sight = (port.clone(), conn.clone(), any::<bool>());
    let provider = 0..PROVIDERS;
    let failure = prop_oneof![Just(Reason::Busy), Just(Reason::Refused), Just(Reason::TableFull)];
    prop_oneof![
        10 => (worker.clone(), sight.clone()).prop_map(|(w, (p, c, r))| Step::Offer(w, p, c, r)),
        2 => worker.clone().prop_map(Step::Quiescent),
        1 => worker.clone().prop_map(Step::Offline),
        1 => worker.prop_map(Step::Online),
        2 => conn.clone().prop_map(Step::End),
        1 => conn.clone().prop_map(Step::Retract),
        1 => port.clone().prop_map(Step::FlushPort),
        2 => port.clone().prop_map(Step::SweepBegins),
        2 => Just(Step::SweepEnds),
        1 => (port.clone(), prop_oneof![Just(2u32), Just(20)], conn.clone()).prop_map(|(p, n, c)| Step::PortAgain(p, n, c)),
        2 => (port.clone(), any::<bool>()).prop_map(|(p, on)| Step::Slow(p, on)),
        1 => port.clone().prop_map(Step::Towards),
        1 => (port.clone(), [sight.clone(), sight.clone()]).prop_map(|(p, s)| Step::PortDel(p, s)),
        2 => port.prop_map(Step::PortAdd),
        3 => (provider.clone(), 0usize..4).prop_map(|(c, n)| Step::Release(c, n)),
        2 => provider.clone().prop_map(Step::ReleaseAll),
        1 => (provider.clone(), 0usize..4).prop_map(|(c, n)| Step::Lose(c, n)),
        1 => (provider.clone(), failure).prop_map(|(c, r)| Step::FailNext(c, r)),
        1 => (provider.clone(), 0usize..6).prop_map(|(c, n)| Step::Capacity(c, n)),
        2 => (provider, any::<bool>()).prop_map(|(c, on)| Step::Delay(c, on)),
        1 => (1u64..40_000).prop_map(Step::Tick),
        4 => sight.prop_map(|(p, c, r)| Step::Carry(p, c, r)),
        2 => Just(Step::Sweep),
    ]
}

struct Model {
    b: Bench,
    providers: [DummyClass; PROVIDERS],
    workers: Vec<(Worker, bool)>,
    strays: Strays,
    /// A sweep that is under way.
    sweep: Option<std::thread::JoinHandle<Strays>>,
    /// When each rule last carried a packet.
    carried: StdHashMap<(u32, [u8; 16]), u64>,
    /// Every slot that an offer was queued for: port, its generation, epoch, reply.
    sighted: HashSet<(u32, Generation, u64, bool)>,
    /// What may be sighted again: port, connection, reply.
    rearmed: HashSet<(u32, u64, bool)>,
}

fn direction(reply: bool) -> Direction {
    if reply { Reply } else { Original }
}

impl Model {
    fn new() -> Self {
        let providers = ["first", "second"].map(DummyClass::new);
        providers[0].decline(Some(ifindex(3)), "the other's");
        let b = Bench::new(&[&providers[0], &providers[1]]);
        let workers = (0..WORKERS).map(|_| (b.engine.worker(), true)).collect();
        Self {
            b,
            providers,
            workers,
            strays: Strays::default(),
            sweep: None,
            carried: StdHashMap::new(),
            sighted: HashSet::new(),
            rearmed: HashSet::new(),
        }
    }

    fn provider(&self, p: u32) -> &DummyClass {
        &self.providers[usize::from(p == 3)]
    }

    fn rules(&self, p: u32) -> Vec<DummyRule> {
        self.provider(p).rules(ifindex(p))
    }

    fn offer(&mut self, w: usize, p: u32, c: u16, reply: bool) {
        let Some(port) = self.workers[w].0.port(ifindex(p)) else { return };
        let conn = self.b.conn(c);
        let path = PathSpec::Resolve(PathHint::default());
        let before = self.b.rearmed();
        let offer = port.conn_seen(&conn, direction(reply), path);
        let generation = port.generation();
        self.note_rearmed(before);
        if offer == Offer::Queued {
            self.sighted.insert((p, generation, conn.epoch().0, reply));
            self.rearmed.remove(&(p, u64::from(c), reply));
        }
    }

    fn note_rearmed(&mut self, sights: Vec<(Ifindex, u64, Direction)>) {
        self.rearmed.extend(sights.into_iter().map(|(i, tag, d)| (i.get(), tag, d == Reply)));
    }

    /// A flush waits for what is with the providers: let it come back.
    fn undelay(&self) {
        for p in &self.providers {
            p.let_go();
            for port in 1..4 {
                p.set_service_time(ifindex(port), None);
            }
            p.set_latency(None);
            p.release_pending();
        }
    }

    fn begin_sweep(&mut self, p: u32) {
        self.end_sweep();
        if self.b.engine.port(ifindex(p)).is_none() {
            return;
        }
        self.provider(p).be_late(Call::Usage, Some(ifindex(p)));
        let (engine, mut strays) = (self.b.engine.clone(), std::mem::take(&mut self.strays));
        let sweep = std::thread::spawn(move || {
            engine.sweep(&mut strays);
            strays
        });
        wait_for(|| self.provider(p).held() == 1 || sweep.is_finished());
        self.sweep = Some(sweep);
    }

    fn end_sweep(&mut self) {
        self.providers.iter().for_each(|p| p.let_go());
        if let Some(sweep) = self.sweep.take() {
            self.strays = sweep.join().unwrap();
        }
    }

    /// Deletes a port while the workers go on offering what they see.
    fn del_port(
        &mut self,
        p: u32,
        sights: [(u32, u16, bool); WORKERS],
    ) -> Result<(), TestCaseError> {
        self.undelay();
        let engine = self.b.engine.clone();
        if *self.b.datapath.egress.lock().unwrap() == Some(ifindex(p)) {
            *self.b.datapath.egress.lock().unwrap() = None;
        }
        let deleting = std::thread::spawn(move || engine.port_del(ifindex(p)));
        for (w, (p, c, reply)) in sights.into_iter().enumerate() {
            self.offer(w, p, c, reply);
        }
        while !deleting.is_finished() {
            for (worker, online) in &mut self.workers {
                if *online {
                    worker.quiescent();
                }
            }
            self.undelay();
            std::thread::yield_now();
        }
        if let Ok(deleted) = deleting.join().unwrap() {
            prop_assert!(deleted.faults.is_empty(), "{:?}", deleted.faults);
            prop_assert!(self.rules(p).is_empty(), "I1: rules of a port that is gone");
            prop_assert!(self.workers.iter().all(|(w, _)| w.port(ifindex(p)).is_none()));
            let into: Vec<_> = (1..4)
                .flat_map(|other| self.rules(other))
                .filter(|rule| rule.flow.forward.egress == ifindex(p))
                .collect();
            prop_assert!(into.is_empty(), "I1: rules into a port that is gone: {into:?}");
        }
        Ok(())
    }

    /// I1, at any moment: a rule stands for a sight on this very port, of a tuple of this very
    /// connection. A netdev that never saw a connection has nothing of it.
    fn check_rules(&self) -> Result<(), TestCaseError> {
        for p in 1..4 {
            let generation = self.b.engine.port(ifindex(p)).map(|(netdev, _)| netdev.generation);
            for rule in self.rules(p) {
                let Cookie { epoch, direction, .. } = rule.cookie;
                let Some(generation) = generation else {
                    return Err(TestCaseError::fail(format!("I1: a rule on p{p}, which is gone")));
                };
                let sight = (p, generation, epoch.0, direction == Reply);
                prop_assert!(self.sighted.contains(&sight), "I1: a rule for no sight: {rule:?}");
                if let Some(conn) = self.b.engine.conns().find(|c| c.epoch() == epoch) {
                    let flow = &rule.flow;
                    prop_assert_eq!(flow.matches.tuple, conn.arriving(direction));
                    prop_assert_eq!(flow.forward.tuple, conn.leaving(direction));
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, step: Step) -> Result<(), TestCaseError> {
        let engine = self.b.engine.clone();
        match step {
            Step::Offer(w, p, c, reply) => self.offer(w, p, c, reply),
            Step::Quiescent(w) => {
                if self.workers[w].1 {
                    self.workers[w].0.quiescent();
                }
            }
            Step::Offline(w) => {
                self.workers[w].0.offline();
                self.workers[w].1 = false;
            }
            Step::Online(w) => {
                self.workers[w].0.online();
                self.workers[w].1 = true;
            }
            Step::End(c) => {
                engine.conn_del(&self.b.conn(c));
            }
            Step::Retract(c) => {
                engine.conn_retract(&self.b.conn(c), TakenBack::Asked);
            }
            Step::FlushPort(p) => {
                self.undelay();
                let port = FlushFilter { port: Some(ifindex(p)), ..Default::default() };
                let _ = engine.flush(&port);
            }
            Step::PortDel(p, sights) => self.del_port(p, sights)?,
            Step::PortAgain(p, times, c) => {
                for _ in 0..times {
                    self.del_port(p, [(p, c, false), (p, c, true)])?;
                    let _ = engine.port_add(new_port(p));
                    self.workers[0].0.online();
                    self.workers[0].1 = true;
                    self.offer(0, p, c, false);
                    let conn = self.b.conn(c);
                    for d in Direction::BOTH {
                        let slots = conn.slots_of(d).count();
                        prop_assert!(slots <= 3, "{slots} slots of a direction on three ports");
                    }
                }
            }
            Step::Slow(p, on) => {
                let each = on.then_some(Duration::from_millis(5000));
                self.provider(p).set_service_time(ifindex(p), each);
            }
            Step::Towards(p) => {
                if engine.port(ifindex(p)).is_some() {
                    *self.b.datapath.egress.lock().unwrap() = Some(ifindex(p));
                }
            }
            Step::SweepBegins(p) => self.begin_sweep(p),
            Step::SweepEnds => self.end_sweep(),
            Step::PortAdd(p) => {
                let _ = engine.port_add(new_port(p));
            }
            Step::Release(c, n) => {
                self.providers[c].release_nth(n);
            }
            Step::ReleaseAll(c) => {
                self.providers[c].release_pending();
            }
            Step::Lose(c, n) => {
                self.providers[c].lose_nth(n);
            }
            Step::FailNext(c, reason) => self.providers[c].fail_next(1, reason),
            Step::Capacity(c, n) => self.providers[c].set_capacity(n),
            Step::Delay(c, on) => self.providers[c].set_latency(on.then_some(Duration::MAX)),
            Step::Tick(ms) => {
                self.b.clock.fetch_add(ms, Ordering::SeqCst);
                for p in &self.providers {
                    p.advance(Duration::from_millis(ms));
                }
            }
            Step::Carry(p, c, reply) => {
                let epoch = self.b.conn(c).epoch();
                let rule = self
                    .rules(p)
                    .into_iter()
                    .find(|r| r.cookie.epoch == epoch && r.cookie.direction == direction(reply));
                if let Some(rule) = rule {
                    self.provider(p).carry(ifindex(p), rule.cookie, 1, 100);
                    let key = (p, rule.cookie.to_bytes());
                    self.carried.insert(key, self.b.engine.now_ms());
                }
            }
            Step::Sweep => {
                self.end_sweep();
                engine.sweep(&mut self.strays);
                self.check_usage()?;
            }
        }
        Ok(())
    }

    /// I3: after a sweep the last use is at or after the last packet of every rule that is
    /// installed, and never in the future.
    fn check_usage(&self) -> Result<(), TestCaseError> {
        for conn in self.b.engine.conns() {
            for slot in self.b.engine.slots(&conn) {
                let key = (slot.netdev.ifindex.get(), slot.cookie.to_bytes());
                let still_there = self.rules(slot.netdev.ifindex.get()).iter().any(|r| {
                    r.cookie == slot.cookie && Some(r.rule) == slot.rule && r.counters.packets > 0
                });
                if slot.state != SlotState::Installed || !still_there {
                    continue;
                }
                let Some(&last) = self.carried.get(&key) else { continue };
                let now = self.b.engine.now_ms();
                match self.b.engine.conn_update(&conn) {
                    Usage::LastUsed { at_ms, .. } => {
                        prop_assert!(at_ms >= last && at_ms <= now, "I3: {last} {at_ms} {now}");
                    }
                    other => prop_assert!(false, "I3: {other:?}"),
                }
            }
        }
        Ok(())
    }

    /// Nothing delayed, nothing failing, every retry due.
    fn quiet(&mut self) {
        self.end_sweep();
        for (worker, online) in &mut self.workers {
            worker.online();
            *online = true;
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        let waits = |m: &Self| {
            let slots = m.b.engine.conns().flat_map(|c| m.b.engine.slots(&c));
            slots.into_iter().any(|s| s.retry_in_ms.is_some())
        };
        for n in 0.. {
            self.undelay();
            self.b.clock.fetch_add(60_000, Ordering::SeqCst);
            self.b.settle();
            // A port's thread looks at its timers when it has nothing else to do.
            if n >= 20 && (!waits(self) || Instant::now() > deadline) {
                break;
            }
        }
    }

    /// I1, I2 and I4, and the promises of the contract.
    fn check_quiet(&mut self) -> Result<(), TestCaseError> {
        self.check_rules()?;
        let sights = self.b.rearmed();
        self.note_rearmed(sights);
        let mut expected = Vec::new();
        for conn in self.b.engine.conns() {
            for slot in self.b.engine.slots(&conn) {
                prop_assert!(
                    matches!(slot.state, SlotState::Installed | SlotState::Rejected),
                    "{:?} is not quiet",
                    slot.state
                );
                if slot.state == SlotState::Installed {
                    expected.push((slot.netdev.ifindex.get(), slot.cookie.to_bytes()));
                }
                if let Some(r) = &slot.rejection {
                    prop_assert_eq!(r.reason.permanence(), Permanence::Permanent, "{}", r);
                }
            }
            for &(p, generation, epoch, reply) in &self.sighted {
                let lives = self.b.engine.port(ifindex(p)).map(|(n, _)| n.generation);
                if epoch == conn.epoch().0 && lives == Some(generation) {
                    prop_assert!(
                        self.b.state(p, &conn, direction(reply)).is_some()
                            || self.rearmed.contains(&(p, conn.tag(), reply)),
                        "I4: the sight of {conn} on p{p}, reply {reply}, is lost"
                    );
                }
            }
        }
        let mut actual: Vec<_> = (1..4)
            .flat_map(|p| {
                let rules = self.rules(p);
                rules.into_iter().map(move |r| (p, r.cookie.to_bytes()))
            })
            .collect();
        expected.sort_unstable();
        actual.sort_unstable();
        prop_assert_eq!(expected, actual, "I2: the engine's rules, and the backend's");
        let (followed, wrong) = &*self.b.datapath.follower.lock().unwrap();
        let shown = self.b.engine.conns().flat_map(|c| {
            let installed = self.b.engine.slots(&c);
            let installed = installed.into_iter().filter(|s| s.state == SlotState::Installed);
            let rule = |s: SlotView| (s.netdev.name, c.epoch().0, s.direction == Reply);
            installed.map(rule).collect::<Vec<_>>()
        });
        prop_assert_eq!(followed, &shown.collect(), "a follower's rules, and the engine's");
        prop_assert!(wrong.is_empty(), "told without news: {wrong:?}");
        for provider in &self.providers {
            let violations = provider.violations();
            prop_assert!(violations.is_empty(), "{violations:?}");
        }
        let faults: Vec<_> = self.b.engine.ports().into_iter().filter_map(|p| p.fault).collect();
        prop_assert!(faults.is_empty(), "{faults:?}");
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever happens, on several workers and ports, with providers that fail, delay, reorder,
    /// lose operations and fill up: no rule contradicts a live connection or port (I1); when quiet,
    /// the engine's rules are the backend's (I2); the last use is right within one sweep (I3);
    /// what could not be offloaded can be offered again, and nothing of it is left (I4). Whoever follows what is told of
    /// slots has the rules that there are.
    #[test]
    fn the_invariants_hold_in_every_order(steps in proptest::collection::vec(step(), 1..80)) {
        let mut m = Model::new();
        for step in steps {
            m.take(step)?;
            m.check_rules()?;
        }
        m.quiet();
        m.check_quiet()?;
        // I4: with a healthy backend, and once the failures asked for above are used up,
        // everything can be offloaded.
        m.providers.iter().for_each(|p| p.set_capacity(usize::MAX));
        let ports: Vec<u32> =
            (1..4).filter(|p| m.b.engine.port(ifindex(*p)).is_some()).collect();
        let all_offloaded =
            |m: &Model| ports.iter().all(|p| m.rules(*p).len() == 6);
        for _ in 0..40 {
            m.b.engine.flush(&FlushFilter::default()).unwrap();
            m.workers[0].0.quiescent();
            for &p in &ports {
                (0..6).for_each(|c| m.offer(0, p, c, false));
            }
            m.b.settle();
            if all_offloaded(&m) {
                break;
            }
            m.quiet();
        }
        prop_assert!(all_offloaded(&m), "I4: something stays on the slow path for ever");
        m.check_quiet()?;
        m.workers.clear();
        m.b.engine.close();
        prop_assert!((1..4).all(|p| m.rules(p).is_empty()));
        let (followed, wrong) = &*m.b.datapath.follower.lock().unwrap();
        prop_assert!(followed.is_empty() && wrong.is_empty(), "{followed:?} {wrong:?}");
    }
}
