//! What a change of nf_tables can concern: what is known of tables, chains, rules and sets, learnt from
//! the kernel's announcements (and, at the start and after a loss, from a dump of the same messages).
//!
//! A packet that is offloaded would have met the base chains of the hooks on its way (ingress,
//! prerouting, forward, postrouting, egress; a bridge's), what those jump to, by rules and by verdict
//! maps, and the sets that all of these look into. A change of anything else concerns nobody: what only
//! `input` and `output` reach, and chains of type `nat`, which established connections do not meet.
//!
//! What the model believes to be reachable is never too little: references of rules that went stay
//! until their chain goes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use super::expr::{
    NETWORK, NF_DROP, NFT_CMP_EQ, NFT_META_MARK, NFT_META_TIME_HOUR, NFT_META_TIME_NS,
    NFTA_BITWISE_DREG, NFTA_BITWISE_MASK, NFTA_BITWISE_SREG, NFTA_CMP_DATA, NFTA_CMP_OP,
    NFTA_CMP_SREG, NFTA_DYNSET_SET_NAME, NFTA_IMMEDIATE_DATA, NFTA_LOOKUP_SET, NFTA_LOOKUP_SREG,
    NFTA_META_KEY, NFTA_META_SREG, NFTA_OBJREF_IMM_NAME, NFTA_OBJREF_SET_NAME, NFTA_PAYLOAD_BASE,
    NFTA_PAYLOAD_DREG, NFTA_PAYLOAD_LEN, NFTA_PAYLOAD_OFFSET, NFTA_XT_NAME, asked_by_match, each,
    verdict_chain,
};
use super::zones::{UnclearZone, ZoneRule};
use crate::datapath::skipped::Skipped;
use netdev_providers::netlink::netfilter::nft::{
    NF_INET_FORWARD, NF_INET_POST_ROUTING, NFPROTO_BRIDGE, NFPROTO_INET, NFPROTO_IPV4,
    NFPROTO_IPV6, NFT_MSG_DELRULE, NFT_MSG_DELSETELEM, NFT_MSG_DELTABLE, NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWRULE, NFT_MSG_NEWSET, NFT_MSG_NEWSETELEM, NFTA_CHAIN_HOOK, NFTA_CHAIN_NAME,
    NFTA_CHAIN_POLICY, NFTA_CHAIN_TABLE, NFTA_CHAIN_TYPE, NFTA_DATA_VALUE, NFTA_HOOK_HOOKNUM,
    NFTA_LIST_ELEM, NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS, NFTA_RULE_TABLE, NFTA_SET_FLAGS,
    NFTA_SET_KEY_TYPE, NFTA_SET_NAME, NFTA_SET_TABLE, NFTA_TABLE_NAME,
};
use netdev_providers::netlink::netfilter::{NFGENMSG_LEN, SUBSYS_NFTABLES};
use netdev_providers::netlink::wire::{Attr, Nested, Received};

// enum nf_tables_msg_types
const NFT_MSG_DELCHAIN: u16 = 5;
const NFT_MSG_DELSET: u16 = 11;
const NFT_MSG_NEWOBJ: u16 = 18;
// linux/netfilter.h: families and hooks
pub(super) const NFPROTO_NETDEV: u8 = 5;
const NF_NETDEV_EGRESS: u32 = 1;
const NF_INET_LOCAL_IN: u32 = 1;
const NF_INET_LOCAL_OUT: u32 = 3;
// enum nft_hook_attributes, nft_devices_attributes: the netdevs of a chain at ingress or egress
const NFTA_HOOK_DEV: u16 = 3;
const NFTA_HOOK_DEVS: u16 = 4;
const NFTA_DEVICE_NAME: u16 = 1;
const NFTA_DEVICE_PREFIX: u16 = 2;
// enum nft_set_elem_attributes, flags of sets and elements
pub(super) const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
pub(super) const NFTA_SET_ELEM_LIST_SET: u16 = 2;
pub(super) const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
pub(super) const NFTA_SET_ELEM_KEY: u16 = 1;
pub(super) const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_SET_ELEM_FLAGS: u16 = 3;
const NFT_SET_INTERVAL: u32 = 4;
pub(super) const NFT_SET_TIMEOUT: u32 = 0x10;
const NFT_SET_EVAL: u32 = 0x20;
const NFT_SET_ELEM_INTERVAL_END: u32 = 1;
/// What `nft` calls `ipv4_addr` and `ipv6_addr` (its `enum datatypes`).
const TYPE_IPADDR: u32 = 7;
const TYPE_IP6ADDR: u32 = 8;

