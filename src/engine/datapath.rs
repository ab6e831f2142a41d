//! What the engine asks of the datapath that it serves.

use std::net::IpAddr;

use netdev_providers::{
    Above, Direction, Flow, FlowMatch, Forward, Generation, Ifindex, Leftover, MacAddr, Netdev,
    Rejection, Tracked, Tuple, VlanId,
};

use super::conn::{ConnHandle, ConnKey};

/// What the datapath noted of the packet that made the offer, for a later [`Datapath::resolve`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PathHint {
    /// The netdev that routed it, or the port of a bridge that bridged it, where that is not the port
    /// itself but one above it.
    pub ingress: Option<Ifindex>,
    /// The MAC address that the packet was sent to, where it is known.
    pub eth_dst: Option<MacAddr>,
    /// Where the packet was sent: the netdev of the route, or the port of the bridge.
    pub egress: Option<Ifindex>,
    /// Its firewall mark, which can select a routing table; `None`: not known.
    pub mark: Option<u32>,
    /// A bridge forwards it, and nobody routes it.
    pub bridged: bool,
    /// The VLAN tag that it has in that bridge.
    pub vlan: Option<u16>,
    /// Which firewall has let it pass, for datapaths that number theirs; `None`: whichever.
    pub firewall: Option<u64>,
}

/// How packets of a flow leave, and what they look like on arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// Destination MAC address on arrival (`None`: any).
    pub eth_dst: Option<MacAddr>,
    /// The VLAN tag on arrival (`None`: none).
    pub vlan: Option<VlanId>,
    /// The longest IP packet that can arrive, in bytes.
    pub ingress_mtu: u32,
    /// Egress netdev, tag, new MAC addresses, new tuple.
    pub forward: Forward,
    /// The neighbour that [`Forward::macs`] belongs to: when it changes, so must the rule.
    pub next_hop: Option<IpAddr>,
    /// The netdev that the packets are routed on when they arrive, where it is not the port itself
    /// but one above it: a VLAN device, a bridge, a bond. Of bridged ones the bridge's port.
    pub iif: Option<Ifindex>,
    /// The netdev of the route (and of [`next_hop`](Self::next_hop)), where it is not
    /// [`Forward::egress`] itself but one above it. Of bridged packets the bridge's port.
    pub oif: Option<Ifindex>,
    /// Stands for all that the datapath was answered when it asked for this path, where that is more than the
    /// other fields say: a path with another number is another path, and a rule that was made for it is taken
    /// back. 0 where nothing is asked.
    pub answer: u16,
}

/// The packets of a direction of a connection, and what becomes of them on this path.
pub(super) fn flow(conn: &ConnHandle, direction: Direction, path: &Path) -> Flow {
    Flow {
        zone: conn.key().zone,
        direction,
        ingress_mtu: path.ingress_mtu,
        matches: FlowMatch {
            eth_dst: path.eth_dst,
            vlan: path.vlan,
            tuple: conn.arriving(direction),
        },
        forward: path.forward,
        above: Above { iif: path.iif, oif: path.oif },
    }
}

/// What the packets of a direction look like when they arrive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrival {
    /// Their destination MAC address (`None`: any).
    pub eth_dst: Option<MacAddr>,
    /// Their VLAN tag (`None`: none).
    pub vlan: Option<VlanId>,
}

/// The packets of a direction of a connection, of which only track is kept.
pub(super) fn tracked(conn: &ConnHandle, direction: Direction, arrival: Arrival) -> Tracked {
    let Arrival { eth_dst, vlan } = arrival;
    Tracked {
        zone: conn.key().zone,
        direction,
        matches: FlowMatch { eth_dst, vlan, tuple: conn.arriving(direction) },
        tuple: conn.leaving(direction),
    }
}

/// What is asked of a provider for one direction.
#[derive(Clone, Debug)]
pub(super) enum Work {
    Forward(Box<Flow>),
    Track(Box<Tracked>),
}

/// The path in an offer.
#[derive(Clone, Debug)]
pub enum PathSpec {
    /// The datapath knows it: nobody is asked.
    Known(Box<Path>),
    /// The rule is only to keep track of the packets ([`Tracked`]): whatever the datapath has put behind it
    /// sends them on, and nobody is asked for a path. For providers that
    /// [can](netdev_providers::Provider::can_track).
    Track(Box<Arrival>),
    /// [`Datapath::resolve`] is asked, on the port's queue thread.
    Resolve(PathHint),
    /// There is to be none: the datapath's own policy keeps the direction on the slow path. The slot
    /// is Rejected for this reason, and so decided for packets to come, and neither the datapath nor
    /// the provider is asked.
    Refused(Box<Rejection>),
}

