//! Signals: none that can be caught leaves rules behind with nobody to look after them.

use std::fs::File;

use super::*;

#[test]
fn no_signal_that_can_be_caught_ends_the_daemon_with_rules_left_behind() {
    let mut r = Router::new("signals");
    let log = std::env::temp_dir().join("ctoffload-signals.log");
    r.start_logging(&PORTS, File::create(&log).expect("a file").into());
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    let pid = r.daemon.as_ref().expect("a daemon").id();
    for signal in ["HUP", "USR1", "USR2", "ALRM"] {
        r.run(&format!("kill -{signal} {pid}"));
        let word = format!("SIG{signal}: going on as before");
        wait_until(&word, || std::fs::read_to_string(&log).expect("the log").contains(&word));
        c.ping();
        assert_eq!(r.installed(), BOTH, "{word}");
    }
    assert_eq!(r.signal(Signal::SIGQUIT), Some(0));
    assert_eq!(r.run("tc qdisc show dev lan clsact; nft list tables"), "");
    c.ping();
}

#[test]
fn who_reads_the_log_may_go_and_the_daemon_can_be_stopped_yet() {
    let mut r = Router::new("sigpipe");
    let (reader, log) = std::io::pipe().expect("a pipe");
    r.start_logging(&PORTS, log.into());
    drop(reader);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    let pid = r.daemon.as_ref().expect("a daemon").id();
    r.run(&format!("kill -HUP {pid}"));
    c.ping();
    assert_eq!(r.installed(), BOTH);
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    assert_eq!(r.run("tc qdisc show dev lan clsact; nft list tables"), "");
}
