//! Exact tracking by the kernel: the writer's own page table says what was written through it.
//!
//! The writer registers its mapping for asynchronous write-protection (`userfaultfd`) and passes its
//! page map, the userfaultfd, and the address. From then on a page is protected, is written once at
//! the price of a short fault, and shows up in the next harvest, which protects it again.
//!
//! It sees what is written through that mapping, by the writer or by the kernel for it (`read` into
//! the memory). It is blind to everything else, and nothing tells: `pwrite` to the file, a second
//! mapping (also that of a forked child), a hole that is punched, and devices writing to buffers that
//! were pinned before. Those are for the writer to declare. What it can find out is that the mapping
//! itself is no longer watched, and that is an error, never "nothing was written".

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::statfs::{HUGETLBFS_MAGIC, PROC_SUPER_MAGIC, TMPFS_MAGIC, fstatfs};

use super::look::Looker;
use super::{TrackerError, maps};
use crate::limits::{HUGE_PAGE_BYTES, PAGE_BYTES};
use crate::pages::PageSet;
use crate::sys::pagemap::{self, AddressRange};

/// What the kernel calls a userfaultfd.
const USERFAULTFD: &str = "anon_inode:[userfaultfd]";

/// What is known about the memory behind a writer's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// It is the Region's.
    Confirmed,
    /// The writer's mappings are not for us to see.
    NotVisible,
}

/// Tells which pages were written through one mapping of one process.
#[derive(Debug)]
pub struct PagemapTracker {
    looker: Looker,
    /// The writer's mappings, if they are for us to see.
    maps: Option<File>,
    /// Tracking ends with the last copy of it, so that the writer need not keep its own.
    _uffd: OwnedFd,
    bytes: u64,
    /// Bytes of a page: no piece of a look ends within one.
    page_bytes: u64,
}

impl PagemapTracker {
    /// A tracker of the `bytes` bytes that the owner of `pagemap` has mapped at `address`, which has
    /// registered them with `uffd`. Checks now what can be checked now: that the descriptors are what
    /// they have to be and that the whole range is tracked. Nothing is protected before [`Self::arm`].
    ///
    /// *Not* checked, because neither descriptor tells: that what is mapped there is this Region's
    /// memory ([`Self::check_memory`] can tell of most writers), and that `uffd` is the userfaultfd that
    /// tracks it. (A wrong one is noticed as soon as the writer closes the right one.)
    pub fn new(
        pagemap: OwnedFd,
        uffd: OwnedFd,
        address: u64,
        bytes: u64,
    ) -> Result<Self, TrackerError> {
        let whole = bytes.checked_next_multiple_of(PAGE_BYTES);
        let fits = whole.is_some_and(|len| address.checked_add(len).is_some());
        let (Some(len), true, true) = (whole, fits, address.is_multiple_of(PAGE_BYTES)) else {
            return Err(TrackerError::Address {
                address,
                bytes,
                page_bytes: PAGE_BYTES,
            });
        };
        check_pagemap(pagemap.as_fd())?;
        check_userfaultfd(uffd.as_fd())?;
        let tracker = Self {
            maps: maps::of_pagemap(pagemap.as_fd()),
            looker: Looker::new(
                pagemap,
                AddressRange {
                    start: address,
                    len,
                },
            ),
            _uffd: uffd,
            bytes,
            page_bytes: HUGE_PAGE_BYTES,
        };
        tracker.check_coverage()?;
        Ok(tracker)
    }

    /// The same tracker for memory on pages of `page_bytes`.
    #[must_use]
    pub fn on_pages_of(mut self, page_bytes: u64) -> Self {
        self.page_bytes = self.page_bytes.max(page_bytes);
        self
    }

    /// That what the writer has mapped there is `file`, shared and from its first byte. With a wrong
    /// address the writes to the Region would be missed, and nothing would tell.
    ///
    /// The list of a process's mappings is shown to its own user and to root, through a /proc that has
    /// the process; where we cannot see it, the writer's word has to do. So it has for files elsewhere
    /// than on tmpfs or hugetlbfs, whose numbers in the list may be others than those of the file.
    pub fn check_memory(&self, file: BorrowedFd<'_>) -> Result<Memory, TrackerError> {
        let failed = TrackerError::failed::<io::Error>;
        let fs = fstatfs(file)
            .map_err(io::Error::from)
            .map_err(failed("look at the region's file system"))?;
        let comparable = [TMPFS_MAGIC, HUGETLBFS_MAGIC].contains(&fs.filesystem_type());
        let (true, Some(list)) = (comparable, &self.maps) else {
            return Ok(Memory::NotVisible);
        };
        let id = maps::FileId::of(file).map_err(failed("look at the region's memory"))?;
        let (start, end) = (self.looker.range().start, self.looker.range().end());
        if maps::is_all(list, start, end, id) {
            return Ok(Memory::Confirmed);
        }
        let Some(maps) = maps::read(list) else {
            return Ok(Memory::NotVisible);
        };
        let other = maps::first_other(maps, start, end, id);
        match other.map_err(failed("read the writer's mappings"))? {
            None => Ok(Memory::Confirmed),
            Some((_, nothing)) if nothing.is_empty() => Err(self.blind()),
            Some((at, found)) => Err(TrackerError::OtherMemory {
                address: start,
                at,
                found,
            }),
        }
    }

