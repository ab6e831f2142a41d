//! Connections that somebody asks for: which of them, in which order, a piece of the table at a time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::IpAddr;

use netdev_providers::{Generation, Ifindex, L4Proto, Reason, Tuple, Zone};

use super::told::Told;
use crate::control::error::ControlError;
use crate::control::filter::{ConnFilter, SortBy};
use crate::control::server::Found;
use crate::engine::conn::ConnHandle;
use crate::engine::slot::SlotState;
use crate::engine::view::SlotView;

/// Of no more connections than these, the oldest are told first also where nobody asks for an order. Of many, whoever
/// asks would have to wait for all to be put in order.
const SORTED: usize = 1 << 12;

/// So many connections are looked at before the server may do something else: some hundreds of microseconds.
const PIECE: usize = 256;

/// A filter whose names have been looked up.
pub(super) struct Wanted {
    filter: ConnFilter,
    port: Option<Generation>,
    egress: Option<Ifindex>,
    state: Option<SlotState>,
    reason: Option<Reason>,
}

impl Wanted {
    /// `port` is the one that the filter names.
    ///
    /// # Errors
    /// A name of what does not exist.
    pub(super) fn new(
        filter: ConnFilter,
        port: Option<Generation>,
        told: &Told,
    ) -> Result<Self, ControlError> {
        let state = filter.state.as_deref().map(|name| {
            SlotState::SHOWN.into_iter().find(|s| s.name() == name).ok_or_else(|| {
                let names = SlotState::SHOWN.map(SlotState::name).join(", ");
                ControlError::invalid(format!("'{name}' is no state of a slot: there are {names}"))
            })
        });
        let reason = filter.reason.as_deref().map(|name| {
            Reason::ALL.iter().find(|r| r.name() == name).copied().ok_or_else(|| {
                ControlError::invalid(format!("'{name}' is no reason of a rejection"))
            })
        });
        let egress = filter.egress.as_deref().map(|name| {
            let link = told.links.by_name(name).map(|link| link.ifindex);
            link.ok_or_else(|| ControlError::not_found(format!("there is no netdev '{name}'")))
        });
        if let Some(name) = filter.provider.as_deref() {
            let classes: Vec<_> = told.engine.classes().into_iter().map(|(name, _)| name).collect();
            if !classes.contains(&name) {
                let names = classes.join(", ");
                return Err(ControlError::invalid(format!(
                    "'{name}' is no provider: there are {names}"
                )));
            }
        }
        Ok(Self {
            port,
            egress: egress.transpose()?,
            state: state.transpose()?,
            reason: reason.transpose()?,
            filter,
        })
    }

    /// Whether slots are looked at.
    fn asks_slots(&self) -> bool {
        let f = &self.filter;
        self.port.is_some()
            || self.state.is_some()
            || self.reason.is_some()
            || self.egress.is_some()
            || f.provider.is_some()
    }

    /// What is asked of the connection itself: the cheapest first.
    fn fits(&self, told: &Told, conn: &ConnHandle) -> bool {
        let (f, key) = (&self.filter, conn.key());
        let t = key.original;
        f.zone.is_none_or(|z| z == key.zone.0)
            && f.proto.is_none_or(|p: L4Proto| p == t.proto())
            && f.sport.is_none_or(|r| r.contains(t.sport()))
            && f.dport.is_none_or(|r| r.contains(t.dport()))
            && f.src.is_none_or(|net| net.contains(&t.src()))
            && f.dst.is_none_or(|net| net.contains(&t.dst()))
            && f.tuple.is_none_or(|asked: Tuple| asked == t || asked == conn.reply())
            && f.nat.is_none_or(|nat| nat.fits(&t, &conn.reply()))
            && f.bytes.is_none_or(|least| conn.traffic().bytes >= least)
            && f.idle_ms.is_none_or(|least| told.idle_ms(conn).is_some_and(|idle| idle >= least))
    }

    fn slot_fits(&self, told: &Told, slot: &SlotView) -> bool {
        let leaves_by = |egress| {
            let path = slot.path.as_ref();
            path.is_some_and(|p| p.egress == egress || p.oif == Some(egress))
        };
        let class = || told.engine.port(slot.netdev.ifindex).and_then(|(_, class)| class);
        self.port.is_none_or(|port| slot.netdev.generation == port)
            && self.state.is_none_or(|state| slot.state == state)
            && self.reason.is_none_or(|r| slot.rejection.as_ref().is_some_and(|s| s.reason == r))
            && self.egress.is_none_or(leaves_by)
            && self.filter.provider.as_deref().is_none_or(|name| class() == Some(name))
    }

