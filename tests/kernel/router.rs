//! The daemon on a router, as a person runs it: real connections, and what happens to their rules
//! when links, neighbours, routes and the firewall change.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ctoffload::control::ConnFilter;
use ctoffload::control::{Client, ClientError};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;
use serde_json::Value;

use crate::entries::entries;
use crate::netns::NetNs;
use crate::wait::{PATIENCE, wait_until};

mod admission;
mod beside;
mod blind;
mod bridge;
mod choice;
mod ebpf;
mod ecmp;
mod egress;
mod ends;
mod explain;
mod firewall;
mod lint;
mod lives;
mod marks;
mod names;
mod nat;
mod neighbours;
mod place;
mod service;
mod signals;
mod stack;
mod tos;
mod vrf;
mod world;
mod zones;

/// A router with netdevs `lan` and `wan`, and a host behind each.
pub(crate) struct Router {
    daemon: Option<Child>,
    name: String,
    ns: NetNs,
}

impl Router {
    pub(crate) fn new(test: &str) -> Self {
        Self::of(test, "veth")
    }

    /// Its netdevs are one end each of a pair of this kind.
    pub(crate) fn of(test: &str, kind: &str) -> Self {
        let ns = NetNs::new();
        let router = Self { daemon: None, name: test.to_owned(), ns };
        let mut lines = String::new();
        for (i, dev) in [(1, "lan"), (2, "wan")] {
            let host = router.host(dev);
            lines += &format!(
                "ip netns add {host}
                 ip link add {dev} type {kind} peer name e0 netns {host}
                 ip addr add 10.{i}.0.1/24 dev {dev}
                 ip link set {dev} up\n"
            );
        }
        router.run(&lines);
        for (i, dev) in [(1, "lan"), (2, "wan")] {
            let host = router.host(dev);
            router.run(&format!(
                "ip -n {host} addr add 10.{i}.0.2/24 dev e0
                 ip -n {host} link set e0 up
                 ip -n {host} route add default via 10.{i}.0.1"
            ));
        }
        router.run("sysctl -qw net.ipv4.ip_forward=1");
        router
    }

    pub(crate) fn host(&self, dev: &str) -> String {
        format!("{}-{dev}", self.name)
    }

    pub(crate) fn run(&self, line: &str) -> String {
        self.ns.run(line)
    }

    /// The same, where failure is an answer too.
    pub(crate) fn try_run(&self, line: &str) -> Output {
        self.ns.try_run(line)
    }

    /// With these ports (`--port NAME`), which are tc-flower's.
    pub(crate) fn start(&mut self, ports: &[&str]) {
        let ports = ports.iter().filter(|arg| **arg != "--port");
        let config: String = ports.map(|name| format!("[[port]]\nmatch = \"{name}\"\n")).collect();
        self.start_with(&config);
    }

    /// With this configuration.
    pub(crate) fn start_with(&mut self, config: &str) {
        let file = self.configure(config);
        self.start_logging(&["--config", &file], Stdio::inherit());
    }

    /// With this configuration, in which ports that have no list get what is best.
    pub(crate) fn start_by_default(&mut self, config: &str) {
        let file = self.written(config);
        self.start_logging(&["--config", &file], Stdio::inherit());
        // It answers before they are.
        let expected = if config.contains("?an") { 2 } else { 1 };
        wait_until("the ports are there", || self.ports().len() == expected);
    }

    /// Two ports of this provider alone.
    pub(crate) fn start_by(&mut self, provider: &str) {
        self.start_with(&format!(
            "[usage]\nsweep-seconds = 1\n[[port]]\nmatch = \"?an\"\nproviders = [\"{provider}\"]\n"
        ));
    }

