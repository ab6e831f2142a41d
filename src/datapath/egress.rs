//! Follows who stands where packets leave ([`routing::egress`](super::routing::egress)), and takes back what was
//! decided by it.
//!
//! The kernel announces queueing disciplines and filters; programs of tcx, and filters of blocks that netdevs share, it
//! does not: they are looked for every second, and every ten.

use std::time::{Duration, Instant};

use netdev_providers::Reason;

use super::backend::Shared;
use super::routing::egress::{self, News};
use crate::engine::Engine;
use crate::engine::taken::TakenBack;

/// Who changes filters one by one is not followed one by one.
const NOT_BEFORE: Duration = Duration::from_millis(100);
/// All is read at least this often.
const AT_LEAST: Duration = Duration::from_secs(10);

pub(super) struct Watch {
    backend: Shared,
    engine: Engine,
    looked: Instant,
    /// Something was announced since.
    due: bool,
    failed: bool,
}

impl Watch {
    pub(super) fn new(backend: Shared, engine: Engine) -> Self {
        Self { backend, engine, looked: Instant::now(), due: true, failed: false }
    }

    /// Something has changed.
    pub(super) const fn announced(&mut self) {
        self.due = true;
    }

    /// How long nothing needs to be looked at.
    pub(super) fn idle(&self) -> Duration {
        let after = if self.due { NOT_BEFORE } else { AT_LEAST };
        after.saturating_sub(self.looked.elapsed())
    }

    /// Once a second: whether programs have come or gone.
    pub(super) fn look_for_programs(&mut self) {
        let egress = self.backend.egress();
        let links = self.backend.links().all();
        self.due |= links.iter().any(|l| egress.has_other_programs(l.ifindex));
    }

    /// Looks, when it is time.
    pub(super) fn look_when_due(&mut self) {
        if self.idle().is_zero() {
            self.look();
        }
    }

    pub(super) fn look(&mut self) {
        (self.looked, self.due) = (Instant::now(), false);
        let links = self.backend.links();
        let now = egress::read(links.all().into_iter().map(|l| l.ifindex));
        match &now {
            Ok(_) => self.failed = false,
            Err(e) if !self.failed => {
                self.failed = true;
                tracing::error!(
                    "what stands at egress cannot be read, and rules that would pass it by are refused: {e}"
                );
            }
            Err(_) => {}
        }
        let news = self.backend.egress().set(now.ok());
        if news.is_none() {
            return;
        }
        // What is resolved from now on is of this; what was before is taken back.
        self.backend.changed();
        self.tell(&news);
        let (mut rules, mut again) = (0_u32, 0_u32);
        self.engine.each_slot(|conn, slot| {
            let refused = slot.rejection.as_ref().map(|r| r.reason);
            let goes = match (refused, slot.path) {
                (Some(Reason::OthersAtEgress), _) => true,
                (_, Some(p)) => news.concerns(links, p.egress, p.oif),
                _ => false,
            };
            let (d, generation) = (slot.direction, slot.netdev.generation);
            if goes && self.engine.slot_retract(conn, d, generation, TakenBack::AtEgress) {
                *(if refused.is_some() { &mut again } else { &mut rules }) += 1;
            }
        });
        if rules + again > 0 {
            tracing::info!(
                rules,
                again,
                "what stands at egress has changed: rules taken back, refusals reconsidered"
            );
        }
    }

    fn tell(&self, news: &News) {
        let News::Of(netdevs) = news else { return };
        for &netdev in netdevs {
            let name = self.backend.links().name(netdev);
            match self.backend.egress().at(netdev) {
                Some(there) => tracing::info!(
                    netdev = name,
                    "{there} decides about packets that leave there: rules in a NIC and XDP would pass it by, and are not made"
                ),
                None => tracing::info!(
                    netdev = name,
                    "nobody decides about packets that leave there any more"
                ),
            }
        }
    }
}
