//! Workers: what packet threads call.

use std::borrow::Borrow;
use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use engine::engine::datapath::PathSpec;
use engine::engine::worker::{Offer, PortRef, Worker};
use netdev_providers::{Direction, Generation};
use nix::errno::Errno;

use crate::conn::{Borrowed, borrowed};
use crate::edge::{self, Array, Error, Result, failed, guarded, guarded_lean, guarded_or};
use crate::engine::{Opened, opened};
use crate::values::{ConnPtr, PortValue, RawOffer, RawSlot, direction, port_of};

/// What `struct ctoffload_worker` is.
pub(crate) struct Hired {
    worker: Worker,
    workers: Arc<AtomicUsize>,
}

impl Drop for Hired {
    fn drop(&mut self) {
        // Release: what it did comes before what is done without it.
        self.workers.fetch_sub(1, Ordering::Release);
    }
}

/// # Safety
/// It is NULL, or `ctoffload_worker_create` gave it, and it is this thread's, and no other's, for `'a`.
unsafe fn hired<'a>(worker: *const Hired) -> Result<&'a Hired> {
    // SAFETY: as above.
    unsafe { edge::reference(worker, "the worker") }
}

/// The same, for what changes the view.
///
/// # Safety
/// As of [`hired`].
unsafe fn with(worker: *mut Hired, change: impl FnOnce(&mut Worker)) {
    guarded_or((), || {
        // SAFETY: as above.
        if let Some(hired) = unsafe { worker.as_mut() } {
            change(&mut hired.worker);
        }
    });
}

impl Hired {
    /// The port, if this is still the life of it that the value is of.
    fn port(&self, value: &PortValue) -> Result<PortRef<'_>> {
        let port = port_of(value.id).and_then(|id| self.worker.port(id));
        port.filter(|port| port.generation().get() == value.generation).ok_or_else(|| {
            Error::new(Errno::ESTALE, format!("port {:#x} is gone, or another by now", value.id))
        })
    }
}

/// A view of the ports for one more packet thread.
///
/// # Safety
/// As of [`opened`]; `out` is NULL or a place for a pointer.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_worker_create(
    engine: *const Opened,
    out: *mut *mut Hired,
) -> c_int {
    guarded(|| {
        // SAFETY: as above.
        let opened = unsafe { opened(engine) }?;
        if out.is_null() {
            return Err(Error::invalid("there is no place for the worker"));
        }
        opened.workers.fetch_add(1, Ordering::Relaxed);
        let hired = Hired { worker: opened.engine.worker(), workers: Arc::clone(&opened.workers) };
        // SAFETY: it is not NULL, and so a place for a pointer.
        unsafe { out.write(Box::into_raw(Box::new(hired))) };
        Ok(())
    })
}

/// Ends a worker.
///
/// # Safety
/// As of [`hired`], and it is not used any more.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_worker_destroy(worker: *mut Hired) {
    guarded_or((), || {
        if !worker.is_null() {
            // SAFETY: `ctoffload_worker_create` made it of a box.
            drop(unsafe { Box::from_raw(worker) });
        }
    });
}

/// Nothing is held from before this call.
///
/// # Safety
/// As of [`hired`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_worker_quiescent(worker: *mut Hired) {
    // Almost always, and nothing of it can panic.
    // SAFETY: as above.
    if unsafe { worker.as_ref() }.is_some_and(|hired| hired.worker.is_current()) {
        return;
    }
    // SAFETY: as above.
    unsafe { with(worker, Worker::quiescent) }
}

/// About to block.
///
/// # Safety
/// As of [`hired`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_worker_offline(worker: *mut Hired) {
    // SAFETY: as above.
    unsafe { with(worker, Worker::offline) }
}

/// Back from blocking.
///
/// # Safety
/// As of [`hired`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_worker_online(worker: *mut Hired) {
    // SAFETY: as above.
    unsafe { with(worker, Worker::online) }
}

