//! Changes of links, neighbours and routes: ports come and go, and rules that have become wrong are
//! taken back before anything else.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::PoisonError;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use netdev_providers::{Ifindex, MacAddr, Reason, Rejection};

use super::backend::Shared;
use super::egress;
use super::routing::links::{Layer, Link};
use super::routing::monitor::NetEvent;
use super::routing::stack::{Frames, descend, routes_for};
use super::routing::switches::SwitchEvent;
use super::{AttachError, PortPolicy};
use crate::engine::conn::{ConnHandle, PathTaken};
use crate::engine::datapath::{PathHint, Sight};
use crate::engine::slot::SlotState;
use crate::engine::taken::TakenBack;
use crate::engine::view::SlotView;
use crate::engine::{Engine, FlushFilter};

/// Route events that come in a burst are answered together; the first of them at once after this.
const GATHER: Duration = Duration::from_millis(2);
/// What the kernel tells nobody of is looked at this often.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A port is not looked at more often because of others, ...
const BESIDE_EVERY: Duration = Duration::from_millis(100);
/// ... and once more when they have done nothing for so long: a qdisc that they have removed and not replaced until
/// then, they are not about to replace.
const BESIDE_AGAIN: Duration = Duration::from_millis(2100);

pub(super) struct Changes {
    backend: Shared,
    engine: Engine,
    policy: PortPolicy,
    /// Signalled when the links have been read, the first time.
    synced: Option<Sender<()>>,
    /// After a loss: the links that have been heard of again.
    heard: Option<HashSet<Ifindex>>,
    /// When that was looked at which the kernel tells nobody of.
    looked: Instant,
    /// Routes are to be asked for again then: a netdev has gone down or come up, and the kernel tells so before it
    /// changes them (`__dev_notify_flags`).
    unsettled: bool,
    /// Ports at whose ingress hook others have done something, and when they are looked at again: what others do
    /// takes them some steps.
    beside: HashMap<Ifindex, Again>,
    egress: egress::Watch,
}

/// When a port was looked at because of others, and when it is the next time.
#[derive(Clone, Copy, Debug)]
struct Again {
    looked: Instant,
    due: Instant,
}

/// What is answered for many events together.
#[derive(Default)]
struct Gathered {
    rerouted: Rerouted,
    /// What bridges have forgotten or learnt anew: when a port goes down, all that was behind it.
    moved: HashSet<(Ifindex, MacAddr)>,
    /// Where others have done something at the ingress hook.
    beside: HashSet<Ifindex>,
}

/// Which destinations have (perhaps) another route now. Of a routing protocol's whole table too, each address is
/// looked for by the lengths of prefix that there are.
#[derive(Default)]
struct Rerouted {
    all: bool,
    prefixes: HashSet<(IpAddr, u8)>,
    lengths: BTreeSet<u8>,
}

impl Rerouted {
    fn add(&mut self, (network, length): (IpAddr, u8)) {
        self.prefixes.insert((cut(network, length), length));
        self.lengths.insert(length);
    }

    fn is_empty(&self) -> bool {
        !self.all && self.prefixes.is_empty()
    }

    fn covers(&self, address: IpAddr) -> bool {
        self.all || self.lengths.iter().any(|&l| self.prefixes.contains(&(cut(address, l), l)))
    }
}

/// The network of a prefix that an address is in.
fn cut(address: IpAddr, length: u8) -> IpAddr {
    let length = u32::from(length);
    match address {
        IpAddr::V4(a) => {
            let mask = u32::MAX.checked_shl(32u32.saturating_sub(length)).unwrap_or(0);
            Ipv4Addr::from_bits(a.to_bits() & mask).into()
        }
        IpAddr::V6(a) => {
            let mask = u128::MAX.checked_shl(128u32.saturating_sub(length)).unwrap_or(0);
            Ipv6Addr::from_bits(a.to_bits() & mask).into()
        }
    }
}

