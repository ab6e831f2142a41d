//! What this netdev's kernel and driver take, found out at bind by rules that no packet belongs to
//! and that are taken away again: match keys, actions, and whole rules of every shape of flow, each
//! in software (`skip_hw`) and in hardware (`skip_sw`), as far as the port uses these.
//!
//! The table is shown, in the kernel's words, and decides what the port offers: a shape that was
//! refused wherever the port puts rules is not tried again with every connection of that shape.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU32;

use tracing::debug;

use super::actions::{Action, ActionList, NatForm};
use super::found::{Found, Guards, Mode};
use super::hook::Hook;
use super::prios::Use;
use super::rule::{self, Form, Place, needs_programs};
use super::uapi::*;
use crate::contract::flow::{Above, Flow, FlowMatch, Forward, MacRewrite};
use crate::contract::provider::Capability;
use crate::contract::reason::{Reason, Rejection};
use crate::contract::types::{Direction, Ifindex, L4Proto, MacAddr, Tuple, VlanId, Zone};
use crate::netlink::error::{KernelError, NetlinkError};

/// The handle of trial rules: the last one, no flow's.
const TRIAL: Handle = Handle(NonZeroU32::MAX);

/// What the kernel said to a trial: `None` where it was not made.
type Answer = Option<Result<(), KernelError>>;

/// A shape of flows, as far as it is tried: what is done to the tuple, and what to the tags, are tried
/// one without the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    ipv6: bool,
    proto: L4Proto,
    does: Does,
}

/// What a rule does beside forwarding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Does {
    Nothing,
    Nat,
    /// It takes a tag off, or puts one on.
    Untag,
    Tag,
}

impl Shape {
    pub(super) const fn new(ipv6: bool, proto: L4Proto, nat: bool) -> Self {
        Self { ipv6, proto, does: if nat { Does::Nat } else { Does::Nothing } }
    }

    /// What has to be possible for a flow to be offloaded.
    fn of(flow: &Flow) -> impl Iterator<Item = Self> {
        let tuple = &flow.matches.tuple;
        let (ipv6, proto) = (tuple.is_ipv6(), tuple.proto());
        let tags = [
            flow.matches.vlan.is_some().then_some(Does::Untag),
            flow.forward.vlan.is_some().then_some(Does::Tag),
        ];
        let tags = tags.into_iter().flatten().map(move |does| Self { ipv6, proto, does });
        std::iter::once(Self::new(ipv6, proto, flow.has_nat())).chain(tags)
    }

    fn all() -> impl Iterator<Item = Self> {
        let all = [Does::Nothing, Does::Nat, Does::Untag, Does::Tag];
        [false, true].into_iter().flat_map(move |ipv6| {
            [L4Proto::Tcp, L4Proto::Udp]
                .into_iter()
                .flat_map(move |proto| all.map(|does| Self { ipv6, proto, does }))
        })
    }

    /// Of the packets that its flows match.
    const fn family(self) -> Family {
        match (self.does, self.ipv6) {
            (Does::Untag, false) => Family::TaggedIpv4,
            (Does::Untag, true) => Family::TaggedIpv6,
            (_, ipv6) => Family::of_ip(ipv6),
        }
    }

    /// Where rules of this shape stand on the port: in software, in hardware.
    fn places(self, found: &Found) -> [bool; 2] {
        let (software, hardware) = (found.mode.has_software(), found.mode.has_hardware());
        match self.does {
            Does::Nothing | Does::Nat => [software, hardware],
            // Why not is known already.
            Does::Untag | Does::Tag if found.vlan.is_err() => [false, false],
            Does::Untag => [software, hardware && found.tagged_in_hw],
            Does::Tag => [software, hardware],
        }
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let family = if self.ipv6 { "ipv6" } else { "ipv4" };
        let does = match self.does {
            Does::Nothing => "",
            Does::Nat => " nat",
            Does::Untag => " from vlan",
            Does::Tag => " to vlan",
        };
        write!(f, "{family} {}{does}", self.proto)
    }
}

