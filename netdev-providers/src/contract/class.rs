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
/// the engine calls at most one of `init`, `deinit`, `bind` and `bind_in_hardware` of a class at a time.
///
/// # Which class a netdev gets
/// Where a port has a list of classes, they are asked to [`bind`](Self::bind) in that order. Where it has none, it is to
/// have the best that there is: all classes are asked in the order of their registration whether the NIC carries their
/// rules ([`bind_in_hardware`](Self::bind_in_hardware); not for a port that is to have none in hardware), and if no NIC
/// does, to `bind`, in the same order. The first that accepts has the netdev; why the others did not is shown. What
/// dead engines have left there of other classes' rules is removed then, and the class is asked once more if there was
/// any, so that it finds the netdev without them.
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

    /// The same, if the NIC carries rules of this class: not because a driver is known to, but tried on this netdev
    /// and read back. Whether all shapes of flows fit is not asked; what a port takes in software besides is up to
    /// the class. A class that has nothing in hardware does not write this.
    ///
    /// # Errors
    /// As of `bind`. Rules of dead instances are as they were then, since `bind` of this class, or another, is next.
    fn bind_in_hardware(
        &self,
        netdev: &Netdev,
        instance: Instance,
    ) -> Result<Arc<dyn Provider>, BindError> {
        let _ = (netdev, instance);
        Err(BindError::Declined("it has nothing in hardware".into()))
    }

    /// Whether engines that died have left something of this class on a netdev. Where another class has accepted it,
    /// that one is released, this one [clears](Self::clear_leftovers) the netdev, and the other is asked once more.
    fn has_leftovers(&self, ifindex: Ifindex) -> bool {
        let _ = ifindex;
        false
    }

    /// Removes what engines that died have left on a netdev that is **not** to become a port of this class;
    /// returns how many rules there were. Rules of anybody else are left alone. A class that keeps nothing beyond its process has nothing to do.
    ///
    /// # Errors
    /// When something of a dead engine may be left.
    fn clear_leftovers(&self, ifindex: Ifindex) -> Result<u64, Fault> {
        let _ = ifindex;
        Ok(0)
    }
}
