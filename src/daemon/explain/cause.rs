//! Why a direction of a connection is not offloaded, one by one, in words. Each has a stable name, a sentence that no
//! other has, and what can be done where something can.
//!
//! The list of them is [`CAUSES`](crate::control::info::CAUSES).

use std::net::IpAddr;
use std::time::Duration;

use netdev_providers::{Reason, Rejection};

use crate::datapath::ended::Ended;
use crate::datapath::inspect::Unsighted;
use crate::datapath::netfilter::conntrack::TcpState;
use crate::engine::taken::TakenBack;

/// Why a direction is not offloaded.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Cause {
    NoPorts,
    NoEntry,
    Ended(Ended),
    ToRouter(IpAddr),
    FromRouter(IpAddr),
    Bridged(String),
    /// With what `min-packets` and `min-bytes` are.
    Unsighted(Unsighted, u64, u64),
    NoPort(String),
    Unreachable(IpAddr),
    /// Of a port; what declined it.
    NoProvider(String, Vec<String>),
    Faulty(String, String),
    Slow(String, String),
    Down(String),
    Draining(String),
    LedgerFull(u64),
    ConnTableFull(usize),
    Pending(String),
    Deleting(String),
    Undeleted(String, Rejection),
    InFront(String, Vec<String>),
    Refused(Refused),
    Taken(String, TakenBack, Duration),
    Waiting(String),
}

/// An offer that was refused.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Refused {
    pub(super) port: String,
    pub(super) why: Rejection,
    pub(super) retry: Option<Duration>,
    pub(super) ipv6: bool,
    /// The port's capacity, where that is what was configured.
    pub(super) configured: Option<u64>,
}

fn seconds(d: Duration) -> String {
    if d < Duration::from_secs(10) {
        format!("{:.1} s", d.as_secs_f64())
    } else {
        format!("{} s", d.as_secs())
    }
}

