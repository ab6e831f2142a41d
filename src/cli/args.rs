//! The command line, as typed.

use std::fmt::Write as _;
use std::net::IpAddr;

use clap::builder::PossibleValuesParser;
use clap::{ArgGroup, Args as ClapArgs, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use netdev_providers::Reason;

use crate::control::filter::{Nat, PortRange, SortBy};
use crate::control::info::CAUSES;
use crate::engine::slot::SlotState;
use crate::engine::taken::TakenBack;

const AFTER: &str = "\
Objects and verbs may be abbreviated while they are unambiguous; an object alone shows itself:
    ctoffload port

A TUPLE is `PROTO SRC:SPORT DST:DPORT`, as one word or as several:
    tcp 10.0.0.1:1234 10.9.0.2:80
    'udp [2001:db8::1]:5000 > [2001:db8::2]:53'
    tcp,10.0.0.1:1234,10.9.0.2:80

Exit codes:
    0  done
    1  failed for another reason
    2  usage: the command line, or a value in it
    3  the daemon is not running in this network namespace
    4  no permission
    5  not found: no such port, connection or netdev
    6  conflict: the netdev is a port already
    7  not supported by this daemon, kernel or netdev
Of `explain`: 0 offloaded in both directions, 10 in one, 11 in none, 5 there is no such connection.
Of `lint`: 12 offloaded packets skip something that can change what becomes of them.

The daemon is looked for in the present network namespace; for another one:
    ip netns exec NAME ctoffload …";

const EXPLAIN_EXAMPLES: &str = "\
Examples:
    ctoffload explain tcp 10.0.0.1:1234 10.9.0.2:80
    ctoffload explain 'udp [2001:db8::1]:5000 > [2001:db8::2]:53' --zone 7
    conntrack -L -p tcp --dport 443 | head -n 1 | xargs ctoffload explain
    ctoffload explain 'IP 10.0.0.1.1234 > 10.9.0.2.80: Flags [P.]'";

const LINT_EXAMPLES: &str = "\
Examples:
    ctoffload lint
    ctoffload -j lint | jq '.[] | select(.decides) | .name'";

/// With `explain --help`: the examples, and the causes by name.
fn causes() -> String {
    let mut text = format!("{EXPLAIN_EXAMPLES}\n\nCauses, as -j names them:\n");
    let mut line = |name: &str, words: &str| {
        let _ = writeln!(text, "    {name:<20} {}", words.trim_end_matches('.'));
    };
    CAUSES.iter().for_each(|(name, words)| line(name, words));
    Reason::ALL.iter().for_each(|r| line(r.name(), r.help()));
    TakenBack::ALL.iter().for_each(|t| line(t.name(), &format!("taken back: {}", t.help())));
    text
}

/// Show and change what ctoffloadd offloads, per netdev.
#[derive(Debug, Parser)]
#[command(
    name = "ctoffload",
    version,
    after_help = AFTER,
    infer_subcommands = true,
    disable_help_subcommand = true,
    max_term_width = 100
)]
pub(super) struct Args {
    /// JSON: the same facts as the text, under stable names.
    #[arg(short, long, global = true)]
    pub(super) json: bool,
    /// With -j: indented.
    #[arg(short, long, global = true, requires = "json")]
    pub(super) pretty: bool,
    /// More detail: counters, rules, cookies.
    #[arg(short, long, global = true)]
    pub(super) stats: bool,
    /// The user the daemon runs as; answers of anybody else are not believed. Without it: root, or the user
    /// `ctoffload`, if there is one.
    #[arg(long, global = true, value_name = "UID")]
    pub(super) daemon_uid: Option<u32>,
    /// The netlink port id of the daemon.
    #[arg(long, global = true, value_name = "ID", hide = true)]
    pub(super) port_id: Option<u32>,
    #[command(subcommand)]
    pub(super) object: Object,
}