impl Changes {
    pub(super) fn new(
        backend: Shared,
        engine: Engine,
        policy: PortPolicy,
        synced: Sender<()>,
    ) -> Self {
        Self {
            egress: egress::Watch::new(backend.clone(), engine.clone()),
            backend,
            engine,
            policy,
            synced: Some(synced),
            heard: None,
            looked: Instant::now(),
            unsettled: false,
            beside: HashMap::new(),
        }
    }

    /// Until the sender is gone.
    pub(super) fn run(mut self, events: &Receiver<NetEvent>) {
        loop {
            let mut gathered = Gathered::default();
            let now = Instant::now();
            let due = self.beside.values().map(|a| a.due.saturating_duration_since(now)).min();
            let left = LOOK_EVERY.saturating_sub(self.looked.elapsed());
            let left = left.min(due.unwrap_or(left)).min(self.egress.idle());
            match events.recv_timeout(left) {
                Ok(first) => self.event(first, &mut gathered),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if self.looked.elapsed() >= LOOK_EVERY {
                self.looked = Instant::now();
                gathered.rerouted.all |= std::mem::take(&mut self.unsettled);
                self.egress.look_for_programs();
                if self.backend.resolver().look() {
                    gathered.rerouted.add(whole(false));
                    gathered.rerouted.add(whole(true));
                }
            }
            while let Ok(next) = events.try_recv() {
                self.event(next, &mut gathered);
            }
            self.egress.look_when_due();
            self.look_beside(&std::mem::take(&mut gathered.beside));
            self.moved(&std::mem::take(&mut gathered.moved));
            if !gathered.rerouted.is_empty() {
                while let Ok(next) = events.recv_timeout(GATHER) {
                    self.event(next, &mut gathered);
                }
                self.look_beside(&gathered.beside);
                self.moved(&gathered.moved);
                self.reroute(&gathered.rerouted);
            }
        }
    }

    fn event(&mut self, event: NetEvent, gathered: &mut Gathered) {
        match event {
            NetEvent::Link(link) => self.link(link, gathered),
            NetEvent::LinkGone(ifindex) => self.link_gone(ifindex, gathered),
            NetEvent::Neighbour { ifindex, address, mac } => self.neighbour(ifindex, address, mac),
            NetEvent::Learnt { bridge, mac, behind } => {
                let before = self.backend.fdb().set(bridge, mac, behind);
                self.backend.changed();
                if before.is_some() && before != behind {
                    gathered.moved.insert((bridge, mac));
                }
            }
            NetEvent::BridgePort(ifindex, port) => {
                if let Some(link) = self.backend.links().get(ifindex) {
                    self.link(Link { port, ..link }, gathered);
                }
            }
            NetEvent::Switch(switch) => self.switch(&switch, gathered),
            NetEvent::Policies => self.policies(),
            NetEvent::Ingress(Some(ifindex)) => _ = gathered.beside.insert(ifindex),
            NetEvent::Ingress(None) => {
                gathered.beside.extend(self.engine.netdevs().iter().map(|n| n.ifindex));
            }
            NetEvent::Egress => self.egress.announced(),
            NetEvent::Told(told) => {
                if self.backend.tos().add(told) {
                    self.backend.changed();
                    gathered.rerouted.add(whole(told.is_of_ipv6()));
                }
            }
            NetEvent::Resilient => {
                if self.backend.resolver().resilient() {
                    self.backend.changed();
                    gathered.rerouted.add(whole(false));
                }
            }
            NetEvent::Mark(mark) => {
                if self.backend.marks().add(mark) {
                    self.backend.changed();
                    gathered.rerouted.add(whole(mark.ipv6));
                }
            }
            NetEvent::Routes(prefix) => {
                self.backend.changed();
                gathered.rerouted.add(prefix);
            }
            NetEvent::Lost => {
                tracing::warn!("rtnetlink events were lost: reading links and routes anew");
                self.heard = Some(HashSet::new());
                // What a bridge has forgotten meanwhile is not told; what it knows is.
                self.backend.fdb().clear();
            }
            NetEvent::Synced => {
                if let Some(heard) = self.heard.take() {
                    for link in self.backend.links().all() {
                        if !heard.contains(&link.ifindex) {
                            self.link_gone(link.ifindex, gathered);
                        }
                    }
                    self.restack();
                    gathered.rerouted.all = true;
                }
                // Only now: a packet that is sighted on the first port may leave by any netdev.
                self.egress.look();
                if let Some(synced) = self.synced.take() {
                    for link in self.backend.links().all() {
                        self.attach_or_clear(&link);
                    }
                    let _ = synced.send(());
                }
            }
        }
    }

    /// Frames with a priority tag belong to a VLAN device with the number 0, where there is one.
    fn look_below_vlan_0(&mut self, links: [Option<&Link>; 2]) {
        let below = links.into_iter().flatten().filter_map(|l| match l.layer {
            Layer::Vlan { lower, id: 0, .. } => lower,
            _ => None,
        });
        self.look_beside(&below.collect());
    }

    /// Has the providers look at what others have done on their netdevs: at once, and again a while later, but
    /// not for every one of many filters.
    fn look_beside(&mut self, changed: &HashSet<Ifindex>) {
        let now = Instant::now();
        for ifindex in changed {
            if self.engine.port(*ifindex).is_none() {
                continue;
            }
            let last = self.beside.get(ifindex).map(|a| a.looked);
            let looked = match last {
                Some(looked) if now.duration_since(looked) < BESIDE_EVERY => looked,
                _ => {
                    self.engine.put_in_order(*ifindex);
                    now
                }
            };
            self.beside.insert(*ifindex, Again { looked, due: now + BESIDE_AGAIN });
        }
        let due: Vec<_> =
            self.beside.iter().filter(|(_, a)| a.due <= now).map(|(i, _)| *i).collect();
        for ifindex in due {
            self.engine.put_in_order(ifindex);
            self.beside.remove(&ifindex);
        }
    }

    /// Packets of a netdev are forwarded no more, or again.
    fn switch(&self, switch: &SwitchEvent, gathered: &mut Gathered) {
        let ipv6 = switch.ipv6;
        if switch.routes {
            self.backend.changed();
            gathered.rerouted.add(whole(ipv6));
        }
        let switches = self.backend.switches();
        if !switches.set(switch) {
            return;
        }
        self.backend.changed();
        let (mut stale, mut again) = (0, 0);
        self.engine.each_slot(|conn, slot| {
            if conn.key().original.is_ipv6() != ipv6 || slot.path.is_some_and(|p| p.bridged) {
                return;
            }
            let Some(iif) = self.routed_on(conn, slot) else { return };
            // A VRF has no switch: that of the netdev that is enslaved to it counts.
            let (links, fdb) = (self.backend.links(), self.backend.fdb());
            let iif = routes_for(links, fdb, iif, slot.netdev.ifindex).unwrap_or(iif);
            match (switches.off(iif, ipv6), slot.state) {
                (None, SlotState::Rejected)
                    if slot
                        .rejection
                        .as_ref()
                        .is_some_and(|r| r.reason == Reason::NotForwarded) =>
                {
                    again += 1;
                    self.retract(conn, slot, TakenBack::Forwarding);
                }
                (Some(_), SlotState::Pending | SlotState::Installed) => {
                    stale += u32::from(self.retract(conn, slot, TakenBack::Forwarding));
                }
                _ => {}
            }
        });
        if stale + again > 0 {
            let netdev = switch.netdev.map(|i| self.backend.links().name(i));
            let netdev = netdev.as_deref().unwrap_or("all");
            tracing::info!(netdev, ipv6, rules = stale, again, "forwarding was switched");
        }
    }

    /// IPsec's policies have changed.
    fn policies(&self) {
        let ipsec = self.backend.ipsec();
        let known = ipsec.read();
        self.backend.changed();
        let (mut rules, mut again) = (0, 0);
        self.engine.each_slot(|conn, slot| {
            if slot.path.is_some_and(|p| p.bridged) {
                return;
            }
            let (arriving, leaving) = (conn.arriving(slot.direction), conn.leaving(slot.direction));
            // What cannot be read concerns everything.
            let concerned = known.is_err() || ipsec.concerns(&arriving, &leaving);
            match slot.state {
                SlotState::Rejected => {
                    let by_policy = |r: &Rejection| r.reason == Reason::IpsecPolicy;
                    if !concerned && slot.rejection.as_ref().is_some_and(by_policy) {
                        again += 1;
                        self.retract(conn, slot, TakenBack::Ipsec);
                    }
                }
                _ if concerned => rules += u32::from(self.retract(conn, slot, TakenBack::Ipsec)),
                _ => {}
            }
        });
        match known {
            Err(e) => tracing::error!(rules, "IPsec's policies cannot be read: {e}"),
            Ok(()) if rules + again > 0 => tracing::info!(rules, again, "IPsec's policies changed"),
            Ok(()) => {}
        }
    }

    /// The netdev that the packets of a slot are routed on: the port, or one above it. `None`: none of them has
    /// been seen.
    fn routed_on(&self, conn: &ConnHandle, slot: &SlotView) -> Option<Ifindex> {
        if let Some(path) = slot.path {
            return Some(path.iif.unwrap_or(slot.netdev.ifindex));
        }
        let known = self.backend.known_of(conn)?;
        let of = (slot.netdev.ifindex, slot.direction);
        known.sighted.iter().find(|s| (s.port, s.direction) == of).map(|s| s.iif)
    }

    /// The mark of the packet that was sighted; `None`: none was.
    fn mark_of(&self, conn: &ConnHandle, slot: &SlotView) -> Option<u32> {
        let known = self.backend.known_of(conn)?;
        let of = (slot.netdev.ifindex, slot.direction);
        known.sighted.iter().find(|s| (s.port, s.direction) == of).map(|s| s.mark)
    }

    /// Whether others may take the place of routes by a netdev, or of its share of those that have several next hops,
    /// now: what the kernel does without a word (`fib_sync_down_dev`, `fib_sync_up`, `fib_rebalance`). Rules that lead
    /// to it are taken back anyhow. What is enslaved to a bridge or a bond has no routes.
    fn reroutes(&self, old: &Link, new: &Link) -> bool {
        let enslaved = new.controller.and_then(Ifindex::new);
        let routes = enslaved.is_none_or(|c| self.backend.links().is_vrf(c));
        let ignored = || self.backend.switches().ignores_linkdown(new.ifindex);
        let shared = || self.backend.tos().shares();
        routes && ((old.up != new.up && shared()) || (old.carrier != new.carrier && ignored()))
    }

    fn link(&mut self, link: Link, gathered: &mut Gathered) {
        if let Some(heard) = &mut self.heard {
            heard.insert(link.ifindex);
        }
        let ifindex = link.ifindex;
        let mut above = self.backend.links().above(ifindex);
        let old = self.backend.links().set(link.clone());
        self.backend.changed();
        if old.as_ref() != Some(&link) {
            above.extend(self.backend.links().above(ifindex));
        }
        if let Some(old) = &old {
            let reroutes = self.reroutes(old, &link);
            gathered.rerouted.all |= reroutes;
            self.unsettled |= reroutes;
            let changed = old.mac != link.mac
                || old.mtu != link.mtu
                || old.layer != link.layer
                || old.port != link.port
                || old.controller != link.controller;
            // First what has this netdev anywhere in its stack, as it was or as it is.
            if changed || (old.up && !link.up) {
                self.retract_through(above, old, &link);
            }
            // Rules match on the port's MAC address and were made for its MTU.
            if changed && self.engine.port(ifindex).is_some() {
                tracing::info!(port = link.name, "MAC address, MTU or master changed: flushing");
                let why = TakenBack::Netdev;
                let port = FlushFilter { port: Some(ifindex), why, ..FlushFilter::default() };
                let _ = self.engine.flush(&port);
            }
            if changed || (old.up && !link.up) {
                self.engine.retract_egress(ifindex);
            }
            if changed || (!old.up && link.up) {
                self.retry_rejected();
            }
            if link.carrier && (old.carrier_ups, old.up) != (link.carrier_ups, true) {
                self.engine.link_returned(ifindex);
            }
        }
        if self.synced.is_none()
            && old
                .as_ref()
                .is_none_or(|o| (o.controller, &o.layer) != (link.controller, &link.layer))
        {
            super::watch(&self.backend, &self.engine);
        }
        if old.as_ref().is_some_and(|o| o.xdp != link.xdp) {
            self.look_beside(&HashSet::from([ifindex]));
        }
        if old.as_ref().is_none_or(|o| o.layer != link.layer) {
            self.look_below_vlan_0([old.as_ref(), Some(&link)]);
        }
        let renamed = old.as_ref().is_none_or(|o| o.name != link.name);
        if renamed && self.synced.is_none() {
            self.engine.put_in_order(ifindex);
            self.attach(&link);
        }
    }

    /// Takes back the rules whose packets are routed on this netdev or on one above it, on arrival or
    /// on departure, and not on the netdev that the rule stands on or redirects to; or that this bridge
    /// forwards.
    fn retract_through(&self, above: BTreeSet<Ifindex>, old: &Link, new: &Link) {
        // Most netdevs have nothing above them and nothing below.
        if above.is_empty() && (&old.layer, &new.layer) == (&Layer::Real, &Layer::Real) {
            return;
        }
        let mut netdevs = above;
        netdevs.insert(old.ifindex);
        let through = |i: Option<Ifindex>| i.is_some_and(|i| netdevs.contains(&i));
        let rules = self.retract_where(TakenBack::Netdev, |_, slot, p| {
            let in_port = p.iif.unwrap_or(slot.netdev.ifindex);
            through(p.iif)
                || through(p.oif)
                || (p.bridged && self.controller(in_port) == Some(old.ifindex))
        });
        if rules > 0 {
            tracing::info!(rules, "what is above or below a netdev changed: rules taken back");
        }
    }

    fn retract_where(
        &self,
        why: TakenBack,
        stale: impl Fn(&ConnHandle, &SlotView, &PathTaken) -> bool,
    ) -> u32 {
        let mut rules = 0;
        self.engine.each_slot(|conn, slot| {
            let is_stale = slot.path.is_some_and(|p| stale(conn, slot, &p));
            rules += u32::from(is_stale && self.retract(conn, slot, why));
        });
        rules
    }

    /// These addresses are behind another port of their bridge now, or behind none that is known:
    /// frames for them go elsewhere, and theirs come from elsewhere.
    fn moved(&self, moved: &HashSet<(Ifindex, MacAddr)>) {
        if moved.is_empty() {
            return;
        }
        // What is routed to a bridge, or to a netdev above one.
        let bridges: HashSet<Ifindex> = moved.iter().map(|(bridge, _)| *bridge).collect();
        let above: HashMap<_, _> =
            bridges.into_iter().map(|b| (b, self.backend.links().above(b))).collect();
        let mut routed = moved.clone();
        for (bridge, mac) in moved {
            routed.extend(above[bridge].iter().map(|oif| (*oif, *mac)));
        }
        let rules = self.retract_where(TakenBack::Bridge, |conn, slot, p| {
            if !p.bridged {
                return p.oif.zip(p.dst_mac).is_some_and(|to| routed.contains(&to));
            }
            self.controller(p.oif.unwrap_or(p.egress)).is_some_and(|bridge| {
                let ends = [p.dst_mac, self.backend.bridged_from(conn, slot)];
                ends.into_iter().flatten().any(|mac| moved.contains(&(bridge, mac)))
            })
        });
        if rules > 0 {
            let addresses = moved.len();
            tracing::info!(addresses, rules, "bridges' ports for them changed: rules taken back");
        }
    }

    fn controller(&self, port: Ifindex) -> Option<Ifindex> {
        Ifindex::new(self.backend.links().get(port)?.controller?)
    }

    /// After a loss of events: takes back what the stacks of netdevs, as they are now, do not lead to.
    fn restack(&self) {
        let (links, fdb) = (self.backend.links(), self.backend.fdb());
        let leads_to = |top, frames, real| {
            descend(links, fdb, top, frames).is_ok_and(|s| s.real.ifindex == real)
        };
        self.retract_where(TakenBack::Netdev, |conn, slot, p| {
            if p.bridged {
                return !self.backend.is_still_bridged(conn, slot, p);
            }
            let (port, egress) = (slot.netdev.ifindex, p.egress);
            let of = Frames::Of(p.dst_mac.unwrap_or_default());
            p.iif.is_some_and(|iif| !leads_to(iif, Frames::On(port), port))
                || p.oif.is_some_and(|oif| !leads_to(oif, of, egress))
        });
    }

    /// What was refused because of a netdev as it was may be possible now.
    fn retry_rejected(&self) {
        self.engine.each_slot(|conn, slot| {
            if slot.state == SlotState::Rejected {
                self.retract(conn, slot, TakenBack::Netdev);
            }
        });
    }

    /// Attaches the netdev if it is to be a port. False: it is not.
    fn attach(&self, link: &Link) -> bool {
        if self.engine.port(link.ifindex).is_some() {
            return true;
        }
        let Some(spec) = (self.policy)(&link.name) else { return false };
        match super::attach(&self.backend, &self.engine, link, spec) {
            Ok(_) => true,
            Err(AttachError::NotAPort(why)) => {
                tracing::info!("not attached: {why}");
                false
            }
            Err(e) => {
                tracing::error!(port = link.name, "not attached: {e}");
                true
            }
        }
    }

    /// At the start. Later nothing of a dead engine can appear.
    fn attach_or_clear(&self, link: &Link) {
        if !self.attach(link) && link.mac.is_some() {
            self.engine.clear_leftovers(link.ifindex);
        }
    }

    /// The kernel has removed the netdev, and its qdiscs and rules with it; rules of other netdevs
    /// that redirect to it drop packets until they are gone, so those go first.
    fn link_gone(&mut self, ifindex: Ifindex, gathered: &mut Gathered) {
        let above = self.backend.links().above(ifindex);
        self.look_below_vlan_0([self.backend.links().get(ifindex).as_ref(), None]);
        let has_above = !above.is_empty();
        if let Some(link) = self.backend.links().get(ifindex) {
            let reroutes = self.reroutes(&link, &Link { up: false, ..link.clone() });
            gathered.rerouted.all |= reroutes;
            self.unsettled |= reroutes;
            self.retract_through(above, &link, &link);
        }
        if super::detach(&self.backend, &self.engine, ifindex).is_err() {
            self.engine.retract_egress(ifindex);
        }
        self.backend.links().remove(ifindex);
        self.backend.changed();
        self.backend.fdb().forget(ifindex);
        if has_above || self.backend.is_watched(ifindex) {
            super::watch(&self.backend, &self.engine);
            self.backend.forget_netdev(ifindex);
        }
        self.backend
            .neighbours
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|(i, _), _| *i != ifindex);
    }

