//! What the engine asks of the kernel datapath, and what its threads share.

use std::cell::LazyCell;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use dashmap::DashMap;
use dashmap::mapref::one::{Ref, RefMut};
use netdev_providers::netlink::netfilter::heard::{Heard, Wanted};
use netdev_providers::{
    Direction, Ifindex, L4Proto, Leftover, MacAddr, Netdev, Reason, Rejection, Tuple,
};
use nix::errno::Errno;

use super::DatapathError;
use super::admission::Said;
use super::config::{Config, Tunables};
use super::ended::Ends;
use super::firewall::Firewall;
use super::netfilter::conntrack::{
    Conntrack, ConntrackError, CtEntry, CtId, CtUpdate, TcpState, accounting,
};
use super::netfilter::ledger::{Hook, Ledger, LedgerConfig, LedgerKey};
use super::pool::Pool;
use super::rearm::Rearm;
use super::routing::answers::Changes;
use super::routing::bridged;
use super::routing::egress::Egress;
use super::routing::fdb::Fdb;
use super::routing::ipsec::Ipsec;
use super::routing::links::Links;
use super::routing::marks::Marks;
use super::routing::path::PathResolver;
use super::routing::stack::{Frames, descend, enters_vrf_on};
use super::routing::switches::Switches;
use super::routing::tos::Named;
use super::supervisor::{Ended, How, Supervisor};
use crate::engine::PortDeleted;
use crate::engine::conn::{ConnHandle, ConnKey, PathTaken};
use crate::engine::datapath::{Datapath, Path, PathHint, PathSpec, Recognised, Sight, SlotChange};
use crate::engine::view::SlotView;

/// Counts for `ctoffload stats`.
#[derive(Debug, Default)]
pub struct Counts {
    /// Sights read.
    pub sights: AtomicU64,
    /// Times that sights were lost on the way from the kernel.
    pub sights_lost: AtomicU64,
    /// conntrack events read.
    pub conntrack_events: AtomicU64,
    /// Times that conntrack events were lost.
    pub conntrack_lost: AtomicU64,
    /// Sweeps made.
    pub sweeps: AtomicU64,
    /// How long the last one took.
    pub last_sweep_ms: AtomicU64,
    /// How long after it the next one comes.
    pub sweep_pause_ms: AtomicU64,
}

/// So many ports have conntrack told of connections at the same time: more than processors that do nothing else.
const PORTS_AT_ONCE: usize = 4;

/// A connection as the kernel knows it, from its first sight to its end in conntrack. By zone and
/// original tuple, which are unique in conntrack; its id is not (32 bits of a hash), but tells it from
/// the connection that had them before.
#[derive(Debug)]
pub(super) struct Known {
    pub id: CtId,
    /// conntrack tells when it closes or ends: it has told of a change of ours.
    pub evented: bool,
    /// `None`: sighted, but not to be offloaded (closing).
    pub conn: Option<ConnHandle>,
    /// The timeout of its state: what conntrack had just set when a packet of it was sighted.
    pub timeout: Option<Duration>,
    /// Its mark in conntrack, which the firewall and routes may look at.
    pub ct_mark: u32,
    /// conntrack had it when its events were heard already: its end cannot be missed.
    pub confirmed: bool,
    /// When its mark or its labels changed.
    pub changed: Option<Instant>,
    /// Its rules were taken back because no packet came.
    pub silent: bool,
    /// Its elements in the ledger.
    pub sighted: Vec<Sighted>,
    /// What conntrack tells of it is listened to.
    _events: Option<Wanted>,
}

/// An element of the ledger, and the port whose slot it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sighted {
    pub hook: Hook,
    /// The netdev that routed the packet: the port, or one above it; or the port of the bridge.
    pub iif: Ifindex,
    pub port: Ifindex,
    pub direction: Direction,
    /// The source port of the connection's original direction, which stands in the element.
    pub sport: u16,
    /// The mark of the packet: it can select a route.
    pub mark: u32,
    /// Of a bridged one: the MAC address that it came from, which the bridge has learnt there.
    pub from: Option<MacAddr>,
}

