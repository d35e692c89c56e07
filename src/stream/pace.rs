//! The bandwidth cap: a token bucket that the streams of an attempt share.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Longest time's worth of bandwidth that may be saved up, so that a pause is not followed by a burst.
const SAVED_MAX: Duration = Duration::from_millis(10);

/// Hands out bandwidth. Pure apart from its lock: callers say what time it is, and sleep themselves.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: u64,
    /// When everything taken so far is paid for.
    paid_until: Mutex<Instant>,
}

impl Pace {
    /// At most `bytes_per_second` from `now` on; 0 is no limit.
    #[must_use]
    pub fn new(bytes_per_second: u64, now: Instant) -> Self {
        Self {
            bytes_per_second,
            paid_until: Mutex::new(now),
        }
    }

    /// Takes `bytes`, and says how long the caller has to wait before it sends them.
    pub fn take(&self, bytes: u64, now: Instant) -> Duration {
        if self.bytes_per_second == 0 {
            return Duration::ZERO;
        }
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let cost = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        let mut paid_until = self
            .paid_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let start = now
            .checked_sub(SAVED_MAX)
            .map_or(*paid_until, |saved| saved.max(*paid_until));
        *paid_until = start + cost;
        start.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_over_any_run_of_takes() {
        let start = Instant::now();
        let pace = Pace::new(1_000_000, start);
        let mut now = start;
        for _ in 0..100 {
            now += pace.take(50_000, now);
        }
        let elapsed = now - start;
        assert!(
            elapsed >= Duration::from_millis(100 * 50 - 60),
            "{elapsed:?}"
        );
        assert!(elapsed <= Duration::from_millis(100 * 50), "{elapsed:?}");
    }

    #[test]
    fn a_pause_does_not_become_a_burst() {
        let start = Instant::now();
        let pace = Pace::new(1_000_000, start);
        let later = start + Duration::from_secs(60);
        assert_eq!(pace.take(20_000, later), Duration::ZERO);
        assert!(pace.take(1, later) >= Duration::from_millis(9));
    }

    #[test]
    fn no_limit_never_waits() {
        let now = Instant::now();
        assert_eq!(Pace::new(0, now).take(u64::MAX, now), Duration::ZERO);
    }
}
