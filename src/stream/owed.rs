//! What the receiver does not have for certain, as streams see it (rule 3).
//!
//! A bit is set from the moment it is known that the receiver lacks a page until an acknowledgement, or
//! the receiver's answer to a resumption, says that it is applied and intact. So a stream that dies
//! leaves nothing behind that would have to be put back: what it had not settled is still owed.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::pages::{PageRange, PageSet};
use crate::wire::RegionRun;

/// Pages owed, Region by Region. Streams share it: a packet takes the lock of its Region twice, for a
/// few words of bits.
#[derive(Debug)]
pub struct Owed(Box<[Mutex<PageSet>]>);

impl Owed {
    /// Everything of Regions with so many pages.
    #[must_use]
    pub fn all_of(pages: impl IntoIterator<Item = u64>) -> Self {
        let sets = pages.into_iter().map(PageSet::full).map(Mutex::new);
        Self(sets.collect())
    }

    /// The pages of one Region, by its index in the attempt.
    pub fn of(&self, region: u32) -> MutexGuard<'_, PageSet> {
        // Whoever panicked with it set or cleared whole words: the set is one it could have been.
        self.0[region as usize]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Every page again.
    pub fn fill(&self) {
        for set in &self.0 {
            let mut set = set.lock().unwrap_or_else(PoisonError::into_inner);
            *set = PageSet::full(set.pages());
        }
    }

    /// Pages over all Regions.
    #[must_use]
    pub fn count(&self) -> u64 {
        let locked = |set: &Mutex<PageSet>| {
            set.lock()
                .map_or_else(|e| e.into_inner().count(), |s| s.count())
        };
        self.0.iter().map(locked).sum()
    }

    /// What was under way when the streams ended, and what the receiver has `applied` all the same, is
    /// paid; except pages that it names as `missing`. Both are the peer's words: what they say of frames
    /// and pages that there are not is of no consequence.
    pub fn settle(
        &self,
        in_flight: &[(u16, Vec<InFlight>)],
        applied: &[u64],
        missing: &[RegionRun],
    ) {
        let mut arrived: HashMap<u32, PageSet> = HashMap::new();
        for (stream, packets) in in_flight {
            let applied = applied.get(usize::from(*stream)).copied().unwrap_or(0);
            for packet in packets.iter().filter(|packet| packet.sequence <= applied) {
                let set = arrived
                    .entry(packet.region)
                    .or_insert_with(|| PageSet::empty(self.of(packet.region).pages()));
                packet.runs.iter().for_each(|run| set.insert(*run));
            }
        }
        for run in missing {
            if let Some(set) = arrived.get_mut(&run.region)
                && let Some(range) = PageRange::new(run.first, run.pages, set.pages())
            {
                set.remove(range);
            }
        }
        for (region, set) in &arrived {
            let mut owed = self.of(*region);
            set.runs().for_each(|run| owed.remove(run));
        }
    }

    /// These pages have to be carried.
    pub(super) fn add(&self, region: u32, runs: impl IntoIterator<Item = PageRange>) {
        let mut set = self.of(region);
        runs.into_iter().for_each(|run| set.insert(run));
    }

    /// A packet is applied, and all of it but `torn` is intact.
    pub(super) fn pay(&self, region: u32, runs: &[PageRange], torn: &[PageRange]) {
        let mut set = self.of(region);
        runs.iter().for_each(|run| set.remove(*run));
        torn.iter().for_each(|run| set.insert(*run));
    }
}

/// A packet that was sent and not acknowledged when its stream ended. Only the receiver knows whether it
/// was applied.
#[derive(Debug)]
pub struct InFlight {
    /// Its position on the stream.
    pub sequence: u64,
    /// Index of its Region.
    pub region: u32,
    /// Its pages, in ascending order.
    pub runs: Vec<PageRange>,
}

/// The same pages in as few runs as there are.
pub(super) fn merged(ranges: impl Iterator<Item = PageRange>) -> Vec<PageRange> {
    let mut runs: Vec<PageRange> = Vec::new();
    for range in ranges {
        match runs.last_mut() {
            Some(last) if last.end() == range.first => last.count += range.count,
            _ => runs.push(range),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, count: u64) -> PageRange {
        PageRange { first, count }
    }

    fn packet(sequence: u64, runs: &[PageRange]) -> InFlight {
        InFlight {
            sequence,
            region: 0,
            runs: runs.to_vec(),
        }
    }

    fn left(owed: &Owed) -> Vec<(u64, u64)> {
        let set = owed.of(0);
        set.runs().map(|run| (run.first, run.count)).collect()
    }

    #[test]
    fn a_packet_pays_what_is_not_torn_and_nothing_between_its_runs() {
        let owed = Owed::all_of([20]);
        owed.pay(0, &[run(0, 4), run(8, 4)], &[run(9, 1)]);
        assert_eq!(left(&owed), [(4, 4), (9, 1), (12, 8)]);
        owed.add(0, [run(0, 1)]);
        assert_eq!(owed.count(), 14);
    }

    #[test]
    fn of_what_was_under_way_only_what_is_applied_and_intact_is_paid() {
        let owed = Owed::all_of([20, 4]);
        let in_flight = [
            (0, vec![packet(3, &[run(0, 4)]), packet(4, &[run(4, 4)])]),
            (2, vec![packet(9, &[run(8, 4)])]),
        ];
        let missing = |first, pages| RegionRun {
            region: 0,
            first,
            pages,
        };
        // The last one is not a page of that Region, and the receiver was not asked about that stream.
        let named = [missing(1, 2), missing(6, 10), missing(19, u64::MAX)];
        owed.settle(&in_flight, &[3, 7], &named);
        assert_eq!(left(&owed), [(1, 2), (4, 16)]);
        owed.settle(&in_flight, &[], &[]);
        assert_eq!(left(&owed), [(1, 2), (4, 16)], "nothing is known");
        owed.settle(&in_flight, &[4, 0, 9], &[]);
        assert_eq!(left(&owed), [(12, 8)]);
        assert_eq!(owed.of(1).count(), 4);
    }

    #[test]
    fn ranges_that_touch_are_one_run() {
        let ranges = [run(0, 2), run(2, 1), run(4, 1), run(5, 5)];
        assert_eq!(merged(ranges.into_iter()), [run(0, 3), run(4, 6)]);
    }
}
