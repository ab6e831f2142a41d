//! The configuration file (TOML): the one that `--config` names, or `/etc/ctoffload/ctoffload.toml`, if it is there.
//! What is wrong in it is named with its line and key; nothing is started then. `examples/ctoffload.toml` has every option
//! with its default.
//!
//! ```toml
//! [sight]
//! nflog-group = 4919         # 1..=65535: NFLOG group that sights come through
//! ledger-size = 262144       # elements: (netdev, connection, direction)
//! one-way-udp = false        # offload UDP that nobody has answered
//! bridged = false            # also what a bridge forwards without routing it; see below
//! on-ruleset-change = "flush" # or "keep": offloaded connections when nf_tables rules change
//!
//! [revalidate]               # packets that are offloaded do not pass the firewall; see below
//! every = 60                 # 0..=86400 seconds: how long a decision of the firewall may stand where it
//!                            # can change without a word; 0: as long as the connection lives
//! rate = 0                   # connections per second that go back to the slow path when a change
//!                            # concerns all of them; 0: all at once
//!
//! [limits]
//! connections = 1048576
//! queue = 65536              # offers waiting per port, of each thread that sees packets
//!
//! [usage]
//! sweep-seconds = 5          # 1..=3600: while rules carry packets
//! sweep-max-seconds = 20     # while none does, or sweeps take long; default: 4 x sweep-seconds
//!
//! [restart]
//! rules = "adopt"            # or "remove": what a daemon that was killed has left
//!
//! [stop]
//! rules = "flush"            # or "keep": they go on forwarding, and the next start adopts them; see below
//!
//! [control]
//! group = "adm"              # members may read; changes are root's
//!
//! [tc-flower]
//! prio-base = 49408          # 2..=65000: the first of our prios; the one in front of it is ours too
//! writers = 4                # 1..=64: sockets that a port's rules are written through at once;
//!                            # default: one per processor, but not more than 4
//! percpu-stats = false       # true: rules in software count per processor. For flows that several
//!                            # processors forward at once; they take longer to add, and more memory,
//!                            # on many processors much more
//! qdisc = "ingress"          # or "clsact": what is made on a netdev that has neither; see below
//!
//! [nf-flowtable]
//! accounting = true          # switch conntrack's accounting on while a port uses it: its counters
//!
//! [ebpf]
//! mode = "tcx"               # or "xdp"; default: what each netdev can have best, native XDP on NICs
//! max-rules = 262144         # 1..=67108864, of each port
//!
//! [[port]]                   # the first that matches a netdev's name counts
//! match = "eth*"             # *, ?, [abc]
//! # in order; ["none"]: attach without offload; default: the best that the netdev can have, see below
//! providers = ["tc-flower", "ebpf", "nf-flowtable"]
//! offload = "both"           # or "skip-sw" (hardware only), "skip-hw" (software only)
//! capacity = 100000          # rules at most; default: until the NIC says that it is full
//!
//! [admission]                # which of the connections that can be offloaded are to be
//! default = "offload"        # or "never": those that no [[admit]] rule matches
//! min-packets = 20           # only from so many packets on, both directions together; 0: at once
//! min-bytes = 0              # only from so many bytes on, both directions together
//! bypass-egress = ["wan*"]   # netdevs (*, ?, [abc]) whose shapers, filters and programs at egress rules may pass by;
//!                            # default: none
//!
//! [[admit]]                  # the first that matches a connection counts
//! verdict = "never"          # or "offload"
//! netdev = "eth*"            # the port's name; *, ?, [abc]
//! source = ["10.0.0.0/8", "2001:db8::/32"]
//! destination = ["198.51.100.7"]
//! protocol = "tcp"           # or "udp"
//! source-ports = ["1024-65535"]
//! destination-ports = [443, "8000-8999"]
//! zones = [0, "100-199"]
//! ct-mark = "0x10/0xf0"      # the connection's mark: a number, or one with a mask
//! ct-label = "0x2/0x2"       # its labels: that with the number n is bit n
//! mark = 7                   # the packet's mark, as it leaves
//! dscp = ["ef", 8, "16-23"]  # its DSCP, as it leaves
//! ```
//!
//! # Reading it anew
//!
//! At SIGHUP, and at `ctoffload reload` (which is what `systemctl reload` runs), the file is read again. A file that is
//! wrong changes nothing, and is told with its line: in the log, and to who ran `ctoffload reload`. Applied at once: `[[admit]]`, `[admission] default` and
//! `bypass-egress` (all connections are looked at anew: a flush), `on-ruleset-change`, `[revalidate]`, `[usage]`, `[stop]`. `[[port]]` holds for
//! netdevs that come from then on, and for `ctoffload port add`: ports stay what they are bound to. All others
//! are read at the start only: one that says something else is named in the log, and stays as it was.
//!
//! # A stop that keeps the rules
//!
//! With `[stop] rules = "keep"` SIGTERM ends the daemon and leaves its rules forwarding (SIGINT and SIGQUIT do not), as after
//! `kill -9`, but with nothing half done: what was to be removed is removed first, what waited to be made is not made. The
//! next start adopts what is still right (`[restart] rules = "adopt"`, without which this is refused), so that an upgrade
//! of the daemon costs no connection its rule. It is for a stop that a start follows within seconds, because **in between
//! nobody follows what the rules stand on**:
//!
//! * a change of the firewall does not reach connections that have rules, and the next start does not know that there was
//!   one: after a change run `ctoffload flush --all`, or stop with `"flush"`;
//! * a route, a neighbour or a netdev that changes is found at the next start, and not before;
//! * conntrack sees no packet of what rules forward: an entry whose timeout runs out in between goes, and the NAT port that
//!   it had may be given away while the rule stands (UDP: from 30 seconds on; TCP: days, by default).
//!
//! Rules of nf-flowtable, and of ebpf where nothing can be pinned in bpffs, end with the process; they are removed in good
//! order. What is on a port of a bridge or a bond, and all where `[[admit]]` looks at packets (`mark`, `dscp`), is not
//! adopted at the next start but made anew. A daemon that ends because a part of it has ended flushes in any case. To be
//! rid of kept rules: start it once, and stop it by SIGINT (`systemctl kill -s INT ctoffload`).
//!
//! # Providers
//!
//! Without `providers` a port gets what is best on its netdev: the provider whose rules the NIC carries (`tc-flower` is
//! asked first, then `nf-flowtable`; not with `offload = "skip-hw"`); where there is none, `ebpf`, then `tc-flower` in
//! software, then `nf-flowtable`: the first that accepts. A list is asked in its own order, whether in hardware or not.
//! A port keeps what it got for as long as it is one. `ctoffload port show NAME` says what was chosen, and what
//! the others said; `in hardware:` stands before the answers of those that were asked for hardware alone.
//!
//! # The firewall
//!
//! What the firewall has let pass is offloaded, and does not pass it again. With `on-ruleset-change =
//! "flush"` a change of nf_tables takes back what it can concern, **at once**: nobody, when only `input`
//! and `output` chains reach what has changed; the connections with an address that the change names,
//! when it is an element of a set of addresses, or a rule that compares one; all others have all taken
//! back. `rate` is for machines whose slow path cannot take all connections at the same time: the last
//! packet that an unnamed `drop` should have stopped then passes up to (connections / `rate`) seconds
//! later, instead of a fraction of a second.
//!
//! The kernel announces no change of iptables-legacy or ipset, none of the elements that packets add to a
//! set or that time out, and neither limits nor the time of day. Where a chain on the way of forwarded
//! packets has such a thing (the log says what), every offloaded connection goes through the stack again
//! within `every` seconds, a few at a time. Marks and labels of connections are announced, and followed.
//!
//! # The ingress qdisc
//!
//! Rules of tc-flower stand at the ingress hook of a netdev's qdisc `ingress` or `clsact`, of which a netdev has one
//! at most. One that is there is used, and stays. Where there is none, `qdisc` says which is made:
//!
//! | | `ingress` | `clsact` |
//! |---|---|---|
//! | `tc qdisc del … ingress`, `add … ingress` (SQM, wondershaper, FireQOS) | works: theirs is used from then on | both are refused by the kernel |
//! | `tc qdisc replace … ingress`, filters at `parent ffff:` | works | refused |
//! | `tc qdisc replace … clsact`, `del … clsact` | refused | works |
//! | a tool that adds `clsact`, does not mind that there is one, and puts filters at **egress** | they are among those of ingress; the log says so | works |
//!
//! `tc qdisc add` of either kind without a `del` before is refused where there is one already, whichever it is.
//!
//! # Bridges
//!
//! With `bridged = true` connections that a bridge of this machine forwards between two of its ports
//! are offloaded as well, when both ports are reached from ports of the daemon. The kernel tracks what
//! passes a bridge only when it is asked to, and this asks it, for all bridges of the network
//! namespace as long as the daemon runs: **bridge conntrack** (`nf_conntrack_bridge`). It is off by
//! default because it changes what the machine does: conntrack's table holds those connections too,
//! fragments are put together and cut up again, and rules of family `bridge` that say `ct state` begin
//! to match. (If there are such rules already, it is on, and nothing changes.) Without the kernel's
//! part of it the daemon does not start (exit status 5). `ledger-size` counts for routed and for
//! bridged connections each.
//!
//! # Admission
//!
//! A rule matches when all of its fields do; a field that is left out matches everything, a list
//! matches when one of its elements does. Addresses, ports, protocol and zone are those of the
//! connection's original tuple: its first packet, before NAT, whichever direction is sighted. What
//! is not admitted is told by `ctoffload explain` as `not-admitted`, with the rule and its line; it is
//! asked again only after a flush. How many rules a port may have is the port's `capacity`. (The
//! `nf-flowtable` provider takes both directions of a connection at once: there, a rule for one of the
//! two netdevs does not keep the direction of the other on the slow path.)
//!
//! **What the firewall says**: it knows best which connections are worth a rule, and can write that down: `ct mark set`,
//! `ct label set`, `meta mark set`, `ip dscp set`. Marks and labels of connections are tested when a packet is sighted, and
//! again when they change, by a tool as well: rules go at once, and the next packet is looked at anew. A packet's mark and
//! DSCP are those of the packet that is sighted, at the end of postrouting. (Where rules test those, nothing is adopted at a
//! restart: the next packet tells.)
//!
//! `min-packets` leaves connections in software that are over when a rule for them would be there: a
//! question and its answer, a small page. Of a mix of short and long ones the default leaves out next to all of the
//! short, and costs the long ones so many packets. It is conntrack that counts, as for `min-bytes`;
//! but connections that it does not count (older than its counters) are offloaded at once.
//!
//! `min-bytes` counts IP packets with their headers, as conntrack counts them: those that the slow
//! path forwards. A connection is not sighted before the packet that completes the number, by no
//! port. The counters are conntrack's, which are off by default: the daemon says so when it finds them
//! off at its start (the kernel switches them on then, `net.netfilter.nf_conntrack_acct = 1`, and they
//! stay on), and does not start (exit status 5) when they cannot be had. A connection that is older
//! than its counters stays on the slow path as long as it lives: set the sysctl at boot.

