//! The server over real sockets, asked by clients that do not behave.
//!
//! As root each test has a network namespace of its own; otherwise a port id of its own.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use neli::consts::nl::NlmF;
use netdev_providers::{Tuple, Zone};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::geteuid;

use super::attrs::Object;
use super::client::Incoming;
use super::info::*;
use super::socket::{Socket, buffer};
use super::wire::{self, Command, Message};
use super::*;

/// A busy machine takes its time, above all to print where something panicked on purpose; as
/// `scripts/mutants` builds, less is waited for.
const PATIENCE: Duration =
    Duration::from_secs(if option_env!("CTOFFLOAD_TEST_HURRY").is_some() { 15 } else { 60 });

struct Fake;

/// What was made of a dump, and whether it is still there.
static MADE: AtomicU32 = AtomicU32::new(0);
static THERE: AtomicBool = AtomicBool::new(false);

fn info(epoch: u64) -> ConnInfo {
    ConnInfo {
        epoch,
        zone: 0,
        packets: 1,
        bytes: 2,
        ct_id: None,
        original: tuple(),
        reply: tuple().inverted(),
        age_ms: 0,
        idle_ms: None,
        slots: vec![],
    }
}

/// Says in [`THERE`] when it goes.
struct Watched(u32);

impl Iterator for Watched {
    type Item = Found;
    fn next(&mut self) -> Option<Found> {
        self.0 += 1;
        MADE.store(self.0, Ordering::SeqCst);
        (self.0 <= 100_000).then(|| Found::Conn(info(self.0.into())))
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        THERE.store(false, Ordering::SeqCst);
    }
}

fn tuple() -> Tuple {
    "tcp 10.0.0.1:1 > 10.0.0.2:2".parse().unwrap()
}

impl ControlHandler for Fake {
    fn ports(&self) -> Result<Vec<PortInfo>, ControlError> {
        Ok(vec![PortInfo { name: "eth0".into(), ..PortInfo::default() }])
    }
    fn conns(&self, filter: &ConnFilter) -> Result<ConnDump, ControlError> {
        match filter.state.as_deref() {
            // A second of search for one.
            Some("rare") => {
                let nothing = std::iter::repeat_n(Found::Nothing, 1000)
                    .inspect(|_| std::thread::sleep(Duration::from_millis(1)));
                return Ok(Box::new(nothing.chain([Found::Conn(info(7))])));
            }
            Some("watched") => {
                THERE.store(true, Ordering::SeqCst);
                return Ok(Box::new(Watched(0)));
            }
            _ if filter.count => {
                return Ok(Box::new([Found::Nothing, Found::Count(5)].into_iter()));
            }
            _ => {}
        }
        let n = u64::from(filter.zone.unwrap_or(3));
        Ok(Box::new((0..n).map(|epoch| Found::Conn(info(epoch)))))
    }
    fn providers(&self) -> Result<Vec<ProviderInfo>, ControlError> {
        panic!("on purpose");
    }
    fn lint(&self) -> Result<Vec<LintInfo>, ControlError> {
        Ok(vec![LintInfo { name: "limit".into(), decides: true, ..LintInfo::default() }])
    }
    fn stats(&self) -> Result<Stats, ControlError> {
        Ok(Stats::default())
    }
    fn explain(&self, _: &Tuple, zone: Option<Zone>) -> Result<Explain, ControlError> {
        let conns = self.conns(&ConnFilter::default())?;
        let verdicts = (0..zone.map_or(0, |z| z.0))
            .map(|n| PortVerdict {
                port: format!("port{n}"),
                ifindex: n.into(),
                direction: netdev_providers::Direction::Reply,
                verdict: "v".repeat(200),
                matters: true,
                cause: None,
                help: None,
                in_front: Vec::new(),
            })
            .collect();
        let summary = Summary {
            offloaded: Offloaded::Partly,
            sentence: "in one direction".into(),
            cause: Some("one-way".into()),
            help: None,
        };
        let conn = conns.last().and_then(|found| match found {
            Found::Conn(conn) => Some(conn),
            _ => None,
        });
        Ok(Explain { summary, conn, verdicts })
    }
    fn flush(&self, _: &FlushRequest) -> Result<Flushed, ControlError> {
        Ok(Flushed { count: 3, ports: vec![PortFlushed { port: "eth0".into(), count: 3 }] })
    }
    fn reconcile(&self, _: &ReconcileRequest) -> Result<Vec<PortReconciled>, ControlError> {
        Ok(vec![PortReconciled { port: "eth0".into(), ..PortReconciled::default() }])
    }
    fn reload(&self) -> Result<Reloaded, ControlError> {
        Ok(Reloaded { file: "f".into(), flushed: Some(0), ..Reloaded::default() })
    }
    fn port_add(&self, request: &PortAddRequest) -> Result<PortInfo, ControlError> {
        std::thread::sleep(Duration::from_millis(2500));
        Ok(PortInfo { name: request.name.clone(), ..PortInfo::default() })
    }
    fn port_del(&self, _: &PortDelRequest) -> Result<(), ControlError> {
        Err(ControlError::internal("x".repeat(100_000)))
    }
}

