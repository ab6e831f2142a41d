//! What the daemon tells and is asked, as plain structs.
//!
//! Field names are the names in the CLI's `-j` output: stable. Attribute numbers (at the end of the
//! file) are stable too.

use netdev_providers::{Direction, Tuple};
use serde::{Serialize, Serializer};

use super::attrs::attributes;

/// A port and what it has done so far.
#[derive(Clone, Debug, Default, Serialize, PartialEq)]
pub struct PortInfo {
    /// The netdev's index.
    pub ifindex: u32,
    /// Its name, at present.
    pub name: String,
    /// Which life of the port this is.
    pub generation: u32,
    /// The class of the provider it is bound to.
    pub provider: Option<String>,
    /// Why it is that one.
    pub chosen: Option<String>,
    /// What the provider found out about the netdev, in one line.
    pub about: String,
    /// What the netdev takes and what not, as far as the provider tried.
    pub capabilities: Vec<CapabilityInfo>,
    /// Where rules may live: `both`, `skip_sw`, `skip_hw`.
    pub offload: String,
    /// `bound`, `unbound`, `draining`, `slow`, `faulty`.
    pub state: String,
    /// What made it faulty.
    pub fault: Option<String>,
    /// What has not come back, and since when: nothing is offered meanwhile.
    pub slow: Option<String>,
    /// Rules that could not be deleted so far.
    pub undeleted: u64,
    /// Filters and programs of others that packets pass before they come to its rules.
    pub in_front: Vec<String>,
    /// Why classes that were asked earlier did not bind it.
    pub refusals: Vec<Refusal>,
    /// Slots with an operation in flight or queued.
    pub pending: u64,
    /// Slots with a rule.
    pub installed: u64,
    /// Slots that were rejected.
    pub rejected: u64,
    /// Rules that the NIC has taken.
    pub in_hw: u64,
    /// How many rules there may be, where there is a limit.
    pub capacity: Option<u64>,
    /// The limit was not configured: the provider said that it is full.
    pub capacity_learnt: bool,
    /// Rules that gave way to those of busier connections.
    pub evictions: u64,
    /// First packets of a direction of a connection seen here.
    pub sights: u64,
    /// Rules installed so far.
    pub adds: u64,
    /// Rules that went one by one so far.
    pub deletes: u64,
    /// Rules that went all at once so far, with everything that the port had: those added are these, those deleted, and
    /// those that are there.
    pub flushed: u64,
    /// Packets that rules have forwarded.
    pub packets: u64,
    /// Bytes that rules have forwarded.
    pub bytes: u64,
    /// Rejections so far, by reason.
    pub reasons: Vec<ReasonCount>,
    /// How long the provider took for operations so far.
    pub latency: Vec<LatencyCount>,
}

/// Something that rules can consist of, and whether a netdev takes it.
#[derive(Clone, Debug, Default, Serialize, PartialEq)]
pub struct CapabilityInfo {
    /// What was tried.
    pub name: String,
    /// Whether it works in software; `None`: not tried.
    pub software: Option<bool>,
    /// Why not, in the kernel's words.
    pub software_why: Option<String>,
    /// Whether it works in hardware; `None`: not tried.
    pub hardware: Option<bool>,
    /// Why not, in the kernel's or the driver's words.
    pub hardware_why: Option<String>,
}

/// How many operations took how long: one bucket of a histogram whose bounds double.
#[derive(Clone, Debug, Default, Serialize, PartialEq)]
pub struct LatencyCount {
    /// `add` or `delete`.
    pub op: String,
    /// They took less than so many microseconds, and at least half of it; `None`: longer than all
    /// that is told apart (4 s).
    pub below_us: Option<u64>,
    /// How many.
    pub count: u64,
}

/// Why a provider class did not bind a netdev.
#[derive(Clone, Debug, Default, Serialize, PartialEq)]
pub struct Refusal {
    /// The class.
    pub class: String,
    /// Its words.
    pub why: String,
}