    /// The name of a file with this configuration. Ports that have no list are tc-flower's, a line longer each: most
    /// tests are about the rules that `tc` shows, and would ask another class for them.
    pub(crate) fn configure(&self, config: &str) -> String {
        const PORT: &str = "[[port]]\n";
        let mut sections = config.split(PORT);
        let mut listed = sections.next().unwrap_or_default().to_owned();
        for section in sections {
            let of_port = section.split("\n[").next().unwrap_or_default();
            let list =
                if of_port.contains("providers") { "" } else { "providers = [\"tc-flower\"]\n" };
            listed += &format!("{PORT}{list}{section}");
        }
        self.written(&listed)
    }

    /// The name of a file with this configuration. Where it does not say from how many packets on, from the first
    /// that can be: tests count them.
    fn written(&self, config: &str) -> String {
        let file = std::env::temp_dir().join(format!("ctoffload-{}.toml", self.name));
        let mut config = config.to_owned();
        if !config.contains("min-packets") {
            let at_once = "[admission]\nmin-packets = 0\n";
            if config.contains("[admission]\n") {
                config = config.replace("[admission]\n", at_once);
            } else {
                config = format!("{config}\n{at_once}");
            }
        }
        std::fs::write(&file, config).expect("a file");
        file.to_str().expect("a path").to_owned()
    }

    /// With its log there, and no configuration but these arguments.
    pub(crate) fn start_logging(&mut self, args: &[&str], log: Stdio) {
        let child = Command::new(env!("CARGO_BIN_EXE_ctoffloadd"))
            .args(args)
            .stderr(log)
            .spawn()
            .expect("ctoffloadd");
        self.daemon = Some(child);
        wait_until("the daemon answers", || ask(Client::stats).is_object());
    }

    pub(crate) fn cli(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_ctoffload")).args(args).output().expect("ctoffload")
    }

    pub(crate) fn stats(&self) -> Value {
        ask(Client::stats)
    }

    pub(crate) fn ports(&self) -> Vec<Value> {
        ask(Client::ports).as_array().cloned().unwrap_or_default()
    }

    pub(crate) fn port(&self, name: &str) -> Value {
        self.ports().into_iter().find(|p| p["name"] == name).unwrap_or_default()
    }

