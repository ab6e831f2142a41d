//! The writer of a port: from a batch of operations to their results.
//!
//! The deletes of a batch are carried out first, then its adds, each by one system call: an add of a batch may be for
//! packets whose rule the batch deletes, and never the other way round.

use std::collections::HashMap;
use std::sync::Arc;

use aya::maps::Map;
use nix::errno::Errno;
use tracing::{info, warn};

use super::entry::{ENTRY, Entry, KEY, Key, RuleNumber};
use super::maps::{Egress, Flows};
use super::object::{Object, fault};
use super::pins::Pins;
use super::place::{Place, Standing};
use super::shared::{Shared, lock};
use super::table::{NoRoom, Rule, Table};
use crate::contract::flow::{Flow, Tracked};
use crate::contract::operation::{Done, Operation, Outcome, Request, Ticket};
use crate::contract::provider::{Fault, Leftover, Observed};
use crate::contract::reason::{Reason, Rejection};
use crate::contract::types::{Cookie, Ifindex, RuleId};
use crate::netlink::error::reason_of;
use crate::netlink::front::xdp_of;
use crate::netlink::generic::xdp_features;

/// Results that are given when nothing is held any more.
type Results = Vec<(Ticket, Outcome)>;

/// What is to go, and what is said when it is gone.
struct Removal {
    ticket: Ticket,
    number: RuleNumber,
    key: Key,
    then: Outcome,
}

/// Who adds and deletes.
#[derive(Debug)]
pub(super) struct Writer {
    ifindex: Ifindex,
    object: Object,
    pins: Option<Pins>,
    /// The array that the table stands in.
    current: Map,
    flows: Arc<Flows>,
    egress: Egress,
    table: Table,
    capacity: u32,
    /// `None`: somebody took it away, or after the end.
    standing: Option<Standing>,
    /// Where it stood that somebody took away, and that could not be put there again yet.
    lost: Option<Place>,
    /// What leftovers do, as they were read.
    observed: HashMap<RuleNumber, Entry>,
    /// The engine is to be told that its rules are gone.
    rules_gone: bool,
}

/// What a writer is made of.
pub(super) struct Parts {
    pub(super) ifindex: Ifindex,
    pub(super) object: Object,
    pub(super) pins: Option<Pins>,
    pub(super) current: Map,
    pub(super) flows: Arc<Flows>,
    pub(super) egress: Egress,
    pub(super) standing: Standing,
    pub(super) capacity: u32,
}

impl Writer {
    /// What stands in the table already was left by a dead engine.
    pub(super) fn new(parts: Parts) -> Result<Self, Fault> {
        let Parts { ifindex, object, pins, current, flows, egress, standing, capacity } = parts;
        let mut writer = Self {
            ifindex,
            object,
            pins,
            current,
            flows,
            egress,
            table: Table::new(capacity),
            capacity,
            standing: Some(standing),
            lost: None,
            observed: HashMap::new(),
            rules_gone: false,
        };
        let mut left = Vec::new();
        let mut strange = Vec::new();
        writer.read(|key, entry| match entry.cookie() {
            Some(cookie) => left.push((entry.rule(), Rule { key, cookie, left: true })),
            None => strange.push(key.0),
        })?;
        strange.extend(writer.table.take_over(left).into_iter().map(|rule| rule.key.0));
        writer.flows.remove(&strange);
        if writer.table.len() > 0 {
            info!(%ifindex, rules = writer.table.len(), "a dead engine has left rules, which go on forwarding");
        }
        Ok(writer)
    }

    pub(super) fn flows(&self) -> Arc<Flows> {
        Arc::clone(&self.flows)
    }

    pub(super) fn place(&self) -> Option<Place> {
        self.standing.as_ref().map(|s| s.place)
    }

    fn read(&self, each: impl FnMut(Key, Entry)) -> Result<(), Fault> {
        self.flows.read(each).map_err(|e| fault("reading the table", &e))
    }

