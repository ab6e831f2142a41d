//! A packet thread ("PMD", as in OVS with DPDK): takes batches of frames off the rings of its ports,
//! tracks connections, offers them to the engine, forwards.
//!
//! What the engine wants of such a thread, all of it in this file:
//!
//! * one [`Worker`] per thread;
//! * [`Worker::quiescent`] once per batch, when nothing borrowed from the worker is left;
//! * [`Worker::offline`] before blocking and [`Worker::online`] after it, so that nobody who takes a
//!   port away waits for a thread that sleeps;
//! * the port looked up once per batch, not once per packet;
//! * per packet of a known connection: [`PortRef::is_decided`], one atomic load;
//! * offers ([`PortRef::conn_add`], [`PortRef::conn_seen`]) only where that says no. They queue
//!   something for the port's own thread: no system call and no waiting here.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::Sender as EventSender;

use ctoffload::engine::Engine;
use ctoffload::engine::conn::ConnHandle;
use ctoffload::engine::datapath::{Path, PathSpec};
use ctoffload::engine::taken::TakenBack;
use ctoffload::engine::worker::{Offer, PortRef, Worker};
use netdev_providers::{Direction, Forward, Ifindex, MacAddr, Tuple};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::afpacket::{Outgoing, Ring, Sender};
use super::conns::{Conn, Conns, State};
use super::macs::{Macs, Reader};
use super::packet::{FIN, Frame, RST, Segment, packets_on_the_wire};

/// A port of the switch, whether or not it is one of the engine at the moment.
pub(crate) struct SwitchPort {
    pub(crate) name: String,
    pub(crate) ifindex: Ifindex,
    /// Its MTU while it is up, 0 while it is down.
    pub(crate) mtu: AtomicU32,
}

/// What packet threads have in common.
pub(crate) struct Switch {
    pub(crate) engine: Engine,
    pub(crate) ports: Vec<SwitchPort>,
    pub(crate) macs: Macs,
    pub(crate) conns: Conns,
    pub(crate) stop: AtomicBool,
}

/// Something for the control thread.
pub(crate) enum Event {
    /// The station is at another port now.
    Moved(MacAddr),
}

/// Counts of one thread, on a cache line of its own. The thread adds, others read.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Counters {
    /// Frames received from the kernel, as packets on the wire.
    pub(crate) packets: AtomicU64,
    /// Frames that could not be sent or were cut short.
    pub(crate) dropped: AtomicU64,
    /// Frames that found a ring full.
    pub(crate) missed: AtomicU64,
}

/// A port that a thread polls.
pub(crate) struct Rx {
    /// Index of the port.
    pub(crate) port: usize,
    pub(crate) rings: Vec<Ring>,
}

/// Connections that a thread has looked up, by the tuple that arrives: no lock, no shared line.
type Flows = HashMap<Tuple, (Arc<Conn>, Direction)>;

/// Flows that a thread remembers; beyond that it starts anew.
const FLOWS: usize = 8192;

/// A packet thread.
pub(crate) struct Pmd {
    switch: Arc<Switch>,
    worker: Worker,
    sender: Sender,
    macs: Reader,
    flows: Flows,
    counters: Arc<Counters>,
    events: EventSender<Event>,
    /// Frames of the present block that leave. Kept for its memory.
    out: Vec<Outgoing>,
    now_ms: u64,
    tidied_ms: u64,
}

impl Pmd {
    pub(crate) fn new(
        switch: &Arc<Switch>,
        counters: Arc<Counters>,
        events: EventSender<Event>,
    ) -> std::io::Result<Self> {
        Ok(Self {
            worker: switch.engine.worker(),
            sender: Sender::open()?,
            macs: switch.macs.reader(),
            flows: Flows::new(),
            out: Vec::new(),
            now_ms: switch.engine.now_ms(),
            tidied_ms: 0,
            switch: Arc::clone(switch),
            counters,
            events,
        })
    }

    /// Runs until it is told to stop.
    pub(crate) fn run(mut self, mut inputs: Vec<Rx>) {
        while !self.switch.stop.load(Ordering::Relaxed) {
            // Nothing of the last batch is held any more. Ports that came or went since are seen
            // from here on.
            self.worker.quiescent();
            self.now_ms = self.switch.engine.now_ms();
            let mut idle = true;
            for rx in &mut inputs {
                idle &= !self.batch(rx);
            }
            if self.now_ms.saturating_sub(self.tidied_ms) >= 1000 {
                self.tidy(&inputs);
            }
            if idle {
                self.worker.offline();
                wait(&inputs);
                self.worker.online();
            }
        }
    }

