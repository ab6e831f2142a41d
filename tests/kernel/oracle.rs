//! The scenario of the kernel's own test of flowtables (tools/testing/selftests, nft_flowtable.sh),
//! with whichever providers: data both ways, compared byte by byte, with masquerading and destination
//! NAT, where links have different MTUs, with path-MTU discovery and without, over IPv4 and IPv6, with
//! a VLAN and a bridge.
//!
//! ```text
//!   client  <- omtu ->  router (ours)  <- lmtu ->  router  <- rmtu ->  server
//!           lan                        wan
//! ```

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;

use ctoffload::control::Client;
use ctoffload::control::ConnFilter;
use serde_json::Value;

use crate::netns::NetNs;
use crate::release::{flowtable_wants_both, hear_of_ends_soon};
use crate::router::{ask, in_netns, reset_counters};
use crate::wait::{PATIENCE, wait_until};

/// Bytes each way.
const LENGTH: usize = 250_000;
/// What is asked for like this is masqueraded.
const MASQUERADED4: &str = "10.0.2.99:12345";
const MASQUERADED6: &str = "[dead:2::99]:12345";
/// What is asked for like this is translated to the address and port of the former.
const TRANSLATED4: &str = "10.6.6.6:1666";
const TRANSLATED6: &str = "[dead:6::6]:1666";

/// Packets that may cross the forward hook each way, of 120 at least: those until the kernel has made
/// its entry.
const FEW: u64 = 60;

struct Line {
    ns: NetNs,
    name: String,
    daemon: Option<Child>,
    /// Whether what comes in on `lan` is offloaded, and what comes in on `wan`.
    offloaded: [bool; 2],
}

impl Line {
    fn new(name: &str) -> Self {
        let ns = NetNs::new();
        let [client, hop, server] = Self::hosts(name);
        ns.run(&format!(
            "set -e
             ip netns add {client}; ip netns add {hop}; ip netns add {server}
             ip link add lan type veth peer name e0 netns {client}
             ip link add wan type veth peer name r0 netns {hop}
             ip -n {hop} link add r1 type veth peer name e0 netns {server}
             sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
             ip netns exec {hop} sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
             ip addr add 10.0.1.1/24 dev lan; ip addr add dead:1::1/64 dev lan nodad
             ip addr add 192.168.10.1/24 dev wan; ip addr add fee1:2::1/64 dev wan nodad
             ip link set lan up; ip link set wan up
             ip route add 10.0.2.0/24 via 192.168.10.2; ip -6 route add dead:2::/64 via fee1:2::2
             ip -n {hop} addr add 192.168.10.2/24 dev r0; ip -n {hop} addr add fee1:2::2/64 dev r0 nodad
             ip -n {hop} addr add 10.0.2.1/24 dev r1; ip -n {hop} addr add dead:2::1/64 dev r1 nodad
             ip -n {hop} link set r0 up; ip -n {hop} link set r1 up
             ip -n {hop} route add 10.0.1.0/24 via 192.168.10.1
             ip -n {hop} -6 route add dead:1::/64 via fee1:2::1
             ip -n {client} addr add 10.0.1.99/24 dev e0; ip -n {client} addr add dead:1::99/64 dev e0 nodad
             ip -n {client} link set e0 up
             ip -n {client} route add default via 10.0.1.1; ip -n {client} -6 route add default via dead:1::1
             ip -n {server} addr add 10.0.2.99/24 dev e0; ip -n {server} addr add dead:2::99/64 dev e0 nodad
             ip -n {server} link set e0 up
             ip -n {server} route add default via 10.0.2.1; ip -n {server} -6 route add default via dead:2::1
             for n in {client} {server}; do
               ip netns exec $n sysctl -qw net.ipv4.tcp_no_metrics_save=1
               ip netns exec $n ethtool -K e0 tso off gso off gro off >/dev/null
             done
             ethtool -K lan tso off gso off gro off >/dev/null
             ethtool -K wan tso off gso off gro off >/dev/null"
        ));
        ns.run(
            "nft '
             table inet watch {
               counter lan { }
               counter wan { }
               chain forward { type filter hook forward priority -10
                 meta l4proto tcp iifname wan counter name wan
                 meta l4proto tcp iifname != wan counter name lan
               }
               chain pre { type nat hook prerouting priority -100
                 ip daddr 10.6.6.6 tcp dport 1666 dnat ip to 10.0.2.99:12345
                 ip6 daddr dead:6::6 tcp dport 1666 dnat ip6 to [dead:2::99]:12345
               }
               chain post { type nat hook postrouting priority 100
                 oifname wan tcp dport 12345 ct original proto-dst 12345 masquerade
               }
             }
             '",
        );
        Self { ns, name: name.to_owned(), daemon: None, offloaded: [true; 2] }
    }