impl Cause {
    /// The stable name.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::NoPorts => "no-ports",
            Self::NoEntry => "no-entry",
            Self::Ended(e) if e.closed => "closed",
            Self::Ended(_) => "ended",
            Self::ToRouter(_) => "to-router",
            Self::FromRouter(_) => "from-router",
            Self::Bridged(_) => "bridged",
            Self::Unsighted(why, ..) => match why {
                Unsighted::Helper => "helper",
                Unsighted::SeqAdjust => "seq-adjust",
                Unsighted::NatClash => "nat-clash",
                Unsighted::Dying => "dying",
                Unsighted::OtherFlowtable => "other-flowtable",
                Unsighted::Packets(_) => "few-packets",
                Unsighted::Bytes(_) => "few-bytes",
                Unsighted::Uncounted => "not-counted",
                Unsighted::Opening(_) => "opening",
                Unsighted::Closing(_) => "closing",
                Unsighted::OneWay => "one-way",
            },
            Self::NoPort(_) => "no-port",
            Self::Unreachable(_) => "unreachable",
            Self::NoProvider(..) => "no-provider",
            Self::Faulty(..) => "port-faulty",
            Self::Slow(..) => "port-slow",
            Self::Down(_) => "port-down",
            Self::Draining(_) => "port-draining",
            Self::LedgerFull(_) => "ledger-full",
            Self::ConnTableFull(_) => "conn-table-full",
            Self::Pending(_) => "pending",
            Self::Deleting(_) => "deleting",
            Self::Undeleted(..) => "undeleted",
            Self::InFront(..) => "in-front",
            Self::Refused(r) => r.why.reason.name(),
            Self::Taken(_, why, _) => why.name(),
            Self::Waiting(_) => "waiting",
        }
    }

    /// Of both directions, where they have the same cause, each on a port of its own: told once.
    pub(super) fn of_both(&self, other: &Self) -> Option<Self> {
        let ports = |a: &str, b: &str| if a == b { a.to_owned() } else { format!("{a} and {b}") };
        match (self, other) {
            (Self::Taken(a, why, ago), Self::Taken(b, other, later)) if why == other => {
                Some(Self::Taken(ports(a, b), *why, *ago.min(later)))
            }
            (Self::Waiting(a), Self::Waiting(b)) => Some(Self::Waiting(ports(a, b))),
            (Self::Pending(a), Self::Pending(b)) => Some(Self::Pending(ports(a, b))),
            (Self::Deleting(a), Self::Deleting(b)) => Some(Self::Deleting(ports(a, b))),
            (Self::Refused(a), Self::Refused(b)) if a.why == b.why => {
                let (port, retry) = (ports(&a.port, &b.port), a.retry.min(b.retry));
                Some(Self::Refused(Refused { port, retry, ..a.clone() }))
            }
            _ => (self == other).then(|| self.clone()),
        }
    }

    /// One sentence, without a final dot.
    pub(super) fn sentence(&self) -> String {
        match self {
            Self::NoPorts => "no netdev is attached to the daemon".into(),
            Self::NoEntry => "neither the daemon nor conntrack has such a connection: it has never been, has expired, is in another zone, is not tracked (notrack), or the firewall drops it".into(),
            Self::Ended(e) => {
                let how = if e.closed {
                    "was closed by its ends"
                } else {
                    "has ended: its entry of conntrack expired, or was deleted"
                };
                let carried = match e.packets {
                    0 => "its rules had carried nothing".to_owned(),
                    n => format!("its rules had carried {n} packets"),
                };
                format!("it {how} {} ago ({carried})", seconds(e.ago()))
            }
            Self::ToRouter(address) => {
                format!("{address} is the router's own address: what is for the router is not forwarded")
            }
            Self::FromRouter(address) => {
                format!("{address} is the router's own address: what the router sends itself arrives on no netdev")
            }
            Self::Bridged(bridge) => {
                format!("both ends are behind bridge {bridge}, which forwards it without routing")
            }
            Self::Unsighted(why, min_packets, min_bytes) => {
                unsighted(why, *min_packets, *min_bytes)
            }
            Self::NoPort(netdev) => format!("its packets arrive on {netdev}, which is no port"),
            Self::Unreachable(address) => format!("the router has no route to {address}, where its packets come from"),
            Self::NoProvider(port, declined) if declined.is_empty() => {
                format!("its packets arrive on {port}, a port that is to have no provider")
            }
            Self::NoProvider(port, declined) => {
                format!("its packets arrive on {port}, a port without a provider: {}", declined.join("; "))
            }
            Self::Faulty(port, why) => format!("port {port} is faulty: {why}"),
            Self::Slow(port, why) => format!("port {port} is slow and takes no offers now: {why}"),
            Self::Down(netdev) => format!("its packets arrive on {netdev}, which is down"),
            Self::Draining(port) => format!("port {port} is being deleted"),
            Self::LedgerFull(size) => {
                format!("the ledger of sights is full ({size} elements): what is not in it is not sighted")
            }
            Self::ConnTableFull(limit) => {
                format!("the daemon keeps as many connections as it may ({limit}), and this one is not among them")
            }
            Self::Pending(port) => format!("{} being installed", rules_on(port, ["is", "are"])),
            Self::Deleting(port) => format!("{} being deleted", rules_on(port, ["is", "are"])),
            Self::Undeleted(port, why) => {
                format!("its rule on {port} is to go and could not be deleted so far: {why}")
            }
            Self::InFront(port, who) => {
                format!("its rule stands on {port} and has carried nothing: {} sees the packets first", who.join(", "))
            }
            Self::Refused(r) => {
                let mut text = format!("{} on {}: {}", r.why.reason, r.port, r.why.reason.help().trim_end_matches('.'));
                if let Some(detail) = &r.why.detail {
                    text.push_str(&format!(" (\"{detail}\")"));
                }
                if let Some(errno) = r.why.errno {
                    text.push_str(&format!(" ({errno:?})"));
                }
                if let Some(retry) = r.retry {
                    text.push_str(&format!("; offered again in {}", seconds(retry)));
                }
                text
            }
            Self::Taken(port, why, ago) => format!(
                "{} taken back {} ago: {}; no packet of it has come since that may be offloaded",
                rules_on(port, ["was", "were"]),
                seconds(*ago),
                why.help()
            ),
            Self::Waiting(port) => {
                format!("nothing is against it, but no packet of it has come on {port} since it might be offloaded")
            }
        }
    }

    /// What can be done: one sentence, without a final dot.
    pub(super) fn help(&self) -> Option<String> {
        Some(match self {
            Self::NoPorts => "attach one: `ctoffload port add NETDEV`, or a [[port]] whose pattern matches (`ip link`)".into(),
            Self::NoEntry => "see `conntrack -L` (with `--zone`), and copy the tuple from there".into(),
            Self::Bridged(_) => "to offload what bridges forward, set bridged = true under [sight]".into(),
            Self::Unsighted(why, ..) => return unsighted_help(why).map(str::to_owned),
            Self::NoPort(netdev) => format!("make it one: `ctoffload port add {netdev}`, or a [[port]] whose pattern matches it"),
            Self::Unreachable(address) => format!("see `ip route get {address}`"),
            Self::NoProvider(port, _) => format!("see `ctoffload port show {port}`, then delete the port and add it again"),
            Self::Faulty(port, _) => format!("delete the port and add it again: `ctoffload port del {port}`, `ctoffload port add {port}`; see the daemon's log"),
            Self::Slow(..) => "it goes on by itself when the NIC or the kernel has done what it was given; see `ctoffload port show`".into(),
            Self::Down(netdev) => format!("see `ip link show {netdev}`"),
            Self::LedgerFull(_) => "raise ledger-size under [sight]".into(),
            Self::ConnTableFull(_) => "raise limits.connections".into(),
            Self::InFront(port, _) => format!("see `ctoffload port show {port}` for who is in front; take it away, or put it behind"),
            Self::Undeleted(..) => "see the daemon's log; it is tried again until the port goes".into(),
            Self::Refused(r) => return refused_help(r),
            Self::Taken(_, why, _) => return taken_help(*why).map(str::to_owned),
            Self::ToRouter(_)
            | Self::FromRouter(_)
            | Self::Ended(_)
            | Self::Draining(_)
            | Self::Pending(_)
            | Self::Deleting(_)
            | Self::Waiting(_) => return None,
        })
    }
}

