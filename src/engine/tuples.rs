//! Zone and tuples of a connection, as compact as they can be kept: there are a million of them.
//!
//! | | IPv4 | IPv6 |
//! |---|---|---|
//! | zone, protocol, ports of the original tuple | one word | one word |
//! | its addresses | one word | four |
//! | addresses of the reply tuple | one word | kept apart, and only behind NAT |
//! | ports of the reply tuple | half a word | half a word |

#![expect(clippy::cast_possible_truncation, reason = "fields of words are cut out")]

use std::hash::{Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netdev_providers::{L4Proto, Tuple, Zone};

/// What identifies a connection among the living.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnKey {
    /// Its conntrack zone.
    pub zone: Zone,
    /// The tuple of its first packet.
    pub original: Tuple,
}

impl Hash for ConnKey {
    /// In two words for IPv4: a hash of the fields one by one is most of the cost of a look-up.
    fn hash<H: Hasher>(&self, state: &mut H) {
        Name::from(self).hash(state);
    }
}

/// The word that tells all of a tuple but its addresses. From bit 0: destination port, source port, protocol
/// (8), whether it is one of IPv6 (8), zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head(u64);

impl Head {
    const IPV6: u64 = 1 << 40;

    fn new(zone: Zone, tuple: &Tuple) -> Self {
        let family = if tuple.is_ipv6() { Self::IPV6 } else { 0 };
        Self(
            u64::from(zone.0) << 48
                | family
                | u64::from(tuple.proto().number()) << 32
                | u64::from(tuple.sport()) << 16
                | u64::from(tuple.dport()),
        )
    }

    const fn zone(self) -> Zone {
        Zone((self.0 >> 48) as u16)
    }
    const fn is_ipv6(self) -> bool {
        self.0 & Self::IPV6 != 0
    }
    const fn proto(self) -> L4Proto {
        match (self.0 >> 32) as u8 {
            6 => L4Proto::Tcp,
            _ => L4Proto::Udp,
        }
    }
    const fn ports(self) -> (u16, u16) {
        ((self.0 >> 16) as u16, self.0 as u16)
    }
    /// The same with the ports of another tuple.
    fn with_ports(self, ports: u32) -> Self {
        Self(self.0 & !0xffff_ffff | u64::from(ports))
    }
}

/// Source and destination, in one word for IPv4 (the first), in four for IPv6.
type Addresses = [u64; 4];

fn addresses(tuple: &Tuple) -> Addresses {
    let halves = |a: Ipv6Addr| {
        let bits = a.to_bits();
        [(bits >> 64) as u64, bits as u64]
    };
    match (tuple.src(), tuple.dst()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => [v4_addresses(src, dst), 0, 0, 0],
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let ([a, b], [c, d]) = (halves(src), halves(dst));
            [a, b, c, d]
        }
        // A tuple's addresses are of one family.
        (src, dst) => {
            let both = [src, dst].map(|a| match a {
                IpAddr::V4(a) => halves(a.to_ipv6_mapped()),
                IpAddr::V6(a) => halves(a),
            });
            [both[0][0], both[0][1], both[1][0], both[1][1]]
        }
    }
}

fn v4_addresses(src: Ipv4Addr, dst: Ipv4Addr) -> u64 {
    u64::from(src.to_bits()) << 32 | u64::from(dst.to_bits())
}

/// Zone and one tuple: what a connection is looked up by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Name {
    head: Head,
    addresses: Addresses,
}

impl Name {
    pub(super) fn new(zone: Zone, tuple: &Tuple) -> Self {
        Self { head: Head::new(zone, tuple), addresses: addresses(tuple) }
    }
}

impl From<&ConnKey> for Name {
    fn from(key: &ConnKey) -> Self {
        Self::new(key.zone, &key.original)
    }
}

impl Hash for Name {
    fn hash<H: Hasher>(&self, state: &mut H) {
        hash_of(self.head, &self.addresses, state);
    }
}

fn hash_of<H: Hasher>(head: Head, addresses: &Addresses, state: &mut H) {
    state.write_u64(head.0);
    let words = if head.is_ipv6() { addresses.len() } else { 1 };
    addresses[..words].iter().for_each(|word| state.write_u64(*word));
}

fn tuple(head: Head, addresses: &Addresses) -> Tuple {
    let (src, dst) = if head.is_ipv6() {
        let v6 =
            |high: u64, low: u64| Ipv6Addr::from_bits(u128::from(high) << 64 | u128::from(low));
        let [a, b, c, d] = *addresses;
        (IpAddr::V6(v6(a, b)), IpAddr::V6(v6(c, d)))
    } else {
        let [both, ..] = *addresses;
        let v4 = |bits: u64| Ipv4Addr::from_bits(bits as u32);
        (IpAddr::V4(v4(both >> 32)), IpAddr::V4(v4(both)))
    };
    let (sport, dport) = head.ports();
    match Tuple::new(head.proto(), src, sport, dst, dport) {
        Some(tuple) => tuple,
        None => unreachable!("both addresses are of one family"),
    }
}

/// Zone, original and reply tuple of a connection.
#[derive(Clone, Debug)]
#[repr(C)]
pub(super) struct Tuples {
    head: Head,
    /// Of the original tuple; for IPv4, the second word is the reply tuple's.
    addresses: Addresses,
    /// Those of the reply tuple, where they are IPv6 and not the original's, exchanged.
    reply_addresses: Option<Box<Addresses>>,
    /// Source and destination.
    reply_ports: (u16, u16),
}

