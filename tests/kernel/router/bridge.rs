//! Connections that a bridge forwards, and nobody routes.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

const CONFIG: &str = "\
[sight]
bridged = true
[usage]
sweep-seconds = 1
sweep-max-seconds = 1
[[port]]
match = \"?an\"
[[port]]
match = \"wan2\"
[[port]]
match = \"far\"
";

/// Both directions, of so many connections.
fn both(connections: usize) -> Vec<String> {
    let of = |slot: &str| std::iter::repeat_n(slot.to_owned(), connections);
    of("lan original").chain(of("wan reply")).collect()
}

impl Router {
    /// Makes `lan` and `wan` ports of a bridge, both hosts of one network, and counts what a bridge
    /// forwards of their connections.
    pub(super) fn bridge(&self) {
        let (lan, wan) = (self.host("lan"), self.host("wan"));
        self.run("ip addr flush dev wan; ip link add br0 type bridge");
        self.run("ip link set wan master br0");
        self.bridge_lan();
        self.run(&format!(
            "ip addr add 10.2.0.1/24 dev br0
             ip -n {lan} addr add fd02::3/64 dev e0 nodad
             ip -n {wan} addr add fd02::2/64 dev e0 nodad"
        ));
    }

    /// The host behind `lan` moves into the network of `br0`.
    fn bridge_lan(&self) {
        let lan = self.host("lan");
        self.run(&format!(
            "ip addr flush dev lan; ip link set lan master br0; ip link set br0 up
             ip -n {lan} addr flush dev e0 && ip -n {lan} addr add 10.2.0.3/24 dev e0
             ip -n {lan} route replace default via 10.2.0.1
             nft -f - <<END
             table bridge watch {{
               counter total {{ }}
               chain forward {{
                 type filter hook forward priority -200; policy accept;
                 tcp dport 5001-5003 counter name total; tcp sport 5001-5003 counter name total
                 udp dport 5001-5003 counter name total; udp sport 5001-5003 counter name total
               }}
             }}
END"
        ));
    }

    fn start_bridged(&mut self) {
        self.start_with(CONFIG);
    }

    /// What the bridge itself has forwarded of the connections since the last call.
    fn bridge_forwarded(&self) -> u64 {
        let [total] = reset_counters_of("bridge watch", |line| self.try_run(line), ["total"]);
        total
    }

    /// Exchanges data until all of it goes past the bridge.
    fn exchange_past_the_bridge(&self, exchange: &mut dyn FnMut()) {
        wait_until("the bridge forwards none of it", || {
            self.bridge_forwarded();
            exchange();
            self.bridge_forwarded() == 0
        });
    }

    pub(super) fn mac(&self, dev: &str) -> String {
        self.run(&format!("ip netns exec {} cat /sys/class/net/e0/address", self.host(dev)))
            .trim()
            .to_owned()
    }

    /// Counts, where `dev` leads to, the packets that arrive there of a connection: those that come from
    /// this MAC address with this TTL or hop limit, and the others. (A packet may arrive between the reading of
    /// two counters, so neither is a part of the other.)
    fn watch_arrivals(&self, dev: &str, from: &str, ttl: u8) {
        let host = self.host(dev);
        self.run(&format!(
            "ip netns exec {host} nft -f - <<END
             table netdev arrivals {{
               counter same {{ }}
               counter changed {{ }}
               set changes {{
                 type ether_addr . ether_type . inet_proto
                 size 64
                 flags dynamic
               }}
               chain in {{
                 type filter hook ingress device e0 priority 0; policy accept;
                 meta l4proto != {{ tcp, udp }} accept
                 ether saddr {from} ip ttl {ttl} counter name same accept
                 ether saddr {from} ip6 hoplimit {ttl} counter name same accept
                 counter name changed
                 update @changes {{ ether saddr . ether type . meta l4proto }}
               }}
             }}
END"
        ));
    }

    /// At least so many packets have arrived, and none that is not as it was sent.
    fn assert_left_as_sent(&self, dev: &str, least: u64) {
        let host = self.host(dev);
        let run = |line: &str| self.try_run(&format!("ip netns exec {host} {line}"));
        let [same, changed] = reset_counters_of("netdev arrivals", run, ["same", "changed"]);
        let table = || self.run(&format!("ip netns exec {host} nft list table netdev arrivals"));
        assert!(changed == 0, "{changed} packets are not as they were sent: {}", table());
        assert!(same >= least, "{same} packets arrived");
    }

