//! The command line of the suites that run in the lab.

use std::path::PathBuf;
use std::process::ExitCode;

/// What a suite is told.
pub(crate) struct Setting {
    /// The machine's name in the figures.
    pub(crate) on: String,
    /// It runs at its own speed: the bars for that.
    pub(crate) native: bool,
    /// Few rounds: to see that it runs, not to believe the figures.
    pub(crate) quick: bool,
    /// Where the figures go as JSON.
    pub(crate) out: Option<PathBuf>,
    /// The switches of this suite alone that were given.
    own: Vec<String>,
}

impl Setting {
    /// Reads the command line of a suite that has these switches beside the common ones; where that
    /// is wrong, its usage is shown.
    ///
    /// # Errors
    /// The exit status.
    pub(crate) fn read(usage: &str, own: &[&str]) -> Result<Self, ExitCode> {
        let wrong = || {
            eprintln!("usage: {usage}");
            ExitCode::from(2)
        };
        // cargo says `--bench`.
        let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
        let mut on = None;
        let mut setting =
            Self { on: String::new(), native: false, quick: false, out: None, own: Vec::new() };
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--on" => on = args.next(),
                "--native" => setting.native = true,
                "--quick" => setting.quick = true,
                "--out" => setting.out = args.next().map(PathBuf::from),
                switch if own.contains(&switch) => setting.own.push(arg),
                _ => return Err(wrong()),
            }
        }
        setting.on = on.ok_or_else(wrong)?;
        Ok(setting)
    }

    /// Whether this switch of the suite's own was given.
    pub(crate) fn has(&self, switch: &str) -> bool {
        self.own.iter().any(|own| own == switch)
    }
}
