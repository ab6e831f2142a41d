//! Which rules of nf_tables the packets of an established connection meet, in their order, and what these do to **each**
//! packet: count, limit, write, log it. Packets that rules of ours forward go without that.
//!
//! A rule is not met by them behind `ct state established accept`, or where it asks for another state, another protocol
//! or a flag that opens or closes a connection. In doubt it is met.

use std::collections::BTreeMap;

use netdev_providers::netlink::NetlinkError;
use netdev_providers::netlink::netfilter::NFGENMSG_LEN;
use netdev_providers::netlink::netfilter::nft::{
    NFPROTO_BRIDGE, NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6, NFT_MSG_NEWCHAIN, NFT_MSG_NEWRULE,
    NFT_MSG_NEWSET, NFT_MSG_NEWSETELEM, NFTA_CHAIN_HOOK, NFTA_CHAIN_NAME, NFTA_CHAIN_TABLE,
    NFTA_CHAIN_TYPE, NFTA_DATA_VALUE, NFTA_HOOK_HOOKNUM, NFTA_LIST_ELEM, NFTA_RULE_CHAIN,
    NFTA_RULE_EXPRESSIONS, NFTA_RULE_TABLE, NFTA_SET_FLAGS, NFTA_SET_NAME, NFTA_SET_TABLE,
};
use netdev_providers::netlink::wire::{Nested, Received};

use super::dump::{Part, Reader};
use super::expr::*;
use super::model::{
    NFPROTO_NETDEV, NFT_SET_TIMEOUT, NFTA_RULE_HANDLE, NFTA_SET_ELEM_DATA, NFTA_SET_ELEM_KEY,
    NFTA_SET_ELEM_LIST_ELEMENTS, NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_TABLE, is_on_the_way,
};
use crate::datapath::skipped::Skipped;

// enum NFT_OBJECT_*
const NFT_OBJECT_COUNTER: u32 = 1;
const NFT_OBJECT_QUOTA: u32 = 2;
const NFT_OBJECT_LIMIT: u32 = 4;
const NFT_OBJECT_CONNLIMIT: u32 = 5;
/// The flags of TCP that no offloaded packet has: FIN, SYN, RST.
const OPEN_OR_CLOSE: u8 = 1 | 2 | 4;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// `XT_CONNTRACK_STATE` of `struct xt_conntrack_mtinfo3` (and 2), and where its fields are.
const XT_CONNTRACK_STATE: u16 = 1;
const XT_CONNTRACK_FLAGS_AT: usize = 146;
/// `XT_TCP_INV_FLAGS` of `struct xt_tcp`.
const XT_TCP_INV_FLAGS: u8 = 4;

/// Something that is done to each packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Met {
    pub(crate) what: Skipped,
    /// Where it stands, as `nft -a list ruleset` has it.
    pub(crate) place: String,
}

/// A ruleset as a dump tells it: chains, sets, elements of verdict maps, rules.
#[derive(Debug, Default)]
pub(crate) struct Ruleset {
    tables: BTreeMap<(u8, String), Table>,
    incomplete: Option<NetlinkError>,
}

#[derive(Debug, Default)]
struct Table {
    chains: BTreeMap<String, Chain>,
    /// By name: key, verdict.
    maps: BTreeMap<String, Vec<(Vec<u8>, Verdict)>>,
    /// Flags of sets.
    sets: BTreeMap<String, u32>,
}

