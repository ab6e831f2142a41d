//! Other tools at the ingress hook of a port, in either order of start: shapers that want an ingress qdisc of
//! their own, filters and programs in front.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use netdev_providers::netlink::socket::{ACK, REQUEST};
use netdev_providers::netlink::{Family, Message, Socket};

use super::explain::{NOT, PARTLY, tuple, wait_why, words};
use super::world::Stream;
use super::*;
use crate::flower::Wire;

/// What the scripts of shapers do (SQM, wondershaper, FireQOS), with the netdev that incoming packets are led
/// through.
const START: [&str; 5] = [
    "ip link add ifb4lan type ifb && ip link set ifb4lan up",
    "tc qdisc del dev lan ingress",
    "tc qdisc add dev lan handle ffff: ingress",
    "tc qdisc add dev ifb4lan root handle 1: prio",
    "tc filter add dev lan parent ffff: protocol all prio 10 u32 match u32 0 0 flowid 1:1 action mirred egress redirect dev ifb4lan",
];
const THEIRS: &str = "u32 at prio 10 (all): mirred";

fn in_front(r: &Router, port: &str) -> Vec<String> {
    let told = r.port(port)["in_front"].clone();
    let told = told.as_array().cloned().unwrap_or_default();
    told.iter().map(|t| t.as_str().unwrap_or_default().to_owned()).collect()
}

