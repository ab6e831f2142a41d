//! A backend in memory, for tests of whoever drives providers and for trying things out.
//!
//! [`DummyClass`] is a handle that can be cloned: one clone is registered with the engine, another
//! stays with the test, which sets how the backend behaves and looks at what it holds.
//!
//! ```
//! use std::time::Duration;
//! use netdev_providers::dummy::DummyClass;
//! use netdev_providers::{ProviderClass, Reason};
//!
//! let dummy = DummyClass::new("dummy");
//! dummy.set_capacity(1000);
//! dummy.set_latency(Some(Duration::from_millis(3))); // operations stay pending
//! dummy.fail_next(2, Reason::Busy);                  // the next two that complete fail
//! // engine.register(Arc::new(dummy.clone())); ... offers ...
//! dummy.advance(Duration::from_millis(3));           // what is due completes, on this thread
//! assert_eq!(dummy.name(), "dummy");
//! assert!(dummy.violations().is_empty());            // the engine kept its promises
//! ```
//!
//! Several classes of different names may live in one process; nothing is global. An operation takes
//! effect when it **completes**: at once in `submit` by default, with [`DummyClass::set_latency`]
//! when the clock of the test has passed, or when the test releases it, in any order it likes.
//! Completions run on the thread that causes them, outside any lock of this module.

mod class;
mod handle;
mod provider;
mod state;
#[cfg(test)]
mod tests;

pub use handle::DummyClass;
pub use state::{Call, DummyRule, Pending};