    fn hosts(name: &str) -> [String; 3] {
        ["c", "h", "s"].map(|h| format!("{name}-{h}"))
    }

    fn set_mtus(&self, [omtu, lmtu, rmtu]: [u32; 3]) {
        let [client, hop, server] = Self::hosts(&self.name);
        self.ns.run(&format!(
            "set -e
             ip link set lan mtu {omtu}; ip -n {client} link set e0 mtu {omtu}
             ip link set wan mtu {lmtu}; ip -n {hop} link set r0 mtu {lmtu}
             ip -n {hop} link set r1 mtu {rmtu}; ip -n {server} link set e0 mtu {rmtu}"
        ));
    }

    fn set_pmtu_discovery(&self, on: bool) {
        let [client, _, server] = Self::hosts(&self.name);
        for host in [client, server] {
            // What has been discovered is to be forgotten.
            self.ns.run(&format!(
                "set -e; ip netns exec {host} sysctl -qw net.ipv4.ip_no_pmtu_disc={}
                 ip -n {host} route flush cache; ip -n {host} -6 route flush cache",
                u8::from(!on)
            ));
        }
    }

    /// The client's addresses and the router's on its side move to these netdevs of theirs.
    fn move_client(&self, router: &str, to: &str) {
        let [client, ..] = Self::hosts(&self.name);
        self.ns.run(&format!(
            "set -e
             for n in $(ip -o addr show to 10.0.1.1 | cut -d ' ' -f 2); do
               ip addr del 10.0.1.1/24 dev $n; ip addr del dead:1::1/64 dev $n
             done
             ip addr add 10.0.1.1/24 dev {router}; ip addr add dead:1::1/64 dev {router} nodad
             for n in $(ip -n {client} -o addr show to 10.0.1.99 | cut -d ' ' -f 2); do
               ip -n {client} addr del 10.0.1.99/24 dev $n; ip -n {client} addr del dead:1::99/64 dev $n
             done
             ip -n {client} addr add 10.0.1.99/24 dev {to}
             ip -n {client} addr add dead:1::99/64 dev {to} nodad
             ip -n {client} route replace default via 10.0.1.1
             ip -n {client} -6 route replace default via dead:1::1"
        ));
    }

    /// Debian's kernels have.
    fn has_vlan_devices(&self) -> bool {
        let made = self.ns.try_run("ip link add link lan name lan.9 type vlan id 9");
        made.status.success() && self.ns.try_run("ip link del lan.9").status.success()
    }

    /// The client is in VLAN 10 of its link.
    fn tag_client(&self) {
        let [client, ..] = Self::hosts(&self.name);
        self.ns.run(&format!(
            "set -e
             ip link add link lan name lan.10 type vlan id 10; ip link set lan.10 up
             ip -n {client} link add link e0 name e0.10 type vlan id 10
             ip -n {client} link set e0.10 up"
        ));
        self.move_client("lan.10", "e0.10");
    }

