//! IPsec policies: packets that one of them encrypts or blocks must not pass by it on a rule of ours.
//!
//! What the ledger sights has passed the policies of its time; those that come later are read here, whenever
//! the kernel says that there is a change (`XFRMNLGRP_POLICY`).
//!
//! A forwarded packet is looked up twice: as it has been routed, among the policies of direction `fwd`
//! (`xfrm4_policy_check` in `ip_forward`), and of direction `out` before and, where NAT changes it, after
//! postrouting (`xfrm4_route_forward`, `nf_xfrm_me_harder`). Among those that match, the one with the lowest
//! number of priority decides. Where it cannot be told whether one matches (by mark, by netdev), it is taken to
//! match if it encrypts or blocks, and not to match if it allows. States (`XFRMNLGRP_SA`) change nothing for
//! packets that no policy concerns.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use ipnet::IpNet;
use netdev_providers::Tuple;
use netdev_providers::netlink::socket::{ACK, DUMP, REQUEST};
use netdev_providers::netlink::wire::{Message, Received};
use netdev_providers::netlink::{Family, NetlinkError, Socket};
use nix::errno::Errno;

// linux/xfrm.h
/// `XFRMNLGRP_POLICY`.
pub(super) const GROUP: u32 = 4;
const XFRM_MSG_NEWPOLICY: u16 = 0x13;
const XFRM_MSG_GETPOLICY: u16 = 0x15;
const XFRM_MSG_GETDEFAULT: u16 = 0x28;
/// `struct xfrm_userpolicy_info`, and where in it what stands.
const POLICY: usize = 168;
const DPORT: usize = 32;
const SPORT: usize = 36;
const FAMILY: usize = 40;
const PREFIXES: usize = 42;
const PROTO: usize = 44;
const IFINDEX: usize = 48;
const PRIORITY: usize = 152;
const DIR: usize = 160;
const ACTION: usize = 161;
const XFRM_POLICY_OUT: u8 = 1;
const XFRM_POLICY_FWD: u8 = 2;
const XFRM_POLICY_ALLOW: u8 = 0;
const XFRM_USERPOLICY_BLOCK: u8 = 1;
const XFRMA_TMPL: u16 = 5;
const XFRMA_MARK: u16 = 21;
const XFRMA_IF_ID: u16 = 31;

/// A policy that decides on forwarded packets.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Policy {
    dir: u8,
    src: IpNet,
    dst: IpNet,
    /// Value and mask.
    sport: (u16, u16),
    dport: (u16, u16),
    /// 0: any.
    proto: u8,
    priority: u32,
    /// Packets go on as they are.
    plain: bool,
    /// It is for packets of one mark or netdev.
    narrow: bool,
}

impl Policy {
    fn parse(m: &Received<'_>) -> Option<Self> {
        let info: &[u8; POLICY] = m.fixed()?;
        let u16_at = |at: usize| info.get(at..)?.first_chunk().map(|b| u16::from_ne_bytes(*b));
        let be16_at = |at: usize| info.get(at..)?.first_chunk().map(|b| u16::from_be_bytes(*b));
        let u32_at = |at: usize| info.get(at..)?.first_chunk().map(|b| u32::from_ne_bytes(*b));
        let dir = info[DIR];
        if !matches!(dir, XFRM_POLICY_OUT | XFRM_POLICY_FWD) {
            return None;
        }
        // Of packets that are routed to a netdev of IPsec's own.
        if m.attrs(POLICY).find_type(XFRMA_IF_ID).and_then(|a| a.u32()).is_some_and(|id| id != 0) {
            return None;
        }
        let family = i32::from(u16_at(FAMILY)?);
        let address = |at: usize| -> Option<IpAddr> {
            if family == libc::AF_INET {
                Some(IpAddr::from(*info.get(at..)?.first_chunk::<4>()?))
            } else {
                Some(IpAddr::from(*info.get(at..)?.first_chunk::<16>()?))
            }
        };
        let protects = m.attrs(POLICY).find_type(XFRMA_TMPL).is_some();
        Some(Self {
            dir,
            dst: prefix(address(0)?, info[PREFIXES]),
            src: prefix(address(16)?, info[PREFIXES + 1]),
            dport: (be16_at(DPORT)?, be16_at(DPORT + 2)?),
            sport: (be16_at(SPORT)?, be16_at(SPORT + 2)?),
            proto: info[PROTO],
            priority: u32_at(PRIORITY)?,
            plain: info[ACTION] == XFRM_POLICY_ALLOW && !protects,
            narrow: u32_at(IFINDEX)? != 0 || m.attrs(POLICY).find_type(XFRMA_MARK).is_some(),
        })
    }

