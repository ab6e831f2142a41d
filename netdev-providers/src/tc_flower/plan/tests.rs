use super::*;
use crate::contract::flow::Forward;
use crate::contract::types::{Ifindex, L4Proto, Tuple, VlanId};
use crate::tc_flower::capability::{Shape, trial_flow};

fn plan(found: Found) -> Plan {
    let instance = Instance(std::num::NonZeroU32::MIN);
    Plan::new(instance, (found, Capabilities::default()), 1, QdiscKind::Ingress)
}

fn flow(nat: bool) -> Flow {
    trial_flow(Ifindex::new(3).unwrap(), Shape::new(false, L4Proto::Tcp, nat))
}

/// One without NAT that needs no programs.
fn ipv6() -> Flow {
    trial_flow(Ifindex::new(3).unwrap(), Shape::new(true, L4Proto::Tcp, false))
}

/// Its path has a smaller MTU than the port.
fn shrinking(flow: Flow) -> Flow {
    Flow { ingress_mtu: 1500, forward: Forward { mtu: 1400, ..flow.forward }, ..flow }
}

fn arriving_tagged(mut flow: Flow) -> Flow {
    flow.matches.vlan = Some(VlanId::MIN);
    flow
}

fn leaving_tagged(mut flow: Flow) -> Flow {
    flow.forward.vlan = Some(VlanId::MIN);
    flow
}

const MODES: [Mode; 3] = [Mode::Software, Mode::Hardware, Mode::Both];

#[test]
fn what_the_netdev_takes_is_offered_and_what_it_lacks_is_refused_in_its_words() {
    let flows = [
        flow(false),
        flow(true),
        arriving_tagged(flow(false)),
        leaving_tagged(flow(false)),
        shrinking(flow(false)),
        shrinking(flow(true)),
    ];
    for mode in MODES {
        let plan = plan(Found::everything(mode));
        for flow in &flows {
            assert_eq!(plan.can_offload(flow), Ok(()), "{mode:?} {flow:?}");
        }
    }
    let refused = |found: Found| {
        let plan = plan(found);
        flows.map(|f| plan.can_offload(&f).err().map(|e| (e.reason, e.detail.unwrap().into())))
    };
    let none: Option<(Reason, String)> = None;
    fn no<T>() -> Result<T, String> {
        Err("no".to_owned())
    }
    let said = |reason| Some((reason, "no".to_owned()));

    let vlan = refused(Found::everything(Mode::Both).but(|f| f.vlan = no()));
    let unsupported = said(Reason::Unsupported);
    let wanted = [&none, &none, &unsupported, &unsupported, &none, &none];
    assert_eq!(vlan.each_ref(), wanted);

    let length = refused(Found::everything(Mode::Both).but(|f| f.length = no()));
    let words = "MTU 1500 on arrival, 1400 on departure, and no".to_owned();
    let mtu = Some((Reason::MtuMismatch, words));
    assert_eq!(length.each_ref(), [&none, &none, &none, &none, &mtu, &mtu]);

    // Programs are for rules in software; the NIC computes checksums itself.
    let checksum = said(Reason::NatChecksum);
    let software = refused(Found::everything(Mode::Software).but(|f| f.act_bpf = no()));
    let each = [&unsupported, &checksum, &unsupported, &unsupported, &unsupported, &checksum];
    assert_eq!(software.each_ref(), each);
    let both = refused(Found::everything(Mode::Both).but(|f| f.act_bpf = no()));
    assert_eq!(both.each_ref(), [&none, &none, &none, &none, &unsupported, &checksum]);
    let v6 = plan(Found::everything(Mode::Software).but(|f| f.act_bpf = no()));
    assert_eq!(v6.can_offload(&ipv6()), Ok(()), "it needs none");
}

#[test]
fn a_flow_that_leaves_by_what_is_no_netdev_is_refused() {
    let plan = plan(Found::everything(Mode::Both));
    let mut flow = flow(false);
    flow.forward.egress = Ifindex::local(3).unwrap();
    assert_eq!(plan.can_offload(&flow).unwrap_err().reason, Reason::EgressUnsupported);
}

#[test]
fn a_flow_that_changes_its_family_or_protocol_is_refused() {
    let plan = plan(Found::everything(Mode::Both));
    for other in ["tcp [::1]:1 > [::2]:2", "udp 10.0.0.1:1 > 10.0.0.2:2"] {
        let mut flow = flow(false);
        flow.forward.tuple = other.parse::<Tuple>().unwrap();
        assert_eq!(plan.can_offload(&flow).unwrap_err().reason, Reason::Unsupported, "{other}");
    }
}

#[test]
fn what_hardware_cannot_tell_apart_is_kept_in_software() {
    let is_for_software = |found: Found, flow| plan(found).is_for_software(&flow);
    let all = Found::everything;
    assert!(is_for_software(all(Mode::Software), flow(false)));
    for mode in [Mode::Hardware, Mode::Both] {
        assert!(!is_for_software(all(mode), flow(false)));
        assert!(is_for_software(all(mode), shrinking(flow(false))), "a length");
        assert!(!is_for_software(all(mode), arriving_tagged(flow(false))));
        let untagged = || all(mode).but(|f| f.tagged_in_hw = false);
        assert!(is_for_software(untagged(), arriving_tagged(flow(false))), "without a guard");
        assert!(!is_for_software(untagged(), leaving_tagged(flow(false))));
        assert!(!is_for_software(untagged(), flow(false)));
    }
}