    /// The router's end of that VLAN is the port of a bridge.
    fn bridge_client(&self) {
        self.ns
            .run("ip link add br0 type bridge; ip link set lan.10 master br0; ip link set br0 up");
        self.move_client("br0", "e0.10");
    }

    fn start(&mut self, lan: &str, wan: &str) {
        let file = std::env::temp_dir().join(format!("ctoffload-{}.toml", self.name));
        let text = format!(
            "[admission]\nmin-packets = 0\n[usage]\nsweep-seconds = 1\nsweep-max-seconds = 1\n[[port]]\nmatch = \"lan\"\nproviders = [\"{lan}\"]\n[[port]]\nmatch = \"wan\"\nproviders = [\"{wan}\"]\n"
        );
        std::fs::write(&file, text).expect("a file");
        let child = Command::new(env!("CARGO_BIN_EXE_ctoffloadd"))
            .arg("--config")
            .arg(&file)
            .stderr(Stdio::inherit())
            .spawn()
            .expect("ctoffloadd");
        self.daemon = Some(child);
        wait_until("both are bound", || {
            ask(Client::ports)
                .as_array()
                .is_some_and(|p| p.len() == 2 && p[0]["provider"] == lan && p[1]["provider"] == wan)
        });
        hear_of_ends_soon(|line| self.ns.run(line));
        if flowtable_wants_both() && lan != wan {
            self.offloaded = [lan, wan].map(|provider| provider != "nf-flowtable");
        }
    }

    /// Port, state and reason of every slot.
    fn slots(&self) -> Vec<[String; 3]> {
        let conns = ask(|client| client.conns(&ConnFilter::default()));
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let slots = |c: &Value| c["slots"].as_array().cloned().unwrap_or_default();
        let conns = conns.as_array().cloned().unwrap_or_default();
        conns
            .iter()
            .flat_map(slots)
            .map(|s| ["port", "state", "reason"].map(|key| text(&s[key])))
            .collect()
    }

    fn forwarded(&self) -> [u64; 2] {
        reset_counters(|line| self.ns.try_run(line), ["lan", "wan"])
    }

    /// A connection to this address; it talks until both ports have it. Then data goes both ways at
    /// once. Returns how many packets crossed the forward hook meanwhile, there and back.
    fn transfer(&self, to: SocketAddr) -> [u64; 2] {
        let [client, _, server] = Self::hosts(&self.name);
        let any: IpAddr = if to.is_ipv6() { [0u16; 8].into() } else { [0u8; 4].into() };
        let (tell, listening) = mpsc::channel();
        let accepting = in_netns(server, move || {
            let listener = TcpListener::bind((any, 12345)).expect("bind");
            tell.send(()).expect("the test listens");
            listener.accept().expect("accept").0
        });
        listening.recv().expect("the server listens");
        let mut a =
            in_netns(client, move || TcpStream::connect_timeout(&to, PATIENCE).expect("connect"))
                .join()
                .expect("the client connects");
        let mut b = accepting.join().expect("the server accepts");
        for s in [&a, &b] {
            s.set_nodelay(true).expect("TCP_NODELAY");
            s.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        }
        let mut decided = [("lan", 0), ("wan", 1)].map(|(port, n)| {
            let (state, reason) = if self.offloaded[n] {
                ("installed", "")
            } else {
                ("rejected", "egress-unsupported")
            };
            [port, state, reason].map(String::from)
        });
        decided.sort();
        wait_until("both directions are offloaded, or refused by the flowtable's kernel", || {
            for _ in 0..3 {
                a.write_all(b"x").and_then(|()| b.read_exact(&mut [0])).expect("a byte there");
                b.write_all(b"x").and_then(|()| a.read_exact(&mut [0])).expect("a byte back");
            }
            let mut slots = self.slots();
            slots.sort();
            slots == decided
        });
        self.forwarded();
        let data = |seed: usize| -> Vec<u8> {
            (0..LENGTH).map(|i| (i * 31 + i / 251 + seed).to_le_bytes()[0]).collect()
        };
        let ways: Vec<_> = [(&a, &b, 1), (&b, &a, 2)]
            .into_iter()
            .map(|(from, to, seed)| {
                let mut from = from.try_clone().expect("a clone");
                let mut to = to.try_clone().expect("a clone");
                let (sent, want) = (data(seed), data(seed));
                let writing = std::thread::spawn(move || from.write_all(&sent).expect("write"));
                let reading = std::thread::spawn(move || {
                    let mut got = vec![0; LENGTH];
                    to.read_exact(&mut got).expect("all of it arrives");
                    assert!(got == want, "what arrives is what was sent");
                });
                (writing, reading)
            })
            .collect();
        for (writing, reading) in ways {
            writing.join().expect("writes");
            reading.join().expect("reads");
        }
        let crossed = self.forwarded();
        for s in [&a, &b] {
            s.shutdown(Shutdown::Both).expect("shutdown");
        }
        wait_until("nothing is left of it", || self.slots().is_empty());
        crossed
    }