    /// UDP from the host behind `lan` to a server behind `wan` that echoes.
    fn connect_udp(&self) -> Udp {
        let stop = Arc::new(AtomicBool::new(false));
        let (ready, bound) = mpsc::channel();
        let server = in_netns(self.host("wan"), {
            let stop = Arc::clone(&stop);
            move || {
                let socket = UdpSocket::bind("10.2.0.2:5003").expect("bind");
                socket.set_read_timeout(Some(Duration::from_millis(100))).expect("a time-out");
                ready.send(()).expect("ready");
                let mut buf = [0; 2000];
                while !stop.load(Ordering::Relaxed) {
                    if let Ok((n, from)) = socket.recv_from(&mut buf) {
                        let _ = socket.send_to(&buf[..n], from);
                    }
                }
            }
        });
        bound.recv().expect("the server is bound");
        let socket = in_netns(self.host("lan"), || {
            let socket = UdpSocket::bind("10.2.0.3:0").expect("bind");
            socket.connect("10.2.0.2:5003").expect("connect");
            socket.set_read_timeout(Some(Duration::from_millis(500))).expect("a time-out");
            socket
        });
        Udp { socket: socket.join().expect("a socket"), stop, server: Some(server) }
    }
}

struct Udp {
    socket: UdpSocket,
    stop: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

impl Udp {
    /// Sends datagrams there, and compares what comes back; one that gets lost is sent again.
    fn exchange(&mut self, datagrams: u8) {
        for n in 0..datagrams {
            let data = vec![n; 1000 + usize::from(n)];
            let mut back = [0; 2000];
            wait_until("a datagram comes back", || {
                self.socket.send(&data).expect("send");
                self.socket.recv(&mut back).is_ok_and(|len| back[..len] == data)
            });
        }
    }
}

impl Drop for Udp {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

#[test]
fn bridged_connections_are_offloaded_and_left_as_they_are() {
    let mut r = Router::new("br");
    r.bridge();
    r.start_bridged();
    let (lan_mac, wan_mac) = (r.mac("lan"), r.mac("wan"));
    let mut c = r.connect();
    let mut v6 = r.connect_through("[fd02::2]:5002", "wan", "[fd02::2]:5002");
    let mut udp = r.connect_udp();
    wait_until("all are offloaded", || {
        c.ping();
        v6.ping();
        udp.exchange(1);
        r.installed() == both(3)
    });
    assert_eq!((r.rules("lan"), r.rules("wan")), (3, 3));
    r.watch_arrivals("wan", &lan_mac, 64);
    r.watch_arrivals("lan", &wan_mac, 64);
    r.exchange_past_the_bridge(&mut || {
        c.exchange(300_000);
        v6.exchange(300_000);
        udp.exchange(100);
    });
    // The far end sees what was sent.
    for host in ["lan", "wan"] {
        r.assert_left_as_sent(host, 100);
    }
    // What a router would not forward a bridge does: its packets take the slow path, and arrive.
    c.stream.set_ttl(1).expect("a TTL");
    r.bridge_forwarded();
    c.ping();
    assert!(r.bridge_forwarded() > 0, "TTL 1 does not go by rules");
    c.stream.set_ttl(64).expect("a TTL");
    // The rules match the receiver, and change nothing.
    for (port, to, egress) in [("lan", &wan_mac, "wan"), ("wan", &lan_mac, "lan")] {
        let text = r.run(&format!("tc filter show dev {port} ingress"));
        assert!(text.contains(&format!("dst_mac {to}")), "{text}");
        assert!(text.contains(&format!("Redirect to device {egress})")), "{text}");
        assert!(!text.contains("pedit") && !text.contains("csum"), "{text}");
    }
    // Whoever asks is told.
    let conns = r.json(&["conn", "show"]);
    let slots = || conns.as_array().into_iter().flatten().flat_map(|c| c["slots"].as_array());
    assert!(slots().flatten().all(|s| s["bridged"] == true), "{conns}");
    let shown = String::from_utf8(r.cli(&["conn", "show"]).stdout).expect("text");
    assert!(shown.contains(&format!("-> wan {wan_mac}  bridged")), "{shown}");
    let ends = [c.stream.local_addr(), c.stream.peer_addr()].map(|a| a.expect("one").to_string());
    let explained = r.cli(&["explain", "tcp", &ends[0], &ends[1]]).stdout;
    let explained = String::from_utf8(explained).expect("text");
    assert!(explained.contains(&format!("bridged as it is, to {wan_mac}")), "{explained}");
    // They end as routed ones do.
    c.close();
    v6.close();
    wait_until("the rules of what has ended are gone", || r.installed() == both(1));
    r.run("conntrack -D -p udp 2>/dev/null");
    wait_until("no rules are left", || r.rules("lan") + r.rules("wan") == 0);
    let mut c = r.connect();
    wait_until("another is offloaded", || {
        c.ping();
        r.installed() == both(1)
    });
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    c.exchange(10_000);
    assert!(r.bridge_forwarded() > 0);
    let left = r.run("tc qdisc show dev lan clsact; tc qdisc show dev wan clsact; nft list tables");
    assert_eq!(left, "table bridge watch\n");
}

#[test]
fn a_bridge_is_not_looked_into_unless_it_is_asked_for() {
    let mut r = Router::new("broff");
    r.bridge();
    r.start(&PORTS);
    let mut c = r.connect();
    c.exchange(100_000);
    assert!(r.bridge_forwarded() > 0);
    assert_eq!(r.json(&["stats"])["sights"], 0);
    assert!(r.slots().is_empty());
    let tables = r.run("nft list tables");
    assert_eq!(tables, "table bridge watch\ntable inet ctoffload\n");
}

#[test]
fn routed_and_bridged_connections_of_one_port_stand_side_by_side() {
    let mut r = Router::new("brmix");
    r.bridge();
    // A third network, which the router routes to.
    let far = format!("{}-far", r.name);
    r.run(&format!(
        "ip netns add {far}
         ip link add far type veth peer name e0 netns {far}
         ip addr add 10.3.0.1/24 dev far && ip link set far up
         ip -n {far} addr add 10.3.0.2/24 dev e0 && ip -n {far} link set e0 up
         ip -n {far} route add default via 10.3.0.1"
    ));
    r.start_bridged();
    let mut bridged = r.connect();
    let mut routed = r.connect_through("10.3.0.2:5002", "far", "10.3.0.2:5002");
    wait_until("both are offloaded", || {
        bridged.ping();
        routed.ping();
        r.installed() == ["far reply", "lan original", "lan original", "wan reply"]
    });
    r.exchange_past_the_bridge(&mut || bridged.exchange(200_000));
    r.exchange_by_rules(&mut routed, 200_000);
    let to_lan = r.run("tc filter show dev far ingress");
    assert!(to_lan.contains("Redirect to device lan)") && to_lan.contains("pedit"), "{to_lan}");
    let shown = String::from_utf8(r.cli(&["conn", "show"]).stdout).expect("text");
    assert!(shown.contains("lan (br0)") && shown.contains("bridged"), "{shown}");
    // A change of routes concerns the routed one alone.
    let adds = r.json(&["port", "show", "wan"])[0]["adds"].clone();
    r.run("ip route add unreachable 10.3.0.2/32");
    wait_until("the routed one is taken back", || r.installed() == both(1));
    r.run("ip route del unreachable 10.3.0.2/32");
    wait_until("it is offloaded again", || {
        routed.ping();
        bridged.ping();
        r.installed().len() == 4
    });
    assert_eq!(r.json(&["port", "show", "wan"])[0]["adds"], adds);
    r.run(&format!("ip netns del {far}"));
}

#[test]
fn a_host_that_moves_to_another_port_takes_its_rules_along() {
    let mut r = Router::new("brmove");
    // One cable at a time: there is no spanning tree.
    r.two_cables("br0", "bridge", "down");
    r.bridge_lan();
    let host = r.host("wan");
    r.start_bridged();
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    r.exchange_past_the_bridge(&mut || c.exchange(100_000));
    r.run(&format!("ip -n {host} link set e0 down; ip -n {host} link set e1 up"));
    wait_until("the rules have moved along", || {
        c.ping();
        r.installed() == ["lan original", "wan2 reply"]
    });
    assert_eq!((r.rules("lan"), r.rules("wan"), r.rules("wan2")), (1, 0, 1));
    let text = r.run("tc filter show dev lan ingress");
    assert!(text.contains("Redirect to device wan2)"), "{text}");
    r.exchange_past_the_bridge(&mut || c.exchange(100_000));
}

#[test]
fn rules_that_a_killed_daemon_has_left_are_made_anew() {
    let mut r = Router::new("brkill");
    r.bridge();
    r.start_bridged();
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    r.signal(Signal::SIGKILL);
    assert_eq!((r.rules("lan"), r.rules("wan")), (1, 1), "they forward on");
    c.exchange(50_000);
    r.start_bridged();
    r.wait_installed(&BOTH, &mut c);
    assert_eq!((r.rules("lan"), r.rules("wan")), (1, 1));
    r.exchange_past_the_bridge(&mut || c.exchange(100_000));
}

/// A bridge forgets a host that it has not seen for a while. Of those whose frames go by rules it is
/// told; a host that is silent it forgets.
#[test]
fn a_bridge_forgets_who_is_silent_and_not_who_is_offloaded() {
    let mut r = Router::new("brage");
    r.bridge();
    r.start_bridged();
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    r.exchange_past_the_bridge(&mut || c.exchange(100_000));
    r.run("ip link set br0 type bridge ageing_time 600");
    let adds = || r.json(&["stats"])["adds"].clone();
    let (before, begin) = (adds(), Instant::now());
    while begin.elapsed() < Duration::from_secs(15) {
        c.ping();
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(adds(), before, "no rule was taken back, and so none was added again");
    for port in ["lan", "wan"] {
        let learnt = r.run("bridge fdb show br br0");
        let entry = format!("{} dev {port} master br0", r.mac(port));
        assert!(learnt.contains(&entry), "no {entry} in {learnt}");
    }
    wait_until("nobody knows where they are", || r.rules("lan") + r.rules("wan") == 0);
    wait_until("both speak again", || {
        c.ping();
        r.installed() == BOTH
    });
}

#[test]
fn what_a_bridge_no_longer_does_no_rule_does() {
    let mut r = Router::new("brstop");
    r.bridge();
    r.start_bridged();
    let mut c = r.connect();
    let gone = |r: &Router, why: &str| {
        wait_until(why, || r.rules("lan") + r.rules("wan") == 0);
    };
    let there = |r: &Router, c: &mut Connection| r.wait_installed(&BOTH, c);
    let goes_on = |r: &Router, c: &mut Connection| {
        wait_until("it goes on", || c.is_alive());
        there(r, c);
    };
    there(&r, &mut c);
    // Rules of its own family.
    r.run("nft add rule bridge watch forward tcp dport 5001 drop");
    wait_until("the bridge's firewall stops it", || !c.is_alive());
    assert_eq!(r.rules("lan"), 0, "what the bridge drops is not offloaded again");
    r.run("nft flush chain bridge watch forward");
    goes_on(&r, &mut c);
    // VLANs.
    r.run("ip link set br0 type bridge vlan_filtering 1");
    gone(&r, "bridges that filter VLANs are left alone");
    r.wait_refused(("lan", "original"), "ingress-unsupported", "filters VLANs", &mut c);
    r.run("ip link set br0 type bridge vlan_filtering 0");
    there(&r, &mut c);
    // Ports that may not speak to each other.
    r.run("bridge link set dev lan isolated on; bridge link set dev wan isolated on");
    gone(&r, "nothing goes between isolated ports");
    r.run("bridge link set dev wan isolated off");
    goes_on(&r, &mut c);
    // A port that does not forward.
    r.run("bridge link set dev wan state 0");
    gone(&r, "a port that is disabled forwards nothing");
    r.run("bridge link set dev wan state 3");
    goes_on(&r, &mut c);
    // A port that leaves, and the whole bridge.
    r.run("ip link set wan nomaster");
    gone(&r, "a netdev that is no port is not forwarded to");
    r.run("ip link set wan master br0");
    goes_on(&r, &mut c);
    r.run("ip link set br0 down");
    gone(&r, "a bridge that is down forwards nothing");
    r.run("ip link set br0 up");
    goes_on(&r, &mut c);
    r.run("ip link del br0");
    gone(&r, "a bridge that is gone forwards nothing");
}

#[test]
fn tagged_frames_are_refused_and_ports_that_are_vlan_devices_are_followed() {
    let mut r = Router::new("brtag");
    r.bridge();
    let (lan, wan) = (r.host("lan"), r.host("wan"));
    for (host, n) in [(&lan, 3), (&wan, 2)] {
        r.run(&format!(
            "ip -n {host} link add link e0 name e0.7 type vlan id 7 && ip -n {host} link set e0.7 up
             ip -n {host} addr add 10.7.0.{n}/24 dev e0.7"
        ));
    }
    r.start_bridged();
    let mut tagged = r.connect_through("10.7.0.2:5002", "wan", "10.7.0.2:5002");
    r.wait_refused(("lan", "original"), "ingress-unsupported", "VLAN 7", &mut tagged);
    r.wait_refused(("wan", "reply"), "ingress-unsupported", "VLAN 7", &mut tagged);
    tagged.close();
    // The port of the bridge is a VLAN of the wire now.
    r.run(&format!(
        "ip link set wan nomaster && ip link add link wan name wan.20 type vlan id 20
         ip link set wan.20 master br0 && ip link set wan.20 up
         ip -n {wan} addr flush dev e0
         ip -n {wan} link add link e0 name e0.20 type vlan id 20 && ip -n {wan} link set e0.20 up
         ip -n {wan} addr add 10.2.0.2/24 dev e0.20"
    ));
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    let (there, back) =
        (r.run("tc filter show dev lan ingress"), r.run("tc filter show dev wan ingress"));
    assert!(there.contains("vlan  push id 20") && !there.contains("pedit"), "{there}");
    assert!(back.contains("vlan_id 20") && back.contains("vlan  pop pipe"), "{back}");
    r.exchange_past_the_bridge(&mut || c.exchange(200_000));
    let shown = String::from_utf8(r.cli(&["conn", "show"]).stdout).expect("text");
    assert!(shown.contains("-> wan (wan.20)") && shown.contains("bridged"), "{shown}");
    // The rule is told about with the tags of the wire.
    r.run("ip link set wan.20 down");
    wait_until("nothing is sent into it", || r.rules("lan") == 0);
}

/// With br_netfilter the stack's forward hook shows what a bridge forwards as well.
#[test]
fn alone_what_netfilter_shows_twice_is_offloaded_once() {
    let mut r = Router::new("brnf");
    r.run("modprobe br_netfilter && sysctl -qw net.bridge.bridge-nf-call-iptables=1");
    r.bridge();
    r.start_bridged();
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    assert_eq!((r.rules("lan"), r.rules("wan")), (1, 1));
    r.exchange_past_the_bridge(&mut || c.exchange(100_000));
    // An nf_tables flowtable routes: it does not take it.
    r.signal(Signal::SIGTERM);
    let provider = "match = \"?an\"\nproviders = [\"nf-flowtable\"]";
    r.start_with(&CONFIG.replace("match = \"?an\"", provider));
    r.wait_refused(("lan", "original"), "unsupported", "a flowtable routes", &mut c);
}

/// On ports of a NIC: its hardware bridges, and the host sees no packet.
#[test]
fn a_nic_forwards_what_is_bridged() {
    assert!(std::env::var_os("CTOFFLOAD_SIMNIC").is_some(), "this needs scripts/lab --nic");
    let mut r = Router::of("brnic", "simnic");
    r.bridge();
    // What a NIC forwards does not even pass the host's ingress. (It is watched from the start: a change of
    // the ruleset takes rules back, up to a second later.)
    r.run(
        "nft add table netdev host && nft add counter netdev host seen
         for p in lan wan; do
           nft add chain netdev host $p \"{ type filter hook ingress device $p priority 0; }\"
           nft add rule netdev host $p tcp dport 5001-5002 counter name seen
           nft add rule netdev host $p tcp sport 5001-5002 counter name seen
         done",
    );
    r.start_bridged();
    let mut c = r.connect();
    let mut v6 = r.connect_through("[fd02::2]:5002", "wan", "[fd02::2]:5002");
    wait_until("both are in hardware", || {
        c.ping();
        v6.ping();
        let port = |name: &str| r.json(&["port", "show", name])[0]["in_hw"].clone();
        r.installed() == both(2) && port("lan") == 2 && port("wan") == 2
    });
    r.watch_arrivals("wan", &r.mac("lan"), 64);
    let seen = || reset_counters_of("netdev host", |line| r.try_run(line), ["seen"]);
    wait_until("all of it is forwarded by the NIC", || {
        seen();
        r.bridge_forwarded();
        c.exchange(200_000);
        v6.exchange(200_000);
        (seen(), r.bridge_forwarded()) == ([0], 0)
    });
    r.assert_left_as_sent("wan", 10);
    // It is known where both are for as long as they speak.
    r.run("ip link set br0 type bridge ageing_time 600");
    let adds = || r.json(&["stats"])["adds"].clone();
    let (before, begin) = (adds(), Instant::now());
    while begin.elapsed() < Duration::from_secs(12) {
        c.ping();
        v6.ping();
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(adds(), before, "no rule was taken back, and so none was added again");
}
