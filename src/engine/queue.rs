//! The queue of one port: many workers push, one writer takes. Lock-free for those who push;
//! offers are bounded, everything else (deletes, control) is never refused, because it shrinks what
//! is there.
//!
//! Each packet thread has a lane of its own for its offers: two that have first sights on one port at the same
//! time write no cache line in common. Between lanes there is no order, and none is needed: a slot is in one
//! of them at a time.
//!
//! The writer takes removals first, then what else there is, then offers, a lane after the other. What is to
//! come behind the offers that wait ([`Command::is_behind_offers`]) does.
//!
//! A writer that has nothing to do sleeps on its thread, and after a while it [rests](Queue::rest): without a
//! thread, until somebody pushes.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::time::Duration;

use netdev_providers::{Cookie, Direction, Ifindex, RuleId};

use super::conn::ConnHandle;
use super::datapath::PathSpec;
use super::reconcile::Reconciled;
use super::sync::{
    ArcSwap, AtomicUsize, Mutex, MutexGuard, OnceBox, OnceLock, SegQueue, Thread, current, fence,
    park_timeout,
};
use super::taken::TakenBack;

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
    #[cfg_attr(ctoffload_loom, expect(dead_code, reason = "no model asks for it"))]
    Panic,
    /// Answers when the removals queued before have been, and those that follow from them.
    Settle(Sender<u64>),
    /// Everything goes, what waits is taken back; answers with how many.
    Flush(TakenBack, Sender<u64>),
    /// The thread ends; everything goes, and the provider is released, or what can stay does.
    Stop(End, Sender<Stopped>),
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
            | Self::Flush(..)
            | Self::Stop(..) => true,
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

impl Command {
    /// Whether its turn comes when the offers have had theirs that were queued before it.
    const fn is_behind_offers(&self) -> bool {
        matches!(self, Self::Retracted(_) | Self::Barrier(_))
    }
}

/// What becomes of a port's rules at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// They are removed.
    Flush,
    /// They stay, where the provider's [outlive](netdev_providers::Provider::outlives) the process.
    Leave,
}

/// How a port ended.
#[derive(Debug, Default)]
pub(super) struct Stopped {
    pub flushed: u64,
    /// Rules that stay.
    pub left: u64,
    pub faults: Vec<netdev_providers::Fault>,
}

/// Lanes of a port; packet threads beyond that many share them.
pub(super) const LANES: usize = if cfg!(ctoffload_loom) { 2 } else { 16 };

/// The offers of one packet thread (or of several, if there are more of them than lanes), on cache lines of
/// its own.
#[repr(align(128))]
#[derive(Default)]
struct Lane {
    /// Offers that were ever put here.
    put: AtomicUsize,
    /// What was taken, as somebody who puts saw it last.
    seen: AtomicUsize,
    offers: SegQueue<Command>,
    taken: Taken,
}

/// Offers that were ever taken out of a lane. Only the writer counts.
#[repr(align(128))]
#[derive(Default)]
struct Taken(AtomicUsize);

impl Lane {
    fn waiting(&self) -> usize {
        let taken = self.taken.0.load(Ordering::Relaxed);
        self.put.load(Ordering::Relaxed).wrapping_sub(taken)
    }

    /// Counts one more offer, if there may be one.
    fn count(&self, limit: usize) -> bool {
        let fits = |put: usize, taken: usize| put.wrapping_sub(taken) < limit;
        let one_more = |put: usize| {
            // What the writer counts is looked at only when it seems to matter.
            if !fits(put, self.seen.load(Ordering::Relaxed)) {
                self.seen.store(self.taken.0.load(Ordering::Relaxed), Ordering::Relaxed);
            }
            fits(put, self.seen.load(Ordering::Relaxed)).then(|| put.wrapping_add(1))
        };
        self.put.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }

    fn take(&self) -> Option<Command> {
        let offer = self.offers.pop()?;
        // Nobody else writes it.
        let taken = self.taken.0.load(Ordering::Relaxed);
        self.taken.0.store(taken.wrapping_add(1), Ordering::Relaxed);
        Some(offer)
    }
}

