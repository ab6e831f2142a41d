//! What is to be done: the command line, validated. Nothing looks at raw flags after this.

use std::fmt;

use clap::CommandFactory;
use clap::error::ErrorKind;
use netdev_providers::{HwFlags, L4Proto, Tuple, Zone};
use nix::unistd::User;

use super::args::{Args, ConnShow, ConnVerb, Object, Offload, PortVerb, ProviderVerb};
use super::tuples;
use crate::control::Target;
use crate::control::filter::{ConnFilter, Nat, SortBy};
use crate::control::info::{FlushRequest, PortAddRequest, PortDelRequest, ReconcileRequest};

/// The user that the package makes for the daemon.
const DAEMON_USER: &str = "ctoffload";

#[derive(Debug)]
pub(super) struct Plan {
    pub(super) target: Target,
    pub(super) output: Output,
    pub(super) action: Action,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Output {
    pub(super) json: bool,
    pub(super) pretty: bool,
    pub(super) detail: bool,
    /// Each object of a list on a line of its own.
    pub(super) oneline: bool,
    /// Of `explain`: what has nothing to do with the connection, too. Of `lint`: every place.
    pub(super) all: bool,
}

#[derive(Debug, PartialEq)]
pub(super) enum Action {
    PortShow(Option<String>),
    PortAdd(PortAddRequest),
    PortDel(PortDelRequest),
    ConnShow(ConnFilter),
    ConnCount(ConnFilter),
    ProviderShow,
    Stats,
    Lint,
    Metrics,
    Flush(FlushRequest),
    Reconcile(ReconcileRequest),
    Reload,
    Explain(Tuple, Option<Zone>),
    Monitor,
}

/// As it stands in front of an error.
impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PortShow(None) => f.write_str("port show"),
            Self::PortShow(Some(name)) => write!(f, "port show {name}"),
            Self::PortAdd(r) => write!(f, "port add {}", r.name),
            Self::PortDel(r) => write!(f, "port del {}", r.name),
            Self::ConnShow(_) | Self::ConnCount(_) => f.write_str("conn show"),
            Self::ProviderShow => f.write_str("provider show"),
            Self::Stats | Self::Metrics => f.write_str("stats"),
            Self::Lint => f.write_str("lint"),
            Self::Flush(_) => f.write_str("flush"),
            Self::Reconcile(_) => f.write_str("reconcile"),
            Self::Reload => f.write_str("reload"),
            Self::Explain(tuple, ..) => write!(f, "explain {tuple}"),
            Self::Monitor => f.write_str("monitor"),
        }
    }
}

fn tuple(words: &[String]) -> Result<Option<Tuple>, clap::Error> {
    if words.is_empty() {
        return Ok(None);
    }
    tuples::parse(words).map(Some).map_err(|e| Args::command().error(ErrorKind::ValueValidation, e))
}

/// The words have been looked at where they are declared.
fn filter(show: ConnShow) -> Result<ConnFilter, clap::Error> {
    let named = |asked: &Option<String>, name: &str| asked.as_deref() == Some(name);
    Ok(ConnFilter {
        tuple: tuple(&show.tuple)?,
        proto: match show.proto.as_deref() {
            Some("udp") => Some(L4Proto::Udp),
            Some(_) => Some(L4Proto::Tcp),
            None => None,
        },
        nat: Nat::ALL.iter().find(|n| named(&show.nat, n.name())).copied(),
        sort: SortBy::ALL.iter().find(|s| named(&show.sort, s.name())).copied(),
        idle_ms: show.idle.map(|seconds| u64::from(seconds) * 1000),
        port: show.port,
        zone: show.zone,
        src: show.src,
        dst: show.dst,
        sport: show.sport,
        dport: show.dport,
        state: show.state,
        reason: show.reason,
        provider: show.provider,
        egress: show.egress,
        bytes: show.bytes,
        limit: show.limit,
        count: false,
    })
}

impl TryFrom<Args> for Plan {
    type Error = clap::Error;

