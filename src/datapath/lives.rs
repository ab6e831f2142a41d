//! The lives of all offloaded connections: asks conntrack about those that are due, and does what
//! [`super::life`] decides.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::PoisonError;
use std::time::Duration;

use super::backend::{Shared, ct_id};
use super::ends::Over;
use super::life::{Life, Seen, Step, Times, Verdict, Write, mend};
use super::netfilter::conntrack::{
    Conntrack, ConntrackError, CtEntry, CtStatus, CtUpdate, Timeouts, timeouts,
};
use crate::engine::Engine;
use crate::engine::conn::ConnHandle;
use crate::engine::taken::TakenBack;
use crate::engine::usage::Usage;

/// How many are looked at in one tick: the others wait for the next.
const LOOKS_AT_ONCE: usize = 1024;

#[derive(Default)]
pub(super) struct Lives {
    by_epoch: HashMap<u64, (ConnHandle, Life)>,
    due: BinaryHeap<Reverse<(u64, u64)>>,
    /// When the last sweep was done.
    swept_ms: u64,
    timeouts: Option<Timeouts>,
}

/// One that conntrack is asked about.
struct Asked {
    epoch: u64,
    conn: ConnHandle,
    used_ms: Option<u64>,
    evented: bool,
}

impl Lives {
    /// Counters have been read.
    pub(super) const fn swept(&mut self, now_ms: u64) {
        self.swept_ms = now_ms;
    }

    /// The shortest timeout among the connections that have rules.
    pub(super) fn shortest_timeout(&self) -> Option<Duration> {
        let timeouts = self.timeouts?;
        self.by_epoch.values().map(|(_, life)| life.timeout(&timeouts)).min()
    }

    /// Looks after those that are due; the shortest timeout of those that are new.
    pub(super) fn look(
        &mut self,
        backend: &Shared,
        engine: &Engine,
        conntrack: &mut Conntrack,
        pause: Duration,
    ) -> Option<Duration> {
        let now_ms = engine.now_ms();
        let fresh =
            std::mem::take(&mut *backend.installed.lock().unwrap_or_else(PoisonError::into_inner));
        let nothing_due = self.due.peek().is_none_or(|Reverse((due, _))| *due > now_ms);
        if nothing_due && fresh.is_empty() {
            return None;
        }
        let timeouts = match timeouts() {
            Ok(t) => *self.timeouts.insert(t),
            Err(e) => {
                tracing::warn!("conntrack timeouts are not kept up: {e}");
                return None;
            }
        };
        let shortest = self.welcome(backend, fresh, now_ms, &timeouts);
        let times = Times { now_ms, swept_ms: self.swept_ms, pause };
        let asked = self.due(backend, engine, times);
        if let Err(e) = self.ask(backend, engine, conntrack, &asked, times, &timeouts) {
            tracing::warn!("conntrack timeouts could not be kept up: {e}");
        }
        for asked in asked {
            if let Some((_, life)) = self.by_epoch.get(&asked.epoch) {
                // What could not be asked is due again at once.
                self.due.push(Reverse((life.due_ms(), asked.epoch)));
            }
        }
        shortest
    }

    /// Takes up connections that have got their first rule.
    fn welcome(
        &mut self,
        backend: &Shared,
        fresh: Vec<ConnHandle>,
        now_ms: u64,
        timeouts: &Timeouts,
    ) -> Option<Duration> {
        let mut shortest = None;
        for conn in fresh {
            let epoch = conn.epoch().0;
            if self.by_epoch.contains_key(&epoch) {
                continue;
            }
            let learnt = backend.known_of(&conn).and_then(|k| k.timeout);
            let proto = conn.key().original.proto();
            let life = Life::new(proto, conn.created_ms(), learnt, now_ms);
            self.due.push(Reverse((life.due_ms(), epoch)));
            let timeout = life.timeout(timeouts);
            shortest = Some(shortest.map_or(timeout, |s: Duration| s.min(timeout)));
            self.by_epoch.insert(epoch, (conn, life));
        }
        shortest
    }

