//! Adopts or removes what engines that died have left on the port.

use std::sync::Arc;

use netdev_providers::{Fault, Leftover, Observed, Operation, Request};

use super::{BATCH, Staged, Writer};
use crate::engine::Engine;
use crate::engine::conn::ConnClaim;
use crate::engine::datapath::Recognised;
use crate::engine::lines::Line;
use crate::engine::reconcile::{Found, Reconciled, Tally};

impl Writer {
    pub(super) fn remove_found(&self, found: &Found, staged: &mut Vec<Staged>) {
        staged.push(Staged::Other(self.removal(&found.leftover, &found.tally)));
    }

    /// The delete of a rule that nobody adopts.
    pub(super) fn removal(&self, leftover: &Leftover, tally: &Arc<Tally>) -> Operation {
        let (rule, cookie) = (leftover.rule, leftover.cookie);
        let (port, tally) = (Arc::clone(&self.port), Arc::clone(tally));
        let shared = Arc::clone(&self.shared);
        self.operation(Request::Delete { rule, cookie }, move |outcome| match outcome {
            Ok(_) => tally.removed(),
            Err(e) if !port.lines.is_told(Line::LeftUndeleted, shared.clock.now_ms()) => {
                tracing::debug!(port = %port.netdev, %cookie, "left by a dead engine, not removed: {e}");
            }
            Err(e) => {
                tracing::warn!(port = %port.netdev, %cookie, "left by a dead engine, not removed: {e}");
            }
        })
    }

    pub(super) fn reconcile(&mut self, staged: &mut Vec<Staged>) -> Reconciled {
        self.settle();
        let fault = |fault| Reconciled { fault: Some(fault), ..Reconciled::default() };
        let observed = match self.guarded(|p| p.observe()) {
            Ok(Ok(observed)) => observed,
            Ok(Err(e)) => {
                tracing::warn!(port = %self.port.netdev, "reconciliation: {e}");
                return fault(e);
            }
            Err(panicked) => return fault(Fault::new(panicked.to_string())),
        };
        let Observed { leftovers, foreign } = observed;
        let engine = Engine(Arc::clone(&self.shared));
        let create = |key, reply, tag| engine.conn_create(key, reply, tag);
        let recognised = if leftovers.is_empty() {
            Vec::new()
        } else {
            match self.asked(|d| d.recognise(&self.port.netdev, &leftovers, &create)) {
                Ok(recognised) => recognised,
                Err(panicked) => return fault(Fault::new(panicked.to_string())),
            }
        };
        let mut recognised = recognised.into_iter();
        let tally = Arc::new(Tally::default());
        for leftover in leftovers {
            let claimed = recognised.next().flatten().filter(|r| {
                // Another rule may be there or on its way already, or this one twice.
                let (generation, gone) = (self.port.generation(), |g| self.port.outlives(g));
                matches!(r.conn.claim(generation, r.direction, gone), ConnClaim::Won(_))
            });
            match claimed {
                Some(Recognised { conn, direction, path }) => {
                    let found = Found { leftover, tally: Arc::clone(&tally) };
                    self.stage_add(&conn, direction, path, Some(found), staged);
                }
                None => staged.push(Staged::Other(self.removal(&leftover, &tally))),
            }
            if staged.len() >= BATCH {
                self.submit(staged);
            }
        }
        self.submit(staged);
        self.settle();
        let (adopted, removed) = tally.counts();
        if adopted + removed > 0 {
            tracing::info!(port = %self.port.netdev, adopted, removed, foreign, "reconciled");
        }
        Reconciled { adopted, removed, foreign, fault: None }
    }
}
