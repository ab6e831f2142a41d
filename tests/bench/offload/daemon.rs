//! The daemon under measurement: the program itself, and what it says and costs.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ctoffload::control::Client;
use ctoffload::control::info::{PortInfo, Stats};
use nix::sys::signal::{Signal, kill};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

const PATIENCE: Duration = Duration::from_secs(60);

/// Stopped when it is dropped.
pub(crate) struct Daemon {
    child: Child,
    config: PathBuf,
}

impl Daemon {
    /// With these ports, and room for as many connections as are measured.
    pub(crate) fn start(ports: [&str; 2]) -> Self {
        let of = |port| format!("[[port]]\nmatch = \"{port}\"\nproviders = [\"ebpf\"]\n");
        let text = format!(
            "[sight]\nledger-size = 4194304\n[ebpf]\nmax-rules = 1048576\n[admission]\nmin-packets = 0\n{}{}",
            of(ports[0]),
            of(ports[1])
        );
        let config =
            std::env::temp_dir().join(format!("ctoffload-bench-{}.toml", std::process::id()));
        fs::write(&config, text).expect("a configuration file");
        let program = env!("CARGO_BIN_EXE_ctoffloadd");
        let mut command = Command::new(program);
        command.arg("--config").arg(&config).stdin(Stdio::null());
        // SAFETY: one system call, which allocates nothing.
        unsafe {
            command.pre_exec(|| {
                // Whatever ends the bench ends the daemon.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
                Ok(())
            });
        }
        let child = command.spawn().expect(program);
        let mut this = Self { child, config };
        let patience = Instant::now() + PATIENCE;
        while !this.is_ready() {
            if let Ok(Some(status)) = this.child.try_wait() {
                panic!("the daemon has ended: {status}");
            }
            assert!(Instant::now() < patience, "the daemon does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        this
    }

    fn is_ready(&self) -> bool {
        let ports = Client::connect().and_then(|mut c| c.ports());
        ports.is_ok_and(|ports| {
            ports.iter().filter(|p| p.provider.as_deref() == Some("ebpf")).count() == 2
        })
    }

    pub(crate) fn stats(&self) -> Stats {
        Client::connect().and_then(|mut c| c.stats()).expect("the daemon answers")
    }

    pub(crate) fn ports(&self) -> Vec<PortInfo> {
        Client::connect().and_then(|mut c| c.ports()).expect("the daemon answers")
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Processor time of all its threads so far, those that have ended too.
    pub(crate) fn cpu(&self) -> Duration {
        let clock = clock_getcpuclockid(self.pid()).expect("the daemon runs");
        clock_gettime(clock).expect("the daemon runs").into()
    }

    /// The same of each thread that there is, by its name.
    pub(crate) fn cpu_of_threads(&self) -> Vec<(String, Duration)> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).expect("the daemon runs");
        let mut threads: Vec<(String, Duration)> = Vec::new();
        for task in tasks.filter_map(Result::ok) {
            let read = |file: &str| fs::read_to_string(task.path().join(file)).ok();
            let (Some(name), Some(stat)) = (read("comm"), read("schedstat")) else { continue };
            let on_cpu = stat.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0);
            let (name, on_cpu) = (name.trim().to_owned(), Duration::from_nanos(on_cpu));
            match threads.iter_mut().find(|t| t.0 == name) {
                Some(t) => t.1 += on_cpu,
                None => threads.push((name, on_cpu)),
            }
        }
        threads
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = kill(self.pid(), Signal::SIGTERM);
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.config);
    }
}
