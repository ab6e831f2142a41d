//! Rules and routes that tell packets apart by their ToS, or traffic class: `ip rule ... tos`, `ip rule ... dscp`,
//! `ip route ... tos`; or by IPv6's flow label (`ip rule ... flowlabel`, since 6.14). A connection is no class of traffic: its packets may have any, and change it, and a rule of
//! ours is for all of them. So where such rules and routes exist, the kernel is asked for each value that they
//! name, and a connection whose packets would not all go the same way stays on the slow path.
//!
//! Values are learnt from what is there at the start and from what comes. One that is named no more costs a
//! look-up, and changes no answer.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use netdev_providers::netlink::wire::Received;
use netlink_packet_core::Nla;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use netlink_packet_route::rule::{RuleAttribute, RuleMessage};

use super::dump::{HEADER, dump};
use super::masked::{Masked, representatives};

const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWRULE: u16 = 32;
const RTM_GETRULE: u16 = 34;
/// `struct rtmsg` and `struct fib_rule_hdr` have the ToS in the same place.
const TOS_AT: usize = 3;
/// In `struct fib_rule_hdr`: the length of the source's prefix.
const SOURCE_AT: usize = 2;
// linux/fib_rules.h
const FRA_PAD: u16 = 18;
/// What rules say that is no question to a packet, or one that look-ups are told apart by anyhow: `FRA_DST`,
/// `FRA_IIFNAME`, `FRA_GOTO`, `FRA_PRIORITY`, `FRA_FWMARK`, `FRA_FLOW` (a realm), `FRA_SUPPRESS_IFGROUP`,
/// `FRA_SUPPRESS_PREFIXLEN`, `FRA_TABLE`, `FRA_FWMASK`, `FRA_OIFNAME`, `FRA_PAD`, `FRA_L3MDEV`, `FRA_PROTOCOL` (who has made it), and
/// those of the ToS and the label.
const OF_ALL: [u16; 18] = [
    1,
    3,
    4,
    6,
    10,
    11,
    13,
    14,
    15,
    16,
    17,
    FRA_PAD,
    19,
    21,
    FRA_DSCP,
    FRA_DSCP_MASK,
    FRA_FLOWLABEL,
    FRA_FLOWLABEL_MASK,
];
const FRA_DSCP: u16 = 25;
const FRA_DSCP_MASK: u16 = 30;
const FRA_FLOWLABEL: u16 = 26;
const FRA_FLOWLABEL_MASK: u16 = 27;
/// Of an IPv6 header.
const FLOW_LABEL_BITS: u32 = 0xf_ffff;
// linux/rtnetlink.h
const RTA_MULTIPATH: u16 = 9;

/// So many flow labels are asked for, and no more.
const AT_MOST: usize = 256;

/// What is told from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Told {
    /// A value of the ToS.
    Tos {
        /// By IPv6's rules; else by IPv4's rules or routes.
        ipv6: bool,
        /// The byte of the header.
        value: u8,
    },
    /// A flow label, or some bits of it.
    FlowLabel(Masked),
    /// Flows, by a route of IPv4 that has several next hops: how it shares them out changes when a netdev goes down or
    /// comes up, and nobody says so.
    Shared,
    /// Packets by more than where they go to and come by, the ToS, the label and the mark: by a rule for their
    /// source, protocol or ports, or for what is not known here.
    Closer {
        /// By IPv6's rules; else by IPv4's.
        ipv6: bool,
    },
}

impl Told {
    /// Of packets of IPv6; else of IPv4.
    #[must_use]
    pub const fn is_of_ipv6(&self) -> bool {
        match self {
            Self::Tos { ipv6, .. } | Self::Closer { ipv6 } => *ipv6,
            Self::FlowLabel(_) => true,
            Self::Shared => false,
        }
    }
}

