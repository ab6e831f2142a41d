//! A batch of nf_tables messages: all of it takes effect, or nothing.

use std::time::Duration;

use super::{NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END, NFPROTO_INET};
use crate::netlink::error::{KernelError, NetlinkError};
use crate::netlink::netfilter::{SUBSYS_NFTABLES, msg_type, nfgenmsg};
use crate::netlink::socket::{ACK, Ack, REQUEST, Socket};
use crate::netlink::wire::Message;

const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// One message of a transaction: what it is for people, and what the kernel must have for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// What it makes or changes.
    pub what: &'static str,
    /// The modules and configuration symbols that provide it.
    pub needs: &'static str,
    /// A rule against something that a kernel which refuses the rule cannot have.
    pub optional: bool,
}

impl Step {
    /// A step that must succeed.
    #[must_use]
    pub const fn new(what: &'static str, needs: &'static str) -> Self {
        Self { what, needs, optional: false }
    }
}

/// The transaction while it is written.
#[derive(Debug)]
pub struct Transaction<'a> {
    socket: &'a mut Socket,
    buf: Vec<u8>,
    first_seq: u32,
    /// Where the last message begins.
    last_at: usize,
    steps: Vec<Step>,
    family: u8,
}

impl<'a> Transaction<'a> {
    /// An empty one. Messages are for family `inet` until [`of_family`](Self::of_family).
    #[must_use]
    pub fn new(socket: &'a mut Socket) -> Self {
        let first_seq = socket.next_seq();
        let mut buf = Vec::with_capacity(4096);
        let mut m = Message::new(&mut buf, NFNL_MSG_BATCH_BEGIN, REQUEST, first_seq);
        m.raw(&nfgenmsg(0, SUBSYS_NFTABLES));
        m.finish();
        Self { socket, buf, first_seq, last_at: 0, steps: Vec::new(), family: NFPROTO_INET }
    }

    /// The messages that are added from now on are for tables of this family.
    pub const fn of_family(&mut self, family: u8) {
        self.family = family;
    }

    /// Adds a message; the first step has the sequence number after the begin message's.
    pub fn add(&mut self, step: Step, msg: u16, flags: u16, fill: impl FnOnce(&mut Message<'_>)) {
        let seq = self.socket.next_seq();
        self.steps.push(step);
        self.last_at = self.buf.len();
        let ty = msg_type(SUBSYS_NFTABLES, msg);
        let mut m = Message::new(&mut self.buf, ty, REQUEST | flags, seq);
        m.raw(&nfgenmsg(self.family, 0));
        fill(&mut m);
        m.finish();
    }

    /// The messages so far, for comparison with what others write.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.buf
    }

    /// Sends it; one answer per step. The kernel goes on after a failure to report all of them, and
    /// answers in order, so the last step's answer (it asks for one) is the end.
    ///
    /// # Errors
    /// Not the steps, but the transaction as such was refused, or the exchange failed.
    pub fn commit(mut self) -> Result<Vec<(Step, Ack)>, NetlinkError> {
        if self.steps.is_empty() {
            return Ok(Vec::new());
        }
        // nlmsg_flags
        let flags = self.last_at + 6..self.last_at + 8;
        if let Some(bytes) = self.buf.get_mut(flags) {
            let asked = u16::from_ne_bytes([bytes[0], bytes[1]]) | ACK;
            bytes.copy_from_slice(&asked.to_ne_bytes());
        }
        let end = self.socket.next_seq();
        let mut m = Message::new(&mut self.buf, NFNL_MSG_BATCH_END, REQUEST, end);
        m.raw(&nfgenmsg(0, SUBSYS_NFTABLES));
        m.finish();
        // The begin message is item 0: what is answered to it concerns all.
        let count = self.steps.len() + 1;
        let mut acks: Vec<Ack> = vec![Ok(()); count];
        self.socket.send(&self.buf)?;
        let mut whole = false;
        let mut ended = false;
        while !ended {
            // All answers are queued before the send returns; after a refusal of the whole there
            // may be none to the last step.
            let within = if whole { Duration::ZERO } else { ANSWER_WITHIN };
            let got = self.socket.recv(within, |answers| {
                for m in answers {
                    let index = m.seq.wrapping_sub(self.first_seq) as usize;
                    if let (Some(slot), Some(ack)) = (acks.get_mut(index), m.ack()) {
                        *slot = ack;
                        whole |= index == 0;
                        ended |= index + 1 == count;
                    }
                }
            });
            match got {
                Ok(()) => {}
                Err(NetlinkError::TimedOut(_)) if whole => break,
                Err(e) => return Err(e),
            }
        }
        let mut acks = acks.into_iter();
        if let Some(Err(refused)) = acks.next() {
            return Err(refused.into());
        }
        Ok(self.steps.into_iter().zip(acks).collect())
    }
}

/// The first step that was refused, in order.
#[must_use]
pub fn first_refusal(answers: Vec<(Step, Ack)>) -> Option<(Step, KernelError)> {
    answers.into_iter().find_map(|(step, ack)| ack.err().map(|e| (step, e)))
}