#[derive(Debug, Default)]
struct Chain {
    /// A base chain that forwarded packets come to.
    on_the_way: bool,
    rules: Vec<Rule>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Verdict {
    #[default]
    Continue,
    /// Nothing behind it is met: it is accepted, or gone.
    Ends,
    Return,
    Jump(String),
    Goto(String),
    /// What a map says of the connection's state.
    ByState(String),
    /// Where a map leads, by anything else.
    ByMap(String),
}

impl Verdict {
    fn of(data: Nested<'_>) -> Self {
        let chain = || verdict_chain(data.clone()).unwrap_or_default();
        match verdict_code(data.clone()) {
            Some(NFT_CONTINUE) | None => Self::Continue,
            Some(NFT_RETURN) => Self::Return,
            Some(NFT_JUMP) => Self::Jump(chain()),
            Some(NFT_GOTO) => Self::Goto(chain()),
            Some(_) => Self::Ends,
        }
    }
}

/// What a register holds of a packet.
#[derive(Clone, Copy, Debug)]
enum Loaded {
    /// The connection's state, so much of it.
    State(u32),
    /// TCP's flags, those of them.
    Flags(u8),
    Proto,
}

/// What established packets have of a rule.
#[derive(Debug, Default)]
struct Rule {
    handle: u64,
    /// What it does to each, and the set or object that it does it with.
    does: Vec<(Skipped, Option<String>)>,
    /// Sets whose elements decide.
    looks_into: Vec<String>,
    /// Only some packets come to its end.
    conditional: bool,
    verdict: Verdict,
}

/// Whether an expression lets established packets go on in its rule.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Passes {
    All,
    Some,
    None,
}

impl Reader for Ruleset {
    fn begin(&mut self, part: Part<'_>) {
        match part {
            Part::Chains => self.tables.clear(),
            Part::Sets => self.tables.values_mut().for_each(|t| t.sets.clear()),
            Part::Rules => {
                let chains = self.tables.values_mut().flat_map(|t| t.chains.values_mut());
                chains.for_each(|c| c.rules.clear());
            }
            Part::Elements(family, table, set) => {
                let table = self.tables.get_mut(&(family, table.to_owned()));
                table.and_then(|t| t.maps.remove(set));
            }
        }
    }

    fn failed(&mut self, error: NetlinkError) {
        self.incomplete.get_or_insert(error);
    }

    fn message(&mut self, m: &Received<'_>) {
        let attrs = m.attrs(NFGENMSG_LEN);
        let text = |ty| attrs.find_type(ty).and_then(|a| a.str()).map(str::to_owned);
        let Some(&family) = m.payload.first() else { return };
        let (table_ty, name_ty) = match m.ty & 0xff {
            NFT_MSG_NEWCHAIN => (NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME),
            NFT_MSG_NEWRULE => (NFTA_RULE_TABLE, NFTA_RULE_CHAIN),
            NFT_MSG_NEWSET => (NFTA_SET_TABLE, NFTA_SET_NAME),
            NFT_MSG_NEWSETELEM => (NFTA_SET_ELEM_LIST_TABLE, NFTA_SET_ELEM_LIST_SET),
            _ => return,
        };
        let (Some(table), Some(name)) = (text(table_ty), text(name_ty)) else { return };
        let table = self.tables.entry((family, table)).or_default();
        match m.ty & 0xff {
            NFT_MSG_NEWCHAIN => {
                let hook = attrs.find_type(NFTA_CHAIN_HOOK);
                let hook = hook.and_then(|h| h.nested().find_type(NFTA_HOOK_HOOKNUM)?.be32());
                let is_nat = text(NFTA_CHAIN_TYPE).is_some_and(|t| t == "nat");
                table.chains.entry(name).or_default().on_the_way =
                    hook.is_some_and(|h| is_on_the_way(family, h)) && !is_nat;
            }
            NFT_MSG_NEWRULE => {
                let Some(e) = attrs.find_type(NFTA_RULE_EXPRESSIONS) else { return };
                let handle = attrs.find_type(NFTA_RULE_HANDLE).and_then(|a| a.be64());
                let rule = Rule { handle: handle.unwrap_or(0), ..Rule::read(e.nested()) };
                table.chains.entry(name).or_default().rules.push(rule);
            }
            NFT_MSG_NEWSET => {
                let flags = attrs.find_type(NFTA_SET_FLAGS).and_then(|a| a.be32()).unwrap_or(0);
                table.sets.insert(name, flags);
            }
            _ => {
                let Some(list) = attrs.find_type(NFTA_SET_ELEM_LIST_ELEMENTS) else { return };
                let elements = list.nested().filter(|a| a.ty == NFTA_LIST_ELEM).filter_map(|e| {
                    let part = |ty| Some(e.nested().find_type(ty)?.nested());
                    let key = part(NFTA_SET_ELEM_KEY)?.find_type(NFTA_DATA_VALUE)?.payload.to_vec();
                    Some((key, Verdict::of(part(NFTA_SET_ELEM_DATA)?)))
                });
                table.maps.entry(name).or_default().extend(elements);
            }
        }
    }
}

