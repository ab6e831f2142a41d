//! The `ctoffloadd` program: reads its configuration, attaches to netdevs, answers the CLI.
//!
//! Start-up goes from what can fail without a trace to what leaves one: configuration, the sight ledger (a
//! second daemon ends here, with nothing changed), the control socket, ports. A clean stop
//! goes the other way and leaves nothing of ours in the kernel.

pub mod config;
mod conns;
mod explain;
mod handler;
mod told;

use std::io::Write;
use std::num::NonZeroU32;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use clap::Parser;
use netdev_providers::ProviderClass;
use netdev_providers::ebpf::{EbpfClass, EbpfConfig};
use netdev_providers::nf_flowtable::{NfFlowtableClass, NfFlowtableConfig};
use netdev_providers::tc_flower::{TcFlowerClass, TcFlowerConfig};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Group, geteuid};

use self::config::{Config, ConfigError};
use self::handler::Handler;
use crate::control::access::Access;
use crate::control::error::ServerError;
use crate::control::server::Server;
use crate::datapath::netfilter::conntrack::ConntrackError;
use crate::datapath::netfilter::ledger::LedgerError;
use crate::datapath::netfilter::nflog::NflogError;
use crate::datapath::supervisor::{Ended, Supervisor};
use crate::datapath::{self, Backend, DatapathError, KernelDatapath};
use crate::engine::clock::Clock;
use crate::engine::registry::RegistryError;
use crate::engine::{Engine, Limits};
use crate::one_line::one_line;

/// The provider classes that there are, in the order in which they are asked.
const CLASSES: [&str; 3] = ["ebpf", "tc-flower", "nf-flowtable"];

const EXIT_CODES: &str = "\
Exit status:
  0  stopped by a signal, nothing left behind
  1  another failure
  2  bad command line or configuration
  3  another daemon runs in this network namespace
  4  not enough privilege (CAP_NET_ADMIN)
  5  the kernel lacks something that is needed
  8  a part of the daemon ended by itself, so offloading was stopped: as at a signal, nothing is left
     behind, or the log says what";

/// Offloads connections, on the netdev that sees them, when it first sees them.
#[derive(Parser, Debug)]
#[command(name = "ctoffloadd", version, after_help = EXIT_CODES)]
struct Args {
    /// Configuration file (TOML). Without it nothing is attached but by `ctoffload port add`.
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Attach netdevs whose name matches this pattern, with all defaults; may be repeated. Looked
    /// at after the patterns of the configuration file.
    #[arg(short, long, value_name = "PATTERN")]
    port: Vec<String>,
    /// Read the configuration, say whether it is valid, and exit.
    #[arg(long)]
    check: bool,
    /// Log filter, as of `tracing`: `info`, `debug`, `ctoffload::engine=trace`.
    #[arg(long, value_name = "FILTER", default_value = "info", env = "CTOFFLOAD_LOG")]
    log: String,
}

/// Why the daemon ended.
#[derive(Debug, thiserror::Error)]
enum DaemonError {
    #[error("configuration")]
    Config(#[from] ConfigError),
    #[error("'{pattern}' is not a pattern")]
    Pattern {
        pattern: String,
        #[source]
        source: glob::PatternError,
    },
    #[error("control group '{0}' does not exist")]
    NoGroup(String),
    #[error("'{filter}' is not a log filter")]
    LogFilter {
        filter: String,
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    #[error("this needs CAP_NET_ADMIN: run it as root")]
    NotRoot,
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error("kernel datapath")]
    Datapath(#[source] DatapathError),
    #[error("offloading was stopped")]
    Ended(#[source] Ended),
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error("{0}")]
    Os(&'static str, #[source] std::io::Error),
}

impl From<DatapathError> for DaemonError {
    fn from(e: DatapathError) -> Self {
        match e {
            DatapathError::Ended(ended) => Self::Ended(ended),
            e => Self::Datapath(e),
        }
    }
}

impl DaemonError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Pattern { .. } | Self::NoGroup(_) | Self::LogFilter { .. } => 2,
            Self::Server(ServerError::AlreadyRunning { .. } | ServerError::Taken { .. })
            | Self::Datapath(DatapathError::Ledger(LedgerError::AlreadyOwned { .. })) => 3,
            // Root without the capability, as in a container.
            Self::NotRoot
            | Self::Datapath(DatapathError::Ledger(LedgerError::NotPermitted))
            | Self::Datapath(DatapathError::Nflog(NflogError::NotPermitted))
            | Self::Datapath(DatapathError::Conntrack(ConntrackError::NotPermitted)) => 4,
            Self::Datapath(DatapathError::Ledger(LedgerError::Unsupported { .. }))
            | Self::Datapath(DatapathError::Accounting)
            | Self::Datapath(DatapathError::Nflog(NflogError::Unsupported(_)))
            | Self::Datapath(DatapathError::Conntrack(ConntrackError::Unsupported(_))) => 5,
            // The CLI's go up to 7.
            Self::Ended(_) => 8,
            _ => 1,
        }
    }
}

