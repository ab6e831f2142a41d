//! The structs of the header, member by member (`tests` compares them with what a C compiler makes of it), and what
//! they stand for.

use std::ffi::{c_char, c_int, c_void};
use std::net::IpAddr;

use engine::engine::conn::{Conn, ConnHandle};
use engine::engine::datapath::{Arrival, Path, PathHint, PathSpec, Sight};
use netdev_providers::{
    Cookie, Direction, Flow, Forward, HwFlags, Ifindex, L4Proto, MacAddr, MacRewrite, Reason,
    Rejection, Tracked, Tuple, VlanId,
};

use crate::edge::{Error, Result, Versioned, rejection, unused};

/// A struct of the header. With `, least MEMBER`: versioned; MEMBER is the last of those that it had when it was new.
macro_rules! structs {
    ($($(#[$doc:meta])* $name:ident = $c:literal $(, least $least:ident)? { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Clone, Copy)]
            // The header's whole; not all of it is read here.
            #[allow(dead_code)]
            pub(crate) struct $name { $(pub(crate) $field: $type,)* }

            $(
                // SAFETY: numbers, arrays of them, and pointers, which the caller vouches for; a test sees to it that
                // there is no padding.
                unsafe impl Versioned for $name {
                    const NAME: &'static str = $c;
                    const LEAST: usize = std::mem::offset_of!($name, $least) + size_of_last(|s: &$name| &s.$least);
                }
            )?
        )*

        /// Name, size, alignment and members (name, offset, size) of each.
        #[cfg(test)]
        pub(crate) fn layouts() -> Vec<(&'static str, usize, Vec<(&'static str, usize, usize)>)> {
            vec![$((
                $c,
                size_of::<$name>(),
                vec![$((
                    stringify!($field),
                    std::mem::offset_of!($name, $field),
                    size_of_last(|s: &$name| &s.$field),
                )),*],
            )),*]
        }
    };
}

const fn size_of_last<S, T>(_: fn(&S) -> &T) -> usize {
    size_of::<T>()
}

type Mac = [u8; 6];

/// A reading of the engine's connection, as the header has it.
pub(crate) type ConnPtr = *const Conn;