/// Watches what happens. Called on threads of the engine and the datapath: it must not block and
/// not call either.
pub trait Observer: Send + Sync {
    /// A slot has changed.
    fn slot_changed(&self, port: &Netdev, conn: &ConnHandle, d: Direction, change: SlotChange<'_>);
    /// A netdev has become a port, bound to this class or to none.
    fn port_added(&self, port: &Netdev, class: Option<&str>);
    /// A port has gone.
    fn port_deleted(&self, port: &Netdev, deleted: &PortDeleted);
}

/// The kernel, as the engine's [`Datapath`].
pub struct Backend {
    config: Config,
    tunables: ArcSwap<Tunables>,
    links: Links,
    fdb: Fdb,
    switches: Switches,
    ipsec: Ipsec,
    tos: Named,
    marks: Marks,
    egress: Egress,
    resolver: PathResolver,
    /// Of what paths are resolved from.
    changes: Changes,
    /// What is in the ledger's set of netdevs: the ports and what can stand above them.
    watched: Mutex<BTreeSet<Ifindex>>,
    /// `None` once it has been removed.
    ledger: Mutex<Option<Ledger>>,
    /// The netlink port id that the ledger's changes of nf_tables are announced with.
    ledger_port_id: u32,
    ledger_table: String,
    rearming: Rearm,
    firewall: Firewall,
    conntrack: Pool<Conntrack, PORTS_AT_ONCE>,
    /// Of which connections conntrack's events are read: those that are known. `None`: of all.
    heard: Option<Heard>,
    pub(super) known: DashMap<ConnKey, Known, ahash::RandomState>,
    /// Connections that have got a rule since [`keepalive`](super::keepalive) looked.
    pub(super) installed: Mutex<Vec<ConnHandle>>,
    /// Connections that conntrack has closed because of a RST since [`resets`](super::resets) looked.
    pub(super) resets: Mutex<Vec<(ConnKey, CtId)>>,
    /// Connections that have ended lately.
    pub(super) ended: Ends,
    /// Events of conntrack were lost: all that is known is to be compared with its table.
    pub(super) events_lost: AtomicBool,
    /// The MAC address that rules were made with, by neighbour.
    pub(super) neighbours: Mutex<HashMap<(Ifindex, IpAddr), MacAddr>>,
    counts: Counts,
    observer: OnceLock<Box<dyn Observer>>,
    own_changes: OnceLock<OwnChanges>,
    supervisor: OnceLock<Supervisor>,
}

/// Whether a change of nf_tables that is announced with this netlink port id is a provider's.
type OwnChanges = Box<dyn Fn(u32) -> bool + Send + Sync>;

impl Backend {
    /// Loads the ledger and opens the sockets, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// What the kernel lacks or refuses. Nothing is left behind.
    pub fn open(config: Config) -> Result<Self, DatapathError> {
        let links = Links::default();
        let fdb = Fdb::default();
        let (switches, ipsec, tos) = (Switches::default(), Ipsec::default(), Named::default());
        let marks = Marks::default();
        let changes = Changes::default();
        let resolver = PathResolver::new(
            changes.clone(),
            links.clone(),
            fdb.clone(),
            switches.clone(),
            ipsec.clone(),
            tos.clone(),
            marks.clone(),
        )
        .map_err(DatapathError::Route)?;
        let conntrack = Pool::of(Conntrack::open)?;
        let heard = Heard::new()
            .inspect_err(|e| tracing::info!("events of all connections are read: {e}"))
            .ok();
        let counted_before = accounting();
        let ledger = Ledger::install(LedgerConfig {
            group: config.nflog_group,
            size: config.ledger_size,
            bridged: config.bridged,
            one_way_udp: config.one_way_udp,
            min_packets: config.min_packets,
            min_bytes: config.min_bytes,
            // A flowtable on one netdev of a connection can stand beside another provider on the
            // other: `sights` tells ours from those of others.
            skip_offloaded: false,
            ..LedgerConfig::default()
        })?;
        if config.min_packets > 0 && matches!(counted_before, Ok(false)) {
            tracing::info!(
                min_packets = config.min_packets,
                "net.netfilter.nf_conntrack_acct was 0 and is 1 now, and stays so: connections that are there already are not counted, and offloaded at once"
            );
        }
        if config.min_bytes > 0 {
            // The kernel switches it on for the ledger's rule.
            if !matches!(accounting(), Ok(true)) {
                return Err(DatapathError::Accounting);
            }
            if !matches!(counted_before, Ok(true)) {
                tracing::warn!(
                    min_bytes = config.min_bytes,
                    "net.netfilter.nf_conntrack_acct was 0 and is 1 now, and stays so: connections that are there already are not counted and so not offloaded; set it at boot"
                );
            }
        }
        Ok(Self {
            ledger_port_id: ledger.port_id()?,
            ledger_table: ledger.config().table.clone(),
            rearming: Rearm::new(config.ledger_size, config.tunables.revalidation.every),
            tunables: ArcSwap::from_pointee(config.tunables.clone()),
            firewall: Firewall::default(),
            config,
            links,
            fdb,
            switches,
            ipsec,
            tos,
            marks,
            egress: Egress::default(),
            resolver,
            changes,
            watched: Mutex::default(),
            ledger: Mutex::new(Some(ledger)),
            conntrack,
            heard,
            known: DashMap::default(),
            installed: Mutex::default(),
            resets: Mutex::default(),
            ended: Ends::default(),
            events_lost: AtomicBool::new(false),
            neighbours: Mutex::default(),
            counts: Counts::default(),
            observer: OnceLock::new(),
            own_changes: OnceLock::new(),
            supervisor: OnceLock::new(),
        })
    }