#[derive(Debug, Subcommand)]
pub(super) enum Object {
    /// Ports: netdevs that are attached to the engine.
    #[command(infer_subcommands = true)]
    Port {
        #[command(subcommand)]
        verb: Option<PortVerb>,
    },
    /// Connections, and where they are offloaded.
    #[command(infer_subcommands = true, visible_alias = "connection")]
    Conn {
        #[command(subcommand)]
        verb: Option<ConnVerb>,
    },
    /// Provider classes: kinds of offload backends.
    #[command(infer_subcommands = true)]
    Provider {
        #[command(subcommand)]
        verb: Option<ProviderVerb>,
    },
    /// Counters of the whole engine.
    #[command(
        after_help = "Examples:\n    ctoffload stats\n    ctoffload stats --openmetrics > /var/lib/prometheus/node-exporter/ctoffload.prom"
    )]
    Stats {
        /// Those, and what `port show` counts, in the OpenMetrics text format, for Prometheus. What has to do with a port
        /// has its name (netdev) and its provider as labels, rejections their reason; no connection is told.
        #[arg(long)]
        openmetrics: bool,
    },
    /// Tell what offloaded packets skip on this machine: limits, marks, logs, shapers.
    ///
    /// Reads the ruleset, what stands at egress, and switches. Of rules, those count which packets of established
    /// connections meet. Exit code: 0 when nothing of it can change what becomes of a packet, 12 otherwise.
    #[command(after_help = LINT_EXAMPLES)]
    Lint {
        /// Every place, and not the first few of each kind.
        #[arg(short, long)]
        verbose: bool,
    },
    /// Remove rules. Connections live on in software, and are offloaded again when they are seen.
    #[command(
        after_help = "Examples:\n    ctoffload flush --port eth0\n    ctoffload flush --port eth0 --zone 7\n    ctoffload flush tcp 10.0.0.1:1234 10.9.0.2:80\n    ctoffload flush --all",
        group = ArgGroup::new("what").required(true).multiple(true).args(["all", "port", "zone", "tuple"])
    )]
    Flush {
        /// Everything.
        #[arg(long, conflicts_with_all = ["port", "zone", "tuple"])]
        all: bool,
        /// Of one port.
        #[arg(long, value_name = "NAME", value_parser = netdev_name)]
        port: Option<String>,
        /// Of one conntrack zone.
        #[arg(long)]
        zone: Option<u16>,
        /// Of one connection: its original or its reply tuple.
        tuple: Vec<String>,
    },
    /// Look at what daemons that died have left: rules of living connections are adopted and go on
    /// as they are, the others are removed. Rules of anybody else are counted and not touched.
    #[command(
        after_help = "Examples:\n    ctoffload reconcile\n    ctoffload -j reconcile --port eth0"
    )]
    Reconcile {
        /// On one port.
        #[arg(long, value_name = "NAME", value_parser = netdev_name)]
        port: Option<String>,
    },
    /// Have the daemon read its configuration anew, as at SIGHUP. A wrong file changes nothing, and is told with its line.
    #[command(
        after_help = "What can be applied to a running daemon is; other keys that have changed are named, and stay as they were.\nExamples:\n    ctoffload reload\n    ctoffload -j reload"
    )]
    Reload,
    /// Tell whether a connection is offloaded, and why not, in each direction.
    ///
    /// The first line is the answer; then the ports that have to do with it. Exit code: 0 when it is offloaded in both
    /// directions, 10 in one, 11 in none, 5 when there is no such connection.
    #[command(
        after_help = EXPLAIN_EXAMPLES,
        after_long_help = causes()
    )]
    Explain {
        /// Its original or its reply tuple, or the inverse of one; a line of `conntrack -L` or of tcpdump -n.
        #[arg(required = true)]
        tuple: Vec<String>,
        /// Its conntrack zone. Without: zone 0, or the one that the daemon knows it in.
        #[arg(long)]
        zone: Option<u16>,
        /// All ports, also those that have nothing to do with it.
        #[arg(short, long)]
        verbose: bool,
    },
    /// Print what happens, as it happens, one event a line. Needs CAP_NET_ADMIN.
    Monitor,
}

