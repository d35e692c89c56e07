//! Tables of keys: every section is read through one, from TOML and from QMP alike.
//!
//! A [`Key`] says how one value gets into its section, and that is the only place that knows. So an
//! unknown key, a wrong type and a number out of range are found in one way, each with its line, and
//! the shipped configuration files can be compared with the tables.

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};
use std::path::PathBuf;

use serde_json::Value;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, Problem, nearest};
use super::units::{Interval, Rate, Size};

/// One key of a section `T`.
pub(super) struct Key<T> {
    pub(super) name: &'static str,
    pub(super) set: fn(&mut T, &Given<'_>) -> Result<(), Refusal>,
}

/// Why a value was refused.
#[derive(Debug)]
pub(super) struct Refusal {
    /// Which element of a list it is about.
    element: Option<usize>,
    reason: String,
}

impl Refusal {
    pub(super) fn new(reason: impl ToString) -> Self {
        Self {
            element: None,
            reason: reason.to_string(),
        }
    }

    /// A key that exists in the design, with a value this version does nothing for.
    pub(super) fn not_served(only: &str) -> Self {
        Self::new(format_args!(
            "not served by this version, which takes only {only}"
        ))
    }
}

/// Who wrote a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// A person, in a file: times need a unit.
    Toml,
    /// A program, over QMP: bare numbers are in QEMU's units (bytes, milliseconds, bytes per second).
    Json,
}

/// A value as it was given.
pub(super) struct Given<'a> {
    pub(super) value: &'a Value,
    pub(super) origin: Origin,
}

/// A value that is one of a few words.
pub(super) trait Choice: Copy + PartialEq + 'static {
    /// Every word, and what it stands for.
    const ALL: &'static [(&'static str, Self)];

    /// The word for it.
    fn word(self) -> &'static str {
        Self::ALL
            .iter()
            .find(|(_, choice)| *choice == self)
            .map_or("", |(word, _)| word)
    }
}

/// The value as a refusal shows it: what kind of thing it is, and what it says.
fn shown(value: &Value) -> String {
    let text: String = value.to_string().chars().take(64).collect();
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) => format!("the boolean {text}"),
        Value::Number(_) => format!("the number {text}"),
        Value::String(_) => text,
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a table".to_owned(),
    }
}

impl<'a> Given<'a> {
    fn wrong_type(&self, wanted: &str) -> Refusal {
        Refusal::new(format_args!("{} is not {wanted}", shown(self.value)))
    }

