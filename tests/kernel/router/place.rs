//! The daemon's place in the network namespace: there is one, whoever holds the control port id.

use std::io::{BufRead, BufReader};

use ctoffload::control::PORT_ID;

use super::*;

/// A process of nobody's that holds the control port id.
struct Squatter(Child);

impl Squatter {
    fn new() -> Self {
        let hold = format!(
            "import os, socket, sys\n\
             os.setgroups([]); os.setgid(65534); os.setuid(65534)\n\
             s = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 2)\n\
             s.bind(({PORT_ID}, 0))\n\
             print('held', flush=True)\n\
             sys.stdin.read()"
        );
        let mut child = Command::new("python3")
            .args(["-c", &hold])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3");
        let mut said = String::new();
        let out = child.stdout.take().expect("its output");
        BufReader::new(out).read_line(&mut said).expect("its word");
        assert_eq!(said, "held\n");
        Self(child)
    }
}

impl Drop for Squatter {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_control_port_id_that_is_held_keeps_no_daemon_away_and_lets_no_second_one_in() {
    let mut r = Router::new("squat");
    let squatter = Squatter::new();
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    let refused = |r: &Router| {
        let second = Command::new(env!("CARGO_BIN_EXE_ctoffloadd")).output().expect("ctoffloadd");
        let said = String::from_utf8_lossy(&second.stderr);
        assert_eq!(second.status.code(), Some(3), "{said}");
        assert!(said.contains("second daemon"), "{said}");
        assert_eq!(r.json(&["port", "show"]).as_array().map(Vec::len), Some(2));
        assert_eq!(r.run("nft list tables"), "table inet ctoffload\n");
    };
    refused(&r);
    assert_eq!(r.json(&["flush", "--all"])["count"], 2);
    r.wait_installed(&BOTH, &mut c);
    // The known port id is free now, and the daemon is where it was.
    drop(squatter);
    refused(&r);
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    let none = r.cli(&["stats"]);
    assert_eq!(none.status.code(), Some(3), "{}", String::from_utf8_lossy(&none.stderr));
}