    /// Who watches. Once.
    pub fn set_observer(&self, observer: Box<dyn Observer>) {
        let _ = self.observer.set(observer);
    }

    /// How to tell the changes of nf_tables that providers make: they are no change of the
    /// firewall. Once.
    pub fn set_own_changes(&self, own: Box<dyn Fn(u32) -> bool + Send + Sync>) {
        let _ = self.own_changes.set(own);
    }

    /// Who is told when a port cannot be relied on any more. Once.
    pub(super) fn set_supervisor(&self, supervisor: Supervisor) {
        let _ = self.supervisor.set(supervisor);
    }

    /// Whether a change of nf_tables that is announced with this netlink port id is ours.
    pub(super) fn is_own_change(&self, port_id: u32) -> bool {
        self.ledger_port_id == port_id || self.own_changes.get().is_some_and(|own| own(port_id))
    }

    pub(super) fn observer(&self) -> Option<&dyn Observer> {
        self.observer.get().map(|o| &**o)
    }

    /// What can be changed, as it is now.
    #[must_use]
    pub fn tunables(&self) -> Arc<Tunables> {
        self.tunables.load_full()
    }

    /// Changes it: for what is decided from now on.
    pub fn set_tunables(&self, tunables: Tunables) {
        self.rearming.set_every(tunables.revalidation.every);
        self.tunables.store(Arc::new(tunables));
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }
    /// The netdevs.
    #[must_use]
    pub fn links(&self) -> &Links {
        &self.links
    }
    /// What bridges have learnt.
    #[must_use]
    pub fn fdb(&self) -> &Fdb {
        &self.fdb
    }
    /// Which netdevs' packets are forwarded.
    pub(super) fn switches(&self) -> &Switches {
        &self.switches
    }
    /// The policies of IPsec.
    pub(super) fn ipsec(&self) -> &Ipsec {
        &self.ipsec
    }
    /// Values of the ToS that routing tells apart.
    pub(super) fn tos(&self) -> &Named {
        &self.tos
    }
    /// Marks that routing tells apart, and what sets them.
    pub(super) fn marks(&self) -> &Marks {
        &self.marks
    }
    /// What stands where packets leave.
    pub(crate) fn egress(&self) -> &Egress {
        &self.egress
    }
    /// Counts a change of what paths are resolved from: after it is known here, before the rules that it
    /// concerns are looked for.
    pub(super) fn changed(&self) {
        self.changes.count();
    }
    /// The counts.
    #[must_use]
    pub fn counts(&self) -> &Counts {
        &self.counts
    }
    /// Runs `f` on the ledger, when it is still there.
    fn with_ledger(&self, f: impl FnOnce(&mut Ledger)) {
        if let Some(ledger) = self.ledger.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            f(ledger);
        }
    }