    /// No rule may keep sending to an old MAC address.
    fn neighbour(&self, ifindex: Ifindex, address: IpAddr, mac: Option<MacAddr>) {
        self.backend.changed();
        {
            let mut used = self.backend.neighbours.lock().unwrap_or_else(PoisonError::into_inner);
            match used.get(&(ifindex, address)) {
                None => return,
                Some(known) if Some(*known) == mac => return,
                Some(_) => {}
            }
            match mac {
                Some(mac) => used.insert((ifindex, address), mac),
                None => used.remove(&(ifindex, address)),
            };
        }
        let rules = self.retract_where(TakenBack::Neighbour, |_, _, p| {
            p.oif.unwrap_or(p.egress) == ifindex && p.next_hop == Some(address) && p.dst_mac != mac
        });
        tracing::info!(%address, %ifindex, ?mac, rules, "neighbour changed: rules taken back");
    }

    /// Asks anew for the path of every rule that the change may concern, and takes back those that
    /// lead elsewhere. Where one direction moves from one egress to another, the rules of the other
    /// direction on the old egress go too: its packets will arrive on the new one.
    fn reroute(&self, rerouted: &Rerouted) {
        // Not all that leads here is an event: what was answered before is not the answer now.
        self.backend.changed();
        let mut answers: HashMap<_, Result<PathTaken, Reason>> = HashMap::new();
        let (mut rules, mut again) = (0, 0);
        for conn in self.engine.conns() {
            let slots = self.engine.slots(&conn);
            for slot in &slots {
                // No route leads what is bridged.
                if slot.path.is_some_and(|p| p.bridged) {
                    continue;
                }
                rules += u32::from(
                    self.is_bypassed(&conn, slot, &slots, rerouted)
                        && self.retract(&conn, slot, TakenBack::Route),
                );
                let leaving = conn.leaving(slot.direction);
                if !rerouted.covers(leaving.dst()) {
                    continue;
                }
                let refused = slot.rejection.as_ref().map(|r| r.reason);
                if refused.is_some_and(|r| !depends_on_routes(r)) {
                    continue;
                }
                let Some(iif) = self.routed_on(&conn, slot) else { continue };
                let mark = self.mark_of(&conn, slot);
                let arriving = conn.arriving(slot.direction);
                // Where a rule looks at ports, no two have one answer.
                let closer = self.backend.tos().looks_closer(leaving.is_ipv6());
                let ports = closer.then(|| (leaving.proto(), arriving.sport(), leaving.dport()));
                let asked = (slot.netdev.ifindex, iif, arriving.src(), leaving.dst(), mark, ports);
                let now =
                    answers.entry(asked).or_insert_with(|| self.path_now(&conn, slot, iif, mark));
                if let Some(refused) = refused
                    && now.as_ref().err() != Some(&refused)
                {
                    // What it was refused for may have gone: its next packet is told.
                    again += 1;
                    self.retract(&conn, slot, TakenBack::Route);
                }
                // None: it is resolved after this, or is being taken back, or has none.
                let Some(path) = slot.path else { continue };
                if refused.is_none() {
                    let same = now.is_ok_and(|n| {
                        (n.egress, n.oif, n.next_hop, n.dst_mac, n.answer)
                            == (path.egress, path.oif, path.next_hop, path.dst_mac, path.answer)
                    });
                    if same {
                        continue;
                    }
                    rules += u32::from(self.retract(&conn, slot, TakenBack::Route));
                }
                if now.is_ok_and(|n| (n.egress, n.oif) == (path.egress, path.oif)) {
                    continue;
                }
                {
                    let opposite = slot.direction.opposite();
                    for other in slots
                        .iter()
                        .filter(|o| o.direction == opposite && o.netdev.ifindex == path.egress)
                    {
                        rules += u32::from(self.retract(&conn, other, TakenBack::Route));
                    }
                }
            }
        }
        if rules + again > 0 {
            tracing::info!(rules, again, "routes changed: rules taken back, refusals reconsidered");
        }
    }

