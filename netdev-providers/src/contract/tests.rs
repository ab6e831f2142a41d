//! What is shown to people, what numbers stand for, and what a backend need not write.

use std::num::NonZeroU32;
use std::sync::{Arc, mpsc};

use nix::errno::Errno;

use super::class::{BindError, ProviderClass};
use super::flow::{Above, Flow, FlowMatch, Forward, Tracked};
use super::operation::{Done, Operation, Outcome, Request, Ticket};
use super::provider::{Fault, Observed, Provider, RuleReport};
use super::reason::{Reason, Rejection};
use super::types::{
    Cookie, Direction, Epoch, Generation, HwFlags, Ifindex, Instance, L4Proto, MacAddr, Netdev,
    RuleId, Tuple, VlanId, Zone,
};

fn ifindex(n: u32) -> Ifindex {
    Ifindex::new(n).unwrap()
}

fn cookie() -> Cookie {
    let instance = Instance(NonZeroU32::new(0x0102_0304).unwrap());
    Cookie { instance, epoch: Epoch(0x0a0b), direction: Direction::Reply }
}

fn tuple() -> Tuple {
    "tcp 192.0.2.1:4242 > 198.51.100.2:80".parse().unwrap()
}

fn flow() -> Flow {
    Flow {
        zone: Zone(0),
        direction: Direction::Original,
        ingress_mtu: 1500,
        matches: FlowMatch { eth_dst: None, vlan: None, tuple: tuple() },
        forward: Forward {
            egress: ifindex(2),
            vlan: None,
            mtu: 1500,
            tuple: tuple(),
            macs: None,
            egress_decides: false,
        },
        above: Above::default(),
    }
}

fn tracked() -> Tracked {
    let Flow { zone, direction, matches, .. } = flow();
    Tracked { zone, direction, matches, tuple: tuple() }
}

/// One that writes only what every backend must.
struct Least;

impl Provider for Least {
    fn can_offload(&self, _: &Flow) -> Result<(), Rejection> {
        Ok(())
    }
    fn submit(&self, _: Vec<Operation>) {}
    fn usage(&self, _: &mut dyn FnMut(RuleReport)) -> Result<(), Fault> {
        Ok(())
    }
    fn flush(&self) -> Result<u64, Fault> {
        Ok(0)
    }
    fn release(&self) -> Result<(), Fault> {
        Ok(())
    }
}

impl ProviderClass for Least {
    fn name(&self) -> &'static str {
        "least"
    }
    fn bind(&self, _: &Netdev, _: Instance) -> Result<Arc<dyn Provider>, BindError> {
        Ok(Arc::new(Self))
    }
}

#[test]
fn a_backend_that_keeps_nothing_beyond_its_process_has_nothing_to_observe_or_to_tell() {
    assert_eq!(Least.init(), Ok(()));
    assert_eq!(
        (Least.clear_leftovers(ifindex(1)), Least.has_leftovers(ifindex(1))),
        (Ok(0), false)
    );
    let netdev = Netdev {
        ifindex: ifindex(1),
        generation: Generation::new(1).unwrap(),
        name: "eth0".to_owned(),
        hw_flags: HwFlags::Both,
    };
    let hardware = Least.bind_in_hardware(&netdev, cookie().instance);
    assert!(matches!(hardware, Err(BindError::Declined(why)) if why.contains("hardware")));
    assert_eq!(Least.observe(), Ok(Observed::default()));
    assert!(Least.capabilities().is_empty());
    assert_eq!(Least.describe(), "");
    let refused = Least.can_track(&tracked()).unwrap_err();
    assert_eq!((refused.reason, refused.detail.is_some()), (Reason::Unsupported, true));
}

