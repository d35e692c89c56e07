//! What the receiver was last sent of every page, as a seeded 64-bit hash.
//!
//! 8 bytes per page (1/512 of the Region) and lazily allocated, so holes cost nothing. Streams read
//! different pages at the same time; each entry is one atomic, and the barrier between Iterations
//! orders one pass after the other.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use xxhash_rust::xxh3::xxh3_64_with_seed;
use zerocopy::FromZeros;

use crate::pages::PageRange;

/// Never read as data: the receiver has a hole, which reads as zeros.
const UNSEEN: u64 = 0;
/// All bytes zero.
const ZERO: u64 = 1;

/// What a page turned out to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The same as last time.
    Same,
    /// Something else than last time.
    Changed,
}

/// One fingerprint per page.
#[derive(Debug)]
pub struct Fingerprints {
    seed: u64,
    pages: Vec<AtomicU64>,
}

impl Fingerprints {
    /// Nothing seen yet. The seed is random, so that nobody can prepare two pages that look the same.
    pub fn new(pages: u64) -> io::Result<Self> {
        let seed = getrandom::u64().map_err(io::Error::from)?;
        let count = usize::try_from(pages).map_err(|_| io::ErrorKind::OutOfMemory)?;
        // Zeroed memory from the allocator is mapped, not touched: an entry costs when it is written.
        const _: () = assert!(UNSEEN == 0);
        let pages = AtomicU64::new_vec_zeroed(count).map_err(|_| io::ErrorKind::OutOfMemory)?;
        Ok(Self { seed, pages })
    }

    fn entry(&self, page: u64) -> &AtomicU64 {
        let index = usize::try_from(page).expect("the table has an entry for every page");
        &self.pages[index]
    }

    /// Remembers that `page` is sent with these `bytes`, and says whether they are news.
    pub fn update(&self, page: u64, bytes: &[u8]) -> Change {
        self.swap(page, xxh3_64_with_seed(bytes, self.seed).max(ZERO + 1))
    }

    /// Remembers that `page` holds zeros, and says whether that is news. A hole that somebody filled by
    /// reading it is none: the receiver has zeros there.
    pub fn update_zero(&self, page: u64) -> Change {
        let unseen = self.entry(page).load(Ordering::Relaxed) == UNSEEN;
        let change = self.swap(page, ZERO);
        if unseen { Change::Same } else { change }
    }

    fn swap(&self, page: u64, new: u64) -> Change {
        let entry = self.entry(page);
        if entry.load(Ordering::Relaxed) == new {
            return Change::Same;
        }
        entry.store(new, Ordering::Relaxed);
        Change::Changed
    }

    /// Remembers that `range` is sent as a hole.
    pub fn forget(&self, range: PageRange) {
        for page in range.first..range.end() {
            // Reading first keeps the untouched part of the table unallocated.
            if self.entry(page).load(Ordering::Relaxed) != UNSEEN {
                self.entry(page).store(UNSEEN, Ordering::Relaxed);
            }
        }
    }

    /// Calls `each` for the runs inside `range` that the receiver holds as something else than zeros.
    pub fn each_data_run(&self, range: PageRange, mut each: impl FnMut(PageRange)) {
        let mut first = None;
        for page in range.first..=range.end() {
            let data = page < range.end() && self.entry(page).load(Ordering::Relaxed) > ZERO;
            match (data, first) {
                (true, None) => first = Some(page),
                (false, Some(start)) => {
                    each(PageRange {
                        first: start,
                        count: page - start,
                    });
                    first = None;
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_new_content_is_a_change() {
        let table = Fingerprints::new(4).unwrap();
        assert_eq!(table.update(0, b"one"), Change::Changed);
        assert_eq!(table.update(0, b"one"), Change::Same);
        assert_eq!(table.update(0, b"two"), Change::Changed);
        assert_eq!(table.update_zero(0), Change::Changed);
        assert_eq!(table.update_zero(0), Change::Same);
    }

    #[test]
    fn a_hole_that_was_filled_by_reading_it_is_no_change() {
        let table = Fingerprints::new(1).unwrap();
        assert_eq!(table.update_zero(0), Change::Same);
        assert_eq!(table.update(0, b"data"), Change::Changed);
        assert_eq!(table.update_zero(0), Change::Changed);
    }

    #[test]
    fn data_runs_are_what_the_receiver_has_as_data() {
        let table = Fingerprints::new(10).unwrap();
        for page in [2, 3, 9] {
            table.update(page, b"data");
        }
        table.update_zero(5);
        let mut runs = Vec::new();
        table.each_data_run(
            PageRange {
                first: 0,
                count: 10,
            },
            |run| runs.push((run.first, run.count)),
        );
        assert_eq!(runs, [(2, 2), (9, 1)]);
        table.forget(PageRange {
            first: 0,
            count: 10,
        });
        table.each_data_run(
            PageRange {
                first: 0,
                count: 10,
            },
            |run| panic!("{run:?} was forgotten"),
        );
    }
}
