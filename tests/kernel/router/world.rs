//! What changes the router's answer under traffic: packets of an offloaded flow must get the new one. Each test
//! measures the time from the change to the last packet that got the old one, and sees that none does later.

use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::*;

/// How long after a change nothing may be wrong any more. (Emulated processors are slow: the figure itself is
/// printed.)
const SETTLED: Duration = Duration::from_millis(1500);
/// How long it is looked at afterwards.
const WATCHED: Duration = Duration::from_millis(2500);

/// A flow of UDP from the host behind `lan`, every 5 ms, whose far end answers each datagram.
pub(super) struct Stream {
    stop: Arc<AtomicBool>,
    /// When datagrams arrived at the far end.
    arrived: Arc<Mutex<Vec<Instant>>>,
    threads: Vec<JoinHandle<()>>,
}

/// Datagrams are sent whole however long they are, and not made shorter by what routers answer.
fn never_fragment(socket: &UdpSocket, ipv6: bool) {
    let (level, option, probe) = if ipv6 {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE)
    } else {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)
    };
    set_int(socket, level, option, probe);
}

fn set_int(socket: &UdpSocket, level: i32, option: i32, value: i32) {
    // SAFETY: the value is an int, as these options take, and lives during the call.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            libc::socklen_t::try_from(size_of::<i32>()).expect("a length"),
        )
    };
    assert_eq!(set, 0, "setsockopt: {}", std::io::Error::last_os_error());
}

