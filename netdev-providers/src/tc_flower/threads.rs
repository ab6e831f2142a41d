//! Threads that help a port write its rules. Whoever has lanes to run runs them itself, and these take
//! what it has not come to yet: so nobody ever waits for a thread that is held by another port, whose driver
//! does not come back. Threads are made as they are needed, and those that are idle are used
//! again, by all ports.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use tracing::warn;

use super::plan::lock;

/// Threads there may be of a class, however many of them are held: beyond, a port writes by itself.
const MAX_THREADS: usize = 64;

type Job = Box<dyn FnOnce() + Send>;

/// The threads of a class.
#[derive(Debug)]
pub(super) struct Threads {
    /// How many lanes of a port run at once.
    lanes: usize,
    all: AtomicUsize,
    idle: Mutex<Vec<Sender<Job>>>,
}

impl Threads {
    pub(super) fn new(lanes: usize) -> Self {
        Self { lanes, all: AtomicUsize::new(0), idle: Mutex::default() }
    }

    pub(super) fn lanes(&self) -> usize {
        self.lanes
    }

    /// Has an idle thread, or a new one, do this; nobody does where there is none.
    fn spawn(self: &Arc<Self>, job: Job) {
        let idle = lock(&self.idle).pop();
        match idle {
            // One that is idle waits for something to do.
            Some(thread) => drop(thread.send(job)),
            None if self.all.fetch_add(1, Ordering::SeqCst) < MAX_THREADS => self.add(job),
            None => {
                self.all.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    fn add(self: &Arc<Self>, first: Job) {
        // Threads that nobody needs any more end with their class.
        let threads = Arc::downgrade(self);
        let work = move || {
            let mut next = Ok(first);
            while let Ok(job) = next {
                job();
                let Some(threads) = threads.upgrade() else { break };
                let (tx, rx) = mpsc::channel::<Job>();
                lock(&threads.idle).push(tx);
                drop(threads);
                next = rx.recv();
            }
        };
        let thread = std::thread::Builder::new().name("tc-flower".into()).spawn(work);
        if let Err(e) = thread {
            self.all.fetch_sub(1, Ordering::SeqCst);
            warn!("rules are written by fewer threads: {e}");
        }
    }
}

/// The threads that help one port: no more than it has lanes, with those that are late to find that
/// there is nothing to do any more.
#[derive(Debug)]
pub(super) struct Helpers {
    threads: Arc<Threads>,
    out: Arc<AtomicUsize>,
}

impl Helpers {
    pub(super) fn new(threads: Arc<Threads>) -> Self {
        Self { threads, out: Arc::default() }
    }

    /// Does the work on each of the items, on this thread and on others; returns them, in order, when
    /// all is done.
    ///
    /// # Panics
    /// When the work does, with what it panicked with.
    pub(super) fn on_each<T: Send + 'static>(
        &self,
        items: Vec<T>,
        work: impl Fn(&mut T) + Send + Sync + 'static,
    ) -> Vec<T> {
        let helpers = items.len().saturating_sub(1);
        let shared = Arc::new(Shared {
            left: Mutex::new(items.len()),
            items: items.into_iter().map(|item| Mutex::new(Some(item))).collect(),
            work,
            next: AtomicUsize::new(0),
            finished: Condvar::new(),
            panicked: Mutex::default(),
        });
        for _ in self.out.load(Ordering::SeqCst)..helpers {
            self.out.fetch_add(1, Ordering::SeqCst);
            let (shared, out) = (Arc::clone(&shared), Out(Arc::clone(&self.out)));
            self.threads.spawn(Box::new(move || {
                let _out = out;
                shared.help();
            }));
        }
        shared.help();
        let left = shared.finished.wait_while(lock(&shared.left), |left| *left > 0);
        drop(left.unwrap_or_else(PoisonError::into_inner));
        if let Some(payload) = lock(&shared.panicked).take() {
            resume_unwind(payload);
        }
        // A thread that comes late finds nothing to do.
        shared.items.iter().filter_map(|item| lock(item).take()).collect()
    }
}

/// Counted down however the job ends, also where there is no thread for it.
struct Out(Arc<AtomicUsize>);

impl Drop for Out {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What is done together.
struct Shared<T, F> {
    items: Vec<Mutex<Option<T>>>,
    work: F,
    next: AtomicUsize,
    left: Mutex<usize>,
    finished: Condvar,
    panicked: Mutex<Option<Box<dyn Any + Send>>>,
}

impl<T, F: Fn(&mut T)> Shared<T, F> {
    /// Does what nobody does yet, until there is nothing more.
    fn help(&self) {
        while let Some(item) = self.items.get(self.next.fetch_add(1, Ordering::SeqCst)) {
            let worked = catch_unwind(AssertUnwindSafe(|| {
                if let Some(item) = &mut *lock(item) {
                    (self.work)(item);
                }
            }));
            if let Err(payload) = worked {
                *lock(&self.panicked) = Some(payload);
            }
            let mut left = lock(&self.left);
            *left -= 1;
            if *left == 0 {
                self.finished.notify_all();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn all_is_done_once_and_comes_back_in_order() {
        let threads = Arc::new(Threads::new(4));
        let helpers = Helpers::new(Arc::clone(&threads));
        for _ in 0..200 {
            let done = helpers.on_each((0..7).collect(), |n: &mut i32| *n += 100);
            assert_eq!(done, (100..107).collect::<Vec<_>>());
        }
        assert!(threads.all.load(Ordering::SeqCst) <= 7, "{threads:?}");
    }

    #[test]
    fn nobody_waits_for_threads_that_somebody_else_holds() {
        let threads = Arc::new(Threads::new(4));
        let (let_go, held) = mpsc::channel::<()>();
        let held = Mutex::new(held);
        let stuck = std::thread::spawn({
            let helpers = Helpers::new(Arc::clone(&threads));
            move || {
                let wait = move |_: &mut u8| {
                    let _ = lock(&held).recv_timeout(Duration::from_secs(60));
                };
                helpers.on_each(vec![0u8; 4], wait);
            }
        });
        let began = Instant::now();
        while threads.all.load(Ordering::SeqCst) < 3 {
            std::thread::yield_now();
        }
        let helpers = Helpers::new(Arc::clone(&threads));
        for _ in 0..50 {
            assert_eq!(helpers.on_each(vec![1, 2, 3], |n: &mut i32| *n *= 2), [2, 4, 6]);
        }
        assert!(began.elapsed() < Duration::from_secs(30));
        assert!(!stuck.is_finished());
        drop(let_go);
        stuck.join().unwrap();
    }

    #[test]
    fn a_panic_is_that_of_the_caller_and_others_are_served_as_before() {
        let helpers = Helpers::new(Arc::new(Threads::new(4)));
        for n in 0..3 {
            let panics = move |item: &mut usize| assert_ne!(*item, n, "on demand");
            let work = AssertUnwindSafe(|| helpers.on_each(vec![0, 1, 2], panics));
            assert!(catch_unwind(work).is_err());
        }
        assert_eq!(helpers.on_each(vec![5], |_| ()), [5]);
    }
}
