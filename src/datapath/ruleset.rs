//! Changes of the firewall. Packets that rules of ours forward do not pass it, so a connection that
//! the new ruleset would stop has to come back to the slow path, where it is stopped; one that it
//! lets pass is sighted again and offloaded again; or it stays where it is, as configured.
//!
//! `nft flush ruleset` passes over tables that have an owner, as ours have: nothing is to be repaired.
//! It is a change like others, and reported, since the firewall is gone.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use netdev_providers::netlink::{Family, NetlinkError, Socket};
use nix::errno::Errno;

use super::TICK;
use super::backend::{OnRulesetChange, Shared};
use crate::engine::{Engine, FlushFilter};

/// `NFNLGRP_NFTABLES` (linux/netfilter/nfnetlink.h).
const NFNLGRP_NFTABLES: u32 = 7;
/// `NFNL_SUBSYS_NFTABLES` and `NFT_MSG_NEWGEN`: ends the announcement of every transaction.
const NEWGEN: u16 = 10 << 8 | 15;
/// `NFT_MSG_DELTABLE`.
const DELTABLE: u16 = 10 << 8 | 2;
/// A tool that changes rules or set elements all the time makes us flush this often at most.
const AT_MOST_EVERY: Duration = Duration::from_secs(1);

pub(super) struct Watch {
    socket: Socket,
    backend: Shared,
}

/// What others have announced.
#[derive(Clone, Copy, Default)]
struct Changes {
    any: bool,
    /// Tables that are gone.
    tables: u32,
}

impl Watch {
    pub(super) fn open(backend: Shared) -> Result<Self, NetlinkError> {
        let socket = Socket::open(Family::Netfilter)?;
        socket.join(NFNLGRP_NFTABLES)?;
        Ok(Self { socket, backend })
    }

    pub(super) fn run(mut self, engine: &Engine, stop: &AtomicBool) {
        // Due at once for the first change; the last of a burst is never forgotten.
        let (mut changes, mut earliest) = (Changes::default(), Instant::now());
        while !stop.load(Ordering::Relaxed) {
            let backend = &self.backend;
            let read = self.socket.recv(TICK, |messages| {
                for m in messages.filter(|m| matches!(m.ty, NEWGEN | DELTABLE)) {
                    if !backend.is_own_change(m.port) {
                        changes.any = true;
                        changes.tables += u32::from(m.ty == DELTABLE);
                    }
                }
            });
            match read {
                Ok(()) => {}
                Err(NetlinkError::TimedOut(_)) => {}
                Err(e) if e.errno() == Some(Errno::ENOBUFS) => changes.any = true,
                Err(e) => {
                    tracing::error!("nf_tables events: {e}");
                    std::thread::sleep(TICK);
                }
            }
            // At a stop our own tables go, with the socket that told them from others.
            let stopped = stop.load(Ordering::Relaxed);
            if changes.any && !stopped && Instant::now() >= earliest {
                let Changes { tables, .. } = std::mem::take(&mut changes);
                earliest = Instant::now() + AT_MOST_EVERY;
                if tables > 0 {
                    tracing::warn!(tables, "tables were deleted from nf_tables; ours stand");
                }
                match self.backend.config().on_ruleset_change {
                    OnRulesetChange::Keep => tracing::debug!("the ruleset changed"),
                    OnRulesetChange::Flush => {
                        let flushed = engine.flush(&FlushFilter::default()).unwrap_or_default();
                        let rules: u64 = flushed.iter().map(|(_, n)| n).sum();
                        tracing::info!(
                            rules,
                            "the ruleset changed: connections go back to the slow path"
                        );
                    }
                }
            }
        }
    }
}