/// `enum nft_rule_attributes`: what tells a rule from the others of its table.
pub(super) const NFTA_RULE_HANDLE: u16 = 3;

type TableId = (u8, String);

/// What of the ruleset is known.
#[derive(Debug, Default)]
pub(crate) struct Model {
    tables: HashMap<TableId, Table>,
}

#[derive(Debug, Default)]
struct Table {
    chains: HashMap<String, Chain>,
    sets: HashMap<String, Set>,
}

#[derive(Debug, Default)]
struct Chain {
    /// A base chain that packets which could be offloaded meet.
    on_the_way: bool,
    /// A base chain that packets meet when they have been routed.
    after_routing: bool,
    /// A base chain that packets meet when they leave by a netdev.
    at_egress: bool,
    /// Of a base chain at ingress or egress: the netdevs; `eth*` where it says so.
    netdevs: BTreeSet<String>,
    /// Its rules, by their handles.
    rules: BTreeSet<u64>,
    /// Its policy is to drop.
    drops: bool,
    has_rules: bool,
    to: BTreeSet<String>,
    sets: BTreeSet<String>,
    objects: BTreeSet<String>,
    /// What in its rules answers otherwise without an announcement.
    silent: BTreeSet<&'static str>,
    /// Its rules that have to do with conntrack zones, by their handles.
    zones: BTreeMap<u64, ZoneRule>,
    /// Its rules that can set the packet's mark, by their handles.
    marks: BTreeSet<u64>,
}

#[derive(Debug, Default)]
struct Set {
    /// Its elements are addresses, or ranges of them, and every rule looks up those of the packet.
    addresses: bool,
    interval: bool,
    /// Of a verdict map.
    to: BTreeSet<String>,
    silent: Option<&'static str>,
}

/// A chain at egress that can refuse packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EgressChain {
    /// What it is, for people.
    pub(crate) what: String,
    /// The netdevs that it is about; `eth*`: all whose names begin so.
    pub(crate) netdevs: BTreeSet<String>,
}

/// What a transaction can concern.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Concerns {
    /// Nothing that is offloaded.
    #[default]
    Nobody,
    /// Packets with one of these addresses, first to last.
    Addresses(Vec<(IpAddr, IpAddr)>),
    /// Anybody.
    All,
}

impl Concerns {
    /// Both of them.
    pub(crate) fn add(&mut self, other: Self) {
        *self = match (std::mem::take(self), other) {
            (Self::All, _) | (_, Self::All) => Self::All,
            (Self::Nobody, one) | (one, Self::Nobody) => one,
            (Self::Addresses(mut some), Self::Addresses(more)) => {
                // The same again: as it was before the transaction, and as it is.
                if some != more {
                    some.extend(more);
                }
                // Whoever changes so much at once is not asked for each.
                if some.len() > 10_000 { Self::All } else { Self::Addresses(some) }
            }
        };
    }

    /// Whether a packet that has this address, before or after NAT, is concerned.
    pub(crate) fn address(&self, a: IpAddr) -> bool {
        match self {
            Self::Nobody => false,
            Self::All => true,
            Self::Addresses(some) => some.iter().any(|(first, last)| {
                first.is_ipv4() == a.is_ipv4() && (*first..=*last).contains(&a)
            }),
        }
    }
}

/// What a message is about.
#[derive(Debug)]
enum About {
    Table,
    Chain { name: String, drops: bool },
    Rule { chain: String, names: Option<Vec<(IpAddr, IpAddr)>> },
    Set { name: String, elements: Option<Vec<(IpAddr, IpAddr)>> },
    Object { name: String },
}

