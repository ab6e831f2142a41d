//! Asks the daemon `ctoffloadd`: what is offloaded where, why not, and what is to change.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ctoffload::cli::main()
}
