//! Which connections sights are of. The log message says it itself; where the kernel does not put the connection there
//! (no `CONFIG_NETFILTER_NETLINK_GLUE_CT`), conntrack is asked, of all sights of a read together.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use netdev_providers::{Direction, Tuple, Zone};

use super::netfilter::conntrack::{Conntrack, ConntrackError, CtEntry, CtId};
use super::netfilter::nflog::Sight;

/// A whole table is read for at most this part of the time.
const SEARCHING: u32 = 20;

/// The connection of a sight, and which of its directions.
pub(super) type Whose = (CtEntry, CtId, Direction);

pub(super) struct Identifier {
    /// Nobody else waits for this one.
    conntrack: Conntrack,
    /// When all entries may be searched again.
    search_from: Instant,
}

impl Identifier {
    pub(super) fn open() -> Result<Self, ConntrackError> {
        Ok(Self { conntrack: Conntrack::open()?, search_from: Instant::now() })
    }

    /// The connections of sights, in order; what their log messages say of them is taken out.
    ///
    /// What is in another zone no look-up finds by its packet, so all entries are searched for it, once for all that
    /// was not found and not more often than is bearable. (It can also have ended.) What is not searched for is
    /// known to nobody, and is sighted again when the ledger has been compared.
    pub(super) fn identify(&mut self, sights: &mut [Sight]) -> Vec<Option<Whose>> {
        let mut whose = self.identify_quickly(sights);
        let mut lost: HashMap<Tuple, Vec<usize>> = HashMap::new();
        for (n, (sight, whose)) in sights.iter().zip(&whose).enumerate() {
            if whose.is_none()
                && sight.direction.is_none()
                && let Some(packet) = sight.leaving_tuple()
            {
                lost.entry(packet).or_default().push(n);
            }
        }
        let began = Instant::now();
        if lost.is_empty() || began < self.search_from {
            return whose;
        }
        let searched = self.conntrack.dump_each(|entry| {
            for d in Direction::BOTH {
                if let (Some(of), Some(id)) = (lost.get(&entry.outgoing(d)), entry.id) {
                    of.iter().for_each(|&n| whose[n] = Some((entry.clone(), id, d)));
                }
            }
        });
        if let Err(e) = searched {
            tracing::warn!("sights could not be looked for among all connections: {e}");
        }
        self.search_from = next_search(began, Instant::now());
        whose
    }

    /// The same, but where that would take a search of all connections: not for what somebody may send at will.
    pub(super) fn identify_quickly(&mut self, sights: &mut [Sight]) -> Vec<Option<Whose>> {
        let mut whose = vec![None; sights.len()];
        let (mut numbers, mut packets) = (Vec::new(), Vec::new());
        for (n, sight) in sights.iter_mut().enumerate() {
            if let (Some(entry), Some(direction)) = (sight.ct.take(), sight.direction) {
                whose[n] = entry.id.map(|id| (entry, id, direction));
            } else if let Some(packet) = sight.leaving_tuple() {
                numbers.push(n);
                packets.push(packet);
            }
        }
        if packets.is_empty() {
            return whose;
        }
        match self.conntrack.find_leaving(Zone(0), &packets) {
            Ok(found) => {
                for (n, found) in numbers.into_iter().zip(found) {
                    whose[n] = found.and_then(|(entry, d)| {
                        let id = entry.id?;
                        Some((entry, id, d))
                    });
                }
            }
            Err(e) => tracing::warn!("sights could not be looked up: {e}"),
        }
        whose
    }
}

/// When the next search may begin, after one that took from one time to the other.
fn next_search(began: Instant, ended: Instant) -> Instant {
    let took = ended.saturating_duration_since(began);
    ended + took.checked_mul(SEARCHING).unwrap_or(Duration::from_secs(60))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_search_is_not_made_again_soon() {
        let began = Instant::now();
        let ended = began + Duration::from_secs(1);
        assert_eq!(next_search(began, ended), ended + Duration::from_secs(20));
        assert_eq!(next_search(began, began), began);
    }
}
