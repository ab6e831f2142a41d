//! Events: published by the daemon, received by `ctoffload monitor`.
//!
//! Nothing is made or sent while nobody watches: a [`Subscription`] says so every few seconds
//! ([`Command::Watch`]). Events are multicast, so a slow reader holds up nobody; it finds out
//! through a gap in the sequence numbers, or through `ENOBUFS`.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::attrs::{Attrs, Object};
use super::client::{Client, Incoming, Target};
use super::error::ClientError;
use super::info::{Event, EventKind};
use super::wire::{Command, EVENT_GROUP, Message, VERSION};

/// Events that wait for the server's thread.
const QUEUE: usize = 4096;
/// How long the daemon publishes after somebody said that he watches.
const WATCHED: Duration = Duration::from_secs(10);
/// How often a subscription says so.
const REPEAT: Duration = Duration::from_secs(3);

/// Between the threads that publish and the server's.
pub(super) struct Outbox {
    queue: ArrayQueue<Event>,
    lost: AtomicU32,
    started: Instant,
    watched_until_ms: AtomicU64,
    fd: EventFd,
    awake: AtomicBool,
}

impl Outbox {
    pub(super) fn new() -> Result<Self, Errno> {
        Ok(Self {
            queue: ArrayQueue::new(QUEUE),
            lost: AtomicU32::new(0),
            started: Instant::now(),
            watched_until_ms: AtomicU64::new(0),
            fd: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            awake: AtomicBool::new(false),
        })
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub(super) fn watch(&self) {
        let until = self.now_ms() + u64::try_from(WATCHED.as_millis()).unwrap_or(u64::MAX);
        self.watched_until_ms.store(until, Ordering::Relaxed);
    }

    /// One system call for a burst, not for each event.
    pub(super) fn wake(&self) {
        if !self.awake.swap(true, Ordering::AcqRel) {
            // It can only fail when the counter is full, and then the server is awake.
            let _ = self.fd.write(1);
        }
    }

    /// From now on a wake is a system call again: to be called before looking at what there is.
    pub(super) fn listen(&self) {
        let _ = self.fd.read();
        self.awake.store(false, Ordering::Release);
    }

    /// The next event, and how many were lost before it.
    pub(super) fn next(&self) -> (Option<Event>, u32) {
        match self.queue.pop() {
            Some(event) => (Some(event), 0),
            // What was lost was lost while the queue was full: after all that was in it.
            None => (None, self.lost.swap(0, Ordering::Relaxed)),
        }
    }
}

impl AsFd for Outbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Publishes events, on any thread, without ever waiting.
#[derive(Clone)]
pub struct Publisher(pub(super) Arc<Outbox>);

impl Publisher {
    /// Whether anybody watches: one relaxed load and a clock read. Ask before a costly event is
    /// made.
    #[must_use]
    pub fn is_watched(&self) -> bool {
        let until = self.0.watched_until_ms.load(Ordering::Relaxed);
        until != 0 && self.0.now_ms() < until
    }

    /// Publishes an event, if anybody watches. When too many wait already it is counted as lost,
    /// and readers are told how many.
    pub fn publish(&self, event: Event) {
        if !self.is_watched() {
            return;
        }
        if self.0.queue.push(event).is_err() {
            self.0.lost.fetch_add(1, Ordering::Relaxed);
        }
        self.0.wake();
    }
}

/// What a subscription delivers.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// Something happened.
    Event(Event),
    /// Events were lost here: this many, where that is known already.
    Lost(Option<u64>),
}

impl Notice {
    /// The same as an event, for output.
    #[must_use]
    pub fn into_event(self) -> Event {
        match self {
            Self::Event(event) => event,
            Self::Lost(count) => Event { kind: EventKind::Lost, count, ..Event::default() },
        }
    }
}

/// Receives events.
pub struct Subscription {
    client: Client,
    last: Option<u32>,
    /// `ENOBUFS` was seen, and no gap has told yet how many were lost.
    overrun: bool,
    said: Instant,
    ready: VecDeque<Notice>,
}

impl Subscription {
    /// Joins the events of a daemon.
    ///
    /// # Errors
    /// [`ClientError::EventsDenied`] without `CAP_NET_ADMIN`; otherwise as a request.
    pub fn open(target: Target) -> Result<Self, ClientError> {
        let mut client = Client::open(target, Some(EVENT_GROUP))?;
        client.simple(Command::Watch, Attrs::new())?;
        Ok(Self {
            client,
            last: None,
            overrun: false,
            said: Instant::now(),
            ready: VecDeque::new(),
        })
    }

    /// Waits for the next notice, at most this long; `None`: nothing came.
    ///
    /// # Errors
    /// [`ClientError::NotRunning`] when the daemon has gone.
    pub fn next(&mut self, at_most: Duration) -> Result<Option<Notice>, ClientError> {
        let deadline = Instant::now() + at_most;
        loop {
            if let Some(notice) = self.ready.pop_front() {
                return Ok(Some(notice));
            }
            if self.said.elapsed() >= REPEAT {
                self.said = Instant::now();
                self.client.send(Command::Watch, Attrs::new())?;
            }
            let until = deadline.min(self.said + REPEAT);
            match self.client.receive(until.saturating_duration_since(Instant::now()))? {
                Incoming::Messages(messages) => {
                    for envelope in messages {
                        self.take(envelope.seq, envelope.message);
                    }
                }
                // Multicasts of others come to this group too.
                Incoming::Stranger(_) => {}
                Incoming::Overrun => self.overrun = true,
                Incoming::Nothing => {
                    if std::mem::take(&mut self.overrun) {
                        self.ready.push_back(Notice::Lost(None));
                    } else if Instant::now() >= deadline {
                        return Ok(None);
                    }
                }
            }
        }
    }

    fn take(&mut self, seq: u32, message: Message) {
        let Message::Object { command: Command::Event, version: VERSION, attrs } = message else {
            return;
        };
        // A number that is not above the last: a daemon that was started again.
        let expected = self.last.map(|last| last.wrapping_add(1)).filter(|next| seq >= *next);
        let gap = expected.map_or(0, |next| seq - next);
        if gap > 0 {
            self.overrun = false;
            self.ready.push_back(Notice::Lost(Some(u64::from(gap))));
        }
        self.last = Some(seq);
        // Passed over: a number without an event (see the server), and a kind of event that only a
        // newer program knows.
        if let Ok(event) = Event::decode(&attrs) {
            self.ready.push_back(Notice::Event(event));
        }
    }
}
