//! The rules that every contestant writes: one shape, routed IPv4 UDP without NAT, one source address
//! each.

use std::net::{IpAddr, Ipv4Addr};

use netdev_providers::{
    Above, Cookie, Direction, Epoch, Flow, FlowMatch, Forward, Ifindex, Instance, L4Proto, MacAddr,
    MacRewrite, Tuple, Zone,
};

/// The netdev's own address, and what rules write over the packet's.
const ROUTER: MacAddr = MacAddr([2, 0, 0, 0, 1, 1]);
const EGRESS: MacAddr = MacAddr([2, 0, 0, 0, 2, 1]);
const NEXT_HOP: MacAddr = MacAddr([2, 0, 0, 0, 2, 2]);
const SERVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 80);
pub(crate) const SPORT: u16 = 0xbeef;

/// The source address of the rule with this number, below 2^24.
pub(crate) fn source(n: u32) -> Ipv4Addr {
    let [_, a, b, c] = n.to_be_bytes();
    Ipv4Addr::new(10, a, b, c)
}

pub(crate) fn flow(n: u32, egress: Ifindex) -> Flow {
    let tuple =
        Tuple::new(L4Proto::Udp, IpAddr::V4(source(n)), SPORT, IpAddr::V4(SERVER), 443).unwrap();
    let macs = Some(MacRewrite { src: EGRESS, dst: NEXT_HOP });
    Flow {
        zone: Zone(0),
        direction: Direction::Original,
        ingress_mtu: 1500,
        matches: FlowMatch { eth_dst: Some(ROUTER), vlan: None, tuple },
        forward: Forward { egress, vlan: None, mtu: 1500, tuple, macs, egress_decides: false },
        above: Above::default(),
    }
}

pub(crate) fn cookie(n: u32, instance: Instance) -> Cookie {
    Cookie { instance, epoch: Epoch(u64::from(n) + 1), direction: Direction::Original }
}

/// The same rule as a line for `tc -batch`. `verb` is `add` or `del`.
pub(crate) fn tc_line(verb: &str, netdev: &str, prio: u16, n: u32, egress: &str) -> String {
    let handle = n + 1;
    let place = format!(
        "filter {verb} dev {netdev} ingress protocol ip prio {prio} handle {handle:#x} flower"
    );
    if verb == "del" {
        return place;
    }
    format!(
        "{place} skip_hw dst_mac {ROUTER} ip_proto udp src_ip {} dst_ip {SERVER} src_port {SPORT} \
         dst_port 443 ip_flags nofrag \
         action pedit ex munge eth dst set {NEXT_HOP} munge eth src set {EGRESS} munge ip ttl add 0xff pipe \
         action csum ip4h pipe \
         action mirred egress redirect dev {egress} cookie {:032x}",
        source(n),
        n + 1
    )
}
