//! A host beside the router of a test.

use std::sync::mpsc;
use std::thread::JoinHandle;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::gettid;

use crate::script;

type Job = Box<dyn FnOnce() + Send>;

/// A thread that lives in a network namespace of its own and does what it is given.
pub(crate) struct Host {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    /// What `ip link ... netns` takes.
    pub(crate) tid: i32,
}

impl Host {
    pub(crate) fn new() -> Self {
        let (jobs, todo) = mpsc::channel::<Job>();
        let (tell, told) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("unshare(CLONE_NEWNET): root is needed");
            tell.send(gettid().as_raw()).expect("the test waits");
            todo.into_iter().for_each(|job| job());
        });
        Self { jobs: Some(jobs), thread: Some(thread), tid: told.recv().expect("the host starts") }
    }

    /// Runs `f` in the namespace, waits for it and returns its result. Threads that it spawns stay
    /// there.
    pub(crate) fn call<R: Send + 'static>(&self, f: impl FnOnce() -> R + Send + 'static) -> R {
        self.start(f).recv().expect("the job of a host panicked")
    }

    /// The same without waiting: what is received is the result.
    pub(crate) fn start<R: Send + 'static>(
        &self,
        f: impl FnOnce() -> R + Send + 'static,
    ) -> mpsc::Receiver<R> {
        let (tell, told) = mpsc::channel();
        let job: Job = Box::new(move || {
            let _ = tell.send(f());
        });
        self.jobs.as_ref().expect("until drop").send(job).expect("the host lives");
        told
    }

    /// Runs lines of a shell there, up to the first that fails, and returns what they printed.
    pub(crate) fn sh(&self, lines: &str) -> String {
        let lines = lines.to_owned();
        self.call(move || sh(&lines))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.jobs = None;
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// The same where the calling thread is.
pub(crate) fn sh(lines: &str) -> String {
    let out = script::run(&format!("set -e\n{lines}"));
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    assert!(out.status.success(), "`{lines}`: {}{}", text(&out.stderr), text(&out.stdout));
    text(&out.stdout)
}
