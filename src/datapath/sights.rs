//! Sights: packets that the kernel forwarded in software, one for every (netdev, connection,
//! direction). This thread is a worker of the engine: it offers and goes on.
//!
//! What one read of the log brings goes through together: whose packets they are is asked once ([`identify`]), each
//! is looked at, and each port is offered all of its own and woken once.
//!
//! [`identify`]: super::identify

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use netdev_providers::{Direction, Ifindex, MacAddr, Permanence};

use super::TICK;
use super::admission::Said;
use super::backend::{Shared, Sighted, key_of};
use super::ends::{self, JUST_CHANGED};
use super::firewall::Quarantine;
use super::identify::{Identifier, Whose};
use super::netfilter::conntrack::{CtEntry, CtId, TcpState};
use super::netfilter::ledger::{Hook, LedgerKey};
use super::netfilter::nflog::{LogRead, NflogError, Sight, SightLog};
use super::routing::links::Links;
use super::supervisor::Failures;
use crate::engine::Engine;
use crate::engine::conn::{ConnHandle, ConnKey};
use crate::engine::datapath::{PathHint, PathSpec};
use crate::engine::slot::SlotState;
use crate::engine::taken::TakenBack;
use crate::engine::worker::{Offer, Worker};

/// How long an offer that was refused at once (queue or table full) waits before its sight is
/// re-armed.
const REFUSED_PAUSE: Duration = Duration::from_secs(1);
/// A rule that has not been used for so long gives way to one for packets that arrive otherwise:
/// longer than usage is swept.
const UNUSED_MS: u64 = 15_000;
/// The ledger is compared with what is known this often even when nothing seems lost.
const CLEAN_EVERY: Duration = Duration::from_secs(60);

pub(super) struct Reader {
    backend: Shared,
    engine: Engine,
    log: SightLog,
    identifier: Identifier,
    worker: Worker,
    refused: VecDeque<(Instant, LedgerKey)>,
    quarantine: Quarantine,
}

/// What a port is to be offered because of a sight.
struct Candidate {
    port: Ifindex,
    conn: ConnHandle,
    direction: Direction,
    path: PathSpec,
    /// The element of the ledger.
    key: LedgerKey,
    /// Whom the frame was for.
    to: Option<MacAddr>,
}

impl Reader {
    pub(super) fn new(
        backend: Shared,
        engine: Engine,
        log: SightLog,
        identifier: Identifier,
    ) -> Self {
        let worker = engine.worker();
        Self {
            backend,
            engine,
            log,
            identifier,
            worker,
            refused: VecDeque::new(),
            quarantine: Quarantine::default(),
        }
    }

    /// # Errors
    /// When the log cannot be read any more.
    pub(super) fn run(mut self, stop: &AtomicBool) -> Result<(), NflogError> {
        let (mut cleaned, mut failures) = (Instant::now(), Failures::default());
        // Online only to offer: nobody who takes a port away waits for what the kernel is asked here.
        self.worker.offline();
        while !stop.load(Ordering::Relaxed) {
            let lost = match failures.passed("sight log", self.log.next(TICK))? {
                Some(read) => {
                    let lost = read.lost;
                    self.read(read);
                    lost
                }
                None => {
                    std::thread::sleep(TICK);
                    true
                }
            };
            if lost {
                self.backend.counts().sights_lost.fetch_add(1, Ordering::Relaxed);
            }
            self.rearm_refused();
            if lost || cleaned.elapsed() >= CLEAN_EVERY {
                self.backend.rearming().compare();
                cleaned = Instant::now();
            }
        }
        Ok(())
    }

    fn read(&mut self, read: LogRead) {
        let LogRead { mut sights, emptied, .. } = read;
        // After the read: what comes now is of this firewall, or is refused when it is
        // looked at.
        let firewall = self.backend.firewall().generation();
        let mut resets: Vec<_> = sights.extract_if(.., |s| s.is_reset()).collect();
        if !resets.is_empty() {
            let of = self.identifier.identify_quickly(&mut resets);
            let of: Vec<_> = of.into_iter().flatten().map(|(entry, ..)| entry).collect();
            ends::unbelieved(&self.backend, &self.engine, &of);
        }
        let whose = self.identifier.identify(&mut sights);
        self.backend.counts().sights.fetch_add(sights.len() as u64, Ordering::Relaxed);
        if !self.quarantine.passed(firewall, emptied, Instant::now()) {
            self.disbelieve(&sights, &whose);
            return;
        }
        if sights.is_empty() {
            return;
        }
        self.worker.online();
        let mut candidates = Vec::with_capacity(sights.len());
        for (sight, whose) in sights.iter().zip(whose) {
            candidates.extend(self.sighted(sight, whose, firewall));
        }
        self.offer(candidates);
        self.worker.offline();
    }

