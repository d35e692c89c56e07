//! What the receiver does not have for certain, as streams see it (rule 3).
//!
//! A bit is set from the moment it is known that the receiver lacks a page until an acknowledgement, or
//! the receiver's answer to a resumption, says that it is applied and intact. So a stream that dies
//! leaves nothing behind that would have to be put back: what it had not settled is still owed.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::pages::{PageRange, PageSet};

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
