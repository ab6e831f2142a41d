//! What the service manager is told (sd_notify(3)), where there is one that wants to hear it (`NOTIFY_SOCKET`): that the
//! daemon is ready, reloads, stops, and is alive.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use sd_notify::NotifyState;

/// Ports are bound, or the configuration has been read anew.
pub(super) fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The configuration is about to be read anew; [`ready`] says when that is over.
pub(super) fn reloading() {
    // `Type=notify-reload` takes the word only with the time.
    match NotifyState::monotonic_usec_now() {
        Ok(now) => send(&[NotifyState::Reloading, now]),
        Err(e) => tracing::warn!("the service manager is not told of the reload: {e}"),
    }
}

/// The daemon is going to end.
pub(super) fn stopping(status: &str) {
    send(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

fn send(state: &[NotifyState<'_>]) {
    tell(sd_notify::notify(state));
}

fn tell(sent: io::Result<()>) {
    if let Err(e) = sent {
        tracing::warn!("the service manager could not be told (NOTIFY_SOCKET): {e}");
    }
}

/// How long the service manager waits for a sign of life, if it does.
pub(super) fn watchdog() -> Option<Duration> {
    sd_notify::watchdog_enabled().filter(|within| !within.is_zero())
}

/// Gives a sign of life twice within the time that the service manager waits (`WatchdogSec`), as long as `alive` says so,
/// with what it says; until the other end of `stop` is gone.
pub(super) fn keep_watch(
    within: Duration,
    stop: &Receiver<()>,
    mut alive: impl FnMut() -> Result<String, String>,
) {
    let mut missed = false;
    while stop.recv_timeout(within / 2) == Err(RecvTimeoutError::Timeout) {
        match alive() {
            Ok(status) => {
                send(&[NotifyState::Watchdog, NotifyState::Status(&status)]);
                missed = false;
            }
            Err(why) => {
                if !std::mem::replace(&mut missed, true) {
                    tracing::error!("no sign of life for the service manager: {why}");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Instant;

    use super::*;

    #[test]
    fn whether_it_is_alive_is_asked_twice_within_the_time_until_it_stops() {
        let (running, stop) = mpsc::channel::<()>();
        let mut running = Some(running);
        let (began, mut asked) = (Instant::now(), 0);
        keep_watch(Duration::from_millis(100), &stop, || {
            asked += 1;
            if asked == 4 {
                running = None;
            }
            Err("not alive".to_owned())
        });
        assert_eq!(asked, 4);
        assert!(began.elapsed() >= Duration::from_millis(200), "{:?}", began.elapsed());
    }
}
