//! Writing for people and for pipes. `memferry status | head -1` must not end in a panic, and a reader
//! that has left must not change what a transfer's exit code says: output is best effort.

use std::fmt;
use std::io::{self, Write};

use serde_json::Value;

/// A line on standard output.
pub fn line(text: impl fmt::Display) {
    let _ = writeln!(io::stdout().lock(), "{text}");
}

/// A line on standard error.
pub fn note(text: impl fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Rows with aligned columns; the first row is the heading.
pub fn table(rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            let cells = rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    for row in rows {
        let cells = row.iter().zip(&widths);
        let text: Vec<_> = cells
            .map(|(cell, &width)| format!("{cell:<width$}"))
            .collect();
        line(text.join("  ").trim_end());
    }
}

/// Breaks a line between words, so that no part is wider than `columns` if words allow that; every part
/// but the first is indented.
#[must_use]
pub fn wrap(text: &str, columns: usize, indent: usize) -> Vec<String> {
    let width = columns.max(2 * indent);
    let mut parts = Vec::new();
    let mut part = String::new();
    let mut rest = text;
    while !rest.is_empty() {
        // The blanks before a word belong to it: some of them align columns.
        let blanks = rest.len() - rest.trim_start_matches(' ').len();
        let word = rest[blanks..]
            .find(' ')
            .map_or(rest.len(), |end| blanks + end);
        let (next, after) = rest.split_at(word);
        let fits = part.chars().count() + next.chars().count() <= width;
        if fits || part.trim().is_empty() {
            part.push_str(next);
        } else {
            parts.push(std::mem::replace(
                &mut part,
                " ".repeat(indent) + next.trim_start_matches(' '),
            ));
        }
        rest = after;
    }
    parts.push(part);
    parts
}

/// `1.5 GiB`.
#[must_use]
pub fn bytes(count: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{value:.0} B")
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

/// `1h 02m`, `1m 05s`, `4.2 s`, `42 ms`.
#[must_use]
pub fn seconds(count: f64) -> String {
    if count < 1.0 {
        return format!("{:.0} ms", count * 1e3);
    }
    if count < 10.0 {
        return format!("{count:.1} s");
    }
    if count < 60.0 {
        return format!("{count:.0} s");
    }
    if count < 3600.0 {
        return format!(
            "{:.0}m {:02.0}s",
            (count / 60.0).floor(),
            (count % 60.0).floor()
        );
    }
    let minutes = (count / 60.0).floor();
    format!("{:.0}h {:02.0}m", (minutes / 60.0).floor(), minutes % 60.0)
}

/// A number of a JSON member, zero if it is missing.
#[must_use]
pub fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

/// A text of a JSON member; what is missing is a dash.
#[must_use]
pub fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => printable(text),
        other => other.to_string(),
    }
}

/// Without control characters: some texts come from the peer, and a terminal obeys.
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_read_well() {
        assert_eq!(bytes(512.0), "512 B");
        assert_eq!(bytes(1536.0 * 1024.0), "1.5 MiB");
        assert_eq!(bytes(3.0 * 1024.0_f64.powi(5)), "3072.0 TiB");
        assert_eq!(seconds(0.0421), "42 ms");
        assert_eq!(seconds(4.23), "4.2 s");
        assert_eq!(seconds(65.0), "1m 05s");
        assert_eq!(seconds(3725.0), "1h 02m");
    }

    #[test]
    fn a_long_line_breaks_between_words_under_its_value() {
        let text = "  error        one two three four five";
        assert_eq!(wrap(text, usize::MAX, 15), [text]);
        assert_eq!(
            wrap(text, 30, 15),
            ["  error        one two three", "               four five"]
        );
        let word = "x".repeat(100);
        assert_eq!(wrap(&word, 30, 15), [word.as_str()]);
        assert_eq!(wrap("", 30, 15), [""]);
    }

    #[test]
    fn a_peers_text_cannot_drive_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\n"), "a?[2Jb?");
    }
}
