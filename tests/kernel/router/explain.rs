//! `ctoffload explain` finds the cause: each of these is made, and must be told by its name, in a sentence that is no
//! other's, with the exit code that says how far the connection is offloaded.

use std::net::UdpSocket;

use super::*;

const OFFLOADED: i32 = 0;
const GONE: i32 = 5;
pub(super) const PARTLY: i32 = 10;
pub(super) const NOT: i32 = 11;

/// The exit code, the cause and the sentence.
pub(super) fn why(r: &Router, words: &[&str]) -> (i32, String, String) {
    let out = r.cli(&[&["-j", "explain"], words].concat());
    let code = out.status.code().expect("an exit code");
    let words = String::from_utf8_lossy(&out.stderr).into_owned();
    let json: Value = serde_json::from_slice(&out.stdout).expect(&words);
    let of = |key: &str| json["summary"][key].as_str().unwrap_or_default().to_owned();
    (code, of("cause"), of("sentence"))
}

/// Waits until a connection is explained so; returns the sentence.
pub(super) fn wait_why(r: &Router, words: &[&str], code: i32, cause: &str) -> String {
    let mut last = None;
    wait_until(&format!("{words:?}: {cause}, exit code {code}"), || {
        let now = why(r, words);
        if last.as_ref() != Some(&now) {
            println!("{words:?}: {now:?}");
        }
        let done = (now.0, now.1.as_str()) == (code, cause);
        last = Some(now);
        done
    });
    last.expect("it was asked").2
}

/// As the CLI takes it.
pub(super) fn tuple(c: &Connection) -> [String; 3] {
    let [from, to] =
        [c.stream.local_addr(), c.stream.peer_addr()].map(|a| a.expect("an address").to_string());
    ["tcp".to_owned(), from, to]
}

pub(super) fn words(tuple: &[String; 3]) -> [&str; 3] {
    [&tuple[0], &tuple[1], &tuple[2]]
}

const CONFIG: &str =
    "[usage]\nsweep-seconds = 1\n[[port]]\nmatch = \"?an\"\nproviders = [\"ebpf\"]\n";

/// A router whose daemon has this configuration, and a connection with rules in both directions.
fn offloaded(test: &str, config: &str) -> (Router, Connection) {
    let mut r = Router::new(test);
    r.start_with(config);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    (r, c)
}

#[test]
fn without_ports_and_without_the_connection() {
    let mut r = Router::new("why-none");
    r.start_with("");
    let mut c = r.connect();
    c.ping();
    let of = tuple(&c);
    wait_why(&r, &words(&of), NOT, "no-ports");
    r.signal(Signal::SIGTERM);
    r.start_with(CONFIG);
    wait_why(&r, &["tcp", "10.1.0.2:1", "10.2.0.2:2"], GONE, "no-entry");
    // It is there, and silent since before the start.
    wait_why(&r, &words(&of), NOT, "waiting");
    // One of its netdevs is no port, or is one without a provider.
    assert!(r.cli(&["port", "del", "wan"]).status.success());
    r.wait_installed(&["lan original"], &mut c);
    let told = wait_why(&r, &words(&of), PARTLY, "no-port");
    assert!(told.contains("arrive on wan, which is no port"), "{told}");
    assert!(r.cli(&["port", "add", "wan", "--provider", "none"]).status.success());
    wait_why(&r, &words(&of), PARTLY, "no-provider");
    // The router's own connections.
    let server = TcpListener::bind("10.1.0.1:7000").expect("bind");
    let client = in_netns(r.host("lan"), || TcpStream::connect("10.1.0.1:7000").expect("connect"));
    let (_accepted, peer) = server.accept().expect("accept");
    let _client = client.join().expect("the client");
    wait_why(&r, &["tcp", &peer.to_string(), "10.1.0.1:7000"], NOT, "to-router");
    let (ready, listening) = mpsc::channel();
    let far = in_netns(r.host("wan"), move || {
        let listener = TcpListener::bind("10.2.0.2:7001").expect("bind");
        ready.send(()).expect("ready");
        listener.accept().expect("accept")
    });
    listening.recv().expect("it listens");
    let own = TcpStream::connect("10.2.0.2:7001").expect("connect");
    let _far = far.join().expect("the server");
    let from = own.local_addr().expect("an address").to_string();
    wait_why(&r, &["tcp", &from, "10.2.0.2:7001"], NOT, "from-router");
}

