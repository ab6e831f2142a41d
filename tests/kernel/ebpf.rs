//! What is of the ebpf provider alone: where its program stands, beside whom, what outlives it, and that whatever fails
//! goes up the stack. What its rules do to packets is tested with those of tc-flower, packet by packet.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test: clippy spares the test functions, but not what they call"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use netdev_providers::ebpf::{EbpfClass, EbpfConfig, Mode};
use netdev_providers::{
    BindError, Cookie, Direction, Done, Epoch, HwFlags, Ifindex, L4Proto, ProviderClass, Reason,
    Repaired, Request, RuleId, Tuple,
};
use nix::errno::Errno;

use crate::flower::backend::{Backend, tells_what_xdp_sends_to};
use crate::flower::{Net, Packet, Port, TCP4, TCP6, UDP4, UDP6, Wire, flow, instance, tuple};
use crate::netns::NetNs;
use crate::submit::{ifindex, netdev};
use crate::wait::wait_until;

fn places() -> Vec<Backend> {
    let mut places = vec![Backend::Tcx, Backend::Clsact];
    if tells_what_xdp_sends_to() {
        places.push(Backend::Xdp);
    } else {
        println!("not checked here: XDP, which on this kernel sends only to ports of its own");
    }
    places
}

/// A bpffs of a test's own.
struct Bpffs(PathBuf);

impl Bpffs {
    fn new(test: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("ctoffload-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let fs = Self(dir);
        fs.run("mount -t bpf bpf");
        fs
    }

    fn run(&self, command: &str) {
        let line = format!("{command} {}", self.0.display());
        let out = crate::script::run(&line);
        assert!(out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stderr));
    }

    /// Where daemons pin.
    fn pins(&self) -> PathBuf {
        self.0.join("ctoffload")
    }

    /// All that is pinned there.
    fn pinned(&self) -> Vec<String> {
        fn list(dir: &Path, to: &mut Vec<String>) {
            for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
                to.push(entry.file_name().to_string_lossy().into_owned());
                if entry.file_type().unwrap().is_dir() {
                    list(&entry.path(), to);
                }
            }
        }
        let mut all = Vec::new();
        list(&self.pins(), &mut all);
        all
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        // The kernel lets go of what was pinned on a thread of its own, and until then it is in use.
        self.run("umount --lazy");
        let _ = std::fs::remove_dir(&self.0);
    }
}

fn class(backend: Backend, pins: &Path, max_rules: u32) -> EbpfClass {
    let mode = (backend == Backend::Xdp).then_some(Mode::Xdp);
    EbpfClass::new(EbpfConfig { mode, max_rules, pins: pins.into() })
}

fn bind(class: &EbpfClass, name: &str, n: u32) -> Port {
    let provider = class.bind(&netdev(name, HwFlags::Both), instance(n)).unwrap();
    Port { provider, instance: instance(n) }
}

fn declined(class: &EbpfClass, name: &str) -> String {
    match class.bind(&netdev(name, HwFlags::Both), instance(1)) {
        Err(BindError::Declined(why)) => why,
        other => panic!("{:?}", other.map(|p| p.describe())),
    }
}

impl Net {
    /// The client's packet of this tuple gets to the server.
    fn forwards(&self, t: Tuple) -> bool {
        self.pass(Packet::new(t).frame(false), false, t, 1).len() == 1
    }

    fn forwards_none(&self, t: Tuple) -> bool {
        self.pass(Packet::new(t).frame(false), false, t, 0).is_empty()
    }

    /// Counts what gets to the router's stack from the client.
    fn watch_stack(&self) {
        self.ns.run(
            "nft add table inet t; nft add counter inet t seen
             nft add chain inet t pre '{ type filter hook prerouting priority -500; }'
             nft add rule inet t pre iifname lan0 meta l4proto '{ tcp, udp }' counter name seen",
        );
    }

    fn seen_by_stack(&self) -> u64 {
        let text = self.ns.run("nft list counter inet t seen");
        let mut words = text.split_whitespace().skip_while(|w| *w != "packets");
        words.nth(1).unwrap().parse().unwrap()
    }

