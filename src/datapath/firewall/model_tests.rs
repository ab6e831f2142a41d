use netdev_providers::netlink::Message;
use netdev_providers::netlink::netfilter::nft::NFTA_LIST_ELEM;
use netdev_providers::netlink::netfilter::nft::{NFTA_SET_KEY_LEN, expr};
use netdev_providers::netlink::netfilter::{msg_type, nfgenmsg};
use netdev_providers::netlink::wire::MessageIter;

use super::super::expr::{NFTA_DATA_VERDICT, NFTA_EXPR_DATA, NFTA_EXPR_NAME, NFTA_VERDICT_CHAIN};
use super::*;

const FORWARD: u32 = 2;
const INPUT: u32 = 1;

/// A ruleset that is changed by messages as the kernel announces them.
#[derive(Default)]
struct Ruleset(Model);

impl Ruleset {
    fn say(&mut self, msg: u16, fill: impl FnOnce(&mut Message<'_>)) -> Concerns {
        self.say_of(NFPROTO_INET, msg, fill)
    }

    fn say_of(&mut self, family: u8, msg: u16, fill: impl FnOnce(&mut Message<'_>)) -> Concerns {
        let mut buf = Vec::new();
        let mut m = Message::new(&mut buf, msg_type(SUBSYS_NFTABLES, msg), 0, 0);
        m.raw(&nfgenmsg(family, 0));
        fill(&mut m);
        m.finish();
        let mut t = Transaction::default();
        for m in MessageIter::new(&buf) {
            self.0.message(&m, &mut t);
        }
        self.0.end(t)
    }

    fn base(&mut self, name: &str, hook: u32, ty: &str, policy: u32) -> Concerns {
        self.say(NFT_MSG_NEWCHAIN, |m| {
            m.str(NFTA_CHAIN_TABLE, "t").str(NFTA_CHAIN_NAME, name).str(NFTA_CHAIN_TYPE, ty);
            m.be32(NFTA_CHAIN_POLICY, policy).nested(NFTA_CHAIN_HOOK, |m| {
                m.be32(NFTA_HOOK_HOOKNUM, hook);
            });
        })
    }

    fn chain(&mut self, name: &str) -> Concerns {
        self.say(NFT_MSG_NEWCHAIN, |m| {
            m.str(NFTA_CHAIN_TABLE, "t").str(NFTA_CHAIN_NAME, name);
        })
    }

    fn rule(&mut self, msg: u16, chain: &str, fill: impl FnOnce(&mut Message<'_>)) -> Concerns {
        self.say(msg, |m| {
            m.str(NFTA_RULE_TABLE, "t").str(NFTA_RULE_CHAIN, chain);
            m.nested(NFTA_RULE_EXPRESSIONS, fill);
        })
    }

    fn set(&mut self, name: &str, key_type: u32, flags: u32) -> Concerns {
        self.say(NFT_MSG_NEWSET, |m| {
            m.str(NFTA_SET_TABLE, "t").str(NFTA_SET_NAME, name).be32(NFTA_SET_FLAGS, flags);
            m.be32(NFTA_SET_KEY_TYPE, key_type).be32(NFTA_SET_KEY_LEN, 4);
        })
    }

    /// Elements with their flags, and the chain that each sends to.
    fn elements(&mut self, msg: u16, set: &str, all: &[([u8; 4], u32, Option<&str>)]) -> Concerns {
        self.say(msg, |m| {
            m.str(NFTA_SET_ELEM_LIST_TABLE, "t").str(NFTA_SET_ELEM_LIST_SET, set);
            m.nested(NFTA_SET_ELEM_LIST_ELEMENTS, |m| {
                for (key, flags, chain) in all {
                    m.nested(NFTA_LIST_ELEM, |m| {
                        m.nested(NFTA_SET_ELEM_KEY, |m| {
                            m.attr(NFTA_DATA_VALUE, key);
                        });
                        m.be32(NFTA_SET_ELEM_FLAGS, *flags);
                        if let Some(chain) = chain {
                            m.nested(NFTA_SET_ELEM_DATA, |m| verdict(m, chain));
                        }
                    });
                }
            });
        })
    }
}

fn verdict(m: &mut Message<'_>, chain: &str) {
    m.nested(NFTA_DATA_VERDICT, |m| {
        m.str(NFTA_VERDICT_CHAIN, chain);
    });
}

fn expression(m: &mut Message<'_>, name: &str, data: impl FnOnce(&mut Message<'_>)) {
    m.nested(NFTA_LIST_ELEM, |m| {
        m.str(NFTA_EXPR_NAME, name).nested(NFTA_EXPR_DATA, data);
    });
}

fn jump(m: &mut Message<'_>, chain: &str) {
    expression(m, "immediate", |m| {
        m.nested(NFTA_IMMEDIATE_DATA, |m| verdict(m, chain));
    });
}

fn lookup(m: &mut Message<'_>, set: &str) {
    expression(m, "lookup", |m| {
        m.str(NFTA_LOOKUP_SET, set).be32(NFTA_LOOKUP_SREG, expr::NFT_REG_1);
    });
}

fn saddr(m: &mut Message<'_>) {
    expr::payload(m, expr::NFT_PAYLOAD_NETWORK_HEADER, 12, 4);
}

fn only(first: &str, last: &str) -> Concerns {
    Concerns::Addresses(vec![(first.parse().unwrap(), last.parse().unwrap())])
}

#[test]
fn only_what_forwarded_packets_meet_concerns_anybody() {
    let mut r = Ruleset::default();
    r.base("in", INPUT, "filter", 1);
    assert_eq!(r.base("fwd", FORWARD, "filter", 1), Concerns::Nobody, "it refuses nothing yet");
    r.base("nat", 4, "nat", 1);
    assert_eq!(r.rule(NFT_MSG_NEWRULE, "in", |_| {}), Concerns::Nobody);
    assert_eq!(r.rule(NFT_MSG_NEWRULE, "nat", |_| {}), Concerns::Nobody);
    assert_eq!(r.rule(NFT_MSG_NEWRULE, "fwd", |_| {}), Concerns::All);
    assert_eq!(r.rule(NFT_MSG_DELRULE, "fwd", |_| {}), Concerns::All);
    assert_eq!(r.base("fwd", FORWARD, "filter", 0), Concerns::All, "its policy is to drop now");
    assert_eq!(r.base("late", 4, "filter", 0), Concerns::All);
    // By a jump, whichever comes first, and no more when what led there has gone.
    assert_eq!(r.chain("sub"), Concerns::Nobody);
    assert_eq!(r.rule(NFT_MSG_NEWRULE, "sub", |_| {}), Concerns::Nobody);
    assert_eq!(r.rule(NFT_MSG_NEWRULE, "in", |m| jump(m, "sub")), Concerns::Nobody);
    assert_eq!(r.rule(NFT_MSG_NEWRULE, "sub", |_| {}), Concerns::Nobody);
    assert_eq!(r.rule(NFT_MSG_NEWRULE, "fwd", |m| jump(m, "sub")), Concerns::All);
    assert_eq!(r.rule(NFT_MSG_NEWRULE, "sub", |_| {}), Concerns::All);
    let gone = |m: &mut Message<'_>| {
        m.str(NFTA_TABLE_NAME, "t");
    };
    assert_eq!(r.say(NFT_MSG_DELTABLE, gone), Concerns::All);
    assert_eq!(r.say(NFT_MSG_DELTABLE, gone), Concerns::Nobody, "it was gone");
}

#[test]
fn families_and_their_hooks() {
    for (family, hook, on_the_way) in [
        (NFPROTO_IPV4, 0, true),
        (NFPROTO_IPV4, 1, false),
        (NFPROTO_IPV6, 3, false),
        (NFPROTO_IPV6, 4, true),
        (NFPROTO_INET, 5, true),
        (NFPROTO_NETDEV, 0, true),
        (NFPROTO_NETDEV, 1, true),
        (NFPROTO_BRIDGE, 1, true),
        // ARP.
        (3, 1, false),
    ] {
        assert_eq!(is_on_the_way(family, hook), on_the_way, "{family} {hook}");
    }
}

#[test]
fn an_element_concerns_the_connections_of_its_address_where_a_rule_on_the_way_looks_it_up() {
    let mut r = Ruleset::default();
    r.base("in", INPUT, "filter", 1);
    r.base("fwd", FORWARD, "filter", 1);
    r.set("bad", TYPE_IPADDR, 0);
    let host = [([192, 0, 2, 7], 0, None)];
    assert_eq!(r.elements(NFT_MSG_NEWSETELEM, "bad", &host), Concerns::Nobody);
    let rule = |m: &mut Message<'_>| {
        saddr(m);
        lookup(m, "bad");
    };
    r.rule(NFT_MSG_NEWRULE, "in", rule);
    assert_eq!(r.elements(NFT_MSG_NEWSETELEM, "bad", &host), Concerns::Nobody, "input alone");
    r.rule(NFT_MSG_NEWRULE, "fwd", rule);
    let named = only("192.0.2.7", "192.0.2.7");
    for msg in [NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM] {
        assert_eq!(r.elements(msg, "bad", &host), named);
    }
    assert!(named.address("192.0.2.7".parse().unwrap()));
    assert!(!named.address("192.0.2.8".parse().unwrap()));
    // Something else than the address as it is: anybody.
    r.rule(NFT_MSG_NEWRULE, "fwd", |m| {
        saddr(m);
        expr::mask(m, &[255, 255, 255, 0]);
        lookup(m, "bad");
    });
    assert_eq!(r.elements(NFT_MSG_NEWSETELEM, "bad", &host), Concerns::All);
    // Keys that are no addresses, and a set of which nothing is known.
    r.set("ports", 13, 0);
    r.rule(NFT_MSG_NEWRULE, "fwd", |m| lookup(m, "ports"));
    r.rule(NFT_MSG_NEWRULE, "fwd", |m| lookup(m, "unknown"));
    for set in ["ports", "unknown"] {
        assert_eq!(r.elements(NFT_MSG_NEWSETELEM, set, &host), Concerns::All, "{set}");
    }
}

