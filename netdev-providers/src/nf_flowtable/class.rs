//! The provider class: [`bind`](ProviderClass::bind).

use std::sync::Arc;

use nix::errno::Errno;
use tracing::{debug, info};

use super::provider::NfFlowtable;
use super::shared::{NfFlowtableConfig, Shared, Wants};
use crate::contract::class::{BindError, ProviderClass};
use crate::contract::provider::{Fault, Provider};
use crate::contract::types::{HwFlags, Instance, Netdev};
use crate::netlink::generic::has_feature;
use crate::netlink::link::Links;

/// `ARPHRD_ETHER` (`linux/if_arp.h`).
const ARPHRD_ETHER: u16 = 1;

/// A feature of netdevs: they offload filters, and flowtables (`ethtool -K NAME hw-tc-offload on`).
const OFFLOADS: &str = "hw-tc-offload";

/// The class `nf-flowtable`: the kernel's flowtable. See the [module](super).
#[derive(Debug, Default)]
pub struct NfFlowtableClass(Arc<Shared>);

impl NfFlowtableClass {
    /// A class with these options.
    #[must_use]
    pub fn new(config: NfFlowtableConfig) -> Self {
        Self(Arc::new(Shared::new(config)))
    }

    /// Whether a change of nf_tables that is announced with this netlink port id was made by this
    /// class.
    #[must_use]
    pub fn is_own_change(&self, port_id: u32) -> bool {
        self.0.port_id().is_some_and(|ours| ours.get() == port_id)
    }

    fn attach(&self, netdev: &Netdev, wants: Wants) -> Result<Arc<dyn Provider>, BindError> {
        if !netdev.ifindex.is_netdev() {
            return Err(BindError::Declined("a port of the datapath's own, and no netdev".into()));
        }
        let link = Links::open()
            .and_then(|mut links| links.get(netdev.ifindex))
            .map_err(|e| BindError::Failed(e.into_fault("reading the netdev")))?
            .ok_or_else(|| {
                BindError::Failed(Fault {
                    what: "reading the netdev".into(),
                    errno: Some(Errno::ENODEV),
                    detail: None,
                })
            })?;
        if link.hardware_type != ARPHRD_ETHER {
            return Err(BindError::Declined(format!(
                "not an Ethernet netdev (ARPHRD {})",
                link.hardware_type
            )));
        }
        if netdev.hw_flags == HwFlags::SkipSw {
            return Err(BindError::Declined(
                "a flowtable forwards in software whatever hardware has not: it cannot be kept to \
                 hardware (skip_sw)"
                    .into(),
            ));
        }
        self.0
            .attach(&link, wants)
            .map_err(|e| BindError::Declined(e.to_string()))
            .inspect_err(|e| debug!(%netdev, "nf-flowtable not bound: {e}"))?;
        let provider = NfFlowtable::new(Arc::clone(&self.0), netdev.clone());
        provider.look_in_front();
        info!(%netdev, "nf-flowtable bound: {}", provider.describe());
        Ok(Arc::new(provider))
    }
}

impl ProviderClass for NfFlowtableClass {
    fn name(&self) -> &'static str {
        "nf-flowtable"
    }

    fn init(&self) -> Result<(), Fault> {
        let name = &self.0.config.table;
        if name.is_empty() || name.len() > 127 || name.contains('\0') {
            return Err(Fault::new("the table's name: 1 to 127 bytes"));
        }
        Ok(())
    }

    fn bind(&self, netdev: &Netdev, _: Instance) -> Result<Arc<dyn Provider>, BindError> {
        let hardware = netdev.hw_flags == HwFlags::Both;
        self.attach(netdev, if hardware { Wants::HardwareIfPossible } else { Wants::Software })
    }

    fn bind_in_hardware(
        &self,
        netdev: &Netdev,
        _: Instance,
    ) -> Result<Arc<dyn Provider>, BindError> {
        if netdev.hw_flags == HwFlags::SkipHw {
            return Err(BindError::Declined("nothing is to be in hardware (skip_hw)".into()));
        }
        // A flowtable cannot be tried: whether the NIC carries what is in it turns out with the first connection. That
        // the driver takes its flag is all that there is, and that it is not switched off.
        let on = !netdev.ifindex.is_netdev()
            || has_feature(netdev.ifindex, OFFLOADS)
                .map_err(|e| BindError::Failed(e.into_fault("reading the netdev's features")))?;
        if !on {
            return Err(BindError::Declined(
                "the NIC offloads nothing, or is not to (ethtool -k NAME: hw-tc-offload)".into(),
            ));
        }
        self.attach(netdev, Wants::Hardware)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::types::{Generation, HwFlags, Ifindex};
    use std::num::NonZeroU32;

    #[test]
    fn options_that_cannot_work_are_refused_at_registration() {
        assert!(NfFlowtableClass::default().init().is_ok());
        for table in ["", "a\0b", &"x".repeat(128)] {
            let config = NfFlowtableConfig { table: table.to_owned(), ..Default::default() };
            assert!(NfFlowtableClass::new(config).init().is_err());
        }
    }

    #[test]
    fn nobodys_changes_are_not_ours() {
        assert!(!NfFlowtableClass::default().is_own_change(0));
    }

    #[test]
    fn a_port_that_is_no_netdev_is_declined_and_nothing_is_left_there() {
        let class = NfFlowtableClass::default();
        let netdev = Netdev {
            ifindex: Ifindex::local(3).unwrap(),
            generation: Generation::new(1).unwrap(),
            name: "dpdk0".into(),
            hw_flags: HwFlags::Both,
        };
        let bound = class.bind(&netdev, Instance(NonZeroU32::MIN));
        assert!(matches!(bound, Err(BindError::Declined(why)) if why.contains("no netdev")));
        assert_eq!(class.clear_leftovers(netdev.ifindex), Ok(0));
    }
}
