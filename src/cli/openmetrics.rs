//! Counters in the OpenMetrics text format 1.0, as Prometheus scrapes it, or the textfile collector of its node_exporter
//! reads it.
//!
//! By hand: the `prometheus-client` crate writes what its own process counts, and each histogram with a sum; the daemon
//! counts how many operations took how long, and has no sum of their times.

use std::fmt::{Display, Write as _};

use netdev_providers::Reason;

use crate::control::info::{LatencyCount, PortInfo, ReasonCount, Stats};

/// Bounds of the histograms: 1 us, 2 us, ... 4 s, all that the daemon tells apart.
const BOUNDS: u32 = 23;

/// Which states a port can be in.
const STATES: [&str; 5] = ["bound", "unbound", "draining", "slow", "faulty"];

/// The type of a metric family.
#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
    Info,
    StateSet,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
            Self::Info => "info",
            Self::StateSet => "stateset",
        }
    }

    /// What the name of a sample ends with.
    const fn suffix(self) -> &'static str {
        match self {
            Self::Counter => "_total",
            Self::Info => "_info",
            Self::Gauge | Self::Histogram | Self::StateSet => "",
        }
    }
}

type Labels<'a> = &'a [(&'a str, &'a str)];

/// Metrics with one name; the samples follow.
struct Family<'a> {
    out: &'a mut String,
    name: &'static str,
    kind: Kind,
}

impl<'a> Family<'a> {
    /// `name` ends with the unit where there is one; `help` without a final dot, and nothing in it that wants to be
    /// escaped.
    fn new(out: &'a mut String, name: &'static str, kind: Kind, help: &str) -> Self {
        let _ = writeln!(out, "# TYPE ctoffload_{name} {}", kind.name());
        for unit in ["seconds", "bytes"] {
            if name.ends_with(unit) {
                let _ = writeln!(out, "# UNIT ctoffload_{name} {unit}");
            }
        }
        let _ = writeln!(out, "# HELP ctoffload_{name} {help}.");
        Self { out, name, kind }
    }

    fn sample(&mut self, labels: Labels<'_>, value: impl Display) -> &mut Self {
        self.named(self.kind.suffix(), labels, value)
    }

    fn named(&mut self, suffix: &str, labels: Labels<'_>, value: impl Display) -> &mut Self {
        let _ = write!(self.out, "ctoffload_{}{suffix}", self.name);
        for (n, (label, value)) in labels.iter().enumerate() {
            let before = if n == 0 { '{' } else { ',' };
            let _ = write!(self.out, "{before}{label}=\"");
            for c in value.chars() {
                match c {
                    '\\' => self.out.push_str("\\\\"),
                    '"' => self.out.push_str("\\\""),
                    '\n' => self.out.push_str("\\n"),
                    c => self.out.push(c),
                }
            }
            self.out.push('"');
        }
        let _ = writeln!(self.out, "{} {value}", if labels.is_empty() { "" } else { "}" });
        self
    }

    /// Buckets count all that took no longer.
    fn buckets(&mut self, netdev: &str, provider: &str, op: &str, all: &[LatencyCount]) {
        let of_op = || all.iter().filter(|b| b.op == op);
        for n in 0..BOUNDS {
            let bound = 1u64 << n;
            let below = of_op().filter(|b| b.below_us.is_some_and(|us| us <= bound));
            let count: u64 = below.map(|b| b.count).sum();
            let le = format!("{}.{:06}", bound / 1_000_000, bound % 1_000_000);
            let labels = [("netdev", netdev), ("provider", provider), ("op", op), ("le", &le)];
            self.named("_bucket", &labels, count);
        }
        let count: u64 = of_op().map(|b| b.count).sum();
        let labels = [("netdev", netdev), ("provider", provider), ("op", op), ("le", "+Inf")];
        self.named("_bucket", &labels, count);
    }
}

/// Seconds, as the daemon has milliseconds.
fn seconds(ms: u64) -> String {
    format!("{}.{:03}", ms / 1000, ms % 1000)
}

fn count_of(reasons: &[ReasonCount], reason: &str) -> u64 {
    reasons.iter().filter(|r| r.reason == reason).map(|r| r.count).sum()
}