    /// One block of each ring of a port. False when there was none.
    fn batch(&mut self, rx: &mut Rx) -> bool {
        let switch = &*self.switch;
        let Some(ingress) = switch.ports.get(rx.port) else { return false };
        let mut any = false;
        for ring in &mut rx.rings {
            let Some(block) = ring.block() else { continue };
            any = true;
            let mut batch = Batch {
                switch,
                worker: &self.worker,
                // Once per batch. None while the port is not one of the engine.
                port: self.worker.port(ingress.ifindex),
                ingress,
                ingress_at: rx.port,
                now_ms: self.now_ms,
                flows: &mut self.flows,
                macs: &mut self.macs,
                events: &self.events,
                out: &mut self.out,
            };
            let (mut packets, mut dropped) = (0, 0);
            for span in block.frames() {
                let Some(span) = span else {
                    dropped += 1;
                    continue;
                };
                let (vnet, bytes) = block.frame(span);
                let Some(frame) = Frame::parse(bytes) else { continue };
                packets += packets_on_the_wire(vnet, frame.segment.as_ref());
                batch.frame(&frame, |egress| Outgoing { span, egress, ethertype: frame.ethertype });
            }
            dropped += self.sender.send(&block, &self.out);
            self.out.clear();
            self.counters.packets.fetch_add(packets, Ordering::Relaxed);
            self.counters.dropped.fetch_add(dropped, Ordering::Relaxed);
        }
        any
    }

    /// Once a second: lets go of connections that are gone, and counts what the kernel lost.
    fn tidy(&mut self, inputs: &[Rx]) {
        self.tidied_ms = self.now_ms;
        self.flows.retain(|_, (conn, _)| conn.state() != State::Gone);
        let missed: u64 = inputs.iter().flat_map(|rx| &rx.rings).map(Ring::drops).sum();
        self.counters.missed.fetch_add(missed, Ordering::Relaxed);
    }
}

/// Blocks until one of the rings has something, but not for ever: there is a flag to look at.
fn wait(inputs: &[Rx]) {
    let rings: Vec<&Ring> = inputs.iter().flat_map(|rx| &rx.rings).collect();
    let mut fds: Vec<PollFd<'_>> =
        rings.iter().map(|ring| PollFd::new(ring.as_fd(), PollFlags::POLLIN)).collect();
    let _ = poll(&mut fds, PollTimeout::from(100u8));
    for (fd, ring) in fds.iter().zip(&rings) {
        if fd.revents().is_some_and(|r| r.contains(PollFlags::POLLERR)) {
            ring.clear_error();
        }
    }
}

/// What is the same for all frames of a batch.
struct Batch<'a> {
    switch: &'a Switch,
    worker: &'a Worker,
    port: Option<PortRef<'a>>,
    ingress: &'a SwitchPort,
    ingress_at: usize,
    now_ms: u64,
    flows: &'a mut Flows,
    macs: &'a mut Reader,
    events: &'a EventSender<Event>,
    out: &'a mut Vec<Outgoing>,
}

