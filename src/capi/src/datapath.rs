//! The caller's datapath, as the trait that the engine asks.

use engine::engine::conn::ConnHandle;
use engine::engine::datapath::{Datapath, NoDatapath, Path, PathHint, Sight, SlotChange};
use netdev_providers::{Direction, Netdev, Reason, Rejection};

use crate::edge::{answered, called};
use crate::values::{DatapathTable, RawPath, RawSight};

/// A table of callbacks.
pub(crate) struct CDatapath(pub(crate) DatapathTable);

// SAFETY: the header demands that the callbacks may be called on any thread with `ctx`.
unsafe impl Send for CDatapath {}
// SAFETY: as above, and at the same time.
unsafe impl Sync for CDatapath {}

impl Datapath for CDatapath {
    fn resolve(&self, sight: &Sight, hint: &PathHint) -> Result<Path, Rejection> {
        let Some(resolve) = self.0.resolve else { return NoDatapath.resolve(sight, hint) };
        let raw = RawSight::of(sight);
        let (hint, mut path) = (RawPath::of_hint(hint), RawPath::empty());
        // SAFETY: of the caller's table, with what the header says that it is given; all of it lives on
        // this stack until it returns.
        let (answer, words) = called(|| unsafe { resolve(self.0.ctx, &raw, &hint, &mut path) });
        answered(answer, words)?;
        path.path(&sight.conn, sight.direction)
            .map_err(|e| Rejection::with_detail(Reason::NoRoute, e.words()))
    }

    fn rearm(&self, sights: &[Sight]) {
        let Some(rearm) = self.0.rearm else { return };
        let raw: Vec<_> = sights.iter().map(RawSight::of).collect();
        // SAFETY: as in `resolve`.
        unsafe { rearm(self.0.ctx, raw.as_ptr(), raw.len()) };
    }

    fn slot_changed(&self, port: &Netdev, conn: &ConnHandle, d: Direction, change: SlotChange<'_>) {
        let Some(slot_changed) = self.0.slot_changed else { return };
        let raw = RawSight::new(conn, port.ifindex, port.generation.get(), d);
        let (state, reason) = match change {
            SlotChange::Installed => (2, 0),
            SlotChange::Rejected(why) => (4, why.reason as u32),
            SlotChange::Deleted => (0, 0),
        };
        // SAFETY: as in `resolve`.
        unsafe { slot_changed(self.0.ctx, &raw, state, reason) };
    }
}
