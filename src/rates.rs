//! How fast the streams are and how fast memory is written, smoothed over Iterations; and what follows
//! from the two.
//!
//! Pure: whoever measured brings the numbers.

use std::time::Duration;

/// After so much time what was measured before counts half. A pass that is worth deciding on takes about
/// as long; the hiccup of one of a millisecond changes next to nothing.
const HALF_LIFE: Duration = Duration::from_millis(250);

/// How much faster than the writer the streams have to be. A writer that writes all of its memory anew
/// in every pass is measured to be exactly as fast as they are, but for what a pass takes besides sending.
const RATIO_MIN: f64 = 1.25;

/// Most of its time that a writer is kept from running, in percent; QEMU's own bound.
const THROTTLE_MAX: u8 = 99;

/// A rate as the mean of what was measured, each measurement weighed by how long it took and how long
/// ago that is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Smoothed {
    sum: f64,
    weight: f64,
}

impl Smoothed {
    /// It was `rate` for this time.
    pub fn add(&mut self, rate: f64, over: Duration) {
        let kept = (-over.as_secs_f64() / HALF_LIFE.as_secs_f64()).exp2();
        // What is so short that it would not count is still better than nothing.
        let new = (1.0 - kept).max(f64::EPSILON);
        self.sum = self.sum * kept + rate * new;
        self.weight = self.weight * kept + new;
    }

    /// What it is now; nothing before the first measurement.
    #[must_use]
    pub fn get(&self) -> Option<f64> {
        (self.weight > 0.0).then(|| self.sum / self.weight)
    }
}

/// Both rates of a transfer, in bytes per second.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rates {
    /// Payload that the receiver has applied, while there was some to send.
    pub sent: Smoothed,
    /// Memory found written, each page once per Iteration.
    pub written: Smoothed,
}

/// Whether more Iterations leave less to be sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict {
    /// They do: the streams are so many times as fast as the writer. Infinitely many, if nothing is
    /// written.
    Converging(f64),
    /// They do not: the writer is about as fast as the streams, or faster.
    NotConverging,
}

impl Rates {
    /// How many times as fast as the writer the streams are; nothing before both were measured.
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        match (self.sent.get()?, self.written.get()?) {
            (_, written) if written <= 0.0 => Some(f64::INFINITY),
            (sent, written) => Some(sent / written),
        }
    }

    /// What that means.
    #[must_use]
    pub fn verdict(&self) -> Option<Verdict> {
        Some(match self.ratio()? {
            ratio if ratio >= RATIO_MIN => Verdict::Converging(ratio),
            _ => Verdict::NotConverging,
        })
    }
}

/// The next step of slowing a writer down that is kept from running for `percent` of its time; nothing
/// when there is none. 20 points at a time, then half of what is left of its time.
#[must_use]
pub fn throttle_after(percent: u8) -> Option<u8> {
    match percent {
        0..80 => Some(percent + 20),
        80..THROTTLE_MAX => Some((percent + (100 - percent).div_ceil(2)).min(THROTTLE_MAX)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn smoothed(samples: &[(f64, f64)]) -> Smoothed {
        let mut smoothed = Smoothed::default();
        for &(rate, seconds) in samples {
            smoothed.add(rate, Duration::from_secs_f64(seconds));
        }
        smoothed
    }

    fn rates(sent: f64, written: f64) -> Rates {
        Rates {
            sent: smoothed(&[(sent, 1.0)]),
            written: smoothed(&[(written, 1.0)]),
        }
    }

    proptest! {
        #[test]
        fn a_smoothed_rate_is_never_outside_of_what_was_measured(
            samples in prop::collection::vec((0.0..1e12_f64, 0.0..20.0_f64), 1..40),
        ) {
            let value = smoothed(&samples).get().unwrap();
            let least = samples.iter().map(|s| s.0).fold(f64::MAX, f64::min);
            let most = samples.iter().map(|s| s.0).fold(0.0, f64::max);
            prop_assert!(value >= least * (1.0 - 1e-9) && value <= most * (1.0 + 1e-9));
        }

        #[test]
        fn one_long_measurement_is_as_good_as_the_same_in_pieces(
            before in 0.0..1e12_f64, rate in 0.0..1e12_f64, seconds in 0.001..5.0_f64, pieces in 1..50_u32,
        ) {
            let whole = smoothed(&[(before, 1.0), (rate, seconds)]).get().unwrap();
            let mut parts = vec![(before, 1.0)];
            parts.extend((0..pieces).map(|_| (rate, seconds / f64::from(pieces))));
            let parts = smoothed(&parts).get().unwrap();
            // Pieces are cut to nanoseconds.
            prop_assert!((whole - parts).abs() <= 1e-5 * before.max(rate));
        }

        #[test]
        fn what_was_measured_longer_and_later_counts_more(
            old in 0.0..1e9_f64, new in 0.0..1e9_f64, seconds in 0.25..3.0_f64,
        ) {
            let value = smoothed(&[(old, seconds), (new, seconds)]).get().unwrap();
            prop_assert!((value - new).abs() <= (value - old).abs() + 1e-3);
        }

        #[test]
        fn the_verdict_is_the_ratio_of_the_rates(sent in 1.0..1e12_f64, written in 1.0..1e12_f64) {
            match rates(sent, written).verdict().unwrap() {
                Verdict::Converging(ratio) => {
                    prop_assert!(sent > written);
                    prop_assert!((ratio * written - sent).abs() <= sent * 1e-9);
                }
                Verdict::NotConverging => prop_assert!(sent < RATIO_MIN * written),
            }
        }
    }

    #[test]
    fn a_hiccup_counts_next_to_nothing_and_is_better_than_nothing() {
        let hiccup = smoothed(&[(1e9, 1.0), (1e6, 0.001)]).get().unwrap();
        assert!(hiccup > 0.99e9, "{hiccup}");
        assert_eq!(smoothed(&[(5.0, 0.0)]).get(), Some(5.0));
        assert_eq!(smoothed(&[]).get(), None);
    }

    #[test]
    fn nothing_written_converges_and_nothing_measured_says_nothing() {
        let idle = rates(1e9, 0.0).verdict();
        assert_eq!(idle, Some(Verdict::Converging(f64::INFINITY)));
        assert_eq!(Rates::default().verdict(), None);
        let unsent = Rates {
            sent: Smoothed::default(),
            ..rates(1.0, 1.0)
        };
        assert_eq!(unsent.verdict(), None);
    }

    #[test]
    fn a_writer_is_slowed_in_steps_that_end() {
        let mut percent = 0;
        let mut steps = Vec::new();
        while let Some(next) = throttle_after(percent) {
            assert!(next > percent);
            steps.push(next);
            percent = next;
        }
        assert_eq!(steps, [20, 40, 60, 80, 90, 95, 98, 99]);
    }
}
