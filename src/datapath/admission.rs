//! The admission policy: which of the connections that can be offloaded are to be. An ordered list
//! of rules, of which the first that matches decides, and a default.
//!
//! It is asked once for every sight (and for every rule that a dead daemon left, before it is
//! adopted), never for a packet. The firewall's own rules choose by what they write on connections and packets: marks,
//! labels, a DSCP ([`Said`]). All else that a rule tests but the port is of the
//! connection as its **first packet** was before any NAT (conntrack's original tuple, which
//! `ctoffload conn show` and `conntrack -L` print first): both directions get the same answer. A
//! destination is therefore the address that the client asked for, be it a service's that DNAT
//! rewrites; a destination port is the server's.
//!
//! What is not admitted is [`Reason::NotAdmitted`], for good: the slot keeps it, with the rule that
//! said so, until the connection ends, its mark or its labels change, or the port is flushed. A change takes rules back as
//! well: the next packet of the connection is looked at anew.

use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use netdev_providers::{L4Proto, Reason, Rejection};

use super::netfilter::conntrack::CtEntry;
use crate::engine::conn::ConnKey;

/// What becomes of connections that a rule matches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verdict {
    /// They may be offloaded.
    #[default]
    Offload,
    /// They stay on the slow path.
    Never,
}

/// What the firewall, or whoever else, has written on a connection and on the packet of it that was sighted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// The connection's mark (`ct mark`).
    pub ct_mark: u32,
    /// Its labels (`ct label`): the one with the number `n` is bit `n`.
    pub labels: u128,
    /// The packet's mark, at the end of postrouting.
    pub mark: u32,
    /// The packet's DSCP, from 0 to 63, as it leaves.
    pub dscp: u8,
}

impl Said {
    /// What is said of a connection, without a packet of it.
    #[must_use]
    pub fn of(entry: &CtEntry) -> Self {
        Self { ct_mark: entry.mark, labels: entry.labels.unwrap_or(0), ..Self::default() }
    }
}

/// Some bits of a number, which are to be these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Masked<T> {
    /// What they are to be. No bit that the mask has not.
    pub value: T,
    /// Which.
    pub mask: T,
}

impl<T: Copy + PartialEq + std::ops::BitAnd<Output = T>> Masked<T> {
    fn holds(&self, number: T) -> bool {
        number & self.mask == self.value
    }
}

/// One rule. What is empty or `None` matches everything.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rule {
    /// Where it stands in the configuration, for people; counted from 1.
    pub line: usize,
    /// The present name of the port whose packet it was that was sighted.
    pub netdev: Option<glob::Pattern>,
    /// Prefixes that hold the source address.
    pub source: Vec<IpNet>,
    /// Prefixes that hold the destination address.
    pub destination: Vec<IpNet>,
    /// The transport protocol.
    pub protocol: Option<L4Proto>,
    /// The source port.
    pub source_ports: Vec<RangeInclusive<u16>>,
    /// The destination port.
    pub destination_ports: Vec<RangeInclusive<u16>>,
    /// The conntrack zone.
    pub zones: Vec<RangeInclusive<u16>>,
    /// The connection's mark.
    pub ct_mark: Option<Masked<u32>>,
    /// Its labels.
    pub ct_label: Option<Masked<u128>>,
    /// The mark of the packet that was sighted.
    pub mark: Option<Masked<u32>>,
    /// Its DSCP.
    pub dscp: Vec<RangeInclusive<u16>>,
    /// What becomes of a connection that all of this is true of.
    pub verdict: Verdict,
}

/// The policy. The default is to admit everything.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Admission {
    /// In order: the first that matches decides.
    pub rules: Vec<Rule>,
    /// What becomes of connections that no rule matches.
    pub default: Verdict,
}

/// What decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decider {
    /// The rule at this place of the list, which stands in this line of the configuration.
    Rule {
        /// Counted from 1.
        number: usize,
        /// Counted from 1.
        line: usize,
    },
    /// None of them: the default.
    Default,
}

impl fmt::Display for Decider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule { number, line } => {
                write!(f, "[[admit]] rule {number}, line {line} of the configuration")
            }
            Self::Default => f.write_str("no [[admit]] rule matches, and the default"),
        }
    }
}

impl Rule {
    fn matches(&self, port: &str, conn: &ConnKey, said: &Said) -> bool {
        let tuple = &conn.original;
        let in_prefixes = |list: &[IpNet], a: IpAddr| one_of(list, |net| net.contains(&a));
        let in_ranges = |list: &[RangeInclusive<u16>], n: u16| one_of(list, |r| r.contains(&n));
        self.protocol.is_none_or(|p| p == tuple.proto())
            && in_ranges(&self.source_ports, tuple.sport())
            && in_ranges(&self.destination_ports, tuple.dport())
            && in_ranges(&self.zones, conn.zone.0)
            && in_prefixes(&self.source, tuple.src())
            && in_prefixes(&self.destination, tuple.dst())
            && self.ct_mark.is_none_or(|m| m.holds(said.ct_mark))
            && self.ct_label.is_none_or(|m| m.holds(said.labels))
            && self.mark.is_none_or(|m| m.holds(said.mark))
            && in_ranges(&self.dscp, said.dscp.into())
            && self.netdev.as_ref().is_none_or(|p| p.matches(port))
    }
}

/// An empty list is no test.
fn one_of<T>(list: &[T], holds: impl Fn(&T) -> bool) -> bool {
    list.is_empty() || list.iter().any(holds)
}

impl Admission {
    /// Whether a rule tests something of packets: of a connection alone, without one, it cannot be told.
    #[must_use]
    pub fn looks_at_packets(&self) -> bool {
        self.rules.iter().any(|r| r.mark.is_some() || !r.dscp.is_empty())
    }

    /// What is to become of a connection that was sighted on the port of this name, and what decided
    /// it.
    #[must_use]
    pub fn verdict(&self, port: &str, conn: &ConnKey, said: &Said) -> (Verdict, Decider) {
        let first = (1..).zip(&self.rules).find(|(_, rule)| rule.matches(port, conn, said));
        match first {
            Some((number, rule)) => (rule.verdict, Decider::Rule { number, line: rule.line }),
            None => (self.default, Decider::Default),
        }
    }

    /// The same, as an offer ends: `Ok` when the connection may be offloaded.
    ///
    /// # Errors
    /// [`Reason::NotAdmitted`], in the words of what decided.
    pub fn admit(&self, port: &str, conn: &ConnKey, said: &Said) -> Result<(), Rejection> {
        match self.verdict(port, conn, said) {
            (Verdict::Offload, _) => Ok(()),
            (Verdict::Never, by) => {
                let words = format!("{by} says never");
                Err(Rejection::with_detail(Reason::NotAdmitted, words))
            }
        }
    }
}

#[cfg(test)]
mod tests;
