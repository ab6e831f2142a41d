//! Kernel modules that somebody else is loading just now.
//!
//! The kernel loads the module of something that a request asks for and that is not there. When somebody
//! else has asked for the same module shortly before (a firewall that starts beside us), `modprobe` takes
//! a module that is being initialised for one that is loaded; what it brings is not registered yet, and
//! the request is refused.

use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tracing::debug;

/// Pauses before what the kernel did not have is asked for again: half a second in all, which is what a
/// kernel costs that does lack it.
const PAUSES: [Duration; 3] =
    [Duration::from_millis(20), Duration::from_millis(100), Duration::from_millis(400)];

/// Asks again, three times at most, while the refusal says that something is lacking (`lacks`). Blocks
/// the calling thread meanwhile.
///
/// # Errors
/// The last refusal, or the first that says something else.
pub fn while_modules_come<T, E: Display>(
    lacks: impl Fn(&E) -> bool,
    mut ask: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    for pause in PAUSES {
        match ask() {
            Err(e) if lacks(&e) => {
                debug!("again in {pause:?}: {e}");
                std::thread::sleep(pause);
            }
            other => return other,
        }
    }
    ask()
}

/// Whether a kernel was found to lack something, for who asks it again and again: it is waited for once, and not for
/// every netdev.
#[derive(Debug, Default)]
pub struct Lacking(AtomicBool);

impl Lacking {
    /// As [`while_modules_come`], if nobody has waited in vain yet; without a pause otherwise.
    ///
    /// # Errors
    /// As there.
    pub fn ask<T, E: Display>(
        &self,
        lacks: impl Fn(&E) -> bool,
        mut ask: impl FnMut() -> Result<T, E>,
    ) -> Result<T, E> {
        let answer =
            if self.0.load(Ordering::Relaxed) { ask() } else { while_modules_come(&lacks, ask) };
        self.0.store(answer.as_ref().is_err_and(lacks), Ordering::Relaxed);
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lacking_is_waited_for_once() {
        let lacking = Lacking::default();
        let tries = |answer: Result<(), &'static str>| {
            let mut tries = 0;
            let asked = lacking.ask(
                |e| *e == "lacking",
                || {
                    tries += 1;
                    answer
                },
            );
            assert_eq!(asked, answer);
            tries
        };
        assert_eq!(tries(Err("forbidden")), 1);
        assert_eq!(tries(Err("lacking")), 4);
        assert_eq!(tries(Err("lacking")), 1);
        // It has come meanwhile.
        assert_eq!(tries(Ok(())), 1);
        assert_eq!(tries(Err("lacking")), 4);
    }

    #[test]
    fn what_is_lacking_is_asked_for_again_and_nothing_else_is() {
        let tried = |failures: usize, refusal: &'static str| {
            let mut tries = 0;
            let made = while_modules_come(
                |e| *e == "lacking",
                || {
                    tries += 1;
                    if tries > failures { Ok(()) } else { Err(refusal) }
                },
            );
            (tries, made)
        };
        assert_eq!(tried(0, "lacking"), (1, Ok(())));
        assert_eq!(tried(2, "lacking"), (3, Ok(())));
        assert_eq!(tried(9, "lacking"), (4, Err("lacking")));
        assert_eq!(tried(1, "forbidden"), (1, Err("forbidden")));
    }
}
