//! The daemon's end.
//!
//! One thread answers reads; one more makes changes, one at a time, so that a port-delete that
//! drains a long queue keeps nobody's `stats` waiting. What one client can hold is bounded: one
//! answer in progress, of which nothing is in memory but the iterator behind it.

use std::any::Any;
use std::collections::HashMap;
use std::iter;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::time::{Duration, Instant};

use netdev_providers::{Tuple, Zone};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::UnixCredentials;
use tracing::{debug, warn};

use super::access::{Access, Gate};
use super::attrs::{Object, strict};
use super::error::{ControlError, ErrorKind, ServerError, WireError};
use super::events::{Outbox, Publisher};
use super::filter::ConnFilter;
use super::info::{
    ConnCount, ConnInfo, Explain, ExplainRequest, FlushRequest, Flushed, LintInfo, PortAddRequest,
    PortDelRequest, PortInfo, PortReconciled, ProviderInfo, ReconcileRequest, Reloaded, Stats,
};
use super::presence;
use super::socket::{self, Socket};
use super::wire::{
    self, Command, DAEMON_GROUP, EVENT_GROUP, MAX_DATAGRAM, Message, PORT_ID, VERSION,
};

/// How long a client may leave an answer unread before it is looked whether it is there at all, and before it has to
/// make room for others.
const UNREAD: Duration = Duration::from_secs(5);
/// How long before it is given up: its reader may be a pager in front of somebody who has gone home.
const FORGOTTEN: Duration = Duration::from_secs(3600);
/// How long connections are looked at, where nothing that is asked for is found, before others are served.
const SLICE: Duration = Duration::from_millis(2);
/// How often somebody who waits for a change is told to go on waiting.
const WORKING: Duration = Duration::from_secs(1);
/// How often `stop` is looked at when nothing happens.
const TICK: Duration = Duration::from_millis(200);
/// Answers in progress, of all clients.
const MAX_ANSWERS: usize = 64;
/// Changes that wait for the one that is being made.
const MAX_CHANGES: usize = 16;
/// Requests, and events, that are served before the loop looks at everything else again.
const BURST: usize = 64;

/// Connections, made one by one as the client reads them.
///
/// `next` runs on the server's thread and everybody else waits for it: it should take no longer than a fraction of a
/// millisecond. Where a filter skips many it says [`Found::Nothing`] in between.
pub type ConnDump = Box<dyn Iterator<Item = Found> + Send>;

/// What a look at some connections has found.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "one at a time, and most are the large one")]
pub enum Found {
    /// A connection that is asked for.
    Conn(ConnInfo),
    /// How many are: the only thing that a dump has to tell then.
    Count(u64),
    /// Nothing yet.
    Nothing,
}

/// What the daemon can be asked.
///
/// Reads (`ports`, `conns`, `providers`, `stats`, `explain`) are called on the server's thread, one
/// at a time, and should take milliseconds. Changes (`flush`, `reconcile`, `reload`, `port_add`, `port_del`), and
/// `lint`, which changes nothing and takes its time, are called on
/// another thread, one at a time, **concurrently with reads**, and may block. By the time a method
/// is called the caller's right to it has been checked. A panic is answered as
/// [`ErrorKind::Internal`].
#[allow(clippy::missing_errors_doc)]
pub trait ControlHandler: Send + Sync {
    /// All ports.
    fn ports(&self) -> Result<Vec<PortInfo>, ControlError>;
    /// Connections that the filter lets through, in its order and no more than its limit, or how many; a port or a
    /// netdev that does not exist is [`ErrorKind::NotFound`], a name of something else that does not is
    /// [`ErrorKind::InvalidArgument`].
    fn conns(&self, filter: &ConnFilter) -> Result<ConnDump, ControlError>;
    /// The provider classes, in the order in which they are asked.
    fn providers(&self) -> Result<Vec<ProviderInfo>, ControlError>;
    /// The engine's counters.
    fn stats(&self) -> Result<Stats, ControlError>;
    /// Why a connection is offloaded or not, on each port. The tuple may be the original or the
    /// reply. A connection that the engine does not know is an answer without
    /// [`Explain::conn`], or [`ErrorKind::NotFound`] when nothing can be said of it.
    fn explain(&self, tuple: &Tuple, zone: Option<Zone>) -> Result<Explain, ControlError>;
    /// What offloaded packets skip, by kind. May take a second.
    fn lint(&self) -> Result<Vec<LintInfo>, ControlError>;
    /// Removes rules; returns when they are gone. A tuple nobody knows is
    /// [`ErrorKind::NotFound`], as is a port.
    fn flush(&self, request: &FlushRequest) -> Result<Flushed, ControlError>;
    /// Adopts or removes what dead daemons have left; returns when it is done, with one object for
    /// each port.
    fn reconcile(&self, request: &ReconcileRequest) -> Result<Vec<PortReconciled>, ControlError>;
    /// Makes a netdev a port; returns what it became.
    fn port_add(&self, request: &PortAddRequest) -> Result<PortInfo, ControlError>;
    /// Reads the configuration anew, as at SIGHUP; returns when what can be changed is. A configuration that is
    /// wrong is [`ErrorKind::InvalidArgument`], with its file, line and key, and changes nothing.
    fn reload(&self) -> Result<Reloaded, ControlError>;
    /// Detaches a port; returns when it is gone.
    fn port_del(&self, request: &PortDelRequest) -> Result<(), ControlError>;
}