/// How often something was rejected for a reason.
#[derive(Clone, Debug, Default, Serialize, PartialEq)]
pub struct ReasonCount {
    /// The stable name of the reason.
    pub reason: String,
    /// How often.
    pub count: u64,
}

/// A connection and where it is offloaded.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct ConnInfo {
    /// Which incarnation of the tuple.
    pub epoch: u64,
    /// The conntrack zone.
    pub zone: u16,
    /// conntrack's own id.
    pub ct_id: Option<u32>,
    /// Packets of the originator, as they arrive.
    #[serde(serialize_with = "tuple_json")]
    pub original: Tuple,
    /// Packets of the responder, as they arrive.
    #[serde(serialize_with = "tuple_json")]
    pub reply: Tuple,
    /// How long the engine has known it.
    pub age_ms: u64,
    /// How long ago a packet was last seen, in any direction on any port; `None`: never since it
    /// was offloaded.
    pub idle_ms: Option<u64>,
    /// Packets that its rules have forwarded, past and present, on all ports: never less than
    /// before.
    pub packets: u64,
    /// Bytes that they have forwarded.
    pub bytes: u64,
    /// One for each port and direction that has seen it.
    pub slots: Vec<SlotInfo>,
}

/// How many connections fit a filter.
#[derive(Clone, Copy, Debug, Default, Serialize, PartialEq, Eq)]
pub struct ConnCount {
    /// How many.
    pub count: u64,
}

/// The offload state of one direction of a connection on one port.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct SlotInfo {
    /// The port's name.
    pub port: String,
    /// Its netdev's index.
    pub ifindex: u32,
    /// Which life of it.
    pub generation: u32,
    /// Which packets.
    #[serde(serialize_with = "display_json")]
    pub direction: Direction,
    /// `pending`, `installed`, `deleting`, `rejected`, `empty`.
    pub state: String,
    /// Why it was rejected: the stable name.
    pub reason: Option<String>,
    /// The kernel's or the provider's words about that.
    pub detail: Option<String>,
    /// When it will be tried again; `None`: not by itself.
    pub retry_in_ms: Option<u64>,
    /// The netdev the packets leave by.
    pub egress: Option<String>,
    /// Its index.
    pub egress_ifindex: Option<u32>,
    /// The netdev above the port that the packets arrive on (a VLAN device, a bridge, a bond),
    /// where there is one.
    pub iif: Option<String>,
    /// The netdev above the egress that they are routed to, where there is one.
    pub oif: Option<String>,
    /// The VLAN tag they arrive with.
    pub vlan_in: Option<u16>,
    /// The VLAN tag they leave with.
    pub vlan_out: Option<u16>,
    /// The next hop's MAC address; of bridged packets the receiver's.
    pub dst_mac: Option<String>,
    /// Whether a bridge forwards them, and nobody routes them.
    pub bridged: bool,
    /// Whether addresses or ports change on the way.
    pub nat: bool,
    /// Whether the NIC has taken the rule, where that is known.
    pub in_hw: Option<bool>,
    /// Why it has not, in the driver's words, where it was offered the rule and there are some.
    pub nic_said: Option<String>,
    /// Packets that the rule has forwarded.
    pub packets: u64,
    /// Bytes that the rule has forwarded.
    pub bytes: u64,
    /// How long ago the rule last forwarded one.
    pub idle_ms: Option<u64>,
    /// The cookie in the rule, as hexadecimal digits.
    pub cookie: Option<String>,
    /// The provider's name for the rule.
    pub rule: Option<String>,
}

/// What of one kind offloaded packets skip here: the slow path would have given it to them.
#[derive(Clone, Debug, Default, Serialize, PartialEq)]
pub struct LintInfo {
    /// The stable name of the kind: of a [`Skipped`](crate::datapath::skipped::Skipped).
    pub name: String,
    /// Whether it can change what becomes of packets; otherwise it counts or tells of them.
    pub decides: bool,
    /// What it is that they skip.
    pub skips: String,
    /// What can be done about it.
    pub advice: String,
    /// At how many places it stands.
    pub count: u64,
    /// The first of these: rules as `nft -a list ruleset` has them, netdevs, ports, switches.
    pub places: Vec<String>,
}