    pub(crate) fn conns(&self) -> Value {
        ask(|client| client.conns(&ConnFilter::default()))
    }

    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let out = self.cli(&[&["-j"], args].concat());
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout).expect("JSON")
    }

    /// Every slot of every connection: port, direction, state, reason.
    pub(crate) fn slots(&self) -> Vec<(String, String, String, String)> {
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let conns = self.conns();
        let conns = conns.as_array().cloned().unwrap_or_default();
        let mut slots: Vec<_> = conns
            .iter()
            .flat_map(|c| c["slots"].as_array().cloned().unwrap_or_default())
            .map(|s| {
                (text(&s["port"]), text(&s["direction"]), text(&s["state"]), text(&s["reason"]))
            })
            .collect();
        slots.sort();
        slots
    }

    pub(crate) fn installed(&self) -> Vec<String> {
        let slots = self.slots().into_iter().filter(|s| s.2 == "installed");
        slots.map(|(port, direction, ..)| format!("{port} {direction}")).collect()
    }

    pub(crate) fn wait_installed(&self, want: &[&str], connection: &mut Connection) {
        wait_until(&format!("{want:?} installed"), || {
            connection.ping();
            self.installed() == want
        });
    }

    /// Flow rules of ours on a netdev: as `tc` sees them, and in the tables of BPF programs.
    pub(crate) fn rules(&self, dev: &str) -> usize {
        let out = self.run(&format!("tc filter show dev {dev} ingress"));
        let flower = out.lines().filter(|l| l.contains(" flower ") && l.contains("handle 0x"));
        flower.count() + entries(dev)
    }

    /// Exchanges data until all of it goes by rules: a netdev that has just come up is heard of late,
    /// and takes rules back that are soon there again.
    fn exchange_by_rules(&self, connection: &mut Connection, length: usize) {
        wait_until("the router forwards none of it", || {
            let before = self.forwarded();
            connection.exchange(length);
            self.forwarded() == before
        });
    }

    /// IPv4 packets that the router's stack has forwarded.
    fn forwarded(&self) -> u64 {
        let text = std::fs::read_to_string("/proc/thread-self/net/snmp").expect("counters");
        let mut lines = text.lines().filter_map(|l| l.strip_prefix("Ip: "));
        let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
        let at = names.split(' ').position(|n| n == "ForwDatagrams").expect("the counter");
        values.split(' ').nth(at).and_then(|n| n.parse().ok()).expect("a number")
    }

    /// What a slot that has not been installed says of itself.
    fn refusal(&self, port: &str, direction: &str) -> Option<(String, String)> {
        let conns = self.conns();
        let slots =
            conns.as_array()?.iter().flat_map(|c| c["slots"].as_array().into_iter().flatten());
        let mut found = slots.filter(|s| s["port"] == port && s["direction"] == direction);
        let slot = found.find(|s| s["state"] == "rejected")?;
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        Some((text(&slot["reason"]), text(&slot["detail"])))
    }

    pub(crate) fn wait_refused(
        &self,
        at: (&str, &str),
        reason: &str,
        why: &str,
        c: &mut Connection,
    ) {
        let mut last = None;
        wait_until(&format!("{at:?} refused: {reason}, {why}"), || {
            c.ping();
            let now = self.refusal(at.0, at.1);
            if now != last {
                println!("{at:?}: {now:?}");
                last.clone_from(&now);
            }
            now.is_some_and(|(r, w)| r == reason && w.contains(why))
        });
    }

    pub(crate) fn signal(&mut self, signal: Signal) -> Option<i32> {
        let mut child = self.daemon.take()?;
        let pid = i32::try_from(child.id()).expect("a pid");
        kill(Pid::from_raw(pid), signal).expect("kill");
        child.wait().expect("wait").code()
    }

    pub(crate) fn connect(&self) -> Connection {
        self.connect_to(5001)
    }

    /// To a server of its own at this port of the host behind `wan`.
    pub(crate) fn connect_to(&self, port: u16) -> Connection {
        let address = format!("10.2.0.2:{port}");
        self.connect_through(&address, "wan", &address)
    }

    /// From the host behind `lan` to an address, where a server behind a netdev of the router
    /// answers that listens at another.
    fn connect_through(&self, to: &str, server: &str, at: &str) -> Connection {
        let [to, at]: [SocketAddr; 2] = [to, at].map(|a| a.parse().expect("an address"));
        let (ready, listening) = mpsc::channel();
        let server = in_netns(self.host(server), move || {
            let listener = TcpListener::bind(at).expect("bind");
            ready.send(()).expect("ready");
            let (mut stream, _) = listener.accept().expect("accept");
            let mut buf = vec![0; 1 << 16];
            while let Ok(n @ 1..) = stream.read(&mut buf) {
                if stream.write_all(&buf[..n]).is_err() {
                    break;
                }
            }
        });
        listening.recv().expect("the server listens");
        let stream = in_netns(self.host("lan"), move || {
            TcpStream::connect_timeout(&to, PATIENCE).expect("connect")
        })
        .join()
        .expect("the client connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        Connection { stream, server: Some(server) }
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        if let Some(mut child) = self.daemon.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let [lan, wan] = ["lan", "wan"].map(|dev| self.host(dev));
        let _ = self.ns.try_run(&format!("ip netns del {lan}; ip netns del {wan}"));
    }
}

/// A TCP connection through the router, whose far end echoes.
pub(crate) struct Connection {
    stream: TcpStream,
    server: Option<JoinHandle<()>>,
}

impl Connection {
    pub(crate) fn ping(&mut self) {
        self.stream.write_all(b"x").expect("the connection carries a byte there");
        self.stream.read_exact(&mut [0]).expect("and back");
    }

