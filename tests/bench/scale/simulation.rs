//! The engine under the model's traffic: real, on a clock of the simulation, with tables of a size in the place of
//! NICs (the dummy provider).
//!
//! Time goes in steps of [`STEP_US`]: what is offered in one is carried out at its end, and what ends in one ends then,
//! so that the same seed has the same outcome.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ctoffload::engine::clock::Clock;
use ctoffload::engine::conn::{ConnHandle, ConnKey};
use ctoffload::engine::datapath::{Datapath, Path, PathHint, PathSpec, Sight, SlotChange};
use ctoffload::engine::usage::Strays;
use ctoffload::engine::worker::{Offer, Worker};
use ctoffload::engine::{Engine, Limits, NewPort};
use netdev_providers::dummy::DummyClass;
use netdev_providers::{
    Cookie, Direction, Forward, HwFlags, Ifindex, L4Proto, Netdev, Rejection, Tuple, Zone,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::traffic::{Connection, Traffic};

const STEP_US: u64 = 50_000;
const SWEEP_US: u64 = 5_000_000;
/// The engine's connections have places for so many netdevs: where all are to have one, that takes several of them.
const PLACES: usize = 16;

/// Who is told of a connection, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strategy {
    /// All netdevs, both directions, at once.
    All,
    /// The netdev that it came in by, and the one that it leaves by for the reply, at once.
    Path,
    /// Each netdev when it sees a packet of it.
    Lazy,
}

/// From when on it may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Threshold {
    pub(crate) name: &'static str,
    pub(crate) packets: u64,
    pub(crate) bytes: f64,
}

/// One simulation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    pub(crate) strategy: Strategy,
    pub(crate) threshold: Threshold,
    pub(crate) table: usize,
    pub(crate) netdevs: usize,
    /// Answers come by whichever uplink (ECMP), and not by the one that the connection left by.
    pub(crate) any_uplink: bool,
    pub(crate) per_second: f64,
    pub(crate) warm_s: u64,
    pub(crate) measured_s: u64,
}

/// What came of it, in the time that was measured.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) connections: u64,
    /// Rules written.
    pub(crate) rules: u64,
    /// Of these, on netdevs that no packet of this direction of the connection arrived on.
    pub(crate) useless: u64,
    /// Offers that a full table refused.
    pub(crate) refused: u64,
    pub(crate) evictions: u64,
    /// Rules of a netdev, in the mean of netdevs and time; and at most.
    pub(crate) occupied: f64,
    pub(crate) most: u64,
    pub(crate) packets: u64,
    /// Of these, those that a rule carried.
    pub(crate) in_hardware: u64,
    /// Promises that the engine did not keep, as the provider saw it.
    pub(crate) violations: usize,
}

/// Where the packets of a connection arrive, in the engine's own mark.
#[derive(Clone, Copy)]
struct Tag(u64);

const NOWHERE: u64 = 0xffff;

impl Tag {
    fn new(index: u32, arrives: [Option<u32>; 2]) -> Self {
        let [original, reply] = arrives.map(|at| at.map_or(NOWHERE, u64::from));
        Self(u64::from(index) | original << 32 | reply << 48)
    }
    const fn index(self) -> usize {
        (self.0 & 0xffff_ffff) as usize
    }
    fn arrives_at(self, d: Direction, netdev: Ifindex) -> bool {
        (self.0 >> (32 + 16 * d.index())) & 0xffff == u64::from(netdev.get())
    }
}

/// What the engine says meanwhile.
#[derive(Default)]
struct Heard {
    /// Rules where packets arrive: come (true) and gone.
    changed: Mutex<Vec<(usize, Direction, bool)>>,
    rearmed: Mutex<Vec<(usize, Direction, Ifindex)>>,
    installed: AtomicU64,
    useless: AtomicU64,
    refused: AtomicU64,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Datapath for Heard {
    fn resolve(&self, _: &Sight, _: &PathHint) -> Result<Path, Rejection> {
        unreachable!("every offer has its path")
    }
    fn rearm(&self, sights: &[Sight]) {
        lock(&self.rearmed)
            .extend(sights.iter().map(|s| (Tag(s.conn.tag()).index(), s.direction, s.ifindex)));
    }
    fn slot_changed(&self, port: &Netdev, conn: &ConnHandle, d: Direction, change: SlotChange<'_>) {
        let tag = Tag(conn.tag());
        let here = tag.arrives_at(d, port.ifindex);
        match change {
            SlotChange::Installed => {
                self.installed.fetch_add(1, Ordering::Relaxed);
                self.useless.fetch_add(u64::from(!here), Ordering::Relaxed);
            }
            SlotChange::Rejected(_) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                return;
            }
            SlotChange::Deleted => {}
        }
        if here {
            lock(&self.changed).push((tag.index(), d, matches!(change, SlotChange::Installed)));
        }
    }
}