/// One line of the table.
#[derive(Clone, Debug)]
struct Line {
    name: String,
    shape: Option<Shape>,
    software: Answer,
    hardware: Answer,
}

/// What was found out.
#[derive(Clone, Debug, Default)]
pub(super) struct Capabilities(Vec<Line>);

impl Capabilities {
    /// Makes the trials, in the places that the port uses.
    pub(super) fn find(
        hook: &mut Hook,
        found: &Found,
        guards: Guards,
    ) -> Result<Self, NetlinkError> {
        let mut trials = Trials { hook, found, guards };
        let mut lines = Vec::new();
        for shape in Shape::all().filter(|s| s.does == Does::Nothing) {
            let action = Action::Gact;
            lines.push(trials.part(format!("match {shape}"), shape, action)?);
        }
        for action in [Action::Pedit, Action::Csum, Action::Mirred, Action::Vlan, Action::Police] {
            let shape = Shape::new(false, L4Proto::Tcp, false);
            lines.push(trials.part(format!("action {}", action.kind()), shape, action)?);
        }
        for shape in Shape::all() {
            lines.push(trials.flow(shape)?);
        }
        Ok(Self(lines))
    }

    /// Whether the NIC carries a flow of some shape: it takes the rule, and has it when it is read back. What it
    /// said, where it does not.
    pub(super) fn carried(
        hook: &mut Hook,
        found: &Found,
        guards: Guards,
    ) -> Result<Result<(), String>, NetlinkError> {
        let mut trials = Trials { hook, found, guards };
        // What a dead engine has left there tells as much, also of a NIC that has no room for one rule more.
        for family in Family::UNTAGGED {
            if trials.has_in_hw(family, |handle| handle != TRIAL.0.get())? {
                return Ok(Ok(()));
            }
        }
        let mut said = String::new();
        for shape in Shape::all().filter(|s| s.does == Does::Nothing) {
            said = match trials.carried(shape)? {
                Ok(true) => return Ok(Ok(())),
                Ok(false) => format!("{shape}: taken, but it is not in_hw"),
                Err(e) => format!("{shape}: {e}"),
            };
        }
        Ok(Err(said))
    }

    /// For people.
    pub(super) fn table(&self) -> Vec<Capability> {
        let words = |a: &Answer| a.clone().map(|r| r.map_err(|e| e.to_string()));
        self.0
            .iter()
            .map(|l| Capability {
                name: l.name.clone(),
                software: words(&l.software),
                hardware: words(&l.hardware),
            })
            .collect()
    }

    /// What the guards tell apart and rules set, where rules run: known without a trial.
    pub(super) fn by_nature(mode: Mode) -> [Capability; 3] {
        let line = |name: &str, hardware: Result<(), &str>| Capability {
            name: name.to_owned(),
            software: mode.has_software().then_some(Ok(())),
            hardware: mode.has_hardware().then(|| hardware.map_err(str::to_owned)),
        };
        [
            line("guard ttl", Ok(())),
            line(
                "guard options, header checksum, lengths",
                Err(
                    "flower has no keys for them: what the NIC does with such packets is its own affair",
                ),
            ),
            line("skb priority by tos", Err("no packet of the host's, and no qdisc on the way")),
        ]
    }

    /// Why a flow need not be tried: every place in which its shape was tried refused it.
    pub(super) fn refusal(&self, flow: &Flow) -> Option<Rejection> {
        Shape::of(flow).find_map(|shape| self.refusal_of(shape))
    }

