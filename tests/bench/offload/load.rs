//! Connections at a rate: opened, left to live for a while, closed, and ended in conntrack.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::conntrack::Ender;
use super::frames::{Sender, Step, closing, frame, opening, tuple};

/// From a connection's last opening packet to its first closing one.
const LIFE: Duration = Duration::from_millis(300);
/// From that to the end of its entry: nobody waits for the two minutes of TIME_WAIT.
const CLOSED: Duration = Duration::from_millis(100);
/// So often connections are opened, those that are due together.
const BEAT: Duration = Duration::from_millis(2);

/// The far ends of both netdevs.
pub(crate) struct Ends {
    pub(crate) client: Sender,
    pub(crate) server: Sender,
}

impl Ends {
    /// One step of all of these that take it.
    pub(crate) fn step(
        &self,
        numbers: std::ops::Range<u32>,
        step: Step,
        of: fn(u32) -> &'static [Step],
    ) {
        let mut frames: Vec<_> =
            numbers.filter(|&n| of(n).contains(&step)).map(|n| frame(n, step)).collect();
        let sender = if step.is_clients() { &self.client } else { &self.server };
        sender.send(&mut frames);
    }

    fn open(&self, numbers: &std::ops::Range<u32>) {
        for step in [Step::Open, Step::Answer, Step::Go, Step::Data] {
            self.step(numbers.clone(), step, opening);
        }
    }

    fn close(&self, numbers: &std::ops::Range<u32>) {
        for step in [Step::Fin, Step::FinBack, Step::LastAck] {
            self.step(numbers.clone(), step, closing);
        }
    }
}

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Made {
    pub(crate) connections: u32,
    /// From the first to the last that was opened.
    pub(crate) took: Duration,
    /// Entries that were there to be ended: a frame that was lost makes none.
    pub(crate) ended: usize,
}

/// Makes connections, from number `first` on, at this rate for so long; returns when the last is ended. When it could
/// not keep the rate, it says so by the time that it took.
pub(crate) fn run(ends: &Ends, first: u32, rate: u32, lasting: Duration) -> Made {
    let total = (f64::from(rate) * lasting.as_secs_f64()) as u32;
    let started = Instant::now();
    let mut ender = Ender::open();
    let (mut open, mut closed) = (VecDeque::new(), VecDeque::new());
    let (mut made, mut took, mut ended) = (0, Duration::ZERO, 0);
    while made < total || !open.is_empty() || !closed.is_empty() {
        let beat = Instant::now();
        let due = (f64::from(rate) * started.elapsed().as_secs_f64()) as u32;
        let due = due.min(total);
        if due > made {
            let numbers = first + made..first + due;
            ends.open(&numbers);
            open.push_back((Instant::now() + LIFE, numbers));
            made = due;
            took = started.elapsed();
        }
        while open.front().is_some_and(|(at, _)| *at <= beat)
            && let Some((_, numbers)) = open.pop_front()
        {
            ends.close(&numbers);
            closed.push_back((beat + CLOSED, numbers));
        }
        while closed.front().is_some_and(|(at, _)| *at <= beat)
            && let Some((_, numbers)) = closed.pop_front()
        {
            let tuples: Vec<_> = numbers.map(tuple).collect();
            ended += ender.end(&tuples);
        }
        std::thread::sleep(BEAT.saturating_sub(beat.elapsed()));
    }
    Made { connections: total, took, ended }
}
