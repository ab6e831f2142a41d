//! What all ports of the class share: options, the table, the reader of conntrack, and what the kernel
//! is set to.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use nix::errno::Errno;
use tracing::{debug, info, warn};

use super::key::ConnId;
use super::readback::Readback;
use super::table::{Table, TableError};
use crate::contract::provider::Fault;
use crate::contract::types::Netdev;
use crate::netlink::link::{Link, Links};
use crate::netlink::modules::Lacking;
use crate::netlink::{Family, NetlinkError, Socket};

/// Whether conntrack counts, in the network namespace of the thread that opens it.
const ACCOUNTING: &str = "/proc/sys/net/netfilter/nf_conntrack_acct";

/// Options of the class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NfFlowtableConfig {
    /// Name of the table in family `inet`.
    pub table: String,
    /// Connections selected on one port at most.
    pub max_rules: usize,
    /// Whether conntrack's accounting is switched on while a port is bound, and put back afterwards.
    /// Without it there are no counters.
    pub accounting: bool,
}

impl Default for NfFlowtableConfig {
    fn default() -> Self {
        Self { table: "ctoffload_flow".to_owned(), max_rules: 1 << 20, accounting: true }
    }
}

/// What the ports share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) config: NfFlowtableConfig,
    state: Mutex<State>,
    readback: Mutex<Option<Readback>>,
    /// The netlink port of the table's socket, 0 when there was none yet.
    port_id: AtomicU32,
    next_rule: AtomicU64,
    /// The kernel has no flowtables, which every netdev without a list is asked for.
    lacking: Lacking,
}

/// Where the flowtable is to forward what a port receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wants {
    Software,
    /// In hardware where the driver takes it.
    HardwareIfPossible,
    /// Or not at all.
    Hardware,
}

/// What changes with every port and every element.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) table: Option<Table>,
    /// How many elements of all ports each connection has.
    pub(super) selected: HashMap<ConnId, u32>,
    /// Accounting was off, and we switched it on.
    switched_on: bool,
    /// The kernel makes entries of which one netdev alone is in the flowtable.
    pub(super) alone: bool,
}

impl Shared {
    pub(super) fn new(config: NfFlowtableConfig) -> Self {
        Self { config, ..Self::default() }
    }

