//! The CLI's end.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use netdev_providers::{Tuple, Zone};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::UnixCredentials;

use super::attrs::{Attrs, Object};
use super::error::{ClientError, ErrorKind, WireError};
use super::filter::ConnFilter;
use super::info::{
    ConnCount, ConnInfo, Explain, ExplainRequest, FlushRequest, Flushed, LintInfo, PortAddRequest,
    PortDelRequest, PortFlushed, PortInfo, PortReconciled, ProviderInfo, ReconcileRequest,
    Reloaded, Stats, Summary,
};
use super::presence;
use super::socket::{self, Socket};
use super::wire::{self, Command, Envelope, Message, PORT_ID, VERSION};

/// Which daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its port id; [`PORT_ID`] stands for wherever the namespace's daemon is.
    pub port_id: u32,
    /// The user it runs as: whoever else answers is not believed.
    pub daemon_uid: u32,
    /// Another user that it may run as: the one that packages make for it.
    pub also_uid: Option<u32>,
    /// How long it may be silent.
    pub patience: Duration,
}

impl Default for Target {
    /// The daemon of this network namespace, run by root.
    fn default() -> Self {
        Self { port_id: PORT_ID, daemon_uid: 0, also_uid: None, patience: Duration::from_secs(5) }
    }
}

/// What came in.
pub(super) enum Incoming {
    /// A datagram of the daemon.
    Messages(Vec<Envelope>),
    /// A datagram of somebody else, unread.
    Stranger(UnixCredentials),
    /// The kernel says that multicasts were lost.
    Overrun,
    /// Nothing, in the time given.
    Nothing,
}

/// A connection to the daemon.
pub struct Client {
    socket: Socket,
    target: Target,
    seq: u32,
    buf: Vec<u8>,
}

/// How far an answer has been read.
struct Call {
    is_complete: bool,
}

/// Connections, a datagram of them at a time: one more is made while these are looked at. Whoever has seen enough drops it;
/// nothing more is made then.
pub struct Conns<'a> {
    client: &'a mut Client,
    /// `None` after an error.
    call: Option<Call>,
}

impl Iterator for Conns<'_> {
    type Item = Result<Vec<ConnInfo>, ClientError>;

    /// Waits for the daemon, no longer than [`Target::patience`] without a sign of life. There may be none in what has
    /// come: the daemon is still searching.
    fn next(&mut self) -> Option<Self::Item> {
        let mut call = self.call.take()?;
        let objects = self.client.step(&mut call).transpose()?;
        let conns = objects.and_then(|objects| {
            let conns = objects.iter().map(|(command, attrs)| match command {
                Command::Conn => ConnInfo::decode(attrs),
                _ => Err(WireError::Unexpected),
            });
            Ok(conns.collect::<Result<_, _>>()?)
        });
        if conns.is_ok() {
            self.call = Some(call);
        }
        Some(conns)
    }
}

fn io(call: &'static str) -> impl Fn(Errno) -> ClientError {
    move |source| ClientError::Io { call, source }
}

