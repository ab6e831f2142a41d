//! Connections as conntrack has them: events, timeouts, NAT, zones.

use std::collections::VecDeque;
use std::time::Instant;

use ctoffload::datapath::netfilter::conntrack::{
    CtEvent, CtEvents, CtId, CtUpdate, EventRead, TcpState, timeouts,
};
use netdev_providers::netlink::netfilter::heard::Heard;
use nix::errno::Errno;

use super::*;
use crate::wait::wait_until;

/// Events in their order; what is passed over on the way to one that is wanted is gone.
struct Events {
    from: CtEvents,
    read: VecDeque<CtEvent>,
}

impl Events {
    fn wait(&mut self, wanted: impl Fn(&CtEvent) -> bool) -> CtEvent {
        let until = Instant::now() + SOON;
        while Instant::now() < until {
            if let Some(e) = self.read.pop_front() {
                if wanted(&e) {
                    return e;
                }
                continue;
            }
            self.read.extend(self.from.next(QUIET).unwrap().events);
        }
        panic!("no such event");
    }
}

#[test]
fn netfilter_events_tell_of_a_close_and_of_a_deletion() {
    let r = Router::new();
    let mut events = Events { from: CtEvents::open(true).unwrap(), read: Default::default() };
    let _ledger = r.ledger(LedgerConfig::default());
    let mut ct = Conntrack::open().unwrap();
    assert_eq!(ct.usage().unwrap().entries, 0);

    let (mut c, mut s) = r.tcp(0, 1, "10.0.1.2");
    talk(&mut c, &mut s);
    let closing = entry(&mut ct, &c);
    assert!(closing.status.assured() && closing.status.seen_reply() && !closing.status.dying());
    assert_eq!(closing.tcp_state, Some(TcpState::Established));
    assert_eq!(closing.reply, closing.original.inverted());
    drop((c, s));
    let of = |e: &CtEvent| e.entry().id == closing.id;
    events.wait(|e| matches!(e, CtEvent::New(_)) && of(e));
    events.wait(|e| {
        matches!(e, CtEvent::Update(u) if u.tcp_state == Some(TcpState::FinWait)) && of(e)
    });

    let (c, _s) = r.tcp(2, 1, "10.0.1.2");
    let gone = entry(&mut ct, &c);
    r.ns.run(&format!("conntrack -D -p tcp --orig-port-src {}", gone.original.sport()));
    let end = events.wait(|e| matches!(e, CtEvent::Destroy(_)));
    assert_eq!((end.entry().id, end.entry().original), (gone.id, gone.original));
    assert_eq!(ct.get(Zone(0), &gone.original).unwrap(), None);

    // By us: only when it is the one that is meant.
    let (c, _s) = r.tcp(2, 1, "10.0.1.2");
    let e = entry(&mut ct, &c);
    assert!(!ct.delete(Zone(0), &e.original, gone.id).unwrap());
    assert!(ct.dump().unwrap().iter().any(|d| d.id == e.id && d.original == e.original));
    assert!(ct.delete(Zone(0), &e.original, e.id).unwrap());
    assert!(!ct.delete(Zone(0), &e.original, None).unwrap());
    events.wait(|d| matches!(d, CtEvent::Destroy(_)) && d.entry().id == e.id);
}

#[test]
fn netfilter_events_of_wanted_connections_are_given_and_no_others() {
    let r = Router::new();
    let mut events = CtEvents::open(true).unwrap();
    let heard = Heard::new().unwrap();
    events.hear_only_of(&heard).unwrap();
    let _ledger = r.ledger(LedgerConfig::default());
    let mut ct = Conntrack::open().unwrap();
    events.ignore_updates_of(ct.port().unwrap());
    // Also of those that are there before they are wanted.
    let mut all = [0; 4].map(|_| r.tcp(0, 1, "10.0.1.2"));
    for (c, s) in &mut all {
        talk(c, s);
    }
    assert_eq!(events.next(QUIET).unwrap(), EventRead::default(), "nothing is wanted yet");
    let ids = all.each_ref().map(|(c, _)| entry(&mut ct, c).id.unwrap());
    let mut wanted: Vec<_> = ids[..2].iter().map(|id| heard.of(*id)).collect();
    // What is wanted twice is wanted until nobody wants it.
    drop(heard.of(ids[0]));
    let mut told = |what: &str| {
        let (mut told, mut own) = (Vec::new(), Vec::new());
        loop {
            let read = events.next(QUIET).unwrap();
            assert!(!read.lost, "{what}");
            if (read.events.len(), read.own.len()) == (0, 0) {
                break;
            }
            told.extend(read.events.iter().filter_map(|e| e.entry().id));
            own.extend(read.own.iter().filter_map(|e| e.id));
        }
        println!("{what}: {told:?}, {own:?}");
        told.sort_unstable();
        told.dedup();
        (told, own)
    };
    let sorted = |ids: &[CtId]| {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        ids
    };
    let updates = all.each_ref().map(|(c, _)| CtUpdate {
        liberal: Some(true),
        ..CtUpdate::of(Zone(0), tuple_of(c, L4Proto::Tcp))
    });
    assert!(ct.update(&updates).unwrap().iter().all(Result::is_ok));
    assert_eq!(told("our own updates"), (vec![], ids[..2].to_vec()));
    let tuples = all.each_ref().map(|(c, _)| tuple_of(c, L4Proto::Tcp));
    drop(all);
    assert_eq!(told("they close").0, sorted(&ids[..2]));
    wanted.truncate(1);
    for (tuple, id) in tuples.iter().zip(ids) {
        assert!(ct.delete(Zone(0), tuple, Some(id)).unwrap());
    }
    assert_eq!(told("they end").0, ids[..1]);
}

