//! The class.

use std::sync::Arc;

use super::handle::DummyClass;
use super::provider::Dummy;
use super::state::{Call, Port};
use crate::contract::class::{BindError, ProviderClass};
use crate::contract::provider::{Fault, Provider};
use crate::contract::types::{Instance, Netdev};

impl ProviderClass for DummyClass {
    fn name(&self) -> &'static str {
        self.name
    }

    fn init(&self) -> Result<(), Fault> {
        self.enter(Call::Init, None);
        let mut state = self.state();
        if let Some(fault) = &state.init_fault {
            return Err(fault.clone());
        }
        if state.initialised {
            state.violation("init twice".into());
        }
        state.initialised = true;
        Ok(())
    }

    fn deinit(&self) {
        self.enter(Call::Deinit, None);
        let mut state = self.state();
        if !state.ports.is_empty() {
            state.violation("deinit while a port is bound".into());
        }
        if !std::mem::take(&mut state.initialised) {
            state.violation("deinit without init".into());
        }
    }

    fn bind(&self, netdev: &Netdev, instance: Instance) -> Result<Arc<dyn Provider>, BindError> {
        self.enter(Call::Bind, Some(netdev.ifindex));
        self.bind_netdev(netdev, instance)
    }

    fn bind_in_hardware(
        &self,
        netdev: &Netdev,
        instance: Instance,
    ) -> Result<Arc<dyn Provider>, BindError> {
        self.enter(Call::BindInHardware, Some(netdev.ifindex));
        if !self.state().hardware.contains(&netdev.ifindex) {
            return Err(BindError::Declined("the NIC does not carry its rules".into()));
        }
        self.bind_netdev(netdev, instance)
    }
}

impl DummyClass {
    fn bind_netdev(
        &self,
        netdev: &Netdev,
        instance: Instance,
    ) -> Result<Arc<dyn Provider>, BindError> {
        let mut state = self.state();
        let why =
            state.decline.get(&Some(netdev.ifindex)).or_else(|| state.decline.get(&None)).cloned();
        if let Some(why) = why {
            return Err(BindError::Declined(why));
        }
        if let Some((left, fault)) = state.bind_fault.take() {
            state.bind_fault =
                (left > 1).then(|| (left - u32::from(left < u32::MAX), fault.clone()));
            return Err(fault.into());
        }
        if !state.initialised {
            state.violation(format!("bind of {netdev} before init"));
        }
        let left = state.left.remove(&netdev.ifindex).unwrap_or_default();
        let port = Port::new(netdev.generation, instance, left);
        if state.ports.insert(netdev.ifindex, port).is_some() {
            state.violation(format!("{netdev} was bound already"));
        }
        Ok(Arc::new(Dummy::new(self.clone(), netdev.ifindex, netdev.generation)))
    }
}
