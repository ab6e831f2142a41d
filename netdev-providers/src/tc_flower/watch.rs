//! What others do at the ingress hook of a port while rules stand there, as the port's own thread hears of it
//! before and after each batch: a qdisc that is removed takes the guards along, and what is made in its place
//! has none, but takes rules.

use std::time::{Duration, Instant};

use super::prios::Prios;
use super::uapi::PARENT_EGRESS;
use crate::contract::types::Ifindex;
use crate::netlink::error::NetlinkError;
use crate::netlink::socket::{Family, Socket};
use crate::netlink::tc::{self, TcChange, TcEvent};

/// Whether rules can be added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Standing {
    /// Guards and qdisc stand, as far as is known.
    #[default]
    Firm,
    /// They may not: to be looked at before the next rule.
    Suspect,
    /// There has been no qdisc since then, by somebody else's hand.
    Aside(Instant),
}

/// What has happened since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// The qdisc was removed, by somebody else: all rules are gone.
    pub(super) qdisc_removed: bool,
    /// All filters of a prio of ours were removed.
    pub(super) guards_suspect: bool,
    /// Messages were lost: any of it may have happened.
    pub(super) lost: bool,
    /// Filters in front have come or gone.
    pub(super) front: bool,
    /// Somebody added a filter for egress, of this prio.
    pub(super) egress: Option<u16>,
}

/// A socket that hears of one netdev.
#[derive(Debug)]
pub(super) struct Watch {
    socket: Socket,
    prios: Prios,
    /// Port ids of sockets of ours that qdiscs and guards are changed through.
    ours: Vec<u32>,
}

impl Watch {
    pub(super) fn open(ifindex: Ifindex, prios: Prios) -> Result<Self, NetlinkError> {
        let socket = Socket::open(Family::Route)?;
        tc::listen(&socket, prios.first(), Some(ifindex))
            .map_err(|source| NetlinkError::Io { call: "setsockopt(SO_ATTACH_FILTER)", source })?;
        socket.join(tc::GROUP)?;
        Ok(Self { socket, prios, ours: Vec::new() })
    }

    /// What is changed through this socket, we do ourselves.
    pub(super) fn is_ours(&mut self, port: u32) {
        self.ours.push(port);
    }

    /// What has happened since the last call.
    pub(super) fn seen(&mut self) -> Seen {
        let mut seen = Seen::default();
        let Self { socket, prios, ours } = self;
        loop {
            let read = socket.recv(Duration::ZERO, |messages| {
                for event in messages.filter_map(|m| TcEvent::parse(&m)) {
                    if !ours.contains(&event.origin) {
                        note(&mut seen, *prios, event.change);
                    }
                }
            });
            match read {
                Ok(()) => {}
                Err(NetlinkError::TimedOut(_)) => return seen,
                // Messages were lost, or the socket is of no use: whatever may have happened is looked for.
                Err(_) => {
                    seen.lost = true;
                    seen.front = true;
                    return seen;
                }
            }
        }
    }
}

fn note(seen: &mut Seen, prios: Prios, change: TcChange) {
    match change {
        TcChange::QdiscMade | TcChange::EgressQdisc => {}
        TcChange::QdiscRemoved => {
            seen.qdisc_removed = true;
            seen.front = true;
        }
        TcChange::Filter { parent, prio, all_gone } => {
            if all_gone && prios.contains(prio) {
                seen.guards_suspect = true;
            }
            seen.front |= prio < prios.first();
            if parent == PARENT_EGRESS && !all_gone {
                seen.egress = Some(prio);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::tc::TcChange::{Filter, QdiscMade, QdiscRemoved};

    #[test]
    fn what_others_do_is_told_by_what_it_means_for_the_port() {
        let prios = Prios::new(0xc100).unwrap();
        let seen = |change| {
            let mut seen = Seen::default();
            note(&mut seen, prios, change);
            (seen.qdisc_removed, seen.guards_suspect, seen.front)
        };
        let filter = |prio, all_gone| Filter { parent: 0xffff_fff2, prio, all_gone };
        assert_eq!(seen(QdiscMade), (false, false, false));
        assert_eq!(seen(QdiscRemoved), (true, false, true));
        assert_eq!(seen(filter(7, false)), (false, false, true));
        assert_eq!(seen(filter(7, true)), (false, false, true));
        assert_eq!(seen(filter(0xc0fe, true)), (false, false, true));
        assert_eq!(seen(filter(0xc0ff, true)), (false, true, false));
        assert_eq!(seen(filter(0xc100, true)), (false, true, false));
        assert_eq!(seen(filter(0xc10c, true)), (false, false, false), "behind ours");
        let mut egress = Seen::default();
        note(&mut egress, prios, Filter { parent: PARENT_EGRESS, prio: 7, all_gone: false });
        assert_eq!((egress.egress, egress.front), (Some(7), true));
    }
}
