//! Backends of the caller's, as the traits that the engine calls.

use std::collections::BTreeSet;
use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use netdev_providers::{
    BindError, Counters, Done, Fault, Flow, Ifindex, Instance, Netdev, Operation, Provider,
    ProviderClass, Reason, Rejection, Request, RuleId, RuleReport, Ticket, Tracked,
};
use nix::errno::Errno;

use crate::edge::{self, answered, called, fault, guarded_or, rejection};
use crate::values::{
    ClassTable, RawFlow, RawNetdev, RawOp, RawReport, cookie, in_hw, raw_hw_flags, size,
};

/// A kind of backend.
pub(crate) struct Class {
    table: Table,
    name: &'static str,
}

/// The caller's table, and of a provider its first argument.
#[derive(Clone, Copy)]
struct Table {
    raw: ClassTable,
    submit: unsafe extern "C" fn(*mut c_void, *const *mut RawOp, usize),
    usage: unsafe extern "C" fn(*mut c_void, crate::values::ReportFn, *mut c_void) -> c_int,
    flush: unsafe extern "C" fn(*mut c_void, *mut u64) -> c_int,
    release: unsafe extern "C" fn(*mut c_void) -> c_int,
    bind: unsafe extern "C" fn(*mut c_void, *const RawNetdev, *mut *mut c_void) -> c_int,
}

// SAFETY: the header says on which threads each callback is called, at the same time as which, and demands
// that the table and `ctx` are good for it.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

/// The contract wants a name that lives for ever: each is kept once, however often it is registered.
fn for_ever(name: &str) -> &'static str {
    static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = names.get(name) {
        return known;
    }
    let kept: &'static str = Box::leak(Box::from(name));
    names.insert(kept);
    kept
}

impl Class {
    /// A class of this table.
    ///
    /// # Safety
    /// The table's name is NULL or a string.
    pub(crate) unsafe fn new(raw: ClassTable) -> edge::Result<Self> {
        edge::unused("ctoffload_class", &[raw.reserved])?;
        let (Some(bind), Some(submit), Some(usage), Some(flush), Some(release)) =
            (raw.bind, raw.submit, raw.usage, raw.flush, raw.release)
        else {
            return Err(edge::Error::invalid(
                "a class needs bind, submit, usage, flush and release",
            ));
        };
        // SAFETY: as above.
        let name =
            unsafe { edge::text(raw.name) }.filter(|name| !name.is_empty() && *name != "none");
        let name = name.ok_or_else(|| edge::Error::invalid("a class needs a name"))?;
        let name = for_ever(&name);
        Ok(Self { table: Table { raw, submit, usage, flush, release, bind }, name })
    }
}

impl ProviderClass for Class {
    fn name(&self) -> &'static str {
        self.name
    }

    fn init(&self) -> Result<(), Fault> {
        let Some(init) = self.table.raw.init else { return Ok(()) };
        // SAFETY: the caller's, with the argument that its table names.
        let (answer, words) = called(|| unsafe { init(self.table.raw.ctx) });
        if answer == 0 { Ok(()) } else { Err(fault("init", answer, words)) }
    }

    fn deinit(&self) {
        if let Some(deinit) = self.table.raw.deinit {
            // SAFETY: as in `init`.
            unsafe { deinit(self.table.raw.ctx) };
        }
    }

    fn bind(&self, netdev: &Netdev, instance: Instance) -> Result<Arc<dyn Provider>, BindError> {
        let name = CString::new(netdev.name.replace('\0', "")).unwrap_or_default();
        let raw = RawNetdev {
            size: size::<RawNetdev>(),
            id: netdev.ifindex.get(),
            generation: netdev.generation.get(),
            hw_flags: raw_hw_flags(netdev.hw_flags),
            instance: instance.0.get(),
            reserved: 0,
            name: name.as_ptr(),
        };
        let mut provider = std::ptr::null_mut();
        let ctx = self.table.raw.ctx;
        // SAFETY: as in `init`; the struct, its name and the place for the provider are on this stack.
        let (answer, words) = called(|| unsafe { (self.table.bind)(ctx, &raw, &mut provider) });
        if answer == 0 {
            return Ok(Arc::new(CProvider { table: self.table, provider }));
        }
        let failed = fault("bind", answer, words);
        Err(match failed.errno {
            Some(Errno::EOPNOTSUPP | Errno::ENODEV) => {
                BindError::Declined(failed.detail.unwrap_or_else(|| "not for this port".to_owned()))
            }
            _ => BindError::Failed(failed),
        })
    }

    fn bind_in_hardware(&self, _: &Netdev, _: Instance) -> Result<Arc<dyn Provider>, BindError> {
        Err(BindError::Declined("a table of callbacks has bind alone".to_owned()))
    }

    fn clear_leftovers(&self, _: Ifindex) -> Result<u64, Fault> {
        Ok(0)
    }
}