/// A transaction of which not all messages have come.
#[derive(Debug, Default)]
pub(crate) struct Transaction {
    about: Vec<(TableId, About)>,
    concerns: Concerns,
}

/// Whether messages of this type say something that is followed.
const fn is_followed(ty: u16) -> bool {
    matches!(
        ty,
        NFT_MSG_DELTABLE
            | NFT_MSG_NEWCHAIN
            | NFT_MSG_DELCHAIN
            | NFT_MSG_NEWRULE
            | NFT_MSG_DELRULE
            | NFT_MSG_NEWSET
            | NFT_MSG_DELSET
            | NFT_MSG_NEWSETELEM
            | NFT_MSG_DELSETELEM
            | NFT_MSG_NEWOBJ
    )
}

impl Model {
    /// An announcement, or a message of a dump. What it concerns is known when
    /// [`end`](Self::end) is called.
    pub(crate) fn message(&mut self, m: &Received<'_>, t: &mut Transaction) {
        if m.ty >> 8 != SUBSYS_NFTABLES {
            return;
        }
        let read = m.payload.first().and_then(|&family| Some((family, self.about(m, family)?)));
        let Some((family, (table, about))) = read else {
            // What cannot be read can be anything.
            if is_followed(m.ty & 0xff) {
                t.concerns.add(Concerns::All);
            }
            return;
        };
        let id = (family, table);
        // What it concerned as it was: a chain that goes, a reference that goes with it.
        t.concerns.add(self.concerns(&id, &about));
        self.learn(m, &id);
        t.about.push((id, about));
    }

    /// The transaction is complete.
    pub(crate) fn end(&self, t: Transaction) -> Concerns {
        let mut concerns = t.concerns;
        for (id, about) in &t.about {
            if concerns == Concerns::All {
                break;
            }
            concerns.add(self.concerns(id, about));
        }
        concerns
    }

    /// What in the reachable part answers otherwise with time, or because of packets, without an
    /// announcement; sorted.
    pub(crate) fn silent(&self) -> Vec<String> {
        let mut all = BTreeSet::new();
        for ((_, name), table) in &self.tables {
            for chain in table.reachable() {
                let Some(c) = table.chains.get(chain) else { continue };
                all.extend(c.silent.iter().map(|s| (*s).to_owned()));
                let sets = c.sets.iter().filter_map(|s| Some((s, table.sets.get(s)?.silent?)));
                all.extend(sets.map(|(set, why)| format!("{why} {set} of table {name}")));
            }
        }
        all.into_iter().collect()
    }

    /// What chooses conntrack zones by something that no rule of ours matches.
    pub(crate) fn unclear_zones(&self) -> Vec<UnclearZone> {
        let mut all = Vec::new();
        for ((_, name), table) in &self.tables {
            let bases = table.chains.iter().filter(|(_, c)| c.on_the_way);
            let with_zones: HashSet<&str> = bases
                .map(|(base, _)| table.reachable_from(vec![base]))
                .filter(|chains| {
                    let sets = |c: &&str| table.chains.get(*c).is_some_and(Chain::sets_zones);
                    chains.iter().any(sets)
                })
                .flatten()
                .collect();
            for chain in with_zones {
                let rules = table.chains.get(chain).into_iter().flat_map(|c| c.zones.values());
                all.extend(rules.filter_map(|r| r.unclear(name, chain)));
            }
        }
        all.sort_by(|a, b| a.what.cmp(&b.what));
        all.dedup();
        all
    }

    /// Chains that packets meet behind the one that sights, as they leave by a netdev.
    pub(crate) fn egress_chains(&self) -> Vec<EgressChain> {
        let mut all = Vec::new();
        for ((_, table), t) in &self.tables {
            let refuse = |c: &&Chain| c.at_egress && (c.drops || !c.rules.is_empty());
            all.extend(t.chains.iter().filter(|(_, c)| refuse(c)).map(|(name, c)| EgressChain {
                what: format!("chain {name} of table netdev {table}"),
                netdevs: c.netdevs.clone(),
            }));
        }
        all.sort_by(|a, b| a.what.cmp(&b.what));
        all
    }