    fn matches(&self, t: &Tuple) -> bool {
        self.src.contains(&t.src())
            && self.dst.contains(&t.dst())
            && (self.proto == 0 || self.proto == t.proto().number())
            && (t.sport() ^ self.sport.0) & self.sport.1 == 0
            && (t.dport() ^ self.dport.0) & self.dport.1 == 0
    }
}

/// The kernel takes no length that is not of the family (`verify_newpolicy_info`).
fn prefix(address: IpAddr, length: u8) -> IpNet {
    IpNet::new(address, length).unwrap_or_else(|_| address.into())
}

#[derive(Debug, Default)]
struct Table {
    policies: Vec<Policy>,
    /// What no policy matches is blocked (`ip xfrm policy setdefault`).
    blocks: bool,
}

impl Table {
    fn concerns(&self, t: &Tuple) -> bool {
        [XFRM_POLICY_OUT, XFRM_POLICY_FWD].into_iter().any(|dir| {
            let matching = || self.policies.iter().filter(|p| p.dir == dir && p.matches(t));
            let allowed = matching().filter(|p| p.plain && !p.narrow).map(|p| p.priority).min();
            match allowed {
                // Of two of one priority, the older decides: which is older is not told.
                Some(allowed) => matching().any(|p| !p.plain && p.priority <= allowed),
                None => self.blocks || matching().any(|p| !p.plain),
            }
        })
    }
}

/// The policies of the network namespace, as last read.
#[derive(Clone, Debug, Default)]
pub struct Ipsec(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    table: RwLock<Table>,
    /// Opened when first needed.
    socket: Mutex<Option<Socket>>,
}

impl Ipsec {
    /// Reads them anew.
    ///
    /// # Errors
    /// When the kernel does not tell. Where it has no IPsec, there are none.
    pub fn read(&self) -> Result<(), NetlinkError> {
        let mut socket = self.0.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let socket = match &mut *socket {
            Some(socket) => socket,
            none => match Socket::open(Family::Xfrm) {
                Ok(socket) => none.insert(socket),
                Err(e) if e.errno() == Some(Errno::EPROTONOSUPPORT) => return Ok(()),
                Err(e) => return Err(e),
            },
        };
        let mut table = Table::default();
        let mut tries = 0;
        loop {
            table.policies.clear();
            let mut buf = Vec::new();
            let seq = socket.next_seq();
            let mut m = Message::new(&mut buf, XFRM_MSG_GETPOLICY, REQUEST | DUMP, seq);
            // `struct xfrm_userpolicy_id`
            m.raw(&[0; 64]);
            m.finish();
            let dumped = socket.dump(&buf, seq, |m| {
                if m.ty == XFRM_MSG_NEWPOLICY {
                    table.policies.extend(Policy::parse(&m));
                }
            });
            tries += 1;
            match dumped {
                Err(NetlinkError::Interrupted) if tries < 10 => {}
                other => break other?,
            }
        }
        let mut buf = Vec::new();
        let seq = socket.next_seq();
        let mut m = Message::new(&mut buf, XFRM_MSG_GETDEFAULT, REQUEST | ACK, seq);
        m.raw(&[0; 4]);
        m.finish();
        let asked = socket.request(&buf, seq, |m| {
            if let (XFRM_MSG_GETDEFAULT, Some([_, fwd, out])) = (m.ty, m.fixed::<3>()) {
                table.blocks = [*fwd, *out].contains(&XFRM_USERPOLICY_BLOCK);
            }
        });
        match asked {
            // Before 5.15.
            Ok(()) | Err(NetlinkError::Kernel(_)) => {}
            Err(e) => return Err(e),
        }
        *self.0.table.write().unwrap_or_else(PoisonError::into_inner) = table;
        Ok(())
    }