structs! {
    RawTuple = "ctoffload_tuple" {
        family: u8, protocol: u8, sport: u16, dport: u16, src: [u8; 16], dst: [u8; 16],
    }
    /// A port, as a worker sees it.
    PortValue = "ctoffload_port" { id: u32, generation: u32, bound: u32, }
    RawPath = "ctoffload_path", least reserved {
        size: u32, kind: u32, flags: u32, egress: u32, ingress_mtu: u32, mtu: u32, vlan_in: u16,
        vlan_out: u16, eth_dst: Mac, mac_src: Mac, mac_dst: Mac, answer: u16, mark: u32, reason: u32,
        reserved: u32,
    }
    Config = "ctoffload_config", least reserved {
        size: u32, instance: u32, connections: u64, queue: u32, port_del_ms: u32, complete_ms: u32,
        reserved: u32,
    }
    RawSight = "ctoffload_sight" {
        conn: ConnPtr, port: u32, generation: u32, direction: u32, reserved: u32,
    }
    DatapathTable = "ctoffload_datapath", least slot_changed {
        size: u32, reserved: u32, ctx: *mut c_void,
        resolve: Option<unsafe extern "C" fn(*mut c_void, *const RawSight, *const RawPath, *mut RawPath) -> c_int>,
        rearm: Option<unsafe extern "C" fn(*mut c_void, *const RawSight, usize)>,
        slot_changed: Option<unsafe extern "C" fn(*mut c_void, *const RawSight, u32, u32)>,
    }
    NewPortValue = "ctoffload_new_port", least capacity {
        size: u32, id: u32, name: *const c_char, providers: *const *const c_char, hw_flags: u32,
        capacity: u32,
    }
    PortDeletedValue = "ctoffload_port_deleted", least retracted {
        size: u32, faults: u32, flushed: u64, retracted: u64,
    }
    PortStats = "ctoffload_port_stats", least bytes {
        size: u32, generation: u32, bound: u32, faulty: u32, slow: u32, reserved: u32, pending: u64,
        installed: u64, rejected: u64, deleting: u64, in_hw: u64, sights: u64, adds: u64, deletes: u64,
        evictions: u64, rejections: u64, packets: u64, bytes: u64,
    }
    NewConn = "ctoffload_new_conn", least reserved2 {
        size: u32, zone: u16, reserved: u16, tag: u64, original: RawTuple, reply: RawTuple,
        reserved2: u32,
    }
    RawOffer = "ctoffload_offer", least path {
        size: u32, direction: u8, result: u8, reason: u8, reserved: u8, conn: ConnPtr,
        path: *const RawPath,
    }
    RawSlot = "ctoffload_slot" { conn: ConnPtr, direction: u32, reserved: u32, }
    RawUse = "ctoffload_use", least bytes {
        size: u32, usage: u32, conn: ConnPtr, last_used_ms: u64, packets: u64, bytes: u64,
    }
    RawSlotState = "ctoffload_slot_state", least bytes {
        size: u32, state: u32, reason: u32, in_hw: i32, rule: u64, packets: u64, bytes: u64,
    }
    Filter = "ctoffload_filter", least reserved2 {
        size: u32, fields: u32, port: u32, zone: u16, reserved: u16, tuple: RawTuple, reserved2: u16,
    }
    Swept = "ctoffload_swept", least lost {
        size: u32, faults: u32, rules: u64, used: u64, strays: u64, lost: u64,
    }
    RawNetdev = "ctoffload_netdev" {
        size: u32, id: u32, generation: u32, hw_flags: u32, instance: u32, reserved: u32,
        name: *const c_char,
    }
    RawFlow = "ctoffload_flow" {
        size: u32, kind: u32, flags: u32, egress: u32, ingress_mtu: u32, mtu: u32, vlan_in: u16,
        vlan_out: u16, zone: u16, direction: u16, eth_dst: Mac, mac_src: Mac, mac_dst: Mac,
        arriving: RawTuple, leaving: RawTuple, reserved: u16,
    }
    RawOp = "ctoffload_op" {
        size: u32, kind: u32, cookie: [u8; 16], epoch: u64, rule: u64, flow: *const RawFlow,
    }
    RawReport = "ctoffload_report", least bytes {
        size: u32, in_hw: i32, cookie: [u8; 16], rule: u64, packets: u64, bytes: u64,
    }
    ClassTable = "ctoffload_class", least release {
        size: u32, reserved: u32, name: *const c_char, ctx: *mut c_void,
        init: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
        deinit: Option<unsafe extern "C" fn(*mut c_void)>,
        bind: Option<unsafe extern "C" fn(*mut c_void, *const RawNetdev, *mut *mut c_void) -> c_int>,
        can_offload: Option<unsafe extern "C" fn(*mut c_void, *const RawFlow) -> c_int>,
        submit: Option<unsafe extern "C" fn(*mut c_void, *const *mut RawOp, usize)>,
        usage: Option<unsafe extern "C" fn(*mut c_void, ReportFn, *mut c_void) -> c_int>,
        flush: Option<unsafe extern "C" fn(*mut c_void, *mut u64) -> c_int>,
        release: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    }
}

pub(crate) type ReportFn = unsafe extern "C" fn(*mut c_void, *const RawReport);

// What the header inlines.
const _: () = assert!(std::mem::offset_of!(PortValue, generation) == 4);

pub(crate) const FORWARD: u32 = 1;
pub(crate) const TRACK: u32 = 2;
const RESOLVE: u32 = 3;
const REFUSED: u32 = 4;
const PATH_ETH_DST: u32 = 1;
const PATH_ROUTED: u32 = 2;
const FLOW_ETH_DST: u32 = 1;
const FLOW_ROUTED: u32 = 2;
const FLOW_NAT: u32 = 4;
/// Of a port's number: it is no netdev's.
const PORT_LOCAL: u32 = 1 << 31;

/// The size of one of our own structs, for those that callbacks are given.
pub(crate) const fn size<T>() -> u32 {
    let size = size_of::<T>();
    assert!(size < 1 << 16);
    #[expect(clippy::cast_possible_truncation, reason = "it is less than 2^16")]
    {
        size as u32
    }
}

pub(crate) fn port_of(id: u32) -> Option<Ifindex> {
    if id & PORT_LOCAL == 0 { Ifindex::new(id) } else { Ifindex::local(id & !PORT_LOCAL) }
}

pub(crate) fn port(id: u32) -> Result<Ifindex> {
    port_of(id).ok_or_else(|| Error::invalid("0 is no port's number"))
}

pub(crate) fn direction(raw: u32) -> Result<Direction> {
    match raw {
        0 => Ok(Direction::Original),
        1 => Ok(Direction::Reply),
        _ => Err(Error::invalid(format!("{raw} is no direction"))),
    }
}

pub(crate) fn hw_flags(raw: u32) -> Result<HwFlags> {
    match raw {
        0 => Ok(HwFlags::Both),
        1 => Ok(HwFlags::SkipSw),
        2 => Ok(HwFlags::SkipHw),
        _ => Err(Error::invalid(format!("{raw} is not where rules may live"))),
    }
}