    /// What can set a packet's mark after it was routed, in IPv4 and in IPv6.
    pub(crate) fn late_marks(&self) -> [Option<Arc<str>>; 2] {
        let mut late: [Option<Arc<str>>; 2] = [None, None];
        for ((family, name), table) in &self.tables {
            let bases = table.chains.iter().filter(|(_, c)| c.after_routing);
            let met = table.reachable_from(bases.map(|(base, _)| base.as_str()).collect());
            let sets = |c: &&str| table.chains.get(*c).is_some_and(|c| !c.marks.is_empty());
            let Some(chain) = met.into_iter().filter(sets).min() else { continue };
            let what: Arc<str> = format!("chain {chain} of table {name}").into();
            let [v4, v6] = &mut late;
            for late in match *family {
                NFPROTO_IPV4 => vec![v4],
                NFPROTO_IPV6 => vec![v6],
                NFPROTO_INET => vec![v4, v6],
                _ => Vec::new(),
            } {
                // Always the same one of several.
                if late.as_ref().is_none_or(|before| what < *before) {
                    *late = Some(Arc::clone(&what));
                }
            }
        }
        late
    }

    fn about(&self, m: &Received<'_>, family: u8) -> Option<(String, About)> {
        let attrs = m.attrs(NFGENMSG_LEN);
        let text = |ty| attrs.find_type(ty).and_then(|a| a.str()).map(str::to_owned);
        Some(match m.ty & 0xff {
            NFT_MSG_DELTABLE => (text(NFTA_TABLE_NAME)?, About::Table),
            NFT_MSG_NEWCHAIN | NFT_MSG_DELCHAIN => {
                let policy = attrs.find_type(NFTA_CHAIN_POLICY).and_then(|a| a.be32());
                let drops = m.ty & 0xff == NFT_MSG_NEWCHAIN && policy == Some(NF_DROP);
                (text(NFTA_CHAIN_TABLE)?, About::Chain { name: text(NFTA_CHAIN_NAME)?, drops })
            }
            NFT_MSG_NEWRULE | NFT_MSG_DELRULE => {
                let names = attrs.find_type(NFTA_RULE_EXPRESSIONS).and_then(|e| names(e.nested()));
                (text(NFTA_RULE_TABLE)?, About::Rule { chain: text(NFTA_RULE_CHAIN)?, names })
            }
            NFT_MSG_NEWSET | NFT_MSG_DELSET => {
                (text(NFTA_SET_TABLE)?, About::Set { name: text(NFTA_SET_NAME)?, elements: None })
            }
            NFT_MSG_NEWSETELEM | NFT_MSG_DELSETELEM => {
                let (table, name) =
                    (text(NFTA_SET_ELEM_LIST_TABLE)?, text(NFTA_SET_ELEM_LIST_SET)?);
                let set = self.tables.get(&(family, table.clone())).and_then(|t| t.sets.get(&name));
                let list = attrs.find_type(NFTA_SET_ELEM_LIST_ELEMENTS).map(|a| a.nested());
                let elements = set
                    .filter(|s| s.addresses)
                    .zip(list)
                    .and_then(|(set, list)| addresses(list, set.interval));
                (table, About::Set { name, elements })
            }
            // NFTA_OBJ_TABLE, NFTA_OBJ_NAME
            NFT_MSG_NEWOBJ => (text(1)?, About::Object { name: text(2)? }),
            _ => return None,
        })
    }

