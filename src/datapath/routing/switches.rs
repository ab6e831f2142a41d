//! The switches that say whether a netdev's packets are forwarded: `net.ipv4.ip_forward`,
//! `net.ipv4.conf.*.forwarding`, `net.ipv6.conf.all.forwarding`, `net.ipv6.conf.*.force_forwarding`. Kept up to
//! date by the monitor, from the kernel's own announcements (`RTM_NEWNETCONF`).
//!
//! | | who looks at it, for each packet |
//! |---|---|
//! | IPv4 | the switch of the netdev that the packet arrives on (`ip_route_input_slow`); those of `all` and `ip_forward` set that of every netdev, and each is announced (`inet_forward_change`) |
//! | IPv6 | `all` alone (`ip6_forward`); since 6.17 one whose own `force_forwarding` is on is excepted. `conf.X.forwarding` only makes a router of the netdev for its neighbours |
//!
//! Other switches that a route look-up obeys are announced the same way, and it is asked anew: `rp_filter`,
//! `ignore_routes_with_linkdown`.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, PoisonError, RwLock};

use netdev_providers::Ifindex;
use netdev_providers::netlink::wire::Received;

/// `RTNLGRP_IPV4_NETCONF` and `RTNLGRP_IPV6_NETCONF` (`linux/rtnetlink.h`).
pub(super) const GROUPS: [u32; 2] = [24, 25];
const RTM_NEWNETCONF: u16 = 80;
const RTM_DELNETCONF: u16 = 81;
pub(super) const RTM_GETNETCONF: u16 = 82;

// linux/netconf.h
/// `struct netconfmsg`, padded.
const HEADER: usize = 4;
const NETCONFA_IFINDEX: u16 = 1;
const NETCONFA_FORWARDING: u16 = 2;
const NETCONFA_RP_FILTER: u16 = 3;
const NETCONFA_IGNORE_ROUTES_WITH_LINKDOWN: u16 = 6;
const NETCONFA_FORCE_FORWARDING: u16 = 9;
const NETCONFA_IFINDEX_ALL: i32 = -1;

/// One announcement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SwitchEvent {
    /// Of IPv6; else of IPv4.
    pub ipv6: bool,
    /// Of this netdev; `None`: of `conf.all`.
    pub netdev: Option<Ifindex>,
    /// `forwarding`, where it is told.
    pub forwarding: Option<bool>,
    /// `force_forwarding`, where it is told.
    pub forced: Option<bool>,
    /// `ignore_routes_with_linkdown`, where it is told.
    pub ignores_linkdown: Option<bool>,
    /// What a route look-up obeys may have changed.
    pub routes: bool,
    /// The netdev has no addresses of the family any more.
    pub gone: bool,
}

impl SwitchEvent {
    /// Reads a message; `None` when it is no announcement of switches, or of `conf.default`.
    pub(super) fn parse(m: &Received<'_>) -> Option<Self> {
        let gone = match m.ty {
            RTM_NEWNETCONF => false,
            RTM_DELNETCONF => true,
            _ => return None,
        };
        let ipv6 = i32::from(*m.payload.first()?) == libc::AF_INET6;
        let (mut whose, mut forwarding, mut forced, mut routes) = (None, None, None, false);
        let mut ignores_linkdown = None;
        for a in m.attrs(HEADER) {
            let value = a.payload.first_chunk().map(|b| i32::from_ne_bytes(*b));
            match a.ty {
                NETCONFA_IFINDEX => whose = value,
                NETCONFA_FORWARDING => forwarding = value.map(|v| v != 0),
                NETCONFA_FORCE_FORWARDING => forced = value.map(|v| v != 0),
                NETCONFA_RP_FILTER => routes = true,
                NETCONFA_IGNORE_ROUTES_WITH_LINKDOWN => {
                    routes = true;
                    ignores_linkdown = value.map(|v| v != 0);
                }
                _ => {}
            }
        }
        let netdev = match whose? {
            NETCONFA_IFINDEX_ALL => None,
            // That of netdevs to come: it is announced for each.
            default if default < 0 => return None,
            index => Some(Ifindex::new(index.cast_unsigned())?),
        };
        Some(Self { ipv6, netdev, forwarding, forced, ignores_linkdown, routes, gone })
    }
}