    fn try_from(args: Args) -> Result<Self, clap::Error> {
        let mut target = Target::default();
        match args.daemon_uid {
            Some(uid) => target.daemon_uid = uid,
            // Nobody but root makes users.
            None => {
                let user = User::from_name(DAEMON_USER).ok().flatten();
                target.also_uid = user.map(|user| user.uid.as_raw());
            }
        }
        if let Some(port_id) = args.port_id {
            target.port_id = port_id;
        }
        let all = matches!(
            args.object,
            Object::Explain { verbose: true, .. } | Object::Lint { verbose: true }
        );
        let mut oneline = false;
        let action = match args.object {
            Object::Port { verb: None } => Action::PortShow(None),
            Object::Port { verb: Some(PortVerb::Show { name }) } => Action::PortShow(name),
            Object::Port { verb: Some(PortVerb::Add(add)) } => Action::PortAdd(PortAddRequest {
                name: add.name,
                providers: add.providers,
                capacity: add.capacity,
                offload: add.offload.map(|o| {
                    match o {
                        Offload::Both => HwFlags::Both,
                        Offload::SkipSw => HwFlags::SkipSw,
                        Offload::SkipHw => HwFlags::SkipHw,
                    }
                    .to_string()
                }),
            }),
            Object::Port { verb: Some(PortVerb::Del { name }) } => {
                Action::PortDel(PortDelRequest { name })
            }
            Object::Conn { verb: None } => Action::ConnShow(ConnFilter::default()),
            Object::Conn { verb: Some(ConnVerb::Show(show)) } => {
                oneline = show.oneline;
                if oneline && args.pretty {
                    let e = "--oneline and --pretty are two ways to print JSON";
                    return Err(Args::command().error(ErrorKind::ArgumentConflict, e));
                }
                let count = show.count;
                let filter = filter(*show)?;
                if count { Action::ConnCount(filter) } else { Action::ConnShow(filter) }
            }
            Object::Provider { verb: None | Some(ProviderVerb::Show) } => Action::ProviderShow,
            Object::Stats { openmetrics: false } => Action::Stats,
            Object::Stats { openmetrics: true } if args.json => {
                let e = "--openmetrics and --json are two formats";
                return Err(Args::command().error(ErrorKind::ArgumentConflict, e));
            }
            Object::Stats { openmetrics: true } => Action::Metrics,
            Object::Lint { .. } => Action::Lint,
            Object::Flush { all, port, zone, tuple: words } => {
                Action::Flush(FlushRequest { port, zone, tuple: tuple(&words)?, all })
            }
            Object::Reconcile { port } => Action::Reconcile(ReconcileRequest { port }),
            Object::Reload => Action::Reload,
            Object::Explain { tuple: words, zone, verbose: _ } => match tuple(&words)? {
                Some(tuple) => Action::Explain(tuple, zone.map(Zone)),
                None => {
                    return Err(Args::command().error(ErrorKind::MissingRequiredArgument, "TUPLE"));
                }
            },
            Object::Monitor => Action::Monitor,
        };
        let output =
            Output { json: args.json, pretty: args.pretty, detail: args.stats, oneline, all };
        Ok(Self { target, output, action })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn plan(line: &str) -> Result<Action, clap::Error> {
        Args::try_parse_from(line.split(' ')).and_then(Plan::try_from).map(|p| p.action)
    }

    #[test]
    fn a_tuple_may_be_several_words_or_one() {
        let want = Action::Explain("tcp 10.0.0.1:1 > 10.0.0.2:2".parse().unwrap(), None);
        for line in [
            "ctoffload explain tcp 10.0.0.1:1 10.0.0.2:2",
            "ctoffload explain tcp 10.0.0.1:1 > 10.0.0.2:2",
            "ctoffload exp tcp,10.0.0.1:1,10.0.0.2:2",
        ] {
            assert_eq!(plan(line).unwrap(), want, "{line}");
        }
        assert_eq!(
            plan("ctoffload explain tcp 10.0.0.1:1").unwrap_err().kind(),
            ErrorKind::ValueValidation
        );
    }

    #[test]
    fn objects_and_verbs_may_be_abbreviated() {
        assert_eq!(plan("ctoffload po").unwrap(), Action::PortShow(None));
        assert_eq!(plan("ctoffload port s eth0").unwrap(), Action::PortShow(Some("eth0".into())));
        assert_eq!(plan("ctoffload c s").unwrap(), Action::ConnShow(ConnFilter::default()));
        assert!(plan("ctoffload p").is_err(), "port or provider");
    }

    #[test]
    fn a_flush_says_what() {
        assert!(plan("ctoffload flush").is_err());
        assert!(plan("ctoffload flush --all --port eth0").is_err());
        let both =
            FlushRequest { port: Some("eth0".into()), zone: Some(7), ..FlushRequest::default() };
        assert_eq!(plan("ctoffload flush --port eth0 --zone 7").unwrap(), Action::Flush(both));
    }

    #[test]
    fn a_reconciliation_is_of_all_ports_or_of_one() {
        let all = Action::Reconcile(ReconcileRequest::default());
        assert_eq!(plan("ctoffload reconcile").unwrap(), all);
        let one = Action::Reconcile(ReconcileRequest { port: Some("eth0".into()) });
        assert_eq!(plan("ctoffload reconcile --port eth0").unwrap(), one);
    }

    #[test]
    fn offload_is_spelled_both_ways() {
        for line in
            ["ctoffload port add e --offload skip-sw", "ctoffload port add e --offload skip_sw"]
        {
            let Action::PortAdd(add) = plan(line).unwrap() else { panic!("{line}") };
            assert_eq!(add.offload.as_deref(), Some("skip_sw"));
        }
    }
}
