//! The block of prios that a port's rules stand at.
//!
//! # Why 0xc100 and up
//! A filter added without a prio gets the one below the lowest of those from 0x8000 on, or 0xC000
//! when there is none (`tcf_auto_prio`, called with what follows 0x8000 in the chain). So filters
//! that other people add without a prio come **before** ours, whether ours are there already or
//! not, and filters with a small prio of their own as well: ours only take what others let pass.

//!
//! # Order
//! First what untagged frames are asked for, then what tagged frames are: a frame passes over the
//! prios of other ethertypes, which costs a comparison each.

use super::uapi::{Family, Prio};

/// The lowest prio of the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Prios(u16);

/// What a prio of the block is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// flower, `skip_sw`: TTL and hop limit.
    HardwareGuards = 0,
    /// bpf, `skip_hw`.
    SoftwareGuards = 2,
    /// flower: the flows.
    Flows = 4,
}

impl Use {
    const ALL: [Self; 3] = [Self::HardwareGuards, Self::SoftwareGuards, Self::Flows];
}

impl Prios {
    /// How many prios a block has; blocks that are tried one after the other are that far apart.
    pub(super) const COUNT: u16 = 12;

    /// `None` when the block does not fit, or there is no prio in front of it (0 means "choose one").
    pub(super) fn new(base: u16) -> Option<Self> {
        base.checked_add(Self::COUNT - 1)?;
        (base >= 2).then_some(Self(base))
    }

    /// The block behind this one.
    pub(super) fn next(self) -> Option<Self> {
        Self::new(self.0.checked_add(Self::COUNT)?)
    }

    /// One of its prios.
    pub(super) const fn of(self, what: Use, family: Family) -> Prio {
        let tagged = if family.is_tagged() { Self::COUNT / 2 } else { 0 };
        Prio(self.0 + tagged + what as u16 + family.is_ipv6() as u16)
    }

    /// All of them, in order.
    pub(super) fn all(self) -> impl Iterator<Item = (Use, Family, Prio)> {
        [Family::UNTAGGED, Family::TAGGED]
            .into_iter()
            .flat_map(|families| Use::ALL.into_iter().flat_map(move |u| families.map(|f| (u, f))))
            .map(move |(u, f)| (u, f, self.of(u, f)))
    }

    /// In front of the block, for 802.1Q: where priority tags are taken off.
    pub(super) const fn tags(self) -> Prio {
        Prio(self.first())
    }

    /// Filters with a smaller prio stand in front of ours.
    pub(super) const fn first(self) -> u16 {
        self.0 - 1
    }

    pub(super) fn contains(self, prio: u16) -> bool {
        (self.first()..=self.0 + (Self::COUNT - 1)).contains(&prio)
    }

    /// The family whose flows are at this prio.
    pub(super) fn flows_at(self, prio: Prio) -> Option<Family> {
        Family::ALL.into_iter().find(|&f| self.of(Use::Flows, f) == prio)
    }
}

impl std::fmt::Display for Prios {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.0, self.0 + (Self::COUNT - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_twelve_prios_in_a_row() {
        let p = Prios::new(0xc100).unwrap();
        let all: Vec<u16> = p.all().map(|(_, _, p)| p.0).collect();
        assert_eq!(all, (0xc100..0xc10c).collect::<Vec<_>>());
        assert!(p.contains(0xc10b) && !p.contains(0xc10c));
        assert_eq!((p.tags(), p.first()), (Prio(0xc0ff), 0xc0ff), "one in front of it");
        assert!(p.contains(0xc0ff) && !p.contains(0xc0fe));
        assert_eq!(p.flows_at(Prio(0xc105)), Some(Family::Ipv6));
        assert_eq!(p.flows_at(Prio(0xc10a)), Some(Family::TaggedIpv4));
        assert_eq!(p.flows_at(Prio(0xc103)), None);
        assert_eq!(p.flows_at(Prio(0xc109)), None);
    }

    #[test]
    fn a_block_that_does_not_fit_is_refused() {
        assert_eq!((Prios::new(0), Prios::new(1)), (None, None));
        assert_eq!(Prios::new(0xfff5), None);
        assert_eq!(Prios::new(0xfff4).unwrap().next(), None);
        let second = Prios::new(0xc100).unwrap().next().unwrap();
        assert_eq!(second.to_string(), "49420-49431", "behind the first");
    }
}
