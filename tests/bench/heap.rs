//! An allocator that counts what lives, when it is asked to.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

static COUNTING: AtomicBool = AtomicBool::new(false);
static LIVE: AtomicI64 = AtomicI64::new(0);
static CALLS: AtomicU64 = AtomicU64::new(0);

/// The system's allocator; when nothing is counted it costs one load of a constant.
pub(crate) struct Counting;

fn note(bytes: i64) {
    if COUNTING.load(Ordering::Relaxed) {
        LIVE.fetch_add(bytes, Ordering::Relaxed);
        CALLS.fetch_add(1, Ordering::Relaxed);
    }
}

fn size(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

// SAFETY: every call is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(size(layout.size()));
        // SAFETY: the caller's promises are the system allocator's conditions.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(size(layout.size()));
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, new: usize) -> *mut u8 {
        note(size(new) - size(layout.size()));
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, new) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        note(-size(layout.size()));
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

/// What a piece of work did to the heap.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heap {
    /// Bytes that live now and did not before, as they were asked for.
    pub bytes: i64,
    /// Calls of the allocator, of all threads.
    pub calls: u64,
}

/// Runs the work and counts, over all threads.
pub(crate) fn counted(work: impl FnOnce()) -> Heap {
    let before = (LIVE.load(Ordering::SeqCst), CALLS.load(Ordering::SeqCst));
    COUNTING.store(true, Ordering::SeqCst);
    work();
    COUNTING.store(false, Ordering::SeqCst);
    Heap {
        bytes: LIVE.load(Ordering::SeqCst) - before.0,
        calls: CALLS.load(Ordering::SeqCst) - before.1,
    }
}