    /// The next packet of this tuple goes up the stack.
    fn goes_up(&self, t: Tuple) {
        let before = self.seen_by_stack();
        self.send(Packet::new(t).frame(false));
        wait_until("it is seen by the stack", || self.seen_by_stack() == before + 1);
    }
}

#[test]
fn nothing_is_left_of_a_port_that_has_gone() {
    for backend in places() {
        let fs = Bpffs::new("gone");
        let net = Net::of(backend);
        let qdisc = || net.ns.run("tc qdisc show dev lan0").matches("clsact").count();
        let before = (qdisc(), net.ns.run("tc filter show dev lan0 ingress"));
        let class = class(backend, &fs.pins(), 16);
        let port = bind(&class, "lan0", 1);
        let about = port.provider.describe();
        assert!(about.contains(backend.place()) && about.contains("outlives"), "{about}");
        assert!(fs.pinned().contains(&"current_flows".to_owned()), "{:?}", fs.pinned());
        port.add(1, flow(tuple(TCP4), tuple(TCP4)));
        assert!(net.forwards(tuple(TCP4)));
        port.provider.release().unwrap();
        // As the engine does, which holds it.
        let why = port.try_add(2, flow(tuple(UDP4), tuple(UDP4))).unwrap_err();
        assert_eq!(why.reason, Reason::NetdevGone);
        drop(port);
        assert!(net.forwards_none(tuple(TCP4)), "{backend:?}");
        assert_eq!(fs.pinned(), <[String; 0]>::default());
        assert_eq!((qdisc(), net.ns.run("tc filter show dev lan0 ingress")), before, "{backend:?}");
        // There is room for another, whoever it is.
        let port = bind(&class, "lan0", 2);
        assert_eq!(port.provider.observe().unwrap().leftovers, []);
        port.provider.release().unwrap();
    }
}

#[test]
fn without_a_bpffs_rules_end_with_the_process_and_it_is_said() {
    let net = Net::of(Backend::Tcx);
    let class = class(Backend::Tcx, Path::new("/tmp/none"), 16);
    let port = bind(&class, "lan0", 1);
    assert!(port.provider.describe().contains("is in no bpffs"), "{}", port.provider.describe());
    port.add(1, flow(tuple(TCP4), tuple(TCP4)));
    assert!(net.forwards(tuple(TCP4)));
    drop(port);
    // On kernels without tcx a filter stays until somebody comes.
    let port = bind(&class, "lan0", 2);
    assert!(net.forwards_none(tuple(TCP4)));
    port.provider.release().unwrap();
    assert_eq!(net.ns.run("tc qdisc show dev lan0").matches("clsact").count(), 0);
}

