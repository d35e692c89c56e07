//! Progress of one transfer on standard error: a moving line on a terminal, a line per second in a log,
//! or JSON. What is shown is computed from `query-migrate` alone, and any member of it may be missing.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use super::args::ProgressMode;
use super::output::{bytes, note, number, printable, seconds, text};
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
    /// Iterations that have ended.
    passes: u64,
    /// Iterations after which the transfer no longer waits for the writer.
    passes_max: Option<u64>,
    total: u64,
    remaining: u64,
    bytes_per_second: f64,
    dirty_per_second: f64,
    verdict: Verdict,
    /// How much a writer is slowed down that is too fast, in percent.
    throttle: f64,
    path: String,
    sends: f64,
    copied: f64,
}

/// Whether more passes leave less to be sent, in the sender's judgement.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Verdict {
    Unknown,
    NotConverging,
    /// So many times as fast as the writer; nothing if it writes nothing.
    Converging(Option<f64>),
}

impl Verdict {
    fn of(convergence: &Value) -> Self {
        match convergence["verdict"].as_str() {
            Some("converging") => Self::Converging(convergence["ratio"].as_f64()),
            Some("not-converging") => Self::NotConverging,
            _ => Self::Unknown,
        }
    }
}

/// When the transfer will be done, as far as that can be told.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Outlook {
    /// Nothing can be told, or nothing needs to be: only in `active` something is counted down.
    Unknown,
    NotConverging,
    Seconds(f64),
}