    /// Sends data there, and compares what comes back byte by byte.
    fn exchange(&mut self, length: usize) {
        let data: Vec<u8> =
            (0..length).map(|i| ((i % 251) ^ (i / 251 % 256)).try_into().unwrap_or(0)).collect();
        let (sent, mut writer) = (data.clone(), self.stream.try_clone().expect("a clone"));
        let writing = std::thread::spawn(move || writer.write_all(&sent));
        let mut back = vec![0; length];
        self.stream.read_exact(&mut back).expect("the data comes back");
        writing.join().expect("the writer").expect("the data is sent");
        assert!(back == data, "other data came back");
    }

    /// Whether a byte comes back within a second.
    pub(crate) fn is_alive(&mut self) -> bool {
        self.stream.set_read_timeout(Some(Duration::from_secs(1))).expect("a time-out");
        let alive = self.stream.write_all(b"x").is_ok() && self.stream.read_exact(&mut [0]).is_ok();
        self.stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        alive
    }

    /// Without a FIN: what is there is thrown away, and the other end gets a RST.
    fn abort(self) {
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        nix::sys::socket::setsockopt(&self.stream, nix::sys::socket::sockopt::Linger, &linger)
            .expect("SO_LINGER");
    }

    pub(crate) fn close(mut self) {
        self.stream.shutdown(std::net::Shutdown::Both).expect("shutdown");
        if let Some(server) = self.server.take() {
            server.join().expect("the server ends");
        }
    }
}

/// What the daemon in the calling thread's network namespace answers, as the CLI prints it with `-j`:
/// without a process for each question.
pub(crate) fn ask<T: Serialize>(
    question: impl FnOnce(&mut Client) -> Result<T, ClientError>,
) -> Value {
    let answer = Client::connect().and_then(|mut client| question(&mut client));
    answer.map_or(Value::Null, |a| serde_json::to_value(a).expect("JSON"))
}

pub(crate) fn in_netns<R: Send + 'static>(
    name: String,
    f: impl FnOnce() -> R + Send + 'static,
) -> JoinHandle<R> {
    std::thread::spawn(move || {
        let ns = File::open(format!("/var/run/netns/{name}")).expect("a named namespace");
        setns(ns, CloneFlags::CLONE_NEWNET).expect("setns");
        f()
    })
}

/// Packets that these counters of table `inet watch` have counted since the last call.
pub(crate) fn reset_counters<const N: usize>(
    try_run: impl Fn(&str) -> Output,
    names: [&str; N],
) -> [u64; N] {
    reset_counters_of("inet watch", try_run, names)
}

/// The same of another table.
pub(crate) fn reset_counters_of<const N: usize>(
    table: &str,
    try_run: impl Fn(&str) -> Output,
    names: [&str; N],
) -> [u64; N] {
    // nft gives up (EINTR) when the ruleset changes meanwhile, which elements of ours do.
    let mut text = None;
    wait_until("the counters are read", || {
        let out = try_run(&format!("nft reset counters table {table}"));
        text = out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned());
        text.is_some()
    });
    let text = text.expect("the counters");
    names.map(|name| {
        let at = text.find(&format!("counter {name} ")).expect("the counter");
        let mut words = text[at..].split_whitespace().skip_while(|w| *w != "packets");
        words.nth(1).and_then(|n| n.parse().ok()).expect("a number")
    })
}

pub(crate) const BOTH: [&str; 2] = ["lan original", "wan reply"];
const PORTS: [&str; 4] = ["--port", "lan", "--port", "wan"];