/// A server while `test` runs.
fn serve(test: impl FnOnce(Target, &Publisher)) {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let mut port_id = PORT_ID;
    if geteuid().is_root() {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
    } else {
        port_id = 0x1000_0000 + std::process::id() * 64 + NEXT.fetch_add(1, Ordering::Relaxed);
    }
    let server = Server::bind_to(port_id, Access::default()).unwrap();
    let stop = AtomicBool::new(false);
    let (publisher, waker) = (server.publisher(), server.waker());
    /// Also when the test panics.
    struct Stop<'a>(&'a AtomicBool, Waker);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
            self.1.wake();
        }
    }
    std::thread::scope(|scope| {
        scope.spawn(|| server.run(&Fake, || stop.load(Ordering::Relaxed)).unwrap());
        let _stop = Stop(&stop, waker);
        let target =
            Target { port_id, daemon_uid: geteuid().as_raw(), also_uid: None, patience: PATIENCE };
        test(target, &publisher);
    });
}

/// What comes back for a datagram of any kind.
fn ask(target: Target, datagram: &[u8]) -> Vec<Message> {
    let socket = Socket::open().unwrap();
    socket.bind(0).unwrap();
    socket.send_to(target.port_id, datagram).unwrap();
    let mut buf = buffer();
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        if let Ok(got) = socket.receive(&mut buf) {
            let all = wire::parse(&buf[..got.len]).unwrap();
            return all.into_iter().map(|e| e.message).collect();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("no answer")
}

fn refused(messages: &[Message]) -> &ControlError {
    match messages {
        [Message::Refused(e)] => e,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_second_daemon_is_told_so() {
    serve(|target, _| {
        let second = |port_id| Server::bind_to(port_id, Access::default()).map(|_| ());
        if !geteuid().is_root() {
            assert!(matches!(second(target.port_id), Err(ServerError::Taken { .. })));
            return;
        }
        for port_id in [target.port_id, target.port_id + 1] {
            match second(port_id) {
                Err(ServerError::AlreadyRunning { port_id }) => assert_eq!(port_id, target.port_id),
                other => panic!("{other:?}"),
            }
        }
    });
}

#[test]
fn no_daemon_is_not_running() {
    serve(|target, _| {
        let mut client =
            Client::connect_to(Target { port_id: target.port_id + 1_000_000, ..target }).unwrap();
        assert!(matches!(client.stats(), Err(ClientError::NotRunning)));
    });
}

#[test]
fn an_answer_of_another_user_is_not_believed() {
    serve(|target, _| {
        let uid = target.daemon_uid;
        let mut client = Client::connect_to(Target { daemon_uid: uid + 1, ..target }).unwrap();
        let e = client.stats().unwrap_err();
        assert!(matches!(e, ClientError::Impostor { uid: u, .. } if u == uid), "{e}");
        // Unless it is the other one that the daemon may run as.
        let also = Target { daemon_uid: uid + 1, also_uid: Some(uid), ..target };
        assert!(Client::connect_to(also).unwrap().stats().is_ok());
        let neither = Target { also_uid: Some(uid + 2), ..also };
        assert!(Client::connect_to(neither).unwrap().stats().is_err());
    });
}

#[test]
fn long_answers_come_in_many_datagrams() {
    serve(|target, _| {
        let mut client = Client::connect_to(target).unwrap();
        let all =
            client.conns(&ConnFilter { zone: Some(20_000), ..ConnFilter::default() }).unwrap();
        assert!(all.iter().map(|c| c.epoch).eq(0..20_000));
        for n in 0..300 {
            // Every length around the size of a datagram, also where only the end does not fit.
            let some =
                client.conns(&ConnFilter { zone: Some(n), ..ConnFilter::default() }).unwrap();
            assert_eq!(some.len(), usize::from(n));
        }
        let e = client.explain(&tuple(), Some(Zone(1000))).unwrap();
        assert_eq!(e.verdicts.len(), 1000);
        assert!(e.conn.is_some());
        assert_eq!(
            (e.summary.offloaded, e.summary.cause.as_deref()),
            (Offloaded::Partly, Some("one-way"))
        );
    });
}

#[test]
fn an_unread_answer_holds_up_nobody_and_is_nobody_elses() {
    serve(|target, _| {
        let filter = ConnFilter { zone: Some(20_000), ..ConnFilter::default() }.encode().unwrap();
        let begin = wire::request(Command::GetConns, 1, &filter).unwrap();
        let messages = ask(target, &begin);
        assert!(!messages.contains(&Message::Done), "there is more");
        assert_eq!(Client::connect_to(target).unwrap().ports().unwrap().len(), 1);
        // `ask` has closed its socket; another one asks for the rest.
        let next = wire::request(Command::Next, 2, &[]).unwrap();
        assert_eq!(refused(&ask(target, &next)).kind, ErrorKind::Busy);
    });
}

fn in_state(state: &str) -> ConnFilter {
    ConnFilter { state: Some(state.into()), ..ConnFilter::default() }
}

#[test]
fn a_long_search_keeps_nobody_waiting_and_is_no_silence() {
    serve(|target, _| {
        std::thread::scope(|scope| {
            let search = scope.spawn(move || {
                // Less than it takes.
                let patience = Duration::from_millis(500);
                let mut client = Client::connect_to(Target { patience, ..target }).unwrap();
                client.conns(&in_state("rare"))
            });
            let mut other = Client::connect_to(target).unwrap();
            let mut longest = Duration::ZERO;
            while !search.is_finished() {
                let asked = Instant::now();
                other.stats().unwrap();
                longest = longest.max(asked.elapsed());
                std::thread::sleep(Duration::from_millis(20));
            }
            assert_eq!(search.join().unwrap().unwrap(), [info(7)]);
            assert!(longest < Duration::from_millis(800), "another one waited for {longest:?}");
        });
        let mut client = Client::connect_to(target).unwrap();
        let count = client.conn_count(&ConnFilter::default()).unwrap();
        assert_eq!(count, ConnCount { count: 5 });
    });
}

#[test]
fn a_slow_reader_gets_all_and_one_that_has_gone_nothing_more() {
    serve(|target, _| {
        let mut client = Client::connect_to(target).unwrap();
        let filter = in_state("watched");
        let mut all = client.conns_by_and_by(&filter).unwrap();
        let mut got = all.next().unwrap().unwrap();
        // A pager in front of somebody who reads: for longer than it takes to look whether he is there.
        std::thread::sleep(Duration::from_millis(6500));
        assert!(MADE.load(Ordering::SeqCst) < 5000, "what nobody has asked for is not made");
        for more in all {
            got.extend(more.unwrap());
        }
        assert!(got.iter().map(|c| c.epoch).eq(1..=100_000));
        // `| head`: it has seen enough, and goes.
        let mut client = Client::connect_to(target).unwrap();
        drop(client.conns_by_and_by(&filter).unwrap().next().unwrap().unwrap());
        assert!(THERE.load(Ordering::SeqCst));
        drop(client);
        let made = MADE.load(Ordering::SeqCst);
        let gone = Instant::now();
        while THERE.load(Ordering::SeqCst) {
            assert!(gone.elapsed() < PATIENCE, "the dump of a client that has gone is kept");
            std::thread::sleep(Duration::from_millis(50));
        }
        // It may have asked for one datagram ahead.
        assert!(MADE.load(Ordering::SeqCst) < made + 1000);
    });
}

#[test]
fn what_a_daemon_does_not_know_of_a_request_it_refuses() {
    serve(|target, _| {
        let mut filter = ConnFilter::default().encode().unwrap();
        filter.extend([5, 0, 99, 0, 1, 0, 0, 0]);
        let messages = ask(target, &wire::request(Command::GetConns, 1, &filter).unwrap());
        let e = refused(&messages);
        assert_eq!(e.kind, ErrorKind::InvalidArgument);
        assert!(
            e.message.contains("ConnFilter has an attribute 99 that this daemon does not know"),
            "{e}"
        );
    });
}

#[test]
fn a_request_of_another_version_is_told_so() {
    serve(|target, _| {
        let b = wire::versioned(NlmF::REQUEST, Command::GetStats, 9, 1, &[]).unwrap();
        let messages = ask(target, &b);
        let e = refused(&messages);
        assert_eq!(e.kind, ErrorKind::Version);
        assert!(e.message.contains("speaks version 2") && e.message.contains("version 9"), "{e}");
    });
}

#[test]
fn nonsense_is_refused_and_does_no_harm() {
    serve(|target, _| {
        let empty = |command| wire::request(command, 1, &[]).unwrap();
        for (bytes, kind) in [
            (vec![0; 3], ErrorKind::InvalidArgument),
            (vec![0xff; 4000], ErrorKind::InvalidArgument),
            (vec![0; wire::MAX_DATAGRAM + 1], ErrorKind::InvalidArgument),
            (wire::done(1).unwrap(), ErrorKind::InvalidArgument),
            (
                [empty(Command::GetPorts), empty(Command::GetPorts)].concat(),
                ErrorKind::InvalidArgument,
            ),
            (empty(Command::Explain), ErrorKind::InvalidArgument),
            (empty(Command::Port), ErrorKind::Unsupported),
            (
                wire::request(Command::Flush, 1, &FlushRequest::default().encode().unwrap())
                    .unwrap(),
                ErrorKind::InvalidArgument,
            ),
        ] {
            assert_eq!(refused(&ask(target, &bytes)).kind, kind, "{:?}", &bytes[..3]);
        }
        let mut client = Client::connect_to(target).unwrap();
        let e = client.providers().unwrap_err();
        assert_eq!(e.to_string(), "the daemon panicked: on purpose");
        let e = client.port_del(&PortDelRequest::default()).unwrap_err();
        assert!(e.to_string().starts_with("xxx"));
        assert_eq!(client.ports().unwrap()[0].name, "eth0");
    });
}

#[test]
fn a_long_change_is_waited_for_while_others_are_served() {
    serve(|target, _| {
        let patience = Duration::from_millis(1600);
        std::thread::scope(|scope| {
            let change = scope.spawn(move || {
                let mut client = Client::connect_to(Target { patience, ..target }).unwrap();
                client.port_add(&PortAddRequest { name: "slow".into(), ..Default::default() })
            });
            let mut other = Client::connect_to(target).unwrap();
            let mut served = 0;
            while !change.is_finished() {
                other.stats().unwrap();
                served += 1;
                std::thread::sleep(Duration::from_millis(50));
            }
            assert!(served > 1, "the others had to wait until it was over");
            assert_eq!(change.join().unwrap().unwrap().name, "slow");
        });
        let mut client = Client::connect_to(target).unwrap();
        let request = FlushRequest { all: true, ..FlushRequest::default() };
        assert_eq!(client.flush(&request).unwrap().ports[0].count, 3);
    });
}

/// Multicasts need `CAP_NET_ADMIN`: without it, that is what is said.
#[test]
fn events_are_counted_where_they_are_lost() {
    serve(|target, publisher| {
        assert!(!publisher.is_watched());
        let mut events = match Subscription::open(target) {
            Ok(events) => events,
            Err(ClientError::EventsDenied) if !geteuid().is_root() => return,
            Err(e) => panic!("{e}"),
        };
        assert!(publisher.is_watched());
        const SENT: u64 = 30_000;
        for n in 0..SENT {
            let count = Some(n);
            publisher.publish(Event { count, ..Event::default() });
        }
        let (mut seen, mut lost, mut unknown) = (0, 0, 0);
        while seen + lost < SENT {
            match events.next(Duration::from_secs(3)).unwrap() {
                Some(Notice::Event(_)) => seen += 1,
                Some(Notice::Lost(Some(n))) => lost += n,
                Some(Notice::Lost(None)) => unknown += 1,
                // Its own buffer was full to the end: the next event tells how many.
                None => publisher.publish(Event { count: Some(SENT), ..Event::default() }),
            }
            assert!(unknown < 20, "seen {seen}, lost {lost}");
        }
        assert!(seen > 0 && lost > 0, "seen {seen}, lost {lost}");
    });
}

#[test]
fn events_of_strangers_are_not_believed() {
    serve(|target, publisher| {
        let stranger = Target { daemon_uid: target.daemon_uid + 1, ..target };
        let open = Client::open(stranger, Some(wire::EVENT_GROUP));
        let mut client = match open {
            Ok(client) => client,
            Err(ClientError::EventsDenied) if !geteuid().is_root() => return,
            Err(e) => panic!("{e}"),
        };
        let _watch = Subscription::open(target).unwrap();
        publisher.publish(Event::default());
        let got = client.receive(PATIENCE).unwrap();
        assert!(matches!(got, Incoming::Stranger(_)));
    });
}