/// A provider class.
#[derive(Clone, Debug, Default, Serialize, PartialEq)]
pub struct ProviderInfo {
    /// Its name.
    pub class: String,
    /// Its place in the order in which classes are asked: the smallest first.
    pub priority: u32,
    /// Ports bound to it.
    pub ports: u64,
    /// What there is to say of it, in one line.
    pub note: String,
}

/// The engine's counters.
#[derive(Clone, Debug, Default, Serialize, PartialEq)]
pub struct Stats {
    /// The number in the cookies of this daemon's rules.
    pub instance: u32,
    /// How long it has run.
    pub uptime_ms: u64,
    /// Connections it knows.
    pub connections: u64,
    /// Slots with a rule.
    pub slots_installed: u64,
    /// Slots with an operation in flight or queued.
    pub slots_pending: u64,
    /// Slots that were rejected.
    pub slots_rejected: u64,
    /// Sights received.
    pub sights: u64,
    /// Sights that were lost on the way (and found again through the ledger).
    pub sights_lost: u64,
    /// Elements of the kernel's ledger of sights.
    pub ledger_elements: u64,
    /// How many it can hold: a full ledger is blind.
    pub ledger_size: u64,
    /// conntrack events received.
    pub conntrack_events: u64,
    /// conntrack events lost.
    pub conntrack_lost: u64,
    /// Usage sweeps done.
    pub sweeps: u64,
    /// How long the last one took.
    pub last_sweep_ms: u64,
    /// How long after it the next one comes.
    pub sweep_pause_ms: u64,
    /// Rules installed so far.
    pub adds: u64,
    /// Rules that went one by one so far.
    pub deletes: u64,
    /// Rules that went all at once so far, with everything that their port had. On all ports that there have ever been,
    /// as those added and deleted: these only rise, and those added are these, those deleted, and those that are there.
    pub flushed: u64,
    /// Adds that were rejected so far.
    pub add_failures: u64,
    /// The same, by reason.
    pub reasons: Vec<ReasonCount>,
    /// How long providers took for operations so far, on all ports together.
    pub latency: Vec<LatencyCount>,
}

/// How far a connection is offloaded.
#[derive(Clone, Copy, Debug, Default, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Offloaded {
    /// In both directions.
    Both = 0,
    /// In one of them.
    Partly = 1,
    /// In none.
    Not = 2,
    /// There is no such connection (any more), as far as is known.
    #[default]
    Unknown = 3,
}

/// Causes of a connection not being offloaded ([`Summary::cause`]), and what they mean; besides them it is the name of a
/// [`Reason`](netdev_providers::Reason) (it was offered, and refused) or of a [`TakenBack`](crate::engine::taken::TakenBack)
/// (it was offloaded, its rule was taken back, and no packet has come since).
pub const CAUSES: &[(&str, &str)] = &[
    ("no-ports", "no netdev is attached"),
    ("no-entry", "neither the daemon nor conntrack has such a connection"),
    ("ended", "it was offloaded, and its entry of conntrack expired or was deleted"),
    ("closed", "it was offloaded, and was closed by its ends"),
    ("to-router", "it is for the router itself"),
    ("from-router", "the router itself has opened it"),
    ("bridged", "a bridge forwards it, and bridged connections are not offloaded"),
    ("helper", "a conntrack helper reads it"),
    ("seq-adjust", "conntrack adjusts its sequence numbers"),
    ("nat-clash", "its entry stands in for another that was translated alike"),
    ("dying", "conntrack is deleting its entry"),
    ("other-flowtable", "it is in a flowtable of somebody else's"),
    ("opening", "its handshake is not complete"),
    ("closing", "its ends are closing it"),
    ("one-way", "UDP that nobody has answered"),
    ("few-packets", "fewer packets than min-packets"),
    ("few-bytes", "fewer bytes than min-bytes"),
    ("not-counted", "older than conntrack's accounting, and min-bytes wants to know"),
    ("no-port", "the netdev that its packets arrive on is no port"),
    ("unreachable", "the router has no route to where its packets come from"),
    ("port-faulty", "the port that its packets arrive on is faulty"),
    ("port-slow", "that port is slow, and takes no offers now"),
    ("port-down", "that netdev is down"),
    ("port-draining", "that port is being deleted"),
    ("ledger-full", "the ledger of sights is full"),
    ("pending", "its rule is being installed"),
    ("deleting", "its rule is being deleted"),
    ("undeleted", "its rule is to go, and could not be deleted so far"),
    ("in-front", "its rule stands, and somebody in front of it takes the packets"),
    ("waiting", "nothing is against it, but no packet has come"),
];

