//! What becomes of a slot when its operation completes. A slot's word and its detail change together
//! under the detail's lock; what follows is queued for the writer.

use std::sync::atomic::{AtomicU64, Ordering};

use netdev_providers::{Cookie, Direction, Done, Outcome, Permanence, Reason, Rejection};

use crate::engine::Shared;
use crate::engine::conn::{ConnHandle, Detail, Moment, PathTaken, Said};
use crate::engine::datapath::SlotChange;
use crate::engine::pace::Pace;
use crate::engine::port::Port;
use crate::engine::queue::Command;
use crate::engine::slot::{AfterAdd, OpNumber, SlotState, Unwind};

/// First pause after a transient refusal; doubles with each, up to [`RETRY_MAX_MS`].
const RETRY_MIN_MS: u64 = 100;
const RETRY_MAX_MS: u64 = 30_000;

/// The slot is empty: its detail is cleared, its traffic goes to the port's past and the
/// connection's.
pub(in crate::engine) fn forget(port: &Port, conn: &ConnHandle, d: Direction, detail: &mut Detail) {
    leave(port, conn, detail);
    port.held().remove(conn, d, detail.path.map(|p| p.egress));
    *detail = Detail::default();
}

/// The rule is gone: its traffic is the port's past and the connection's.
fn leave(port: &Port, conn: &ConnHandle, detail: &Detail) {
    port.counters.past(detail.packets, detail.bytes);
    conn.past_traffic(detail.packets, detail.bytes);
    if let Some(rule) = detail.rule {
        port.adopted().remove(&rule);
    }
}

/// Asks for the deletion of an installed rule that does nothing, after which the slot is rejected
/// for a while. False: the slot has moved on.
pub(in crate::engine) fn refute(
    port: &Port,
    conn: &ConnHandle,
    d: Direction,
    rejection: Rejection,
    retry_at_ms: u64,
) -> bool {
    let Some(slot) = conn.slot(port.generation(), d) else { return false };
    let mut detail = slot.detail();
    if slot.word.load().state() != SlotState::Installed
        || slot.word.unwind(port.generation()) != Unwind::Delete
    {
        return false;
    }
    detail.said = Some(Box::new(Said::Rejected(rejection)));
    detail.retry_at = Moment::at(retry_at_ms);
    port.queue.push(Command::Delete(conn.clone(), d));
    true
}

/// Asks for the slot to become empty; what is installed is left to be deleted by the caller.
pub(in crate::engine) fn unwind(port: &Port, conn: &ConnHandle, d: Direction) -> Unwind {
    let Some(slot) = conn.slot(port.generation(), d) else { return Unwind::Nothing };
    let mut detail = slot.detail();
    let left = slot.word.unwind(port.generation());
    if left == Unwind::Reopened {
        forget(port, conn, d, &mut detail);
    }
    left
}

pub(super) fn settle_refused(
    shared: &Shared,
    port: &Port,
    conn: &ConnHandle,
    d: Direction,
    op: OpNumber,
    rejection: Rejection,
) {
    let Some(slot) = conn.slot(port.generation(), d) else { return };
    let mut detail = slot.detail();
    if slot.word.refused(op, rejection.reason) {
        tracing::debug!(port = %port.netdev, %conn, %d, "refused: {rejection}");
        port.counters.count(rejection.reason);
        shared.datapath.slot_changed(&port.netdev, conn, d, SlotChange::Rejected(&rejection));
        detail.attempts = detail.attempts.saturating_add(1);
        if rejection.reason.permanence() == Permanence::Transient {
            let at = shared.clock.now_ms() + backoff_ms(detail.attempts);
            detail.retry_at = Moment::at(at);
            port.queue.push(Command::Rejected(conn.clone(), d));
        }
        detail.said = Some(Box::new(Said::Rejected(rejection)));
    } else if slot.word.load().state() == SlotState::Empty {
        forget(port, conn, d, &mut detail);
        port.queue.push(Command::Rearm(conn.clone(), d));
    }
}

/// Doubles with every attempt, with a quarter of jitter so that a full table is not asked by
/// everybody at once.
fn backoff_ms(attempts: u16) -> u64 {
    static SEED: AtomicU64 = AtomicU64::new(0x9e37_79b9_7f4a_7c15);
    let base = (RETRY_MIN_MS << attempts.saturating_sub(1).min(16)).min(RETRY_MAX_MS);
    let mut x = SEED.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9); // splitmix64
    x ^= x >> 27;
    base + x % (base / 4 + 1)
}

