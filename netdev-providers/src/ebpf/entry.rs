//! An entry of a port's table, as the program reads it: `struct key` and `struct flow` of `bpf/flows.bpf.c`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::contract::flow::{Flow, FlowMatch};
use crate::contract::provider::Counters;
use crate::contract::types::{Cookie, L4Proto, RuleId, Tuple};

/// Counted up when an entry or a map changes: what a daemon with another number has left is not adopted.
pub(super) const LAYOUT: u32 = 1;

/// Bytes of a key.
pub(super) const KEY: usize = 40;
/// Bytes of an entry.
pub(super) const ENTRY: usize = 112;

// Offsets in `struct key`.
const KEY_SRC: usize = 0;
const KEY_DST: usize = 16;
const KEY_SPORT: usize = 32;
const KEY_DPORT: usize = 34;
const KEY_VLAN: usize = 36;
const KEY_FAMILY: usize = 38;
const KEY_PROTO: usize = 39;

// Offsets in `struct flow`.
const PACKETS: usize = 0;
const BYTES: usize = 8;
const COOKIE: usize = 16;
const RULE: usize = 32;
const EGRESS: usize = 36;
const MTU: usize = 40;
const VLAN: usize = 44;
const FLAGS: usize = 46;
const ETH_MATCH: usize = 48;
const ETH_DST: usize = 54;
const ETH_SRC: usize = 60;
const SPORT: usize = 66;
const DPORT: usize = 68;
const SRC: usize = 72;
const DST: usize = 88;
const ADDRESS_DIFF: usize = 104;
const PORT_DIFF: usize = 108;

const MATCH_MAC: u8 = 1;
const ROUTED: u8 = 2;
const NAT: u8 = 4;
const FRAGS: u8 = 8;

fn put<const N: usize>(to: &mut [u8], at: usize, bytes: [u8; N]) {
    to[at..at + N].copy_from_slice(&bytes);
}

fn get<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&from[at..at + N]);
    bytes
}

/// An address of either family, in the room of the longer one.
fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(a) => {
            let mut octets = [0; 16];
            octets[..4].copy_from_slice(&a.octets());
            octets
        }
        IpAddr::V6(a) => a.octets(),
    }
}

fn address(octets: [u8; 16], ipv6: bool) -> IpAddr {
    if ipv6 {
        Ipv6Addr::from(octets).into()
    } else {
        Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]).into()
    }
}

/// Which packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key(pub(super) [u8; KEY]);

impl Key {
    pub(super) fn of(matches: &FlowMatch) -> Self {
        let tuple = &matches.tuple;
        let mut key = [0; KEY];
        put(&mut key, KEY_SRC, octets(tuple.src()));
        put(&mut key, KEY_DST, octets(tuple.dst()));
        put(&mut key, KEY_SPORT, tuple.sport().to_be_bytes());
        put(&mut key, KEY_DPORT, tuple.dport().to_be_bytes());
        put(&mut key, KEY_VLAN, matches.vlan.map_or(0, |v| v.get()).to_be_bytes());
        key[KEY_FAMILY] = if tuple.is_ipv6() { 6 } else { 4 };
        key[KEY_PROTO] = tuple.proto().number();
        Self(key)
    }

    /// `None`: this is no key of ours.
    pub(super) fn tuple(&self) -> Option<Tuple> {
        let ipv6 = match self.0[KEY_FAMILY] {
            4 => false,
            6 => true,
            _ => return None,
        };
        let at = |at| address(get(&self.0, at), ipv6);
        let port = |at| u16::from_be_bytes(get(&self.0, at));
        let proto = L4Proto::from_number(self.0[KEY_PROTO])?;
        Tuple::new(proto, at(KEY_SRC), port(KEY_SPORT), at(KEY_DST), port(KEY_DPORT))
    }
}

/// The number of a rule on its port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct RuleNumber(pub(super) u32);

impl RuleNumber {
    /// What no prio of tc is: a name of ours is told from one of tc-flower's by it.
    const MARK: u64 = 0xffff_ffff << 32;

    /// What the engine calls it.
    pub(super) fn id(self) -> RuleId {
        RuleId(Self::MARK | u64::from(self.0))
    }

    /// `None`: it is no name that we give.
    pub(super) fn of(id: RuleId) -> Option<Self> {
        (id.0 & Self::MARK == Self::MARK).then_some(())?;
        u32::try_from(id.0 & !Self::MARK).ok().map(Self)
    }
}

/// What is done to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(pub(super) [u8; ENTRY]);