/// A connection that lives.
struct Live {
    model: Connection,
    /// One for every [`PLACES`] netdevs, where all are told.
    conns: Vec<ConnHandle>,
    arrives: [Ifindex; 2],
    /// The netdev where its answers are expected.
    expected: Ifindex,
    /// Since when its rule carries what arrives; until when it has been counted for the sweep.
    carried_from: [Option<u64>; 2],
    swept_until: [u64; 2],
}

impl Live {
    /// What the engine has of it for this netdev.
    fn conn(&self, at: Ifindex) -> &ConnHandle {
        self.conns.get((at.get() as usize - 1) / PLACES).unwrap_or(&self.conns[0])
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Begin,
    /// All who are told at once are.
    Offer(usize),
    /// A packet of this direction (as its index), where it arrives.
    Packet(usize, usize),
    End(usize),
}

struct Simulation {
    setting: Setting,
    engine: Engine,
    clock: Arc<AtomicU64>,
    dummy: DummyClass,
    heard: Arc<Heard>,
    worker: Worker,
    traffic: Traffic,
    rng: StdRng,
    events: BinaryHeap<Reverse<(u64, Event)>>,
    live: Vec<Option<Live>>,
    /// Slots that may be offered again, at the next packet: of which direction, on which netdev.
    again: BinaryHeap<Reverse<(u64, usize, usize, u32)>>,
    outcome: Outcome,
}

fn ifindex(n: usize) -> Ifindex {
    u32::try_from(n).ok().and_then(Ifindex::new).expect("a small number that is not 0")
}

const fn direction(index: usize) -> Direction {
    if index == 0 { Direction::Original } else { Direction::Reply }
}

/// Runs one simulation: with the same seed, the same connections.
pub(crate) fn run(setting: Setting, seed: u64) -> Outcome {
    let mut simulation = Simulation::new(setting, seed);
    simulation.go();
    let mut outcome = simulation.outcome;
    outcome.violations = simulation.dummy.violations().len();
    simulation.engine.close();
    outcome
}

impl Simulation {
    fn new(setting: Setting, seed: u64) -> Self {
        let (clock, heard) = (Arc::new(AtomicU64::new(0)), Arc::new(Heard::default()));
        let engine = Engine::new(
            NonZeroU32::MIN,
            Arc::clone(&heard) as Arc<dyn Datapath>,
            Limits { connections: 1 << 23, queue: 1 << 22, ..Limits::default() },
            Clock::Manual(Arc::clone(&clock)),
        );
        let dummy = DummyClass::new("table");
        dummy.set_capacity(setting.table);
        engine.register(Arc::new(dummy.clone())).expect("the first class");
        for n in 1..=setting.netdevs {
            let port = NewPort {
                ifindex: ifindex(n),
                name: format!("nic{n}"),
                hw_flags: HwFlags::Both,
                providers: None,
                capacity: None,
            };
            engine.port_add(port).expect("the first port of this ifindex");
        }
        Self {
            setting,
            worker: engine.worker(),
            engine,
            clock,
            dummy,
            heard,
            traffic: Traffic::new(),
            rng: StdRng::seed_from_u64(seed),
            events: BinaryHeap::from([Reverse((0, Event::Begin))]),
            live: Vec::new(),
            again: BinaryHeap::new(),
            outcome: Outcome::default(),
        }
    }

