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
            // Guards of earlier versions.
            "u32" => Some(TCA_U32_ACT),
            "bpf" => Some(TCA_BPF_ACT),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::wire::{Message, MessageIter};

    fn filter<R>(
        ty: u16,
        kind: &str,
        handle: u32,
        options: Option<&dyn Fn(&mut Message<'_>)>,
        ask: impl FnOnce(Option<Filter<'_>>) -> R,
    ) -> R {
        let at = TcMsg { ifindex: 2, handle, parent: PARENT_INGRESS, prio: 7, ethertype: 0x0800 };
        let mut buf = Vec::new();
        let mut m = Message::new(&mut buf, ty, 0, 1);
        m.raw(&at.to_bytes()).str(TCA_KIND, kind).u32(TCA_CHAIN, 5);
        if let Some(options) = options {
            m.nested(TCA_OPTIONS, options);
        }
        m.finish();
        ask(Filter::of(&MessageIter::new(&buf).next().unwrap()))
    }

    #[test]
    fn a_filter_is_a_message_about_one() {
        filter(RTM_NEWTFILTER, "flower", 9, None, |f| {
            let f = f.unwrap();
            assert_eq!((f.kind, f.chain, f.at.handle, f.at.prio), ("flower", 5, 9, 7));
            assert_eq!((f.is_rule(), f.ours(), f.in_hw()), (false, None, None));
            assert_eq!(f.options().count(), 0);
        });
        filter(RTM_DELTFILTER, "flower", 9, None, |f| assert!(f.is_none()));
    }

    #[test]
    fn a_rule_has_a_handle_and_one_of_u32_a_selector() {
        let is_rule = |kind: &str, handle, options: &dyn Fn(&mut Message<'_>)| {
            filter(RTM_NEWTFILTER, kind, handle, Some(options), |f| f.unwrap().is_rule())
        };
        assert!(is_rule("flower", 1, &|_| {}) && !is_rule("flower", 0, &|_| {}));
        assert!(is_rule("matchall", 1, &|_| {}));
        assert!(!is_rule("u32", 1, &|_| {}));
        assert!(is_rule("u32", 1, &|m| _ = m.attr(TCA_U32_SEL, &[0; 16])));
    }

    #[test]
    fn the_nic_has_a_rule_where_the_flags_say_so() {
        let in_hw = |flags: u32| {
            let options = |m: &mut Message<'_>| _ = m.u32(TCA_FLOWER_FLAGS, flags);
            filter(RTM_NEWTFILTER, "flower", 1, Some(&options), |f| f.unwrap().in_hw())
        };
        assert_eq!([0, 1, 2, 16].map(in_hw), [None; 4]);
        assert_eq!([4, 4 | 2, 4 | 16].map(in_hw), [Some(true); 3]);
        assert_eq!([8, 8 | 1, 8 | 16].map(in_hw), [Some(false); 3]);
    }

    /// The cookie marks the action that counts for the rule, wherever it stands.
    #[test]
    fn the_counters_of_a_rule_are_those_of_the_action_with_the_cookie() {
        let cookie = Cookie::from_bytes(&[
            0xc7, 0x0f, 1, 1, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 77, //
        ])
        .unwrap();
        let counted = |kind: &str, list: u16, mark: [u8; 16], pkt64: Option<u64>| {
            let basic = |bytes: u64, packets: u32| {
                [&bytes.to_ne_bytes()[..], &packets.to_ne_bytes(), &[0; 4]].concat()
            };
            let options = |m: &mut Message<'_>| {
                m.nested(list, |m| {
                    m.nested(1, |m| {
                        m.nested(TCA_ACT_STATS, |m| _ = m.attr(TCA_STATS_BASIC, &basic(1, 1)));
                    });
                    m.nested(2, |m| {
                        m.attr(TCA_ACT_COOKIE, &mark).nested(TCA_ACT_STATS, |m| {
                            m.attr(TCA_STATS_BASIC, &basic(1 << 40, 3));
                            if let Some(n) = pkt64 {
                                m.attr(TCA_STATS_PKT64, &n.to_ne_bytes());
                            }
                        });
                    });
                });
            };
            filter(RTM_NEWTFILTER, kind, 1, Some(&options), |f| f.unwrap().ours())
        };
        let told = |packets| Some((cookie, Counters { packets, bytes: 1 << 40 }));
        let mark = cookie.to_bytes();
        assert_eq!(counted("flower", TCA_FLOWER_ACT, mark, None), told(3));
        assert_eq!(counted("u32", TCA_U32_ACT, mark, None), told(3));
        assert_eq!(counted("bpf", TCA_BPF_ACT, mark, None), told(3));
        // More than 32 bits of packets.
        assert_eq!(counted("flower", TCA_FLOWER_ACT, mark, Some(5 << 32)), told(5 << 32));
        assert_eq!(counted("flower", TCA_FLOWER_ACT, [1; 16], None), None, "somebody else's");
        assert_eq!(counted("flower", TCA_U32_ACT, mark, None), None, "of another kind");
        assert_eq!(counted("matchall", TCA_FLOWER_ACT, mark, None), None);
    }
}