impl Entry {
    /// `frags`: frames in several buffers can be sent where it leads.
    pub(super) fn new(flow: &Flow, cookie: Cookie, rule: RuleNumber, frags: bool) -> Self {
        let (matches, forward) = (&flow.matches, &flow.forward);
        let mut e = [0; ENTRY];
        let mut flags = 0;
        put(&mut e, COOKIE, cookie.to_bytes());
        put(&mut e, RULE, rule.0.to_ne_bytes());
        put(&mut e, EGRESS, forward.egress.get().to_ne_bytes());
        put(&mut e, MTU, forward.mtu.to_ne_bytes());
        put(&mut e, VLAN, forward.vlan.map_or(0, |v| v.get()).to_be_bytes());
        if let Some(mac) = matches.eth_dst {
            flags |= MATCH_MAC;
            put(&mut e, ETH_MATCH, mac.0);
        }
        if let Some(macs) = &forward.macs {
            flags |= ROUTED;
            put(&mut e, ETH_DST, macs.dst.0);
            put(&mut e, ETH_SRC, macs.src.0);
        }
        if flow.has_nat() {
            flags |= NAT;
            let (from, to) = (&matches.tuple, &forward.tuple);
            put(&mut e, SPORT, to.sport().to_be_bytes());
            put(&mut e, DPORT, to.dport().to_be_bytes());
            put(&mut e, SRC, octets(to.src()));
            put(&mut e, DST, octets(to.dst()));
            let addresses = |t: &Tuple| [octets(t.src()), octets(t.dst())].concat();
            let ports = |t: &Tuple| [t.sport().to_be_bytes(), t.dport().to_be_bytes()].concat();
            put(&mut e, ADDRESS_DIFF, difference(&addresses(from), &addresses(to)).to_ne_bytes());
            put(&mut e, PORT_DIFF, difference(&ports(from), &ports(to)).to_ne_bytes());
        }
        if frags {
            flags |= FRAGS;
        }
        e[FLAGS] = flags;
        Self(e)
    }

    pub(super) fn counters(&self) -> Counters {
        let at = |at| u64::from_ne_bytes(get(&self.0, at));
        Counters { packets: at(PACKETS), bytes: at(BYTES) }
    }

    /// `None`: this is no entry of ours.
    pub(super) fn cookie(&self) -> Option<Cookie> {
        Cookie::from_bytes(&self.0[COOKIE..COOKIE + 16])
    }

    pub(super) fn rule(&self) -> RuleNumber {
        RuleNumber(u32::from_ne_bytes(get(&self.0, RULE)))
    }

    /// True when the other one does the same, whoever wrote it and whatever it has carried.
    pub(super) fn does_what(&self, other: &Self) -> bool {
        self.0[EGRESS..] == other.0[EGRESS..]
    }
}

