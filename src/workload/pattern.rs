//! Which page is written next, and with what. Pure: all of it follows from the number of the write.

use clap::ValueEnum;

use super::stamp::mix;

/// In which order the pages of a working set are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Pattern {
    /// One page after the other, round and round.
    #[default]
    Loop,
    /// Any page, each as likely as any other.
    Random,
    /// A few pages most of the time, most pages rarely (Zipf's law).
    Zipf,
    /// One page after the other in memory that nothing was in before, as a log grows; at its end again
    /// from its start.
    Append,
    /// As loop, but every second time a page gets nothing but zeros.
    Zero,
    /// As loop, but seven times of eight a page gets what it holds already, as from a program that
    /// computes the same again.
    Rewrite,
}

/// What a write puts into a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// A stamp of its own.
    Stamp,
    /// Nothing but zeros.
    Zeros,
    /// What is there.
    Same,
}

/// One write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// Which page of the working set.
    pub page: u64,
    /// What it gets.
    pub put: Put,
}

/// In so many rounds every page gets something new once.
const REWRITE_ROUNDS: u64 = 8;

/// Spreads the popular pages over the working set. A prime, so that no two come to lie on each other.
const SCATTER: u128 = 2_654_435_761;

impl Pattern {
    /// What write number `sequence`, of which the first is 1, does to a working set of `pages` pages,
    /// which are not 0.
    #[must_use]
    pub fn choose(self, sequence: u64, pages: u64, seed: u64) -> Choice {
        let nth = sequence - 1;
        let random = mix(seed ^ mix(sequence));
        let page = match self {
            Self::Loop | Self::Append | Self::Zero | Self::Rewrite => nth % pages,
            Self::Random => random % pages,
            Self::Zipf => {
                let scattered = u128::from(zipf_rank(random, pages)) * SCATTER;
                let page = scattered % u128::from(pages);
                u64::try_from(page).unwrap_or(0) // Less than `pages`.
            }
        };
        let round = nth / pages;
        let put = match self {
            Self::Zero if round.is_multiple_of(2) => Put::Zeros,
            Self::Rewrite if !(page + round).is_multiple_of(REWRITE_ROUNDS) => Put::Same,
            _ => Put::Stamp,
        };
        Choice { page, put }
    }

    /// Whether the working set is filled before the first write.
    #[must_use]
    pub fn is_filled_before(self) -> bool {
        self != Self::Append
    }
}

/// A rank below `pages`: 0, 1 and 2, 3 to 6, and so on, each such octave as likely as any other. So the
/// likelihood of a rank falls with its inverse, in steps.
fn zipf_rank(random: u64, pages: u64) -> u64 {
    let octave = random % u64::from(pages.ilog2() + 1);
    let width = 1_u64 << octave;
    let rank = width - 1 + mix(random) % width;
    // The last octave may reach beyond the end.
    rank % pages
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    const ALL: [Pattern; 6] = [
        Pattern::Loop,
        Pattern::Random,
        Pattern::Zipf,
        Pattern::Append,
        Pattern::Zero,
        Pattern::Rewrite,
    ];

    fn counts(pattern: Pattern, pages: u64, writes: u64) -> HashMap<u64, u64> {
        let mut counts = HashMap::new();
        for sequence in 1..=writes {
            *counts
                .entry(pattern.choose(sequence, pages, 5).page)
                .or_default() += 1;
        }
        counts
    }

    #[test]
    fn every_pattern_stays_inside_and_reaches_every_page() {
        for pattern in ALL {
            for pages in [1, 2, 3, 7, 64, 1000] {
                let counts = counts(pattern, pages, pages * 200);
                assert_eq!(counts.len() as u64, pages, "{pattern:?} {pages}");
                assert!(counts.keys().all(|&page| page < pages));
            }
        }
    }

    #[test]
    fn the_same_number_is_the_same_write_and_another_seed_another_order() {
        for pattern in ALL {
            assert_eq!(pattern.choose(77, 100, 1), pattern.choose(77, 100, 1));
        }
        let order = |seed| {
            (1..50)
                .map(|n| Pattern::Random.choose(n, 1000, seed))
                .collect::<Vec<_>>()
        };
        assert_ne!(order(1), order(2));
    }

    #[test]
    fn a_loop_and_a_log_go_in_order() {
        for pattern in [Pattern::Loop, Pattern::Append] {
            let pages: Vec<u64> = (1..=7).map(|n| pattern.choose(n, 3, 9).page).collect();
            assert_eq!(pages, [0, 1, 2, 0, 1, 2, 0]);
        }
        assert!(!Pattern::Append.is_filled_before());
    }

    #[test]
    fn a_page_gets_zeros_and_stamps_in_turn() {
        let put = |n| Pattern::Zero.choose(n, 3, 9).put;
        let seen: Vec<Put> = (1..=9).map(put).collect();
        let want = [[Put::Zeros; 3], [Put::Stamp; 3], [Put::Zeros; 3]].concat();
        assert_eq!(seen, want);
        assert!((1..100).all(|n| Pattern::Random.choose(n, 3, 9).put == Put::Stamp));
    }

    #[test]
    fn most_writes_of_rewrite_are_the_same_again_and_every_page_changes_at_last() {
        let writes = (1..=16 * 8).map(|n| Pattern::Rewrite.choose(n, 16, 9));
        let new: Vec<u64> = writes
            .filter(|choice| choice.put == Put::Stamp)
            .map(|choice| choice.page)
            .collect();
        assert_eq!(new.len(), 16);
        assert!((0..16).all(|page| new.contains(&page)));
    }

    #[test]
    fn a_few_pages_get_most_of_zipfs_writes() {
        let mut counts: Vec<u64> = counts(Pattern::Zipf, 1024, 100_000).into_values().collect();
        counts.sort_unstable_by(|a, b| b.cmp(a));
        let first: u64 = counts[..32].iter().sum();
        assert!((40_000..60_000).contains(&first), "{first}");
        let random = self::counts(Pattern::Random, 1024, 100_000);
        assert!(random.values().all(|&count| count < 200));
    }
}