/// The values that a rule or a route names.
fn named(family: u8, tos: u8, attribute: impl Fn(u16) -> Option<Vec<u8>>) -> Vec<Told> {
    let byte = |kind| attribute(kind).and_then(|v| v.first().copied());
    let number = |kind| attribute(kind).and_then(|v| Some(u32::from_be_bytes(*v.first_chunk()?)));
    // With a label the kernel tells a mask, without a mask there is none (`fib6_rule_fill`).
    let label = number(FRA_FLOWLABEL).and_then(|label| {
        let mask = number(FRA_FLOWLABEL_MASK).unwrap_or(FLOW_LABEL_BITS);
        Masked::new(label, mask & FLOW_LABEL_BITS)
    });
    let ipv6 = match i32::from(family) {
        libc::AF_INET => false,
        libc::AF_INET6 => true,
        _ => return Vec::new(),
    };
    let values: Vec<u8> = match (byte(FRA_DSCP), byte(FRA_DSCP_MASK)) {
        (None, _) => vec![tos],
        (Some(dscp), None) => vec![tos, dscp << 2],
        // It may name any number of them.
        (Some(_), Some(_)) => (0..64).map(|dscp| dscp << 2).collect(),
    };
    let values = values.into_iter().filter(|v| *v != 0).map(|value| Told::Tos { ipv6, value });
    values.chain(label.filter(|_| ipv6).map(Told::FlowLabel)).collect()
}

/// Whether a rule looks closer at packets: at their source, of which it gives the length of the prefix, or by one of these
/// attributes.
fn looks_closer(family: u8, source: u8, mut attributes: impl Iterator<Item = u16>) -> Option<Told> {
    let ipv6 = i32::from(family) == libc::AF_INET6;
    (source != 0 || attributes.any(|a| !OF_ALL.contains(&a))).then_some(Told::Closer { ipv6 })
}

/// Those that an announced rule names.
pub(super) fn of_rule(m: &RuleMessage) -> Vec<Told> {
    let attribute = |kind| {
        m.attributes.iter().find_map(|a| match a {
            RuleAttribute::Other(nla) if nla.kind() == kind => {
                let mut value = vec![0; nla.value_len()];
                nla.emit_value(&mut value);
                Some(value)
            }
            _ => None,
        })
    };
    let kinds = m.attributes.iter().map(Nla::kind);
    let closer = looks_closer(m.header.family.into(), m.header.src_len, kinds);
    let mut told = named(m.header.family.into(), m.header.tos, attribute);
    told.extend(closer);
    told
}

/// Those that an announced route names.
pub(super) fn of_route(m: &RouteMessage) -> Vec<Told> {
    let mut told = named(m.header.address_family.into(), m.header.tos, |_| None);
    let several = m.attributes.iter().any(|a| matches!(a, RouteAttribute::MultiPath(_)));
    told.extend(
        (several && m.header.address_family == AddressFamily::Inet).then_some(Told::Shared),
    );
    told
}

/// Those that a message of a dump names: a full routing table is long, so nothing else of it is decoded.
fn of_dumped(m: &Received<'_>) -> Vec<Told> {
    let (Some(&family), Some(&tos)) = (m.payload.first(), m.payload.get(TOS_AT)) else {
        return Vec::new();
    };
    match m.ty {
        RTM_NEWROUTE => {
            let mut told = named(family, tos, |_| None);
            let several = m.attrs(HEADER).find_type(RTA_MULTIPATH).is_some();
            let shared = several && i32::from(family) == libc::AF_INET;
            told.extend(shared.then_some(Told::Shared));
            told
        }
        RTM_NEWRULE => {
            let attribute = |ty| Some(m.attrs(HEADER).find_type(ty)?.payload.to_vec());
            let mut told = named(family, tos, attribute);
            let source = m.payload.get(SOURCE_AT).copied().unwrap_or(u8::MAX);
            told.extend(looks_closer(family, source, m.attrs(HEADER).map(|a| a.ty)));
            told
        }
        _ => Vec::new(),
    }
}

