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
use super::hook::Hook;
use super::prios::Use;
use super::probe::{Found, Guards};
use super::rule::{self, Form, Place};
use super::uapi::*;
use crate::contract::flow::{Flow, FlowMatch, Forward, MacRewrite};
use crate::contract::provider::Capability;
use crate::contract::reason::{Reason, Rejection};
use crate::contract::types::{Direction, Ifindex, L4Proto, MacAddr, Tuple, Zone};
use crate::netlink::error::{KernelError, NetlinkError};

/// What the kernel said to a trial: `None` where it was not made.
type Answer = Option<Result<(), KernelError>>;

/// A shape of flows, as far as it is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    family: Family,
    proto: L4Proto,
    nat: bool,
}

impl Shape {
    pub(super) const fn new(family: Family, proto: L4Proto, nat: bool) -> Self {
        Self { family, proto, nat }
    }

    fn of(flow: &Flow) -> Self {
        let tuple = &flow.matches.tuple;
        Self { family: Family::of_ip(tuple.is_ipv6()), proto: tuple.proto(), nat: flow.has_nat() }
    }

    fn all() -> impl Iterator<Item = Self> {
        Family::UNTAGGED.into_iter().flat_map(|family| {
            [L4Proto::Tcp, L4Proto::Udp]
                .into_iter()
                .flat_map(move |proto| [false, true].map(|nat| Self { family, proto, nat }))
        })
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let family = match self.family {
            Family::Ipv4 | Family::TaggedIpv4 => "ipv4",
            Family::Ipv6 | Family::TaggedIpv6 => "ipv6",
        };
        write!(f, "{family} {}{}", self.proto, if self.nat { " nat" } else { "" })
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
        for shape in Shape::all().filter(|s| !s.nat) {
            let action = Action::Gact;
            lines.push(trials.part(format!("match {shape}"), shape, action)?);
        }
        for action in [Action::Pedit, Action::Csum, Action::Mirred] {
            let shape = Shape { family: Family::Ipv4, proto: L4Proto::Tcp, nat: false };
            let kind = match action {
                Action::Gact => "gact",
                Action::Pedit => "pedit",
                Action::Csum => "csum",
                Action::Mirred => "mirred",
                Action::Vlan => "vlan",
                Action::Police => "police",
            };
            lines.push(trials.part(format!("action {kind}"), shape, action)?);
        }
        for shape in Shape::all() {
            lines.push(trials.flow(shape)?);
        }
        Ok(Self(lines))
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

    /// Why flows of this shape need not be tried: every place in which it was tried refused it.
    pub(super) fn refusal(&self, flow: &Flow) -> Option<Rejection> {
        let shape = Shape::of(flow);
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
        let percpu_stats = self.found.percpu_stats;
        let [software, hardware] = self.both(shape.family, |m, flags| {
            let (buf, seq, place, handle) = m;
            rule::add_with(buf, seq, place, handle, &flow.matches, flags, |m| {
                let mut list = ActionList::new(m, percpu_stats);
                list.one(&flow, action, &cookie);
                if matches!(action, Action::Pedit | Action::Csum) {
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
        let [software, hardware] = self.both(shape.family, |m, flags| {
            let (buf, seq, place, handle) = m;
            let nat = match (shape.nat, flags) {
                (false, _) => None,
                (true, TCA_CLS_FLAGS_SKIP_SW) => Some(NatForm::Hardware),
                (true, _) => {
                    // Without programs there is nothing to try; why not is known already.
                    let Ok(programs) = &found.nat else { return false };
                    let (before, after) = programs.pair(shape.family, shape.proto);
                    Some(NatForm::Software { before, after })
                }
            };
            let form = Form { flags, nat, percpu_stats: found.percpu_stats };
            rule::add(buf, seq, place, handle, &flow, cookie, form);
            true
        })?;
        Ok(Line { name: format!("flow {shape}"), shape: Some(shape), software, hardware })
    }

    /// Tries what `write` writes for these flags, in software and in hardware.
    fn both(
        &mut self,
        family: Family,
        write: impl Fn((&mut Vec<u8>, u32, Place, Handle), u32) -> bool,
    ) -> Result<[Answer; 2], NetlinkError> {
        let mode = self.found.mode;
        let places = [
            (mode.has_software(), TCA_CLS_FLAGS_SKIP_HW),
            (mode.has_hardware(), TCA_CLS_FLAGS_SKIP_SW),
        ];
        let mut answers = [None, None];
        for (answer, (used, flags)) in answers.iter_mut().zip(places) {
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
        // The last one: no flow's.
        let handle = Handle(NonZeroU32::MAX);
        if !write((&mut Vec::new(), 0, Place { ifindex: self.hook.ifindex, prio, family }, handle))
        {
            return Ok(None);
        }
        let tried = self.hook.request(|buf, seq, ifindex| {
            write((buf, seq, Place { ifindex, prio, family }, handle));
            rule::ask_for_ack(buf, 0);
        });
        match tried {
            Ok(()) => {
                self.hook.delete(prio, family, handle)?;
                Ok(Some(Ok(())))
            }
            Err(NetlinkError::Kernel(e)) => {
                debug!(ifindex = %self.hook.ifindex, "a trial rule was refused: {e}");
                Ok(Some(Err(e)))
            }
            Err(e) => Err(e),
        }
    }
}

/// A flow that no packet belongs to: all its addresses and ports are 0.
pub(super) fn trial_flow(ifindex: Ifindex, shape: Shape) -> Flow {
    let (zero, other): (IpAddr, IpAddr) = match shape.family {
        Family::Ipv4 | Family::TaggedIpv4 => {
            (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::LOCALHOST.into())
        }
        Family::Ipv6 | Family::TaggedIpv6 => {
            (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::LOCALHOST.into())
        }
    };
    let tuple = |dst, port| {
        #[expect(clippy::expect_used, reason = "both addresses are of one family")]
        Tuple::new(shape.proto, zero, 0, dst, port).expect("one family")
    };
    Flow {
        zone: Zone(0),
        direction: Direction::Original,
        ingress_mtu: 0,
        matches: FlowMatch { eth_dst: Some(MacAddr::default()), vlan: None, tuple: tuple(zero, 0) },
        forward: Forward {
            egress: ifindex,
            vlan: None,
            mtu: 0,
            tuple: if shape.nat { tuple(other, 1) } else { tuple(zero, 0) },
            macs: Some(MacRewrite { src: MacAddr::default(), dst: MacAddr::default() }),
        },
    }
}
