//! The engine and its ports.

use std::collections::hash_map::RandomState;
use std::ffi::{c_char, c_int};
use std::hash::{BuildHasher, Hasher};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use engine::engine::clock::Clock;
use engine::engine::datapath::{Datapath, NoDatapath};
use engine::engine::registry::RegistryError;
use engine::engine::taken::TakenBack;
use engine::engine::usage::Strays;
use engine::engine::view::PortView;
use engine::engine::{Engine, FlushFilter, Limits, NewPort, NoSuchPort, PortAddError, PortDeleted};
use netdev_providers::Zone;
use nix::errno::Errno;

use crate::datapath::CDatapath;
use crate::edge::{self, Error, Result, guarded, guarded_or};
use crate::provider::Class;
use crate::values::{
    ClassTable, Config, DatapathTable, Filter, NewPortValue, PortDeletedValue, PortStats, Swept,
    hw_flags, port, size,
};

/// What `struct ctoffload` is.
pub(crate) struct Opened {
    pub(crate) engine: Engine,
    /// How many workers there are.
    pub(crate) workers: Arc<AtomicUsize>,
    strays: Mutex<Strays>,
}

/// The engine that a pointer of the caller's stands for.
///
/// # Safety
/// It is NULL, or `ctoffload_open` gave it, and it is not closed for `'a`.
pub(crate) unsafe fn opened<'a>(engine: *const Opened) -> Result<&'a Opened> {
    // SAFETY: as above. Nothing of it is ever changed but behind locks.
    unsafe { edge::reference(engine, "the engine") }
}

impl From<RegistryError> for Error {
    fn from(e: RegistryError) -> Self {
        let errno = match &e {
            RegistryError::Duplicate(_) => Errno::EEXIST,
            RegistryError::Init { source, .. } => source.errno.unwrap_or(Errno::EIO),
            RegistryError::Unknown { .. } => Errno::ENOENT,
            RegistryError::InUse { .. } => Errno::EBUSY,
        };
        let cause = match &e {
            RegistryError::Init { source, .. } => format!(": {source}"),
            _ => String::new(),
        };
        Self::new(errno, format!("{e}{cause}"))
    }
}

impl From<NoSuchPort> for Error {
    fn from(e: NoSuchPort) -> Self {
        Self::new(Errno::ENODEV, e.to_string())
    }
}

fn port_add_error(e: PortAddError) -> Error {
    let errno = match e {
        PortAddError::AlreadyBound { .. } => Errno::EEXIST,
        PortAddError::Registry(e) => return e.into(),
        PortAddError::Busy(_) => Errno::EBUSY,
        PortAddError::Thread(_) => Errno::EAGAIN,
    };
    Error::new(errno, e.to_string())
}

/// Nothing that anybody could guess or has had before.
fn random_instance() -> NonZeroU32 {
    loop {
        let bits = RandomState::new().build_hasher().finish();
        if let Some(instance) = u32::try_from(bits & 0xffff_ffff).ok().and_then(NonZeroU32::new) {
            return instance;
        }
    }
}

fn limits(config: &Config) -> Result<Limits> {
    let Limits { connections, queue, port_del, complete } = Limits::default();
    let or = |ms: u32, default| if ms == 0 { default } else { Duration::from_millis(ms.into()) };
    let too_many = |_| Error::invalid("more connections than there is memory");
    Ok(Limits {
        connections: match config.connections {
            0 => connections,
            n => usize::try_from(n).map_err(too_many)?,
        },
        queue: if config.queue == 0 { queue } else { config.queue as usize },
        port_del: or(config.port_del_ms, port_del),
        complete: or(config.complete_ms, complete),
    })
}

/// Makes an engine.
///
/// # Safety
/// As the header says: `config` and `datapath` are NULL or of their size, `out` is NULL or a place for a pointer.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_open(
    config: *const Config,
    datapath: *const DatapathTable,
    out: *mut *mut Opened,
) -> c_int {
    guarded(|| {
        // SAFETY: as above.
        let config = unsafe { edge::read(config) }?;
        edge::unused("ctoffload_config", &[config.reserved])?;
        let datapath: Arc<dyn Datapath> = if datapath.is_null() {
            Arc::new(NoDatapath)
        } else {
            // SAFETY: as above.
            let table = unsafe { edge::read(datapath) }?;
            edge::unused("ctoffload_datapath", &[table.reserved])?;
            Arc::new(CDatapath(table))
        };
        if out.is_null() {
            return Err(Error::invalid("there is no place for the engine"));
        }
        let instance = NonZeroU32::new(config.instance).unwrap_or_else(random_instance);
        let engine = Engine::new(instance, datapath, limits(&config)?, Clock::default());
        let opened = Opened { engine, workers: Arc::default(), strays: Mutex::default() };
        // SAFETY: it is not NULL, and so a place for a pointer.
        unsafe { out.write(Box::into_raw(Box::new(opened))) };
        Ok(())
    })
}