//! # Egress
//!
//! A rule in a NIC, and XDP, send past whatever stands where packets leave through the stack: a queueing discipline that
//! shapes or classifies (htb, cake, tbf, prio, netem; not those that only queue, such as fq_codel), filters at egress,
//! programs of tcx; and a rule of any kind passes by what stands at a VLAN device, a bridge or a bond above the netdev that
//! it sends to. Where there is such a thing, a connection is offloaded by a rule that leaves through the stack
//! (`tc-flower` in software, `ebpf` with mode `tcx`), or not at all (`others-at-egress`). `bypass-egress` is for
//! netdevs where what stands there is not meant for forwarded packets, or may be passed by.

mod admit;
#[cfg(test)]
mod example;

use std::num::{NonZeroU16, NonZeroU32, NonZeroUsize};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use netdev_providers::HwFlags;
use netdev_providers::ebpf::{EbpfConfig, Mode};
use netdev_providers::tc_flower::{QdiscKind, TcFlowerConfig};
use serde::Deserialize;
use toml::Spanned;

use self::admit::{RawAdmission, RawAdmit};
use crate::datapath::admission::Admission;
use crate::datapath::{self, OnRulesetChange, PortSpec, Revalidation, SweepBounds, Tunables};

/// Why a configuration was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The text is not TOML, or has a key or type that is not known.
    #[error("{path}, line {line}: {message}")]
    Line {
        /// Which file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
}

