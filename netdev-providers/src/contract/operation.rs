//! The unit of work. An operation has **one owner and one result**: whoever holds the
//! [`Operation`] must [`complete`](Operation::complete) it, which consumes it, so a result cannot
//! be given twice or overwritten. One that is dropped without a result completes by itself with
//! [`Reason::ProviderFault`], so none is lost either.

use std::fmt;

use super::flow::{Flow, Tracked};
use super::reason::{Reason, Rejection};
use super::types::{Cookie, RuleId};

/// What is asked of the provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Install a rule for this flow, marked with this cookie. The result is [`Done::Added`].
    Add {
        /// Goes into the rule, so that it can be recognised later.
        cookie: Cookie,
        /// The packets and what is done to them.
        flow: Box<Flow>,
    },
    /// Install a rule that only keeps track of these packets, marked with this cookie. The result is
    /// [`Done::Added`]. Only asked of a provider that
    /// [can track](super::provider::Provider::can_track).
    Track {
        /// Goes into the rule, so that it can be recognised later.
        cookie: Cookie,
        /// The packets.
        tracked: Box<Tracked>,
    },
    /// Take over a rule that an engine which died has left for the same packets, as
    /// [`observe`](super::provider::Provider::observe) found it. A rule that does what an `Add` of this
    /// flow would make it do stays as it is, without a gap and with its counters, and is this
    /// provider's from now on: [`Done::Added`] with the name `found`. Any other is removed, and the
    /// operation refused with [`Reason::Conflict`]: whatever the refusal, the rule is gone after it.
    Adopt {
        /// The rule, as it was observed.
        found: RuleId,
        /// What the engine calls it from now on. In the backend it may keep the mark it has.
        cookie: Cookie,
        /// The packets and what is to be done to them.
        flow: Box<Flow>,
    },
    /// Remove a rule that an `Add` or a `Track` of this provider installed, or one that was observed. That it is not there any more
    /// (ENOENT), or that the netdev is not (ENODEV), is success: [`Done::Deleted`]. A rule of the same
    /// name and another cookie is another one, and stays.
    Delete {
        /// The rule, as the `Add` named it.
        rule: RuleId,
        /// The cookie it was marked with.
        cookie: Cookie,
    },
    /// A reply of the connection has been seen (delivered at most once per rule, after it is
    /// installed). A provider for which this means nothing answers [`Done::Noted`].
    Established {
        /// The rule, as the `Add` named it.
        rule: RuleId,
        /// The cookie it was marked with.
        cookie: Cookie,
    },
}

impl Request {
    /// The cookie of the rule that this is about.
    #[must_use]
    pub const fn cookie(&self) -> Cookie {
        match self {
            Self::Add { cookie, .. }
            | Self::Track { cookie, .. }
            | Self::Adopt { cookie, .. }
            | Self::Delete { cookie, .. }
            | Self::Established { cookie, .. } => *cookie,
        }
    }
}

/// How an operation succeeded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Done {
    /// The rule is installed.
    Added {
        /// The provider's name for it.
        rule: RuleId,
        /// Whether the NIC took it: `Some` where the backend knows at once, `None` where only a
        /// later read-back tells.
        in_hw: Option<bool>,
        /// The rule is in software although it was offered to the NIC: what the driver said. `None`
        /// where nothing was said, or nothing is amiss.
        nic_said: Option<Box<str>>,
    },
    /// The rule is gone.
    Deleted,
    /// The message was taken.
    Noted,
}

impl Done {
    /// A rule that there is nothing more to say of.
    #[must_use]
    pub const fn added(rule: RuleId, in_hw: Option<bool>) -> Self {
        Self::Added { rule, in_hw, nic_said: None }
    }
}

/// The result of an operation.
pub type Outcome = Result<Done, Rejection>;

/// Receives the result of one operation. Implemented by the engine.
pub trait Completion: Send {
    /// Called exactly once, on whatever thread the provider completes the operation; it does not
    /// block and does not call the provider.
    fn complete(self: Box<Self>, outcome: Outcome);
}

impl<F: FnOnce(Outcome) + Send> Completion for F {
    fn complete(self: Box<Self>, outcome: Outcome) {
        self(outcome);
    }
}

/// The right, and the duty, to complete one operation.
pub struct Ticket(Option<Box<dyn Completion>>);

impl Ticket {
    /// A ticket that reports to `completion`.
    #[must_use]
    pub fn new(completion: Box<dyn Completion>) -> Self {
        Self(Some(completion))
    }

    /// Gives the result. Consumes the ticket: there is no second one.
    pub fn complete(mut self, outcome: Outcome) {
        if let Some(completion) = self.0.take() {
            completion.complete(outcome);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(completion) = self.0.take() {
            completion.complete(Err(Rejection::with_detail(
                Reason::ProviderFault,
                "the operation was dropped without a result",
            )));
        }
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ticket")
    }
}

/// A request and the ticket for its result.
#[derive(Debug)]
pub struct Operation {
    /// What is to be done.
    pub request: Request,
    /// Where the result goes.
    pub ticket: Ticket,
}

impl Operation {
    /// Gives the result and ends the operation.
    pub fn complete(self, outcome: Outcome) {
        self.ticket.complete(outcome);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_dropped_ticket_completes_once_as_a_fault() {
        let (tx, rx) = mpsc::channel();
        let ticket = Ticket::new(Box::new(move |o: Outcome| tx.send(o).unwrap()));
        drop(ticket);
        assert_eq!(rx.recv().unwrap().unwrap_err().reason, Reason::ProviderFault);
        assert!(rx.recv().is_err());
    }

    #[test]
    fn a_completed_ticket_says_nothing_more_when_it_is_dropped() {
        let (tx, rx) = mpsc::channel();
        Ticket::new(Box::new(move |o: Outcome| tx.send(o).unwrap())).complete(Ok(Done::Deleted));
        assert_eq!(rx.recv().unwrap(), Ok(Done::Deleted));
        assert!(rx.recv().is_err());
    }
}
