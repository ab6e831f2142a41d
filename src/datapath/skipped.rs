//! What packets that rules forward go without, though the slow path would have given it to them: by kind, in words. Where
//! there is such a thing on a machine, `ctoffload lint` tells ([`lint`](super::lint)).

/// A kind of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Skipped {
    /// `limit`; `hashlimit` of iptables.
    Limit,
    /// `quota`.
    Quota,
    /// `ct bytes`, `ct packets`, `ct avgpkt`; `connbytes`.
    CtBytes,
    /// `ct count`; `connlimit`.
    CtCount,
    /// `add @set`, `update @set`; `recent`, `SET`.
    SetUpdate,
    /// Elements that go by themselves.
    SetTimeout,
    /// `meta hour`, `meta day`, `meta time`; `time`.
    Time,
    /// `numgen`; `statistic`.
    Random,
    /// `meta mark set`; `MARK`, `CONNMARK --restore-mark`.
    Mark,
    /// `meta priority set`; `CLASSIFY`.
    Priority,
    /// `ip dscp set`, any other write to the packet; `DSCP`, `TOS`, `TTL`, `HL`.
    Header,
    /// `queue`; `NFQUEUE`.
    Queue,
    /// ipset.
    Ipset,
    /// iptables-legacy.
    Legacy,
    /// What stands at egress of a netdev of `[admission] bypass-egress`.
    Egress,
    /// What rules in a NIC leave undone.
    InHardware,
    /// `dup`; `TEE`.
    Copy,
    /// `log`; `LOG`, `NFLOG`.
    Log,
    /// `counter`.
    Counter,
    /// `net.netfilter.nf_conntrack_acct`.
    Accounting,
}

impl Skipped {
    /// All of them, in the order in which they are told: what decides about packets first.
    pub const ALL: [Self; 20] = [
        Self::Limit,
        Self::Quota,
        Self::CtBytes,
        Self::CtCount,
        Self::SetUpdate,
        Self::SetTimeout,
        Self::Time,
        Self::Random,
        Self::Mark,
        Self::Priority,
        Self::Header,
        Self::Queue,
        Self::Ipset,
        Self::Legacy,
        Self::Egress,
        Self::InHardware,
        Self::Copy,
        Self::Log,
        Self::Counter,
        Self::Accounting,
    ];

