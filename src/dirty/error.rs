//! What is wrong with a tracker.

use std::io;

use crate::region::RegionError;

/// Why a tracker cannot say what was written. Whatever it was asked before, after an error everything
/// may have been written: its pages have to be owed again.
#[derive(Debug, thiserror::Error)]
pub enum TrackerError {
    /// Part of the memory is no longer tracked, or never was.
    #[error(
        "the writer's memory at {address:#x}, {bytes} bytes, is not tracked any more or not all of it: it was unmapped or mapped anew, or the userfaultfd is not the one that tracks it; what was written is not known"
    )]
    Blind {
        /// Where the Region begins in the writer.
        address: u64,
        /// The Region's length.
        bytes: u64,
    },
    /// The process whose memory it is has ended.
    #[error(
        "the process that had the region mapped at {address:#x} has ended, and with it the record of what it wrote"
    )]
    WriterGone {
        /// Where the Region was in the writer.
        address: u64,
    },
    /// A descriptor is something else than it has to be.
    #[error("the descriptor passed as {expected} is {found}")]
    Descriptor {
        /// What it has to be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// The kernel has no such call.
    #[error(
        "this kernel cannot say which pages were written: tracker pagemap needs Linux 6.7 or later (PAGEMAP_SCAN)"
    )]
    Unsupported,
    /// An address that cannot be that of a Region.
    #[error(
        "a region of {bytes} bytes cannot begin at address {address:#x}: addresses are multiples of {page_bytes}, and the end must be an address too"
    )]
    Address {
        /// The address.
        address: u64,
        /// The Region's length.
        bytes: u64,
        /// What it has to be a multiple of.
        page_bytes: u64,
    },
    /// The writer's mapping is one of something else.
    #[error(
        "the writer has {found} at {at:#x}, where the region's memory was said to be mapped from {address:#x} on: the address is that of the region's first byte, in a shared mapping"
    )]
    OtherMemory {
        /// Where the Region was said to begin.
        address: u64,
        /// Where something else is.
        at: u64,
        /// What is there.
        found: String,
    },
    /// A dirty bitmap that does not fit its Region.
    #[error(
        "the dirty bitmap has {found} bytes; a region of {pages} pages needs {least} (one bit per page, in words of 8 bytes) and takes up to {most}"
    )]
    BitmapSize {
        /// Its length.
        found: u64,
        /// Pages of the Region.
        pages: u64,
        /// Smallest length.
        least: u64,
        /// Largest length.
        most: u64,
    },
    /// A dirty bitmap that could be cut under us.
    #[error(
        "the dirty bitmap can be truncated (its seals are {seals:#x}): make the memfd with MFD_ALLOW_SEALING and seal it with fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) before it is passed"
    )]
    BitmapSeal {
        /// The seals it has; 0 also for files that cannot have any.
        seals: i32,
    },
    /// The Region's file could not be looked at.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The kernel refused something else.
    #[error("cannot {doing}: {source}")]
    Failed {
        /// What was tried.
        doing: &'static str,
        /// Why not.
        source: io::Error,
    },
}

impl TrackerError {
    /// The stable code under which this error is reported.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Blind { .. } => "tracker-blind",
            Self::WriterGone { .. } => "writer-gone",
            Self::Descriptor { .. } => "tracker-descriptor",
            Self::Unsupported => "tracker-unsupported",
            Self::Address { .. } => "tracker-address",
            Self::OtherMemory { .. } => "tracker-memory",
            Self::BitmapSize { .. } => "bitmap-size",
            Self::BitmapSeal { .. } => "bitmap-seal",
            Self::Region(error) => error.code(),
            Self::Failed { .. } => "tracker-failed",
        }
    }

    /// For `map_err`: what was tried.
    pub(super) fn failed<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Failed {
            doing,
            source: source.into(),
        }
    }
}