    fn concerns(&self, id: &TableId, about: &About) -> Concerns {
        let Some(table) = self.tables.get(id) else { return Concerns::Nobody };
        let reachable = table.reachable();
        let some = |names: &Option<Vec<_>>| {
            names.as_ref().map_or(Concerns::All, |n| Concerns::Addresses(n.clone()))
        };
        match about {
            About::Table => {
                let has_rules = |c: &&str| table.chains.get(*c).is_some_and(Chain::decides);
                if reachable.iter().any(has_rules) { Concerns::All } else { Concerns::Nobody }
            }
            // A chain that drops nothing by itself refuses nothing before it has rules.
            About::Chain { name, drops } if reachable.contains(name.as_str()) => {
                let decides = table.chains.get(name).is_some_and(Chain::decides);
                if *drops || decides { Concerns::All } else { Concerns::Nobody }
            }
            About::Rule { chain, names } if reachable.contains(chain.as_str()) => some(names),
            About::Set { name, elements } => {
                let uses = |c: &&str| table.chains.get(*c).is_some_and(|c| c.sets.contains(name));
                if reachable.iter().any(uses) { some(elements) } else { Concerns::Nobody }
            }
            About::Object { name } => {
                let uses =
                    |c: &&str| table.chains.get(*c).is_some_and(|c| c.objects.contains(name));
                if reachable.iter().any(uses) { Concerns::All } else { Concerns::Nobody }
            }
            About::Chain { .. } | About::Rule { .. } => Concerns::Nobody,
        }
    }

    fn learn(&mut self, m: &Received<'_>, id: &TableId) {
        let attrs = m.attrs(NFGENMSG_LEN);
        let text = |ty| attrs.find_type(ty).and_then(|a| a.str()).map(str::to_owned);
        if m.ty & 0xff == NFT_MSG_DELTABLE {
            self.tables.remove(id);
            return;
        }
        let table = self.tables.entry(id.clone()).or_default();
        match m.ty & 0xff {
            NFT_MSG_NEWCHAIN => {
                let Some(chain) = text(NFTA_CHAIN_NAME) else { return };
                let hook = attrs.find_type(NFTA_CHAIN_HOOK);
                let number = hook.and_then(|h| h.nested().find_type(NFTA_HOOK_HOOKNUM)?.be32());
                let is_nat = text(NFTA_CHAIN_TYPE).is_some_and(|t| t == "nat");
                let chain = table.chains.entry(chain).or_default();
                chain.at_egress |= (id.0, number) == (NFPROTO_NETDEV, Some(NF_NETDEV_EGRESS));
                chain.netdevs.extend(hook.as_ref().map(netdevs_of).unwrap_or_default());
                chain.on_the_way |= number.is_some_and(|n| is_on_the_way(id.0, n)) && !is_nat;
                chain.after_routing |= number.is_some_and(|n| is_after_routing(id.0, n)) && !is_nat;
                let policy = attrs.find_type(NFTA_CHAIN_POLICY).and_then(|a| a.be32());
                if let Some(policy) = policy {
                    chain.drops = policy == NF_DROP;
                }
            }
            NFT_MSG_DELCHAIN => {
                let Some(name) = text(NFTA_CHAIN_NAME) else { return };
                // So it is announced, too, that a chain gives up some of its netdevs: they stand in the message.
                let given_up = attrs.find_type(NFTA_CHAIN_HOOK).as_ref().map(netdevs_of);
                if let (Some(chain), Some(given_up)) = (table.chains.get_mut(&name), given_up) {
                    chain.netdevs.retain(|n| !given_up.contains(n));
                    if !chain.netdevs.is_empty() {
                        return;
                    }
                }
                table.chains.remove(&name);
            }
            NFT_MSG_NEWRULE => {
                let (Some(chain), Some(e)) =
                    (text(NFTA_RULE_CHAIN), attrs.find_type(NFTA_RULE_EXPRESSIONS))
                else {
                    return;
                };
                let rule = Rule::read(e.nested());
                for set in &rule.masked {
                    table.sets.entry(set.clone()).or_default().addresses = false;
                }
                let chain = table.chains.entry(chain).or_default();
                chain.has_rules = true;
                let handle = attrs.find_type(NFTA_RULE_HANDLE).and_then(|a| a.be64()).unwrap_or(0);
                if let Some(zone) = ZoneRule::read(e.nested()) {
                    chain.zones.insert(handle, zone);
                }
                if rule.marks {
                    chain.marks.insert(handle);
                }
                chain.rules.insert(handle);
                chain.to.extend(rule.to);
                chain.sets.extend(rule.sets);
                chain.objects.extend(rule.objects);
                chain.silent.extend(rule.silent);
            }
            NFT_MSG_DELRULE => {
                // One that is replaced is announced as deleted too.
                let handle = attrs.find_type(NFTA_RULE_HANDLE).and_then(|a| a.be64());
                if let (Some(chain), Some(handle)) = (text(NFTA_RULE_CHAIN), handle)
                    && let Some(chain) = table.chains.get_mut(&chain)
                {
                    chain.zones.remove(&handle);
                    chain.marks.remove(&handle);
                    chain.rules.remove(&handle);
                }
            }
            NFT_MSG_NEWSET => {
                let Some(name) = text(NFTA_SET_NAME) else { return };
                let number = |ty| attrs.find_type(ty).and_then(|a| a.be32()).unwrap_or(0);
                let flags = number(NFTA_SET_FLAGS);
                let addresses = matches!(number(NFTA_SET_KEY_TYPE), TYPE_IPADDR | TYPE_IP6ADDR);
                let silent = if flags & NFT_SET_TIMEOUT != 0 {
                    Some("elements with timeouts in set")
                } else {
                    (flags & NFT_SET_EVAL != 0).then_some("elements that packets add to set")
                };
                let interval = flags & NFT_SET_INTERVAL != 0;
                // Announced again where somebody adds a set that is there.
                let new = Set { addresses, interval, silent, to: BTreeSet::new() };
                table.sets.entry(name).or_insert(new);
            }
            NFT_MSG_DELSET => {
                if let Some(name) = text(NFTA_SET_NAME) {
                    table.sets.remove(&name);
                }
            }
            NFT_MSG_NEWSETELEM => {
                let (Some(name), Some(list)) =
                    (text(NFTA_SET_ELEM_LIST_SET), attrs.find_type(NFTA_SET_ELEM_LIST_ELEMENTS))
                else {
                    return;
                };
                let chains = list.nested().filter_map(|e| {
                    verdict_chain(e.nested().find_type(NFTA_SET_ELEM_DATA)?.nested())
                });
                let chains: Vec<_> = chains.collect();
                if !chains.is_empty() {
                    table.sets.entry(name).or_default().to.extend(chains);
                }
            }
            _ => {}
        }
    }
}