/// A process that ends takes its descriptors with it, and no more.
#[test]
fn what_a_dead_engine_has_left_goes_on_forwarding_and_is_adopted() {
    for backend in places() {
        let fs = Bpffs::new("adopted");
        let net = Net::of(backend);
        let class = class(backend, &fs.pins(), 16);
        let all = [TCP4, UDP4, TCP6, UDP6].map(tuple);
        let port = bind(&class, "lan0", 1);
        for (epoch, t) in (1..).zip(all) {
            port.add(epoch, flow(t, t));
        }
        assert!(net.forwards(all[0]));
        drop(port);
        for t in all {
            assert!(net.forwards(t), "{backend:?}: {t} without an engine");
        }
        let port = bind(&class, "lan0", 2);
        assert!(port.provider.describe().contains(backend.place()), "{}", port.provider.describe());
        assert!(net.forwards(all[0]), "nobody has decided yet");
        let taken = port.try_add(9, flow(all[0], all[0])).unwrap_err();
        assert_eq!(taken.reason, Reason::Conflict);
        let observed = port.provider.observe().unwrap();
        let mut left = observed.leftovers;
        left.sort_by_key(|l| l.cookie.epoch);
        assert_eq!(left.len(), 4);
        for (l, (epoch, t)) in left.iter().zip((1..).zip(all)) {
            let direction = Direction::Original;
            let cookie = Cookie { instance: instance(1), epoch: Epoch(epoch), direction };
            assert_eq!((l.cookie, l.tuple), (cookie, Some(t)));
            assert_eq!(l.counters.packets, if epoch == 1 { 3 } else { 1 }, "{backend:?} {t}");
        }
        // The first is what it would be now; the second would lead elsewhere; the third is of no connection.
        let adopt = |l: usize, epoch, flow| Request::Adopt {
            found: left[l].rule,
            cookie: port.cookie(epoch),
            flow: Box::new(flow),
        };
        let mut elsewhere = flow(all[1], all[1]);
        elsewhere.forward.mtu -= 1;
        let outcomes = port.submit(vec![
            adopt(0, 101, flow(all[0], all[0])),
            adopt(1, 102, elsewhere),
            Request::Delete { rule: left[2].rule, cookie: left[2].cookie },
            adopt(3, 104, flow(all[3], all[3])),
        ]);
        assert!(
            matches!(outcomes[0], Ok(Done::Added { rule, .. }) if rule == left[0].rule),
            "{outcomes:?}"
        );
        assert_eq!(outcomes[1].as_ref().unwrap_err().reason, Reason::Conflict);
        assert_eq!(outcomes[2], Ok(Done::Deleted));
        assert!(outcomes[3].is_ok(), "{outcomes:?}");
        assert_eq!(port.packets(101), 3, "counters go on");
        assert!(net.forwards(all[0]) && net.forwards(all[3]));
        assert!(net.forwards_none(all[1]) && net.forwards_none(all[2]));
        assert_eq!(port.packets(101), 4);
        assert_eq!(port.provider.observe().unwrap().leftovers, []);
        // A name is given again only when it is free.
        let fresh = port.add(105, flow(all[1], all[1]));
        assert!(fresh != left[0].rule && fresh != left[3].rule);
        assert_eq!(port.delete(101, left[0].rule), Ok(Done::Deleted));
        assert!(net.forwards_none(all[0]));
        let mut epochs: Vec<_> = port.usage().iter().map(|r| r.cookie.epoch.0).collect();
        epochs.sort_unstable();
        assert_eq!(epochs, [104, 105]);
        assert_eq!(port.provider.flush().unwrap(), 2);
        assert!(net.forwards_none(all[3]) && net.forwards_none(all[1]));
        port.provider.release().unwrap();
    }
}

