//! Empties the port: of what leads into another port, of everything, and for good.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use netdev_providers::{Direction, Fault, Ifindex, Reason};

use super::{BATCH, Staged, Writer};
use crate::engine::conn::ConnHandle;
use crate::engine::queue::{Command, End, Stopped};
use crate::engine::slot::Unwind;
use crate::engine::state::undeleted_towards;
use crate::engine::taken::TakenBack;

/// Rounds of deletes that follow from what was in flight: the add comes back, and its delete is
/// queued; the message about the reply, and the same.
const ROUNDS: usize = 4;

/// How often a rule into a netdev that goes is to be deleted once more when the backend has refused, after
/// a pause that doubles each time, from a millisecond on: an eighth of a second in all.
const INSISTENCE: u32 = 7;

impl Writer {
    /// Waits for what is with the provider. False when nothing of it has come back for too long:
    /// what is out then follows when it does.
    pub(super) fn settle(&self) -> bool {
        let progress = &self.port.progress;
        let mut left = progress.operations.out();
        while left > 0 {
            if progress.operations.is_stuck(progress.limit()) {
                self.port.slow();
                return false;
            }
            std::thread::park_timeout(Duration::from_millis(1));
            let now = progress.operations.out();
            if now < left {
                progress.thread.step();
            }
            left = now;
        }
        true
    }

