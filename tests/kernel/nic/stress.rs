//! Adds, deletes, resets and links that go, under traffic: no kernel warning, and nothing leaks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{DEBUGFS, Nic, in_netns, wait_until};

const LONG: Duration = Duration::from_secs(20);

/// What the kernel says in its log when something is wrong with it.
const COMPLAINTS: [&str; 10] = [
    "WARNING:",
    "BUG:",
    "Oops",
    "Call Trace",
    "suspicious RCU",
    "refcount_t",
    "possible deadlock",
    "general protection",
    "unregister_netdevice: waiting",
    "scheduling while atomic",
];

fn allocations() -> String {
    std::fs::read_to_string(format!("{DEBUGFS}/allocations")).unwrap()
}

/// Sends datagrams to addresses with and without a rule until told to stop.
fn traffic(nic: &Nic, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<u64> {
    let stop = Arc::clone(stop);
    in_netns(nic.host(0), move || {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        let mut sent = 0;
        while !stop.load(Ordering::Relaxed) {
            for port in 1..100 {
                // The route may be gone for the moment.
                sent += u64::from(socket.send_to(&[0; 64], ("10.1.0.2", port)).is_ok());
            }
        }
        sent
    })
}

/// A batch of `tc` that adds a hundred rules of each of a few masks, and one that deletes them.
fn batches(nic: &Nic) -> (String, String) {
    let matches = ["dst_port", "src_ip 10.0.0.2 dst_port", "dst_ip 10.1.0.2 dst_port"];
    let actions = "action pedit ex munge eth dst set 02:00:00:00:01:02 munge ip ttl add 0xff pipe action csum ip4h pipe action mirred egress redirect dev p1";
    let mut add = String::new();
    let mut del = String::new();
    for (pref, m) in (1..).zip(matches) {
        for port in 1..100 {
            add += &format!(
                "filter add dev p0 ingress pref {pref} handle {port} protocol ip flower skip_sw ip_proto udp {m} {port} {actions}\n"
            );
            del += &format!(
                "filter del dev p0 ingress pref {pref} handle {port} protocol ip flower\n"
            );
        }
    }
    let dir = std::env::temp_dir();
    let files = ["add", "del"].map(|f| dir.join(format!("simnic-{}-{f}", nic.name)));
    std::fs::write(&files[0], add).unwrap();
    std::fs::write(&files[1], del).unwrap();
    let [add, del] = files.map(|f| format!("tc -force -batch {}", f.display()));
    (add, del)
}

#[test]
fn alone_rules_and_links_come_and_go_under_traffic() {
    let mut nic = Nic::new("stress");
    let stop = Arc::new(AtomicBool::new(false));
    let senders = [traffic(&nic, &stop), traffic(&nic, &stop)];
    let (add, del) = batches(&nic);
    let flowtable = "table inet f { flowtable ft { hook ingress priority 0; devices = { p0, p1 }; flags offload; }
        chain c { type filter hook forward priority 0; ct state established,new flow add @ft; }; }";
    let deadline = Instant::now() + LONG;
    let mut rounds = 0;
    while Instant::now() < deadline || rounds < 5 {
        let _ = nic.ns.try_run(&add);
        match rounds % 4 {
            0 => {
                let _ = nic.ns.try_run(&del);
            }
            1 => {
                nic.set(0, "reset", "1");
                nic.set(0, "fail_delete", "3 5 7");
                nic.run("tc filter del dev p0 ingress");
            }
            2 => {
                nic.run(&format!("nft '{flowtable}'"));
                nic.set(1, "link_flap_ms", "1");
                nic.run("nft delete table inet f && tc qdisc del dev p0 clsact && tc qdisc add dev p0 clsact");
            }
            _ => {
                // The target goes with rules that lead into it, and a new one comes.
                let host = nic.host(1);
                nic.run(&format!(
                    "ip link del p1 && ip link add name p1 address 02:00:00:00:01:01 type simnic peer name w1 address 02:00:00:00:01:02 netns {host}
                     ip link set p1 up && ip -n {host} link set w1 up && ip addr add 10.1.0.1/24 dev p1"
                ));
                nic.run("tc filter del dev p0 ingress");
                nic.find_ports();
            }
        }
        rounds += 1;
    }
    let hits = nic.counter(0, "hits");
    // The port goes with its rules, in the middle of the traffic.
    let _ = nic.ns.try_run(&add);
    nic.run("ip link del p0");
    stop.store(true, Ordering::Relaxed);
    let sent: u64 = senders.map(|s| s.join().unwrap()).iter().sum();
    assert!(sent > 1000 && hits > 100, "{rounds} rounds, {sent} datagrams, {hits} hits");

    // What all tests made goes with their network namespaces, in the background.
    drop(nic);
    wait_until("nothing is allocated", || {
        allocations() == "ports 0\negresses 0\nrules 0\ngroups 0\n"
    });
    let ns = crate::netns::NetNs::new();
    ns.run("rmmod simnic");
    ns.run("insmod \"$CTOFFLOAD_SIMNIC\"");
    let dmesg = ns.run("dmesg");
    let said: Vec<&str> =
        dmesg.lines().filter(|l| COMPLAINTS.iter().any(|c| l.contains(c))).collect();
    assert!(said.is_empty(), "{said:#?}");
    // O and E: an out-of-tree module without a signature; nothing else, W (a warning) above all.
    let tainted: u64 = ns.run("cat /proc/sys/kernel/tainted").trim().parse().unwrap();
    assert_eq!(tainted & !(1 << 12 | 1 << 13), 0, "tainted: {tainted}");
}
