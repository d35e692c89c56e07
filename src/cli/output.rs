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

/// `1h 02m`, `1m 05s`, `4.2 s`.
#[must_use]
pub fn seconds(count: f64) -> String {
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
        assert_eq!(seconds(4.23), "4.2 s");
        assert_eq!(seconds(65.0), "1m 05s");
        assert_eq!(seconds(3725.0), "1h 02m");
    }

    #[test]
    fn a_peers_text_cannot_drive_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\n"), "a?[2Jb?");
    }
}
