//! Ranges and sets of pages, in units of [`PAGE_BYTES`]. Pure values.
//!
//! A set is one bit per page (1/32768 of the memory it describes). Runs, not pages, go in and come
//! out, and whole words are handled at once, so that a sparse set over a huge Region stays cheap.

use std::sync::atomic::{AtomicU64, Ordering};

use zerocopy::FromZeros;

use crate::limits::PAGE_BYTES;

const WORD_PAGES: u64 = u64::BITS as u64;

/// Pages a Region of `bytes` bytes has; the last one may be partial.
#[must_use]
pub fn pages_in(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE_BYTES)
}

/// The first page in each aligned area of `area` pages of which ascending `ranges` have at least half.
pub fn dense_areas(ranges: &[PageRange], area: u64) -> impl Iterator<Item = u64> {
    let mut parts = ranges.iter().flat_map(move |range| {
        let areas = range.first / area..=(range.end() - 1) / area;
        areas.map(move |index| {
            let first = range.first.max(index * area);
            (first, range.end().min((index + 1) * area) - first)
        })
    });
    let mut next = parts.next();
    let areas = std::iter::from_fn(move || {
        let (first, mut pages) = next?;
        next = parts.next();
        while let Some((_, more)) = next.filter(|(other, _)| other / area == first / area) {
            pages += more;
            next = parts.next();
        }
        Some((first, pages))
    });
    let dense = areas.filter(move |(_, pages)| pages * 2 >= area);
    dense.map(|(first, _)| first)
}

/// A run of pages.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageRange {
    /// The first page.
    pub first: u64,
    /// How many there are.
    pub count: u64,
}

impl PageRange {
    /// `count` pages from `first`. `None` if that is empty or not all inside `pages`.
    #[must_use]
    pub fn new(first: u64, count: u64, pages: u64) -> Option<Self> {
        let end = first.checked_add(count)?;
        (count > 0 && end <= pages).then_some(Self { first, count })
    }

    /// The pages touched by the bytes `offset..offset + len`.
    #[must_use]
    pub fn covering(offset: u64, len: u64) -> Self {
        let first = offset / PAGE_BYTES;
        Self {
            first,
            count: (offset + len).div_ceil(PAGE_BYTES) - first,
        }
    }

    /// One past the last page.
    #[must_use]
    pub fn end(self) -> u64 {
        self.first + self.count
    }

    /// Offset of the first byte.
    #[must_use]
    pub fn offset(self) -> u64 {
        self.first * PAGE_BYTES
    }

    /// Bytes it covers in a Region of `region_bytes`: the last page may be partial.
    #[must_use]
    pub fn bytes(self, region_bytes: u64) -> u64 {
        (self.end() * PAGE_BYTES)
            .min(region_bytes)
            .saturating_sub(self.offset())
    }

    /// Whether all of `other` lies inside.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.first <= other.first && other.end() <= self.end()
    }
}

/// A mask with the bits `from..to` of one word set.
fn mask(from: u64, to: u64) -> u64 {
    debug_assert!(from < to && to <= WORD_PAGES);
    (u64::MAX >> (WORD_PAGES - (to - from))) << from
}

/// The words a range touches, each with the bits of the range in it.
fn words(range: PageRange) -> impl Iterator<Item = (usize, u64)> {
    let (first, end) = (range.first / WORD_PAGES, range.end().div_ceil(WORD_PAGES));
    (first..end).map(move |word| {
        let base = word * WORD_PAGES;
        let from = range.first.max(base) - base;
        let to = range.end().min(base + WORD_PAGES) - base;
        (index(word), mask(from, to))
    })
}

/// A word number as an index: a set that large could not have been allocated.
#[expect(clippy::cast_possible_truncation)]
fn index(word: u64) -> usize {
    word as usize
}

/// A set of the pages of one Region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    pages: u64,
    words: Vec<u64>,
}

impl PageSet {
    /// An empty set over a Region of `pages` pages.
    #[must_use]
    pub fn empty(pages: u64) -> Self {
        Self {
            pages,
            words: vec![0; index(pages.div_ceil(WORD_PAGES))],
        }
    }

    /// All of a Region of `pages` pages.
    #[must_use]
    pub fn full(pages: u64) -> Self {
        let mut set = Self::empty(pages);
        if pages > 0 {
            set.insert(PageRange {
                first: 0,
                count: pages,
            });
        }
        set
    }

    /// Pages the Region has, in the set or not.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Adds a range. The part that lies outside the Region is our own mistake, and panics.
    pub fn insert(&mut self, range: PageRange) {
        assert!(range.end() <= self.pages, "{range:?} is outside the set");
        for (word, bits) in words(range) {
            self.words[word] |= bits;
        }
    }

