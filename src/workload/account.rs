//! The writer's own account: the newest write of every page, in a file beside the memory.
//!
//! It is a shared mapping, so what it says survives the writer, however that ends. All numbers are
//! little-endian:
//!
//! | offset | | |
//! | --- | --- | --- |
//! | 0 | u64 | magic, `MFaccnt1` |
//! | 8 | u64 | seed of the run |
//! | 16 | u64 | pages |
//! | 24 | u64 | the page that is being written, plus 1; 0 if none is |
//! | 32 | pages × u64 | the newest write of each page, see [`Newest`] |
//!
//! A writer that is stopped in the middle of a write leaves a page that no write explains; that is what
//! the fourth word is for.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::stamp::Content;
use crate::region::{Access, Mapping};

const MAGIC: u64 = u64::from_le_bytes(*b"MFaccnt1");
const UNDER_WAY: usize = 3;
const HEADER_WORDS: usize = 4;

/// What was written to a page last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Newest {
    /// Nothing: it is as it was made.
    Nothing,
    /// A stamp, as write number so and so.
    Stamp(u64),
    /// Zeros, as write number so and so.
    Zeros(u64),
}

impl Newest {
    /// The two lowest bits say what it was, the others its number.
    fn to_word(self) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Stamp(sequence) => sequence << 2 | 1,
            Self::Zeros(sequence) => sequence << 2 | 2,
        }
    }

    fn of_word(word: u64) -> Option<Self> {
        match (word & 3, word >> 2) {
            (0, 0) => Some(Self::Nothing),
            (1, sequence) => Some(Self::Stamp(sequence)),
            (2, sequence) => Some(Self::Zeros(sequence)),
            _ => None,
        }
    }

    /// Whether a page with this content holds it.
    #[must_use]
    pub fn is(self, content: Content) -> bool {
        match self {
            Self::Nothing | Self::Zeros(_) => content == Content::Zeros,
            Self::Stamp(sequence) => content == Content::Write(sequence),
        }
    }
}

impl fmt::Display for Newest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("the writer never wrote it"),
            Self::Stamp(sequence) => write!(f, "the writer's last was {sequence}"),
            Self::Zeros(sequence) => write!(f, "the writer's last was {sequence}, of zeros"),
        }
    }
}

/// The account while the writer keeps it.
#[derive(Debug)]
pub(super) struct Keeper(Arc<Mapping>);

impl Keeper {
    /// A new account of `pages` pages, none of which was written. A file that exists is replaced.
    pub(super) fn create(path: &Path, pages: u64, seed: u64) -> io::Result<Self> {
        let words = usize::try_from(pages)
            .ok()
            .and_then(|pages| pages.checked_add(HEADER_WORDS)?.checked_mul(8))
            .ok_or_else(|| io::Error::other("too many pages"))?;
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        // Its own memory, now: a full file system is an error here and a SIGBUS later.
        let bytes = libc::off_t::try_from(words).map_err(io::Error::other)?;
        nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, bytes)?;
        let keeper = Self(Mapping::new(&file, words, Access::Write)?);
        for (index, value) in [MAGIC, seed, pages, 0].into_iter().enumerate() {
            keeper.set(index, value);
        }
        Ok(keeper)
    }

    /// `page` is about to be written.
    pub(super) fn begin(&self, page: u64) {
        // Not a plain store: the write behind it must not come before it.
        self.0.words()[UNDER_WAY].swap((page + 1).to_le(), Ordering::AcqRel);
    }

    /// `page`, which was begun, holds `newest`.
    pub(super) fn finish(&self, page: u64, newest: Newest) {
        if let Ok(index) = usize::try_from(page) {
            self.set(HEADER_WORDS + index, newest.to_word());
        }
        self.set(UNDER_WAY, 0);
    }

    fn set(&self, index: usize, value: u64) {
        // Release: whatever was written before this word is there when it is.
        self.0.words()[index].store(value.to_le(), Ordering::Release);
    }
}

/// What an account says. That of a writer which goes on is out of date at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Seed of the run.
    pub seed: u64,
    /// The newest write of every page.
    pub pages: Vec<Newest>,
    /// The page whose write was not finished, if there is one: it may hold anything.
    pub under_way: Option<u64>,
}

impl Account {
    /// Reads one.
    pub fn read(path: &Path) -> io::Result<Self> {
        let not_one = || io::Error::other(format!("{} is no workload's account", path.display()));
        Self::of_bytes(&std::fs::read(path)?).ok_or_else(not_one)
    }

    fn of_bytes(bytes: &[u8]) -> Option<Self> {
        let (words, rest) = bytes.as_chunks();
        let mut words = words.iter().map(|word| u64::from_le_bytes(*word));
        if !rest.is_empty() || words.next()? != MAGIC {
            return None;
        }
        let (seed, pages, under_way) = (words.next()?, words.next()?, words.next()?);
        if words.len() as u64 != pages || under_way > pages {
            return None;
        }
        Some(Self {
            seed,
            pages: words.map(Newest::of_word).collect::<Option<_>>()?,
            under_way: under_way.checked_sub(1),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("account");
        let keeper = Keeper::create(&path, 3, 9).unwrap();
        keeper.begin(0);
        keeper.finish(0, Newest::Stamp(0));
        keeper.begin(1);
        keeper.finish(1, Newest::Zeros(5));
        let account = Account::read(&path).unwrap();
        let pages = vec![Newest::Stamp(0), Newest::Zeros(5), Newest::Nothing];
        assert_eq!((account.seed, account.pages), (9, pages));
        assert_eq!(account.under_way, None);
        keeper.begin(2);
        drop(keeper);
        assert_eq!(Account::read(&path).unwrap().under_way, Some(2));
    }

    #[test]
    fn what_is_no_account_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("account");
        Keeper::create(&path, 2, 9).unwrap();
        let good = std::fs::read(&path).unwrap();
        assert!(Account::of_bytes(&good).is_some());
        for length in 0..good.len() {
            assert_eq!(Account::of_bytes(&good[..length]), None);
        }
        for (at, value) in [(0, 0), (16, 3), (24, 3), (32, 3)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert_eq!(Account::of_bytes(&bad), None, "byte {at}");
        }
        assert!(Account::read(&path.with_extension("none")).is_err());
    }
}
