//! The provider class: options, what it needs of the machine, and [`bind`](ProviderClass::bind).

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tracing::{debug, info};

use super::bpf::Programs;
use super::handles::MAX_LANES;
use super::hook::Hook;
pub use super::hook::QdiscKind;
use super::occupants::{self, Occupants};
use super::plan::Plan;
use super::prios::Prios;
use super::probe;
use super::provider::{Sockets, TcFlower};
use super::threads::Threads;
use crate::contract::class::{BindError, ProviderClass};
use crate::contract::provider::{Fault, Provider};
use crate::contract::types::{HwFlags, Ifindex, Instance, Netdev};
use crate::netlink::error::NetlinkError;
use crate::netlink::modules::Lacking;

/// Options of the class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcFlowerConfig {
    /// The first of twelve consecutive prios that rules stand at; should somebody else's filters be at
    /// one of them, the next twelve are tried, and so on. The default, 0xc100, is behind all that the
    /// kernel gives to filters without a prio.
    pub prio_base: u16,
    /// How many messages go to the kernel in one system call, and are acknowledged in another: at most,
    /// for long messages are sent earlier.
    pub batch: usize,
    /// Through how many sockets the rules of one port are written at once, each on a thread: at most
    /// 64. `None`: as many as there are processors, but not more than four. The threads are the
    /// class's: all ports share them.
    pub writers: Option<NonZeroUsize>,
    /// Whether actions that run in software count per processor. Several processors that forward one flow at
    /// a time do not contend then; but a rule takes half as long again to add, since the kernel allocates
    /// these counters under one lock, and some 50 bytes more per action and processor. A NIC hands
    /// the packets of one flow to one processor, so the default is not to (nor does OVS: `lib/tc.c`).
    /// Rules that only the NIC carries out (`skip_sw`) never do: nothing but a dump adds to their counters.
    pub percpu_stats: bool,
    /// Which qdisc is made on a netdev that has none with an ingress hook.
    pub qdisc: QdiscKind,
}

impl Default for TcFlowerConfig {
    fn default() -> Self {
        Self {
            prio_base: 0xc100,
            batch: 256,
            writers: None,
            percpu_stats: false,
            qdisc: QdiscKind::default(),
        }
    }
}

impl TcFlowerConfig {
    fn writers(&self) -> usize {
        let processors = || std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        self.writers.map_or_else(|| processors().min(DEFAULT_WRITERS), NonZeroUsize::get)
    }
}

/// Writers of a port, where nothing else was said: the kernel's memory allocator has locks of its own,
/// and others have something to do too.
const DEFAULT_WRITERS: usize = 4;

/// The class `tc-flower`: rules of the flower classifier on a netdev's ingress. See the
/// [module](super).
#[derive(Debug, Default)]
pub struct TcFlowerClass {
    config: TcFlowerConfig,
    /// Loaded at the first bind that succeeds in it.
    programs: Mutex<Option<Arc<Programs>>>,
    /// Where writers run that are not alone. Made at the first bind.
    threads: OnceLock<Arc<Threads>>,
    /// The kernel has no flower, which every netdev without a list is asked for.
    lacking: Lacking,
}

impl TcFlowerClass {
    /// A class with these options.
    #[must_use]
    pub fn new(config: TcFlowerConfig) -> Self {
        Self { config, ..Self::default() }
    }

    fn threads(&self) -> Arc<Threads> {
        let make = || Arc::new(Threads::new(self.config.writers()));
        Arc::clone(self.threads.get_or_init(make))
    }

    fn programs(&self) -> Result<Arc<Programs>, String> {
        let mut loaded = self.programs.lock().unwrap_or_else(PoisonError::into_inner);
        match &*loaded {
            Some(programs) => Ok(Arc::clone(programs)),
            None => {
                let programs = Programs::load().map(Arc::new).map_err(|e| {
                    format!(
                        "the bpf system call does not load the programs of rules and guards: {e}"
                    )
                })?;
                *loaded = Some(Arc::clone(&programs));
                Ok(programs)
            }
        }
    }

