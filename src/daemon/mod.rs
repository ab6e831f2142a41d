//! The `ctoffloadd` program: reads its configuration, attaches to netdevs, answers the CLI.
//!
//! Start-up goes from what can fail without a trace to what leaves one: configuration, the sight ledger (a
//! second daemon ends here, with nothing changed), the control socket, ports. A clean stop
//! goes the other way and leaves nothing of ours in the kernel.

pub mod config;
mod conns;
mod explain;
mod handler;
mod notify;
mod privilege;
mod source;
mod told;

use std::io::Write;
use std::num::NonZeroU32;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use arc_swap::ArcSwap;
use clap::{CommandFactory, Parser};
use netdev_providers::ProviderClass;
use netdev_providers::ebpf::{EbpfClass, EbpfConfig};
use netdev_providers::nf_flowtable::{NfFlowtableClass, NfFlowtableConfig};
use netdev_providers::tc_flower::{TcFlowerClass, TcFlowerConfig};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Group;

use self::config::Config;
use self::handler::Handler;
pub use self::source::DEFAULT_FILE;
use self::source::{Source, SourceError};
use crate::control::access::Access;
use crate::control::error::ServerError;
use crate::control::server::Server;
use crate::datapath::netfilter::conntrack::ConntrackError;
use crate::datapath::netfilter::ledger::LedgerError;
use crate::datapath::netfilter::nflog::NflogError;
use crate::datapath::supervisor::{Ended, Supervisor};
use crate::datapath::{self, Backend, DatapathError, KernelDatapath, Left};
use crate::engine::clock::Clock;
use crate::engine::registry::RegistryError;
use crate::engine::{Engine, Limits};
use crate::one_line::one_line;

/// The provider classes that there are, in the order in which they are asked.
const CLASSES: [&str; 3] = ["ebpf", "tc-flower", "nf-flowtable"];

const EXIT_CODES: &str = "\
Exit status:
  0  stopped by a signal, nothing left behind (or the rules that `[stop]` is to keep)
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
    /// Configuration file (TOML). Without it /etc/ctoffload/ctoffload.toml, if it is there; without that one nothing is
    /// attached but what --port says, and by `ctoffload port add`.
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Attach netdevs whose name matches this pattern, with all defaults; may be repeated. Looked
    /// at after the patterns of the configuration file.
    #[arg(short, long, value_name = "PATTERN")]
    port: Vec<String>,
    /// Read the configuration, say whether it is valid and which [[port]] matches no netdev now, and exit.
    #[arg(long)]
    check: bool,
    /// Log filter, as of `tracing`: `info`, `debug`, `ctoffload::engine=trace`.
    #[arg(long, value_name = "FILTER", default_value = "info", env = "CTOFFLOAD_LOG")]
    log: String,
}

/// Why the daemon ended.
#[derive(Debug, thiserror::Error)]
enum DaemonError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("control group '{0}' does not exist")]
    NoGroup(String),
    #[error("'{filter}' is not a log filter")]
    LogFilter {
        filter: String,
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    #[error(
        "this needs CAP_NET_ADMIN: run it as root, or with that capability (and CAP_BPF, CAP_PERFMON)"
    )]
    NotPermitted,
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
            Self::Source(_) | Self::NoGroup(_) | Self::LogFilter { .. } => 2,
            Self::Server(ServerError::AlreadyRunning { .. } | ServerError::Taken { .. })
            | Self::Datapath(DatapathError::Ledger(LedgerError::AlreadyOwned { .. })) => 3,
            // Also root without the capability, as in a container.
            Self::NotPermitted
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