#[test]
fn a_connection_is_offloaded_where_it_is_seen_and_its_rules_end_with_it() {
    let mut r = Router::new("life");
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    assert_eq!((r.rules("lan"), r.rules("wan")), (1, 1));
    // Ports need sockets: the soft limit of open files is the hard one.
    let limits = r.daemon.as_ref().map(|d| format!("/proc/{}/limits", d.id())).expect("a daemon");
    let limits = std::fs::read_to_string(limits).expect("its limits");
    let files = limits.lines().find_map(|l| l.strip_prefix("Max open files")).expect("a limit");
    let files: Vec<_> = files.split_whitespace().collect();
    assert!(files[0] == files[1] && files[0] != "1024", "{files:?}");
    c.close();
    wait_until("the rules are gone", || r.rules("lan") + r.rules("wan") == 0);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    c.ping();
    assert_eq!(r.run("tc qdisc show dev lan clsact; nft list tables"), "");
}

#[test]
fn rules_have_counters_per_processor_only_if_the_configuration_says_so() {
    let mut r = Router::new("percpu");
    for (tc_flower, without) in [("", 3), ("[tc-flower]\npercpu-stats = true\n", 0)] {
        r.start_with(&format!("{tc_flower}[[port]]\nmatch = \"?an\"\n"));
        let mut c = r.connect();
        r.wait_installed(&BOTH, &mut c);
        r.exchange_by_rules(&mut c, 10_000);
        // Of pedit, csum and mirred; the guards are none of the rule's actions.
        let shown = r.run("tc -s filter show dev lan ingress protocol ip pref 49412");
        assert_eq!(shown.matches("no_percpu").count(), without, "{shown}");
        assert_eq!(shown.matches("action order").count(), 3, "{shown}");
        assert!(!shown.contains("Sent 0 bytes"), "{shown}");
        c.close();
        assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    }
}

#[test]
fn conntrack_keeps_the_timeout_of_the_state_also_when_data_was_not_yet_acknowledged() {
    let mut r = Router::new("keep");
    r.start_with("[usage]\nsweep-seconds = 1\n[[port]]\nmatch = \"?an\"\n");
    // The entry as it is sighted has less time left than its state gives.
    r.run("sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_established=40");
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    r.run("sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_established=432000");
    wait_until("the timeout of an established connection is written", || {
        c.ping();
        let entry = r.run("conntrack -L -p tcp --dport 5001 2>/dev/null");
        let seconds = entry.split_whitespace().nth(2).and_then(|s| s.parse::<u64>().ok());
        seconds.is_some_and(|s| s > 400_000)
    });
}

#[test]
fn no_rule_keeps_sending_to_an_old_mac_address() {
    let mut r = Router::new("mac");
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    // The host moves to another MAC address, and the router hears of it.
    let host = r.host("wan");
    r.run(&format!("ip -n {host} link set e0 address 02:00:00:00:00:77"));
    r.run("ip neigh replace 10.2.0.2 lladdr 02:00:00:00:00:77 dev wan nud reachable");
    c.ping();
    r.wait_installed(&BOTH, &mut c);
    let rules = r.run("tc filter show dev lan ingress");
    assert_eq!(r.rules("lan"), 1, "{rules}");
    let conns = r.conns();
    let slots = conns[0]["slots"].as_array().expect("slots").clone();
    let lan = slots.iter().find(|s| s["port"] == "lan").expect("a slot on lan");
    assert_eq!(lan["dst_mac"], "02:00:00:00:00:77");
}

#[test]
fn a_netdev_that_goes_down_or_changes_its_mtu_takes_its_rules_along() {
    let mut r = Router::new("down");
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    r.run("ip link set wan down");
    wait_until("nothing redirects into wan", || r.rules("lan") == 0);
    r.run("ip link set wan up");
    r.wait_installed(&BOTH, &mut c);
    // Both ends of the cable, or what the host sends is lost on it.
    let cable = |r: &Router, mtu: u32| {
        let host = r.host("wan");
        r.run(&format!("ip -n {host} link set e0 mtu {mtu} && ip link set wan mtu {mtu}"))
    };
    cable(&r, 1400);
    let looks_at_the_length =
        |r: &Router| r.run("tc filter show dev lan ingress").contains("police");
    wait_until("the rule looks at the length", || {
        c.ping();
        looks_at_the_length(&r) && r.installed() == BOTH
    });
    c.exchange(200_000);
    cable(&r, 1500);
    wait_until("the rule need not any more", || {
        c.ping();
        !looks_at_the_length(&r) && r.installed() == BOTH
    });
}