/// The answer, in short.
#[derive(Clone, Debug, Default, Serialize, PartialEq)]
pub struct Summary {
    /// How far it is offloaded.
    pub offloaded: Offloaded,
    /// The same in one sentence, with the cause where there is one, without a final dot.
    pub sentence: String,
    /// The stable name of the cause: see [`CAUSES`].
    pub cause: Option<String>,
    /// What can be done about it: one sentence, without a final dot.
    pub help: Option<String>,
}

/// Why a connection is offloaded or not.
#[derive(Clone, Debug, Default, Serialize, PartialEq)]
pub struct Explain {
    /// The answer, in short.
    pub summary: Summary,
    /// The connection, where the engine knows it.
    pub conn: Option<ConnInfo>,
    /// What each port does with it.
    pub verdicts: Vec<PortVerdict>,
}

/// What one port does with one direction of a connection.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct PortVerdict {
    /// The port's name.
    pub port: String,
    /// Its netdev's index.
    pub ifindex: u32,
    /// Which packets.
    #[serde(serialize_with = "display_json")]
    pub direction: Direction,
    /// One sentence, without a final dot.
    pub verdict: String,
    /// The port has to do with this direction: it has seen it, or would.
    pub matters: bool,
    /// The stable name of the cause, where it is not offloaded.
    pub cause: Option<String>,
    /// What can be done about it: one sentence, without a final dot.
    pub help: Option<String>,
    /// Filters and programs of others that packets pass there before they come to a rule.
    pub in_front: Vec<String>,
}

/// Which connection is to be explained.
#[derive(Clone, Debug, PartialEq)]
pub struct ExplainRequest {
    /// Its original or its reply tuple, or the inverse of one.
    pub tuple: Tuple,
    /// Its zone; `None`: zone 0, or the one that it is known in.
    pub zone: Option<u16>,
}

/// What is to be flushed. Connections live on in software.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FlushRequest {
    /// Slots of this port.
    pub port: Option<String>,
    /// Connections of this zone.
    pub zone: Option<u16>,
    /// The connection with this tuple, as original or as reply.
    pub tuple: Option<Tuple>,
    /// Everything. The daemon refuses a request with neither this nor a filter.
    pub all: bool,
}

/// What a flush removed.
#[derive(Clone, Debug, Default, Serialize, PartialEq)]
pub struct Flushed {
    /// How many rules, on all ports together.
    pub count: u64,
    /// How many on each port that had some.
    pub ports: Vec<PortFlushed>,
}

/// What a flush removed on one port.
#[derive(Clone, Debug, Default, Serialize, PartialEq)]
pub struct PortFlushed {
    /// The port's name.
    pub port: String,
    /// How many rules.
    pub count: u64,
}

/// What is to be reconciled.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReconcileRequest {
    /// One port; `None`: all.
    pub port: Option<String>,
}