#[test]
fn netfilter_timeout_and_liberal_are_written() {
    let r = Router::new();
    let mut events = CtEvents::open(false).unwrap();
    let _ledger = r.ledger(LedgerConfig::default());
    let mut ct = Conntrack::open().unwrap();
    events.ignore_updates_of(ct.port().unwrap());
    let open: Vec<_> = (0..70).map(|_| r.tcp(0, 1, "10.0.1.2")).collect();
    let mut updates: Vec<_> = open
        .iter()
        .map(|(c, _)| CtUpdate {
            timeout: Some(Duration::from_secs(1234)),
            liberal: Some(true),
            ..CtUpdate::of(Zone(0), tuple_of(c, L4Proto::Tcp))
        })
        .collect();
    let nobody =
        Tuple::new(L4Proto::Tcp, "192.0.2.1".parse().unwrap(), 1, "192.0.2.2".parse().unwrap(), 2)
            .unwrap();
    updates.insert(3, CtUpdate { original: nobody, ..updates[0] });
    while !events.next(QUIET).unwrap().events.is_empty() {}
    let acks = ct.update(&updates).unwrap();
    assert_eq!(acks.len(), 71);
    for (i, ack) in acks.iter().enumerate() {
        assert_eq!(ack.as_ref().err().map(|e| e.errno), (i == 3).then_some(Errno::ENOENT));
    }
    for (c, _) in &open {
        let e = entry(&mut ct, c);
        let left = e.timeout.unwrap().as_secs();
        assert!((1200..=1234).contains(&left), "{left}");
        assert_eq!(e.tcp_liberal, [true, true]);
        assert_eq!(e.tcp_state, Some(TcpState::Established));
    }
    assert!(r.ns.run("conntrack -L -p tcp 2>/dev/null").contains(" 12"));
    // Our own updates are no news.
    assert_eq!(events.next(QUIET).unwrap().events, []);

    let back = CtUpdate { timeout: None, liberal: Some(false), ..updates[0] };
    assert_eq!(ct.update(&[back]).unwrap(), [Ok(())]);
    let e = entry(&mut ct, &open[0].0);
    assert_eq!(e.tcp_liberal, [false, false]);
    assert!(e.timeout.unwrap().as_secs() > 1000);

    let t = timeouts().unwrap();
    assert_eq!(t.udp, Duration::from_secs(30));
    assert_eq!(t.udp_stream, Duration::from_secs(120));
    r.ns.run("echo 777 > /proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established");
    assert_eq!(timeouts().unwrap().tcp_established, Duration::from_secs(777));
}

