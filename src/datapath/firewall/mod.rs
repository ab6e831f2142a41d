//! The firewall: what of it a decision to offload stands on, and how long that holds.
//!
//! Packets that rules of ours forward do not pass the firewall. So what it has let pass once holds until
//! it changes, and then:
//!
//! - **A sight carries the generation of the firewall** ([`Firewall::generation`]). What was sighted
//!   before a change is not installed after it: sights that are in the socket when the change is told
//!   are thrown away ([`Quarantine`]), offers that wait in a port's queue are refused when they are
//!   looked at ([`Firewall::is_current`]), and what is installed is taken back.
//! - [`model`] tells what a change concerns: nothing, connections with certain addresses, or all.
//! - Nothing of others may stand behind the chain that sights ([`Firewall::is_last`],
//!   [`Firewall::none_at_egress`]).
//! - What rules do to each packet, those that are offloaded go without: [`met`] tells what.
//! - Packets that a rule of ours takes for one connection's must not be another's, in another conntrack
//!   zone ([`zones`], [`Firewall::zone_is_clear`]).

pub(super) mod dump;
mod expr;
pub(super) mod legacy;
pub(super) mod met;
pub(super) mod model;
pub(super) mod zones;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, Instant};

use netdev_providers::{Ifindex, Reason, Rejection, Zone};

use self::model::EgressChain;
use self::zones::UnclearZone;
use super::netfilter::ledger::Hook;

/// A packet that has passed the old rules is sighted this much later than the change is told at most:
/// it is on its way between two hooks.
const IN_FLIGHT: Duration = Duration::from_millis(50);

/// What the threads of the datapath share of the firewall.
#[derive(Debug, Default)]
pub(super) struct Firewall {
    generation: AtomicU64,
    /// By [`Hook`], family IPv4 or IPv6: what stands behind our chain.
    behind: RwLock<Vec<Behind>>,
    egress: RwLock<Vec<EgressChain>>,
    zones: RwLock<Zones>,
}

/// What is known of conntrack zones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Zones {
    /// What chooses them by something that no rule of ours matches.
    pub unclear: Vec<UnclearZone>,
    /// There is a table `raw` of iptables-legacy, which nobody can read here.
    pub legacy_raw: bool,
}

/// A hook of others that packets pass after they were sighted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Behind {
    /// Where we stand.
    pub hook: Hook,
    /// Packets of IPv6; in a bridge it does not matter.
    pub ipv6: bool,
    /// What it is, for people.
    pub what: String,
}

impl Firewall {
    /// Which firewall it is: grows with each change that can concern what is offloaded.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The firewall has changed. To be called **before** rules are taken back: what is offered with an
    /// older generation is refused from now on, so that nothing comes behind what is taken back.
    pub(super) fn changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether what was sighted in this generation may be installed.
    ///
    /// # Errors
    /// A transient rejection: it is sighted again.
    pub(super) fn is_current(&self, generation: u64) -> Result<(), Rejection> {
        if generation == self.generation() {
            return Ok(());
        }
        let why = "the firewall has changed since this packet passed it";
        Err(Rejection::with_detail(Reason::Busy, why))
    }

    /// What of others stands behind the chain that sights now. True when that is news.
    pub(super) fn set_behind(&self, now: Vec<Behind>) -> bool {
        renew(&self.behind, now)
    }

    /// Whether packets that were sighted in this hook can be offloaded.
    ///
    /// # Errors
    /// Names what stands behind us, and could refuse them yet.
    pub(super) fn is_last(&self, hook: Hook, ipv6: bool) -> Result<(), Rejection> {
        let behind = self.behind.read().unwrap_or_else(PoisonError::into_inner);
        let same = |b: &&Behind| b.hook == hook && (hook == Hook::Bridge || b.ipv6 == ipv6);
        match behind.iter().find(same) {
            None => Ok(()),
            Some(b) => Err(Rejection::with_detail(
                Reason::FirewallBehind,
                format!("{} can refuse packets yet when they have been seen", b.what),
            )),
        }
    }

    /// The chains at egress that can refuse packets now. True when that is news.
    pub(super) fn set_egress(&self, now: Vec<EgressChain>) -> bool {
        renew(&self.egress, now)
    }

    /// Whether packets meet no chain any more when they leave. Rules in software send by the last netdev's own
    /// egress, and past those above it; rules in a NIC, and XDP, past all.
    ///
    /// # Errors
    /// Names a chain of a netdev that they leave by, which `leaves_by` tells of a name (or of `eth*`).
    pub(super) fn none_at_egress(&self, leaves_by: impl Fn(&str) -> bool) -> Result<(), Rejection> {
        let egress = self.egress.read().unwrap_or_else(PoisonError::into_inner);
        match egress.iter().find(|c| c.netdevs.iter().any(|n| leaves_by(n))) {
            None => Ok(()),
            Some(c) => Err(Rejection::with_detail(
                Reason::FirewallBehind,
                format!("{}, at egress, can refuse packets yet when they have been seen", c.what),
            )),
        }
    }
}

impl Firewall {
    /// What chooses conntrack zones now. True when that is news.
    pub(super) fn set_zones(&self, now: Zones) -> bool {
        renew(&self.zones, now)
    }

    /// Whether a rule for packets of this zone takes those of no other: what arrives by this netdev is of
    /// the zone that netdev, tag and tuple say.
    ///
    /// # Errors
    /// Names what chooses zones by something else.
    pub(super) fn zone_is_clear(
        &self,
        zone: Zone,
        iif: Ifindex,
        name: &str,
    ) -> Result<(), Rejection> {
        let zones = self.zones.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(unclear) = zones.unclear.iter().find(|z| z.concerns(iif.get(), name)) {
            return Err(Rejection::with_detail(Reason::ZoneUnclear, unclear.what.as_str()));
        }
        if zones.legacy_raw && zone != Zone(0) {
            let why = "table raw of iptables-legacy may have chosen the zone, and cannot be read";
            return Err(Rejection::with_detail(Reason::ZoneUnclear, why));
        }
        Ok(())
    }
}

