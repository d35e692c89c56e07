//! `PAGEMAP_SCAN`: which pages of an address space were written since they were last protected.
//!
//! The descriptor is an open `/proc/<pid>/pagemap`; it stands for the address space of whoever it was
//! opened for, in whichever process it is used.
#![allow(unsafe_code)] // nix and libc do not have the ioctl.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use nix::errno::Errno;

use crate::limits::{PAGE_BYTES, PAGE_LEN};
use crate::region::Mapping;

// All numbers and layouts below are those of include/uapi/linux/fs.h (Linux 6.7).

/// Protect what is reported, in the same breath.
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
/// `EPERM` where the memory is not tracked by asynchronous write-protection, instead of silence.
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

const PAGE_IS_WPALLOWED: u64 = 1 << 0;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_HUGE: u64 = 1 << 6;
const PAGE_IS_PRESENT: u64 = 1 << 3;

/// `struct page_region`: a run of pages that have the same categories.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageRegion {
    /// Address of the first byte.
    pub start: u64,
    /// Address one past the last byte.
    pub end: u64,
    /// What the pages are, of what was asked for.
    pub categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    /// Where the kernel stopped.
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// The size of the first published version, which is what we speak.
const PM_SCAN_ARG_BYTES: u64 = 96;
const _: () = assert!(size_of::<PmScanArg>() as u64 == PM_SCAN_ARG_BYTES);
const _: () = assert!(size_of::<PageRegion>() == 24);

/// The ioctl: `_IOWR('f', 16, struct pm_scan_arg)`.
mod ioctls {
    use super::PmScanArg;

    nix::ioctl_readwrite!(pagemap_scan, b'f', 16, PmScanArg);
}

/// Bytes of an address space, in whole pages of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressRange {
    /// Address of the first byte.
    pub start: u64,
    /// How many bytes.
    pub len: u64,
}

impl AddressRange {
    /// One past the last byte; saturates, and the kernel refuses such a range.
    #[must_use]
    pub fn end(self) -> u64 {
        self.start.saturating_add(self.len)
    }
}

/// The page map of this process.
pub fn own() -> io::Result<File> {
    File::open("/proc/self/pagemap")
}

/// Whether every page of `range` is in the page tables of this process, so that reading it neither
/// faults nor allocates anything. Touches nothing. Where it cannot be seen the answer is no.
#[must_use]
pub fn are_present(range: AddressRange) -> bool {
    static OWN: OnceLock<Option<File>> = OnceLock::new();
    let Some(pagemap) = OWN.get_or_init(|| own().ok()) else {
        return false;
    };
    // Neighbours come as one run, and a huge page is one entry: where all is there, one slot does.
    let mut buffer = [PageRegion::default(); 32];
    let (mut reached, end) = (range.start, range.end());
    let seen = scan(
        pagemap.as_fd(),
        range,
        0,
        PAGE_IS_PRESENT,
        &mut buffer,
        |runs| {
            for run in runs {
                if run.start == reached {
                    reached = run.end;
                }
            }
        },
    );
    match seen {
        Ok(()) => reached == end,
        // Before Linux 6.7.
        Err(_) => are_entries_present(pagemap, range),
    }
}

/// Bytes of `mapping` that huge pages map: those of hugetlbfs, or transparent ones. Only what the page tables of
/// this process have is seen. Needs Linux 6.7.
pub fn huge_bytes(mapping: &Mapping) -> io::Result<u64> {
    let Some(base) = mapping.address() else {
        return Ok(0);
    };
    let range = AddressRange {
        start: base.addr().get() as u64,
        len: (mapping.len() as u64).next_multiple_of(PAGE_BYTES),
    };
    let mut buffer = [PageRegion::default(); 32];
    let mut bytes = 0;
    scan(
        own()?.as_fd(),
        range,
        0,
        PAGE_IS_HUGE,
        &mut buffer,
        |runs| bytes += runs.iter().map(|run| run.end - run.start).sum::<u64>(),
    )?;
    Ok(bytes)
}