/// One object of an answer.
type Part = Result<(Command, Vec<u8>), WireError>;
/// An answer, made as it is read.
type Parts = Box<dyn Iterator<Item = Part> + Send>;

fn part<T: Object>(command: Command, object: &T) -> Part {
    object.encode().map(|attrs| (command, attrs))
}

fn parts<T: Object + Send + 'static>(command: Command, objects: Vec<T>) -> Parts {
    Box::new(objects.into_iter().map(move |o| part(command, &o)))
}

/// An answer that the client has not read to its end.
struct Answer {
    uid: u32,
    seq: u32,
    parts: Parts,
    /// A message that did not fit the last datagram.
    held: Option<Vec<u8>>,
    /// When it was read last.
    touched: Instant,
    /// When its reader was there last.
    seen: Instant,
}

/// A change on its way.
struct Change {
    client: u32,
    uid: u32,
    seq: u32,
    request: ChangeRequest,
}

enum ChangeRequest {
    Flush(FlushRequest),
    Reconcile(ReconcileRequest),
    Reload,
    PortAdd(PortAddRequest),
    PortDel(PortDelRequest),
    /// No change, and anybody's who may read: of all that wait, there is one.
    Lint,
}

/// A change that was made, or not. `None`: there is nothing to tell.
struct Changed {
    client: u32,
    uid: u32,
    seq: u32,
    result: Result<Option<Parts>, ControlError>,
}

/// The control server of one network namespace.
pub struct Server {
    socket: Socket,
    gate: Gate,
    outbox: Arc<Outbox>,
    turns: AtomicU64,
}

/// Makes [`Server::run`] look at `stop` at once.
#[derive(Clone)]
pub struct Waker(Arc<Outbox>);

impl Waker {
    /// Wakes it.
    pub fn wake(&self) {
        self.0.wake();
    }
}

impl Server {
    /// Takes the daemon's port id in the network namespace of the calling thread, or another one, when it
    /// is taken by somebody who is no daemon.
    ///
    /// # Errors
    /// [`ServerError::AlreadyRunning`] when there is a daemon. (Two that come at the same moment may both
    /// be told so.)
    pub fn bind(access: Access) -> Result<Self, ServerError> {
        Self::bind_to(PORT_ID, access)
    }

    /// Takes another port id, if it can: for tests.
    ///
    /// # Errors
    /// As [`Server::bind`], and [`ServerError::Taken`] without `CAP_NET_ADMIN`.
    pub fn bind_to(port_id: u32, access: Access) -> Result<Self, ServerError> {
        let io = |(call, source)| ServerError::Io { call, source };
        let socket = Socket::open().map_err(io)?;
        match socket.bind_in_group(port_id, DAEMON_GROUP) {
            Ok(()) => {}
            Err(Errno::EADDRINUSE) => {
                socket.bind_in_group(0, DAEMON_GROUP).map_err(|e| io(("bind", e)))?;
            }
            Err(Errno::EPERM) => socket.bind(port_id).map_err(|e| match e {
                Errno::EADDRINUSE => ServerError::Taken { port_id },
                e => io(("bind", e)),
            })?,
            Err(e) => return Err(io(("bind", e))),
        }
        let bound = socket.port_id().map_err(|e| io(("getsockname", e)))?;
        if let Some(other) = presence::daemons().into_iter().find(|other| *other != bound) {
            return Err(ServerError::AlreadyRunning { port_id: other });
        }
        if bound != port_id {
            warn!(
                port_id,
                bound,
                "the control port id is held by a process that is no daemon; the CLI finds this one all the same"
            );
        }
        let outbox = Outbox::new().map_err(|e| io(("eventfd", e)))?;
        Ok(Self {
            socket,
            gate: Gate::new(access),
            outbox: Arc::new(outbox),
            turns: AtomicU64::new(0),
        })
    }

