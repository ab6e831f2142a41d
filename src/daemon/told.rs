//! A connection and its slots, as the control protocol tells them.

use netdev_providers::Ifindex;

use crate::control::info::{ConnInfo, SlotInfo};
use crate::datapath::routing::fdb::Fdb;
use crate::datapath::routing::links::Links;
use crate::datapath::routing::stack::{Frames, descend};
use crate::engine::Engine;
use crate::engine::conn::ConnHandle;
use crate::engine::usage::Usage;
use crate::engine::view::SlotView;

/// What there is to know of connections: the engine, and names for its numbers.
#[derive(Clone)]
pub(super) struct Told {
    pub(super) engine: Engine,
    pub(super) links: Links,
    pub(super) fdb: Fdb,
}

impl Told {
    /// How long ago a packet of it was last seen; `None`: it is not offloaded, or nobody can say at present.
    pub(super) fn idle_ms(&self, conn: &ConnHandle) -> Option<u64> {
        match self.engine.conn_update(conn) {
            Usage::LastUsed { at_ms, .. } => Some(self.engine.now_ms().saturating_sub(at_ms)),
            Usage::NotOffloaded | Usage::Unknown => None,
        }
    }

    /// The connection, with these of its slots.
    pub(super) fn conn(&self, conn: &ConnHandle, slots: &[SlotView]) -> ConnInfo {
        let traffic = conn.traffic();
        ConnInfo {
            packets: traffic.packets,
            bytes: traffic.bytes,
            epoch: conn.epoch().0,
            zone: conn.key().zone.0,
            ct_id: u32::try_from(conn.tag()).ok(),
            original: conn.key().original,
            reply: conn.reply(),
            age_ms: self.engine.now_ms().saturating_sub(conn.created_ms()),
            idle_ms: self.idle_ms(conn),
            slots: slots.iter().map(|s| slot_info(&self.links, &self.fdb, s)).collect(),
        }
    }
}

/// The tag of frames on a port or an egress, where the packets are routed on a netdev above it.
fn tag(links: &Links, fdb: &Fdb, above: Option<Ifindex>, frames: Frames) -> Option<u16> {
    Some(descend(links, fdb, above?, frames).ok()?.vlan?.get())
}

fn slot_info(links: &Links, fdb: &Fdb, v: &SlotView) -> SlotInfo {
    let (iif, oif) = (v.path.and_then(|p| p.iif), v.path.and_then(|p| p.oif));
    let next_hop = v.path.and_then(|p| p.dst_mac).unwrap_or_default();
    SlotInfo {
        port: links.name(v.netdev.ifindex),
        ifindex: v.netdev.ifindex.get(),
        generation: v.netdev.generation.get(),
        direction: v.direction,
        state: v.state.name().to_owned(),
        reason: v.rejection.as_ref().map(|r| r.reason.name().to_owned()),
        detail: v.rejection.as_ref().and_then(|r| {
            let errno = r.errno.map(|e| format!("{e:?}"));
            match (r.detail.as_deref(), errno) {
                (Some(d), Some(e)) => Some(format!("{d} ({e})")),
                (Some(d), None) => Some(d.to_owned()),
                (None, e) => e,
            }
        }),
        retry_in_ms: v.retry_in_ms,
        egress: v.path.map(|p| links.name(p.egress)),
        egress_ifindex: v.path.map(|p| p.egress.get()),
        iif: iif.map(|i| links.name(i)),
        oif: oif.map(|i| links.name(i)),
        vlan_in: tag(links, fdb, iif, Frames::On(v.netdev.ifindex)),
        vlan_out: tag(links, fdb, oif, Frames::Of(next_hop)),
        bridged: v.path.is_some_and(|p| p.bridged),
        dst_mac: v.path.and_then(|p| p.dst_mac).map(|m| m.to_string()),
        nat: v.path.is_some_and(|p| p.nat),
        in_hw: v.in_hw,
        nic_said: v.nic_said.as_deref().map(str::to_owned),
        packets: v.packets,
        bytes: v.bytes,
        idle_ms: v.idle_ms,
        cookie: Some(v.cookie.to_string()),
        rule: v.rule.map(|r| match r.0 >> 32 {
            // nf-flowtable: elements have no name of their own, and are counted.
            0 => format!("element {}", r.0),
            // ebpf: entries of the port's table, by their number.
            0xffff_ffff => format!("entry {}", r.0 & 0xffff_ffff),
            // tc-flower: prio and handle, as `tc filter show` has them.
            prio => format!("pref {prio} handle {:#x}", r.0 & 0xffff_ffff),
        }),
    }
}