/// Whether this is an announcement of switches that does not say whose they are.
pub(super) fn is_unreadable(m: &Received<'_>) -> bool {
    let whose = || m.attrs(HEADER).find_type(NETCONFA_IFINDEX)?.payload.first_chunk::<4>();
    matches!(m.ty, RTM_NEWNETCONF | RTM_DELNETCONF) && (m.payload.is_empty() || whose().is_none())
}

#[derive(Debug, Default)]
struct State {
    /// IPv4's, by ingress netdev.
    v4: HashMap<Ifindex, bool>,
    v6_all: Option<bool>,
    v6_forced: HashSet<Ifindex>,
    /// By family and netdev, or for all: routes by a netdev without a carrier are left out.
    ignores_linkdown: HashSet<(bool, Option<Ifindex>)>,
}

/// The switches as they are, shared between the monitor's events and those who resolve paths.
#[derive(Clone, Debug, Default)]
pub struct Switches(Arc<RwLock<State>>);

impl Switches {
    /// Notes an announcement. True when packets that were forwarded may not be any more, or the other way
    /// round.
    pub fn set(&self, event: &SwitchEvent) -> bool {
        let mut state = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if event.gone {
            state.ignores_linkdown.remove(&(event.ipv6, event.netdev));
            if let Some(netdev) = event.netdev {
                if event.ipv6 {
                    state.v6_forced.remove(&netdev);
                } else {
                    state.v4.remove(&netdev);
                }
            }
            return false;
        }
        let whose = (event.ipv6, event.netdev);
        match event.ignores_linkdown {
            Some(true) => _ = state.ignores_linkdown.insert(whose),
            Some(false) => _ = state.ignores_linkdown.remove(&whose),
            None => {}
        }
        let mut changed = false;
        match (event.ipv6, event.netdev, event.forwarding) {
            (false, Some(netdev), Some(on)) => {
                changed = state.v4.insert(netdev, on).is_none_or(|before| before != on);
            }
            (true, None, Some(on)) => changed = state.v6_all.replace(on) != Some(on),
            _ => {}
        }
        match (event.ipv6, event.netdev, event.forced) {
            (true, Some(netdev), Some(true)) => changed |= state.v6_forced.insert(netdev),
            (true, Some(netdev), Some(false)) => changed |= state.v6_forced.remove(&netdev),
            _ => {}
        }
        changed
    }

    /// Whether routes by this netdev are left out, of either family, while it has no carrier.
    #[must_use]
    pub fn ignores_linkdown(&self, netdev: Ifindex) -> bool {
        let state = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let of = |ipv6| {
            [None, Some(netdev)].iter().any(|n| state.ignores_linkdown.contains(&(ipv6, *n)))
        };
        of(false) || of(true)
    }

    /// The name of the switch that keeps packets of this netdev from being forwarded, after `net.`; `None`: they
    /// are, as far as is known.
    #[must_use]
    pub fn off(&self, iif: Ifindex, ipv6: bool) -> Option<&'static str> {
        let state = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if ipv6 {
            let off = state.v6_all == Some(false) && !state.v6_forced.contains(&iif);
            off.then_some("ipv6.conf.all.forwarding")
        } else {
            (state.v4.get(&iif) == Some(&false)).then_some("ipv4.conf.*.forwarding")
        }
    }
}

#[cfg(test)]
mod tests {
    use netdev_providers::netlink::{Message, MessageIter};

    use super::*;

    const OURS: u32 = 7;