#[test]
fn a_nexthop_object_that_changes_or_goes_takes_its_rules_along() {
    let mut r = Router::new("nexthop");
    let (wan, other) = (r.host("wan"), "02:00:00:00:99:99");
    r.run(&format!(
        "ip -n {wan} addr add 10.9.0.1/32 dev lo
         ip neigh add 10.2.0.3 lladdr {other} dev wan
         ip nexthop add id 7 via 10.2.0.2 dev wan
         ip route add 10.9.0.1/32 nhid 7"
    ));
    r.start(&PORTS);
    let mut c = r.connect_through("10.9.0.1:5001", "wan", "10.9.0.1:5001");
    // Whether the kernel tells of the routes as well, or of the object alone.
    for compat_mode in [1, 0] {
        r.run(&format!("sysctl -qw net.ipv4.nexthop_compat_mode={compat_mode}"));
        r.wait_installed(&BOTH, &mut c);
        r.run("ip nexthop replace id 7 via 10.2.0.3 dev wan");
        wait_until("no rule sends to the old one", || r.rules("lan") == 0);
        r.run("ip nexthop replace id 7 via 10.2.0.2 dev wan");
        r.wait_installed(&BOTH, &mut c);
        r.run("ip nexthop del id 7");
        assert_eq!(r.run("ip route show 10.9.0.1"), "", "the route is gone with it");
        wait_until("no rule goes on as if it were there", || r.rules("lan") == 0);
        r.run("ip nexthop add id 7 via 10.2.0.2 dev wan; ip route add 10.9.0.1/32 nhid 7");
    }
    r.wait_installed(&BOTH, &mut c);
}

#[test]
fn a_change_of_the_firewall_reaches_offloaded_connections() {
    let mut r = Router::new("wall");
    r.run("nft add table inet wall && nft 'add chain inet wall forward { type filter hook forward priority 0; }'");
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    r.run("nft add rule inet wall forward tcp dport 5001 drop");
    wait_until("the firewall stops it", || !c.is_alive());
    assert_eq!(r.rules("lan"), 0, "what the firewall drops is not offloaded again");
    r.run("nft flush chain inet wall forward");
    wait_until("it goes on", || c.is_alive());
    r.wait_installed(&BOTH, &mut c);
}

#[test]
fn conntrack_deletion_and_reappearance_of_a_port() {
    let mut r = Router::new("again");
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    r.run("conntrack -D -p tcp --dport 5001");
    wait_until("the rules are gone", || r.rules("lan") + r.rules("wan") == 0);
    // conntrack picks the connection up again in mid-stream, and so do we.
    r.wait_installed(&BOTH, &mut c);
    let generation = |r: &Router| r.port("wan")["generation"].as_u64().expect("a generation");
    let before = generation(&r);
    let deleted = r.cli(&["port", "del", "wan"]);
    assert!(deleted.status.success(), "{}", String::from_utf8_lossy(&deleted.stderr));
    assert_eq!(r.rules("wan"), 0);
    wait_until("nothing of ours is left on wan", || {
        r.run("tc qdisc show dev wan clsact").is_empty()
    });
    c.ping();
    let added = r.cli(&["port", "add", "wan"]);
    assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
    assert!(generation(&r) > before);
    r.wait_installed(&BOTH, &mut c);
}