    /// How many elements the ledger holds; 0 when that cannot be read.
    #[must_use]
    pub fn ledger_elements(&self) -> u64 {
        let mut elements = 0;
        self.with_ledger(|ledger| elements = ledger.len().unwrap_or(0) as u64);
        elements
    }

    /// How many it can hold.
    #[must_use]
    pub fn ledger_size(&self) -> u64 {
        u64::from(self.config.ledger_size) * if self.config.bridged { 2 } else { 1 }
    }

    /// The name of the ledger's tables.
    pub(super) fn ledger_table(&self) -> &str {
        &self.ledger_table
    }

    /// What decisions stand on.
    pub(super) const fn firewall(&self) -> &Firewall {
        &self.firewall
    }

    /// What is to be re-armed.
    pub(super) const fn rearming(&self) -> &Rearm {
        &self.rearming
    }

    /// Ends sighting: nothing of ours is in nf_tables afterwards.
    pub fn remove_ledger(&self) {
        let ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Err(e)) = ledger.map(Ledger::remove) {
            tracing::warn!("the sight ledger goes with our socket: {e}");
        }
    }
    pub(super) const fn heard(&self) -> Option<&Heard> {
        self.heard.as_ref()
    }
    /// A connection of which nothing is known yet but this. From now on its events are heard: so before anything is
    /// done for it.
    pub(super) fn acquainted(&self, id: CtId, timeout: Option<Duration>, ct_mark: u32) -> Known {
        let (conn, changed, sighted) = (None, None, Vec::new());
        let events = self.heard.as_ref().map(|h| h.of(id));
        let (evented, confirmed, silent) = (false, false, false);
        Known {
            id,
            evented,
            confirmed,
            conn,
            timeout,
            ct_mark,
            changed,
            silent,
            sighted,
            _events: events,
        }
    }
    /// conntrack has it, and its events are heard.
    fn confirm(&self, conn: &ConnHandle) {
        if let Some(mut known) = self.known_mut_of(conn) {
            known.confirmed = true;
        }
    }
    pub(super) fn resolver(&self) -> &PathResolver {
        &self.resolver
    }
    /// Whether conntrack has seen enough of a connection for it to be offloaded. (An entry that was made by a packet in
    /// the middle, after the one before had expired, may have seen one direction only; were the rules of the other
    /// kept, it never would.)
    fn would_be_sighted(&self, entry: &CtEntry) -> bool {
        match entry.original.proto() {
            L4Proto::Tcp => entry.status.assured(),
            L4Proto::Udp => self.config.one_way_udp || entry.status.seen_reply(),
        }
    }

    /// What is known of a connection, unless its place was taken by another.
    pub(super) fn known_of(&self, conn: &ConnHandle) -> Option<Ref<'_, ConnKey, Known>> {
        let known = self.known.get(&conn.key())?;
        (Some(known.id) == ct_id(conn)).then_some(known)
    }
    /// The same, to be changed.
    pub(super) fn known_mut_of(&self, conn: &ConnHandle) -> Option<RefMut<'_, ConnKey, Known>> {
        self.known.get_mut(&conn.key()).filter(|k| Some(k.id) == ct_id(conn))
    }
    pub(super) fn conntrack(&self) -> MutexGuard<'_, Conntrack> {
        self.conntrack.one()
    }
    /// The netlink port ids that its changes are announced with.
    pub(super) fn conntrack_ports(&self) -> Result<Vec<u32>, ConntrackError> {
        self.conntrack.each().map(|conntrack| conntrack.port()).collect()
    }

    /// Lets packets be sighted that arrive on these ports, or on a netdev above one of them, and on
    /// no other.
    pub(super) fn watch(&self, ports: impl IntoIterator<Item = Ifindex>) {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        let mut wanted = BTreeSet::new();
        for port in ports {
            wanted.insert(port);
            wanted.extend(self.links.above(port));
        }
        self.with_ledger(|ledger| {
            for &ifindex in watched.difference(&wanted) {
                if let Err(e) = ledger.port_del(ifindex) {
                    tracing::warn!(%ifindex, "the netdev stays in the ledger's set: {e}");
                }
            }
            for &ifindex in wanted.difference(&watched) {
                if let Err(e) = ledger.port_add(ifindex) {
                    tracing::error!(%ifindex, "packets of this netdev will not be sighted: {e}");
                }
            }
        });
        *watched = wanted;
    }

    /// Whether packets of this netdev are sighted.
    pub(super) fn is_watched(&self, ifindex: Ifindex) -> bool {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner).contains(&ifindex)
    }

    /// The real netdev that a packet has arrived on, which was routed on this one, came from the one
    /// MAC address and was for the other. `None` when it cannot be told (yet).
    pub(super) fn arrived_on(
        &self,
        iif: Ifindex,
        from: Option<MacAddr>,
        to: Option<MacAddr>,
    ) -> Option<Ifindex> {
        let from = Frames::Of(from.unwrap_or_default());
        if self.links.is_vrf(iif) {
            return enters_vrf_on(&self.links, &self.fdb, iif, to?, from);
        }
        Some(descend(&self.links, &self.fdb, iif, from).ok()?.real.ifindex)
    }

    /// Deletes elements of the ledger, so that the next packet is sighted again: one transaction of
    /// nf_tables, or several. [`Rearm`] is who knows when.
    pub(super) fn delete_elements(&self, keys: &[LedgerKey]) {
        if keys.is_empty() {
            return;
        }
        self.with_ledger(|ledger| {
            if let Err(e) = ledger.rearm(keys) {
                // The next clean-up of the ledger finds them.
                tracing::warn!(count = keys.len(), "sights not re-armed: {e}");
            }
        });
    }

    /// The MAC address that the frames of a bridged slot come from.
    pub(super) fn bridged_from(&self, conn: &ConnHandle, slot: &SlotView) -> Option<MacAddr> {
        let known = self.known_of(conn)?;
        let of = (Hook::Bridge, slot.netdev.ifindex, slot.direction);
        known.sighted.iter().find(|s| (s.hook, s.port, s.direction) == of)?.from
    }

    /// Whether a bridge still forwards the frames of a slot to where its rule sends them.
    pub(super) fn is_still_bridged(
        &self,
        conn: &ConnHandle,
        slot: &SlotView,
        taken: &PathTaken,
    ) -> bool {
        let hint = PathHint {
            ingress: taken.iif,
            eth_dst: taken.dst_mac,
            bridged: true,
            ..PathHint::default()
        };
        let tuples = (conn.arriving(slot.direction), conn.leaving(slot.direction));
        bridged::resolve(&self.links, &self.fdb, slot.netdev.ifindex, tuples, &hint)
            .is_ok_and(|p| (p.forward.egress, p.oif) == (taken.egress, taken.oif))
    }

    /// Whether packets arrive on this netdev with an Ethernet header.
    pub(super) fn has_mac(&self, ifindex: Ifindex) -> bool {
        self.links.get(ifindex).is_some_and(|l| l.mac.is_some())
    }

    /// Forgets what was sighted on a netdev that is no port any more, or is gone.
    pub(super) fn forget_netdev(&self, ifindex: Ifindex) {
        let mut above = Vec::new();
        for mut known in self.known.iter_mut() {
            let ct_id = known.id;
            let gone = |s: &Sighted| s.port == ifindex || s.iif == ifindex;
            let keys = known.sighted.iter().filter(|s| gone(s) && s.iif != ifindex);
            above.extend(keys.map(|s| s.key(ct_id)));
            known.sighted.retain(|s| !gone(s));
        }
        self.rearming.soon(above);
        self.clean_ledger(|k| k.iif == ifindex);
    }

    /// Deletes the elements of the ledger that nobody here knows of: their log message was lost, or the
    /// end of their connection. They are sighted again at the next packet, if there is one.
    pub(super) fn compare_ledger(&self) {
        // After the ledger has been read: what was sighted meanwhile is known.
        let keys = LazyCell::new(|| {
            self.known.iter().flat_map(|known| known.keys()).collect::<HashSet<LedgerKey>>()
        });
        self.clean_ledger(|k| !keys.contains(k));
    }

    /// Deletes the elements of the ledger that satisfy `stale`, and looks how full it is.
    pub(super) fn clean_ledger(&self, stale: impl Fn(&LedgerKey) -> bool) {
        self.with_ledger(|ledger| self.clean(ledger, stale));
    }

    fn clean(&self, ledger: &mut Ledger, stale: impl Fn(&LedgerKey) -> bool) {
        let keys = match ledger.sighted() {
            Ok(keys) => keys,
            Err(e) => {
                tracing::warn!("the sight ledger could not be read: {e}");
                return;
            }
        };
        let (stale, kept): (Vec<_>, Vec<_>) = keys.into_iter().partition(stale);
        if !stale.is_empty()
            && let Err(e) = ledger.rearm(&stale)
        {
            tracing::warn!(count = stale.len(), "stale sights stay in the ledger: {e}");
        }
        let size = self.config.ledger_size as usize;
        for hook in Hook::BOTH {
            let elements = kept.iter().filter(|k| k.hook == hook).count();
            if elements >= size - size / 10 {
                tracing::error!(
                    table = %hook,
                    elements,
                    size,
                    "the sight ledger is nearly full: connections beyond it stay on the slow path unseen; raise ledger-size"
                );
            }
        }
    }
}

