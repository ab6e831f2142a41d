//! Rules as the kernel dumps them.

use super::uapi::*;
use crate::contract::provider::Counters;
use crate::contract::types::Cookie;
use crate::netlink::wire::{Attr, AttrIter, Received};

/// One filter of a dump. Nothing is decoded before it is asked for.
#[derive(Clone, Debug)]
pub(super) struct Filter<'a> {
    pub(super) at: TcMsg,
    pub(super) kind: &'a str,
    pub(super) chain: u32,
    options: Option<Attr<'a>>,
}

impl<'a> Filter<'a> {
    /// `None` for anything that is no filter.
    pub(super) fn of(m: &Received<'a>) -> Option<Self> {
        if m.ty != RTM_NEWTFILTER {
            return None;
        }
        let at = TcMsg::from_message(m)?;
        let attrs = m.attrs(TcMsg::LEN);
        Some(Self {
            at,
            kind: attrs.find_type(TCA_KIND)?.str()?,
            chain: attrs.find_type(TCA_CHAIN).and_then(|a| a.u32()).unwrap_or(0),
            options: attrs.find_type(TCA_OPTIONS),
        })
    }

    /// True for a rule; false for the entry that stands for a prio as a whole, and for u32's hash
    /// tables.
    pub(super) fn is_rule(&self) -> bool {
        let Some(options) = self.options else { return false };
        match self.kind {
            "u32" => options.nested().find_type(TCA_U32_SEL).is_some(),
            _ => self.at.handle != 0,
        }
    }

    /// The options of the classifier: keys, flags, actions.
    pub(super) fn options(&self) -> AttrIter<'a> {
        self.options.map_or(AttrIter::new(&[]), |o| o.nested())
    }

    fn actions(&self) -> impl Iterator<Item = Action<'a>> + use<'a> {
        let list = match self.kind {
            "flower" => Some(TCA_FLOWER_ACT),
            "u32" => Some(TCA_U32_ACT),
            _ => None,
        };
        self.options
            .zip(list)
            .and_then(|(options, list)| options.nested().find_type(list))
            .map_or(AttrIter::new(&[]), |a| a.nested())
            .map(|a| Action(a.nested()))
    }

    /// The cookie of ours that the rule carries, if it carries one, and the counters of the action
    /// that it is on.
    pub(super) fn ours(&self) -> Option<(Cookie, Counters)> {
        self.actions().find_map(|a| Some((a.cookie()?, a.counters())))
    }

    /// Whether the NIC has it, where the rule says so.
    pub(super) fn in_hw(&self) -> Option<bool> {
        let flags = self.options?.nested().find_type(TCA_FLOWER_FLAGS)?.u32()?;
        match flags {
            f if f & TCA_CLS_FLAGS_IN_HW != 0 => Some(true),
            f if f & TCA_CLS_FLAGS_NOT_IN_HW != 0 => Some(false),
            _ => None,
        }
    }
}

struct Action<'a>(AttrIter<'a>);

impl Action<'_> {
    fn cookie(&self) -> Option<Cookie> {
        Cookie::from_bytes(self.0.find_type(TCA_ACT_COOKIE)?.payload)
    }

    fn counters(&self) -> Counters {
        let Some(stats) = self.0.find_type(TCA_ACT_STATS) else { return Counters::default() };
        let stats = stats.nested();
        // struct gnet_stats_basic: 64 bits of bytes, 32 of packets; PKT64 where these do not do.
        let basic = stats.find_type(TCA_STATS_BASIC);
        let bytes = basic.and_then(|a| a.u64()).unwrap_or(0);
        let packets = basic
            .and_then(|a| Attr { ty: a.ty, payload: a.payload.get(8..)? }.u32())
            .map_or(0, u64::from);
        let packets = stats.find_type(TCA_STATS_PKT64).and_then(|a| a.u64()).unwrap_or(packets);
        Counters { packets, bytes }
    }
}