/// [`are_present`] with an entry for every page of 4 KiB: several times as slow.
fn are_entries_present(pagemap: &File, range: AddressRange) -> bool {
    /// Of the 64 bits about a page; Documentation/admin-guide/mm/pagemap.rst.
    const PRESENT: u64 = 1 << 63;
    const ENTRY_BYTES: u64 = 8;
    let (mut page, end) = (range.start / PAGE_BYTES, range.end().div_ceil(PAGE_BYTES));
    // One call for every 2 MiB: what one page of page table covers.
    let mut entries = [0; PAGE_LEN];
    while page < end {
        let entries = &mut entries[..usize::try_from((end - page) * ENTRY_BYTES)
            .map_or(PAGE_LEN, |all| all.min(PAGE_LEN))];
        if pagemap.read_exact_at(entries, page * ENTRY_BYTES).is_err() {
            return false;
        }
        let (entries, _) = entries.as_chunks::<8>();
        if !entries
            .iter()
            .all(|entry| u64::from_ne_bytes(*entry) & PRESENT != 0)
        {
            return false;
        }
        page += entries.len() as u64;
    }
    true
}

/// Calls `each` with the runs of pages in `range`, a `buffer` full at a time, that were written since they
/// were last protected, and protects them again in the same step. What does not exist yet counts as written
/// until it was protected once. Runs come in ascending order and stay inside `range`.
///
/// `EPERM`: part of the range is not tracked. `ESRCH`: the address space is gone. After an error what was
/// written before is not known: parts of it may have been protected again and not been reported.
///
/// `buffer` is where the kernel puts the runs; its size decides how many calls are needed.
pub fn written_and_protect(
    pagemap: BorrowedFd<'_>,
    range: AddressRange,
    buffer: &mut [PageRegion],
    each: impl FnMut(&[PageRegion]),
) -> io::Result<()> {
    // With exactly these masks the kernel takes a short path over the page table, 2 to 4 times as fast
    // as the general one.
    let flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC;
    scan(pagemap, range, flags, PAGE_IS_WRITTEN, buffer, each)
}

/// Whether every page of `range` is tracked by asynchronous write-protection.
///
/// [`written_and_protect`] finds memory that is mapped and not tracked; addresses where nothing is
/// mapped are left out silently by the kernel, so here it is asked for everything and the gaps are seen.
pub fn covered(pagemap: BorrowedFd<'_>, range: AddressRange) -> io::Result<bool> {
    let mut reached = range.start;
    // Neighbours come as one run unless mappings are cut up, so a few slots do.
    let mut buffer = [PageRegion::default(); 16];
    let seen = scan(
        pagemap,
        range,
        PM_SCAN_CHECK_WPASYNC,
        PAGE_IS_WPALLOWED,
        &mut buffer,
        |runs| {
            for run in runs {
                if run.start <= reached {
                    reached = reached.max(run.end);
                }
            }
        },
    );
    match seen {
        Ok(()) => Ok(reached >= range.end()),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(false),
        Err(error) => Err(error),
    }
}

