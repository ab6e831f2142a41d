//! A private network namespace per test, and the few `ip` commands that tests share.

use std::fs::File;
use std::process::Output;

use nix::sched::{CloneFlags, setns, unshare};

use crate::script;

/// Puts the calling thread into a fresh network namespace; drop puts it back. Threads spawned
/// meanwhile inherit the namespace.
pub(crate) struct NetNs {
    before: File,
}

impl NetNs {
    /// # Panics
    /// Without root: these tests are for the lab.
    #[must_use]
    pub(crate) fn new() -> Self {
        let before = File::open("/proc/thread-self/ns/net").expect("a network namespace");
        unshare(CloneFlags::CLONE_NEWNET).expect("unshare(CLONE_NEWNET): root is needed");
        let ns = Self { before };
        ns.run("ip link set lo up");
        ns
    }

    /// Runs a command line in the namespace and returns what it printed.
    ///
    /// # Panics
    /// When it fails.
    pub(crate) fn run(&self, line: &str) -> String {
        let out = self.try_run(line);
        assert!(
            out.status.success(),
            "`{line}`: {}{}",
            String::from_utf8_lossy(&out.stderr),
            String::from_utf8_lossy(&out.stdout)
        );
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    /// The same, where failure is an answer too.
    pub(crate) fn try_run(&self, line: &str) -> Output {
        script::run(line)
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        setns(&self.before, CloneFlags::CLONE_NEWNET).expect("back to the first namespace");
    }
}