    /// The netlink port of the table's socket, when there has been one.
    pub(super) fn port_id(&self) -> Option<NonZeroU32> {
        NonZeroU32::new(self.port_id.load(Ordering::Acquire))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // Every change of it is whole before anything that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same for those who do not wait; `None` while somebody changes it.
    pub(super) fn try_state(&self) -> Option<MutexGuard<'_, State>> {
        match self.state.try_lock() {
            Ok(state) => Some(state),
            Err(TryLockError::Poisoned(e)) => Some(e.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Runs `f` on the reader of conntrack.
    pub(super) fn read_back<R>(
        &self,
        f: impl FnOnce(&mut Readback) -> Result<R, NetlinkError>,
    ) -> Result<R, Fault> {
        let mut readback = self.readback.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *readback {
            Some(r) => f(r).map_err(|e| e.into_fault("reading conntrack")),
            None => Err(Fault::new("no port is bound")),
        }
    }

    pub(super) fn new_rule(&self) -> u64 {
        self.next_rule.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Adds the port to the table, which is made when there is none.
    pub(super) fn attach(&self, link: &Link, wants: Wants) -> Result<(), TableError> {
        let wants_hardware = wants != Wants::Software;
        let otherwise = wants != Wants::Hardware;
        let refused = |e: &TableError| otherwise && e.errno() == Some(Errno::EOPNOTSUPP);
        let mut state = self.state();
        let Some(table) = &mut state.table else {
            let mut readback = self.readback.lock().unwrap_or_else(PoisonError::into_inner);
            let made = |hardware| {
                let socket = Socket::open_with_new_port_id(Family::Netfilter)?;
                // Before anything is announced.
                self.port_id.store(socket.port_id()?, Ordering::Release);
                Table::install(socket, &self.config.table, Links::open()?, link, hardware)
            };
            let lacks = |e: &TableError| e.errno() == Some(Errno::ENOENT);
            let table = self.lacking.ask(lacks, || match made(wants_hardware) {
                Err(e) if wants_hardware && refused(&e) => made(false),
                other => other,
            })?;
            *readback = Some(Readback::open()?);
            state.table = Some(table);
            state.alone = makes_entries_of_one_netdev();
            state.switched_on = self.config.accounting && switch_accounting_on();
            return Ok(());
        };
        if table.is_hardware() {
            if wants_hardware {
                match table.add_port(link, true) {
                    Err(e) if refused(&e) => {}
                    other => return other,
                }
            }
            info!(
                port = link.name,
                "the flowtable goes on without its offload flag, which holds for all its ports or for none"
            );
        }
        if !otherwise {
            return Err(TableError::SoftwareOnly);
        }
        table.add_port(link, false)
    }

    /// Takes the port out again, and with the last one the table.
    pub(super) fn detach(&self, netdev: &Netdev) -> Result<(), Fault> {
        let mut state = self.state();
        let Some(mut table) = state.table.take() else { return Ok(()) };
        let fault = |e: TableError| Fault {
            what: "taking the port out of the flowtable".into(),
            errno: e.errno(),
            detail: Some(e.to_string()),
        };
        if table.ports().iter().any(|p| *p != netdev.ifindex) {
            let removed = table.remove_port(netdev.ifindex).map_err(fault);
            state.table = Some(table);
            return removed;
        }
        if std::mem::take(&mut state.switched_on)
            && let Err(e) = std::fs::write(ACCOUNTING, "0")
        {
            warn!("{ACCOUNTING} stays on: {e}");
        }
        *self.readback.lock().unwrap_or_else(PoisonError::into_inner) = None;
        table.remove().map_err(fault)
    }
}

/// From 7.2 on, Linux makes an entry only where it finds both netdevs of a connection in the flowtable
/// (`nft_dev_forward_path` gives up instead of going by the route). Nothing in its interface tells which of
/// the two it does. A kernel that does not say what it is counts as an older one: the worst is an element
/// that selects in vain.
fn makes_entries_of_one_netdev() -> bool {
    release().is_none_or(|release| release < (7, 2))
}

/// The kernel's version, without its last part.
fn release() -> Option<(u32, u32)> {
    version_of(&std::fs::read_to_string("/proc/sys/kernel/osrelease").ok()?)
}

fn version_of(release: &str) -> Option<(u32, u32)> {
    let (major, rest) = release.split_once('.')?;
    let minor = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// True when it was off.
fn switch_accounting_on() -> bool {
    let off = is_accounting().is_some_and(|on| !on);
    if off && let Err(e) = std::fs::write(ACCOUNTING, "1") {
        debug!("{ACCOUNTING}: {e}");
        return false;
    }
    off
}

/// Whether conntrack counts; `None` when that cannot be read.
pub(super) fn is_accounting() -> Option<bool> {
    let text = std::fs::read_to_string(Path::new(ACCOUNTING)).ok()?;
    Some(text.trim() != "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_known_by_what_it_calls_itself() {
        for (release, version) in [
            ("6.1.0-41-amd64\n", (6, 1)),
            ("6.12.57+deb13-amd64\n", (6, 12)),
            ("7.3.4+deb13-amd64\n", (7, 3)),
            ("7.2-rc1\n", (7, 2)),
            ("10.0\n", (10, 0)),
        ] {
            assert_eq!(version_of(release), Some(version), "{release}");
        }
        for nonsense in ["", "7", "7.", "seven.3", "7.x"] {
            assert_eq!(version_of(nonsense), None, "{nonsense}");
        }
        assert!(
            (7, 1) < (7, 2) && (6, 18) < (7, 2) && (10, 0) > (7, 2),
            "as versions, not as text"
        );
    }
}
