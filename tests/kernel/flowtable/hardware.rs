//! The same with the `offload` flag, on the simulated NIC (`tests/simnic`): these tests need the
//! machine of `scripts/lab --nic`.

use super::*;

/// A router whose netdevs are ports of the NIC.
struct Nic {
    net: Net,
    /// Of `lan0` and `wan0`, in debugfs.
    knobs: [String; 2],
}

impl Nic {
    fn new() -> Self {
        assert!(std::env::var_os("CTOFFLOAD_SIMNIC").is_some(), "this needs scripts/lab --nic");
        let net = Net::with("simnic");
        let knobs = ["lan0", "wan0"].map(|dev| {
            let shown = net.ns.run(&format!("ip -d -j link show {dev}"));
            let link: serde_json::Value = serde_json::from_str(&shown).unwrap();
            let name = link[0]["phys_port_name"].as_str().expect("a phys_port_name");
            format!("/sys/kernel/debug/simnic/{name}")
        });
        Self { net, knobs }
    }

    fn set(&self, knob: &str, value: &str) {
        for dir in &self.knobs {
            std::fs::write(format!("{dir}/{knob}"), value).unwrap();
        }
    }

    /// Whether conntrack says that hardware has the connection.
    fn is_in_hardware(&self, c: &Connection) -> bool {
        self.net.entry(c).contains("[HW_OFFLOAD]")
    }

    fn wait_in_hardware(&self, c: &mut Connection) {
        wait_until("hardware has it", || {
            c.talk(1);
            self.is_in_hardware(c)
        });
    }

    fn has_offload_flag(&self) -> bool {
        self.net.ns.run("nft list flowtables").contains("flags offload")
    }

    /// Packets that the host has received on both ports.
    fn received(&self) -> u64 {
        let received = |dev: &str| {
            let shown = self.net.ns.run(&format!("ip -s -j link show {dev}"));
            let link: serde_json::Value = serde_json::from_str(&shown).unwrap();
            link[0]["stats64"]["rx"]["packets"].as_u64().expect("a number")
        };
        received("lan0") + received("wan0")
    }

    /// Both ports, and a connection that both have seen.
    fn offload(
        &self,
        class: &NfFlowtableClass,
        proto: L4Proto,
        to: &str,
    ) -> ([Port; 2], Connection) {
        let ports = [self.net.bind(class, "lan0"), self.net.bind(class, "wan0")];
        let mut c = self.net.connect(proto, to);
        c.talk(5);
        ports[0].add(1, self.net.flow(&c, ORIGINAL));
        ports[1].add(1, self.net.flow(&c, REPLY));
        (ports, c)
    }
}

fn release(ports: &[Port; 2]) {
    for port in ports {
        port.provider.release().unwrap();
    }
}

#[test]
fn nic_flowtable_packets_in_hardware_do_not_reach_the_host_and_are_counted() {
    let nic = Nic::new();
    for (proto, to) in PROTOCOLS {
        let class = nic.net.class();
        let (ports, mut c) = nic.offload(&class, proto, to);
        assert!(ports[0].provider.describe().contains("in hardware"));
        assert!(nic.has_offload_flag());
        nic.wait_in_hardware(&mut c);
        // Neighbours are still being probed now and then.
        let before = nic.received();
        c.talk(100);
        let received = nic.received() - before;
        assert!(received < 20, "{proto} {to}: {received} of 200 packets reached the host");
        wait_until("the sweep sees it", || {
            thread::sleep(Duration::from_secs(1));
            let [there, back] = ports.each_ref().map(|p| p.usage()[0]);
            (there.in_hw, back.in_hw) == (Some(true), Some(true))
                && there.counters.packets >= 100
                && back.counters.packets >= 100
        });
        assert!(nic.is_in_hardware(&c));
        release(&ports);
        wait_until("nothing is left", || !nic.is_in_hardware(&c) && !nic.net.is_offloaded(&c));
        c.talk(5);
        assert!(!nic.net.ns.run("nft list tables").contains("ctoffload"));
    }
}