/// All of both.
pub(super) fn metrics(out: &mut String, stats: &Stats, ports: &[PortInfo]) {
    engine(out, stats);
    of_ports(out, ports);
    out.push_str("# EOF\n");
}

fn engine(out: &mut String, s: &Stats) {
    use Kind::{Counter, Gauge, Info};
    let instance = format!("{:08x}", s.instance);
    Family::new(out, "daemon", Info, "The number in the cookies of this daemon's rules")
        .sample(&[("instance", &instance)], 1);
    Family::new(out, "uptime_seconds", Gauge, "How long the daemon has run")
        .sample(&[], seconds(s.uptime_ms));
    Family::new(out, "connections", Gauge, "Connections that the engine knows")
        .sample(&[], s.connections);
    Family::new(out, "slots", Gauge, "Directions of connections on ports, by state")
        .sample(&[("state", "installed")], s.slots_installed)
        .sample(&[("state", "pending")], s.slots_pending)
        .sample(&[("state", "rejected")], s.slots_rejected);
    for (name, help, value) in [
        ("sights", "Sights received", s.sights),
        (
            "sights_lost",
            "Sights lost on the way, and found again through the ledger",
            s.sights_lost,
        ),
        ("conntrack_events", "Events of conntrack received", s.conntrack_events),
        ("conntrack_events_lost", "Events of conntrack lost", s.conntrack_lost),
        ("sweeps", "Sweeps over the counters of all rules", s.sweeps),
        ("rules_added", "Rules installed, on all ports that there have ever been", s.adds),
        (
            "rules_deleted",
            "Rules that went one by one, on all ports that there have ever been",
            s.deletes,
        ),
        (
            "rules_flushed",
            "Rules that went with everything that their port had, on all ports that there have ever been",
            s.flushed,
        ),
    ] {
        Family::new(out, name, Counter, help).sample(&[], value);
    }
    for (name, help, value) in [
        ("ledger_elements", "Elements of the kernel's ledger of sights", s.ledger_elements),
        ("ledger_size", "Elements that the ledger can hold; a full one is blind", s.ledger_size),
    ] {
        Family::new(out, name, Gauge, help).sample(&[], value);
    }
    Family::new(out, "last_sweep_seconds", Gauge, "How long the last sweep took")
        .sample(&[], seconds(s.last_sweep_ms));
    Family::new(
        out,
        "sweep_pause_seconds",
        Gauge,
        "How long after the last sweep the next one comes",
    )
    .sample(&[], seconds(s.sweep_pause_ms));
    // Those that have not been counted yet, too: a counter that begins with one has never risen.
    let mut family = Family::new(
        out,
        "rejections",
        Counter,
        "Offers rejected, on all ports that there have ever been",
    );
    for reason in Reason::ALL {
        family.sample(&[("reason", reason.name())], count_of(&s.reasons, reason.name()));
    }
}

