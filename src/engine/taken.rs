//! Why a rule was last taken back: kept with the slot, so that "why is it not offloaded now" has an answer also when
//! nothing refuses it.

/// Why a rule of a connection that lives on was taken back. Numbers are the engine's own; names are stable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
#[non_exhaustive]
pub enum TakenBack {
    /// Somebody asked for it: a flush, or the datapath for a reason of its own.
    #[default]
    Asked = 1,
    /// The firewall's rules have changed, so that they have to be asked again.
    Firewall = 2,
    /// Parts of the firewall change without an announcement: decisions are renewed from time to time.
    Renewed = 3,
    /// The connection's mark or its labels have changed.
    Mark = 4,
    /// Its route leads elsewhere now.
    Route = 5,
    /// Forwarding was switched off, or on again.
    Forwarding = 6,
    /// IPsec's policies concern it now.
    Ipsec = 7,
    /// The next hop's link-layer address has changed.
    Neighbour = 8,
    /// A netdev on its way has changed: its addresses, its MTU, what is above or below it.
    Netdev = 9,
    /// The netdev that it was sent on is down or gone.
    Egress = 10,
    /// A bridge sends it another way now, or has forgotten who it is for.
    Bridge = 11,
    /// It has arrived on another netdev than the one its rule was made for.
    Moved = 12,
    /// Its place was given to a busier connection.
    Evicted = 13,
    /// Somebody else has removed the rule.
    Lost = 14,
    /// All rules of the port had to go: its qdisc, its program or its flowtable was replaced, or somebody was put in front.
    Port = 15,
    /// It was silent: its entry of conntrack runs out as it would without a rule.
    Silent = 16,
    /// A RST was seen: whether it lives shows in software.
    Reset = 17,
    /// The configuration was read anew, and says otherwise who may be offloaded.
    Admission = 18,
    /// Queueing disciplines, filters or programs of others have come or gone where it leaves.
    AtEgress = 19,
}

impl TakenBack {
    /// All, by number.
    pub const ALL: &'static [Self] = &[
        Self::Asked,
        Self::Firewall,
        Self::Renewed,
        Self::Mark,
        Self::Route,
        Self::Forwarding,
        Self::Ipsec,
        Self::Neighbour,
        Self::Netdev,
        Self::Egress,
        Self::Bridge,
        Self::Moved,
        Self::Evicted,
        Self::Lost,
        Self::Port,
        Self::Silent,
        Self::Reset,
        Self::Admission,
        Self::AtEgress,
    ];

    /// The stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Asked => "flushed",
            Self::Firewall => "firewall-changed",
            Self::Renewed => "firewall-renewed",
            Self::Mark => "mark-changed",
            Self::Route => "route-changed",
            Self::Forwarding => "forwarding-switched",
            Self::Ipsec => "ipsec-changed",
            Self::Neighbour => "neighbour-changed",
            Self::Netdev => "netdev-changed",
            Self::Egress => "egress-gone",
            Self::Bridge => "bridge-changed",
            Self::Moved => "ingress-changed",
            Self::Evicted => "evicted",
            Self::Lost => "rule-removed",
            Self::Port => "port-renewed",
            Self::Silent => "silent",
            Self::Reset => "reset",
            Self::Admission => "admission-changed",
            Self::AtEgress => "egress-changed",
        }
    }

    /// The same for people, without a final dot.
    #[must_use]
    pub const fn help(self) -> &'static str {
        match self {
            Self::Asked => "somebody flushed it",
            Self::Firewall => "the firewall's rules have changed",
            Self::Renewed => {
                "parts of the firewall change without an announcement, so decisions are renewed"
            }
            Self::Mark => "its mark or its labels have changed",
            Self::Route => "its route has changed",
            Self::Forwarding => "forwarding was switched",
            Self::Ipsec => "IPsec's policies have changed",
            Self::Neighbour => "the next hop's MAC address has changed",
            Self::Netdev => "a netdev on its way has changed",
            Self::Egress => "the netdev that it was sent on went down, or went",
            Self::Bridge => "a bridge has learnt another way, or forgotten this one",
            Self::Moved => "it has arrived on another netdev",
            Self::Evicted => "the port is full, and a busier connection has its place",
            Self::Lost => "somebody else has removed it",
            Self::Port => {
                "all rules of the port had to go (its qdisc, program or flowtable was replaced, or somebody was put in front)"
            }
            Self::Silent => "it was silent",
            Self::Reset => "a RST was seen",
            Self::Admission => "the configuration was read anew",
            Self::AtEgress => {
                "queueing disciplines, filters or programs of others have changed where it leaves"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_there_by_number_and_their_names_are_distinct() {
        let names: std::collections::HashSet<_> = TakenBack::ALL.iter().map(|t| t.name()).collect();
        let words: std::collections::HashSet<_> = TakenBack::ALL.iter().map(|t| t.help()).collect();
        assert_eq!((names.len(), words.len()), (TakenBack::ALL.len(), TakenBack::ALL.len()));
        for (n, t) in (1..).zip(TakenBack::ALL) {
            assert_eq!(*t as u8, n);
        }
    }
}