#[test]
fn a_netdev_that_leaves_the_namespace_and_comes_back_is_a_port_again() {
    let mut r = Router::new("moved");
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    let before = r.port("wan")["generation"].as_u64();
    r.run("ip netns add moved-away && ip link set wan netns moved-away");
    wait_until("nothing redirects into it, and it is no port", || {
        r.rules("lan") == 0 && r.port("wan").is_null()
    });
    // (Ours has no name.)
    r.run("ip -n moved-away link set wan netns $$; ip netns del moved-away");
    r.run("ip addr add 10.2.0.1/24 dev wan && ip link set wan up");
    r.wait_installed(&BOTH, &mut c);
    assert!(r.port("wan")["generation"].as_u64() > before);
    r.exchange_by_rules(&mut c, 10_000);
}

#[test]
fn what_a_killed_daemon_left_is_removed_also_where_there_is_no_port_any_more() {
    let mut r = Router::new("killed");
    r.run("tc qdisc add dev lan clsact && tc filter add dev lan ingress pref 7 protocol ip flower dst_ip 192.0.2.9 action pass");
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    r.signal(Signal::SIGKILL);
    assert_eq!(r.rules("wan"), 1, "rules outlive the process");
    assert!(!r.run("nft list tables").contains("ctoffload"), "the ledger does not");
    c.ping();
    r.start(&["--port", "lan"]);
    wait_until("the rule on wan is gone", || r.rules("wan") == 0);
    assert_eq!(r.run("tc qdisc show dev wan clsact"), "");
    r.wait_installed(&["lan original"], &mut c);
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    let left = r.run("tc filter show dev lan ingress");
    assert!(left.contains("dst_ip 192.0.2.9") && r.rules("lan") == 1, "{left}");
}

#[test]
fn a_killed_daemons_rules_are_adopted_without_a_gap_or_removed_with_their_connection() {
    let mut r = Router::new("adopt");
    r.run("tc qdisc add dev lan clsact && tc filter add dev lan ingress pref 7 protocol ip flower dst_ip 192.0.2.9 action pass");
    // What the forward hook still sees of the connection.
    r.run("nft add table inet watch && nft add counter inet watch slow && nft 'add chain inet watch forward { type filter hook forward priority -10; }' && nft 'add rule inet watch forward tcp flags & (fin|syn|rst) == 0 counter name slow'");
    let slow_packets = |r: &Router| {
        let text = r.run("nft list counter inet watch slow");
        let words: Vec<_> = text.split_whitespace().map(str::to_owned).collect();
        let at = words.iter().position(|w| w == "packets").expect("a count");
        words[at + 1].parse::<u64>().expect("a number")
    };
    let marks = |r: &Router, dev: &str| {
        let text = r.run(&format!("tc filter show dev {dev} ingress"));
        let mut marks: Vec<_> = text
            .split_whitespace()
            .filter(|w| w.starts_with("c70f01") && !w[16..].starts_with("ffffffff"))
            .map(str::to_owned)
            .collect();
        marks.sort();
        marks
    };
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    r.exchange_by_rules(&mut c, 100);
    let (before, slow) = ((marks(&r, "lan"), marks(&r, "wan")), slow_packets(&r));
    assert_eq!((before.0.len(), before.1.len()), (1, 1));
    c.ping();
    r.signal(Signal::SIGKILL);
    c.ping();
    r.start(&PORTS);
    c.ping();
    // Not by a packet: by conntrack's entry.
    wait_until("both are adopted", || r.installed() == BOTH);
    c.ping();
    assert_eq!((marks(&r, "lan"), marks(&r, "wan")), before, "the very same rules");
    assert_eq!(slow_packets(&r), slow, "no packet took the slow path meanwhile");
    wait_until("their counters go on", || r.conns()[0]["packets"].as_u64().is_some_and(|n| n >= 8));
    let cookies = r.conns()[0]["slots"].clone();
    let cookies: Vec<_> =
        cookies.as_array().into_iter().flatten().map(|s| s["cookie"].clone()).collect();
    assert!(cookies.contains(&Value::from(before.0[0].clone())), "{cookies:?}, {before:?}");
    let done = r.json(&["reconcile"]);
    assert_eq!(done[0]["adopted"].as_u64(), Some(0), "{done}");
    assert_eq!(done[0]["foreign"].as_u64(), Some(1), "{done}");

    // The connection ends while nobody looks.
    r.signal(Signal::SIGKILL);
    r.run("conntrack -D -p tcp --dport 5001");
    r.start(&PORTS);
    wait_until("its rules are gone", || r.rules("lan") + r.rules("wan") == 1);
    assert_eq!(r.installed(), Vec::<String>::new());
    // It goes on all the same, in software and then by new rules.
    r.wait_installed(&BOTH, &mut c);
    assert!(marks(&r, "lan") != before.0);
    let kept = r.run("tc filter show dev lan ingress pref 7");
    assert!(kept.contains("dst_ip 192.0.2.9"), "{kept}");
    assert_eq!(r.cli(&["reconcile", "--port", "nosuch"]).status.code(), Some(5));
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    assert_eq!(r.rules("lan"), 1, "the foreign one");
}

