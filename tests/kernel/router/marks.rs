//! Routes by the mark of packets: the one that they have when they are routed, and no other.

use super::world::Stream;
use super::*;

/// Two gateways behind `wan`, and a server behind both; the table of mark 1 leads by the second.
pub(super) fn with_two_gateways(r: &Router) {
    r.track();
    let host = r.host("wan");
    r.run(&format!(
        "ip -n {host} addr add 10.99.0.2/32 dev lo
         ip netns exec {host} sysctl -qw net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.rp_filter=0
         ip -n {host} link add e1 link e0 type macvlan mode bridge
         ip -n {host} addr add 10.2.0.3/24 dev e1
         ip -n {host} link set e1 up
         ip route add 10.99.0.2 via 10.2.0.2 dev wan
         ip route add 10.99.0.2 via 10.2.0.3 dev wan table 100
         nft add table ip m
         nft add chain ip m early '{{ type filter hook prerouting priority -150; }}'
         nft add chain ip m late '{{ type filter hook forward priority -150; }}'"
    ));
}

/// Datagrams that the second gateway has received.
fn by_the_second(r: &Router) -> u64 {
    let host = r.host("wan");
    r.run(&format!("ip netns exec {host} cat /sys/class/net/e1/statistics/rx_packets"))
        .trim()
        .parse()
        .expect("a number")
}

/// Of the datagrams of the next two seconds, or of more where a busy machine sends few, those that the second gateway
/// has received, and all that arrived.
fn share(r: &Router, stream: &Stream) -> (u64, u64) {
    let (before, at) = (by_the_second(r), Instant::now());
    std::thread::sleep(Duration::from_secs(2));
    wait_until("datagrams arrive", || stream.arrivals_since(at).len() > 50);
    let all = stream.arrivals_since(at).len() as u64;
    (by_the_second(r) - before, all)
}

/// The share is all, or none, as it was before anything was offloaded.
pub(super) fn all_by_the_second(r: &Router, stream: &Stream, wanted: bool) {
    let (second, all) = share(r, stream);
    println!("{second} of {all} datagrams by the second gateway; wanted: {wanted}");
    if wanted {
        assert!(second + 5 >= all, "{second} of {all}");
    } else {
        assert!(second <= 5, "{second} of {all}");
    }
}

#[test]
fn a_mark_of_prerouting_is_followed_when_its_table_fails_over() {
    let mut r = Router::new("marked");
    with_two_gateways(&r);
    // One direction has the mark, the other has none.
    r.run("nft add rule ip m early iifname lan meta mark set 1; ip rule add fwmark 1 table 100");
    let stream = Stream::start(&r, "10.1.0.2", "10.99.0.2", 100);
    // Control: what the router does.
    wait_until("datagrams arrive", || stream.arrivals_since(Instant::now() - SECOND).len() > 10);
    all_by_the_second(&r, &stream, true);
    r.start(&PORTS);
    stream.is_offloaded(&r, &BOTH);
    all_by_the_second(&r, &stream, true);
    let before = r.stats()["sights"].as_u64();
    for (gateway, second) in [("10.2.0.2", false), ("10.2.0.3", true)] {
        // To where the table without a mark leads: an answer to the wrong question is the same as before.
        r.run(&format!("ip route replace 10.99.0.2 via {gateway} dev wan table 100"));
        std::thread::sleep(SECOND);
        all_by_the_second(&r, &stream, second);
        stream.is_offloaded(&r, &BOTH);
        all_by_the_second(&r, &stream, second);
    }
    assert!(r.stats()["sights"].as_u64() > before);
    // The rule itself goes, and comes.
    for (rule, second) in [("del", false), ("add", true)] {
        r.run(&format!("ip rule {rule} fwmark 1 table 100"));
        std::thread::sleep(SECOND);
        all_by_the_second(&r, &stream, second);
        stream.is_offloaded(&r, &BOTH);
        all_by_the_second(&r, &stream, second);
    }
}

