//! The packet generator: the kernel's own, pktgen, which makes one packet after the other and sees each
//! through before the next.

use std::time::{Duration, Instant};

use super::world::sh;

/// Where its packets go.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Into {
    /// Up, as if the netdev had received them: from a driver to the stack, without a wire.
    Stack,
    /// Out, through the netdev.
    Wire,
}

/// What is sent: UDP in IPv4, 64 bytes with the FCS.
pub(crate) struct Stream {
    pub(crate) macs: [String; 2],
    pub(crate) from: ([u8; 4], u16),
    pub(crate) to: ([u8; 4], u16),
}

/// Sends on a netdev of the network namespace in which it was made, and in which it must be used.
pub(crate) struct Generator {
    netdev: String,
}

impl Generator {
    /// # Panics
    /// When the kernel has no pktgen, or one that cannot do this (before 6.7).
    pub(crate) fn new(netdev: &str, into: Into, stream: &Stream) -> Self {
        sh("test -e /proc/net/pktgen || modprobe pktgen");
        forget_others();
        tell("kpktgend_0", &format!("add_device {netdev}"));
        let [src, dst] = &stream.macs;
        let ((from, sport), (to, dport)) = (stream.from, stream.to);
        let (from, to) = (std::net::Ipv4Addr::from(from), std::net::Ipv4Addr::from(to));
        for line in [
            match into {
                Into::Stack => "xmit_mode netif_receive",
                Into::Wire => "xmit_mode start_xmit",
            },
            // Each packet is its own, as those of a NIC are. One that pktgen keeps a reference to, to
            // send it again, costs the slow path a clone and a copy that the others do without.
            "flag !SHARED",
            "flag NO_TIMESTAMP",
            "delay 0",
            "pkt_size 60",
            &format!("src_mac {src}"),
            &format!("dst_mac {dst}"),
            &format!("src_min {from}"),
            &format!("src_max {from}"),
            &format!("dst_min {to}"),
            &format!("dst_max {to}"),
            &format!("udp_src_min {sport}"),
            &format!("udp_src_max {sport}"),
            &format!("udp_dst_min {dport}"),
            &format!("udp_dst_max {dport}"),
        ] {
            tell(netdev, line);
            // It takes what it does not know without an error.
            let result = result(netdev);
            assert!(result.starts_with("OK: "), "pktgen: {netdev}: {line}: {result}");
        }
        Self { netdev: netdev.into() }
    }

    /// Sends so many packets, and says how long that took.
    ///
    /// # Panics
    /// When it could not send them all.
    pub(crate) fn send(&self, count: u64) -> Duration {
        tell(&self.netdev, &format!("count {count}"));
        // Until it is done; but a thread that takes more than an eighth of a second to start is not waited
        // for.
        tell("pgctrl", "start");
        let patience = Instant::now() + Duration::from_secs(300);
        // "OK: 3000(c2900+d100) usec, 1000 (60byte,0frags)"; until then "Starting".
        let result = loop {
            let result = result(&self.netdev);
            if result.contains(" usec, ") {
                break result;
            }
            assert!(Instant::now() < patience, "pktgen does not send: {result}");
            std::thread::sleep(Duration::from_millis(50));
        };
        let (took, sent) = result.split_once(" usec, ").expect("what it has waited for");
        assert!(sent.starts_with(&format!("{count} ")), "pktgen sent {sent} of {count}");
        let took = took.strip_prefix("OK: ").and_then(|took| took.split('(').next());
        Duration::from_micros(took.expect("a time").parse().expect("microseconds"))
    }
}

/// Takes from pktgen the netdevs that it has: all that it has would send. It does so some time later.
fn forget_others() {
    let own = |file: &str| file.starts_with("kpktgend_") || file == "pgctrl";
    let others = || {
        let files = std::fs::read_dir(path("")).unwrap();
        files.filter(|f| !own(&f.as_ref().unwrap().file_name().to_string_lossy())).count()
    };
    if others() > 0 {
        tell("kpktgend_0", "rem_device_all");
        while others() > 0 {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The calling thread's network namespace has its own.
fn path(file: &str) -> String {
    format!("/proc/thread-self/net/pktgen/{file}")
}

fn tell(file: &str, line: &str) {
    std::fs::write(path(file), format!("{line}\n"))
        .unwrap_or_else(|e| panic!("pktgen: {file}: {line}: {e}"));
}

/// What came of the last command to a netdev.
fn result(netdev: &str) -> String {
    let text = std::fs::read_to_string(path(netdev)).unwrap();
    text.rsplit("Result: ").next().expect("always one").trim_end().into()
}