#[test]
fn an_interval_is_all_that_is_in_it() {
    let mut r = Ruleset::default();
    r.base("fwd", FORWARD, "filter", 1);
    r.set("bad", TYPE_IPADDR, NFT_SET_INTERVAL);
    r.rule(NFT_MSG_NEWRULE, "fwd", |m| {
        saddr(m);
        lookup(m, "bad");
    });
    let interval = [([10, 0, 0, 0], 0, None), ([10, 0, 1, 0], 1, None)];
    assert_eq!(r.elements(NFT_MSG_NEWSETELEM, "bad", &interval), only("10.0.0.0", "10.0.0.255"));
    // Up to the last address there is no end.
    let open = [([240, 0, 0, 0], 0, None)];
    assert_eq!(r.elements(NFT_MSG_NEWSETELEM, "bad", &open), only("240.0.0.0", "255.255.255.255"));
}

#[test]
fn a_rule_that_compares_an_address_concerns_those_that_have_it() {
    let mut r = Ruleset::default();
    r.base("fwd", FORWARD, "filter", 1);
    let rule = |r: &mut Ruleset, op, masked: bool| {
        r.rule(NFT_MSG_NEWRULE, "fwd", |m| {
            saddr(m);
            if masked {
                expr::mask(m, &[255, 255, 255, 0]);
            }
            expr::cmp(m, op, &[10, 1, 2, 0]);
        })
    };
    assert_eq!(rule(&mut r, expr::Cmp::Eq, false), only("10.1.2.0", "10.1.2.0"));
    assert_eq!(rule(&mut r, expr::Cmp::Eq, true), only("10.1.2.0", "10.1.2.255"));
    assert_eq!(rule(&mut r, expr::Cmp::Neq, false), Concerns::All, "all but that one");
    // Ports name nobody's address.
    let port = r.rule(NFT_MSG_NEWRULE, "fwd", |m| {
        expr::payload(m, expr::NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2);
        expr::cmp(m, expr::Cmp::Eq, &[0, 80]);
    });
    assert_eq!(port, Concerns::All);
}

