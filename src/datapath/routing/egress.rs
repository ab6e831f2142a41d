//! Who decides about packets where they leave: queueing disciplines that shape or classify, filters, programs. Rules in
//! a NIC, and XDP, send past them; a rule of any kind sends past those above the netdev that it sends to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, RwLock};

use netdev_providers::netlink::NetlinkError;
use netdev_providers::netlink::egress::{self, AtEgress};
use netdev_providers::{Ifindex, Reason, Rejection};
use nix::errno::Errno;

use super::links::Links;

/// What stands at egress of each netdev, shared between who reads it and who resolves paths.
#[derive(Clone, Debug, Default)]
pub struct Egress(Arc<RwLock<Known>>);

#[derive(Debug, Default)]
struct Known {
    /// In words; `None`: it cannot be read (yet), and there may be somebody everywhere.
    there: Option<BTreeMap<Ifindex, String>>,
    /// By tcx, where there are any.
    programs: BTreeMap<Ifindex, Vec<u32>>,
}

/// What was read.
#[derive(Clone, Debug, Default)]
pub struct Read {
    there: BTreeMap<Ifindex, String>,
    programs: BTreeMap<Ifindex, Vec<u32>>,
}

/// Reads who stands where, of these netdevs.
///
/// # Errors
/// A failure of the exchange.
pub fn read(netdevs: impl IntoIterator<Item = Ifindex>) -> Result<Read, NetlinkError> {
    let mut found = match egress::qdiscs_and_filters() {
        // A kernel without queueing disciplines.
        Err(e) if e.errno() == Some(Errno::EOPNOTSUPP) => AtEgress::new(),
        other => other?,
    };
    let mut programs = BTreeMap::new();
    for netdev in netdevs {
        let ids = egress::programs(netdev);
        if !ids.is_empty() {
            let words = ids.iter().map(|id| egress::program_in_words(*id));
            found.entry(netdev).or_default().extend(words);
            programs.insert(netdev, ids);
        }
    }
    let there = found.into_iter().map(|(netdev, words)| (netdev, words.join(", "))).collect();
    Ok(Read { there, programs })
}

/// Whether packets that leave by `real`, sent there by way of `oif` (or to itself), pass the egress of this netdev.
#[must_use]
pub fn leaves_through(links: &Links, real: Ifindex, oif: Option<Ifindex>, netdev: Ifindex) -> bool {
    if netdev == real || oif == Some(netdev) {
        return true;
    }
    let Some(oif) = oif else { return false };
    // Between the two.
    links.above(real).contains(&netdev) && links.above(netdev).contains(&oif)
}

impl Egress {
    /// What is known now; `None`: nothing can be. Returns the netdevs of which it is news.
    pub fn set(&self, now: Option<Read>) -> News {
        let (now, programs) = now.map(|r| (r.there, r.programs)).unzip();
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        known.programs = programs.unwrap_or_default();
        let news = match (&known.there, &now) {
            (None, None) => News::Of(BTreeSet::new()),
            (Some(before), Some(now)) => {
                let changed = before.keys().chain(now.keys());
                News::Of(changed.filter(|i| before.get(i) != now.get(i)).copied().collect())
            }
            _ => News::OfAll,
        };
        known.there = now;
        news
    }

    /// Whether other programs stand there than were read. One system call.
    #[must_use]
    pub fn has_other_programs(&self, netdev: Ifindex) -> bool {
        let now = egress::programs(netdev);
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        known.programs.get(&netdev).map_or(&[][..], Vec::as_slice) != now
    }

    /// Who stands there, in words.
    #[must_use]
    pub fn at(&self, netdev: Ifindex) -> Option<String> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).there.as_ref()?.get(&netdev).cloned()
    }

    /// Whether somebody stands at egress of the netdev that packets leave by, whom a rule has to give them to.
    /// `may_be_passed`: netdevs, by name, where that does not matter.
    ///
    /// # Errors
    /// [`Reason::OthersAtEgress`]: somebody stands above that netdev, whom all rules pass by.
    pub fn decides(
        &self,
        links: &Links,
        real: Ifindex,
        oif: Option<Ifindex>,
        may_be_passed: impl Fn(&str) -> bool,
    ) -> Result<bool, Rejection> {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let Some(there) = &known.there else { return Ok(true) };
        let mut decides = false;
        for (&netdev, who) in there {
            if !leaves_through(links, real, oif, netdev) || may_be_passed(&links.name(netdev)) {
                continue;
            }
            if netdev != real {
                let name = links.name(netdev);
                let why =
                    format!("{who} at {name}, which stands above the netdev that rules send to");
                return Err(Rejection::with_detail(Reason::OthersAtEgress, why));
            }
            decides = true;
        }
        Ok(decides)
    }
}

