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

use super::attrs::Object;
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
        client.simple(Command::Watch, &[])?;
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
                self.client.send(Command::Watch, &[])?;
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

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::super::attrs::{Attrs, from_bytes};
    use super::super::wire::PORT_ID;
    use super::*;

    fn publisher() -> Publisher {
        Publisher(Arc::new(Outbox::new().unwrap()))
    }

    fn event(n: u64) -> Event {
        Event { count: Some(n), ..Event::default() }
    }

    /// Whether the server's thread would be woken.
    fn is_readable(outbox: &Outbox) -> bool {
        let mut fds = [PollFd::new(outbox.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn nothing_is_published_until_somebody_watches_and_for_ten_seconds_then() {
        let p = publisher();
        assert!(!p.is_watched());
        p.publish(event(1));
        assert_eq!(p.0.next(), (None, 0));
        std::thread::sleep(Duration::from_millis(5));
        let before = p.0.now_ms();
        assert!((5..60_000).contains(&before), "milliseconds since it was made: {before}");
        p.0.watch();
        let until = p.0.watched_until_ms.load(Ordering::Relaxed);
        assert!((before + 10_000..=p.0.now_ms() + 10_000).contains(&until), "{before} {until}");
        assert!(p.is_watched());
        p.publish(event(2));
        assert_eq!(p.0.next(), (Some(event(2)), 0));
        p.0.watched_until_ms.store(1, Ordering::Relaxed);
        assert!(!p.is_watched(), "that was over long ago");
    }

    #[test]
    fn what_the_queue_has_no_room_for_is_counted_behind_what_it_had() {
        let p = publisher();
        p.0.watch();
        for n in 0..QUEUE as u64 + 3 {
            p.publish(event(n));
        }
        for n in 0..QUEUE as u64 {
            assert_eq!(p.0.next(), (Some(event(n)), 0));
        }
        assert_eq!(p.0.next(), (None, 3));
        assert_eq!(p.0.next(), (None, 0), "told once");
    }

    #[test]
    fn a_burst_wakes_the_server_once_and_the_next_one_again() {
        let p = publisher();
        assert!(!is_readable(&p.0));
        p.0.watch();
        for n in 0..3 {
            p.publish(event(n));
            assert!(is_readable(&p.0));
        }
        assert_eq!(p.0.fd.read(), Ok(1), "one system call for three events");
        p.publish(event(4));
        assert!(!is_readable(&p.0), "it is awake, for all that is known");
        p.0.listen();
        assert!(!is_readable(&p.0));
        p.publish(event(5));
        assert!(is_readable(&p.0));
        p.0.listen();
        assert!(!is_readable(&p.0), "and has been told");
    }

    #[test]
    fn a_loss_is_shown_as_an_event_with_its_number() {
        assert_eq!(Notice::Event(event(7)).into_event(), event(7));
        let lost = Notice::Lost(Some(9)).into_event();
        assert_eq!((lost.kind, lost.count, lost.port), (EventKind::Lost, Some(9), None));
        assert_eq!(Notice::Lost(None).into_event().count, None);
    }

    #[test]
    fn a_gap_in_the_numbers_tells_how_many_were_lost() {
        // Nobody has this port id: what comes is handed in.
        let patience = Duration::from_secs(1);
        let target = Target { port_id: PORT_ID + 1, daemon_uid: 0, also_uid: None, patience };
        let client = Client::open(target, None).unwrap();
        let (said, ready) = (Instant::now(), VecDeque::new());
        let mut s = Subscription { client, last: None, overrun: true, said, ready };
        let message = |n| Message::Object {
            command: Command::Event,
            version: VERSION,
            attrs: from_bytes(&event(n).encode().unwrap()).unwrap(),
        };
        let mut take = |seq, message: Message| {
            s.take(seq, message);
            (std::mem::take(&mut s.ready).into_iter().collect::<Vec<_>>(), s.overrun)
        };
        let seen = |n| Notice::Event(event(n));
        assert_eq!(take(5, message(1)), (vec![seen(1)], true), "the first: of no gap");
        assert_eq!(take(6, message(2)), (vec![seen(2)], true));
        assert_eq!(take(9, message(3)), (vec![Notice::Lost(Some(2)), seen(3)], false), "7 and 8");
        assert_eq!(take(10, message(4)).0, [seen(4)]);
        assert_eq!(take(3, message(5)).0, [seen(5)], "a daemon that was started again");
        assert_eq!(take(4, message(6)).0, [seen(6)]);
        assert_eq!(take(4, message(7)).0, [seen(7)], "the same number: again another daemon");
        // A number without an event counts; what is no event of this version does not.
        let strange = |version, command| Message::Object { command, version, attrs: Attrs::new() };
        assert_eq!(take(50, strange(VERSION + 1, Command::Event)).0, []);
        assert_eq!(take(50, strange(VERSION, Command::Port)).0, []);
        assert_eq!(take(50, Message::Done).0, []);
        assert_eq!(take(5, strange(VERSION, Command::Event)).0, []);
        assert_eq!(take(6, message(8)).0, [seen(8)]);
    }
}
