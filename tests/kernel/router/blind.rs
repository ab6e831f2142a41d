//! Threads of the daemon that end by themselves. Without one of them it would go on offloading, and not see what
//! makes rules wrong: it stops instead.

use std::fs::File;
use std::path::PathBuf;

use super::*;

/// How a thread is made to end: the process may have no more file descriptors than this, and what it has stays
/// open.
fn limit_files(r: &Router, limit: u32) {
    let pid = r.daemon.as_ref().expect("a daemon").id();
    r.run(&format!("prlimit --pid {pid} --nofile={limit}:"));
}

fn start(r: &mut Router) -> PathBuf {
    let log = std::env::temp_dir().join(format!("ctoffload-{}.log", r.name));
    let file = r.configure("[[port]]\nmatch = \"?an\"\n");
    r.start_logging(&["--config", &file], File::create(&log).expect("a file").into());
    log
}

/// The daemon ends by itself, with a status of its own, and leaves nothing behind; the connection goes on.
fn has_stopped(r: &mut Router, log: &PathBuf, why: &str, c: &mut Connection) {
    let mut daemon = r.daemon.take().expect("a daemon");
    let mut status = None;
    wait_until("the daemon ends", || {
        status = daemon.try_wait().expect("wait");
        status.is_some()
    });
    let said = std::fs::read_to_string(log).expect("the log");
    assert_eq!(status.and_then(|s| s.code()), Some(8), "{said}");
    assert!(said.contains("stopped, nothing left behind"), "{said}");
    let last = said.lines().last().unwrap_or_default();
    assert!(last.starts_with(&format!("ctoffloadd: offloading was stopped: {why}")), "{said}");
    assert_eq!(r.run("tc qdisc show dev lan clsact; tc qdisc show dev wan clsact"), "", "{said}");
    assert_eq!(r.run("nft list tables"), "", "{said}");
    c.ping();
}

#[test]
fn a_daemon_that_cannot_hear_of_links_and_routes_any_more_offloads_nothing() {
    let mut r = Router::new("deaf");
    let log = start(&mut r);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    // More is announced than its sockets have room for, so that it has to listen anew: it cannot.
    limit_files(&r, 3);
    let pid = r.daemon.as_ref().expect("a daemon").id();
    let noise = std::env::temp_dir().join("ctoffload-deaf.batch");
    let lines: String = (0..20_000).map(|n| format!("link set noise alias {n}\n")).collect();
    std::fs::write(&noise, lines).expect("a file");
    r.run(&format!(
        "ip link add noise up type dummy
         kill -STOP {pid}
         ip -batch {}
         kill -CONT {pid}",
        noise.display()
    ));
    has_stopped(&mut r, &log, "thread 'monitor' failed: ", &mut c);
}

#[test]
fn a_daemon_that_cannot_be_asked_any_more_offloads_nothing() {
    let mut r = Router::new("mute");
    let log = start(&mut r);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    // The kernel refuses poll(2) on more file descriptors than a process may have.
    limit_files(&r, 1);
    has_stopped(&mut r, &log, "thread 'control' failed: control socket: poll: ", &mut c);
}