impl Ruleset {
    /// Why it is not all, or not as it is.
    pub(crate) fn take_error(&mut self) -> Option<NetlinkError> {
        self.incomplete.take()
    }

    /// What is done to each packet of an established connection that is forwarded.
    pub(crate) fn met(&self) -> Vec<Met> {
        let mut all = Vec::new();
        for ((family, name), table) in &self.tables {
            let mut walk = Walk {
                table,
                met: &mut all,
                of: (family_name(*family), name),
                ends: BTreeMap::new(),
            };
            for (chain, _) in table.chains.iter().filter(|(_, c)| c.on_the_way) {
                walk.chain(chain);
            }
        }
        all
    }
}

/// The way of established packets through a table.
struct Walk<'a> {
    table: &'a Table,
    met: &'a mut Vec<Met>,
    of: (&'static str, &'a str),
    /// Chains that were walked: whether nothing behind what led there is met.
    ends: BTreeMap<&'a str, bool>,
}

impl<'a> Walk<'a> {
    /// True: no packet comes back.
    fn chain(&mut self, name: &str) -> bool {
        let Some((name, chain)) = self.table.chains.get_key_value(name) else { return false };
        if let Some(ends) = self.ends.get(name.as_str()) {
            return *ends;
        }
        // The kernel lets no chains lead in a circle.
        self.ends.insert(name, false);
        let ends = self.rules(name, &chain.rules);
        self.ends.insert(name, ends);
        ends
    }

    fn rules(&mut self, chain: &str, rules: &'a [Rule]) -> bool {
        for rule in rules {
            let (family, table) = self.of;
            let place = format!("table {family} {table} chain {chain} handle {}", rule.handle);
            let mut meets = |what, with: &Option<String>| {
                let with = with.as_ref().map(|w| format!(" ({w})")).unwrap_or_default();
                self.met.push(Met { what, place: format!("{place}{with}") });
            };
            for (what, with) in &rule.does {
                meets(*what, with);
            }
            for set in &rule.looks_into {
                let flags = self.table.sets.get(set).copied().unwrap_or(0);
                if flags & NFT_SET_TIMEOUT != 0 {
                    meets(Skipped::SetTimeout, &Some(set.clone()));
                }
            }
            let verdict = match &rule.verdict {
                Verdict::ByState(map) => {
                    let all = self.table.maps.get(map).map_or(&[][..], Vec::as_slice);
                    let of_it = |key: &[u8]| {
                        key.first_chunk().is_some_and(|k| u32::from_ne_bytes(*k) & ESTABLISHED != 0)
                    };
                    all.iter().find(|(key, _)| of_it(key)).map_or(&Verdict::Continue, |(_, v)| v)
                }
                verdict => verdict,
            };
            let (ends, returns) = match verdict {
                Verdict::Continue | Verdict::ByState(_) => (false, false),
                Verdict::Ends => (true, false),
                Verdict::Return => (false, true),
                Verdict::Jump(to) => (self.chain(to), false),
                Verdict::Goto(to) => (self.chain(to), true),
                Verdict::ByMap(map) => {
                    for (_, verdict) in self.table.maps.get(map).into_iter().flatten() {
                        if let Verdict::Jump(to) | Verdict::Goto(to) = verdict {
                            self.chain(to);
                        }
                    }
                    (false, false)
                }
            };
            if !rule.conditional && (ends || returns) {
                return ends;
            }
        }
        false
    }
}

