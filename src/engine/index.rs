//! Connections are found by key, made, and ended here: in the cold index (`zones`), never on
//! the packet path.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use netdev_providers::{Direction, Epoch, Generation, Tuple, Zone};

use super::Engine;
use super::conn::{ConnHandle, ConnKey};
use super::port::Port;
use super::state::PortSlot;
use super::table::PortTable;
use super::taken::TakenBack;
use super::zones::{Entered, Walk};

/// Connections, one after the other: those that live all the time, each once, and some of those that are made
/// or end meanwhile. Whoever makes or ends one meanwhile waits for some thousands of them at most to be
/// looked at, and for none between two calls of `next`.
#[derive(Debug)]
pub struct Conns {
    engine: Engine,
    walk: Walk,
    part: std::vec::IntoIter<ConnHandle>,
}

impl Iterator for Conns {
    type Item = ConnHandle;

    fn next(&mut self) -> Option<ConnHandle> {
        loop {
            if let Some(conn) = self.part.next() {
                return Some(conn);
            }
            self.part = self.engine.0.conns.next_part(&mut self.walk)?.into_iter();
        }
    }
}

impl Engine {
    /// The connection of this key; made when there is none. `None` when as many are kept as may be.
    ///
    /// `tag` is the datapath's own mark. A connection of the same key and another tag is a
    /// predecessor whose end was missed: it is ended now, and a new one, with a new epoch, made.
    #[must_use]
    pub fn conn_create(&self, key: ConnKey, reply: Tuple, tag: u64) -> Option<ConnHandle> {
        let is_as_good = |there: &ConnHandle| there.tag() == tag && !there.is_dead();
        let make = |instead: bool| {
            // One that stands in another's place is counted already.
            if !instead
                && self.0.conn_count.fetch_add(1, Ordering::Relaxed) >= self.0.limits.connections
            {
                self.0.conn_count.fetch_sub(1, Ordering::Relaxed);
                return None;
            }
            Some(self.new_conn(key, reply, tag))
        };
        match self.0.conns.enter(&key, is_as_good, make) {
            Entered::Found(conn) | Entered::New(conn) => Some(conn),
            Entered::Instead(conn, old) => {
                self.conn_del(&old);
                Some(conn)
            }
            Entered::None => None,
        }
    }

    fn new_conn(&self, key: ConnKey, reply: Tuple, tag: u64) -> ConnHandle {
        let epoch = Epoch(self.0.next_epoch.fetch_add(1, Ordering::Relaxed));
        ConnHandle::new(key, reply, epoch, tag, self.0.clock.now_ms())
    }

    /// The living connection of this key.
    #[must_use]
    pub fn conn(&self, key: &ConnKey) -> Option<ConnHandle> {
        self.0.conns.find(key)
    }

    /// The same for a burst of packets: `found` is given each key's place in `keys` and its living connection,
    /// in the order of `keys`. Look-ups wait for memory together, so in a table that no cache holds each takes a
    /// fraction of what [`conn`](Self::conn) does; 32 at a time is enough. No lock is held while `found` runs.
    pub fn conns_by_key(&self, keys: &[ConnKey], found: impl FnMut(usize, Option<ConnHandle>)) {
        self.0.conns.find_each(keys, found);
    }

    /// All connections, in no order.
    #[must_use]
    pub fn conns(&self) -> Conns {
        self.conns_in(None)
    }

    /// Those of one zone, or of all.
    fn conns_in(&self, zone: Option<Zone>) -> Conns {
        Conns { engine: self.clone(), walk: Walk::of(zone), part: Vec::new().into_iter() }
    }

    /// The living connections with this tuple, in either direction, and of this zone. It costs what is found,
    /// and a look into each zone where none is named.
    #[must_use]
    pub fn conns_of(&self, tuple: Option<&Tuple>, zone: Option<Zone>) -> Vec<ConnHandle> {
        match tuple {
            Some(tuple) => self.0.conns.of_tuple(tuple, zone),
            None => self.conns_in(zone).collect(),
        }
    }

    /// How many connections live.
    #[must_use]
    pub fn conn_count(&self) -> usize {
        self.0.conn_count.load(Ordering::Relaxed)
    }

    /// Ends all connections.
    pub(super) fn end_all(&self) {
        let mut ended = 0;
        self.0.conns.take_all(|c| {
            c.end();
            ended += 1;
        });
        // Each is counted down by whoever took it out.
        self.0.conn_count.fetch_sub(ended, Ordering::Relaxed);
    }

    /// The connection has ended: deletes its rules, on the ports that hold something of it and no
    /// others. Does not wait for them; returns how many there were.
    pub fn conn_del(&self, conn: &ConnHandle) -> usize {
        self.conns_del([conn])
    }

    /// The same for several connections: each port's thread is woken once, behind the last of them.
    pub fn conns_del<'a>(&self, conns: impl IntoIterator<Item = &'a ConnHandle>) -> usize {
        let ended: Vec<_> = conns.into_iter().filter(|conn| conn.end()).collect();
        for conn in &ended {
            if self.0.conns.remove(conn) {
                self.0.conn_count.fetch_sub(1, Ordering::Relaxed);
            }
        }
        // Only now: whoever has claimed a slot before the end has done so on a port that stands in it.
        let table = self.0.publication.table();
        let mut rules = 0;
        let mut to_wake: Vec<&Arc<Port>> = Vec::new();
        for conn in ended {
            for (d, generation, _) in conn.all_slots() {
                // The slots of a port that is gone have been reset by its flush.
                let Some(port) = table.by_generation(generation) else { continue };
                let Some(slot) = PortSlot::find(&self.0, port, conn, d) else { continue };
                let (had_one, command) = slot.unwound(TakenBack::Asked);
                rules += usize::from(had_one);
                if let Some(command) = command {
                    port.queue.put(command);
                    if !to_wake.iter().any(|p| Arc::ptr_eq(p, port)) {
                        to_wake.push(port);
                    }
                }
            }
        }
        to_wake.iter().for_each(|port| port.queue.wake());
        rules
    }

    /// Takes the connection off the hardware: deletes its rules; it lives on in software, and the
    /// next packet on each port offers it again. Returns how many rules there were.
    pub fn conn_retract(&self, conn: &ConnHandle, why: TakenBack) -> usize {
        let table = self.0.publication.table();
        conn.all_slots().filter(|(d, g, _)| self.unwind_slot(&table, conn, *d, *g, why)).count()
    }

    /// The same for one slot, because what its rule was made from has changed. True when there was
    /// something.
    pub fn slot_retract(
        &self,
        conn: &ConnHandle,
        d: Direction,
        port: Generation,
        why: TakenBack,
    ) -> bool {
        self.unwind_slot(&self.0.publication.table(), conn, d, port, why)
    }

    pub(super) fn unwind_slot(
        &self,
        table: &PortTable,
        conn: &ConnHandle,
        d: Direction,
        generation: Generation,
        why: TakenBack,
    ) -> bool {
        // The slots of a port that is gone have been reset by its flush.
        let Some(port) = table.by_generation(generation) else { return false };
        PortSlot::find(&self.0, port, conn, d).is_some_and(|slot| slot.retract(why))
    }
}
