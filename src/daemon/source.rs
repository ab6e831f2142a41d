//! Where the configuration comes from: a file that is named, or the default one, and patterns of the command line. It
//! is read at the start, and again when the daemon is asked to.

use std::io;
use std::path::{Path, PathBuf};

use super::config::{Config, ConfigError};

/// The file that is read when none is named, if it is there.
pub const DEFAULT_FILE: &str = "/etc/ctoffload/ctoffload.toml";

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub(super) enum SourceError {
    #[error("configuration")]
    Config(#[from] ConfigError),
    #[error("'{pattern}' is not a pattern")]
    Pattern {
        pattern: String,
        #[source]
        source: glob::PatternError,
    },
}

/// Where the configuration comes from.
#[derive(Debug)]
pub(super) struct Source {
    named: Option<PathBuf>,
    by_default: PathBuf,
    patterns: Vec<String>,
    classes: &'static [&'static str],
}

impl Source {
    pub(super) fn new(
        named: Option<PathBuf>,
        patterns: Vec<String>,
        classes: &'static [&'static str],
    ) -> Self {
        Self { named, by_default: DEFAULT_FILE.into(), patterns, classes }
    }

    /// The file that counts now; `None`: none is named, and the default one is not there.
    pub(super) fn file(&self) -> Option<&Path> {
        if let Some(named) = &self.named {
            return Some(named);
        }
        // What cannot be looked at is read, so that it is told why.
        let absent =
            std::fs::metadata(&self.by_default).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
        (!absent).then_some(&*self.by_default)
    }

    /// Whether netdevs are named on the command line.
    pub(super) fn has_patterns(&self) -> bool {
        !self.patterns.is_empty()
    }

    pub(super) fn read(&self) -> Result<Config, SourceError> {
        let config = match self.file() {
            Some(path) => Config::read(path, self.classes)?,
            None => Config::default(),
        };
        config
            .with_patterns(&self.patterns)
            .map_err(|(pattern, source)| SourceError::Pattern { pattern, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_file_counts_where_none_is_named_and_only_if_it_is_there() {
        let there = std::env::temp_dir().join(format!("ctoffload-source-{}", std::process::id()));
        let source = |named: Option<&str>, by_default: &Path| Source {
            by_default: by_default.to_owned(),
            ..Source::new(named.map(PathBuf::from), vec!["wan*".to_owned()], &["ebpf"])
        };
        let absent = source(None, &there);
        assert_eq!(absent.file(), None);
        let config = absent.read().unwrap();
        assert!(!config.one_way_udp && config.port("wan0").is_some());
        std::fs::write(&there, "[sight]\none-way-udp = true\n").unwrap();
        assert_eq!(absent.file(), Some(&*there), "also if it comes later");
        assert!(absent.read().unwrap().one_way_udp);
        // One that is named is to be there.
        let named = source(Some("/nonexistent/ctoffload.toml"), &there);
        assert_eq!(named.file(), Some(Path::new("/nonexistent/ctoffload.toml")));
        assert!(matches!(named.read(), Err(SourceError::Config(ConfigError::Read { .. }))));
        // Below something that is no directory there is nothing either, but not because nobody made it.
        let strange = source(None, &there.join("x"));
        assert!(strange.read().is_err());
        std::fs::remove_file(&there).unwrap();
    }
}