    /// A handle to publish events with, on any thread.
    #[must_use]
    pub fn publisher(&self) -> Publisher {
        Publisher(Arc::clone(&self.outbox))
    }

    /// How often the thread that serves has come round: it does several times a second, whatever is asked, so
    /// somebody who sees no change for seconds knows that it hangs.
    pub fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }

    /// A handle to end [`Server::run`] without delay.
    #[must_use]
    pub fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.outbox))
    }

    /// Serves until `stop` returns true (looked at several times a second, and on
    /// [`Waker::wake`]). A change that is being made then is waited for.
    ///
    /// # Errors
    /// When the socket fails for good.
    pub fn run(
        &self,
        handler: &dyn ControlHandler,
        stop: impl Fn() -> bool,
    ) -> Result<(), ServerError> {
        std::thread::scope(|scope| {
            let (jobs, todo) = mpsc::sync_channel::<Change>(MAX_CHANGES);
            let (tell, changed) = mpsc::channel::<Changed>();
            let waker = self.waker();
            std::thread::Builder::new()
                .name("control-change".into())
                .spawn_scoped(scope, move || {
                    // Ends when the loop below drops `jobs`.
                    for change in todo {
                        let result = guarded(|| make(handler, &change.request));
                        let Change { client, uid, seq, .. } = change;
                        if tell.send(Changed { client, uid, seq, result }).is_err() {
                            return;
                        }
                        waker.wake();
                    }
                })
                .map_err(|e| ServerError::Io {
                    call: "clone",
                    source: Errno::from_raw(e.raw_os_error().unwrap_or(libc::EAGAIN)),
                })?;
            Loop {
                server: self,
                handler,
                jobs,
                changed,
                answers: HashMap::new(),
                waiting: Vec::new(),
                event_seq: 0,
            }
            .run(&stop)
        })
    }
}

/// What was going wrong inside the daemon must not take the server's thread with it.
fn guarded<T>(call: impl FnOnce() -> Result<T, ControlError>) -> Result<T, ControlError> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| Err(panicked(panic.as_ref())))
}

fn panicked(panic: &(dyn Any + Send)) -> ControlError {
    let words = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no words");
    warn!(panic = words, "a control handler panicked");
    ControlError::internal(format!("the daemon panicked: {words}"))
}

fn make(
    handler: &dyn ControlHandler,
    request: &ChangeRequest,
) -> Result<Option<Parts>, ControlError> {
    Ok(match request {
        ChangeRequest::Flush(r) => {
            let Flushed { count, ports } = handler.flush(r)?;
            let total = super::info::PortFlushed { port: String::new(), count };
            Some(Box::new(
                iter::once(part(Command::Flushed, &total))
                    .chain(parts(Command::PortFlushed, ports)),
            ))
        }
        ChangeRequest::Reconcile(r) => Some(parts(Command::PortReconciled, handler.reconcile(r)?)),
        ChangeRequest::Lint => Some(parts(Command::Lint, handler.lint()?)),
        ChangeRequest::Reload => Some(parts(Command::Reloaded, vec![handler.reload()?])),
        ChangeRequest::PortAdd(r) => Some(parts(Command::Port, vec![handler.port_add(r)?])),
        ChangeRequest::PortDel(r) => {
            handler.port_del(r)?;
            None
        }
    })
}

/// Somebody who waits for a change.
struct Waiting {
    client: u32,
    seq: u32,
    told: Instant,
    lint: bool,
}

struct Loop<'a> {
    server: &'a Server,
    handler: &'a dyn ControlHandler,
    jobs: SyncSender<Change>,
    changed: Receiver<Changed>,
    /// By port id: a client that asks again gives up what it asked before.
    answers: HashMap<u32, Answer>,
    waiting: Vec<Waiting>,
    event_seq: u32,
}

