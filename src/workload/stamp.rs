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

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes in one stamped page, whatever the page size of the file system.
pub const STAMPED_BYTES: usize = 4096;

const MAGIC: u64 = u64::from_le_bytes(*b"MFstamp1");

/// Pages read at a time.
const CHUNK_BYTES: usize = 256 * STAMPED_BYTES;

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
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The newest stamp among the whole pages of the first `length` bytes of `file`: the last write that
/// is all there. `None` if no page is stamped.
pub fn newest_stamp(file: &File, length: u64) -> io::Result<Option<Stamp>> {
    let mut newest: Option<Stamp> = None;
    each_page(file, length, |number, page| {
        let stamp = Stamp::of(page).filter(|stamp| stamp.page == number);
        let newer = |stamp: &Stamp| {
            newest.is_none_or(|old| (old.sequence, old.time_ns) < (stamp.sequence, stamp.time_ns))
        };
        if let Some(stamp) = stamp.filter(newer).filter(|stamp| stamp.is_whole(page)) {
            newest = Some(stamp);
        }
        true
    })?;
    Ok(newest)
}

/// The first page, counted in 4096 bytes, that does not agree with its own stamp, is stamped as another
/// page, or has no stamp.
pub fn first_torn_page(file: &File, length: u64) -> io::Result<Option<u64>> {
    let mut torn = None;
    each_page(file, length, |number, page| {
        let whole =
            Stamp::of(page).is_some_and(|stamp| stamp.page == number && stamp.is_whole(page));
        if !whole {
            torn = Some(number);
        }
        whole
    })?;
    Ok(torn)
}

/// Calls `look` with the number and the bytes of each whole page until it returns false.
fn each_page(file: &File, length: u64, mut look: impl FnMut(u64, &[u8]) -> bool) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let pages = length / STAMPED_BYTES as u64;
    let mut number = 0;
    while number < pages {
        let left = (pages - number).min((CHUNK_BYTES / STAMPED_BYTES) as u64);
        let bytes = usize::try_from(left).map_err(io::Error::other)? * STAMPED_BYTES;
        file.read_exact_at(&mut chunk[..bytes], number * STAMPED_BYTES as u64)?;
        for page in chunk[..bytes].chunks_exact(STAMPED_BYTES) {
            if !look(number, page) {
                return Ok(());
            }
            number += 1;
        }
    }
    Ok(())
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
    fn the_newest_whole_page_is_found_and_the_first_torn_one() {
        let file = tempfile::tempfile().unwrap();
        let pages = 600_u64; // More than one chunk.
        let put = |number, stamp| {
            file.write_all_at(&page(stamp), number * STAMPED_BYTES as u64)
                .unwrap();
        };
        for number in 0..pages {
            put(
                number,
                Stamp {
                    page: number,
                    sequence: 0,
                    ..STAMP
                },
            );
        }
        let length = pages * STAMPED_BYTES as u64;
        assert_eq!(first_torn_page(&file, length).unwrap(), None);
        let newest = Stamp {
            page: 400,
            sequence: 9,
            ..STAMP
        };
        put(400, newest);
        put(
            500,
            Stamp {
                page: 500,
                sequence: 8,
                ..STAMP
            },
        );
        // Newer by its header, but torn.
        put(
            550,
            Stamp {
                page: 550,
                sequence: 99,
                ..STAMP
            },
        );
        file.write_all_at(b"x", 550 * STAMPED_BYTES as u64 + 4000)
            .unwrap();
        assert_eq!(newest_stamp(&file, length).unwrap(), Some(newest));
        assert_eq!(first_torn_page(&file, length).unwrap(), Some(550));
        // A page that landed in another place is no better.
        put(
            10,
            Stamp {
                page: 11,
                sequence: 100,
                ..STAMP
            },
        );
        assert_eq!(newest_stamp(&file, length).unwrap(), Some(newest));
        assert_eq!(first_torn_page(&file, length).unwrap(), Some(10));
        assert!(newest_stamp(&file, length + 4096).is_err());
    }
}
