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
}

impl Target {
    /// `met` or `missed` where the interval leaves no doubt, else `open`, also where there were too few runs
    /// for an interval: two programs that do the same are rarely called different.
    pub(super) fn verdict(self, estimate: Estimate) -> &'static str {
        if outside(estimate.runs) == 0 {
            return "open";
        }
        let (worst, best, bound) = match self {
            Self::AtLeast(bound) => (estimate.low, estimate.high, bound),
            Self::AtMost(bound) => (-estimate.high, -estimate.low, -bound),
        };
        if worst >= bound {
            "met"
        } else if best < bound {
            "missed"
        } else {
            "open"
        }
    }

    pub(super) fn to_json(self) -> Value {
        match self {
            Self::AtLeast(bound) => json!({"at-least": bound}),
            Self::AtMost(bound) => json!({"at-most": bound}),
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtLeast(bound) => write!(f, "≥ {bound}"),
            Self::AtMost(bound) => write!(f, "≤ {bound}"),
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
        assert_eq!(Target::AtLeast(1.2).verdict(few), "open");
        let estimate = Estimate::of([0.9, 0.95, 1.0, 1.0, 1.05, 1.1]).unwrap();
        assert_eq!(Target::AtLeast(0.8).verdict(estimate), "met");
        assert_eq!(Target::AtLeast(1.0).verdict(estimate), "open");
        assert_eq!(Target::AtLeast(1.2).verdict(estimate), "missed");
        assert_eq!(Target::AtMost(1.2).verdict(estimate), "met");
        assert_eq!(Target::AtMost(0.5).verdict(estimate), "missed");
    }
}