impl Rule {
    fn read(expressions: Nested<'_>) -> Self {
        let mut rule = Self::default();
        let mut loaded = BTreeMap::new();
        for (name, data) in each(expressions) {
            match rule.expression(name, &data, &mut loaded) {
                Passes::All => {}
                Passes::Some => rule.conditional = true,
                Passes::None => {
                    rule.verdict = Verdict::Continue;
                    break;
                }
            }
        }
        rule
    }

    fn does(&mut self, what: Skipped) -> Passes {
        self.does.push((what, None));
        Passes::All
    }

    fn asks(&mut self, what: Skipped) -> Passes {
        self.does.push((what, None));
        Passes::Some
    }

    fn expression(
        &mut self,
        name: &str,
        data: &Nested<'_>,
        loaded: &mut BTreeMap<u32, Loaded>,
    ) -> Passes {
        let get = |ty| number(data, ty);
        let text = |ty| data.find_type(ty).and_then(|a| a.str()).map(str::to_owned);
        match name {
            "immediate" => {
                if let Some(d) = data.find_type(NFTA_IMMEDIATE_DATA) {
                    self.verdict = Verdict::of(d.nested());
                }
                Passes::All
            }
            "reject" => {
                self.verdict = Verdict::Ends;
                Passes::All
            }
            "meta" if get(NFTA_META_SREG).is_some() => match get(NFTA_META_KEY) {
                Some(NFT_META_MARK) => self.does(Skipped::Mark),
                Some(NFT_META_PRIORITY) => self.does(Skipped::Priority),
                _ => Passes::All,
            },
            "meta" => {
                let key = get(NFTA_META_KEY);
                note(loaded, data, (key == Some(NFT_META_L4PROTO)).then_some(Loaded::Proto));
                match key {
                    Some(NFT_META_TIME_NS..=NFT_META_TIME_HOUR) => self.does(Skipped::Time),
                    _ => Passes::All,
                }
            }
            "ct" if get(NFTA_CT_SREG).is_some() => Passes::All,
            "ct" => {
                let key = get(NFTA_CT_KEY);
                let state = (key == Some(NFT_CT_STATE)).then_some(Loaded::State(u32::MAX));
                note(loaded, data, state);
                match key {
                    Some(NFT_CT_PKTS..=NFT_CT_AVGPKT) => self.does(Skipped::CtBytes),
                    _ => Passes::All,
                }
            }
            "payload" if get(NFTA_PAYLOAD_SREG).is_some() => self.does(Skipped::Header),
            "payload" => {
                let at = (get(NFTA_PAYLOAD_BASE), get(NFTA_PAYLOAD_OFFSET), get(NFTA_PAYLOAD_LEN));
                let what = match at {
                    (Some(NETWORK), Some(9 | 6), Some(1)) => Some(Loaded::Proto),
                    (Some(TRANSPORT), Some(13), Some(1)) => Some(Loaded::Flags(u8::MAX)),
                    _ => None,
                };
                note(loaded, data, what);
                Passes::All
            }
            "exthdr" if get(NFTA_EXTHDR_SREG).is_some() => self.does(Skipped::Header),
            "bitwise" => {
                mask(loaded, data);
                Passes::All
            }
            "cmp" => compare(loaded, data),
            "lookup" => {
                let map = text(NFTA_LOOKUP_SET).unwrap_or_default();
                self.looks_into.push(map.clone());
                if get(NFTA_LOOKUP_DREG) != Some(NFT_REG_VERDICT) {
                    return Passes::Some;
                }
                let by = get(NFTA_LOOKUP_SREG).and_then(|r| loaded.get(&r));
                self.verdict = match by {
                    Some(Loaded::State(u32::MAX)) => Verdict::ByState(map),
                    _ => Verdict::ByMap(map),
                };
                Passes::All
            }
            "limit" => self.asks(Skipped::Limit),
            "quota" => self.asks(Skipped::Quota),
            "connlimit" => self.asks(Skipped::CtCount),
            "dynset" => {
                self.does.push((Skipped::SetUpdate, text(NFTA_DYNSET_SET_NAME)));
                Passes::Some
            }
            "objref" => {
                let what = match get(NFTA_OBJREF_IMM_TYPE) {
                    Some(NFT_OBJECT_COUNTER) => Skipped::Counter,
                    Some(NFT_OBJECT_QUOTA) => Skipped::Quota,
                    Some(NFT_OBJECT_LIMIT) => Skipped::Limit,
                    Some(NFT_OBJECT_CONNLIMIT) => Skipped::CtCount,
                    _ => return Passes::Some,
                };
                self.does.push((what, text(NFTA_OBJREF_IMM_NAME)));
                if what == Skipped::Counter { Passes::All } else { Passes::Some }
            }
            "numgen" => self.does(Skipped::Random),
            "counter" => self.does(Skipped::Counter),
            "log" => self.does(Skipped::Log),
            "dup" => self.does(Skipped::Copy),
            "queue" => self.asks(Skipped::Queue),
            "target" => self.target(&text(NFTA_XT_NAME).unwrap_or_default()),
            "match" => self.match_of_iptables(&text(NFTA_XT_NAME).unwrap_or_default(), data),
            // What is loaded or changed in registers, and what decides nothing.
            "byteorder" | "fib" | "hash" | "rt" | "socket" | "notrack" | "last"
            | "flow_offload" => Passes::All,
            _ => Passes::Some,
        }
    }