/// What a reconciliation did on one port.
#[derive(Clone, Debug, Default, Serialize, PartialEq)]
pub struct PortReconciled {
    /// The port's name.
    pub port: String,
    /// Rules left by a dead daemon that belong to a living connection, and are this one's now.
    pub adopted: u64,
    /// Rules left by a dead daemon that were removed.
    pub removed: u64,
    /// Rules of others, which nobody touched.
    pub foreign: u64,
    /// Why nothing was done.
    pub fault: Option<String>,
}

/// What reading the configuration anew has changed, and what not.
#[derive(Clone, Debug, Default, Serialize, PartialEq)]
pub struct Reloaded {
    /// The file that was read.
    pub file: String,
    /// Keys that say something else than at the daemon's start, and are read only then: as `[section] key`.
    pub kept: Vec<String>,
    /// Netdevs would be attached in another way: that holds for those that come from now on.
    pub ports_changed: bool,
    /// Which connections may be offloaded has changed, so that all are looked at anew: how many rules were taken back
    /// for that. `None`: it has not.
    pub flushed: Option<u64>,
}

/// Which netdev is to become a port.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PortAddRequest {
    /// Its name.
    pub name: String,
    /// The classes to ask, in this order; empty: as configured.
    pub providers: Vec<String>,
    /// Where rules may live (`both`, `skip_sw`, `skip_hw`); `None`: as configured.
    pub offload: Option<String>,
    /// How many rules there may be at most; `None`: as configured.
    pub capacity: Option<u32>,
}

/// Which port is to go.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PortDelRequest {
    /// Its netdev's name.
    pub name: String,
}

/// What happened.
#[derive(Clone, Copy, Debug, Default, Serialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// A netdev became a port.
    #[default]
    PortAdded,
    /// A port went.
    PortDeleted,
    /// A rule was installed.
    Installed,
    /// An offer was rejected.
    Rejected,
    /// A rule was removed.
    Deleted,
    /// Events were lost here. Made by the receiver, never sent.
    Lost,
}

impl EventKind {
    /// The name in output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::PortAdded => "port-added",
            Self::PortDeleted => "port-deleted",
            Self::Installed => "installed",
            Self::Rejected => "rejected",
            Self::Deleted => "deleted",
            Self::Lost => "lost",
        }
    }
}

/// Something that happened in the engine.
#[derive(Clone, Debug, Default, Serialize, PartialEq)]
pub struct Event {
    /// What.
    pub kind: EventKind,
    /// On which port.
    pub port: Option<String>,
    /// Its netdev's index.
    pub ifindex: Option<u32>,
    /// Its provider.
    pub provider: Option<String>,
    /// The connection's zone.
    pub zone: Option<u16>,
    /// The original tuple of the connection.
    #[serde(serialize_with = "optional_tuple_json")]
    pub tuple: Option<Tuple>,
    /// Which incarnation of the tuple, as [`ConnInfo::epoch`]: rules of two may stand for a moment.
    pub epoch: Option<u64>,
    /// Which of its directions.
    #[serde(serialize_with = "optional_display_json")]
    pub direction: Option<Direction>,
    /// The stable name of the reason of a rejection.
    pub reason: Option<String>,
    /// The kernel's or the provider's words.
    pub detail: Option<String>,
    /// How many events were lost, where that is known.
    pub count: Option<u64>,
}

#[derive(Serialize)]
struct TupleJson {
    proto: String,
    src: String,
    sport: u16,
    dst: String,
    dport: u16,
}

impl From<&Tuple> for TupleJson {
    fn from(t: &Tuple) -> Self {
        Self {
            proto: t.proto().to_string(),
            src: t.src().to_string(),
            sport: t.sport(),
            dst: t.dst().to_string(),
            dport: t.dport(),
        }
    }
}

fn tuple_json<S: Serializer>(tuple: &Tuple, to: S) -> Result<S::Ok, S::Error> {
    TupleJson::from(tuple).serialize(to)
}

fn optional_tuple_json<S: Serializer>(tuple: &Option<Tuple>, to: S) -> Result<S::Ok, S::Error> {
    tuple.as_ref().map(TupleJson::from).serialize(to)
}

