//! Which connections are asked for, and in which order: what `conn show` takes.
//!
//! The daemon is who looks at them: what does not fit is never sent. Each field is a netlink attribute of the
//! request; their numbers are at the end of the file.

use std::fmt;

use ipnet::IpNet;
use netdev_providers::{L4Proto, Tuple};

use super::attrs::attributes;

/// Which connections are asked for. What is `None` does not matter, and all that is given has to fit.
///
/// Addresses and ports are those of the original tuple: of the originator's packets, as they arrive.
///
/// `port`, `state`, `reason`, `provider` and `egress` are asked of slots: a connection fits when one of its slots
/// has all that is given of them, and of its slots those that have are told.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ConnFilter {
    /// Slots of the port of this name.
    pub port: Option<String>,
    /// Of this conntrack zone.
    pub zone: Option<u16>,
    /// With this tuple, as original or as reply.
    pub tuple: Option<Tuple>,
    /// Of this protocol.
    pub proto: Option<L4Proto>,
    /// From an address in here.
    pub src: Option<IpNet>,
    /// To an address in here.
    pub dst: Option<IpNet>,
    /// From one of these ports.
    pub sport: Option<PortRange>,
    /// To one of these ports.
    pub dport: Option<PortRange>,
    /// Slots in the state of this name: `pending`, `installed`, `deleting`, `rejected`.
    pub state: Option<String>,
    /// Slots that were rejected for the [`Reason`](netdev_providers::Reason) of this name.
    pub reason: Option<String>,
    /// Slots on ports that are bound to the provider class of this name.
    pub provider: Option<String>,
    /// Slots whose rules forward to the netdev of this name, or to the one below it.
    pub egress: Option<String>,
    /// Translated so.
    pub nat: Option<Nat>,
    /// Silent for at least so many milliseconds. What is not offloaded at present does not fit: nobody knows.
    pub idle_ms: Option<u64>,
    /// At least so many bytes forwarded by rules.
    pub bytes: Option<u64>,
    /// In which order. `None`: of up to 4,096 connections that there are, the oldest first; else in none.
    pub sort: Option<SortBy>,
    /// No more than so many: the first.
    pub limit: Option<u64>,
    /// Not the connections are asked for, but how many fit. (`sort` and `limit` do not matter then.)
    pub count: bool,
}

/// Ports, from one to another, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// The first.
    pub from: u16,
    /// The last.
    pub to: u16,
}