impl Chain {
    fn sets_zones(&self) -> bool {
        self.zones.values().any(|r| r.sets)
    }

    fn decides(&self) -> bool {
        self.has_rules || self.drops
    }
}

impl Table {
    /// The chains that packets which could be offloaded can meet.
    fn reachable(&self) -> HashSet<&str> {
        let bases = self.chains.iter().filter(|(_, c)| c.on_the_way);
        self.reachable_from(bases.map(|(name, _)| name.as_str()).collect())
    }

    /// These chains, and all that they lead to.
    fn reachable_from<'a>(&'a self, mut todo: Vec<&'a str>) -> HashSet<&'a str> {
        let mut reachable: HashSet<&str> = todo.iter().copied().collect();
        while let Some(chain) = todo.pop().and_then(|name| self.chains.get(name)) {
            let maps = chain.sets.iter().filter_map(|s| self.sets.get(s)).flat_map(|s| &s.to);
            for next in chain.to.iter().chain(maps) {
                if reachable.insert(next) {
                    todo.push(next);
                }
            }
        }
        reachable
    }
}

pub(super) fn is_on_the_way(family: u8, hook: u32) -> bool {
    match family {
        NFPROTO_INET | NFPROTO_IPV4 | NFPROTO_IPV6 => {
            !matches!(hook, NF_INET_LOCAL_IN | NF_INET_LOCAL_OUT)
        }
        // A packet that is routed on a bridge meets its input and output.
        NFPROTO_BRIDGE | NFPROTO_NETDEV => true,
        _ => false,
    }
}

/// Whether packets that are forwarded meet this hook of the stack when they have been routed.
fn is_after_routing(family: u8, hook: u32) -> bool {
    matches!(family, NFPROTO_INET | NFPROTO_IPV4 | NFPROTO_IPV6)
        && matches!(hook, NF_INET_FORWARD | NF_INET_POST_ROUTING)
}

/// Whether a target of iptables can set the packet's mark; who takes packets from a queue can, too.
fn target_marks(name: &str) -> bool {
    matches!(name, "MARK" | "CONNMARK" | "HMARK" | "SET" | "NFQUEUE")
}