/// The program.
#[must_use]
pub fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // Whoever read it may be gone.
            let _ = writeln!(std::io::stderr(), "ctoffloadd: {}", one_line(&e));
            ExitCode::from(e.exit_code())
        }
    }
}

/// A port has a socket for each of its writers, and some more: the soft limit of 1024 is for programs
/// that call select(2).
fn allow_many_sockets() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        if soft < hard { setrlimit(Resource::RLIMIT_NOFILE, hard, hard) } else { Ok(()) }
    });
    if let Err(e) = raised {
        tracing::warn!("the limit of open files stays as it is: {e}");
    }
}

/// The file, where there is one, and the command line.
fn configuration(args: &Args) -> Result<Config, DaemonError> {
    let config = match &args.config {
        Some(path) => Config::read(path, &CLASSES)?,
        None => Config::default(),
    };
    config
        .with_patterns(&args.port)
        .map_err(|(pattern, source)| DaemonError::Pattern { pattern, source })
}

/// Reads the configuration anew, and has what can be changed changed; `started` is the one of the start.
fn reload(args: &Args, started: &Config, current: &Config, apply: impl FnOnce(Config)) {
    if args.config.is_none() {
        tracing::info!("SIGHUP: going on as before (there is no configuration file)");
        return;
    }
    let new = match configuration(args) {
        Ok(new) => new,
        Err(e) => {
            tracing::error!("SIGHUP: nothing changes: {}", one_line(&e));
            return;
        }
    };
    let kept = started.fixed_keys_that_differ(&new);
    if !kept.is_empty() {
        tracing::warn!(
            keys = kept.join(", "),
            "SIGHUP: read at the start only, and left as they were"
        );
    }
    if current.has_other_ports(&new) {
        tracing::info!(
            "SIGHUP: [[port]] holds for netdevs that come from now on; ports stay bound"
        );
    }
    apply(new);
    tracing::info!("SIGHUP: the configuration was read anew");
}

fn run(args: &Args) -> Result<(), DaemonError> {
    let filter = tracing_subscriber::EnvFilter::try_new(&args.log)
        .map_err(|source| DaemonError::LogFilter { filter: args.log.clone(), source })?;
    tracing_subscriber::fmt()
        // It would be told on stderr, where the log goes: whoever read that is gone, and to fail to say so
        // is a panic of whichever thread had something to log.
        .log_internal_errors(false)
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(false)
        .init();

    let config = Arc::new(configuration(args)?);
    let group = config.control_group.as_deref().map(find_group).transpose()?;
    if args.check {
        println!("the configuration is valid");
        return Ok(());
    }
    if !geteuid().is_root() {
        return Err(DaemonError::NotRoot);
    }
    // Blocked before any thread starts, so that they all inherit it and one waits.
    let mut signals = SigSet::empty();
    STOPPING.iter().chain(&OTHERS).for_each(|&signal| signals.add(signal));
    signals.thread_block().map_err(|e| DaemonError::Os("blocking signals", e.into()))?;
    // Once: later there may be no file descriptor left, and it has to be stopped all the same.
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(|e| DaemonError::Os("signalfd", e.into()))?;
    allow_many_sockets();
    let supervisor = Supervisor::new().map_err(|e| DaemonError::Os("eventfd", e))?;

    let mut tc_config = TcFlowerConfig {
        writers: config.tc_writers,
        percpu_stats: config.tc_percpu_stats,
        qdisc: config.tc_qdisc,
        ..TcFlowerConfig::default()
    };
    if let Some(base) = config.tc_prio_base {
        tc_config.prio_base = base.get();
    }
    let backend = Arc::new(Backend::open(datapath::Config {
        nflog_group: config.nflog_group.get(),
        ledger_size: config.ledger_size.get(),
        one_way_udp: config.one_way_udp,
        bridged: config.bridged,
        min_packets: config.min_packets,
        min_bytes: config.min_bytes,
        tunables: config.tunables(),
        adopt: config.adopt,
        // The one in front of the first is ours too.
        tc_prio: tc_config.prio_base.saturating_sub(1),
    })?);
    // Behind the ledger, which nobody can have who has no privilege and no two daemons at once: here ends one
    // that comes while another is stopping.
    let server = Server::bind(Access { group })?;
    let engine = Engine::new(
        new_instance()?,
        Arc::clone(&backend) as Arc<dyn crate::engine::datapath::Datapath>,
        Limits { connections: config.connections, queue: config.queue, ..Limits::default() },
        Clock::default(),
    );
    // A netdev whose NIC carries rules gets the class that it carries; of the others these are asked in this order.
    engine.register(Arc::new(EbpfClass::new(EbpfConfig {
        mode: config.ebpf_mode,
        max_rules: config.ebpf_max_rules,
        ..EbpfConfig::default()
    })))?;
    engine.register(Arc::new(TcFlowerClass::new(tc_config)))?;
    let flowtable = Arc::new(NfFlowtableClass::new(NfFlowtableConfig {
        accounting: config.flowtable_accounting,
        ..NfFlowtableConfig::default()
    }));
    engine.register(Arc::clone(&flowtable) as Arc<dyn ProviderClass>)?;
    backend.set_own_changes(Box::new(move |port_id| flowtable.is_own_change(port_id)));
    backend.set_observer(Box::new(handler::Events(server.publisher())));

    let current = Arc::new(ArcSwap::from(Arc::clone(&config)));
    let policy = {
        let current = Arc::clone(&current);
        Arc::new(move |name: &str| current.load().port(name))
    };
    let datapath =
        KernelDatapath::start(Arc::clone(&backend), engine.clone(), policy, &supervisor)?;
    let handler = Handler::new(engine, backend, datapath, Arc::clone(&current));
    tracing::info!("running");

    let stop = AtomicBool::new(false);
    let ended = std::thread::scope(|scope| {
        let waker = server.waker();
        scope.spawn(|| {
            supervisor.watch("control", || server.run(&handler, || stop.load(Ordering::SeqCst)));
        });
        let ended = loop {
            match wait(&signals, &supervisor) {
                Event::Signal(signal) if STOPPING.contains(&signal) => {
                    tracing::info!("{signal}: stopping");
                    break None;
                }
                Event::Signal(Signal::SIGHUP) => {
                    reload(args, &config, &current.load(), |new| handler.reconfigure(new));
                }
                Event::Signal(signal) => tracing::info!("{signal}: going on as before"),
                Event::Ended(ended) => {
                    tracing::error!("stopping: without that thread nothing may be offloaded");
                    handler.take_back();
                    break Some(ended);
                }
                Event::None => {}
            }
        };
        supervisor.stopping();
        stop.store(true, Ordering::SeqCst);
        waker.wake();
        ended
    });
    let left = handler.stop();
    for what in &left {
        tracing::error!("something may be left behind: {what}");
    }
    if left.is_empty() {
        tracing::info!("stopped, nothing left behind");
    } else {
        tracing::error!("stopped; what is left is adopted or removed at the next start");
    }
    ended.map_or(Ok(()), |ended| Err(DaemonError::Ended(ended)))
}