/// What the 16-bit words of `to` add to a one's complement sum that has those of `from`: folded, in the order of
/// bytes that the packet has them in.
fn difference(from: &[u8], to: &[u8]) -> u32 {
    let words = |bytes: &[u8]| {
        bytes
            .chunks_exact(2)
            .map(|w| u32::from(u16::from_ne_bytes([w[0], w[1]])))
            .collect::<Vec<_>>()
    };
    let new: u32 = words(to).into_iter().sum();
    let old: u32 = words(from).into_iter().map(|w| !w & 0xffff).sum();
    let mut sum = new + old;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::flow::{Above, Forward, MacRewrite};
    use crate::contract::types::{Direction, Epoch, Ifindex, Instance, MacAddr, VlanId, Zone};
    use proptest::prelude::*;
    use std::num::NonZeroU32;

    fn flow(from: &str, to: &str) -> Flow {
        Flow {
            zone: Zone(7),
            direction: Direction::Reply,
            ingress_mtu: 1500,
            matches: FlowMatch {
                eth_dst: Some(MacAddr([1, 2, 3, 4, 5, 6])),
                vlan: VlanId::new(0x123),
                tuple: from.parse().unwrap(),
            },
            forward: Forward {
                egress: Ifindex::new(0x0102_0304).unwrap(),
                vlan: VlanId::new(0x456),
                mtu: 1400,
                tuple: to.parse().unwrap(),
                macs: Some(MacRewrite {
                    src: MacAddr([7, 8, 9, 10, 11, 12]),
                    dst: MacAddr([13, 14, 15, 16, 17, 18]),
                }),
                egress_decides: false,
            },
            above: Above::default(),
        }
    }

    fn cookie() -> Cookie {
        let instance = Instance(NonZeroU32::new(9).unwrap());
        Cookie { instance, epoch: Epoch(5), direction: Direction::Reply }
    }

    #[test]
    fn a_key_has_the_bytes_that_the_program_compares() {
        let key = Key::of(
            &flow("tcp 10.1.2.3:256 > 10.4.5.6:80", "tcp 10.1.2.3:256 > 10.4.5.6:80").matches,
        );
        let mut wanted = [0; KEY];
        wanted[..4].copy_from_slice(&[10, 1, 2, 3]);
        wanted[16..20].copy_from_slice(&[10, 4, 5, 6]);
        wanted[32..].copy_from_slice(&[1, 0, 0, 80, 0x01, 0x23, 4, 6]);
        assert_eq!(key.0, wanted);
    }

    #[test]
    fn an_entry_has_the_bytes_that_the_program_reads() {
        let same = "udp [fd01::1]:1 > [fd02::2]:2";
        let entry = Entry::new(&flow(same, same), cookie(), RuleNumber(0x0a0b_0c0d), true);
        let mut wanted = Vec::new();
        wanted.extend([0; 16]);
        wanted.extend(cookie().to_bytes());
        wanted.extend(0x0a0b_0c0d_u32.to_ne_bytes());
        wanted.extend(0x0102_0304_u32.to_ne_bytes());
        wanted.extend(1400_u32.to_ne_bytes());
        wanted.extend([0x04, 0x56, MATCH_MAC | ROUTED | FRAGS, 0]);
        wanted.extend([1, 2, 3, 4, 5, 6, 13, 14, 15, 16, 17, 18, 7, 8, 9, 10, 11, 12]);
        wanted.extend([0; 46]);
        assert_eq!(entry.0.to_vec(), wanted);

        let nat = Entry::new(
            &flow(same, "udp [fd03::3]:3 > [fd02::2]:4"),
            cookie(),
            RuleNumber(1),
            false,
        );
        assert_eq!(nat.0[FLAGS], MATCH_MAC | ROUTED | NAT);
        assert_eq!(nat.0[SPORT..DPORT + 2], [0, 3, 0, 4]);
        let octets = |a: &str| a.parse::<Ipv6Addr>().unwrap().octets();
        assert_eq!((get(&nat.0, SRC), get(&nat.0, DST)), (octets("fd03::3"), octets("fd02::2")));

        let mut bridged = flow(same, same);
        (bridged.forward.macs, bridged.matches.eth_dst) = (None, None);
        (bridged.forward.vlan, bridged.matches.vlan) = (None, None);
        let bridged = Entry::new(&bridged, cookie(), RuleNumber(1), false);
        assert_eq!(bridged.0[VLAN..SPORT], [0; 22]);
    }

    #[test]
    fn what_an_entry_does_is_neither_who_wrote_it_nor_what_it_carried() {
        let same = "udp 10.0.0.1:1 > 10.0.0.2:2";
        let one = Entry::new(&flow(same, same), cookie(), RuleNumber(1), false);
        let mut other = one;
        other.0[..EGRESS].fill(0x55);
        assert!(one.does_what(&other));
        for at in EGRESS..ENTRY {
            let mut other = one;
            other.0[at] ^= 1;
            assert!(!one.does_what(&other), "{at}");
        }
    }

    /// The Internet checksum of some bytes.
    fn checksum(bytes: &[u8]) -> u16 {
        let mut sum: u32 =
            bytes.chunks(2).map(|w| u32::from(u16::from_ne_bytes([w[0], w[1]]))).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !u16::try_from(sum).unwrap()
    }

    proptest! {
        #[test]
        fn a_key_tells_its_tuple(udp: bool, a: [u8; 16], b: [u8; 16], v6: bool, sport: u16, dport: u16) {
            let ip = |x: [u8; 16]| address(x, v6);
            let proto = if udp { L4Proto::Udp } else { L4Proto::Tcp };
            let tuple = Tuple::new(proto, ip(a), sport, ip(b), dport).unwrap();
            let key = Key::of(&FlowMatch { eth_dst: None, vlan: None, tuple });
            prop_assert_eq!(key.tuple(), Some(tuple));
        }

        #[test]
        fn a_difference_makes_the_old_checksum_the_new_one(
            rest in proptest::collection::vec(any::<u8>(), 20),
            old: [u8; 12],
            new: [u8; 12],
        ) {
            prop_assume!(rest.iter().any(|&b| b != 0));
            let before = u32::from(!checksum(&[&rest[..], &old].concat()));
            let mut sum = before + difference(&old, &new);
            while sum > 0xffff {
                sum = (sum & 0xffff) + (sum >> 16);
            }
            prop_assert_eq!(!u16::try_from(sum).unwrap(), checksum(&[&rest[..], &new].concat()));
        }
    }
}