impl Loop<'_> {
    fn run(mut self, stop: &impl Fn() -> bool) -> Result<(), ServerError> {
        let mut buf = socket::buffer();
        let mut again = false;
        while !stop() {
            self.server.turns.fetch_add(1, Ordering::Relaxed);
            let tick = if again { Duration::ZERO } else { TICK };
            self.wait(tick)?;
            self.server.outbox.listen();
            again = self.requests(&mut buf)?;
            while let Ok(changed) = self.changed.try_recv() {
                self.finish(changed);
            }
            again |= self.events();
            self.housekeeping();
        }
        Ok(())
    }

    fn wait(&self, at_most: Duration) -> Result<(), ServerError> {
        let mut fds = [
            PollFd::new(self.server.socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.server.outbox.as_fd(), PollFlags::POLLIN),
        ];
        let timeout = PollTimeout::try_from(at_most).unwrap_or(PollTimeout::ZERO);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(source) => Err(ServerError::Io { call: "poll", source }),
        }
    }

    /// True when there may be more.
    fn requests(&mut self, buf: &mut [u8]) -> Result<bool, ServerError> {
        for _ in 0..BURST {
            let got = match self.server.socket.receive(buf) {
                Ok(got) => got,
                Err(Errno::EAGAIN) => return Ok(false),
                // Of multicasts to the daemon's group, which nobody has a reason to send; whatever is
                // pending on the socket has been told now.
                Err(Errno::ENOBUFS | Errno::ENOMEM) => continue,
                Err(source) => return Err(ServerError::Io { call: "recvmsg", source }),
            };
            let seq = wire::peek_seq(&buf[..got.len]).unwrap_or(0);
            let result = if got.truncated {
                Err(ControlError::invalid(WireError::Truncated.to_string()))
            } else {
                self.request(got.port_id, &got.sender, &buf[..got.len])
            };
            if let Err(error) = result {
                debug!(client = got.port_id, uid = got.sender.uid(), %error, "control request refused");
                self.refuse(got.port_id, seq, &error);
            }
        }
        Ok(true)
    }

    fn request(
        &mut self,
        client: u32,
        who: &UnixCredentials,
        datagram: &[u8],
    ) -> Result<(), ControlError> {
        // First who, then what: strangers get one short answer and nothing else.
        if !self.server.gate.may_read(who) {
            return Err(ControlError::new(
                ErrorKind::Permission,
                "only root, and members of the daemon's control group, may ask",
            ));
        }
        let bad = |e: WireError| ControlError::invalid(format!("the request: {e}"));
        let mut messages = wire::parse(datagram).map_err(bad)?;
        let (Some(message), true) = (messages.pop(), messages.is_empty()) else {
            return Err(ControlError::invalid("the request: not one message"));
        };
        let seq = message.seq;
        let Message::Object { command, version, attrs } = message.message else {
            return Err(ControlError::invalid("the request: not a request"));
        };
        if version != VERSION {
            return Err(ControlError::new(
                ErrorKind::Version,
                format!(
                    "the daemon speaks version {VERSION} of the control protocol, the request is of version {version}: use programs of one release"
                ),
            ));
        }
        let handler = self.handler;
        let parts = match command {
            Command::Next => return self.next(client, who.uid(), seq),
            Command::Watch => {
                self.server.outbox.watch();
                return self.acknowledge(client, seq);
            }
            Command::GetPorts => guarded(|| Ok(parts(Command::Port, handler.ports()?)))?,
            Command::GetConns => {
                let filter = strict::<ConnFilter>(&attrs).map_err(bad)?;
                guarded(|| {
                    let conns = handler.conns(&filter)?;
                    Ok(Box::new(conns.map(|found| match found {
                        Found::Conn(conn) => part(Command::Conn, &conn),
                        Found::Count(count) => part(Command::ConnCount, &ConnCount { count }),
                        Found::Nothing => Ok((Command::Searching, Vec::new())),
                    })) as Parts)
                })?
            }
            Command::GetProviders => {
                guarded(|| Ok(parts(Command::Provider, handler.providers()?)))?
            }
            Command::GetLint => {
                if self.waiting.iter().any(|w| w.lint) {
                    let why = "somebody else is having it looked for";
                    return Err(ControlError::new(ErrorKind::Busy, why));
                }
                return self.have_done(client, who, seq, ChangeRequest::Lint);
            }
            Command::GetStats => guarded(|| Ok(parts(Command::Stats, vec![handler.stats()?])))?,
            Command::Explain => {
                let r = strict::<ExplainRequest>(&attrs).map_err(bad)?;
                guarded(|| {
                    let Explain { summary, conn, verdicts } =
                        handler.explain(&r.tuple, r.zone.map(Zone))?;
                    let summary = parts(Command::Summary, vec![summary]);
                    let conn = parts(Command::Conn, conn.into_iter().collect());
                    let verdicts = parts(Command::Verdict, verdicts);
                    Ok(Box::new(summary.chain(conn).chain(verdicts)) as Parts)
                })?
            }
            Command::Flush => {
                let r = strict::<FlushRequest>(&attrs).map_err(bad)?;
                if !r.all && r.port.is_none() && r.zone.is_none() && r.tuple.is_none() {
                    return Err(ControlError::invalid("a flush of nothing"));
                }
                return self.change(client, who, seq, ChangeRequest::Flush(r));
            }
            Command::Reconcile => {
                let r = strict::<ReconcileRequest>(&attrs).map_err(bad)?;
                return self.change(client, who, seq, ChangeRequest::Reconcile(r));
            }
            Command::Reload => return self.change(client, who, seq, ChangeRequest::Reload),
            Command::PortAdd => {
                let r = strict::<PortAddRequest>(&attrs).map_err(bad)?;
                return self.change(client, who, seq, ChangeRequest::PortAdd(r));
            }
            Command::PortDel => {
                let r = strict::<PortDelRequest>(&attrs).map_err(bad)?;
                return self.change(client, who, seq, ChangeRequest::PortDel(r));
            }
            other => {
                return Err(ControlError::new(
                    ErrorKind::Unsupported,
                    format!("the daemon does not know the request {}", u8::from(other)),
                ));
            }
        };
        self.answer(client, who.uid(), seq, parts)
    }

    /// Queues a change, if its sender may make it.
    fn change(
        &mut self,
        client: u32,
        who: &UnixCredentials,
        seq: u32,
        request: ChangeRequest,
    ) -> Result<(), ControlError> {
        if !self.server.gate.may_change(who) {
            return Err(ControlError::new(ErrorKind::Permission, "only root may change anything"));
        }
        self.have_done(client, who, seq, request)
    }

    /// Has it done by the thread that may block.
    fn have_done(
        &mut self,
        client: u32,
        who: &UnixCredentials,
        seq: u32,
        request: ChangeRequest,
    ) -> Result<(), ControlError> {
        let lint = matches!(request, ChangeRequest::Lint);
        match self.jobs.try_send(Change { client, uid: who.uid(), seq, request }) {
            Ok(()) => {
                self.waiting.push(Waiting { client, seq, told: Instant::now(), lint });
                Ok(())
            }
            Err(TrySendError::Full(_)) => {
                Err(ControlError::new(ErrorKind::Busy, "too many changes are waiting already"))
            }
            Err(TrySendError::Disconnected(_)) => {
                Err(ControlError::internal("the thread that makes changes is gone"))
            }
        }
    }

    fn finish(&mut self, changed: Changed) {
        let Changed { client, uid, seq, result } = changed;
        self.waiting.retain(|w| (w.client, w.seq) != (client, seq));
        let result = match result {
            Ok(Some(parts)) => self.answer(client, uid, seq, parts),
            Ok(None) => self.acknowledge(client, seq),
            Err(e) => Err(e),
        };
        if let Err(error) = result {
            self.refuse(client, seq, &error);
        }
    }

    /// Begins an answer and sends its first datagram.
    fn answer(
        &mut self,
        client: u32,
        uid: u32,
        seq: u32,
        parts: Parts,
    ) -> Result<(), ControlError> {
        self.answers.remove(&client);
        if self.answers.len() >= MAX_ANSWERS && !self.make_room() {
            return Err(ControlError::new(
                ErrorKind::Busy,
                "too many answers are being read already",
            ));
        }
        let now = Instant::now();
        let answer = Answer { uid, seq, parts, held: None, touched: now, seen: now };
        self.go_on(client, answer)
    }

    /// Gives up the answer that has been unread for longest, if that is long enough.
    fn make_room(&mut self) -> bool {
        let oldest = self.answers.iter().min_by_key(|(_, answer)| answer.touched);
        let Some((client, answer)) = oldest.map(|(client, answer)| (*client, answer)) else {
            return false;
        };
        if answer.touched.elapsed() < UNREAD {
            return false;
        }
        self.answers.remove(&client);
        debug!(client, "answer given up: others want to read theirs");
        true
    }

    /// The client has read a datagram and asks for the next.
    fn next(&mut self, client: u32, uid: u32, seq: u32) -> Result<(), ControlError> {
        match self.answers.remove(&client) {
            // Not only the port id has to be the same: somebody else may have it by now.
            Some(answer) if answer.uid == uid && answer.seq == seq => self.go_on(client, answer),
            _ => Err(ControlError::new(
                ErrorKind::Busy,
                "the answer was given up: it was not read for too long",
            )),
        }
    }

    /// Sends the next datagram of an answer, and keeps the rest, if there is one.
    fn go_on(&mut self, client: u32, mut answer: Answer) -> Result<(), ControlError> {
        let (datagram, complete) = guarded(|| fill(&mut answer).map_err(unsaid))?;
        if self.send(client, &datagram) && !complete {
            answer.touched = Instant::now();
            answer.seen = answer.touched;
            self.answers.insert(client, answer);
        }
        Ok(())
    }

    /// True when it got through. Never waits: a client has room for the one datagram it asked for,
    /// or does not read.
    fn send(&self, client: u32, datagram: &[u8]) -> bool {
        match self.server.socket.send_to(client, datagram) {
            Ok(()) => true,
            Err(error) => {
                debug!(client, %error, "control client does not read");
                false
            }
        }
    }

    fn acknowledge(&self, client: u32, seq: u32) -> Result<(), ControlError> {
        self.send(client, &wire::ack(seq).map_err(unsaid)?);
        Ok(())
    }

    fn refuse(&self, client: u32, seq: u32, error: &ControlError) {
        match wire::refusal(seq, error) {
            Ok(datagram) => {
                self.send(client, &datagram);
            }
            Err(error) => warn!(%error, "cannot say no"),
        }
    }

    /// True when there may be more.
    fn events(&mut self) -> bool {
        for _ in 0..BURST {
            let (event, lost) = self.server.outbox.next();
            // Lost events leave a gap in the sequence numbers: that is how a reader knows, whether
            // they were lost here or in its own full buffer.
            self.event_seq = self.event_seq.wrapping_add(lost);
            let attrs = match event {
                Some(event) => event.encode(),
                None if lost == 0 => return false,
                // Nothing follows: a number without an event shows the gap now and not some day.
                None => Ok(Vec::new()),
            };
            self.event_seq = self.event_seq.wrapping_add(1);
            let sent = attrs
                .and_then(|attrs| wire::single(Command::Event, self.event_seq, &attrs))
                .map(|datagram| self.server.socket.multicast(EVENT_GROUP, &datagram));
            if !matches!(sent, Ok(Ok(()))) {
                debug!(?sent, "event not sent");
            }
        }
        true
    }

    fn housekeeping(&mut self) {
        let now = Instant::now();
        let is_unread = |answer: &Answer| now.duration_since(answer.seen) >= UNREAD;
        if self.answers.values().any(is_unread) {
            let there = presence::all();
            self.answers.retain(|client, answer| {
                if !is_unread(answer) {
                    return true;
                }
                answer.seen = now;
                let keep = there.contains(client) && now.duration_since(answer.touched) < FORGOTTEN;
                if !keep {
                    debug!(client, "answer given up: not read");
                }
                keep
            });
        }
        let mut waiting = std::mem::take(&mut self.waiting);
        for w in &mut waiting {
            if now.duration_since(w.told) >= WORKING {
                w.told = now;
                if let Ok(datagram) = wire::single(Command::Working, w.seq, &[]) {
                    self.send(w.client, &datagram);
                }
            }
        }
        self.waiting = waiting;
    }
}

fn unsaid(error: WireError) -> ControlError {
    ControlError::internal(format!("the answer: {error}"))
}

/// As many messages as fit one datagram, or as are found in time; true with the last.
fn fill(answer: &mut Answer) -> Result<(Vec<u8>, bool), WireError> {
    let mut datagram = answer.held.take().unwrap_or_default();
    let begun = Instant::now();
    loop {
        let (message, last) = match answer.parts.next() {
            Some(part) => {
                let (command, attrs) = part?;
                if command == Command::Searching {
                    if begun.elapsed() < SLICE {
                        continue;
                    }
                    if datagram.is_empty() {
                        datagram = wire::part(command, answer.seq, &attrs)?;
                    }
                    return Ok((datagram, false));
                }
                (wire::part(command, answer.seq, &attrs)?, false)
            }
            None => (wire::done(answer.seq)?, true),
        };
        if datagram.len() + message.len() > MAX_DATAGRAM {
            if last {
                // The next datagram asks once more, and an iterator need not be fused.
                answer.parts = Box::new(iter::empty());
            } else {
                answer.held = Some(message);
            }
            return Ok((datagram, false));
        }
        datagram.extend(message);
        if last {
            return Ok((datagram, true));
        }
    }
}
