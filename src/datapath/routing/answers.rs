//! What the kernel has answered to look-ups of routes and neighbours, for connections to come that would ask the same.
//!
//! **An answer is good until something changes.** Whoever handles a change counts it ([`Changes`]) when it is known
//! and before the rules that it concerns are looked for. An answer is kept with the number that was read before
//! the kernel was asked, and given out only while that is still the number. So a rule that is made from a kept answer is
//! no other than one made from a fresh one: a change that was counted before it, the answer knows; and one that is
//! counted after it finds the rule, or has it resolved again (see [`Datapath::changes`]).
//!
//! What the kernel tells nobody of and nobody looks for (exceptions for one destination: a smaller MTU on the way, a
//! redirect) is asked for again after some seconds (`KEPT`): a connection then has it no later than one that came so much earlier.
//! Whether packets from a source are taken does not stand on such a thing, but on addresses, routes and switches alone,
//! whose changes are counted: that is kept as long as there is room.
//!
//! **What is the same question** is up to the rules of routing. Where none looks at anything but the destination, the
//! netdev and the mark, the route is one for all sources and ports; that packets from a source are taken at
//! all on a netdev (martians, the reverse path) is another question, to which an answer for any destination is one. With
//! next hops that addresses choose among, and in IPv6 (routes from a source), it is one for a pair of addresses;
//! where a rule looks at the source or at ports, for one tuple.
//!
//! [`Datapath::changes`]: crate::engine::datapath::Datapath::changes

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use netdev_providers::{Ifindex, MacAddr, Tuple};

/// For so long an answer is good when nothing has changed.
const KEPT: Duration = Duration::from_secs(5);
/// So many answers of a kind: one more, and all are asked for anew.
const AT_MOST: usize = 65_536;

/// Counts changes of what paths are resolved from.
#[derive(Clone, Debug, Default)]
pub struct Changes(Arc<AtomicU64>);

impl Changes {
    /// One more: after it is known here, before the rules that it concerns are looked for.
    pub fn count(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    /// How many there have been.
    #[must_use]
    pub fn so_far(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// What a route look-up answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Route {
    pub egress: Ifindex,
    pub gateway: Option<IpAddr>,
    pub mtu: Option<u32>,
}

/// How much of a packet its route depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    Destination,
    Addresses,
    Tuple,
}

/// A look-up of a route: where packets come from, and what they look like then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Question {
    /// What they are routed on.
    pub arrived: Ifindex,
    /// `None`: not known.
    pub mark: Option<u32>,
    pub source: IpAddr,
    pub destination: IpAddr,
    /// Protocol and ports.
    pub rest: (u8, u16, u16),
}

impl Question {
    /// Of packets that have the one tuple when they arrive, and the other when they leave: by then the destination
    /// is translated, the source is not.
    pub(super) fn of(
        arrived: Ifindex,
        mark: Option<u32>,
        arriving: &Tuple,
        leaving: &Tuple,
    ) -> Self {
        Self {
            arrived,
            mark,
            source: arriving.src(),
            destination: leaving.dst(),
            rest: (leaving.proto().number(), arriving.sport(), leaving.dport()),
        }
    }
}

/// What is the same for all questions with one answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Leading {
    arrived: Ifindex,
    mark: Option<u32>,
    destination: IpAddr,
    source: Option<IpAddr>,
    rest: Option<(u8, u16, u16)>,
}

impl Leading {
    fn of(question: &Question, by: By) -> Self {
        let Question { arrived, mark, source, destination, rest } = *question;
        Self {
            arrived,
            mark,
            destination,
            source: (by != By::Destination).then_some(source),
            rest: (by == By::Tuple).then_some(rest),
        }
    }
}

#[derive(Debug)]
struct Kept {
    /// The number of changes before the first of them was asked for.
    changes: u64,
    since: Instant,
    routes: HashMap<Leading, Route, ahash::RandomState>,
    /// From where packets are taken, by netdev and mark.
    sources: HashSet<(Ifindex, Option<u32>, IpAddr), ahash::RandomState>,
    neighbours: HashMap<(Ifindex, IpAddr), MacAddr, ahash::RandomState>,
}

impl Kept {
    fn new(changes: u64) -> Self {
        Self {
            changes,
            since: Instant::now(),
            routes: HashMap::default(),
            sources: HashSet::default(),
            neighbours: HashMap::default(),
        }
    }

