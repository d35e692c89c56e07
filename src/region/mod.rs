//! Regions: named, fixed-length memory, mapped.
//!
//! Our own reads of a Region are copies into a small buffer, so that no reference to bytes that others
//! write ever exists (rule 10). There are two ways. `read` is `pread`: a source truncated under us is a
//! short read, and a hole is read without being allocated. `read_mapped` copies from the mapping, which
//! is faster, for memory that is known to be allocated; where it fails, `read` says why (rule 11).

mod mapping;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, fstatfs};

pub use mapping::{Access, Mapping, Span, SpanMut};

use crate::limits::{PAGE_BYTES, REGION_BYTES_MAX};
use crate::name::Name;
use crate::pages::{PageRange, pages_in};
use crate::sys;

/// What is wrong with a Region's memory.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// It could not be opened.
    #[error("cannot open {origin}: {source}")]
    Open {
        /// The path or descriptor.
        origin: String,
        /// Why.
        source: io::Error,
    },
    /// It is not a file that memory can be mapped from.
    #[error(
        "{origin} is {what}: a region is a regular file, on tmpfs, hugetlbfs or disk, or a memfd"
    )]
    Kind {
        /// The path or descriptor.
        origin: String,
        /// What it is instead.
        what: &'static str,
    },
    /// It is longer than any Region may be.
    #[error("{origin} has {bytes} bytes; a region has at most {REGION_BYTES_MAX}")]
    TooLong {
        /// The path or descriptor.
        origin: String,
        /// Its length.
        bytes: u64,
    },
    /// It could not be mapped.
    #[error("cannot map {bytes} bytes of {origin}: {source}")]
    Map {
        /// The path or descriptor.
        origin: String,
        /// Its length.
        bytes: u64,
        /// Why.
        source: io::Error,
    },
    /// Its length changed since it was added.
    #[error(
        "{origin} had {expected} bytes when region {name} was added and has {found} now: a region's length is fixed; remove and add it again"
    )]
    Resized {
        /// The Region.
        name: Name,
        /// The path or descriptor.
        origin: String,
        /// Bytes when it was added.
        expected: u64,
        /// Bytes now.
        found: u64,
    },
    /// It could not be read.
    #[error("cannot read {origin} of region {name} at byte {offset}: {source}")]
    Read {
        /// The Region.
        name: Name,
        /// The path or descriptor.
        origin: String,
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
}

impl RegionError {
    /// The stable code under which this error is reported.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Open { .. } => "region-open",
            Self::Kind { .. } => "region-kind",
            Self::TooLong { .. } => "region-too-long",
            Self::Map { .. } => "region-map",
            Self::Resized { .. } => "region-resized",
            Self::Read { .. } => "region-read",
        }
    }
}

/// Named, fixed-length memory.
#[derive(Debug)]
pub struct Region {
    name: Name,
    origin: String,
    file: File,
    bytes: u64,
    page_size: u64,
    mapping: Arc<Mapping>,
}

impl Region {
    /// Opens a source by its path.
    pub fn open(name: Name, path: &Path) -> Result<Self, RegionError> {
        let origin = path.display().to_string();
        let opened = OpenOptions::new().read(true).open(path);
        let file = opened.map_err(|source| RegionError::Open {
            origin: origin.clone(),
            source,
        })?;
        Self::new(name, origin, file, Access::Read)
    }

    /// Takes a source that was handed over as a descriptor, for instance a memfd.
    pub fn from_descriptor(name: Name, fd: OwnedFd) -> Result<Self, RegionError> {
        let origin = format!("the descriptor of {name}");
        Self::new(name, origin, fd.into(), Access::Read)
    }