/// `skip_hw`, `skip_sw`; neither of them, with the driver's words.
const FLAGS: [(Mode, u32); 3] = [(Mode::Software, 1), (Mode::Hardware, 2), (Mode::Both, 16)];

#[test]
fn a_rule_without_nat_is_where_the_port_has_its_rules_or_in_software() {
    for (mode, flags) in FLAGS {
        let plan = plan(Found::everything(mode));
        let form = plan.form(&ipv6(), false);
        assert_eq!((form.flags, form.nat.is_some(), form.header.is_some()), (flags, false, false));
        assert_eq!(form.percpu_stats, mode != Mode::Hardware, "what never runs counts nothing");
        assert_eq!(plan.form(&ipv6(), true).flags, 1);
    }
}

#[test]
fn a_rule_with_programs_is_in_hardware_or_in_software_and_never_in_both() {
    for (mode, _) in FLAGS {
        let plan = plan(Found::everything(mode));
        for (software, flags) in [(false, 2), (true, 1)] {
            let form = plan.form(&flow(false), software);
            let has = (form.flags, form.nat.is_some(), form.header.is_some());
            assert_eq!(has, (flags, false, software));
        }
        let form = plan.form(&flow(true), false);
        assert_eq!(form.flags, 2);
        assert!(matches!(form.nat, Some(NatForm::Hardware)));
        let form = plan.form(&flow(true), true);
        assert_eq!(form.flags, 1);
        let Some(NatForm::Software { before, after }) = form.nat else { panic!("{form:?}") };
        assert_eq!(before.name_with_nul(), b"nat4_tcp_before\0");
        assert_eq!(after.name_with_nul(), b"nat4_tcp_after\0");
        assert_eq!(form.header.unwrap().name_with_nul(), b"header4\0");
    }
    let without = plan(Found::everything(Mode::Both).but(|f| f.act_bpf = Err("no".to_owned())));
    let form = without.form(&flow(true), true);
    assert!(matches!(form.nat, Some(NatForm::Hardware)), "nothing else is there");
}

#[test]
fn where_a_rule_is_that_was_taken_is_known_but_where_the_nic_has_a_choice() {
    let in_hw = |mode, flow: Flow, software| plan(Found::everything(mode)).in_hw(&flow, software);
    for of in [flow(false), flow(true), ipv6()] {
        for software in [false, true] {
            assert_eq!(in_hw(Mode::Software, of, software), Some(false));
            assert_eq!(in_hw(Mode::Hardware, of, software), Some(true));
        }
        assert_eq!(in_hw(Mode::Both, of, true), Some(false));
    }
    for of in [flow(false), flow(true)] {
        assert_eq!(in_hw(Mode::Both, of, false), Some(true), "it is for hardware only");
    }
    assert_eq!(in_hw(Mode::Both, ipv6(), false), None);
}

#[test]
fn the_last_words_of_the_nic_are_kept() {
    let plan = plan(Found::everything(Mode::Both));
    assert_eq!(*lock(&plan.nic_said), None);
    for words in ["table full", "table full", "no such key"] {
        plan.nic_refused(words);
        assert_eq!(lock(&plan.nic_said).as_deref(), Some(words));
    }
}

#[test]
fn what_has_to_leave_by_the_stack_is_in_software_or_refused() {
    let decides = |nat| {
        let flow = flow(nat);
        Flow { forward: Forward { egress_decides: true, ..flow.forward }, ..flow }
    };
    let both = plan(Found::everything(Mode::Both));
    for nat in [false, true] {
        assert!(both.is_for_software(&decides(nat)) && !both.is_for_software(&flow(nat)));
        assert_eq!(both.can_offload(&decides(nat)), Ok(()));
    }
    assert_eq!(plan(Found::everything(Mode::Software)).can_offload(&decides(false)), Ok(()));
    let hardware = plan(Found::everything(Mode::Hardware));
    assert_eq!(hardware.can_offload(&flow(false)), Ok(()));
    let refused = hardware.can_offload(&decides(false)).unwrap_err();
    assert_eq!(refused.reason, Reason::OthersAtEgress);
}

#[test]
fn while_others_are_in_front_whom_the_nic_has_not_rules_are_in_software_or_refused() {
    let front = |in_nic| InFront { what: "matchall at prio 1 (all)".into(), in_nic };
    assert!(!Around::would_overtake(&[]) && !Around::would_overtake(&[front(true)]));
    assert!(Around::would_overtake(&[front(true), front(false)]));
    let both = plan(Found::everything(Mode::Both));
    assert!(!both.is_for_software(&flow(false)));
    both.around.set_overtaken(true);
    for flow in [flow(false), flow(true)] {
        assert!(both.is_for_software(&flow));
        assert_eq!(both.can_offload(&flow), Ok(()));
        assert_eq!(both.form(&flow, true).flags, TCA_CLS_FLAGS_SKIP_HW);
    }
    let hardware = plan(Found::everything(Mode::Hardware));
    assert_eq!(hardware.can_offload(&flow(false)), Ok(()));
    hardware.around.set_overtaken(true);
    let refused = hardware.can_offload(&flow(false)).unwrap_err();
    assert_eq!(refused.reason, Reason::OthersInFront);
    hardware.around.set_overtaken(false);
    assert_eq!(hardware.can_offload(&flow(false)), Ok(()));
}