/// "its rule on lan is", "its rules on lan and wan are".
fn rules_on(ports: &str, [is, are]: [&str; 2]) -> String {
    if ports.contains(" and ") {
        format!("its rules on {ports} {are}")
    } else {
        format!("its rule on {ports} {is}")
    }
}

/// As `conntrack -L` has it.
const fn tcp_name(state: TcpState) -> &'static str {
    match state {
        TcpState::None => "NONE",
        TcpState::SynSent => "SYN_SENT",
        TcpState::SynRecv => "SYN_RECV",
        TcpState::Established => "ESTABLISHED",
        TcpState::FinWait => "FIN_WAIT",
        TcpState::CloseWait => "CLOSE_WAIT",
        TcpState::LastAck => "LAST_ACK",
        TcpState::TimeWait => "TIME_WAIT",
        TcpState::Close => "CLOSE",
        TcpState::SynSent2 => "SYN_SENT2",
    }
}

fn unsighted(why: &Unsighted, min_packets: u64, min_bytes: u64) -> String {
    match why {
        Unsighted::Helper => "a conntrack helper reads what it carries (its protocol opens further connections)".into(),
        Unsighted::SeqAdjust => "something changes what it carries: conntrack adjusts its sequence numbers".into(),
        Unsighted::NatClash => "its entry of conntrack stands in for another that was translated alike (NAT clash)".into(),
        Unsighted::Dying => "conntrack is deleting its entry".into(),
        Unsighted::OtherFlowtable => "it is in a flowtable of somebody else's, which forwards it (conntrack calls it [OFFLOAD])".into(),
        Unsighted::Packets(n) => format!("conntrack has counted {n} packets of it, and it takes {min_packets} (min-packets)"),
        Unsighted::Bytes(n) => format!("conntrack has counted {n} bytes of it, and it takes {min_bytes} (min-bytes)"),
        Unsighted::Uncounted => format!("it is older than conntrack's accounting, so that nobody knows whether it has the {min_bytes} bytes that it takes (min-bytes)"),
        Unsighted::Opening(Some(TcpState::Established)) => "conntrack has not seen both ends agree: the entry is ESTABLISHED, but not assured".into(),
        Unsighted::Opening(state) => format!("its handshake is not complete: conntrack has it as {}", state.map_or("not assured", tcp_name)),
        Unsighted::Closing(state) => format!("it is closing: conntrack has it as {}", tcp_name(*state)),
        Unsighted::OneWay => "nobody has answered it: a UDP connection is offloaded once it was answered".into(),
    }
}