    /// True when the other direction is seen by no port of ours, and has moved away from this one:
    /// what answers it will arrive elsewhere.
    fn is_bypassed(
        &self,
        conn: &ConnHandle,
        slot: &SlotView,
        slots: &[SlotView],
        rerouted: &Rerouted,
    ) -> bool {
        let (Some(path), direction) = (slot.path, slot.direction.opposite()) else { return false };
        if slots.iter().any(|s| s.direction == direction)
            || !rerouted.covers(conn.leaving(direction).dst())
        {
            return false;
        }
        let sight = Sight {
            ifindex: path.egress,
            generation: slot.netdev.generation,
            conn: conn.clone(),
            direction,
        };
        // What answers it is routed where it was routed to; with which mark, no packet has told.
        let hint = PathHint { ingress: path.oif, ..PathHint::default() };
        let now = self.backend.resolver().resolve(&sight, &hint);
        // What is routed on a VRF arrives by a netdev that is enslaved to it.
        let vrf = path.iif.is_some_and(|iif| self.backend.links().is_vrf(iif));
        now.is_ok_and(|p| p.forward.egress != slot.netdev.ifindex || (!vrf && p.oif != path.iif))
    }

    fn retract(&self, conn: &ConnHandle, slot: &SlotView, why: TakenBack) -> bool {
        self.engine.slot_retract(conn, slot.direction, slot.netdev.generation, why)
    }