    /// A Region over all of `file` as it is now; `origin` is what error texts call it.
    pub fn new(
        name: Name,
        origin: String,
        file: File,
        access: Access,
    ) -> Result<Self, RegionError> {
        let meta = match file.metadata() {
            Ok(meta) => meta,
            Err(source) => return Err(RegionError::Open { origin, source }),
        };
        let kind = meta.file_type();
        if !kind.is_file() {
            let what = match kind {
                kind if kind.is_dir() => "a directory",
                kind if kind.is_char_device() || kind.is_block_device() => "a device",
                kind if kind.is_fifo() || kind.is_socket() => "a pipe or socket",
                _ => "not a file",
            };
            return Err(RegionError::Kind { origin, what });
        }
        let bytes = meta.len();
        let Some(mapped) = usize::try_from(bytes)
            .ok()
            .filter(|_| bytes <= REGION_BYTES_MAX)
        else {
            return Err(RegionError::TooLong { origin, bytes });
        };
        let mapping = match Mapping::new(&file, mapped, access) {
            Ok(mapping) => mapping,
            Err(source) => {
                return Err(RegionError::Map {
                    origin,
                    bytes,
                    source,
                });
            }
        };
        // hugetlbfs reports its page size as the block size; elsewhere 4 KiB is the granularity.
        let huge = fstatfs(&file).is_ok_and(|fs| fs.filesystem_type() == FsType(HUGETLBFS_MAGIC.0));
        let page_size = if huge { meta.blksize() } else { PAGE_BYTES };
        Ok(Self {
            name,
            origin,
            file,
            bytes,
            page_size,
            mapping,
        })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// What error texts call its memory: a path, or whose descriptor it is.
    #[must_use]
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Its length in pages of [`PAGE_BYTES`], the last one maybe partial.
    #[must_use]
    pub fn pages(&self) -> u64 {
        pages_in(self.bytes)
    }

    /// The page size of its memory in bytes: 4 KiB, or what hugetlbfs gives.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Its file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its mapping.
    #[must_use]
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// A second mapping of it, whose pages the kernel can pin for long (registered buffers): for a file
    /// that may be opened for writing.
    pub fn pinnable(&self) -> io::Result<Arc<Mapping>> {
        // By way of /proc: a descriptor's own mode cannot be widened.
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Mapping::new(&file, self.mapping.len(), Access::Pin)
    }

    /// The memory of `range`, for the kernel to read.
    #[must_use]
    pub fn span(&self, range: PageRange) -> Span<'_> {
        let (offset, len) = self.bounds(range);
        self.mapping
            .span(offset, len)
            .expect("page ranges are checked against their Region")
    }