/// One direction of one connection on one port.
#[derive(Clone, Debug)]
pub struct Sight {
    /// The port's netdev.
    pub ifindex: Ifindex,
    /// Which life of the port.
    pub generation: Generation,
    /// The connection.
    pub conn: ConnHandle,
    /// Which of its directions.
    pub direction: Direction,
}

/// The connection that a rule was recognised as.
#[derive(Clone, Debug)]
pub struct Recognised {
    /// The connection, made for it where the engine did not know it.
    pub conn: ConnHandle,
    /// Which of its directions the rule forwards.
    pub direction: Direction,
    /// The path that its packets take now.
    pub path: PathSpec,
}

/// Callbacks into the datapath. All are called on port queue threads or on the thread that
/// administers the engine, **never on a worker**, and may block for the time of a system call.
/// A userspace datapath that gives the path with every offer can use [`NoDatapath`].
pub trait Datapath: Send + Sync {
    /// Finds the path of an offer that came without one.
    ///
    /// # Errors
    /// Why the direction cannot be offloaded now (no route, neighbour unresolved …).
    fn resolve(&self, sight: &Sight, hint: &PathHint) -> Result<Path, Rejection>;

    /// Counts the changes of what [`resolve`](Self::resolve) answers. A change that is counted while a path is
    /// being resolved may have looked for the rules that it concerns before this one was among them: the path
    /// is resolved again.
    fn changes(&self) -> u64 {
        0
    }

    /// These are about to be offloaded: from now on the datapath may not see their packets. One
    /// result each, in order; an error keeps that one on the slow path.
    fn prepare(&self, sights: &[Sight]) -> Vec<Result<(), Rejection>> {
        vec![Ok(()); sights.len()]
    }

    /// Rules that a dead engine left on this port: for each, in order, the connection that it
    /// belongs to, if that lives and may be offloaded; `create` makes it, or finds it. What is not
    /// recognised is removed.
    fn recognise(
        &self,
        port: &Netdev,
        leftovers: &[Leftover],
        create: &dyn Fn(ConnKey, Tuple, u64) -> Option<ConnHandle>,
    ) -> Vec<Option<Recognised>> {
        let _ = (port, create);
        vec![None; leftovers.len()]
    }

    /// These slots are empty again: the next packet of each is to be offered again.
    fn rearm(&self, sights: &[Sight]);

    /// How many packets of each of these the datapath has forwarded itself since it was last armed;
    /// `None` where it cannot tell. A sweep asks for slots whose rules the NIC has and whose counters
    /// stand still.
    fn forwarded_itself(&self, sights: &[Sight]) -> Vec<Option<u64>> {
        vec![None; sights.len()]
    }

    /// The engine's own thread of this port has panicked, with these words. The port offloads nothing more;
    /// removals are still tried. What was in flight may stand, and who relies on rules being right stops.
    fn port_panicked(&self, port: &Netdev, words: &str) {
        let _ = (port, words);
    }

    /// A slot has changed. For those who watch; called while the slot is locked, so it must neither
    /// block nor call the engine.
    fn slot_changed(&self, port: &Netdev, conn: &ConnHandle, d: Direction, change: SlotChange<'_>) {
        let _ = (port, conn, d, change);
    }
}

/// What became of a slot.
#[derive(Clone, Copy, Debug)]
pub enum SlotChange<'a> {
    /// Its rule is installed.
    Installed,
    /// Its add was refused.
    Rejected(&'a Rejection),
    /// Its rule is gone, by a delete (a flush is announced once, not for every slot).
    Deleted,
}

/// For datapaths that give the path with every offer, and offer whatever packet meets an
/// undecided slot.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoDatapath;

impl Datapath for NoDatapath {
    fn resolve(&self, _: &Sight, _: &PathHint) -> Result<Path, Rejection> {
        Err(Rejection::with_detail(
            netdev_providers::Reason::NoRoute,
            "the offer came without a path",
        ))
    }
    fn rearm(&self, _: &[Sight]) {}
}
