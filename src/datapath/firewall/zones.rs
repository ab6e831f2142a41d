//! Conntrack zones: whether the netdev, the tag and the tuple of a packet say which zone it is of.
//!
//! A rule of ours matches a netdev, a tag and a tuple, and no zone. So where two connections with one
//! tuple can come by one netdev in two zones (`ct zone set meta mark`, by the sender's MAC address, ...),
//! the rule of the first would take the packets of the second. Nobody tells of the second before its
//! packets have been taken; but the ruleset says what chooses zones, and that is read here.
//!
//! What a rule matches may choose: netdev, tag, addresses, ports, protocol. Anything else, and what is not
//! known, is **unclear**: a rule that sets a zone and looks at such a thing, or that leads past one
//! that does (a jump, `accept`, `return`, a verdict map; what is dropped has no zone).

use netdev_providers::netlink::netfilter::nft::NFTA_DATA_VALUE;
use netdev_providers::netlink::wire::{Attr, Nested};

use super::expr::{
    LINK_LAYER, NETWORK, NF_DROP, NFT_CMP_EQ, NFT_CONTINUE, NFT_CT_ZONE, NFT_META_IIF,
    NFT_META_IIFNAME, NFT_META_MARK, NFT_REG_VERDICT, NFTA_CMP_DATA, NFTA_CMP_OP,
    NFTA_CT_DIRECTION, NFTA_CT_KEY, NFTA_CT_SREG, NFTA_IMMEDIATE_DATA, NFTA_LOOKUP_DREG,
    NFTA_META_KEY, NFTA_META_SREG, NFTA_OBJREF_IMM_TYPE, NFTA_PAYLOAD_BASE, NFTA_PAYLOAD_LEN,
    NFTA_PAYLOAD_OFFSET, NFTA_XT_INFO, NFTA_XT_NAME, TRANSPORT, each, verdict_code,
};

/// Of the packet's tuple or of its netdev: protocol, iif, iifname, iiftype, nfproto, l4proto, the bridge of the
/// netdev, its group, its kind, the bridge's VLAN of the port, the netdev below a VRF.
const META_CLEAR: [u32; 13] = [1, 4, 6, 8, 15, 16, 17, 21, 26, 28, 29, 33, 34];
/// `NFT_OBJECT_*` that decide nothing: counter, helper, timeout, secmark, expectation.
const OBJECTS_CLEAR: [u32; 5] = [1, 3, 7, 8, 9];
/// `XT_CT_ZONE_*` of `struct xt_ct_target_info`: the zone of one direction, the zone from the mark.
const XT_CT_ZONE_DIR: u16 = 4 | 8;
const XT_CT_ZONE_MARK: u16 = 16;

/// The netdev that a rule is about, where it says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Iif {
    /// By its ifindex.
    Index(u32),
    /// By its name.
    Name(String),
}

/// What a rule has to do with zones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ZoneRule {
    /// It sets one.
    pub sets: bool,
    /// It decides which rules come after it.
    leads: bool,
    /// What it looks at that no rule of ours matches.
    unclear: Option<String>,
    /// The only netdev that it is about.
    iif: Option<Iif>,
}

/// Zones that something else chooses than a rule of ours can match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UnclearZone {
    /// The rule, for people.
    pub what: String,
    /// The only netdev whose packets it is about.
    pub iif: Option<Iif>,
}

impl UnclearZone {
    /// Whether packets that arrive by this netdev are concerned.
    pub(crate) fn concerns(&self, ifindex: u32, name: &str) -> bool {
        match &self.iif {
            None => true,
            Some(Iif::Index(i)) => *i == ifindex,
            Some(Iif::Name(n)) => n == name,
        }
    }
}

