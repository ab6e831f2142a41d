//! What people read. Everything in `-j` is here too, with `-s` at the latest.

use std::fmt::Write as _;

use crate::control::info::{
    CapabilityInfo, ConnInfo, Event, Flushed, LatencyCount, LintInfo, PortInfo, PortReconciled,
    ProviderInfo, ReasonCount, Reloaded, SlotInfo, Stats,
};

/// Where the text of a column goes.
#[derive(Clone, Copy)]
enum Align {
    Left,
    Right,
}

/// Appends rows with their columns under each other, two blanks apart, none at line ends.
fn table(out: &mut String, indent: &str, align: &[Align], rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width: Vec<usize> = (0..columns)
        .map(|c| rows.iter().filter_map(|r| r.get(c)).map(|t| t.chars().count()).max().unwrap_or(0))
        .collect();
    for row in rows {
        let mut line = String::from(indent);
        for (c, cell) in row.iter().enumerate() {
            // A column that is empty in every row takes no room.
            if width[c] == 0 {
                continue;
            }
            let pad = " ".repeat(width[c] - cell.chars().count());
            match align.get(c) {
                Some(Align::Right) => line.extend([pad.as_str(), cell, "  "]),
                _ => line.extend([cell, pad.as_str(), "  "]),
            }
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
}

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

/// `1234 ms` as people say it.
pub(super) fn duration(ms: u64) -> String {
    let s = ms / 1000;
    match ms {
        0..1000 => format!("{ms}ms"),
        1000..60_000 => format!("{s}.{}s", ms % 1000 / 100),
        60_000..3_600_000 => format!("{}m{:02}s", s / 60, s % 60),
        3_600_000..86_400_000 => format!("{}h{:02}m", s / 3600, s / 60 % 60),
        _ => format!("{}d{:02}h", s / 86_400, s / 3600 % 24),
    }
}

/// Decimal units, one digit after the point.
pub(super) fn bytes(n: u64) -> String {
    let mut unit = 1u64;
    let mut name = "B";
    for next in ["kB", "MB", "GB", "TB", "PB"] {
        if n / unit < 1000 {
            break;
        }
        unit *= 1000;
        name = next;
    }
    if unit == 1 {
        format!("{n} B")
    } else {
        format!("{}.{} {name}", n / unit, n % unit * 10 / unit)
    }
}

pub(super) fn count(n: u64, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

fn reasons(all: &[ReasonCount]) -> String {
    all.iter().map(|r| format!("{} {}", r.reason, r.count)).collect::<Vec<_>>().join(", ")
}

pub(super) fn ports(out: &mut String, ports: &[PortInfo], detail: bool) {
    if detail {
        ports.iter().for_each(|p| port(out, p));
        return;
    }
    let mut rows = vec![row([
        "PORT",
        "IFINDEX",
        "STATE",
        "PROVIDER",
        "OFFLOAD",
        "INSTALLED",
        "IN-HW",
        "PENDING",
        "REJECTED",
    ])];
    rows.extend(ports.iter().map(|p| {
        vec![
            p.name.clone(),
            p.ifindex.to_string(),
            p.state.clone(),
            p.provider.clone().unwrap_or_else(|| "-".into()),
            p.offload.clone(),
            p.installed.to_string(),
            p.in_hw.to_string(),
            p.pending.to_string(),
            p.rejected.to_string(),
        ]
    }));
    use Align::{Left, Right};
    table(out, "", &[Left, Right, Left, Left, Left, Right, Right, Right, Right], &rows);
    // What is wrong does not wait for somebody to ask for detail.
    for p in ports {
        if let Some(fault) = &p.fault {
            let _ = writeln!(out, "{}: faulty: {fault}", p.name);
        }
        if let Some(slow) = &p.slow {
            let _ = writeln!(out, "{}: {slow}", p.name);
        }
        if p.undeleted > 0 {
            let _ =
                writeln!(out, "{}: {} to be deleted", p.name, count(p.undeleted, "rule", "rules"));
        }
        if !p.in_front.is_empty() {
            let _ = writeln!(out, "{}: in front of its rules: {}", p.name, p.in_front.join("; "));
        }
        if p.provider.is_none() {
            for r in &p.refusals {
                let _ = writeln!(out, "{}: {} declined: {}", p.name, r.class, r.why);
            }
        }
    }
}

fn port(out: &mut String, p: &PortInfo) {
    let _ = write!(out, "{}: {}", p.name, p.state);
    if let Some(provider) = &p.provider {
        let _ = write!(out, ", provider {provider}");
    }
    let _ = writeln!(
        out,
        ", offload {}, ifindex {}, generation {}",
        p.offload, p.ifindex, p.generation
    );
    let mut line = |name: &str, text: &str| {
        if !text.is_empty() {
            let _ = writeln!(out, "    {name:<11} {text}");
        }
    };
    line("chosen", p.chosen.as_deref().unwrap_or(""));
    line("about", &p.about);
    line("fault", p.fault.as_deref().unwrap_or(""));
    line("slow", p.slow.as_deref().unwrap_or(""));
    if p.undeleted > 0 {
        let rules = count(p.undeleted, "rule", "rules");
        line("undeleted", &format!("{rules} could not be deleted so far, and are tried again"));
    }
    for r in &p.refusals {
        line("declined", &format!("{}: {}", r.class, r.why));
    }
    for other in &p.in_front {
        line("in front", other);
    }
    line(
        "slots",
        &format!(
            "{} installed ({} in hardware), {} pending, {} rejected",
            p.installed, p.in_hw, p.pending, p.rejected
        ),
    );
    if let Some(capacity) = p.capacity {
        let how = if p.capacity_learnt { ", learnt from the NIC or the kernel" } else { "" };
        let gave_way = count(p.evictions, "rule", "rules");
        line("capacity", &format!("{capacity} rules{how}; {gave_way} gave way to busier ones"));
    }
    line(
        "so far",
        &format!(
            "{}, {}, {} deleted, {} flushed",
            count(p.sights, "sight", "sights"),
            count(p.adds, "rule added", "rules added"),
            p.deletes,
            p.flushed
        ),
    );
    line(
        "forwarded",
        &format!(
            "{}, {} ({} bytes)",
            count(p.packets, "packet", "packets"),
            bytes(p.bytes),
            p.bytes
        ),
    );
    line("rejections", &reasons(&p.reasons));
    for (op, text) in latency(&p.latency) {
        line(&op, &text);
    }
    capabilities(out, &p.capabilities);
}

/// What was tried on the netdev; a column for each place where something was.
fn capabilities(out: &mut String, all: &[CapabilityInfo]) {
    if all.is_empty() {
        return;
    }
    let cell = |yes: Option<bool>, why: &Option<String>| match (yes, why) {
        (None, _) => String::new(),
        (Some(true), _) => "yes".to_owned(),
        (Some(false), None) => "no".to_owned(),
        (Some(false), Some(why)) => format!("no: {why}"),
    };
    let tried = |of: fn(&CapabilityInfo) -> Option<bool>, name: &str| {
        if all.iter().any(|c| of(c).is_some()) { name.to_owned() } else { String::new() }
    };
    let mut rows = vec![vec![
        "CAPABILITY".to_owned(),
        tried(|c| c.software, "SOFTWARE"),
        tried(|c| c.hardware, "HARDWARE"),
    ]];
    rows.extend(all.iter().map(|c| {
        let software = cell(c.software, &c.software_why);
        vec![c.name.clone(), software, cell(c.hardware, &c.hardware_why)]
    }));
    table(out, "    ", &[], &rows);
}

/// One line per operation: how many there were, and the bounds that half of them and nearly all
/// of them stayed below.
fn latency(all: &[LatencyCount]) -> Vec<(String, String)> {
    ["add", "delete"]
        .into_iter()
        .filter_map(|op| {
            let buckets: Vec<_> = all.iter().filter(|b| b.op == op).collect();
            let total: u64 = buckets.iter().map(|b| b.count).sum();
            let below = |percent: u64| {
                let mut seen = 0;
                let reached = buckets.iter().find(|b| {
                    seen += b.count;
                    seen * 100 >= total * percent
                })?;
                Some(reached.below_us.map_or_else(|| "more than 4s".to_owned(), microseconds))
            };
            let text = format!("{total} timed: 50% below {}, 99% below {}", below(50)?, below(99)?);
            Some((format!("{op} time"), text))
        })
        .collect()
}

fn microseconds(us: u64) -> String {
    if us < 1000 { format!("{us}us") } else { duration(us / 1000) }
}

pub(super) fn port_added(out: &mut String, p: &PortInfo, detail: bool) {
    match &p.provider {
        Some(provider) => {
            let _ = writeln!(out, "{} is a port, bound to {provider}", p.name);
            for line in [p.chosen.as_deref().unwrap_or(""), &p.about] {
                if !line.is_empty() {
                    let _ = writeln!(out, "    {line}");
                }
            }
        }
        None => {
            let _ = writeln!(out, "{} is a port, but no provider took it", p.name);
        }
    }
    for r in &p.refusals {
        let _ = writeln!(out, "    {} declined: {}", r.class, r.why);
    }
    if detail {
        port(out, p);
    }
}

pub(super) fn conn(out: &mut String, c: &ConnInfo, detail: bool) {
    let _ = write!(out, "{}", c.original);
    if c.reply != c.original.inverted() {
        let _ = write!(out, "  nat, reply {}", c.reply);
    }
    if c.zone != 0 || detail {
        let _ = write!(out, "  zone {}", c.zone);
    }
    let _ = write!(out, "  age {}", duration(c.age_ms));
    match c.idle_ms {
        Some(idle) => {
            let _ = write!(out, "  idle {}", duration(idle));
        }
        None => out.push_str("  never used"),
    }
    if detail {
        let _ = write!(
            out,
            "  {} {} ({} bytes)  epoch {}",
            count(c.packets, "packet", "packets"),
            bytes(c.bytes),
            c.bytes,
            c.epoch
        );
        if let Some(id) = c.ct_id {
            let _ = write!(out, "  ct-id {id}");
        }
    }
    out.push('\n');
    let rows: Vec<_> = c.slots.iter().map(|s| slot(s, detail)).collect();
    table(out, "    ", &[], &rows);
}

fn slot(s: &SlotInfo, detail: bool) -> Vec<String> {
    let mut rest = Vec::new();
    if let Some(reason) = &s.reason {
        rest.push(match &s.detail {
            Some(detail) => format!("{reason}: {detail}"),
            None => reason.clone(),
        });
    } else if let Some(detail) = &s.detail {
        rest.push(detail.clone());
    }
    if let Some(retry) = s.retry_in_ms {
        rest.push(format!("retry in {}", duration(retry)));
    }
    if s.packets > 0 || s.state == "installed" {
        rest.push(format!("{} {}", count(s.packets, "packet", "packets"), bytes(s.bytes)));
    }
    if let Some(idle) = s.idle_ms {
        rest.push(format!("idle {}", duration(idle)));
    }
    if detail {
        rest.push(format!("ifindex {} generation {}", s.ifindex, s.generation));
        if let Some(index) = s.egress_ifindex {
            rest.push(format!("egress-ifindex {index}"));
        }
        if let Some(vlan) = s.vlan_in {
            rest.push(format!("vlan-in {vlan}"));
        }
        if let Some(vlan) = s.vlan_out {
            rest.push(format!("vlan-out {vlan}"));
        }
        if s.packets > 0 {
            rest.push(format!("{} bytes", s.bytes));
        }
        if let Some(rule) = &s.rule {
            rest.push(format!("rule {rule}"));
        }
        if let Some(cookie) = &s.cookie {
            rest.push(format!("cookie {cookie}"));
        }
    }
    let above = |netdev: &Option<String>| {
        netdev.as_ref().map_or_else(String::new, |netdev| format!(" ({netdev})"))
    };
    let egress = match (&s.egress, &s.dst_mac) {
        (Some(egress), Some(mac)) => format!("-> {egress}{} {mac}", above(&s.oif)),
        (Some(egress), None) => format!("-> {egress}{}", above(&s.oif)),
        _ => String::new(),
    };
    let hw = match s.in_hw {
        Some(true) => "hardware",
        Some(false) => "software",
        None => "",
    };
    let change = match (s.nat, s.bridged) {
        (true, _) => "nat",
        (false, true) => "bridged",
        (false, false) => "",
    };
    vec![
        format!("{}{}", s.port, above(&s.iif)),
        s.direction.to_string(),
        s.state.clone(),
        egress,
        change.to_owned(),
        hw.to_owned(),
        rest.join(", "),
    ]
}

pub(super) fn providers(out: &mut String, providers: &[ProviderInfo]) {
    let mut rows = vec![row(["PROVIDER", "PRIORITY", "PORTS", "NOTE"])];
    rows.extend(providers.iter().map(|p| {
        vec![p.class.clone(), p.priority.to_string(), p.ports.to_string(), p.note.clone()]
    }));
    use Align::{Left, Right};
    table(out, "", &[Left, Right, Right, Left], &rows);
}

/// Places of a kind that are told, unless all are asked for.
const PLACES: usize = 5;

pub(super) fn lint(out: &mut String, found: &[LintInfo], all: bool) {
    if found.is_empty() {
        out.push_str("offloaded packets skip nothing that is known of\n");
    }
    for (i, f) in found.iter().enumerate() {
        let places = if f.count > 1 { format!(" ({} places)", f.count) } else { String::new() };
        let _ = writeln!(out, "{}{}: {}{places}", if i > 0 { "\n" } else { "" }, f.name, f.skips);
        let told = if all { f.places.len() } else { PLACES };
        for place in f.places.iter().take(told) {
            let _ = writeln!(out, "    {place}");
        }
        let more = f.count.saturating_sub(f.places.len().min(told) as u64);
        if more > 0 {
            let how = if all { "" } else { " (-v: all)" };
            let _ = writeln!(out, "    and {more} more{how}");
        }
        let _ = writeln!(out, "  what can be done: {}", f.advice);
    }
}

pub(super) fn stats(out: &mut String, s: &Stats) {
    let full = if s.ledger_size > 0 && s.ledger_elements >= s.ledger_size {
        " FULL: new connections go unseen"
    } else {
        ""
    };
    let rows = [
        ("uptime", duration(s.uptime_ms)),
        ("instance", format!("{:08x}", s.instance)),
        ("connections", s.connections.to_string()),
        (
            "slots",
            format!(
                "{} installed, {} pending, {} rejected",
                s.slots_installed, s.slots_pending, s.slots_rejected
            ),
        ),
        ("sights", format!("{}, {} lost", s.sights, s.sights_lost)),
        ("ledger", format!("{} of {}{full}", s.ledger_elements, s.ledger_size)),
        (
            "conntrack",
            format!("{}, {} lost", count(s.conntrack_events, "event", "events"), s.conntrack_lost),
        ),
        (
            "sweeps",
            format!(
                "{}, the last took {}, the next comes {} later",
                s.sweeps,
                duration(s.last_sweep_ms),
                duration(s.sweep_pause_ms)
            ),
        ),
        (
            "rules",
            format!(
                "{} added, {} deleted, {} flushed, {} rejected",
                s.adds, s.deletes, s.flushed, s.add_failures
            ),
        ),
        ("rejections", reasons(&s.reasons)),
    ];
    let times = latency(&s.latency);
    let times = times.iter().map(|(op, text)| (op.as_str(), text.clone()));
    let rows: Vec<_> = rows
        .into_iter()
        .chain(times)
        .filter(|(_, v)| !v.is_empty())
        .map(|(k, v)| vec![k.to_owned(), v])
        .collect();
    table(out, "", &[], &rows);
}

pub(super) fn flushed(out: &mut String, f: &Flushed) {
    let _ = writeln!(out, "{} removed", count(f.count, "rule", "rules"));
    let rows: Vec<_> = f.ports.iter().map(|p| vec![p.port.clone(), p.count.to_string()]).collect();
    table(out, "    ", &[Align::Left, Align::Right], &rows);
}

pub(super) fn reconciled(out: &mut String, ports: &[PortReconciled]) {
    let mut rows = vec![row(["PORT", "ADOPTED", "REMOVED", "FOREIGN"])];
    rows.extend(ports.iter().map(|p| {
        let counts = [p.adopted, p.removed, p.foreign].map(|n| n.to_string());
        std::iter::once(p.port.clone()).chain(counts).collect()
    }));
    use Align::{Left, Right};
    table(out, "", &[Left, Right, Right, Right], &rows);
    for p in ports {
        if let Some(fault) = &p.fault {
            let _ = writeln!(out, "{}: {fault}", p.port);
        }
    }
}

pub(super) fn reloaded(out: &mut String, done: &Reloaded) {
    let Reloaded { file, kept, ports_changed, flushed } = done;
    let _ = writeln!(out, "{file} was read anew");
    if !kept.is_empty() {
        let _ = writeln!(out, "read at the start only, and left as they were: {}", kept.join(", "));
    }
    if *ports_changed {
        out.push_str("[[port]] holds for netdevs that come from now on; ports stay bound\n");
    }
    if let Some(rules) = flushed {
        let rules = count(*rules, "rule was", "rules were");
        let _ = writeln!(
            out,
            "admission changed: {rules} taken back, all connections are looked at anew"
        );
    }
}

pub(super) fn event(out: &mut String, e: &Event, detail: bool) {
    let mut words = vec![e.kind.name().to_owned()];
    words.extend(e.port.clone());
    words.extend(e.ifindex.map(|i| format!("ifindex {i}")));
    words.extend(e.provider.clone());
    words.extend(e.direction.map(|d| d.to_string()));
    words.extend(e.tuple.map(|t| t.to_string()));
    words.extend(e.epoch.filter(|_| detail).map(|n| format!("epoch {n}")));
    words.extend(e.zone.filter(|z| *z != 0).map(|z| format!("zone {z}")));
    words.extend(e.reason.clone());
    words.extend(e.detail.as_ref().map(|d| format!("({d})")));
    words.extend(e.count.map(|n| count(n, "event", "events")));
    out.push_str(&words.join(" "));
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_units() {
        assert_eq!(duration(7), "7ms");
        assert_eq!(duration(1_299), "1.2s");
        assert_eq!(duration(61_000), "1m01s");
        assert_eq!(duration(3_660_000), "1h01m");
        assert_eq!(duration(90_000_000), "1d01h");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1_250), "1.2 kB");
        assert_eq!(bytes(u64::MAX), "18446.7 PB");
        assert_eq!(count(1, "rule", "rules"), "1 rule");
    }

    #[test]
    fn latencies_are_told_by_their_quantiles() {
        let bucket = |op: &str, below_us, count| LatencyCount { op: op.into(), below_us, count };
        let all = [
            bucket("add", Some(16), 60),
            bucket("add", Some(2048), 38),
            bucket("add", None, 2),
            bucket("delete", Some(1), 1),
        ];
        let want = [
            ("add time", "100 timed: 50% below 16us, 99% below more than 4s"),
            ("delete time", "1 timed: 50% below 1us, 99% below 1us"),
        ];
        assert_eq!(latency(&all), want.map(|(op, text)| (op.to_owned(), text.to_owned())));
        assert_eq!(latency(&[]), []);
    }

    #[test]
    fn a_port_that_is_slow_or_cannot_delete_says_so_in_short_and_in_full() {
        let port = PortInfo {
            name: "eth0".into(),
            state: "slow".into(),
            provider: Some("tc-flower".into()),
            slow: Some("slow since 7.0 s: a sweep has not come back".into()),
            undeleted: 2,
            ..PortInfo::default()
        };
        let mut short = String::new();
        ports(&mut short, std::slice::from_ref(&port), false);
        assert!(short.contains("eth0: slow since 7.0 s: a sweep has not come back"), "{short}");
        assert!(short.contains("eth0: 2 rules to be deleted"), "{short}");
        let mut full = String::new();
        ports(&mut full, &[port], true);
        assert!(full.contains("    slow        slow since 7.0 s"), "{full}");
        assert!(full.contains("    undeleted   2 rules could not be deleted so far"), "{full}");
    }

    #[test]
    fn what_a_netdev_takes_is_a_table_with_the_kernels_words() {
        let yes = CapabilityInfo {
            name: "flow ipv4 tcp".into(),
            software: Some(true),
            ..CapabilityInfo::default()
        };
        let no = CapabilityInfo {
            name: "flow ipv6 udp nat".into(),
            software: Some(false),
            software_why: Some("Failed to load TC action module (ENOENT)".into()),
            ..CapabilityInfo::default()
        };
        let mut out = String::new();
        capabilities(&mut out, &[yes, no]);
        assert_eq!(
            out,
            "    CAPABILITY         SOFTWARE\n    flow ipv4 tcp      yes\n    flow ipv6 udp nat  no: Failed to load TC action module (ENOENT)\n"
        );
    }

    #[test]
    fn columns_stand_under_each_other() {
        let mut out = String::new();
        let rows = [row(["a", "", "long", "1"]), row(["bbb", "", "x", "22"])];
        table(&mut out, " ", &[Align::Left, Align::Left, Align::Left, Align::Right], &rows);
        assert_eq!(out, " a    long   1\n bbb  x     22\n");
    }
}
