//! Calls on files that nix has no safe form for.
#![allow(unsafe_code)] // `madvise` takes an address.

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::mman::{MmapAdvise, madvise};
use nix::unistd::{Whence, lseek64};

use crate::region::{Access, Mapping, Span};

/// The next byte at or after `offset` that is (`data`) or is not allocated. `None`: there is none
/// before the end. Moves the descriptor's file position, which nothing of ours uses.
pub fn seek(file: impl AsFd, offset: u64, data: bool) -> io::Result<Option<u64>> {
    let whence = if data {
        Whence::SeekData
    } else {
        Whence::SeekHole
    };
    let start = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
    match lseek64(file, start, whence) {
        Ok(found) => Ok(Some(found.cast_unsigned())),
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Asks for huge pages before anything is allocated. Best effort: a kernel without them, or a mount
/// without `huge=advise`, says no or ignores it, and small pages do as well.
pub fn advise_huge_pages(mapping: &Mapping) {
    if let Some(base) = mapping.address() {
        // SAFETY: the range is exactly the mapping's own, alive while it is borrowed, and the advice
        // changes no content.
        let _ = unsafe { madvise(base, mapping.len(), MmapAdvise::MADV_HUGEPAGE) };
    }
}

/// Fills the page tables for `span` in one call instead of a fault per page, and allocates what is a
/// hole of it. An error where that is not possible, as on a full file system, where a plain access would be
/// a SIGBUS; and before Linux 5.14.
pub fn populate(span: &Span<'_>, access: Access) -> io::Result<()> {
    let advice = match access {
        // Memory to be pinned is there already, and is entered writable by a read, too: by sixteen pages at a
        // time, where a write enters one.
        Access::Read | Access::Pin => MmapAdvise::MADV_POPULATE_READ,
        Access::Write => MmapAdvise::MADV_POPULATE_WRITE,
    };
    let Some(base) = NonNull::new(span.base().cast_mut().cast()).filter(|_| !span.is_empty())
    else {
        return Ok(());
    };
    // SAFETY: whoever made the span established that its addresses stay mapped while it is borrowed, and
    // populating is an access to every page that changes no content.
    unsafe { madvise(base, span.len(), advice) }?;
    Ok(())
}