    /// Its stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Limit => "limit",
            Self::Quota => "quota",
            Self::CtBytes => "ct-bytes",
            Self::CtCount => "ct-count",
            Self::SetUpdate => "set-update",
            Self::SetTimeout => "set-timeout",
            Self::Time => "time",
            Self::Random => "random",
            Self::Mark => "mark",
            Self::Priority => "priority",
            Self::Header => "header",
            Self::Queue => "queue",
            Self::Ipset => "ipset",
            Self::Legacy => "iptables-legacy",
            Self::Egress => "egress",
            Self::InHardware => "in-hardware",
            Self::Copy => "copy",
            Self::Log => "log",
            Self::Counter => "counter",
            Self::Accounting => "accounting",
        }
    }

    /// Whether it can change what becomes of a packet; otherwise it only counts or tells of it.
    #[must_use]
    pub const fn decides(self) -> bool {
        !matches!(self, Self::Copy | Self::Log | Self::Counter | Self::Accounting)
    }

    /// What offloaded packets skip.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::Limit => {
                "a limit counts the packets of the slow path alone, and stops none that is offloaded"
            }
            Self::Quota => {
                "a quota counts the bytes of the slow path alone, and stops nothing that is offloaded"
            }
            Self::CtBytes => {
                "conntrack's counters stand still while packets are offloaded: rules that look at them see old ones"
            }
            Self::CtCount => {
                "a limit of connections is looked at by packets of the slow path alone: an offloaded one stays above it"
            }
            Self::SetUpdate => {
                "packets add to a set, or renew its elements: those that are offloaded do not, and what they would have renewed may time out"
            }
            Self::SetTimeout => {
                "elements of a set go by themselves, which nobody announces: offloaded connections meet the rule again within [revalidate] every"
            }
            Self::Time => {
                "the time decides, and nobody announces that it has come: offloaded connections meet the rule again within [revalidate] every"
            }
            Self::Random => "chance decides about each packet, and about none that is offloaded",
            Self::Mark => {
                "the packet gets a mark: an offloaded one has none, and classifiers at egress that look for it do not find it"
            }
            Self::Priority => {
                "the packet gets a priority: an offloaded one has that of its ToS field, as ip_forward gives it"
            }
            Self::Header => {
                "the packet is written to (DSCP, TTL, options): an offloaded one leaves as it came, but for NAT and TTL"
            }
            Self::Queue => "a program looks at packets: it sees those of the slow path alone",
            Self::Ipset => {
                "a set of ipset changes without an announcement: offloaded connections meet the rule again within [revalidate] every"
            }
            Self::Legacy => {
                "nobody announces changes of iptables-legacy, or can read its rules here: offloaded connections meet them again within [revalidate] every"
            }
            Self::Egress => {
                "who stands at egress sees no packet that XDP or a NIC sends there ([admission] bypass-egress)"
            }
            Self::InHardware => {
                "a NIC may forward what the stack would not (wrong header checksums, IP options), and gives packets no priority"
            }
            Self::Copy => "packets are copied: those of the slow path alone",
            Self::Log => "packets are logged: those of the slow path alone",
            Self::Counter => "counters count the packets of the slow path alone",
            Self::Accounting => {
                "conntrack's accounting counts the packets of the slow path alone (`ctoffload conn show -s` has those of rules)"
            }
        }
    }

    /// What can be done about it.
    #[must_use]
    pub const fn advice(self) -> &'static str {
        match self {
            Self::Limit | Self::Quota | Self::CtBytes | Self::CtCount | Self::Random => {
                "ask it of new connections only (ct state new), or leave those that it is meant for on the slow path: [[admit]] verdict = \"never\", by address, port, or the mark that a rule gives the connection (ct mark set 0x10; ct-mark = \"0x10/0x10\")"
            }
            Self::SetUpdate => {
                "give its elements more time than connections take, or have new connections add them (ct state new), or leave those connections on the slow path ([[admit]] verdict = \"never\")"
            }
            Self::SetTimeout | Self::Time | Self::Ipset | Self::Legacy => {
                "set [revalidate] every to the time that a wrong decision may stand; sets and rules of nf_tables without timeouts are followed at once"
            }
            Self::Mark => {
                "mark the connection (ct mark set), and let the classifier at egress look for that; or leave those connections on the slow path: [[admit]] verdict = \"never\", mark = \"VALUE/MASK\""
            }
            Self::Priority | Self::Header => {
                "leave those connections on the slow path: [[admit]] verdict = \"never\", by address, port, dscp, or the mark that a rule gives the connection (ct-mark = \"0x10/0x10\")"
            }
            Self::Queue => {
                "have the program mark the connection when it has seen enough (ct-mark), and admit those only"
            }
            Self::Egress => {
                "take the netdev out of [admission] bypass-egress, or let the shaper count less than the line carries"
            }
            Self::InHardware => "offload = \"skip_hw\" for the port, where that matters",
            Self::Copy | Self::Log => {
                "ask it of new connections only (ct state new), or leave those connections on the slow path ([[admit]] verdict = \"never\")"
            }
            Self::Counter | Self::Accounting => {
                "add what rules have carried: `ctoffload -s conn show`, `ctoffload -s port show`"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_kind_has_a_name_and_words_of_its_own_and_what_decides_comes_first() {
        let names: BTreeSet<_> = Skipped::ALL.iter().map(|s| s.name()).collect();
        let words: BTreeSet<_> = Skipped::ALL.iter().map(|s| s.words()).collect();
        assert_eq!((names.len(), words.len()), (Skipped::ALL.len(), Skipped::ALL.len()));
        assert!(Skipped::ALL.is_sorted());
        assert!(Skipped::ALL.is_sorted_by_key(|s| !s.decides()));
    }
}
