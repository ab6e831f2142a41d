//! Calls into code of others, which may panic.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Calls it; what it panicked with comes back in words. Whatever it left half done is its own: the
/// engine's state is only touched before and after such a call.
pub(super) fn contained<R>(call: impl FnOnce() -> R) -> Result<R, String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|payload| {
        let words = payload
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_default();
        format!("the provider panicked: {words}")
    })
}