    /// The slots to be told, if the connection is asked for.
    fn slots(&self, told: &Told, conn: &ConnHandle) -> Option<Vec<SlotView>> {
        let mut slots = told.engine.slots(conn);
        if self.asks_slots() {
            slots.retain(|slot| self.slot_fits(told, slot));
            return (!slots.is_empty()).then_some(slots);
        }
        Some(slots)
    }

    fn is_wanted(&self, told: &Told, conn: &ConnHandle) -> bool {
        self.fits(told, conn) && (!self.asks_slots() || self.slots(told, conn).is_some())
    }
}

/// A connection in its place: the smallest comes first, of equal ones the oldest.
struct Ranked {
    rank: u128,
    conn: ConnHandle,
}

impl Ranked {
    fn new(by: SortBy, told: &Told, conn: ConnHandle) -> Self {
        let address = |a: IpAddr| match a {
            IpAddr::V4(a) => u128::from(u32::from(a)),
            // Those that look like IPv4's here, ::/96, are nobody's.
            IpAddr::V6(a) => u128::from(a),
        };
        let most_first = |n: u64| u128::from(!n);
        let t = conn.key().original;
        let rank = match by {
            SortBy::Age => 0,
            SortBy::Idle => told.idle_ms(&conn).map_or(u128::MAX, most_first),
            SortBy::Packets => most_first(conn.traffic().packets),
            SortBy::Bytes => most_first(conn.traffic().bytes),
            SortBy::Src => address(t.src()),
            SortBy::Dst => address(t.dst()),
            SortBy::Sport => t.sport().into(),
            SortBy::Dport => t.dport().into(),
        };
        Self { rank, conn }
    }

    fn key(&self) -> (u128, u64) {
        (self.rank, self.conn.epoch().0)
    }
}

impl PartialEq for Ranked {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Ranked {}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

type Conns = Box<dyn Iterator<Item = ConnHandle> + Send>;

/// How far a walk is.
enum Stage {
    /// Each is told as it is found.
    Finding(Conns),
    Counting(Conns, u64),
    /// All have to be found before the first is told.
    Collecting(SortBy, Conns, Vec<Ranked>),
    /// A heap: to put all in order at once would take too long for one look.
    Ordered(BinaryHeap<Reverse<Ranked>>),
    Over,
}

struct Walk {
    told: Told,
    wanted: Wanted,
    /// How many may still be told.
    left: usize,
    stage: Stage,
}

/// The connections that are asked for. Nothing is locked between two looks, and nothing kept but what has to be put in
/// order: a number and a reference of each, of twice as many as are to be told and some at most.
pub(super) fn walk(told: Told, wanted: Wanted) -> impl Iterator<Item = Found> + Send {
    let (engine, f) = (&told.engine, &wanted.filter);
    let conns: Conns = match &f.tuple {
        Some(tuple) => Box::new(engine.conns_of(Some(tuple), f.zone.map(Zone)).into_iter()),
        None => Box::new(engine.conns()),
    };
    let sort = f.sort.or((engine.conn_count() <= SORTED).then_some(SortBy::Age));
    let left = f.limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
    let stage = match sort {
        _ if f.count => Stage::Counting(conns, 0),
        _ if left == 0 => Stage::Over,
        Some(by) => Stage::Collecting(by, conns, Vec::new()),
        None => Stage::Finding(conns),
    };
    Walk { told, wanted, left, stage }
}

impl Walk {
    /// Tells one, and is over with the last that may be told.
    fn tell(&mut self, conn: &ConnHandle, slots: &[SlotView]) -> Found {
        self.left = self.left.saturating_sub(1);
        if self.left == 0 {
            self.stage = Stage::Over;
        }
        Found::Conn(self.told.conn(conn, slots))
    }

    fn find(&mut self) -> Option<Found> {
        let Stage::Finding(conns) = &mut self.stage else { return None };
        for _ in 0..PIECE {
            let Some(conn) = conns.next() else {
                self.stage = Stage::Over;
                return None;
            };
            if self.wanted.fits(&self.told, &conn)
                && let Some(slots) = self.wanted.slots(&self.told, &conn)
            {
                return Some(self.tell(&conn, &slots));
            }
        }
        Some(Found::Nothing)
    }