fn display_json<S: Serializer>(value: &impl ToString, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&value.to_string())
}

fn optional_display_json<S: Serializer>(
    value: &Option<impl ToString>,
    to: S,
) -> Result<S::Ok, S::Error> {
    value.as_ref().map(ToString::to_string).serialize(to)
}

mod codec {
    use super::{EventKind, Offloaded};
    use crate::control::attrs::Element;
    use crate::control::error::WireError;

    impl Element for Offloaded {
        fn append(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
            (*self as u8).append(out)
        }

        fn from_payload(bytes: &[u8]) -> Result<Self, WireError> {
            Ok(match u8::from_payload(bytes)? {
                0 => Self::Both,
                1 => Self::Partly,
                2 => Self::Not,
                3 => Self::Unknown,
                _ => return Err(WireError::Value("a known word for how far it is offloaded")),
            })
        }
    }

    impl Element for EventKind {
        fn append(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
            (*self as u8).append(out)
        }

        fn from_payload(bytes: &[u8]) -> Result<Self, WireError> {
            Ok(match u8::from_payload(bytes)? {
                0 => Self::PortAdded,
                1 => Self::PortDeleted,
                2 => Self::Installed,
                3 => Self::Rejected,
                4 => Self::Deleted,
                _ => return Err(WireError::Value("a known kind of event")),
            })
        }
    }
}