#[test]
fn a_verdict_map_leads_to_its_chains() {
    let mut r = Ruleset::default();
    r.base("fwd", FORWARD, "filter", 1);
    r.chain("sub");
    r.set("map", TYPE_IPADDR, 8);
    r.rule(NFT_MSG_NEWRULE, "fwd", |m| lookup(m, "map"));
    assert_eq!(r.rule(NFT_MSG_NEWRULE, "sub", |_| {}), Concerns::Nobody);
    r.elements(NFT_MSG_NEWSETELEM, "map", &[([10, 0, 0, 1], 0, Some("sub"))]);
    assert_eq!(r.rule(NFT_MSG_NEWRULE, "sub", |_| {}), Concerns::All);
}

#[test]
fn what_changes_without_a_word_is_named() {
    let mut r = Ruleset::default();
    r.base("in", INPUT, "filter", 1);
    r.base("fwd", FORWARD, "filter", 1);
    r.set("seen", TYPE_IPADDR, NFT_SET_EVAL);
    r.set("guests", TYPE_IPADDR, NFT_SET_TIMEOUT);
    let silent = |m: &mut Message<'_>| {
        lookup(m, "seen");
        lookup(m, "guests");
        expression(m, "limit", |_| {});
        expression(m, "meta", |m| {
            m.be32(NFTA_META_KEY, NFT_META_TIME_HOUR);
        });
        expression(m, "match", |m| {
            m.str(NFTA_XT_NAME, "set");
        });
    };
    r.rule(NFT_MSG_NEWRULE, "in", silent);
    assert!(r.0.silent().is_empty());
    r.rule(NFT_MSG_NEWRULE, "fwd", silent);
    assert_eq!(
        r.0.silent(),
        [
            "elements that packets add to set seen of table t",
            "elements with timeouts in set guests of table t",
            "ipset",
            "limits and quotas",
            "rules on the time",
        ]
    );
}