    fn is_full(&self) -> bool {
        self.routes.len().max(self.sources.len()).max(self.neighbours.len()) >= AT_MOST
    }
}

/// The answers that are good now. Threads that only read do not wait for each other.
#[derive(Debug)]
pub(super) struct Answers {
    changes: Changes,
    kept: RwLock<Kept>,
}

impl Answers {
    pub(super) fn new(changes: Changes) -> Self {
        let kept = RwLock::new(Kept::new(changes.so_far()));
        Self { changes, kept }
    }

    /// To be read before the kernel is asked, for what is kept of its answer.
    pub(super) fn asking(&self) -> u64 {
        self.changes.so_far()
    }

    fn read<R>(&self, of: impl FnOnce(&Kept) -> Option<R>) -> Option<R> {
        let kept = self.kept.read().unwrap_or_else(PoisonError::into_inner);
        let good = kept.changes == self.changes.so_far() && kept.since.elapsed() < KEPT;
        good.then(|| of(&kept)).flatten()
    }

    fn write(&self, asked: u64, note: impl FnOnce(&mut Kept)) {
        // Something has changed while the kernel was asked: nobody would be given it.
        if asked != self.changes.so_far() {
            return;
        }
        let mut kept = self.kept.write().unwrap_or_else(PoisonError::into_inner);
        if kept.changes > asked {
            return;
        }
        if kept.changes < asked || kept.is_full() {
            *kept = Kept::new(asked);
        } else if kept.since.elapsed() >= KEPT {
            let sources = std::mem::take(&mut kept.sources);
            *kept = Kept { sources, ..Kept::new(asked) };
        }
        note(&mut kept);
    }

    pub(super) fn route(&self, question: &Question, by: By) -> Option<Route> {
        self.read(|kept| {
            let Question { arrived, mark, source, .. } = *question;
            let route = kept.routes.get(&Leading::of(question, by)).copied()?;
            (by != By::Destination || kept.sources.contains(&(arrived, mark, source)))
                .then_some(route)
        })
    }

    pub(super) fn note_route(&self, asked: u64, question: &Question, by: By, route: Route) {
        self.write(asked, |kept| {
            let Question { arrived, mark, source, .. } = *question;
            kept.routes.insert(Leading::of(question, by), route);
            if by == By::Destination {
                kept.sources.insert((arrived, mark, source));
            }
        });
    }

    pub(super) fn neighbour(&self, netdev: Ifindex, address: IpAddr) -> Option<MacAddr> {
        self.read(|kept| kept.neighbours.get(&(netdev, address)).copied())
    }