pub(crate) fn raw_hw_flags(flags: HwFlags) -> u32 {
    match flags {
        HwFlags::Both => 0,
        HwFlags::SkipSw => 1,
        HwFlags::SkipHw => 2,
    }
}

pub(crate) fn raw_in_hw(in_hw: Option<bool>) -> i32 {
    in_hw.map_or(-1, i32::from)
}

pub(crate) fn in_hw(raw: i32) -> Option<bool> {
    (raw >= 0).then_some(raw > 0)
}

impl RawTuple {
    pub(crate) fn get(&self) -> Result<Tuple> {
        let proto = L4Proto::from_number(self.protocol).ok_or_else(|| {
            Error::invalid(format!("protocol {} is neither 6 nor 17", self.protocol))
        })?;
        let address = |b: &[u8; 16]| match self.family {
            4 => Ok(IpAddr::from([b[0], b[1], b[2], b[3]])),
            6 => Ok(IpAddr::from(*b)),
            other => Err(Error::invalid(format!("family {other} is neither 4 nor 6"))),
        };
        let (src, dst) = (address(&self.src)?, address(&self.dst)?);
        let (sport, dport) = (u16::from_be(self.sport), u16::from_be(self.dport));
        Tuple::new(proto, src, sport, dst, dport).ok_or_else(|| Error::invalid("two families"))
    }

    pub(crate) fn of(tuple: &Tuple) -> Self {
        let bytes = |address: IpAddr| {
            let mut b = [0; 16];
            match address {
                IpAddr::V4(a) => b[..4].copy_from_slice(&a.octets()),
                IpAddr::V6(a) => b = a.octets(),
            }
            b
        };
        Self {
            family: if tuple.is_ipv6() { 6 } else { 4 },
            protocol: tuple.proto().number(),
            sport: tuple.sport().to_be(),
            dport: tuple.dport().to_be(),
            src: bytes(tuple.src()),
            dst: bytes(tuple.dst()),
        }
    }
}

fn vlan(raw: u16) -> Result<Option<VlanId>> {
    match raw {
        0 => Ok(None),
        _ => VlanId::new(raw).map(Some).ok_or_else(|| Error::invalid(format!("{raw} is no VLAN"))),
    }
}

fn raw_vlan(vlan: Option<VlanId>) -> u16 {
    vlan.map_or(0, VlanId::get)
}

fn raw_mac(mac: Option<MacAddr>) -> Mac {
    mac.unwrap_or_default().0
}

impl RawPath {
    /// Nothing but its size.
    pub(crate) fn empty() -> Self {
        Self {
            size: size::<Self>(),
            kind: 0,
            flags: 0,
            egress: 0,
            ingress_mtu: 0,
            mtu: 0,
            vlan_in: 0,
            vlan_out: 0,
            eth_dst: [0; 6],
            mac_src: [0; 6],
            mac_dst: [0; 6],
            answer: 0,
            mark: 0,
            reason: 0,
            reserved: 0,
        }
    }

    fn eth_dst(&self) -> Option<MacAddr> {
        (self.flags & PATH_ETH_DST != 0).then_some(MacAddr(self.eth_dst))
    }

    fn arrival(&self) -> Result<Arrival> {
        Ok(Arrival { eth_dst: self.eth_dst(), vlan: vlan(self.vlan_in)? })
    }

    /// The path of [`FORWARD`].
    pub(crate) fn path(&self, conn: &Conn, d: Direction) -> Result<Path> {
        if self.kind != FORWARD {
            return Err(Error::invalid(format!("path: kind {} does not forward", self.kind)));
        }
        let routed = self.flags & PATH_ROUTED != 0;
        let macs = MacRewrite { src: MacAddr(self.mac_src), dst: MacAddr(self.mac_dst) };
        let arrival = self.arrival()?;
        if self.mtu == 0 || self.ingress_mtu == 0 {
            return Err(Error::invalid("path: an MTU is 0"));
        }
        Ok(Path {
            eth_dst: arrival.eth_dst,
            vlan: arrival.vlan,
            ingress_mtu: self.ingress_mtu,
            forward: Forward {
                egress: port(self.egress)?,
                vlan: vlan(self.vlan_out)?,
                mtu: self.mtu,
                tuple: conn.leaving(d),
                macs: routed.then_some(macs),
                egress_decides: false,
            },
            next_hop: None,
            iif: None,
            oif: None,
            answer: self.answer,
        })
    }

