//! Threads without which the daemon is blind: it would go on offloading, and not hear that a connection
//! has ended, that a neighbour has moved, that the firewall refuses what it let pass. So none of them ends
//! without a word, be it by a panic, by a socket that fails for good, or because it returns: the first that
//! does is told to whoever waits, and that is to stop offloading.

use std::error::Error;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::engine::contain::caught;
use crate::one_line::one_line;

/// A thread that ended although nobody had asked it to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("thread '{thread}' {how}")]
pub struct Ended {
    /// Its name.
    pub thread: String,
    /// How.
    pub how: How,
}

/// How a thread ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum How {
    /// With these words.
    Panicked(String),
    /// By an error that it could do nothing about.
    Failed(String),
    /// As if there were nothing left to do.
    Returned,
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Panicked(words) => write!(f, "panicked: {words}"),
            Self::Failed(why) => write!(f, "failed: {why}"),
            Self::Returned => f.write_str("returned"),
        }
    }
}

/// Watches threads. Clones watch the same ones.
#[derive(Clone, Debug)]
pub struct Supervisor(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    ended: EventFd,
}

#[derive(Debug, Default)]
struct State {
    stopping: bool,
    first: Option<Ended>,
}

impl Supervisor {
    /// One that watches no thread yet.
    ///
    /// # Errors
    /// When there is no file descriptor left.
    pub fn new() -> io::Result<Self> {
        let ended = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self(Arc::new(Shared { state: Mutex::default(), ended })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a thread that must not end before [`stopping`](Self::stopping).
    ///
    /// # Errors
    /// When the thread cannot be made.
    pub fn spawn<E: Error>(
        &self,
        name: &str,
        f: impl FnOnce() -> Result<(), E> + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let (supervisor, thread) = (self.clone(), name.to_owned());
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || supervisor.watch(&thread, f))
    }

    /// The same of the calling thread, for as long as it does this.
    pub fn watch<E: Error>(&self, thread: &str, f: impl FnOnce() -> Result<(), E>) {
        // What it leaves half done is not used any more: everything is taken back.
        let how = match caught(f) {
            Ok(Ok(())) => How::Returned,
            Ok(Err(e)) => How::Failed(one_line(&e)),
            Err(words) => How::Panicked(words),
        };
        self.tell(Ended { thread: thread.to_owned(), how });
    }

    /// A thread that was started elsewhere has ended, or cannot be relied on any more.
    pub(super) fn tell(&self, ended: Ended) {
        let mut state = self.state();
        if state.stopping {
            if ended.how != How::Returned {
                tracing::error!("while stopping: {ended}");
            }
            return;
        }
        tracing::error!("{ended}");
        state.first.get_or_insert(ended);
        // It can only fail when the counter is full.
        let _ = self.0.ended.write(1);
    }

    /// From now on threads may end.
    pub fn stopping(&self) {
        self.state().stopping = true;
    }

    /// The first that ended before it was to. While there is one, the file descriptor is readable.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        self.state().first.clone()
    }
}

impl AsFd for Supervisor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.ended.as_fd()
    }
}

/// Failures of a socket that is read all the time: one that goes on failing has ended.
#[derive(Debug, Default)]
pub(super) struct Failures(u32);

impl Failures {
    /// So many in a row are its end.
    const AT_MOST: u32 = 10;

    /// What was read; `None`: it failed, which is told, and may be tried again after a while.
    ///
    /// # Errors
    /// It has failed too often.
    pub(super) fn passed<T, E: Error>(
        &mut self,
        what: &str,
        read: Result<T, E>,
    ) -> Result<Option<T>, E> {
        match read {
            Ok(read) => {
                self.0 = 0;
                Ok(Some(read))
            }
            Err(e) => {
                self.0 += 1;
                if self.0 >= Self::AT_MOST {
                    return Err(e);
                }
                tracing::error!("{what}: {}", one_line(&e));
                Ok(None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    fn readable(s: &Supervisor, within: Duration) -> bool {
        let timeout = PollTimeout::try_from(within).unwrap();
        poll(&mut [PollFd::new(s.as_fd(), PollFlags::POLLIN)], timeout).unwrap() == 1
    }

    /// What is told of a thread that does this.
    fn told(f: impl FnOnce() -> io::Result<()> + Send + 'static) -> String {
        let s = Supervisor::new().unwrap();
        let thread = s.spawn("eyes", f).unwrap();
        assert!(readable(&s, Duration::from_secs(30)), "whoever waits is woken");
        thread.join().unwrap();
        assert!(readable(&s, Duration::ZERO), "and whoever comes later");
        s.ended().unwrap().to_string()
    }

    #[test]
    fn a_thread_that_ends_by_itself_is_told_with_its_name_and_why() {
        assert_eq!(told(|| panic!("at {}", 7)), "thread 'eyes' panicked: at 7");
        assert_eq!(told(|| panic!("just so")), "thread 'eyes' panicked: just so");
        assert_eq!(told(|| std::panic::panic_any(7)), "thread 'eyes' panicked: no words");
        assert_eq!(told(|| Ok(())), "thread 'eyes' returned");
        let gone = || Err(io::Error::other(Failed(io::Error::other("gone"))));
        assert_eq!(told(gone), "thread 'eyes' failed: the socket: gone");
    }

    #[derive(Debug, thiserror::Error)]
    #[error("the socket")]
    struct Failed(#[source] io::Error);

    #[test]
    fn the_first_that_ended_is_the_cause() {
        let s = Supervisor::new().unwrap();
        for (thread, why) in [("one", "a"), ("two", "b")] {
            s.watch(thread, || Err(io::Error::other(why)));
        }
        assert_eq!(s.ended().unwrap().to_string(), "thread 'one' failed: a");
    }

    #[test]
    fn threads_that_are_stopped_may_end_in_whichever_way() {
        let s = Supervisor::new().unwrap();
        let (go_on, waiting) = std::sync::mpsc::channel::<()>();
        let returns = s.spawn("returns", move || {
            let _ = waiting.recv();
            Ok::<_, io::Error>(())
        });
        assert!(!readable(&s, Duration::from_millis(50)), "it runs");
        assert_eq!(s.ended(), None);
        s.stopping();
        drop(go_on);
        returns.unwrap().join().unwrap();
        s.watch("panics", || -> io::Result<()> { panic!("late") });
        assert_eq!(s.ended(), None);
        assert!(!readable(&s, Duration::ZERO));
    }

    #[test]
    fn a_socket_that_goes_on_failing_has_ended_and_one_that_recovers_has_not() {
        let mut failures = Failures::default();
        let fail = || Err::<(), _>(io::Error::other("no"));
        for _ in 0..3 {
            for _ in 1..Failures::AT_MOST {
                assert_eq!(failures.passed("the socket", fail()).unwrap(), None);
            }
            assert_eq!(failures.passed("the socket", Ok::<_, io::Error>(7)).unwrap(), Some(7));
        }
        for _ in 1..Failures::AT_MOST {
            failures.passed("the socket", fail()).unwrap();
        }
        assert_eq!(failures.passed("the socket", fail()).unwrap_err().to_string(), "no");
    }
}
