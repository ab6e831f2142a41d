//! A model of the engine: random operations on several workers and ports, and the invariants that
//! hold whatever their order.

use std::collections::HashMap as StdHashMap;

use proptest::prelude::*;

use super::*;

const WORKERS: usize = 2;

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
    Release(usize),
    ReleaseAll,
    FailNext(Reason),
    Capacity(usize),
    Delay(bool),
    Tick(u64),
    /// Packets on the rule of port and connection.
    Carry(u32, u16, bool),
    Sweep,
}

fn step() -> impl Strategy<Value = Step> {
    let (port, conn, worker) = (1u32..4, 0u16..6, 0..WORKERS);
    let sight = (port.clone(), conn.clone(), any::<bool>());
    prop_oneof![
        10 => (worker.clone(), sight.clone()).prop_map(|(w, (p, c, r))| Step::Offer(w, p, c, r)),
        2 => worker.clone().prop_map(Step::Quiescent),
        1 => worker.clone().prop_map(Step::Offline),
        1 => worker.prop_map(Step::Online),
        2 => conn.clone().prop_map(Step::End),
        1 => conn.prop_map(Step::Retract),
        1 => port.clone().prop_map(Step::FlushPort),
        1 => (port.clone(), [sight.clone(), sight.clone()]).prop_map(|(p, s)| Step::PortDel(p, s)),
        2 => port.prop_map(Step::PortAdd),
        3 => (0usize..4).prop_map(Step::Release),
        2 => Just(Step::ReleaseAll),
        1 => prop_oneof![Just(Reason::Busy), Just(Reason::Refused), Just(Reason::TableFull)]
            .prop_map(Step::FailNext),
        1 => (0usize..6).prop_map(Step::Capacity),
        2 => any::<bool>().prop_map(Step::Delay),
        1 => (1u64..40_000).prop_map(Step::Tick),
        4 => sight.prop_map(|(p, c, r)| Step::Carry(p, c, r)),
        2 => Just(Step::Sweep),
    ]
}

struct Model {
    b: Bench,
    dummy: DummyClass,
    workers: Vec<(Worker, bool)>,
    strays: Strays,
    /// When each rule last carried a packet.
    carried: StdHashMap<(u32, [u8; 16]), u64>,
}

fn direction(reply: bool) -> Direction {
    if reply { Reply } else { Original }
}

impl Model {
    fn new() -> Self {
        let dummy = DummyClass::new("dummy");
        let b = Bench::new(&[&dummy]);
        let workers = (0..WORKERS).map(|_| (b.engine.worker(), true)).collect();
        Self { b, dummy, workers, strays: Strays::default(), carried: StdHashMap::new() }
    }

    fn offer(&self, w: usize, p: u32, c: u16, reply: bool) {
        if let Some(port) = self.workers[w].0.port(ifindex(p)) {
            let conn = self.b.conn(c);
            let path = PathSpec::Resolve(PathHint::default());
            let _ = port.conn_seen(&conn, direction(reply), path);
        }
    }