    pub(super) fn text(&self) -> Result<&'a str, Refusal> {
        self.value.as_str().ok_or_else(|| self.wrong_type("a text"))
    }

    /// A path of this machine. Relative ones would depend on where the daemon was started.
    pub(super) fn path(&self) -> Result<PathBuf, Refusal> {
        let path = PathBuf::from(self.text()?);
        if path.is_absolute() {
            Ok(path)
        } else {
            Err(self.wrong_type("a path that starts with \"/\""))
        }
    }

    pub(super) fn flag(&self) -> Result<bool, Refusal> {
        self.value
            .as_bool()
            .ok_or_else(|| self.wrong_type("true or false"))
    }

    /// A whole number within `range`. A program may also send it as text: `migrate --set` does.
    pub(super) fn count(&self, range: RangeInclusive<u64>) -> Result<u64, Refusal> {
        let number = match self.value {
            Value::Number(number) => number.as_u64(),
            Value::String(text) if self.origin == Origin::Json => text.parse().ok(),
            _ => None,
        };
        match number {
            Some(number) if range.contains(&number) => Ok(number),
            _ => Err(self.wrong_type(&format!(
                "a whole number from {} to {}",
                range.start(),
                range.end()
            ))),
        }
    }

    /// The same; nothing for `"none"`.
    pub(super) fn optional_count(
        &self,
        range: RangeInclusive<u64>,
    ) -> Result<Option<u64>, Refusal> {
        match self.value {
            Value::String(text) if text == "none" => Ok(None),
            _ => self.count(range).map(Some),
        }
    }

    pub(super) fn size(&self, range: RangeInclusive<u64>) -> Result<u64, Refusal> {
        let bytes = match self.value {
            Value::String(text) => text.parse::<Size>().map_err(Refusal::new)?.0,
            Value::Number(number) => number
                .as_u64()
                .ok_or_else(|| self.wrong_type("a whole number of bytes"))?,
            _ => return Err(self.wrong_type("a size such as \"64MiB\"")),
        };
        if range.contains(&bytes) {
            return Ok(bytes);
        }
        Err(Refusal::new(format_args!(
            "{} is outside {} to {}",
            Size(bytes),
            Size(*range.start()),
            Size(*range.end())
        )))
    }

    pub(super) fn rate(&self) -> Result<u64, Refusal> {
        match self.value {
            Value::String(text) => Ok(text.parse::<Rate>().map_err(Refusal::new)?.0),
            Value::Number(number) => match (number.as_u64(), self.origin) {
                (Some(bytes), Origin::Json) => Ok(bytes),
                (Some(0), Origin::Toml) => Ok(0),
                _ => {
                    Err(self.wrong_type("a rate: write \"300MiB/s\", \"10Gbit/s\", or 0 for none"))
                }
            },
            _ => Err(self.wrong_type("a rate such as \"300MiB/s\"")),
        }
    }

    pub(super) fn interval(
        &self,
        range: RangeInclusive<Interval>,
    ) -> Result<std::time::Duration, Refusal> {
        let interval = match (self.value, self.origin) {
            (Value::String(text), _) => text.parse::<Interval>().map_err(Refusal::new)?,
            (Value::Number(number), Origin::Json) => {
                let ms = number
                    .as_u64()
                    .ok_or_else(|| self.wrong_type("a whole number of milliseconds"))?;
                Interval(std::time::Duration::from_millis(ms))
            }
            (Value::Number(_), Origin::Toml) => {
                return Err(self.wrong_type("a time: it needs a unit, as in \"300ms\" or \"30s\""));
            }
            _ => return Err(self.wrong_type("a time such as \"300ms\"")),
        };
        if range.contains(&interval) {
            return Ok(interval.0);
        }
        Err(Refusal::new(format_args!(
            "{interval} is outside {} to {}",
            range.start(),
            range.end()
        )))
    }

    /// As [`Given::interval`], or `none` (JSON also: null).
    pub(super) fn optional_interval(
        &self,
        range: RangeInclusive<Interval>,
    ) -> Result<Option<std::time::Duration>, Refusal> {
        match (self.value, self.origin) {
            (Value::Null, Origin::Json) => Ok(None),
            (Value::String(text), _) if text == "none" => Ok(None),
            _ => self.interval(range).map(Some),
        }
    }

    pub(super) fn choice<C: Choice>(&self) -> Result<C, Refusal> {
        let text = self.text()?;
        let found = C::ALL.iter().find(|(word, _)| *word == text);
        found.map(|(_, choice)| *choice).ok_or_else(|| {
            let words: Vec<_> = C::ALL.iter().map(|(word, _)| format!("{word:?}")).collect();
            self.wrong_type(&format!("one of {}", words.join(", ")))
        })
    }

    /// Every element of a list, read by `read`.
    pub(super) fn list<T>(
        &self,
        read: impl Fn(&Given<'_>) -> Result<T, Refusal>,
    ) -> Result<Vec<T>, Refusal> {
        let values = self
            .value
            .as_array()
            .ok_or_else(|| self.wrong_type("a list in brackets"))?;
        let element = |(index, value)| {
            let given = Given {
                value,
                origin: self.origin,
            };
            read(&given).map_err(|refusal| Refusal {
                element: Some(index),
                ..refusal
            })
        };
        values.iter().enumerate().map(element).collect()
    }
}

/// One TOML document: its text, for places, and its tables.
pub(super) struct Document<'a> {
    text: &'a str,
    root: DeTable<'a>,
}

/// A table of a document: `[name]`, or one of `[[name]]`.
pub(super) struct Table<'d, 'a> {
    document: &'d Document<'a>,
    name: &'static str,
    entries: &'d DeTable<'a>,
    span: Range<usize>,
    keys_seen: BTreeMap<&'static str, Range<usize>>,
}

