//! What conntrack has of connections that rules carry, to their end: as it would without us, whichever provider the
//! ports have.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::flower::Wire;
use crate::release::hear_of_ends_soon;

/// Tests of what is to be the same with every provider: one of each.
macro_rules! scenarios {
    ($($name:ident),* $(,)?) => {
        scenarios! { @of by_flower "tc-flower" $($name)* }
        scenarios! { @of by_flowtable "nf-flowtable" $($name)* }
        scenarios! { @of by_ebpf "ebpf" $($name)* }
    };
    (@of $module:ident $provider:literal $($name:ident)*) => {
        mod $module {
            $(#[test] fn $name() { super::$name($provider) })*
        }
    };
}

scenarios! {
    a_reset_after_gigabytes_ends_the_connection,
    a_reset_that_is_not_believed_ends_the_connection,
    what_ends_while_nobody_looks_has_ended,
    what_is_silent_ends_with_its_timeout,
}

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const PSH: u8 = 8;
const ACK: u8 = 16;
/// The ends of a connection.
const CLIENT: usize = 0;
const SERVER: usize = 1;

/// A TCP connection whose every segment is made here: of sequence numbers that are gigabytes apart there need not be
/// gigabytes between.
struct Spoken {
    port: u16,
    wires: [Wire; 2],
    /// The router's.
    macs: [[u8; 6]; 2],
    /// What each end sends next, and sent first.
    next: [u32; 2],
    opened: [u32; 2],
}

/// Announced by both: so many times larger is the window than it says (2^14), nearly a gigabyte.
const WINDOW_SCALE: u8 = 14;
const STEP: u32 = 1 << 29;

impl Spoken {
    fn open(r: &Router, port: u16) -> Self {
        let wires = ["lan", "wan"].map(|dev| {
            let host = r.host(dev);
            // Nobody there knows of the connection, and says so with a RST.
            r.run(&format!("ip netns exec {host} nft 'table inet quiet {{ chain i {{ type filter hook input priority 0; tcp dport {port} drop; tcp sport {port} drop; }}; }}'"));
            in_netns(host, || Wire::open("e0", false)).join().expect("a socket")
        });
        let macs = ["lan", "wan"].map(|dev| {
            let text = r.run(&format!("ip -br link show {dev}"));
            let mac = text.split_whitespace().nth(2).expect("a MAC address");
            let bytes = mac.split(':').map(|b| u8::from_str_radix(b, 16).expect("a byte"));
            bytes.collect::<Vec<_>>().try_into().expect("six bytes")
        });
        // Near the end of the numbers, so that they begin anew.
        let next = [u32::MAX - 1000, 7000];
        let mut spoken = Self { port, wires, macs, next, opened: next.map(|n| n.wrapping_add(1)) };
        spoken.say(CLIENT, SYN, 0);
        spoken.say(SERVER, SYN | ACK, 0);
        spoken.say(CLIENT, ACK, 0);
        spoken
    }

    /// One segment.
    fn say(&mut self, who: usize, flags: u8, payload: usize) {
        self.say_with(who, flags, payload, &[]);
    }

    /// The acknowledgement that opened it comes late once more, and no rule takes it, since it has IPv4 options: the
    /// numbers are some that conntrack knows.
    fn acknowledge_past_rules(&mut self, who: usize) {
        const NO_OPERATION: [u8; 4] = [1; 4];
        let next = std::mem::replace(&mut self.next, self.opened);
        self.say_with(who, ACK, 0, &NO_OPERATION);
        self.next = next;
    }

    fn say_with(&mut self, who: usize, flags: u8, payload: usize, ip_options: &[u8]) {
        let other = 1 - who;
        let hosts = [[10, 1, 0, 2], [10, 2, 0, 2]];
        let ports = [self.port, 80];
        let mut l4 = [ports[who].to_be_bytes(), ports[other].to_be_bytes()].concat();
        l4.extend(self.next[who].to_be_bytes());
        let acked = if flags & ACK == 0 { 0 } else { self.next[other] };
        l4.extend(acked.to_be_bytes());
        let options: &[u8] = if flags & SYN == 0 { &[] } else { &[3, 3, WINDOW_SCALE, 1] };
        let words = u8::try_from(5 + options.len() / 4).expect("a length");
        l4.extend([words << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
        l4.extend(options);
        l4.extend(vec![b'x'; payload]);
        let mut pseudo = [hosts[who], hosts[other]].concat();
        pseudo.extend([0, 6]);
        pseudo.extend(u16::try_from(l4.len()).expect("a length").to_be_bytes());
        let check = checksum(&[pseudo, l4.clone()].concat());
        l4[16..18].copy_from_slice(&check.to_be_bytes());
        let mut ip = vec![0x45 + u8::try_from(ip_options.len() / 4).expect("a length"), 0];
        let length = 20 + ip_options.len() + l4.len();
        ip.extend(u16::try_from(length).expect("a length").to_be_bytes());
        ip.extend([0, 1, 0x40, 0, 64, 6, 0, 0]);
        ip.extend([hosts[who], hosts[other]].concat());
        ip.extend(ip_options);
        let check = checksum(&ip);
        ip[10..12].copy_from_slice(&check.to_be_bytes());
        let from = [2, 0, 0, 0, 0, 0x50];
        let frame = [&self.macs[who][..], &from, &[8, 0], &ip, &l4].concat();
        self.wires[who].send(&frame);
        let length = u32::try_from(payload).expect("a length");
        let counted = u32::from(flags & (SYN | FIN) != 0);
        self.next[who] = self.next[who].wrapping_add(length + counted);
        // Until it has passed: what follows is an answer to it. Ports and sequence number, then the flags.
        let passed = self.wires[other].receive(1, Duration::from_secs(2), |f| {
            let found = f.get(14 + ip.len()..).unwrap_or_default();
            found.get(..8) == Some(&l4[..8]) && found.get(13) == Some(&flags)
        });
        assert_eq!(passed.len(), 1, "a segment of {who} with flags {flags:#04x} was not forwarded");
    }

    /// Data each way, acknowledged.
    fn talk(&mut self) {
        self.say(CLIENT, PSH | ACK, 100);
        self.say(SERVER, PSH | ACK, 100);
        self.say(CLIENT, ACK, 0);
    }

    /// As if so much had been sent before that.
    fn after(&mut self, who: usize, bytes: u32) {
        self.next[who] = self.next[who].wrapping_add(bytes);
    }
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("16 bits")
}

impl Router {
    /// State (of TCP) and seconds left of the entry that a port tells from others. Neither is told of what the kernel's
    /// flowtable has: it does not end by itself.
    fn life(&self, proto: &str, port: u16) -> Option<(String, u64)> {
        let side = if proto == "tcp" { "sport" } else { "dport" };
        let out = self.run(&format!("conntrack -L -p {proto} --{side} {port} 2>/dev/null"));
        let line = out.lines().next()?;
        if line.contains("OFFLOAD]") {
            return Some((String::new(), u64::MAX));
        }
        let words: Vec<_> = line.split_whitespace().collect();
        let state = if proto == "tcp" { words[3] } else { "" };
        Some((state.to_owned(), words[2].parse().expect("seconds")))
    }

    /// Waits until a TCP connection's entry is so, and says what there is meanwhile; returns what there was at last.
    fn wait_life(
        &self,
        what: &str,
        port: u16,
        done: impl Fn(Option<&(String, u64)>) -> bool,
    ) -> Option<(String, u64)> {
        let mut last = None;
        wait_until(what, || {
            let life = self.life("tcp", port);
            if life != last {
                println!("{port}: {life:?}");
                last.clone_from(&life);
            }
            done(life.as_ref())
        });
        last
    }

    /// Ports of one provider, with short timeouts.
    fn start_short(&mut self, provider: &str, established: u64) {
        self.run(&format!(
            "modprobe nf_conntrack; modprobe nf_flow_table
             cd /proc/sys/net/netfilter
             echo {established} > nf_conntrack_tcp_timeout_established
             echo {established} > nf_conntrack_udp_timeout_stream
             echo 12 > nf_conntrack_udp_timeout
             echo 1 > nf_conntrack_acct
             for f in nf_flowtable_tcp_timeout nf_flowtable_udp_timeout; do
               if [ -e $f ]; then echo 5 > $f; fi
             done"
        ));
        self.start_swept(provider);
    }

    /// Counters are read every second, however long nothing has moved.
    fn start_swept(&mut self, provider: &str) {
        self.start_with(&format!(
            "[usage]\nsweep-seconds = 1\nsweep-max-seconds = 1\n[[port]]\nmatch = \"?an\"\nproviders = [\"{provider}\"]\n"
        ));
    }

    /// Says what there is while it is waited for.
    fn wait_saying(&self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let mut last = Vec::new();
        wait_until(what, || {
            let now = self.slots();
            if now != last {
                println!("{what}: {now:?}");
                last = now;
            }
            done(self)
        });
    }
}

fn a_reset_after_gigabytes_ends_the_connection(provider: &str) {
    let mut r = Router::new(&format!("gigabytes-{provider}"));
    // As most firewalls do.
    r.run("nft 'table inet fw { counter bad { }; chain f { type filter hook forward priority 0; ct state invalid counter name bad drop; }; }'");
    hear_of_ends_soon(|line| r.run(line));
    for (n, (who, offloaded)) in
        [(CLIENT, false), (CLIENT, true), (SERVER, true)].into_iter().enumerate()
    {
        let port = 4000 + u16::try_from(n).expect("a port");
        if offloaded && r.daemon.is_none() {
            r.start_by(provider);
        }
        let mut c = Spoken::open(&r, port);
        if offloaded {
            wait_until("it is offloaded", || {
                c.talk();
                r.installed() == BOTH
            });
            wait_until("the router forwards none of it", || {
                let before = r.forwarded();
                c.talk();
                r.forwarded() == before
            });
        }
        c.talk();
        let before = r.forwarded();
        // 5 GiB each way, each of which is acknowledged.
        for _ in 0..10 {
            for end in [CLIENT, SERVER] {
                c.after(end, STEP);
                c.say(end, PSH | ACK, 100);
                c.say(1 - end, ACK, 0);
            }
        }
        assert_eq!(r.forwarded() == before, offloaded, "who forwards it");
        // So long that it has been looked at.
        std::thread::sleep(Duration::from_secs(3));
        c.say(who, RST, 0);
        println!("offloaded: {offloaded}");
        r.wait_life("conntrack has closed it", port, |life| {
            life.is_none_or(|(state, left)| state == "CLOSE" && *left <= 10)
        });
        if offloaded {
            wait_until("its rules are gone", || r.installed().is_empty());
        }
        let bad = r.run("nft list counter inet fw bad");
        assert!(bad.contains("packets 0 "), "offloaded: {offloaded}: {bad}");
    }
}

/// Where conntrack has counted retransmissions, a RST that it does not believe leaves what data does that nobody has
/// acknowledged: 300 s, of a connection that may well go on.
fn a_reset_that_is_not_believed_ends_the_connection(provider: &str) {
    let mut r = Router::new(&format!("unbelieved-{provider}"));
    hear_of_ends_soon(|line| r.run(line));
    // Any number of them will do.
    r.run("modprobe nf_conntrack; echo 0 > /proc/sys/net/netfilter/nf_conntrack_tcp_max_retrans");
    r.start_by(provider);
    for (port, who) in [(4100, CLIENT), (4101, SERVER)] {
        let mut c = Spoken::open(&r, port);
        wait_until("it is offloaded", || {
            c.talk();
            r.installed() == BOTH
        });
        // What conntrack saw acknowledged is forgotten a second after the rules came. It sees something of the other
        // end once more, and what follows goes past it.
        std::thread::sleep(Duration::from_secs(3));
        c.acknowledge_past_rules(1 - who);
        let before = r.forwarded();
        c.talk();
        let by_rules = r.forwarded() == before;
        c.say(who, RST, 0);
        let last = r.wait_life("its entry is that of one that was reset", port, |life| {
            life.is_none_or(|(_, left)| *left <= 10)
        });
        wait_until("its rules are gone", || r.installed().is_empty());
        // (The kernel's flowtable has given the connection back with the packet that it could not forward.)
        let unbelieved = last.is_some_and(|(state, _)| state == "ESTABLISHED");
        assert!(by_rules && unbelieved || provider == "nf-flowtable", "conntrack believed it");
    }
}

/// Whoever looks later than this after an entry's end does not find it: a sweep, and what the emulated machine takes.
const LATE: Duration = Duration::from_secs(5);

fn what_is_silent_ends_with_its_timeout(provider: &str) {
    const TIMEOUT: u64 = 24;
    let mut r = Router::new(&format!("silent-{provider}"));
    r.start_short(provider, TIMEOUT);
    let mut c = r.connect();
    let until = Arc::new(AtomicBool::new(false));
    let server = in_netns(r.host("wan"), {
        let until = Arc::clone(&until);
        move || {
            let s = UdpSocket::bind("10.2.0.2:6000").expect("bind");
            s.set_read_timeout(Some(Duration::from_millis(100))).expect("a time-out");
            while !until.load(Ordering::Relaxed) {
                if let Ok((_, from)) = s.recv_from(&mut [0; 10]) {
                    s.send_to(b"!", from).expect("an answer");
                }
            }
        }
    });
    let client = in_netns(r.host("lan"), || UdpSocket::bind("10.1.0.2:6001").expect("bind"));
    let client = client.join().expect("a socket");
    client.set_read_timeout(Some(Duration::from_millis(500))).expect("a time-out");
    let ask = || {
        client.send_to(b"?", "10.2.0.2:6000").expect("a packet");
        client.recv_from(&mut [0; 10]).is_ok()
    };
    let all = ["lan original", "lan original", "wan reply", "wan reply"];
    // (Without XML `conntrack` says one of ASSURED and OFFLOAD.)
    let assured =
        |r: &Router| r.run("conntrack -L -p udp -o xml 2>/dev/null").contains("<assured/>");
    r.wait_saying("both are offloaded, and UDP is a stream", |r| {
        c.ping();
        ask() && r.installed() == all && assured(r)
    });
    wait_until("rules carry them", || {
        let before = r.forwarded();
        c.ping();
        ask() && r.forwarded() == before
    });
    // Some time after the timeout was last set by a packet that conntrack saw.
    std::thread::sleep(Duration::from_secs(6));
    c.ping();
    assert!(ask());
    let last = Instant::now();
    let ends = Duration::from_secs(TIMEOUT);
    let mut met = [last; 2];
    while last.elapsed() < ends + LATE * 2 {
        for (met, (proto, port)) in met.iter_mut().zip([("tcp", client_port(&c)), ("udp", 6000)]) {
            let now = Instant::now();
            if r.life(proto, port).is_some() {
                *met = now;
            }
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    let lived = met.map(|met| met - last);
    println!("{provider}: entries lived {lived:?} after the last packet");
    for lived in lived {
        assert!(lived + LATE > ends, "it ended too early: {lived:?}");
        assert!(lived < ends + LATE, "it ended too late: {lived:?}");
    }
    assert_eq!(r.slots(), []);
    assert_eq!((r.rules("lan"), r.rules("wan")), (0, 0));
    until.store(true, Ordering::Relaxed);
    server.join().expect("the server");
}

fn client_port(c: &Connection) -> u16 {
    c.stream.local_addr().expect("an address").port()
}

fn what_ends_while_nobody_looks_has_ended(provider: &str) {
    const TIMEOUT: u64 = 25;
    let mut r = Router::new(&format!("killed-{provider}"));
    // What outlives a daemon is pinned in bpffs, which distributions mount.
    r.run("mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf");
    r.start_short(provider, TIMEOUT);
    let [mut fin, mut rst, mut silent, mut alive] =
        [5001, 5002, 5003, 5004].map(|p| r.connect_to(p));
    wait_until("all are offloaded", || {
        for c in [&mut fin, &mut rst, &mut silent, &mut alive] {
            c.ping();
        }
        r.installed().len() == 8
    });
    let ports = [&fin, &rst, &silent, &alive].map(client_port);
    for c in [&mut fin, &mut rst, &mut silent, &mut alive] {
        c.exchange(1 << 16);
    }
    r.signal(Signal::SIGKILL);
    let killed = Instant::now();
    fin.close();
    rst.abort();
    wait_until("those that were closed end", || {
        let ends = |port, most| r.life("tcp", port).is_none_or(|(_, left)| left <= most);
        ends(ports[0], 120) && ends(ports[1], 10)
    });
    while killed.elapsed() < Duration::from_secs(TIMEOUT) + LATE {
        alive.ping();
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(r.life("tcp", ports[2]), None, "the silent one's entry");
    // It goes on while the next daemon looks at what there is, one port after the other.
    let started = Arc::new(AtomicBool::new(false));
    let pinging = std::thread::spawn({
        let started = Arc::clone(&started);
        move || {
            while !started.load(Ordering::Relaxed) {
                alive.ping();
            }
            alive
        }
    });
    r.start_swept(provider);
    started.store(true, Ordering::Relaxed);
    let mut alive = pinging.join().expect("the connection goes on");
    // Where its entry had ended as well, it begins with whoever sends first then.
    r.wait_saying("rules of one connection", |r| {
        alive.ping();
        let installed = r.installed();
        installed == BOTH || installed == ["lan reply", "wan original"]
    });
    // Those of the flowtable are its daemon's, and went with it.
    let rules = if provider == "nf-flowtable" { 0 } else { 1 };
    assert_eq!((r.rules("lan"), r.rules("wan")), (rules, rules), "rules of one connection");
    alive.exchange(1 << 16);
    // And without a daemon for good.
    r.signal(Signal::SIGKILL);
    alive.abort();
    wait_until("its entry ends", || r.life("tcp", ports[3]).is_none_or(|(_, left)| left <= 10));
    silent.close();
}