    /// A flush waits for what is with the provider: let it come back.
    fn undelay(&self) {
        self.dummy.set_latency(None);
        self.dummy.release_pending();
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
                engine.conn_retract(&self.b.conn(c));
            }
            Step::FlushPort(p) => {
                self.undelay();
                let port = FlushFilter { port: Some(ifindex(p)), ..Default::default() };
                let _ = engine.flush(&port);
            }
            Step::PortDel(p, sights) => {
                self.undelay();
                let deleting = std::thread::spawn(move || engine.port_del(ifindex(p)));
                for (w, (p, c, reply)) in sights.into_iter().enumerate() {
                    self.offer(w, p, c, reply);
                }
                for (worker, online) in &mut self.workers {
                    if *online {
                        worker.quiescent();
                    }
                }
                while !deleting.is_finished() {
                    for (worker, online) in &mut self.workers {
                        if *online {
                            worker.quiescent();
                        }
                    }
                    self.dummy.release_pending();
                    std::thread::yield_now();
                }
                if let Ok(deleted) = deleting.join().unwrap() {
                    prop_assert!(deleted.faults.is_empty(), "{:?}", deleted.faults);
                }
                prop_assert!(
                    self.dummy.rules(ifindex(p)).is_empty(),
                    "I1: rules of a port that is gone"
                );
                prop_assert!(self.workers.iter().all(|(w, _)| w.port(ifindex(p)).is_none()));
            }
            Step::PortAdd(p) => {
                let _ = engine.port_add(new_port(p));
            }
            Step::Release(n) => {
                self.dummy.release_nth(n);
            }
            Step::ReleaseAll => {
                self.dummy.release_pending();
            }
            Step::FailNext(reason) => self.dummy.fail_next(1, reason),
            Step::Capacity(n) => self.dummy.set_capacity(n),
            Step::Delay(on) => self.dummy.set_latency(on.then_some(Duration::MAX)),
            Step::Tick(ms) => {
                self.b.clock.fetch_add(ms, Ordering::SeqCst);
            }
            Step::Carry(p, c, reply) => {
                let epoch = self.b.conn(c).epoch();
                let rule =
                    self.dummy.rules(ifindex(p)).into_iter().find(|r| {
                        r.cookie.epoch == epoch && r.cookie.direction == direction(reply)
                    });
                if let Some(rule) = rule {
                    self.dummy.carry(ifindex(p), rule.cookie, 1, 100);
                    let key = (p, rule.cookie.to_bytes());
                    self.carried.insert(key, self.b.engine.now_ms());
                }
            }
            Step::Sweep => {
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
                let still_there = self.dummy.rules(slot.netdev.ifindex).iter().any(|r| {
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
        self.dummy.set_latency(None);
        for (worker, online) in &mut self.workers {
            worker.online();
            *online = true;
        }
        for _ in 0..20 {
            self.dummy.release_pending();
            self.b.clock.fetch_add(60_000, Ordering::SeqCst);
            self.b.settle();
        }
    }

    /// I1 and I2, and the promises of the contract.
    fn check_quiet(&self) -> Result<(), TestCaseError> {
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
            }
        }
        let mut actual: Vec<_> = (1..4)
            .flat_map(|p| {
                let rules = self.dummy.rules(ifindex(p));
                rules.into_iter().map(move |r| (p, r.cookie.to_bytes()))
            })
            .collect();
        expected.sort_unstable();
        actual.sort_unstable();
        prop_assert_eq!(expected, actual, "I2: the engine's rules, and the backend's");
        let violations = self.dummy.violations();
        prop_assert!(violations.is_empty(), "{violations:?}");
        let faults: Vec<_> = self.b.engine.ports().into_iter().filter_map(|p| p.fault).collect();
        prop_assert!(faults.is_empty(), "{faults:?}");
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever happens, on several workers and ports, with a provider that fails, delays,
    /// reorders and fills up: no rule contradicts a live connection or port (I1); when quiet,
    /// the engine's rules are the backend's (I2); the last use is right within one sweep (I3);
    /// what could not be offloaded can be offered again, and nothing of it is left (I4).
    #[test]
    fn the_invariants_hold_in_every_order(steps in proptest::collection::vec(step(), 1..80)) {
        let mut m = Model::new();
        for step in steps {
            m.take(step)?;
        }
        m.quiet();
        m.check_quiet()?;
        // I4: with a healthy backend, and once the failures asked for above are used up,
        // everything can be offloaded.
        m.dummy.set_capacity(usize::MAX);
        let ports: Vec<u32> =
            (1..4).filter(|p| m.b.engine.port(ifindex(*p)).is_some()).collect();
        let all_offloaded =
            |m: &Model| ports.iter().all(|p| m.dummy.rules(ifindex(*p)).len() == 6);
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
        prop_assert!((1..4).all(|p| m.dummy.rules(ifindex(p)).is_empty()));
    }
}
