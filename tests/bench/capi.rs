//! The C interface, beside the engine: the loop of `tests/capi/bench.c`, on the library and the header as they are
//! installed, which `scripts/bench` builds.

use std::ffi::{CString, c_char, c_void};

/// Where that is.
const LIBRARY: &str = "CTOFFLOAD_CAPI_BENCH";

/// Functions of `bench.c`.
#[derive(Clone, Copy)]
struct Functions {
    create: unsafe extern "C" fn(usize) -> *mut c_void,
    destroy: unsafe extern "C" fn(*mut c_void),
    hire: unsafe extern "C" fn(*const c_void) -> *mut c_void,
    dismiss: unsafe extern "C" fn(*mut c_void),
    run: unsafe extern "C" fn(*const c_void, *mut c_void, usize) -> usize,
}

impl Functions {
    fn load() -> Result<Self, String> {
        let path = std::env::var(LIBRARY).map_err(|_| format!("{LIBRARY} is not set"))?;
        let path = CString::new(path).map_err(|e| e.to_string())?;
        // SAFETY: a string; the library runs nothing when it is loaded. It is never unloaded.
        let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if library.is_null() {
            return Err(format!("{} cannot be loaded", path.to_string_lossy()));
        }
        let symbol = |name: &'static std::ffi::CStr| {
            // SAFETY: of a library that is loaded.
            let found = unsafe { libc::dlsym(library, name.as_ptr().cast::<c_char>()) };
            if found.is_null() { Err(format!("there is no {name:?}")) } else { Ok(found) }
        };
        // SAFETY: each is a function of this type in `bench.c`.
        unsafe {
            Ok(Self {
                create: std::mem::transmute::<
                    *mut c_void,
                    unsafe extern "C" fn(usize) -> *mut c_void,
                >(symbol(c"capi_bench_create")?),
                destroy: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_void)>(
                    symbol(c"capi_bench_destroy")?,
                ),
                hire: std::mem::transmute::<
                    *mut c_void,
                    unsafe extern "C" fn(*const c_void) -> *mut c_void,
                >(symbol(c"capi_bench_hire")?),
                dismiss: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_void)>(
                    symbol(c"capi_bench_dismiss")?,
                ),
                run: std::mem::transmute::<
                    *mut c_void,
                    unsafe extern "C" fn(*const c_void, *mut c_void, usize) -> usize,
                >(symbol(c"capi_bench_run")?),
            })
        }
    }
}

/// An engine behind the C interface.
pub(crate) struct CApi {
    functions: Functions,
    bench: *mut c_void,
}

// SAFETY: what is behind the pointer is only read, but by the library, which is for many threads.
unsafe impl Sync for CApi {}

impl CApi {
    pub(crate) fn new(conns: u32) -> Result<Self, String> {
        let functions = Functions::load()?;
        // SAFETY: it takes any number.
        let bench = unsafe { (functions.create)(conns as usize) };
        Ok(Self { functions, bench })
    }

    pub(crate) fn hire(&self) -> Hired {
        // SAFETY: `create` made it.
        let worker = unsafe { (self.functions.hire)(self.bench) };
        Hired { dismiss: self.functions.dismiss, worker }
    }

    /// Goes through all packets that many times; returns how many were not decided.
    pub(crate) fn run(&self, hired: &mut Hired, times: usize) -> usize {
        // SAFETY: both are of this bench, and the worker is this thread's.
        unsafe { (self.functions.run)(self.bench, hired.worker, times) }
    }
}

impl Drop for CApi {
    fn drop(&mut self) {
        // SAFETY: `create` made it; workers borrow it for no longer than a round.
        unsafe { (self.functions.destroy)(self.bench) };
    }
}

/// A worker of it.
pub(crate) struct Hired {
    dismiss: unsafe extern "C" fn(*mut c_void),
    worker: *mut c_void,
}

impl Drop for Hired {
    fn drop(&mut self) {
        // SAFETY: `hire` made it, and it is not used any more.
        unsafe { (self.dismiss)(self.worker) };
    }
}
