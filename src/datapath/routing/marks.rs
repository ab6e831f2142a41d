//! Rules that tell packets apart by their mark (`ip rule ... fwmark`), and which mark that is.
//!
//! The router looks at the mark that a packet has when **prerouting** has ended. A sight, at the end of
//! postrouting, tells the one that it has then: the same, unless something sets marks in forward or postrouting
//! (for a qdisc, say). Where the firewall does that, or where no packet has been seen (a rule that a dead daemon
//! has left), nobody can tell; so the kernel is asked for each mark that a rule names, and for none, and what would
//! not go the same way with all of them stays on the slow path.
//!
//! Marks are learnt from what is there at the start and from what comes. One that is named no more costs a look-up,
//! and changes no answer.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use netdev_providers::netlink::wire::Received;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::rule::{RuleAttribute, RuleMessage};

use super::dump::{HEADER, dump};

const RTM_NEWRULE: u16 = 32;
const RTM_GETRULE: u16 = 34;
// linux/fib_rules.h
const FRA_FWMARK: u16 = 10;

/// A mark that a rule tells from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark {
    /// By IPv6's rules; else by IPv4's.
    pub ipv6: bool,
    /// As it is written in the rule; what its mask leaves out is 0.
    pub value: u32,
}

/// That of an announced rule.
pub(super) fn of_rule(m: &RuleMessage) -> Option<Mark> {
    let ipv6 = match m.header.family {
        AddressFamily::Inet => false,
        AddressFamily::Inet6 => true,
        _ => return None,
    };
    m.attributes.iter().find_map(|a| match a {
        RuleAttribute::FwMark(value) if *value != 0 => Some(Mark { ipv6, value: *value }),
        _ => None,
    })
}

fn of_dumped(m: &Received<'_>) -> Option<Mark> {
    let ipv6 = match i32::from(*m.payload.first()?) {
        libc::AF_INET => false,
        libc::AF_INET6 => true,
        _ => return None,
    };
    let value = m.attrs(HEADER).find_type(FRA_FWMARK)?.payload.first_chunk()?;
    let value = u32::from_ne_bytes(*value);
    (m.ty == RTM_NEWRULE && value != 0).then_some(Mark { ipv6, value })
}

#[derive(Debug, Default)]
struct State {
    named: BTreeSet<Mark>,
    /// Of IPv4 and IPv6: what sets marks behind the routing decision.
    late: [Option<Arc<str>>; 2],
}

/// What is known of marks, shared between those who follow rules and the firewall and those who resolve paths.
#[derive(Clone, Debug, Default)]
pub struct Marks(Arc<RwLock<State>>);

/// The marks that packets can have had when they were routed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AtRouting {
    /// This one.
    Known(u32),
    /// Any of these.
    AnyOf(Vec<u32>, Doubt),
}

/// Why the mark is not known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// No packet has been seen.
    Unseen,
    /// This sets marks after the routing decision.
    SetLate(Arc<str>),
}

impl Marks {
    /// Notes that a rule names a mark; true when none did before.
    pub fn add(&self, mark: Mark) -> bool {
        self.0.write().unwrap_or_else(PoisonError::into_inner).named.insert(mark)
    }

    /// Notes what sets marks behind the routing decision, in IPv4 and in IPv6. True when that is news.
    pub fn set_late(&self, late: [Option<Arc<str>>; 2]) -> bool {
        let mut state = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let news = state.late != late;
        state.late = late;
        news
    }

    /// What packets of a family can have had that were seen with this one at the end of postrouting; `None`: none
    /// was seen.
    #[must_use]
    pub fn at_routing(&self, seen: Option<u32>, ipv6: bool) -> AtRouting {
        let state = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let late = state.late[usize::from(ipv6)].clone().map(Doubt::SetLate);
        let doubt = match (seen, late) {
            (Some(mark), None) => return AtRouting::Known(mark),
            (_, Some(late)) => late,
            (None, None) => Doubt::Unseen,
        };
        let mut all = vec![0];
        all.extend(state.named.iter().filter(|m| m.ipv6 == ipv6).map(|m| m.value));
        AtRouting::AnyOf(all, doubt)
    }
}

/// Reads what is named now, in the network namespace of the calling thread.
///
/// # Errors
/// A failure of the exchange.
pub(super) fn read(mut each: impl FnMut(Mark)) -> io::Result<()> {
    let asked = [(RTM_GETRULE, libc::AF_INET), (RTM_GETRULE, libc::AF_INET6)];
    dump(&asked, |m| of_dumped(m).into_iter().for_each(&mut each))
}

#[cfg(test)]
mod tests {
    use netdev_providers::netlink::MessageIter;
    use netdev_providers::netlink::wire::Message;
    use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader};
    use netlink_packet_route::RouteNetlinkMessage;

    use super::*;

    fn named(ty: u16, family: libc::c_int, attributes: &[(u16, u32)]) -> Option<Mark> {
        let mut buf = Vec::new();
        let mut m = Message::new(&mut buf, ty, 0, 0);
        let mut header = [0; HEADER];
        header[0] = u8::try_from(family).unwrap();
        m.raw(&header);
        for (ty, value) in attributes {
            m.attr(*ty, &value.to_ne_bytes());
        }
        m.finish();
        let m = MessageIter::new(&buf).next().unwrap();
        let dumped = of_dumped(&m);
        // What is announced says the same.
        let mut header = NetlinkHeader::default();
        header.message_type = ty;
        if let Ok(RouteNetlinkMessage::NewRule(m)) =
            RouteNetlinkMessage::deserialize(&header, m.payload)
        {
            assert_eq!(of_rule(&m), dumped);
        }
        dumped
    }

    #[test]
    fn marks_that_rules_name() {
        let mark = |ipv6, value| Some(Mark { ipv6, value });
        assert_eq!(named(RTM_NEWRULE, libc::AF_INET, &[(FRA_FWMARK, 7)]), mark(false, 7));
        // With a mask.
        let masked = [(FRA_FWMARK, 0x0100), (16, 0xff00)];
        assert_eq!(named(RTM_NEWRULE, libc::AF_INET6, &masked), mark(true, 0x0100));
        // None, which is asked for anyhow; no rule; another family's (RTNL_FAMILY_IPMR).
        assert_eq!(named(RTM_NEWRULE, libc::AF_INET, &[(16, 0xff)]), None);
        assert_eq!(named(24, libc::AF_INET, &[(FRA_FWMARK, 7)]), None);
        assert_eq!(named(RTM_NEWRULE, 128, &[(FRA_FWMARK, 7)]), None);
    }

    #[test]
    fn a_mark_that_was_seen_is_that_of_the_routing_decision_unless_something_sets_it_later() {
        let marks = Marks::default();
        assert!(marks.add(Mark { ipv6: false, value: 7 }));
        assert!(!marks.add(Mark { ipv6: false, value: 7 }));
        assert!(marks.add(Mark { ipv6: true, value: 9 }));
        assert_eq!(marks.at_routing(Some(3), false), AtRouting::Known(3));
        assert_eq!(marks.at_routing(None, true), AtRouting::AnyOf(vec![0, 9], Doubt::Unseen));
        let late: Arc<str> = "chain forward of table t".into();
        assert!(marks.set_late([Some(Arc::clone(&late)), None]));
        assert!(!marks.set_late([Some(Arc::clone(&late)), None]));
        let any = AtRouting::AnyOf(vec![0, 7], Doubt::SetLate(late));
        assert_eq!(marks.at_routing(Some(3), false), any);
        assert_eq!(marks.at_routing(Some(3), true), AtRouting::Known(3));
    }
}
