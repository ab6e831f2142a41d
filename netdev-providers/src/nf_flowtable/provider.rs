//! The provider of one netdev: its elements.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use tracing::{debug, warn};

use super::key::{ConnId, Key};
use super::readback::goes_on;
use super::shared::{Shared, State, is_accounting};
use super::table::{CHANGES_PER_TRANSACTION, Change, Table, TableError, is_whole};
use crate::contract::flow::{Flow, Tracked};
use crate::contract::operation::{Done, Operation, Outcome, Request, Ticket};
use crate::contract::provider::{Counters, Fault, Provider, Repaired, RuleReport};
use crate::contract::reason::{Reason, Rejection};
use crate::contract::types::{Cookie, Ifindex, Netdev, RuleId};
use crate::netlink::error::KernelError;
use crate::netlink::front::in_front;

/// An element that is in.
#[derive(Clone, Copy, Debug)]
struct Rule {
    cookie: Cookie,
    key: Key,
    conn: ConnId,
    /// conntrack's counters of this direction when the element was added.
    base: Counters,
    /// What has been reported.
    counters: Counters,
}

/// The provider of one netdev.
#[derive(Debug)]
pub(super) struct NfFlowtable {
    shared: Arc<Shared>,
    netdev: Netdev,
    rules: Mutex<HashMap<RuleId, Rule>>,
    broken: Mutex<Broken>,
    /// What [`describe`](Provider::describe) said last.
    about: Mutex<String>,
    /// Who packets pass before they come to the flowtable.
    front: Mutex<Vec<String>>,
}

/// What is to be put in order when there is an occasion.
#[derive(Debug, Default)]
struct Broken {
    /// Elements of which it is not known whether they are in, and that must go.
    unsettled: Vec<Key>,
    /// Connections whose elements are gone and whose entry had ended when it was looked for.
    lately: Vec<ConnId>,
    /// Why the flowtable is to be renewed.
    renew: Option<&'static str>,
}

const STRAY: &str = "connections that are selected no more are in the flowtable";
const RENAMED: &str = "the flowtable knows the netdev by another name than it has now";

/// An operation on its way.
struct Pending {
    ticket: Ticket,
    change: Change,
    conn: ConnId,
    what: What,
}

enum What {
    Add { cookie: Cookie },
    Delete { rule: RuleId },
}

