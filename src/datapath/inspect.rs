//! What the kernel and the datapath know of a connection, also of one that was never sighted: for who asks why. It
//! changes nothing.

use netdev_providers::{L4Proto, Tuple, Zone};

use super::backend::Backend;
use super::config::Config;
use super::ended::Ended;
use super::ends::is_closing;
use super::netfilter::conntrack::{Conntrack, ConntrackError, CtEntry, TcpState};

/// Why the next packet of a connection is not sighted, by its entry of conntrack: the conditions of the ledger's chain
/// (`netfilter/ledger/rules.rs`), in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsighted {
    /// A helper looks into it.
    Helper,
    /// Sequence numbers are adjusted: something changes what it carries.
    SeqAdjust,
    /// Its reply tuple was taken: the kernel's word for a race of two that translate alike.
    NatClash,
    /// It is being deleted.
    Dying,
    /// It is in a flowtable that is not a port's.
    OtherFlowtable,
    /// Conntrack has counted so many packets of it, and `min-packets` wants more.
    Packets(u64),
    /// Conntrack has counted so many bytes of it, and `min-bytes` wants more.
    Bytes(u64),
    /// Conntrack does not count what it carries (it is older than the accounting), and `min-bytes` wants to know.
    Uncounted,
    /// TCP, and conntrack has not seen both ends agree: the handshake is in this state.
    Opening(Option<TcpState>),
    /// TCP that is closing.
    Closing(TcpState),
    /// UDP that nobody has answered.
    OneWay,
}

/// What there is of a connection.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Its entry of conntrack.
    pub entry: Option<CtEntry>,
    /// It is one that has ended lately.
    pub ended: Option<Ended>,
}

impl Backend {
    /// Looks for a connection by any of its tuples: as its packets arrive or leave, in either direction. Asks conntrack
    /// on a socket of its own.
    ///
    /// # Errors
    /// A failure of the exchange with conntrack.
    pub fn find(&self, tuple: &Tuple, zone: Zone) -> Result<Found, ConntrackError> {
        let mut conntrack = Conntrack::open()?;
        let tuples = [*tuple, tuple.inverted()];
        for tuple in &tuples {
            if let Some(entry) = conntrack.by_any_tuple(zone, tuple)? {
                return Ok(Found { entry: Some(entry), ended: None });
            }
        }
        Ok(Found { entry: None, ended: self.ended.find(&tuples) })
    }

    /// Whether the ledger has no room for another sight.
    #[must_use]
    pub fn ledger_is_full(&self) -> bool {
        self.ledger_elements() >= u64::from(self.config().ledger_size)
    }
}

/// Why its next packet is not sighted; `None`: it is.
#[must_use]
pub fn unsighted(entry: &CtEntry, config: &Config) -> Option<Unsighted> {
    let status = entry.status;
    if entry.helper {
        return Some(Unsighted::Helper);
    }
    if status.seq_adjust() {
        return Some(Unsighted::SeqAdjust);
    }
    if status.nat_clash() {
        return Some(Unsighted::NatClash);
    }
    if status.dying() {
        return Some(Unsighted::Dying);
    }
    if status.offload() {
        return Some(Unsighted::OtherFlowtable);
    }
    if let Some(state) = entry.tcp_state
        && is_closing(state)
    {
        return Some(Unsighted::Closing(state));
    }
    match entry.original.proto() {
        L4Proto::Tcp if !status.assured() => return Some(Unsighted::Opening(entry.tcp_state)),
        L4Proto::Udp if !config.one_way_udp && !status.seen_reply() => {
            return Some(Unsighted::OneWay);
        }
        _ => {}
    }
    let sum = |of: fn(&netdev_providers::Counters) -> u64| {
        entry.counters.map(|both| both.iter().map(of).sum::<u64>())
    };
    // What is not counted has, for `min-packets`, as many as it takes.
    if let Some(packets) = sum(|c| c.packets)
        && packets < config.min_packets
    {
        return Some(Unsighted::Packets(packets));
    }
    if config.min_bytes > 0 {
        match sum(|c| c.bytes) {
            None => return Some(Unsighted::Uncounted),
            Some(bytes) if bytes < config.min_bytes => return Some(Unsighted::Bytes(bytes)),
            Some(_) => {}
        }
    }
    None
}