#[test]
fn before_it_can_be_offloaded() {
    let mut r = Router::new("why-young");
    r.start_with(&format!("{CONFIG}[admission]\nmin-packets = 1000\n"));
    let mut c = r.connect();
    c.ping();
    let of = tuple(&c);
    let told = wait_why(&r, &words(&of), NOT, "few-packets");
    assert!(told.contains("it takes 1000 (min-packets)"), "{told}");
    // Nobody answers.
    let from = in_netns(r.host("lan"), || {
        let socket = UdpSocket::bind("10.1.0.2:7002").expect("bind");
        for _ in 0..3 {
            socket.send_to(b"x", "10.2.0.2:7002").expect("sent");
        }
    });
    from.join().expect("sent");
    wait_why(&r, &["udp", "10.1.0.2:7002", "10.2.0.2:7002"], NOT, "one-way");
    // The handshake is not answered.
    let far = r.host("wan");
    r.run(&format!("ip netns exec {far} nft 'add table ip t; add chain ip t c {{ type filter hook input priority 0; }}; add rule ip t c tcp dport 7003 drop'"));
    let client = in_netns(r.host("lan"), || {
        let socket = unwaiting("10.1.0.2:7003");
        let to: std::net::SocketAddrV4 = "10.2.0.2:7003".parse().expect("an address");
        let to = nix::sys::socket::SockaddrIn::from(to);
        let _ = nix::sys::socket::connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &to);
        socket
    });
    let _socket = client.join().expect("the client");
    let told = wait_why(&r, &["tcp", "10.1.0.2:7003", "10.2.0.2:7003"], NOT, "opening");
    assert!(told.contains("SYN_SENT"), "{told}");

    r.signal(Signal::SIGTERM);
    r.start_with(&format!("{CONFIG}[admission]\nmin-packets = 0\nmin-bytes = 1000000\n"));
    let told = wait_why(&r, &words(&of), NOT, "few-bytes");
    assert!(told.contains("it takes 1000000 (min-bytes)"), "{told}");
}

/// A TCP socket that does not wait.
fn unwaiting(at: &str) -> std::os::fd::OwnedFd {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, socket};
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_NONBLOCK, None)
        .expect("a socket");
    let at: std::net::SocketAddrV4 = at.parse().expect("an address");
    bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &SockaddrIn::from(at)).expect("bind");
    socket
}

#[test]
fn a_connection_that_nobody_has_counted() {
    let mut r = Router::new("why-old");
    r.run("nft add table inet early && nft 'add chain inet early c { type filter hook forward priority 0; }' && nft add rule inet early c ct state invalid accept");
    assert_eq!(r.run("sysctl -n net.netfilter.nf_conntrack_acct").trim(), "0");
    let mut c = r.connect();
    c.ping();
    r.start_with(&format!("{CONFIG}[admission]\nmin-packets = 0\nmin-bytes = 1000\n"));
    c.ping();
    wait_why(&r, &words(&tuple(&c)), NOT, "not-counted");
}