/// All runs in `range` of pages that have `category`, a buffer-full at a time.
fn scan(
    pagemap: BorrowedFd<'_>,
    range: AddressRange,
    flags: u64,
    category: u64,
    buffer: &mut [PageRegion],
    mut each: impl FnMut(&[PageRegion]),
) -> io::Result<()> {
    let (mut from, end) = (range.start, range.end());
    while from < end {
        let mut arg = PmScanArg {
            size: PM_SCAN_ARG_BYTES,
            flags,
            start: from,
            end,
            walk_end: 0,
            vec: buffer.as_mut_ptr().expose_provenance() as u64,
            vec_len: buffer.len() as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: category,
            category_anyof_mask: 0,
            return_mask: category,
        };
        // SAFETY: the kernel reads and writes one `pm_scan_arg`, and `arg` is one (its size is asserted
        // above, and stated in it). It writes at most `vec_len` regions at `vec`, which is `buffer`,
        // borrowed exclusively and alive until after the call, its provenance exposed. `start` and `end`
        // are addresses in the other address space, whose content is not touched.
        let found = unsafe { ioctls::pagemap_scan(pagemap.as_raw_fd(), &raw mut arg) }?;
        let found = usize::try_from(found).map_err(|_| Errno::EOVERFLOW)?;
        let runs = buffer.get_mut(..found).ok_or(Errno::EOVERFLOW)?;
        for run in &mut *runs {
            (run.start, run.end) = (run.start.max(range.start), run.end.min(end));
        }
        each(runs);
        if arg.walk_end <= from {
            // The end of the range lies inside a huge page that cannot be protected in part.
            return Err(Errno::EINVAL.into());
        }
        from = arg.walk_end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Arc;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::mman::{ProtFlags, mprotect, munmap};

    use super::*;
    use crate::limits::PAGE_LEN;
    use crate::region::{Access, Mapping};
    use crate::sys::uffd::Uffd;

    const PAGES: usize = 64;

    fn tracked() -> (Arc<Mapping>, Uffd, AddressRange) {
        let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len((PAGES * PAGE_LEN) as u64).unwrap();
        let mapping = Mapping::new(&file, PAGES * PAGE_LEN, Access::Write).unwrap();
        let uffd = Uffd::new().unwrap();
        uffd.track(&mapping).unwrap();
        let range = AddressRange {
            start: mapping.address().unwrap().addr().get() as u64,
            len: mapping.len() as u64,
        };
        (mapping, uffd, range)
    }

    #[test]
    fn both_ways_to_ask_agree_about_what_is_present() {
        let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len((PAGES * PAGE_LEN) as u64).unwrap();
        let mapping = Mapping::new(&file, PAGES * PAGE_LEN - 1, Access::Write).unwrap();
        for (first, count) in [(3, 2), (7, 1), (60, 4)] {
            let len = (count * PAGE_LEN).min(mapping.len() - first * PAGE_LEN);
            let span = mapping.span(first * PAGE_LEN, len).unwrap();
            crate::sys::file::populate(&span, Access::Write).unwrap();
        }
        let present = |page| matches!(page, 3 | 4 | 7 | 60..64);
        for first in 0..PAGES {
            for end in first + 1..=PAGES {
                let len = ((end - first) * PAGE_LEN).min(mapping.len() - first * PAGE_LEN);
                let range = AddressRange {
                    start: mapping.span(first * PAGE_LEN, len).unwrap().base().addr() as u64,
                    len: len as u64,
                };
                let all = (first..end).all(present);
                assert_eq!(are_present(range), all, "{first} to {end}");
                assert_eq!(are_entries_present(&own().unwrap(), range), all);
            }
        }
    }

    #[test]
    fn a_mapping_cut_in_pieces_is_covered_and_one_with_a_gap_is_not() {
        let (mapping, _uffd, range) = tracked();
        let pagemap = own().unwrap();
        let page = |index| {
            let base = mapping.address().unwrap().cast::<u8>();
            // SAFETY: `index < PAGES`, the pages that the mapping has.
            unsafe { base.add(index * PAGE_LEN) }.cast()
        };
        for index in (1..PAGES - 1).step_by(2) {
            // SAFETY: the page is the mapping's, and nobody reads or writes it.
            unsafe { mprotect(page(index), PAGE_LEN, ProtFlags::PROT_READ) }.unwrap();
        }
        assert!(covered(pagemap.as_fd(), range).unwrap());
        // SAFETY: the page is the mapping's, and nobody reads or writes it. Whatever another thread
        // maps there is left alone, because the mapping is never dropped.
        unsafe { munmap(page(PAGES / 2), PAGE_LEN) }.unwrap();
        std::mem::forget(Arc::clone(&mapping));
        assert!(!covered(pagemap.as_fd(), range).unwrap());
        // Up to the gap, and from behind it.
        let half = AddressRange {
            len: range.len / 2,
            ..range
        };
        assert!(covered(pagemap.as_fd(), half).unwrap());
        let rest = AddressRange {
            start: half.end() + PAGE_LEN as u64,
            len: range.len / 2 - PAGE_LEN as u64,
        };
        assert!(covered(pagemap.as_fd(), rest).unwrap());
    }

    #[test]
    fn runs_are_reported_once_whatever_the_size_of_the_buffer() {
        for slots in 1..5 {
            let (mapping, _uffd, range) = tracked();
            let pagemap = own().unwrap();
            let mut buffer = vec![PageRegion::default(); slots];
            let mut scan = || {
                let mut pages = Vec::new();
                written_and_protect(pagemap.as_fd(), range, &mut buffer, |runs| {
                    let page = |address| (address - range.start) / PAGE_LEN as u64;
                    for run in runs {
                        pages.extend(page(run.start)..page(run.end));
                    }
                })
                .unwrap();
                pages
            };
            assert_eq!(
                scan().len(),
                PAGES,
                "what is not there yet counts as written"
            );
            for page in [3, 4, 9, 11, 40, 63] {
                let mut span = mapping.span_mut(page * PAGE_LEN, 1).unwrap();
                span.fill_from(&[1]);
            }
            assert_eq!(scan(), [3, 4, 9, 11, 40, 63]);
            assert!(scan().is_empty());
        }
    }
}
