//! The provider of one netdev: what the engine calls.

use std::sync::Mutex;

use nix::errno::Errno;

use super::object::fault;
use super::place::Place;
use super::shared::{Shared, lock};
use super::writer::Writer;
use crate::contract::flow::Flow;
use crate::contract::operation::Operation;
use crate::contract::provider::{Capability, Fault, Observed, Provider, Repaired, RuleReport};
use crate::contract::reason::Rejection;
use crate::contract::types::{Ifindex, Instance};
use crate::netlink::link::Links;

/// The provider of one netdev.
#[derive(Debug)]
pub(super) struct Ebpf {
    pub(super) ifindex: Ifindex,
    pub(super) instance: Instance,
    pub(super) shared: Shared,
    pub(super) writer: Mutex<Writer>,
    /// What was found out at bind.
    pub(super) about: About,
}

/// What was found out about a netdev.
#[derive(Clone, Debug)]
pub(super) struct About {
    pub(super) place: Place,
    pub(super) not_xdp: Option<String>,
    /// Why its rules end with the daemon.
    pub(super) not_pinned: Option<String>,
    pub(super) capacity: u32,
}

impl Provider for Ebpf {
    fn can_offload(&self, flow: &Flow) -> Result<(), Rejection> {
        self.shared.can_offload(flow)
    }

    fn submit(&self, batch: Vec<Operation>) {
        let results = lock(&self.writer).submit(&self.shared, batch);
        for (ticket, outcome) in results {
            ticket.complete(outcome);
        }
    }

    fn repair(&self) -> Repaired {
        let mut writer = lock(&self.writer);
        writer.look(&self.shared);
        if writer.take_rules_gone() { Repaired::RulesGone } else { Repaired::AsItWas }
    }

    fn in_front(&self) -> Vec<String> {
        self.shared.around().front
    }

    fn observe(&self) -> Result<Observed, Fault> {
        lock(&self.writer).observe()
    }

    fn usage(&self, report: &mut dyn FnMut(RuleReport)) -> Result<(), Fault> {
        let flows = lock(&self.shared.flows).clone();
        let adopted = lock(&self.shared.adopted).clone();
        let read = flows.read(|_, entry| {
            let number = entry.rule();
            let Some(mut cookie) = entry.cookie() else { return };
            if cookie.instance != self.instance {
                let Some(&of_ours) = adopted.get(&number) else { return };
                cookie = of_ours;
            }
            let rule = number.id();
            report(RuleReport { cookie, rule, counters: entry.counters(), in_hw: Some(false) });
        });
        read.map_err(|e| fault("reading the table", &e))?;
        let gone = Links::open().and_then(|mut l| l.get(self.ifindex)).is_ok_and(|l| l.is_none());
        if gone {
            let errno = Some(Errno::ENODEV);
            return Err(Fault { errno, ..Fault::new("reading the table") });
        }
        // Nobody tells of programs that are attached or detached by links: the port's own thread looks.
        match lock(&self.writer).is_as_it_was(&self.shared) {
            true => Ok(()),
            false => Err(Fault::new("the program was taken away, or others have come or gone")),
        }
    }

    fn flush(&self) -> Result<u64, Fault> {
        lock(&self.writer).flush(&self.shared)
    }

    fn outlives(&self) -> bool {
        self.about.not_pinned.is_none()
    }

    fn release(&self) -> Result<(), Fault> {
        lock(&self.writer).release()
    }

    fn capabilities(&self) -> Vec<Capability> {
        let line = |name: &str, software| Capability {
            name: name.to_owned(),
            software: Some(software),
            hardware: None,
        };
        let mut all = Vec::new();
        for shape in ["ipv4 tcp", "ipv4 udp", "ipv6 tcp", "ipv6 udp"] {
            for does in ["", " nat", " from vlan", " to vlan"] {
                all.push(line(&format!("flow {shape}{does}"), Ok(())));
            }
        }
        all.push(line("bridged", Ok(())));
        all.push(line("guard ttl, options, header checksum, lengths, mtu", Ok(())));
        all.push(line(
            "skb priority by tos",
            match self.about.place {
                Place::Xdp => Err("XDP: there is no skb".to_owned()),
                Place::Tcx | Place::Clsact => Ok(()),
            },
        ));
        all
    }

    fn describe(&self) -> String {
        let About { place, not_xdp, not_pinned, capacity } = &self.about;
        let mut text = format!("BPF, {place}; {capacity} rules at most");
        if let Some(why) = not_xdp.as_ref().filter(|_| *place != Place::Xdp) {
            text += &format!("; not XDP: {why}");
        }
        match not_pinned {
            None => text += "; outlives the daemon",
            Some(why) => text += &format!("; ends with the daemon: {why}"),
        }
        let behind = self.shared.around().behind;
        if !behind.is_empty() {
            text += &format!("; no rules while others are behind it: {}", behind.join(", "));
        }
        text
    }
}