/// The values that are named, shared between the monitor's events and those who resolve paths.
#[derive(Clone, Debug, Default)]
pub struct Named(Arc<RwLock<BTreeSet<Told>>>);

impl Named {
    /// Notes one; true when it was none before.
    pub fn add(&self, told: Told) -> bool {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(told)
    }

    /// Values of the ToS of a family.
    #[must_use]
    pub fn of(&self, ipv6: bool) -> Vec<u8> {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let of = |t: &Told| match *t {
            Told::Tos { ipv6: of, value } if of == ipv6 => Some(value),
            _ => None,
        };
        all.iter().filter_map(of).collect()
    }

    /// Whether there has been a route of IPv4 with several next hops.
    #[must_use]
    pub fn shares(&self) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).contains(&Told::Shared)
    }

    /// Whether a rule of the family looks closer at packets.
    #[must_use]
    pub fn looks_closer(&self, ipv6: bool) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).contains(&Told::Closer { ipv6 })
    }

    /// Flow labels that stand for all that are not 0, where the family has them; `None`: too many.
    #[must_use]
    pub fn flow_labels(&self, ipv6: bool) -> Option<Vec<u32>> {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let label = |t: &Told| match *t {
            Told::FlowLabel(label) if ipv6 => Some(label),
            _ => None,
        };
        let mut labels = representatives(&all.iter().filter_map(label).collect(), AT_MOST)?;
        labels.retain(|l| *l != 0);
        Some(labels)
    }
}

/// Reads what is named now, in the network namespace of the calling thread.
///
/// # Errors
/// A failure of the exchange.
pub(super) fn read(mut each: impl FnMut(Told)) -> io::Result<()> {
    // IPv6 has no routes by traffic class.
    let asked = [
        (RTM_GETRULE, libc::AF_INET),
        (RTM_GETRULE, libc::AF_INET6),
        (RTM_GETROUTE, libc::AF_INET),
    ];
    dump(&asked, |m| of_dumped(m).into_iter().for_each(&mut each))
}