/// The port of this number.
///
/// # Safety
/// As of [`hired`]; `out` is NULL or a place for one.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_worker_port(
    worker: *const Hired,
    id: u32,
    out: *mut PortValue,
) -> c_int {
    guarded_lean(|| {
        // SAFETY: as above.
        let Some(hired) = (unsafe { worker.as_ref() }) else {
            return failed(&Error::invalid("the worker is NULL"));
        };
        if out.is_null() {
            return failed(&Error::invalid("there is no place for the port"));
        }
        let found = port_of(id).and_then(|id| hired.worker.port(id));
        // No port has generation 0.
        let value = PortValue {
            id,
            generation: found.map_or(0, |port| port.generation().get()),
            bound: found.is_some_and(|port| port.is_bound()).into(),
        };
        // SAFETY: it is not NULL, and so a place for one.
        unsafe { out.write(value) };
        if found.is_some() { 0 } else { failed(&no_port(id)) }
    })
}

#[cold]
fn no_port(id: u32) -> Error {
    Error::new(Errno::ENODEV, format!("there is no port {id:#x}"))
}

const QUEUED: u8 = 1;
const DECIDED: u8 = 2;
const UNBOUND: u8 = 3;
const NOT_NOW: u8 = 4;

fn told(offer: Offer) -> (u8, u8) {
    match offer {
        Offer::Queued => (QUEUED, 0),
        Offer::Decided => (DECIDED, 0),
        Offer::Unbound => (UNBOUND, 0),
        Offer::Refused(reason) => (NOT_NOW, reason as u8),
    }
}

/// Writes what became of an offer.
///
/// # Safety
/// It is the place of an offer.
unsafe fn tell(offer: *mut RawOffer, (result, reason): (u8, u8)) {
    // SAFETY: as above.
    unsafe {
        (&raw mut (*offer).result).write(result);
        (&raw mut (*offer).reason).write(reason);
    }
}

/// One that the port's provider may have to be asked for.
struct Undecided {
    at: usize,
    conn: Borrowed,
    direction: Direction,
    spec: PathSpec,
}

impl Borrow<engine::engine::conn::ConnHandle> for Borrowed {
    fn borrow(&self) -> &engine::engine::conn::ConnHandle {
        self
    }
}

/// # Safety
/// As of [`hired`]; `port` is NULL or one; `offers` are `n`, of the size that they say, with the connections and
/// paths that the header says.
unsafe fn offer(
    worker: *const Hired,
    port: *const PortValue,
    offers: *mut RawOffer,
    n: usize,
) -> c_int {
    guarded(|| {
        // SAFETY: as above.
        let (hired, value) = unsafe { (hired(worker)?, edge::reference(port, "the port")?) };
        let port = hired.port(value)?;
        // SAFETY: as above.
        let offers = unsafe { Array::new(offers, n) }?;
        let mut undecided = Vec::new();
        let mut decided = Vec::new();
        for at in 0..offers.len() {
            let raw = offers.read(at)?;
            edge::unused("ctoffload_offer", &[raw.reserved.into()])?;
            let d = direction(raw.direction.into())?;
            // SAFETY: as above: the caller holds a reference as long as this call lasts.
            let conn = unsafe { borrowed(raw.conn) }?;
            if !port.is_bound() {
                decided.push((at, UNBOUND));
            } else if port.is_decided(&conn, d) {
                decided.push((at, DECIDED));
            } else {
                // SAFETY: as above.
                let spec = unsafe { edge::read(raw.path) }?.spec(&conn, d)?;
                undecided.push(Undecided { at, conn, direction: d, spec });
            }
        }
        // Nothing fails from here on.
        for (at, result) in decided {
            // SAFETY: of the array.
            unsafe { tell(offers.at(at), (result, 0)) };
        }
        let places: Vec<_> = undecided.iter().map(|u| offers.at(u.at)).collect();
        let mut places = places.into_iter();
        let offered = undecided.into_iter().map(|u| (u.conn, u.direction, u.spec));
        port.offer_batch(offered, |offer| {
            if let Some(place) = places.next() {
                // SAFETY: of the array.
                unsafe { tell(place, told(offer)) };
            }
        });
        Ok(())
    })
}