    fn message(ty: u16, family: libc::c_int, attributes: &[(u16, i32)]) -> Vec<u8> {
        let mut buf = Vec::new();
        let mut m = Message::new(&mut buf, ty, 0, 0);
        m.raw(&[u8::try_from(family).unwrap(), 0, 0, 0]);
        for (ty, value) in attributes {
            m.attr(*ty, &value.to_ne_bytes());
        }
        m.finish();
        buf
    }

    fn event(ty: u16, family: libc::c_int, attributes: &[(u16, i32)]) -> Option<SwitchEvent> {
        let buf = message(ty, family, attributes);
        MessageIter::new(&buf).next().and_then(|m| SwitchEvent::parse(&m))
    }

    fn unreadable(ty: u16, attributes: &[(u16, i32)]) -> bool {
        let buf = message(ty, libc::AF_INET, attributes);
        MessageIter::new(&buf).next().is_some_and(|m| is_unreadable(&m))
    }

    fn forwarding(family: libc::c_int, whose: i32, on: i32) -> SwitchEvent {
        event(RTM_NEWNETCONF, family, &[(NETCONFA_IFINDEX, whose), (NETCONFA_FORWARDING, on)])
            .unwrap()
    }

    #[test]
    fn ipv4_is_switched_by_netdev_and_ipv6_for_all() {
        let (switches, netdev) = (Switches::default(), Ifindex::new(OURS).unwrap());
        let off = |ipv6| switches.off(netdev, ipv6).is_some();
        assert!(!off(false) && !off(true), "nothing is known");
        // `conf.all` of IPv4 is a default with an effect on others, which are announced.
        switches.set(&forwarding(libc::AF_INET, -1, 0));
        assert!(!off(false));
        assert!(switches.set(&forwarding(libc::AF_INET, 7, 0)) && off(false));
        assert!(!switches.set(&forwarding(libc::AF_INET, 7, 0)), "as before");
        assert!(switches.set(&forwarding(libc::AF_INET, 7, 1)) && !off(false));
        // A netdev's own of IPv6 does not make it forward, nor keep it from that.
        assert!(!switches.set(&forwarding(libc::AF_INET6, 7, 0)) && !off(true));
        assert!(switches.set(&forwarding(libc::AF_INET6, -1, 0)) && off(true));
        let attributes = [(NETCONFA_IFINDEX, 7), (NETCONFA_FORCE_FORWARDING, 1)];
        let forced = event(RTM_NEWNETCONF, libc::AF_INET6, &attributes).unwrap();
        assert!(switches.set(&forced) && !off(true));
    }

    #[test]
    fn what_is_read_of_an_announcement() {
        assert_eq!(event(24, libc::AF_INET, &[(NETCONFA_IFINDEX, 7)]), None, "of another kind");
        assert_eq!(event(RTM_NEWNETCONF, libc::AF_INET, &[(NETCONFA_IFINDEX, -2)]), None);
        assert_eq!(event(RTM_NEWNETCONF, libc::AF_INET, &[]), None);
        assert!(unreadable(RTM_NEWNETCONF, &[]) && unreadable(RTM_DELNETCONF, &[(7, 1)]));
        assert!(!unreadable(24, &[]), "of another kind");
        assert!(!unreadable(RTM_NEWNETCONF, &[(NETCONFA_IFINDEX, -2)]), "of none that there is");
        let filter = [(NETCONFA_IFINDEX, 7), (NETCONFA_RP_FILTER, 1)];
        let filter = event(RTM_NEWNETCONF, libc::AF_INET, &filter).unwrap();
        assert!(filter.routes && filter.forwarding.is_none());
        assert!(!Switches::default().set(&filter));
        let gone = event(RTM_DELNETCONF, libc::AF_INET, &[(NETCONFA_IFINDEX, 7)]).unwrap();
        let switches = Switches::default();
        switches.set(&forwarding(libc::AF_INET, 7, 0));
        switches.set(&gone);
        assert_eq!(switches.off(Ifindex::new(OURS).unwrap(), false), None);
    }
}
