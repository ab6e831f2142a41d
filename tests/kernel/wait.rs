//! Waiting for what has to come.

use std::time::{Duration, Instant};

/// Emulated kernels are slow, above all when they load modules.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Asks again and again. The longer an answer takes, the longer until the next question: an emulated processor that starts
/// `tc` without end has no time for what is waited for.
///
/// # Panics
/// When it does not come.
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let asked = Instant::now();
        if done() {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        let pause = asked.elapsed() * 2;
        std::thread::sleep(pause.clamp(Duration::from_millis(20), Duration::from_millis(250)));
    }
}