    fn go(&mut self) {
        let (warm, end) = (
            self.setting.warm_s * 1_000_000,
            (self.setting.warm_s + self.setting.measured_s) * 1_000_000,
        );
        let mut strays = Strays::default();
        let (mut evicted_before, mut samples, mut ending) = (0, 0u64, Vec::new());
        for now in (STEP_US..=end).step_by(STEP_US as usize) {
            self.clock.store(now / 1000, Ordering::SeqCst);
            while let Some(Reverse((at, event))) =
                self.events.peek().copied().filter(|e| e.0.0 <= now)
            {
                self.events.pop();
                match event {
                    Event::End(n) => ending.push((at, n)),
                    event => self.happen(at, event),
                }
            }
            self.repeat(now);
            assert!(self.engine.synchronize(), "a port does not go on");
            self.hear(now);
            for (at, n) in ending.drain(..) {
                self.end(at, n);
            }
            if now % SWEEP_US == 0 {
                self.carry(now);
                let swept = self.engine.sweep(&mut strays);
                assert!(swept.faults.is_empty() && swept.lost == 0, "{swept:?}");
            }
            if now == warm {
                for counter in [&self.heard.installed, &self.heard.useless, &self.heard.refused] {
                    counter.store(0, Ordering::Relaxed);
                }
                evicted_before = self.evictions();
            }
            if now > warm && now % SWEEP_US == 0 {
                let rules: Vec<u64> =
                    self.engine.ports().iter().map(|p| p.slots.installed).collect();
                samples += 1;
                self.outcome.occupied += rules.iter().sum::<u64>() as f64 / rules.len() as f64;
                self.outcome.most =
                    self.outcome.most.max(rules.into_iter().max().unwrap_or_default());
            }
        }
        // What lives on is counted to the end.
        for n in 0..self.live.len() {
            self.count(n, end);
        }
        let heard = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        self.outcome.rules = heard(&self.heard.installed);
        self.outcome.useless = heard(&self.heard.useless);
        self.outcome.refused = heard(&self.heard.refused);
        self.outcome.evictions = self.evictions() - evicted_before;
        self.outcome.occupied /= samples as f64;
    }

    fn evictions(&self) -> u64 {
        self.engine.ports().iter().map(|p| p.evictions).sum()
    }

    fn happen(&mut self, at: u64, event: Event) {
        match event {
            Event::Begin => {
                self.begin(at);
                let pause = Traffic::pause_us(self.setting.per_second, &mut self.rng);
                self.events.push(Reverse((at + pause as u64, Event::Begin)));
            }
            Event::Offer(n) => self.tell_all(n),
            Event::Packet(n, d) => {
                let Some(live) = &self.live[n] else { return };
                let at = live.arrives[d];
                self.offer(n, direction(d), at);
            }
            Event::End(n) => self.end(at, n),
        }
    }

    fn end(&mut self, at: u64, n: usize) {
        self.count(n, at);
        if let Some(live) = self.live[n].take() {
            for conn in live.conns {
                self.engine.conn_del(&conn);
            }
        }
    }

    fn begin(&mut self, at: u64) {
        let Setting { strategy, threshold, netdevs, any_uplink, .. } = self.setting;
        let model = self.traffic.connection(at, &mut self.rng);
        // Towards hosts the first half, uplinks the other. What is drawn is the same in each setting.
        let (inside, uplink, other) =
            (self.rng.random::<f64>(), self.rng.random::<f64>(), self.rng.random::<f64>());
        let half = netdevs / 2;
        let of_half = |share: f64| (share * half as f64) as usize;
        let (original, expected) =
            (ifindex(1 + of_half(inside)), ifindex(1 + half + of_half(uplink)));
        let reply = if any_uplink { ifindex(1 + half + of_half(other)) } else { expected };
        let n = self.live.len();
        let seen = |d: usize, at: Ifindex| (model.trains[d].packets > 0).then_some(at.get());
        let tag = Tag::new(
            u32::try_from(n).expect("fewer connections"),
            [seen(0, original), seen(1, reply)],
        );
        let handles = if strategy == Strategy::All { netdevs.div_ceil(PLACES) } else { 1 };
        let conns = (0..handles).map(|group| self.conn(n, group, model.tcp, tag)).collect();
        self.events.push(Reverse((model.end_us, Event::End(n))));
        if let Some(from) = model.after(threshold.packets, threshold.bytes) {
            if strategy == Strategy::Lazy {
                for d in [0, 1] {
                    if let Some(next) = model.trains[d].next(from) {
                        self.events.push(Reverse((next, Event::Packet(n, d))));
                    }
                }
            } else {
                self.events.push(Reverse((from, Event::Offer(n))));
            }
        }
        if at >= self.setting.warm_s * 1_000_000 {
            self.outcome.connections += 1;
        }
        self.live.push(Some(Live {
            model,
            conns,
            arrives: [original, reply],
            expected,
            carried_from: [None; 2],
            swept_until: [0; 2],
        }));
    }