    /// Adds the pages `64 * index..` whose bits are set, lowest bit first, and returns how many those
    /// are. Bits of pages that the Region does not have are left out.
    pub fn insert_word(&mut self, index: usize, bits: u64) -> u64 {
        let left = self.pages.saturating_sub(index as u64 * WORD_PAGES);
        if left == 0 {
            return 0;
        }
        let bits = bits & mask(0, left.min(WORD_PAGES));
        self.words[index] |= bits;
        u64::from(bits.count_ones())
    }

    /// One bit per page, lowest bit first; bits behind the last page are 0.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Takes a range out.
    pub fn remove(&mut self, range: PageRange) {
        assert!(range.end() <= self.pages, "{range:?} is outside the set");
        for (word, bits) in words(range) {
            self.words[word] &= !bits;
        }
    }

    /// Adds all of `other`, a set over the same Region.
    pub fn union(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "sets of two Regions");
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
    }

    /// Takes out all of `other`, a set over the same Region.
    pub fn subtract(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "sets of two Regions");
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine &= !theirs;
        }
    }

    /// Whether `page` is in the set.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[index(page / WORD_PAGES)] >> (page % WORD_PAGES) & 1 == 1
    }

    /// How many pages are in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether no page is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&w| w == 0)
    }

    /// The maximal runs in ascending order.
    pub fn runs(&self) -> impl Iterator<Item = PageRange> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let first = self.next(from, true)?;
            let end = self.next(first, false).unwrap_or(self.pages);
            from = end;
            Some(PageRange {
                first,
                count: end - first,
            })
        })
    }

    /// All of `range` as runs that are (`true`) or are not in the set, in ascending order.
    pub fn parts(&self, range: PageRange) -> impl Iterator<Item = (PageRange, bool)> + '_ {
        let mut first = range.first;
        std::iter::from_fn(move || {
            if first >= range.end() {
                return None;
            }
            let inside = self.contains(first);
            let end = self.next(first, !inside).unwrap_or(self.pages);
            let count = end.min(range.end()) - first;
            let part = PageRange { first, count };
            first = part.end();
            Some((part, inside))
        })
    }

    /// The first page at or after `from` that is (`wanted`) or is not in the set.
    fn next(&self, from: u64, wanted: bool) -> Option<u64> {
        if from >= self.pages {
            return None;
        }
        let mut word = from / WORD_PAGES;
        let mut bits = u64::MAX << (from % WORD_PAGES);
        while let Some(&value) = self.words.get(index(word)) {
            let found = (if wanted { value } else { !value }) & bits;
            if found != 0 {
                let page = word * WORD_PAGES + u64::from(found.trailing_zeros());
                return (page < self.pages).then_some(page);
            }
            word += 1;
            bits = u64::MAX;
        }
        None
    }
}

/// A page set that several streams fill at once, without a lock.
#[derive(Debug)]
pub struct SharedPageSet {
    pages: u64,
    words: Vec<AtomicU64>,
}

impl SharedPageSet {
    /// An empty set over a Region of `pages` pages. Its memory is allocated as it is written.
    #[must_use]
    pub fn empty(pages: u64) -> Self {
        let count = index(pages.div_ceil(WORD_PAGES));
        // Running out of address space for a bit per page is not an error a caller could handle.
        let words =
            AtomicU64::new_vec_zeroed(count).expect("a bit per page fits the address space");
        Self { pages, words }
    }

    /// Adds a range, which lies inside the Region. Ordered before whatever hands the set's owner the
    /// news that the range is there (a channel or a lock), so no stronger ordering is needed here.
    pub fn insert(&self, range: PageRange) {
        assert!(range.end() <= self.pages, "{range:?} is outside the set");
        for (word, bits) in words(range) {
            self.words[word].fetch_or(bits, Ordering::Relaxed);
        }
    }

    /// Takes a range out.
    pub fn remove(&self, range: PageRange) {
        assert!(range.end() <= self.pages, "{range:?} is outside the set");
        for (word, bits) in words(range) {
            self.words[word].fetch_and(!bits, Ordering::Relaxed);
        }
    }

    /// Whether some page of `range` is in the set.
    #[must_use]
    pub fn intersects(&self, range: PageRange) -> bool {
        words(range).any(|(word, bits)| self.words[word].load(Ordering::Relaxed) & bits != 0)
    }