/// What `explain` says of the connection, as a person reads it.
pub(super) fn explained(r: &Router) -> String {
    let tuple = &r.conns()[0]["original"];
    let end = |host: &str, port: &str| {
        format!("{}:{}", tuple[host].as_str().unwrap_or_default(), tuple[port])
    };
    let out = r.cli(&["explain", "tcp", &end("src", "sport"), &end("dst", "dport")]);
    // It is offloaded, in part, or not.
    let told = matches!(out.status.code(), Some(0 | 10 | 11));
    assert!(told, "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

#[test]
fn a_shaper_starts_beside_the_daemon_and_goes_again() {
    let mut r = Router::new("sqm");
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    // Others that come and go all the time do not take the place of the shaper's qdisc.
    for step in START {
        r.run(step);
        c.ping();
    }
    wait_until("who is in front is told", || in_front(&r, "lan") == [THEIRS]);
    wait_until("the qdisc is theirs", || {
        r.port("lan")["about"].as_str().is_some_and(|a| a.contains("ingress qdisc, not ours"))
    });
    // What it leads through its own netdev is forwarded by the stack, and sighted there.
    wait_until("it is sighted again", || {
        c.ping();
        r.installed() == BOTH
    });
    let told = explained(&r);
    assert!(told.contains(&format!("in front    {THEIRS}")), "{told}");
    let before = r.forwarded();
    c.exchange(20_000);
    assert!(r.forwarded() > before, "the rule is not reached");
    // Its end: theirs goes, ours comes.
    let gone = Instant::now();
    r.run("tc qdisc del dev lan ingress && ip link del ifb4lan");
    wait_until("rules are in place again", || {
        c.ping();
        r.installed() == BOTH
            && in_front(&r, "lan").is_empty()
            && r.port("lan")["about"].as_str().is_some_and(|a| a.contains("ingress qdisc, ours"))
    });
    println!("back after {:?}", gone.elapsed());
    assert!(
        gone.elapsed() >= Duration::from_millis(1900),
        "no time for another: {:?}",
        gone.elapsed()
    );
    r.exchange_by_rules(&mut c, 10_000);
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    assert_eq!(r.run("tc qdisc show dev lan ingress; tc qdisc show dev wan ingress"), "");
}

#[test]
fn a_shaper_that_was_there_before_the_daemon_goes_on_and_stays() {
    let mut r = Router::new("sqmfirst");
    r.run("tc qdisc add dev lan ingress");
    for step in START {
        r.run(step);
    }
    let theirs = r.run("tc qdisc show dev lan; tc filter show dev lan ingress");
    r.start(&PORTS);
    assert_eq!(in_front(&r, "lan"), [THEIRS]);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    c.exchange(20_000);
    // What comes later, and goes again.
    r.run("tc filter add dev lan parent ffff: protocol all prio 9 matchall action continue");
    wait_until("it is told", || in_front(&r, "lan").len() == 2);
    r.run("tc filter del dev lan parent ffff: prio 9");
    wait_until("it has gone", || in_front(&r, "lan") == [THEIRS]);
    c.ping();
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    let words =
        |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ");
    let left = r.run("tc qdisc show dev lan; tc filter show dev lan ingress");
    assert_eq!(words(&left), words(&theirs));
}

/// `bpf(2)` with these words in its attribute.
fn bpf(
    command: libc::c_long,
    words: &[(usize, u32)],
    pointers: &[(usize, &[u8])],
    name: &str,
) -> OwnedFd {
    try_bpf(command, words, pointers, name).expect("a call of bpf(2)")
}

/// The same, where failure is an answer too.
pub(super) fn try_bpf(
    command: libc::c_long,
    words: &[(usize, u32)],
    pointers: &[(usize, &[u8])],
    name: &str,
) -> std::io::Result<OwnedFd> {
    let mut attr = [0_u8; 128];
    for (at, word) in words {
        attr[*at..at + 4].copy_from_slice(&word.to_ne_bytes());
    }
    for (at, bytes) in pointers {
        let pointer = bytes.as_ptr().expose_provenance() as u64;
        attr[*at..at + 8].copy_from_slice(&pointer.to_ne_bytes());
    }
    attr[48..48 + name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the attribute is as long as is said, and what it points to lives during the call, which reads it.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_ptr(), attr.len()) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the call has just made it.
    Ok(unsafe { OwnedFd::from_raw_fd(RawFd::try_from(fd).expect("a descriptor")) })
}

/// A program of this type that returns this.
pub(super) fn program(kind: u32, result: i32, name: &str) -> OwnedFd {
    let mut insns = vec![0xb7, 0, 0, 0];
    insns.extend(result.to_ne_bytes());
    insns.extend([0x95, 0, 0, 0, 0, 0, 0, 0]);
    bpf(5, &[(0, kind), (4, 2)], &[(8, &insns), (16, b"GPL\0")], name)
}

pub(super) fn raw(fd: &OwnedFd) -> u32 {
    u32::try_from(fd.as_raw_fd()).expect("a descriptor")
}

pub(super) fn index(r: &Router, dev: &str) -> u32 {
    r.port(dev)["ifindex"].as_u64().and_then(|n| n.try_into().ok()).expect("an index")
}

// linux/if_link.h
const SKB_MODE: u32 = 2;
const DRV_MODE: u32 = 4;

/// As `ip link set dev … xdpgeneric`, or `xdpdrv`, does; no program: none any more.
fn set_xdp(ifindex: u32, mode: u32, program: Option<&OwnedFd>) {
    const RTM_SETLINK: u16 = 19;
    let mut socket = Socket::open(Family::Route).expect("a socket");
    let (mut buf, seq) = (Vec::new(), socket.next_seq());
    let mut m = Message::new(&mut buf, RTM_SETLINK, REQUEST | ACK, seq);
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    let fd = program.map_or(u32::MAX, raw);
    m.raw(&header).nested(43, |m| _ = m.u32(1, fd).u32(3, mode));
    m.finish();
    socket.request(&buf, seq, |_| ()).expect("the program is set");
}

#[test]
fn filters_and_programs_in_front_are_told_when_they_come() {
    let mut r = Router::new("front");
    // No sweep comes in between.
    r.start_with(
        "[usage]\nsweep-seconds = 600\nsweep-max-seconds = 600\n[[port]]\nmatch = \"?an\"\n",
    );
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    let lan = index(&r, "lan");
    let xdp = program(6, 2, "bystander");
    set_xdp(lan, SKB_MODE, Some(&xdp));
    wait_until("XDP is told", || {
        in_front(&r, "lan").first().is_some_and(|t| t.starts_with("XDP program bystander (id "))
    });
    assert!(in_front(&r, "lan")[0].ends_with("generic"), "{:?}", in_front(&r, "lan"));
    assert!(explained(&r).contains("in front    XDP program bystander"), "{}", explained(&r));
    c.ping();
    r.run("tc filter add dev lan ingress prio 3 protocol ip flower ip_proto udp action police rate 1mbit burst 10k conform-exceed drop");
    wait_until("a filter is told too", || {
        in_front(&r, "lan").last().is_some_and(|t| t == "flower at prio 3 (ip): police")
    });
    // In software each of them decides before us, as it should.
    assert_eq!(r.installed(), BOTH);
    let text = String::from_utf8_lossy(&r.cli(&["port", "show", "lan"]).stdout).into_owned();
    assert_eq!(text.matches("in front    ").count(), 2, "{text}");
    let all = String::from_utf8_lossy(&r.cli(&["port", "show"]).stdout).into_owned();
    assert!(all.contains("lan: in front of its rules: XDP program bystander"), "{all}");
    set_xdp(lan, SKB_MODE, None);
    r.run("tc filter del dev lan ingress prio 3");
    wait_until("they have gone", || in_front(&r, "lan").is_empty());
    assert_eq!(r.installed(), BOTH);
    c.ping();
}

#[test]
fn programs_that_nobody_announces_are_found_by_a_sweep() {
    let mut r = Router::new("links");
    r.start_with("[usage]\nsweep-seconds = 1\n[[port]]\nmatch = \"lan\"\n[[port]]\nmatch = \"wan\"\nproviders = [\"nf-flowtable\"]\n");
    let mut c = r.connect();
    // (Newer kernels' flowtable takes no connection to a netdev that is not in it.)
    let on_lan = |r: &Router| r.installed().iter().any(|s| s == "lan original");
    wait_until("it is offloaded", || {
        c.ping();
        on_lan(&r)
    });
    let release = r.run("uname -r");
    let mut version = release.split('.').map_while(|n| n.parse::<u32>().ok());
    let has_tcx = (version.next(), version.next()) >= (Some(6), Some(6));
    for dev in ["lan", "wan"] {
        let ifindex = index(&r, dev);
        let xdp = program(6, 2, "by_link");
        // BPF_LINK_CREATE, with attach types BPF_XDP (generic) and BPF_TCX_INGRESS.
        let link = bpf(28, &[(0, raw(&xdp)), (4, ifindex), (8, 37), (12, 2)], &[], "");
        let mut want = vec!["XDP program by_link (id "];
        let tcx = has_tcx.then(|| {
            let next = program(3, -1, "meter");
            want.push("tcx program meter (id ");
            bpf(28, &[(0, raw(&next)), (4, ifindex), (8, 46)], &[], "")
        });
        wait_until(&format!("{want:?} on {dev}"), || {
            let told = in_front(&r, dev);
            told.len() >= want.len() && told.iter().zip(&want).all(|(t, w)| t.starts_with(w))
        });
        c.ping();
        drop((link, tcx));
        wait_until("they have gone", || in_front(&r, dev).iter().all(|t| !t.contains("program")));
    }
    assert!(on_lan(&r), "{:?}", r.slots());
}

/// Another's program is put in front, replaced and taken away while rules carry packets, which resets the netdev's
/// queues: each packet goes where it should, as it should, or where that program wants it.
fn programs_of_others_come_and_go_while_rules_carry_packets(provider: &str) {
    const XDP_DROP: i32 = 1;
    const XDP_PASS: i32 = 2;
    const ALL: [&str; 4] = ["lan original", "lan original", "wan reply", "wan reply"];
    let mut r = Router::new(&format!("xdp-{provider}"));
    let host = r.host("wan");
    let mac = r.run(&format!("ip netns exec {host} cat /sys/class/net/e0/address"));
    let mac: Vec<_> =
        mac.trim().split(':').map(|b| u8::from_str_radix(b, 16).expect("a byte")).collect();
    r.start_by(provider);
    let mut c = r.connect();
    let stream = Stream::start(&r, "10.1.0.2", "10.2.0.2", 100);
    let carried = |r: &Router, c: &mut Connection| {
        wait_until("rules carry both", || {
            c.ping();
            r.installed() == ALL
        });
        r.exchange_by_rules(c, 50_000);
        stream.is_offloaded(r, &ALL);
    };
    carried(&r, &mut c);
    let began = Instant::now();
    let wire = in_netns(host, || Wire::open("e0", false)).join().expect("a socket");
    for (dev, mode) in [("lan", SKB_MODE), ("lan", DRV_MODE), ("wan", DRV_MODE), ("wan", SKB_MODE)]
    {
        println!("{dev}, mode {mode}");
        let ifindex = index(&r, dev);
        let [pass, drop] =
            [(XDP_PASS, "pass"), (XDP_DROP, "drop")].map(|(does, name)| program(6, does, name));
        set_xdp(ifindex, mode, Some(&pass));
        c.exchange(50_000);
        carried(&r, &mut c);
        set_xdp(ifindex, mode, Some(&drop));
        // Of the direction that arrives on `wan` nothing comes back, and so the server gets what it got before.
        let stopped = Instant::now() + Duration::from_millis(300);
        std::thread::sleep(Duration::from_millis(1000));
        let passed = stream.arrivals_since(stopped).len();
        assert!((dev == "lan") == (passed == 0), "{passed} datagrams by {dev}");
        set_xdp(ifindex, mode, Some(&pass));
        carried(&r, &mut c);
        set_xdp(ifindex, mode, None);
        c.exchange(50_000);
        carried(&r, &mut c);
    }
    wait_until("datagrams arrive", || stream.arrivals_since(began).len() > 1000);
    drop(stream);
    // Whoever forwarded them: one hop further, to this host.
    let to_server = |f: &[u8]| f.len() > 38 && f[12..14] == [8, 0] && f[26..30] == [10, 1, 0, 2];
    // The frames of TCP between them take a loaded machine their time to read.
    let frames = wire.receive(usize::MAX, Duration::from_secs(2), to_server);
    assert!(frames.len() > 1000, "{}", frames.len());
    for f in frames {
        assert_eq!((&f[..6], f[22]), (&mac[..], 63), "{f:02x?}");
    }
}

#[test]
fn programs_of_others_come_and_go_while_rules_of_flower_carry_packets() {
    programs_of_others_come_and_go_while_rules_carry_packets("tc-flower");
}

#[test]
fn programs_of_others_come_and_go_while_a_flowtable_carries_packets() {
    programs_of_others_come_and_go_while_rules_carry_packets("nf-flowtable");
}

#[test]
fn programs_of_others_come_and_go_while_a_program_of_ours_carries_packets() {
    programs_of_others_come_and_go_while_rules_carry_packets("ebpf");
}

/// A rule that has never carried anything, since a filter in front of it takes all packets.
#[test]
fn who_takes_the_packets_in_front_is_the_cause_that_is_explained() {
    let mut r = Router::new("why-front");
    r.run("tc qdisc add dev lan ingress && tc filter add dev lan ingress protocol all prio 1 u32 match u32 0 0 action pass");
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    // For as long as it might only be silent.
    std::thread::sleep(Duration::from_secs(10));
    c.ping();
    let told = wait_why(&r, &words(&tuple(&c)), PARTLY, "in-front");
    assert!(told.contains("u32 at prio 1 (all): gact sees the packets first"), "{told}");
    // It goes on, by the slow path: the rule is of no use, and that is shown.
    let refused = || {
        c.ping();
        r.refusal("lan", "original").is_some_and(|(reason, why)| {
            reason == "no-effect" && why.contains("u32 at prio 1 (all): gact sees packets first")
        })
    };
    wait_until("the rule is taken for one that does nothing", refused);
    r.run("tc filter del dev lan ingress prio 1");
    r.wait_installed(&BOTH, &mut c);
    r.exchange_by_rules(&mut c, 1000);
}

#[test]
fn a_flowtable_of_somebody_elses_is_the_cause_that_is_explained() {
    let mut r = Router::new("why-theirs");
    r.run("nft 'table inet theirs { flowtable f { hook ingress priority 0; devices = { lan, wan }; }; chain c { type filter hook forward priority 0; meta l4proto tcp flow add @f; }; }'");
    let mut c = r.connect();
    wait_until("their flowtable has it", || {
        c.ping();
        r.run("conntrack -L -p tcp 2>/dev/null").contains("[OFFLOAD]")
    });
    r.start(&PORTS);
    c.ping();
    let told = wait_why(&r, &words(&tuple(&c)), NOT, "other-flowtable");
    assert!(told.contains("in a flowtable of somebody else's"), "{told}");
}
