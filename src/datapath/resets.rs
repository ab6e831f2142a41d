//! Connections that conntrack has closed because of a RST.
//!
//! Of a connection that is offloaded conntrack does not know which sequence numbers are right, so it
//! believes every RST (see [`CtUpdate::forget_acked`]): also one that somebody has made up, or one that
//! came late. Whoever has sent or got a true one sends nothing more but RST. So when packets without it
//! pass **in both directions** some time after, the connection lives, and conntrack is told so; they are
//! sights then, and it is offloaded again. In the meantime it was on the slow path. One that is silent
//! ends with its entry.

use std::collections::VecDeque;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use netdev_providers::Direction;

use super::backend::Backend;
use super::netfilter::conntrack::{Conntrack, ConntrackError, CtId, CtUpdate, TcpState};
use super::netfilter::ledger::LedgerKey;
use crate::engine::conn::ConnKey;

/// What was on its way when the RST came has passed by then.
const AFTER: Duration = Duration::from_secs(3);
/// How often it is looked whether both directions have been seen.
const EVERY: Duration = Duration::from_secs(1);

#[derive(Default)]
pub(super) struct Resets {
    waiting: VecDeque<(Instant, Reset)>,
}

#[derive(Clone, Copy)]
struct Reset {
    key: ConnKey,
    id: CtId,
    /// Its elements in the ledger are gone: the next packet of each direction is sighted.
    armed: bool,
}

impl Resets {
    pub(super) fn look(&mut self, backend: &Backend, conntrack: &mut Conntrack) {
        let now = Instant::now();
        let fresh =
            std::mem::take(&mut *backend.resets.lock().unwrap_or_else(PoisonError::into_inner));
        for (key, id) in fresh {
            self.waiting.push_back((now + AFTER, Reset { key, id, armed: false }));
        }
        let (mut armed, mut alive, mut again) = (Vec::new(), Vec::new(), Vec::new());
        self.waiting.retain(|&(due, reset)| {
            if due > now {
                return true;
            }
            // One that is gone has ended.
            let Some(mut known) = backend.known.get_mut(&reset.key).filter(|k| k.id == reset.id)
            else {
                return false;
            };
            let seen = |d| known.sighted.iter().any(|s| s.direction == d);
            if reset.armed && Direction::BOTH.into_iter().all(seen) {
                alive.push((reset, known.take_keys()));
            } else {
                if !reset.armed {
                    armed.append(&mut known.take_keys());
                }
                again.push((now + EVERY, Reset { armed: true, ..reset }));
            }
            false
        });
        self.waiting.extend(again);
        backend.rearming().soon(armed);
        if !alive.is_empty()
            && let Err(e) = revive(backend, conntrack, &alive)
        {
            tracing::warn!("conntrack was not told that reset connections live: {e}");
        }
    }
}

fn revive(
    backend: &Backend,
    conntrack: &mut Conntrack,
    alive: &[(Reset, Vec<LedgerKey>)],
) -> Result<(), ConntrackError> {
    let wanted: Vec<_> = alive.iter().map(|(r, _)| (r.key.zone, r.key.original)).collect();
    let entries = conntrack.get_many(&wanted)?;
    let mut updates = Vec::new();
    for ((reset, _), entry) in alive.iter().zip(entries) {
        let closed = (Some(reset.id), Some(TcpState::Close));
        if entry.is_some_and(|e| (e.id, e.tcp_state) == closed) {
            tracing::debug!(original = %reset.key.original, "was reset, and lives");
            updates.push(CtUpdate {
                tcp_state: Some(TcpState::Established),
                liberal: Some(true),
                forget_acked: true,
                ..CtUpdate::of(reset.key.zone, reset.key.original)
            });
        }
    }
    conntrack.update_what_is_there(&updates)?;
    // Their next packets are sights of connections that are open.
    backend.rearming().soon(alive.iter().flat_map(|(_, keys)| keys).copied());
    Ok(())
}