const fn unsighted_help(why: &Unsighted) -> Option<&'static str> {
    Some(match why {
        Unsighted::Helper => {
            "see which rule assigns the helper (`nft list ruleset`, `ct helper`); without it the connection can be offloaded"
        }
        Unsighted::OtherFlowtable => "see `nft list flowtables`: who adds it there (`flow add`)",
        Unsighted::Packets(_) => {
            "lower min-packets under [admission] if connections as short as this are to be offloaded"
        }
        Unsighted::Bytes(_) => "lower min-bytes under [admission]",
        Unsighted::Uncounted => {
            "have connections counted from boot: net.netfilter.nf_conntrack_acct = 1 in sysctl.conf"
        }
        Unsighted::Opening(_) => {
            "see whether the answers come by this router, and what the firewall does with them"
        }
        Unsighted::OneWay => "one-way UDP can be offloaded, too: one-way-udp = true under [sight]",
        Unsighted::SeqAdjust | Unsighted::NatClash | Unsighted::Dying | Unsighted::Closing(_) => {
            return None;
        }
    })
}

const fn taken_help(why: TakenBack) -> Option<&'static str> {
    Some(match why {
        TakenBack::Firewall | TakenBack::Renewed | TakenBack::Mark => {
            "if it does not come back while packets are sent, the firewall drops them now: see `nft list ruleset`, `nft monitor trace`"
        }
        TakenBack::Route | TakenBack::Egress | TakenBack::Netdev | TakenBack::Forwarding => {
            "if it does not come back while packets are sent, they are not forwarded now: see `ip route get`, `ip link`"
        }
        TakenBack::Ipsec => "see `ip xfrm policy`",
        TakenBack::Neighbour => "see `ip neigh show` for the next hop: does it answer?",
        TakenBack::AtEgress => "see `tc qdisc show` and `tc filter show dev NETDEV egress`",
        TakenBack::Evicted => "see `ctoffload port show PORT` for its capacity",
        TakenBack::Lost => "see who removes filters: `tc monitor`",
        _ => return None,
    })
}

