//! An engine to be measured: real, with a provider behind it that costs nothing.

use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ctoffload::engine::clock::Clock;
use ctoffload::engine::conn::{ConnHandle, ConnKey};
use ctoffload::engine::datapath::{Datapath, Path, PathHint, PathSpec, Sight};
use ctoffload::engine::worker::{Offer, Worker};
use ctoffload::engine::{Engine, FlushFilter, Limits, NewPort};
use netdev_providers::{
    BindError, Direction, Done, Fault, Flow, Forward, HwFlags, Ifindex, Instance, L4Proto, MacAddr,
    MacRewrite, Netdev, Operation, Provider, ProviderClass, Rejection, Request, RuleId, RuleReport,
    Tuple, Zone,
};

/// A provider that keeps nothing but counts, and completes at once.
#[derive(Default)]
pub(crate) struct Null {
    /// Every call that concerns a connection.
    calls: AtomicU64,
    adds: AtomicU64,
    deletes: AtomicU64,
    rules: AtomicU64,
    closed: AtomicBool,
    gate: Mutex<()>,
    opened: Condvar,
}

impl Null {
    pub(crate) fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }
    pub(crate) fn adds(&self) -> u64 {
        self.adds.load(Ordering::SeqCst)
    }

    /// From now on the port's writer stands in `submit`, as it does while a kernel works.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    pub(crate) fn open(&self) {
        let _gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        self.closed.store(false, Ordering::SeqCst);
        self.opened.notify_all();
    }
}

impl Provider for Null {
    fn can_offload(&self, _: &Flow) -> Result<(), Rejection> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn submit(&self, batch: Vec<Operation>) {
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        while self.closed.load(Ordering::SeqCst) {
            gate = self.opened.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        drop(gate);
        for operation in batch {
            self.calls.fetch_add(1, Ordering::Relaxed);
            let (done, count) = match &operation.request {
                Request::Add { .. } | Request::Track { .. } => {
                    let rule = RuleId(self.rules.fetch_add(1, Ordering::Relaxed));
                    (Done::added(rule, Some(true)), Some(&self.adds))
                }
                Request::Delete { .. } => {
                    self.rules.fetch_sub(1, Ordering::Relaxed);
                    (Done::Deleted, Some(&self.deletes))
                }
                // Nothing was observed, so nothing is to be adopted.
                Request::Adopt { found, .. } => (Done::added(*found, Some(true)), None),
                Request::Established { .. } => (Done::Noted, None),
            };
            operation.complete(Ok(done));
            if let Some(count) = count {
                count.fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    fn usage(&self, _: &mut dyn FnMut(RuleReport)) -> Result<(), Fault> {
        Ok(())
    }
    fn flush(&self) -> Result<u64, Fault> {
        Ok(self.rules.swap(0, Ordering::Relaxed))
    }
    fn release(&self) -> Result<(), Fault> {
        Ok(())
    }
}

/// Binds the providers it was made with, by ifindex from 1.
struct NullClass(Vec<Arc<Null>>);

impl ProviderClass for NullClass {
    fn name(&self) -> &'static str {
        "null"
    }
    fn bind(&self, netdev: &Netdev, _: Instance) -> Result<Arc<dyn Provider>, BindError> {
        let at = netdev.ifindex.get() as usize - 1;
        let null = self.0.get(at).ok_or_else(|| BindError::Declined("not one of ours".into()))?;
        Ok(Arc::clone(null) as Arc<dyn Provider>)
    }
}

/// Every path leads to the same neighbour.
struct OneWay;

impl Datapath for OneWay {
    fn resolve(&self, sight: &Sight, _: &PathHint) -> Result<Path, Rejection> {
        Ok(Path {
            eth_dst: Some(MacAddr([2, 0, 0, 0, 0, 1])),
            vlan: None,
            ingress_mtu: 1500,
            forward: Forward {
                egress: ifindex(1000),
                vlan: None,
                mtu: 1500,
                tuple: sight.conn.leaving(sight.direction),
                macs: Some(MacRewrite { src: MacAddr([2; 6]), dst: MacAddr([4; 6]) }),
                egress_decides: false,
            },
            next_hop: Some(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 254))),
            iif: None,
            oif: None,
            answer: 0,
        })
    }
    fn rearm(&self, _: &[Sight]) {}
}

pub(crate) fn ifindex(n: u32) -> Ifindex {
    Ifindex::new(n).expect("a small number that is not 0")
}

/// An engine with some ports, ifindex 1 and up.
pub(crate) struct World {
    pub engine: Engine,
    pub providers: Vec<Arc<Null>>,
}

impl World {
    pub(crate) fn new(ports: u32) -> Self {
        let limits = Limits {
            connections: 1 << 22,
            queue: 1 << 22,
            port_del: Duration::from_secs(60),
            ..Limits::default()
        };
        let engine = Engine::new(NonZeroU32::MIN, Arc::new(OneWay), limits, Clock::default());
        let providers: Vec<_> = (0..ports).map(|_| Arc::new(Null::default())).collect();
        engine.register(Arc::new(NullClass(providers.clone()))).expect("the first class");
        let world = Self { engine, providers };
        (1..=ports).for_each(|n| world.add_port(n));
        world
    }