impl Tuples {
    pub(super) fn new(key: &ConnKey, reply: &Tuple) -> Self {
        let (Name { head, mut addresses }, answer) = (key.into(), addresses(reply));
        let mut reply_addresses = None;
        if !head.is_ipv6() {
            addresses[1] = answer[0];
        } else if answer != exchanged(&addresses) {
            reply_addresses = Some(Box::new(answer));
        }
        Self { head, addresses, reply_addresses, reply_ports: (reply.sport(), reply.dport()) }
    }

    pub(super) fn zone(&self) -> Zone {
        self.head.zone()
    }

    pub(super) fn original(&self) -> Tuple {
        tuple(self.head, &self.addresses)
    }

    pub(super) fn reply(&self) -> Tuple {
        let (head, addresses) = self.reply_words();
        tuple(head, &addresses)
    }

    fn reply_words(&self) -> (Head, Addresses) {
        let addresses = match (&self.reply_addresses, self.head.is_ipv6()) {
            (Some(behind_nat), _) => **behind_nat,
            (None, true) => exchanged(&self.addresses),
            (None, false) => [self.addresses[1], 0, 0, 0],
        };
        let (sport, dport) = self.reply_ports;
        (self.head.with_ports(u32::from(sport) << 16 | u32::from(dport)), addresses)
    }

    /// Whether the reply tuple is another than the original one, inverted.
    pub(super) fn has_nat(&self) -> bool {
        let (sport, dport) = self.head.ports();
        let addresses_differ = if self.head.is_ipv6() {
            self.reply_addresses.is_some()
        } else {
            self.addresses[1] != self.addresses[0].rotate_left(32)
        };
        addresses_differ || self.reply_ports != (dport, sport)
    }

    /// Whether this is its zone and original tuple.
    #[inline]
    pub(super) fn is_named(&self, name: &Name) -> bool {
        self.head == name.head
            && self.addresses[0] == name.addresses[0]
            && (!self.head.is_ipv6() || self.addresses == name.addresses)
    }

    /// Whether this is its zone and reply tuple.
    pub(super) fn is_answered_as(&self, name: &Name) -> bool {
        self.reply_name() == *name
    }

    pub(super) fn reply_name(&self) -> Name {
        let (head, addresses) = self.reply_words();
        Name { head, addresses }
    }
}

impl Hash for Tuples {
    /// As of the [`Name`] that it [has](Self::is_named).
    fn hash<H: Hasher>(&self, state: &mut H) {
        hash_of(self.head, &self.addresses, state);
    }
}

/// Source and destination of IPv6 exchanged.
fn exchanged(&[a, b, c, d]: &Addresses) -> Addresses {
    [c, d, a, b]
}

#[cfg(test)]
mod tests {
    use std::collections::hash_map::DefaultHasher;

    use super::*;
    use proptest::prelude::*;

    fn hash(what: &impl Hash) -> u64 {
        let mut hasher = DefaultHasher::new();
        what.hash(&mut hasher);
        hasher.finish()
    }

    fn any_tuple(ipv6: bool, proto: L4Proto) -> impl Strategy<Value = Tuple> {
        // Few values, so that fields are often the same.
        let address = move || {
            prop_oneof![0u128..3, any::<u128>()].prop_map(move |bits| match ipv6 {
                true => IpAddr::V6(Ipv6Addr::from_bits(bits)),
                false => IpAddr::V4(Ipv4Addr::from_bits(bits as u32)),
            })
        };
        let port = || prop_oneof![0u16..3, any::<u16>()];
        (address(), port(), address(), port()).prop_map(move |(src, sport, dst, dport)| {
            Tuple::new(proto, src, sport, dst, dport).unwrap()
        })
    }

    fn any_pair() -> impl Strategy<Value = (ConnKey, Tuple)> {
        let proto = prop_oneof![Just(L4Proto::Tcp), Just(L4Proto::Udp)];
        (any::<bool>(), proto, prop_oneof![0u16..3, any::<u16>()]).prop_flat_map(
            |(ipv6, proto, zone)| {
                (any_tuple(ipv6, proto), any_tuple(ipv6, proto), any::<bool>()).prop_map(
                    move |(original, other, nat)| {
                        let reply = if nat { other } else { original.inverted() };
                        (ConnKey { zone: Zone(zone), original }, reply)
                    },
                )
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_kept_is_what_was_given((key, reply) in any_pair()) {
            let t = Tuples::new(&key, &reply);
            prop_assert_eq!((t.zone(), t.original(), t.reply()), (key.zone, key.original, reply));
            prop_assert_eq!(t.has_nat(), reply != key.original.inverted());
            prop_assert_eq!(hash(&t), hash(&Name::from(&key)), "it is found by its name");
            prop_assert!(t.is_named(&Name::from(&key)));
            prop_assert!(t.is_answered_as(&Name::new(key.zone, &reply)));
            prop_assert_eq!(t.reply_addresses.is_some(), key.original.is_ipv6() && (reply.src(), reply.dst()) != (key.original.dst(), key.original.src()));
        }

        #[test]
        fn nobody_has_anothers_name((key, reply) in any_pair(), (other, answer) in any_pair()) {
            let t = Tuples::new(&key, &reply);
            prop_assert_eq!(t.is_named(&Name::from(&other)), key == other);
            let same = key.zone == other.zone && reply == answer;
            prop_assert_eq!(t.is_answered_as(&Name::new(other.zone, &answer)), same);
        }
    }

    #[test]
    fn both_tuples_take_seven_words_in_either_family() {
        assert_eq!(size_of::<Tuples>(), 56);
    }
}