    /// Offers each port its own, in order.
    fn offer(&mut self, mut candidates: Vec<Candidate>) {
        while let Some(ifindex) = candidates.first().map(|c| c.port) {
            let (mut its, others) = candidates.into_iter().partition(|c| c.port == ifindex);
            candidates = others;
            let offers = self.offers_of(ifindex, &mut its);
            for (Candidate { conn, direction, key, to, .. }, offer) in its.into_iter().zip(offers) {
                match offer {
                    Offer::Refused(reason) => {
                        tracing::debug!(%conn, %direction, %reason, "offer refused");
                        if reason.permanence() == Permanence::Transient {
                            self.refused.push_back((Instant::now() + REFUSED_PAUSE, key));
                        }
                    }
                    Offer::Decided => self.arrives_otherwise(&conn, direction, ifindex, key, to),
                    Offer::Queued | Offer::Unbound => {}
                }
            }
        }
    }

    /// What became of what a port was offered; nothing where it has gone: its elements go with it.
    fn offers_of(&self, ifindex: Ifindex, its: &mut [Candidate]) -> Vec<Offer> {
        let mut offers = Vec::with_capacity(its.len());
        if let Some(port) = self.worker.port(ifindex) {
            let each = its.iter_mut().map(|Candidate { conn, direction, path, .. }| {
                let path = std::mem::replace(path, PathSpec::Resolve(PathHint::default()));
                (&*conn, *direction, path)
            });
            port.offer_batch(each, |offer| offers.push(offer));
        }
        offers
    }

    /// Packets that the firewall may have let pass as it was: the next of each is to be seen.
    fn disbelieve(&self, sights: &[Sight], whose: &[Option<Whose>]) {
        let keys = sights.iter().zip(whose).filter_map(|(sight, whose)| {
            let (entry, ct_id, direction) = whose.as_ref()?;
            Some(key_in_ledger(sight, entry, *ct_id, *direction))
        });
        self.backend.rearming().soon(keys);
    }

    /// What is to be offered because of a sight, if anything is.
    fn sighted(&mut self, sight: &Sight, whose: Option<Whose>, firewall: u64) -> Option<Candidate> {
        let Some((entry, id, direction)) = whose else {
            tracing::debug!(iif = %sight.in_dev, "a sight without a connection of ours");
            return None;
        };
        let bridged = sight.hook == Hook::Bridge;
        let key = key_in_ledger(sight, &entry, id, direction);
        // In the flowtable of somebody else: it is left to that one, and looked at again.
        if entry.status.offload() && !self.is_ours(&entry, id) {
            self.refused.push_back((Instant::now() + REFUSED_PAUSE, key));
            return None;
        }
        // The slot is that of the real netdev: a VLAN device, a bridge, a bond stand above it.
        let iif = sight.in_dev;
        let ethernet = sight.hw_header.filter(|_| self.backend.has_mac(iif));
        let mac = |at: usize| Some(MacAddr(*ethernet.as_ref()?.get(at..)?.first_chunk()?));
        let real = if self.worker.port(iif).is_some() {
            Some(iif)
        } else {
            self.backend.arrived_on(iif, mac(6), mac(0))
        };
        let Some(real) = real else {
            tracing::debug!(%iif, "where a packet has arrived cannot be told (yet)");
            self.refused.push_back((Instant::now() + REFUSED_PAUSE, key));
            return None;
        };
        let offloadable = match entry.tcp_state {
            Some(state) => state == TcpState::Established,
            None => true,
        };
        let conn = offloadable
            .then(|| {
                let key = ConnKey { zone: entry.zone, original: entry.original };
                self.engine.conn_create(key, entry.reply, u64::from(id.0))
            })
            .flatten();
        // Remembered before it is offered: whatever becomes of the offer can then re-arm it.
        {
            let new = || self.backend.acquainted(id, entry.timeout, entry.mark);
            let mut known = self.backend.known.entry(key_of(&entry)).or_insert_with(new);
            // The end of the one before was not heard of; its elements are nobody's, and are cleaned.
            if known.id != id {
                *known = new();
            }
            // The packet may be older than that.
            if known.changed.is_some_and(|at| at.elapsed() < JUST_CHANGED) {
                self.refused.push_back((Instant::now() + REFUSED_PAUSE, key));
                return None;
            }
            (known.ct_mark, known.silent) = (entry.mark, false);
            let from = mac(6).filter(|_| bridged);
            let sport = key.sport;
            let (hook, mark) = (sight.hook, sight.mark);
            let sighted = Sighted { hook, iif, port: real, direction, sport, mark, from };
            match known.sighted.iter_mut().find(|s| s.key(id) == key && s.port == real) {
                Some(before) => *before = sighted,
                None => known.sighted.push(sighted),
            }
            known.timeout = known.timeout.max(entry.timeout);
            if conn.is_some() {
                known.conn.clone_from(&conn);
            }
        }
        // No port: it has gone since, and its elements go with it.
        let port = self.worker.port(real)?;
        let Some(conn) = conn else {
            if offloadable {
                port.conn_table_full();
                self.refused.push_back((Instant::now() + REFUSED_PAUSE, key));
            }
            return None;
        };
        // Rules of admission are about ports, whatever stands above them.
        let name = self.backend.links().name(real);
        let admitted =
            self.backend.tunables().admission.admit(&name, &conn.key(), &said(sight, &entry));
        let ipv6 = entry.original.is_ipv6();
        let firewall_says = || {
            self.backend.firewall().is_last(sight.hook, ipv6)?;
            let links = self.backend.links();
            self.backend.firewall().none_at_egress(|name| leaves_by(links, sight.out_dev, name))?;
            // Packets of a VRF have passed prerouting on a netdev that is enslaved to it before.
            let mut passed = if links.is_vrf(iif) { links.ports_of(iif) } else { Vec::new() };
            passed.push(iif);
            let mut clear = passed
                .into_iter()
                .map(|i| self.backend.firewall().zone_is_clear(entry.zone, i, &links.name(i)));
            clear.try_for_each(|c| c)
        };
        let passed = admitted.and_then(|()| firewall_says());
        let path = match passed {
            Ok(()) => PathSpec::Resolve(PathHint {
                ingress: (real != iif).then_some(iif),
                eth_dst: mac(0),
                egress: sight.out_dev,
                mark: Some(sight.mark),
                bridged,
                vlan: sight.vlan,
                firewall: Some(firewall),
            }),
            Err(rejection) => PathSpec::Refused(Box::new(rejection)),
        };
        Some(Candidate { port: real, conn, direction, path, key, to: mac(0) })
    }