/// Where something has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// At these netdevs.
    Of(BTreeSet<Ifindex>),
    /// Perhaps everywhere.
    OfAll,
}

impl News {
    /// Nowhere.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::Of(BTreeSet::new())
    }

    /// Whether it concerns packets that leave this way: see [`leaves_through`].
    #[must_use]
    pub fn concerns(&self, links: &Links, real: Ifindex, oif: Option<Ifindex>) -> bool {
        match self {
            Self::Of(netdevs) => netdevs.iter().any(|n| leaves_through(links, real, oif, *n)),
            Self::OfAll => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::links::{Layer, Link};
    use super::super::stack;
    use super::*;

    fn ifindex(n: u32) -> Ifindex {
        Ifindex::new(n).unwrap()
    }

    /// wan (1), a VLAN device on it (2), a bridge that has that as its port (3), and lan (4).
    fn links() -> Links {
        let links = Links::default();
        let vlan = Layer::Vlan { lower: Some(ifindex(1)), id: 7, dot1q: true, qos: false };
        let layers = [
            ("wan", Layer::Real, None),
            ("wan.7", vlan, Some(3)),
            ("br", Layer::Bridge { vlan_filtering: false }, None),
            ("lan", Layer::Real, None),
        ];
        for (n, (name, layer, controller)) in (1..).zip(layers) {
            let name = name.to_owned();
            links.set(Link { name, mac: None, controller, ..stack::tests::link(n, layer) });
        }
        links
    }

    fn there(netdevs: &[u32]) -> Option<Read> {
        let there = netdevs.iter().map(|n| (ifindex(*n), format!("qdisc htb {n}:"))).collect();
        Some(Read { there, ..Read::default() })
    }

    #[test]
    fn a_rule_has_to_give_packets_to_who_stands_where_it_sends_and_none_passes_by_who_is_above() {
        let (egress, links) = (Egress::default(), links());
        let asked = |oif: Option<u32>, passed: &str| {
            egress
                .decides(&links, ifindex(1), oif.map(ifindex), |name| name == passed)
                .map_err(|r| r.detail.unwrap().to_string())
        };
        // Nobody knows: whoever may be there is not passed by.
        assert_eq!(asked(None, ""), Ok(true));
        egress.set(there(&[4]));
        assert_eq!((asked(None, ""), asked(Some(3), "")), (Ok(false), Ok(false)));
        egress.set(there(&[1]));
        assert_eq!((asked(None, ""), asked(Some(3), "")), (Ok(true), Ok(true)));
        assert_eq!(asked(None, "wan"), Ok(false));
        for above in [2, 3] {
            egress.set(there(&[above]));
            let name = links.name(ifindex(above));
            assert!(asked(Some(3), "").unwrap_err().contains(&format!("htb {above}: at {name},")));
            assert_eq!(asked(Some(3), &name), Ok(false));
            assert_eq!(asked(None, ""), Ok(false), "what is sent to wan itself does not pass it");
        }
        egress.set(there(&[3]));
        assert_eq!(asked(Some(2), ""), Ok(false), "nor what is sent to the VLAN device");
    }

    #[test]
    fn what_has_come_gone_or_changed_is_news_where_it_stands() {
        let (egress, links) = (Egress::default(), links());
        let of = |netdevs: &[u32]| News::Of(netdevs.iter().map(|n| ifindex(*n)).collect());
        assert!(egress.set(None).is_none());
        assert_eq!(egress.set(there(&[1, 2])), News::OfAll);
        assert!(egress.set(there(&[1, 2])).is_none());
        assert_eq!(egress.set(there(&[2, 3])), of(&[1, 3]));
        let mut other = there(&[2, 3]).unwrap();
        other.there.insert(ifindex(3), "qdisc cake 8001:".to_owned());
        assert_eq!(egress.set(Some(other)), of(&[3]));
        assert_eq!(egress.at(ifindex(3)).as_deref(), Some("qdisc cake 8001:"));
        assert_eq!(egress.set(None), News::OfAll);
        let concerns =
            |news: &News, oif: Option<u32>| news.concerns(&links, ifindex(1), oif.map(ifindex));
        assert!(concerns(&of(&[1]), None) && concerns(&of(&[2]), Some(3)));
        assert!(!concerns(&of(&[2]), None) && !concerns(&of(&[4]), Some(3)));
        assert!(concerns(&News::OfAll, None));
    }
}
