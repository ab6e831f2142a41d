//! The daemon as a service: what it tells the service manager, and how it is reloaded by a command.

use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;

use super::*;

/// The end of the service manager's.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Manager {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ctoffload-{test}.notify"));
        let _ = std::fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path).expect("a socket");
        Self { socket, path }
    }

    /// The next message, within so long.
    fn hears(&self, within: Duration) -> Option<String> {
        self.socket.set_read_timeout(Some(within)).expect("a time-out");
        let mut buf = [0; 4096];
        let n = self.socket.recv(&mut buf).ok()?;
        Some(String::from_utf8_lossy(&buf[..n]).into_owned())
    }

    /// The next message that has this line; what else comes is not waited for.
    fn waits_for(&self, line: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let heard = self.hears(left.max(Duration::from_millis(1)));
            assert!(heard.is_some(), "{line} was not heard");
            let heard = heard.unwrap_or_default();
            if heard.lines().any(|l| l == line) {
                return heard;
            }
        }
    }

    /// The daemon under it.
    fn start(&self, r: &mut Router, args: &[&str], watchdog: Option<Duration>) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ctoffloadd"));
        command.args(args).env("NOTIFY_SOCKET", &self.path);
        if let Some(within) = watchdog {
            command.env("WATCHDOG_USEC", within.as_micros().to_string());
        }
        r.daemon = Some(command.spawn().expect("ctoffloadd"));
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

const PORT: &str = "[[port]]\nmatch = \"?an\"\nproviders = [\"ebpf\"]\n";

#[test]
fn the_service_manager_is_told_of_readiness_reload_and_stop() {
    let mut r = Router::new("notify");
    let manager = Manager::new("notify");
    let file = r.configure(PORT);
    manager.start(&mut r, &["--config", &file], None);
    let ready = manager.waits_for("READY=1");
    // Ports are bound by then, and the daemon answers.
    assert!(ready.contains("STATUS=2 ports, 2 of them with a provider"), "{ready}");
    wait_until("it answers", || r.ports().len() == 2);
    let pid = r.daemon.as_ref().expect("a daemon").id();
    // A right file and a wrong one: after either the service is ready.
    for config in [PORT, "[limits]\nqueue = 0\n"] {
        r.configure(config);
        r.run(&format!("kill -HUP {pid}"));
        let reloading = manager.hears(PATIENCE).expect("a message");
        let lines: Vec<_> = reloading.lines().collect();
        assert_eq!(lines[0], "RELOADING=1", "{reloading}");
        let at = lines[1].strip_prefix("MONOTONIC_USEC=").expect("the time");
        let up = std::fs::read_to_string("/proc/uptime").expect("the time since boot");
        let up: f64 = up.split(' ').next().and_then(|s| s.parse().ok()).expect("seconds");
        let at: f64 = at.parse().expect("a number");
        assert!((up - at / 1e6).abs() < 30.0, "{at} at {up}");
        assert!(manager.hears(PATIENCE).expect("a message").starts_with("READY=1\n"));
    }
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    let stopping = manager.hears(PATIENCE).expect("a message");
    assert_eq!(stopping, "STOPPING=1\nSTATUS=stopping; rules are taken back\n");
    assert_eq!(manager.hears(Duration::from_millis(10)), None, "nobody asked for signs of life");
}

#[test]
fn signs_of_life_come_twice_within_the_time_while_it_lives_and_not_when_it_hangs() {
    let mut r = Router::new("watchdog");
    let manager = Manager::new("watchdog");
    let file = r.configure(PORT);
    let within = Duration::from_secs(2);
    manager.start(&mut r, &["--config", &file], Some(within));
    manager.waits_for("READY=1");
    for _ in 0..3 {
        let began = Instant::now();
        let sign = manager.waits_for("WATCHDOG=1");
        assert!(sign.contains("STATUS=2 ports"), "{sign}");
        assert!(began.elapsed() < within, "{:?}", began.elapsed());
    }
    let pid = r.daemon.as_ref().expect("a daemon").id();
    r.run(&format!("kill -STOP {pid}"));
    while manager.hears(Duration::from_millis(1)).is_some() {}
    assert_eq!(manager.hears(2 * within), None);
    r.run(&format!("kill -CONT {pid}"));
    manager.waits_for("WATCHDOG=1");
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
}