#[derive(Debug, Subcommand)]
pub(super) enum PortVerb {
    /// All ports as a table, or one in full.
    #[command(visible_aliases = ["list", "ls"])]
    Show {
        #[arg(value_parser = netdev_name)]
        name: Option<String>,
    },
    /// Make a netdev a port: bind it to the first provider that accepts it.
    #[command(
        after_help = "Examples:\n    ctoffload port add eth0\n    ctoffload port add eth0 --provider tc-flower --offload skip-sw\n    ctoffload port add eth1 --provider nf-flowtable"
    )]
    Add(PortAdd),
    /// Detach a netdev. Its rules are removed; its connections live on in software.
    #[command(visible_alias = "delete")]
    Del {
        #[arg(value_parser = netdev_name)]
        name: String,
    },
}

#[derive(Debug, ClapArgs)]
pub(super) struct PortAdd {
    /// The netdev.
    #[arg(value_parser = netdev_name)]
    pub(super) name: String,
    /// A provider class to ask; may be repeated, asked in this order. Without it: as configured, or what is best on the netdev.
    #[arg(long = "provider", value_name = "CLASS")]
    pub(super) providers: Vec<String>,
    /// Where rules may live. Without it: as configured.
    #[arg(long, value_name = "WHERE")]
    pub(super) offload: Option<Offload>,
    /// How many rules there may be at most. Without it: as configured.
    #[arg(long, value_name = "RULES", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) capacity: Option<u32>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Offload {
    /// In hardware where the NIC takes the rule, and in software.
    Both,
    /// In hardware only.
    #[value(alias = "skip_sw")]
    SkipSw,
    /// In software only.
    #[value(alias = "skip_hw")]
    SkipHw,
}

#[derive(Debug, Subcommand)]
pub(super) enum ConnVerb {
    /// Connections and their slots: one line for each port and direction that has seen them.
    ///
    /// They are printed as they come, those first that are found first; of up to 4096 connections that there are, the
    /// oldest first.
    #[command(
        visible_aliases = ["list", "ls"],
        after_help = CONN_EXAMPLES
    )]
    Show(Box<ConnShow>),
}

const CONN_EXAMPLES: &str = "\
All that is given has to fit. --src, --dst, --sport and --dport are of the original tuple, without NAT. --port, --state,
--reason, --provider and --egress are asked of slots: a connection is shown when one of its slots fits, with those that do.

Examples:
    ctoffload conn show --port eth0 --state rejected
    ctoffload conn show --proto udp --dst 198.51.100.0/24 --dport 4000-4999
    ctoffload conn show --sort bytes --limit 10
    ctoffload conn show --reason table-full --count
    ctoffload -s conn show tcp 10.0.0.1:1234 10.9.0.2:80";

