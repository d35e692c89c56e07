//! Where a Region arrives: a new file, or memory that was prepared for it.
//!
//! Prepared memory is somebody's: it is written through a shared mapping, and neither punched nor
//! truncated. What it held before means nothing, so zeros are written where it has memory.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use crate::limits::PACKET_PAGES_MAX;
use crate::pages::PageRange;
use crate::region::{Mapping, Region};
use crate::stream::Destination;
use crate::sys::msg::{IovBuf, readv};

use super::destination::DestinationFile;

/// A Region's memory at the destination.
#[derive(Debug)]
pub(super) enum Place {
    New(DestinationFile),
    Prepared(PreparedMemory),
}

impl Place {
    /// The file that becomes visible with the commit, if it is one.
    pub(super) fn file(&self) -> Option<&DestinationFile> {
        match self {
            Self::New(file) => Some(file),
            Self::Prepared(_) => None,
        }
    }

    /// The mapping that has the huge pages, if there are some.
    pub(super) fn in_huge_pages(&self) -> &Arc<Mapping> {
        match self {
            Self::New(file) => file.in_huge_pages(),
            Self::Prepared(memory) => memory.region.mapping(),
        }
    }
}

impl Destination for Place {
    fn region(&self) -> &Region {
        match self {
            Self::New(file) => file.region(),
            Self::Prepared(memory) => &memory.region,
        }
    }

    fn populate(&self, ranges: &[PageRange]) {
        match self {
            Self::New(file) => file.populate(ranges),
            // As a rule it is populated since it was registered, and to ask costs a tenth of doing it again.
            Self::Prepared(memory) => ranges
                .iter()
                .filter(|range| !memory.region.is_mapped(**range))
                .for_each(|range| memory.region.populate(*range)),
        }
    }

    fn clear(&self, range: PageRange) -> io::Result<()> {
        match self {
            Self::New(file) => file.clear(range),
            Self::Prepared(memory) => memory.clear(range),
        }
    }

    fn is_blank(&self) -> bool {
        matches!(self, Self::New(_))
    }
}

/// Memory of a client.
#[derive(Debug)]
pub(super) struct PreparedMemory {
    region: Arc<Region>,
    /// `/dev/zero`: the kernel reads it straight into a mapping, on hugetlbfs too, whose files cannot
    /// be written to.
    zeros: File,
}

impl PreparedMemory {
    pub(super) fn new(region: Arc<Region>) -> io::Result<Self> {
        let zeros = File::open("/dev/zero")?;
        Ok(Self { region, zeros })
    }

    fn clear(&self, range: PageRange) -> io::Result<()> {
        let mut rest = range;
        // What is a hole reads as zeros already, and would only cost memory.
        while let Some(data) = self.region.next_data(rest).map_err(io::Error::other)? {
            let count = data.count.min(PACKET_PAGES_MAX);
            self.write_zeros(PageRange { count, ..data })?;
            let end = data.first + count;
            if end >= range.end() {
                break;
            }
            rest = PageRange {
                first: end,
                count: range.end() - end,
            };
        }
        Ok(())
    }

    fn write_zeros(&self, range: PageRange) -> io::Result<()> {
        let mut span = [self.region.span_mut(range)];
        let mut iov = IovBuf::new();
        while !span[0].is_empty() {
            match readv(self.zeros.as_fd(), &iov.scatter(&span)) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(written) => span[0].advance(written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
