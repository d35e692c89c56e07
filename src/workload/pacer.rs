//! When to write how many pages. Pure: the time is an argument.

use std::time::{Duration, Instant};

use super::stamp::STAMPED_BYTES;

/// Most time that one burst makes up for.
const BURST: Duration = Duration::from_millis(1);

/// Pages in one burst at most, however high the rate: signals are looked at between bursts.
const BURST_PAGES_MAX: u128 = 4096;

/// Longest gap that is a delay of a busy host. A longer one means that the process was stopped; what it
/// did not write then stays unwritten, or the writes after a Freeze would say nothing about the rate.
const DELAY_MAX: Duration = Duration::from_millis(100);

/// Shortest sleep: less is below what the scheduler can do.
const SLEEP_MIN: Duration = Duration::from_micros(100);

/// Sleep that keeps a fast writer from waking for every single page.
const SLEEP_FAST: Duration = Duration::from_micros(500);

/// Longest sleep, so that a slow writer still notices that it was stopped.
const SLEEP_MAX: Duration = Duration::from_millis(50);

/// Turns a rate into pages due: in bursts of at most a millisecond, catching up after a delay.
#[derive(Debug, Clone)]
pub struct Pacer {
    bytes_per_second: u64,
    /// What is owed, in byte-nanoseconds, so that no rate loses a fraction.
    credit: u128,
    last: Instant,
}

const NS_PER_SECOND: u128 = 1_000_000_000;
const PAGE_CREDIT: u128 = STAMPED_BYTES as u128 * NS_PER_SECOND;

impl Pacer {
    /// Nothing is due at `now`.
    #[must_use]
    pub fn new(bytes_per_second: u64, now: Instant) -> Self {
        Self {
            bytes_per_second,
            credit: 0,
            last: now,
        }
    }

    /// Pages to write now; they count as written.
    pub fn due(&mut self, now: Instant) -> u64 {
        let gap = now.saturating_duration_since(self.last);
        self.last = now;
        if gap > DELAY_MAX {
            self.credit = 0;
            return 0;
        }
        // A writer that cannot keep the rate at all must not owe ever more.
        let most = self.earned(DELAY_MAX).max(PAGE_CREDIT);
        self.credit = (self.credit + self.earned(gap)).min(most);
        let burst = (self.earned(BURST) / PAGE_CREDIT).clamp(1, BURST_PAGES_MAX);
        let pages = (self.credit / PAGE_CREDIT).min(burst);
        self.credit -= pages * PAGE_CREDIT;
        u64::try_from(pages).unwrap_or(u64::MAX) // At most BURST_PAGES_MAX.
    }

    /// How long to sleep before asking again.
    #[must_use]
    pub fn pause(&self) -> Duration {
        if self.bytes_per_second == 0 {
            return SLEEP_MAX;
        }
        if self.credit >= PAGE_CREDIT {
            return SLEEP_MIN;
        }
        let ns = (PAGE_CREDIT - self.credit).div_ceil(self.bytes_per_second.into());
        let ns = u64::try_from(ns).unwrap_or(u64::MAX);
        Duration::from_nanos(ns).clamp(SLEEP_FAST, SLEEP_MAX)
    }

    /// The process was stopped and goes on at `now`: nothing is owed for the time between.
    pub fn continued(&mut self, now: Instant) {
        self.credit = 0;
        self.last = now;
    }

    fn earned(&self, time: Duration) -> u128 {
        time.as_nanos() * u128::from(self.bytes_per_second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: u64 = 200 << 20;
    const PAGES_PER_MS: u64 = RATE / 4096 / 1000;

    /// Pages due over `ticks` calls that are `step` apart.
    fn run(pacer: &mut Pacer, now: &mut Instant, step: Duration, ticks: u32) -> u64 {
        (0..ticks)
            .map(|_| {
                *now += step;
                pacer.due(*now)
            })
            .sum()
    }

    #[test]
    fn a_second_of_ticks_writes_a_second_of_pages() {
        for rate in [4096, 5000, 1 << 20, RATE, 3 << 30] {
            let mut now = Instant::now();
            let mut pacer = Pacer::new(rate, now);
            let pages = run(&mut pacer, &mut now, Duration::from_micros(500), 2000);
            assert!(pages.abs_diff(rate / 4096) <= 1, "{rate}: {pages}");
        }
    }

    #[test]
    fn a_burst_is_a_millisecond_at_most() {
        let mut now = Instant::now();
        let mut pacer = Pacer::new(RATE, now);
        now += Duration::from_millis(50);
        assert_eq!(pacer.due(now), PAGES_PER_MS);
        assert_eq!(pacer.pause(), SLEEP_MIN);
    }

    #[test]
    fn a_delay_is_caught_up() {
        let mut now = Instant::now();
        let mut pacer = Pacer::new(RATE, now);
        let mut pages = run(&mut pacer, &mut now, Duration::from_millis(20), 1);
        pages += run(&mut pacer, &mut now, SLEEP_MIN, 300);
        let owed = RATE / 4096 / 20; // 20 ms and 300 × 0.1 ms.
        assert!(pages.abs_diff(owed) <= 1, "{pages} {owed}");
    }

    #[test]
    fn a_stop_is_not_caught_up() {
        let mut now = Instant::now();
        let mut pacer = Pacer::new(RATE, now);
        run(&mut pacer, &mut now, BURST, 100);
        // Seen by its length alone, as after a cgroup freeze.
        let stopped = Duration::from_secs(5);
        let pages = run(&mut pacer, &mut now, stopped, 1) + run(&mut pacer, &mut now, BURST, 10);
        assert!(pages <= 11 * PAGES_PER_MS, "{pages}");
        // Told by SIGCONT: also a short one.
        now += Duration::from_millis(80);
        pacer.continued(now);
        assert_eq!(pacer.due(now), 0);
    }

    #[test]
    fn a_writer_that_cannot_keep_up_owes_a_tenth_of_a_second_at_most() {
        let mut now = Instant::now();
        let mut pacer = Pacer::new(RATE, now);
        run(&mut pacer, &mut now, Duration::from_millis(90), 50);
        // At an unchanged instant nothing is earned any more: what comes was owed.
        let owed: u64 = (0..1000).map(|_| pacer.due(now)).sum();
        assert!(owed <= 100 * (PAGES_PER_MS + 1), "{owed}");
    }

    #[test]
    fn no_rate_makes_a_burst_without_end() {
        let mut now = Instant::now();
        let mut pacer = Pacer::new(u64::MAX, now);
        now += DELAY_MAX;
        assert_eq!(pacer.due(now), 4096);
    }

    #[test]
    fn rate_zero_never_writes() {
        let mut now = Instant::now();
        let mut pacer = Pacer::new(0, now);
        assert_eq!(run(&mut pacer, &mut now, BURST, 1000), 0);
        assert_eq!(pacer.pause(), SLEEP_MAX);
    }

    #[test]
    fn a_slow_writer_sleeps_until_the_next_page_and_a_fast_one_does_not_wake_for_each() {
        let now = Instant::now();
        assert_eq!(Pacer::new(4096, now).pause(), SLEEP_MAX);
        assert_eq!(Pacer::new(409_600, now).pause(), Duration::from_millis(10));
        assert_eq!(Pacer::new(RATE, now).pause(), SLEEP_FAST);
    }
}