/// What a connection is known by.
pub(super) const fn key_of(entry: &CtEntry) -> ConnKey {
    ConnKey { zone: entry.zone, original: entry.original }
}

/// The conntrack id of a connection of this datapath: its tag.
pub(super) fn ct_id(conn: &ConnHandle) -> Option<CtId> {
    u32::try_from(conn.tag()).ok().map(CtId)
}

impl Datapath for Backend {
    fn resolve(&self, sight: &Sight, hint: &PathHint) -> Result<Path, Rejection> {
        if let Some(generation) = hint.firewall {
            self.firewall.is_current(generation)?;
        }
        let mut path = self.resolver.resolve(sight, hint)?;
        let tunables = self.tunables.load();
        let may_be_passed = |name: &str| tunables.may_be_passed(name);
        path.forward.egress_decides =
            self.egress.decides(&self.links, path.forward.egress, path.oif, may_be_passed)?;
        if let (Some(next_hop), Some(macs)) = (path.next_hop, path.forward.macs) {
            self.neighbours
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert((path.oif.unwrap_or(path.forward.egress), next_hop), macs.dst);
        }
        Ok(path)
    }

    fn changes(&self) -> u64 {
        self.changes.so_far()
    }

    fn port_panicked(&self, port: &Netdev, words: &str) {
        if let Some(supervisor) = self.supervisor.get() {
            let thread = format!("port-{}", port.name);
            supervisor.tell(Ended { thread, how: How::Panicked(words.to_owned()) });
        }
    }