    /// Carries out a batch.
    pub(super) fn submit(&mut self, shared: &Shared, batch: Vec<Operation>) -> Results {
        let mut results = Results::with_capacity(batch.len());
        let (mut removals, mut adds) = (Vec::new(), Vec::new());
        for Operation { request, ticket } in batch {
            match request {
                Request::Established { .. } => results.push((ticket, Ok(Done::Noted))),
                Request::Track { .. } => results.push((ticket, Err(Tracked::unsupported()))),
                Request::Delete { rule, cookie } => match self.number(rule, cookie) {
                    Some((number, key)) => {
                        removals.push(Removal { ticket, number, key, then: Ok(Done::Deleted) });
                    }
                    // That of the cookie is gone, as asked for.
                    None => results.push((ticket, Ok(Done::Deleted))),
                },
                Request::Adopt { found, cookie, flow } => {
                    match self.adopt(shared, found, cookie, &flow) {
                        Ok(done) => results.push((ticket, Ok(done))),
                        Err((why, Some((number, key)))) => {
                            removals.push(Removal { ticket, number, key, then: Err(why) });
                        }
                        Err((why, None)) => results.push((ticket, Err(why))),
                    }
                }
                Request::Add { cookie, flow } => adds.push((ticket, cookie, flow)),
            }
        }
        self.remove(shared, removals, &mut results);
        self.add(shared, adds, &mut results);
        results
    }

    /// A rule of this name and cookie.
    fn number(&self, rule: RuleId, cookie: Cookie) -> Option<(RuleNumber, Key)> {
        let number = RuleNumber::of(rule)?;
        let rule = self.table.get(number).filter(|r| r.cookie == cookie)?;
        Some((number, rule.key))
    }

    /// Takes a leftover over; else says why not, and which it is that has to go.
    fn adopt(
        &mut self,
        shared: &Shared,
        found: RuleId,
        cookie: Cookie,
        flow: &Flow,
    ) -> Result<Done, (Rejection, Option<(RuleNumber, Key)>)> {
        let number = RuleNumber::of(found);
        let left = number.and_then(|n| Some((n, *self.table.get(n).filter(|r| r.left)?)));
        let Some((number, rule)) = left else {
            return Err((Rejection::with_detail(Reason::Conflict, "no such rule was left"), None));
        };
        let stands = self.observed.remove(&number);
        let frags = shared
            .can_offload(flow)
            .and_then(|()| self.lead_to(flow.forward.egress))
            .map_err(|why| (why, Some((number, rule.key))))?;
        let wanted = Entry::new(flow, cookie, number, frags);
        let is_same = stands.is_some_and(|s| s.does_what(&wanted));
        if !is_same || rule.key != Key::of(&flow.matches) {
            let why =
                Rejection::with_detail(Reason::Conflict, "the rule is not what it would be now");
            return Err((why, Some((number, rule.key))));
        }
        if let Some(rule) = self.table.get_mut(number) {
            (rule.left, rule.cookie) = (false, cookie);
        }
        lock(&shared.adopted).insert(number, cookie);
        Ok(Done::added(found, Some(false)))
    }

    fn remove(&mut self, shared: &Shared, removals: Vec<Removal>, results: &mut Results) {
        if removals.is_empty() {
            return;
        }
        let keys: Vec<[u8; KEY]> = removals.iter().map(|r| r.key.0).collect();
        let mut refused = self.flows.remove(&keys).into_iter().peekable();
        let mut adopted = lock(&shared.adopted);
        for (n, Removal { ticket, number, then, .. }) in removals.into_iter().enumerate() {
            if let Some((_, e)) = refused.next_if(|&(at, _)| at == n) {
                results.push((ticket, Err(refusal(e))));
                continue;
            }
            self.table.remove(number);
            self.observed.remove(&number);
            adopted.remove(&number);
            results.push((ticket, then));
        }
    }

