//! What can be seen of an engine from outside: values, taken at one moment each.

use std::sync::atomic::Ordering;

use netdev_providers::{Capability, Cookie, Direction, Ifindex, Netdev, Reason, Rejection, RuleId};

use super::Engine;
use super::conn::{ConnHandle, PathTaken};
pub use super::counters::Totals;
use super::detail::{Detail, Said};
use super::latency::LatencyBucket;
use super::port::Port;
pub use super::port::{Chosen, Refusal};
pub use super::progress::Slow;
use super::slot::SlotState;
use super::taken::TakenBack;

/// A port.
#[derive(Clone, Debug)]
pub struct PortView {
    /// Its netdev.
    pub netdev: Netdev,
    /// The class it is bound to.
    pub provider: Option<&'static str>,
    /// Why to that one.
    pub chosen: Option<Chosen>,
    /// What the provider found out about the netdev.
    pub about: String,
    /// Filters and programs of others that packets pass before they come to its rules, in words.
    pub in_front: Vec<String>,
    /// What the netdev takes and what not, as far as the provider tried.
    pub capabilities: Vec<Capability>,
    /// Why other classes did not bind it.
    pub refusals: Vec<Refusal>,
    /// Why nothing more is offloaded on it.
    pub fault: Option<String>,
    /// What has not come back, and why nothing is offered meanwhile.
    pub slow: Option<Slow>,
    /// Rules that could not be deleted so far; each is tried until the port goes.
    pub undeleted: u64,
    /// It is being deleted.
    pub draining: bool,
    /// Slots by state, as held: offers waiting, installed, rejected, deleting.
    pub slots: SlotCounts,
    /// Rules that the NIC has.
    pub in_hw: u64,
    /// How many rules there may be, where there is a limit.
    pub capacity: Option<u64>,
    /// The limit was not configured: the provider said that it is full.
    pub capacity_learnt: bool,
    /// Rules that gave way to those of busier connections.
    pub evictions: u64,
    /// First sights.
    pub sights: u64,
    /// What has become of rules and offers since the port was added.
    pub totals: Totals,
    /// Packets carried by rules, past and present, as of the last sweep.
    pub packets: u64,
    /// Bytes carried by rules, past and present, as of the last sweep.
    pub bytes: u64,
    /// How long the provider took for operations since the port was added.
    pub latency: Vec<LatencyBucket>,
}

/// How many slots are in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotCounts {
    /// Queued or in flight.
    pub pending: u64,
    /// With a rule.
    pub installed: u64,
    /// Refused.
    pub rejected: u64,
    /// On the way out.
    pub deleting: u64,
}

/// A slot.
#[derive(Clone, Debug)]
pub struct SlotView {
    /// The netdev of its port.
    pub netdev: Netdev,
    /// Its direction.
    pub direction: Direction,
    /// Its state.
    pub state: SlotState,
    /// Why it is rejected, or why its rule could not be deleted so far.
    pub rejection: Option<Rejection>,
    /// When it may be offered again, in milliseconds from now.
    pub retry_in_ms: Option<u64>,
    /// Where its rule forwards to.
    pub path: Option<PathTaken>,
    /// Whether the NIC has the rule.
    pub in_hw: Option<bool>,
    /// Why it has not, in the driver's words, where it was offered the rule and there are some.
    pub nic_said: Option<Box<str>>,
    /// Packets that the rule carried, as of the last sweep.
    pub packets: u64,
    /// Bytes that the rule carried, as of the last sweep.
    pub bytes: u64,
    /// Milliseconds since it was last used, or since it was installed.
    pub idle_ms: Option<u64>,
    /// What marks the rule: an adopted one has the mark that it was made with.
    pub cookie: Cookie,
    /// The provider's name for it.
    pub rule: Option<RuleId>,
}

/// Why a direction of a connection is not offloaded on a port now, though nothing refuses it: it waits for its next
/// packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Past {
    /// It had a rule, which was taken back.
    TakenBack(TakenBack),
    /// Its last offer was refused, and the pause after that is over.
    Refused(Reason),
}

/// What was last the matter with an empty slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PastView {
    /// The netdev of the port.
    pub netdev: Netdev,
    /// Its direction.
    pub direction: Direction,
    /// Why.
    pub why: Past,
    /// Milliseconds since then.
    pub ago_ms: u64,
}

impl Engine {
    /// All ports, by ifindex.
    #[must_use]
    pub fn ports(&self) -> Vec<PortView> {
        self.0.publication.table().iter().map(|p| port_view(p)).collect()
    }

    /// The port of this netdev, and the class it is bound to. Cheap, unlike [`ports`](Self::ports),
    /// which counts every slot.
    #[must_use]
    pub fn port(&self, ifindex: Ifindex) -> Option<(Netdev, Option<&'static str>)> {
        let table = self.0.publication.table();
        let port = table.get(ifindex)?;
        Some((port.netdev.clone(), port.binding.as_ref().map(|b| b.class)))
    }