/// A NIC that has the entry sends past the stack.
fn passes_egress(state: &State, flow: &Flow) -> Result<(), Rejection> {
    if state.table.as_ref().is_some_and(Table::is_hardware) {
        flow.check_egress("a flowtable in hardware")?;
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl NfFlowtable {
    pub(super) fn new(shared: Arc<Shared>, netdev: Netdev) -> Self {
        Self {
            shared,
            netdev,
            rules: Mutex::default(),
            broken: Mutex::default(),
            about: Mutex::default(),
            front: Mutex::default(),
        }
    }

    /// Whatever stands at the ingress hook of TC, and in front of that, packets pass before they come to the
    /// flowtable.
    pub(super) fn look_in_front(&self) {
        match in_front(self.netdev.ifindex, u16::MAX) {
            Ok(front) => *lock(&self.front) = front.into_iter().map(|f| f.what).collect(),
            Err(e) => debug!(port = %self.netdev, "who is in front: {e}"),
        }
    }

    /// The change that an operation asks for; what needs none is completed.
    fn accept(&self, state: &mut State, op: Operation, adding: &mut usize) -> Option<Pending> {
        let Operation { request, ticket } = op;
        match request {
            Request::Established { .. } => {
                ticket.complete(Ok(Done::Noted));
                None
            }
            Request::Track { .. } => {
                ticket.complete(Err(Tracked::unsupported()));
                None
            }
            // The table belongs to the socket and goes with its engine: nothing is ever observed.
            Request::Adopt { .. } => {
                ticket.complete(Err(Reason::Conflict.into()));
                None
            }
            Request::Delete { rule, .. } => match lock(&self.rules).get(&rule) {
                Some(r) => {
                    let change = Change::Delete(r.key);
                    Some(Pending { ticket, change, conn: r.conn, what: What::Delete { rule } })
                }
                None => {
                    ticket.complete(Ok(Done::Deleted));
                    None
                }
            },
            Request::Add { cookie, flow } => {
                let fits = self
                    .can_offload(&flow)
                    .and_then(|()| passes_egress(state, &flow))
                    .and_then(|()| self.look_above(state, &flow))
                    .and_then(|()| state.takes_to(&flow));
                if let Err(why) = fits {
                    ticket.complete(Err(why));
                    return None;
                }
                if lock(&self.rules).len() + *adding >= self.shared.config.max_rules {
                    ticket.complete(Err(Reason::TableFull.into()));
                    return None;
                }
                *adding += 1;
                let change = Change::Add(Key::new(self.netdev.ifindex, &flow));
                let conn = ConnId::of(&flow);
                Some(Pending { ticket, change, conn, what: What::Add { cookie } })
            }
        }
    }

    /// Prepares for the netdevs above that route the flow.
    fn look_above(&self, state: &mut State, flow: &Flow) -> Result<(), Rejection> {
        // Without a table the change itself says what is wrong.
        let Some(table) = &mut state.table else { return Ok(()) };
        let mut look = |top: Option<Ifindex>, below, reason| {
            let Some(top) = top else { return Ok(()) };
            table.route_above(top, below).map_err(|e| {
                let lasting = matches!(
                    e,
                    TableError::BelowBond { .. }
                        | TableError::BelowVrf { .. }
                        | TableError::Ambiguous { .. }
                );
                let reason = if lasting { reason } else { Reason::Busy };
                Rejection::with_detail(reason, e.to_string())
            })
        };
        look(flow.above.iif, self.netdev.ifindex, Reason::IngressUnsupported)?;
        look(flow.above.oif, flow.forward.egress, Reason::EgressUnsupported)
    }

    /// Carries out what is pending, in one transaction, or, when elements are refused, in another
    /// without those. Returns what took effect.
    fn commit(&self, state: &mut State, mut pending: Vec<Pending>) -> Vec<Pending> {
        while !pending.is_empty() {
            let Some(table) = &mut state.table else {
                pending.into_iter().for_each(|p| p.ticket.complete(Err(Reason::NetdevGone.into())));
                return Vec::new();
            };
            let changes: Vec<_> = pending.iter().map(|p| p.change).collect();
            let answers = match table.change(&changes) {
                Ok(answers) => answers,
                Err(e) => {
                    warn!(port = %self.netdev, "{} elements: {e}", changes.len());
                    let why = Rejection::with_detail(Reason::Busy, e.to_string());
                    for p in pending {
                        if let Change::Add(key) = p.change {
                            lock(&self.broken).unsettled.push(key);
                        }
                        p.ticket.complete(Err(why.clone()));
                    }
                    return Vec::new();
                }
            };
            if is_whole(&answers) {
                return pending;
            }
            let (mut again, mut gone) = (Vec::new(), Vec::new());
            for (p, answer) in pending.into_iter().zip(answers) {
                match (answer, &p.what) {
                    (Ok(()), _) => again.push(p),
                    // It is not there: that is what was wanted.
                    (Err(e), What::Delete { .. }) if e.errno == Errno::ENOENT => gone.push(p),
                    (Err(e), _) => p.ticket.complete(Err(refusal(e, &p.change, &p.conn))),
                }
            }
            if !gone.is_empty() {
                let mut done = self.commit(state, again);
                done.extend(gone);
                return done;
            }
            pending = again;
        }
        pending
    }

    /// What is in the maps follows what is in the kernel.
    fn note(&self, state: &mut State, done: &[Pending]) -> (Vec<(RuleId, Rule)>, Vec<ConnId>) {
        let (mut added, mut removed) = (Vec::new(), Vec::new());
        let mut rules = lock(&self.rules);
        for p in done {
            match p.what {
                What::Add { cookie } => {
                    let conn = p.conn;
                    let (Change::Add(key) | Change::Delete(key)) = p.change;
                    let (base, counters) = (Counters::default(), Counters::default());
                    let rule = RuleId(self.shared.new_rule());
                    rules.insert(rule, Rule { cookie, key, conn, base, counters });
                    *state.selected.entry(conn).or_default() += 1;
                    added.push((rule, Rule { cookie, key, conn, base, counters }));
                }
                What::Delete { rule } => {
                    if let Some(r) = rules.remove(&rule) {
                        state.deselect(&r.conn);
                        removed.push(r.conn);
                    }
                }
            }
        }
        (added, removed)
    }

    /// Counters start from what conntrack has counted so far.
    fn set_bases(&self, added: &[(RuleId, Rule)]) {
        if added.is_empty() || is_accounting() != Some(true) {
            return;
        }
        let conns: Vec<_> = added.iter().map(|(_, r)| r.conn).collect();
        let entries = match self.shared.read_back(|r| r.get(&conns)) {
            Ok(entries) => entries,
            Err(e) => return debug!(port = %self.netdev, "counters start from 0: {e}"),
        };
        let mut rules = lock(&self.rules);
        for ((rule, r), entry) in added.iter().zip(entries) {
            let counters = entry.and_then(|e| e.counters);
            if let (Some(counters), Some(rule)) = (counters, rules.get_mut(rule)) {
                rule.base = counters[r.cookie.direction.index()];
            }
        }
    }

    /// Ends the entries of these connections, whose elements are gone, where they do not end by
    /// themselves.
    fn end_entries(&self, state: &mut State, conns: &[ConnId]) -> Result<(), Fault> {
        if conns.is_empty() {
            return Ok(());
        }
        let Some(table) = &mut state.table else { return Ok(()) };
        let entries = self.shared.read_back(|r| r.get(conns))?;
        if entries.iter().flatten().any(goes_on) {
            table.renew().map_err(|e| fault(&e, "renewing the flowtable"))?;
        } else {
            lock(&self.broken).lately.extend(conns);
        }
        Ok(())
    }

    /// Puts in order what was found broken.
    fn repair(&self, state: &mut State) {
        let (unsettled, renew) = {
            let mut broken = lock(&self.broken);
            (std::mem::take(&mut broken.unsettled), broken.renew.take())
        };
        let Some(table) = &mut state.table else { return };
        if !unsettled.is_empty() {
            let changes: Vec<_> = unsettled.iter().map(|k| Change::Delete(*k)).collect();
            for change in changes.chunks(1) {
                match table.change(change) {
                    Ok(answers)
                        if answers
                            .iter()
                            .all(|a| a.as_ref().err().is_none_or(|e| e.errno == Errno::ENOENT)) => {
                    }
                    _ => {
                        let (Change::Add(key) | Change::Delete(key)) = change[0];
                        lock(&self.broken).unsettled.push(key);
                    }
                }
            }
        }
        if renew.is_some()
            && let Err(e) = table.renew()
        {
            warn!(port = %self.netdev, "renewing the flowtable: {e}");
            lock(&self.broken).renew = renew;
        }
    }

    /// Looks whether the flowtable has lost the netdev to another name.
    fn look_for_name(&self, state: &mut State) {
        let Some(table) = &mut state.table else { return };
        match table.is_known_by_name(self.netdev.ifindex) {
            Ok(true) => {}
            Ok(false) => lock(&self.broken).renew = Some(RENAMED),
            Err(e) => debug!(port = %self.netdev, "reading its name: {e}"),
        }
    }
}

impl State {
    /// Whether the kernel makes an entry for packets that leave by this netdev.
    fn takes_to(&self, flow: &Flow) -> Result<(), Rejection> {
        let Some(table) = &self.table else { return Ok(()) };
        if self.alone || table.ports().contains(&flow.forward.egress) {
            return Ok(());
        }
        let why = "the packets leave by a netdev that is no port of nf-flowtable: this kernel makes an entry only where both netdevs of a connection are in the flowtable";
        Err(Rejection::with_detail(Reason::EgressUnsupported, why))
    }

    fn deselect(&mut self, conn: &ConnId) {
        if let Some(n) = self.selected.get_mut(conn) {
            *n -= 1;
            if *n == 0 {
                self.selected.remove(conn);
            }
        }
    }
}

/// A refusal names the element: the transaction had others.
fn refusal(e: KernelError, change: &Change, conn: &ConnId) -> Rejection {
    let (Change::Add(key) | Change::Delete(key)) = change;
    let detail = format!("element {} of set {}: {e}", conn.original, key.set.name());
    // The set, or the kernel's memory for it, is full.
    let full = matches!(e.errno, Errno::ENFILE | Errno::EMFILE);
    let mut why = Rejection::from(e);
    if full {
        why.reason = Reason::TableFull;
    }
    why.detail = Some(detail.into());
    why
}

fn fault(e: &TableError, what: &str) -> Fault {
    Fault { what: what.to_owned(), errno: e.errno(), detail: Some(e.to_string()) }
}

impl Provider for NfFlowtable {
    fn can_offload(&self, flow: &Flow) -> Result<(), Rejection> {
        let unsupported = |why: &str| Err(Rejection::with_detail(Reason::Unsupported, why));
        flow.check_netdevs()?;
        let (from, to) = (&flow.matches.tuple, &flow.forward.tuple);
        if from.is_ipv6() != to.is_ipv6() || from.proto() != to.proto() {
            return unsupported("the address family or the protocol changes on the way");
        }
        if flow.forward.macs.is_none() {
            return unsupported("a flowtable routes: bridged packets do not pass it");
        }
        Ok(())
    }

    fn submit(&self, batch: Vec<Operation>) {
        let mut state = self.shared.state();
        if batch.is_empty() {
            self.look_for_name(&mut state);
        }
        self.repair(&mut state);
        let mut completed: Vec<(Ticket, Outcome)> = Vec::with_capacity(batch.len());
        let mut batch = batch.into_iter().peekable();
        let mut ending = Vec::new();
        let mut deleted = Vec::new();
        while batch.peek().is_some() {
            let mut adding = 0;
            let chunk: Vec<_> = batch
                .by_ref()
                .take(CHANGES_PER_TRANSACTION)
                .filter_map(|op| self.accept(&mut state, op, &mut adding))
                .collect();
            let done = self.commit(&mut state, chunk);
            let (added, removed) = self.note(&mut state, &done);
            self.set_bases(&added);
            ending.extend(removed);
            let mut added = added.into_iter();
            for p in done {
                match p.what {
                    What::Add { .. } => {
                        if let Some((rule, _)) = added.next() {
                            completed.push((p.ticket, Ok(Done::added(rule, None))));
                        }
                    }
                    What::Delete { .. } => deleted.push(p.ticket),
                }
            }
        }
        if let Err(e) = self.end_entries(&mut state, &ending) {
            // The elements are gone, so nobody would ask again: the entries go at the next occasion.
            warn!(port = %self.netdev, "{e}");
            lock(&self.broken).renew = Some(STRAY);
        }
        drop(state);
        completed.extend(deleted.into_iter().map(|t| (t, Ok(Done::Deleted))));
        for (ticket, outcome) in completed {
            ticket.complete(outcome);
        }
    }

    fn repair(&self) -> Repaired {
        self.submit(Vec::new());
        self.look_in_front();
        Repaired::AsItWas
    }

    fn in_front(&self) -> Vec<String> {
        lock(&self.front).clone()
    }

    fn usage(&self, report: &mut dyn FnMut(RuleReport)) -> Result<(), Fault> {
        self.look_in_front();
        let hardware = {
            let mut state = self.shared.state();
            self.look_for_name(&mut state);
            let mut broken = lock(&self.broken);
            // One sweep after the delete is soon enough to be sure, and late enough.
            let lately: Vec<_> = std::mem::take(&mut broken.lately)
                .into_iter()
                .filter(|c| !state.selected.contains_key(c))
                .collect();
            if !lately.is_empty() {
                let entries = self.shared.read_back(|r| r.get(&lately))?;
                if entries.iter().flatten().any(goes_on) {
                    broken.renew = Some(STRAY);
                }
            }
            state.table.as_ref().is_some_and(|t| t.is_hardware())
        };
        self.shared.read_back(|r| {
            r.offloaded(|entries| {
                let mut rules = lock(&self.rules);
                for (id, rule) in rules.iter_mut() {
                    let entry = entries.get(&rule.conn);
                    if let Some(now) = entry.and_then(|e| e.counters) {
                        let now = now[rule.cookie.direction.index()];
                        let since = Counters {
                            packets: now.packets.saturating_sub(rule.base.packets),
                            bytes: now.bytes.saturating_sub(rule.base.bytes),
                        };
                        if since.packets >= rule.counters.packets {
                            rule.counters = since;
                        }
                    }
                    // Nothing is known of one that is not in the flowtable (yet).
                    let in_hw = entry.map(|e| hardware && e.status.hw_offload());
                    report(RuleReport {
                        cookie: rule.cookie,
                        rule: *id,
                        counters: rule.counters,
                        in_hw,
                    });
                }
            })
        })?;
        match lock(&self.broken).renew {
            Some(why) => Err(Fault::new(why)),
            None => Ok(()),
        }
    }

    fn flush(&self) -> Result<u64, Fault> {
        let mut state = self.shared.state();
        let (keys, conns): (Vec<_>, Vec<_>) =
            lock(&self.rules).values().map(|r| (r.key, r.conn)).unzip();
        let Some(table) = &mut state.table else { return Ok(0) };
        table.delete_all(&keys).map_err(|e| fault(&e, "removing the elements of the port"))?;
        lock(&self.rules).clear();
        conns.iter().for_each(|c| state.deselect(c));
        self.end_entries(&mut state, &conns)?;
        Ok(keys.len() as u64)
    }

    fn release(&self) -> Result<(), Fault> {
        let flushed = self.flush().map(drop);
        let detached = self.shared.detach(&self.netdev);
        flushed.and(detached)
    }

    fn describe(&self) -> String {
        // Whoever has it may wait for the kernel; whoever only wants to know does not.
        let Some(state) = self.shared.try_state() else { return lock(&self.about).clone() };
        let Some(table) = &state.table else { return String::new() };
        let place = if table.is_hardware() { "in hardware and software" } else { "in software" };
        let mut text = format!(
            "flowtable {} of table inet {}, {place}",
            table.flowtable(),
            self.shared.config.table
        );
        if !state.alone {
            text += "; for connections between its ports, as this kernel has it";
        }
        if is_accounting() == Some(false) {
            text += "; no counters: net.netfilter.nf_conntrack_acct is 0";
        }
        lock(&self.about).clone_from(&text);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::flow::{Above, FlowMatch, Forward};
    use crate::contract::types::{Direction, Ifindex, Zone};

    #[test]
    fn a_refusal_names_the_element_that_was_refused() {
        let tuple = "udp 192.0.2.1:1 > 192.0.2.2:2".parse().unwrap();
        let flow = Flow {
            zone: Zone(0),
            direction: Direction::Original,
            ingress_mtu: 1500,
            matches: FlowMatch { eth_dst: None, vlan: None, tuple },
            forward: Forward {
                egress: Ifindex::new(2).unwrap(),
                vlan: None,
                mtu: 1500,
                tuple,
                macs: None,
                egress_decides: false,
            },
            above: Above::default(),
        };
        let add = Change::Add(Key::new(Ifindex::new(1).unwrap(), &flow));
        let refused =
            |errno| refusal(KernelError { errno, extack: None }, &add, &ConnId::of(&flow));
        let full = refused(Errno::ENFILE);
        assert_eq!(full.reason, Reason::TableFull);
        let words = full.detail.unwrap();
        assert!(words.starts_with("element udp 192.0.2.1:1 > 192.0.2.2:2 of set orig4"), "{words}");
        assert_eq!(refused(Errno::ENOMEM).reason, Reason::Busy);
    }
}
