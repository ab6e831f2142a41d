//! That `tests/simnic` is a fair NIC, by `tc`, `nft`, `ip` and `ethtool` alone: our programs have no
//! part in these tests. They need the machine of `scripts/lab --nic`.
//!
//! The host has ports `p0` and `p1`; a host sits at the far end of each wire:
//!
//! ```text
//! 10.0.0.2 w0 ---- p0 10.0.0.1   10.1.0.1 p1 ---- w1 10.1.0.2
//! ```

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod actions;
mod forwarding;
mod knobs;
mod link;
mod stress;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Output;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::netns::NetNs;
use crate::router::in_netns;
use crate::wait::{PATIENCE, wait_until};

/// After this long a datagram is taken for lost. One that does arrive takes a thousandth of it.
const LOST: Duration = Duration::from_secs(1);
/// Where TCP and UDP servers listen.
const PORT: u16 = 5001;

const DEBUGFS: &str = "/sys/kernel/debug/simnic";

/// Packets and bytes.
type Count = (u64, u64);

/// The host with its two ports, and the hosts behind them.
struct Nic {
    name: String,
    /// Directories of the ports in debugfs.
    dirs: Vec<String>,
    ns: NetNs,
}

impl Nic {
    /// IPv4 only, and every neighbour known: nothing moves on the wires but what a test sends.
    fn new(test: &str) -> Self {
        Self::build(test, false)
    }

    fn with_ipv6(test: &str) -> Self {
        Self::build(test, true)
    }

    fn build(test: &str, ipv6: bool) -> Self {
        assert!(std::env::var_os("CTOFFLOAD_SIMNIC").is_some(), "this needs scripts/lab --nic");
        let ns = NetNs::new();
        let mut nic = Self { name: test.to_owned(), dirs: Vec::new(), ns };
        let [h0, h1] = [nic.host(0), nic.host(1)];
        nic.run(&format!("ip netns add {h0}\nip netns add {h1}"));
        sysctl("net/ipv4/ip_forward", "1");
        if ipv6 {
            sysctl("net/ipv6/conf/all/forwarding", "1");
        } else {
            let off = || {
                sysctl("net/ipv6/conf/all/disable_ipv6", "1");
                sysctl("net/ipv6/conf/default/disable_ipv6", "1");
            };
            off();
            for host in [h0, h1] {
                in_netns(host, off).join().unwrap();
            }
        }

        // Few processes: each is slow to start in an emulated machine.
        let mut links = String::new();
        let mut neighbours = String::new();
        let mut qdiscs = String::new();
        for i in 0..2 {
            let host = nic.host(i);
            let (port_mac, wire_mac) =
                (format!("02:00:00:00:0{i}:01"), format!("02:00:00:00:0{i}:02"));
            links += &format!(
                "link add name p{i} address {port_mac} type simnic peer name w{i} address {wire_mac} netns {host}
                 link set p{i} addrgenmode none up
                 addr add 10.{i}.0.1/24 dev p{i}\n"
            );
            neighbours += &format!("neigh add 10.{i}.0.2 lladdr {wire_mac} dev p{i}\n");
            qdiscs += &format!("qdisc add dev p{i} clsact\n");
            if ipv6 {
                links += &format!("addr add fd0{i}::1/64 dev p{i} nodad\n");
                neighbours += &format!("neigh add fd0{i}::2 lladdr {wire_mac} dev p{i}\n");
            }
        }
        nic.run(&batch("ip", &links));
        for i in 0..2 {
            let port_mac = format!("02:00:00:00:0{i}:01");
            let mut lines = format!(
                "link set w{i} addrgenmode none up
                 link set lo up
                 addr add 10.{i}.0.2/24 dev w{i}
                 neigh add 10.{i}.0.1 lladdr {port_mac} dev w{i}
                 route add default via 10.{i}.0.1\n"
            );
            if ipv6 {
                lines += &format!(
                    "addr add fd0{i}::2/64 dev w{i} nodad
                     neigh add fd0{i}::1 lladdr {port_mac} dev w{i}
                     route add default via fd0{i}::1\n"
                );
            }
            nic.run(&batch(&format!("ip -n {}", nic.host(i)), &lines));
        }
        nic.run(&batch("ip", &neighbours));
        nic.run(&batch("tc", &qdiscs));
        wait_until("the links are up", || (0..2).all(|i| nic.has_carrier(i)));
        nic.find_ports();
        nic
    }

