//! Why a connection is not offloaded on a netdev.

use std::fmt;

use nix::errno::Errno;

/// Whether asking again can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Permanence {
    /// The same offer would be refused again: it is not repeated for this connection.
    Permanent,
    /// It may pass: the sight is re-armed after a delay that grows with every try.
    Transient,
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $number:literal, $name:literal, $permanence:ident;)+) => {
        /// Reason codes. Numbers and names are stable: scripts and dashboards read them.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        #[non_exhaustive]
        pub enum Reason { $($(#[doc = $doc])+ $variant = $number,)+ }

        impl Reason {
            /// Every reason, by number.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The stable name, e.g. `table-full`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// Whether asking again can help.
            #[must_use]
            pub const fn permanence(self) -> Permanence {
                match self { $(Self::$variant => Permanence::$permanence),+ }
            }

            /// The reason with this number.
            #[must_use]
            pub const fn from_number(n: u8) -> Option<Self> {
                match n { $($number => Some(Self::$variant),)+ _ => None }
            }

            /// One sentence for people.
            #[must_use]
            pub const fn help(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+).trim_ascii()),+ }
            }
        }
    };
}

reasons! {
    /// The backend or the driver does not support a match or an action that this flow needs.
    Unsupported = 1, "unsupported", Permanent;
    /// The NIC refused the rule and the port is configured for hardware only (skip_sw).
    NotInHardware = 2, "not-in-hardware", Permanent;
    /// The backend's table is full.
    TableFull = 3, "table-full", Transient;
    /// The port's operation queue is full.
    QueueFull = 4, "queue-full", Transient;
    /// The kernel or the driver is busy (EAGAIN, EBUSY, EINTR, ENOBUFS, ENOMEM).
    Busy = 5, "busy", Transient;
    /// The next hop's link-layer address is not known yet.
    NeighbourUnresolved = 6, "neighbour-unresolved", Transient;
    /// There is no route for the packets of this direction.
    NoRoute = 7, "no-route", Transient;
    /// The packets are for this host itself, or are broadcast or multicast, or forwarding is switched off for the netdev that they arrive on.
    NotForwarded = 8, "not-forwarded", Transient;
    /// The egress netdev is not one that packets can be redirected to (no Ethernet, a tunnel, two VLAN tags, a bridge that filters VLANs; for nf-flowtable on Linux from 7.2 on: one that is no port of it).
    EgressUnsupported = 9, "egress-unsupported", Permanent;
    /// The egress MTU is below the ingress MTU, and a packet too long cannot be told apart here.
    MtuMismatch = 10, "mtu-mismatch", Permanent;
    /// The ingress netdev is not one whose packets can be offloaded (no Ethernet, two VLAN tags, a bridge that filters VLANs, a macvlan).
    IngressUnsupported = 11, "ingress-unsupported", Permanent;
    /// The connection is not in a state that can be offloaded (not established, closing, of a helper).
    ConnState = 12, "conn-state", Permanent;
    /// Another rule with the same match already exists on the port.
    Conflict = 13, "conflict", Transient;
    /// The kernel or the driver refused the rule with an error of no other class.
    Refused = 14, "refused", Permanent;
    /// The netdev is gone.
    NetdevGone = 15, "netdev-gone", Permanent;
    /// The provider failed: it panicked, or gave an operation back without a result.
    ProviderFault = 16, "provider-fault", Permanent;
    /// The operation was cancelled before it was dispatched (delete, flush, port-delete).
    Cancelled = 17, "cancelled", Transient;
    /// The connection has been seen on more ports than slots are kept for.
    TooManyPorts = 18, "too-many-ports", Permanent;
    /// The port has no provider.
    NoProvider = 19, "no-provider", Permanent;
    /// The addresses change and this kernel cannot keep the checksums right in software (act_bpf is missing).
    NatChecksum = 20, "nat-checksum", Permanent;
    /// The engine keeps as many connections as it is configured for.
    ConnTableFull = 21, "conn-table-full", Transient;
    /// The admission policy of the configuration keeps the connection on the slow path.
    NotAdmitted = 22, "not-admitted", Permanent;
    /// The provider is slow: something that it was given has not come back yet.
    ProviderSlow = 24, "provider-slow", Transient;
    /// There was a rule, and software went on seeing the packets: the NIC lost the rule, or never acted on it, or somebody in front of it leaves it none.
    NoEffect = 25, "no-effect", Transient;
    /// An IPsec policy concerns the packets: it encrypts them, or blocks them.
    IpsecPolicy = 26, "ipsec-policy", Permanent;
    /// Packets of the connection take another route by their ToS, traffic class or flow label: one rule cannot forward them all.
    TosRouted = 29, "tos-routed", Permanent;
    /// Something sets the packets' mark after they were routed, and with another mark they could have another route.
    MarkRouted = 33, "mark-routed", Permanent;
    /// A hook of others stands behind the one that sees the packets, and could refuse them yet.
    FirewallBehind = 28, "firewall-behind", Transient;
    /// Conntrack zones are chosen by something that no rule matches: a rule could take the packets of another connection.
    ZoneUnclear = 30, "zone-unclear", Permanent;
    /// Something that no look-up tells chooses among the next hops of the route, by each packet: the flow label, or a hash that it came with.
    HashRouted = 31, "hash-routed", Permanent;
    /// Filters or programs of others see the packets first in software, and rules in the NIC would pass them by.
    OthersInFront = 32, "others-in-front", Transient;
    /// A queueing discipline that shapes or classifies, or filters or programs of others, stand where the packets leave, and rules here would pass them by.
    OthersAtEgress = 34, "others-at-egress", Transient;
    /// The device failed: its driver or firmware says so, and not that it cannot do what was asked.
    DeviceError = 35, "device-error", Transient;
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A refusal: the reason code, and what the kernel or the provider said of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The code that is counted.
    pub reason: Reason,
    /// The kernel's error, where there was one.
    pub errno: Option<Errno>,
    /// The kernel's extended ACK, or the provider's own words.
    pub detail: Option<Box<str>>,
}

impl Rejection {
    /// A bare reason.
    #[must_use]
    pub const fn new(reason: Reason) -> Self {
        Self { reason, errno: None, detail: None }
    }

    /// A reason with words.
    #[must_use]
    pub fn with_detail(reason: Reason, detail: impl Into<Box<str>>) -> Self {
        Self { reason, errno: None, detail: Some(detail.into()) }
    }
}

impl From<Reason> for Rejection {
    fn from(reason: Reason) -> Self {
        Self::new(reason)
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.reason)?;
        if let Some(detail) = &self.detail {
            write!(f, ": {detail}")?;
        }
        if let Some(errno) = self.errno {
            write!(f, " ({errno:?})")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_are_distinct_and_read_back() {
        let mut names = std::collections::HashSet::new();
        for &r in Reason::ALL {
            assert_eq!(Reason::from_number(r as u8), Some(r));
            assert!(names.insert(r.name()), "{r} twice");
            assert!(!r.help().is_empty());
        }
        assert_eq!(Reason::from_number(0), None);
    }
}