    fn count(&mut self) -> Option<Found> {
        let Stage::Counting(conns, count) = &mut self.stage else { return None };
        let (mut looked_at, mut here) = (0, 0);
        for conn in conns.take(PIECE) {
            looked_at += 1;
            here += u64::from(self.wanted.is_wanted(&self.told, &conn));
        }
        *count += here;
        if looked_at == PIECE {
            return Some(Found::Nothing);
        }
        let count = *count;
        self.stage = Stage::Over;
        Some(Found::Count(count))
    }

    fn collect(&mut self) -> Option<Found> {
        let Stage::Collecting(by, conns, found) = &mut self.stage else { return None };
        let mut looked_at = 0;
        for conn in conns.take(PIECE) {
            looked_at += 1;
            if self.wanted.is_wanted(&self.told, &conn) {
                found.push(Ranked::new(*by, &self.told, conn));
            }
        }
        // Those that will not be told in any case.
        if found.len() >= self.left.saturating_mul(2).max(2 * PIECE) {
            found.select_nth_unstable(self.left - 1);
            found.truncate(self.left);
        }
        if looked_at < PIECE {
            let found = std::mem::take(found).into_iter().map(Reverse).collect();
            self.stage = Stage::Ordered(found);
        }
        Some(Found::Nothing)
    }

    fn in_order(&mut self) -> Option<Found> {
        let Stage::Ordered(found) = &mut self.stage else { return None };
        let Some(Reverse(Ranked { conn, .. })) = found.pop() else {
            self.stage = Stage::Over;
            return None;
        };
        // What has changed meanwhile is told as it is now.
        Some(match self.wanted.slots(&self.told, &conn) {
            Some(slots) => self.tell(&conn, &slots),
            None => Found::Nothing,
        })
    }
}

impl Iterator for Walk {
    type Item = Found;

