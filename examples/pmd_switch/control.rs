//! The control thread: ports that come and go, expiry, figures. It may block; packet threads never
//! wait for it.

use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ctoffload::engine::taken::TakenBack;
use ctoffload::engine::usage::{Strays, extended_expiry};
use ctoffload::engine::view::PortView;
use ctoffload::engine::{Engine, NO_PROVIDER, NewPort};
use netdev_providers::{Direction, HwFlags, Ifindex, MacAddr};
use nix::net::if_::if_nametoindex;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::afpacket::{ETHERTYPES, Ring};
use super::conns::{Conns, State, Timeouts};
use super::macs::Macs;
use super::pmd::{Counters, Event, Pmd, Rx, Switch, SwitchPort};

/// Packet threads.
const THREADS: usize = 2;
/// Connections in the table.
const CONNECTIONS: usize = 1 << 18;
/// How often links are looked at. A datapath that means it listens to rtnetlink instead: until it
/// notices that a netdev is down, rules of other ports send into it, and what they send is lost.
const LINK_EVERY: Duration = Duration::from_millis(100);
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// What a run has come to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) software: u64,
    pub(crate) by_rules: u64,
    pub(crate) dropped: u64,
    pub(crate) missed: u64,
    pub(crate) connections: u64,
    pub(crate) expired: u64,
    pub(crate) port_deletes: u64,
    /// The most rules that a NIC had at a time.
    pub(crate) in_nic: u64,
}

/// A running switch.
pub(crate) struct Control {
    switch: Arc<Switch>,
    threads: Vec<JoinHandle<()>>,
    counters: Vec<Arc<Counters>>,
    events: Receiver<Event>,
    providers: Option<Vec<String>>,
    timeouts: Timeouts,
    strays: Strays,
    links: Links,
    /// Packets that rules of ports carried which are gone: a port's figures go with it.
    past_by_rules: u64,
    port_deletes: u64,
    in_nic: u64,
    rows: u64,
    last: Totals,
}

impl Control {
    /// Opens the ports, attaches them to the engine, starts the packet threads.
    pub(crate) fn start(
        engine: Engine,
        names: &[String],
        providers: Option<Vec<String>>,
        timeouts: Timeouts,
    ) -> io::Result<Self> {
        let mut ports = Vec::new();
        for name in names {
            let ifindex = if_nametoindex(name.as_str())
                .ok()
                .and_then(Ifindex::new)
                .ok_or_else(|| io::Error::other(format!("there is no netdev {name}")))?;
            ports.push(SwitchPort { name: name.clone(), ifindex, mtu: AtomicU32::new(0) });
        }
        let mut inputs: Vec<Vec<Rx>> = (0..THREADS).map(|_| Vec::new()).collect();
        for (port, p) in ports.iter().enumerate() {
            let rings = ETHERTYPES
                .iter()
                .map(|&ethertype| Ring::open(p.ifindex, ethertype))
                .collect::<io::Result<_>>()
                .map_err(|e| io::Error::other(format!("{}: packet socket: {e}", p.name)))?;
            if let Some(thread) = inputs.get_mut(port % THREADS) {
                thread.push(Rx { port, rings });
            }
        }
        let switch = Arc::new(Switch {
            conns: Conns::new(engine.clone(), CONNECTIONS),
            engine,
            ports,
            macs: Macs::default(),
            stop: false.into(),
        });
        let (tx, events) = mpsc::channel();
        let mut control = Self {
            switch,
            threads: Vec::new(),
            counters: Vec::new(),
            events,
            providers,
            timeouts,
            strays: Strays::default(),
            links: Links::open()?,
            past_by_rules: 0,
            port_deletes: 0,
            in_nic: 0,
            rows: 0,
            last: Totals::default(),
        };
        control.look_at_links()?;
        for (n, inputs) in inputs.into_iter().enumerate() {
            let counters = Arc::new(Counters::default());
            control.counters.push(Arc::clone(&counters));
            let pmd = Pmd::new(&control.switch, counters, tx.clone())?;
            let thread =
                std::thread::Builder::new().name(format!("pmd-{n}")).spawn(|| pmd.run(inputs))?;
            control.threads.push(thread);
        }
        Ok(control)
    }

    /// What the engine knows of its ports.
    pub(crate) fn ports(&self) -> Vec<PortView> {
        self.switch.engine.ports()
    }