    fn add(
        &mut self,
        shared: &Shared,
        adds: Vec<(Ticket, Cookie, Box<Flow>)>,
        results: &mut Results,
    ) {
        let mut pending = Vec::with_capacity(adds.len());
        let mut keys: Vec<[u8; KEY]> = Vec::with_capacity(adds.len());
        let mut entries: Vec<[u8; ENTRY]> = Vec::with_capacity(adds.len());
        let mut leads: HashMap<Ifindex, Result<bool, Rejection>> = HashMap::new();
        for (ticket, cookie, flow) in adds {
            let egress = flow.forward.egress;
            let prepared = self.can_add().and_then(|()| shared.can_offload(&flow)).and_then(|()| {
                let frags = leads.entry(egress).or_insert_with(|| self.lead_to(egress)).clone()?;
                let key = Key::of(&flow.matches);
                let number =
                    self.table.insert(Rule { key, cookie, left: false }).map_err(no_room)?;
                Ok((number, key, Entry::new(&flow, cookie, number, frags)))
            });
            match prepared {
                Ok((number, key, entry)) => {
                    pending.push((ticket, number));
                    keys.push(key.0);
                    entries.push(entry.0);
                }
                Err(why) => results.push((ticket, Err(why))),
            }
        }
        let mut refused = self.flows.write(&keys, &entries).into_iter().peekable();
        for (n, (ticket, number)) in pending.into_iter().enumerate() {
            let outcome = match refused.next_if(|&(at, _)| at == n) {
                Some((_, e)) => {
                    self.table.remove(number);
                    Err(refusal(e))
                }
                None => Ok(Done::added(number.id(), Some(false))),
            };
            results.push((ticket, outcome));
        }
    }

    fn can_add(&self) -> Result<(), Rejection> {
        match (&self.standing, self.lost) {
            (Some(_), _) => Ok(()),
            (None, Some(_)) => {
                let why = "somebody took the program of the port away";
                Err(Rejection::with_detail(Reason::Busy, why))
            }
            (None, None) => Err(Reason::NetdevGone.into()),
        }
    }

    /// Sees to it that the program may lead to a netdev; returns whether frames in several buffers can be sent there.
    fn lead_to(&mut self, egress: Ifindex) -> Result<bool, Rejection> {
        let no = |why: String| Err(Rejection::with_detail(Reason::EgressUnsupported, why));
        let mut frags = false;
        if self.place() == Some(Place::Xdp) {
            match xdp_sends(egress) {
                Ok(Some(sends_frags)) => frags = sends_frags,
                Ok(None) => {
                    let _ = self.egress.remove(egress);
                    return no(format!("XDP cannot send to the netdev with ifindex {egress}"));
                }
                Err(e) => return no(format!("the netdev with ifindex {egress}: {e}")),
            }
        }
        // The kernel takes out those that go, and the number may be another's now.
        if self.egress.has(egress).unwrap_or(false) {
            return Ok(frags);
        }
        match self.egress.insert(egress) {
            Ok(()) => Ok(frags),
            Err(e) => no(format!("no netdev with ifindex {egress} to redirect to: {e}")),
        }
    }

    /// What dead engines have left.
    pub(super) fn observe(&mut self) -> Result<Observed, Fault> {
        let mut observed = HashMap::new();
        let mut leftovers = Vec::new();
        self.read(|key, entry| {
            let number = entry.rule();
            if let Some(rule) = self.table.get(number).filter(|r| r.left && r.key == key) {
                leftovers.push(Leftover {
                    rule: number.id(),
                    cookie: rule.cookie,
                    tuple: key.tuple(),
                    counters: entry.counters(),
                });
                observed.insert(number, entry);
            }
        })?;
        self.observed = observed;
        let around = self.standing.as_ref().map(Standing::around);
        let foreign = match around {
            Some(Ok(around)) => around.front.len() + around.behind.len(),
            _ => 0,
        };
        Ok(Observed { leftovers, foreign: foreign as u64 })
    }

    /// Another table, which is empty, stands in the place of the one with the rules.
    pub(super) fn flush(&mut self, shared: &Shared) -> Result<u64, Fault> {
        let count = self.table.own() as u64;
        if self.table.len() > 0 {
            self.flows = Flows::replace(&mut self.current, self.capacity)
                .map_err(|e| fault("replacing the table", &e))?;
            *lock(&shared.flows) = self.flows();
        }
        self.table.clear();
        self.observed.clear();
        lock(&shared.adopted).clear();
        Ok(count)
    }

    /// Whether the engine is to be told; once.
    pub(super) fn take_rules_gone(&mut self) -> bool {
        std::mem::take(&mut self.rules_gone)
    }