    /// Finds the ports' directories in debugfs, by the names that the ports have on the NIC.
    fn find_ports(&mut self) {
        let name = |i| {
            let text = self.run(&format!("ip -d -j link show p{i}"));
            let link: serde_json::Value = serde_json::from_str(&text).unwrap();
            link[0]["phys_port_name"].as_str().expect("a phys_port_name").to_owned()
        };
        self.dirs = (0..2).map(|i| format!("{DEBUGFS}/{}", name(i))).collect();
    }

    /// The network namespace behind a port.
    fn host(&self, i: usize) -> String {
        format!("{}-{i}", self.name)
    }

    fn run(&self, line: &str) -> String {
        self.ns.run(&format!("set -e\n{line}"))
    }

    fn fails(&self, line: &str) -> String {
        let out: Output = self.ns.try_run(line);
        assert!(!out.status.success(), "`{line}` should fail");
        String::from_utf8_lossy(&out.stderr).into_owned()
    }

    fn has_carrier(&self, i: usize) -> bool {
        self.run(&format!("ip link show p{i}")).contains("LOWER_UP")
    }

    fn set(&self, i: usize, knob: &str, value: &str) {
        self.try_set(i, knob, value).unwrap_or_else(|e| panic!("{knob} = {value}: {e}"));
    }

    fn try_set(&self, i: usize, knob: &str, value: &str) -> std::io::Result<()> {
        std::fs::write(format!("{}/{knob}", self.dirs[i]), value)
    }

    fn get(&self, i: usize, knob: &str) -> String {
        let text = std::fs::read_to_string(format!("{}/{knob}", self.dirs[i])).unwrap();
        text.trim_end().to_owned()
    }