    /// `-j`.
    fn target(&mut self, name: &str) -> Passes {
        match name {
            "MARK" | "CONNMARK" | "HMARK" => self.does(Skipped::Mark),
            "CLASSIFY" => self.does(Skipped::Priority),
            "DSCP" | "TOS" | "TTL" | "HL" | "ECN" | "TCPOPTSTRIP" | "SNPT" | "DNPT" => {
                self.does(Skipped::Header)
            }
            "LOG" | "NFLOG" | "ULOG" | "AUDIT" => self.does(Skipped::Log),
            "TEE" => self.does(Skipped::Copy),
            "SET" => self.does(Skipped::SetUpdate),
            "IDLETIMER" | "RATEEST" | "LED" => self.does(Skipped::Counter),
            "NFQUEUE" => self.asks(Skipped::Queue),
            "REJECT" => {
                self.verdict = Verdict::Ends;
                Passes::All
            }
            _ => Passes::All,
        }
    }

    /// `-m`.
    fn match_of_iptables(&mut self, name: &str, data: &Nested<'_>) -> Passes {
        let info = data.find_type(NFTA_XT_INFO).map_or(&[][..], |a| a.payload);
        let half = |at: usize| Some(u16::from_ne_bytes(*info.get(at..)?.first_chunk()?));
        if let Some(what) = asked_by_match(name) {
            return self.asks(what);
        }
        match name {
            "comment" => Passes::All,
            "state" => {
                let mask = info.first_chunk().map(|m| u32::from_ne_bytes(*m));
                states(mask.is_none_or(|m| m & ESTABLISHED != 0), mask.is_some())
            }
            "conntrack" if number(data, NFTA_XT_REV).is_some_and(|r| r >= 2) => {
                let at = XT_CONNTRACK_FLAGS_AT;
                let (Some(looks), Some(inverted), Some(mask)) =
                    (half(at), half(at + 2), half(at + 4))
                else {
                    return Passes::Some;
                };
                if looks & XT_CONNTRACK_STATE == 0 {
                    return Passes::Some;
                }
                let is_in = u32::from(mask) & ESTABLISHED != 0;
                states(is_in != (inverted & XT_CONNTRACK_STATE != 0), looks == XT_CONNTRACK_STATE)
            }
            "tcp" => {
                let byte = |at: usize| info.get(at).copied().unwrap_or(0);
                let (mask, flags, inverted) = (byte(9), byte(10), byte(11));
                let opens = mask & flags & OPEN_OR_CLOSE != 0 && inverted & XT_TCP_INV_FLAGS == 0;
                if opens { Passes::None } else { Passes::Some }
            }
            _ => Passes::Some,
        }
    }
}

