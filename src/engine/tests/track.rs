//! Ports without a netdev, and rules that only keep track.

use std::sync::atomic::AtomicBool;

use netdev_providers::{
    BindError, Done, Flow, Operation, Provider, ProviderClass, RuleId, RuleReport, Tracked, VlanId,
};

use super::*;
use crate::engine::datapath::Arrival;

/// A backend that keeps track, and forwards nothing.
#[derive(Default)]
struct Tracker {
    rules: StdMutex<Vec<(Ifindex, RuleId, Tracked)>>,
    refuses: AtomicBool,
    asked: AtomicU64,
}

#[derive(Default)]
struct TrackerClass(Arc<Tracker>);

struct Bound(Arc<Tracker>, Ifindex);

impl ProviderClass for TrackerClass {
    fn name(&self) -> &'static str {
        "tracker"
    }
    fn bind(&self, netdev: &Netdev, _: Instance) -> Result<Arc<dyn Provider>, BindError> {
        Ok(Arc::new(Bound(Arc::clone(&self.0), netdev.ifindex)))
    }
}

impl Provider for Bound {
    fn can_offload(&self, _: &Flow) -> Result<(), Rejection> {
        Err(Reason::Unsupported.into())
    }
    fn can_track(&self, _: &Tracked) -> Result<(), Rejection> {
        self.0.asked.fetch_add(1, Ordering::SeqCst);
        if self.0.refuses.load(Ordering::SeqCst) { Err(Reason::Unsupported.into()) } else { Ok(()) }
    }
    fn submit(&self, batch: Vec<Operation>) {
        for Operation { request, ticket } in batch {
            let mut rules = self.0.rules.lock().unwrap();
            let done = match request {
                Request::Track { cookie, tracked } => {
                    let rule = RuleId(cookie.epoch.0 << 1 | cookie.direction as u64);
                    rules.push((self.1, rule, *tracked));
                    Done::added(rule, Some(true))
                }
                Request::Delete { rule, .. } => {
                    rules.retain(|(port, r, _)| (*port, *r) != (self.1, rule));
                    Done::Deleted
                }
                _ => Done::Noted,
            };
            drop(rules);
            ticket.complete(Ok(done));
        }
    }
    fn usage(&self, _: &mut dyn FnMut(RuleReport)) -> Result<(), Fault> {
        Ok(())
    }
    fn flush(&self) -> Result<u64, Fault> {
        let mut rules = self.0.rules.lock().unwrap();
        let before = rules.len();
        rules.retain(|(port, ..)| *port != self.1);
        Ok((before - rules.len()) as u64)
    }
    fn release(&self) -> Result<(), Fault> {
        Ok(())
    }
}

/// A port that is no netdev, bound to such a backend, and another.
fn bench() -> (Bench, Arc<Tracker>, [Ifindex; 2]) {
    let b = Bench::new(&[]);
    let class = TrackerClass::default();
    let tracker = Arc::clone(&class.0);
    b.engine.register(Arc::new(class)).unwrap();
    let ports = [0, 7].map(|n| Ifindex::local(n).unwrap());
    for ifindex in ports {
        b.engine.port_add(NewPort { ifindex, ..new_port(1) }).unwrap();
    }
    (b, tracker, ports)
}

#[test]
fn what_is_only_tracked_leads_nowhere_and_is_deleted_as_any_rule() {
    let (b, tracker, [p, other]) = bench();
    let conn = b.conn(1);
    let worker = b.engine.worker();
    let port = worker.port(p).unwrap();
    let arrival = Arrival { eth_dst: Some(MacAddr([2; 6])), vlan: VlanId::new(5) };
    assert_eq!(port.can_track(&conn, Reply, arrival), Ok(()));
    let offer = || port.conn_seen(&conn, Reply, PathSpec::Track(Box::new(arrival)));
    assert_eq!(offer(), Offer::Queued);
    b.settle();
    assert_eq!(offer(), Offer::Decided);
    let tracked = tracker.rules.lock().unwrap()[0].2;
    assert_eq!(tracked.matches.tuple, conn.arriving(Reply));
    assert_eq!((tracked.matches.eth_dst, tracked.matches.vlan), (arrival.eth_dst, arrival.vlan));
    assert_eq!((tracked.tuple, tracked.direction), (conn.leaving(Reply), Reply));
    let slot = b.engine.slots(&conn).remove(0);
    assert_eq!((slot.state, slot.path), (SlotState::Installed, None));
    assert_eq!(slot.netdev.ifindex, p);
    // No rule leads into a port that goes.
    drop(worker);
    let deleted = b.engine.port_del(other).unwrap();
    assert_eq!((deleted.flushed, deleted.retracted), (0, 0));
    assert_eq!(tracker.rules.lock().unwrap().len(), 1);
    b.engine.conn_del(&conn);
    b.settle();
    assert!(tracker.rules.lock().unwrap().is_empty());
    b.engine.close();
}

#[test]
fn a_backend_that_only_forwards_refuses_to_track_and_one_that_only_tracks_to_forward() {
    let (b, tracker, [p, _]) = bench();
    let dummy = DummyClass::new("dummy");
    b.engine.register(Arc::new(dummy.clone())).unwrap();
    let providers = Some(vec!["dummy".to_owned()]);
    b.engine.port_add(NewPort { providers, ..new_port(1) }).unwrap();
    let mut worker = b.engine.worker();
    worker.quiescent();
    let (forwards, tracks) = (worker.port(ifindex(1)).unwrap(), worker.port(p).unwrap());
    let (one, two) = (b.conn(1), b.conn(2));
    let known = |c: &ConnHandle| Box::new(path(c, Original, ifindex(99)));
    let refused = forwards.can_track(&one, Original, Arrival::default()).unwrap_err();
    assert_eq!(refused, Tracked::unsupported());
    assert!(tracks.can_offload(&one, Original, &known(&one)).is_err());
    let _ = forwards.conn_add(&one, Original, PathSpec::Track(Box::default()));
    let _ = tracks.conn_add(&two, Original, PathSpec::Known(known(&two)));
    b.settle();
    for conn in [&one, &two] {
        let slot = b.engine.slots(conn).remove(0);
        assert_eq!(slot.rejection.unwrap().reason, Reason::Unsupported, "{conn}");
    }
    assert_eq!((dummy.requests(), tracker.rules.lock().unwrap().len()), (0, 0));
}

#[test]
fn a_shape_that_is_not_tracked_is_remembered_apart_from_those_that_are_forwarded() {
    let (b, tracker, [p, _]) = bench();
    let worker = b.engine.worker();
    let port = worker.port(p).unwrap();
    let table = b.engine.0.publication.table();
    let conn = b.conn(1);
    let shape = |arrival| {
        let tracked = crate::engine::datapath::tracked(&conn, Original, arrival);
        crate::engine::shapes::Shape::of_work(&crate::engine::datapath::Work::Track(Box::new(
            tracked,
        )))
    };
    let (plain, tagged) = (Arrival::default(), Arrival { vlan: VlanId::new(5), eth_dst: None });
    assert_ne!(shape(plain), shape(tagged));
    table.get(p).unwrap().shapes().note_refused(shape(tagged), &Reason::Unsupported.into());
    assert_eq!(port.can_track(&conn, Original, plain), Ok(()));
    assert!(port.can_track(&conn, Original, tagged).is_err());
    assert_eq!(tracker.asked.load(Ordering::SeqCst), 1, "of the plain one");
    tracker.refuses.store(true, Ordering::SeqCst);
    assert!(port.can_track(&conn, Original, plain).is_err());
}
