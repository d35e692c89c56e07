//! What was measured, for people and for programs.

use serde_json::{Value, json};

use super::Sample;
use super::cases::Figure;
use super::runs::median;
use super::statistics::{Estimate, Verdict};
use crate::cli::output::{line, table};

/// What came of one figure.
#[derive(Debug)]
pub(super) struct Measured {
    pub(super) outcome: Outcome,
    /// Both sides of a comparison, where there were two: ours, the other.
    pub(super) sides: Option<[Side; 2]>,
    /// By count, where the figure is about growth.
    pub(super) points: Vec<Point>,
    /// What else was seen.
    pub(super) note: String,
}

#[derive(Debug)]
pub(super) enum Outcome {
    Value(Estimate),
    /// It cannot be had here; why not, and where it can.
    Elsewhere(&'static str),
}

impl Measured {
    pub(super) fn of(values: Vec<f64>) -> Self {
        Self::estimated(Estimate::of(values).expect("at least one run"))
    }

    pub(super) fn estimated(estimate: Estimate) -> Self {
        Self::with(Outcome::Value(estimate))
    }

    pub(super) fn elsewhere(how: &'static str) -> Self {
        Self::with(Outcome::Elsewhere(how))
    }

    fn with(outcome: Outcome) -> Self {
        Self {
            outcome,
            sides: None,
            points: Vec::new(),
            note: String::new(),
        }
    }
}

/// A figure and what came of it.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) figure: &'static Figure,
    pub(super) measured: Measured,
}

/// Medians of one side, per GiB moved.
#[derive(Debug, Clone, Copy)]
pub(super) struct Side {
    pub(super) gib_per_second: f64,
    pub(super) sender_cpu: f64,
    pub(super) receiver_cpu: f64,
}

impl Side {
    pub(super) fn of(samples: &[Sample], gib: f64) -> Self {
        let of = |value: fn(&Sample) -> f64| median(samples.iter().map(value));
        Self {
            gib_per_second: gib / of(|sample| sample.time.as_secs_f64()),
            sender_cpu: of(|sample| sample.sender_cpu.as_secs_f64()) / gib,
            receiver_cpu: of(|sample| sample.receiver_cpu.as_secs_f64()) / gib,
        }
    }

    fn to_json(self) -> Value {
        json!({
            "gib-per-second": self.gib_per_second,
            "sender-cpu-seconds-per-gib": self.sender_cpu,
            "receiver-cpu-seconds-per-gib": self.receiver_cpu,
        })
    }
}

/// The throughput of one count, as such and as a multiple of the best one's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Point {
    pub(super) count: u32,
    pub(super) gib_per_second: f64,
    pub(super) relative: Estimate,
}

impl Row {
    pub(super) fn value(&self) -> Option<Estimate> {
        match self.measured.outcome {
            Outcome::Value(estimate) => Some(estimate),
            Outcome::Elsewhere(_) => None,
        }
    }

    pub(super) fn verdict(&self) -> Option<Verdict> {
        Some(self.figure.target?.verdict(self.value()?))
    }

    /// What is asked: `≥ 0.95 ×`; the unit alone if nothing is.
    pub(super) fn asked(&self) -> String {
        let Figure { target, unit, .. } = self.figure;
        match target {
            Some(target) => format!("{target} {unit}").trim_end().to_owned(),
            None if unit.is_empty() => String::new(),
            None => format!("in {unit}"),
        }
    }

    /// The verdict with by how much, or why there is none.
    fn judged(&self) -> String {
        match (&self.measured.outcome, self.figure.target) {
            (Outcome::Elsewhere(_), _) => "measured elsewhere".to_owned(),
            (Outcome::Value(_), None) => String::new(),
            (Outcome::Value(estimate), Some(target)) => target.judge(*estimate),
        }
    }

    fn to_json(&self) -> Value {
        let Self { figure, measured } = self;
        let mut row = json!({
            "name": figure.name,
            "what": figure.what,
            "unit": figure.unit,
            "target": figure.target.map(super::statistics::Target::to_json),
            "target-text": self.asked(),
            "verdict": self.verdict().map(Verdict::as_str),
            "judged": self.judged(),
            "note": measured.note,
        });
        match measured.outcome {
            Outcome::Value(estimate) => row["value"] = estimate.to_json(),
            Outcome::Elsewhere(how) => row["elsewhere"] = how.into(),
        }
        if let Some([ours, other]) = measured.sides {
            row["ours"] = ours.to_json();
            row["other"] = other.to_json();
        }
        if !measured.points.is_empty() {
            let point = |point: &Point| {
                json!({
                    "count": point.count,
                    "gib-per-second": point.gib_per_second,
                    "relative": point.relative.to_json(),
                })
            };
            row["points"] = measured.points.iter().map(point).collect();
        }
        row
    }
}

/// Prints all rows.
pub(super) fn print(machine: &Value, rows: &[Row], as_json: bool) {
    if as_json {
        let rows: Vec<_> = rows.iter().map(Row::to_json).collect();
        line(json!({"machine": machine, "rows": rows}));
        return;
    }
    for (name, value) in machine.as_object().into_iter().flatten() {
        line(format_args!(
            "{name:<10} {}",
            crate::cli::output::text(value)
        ));
    }
    line("");
    let heading = ["figure", "target", "measured", "from..to", "n", "", "note"];
    let mut cells = vec![heading.map(str::to_owned).to_vec()];
    cells.extend(rows.iter().map(|row| {
        let value = row.value();
        let shown = |show: fn(Estimate) -> String| value.map(show).unwrap_or_default();
        vec![
            row.figure.name.to_owned(),
            row.asked(),
            shown(|value| amount(value.median)),
            shown(|value| format!("{}..{}", amount(value.low), amount(value.high))),
            shown(|value| value.runs.to_string()),
            row.judged(),
            row.measured.note.clone(),
        ]
    }));
    table(&cells);
    print_sides(rows);
    print_points(rows);
    line("");
    for row in rows {
        let name = row.figure.name;
        line(format_args!("{name:<24} {}", row.figure.what));
        if let Outcome::Elsewhere(how) = row.measured.outcome {
            line(format_args!("{:<24} measured elsewhere: {how}", ""));
        }
    }
}

/// What comparisons cost: processors and time.
fn print_sides(rows: &[Row]) {
    let heading = [
        "comparison",
        "GiB/s",
        "other",
        "CPU s/GiB sender + receiver",
        "other",
    ];
    let mut cells = vec![heading.map(str::to_owned).to_vec()];
    for row in rows {
        if let Some([ours, other]) = row.measured.sides {
            let cpu = |side: Side| format!("{:.2} + {:.2}", side.sender_cpu, side.receiver_cpu);
            cells.push(vec![
                row.figure.name.to_owned(),
                amount(ours.gib_per_second),
                amount(other.gib_per_second),
                cpu(ours),
                cpu(other),
            ]);
        }
    }
    if cells.len() > 1 {
        line("");
        table(&cells);
    }
}

fn print_points(rows: &[Row]) {
    for row in rows.iter().filter(|row| !row.measured.points.is_empty()) {
        let heading = [row.figure.name, "GiB/s", "of the best"];
        let mut cells = vec![heading.map(str::to_owned).to_vec()];
        cells.extend(row.measured.points.iter().map(|point| {
            vec![
                point.count.to_string(),
                amount(point.gib_per_second),
                amount(point.relative.median),
            ]
        }));
        line("");
        table(&cells);
    }
}

/// Three digits that count.
pub(super) fn amount(value: f64) -> String {
    if value.abs() < 10.0 {
        format!("{value:.2}")
    } else if value.abs() < 100.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}
