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
fn at_sighup_the_configuration_is_read_anew_and_what_can_be_applied_is() {
    let mut r = Router::new("reload");
    const PORT: &str = "[[port]]\nmatch = \"?an\"\n";
    let file = r.configure(PORT);
    let log = std::env::temp_dir().join("ctoffload-reload.log");
    let to = File::create(&log).expect("a file").into();
    r.start_logging(&["--config", &file], to);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    let pid = r.daemon.as_ref().expect("a daemon").id();
    let said = || std::fs::read_to_string(&log).expect("the log");
    let reload = |r: &Router, config: &str, word: &str| {
        let before = said().len();
        r.configure(config);
        r.run(&format!("kill -HUP {pid}"));
        wait_until(word, || said()[before..].contains(word));
        said()[before..].to_owned()
    };
    let read = "the configuration was read anew";
    // A wrong file changes nothing.
    let never = format!("{PORT}[[admit]]\nverdict = \"never\"\ndestination-ports = [5001]\n");
    let told = reload(&r, &never.replace("5001", "70000"), "nothing changes");
    assert!(told.contains("line 6") && told.contains("70000"), "{told}");
    c.ping();
    assert_eq!(r.installed(), BOTH);
    // What is not admitted any more goes; what is read at the start only is named, and stays.
    let told =
        reload(&r, &format!("[sight]\nledger-size = 1024\n[limits]\nqueue = 7\n{never}"), read);
    assert!(told.contains("[sight] ledger-size, [limits] queue"), "{told}");
    for at in [("lan", "original"), ("wan", "reply")] {
        r.wait_refused(at, "not-admitted", "line 8", &mut c);
    }
    assert_eq!(r.rules("lan") + r.rules("wan"), 0);
    assert_eq!(r.stats()["ledger_size"].as_u64(), Some(262_144));
    // And back.
    let told = reload(&r, PORT, read);
    assert!(!told.contains("start only"), "{told}");
    r.wait_installed(&BOTH, &mut c);
    // A netdev that comes later is attached as the file says by then.
    let told =
        reload(&r, &format!("[[port]]\nmatch = \"new*\"\nproviders = [\"none\"]\n{PORT}"), read);
    assert!(told.contains("[[port]]"), "{told}");
    r.run("ip link add new0 type veth peer name new1");
    wait_until("it is a port without a provider", || r.port("new0")["state"] == "unbound");
    assert_eq!(r.installed(), BOTH);
    // The pause between sweeps.
    reload(&r, &format!("[usage]\nsweep-seconds = 1\nsweep-max-seconds = 1\n{PORT}"), read);
    wait_until("sweeps follow it", || r.stats()["sweep_pause_ms"].as_u64() == Some(1000));
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    assert_eq!(r.run("tc qdisc show dev lan clsact; nft list tables"), "");
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