    /// Works until a signal comes, the time is over, or `done` says so.
    pub(crate) fn run(
        &mut self,
        signals: &SigSet,
        at_most: Option<Duration>,
        done: impl Fn() -> bool,
    ) -> io::Result<()> {
        let begun = Instant::now();
        let mut sweep_at = begun + SWEEP_EVERY;
        while at_most.is_none_or(|at_most| begun.elapsed() < at_most) && !done() {
            if wait_signal(signals, LINK_EVERY) {
                break;
            }
            self.look_at_links()?;
            while let Ok(Event::Moved(mac)) = self.events.try_recv() {
                self.retract_towards(mac);
            }
            if Instant::now() >= sweep_at {
                sweep_at += SWEEP_EVERY;
                self.sweep();
                self.print(begun.elapsed());
            }
        }
        Ok(())
    }

    /// The last figures; dropping does the rest.
    pub(crate) fn close(mut self) -> Totals {
        self.sweep();
        self.totals()
    }

    // ---- ports ----

    /// Ports are those that are up. One that went down, went away or has another MTU is deleted; one
    /// that is up (again) is added, as a new one that inherits nothing.
    fn look_at_links(&mut self) -> io::Result<()> {
        for at in 0..self.switch.ports.len() {
            let switch = Arc::clone(&self.switch);
            let Some(port) = switch.ports.get(at) else { break };
            let (mtu, before) = (self.links.mtu(port), port.mtu.load(Ordering::Relaxed));
            if before != 0 && mtu != before {
                self.delete_port(at, port);
            }
            if mtu != 0 && mtu != before {
                self.add_port(port)?;
                // Packet threads offer flows towards it from here on.
                port.mtu.store(mtu, Ordering::Release);
            }
        }
        Ok(())
    }

    fn add_port(&self, port: &SwitchPort) -> io::Result<()> {
        let new = NewPort {
            ifindex: port.ifindex,
            name: port.name.clone(),
            hw_flags: HwFlags::Both,
            providers: self.providers.clone(),
            capacity: None,
        };
        let engine = &self.switch.engine;
        let generation = engine.port_add(new).map_err(io::Error::other)?;
        if let Some(p) = engine.ports().iter().find(|p| p.netdev.generation == generation) {
            println!("port {}: {} {}", port.name, p.provider.unwrap_or(NO_PROVIDER), p.about);
            for refusal in &p.refusals {
                println!("  not {}: {}", refusal.class, refusal.why);
            }
        }
        Ok(())
    }

    fn delete_port(&mut self, at: usize, port: &SwitchPort) {
        let engine = &self.switch.engine;
        // First nobody forwards to it any more ...
        port.mtu.store(0, Ordering::Release);
        self.switch.macs.forget_port(at);
        let carried = engine.ports().into_iter().find(|p| p.netdev.ifindex == port.ifindex);
        self.past_by_rules += carried.map_or(0, |p| p.packets);
        // ... then the engine: this returns when every packet thread has passed a quiescent state,
        // or sleeps, and the rules into the port are gone, and its own.
        match engine.port_del(port.ifindex) {
            Ok(deleted) => {
                // A thread in the middle of a batch may have offered a path into the port just
                // before it saw that it is down, and behind the engine's back. It has passed a
                // quiescent state since, so this is the last of them.
                let retracted = deleted.retracted + engine.retract_egress(port.ifindex);
                println!(
                    "port {} deleted: {} rules of its own, {retracted} on other ports",
                    port.name, deleted.flushed
                );
                for fault in deleted.faults {
                    println!("  {fault}");
                }
            }
            Err(e) => println!("port {}: {e}", port.name),
        }
        self.port_deletes += 1;
    }

    /// A station is somewhere else, or nobody knows where: rules that forward to it go.
    fn retract_towards(&self, mac: MacAddr) {
        for conn in self.switch.conns.all() {
            if let Some(handle) = &conn.offload
                && Direction::BOTH.iter().any(|&d| conn.towards(d) == Some(mac))
            {
                self.switch.engine.conn_retract(handle, TakenBack::Asked);
            }
        }
    }

    // ---- expiry ----

    /// Asks the rules what they carried, and ends what nobody uses.
    fn sweep(&mut self) {
        let Switch { engine, conns, macs, .. } = &*self.switch;
        let sweep = engine.sweep(&mut self.strays);
        for (port, fault) in &sweep.faults {
            println!("port {port}: {fault}");
        }
        conns.check_limit();
        let now = engine.now_ms();
        for conn in conns.all() {
            let timeout = conn.timeout_ms(&self.timeouts);
            let mut expiry = conn.expiry_ms(&self.timeouts);
            if let Some(handle) = &conn.offload {
                // Never shortened: the last packet counts, whoever forwarded it.
                expiry = extended_expiry(expiry, engine.conn_update(handle), timeout, now);
            }
            conn.set_expiry_ms(expiry);
            if expiry <= now {
                if conn.state() < State::Closing {
                    conns.expired.fetch_add(1, Ordering::Relaxed);
                }
                conns.remove(&conn);
                continue;
            }
            // A station whose packets rules forward is not silent, though its packets are not seen:
            // it is where the other direction goes to.
            let Some(handle) = &conn.offload else { continue };
            for slot in engine.slots(handle) {
                let used =
                    slot.idle_ms.is_some_and(|ms| Duration::from_millis(ms) < 2 * SWEEP_EVERY);
                if let Some(mac) = conn.towards(slot.direction.opposite()).filter(|_| used) {
                    macs.refresh(mac, now);
                }
            }
        }
        for mac in self.switch.macs.age(now) {
            self.retract_towards(mac);
        }
    }

