//! Frames with VLAN tags.

use super::*;
use crate::wait::wait_until;
use netdev_providers::{Repaired, VlanId};

scenarios! { all:
    a_tag_is_taken_off_and_another_is_put_on,
    nat_of_tagged_frames_keeps_every_checksum_right,
    frames_of_another_vlan_are_not_taken,
}

const DOT1Q: u16 = 0x8100;
const DOT1AD: u16 = 0x88a8;

/// From the client to the server; tagged on arrival, on departure.
fn tagged(arrival: Tuple, departure: Tuple, vlan_in: Option<u16>, vlan_out: Option<u16>) -> Flow {
    let mut flow = flow(arrival, departure);
    flow.matches.vlan = vlan_in.and_then(VlanId::new);
    flow.forward.vlan = vlan_out.and_then(VlanId::new);
    flow
}

fn tags(ids: impl IntoIterator<Item = u16>) -> Vec<(u16, u16)> {
    ids.into_iter().map(|id| (DOT1Q, id)).collect()
}

#[test]
fn rules_with_tags_and_lengths_read_back_as_they_were_meant() {
    let net = Net::new();
    let port = net.bind("lan0");
    port.add(1, tagged(tuple(TCP4), tuple(TCP4), Some(10), Some(20)));
    port.add(2, tagged(tuple(UDP6), tuple(UDP6), Some(10), None));
    let mut shorter = tagged(tuple(UDP4), tuple(UDP4), None, Some(4094));
    shorter.forward.mtu = 1400;
    port.add(3, shorter);
    let text = net.filters("lan0");
    println!("{}\n{text}", port.provider.describe());
    for line in [
        "filter protocol 802.1Q pref 49416 bpf",
        "filter protocol 802.1Q pref 49417 bpf",
        "filter protocol 802.1Q pref 49418 flower chain 0 handle 0x1",
        "filter protocol 802.1Q pref 49419 flower chain 0 handle 0x1",
        "vlan_id 10",
        "vlan_ethtype ip\n",
        "vlan_ethtype ipv6",
        "vlan  pop pipe",
        "vlan  push id 20 protocol 802.1Q priority 0 pipe",
        "vlan  push id 4094 protocol 802.1Q priority 0 pipe",
        "mtu 1414b action pass/pipe",
    ] {
        assert!(text.contains(line), "no `{line}` in\n{text}");
    }
    // In the order in which they have to be done.
    let first = text.split("pref 49418 flower chain 0 handle 0x1").nth(1).unwrap();
    let at = |what: &str| first.find(what).unwrap_or_else(|| panic!("no {what} in {first}"));
    let order =
        [at("vlan  pop pipe"), at(" pedit "), at("header4"), at("vlan  push"), at("mirred")];
    assert!(order.is_sorted(), "{first}");
    assert_eq!(port.usage().len(), 3);
    assert_eq!(port.provider.flush().unwrap(), 3);
    port.provider.release().unwrap();
    assert_eq!(net.ns.run("tc qdisc show dev lan0").matches("ffff:").count(), 0);
}

#[test]
fn tc_shows_our_rules_with_tags_as_it_shows_those_that_are_written_with_it() {
    let net = Net::new();
    let port = net.bind("lan0");
    net.ns.run("tc qdisc add dev wan0 clsact");
    let macs = format!("pedit ex munge eth dst set {SERVER} munge eth src set {WAN}");
    let to = "no_percpu action mirred egress redirect dev wan0 no_percpu";
    for (ours, vlan_in, vlan_out, matches, actions) in [
        (
            TCP6,
            Some(10),
            Some(20),
            "pref 49419 protocol 802.1q flower skip_hw dst_mac {LAN} vlan_id 10 vlan_ethtype ipv6 ip_proto tcp \
             dst_ip fd02::2 src_ip fd01::2 dst_port 80 src_port 4000 tcp_flags 0x10/0x17 ip_flags nofrag",
            "action vlan pop pipe no_percpu action {macs} munge ip6 hoplimit add 0xff pipe no_percpu \
             action vlan push id 20 priority 0 pipe",
        ),
        (
            UDP6,
            None,
            Some(20),
            "pref 49413 protocol ipv6 flower skip_hw dst_mac {LAN} ip_proto udp dst_ip fd02::2 \
             src_ip fd01::2 dst_port 53 src_port 4000 ip_flags nofrag",
            "action {macs} munge ip6 hoplimit add 0xff pipe no_percpu \
             action vlan push id 20 priority 0 pipe",
        ),
        (
            TCP6,
            Some(10),
            None,
            "pref 49419 protocol 802.1q flower skip_hw dst_mac {LAN} vlan_id 10 vlan_ethtype ipv6 ip_proto tcp \
             dst_ip fd02::2 src_ip fd01::2 dst_port 80 src_port 4000 tcp_flags 0x10/0x17 ip_flags nofrag",
            "action vlan pop pipe no_percpu action {macs} munge ip6 hoplimit add 0xff pipe",
        ),
    ] {
        let rule = port.add(1, tagged(tuple(ours), tuple(ours), vlan_in, vlan_out));
        let (matches, actions) =
            (matches.replace("{LAN}", &LAN.to_string()), actions.replace("{macs}", &macs));
        net.ns.run(&format!("tc filter add dev wan0 ingress handle 1 {matches} {actions} {to}"));
        let pref = matches.split(' ').nth(1).unwrap();
        let show = |dev: &str| net.ns.run(&format!("tc filter show dev {dev} ingress pref {pref}"));
        assert_eq!(as_shown(&show("lan0")), as_shown(&show("wan0")));
        port.delete(1, rule).unwrap();
        net.ns.run("tc filter del dev wan0 ingress");
    }
}