/// The program of the next engine comes in the place of that of the former at once.
#[test]
fn no_packet_is_lost_while_an_engine_takes_over() {
    for backend in places() {
        let fs = Bpffs::new("takes-over");
        let net = Net::of(backend);
        let class = class(backend, &fs.pins(), 16);
        let t = tuple(UDP4);
        let port = bind(&class, "lan0", 1);
        port.add(1, flow(t, t));
        drop(port);
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let sending = net.client.start({
            let (stop, sent) = (Arc::clone(&stop), Arc::clone(&sent));
            move || {
                let (wire, frame) = (Wire::open("c0", false), Packet::new(t).frame(false));
                while !stop.load(Ordering::Relaxed) {
                    wire.send(&frame);
                    sent.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_micros(100));
                }
            }
        });
        for n in 2.. {
            drop(bind(&class, "lan0", n));
            if n > 6 && sent.load(Ordering::Relaxed) > 100 {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        sending.recv().unwrap();
        let port = bind(&class, "lan0", u32::MAX);
        let packets = || port.provider.observe().unwrap().leftovers[0].counters.packets;
        let sent = sent.load(Ordering::Relaxed);
        wait_until("all have been forwarded", || packets() == sent);
        port.provider.release().unwrap();
    }
}

#[test]
fn what_is_of_no_use_any_more_is_removed() {
    let fs = Bpffs::new("no-use");
    let net = Net::of(Backend::Tcx);
    let t = tuple(TCP4);
    let port = bind(&class(Backend::Tcx, &fs.pins(), 16), "lan0", 1);
    port.add(1, flow(t, t));
    drop(port);
    // A table of another size.
    let port = bind(&class(Backend::Tcx, &fs.pins(), 32), "lan0", 2);
    assert_eq!(port.provider.observe().unwrap().leftovers, []);
    assert!(net.forwards_none(t));
    port.add(1, flow(t, t));
    drop(port);
    // Of a netdev that is to be no port.
    let class = class(Backend::Tcx, &fs.pins(), 32);
    assert!(net.forwards(t));
    assert_eq!(class.clear_leftovers(ifindex("lan0")), Ok(1));
    assert!(net.forwards_none(t));
    assert_eq!(fs.pinned(), <[String; 0]>::default());
    assert_eq!(class.clear_leftovers(ifindex("lan0")), Ok(0));
    // Of another layout.
    drop(bind(&class, "lan0", 1));
    let of_namespace = std::fs::read_dir(fs.pins()).unwrap().next().unwrap().unwrap().path();
    let ours = std::fs::read_dir(&of_namespace).unwrap().next().unwrap().unwrap().path();
    std::fs::rename(&ours, of_namespace.join(format!("{}-0", ifindex("lan0")))).unwrap();
    bind(&class, "lan0", 2).provider.release().unwrap();
    assert_eq!(fs.pinned(), <[String; 0]>::default());
}

/// Pins are of a netdev with this number: they are another's when the number is.
#[test]
fn pins_of_a_netdev_that_has_gone_are_not_taken_for_those_of_its_successor() {
    for backend in places() {
        let fs = Bpffs::new("successor");
        let net = Net::of(backend);
        let class = class(backend, &fs.pins(), 16);
        let t = tuple(TCP4);
        let port = bind(&class, "lan0", 1);
        port.add(1, flow(t, t));
        drop(port);
        let number = ifindex("lan0");
        net.ns.run("ip link del lan0");
        net.ns.run(&format!("ip link add lan0 index {number} type veth peer name c9"));
        net.ns.run("ethtool -K lan0 rxvlan off");
        assert_eq!(ifindex("lan0"), number);
        let port = bind(&class, "lan0", 2);
        assert_eq!(port.provider.observe().unwrap().leftovers, [], "{backend:?}");
        port.provider.release().unwrap();
    }
}

#[test]
fn a_netdev_that_goes_takes_its_rules_and_nothing_hangs() {
    for backend in places() {
        let fs = Bpffs::new("goes");
        let net = Net::of(backend);
        let port = bind(&class(backend, &fs.pins(), 16), "lan0", 1);
        let rule = port.add(1, flow(tuple(TCP4), tuple(TCP4)));
        net.ns.run("ip link del lan0");
        let swept = port.provider.usage(&mut |_| ());
        assert_eq!(swept.unwrap_err().errno, Some(Errno::ENODEV));
        assert_eq!(port.delete(1, rule), Ok(Done::Deleted));
        assert_eq!(port.provider.flush(), Ok(0));
        assert_eq!(port.provider.release(), Ok(()));
        assert_eq!(fs.pinned(), <[String; 0]>::default());
        let gone = netdev("wan0", HwFlags::Both);
        net.ns.run("ip link del wan0");
        let class = class(backend, &fs.pins(), 16);
        assert!(
            matches!(class.bind(&gone, instance(1)), Err(BindError::Failed(f)) if f.is_netdev_gone())
        );
    }
}

// --- Failure means the stack ----------------------------------------------------------------------

#[test]
fn what_there_is_no_room_for_goes_up_the_stack() {
    for backend in places() {
        let net = Net::of(backend);
        net.watch_stack();
        let port = bind(&class(backend, Path::new("/tmp/none"), 2), "lan0", 1);
        let all = [TCP4, UDP4, TCP6].map(tuple);
        let first = port.add(1, flow(all[0], all[0]));
        port.add(2, flow(all[1], all[1]));
        let why = port.try_add(3, flow(all[2], all[2])).unwrap_err();
        assert_eq!(why.reason, Reason::TableFull);
        net.goes_up(all[2]);
        // One that gives way in the same batch makes room.
        let outcomes = port.submit(vec![
            Request::Add { cookie: port.cookie(3), flow: Box::new(flow(all[2], all[2])) },
            Request::Delete { rule: first, cookie: port.cookie(1) },
        ]);
        assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
        assert!(net.forwards(all[2]));
        net.goes_up(all[0]);
        port.provider.release().unwrap();
    }
}

#[test]
fn what_led_to_a_netdev_that_has_gone_goes_up_the_stack() {
    for backend in places() {
        let net = Net::of(backend);
        net.watch_stack();
        let port = bind(&class(backend, Path::new("/tmp/none"), 16), "lan0", 1);
        let t = tuple(UDP4);
        port.add(1, flow(t, t));
        let mut to_none = flow(tuple(TCP4), tuple(TCP4));
        to_none.forward.egress = Ifindex::new(9999).unwrap();
        assert!(net.forwards(t));
        net.ns.run("ip link del wan0");
        net.goes_up(t);
        assert_eq!(port.packets(1), 1, "{backend:?}: and is not counted");
        let why = port.try_add(2, to_none).unwrap_err();
        assert_eq!(why.reason, Reason::EgressUnsupported, "{why}");
        port.provider.release().unwrap();
    }
}

#[test]
fn what_matches_no_rule_or_another_mac_goes_up_the_stack() {
    for backend in places() {
        let net = Net::of(backend);
        net.watch_stack();
        let port = bind(&class(backend, Path::new("/tmp/none"), 16), "lan0", 1);
        net.goes_up(tuple(TCP4));
        port.add(1, flow(tuple(TCP4), tuple(TCP4)));
        assert!(net.forwards(tuple(TCP4)));
        // Each part of the tuple counts.
        for other in [
            "tcp 10.0.1.3:4000 > 10.0.2.2:80",
            "tcp 10.0.1.2:4001 > 10.0.2.2:80",
            "tcp 10.0.1.2:4000 > 10.0.2.3:80",
            "tcp 10.0.1.2:4000 > 10.0.2.2:81",
            "udp 10.0.1.2:4000 > 10.0.2.2:80",
        ] {
            net.goes_up(tuple(other));
        }
        assert_eq!(port.packets(1), 1);
        port.provider.release().unwrap();
    }
}

#[test]
fn xdp_leads_only_to_netdevs_that_it_can_send_to() {
    let net = Net::of(Backend::Xdp);
    net.watch_stack();
    net.ns.run("ip link add plain0 type veth peer name plain1 && ip link set plain0 up && ip link set plain1 up");
    let port = bind(&class(Backend::Xdp, Path::new("/tmp/none"), 16), "lan0", 1);
    let mut to_plain = flow(tuple(TCP4), tuple(TCP4));
    to_plain.forward.egress = ifindex("plain0");
    let why = port.try_add(1, to_plain).unwrap_err();
    assert_eq!(why.reason, Reason::EgressUnsupported, "{why}");
    net.goes_up(tuple(TCP4));
    port.provider.release().unwrap();
}

// --- Beside others --------------------------------------------------------------------------------

#[test]
fn a_foreign_program_of_xdp_stays_and_is_named() {
    let net = Net::of(Backend::Xdp);
    let foreign = bind(&class(Backend::Xdp, Path::new("/tmp/none"), 16), "lan0", 1);
    let ours = class(Backend::Xdp, Path::new("/tmp/none"), 16);
    let why = declined(&ours, "lan0");
    assert!(why.contains("XDP program forward_xdp (id "), "{why}");
    let t = tuple(TCP4);
    if tells_what_xdp_sends_to() {
        foreign.add(1, flow(t, t));
        assert!(net.forwards(t), "it forwards as before");
    }
    // By another mode it can be had, behind that one.
    let mode = Some(Mode::Tcx);
    let class =
        EbpfClass::new(EbpfConfig { mode, pins: "/tmp/none".into(), ..EbpfConfig::default() });
    let port = bind(&class, "lan0", 2);
    assert!(
        port.provider.in_front().join(" ").contains("forward_xdp"),
        "{:?}",
        port.provider.in_front()
    );
    port.provider.release().unwrap();
    foreign.provider.release().unwrap();
}

#[test]
fn generic_xdp_is_never_used() {
    let net = NetNs::new();
    net.run(
        "ip link add br0 type bridge 2>/dev/null || ip link add br0 type dummy; ip link set br0 up",
    );
    let why = declined(&class(Backend::Xdp, Path::new("/tmp/none"), 16), "br0");
    assert!(why.contains("XDP"), "{why}");
    assert!(!net.run("ip -d link show br0").contains("xdp"));
}

#[test]
fn xdp_is_not_put_where_it_would_not_see_tags() {
    let net = Net::of(Backend::Tcx);
    let why = declined(&class(Backend::Xdp, Path::new("/tmp/none"), 16), "lan0");
    assert!(why.contains("rxvlan off"), "{why}");
    drop(net);
}

/// Programs of tcx keep their order; who comes behind would not see what is forwarded.
#[test]
fn others_at_tcx_are_left_where_they_are_and_none_is_passed_by() {
    let net = Net::of(Backend::Tcx);
    let (one, two) = (
        class(Backend::Tcx, Path::new("/tmp/none"), 16),
        class(Backend::Tcx, Path::new("/tmp/none"), 16),
    );
    let t = tuple(TCP4);
    let port = bind(&one, "lan0", 1);
    if port.provider.describe().contains("cls_bpf") {
        return println!("not checked: this kernel has no tcx");
    }
    port.add(1, flow(t, t));
    assert_eq!(port.provider.repair(), Repaired::AsItWas);
    let behind = bind(&two, "lan0", 2);
    assert!(
        behind.provider.in_front().join(" ").contains("forward_tc"),
        "{:?}",
        behind.provider.in_front()
    );
    assert!(port.provider.usage(&mut |_| ()).is_err(), "the sweep finds it");
    assert_eq!(port.provider.repair(), Repaired::RulesGone);
    assert_eq!(port.provider.repair(), Repaired::AsItWas);
    assert_eq!(port.try_add(2, flow(t, t)).unwrap_err().reason, Reason::OthersInFront);
    assert!(port.provider.describe().contains("no rules while"), "{}", port.provider.describe());
    assert_eq!(port.usage(), []);
    assert!(net.forwards_none(t), "rules were taken back");
    // That one has nobody behind.
    behind.add(1, flow(t, t));
    assert!(net.forwards(t));
    behind.provider.release().unwrap();
    drop(behind);
    assert_eq!(port.provider.repair(), Repaired::AsItWas);
    port.add(3, flow(t, t));
    assert!(net.forwards(t));
    port.provider.release().unwrap();
}

#[test]
fn filters_that_come_later_are_not_passed_by() {
    for backend in places().into_iter().filter(|&b| b != Backend::Clsact) {
        let net = Net::of(backend);
        let port = bind(&class(backend, Path::new("/tmp/none"), 16), "lan0", 1);
        if port.provider.describe().contains("cls_bpf") {
            println!("not checked: this kernel has no tcx");
            continue;
        }
        let t = tuple(TCP4);
        port.add(1, flow(t, t));
        net.ns.run("tc qdisc add dev lan0 clsact && tc filter add dev lan0 ingress prio 1 bpf bytecode '1,6 0 0 0'");
        assert_eq!(port.provider.repair(), Repaired::RulesGone, "{backend:?}");
        assert_eq!(port.try_add(2, flow(t, t)).unwrap_err().reason, Reason::OthersInFront);
        assert!(net.forwards_none(t));
        net.ns.run("tc filter del dev lan0 ingress prio 1");
        assert_eq!(port.provider.repair(), Repaired::AsItWas);
        port.add(3, flow(t, t));
        assert!(net.forwards(t));
        port.provider.release().unwrap();
        assert_eq!(
            net.ns.run("tc qdisc show dev lan0").matches("clsact").count(),
            1,
            "somebody else's"
        );
    }
}

#[test]
fn a_filter_that_somebody_took_away_is_put_there_again_with_its_rules() {
    let net = Net::of(Backend::Clsact);
    let port = bind(&class(Backend::Clsact, Path::new("/tmp/none"), 16), "lan0", 1);
    let t = tuple(TCP4);
    port.add(1, flow(t, t));
    assert!(net.forwards(t));
    net.ns.run("tc qdisc del dev lan0 clsact");
    assert!(net.forwards_none(t));
    assert!(port.provider.usage(&mut |_| ()).is_err(), "the sweep finds it");
    assert_eq!(port.provider.repair(), Repaired::AsItWas);
    assert!(net.forwards(t));
    assert_eq!(port.packets(1), 2);
    port.provider.release().unwrap();
    assert_eq!(
        net.ns.run("tc qdisc show dev lan0").matches("clsact").count(),
        0,
        "that one was ours"
    );
}

// --- Batches --------------------------------------------------------------------------------------

#[test]
fn every_operation_of_a_large_batch_has_its_own_result() {
    let net = Net::of(Backend::Tcx);
    let port = bind(&class(Backend::Tcx, Path::new("/tmp/none"), 20_000), "lan0", 1);
    let flow_of = |n: u32| {
        let source = std::net::Ipv4Addr::from(0x0a01_0000 + n);
        let t = Tuple::new(L4Proto::Udp, source.into(), 1000, "10.0.2.2".parse().unwrap(), 53);
        flow(t.unwrap(), t.unwrap())
    };
    let add = |epoch: u32, f| Request::Add { cookie: port.cookie(epoch.into()), flow: Box::new(f) };
    let requests = (0..10_000).map(|n| {
        let mut f = flow_of(n);
        match n % 50 {
            7 => f = flow_of(n - 1),
            13 => f.forward.egress = Ifindex::new(9999).unwrap(),
            29 => f.forward.tuple = tuple(TCP4),
            31 => f.forward.egress = Ifindex::local(3).unwrap(),
            _ => {}
        }
        add(n, f)
    });
    let mut rules: Vec<(u32, RuleId)> = Vec::new();
    for (n, outcome) in (0..).zip(port.submit(requests.collect())) {
        let reason = outcome.as_ref().err().map(|why| why.reason);
        match n % 50 {
            7 => assert_eq!(reason, Some(Reason::Conflict), "{n}"),
            13 | 31 => assert_eq!(reason, Some(Reason::EgressUnsupported), "{n}"),
            29 => assert_eq!(reason, Some(Reason::Unsupported), "{n}"),
            _ => match outcome {
                Ok(Done::Added { rule, .. }) => rules.push((n, rule)),
                other => panic!("{n}: {other:?}"),
            },
        }
    }
    assert_eq!(rules.len(), 9200);
    let usage = |port: &Port| {
        let mut all: Vec<_> = port.usage().iter().map(|r| (r.cookie.epoch.0, r.rule)).collect();
        all.sort_unstable_by_key(|(epoch, _)| *epoch);
        all
    };
    let wanted: Vec<_> = rules.iter().map(|&(n, rule)| (u64::from(n), rule)).collect();
    assert_eq!(usage(&port), wanted);
    // Another cookie's is another rule; one that is not there is gone.
    assert_eq!(port.delete(77_777, rules[0].1), Ok(Done::Deleted));
    assert_eq!(port.delete(1, RuleId(u64::MAX - 1)), Ok(Done::Deleted));
    assert_eq!(usage(&port).len(), 9200);
    // Deletes and adds of the same tuples, mixed.
    let mixed = rules.iter().flat_map(|&(n, rule)| {
        [Request::Delete { rule, cookie: port.cookie(n.into()) }, add(n + 100_000, flow_of(n))]
    });
    assert!(port.submit(mixed.collect()).iter().all(Result::is_ok));
    let now = usage(&port);
    assert_eq!(now.len(), 9200);
    assert!(now.iter().all(|(epoch, _)| *epoch >= 100_000));
    assert_eq!(port.provider.flush().unwrap(), 9200);
    assert_eq!(port.provider.flush().unwrap(), 0);
    assert_eq!(port.usage(), []);
    port.add(1, flow_of(1));
    assert_eq!(port.usage().len(), 1);
    port.provider.release().unwrap();
    drop(net);
}
