//! Ends of connections, as conntrack tells them. FIN and RST match no rule of ours: they reach
//! conntrack, and come back as events. What a read brings is ended together ([`Over`]).

use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::TICK;
use super::backend::{Backend, Shared, key_of};
use super::netfilter::conntrack::{
    ConntrackError, CtEntry, CtEvent, CtEvents, CtId, CtUpdate, EventRead, TcpState, timeouts,
};
use super::netfilter::ledger::LedgerKey;
use super::supervisor::Failures;
use crate::engine::Engine;
use crate::engine::conn::{ConnHandle, ConnKey};
use crate::engine::taken::TakenBack;
use crate::engine::usage::Usage;

/// When events follow upon each other faster than that, they are left to gather for so long: else this thread is
/// woken for each, and ports for each delete. It is no longer than what a thread may wait for a processor anyway.
const GATHER: Duration = Duration::from_millis(1);

/// # Errors
/// When the events cannot be read any more.
pub(super) fn run(
    backend: &Shared,
    engine: &Engine,
    mut events: CtEvents,
    stop: &AtomicBool,
) -> Result<(), ConntrackError> {
    let (mut failures, mut last) = (Failures::default(), None::<Instant>);
    while !stop.load(Ordering::Relaxed) {
        if last.is_some_and(|last| last.elapsed() < GATHER) {
            std::thread::sleep(GATHER);
        }
        let read = match failures.passed("conntrack events", events.next(TICK))? {
            Some(read) => read,
            None => {
                std::thread::sleep(TICK);
                EventRead { lost: true, ..EventRead::default() }
            }
        };
        let count = read.events.len() as u64;
        backend.counts().conntrack_events.fetch_add(count, Ordering::Relaxed);
        let mut over = Over::default();
        for event in read.events {
            match event {
                CtEvent::Destroy(entry) => {
                    if let Some(id) = entry.id {
                        over.destroyed(backend, &key_of(&entry), id);
                    }
                }
                CtEvent::Update(entry) => {
                    remarked(backend, engine, &entry, entry.labels.is_some());
                    over.updated(backend, &entry);
                }
                CtEvent::New(_) => {}
            }
        }
        over.end(backend, engine);
        for entry in &read.own {
            if let Some(mut known) = backend.known.get_mut(&key_of(entry)) {
                known.evented |= Some(known.id) == entry.id;
            }
        }
        last = (count > 0 || !read.own.is_empty()).then(Instant::now);
        if read.lost {
            backend.counts().conntrack_lost.fetch_add(1, Ordering::Relaxed);
            tracing::warn!("conntrack events were lost: comparing with conntrack's table");
            backend.events_lost.store(true, Ordering::Release);
        }
    }
    Ok(())
}

/// Connections that conntrack has told the end of, gathered from what one read brings: their rules are taken away
/// together ([`end`](Self::end)), so that ports are woken once, and their elements go to the ledger's in one go.
#[derive(Default)]
#[must_use = "rules stay until they are ended"]
pub(super) struct Over {
    conns: Vec<ConnHandle>,
    elements: Vec<LedgerKey>,
    reset: Vec<(ConnKey, CtId)>,
}

impl Over {
    /// The entry is gone: so are the connection's rules, on every port, and its elements in the ledger.
    /// An entry of another id is the one before, or after.
    pub(super) fn destroyed(&mut self, backend: &Backend, key: &ConnKey, id: CtId) {
        let Some((_, known)) = backend.known.remove_if(key, |_, k| k.id == id) else { return };
        self.elements.extend(known.keys());
        if let Some(conn) = known.conn {
            tracing::debug!(%conn, "ended");
            backend.ended.note(&conn, false);
            self.conns.push(conn);
        }
    }