/// What an operator, or whoever writes the driver, can do about a refusal.
fn refused_help(r: &Refused) -> Option<String> {
    let port = &r.port;
    Some(match r.why.reason {
        Reason::Unsupported | Reason::Refused => {
            format!("see the kernel log; try the rule by hand: `tc filter add dev {port} ingress … flower`")
        }
        Reason::NotInHardware => {
            format!("check `ethtool -k {port} | grep hw-tc-offload`; or let rules live in software: offload = \"both\"")
        }
        Reason::TableFull => match r.configured {
            Some(n) => format!("raise the capacity of [[port]] for {port} (now {n}), or let fewer connections be offloaded ([[admit]], min-packets)"),
            None => "raise the NIC's flow table limit, or let fewer connections be offloaded ([[admit]], min-packets)".into(),
        },
        Reason::QueueFull => "connections come faster than this backend takes rules; raise limits.queue, or min-packets".into(),
        Reason::NeighbourUnresolved => "see `ip neigh show` for the next hop: does it answer ARP or neighbour discovery?".into(),
        Reason::NoRoute => "see `ip route get` for the destination".into(),
        Reason::NotForwarded => "see `sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding`, and those of the netdev".into(),
        Reason::EgressUnsupported => "see `ip -d link show` of the egress netdev; nf-flowtable may want it as a port of its own too".into(),
        Reason::IngressUnsupported => format!("see `ip -d link show {port}`, and what stands above it"),
        Reason::MtuMismatch => "make the egress MTU at least as large as the ingress MTU; in software: load act_police (CONFIG_NET_ACT_POLICE)".into(),
        Reason::Conflict => format!("look for a foreign filter: `tc filter show dev {port} ingress`"),
        Reason::ProviderFault => "a fault in the provider: see the daemon's log, and report it; delete the port and add it again".into(),
        Reason::ProviderSlow => "it goes on by itself when the NIC or the kernel has done what it was given".into(),
        Reason::DeviceError => "see the kernel log for what the NIC's driver says; it is tried again by itself".into(),
        Reason::NoProvider => format!("see `ctoffload port show {port}` for why each provider declined"),
        Reason::NatChecksum => "load act_bpf (CONFIG_NET_ACT_BPF), with CONFIG_BPF_SYSCALL".into(),
        Reason::ConnTableFull => "raise limits.connections".into(),
        Reason::NotAdmitted => "change the [[admit]] rules of the configuration, and reload it (SIGHUP)".into(),
        Reason::NoEffect => "see whether the NIC was reset, and what its driver says in the kernel log; in software, who is in front (`ctoffload port show PORT`); packets that no rule is for (fragments) look the same".into(),
        Reason::IpsecPolicy => "see `ip xfrm policy`".into(),
        Reason::TosRouted => "see `ip rule` and `ip route` for what has a tos, a dscp or a flow label".into(),
        Reason::MarkRouted => "set marks that are for a qdisc in prerouting already, or in the qdisc's own filters; see `ip rule`".into(),
        Reason::FirewallBehind => "in postrouting, give the chain a lower priority than 2147483647, or register it after the daemon's start; at egress, take its rules to postrouting".into(),
        Reason::ZoneUnclear => "let the netdev, the tag, addresses or ports choose the zone: see `nft list ruleset`".into(),
        Reason::HashRouted if r.ipv6 => "IPv6 chooses by the flow label, which may be another in each packet: give the route one next hop, or a rule for these addresses with a route of its own".into(),
        Reason::HashRouted => "set net.ipv4.fib_multipath_hash_policy to 0: addresses alone choose then".into(),
        Reason::OthersAtEgress => "rules in software of tc-flower, and ebpf with mode = \"tcx\", leave through the stack; or name the netdev in [admission] bypass-egress; see `tc qdisc show`, `tc filter show dev NETDEV egress`".into(),
        Reason::OthersInFront => format!("see `ctoffload port show {port}` for who is in front; rules in software (offload = \"both\") can stand behind them"),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::time::Instant;

    use netdev_providers::Zone;

    use crate::control::info::CAUSES;
    use crate::engine::conn::ConnKey;

    fn every() -> Vec<Cause> {
        let port = || "lan".to_owned();
        let address: IpAddr = "10.0.0.1".parse().unwrap();
        let original = "tcp 10.0.0.1:1 > 10.0.0.2:2".parse().unwrap();
        let ended = |closed| Ended {
            key: ConnKey { zone: Zone(0), original },
            reply: original.inverted(),
            packets: 5,
            closed,
            at: Instant::now(),
        };
        let refused = |reason: Reason, ipv6, configured| {
            Cause::Refused(Refused {
                port: port(),
                why: reason.into(),
                retry: None,
                ipv6,
                configured,
            })
        };
        let mut all = vec![
            Cause::NoPorts,
            Cause::NoEntry,
            Cause::Ended(ended(false)),
            Cause::Ended(ended(true)),
            Cause::ToRouter(address),
            Cause::FromRouter(address),
            Cause::Bridged("br0".into()),
            Cause::NoPort(port()),
            Cause::Unreachable(address),
            Cause::NoProvider(port(), vec![]),
            Cause::Faulty(port(), "it panicked".into()),
            Cause::Slow(port(), "a sweep".into()),
            Cause::Down(port()),
            Cause::Draining(port()),
            Cause::LedgerFull(7),
            Cause::ConnTableFull(7),
            Cause::Pending(port()),
            Cause::Deleting(port()),
            Cause::Undeleted(port(), Reason::Busy.into()),
            Cause::InFront(port(), vec!["filter pref 10".into()]),
            Cause::Waiting(port()),
        ];
        use Unsighted as U;
        for u in [
            U::Helper,
            U::SeqAdjust,
            U::NatClash,
            U::Dying,
            U::OtherFlowtable,
            U::Packets(3),
            U::Bytes(4),
            U::Uncounted,
            U::Opening(Some(TcpState::SynSent)),
            U::Closing(TcpState::FinWait),
            U::OneWay,
        ] {
            all.push(Cause::Unsighted(u, 20, 1000));
        }
        all.extend(
            Reason::ALL
                .iter()
                .filter(|r| !matches!(r, Reason::NoProvider | Reason::ConnTableFull))
                .map(|r| refused(*r, false, None)),
        );
        all.extend(TakenBack::ALL.iter().map(|t| Cause::Taken(port(), *t, Duration::from_secs(3))));
        all
    }

    #[test]
    fn names_and_sentences_are_pairwise_different_and_without_a_final_dot() {
        let (mut names, mut sentences) = (HashMap::new(), HashMap::new());
        for cause in every() {
            let (name, sentence) = (cause.name(), cause.sentence());
            assert!(!sentence.ends_with('.') && !sentence.contains('\n'), "{sentence}");
            if let Some(help) = cause.help() {
                assert!(!help.ends_with('.') && help != sentence, "{help}");
            }
            assert_eq!(names.insert(name, cause.clone()), None, "{name}");
            assert_eq!(sentences.insert(sentence.clone(), cause), None, "{sentence}");
        }
        assert!(names.len() >= 70, "{}", names.len());
        // Those that `ctoffload explain --help` lists are these, all of them.
        let listed: Vec<_> = CAUSES.iter().map(|(name, _)| *name).collect();
        let of_others =
            Reason::ALL.iter().map(|r| r.name()).chain(TakenBack::ALL.iter().map(|t| t.name()));
        let listed: std::collections::HashSet<_> = listed.into_iter().chain(of_others).collect();
        let missing: Vec<_> = names.keys().filter(|name| !listed.contains(*name)).collect();
        let unknown: Vec<_> = listed.iter().filter(|name| !names.contains_key(*name)).collect();
        assert!(missing.is_empty() && unknown.is_empty(), "{missing:?} {unknown:?}");
    }

    #[test]
    fn advice_is_for_what_is_the_matter() {
        let of = |reason: Reason, ipv6, configured| {
            refused_help(&Refused {
                port: "lan".into(),
                why: reason.into(),
                retry: None,
                ipv6,
                configured,
            })
            .unwrap()
        };
        assert!(of(Reason::HashRouted, false, None).contains("fib_multipath_hash_policy"));
        assert!(!of(Reason::HashRouted, true, None).contains("fib_multipath_hash_policy"));
        assert!(
            of(Reason::TableFull, false, Some(2)).contains("capacity of [[port]] for lan (now 2)")
        );
        assert!(of(Reason::TableFull, false, None).contains("NIC"));
    }
}