/// Ends an engine.
///
/// # Safety
/// As of [`opened`]; and nobody uses it at the same time.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_close(engine: *mut Opened) -> c_int {
    guarded(|| {
        // SAFETY: as above.
        let opened = unsafe { opened(engine) }?;
        let workers = opened.workers.load(Ordering::Acquire);
        if workers > 0 {
            return Err(Error::new(Errno::EBUSY, format!("there are {workers} workers")));
        }
        opened.engine.close();
        for (class, _) in opened.engine.classes() {
            // One whose provider has not come back yet stays: it is still called.
            let _ = opened.engine.unregister(class);
        }
        // SAFETY: `ctoffload_open` made it of a box, and it is not used any more.
        drop(unsafe { Box::from_raw(engine) });
        Ok(())
    })
}

/// The engine's clock.
///
/// # Safety
/// As of [`opened`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_now_ms(engine: *const Opened) -> u64 {
    // SAFETY: as above.
    guarded_or(0, || unsafe { opened(engine) }.map_or(0, |opened| opened.engine.now_ms()))
}

/// The `CTOFFLOAD_ABI` of this library.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn ctoffload_abi() -> u32 {
    0
}

/// Registers a class.
///
/// # Safety
/// As of [`opened`]; `class` is NULL or of its size, and what it points to is what the header says.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_register(
    engine: *const Opened,
    class: *const ClassTable,
) -> c_int {
    guarded(|| {
        // SAFETY: as above.
        let (opened, class) = unsafe { (opened(engine)?, Class::new(edge::read(class)?)?) };
        Ok(opened.engine.register(Arc::new(class))?)
    })
}

/// Unregisters a class.
///
/// # Safety
/// As of [`opened`]; `name` is NULL or a string.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_unregister(
    engine: *const Opened,
    name: *const c_char,
) -> c_int {
    guarded(|| {
        // SAFETY: as above.
        let (opened, name) = unsafe { (opened(engine)?, edge::text(name)) };
        let name = name.ok_or_else(|| Error::invalid("the class's name is NULL"))?;
        Ok(opened.engine.unregister(&name)?)
    })
}

/// The names of a list that ends with NULL.
///
/// # Safety
/// It is NULL, or such a list of strings.
unsafe fn names(list: *const *const c_char) -> Option<Vec<String>> {
    if list.is_null() {
        return None;
    }
    let mut names = Vec::new();
    loop {
        // SAFETY: the list goes on as long as no NULL has come.
        match unsafe { edge::text(*list.add(names.len())) } {
            Some(name) => names.push(name.into_owned()),
            None => return Some(names),
        }
    }
}

/// Attaches a port.
///
/// # Safety
/// As of [`opened`]; `new` is NULL or of its size, with the strings that the header says; `generation` is NULL or
/// a place for a number.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_port_add(
    engine: *const Opened,
    new: *const NewPortValue,
    generation: *mut u32,
) -> c_int {
    guarded(|| {
        // SAFETY: as above.
        let (opened, new) = unsafe { (opened(engine)?, edge::read(new)?) };
        let ifindex = port(new.id)?;
        // SAFETY: as above.
        let (name, providers) = unsafe { (edge::text(new.name), names(new.providers)) };
        let added = opened.engine.port_add(NewPort {
            ifindex,
            name: name.map_or_else(|| ifindex.to_string(), Into::into),
            hw_flags: hw_flags(new.hw_flags)?,
            providers,
            capacity: (new.capacity > 0).then_some(new.capacity),
        });
        let added = added.map_err(port_add_error)?;
        if !generation.is_null() {
            // SAFETY: as above.
            unsafe { generation.write(added.get()) };
        }
        Ok(())
    })
}