    fn path_now(
        &self,
        conn: &ConnHandle,
        slot: &SlotView,
        iif: Ifindex,
        mark: Option<u32>,
    ) -> Result<PathTaken, Reason> {
        let sight = Sight {
            ifindex: slot.netdev.ifindex,
            generation: slot.netdev.generation,
            conn: conn.clone(),
            direction: slot.direction,
        };
        let ingress = (iif != slot.netdev.ifindex).then_some(iif);
        let hint = PathHint { ingress, mark, ..PathHint::default() };
        let path = self.backend.resolver().resolve(&sight, &hint).map_err(|r| r.reason)?;
        Ok(PathTaken {
            egress: path.forward.egress,
            next_hop: path.next_hop,
            dst_mac: path.forward.macs.map(|m| m.dst),
            iif: path.iif,
            oif: path.oif,
            answer: path.answer,
            nat: false,
            bridged: false,
        })
    }
}

/// Whether what is refused for this reason can be possible by another route.
const fn depends_on_routes(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::NoRoute
            | Reason::NotForwarded
            | Reason::EgressUnsupported
            | Reason::NeighbourUnresolved
            | Reason::MtuMismatch
            | Reason::TosRouted
            | Reason::MarkRouted
            | Reason::HashRouted
            | Reason::OthersAtEgress
            | Reason::Busy
    )
}

