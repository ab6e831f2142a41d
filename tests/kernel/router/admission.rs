//! The admission policy: what the configuration keeps on the slow path stays there and says why, and
//! everything else is offloaded.

use super::*;

/// A connection to an address of the host behind `wan`, at a port of its own.
fn connect(r: &Router, to: &str) -> Connection {
    let to: SocketAddr = to.parse().expect("an address");
    let (ready, listening) = mpsc::channel();
    let server = in_netns(r.host("wan"), move || {
        let listener = TcpListener::bind(to).expect("bind");
        ready.send(()).expect("ready");
        let (mut stream, _) = listener.accept().expect("accept");
        let mut byte = [0];
        while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
    });
    listening.recv().expect("the server listens");
    let stream = in_netns(r.host("lan"), move || {
        TcpStream::connect_timeout(&to, PATIENCE).expect("connect")
    })
    .join()
    .expect("the client connects");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    Connection { stream, server: Some(server) }
}

/// `ctoffload explain`, as a person asks it.
fn explain(r: &Router, c: &Connection) -> (Option<i32>, String) {
    let ends = [c.stream.local_addr(), c.stream.peer_addr()];
    let [from, to] = ends.map(|a| a.expect("an address").to_string());
    let out = r.cli(&["explain", "tcp", &from, &to]);
    let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    (out.status.code(), text)
}

/// How often each port has refused something by the policy: `lan`, `wan`.
fn refused(r: &Router) -> [u64; 2] {
    ["lan", "wan"].map(|port| {
        let reasons = r.port(port)["reasons"].as_array().cloned().unwrap_or_default();
        let ours = reasons.iter().find(|c| c["reason"] == "not-admitted");
        ours.and_then(|c| c["count"].as_u64()).unwrap_or(0)
    })
}