    /// From now on conntrack does not see these packets: TCP windows are no longer checked, in both
    /// directions and for the rest of the connection's life (its state would be stale), and a RST is
    /// believed whatever its sequence number (packets of the direction that is still in software have it compared
    /// again: so for each slot). A connection that has ended meanwhile is found here, by the entry that is not there:
    /// of UDP, for which there is nothing to be written, once, since from then on its end is heard of.
    fn prepare(&self, sights: &[Sight]) -> Vec<Result<(), Rejection>> {
        let is_tcp = |s: &Sight| s.conn.key().original.proto() == L4Proto::Tcp;
        let is_due = |s: &&Sight| is_tcp(s) || !self.known_of(&s.conn).is_some_and(|k| k.confirmed);
        let due: Vec<_> = sights.iter().map(|s| is_due(&s)).collect();
        let updates: Vec<_> = sights
            .iter()
            .zip(&due)
            .filter(|(_, due)| **due)
            .map(|(s, _)| CtUpdate {
                liberal: is_tcp(s).then_some(true),
                forget_acked: true,
                ..CtUpdate::of(s.conn.key().zone, s.conn.key().original)
            })
            .collect();
        let mut acks = match self.conntrack().update(&updates) {
            Ok(acks) => acks.into_iter(),
            Err(e) => {
                let rejection = Rejection::with_detail(Reason::Busy, format!("conntrack: {e}"));
                return vec![Err(rejection); sights.len()];
            }
        };
        let prepared = sights.iter().zip(due).map(|(sight, due)| {
            if !due {
                return Ok(());
            }
            match acks.next().unwrap_or(Ok(())) {
                Ok(()) if is_tcp(sight) => Ok(()),
                Ok(()) => {
                    self.confirm(&sight.conn);
                    Ok(())
                }
                Err(e) if e.errno == Errno::ENOENT => Err(Rejection::with_detail(
                    Reason::ConnState,
                    "conntrack has no such connection any more",
                )),
                Err(e) => Err(Rejection::from(e)),
            }
        });
        prepared.collect()
    }

