//! The figures of a suite: a table for people, JSON for programs.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use serde_json::{Value, json};

/// What a figure has to reach.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bar {
    AtMost(f64),
    Below(f64),
    AtLeast(f64),
}

impl Bar {
    fn is_held_by(self, value: f64) -> bool {
        match self {
            Self::AtMost(bar) => value <= bar,
            Self::Below(bar) => value < bar,
            Self::AtLeast(bar) => value >= bar,
        }
    }
}

impl std::fmt::Display for Bar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtMost(bar) => write!(f, "<= {bar}"),
            Self::Below(bar) => write!(f, "< {bar}"),
            Self::AtLeast(bar) => write!(f, ">= {bar}"),
        }
    }
}

/// One number. Without a value it could not be measured here, and the note says why.
#[derive(Debug)]
pub(crate) struct Figure {
    name: String,
    value: Option<f64>,
    unit: &'static str,
    bar: Option<Bar>,
    peers: Vec<(String, f64)>,
    note: String,
}

impl Figure {
    pub(crate) fn new(name: impl Into<String>, value: Option<f64>, unit: &'static str) -> Self {
        Self {
            name: name.into(),
            value: value.filter(|v| v.is_finite()),
            unit,
            bar: None,
            peers: Vec::new(),
            note: String::new(),
        }
    }

    pub(crate) fn bar(mut self, bar: Bar) -> Self {
        self.bar = Some(bar);
        self
    }

    /// What another design takes for the same work, measured in the same rounds.
    pub(crate) fn peer(mut self, name: impl Into<String>, value: Option<f64>) -> Self {
        self.peers.extend(value.map(|v| (name.into(), v)));
        self
    }

    pub(crate) fn note(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }

    /// `None`: there is no bar, or nothing to compare with it.
    fn held(&self) -> Option<bool> {
        Some(self.bar?.is_held_by(self.value?))
    }

    fn verdict(&self) -> &'static str {
        match (self.held(), self.bar) {
            (Some(true), _) => "held",
            (Some(false), _) => "SHORT",
            (None, Some(_)) => "not measured",
            (None, None) => "",
        }
    }

    fn json(&self) -> Value {
        let mut v = json!({
            "name": self.name,
            "value": self.value.map(rounded),
            "unit": self.unit,
            "bar": self.bar.map(|b| b.to_string()),
            "held": self.held(),
        });
        if !self.peers.is_empty() {
            v["peers"] = self.peers.iter().map(|(n, v)| (n.clone(), json!(rounded(*v)))).collect();
        }
        if !self.note.is_empty() {
            v["note"] = json!(self.note);
        }
        v
    }
}

/// All figures of a suite.
#[derive(Debug, Default)]
pub(crate) struct Report(Vec<Figure>);

impl Report {
    pub(crate) fn add(&mut self, figure: Figure) {
        eprintln!("  {}: {}", figure.name, figure.value.map_or("not measured".into(), number));
        self.add_silently(figure);
    }

    /// The same without a line on stderr: where all of it has been told already.
    pub(crate) fn add_silently(&mut self, figure: Figure) {
        self.0.push(figure);
    }

    pub(crate) fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let value = |f: &Figure| f.value.map_or("-".to_owned(), number);
        let bar = |f: &Figure| f.bar.map_or(String::new(), |b| b.to_string());
        let rows: Vec<[String; 6]> = self
            .0
            .iter()
            .map(|f| {
                let peers: Vec<_> =
                    f.peers.iter().map(|(n, v)| format!("{n} {}", number(*v))).collect();
                [
                    f.name.clone(),
                    value(f),
                    f.unit.to_owned(),
                    bar(f),
                    f.verdict().to_owned(),
                    peers.join(", "),
                ]
            })
            .collect();
        let head = ["what", "value", "unit", "bar", "verdict", "peers"].map(str::to_owned);
        let width = |n: usize| {
            rows.iter().chain([&head]).map(|r| r[n].chars().count()).max().unwrap_or_default()
        };
        let widths: [usize; 5] = std::array::from_fn(width);
        for row in [&head].into_iter().chain(&rows) {
            let [a, b, c, d, e, f] = row;
            let [wa, wb, wc, wd, we] = widths;
            let line = format!("{a:wa$}  {b:>wb$}  {c:wc$}  {d:wd$}  {e:we$}  {f}");
            writeln!(out, "{}", line.trim_end())?;
        }
        let held = self.0.iter().filter(|f| f.held() == Some(true)).count();
        let short = self.0.iter().filter(|f| f.held() == Some(false)).count();
        let unmeasured = self.0.iter().filter(|f| f.verdict() == "not measured").count();
        write!(out, "{held} bars held, {short} short")?;
        if unmeasured > 0 {
            write!(out, ", {unmeasured} not measured")?;
        }
        writeln!(out)?;
        for f in self.0.iter().filter(|f| !f.note.is_empty()) {
            writeln!(out, "  {}: {}", f.name, f.note)?;
        }
        Ok(())
    }

    /// Writes the figures as one JSON list.
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let list: Vec<Value> = self.0.iter().map(Figure::json).collect();
        let mut text = serde_json::to_string_pretty(&list)?;
        text.push('\n');
        std::fs::write(path, text)
    }
}

/// What a suite ends with: the table to stdout, and the JSON where it is wanted.
pub(crate) fn finish(report: &Report, out: Option<&Path>) -> ExitCode {
    if let Err(e) = report.print(&mut io::stdout()) {
        eprintln!("{e}");
        return ExitCode::FAILURE;
    }
    if let Some(out) = out
        && let Err(e) = report.write(out)
    {
        eprintln!("{}: {e}", out.display());
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Three significant digits after the point where it matters.
fn number(v: f64) -> String {
    match v.abs() {
        a if a >= 1000.0 => format!("{v:.0}"),
        a if a >= 100.0 => format!("{v:.1}"),
        _ => format!("{v:.2}"),
    }
}

fn rounded(v: f64) -> f64 {
    (v * 1000.0).round() / 1000.0
}