impl PortRange {
    /// Whether this port is one of them.
    #[must_use]
    pub const fn contains(self, port: u16) -> bool {
        self.from <= port && port <= self.to
    }
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $not:literal { $($(#[$about:meta])* $variant:ident = $number:literal $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum $name { $($(#[$about])* $variant = $number),+ }

        impl $name {
            /// All that there are.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The word on the command line.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }

        impl super::attrs::Element for $name {
            fn append(&self, out: &mut Vec<u8>) -> Result<(), super::error::WireError> {
                (*self as u8).append(out)
            }

            fn from_payload(bytes: &[u8]) -> Result<Self, super::error::WireError> {
                let number = u8::from_payload(bytes)?;
                Self::ALL
                    .iter()
                    .find(|word| **word as u8 == number)
                    .copied()
                    .ok_or(super::error::WireError::Value($not))
            }
        }
    };
}

words! {
    /// How a connection is translated. On the wire a number of one byte.
    Nat, "a kind of NAT" {
        /// Its source address or port.
        Snat = 0 "snat",
        /// Its destination address or port.
        Dnat = 1 "dnat",
        /// Either of them, or both.
        Any = 2 "any",
        /// Neither.
        None = 3 "none",
    }
}

impl Nat {
    /// Whether a connection with these tuples is translated so.
    #[must_use]
    pub fn fits(self, original: &Tuple, reply: &Tuple) -> bool {
        let snat = (reply.dst(), reply.dport()) != (original.src(), original.sport());
        let dnat = (reply.src(), reply.sport()) != (original.dst(), original.dport());
        match self {
            Self::Snat => snat,
            Self::Dnat => dnat,
            Self::Any => snat || dnat,
            Self::None => !snat && !dnat,
        }
    }
}

words! {
    /// By what connections are put in order; of equal ones the oldest comes first. On the wire a number of one byte.
    SortBy, "something to sort by" {
        /// The oldest first.
        Age = 0 "age",
        /// Those first that have been silent for longest; at the end those of which nobody knows.
        Idle = 1 "idle",
        /// The most packets forwarded by rules first.
        Packets = 2 "packets",
        /// The most bytes forwarded by rules first.
        Bytes = 3 "bytes",
        /// The lowest source address first, IPv4 before IPv6.
        Src = 4 "src",
        /// The lowest destination address first, IPv4 before IPv6.
        Dst = 5 "dst",
        /// The lowest source port first.
        Sport = 6 "sport",
        /// The lowest destination port first.
        Dport = 7 "dport",
    }
}

attributes! {
    ConnFilter {
        port = 1, zone = 2, tuple = 3, proto = 4, src = 5, dst = 6, sport = 7, dport = 8, state = 9, reason = 10,
        provider = 11, egress = 12, nat = 13, idle_ms = 14, bytes = 15, sort = 16, limit = 17, count = 18,
    }
    PortRange { from = 1, to = 2 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::attrs::{Element, Object, from_bytes, strict};

    fn back(filter: &ConnFilter) -> ConnFilter {
        strict(&from_bytes(&filter.encode().unwrap()).unwrap()).unwrap()
    }

    #[test]
    fn a_filter_travels_whole() {
        for nat in Nat::ALL {
            for sort in SortBy::ALL {
                let filter = ConnFilter {
                    port: Some("eth0".into()),
                    zone: Some(7),
                    tuple: "tcp 192.0.2.1:1 > 192.0.2.2:2".parse().ok(),
                    proto: Some(L4Proto::Udp),
                    src: "10.0.0.0/8".parse().ok(),
                    dst: "2001:db8::/33".parse().ok(),
                    sport: Some(PortRange { from: 1, to: 65_535 }),
                    dport: Some(PortRange { from: 443, to: 443 }),
                    state: Some("rejected".into()),
                    reason: Some("table-full".into()),
                    provider: Some("ebpf".into()),
                    egress: Some("eth1.20".into()),
                    nat: Some(*nat),
                    idle_ms: Some(u64::MAX),
                    bytes: Some(1),
                    sort: Some(*sort),
                    limit: Some(0),
                    count: true,
                };
                assert_eq!(back(&filter), filter);
            }
        }
        let all = ConnFilter::default();
        assert_eq!(back(&all), all);
    }

    #[test]
    fn words_have_numbers_that_stay_and_others_are_refused() {
        let names = |all: &[u8], name: &dyn Fn(u8) -> Option<&'static str>| {
            all.iter().map(|n| name(*n).unwrap_or("-")).collect::<Vec<_>>().join(" ")
        };
        let nat = |n: u8| Nat::from_payload(&[n]).ok().map(Nat::name);
        assert_eq!(names(&[0, 1, 2, 3, 4], &nat), "snat dnat any none -");
        let sort = |n: u8| SortBy::from_payload(&[n]).ok().map(SortBy::name);
        assert_eq!(
            names(&[0, 1, 2, 3, 4, 5, 6, 7, 8], &sort),
            "age idle packets bytes src dst sport dport -"
        );
    }

    #[test]
    fn nat_is_told_by_what_replies_look_like() {
        let original: Tuple = "tcp 10.0.0.1:1000 > 203.0.113.1:80".parse().unwrap();
        let fitting = |reply: &str| {
            let reply = reply.parse().unwrap();
            Nat::ALL
                .iter()
                .filter(|n| n.fits(&original, &reply))
                .map(|n| n.name())
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(fitting("tcp 203.0.113.1:80 > 10.0.0.1:1000"), "none");
        assert_eq!(fitting("tcp 203.0.113.1:80 > 192.0.2.1:1000"), "snat any");
        assert_eq!(fitting("tcp 203.0.113.1:80 > 10.0.0.1:1001"), "snat any");
        assert_eq!(fitting("tcp 10.9.0.1:80 > 10.0.0.1:1000"), "dnat any");
        assert_eq!(fitting("tcp 203.0.113.1:8080 > 10.0.0.1:1000"), "dnat any");
        assert_eq!(fitting("tcp 10.9.0.1:80 > 192.0.2.1:1000"), "snat dnat any");
    }

    #[test]
    fn a_range_has_both_its_ends() {
        let range = PortRange { from: 10, to: 12 };
        assert_eq!((9..=13).filter(|p| range.contains(*p)).collect::<Vec<_>>(), [10, 11, 12]);
    }
}