/// Rules of one table that set zones or lead past those that do, where packets on the way meet them.
#[test]
fn zones_are_unclear_where_a_rule_on_the_way_looks_at_something_else() {
    let set_zone = |m: &mut Message<'_>| {
        expression(m, "ct", |m| _ = m.be32(2, expr::NFT_CT_ZONE).be32(4, 1));
    };
    let by_mark = |m: &mut Message<'_>| expr::meta(m, 3, expr::NFT_REG_1);
    let by_netdev = |m: &mut Message<'_>| expr::meta(m, expr::NFT_META_IIF, expr::NFT_REG_1);
    let with_handle =
        |r: &mut Ruleset, msg, chain: &str, handle, fill: &dyn Fn(&mut Message<'_>)| {
            r.say(msg, |m| {
                m.str(NFTA_RULE_TABLE, "t")
                    .str(NFTA_RULE_CHAIN, chain)
                    .be64(NFTA_RULE_HANDLE, handle);
                m.nested(NFTA_RULE_EXPRESSIONS, fill);
            });
        };
    let told = |r: &Ruleset| r.0.unclear_zones().into_iter().map(|z| z.what).collect::<Vec<_>>();
    let by = |chain: &str| format!("chain {chain} of table t chooses conntrack zones by the mark");
    let mut r = Ruleset::default();
    r.base("pre", 0, "filter", 1);
    r.base("in", INPUT, "filter", 1);
    r.chain("sub");
    let clear = |m: &mut Message<'_>| {
        by_netdev(m);
        set_zone(m);
    };
    with_handle(&mut r, NFT_MSG_NEWRULE, "pre", 1, &clear);
    assert!(told(&r).is_empty());
    let marked = |m: &mut Message<'_>| {
        by_mark(m);
        set_zone(m);
    };
    with_handle(&mut r, NFT_MSG_NEWRULE, "in", 2, &marked);
    with_handle(&mut r, NFT_MSG_NEWRULE, "sub", 3, &marked);
    assert!(told(&r).is_empty(), "no packet that could be offloaded meets them");
    with_handle(&mut r, NFT_MSG_NEWRULE, "pre", 4, &|m| jump(m, "sub"));
    assert_eq!(told(&r), [by("sub")]);
    with_handle(&mut r, NFT_MSG_DELRULE, "sub", 3, &marked);
    assert!(told(&r).is_empty());
    // It leads past the one that sets them; in a table that sets none it leads past nothing.
    let past = |m: &mut Message<'_>| {
        by_mark(m);
        expr::accept(m);
    };
    with_handle(&mut r, NFT_MSG_NEWRULE, "sub", 5, &past);
    assert_eq!(told(&r), [by("sub")]);
    with_handle(&mut r, NFT_MSG_DELRULE, "pre", 1, &clear);
    assert!(told(&r).is_empty());
    with_handle(&mut r, NFT_MSG_NEWRULE, "pre", 6, &marked);
    assert_eq!(told(&r), [by("pre"), by("sub")]);
    r.say(NFT_MSG_DELTABLE, |m| _ = m.str(NFTA_TABLE_NAME, "t"));
    assert!(told(&r).is_empty());
}