    // ---- figures ----

    /// As of the last sweep.
    pub(crate) fn totals(&self) -> Totals {
        let sum = |of: fn(&Counters) -> u64| self.counters.iter().map(|c| of(c)).sum();
        Totals {
            software: sum(|c| c.packets.load(Ordering::Relaxed)),
            dropped: sum(|c| c.dropped.load(Ordering::Relaxed)),
            missed: sum(|c| c.missed.load(Ordering::Relaxed)),
            by_rules: self.past_by_rules + self.ports().iter().map(|p| p.packets).sum::<u64>(),
            connections: self.switch.conns.created.load(Ordering::Relaxed),
            expired: self.switch.conns.expired.load(Ordering::Relaxed),
            port_deletes: self.port_deletes,
            in_nic: self.in_nic,
        }
    }

    fn print(&mut self, elapsed: Duration) {
        if self.rows.is_multiple_of(20) {
            println!(
                "{:>6} {:>21} {:>20} {:>12} {:>7} {:>8}",
                "second",
                "packets in software",
                "packets in hardware",
                "connections",
                "rules",
                "in a NIC"
            );
        }
        self.rows += 1;
        let ports = self.ports();
        let in_nic = ports.iter().map(|p| p.in_hw).sum::<u64>();
        self.in_nic = self.in_nic.max(in_nic);
        let now = self.totals();
        println!(
            "{:>6} {:>21} {:>20} {:>12} {:>7} {:>8}",
            elapsed.as_secs(),
            now.software - self.last.software,
            now.by_rules.saturating_sub(self.last.by_rules),
            self.switch.conns.len(),
            ports.iter().map(|p| p.slots.installed).sum::<u64>(),
            in_nic,
        );
        self.last = now;
    }
}

impl Drop for Control {
    /// However it ends: stops the packet threads, then removes rules, qdiscs, connections.
    fn drop(&mut self) {
        self.switch.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        for fault in self.switch.engine.close().into_iter().flat_map(|deleted| deleted.faults) {
            eprintln!("closing: {fault}");
        }
    }
}

/// True when one of the signals came within the time.
fn wait_signal(signals: &SigSet, at_most: Duration) -> bool {
    let timeout = nix::sys::time::TimeSpec::from(at_most);
    // SAFETY: the kernel reads a set of signals and a time, and writes nothing: it may be told that
    // nobody wants to know more.
    let signal = unsafe { libc::sigtimedwait(signals.as_ref(), ptr::null_mut(), timeout.as_ref()) };
    signal > 0
}

/// Blocks the signals that end the switch, in this thread and those that it starts.
pub(crate) fn block_signals() -> io::Result<SigSet> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    Ok(signals)
}

/// Asks for flags and MTU of netdevs.
struct Links(OwnedFd);

impl Links {
    fn open() -> io::Result<Self> {
        let fd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        Ok(Self(fd))
    }

    /// The MTU of a netdev; 0 when it is down or gone, or is another one of the same name.
    fn mtu(&self, port: &SwitchPort) -> u32 {
        const RUNNING: i32 = libc::IFF_UP | libc::IFF_RUNNING;
        if if_nametoindex(port.name.as_str()).ok().and_then(Ifindex::new) != Some(port.ifindex) {
            return 0;
        }
        // SAFETY: all zeros is a value of this structure of numbers (and of its union).
        let mut request: libc::ifreq = unsafe { zeroed() };
        // The last byte stays NUL; the name is one that the kernel knows, so it fits.
        for (to, from) in
            request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(port.name.bytes())
        {
            *to = from.cast_signed();
        }
        let fd = self.0.as_raw_fd();
        // SAFETY: both requests read the name and write a number into the union, which is then read
        // as what the request wrote.
        let (flags, mtu) = unsafe {
            if libc::ioctl(fd, libc::SIOCGIFFLAGS, &raw mut request) != 0 {
                return 0;
            }
            let flags = i32::from(request.ifr_ifru.ifru_flags);
            if libc::ioctl(fd, libc::SIOCGIFMTU, &raw mut request) != 0 {
                return 0;
            }
            (flags, request.ifr_ifru.ifru_mtu)
        };
        if flags & RUNNING == RUNNING { u32::try_from(mtu).unwrap_or(0) } else { 0 }
    }
}