    fn next(&mut self) -> Option<Found> {
        match self.stage {
            Stage::Finding(_) => self.find(),
            Stage::Counting(..) => self.count(),
            Stage::Collecting(..) => self.collect(),
            Stage::Ordered(_) => self.in_order(),
            Stage::Over => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;
    use std::time::{Duration, Instant};

    use ipnet::IpNet;
    use netdev_providers::dummy::DummyClass;
    use netdev_providers::{Direction, Forward, HwFlags};
    use proptest::prelude::*;

    use super::*;
    use crate::control::error::ErrorKind;
    use crate::control::filter::{Nat, PortRange};
    use crate::control::info::ConnInfo;
    use crate::datapath::routing::fdb::Fdb;
    use crate::datapath::routing::links::{Layer, Link, Links};
    use crate::datapath::routing::stack;
    use crate::engine::clock::Clock;
    use crate::engine::conn::ConnKey;
    use crate::engine::datapath::{NoDatapath, Path, PathHint, PathSpec};
    use crate::engine::worker::Offer;
    use crate::engine::{Engine, Limits, NewPort};

    fn ifindex(n: u32) -> Ifindex {
        Ifindex::new(n).unwrap()
    }

    fn link(n: u32) -> Link {
        Link { name: format!("p{n}"), mac: None, ..stack::tests::link(n, Layer::Real) }
    }

    /// An engine with the ports 1 (of the class one) and 2 (two), whose clock stands, and so many connections, each
    /// second of them translated: of those that three divides the original is installed on port 1, of those that five
    /// divides the reply is refused on port 2.
    fn told(conns: u32) -> Told {
        let clock = Clock::Manual(Arc::new(AtomicU64::new(10_000)));
        let limits = Limits::default();
        let engine = Engine::new(NonZeroU32::MIN, Arc::new(NoDatapath), limits, clock);
        let links = Links::default();
        for (n, class) in [(1, "one"), (2, "two")] {
            engine.register(Arc::new(DummyClass::new(class))).unwrap();
            let (name, providers) = (format!("p{n}"), Some(vec![class.to_owned()]));
            let hw_flags = HwFlags::Both;
            let port = NewPort { ifindex: ifindex(n), name, hw_flags, providers, capacity: None };
            engine.port_add(port).unwrap();
            links.set(link(n));
        }
        links.set(link(3));
        let mut worker = engine.worker();
        for n in 0..conns {
            let (proto, host) = (if n % 2 == 0 { "tcp" } else { "udp" }, n % 7);
            let sport = 1000 + n % 40_000;
            let original: Tuple =
                format!("{proto} 10.0.{host}.1:{sport} > 198.51.100.{host}:{}", 80 + host)
                    .parse()
                    .unwrap();
            let zone = Zone(u16::try_from(n / 40_000 + n % 3).unwrap());
            let key = ConnKey { zone, original };
            let reply = match n % 4 {
                0 => original.inverted(),
                1 => format!("{proto} 198.51.100.{host}:{} > 192.0.2.1:{sport}", 80 + host)
                    .parse()
                    .unwrap(),
                2 => format!("{proto} 10.9.0.1:80 > 10.0.{host}.1:{sport}").parse().unwrap(),
                _ => format!("{proto} 10.9.0.1:80 > 192.0.2.1:{sport}").parse().unwrap(),
            };
            let conn = engine.conn_create(key, reply, n.into()).unwrap();
            worker.quiescent();
            if n % 3 == 0 {
                let egress = ifindex(2 + n % 2);
                let (vlan, macs, egress_decides) = (None, None, false);
                let tuple = conn.leaving(Direction::Original);
                let forward = Forward { egress, vlan, mtu: 1500, tuple, macs, egress_decides };
                let path = Path {
                    eth_dst: None,
                    vlan: None,
                    ingress_mtu: 1500,
                    forward,
                    next_hop: None,
                    iif: None,
                    oif: None,
                    answer: 0,
                };
                let port = worker.port(ifindex(1)).unwrap();
                let path = PathSpec::Known(Box::new(path));
                assert_eq!(port.conn_seen(&conn, Direction::Original, path), Offer::Queued);
            }
            if n % 5 == 0 {
                let port = worker.port(ifindex(2)).unwrap();
                let path = PathSpec::Resolve(PathHint::default());
                assert_eq!(port.conn_seen(&conn, Direction::Reply, path), Offer::Queued);
            }
        }
        worker.offline();
        for _ in 0..3 {
            assert!(engine.synchronize());
        }
        Told { engine, links, fdb: Fdb::default() }
    }

    fn port_of(told: &Told, name: &str) -> Generation {
        told.engine.netdevs().into_iter().find(|n| n.name == name).unwrap().generation
    }

    fn ask(told: &Told, filter: &ConnFilter) -> Vec<Found> {
        let port = filter.port.as_deref().map(|name| port_of(told, name));
        let wanted = Wanted::new(filter.clone(), port, told).unwrap();
        walk(told.clone(), wanted).collect()
    }

    fn conns(found: Vec<Found>) -> Vec<ConnInfo> {
        let conn = |found| match found {
            Found::Conn(conn) => Some(conn),
            _ => None,
        };
        found.into_iter().filter_map(conn).collect()
    }

    /// What the filter says, of what is told without one.
    fn naively(f: &ConnFilter, mut c: ConnInfo) -> Option<ConnInfo> {
        let class = |port: &str| if port == "p1" { "one" } else { "two" };
        let same = |asked: &Option<String>, is: Option<&str>| {
            asked.as_deref().is_none_or(|asked| is == Some(asked))
        };
        let t = c.original;
        let snat = c.reply.dst() != t.src() || c.reply.dport() != t.sport();
        let dnat = c.reply.src() != t.dst() || c.reply.sport() != t.dport();
        let nat = match f.nat {
            None => true,
            Some(Nat::Snat) => snat,
            Some(Nat::Dnat) => dnat,
            Some(Nat::Any) => snat | dnat,
            Some(Nat::None) => !(snat | dnat),
        };
        let all = c.slots.len();
        c.slots.retain(|s| {
            same(&f.port, Some(&s.port))
                && same(&f.state, Some(&s.state))
                && same(&f.reason, s.reason.as_deref())
                && same(&f.provider, Some(class(&s.port)))
                && same(&f.egress, s.egress.as_deref())
        });
        let asks_slots =
            [&f.port, &f.state, &f.reason, &f.provider, &f.egress].into_iter().any(Option::is_some);
        (nat && (!asks_slots || !c.slots.is_empty())
            && (asks_slots || all == c.slots.len())
            && f.zone.is_none_or(|z| z == c.zone)
            && f.proto.is_none_or(|p| p == t.proto())
            && f.src.is_none_or(|n| n.contains(&t.src()))
            && f.dst.is_none_or(|n| n.contains(&t.dst()))
            && f.sport.is_none_or(|r| (r.from..=r.to).contains(&t.sport()))
            && f.dport.is_none_or(|r| (r.from..=r.to).contains(&t.dport()))
            && f.idle_ms.is_none_or(|ms| c.idle_ms.is_some_and(|idle| idle >= ms))
            && f.bytes.is_none_or(|b| c.bytes >= b))
        .then_some(c)
    }

    fn maybe<T: Clone + std::fmt::Debug + 'static>(of: Vec<T>) -> impl Strategy<Value = Option<T>> {
        proptest::option::weighted(0.25, proptest::sample::select(of))
    }

    fn names(of: &[&str]) -> Vec<String> {
        of.iter().map(|n| (*n).to_owned()).collect()
    }

    prop_compose! {
        fn filters()(
            port in maybe(names(&["p1", "p2"])),
            zone in maybe(vec![0u16, 1, 9]),
            proto in maybe(vec![L4Proto::Tcp, L4Proto::Udp]),
            src in maybe(vec!["10.0.1.1/32", "10.0.0.0/22", "0.0.0.0/0", "::/0"]),
            dst in maybe(vec!["198.51.100.4/30", "198.51.100.0/24"]),
            sport in maybe(vec![(1000, 1100), (1300, 1300), (0, 65535)]),
            dport in maybe(vec![(80, 80), (81, 90)]),
        )(
            state in maybe(names(&["installed", "rejected", "pending"])),
            reason in maybe(names(&["no-route", "table-full"])),
            provider in maybe(names(&["one", "two"])),
            egress in maybe(names(&["p1", "p2", "p3"])),
            nat in maybe(Nat::ALL.to_vec()),
            idle_ms in maybe(vec![0, 1]),
            bytes in maybe(vec![0, 1]),
            port in Just(port), zone in Just(zone), proto in Just(proto), src in Just(src), dst in Just(dst),
            sport in Just(sport), dport in Just(dport),
        ) -> ConnFilter {
            let net = |text: Option<&str>| text.and_then(|t| t.parse::<IpNet>().ok());
            let range = |r: Option<(u16, u16)>| r.map(|(from, to)| PortRange { from, to });
            ConnFilter {
                port, zone, proto, src: net(src), dst: net(dst), sport: range(sport), dport: range(dport), state,
                reason, provider, egress, nat, idle_ms, bytes, ..ConnFilter::default()
            }
        }
    }

    #[test]
    fn what_fits_is_told_with_the_slots_that_do_and_nothing_else() {
        let told = told(800);
        let all = conns(ask(&told, &ConnFilter::default()));
        assert_eq!(all.len(), 800);
        assert!(all.is_sorted_by_key(|c| c.epoch), "the oldest first");
        let slots =
            |state: &str| all.iter().flat_map(|c| &c.slots).filter(|s| s.state == state).count();
        assert_eq!((slots("installed"), slots("rejected")), (267, 160));
        let fitting = std::cell::Cell::new(0);
        proptest!(ProptestConfig::with_cases(600), |(filter in filters())| {
            let want: Vec<_> = all.iter().filter_map(|c| naively(&filter, c.clone())).collect();
            fitting.set(fitting.get() + want.len());
            let count = ask(&told, &ConnFilter { count: true, ..filter.clone() });
            prop_assert_eq!(count.last(), Some(&Found::Count(want.len() as u64)));
            prop_assert_eq!(count.iter().filter(|f| **f != Found::Nothing).count(), 1);
            prop_assert_eq!(conns(ask(&told, &filter)), want);
        });
        assert!(fitting.get() > 1000, "the filters let through {}", fitting.get());
        told.engine.close();
    }

    #[test]
    fn what_is_sorted_is_the_beginning_of_all_that_fits_in_that_order() {
        let told = told(2000);
        let all = conns(ask(&told, &ConnFilter::default()));
        for by in SortBy::ALL {
            let rank = |c: &ConnInfo| match by {
                SortBy::Age => 0,
                SortBy::Idle => c.idle_ms.map_or(u64::MAX, |ms| u64::MAX - 1 - ms),
                SortBy::Packets => u64::MAX - c.packets,
                SortBy::Bytes => u64::MAX - c.bytes,
                SortBy::Src => u64::from_be_bytes([0, 0, 0, 0, 10, 0, nth(c.original.src()), 1]),
                SortBy::Dst => {
                    u64::from_be_bytes([0, 0, 0, 0, 198, 51, 100, last(c.original.dst())])
                }
                SortBy::Sport => c.original.sport().into(),
                SortBy::Dport => c.original.dport().into(),
            };
            let mut want = all.clone();
            want.sort_by_key(|c| (rank(c), c.epoch));
            for limit in [None, Some(0), Some(1), Some(300), Some(1999), Some(5000)] {
                let filter = ConnFilter { sort: Some(*by), limit, ..ConnFilter::default() };
                let got = conns(ask(&told, &filter));
                let n = limit.map_or(want.len(), |l| want.len().min(usize::try_from(l).unwrap()));
                assert!(got == want[..n], "by {by}, {limit:?}: {} of {n}", got.len());
            }
        }
        told.engine.close();
    }

    fn octets(a: IpAddr) -> [u8; 4] {
        match a {
            IpAddr::V4(a) => a.octets(),
            IpAddr::V6(_) => [0; 4],
        }
    }

    fn nth(a: IpAddr) -> u8 {
        octets(a)[2]
    }

    fn last(a: IpAddr) -> u8 {
        octets(a)[3]
    }

    #[test]
    fn a_limit_ends_it_and_long_searches_come_in_pieces() {
        let told = told(6000);
        let some = ask(&told, &ConnFilter { limit: Some(7), ..ConnFilter::default() });
        assert_eq!(
            (some.len(), conns(some).len()),
            (7, 7),
            "no order, and nothing more is looked at"
        );
        let none = ask(&told, &ConnFilter { zone: Some(999), ..ConnFilter::default() });
        assert!(
            none.iter().all(|f| *f == Found::Nothing) && none.len() >= 6000 / PIECE,
            "{}",
            none.len()
        );
        told.engine.close();
    }

    #[test]
    fn names_of_nothing_are_named() {
        let told = told(0);
        let refused = |filter| {
            let e = Wanted::new(filter, None, &told).map(|_| ()).unwrap_err();
            (e.kind, e.message)
        };
        let name = |name: &str| Some(name.to_owned());
        assert_eq!(
            refused(ConnFilter { state: name("empty"), ..ConnFilter::default() }),
            (
                ErrorKind::InvalidArgument,
                "'empty' is no state of a slot: there are pending, installed, deleting, rejected"
                    .into()
            )
        );
        assert_eq!(
            refused(ConnFilter { reason: name("bad"), ..ConnFilter::default() }),
            (ErrorKind::InvalidArgument, "'bad' is no reason of a rejection".into())
        );
        assert_eq!(
            refused(ConnFilter { provider: name("three"), ..ConnFilter::default() }),
            (ErrorKind::InvalidArgument, "'three' is no provider: there are one, two".into())
        );
        assert_eq!(
            refused(ConnFilter { egress: name("eth9"), ..ConnFilter::default() }),
            (ErrorKind::NotFound, "there is no netdev 'eth9'".into())
        );
        told.engine.close();
    }

    #[test]
    #[ignore = "figures, not a check: the time of a look at a table of 100,000 connections"]
    fn how_long_a_look_takes() {
        let told = told(100_000);
        for (what, filter) in [
            ("all", ConnFilter::default()),
            ("count", ConnFilter { count: true, ..ConnFilter::default() }),
            ("sort", ConnFilter { sort: Some(SortBy::Bytes), ..ConnFilter::default() }),
            ("none fits", ConnFilter { zone: Some(999), ..ConnFilter::default() }),
        ] {
            let wanted = Wanted::new(filter, None, &told).unwrap();
            let (begin, mut longest, mut n) = (Instant::now(), Duration::ZERO, 0);
            let mut walk = walk(told.clone(), wanted);
            loop {
                let look = Instant::now();
                let Some(_) = walk.next() else { break };
                longest = longest.max(look.elapsed());
                n += 1;
            }
            println!("{what}: {n} looks in {:?}, the longest {longest:?}", begin.elapsed());
        }
        told.engine.close();
    }
}
