//! What the concurrent parts of the engine are made of, in one place, so that a model checker can
//! take the place of the machine.
//!
//! Everywhere but in the models these are the types of `std`, `arc-swap`, `crossbeam-queue` and `once_cell`,
//! under their own names. Under `--cfg ctoffload_loom` the unit tests are built on [loom]'s, which
//! run every thread under a scheduler that tries the interleavings one after the other, and lets a
//! load return every value that the memory model allows. See `models.rs`.
//!
//! Where loom has no counterpart, a stand-in promises **less** than the real type, so that an
//! ordering which only the real type's insides provide is not taken for one of ours:
//!
//! | real | stand-in |
//! |---|---|
//! | `ArcSwap` | the number of the present value: `store` releases, `load_full` acquires and may be stale |
//! | `SegQueue` | an atomic length: `push` releases, `pop` acquires, `is_empty` orders nothing |
//! | `OnceLock`, `OnceBox` | an atomic flag: a value that was set is seen by who sees the flag |
//! | `park_timeout` | `park`: no time is ever over, so a lost wake-up is a deadlock, which loom reports |
//! | [`Patience`] | yields, and never ends |
//!
//! [loom]: https://docs.rs/loom

#[cfg(not(all(test, ctoffload_loom)))]
pub(super) use self::machine::*;
#[cfg(all(test, ctoffload_loom))]
pub(super) use self::model::*;

#[cfg(not(all(test, ctoffload_loom)))]
mod machine {
    use std::time::{Duration, Instant};

    pub(in crate::engine) use arc_swap::ArcSwap;
    pub(in crate::engine) use crossbeam_queue::SegQueue;
    pub(in crate::engine) use once_cell::race::OnceBox;
    pub(in crate::engine) use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, fence};
    pub(in crate::engine) use std::sync::{Mutex, MutexGuard, OnceLock};
    pub(in crate::engine) use std::thread::{Thread, current, park_timeout};

    /// A number of the calling thread, the same each time.
    pub(in crate::engine) fn thread_number() -> usize {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static NUMBER: usize = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
        NUMBER.with(|number| *number)
    }

    /// How long somebody waits for what others do without telling.
    pub(in crate::engine) struct Patience {
        /// None: no clock goes as far.
        deadline: Option<Instant>,
        pause: Duration,
    }

    impl Patience {
        pub(in crate::engine) fn new(at_most: Duration) -> Self {
            Self { deadline: Instant::now().checked_add(at_most), pause: Duration::from_micros(20) }
        }

        /// Sleeps a while, longer each time. False, and no sleep, when the time is over.
        pub(in crate::engine) fn pause(&mut self) -> bool {
            if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return false;
            }
            std::thread::sleep(self.pause);
            self.pause = (self.pause * 2).min(Duration::from_millis(2));
            true
        }
    }
}

