//! Routes with several next hops.

use super::marks::{all_by_the_second, with_two_gateways};
use super::world::Stream;
use super::*;

const OUT: (&str, &str) = ("lan", "original");

impl Router {
    /// By its multipath hash a connection is refused, for this; back there is one next hop.
    fn wait_hash_routed(&self, by: &str, c: &mut Connection) {
        self.wait_refused(OUT, "hash-routed", by, c);
        self.wait_installed(&["wan reply"], c);
    }
}

/// The flow label, and a hash that a packet comes with, are in no look-up.
#[test]
fn several_next_hops_are_for_software_where_what_chooses_among_them_cannot_be_asked() {
    let mut r = Router::new("hashed");
    r.with_ipv6();
    let host = r.host("wan");
    let set = |what: &str| format!("sysctl -qw net.{what}");
    r.run(&format!(
        "ip -n {host} addr add fd02::3/64 dev e0 nodad; ip -n {host} addr add fd99::2/64 dev lo nodad
         ip -n {host} addr add 10.2.0.3/24 dev e0; ip -n {host} addr add 10.99.0.2/32 dev lo
         {}; {}
         ip route add fd99::/64 nexthop via fd02::2 dev wan nexthop via fd02::3 dev wan
         ip route add 10.99.0.0/24 nexthop via 10.2.0.2 dev wan nexthop via 10.2.0.3 dev wan",
        set("ipv6.fib_multipath_hash_policy=0"),
        set("ipv4.fib_multipath_hash_policy=0"),
    ));
    r.start(&PORTS);
    let mut c = r.connect_through("10.99.0.2:5002", "wan", "10.99.0.2:5002");
    r.wait_installed(&BOTH, &mut c);
    // Nobody tells of the policy: it is looked at.
    r.run(&set("ipv4.fib_multipath_hash_policy=1"));
    r.wait_hash_routed("the hash", &mut c);
    r.run(&set("ipv4.fib_multipath_hash_policy=0"));
    r.wait_installed(&BOTH, &mut c);
    // A group that looks at how idle a flow is, which one that is offloaded seems to be.
    r.run(
        "ip nexthop add id 41 via 10.2.0.2 dev wan; ip nexthop add id 42 via 10.2.0.3 dev wan
         ip nexthop add id 40 group 41/42 type resilient buckets 8 idle_timer 1
         ip route replace 10.99.0.0/24 nhid 40",
    );
    r.wait_hash_routed("how idle", &mut c);
    r.run("ip route replace 10.99.0.0/24 via 10.2.0.2 dev wan; ip nexthop flush");
    r.wait_installed(&BOTH, &mut c);
    c.close();
    wait_until("it has ended", || r.installed().is_empty());

    let mut c = r.connect_through("[fd99::2]:5002", "wan", "[fd99::2]:5002");
    r.wait_hash_routed("the flow label", &mut c);
    r.run("ip -6 route del fd99::/64; ip -6 route add fd99::/64 via fd02::3 dev wan");
    r.wait_installed(&BOTH, &mut c);
    // In a nexthop object, whether the kernel shows what is in it or not.
    r.run(
        "ip nexthop add id 1 via fd02::2 dev wan; ip nexthop add id 2 via fd02::3 dev wan
         ip nexthop add id 10 group 1/2",
    );
    for shown in [1, 0] {
        r.run(&format!(
            "sysctl -qw net.ipv4.nexthop_compat_mode={shown}
             ip -6 route add fd99::/64 nhid 10 metric 1"
        ));
        r.wait_hash_routed("the flow label", &mut c);
        r.run("ip -6 route del fd99::/64 metric 1");
        r.wait_installed(&BOTH, &mut c);
    }
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
}

/// When a netdev goes, those that have not lost their next hop may have another too: the kernel shares flows out
/// anew, and says nothing.
#[test]
fn flows_that_are_shared_out_anew_take_their_new_next_hop() {
    let mut r = Router::new("shared");
    with_two_gateways(&r);
    let host = r.host("wan");
    r.run(&format!(
        "ip link add wan2 type veth peer name e2 netns {host}
         ip addr add 10.3.0.1/24 dev wan2; ip link set wan2 up
         ip -n {host} addr add 10.3.0.2/24 dev e2; ip -n {host} link set e2 up
         ip -n {host} route add local 10.98.0.0/24 dev lo
         sysctl -qw net.ipv4.fib_multipath_hash_policy=0
         ip route add 10.98.0.0/24 nexthop via 10.3.0.2 dev wan2 nexthop via 10.2.0.2 dev wan nexthop via 10.2.0.3 dev wan"
    ));
    let ways = |r: &Router| {
        let to = |n: u8| r.run(&format!("ip route get 10.98.0.{n} from 10.1.0.2 iif lan"));
        (1..40).map(to).collect::<Vec<_>>()
    };
    let before = ways(&r);
    r.run("ip link set wan2 down");
    let after = ways(&r);
    r.run("ip link set wan2 up");
    assert_eq!(ways(&r), before, "as it was");
    let moves = |(before, after): (&String, &String)| {
        before.contains("via 10.2.0.2") && after.contains("via 10.2.0.3")
    };
    let n =
        before.iter().zip(&after).position(moves).expect("one that moves from one to the other");
    r.start(&["--port", "lan", "--port", "wan"]);
    let stream = Stream::start(&r, "10.1.0.2", &format!("10.98.0.{}", n + 1), 100);
    stream.is_offloaded(&r, &BOTH);
    all_by_the_second(&r, &stream, false);
    for (state, second) in [("down", true), ("up", false)] {
        r.run(&format!("ip link set wan2 {state}"));
        std::thread::sleep(Duration::from_millis(2500));
        all_by_the_second(&r, &stream, second);
        stream.is_offloaded(&r, &BOTH);
        all_by_the_second(&r, &stream, second);
    }
}