impl Batch<'_> {
    /// Learns, tracks, and decides where a frame goes.
    fn frame(&mut self, frame: &Frame, leaving: impl Fn(Ifindex) -> Outgoing) {
        // 01-80-C2-00-00-0x is for the next bridge and no further (IEEE 802.1D, 7.12.6).
        if matches!(frame.dst.0, [0x01, 0x80, 0xc2, 0, 0, 0..=0x0f]) {
            return;
        }
        let table = self.macs.load();
        if self.switch.macs.learn(table, frame.src, self.ingress_at, self.now_ms) {
            let _ = self.events.send(Event::Moved(frame.src));
        }
        let at = table.get(&frame.dst).map(|station| station.port);
        if at == Some(self.ingress_at) {
            return; // sender and receiver are on the same side
        }
        let switch = self.switch;
        let egress = at.and_then(|at| switch.ports.get(at));
        if let Some(segment) = &frame.segment {
            self.track(frame, segment, egress);
        }
        let ports = switch.ports.iter().enumerate();
        match egress {
            Some(port) => self.out.push(leaving(port.ifindex)),
            None => self.out.extend(
                ports
                    .filter(|(at, p)| *at != self.ingress_at && p.mtu.load(Ordering::Relaxed) > 0)
                    .map(|(_, p)| leaving(p.ifindex)),
            ),
        }
    }

    /// Updates the connection, and offers it where it has not been.
    fn track(&mut self, frame: &Frame, segment: &Segment, egress: Option<&SwitchPort>) {
        if self.flows.len() >= FLOWS {
            self.flows.clear();
        }
        let mut created = false;
        // Known flows are used in place: to count a reference would be to write to a line that the
        // thread of the other direction has too.
        let (conn, direction) = match self.flows.entry(segment.tuple) {
            // A closed one may be about to have a successor: the table decides that.
            Entry::Occupied(e) if e.get().0.state() < State::Closing => &*e.into_mut(),
            entry => {
                let table = &self.switch.conns;
                let Some(found) = table.find(segment, self.ingress.ifindex, self.now_ms) else {
                    return;
                };
                created = found.created;
                &*entry.insert_entry((found.conn, found.direction)).into_mut()
            }
        };
        let direction = *direction;
        conn.touch(self.now_ms);
        let Some(handle) = &conn.offload else { return };
        if segment.flags & (FIN | RST) != 0 {
            // Rules leave FIN and RST to us. The end is near: from here on in software. Whoever
            // forges one makes a connection slow, no more.
            if conn.closing() {
                self.switch.engine.conn_del(handle);
            }
            return;
        }
        if direction == Direction::Reply
            && conn.answered()
            && let Some(port) = self.worker.port(conn.ingress)
        {
            // Established: the provider of the port where it began is told. The answers' own
            // direction is the business of the port that they arrive on: it is offered below, as
            // on any later port.
            port.conn_established(handle, Direction::Original);
        }
        let Some(port) = self.port else { return };
        if port.is_decided(handle, direction) {
            // The usual case. Where the rule sends to another station than the sender now wants (its
            // router has changed, say), the rule goes, and the next packet makes another one.
            if conn.towards(direction).is_some_and(|mac| mac != frame.dst) {
                self.switch.engine.slot_retract(
                    handle,
                    direction,
                    port.generation(),
                    TakenBack::Asked,
                );
            }
            return;
        }
        if conn.state() >= State::Closing {
            return;
        }
        // While nobody knows where the receiver is, frames are flooded: nothing to offload yet.
        let Some(egress) = egress else { return };
        let Some(path) = path(handle.leaving(direction), frame, self.ingress, egress) else {
            return;
        };
        conn.set_towards(direction, frame.dst);
        offer(port, handle, direction, created, path);
    }
}

/// The way of a connection's packets; `None`: the netdev that they leave by is down, and a rule that forwards to
/// it would drop them.
#[cold]
fn path(tuple: Tuple, frame: &Frame, ingress: &SwitchPort, egress: &SwitchPort) -> Option<Path> {
    let (ingress_mtu, mtu) =
        (ingress.mtu.load(Ordering::Acquire), egress.mtu.load(Ordering::Acquire));
    (mtu > 0).then_some(Path {
        // Bridged packets can be matched with any destination MAC address (`None`). With the one
        // that we looked up, a packet to another one comes to us, as it must: where its receiver is
        // is another question.
        eth_dst: Some(frame.dst),
        vlan: None, // access ports: see `afpacket`
        ingress_mtu,
        forward: Forward {
            egress: egress.ifindex,
            vlan: None,
            mtu,
            tuple,
            macs: None, // bridged: MAC addresses and TTL stay
            egress_decides: false,
        },
        next_hop: None,
        iif: None,
        oif: None,
        answer: 0,
    })
}

#[cold]
fn offer(port: PortRef<'_>, handle: &ConnHandle, direction: Direction, created: bool, path: Path) {
    // We know the path, so the engine need not ask (see `NoDatapath`).
    let path = PathSpec::Known(Box::new(path));
    // On the port of the packet that created it, and nowhere else; any other port's packets are
    // offered there when they come, by the same line.
    let offer = match created {
        true => port.conn_add(handle, direction, path),
        false => port.conn_seen(handle, direction, path),
    };
    match offer {
        // Refused for now (the queue is full): the slot is empty still, a later packet tries again.
        Offer::Queued | Offer::Decided | Offer::Refused(_) | Offer::Unbound => {}
    }
}