    /// One of the port's own counters.
    fn counter(&self, i: usize, name: &str) -> u64 {
        let all = self.get(i, "counters");
        let line = all.lines().find_map(|l| l.strip_prefix(&format!("{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in {all}")).parse().unwrap()
    }

    /// The states of the port's rules ("tc active", "ft lost", ...), and what they counted.
    fn rules(&self, i: usize) -> Vec<(String, Count)> {
        let text = self.get(i, "rules");
        text.lines()
            .map(|line| {
                let w: Vec<&str> = line.split(' ').collect();
                (format!("{} {}", w[0], w[5]), (w[7].parse().unwrap(), w[9].parse().unwrap()))
            })
            .collect()
    }

    fn filter(&self, i: usize, rule: &str) {
        self.run(&format!("tc filter add dev p{i} ingress {rule}"));
    }

    /// What the kernel says of the filters of a preference in a chain.
    fn show(&self, i: usize, pref: u32, chain: u32) -> String {
        self.run(&format!("tc -s filter show dev p{i} ingress pref {pref} chain {chain}"))
    }

    /// What the last filter of a preference has counted, by its last action.
    fn counted(&self, i: usize, pref: u32, chain: u32) -> Count {
        let text = self.show(i, pref, chain);
        // "Sent N bytes M pkt"; there are "Sent software" and "Sent hardware", too.
        let sent = text.lines().rev().find_map(|l| {
            let w: Vec<&str> = l.split_whitespace().collect();
            let [_, bytes, _, packets] = w.get(..4).filter(|w| w[0] == "Sent")? else {
                return None;
            };
            Some((packets.parse().ok()?, bytes.parse().ok()?))
        });
        sent.unwrap_or_else(|| panic!("no counters in {text}"))
    }

    /// What an end of a cable received (rx) or sent (tx): "p0" is the host's, "w0" its peer's.
    fn netdev(&self, name: &str, way: &str) -> Count {
        let ns = match name.strip_prefix('w') {
            Some(i) => format!("-n {}", self.host(i.parse().unwrap())),
            None => String::new(),
        };
        let all: serde_json::Value =
            serde_json::from_str(&self.run(&format!("ip {ns} -j -s link show {name}"))).unwrap();
        let stats = &all[0]["stats64"][way];
        (stats["packets"].as_u64().unwrap(), stats["bytes"].as_u64().unwrap())
    }

    /// A counter of a host's stack.
    fn nstat(&self, i: usize, name: &str) -> u64 {
        let text = self.run(&format!("ip netns exec {} nstat -asz {name}", self.host(i)));
        let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("{text}"));
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// A rule that routes by hardware from one port to the other. `edit` goes behind the rewriting
    /// of MAC addresses and TTL.
    fn route(&self, from: usize, pref: u32, matches: &str, edit: &str) {
        let to = 1 - from;
        let ttl = if matches.contains("ipv6") { "ip6 hoplimit" } else { "ip ttl" };
        self.filter(
            from,
            &format!(
                "pref {pref} {matches} action pedit ex munge eth src set 02:00:00:00:0{to}:01 munge eth dst set 02:00:00:00:0{to}:02 munge {ttl} add 0xff {edit} pipe action mirred egress redirect dev p{to}"
            ),
        );
    }

    /// Opens a UDP socket on each host: the second receives on `PORT`.
    fn udp(&self) -> Udp {
        let bind = |i: usize, port: u16| {
            let socket =
                in_netns(self.host(i), move || UdpSocket::bind(("0.0.0.0", port)).unwrap())
                    .join()
                    .unwrap();
            socket.set_read_timeout(Some(LOST)).unwrap();
            socket
        };
        Udp { from: bind(0, 5000), to: bind(1, PORT) }
    }

    /// Sends bytes there and back over a TCP connection from the host behind `p0` to an address, where
    /// the host behind `p1` listens, and compares them.
    fn tcp(&self, to: &str, len: usize) {
        let mut c = self.connect(to);
        c.exchange(len);
        c.close();
    }

    fn connect(&self, to: &str) -> Tcp {
        let address: SocketAddr = format!("{to}:{PORT}").parse().unwrap();
        let any = if address.is_ipv4() { "0.0.0.0" } else { "[::]" };
        let any: SocketAddr = format!("{any}:{PORT}").parse().unwrap();
        let (ready, listening) = mpsc::channel();
        let server = in_netns(self.host(1), move || {
            let listener = TcpListener::bind(any).unwrap();
            ready.send(()).unwrap();
            let (mut stream, _) = listener.accept().unwrap();
            let mut back = stream.try_clone().unwrap();
            std::io::copy(&mut stream, &mut back).unwrap();
        });
        listening.recv().unwrap();
        let client = in_netns(self.host(0), move || TcpStream::connect(address).unwrap());
        let stream = client.join().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Tcp { stream, server }
    }
}

impl Drop for Nic {
    fn drop(&mut self) {
        let lines = format!(
            "link del p0\nlink del p1\nnetns del {}\nnetns del {}\n",
            self.host(0),
            self.host(1)
        );
        let _ = self.ns.try_run(&batch("ip -force", &lines));
    }
}

/// A TCP connection whose far end sends back what it gets.
struct Tcp {
    stream: TcpStream,
    server: JoinHandle<()>,
}

impl Tcp {
    /// # Panics
    /// When anything else comes back than was sent.
    fn exchange(&mut self, len: usize) {
        let sent: Vec<u8> = (0..len).map(|i| ((i * i) >> 3).to_le_bytes()[0]).collect();
        let mut out = self.stream.try_clone().unwrap();
        let data = sent.clone();
        let writer = std::thread::spawn(move || out.write_all(&data).unwrap());
        let mut got = vec![0; len];
        self.stream.read_exact(&mut got).expect("all comes back");
        writer.join().unwrap();
        assert!(got == sent, "what came back is what was sent");
    }

    fn close(self) {
        self.stream.shutdown(std::net::Shutdown::Both).unwrap();
        self.server.join().unwrap();
    }
}

/// Datagrams from the host behind `p0` to the one behind `p1`.
struct Udp {
    from: UdpSocket,
    to: UdpSocket,
}

impl Udp {
    /// Whether a datagram of that length to an address arrives.
    fn arrives_at(&self, to: &str, len: usize) -> bool {
        let data = vec![0x5a; len];
        self.from.send_to(&data, to).unwrap();
        let mut got = vec![0; len + 1];
        match self.to.recv(&mut got) {
            Ok(n) => {
                assert!(got[..n] == data, "what arrives is what was sent");
                true
            }
            Err(_) => false,
        }
    }

    fn arrives(&self) -> bool {
        self.arrives_at(&format!("10.1.0.2:{PORT}"), 100)
    }
}

/// A command line that gives `ip` or `tc` many commands at once.
fn batch(program: &str, lines: &str) -> String {
    format!("{program} -batch - <<'END'\n{lines}END\n")
}

/// Sets a value of the calling thread's network namespace.
fn sysctl(name: &str, value: &str) {
    std::fs::write(format!("/proc/sys/{name}"), value).unwrap_or_else(|e| panic!("{name}: {e}"));
}
