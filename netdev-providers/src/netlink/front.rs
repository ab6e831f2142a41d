//! Who stands in front: filters and programs of others that packets pass on arrival before rules of ours are
//! asked. In this order: XDP, tcx, the filters of the ingress qdisc by their prios.
//!
//! In software that is as it should be: what one of these takes, drops or sends elsewhere does not reach our
//! rules. Rules **in a NIC** are in front of all of them but those that the NIC has too.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::error::NetlinkError;
use super::link::{IFINFOMSG_LEN, RTM_GETLINK, RTM_NEWLINK};
use super::socket::{ACK, DUMP, Family, REQUEST, Socket};
use super::wire::{AttrIter, Message, Received};
use crate::bpf::{program_name, tcx_ingress};
use crate::contract::types::Ifindex;

// linux/rtnetlink.h
const RTM_NEWTFILTER: u16 = 44;
const RTM_GETTFILTER: u16 = 46;
pub(super) const TCA_KIND: u16 = 1;
pub(super) const TCA_OPTIONS: u16 = 2;
const TCA_CHAIN: u16 = 11;
pub(super) const TCMSG_LEN: usize = 20;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)`.
pub(crate) const PARENT_INGRESS: u32 = 0xffff_fff2;
// linux/pkt_cls.h
const TCA_CLS_FLAGS_IN_HW: u32 = 1 << 2;
const TCA_ACT_KIND: u16 = 1;
const TCA_U32_SEL: u16 = 5;
const TCA_BPF_NAME: u16 = 7;
// linux/if_link.h
const IFLA_XDP: u16 = 43;
const IFLA_XDP_ATTACHED: u16 = 2;
const IFLA_XDP_PROG_ID: u16 = 4;
/// By mode: of the driver, of the stack, of the NIC.
const XDP_MODES: [(u8, u16, &str); 3] = [(1, 5, "native"), (2, 6, "generic"), (3, 7, "in the NIC")];
const XDP_IN_NIC: u8 = 3;

/// Prios that are told one by one.
const PRIOS: usize = 16;
/// More than any prio is.
pub(crate) const ALL: u32 = 1 << 16;
/// Filters that are read at most.
const FILTERS: u32 = 4096;

/// Something that packets pass first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InFront {
    /// In words: `matchall at prio 10 (all): mirred`.
    pub what: String,
    /// The NIC has it too, where it has rules of ours.
    pub in_nic: bool,
}

/// What packets of the netdev pass on arrival before they come to a filter of this prio.
///
/// # Errors
/// A failure of the exchange, ENODEV when the netdev is gone.
pub fn in_front(ifindex: Ifindex, prio: u16) -> Result<Vec<InFront>, NetlinkError> {
    let mut found = xdp(ifindex)?;
    found.extend(
        tcx_ingress(ifindex)
            .into_iter()
            .map(|id| InFront { what: format!("tcx program {}", named(id)), in_nic: false }),
    );
    found.extend(filters(ifindex, PARENT_INGRESS, prio.into())?);
    Ok(found)
}

/// A program in words: its name and id.
pub(crate) fn named(id: u32) -> String {
    program_name(id).map_or_else(|| format!("id {id}"), |name| format!("{name} (id {id})"))
}

fn xdp(ifindex: Ifindex) -> Result<Vec<InFront>, NetlinkError> {
    let told = xdp_of(ifindex)?.into_iter().map(|(mode, id)| {
        let name = XDP_MODES.iter().find(|(m, ..)| *m == mode).map_or("", |(.., name)| name);
        InFront { what: format!("XDP program {}, {name}", named(id)), in_nic: mode == XDP_IN_NIC }
    });
    Ok(told.collect())
}

/// The XDP programs of a netdev: the mode and the id of each.
pub(crate) fn xdp_of(ifindex: Ifindex) -> Result<Vec<(u8, u32)>, NetlinkError> {
    let mut socket = Socket::open(Family::Route)?;
    let seq = socket.next_seq();
    let mut buf = Vec::with_capacity(32);
    let mut m = Message::new(&mut buf, RTM_GETLINK, REQUEST | ACK, seq);
    let mut ifinfomsg = [0; IFINFOMSG_LEN];
    ifinfomsg[4..8].copy_from_slice(&ifindex.get().to_ne_bytes());
    m.raw(&ifinfomsg);
    m.finish();
    let mut programs = Vec::new();
    socket.request(&buf, seq, |m| {
        if m.ty == RTM_NEWLINK
            && let Some(xdp) = m.attrs(IFINFOMSG_LEN).find_type(IFLA_XDP)
        {
            programs = xdp_programs(&xdp.nested());
        }
    })?;
    Ok(programs)
}

/// The mode and the id of each program.
fn xdp_programs(xdp: &AttrIter<'_>) -> Vec<(u8, u32)> {
    let id = |ty| xdp.find_type(ty).and_then(|a| a.u32()).filter(|&id| id != 0);
    let programs: Vec<_> =
        XDP_MODES.iter().filter_map(|&(mode, ty, _)| Some((mode, id(ty)?))).collect();
    if !programs.is_empty() {
        return programs;
    }
    let attached = xdp.find_type(IFLA_XDP_ATTACHED).and_then(|a| a.u8()).unwrap_or(0);
    id(IFLA_XDP_PROG_ID).map(|id| (attached, id)).into_iter().collect()
}

/// The filters of one prio.
#[derive(Debug, Default)]
struct Prio {
    kind: String,
    /// Besides the first.
    filters: u32,
    actions: Vec<String>,
    in_nic: bool,
}

/// Filters by prio and ethertype, as a dump brings them.
#[derive(Debug, Default)]
struct Filters {
    prios: BTreeMap<(u16, u16), Prio>,
    read: u32,
}

impl Filters {
    /// False: those that follow need not be read.
    fn take(&mut self, m: &Received<'_>, below: u32) -> bool {
        let (RTM_NEWTFILTER, Some(b)) = (m.ty, m.fixed::<TCMSG_LEN>()) else { return true };
        self.read += 1;
        let word = |at: usize| u32::from_ne_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let (handle, info) = (word(8), word(16));
        let Ok(prio) = u16::try_from(info >> 16) else { return true };
        let attrs = m.attrs(TCMSG_LEN);
        let chain = attrs.find_type(TCA_CHAIN).and_then(|a| a.u32()).unwrap_or(0);
        if chain != 0 {
            return self.read < FILTERS;
        }
        // In the order of their prios.
        if u32::from(prio) >= below || self.read >= FILTERS {
            return false;
        }
        let Some(kind) = attrs.find_type(TCA_KIND).and_then(|a| a.str()) else { return true };
        let options = attrs.find_type(TCA_OPTIONS);
        // Neither the entry that stands for a prio as a whole, nor a hash table of u32.
        let is_filter = match (kind, &options) {
            ("u32", Some(o)) => o.nested().find_type(TCA_U32_SEL).is_some(),
            _ => handle != 0 && options.is_some(),
        };
        let (Some(options), true) = (options, is_filter) else { return true };
        let options = options.nested();
        let ethertype = u16::from_be(u16::try_from(info & 0xffff).unwrap_or_default());
        let in_nic = is_in_nic(kind, &options);
        let known = self.prios.len();
        let entry = self.prios.entry((prio, ethertype)).or_insert_with(|| {
            let name = (kind == "bpf").then(|| options.find_type(TCA_BPF_NAME)?.str()).flatten();
            Prio {
                kind: name.map_or_else(|| kind.to_owned(), |name| format!("{kind} {name}")),
                in_nic: true,
                ..Prio::default()
            }
        });
        entry.filters += 1;
        entry.in_nic &= in_nic;
        for action in actions(kind, &options) {
            if !entry.actions.iter().any(|a| a == action) {
                entry.actions.push(action.to_owned());
            }
        }
        known <= PRIOS
    }

    fn told(self) -> Vec<InFront> {
        let mut told: Vec<InFront> = self
            .prios
            .into_iter()
            .map(|((prio, ethertype), p)| {
                let mut what = format!("{} at prio {prio} ({})", p.kind, protocol(ethertype));
                if p.filters > 1 {
                    let _ = write!(what, ", {} filters", p.filters);
                }
                if !p.actions.is_empty() {
                    let _ = write!(what, ": {}", p.actions.join(", "));
                }
                InFront { what, in_nic: p.in_nic }
            })
            .collect();
        if told.len() > PRIOS {
            told.truncate(PRIOS);
            told.push(InFront { what: "filters at more prios".into(), in_nic: false });
        }
        told
    }
}

/// Its filters with this parent (`PARENT_INGRESS`, or the handle of another qdisc), and with smaller prios than this.
pub(crate) fn filters(
    ifindex: Ifindex,
    parent: u32,
    below: u32,
) -> Result<Vec<InFront>, NetlinkError> {
    let mut tries = 4;
    loop {
        let mut socket = Socket::open(Family::Route)?;
        let seq = socket.next_seq();
        let mut buf = Vec::with_capacity(64);
        let mut m = Message::new(&mut buf, RTM_GETTFILTER, REQUEST | DUMP, seq);
        let mut tcmsg = [0; TCMSG_LEN];
        tcmsg[4..8].copy_from_slice(&ifindex.get().to_ne_bytes());
        tcmsg[12..16].copy_from_slice(&parent.to_ne_bytes());
        m.raw(&tcmsg).u32(TCA_CHAIN, 0);
        m.finish();
        let mut filters = Filters::default();
        tries -= 1;
        match socket.dump_while(&buf, seq, |m| filters.take(&m, below)) {
            Err(NetlinkError::Interrupted) if tries > 0 => {}
            // What it has found stands.
            Ok(()) | Err(NetlinkError::Interrupted) => return Ok(filters.told()),
            Err(e) => return Err(e),
        }
    }
}

/// Where a classifier has its list of actions and the flags that the kernel reports, by its kind.
const ATTRIBUTES: [(&str, u16, Option<u16>); 6] = [
    ("flower", 3, Some(22)),
    ("u32", 7, Some(11)),
    ("matchall", 2, Some(3)),
    ("bpf", 1, Some(9)),
    ("basic", 3, None),
    ("fw", 4, None),
];

fn is_in_nic(kind: &str, options: &AttrIter<'_>) -> bool {
    let flags = ATTRIBUTES.iter().find(|(k, ..)| *k == kind).and_then(|(_, _, flags)| *flags);
    let flags = flags.and_then(|ty| options.find_type(ty)).and_then(|a| a.u32()).unwrap_or(0);
    flags & TCA_CLS_FLAGS_IN_HW != 0
}

fn actions<'a>(kind: &str, options: &AttrIter<'a>) -> Vec<&'a str> {
    let list = ATTRIBUTES.iter().find(|(k, ..)| *k == kind).map(|(_, list, _)| *list);
    let list = list.and_then(|ty| options.find_type(ty));
    list.map(|l| l.nested().filter_map(|a| a.nested().find_type(TCA_ACT_KIND)?.str()).collect())
        .unwrap_or_default()
}

fn protocol(ethertype: u16) -> String {
    match ethertype {
        0x0003 => "all".into(),
        0x0800 => "ip".into(),
        0x0806 => "arp".into(),
        0x86dd => "ipv6".into(),
        0x8100 => "802.1q".into(),
        other => format!("{other:#06x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::wire::MessageIter;

    type Options<'a> = &'a dyn Fn(&mut Message<'_>);

    fn filter(
        prio: u16,
        chain: u32,
        kind: &str,
        handle: u32,
        options: Option<Options<'_>>,
    ) -> Vec<u8> {
        let mut tcmsg = [0; TCMSG_LEN];
        let info = u32::from(prio) << 16 | u32::from(0x0800_u16.to_be());
        tcmsg[8..12].copy_from_slice(&handle.to_ne_bytes());
        tcmsg[16..20].copy_from_slice(&info.to_ne_bytes());
        let mut buf = Vec::new();
        let mut m = Message::new(&mut buf, RTM_NEWTFILTER, 0, 1);
        m.raw(&tcmsg).str(TCA_KIND, kind).u32(TCA_CHAIN, chain);
        if let Some(options) = options {
            m.nested(TCA_OPTIONS, options);
        }
        m.finish();
        buf
    }

    /// What is told of these, and how many of them are read.
    fn told(filters: &[Vec<u8>]) -> (Vec<(String, bool)>, usize) {
        let mut taken = Filters::default();
        let mut read = 0;
        for bytes in filters {
            read += 1;
            if !taken.take(&MessageIter::new(bytes).next().unwrap(), 0xc100) {
                break;
            }
        }
        (taken.told().into_iter().map(|f| (f.what, f.in_nic)).collect(), read)
    }

    fn act(list: u16, kinds: &[&str]) -> impl Fn(&mut Message<'_>) {
        move |m: &mut Message<'_>| {
            m.nested(list, |m| {
                for (n, kind) in (1..).zip(kinds) {
                    m.nested(n, |m| _ = m.str(TCA_ACT_KIND, kind));
                }
            });
        }
    }

    #[test]
    fn filters_are_told_by_prio_with_their_actions() {
        let u32_rule = |m: &mut Message<'_>| {
            m.attr(TCA_U32_SEL, &[0; 16]);
            act(7, &["skbedit", "mirred"])(m);
        };
        let program = |m: &mut Message<'_>| _ = m.str(TCA_BPF_NAME, "shaper.o");
        let none = |_: &mut Message<'_>| {};
        let (told, read) = told(&[
            filter(1, 0, "flower", 0, None),
            filter(1, 0, "flower", 1, Some(&act(3, &["gact"]))),
            filter(1, 0, "flower", 2, Some(&act(3, &["gact", "police"]))),
            // Its hash table.
            filter(5, 0, "u32", 0x8000_0000, Some(&none)),
            filter(5, 0, "u32", 0x8000_0800, Some(&u32_rule)),
            filter(6, 3, "matchall", 1, Some(&none)),
            filter(9, 0, "bpf", 1, Some(&program)),
            filter(0xc100, 0, "flower", 1, Some(&none)),
            filter(0xc200, 0, "flower", 1, Some(&none)),
        ]);
        let told: Vec<&str> = told.iter().map(|(what, _)| what.as_str()).collect();
        assert_eq!(
            told,
            [
                "flower at prio 1 (ip), 2 filters: gact, police",
                "u32 at prio 5 (ip): skbedit, mirred",
                "bpf shaper.o at prio 9 (ip)",
            ]
        );
        assert_eq!(read, 8, "what follows ours is behind them");
    }

    #[test]
    fn the_nic_has_a_prio_when_it_has_all_of_its_filters() {
        let flags = |ty: u16, flags: u32| move |m: &mut Message<'_>| _ = m.u32(ty, flags);
        let in_nic = |kind: &str, options: &[Options<'_>]| {
            let filters: Vec<_> =
                (1..).zip(options).map(|(n, o)| filter(1, 0, kind, n, Some(*o))).collect();
            told(&filters).0[0].1
        };
        assert!(in_nic("flower", &[&flags(22, 4), &flags(22, 6)]));
        assert!(!in_nic("flower", &[&flags(22, 4), &flags(22, 8)]));
        assert!(in_nic("matchall", &[&flags(3, 4)]) && !in_nic("matchall", &[&flags(3, 8)]));
        assert!(in_nic("bpf", &[&flags(9, 4)]) && !in_nic("bpf", &[&flags(8, 4)]));
        assert!(!in_nic("basic", &[&flags(3, 4)]), "it knows no NIC");
    }

    #[test]
    fn no_more_is_read_and_told_than_somebody_reads() {
        let none = |_: &mut Message<'_>| {};
        let many: Vec<_> = (1..100).map(|n| filter(n, 0, "matchall", 1, Some(&none))).collect();
        let (some, read) = told(&many);
        assert_eq!((some.len(), read), (PRIOS + 1, PRIOS + 1 + 1));
        assert_eq!(some[PRIOS].0, "filters at more prios");
        assert!(!some[PRIOS].1);
        let same: Vec<_> = (1..10_000).map(|n| filter(1, 0, "flower", n, Some(&none))).collect();
        let (some, read) = told(&same);
        assert_eq!((some.len(), read), (1, FILTERS as usize));
        let chain: Vec<_> = (1..10_000).map(|n| filter(1, 7, "flower", n, Some(&none))).collect();
        assert_eq!(told(&chain), (vec![], FILTERS as usize));
    }

    #[test]
    fn a_program_of_xdp_is_told_with_its_mode() {
        let programs = |attributes: &[(u16, u32)], attached: u8| {
            let mut buf = Vec::new();
            let mut m = Message::new(&mut buf, RTM_NEWLINK, 0, 1);
            m.u8(IFLA_XDP_ATTACHED, attached);
            for (ty, id) in attributes {
                m.u32(*ty, *id);
            }
            m.finish();
            let m = MessageIter::new(&buf).next().unwrap();
            xdp_programs(&m.attrs(0))
        };
        assert_eq!(programs(&[], 0), []);
        assert_eq!(programs(&[(4, 7), (5, 7)], 1), [(1, 7)]);
        assert_eq!(programs(&[(4, 7)], 2), [(2, 7)], "an older kernel");
        assert_eq!(programs(&[(5, 7), (7, 9)], 4), [(1, 7), (3, 9)]);
    }
}
