//! Answers "why is this connection (not) offloaded": looks for the cause, in each direction, where it can be: in the
//! engine, in the slot's history, in conntrack, at the port that the packets arrive on, in what is full.

mod cause;

use std::sync::Arc;
use std::time::Duration;

use netdev_providers::{Direction, Ifindex, Reason, Rejection, Tuple, Zone};

use self::cause::{Cause, Refused};
use super::config::Config;
use crate::control::info::{Offloaded, PortVerdict, Summary};
use crate::datapath::Backend;
use crate::datapath::inspect::{Found, unsighted};
use crate::datapath::netfilter::conntrack::ConntrackError;
use crate::datapath::routing::links::Layer;
use crate::datapath::routing::towards::{Towards, towards};
use crate::engine::Engine;
use crate::engine::conn::{ConnHandle, ConnKey};
use crate::engine::slot::SlotState;
use crate::engine::view::{Past, PastView, PortView, SlotView};

/// A rule that has carried nothing for so long, with somebody in front of it, carries nothing.
const CARRIES_NOTHING_MS: u64 = 10_000;

/// What was found.
pub(super) struct Explained {
    pub(super) summary: Summary,
    pub(super) conn: Option<ConnHandle>,
    pub(super) verdicts: Vec<PortVerdict>,
}

/// What is looked at.
struct Looking<'a> {
    engine: &'a Engine,
    backend: &'a Backend,
    config: &'a Config,
    ports: Vec<PortView>,
    conn: Option<ConnHandle>,
    found: Found,
    slots: Vec<SlotView>,
    past: Vec<PastView>,
}

/// How a direction stands.
enum Standing {
    /// A rule forwards it, on this port.
    Offloaded(String),
    Not(Cause),
}

/// Looks for the connection that has this tuple in any form, and for what becomes of it. Without a zone: in zone 0 first,
/// then in those that the engine knows.
pub(super) fn explain(
    engine: &Engine,
    backend: &Backend,
    config: &Arc<Config>,
    tuple: &Tuple,
    zone: Option<Zone>,
) -> Result<Explained, ConntrackError> {
    let tuples = [*tuple, tuple.inverted()];
    let in_engine =
        |zone| tuples.iter().find_map(|t| engine.conns_of(Some(t), zone).into_iter().next());
    let mut found = backend.find(tuple, zone.unwrap_or(Zone(0)))?;
    let mut conn = match &found.entry {
        Some(e) => engine.conn(&ConnKey { zone: e.zone, original: e.original }),
        None => in_engine(zone),
    };
    if let (None, Some(conn)) = (&found.entry, &conn) {
        found = backend.find(&conn.key().original, conn.key().zone)?;
    }
    // One whose entry is gone goes with its event, which is on its way.
    if found.entry.is_none() && found.ended.is_some() {
        conn = None;
    }
    let slots = conn.as_ref().map(|c| engine.slots(c)).unwrap_or_default();
    let past = conn.as_ref().map(|c| engine.past(c)).unwrap_or_default();
    let ports = engine.ports();
    let looking = Looking { engine, backend, config, ports, conn, found, slots, past };
    let standing = Direction::BOTH.map(|d| looking.standing(d));
    let summary = looking.summary(&standing);
    let verdicts = looking.verdicts(&standing);
    Ok(Explained { summary, conn: looking.conn, verdicts })
}

