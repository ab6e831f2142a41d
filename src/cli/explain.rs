//! `ctoffload explain`: why a connection is offloaded, or is not, in sentences.

use std::fmt::Write as _;

use netdev_providers::{Direction, Permanence, Reason, Tuple};

use super::text::{bytes, count, duration};
use crate::control::info::{ConnInfo, Explain, PortVerdict, SlotInfo};

pub(super) fn explain(out: &mut String, tuple: &Tuple, e: &Explain, all: bool) {
    let _ = writeln!(out, "{}.", e.summary.sentence);
    if let Some(help) = &e.summary.help {
        let _ = writeln!(out, "    {:<11} {help}", "what to do");
    }
    let Some(conn) = &e.conn else {
        let _ = writeln!(out, "({tuple})");
        return;
    };
    out.push('\n');
    head(out, conn);
    let mut told = vec![false; conn.slots.len()];
    for v in &e.verdicts {
        let is_its = |s: &SlotInfo| (s.ifindex, s.direction) == (v.ifindex, v.direction);
        let at = conn.slots.iter().position(is_its);
        if let Some(at) = at {
            told[at] = true;
        }
        if all || v.matters {
            // What was told at the top is not told again.
            let new = v.help.as_ref().filter(|help| Some(*help) != e.summary.help.as_ref());
            place(out, &v.port, v.direction, Some(v), at.map(|at| &conn.slots[at]), new);
        }
    }
    for (s, _) in conn.slots.iter().zip(told).filter(|(_, told)| !told) {
        place(out, &s.port, s.direction, None, Some(s), None);
    }
}

fn head(out: &mut String, c: &ConnInfo) {
    let _ = write!(out, "{}, zone {}: known for {}", c.original, c.zone, duration(c.age_ms));
    // Without a packet that a rule has carried, the time of its installation is no packet's.
    if let Some(idle) = c.idle_ms.filter(|_| c.packets > 0) {
        let _ = write!(out, ", last packet {} ago", duration(idle));
    }
    let _ = write!(out, " (epoch {}", c.epoch);
    if let Some(id) = c.ct_id {
        let _ = write!(out, ", conntrack id {id}");
    }
    out.push_str(").\n");
    if c.reply != c.original.inverted() {
        let _ = writeln!(out, "NAT: replies arrive as {}.", c.reply);
    }
    if c.packets > 0 {
        let packets = count(c.packets, "packet", "packets");
        let _ = writeln!(out, "Its rules have forwarded {packets}, {} bytes, so far.", c.bytes);
    }
}

fn place(
    out: &mut String,
    port: &str,
    direction: Direction,
    verdict: Option<&PortVerdict>,
    slot: Option<&SlotInfo>,
    help: Option<&String>,
) {
    let sentence =
        verdict.map(|v| v.verdict.clone()).or_else(|| slot.map(in_words)).unwrap_or_default();
    let _ = writeln!(out, "\n{port}, {direction} direction: {sentence}.");
    let mut line = |name: &str, text: String| {
        let _ = writeln!(out, "    {name:<11} {text}");
    };
    let reason = slot
        .and_then(|s| s.reason.as_deref())
        .map(|name| (name, Reason::ALL.iter().copied().find(|r| r.name() == name)));
    if let Some(s) = slot {
        line("state", state(s));
        if let Some((name, known)) = reason {
            line("reason", known.map_or(name.to_owned(), |r| format!("{name}: {}", r.help())));
        }
        if let Some(detail) = &s.detail {
            line("in words", format!("\"{detail}\""));
        }
        match (s.retry_in_ms, reason.and_then(|(_, known)| known)) {
            (Some(ms), _) => line("retry", format!("in {}", duration(ms))),
            (None, Some(r)) if r.permanence() == Permanence::Permanent => {
                line("retry", "none: the same offer would be refused again".into());
            }
            _ => {}
        }
        if let Some(iif) = &s.iif {
            line("arrives on", format!("{iif}, above {port}{}", tag(s.vlan_in)));
        }
        if let Some(egress) = &s.egress {
            let whom = if s.bridged { "bridged as it is, to" } else { "next hop" };
            let mac = s.dst_mac.as_ref().map_or(String::new(), |m| format!(", {whom} {m}"));
            let nat = if s.nat { ", addresses or ports rewritten" } else { "" };
            let index = s.egress_ifindex.map_or(String::new(), |i| format!(" (ifindex {i})"));
            let above = s.oif.as_ref().map_or(String::new(), |oif| format!(", below {oif}"));
            line("sent on", format!("{egress}{index}{above}{}{mac}{nat}", tag(s.vlan_out)));
        }
        if s.state == "installed" || s.packets > 0 {
            let last = s.idle_ms.filter(|_| s.packets > 0);
            let last = last.map_or(String::new(), |i| format!(", the last {} ago", duration(i)));
            let packets = count(s.packets, "packet", "packets");
            line("forwarded", format!("{packets}, {} ({} bytes){last}", bytes(s.bytes), s.bytes));
        }
        if let Some(words) = &s.nic_said {
            line("the NIC", format!("does not have it: \"{words}\""));
        }
        for other in verdict.map_or(&[][..], |v| &v.in_front) {
            line("in front", format!("{other}: what it takes does not reach the rule"));
        }
        if let Some(rule) = &s.rule {
            let cookie = s.cookie.as_ref().map_or(String::new(), |c| format!(", cookie {c}"));
            line("rule", format!("{rule}{cookie}"));
        }
    }
    if let Some(help) = help {
        line("what to do", help.clone());
    }
}

fn tag(vlan: Option<u16>) -> String {
    vlan.map_or(String::new(), |id| format!(", VLAN {id}"))
}

fn state(s: &SlotInfo) -> String {
    let place = match s.in_hw {
        Some(true) => ", in hardware",
        Some(false) => ", in software only",
        None => "",
    };
    format!("{}{place} (ifindex {}, generation {} of the port)", s.state, s.ifindex, s.generation)
}

fn in_words(s: &SlotInfo) -> String {
    match s.state.as_str() {
        "installed" => "offloaded".into(),
        "pending" => "a rule is being installed; packets take the slow path meanwhile".into(),
        "deleting" => "the rule is being removed".into(),
        "rejected" => "not offloaded; packets take the slow path".into(),
        "empty" => "not offloaded now; the next packet offers it again".into(),
        other => other.to_owned(),
    }
}