    /// Waits for who else is calling the provider. False when it takes too long.
    fn is_alone(&self) -> bool {
        let began = Instant::now();
        while self.port.is_visited() {
            let sweeps = &self.port.progress.sweeps;
            if began.elapsed() > self.port.progress.limit()
                && (sweeps.out() == 0 || sweeps.is_stuck(self.port.progress.limit()))
            {
                return false;
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
        true
    }

    /// Carries out the removals that are queued, and those that follow from them.
    pub(super) fn finish_removals(&mut self, staged: &mut Vec<Staged>) {
        for _ in 0..ROUNDS {
            self.submit(staged);
            if !self.settle() {
                return;
            }
            let mut any = false;
            while let Some(command) = self.port.queue.pop_removal() {
                match command {
                    Command::Delete(conn, d) => self.stage_delete(&conn, d, staged),
                    Command::DeleteRule(rule, cookie) => {
                        self.stage_delete_rule(rule, cookie, staged);
                    }
                    Command::Rearm(conn, d) => {
                        self.push_rearm(conn, d);
                        self.done += 1;
                        continue;
                    }
                    other => {
                        self.deferred.push_back(other);
                        continue;
                    }
                }
                any = true;
                self.done += 1;
                self.submit_full(staged);
            }
            if !any {
                return;
            }
        }
        self.submit(staged);
    }

    fn submit_full(&mut self, staged: &mut Vec<Staged>) {
        if staged.len() >= BATCH {
            self.submit(staged);
            self.port.progress.thread.step();
        }
    }

    pub(super) fn retract(&mut self, egress: Ifindex, staged: &mut Vec<Staged>) -> u64 {
        // What is staged leads somewhere already.
        self.submit(staged);
        self.count_retraction(egress, 1);
        self.port.shapes().forget_towards(egress);
        let towards = self.port.held().towards(egress);
        let n = self.delete_each(towards, TakenBack::Egress, staged, true);
        self.finish_removals(staged);
        for attempt in 0..INSISTENCE {
            let undeleted = undeleted_towards(&self.shared, &self.port, egress);
            if undeleted.is_empty() {
                break;
            }
            // Their packets would go nowhere until the pause of each is over.
            std::thread::park_timeout(Duration::from_millis(1 << attempt));
            for (conn, d) in undeleted {
                self.stage_delete(&conn, d, staged);
                self.submit_full(staged);
            }
            self.finish_removals(staged);
        }
        n
    }

    /// What was refused because of the netdev that it leaves by may be offered again. (What an asynchronous
    /// provider refuses later knows of the change already.)
    pub(super) fn reconsider(&mut self, egress: Ifindex, staged: &mut Vec<Staged>) {
        let mut refused = self.port.held().towards(egress);
        refused.retain(|(conn, d)| {
            self.slot(conn, *d).is_some_and(|s| s.is_rejected_for(Reason::EgressUnsupported))
        });
        self.delete_each(refused, TakenBack::Egress, staged, false);
    }

    /// Deletes the rules of these slots one by one; returns how many there were, with those that are
    /// being added if they count.
    fn delete_each(
        &mut self,
        slots: Vec<(ConnHandle, Direction)>,
        why: TakenBack,
        staged: &mut Vec<Staged>,
        cancelled_count: bool,
    ) -> u64 {
        let mut n = 0;
        for (conn, d) in slots {
            match self.slot(&conn, d).map_or(Unwind::Nothing, |s| s.unwind(why)) {
                Unwind::Delete => {
                    n += 1;
                    self.stage_delete(&conn, d, staged);
                    self.submit_full(staged);
                }
                // The delete follows the add.
                Unwind::Cancelling => n += u64::from(cancelled_count),
                // It was rejected, and may be offered again like all others.
                Unwind::Reopened | Unwind::Nothing => self.push_rearm(conn, d),
            }
        }
        n
    }

    /// The adds that wait are taken back: they may be offered again.
    fn cancel_waiting(&mut self, why: TakenBack) {
        let port = Arc::clone(&self.port);
        port.queue.take_offers(|command| {
            self.done += 1;
            if let Command::Add(conn, d, _) = command {
                self.reset(&conn, d, why);
                self.push_rearm(conn, d);
            }
        });
    }

    /// The slot is empty, whatever it was, if it is this port's.
    fn reset(&self, conn: &ConnHandle, d: Direction, why: TakenBack) {
        if let Some(slot) = self.slot(conn, d) {
            slot.reset(why);
        }
    }

    pub(super) fn flush(&mut self, why: TakenBack, staged: &mut Vec<Staged>) -> u64 {
        self.submit(staged);
        self.cancel_waiting(why);
        self.port.shapes().forget();
        self.port.capacity.forget_learnt();
        // The provider is not to be asked for it while it has operations.
        let flushed = self.settle().then(|| self.flush_at_once(why)).flatten();
        flushed.unwrap_or_else(|| {
            let held = self.port.all_held();
            let n = self.delete_each(held, why, staged, false);
            self.finish_removals(staged);
            n
        })
    }

    /// `None`: the backend cannot.
    fn flush_at_once(&mut self, why: TakenBack) -> Option<u64> {
        self.port.progress.thread.allow(self.port.rules.load(Ordering::SeqCst));
        let flushed = self.guarded(|p| p.flush());
        self.port.progress.thread.step();
        self.port.progress.thread.allow(0);
        let flushed = match flushed {
            Ok(Ok(n)) => n,
            Ok(Err(fault)) => {
                tracing::warn!(port = %self.port.netdev, "flush: {fault}");
                return None;
            }
            Err(_) => return None,
        };
        self.empty(why);
        Some(flushed)
    }

    /// The provider has no rules any more.
    fn empty(&mut self, why: TakenBack) {
        self.port.rules.store(0, Ordering::SeqCst);
        let held = self.port.held().take_all();
        for (conn, d) in held {
            self.reset(&conn, d, why);
            self.push_rearm(conn, d);
        }
    }

    /// What waits to be removed goes, what waits to be made is not made, and the rest stays as it is. `None`: it
    /// cannot stay, or may not.
    fn leave(&mut self, staged: &mut Vec<Staged>) -> Option<Stopped> {
        if self.port.fault().is_some() || !self.guarded(|p| p.outlives()).unwrap_or(false) {
            return None;
        }
        self.finish_removals(staged);
        // What comes back late, nobody would hear of.
        if !self.settle() {
            return None;
        }
        let held = self.port.all_held();
        let wrong = |(conn, d): &(ConnHandle, Direction)| {
            self.slot(conn, *d).is_some_and(|slot| slot.is_undeleted())
        };
        if held.iter().any(wrong) {
            // Nobody would try again to take back what is wrong, or over.
            return None;
        }
        let left = self.port.rules.load(Ordering::SeqCst);
        // Neither is it to end what it has made when it is dropped: as if the process had ended now.
        std::mem::forget(Arc::clone(&self.provider));
        Some(Stopped { left, ..Stopped::default() })
    }

    pub(super) fn stop(&mut self, end: End, staged: &mut Vec<Staged>) -> Stopped {
        self.submit(staged);
        if end == End::Leave
            && let Some(mut stopped) = self.leave(staged)
        {
            self.refuse_what_waits();
            if !self.is_alone() {
                stopped.faults.push(Fault::new("a sweep has not come back"));
            }
            return stopped;
        }
        let mut stopped = Stopped::default();
        // Nobody asks for the slots of a port that is gone.
        let why = TakenBack::Port;
        if self.settle() {
            stopped.flushed = match self.flush_at_once(why) {
                Some(n) => n,
                None => {
                    let held = self.port.all_held();
                    let n = self.delete_each(held, why, staged, false);
                    self.finish_removals(staged);
                    n
                }
            };
        } else {
            // It removes what is left when it is released, and installs nothing after that.
            let out = self.port.progress.operations.out();
            let why =
                format!("operations without a result: {out}; the provider is released under them");
            stopped.faults.push(Fault::new(why));
        }
        self.refuse_what_waits();
        // The last call: whoever else is calling it comes to an end first.
        if !self.is_alone() {
            let why = "a sweep has not come back: the provider is released under it";
            stopped.faults.push(Fault::new(why));
        }
        match self.guarded(|p| p.release()) {
            Ok(Ok(())) => {}
            Ok(Err(fault)) => stopped.faults.push(fault),
            Err(rejection) => stopped.faults.push(Fault::new(rejection.to_string())),
        }
        self.empty(why);
        // Slots of this port are rearmed too: the kernel's ledger must forget the netdev.
        self.tell_rearm();
        stopped
    }

    /// What was queued behind the end: offers of workers that were late, deletes of what is flushed.
    fn refuse_what_waits(&mut self) {
        let why = TakenBack::Port;
        while let Some(command) = self.deferred.pop_front().or_else(|| self.port.queue.pop()) {
            match command {
                Command::Add(conn, d, _) => {
                    self.reset(&conn, d, why);
                    self.push_rearm(conn, d);
                }
                Command::Delete(conn, d) => self.reset(&conn, d, why),
                Command::Settle(answer)
                | Command::Barrier(answer)
                | Command::Flush(_, answer)
                | Command::Retract(_, answer) => {
                    let _ = answer.send(0);
                }
                Command::Stop(_, answer) => {
                    let _ = answer.send(Stopped::default());
                }
                Command::Established(..)
                | Command::Rejected(..)
                | Command::Rearm(..)
                | Command::Repair
                | Command::Retracted(_)
                | Command::Joined(_)
                | Command::Reconcile(_)
                | Command::DeleteRule(..) => {}
                #[cfg(test)]
                Command::Panic => {}
            }
        }
    }
}
