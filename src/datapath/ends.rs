//! Ends of connections, as conntrack tells them. FIN and RST match no rule of ours: they reach
//! conntrack, and come back as events.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::TICK;
use super::backend::{Backend, Shared};
use super::netfilter::conntrack::{CtEntry, CtEvent, CtEvents, CtId, EventRead, TcpState};
use crate::engine::Engine;

pub(super) fn run(backend: &Shared, engine: &Engine, mut events: CtEvents, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let read = match events.next(TICK) {
            Ok(read) => read,
            Err(e) => {
                tracing::error!("conntrack events: {e}");
                std::thread::sleep(TICK);
                EventRead { events: Vec::new(), lost: true }
            }
        };
        let count = read.events.len() as u64;
        backend.counts().conntrack_events.fetch_add(count, Ordering::Relaxed);
        for event in read.events {
            match event {
                CtEvent::Destroy(entry) => entry.id.into_iter().for_each(|id| {
                    destroyed(backend, engine, id);
                }),
                CtEvent::Update(entry) => {
                    remarked(backend, engine, &entry, entry.labels_changed);
                    updated(backend, engine, &entry);
                }
                CtEvent::New(_) => {}
            }
        }
        if read.lost {
            backend.counts().conntrack_lost.fetch_add(1, Ordering::Relaxed);
            tracing::warn!("conntrack events were lost: comparing with conntrack's table");
            compare(backend, engine);
        }
    }
}

/// The entry is gone: so are the connection's rules, on every port, and its elements in the ledger.
pub(super) fn destroyed(backend: &Backend, engine: &Engine, id: CtId) {
    let Some((_, known)) = backend.known.remove(&id) else { return };
    if let Some(conn) = &known.conn {
        let rules = engine.conn_del(conn);
        tracing::debug!(%conn, rules, "ended");
    }
    backend.rearming().ended(known.keys(id));
}

/// A packet that was sighted so shortly after its connection's mark changed may have passed the stack
/// before.
pub(super) const JUST_CHANGED: Duration = Duration::from_millis(100);

/// The mark or the labels of a connection have changed: rules of the firewall and routes may answer
/// otherwise now. Its rules go, and its next packet asks.
fn remarked(backend: &Backend, engine: &Engine, entry: &CtEntry, labels_changed: bool) {
    let Some(id) = entry.id else { return };
    let Some(mut known) = backend.known.get_mut(&id) else { return };
    if known.ct_mark == entry.mark && !labels_changed {
        return;
    }
    known.ct_mark = entry.mark;
    known.changed = Some(Instant::now());
    let conn = known.conn.clone();
    drop(known);
    if let Some(conn) = conn {
        tracing::debug!(%conn, mark = entry.mark, "its mark or its labels changed");
        engine.conn_retract(&conn);
    }
}

/// An event can be older than the sight that came by the other socket: one that still tells of the
/// handshake says nothing.
const fn is_closing(state: TcpState) -> bool {
    matches!(
        state,
        TcpState::FinWait
            | TcpState::CloseWait
            | TcpState::LastAck
            | TcpState::TimeWait
            | TcpState::Close
    )
}

/// A connection that is closing is not offloaded any more. Its elements stay in the ledger until
/// its entry is gone, so that what is left of its packets is not sighted again.
fn updated(backend: &Backend, engine: &Engine, entry: &CtEntry) {
    let Some(state) = entry.tcp_state else { return };
    if !is_closing(state) {
        return;
    }
    let Some(id) = entry.id else { return };
    let conn = backend.known.get_mut(&id).and_then(|mut k| k.conn.take());
    if let Some(conn) = conn {
        let rules = engine.conn_del(&conn);
        tracing::debug!(%conn, rules, ?state, "closing");
    }
}

/// Ends what conntrack does not have (any more).
pub(super) fn compare(backend: &Backend, engine: &Engine) {
    let entries = match backend.conntrack().dump() {
        Ok(entries) => entries,
        Err(e) => {
            tracing::warn!("conntrack's table could not be read: {e}");
            return;
        }
    };
    let living: HashSet<CtId> = entries.iter().filter_map(|e| e.id).collect();
    let dead: Vec<CtId> =
        backend.known.iter().map(|k| *k.key()).filter(|id| !living.contains(id)).collect();
    for id in dead {
        destroyed(backend, engine, id);
    }
    for entry in &entries {
        remarked(backend, engine, entry, false);
        updated(backend, engine, entry);
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