#[test]
fn identifiers_are_shown_as_the_kernel_and_its_tools_show_them() {
    assert_eq!(ifindex(7).to_string(), "7");
    assert_eq!(Generation::new(9).unwrap().to_string(), "9");
    assert_eq!(MacAddr([0x02, 0, 0xab, 1, 0x10, 0xff]).to_string(), "02:00:ab:01:10:ff");
    assert_eq!(VlanId::new(100).unwrap().to_string(), "100");
    assert_eq!(Zone(5).to_string(), "5");
    assert_eq!(Epoch(12).to_string(), "12");
    assert_eq!(Direction::BOTH.map(|d| d.to_string()), ["original", "reply"]);
    assert_eq!([L4Proto::Tcp, L4Proto::Udp].map(|p| p.to_string()), ["tcp", "udp"]);
    let flags = [HwFlags::Both, HwFlags::SkipSw, HwFlags::SkipHw];
    assert_eq!(flags.map(|f| f.to_string()), ["both", "skip_sw", "skip_hw"]);
    assert_eq!(tuple().to_string(), "tcp 192.0.2.1:4242 > 198.51.100.2:80");
    assert_eq!(cookie().to_string(), "c70f0101010203040000000000000a0b");
    let netdev = Netdev {
        ifindex: ifindex(3),
        generation: Generation::new(4).unwrap(),
        name: "eth0".to_owned(),
        hw_flags: HwFlags::Both,
    };
    assert_eq!(netdev.to_string(), "eth0 (ifindex 3, generation 4)");
    let dpdk = Netdev { ifindex: Ifindex::local(3).unwrap(), name: "dpdk0".to_owned(), ..netdev };
    assert_eq!(dpdk.to_string(), "dpdk0 (local 3, generation 4)");
}

#[test]
fn numbers_are_those_of_the_wire() {
    assert_eq!(ifindex(7).get(), 7);
    assert_eq!(Generation::new(9).unwrap().get(), 9);
    assert_eq!(Generation::new(0), None);
    assert_eq!(Direction::BOTH.map(Direction::index), [0, 1]);
    assert_eq!(Direction::BOTH.map(Direction::opposite), [Direction::Reply, Direction::Original]);
    assert_eq!([L4Proto::Tcp, L4Proto::Udp].map(L4Proto::number), [6, 17]);
    assert_eq!(
        [1, 6, 17, 58].map(L4Proto::from_number),
        [None, Some(L4Proto::Tcp), Some(L4Proto::Udp), None]
    );
    assert!(MacAddr([0xff; 6]).is_multicast() && MacAddr([1, 0, 0x5e, 0, 0, 1]).is_multicast());
    assert!(!MacAddr([2, 0, 0, 0, 0, 1]).is_multicast() && !MacAddr::default().is_multicast());
}