#[derive(Debug, ClapArgs)]
pub(super) struct ConnShow {
    /// Slots of one port.
    #[arg(long, value_name = "NAME", value_parser = netdev_name)]
    pub(super) port: Option<String>,
    /// Of one conntrack zone.
    #[arg(long)]
    pub(super) zone: Option<u16>,
    /// Of one protocol.
    #[arg(long, value_parser = PossibleValuesParser::new(["tcp", "udp"]))]
    pub(super) proto: Option<String>,
    /// From this address, or from one with this prefix.
    #[arg(long, value_name = "ADDRESS[/LENGTH]", value_parser = prefix)]
    pub(super) src: Option<IpNet>,
    /// To this address, or to one with this prefix.
    #[arg(long, value_name = "ADDRESS[/LENGTH]", value_parser = prefix)]
    pub(super) dst: Option<IpNet>,
    /// From this port, or from one of these.
    #[arg(long, value_name = "PORT[-PORT]", value_parser = ports)]
    pub(super) sport: Option<PortRange>,
    /// To this port, or to one of these.
    #[arg(long, value_name = "PORT[-PORT]", value_parser = ports)]
    pub(super) dport: Option<PortRange>,
    /// Slots in this state.
    #[arg(long, value_parser = PossibleValuesParser::new(SlotState::SHOWN.map(SlotState::name)))]
    pub(super) state: Option<String>,
    /// Slots that were rejected for this reason (`explain --help` has what they mean).
    #[arg(long, value_parser = PossibleValuesParser::new(Reason::ALL.iter().map(|r| r.name())), hide_possible_values = true)]
    pub(super) reason: Option<String>,
    /// Slots on ports that are bound to this provider.
    #[arg(long, value_name = "CLASS")]
    pub(super) provider: Option<String>,
    /// Slots whose rules forward to this netdev.
    #[arg(long, value_name = "NAME", value_parser = netdev_name)]
    pub(super) egress: Option<String>,
    /// Those whose source, destination, either or neither is translated.
    #[arg(long, value_parser = PossibleValuesParser::new(Nat::ALL.iter().map(|n| n.name())))]
    pub(super) nat: Option<String>,
    /// Silent for at least so long. (Of what is not offloaded now, nobody knows.)
    #[arg(long, value_name = "SECONDS")]
    pub(super) idle: Option<u32>,
    /// At least so many bytes forwarded by rules.
    #[arg(long)]
    pub(super) bytes: Option<u64>,
    /// In this order: the oldest, the longest idle, those with most packets or bytes, or the lowest address or port
    /// first. All that fit have to be found before the first is printed; the daemon keeps 32 bytes of each meanwhile
    /// (with --limit, of twice as many at most).
    #[arg(long, value_name = "FIELD", value_parser = PossibleValuesParser::new(SortBy::ALL.iter().map(|s| s.name())))]
    pub(super) sort: Option<String>,
    /// No more than so many.
    #[arg(long, value_name = "N")]
    pub(super) limit: Option<u64>,
    /// Only how many there are.
    #[arg(long, conflicts_with_all = ["sort", "limit", "oneline"])]
    pub(super) count: bool,
    /// Each connection on one line, its slots behind backslashes; with -j one JSON object a line, and no array (JSON
    /// Lines).
    #[arg(short, long)]
    pub(super) oneline: bool,
    /// One connection: its original or its reply tuple.
    pub(super) tuple: Vec<String>,
}

fn prefix(text: &str) -> Result<IpNet, String> {
    let whole = |a: IpAddr| IpNet::from(a);
    let net = text.parse().or_else(|_| text.parse().map(whole));
    net.map_err(|_: std::net::AddrParseError| {
        "an address, or ADDRESS/LENGTH, is wanted (names are not looked up)".into()
    })
}

fn ports(text: &str) -> Result<PortRange, String> {
    let (from, to) = text.split_once('-').unwrap_or((text, text));
    let port = |text: &str| {
        text.parse::<u16>().map_err(|_| format!("'{text}' is no port: a number from 0 to 65535"))
    };
    let range = PortRange { from: port(from)?, to: port(to)? };
    if range.from > range.to {
        return Err("the first port is above the last".into());
    }
    Ok(range)
}

#[derive(Debug, Subcommand)]
pub(super) enum ProviderVerb {
    /// In the order in which they are asked.
    #[command(visible_aliases = ["list", "ls"])]
    Show,
}

/// As the kernel's `dev_valid_name`.
fn netdev_name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > 15 {
        return Err("a netdev's name has 1 to 15 bytes".into());
    }
    if text == "."
        || text == ".."
        || text.contains(|c: char| c == '/' || c == ':' || c.is_whitespace())
    {
        return Err("no netdev can have this name".into());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn names_that_the_kernel_refuses_are_refused() {
        for bad in ["", ".", "..", "a/b", "a b", "a:b", "sixteen-bytes-xx"] {
            assert!(netdev_name(bad).is_err(), "{bad}");
        }
        assert!(netdev_name("fifteen-bytes-x").is_ok());
    }
}
