//! Connections.

use std::ffi::c_int;
use std::mem::ManuallyDrop;
use std::ops::Deref;

use engine::engine::conn::{ConnArc, ConnHandle, ConnKey};
use engine::engine::taken::TakenBack;
use engine::engine::usage::{Usage, extended_expiry};
use netdev_providers::Zone;
use nix::errno::Errno;

use crate::edge::{self, Array, Error, Result, guarded, guarded_or};
use crate::engine::{Opened, opened};
use crate::values::{
    ConnPtr, NewConn, RawSlot, RawSlotState, RawUse, direction, port, raw_in_hw, size,
};

/// A connection of which the caller holds the reference.
pub(crate) struct Borrowed(ManuallyDrop<ConnHandle>);

impl Deref for Borrowed {
    type Target = ConnHandle;
    fn deref(&self) -> &ConnHandle {
        &self.0
    }
}

/// # Safety
/// It is NULL, or a connection of which somebody holds a reference for as long as the result is used.
pub(crate) unsafe fn borrowed(conn: ConnPtr) -> Result<Borrowed> {
    if conn.is_null() {
        return Err(Error::invalid("the connection is NULL"));
    }
    // SAFETY: `given` made it of an `Arc`, of which it is a reference that is not counted here, nor given back.
    Ok(Borrowed(ManuallyDrop::new(ConnHandle::from(unsafe { ConnArc::from_raw(conn) }))))
}

/// The reference becomes the caller's.
fn given(conn: ConnHandle) -> ConnPtr {
    ConnArc::into_raw(conn.into())
}

/// The connection of this zone, tuple and tag.
///
/// # Safety
/// As of [`opened`]; `new` is NULL or of its size, `out` NULL or a place for a pointer.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_conn_create(
    engine: *const Opened,
    new: *const NewConn,
    out: *mut ConnPtr,
) -> c_int {
    guarded(|| {
        // SAFETY: as above.
        let (opened, new) = unsafe { (opened(engine)?, edge::read(new)?) };
        edge::unused("ctoffload_new_conn", &[new.reserved.into(), new.reserved2])?;
        let key = ConnKey { zone: Zone(new.zone), original: new.original.get()? };
        let reply = new.reply.get()?;
        if out.is_null() {
            return Err(Error::invalid("there is no place for the connection"));
        }
        let conn = opened.engine.conn_create(key, reply, new.tag);
        let full = || Error::new(Errno::ENOSPC, "as many connections are kept as may be");
        // SAFETY: it is not NULL, and so a place for a pointer.
        unsafe { out.write(given(conn.ok_or_else(full)?)) };
        Ok(())
    })
}

/// One more reference.
///
/// # Safety
/// As of [`borrowed`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_conn_ref(conn: ConnPtr) {
    guarded_or((), || {
        // SAFETY: as above.
        if let Ok(conn) = unsafe { borrowed(conn) } {
            let _ = given(ConnHandle::clone(&conn));
        }
    });
}

/// One reference less.
///
/// # Safety
/// It is NULL, or a reference of the caller's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_conn_unref(conn: ConnPtr) {
    guarded_or((), || {
        if !conn.is_null() {
            // SAFETY: `given` made it of an `Arc`.
            drop(unsafe { ConnArc::from_raw(conn) });
        }
    });
}

/// Which incarnation it is.
///
/// # Safety
/// As of [`borrowed`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_conn_epoch(conn: ConnPtr) -> u64 {
    // SAFETY: as above.
    guarded_or(0, || unsafe { conn.as_ref() }.map_or(0, |conn| conn.epoch().0))
}

/// When connections were last used.
///
/// # Safety
/// As of [`opened`]; `uses` are `n`, of the size that they say, with connections that the caller holds.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_conn_update(
    engine: *const Opened,
    uses: *mut RawUse,
    n: usize,
) -> c_int {
    guarded(|| {
        // SAFETY: as above.
        let (opened, uses) = unsafe { (opened(engine)?, Array::new(uses, n)?) };
        let raw = (0..uses.len()).map(|at| uses.read(at)).collect::<Result<Vec<_>>>()?;
        if raw.iter().any(|raw| raw.conn.is_null()) {
            return Err(Error::invalid("a connection is NULL"));
        }
        for (at, raw) in raw.into_iter().enumerate() {
            // SAFETY: as above.
            let usage = opened.engine.conn_update(&*unsafe { borrowed(raw.conn) }?);
            // SAFETY: of the array.
            unsafe { edge::write(uses.at(at), &told(raw, usage)) }?;
        }
        Ok(())
    })
}

