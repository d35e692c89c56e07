//! What came of earlier transfers: a line of JSON each, in `state.directory`.
//!
//! Nothing depends on it: a directory that is missing, or a disk that is full, costs the history and a
//! warning. The file holds at most twice as many transfers as are shown.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::limits::HISTORY_SHOWN_MAX;

/// The transfers of one daemon that have ended.
#[derive(Debug)]
pub struct History {
    path: PathBuf,
    /// Lines in the file.
    lines: Mutex<usize>,
}

impl History {
    /// The history called `name` in `directory`. One that cannot be kept is a warning.
    #[must_use]
    pub fn open(directory: &Path, name: &str) -> Self {
        let history = Self {
            path: directory.join(format!("{name}-history.jsonl")),
            lines: Mutex::new(0),
        };
        // That the directory is missing was said when the configuration was read.
        if let Err(error) = history.begin()
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %history.path.display(), %error, "no history of transfers is kept (state.directory)");
        }
        history
    }

    /// Counts what is there, and ends a line that a crash has cut.
    fn begin(&self) -> io::Result<()> {
        let mut file = self.file()?;
        let text = fs::read(&self.path)?;
        *self.lines.lock().unwrap_or_else(PoisonError::into_inner) =
            text.iter().filter(|byte| **byte == b'\n').count();
        if text.last().is_some_and(|byte| *byte != b'\n') {
            file.write_all(b"\n")?;
        }
        Ok(())
    }

    fn file(&self) -> io::Result<File> {
        File::options().create(true).append(true).open(&self.path)
    }

    /// Adds a transfer that has just ended, an object as `query-migrate` shows it.
    pub fn add(&self, mut transfer: Value) {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        transfer["ended"] = now.as_secs().into();
        if let Err(error) = self.append(&transfer)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "a transfer is missing in the history");
        }
    }

    fn append(&self, transfer: &Value) -> io::Result<()> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        // In one write, so that two daemons on one directory do not mix their lines.
        self.file()?.write_all(format!("{transfer}\n").as_bytes())?;
        *lines += 1;
        if *lines > 2 * HISTORY_SHOWN_MAX {
            let text = fs::read_to_string(&self.path)?;
            let kept = last(&text);
            let directory = self.path.parent().unwrap_or_else(|| Path::new("."));
            let mut draft = tempfile::NamedTempFile::new_in(directory)?;
            for line in &kept {
                writeln!(draft, "{line}")?;
            }
            draft.persist(&self.path).map_err(|failed| failed.error)?;
            *lines = kept.len();
        }
        Ok(())
    }

    /// The latest transfers, the last one last. A line that is none is left out.
    #[must_use]
    pub fn latest(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.path).unwrap_or_default();
        let parse = |line: &str| serde_json::from_str(line).ok();
        last(&text).into_iter().filter_map(parse).collect()
    }
}

/// The last lines of a history.
fn last(text: &str) -> Vec<&str> {
    let mut lines: Vec<_> = text.lines().filter(|line| !line.is_empty()).collect();
    lines.drain(..lines.len().saturating_sub(HISTORY_SHOWN_MAX));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_latest_survive_a_restart_and_the_file_stays_bounded() {
        let directory = tempfile::tempdir().unwrap();
        for round in 0..3 {
            let history = History::open(directory.path(), "x");
            for n in 0..HISTORY_SHOWN_MAX {
                history.add(json!({"id": round * HISTORY_SHOWN_MAX + n}));
            }
        }
        let latest = History::open(directory.path(), "x").latest();
        assert_eq!(latest.len(), HISTORY_SHOWN_MAX);
        assert_eq!(latest.last().unwrap()["id"], 3 * HISTORY_SHOWN_MAX - 1);
        let text = fs::read_to_string(directory.path().join("x-history.jsonl")).unwrap();
        assert!(text.lines().count() <= 2 * HISTORY_SHOWN_MAX);
    }

    #[test]
    fn a_cut_line_costs_no_other_and_a_missing_directory_nothing() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(
            directory.path().join("x-history.jsonl"),
            "{\"id\":1}\n{\"id",
        )
        .unwrap();
        let history = History::open(directory.path(), "x");
        history.add(json!({"id": 2}));
        let ids: Vec<_> = history
            .latest()
            .iter()
            .map(|shown| shown["id"].clone())
            .collect();
        assert_eq!(ids, [1, 2]);
        let history = History::open(&directory.path().join("missing"), "x");
        history.add(json!({"id": 3}));
        assert!(history.latest().is_empty());
    }
}