    /// A port has one slot for a direction, and its rule is for the netdev above it that it was first
    /// seen on. When packets arrive by another (a path that moved from one VLAN to another of the same
    /// port), or are bridged to another receiver, and the rule is not used any more, it gives way; until
    /// then this is looked at again.
    fn arrives_otherwise(
        &mut self,
        conn: &ConnHandle,
        direction: Direction,
        port: Ifindex,
        key: LedgerKey,
        to: Option<MacAddr>,
    ) {
        let slots = self.engine.slots(conn);
        let slot = slots.iter().find(|s| (s.netdev.ifindex, s.direction) == (port, direction));
        let Some((slot, path)) = slot.and_then(|s| Some((s, s.path?))) else { return };
        let same = path.iif.unwrap_or(port) == key.iif && (!path.bridged || path.dst_mac == to);
        if slot.state != SlotState::Installed || same {
            return;
        }
        if slot.idle_ms.is_some_and(|idle| idle >= UNUSED_MS) {
            let generation = slot.netdev.generation;
            self.engine.slot_retract(conn, direction, generation, TakenBack::Moved);
        } else {
            self.refused.push_back((Instant::now() + REFUSED_PAUSE, key));
        }
    }

    /// Whether the engine knows the connection: a flowtable that has it can be a provider's.
    fn is_ours(&self, entry: &CtEntry, id: CtId) -> bool {
        let key = ConnKey { zone: entry.zone, original: entry.original };
        self.engine.conn(&key).is_some_and(|c| c.tag() == u64::from(id.0))
    }

    fn rearm_refused(&mut self) {
        let now = Instant::now();
        let due = self.refused.partition_point(|(at, _)| *at <= now);
        let keys: Vec<_> = self.refused.drain(..due).map(|(_, key)| key).collect();
        self.backend.rearming().soon(keys);
    }
}

/// Whether what was routed or bridged to a netdev leaves by the one of this name: itself, or one below it. Of
/// `eth*`, and where it is not known what it was sent to, that is taken for granted.
fn leaves_by(links: &Links, out: Option<Ifindex>, name: &str) -> bool {
    let Some(link) = links.by_name(name) else { return name.ends_with('*') };
    out.is_none_or(|out| link.ifindex == out || links.above(link.ifindex).contains(&out))
}

/// What stands on a connection and on its packet.
fn said(sight: &Sight, entry: &CtEntry) -> Said {
    Said { mark: sight.mark, dscp: sight.dscp().unwrap_or(0), ..Said::of(entry) }
}

/// The element that a sight has made.
fn key_in_ledger(sight: &Sight, entry: &CtEntry, ct_id: CtId, direction: Direction) -> LedgerKey {
    let (hook, iif) = (sight.hook, sight.in_dev);
    LedgerKey { hook, iif, ct_id, sport: entry.original.sport(), direction }
}