#[expect(clippy::too_many_arguments, reason = "the parts of one operation")]
pub(super) fn settle_added(
    shared: &Shared,
    port: &Port,
    conn: &ConnHandle,
    d: Direction,
    op: OpNumber,
    path: Option<PathTaken>,
    cookie: Cookie,
    outcome: Outcome,
) {
    let (rule, in_hw, nic_said) = match outcome {
        Ok(Done::Added { rule, in_hw, nic_said }) => (rule, in_hw, nic_said),
        Ok(_) => {
            let why = "the provider answered an add with the result of another operation";
            let rejection = Rejection::with_detail(Reason::ProviderFault, why);
            return settle_refused(shared, port, conn, d, op, rejection);
        }
        Err(rejection) => return settle_refused(shared, port, conn, d, op, rejection),
    };
    let Some(slot) = conn.slot(port.generation(), d) else { return };
    let mut detail = slot.detail();
    let after = slot.word.added(op);
    if after == AfterAdd::Late {
        port.gave_up_place();
        port.queue.push(Command::DeleteRule(rule, cookie));
        return;
    }
    port.counters.adds.fetch_add(1, Ordering::Relaxed);
    tracing::debug!(port = %port.netdev, %conn, %d, "installed");
    shared.datapath.slot_changed(&port.netdev, conn, d, SlotChange::Installed);
    detail.rule = Some(rule);
    detail.in_hw = in_hw;
    detail.said = nic_said.map(|words| Box::new(Said::ByNic(words)));
    detail.path = path;
    detail.used_ms = shared.clock.now_ms();
    detail.attempts = 0;
    detail.pace = Pace::UNKNOWN;
    if after == AfterAdd::Delete {
        port.queue.push(Command::Delete(conn.clone(), d));
    } else if conn.replied_by_now() && slot.word.reply_seen(port.generation()) {
        port.queue.push(Command::Established(conn.clone(), d));
    }
}

pub(super) fn settle_deleted(
    shared: &Shared,
    port: &Port,
    conn: &ConnHandle,
    d: Direction,
    op: OpNumber,
) {
    let Some(slot) = conn.slot(port.generation(), d) else { return };
    let mut detail = slot.detail();
    if let Some(Said::Rejected(rejection)) = detail.said.take().map(|said| *said)
        && !conn.is_dead()
    {
        if slot.word.deleted_because(op, rejection.reason) {
            port.counters.deletes.fetch_add(1, Ordering::Relaxed);
            settle_refuted(shared, port, conn, d, &mut detail, rejection);
        }
        return;
    }
    if slot.word.deleted(op) {
        port.counters.deletes.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(port = %port.netdev, %conn, %d, "deleted");
        shared.datapath.slot_changed(&port.netdev, conn, d, SlotChange::Deleted);
        forget(port, conn, d, &mut detail);
        drop(detail);
        if !conn.is_dead() {
            port.queue.push(Command::Rearm(conn.clone(), d));
        }
    }
}

/// The rule is gone because it did nothing: the slot stays rejected for the pause that was set when
/// that was noticed.
fn settle_refuted(
    shared: &Shared,
    port: &Port,
    conn: &ConnHandle,
    d: Direction,
    detail: &mut Detail,
    rejection: Rejection,
) {
    tracing::warn!(port = %port.netdev, %conn, %d, "{rejection}");
    port.counters.count(rejection.reason);
    shared.datapath.slot_changed(&port.netdev, conn, d, SlotChange::Rejected(&rejection));
    let retry_at = detail.retry_at.ms().unwrap_or_else(|| shared.clock.now_ms());
    leave(port, conn, detail);
    *detail = Detail {
        path: detail.path,
        said: Some(Box::new(Said::Rejected(rejection))),
        retry_at: Moment::at(retry_at),
        ..Detail::default()
    };
    port.queue.push(Command::Rejected(conn.clone(), d));
}

pub(super) fn settle_undeleted(
    shared: &Shared,
    port: &Port,
    conn: &ConnHandle,
    d: Direction,
    op: OpNumber,
    rejection: &Rejection,
) {
    let Some(slot) = conn.slot(port.generation(), d) else { return };
    let mut detail = slot.detail();
    if !slot.word.delete_failed(op) {
        return;
    }
    detail.attempts = detail.attempts.saturating_add(1);
    // It is tried until the port goes. Not every time is news.
    if detail.attempts.is_power_of_two() {
        let attempts = detail.attempts;
        tracing::warn!(port = %port.netdev, %conn, %d, attempts, "a rule is not deleted: {rejection}");
    }
    // Of one that did nothing, the reason of that stays.
    if !matches!(detail.said.as_deref(), Some(Said::Rejected(_))) {
        detail.said = Some(Box::new(Said::Undeleted(rejection.clone())));
    }
    detail.retry_at = Moment::at(shared.clock.now_ms() + backoff_ms(detail.attempts));
    port.queue.push(Command::Rejected(conn.clone(), d));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_doubles_up_to_a_bound_and_is_not_the_same_for_all() {
        for attempts in [1, 2, 5, 9, 10, 17, 1000, u16::MAX] {
            let base = RETRY_MAX_MS.min(RETRY_MIN_MS << (attempts - 1).min(16));
            let pauses: Vec<u64> = (0..200).map(|_| backoff_ms(attempts)).collect();
            assert!(pauses.iter().all(|p| (base..=base + base / 4).contains(p)), "{pauses:?}");
            let different: std::collections::HashSet<_> = pauses.iter().collect();
            assert!(different.len() > 10, "no jitter: {different:?}");
        }
    }

    #[test]
    fn the_pause_is_spread_over_a_quarter_of_itself() {
        let pauses: std::collections::BTreeSet<u64> = (0..3000).map(|_| backoff_ms(1)).collect();
        assert_eq!((pauses.first(), pauses.last()), (Some(&100), Some(&125)));
    }
}
