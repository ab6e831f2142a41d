//! The contract between the engine and a provider.
//!
//! Read in this order: [`provider`] (what a backend implements and what it may rely on),
//! [`operation`] (the unit of work and its one result), [`flow`] (what is to be matched and done),
//! [`class`] (how a backend is chosen for a netdev), [`reason`] (why something is not offloaded),
//! [`types`] (the identifiers).

pub mod class;
pub mod flow;
pub mod operation;
pub mod provider;
pub mod reason;
pub mod types;

#[cfg(test)]
mod tests;