/// A configuration whose every value has been checked.
#[derive(Debug)]
pub struct Config {
    /// NFLOG group.
    pub nflog_group: NonZeroU16,
    /// Elements of the ledger.
    pub ledger_size: NonZeroU32,
    /// Offload unanswered UDP.
    pub one_way_udp: bool,
    /// Offload what bridges forward.
    pub bridged: bool,
    /// What happens to offloaded connections when nf_tables rules change.
    pub on_ruleset_change: OnRulesetChange,
    /// How decisions of the firewall are renewed.
    pub revalidation: Revalidation,
    /// Connections kept.
    pub connections: usize,
    /// Offers waiting per port, of each thread that sees packets.
    pub queue: usize,
    /// Seconds between sweeps.
    pub sweep_seconds: u16,
    /// Seconds between sweeps at most.
    pub sweep_max_seconds: u16,
    /// Take over the rules that a daemon which was killed has left.
    pub adopt: bool,
    /// Leave rules in the kernel when the daemon is stopped.
    pub keep_rules: bool,
    /// Who may read besides root.
    pub control_group: Option<String>,
    /// The first of tc-flower's prios.
    pub tc_prio_base: u16,
    /// Through how many sockets tc-flower writes the rules of a port at once, if not the default.
    pub tc_writers: Option<NonZeroUsize>,
    /// Whether tc-flower's rules in software count per processor.
    pub tc_percpu_stats: bool,
    /// Which qdisc tc-flower makes where there is none.
    pub tc_qdisc: QdiscKind,
    /// Which connections may be offloaded.
    pub admission: Admission,
    /// Netdevs whose egress rules may pass by.
    pub bypass_egress: Vec<glob::Pattern>,
    /// From how many packets on.
    pub min_packets: u64,
    /// From how many bytes on.
    pub min_bytes: u64,
    /// How ports of ebpf forward, if not as each can best.
    pub ebpf_mode: Option<Mode>,
    /// How many rules a port of ebpf takes.
    pub ebpf_max_rules: u32,
    /// Whether nf-flowtable switches conntrack's accounting on.
    pub flowtable_accounting: bool,
    ports: Vec<Port>,
}