/// Deletes a port.
///
/// # Safety
/// As of [`opened`]; `deleted` is NULL or of its size.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_port_del(
    engine: *const Opened,
    id: u32,
    deleted: *mut PortDeletedValue,
) -> c_int {
    guarded(|| {
        // SAFETY: as above.
        let opened = unsafe { opened(engine) }?;
        let PortDeleted { flushed, retracted, faults, .. } = opened.engine.port_del(port(id)?)?;
        if deleted.is_null() {
            return Ok(());
        }
        let faults = u32::try_from(faults.len()).unwrap_or(u32::MAX);
        let value =
            PortDeletedValue { size: size::<PortDeletedValue>(), faults, flushed, retracted };
        // SAFETY: as above.
        unsafe { edge::write(deleted, &value) }
    })
}

/// What there is to tell of a port.
///
/// # Safety
/// As of [`opened`]; `stats` is NULL or of its size.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_port_stats(
    engine: *const Opened,
    id: u32,
    stats: *mut PortStats,
) -> c_int {
    guarded(|| {
        // SAFETY: as above.
        let opened = unsafe { opened(engine) }?;
        let ifindex = port(id)?;
        let PortView {
            netdev,
            provider,
            fault,
            slow,
            slots,
            in_hw,
            evictions,
            sights,
            totals,
            packets,
            bytes,
            ..
        } = opened.engine.port_view(ifindex).ok_or(NoSuchPort(ifindex))?;
        let value = PortStats {
            size: size::<PortStats>(),
            generation: netdev.generation.get(),
            bound: provider.is_some().into(),
            faulty: fault.is_some().into(),
            slow: slow.is_some().into(),
            reserved: 0,
            pending: slots.pending,
            installed: slots.installed,
            rejected: slots.rejected,
            deleting: slots.deleting,
            in_hw,
            sights,
            adds: totals.adds,
            deletes: totals.deletes,
            evictions,
            rejections: totals.reasons.iter().map(|(_, n)| n).sum(),
            packets,
            bytes,
        };
        // SAFETY: as above.
        unsafe { edge::write(stats, &value) }
    })
}

fn flush_filter(filter: &Filter) -> Result<FlushFilter> {
    const PORT: u32 = 1;
    const ZONE: u32 = 2;
    const TUPLE: u32 = 4;
    let has = |field| filter.fields & field != 0;
    let unknown = filter.fields & !(PORT | ZONE | TUPLE);
    let unused = [unknown, filter.reserved.into(), filter.reserved2.into()];
    edge::unused("ctoffload_filter", &unused)?;
    Ok(FlushFilter {
        why: TakenBack::Asked,
        port: if has(PORT) { Some(port(filter.port)?) } else { None },
        zone: has(ZONE).then_some(Zone(filter.zone)),
        tuple: if has(TUPLE) { Some(filter.tuple.get()?) } else { None },
    })
}

/// Takes rules away.
///
/// # Safety
/// As of [`opened`]; `filter` is NULL or of its size, `flushed` NULL or a place for a number.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_flush(
    engine: *const Opened,
    filter: *const Filter,
    flushed: *mut u64,
) -> c_int {
    guarded(|| {
        // SAFETY: as above.
        let opened = unsafe { opened(engine) }?;
        let filter = if filter.is_null() {
            FlushFilter::default()
        } else {
            // SAFETY: as above.
            flush_filter(&unsafe { edge::read(filter) }?)?
        };
        let ports = opened.engine.flush(&filter)?;
        if !flushed.is_null() {
            // SAFETY: as above.
            unsafe { flushed.write(ports.iter().map(|(_, n)| n).sum()) };
        }
        Ok(())
    })
}

/// Reads the counters of every rule.
///
/// # Safety
/// As of [`opened`]; `swept` is NULL or of its size.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_sweep(engine: *const Opened, swept: *mut Swept) -> c_int {
    guarded(|| {
        // SAFETY: as above.
        let opened = unsafe { opened(engine) }?;
        let mut strays = opened.strays.lock().unwrap_or_else(PoisonError::into_inner);
        let sweep = opened.engine.sweep(&mut strays);
        drop(strays);
        if swept.is_null() {
            return Ok(());
        }
        let value = Swept {
            size: size::<Swept>(),
            faults: u32::try_from(sweep.faults.len()).unwrap_or(u32::MAX),
            rules: sweep.rules,
            used: sweep.used.len() as u64,
            strays: sweep.strays,
            lost: sweep.lost,
        };
        // SAFETY: as above.
        unsafe { edge::write(swept, &value) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_are_drawn_at_random() {
        assert_ne!((random_instance(), random_instance()), (random_instance(), random_instance()));
    }
}