/// A command that is no offer and no removal.
struct Waiting {
    command: Command,
    /// How many offers of each lane come before it.
    behind: Option<Box<[usize; LANES]>>,
}

/// How the writer goes on when it is woken, on whatever thread; what it returns is done next there.
pub(super) struct Job(pub(super) Box<dyn FnOnce() -> Option<Job> + Send>);

impl Job {
    /// Until there is nothing more to be done.
    pub(super) fn run(self) {
        let mut next = Some(self);
        while let Some(Job(job)) = next {
            next = job();
        }
    }
}

/// Has somebody call [`Queue::take_job`] on a thread.
type Start = Box<dyn Fn() + Send + Sync>;

// What the writer does.
const AWAKE: usize = 0;
/// Its thread sleeps.
const ASLEEP: usize = 1;
/// It has no thread.
const RESTING: usize = 2;

pub(super) struct Queue {
    lanes: [OnceBox<Lane>; LANES],
    /// Which lane is next.
    next: AtomicUsize,
    commands: SegQueue<Waiting>,
    /// Removals: they come before all that waits.
    removals: SegQueue<Command>,
    /// Commands that were pushed, beside offers.
    pushed: AtomicUsize,
    /// Commands, offers among them, that have been carried out.
    done: AtomicUsize,
    limit: usize,
    state: AtomicUsize,
    thread: ArcSwap<Option<Thread>>,
    job: Mutex<Option<Job>>,
    start: OnceLock<Start>,
}