    /// A connection that is closing is not offloaded any more. Its elements stay in the ledger until
    /// its entry is gone, so that what is left of its packets is not sighted again.
    pub(super) fn updated(&mut self, backend: &Backend, entry: &CtEntry) {
        let Some(state) = entry.tcp_state else { return };
        if !is_closing(state) {
            return;
        }
        let key = key_of(entry);
        let known = backend.known.get_mut(&key).filter(|k| Some(k.id) == entry.id);
        let Some((conn, id)) = known.and_then(|mut k| Some((k.conn.take()?, k.id))) else { return };
        tracing::debug!(%conn, ?state, "closing");
        backend.ended.note(&conn, true);
        self.conns.push(conn);
        if state == TcpState::Close {
            self.reset.push((key, id));
        }
    }

    /// Takes their rules away.
    pub(super) fn end(self, backend: &Backend, engine: &Engine) {
        if !self.conns.is_empty() {
            engine.conns_del(&self.conns);
        }
        if !self.elements.is_empty() {
            backend.rearming().later(self.elements);
        }
        if !self.reset.is_empty() {
            backend.resets.lock().unwrap_or_else(PoisonError::into_inner).extend(self.reset);
        }
    }
}

/// A packet that was sighted so shortly after its connection's mark changed may have passed the stack
/// before.
pub(super) const JUST_CHANGED: Duration = Duration::from_millis(100);

/// The mark or the labels of a connection have changed: rules of the firewall and routes may answer
/// otherwise now. Its rules go, and its next packet asks.
pub(super) fn remarked(backend: &Backend, engine: &Engine, entry: &CtEntry, labels_changed: bool) {
    let known = backend.known.get_mut(&key_of(entry)).filter(|k| Some(k.id) == entry.id);
    let Some(mut known) = known else { return };
    if known.ct_mark == entry.mark && !labels_changed {
        return;
    }
    known.ct_mark = entry.mark;
    known.changed = Some(Instant::now());
    let conn = known.conn.clone();
    drop(known);
    if let Some(conn) = conn {
        tracing::debug!(%conn, mark = entry.mark, "its mark or its labels changed");
        engine.conn_retract(&conn, TakenBack::Mark);
    }
}

/// An event can be older than the sight that came by the other socket: one that still tells of the
/// handshake says nothing.
pub(super) const fn is_closing(state: TcpState) -> bool {
    matches!(
        state,
        TcpState::FinWait
            | TcpState::CloseWait
            | TcpState::LastAck
            | TcpState::TimeWait
            | TcpState::Close
    )
}

/// RSTs that conntrack saw and did not believe, of these entries. Of a connection that is offloaded it has not
/// followed the sequence numbers, so such a RST may be a true one, and the entry would live on for up to five days.
/// Rules go, and the entry gets what it is given for a RST: if the connection lives, its packets set that right and
/// it is offloaded again. What is not offloaded is conntrack's to judge.
///
/// (Those that conntrack itself left no more are found when the connection is looked at: see `life`.)
pub(super) fn unbelieved(backend: &Backend, engine: &Engine, entries: &[CtEntry]) {
    let mut updates = Vec::new();
    for entry in entries {
        let known = backend.known.get(&key_of(entry)).filter(|k| Some(k.id) == entry.id);
        let Some(conn) = known.and_then(|k| k.conn.clone()) else { continue };
        if engine.conn_update(&conn) == Usage::NotOffloaded {
            continue;
        }
        tracing::debug!(%conn, "goes back into software: it was reset");
        engine.conn_retract(&conn, TakenBack::Reset);
        if !entry.status.fixed_timeout() {
            updates.push(CtUpdate::of(entry.zone, entry.original));
        }
    }
    if updates.is_empty() {
        return;
    }
    let shortened = timeouts().and_then(|timeouts| {
        updates.iter_mut().for_each(|u| u.timeout = Some(timeouts.tcp_close));
        backend.conntrack().update_what_is_there(&updates)
    });
    if let Err(e) = shortened {
        tracing::warn!("connections that were reset keep their timeouts: {e}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_event_of_the_handshake_does_not_end_a_connection() {
        for state in [TcpState::SynSent, TcpState::SynRecv, TcpState::Established] {
            assert!(!is_closing(state), "{state:?}");
        }
        for state in [TcpState::FinWait, TcpState::LastAck, TcpState::TimeWait, TcpState::Close] {
            assert!(is_closing(state), "{state:?}");
        }
    }
}