impl Client {
    /// To the daemon of the network namespace that the calling thread is in. Whether there is one
    /// shows with the first request.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn connect() -> Result<Self, ClientError> {
        Self::connect_to(Target::default())
    }

    /// To a certain daemon.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn connect_to(target: Target) -> Result<Self, ClientError> {
        Self::open(target, None)
    }

    pub(super) fn open(target: Target, group: Option<u32>) -> Result<Self, ClientError> {
        let socket = Socket::open().map_err(|(call, source)| ClientError::Io { call, source })?;
        match group {
            None => socket.bind(0).map_err(io("bind"))?,
            Some(group) => socket.bind_in_group(0, group).map_err(|e| match e {
                Errno::EPERM => ClientError::EventsDenied,
                e => io("bind")(e),
            })?,
        }
        // So that nobody but the holder of that port id can answer; who that is remains to be seen.
        socket.connect(presence::find(target.port_id)).map_err(io("connect"))?;
        Ok(Self { socket, target, seq: 0, buf: socket::buffer() })
    }

    /// All ports.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn ports(&mut self) -> Result<Vec<PortInfo>, ClientError> {
        self.list(Command::GetPorts, &[], Command::Port)
    }

    /// Connections that fit, all at once.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn conns(&mut self, filter: &ConnFilter) -> Result<Vec<ConnInfo>, ClientError> {
        let mut out = Vec::new();
        for some in self.conns_by_and_by(filter)? {
            out.extend(some?);
        }
        Ok(out)
    }

    /// Connections that fit, as they come: [`ConnFilter::count`] does not matter here.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn conns_by_and_by(&mut self, filter: &ConnFilter) -> Result<Conns<'_>, ClientError> {
        let filter = ConnFilter { count: false, ..filter.clone() };
        let call = self.begin(Command::GetConns, &filter.encode()?)?;
        Ok(Conns { client: self, call: Some(call) })
    }

    /// How many connections fit.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn conn_count(&mut self, filter: &ConnFilter) -> Result<ConnCount, ClientError> {
        let filter = ConnFilter { count: true, ..filter.clone() };
        self.one(Command::GetConns, &filter.encode()?, Command::ConnCount)
    }

    /// Provider classes, in the order in which they are asked.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn providers(&mut self) -> Result<Vec<ProviderInfo>, ClientError> {
        self.list(Command::GetProviders, &[], Command::Provider)
    }

    /// What offloaded packets skip, by kind: what decides about packets first.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn lint(&mut self) -> Result<Vec<LintInfo>, ClientError> {
        self.list(Command::GetLint, &[], Command::Lint)
    }

    /// The engine's counters.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn stats(&mut self) -> Result<Stats, ClientError> {
        self.one(Command::GetStats, &[], Command::Stats)
    }

    /// Why a connection is offloaded or not.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn explain(&mut self, tuple: &Tuple, zone: Option<Zone>) -> Result<Explain, ClientError> {
        let request = ExplainRequest { tuple: *tuple, zone: zone.map(|z| z.0) };
        let mut out = Explain::default();
        self.call(Command::Explain, &request.encode()?, &mut |command, attrs| {
            match command {
                Command::Summary => out.summary = Summary::decode(attrs)?,
                Command::Conn => out.conn = Some(ConnInfo::decode(attrs)?),
                Command::Verdict => out.verdicts.push(Object::decode(attrs)?),
                _ => return Err(WireError::Unexpected),
            }
            Ok(())
        })?;
        Ok(out)
    }

    /// Removes rules.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn flush(&mut self, request: &FlushRequest) -> Result<Flushed, ClientError> {
        let mut out = Flushed::default();
        self.call(Command::Flush, &request.encode()?, &mut |command, attrs| {
            match command {
                Command::Flushed => out.count = PortFlushed::decode(attrs)?.count,
                Command::PortFlushed => out.ports.push(PortFlushed::decode(attrs)?),
                _ => return Err(WireError::Unexpected),
            }
            Ok(())
        })?;
        Ok(out)
    }

    /// Adopts or removes what dead daemons have left: one object for each port.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn reconcile(
        &mut self,
        request: &ReconcileRequest,
    ) -> Result<Vec<PortReconciled>, ClientError> {
        let mut out = Vec::new();
        self.call(Command::Reconcile, &request.encode()?, &mut |command, attrs| {
            match command {
                Command::PortReconciled => out.push(PortReconciled::decode(attrs)?),
                _ => return Err(WireError::Unexpected),
            }
            Ok(())
        })?;
        Ok(out)
    }

    /// Has the configuration read anew, as at SIGHUP.
    ///
    /// # Errors
    /// [`ClientError`]; a configuration that is wrong is refused as [`ErrorKind::InvalidArgument`], and nothing
    /// has changed then.
    pub fn reload(&mut self) -> Result<Reloaded, ClientError> {
        self.one(Command::Reload, &[], Command::Reloaded)
    }

    /// Makes a netdev a port.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn port_add(&mut self, request: &PortAddRequest) -> Result<PortInfo, ClientError> {
        self.one(Command::PortAdd, &request.encode()?, Command::Port)
    }

    /// Detaches a port.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn port_del(&mut self, request: &PortDelRequest) -> Result<(), ClientError> {
        self.simple(Command::PortDel, &request.encode()?)
    }

    fn list<T: Object>(
        &mut self,
        command: Command,
        attrs: &[u8],
        kind: Command,
    ) -> Result<Vec<T>, ClientError> {
        let mut out = Vec::new();
        self.call(command, attrs, &mut |command, attrs| {
            if command != kind {
                return Err(WireError::Unexpected);
            }
            out.push(T::decode(attrs)?);
            Ok(())
        })?;
        Ok(out)
    }

    fn one<T: Object>(
        &mut self,
        command: Command,
        attrs: &[u8],
        kind: Command,
    ) -> Result<T, ClientError> {
        let mut all = self.list(command, attrs, kind)?;
        match (all.pop(), all.is_empty()) {
            (Some(only), true) => Ok(only),
            _ => Err(WireError::Unexpected.into()),
        }
    }

    /// A request whose answer holds no objects.
    pub(super) fn simple(&mut self, command: Command, attrs: &[u8]) -> Result<(), ClientError> {
        self.call(command, attrs, &mut |_, _| Err(WireError::Unexpected))
    }

    /// Sends a request and hands each object of the answer to `each`.
    fn call(
        &mut self,
        command: Command,
        attrs: &[u8],
        each: &mut dyn FnMut(Command, &Attrs) -> Result<(), WireError>,
    ) -> Result<(), ClientError> {
        let mut call = self.begin(command, attrs)?;
        while let Some(objects) = self.step(&mut call)? {
            objects.iter().try_for_each(|(command, attrs)| each(*command, attrs))?;
        }
        Ok(())
    }

    /// Sends a request; [`step`](Self::step) reads the answer.
    fn begin(&mut self, command: Command, attrs: &[u8]) -> Result<Call, ClientError> {
        self.seq = self.seq.wrapping_add(1);
        self.send(command, attrs)?;
        Ok(Call { is_complete: false })
    }

    /// The next objects of an answer: those of one datagram, of which there may be none. `None`: it is complete.
    fn step(&mut self, call: &mut Call) -> Result<Option<Vec<(Command, Attrs)>>, ClientError> {
        if call.is_complete {
            return Ok(None);
        }
        let mut deadline = Instant::now() + self.target.patience;
        loop {
            let wait = deadline.saturating_duration_since(Instant::now());
            let messages = match self.receive(wait)? {
                Incoming::Messages(messages) => messages,
                Incoming::Stranger(who) => {
                    return Err(ClientError::Impostor {
                        pid: who.pid(),
                        uid: who.uid(),
                        expected: self.target.daemon_uid,
                    });
                }
                Incoming::Overrun => continue,
                Incoming::Nothing => return Err(ClientError::NoAnswer(self.target.patience)),
            };
            let mut objects = Vec::new();
            let mut goes_on = false;
            for Envelope { seq, message } in messages {
                // An answer to a request that was given up, or an event.
                if seq != self.seq
                    || matches!(message, Message::Object { command: Command::Event, .. })
                {
                    continue;
                }
                deadline = Instant::now() + self.target.patience;
                match message {
                    Message::Done | Message::Ack => call.is_complete = true,
                    Message::Refused(e) => return Err(e.into()),
                    Message::Object { version, .. } if version != VERSION => {
                        return Err(ClientError::Version { daemon: version, ours: VERSION });
                    }
                    Message::Object { command: Command::Working, .. } => {}
                    Message::Object { command: Command::Searching, .. } => goes_on = true,
                    Message::Object { command, attrs, .. } => {
                        objects.push((command, attrs));
                        goes_on = true;
                    }
                }
            }
            if goes_on && !call.is_complete {
                // At once: the daemon makes the next while we look at these.
                self.send(Command::Next, &[])?;
            }
            if goes_on || call.is_complete {
                return Ok(Some(objects));
            }
        }
    }

    /// Sends a request with the present sequence number.
    pub(super) fn send(&mut self, command: Command, attrs: &[u8]) -> Result<(), ClientError> {
        let datagram = wire::request(command, self.seq, attrs)?;
        let deadline = Instant::now() + self.target.patience;
        loop {
            match self.socket.send_connected(&datagram) {
                Ok(()) => return Ok(()),
                Err(Errno::ECONNREFUSED) => return Err(ClientError::NotRunning),
                // Its buffer is full: netlink has no way to wait for room without blocking.
                Err(Errno::EAGAIN) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(Errno::EAGAIN) => return Err(ClientError::NoAnswer(self.target.patience)),
                Err(e) => return Err(io("sendmsg")(e)),
            }
        }
    }

    /// The next datagram, and whether it is the daemon's.
    pub(super) fn receive(&mut self, at_most: Duration) -> Result<Incoming, ClientError> {
        let deadline = Instant::now() + at_most;
        loop {
            let got = match self.socket.receive(&mut self.buf) {
                Ok(got) => got,
                Err(Errno::ENOBUFS) => return Ok(Incoming::Overrun),
                Err(Errno::EAGAIN) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(Incoming::Nothing);
                    }
                    // Rounded up, so that the last millisecond is not spun away.
                    let left = left + Duration::from_millis(1);
                    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
                    let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
                    match poll(&mut fds, timeout) {
                        Ok(_) | Err(Errno::EINTR) => continue,
                        Err(e) => return Err(io("poll")(e)),
                    }
                }
                Err(e) => return Err(io("recvmsg")(e)),
            };
            let uid = got.sender.uid();
            if uid != self.target.daemon_uid && Some(uid) != self.target.also_uid {
                return Ok(Incoming::Stranger(got.sender));
            }
            if got.truncated {
                return Err(WireError::Truncated.into());
            }
            return Ok(Incoming::Messages(wire::parse(&self.buf[..got.len])?));
        }
    }
}

impl ClientError {
    /// The class of the daemon's refusal, if it was one.
    #[must_use]
    pub fn kind(&self) -> Option<ErrorKind> {
        match self {
            Self::Refused(e) => Some(e.kind),
            _ => None,
        }
    }
}