    /// The memory of `range`, for the kernel to write. Only for a Region made with [`Access::Write`].
    #[must_use]
    pub fn span_mut(&self, range: PageRange) -> SpanMut<'_> {
        let (offset, len) = self.bounds(range);
        self.mapping
            .span_mut(offset, len)
            .expect("a destination is writable, and its ranges are checked")
    }

    fn bounds(&self, range: PageRange) -> (usize, usize) {
        let as_usize =
            |n: u64| usize::try_from(n).expect("the Region is mapped, so its offsets fit");
        (as_usize(range.offset()), as_usize(range.bytes(self.bytes)))
    }

    /// Copies the bytes of `range` into the start of `buffer` and returns them.
    ///
    /// The file may be written meanwhile, so the copy may be torn; that is for checksums to find. A
    /// file that has become shorter is an error that says so.
    pub fn read<'b>(
        &self,
        range: PageRange,
        buffer: &'b mut [u8],
    ) -> Result<&'b [u8], RegionError> {
        let (_, len) = self.bounds(range);
        let bytes = &mut buffer[..len];
        match self.file.read_exact_at(bytes, range.offset()) {
            Ok(()) => Ok(bytes),
            Err(error) => {
                self.check_length()?;
                Err(self.read_error(range.offset(), error))
            }
        }
    }

    /// As [`read`](Self::read), through the mapping, which is several times faster. A hole in `range`
    /// may become allocated by it: for pages of which [`is_mapped`](Self::is_mapped) has just said yes,
    /// and for a destination's that hold payload.
    pub fn read_mapped<'b>(
        &self,
        range: PageRange,
        buffer: &'b mut [u8],
    ) -> Result<&'b [u8], RegionError> {
        let span = self.span(range);
        if sys::copy::copy(&span, buffer) {
            return Ok(&buffer[..span.len()]);
        }
        // A page is not there any more, or cannot be read: the system call says which.
        self.read(range, buffer)
    }

    /// The CRC-32C of `range`, through the mapping, for the same pages as [`read_mapped`](Self::read_mapped).
    /// `None`: it has to be read for that, which also tells if a page is not there any more.
    #[must_use]
    pub fn crc32c_mapped(&self, range: PageRange) -> Option<u32> {
        sys::copy::crc32c(&self.span(range))
    }

    /// Whether all bytes of `range`, through the mapping, are zero: reads only up to the first that is not.
    /// For pages of which [`is_mapped`](Self::is_mapped) has just said yes, as for
    /// [`read_mapped`](Self::read_mapped); `buffer` has room for them.
    pub fn is_zero_mapped(&self, range: PageRange, buffer: &mut [u8]) -> Result<bool, RegionError> {
        match sys::copy::is_zero(&self.span(range)) {
            Some(zero) => Ok(zero),
            None => Ok(self.read(range, buffer)?.iter().all(|&byte| byte == 0)),
        }
    }

    /// Whether all of `range` is in our page tables: then it is no hole, and reading it through the mapping
    /// is neither a fault nor an allocation. Touches nothing.
    #[must_use]
    pub fn is_mapped(&self, range: PageRange) -> bool {
        let span = self.span(range);
        sys::pagemap::are_present(sys::pagemap::AddressRange {
            start: span.base().addr() as u64,
            len: span.len() as u64,
        })
    }

    /// Enters `range` into the page tables at once, instead of a fault for every page when it is sent or
    /// placed; and allocates what is a hole of it. Best effort.
    pub fn populate(&self, range: PageRange) {
        // Whoever touches the pages meets the same error, and knows what it means.
        let _ = sys::file::populate(&self.span(range), self.mapping.access());
    }

    /// That the file still has the length it had when the Region was made.
    pub fn check_length(&self) -> Result<(), RegionError> {
        let found = self
            .file
            .metadata()
            .map_err(|error| self.read_error(0, error))?
            .len();
        if found == self.bytes {
            return Ok(());
        }
        let (name, origin) = (self.name.clone(), self.origin.clone());
        Err(RegionError::Resized {
            name,
            origin,
            expected: self.bytes,
            found,
        })
    }

    /// Bytes allocated to it; holes have none.
    pub fn allocated_bytes(&self) -> Result<u64, RegionError> {
        let meta = self
            .file
            .metadata()
            .map_err(|error| self.read_error(0, error))?;
        // `st_blocks` counts units of 512 bytes whatever the file system (stat(2)).
        Ok((meta.blocks() * 512).min(self.whole_pages()))
    }

    /// Bytes that are allocated to it without a hole.
    fn whole_pages(&self) -> u64 {
        self.bytes.next_multiple_of(self.page_size)
    }

    /// The first allocated run inside `range`, or `None` if all of it is a hole. Touches nothing.
    pub fn next_data(&self, range: PageRange) -> Result<Option<PageRange>, RegionError> {
        // The kernel finds the end of an extent by walking its pages: 25 ms for each GiB of a tmpfs. Blocks
        // that were reserved and never written count as data here, and read as the zeros that they are.
        if self.allocated_bytes()? == self.whole_pages() {
            return Ok((range.count > 0).then_some(range));
        }
        let seek = |offset, data| {
            sys::file::seek(self.file.as_fd(), offset, data)
                .map_err(|source| self.read_error(offset, source))
        };
        let end = (range.end() * PAGE_BYTES).min(self.bytes);
        let (mut from, mut start, mut hole) = (range.offset(), 0, 0);
        // Somebody may punch a hole between the two calls, just where data was found.
        while hole <= start {
            start = match seek(from, true)? {
                Some(start) if start < end => start,
                _ => return Ok(None),
            };
            // A hole that was filled since then has no end before that of the file: all data.
            hole = seek(start, false)?.unwrap_or(end).min(end);
            from = start;
        }
        let data = PageRange::covering(start, hole - start);
        let first = data.first.max(range.first);
        Ok(Some(PageRange {
            first,
            count: data.end() - first,
        }))
    }

    fn read_error(&self, offset: u64, source: io::Error) -> RegionError {
        RegionError::Read {
            name: self.name.clone(),
            origin: self.origin.clone(),
            offset,
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::fcntl::{FallocateFlags, fallocate};
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn memfd(bytes: u64) -> File {
        let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(bytes).unwrap();
        file
    }

    fn region(file: &File) -> Region {
        let fd = file.try_clone().unwrap().into();
        Region::from_descriptor(Name::new("r").unwrap(), fd).unwrap()
    }

    fn all(region: &Region) -> PageRange {
        PageRange {
            first: 0,
            count: region.pages(),
        }
    }

    #[test]
    fn holes_are_found_and_stay_holes_when_read() {
        let file = memfd(64 * PAGE_BYTES);
        file.write_all_at(&[7; 5000], 10 * PAGE_BYTES).unwrap();
        let region = region(&file);
        assert_eq!(
            region.next_data(all(&region)).unwrap(),
            Some(PageRange {
                first: 10,
                count: 2
            })
        );
        assert_eq!(
            region
                .next_data(PageRange {
                    first: 11,
                    count: 9
                })
                .unwrap(),
            Some(PageRange {
                first: 11,
                count: 1
            })
        );
        assert_eq!(
            region
                .next_data(PageRange {
                    first: 12,
                    count: 52
                })
                .unwrap(),
            None
        );
        let before = region.allocated_bytes().unwrap();
        let mut buffer = vec![1; 64 * 4096];
        region.read(all(&region), &mut buffer).unwrap();
        assert_eq!(buffer[..10 * 4096], [0; 10 * 4096]);
        assert_eq!(region.allocated_bytes().unwrap(), before);
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, punch, 0, 64 * 4096).unwrap();
        assert_eq!(region.next_data(all(&region)).unwrap(), None);
    }

    #[test]
    fn memory_without_a_hole_is_one_extent_until_it_has_one() {
        let file = memfd(64 * PAGE_BYTES - 100);
        let region = region(&file);
        file.write_all_at(&vec![7; 64 * 4096 - 100], 0).unwrap();
        let rest = PageRange {
            first: 20,
            count: 44,
        };
        assert_eq!(region.next_data(rest).unwrap(), Some(rest));
        assert_eq!(region.next_data(PageRange::default()).unwrap(), None);
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, punch, 30 * 4096, 4096).unwrap();
        let before = PageRange {
            first: 20,
            count: 10,
        };
        assert_eq!(region.next_data(rest).unwrap(), Some(before));
    }

    #[test]
    fn a_truncated_source_is_an_error_that_names_it() {
        let file = memfd(8 * PAGE_BYTES);
        file.write_all_at(&[7; 8 * 4096], 0).unwrap();
        let region = region(&file);
        let mut buffer = vec![0; 8 * 4096];
        region.read_mapped(all(&region), &mut buffer).unwrap();
        file.set_len(PAGE_BYTES).unwrap();
        for read in [Region::read, Region::read_mapped] {
            let error = read(&region, all(&region), &mut buffer).unwrap_err();
            assert_eq!(error.code(), "region-resized");
            let text = error.to_string();
            assert!(
                text.contains("had 32768 bytes") && text.contains("4096 now"),
                "{text}"
            );
        }
    }

    #[test]
    fn mapped_means_every_page_and_asking_allocates_nothing() {
        let file = memfd(2000 * PAGE_BYTES);
        let data = PageRange {
            first: 300,
            count: 1000,
        };
        file.write_all_at(&vec![7; 1000 * 4096], data.offset())
            .unwrap();
        let region = region(&file);
        assert!(!region.is_mapped(data));
        region.populate(data);
        let mapped = |first, count| region.is_mapped(PageRange { first, count });
        assert!(region.is_mapped(data) && mapped(301, 998) && mapped(1299, 1));
        assert!(!mapped(299, 1001) && !mapped(300, 1001) && !mapped(1500, 3));
        assert_eq!(region.allocated_bytes().unwrap(), 1000 * PAGE_BYTES);
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, punch, 700 * 4096, 4096).unwrap();
        assert!(
            !region.is_mapped(data),
            "what was punched is not touched again"
        );
    }

    #[test]
    fn a_partial_last_page_is_read_and_spanned_to_its_end_only() {
        let file = memfd(PAGE_BYTES + 100);
        let region = region(&file);
        assert_eq!(region.pages(), 2);
        assert_eq!(region.span(PageRange { first: 1, count: 1 }).len(), 100);
        let mut buffer = [1; 8192];
        assert_eq!(region.read(all(&region), &mut buffer).unwrap().len(), 4196);
    }

    #[test]
    fn what_cannot_be_a_region_is_refused_by_name() {
        let name = || Name::new("r").unwrap();
        let missing = Region::open(name(), Path::new("/nonexistent/ram")).unwrap_err();
        assert!(
            missing.to_string().contains("/nonexistent/ram"),
            "{missing}"
        );
        assert_eq!(
            Region::open(name(), Path::new("/dev/null"))
                .unwrap_err()
                .code(),
            "region-kind"
        );
        assert_eq!(
            Region::open(name(), Path::new("/tmp")).unwrap_err().code(),
            "region-kind"
        );
        assert_eq!(region(&memfd(0)).pages(), 0);
    }
}
