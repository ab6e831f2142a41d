//! Reconciliation: what engines that died have left on a port is adopted, where it is what a living
//! connection's rule would be, and removed where it is not. Rules of anybody else are counted, and
//! left alone.
//!
//! ```text
//!   provider: observe -> datapath: recognise -> path, flow -> provider: adopt   (connection lives)
//!                                                         \-> provider: delete  (it does not)
//! ```
//! Done by the port's own thread: once before anything else when a port was added, so that no offer
//! meets an old rule with the same match, and on demand. Until its own turn comes every rule
//! forwards as it did. What cannot be adopted as it is, is removed, and the connection offered anew
//! by its next packet, which brings what only a packet can tell.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use netdev_providers::{
    Cookie, Direction, Done, Fault, Leftover, Operation, Outcome, Reason, Rejection, Request,
    RuleId,
};

use super::Shared;
use super::conn::ConnHandle;
use super::datapath::{PathSpec, SlotChange};
use super::port::Port;
use super::queue::Command;
use super::slot::{OpNumber, SlotState};

/// What a reconciliation did on one port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// Rules that belong to a living connection and go on as they are.
    pub adopted: u64,
    /// Rules that were removed.
    pub removed: u64,
    /// Rules of others, which nobody touched.
    pub foreign: u64,
    /// Why nothing was done.
    pub fault: Option<Fault>,
}

/// The connection that a rule was recognised as.
#[derive(Clone, Debug)]
pub struct Recognised {
    /// The connection, made for it where the engine did not know it.
    pub conn: ConnHandle,
    /// Which of its directions the rule forwards.
    pub direction: Direction,
    /// The path that its packets take now.
    pub path: PathSpec,
}

/// A rule that is to be adopted, and who counts it.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) leftover: Leftover,
    pub(super) tally: Arc<Tally>,
}

/// Counts of operations under way.
#[derive(Debug, Default)]
pub(super) struct Tally {
    adopted: AtomicU64,
    removed: AtomicU64,
}

impl Tally {
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.adopted.load(Ordering::SeqCst), self.removed.load(Ordering::SeqCst))
    }
}

impl Found {
    pub(super) fn request(&self, cookie: Cookie, flow: Box<netdev_providers::Flow>) -> Request {
        Request::Adopt { found: self.leftover.rule, cookie, flow }
    }

    /// The rule has become the slot's.
    pub(super) fn adopted(&self, port: &Port, conn: &ConnHandle, d: Direction) {
        self.tally.adopted.fetch_add(1, Ordering::SeqCst);
        let Some(slot) = conn.slot(port.generation(), d) else { return };
        let mut detail = slot.detail();
        if detail.rule == Some(self.leftover.rule) {
            port.adopted().insert(self.leftover.rule, self.leftover.cookie);
            // It counts on from where it is: what it carried before is not news to a sweep.
            detail.packets = self.leftover.counters.packets;
            detail.bytes = self.leftover.counters.bytes;
        }
    }

    /// The rule is another than it would be now, and gone: the slot is open again.
    pub(super) fn not_adopted(
        &self,
        shared: &Shared,
        port: &Port,
        conn: &ConnHandle,
        d: Direction,
        op: OpNumber,
        why: &Rejection,
    ) {
        self.tally.removed.fetch_add(1, Ordering::SeqCst);
        tracing::debug!(port = %port.netdev, %conn, %d, "not adopted: {why}");
        let Some(slot) = conn.slot(port.generation(), d) else { return };
        let mut detail = slot.detail();
        if slot.word.refused(op, why.reason) {
            slot.word.retry(port.generation());
        }
        if slot.word.load().state() == SlotState::Empty {
            super::writer::forget(port, conn, d, &mut detail);
            drop(detail);
            shared.datapath.slot_changed(&port.netdev, conn, d, SlotChange::Deleted);
            port.queue.push(Command::Rearm(conn.clone(), d));
        }
    }
}

/// What a provider may answer an adoption with.
pub(super) fn is_adopted(outcome: &Outcome, found: RuleId) -> Result<(), Rejection> {
    match outcome {
        Ok(Done::Added { rule, .. }) if *rule == found => Ok(()),
        Ok(_) => Err(Rejection::with_detail(
            Reason::ProviderFault,
            "the provider answered an adoption with another result",
        )),
        Err(why) => Err(why.clone()),
    }
}

/// The delete of a leftover that nobody adopts.
pub(super) fn removal(
    leftover: &Leftover,
    operation: impl FnOnce(Request, Box<dyn FnOnce(Outcome) + Send>) -> Operation,
    port: Arc<Port>,
    tally: Arc<Tally>,
) -> Operation {
    let (rule, cookie) = (leftover.rule, leftover.cookie);
    operation(
        Request::Delete { rule, cookie },
        Box::new(move |outcome| match outcome {
            Ok(_) => {
                tally.removed.fetch_add(1, Ordering::SeqCst);
            }
            Err(e) => {
                tracing::warn!(port = %port.netdev, %cookie, "left by a dead engine, not removed: {e}");
            }
        }),
    )
}