impl Looking<'_> {
    fn name(&self, ifindex: Ifindex) -> String {
        self.backend.links().name(ifindex)
    }

    fn port(&self, ifindex: Ifindex) -> Option<&PortView> {
        self.ports.iter().find(|p| p.netdev.ifindex == ifindex)
    }

    /// As its packets arrive, in this direction, and as they leave.
    fn tuples(&self, d: Direction) -> Option<[Tuple; 2]> {
        if let Some(conn) = &self.conn {
            return Some([conn.arriving(d), conn.leaving(d)]);
        }
        let entry = self.found.entry.as_ref()?;
        Some([entry.incoming(d), entry.outgoing(d)])
    }

    fn standing(&self, d: Direction) -> Standing {
        let slots = || self.slots.iter().filter(|s| s.direction == d);
        if let Some(slot) = slots().find(|s| s.state == SlotState::Installed) {
            return match self.blocked(slot) {
                None => Standing::Offloaded(self.name(slot.netdev.ifindex)),
                Some(cause) => Standing::Not(cause),
            };
        }
        Standing::Not(self.why_not(d, slots()))
    }

    /// Why a rule that stands forwards nothing: its netdev is down, or somebody takes its packets.
    fn blocked(&self, slot: &SlotView) -> Option<Cause> {
        let port = self.port(slot.netdev.ifindex)?;
        if let Some(down) = self.down(port) {
            return Some(down);
        }
        let idle = slot.packets == 0 && slot.idle_ms.is_some_and(|ms| ms >= CARRIES_NOTHING_MS);
        (idle && slot.in_hw != Some(true) && !port.in_front.is_empty())
            .then(|| Cause::InFront(self.name(port.netdev.ifindex), port.in_front.clone()))
    }

    fn why_not<'s>(&self, d: Direction, slots: impl Iterator<Item = &'s SlotView>) -> Cause {
        if self.ports.is_empty() {
            return Cause::NoPorts;
        }
        let Some([arriving, leaving]) = self.tuples(d) else {
            return self.found.ended.map_or(Cause::NoEntry, Cause::Ended);
        };
        let refused = slots.last().map(|slot| self.of_slot(slot));
        let past = self.past.iter().filter(|p| p.direction == d).min_by_key(|p| p.ago_ms);
        let past = past.map(|p| self.of_past(p));
        if let Some(cause) = refused {
            return cause;
        }
        let (min_packets, min_bytes) = (self.config.min_packets, self.config.min_bytes);
        let by_entry = self.found.entry.as_ref().and_then(|e| unsighted(e, self.backend.config()));
        if let Some(why) = by_entry {
            return Cause::Unsighted(why, min_packets, min_bytes);
        }
        let from = towards(arriving.src()).unwrap_or(Towards::Nowhere);
        let to = towards(leaving.dst()).unwrap_or(Towards::Nowhere);
        let arrival = match (from, to) {
            (Towards::Local, _) => return Cause::FromRouter(arriving.src()),
            (_, Towards::Local) => return Cause::ToRouter(leaving.dst()),
            (Towards::Nowhere, _) => return past.unwrap_or(Cause::Unreachable(arriving.src())),
            (Towards::By(netdev), to) => {
                let is_bridge = self
                    .backend
                    .links()
                    .get(netdev)
                    .is_some_and(|l| matches!(l.layer, Layer::Bridge { .. }));
                if is_bridge && to == from && !self.backend.config().bridged {
                    return Cause::Bridged(self.name(netdev));
                }
                netdev
            }
        };
        let here = |p: &&PortView| {
            let ifindex = p.netdev.ifindex;
            ifindex == arrival || self.backend.links().above(ifindex).contains(&arrival)
        };
        let Some(port) = self.ports.iter().find(here) else {
            return past.unwrap_or_else(|| Cause::NoPort(self.name(arrival)));
        };
        self.of_port(port)
            .or(past)
            .or_else(|| self.full())
            .unwrap_or_else(|| Cause::Waiting(self.name(port.netdev.ifindex)))
    }

    /// Of a slot that waits for its next packet.
    fn of_past(&self, past: &PastView) -> Cause {
        let port = self.name(past.netdev.ifindex);
        match past.why {
            Past::TakenBack(why) => Cause::Taken(port, why, Duration::from_millis(past.ago_ms)),
            Past::Refused(reason) => {
                let why = self.named(reason.into(), past.direction);
                Cause::Refused(self.refused(past.netdev.ifindex, why, None))
            }
        }
    }

    fn refused(&self, port: Ifindex, why: Rejection, retry: Option<Duration>) -> Refused {
        let configured = self.port(port).filter(|p| !p.capacity_learnt).and_then(|p| p.capacity);
        let ipv6 = self.conn.as_ref().is_some_and(|c| c.key().original.is_ipv6());
        Refused { port: self.name(port), why, retry, ipv6, configured }
    }

    /// Of a slot without a rule that forwards.
    fn of_slot(&self, slot: &SlotView) -> Cause {
        let port = self.name(slot.netdev.ifindex);
        match (slot.state, &slot.rejection) {
            (SlotState::Rejected, Some(why)) => {
                let retry = slot.retry_in_ms.map(Duration::from_millis);
                let why = self.named(why.clone(), slot.direction);
                Cause::Refused(self.refused(slot.netdev.ifindex, why, retry))
            }
            (SlotState::Deleting, Some(why)) => Cause::Undeleted(port, why.clone()),
            (SlotState::Deleting, None) => Cause::Deleting(port),
            _ => Cause::Pending(port),
        }
    }

    /// With the name of who it is, where the provider that refused does not know him.
    fn named(&self, mut why: Rejection, d: Direction) -> Rejection {
        if why.reason == Reason::OthersAtEgress
            && let Some(who) = self.at_egress(d)
        {
            why.detail = Some(who.into());
        }
        why
    }

    /// Who stands at egress of the netdev that a direction leaves by, or of one below it.
    fn at_egress(&self, d: Direction) -> Option<String> {
        let [_, leaving] = self.tuples(d)?;
        let Ok(Towards::By(oif)) = towards(leaving.dst()) else { return None };
        let links = self.backend.links();
        let below = |i: &Ifindex| *i == oif || links.above(*i).contains(&oif);
        let mut all = links.all().into_iter().map(|l| l.ifindex).filter(below);
        all.find_map(|i| Some(format!("{} at {}", self.backend.egress().at(i)?, self.name(i))))
    }

    /// What keeps a port from taking offers.
    fn of_port(&self, port: &PortView) -> Option<Cause> {
        let name = self.name(port.netdev.ifindex);
        if port.draining {
            return Some(Cause::Draining(name));
        }
        if let Some(fault) = &port.fault {
            return Some(Cause::Faulty(name, fault.clone()));
        }
        if port.provider.is_none() {
            let declined = port.refusals.iter().map(|r| format!("{}: {}", r.class, r.why));
            return Some(Cause::NoProvider(name, declined.collect()));
        }
        if let Some(slow) = &port.slow {
            return Some(Cause::Slow(name, slow.to_string()));
        }
        self.down(port)
    }

    fn down(&self, port: &PortView) -> Option<Cause> {
        let link = self.backend.links().get(port.netdev.ifindex)?;
        (!link.up || !link.carrier).then_some(Cause::Down(link.name))
    }

    /// What is full, where the engine does not have the connection.
    fn full(&self) -> Option<Cause> {
        if self.conn.is_some() {
            return None;
        }
        if self.engine.conn_count() >= self.config.connections {
            return Some(Cause::ConnTableFull(self.config.connections));
        }
        self.backend.ledger_is_full().then(|| Cause::LedgerFull(self.backend.ledger_size()))
    }

    fn summary(&self, standing: &[Standing; 2]) -> Summary {
        use Standing::{Not, Offloaded as On};
        let of = |cause: &Cause, offloaded, sentence: String| Summary {
            offloaded,
            sentence,
            cause: Some(cause.name().to_owned()),
            help: cause.help(),
        };
        match standing {
            [On(o), On(r)] => Summary {
                offloaded: Offloaded::Both,
                sentence: format!("offloaded in both directions: original on {o}, reply on {r}"),
                cause: None,
                help: None,
            },
            [On(port), Not(cause)] | [Not(cause), On(port)] => {
                let of_original = matches!(standing, [On(_), _]);
                let (on, off) =
                    if of_original { ("original", "reply") } else { ("reply", "original") };
                let why = cause.sentence();
                let sentence = format!(
                    "offloaded in one direction: {on} on {port}; not the {off} direction: {why}"
                );
                of(cause, Offloaded::Partly, sentence)
            }
            [Not(o), Not(r)] => {
                let unknown = matches!(o, Cause::NoEntry | Cause::Ended(_));
                let not = if unknown { Offloaded::Unknown } else { Offloaded::Not };
                if let Some(both) = o.of_both(r) {
                    return of(&both, not, format!("not offloaded: {}", both.sentence()));
                }
                // What keeps one direction waiting is no cause where the other has one.
                let telling = if matches!(o, Cause::Waiting(_)) { r } else { o };
                let sentence = format!(
                    "not offloaded: original direction: {}; reply direction: {}",
                    o.sentence(),
                    r.sentence()
                );
                of(telling, not, sentence)
            }
        }
    }

    /// What each port does with each direction.
    fn verdicts(&self, standing: &[Standing; 2]) -> Vec<PortVerdict> {
        if self.conn.is_none() {
            return Vec::new();
        }
        let mut verdicts = Vec::new();
        for port in &self.ports {
            let ifindex = port.netdev.ifindex;
            let name = self.name(ifindex);
            for (d, standing) in Direction::BOTH.into_iter().zip(standing) {
                let here = |n: &netdev_providers::Netdev, of| {
                    n.generation == port.netdev.generation && of == d
                };
                let slot = self.slots.iter().find(|s| here(&s.netdev, s.direction));
                let past = self.past.iter().find(|p| here(&p.netdev, p.direction));
                let (verdict, cause) = match (slot, past) {
                    (Some(slot), _) if slot.state == SlotState::Installed => {
                        match self.blocked(slot) {
                            Some(cause) => (cause.sentence(), Some(cause)),
                            None => (installed(slot, &self.egress(slot)), None),
                        }
                    }
                    (Some(slot), _) => {
                        let cause = self.of_slot(slot);
                        (cause.sentence(), Some(cause))
                    }
                    (None, Some(past)) => {
                        let cause = self.of_past(past);
                        (cause.sentence(), Some(cause))
                    }
                    (None, None) => match standing {
                        Standing::Not(cause) if is_about(cause, &name) => {
                            (cause.sentence(), Some(cause.clone()))
                        }
                        _ if port.provider.is_none() => {
                            ("the port has no provider".to_owned(), None)
                        }
                        _ => (
                            "no packet of this direction has been seen in software here".to_owned(),
                            None,
                        ),
                    },
                };
                verdicts.push(PortVerdict {
                    port: name.clone(),
                    ifindex: ifindex.get(),
                    direction: d,
                    verdict,
                    matters: slot.is_some() || cause.is_some(),
                    help: cause.as_ref().and_then(Cause::help),
                    cause: cause.map(|c| c.name().to_owned()),
                    in_front: port.in_front.clone(),
                });
            }
        }
        verdicts
    }

    fn egress(&self, slot: &SlotView) -> String {
        slot.path.map(|p| self.name(p.egress)).unwrap_or_default()
    }
}

fn installed(slot: &SlotView, egress: &str) -> String {
    let place = match slot.in_hw {
        Some(true) => "in hardware",
        Some(false) => "in software",
        None => "installed; where is known after the next sweep",
    };
    format!("offloaded to {egress}, {place}: {} packets, {} bytes", slot.packets, slot.bytes)
}

/// Whether a cause that no slot tells is about this port.
fn is_about(cause: &Cause, port: &str) -> bool {
    matches!(
        cause,
        Cause::NoProvider(p, _) | Cause::Faulty(p, _) | Cause::Slow(p, _) | Cause::Down(p) | Cause::Draining(p) | Cause::Waiting(p)
            if p == port
    )
}