fn a_tag_is_taken_off_and_another_is_put_on(backend: Backend) {
    let net = Net::of(backend);
    let port = net.bind("lan0");
    let cases = [(Some(10), None), (None, Some(20)), (Some(10), Some(20)), (Some(10), Some(10))];
    for (n, t) in [TCP4, UDP4, TCP6, UDP6].into_iter().map(tuple).enumerate() {
        for (m, (vlan_in, vlan_out)) in cases.into_iter().enumerate() {
            let epoch = (n * cases.len() + m) as u64;
            // A priority that the tag arrives with is not kept.
            let arriving = vlan_in.map(|id| (DOT1Q, id | 5 << 13)).into_iter().collect();
            let packet = Packet { tags: arriving, ..Packet::new(t) };
            assert_eq!(net.pass(packet.frame(false), false, t, 0).len(), 0, "{t}");
            let rule = port.add(epoch, tagged(t, t, vlan_in, vlan_out));
            let seen = net.pass(packet.frame(false), false, t, 1).pop().expect("a packet");
            assert_eq!((seen.dst, seen.src, seen.ttl), (SERVER, WAN, 63), "{t}");
            assert_eq!(seen.tags, tags(vlan_out), "{t} {vlan_in:?}");
            assert!(seen.ip_checksum_right && seen.l4_checksum_right, "{t} {seen:?}");
            assert_eq!(seen.payload, packet.payload);
            assert_eq!(port.packets(epoch), 1);
            assert_eq!(port.delete(epoch, rule), Ok(Done::Deleted));
        }
    }
}

fn nat_of_tagged_frames_keeps_every_checksum_right(backend: Backend) {
    let net = Net::of(backend);
    net.ns.run("ethtool -K wan0 tx off tso off gso off tx-udp-segmentation off txvlan off");
    net.server.sh("ethtool -K s0 rx off gro off");
    let port = net.bind("lan0");
    let pairs = [
        (TCP4, "tcp 10.0.2.1:5000 > 10.0.2.77:8080"),
        (UDP4, "udp 10.0.2.1:5000 > 10.0.2.77:5353"),
        (TCP6, "tcp [fd02::1]:5000 > [fd02::77]:8080"),
        (UDP6, "udp [fd02::1]:5000 > [fd02::77]:5353"),
    ];
    for (epoch, (arrival, departure)) in pairs.into_iter().enumerate() {
        let (epoch, from, to) = (epoch as u64, tuple(arrival), tuple(departure));
        let rule = port.add(epoch, tagged(from, to, Some(10), Some(20)));
        let check = |what: &str, seen: &[Seen], bytes: usize| {
            let payload: usize = seen.iter().map(|s| s.payload.len()).sum();
            assert_eq!(payload, bytes, "{what} {from} -> {to}");
            for s in seen {
                assert!(s.ip_checksum_right && s.l4_checksum_right, "{what} {from} -> {to}: {s:?}");
                assert_eq!((s.ttl, s.src, s.dst, &s.tags), (63, WAN, SERVER, &tags([20])));
            }
        };
        let packet = Packet { tags: tags([10]), ..Packet::new(from) };
        check("complete", &net.pass(packet.frame(false), false, to, 1), 101);
        check("partial", &net.pass(packet.unfinished(0), true, to, 1), 101);
        if from.proto() == L4Proto::Tcp {
            let long = Packet { payload: (0..4200).map(|i| i as u8).collect(), ..packet.clone() };
            check("GSO", &net.pass(long.unfinished(1400), true, to, 3), 4200);
        }
        assert_eq!(port.delete(epoch, rule), Ok(Done::Deleted));
    }
}

