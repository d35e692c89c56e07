//! What repeated measurements say, without assuming how they are distributed. Pure.

use serde_json::{Value, json};

/// A middle value and the interval that it can be trusted to lie in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Estimate {
    pub(super) median: f64,
    /// Two of the values, so that the true median lies between them in at least 95 of 100 cases. With
    /// fewer than six values that cannot be had, and it is the smallest and the largest.
    pub(super) low: f64,
    pub(super) high: f64,
    /// How many values there were.
    pub(super) runs: usize,
}

impl Estimate {
    /// Of `values`, by the sign test: each is above the true median or below it, like a coin. `None` without
    /// a value.
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let runs = values.len();
        let (&first, &last) = (values.first()?, values.last()?);
        let median = f64::midpoint(values[(runs - 1) / 2], values[runs / 2]);
        let (low, high) = match outside(runs) {
            0 => (first, last),
            k => (values[k - 1], values[runs - k]),
        };
        Some(Self {
            median,
            low,
            high,
            runs,
        })
    }

    pub(super) fn to_json(self) -> Value {
        json!({"median": self.median, "low": self.low, "high": self.high, "runs": self.runs})
    }
}

/// The largest k such that, of `runs` throws of a coin, fewer than k heads or fewer than k tails come in at
/// most 5 of 100 cases.
fn outside(runs: usize) -> usize {
    let mut probability = 0.5_f64.powi(i32::try_from(runs).unwrap_or(i32::MAX)); // of no head at all
    let mut below = 0.0;
    for heads in 0..runs {
        below += probability;
        if 2.0 * below > 0.05 {
            return heads;
        }
        #[expect(clippy::cast_precision_loss)] // small counts
        let next = (runs - heads) as f64 / (heads + 1) as f64;
        probability *= next;
    }
    0
}

/// What is asked of a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Target {
    AtLeast(f64),
    AtMost(f64),
    /// Two sides that are the same program: the interval must not say that they differ.
    Same,
}

/// Whether the target is hit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Verdict {
    Hit,
    Missed,
    /// The interval has the target in it, or there were too few runs for an interval.
    Open,
}

impl Verdict {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Missed => "missed",
            Self::Open => "open",
        }
    }
}

impl Target {
    /// `Hit` or `Missed` only where the interval leaves no doubt: two programs that do the same are rarely
    /// called different.
    pub(super) fn verdict(self, estimate: Estimate) -> Verdict {
        if outside(estimate.runs) == 0 {
            return Verdict::Open;
        }
        let (worst, best, bound) = match self {
            Self::AtLeast(bound) => (estimate.low, estimate.high, bound),
            Self::AtMost(bound) => (-estimate.high, -estimate.low, -bound),
            Self::Same if estimate.low <= 1.0 && 1.0 <= estimate.high => return Verdict::Hit,
            Self::Same => return Verdict::Missed,
        };
        if worst >= bound {
            Verdict::Hit
        } else if best < bound {
            Verdict::Missed
        } else {
            Verdict::Open
        }
    }

    /// How much better than asked for `value` is, as a factor: below 1 the target is missed.
    pub(super) fn margin(self, value: f64) -> f64 {
        match self {
            Self::AtLeast(bound) => value / bound,
            Self::AtMost(bound) => bound / value,
            Self::Same => value,
        }
    }

    /// The verdict, and by how much the median misses if it does.
    pub(super) fn judge(self, estimate: Estimate) -> String {
        let verdict = self.verdict(estimate);
        let beyond = match self {
            Self::AtLeast(bound) => 1.0 - estimate.median / bound,
            Self::AtMost(bound) => estimate.median / bound - 1.0,
            Self::Same => (estimate.median - 1.0).abs(),
        };
        match verdict {
            Verdict::Missed => format!("missed by {:.0} %", beyond * 100.0),
            Verdict::Open if beyond > 0.0 && self != Self::Same => {
                format!("open, median {:.0} % off", beyond * 100.0)
            }
            _ => verdict.as_str().to_owned(),
        }
    }

    pub(super) fn to_json(self) -> Value {
        match self {
            Self::AtLeast(bound) => json!({"at-least": bound}),
            Self::AtMost(bound) => json!({"at-most": bound}),
            Self::Same => json!({"same": true}),
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtLeast(bound) => write!(f, "≥ {bound}"),
            Self::AtMost(bound) => write!(f, "≤ {bound}"),
            Self::Same => f.write_str("≈ 1"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_that_of_the_sign_test() {
        // Tables of the sign test: the second of nine, the sixth of twenty.
        for (runs, k) in [(1, 0), (5, 0), (6, 1), (8, 1), (9, 2), (20, 6)] {
            assert_eq!(outside(runs), k, "{runs}");
        }
        let values = [9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0];
        let estimate = Estimate::of(values).unwrap();
        assert_eq!(
            (estimate.median, estimate.low, estimate.high),
            (5.0, 2.0, 8.0)
        );
        assert_eq!(Estimate::of([]), None);
    }

    #[test]
    fn a_verdict_needs_the_whole_interval() {
        let few = Estimate::of([0.9, 1.0, 1.1]).unwrap();
        assert_eq!(Target::AtLeast(1.2).verdict(few), Verdict::Open);
        assert_eq!(Target::Same.verdict(few), Verdict::Open);
        let estimate = Estimate::of([0.9, 0.95, 1.0, 1.0, 1.05, 1.1]).unwrap();
        assert_eq!(Target::AtLeast(0.8).judge(estimate), "hit");
        assert_eq!(
            Target::AtLeast(1.05).judge(estimate),
            "open, median 5 % off"
        );
        assert_eq!(Target::AtLeast(1.25).judge(estimate), "missed by 20 %");
        assert_eq!(Target::AtMost(1.2).judge(estimate), "hit");
        assert_eq!(Target::AtMost(1.05).judge(estimate), "open");
        assert_eq!(Target::AtMost(0.5).judge(estimate), "missed by 100 %");
        assert_eq!(Target::Same.judge(estimate), "hit");
        let faster = Estimate::of([1.1, 1.2, 1.2, 1.2, 1.2, 1.3]).unwrap();
        assert_eq!(Target::Same.judge(faster), "missed by 20 %");
    }
}
