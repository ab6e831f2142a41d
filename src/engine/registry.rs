//! Provider classes by name, in the order in which they were registered, which is that in which they are asked.

use std::sync::Arc;

use netdev_providers::{Fault, ProviderClass};

use super::contain::contained;

/// Why a class was not registered or unregistered.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A class of this name is registered (EEXIST).
    #[error("provider class '{0}' is registered already")]
    Duplicate(&'static str),
    /// The class's `init` failed.
    #[error("provider class '{class}' could not be initialised")]
    Init {
        /// Which class.
        class: &'static str,
        /// What failed.
        #[source]
        source: Fault,
    },
    /// No class of this name is registered (ENOENT).
    #[error("there is no provider class '{name}' (there are: {known})")]
    Unknown {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: String,
    },
    /// A port is bound to the class (EBUSY).
    #[error("provider class '{class}' is in use by port {port}")]
    InUse {
        /// Which class.
        class: String,
        /// The name of one of the ports.
        port: String,
    },
}

/// The registered classes; the position is the priority.
#[derive(Clone, Default)]
pub(super) struct Registry(Vec<Arc<dyn ProviderClass>>);

impl Registry {
    pub(super) fn register(&mut self, class: Arc<dyn ProviderClass>) -> Result<(), RegistryError> {
        let name = class.name();
        if self.0.iter().any(|c| c.name() == name) {
            return Err(RegistryError::Duplicate(name));
        }
        contained(|| class.init())
            .unwrap_or_else(|panicked| Err(Fault::new(panicked)))
            .map_err(|source| RegistryError::Init { class: name, source })?;
        self.0.push(class);
        Ok(())
    }

    pub(super) fn unregister(&mut self, name: &str) -> Result<(), RegistryError> {
        let at = self.0.iter().position(|c| c.name() == name).ok_or_else(|| self.unknown(name))?;
        let class = self.0.remove(at);
        if let Err(panicked) = contained(|| class.deinit()) {
            tracing::error!(class = name, "deinit: {panicked}");
        }
        Ok(())
    }

    /// All classes, or those named, in the order named.
    pub(super) fn select(
        &self,
        names: Option<&[String]>,
    ) -> Result<Vec<Arc<dyn ProviderClass>>, RegistryError> {
        let Some(names) = names else { return Ok(self.0.clone()) };
        names
            .iter()
            .map(|n| self.0.iter().find(|c| c.name() == n).cloned().ok_or_else(|| self.unknown(n)))
            .collect()
    }

    pub(super) fn names(&self) -> Vec<&'static str> {
        self.0.iter().map(|c| c.name()).collect()
    }

    fn unknown(&self, name: &str) -> RegistryError {
        let known = self.names();
        RegistryError::Unknown { name: name.to_owned(), known: known.join(", ") }
    }
}
