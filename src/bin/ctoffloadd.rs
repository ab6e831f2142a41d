//! The daemon: see [`ctoffload::daemon`].

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ctoffload::daemon::main()
}