    /// Adds one of the ports that it was made for (again).
    pub(crate) fn add_port(&self, n: u32) {
        let port = NewPort {
            ifindex: ifindex(n),
            name: format!("p{n}"),
            hw_flags: HwFlags::Both,
            providers: None,
            capacity: None,
        };
        self.engine.port_add(port).expect("the only port of this ifindex");
    }

    /// Deletes a port, and says how many rules it had.
    pub(crate) fn del_port(&self, n: u32) -> u64 {
        self.engine.port_del(ifindex(n)).expect("a port of this ifindex").flushed
    }

    pub(crate) fn provider(&self, port: u32) -> &Null {
        &self.providers[port as usize - 1]
    }

    /// The connections with these numbers, made if need be.
    pub(crate) fn conns(&self, numbers: std::ops::Range<u32>) -> Vec<ConnHandle> {
        numbers.map(|n| self.conn(key(n))).collect()
    }

    /// The same, in another zone and behind NAT.
    pub(crate) fn conns_in(&self, zone: Zone, numbers: std::ops::Range<u32>) -> Vec<ConnHandle> {
        numbers
            .map(|n| {
                let key = ConnKey { zone, ..key(n) };
                self.engine.conn_create(key, natted(&key.original), 0).expect("room for it")
            })
            .collect()
    }

    pub(crate) fn conn(&self, key: ConnKey) -> ConnHandle {
        self.engine
            .conn_create(key, key.original.inverted(), 0)
            .expect("as many connections as may be are more")
    }

    /// Offers the directions of all of them on a port, and waits until the rules are there.
    pub(crate) fn install(&self, port: u32, conns: &[ConnHandle], directions: &[Direction]) {
        let before = self.provider(port).adds();
        let worker = self.engine.worker();
        let mut queued = 0;
        for conn in conns {
            for &d in directions {
                queued += u64::from(offer(&worker, port, conn, d) == Offer::Queued);
            }
        }
        drop(worker);
        wait_for(|| self.provider(port).adds() == before + queued);
    }

    /// Empties a port, and says how many rules it had.
    pub(crate) fn flush(&self, port: u32) -> u64 {
        self.flush_by(&FlushFilter { port: Some(ifindex(port)), ..FlushFilter::default() })
    }

    /// Takes rules back, and says how many there were.
    pub(crate) fn flush_by(&self, filter: &FlushFilter) -> u64 {
        let flushed = self.engine.flush(filter).expect("a port of this ifindex");
        flushed.iter().map(|(_, n)| n).sum()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.engine.close();
    }
}

pub(crate) fn offer(worker: &Worker, port: u32, conn: &ConnHandle, d: Direction) -> Offer {
    let port = worker.port(ifindex(port)).expect("a port of this ifindex");
    port.conn_seen(conn, d, PathSpec::Resolve(PathHint::default()))
}

/// The key of connection number n: a client behind a router, one of some servers.
pub(crate) fn key(n: u32) -> ConnKey {
    let [_, a, b, c] = n.to_be_bytes();
    let client = IpAddr::V4(Ipv4Addr::new(10, a, b, c));
    let server = IpAddr::V4(Ipv4Addr::new(198, 51, 100, c));
    let sport = 1024 | (n.wrapping_mul(40503) >> 8) as u16;
    let original = Tuple::new(L4Proto::Tcp, client, sport, server, 443).expect("both are IPv4");
    ConnKey { zone: Zone(0), original }
}

/// The same over IPv6.
pub(crate) fn key6(n: u32) -> ConnKey {
    let ConnKey { zone, original: t } = key(n);
    let [client, server] = [t.src(), t.dst()].map(|address| match address {
        IpAddr::V4(a) => IpAddr::V6(a.to_ipv6_mapped()),
        v6 => v6,
    });
    let original = Tuple::new(t.proto(), client, t.sport(), server, t.dport());
    ConnKey { zone, original: original.expect("both are IPv6") }
}

/// The tuple of the answers behind a router that gives its own address to what leaves by it.
pub(crate) fn natted(original: &Tuple) -> Tuple {
    let own = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1));
    Tuple::new(original.proto(), original.dst(), original.dport(), own, original.sport())
        .expect("both are IPv4")
}

pub(crate) fn wait_for(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !done() {
        assert!(Instant::now() < deadline, "it did not happen within 2 minutes");
        std::thread::sleep(Duration::from_micros(50));
    }
}
