//! Rules that tell packets apart by their mark (`ip rule ... fwmark`), and which mark that is.
//!
//! The router looks at the mark that a packet has when **prerouting** has ended. A sight, at the end of
//! postrouting, tells the one that it has then: the same, unless something sets marks in forward or postrouting
//! (for a qdisc, say). Where the firewall does that, or where no packet has been seen (a rule that a dead daemon
//! has left), nobody can tell; so the kernel is asked for each mark that rules tell from others, and for none, and what
//! would not go the same way with all of them stays on the slow path. Rules with masks ([`super::masked`]) can tell
//! more of them apart than can be asked for: then everything does.
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
use super::masked::{Masked, representatives};

const RTM_NEWRULE: u16 = 32;
const RTM_GETRULE: u16 = 34;
// linux/fib_rules.h
const FRA_FWMARK: u16 = 10;
const FRA_FWMASK: u16 = 16;

/// So many marks are asked for, and no more: each is a look-up, in microseconds.
const AT_MOST: usize = 256;

/// A mark that a rule tells from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark {
    /// By IPv6's rules; else by IPv4's.
    pub ipv6: bool,
    /// Which one, or which bits of it.
    pub named: Masked,
}

/// That of an announced rule.
pub(super) fn of_rule(m: &RuleMessage) -> Option<Mark> {
    let ipv6 = match m.header.family {
        AddressFamily::Inet => false,
        AddressFamily::Inet6 => true,
        _ => return None,
    };
    let value = m.attributes.iter().find_map(|a| match a {
        RuleAttribute::FwMark(value) => Some(*value),
        _ => None,
    });
    let mask = m.attributes.iter().find_map(|a| match a {
        RuleAttribute::FwMask(mask) => Some(*mask),
        _ => None,
    });
    named(ipv6, value, mask)
}

fn of_dumped(m: &Received<'_>) -> Option<Mark> {
    let ipv6 = match i32::from(*m.payload.first()?) {
        libc::AF_INET => false,
        libc::AF_INET6 => true,
        _ => return None,
    };
    let number = |ty| m.attrs(HEADER).find_type(ty)?.payload.first_chunk().copied();
    let [value, mask] = [FRA_FWMARK, FRA_FWMASK].map(|ty| number(ty).map(u32::from_ne_bytes));
    (m.ty == RTM_NEWRULE).then(|| named(ipv6, value, mask))?
}

/// The kernel leaves out what is 0, and tells a mask with each mark (`fib_nl_fill_rule`); without one all bits count.
fn named(ipv6: bool, value: Option<u32>, mask: Option<u32>) -> Option<Mark> {
    let mask = mask.unwrap_or(if value.is_some() { u32::MAX } else { 0 });
    Masked::new(value.unwrap_or(0), mask).map(|named| Mark { ipv6, named })
}

#[derive(Debug)]
struct State {
    /// Of IPv4 and IPv6.
    named: [BTreeSet<Masked>; 2],
    /// Likewise, those that stand for all; `None`: too many.
    asked: [Option<Vec<u32>>; 2],
    /// Of IPv4 and IPv6: what sets marks behind the routing decision.
    late: [Option<Arc<str>>; 2],
}

impl Default for State {
    fn default() -> Self {
        let asked = [Some(vec![0]), Some(vec![0])];
        Self { named: Default::default(), asked, late: Default::default() }
    }
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
    /// Any of more than can be asked for.
    Any(Doubt),
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
        let mut state = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let family = usize::from(mark.ipv6);
        let news = state.named[family].insert(mark.named);
        if news {
            state.asked[family] = representatives(&state.named[family], AT_MOST);
        }
        news
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
        match &state.asked[usize::from(ipv6)] {
            Some(marks) => AtRouting::AnyOf(marks.clone(), doubt),
            None => AtRouting::Any(doubt),
        }
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

    fn mark(ipv6: bool, value: u32, mask: u32) -> Mark {
        Mark { ipv6, named: Masked::new(value, mask).unwrap() }
    }

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
        let mark = |ipv6, value, mask| Some(mark(ipv6, value, mask));
        assert_eq!(named(RTM_NEWRULE, libc::AF_INET, &[(FRA_FWMARK, 7)]), mark(false, 7, u32::MAX));
        // With a mask; also of a mark that is 0 there.
        let masked = [(FRA_FWMARK, 0x0100), (FRA_FWMASK, 0xff00)];
        assert_eq!(named(RTM_NEWRULE, libc::AF_INET6, &masked), mark(true, 0x0100, 0xff00));
        assert_eq!(named(RTM_NEWRULE, libc::AF_INET, &masked[1..]), mark(false, 0, 0xff00));
        // A rule that says nothing of marks; no rule; another family's (RTNL_FAMILY_IPMR).
        assert_eq!(named(RTM_NEWRULE, libc::AF_INET, &[(FRA_FWMASK, 0)]), None);
        assert_eq!(named(RTM_NEWRULE, libc::AF_INET, &[]), None);
        assert_eq!(named(24, libc::AF_INET, &[(FRA_FWMARK, 7)]), None);
        assert_eq!(named(RTM_NEWRULE, 128, &[(FRA_FWMARK, 7)]), None);
    }

    #[test]
    fn a_mark_that_was_seen_is_that_of_the_routing_decision_unless_something_sets_it_later() {
        let marks = Marks::default();
        assert!(marks.add(mark(false, 7, u32::MAX)));
        assert!(!marks.add(mark(false, 7, u32::MAX)));
        assert!(marks.add(mark(true, 9, u32::MAX)));
        assert_eq!(marks.at_routing(Some(3), false), AtRouting::Known(3));
        assert_eq!(marks.at_routing(None, true), AtRouting::AnyOf(vec![0, 9], Doubt::Unseen));
        let late: Arc<str> = "chain forward of table t".into();
        assert!(marks.set_late([Some(Arc::clone(&late)), None]));
        assert!(!marks.set_late([Some(Arc::clone(&late)), None]));
        let any = AtRouting::AnyOf(vec![0, 7], Doubt::SetLate(late));
        assert_eq!(marks.at_routing(Some(3), false), any);
        assert_eq!(marks.at_routing(Some(3), true), AtRouting::Known(3));
    }

    #[test]
    fn marks_that_several_rules_can_fit_at_once_are_asked_for_as_long_as_they_are_few() {
        let marks = Marks::default();
        for bit in [1, 2] {
            assert!(marks.add(mark(true, bit, bit)));
        }
        let AtRouting::AnyOf(mut all, _) = marks.at_routing(None, true) else { panic!() };
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3]);
        for bit in 2..9 {
            assert!(marks.add(mark(true, 1 << bit, 1 << bit)));
        }
        assert_eq!(marks.at_routing(None, true), AtRouting::Any(Doubt::Unseen));
        assert_eq!(marks.at_routing(Some(3), true), AtRouting::Known(3));
        assert_eq!(marks.at_routing(None, false), AtRouting::AnyOf(vec![0], Doubt::Unseen));
    }
}