fn of_ports(out: &mut String, ports: &[PortInfo]) {
    use Kind::{Counter, Gauge, Histogram, StateSet};
    let provider = |p: &PortInfo| p.provider.clone().unwrap_or_else(|| "none".to_owned());
    let mut family = Family::new(out, "port_state", StateSet, "What state a port is in");
    for p in ports {
        for state in STATES {
            let provider = provider(p);
            let labels =
                [("netdev", &*p.name), ("provider", &provider), ("ctoffload_port_state", state)];
            family.sample(&labels, u8::from(p.state == state));
        }
    }
    let mut family =
        Family::new(out, "port_slots", Gauge, "Directions of connections on a port, by state");
    for p in ports {
        for (state, value) in
            [("installed", p.installed), ("pending", p.pending), ("rejected", p.rejected)]
        {
            let provider = provider(p);
            family.sample(&[("netdev", &p.name), ("provider", &provider), ("state", state)], value);
        }
    }
    type Of = fn(&PortInfo) -> Option<u64>;
    let each: [(&'static str, Kind, &str, Of); 13] = [
        ("port_rules_in_hardware", Gauge, "Rules that the NIC has taken", |p| Some(p.in_hw)),
        ("port_rules_capacity", Gauge, "Rules that there may be, where there is a limit", |p| {
            p.capacity
        }),
        ("port_rules_undeleted", Gauge, "Rules that could not be deleted so far", |p| {
            Some(p.undeleted)
        }),
        ("port_refusals", Gauge, "Classes that were asked and did not bind the port", |p| {
            Some(p.refusals.len() as u64)
        }),
        (
            "port_others_in_front",
            Gauge,
            "Filters and programs of others in front of its rules",
            |p| Some(p.in_front.len() as u64),
        ),
        ("port_evictions", Counter, "Rules that gave way to those of busier connections", |p| {
            Some(p.evictions)
        }),
        ("port_sights", Counter, "First packets of a direction of a connection", |p| {
            Some(p.sights)
        }),
        ("port_rules_added", Counter, "Rules installed", |p| Some(p.adds)),
        ("port_rules_deleted", Counter, "Rules that went one by one", |p| Some(p.deletes)),
        ("port_rules_flushed", Counter, "Rules that went with everything that the port had", |p| {
            Some(p.flushed)
        }),
        (
            "port_forwarded_packets",
            Counter,
            "Packets forwarded by rules, as of the last sweep",
            |p| Some(p.packets),
        ),
        ("port_forwarded_bytes", Counter, "Bytes forwarded by rules, as of the last sweep", |p| {
            Some(p.bytes)
        }),
        (
            "port_capacity_learnt",
            Gauge,
            "The limit was not configured: the provider said that it is full",
            |p| Some(p.capacity_learnt.into()),
        ),
    ];
    for (name, kind, help, of) in each {
        let mut family = Family::new(out, name, kind, help);
        for p in ports {
            if let Some(value) = of(p) {
                family.sample(&[("netdev", &p.name), ("provider", &provider(p))], value);
            }
        }
    }
    let mut family = Family::new(out, "port_rejections", Counter, "Offers rejected");
    for p in ports {
        for r in &p.reasons {
            let provider = provider(p);
            family.sample(
                &[("netdev", &p.name), ("provider", &provider), ("reason", &r.reason)],
                r.count,
            );
        }
    }
    let mut family = Family::new(
        out,
        "port_operation_duration_seconds",
        Histogram,
        "How long the provider took for operations: bounds are not included",
    );
    for p in ports {
        for op in ["add", "delete"] {
            family.buckets(&p.name, &provider(p), op, &p.latency);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped_and_times_are_seconds() {
        let mut out = String::new();
        Family::new(&mut out, "x_seconds", Kind::Gauge, "How long")
            .sample(&[("netdev", "a\"b\\c\nd"), ("op", "é")], seconds(61_007));
        assert_eq!(
            out,
            "# TYPE ctoffload_x_seconds gauge\n# UNIT ctoffload_x_seconds seconds\n# HELP ctoffload_x_seconds How long.\nctoffload_x_seconds{netdev=\"a\\\"b\\\\c\\nd\",op=\"é\"} 61.007\n"
        );
    }

    #[test]
    fn buckets_count_all_that_took_no_longer() {
        let bucket = |below_us, count| LatencyCount { op: "add".into(), below_us, count };
        let port = PortInfo {
            name: "e".into(),
            latency: vec![bucket(Some(1), 1), bucket(Some(64), 10), bucket(None, 100)],
            ..PortInfo::default()
        };
        let mut out = String::new();
        metrics(&mut out, &Stats::default(), &[port]);
        let count = |op: &str, le: &str| {
            let begin = format!(
                "ctoffload_port_operation_duration_seconds_bucket{{netdev=\"e\",provider=\"none\",op=\"{op}\",le=\"{le}\"}} "
            );
            out.lines().find_map(|l| l.strip_prefix(&begin)).map(str::to_owned)
        };
        let bounds = ["0.000001", "0.000032", "0.000064", "4.194304", "+Inf"];
        let counts = |op| bounds.map(|le| count(op, le).unwrap().parse::<u64>().unwrap());
        assert_eq!(counts("add"), [1, 1, 11, 11, 111]);
        assert_eq!(counts("delete"), [0; 5]);
        assert!(out.ends_with("\n# EOF\n"));
    }
}