impl Stream {
    pub(super) fn start(r: &Router, from: &str, to: &str, size: usize) -> Self {
        let [from, to]: [IpAddr; 2] = [from, to].map(|a| a.parse().expect("an address"));
        let (stop, arrived) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let (ready, listening) = mpsc::channel();
        let server = in_netns(r.host("wan"), {
            let (stop, arrived) = (Arc::clone(&stop), Arc::<Mutex<Vec<Instant>>>::clone(&arrived));
            move || {
                let socket = UdpSocket::bind((to, 5000)).expect("bind");
                socket.set_read_timeout(Some(Duration::from_millis(100))).expect("a time-out");
                ready.send(()).expect("ready");
                let mut buf = [0; 2000];
                while !stop.load(Ordering::Relaxed) {
                    let Ok((_, whom)) = socket.recv_from(&mut buf) else { continue };
                    arrived.lock().expect("a list").push(Instant::now());
                    let _ = socket.send_to(b"y", whom);
                }
            }
        });
        listening.recv().expect("the server listens");
        let client = in_netns(r.host("lan"), {
            let stop = Arc::clone(&stop);
            move || {
                let socket = UdpSocket::bind((from, 7000)).expect("bind");
                never_fragment(&socket, to.is_ipv6());
                socket.connect((to, 5000)).expect("connect");
                socket.set_nonblocking(true).expect("non-blocking");
                let data = vec![0; size];
                while !stop.load(Ordering::Relaxed) {
                    let _ = socket.send(&data);
                    while socket.recv(&mut [0; 8]).is_ok() {}
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        });
        Self { stop, arrived, threads: vec![server, client] }
    }

    pub(super) fn arrivals_since(&self, at: Instant) -> Vec<Instant> {
        let arrived = self.arrived.lock().expect("a list");
        arrived.iter().copied().filter(|a| *a > at).collect()
    }

    /// Datagrams arrive, and go by these rules.
    pub(super) fn is_offloaded(&self, r: &Router, rules: &[&str]) {
        let mut last = Vec::new();
        wait_until(&format!("{rules:?} carry the flow"), || {
            let now = r.slots();
            if now != last {
                println!("{now:?}");
                last = now;
            }
            r.installed() == rules
        });
        let at = Instant::now();
        wait_until("datagrams arrive", || self.arrivals_since(at).len() > 20);
        // What was made for the world as it was a moment ago can have been taken back since, and comes again.
        wait_until(&format!("{rules:?} still carry it"), || r.installed() == rules);
    }

    /// Makes a change that stops the flow, and returns how long after it the last datagram arrived.
    fn stops(&self, what: &str, change: impl FnOnce()) -> Duration {
        self.stops_within(SETTLED, what, change)
    }

    fn stops_within(&self, settled: Duration, what: &str, change: impl FnOnce()) -> Duration {
        let control = Instant::now();
        wait_until(&format!("it flows before the change: {what}"), || {
            self.arrivals_since(control).len() > 10
        });
        change();
        let changed = Instant::now();
        std::thread::sleep(settled + WATCHED);
        let after = self.arrivals_since(changed);
        let last = after.last().map_or(Duration::ZERO, |last| *last - changed);
        println!("{what}: {} datagrams after the change, the last {last:?}", after.len());
        assert!(last < settled, "{what}: a datagram {last:?} after the change");
        last
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Router {
    /// Connections are tracked from now on, and not from where the daemon's first rule asks conntrack: of a flow that is
    /// older than that an answer can be what is seen first, and then it is the answers that have the original direction.
    pub(super) fn track(&self) {
        self.run("nft 'table inet track { chain o { type filter hook output priority 0; ct state new; }; }'");
    }

    pub(super) fn with_ipv6(&self) {
        for (i, dev) in [(1, "lan"), (2, "wan")] {
            let host = self.host(dev);
            self.run(&format!(
                "ip addr add fd0{i}::1/64 dev {dev} nodad
                 ip -n {host} addr add fd0{i}::2/64 dev e0 nodad
                 ip -n {host} route add default via fd0{i}::1"
            ));
        }
        self.run("sysctl -qw net.ipv6.conf.all.forwarding=1");
    }
}

#[test]
fn a_switch_of_forwarding_stops_offloaded_flows_and_lets_them_return() {
    let mut r = Router::new("switch");
    r.with_ipv6();
    r.start(&PORTS);
    let v4 =
        ["net.ipv4.ip_forward", "net.ipv4.conf.lan.forwarding", "net.ipv4.conf.all.forwarding"];
    let v4 = v4.map(|switch| (switch, "10.1.0.2", "10.2.0.2"));
    for (switch, from, to) in
        v4.into_iter().chain([("net.ipv6.conf.all.forwarding", "fd01::2", "fd02::2")])
    {
        let stream = Stream::start(&r, from, to, 100);
        stream.is_offloaded(&r, &BOTH);
        stream.stops(switch, || drop(r.run(&format!("sysctl -qw {switch}=0"))));
        assert_eq!(r.rules("lan"), 0, "{switch}");
        r.run(&format!("sysctl -qw {switch}=1"));
        stream.is_offloaded(&r, &BOTH);
        drop(stream);
        r.run("conntrack -D -p udp");
        wait_until("it has ended", || r.rules("lan") + r.rules("wan") == 0);
    }
    // Of the netdev that replies arrive on: the other direction stays.
    let stream = Stream::start(&r, "10.1.0.2", "10.2.0.2", 100);
    stream.is_offloaded(&r, &BOTH);
    r.run("sysctl -qw net.ipv4.conf.wan.forwarding=0");
    wait_until("its rule is gone", || r.installed() == ["lan original"]);
    r.run("sysctl -qw net.ipv4.conf.wan.forwarding=1");
    stream.is_offloaded(&r, &BOTH);
}

/// Rules, routes and addresses by which the router has another answer than to forward; and how it forgets them.
#[test]
fn what_the_router_answers_otherwise_by_rule_route_and_address_stops_offloaded_flows() {
    let mut r = Router::new("answers");
    r.with_ipv6();
    r.start(&PORTS);
    let v4 = [
        ("ip route add blackhole 10.2.0.2", "ip route del blackhole 10.2.0.2"),
        ("ip route add prohibit 10.2.0.0/30", "ip route del prohibit 10.2.0.0/30"),
        ("ip rule add pref 9 ipproto udp sport 7000 dport 5000 unreachable", "ip rule del pref 9"),
        ("ip rule add pref 9 iif lan from 10.1.0.0/24 blackhole", "ip rule del pref 9"),
        // It is the router's own now.
        ("ip addr add 10.2.0.2/32 dev lo", "ip addr del 10.2.0.2/32 dev lo"),
        // The network behind `wan` goes with it.
        ("ip addr del 10.2.0.1/24 dev wan", "ip addr add 10.2.0.1/24 dev wan"),
    ];
    let v6 = [
        ("ip -6 route add blackhole fd02::2", "ip -6 route del blackhole fd02::2"),
        ("ip -6 rule add pref 9 ipproto udp dport 5000 prohibit", "ip -6 rule del pref 9"),
        ("ip addr add fd02::2/128 dev lo", "ip addr del fd02::2/128 dev lo"),
    ];
    for (from, to, changes) in [("10.1.0.2", "10.2.0.2", &v4[..]), ("fd01::2", "fd02::2", &v6[..])]
    {
        let stream = Stream::start(&r, from, to, 100);
        for (change, back) in changes {
            stream.is_offloaded(&r, &BOTH);
            stream.stops(change, || drop(r.run(change)));
            assert_eq!(r.rules("lan"), 0, "{change}");
            r.run(back);
        }
        stream.is_offloaded(&r, &BOTH);
        drop(stream);
        r.run("conntrack -D -p udp");
        wait_until("it has ended", || r.rules("lan") + r.rules("wan") == 0);
    }
}

/// It does not arrive there any more, or leave; its addresses and routes go with it.
#[test]
fn ipv6_that_is_switched_off_on_a_netdev_stops_offloaded_flows() {
    let mut r = Router::new("disabled");
    r.with_ipv6();
    r.start(&PORTS);
    let stream = Stream::start(&r, "fd01::2", "fd02::2", 100);
    let addresses =
        "ip addr replace fd01::1/64 dev lan nodad; ip addr replace fd02::1/64 dev wan nodad";
    for (change, back) in [
        (
            "sysctl -qw net.ipv6.conf.lan.disable_ipv6=1",
            "sysctl -qw net.ipv6.conf.lan.disable_ipv6=0",
        ),
        (
            "sysctl -qw net.ipv6.conf.wan.disable_ipv6=1",
            "sysctl -qw net.ipv6.conf.wan.disable_ipv6=0",
        ),
        ("ip link set lan mtu 1200", "ip link set lan mtu 1500"),
    ] {
        stream.is_offloaded(&r, &BOTH);
        // Nobody tells: it is looked at once a second.
        stream.stops_within(2 * SETTLED, change, || drop(r.run(change)));
        assert_eq!(r.rules("lan"), 0, "{change}");
        r.run(&format!("{back}; {addresses}"));
    }
    stream.is_offloaded(&r, &BOTH);
}

#[test]
fn an_ipsec_policy_stops_plaintext() {
    let mut r = Router::new("ipsec");
    r.start(&PORTS);
    let stream = Stream::start(&r, "10.1.0.2", "10.2.0.2", 100);
    let (of, tunnel) =
        ("src 10.1.0.0/24 dst 10.2.0.0/24", "tmpl src 10.2.0.1 dst 10.2.0.2 proto esp mode tunnel");
    for policy in [
        format!("{of} dir out {tunnel}"),
        format!("{of} dir fwd {tunnel}"),
        format!("{of} dir out action block"),
        format!("{of} proto udp dport 5000 dir fwd action block priority 7"),
    ] {
        stream.is_offloaded(&r, &BOTH);
        stream.stops(&policy, || drop(r.run(&format!("ip xfrm policy add {policy}"))));
        assert_eq!(r.rules("lan"), 0, "{policy}");
        // Its answers are no policy's business.
        r.run("ip xfrm policy flush");
    }
    stream.is_offloaded(&r, &BOTH);
    // One that concerns others takes nothing back.
    let cookie = |r: &Router| r.conns()[0]["slots"][0]["cookie"].clone();
    let before = cookie(&r);
    r.run("ip xfrm policy add src 10.1.0.7/32 dst 10.2.0.0/24 dir out action block");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(r.installed(), BOTH);
    assert_eq!(cookie(&r), before);
}

#[test]
fn a_lowered_mtu_of_a_route_or_of_ipv6_stops_what_is_too_long() {
    let mut r = Router::new("mtu");
    r.with_ipv6();
    r.start(&PORTS);
    let route = "10.2.0.0/24 dev wan src 10.2.0.1";
    let lock = "fd02::/64 dev wan metric 1";
    for (from, to, change, back) in [
        (
            "10.1.0.2",
            "10.2.0.2",
            format!("ip route change {route} mtu 1300"),
            format!("ip route change {route}"),
        ),
        (
            "fd01::2",
            "fd02::2",
            format!("ip route add {lock} mtu lock 1300"),
            format!("ip route del {lock}"),
        ),
        (
            "fd01::2",
            "fd02::2",
            "sysctl -qw net.ipv6.conf.wan.mtu=1300".to_owned(),
            "sysctl -qw net.ipv6.conf.wan.mtu=1500".to_owned(),
        ),
    ] {
        let stream = Stream::start(&r, from, to, 1400);
        stream.is_offloaded(&r, &BOTH);
        stream.stops(&change, || drop(r.run(&change)));
        r.run(&back);
        stream.is_offloaded(&r, &BOTH);
        wait_until("no rule looks at the length", || {
            !r.run("tc filter show dev lan ingress").contains("police")
        });
        drop(stream);
        r.run("conntrack -D -p udp");
        wait_until("it has ended", || r.rules("lan") + r.rules("wan") == 0);
    }
}

#[test]
fn what_was_refused_for_a_route_is_offloaded_when_the_route_comes_back() {
    let mut r = Router::new("tunnel");
    let (lan, wan) = (r.host("lan"), r.host("wan"));
    r.run(&format!(
        "ip -n {wan} addr add 10.9.0.1/32 dev lo
         ip route add 10.9.0.1/32 via 10.2.0.2
         ip link add tun0 type ipip local 10.2.0.1 remote 10.2.0.2 && ip link set tun0 up
         ip -n {wan} link add tun0 type ipip local 10.2.0.2 remote 10.2.0.1
         ip -n {wan} link set tun0 up
         ip netns exec {wan} sysctl -qw net.ipv4.conf.all.rp_filter=0
         ip netns exec {wan} sysctl -qw net.ipv4.conf.tun0.rp_filter=0"
    ));
    drop(lan);
    r.start(&PORTS);
    let stream = Stream::start(&r, "10.1.0.2", "10.9.0.1", 100);
    stream.is_offloaded(&r, &BOTH);
    r.run("ip route replace 10.9.0.1/32 dev tun0");
    let refused = |r: &Router| r.refusal("lan", "original").map(|(reason, _)| reason);
    wait_until("a tunnel is refused", || refused(&r).as_deref() == Some("egress-unsupported"));
    let at = Instant::now();
    wait_until("it goes on by the tunnel", || stream.arrivals_since(at).len() > 20);
    r.run("ip route replace 10.9.0.1/32 via 10.2.0.2");
    let back = Instant::now();
    wait_until("it is offloaded again", || r.installed() == BOTH);
    println!("offloaded again {:?} after the route came back", back.elapsed());
    assert!(back.elapsed() < Duration::from_secs(5), "{:?}", back.elapsed());
}

/// A second way to the host behind `wan`, and an address of its there that both lead to; its neighbours are known for
/// good, so that nothing but the cable tells.
fn with_backup(r: &Router) {
    r.track();
    let host = r.host("wan");
    r.run(&format!(
        "ip link add wan2 type veth peer name e2 netns {host}
         ip addr add 10.3.0.1/24 dev wan2; ip link set wan2 up
         ip -n {host} addr add 10.3.0.2/24 dev e2; ip -n {host} link set e2 up
         ip -n {host} addr add 10.99.0.2/32 dev lo
         ip -n {host} route add default via 10.3.0.1 metric 10
         ip netns exec {host} sysctl -qw net.ipv4.conf.all.rp_filter=0
         ip route add 10.99.0.2 via 10.2.0.2 dev wan metric 10
         ip route add 10.99.0.2 via 10.3.0.2 dev wan2 metric 20
         sysctl -qw net.ipv4.conf.all.rp_filter=0"
    ));
    for (dev, peer, host_dev) in [("wan", "10.2.0.2", "e0"), ("wan2", "10.3.0.2", "e2")] {
        let mac = r.run(&format!("ip netns exec {host} cat /sys/class/net/{host_dev}/address"));
        r.run(&format!("ip neigh replace {peer} lladdr {} dev {dev} nud permanent", mac.trim()));
    }
}

#[test]
fn a_cable_that_is_pulled_out_sends_flows_by_the_backup_route_where_the_router_would() {
    let mut r = Router::new("cable");
    with_backup(&r);
    let host = r.host("wan");
    r.run("sysctl -qw net.ipv4.conf.all.ignore_routes_with_linkdown=1");
    let cable = |r: &Router, state: &str| {
        r.run(&format!("ip -n {host} link set e0 {state}"));
        if state == "up" {
            r.run(&format!("ip -n {host} route replace default via 10.2.0.1 dev e0"));
        }
        Instant::now()
    };
    let ports = ["--port", "lan", "--port", "wan", "--port", "wan2"];
    // Whether it is offloaded first, and by which rules.
    let mut stream = Stream::start(&r, "10.1.0.2", "10.99.0.2", 100);
    for with_daemon in [false, true] {
        if with_daemon {
            r.start(&ports);
            stream.is_offloaded(&r, &BOTH);
        } else {
            let at = Instant::now();
            wait_until("it flows", || stream.arrivals_since(at).len() > 20);
        }
        let pulled = cable(&r, "down");
        std::thread::sleep(SETTLED + WATCHED);
        wait_until("it flows again", || stream.arrivals_since(pulled).len() > 200);
        let after = stream.arrivals_since(pulled);
        let gap = after.first().map_or(SETTLED + WATCHED, |first| *first - pulled);
        println!("daemon: {with_daemon}; {} arrivals, the first {gap:?} after", after.len());
        assert!(after.len() > 200 && gap < SETTLED, "{} arrivals, {gap:?}", after.len());
        if with_daemon {
            wait_until("rules carry it there", || {
                let installed = r.installed();
                let both = ["lan original", "wan2 reply"];
                both.iter().all(|slot| installed.iter().any(|i| i == slot))
            });
        }
        // And back. (The rule for replies on the backup's netdev is used no more.)
        let plugged = cable(&r, "up");
        if with_daemon {
            wait_until("rules carry it there", || {
                let installed = r.installed();
                BOTH.iter().all(|slot| installed.iter().any(|i| i == slot))
            });
        }
        wait_until("it flows", || stream.arrivals_since(plugged).len() > 20);
        drop(stream);
        // Without the daemon nothing need be tracked.
        let _ = r.try_run("conntrack -D -p udp");
        stream = Stream::start(&r, "10.1.0.2", "10.99.0.2", 100);
    }
}

/// What the reverse path is looked for with is not announced.
#[test]
fn a_switch_that_nobody_tells_of_is_obeyed_within_a_second_or_two() {
    let mut r = Router::new("quiet");
    let lan = r.host("lan");
    // A source whose way back is another but by its mark.
    r.run(&format!(
        "ip -n {lan} addr add 10.50.0.2/32 dev lo
         ip netns exec {lan} sysctl -qw net.ipv4.conf.all.arp_announce=2
         ip route add 10.50.0.2 via 10.2.0.2 dev wan
         ip route add 10.50.0.2 via 10.1.0.2 dev lan table 100
         ip rule add fwmark 1 table 100
         nft add table ip m
         nft add chain ip m early '{{ type filter hook prerouting priority -150; }}'
         nft add rule ip m early meta mark set 1
         sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.all.src_valid_mark=1"
    ));
    r.start(&PORTS);
    let stream = Stream::start(&r, "10.50.0.2", "10.2.0.2", 100);
    stream.is_offloaded(&r, &BOTH);
    let switch = |to: u8| drop(r.run(&format!("sysctl -qw net.ipv4.conf.all.src_valid_mark={to}")));
    let control = Instant::now();
    switch(0);
    std::thread::sleep(2 * SETTLED);
    let settled = Instant::now();
    std::thread::sleep(WATCHED);
    let (after, late) = (stream.arrivals_since(control), stream.arrivals_since(settled));
    let last = after.last().map_or(Duration::ZERO, |last| *last - control);
    println!("{} datagrams after the change, the last {last:?}", after.len());
    assert!(late.is_empty(), "a datagram {last:?} after the change");
    switch(1);
    stream.is_offloaded(&r, &BOTH);
}