/// What `bind` made.
struct CProvider {
    table: Table,
    provider: *mut c_void,
}

// SAFETY: as of `Table`; the header demands it of what `bind` makes too.
unsafe impl Send for CProvider {}
// SAFETY: as above.
unsafe impl Sync for CProvider {}

impl CProvider {
    fn takes(&self, flow: &RawFlow) -> Result<(), Rejection> {
        let Some(can_offload) = self.table.raw.can_offload else {
            let only_forwards = flow.kind != crate::values::FORWARD;
            return if only_forwards { Err(Tracked::unsupported()) } else { Ok(()) };
        };
        // SAFETY: the caller's, with what its own `bind` gave; the flow is on this stack.
        let (answer, words) = called(|| unsafe { can_offload(self.provider, flow) });
        answered(answer, words)
    }
}

impl Provider for CProvider {
    fn can_offload(&self, flow: &Flow) -> Result<(), Rejection> {
        self.takes(&RawFlow::of(flow))
    }

    fn can_track(&self, tracked: &Tracked) -> Result<(), Rejection> {
        self.takes(&RawFlow::of_tracked(tracked))
    }

    fn submit(&self, batch: Vec<Operation>) {
        let ops: Vec<_> = batch.into_iter().filter_map(Held::hand_over).collect();
        // SAFETY: as in `takes`; the array is on this stack, and each operation is the provider's from here on.
        unsafe { (self.table.submit)(self.provider, ops.as_ptr(), ops.len()) };
    }

    fn usage(&self, report: &mut dyn FnMut(RuleReport)) -> Result<(), Fault> {
        let mut sink = Sink { report };
        let arg = std::ptr::from_mut(&mut sink).cast();
        // SAFETY: as in `takes`. The argument is what `take_report` knows it is, and lives until this returns.
        let (answer, words) =
            called(|| unsafe { (self.table.usage)(self.provider, take_report, arg) });
        if answer == 0 { Ok(()) } else { Err(fault("usage", answer, words)) }
    }

    fn flush(&self) -> Result<u64, Fault> {
        let mut removed = 0;
        // SAFETY: as in `takes`; the number is on this stack.
        let (answer, words) = called(|| unsafe { (self.table.flush)(self.provider, &mut removed) });
        if answer == 0 { Ok(removed) } else { Err(fault("flush", answer, words)) }
    }

    fn release(&self) -> Result<(), Fault> {
        // SAFETY: as in `takes`; the engine calls nothing of it any more.
        let (answer, words) = called(|| unsafe { (self.table.release)(self.provider) });
        if answer == 0 { Ok(()) } else { Err(fault("release", answer, words)) }
    }
}

/// Who hears what a sweep finds.
struct Sink<'a> {
    report: &'a mut dyn FnMut(RuleReport),
}