/// Which netdevs are to become ports, and how.
#[derive(Debug)]
struct Port {
    pattern: glob::Pattern,
    spec: PortSpec,
    /// Of the file; `None`: of the command line.
    line: Option<usize>,
}

/// Where something is wrong, and what.
type Wrong = (Range<usize>, String);

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct Raw {
    sight: RawSight,
    revalidate: RawRevalidate,
    limits: RawLimits,
    usage: RawUsage,
    restart: RawRestart,
    stop: RawStop,
    control: RawControl,
    tc_flower: RawTcFlower,
    nf_flowtable: RawNfFlowtable,
    ebpf: RawEbpf,
    port: Vec<RawPort>,
    admission: RawAdmission,
    admit: Vec<Spanned<RawAdmit>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct RawSight {
    nflog_group: Option<NonZeroU16>,
    ledger_size: Option<Spanned<u32>>,
    one_way_udp: bool,
    bridged: bool,
    on_ruleset_change: RawOnRulesetChange,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct RawRevalidate {
    every: Option<Spanned<u32>>,
    rate: Option<u32>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct RawLimits {
    connections: Option<Spanned<u32>>,
    queue: Option<Spanned<u32>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct RawUsage {
    sweep_seconds: Option<Spanned<u16>>,
    sweep_max_seconds: Option<Spanned<u16>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct RawRestart {
    rules: RawLeftRules,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RawLeftRules {
    #[default]
    Adopt,
    Remove,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct RawStop {
    rules: Option<Spanned<RawStopRules>>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RawStopRules {
    Flush,
    Keep,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct RawControl {
    group: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct RawTcFlower {
    prio_base: Option<Spanned<u16>>,
    writers: Option<Spanned<usize>>,
    percpu_stats: Option<bool>,
    qdisc: RawQdisc,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RawQdisc {
    #[default]
    Ingress,
    Clsact,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct RawNfFlowtable {
    accounting: Option<bool>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct RawEbpf {
    mode: Option<RawMode>,
    max_rules: Option<Spanned<u32>>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RawMode {
    Xdp,
    Tcx,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawPort {
    #[serde(rename = "match")]
    pattern: Spanned<String>,
    providers: Option<Spanned<Vec<String>>>,
    offload: Option<RawOffload>,
    capacity: Option<Spanned<u32>>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RawOnRulesetChange {
    #[default]
    Flush,
    Keep,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RawOffload {
    Both,
    SkipSw,
    SkipHw,
}

/// Reads `both`, `skip-sw`, `skip-hw` (or with `_`), as the CLI passes them on.
#[must_use]
pub fn parse_offload(s: &str) -> Option<HwFlags> {
    match s.replace('_', "-").as_str() {
        "both" => Some(HwFlags::Both),
        "skip-sw" => Some(HwFlags::SkipSw),
        "skip-hw" => Some(HwFlags::SkipHw),
        _ => None,
    }
}

impl Default for Config {
    fn default() -> Self {
        let raw = Raw::default();
        // The defaults are within every range.
        #[expect(clippy::expect_used, reason = "no input is involved")]
        Self::check(raw, &[], |_| 1).expect("the defaults are valid")
    }
}

impl Config {
    /// Reads a file. `classes` are the provider classes that there are.
    ///
    /// # Errors
    /// [`ConfigError`], with the line.
    pub fn read(path: &Path, classes: &[&str]) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, classes).map_err(|(line, message)| ConfigError::Line {
            path: path.to_owned(),
            line,
            message,
        })
    }

    /// Reads a text; an error has its line, counted from 1.
    ///
    /// # Errors
    /// What is wrong, and where.
    pub fn parse(text: &str, classes: &[&str]) -> Result<Self, (usize, String)> {
        let line = |at: usize| text.as_bytes().iter().take(at).filter(|b| **b == b'\n').count() + 1;
        let wrong = |at: usize, message: String| match key_at(text, at) {
            Some(key) if !message.contains(key) => (line(at), format!("{key}: {message}")),
            _ => (line(at), message),
        };
        let raw: Raw = toml::from_str(text)
            .map_err(|e| wrong(e.span().map_or(0, |s| s.start), e.message().replace('\n', " ")))?;
        Self::check(raw, classes, line).map_err(|(span, message)| wrong(span.start, message))
    }

    /// Adds patterns whose netdevs are attached with all defaults.
    ///
    /// # Errors
    /// The pattern that is none.
    pub fn with_patterns(
        mut self,
        patterns: &[String],
    ) -> Result<Self, (String, glob::PatternError)> {
        for pattern in patterns {
            let glob = glob::Pattern::new(pattern).map_err(|e| (pattern.clone(), e))?;
            let spec = PortSpec { providers: None, hw_flags: HwFlags::Both, capacity: None };
            self.ports.push(Port { pattern: glob, spec, line: None });
        }
        Ok(self)
    }

    /// What can be changed while the daemon runs.
    #[must_use]
    pub fn tunables(&self) -> Tunables {
        Tunables {
            admission: self.admission.clone(),
            bypass_egress: self.bypass_egress.clone(),
            on_ruleset_change: self.on_ruleset_change,
            revalidation: self.revalidation,
            sweeps: SweepBounds {
                busy: Duration::from_secs(self.sweep_seconds.into()),
                max: Duration::from_secs(self.sweep_max_seconds.into()),
            },
        }
    }

    /// The keys that are read at the start only, and say something else there.
    #[must_use]
    pub fn fixed_keys_that_differ(&self, other: &Self) -> Vec<&'static str> {
        let differ = [
            ("[sight] nflog-group", self.nflog_group != other.nflog_group),
            ("[sight] ledger-size", self.ledger_size != other.ledger_size),
            ("[sight] one-way-udp", self.one_way_udp != other.one_way_udp),
            ("[sight] bridged", self.bridged != other.bridged),
            ("[limits] connections", self.connections != other.connections),
            ("[limits] queue", self.queue != other.queue),
            ("[restart] rules", self.adopt != other.adopt),
            ("[control] group", self.control_group != other.control_group),
            ("[tc-flower] prio-base", self.tc_prio_base != other.tc_prio_base),
            ("[tc-flower] writers", self.tc_writers != other.tc_writers),
            ("[tc-flower] percpu-stats", self.tc_percpu_stats != other.tc_percpu_stats),
            ("[tc-flower] qdisc", self.tc_qdisc != other.tc_qdisc),
            ("[ebpf] mode", self.ebpf_mode != other.ebpf_mode),
            ("[ebpf] max-rules", self.ebpf_max_rules != other.ebpf_max_rules),
            ("[nf-flowtable] accounting", self.flowtable_accounting != other.flowtable_accounting),
            ("[admission] min-packets", self.min_packets != other.min_packets),
            ("[admission] min-bytes", self.min_bytes != other.min_bytes),
        ];
        differ.into_iter().filter_map(|(key, differs)| differs.then_some(key)).collect()
    }

    /// Whether netdevs would be attached in another way.
    #[must_use]
    pub fn has_other_ports(&self, other: &Self) -> bool {
        let same = |(a, b): (&Port, &Port)| a.pattern == b.pattern && a.spec == b.spec;
        self.ports.len() != other.ports.len() || !self.ports.iter().zip(&other.ports).all(same)
    }

    /// Whether any netdev is to become a port by itself.
    #[must_use]
    pub fn has_ports(&self) -> bool {
        !self.ports.is_empty()
    }

    /// How many patterns of netdevs there are.
    #[must_use]
    pub fn port_count(&self) -> usize {
        self.ports.len()
    }

    /// The patterns of netdevs that match none of these names, in words: with their lines, or as on the command line.
    #[must_use]
    pub fn unmatched(&self, names: &[String]) -> Vec<String> {
        let none = |port: &&Port| !names.iter().any(|name| port.pattern.matches(name));
        let words = |port: &Port| match port.line {
            Some(line) => format!("[[port]] match = \"{}\" (line {line})", port.pattern),
            None => format!("--port {}", port.pattern),
        };
        self.ports.iter().filter(none).map(words).collect()
    }

    /// How a netdev of this name is to be attached, if at all.
    #[must_use]
    pub fn port(&self, name: &str) -> Option<PortSpec> {
        self.ports.iter().find(|p| p.pattern.matches(name)).map(|p| p.spec.clone())
    }

    fn check(raw: Raw, classes: &[&str], line: impl Fn(usize) -> usize) -> Result<Self, Wrong> {
        fn ranged<T: Copy + PartialOrd + std::fmt::Display>(
            value: Option<Spanned<T>>,
            default: T,
            range: std::ops::RangeInclusive<T>,
            name: &str,
        ) -> Result<T, Wrong> {
            let Some(value) = value else { return Ok(default) };
            if range.contains(value.get_ref()) {
                return Ok(*value.get_ref());
            }
            let message = format!("{name} must be from {} to {}", range.start(), range.end());
            Err((value.span(), message))
        }
        let mut ports = Vec::with_capacity(raw.port.len());
        for port in raw.port {
            let at = Some(line(port.pattern.span().start));
            let pattern = pattern(&port.pattern)?;
            if let Some(names) = &port.providers {
                check_providers(names, classes)?;
            }
            let hw_flags = match port.offload {
                None | Some(RawOffload::Both) => HwFlags::Both,
                Some(RawOffload::SkipSw) => HwFlags::SkipSw,
                Some(RawOffload::SkipHw) => HwFlags::SkipHw,
            };
            let providers = port.providers.map(Spanned::into_inner);
            let capacity = port.capacity.map(|c| ranged(Some(c), 1, 1..=100_000_000, "capacity"));
            let capacity = capacity.transpose()?;
            let spec = PortSpec { providers, hw_flags, capacity };
            ports.push(Port { pattern, spec, line: at });
        }
        let sweep_seconds = ranged(raw.usage.sweep_seconds, 5, 1..=3600, "sweep-seconds")?;
        let ledger_size = ranged(raw.sight.ledger_size, 262_144, 16..=16_777_216, "ledger-size")?;
        let prio_base = TcFlowerConfig::default().prio_base;
        let prio_base = ranged(raw.tc_flower.prio_base, prio_base, 2..=65_000, "prio-base")?;
        let writers = raw.tc_flower.writers.map(|n| ranged(Some(n), 1, 1..=64, "writers"));
        let adopt = matches!(raw.restart.rules, RawLeftRules::Adopt);
        let keep = raw.stop.rules.filter(|rules| matches!(rules.get_ref(), RawStopRules::Keep));
        if let Some(keep) = &keep
            && !adopt
        {
            let why = "[stop] rules = \"keep\" is for a next start that adopts them, and [restart] rules is \"remove\"";
            return Err((keep.span(), why.to_owned()));
        }
        Ok(Self {
            nflog_group: raw.sight.nflog_group.unwrap_or(DEFAULT_GROUP),
            ledger_size: NonZeroU32::new(ledger_size).unwrap_or(NonZeroU32::MIN),
            one_way_udp: raw.sight.one_way_udp,
            bridged: raw.sight.bridged,
            on_ruleset_change: match raw.sight.on_ruleset_change {
                RawOnRulesetChange::Flush => OnRulesetChange::Flush,
                RawOnRulesetChange::Keep => OnRulesetChange::Keep,
            },
            revalidation: Revalidation {
                every: Duration::from_secs(
                    ranged(raw.revalidate.every, 60, 0..=86_400, "every")?.into(),
                ),
                rate: raw.revalidate.rate.filter(|rate| *rate > 0),
            },
            connections: ranged(raw.limits.connections, 1 << 20, 1..=100_000_000, "connections")?
                as usize,
            queue: ranged(raw.limits.queue, 1 << 16, 1..=10_000_000, "queue")? as usize,
            sweep_seconds,
            sweep_max_seconds: ranged(
                raw.usage.sweep_max_seconds,
                sweep_seconds.saturating_mul(4),
                sweep_seconds..=3600,
                "sweep-max-seconds",
            )?,
            adopt,
            keep_rules: keep.is_some(),
            control_group: raw.control.group,
            admission: admit::check(&raw.admission, raw.admit, line)?,
            bypass_egress: raw
                .admission
                .bypass_egress
                .iter()
                .map(pattern)
                .collect::<Result<_, _>>()?,
            min_packets: raw.admission.min_packets.unwrap_or(datapath::MIN_PACKETS),
            min_bytes: raw.admission.min_bytes,
            ebpf_mode: raw.ebpf.mode.map(|mode| match mode {
                RawMode::Xdp => Mode::Xdp,
                RawMode::Tcx => Mode::Tcx,
            }),
            ebpf_max_rules: ranged(
                raw.ebpf.max_rules,
                EbpfConfig::default().max_rules,
                1..=1 << 26,
                "max-rules",
            )?,
            flowtable_accounting: raw.nf_flowtable.accounting.unwrap_or(true),
            tc_prio_base: prio_base,
            tc_writers: writers.transpose()?.and_then(NonZeroUsize::new),
            tc_percpu_stats: raw.tc_flower.percpu_stats.unwrap_or(false),
            tc_qdisc: match raw.tc_flower.qdisc {
                RawQdisc::Ingress => QdiscKind::Ingress,
                RawQdisc::Clsact => QdiscKind::Clsact,
            },
            ports,
        })
    }
}

/// 0x1337 is nobody's default; ulogd and friends use small numbers.
const DEFAULT_GROUP: NonZeroU16 = NonZeroU16::new(4919).unwrap();

/// The key whose value this place of the file is in: on its line, or the last one before it in the same table (a list
/// may have many lines).
fn key_at(text: &str, at: usize) -> Option<&str> {
    let end =
        text.as_bytes().iter().skip(at).position(|b| *b == b'\n').map_or(text.len(), |n| at + n);
    for line in text.get(..end)?.lines().rev() {
        let line = line.trim_start();
        if line.starts_with("[[")
            || (line.starts_with('[')
                && line.trim_end().ends_with(']')
                && !line.contains(['"', ',']))
        {
            return None;
        }
        if let Some((key, _)) = line.split_once('=') {
            let key = key.trim_end();
            let bare = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            if !key.is_empty() && key.chars().all(bare) {
                return Some(key);
            }
        }
    }
    None
}

fn pattern(text: &Spanned<String>) -> Result<glob::Pattern, Wrong> {
    glob::Pattern::new(text.get_ref())
        .map_err(|e| (text.span(), format!("'{}': {}", text.get_ref(), e.msg)))
}

fn check_providers(names: &Spanned<Vec<String>>, classes: &[&str]) -> Result<(), Wrong> {
    let list = names.get_ref();
    if list.is_empty() {
        return Err((names.span(), "providers is empty: say [\"none\"] for no offload".to_owned()));
    }
    if list.iter().any(|n| n == "none") && list.len() > 1 {
        return Err((names.span(), "\"none\" stands alone".to_owned()));
    }
    match list.iter().find(|n| *n != "none" && !classes.contains(&n.as_str())) {
        Some(unknown) => {
            let message = format!(
                "there is no provider class '{unknown}' (there are: {}, none)",
                classes.join(", ")
            );
            Err((names.span(), message))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLASSES: &[&str] = &crate::daemon::CLASSES;

    fn error(text: &str) -> (usize, String) {
        Config::parse(text, CLASSES).unwrap_err()
    }

    #[test]
    fn keys_that_are_read_at_the_start_only_are_named_when_they_differ() {
        let of = |text: &str| Config::parse(text, &["tc-flower"]).unwrap();
        let started = of("");
        for (text, key) in [
            ("[sight]\nnflog-group = 7", "[sight] nflog-group"),
            ("[sight]\nledger-size = 1000", "[sight] ledger-size"),
            ("[sight]\none-way-udp = true", "[sight] one-way-udp"),
            ("[sight]\nbridged = true", "[sight] bridged"),
            ("[limits]\nconnections = 7", "[limits] connections"),
            ("[limits]\nqueue = 7", "[limits] queue"),
            ("[restart]\nrules = \"remove\"", "[restart] rules"),
            ("[control]\ngroup = \"adm\"", "[control] group"),
            ("[tc-flower]\nprio-base = 7", "[tc-flower] prio-base"),
            ("[tc-flower]\nwriters = 7", "[tc-flower] writers"),
            ("[tc-flower]\npercpu-stats = true", "[tc-flower] percpu-stats"),
            ("[tc-flower]\nqdisc = \"clsact\"", "[tc-flower] qdisc"),
            ("[ebpf]\nmode = \"xdp\"", "[ebpf] mode"),
            ("[ebpf]\nmax-rules = 7", "[ebpf] max-rules"),
            ("[nf-flowtable]\naccounting = false", "[nf-flowtable] accounting"),
            ("[admission]\nmin-packets = 7", "[admission] min-packets"),
            ("[admission]\nmin-bytes = 7", "[admission] min-bytes"),
        ] {
            let new = of(text);
            assert_eq!(started.fixed_keys_that_differ(&new), [key], "{text}");
            assert_eq!(new.fixed_keys_that_differ(&new), <[&str; 0]>::default());
            assert_eq!(started.tunables(), new.tunables(), "{text}");
        }
        for text in [
            "[sight]\non-ruleset-change = \"keep\"",
            "[revalidate]\nevery = 7",
            "[revalidate]\nrate = 7",
            "[usage]\nsweep-seconds = 7",
            "[usage]\nsweep-max-seconds = 7",
            "[admission]\ndefault = \"never\"",
            "[[admit]]\nverdict = \"never\"",
        ] {
            let new = of(text);
            assert_eq!(started.fixed_keys_that_differ(&new), <[&str; 0]>::default(), "{text}");
            assert!(
                started.tunables() != new.tunables() && !started.has_other_ports(&new),
                "{text}"
            );
        }
        assert!(started.has_other_ports(&of("[[port]]\nmatch = \"eth*\"")));
        let keep = of("[stop]\nrules = \"keep\"");
        assert_eq!(started.fixed_keys_that_differ(&keep), <[&str; 0]>::default());
        assert!((started.keep_rules, keep.keep_rules) == (false, true), "asked at the stop");
    }

    #[test]
    fn an_empty_file_is_the_defaults_and_attaches_nothing() {
        let c = Config::parse("", CLASSES).unwrap();
        assert_eq!((c.sweep_seconds, c.sweep_max_seconds), (5, 20));
        assert_eq!(c.on_ruleset_change, OnRulesetChange::Flush);
        assert_eq!(c.revalidation, Revalidation::default());
        assert_eq!(c.port("eth0"), None);
        assert!(!c.tc_percpu_stats, "quick to add");
        assert_eq!(c.tc_qdisc, QdiscKind::Ingress, "what shapers can replace");
        assert!(!c.bridged, "bridge conntrack stays off unless it is asked for");
    }

    #[test]
    fn the_first_pattern_that_matches_counts() {
        let c = Config::parse(
            "[[port]]\nmatch = \"wan2\"\nproviders = [\"none\"]\n[[port]]\nmatch = \"wan*\"\noffload = \"skip-hw\"\n",
            CLASSES,
        )
        .unwrap();
        assert_eq!(c.port("wan2").unwrap().providers, Some(vec!["none".to_owned()]));
        assert_eq!(c.port("wan").unwrap().hw_flags, HwFlags::SkipHw);
        assert_eq!(c.port("lan"), None);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let (line, message) = error("[sight]\n\nledger-size = 3\n");
        assert_eq!(line, 3);
        assert!(message.contains("16777216"), "{message}");
        let (line, message) = error("[usage]\nsweep-second = 3\n");
        assert_eq!(line, 2);
        assert!(message.contains("sweep-second"), "{message}");
        let (line, message) = error("[[port]]\nmatch = \"a*\"\nproviders = [\"tc-flour\"]\n");
        assert_eq!(line, 3);
        assert!(message.contains("tc-flour") && message.contains("tc-flower"), "{message}");
        assert_eq!(error("[usage]\nsweep-seconds = 9\nsweep-max-seconds = 8\n").0, 3);
        assert_eq!(error("[[port]]\nmatch = \"a[\"\n").0, 2);
        assert_eq!(error("[[port]]\nmatch = \"a\"\noffload = \"hw\"\n").0, 3);
        assert_eq!(error("[sight]\nbridged = 1\n").0, 2);
        assert_eq!(error("[revalidate]\nrate = 7\nevery = 86401\n").0, 3);
        assert_eq!(error("\n\n= 3\n").0, 3);
        assert_eq!(error("[[port]]\nmatch = \"a\"\ncapacity = 0\n").0, 3);
        assert_eq!(error("[tc-flower]\nprio-base = 0\n").0, 2);
        assert_eq!(error("[tc-flower]\nwriters = 65\n").0, 2);
        assert_eq!(error("[ebpf]\nmax-rules = 0\n").0, 2);
        assert_eq!(error("[ebpf]\nmode = \"generic\"\n").0, 2);
        assert_eq!(error("[tc-flower]\npercpu-stats = 0\n").0, 2);
        assert_eq!(error("[tc-flower]\n\nqdisc = \"egress\"\n").0, 3);
        assert_eq!(error("[stop]\nrules = \"leave\"\n").0, 2);
        let (line, message) = error("[restart]\nrules = \"remove\"\n[stop]\n\nrules = \"keep\"\n");
        assert!(line == 5 && message.contains("[restart] rules"), "{line}: {message}");
    }

    #[test]
    fn what_is_wrong_is_named_with_its_key() {
        for (text, key) in [
            ("[limits]\nqueue = \"100\"\n", "queue: "),
            ("[[port]]\nmatch = \"a[\"\n", "match: "),
            ("[sight]\nbridged = 1\n", "bridged: "),
            ("[[admit]]\nverdict = \"never\"\nsource = [\n\"10.0.0.0/8\",\n\"x\"]\n", "source: "),
            ("[limits]\nqueue = 7\nqueue 8\n", ""),
        ] {
            let (_, message) = error(text);
            assert!(message.starts_with(key), "{text}: {message}");
        }
        // What names it already does not name it twice, and a table has no key.
        assert!(error("[limits]\nqueue = 0\n").1.starts_with("queue must be"));
        assert!(!error("[limits]\nqueue = 7\n[[admit]]\n").1.contains("queue"));
    }

    #[test]
    fn patterns_that_match_no_netdev_are_named_with_their_lines() {
        let text = "[[port]]\nmatch = \"eth*\"\n\n[[port]]\nmatch = \"enp*\"\n";
        let c = Config::parse(text, CLASSES).unwrap().with_patterns(&["w?n".to_owned()]).unwrap();
        let of = |names: &[&str]| {
            c.unmatched(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(of(&["lo", "enp1s0", "wan"]), ["[[port]] match = \"eth*\" (line 2)"]);
        assert_eq!(of(&["lo"]).len(), c.port_count());
        assert!(of(&["lo"]).contains(&"--port w?n".to_owned()), "{:?}", of(&["lo"]));
        // A line more is no other port.
        let moved = Config::parse(&format!("\n{text}"), CLASSES).unwrap();
        assert!(!Config::parse(text, CLASSES).unwrap().has_other_ports(&moved));
    }

    #[test]
    fn the_example_in_the_docs_is_valid() {
        let text: String = include_str!("config.rs")
            .lines()
            .skip_while(|l| *l != "//! ```toml")
            .skip(1)
            .take_while(|l| *l != "//! ```")
            .map(|l| format!("{}\n", l.trim_start_matches("//!")))
            .collect();
        let c = Config::parse(&text, CLASSES).unwrap();
        assert!(c.port("eth7").is_some());
    }
}