attributes! {
    PortInfo {
        ifindex = 1, name = 2, generation = 3, provider = 4, about = 5, offload = 6, state = 7,
        fault = 8, refusals = 9, pending = 10, installed = 11, rejected = 12, in_hw = 13,
        sights = 14, adds = 15, deletes = 16, packets = 17, bytes = 18, reasons = 19,
        latency = 20, capacity = 21, capacity_learnt = 22, evictions = 23,
        capabilities = 24, slow = 25, undeleted = 26, in_front = 27, chosen = 28, flushed = 29,
    }
    CapabilityInfo {
        name = 1, software = 2, software_why = 3, hardware = 4, hardware_why = 5,
    }
    LatencyCount { op = 1, below_us = 2, count = 3 }
    Refusal { class = 1, why = 2 }
    ReasonCount { reason = 1, count = 2 }
    ConnInfo {
        epoch = 1, zone = 2, ct_id = 3, original = 4, reply = 5, age_ms = 6, idle_ms = 7, slots = 8,
        packets = 9, bytes = 10,
    }
    SlotInfo {
        port = 1, ifindex = 2, generation = 3, direction = 4, state = 5, reason = 6, detail = 7,
        retry_in_ms = 8, egress = 9, egress_ifindex = 10, dst_mac = 11, nat = 12, in_hw = 13,
        packets = 14, bytes = 15, idle_ms = 16, cookie = 17, rule = 18, iif = 19, oif = 20,
        vlan_in = 21, vlan_out = 22, bridged = 23, nic_said = 24,
    }
    ProviderInfo { class = 1, priority = 2, ports = 3, note = 4 }
    LintInfo { name = 1, decides = 2, skips = 3, advice = 4, count = 5, places = 6 }
    Stats {
        instance = 1, uptime_ms = 2, connections = 3, slots_installed = 4, slots_pending = 5,
        slots_rejected = 6, sights = 7, sights_lost = 8, ledger_elements = 9, ledger_size = 10,
        conntrack_events = 11, conntrack_lost = 12, sweeps = 13, last_sweep_ms = 14, adds = 15,
        deletes = 16, add_failures = 17, reasons = 18, latency = 19,
        sweep_pause_ms = 20, flushed = 21,
    }
    Summary { offloaded = 1, sentence = 2, cause = 3, help = 4 }
    PortVerdict {
        port = 1, ifindex = 2, direction = 3, verdict = 4, help = 5, in_front = 6, matters = 7, cause = 8,
    }
    ConnCount { count = 1 }
    ExplainRequest { tuple = 1, zone = 2 }
    FlushRequest { port = 1, zone = 2, tuple = 3, all = 4 }
    PortFlushed { port = 1, count = 2 }
    ReconcileRequest { port = 1 }
    PortReconciled { port = 1, adopted = 2, removed = 3, foreign = 4, fault = 5 }
    Reloaded { file = 1, kept = 2, ports_changed = 3, flushed = 4 }
    PortAddRequest { name = 1, providers = 2, offload = 3, capacity = 4 }
    PortDelRequest { name = 1 }
    Event {
        kind = 1, port = 2, ifindex = 3, provider = 4, zone = 5, tuple = 6, direction = 7,
        reason = 8, detail = 9, count = 10, epoch = 11,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::attrs::{Element, Field, Object, from_bytes, strict};
    use crate::control::error::WireError;
    use proptest::prelude::*;

    prop_compose! {
        fn tuples()(udp: bool, v6: bool, a: [u8; 16], b: [u8; 16], sport: u16, dport: u16) -> Tuple {
            let ip = |x: [u8; 16]| if v6 { std::net::IpAddr::from(x) } else { [x[0], x[1], x[2], x[3]].into() };
            let proto = if udp { netdev_providers::L4Proto::Udp } else { netdev_providers::L4Proto::Tcp };
            Tuple::new(proto, ip(a), sport, ip(b), dport).unwrap()
        }
    }

    prop_compose! {
        fn slots()(
            port in "[a-z0-9é]{0,15}", ifindex: u32, reply: bool, state in "[a-z]{1,9}",
            reason in proptest::option::of("[a-z-]{0,20}"), retry_in_ms: Option<u64>, nat: bool,
            bridged: bool, in_hw: Option<bool>, packets: u64, egress_ifindex: Option<u32>, vlan_in: Option<u16>,
        ) -> SlotInfo {
            SlotInfo {
                port, ifindex, generation: 9,
                direction: if reply { Direction::Reply } else { Direction::Original },
                state, detail: reason.clone(), reason, retry_in_ms, egress: None, egress_ifindex,
                iif: None, oif: Some("br0".into()), vlan_in, vlan_out: None, dst_mac: None, bridged, nat, in_hw, nic_said: egress_ifindex.map(|i| i.to_string()), packets, bytes: 1, idle_ms: None, cookie: None, rule: None,
            }
        }
    }

    prop_compose! {
        fn conns()(
            epoch: u64, zone: u16, ct_id: Option<u32>, original in tuples(), reply in tuples(),
            age_ms: u64, idle_ms: Option<u64>, slots in proptest::collection::vec(slots(), 0..5),
        ) -> ConnInfo {
            ConnInfo {
                epoch, zone, ct_id, original, reply, age_ms, idle_ms, packets: epoch, bytes: 2, slots,
            }
        }
    }

    proptest! {
        #[test]
        fn an_object_reads_back_what_it_writes(conn in conns()) {
            let payload = conn.to_payload().unwrap();
            prop_assert_eq!(ConnInfo::from_payload(&payload).unwrap(), conn);
        }

        #[test]
        fn a_damaged_object_is_an_error_or_another_object(conn in conns(), at: prop::sample::Index, to: u8) {
            let mut payload = conn.to_payload().unwrap();
            let at = at.index(payload.len());
            payload[at] = to;
            let _ = ConnInfo::from_payload(&payload);
            payload.truncate(at);
            let _ = ConnInfo::from_payload(&payload);
        }

        #[test]
        fn no_bytes_make_an_object_panic(b in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = ConnInfo::from_payload(&b);
            let _ = PortInfo::from_payload(&b);
            let _ = Event::from_payload(&b);
            let _ = FlushRequest::from_payload(&b);
            let _ = Tuple::from_payload(&b);
        }
    }

    #[test]
    fn an_unknown_attribute_is_ignored_in_an_answer_and_refused_in_a_request() {
        let mut bytes = ReasonCount { reason: "busy".into(), count: 3 }.encode().unwrap();
        "from a newer daemon".to_owned().put(999, &mut bytes).unwrap();
        let attrs = from_bytes(&bytes).unwrap();
        assert_eq!(ReasonCount::decode(&attrs).unwrap().count, 3);
        let e = strict::<ReasonCount>(&attrs).unwrap_err();
        assert!(e.to_string().starts_with("ReasonCount has an attribute 999 that"), "{e}");
    }

    #[test]
    fn a_missing_attribute_is_named() {
        let mut bytes = Vec::new();
        "busy".to_owned().put(1, &mut bytes).unwrap();
        let e = ReasonCount::from_payload(&bytes).unwrap_err();
        assert_eq!(e.to_string(), "ReasonCount.count: an attribute is missing");
        let mut bytes = Vec::new();
        1u32.put(1, &mut bytes).unwrap();
        assert!(matches!(ReasonCount::from_payload(&bytes), Err(WireError::Field { .. })));
    }

    #[test]
    fn a_tuple_of_two_families_on_the_wire_is_refused() {
        let tuple = |dst: std::net::IpAddr| {
            let mut bytes = Vec::new();
            6u8.put(1, &mut bytes).unwrap();
            std::net::IpAddr::from([192, 0, 2, 1]).put(2, &mut bytes).unwrap();
            1u16.put(3, &mut bytes).unwrap();
            dst.put(4, &mut bytes).unwrap();
            2u16.put(5, &mut bytes).unwrap();
            Tuple::from_payload(&bytes)
        };
        assert_eq!(
            tuple([192, 0, 2, 2].into()),
            Ok("tcp 192.0.2.1:1 > 192.0.2.2:2".parse().unwrap())
        );
        assert!(tuple([0; 16].into()).is_err());
    }

    #[test]
    fn a_tuple_is_structured_in_json() {
        let e = Event {
            tuple: "udp [2001:db8::1]:53 > [2001:db8::2]:5353".parse().ok(),
            ..Event::default()
        };
        let json = serde_json::to_value(&e).unwrap();
        assert_eq!(
            json["tuple"],
            serde_json::json!({"proto": "udp", "src": "2001:db8::1", "sport": 53, "dst": "2001:db8::2", "dport": 5353})
        );
        assert_eq!(json["kind"], EventKind::PortAdded.name());
    }

    #[test]
    fn kinds_of_events_have_a_name_and_a_number_that_stay() {
        use EventKind::{Deleted, Installed, Lost, PortAdded, PortDeleted, Rejected};
        let names =
            [PortAdded, PortDeleted, Installed, Rejected, Deleted, Lost].map(EventKind::name);
        assert_eq!(
            names,
            ["port-added", "port-deleted", "installed", "rejected", "deleted", "lost"]
        );
        for (n, kind) in
            [PortAdded, PortDeleted, Installed, Rejected, Deleted].into_iter().enumerate()
        {
            let n = u8::try_from(n).unwrap();
            assert_eq!(kind.to_payload().unwrap(), [n]);
            assert_eq!(EventKind::from_payload(&[n]), Ok(kind));
        }
        assert!(EventKind::from_payload(&[5]).is_err(), "a loss is made by the receiver");
    }

    #[test]
    fn tuples_and_directions_are_objects_and_names_in_json() {
        let tuple = "udp [2001:db8::1]:53 > [2001:db8::2]:5353".parse().unwrap();
        let event =
            Event { tuple: Some(tuple), direction: Some(Direction::Reply), ..Event::default() };
        let json = serde_json::to_value(&event).unwrap();
        let wanted = serde_json::json!({
            "proto": "udp", "src": "2001:db8::1", "sport": 53, "dst": "2001:db8::2", "dport": 5353,
        });
        assert_eq!((&json["tuple"], &json["direction"]), (&wanted, &"reply".into()));
        let none = serde_json::to_value(Event::default()).unwrap();
        assert!(none["tuple"].is_null() && none["direction"].is_null());
    }
}
