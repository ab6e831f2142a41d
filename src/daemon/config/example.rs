//! What `examples/ctoffload.toml` says of the options is what they are.

use std::collections::{BTreeMap, BTreeSet};

use super::Config;

const EXAMPLE: &str = include_str!("../../../examples/ctoffload.toml");
const CLASSES: &[&str] = &["ebpf", "tc-flower", "nf-flowtable"];

/// What stands behind an option that has no default.
const NO_DEFAULT: &str = "# no default";

/// With every option that is commented out.
fn with_all_options() -> String {
    // A comment for people has a blank behind the "#".
    let option = |line: &str| match line.strip_prefix('#') {
        Some(rest) if rest.starts_with(|c: char| c == '[' || c.is_ascii_lowercase()) => {
            rest.to_owned()
        }
        _ => line.to_owned(),
    };
    EXAMPLE.lines().map(|line| option(line) + "\n").collect()
}

/// The options of each table, as lines.
fn options(text: &str) -> BTreeMap<String, Vec<String>> {
    let (mut tables, mut table) = (BTreeMap::<_, Vec<_>>::new(), String::new());
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        if line.starts_with('[') {
            line.clone_into(&mut table);
            tables.entry(table.clone()).or_default();
        } else {
            tables.entry(table.clone()).or_default().push(line.to_owned());
        }
    }
    tables
}

fn key(line: &str) -> &str {
    line.split('=').next().unwrap().trim()
}

/// The names that the reader of a table would have taken instead of one that it does not know.
fn known(in_front: &str) -> BTreeSet<String> {
    let (_, why) = Config::parse(&format!("{in_front}no-such-option = 1\n"), CLASSES).unwrap_err();
    let (_, names) = why.split_once("expected ").unwrap();
    names.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn parse(text: &str) -> Config {
    Config::parse(text, CLASSES).unwrap_or_else(|wrong| panic!("{wrong:?} in {text}"))
}

fn same(a: &Config, b: &Config) -> bool {
    a.fixed_keys_that_differ(b).is_empty()
        && a.tunables() == b.tunables()
        && a.keep_rules == b.keep_rules
        && !a.has_other_ports(b)
}

#[test]
fn as_it_is_it_changes_nothing() {
    assert!(same(&parse(EXAMPLE), &Config::default()));
}

#[test]
fn it_has_every_option_and_no_other() {
    let all = with_all_options();
    parse(&all);
    let tables = options(&all);
    let names = tables.keys().map(|t| t.trim_matches(['[', ']']).to_owned());
    assert_eq!(names.collect::<BTreeSet<_>>(), known(""));
    for (table, lines) in &tables {
        let has: BTreeSet<_> = lines.iter().map(|line| key(line).to_owned()).collect();
        assert_eq!(has, known(&format!("{table}\n")), "{table}");
    }
}

#[test]
fn every_default_that_it_states_is_the_default() {
    let mut stated = 0;
    for (table, lines) in options(&with_all_options()) {
        // What a [[port]] cannot be without.
        let base = if table == "[[port]]" { "match = \"x\"\n" } else { "" };
        let without = if base.is_empty() { String::new() } else { format!("{table}\n{base}") };
        for line in lines.iter().filter(|line| !line.ends_with(NO_DEFAULT)) {
            let with = parse(&format!("{table}\n{base}{line}\n"));
            assert!(same(&parse(&without), &with), "{table} {line} is not the default");
            stated += 1;
        }
    }
    assert!(stated >= 20, "{stated}");
}