/// What a comparison with states lets pass.
const fn states(established: bool, nothing_else: bool) -> Passes {
    match (established, nothing_else) {
        (false, _) => Passes::None,
        (true, true) => Passes::All,
        (true, false) => Passes::Some,
    }
}

/// A register is loaded. (Its attribute is the first of `meta`, `ct` and `payload` alike.)
fn note(loaded: &mut BTreeMap<u32, Loaded>, data: &Nested<'_>, what: Option<Loaded>) {
    let Some(register) = number(data, NFTA_PAYLOAD_DREG) else { return };
    match what {
        Some(what) => loaded.insert(register, what),
        None => loaded.remove(&register),
    };
}

fn mask(loaded: &mut BTreeMap<u32, Loaded>, data: &Nested<'_>) {
    let get = |ty| number(data, ty);
    let (Some(from), Some(to)) = (get(NFTA_BITWISE_SREG), get(NFTA_BITWISE_DREG)) else { return };
    let mask = data
        .find_type(NFTA_BITWISE_MASK)
        .and_then(|m| m.nested().find_type(NFTA_DATA_VALUE))
        .map_or(&[][..], |v| v.payload);
    let masked = match (loaded.get(&from), mask) {
        (Some(Loaded::State(all)), m) => {
            m.first_chunk().map(|m| Loaded::State(all & u32::from_ne_bytes(*m)))
        }
        (Some(Loaded::Flags(all)), [m, ..]) => Some(Loaded::Flags(all & m)),
        _ => None,
    };
    match masked {
        Some(masked) => loaded.insert(to, masked),
        None => loaded.remove(&to),
    };
}

/// Whether a comparison lets established packets pass that are neither first nor last ones.
fn compare(loaded: &BTreeMap<u32, Loaded>, data: &Nested<'_>) -> Passes {
    let value = data
        .find_type(NFTA_CMP_DATA)
        .and_then(|d| d.nested().find_type(NFTA_DATA_VALUE))
        .map_or(&[][..], |v| v.payload);
    let register = number(data, NFTA_CMP_SREG).and_then(|r| loaded.get(&r).copied());
    match (register, number(data, NFTA_CMP_OP), value) {
        (Some(Loaded::State(mask)), Some(op @ (NFT_CMP_EQ | NFT_CMP_NEQ)), value) => {
            let Some(value) = value.first_chunk().map(|v| u32::from_ne_bytes(*v)) else {
                return Passes::Some;
            };
            states((mask & ESTABLISHED == value) == (op == NFT_CMP_EQ), true)
        }
        (Some(Loaded::Proto), Some(NFT_CMP_EQ), [proto]) if ![TCP, UDP].contains(proto) => {
            Passes::None
        }
        // A flag of those is asked for, and no packet has one.
        (Some(Loaded::Flags(_)), Some(NFT_CMP_EQ), [flags]) if flags & OPEN_OR_CLOSE != 0 => {
            Passes::None
        }
        (Some(Loaded::Flags(mask)), Some(NFT_CMP_NEQ), [0]) if mask & !OPEN_OR_CLOSE == 0 => {
            Passes::None
        }
        _ => Passes::Some,
    }
}

/// As `nft` has it.
pub(crate) fn family_name(family: u8) -> &'static str {
    match family {
        NFPROTO_INET => "inet",
        NFPROTO_IPV4 => "ip",
        NFPROTO_IPV6 => "ip6",
        NFPROTO_BRIDGE => "bridge",
        NFPROTO_NETDEV => "netdev",
        _ => "",
    }
}