impl<'a> Document<'a> {
    pub(super) fn parse(text: &'a str) -> Result<Self, ConfigError> {
        match DeTable::parse(text) {
            Ok(root) => Ok(Self {
                text,
                root: root.into_inner(),
            }),
            Err(error) => {
                let problem = Problem::Syntax(error.message().to_owned());
                let span = error.span().unwrap_or(0..0);
                Err(ConfigError::new(problem).at(text, span))
            }
        }
    }

    /// Whether there is a table, or a key, of this name at the top.
    pub(super) fn has(&self, name: &str) -> bool {
        self.root.contains_key(name)
    }

    /// Refuses every table that is not in `known`, in the order of the file.
    pub(super) fn only(&self, known: &[&'static str]) -> Result<(), ConfigError> {
        let unknown = self.root.iter().filter(|(key, _)| {
            let name: &str = key.get_ref();
            !known.contains(&name)
        });
        let Some((key, value)) = unknown.min_by_key(|(key, _)| key.span().start) else {
            return Ok(());
        };
        let found = if value.get_ref().is_table() {
            format!("table [{}]", key.get_ref())
        } else {
            format!("key {:?} outside any table", key.get_ref())
        };
        let nearest = nearest(key.get_ref(), known.iter().copied());
        Err(ConfigError::new(Problem::Unknown { found, nearest }).at(self.text, key.span()))
    }

    /// The table `[name]`, if there is one.
    pub(super) fn table(&self, name: &'static str) -> Result<Option<Table<'_, 'a>>, ConfigError> {
        let Some((key, value)) = self.root.get_key_value(name) else {
            return Ok(None);
        };
        match value.get_ref() {
            DeValue::Table(entries) => Ok(Some(self.section(name, entries, value.span()))),
            _ => Err(
                ConfigError::new(Problem::Value(format!("is a table: write [{name}]")))
                    .about(name)
                    .at(self.text, key.span()),
            ),
        }
    }

    /// Every `[[name]]`.
    pub(super) fn tables(&self, name: &'static str) -> Result<Vec<Table<'_, 'a>>, ConfigError> {
        let Some((key, value)) = self.root.get_key_value(name) else {
            return Ok(Vec::new());
        };
        let wrong = || {
            ConfigError::new(Problem::Value(format!(
                "is a list of tables: write [[{name}]] before each"
            )))
            .about(name)
            .at(self.text, key.span())
        };
        let array = value.get_ref().as_array().ok_or_else(wrong)?;
        let table = |element: &'_ Spanned<DeValue<'a>>| element.get_ref().is_table();
        if !array.iter().all(table) {
            return Err(wrong());
        }
        Ok(array
            .iter()
            .filter_map(|element| {
                let entries = element.get_ref().as_table()?;
                Some(self.section(name, entries, element.span()))
            })
            .collect())
    }

    fn section<'d>(
        &'d self,
        name: &'static str,
        entries: &'d DeTable<'a>,
        span: Range<usize>,
    ) -> Table<'d, 'a> {
        Table {
            document: self,
            name,
            entries,
            span,
            keys_seen: BTreeMap::new(),
        }
    }
}

impl Table<'_, '_> {
    /// Reads every key into `section`; the first mistake in the file's order is the one reported.
    pub(super) fn read<T>(&mut self, keys: &[Key<T>], section: &mut T) -> Result<(), ConfigError> {
        let mut entries: Vec<_> = self.entries.iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        for (name, spanned) in entries {
            let Some(key) = keys.iter().find(|key| key.name == name.get_ref().as_ref()) else {
                let found = format!("key {:?} in [{}]", name.get_ref(), self.name);
                let nearest = nearest(name.get_ref(), keys.iter().map(|key| key.name));
                return Err(ConfigError::new(Problem::Unknown { found, nearest })
                    .about(format!("{}.{}", self.name, name.get_ref()))
                    .at(self.document.text, name.span()));
            };
            let value = json(spanned.get_ref());
            let given = Given {
                value: &value,
                origin: Origin::Toml,
            };
            (key.set)(section, &given).map_err(|refusal| {
                let element = refusal.element.and_then(|index| {
                    let element = spanned.get_ref().as_array()?.get(index)?;
                    Some(element.span())
                });
                ConfigError::new(Problem::Value(refusal.reason))
                    .about(format!("{}.{}", self.name, key.name))
                    .at(
                        self.document.text,
                        element.unwrap_or_else(|| spanned.span()),
                    )
            })?;
            self.keys_seen.insert(key.name, name.span());
        }
        Ok(())
    }