/// Stores what is known now. True when that is news.
fn renew<T: PartialEq>(known: &RwLock<T>, now: T) -> bool {
    let mut known = known.write().unwrap_or_else(PoisonError::into_inner);
    let news = *known != now;
    *known = now;
    news
}

/// What the reader of sights does after a change: until the socket was seen empty, a while after it, its
/// sights are of packets that the old rules may have let pass.
#[derive(Debug, Default)]
pub(super) struct Quarantine {
    generation: u64,
    until: Option<Instant>,
}

impl Quarantine {
    /// To be asked after each read, with whether it has emptied the socket: whether the sights of this
    /// read can be believed, as sights of that generation.
    pub(super) fn passed(&mut self, generation: u64, emptied: bool, now: Instant) -> bool {
        if generation != self.generation {
            self.generation = generation;
            self.until = Some(now + IN_FLIGHT);
        }
        match self.until {
            None => true,
            // This read may hold older ones still.
            Some(until) => {
                if emptied && now >= until {
                    self.until = None;
                }
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sights_are_not_believed_until_the_socket_was_empty_after_the_change() {
        let (mut q, start) = (Quarantine::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        assert!(q.passed(0, false, at(0)));
        // The first read after the change, and all until one that leaves nothing, a while later.
        assert!(!q.passed(1, true, at(1)));
        assert!(!q.passed(1, false, at(60)));
        assert!(!q.passed(1, false, at(61)));
        assert!(!q.passed(1, true, at(70)), "this one may have older sights yet");
        assert!(q.passed(1, false, at(71)));
        // Another change meanwhile begins anew.
        assert!(!q.passed(2, true, at(80)));
        assert!(!q.passed(3, true, at(120)));
        assert!(!q.passed(3, true, at(140)));
        assert!(!q.passed(3, true, at(171)));
        assert!(q.passed(3, true, at(172)));
    }

    #[test]
    fn what_stands_behind_us_keeps_its_own_family_and_hook_from_being_offloaded() {
        let firewall = Firewall::default();
        let what = "chain late of table ip x".to_owned();
        let behind = vec![Behind { hook: Hook::Inet, ipv6: false, what }];
        assert!(firewall.set_behind(behind.clone()));
        assert!(!firewall.set_behind(behind));
        let refused = firewall.is_last(Hook::Inet, false).unwrap_err();
        assert!(refused.detail.unwrap().contains("chain late of table ip x"));
        assert!(firewall.is_last(Hook::Inet, true).is_ok());
        assert!(firewall.is_last(Hook::Bridge, false).is_ok());
        assert!(firewall.set_behind(Vec::new()));
        assert!(firewall.is_last(Hook::Inet, false).is_ok());
    }

    #[test]
    fn zones_that_something_else_chooses_are_refused_where_it_chooses() {
        let firewall = Firewall::default();
        let asked = |zone, iif, name: &str| {
            firewall.zone_is_clear(Zone(zone), Ifindex::new(iif).unwrap(), name)
        };
        assert_eq!(asked(7, 2, "lan"), Ok(()));
        let what = "chain pre of table raw chooses conntrack zones by the mark".to_owned();
        let unclear = vec![UnclearZone { what, iif: Some(zones::Iif::Name("lan".into())) }];
        let now = Zones { unclear, legacy_raw: false };
        assert!(firewall.set_zones(now.clone()) && !firewall.set_zones(now));
        for zone in [0, 7] {
            let refused = asked(zone, 2, "lan").unwrap_err();
            assert_eq!(refused.reason, Reason::ZoneUnclear);
            assert!(refused.detail.unwrap().contains("chain pre of table raw"));
            assert_eq!(asked(zone, 3, "wan"), Ok(()));
        }
        // Of what cannot be read only the zone is seen that it has chosen.
        assert!(firewall.set_zones(Zones { legacy_raw: true, ..Zones::default() }));
        assert_eq!(asked(0, 2, "lan"), Ok(()));
        assert_eq!(asked(7, 2, "lan").unwrap_err().reason, Reason::ZoneUnclear);
    }

    #[test]
    fn an_offer_of_an_older_firewall_is_refused() {
        let firewall = Firewall::default();
        let before = firewall.generation();
        assert!(firewall.is_current(before).is_ok());
        firewall.changed();
        assert!(firewall.is_current(before).is_err());
        assert!(firewall.is_current(firewall.generation()).is_ok());
    }

    #[test]
    fn a_chain_at_egress_is_named_to_what_leaves_by_its_netdev() {
        let firewall = Firewall::default();
        let chain = EgressChain {
            what: "chain c of table netdev t".to_owned(),
            netdevs: ["wan".to_owned(), "eth*".to_owned()].into(),
        };
        assert!(firewall.set_egress(vec![chain.clone()]) && !firewall.set_egress(vec![chain]));
        assert_eq!(firewall.none_at_egress(|name| name == "lan"), Ok(()));
        for of_it in ["wan", "eth*"] {
            let refused = firewall.none_at_egress(|name| name == of_it).unwrap_err();
            assert_eq!(refused.reason, Reason::FirewallBehind);
            assert!(refused.detail.unwrap().contains("chain c of table netdev t"));
        }
        assert!(firewall.set_egress(Vec::new()));
        assert_eq!(firewall.none_at_egress(|_| true), Ok(()));
    }
}
