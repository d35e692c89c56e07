//! What was measured, for people and for programs.

use serde_json::{Value, json};

use super::Sample;
use super::statistics::{Estimate, Target};
use crate::cli::output::{line, table};

/// One comparison with its target.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) case: &'static str,
    /// What was compared with what.
    pub(super) what: &'static str,
    pub(super) unit: &'static str,
    pub(super) target: Target,
    pub(super) estimate: Estimate,
    /// Both sides of a comparison, where there were two: ours, the other.
    pub(super) sides: Option<[Side; 2]>,
    /// What else was seen.
    pub(super) note: String,
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
        let median = |value: &dyn Fn(&Sample) -> f64| {
            Estimate::of(samples.iter().map(value)).map_or(0.0, |estimate| estimate.median)
        };
        Self {
            gib_per_second: gib / median(&|sample| sample.time.as_secs_f64()),
            sender_cpu: median(&|sample| sample.sender_cpu.as_secs_f64()) / gib,
            receiver_cpu: median(&|sample| sample.receiver_cpu.as_secs_f64()) / gib,
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

impl Row {
    fn verdict(&self) -> &'static str {
        self.target.verdict(self.estimate)
    }

    fn to_json(&self) -> Value {
        let mut row = json!({
            "case": self.case,
            "what": self.what,
            "unit": self.unit,
            "target": self.target.to_json(),
            "value": self.estimate.to_json(),
            "verdict": self.verdict(),
            "note": self.note,
        });
        if let Some([ours, other]) = self.sides {
            row["ours"] = ours.to_json();
            row["other"] = other.to_json();
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
    let heading = [
        "case",
        "target",
        "measured",
        "from..to",
        "n",
        "",
        "GiB/s",
        "other",
        "CPU s/GiB sender+receiver",
        "other",
        "note",
    ];
    let mut cells = vec![heading.map(str::to_owned).to_vec()];
    for row in rows {
        let of_sides = |show: fn(&Side) -> String| {
            row.sides
                .map_or_else(Default::default, |sides| [show(&sides[0]), show(&sides[1])])
        };
        let [speed, other_speed] = of_sides(|side| format!("{:.2}", side.gib_per_second));
        let [cpu, other_cpu] =
            of_sides(|side| format!("{:.2} + {:.2}", side.sender_cpu, side.receiver_cpu));
        let value = row.estimate;
        cells.push(vec![
            row.case.to_owned(),
            format!("{} {}", row.target, row.unit),
            format!("{:.2}", value.median),
            format!("{:.2}..{:.2}", value.low, value.high),
            value.runs.to_string(),
            row.verdict().to_owned(),
            speed,
            other_speed,
            cpu,
            other_cpu,
            row.note.clone(),
        ]);
    }
    table(&cells);
    line("");
    for row in rows {
        line(format_args!("{:<14} {}", row.case, row.what));
    }
}