    /// Only if the NIC carries rules, if that is asked for.
    fn bind_where(
        &self,
        netdev: &Netdev,
        instance: Instance,
        in_hardware: bool,
    ) -> Result<Arc<dyn Provider>, BindError> {
        if !netdev.ifindex.is_netdev() {
            return Err(BindError::Declined("a port of the datapath's own, and no netdev".into()));
        }
        let threads = self.threads();
        let lanes = threads.lanes();
        let mut sockets = Sockets::open(netdev.ifindex, lanes)
            .map_err(|e| BindError::Failed(e.into_fault("opening netlink sockets")))?;
        let bound = probe::bind(
            &mut sockets.hook,
            &probe::Wanted {
                instance,
                hw_flags: netdev.hw_flags,
                prio_base: self.config.prio_base,
                qdisc: self.config.qdisc,
                percpu_stats: self.config.percpu_stats,
                programs: &|| self.programs(),
                in_hardware: in_hardware.then_some(&self.lacking),
            },
        )
        .inspect_err(|e| debug!(%netdev, "tc-flower not bound: {e}"))?;
        let plan = Plan::new(instance, bound, self.config.batch, self.config.qdisc);
        let made = TcFlower::new(Arc::new(plan), sockets, threads);
        let provider = made.map_err(|e| BindError::Failed(e.into_fault("watching the netdev")))?;
        info!(%netdev, "tc-flower bound: {}", provider.describe());
        Ok(Arc::new(provider))
    }
}

impl ProviderClass for TcFlowerClass {
    fn name(&self) -> &'static str {
        "tc-flower"
    }

    fn init(&self) -> Result<(), Fault> {
        if Prios::new(self.config.prio_base).is_none() {
            return Err(Fault::new(format!(
                "prio_base {}: twelve prios from 1 to 65535 are needed",
                self.config.prio_base
            )));
        }
        if !(1..=256).contains(&self.config.batch) {
            return Err(Fault::new(format!("batch {}: 1 to 256", self.config.batch)));
        }
        if self.config.writers.is_some_and(|n| n.get() > MAX_LANES) {
            return Err(Fault::new(format!("writers: 1 to {MAX_LANES}")));
        }
        Ok(())
    }

    fn bind(&self, netdev: &Netdev, instance: Instance) -> Result<Arc<dyn Provider>, BindError> {
        self.bind_where(netdev, instance, false)
    }

    fn bind_in_hardware(
        &self,
        netdev: &Netdev,
        instance: Instance,
    ) -> Result<Arc<dyn Provider>, BindError> {
        if netdev.hw_flags == HwFlags::SkipHw {
            return Err(BindError::Declined("nothing is to be in hardware (skip_hw)".into()));
        }
        self.bind_where(netdev, instance, true)
    }

    fn has_leftovers(&self, ifindex: Ifindex) -> bool {
        let look = || -> Result<bool, NetlinkError> {
            let mut hook = Hook::open(ifindex)?;
            if hook.qdisc()?.is_none() {
                return Ok(false);
            }
            Ok(Occupants::read(&mut hook)?.has_ours())
        };
        ifindex.is_netdev() && look().unwrap_or(false)
    }

    fn clear_leftovers(&self, ifindex: Ifindex) -> Result<u64, Fault> {
        if !ifindex.is_netdev() {
            return Ok(0);
        }
        let clear = || {
            let mut hook = Hook::open(ifindex)?;
            if hook.qdisc()?.is_none() {
                return Ok(0);
            }
            let cleared = occupants::clear_leftovers(&mut hook)?;
            if cleared.made_qdisc {
                hook.delete_unused_qdisc()?;
            }
            Ok(cleared.removed)
        };
        clear().map_err(|e: NetlinkError| e.into_fault("removing what a dead engine left"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::types::Generation;
    use std::num::NonZeroU32;

    #[test]
    fn options_that_cannot_work_are_refused_at_registration() {
        assert!(TcFlowerClass::default().init().is_ok());
        let with = |config| TcFlowerClass::new(config).init();
        assert!(with(TcFlowerConfig { prio_base: 0, ..Default::default() }).is_err());
        assert!(with(TcFlowerConfig { prio_base: 0xfff5, ..Default::default() }).is_err());
        assert!(with(TcFlowerConfig { batch: 0, ..Default::default() }).is_err());
        let writers = NonZeroUsize::new(MAX_LANES + 1);
        assert!(with(TcFlowerConfig { writers, ..Default::default() }).is_err());
    }

    #[test]
    fn a_port_that_is_no_netdev_is_declined_and_nothing_is_left_there() {
        let class = TcFlowerClass::default();
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
