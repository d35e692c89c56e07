//! What is wrong with a configuration, and where.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A configuration that cannot be used. Displayed as `sender.toml:7: unknown key "steams" in
/// [transfer]: did you mean "streams"?`; the process ends with exit code 78.
#[derive(Debug)]
pub struct ConfigError {
    file: Option<PathBuf>,
    place: Option<Place>,
    key: Option<String>,
    problem: Problem,
}

/// A place in a file, both counted from 1; columns count characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Line.
    pub line: usize,
    /// Character in the line.
    pub column: usize,
}

/// What kind of mistake it is.
#[derive(Debug)]
pub enum Problem {
    /// The file cannot be read.
    Unreadable(io::Error),
    /// It is not TOML.
    Syntax(String),
    /// No such key, or no such table.
    Unknown {
        /// What was found, as the text says it: `key "steams" in [transfer]`.
        found: String,
        /// The nearest known one.
        nearest: Option<&'static str>,
    },
    /// A key has a value that it cannot have, or values that do not fit together.
    Value(String),
    /// A key that must be there is not.
    Missing(String),
    /// It cannot be said whether the file is a sender's or a receiver's.
    KindUnclear(String),
}

impl ConfigError {
    /// A mistake not tied to a place in a file.
    #[must_use]
    pub fn new(problem: Problem) -> Self {
        Self {
            file: None,
            place: None,
            key: None,
            problem,
        }
    }

    /// The same, in `file`.
    #[must_use]
    pub(super) fn in_file(self, file: &Path) -> Self {
        Self {
            file: Some(file.to_owned()),
            ..self
        }
    }

    /// The same, at the bytes `span` of `text`.
    #[must_use]
    pub(super) fn at(self, text: &str, span: Range<usize>) -> Self {
        Self {
            place: Some(Place::of(text, span.start)),
            ..self
        }
    }

    /// The same, about `key`.
    #[must_use]
    pub(crate) fn about(self, key: impl Into<String>) -> Self {
        Self {
            key: Some(key.into()),
            ..self
        }
    }

    /// The file, if the configuration came from one.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// Where in the file.
    #[must_use]
    pub fn place(&self) -> Option<Place> {
        self.place
    }

    /// The key with its table, such as `transfer.streams`; without table for an argument of `migrate`.
    #[must_use]
    pub fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    /// What kind of mistake it is.
    #[must_use]
    pub fn problem(&self) -> &Problem {
        &self.problem
    }
}

impl Place {
    fn of(text: &str, byte: usize) -> Self {
        let before = text.get(..byte).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Self {
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}:", file.display())?;
        }
        if let Some(place) = self.place {
            write!(f, "{}:", place.line)?;
        }
        if self.file.is_some() || self.place.is_some() {
            f.write_str(" ")?;
        }
        match &self.problem {
            // The text names the key itself.
            Problem::Unknown { found, nearest } => {
                write!(f, "unknown {found}")?;
                match nearest {
                    Some(nearest) => write!(f, ": did you mean \"{nearest}\"?"),
                    None => Ok(()),
                }
            }
            Problem::Value(text) => match &self.key {
                Some(key) => write!(f, "{key}: {text}"),
                None => f.write_str(text),
            },
            Problem::Unreadable(error) => write!(f, "cannot be read: {error}"),
            Problem::Syntax(text) => write!(f, "not TOML: {text}"),
            Problem::Missing(text) | Problem::KindUnclear(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for ConfigError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.problem {
            Problem::Unreadable(error) => Some(error),
            _ => None,
        }
    }
}

/// Something worth saying that does not stop the daemon: a user that does not exist (yet), a
/// directory that is missing, a limit that will make zero copy fall back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning(pub String);

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The known name nearest to `word`, if one is near enough to be meant.
pub(super) fn nearest(
    word: &str,
    known: impl IntoIterator<Item = &'static str>,
) -> Option<&'static str> {
    known
        .into_iter()
        .map(|name| (strsim::jaro_winkler(word, name), name))
        .filter(|(likeness, _)| *likeness > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_count_lines_and_characters_from_one() {
        let text = "a = 1\n# é\nb = 2\n";
        assert_eq!(Place::of(text, 0), Place { line: 1, column: 1 });
        let b = text.find('b').unwrap();
        assert_eq!(Place::of(text, b + 4), Place { line: 3, column: 5 });
        assert_eq!(Place::of(text, 999).line, 4);
    }

    #[test]
    fn a_near_miss_is_guessed_and_a_far_one_is_not() {
        let known = ["streams", "window", "timeout"];
        assert_eq!(nearest("steams", known), Some("streams"));
        assert_eq!(nearest("windows", known), Some("window"));
        assert_eq!(nearest("bananas", known), None);
    }
}
