//! For a writer that knows itself what it writes: a bitmap that it shares with the sender.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::limits::PAGE_BYTES;
use crate::region::{Access, Mapping};

const BITS: u64 = u64::BITS as u64;

/// One bit per page of 4096 bytes; the sender takes them out.
///
/// Any thread may mark. A page is marked *after* it was written, and every mark is made before the writer
/// says that it stands still; so this goes with freeze `client` or `command`, and not with a signal,
/// which may come between a write and its mark.
#[derive(Debug)]
pub struct Marks {
    mapping: Arc<Mapping>,
    file: File,
}

impl Marks {
    /// No page of a memory of `bytes` bytes is marked.
    pub fn new(bytes: u64) -> io::Result<Self> {
        let words = bytes.div_ceil(PAGE_BYTES).div_ceil(BITS);
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create("memferry-marks", flags)?);
        file.set_len(words * 8)?;
        // The sender asks for it: who reads memory that is cut gets a SIGBUS.
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK))?;
        let length = usize::try_from(words * 8).map_err(io::Error::other)?;
        let mapping = Mapping::new(&file, length, Access::Write)?;
        Ok(Self { mapping, file })
    }

    /// `page` was written. A page behind the end of the memory is nothing to the sender.
    pub fn mark(&self, page: u64) {
        let word = usize::try_from(page / BITS).unwrap_or(usize::MAX);
        if let Some(word) = self.mapping.words().get(word) {
            // Release: who takes the mark finds what was written before it.
            word.fetch_or(1 << (page % BITS), Ordering::Release);
        }
    }
}

impl AsFd for Marks {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dirty::BitmapTracker;
    use crate::pages::PageSet;

    #[test]
    fn a_tracker_takes_what_was_marked() {
        let marks = Marks::new(130 * PAGE_BYTES - 1).unwrap();
        let copy = marks.as_fd().try_clone_to_owned().unwrap();
        let mut tracker = BitmapTracker::new(copy, 130).unwrap();
        [0, 64, 129, 10_000]
            .into_iter()
            .for_each(|page| marks.mark(page));
        let mut owed = PageSet::empty(130);
        assert_eq!(tracker.harvest(&mut owed), 3);
        assert!([0, 64, 129].into_iter().all(|page| owed.contains(page)));
        assert_eq!(tracker.harvest(&mut owed), 0);
    }
}