    /// The pages of the Region that are not in the set.
    #[must_use]
    pub fn complement(&self) -> PageSet {
        let mut rest = PageSet::empty(self.pages);
        for (index, word) in self.words.iter().enumerate() {
            rest.insert_word(index, !word.load(Ordering::Relaxed));
        }
        rest
    }

    /// How many pages are in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words
            .iter()
            .map(|w| u64::from(w.load(Ordering::Relaxed).count_ones()))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_area_is_dense_if_half_of_it_or_more_is_there() {
        let range = |first, count| PageRange { first, count };
        let dense = |ranges: &[PageRange]| -> Vec<u64> { dense_areas(ranges, 8).collect() };
        assert_eq!(dense(&[]), [0; 0]);
        assert_eq!(dense(&[range(1, 3), range(5, 1)]), [1]);
        assert_eq!(dense(&[range(0, 3), range(8, 3)]), [0; 0]);
        assert_eq!(dense(&[range(5, 23), range(40, 2)]), [8, 16, 24]);
        assert_eq!(dense(&[range(7, 1), range(8, 4), range(15, 9)]), [8, 16]);
    }

    #[test]
    fn a_range_never_leaves_its_region() {
        assert!(PageRange::new(0, 10, 10).is_some());
        assert!(PageRange::new(0, 11, 10).is_none());
        assert!(PageRange::new(u64::MAX, 2, 10).is_none());
        assert!(PageRange::new(3, 0, 10).is_none());
    }

    #[test]
    fn a_word_adds_only_pages_that_exist() {
        let mut set = PageSet::empty(70);
        assert_eq!(set.insert_word(0, 0b101), 2);
        assert_eq!(set.insert_word(1, u64::MAX), 6);
        assert_eq!(set.insert_word(2, u64::MAX), 0);
        assert_eq!((set.count(), set.words()), (8, &[0b101, 0b11_1111][..]));
    }

    #[test]
    fn a_partial_last_page_has_only_its_bytes() {
        let last = PageRange { first: 1, count: 1 };
        assert_eq!(last.bytes(PAGE_BYTES + 100), 100);
        assert_eq!(last.bytes(2 * PAGE_BYTES), PAGE_BYTES);
        assert_eq!(
            PageRange::covering(4095, 2),
            PageRange { first: 0, count: 2 }
        );
    }

    proptest! {
        #[test]
        fn sets_behave_like_a_plain_set(
            pages in 1u64..300,
            edits in prop::collection::vec((any::<bool>(), 0u64..300, 1u64..300), 0..40),
        ) {
            let mut model = BTreeSet::new();
            let mut set = PageSet::empty(pages);
            let shared = SharedPageSet::empty(pages);
            for (add, first, count) in edits {
                let Some(range) = PageRange::new(first, count, pages) else { continue };
                if add {
                    set.insert(range);
                    shared.insert(range);
                    model.extend(range.first..range.end());
                } else {
                    set.remove(range);
                    shared.remove(range);
                    model.retain(|page| !(range.first..range.end()).contains(page));
                }
            }
            let runs: Vec<_> = set.runs().collect();
            let listed: BTreeSet<_> = runs.iter().flat_map(|r| r.first..r.end()).collect();
            prop_assert_eq!(&listed, &model);
            prop_assert!(runs.windows(2).all(|w| w[0].end() < w[1].first), "runs are maximal");
            prop_assert_eq!(set.count(), model.len() as u64);
            prop_assert_eq!(shared.count(), model.len() as u64);
            prop_assert_eq!(set.is_empty(), model.is_empty());
            let absent = shared.complement();
            prop_assert!((0..pages).all(|page| absent.contains(page) != model.contains(&page)));
            prop_assert_eq!(absent.count(), pages - model.len() as u64);
            for first in 0..pages {
                let range = PageRange { first, count: (pages - first).min(70) };
                let any = model.range(range.first..range.end()).next().is_some();
                prop_assert_eq!(shared.intersects(range), any);
                let parts: Vec<_> = set.parts(range).collect();
                prop_assert!(parts.windows(2).all(|w| w[0].1 != w[1].1 && w[0].0.end() == w[1].0.first));
                prop_assert_eq!((parts[0].0.first, parts[parts.len() - 1].0.end()), (range.first, range.end()));
                let inside = |p: &(PageRange, bool)| (p.0.first..p.0.end()).all(|page| set.contains(page) == p.1);
                prop_assert!(parts.iter().all(inside));
            }
            let mut rest = PageSet::full(pages);
            rest.subtract(&set);
            prop_assert_eq!(&rest, &absent);
            for page in 0..pages + 2 {
                prop_assert_eq!(set.contains(page), model.contains(&page));
            }
        }
    }
}