#[test]
fn any_tuple_of_a_connection_is_its_name() {
    let mut r = Router::new("why-nat");
    r.run("nft 'add table ip nat; add chain ip nat post { type nat hook postrouting priority 100; }; add rule ip nat post oifname wan masquerade'");
    r.start_with(CONFIG);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    let [_, from, to] = tuple(&c);
    let reply = r.conns()[0]["reply"].clone();
    let end = |a: &str, p: &str| format!("{}:{}", reply[a].as_str().expect("an address"), reply[p]);
    let (answers_from, answers_to) = (end("src", "sport"), end("dst", "dport"));
    assert_ne!(answers_to, from, "it is translated");
    let pairs =
        [[&from, &to], [&to, &from], [&answers_from, &answers_to], [&answers_to, &answers_from]];
    for [a, b] in pairs {
        let (code, cause, told) = why(&r, &["tcp", a, b]);
        assert_eq!((code, cause.as_str()), (OFFLOADED, ""), "{a} {b}: {told}");
        assert_eq!(told, "offloaded in both directions: original on lan, reply on wan");
    }
    let line = r.run("conntrack -L -p tcp --dport 5001 2>/dev/null");
    assert_eq!(why(&r, &[line.trim()]).0, OFFLOADED, "{line}");
    let dump = format!(
        "IP {} > {}: Flags [P.], length 1",
        answers_to.replace(':', "."),
        to.replace(':', ".")
    );
    assert_eq!(why(&r, &[&dump]).0, OFFLOADED, "{dump}");
    let told = String::from_utf8(r.cli(&["explain", "tcp", &from, &to]).stdout).expect("text");
    assert!(
        told.starts_with("offloaded in both directions: original on lan, reply on wan.\n"),
        "{told}"
    );
}

#[test]
fn what_was_taken_back_and_why() {
    let (r, mut c) = offloaded("why-taken", CONFIG);
    let of = tuple(&c);
    // The cause is made, and the connection is silent meanwhile. (It goes with the first change of two.)
    for (cause, make, unmake) in [
        ("flushed", "", ""),
        (
            "firewall-changed",
            "nft 'add table inet t; add chain inet t c { type filter hook forward priority 0; }; add rule inet t c counter'",
            "nft delete table inet t",
        ),
        ("mark-changed", "conntrack -U -p tcp --dport 5001 --mark 7", ""),
        (
            "route-changed",
            "ip route add prohibit 10.2.0.2; ip route add prohibit 10.1.0.2",
            "ip route del prohibit 10.2.0.2; ip route del prohibit 10.1.0.2",
        ),
        (
            "forwarding-switched",
            "sysctl -qw net.ipv4.ip_forward=0",
            "sysctl -qw net.ipv4.ip_forward=1",
        ),
    ] {
        if make.is_empty() {
            assert!(r.cli(&["flush", "--all"]).status.success());
        } else {
            let out = r.try_run(make);
            let words = String::from_utf8_lossy(&out.stderr).into_owned();
            if cause == "mark-changed" && words.contains("Operation not supported") {
                println!("not checked: on this kernel nobody can change a connection's mark");
                continue;
            }
            assert!(out.status.success(), "{make}: {words}");
        }
        let told = wait_why(&r, &words(&of), NOT, cause);
        assert!(told.contains("its rules on lan and wan were taken back"), "{told}");
        if !unmake.is_empty() {
            r.run(unmake);
        }
        r.wait_installed(&BOTH, &mut c);
        assert_eq!(why(&r, &words(&of)).0, OFFLOADED);
    }
    // Of a netdev that goes down its own rules go, and those that lead there.
    r.run("ip link set wan down");
    let told = wait_why(&r, &words(&of), NOT, "egress-gone");
    assert!(told.contains("went down, or went"), "{told}");
}

#[test]
fn what_has_ended() {
    let (r, c) = offloaded("why-ended", CONFIG);
    let of = tuple(&c);
    r.run("sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_time_wait=3 net.netfilter.nf_conntrack_tcp_timeout_last_ack=3 net.netfilter.nf_conntrack_tcp_timeout_close_wait=3");
    c.close();
    let told = wait_why(&r, &words(&of), NOT, "closing");
    assert!(told.contains("conntrack has it as"), "{told}");
    wait_why(&r, &words(&of), GONE, "closed");
    let mut c = r.connect_to(5002);
    r.wait_installed(&BOTH, &mut c);
    r.run("conntrack -D -p tcp --dport 5002 2>/dev/null");
    wait_why(&r, &words(&tuple(&c)), GONE, "ended");
}

