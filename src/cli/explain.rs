//! `ctoffload explain`: why a connection is offloaded, or is not, in sentences.

use std::fmt::Write as _;

use netdev_providers::{Direction, Permanence, Reason, Tuple, Zone};

use super::text::{bytes, count, duration};
use crate::control::info::{ConnInfo, Explain, PortVerdict, SlotInfo};

pub(super) fn explain(out: &mut String, tuple: &Tuple, zone: Zone, e: &Explain) {
    match &e.conn {
        None => {
            let _ =
                writeln!(out, "{tuple}, zone {zone}: the engine does not know this connection.");
        }
        Some(c) => head(out, c),
    }
    let slots = e.conn.as_ref().map_or(&[][..], |c| &c.slots);
    let mut told = vec![false; slots.len()];
    for v in &e.verdicts {
        let at = slots.iter().position(|s| (s.ifindex, s.direction) == (v.ifindex, v.direction));
        if let Some(at) = at {
            told[at] = true;
        }
        place(out, &v.port, v.direction, Some(v), at.map(|at| &slots[at]));
    }
    for (s, _) in slots.iter().zip(told).filter(|(_, told)| !told) {
        place(out, &s.port, s.direction, None, Some(s));
    }
}

fn head(out: &mut String, c: &ConnInfo) {
    let _ = write!(out, "{}, zone {}: known for {}", c.original, c.zone, duration(c.age_ms));
    match c.idle_ms {
        Some(idle) => {
            let _ = write!(out, ", last packet {} ago", duration(idle));
        }
        None => out.push_str(", no packet seen since it was offloaded"),
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
    if c.slots.is_empty() {
        out.push_str("No port has seen a packet of it yet.\n");
    }
}

fn place(
    out: &mut String,
    port: &str,
    direction: Direction,
    verdict: Option<&PortVerdict>,
    slot: Option<&SlotInfo>,
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
            let last =
                s.idle_ms.map_or(String::new(), |i| format!(", the last {} ago", duration(i)));
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
    let help = verdict
        .and_then(|v| v.help.clone())
        .or_else(|| reason.and_then(|(_, known)| known).and_then(advice).map(str::to_owned));
    if let Some(help) = help {
        line("what to do", help);
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

/// What an operator, or whoever writes the driver, can do about a rejection.
fn advice(reason: Reason) -> Option<&'static str> {
    Some(match reason {
        Reason::Unsupported | Reason::Refused => {
            "see the words above and the kernel log; try the rule by hand with `tc filter add … flower`"
        }
        Reason::NotInHardware => {
            "check `ethtool -k PORT | grep hw-tc-offload`; or let rules live in software: --offload both"
        }
        Reason::TableFull => {
            "a larger table in the NIC, or another port to take some of the connections"
        }
        Reason::QueueFull => {
            "wait; if it stays: connections come faster than this backend takes rules"
        }
        Reason::NeighbourUnresolved => "check `ip neigh show` for the next hop: does it answer?",
        Reason::IpsecPolicy => "see `ip xfrm policy`",
        Reason::TosRouted => "see `ip rule` and `ip route` for what has a tos or a dscp",
        Reason::MarkRouted => {
            "set marks that are for a qdisc in prerouting already, or in the qdisc's own filters; see `ip rule`"
        }
        Reason::NoRoute => "check `ip route get` for the destination",
        Reason::EgressUnsupported => {
            "see `ip -d link show` of the egress netdev; nf-flowtable may want it as a port of its own too"
        }
        Reason::MtuMismatch => {
            "make the egress MTU at least as large as the ingress MTU; in software: load act_police"
        }
        Reason::Conflict => "look for a foreign filter: `tc filter show dev PORT ingress`",
        Reason::ProviderFault => "a fault in the provider: see the daemon's log, and report it",
        Reason::NoProvider => "see `ctoffload port show PORT` for why each provider declined",
        Reason::NatChecksum => "a kernel with CONFIG_NET_ACT_BPF, or a NIC that takes the rule",
        Reason::ConnTableFull => "raise the limit of connections in the daemon's configuration",
        Reason::NoEffect => {
            "see whether the NIC was reset, and what its driver says in the kernel log; packets that no rule is for (fragments) look the same"
        }
        Reason::FirewallBehind => {
            "in postrouting, give the chain a lower priority than 2147483647, or register it after the daemon's start; at egress, take its rules to postrouting"
        }
        Reason::HashRouted => {
            "for IPv4, set net.ipv4.fib_multipath_hash_policy to 0: addresses alone choose then"
        }
        Reason::ZoneUnclear => {
            "let the netdev, the tag, addresses or ports choose the zone (`nft list ruleset`)"
        }
        Reason::OthersInFront => {
            "see `ctoffload port show PORT` for who is in front; let rules live in software: --offload both"
        }
        Reason::NotAdmitted => "change the [[admit]] rules of the daemon's configuration",
        _ => return None,
    })
}
