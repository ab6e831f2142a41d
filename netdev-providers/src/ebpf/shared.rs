//! What all threads of a port see.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::entry::RuleNumber;
use super::maps::Flows;
use super::place::{Around, Place};
use crate::contract::flow::Flow;
use crate::contract::reason::{Reason, Rejection};
use crate::contract::types::Cookie;

/// What was held when somebody panicked is as it was before or after.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Shared {
    /// The table that forwards.
    pub(super) flows: Mutex<Arc<Flows>>,
    /// Rules that a dead engine wrote, and what they are called now: in the table they keep their cookie.
    pub(super) adopted: Mutex<HashMap<RuleNumber, Cookie>>,
    around: Mutex<Around>,
    /// Others are behind the program, and would not see what it forwards.
    overtakes: AtomicBool,
    /// It sends past the stack.
    is_xdp: bool,
}

impl Shared {
    pub(super) fn new(flows: Arc<Flows>, around: Around, place: Place) -> Self {
        let shared = Self {
            flows: Mutex::new(flows),
            adopted: Mutex::default(),
            around: Mutex::default(),
            overtakes: AtomicBool::new(false),
            is_xdp: place == Place::Xdp,
        };
        shared.set_around(around);
        shared
    }

    pub(super) fn overtakes(&self) -> bool {
        self.overtakes.load(Ordering::Acquire)
    }

    pub(super) fn around(&self) -> Around {
        lock(&self.around).clone()
    }

    pub(super) fn set_around(&self, around: Around) {
        self.overtakes.store(!around.behind.is_empty(), Ordering::Release);
        *lock(&self.around) = around;
    }

    /// No lock, and no system call.
    pub(super) fn can_offload(&self, flow: &Flow) -> Result<(), Rejection> {
        flow.check_netdevs()?;
        let (from, to) = (&flow.matches.tuple, &flow.forward.tuple);
        if from.is_ipv6() != to.is_ipv6() || from.proto() != to.proto() {
            let why = "the address family or the protocol changes on the way";
            return Err(Rejection::with_detail(Reason::Unsupported, why));
        }
        if self.overtakes() {
            let why =
                "programs or filters of others are behind ours, and would not see the packets";
            return Err(Rejection::with_detail(Reason::OthersInFront, why));
        }
        if self.is_xdp { flow.check_egress("XDP") } else { Ok(()) }
    }
}
