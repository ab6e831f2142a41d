//! The queue of one port: many workers push, one writer thread takes. Lock-free for those who push;
//! offers are bounded, everything else (deletes, control) is never refused, because it shrinks what
//! is there.

use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::time::Duration;

use netdev_providers::{Cookie, Direction, Ifindex, RuleId};

use super::conn::ConnHandle;
use super::datapath::PathSpec;
use super::reconcile::Reconciled;
use super::sync::{
    AtomicBool, AtomicUsize, OnceLock, SegQueue, Thread, current, fence, park_timeout,
};

/// What a writer is asked to do.
pub(super) enum Command {
    /// An add whose slot has been claimed.
    Add(ConnHandle, Direction, PathSpec),
    /// A delete whose slot is Deleting.
    Delete(ConnHandle, Direction),
    /// The first reply, to be told to the provider.
    Established(ConnHandle, Direction),
    /// The slot was rejected: arm its retry.
    Rejected(ConnHandle, Direction),
    /// The slot is empty: let the datapath offer it again.
    Rearm(ConnHandle, Direction),
    /// A rule that no slot stands for.
    DeleteRule(RuleId, Cookie),
    /// Rules that forward into this netdev go; answers when they are gone.
    Retract(Ifindex, Sender<u64>),
    /// A sweep failed: let the provider put itself in order.
    Repair,
    /// What engines that died have left is adopted or removed; tells what was done, if asked.
    Reconcile(Option<Sender<Reconciled>>),
    /// The adds that were queued before a [`Retract`](Self::Retract) of this netdev are through.
    Retracted(Ifindex),
    /// This netdev has become a port: what was refused because of it may be offered again.
    Joined(Ifindex),
    /// Answers when everything queued before has been carried out, and what was due has been looked after.
    Barrier(Sender<u64>),
    /// The writer panics.
    #[cfg(test)]
    Panic,
    /// Answers when the removals queued before have been, and those that follow from them.
    Settle(Sender<u64>),
    /// Everything goes, what waits is taken back; answers with how many.
    Flush(Sender<u64>),
    /// Everything goes, the provider is released, the thread ends.
    Stop(Sender<Stopped>),
}

impl Command {
    /// Whether it takes away, or says that something is gone, and does not wait for what is to be
    /// added: the slot of a delete was Installed, so an add of the same match can only have been queued
    /// behind it.
    const fn overtakes(&self) -> bool {
        match self {
            Self::Delete(..)
            | Self::DeleteRule(..)
            | Self::Rearm(..)
            | Self::Retract(..)
            | Self::Settle(_)
            | Self::Flush(_)
            | Self::Stop(_) => true,
            Self::Add(..)
            | Self::Established(..)
            | Self::Rejected(..)
            | Self::Repair
            | Self::Reconcile(_)
            | Self::Retracted(_)
            | Self::Joined(_)
            | Self::Barrier(_) => false,
            #[cfg(test)]
            Self::Panic => false,
        }
    }
}

/// How a port ended.
#[derive(Debug, Default)]
pub(super) struct Stopped {
    pub flushed: u64,
    pub faults: Vec<netdev_providers::Fault>,
}

pub(super) struct Queue {
    commands: SegQueue<Command>,
    /// Removals: they come before all that waits.
    removals: SegQueue<Command>,
    adds: AtomicUsize,
    /// Commands that were pushed and have not been carried out.
    unfinished: AtomicUsize,
    limit: usize,
    sleeping: AtomicBool,
    writer: OnceLock<Thread>,
}

impl Queue {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            commands: SegQueue::new(),
            removals: SegQueue::new(),
            adds: AtomicUsize::new(0),
            unfinished: AtomicUsize::new(0),
            limit,
            sleeping: AtomicBool::new(false),
            writer: OnceLock::new(),
        }
    }

    /// The calling thread is the one that is to be woken. Once.
    pub(super) fn set_writer(&self) {
        let _ = self.writer.set(current());
    }

    /// Offers waiting.
    pub(super) fn pending(&self) -> usize {
        self.adds.load(Ordering::Relaxed)
    }

    /// Queues an offer; false when there are as many as there may be. Nobody is told: that is for the
    /// caller ([`wake`](Self::wake)), behind the last of several.
    pub(super) fn put_add(&self, conn: ConnHandle, d: Direction, path: PathSpec) -> bool {
        if self.adds.fetch_add(1, Ordering::Relaxed) >= self.limit {
            self.adds.fetch_sub(1, Ordering::Relaxed);
            return false;
        }
        self.put(Command::Add(conn, d, path));
        true
    }

    /// Queues anything else; removals before all that waits, and in order among themselves.
    pub(super) fn push(&self, command: Command) {
        self.put(command);
        self.wake();
    }

    fn put(&self, command: Command) {
        self.unfinished.fetch_add(1, Ordering::Relaxed);
        if command.overtakes() {
            self.removals.push(command);
        } else {
            self.commands.push(command);
        }
    }

    /// Wakes the writer if it sleeps: the system call is made by one of many who push.
    pub(super) fn wake(&self) {
        // Pairs with the fence in `park`: either the sleeper sees what was pushed, or we see it
        // sleeping.
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed)
            && self
                .sleeping
                .compare_exchange(true, false, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
            && let Some(t) = self.writer.get()
        {
            t.unpark();
        }
    }

    pub(super) fn pop(&self) -> Option<Command> {
        self.pop_removal().or_else(|| self.pop_waiting())
    }

    /// How many removals wait.
    #[cfg(all(test, not(ctoffload_loom)))]
    pub(super) fn removals(&self) -> usize {
        self.removals.len()
    }

    /// The next of the removals.
    pub(super) fn pop_removal(&self) -> Option<Command> {
        self.removals.pop()
    }

    /// The next of what waits for its turn.
    pub(super) fn pop_waiting(&self) -> Option<Command> {
        let command = self.commands.pop()?;
        if matches!(command, Command::Add(..)) {
            self.adds.fetch_sub(1, Ordering::Relaxed);
        }
        Some(command)
    }

    /// Takes what waits up to the last of the offers that wait now. Those that come meanwhile stay: workers
    /// that push cannot keep whoever takes.
    pub(super) fn take_offers(&self, mut take: impl FnMut(Command)) {
        let mut adds = self.pending();
        while adds > 0
            && let Some(command) = self.pop_waiting()
        {
            adds -= usize::from(matches!(command, Command::Add(..)));
            take(command);
        }
    }

    /// So many of the commands taken have been carried out: what they change is in the port's list
    /// of held slots, or with the provider.
    pub(super) fn finished(&self, commands: usize) {
        if commands > 0 {
            self.unfinished.fetch_sub(commands, Ordering::Release);
        }
    }

    /// True when whatever was pushed before this call has been carried out, and can be seen where
    /// [`finished`](Self::finished) says.
    pub(super) fn is_finished(&self) -> bool {
        self.unfinished.load(Ordering::Acquire) == 0
    }

    /// The writer sleeps until something is pushed or the time is over.
    pub(super) fn park(&self, at_most: Duration) {
        // Release: who sees it sees whom to wake. (The queue may have been emptied without a sleep
        // before, and then nothing else tells.)
        self.sleeping.store(true, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.commands.is_empty() && self.removals.is_empty() {
            park_timeout(at_most);
        }
        self.sleeping.store(false, Ordering::Relaxed);
    }
}