    /// By conntrack's entries: a rule that a dead daemon left belongs to the connection whose
    /// packets it matches, if conntrack has it and it is not closing. A tuple that is in two zones
    /// belongs to neither, since rules know no zones.
    fn recognise(
        &self,
        port: &Netdev,
        leftovers: &[Leftover],
        create: &dyn Fn(ConnKey, Tuple, u64) -> Option<ConnHandle>,
    ) -> Vec<Option<Recognised>> {
        let nobody = || vec![None; leftovers.len()];
        // What is routed on a bridge or a bond above a port, and what is bridged, only a packet tells.
        let enslaved = self.links.get(port.ifindex).is_some_and(|l| l.controller.is_some());
        // What stands on packets, the next one tells.
        let tunables = self.tunables();
        if !self.config.adopt || enslaved || tunables.admission.looks_at_packets() {
            return nobody();
        }
        if leftovers.is_empty() {
            return Vec::new();
        }
        // On a socket of its own: a table can be large, and nobody else is to wait for it.
        let of_rules: HashSet<Tuple> = leftovers.iter().filter_map(|l| l.tuple).collect();
        let mut entries = Vec::new();
        let dumped = Conntrack::open().and_then(|mut conntrack| {
            conntrack.dump_each(|entry| {
                if of_rules.contains(&entry.original) || of_rules.contains(&entry.reply) {
                    entries.push(entry);
                }
            })
        });
        if let Err(e) = dumped {
            tracing::warn!(%port, "conntrack's table could not be read, nothing is adopted: {e}");
            return nobody();
        }
        let mut by_tuple: HashMap<Tuple, Option<(&CtEntry, Direction)>> = HashMap::new();
        for entry in &entries {
            for (tuple, d) in
                [(entry.original, Direction::Original), (entry.reply, Direction::Reply)]
            {
                by_tuple
                    .entry(tuple)
                    .and_modify(|ambiguous| *ambiguous = None)
                    .or_insert(Some((entry, d)));
            }
        }
        leftovers
            .iter()
            .map(|l| {
                let (entry, direction) = (*by_tuple.get(&l.tuple?)?)?;
                // The mark of a rule says which direction it was made for.
                if direction != l.cookie.direction || entry.helper {
                    return None;
                }
                if entry.tcp_state.is_some_and(|s| s != TcpState::Established)
                    || !self.would_be_sighted(entry)
                {
                    return None;
                }
                let id = entry.id?;
                let key = ConnKey { zone: entry.zone, original: entry.original };
                // What is no longer admitted goes; its next packet is told why.
                let name = self.links.name(port.ifindex);
                tunables.admission.admit(&name, &key, &Said::of(entry)).ok()?;
                self.firewall.zone_is_clear(key.zone, port.ifindex, &name).ok()?;
                let conn = create(key, entry.reply, u64::from(id.0))?;
                // Before it is adopted: should it end meanwhile, that must find it.
                let new = || self.acquainted(id, entry.timeout, entry.mark);
                let mut known = self.known.entry(key).or_insert_with(new);
                if known.id != id {
                    *known = new();
                }
                known.conn.get_or_insert_with(|| conn.clone());
                // What mark its packets have, the next one tells.
                Some(Recognised { conn, direction, path: PathSpec::Resolve(PathHint::default()) })
            })
            .collect()
    }

