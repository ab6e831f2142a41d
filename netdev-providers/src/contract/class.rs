//! How a backend is chosen for a netdev.

use std::sync::Arc;

use super::provider::{Fault, Provider};
use super::types::{Ifindex, Instance, Netdev};

/// Why a class did not bind a netdev. Kept by the engine and shown (`ctoffload port show`).
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// This class cannot serve this netdev: the next class is asked. The text says what is missing
    /// and, where a kernel module brings it, which.
    #[error("{0}")]
    Declined(String),
    /// The class could serve it, but something failed on the way. Also passed over, and reported.
    #[error(transparent)]
    Failed(#[from] Fault),
}

/// A kind of offload backend.
///
/// Registered with an engine under [`name`](Self::name). All methods may be called on any thread;
/// the engine calls at most one of `init`, `deinit` and `bind` of a class at a time.
pub trait ProviderClass: Send + Sync {
    /// The name in configuration and output, e.g. `tc-flower`. Unique within an engine; never
    /// changes.
    fn name(&self) -> &'static str;

    /// Called once, when the class is registered, before any `bind`. An error means that the class
    /// is not registered; `deinit` is then not called.
    ///
    /// # Errors
    /// Whatever makes the class useless on this machine.
    fn init(&self) -> Result<(), Fault> {
        Ok(())
    }

    /// Called once, when the class is unregistered. No port is bound to it then.
    fn deinit(&self) {}

    /// Probes `netdev` and, when the class can serve it, makes its provider.
    ///
    /// The probe is of **this netdev**, not of the machine: two netdevs of one host can differ in
    /// driver and features. `instance` goes into the cookies of rules. Rules of dead instances
    /// ([`Cookie::instance`](super::types::Cookie::instance) differs) found on the netdev stay, to be
    /// [observed](Provider::observe), adopted or deleted, where the provider can take them over; the
    /// others are removed here. Rules of anybody else are left alone.
    ///
    /// Called on the thread of whoever adds the port; may block for the time of some system calls.
    ///
    /// # Errors
    /// [`BindError`]. Whatever the probe made on the netdev (a qdisc, a trial rule) has been
    /// removed again when this returns an error.
    fn bind(&self, netdev: &Netdev, instance: Instance) -> Result<Arc<dyn Provider>, BindError>;

    /// Removes what engines that died have left on a netdev that is **not** to become a port;
    /// returns how many rules there were. Rules of anybody else are left alone. A class that keeps
    /// nothing beyond its process has nothing to do.
    ///
    /// # Errors
    /// When something of a dead engine may be left.
    fn clear_leftovers(&self, ifindex: Ifindex) -> Result<u64, Fault> {
        let _ = ifindex;
        Ok(0)
    }
}
