//! Ends and lives of connections, as conntrack has them: as long as it would without us.

use std::net::UdpSocket;

use super::*;

/// A sweep each second.
const SWEPT: &str =
    "[[port]]\nmatch = \"lan\"\n[[port]]\nmatch = \"wan\"\n[usage]\nsweep-seconds = 1\n";
const BOTH: [&str; 2] = ["lan original", "wan reply"];

impl Router {
    /// Lines of `conntrack -L` of a protocol: state (of TCP), seconds left, and all of it.
    fn entries(&self, proto: &str) -> Vec<(String, u64, String)> {
        let out = self.run(&format!("conntrack -L -p {proto} 2>/dev/null"));
        out.lines()
            .map(|l| {
                let words: Vec<_> = l.split_whitespace().collect();
                let state = if proto == "tcp" { words[3] } else { "" };
                (state.to_owned(), words[2].parse().expect("seconds"), l.to_owned())
            })
            .collect()
    }

    /// The only one.
    fn entry(&self, proto: &str) -> Option<(String, u64, String)> {
        let mut entries = self.entries(proto);
        assert!(entries.len() <= 1, "{entries:#?}");
        entries.pop()
    }
}

#[test]
fn router_an_aborted_connection_ends_as_it_would_without_us() {
    let mut router = Router::new("abort");
    router.start_with(SWEPT);
    for n in 0..10 {
        let mut c = router.connect_to(5100 + n);
        router.wait_installed(&BOTH, &mut c);
        c.exchange(1 << 18);
        // Half of them after a sweep has looked at what was carried.
        std::thread::sleep(Duration::from_millis(300 * u64::from(n % 8)));
        c.exchange(1 << 16);
        c.abort();
        wait_until("its rules are gone", || {
            let gone = router.installed().is_empty();
            if !gone {
                println!("connection {n}: {:?}, {:?}", router.entry("tcp"), router.slots());
            }
            gone
        });
        let entry = router.entry("tcp");
        let left = entry.as_ref().map(|e| e.1);
        assert!(left.is_none_or(|s| s <= 10), "{entry:?}");
        router.run("conntrack -F 2>/dev/null");
    }
}

#[test]
fn router_a_forged_reset_costs_a_moment_in_software() {
    let mut router = Router::new("forged");
    router.start_with(SWEPT);
    let mut c = router.connect();
    router.wait_installed(&BOTH, &mut c);
    std::thread::sleep(Duration::from_secs(2));
    // Far from any sequence number that it can have; conntrack cannot know.
    let port = c.stream.local_addr().expect("an address").port();
    let forge = format!(
        "import socket, struct
src, dst = socket.inet_aton('10.1.0.2'), socket.inet_aton('10.2.0.2')
def seg(sum):
    return struct.pack('>HHIIBBHHH', {port}, 5001, 0x12345678, 0, 5 << 4, 4, 0, sum, 0)
data = src + dst + struct.pack('>BBH', 0, 6, 20) + seg(0)
sum = sum(struct.unpack('>16H', data))
sum = (sum & 0xffff) + (sum >> 16); sum = (sum & 0xffff) + (sum >> 16)
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 6)
s.sendto(seg(~sum & 0xffff), ('10.2.0.2', 0))"
    );
    let file = std::env::temp_dir().join("ctoffload-forge.py");
    std::fs::write(&file, forge).expect("a file");
    router.run(&format!("ip netns exec {} python3 {}", router.host("lan"), file.display()));
    wait_until("conntrack takes it for closed", || {
        router.entry("tcp").is_some_and(|e| e.0 == "CLOSE")
    });
    router.wait_installed(&BOTH, &mut c);
    wait_until("its entry lives as before", || {
        c.ping();
        router.entry("tcp").is_some_and(|e| e.0 == "ESTABLISHED" && e.1 > 400_000)
    });
}

#[test]
fn router_no_closed_connection_keeps_a_long_timeout() {
    let mut router = Router::new("churn");
    router.start_with(SWEPT);
    let until = Instant::now() + Duration::from_secs(45);
    let (lan, wan) = (router.host("lan"), router.host("wan"));
    let server = in_netns(wan, move || {
        let listener = TcpListener::bind("10.2.0.2:5000").expect("bind");
        listener.set_nonblocking(true).expect("non-blocking");
        while Instant::now() < until + Duration::from_secs(2) {
            let Ok((mut s, _)) = listener.accept() else {
                std::thread::sleep(Duration::from_millis(5));
                continue;
            };
            s.set_nonblocking(false).expect("blocking");
            std::thread::spawn(move || {
                let mut buf = [0; 4096];
                while let Ok(n @ 1..) = s.read(&mut buf) {
                    let _ = s.write_all(&buf[..n]);
                }
            });
        }
    });
    std::thread::sleep(Duration::from_millis(500));
    let clients: Vec<_> = (0..12u64)
        .map(|n| {
            in_netns(lan.clone(), move || {
                let mut closed = 0;
                while Instant::now() < until {
                    let Ok(mut s) = TcpStream::connect("10.2.0.2:5000") else { continue };
                    s.set_read_timeout(Some(PATIENCE)).expect("a time-out");
                    for _ in 0..6 {
                        s.write_all(&[7; 200]).expect("there");
                        s.read_exact(&mut [0; 200]).expect("and back");
                        std::thread::sleep(Duration::from_millis(90 + n));
                    }
                    closed += 1;
                }
                closed
            })
        })
        .collect();
    let closed: u32 = clients.into_iter().map(|c| c.join().expect("a client")).sum();
    server.join().expect("the server");
    assert!(closed > 200, "{closed}");
    let long: Vec<_> =
        router.entries("tcp").into_iter().filter(|e| e.0 != "ESTABLISHED" && e.1 > 120).collect();
    assert_eq!(long.len(), 0, "of {closed}: {long:#?}");
}

