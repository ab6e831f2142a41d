//! The cold index of connections: they are found by key, made, and ended here. Never on the packet path.

use std::sync::atomic::Ordering;

use dashmap::mapref::entry::Entry;
use netdev_providers::{Direction, Epoch, Generation, Tuple};

use super::Engine;
use super::conn::{ConnHandle, ConnKey};
use super::state::PortSlot;
use super::table::PortTable;

impl Engine {
    /// The connection of this key; made when there is none. `None` when as many are kept as may be.
    ///
    /// `tag` is the datapath's own mark. A connection of the same key and another tag is a
    /// predecessor whose end was missed: it is ended now, and a new one, with a new epoch, made.
    #[must_use]
    pub fn conn_create(&self, key: ConnKey, reply: Tuple, tag: u64) -> Option<ConnHandle> {
        let (conn, old) = match self.0.by_key.entry(key) {
            Entry::Occupied(e) if e.get().tag() == tag && !e.get().is_dead() => {
                return Some(e.get().clone());
            }
            Entry::Occupied(mut e) => {
                let conn = self.new_conn(key, reply, tag);
                let old = e.insert(conn.clone());
                (conn, Some(old))
            }
            Entry::Vacant(e) => {
                if self.0.conn_count.fetch_add(1, Ordering::Relaxed) >= self.0.limits.connections {
                    self.0.conn_count.fetch_sub(1, Ordering::Relaxed);
                    return None;
                }
                let conn = self.new_conn(key, reply, tag);
                e.insert(conn.clone());
                (conn, None)
            }
        };
        if let Some(old) = old {
            self.conn_del(&old);
        }
        Some(conn)
    }

    fn new_conn(&self, key: ConnKey, reply: Tuple, tag: u64) -> ConnHandle {
        let epoch = Epoch(self.0.next_epoch.fetch_add(1, Ordering::Relaxed));
        ConnHandle::new(key, reply, epoch, tag, self.0.clock.now_ms())
    }

    /// The living connection of this key.
    #[must_use]
    pub fn conn(&self, key: &ConnKey) -> Option<ConnHandle> {
        self.0.by_key.get(key).map(|c| c.clone())
    }

    /// All living connections, as of some moment during the call.
    #[must_use]
    pub fn conns(&self) -> Vec<ConnHandle> {
        self.0.by_key.iter().map(|c| c.clone()).collect()
    }

    /// How many connections live.
    #[must_use]
    pub fn conn_count(&self) -> usize {
        self.0.conn_count.load(Ordering::Relaxed)
    }

    /// Ends all connections.
    pub(super) fn end_all(&self) {
        let mut ended = 0;
        self.0.by_key.retain(|_, c| {
            c.end();
            ended += 1;
            false
        });
        // Each is counted down by whoever took it out.
        self.0.conn_count.fetch_sub(ended, Ordering::Relaxed);
    }

    /// The connection has ended: deletes its rules, on the ports that hold something of it and no
    /// others. Does not wait for them; returns how many there were.
    pub fn conn_del(&self, conn: &ConnHandle) -> usize {
        if !conn.end() {
            return 0;
        }
        if self.0.by_key.remove_if(conn.key(), |_, c| c.is_same(conn)).is_some() {
            self.0.conn_count.fetch_sub(1, Ordering::Relaxed);
        }
        let table = self.0.publication.table();
        conn.all_slots().filter(|(d, g, _)| self.unwind_slot(&table, conn, *d, *g)).count()
    }

    /// Takes the connection off the hardware: deletes its rules; it lives on in software, and the
    /// next packet on each port offers it again. Returns how many rules there were.
    pub fn conn_retract(&self, conn: &ConnHandle) -> usize {
        let table = self.0.publication.table();
        conn.all_slots().filter(|(d, g, _)| self.unwind_slot(&table, conn, *d, *g)).count()
    }

    /// The same for one slot, because what its rule was made from has changed. True when there was
    /// something.
    pub fn slot_retract(&self, conn: &ConnHandle, d: Direction, port: Generation) -> bool {
        self.unwind_slot(&self.0.publication.table(), conn, d, port)
    }

    pub(super) fn unwind_slot(
        &self,
        table: &PortTable,
        conn: &ConnHandle,
        d: Direction,
        generation: Generation,
    ) -> bool {
        // The slots of a port that is gone have been reset by its flush.
        let Some(port) = table.by_generation(generation) else { return false };
        PortSlot::find(&self.0, port, conn, d).is_some_and(|slot| slot.retract())
    }
}
