//! The `ctoffload` program: reads the command line (`args`), makes one validated value of it
//! (`plan`), asks the daemon, prints (`text`, or JSON of the same objects).

mod args;
mod conns;
mod explain;
mod openmetrics;
mod plan;
mod text;
mod tuples;

use std::fmt::Write as _;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser};
use serde::Serialize;

use crate::control::info::Offloaded;
use crate::control::{Client, ClientError, ConnFilter, ControlError, ErrorKind, Subscription};
use crate::one_line::one_line;
use conns::Printed;
use plan::{Action, Output, Plan};

/// How the program ends. The numbers are in `--help`: scripts rely on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Exit {
    Ok = 0,
    Failed = 1,
    Usage = 2,
    NotRunning = 3,
    NoPermission = 4,
    NotFound = 5,
    Conflict = 6,
    Unsupported = 7,
    PartlyOffloaded = 10,
    NotOffloaded = 11,
    Skips = 12,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error("{doing}")]
    Daemon {
        doing: String,
        #[source]
        source: ClientError,
    },
    #[error("cannot print")]
    Output(#[from] io::Error),
    #[error("cannot make JSON")]
    Json(#[from] serde_json::Error),
}

impl CliError {
    fn exit(&self) -> Exit {
        let Self::Daemon { source, .. } = self else { return Exit::Failed };
        match source {
            ClientError::NotRunning => Exit::NotRunning,
            ClientError::EventsDenied => Exit::NoPermission,
            ClientError::Refused(e) => match e.kind {
                ErrorKind::NotFound => Exit::NotFound,
                ErrorKind::AlreadyBound => Exit::Conflict,
                ErrorKind::InvalidArgument => Exit::Usage,
                ErrorKind::Unsupported => Exit::Unsupported,
                ErrorKind::Permission => Exit::NoPermission,
                ErrorKind::Busy | ErrorKind::Version | ErrorKind::Internal => Exit::Failed,
            },
            _ => Exit::Failed,
        }
    }

    /// The reader has gone (`| head`): nobody to tell, and nothing went wrong.
    fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Output(e) if e.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// The command line, for what is made of it: the manual, completions.
#[must_use]
pub fn command() -> clap::Command {
    args::Args::command()
}

/// The whole program.
#[must_use]
pub fn main() -> ExitCode {
    let plan = match args::Args::try_parse().and_then(Plan::try_from) {
        Ok(plan) => plan,
        Err(e) => {
            // Also `--help` and `--version`, which are no failures.
            let _ = e.print();
            return if e.use_stderr() { Exit::Usage.into() } else { Exit::Ok.into() };
        }
    };
    match run(&plan) {
        Ok(exit) => exit.into(),
        Err(e) if e.is_broken_pipe() => Exit::Ok.into(),
        Err(e) => {
            let _ = writeln!(io::stderr(), "ctoffload: {}", one_line(&e));
            e.exit().into()
        }
    }
}

fn run(plan: &Plan) -> Result<Exit, CliError> {
    let doing = plan.action.to_string();
    let at = |source| CliError::Daemon { doing: doing.clone(), source };
    if matches!(plan.action, Action::Monitor) {
        return monitor(plan);
    }
    let mut client = Client::connect_to(plan.target).map_err(at)?;
    let show = &plan.output;
    match &plan.action {
        Action::PortShow(name) => {
            let mut ports = client.ports().map_err(at)?;
            if let Some(name) = name {
                ports.retain(|p| p.name == *name);
                if ports.is_empty() {
                    return Err(at(no_such("no such port")));
                }
            }
            let detail = show.detail || name.is_some();
            print(show, &ports, |out| text::ports(out, &ports, detail))?;
        }
        Action::PortAdd(request) => {
            let port = client.port_add(request).map_err(at)?;
            print(show, &port, |out| text::port_added(out, &port, show.detail))?;
        }
        Action::PortDel(request) => {
            client.port_del(request).map_err(at)?;
            print(show, &serde_json::json!({ "deleted": request.name }), |out| {
                out.push_str(&format!("{} is no port any more\n", request.name));
            })?;
        }
        Action::ConnShow(filter) => {
            let mut stdout = io::stdout().lock();
            let mut printed = Printed::new(show);
            for some in client.conns_by_and_by(filter).map_err(at)? {
                printed.some(&some.map_err(at)?, &mut stdout)?;
            }
            let is_empty = printed.is_empty();
            if is_empty && filter.tuple.is_some() {
                return Err(at(no_such("no such connection")));
            }
            printed.end(&mut stdout)?;
            if is_empty && !show.json {
                let fits = if *filter == ConnFilter::default() { "" } else { " that fits" };
                let _ = writeln!(io::stderr(), "ctoffload: {doing}: there is no connection{fits}");
            }
        }
        Action::ConnCount(filter) => {
            let count = client.conn_count(filter).map_err(at)?;
            print(show, &count, |out| {
                let _ = writeln!(out, "{}", count.count);
            })?;
        }
        Action::ProviderShow => {
            let providers = client.providers().map_err(at)?;
            print(show, &providers, |out| text::providers(out, &providers))?;
        }
        Action::Stats => {
            let stats = client.stats().map_err(at)?;
            print(show, &stats, |out| text::stats(out, &stats))?;
        }
        Action::Lint => {
            let found = client.lint().map_err(at)?;
            print(show, &found, |out| text::lint(out, &found, show.all))?;
            return Ok(if found.iter().any(|f| f.decides) { Exit::Skips } else { Exit::Ok });
        }
        Action::Metrics => {
            let (stats, ports) = (client.stats().map_err(at)?, client.ports().map_err(at)?);
            print(show, &(), |out| openmetrics::metrics(out, &stats, &ports))?;
        }
        Action::Flush(request) => {
            let flushed = client.flush(request).map_err(at)?;
            print(show, &flushed, |out| text::flushed(out, &flushed))?;
        }
        Action::Reconcile(request) => {
            let ports = client.reconcile(request).map_err(at)?;
            print(show, &ports, |out| text::reconciled(out, &ports))?;
            if ports.iter().any(|p| p.fault.is_some()) {
                return Ok(Exit::Failed);
            }
        }
        Action::Reload => {
            let done = client.reload().map_err(at)?;
            print(show, &done, |out| text::reloaded(out, &done))?;
        }
        Action::Explain(tuple, zone) => {
            let answer = client.explain(tuple, *zone).map_err(at)?;
            print(show, &answer, |out| explain::explain(out, tuple, &answer, show.all))?;
            return Ok(match answer.summary.offloaded {
                Offloaded::Both => Exit::Ok,
                Offloaded::Partly => Exit::PartlyOffloaded,
                Offloaded::Not => Exit::NotOffloaded,
                Offloaded::Unknown => Exit::NotFound,
            });
        }
        Action::Monitor => {}
    }
    Ok(Exit::Ok)
}

fn no_such(what: &str) -> ClientError {
    ControlError::not_found(what).into()
}

/// The same facts, as JSON or as text.
fn print<T: Serialize>(
    show: &Output,
    object: &T,
    text: impl FnOnce(&mut String),
) -> Result<(), CliError> {
    let mut out = String::new();
    if show.json {
        out = if show.pretty {
            serde_json::to_string_pretty(object)?
        } else {
            serde_json::to_string(object)?
        };
        out.push('\n');
    } else {
        text(&mut out);
    }
    let mut stdout = io::stdout().lock();
    stdout.write_all(out.as_bytes())?;
    stdout.flush()?;
    Ok(())
}

/// One line for each event, until the daemon goes, the reader goes, or a signal comes.
fn monitor(plan: &Plan) -> Result<Exit, CliError> {
    let doing = plan.action.to_string();
    let at = |source| CliError::Daemon { doing: doing.clone(), source };
    let mut events = Subscription::open(plan.target).map_err(at)?;
    loop {
        if let Some(notice) = events.next(Duration::from_secs(1)).map_err(at)? {
            let event = notice.into_event();
            print(&plan.output, &event, |out| text::event(out, &event, plan.output.detail))?;
        }
    }
}