#[test]
fn what_cannot_be_started_says_why_and_changes_nothing() {
    let mut r = Router::new("errors");
    let daemon = |args: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_ctoffloadd")).args(args).output().expect("ctoffloadd")
    };
    let text = |o: &Output| String::from_utf8_lossy(&o.stderr).into_owned();
    let file = std::env::temp_dir().join("ctoffload-errors.toml");
    std::fs::write(&file, "[usage]\nsweep-seconds = 0\n").expect("a file");
    let bad = daemon(&["--config", file.to_str().expect("a path")]);
    assert_eq!(bad.status.code(), Some(2));
    assert!(text(&bad).contains("line 2"), "{}", text(&bad));
    assert_eq!(r.run("nft list tables; tc qdisc show dev lan clsact"), "");
    let down = r.cli(&["stats"]);
    assert_eq!(down.status.code(), Some(3), "{}", text(&down));
    let filter = daemon(&["--log", "info=debug=trace"]);
    assert_eq!(filter.status.code(), Some(2), "{}", text(&filter));
    // Root, as in a container, and nobody.
    for user in ["--bounding-set -net_admin --inh-caps -net_admin", "--reuid 65534 --clear-groups"]
    {
        let weak = Command::new("setpriv")
            .args(user.split(' '))
            .args([env!("CARGO_BIN_EXE_ctoffloadd"), "--port", "lan"])
            .output()
            .expect("setpriv");
        assert_eq!(weak.status.code(), Some(4), "{user}: {}", text(&weak));
        assert!(text(&weak).contains("CAP_NET_ADMIN"), "{user}: {}", text(&weak));
    }
    assert_eq!(r.run("nft list tables; tc qdisc show dev lan clsact"), "");

    r.start(&["--port", "lan"]);
    let second = daemon(&["--port", "wan"]);
    assert_eq!(second.status.code(), Some(3), "{}", text(&second));
    assert_eq!(r.run("tc qdisc show dev wan clsact"), "");
    assert_eq!(r.cli(&["port", "add", "nosuch"]).status.code(), Some(5));
    assert_eq!(r.cli(&["port", "add", "lan"]).status.code(), Some(6));
    assert_eq!(r.cli(&["port", "del", "wan"]).status.code(), Some(5));
    // No class takes a netdev that is not Ethernet: it does not become a port.
    let declined = r.cli(&["port", "add", "lo"]);
    assert_eq!(declined.status.code(), Some(7), "{}", text(&declined));
    assert!(text(&declined).contains("tc-flower declined"), "{}", text(&declined));
    let unknown = r.cli(&["port", "add", "wan", "--provider", "tc-flour"]);
    assert!(
        !unknown.status.success() && text(&unknown).contains("tc-flower"),
        "{}",
        text(&unknown)
    );
    assert_eq!(r.ports().len(), 1);
}
