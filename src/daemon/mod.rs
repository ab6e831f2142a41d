//! The `ctoffloadd` program: reads its configuration, attaches to netdevs, answers the CLI.
//!
//! Start-up goes from what can fail without a trace to what leaves one: configuration, the control
//! socket (a second daemon ends here, with nothing changed), the sight ledger, ports. A clean stop
//! goes the other way and leaves nothing of ours in the kernel.

pub mod config;
mod handler;

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser;
use netdev_providers::ProviderClass;
use netdev_providers::nf_flowtable::{NfFlowtableClass, NfFlowtableConfig};
use netdev_providers::tc_flower::{TcFlowerClass, TcFlowerConfig};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{Group, geteuid};

use self::config::{Config, ConfigError};
use self::handler::Handler;
use crate::control::access::Access;
use crate::control::error::ServerError;
use crate::control::server::Server;
use crate::datapath::netfilter::conntrack::ConntrackError;
use crate::datapath::netfilter::ledger::LedgerError;
use crate::datapath::netfilter::nflog::NflogError;
use crate::datapath::{self, Backend, DatapathError, KernelDatapath, SweepBounds};
use crate::engine::clock::Clock;
use crate::engine::registry::RegistryError;
use crate::engine::{Engine, Limits};

/// The provider classes that there are, in order of priority.
const CLASSES: [&str; 2] = ["tc-flower", "nf-flowtable"];

const EXIT_CODES: &str = "\
Exit status:
  0  stopped by a signal, nothing left behind
  1  another failure
  2  bad command line or configuration
  3  another daemon runs in this network namespace
  4  not enough privilege (CAP_NET_ADMIN)
  5  the kernel lacks something that is needed";

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
    Datapath(#[from] DatapathError),
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error("{0}")]
    Os(&'static str, #[source] std::io::Error),
}

impl DaemonError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Pattern { .. } | Self::NoGroup(_) | Self::LogFilter { .. } => 2,
            Self::Server(ServerError::AlreadyRunning { .. })
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
            let mut text = format!("ctoffloadd: {e}");
            let mut source = std::error::Error::source(&e);
            while let Some(s) = source {
                text.push_str(&format!(": {s}"));
                source = s.source();
            }
            eprintln!("{text}");
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

    let config = match &args.config {
        Some(path) => Config::read(path, &CLASSES)?,
        None => Config::default(),
    };
    let config = Arc::new(
        config
            .with_patterns(&args.port)
            .map_err(|(pattern, source)| DaemonError::Pattern { pattern, source })?,
    );
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
    allow_many_sockets();

    let server = Server::bind(Access { group })?;
    let backend = Arc::new(Backend::open(datapath::Config {
        nflog_group: config.nflog_group.get(),
        ledger_size: config.ledger_size.get(),
        one_way_udp: config.one_way_udp,
        bridged: config.bridged,
        admission: config.admission.clone(),
        min_bytes: config.min_bytes,
        on_ruleset_change: config.on_ruleset_change,
        revalidation: config.revalidation,
        adopt: config.adopt,
    })?);
    let engine = Engine::new(
        new_instance()?,
        Arc::clone(&backend) as Arc<dyn crate::engine::datapath::Datapath>,
        Limits { connections: config.connections, queue: config.queue, ..Limits::default() },
        Clock::default(),
    );
    let mut tc_config = TcFlowerConfig {
        writers: config.tc_writers,
        percpu_stats: config.tc_percpu_stats,
        ..TcFlowerConfig::default()
    };
    if let Some(base) = config.tc_prio_base {
        tc_config.prio_base = base.get();
    }
    let class: Arc<dyn ProviderClass> = Arc::new(TcFlowerClass::new(tc_config));
    engine.register(class)?;
    let flowtable = Arc::new(NfFlowtableClass::new(NfFlowtableConfig {
        accounting: config.flowtable_accounting,
        ..NfFlowtableConfig::default()
    }));
    engine.register(Arc::clone(&flowtable) as Arc<dyn ProviderClass>)?;
    backend.set_own_changes(Box::new(move |port_id| flowtable.is_own_change(port_id)));
    backend.set_observer(Box::new(handler::Events(server.publisher())));

    let policy = {
        let config = Arc::clone(&config);
        Arc::new(move |name: &str| config.port(name))
    };
    let sweeps = SweepBounds {
        busy: Duration::from_secs(config.sweep_seconds.into()),
        max: Duration::from_secs(config.sweep_max_seconds.into()),
    };
    let datapath = KernelDatapath::start(Arc::clone(&backend), engine.clone(), policy, sweeps)?;
    let handler = Handler::new(engine, backend, datapath, config);
    tracing::info!("running");

    let stop = AtomicBool::new(false);
    let served = std::thread::scope(|scope| {
        let waker = server.waker();
        let serving = scope.spawn(|| server.run(&handler, || stop.load(Ordering::SeqCst)));
        let signal = loop {
            if serving.is_finished() {
                break None;
            }
            match wait_signal(&signals) {
                Some(signal) if STOPPING.contains(&signal) => break Some(signal),
                Some(signal) => tracing::info!(
                    "{signal}: going on as before (the configuration is read at the start only)"
                ),
                None => {}
            }
        };
        if let Some(signal) = signal {
            tracing::info!("{signal}: stopping");
        }
        stop.store(true, Ordering::SeqCst);
        waker.wake();
        serving.join()
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
    match served {
        Ok(result) => Ok(result?),
        Err(_) => Err(DaemonError::Os(
            "the control server panicked",
            std::io::Error::other("see the log"),
        )),
    }
}

/// A signal, or `None` after a second.
/// Signals that stop the daemon, cleanly.
const STOPPING: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGQUIT];

/// Signals that would end a process that does not ask for them, at once: with the rules in place, and
/// nobody to take them back. A terminal that goes sends the first of them.
const OTHERS: [Signal; 4] = [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGALRM];

fn wait_signal(signals: &SigSet) -> Option<Signal> {
    // nix has sigwait, which cannot time out; a signalfd can be polled.
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::signalfd::{SfdFlags, SignalFd};
    use std::os::fd::AsFd;
    let fd = SignalFd::with_flags(signals, SfdFlags::SFD_CLOEXEC).ok()?;
    let timeout = PollTimeout::from(1000u16);
    match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout) {
        Ok(n) if n > 0 => {}
        _ => return None,
    }
    let info = fd.read_signal().ok()??;
    i32::try_from(info.ssi_signo).ok().and_then(|n| Signal::try_from(n).ok())
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
}