    /// Whether a policy encrypts or blocks the packets of a direction of a connection, or may.
    #[must_use]
    pub fn concerns(&self, arriving: &Tuple, leaving: &Tuple) -> bool {
        let table = self.0.table.read().unwrap_or_else(PoisonError::into_inner);
        if table.policies.is_empty() && !table.blocks {
            return false;
        }
        // The destination is translated before a packet is routed, the source after.
        let routed = Tuple::new(
            leaving.proto(),
            arriving.src(),
            arriving.sport(),
            leaving.dst(),
            leaving.dport(),
        );
        table.concerns(leaving) || routed.is_some_and(|t| table.concerns(&t))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(dir: u8, src: &str, dst: &str, priority: u32) -> Policy {
        Policy {
            dir,
            src: src.parse().unwrap(),
            dst: dst.parse().unwrap(),
            sport: (0, 0),
            dport: (0, 0),
            proto: 0,
            priority,
            plain: false,
            narrow: false,
        }
    }

    fn concerns(policies: &[Policy], blocks: bool, tuple: &str) -> bool {
        Table { policies: policies.to_vec(), blocks }.concerns(&tuple.parse().unwrap())
    }

    const FLOW: &str = "udp 10.1.0.2:7001 > 10.2.0.2:5000";

    #[test]
    fn the_best_policy_of_either_direction_decides() {
        let tunnel = policy(XFRM_POLICY_OUT, "10.1.0.0/16", "10.2.0.0/16", 100);
        assert!(concerns(std::slice::from_ref(&tunnel), false, FLOW));
        assert!(!concerns(
            std::slice::from_ref(&tunnel),
            false,
            "udp 10.2.0.2:5000 > 10.1.0.2:7001"
        ));
        let fwd = policy(XFRM_POLICY_FWD, "0.0.0.0/0", "0.0.0.0/0", 100);
        assert!(concerns(&[fwd], false, FLOW));
        let bypass = |priority| Policy {
            plain: true,
            ..policy(XFRM_POLICY_OUT, "10.1.0.0/16", "10.2.0.0/16", priority)
        };
        assert!(!concerns(&[tunnel.clone(), bypass(99)], false, FLOW));
        assert!(concerns(&[tunnel.clone(), bypass(100)], false, FLOW), "which is older?");
        assert!(concerns(&[tunnel.clone(), Policy { narrow: true, ..bypass(99) }], false, FLOW));
        assert!(concerns(&[Policy { narrow: true, ..tunnel.clone() }], false, FLOW));
        // Ports and protocols.
        let of = |proto, dport| Policy { proto, dport, ..tunnel.clone() };
        assert!(concerns(&[of(17, (5000, 0xffff))], false, FLOW));
        assert!(!concerns(&[of(6, (5000, 0xffff))], false, FLOW));
        assert!(!concerns(&[of(17, (5001, 0xffff))], false, FLOW));
        // Prefixes that hold one end alone.
        assert!(!concerns(
            &[policy(XFRM_POLICY_OUT, "10.1.0.2/32", "10.2.0.0/31", 1)],
            false,
            FLOW
        ));
        assert!(concerns(&[policy(XFRM_POLICY_OUT, "10.1.0.2/32", "10.2.0.2/31", 1)], false, FLOW));
        // Of the other family.
        assert!(!concerns(&[policy(XFRM_POLICY_OUT, "::/0", "::/0", 1)], false, FLOW));
    }

    #[test]
    fn what_no_policy_matches_can_be_blocked() {
        assert!(concerns(&[], true, FLOW) && !concerns(&[], false, FLOW));
        let bypass = |dir| Policy { plain: true, ..policy(dir, "10.1.0.0/16", "10.2.0.0/16", 1) };
        assert!(concerns(&[bypass(XFRM_POLICY_OUT)], true, FLOW));
        assert!(!concerns(&[bypass(XFRM_POLICY_OUT), bypass(XFRM_POLICY_FWD)], true, FLOW));
    }
}
