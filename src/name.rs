//! Names of Regions and attempts: one rule, checked on both sides.
//!
//! A name becomes a file name at the destination, so the rule is also what keeps a Region inside its
//! directory: no separator, and no leading dot.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::limits::NAME_BYTES_MAX;

/// A Region's name or an attempt's id: `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "name {0:?} is not allowed: use 1 to {NAME_BYTES_MAX} letters, digits, '.', '_' or '-', starting with a letter or digit"
)]
pub struct NameError(String);

impl Name {
    /// Checks `text` against the rule.
    pub fn new(text: impl Into<String>) -> Result<Self, NameError> {
        let text = text.into();
        let bytes = text.as_bytes();
        let ok = (1..=NAME_BYTES_MAX).contains(&bytes.len())
            && bytes[0].is_ascii_alphanumeric()
            && bytes
                .iter()
                .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(b));
        if ok {
            Ok(Self(text))
        } else {
            // An error text must not carry a megabyte of somebody's input.
            Err(NameError(text.chars().take(NAME_BYTES_MAX).collect()))
        }
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        Self::new(text)
    }
}

impl std::str::FromStr for Name {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::new(text)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_what_the_rule_allows() {
        for good in ["vm1", "0", "a.b-c_d", "A", &"x".repeat(128)] {
            assert!(Name::new(good).is_ok(), "{good}");
        }
    }

    #[test]
    fn refuses_whatever_could_leave_the_directory() {
        for bad in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            ".hidden",
            "-flag",
            "a\0b",
            "é",
            "a b",
            &"x".repeat(129),
        ] {
            assert!(Name::new(bad).is_err(), "{bad:?}");
        }
    }
}
