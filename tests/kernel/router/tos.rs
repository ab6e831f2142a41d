//! Routes and rules that tell packets apart by their ToS.

use netdev_providers::netlink::socket::{ACK, CREATE, REQUEST};
use netdev_providers::netlink::{Family, Message, Socket};

use super::*;
use crate::release::rules_know_flow_labels;

#[test]
fn a_connection_that_has_other_routes_by_tos_stays_in_software_as_long_as_it_has() {
    let mut r = Router::new("tos");
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    // A gateway for one ToS, and for one direction.
    let route = "10.2.0.2 tos 0x10 via 10.2.0.77 dev wan";
    r.run(&format!("ip route add {route}"));
    let (out, back) = (("lan", "original"), ("wan", "reply"));
    r.wait_refused(out, "tos-routed", "ToS 0x10", &mut c);
    r.wait_installed(&["wan reply"], &mut c);
    r.run(&format!("ip route del {route}"));
    r.wait_installed(&BOTH, &mut c);
    // A rule for all that has it.
    r.run("ip rule add tos 0x08 prohibit");
    r.wait_refused(out, "tos-routed", "ToS 0x08", &mut c);
    r.wait_refused(back, "tos-routed", "ToS 0x08", &mut c);
    // One that is there when the daemon starts; and one that answers the same.
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    r.run("ip rule add tos 0x04 table main");
    r.start(&PORTS);
    r.wait_refused(out, "tos-routed", "ToS 0x08", &mut c);
    r.run("ip rule del tos 0x08 prohibit");
    r.wait_installed(&BOTH, &mut c);
    // One that was known once is known.
    r.run(&format!("ip route add {route}"));
    r.wait_refused(out, "tos-routed", "ToS 0x10", &mut c);
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
}

/// Rules by the flow label, as `ip -6 rule ... flowlabel` of a newer iproute2 sends them.
#[test]
fn a_connection_that_has_other_routes_by_flow_label_stays_in_software_as_long_as_it_has() {
    // linux/rtnetlink.h, linux/fib_rules.h
    const RTM_NEWRULE: u16 = 32;
    const RTM_DELRULE: u16 = 33;
    const FRA_FLOWLABEL: u16 = 26;
    const FRA_FLOWLABEL_MASK: u16 = 27;
    const FR_ACT_PROHIBIT: u8 = 8;
    if !rules_know_flow_labels() {
        println!("no rule of this kernel (before 6.14) knows a flow label");
        return;
    }
    let mut r = Router::new("label");
    r.with_ipv6();
    let change = |ty, flags| {
        let mut socket = Socket::open(Family::Route).expect("a socket");
        let (mut buf, seq) = (Vec::new(), socket.next_seq());
        let mut m = Message::new(&mut buf, ty, REQUEST | ACK | flags, seq);
        let family = u8::try_from(libc::AF_INET6).expect("a family");
        m.raw(&[family, 0, 0, 0, 0, 0, 0, FR_ACT_PROHIBIT, 0, 0, 0, 0]);
        m.attr(FRA_FLOWLABEL, &0x12345u32.to_be_bytes());
        m.attr(FRA_FLOWLABEL_MASK, &0xfffffu32.to_be_bytes());
        m.finish();
        socket.request(&buf, seq, |_| {}).expect("the rule is changed");
    };
    r.start(&PORTS);
    let mut c = r.connect_through("[fd02::2]:5003", "wan", "[fd02::2]:5003");
    r.wait_installed(&BOTH, &mut c);
    change(RTM_NEWRULE, CREATE);
    let (out, back) = (("lan", "original"), ("wan", "reply"));
    r.wait_refused(out, "tos-routed", "flow label 0x12345", &mut c);
    r.wait_refused(back, "tos-routed", "flow label 0x12345", &mut c);
    change(RTM_DELRULE, 0);
    r.wait_installed(&BOTH, &mut c);
    // One that is there when the daemon starts.
    change(RTM_NEWRULE, CREATE);
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    r.start(&PORTS);
    r.wait_refused(out, "tos-routed", "flow label 0x12345", &mut c);
}