/// The netdevs of a chain's hook.
fn netdevs_of(hook: &Attr<'_>) -> BTreeSet<String> {
    let hook = hook.nested();
    let text = |a: &Attr<'_>| a.str().map(str::to_owned);
    let one = hook.find_type(NFTA_HOOK_DEV);
    let list = hook.find_type(NFTA_HOOK_DEVS).map(|a| a.nested());
    let of_list = list.into_iter().flatten().filter_map(|a| match a.ty {
        NFTA_DEVICE_NAME => text(&a),
        NFTA_DEVICE_PREFIX => Some(text(&a)? + "*"),
        _ => None,
    });
    one.iter().filter_map(text).chain(of_list).collect()
}

/// What a rule refers to.
#[derive(Debug, Default)]
struct Rule {
    to: Vec<String>,
    sets: Vec<String>,
    /// Sets that something else than a whole address of the packet is looked up in.
    masked: Vec<String>,
    objects: Vec<String>,
    silent: Vec<&'static str>,
    /// It can set the packet's mark.
    marks: bool,
}

impl Rule {
    fn read(expressions: Nested<'_>) -> Self {
        let mut rule = Self::default();
        let mut loaded = Registers::default();
        for (name, data) in each(expressions) {
            let number = |ty| data.find_type(ty).and_then(|a| a.be32());
            let text = |ty| data.find_type(ty).and_then(|a| a.str()).map(str::to_owned);
            loaded.expression(name, &data);
            match name {
                "immediate" => {
                    let chain = data.find_type(NFTA_IMMEDIATE_DATA);
                    rule.to.extend(chain.and_then(|d| verdict_chain(d.nested())));
                }
                "lookup" => {
                    let set = text(NFTA_LOOKUP_SET);
                    let register = number(NFTA_LOOKUP_SREG).unwrap_or(0);
                    if !loaded.has_address(register) {
                        rule.masked.extend(set.clone());
                    }
                    rule.sets.extend(set);
                }
                "dynset" => rule.sets.extend(text(NFTA_DYNSET_SET_NAME)),
                "objref" => {
                    rule.objects.extend(text(NFTA_OBJREF_IMM_NAME));
                    rule.sets.extend(text(NFTA_OBJREF_SET_NAME));
                }
                "meta" if data.find_type(NFTA_META_SREG).is_some() => {
                    rule.marks |= number(NFTA_META_KEY) == Some(NFT_META_MARK);
                }
                "queue" => rule.marks = true,
                "target" => rule.marks |= text(NFTA_XT_NAME).is_some_and(|t| target_marks(&t)),
                "limit" | "quota" | "connlimit" => rule.silent.push("limits and quotas"),
                "meta"
                    if number(NFTA_META_KEY)
                        .is_some_and(|k| (NFT_META_TIME_NS..=NFT_META_TIME_HOUR).contains(&k)) =>
                {
                    rule.silent.push("rules on the time");
                }
                "match" => match text(NFTA_XT_NAME).and_then(|name| asked_by_match(&name)) {
                    Some(Skipped::Ipset) => rule.silent.push("ipset"),
                    Some(Skipped::Time) => rule.silent.push("rules on the time"),
                    // Chance decides about each packet anew, whenever it comes.
                    None | Some(Skipped::Random) => {}
                    Some(_) => rule.silent.push("limits and quotas"),
                },
                _ => {}
            }
        }
        rule
    }
}

/// Which registers hold an address of the packet.
#[derive(Default)]
struct Registers {
    /// Register to the mask of what is loaded there.
    addresses: BTreeMap<u32, Option<Vec<u8>>>,
}