#[test]
fn an_excluded_server_stays_on_the_slow_path_and_explain_names_the_rule() {
    let mut r = Router::new("admit");
    let host = r.host("wan");
    r.run(&format!("ip -n {host} addr add 10.2.0.3/24 dev e0"));
    r.start_with(
        "\
[[port]]
match = \"?an\"

# Not reached: another netdev.
[[admit]]
verdict = \"never\"
netdev = \"eth*\"

[[admit]]
verdict = \"never\"
destination = [\"192.0.2.0/24\", \"10.2.0.3\"]
destination-ports = [\"6000-6999\"]
",
    );
    let mut excluded = connect(&r, "10.2.0.3:6001");
    wait_until("both directions are refused", || {
        excluded.ping();
        refused(&r) == [1, 1]
    });
    let slot = |port: &str, direction: &str| {
        [port, direction, "rejected", "not-admitted"].map(str::to_owned).into()
    };
    assert_eq!(r.slots(), [slot("lan", "original"), slot("wan", "reply")]);
    let (status, text) = explain(&r, &excluded);
    assert_eq!(status, Some(11), "{text}");
    let why = "[[admit]] rule 2, line 10 of the configuration says never";
    assert!(text.lines().next().is_some_and(|line| line.contains(why)), "{text}");
    let in_words = format!("in words    \"{why}\"");
    assert_eq!(text.matches(&in_words).count(), 2, "{text}");
    let stats = String::from_utf8(r.cli(&["stats"]).stdout).expect("text");
    assert!(stats.contains("not-admitted"), "{stats}");

    // The same server at another port, and another server at the same port, are offloaded.
    for to in ["10.2.0.3:7001", "10.2.0.2:6001"] {
        let mut other = connect(&r, to);
        r.wait_installed(&BOTH, &mut other);
        other.close();
        wait_until("its rules are gone", || r.rules("lan") + r.rules("wan") == 0);
    }
    // Decided once: packets do not ask again, a flush does.
    for _ in 0..10 {
        excluded.ping();
    }
    assert_eq!(refused(&r), [1, 1]);
    assert!(r.cli(&["flush", "--all"]).status.success());
    wait_until("both directions are refused again", || {
        excluded.ping();
        refused(&r) == [2, 2]
    });
    assert_eq!((r.rules("lan"), r.rules("wan")), (0, 0));
    // Nor has anything been done to it in conntrack: its windows are checked as before.
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    excluded.ping();
}

/// Bytes that conntrack has counted of the connection to a port, both directions; `None`: it does
/// not count them.
fn counted(r: &Router, port: u16) -> Option<u64> {
    let entry = r.run(&format!("conntrack -L -p tcp --orig-port-dst {port} 2>/dev/null"));
    let numbers = entry.split_whitespace().filter_map(|w| w.strip_prefix("bytes="));
    let numbers: Vec<u64> = numbers.map(|n| n.parse().expect("a number")).collect();
    (!numbers.is_empty()).then(|| numbers.iter().sum())
}

#[test]
fn a_connection_is_offloaded_only_after_min_bytes() {
    const MIN: u64 = 20_000;
    let mut r = Router::new("bytes");
    // Conntrack, without accounting, and a connection of that time.
    r.run("nft add table inet early && nft 'add chain inet early c { type filter hook forward priority 0; }' && nft add rule inet early c ct state invalid accept");
    assert_eq!(r.run("sysctl -n net.netfilter.nf_conntrack_acct").trim(), "0");
    let mut old = connect(&r, "10.2.0.2:6001");
    old.ping();
    assert_eq!(counted(&r, 6001), None);
    r.start_with(&format!("[[port]]\nmatch = \"?an\"\n[admission]\nmin-bytes = {MIN}\n"));
    assert_eq!(r.run("sysctl -n net.netfilter.nf_conntrack_acct").trim(), "1");

    let mut c = connect(&r, "10.2.0.2:6002");
    let sights = |r: &Router| r.stats()["sights"].as_u64().expect("a number");
    let mut below = 0;
    loop {
        for _ in 0..8 {
            c.ping();
        }
        // In this order: what is sighted has carried enough before.
        let sighted = sights(&r) > 0;
        let now = counted(&r, 6002).expect("counted");
        if sighted {
            assert!(now >= MIN, "sighted after {now} bytes");
            break;
        }
        if now < MIN {
            below = now;
        }
        if now < MIN / 2 {
            let (status, text) = explain(&r, &c);
            assert_eq!(status, Some(11), "{text}");
            assert!(text.contains("it takes 20000 (min-bytes)"), "{text}");
        }
    }
    assert!(below > MIN / 4, "not sighted while it had carried {below} bytes");
    r.wait_installed(&BOTH, &mut c);

    // Older than its counters: to the policy it has carried nothing.
    for _ in 0..150 {
        old.ping();
    }
    assert_eq!(counted(&r, 6001), None);
    assert_eq!(r.conns().as_array().map(Vec::len), Some(1));
    // After a flush what it has carried still counts.
    assert!(r.cli(&["flush", "--all"]).status.success());
    r.wait_installed(&BOTH, &mut c);
}

/// Packets that conntrack has counted of the connection to a port, both directions.
fn packets(r: &Router, port: u16) -> Option<u64> {
    let entry = r.run(&format!("conntrack -L -p tcp --orig-port-dst {port} 2>/dev/null"));
    let numbers = entry.split_whitespace().filter_map(|w| w.strip_prefix("packets="));
    let numbers: Vec<u64> = numbers.map(|n| n.parse().expect("a number")).collect();
    (!numbers.is_empty()).then(|| numbers.iter().sum())
}

#[test]
fn a_connection_is_offloaded_only_after_min_packets() {
    const MIN: u64 = 60;
    let mut r = Router::new("packets");
    // Conntrack, without accounting, and a connection of that time.
    r.run("nft add table inet early && nft 'add chain inet early c { type filter hook forward priority 0; }' && nft add rule inet early c ct state invalid accept");
    assert_eq!(r.run("sysctl -n net.netfilter.nf_conntrack_acct").trim(), "0");
    let mut old = connect(&r, "10.2.0.2:6001");
    old.ping();
    r.start_with(&format!("[[port]]\nmatch = \"?an\"\n[admission]\nmin-packets = {MIN}\n"));
    assert_eq!(r.run("sysctl -n net.netfilter.nf_conntrack_acct").trim(), "1");
    // What is not counted is older than this, and not short.
    r.wait_installed(&BOTH, &mut old);
    assert_eq!(packets(&r, 6001), None);
    old.close();
    wait_until("it has ended", || r.installed().is_empty());

    let sights = |r: &Router| r.stats()["sights"].as_u64().expect("a number");
    let before = sights(&r);
    let mut c = connect(&r, "10.2.0.2:6002");
    let mut below = 0;
    loop {
        c.ping();
        // In this order: what is sighted has had enough before.
        let sighted = sights(&r) > before;
        let now = packets(&r, 6002).expect("counted");
        if sighted {
            assert!(now >= MIN, "sighted after {now} packets");
            break;
        }
        assert!(now < MIN + 10, "not sighted after {now} packets");
        if now < MIN {
            below = now;
        }
        if now < MIN / 2 {
            let (status, text) = explain(&r, &c);
            assert_eq!(status, Some(11), "{text}");
            assert!(text.contains("it takes 60 (min-packets)"), "{text}");
        }
    }
    assert!(below > MIN / 4, "not sighted while it had had {below} packets");
    r.wait_installed(&BOTH, &mut c);
    // After a flush what it has had still counts.
    assert!(r.cli(&["flush", "--all"]).status.success());
    r.wait_installed(&BOTH, &mut c);
}

/// Questions with an answer each are not for offload; what goes on is.
#[test]
fn short_flows_stay_in_software_by_default_and_long_ones_do_not() {
    let mut r = Router::new("short");
    r.start_with(&format!(
        "[[port]]\nmatch = \"?an\"\n[admission]\nmin-packets = {}\n",
        ctoffload::datapath::MIN_PACKETS
    ));
    for n in 0..20 {
        let mut c = connect(&r, &format!("10.2.0.2:{}", 6100 + n));
        c.ping();
        c.ping();
        c.close();
    }
    assert_eq!(r.stats()["sights"].as_u64(), Some(0));
    let mut c = connect(&r, "10.2.0.2:6001");
    r.wait_installed(&BOTH, &mut c);
    r.exchange_by_rules(&mut c, 50_000);
}

fn set_tos(stream: &TcpStream, tos: libc::c_int) {
    let fd = std::os::fd::AsRawFd::as_raw_fd(stream);
    // SAFETY: the option is an int, which lives through the call.
    let set =
        unsafe { libc::setsockopt(fd, libc::IPPROTO_IP, libc::IP_TOS, (&raw const tos).cast(), 4) };
    assert_eq!(set, 0, "IP_TOS");
}

/// What the firewall writes on connections and packets chooses, and chooses again when it changes.
#[test]
fn marks_labels_and_dscp_choose_and_a_change_of_them_chooses_anew() {
    let mut r = Router::new("admit-marks");
    r.run(
        "nft 'table inet fw {
           chain f { type filter hook forward priority 0; tcp dport 6001 ct mark set 0x17; ip dscp af11 ct mark set 0x1f; }
         }'",
    );
    r.start_with(
        "\
[admission]
default = \"never\"

[[port]]
match = \"?an\"

[[admit]]
verdict = \"offload\"
ct-mark = \"0x10/0xf0\"

[[admit]]
verdict = \"offload\"
ct-label = \"0x8/0x8\"

[[admit]]
verdict = \"offload\"
dscp = [\"ef\"]
",
    );
    let port_of = |c: &Connection| c.stream.peer_addr().expect("an address").port();
    let slots = |r: &Router, c: &Connection| -> Vec<String> {
        let conns = r.conns();
        let its = conns.as_array().cloned().unwrap_or_default();
        let its =
            its.into_iter().find(|k| k["original"]["dport"] == port_of(c)).unwrap_or_default();
        let mut states: Vec<_> = its["slots"].as_array().cloned().unwrap_or_default();
        states.retain(|s| s["state"] == "installed");
        states
            .iter()
            .map(|s| format!("{} {}", s["port"], s["direction"]).replace('"', ""))
            .collect()
    };
    let wait = |r: &Router, c: &mut Connection, want: &[&str]| {
        wait_until(&format!("{want:?} of port {}", port_of(c)), || {
            c.ping();
            slots(r, c) == want
        });
    };
    let [mut marked, mut plain] =
        ["6001", "6003"].map(|port| connect(&r, &format!("10.2.0.2:{port}")));
    wait(&r, &mut marked, &BOTH);
    wait_until("the other is refused", || {
        plain.ping();
        explain(&r, &plain).1.contains("no [[admit]] rule matches, and the default says never")
    });
    // A mark comes, by a packet that the firewall knows it by, and goes.
    set_tos(&plain.stream, 10 << 2);
    wait(&r, &mut plain, &BOTH);
    set_tos(&plain.stream, 0);
    r.run("conntrack -U -p tcp -s 10.1.0.2 -d 10.2.0.2 --dport 6003 --mark 47");
    wait(&r, &mut plain, &[]);
    wait_until("it says why", || {
        plain.ping();
        explain(&r, &plain).1.contains("the default says never")
    });
    // By the DSCP of packets, each direction its own. What was refused is looked at anew when somebody flushes.
    r.run("nft add rule inet fw f tcp dport 6003 ip dscp set ef");
    wait(&r, &mut plain, &["lan original"]);
    wait(&r, &mut marked, &BOTH);
    // Labels: of connections that are new since there is a rule for them.
    r.run("nft add rule inet fw f tcp dport 6002 ct label set 3");
    let mut labelled = connect(&r, "10.2.0.2:6002");
    wait(&r, &mut labelled, &BOTH);
}