#[test]
fn a_tuple_tells_its_parts_and_inverted_its_answers() {
    let (src, dst) = ("2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap());
    let t = Tuple::new(L4Proto::Udp, src, 5060, dst, 53).unwrap();
    assert_eq!((t.proto(), t.src(), t.sport()), (L4Proto::Udp, src, 5060));
    assert_eq!((t.dst(), t.dport(), t.is_ipv6()), (dst, 53, true));
    assert!(!tuple().is_ipv6());
    assert_eq!(t.inverted(), Tuple::new(L4Proto::Udp, dst, 53, src, 5060).unwrap());
}

#[test]
fn a_tuple_may_be_written_with_commas_or_blanks_and_nothing_may_follow() {
    for text in ["tcp,192.0.2.1:4242,198.51.100.2:80", " tcp  192.0.2.1:4242 198.51.100.2:80 "] {
        assert_eq!(text.parse(), Ok(tuple()), "{text}");
    }
    let none = ["", "tcp", "tcp 192.0.2.1:1", "sctp 192.0.2.1:1 192.0.2.2:2", "tcp a b"];
    for text in none.into_iter().chain(["tcp 192.0.2.1:1 192.0.2.2:2 192.0.2.3:3"]) {
        assert!(text.parse::<Tuple>().is_err(), "{text}");
    }
}

#[test]
fn a_cookie_of_a_direction_that_there_is_not_is_none() {
    let mut bytes = cookie().to_bytes();
    assert_eq!(Cookie::from_bytes(&bytes), Some(cookie()));
    bytes[3] = 2;
    assert_eq!(Cookie::from_bytes(&bytes), None);
}

#[test]
fn what_changes_between_arrival_and_departure_is_what_a_flow_needs() {
    let plain = flow();
    assert!(!plain.has_nat() && !plain.has_vlan() && !plain.may_exceed_mtu());
    let mut nat = flow();
    nat.forward.tuple = "tcp 203.0.113.1:4242 > 198.51.100.2:80".parse().unwrap();
    assert!(nat.has_nat());
    let (mut from, mut to) = (flow(), flow());
    from.matches.vlan = Some(VlanId::MIN);
    to.forward.vlan = Some(VlanId::MIN);
    assert!(from.has_vlan() && to.has_vlan());
    let (mut narrow, mut wide) = (flow(), flow());
    narrow.forward.mtu = 1499;
    wide.forward.mtu = 1501;
    assert!(narrow.may_exceed_mtu() && !wide.may_exceed_mtu());
}

#[test]
fn a_backend_of_the_kernels_redirects_to_netdevs_only() {
    let (local, netdev) = (Ifindex::local(2).unwrap(), Some(ifindex(5)));
    let check = |egress, iif, oif| {
        let mut flow = flow();
        (flow.forward.egress, flow.above) = (egress, Above { iif, oif });
        flow.check_netdevs().map_err(|r| r.reason)
    };
    assert_eq!(check(ifindex(2), None, None), Ok(()));
    assert_eq!(check(ifindex(2), netdev, netdev), Ok(()));
    assert_eq!(check(local, netdev, netdev), Err(Reason::EgressUnsupported));
    assert_eq!(check(ifindex(2), None, Some(local)), Err(Reason::EgressUnsupported));
    assert_eq!(check(ifindex(2), Some(local), None), Err(Reason::IngressUnsupported));
}

#[test]
fn every_request_names_the_cookie_of_its_rule() {
    let (cookie, rule) = (cookie(), RuleId(1));
    let requests = [
        Request::Add { cookie, flow: Box::new(flow()) },
        Request::Track { cookie, tracked: Box::new(tracked()) },
        Request::Adopt { found: rule, cookie, flow: Box::new(flow()) },
        Request::Delete { rule, cookie },
        Request::Established { rule, cookie },
    ];
    assert!(requests.iter().all(|r| r.cookie() == cookie));
}

#[test]
fn the_result_of_an_operation_is_what_it_was_completed_with() {
    let (tx, rx) = mpsc::channel();
    let ticket = Ticket::new(Box::new(move |o: Outcome| tx.send(o).unwrap()));
    let request = Request::Delete { rule: RuleId(1), cookie: cookie() };
    let operation = Operation { request, ticket };
    assert!(format!("{operation:?}").contains("Ticket"));
    operation.complete(Ok(Done::added(RuleId(5), Some(true))));
    let done = Done::Added { rule: RuleId(5), in_hw: Some(true), nic_said: None };
    assert_eq!(rx.recv().unwrap(), Ok(done));
}

#[test]
fn a_refusal_is_told_with_its_words_and_the_kernels_error() {
    let bare = Rejection::from(Reason::TableFull);
    assert_eq!(bare, Rejection::new(Reason::TableFull));
    assert_eq!(bare.to_string(), "table-full");
    let mut why = Rejection::with_detail(Reason::Refused, "no such action");
    assert_eq!(why.to_string(), "refused: no such action");
    why.errno = Some(Errno::EINVAL);
    assert_eq!(why.to_string(), "refused: no such action (EINVAL)");
}

#[test]
fn a_fault_is_told_with_the_kernels_words_and_error_and_tells_whether_the_netdev_is_gone() {
    let mut fault = Fault::new("adding the clsact qdisc");
    assert_eq!(fault.to_string(), "adding the clsact qdisc");
    assert!(!fault.is_netdev_gone());
    fault.errno = Some(Errno::EEXIST);
    assert!(!fault.is_netdev_gone());
    fault.errno = Some(Errno::ENODEV);
    fault.detail = Some("Cannot find device".to_owned());
    assert!(fault.is_netdev_gone());
    assert_eq!(
        fault.to_string(),
        "adding the clsact qdisc: Cannot find device: No such device (ENODEV)"
    );
    assert_eq!(BindError::from(fault.clone()).to_string(), fault.to_string());
}