impl Registers {
    fn expression(&mut self, name: &str, data: &Nested<'_>) {
        let number = |ty| data.find_type(ty).and_then(|a: Attr<'_>| a.be32());
        match name {
            "payload" => {
                let Some(to) = number(NFTA_PAYLOAD_DREG) else { return };
                let at = (
                    number(NFTA_PAYLOAD_BASE),
                    number(NFTA_PAYLOAD_OFFSET).unwrap_or(0),
                    number(NFTA_PAYLOAD_LEN).unwrap_or(0),
                );
                // Source and destination of an IPv4 and of an IPv6 header.
                let is_address =
                    matches!(at, (Some(NETWORK), 12 | 16, 4) | (Some(NETWORK), 8 | 24, 16));
                if is_address {
                    self.addresses.insert(to, None);
                } else {
                    self.addresses.remove(&to);
                }
            }
            "bitwise" => {
                let (Some(from), Some(to)) = (number(NFTA_BITWISE_SREG), number(NFTA_BITWISE_DREG))
                else {
                    return;
                };
                let mask = data
                    .find_type(NFTA_BITWISE_MASK)
                    .and_then(|m| m.nested().find_type(NFTA_DATA_VALUE))
                    .map(|v| v.payload.to_vec());
                match (self.addresses.get(&from), mask) {
                    (Some(None), Some(mask)) => self.addresses.insert(to, Some(mask)),
                    _ => self.addresses.remove(&to),
                };
            }
            _ => {}
        }
    }

    fn has_address(&self, register: u32) -> bool {
        self.addresses.get(&register) == Some(&None)
    }
}

/// The addresses that a packet must have for a rule to look at it, if it says so: what the first
/// comparison of an address says. All comparisons of a rule must hold.
fn names(expressions: Nested<'_>) -> Option<Vec<(IpAddr, IpAddr)>> {
    let mut loaded = Registers::default();
    for (name, data) in each(expressions) {
        let number = |ty| data.find_type(ty).and_then(|a: Attr<'_>| a.be32());
        loaded.expression(name, &data);
        if name != "cmp" || number(NFTA_CMP_OP) != Some(NFT_CMP_EQ) {
            continue;
        }
        let Some(mask) = loaded.addresses.get(&number(NFTA_CMP_SREG)?) else { continue };
        let value = data.find_type(NFTA_CMP_DATA)?.nested().find_type(NFTA_DATA_VALUE)?.payload;
        let last: Vec<u8> = match mask {
            None => value.to_vec(),
            Some(mask) => value.iter().zip(mask).map(|(v, m)| v | !m).collect(),
        };
        return Some(vec![(address(value)?, address(&last)?)]);
    }
    None
}

fn address(b: &[u8]) -> Option<IpAddr> {
    match b.len() {
        4 => Some(Ipv4Addr::from(*b.first_chunk::<4>()?).into()),
        16 => Some(Ipv6Addr::from(*b.first_chunk::<16>()?).into()),
        _ => None,
    }
}

/// The elements of a set of addresses; `None` when one of them is none. Of an interval the kernel shows
/// the first address, and, as an element of its own, the first one behind.
fn addresses(list: Nested<'_>, interval: bool) -> Option<Vec<(IpAddr, IpAddr)>> {
    let (mut starts, mut ends) = (Vec::new(), BTreeSet::new());
    for e in list.filter(|a| a.ty == NFTA_LIST_ELEM) {
        let key = e.nested().find_type(NFTA_SET_ELEM_KEY)?.nested().find_type(NFTA_DATA_VALUE)?;
        let at = address(key.payload)?;
        let flags = e.nested().find_type(NFTA_SET_ELEM_FLAGS).and_then(|a| a.be32()).unwrap_or(0);
        if flags & NFT_SET_ELEM_INTERVAL_END != 0 {
            ends.insert(at);
        } else {
            starts.push(at);
        }
    }
    let last = |start: IpAddr| {
        if !interval {
            return start;
        }
        match ends.range(start..).find(|e| **e > start) {
            Some(IpAddr::V4(end)) => Ipv4Addr::from_bits(end.to_bits().saturating_sub(1)).into(),
            Some(IpAddr::V6(end)) => Ipv6Addr::from_bits(end.to_bits().saturating_sub(1)).into(),
            None if start.is_ipv4() => Ipv4Addr::BROADCAST.into(),
            None => Ipv6Addr::from_bits(u128::MAX).into(),
        }
    };
    Some(starts.into_iter().map(|start| (start, last(start))).collect())
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