impl Queue {
    /// For so many offers of each packet thread.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            lanes: std::array::from_fn(|_| OnceBox::default()),
            next: AtomicUsize::new(0),
            commands: SegQueue::new(),
            removals: SegQueue::new(),
            pushed: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            limit,
            state: AtomicUsize::new(AWAKE),
            thread: ArcSwap::from_pointee(None),
            job: Mutex::new(None),
            start: OnceLock::new(),
        }
    }

    /// The calling thread is the one that is to be woken. One at a time.
    pub(super) fn set_writer(&self) {
        self.thread.store(std::sync::Arc::new(Some(current())));
    }

    /// What starts a thread for a writer that rests. Once, before it does.
    pub(super) fn set_start(&self, start: Start) {
        let _ = self.start.set(start);
    }

    fn lane(&self, lane: usize) -> Option<&Lane> {
        self.lanes[lane % LANES].get()
    }

    fn lanes(&self) -> impl Iterator<Item = &Lane> {
        self.lanes.iter().filter_map(OnceBox::get)
    }

    /// Offers waiting.
    pub(super) fn pending(&self) -> usize {
        self.lanes().map(Lane::waiting).sum()
    }

    /// Those of one packet thread.
    pub(super) fn pending_of(&self, lane: usize) -> usize {
        self.lane(lane).map_or(0, Lane::waiting)
    }

    /// Offers that were ever queued.
    pub(super) fn offered(&self) -> usize {
        self.lanes().fold(0, |sum, lane| sum.wrapping_add(lane.put.load(Ordering::Relaxed)))
    }

    /// Queues an offer of a packet thread; false when there are as many of it as there may be. Nobody is told:
    /// that is for the caller ([`wake`](Self::wake)), behind the last of several.
    pub(super) fn put_add(
        &self,
        lane: usize,
        conn: ConnHandle,
        d: Direction,
        path: PathSpec,
    ) -> bool {
        let lane = self.lanes[lane % LANES].get_or_init(Box::default);
        let fits = lane.count(self.limit);
        if fits {
            lane.offers.push(Command::Add(conn, d, path));
        }
        fits
    }

    /// Queues anything else; removals before all that waits, and in order among themselves.
    pub(super) fn push(&self, command: Command) {
        self.put(command);
        self.wake();
    }

    /// The same; nobody is told, which is for the caller ([`wake`](Self::wake)), behind the last of several.
    pub(super) fn put(&self, command: Command) {
        self.pushed.fetch_add(1, Ordering::Relaxed);
        if command.overtakes() {
            self.removals.push(command);
        } else {
            let put =
                |lane: &OnceBox<Lane>| lane.get().map_or(0, |l| l.put.load(Ordering::Relaxed));
            let offers = || Box::new(std::array::from_fn(|n| put(&self.lanes[n])));
            let behind = command.is_behind_offers().then(offers);
            self.commands.push(Waiting { command, behind });
        }
    }

    /// Wakes the writer if it sleeps: the system call is made by one of many who push.
    pub(super) fn wake(&self) {
        // Pairs with the fences in `park` and `rest`: either the sleeper sees what was pushed, or we see it
        // sleeping.
        fence(Ordering::SeqCst);
        let state = self.state.load(Ordering::Relaxed);
        if state == AWAKE
            || self
                .state
                .compare_exchange(state, AWAKE, Ordering::AcqRel, Ordering::Relaxed)
                .is_err()
        {
            return;
        }
        if state == RESTING {
            if let Some(start) = self.start.get() {
                start();
            }
        } else if let Some(thread) = &*self.thread.load_full() {
            thread.unpark();
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
        if let Some(Waiting { command, behind }) = self.commands.pop() {
            if behind.as_ref().is_none_or(|behind| self.has_taken(behind)) {
                return Some(command);
            }
            // Its turn comes.
            self.commands.push(Waiting { command, behind });
        }
        self.pop_offer()
    }

    fn has_taken(&self, offers: &[usize; LANES]) -> bool {
        let taken = |lane: &Lane| lane.taken.0.load(Ordering::Relaxed);
        self.lanes.iter().zip(offers).all(|(lane, offers)| {
            // Both count up, and wrap: the difference tells.
            lane.get().is_none_or(|lane| taken(lane).wrapping_sub(*offers) <= usize::MAX / 2)
        })
    }

    fn pop_offer(&self) -> Option<Command> {
        let first = self.next.load(Ordering::Relaxed);
        (first..first + LANES).find_map(|n| {
            let offer = self.lane(n)?.take()?;
            self.next.store((n + 1) % LANES, Ordering::Relaxed);
            Some(offer)
        })
    }

    /// Takes the offers that wait now. Those that come meanwhile stay: workers that push cannot keep whoever
    /// takes.
    pub(super) fn take_offers(&self, mut take: impl FnMut(Command)) {
        let waiting: Vec<_> = self.lanes().map(|lane| (lane, lane.waiting())).collect();
        for (lane, waiting) in waiting {
            for _ in 0..waiting {
                match lane.take() {
                    Some(offer) => take(offer),
                    // It is counted, and being put.
                    None => break,
                }
            }
        }
    }

    /// So many of the commands taken have been carried out: what they change is in the port's list
    /// of held slots, or with the provider.
    pub(super) fn finished(&self, commands: usize) {
        if commands > 0 {
            self.done.fetch_add(commands, Ordering::Release);
        }
    }

    /// True when whatever was pushed before this call has been carried out, and can be seen where
    /// [`finished`](Self::finished) says.
    pub(super) fn is_finished(&self) -> bool {
        // What is pushed between the two readings counts in the second one only.
        let done = self.done.load(Ordering::Acquire);
        self.pushed.load(Ordering::Relaxed).wrapping_add(self.offered()) == done
    }

    fn is_empty(&self) -> bool {
        self.removals.is_empty()
            && self.commands.is_empty()
            && self.lanes().all(|lane| lane.offers.is_empty())
    }

    /// The writer sleeps until something is pushed or the time is over.
    pub(super) fn park(&self, at_most: Duration) {
        // Release: who sees it sees whom to wake. (The queue may have been emptied without a sleep
        // before, and then nothing else tells.)
        self.state.store(ASLEEP, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.is_empty() {
            park_timeout(at_most);
        }
        self.state.store(AWAKE, Ordering::Relaxed);
    }

    /// The writer leaves its thread, and goes on with this when something is pushed. It is given back when
    /// something was pushed just now: then it goes on at once.
    pub(super) fn rest(&self, job: Job) -> Option<Job> {
        self.set_job(job);
        self.state.store(RESTING, Ordering::Release);
        fence(Ordering::SeqCst);
        let goes_on = !self.is_empty()
            && self
                .state
                .compare_exchange(RESTING, AWAKE, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok();
        // Where the exchange fails, somebody else has seen to it.
        if goes_on { self.take_job() } else { None }
    }

    /// What the writer does first.
    pub(super) fn set_job(&self, job: Job) {
        *self.job() = Some(job);
    }

    /// How the writer goes on that was resting, for whoever has a thread for it.
    pub(super) fn take_job(&self) -> Option<Job> {
        self.job().take()
    }

    fn job(&self) -> MutexGuard<'_, Option<Job>> {
        self.job.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[cfg(not(ctoffload_loom))]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;
    use std::time::Instant;

    use super::*;
    use crate::engine::conn::ConnKey;
    use crate::engine::conn::tests::conn;
    use crate::engine::datapath::PathHint;
    use netdev_providers::{Epoch, Zone};

    /// Longer than anything here takes that does not wait.
    const LONG: Duration = Duration::from_secs(20);

    /// An offer of a packet thread, by its number.
    fn offer(queue: &Queue, lane: usize, n: u64) -> bool {
        let known = conn();
        let key = ConnKey { zone: Zone(0), ..known.key() };
        let conn = ConnHandle::new(key, known.reply(), Epoch(n), n, 0);
        queue.put_add(lane, conn, Direction::Original, PathSpec::Resolve(PathHint::default()))
    }

    /// What is taken, one after the other: offers by their numbers, all else as 0.
    fn taken(queue: &Queue, how_many: usize) -> Vec<u64> {
        let number = |command| match command {
            Command::Add(conn, ..) => conn.tag(),
            _ => 0,
        };
        (0..how_many).map_while(|_| queue.pop()).map(number).collect()
    }

    fn barrier() -> Command {
        Command::Barrier(std::sync::mpsc::channel().0)
    }

    #[test]
    fn each_packet_thread_has_room_for_so_many_offers_and_has_it_again() {
        let queue = Queue::new(2);
        for n in 0..LANES {
            assert!(offer(&queue, n, 1) && offer(&queue, n, 2) && !offer(&queue, n, 3), "{n}");
            assert_eq!((queue.pending_of(n), queue.pending()), (2, 2 * (n + 1)));
        }
        // One more shares that of the first.
        assert!(!offer(&queue, LANES, 1));
        assert_eq!((queue.pending_of(LANES), queue.offered()), (2, 2 * LANES));
        assert_eq!(taken(&queue, usize::MAX).len(), 2 * LANES);
        for _ in 0..3 {
            assert!(offer(&queue, 0, 1) && offer(&queue, 0, 2) && !offer(&queue, 0, 3));
            assert_eq!(taken(&queue, usize::MAX), [1, 2]);
        }
        assert_eq!((queue.pending_of(0), queue.pending()), (0, 0));
    }

    #[test]
    fn packet_threads_take_turns_and_what_waits_for_offers_waits_for_no_others() {
        let queue = Queue::new(16);
        for (lane, n) in [(0, 1), (3, 11), (3, 12), (3, 13)] {
            assert!(offer(&queue, lane, n));
        }
        queue.push(barrier());
        for n in 2..7 {
            assert!(offer(&queue, 0, n));
        }
        assert_eq!(taken(&queue, usize::MAX), [1, 11, 2, 12, 3, 13, 0, 4, 5, 6]);
        // Where nothing has been offered nothing is waited for.
        queue.push(barrier());
        assert!(offer(&queue, 5, 7));
        assert_eq!(taken(&queue, usize::MAX), [0, 7]);
    }

    #[test]
    fn all_is_finished_when_as_much_was_carried_out_as_was_asked_for() {
        let queue = Queue::new(16);
        assert!(queue.is_finished());
        queue.push(Command::Repair);
        assert!(offer(&queue, 1, 1) && offer(&queue, 2, 2));
        for finished in [0, 1, 2] {
            queue.finished(finished);
            assert_eq!(queue.is_finished(), finished == 2, "{finished}");
        }
    }

    #[test]
    fn who_sleeps_sees_what_was_put_before_whatever_it_is() {
        let queue = Queue::new(16);
        queue.set_writer();
        let puts: [fn(&Queue); 3] = [
            // Nobody is told of it.
            |queue| assert!(offer(queue, 1, 1)),
            |queue| queue.push(Command::Repair),
            |queue| queue.push(Command::DeleteRule(RuleId(1), cookie())),
        ];
        for put in puts {
            put(&queue);
            let since = Instant::now();
            queue.park(LONG);
            assert!(since.elapsed() < LONG / 2);
            assert_eq!(taken(&queue, usize::MAX).len(), 1);
        }
        // It was awake all the time: nobody has woken it, and now it sleeps.
        let (since, short) = (Instant::now(), Duration::from_millis(20));
        queue.park(short);
        assert!(since.elapsed() >= short);
    }

    #[test]
    fn who_sleeps_is_woken_by_who_pushes_and_for_offers_by_who_says_so() {
        let queue = Arc::new(Queue::new(16));
        queue.set_writer();
        let wakes: [fn(&Queue); 2] = [
            |queue| queue.push(Command::Repair),
            |queue| {
                assert!(offer(queue, 1, 1));
                queue.wake();
            },
        ];
        for wake in wakes {
            let since = Instant::now();
            let other = std::thread::spawn({
                let queue = Arc::clone(&queue);
                move || {
                    // Until it sleeps, as far as one can tell.
                    while queue.state.load(Ordering::SeqCst) != ASLEEP {
                        std::thread::yield_now();
                    }
                    std::thread::sleep(Duration::from_millis(20));
                    wake(&queue);
                }
            });
            queue.park(LONG);
            assert!(since.elapsed() < LONG / 2);
            other.join().unwrap();
            assert_eq!(taken(&queue, usize::MAX).len(), 1);
        }
    }

    fn cookie() -> Cookie {
        let instance = netdev_providers::Instance(std::num::NonZeroU32::MIN);
        Cookie { instance, epoch: Epoch(1), direction: Direction::Original }
    }

    #[test]
    fn a_thread_is_started_for_who_rests_once_and_for_nobody_else() {
        let queue = Queue::new(16);
        let started = Arc::new(AtomicUsize::new(0));
        let times = Arc::clone(&started);
        queue.set_start(Box::new(move || {
            times.fetch_add(1, Ordering::SeqCst);
        }));
        let started = || started.load(Ordering::SeqCst);
        queue.push(Command::Repair);
        assert_eq!(started(), 0, "it does not rest");
        // It goes on at once with what has come.
        let ran = Arc::new(AtomicBool::new(false));
        let note = Arc::clone(&ran);
        let last = Job(Box::new(move || {
            note.store(true, Ordering::SeqCst);
            None
        }));
        let goes_on = queue.rest(Job(Box::new(move || Some(last)))).expect("there is one to do");
        assert!(queue.take_job().is_none());
        queue.push(Command::Repair);
        assert_eq!(started(), 0, "it is awake");
        assert_eq!(taken(&queue, usize::MAX).len(), 2);
        assert!(queue.rest(goes_on).is_none(), "nothing is to be done");
        queue.push(Command::Repair);
        queue.push(Command::Repair);
        assert_eq!(started(), 1);
        queue.take_job().expect("that of who rested").run();
        assert!(ran.load(Ordering::SeqCst), "and what it goes on with");
        assert!(queue.take_job().is_none());
    }
}
