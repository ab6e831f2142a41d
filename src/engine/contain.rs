//! Calls that may panic: into code of others, and what must go on whatever happens.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Calls it; what it panicked with comes back in words. Whatever it left half done is its own: the
/// engine's state is only touched before and after such a call.
pub(super) fn contained<R>(call: impl FnOnce() -> R) -> Result<R, String> {
    caught(call).map_err(|words| format!("the provider panicked: {words}"))
}

/// The same of any call: the words alone.
pub(crate) fn caught<R>(call: impl FnOnce() -> R) -> Result<R, String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|payload| {
        payload
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "no words".to_owned())
    })
}
