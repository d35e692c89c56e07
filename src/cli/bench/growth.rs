//! The same memory, moved by more and more streams, Regions or transfers.

use std::time::Instant;

use serde_json::json;

use super::Sample;
use super::cases::Destination;
use super::report::{Measured, Point};
use super::runs::{Bench, DENSE, gib, median};
use super::source::{fill, remove};
use super::statistics::Estimate;
use crate::cli::stage::StageError;

const STREAMS: [u32; 7] = [1, 2, 4, 8, 16, 32, 64];
const REGIONS: [u32; 4] = [1, 10, 100, 1000];
const ATTEMPTS: [u32; 4] = [1, 4, 16, 64];
const PAGE: u64 = crate::limits::PAGE_BYTES;

impl Bench<'_> {
    pub(super) fn streams(&mut self) -> Result<Vec<Measured>, StageError> {
        let times = self.rounds(&STREAMS, |bench, streams| {
            let parameters = json!({"streams": streams});
            let moved = bench.transfer(Destination::Prepared, DENSE, &parameters)?;
            Ok(moved.sample)
        })?;
        // Fewer than the best count are for the row "one-stream".
        let best = best(&times);
        Ok(vec![grown(&STREAMS, &times, best, self.dense.bytes())])
    }

    pub(super) fn regions(&mut self) -> Result<Vec<Measured>, StageError> {
        self.split(&REGIONS, false)
    }

    pub(super) fn attempts(&mut self) -> Result<Vec<Measured>, StageError> {
        self.split(&ATTEMPTS, true)
    }

    /// Half of the memory, split into so many Regions; each one in a transfer of its own, or all in one.
    fn split(&mut self, counts: &[u32], apart: bool) -> Result<Vec<Measured>, StageError> {
        let bytes = self.dense.bytes() / 2;
        let mut all = Vec::new();
        for &count in counts {
            let names: Vec<_> = (0..count).map(|index| format!("{count}-{index}")).collect();
            let each = (bytes / u64::from(count)).next_multiple_of(PAGE);
            for name in &names {
                fill(&self.stage, name, each, &[(0, each)])?;
            }
            all.push(names);
        }
        let times = self.rounds(counts, |bench, count| {
            let at = counts.iter().position(|other| *other == count);
            let regions = &all[at.expect("one of them")];
            let groups: Vec<_> = regions
                .chunks(if apart { 1 } else { regions.len() })
                .collect();
            bench.rig.add(&bench.stage, regions, "none")?;
            let parameters = json!({"streams": 2});
            let moved = bench.rig.migrate_all(&bench.stage, &groups, &parameters)?;
            Ok(moved.sample)
        })?;
        remove(&self.stage, all.iter().flatten());
        Ok(vec![grown(counts, &times, 0, bytes)])
    }

    /// The times of every count, round by round. Each round begins with another count.
    fn rounds(
        &mut self,
        counts: &[u32],
        mut run: impl FnMut(&mut Self, u32) -> Result<Sample, StageError>,
    ) -> Result<Vec<Vec<f64>>, StageError> {
        let mut times = vec![Vec::new(); counts.len()];
        let started = Instant::now();
        let mut round = 0;
        run(self, counts[0])?; // warms up
        while self.pace.goes_on(round, started) {
            for step in 0..counts.len() {
                self.stage.check_interrupted()?;
                let at = (step + usize::from(round)) % counts.len();
                times[at].push(run(self, counts[at])?.time.as_secs_f64());
            }
            round += 1;
        }
        Ok(times)
    }
}

/// Which count is the fastest.
fn best(times: &[Vec<f64>]) -> usize {
    let medians = times.iter().map(|of| median(of.iter().copied()));
    let order = medians.enumerate().min_by(|a, b| a.1.total_cmp(&b.1));
    order.map_or(0, |(index, _)| index)
}

/// The throughput of each count as a multiple of the best one's; the row is the slowest from `first` on.
fn grown(counts: &[u32], times: &[Vec<f64>], first: usize, bytes: u64) -> Measured {
    let best = &times[best(times)];
    let relative = |of: &Vec<f64>| {
        let pairs = best.iter().zip(of);
        Estimate::of(pairs.map(|(best, time)| best / time)).expect("at least one round")
    };
    let points: Vec<_> = counts
        .iter()
        .zip(times)
        .map(|(&count, of)| Point {
            count,
            gib_per_second: gib(bytes) / median(of.iter().copied()),
            relative: relative(of),
        })
        .collect();
    let order = |a: &&Point, b: &&Point| a.relative.median.total_cmp(&b.relative.median);
    let slowest = points[first..].iter().min_by(order).expect("a count");
    let mut measured = Measured::estimated(slowest.relative);
    measured.note = format!("slowest: {}", slowest.count);
    measured.points = points;
    measured
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_row_is_the_slowest_from_the_first_that_counts() {
        let times = [vec![4.0, 4.0], vec![1.0, 2.0], vec![1.25, 2.5]];
        assert_eq!(best(&times), 1);
        let all = grown(&[1, 2, 4], &times, 0, 1 << 30);
        assert_eq!(all.points[0].relative.median, 0.375);
        assert_eq!(all.note, "slowest: 1");
        assert_eq!(grown(&[1, 2, 4], &times, 1, 1 << 30).note, "slowest: 4");
    }
}
