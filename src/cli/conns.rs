//! Connections, printed as they come.

use std::io::Write;

use super::CliError;
use super::plan::Output;
use super::text;
use crate::control::info::ConnInfo;

/// What has been printed of a list of connections.
pub(super) struct Printed<'a> {
    show: &'a Output,
    any: bool,
    out: String,
}

impl<'a> Printed<'a> {
    pub(super) fn new(show: &'a Output) -> Self {
        Self { show, any: false, out: String::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        !self.any
    }

    /// The next ones, at once.
    pub(super) fn some(&mut self, conns: &[ConnInfo], to: &mut impl Write) -> Result<(), CliError> {
        for conn in conns {
            if self.show.json {
                self.json(conn)?
            } else {
                self.text(conn)
            }
            self.any = true;
        }
        to.write_all(self.out.as_bytes())?;
        to.flush()?;
        self.out.clear();
        Ok(())
    }

    /// One array of all, or a line for each.
    fn json(&mut self, conn: &ConnInfo) -> Result<(), CliError> {
        let Output { pretty, oneline, .. } = *self.show;
        if !oneline {
            self.out.push_str(if self.any { "," } else { "[" });
        }
        if pretty {
            // No string has a line break of its own in JSON.
            let json = serde_json::to_string_pretty(conn)?;
            self.out.push_str("\n  ");
            self.out.push_str(&json.replace('\n', "\n  "));
        } else {
            self.out.push_str(&serde_json::to_string(conn)?);
        }
        if oneline {
            self.out.push('\n');
        }
        Ok(())
    }

    fn text(&mut self, conn: &ConnInfo) {
        if !self.show.oneline {
            return text::conn(&mut self.out, conn, self.show.detail);
        }
        // As iproute2 does it.
        let mut lines = String::new();
        text::conn(&mut lines, conn, self.show.detail);
        self.out.push_str(&lines.trim_end().replace('\n', "\\"));
        self.out.push('\n');
    }

    /// All have come.
    pub(super) fn end(self, to: &mut impl Write) -> Result<(), CliError> {
        if !self.show.json || self.show.oneline {
            return Ok(());
        }
        let end = match (self.any, self.show.pretty) {
            (false, _) => "[]\n",
            (true, false) => "]\n",
            (true, true) => "\n]\n",
        };
        to.write_all(end.as_bytes())?;
        to.flush()?;
        Ok(())
    }
}