#[test]
fn netfilter_nat_shows_in_the_tuples() {
    let r = Router::new();
    r.ns.run(
        "nft 'table ip nat { \
           chain pre { type nat hook prerouting priority -100; iifname r2 tcp dport 1-65535 \
             ip daddr 10.0.2.1 dnat to 10.0.1.2; }; \
           chain post { type nat hook postrouting priority 100; oifname r1 masquerade; }; }'",
    );
    let mut log = SightLog::open(GROUP).unwrap();
    let _ledger = r.ledger(LedgerConfig::default());
    let mut ct = Conntrack::open().unwrap();

    let (mut c, mut s) = r.tcp(0, 1, "10.0.1.2");
    talk(&mut c, &mut s);
    let e = entry(&mut ct, &c);
    assert!(e.status.snat() && !e.status.dnat());
    assert_eq!(e.reply, tuple_of(&s, L4Proto::Tcp));
    assert_eq!(e.reply.dst(), "10.0.1.1".parse::<IpAddr>().unwrap());
    assert_eq!(e.outgoing(Direction::Original), e.reply.inverted());
    let mut want = both_directions(&e, r.ports[0], r.ports[1]);
    want.sort_unstable();
    assert_eq!(seen(&mut log, &mut ct), want);

    // Both kinds of NAT: the packet leaves with the other direction's tuple, the other way round.
    let (mut c, mut s) = r.tcp(2, 1, "10.0.2.1");
    talk(&mut c, &mut s);
    let e = entry(&mut ct, &c);
    assert!(e.status.snat() && e.status.dnat());
    let logged = sights(&mut log);
    assert_eq!(logged.len(), 2);
    // Together as one by one, whatever is asked for besides.
    let nobody: Tuple = "udp 10.0.1.2:9 > 10.0.9.9:9".parse().unwrap();
    let mut seen: Vec<_> = logged.iter().map(|s| s.leaving_tuple().unwrap()).collect();
    seen.insert(1, nobody);
    let found = ct.find_leaving(Zone(0), &seen).unwrap();
    let found: Vec<_> = found.into_iter().map(|f| f.map(|(found, d)| (found.id, d))).collect();
    let directions: Vec<_> = found.iter().flatten().map(|(_, d)| *d).collect();
    assert_eq!((found.len(), found[1]), (3, None));
    assert!(found.iter().flatten().all(|(id, _)| *id == e.id));
    assert!(directions.len() == 2 && directions[0] != directions[1], "{directions:?}");
    for sight in logged {
        let tuple = sight.leaving_tuple().unwrap();
        let (found, direction) =
            ct.find_leaving(Zone(0), &[tuple]).unwrap().remove(0).expect("the entry");
        assert_eq!((found.id, e.outgoing(direction)), (e.id, tuple));
        assert_eq!(sight.in_dev, [r.ports[2], r.ports[1]][direction.index()]);
        if log.has_conntrack() {
            assert_eq!(sight.direction, Some(direction));
            assert_eq!(sight.ct.unwrap().id, e.id);
        }
    }
}

#[test]
fn netfilter_zones() {
    let r = Router::new();
    r.ns.run(
        "nft 'table inet z { chain pre { type filter hook prerouting priority -300; \
           iifname r0 tcp dport 7000 ct zone set 5; iifname r1 tcp sport 7000 ct zone set 5; \
           iifname r2 tcp dport 7001 ct original zone set 9; }; }'",
    );
    let mut log = SightLog::open(GROUP).unwrap();
    let _ledger = r.ledger(LedgerConfig::default());
    let mut ct = Conntrack::open().unwrap();
    for (port, zone, from) in [(7000, Zone(5), 0), (7001, Zone(9), 2)] {
        let addr: SocketAddr = format!("10.0.1.2:{port}").parse().unwrap();
        let listener = r.hosts[1].call(move || TcpListener::bind(addr).unwrap());
        let mut c = r.hosts[from].call(move || TcpStream::connect_timeout(&addr, SOON).unwrap());
        let (mut s, _) = listener.accept().unwrap();
        talk(&mut c, &mut s);
        let tuple = tuple_of(&c, L4Proto::Tcp);
        assert_eq!(ct.get(Zone(0), &tuple).unwrap(), None);
        let e = ct.get(zone, &tuple).unwrap().expect("by its zone");
        assert_eq!((e.zone, e.original), (zone, tuple));
        assert!(ct.dump().unwrap().iter().any(|d| d.id == e.id && d.zone == zone));
        let update =
            CtUpdate { timeout: Some(Duration::from_secs(99)), ..CtUpdate::of(zone, tuple) };
        // A late acknowledgement sets it back.
        wait_until("the timeout is the one that was written", || {
            assert_eq!(ct.update(&[update]).unwrap(), [Ok(())]);
            ct.get(zone, &tuple).unwrap().unwrap().timeout.unwrap().as_secs() <= 99
        });
        let logged = sights(&mut log);
        assert_eq!(logged.len(), 2);
        if log.has_conntrack() {
            assert!(logged.iter().all(|s| s.ct.as_ref().unwrap().zone == zone));
        }
        assert!(ct.delete(zone, &tuple, e.id).unwrap());
    }
}
