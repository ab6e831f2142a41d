//! Connections whose addresses and ports are rewritten, through the daemon: their data is compared
//! byte by byte, and every segment that rules have forwarded has right checksums on the wire.

use super::*;
use crate::flower::{Wire, parse};

impl Router {
    fn nat(&self, rules: &str) {
        self.run(&format!(
            "nft add table ip t
             nft add chain ip t pre '{{ type nat hook prerouting priority -100; }}'
             nft add chain ip t post '{{ type nat hook postrouting priority 100; }}'
             {rules}"
        ));
        // Sent as they are on a wire, received as a NIC gives them to the stack: merged.
        for dev in ["lan", "wan"] {
            self.run(&format!("ethtool -K {dev} tx off tso off gso off gro on"));
            let host = self.host(dev);
            self.run(&format!("ip netns exec {host} ethtool -K e0 rx off tso on gso on"));
        }
    }

    /// Exchanges data over rules alone, and looks at every segment that arrives behind `dev`.
    fn exchange_captured(&self, dev: &str, c: &mut Connection, length: usize) {
        let own = self.run(&format!("ip -n {} -br link show e0", self.host(dev)));
        let (ready, listening) = mpsc::channel();
        let capture = in_netns(self.host(dev), move || {
            let wire = Wire::open("e0", false);
            ready.send(()).expect("ready");
            let segment = |f: &[u8]| {
                parse(f).filter(|s| !s.payload.is_empty() && own.contains(&s.dst.to_string()))
            };
            let (mut segments, mut bytes) = (Vec::new(), 0);
            while bytes < length {
                let frames = wire.receive(1, PATIENCE, |f| segment(f).is_some());
                let Some(segment) = frames.first().and_then(|f| segment(f)) else { break };
                bytes += segment.payload.len();
                segments.push(segment);
            }
            segments
        });
        listening.recv().expect("the capture runs");
        self.exchange_by_rules(c, length);
        let segments = capture.join().expect("the capture ends");
        let bytes: usize = segments.iter().map(|s| s.payload.len()).sum();
        assert!(bytes >= length, "{bytes} bytes of {length} in {} segments", segments.len());
        for s in &segments {
            assert!(s.ip_checksum_right && s.l4_checksum_right, "{s:?}");
            assert!(s.payload.len() <= 1460, "a segment, not what GRO made of them: {s:?}");
        }
    }
}

const LENGTH: usize = 200_000;

#[test]
fn the_source_is_translated() {
    let mut r = Router::new("snat");
    r.nat("nft add rule ip t post oifname wan snat to 10.2.0.1");
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    r.exchange_captured("wan", &mut c, LENGTH);
    r.exchange_captured("lan", &mut c, LENGTH);
}

#[test]
fn the_destination_is_translated() {
    let mut r = Router::new("dnat");
    r.nat("nft add rule ip t pre iifname lan ip daddr 10.1.0.1 tcp dport 5001 dnat to 10.2.0.2");
    r.start(&PORTS);
    let mut c = r.connect_through("10.1.0.1:5001", "wan", "10.2.0.2:5001");
    r.wait_installed(&BOTH, &mut c);
    r.exchange_captured("wan", &mut c, LENGTH);
    r.exchange_captured("lan", &mut c, LENGTH);
}

#[test]
fn both_are_translated_and_the_ports_too() {
    let mut r = Router::new("fullnat");
    r.nat(
        "nft add rule ip t pre iifname lan ip daddr 10.1.0.1 tcp dport 80 dnat to 10.2.0.2:5001
         nft add rule ip t post oifname wan tcp dport 5001 snat to 10.2.0.1:7000-7010",
    );
    r.start(&PORTS);
    let mut c = r.connect_through("10.1.0.1:80", "wan", "10.2.0.2:5001");
    r.wait_installed(&BOTH, &mut c);
    let conns = r.conns();
    assert_eq!(conns[0]["reply"]["sport"], 5001, "{conns}");
    assert!((7000..=7010).contains(&conns[0]["reply"]["dport"].as_u64().expect("a port")));
    r.exchange_captured("wan", &mut c, LENGTH);
    r.exchange_captured("lan", &mut c, LENGTH);
}

/// In and out by the same port: the server is a neighbour of the client, and thinks that the router
/// is.
#[test]
fn a_hairpin_is_offloaded_on_its_one_port() {
    let mut r = Router::new("hairpin");
    let host = r.host("lan");
    r.run(&format!("ip -n {host} addr add 10.1.0.3/24 dev e0"));
    r.run("sysctl -qw net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.lan.send_redirects=0");
    r.nat(
        "nft add rule ip t pre iifname lan ip daddr 10.1.0.1 tcp dport 80 dnat to 10.1.0.3:5001
         nft add rule ip t post oifname lan tcp dport 5001 masquerade",
    );
    r.start(&PORTS);
    let mut c = r.connect_through("10.1.0.1:80", "lan", "10.1.0.3:5001");
    r.wait_installed(&["lan original", "lan reply"], &mut c);
    assert_eq!((r.rules("lan"), r.rules("wan")), (2, 0));
    r.exchange_captured("lan", &mut c, LENGTH);
}
