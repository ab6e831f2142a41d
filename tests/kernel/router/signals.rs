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

/// Everything that the stack forwards, and not what goes by rules.
const WATCH: &str = "nft add table inet watch && nft add counter inet watch slow && nft 'add chain inet watch forward { type filter hook forward priority -10; }' && nft 'add rule inet watch forward tcp flags & (fin|syn|rst) == 0 counter name slow'";

fn a_stop_that_keeps_rules_costs_a_connection_nothing(provider: &str) {
    let mut r = Router::new(&format!("keep-{provider}"));
    r.run("mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf");
    r.run(WATCH);
    let slow = |r: &Router| r.run("nft list counter inet watch slow");
    let port = format!("[[port]]\nmatch = \"?an\"\nproviders = [\"{provider}\"]\n");
    let keep = format!("[usage]\nsweep-seconds = 1\n[stop]\nrules = \"keep\"\n{port}");
    let log = std::env::temp_dir().join(format!("ctoffload-keep-{provider}.log"));
    let file = r.configure(&keep);
    let start = |r: &mut Router| {
        let to = File::create(&log).expect("a file");
        r.start_logging(&["--config", &file], to.into());
    };
    let said = |word: &str| std::fs::read_to_string(&log).expect("the log").contains(word);
    start(&mut r);
    let mut c = r.connect();
    let mut ends = r.connect_to(5002);
    wait_until("both are offloaded", || {
        c.ping();
        ends.ping();
        r.installed().len() == 4
    });
    r.exchange_by_rules(&mut c, 100);
    let cookies = |r: &Router| {
        let conns = r.conns();
        let of = |c: &Value| c["original"].as_str().is_some_and(|t| t.contains(":5001"));
        let conn = conns.as_array().into_iter().flatten().find(|c| of(c)).cloned();
        let slots = conn.unwrap_or_default()["slots"].as_array().cloned().unwrap_or_default();
        slots.iter().map(|s| s["cookie"].clone()).collect::<Vec<_>>()
    };
    let (before, marks) = (slow(&r), cookies(&r));
    // Twice, as over two upgrades: what was adopted is kept as well.
    for _ in 0..2 {
        assert_eq!(r.signal(Signal::SIGTERM), Some(0));
        assert!(said("rules go on forwarding") && said(" rules=4"), "it is told");
        assert_eq!((r.rules("lan"), r.rules("wan")), (2, 2), "they stay");
        assert!(!r.run("nft list tables").contains("ctoffload"), "nobody is sighted");
        c.exchange(1 << 16);
        start(&mut r);
        wait_until("all are adopted", || r.installed().len() == 4);
        c.exchange(1 << 16);
        assert_eq!(slow(&r), before, "no packet took the slow path meanwhile");
        assert_eq!(cookies(&r), marks, "the very same rules");
    }
    wait_until("what they carried with nobody there is counted", || {
        r.conns().to_string().contains("\"original\"")
            && r.port("lan")["bytes"].as_u64().is_some_and(|n| n > 4 << 16)
    });
    // What ended while nobody was there has no rules then.
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    r.run("conntrack -D -p tcp --dport 5002");
    start(&mut r);
    wait_until("its rules are gone", || (r.rules("lan"), r.rules("wan")) == (1, 1));
    c.ping();
    assert_eq!(r.installed(), BOTH);
    // Who wants none to be left says so by another signal, or in the file.
    assert_eq!(r.signal(Signal::SIGINT), Some(0));
    assert_eq!((r.rules("lan"), r.rules("wan")), (0, 0));
    start(&mut r);
    r.wait_installed(&BOTH, &mut c);
    // And asked at the end, also by what SIGHUP has changed: nothing is left.
    r.configure(&keep.replace("\"keep\"", "\"flush\""));
    let pid = r.daemon.as_ref().expect("a daemon").id();
    r.run(&format!("kill -HUP {pid}"));
    wait_until("it is read", || said("the configuration was read anew"));
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    assert!(said("nothing left behind"));
    assert_eq!((r.rules("lan"), r.rules("wan")), (0, 0));
    assert_eq!(r.run("tc qdisc show dev lan clsact; tc qdisc show dev lan ingress"), "");
    c.ping();
}

#[test]
fn a_stop_that_keeps_rules_costs_a_connection_of_flower_nothing() {
    a_stop_that_keeps_rules_costs_a_connection_nothing("tc-flower");
}

#[test]
fn a_stop_that_keeps_rules_costs_a_connection_of_ebpf_nothing() {
    a_stop_that_keeps_rules_costs_a_connection_nothing("ebpf");
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