impl ZoneRule {
    /// `None` for a rule that has nothing to do with them.
    pub(crate) fn read(expressions: Nested<'_>) -> Option<Self> {
        let mut rule = Self::default();
        // The key that the expression before has loaded.
        let mut loaded = None;
        for (name, data) in each(expressions) {
            let number = |ty| data.find_type(ty).and_then(|a: Attr<'_>| a.be32());
            let has = |ty| data.find_type(ty).is_some();
            let meta = (name == "meta" && !has(NFTA_META_SREG)).then(|| number(NFTA_META_KEY));
            match name {
                "cmp" => rule.iif = rule.iif.or_else(|| netdev(loaded.flatten(), &data)),
                "immediate" => rule.leads |= leads(&data),
                "lookup" => rule.leads |= number(NFTA_LOOKUP_DREG) == Some(NFT_REG_VERDICT),
                "meta" => match meta.flatten() {
                    _ if meta.is_none() => {}
                    Some(key) if META_CLEAR.contains(&key) => {}
                    Some(NFT_META_MARK) => rule.looks_at("the mark"),
                    _ => rule.looks_at("meta"),
                },
                "payload" => match payload(&data) {
                    Payload::Clear => {}
                    Payload::Sender => rule.looks_at("the sender's MAC address"),
                    Payload::Other => rule.looks_at("other parts of the packet"),
                },
                "ct" if has(NFTA_CT_SREG) => {
                    if number(NFTA_CT_KEY) == Some(NFT_CT_ZONE) {
                        rule.sets = true;
                        if has(NFTA_CT_DIRECTION) {
                            rule.looks_at("the direction");
                        }
                    }
                }
                "ct" => rule.looks_at("conntrack"),
                "target" => rule.target(&data),
                "match" => match data.find_type(NFTA_XT_NAME).and_then(|a| a.str()) {
                    Some("comment") => {}
                    Some(name) => rule.looks_at(&format!("iptables -m {name}")),
                    None => rule.looks_at("a match of iptables"),
                },
                "objref"
                    if number(NFTA_OBJREF_IMM_TYPE).is_some_and(|t| OBJECTS_CLEAR.contains(&t)) => {
                }
                // What they are compared with, and what decides nothing.
                "bitwise" | "byteorder" | "range" | "counter" | "log" | "notrack" | "last"
                | "reject" => {}
                other => rule.looks_at(other),
            }
            loaded = meta;
        }
        (rule.sets || (rule.leads && rule.unclear.is_some())).then_some(rule)
    }

    fn looks_at(&mut self, what: &str) {
        self.unclear.get_or_insert_with(|| what.to_owned());
    }

    /// `-j CT`.
    fn target(&mut self, data: &Nested<'_>) {
        if data.find_type(NFTA_XT_NAME).and_then(|a| a.str()) != Some("CT") {
            return;
        }
        // struct xt_ct_target_info: flags, zone, ...
        let info = data.find_type(NFTA_XT_INFO).map_or(&[][..], |a| a.payload);
        let half = |at: usize| Some(u16::from_ne_bytes(*info.get(at..)?.first_chunk()?));
        let (Some(flags), Some(zone)) = (half(0), half(2)) else {
            self.sets = true;
            return self.looks_at("what cannot be read");
        };
        self.sets |= zone != 0 || flags & XT_CT_ZONE_MARK != 0;
        if flags & XT_CT_ZONE_MARK != 0 {
            self.looks_at("the mark");
        }
        if flags & XT_CT_ZONE_DIR != 0 {
            self.looks_at("the direction");
        }
    }

    /// The rule of this chain as what makes zones unclear, if it does.
    pub(crate) fn unclear(&self, table: &str, chain: &str) -> Option<UnclearZone> {
        let by = self.unclear.as_deref()?;
        let what = format!("chain {chain} of table {table} chooses conntrack zones by {by}");
        Some(UnclearZone { what, iif: self.iif.clone() })
    }
}

/// A verdict that some rules behind it are not met after; what is dropped has no zone.
fn leads(data: &Nested<'_>) -> bool {
    let verdict = data.find_type(NFTA_IMMEDIATE_DATA).and_then(|d| verdict_code(d.nested()));
    verdict.is_some_and(|code| !matches!(code, NF_DROP | NFT_CONTINUE))
}

/// The netdev that a comparison of this key says, if it is of a whole one.
fn netdev(key: Option<u32>, data: &Nested<'_>) -> Option<Iif> {
    let number = |ty| data.find_type(ty).and_then(|a: Attr<'_>| a.be32());
    if number(NFTA_CMP_OP) != Some(NFT_CMP_EQ) {
        return None;
    }
    let value = data.find_type(NFTA_CMP_DATA)?.nested().find_type(NFTA_DATA_VALUE)?.payload;
    match key? {
        NFT_META_IIF => Some(Iif::Index(u32::from_ne_bytes(*value.first_chunk()?))),
        // A name that goes on behind what is compared ("eth*") is shorter than its field.
        NFT_META_IIFNAME => {
            let end = value.iter().position(|&b| b == 0)?;
            Some(Iif::Name(std::str::from_utf8(value.get(..end)?).ok()?.to_owned()))
        }
        _ => None,
    }
}

enum Payload {
    Clear,
    Sender,
    Other,
}

fn payload(data: &Nested<'_>) -> Payload {
    let number = |ty| data.find_type(ty).and_then(|a: Attr<'_>| a.be32());
    let (Some(base), Some(at), Some(len)) =
        (number(NFTA_PAYLOAD_BASE), number(NFTA_PAYLOAD_OFFSET), number(NFTA_PAYLOAD_LEN))
    else {
        return Payload::Other;
    };
    let clear = match base {
        // The receiver's MAC address, ethertypes, the tag.
        LINK_LAYER => matches!((at, len), (0, 6) | (12 | 14 | 16, 2)),
        // Addresses, one or both, and the protocol: of IPv4, of IPv6.
        NETWORK => {
            matches!((at, len), (12 | 16, 4) | (12, 8) | (9, 1) | (8 | 24, 16) | (8, 32) | (6, 1))
        }
        // Ports.
        TRANSPORT => matches!((at, len), (0 | 2, 2) | (0, 4)),
        _ => false,
    };
    match (clear, base) {
        (true, _) => Payload::Clear,
        (false, LINK_LAYER) if (6..12).contains(&at) => Payload::Sender,
        _ => Payload::Other,
    }
}

#[cfg(test)]
mod tests {
    use netdev_providers::netlink::Message;
    use netdev_providers::netlink::netfilter::nft::NFTA_LIST_ELEM;
    use netdev_providers::netlink::netfilter::nft::expr::{self, Cmp, NFT_REG_1};

    use super::super::expr::{
        NFTA_DATA_VERDICT, NFTA_EXPR_DATA, NFTA_EXPR_NAME, NFTA_VERDICT_CODE,
    };
    use super::*;

    type Fill<'a> = &'a dyn Fn(&mut Message<'_>);

    fn read(parts: &[Fill<'_>]) -> Option<ZoneRule> {
        let mut buf = Vec::new();
        let mut m = Message::new(&mut buf, 0, 0, 0);
        parts.iter().for_each(|fill| fill(&mut m));
        m.finish();
        ZoneRule::read(Nested::new(&buf[16..]))
    }

    fn expression(m: &mut Message<'_>, name: &str, data: impl FnOnce(&mut Message<'_>)) {
        m.nested(NFTA_LIST_ELEM, |m| {
            m.str(NFTA_EXPR_NAME, name).nested(NFTA_EXPR_DATA, data);
        });
    }

    fn set_zone(m: &mut Message<'_>) {
        expression(m, "ct", |m| {
            m.be32(NFTA_CT_KEY, NFT_CT_ZONE).be32(NFTA_CT_SREG, 1);
        });
    }

    fn payload_of(base: u32, at: u32, len: u32) -> impl Fn(&mut Message<'_>) {
        move |m| expr::payload(m, base, at, len)
    }

    fn by(rule: Option<ZoneRule>) -> Option<String> {
        Some(rule?.unclear("t", "c")?.what.rsplit_once(" by ")?.1.to_owned())
    }

    #[test]
    fn zones_by_what_a_rule_matches_are_clear() {
        let clear: [Fill<'_>; 7] = [
            &|m| expr::meta(m, expr::NFT_META_IIF, NFT_REG_1),
            &|m| expr::meta(m, NFT_META_IIFNAME, NFT_REG_1),
            &|m| expr::meta(m, expr::NFT_META_L4PROTO, NFT_REG_1),
            &payload_of(NETWORK, 12, 4),
            &payload_of(NETWORK, 24, 16),
            &payload_of(TRANSPORT, 2, 2),
            &payload_of(LINK_LAYER, 14, 2),
        ];
        for load in clear {
            let rule = read(&[load, &|m| expr::cmp(m, Cmp::Eq, &[0; 4]), &set_zone]).unwrap();
            assert!(rule.sets);
            assert_eq!(rule.unclear("t", "c"), None);
        }
        // A map by the netdev, whose result is the zone.
        let map = |m: &mut Message<'_>| {
            expression(m, "lookup", |m| _ = m.be32(2, 1).be32(NFTA_LOOKUP_DREG, 1));
        };
        let rule = read(&[clear[0], &map, &set_zone]).unwrap();
        assert!(rule.sets && rule.unclear.is_none());
    }

    #[test]
    fn zones_by_anything_else_are_unclear_and_it_is_named() {
        let cases: [(Fill<'_>, &str); 7] = [
            (&|m| expr::meta(m, NFT_META_MARK, NFT_REG_1), "the mark"),
            (&payload_of(LINK_LAYER, 6, 6), "the sender's MAC address"),
            (&payload_of(NETWORK, 1, 1), "other parts of the packet"),
            (&payload_of(TRANSPORT, 13, 1), "other parts of the packet"),
            (&|m| expression(m, "fib", |_| {}), "fib"),
            (&|m| expression(m, "match", |m| _ = m.str(1, "mac")), "iptables -m mac"),
            (&|m| expr::ct(m, expr::NFT_CT_STATUS, NFT_REG_1), "conntrack"),
        ];
        for (load, what) in cases {
            let compare: Fill<'_> = &|m| expr::cmp(m, Cmp::Eq, &[0; 4]);
            assert_eq!(by(read(&[load, compare, &set_zone])).as_deref(), Some(what));
            assert_eq!(read(&[load, compare]), None, "it does nothing to zones");
            // It leads past rules that set them, but for a drop.
            assert_eq!(by(read(&[load, compare, &expr::accept])).as_deref(), Some(what));
            let drop = |m: &mut Message<'_>| {
                expression(m, "immediate", |m| {
                    m.nested(NFTA_IMMEDIATE_DATA, |m| {
                        m.nested(NFTA_DATA_VERDICT, |m| _ = m.be32(NFTA_VERDICT_CODE, NF_DROP));
                    });
                });
            };
            assert_eq!(read(&[load, compare, &drop]), None);
        }
        let of_one_direction = |m: &mut Message<'_>| {
            expression(m, "ct", |m| {
                m.be32(NFTA_CT_KEY, NFT_CT_ZONE).be32(NFTA_CT_SREG, 1).u8(NFTA_CT_DIRECTION, 0);
            });
        };
        assert_eq!(by(read(&[&of_one_direction])).as_deref(), Some("the direction"));
        assert_eq!(read(&[&expr::accept]), None, "whoever it is about");
        // Something that is set is not looked at.
        let set_mark = |m: &mut Message<'_>| {
            expression(m, "meta", |m| {
                m.be32(NFTA_META_KEY, NFT_META_MARK).be32(NFTA_META_SREG, 1);
            });
        };
        assert_eq!(read(&[&set_mark, &set_zone]).unwrap().unclear, None);
    }

    #[test]
    fn the_target_of_iptables_is_read() {
        let target = |flags: u16, zone: u16| {
            let info = [&flags.to_ne_bytes()[..], &zone.to_ne_bytes(), &[0; 44]].concat();
            read(&[&|m| {
                expression(m, "target", |m| _ = m.str(NFTA_XT_NAME, "CT").attr(NFTA_XT_INFO, &info))
            }])
        };
        assert_eq!(target(0, 0), None, "a helper");
        assert_eq!(target(1, 0), None, "untracked");
        assert!(target(0, 7).is_some_and(|r| r.sets && r.unclear.is_none()));
        assert_eq!(by(target(XT_CT_ZONE_MARK, 0)).as_deref(), Some("the mark"));
        assert_eq!(by(target(4, 7)).as_deref(), Some("the direction"));
        let short = read(&[&|m| expression(m, "target", |m| _ = m.str(NFTA_XT_NAME, "CT"))]);
        assert_eq!(by(short).as_deref(), Some("what cannot be read"));
    }

    #[test]
    fn a_rule_about_one_netdev_concerns_no_other() {
        let mark: Fill<'_> = &|m| expr::meta(m, NFT_META_MARK, NFT_REG_1);
        let concerns = |key: u32, value: &[u8]| {
            let netdev: [Fill<'_>; 2] =
                [&|m| expr::meta(m, key, NFT_REG_1), &|m| expr::cmp(m, Cmp::Eq, value)];
            let rule = read(&[netdev[0], netdev[1], mark, &set_zone]).unwrap();
            let unclear = rule.unclear("t", "c").unwrap();
            [(5, "lan"), (6, "wan"), (7, "lan0")].map(|(i, n)| unclear.concerns(i, n))
        };
        let mut name = *b"lan\0\0\0\0\0\0\0\0\0\0\0\0\0";
        assert_eq!(concerns(NFT_META_IIFNAME, &name), [true, false, false]);
        assert_eq!(concerns(NFT_META_IIFNAME, b"lan"), [true; 3], "lan*");
        name[3] = b'0';
        assert_eq!(concerns(NFT_META_IIFNAME, &name), [false, false, true]);
        assert_eq!(concerns(NFT_META_IIF, &6u32.to_ne_bytes()), [false, true, false]);
        // What is compared with another key is no netdev.
        let other = read(&[mark, &|m| expr::cmp(m, Cmp::Eq, &6u32.to_ne_bytes()), &set_zone]);
        assert_eq!(other.unwrap().iif, None);
    }
}
