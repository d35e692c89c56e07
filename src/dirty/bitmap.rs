//! Exact tracking by the writer: it marks pages in a bitmap that we share.
//!
//! One bit per page of 4 KiB, lowest bit first, in words of 8 bytes in the machine's byte order. What a
//! writer has to keep:
//!
//! - It marks *after* writing, with an atomic OR that has release ordering, and does so always: looking
//!   first whether the bit is set already would need a full fence between the write and the look.
//! - All marks are made before it says that it is frozen.
//!
//! Harvesting takes the marks away, so it is a debt like any other (rule 3). [`BitmapTracker::restore`]
//! puts them back where an attempt has failed, for whoever reads the bitmap next.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};

use super::TrackerError;
use crate::limits::PAGE_BYTES;
use crate::pages::PageSet;
use crate::region::{Access, Mapping};

const WORD_BYTES: u64 = size_of::<u64>() as u64;

/// Tells which pages the writer has marked.
#[derive(Debug)]
pub struct BitmapTracker {
    mapping: Arc<Mapping>,
    /// What was taken out of the bitmap since `begin`.
    taken: PageSet,
}

impl BitmapTracker {
    /// A tracker over the bitmap in the memfd `fd`, for a Region of `pages` pages.
    ///
    /// The bitmap has whole words: at least `pages / 8` bytes rounded up to 8. It may be longer, up to
    /// the next multiple of 4096, for writers that allocate whole pages; more would be a bitmap of
    /// something else. It must be sealed against shrinking: a bitmap that is cut while it is read would
    /// be the end of the daemon.
    pub fn new(fd: OwnedFd, pages: u64) -> Result<Self, TrackerError> {
        let file = File::from(fd);
        // Files that have no seals answer with an error, or with other seals.
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS).unwrap_or(0);
        if !SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK) {
            return Err(TrackerError::BitmapSeal { seals });
        }
        // The length cannot become less from here on.
        let meta = file.metadata();
        let found = meta
            .map_err(TrackerError::failed("look at the dirty bitmap"))?
            .len();
        let least = pages.div_ceil(8).next_multiple_of(WORD_BYTES);
        let most = least.next_multiple_of(PAGE_BYTES);
        if found < least || found > most {
            return Err(TrackerError::BitmapSize {
                found,
                pages,
                least,
                most,
            });
        }
        let len = usize::try_from(least).map_err(|_| TrackerError::BitmapSize {
            found,
            pages,
            least,
            most,
        })?;
        let mapping = Mapping::new(&file, len, Access::Write)
            .map_err(TrackerError::failed("map the dirty bitmap"))?;
        Ok(Self {
            mapping,
            taken: PageSet::empty(pages),
        })
    }

    /// Begins an attempt: what was harvested so far needs no restoring any more.
    pub fn begin(&mut self) {
        self.taken = PageSet::empty(self.taken.pages());
    }

    /// Takes all marks out of the bitmap and adds them to `owed`. Returns how many pages were marked,
    /// whether they were owed already or not. Bits behind the last page mean nothing.
    pub fn harvest(&mut self, owed: &mut PageSet) -> u64 {
        let mut pages = 0;
        for (index, word) in self.mapping.words().iter().enumerate() {
            // Most words are empty; reading alone leaves the cache line where it is. A mark that this
            // read misses is there the next time, and one that the writer made before it was seen to
            // be frozen cannot be missed.
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            // Acquire pairs with the writer's release: whoever reads a page after this finds what was
            // written before its mark. Nothing of ours is published by it.
            let bits = word.swap(0, Ordering::Acquire);
            self.taken.insert_word(index, bits);
            pages += owed.insert_word(index, bits);
        }
        pages
    }

    /// Puts back every mark that was harvested since [`Self::begin`] (or since it was made): the
    /// attempt has failed, and the pages are as dirty as they were.
    pub fn restore(&mut self) {
        for (word, &bits) in self.mapping.words().iter().zip(self.taken.words()) {
            if bits != 0 {
                // Release: what our harvest acquired is passed on to whoever acquires these marks.
                word.fetch_or(bits, Ordering::Release);
            }
        }
        self.begin();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::pages::PageRange;

    fn memfd(bytes: u64, seals: SealFlag) -> File {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"test", flags).unwrap());
        file.set_len(bytes).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        file
    }

    /// The writer's side, as another program would do it.
    struct Marks(Arc<Mapping>);

    impl Marks {
        fn set(&self, page: u64) {
            let word = &self.0.words()[usize::try_from(page / 64).unwrap()];
            word.fetch_or(1 << (page % 64), Ordering::Release);
        }
    }

    fn shared(pages: u64) -> (Marks, BitmapTracker) {
        let bytes = pages.div_ceil(64) * 8;
        let file = memfd(bytes, SealFlag::F_SEAL_SHRINK);
        let mapping = Mapping::new(&file, usize::try_from(bytes).unwrap(), Access::Write).unwrap();
        let tracker = BitmapTracker::new(file.into(), pages).unwrap();
        (Marks(mapping), tracker)
    }

    fn harvest(tracker: &mut BitmapTracker) -> Vec<u64> {
        let mut owed = PageSet::empty(tracker.taken.pages());
        assert_eq!(tracker.harvest(&mut owed), owed.count());
        owed.runs().flat_map(|run| run.first..run.end()).collect()
    }

    #[test]
    fn marks_are_taken_once() {
        let (marks, mut tracker) = shared(200);
        assert!(harvest(&mut tracker).is_empty());
        [0, 63, 64, 199]
            .into_iter()
            .for_each(|page| marks.set(page));
        assert_eq!(harvest(&mut tracker), [0, 63, 64, 199]);
        assert!(harvest(&mut tracker).is_empty());
        marks.set(64);
        assert_eq!(harvest(&mut tracker), [64]);
    }

    #[test]
    fn bits_behind_the_last_page_mean_nothing() {
        let (marks, mut tracker) = shared(70);
        [69, 70, 127].into_iter().for_each(|page| marks.set(page));
        assert_eq!(harvest(&mut tracker), [69]);
    }

    #[test]
    fn what_was_owed_stays_owed() {
        let (marks, mut tracker) = shared(100);
        let mut owed = PageSet::empty(100);
        owed.insert(PageRange { first: 5, count: 2 });
        marks.set(6);
        marks.set(8);
        assert_eq!(tracker.harvest(&mut owed), 2);
        assert_eq!(owed.count(), 3);
    }

    #[test]
    fn a_failed_attempt_puts_back_what_it_took() {
        let (marks, mut tracker) = shared(200);
        marks.set(1);
        harvest(&mut tracker);
        tracker.begin();
        marks.set(2);
        harvest(&mut tracker);
        marks.set(150);
        harvest(&mut tracker);
        marks.set(3);
        tracker.restore();
        assert_eq!(harvest(&mut tracker), [2, 3, 150]);
        tracker.restore();
        assert_eq!(harvest(&mut tracker), [2, 3, 150]);
    }

    #[test]
    fn no_mark_of_a_writer_that_goes_on_is_lost() {
        const PAGES: u64 = 1000;
        const ROUNDS: u64 = 200;
        let (marks, mut tracker) = shared(PAGES);
        let writer = thread::spawn(move || {
            for round in 0..ROUNDS {
                (0..PAGES)
                    .filter(|page| page % 7 == round % 7)
                    .for_each(|page| marks.set(page));
            }
        });
        let mut seen = PageSet::empty(PAGES);
        while !writer.is_finished() {
            tracker.harvest(&mut seen);
        }
        writer.join().unwrap();
        tracker.harvest(&mut seen);
        assert_eq!(seen, PageSet::full(PAGES));
        assert!(harvest(&mut tracker).is_empty());
    }

    #[test]
    fn a_bitmap_that_can_shrink_is_refused_with_the_way_out() {
        let loose = memfd(8, SealFlag::F_SEAL_GROW);
        let plain = tempfile::tempfile().unwrap();
        for file in [loose, plain] {
            let error = BitmapTracker::new(file.into(), 64).unwrap_err();
            assert_eq!(error.code(), "bitmap-seal");
            assert!(error.to_string().contains("F_SEAL_SHRINK"), "{error}");
        }
    }

    #[test]
    fn the_length_is_that_of_whole_words_or_of_whole_memory_pages() {
        let new =
            |bytes, pages| BitmapTracker::new(memfd(bytes, SealFlag::F_SEAL_SHRINK).into(), pages);
        for (bytes, pages) in [(8, 1), (8, 64), (16, 65), (4096, 65), (4096, 32768)] {
            assert!(new(bytes, pages).is_ok(), "{bytes} bytes for {pages} pages");
        }
        for (bytes, pages) in [(0, 1), (8, 65), (4097, 65), (8192, 32768), (4096, 32769)] {
            let error = new(bytes, pages).unwrap_err();
            assert_eq!(error.code(), "bitmap-size");
            let text = error.to_string();
            assert!(text.contains(&format!("has {bytes} bytes")), "{text}");
            assert!(text.contains(&format!("{pages} pages")), "{text}");
        }
    }

    #[test]
    fn a_bitmap_that_cannot_be_written_is_refused() {
        let file = memfd(8, SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_WRITE);
        let error = BitmapTracker::new(file.into(), 64).unwrap_err();
        assert!(
            error.to_string().contains("map the dirty bitmap"),
            "{error}"
        );
    }
}