#[test]
fn what_is_refused_or_has_no_place() {
    let config = format!(
        "{CONFIG}capacity = 1\n[admission]\nmin-packets = 0\n[[admit]]\nverdict = \"never\"\ndestination-ports = [5003]\n[limits]\nconnections = 3\n"
    );
    let (r, mut first) = offloaded("why-refused", &config);
    let mut second = r.connect_to(5002);
    second.ping();
    let of = tuple(&second);
    wait_until("it is refused", || {
        // Who is silent gives its place away.
        first.ping();
        second.ping();
        why(&r, &words(&of)).1 == "table-full"
    });
    let told = String::from_utf8(r.cli(&["explain", &of[0], &of[1], &of[2]]).stdout).expect("text");
    assert!(told.contains("raise the capacity of [[port]] for "), "{told}");
    let mut third = r.connect_to(5003);
    third.ping();
    let told = wait_why(&r, &words(&tuple(&third)), NOT, "not-admitted");
    assert!(told.contains("[[admit]] rule 1"), "{told}");
    let mut fourth = r.connect_to(5004);
    let of = tuple(&fourth);
    wait_until("there is no room for it", || {
        fourth.ping();
        why(&r, &words(&of)).1 == "conn-table-full"
    });
    assert_eq!(why(&r, &words(&of)).0, NOT);
}

#[test]
fn what_conntrack_does_not_track_and_what_a_helper_reads() {
    let mut r = Router::new("why-helper");
    r.run(
        "nft 'table ip raw { chain p { type filter hook prerouting priority -300; tcp dport 5005 notrack; tcp sport 5005 notrack; }; }'
         nft 'table ip h { ct helper ftp { type \"ftp\" protocol tcp; }; chain p { type filter hook prerouting priority 0; tcp dport 5006 ct helper set \"ftp\"; }; }'",
    );
    r.start_with(&format!("{CONFIG}[admission]\nmin-packets = 0\n"));
    let mut untracked = r.connect_to(5005);
    let mut read = r.connect_to(5006);
    let mut other = r.connect_to(5007);
    r.wait_installed(&BOTH, &mut other);
    untracked.ping();
    read.ping();
    let told = wait_why(&r, &words(&tuple(&untracked)), GONE, "no-entry");
    assert!(told.contains("is not tracked (notrack)"), "{told}");
    let told = wait_why(&r, &words(&tuple(&read)), NOT, "helper");
    assert!(told.contains("a conntrack helper reads what it carries"), "{told}");
}

#[test]
fn what_is_not_sighted_because_the_ledger_is_full() {
    let mut r = Router::new("why-ledger");
    r.start_with(&format!("{CONFIG}[sight]\nledger-size = 16\n[admission]\nmin-packets = 0\n"));
    // Two elements each.
    let mut offloaded: Vec<Connection> = (0..8).map(|n| r.connect_to(5010 + n)).collect();
    for c in &mut offloaded {
        let of = tuple(c);
        wait_until("it is offloaded", || {
            c.ping();
            why(&r, &words(&of)).0 == OFFLOADED
        });
    }
    let mut late = r.connect_to(5020);
    late.ping();
    let told = wait_why(&r, &words(&tuple(&late)), NOT, "ledger-full");
    assert!(told.contains("(16 elements)"), "{told}");
}

/// What bridges forward has an entry where netfilter is shown it (by a module that asks in every namespace).
#[test]
fn alone_what_a_bridge_forwards() {
    let mut r = Router::new("why-bridged");
    let host = r.host("lan");
    r.run(&format!(
        "[ -e /proc/sys/net/bridge/bridge-nf-call-iptables ] || modprobe br_netfilter
         sysctl -qw net.bridge.bridge-nf-call-iptables=1
         ip addr flush dev lan; ip addr flush dev wan
         ip link add br0 type bridge && ip link set br0 up && ip addr add 10.2.0.1/24 dev br0
         ip link set lan master br0 && ip link set wan master br0
         ip -n {host} addr flush dev e0 && ip -n {host} addr add 10.2.0.3/24 dev e0"
    ));
    r.start_with(&format!("{CONFIG}[admission]\nmin-packets = 0\n"));
    let mut c = r.connect();
    c.ping();
    let told = wait_why(&r, &words(&tuple(&c)), NOT, "bridged");
    assert!(told.contains("both ends are behind bridge br0"), "{told}");
}