    /// What has become of rules and offers, on all ports that there have ever been.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.0.totals.read()
    }

    /// One port.
    #[must_use]
    pub fn port_view(&self, ifindex: Ifindex) -> Option<PortView> {
        self.0.publication.table().get(ifindex).map(|p| port_view(p))
    }

    /// The netdevs of all ports, by ifindex. Cheap.
    #[must_use]
    pub fn netdevs(&self) -> Vec<Netdev> {
        self.0.publication.table().iter().map(|p| p.netdev.clone()).collect()
    }

    /// Calls `f` with each [slot](Self::slots) of every connection.
    pub fn each_slot(&self, mut f: impl FnMut(&ConnHandle, &SlotView)) {
        for conn in self.conns() {
            for slot in self.slots(&conn) {
                f(&conn, &slot);
            }
        }
    }

    /// The slots of a connection that are not empty, on living ports.
    #[must_use]
    pub fn slots(&self, conn: &ConnHandle) -> Vec<SlotView> {
        let now = self.now_ms();
        self.of_each_slot(conn, |port, direction, state, detail| {
            let installed = state == SlotState::Installed;
            let (rejection, nic_said) = match detail.said() {
                Some(Said::Rejected(why)) if state == SlotState::Rejected => {
                    (Some(why.clone()), None)
                }
                Some(Said::Undeleted(why)) if state == SlotState::Deleting => {
                    (Some(why.clone()), None)
                }
                Some(Said::ByNic(words)) if installed && detail.in_hw() != Some(true) => {
                    (None, Some(words.clone()))
                }
                _ => (None, None),
            };
            (state != SlotState::Empty).then(|| SlotView {
                netdev: port.netdev.clone(),
                direction,
                state,
                rejection,
                nic_said,
                retry_in_ms: detail.retry_at().ms().map(|at| at.saturating_sub(now)),
                path: detail.path.as_deref().copied(),
                in_hw: detail.in_hw(),
                packets: detail.packets,
                bytes: detail.bytes,
                idle_ms: installed.then(|| now.saturating_sub(detail.used_ms)),
                cookie: detail
                    .rule()
                    .and_then(|rule| port.adopted().get(&rule).copied())
                    .unwrap_or_else(|| self.0.cookie(conn, direction)),
                rule: detail.rule(),
            })
        })
    }

    /// What there is to say of each slot of a connection on a living port: by its state and its detail, of one moment.
    fn of_each_slot<R>(
        &self,
        conn: &ConnHandle,
        say: impl Fn(&Port, Direction, SlotState, &Detail) -> Option<R>,
    ) -> Vec<R> {
        let table = self.0.publication.table();
        conn.all_slots()
            .filter_map(|(direction, generation, slot)| {
                let port = table.by_generation(generation)?;
                let detail = slot.detail();
                let word = slot.word.load();
                let its = word.generation() == Some(generation);
                its.then(|| say(port, direction, word.state(), &detail)).flatten()
            })
            .collect()
    }

    /// What was last the matter with the slots of a connection that are empty now.
    #[must_use]
    pub fn past(&self, conn: &ConnHandle) -> Vec<PastView> {
        let now = self.now_ms();
        self.of_each_slot(conn, |port, direction, state, detail| {
            if state != SlotState::Empty {
                return None;
            }
            let refused = detail.refused.map(Past::Refused);
            let why = refused.or_else(|| detail.taken.map(Past::TakenBack))?;
            let (netdev, ago_ms) = (port.netdev.clone(), now.saturating_sub(detail.used_ms));
            Some(PastView { netdev, direction, why, ago_ms })
        })
    }

    /// The registered classes, by priority, and how many ports each has.
    #[must_use]
    pub fn classes(&self) -> Vec<(&'static str, usize)> {
        let table = self.0.publication.table();
        let bound = |name: &str| {
            table.iter().filter(|p| p.binding.as_ref().is_some_and(|b| b.class == name)).count()
        };
        self.class_names().iter().map(|name| (*name, bound(name))).collect()
    }
}

fn port_view(port: &Port) -> PortView {
    let mut slots = SlotCounts { pending: port.queue.pending() as u64, ..SlotCounts::default() };
    let (mut in_hw, mut undeleted, c) = (0, 0, &port.counters);
    let (mut packets, mut bytes) =
        (c.past_packets.load(Ordering::Relaxed), c.past_bytes.load(Ordering::Relaxed));
    let mut count = |conn: &ConnHandle, d| {
        let Some(slot) = conn.slot(port.generation(), d) else { return };
        let detail = slot.detail();
        packets += detail.packets;
        bytes += detail.bytes;
        match slot.word.load().state() {
            SlotState::Pending => slots.pending += 1,
            SlotState::Installed => {
                slots.installed += 1;
                in_hw += u64::from(detail.in_hw() == Some(true));
            }
            SlotState::Rejected => slots.rejected += 1,
            SlotState::Deleting => {
                slots.deleting += 1;
                undeleted += u64::from(detail.attempts() > 0);
            }
            SlotState::Empty => {}
        }
    };
    port.walk_held(|part| part.iter().for_each(|(conn, d)| count(conn, *d)));
    PortView {
        netdev: port.netdev.clone(),
        provider: port.binding.as_ref().map(|b| b.class),
        about: port
            .visit(|provider| provider.describe())
            .map(|told| told.unwrap_or_else(|panicked| panicked))
            .unwrap_or_default(),
        in_front: port
            .visit(|provider| provider.in_front())
            .and_then(Result::ok)
            .unwrap_or_default(),
        capabilities: port
            .visit(|provider| provider.capabilities())
            .and_then(Result::ok)
            .unwrap_or_default(),
        chosen: port.binding.as_ref().map(|b| b.chosen),
        refusals: port.refusals.clone(),
        fault: port.fault(),
        slow: port.slow(),
        undeleted,
        draining: port.draining.load(Ordering::Relaxed),
        slots,
        in_hw,
        capacity: port.capacity.limit().map(|(limit, _)| limit),
        capacity_learnt: port.capacity.limit().is_some_and(|(_, learnt)| learnt),
        evictions: c.evictions.load(Ordering::Relaxed),
        sights: port.queue.offered() as u64,
        totals: c.read(),
        packets,
        bytes,
        latency: c.latencies.buckets(),
    }
}