#[test]
fn nic_flowtable_a_full_table_leaves_the_connection_in_software() {
    let nic = Nic::new();
    nic.set("capacity", "1");
    let class = nic.net.class();
    let ports = [nic.net.bind(&class, "lan0"), nic.net.bind(&class, "wan0")];
    let mut first = nic.net.connect(L4Proto::Tcp, "10.0.2.2");
    first.talk(5);
    ports[0].add(1, nic.net.flow(&first, ORIGINAL));
    ports[1].add(1, nic.net.flow(&first, REPLY));
    nic.wait_in_hardware(&mut first);
    let mut second = nic.net.connect(L4Proto::Udp, "10.0.2.2");
    second.talk(5);
    ports[0].add(2, nic.net.flow(&second, ORIGINAL));
    ports[1].add(2, nic.net.flow(&second, REPLY));
    wait_until("it is offloaded", || {
        second.talk(1);
        nic.net.is_offloaded(&second)
    });
    nic.net.wait_passing_by(&mut second);
    assert!(!nic.is_in_hardware(&second));
    thread::sleep(Duration::from_secs(1));
    let reports = ports[0].usage();
    let in_hw = |epoch| reports.iter().find(|r| r.cookie.epoch == Epoch(epoch)).unwrap().in_hw;
    assert_eq!((in_hw(1), in_hw(2)), (Some(true), Some(false)));
    first.talk(5);
    release(&ports);
}

/// The driver is asked again with every refresh, and has what it lost in its book: the kernel goes on
/// in software, and says `IPS_HW_OFFLOAD` still. Selecting the connection anew brings it back.
#[test]
fn nic_flowtable_a_reset_of_the_nic_loses_no_packet_and_a_flush_brings_hardware_back() {
    let nic = Nic::new();
    let class = nic.net.class();
    let (ports, mut c) = nic.offload(&class, L4Proto::Tcp, "10.0.2.2");
    nic.wait_in_hardware(&mut c);
    nic.set("reset", "1");
    c.talk(50);
    wait_until("hardware has lost it, and software has it", || {
        let before = nic.received();
        nic.net.forwarded_of(&mut c, 20) == (0, 0) && nic.received() - before >= 40
    });
    for port in &ports {
        assert_eq!(port.provider.flush().unwrap(), 1);
    }
    ports[0].add(2, nic.net.flow(&c, ORIGINAL));
    ports[1].add(2, nic.net.flow(&c, REPLY));
    wait_until("hardware has it again", || {
        let before = nic.received();
        c.talk(20);
        nic.received() - before < 10
    });
    assert!(nic.is_in_hardware(&c));
    release(&ports);
}

#[test]
fn nic_flowtable_a_delete_ends_the_entry_in_hardware_and_others_come_back() {
    let nic = Nic::new();
    let class = nic.net.class();
    let (ports, mut keep) = nic.offload(&class, L4Proto::Tcp, "10.0.2.2");
    let mut end = nic.net.connect(L4Proto::Udp, "10.0.2.2");
    end.talk(5);
    let rule = ports[0].add(2, nic.net.flow(&end, ORIGINAL));
    ports[1].add(2, nic.net.flow(&end, REPLY));
    nic.wait_in_hardware(&mut keep);
    nic.wait_in_hardware(&mut end);
    ports[0].delete(2, ORIGINAL, rule);
    wait_until("it is back on the slow path", || {
        !nic.net.is_offloaded(&end) && !nic.is_in_hardware(&end)
    });
    nic.wait_in_hardware(&mut keep);
    let (there, back) = nic.net.forwarded_of(&mut end, 20);
    assert!(there >= 20 && back >= 20, "{there}, {back}");
    release(&ports);
}

#[test]
fn nic_flowtable_beside_a_netdev_that_does_not_offload_it_goes_on_in_software() {
    let nic = Nic::new();
    let class = nic.net.class();
    let (ports, mut c) = nic.offload(&class, L4Proto::Tcp, "10.0.2.2");
    nic.wait_in_hardware(&mut c);
    nic.net.ns.run("ip link add plain0 type veth peer name plain1 && ip link set plain0 up");
    let plain = nic.net.bind(&class, "plain0");
    assert!(!plain.provider.describe().contains("hardware"));
    assert!(!nic.has_offload_flag());
    wait_until("software has it", || {
        c.talk(1);
        nic.net.is_offloaded(&c) && !nic.is_in_hardware(&c)
    });
    nic.net.wait_passing_by(&mut c);
    plain.provider.release().unwrap();
    release(&ports);
}
