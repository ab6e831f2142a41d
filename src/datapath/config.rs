//! Settings of the kernel datapath.

use std::time::Duration;

use super::admission::Admission;
use super::pacing::SweepBounds;

/// From how many packets on, where nothing else is said: what carries no more is better left alone.
pub const MIN_PACKETS: u64 = 20;

/// Settings of the kernel datapath.
#[derive(Clone, Debug)]
pub struct Config {
    /// The NFLOG group that sights come through.
    pub nflog_group: u16,
    /// Elements of the ledger: (netdev, connection, direction).
    pub ledger_size: u32,
    /// Offload UDP that nobody has answered.
    pub one_way_udp: bool,
    /// Offload also what bridges forward without routing it; switches bridge conntrack on.
    pub bridged: bool,
    /// From how many packets on, both directions together; 0: from the first that can be.
    pub min_packets: u64,
    /// From how many bytes on, both directions together; 0: from the first packet that can be.
    pub min_bytes: u64,
    /// Rules that a dead daemon left, and that are what they would be now, are taken over.
    pub adopt: bool,
    /// Filters of TC with a smaller prio stand in front of rules: who adds or removes one is heard of.
    pub tc_prio: u16,
    /// What can be changed while it runs, as it is at the start.
    pub tunables: Tunables,
}

/// What can be changed while the datapath runs ([`Backend::set_tunables`](super::Backend::set_tunables)).
#[derive(Clone, Debug, PartialEq)]
pub struct Tunables {
    /// Which connections may be offloaded.
    pub admission: Admission,
    /// Netdevs, by name, where rules may pass by what stands at egress.
    pub bypass_egress: Vec<glob::Pattern>,
    /// What happens to offloaded connections when the firewall's rules change.
    pub on_ruleset_change: OnRulesetChange,
    /// How decisions of the firewall are renewed.
    pub revalidation: Revalidation,
    /// How often usage is swept.
    pub sweeps: SweepBounds,
}

impl Tunables {
    /// Whether rules may pass by what stands at egress of the netdev of this name.
    #[must_use]
    pub fn may_be_passed(&self, netdev: &str) -> bool {
        self.bypass_egress.iter().any(|p| p.matches(netdev))
    }
}

/// What happens to offloaded connections when the rules of nf_tables change: their packets no
/// longer pass them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnRulesetChange {
    /// They go back to the slow path, and are offloaded again if the new rules let them pass.
    #[default]
    Flush,
    /// They stay offloaded.
    Keep,
}

/// How decisions of the firewall are renewed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Revalidation {
    /// How long a decision may stand at most, where the firewall can change without a word; zero: as
    /// long as the connection lives.
    pub every: Duration,
    /// How many connections are taken back per second when a change concerns all; `None`: all at once.
    pub rate: Option<u32>,
}

impl Default for Revalidation {
    fn default() -> Self {
        Self { every: Duration::from_secs(60), rate: None }
    }
}
