//! Progress of one transfer on standard error: a moving line on a terminal, a line per second in a log,
//! or JSON. What is shown is computed from `query-migrate` alone, and any member of it may be missing.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use super::args::ProgressMode;
use super::output::{bytes, note, number, seconds, text};
use crate::sys::terminal;

/// Time between two lines in a log.
const LINE_EVERY: Duration = Duration::from_secs(1);

/// The width of a terminal that does not tell.
const COLUMNS_DEFAULT: usize = 80;

/// Below this a terminal has no room for the bar.
const BAR_COLUMNS_MIN: usize = 60;

/// What is shown of one `query-migrate`.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    phase: String,
    pass: u64,
    total: u64,
    remaining: u64,
    bytes_per_second: f64,
    dirty_per_second: f64,
    sends: f64,
    copied: f64,
}

impl Snapshot {
    /// Picks the members out of the answer.
    #[must_use]
    pub fn new(answer: &Value) -> Self {
        let ram = &answer["ram"];
        Self {
            phase: text(&answer["status"]),
            pass: ram["dirty-sync-count"].as_u64().unwrap_or(0),
            total: ram["total"].as_u64().unwrap_or(0),
            remaining: ram["remaining"].as_u64().unwrap_or(0),
            bytes_per_second: number(&ram["mbps"]) * 1e6 / 8.0,
            dirty_per_second: number(&ram["dirty-pages-rate"]) * number(&ram["page-size"]),
            sends: number(&answer["zero-copy"]["sends"]),
            copied: number(&answer["zero-copy"]["copied"]),
        }
    }

    fn done(&self) -> u64 {
        self.total.saturating_sub(self.remaining)
    }

    fn percent(&self) -> f64 {
        if self.total > 0 {
            100.0 * self.done() as f64 / self.total as f64
        } else {
            0.0
        }
    }

    /// Seconds until nothing is left, at the present rates; `None` while that never happens.
    fn eta(&self) -> Option<f64> {
        let gain = self.bytes_per_second - self.dirty_per_second;
        (gain > 0.0).then(|| self.remaining as f64 / gain)
    }

    /// The line, at most `width` columns: the most important parts first, and whole parts only.
    #[must_use]
    pub fn line(&self, width: usize) -> String {
        let mut parts = vec![format!("{} {:3.0} %", self.phase, self.percent().floor())];
        parts.push(format!(
            "{}/{}",
            bytes(self.done() as f64),
            bytes(self.total as f64)
        ));
        parts.push(format!("{}/s", bytes(self.bytes_per_second)));
        parts.push(match self.eta() {
            Some(eta) => format!("ETA {}", seconds(eta)),
            None if self.bytes_per_second > 0.0 => "not converging".into(),
            None => "ETA -".into(),
        });
        parts.push(format!("pass {}", self.pass));
        parts.push(format!("dirty {}/s", bytes(self.dirty_per_second)));
        if self.sends > 0.0 {
            let share = 100.0 * (1.0 - self.copied / self.sends).max(0.0);
            parts.push(format!("zero-copy {share:.0} %"));
        }
        let mut line = String::new();
        for part in parts {
            let gap = if line.is_empty() { 0 } else { 2 };
            if line.chars().count() + gap + part.chars().count() > width {
                break;
            }
            line.push_str(&" ".repeat(gap));
            line.push_str(&part);
        }
        line
    }

    fn json(&self) -> Value {
        json!({
            "status": self.phase,
            "pass": self.pass,
            "percent": self.percent(),
            "total": self.total,
            "remaining": self.remaining,
            "bytes-per-second": self.bytes_per_second,
            "dirty-bytes-per-second": self.dirty_per_second,
            "eta-seconds": self.eta(),
            "zero-copy-sends": self.sends,
            "zero-copy-copied": self.copied,
        })
    }
}

/// Shows snapshots as they come.
#[derive(Debug)]
pub struct Progress(Shown);

#[derive(Debug)]
enum Shown {
    Bar(ProgressBar),
    Lines { json: bool, last: Option<Instant> },
    Nothing,
}