    /// Looks whether the program stands, and who else is there; puts it there again where somebody took it away.
    pub(super) fn look(&mut self, shared: &Shared) {
        let ifindex = self.ifindex;
        match self.standing.as_ref().map(Standing::stands) {
            Some(Ok(true)) | None => {}
            Some(Ok(false)) => self.note_loss(),
            Some(Err(e)) => return warn!(%ifindex, "whether the program stands: {e}"),
        }
        if let Some(place) = self.lost {
            self.put_again(shared, place);
        }
        let Some(standing) = &self.standing else { return };
        let around = match standing.around() {
            Ok(around) => around,
            Err(e) => return warn!(%ifindex, "who else is at the netdev: {e}"),
        };
        let overtakes = !around.behind.is_empty();
        if overtakes != shared.overtakes() {
            let what = if overtakes { "rules are taken back" } else { "rules are taken again" };
            warn!(%ifindex, others = ?around.behind, "{what}: of who is behind the program");
            shared.set_around(around);
            if overtakes {
                if let Err(e) = self.flush(shared) {
                    warn!(%ifindex, "{e}");
                }
                self.rules_gone = true;
            }
            return;
        }
        shared.set_around(around);
        self.look_at_egress();
    }

    fn note_loss(&mut self) {
        let Some(standing) = self.standing.take() else { return };
        warn!(ifindex = %self.ifindex, "somebody took the program of the port away ({})", standing.place);
        self.lost = Some(standing.place);
        if let Some(pins) = &self.pins {
            let _ = pins.remove_link();
        }
        let _ = standing.remove();
    }

    /// With the table that it had, or, if that cannot be now, without rules until it can.
    fn put_again(&mut self, shared: &Shared, place: Place) {
        let ifindex = self.ifindex;
        let instead = (place == Place::Tcx).then_some(Place::Clsact);
        for place in [Some(place), instead].into_iter().flatten() {
            match Standing::put(place, ifindex, &mut self.object, self.pins.as_ref()) {
                Ok(standing) => {
                    info!(%ifindex, "the program of the port stands again ({place})");
                    self.standing = Some(standing);
                    self.lost = None;
                    return;
                }
                Err(e) => warn!(%ifindex, "{e}"),
            }
        }
        self.rules_gone = self.table.own() > 0;
        if let Err(e) = self.flush(shared) {
            warn!(%ifindex, "{e}");
        }
    }

    /// Netdevs that XDP cannot send to any more are led to no longer: the packets go up the stack.
    fn look_at_egress(&mut self) {
        if self.place() != Some(Place::Xdp) {
            return;
        }
        for netdev in self.egress.all().unwrap_or_default() {
            if let Ok(None) = xdp_sends(netdev)
                && self.egress.remove(netdev).is_ok()
            {
                warn!(ifindex = %self.ifindex, egress = %netdev, "XDP can send to it no longer");
            }
        }
    }

    /// The end.
    pub(super) fn release(&mut self) -> Result<(), Fault> {
        let standing = self.standing.take();
        self.lost = None;
        let unpinned = self.pins.as_ref().map_or(Ok(()), Pins::remove);
        let removed = standing.map_or(Ok(()), Standing::remove);
        unpinned.map_err(|e| fault("removing the pins", &e))?;
        removed.map_err(|e| e.into_fault("removing the filter"))
    }

    /// Whether [`look`](Self::look) would find nothing new.
    pub(super) fn is_as_it_was(&self, shared: &Shared) -> bool {
        let Some(standing) = &self.standing else { return self.lost.is_none() };
        let around = standing.around();
        matches!(standing.stands(), Ok(true)) && around.is_ok_and(|now| now == shared.around())
    }
}

/// Whether XDP can send to a netdev, and if so, whether frames in several buffers too.
fn xdp_sends(netdev: Ifindex) -> Result<Option<bool>, crate::netlink::NetlinkError> {
    Ok(match xdp_features(netdev)? {
        Some(features) => features.sends().then(|| features.sends_fragments()),
        // Before 6.3 nothing tells; drivers that send have what they need for it when they have a program.
        None => (!xdp_of(netdev)?.is_empty()).then_some(false),
    })
}

fn no_room(why: NoRoom) -> Rejection {
    match why {
        NoRoom::Taken => {
            Rejection::with_detail(Reason::Conflict, "a rule with the same match is there already")
        }
        NoRoom::Full => Reason::TableFull.into(),
    }
}

fn refusal(errno: Errno) -> Rejection {
    let reason = if errno == Errno::E2BIG { Reason::TableFull } else { reason_of(errno) };
    Rejection { reason, errno: Some(errno), detail: None }
}
