//! Asking a port's thread for something, and waiting for the answer as long as the port goes on.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use super::port::Port;
use super::queue::Command;

/// How often somebody who waits looks whether the port goes on.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Something that a port's thread was asked for.
pub(super) struct Asked<T> {
    pub(super) port: Arc<Port>,
    answer: Receiver<T>,
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoAnswer {
    /// The port does not go on. What was asked for is done when it does.
    Slow,
    /// The port was deleted meanwhile, and everything with it.
    Gone,
}

impl<T> Asked<T> {
    pub(super) fn of(port: &Arc<Port>, command: impl FnOnce(Sender<T>) -> Command) -> Self {
        let (tx, answer) = mpsc::channel();
        port.queue.push(command(tx));
        Self { port: Arc::clone(port), answer }
    }

    /// Waits until the port has made no progress for so long. Nothing becomes of the port by it: whoever
    /// has to wait is not its judge.
    pub(super) fn wait(self, at_most: Duration) -> Result<T, NoAnswer> {
        // The thread itself waits for operations, for as long as it takes them for slow.
        let at_most = at_most.saturating_add(self.port.progress.limit());
        loop {
            match self.answer.recv_timeout(LOOK_EVERY) {
                Ok(answer) => return Ok(answer),
                Err(RecvTimeoutError::Disconnected) => return Err(NoAnswer::Gone),
                Err(RecvTimeoutError::Timeout) if self.port.progress.thread.is_stuck(at_most) => {
                    if let Ok(answer) = self.answer.try_recv() {
                        return Ok(answer);
                    }
                    self.port.slow();
                    tracing::warn!(port = %self.port.netdev, "slow: it is not waited for any more");
                    return Err(NoAnswer::Slow);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}