#[test]
fn what_is_concerned_adds_up() {
    let mut c = Concerns::Nobody;
    c.add(only("10.0.0.1", "10.0.0.1"));
    c.add(Concerns::Nobody);
    c.add(only("fd00::1", "fd00::9"));
    assert!(c.address("fd00::5".parse().unwrap()) && c.address("10.0.0.1".parse().unwrap()));
    assert!(!c.address("10.0.0.2".parse().unwrap()) && !c.address("fd00::a".parse().unwrap()));
    c.add(Concerns::All);
    assert_eq!(c, Concerns::All);
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(
        msg in 0u16..30, b in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400),
    ) {
        let mut r = Ruleset::default();
        r.say(msg, |m| {
            m.raw(&b);
        });
        r.0.silent();
    }
}

#[test]
fn what_cannot_be_read_can_concern_everything() {
    let mut r = Ruleset::default();
    for msg in [NFT_MSG_NEWRULE, NFT_MSG_DELSETELEM, NFT_MSG_NEWCHAIN, NFT_MSG_DELTABLE] {
        assert_eq!(r.say(msg, |_| {}), Concerns::All, "{msg}");
    }
    // NFT_MSG_NEWTABLE, NFT_MSG_DELOBJ: what they say is followed nowhere.
    assert_eq!([0, 20].map(|msg| r.say(msg, |_| {})), [Concerns::Nobody, Concerns::Nobody]);
}

/// Marks that are set where packets have been routed; in prerouting, for what is counted, and by what nobody meets,
/// they are not.
#[test]
fn what_sets_marks_after_the_routing_decision_is_named_as_long_as_it_is_there() {
    const PREROUTING: u32 = 0;
    const POSTROUTING: u32 = 4;
    let mark = |m: &mut Message<'_>, with_source: bool| {
        expression(m, "meta", |m| {
            m.be32(NFTA_META_KEY, NFT_META_MARK);
            if with_source {
                m.be32(NFTA_META_SREG, 1);
            }
        });
    };
    let rule = |r: &mut Ruleset, msg, chain: &str, handle: u64, fill: &dyn Fn(&mut Message<'_>)| {
        r.say(msg, |m| {
            m.str(NFTA_RULE_TABLE, "t").str(NFTA_RULE_CHAIN, chain);
            m.be64(NFTA_RULE_HANDLE, handle).nested(NFTA_RULE_EXPRESSIONS, fill);
        });
    };
    let named = |r: &Ruleset| r.0.late_marks().map(|l| l.map(|l| l.to_string()));
    let both = |chain: &str| [(); 2].map(|()| Some(format!("chain {chain} of table t")));
    let mut r = Ruleset::default();
    r.base("pre", PREROUTING, "filter", 1);
    r.base("fwd", FORWARD, "filter", 1);
    r.base("post", POSTROUTING, "filter", 1);
    r.base("snat", POSTROUTING, "nat", 1);
    r.chain("qos");
    rule(&mut r, NFT_MSG_NEWRULE, "pre", 1, &|m| mark(m, true));
    rule(&mut r, NFT_MSG_NEWRULE, "fwd", 2, &|m| mark(m, false));
    rule(&mut r, NFT_MSG_NEWRULE, "qos", 3, &|m| mark(m, true));
    rule(&mut r, NFT_MSG_NEWRULE, "snat", 4, &|m| mark(m, true));
    assert_eq!(named(&r), [None, None]);
    rule(&mut r, NFT_MSG_NEWRULE, "post", 5, &|m| jump(m, "qos"));
    assert_eq!(named(&r), both("qos"));
    rule(&mut r, NFT_MSG_DELRULE, "qos", 3, &|m| mark(m, true));
    assert_eq!(named(&r), [None, None]);
    for target in ["MARK", "CONNMARK", "NFQUEUE"] {
        rule(&mut r, NFT_MSG_NEWRULE, "fwd", 6, &|m| {
            expression(m, "target", |m| {
                m.str(NFTA_XT_NAME, target);
            });
        });
        assert_eq!(named(&r), both("fwd"), "{target}");
        rule(&mut r, NFT_MSG_DELRULE, "fwd", 6, &|_| {});
    }
    rule(&mut r, NFT_MSG_NEWRULE, "fwd", 7, &|m| expression(m, "queue", |_| {}));
    assert_eq!(named(&r), both("fwd"));
}