#[cfg(test)]
mod tests {
    use netdev_providers::netlink::MessageIter;
    use netdev_providers::netlink::wire::Message;
    use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader};
    use netlink_packet_route::RouteNetlinkMessage;

    use super::*;

    fn values(ty: u16, family: libc::c_int, tos: u8, attributes: &[(u16, u8)]) -> Vec<(bool, u8)> {
        let attributes: Vec<_> = attributes.iter().map(|(ty, v)| (*ty, vec![*v])).collect();
        let told = told(ty, family, tos, &attributes);
        let value = |t: &Told| match *t {
            Told::Tos { ipv6, value } => Some((ipv6, value)),
            Told::FlowLabel(_) | Told::Shared | Told::Closer { .. } => None,
        };
        told.iter().filter_map(value).collect()
    }

    fn told(ty: u16, family: libc::c_int, tos: u8, attributes: &[(u16, Vec<u8>)]) -> Vec<Told> {
        let mut buf = Vec::new();
        let mut m = Message::new(&mut buf, ty, 0, 0);
        let mut header = [0; HEADER];
        (header[0], header[TOS_AT]) = (u8::try_from(family).unwrap(), tos);
        m.raw(&header);
        for (ty, value) in attributes {
            m.attr(*ty, value);
        }
        m.finish();
        let m = MessageIter::new(&buf).next().unwrap();
        let dumped = of_dumped(&m);
        // What is announced says the same.
        let mut header = NetlinkHeader::default();
        header.message_type = ty;
        match RouteNetlinkMessage::deserialize(&header, m.payload) {
            Ok(RouteNetlinkMessage::NewRule(m)) => assert_eq!(of_rule(&m), dumped),
            Ok(RouteNetlinkMessage::NewRoute(m)) => assert_eq!(of_route(&m), dumped),
            _ => assert_eq!(dumped, []),
        }
        dumped
    }

    #[test]
    fn a_route_with_several_next_hops_shares_flows_out() {
        // struct rtnexthop: its length, no flags, one hop, by netdev 7.
        let mut hop = vec![8, 0, 0, 0];
        hop.extend(7i32.to_ne_bytes());
        let several = [(RTA_MULTIPATH, hop)];
        assert_eq!(told(RTM_NEWROUTE, libc::AF_INET, 0, &several), [Told::Shared]);
        // Those of IPv6 are for software anyhow.
        assert_eq!(told(RTM_NEWROUTE, libc::AF_INET6, 0, &several), []);
        let all = Named::default();
        assert!(!all.shares() && all.add(Told::Shared) && all.shares());
    }

    #[test]
    fn flow_labels_are_named_by_rules_of_ipv6() {
        let label = [(FRA_FLOWLABEL, 0x12345u32.to_be_bytes().to_vec())];
        let named = told(RTM_NEWRULE, libc::AF_INET6, 0, &label);
        let whole = Masked::new(0x12345, FLOW_LABEL_BITS).unwrap();
        assert_eq!(named, [Told::FlowLabel(whole)]);
        let some = (FRA_FLOWLABEL_MASK, 0xff000u32.to_be_bytes().to_vec());
        let bits = told(RTM_NEWRULE, libc::AF_INET6, 0, &[label[0].clone(), some]);
        assert_eq!(bits, [Told::FlowLabel(Masked::new(0x12000, 0xff000).unwrap())]);
        assert_eq!(told(RTM_NEWRULE, libc::AF_INET, 0, &label), []);
        assert_eq!(told(RTM_NEWROUTE, libc::AF_INET6, 0, &label), []);
        let all = Named::default();
        assert!(all.add(named[0]) && !all.add(named[0]));
        let labels = |ipv6| all.flow_labels(ipv6).unwrap();
        assert_eq!((labels(true), labels(false)), (vec![0x12345], vec![]));
        assert_eq!((all.of(true), all.of(false)), (vec![], vec![]));
        // Both may fit at once.
        assert!(all.add(bits[0]));
        let three = labels(true);
        assert!(three.len() == 2 && three.contains(&0x12345) && three.contains(&0x12000));
        for bit in 0..9 {
            assert!(all.add(Told::FlowLabel(Masked::new(1 << bit, 1 << bit).unwrap())));
        }
        assert_eq!(all.flow_labels(true), None);
    }

    #[test]
    fn values_that_rules_and_routes_name() {
        assert_eq!(values(RTM_NEWROUTE, libc::AF_INET, 0x10, &[]), [(false, 0x10)]);
        assert_eq!(values(RTM_NEWROUTE, libc::AF_INET, 0, &[]), []);
        assert_eq!(values(RTM_NEWRULE, libc::AF_INET6, 0xb8, &[]), [(true, 0xb8)]);
        assert_eq!(values(RTM_NEWRULE, libc::AF_INET, 0, &[(FRA_DSCP, 46)]), [(false, 0xb8)]);
        let masked = values(RTM_NEWRULE, libc::AF_INET, 0, &[(FRA_DSCP, 8), (FRA_DSCP_MASK, 56)]);
        assert_eq!(masked.len(), 63);
        // A route has other attributes by these numbers; and other messages have no ToS there.
        assert_eq!(values(RTM_NEWROUTE, libc::AF_INET, 0, &[(FRA_DSCP, 46)]), []);
        assert_eq!(values(16, libc::AF_INET, 0x10, &[]), []);
        // RTNL_FAMILY_IPMR
        assert_eq!(values(RTM_NEWROUTE, 128, 0x10, &[]), []);
    }

    #[test]
    fn a_value_is_new_once_and_of_its_family() {
        let all = Named::default();
        let tos = |ipv6, value| Told::Tos { ipv6, value };
        assert!(all.add(tos(false, 16)) && !all.add(tos(false, 16)) && all.add(tos(true, 8)));
        assert_eq!((all.of(false), all.of(true)), (vec![16], vec![8]));
    }
}