#[test]
fn a_mark_that_is_set_after_the_routing_decision_decides_no_route() {
    let mut r = Router::new("remarked");
    with_two_gateways(&r);
    r.run("nft add rule ip m late iifname lan meta mark set 1; ip rule add fwmark 1 table 100");
    let stream = Stream::start(&r, "10.1.0.2", "10.99.0.2", 100);
    // Control: what the router does.
    wait_until("datagrams arrive", || stream.arrivals_since(Instant::now() - SECOND).len() > 10);
    all_by_the_second(&r, &stream, false);
    r.start(&PORTS);
    let refused = |r: &Router| r.refusal("lan", "original");
    let is_refused = |r: &Router| {
        let refusal = refused(r);
        refusal.is_some_and(|(reason, why)| {
            reason == "mark-routed" && why.contains("chain late of table m")
        })
    };
    wait_until("it is refused", || is_refused(&r));
    all_by_the_second(&r, &stream, false);
    assert_eq!(r.installed(), ["wan reply"], "back there is one way with every mark");
    // Where all marks lead the same way, it does not matter.
    r.run("ip route replace 10.99.0.2 via 10.2.0.2 dev wan table 100");
    stream.is_offloaded(&r, &BOTH);
    r.run("ip route replace 10.99.0.2 via 10.2.0.3 dev wan table 100");
    wait_until("it is refused again", || is_refused(&r));
    all_by_the_second(&r, &stream, false);
    // Nor where nothing sets marks so late.
    r.run("nft flush chain ip m late");
    stream.is_offloaded(&r, &BOTH);
    all_by_the_second(&r, &stream, false);
    r.run("nft add rule ip m late iifname lan meta mark set 1");
    wait_until("it is refused again", || is_refused(&r));
    all_by_the_second(&r, &stream, false);
}

/// A mark that fits two rules, of which each alone changes nothing, and that nobody sees any more at the end.
#[test]
fn marks_that_only_together_decide_a_route_are_asked_for_together() {
    let mut r = Router::new("masked");
    with_two_gateways(&r);
    r.run(
        "ip rule add pref 10 fwmark 1/1 goto 12
         ip rule add pref 11 table main
         ip rule add pref 12 fwmark 2/2 table 100
         nft add rule ip m early iifname lan meta mark set 3
         nft add rule ip m late iifname lan meta mark set 0",
    );
    let stream = Stream::start(&r, "10.1.0.2", "10.99.0.2", 100);
    // Control: what the router does.
    wait_until("datagrams arrive", || stream.arrivals_since(Instant::now() - SECOND).len() > 10);
    all_by_the_second(&r, &stream, true);
    r.start(&PORTS);
    wait_until("it is refused", || {
        r.refusal("lan", "original")
            .is_some_and(|(reason, why)| reason == "mark-routed" && why.contains("mark 0x3 "))
    });
    all_by_the_second(&r, &stream, true);
    // More bits than there are look-ups for.
    r.run(
        "for bit in 4 8 16 32 64 128 256; do ip rule add pref 20 fwmark $bit/$bit table main; done",
    );
    wait_until("it is refused for that", || {
        r.refusal("lan", "original")
            .is_some_and(|(reason, why)| reason == "mark-routed" && why.contains("more of them"))
    });
    all_by_the_second(&r, &stream, true);
}

/// What a rule was made by a daemon that is dead, is not known: where it matters, the next packet tells.
#[test]
fn adopted_rules_are_those_that_every_mark_would_have() {
    let mut r = Router::new("adopted-mark");
    with_two_gateways(&r);
    r.run("nft add rule ip m early iifname lan meta mark set 1; ip rule add fwmark 1 table 100");
    let stream = Stream::start(&r, "10.1.0.2", "10.99.0.2", 100);
    r.start(&PORTS);
    stream.is_offloaded(&r, &BOTH);
    r.signal(Signal::SIGKILL);
    r.start(&PORTS);
    stream.is_offloaded(&r, &BOTH);
    all_by_the_second(&r, &stream, true);
}

const SECOND: Duration = Duration::from_secs(1);