/// The command line, for what is made of it: the manual, completions.
#[must_use]
pub fn command() -> clap::Command {
    Args::command()
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

/// The names of the netdevs that there are, in the order of their indices.
fn netdevs() -> Vec<String> {
    let all = nix::net::if_::if_nameindex();
    let name = |i: &nix::net::if_::Interface| i.name().to_string_lossy().into_owned();
    all.map(|all| all.iter().map(name).collect()).unwrap_or_default()
}

/// Says at the start what does not match, which is most often a mistake.
fn tell_unmatched(config: &Config, has_file: bool, names: &[String]) {
    if !config.has_ports() {
        if has_file {
            tracing::warn!(
                "no [[port]] and no --port: no netdev is a port until `ctoffload port add`"
            );
        } else {
            tracing::warn!(
                "no configuration file: none was named, there is no {DEFAULT_FILE}, and no --port; no netdev is a port until `ctoffload port add`"
            );
        }
        return;
    }
    let unmatched = config.unmatched(names);
    if unmatched.len() == config.port_count() {
        tracing::warn!(
            netdevs = names.join(", "),
            "no netdev matches any [[port]] or --port, so there is no port yet: {}",
            unmatched.join("; ")
        );
    } else if !unmatched.is_empty() {
        tracing::info!("no netdev matches: {}", unmatched.join("; "));
    }
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

    let source = Source::new(args.config.clone(), args.port.clone(), &CLASSES);
    let file = source.file().map(|file| file.display().to_string());
    let config = Arc::new(source.read()?);
    let group = config.control_group.as_deref().map(find_group).transpose()?;
    if args.check {
        return check(&config, file.as_deref());
    }
    if !privilege::may_administer() {
        return Err(DaemonError::NotPermitted);
    }
    match &file {
        Some(file) => tracing::info!(file, "configuration"),
        None if source.has_patterns() => {
            tracing::info!("no configuration file: all defaults ({DEFAULT_FILE} is not there)");
        }
        // It is told below, with what follows from it.
        None => {}
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

    let tc_config = TcFlowerConfig {
        prio_base: config.tc_prio_base,
        writers: config.tc_writers,
        percpu_stats: config.tc_percpu_stats,
        qdisc: config.tc_qdisc,
        ..TcFlowerConfig::default()
    };
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
    let links = backend.links().all().into_iter().map(|link| link.name.clone());
    tell_unmatched(&config, file.is_some(), &links.collect::<Vec<_>>());
    let handler = Handler::new(engine, backend, datapath, Arc::clone(&current), source);
    tracing::info!("running");

    let stop = AtomicBool::new(false);
    let (watching, watched) = mpsc::channel::<()>();
    let (ended, keep) = std::thread::scope(|scope| {
        let waker = server.waker();
        scope.spawn(|| {
            supervisor.watch("control", || server.run(&handler, || stop.load(Ordering::SeqCst)));
        });
        // The netdevs that are there have been bound by now.
        notify::ready(&handler.status());
        if let Some(within) = notify::watchdog() {
            let (server, supervisor, handler) = (&server, &supervisor, &handler);
            scope.spawn(move || {
                let mut before = server.turns();
                notify::keep_watch(within, &watched, || {
                    let turns = server.turns();
                    alive(std::mem::replace(&mut before, turns), turns, supervisor)?;
                    Ok(handler.status())
                });
            });
        }
        let (ended, keep) = loop {
            match wait(&signals, &supervisor) {
                Event::Signal(signal) if STOPPING.contains(&signal) => {
                    tracing::info!("{signal}: stopping");
                    break (None, signal == KEEPING && handler.keeps_rules());
                }
                Event::Signal(Signal::SIGHUP) => {
                    // What is wrong is in the log.
                    let _ = handler.reread("SIGHUP");
                }
                Event::Signal(signal) => tracing::info!("{signal}: going on as before"),
                Event::Ended(ended) => {
                    tracing::error!("stopping: without that thread nothing may be offloaded");
                    handler.take_back();
                    // What it has made may be wrong already.
                    break (Some(ended), false);
                }
                Event::None => {}
            }
        };
        // What follows can take long, and no sign of life is waited for.
        drop(watching);
        notify::stopping(if keep {
            "stopping; rules stay"
        } else {
            "stopping; rules are taken back"
        });
        supervisor.stopping();
        stop.store(true, Ordering::SeqCst);
        waker.wake();
        (ended, keep)
    });
    if keep {
        tell_left(&handler.leave());
        return Ok(());
    }
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

/// Whether the daemon does what it is there for, between two looks at how often the control thread has come round: that
/// one serves, and no thread has ended. (A port whose provider hangs is that port's matter, and told as `slow`.)
fn alive(before: u64, turns: u64, supervisor: &Supervisor) -> Result<(), String> {
    if let Some(ended) = supervisor.ended() {
        return Err(ended.to_string());
    }
    if turns == before {
        return Err("the control thread hangs".to_owned());
    }
    Ok(())
}

/// `--check`: what is wrong has been told by now.
fn check(config: &Config, file: Option<&str>) -> Result<(), DaemonError> {
    let mut out = match file {
        Some(file) => format!("{file}: the configuration is valid\n"),
        None => format!("the configuration is valid (there is no {DEFAULT_FILE}: all defaults)\n"),
    };
    for unmatched in config.unmatched(&netdevs()) {
        out += &format!("no netdev matches now: {unmatched}\n");
    }
    if !config.has_ports() {
        out += "no [[port]] and no --port: no netdev would be a port until `ctoffload port add`\n";
    }
    std::io::stdout().write_all(out.as_bytes()).map_err(|e| DaemonError::Os("printing", e))
}

/// What a stop with `[stop] rules = "keep"` says in the end.
fn tell_left(left: &Left) {
    for what in &left.faults {
        tracing::error!("left to the next start: {what}");
    }
    let Left { rules, flushed, .. } = *left;
    if flushed > 0 {
        tracing::warn!(
            rules = flushed,
            "removed: what nf-flowtable and unpinned programs have made ends with the daemon, and what could not be kept went"
        );
    }
    tracing::info!(
        rules,
        "stopped; rules go on forwarding ([stop] rules = \"keep\") and are adopted at the next start; until then nobody follows the firewall, routes and neighbours"
    );
}

/// Signals that stop the daemon, cleanly.
const STOPPING: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGQUIT];

/// The one of them that leaves rules, if that is configured: the service manager's. Whoever wants none to be left
/// sends another.
const KEEPING: Signal = Signal::SIGTERM;

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
        assert_eq!(DaemonError::NotPermitted.exit_code(), 4);
        assert_eq!(code(LedgerError::AlreadyOwned { table: "inet ctoffload".into() }.into()), 3);
        assert_eq!(code(DatapathError::Accounting), 5);
        assert_eq!(code(LedgerError::TableExists { table: "inet ctoffload".into() }.into()), 1);
        assert_eq!(DaemonError::NoGroup("readers".into()).exit_code(), 2);
    }

    #[test]
    fn it_is_alive_while_the_control_thread_comes_round_and_no_thread_has_ended() {
        let supervisor = Supervisor::new().unwrap();
        assert_eq!(alive(7, 8, &supervisor), Ok(()));
        assert!(alive(7, 7, &supervisor).unwrap_err().contains("control thread hangs"));
        supervisor.watch("monitor", || Ok::<_, std::io::Error>(()));
        assert!(alive(7, 8, &supervisor).unwrap_err().contains("monitor"));
    }

    #[test]
    fn what_ended_by_itself_has_a_status_of_its_own_also_while_it_starts() {
        let ended = || Ended { thread: "monitor".into(), how: How::Returned };
        assert_eq!(DaemonError::Ended(ended()).exit_code(), 8);
        assert_eq!(DaemonError::from(DatapathError::Ended(ended())).exit_code(), 8);
    }
}
