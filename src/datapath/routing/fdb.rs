//! Forwarding databases: behind which of its ports a bridge has learnt a MAC address. Kept up to
//! date by the monitor.
//!
//! Only what is valid for all VLANs is kept: a bridge that filters VLANs is not followed anyway.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use netdev_providers::{Ifindex, MacAddr};

/// Where a bridge sends frames for a MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behind {
    /// Out of this port.
    Port(Ifindex),
    /// To itself: the address is its own, or a port's.
    Itself,
}

type Entries = HashMap<(Ifindex, MacAddr), Behind>;

/// The entries of all bridges.
#[derive(Clone, Debug, Default)]
pub struct Fdb(Arc<RwLock<Entries>>);

impl Fdb {
    /// Where a bridge sends frames for this address; `None`: to every port, since it does not know.
    #[must_use]
    pub fn get(&self, bridge: Ifindex, mac: MacAddr) -> Option<Behind> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&(bridge, mac)).copied()
    }

    /// Stores an entry, or removes it; returns what was known before.
    pub fn set(&self, bridge: Ifindex, mac: MacAddr, behind: Option<Behind>) -> Option<Behind> {
        let mut entries = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match behind {
            Some(behind) => entries.insert((bridge, mac), behind),
            None => entries.remove(&(bridge, mac)),
        }
    }

    /// Forgets a netdev, as a bridge and as a port.
    pub fn forget(&self, ifindex: Ifindex) {
        let mut entries = self.0.write().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|(bridge, _), b| *bridge != ifindex && *b != Behind::Port(ifindex));
    }

    /// Forgets everything, before it is read anew.
    pub fn clear(&self) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}