    fn rearm(&self, sights: &[Sight]) {
        let (mut awaited, mut later) = (Vec::with_capacity(sights.len()), Vec::new());
        for sight in sights {
            let Some(id) = ct_id(&sight.conn) else { continue };
            let known = self.known_mut_of(&sight.conn);
            let silent = known.as_ref().is_some_and(|k| k.silent);
            let keys = if silent { &mut later } else { &mut awaited };
            // Also where nothing is noted of it any more: what the port itself has sighted.
            for hook in Hook::BOTH {
                let (iif, direction) = (sight.ifindex, sight.direction);
                let sport = sight.conn.key().original.sport();
                keys.push(LedgerKey { hook, iif, ct_id: id, sport, direction });
            }
            if let Some(mut known) = known {
                known.sighted.retain(|s| {
                    let same = (s.port, s.direction) == (sight.ifindex, sight.direction);
                    if same && s.iif != s.port {
                        keys.push(s.key(id));
                    }
                    !same
                });
            }
        }
        self.rearming.soon(awaited);
        self.rearming.later(later);
    }

    fn forwarded_itself(&self, sights: &[Sight]) -> Vec<Option<u64>> {
        let mut counted = HashMap::new();
        self.with_ledger(|ledger| match ledger.counted() {
            Ok(c) => counted = c,
            Err(e) => tracing::debug!("the sight ledger could not be read: {e}"),
        });
        // Of every netdev that the direction was seen on above the port.
        let of = |sight: &Sight| {
            let id = ct_id(&sight.conn)?;
            let known = self.known_of(&sight.conn)?;
            let here = |s: &&Sighted| (s.port, s.direction) == (sight.ifindex, sight.direction);
            let counts = known.sighted.iter().filter(here).filter_map(|s| counted.get(&s.key(id)));
            counts.copied().reduce(u64::wrapping_add)
        };
        sights.iter().map(of).collect()
    }

    fn slot_changed(&self, port: &Netdev, conn: &ConnHandle, d: Direction, change: SlotChange<'_>) {
        if matches!(change, SlotChange::Installed) {
            self.installed.lock().unwrap_or_else(PoisonError::into_inner).push(conn.clone());
        }
        if let Some(observer) = self.observer() {
            observer.slot_changed(port, conn, d, change);
        }
    }
}

impl Known {
    /// Its elements in the ledger, which are not remembered any more.
    pub(super) fn take_keys(&mut self) -> Vec<LedgerKey> {
        std::mem::take(&mut self.sighted).iter().map(|s| s.key(self.id)).collect()
    }

    /// Its elements in the ledger.
    pub(super) fn keys(&self) -> Vec<LedgerKey> {
        self.sighted.iter().map(|s| s.key(self.id)).collect()
    }
}

impl Sighted {
    pub(super) fn key(&self, ct_id: CtId) -> LedgerKey {
        let Self { hook, iif, sport, direction, .. } = *self;
        LedgerKey { hook, iif, ct_id, sport, direction }
    }
}

/// For the threads of this datapath.
pub(super) type Shared = Arc<Backend>;
