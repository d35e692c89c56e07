//! What a written page says about itself, so that a copy of it can be judged without the original.
//!
//! A page is 4096 bytes, all numbers little-endian:
//!
//! | offset | | |
//! | --- | --- | --- |
//! | 0 | u64 | magic, `MFstamp1` |
//! | 8 | u64 | page number in the file |
//! | 16 | u64 | sequence number of the write; 0 is the first filling |
//! | 24 | u64 | when: `CLOCK_REALTIME` in nanoseconds |
//! | 32 | u64 | seed of the run |
//! | 40 | 507 × u64 | pseudo-random words that follow from the five above |
//!
//! So every write changes the whole page, and a page that mixes two writes is noticed.

use std::fmt;

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes in one stamped page, whatever the page size of the file system.
pub const STAMPED_BYTES: usize = 4096;

const MAGIC: u64 = u64::from_le_bytes(*b"MFstamp1");

/// One write of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Page number in the file, in units of 4096 bytes.
    pub page: u64,
    /// Sequence number of the write; the first filling of the file is 0.
    pub sequence: u64,
    /// When it was written: `CLOCK_REALTIME` in nanoseconds.
    pub time_ns: u64,
    /// Seed of the run.
    pub seed: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    magic: U64,
    page: U64,
    sequence: U64,
    time_ns: U64,
    seed: U64,
}

/// A whole page, as it is in memory.
pub(super) type PageBytes = [u8; STAMPED_BYTES];

impl Stamp {
    /// The stamp at the start of a page, if there is one. The rest of the page is not looked at.
    #[must_use]
    pub fn of(page: &[u8]) -> Option<Self> {
        let (header, _) = Header::read_from_prefix(page).ok()?;
        (header.magic.get() == MAGIC).then_some(Self {
            page: header.page.get(),
            sequence: header.sequence.get(),
            time_ns: header.time_ns.get(),
            seed: header.seed.get(),
        })
    }

    /// Whether `page` is, in every byte, what this write wrote. A torn page is not.
    #[must_use]
    pub fn is_whole(&self, page: &[u8]) -> bool {
        let mut written = [0; STAMPED_BYTES];
        self.write(&mut written);
        page == written
    }

    /// The page of this write.
    pub(super) fn write(&self, page: &mut PageBytes) {
        // Four independent generators, since one xorshift alone waits for its own last step.
        let mut lanes = [1, 2, 3, 4].map(|lane: u64| {
            let mixed = self.seed ^ mix(self.page) ^ mix(self.sequence ^ mix(self.time_ns ^ lane));
            // The one state xorshift never leaves is 0.
            mix(mixed) | 1
        });
        for words in page.chunks_exact_mut(32) {
            for (word, lane) in words.chunks_exact_mut(8).zip(&mut lanes) {
                *lane ^= *lane << 13;
                *lane ^= *lane >> 7;
                *lane ^= *lane << 17;
                word.copy_from_slice(&lane.to_le_bytes());
            }
        }
        let header = Header {
            magic: MAGIC.into(),
            page: self.page.into(),
            sequence: self.sequence.into(),
            time_ns: self.time_ns.into(),
            seed: self.seed.into(),
        };
        page[..size_of::<Header>()].copy_from_slice(header.as_bytes());
    }
}

/// The finalizer of splitmix64: neighbouring numbers come out unrelated.
pub(super) fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What a page holds, judged from its bytes alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Nothing but zeros.
    Zeros,
    /// All of one write to this page.
    Write(u64),
    /// The start of this write, and something else behind it.
    Torn(u64),
    /// A write to another page, or of another run.
    Foreign {
        /// The page it says it is.
        page: u64,
        /// The run it says it is of.
        seed: u64,
    },
    /// Something no writer of ours leaves.
    Unknown,
}

impl Content {
    /// What `bytes` are, found as page number `page` of what the run `seed` wrote.
    #[must_use]
    pub fn of(bytes: &[u8], page: u64, seed: u64) -> Self {
        match Stamp::of(bytes) {
            None if bytes.iter().all(|&byte| byte == 0) => Self::Zeros,
            None => Self::Unknown,
            Some(stamp) if (stamp.page, stamp.seed) != (page, seed) => Self::Foreign {
                page: stamp.page,
                seed: stamp.seed,
            },
            Some(stamp) if stamp.is_whole(bytes) => Self::Write(stamp.sequence),
            Some(stamp) => Self::Torn(stamp.sequence),
        }
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zeros => f.write_str("zeros"),
            Self::Write(sequence) => write!(f, "write {sequence}"),
            Self::Torn(sequence) => write!(f, "a part of write {sequence} and something else"),
            Self::Foreign { page, seed } => write!(f, "page {page} of run {seed}"),
            Self::Unknown => f.write_str("what no workload writes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp {
        page: 3,
        sequence: 7,
        time_ns: 1_234_567_890,
        seed: 42,
    };

    fn page(stamp: Stamp) -> PageBytes {
        let mut page = [0; STAMPED_BYTES];
        stamp.write(&mut page);
        page
    }

    #[test]
    fn a_page_says_which_write_it_is() {
        let page = page(STAMP);
        assert_eq!(&page[..8], b"MFstamp1");
        assert_eq!(page[16], 7);
        assert_eq!(Stamp::of(&page), Some(STAMP));
        assert!(STAMP.is_whole(&page));
        assert_eq!(Stamp::of(&[0; STAMPED_BYTES]), None);
        assert_eq!(Stamp::of(&page[..39]), None);
    }

    #[test]
    fn every_write_changes_every_part_of_the_page() {
        let old = page(STAMP);
        for next in [
            Stamp { page: 4, ..STAMP },
            Stamp {
                sequence: 8,
                ..STAMP
            },
            Stamp { seed: 43, ..STAMP },
        ] {
            let new = page(next);
            let same = old[40..]
                .chunks_exact(64)
                .zip(new[40..].chunks_exact(64))
                .filter(|(old, new)| old == new);
            assert_eq!(same.count(), 0, "{next:?}");
        }
    }

    #[test]
    fn a_page_that_mixes_two_writes_is_torn_wherever_it_is_cut() {
        let old = page(STAMP);
        let new = page(Stamp {
            sequence: 8,
            ..STAMP
        });
        for cut in (64..STAMPED_BYTES).step_by(64) {
            for (front, back) in [(&old, &new), (&new, &old)] {
                let torn = [&front[..cut], &back[cut..]].concat();
                let stamp = Stamp::of(&torn).unwrap();
                assert!(!stamp.is_whole(&torn), "cut at {cut}");
            }
        }
    }

    #[test]
    fn what_a_page_holds_is_named() {
        let mut bytes = page(STAMP);
        assert_eq!(Content::of(&bytes, 3, 42), Content::Write(7));
        let foreign = Content::Foreign { page: 3, seed: 42 };
        assert_eq!(Content::of(&bytes, 4, 42), foreign);
        assert_eq!(Content::of(&bytes, 3, 43), foreign);
        bytes[4095] ^= 1;
        assert_eq!(Content::of(&bytes, 3, 42), Content::Torn(7));
        bytes[0] ^= 1;
        assert_eq!(Content::of(&bytes, 3, 42), Content::Unknown);
        assert_eq!(Content::of(&[0; STAMPED_BYTES], 3, 42), Content::Zeros);
    }
}