    pub(super) fn note_neighbour(
        &self,
        asked: u64,
        netdev: Ifindex,
        address: IpAddr,
        mac: MacAddr,
    ) {
        self.write(asked, |kept| _ = kept.neighbours.insert((netdev, address), mac));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn netdev(n: u32) -> Ifindex {
        Ifindex::new(n).unwrap()
    }

    fn question(source: &str, destination: &str, sport: u16) -> Question {
        let tuple = format!("udp {source}:{sport} > {destination}:53").parse().unwrap();
        Question::of(netdev(2), Some(0), &tuple, &tuple)
    }

    fn route(egress: u32) -> Route {
        Route { egress: netdev(egress), gateway: None, mtu: None }
    }

    #[test]
    fn an_answer_is_good_until_something_changes() {
        let changes = Changes::default();
        let answers = Answers::new(changes.clone());
        let (q, mac) = (question("10.0.0.1", "10.1.0.1", 5000), MacAddr([2; 6]));
        let hop = "10.1.0.1".parse().unwrap();
        answers.note_route(answers.asking(), &q, By::Destination, route(3));
        answers.note_neighbour(answers.asking(), netdev(3), hop, mac);
        assert_eq!(answers.route(&q, By::Destination), Some(route(3)));
        assert_eq!(answers.neighbour(netdev(3), hop), Some(mac));
        changes.count();
        assert_eq!(answers.route(&q, By::Destination), None);
        assert_eq!(answers.neighbour(netdev(3), hop), None);
        // The next that is kept does not bring the older ones back.
        answers.note_route(answers.asking(), &q, By::Destination, route(4));
        assert_eq!(answers.neighbour(netdev(3), hop), None);
        assert_eq!(answers.route(&q, By::Destination), Some(route(4)));
    }

    #[test]
    fn an_answer_that_a_change_has_overtaken_is_not_kept() {
        let changes = Changes::default();
        let answers = Answers::new(changes.clone());
        let q = question("10.0.0.1", "10.1.0.1", 5000);
        let asked = answers.asking();
        changes.count();
        answers.note_route(asked, &q, By::Destination, route(3));
        assert_eq!(answers.route(&q, By::Destination), None);
        // Nor among those that were asked for since.
        answers.note_route(answers.asking(), &q, By::Destination, route(4));
        answers.note_route(asked, &q, By::Destination, route(3));
        assert_eq!(answers.route(&q, By::Destination), Some(route(4)));
    }

    #[test]
    fn what_routing_looks_at_makes_another_question() {
        let answers = Answers::new(Changes::default());
        let q = question("10.0.0.1", "10.1.0.1", 5000);
        let other = [
            question("10.0.0.1", "10.1.0.1", 5001),
            question("10.0.0.2", "10.1.0.1", 5000),
            question("10.0.0.1", "10.1.0.2", 5000),
            Question { mark: Some(1), ..q },
            Question { mark: None, ..q },
            Question { arrived: netdev(5), ..q },
        ];
        for (by, same) in [(By::Tuple, 0), (By::Addresses, 1), (By::Destination, 1)] {
            answers.note_route(answers.asking(), &q, by, route(3));
            assert_eq!(answers.route(&q, by), Some(route(3)), "{by:?}");
            for (n, other) in other.iter().enumerate() {
                assert_eq!(answers.route(other, by).is_some(), n < same, "{by:?} {other:?}");
            }
        }
    }

    #[test]
    fn a_source_is_asked_for_once_for_all_destinations() {
        let answers = Answers::new(Changes::default());
        let note =
            |q: &Question| answers.note_route(answers.asking(), q, By::Destination, route(3));
        let a = question("10.0.0.1", "10.1.0.1", 5000);
        let b = question("10.0.0.2", "10.1.0.2", 5000);
        note(&a);
        let crossed = question("10.0.0.2", "10.1.0.1", 5000);
        assert_eq!(answers.route(&crossed, By::Destination), None, "it may be a martian");
        note(&b);
        assert_eq!(answers.route(&crossed, By::Destination), Some(route(3)));
        // Of another netdev, or with another mark, it says nothing.
        let elsewhere = Question { arrived: netdev(5), ..question("10.0.0.9", "10.1.0.1", 1) };
        note(&elsewhere);
        let here = Question { arrived: netdev(2), ..elsewhere };
        assert_eq!(answers.route(&here, By::Destination), None);
    }

    #[test]
    fn what_nobody_tells_of_is_asked_for_again_and_sources_are_not() {
        let answers = Answers::new(Changes::default());
        let a = question("10.0.0.1", "10.1.0.1", 5000);
        let b = question("10.0.0.2", "10.1.0.2", 5000);
        let note =
            |q: &Question| answers.note_route(answers.asking(), q, By::Destination, route(3));
        note(&a);
        let age = |answers: &Answers| {
            let since = Instant::now().checked_sub(KEPT).unwrap();
            answers.kept.write().unwrap().since = since;
        };
        age(&answers);
        assert_eq!(answers.route(&a, By::Destination), None);
        note(&b);
        assert_eq!(
            answers.route(&a, By::Destination),
            None,
            "its destination may have a smaller MTU"
        );
        let crossed = question("10.0.0.1", "10.1.0.2", 5000);
        assert_eq!(answers.route(&crossed, By::Destination), Some(route(3)));
        // A change takes them along.
        answers.changes.count();
        note(&b);
        assert_eq!(answers.route(&crossed, By::Destination), None);
    }

    #[test]
    fn there_are_never_more_than_so_many() {
        let answers = Answers::new(Changes::default());
        for n in 0..u32::try_from(AT_MOST).unwrap() + 10 {
            let hop = std::net::Ipv4Addr::from_bits(n).into();
            answers.note_neighbour(answers.asking(), netdev(3), hop, MacAddr([2; 6]));
        }
        let kept = answers.kept.read().unwrap();
        assert_eq!(kept.neighbours.len(), 10);
    }
}