/// # Safety
/// `arg` is the [`Sink`] that `usage` was called with, and `report` one of the header's structs.
unsafe extern "C" fn take_report(arg: *mut c_void, report: *const RawReport) {
    guarded_or((), || {
        // SAFETY: as above; nobody else has it while `usage` is being called.
        let sink = unsafe { &mut *arg.cast::<Sink<'_>>() };
        // SAFETY: as above.
        let Ok(raw) = (unsafe { edge::read(report) }) else { return };
        // A rule that is marked by others is none of the engine's.
        let Some(cookie) = cookie(&raw.cookie) else { return };
        (sink.report)(RuleReport {
            cookie,
            rule: RuleId(raw.rule),
            counters: Counters { packets: raw.packets, bytes: raw.bytes },
            in_hw: in_hw(raw.in_hw),
        });
    });
}

/// An operation in the hands of a provider of the caller's.
#[repr(C)]
struct Held {
    /// What the provider sees. First: its address is that of the whole.
    op: RawOp,
    flow: Option<RawFlow>,
    ticket: Ticket,
}

impl Held {
    /// To be completed by [`taken_back`](Self::taken_back). `None`: it is completed, since no provider here does such things.
    fn hand_over(operation: Operation) -> Option<*mut RawOp> {
        let Operation { request, ticket } = operation;
        let cookie = request.cookie();
        let (kind, rule, flow) = match request {
            Request::Add { flow, .. } => (1, 0, Some(RawFlow::of(&flow))),
            Request::Track { tracked, .. } => (1, 0, Some(RawFlow::of_tracked(&tracked))),
            Request::Delete { rule, .. } => (2, rule.0, None),
            Request::Established { rule, .. } => (3, rule.0, None),
            // Nothing of theirs is ever observed.
            Request::Adopt { .. } => {
                ticket.complete(Err(Reason::Conflict.into()));
                return None;
            }
        };
        let op = RawOp {
            size: size::<RawOp>(),
            kind,
            cookie: cookie.to_bytes(),
            epoch: cookie.epoch.0,
            rule,
            flow: std::ptr::null(),
        };
        let held = Box::into_raw(Box::new(Self { op, flow, ticket }));
        // SAFETY: it was a box a moment ago, and nobody else knows of it yet.
        unsafe {
            if let Some(flow) = &(*held).flow {
                (*held).op.flow = flow;
            }
        }
        Some(held.cast())
    }

    /// # Safety
    /// `op` is one that [`hand_over`](Self::hand_over) gave, and that was not taken back.
    unsafe fn taken_back(op: *mut RawOp) -> Box<Self> {
        // SAFETY: as above: it is the address of the whole, which came out of a box.
        unsafe { Box::from_raw(op.cast()) }
    }
}

/// Completes an operation with success.
///
/// # Safety
/// `op` is NULL, or an operation of this provider's that was not completed yet.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_op_done(op: *mut RawOp, rule: u64, in_hw: c_int) {
    guarded_or((), || {
        if op.is_null() {
            return;
        }
        // SAFETY: as above.
        let held = unsafe { Held::taken_back(op) };
        let done = match held.op.kind {
            1 => Done::added(RuleId(rule), crate::values::in_hw(in_hw)),
            2 => Done::Deleted,
            _ => Done::Noted,
        };
        held.ticket.complete(Ok(done));
    });
}

/// Completes an operation with a refusal.
///
/// # Safety
/// As of [`ctoffload_op_done`]; `words` is NULL or a string.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_op_refuse(
    op: *mut RawOp,
    why: c_int,
    words: *const c_char,
) {
    guarded_or((), || {
        if op.is_null() {
            return;
        }
        // SAFETY: as above.
        let (held, words) = unsafe { (Held::taken_back(op), edge::text(words)) };
        // 0 would be none: an operation that fails without a reason.
        let why = if why == 0 { c_int::MAX } else { why };
        held.ticket.complete(Err(rejection(why, words.map(Into::into))));
    });
}