    /// Begins: protects everything. What was written before is not reported, since everything is owed
    /// at this point. To be called before the first page is read.
    ///
    /// Holes are protected too, which costs the writer page tables for all of the Region, 1/512 of it, and
    /// every later look its time (measured: 16 GiB of holes 27 ms, and 82 ms for the coverage).
    pub fn arm(&mut self) -> Result<(), TrackerError> {
        self.take(&mut PageSet::empty(self.looker.range().len / PAGE_BYTES))?;
        self.check_coverage()
    }

    /// Adds to `owed` what was written since the last time, and protects it again. Returns how many
    /// pages that were, in units of [`PAGE_BYTES`] and whether they were owed already or not.
    ///
    /// The granularity is the writer's: one write to a huge page is all of its pages. After an error
    /// everything has to be owed.
    pub fn harvest(&mut self, owed: &mut PageSet) -> Result<u64, TrackerError> {
        let pages = self.take(owed)?;
        // Behind the scan, so that it also covers what was unmapped while it ran.
        self.check_coverage()?;
        Ok(pages)
    }

    /// [`Self::harvest`] without its look for memory that is not mapped any more, which takes several
    /// times as long as the rest. For a writer that is frozen, whose pages can be sent meanwhile: what
    /// was found is not all there is before [`Self::check_coverage`] has said so too.
    pub fn take(&mut self, owed: &mut PageSet) -> Result<u64, TrackerError> {
        let looked = self.looker.written_and_protect(self.page_bytes, owed);
        looked.map_err(|error| self.explain(error))
    }

    /// That the whole range is still tracked.
    pub fn check_coverage(&self) -> Result<(), TrackerError> {
        match pagemap::covered(self.looker.pagemap(), self.looker.range()) {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.blind()),
            Err(error) => Err(self.explain(error)),
        }
    }

    fn blind(&self) -> TrackerError {
        TrackerError::Blind {
            address: self.looker.range().start,
            bytes: self.bytes,
        }
    }

    fn explain(&self, error: io::Error) -> TrackerError {
        match error.raw_os_error() {
            Some(libc::EPERM) => self.blind(),
            Some(libc::ESRCH) => TrackerError::WriterGone {
                address: self.looker.range().start,
            },
            _ => TrackerError::failed("ask which pages were written")(error),
        }
    }
}

/// That it is a file of /proc, before an ioctl is tried that may mean anything elsewhere; and then that
/// it understands this one.
fn check_pagemap(fd: BorrowedFd<'_>) -> Result<(), TrackerError> {
    let what = link(fd)?;
    let fs = fstatfs(fd).map_err(TrackerError::failed("look at the page map"))?;
    if fs.filesystem_type() != PROC_SUPER_MAGIC || !what.ends_with("/pagemap") {
        return Err(TrackerError::Descriptor {
            expected: "a page map (/proc/self/pagemap)",
            found: what,
        });
    }
    let nothing = AddressRange {
        start: PAGE_BYTES,
        len: PAGE_BYTES,
    };
    match pagemap::covered(fd, nothing) {
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => Err(TrackerError::Unsupported),
        // Whether the writer lives and tracks is asked next, about its own range.
        _ => Ok(()),
    }
}

fn check_userfaultfd(fd: BorrowedFd<'_>) -> Result<(), TrackerError> {
    let what = link(fd)?;
    if what == USERFAULTFD {
        return Ok(());
    }
    Err(TrackerError::Descriptor {
        expected: "a userfaultfd",
        found: what,
    })
}

/// What the kernel says a descriptor is.
fn link(fd: BorrowedFd<'_>) -> Result<String, TrackerError> {
    let path = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let path = path.map_err(TrackerError::failed("look at a descriptor"))?;
    Ok(path.display().to_string())
}

#[cfg(test)]
#[path = "pagemap_process_tests.rs"]
mod process_tests;
#[cfg(test)]
#[path = "pagemap_tests.rs"]
mod tests;