/// One request from behind `lan`, answered at once; then the server sends more at these times. What
/// arrives of it.
fn pushes(router: &Router, at: &'static [u64], patience: Duration) -> Vec<u64> {
    let started = Instant::now();
    let server = in_netns(router.host("wan"), move || {
        let s = UdpSocket::bind("10.2.0.2:6000").expect("bind");
        let (_, from) = s.recv_from(&mut [0; 10]).expect("a request");
        s.send_to(b"0", from).expect("an answer");
        for &t in at {
            std::thread::sleep(
                (started + Duration::from_secs(t)).saturating_duration_since(Instant::now()),
            );
            s.send_to(t.to_string().as_bytes(), from).expect("a push");
        }
    });
    let client = in_netns(router.host("lan"), move || {
        let s = UdpSocket::bind("10.1.0.2:6001").expect("bind");
        s.set_read_timeout(Some(patience)).expect("a time-out");
        std::thread::sleep(Duration::from_millis(200));
        s.send_to(b"?", "10.2.0.2:6000").expect("a request");
        let mut got = Vec::new();
        let mut buf = [0; 10];
        while let Ok((n, _)) = s.recv_from(&mut buf) {
            got.push(String::from_utf8_lossy(&buf[..n]).parse().expect("a number"));
        }
        got
    });
    server.join().expect("the server");
    client.join().expect("the client")
}

#[test]
fn router_a_udp_flow_answered_once_lives_from_push_to_push() {
    let mut router = Router::new("push");
    router.start(&["--port", "lan", "--port", "wan"]);
    router.run(
        "sysctl -qw net.netfilter.nf_conntrack_udp_timeout=12 net.netfilter.nf_conntrack_udp_timeout_stream=28
         nft 'table inet fw { chain f { type filter hook forward priority 0; policy drop;
           ct state established,related accept; iifname lan accept; }; }'",
    );
    let got = pushes(&router, &[8, 16, 36], Duration::from_secs(24));
    assert_eq!(got, [0, 8, 16, 36]);
}

#[test]
fn router_a_long_udp_flow_is_assured_as_it_would_be_without_us() {
    let mut router = Router::new("assured");
    router.start_with(SWEPT);
    let (lan, wan) = (router.host("lan"), router.host("wan"));
    let until = Instant::now() + Duration::from_secs(24);
    let server = in_netns(wan, move || {
        let s = UdpSocket::bind("10.2.0.2:6000").expect("bind");
        s.set_read_timeout(Some(Duration::from_secs(1))).expect("a time-out");
        while Instant::now() < until {
            if let Ok((_, from)) = s.recv_from(&mut [0; 10]) {
                s.send_to(b"!", from).expect("an answer");
            }
        }
    });
    let client = in_netns(lan, move || {
        let s = UdpSocket::bind("10.1.0.2:6001").expect("bind");
        s.set_read_timeout(Some(Duration::from_millis(150))).expect("a time-out");
        while Instant::now() < until {
            s.send_to(b"?", "10.2.0.2:6000").expect("a packet");
            let _ = s.recv_from(&mut [0; 10]);
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    wait_until("it is offloaded", || router.installed() == BOTH);
    assert!(!router.entry("udp").expect("an entry").2.contains("ASSURED"), "before its time");
    wait_until("it is assured", || {
        router.entry("udp").is_some_and(|e| e.2.contains("ASSURED") && e.1 > 30)
    });
    assert_eq!(router.installed(), BOTH, "by what rules have carried");
    client.join().expect("the client");
    server.join().expect("the server");
}

#[test]
fn router_what_has_no_events_ends_all_the_same() {
    let mut router = Router::new("deaf");
    // No events for anybody, and (`off` and `on` again) for what was there before.
    router.run("nft 'table inet track { chain f { type filter hook forward priority 0; ct state new counter; }; }'");
    for events in ["0", "2"] {
        router.run(&format!("sysctl -qw net.netfilter.nf_conntrack_events={events}"));
        let [mut fin, mut rst] = [5001, 5002].map(|port| router.connect_to(port));
        fin.ping();
        rst.ping();
        router.start_with(SWEPT);
        let want = ["lan original", "lan original", "wan reply", "wan reply"];
        wait_until("both are offloaded", || {
            fin.ping();
            rst.ping();
            router.installed() == want
        });
        fin.exchange(1 << 16);
        rst.exchange(1 << 16);
        fin.close();
        rst.abort();
        wait_until("no rules are left", || router.installed().is_empty());
        let entries = router.entries("tcp");
        assert!(entries.iter().all(|e| e.1 <= 120), "events {events}: {entries:#?}");
        router.signal(Signal::SIGTERM);
        router.run("conntrack -F 2>/dev/null");
    }
}