    /// What an offer with this path says.
    pub(crate) fn spec(&self, conn: &Conn, d: Direction) -> Result<PathSpec> {
        unused("ctoffload_path", &[self.flags & !(PATH_ETH_DST | PATH_ROUTED), self.reserved])?;
        Ok(match self.kind {
            FORWARD => PathSpec::Known(Box::new(self.path(conn, d)?)),
            TRACK => PathSpec::Track(Box::new(self.arrival()?)),
            RESOLVE => PathSpec::Resolve(self.hint()?),
            REFUSED => PathSpec::Refused(Box::new(self.refusal()?)),
            other => return Err(Error::invalid(format!("path: there is no kind {other}"))),
        })
    }

    pub(crate) fn refusal(&self) -> Result<Rejection> {
        let reason = u8::try_from(self.reason).ok().and_then(Reason::from_number);
        let reason =
            reason.ok_or_else(|| Error::invalid(format!("path: {} is no reason", self.reason)))?;
        Ok(rejection(reason as c_int, None))
    }

    /// What of it comes back to `resolve`.
    fn hint(&self) -> Result<PathHint> {
        Ok(PathHint {
            ingress: None,
            eth_dst: self.eth_dst(),
            egress: port_of(self.egress),
            mark: Some(self.mark),
            bridged: self.flags & PATH_ROUTED == 0,
            vlan: vlan(self.vlan_in)?.map(VlanId::get),
            firewall: Some(u64::from(self.answer)),
        })
    }

    pub(crate) fn of_hint(hint: &PathHint) -> Self {
        let eth_dst = if hint.eth_dst.is_some() { PATH_ETH_DST } else { 0 };
        let routed = if hint.bridged { 0 } else { PATH_ROUTED };
        Self {
            kind: RESOLVE,
            flags: eth_dst | routed,
            egress: hint.egress.map_or(0, Ifindex::get),
            vlan_in: hint.vlan.unwrap_or_default(),
            eth_dst: raw_mac(hint.eth_dst),
            answer: hint.firewall.and_then(|n| u16::try_from(n).ok()).unwrap_or_default(),
            mark: hint.mark.unwrap_or_default(),
            ..Self::empty()
        }
    }
}

impl RawSight {
    pub(crate) fn new(conn: &ConnHandle, port: Ifindex, generation: u32, d: Direction) -> Self {
        Self { conn: conn.as_ptr(), port: port.get(), generation, direction: d as u32, reserved: 0 }
    }

    pub(crate) fn of(sight: &Sight) -> Self {
        Self::new(&sight.conn, sight.ifindex, sight.generation.get(), sight.direction)
    }
}

impl RawFlow {
    pub(crate) fn of(flow: &Flow) -> Self {
        let Forward { egress, vlan, mtu, tuple, macs, .. } = flow.forward;
        let routed = if macs.is_some() { FLOW_ROUTED } else { 0 };
        let tracked =
            Tracked { zone: flow.zone, direction: flow.direction, matches: flow.matches, tuple };
        let as_tracked = Self::of_tracked(&tracked);
        Self {
            kind: FORWARD,
            flags: as_tracked.flags | routed,
            egress: egress.get(),
            ingress_mtu: flow.ingress_mtu,
            mtu,
            vlan_out: raw_vlan(vlan),
            mac_src: raw_mac(macs.map(|m| m.src)),
            mac_dst: raw_mac(macs.map(|m| m.dst)),
            ..as_tracked
        }
    }

    pub(crate) fn of_tracked(tracked: &Tracked) -> Self {
        let matches = &tracked.matches;
        let eth_dst = if matches.eth_dst.is_some() { FLOW_ETH_DST } else { 0 };
        let nat = if matches.tuple != tracked.tuple { FLOW_NAT } else { 0 };
        Self {
            size: size::<Self>(),
            kind: TRACK,
            flags: eth_dst | nat,
            egress: 0,
            ingress_mtu: 0,
            mtu: 0,
            vlan_in: raw_vlan(matches.vlan),
            vlan_out: 0,
            zone: tracked.zone.0,
            direction: tracked.direction as u16,
            eth_dst: raw_mac(matches.eth_dst),
            mac_src: [0; 6],
            mac_dst: [0; 6],
            arriving: RawTuple::of(&matches.tuple),
            leaving: RawTuple::of(&tracked.tuple),
            reserved: 0,
        }
    }
}

/// The cookie that a provider reports; `None`: it is none of ours.
pub(crate) fn cookie(raw: &[u8; 16]) -> Option<Cookie> {
    Cookie::from_bytes(raw)
}