/// A chain of family netdev, announced with these netdevs; `eth*` is told as a prefix.
fn with_netdevs(m: &mut Message<'_>, chain: &str, hook: u32, netdevs: &[&str]) {
    m.str(NFTA_CHAIN_TABLE, "t").str(NFTA_CHAIN_NAME, chain).str(NFTA_CHAIN_TYPE, "filter");
    m.be32(NFTA_CHAIN_POLICY, 1).nested(NFTA_CHAIN_HOOK, |m| {
        m.be32(NFTA_HOOK_HOOKNUM, hook);
        if let [one] = netdevs {
            m.str(NFTA_HOOK_DEV, one);
        }
        m.nested(NFTA_HOOK_DEVS, |m| {
            for name in netdevs {
                match name.strip_suffix('*') {
                    Some(prefix) => m.str(NFTA_DEVICE_PREFIX, prefix),
                    None => m.str(NFTA_DEVICE_NAME, name),
                };
            }
        });
    });
}

fn handled_rule(m: &mut Message<'_>, chain: &str, handle: u64) {
    m.str(NFTA_RULE_TABLE, "t").str(NFTA_RULE_CHAIN, chain);
    m.be64(NFTA_RULE_HANDLE, handle).nested(NFTA_RULE_EXPRESSIONS, |_| {});
}

#[test]
fn a_chain_at_egress_can_refuse_while_it_has_rules() {
    const INGRESS: u32 = 0;
    let mut r = Ruleset::default();
    let told = |r: &Ruleset| {
        let names = |c: EgressChain| (c.what, c.netdevs.into_iter().collect::<Vec<_>>().join(" "));
        r.0.egress_chains().into_iter().map(names).collect::<Vec<_>>()
    };
    let of = NFPROTO_NETDEV;
    r.say_of(of, NFT_MSG_NEWCHAIN, |m| with_netdevs(m, "in", INGRESS, &["wan"]));
    r.say_of(of, NFT_MSG_NEWCHAIN, |m| with_netdevs(m, "out", NF_NETDEV_EGRESS, &["wan", "eth*"]));
    r.say_of(of, NFT_MSG_NEWRULE, |m| handled_rule(m, "in", 1));
    assert_eq!(told(&r), []);
    assert_eq!(r.say_of(of, NFT_MSG_NEWRULE, |m| handled_rule(m, "out", 2)), Concerns::All);
    let out = |netdevs: &str| vec![("chain out of table netdev t".to_owned(), netdevs.to_owned())];
    assert_eq!(told(&r), out("eth* wan"));
    // Another comes to it, and one goes.
    r.say_of(of, NFT_MSG_NEWCHAIN, |m| with_netdevs(m, "out", NF_NETDEV_EGRESS, &["dmz"]));
    r.say_of(of, NFT_MSG_DELCHAIN, |m| with_netdevs(m, "out", NF_NETDEV_EGRESS, &["wan"]));
    assert_eq!(told(&r), out("dmz eth*"));
    r.say_of(of, NFT_MSG_DELRULE, |m| handled_rule(m, "out", 2));
    assert_eq!(told(&r), []);
    // Of another family hook 1 is another.
    r.base("other", NF_NETDEV_EGRESS, "filter", NF_DROP);
    assert_eq!(told(&r), []);
    r.say_of(of, NFT_MSG_NEWRULE, |m| handled_rule(m, "out", 3));
    r.say_of(of, NFT_MSG_DELCHAIN, |m| {
        m.str(NFTA_CHAIN_TABLE, "t").str(NFTA_CHAIN_NAME, "out");
    });
    assert_eq!(told(&r), []);
}

/// It is announced as a chain that is deleted, with that netdev.
#[test]
fn a_chain_that_gives_up_one_of_its_netdevs_goes_on() {
    let mut r = Ruleset::default();
    let of = NFPROTO_NETDEV;
    r.say_of(of, NFT_MSG_NEWCHAIN, |m| with_netdevs(m, "in", 0, &["lan", "tun0"]));
    r.say_of(of, NFT_MSG_DELCHAIN, |m| with_netdevs(m, "in", 0, &["tun0"]));
    assert_eq!(r.say_of(of, NFT_MSG_NEWRULE, |m| handled_rule(m, "in", 1)), Concerns::All);
    r.say_of(of, NFT_MSG_DELCHAIN, |m| with_netdevs(m, "in", 0, &["lan"]));
    assert_eq!(r.say_of(of, NFT_MSG_NEWRULE, |m| handled_rule(m, "in", 1)), Concerns::Nobody);
}