/// Connections that packets on this port have created.
///
/// # Safety
/// As of `offer`, in this file, and the header.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_conn_add(
    worker: *mut Hired,
    port: *const PortValue,
    offers: *mut RawOffer,
    n: usize,
) -> c_int {
    // SAFETY: as above.
    unsafe { offer(worker, port, offers, n) }
}

/// Connections of which packets were seen on this port.
///
/// # Safety
/// As of `offer`, in this file, and the header.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_conn_seen(
    worker: *mut Hired,
    port: *const PortValue,
    offers: *mut RawOffer,
    n: usize,
) -> c_int {
    // SAFETY: as above.
    unsafe { offer(worker, port, offers, n) }
}

/// Whether an offer would be taken.
///
/// # Safety
/// As of `offer`, in this file, and the header.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_can_offload(
    worker: *const Hired,
    port: *const PortValue,
    offer: *mut RawOffer,
) -> c_int {
    guarded(|| {
        // SAFETY: as above.
        let (hired, value) = unsafe { (hired(worker)?, edge::reference(port, "the port")?) };
        let port = hired.port(value)?;
        // SAFETY: as above.
        let offers = unsafe { Array::new(offer, 1) }?;
        let raw = offers.read(0)?;
        let d = direction(raw.direction.into())?;
        // SAFETY: as above.
        let (conn, path) = unsafe { (borrowed(raw.conn)?, edge::read(raw.path)?) };
        let taken = match path.spec(&conn, d)? {
            PathSpec::Known(path) => port.can_offload(&conn, d, &path),
            PathSpec::Track(arrival) => port.can_track(&conn, d, *arrival),
            PathSpec::Refused(why) => Err(*why),
            PathSpec::Resolve(_) => return Err(Error::invalid("its path is not known yet")),
        };
        let reason = taken.as_ref().err().map_or(0, |why| why.reason as u8);
        // SAFETY: of the array.
        unsafe { tell(offers.at(0), (0, reason)) };
        taken.map_err(|why| Error::from(&why))
    })
}

/// Replies were seen.
///
/// # Safety
/// As of [`hired`]; `port` is NULL or one, `slots` are `n`, with connections that the caller holds.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_conn_established(
    worker: *mut Hired,
    port: *const PortValue,
    slots: *const RawSlot,
    n: usize,
) -> c_int {
    guarded(|| {
        // SAFETY: as above.
        let (hired, value) = unsafe { (hired(worker)?, edge::reference(port, "the port")?) };
        let port = hired.port(value)?;
        // SAFETY: as above.
        let slots = unsafe { edge::array(slots, n, "the array of slots") }?;
        let mut seen = Vec::with_capacity(n);
        for slot in slots {
            edge::unused("ctoffload_slot", &[slot.reserved])?;
            // SAFETY: as above.
            seen.push((unsafe { borrowed(slot.conn) }?, direction(slot.direction)?));
        }
        for (conn, d) in &seen {
            port.conn_established(conn, *d);
        }
        Ok(())
    })
}

/// Whether a packet needs nothing more, where the first slot does not tell.
///
/// # Safety
/// `conn` is NULL, or a connection that the caller holds.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_is_decided_further(
    generation: u32,
    conn: ConnPtr,
    direction: u32,
) -> bool {
    guarded_or(false, || {
        // SAFETY: as above.
        let Some(conn) = (unsafe { conn.as_ref() }) else { return false };
        let d = if direction == 0 { Direction::Original } else { Direction::Reply };
        Generation::new(generation).is_some_and(|generation| conn.is_decided(generation, d))
    })
}