fn told(raw: RawUse, usage: Usage) -> RawUse {
    let raw = RawUse { usage: 0, last_used_ms: 0, packets: 0, bytes: 0, ..raw };
    match usage {
        Usage::NotOffloaded => raw,
        Usage::Unknown => RawUse { usage: 1, ..raw },
        Usage::LastUsed { at_ms, packets, bytes } => {
            RawUse { usage: 2, last_used_ms: at_ms, packets, bytes, ..raw }
        }
    }
}

/// When a connection may expire.
///
/// # Safety
/// `usage` is NULL or of its size.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_extended_expiry(
    expiry_ms: u64,
    usage: *const RawUse,
    timeout_ms: u64,
    now_ms: u64,
) -> u64 {
    guarded_or(expiry_ms, || {
        // SAFETY: as above.
        let usage = match unsafe { edge::read(usage) } {
            Ok(RawUse { usage: 1, .. }) => Usage::Unknown,
            Ok(RawUse { usage: 2, last_used_ms: at_ms, packets, bytes, .. }) => {
                Usage::LastUsed { at_ms, packets, bytes }
            }
            _ => Usage::NotOffloaded,
        };
        extended_expiry(expiry_ms, usage, timeout_ms, now_ms)
    })
}

/// # Safety
/// As of [`opened`]; `conns` are `n` connections that the caller holds, `rules` is NULL or a place for a number.
unsafe fn each(
    engine: *const Opened,
    conns: *const ConnPtr,
    n: usize,
    rules: *mut u64,
    what: impl Fn(&Opened, &ConnHandle) -> usize,
) -> c_int {
    guarded(|| {
        // SAFETY: as above.
        let (opened, conns) = unsafe { (opened(engine)?, edge::array(conns, n, "conns")?) };
        if conns.iter().any(|conn| conn.is_null()) {
            return Err(Error::invalid("a connection is NULL"));
        }
        let mut sum = 0;
        for conn in conns {
            // SAFETY: as above.
            sum += what(opened, &*unsafe { borrowed(*conn) }?) as u64;
        }
        if !rules.is_null() {
            // SAFETY: as above.
            unsafe { rules.write(sum) };
        }
        Ok(())
    })
}

/// Connections have ended.
///
/// # Safety
/// As of `each`, in this file, and the header.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_conn_del(
    engine: *const Opened,
    conns: *const ConnPtr,
    n: usize,
    rules: *mut u64,
) -> c_int {
    // SAFETY: as above.
    unsafe { each(engine, conns, n, rules, |opened, conn| opened.engine.conn_del(conn)) }
}

/// Connections go on in software.
///
/// # Safety
/// As of `each`, in this file, and the header.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_conn_retract(
    engine: *const Opened,
    conns: *const ConnPtr,
    n: usize,
    rules: *mut u64,
) -> c_int {
    // SAFETY: as above.
    unsafe {
        each(engine, conns, n, rules, |opened, conn| {
            opened.engine.conn_retract(conn, TakenBack::Asked)
        })
    }
}

/// The state of one slot.
///
/// # Safety
/// As of [`opened`]; `slot` is NULL or one, with a connection that the caller holds; `state` is NULL or of its size.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_slot_state(
    engine: *const Opened,
    slot: *const RawSlot,
    id: u32,
    state: *mut RawSlotState,
) -> c_int {
    guarded(|| {
        // SAFETY: as above.
        let (opened, slot) = unsafe { (opened(engine)?, edge::reference(slot, "the slot")?) };
        edge::unused("ctoffload_slot", &[slot.reserved])?;
        let (port, d) = (port(id)?, direction(slot.direction)?);
        // SAFETY: as above.
        let conn = unsafe { borrowed(slot.conn) }?;
        let slots = opened.engine.slots(&conn);
        let found = slots.into_iter().find(|s| s.netdev.ifindex == port && s.direction == d);
        let empty = RawSlotState {
            size: size::<RawSlotState>(),
            state: 0,
            reason: 0,
            in_hw: -1,
            rule: 0,
            packets: 0,
            bytes: 0,
        };
        let value = found.map_or(empty, |s| RawSlotState {
            state: s.state as u32,
            reason: s.rejection.map_or(0, |why| why.reason as u32),
            in_hw: raw_in_hw(s.in_hw),
            rule: s.rule.map_or(0, |rule| rule.0),
            packets: s.packets,
            bytes: s.bytes,
            ..empty
        });
        // SAFETY: as above.
        unsafe { edge::write(state, &value) }
    })
}