#[cfg(test)]
#[cfg(ctoffload_loom)]
mod model {
    use std::collections::VecDeque;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    pub(in crate::engine) use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, fence};
    pub(in crate::engine) use loom::sync::{Mutex, MutexGuard};
    pub(in crate::engine) use loom::thread::{Thread, current};

    // The stand-ins keep their values in types of `std`, which loom does not see. It switches
    // threads only in front of an operation on one of its own types: what follows such an operation,
    // up to the next one, is one step with it.

    pub(in crate::engine) fn park_timeout(_: Duration) {
        loom::thread::park();
    }

    /// One for all: what two threads do who have different ones, a model says itself.
    pub(in crate::engine) fn thread_number() -> usize {
        0
    }

    pub(in crate::engine) struct Patience;

    impl Patience {
        pub(in crate::engine) fn new(_: Duration) -> Self {
            Self
        }
        pub(in crate::engine) fn pause(&mut self) -> bool {
            loom::thread::yield_now();
            true
        }
    }

    #[derive(Debug)]
    pub(in crate::engine) struct ArcSwap<T> {
        current: AtomicUsize,
        values: std::sync::Mutex<Vec<Arc<T>>>,
    }

    impl<T> ArcSwap<T> {
        pub(in crate::engine) fn from_pointee(value: T) -> Self {
            Self {
                current: AtomicUsize::new(0),
                values: std::sync::Mutex::new(vec![Arc::new(value)]),
            }
        }
        pub(in crate::engine) fn load_full(&self) -> Arc<T> {
            let at = self.current.load(Ordering::Acquire);
            Arc::clone(&self.values.lock().unwrap()[at])
        }
        /// One caller at a time, as with the engine's lock of administration.
        pub(in crate::engine) fn store(&self, value: Arc<T>) {
            let at = {
                let mut values = self.values.lock().unwrap();
                values.push(value);
                values.len() - 1
            };
            self.current.store(at, Ordering::Release);
        }
    }

    impl<T> Default for SegQueue<T> {
        fn default() -> Self {
            Self { len: AtomicUsize::new(0), items: std::sync::Mutex::default() }
        }
    }

    #[derive(Debug)]
    pub(in crate::engine) struct SegQueue<T> {
        len: AtomicUsize,
        items: std::sync::Mutex<VecDeque<T>>,
    }

    impl<T> SegQueue<T> {
        pub(in crate::engine) fn new() -> Self {
            Self::default()
        }
        pub(in crate::engine) fn push(&self, item: T) {
            self.len.fetch_add(1, Ordering::Release);
            self.items.lock().unwrap().push_back(item);
        }
        /// One thread only, as with a port's writer.
        pub(in crate::engine) fn pop(&self) -> Option<T> {
            if self.len.load(Ordering::Relaxed) == 0 {
                return None;
            }
            self.len.fetch_sub(1, Ordering::Acquire);
            self.items.lock().unwrap().pop_front()
        }
        pub(in crate::engine) fn is_empty(&self) -> bool {
            self.len.load(Ordering::Relaxed) == 0
        }
    }

    #[derive(Debug)]
    pub(in crate::engine) struct OnceLock<T> {
        is_set: AtomicBool,
        value: std::sync::OnceLock<T>,
    }

    impl<T> Default for OnceLock<T> {
        fn default() -> Self {
            Self::new()
        }
    }

    impl<T> OnceLock<T> {
        pub(in crate::engine) fn new() -> Self {
            Self { is_set: AtomicBool::new(false), value: std::sync::OnceLock::new() }
        }
        pub(in crate::engine) fn get(&self) -> Option<&T> {
            if self.is_set.load(Ordering::Acquire) { self.value.get() } else { None }
        }
        /// Who finds that another one makes it waits for nothing, as nothing of a model happens while it is made.
        pub(in crate::engine) fn get_or_init(&self, make: impl FnOnce() -> T) -> &T {
            if !self.is_set.load(Ordering::Acquire) {
                self.value.get_or_init(make);
                self.is_set.store(true, Ordering::Release);
            }
            self.value.get().unwrap()
        }
        pub(in crate::engine) fn set(&self, value: T) -> Result<(), T> {
            if self.is_set.swap(true, Ordering::AcqRel) {
                Err(value)
            } else {
                self.value.set(value)
            }
        }
    }

    #[derive(Debug)]
    pub(in crate::engine) struct OnceBox<T>(OnceLock<Box<T>>);

    impl<T> Default for OnceBox<T> {
        fn default() -> Self {
            Self(OnceLock::new())
        }
    }

    impl<T> OnceBox<T> {
        pub(in crate::engine) fn get(&self) -> Option<&T> {
            self.0.get().map(|value| &**value)
        }
        /// Where two threads make a value at once, that of the second is dropped.
        pub(in crate::engine) fn get_or_init(&self, make: impl FnOnce() -> Box<T>) -> &T {
            if self.0.get().is_none() {
                let _ = self.0.set(make());
            }
            self.0.value.get().unwrap()
        }
    }
}