impl Progress {
    /// Chooses by what standard error is.
    #[must_use]
    pub fn new(mode: ProgressMode) -> Self {
        let terminal = io::stderr().is_terminal()
            && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        Self(match mode {
            ProgressMode::None => Shown::Nothing,
            ProgressMode::Auto if terminal => Shown::Bar(ProgressBar::with_draw_target(
                Some(0),
                ProgressDrawTarget::stderr(),
            )),
            ProgressMode::Auto | ProgressMode::Json => Shown::Lines {
                json: mode == ProgressMode::Json,
                last: None,
            },
        })
    }

    /// Shows what is due.
    pub fn show(&mut self, answer: &Value) {
        let snapshot = Snapshot::new(answer);
        match &mut self.0 {
            Shown::Nothing => {}
            Shown::Bar(bar) => {
                let columns = columns();
                let taken = if columns < BAR_COLUMNS_MIN {
                    bar.set_style(style("{msg}"));
                    0
                } else {
                    bar.set_style(style("[{bar:12}] {msg}"));
                    "[            ] ".len()
                };
                bar.set_length(snapshot.total);
                bar.set_position(snapshot.done());
                bar.set_message(snapshot.line(columns.saturating_sub(taken)));
            }
            Shown::Lines { json, last } => {
                if last.is_some_and(|last| last.elapsed() < LINE_EVERY) {
                    return;
                }
                *last = Some(Instant::now());
                if *json {
                    note(snapshot.json());
                } else {
                    note(snapshot.line(usize::MAX));
                }
            }
        }
    }

    /// Says something without tearing the moving line. JSON progress stays JSON.
    pub fn say(&self, message: &str) {
        match &self.0 {
            Shown::Bar(bar) => bar.suspend(|| note(message)),
            Shown::Lines { json: true, .. } => note(json!({"note": message})),
            Shown::Lines { .. } | Shown::Nothing => note(message),
        }
    }

    /// Removes the moving line.
    pub fn finish(&self) {
        if let Shown::Bar(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// No colours at all, so `NO_COLOR` asks for nothing more.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

/// The width to fill, asked anew for every line because windows are resized; `COLUMNS` overrules. One
/// column stays free: some terminals wrap when the last one is written.
fn columns() -> usize {
    let told = std::env::var("COLUMNS")
        .ok()
        .and_then(|text| text.parse().ok());
    let columns = told.or_else(|| terminal::columns(io::stderr().as_fd()));
    columns.unwrap_or(COLUMNS_DEFAULT).saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot() -> Snapshot {
        Snapshot::new(&json!({
            "status": "active",
            "ram": {"total": 4_u64 << 30, "remaining": 1_u64 << 30, "mbps": 8589.934592,
                    "dirty-sync-count": 2, "dirty-pages-rate": 65536, "page-size": 4096},
            "zero-copy": {"sends": 100, "copied": 25},
        }))
    }

    #[test]
    fn the_line_has_everything_where_there_is_room() {
        assert_eq!(
            snapshot().line(usize::MAX),
            "active  75 %  3.0 GiB/4.0 GiB  1.0 GiB/s  ETA 1.3 s  pass 2  dirty 256.0 MiB/s  zero-copy 75 %"
        );
    }

    #[test]
    fn a_narrow_line_keeps_whole_parts_and_the_important_ones() {
        for width in 0..120 {
            let line = snapshot().line(width);
            assert!(line.chars().count() <= width, "{width}: {line}");
            assert!(snapshot().line(usize::MAX).starts_with(&line));
        }
        assert_eq!(snapshot().line(39), "active  75 %  3.0 GiB/4.0 GiB");
        assert_eq!(snapshot().line(12), "active  75 %");
    }

    #[test]
    fn missing_members_and_hopeless_rates_still_make_a_line() {
        let empty = Snapshot::new(&json!({}));
        assert_eq!(
            empty.line(80),
            "-   0 %  0 B/0 B  0 B/s  ETA -  pass 0  dirty 0 B/s"
        );
        let slow = Snapshot {
            dirty_per_second: 1e12,
            ..snapshot()
        };
        assert!(slow.line(200).contains("not converging"));
        assert_eq!(slow.json()["eta-seconds"], Value::Null);
    }
}