    /// A mistake that shows only when keys are seen together; `key` is the one it is about.
    pub(super) fn mistake(&self, key: &'static str, reason: String) -> ConfigError {
        let span = self.keys_seen.get(key);
        ConfigError::new(Problem::Value(reason))
            .about(format!("{}.{key}", self.name))
            .at(
                self.document.text,
                span.cloned().unwrap_or_else(|| self.span.clone()),
            )
    }

    /// The mistake of a table without `key`.
    pub(super) fn lacks(&self, key: &'static str, example: &str) -> ConfigError {
        let text = format!("[[{}]] has no {key}: add {example}", self.name);
        ConfigError::new(Problem::Missing(text))
            .about(format!("{}.{key}", self.name))
            .at(self.document.text, self.span.clone())
    }

    /// Refuses a table with any key: it is defined, but none of its keys is served yet.
    pub(super) fn must_be_empty(&self) -> Result<(), ConfigError> {
        let Some((key, _)) = self.entries.iter().min_by_key(|(key, _)| key.span().start) else {
            return Ok(());
        };
        let reason = format!(
            "[{}] is not served by this version: leave it empty",
            self.name
        );
        Err(ConfigError::new(Problem::Value(reason))
            .about(format!("{}.{}", self.name, key.get_ref()))
            .at(self.document.text, key.span()))
    }

    /// Names of the keys that were read.
    #[cfg(test)]
    pub(super) fn names_seen(&self) -> Vec<&'static str> {
        self.keys_seen.keys().copied().collect()
    }
}

/// Reads the arguments of a QMP command into `section`.
pub(super) fn read_arguments<T>(
    keys: &[Key<T>],
    arguments: &serde_json::Map<String, Value>,
    section: &mut T,
) -> Result<(), ConfigError> {
    for (name, value) in arguments {
        let Some(key) = keys.iter().find(|key| key.name == name) else {
            let found = format!("parameter {name:?}");
            let nearest = nearest(name, keys.iter().map(|key| key.name));
            return Err(ConfigError::new(Problem::Unknown { found, nearest }).about(name));
        };
        let given = Given {
            value,
            origin: Origin::Json,
        };
        (key.set)(section, &given)
            .map_err(|refusal| ConfigError::new(Problem::Value(refusal.reason)).about(name))?;
    }
    Ok(())
}

/// The same value as JSON, so that one function reads a key from both. A number that no u64 or i64
/// holds, and a date, become text: no key takes those, and the refusal shows what was written.
fn json(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::from(text.as_ref()),
        DeValue::Integer(integer) => {
            let (digits, radix) = (integer.as_str(), integer.radix());
            match (
                u64::from_str_radix(digits, radix),
                i64::from_str_radix(digits, radix),
            ) {
                (Ok(number), _) => Value::from(number),
                (_, Ok(number)) => Value::from(number),
                _ => Value::from(integer.to_string()),
            }
        }
        DeValue::Float(float) => float
            .as_str()
            .parse::<f64>()
            .map_or(Value::Null, Value::from),
        DeValue::Boolean(flag) => Value::from(*flag),
        DeValue::Datetime(datetime) => Value::from(datetime.to_string()),
        DeValue::Array(array) => array.iter().map(|value| json(value.get_ref())).collect(),
        DeValue::Table(table) => Value::Object(
            table
                .iter()
                .map(|(key, value)| (key.get_ref().to_string(), json(value.get_ref())))
                .collect(),
        ),
    }
}