/// Signals that stop the daemon, cleanly.
const STOPPING: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGQUIT];

/// Signals that would end a process that does not ask for them, at once: with the rules in place, and
/// nobody to take them back. A terminal that goes sends the first of them.
const OTHERS: [Signal; 4] = [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGALRM];

/// What the daemon waits for.
enum Event {
    Signal(Signal),
    Ended(Ended),
    /// Neither, yet.
    None,
}

fn wait(signals: &SignalFd, supervisor: &Supervisor) -> Event {
    let mut fds =
        [signals.as_fd(), supervisor.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    if poll(&mut fds, PollTimeout::from(1000u16)).is_err() {
        // A signal that is none of ours, or no memory: not at once again.
        std::thread::sleep(Duration::from_millis(10));
    }
    if let Some(ended) = supervisor.ended() {
        return Event::Ended(ended);
    }
    let info = signals.read_signal().ok().flatten();
    let signal = info.and_then(|i| i32::try_from(i.ssi_signo).ok());
    signal.and_then(|n| Signal::try_from(n).ok()).map_or(Event::None, Event::Signal)
}

fn find_group(name: &str) -> Result<nix::unistd::Gid, DaemonError> {
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(group.gid),
        _ => Err(DaemonError::NoGroup(name.to_owned())),
    }
}

fn new_instance() -> Result<NonZeroU32, DaemonError> {
    loop {
        let n = getrandom::u32()
            .map_err(|e| DaemonError::Os("random number", std::io::Error::other(e)))?;
        if let Some(n) = NonZeroU32::new(n) {
            return Ok(n);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::supervisor::How;

    #[test]
    fn exit_codes_tell_privilege_from_a_second_daemon_and_from_what_the_kernel_lacks() {
        let code = |e: DatapathError| DaemonError::from(e).exit_code();
        assert_eq!(code(LedgerError::NotPermitted.into()), 4);
        assert_eq!(code(NflogError::NotPermitted.into()), 4);
        assert_eq!(code(ConntrackError::NotPermitted.into()), 4);
        assert_eq!(DaemonError::NotRoot.exit_code(), 4);
        assert_eq!(code(LedgerError::AlreadyOwned { table: "inet ctoffload".into() }.into()), 3);
        assert_eq!(code(DatapathError::Accounting), 5);
        assert_eq!(code(LedgerError::TableExists { table: "inet ctoffload".into() }.into()), 1);
        assert_eq!(DaemonError::NoGroup("readers".into()).exit_code(), 2);
    }

    #[test]
    fn what_ended_by_itself_has_a_status_of_its_own_also_while_it_starts() {
        let ended = || Ended { thread: "monitor".into(), how: How::Returned };
        assert_eq!(DaemonError::Ended(ended()).exit_code(), 8);
        assert_eq!(DaemonError::from(DatapathError::Ended(ended())).exit_code(), 8);
    }
}
