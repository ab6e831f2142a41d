//! Empties the port: of what leads into another port, of everything, and for good.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use netdev_providers::{Fault, Ifindex};

use super::completion::{forget, unwind};
use super::{Staged, Writer};
use crate::engine::queue::{Command, Stopped};
use crate::engine::slot::Unwind;

impl Writer {
    /// Waits for what is with the provider. False when it takes too long.
    pub(super) fn settle(&self) -> bool {
        let at_most = self.shared.limits.complete;
        let deadline = Instant::now() + at_most;
        while self.port.in_flight.load(Ordering::SeqCst) > 0 {
            if Instant::now() >= deadline {
                self.port.set_fault(format!(
                    "{} operations without a result after {at_most:?}",
                    self.port.in_flight.load(Ordering::SeqCst),
                ));
                return false;
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
        true
    }

    /// Waits for a sweep that is asking the provider. False when it takes too long.
    fn swept(&self) -> bool {
        let deadline = Instant::now() + self.shared.limits.complete;
        while self.port.swept.load(Ordering::SeqCst) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
        true
    }

    pub(super) fn retract(&mut self, egress: Ifindex, staged: &mut Vec<Staged>) -> u64 {
        let mut n = 0;
        let towards = self.port.held().towards(egress);
        for (conn, d) in towards {
            match unwind(&self.port, &conn, d) {
                Unwind::Delete => {
                    n += 1;
                    self.stage_delete(&conn, d, staged);
                }
                Unwind::Cancelling => n += 1,
                Unwind::Reopened | Unwind::Nothing => self.push_rearm(conn, d),
            }
        }
        self.submit(staged);
        self.settle();
        n
    }

    pub(super) fn flush(&mut self) -> u64 {
        self.settle();
        self.port.forget_refused_shapes();
        let flushed = match self.guarded(|p| p.flush()) {
            Ok(Ok(n)) => n,
            Ok(Err(fault)) => {
                tracing::warn!(port = %self.port.netdev, "flush: {fault}");
                return self.flush_one_by_one();
            }
            Err(_) => return self.flush_one_by_one(),
        };
        self.port.rules.store(0, Ordering::SeqCst);
        let held = self.port.held().take_all();
        for (conn, d) in held {
            if let Some(slot) = self.slot(&conn, d) {
                let mut detail = slot.detail();
                slot.word.reset();
                forget(&self.port, &conn, d, &mut detail);
            }
            self.push_rearm(conn, d);
        }
        flushed
    }

    /// The backend could not flush: every rule is deleted by itself.
    fn flush_one_by_one(&mut self) -> u64 {
        let (mut n, mut staged) = (0, Vec::new());
        let held = self.port.held().all();
        for (conn, d) in held {
            match unwind(&self.port, &conn, d) {
                Unwind::Delete => {
                    n += 1;
                    self.stage_delete(&conn, d, &mut staged);
                }
                // Its add did not complete in time: the delete follows it.
                Unwind::Cancelling => {}
                // It was rejected, and may be offered again like all others.
                Unwind::Reopened | Unwind::Nothing => self.push_rearm(conn, d),
            }
        }
        self.submit(&mut staged);
        self.settle();
        n
    }

    pub(super) fn stop(mut self) -> Stopped {
        let mut stopped = Stopped { flushed: self.flush(), faults: Vec::new() };
        // What was queued behind: offers of workers that were late, deletes of what is flushed.
        while let Some(command) = self.port.queue.pop() {
            match command {
                Command::Add(conn, d, _) | Command::Delete(conn, d) => {
                    if let Some(slot) = self.slot(&conn, d) {
                        let mut detail = slot.detail();
                        slot.word.reset();
                        forget(&self.port, &conn, d, &mut detail);
                    }
                }
                Command::Barrier(answer) | Command::Flush(answer) | Command::Retract(_, answer) => {
                    let _ = answer.send(0);
                }
                Command::Stop(answer) => {
                    let _ = answer.send(Stopped::default());
                }
                Command::Established(..)
                | Command::Rejected(..)
                | Command::Rearm(..)
                | Command::Repair
                | Command::Reconcile(_)
                | Command::DeleteRule(..) => {}
            }
        }
        // The last call: a sweep that is under way comes to its end first.
        if !self.swept() {
            let why = "a sweep has not come back: the provider is released under it";
            stopped.faults.push(Fault::new(why));
        }
        match self.guarded(|p| p.release()) {
            Ok(Ok(())) => {}
            Ok(Err(fault)) => stopped.faults.push(fault),
            Err(rejection) => stopped.faults.push(Fault::new(rejection.to_string())),
        }
        // Slots of this port are rearmed too: the kernel's ledger must forget the netdev.
        self.tell_rearm();
        stopped
    }
}