/// All addresses of a family.
fn whole(ipv6: bool) -> (IpAddr, u8) {
    if ipv6 { (Ipv6Addr::UNSPECIFIED.into(), 0) } else { (Ipv4Addr::UNSPECIFIED.into(), 0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_found_by_each_length_of_prefix() {
        let mut rerouted = Rerouted::default();
        assert!(rerouted.is_empty());
        for (network, length) in [("10.1.0.0", 16), ("10.2.0.77", 24), ("2001:db8::", 32)] {
            rerouted.add((network.parse().unwrap(), length));
        }
        let covers = |r: &Rerouted, a: &str| r.covers(a.parse().unwrap());
        for inside in ["10.1.2.3", "10.2.0.1", "2001:db8::1"] {
            assert!(covers(&rerouted, inside), "{inside}");
        }
        for outside in ["10.2.1.1", "10.0.0.1", "2001:db9::1"] {
            assert!(!covers(&rerouted, outside), "{outside}");
        }
        // A default route is that of its own family.
        rerouted.add(whole(false));
        assert!(covers(&rerouted, "192.0.2.1") && !covers(&rerouted, "2001:db9::1"));
        rerouted.add(whole(true));
        assert!(covers(&rerouted, "2001:db9::1"));
        // A whole table of a routing protocol.
        let mut table = Rerouted::default();
        for n in 0..100_000u32 {
            table.add((Ipv4Addr::from_bits(n << 8).into(), 24));
        }
        assert!(!table.all && covers(&table, "0.0.1.2") && !covers(&table, "10.0.0.1"));
    }
}
