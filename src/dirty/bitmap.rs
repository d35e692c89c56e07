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