    fn refusal_of(&self, shape: Shape) -> Option<Rejection> {
        let line = self.0.iter().find(|l| l.shape == Some(shape))?;
        let tried = [&line.hardware, &line.software];
        let mut refused = None;
        for answer in tried.into_iter().flatten() {
            refused = Some(answer.as_ref().err()?);
        }
        let mut why = Rejection::from(refused?.clone());
        let transient = !matches!(why.reason, Reason::Unsupported | Reason::Refused);
        if transient {
            // It said nothing about the shape: a table that was full just then.
            return None;
        }
        if line.software.is_none() {
            why.reason = Reason::NotInHardware;
        }
        Some(why)
    }
}

struct Trials<'a> {
    hook: &'a mut Hook,
    found: &'a Found,
    guards: Guards,
}

impl Trials<'_> {
    /// A rule with these keys and one action; what rewrites is followed by a redirect, because NICs
    /// rewrite what they forward, and not what they hand to the host.
    fn part(&mut self, name: String, shape: Shape, action: Action) -> Result<Line, NetlinkError> {
        let flow = trial_flow(self.hook.ifindex, shape);
        let cookie = self.guards.cookie().to_bytes();
        let found = self.found;
        let mut places = shape.places(found);
        // Lengths are told apart in software only.
        places[1] &= action != Action::Police;
        let [software, hardware] = self.both(shape.family(), places, |m, flags| {
            let (buf, seq, place, handle) = m;
            rule::add_with(buf, seq, place, handle, &flow.matches, flags, |m| {
                let mut list = ActionList::new(m, found.percpu_stats(flags));
                list.one(&flow, action, &cookie);
                if !matches!(action, Action::Gact | Action::Mirred) {
                    list.one(&flow, Action::Mirred, &cookie);
                }
            });
            true
        })?;
        Ok(Line { name, shape: None, software, hardware })
    }

    /// A whole rule, in the form that it would have.
    fn flow(&mut self, shape: Shape) -> Result<Line, NetlinkError> {
        let flow = trial_flow(self.hook.ifindex, shape);
        let (cookie, found) = (self.guards.cookie(), self.found);
        let places = shape.places(found);
        let [software, hardware] = self.both(shape.family(), places, |m, flags| {
            let (buf, seq, place, handle) = m;
            let (nat, header) = match (shape.does, flags) {
                (Does::Nat, TCA_CLS_FLAGS_SKIP_SW) => (Some(NatForm::Hardware), None),
                (_, TCA_CLS_FLAGS_SKIP_SW) => (None, None),
                _ if !needs_programs(&flow) => (None, None),
                (does, _) => {
                    // Without programs there is nothing to try; why not is known already.
                    let Ok(programs) = found.rule_programs() else { return false };
                    let nat = (does == Does::Nat).then(|| {
                        let (before, after) = programs.nat(shape.family(), shape.proto);
                        NatForm::Software { before, after }
                    });
                    (nat, flow.is_routed_ipv4().then(|| programs.header()))
                }
            };
            let form = Form { flags, nat, header, percpu_stats: found.percpu_stats(flags) };
            rule::add(buf, seq, place, handle, &flow, cookie, form);
            true
        })?;
        Ok(Line { name: format!("flow {shape}"), shape: Some(shape), software, hardware })
    }

    /// Tries what `write` writes for these flags, in software and in hardware, where it is to be tried.
    fn both(
        &mut self,
        family: Family,
        places: [bool; 2],
        write: impl Fn((&mut Vec<u8>, u32, Place, Handle), u32) -> bool,
    ) -> Result<[Answer; 2], NetlinkError> {
        let flags = [TCA_CLS_FLAGS_SKIP_HW, TCA_CLS_FLAGS_SKIP_SW];
        let mut answers = [None, None];
        for (answer, (used, flags)) in answers.iter_mut().zip(places.into_iter().zip(flags)) {
            if used {
                *answer = self.try_one(family, |m| write(m, flags))?;
            }
        }
        Ok(answers)
    }

    fn try_one(
        &mut self,
        family: Family,
        write: impl Fn((&mut Vec<u8>, u32, Place, Handle)) -> bool,
    ) -> Result<Answer, NetlinkError> {
        let prio = self.found.prios.of(Use::Flows, family);
        if !write((&mut Vec::new(), 0, Place { ifindex: self.hook.ifindex, prio, family }, TRIAL)) {
            return Ok(None);
        }
        let tried = self.put(family, |m| _ = write(m))?;
        if tried.is_ok() {
            self.hook.delete(prio, family, TRIAL)?;
        }
        Ok(Some(tried))
    }

    /// Whether the NIC has the rule of a flow of this shape, or why it does not take it.
    fn carried(&mut self, shape: Shape) -> Result<Result<bool, KernelError>, NetlinkError> {
        let (flow, family) = (trial_flow(self.hook.ifindex, shape), shape.family());
        let (cookie, prio) = (self.guards.cookie(), self.found.prios.of(Use::Flows, family));
        let form = Form {
            flags: TCA_CLS_FLAGS_SKIP_SW,
            nat: None,
            header: None,
            percpu_stats: self.found.percpu_stats(TCA_CLS_FLAGS_SKIP_SW),
        };
        let put = self.put(family, |(buf, seq, place, handle)| {
            rule::add(buf, seq, place, handle, &flow, cookie, form);
        })?;
        if let Err(e) = put {
            return Ok(Err(e));
        }
        let in_hw = self.has_in_hw(family, |handle| handle == TRIAL.0.get());
        self.hook.delete(prio, family, TRIAL)?;
        in_hw.map(Ok)
    }

    /// Whether the NIC has one of the rules of ours that have these handles.
    fn has_in_hw(
        &mut self,
        family: Family,
        wanted: impl Fn(u32) -> bool,
    ) -> Result<bool, NetlinkError> {
        let prio = self.found.prios.of(Use::Flows, family);
        let mut in_hw = false;
        let read = self.hook.filters_terse(prio, family, |f| {
            in_hw |= wanted(f.at.handle) && f.ours().is_some() && f.in_hw() == Some(true);
        });
        match read {
            // What it has found stands.
            Ok(()) | Err(NetlinkError::Interrupted) => Ok(in_hw),
            Err(e) => Err(e),
        }
    }

    /// Puts a trial rule there. The kernel's words, if it refuses it.
    fn put(
        &mut self,
        family: Family,
        write: impl FnOnce((&mut Vec<u8>, u32, Place, Handle)),
    ) -> Result<Result<(), KernelError>, NetlinkError> {
        let prio = self.found.prios.of(Use::Flows, family);
        let put = self.hook.request(|buf, seq, ifindex| {
            write((buf, seq, Place { ifindex, prio, family }, TRIAL));
            rule::ask_for_ack(buf, 0);
        });
        match put {
            Ok(()) => Ok(Ok(())),
            Err(NetlinkError::Kernel(e)) => {
                debug!(ifindex = %self.hook.ifindex, "a trial rule was refused: {e}");
                Ok(Err(e))
            }
            Err(e) => Err(e),
        }
    }
}