    fn conn(&self, n: usize, group: usize, tcp: bool, tag: Tag) -> ConnHandle {
        let [_, _, _, _, high, a, b, c] = (n as u64).to_be_bytes();
        let client = IpAddr::V4(Ipv4Addr::new(10 + high, a, b, c));
        let server = IpAddr::V4(Ipv4Addr::new(198, 51, 100, c));
        let proto = if tcp { L4Proto::Tcp } else { L4Proto::Udp };
        let original = Tuple::new(proto, client, 50_000, server, 443).expect("both are IPv4");
        let zone = Zone(u16::try_from(group).expect("few netdevs"));
        self.engine
            .conn_create(ConnKey { zone, original }, original.inverted(), tag.0)
            .expect("as many connections as may be are more")
    }

    fn tell_all(&self, n: usize) {
        let Some(live) = &self.live[n] else { return };
        match self.setting.strategy {
            Strategy::All => {
                for netdev in 1..=self.setting.netdevs {
                    for d in Direction::BOTH {
                        self.offer(n, d, ifindex(netdev));
                    }
                }
            }
            Strategy::Path => {
                self.offer(n, Direction::Original, live.arrives[0]);
                self.offer(n, Direction::Reply, live.expected);
            }
            Strategy::Lazy => unreachable!("nobody is told at once"),
        }
    }

    fn offer(&self, n: usize, d: Direction, at: Ifindex) {
        let Some(live) = &self.live[n] else { return };
        let conn = live.conn(at);
        let path = Path {
            eth_dst: None,
            vlan: None,
            ingress_mtu: 1500,
            forward: Forward {
                egress: ifindex(1000),
                vlan: None,
                mtu: 1500,
                tuple: conn.leaving(d),
                macs: None,
                egress_decides: false,
            },
            next_hop: None,
            iif: None,
            oif: None,
            answer: 0,
        };
        let port = self.worker.port(at).expect("a port of this ifindex");
        let offer = port.conn_seen(conn, d, PathSpec::Known(Box::new(path)));
        assert!(!matches!(offer, Offer::Refused(_) | Offer::Unbound), "{offer:?}");
    }

    /// What was taken off, or refused, and may be tried again: with its next packet.
    fn hear(&mut self, now: u64) {
        let changed = std::mem::take(&mut *lock(&self.heard.changed));
        for (n, d, installed) in changed {
            if installed {
                if let Some(live) = &mut self.live[n] {
                    live.carried_from[d.index()] = Some(now);
                    live.swept_until[d.index()] = now;
                }
            } else {
                self.count_direction(n, d.index(), now);
            }
        }
        let rearmed = std::mem::take(&mut *lock(&self.heard.rearmed));
        for (n, d, at) in rearmed {
            let next =
                self.live[n].as_ref().and_then(|live| live.model.trains[d.index()].next(now));
            if let Some(next) = next {
                self.again.push(Reverse((next, n, d.index(), at.get())));
            }
        }
    }

    fn repeat(&mut self, now: u64) {
        while let Some(Reverse((_, n, d, at))) = self.again.peek().copied().filter(|e| e.0.0 <= now)
        {
            self.again.pop();
            self.offer(n, direction(d), ifindex(at as usize));
        }
    }

    /// Has rules carry what has arrived since the last sweep.
    fn carry(&mut self, now: u64) {
        let instance = self.engine.instance();
        for live in self.live.iter_mut().flatten() {
            for d in Direction::BOTH {
                let i = d.index();
                let (Some(_), train) = (live.carried_from[i], live.model.trains[i]) else {
                    continue;
                };
                let packets = train.before(now) - train.before(live.swept_until[i]);
                live.swept_until[i] = now;
                let at = live.arrives[i];
                let cookie = Cookie { instance, epoch: live.conn(at).epoch(), direction: d };
                if packets > 0 {
                    self.dummy.carry(at, cookie, packets, packets * 1000);
                }
            }
        }
    }

    /// Counts its packets, and those that rules carried, as far as they were in the time that is measured.
    fn count(&mut self, n: usize, until: u64) {
        for d in [0, 1] {
            self.count_direction(n, d, until);
        }
        let warm = self.setting.warm_s * 1_000_000;
        if let Some(live) = &self.live[n] {
            self.outcome.packets += live
                .model
                .trains
                .map(|t| t.before(until).saturating_sub(t.before(warm)))
                .iter()
                .sum::<u64>();
        }
    }

    fn count_direction(&mut self, n: usize, d: usize, until: u64) {
        let warm = self.setting.warm_s * 1_000_000;
        let Some(live) = &mut self.live[n] else { return };
        if let Some(from) = live.carried_from[d].take() {
            let train = live.model.trains[d];
            self.outcome.in_hardware +=
                train.before(until).saturating_sub(train.before(from.max(warm)));
        }
    }
}