/// The tag of a frame is as much part of the match as its addresses.
fn frames_of_another_vlan_are_not_taken(backend: Backend) {
    let net = Net::of(backend);
    let port = net.bind("lan0");
    let all = [TCP4, UDP4, TCP6, UDP6].map(tuple);
    for (epoch, t) in all.into_iter().enumerate() {
        port.add(epoch as u64, tagged(t, t, Some(10), Some(20)));
    }
    let others = [
        ("no tag", vec![]),
        ("another VLAN", tags([11])),
        ("a priority without a VLAN", tags([5 << 13])),
        ("802.1ad", vec![(DOT1AD, 10)]),
        ("two tags", tags([10, 20])),
        ("the same tag twice", tags([10, 10])),
        ("a service tag in front", vec![(DOT1AD, 20), (DOT1Q, 10)]),
        ("a service tag behind", vec![(DOT1Q, 10), (DOT1AD, 20)]),
    ];
    for t in all {
        for (what, tags) in &others {
            let frame = Packet { tags: tags.clone(), ..Packet::new(t) }.frame(false);
            net.send(frame);
            let packets: u64 = port.usage().iter().map(|r| r.counters.packets).sum();
            assert_eq!(packets, 0, "{what}: {t} was taken\n{}", net.filters("lan0"));
        }
    }
    // And the other way round: rules for untagged frames take no tagged ones.
    port.provider.flush().unwrap();
    for (epoch, t) in all.into_iter().enumerate() {
        port.add(100 + epoch as u64, flow(t, t));
        let frame = Packet { tags: tags([10]), ..Packet::new(t) }.frame(false);
        net.send(frame);
        assert_eq!(port.packets(100 + epoch as u64), 0, "{t}");
    }
}

/// VLAN 0 is none: the stack takes such a tag off, behind the ingress hook.
#[test]
fn what_carries_a_priority_tag_goes_by_the_rules_for_untagged_frames() {
    let net = Net::new();
    let port = net.bind("lan0");
    let (packet, t) = (|t| Packet { tags: tags([5 << 13]), ..Packet::new(t) }, tuple(TCP4));
    for (epoch, t) in (1..).zip([TCP4, UDP4, TCP6, UDP6].map(tuple)) {
        port.add(epoch, flow(t, t));
        let seen = net.pass(packet(t).frame(false), false, t, 1).pop().expect("a packet");
        assert_eq!((seen.dst, seen.src, seen.ttl), (SERVER, WAN, 63), "{t}");
        assert_eq!(seen.tags, [], "{t}");
        assert!(seen.ip_checksum_right && seen.l4_checksum_right, "{t} {seen:?}");
        assert_eq!(port.packets(epoch), 1, "{t}");
    }
    // What is for others keeps its tag: a bridge would forward it with it.
    net.ns.run("tc filter add dev lan0 ingress prio 60000 protocol 802.1q flower vlan_id 0 vlan_prio 5 action drop");
    let behind = || {
        let text = net.ns.run("tc -s filter show dev lan0 ingress prio 60000");
        let mut words = text.split_whitespace().skip_while(|w| *w != "Sent");
        words.nth(3).and_then(|n| n.parse::<u32>().ok()).expect("a count")
    };
    let mut for_others = packet(t).frame(false);
    for_others[..6].copy_from_slice(&SERVER.0);
    net.client.call({
        let (mine, others) = (packet(t).frame(false), for_others);
        move || {
            Wire::open("c0", false).send(&others);
            Wire::open("c0", false).send(&mine);
        }
    });
    wait_until("both have arrived", || port.packets(1) == 2 && behind() == 1);
    // Frames of a VLAN device with this number are not ours to touch.
    net.ns.run("ip link add link lan0 name lan0.0 type vlan id 0 && ip link set lan0.0 up");
    assert_eq!(port.provider.repair(), Repaired::AsItWas);
    assert_eq!(net.pass(packet(t).frame(false), false, t, 0).len(), 0);
    wait_until("it keeps its tag", || behind() == 2);
    assert_eq!(port.packets(1), 2);
    net.ns.run("ip link del lan0.0");
    assert_eq!(port.provider.repair(), Repaired::AsItWas);
    assert_eq!(net.pass(packet(t).frame(false), false, t, 1).len(), 1);
    assert_eq!((port.packets(1), behind()), (3, 2));
    net.ns.run("tc filter del dev lan0 ingress prio 60000");
    port.provider.release().unwrap();
    assert_eq!(net.ns.run("tc qdisc show dev lan0").matches("ffff:").count(), 0);
}