impl Snapshot {
    /// Picks the members out of the answer.
    #[must_use]
    pub fn new(answer: &Value) -> Self {
        let ram = &answer["ram"];
        let total = ram["total"].as_u64().unwrap_or(0);
        Self {
            phase: text(&answer["status"]),
            passes: ram["dirty-sync-count"].as_u64().unwrap_or(0),
            passes_max: answer["parameters"]["max-iterations"].as_u64(),
            total,
            // What may have been written while it was sent can count twice.
            remaining: (ram["remaining"].as_u64().unwrap_or(0)).min(total),
            bytes_per_second: number(&ram["mbps"]) * 1e6 / 8.0,
            dirty_per_second: number(&ram["dirty-pages-rate"]) * number(&ram["page-size"]),
            verdict: Verdict::of(&answer["convergence"]),
            throttle: number(&answer["cpu-throttle-percentage"]),
            path: answer["zero-copy"]["path"]
                .as_str()
                .map(printable)
                .unwrap_or_default(),
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

    /// Seconds until nothing is left, at the present rates.
    fn outlook(&self) -> Outlook {
        if self.phase != "active" || self.bytes_per_second <= 0.0 {
            return Outlook::Unknown;
        }
        match self.verdict {
            Verdict::NotConverging => Outlook::NotConverging,
            // As fast as now, of which so much is made good for.
            Verdict::Converging(Some(ratio)) => {
                let gain = self.bytes_per_second * (1.0 - 1.0 / ratio);
                Outlook::Seconds(self.remaining as f64 / gain)
            }
            Verdict::Converging(None) | Verdict::Unknown => {
                Outlook::Seconds(self.remaining as f64 / self.bytes_per_second)
            }
        }
    }

    /// How far it is: a share in the first pass; from then on how much there still is to be sent.
    fn extent(&self) -> String {
        let remaining = bytes(self.remaining as f64);
        match self.passes {
            0 => format!(
                "{:.0} %  {}/{}",
                self.percent().floor(),
                bytes(self.done() as f64),
                bytes(self.total as f64)
            ),
            // The first pass sent everything, so it could not find what was written meanwhile.
            1 => format!("up to {remaining} left"),
            _ => format!("{remaining} left"),
        }
    }

    /// How payload leaves, as it was observed.
    fn payload(&self) -> Option<String> {
        if self.path == "plain" {
            return Some("plain sends".into());
        }
        (self.sends > 0.0).then(|| {
            let share = 100.0 * (1.0 - self.copied / self.sends).max(0.0);
            format!("zero-copy {share:.0} %")
        })
    }

    /// The line, at most `width` columns: the most important parts first, and whole parts only.
    #[must_use]
    pub fn line(&self, width: usize) -> String {
        let mut parts = vec![self.phase.clone()];
        match self.phase.as_str() {
            "setup" | "completed" => parts.push(bytes(self.total as f64)),
            "active" => {
                parts.extend(self.extent().split("  ").map(str::to_owned));
                parts.push(format!("{}/s", bytes(self.bytes_per_second)));
                parts.push(match self.outlook() {
                    Outlook::Seconds(left) => format!("ETA {}", seconds(left)),
                    Outlook::NotConverging => "not converging".into(),
                    Outlook::Unknown => "ETA -".into(),
                });
                parts.push(match self.passes_max {
                    Some(max) => format!("pass {}/{max}", self.passes + 1),
                    None => format!("pass {}", self.passes + 1),
                });
                if self.verdict != Verdict::Unknown {
                    parts.push(format!("dirty {}/s", bytes(self.dirty_per_second)));
                }
                if let Verdict::Converging(Some(ratio)) = self.verdict {
                    parts.push(format!("converging {ratio:.1}x"));
                }
                if self.throttle > 0.0 {
                    parts.push(format!("throttled {:.0} %", self.throttle));
                }
                parts.extend(self.payload());
            }
            "failed" | "cancelled" => {}
            // The writer stands still, or is about to: no rate and no estimate means anything now.
            _ => parts.push(format!("{} left", bytes(self.remaining as f64))),
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
        let eta = match self.outlook() {
            Outlook::Seconds(left) => json!(left),
            Outlook::NotConverging | Outlook::Unknown => Value::Null,
        };
        json!({
            "status": self.phase,
            "pass": self.passes,
            "percent": self.percent(),
            "total": self.total,
            "remaining": self.remaining,
            "bytes-per-second": self.bytes_per_second,
            "dirty-bytes-per-second": self.dirty_per_second,
            "ratio": match self.verdict {
                Verdict::Converging(ratio) => json!(ratio),
                Verdict::NotConverging | Verdict::Unknown => Value::Null,
            },
            "throttle-percent": self.throttle,
            "eta-seconds": eta,
            "zero-copy-path": self.path,
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
    /// Whether anything is.
    #[must_use]
    pub fn is_shown(&self) -> bool {
        !matches!(self.0, Shown::Nothing)
    }

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
                // Later passes send again what was written since; the bar does not run backwards.
                bar.set_position(snapshot.done().max(bar.position()));
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
            "convergence": {"verdict": "converging", "ratio": 4.0},
            "zero-copy": {"path": "msg-zerocopy", "sends": 100, "copied": 25},
            "parameters": {"max-iterations": 30},
        }))
    }

    #[test]
    fn the_line_has_everything_where_there_is_room() {
        let first = Snapshot {
            passes: 0,
            verdict: Verdict::Unknown,
            ..snapshot()
        };
        assert_eq!(
            first.line(usize::MAX),
            "active  75 %  3.0 GiB/4.0 GiB  1.0 GiB/s  ETA 1.0 s  pass 1/30  zero-copy 75 %"
        );
        assert_eq!(
            snapshot().line(usize::MAX),
            "active  1.0 GiB left  1.0 GiB/s  ETA 1.3 s  pass 3/30  dirty 256.0 MiB/s  converging 4.0x  zero-copy 75 %"
        );
    }

    #[test]
    fn a_narrow_line_keeps_whole_parts_and_the_important_ones() {
        for width in 0..120 {
            let line = snapshot().line(width);
            assert!(line.chars().count() <= width, "{width}: {line}");
            assert!(snapshot().line(usize::MAX).starts_with(&line));
        }
        assert_eq!(snapshot().line(33), "active  1.0 GiB left  1.0 GiB/s");
        assert_eq!(snapshot().line(12), "active");
    }

    #[test]
    fn what_the_first_pass_left_is_only_known_to_be_at_most_that() {
        let after = Snapshot {
            passes: 1,
            ..snapshot()
        };
        assert!(after.line(30).starts_with("active  up to 1.0 GiB left"));
    }

    #[test]
    fn only_an_active_transfer_has_an_estimate() {
        for phase in ["device", "completing", "cancelling", "indeterminate"] {
            let phase = Snapshot {
                phase: phase.into(),
                ..snapshot()
            };
            assert_eq!(phase.line(200), format!("{}  1.0 GiB left", phase.phase));
            assert_eq!(phase.json()["eta-seconds"], Value::Null);
        }
        let setup = Snapshot {
            phase: "setup".into(),
            ..snapshot()
        };
        assert_eq!(setup.line(200), "setup  4.0 GiB");
        let done = Snapshot {
            phase: "completed".into(),
            ..snapshot()
        };
        assert_eq!(done.line(200), "completed  4.0 GiB");
    }

    #[test]
    fn a_writer_as_fast_as_the_streams_is_not_given_days_to_go() {
        let slow = Snapshot {
            verdict: Verdict::of(&json!({"verdict": "not-converging", "ratio": 0.9})),
            throttle: 40.0,
            ..snapshot()
        };
        assert_eq!(
            slow.line(93),
            "active  1.0 GiB left  1.0 GiB/s  not converging  pass 3/30  dirty 256.0 MiB/s  throttled 40 %"
        );
        assert_eq!(slow.json()["eta-seconds"], Value::Null);
    }

    #[test]
    fn a_transfer_that_fell_back_is_said_to_send_plainly() {
        let plain = Snapshot {
            path: "plain".into(),
            ..snapshot()
        };
        assert!(plain.line(200).ends_with("  plain sends"));
    }

    #[test]
    fn missing_members_still_make_a_line() {
        assert_eq!(Snapshot::new(&json!({})).line(80), "-  0 B left");
        let active = Snapshot::new(&json!({"status": "active"}));
        assert_eq!(
            active.line(80),
            "active  0 %  0 B/0 B  0 B/s  ETA -  pass 1"
        );
    }
}
