//! Errors as a line of a log, or of a terminal.

use std::error::Error;

/// An error and its causes, on one line.
pub(crate) fn one_line(e: &dyn Error) -> String {
    let mut line = e.to_string();
    let mut cause = e.source();
    while let Some(e) = cause {
        line.push_str(": ");
        line.push_str(&e.to_string());
        cause = e.source();
    }
    // The kernel's and the daemon's words are not ours: they do not get to start a second line.
    line.replace(|c: char| c.is_control(), " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("port add {0}")]
    struct Outer(&'static str, #[source] Inner);
    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Inner(&'static str);

    #[test]
    fn an_error_is_one_line_with_its_causes_whatever_others_put_into_it() {
        let e = Outer("eth0", Inner("two\nlines\u{1b}[31m"));
        assert_eq!(one_line(&e), "port add eth0: two lines [31m");
        assert_eq!(one_line(&Inner("no cause")), "no cause");
    }
}