#[test]
fn reload_does_what_sighup_does_and_says_what_is_wrong() {
    let mut r = Router::new("reloaded");
    let file = r.configure(PORT);
    r.start_logging(&["--config", &file], Stdio::inherit());
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    let text = |o: &Output| String::from_utf8_lossy(&o.stderr).into_owned();
    // (`configure` adds a line of its own to no port that has a list.)
    for (config, words) in [
        ("[limits]\nqueue = 0\n", "line 2: queue must be from 1"),
        ("[sight]\nbridged = 1\n", "line 2: bridged: invalid type"),
        ("[sigth]\n", "line 1: unknown field `sigth`"),
    ] {
        r.configure(&format!("{config}{PORT}"));
        let wrong = r.cli(&["reload"]);
        assert_eq!(wrong.status.code(), Some(2), "{}", text(&wrong));
        assert!(text(&wrong).contains(&file), "{}", text(&wrong));
        assert!(text(&wrong).contains(words), "{}", text(&wrong));
        c.ping();
        assert_eq!(r.installed(), BOTH, "nothing has changed");
    }
    let never = "[[admit]]\nverdict = \"never\"\ndestination-ports = [5001]\n";
    r.configure(&format!("[sight]\nledger-size = 1024\n{PORT}{never}"));
    let done = r.json(&["reload"]);
    assert_eq!(done["file"], file, "{done}");
    assert_eq!(done["kept"], serde_json::json!(["[sight] ledger-size"]), "{done}");
    assert_eq!((&done["flushed"], &done["ports_changed"]), (&2.into(), &false.into()), "{done}");
    r.wait_refused(("lan", "original"), "not-admitted", "rule 1", &mut c);
    // Nobody but root.
    let nobody = Command::new("setpriv")
        .args(["--reuid", "65533", "--clear-groups", env!("CARGO_BIN_EXE_ctoffload"), "reload"])
        .output()
        .expect("setpriv");
    assert_eq!(nobody.status.code(), Some(4), "{}", text(&nobody));
    std::fs::remove_file(&file).expect("the file goes");
    let gone = r.cli(&["reload"]);
    assert!(gone.status.code() == Some(2) && text(&gone).contains(&file), "{}", text(&gone));
    r.wait_refused(("lan", "original"), "not-admitted", "rule 1", &mut c);
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
}

#[test]
fn a_pattern_that_matches_no_netdev_is_named_in_the_log_and_by_check() {
    let mut r = Router::new("unmatched");
    let log = std::env::temp_dir().join("ctoffload-unmatched.log");
    let said = || std::fs::read_to_string(&log).expect("the log");
    let start = |r: &mut Router, args: &[&str]| {
        let to = File::create(&log).expect("a file");
        r.start_logging(args, to.into());
    };
    let file = std::env::temp_dir().join("ctoffload-unmatched.toml");
    let of = |text: &str| std::fs::write(&file, text).expect("a file");
    let file = file.to_str().expect("a path");
    of("[[port]]\nmatch = \"eth*\"\n");
    start(&mut r, &["--config", file]);
    wait_until("it is told", || {
        said()
            .lines()
            .any(|l| l.contains(" WARN ") && l.contains("\"eth*\" (line 2)") && l.contains("lan"))
    });
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    of("[[port]]\nmatch = \"lan\"\n[[port]]\nmatch = \"eth*\"\n");
    start(&mut r, &["--config", file]);
    wait_until("it runs", || said().contains("running"));
    assert!(!said().contains("so there is no port yet"), "{}", said());
    assert!(said().contains("no netdev matches: [[port]] match = \"eth*\" (line 4)"), "{}", said());
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    let check = Command::new(env!("CARGO_BIN_EXE_ctoffloadd"))
        .args(["--check", "--config", file, "--port", "w?n", "--port", "dsl*"])
        .output()
        .expect("ctoffloadd");
    let told = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(check.status.success(), "{told}");
    let unmatched: Vec<_> =
        told.lines().filter(|l| l.starts_with("no netdev matches now")).collect();
    assert_eq!(unmatched.len(), 2, "{told}");
    assert!(unmatched[0].ends_with("(line 4)") && unmatched[1].ends_with("--port dsl*"), "{told}");
}
