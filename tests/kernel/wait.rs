//! Waiting for what has to come.

use std::time::{Duration, Instant};

/// Emulated kernels are slow, above all when they load modules.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// # Panics
/// When it does not come.
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