/// A flow that no packet belongs to: all its addresses and ports are 0.
pub(super) fn trial_flow(ifindex: Ifindex, shape: Shape) -> Flow {
    let (zero, other): (IpAddr, IpAddr) = if shape.ipv6 {
        (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::LOCALHOST.into())
    } else {
        (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::LOCALHOST.into())
    };
    let tuple = |dst, port| {
        #[expect(clippy::expect_used, reason = "both addresses are of one family")]
        Tuple::new(shape.proto, zero, 0, dst, port).expect("one family")
    };
    let vlan = |does| if shape.does == does { VlanId::new(1) } else { None };
    Flow {
        zone: Zone(0),
        direction: Direction::Original,
        ingress_mtu: 0,
        matches: FlowMatch {
            eth_dst: Some(MacAddr::default()),
            vlan: vlan(Does::Untag),
            tuple: tuple(zero, 0),
        },
        forward: Forward {
            egress: ifindex,
            vlan: vlan(Does::Tag),
            mtu: 0,
            tuple: if shape.does == Does::Nat { tuple(other, 1) } else { tuple(zero, 0) },
            macs: Some(MacRewrite { src: MacAddr::default(), dst: MacAddr::default() }),
            egress_decides: false,
        },
        above: Above::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;

    #[test]
    fn shapes_are_named_by_what_they_match_and_do() {
        let names: Vec<_> = Shape::all().map(|s| s.to_string()).collect();
        let of =
            |what: &str| ["", " nat", " from vlan", " to vlan"].map(|does| format!("{what}{does}"));
        assert_eq!(names, ["ipv4 tcp", "ipv4 udp", "ipv6 tcp", "ipv6 udp"].map(of).concat());
    }

    #[test]
    fn only_what_comes_with_a_tag_is_of_the_families_of_tagged_frames() {
        for shape in Shape::all() {
            let wanted = match (shape.does == Does::Untag, shape.ipv6) {
                (true, false) => Family::TaggedIpv4,
                (true, true) => Family::TaggedIpv6,
                (false, false) => Family::Ipv4,
                (false, true) => Family::Ipv6,
            };
            assert_eq!(shape.family(), wanted, "{shape}");
        }
    }

    #[test]
    fn a_trial_is_of_the_shape_that_it_is_for_and_of_no_connection() {
        for shape in Shape::all() {
            let flow = trial_flow(Ifindex::new(7).unwrap(), shape);
            assert_eq!(Family::of(&flow.matches), shape.family(), "{shape}");
            let untagged = matches!(shape.does, Does::Nothing | Does::Nat);
            let does = if untagged { shape.does } else { Does::Nothing };
            let mut wanted = vec![Shape { does, ..shape }];
            wanted.extend((!untagged).then_some(shape));
            assert_eq!(Shape::of(&flow).collect::<Vec<_>>(), wanted, "{shape}");
            let tuple = &flow.matches.tuple;
            assert!(tuple.src().is_unspecified() && tuple.dst().is_unspecified(), "{shape}");
            assert_eq!((tuple.sport(), tuple.dport(), flow.forward.egress.get()), (0, 0, 7));
        }
    }

    #[test]
    fn shapes_are_tried_where_the_port_has_its_rules() {
        let shape = |does| Shape { ipv6: false, proto: L4Proto::Tcp, does };
        let all = [Does::Nothing, Does::Nat, Does::Untag, Does::Tag].map(shape);
        let places = |found: &Found| all.map(|s| s.places(found));
        for (mode, places_of_mode) in [
            (Mode::Software, [true, false]),
            (Mode::Hardware, [false, true]),
            (Mode::Both, [true, true]),
        ] {
            let found = Found::everything(mode);
            assert_eq!(places(&found), [places_of_mode; 4], "{mode:?}");
            // The NIC's guard for tagged frames is missing.
            let in_software = [places_of_mode[0], false];
            let found = found.but(|f| f.tagged_in_hw = false);
            let (a, b) = (places_of_mode, in_software);
            assert_eq!(places(&found), [a, a, b, a], "{mode:?}");
            let found = found.but(|f| f.vlan = Err("no".to_owned()));
            assert_eq!(places(&found), [a, a, [false; 2], [false; 2]], "{mode:?}");
        }
    }

    fn refused(errno: Errno, words: &str) -> Answer {
        Some(Err(KernelError { errno, extack: Some(words.into()) }))
    }

    fn line(shape: Option<Shape>, software: Answer, hardware: Answer) -> Line {
        Line {
            name: shape.map_or_else(|| "a part".to_owned(), |s| s.to_string()),
            shape,
            software,
            hardware,
        }
    }

    /// What is said of a flow without NAT whose shape was answered so.
    fn said(software: Answer, hardware: Answer) -> Option<Rejection> {
        let shape = Shape::new(true, L4Proto::Udp, false);
        let other = Shape::new(true, L4Proto::Udp, true);
        let no = || refused(Errno::EINVAL, "of something else");
        let found = Capabilities(vec![
            line(None, no(), no()),
            line(Some(other), no(), no()),
            line(Some(shape), software, hardware),
        ]);
        found.refusal(&trial_flow(Ifindex::new(7).unwrap(), shape))
    }

    #[test]
    fn a_shape_is_refused_when_every_place_in_which_it_was_tried_refused_it() {
        let no = |words| refused(Errno::EOPNOTSUPP, words);
        let yes = || Some(Ok(()));
        for (software, hardware) in
            [(yes(), yes()), (yes(), no("nic")), (no("tc"), yes()), (yes(), None), (None, yes())]
        {
            assert_eq!(said(software, hardware), None);
        }
        assert_eq!(said(None, None), None, "nobody was asked");
        let told = |software, hardware| said(software, hardware).map(|r| (r.reason, r.detail));
        let words = |w: &str| Some(Box::from(w));
        assert_eq!(told(no("tc"), no("nic")), Some((Reason::Unsupported, words("tc"))));
        assert_eq!(told(no("tc"), None), Some((Reason::Unsupported, words("tc"))));
        assert_eq!(told(None, no("nic")), Some((Reason::NotInHardware, words("nic"))));
        let einval = || refused(Errno::EINVAL, "wrong");
        assert_eq!(told(einval(), None), Some((Reason::Refused, words("wrong"))));
    }

    #[test]
    fn what_passes_says_nothing_about_a_shape() {
        for errno in [Errno::ENOSPC, Errno::EBUSY, Errno::EEXIST] {
            assert_eq!(said(None, refused(errno, "just now")), None);
        }
    }

    #[test]
    fn a_tag_that_cannot_be_put_on_or_taken_off_is_enough() {
        let plain = Shape::new(false, L4Proto::Tcp, false);
        for does in [Does::Untag, Does::Tag] {
            let shape = Shape { does, ..plain };
            let found = Capabilities(vec![
                line(Some(plain), Some(Ok(())), None),
                line(Some(shape), refused(Errno::EOPNOTSUPP, "no tags"), None),
            ]);
            let flow = |shape| trial_flow(Ifindex::new(7).unwrap(), shape);
            assert_eq!(found.refusal(&flow(plain)), None);
            assert_eq!(found.refusal(&flow(shape)).unwrap().detail, Some("no tags".into()));
        }
    }

    #[test]
    fn what_hardware_does_not_tell_apart_is_said_where_there_is_hardware() {
        for (mode, software, hardware) in [
            (Mode::Software, Some(true), [None; 3]),
            (Mode::Hardware, None, [Some(true), Some(false), Some(false)]),
            (Mode::Both, Some(true), [Some(true), Some(false), Some(false)]),
        ] {
            let lines = Capabilities::by_nature(mode);
            let yes = |a: &Option<Result<(), String>>| a.as_ref().map(Result::is_ok);
            assert_eq!(lines.each_ref().map(|l| yes(&l.hardware)), hardware, "{mode:?}");
            assert_eq!(lines.each_ref().map(|l| yes(&l.software)), [software; 3], "{mode:?}");
        }
    }

    #[test]
    fn the_table_is_in_the_kernels_words() {
        let shape = Shape::new(false, L4Proto::Udp, true);
        let found = Capabilities(vec![
            line(None, None, Some(Ok(()))),
            line(Some(shape), refused(Errno::EINVAL, "no"), None),
        ]);
        let no = Some(Err("no (EINVAL)".to_owned()));
        let wanted = [
            Capability { name: "a part".into(), software: None, hardware: Some(Ok(())) },
            Capability { name: "ipv4 udp nat".into(), software: no, hardware: None },
        ];
        assert_eq!(found.table(), wanted);
    }
}