    /// Those of which conntrack is to be asked now; the others that are due wait on, or are forgotten.
    fn due(&mut self, backend: &Shared, engine: &Engine, times: Times) -> Vec<Asked> {
        let mut asked = Vec::new();
        let mut wait = Vec::new();
        while let Some(Reverse((due, epoch))) = self.due.peek().copied()
            && due <= times.now_ms
            && asked.len() < LOOKS_AT_ONCE
        {
            self.due.pop();
            let Some((conn, life)) = self.by_epoch.get_mut(&epoch) else { continue };
            let used_ms = match engine.conn_update(conn) {
                // Without rules conntrack sees all there is.
                usage if usage == Usage::NotOffloaded || conn.is_dead() => {
                    self.by_epoch.remove(&epoch);
                    continue;
                }
                Usage::Unknown => {
                    life.wait(times.now_ms);
                    wait.push(Reverse((life.due_ms(), epoch)));
                    continue;
                }
                Usage::LastUsed { at_ms, packets, .. } => (packets > 0).then_some(at_ms),
                Usage::NotOffloaded => None,
            };
            let evented = backend.known_of(conn).is_some_and(|k| k.evented);
            match life.step(used_ms, evented, times) {
                Step::Wait => wait.push(Reverse((life.due_ms(), epoch))),
                Step::Look => asked.push(Asked { epoch, conn: conn.clone(), used_ms, evented }),
            }
        }
        self.due.extend(wait);
        asked
    }

    fn ask(
        &mut self,
        backend: &Shared,
        engine: &Engine,
        conntrack: &mut Conntrack,
        asked: &[Asked],
        times: Times,
        timeouts: &Timeouts,
    ) -> Result<(), ConntrackError> {
        let entries = entries_of(conntrack, asked.iter().map(|a| &a.conn))?;
        let (mut updates, mut written, mut over) = (Vec::new(), Vec::new(), Over::default());
        for (asked, entry) in asked.iter().zip(&entries) {
            let Some((conn, life)) = self.by_epoch.get_mut(&asked.epoch) else { continue };
            let seen = entry.as_ref().map(Seen::of);
            let (used_ms, evented) = (asked.used_ms, asked.evented);
            match (life.look(seen.as_ref(), used_ms, evented, times, timeouts), entry) {
                (Verdict::Keep(write), Some(entry)) => {
                    // What is not known to have events is written to: if it has, that comes back as one.
                    if write.is_some() || !evented {
                        updates.push(update(conn, entry, write.unwrap_or_default()));
                    }
                    if write.is_some_and(|w| w.timeout.is_some()) {
                        written.push(conn.clone());
                    }
                }
                (Verdict::Closing(mend), Some(entry)) => {
                    over.updated(backend, entry);
                    if mend.is_some() {
                        let write = Write { timeout: mend, ..Write::default() };
                        updates.push(update(conn, entry, write));
                    }
                    self.by_epoch.remove(&asked.epoch);
                }
                (Verdict::TakeBack, _) => {
                    tracing::debug!(%conn, "goes back into software: it is silent, or was reset");
                    if let Some(mut known) = backend.known_mut_of(conn) {
                        known.silent = true;
                    }
                    engine.conn_retract(conn, TakenBack::Silent);
                    self.by_epoch.remove(&asked.epoch);
                }
                (Verdict::Gone, _) | (_, None) => {
                    if let Some(id) = ct_id(conn) {
                        over.destroyed(backend, &conn.key(), id);
                    }
                    self.by_epoch.remove(&asked.epoch);
                }
            }
        }
        over.end(backend, engine);
        // What has ended is told by its event, or found when it is due again.
        conntrack.update_what_is_there(&updates)?;
        // A FIN can have come between the question and the write.
        let entries = entries_of(conntrack, written.iter())?;
        let (mut mends, mut over) = (Vec::new(), Over::default());
        for (conn, entry) in written.iter().zip(entries) {
            let Some(entry) = entry else { continue };
            if let Some(timeout) = mend(&Seen::of(&entry), timeouts) {
                tracing::debug!(%conn, "closed while its timeout was written");
                over.updated(backend, &entry);
                let write = Write { timeout: Some(timeout), ..Write::default() };
                mends.push(update(conn, &entry, write));
            }
        }
        over.end(backend, engine);
        conntrack.update_what_is_there(&mends)
    }
}

/// The entries of connections, in order; an entry that took the place of another's is none.
fn entries_of<'a>(
    conntrack: &mut Conntrack,
    conns: impl Iterator<Item = &'a ConnHandle> + Clone,
) -> Result<Vec<Option<CtEntry>>, ConntrackError> {
    let wanted: Vec<_> = conns.clone().map(|c| (c.key().zone, c.key().original)).collect();
    let mut entries = conntrack.get_many(&wanted)?;
    for (conn, entry) in conns.zip(&mut entries) {
        entry.take_if(|e| e.id != ct_id(conn));
    }
    Ok(entries)
}

fn update(conn: &ConnHandle, entry: &CtEntry, write: Write) -> CtUpdate {
    CtUpdate {
        timeout: write.timeout,
        forget_acked: write.forget_acked,
        status: write.assure.then_some(CtStatus(entry.status.0 | CtStatus::ASSURED)),
        ..CtUpdate::of(conn.key().zone, conn.key().original)
    }
}