    /// A transfer by each of these connections. Few packets of what is offloaded cross the forward hook, but
    /// for those that are too long: without discovery the router fragments them, which is work for the slow
    /// path.
    fn transfer_all(&self, scene: &str, discovery: bool, kinds: &[&str]) {
        for to in kinds {
            let [there, back] = self.transfer(to.parse().expect("an address"));
            println!("{scene}, {to}: {there} and {back} packets in software");
            if discovery {
                let few = [there, back].map(|n| n < FEW);
                assert_eq!(few, self.offloaded, "{scene}, {to}: {there}, {back}");
            } else {
                assert!(there >= FEW, "{scene}, {to}: {there}, {back}");
            }
        }
    }

    fn run(&self) {
        let all = [MASQUERADED4, TRANSLATED4, MASQUERADED6, TRANSLATED6];
        for mtus in [[9000, 1500, 2000], [1400, 1500, 1280]] {
            self.set_mtus(mtus);
            self.set_pmtu_discovery(true);
            self.transfer_all(&format!("MTUs {mtus:?}"), true, &all);
            // Where every packet fits there is nothing to discover; IPv6 discovers always.
            if mtus[0] > mtus[1] {
                self.set_pmtu_discovery(false);
                let scene = format!("MTUs {mtus:?}, no discovery");
                self.transfer_all(&scene, false, &[MASQUERADED4, TRANSLATED4]);
            }
        }
        self.set_mtus([1500; 3]);
        self.set_pmtu_discovery(true);
        if !self.has_vlan_devices() {
            return println!(
                "not checked: a VLAN, and a bridge on it, which this kernel does not have"
            );
        }
        self.tag_client();
        self.transfer_all("VLAN", true, &[MASQUERADED4, TRANSLATED6]);
        self.bridge_client();
        self.transfer_all("VLAN and bridge", true, &[TRANSLATED4, MASQUERADED6]);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if let Some(mut child) = self.daemon.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        for host in Self::hosts(&self.name) {
            let _ = self.ns.try_run(&format!("ip netns del {host}"));
        }
    }
}

fn with(name: &str, lan: &str, wan: &str) {
    let mut line = Line::new(name);
    line.start(lan, wan);
    line.run();
}

#[test]
fn oracle_with_the_flowtable() {
    with("o1", "nf-flowtable", "nf-flowtable");
}

#[test]
fn oracle_with_flower() {
    with("o2", "tc-flower", "tc-flower");
}

#[test]
fn oracle_with_flower_and_the_flowtable() {
    with("o3", "tc-flower", "nf-flowtable");
}

#[test]
fn oracle_with_the_flowtable_and_flower() {
    with("o4", "nf-flowtable", "tc-flower");
}

#[test]
fn oracle_with_ebpf() {
    with("o5", "ebpf", "ebpf");
}

#[test]
fn oracle_with_ebpf_and_flower() {
    with("o6", "ebpf", "tc-flower");
}
