//! Threads for ports that have something to do. A port that has nothing to do for a while has none: a thousand
//! ports at rest are one thread, which starts those of others.

use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::port::Port;

/// How long a thread that could not be started is waited with.
const AGAIN: Duration = Duration::from_millis(100);

/// Who starts threads for the ports of one engine.
#[derive(Debug, Default)]
pub(super) struct Threads(Mutex<Option<Sender<Arc<Port>>>>);

impl Threads {
    /// Starts the thread of a port that has just been made, whose writer [rests](super::queue::Queue::rest); from
    /// then on there is one whenever it has something to do.
    pub(super) fn serve(&self, port: &Arc<Port>) -> std::io::Result<()> {
        let starter = self.starter()?;
        let of = Arc::downgrade(port);
        port.queue.set_start(Box::new(move || {
            if let Some(port) = of.upgrade() {
                // It ends when the last of those who could ask it is gone.
                let _ = starter.send(port);
            }
        }));
        start(port)
    }

    fn starter(&self) -> std::io::Result<Sender<Arc<Port>>> {
        let mut starter = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(starter) = &*starter {
            return Ok(starter.clone());
        }
        let (tx, rx) = mpsc::channel();
        std::thread::Builder::new().name("ports".into()).spawn(move || start_all(&rx, start))?;
        *starter = Some(tx.clone());
        Ok(tx)
    }
}

fn start_all(due: &Receiver<Arc<Port>>, mut start: impl FnMut(&Arc<Port>) -> std::io::Result<()>) {
    for port in due {
        let mut tried = false;
        while let Err(e) = start(&port) {
            if !tried {
                tracing::error!(port = %port.netdev, "its thread could not be started: {e}; it is tried again");
                // Who waits for the port is to see that it does not go on.
                port.progress.thread.begin();
            }
            tried = true;
            std::thread::sleep(AGAIN);
        }
        if tried {
            port.progress.thread.end();
        }
    }
}

fn start(port: &Arc<Port>) -> std::io::Result<()> {
    let port = Arc::clone(port);
    std::thread::Builder::new()
        .name(format!("port-{}", port.netdev.name))
        .spawn(move || {
            if let Some(job) = port.queue.take_job() {
                job.run();
            }
        })
        .map(drop)
}

#[cfg(test)]
#[cfg(not(ctoffload_loom))]
mod tests {
    use netdev_providers::{Generation, HwFlags, Ifindex, Netdev};

    use super::*;
    use crate::engine::Limits;

    #[test]
    fn a_thread_that_cannot_be_started_is_tried_again_and_until_then_its_port_does_not_go_on() {
        let netdev = Netdev {
            ifindex: Ifindex::new(1).unwrap(),
            generation: Generation::new(1).unwrap(),
            name: "p1".to_owned(),
            hw_flags: HwFlags::default(),
        };
        let limits = Limits::default();
        let port = Arc::new(Port::new(
            netdev,
            None,
            vec![],
            std::iter::empty(),
            &limits,
            None,
            Arc::default(),
        ));
        let (due, is_due) = mpsc::channel();
        due.send(Arc::clone(&port)).unwrap();
        drop(due);
        // What there is to be waited for, at each attempt.
        let mut awaited = Vec::new();
        start_all(&is_due, |port| {
            awaited.push(port.progress.thread.out());
            if awaited.len() < 3 { Err(std::io::Error::other("no more threads")) } else { Ok(()) }
        });
        assert_eq!(awaited, [0, 1, 1]);
        assert_eq!(port.progress.thread.out(), 0);
    }
}
