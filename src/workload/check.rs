//! Judging memory that a workload wrote: from its pages alone, or by the writer's account.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::account::{Account, Newest};
use super::stamp::{Content, STAMPED_BYTES, Stamp};

/// Pages read at a time.
const CHUNK_BYTES: usize = 256 * STAMPED_BYTES;

/// Differences that are kept one by one; there may be millions.
const DIFFERENCES_MAX: usize = 10;

/// A page that is not what its writer made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Difference {
    /// Its number, in units of 4096 bytes.
    pub page: u64,
    /// What it holds.
    pub holds: Content,
    /// What it should hold.
    pub newest: Newest,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "page {} holds {}, {}",
            self.page, self.holds, self.newest
        )
    }
}

/// What a comparison found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Differences {
    /// Pages that are not what they should be.
    pub count: u64,
    /// The first of them.
    pub first: Vec<Difference>,
}

/// Compares `file` with the account of its writer, which has to stand still. The page that was being
/// written when it stopped is left out.
pub fn verify(file: &File, account: &Account) -> io::Result<Differences> {
    let length = file.metadata()?.len();
    let expected = account.pages.len() as u64 * STAMPED_BYTES as u64;
    if length != expected {
        return Err(io::Error::other(format!(
            "it has {length} bytes, and the account is of {expected}"
        )));
    }
    let mut newest = account.pages.iter();
    let mut found = Differences::default();
    each_page(file, length, |page, bytes| {
        let newest = *newest.next().unwrap_or(&Newest::Nothing);
        let holds = Content::of(bytes, page, account.seed);
        if newest.is(holds) || account.under_way == Some(page) {
            return;
        }
        found.count += 1;
        if found.first.len() < DIFFERENCES_MAX {
            found.first.push(Difference {
                page,
                holds,
                newest,
            });
        }
    })?;
    Ok(found)
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
    })?;
    Ok(newest)
}

/// Calls `look` with the number and the bytes of each whole page.
fn each_page(file: &File, length: u64, mut look: impl FnMut(u64, &[u8])) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let pages = length / STAMPED_BYTES as u64;
    let mut number = 0;
    while number < pages {
        let left = (pages - number).min((CHUNK_BYTES / STAMPED_BYTES) as u64);
        let bytes = usize::try_from(left).map_err(io::Error::other)? * STAMPED_BYTES;
        file.read_exact_at(&mut chunk[..bytes], number * STAMPED_BYTES as u64)?;
        for page in chunk[..bytes].chunks_exact(STAMPED_BYTES) {
            look(number, page);
            number += 1;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = 600; // More than one chunk.
    const BYTES: u64 = PAGES * STAMPED_BYTES as u64;

    fn stamp(page: u64, sequence: u64) -> Stamp {
        Stamp {
            page,
            sequence,
            time_ns: 1,
            seed: 42,
        }
    }

    fn put(file: &File, at: u64, stamp: Stamp) {
        let mut page = [0; STAMPED_BYTES];
        stamp.write(&mut page);
        file.write_all_at(&page, at * STAMPED_BYTES as u64).unwrap();
    }

    fn filled() -> File {
        let file = tempfile::tempfile().unwrap();
        (0..PAGES).for_each(|page| put(&file, page, stamp(page, 0)));
        file
    }

    #[test]
    fn the_newest_whole_page_is_found() {
        let file = filled();
        put(&file, 400, stamp(400, 9));
        put(&file, 500, stamp(500, 8));
        // Newer by its header, but torn; and one that landed in another place.
        put(&file, 550, stamp(550, 99));
        file.write_all_at(b"x", 550 * STAMPED_BYTES as u64 + 4000)
            .unwrap();
        put(&file, 10, stamp(11, 100));
        assert_eq!(newest_stamp(&file, BYTES).unwrap(), Some(stamp(400, 9)));
        assert!(newest_stamp(&file, BYTES + 4096).is_err());
    }

    #[test]
    fn the_write_that_was_lost_is_named() {
        let file = filled();
        put(&file, 299, stamp(299, 17));
        let mut account = Account {
            seed: 42,
            pages: vec![Newest::Stamp(0); 600],
            under_way: None,
        };
        account.pages[299] = Newest::Stamp(17);
        assert_eq!(verify(&file, &account).unwrap(), Differences::default());

        account.pages[299] = Newest::Stamp(19);
        account.pages[300] = Newest::Zeros(18);
        let found = verify(&file, &account).unwrap();
        assert_eq!(found.count, 2);
        let texts: Vec<String> = found.first.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "page 299 holds write 17, the writer's last was 19",
                "page 300 holds write 0, the writer's last was 18, of zeros",
            ]
        );
        account.under_way = Some(299);
        assert_eq!(verify(&file, &account).unwrap().count, 1);
        account.pages.fill(Newest::Nothing);
        let found = verify(&file, &account).unwrap();
        assert_eq!((found.count, found.first.len()), (599, DIFFERENCES_MAX));
        account.pages.pop();
        assert!(verify(&file, &account).is_err());
    }
}
