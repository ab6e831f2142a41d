//! Command lines, run with few processes: each is slow to start in an emulated machine.
//!
//! A line of a shell is run by a shell, but for the commonest kind: a list (`;`, `&&`, ends of lines)
//! of plain commands, without quotes, variables or redirections. Those are run up to the first that
//! fails. Neighbours of one kind are given to one `ip -batch` or `tc -batch`, and values that
//! `sysctl` would set are written from here.

use std::io::Write;
use std::process::{Command, ExitStatus, Output, Stdio};

/// What makes a line the shell's.
const SHELL: &[char] = &[
    '\'', '"', '`', '\\', '$', '|', '<', '>', '(', ')', '{', '}', '*', '?', '[', ']', '#', '!', '~',
];
const KEYWORDS: [&str; 7] = ["for", "while", "if", "set", "cd", "exec", "export"];
/// What the objects of `ip` and `tc` can do in a batch.
const CHANGES: [&str; 5] = ["add", "del", "set", "replace", "change"];

/// Runs lines where the calling thread is.
pub(crate) fn run(lines: &str) -> Output {
    let Some(commands) = plain(lines) else {
        return Command::new("sh").args(["-c", lines]).output().expect("sh");
    };
    let mut all = Output { status: ExitStatus::default(), stdout: Vec::new(), stderr: Vec::new() };
    let mut rest = &commands[..];
    while let Some(first) = rest.first() {
        let n = rest.iter().take_while(|c| first.goes_with(c)).count().max(1);
        let (now, later) = rest.split_at(n);
        rest = later;
        let Some(out) = run_together(now) else { continue };
        all.stdout.extend(out.stdout);
        all.stderr.extend(out.stderr);
        all.status = out.status;
        if !out.status.success() {
            break;
        }
    }
    all
}

/// A plain command: its program with the options right behind it, and the rest.
struct Plain<'a> {
    head: Vec<&'a str>,
    rest: Vec<&'a str>,
}

impl<'a> Plain<'a> {
    fn parse(command: &'a str) -> Self {
        let words: Vec<_> = command.split_whitespace().collect();
        let mut n = 1;
        while words.get(n).is_some_and(|w| w.starts_with('-')) {
            // The one option of these programs with a value.
            n += if ["-n", "-netns"].contains(&words[n]) { 2 } else { 1 };
        }
        let n = n.min(words.len());
        Self { head: words[..n].to_vec(), rest: words[n..].to_vec() }
    }

    /// One process can do both. (What shows or flushes keeps its filter for the next command.)
    fn goes_with(&self, other: &Self) -> bool {
        let changes = |c: &Self| c.rest.get(1).is_some_and(|verb| CHANGES.contains(verb));
        ["ip", "tc"].contains(&self.head[0])
            && self.head == other.head
            && changes(self)
            && changes(other)
    }
}

/// The commands of a list of plain ones.
fn plain(lines: &str) -> Option<Vec<Plain<'_>>> {
    // `set -e`: that is how lists are run here.
    let lines = lines.trim().strip_prefix("set -e").map_or(lines, |l| l.trim_start_matches(';'));
    if lines.contains(SHELL) || lines.replace("&&", "").contains('&') {
        return None;
    }
    let commands = lines.split("&&").flat_map(|l| l.split([';', '\n']));
    let commands = commands.map(str::trim).filter(|c| !c.is_empty());
    let commands: Vec<_> = commands.map(Plain::parse).collect();
    let shell = |c: &Plain<'_>| KEYWORDS.contains(&c.head[0]) || c.head[0].contains('=');
    (!commands.is_empty() && !commands.iter().any(shell)).then_some(commands)
}

/// `None`: done, without a process.
fn run_together(commands: &[Plain<'_>]) -> Option<Output> {
    let [head, args @ ..] = &commands[0].head[..] else { unreachable!("a command has a program") };
    if let [only] = commands {
        if only.head == ["sysctl", "-qw"] && only.rest.iter().all(|set| write_sysctl(set)) {
            return None;
        }
        return Some(
            Command::new(head).args(args).args(&only.rest).output().expect("the program starts"),
        );
    }
    let mut child = Command::new(head)
        .args(args)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let lines: Vec<_> = commands.iter().map(|c| c.rest.join(" ")).collect();
    let mut stdin = child.stdin.take().expect("its input");
    // It may have ended before it read all: its status says why.
    let _ = stdin.write_all((lines.join("\n") + "\n").as_bytes());
    drop(stdin);
    Some(child.wait_with_output().expect("the program ends"))
}

/// Sets a value (`name=value`) of the calling thread's network namespace.
fn write_sysctl(set: &str) -> bool {
    let Some((name, value)) = set.split_once('=') else { return false };
    std::fs::write(format!("/proc/sys/{}", name.replace('.', "/")), value).is_ok()
}
