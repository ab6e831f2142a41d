//! Reconciliation: what engines that died have left on a port is adopted, where it is what a living
//! connection's rule would be, and removed where it is not. Rules of anybody else are counted, and
//! left alone.
//!
//! ```text
//!   provider: observe -> datapath: recognise -> path, flow -> provider: adopt   (connection lives)
//!                                                         \-> provider: delete  (it does not)
//! ```
//! Done by the port's own thread: once before anything else when a port was added, so that no offer
//! meets an old rule with the same match, and on demand. Until its own turn comes every rule
//! forwards as it did. What cannot be adopted as it is, is removed, and the connection offered anew
//! by its next packet, which brings what only a packet can tell.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use netdev_providers::{
    Cookie, Done, Fault, Flow, Leftover, Outcome, Reason, Rejection, Request, RuleId,
};

/// What a reconciliation did on one port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// Rules that belong to a living connection and go on as they are.
    pub adopted: u64,
    /// Rules that were removed.
    pub removed: u64,
    /// Rules of others, which nobody touched.
    pub foreign: u64,
    /// Why nothing was done.
    pub fault: Option<Fault>,
}

/// A rule that is to be adopted, and who counts it.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) leftover: Leftover,
    pub(super) tally: Arc<Tally>,
}

/// Counts of operations under way.
#[derive(Debug, Default)]
pub(super) struct Tally {
    adopted: AtomicU64,
    removed: AtomicU64,
}

impl Tally {
    pub(super) fn adopted(&self) {
        self.adopted.fetch_add(1, Ordering::SeqCst);
    }

    pub(super) fn removed(&self) {
        self.removed.fetch_add(1, Ordering::SeqCst);
    }

    pub(super) fn counts(&self) -> (u64, u64) {
        (self.adopted.load(Ordering::SeqCst), self.removed.load(Ordering::SeqCst))
    }
}

impl Found {
    pub(super) fn request(&self, cookie: Cookie, flow: Box<Flow>) -> Request {
        Request::Adopt { found: self.leftover.rule, cookie, flow }
    }
}

/// What the NIC is said to have of a rule that was adopted, and the driver's words; or why it was not.
pub(super) fn as_adopted(
    outcome: Outcome,
    found: RuleId,
) -> Result<(Option<bool>, Option<Box<str>>), Rejection> {
    match outcome {
        Ok(Done::Added { rule, in_hw, nic_said }) if rule == found => Ok((in_hw, nic_said)),
        Ok(_) => {
            let why = "the provider answered an adoption with another result";
            Err(Rejection::with_detail(Reason::ProviderFault, why))
        }
        Err(why) => Err(why),
    }
}
