//! The workload's memory: a file or a memfd, mapped as any program maps its own.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::stamp::STAMPED_BYTES;
use super::{Options, WorkloadError};
use crate::config::units::Size;
use crate::region::{Access, Mapping};
use crate::sys::file::{advise_huge_pages, populate};
use crate::sys::pagemap;

/// The size of a huge page on the machines that this is for.
pub(super) const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Whether shared memory without a mount gets huge pages when it asks for them.
const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// The memory that is written.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) mapping: Arc<Mapping>,
    /// Where others find it.
    pub(super) path: String,
    /// Stays open, so that the path of an anonymous memfd under /proc works.
    pub(super) file: File,
}

impl Memory {
    /// Opens or makes it, and has all of it allocated: a full file system is an error here and a SIGBUS
    /// later.
    pub(super) fn open(options: &Options) -> Result<Self, WorkloadError> {
        if options.huge_pages && options.path.is_none() {
            // Fails when there are no such pages in reserve, or too few. There are other ways.
            if let Ok(memory) = Self::of_memfd(options.size, MFdFlags::MFD_HUGETLB)
                && populate(&memory.mapping.whole(), Access::Write).is_ok()
            {
                return Ok(memory);
            }
        }
        let (memory, name) = match &options.path {
            Some(path) => (
                Self::of_path(path, options.size)?,
                path.display().to_string(),
            ),
            None => (
                Self::of_memfd(options.size, MFdFlags::empty())
                    .map_err(failed("make a memfd of", &Size(options.size)))?,
                "a memfd".to_owned(),
            ),
        };
        if options.huge_pages {
            // Has to come first, and then the memory has to be touched: what `fallocate` allocates
            // knows no advice.
            advise_huge_pages(&memory.mapping);
            populate(&memory.mapping.whole(), Access::Write).map_err(failed("allocate", &name))?;
        } else {
            let bytes = libc::off_t::try_from(options.size).map_err(io::Error::other);
            bytes
                .and_then(|bytes| Ok(fallocate(&memory.file, FallocateFlags::empty(), 0, bytes)?))
                .map_err(failed("allocate", &name))?;
        }
        Ok(memory)
    }

    fn of_memfd(size: u64, flags: MFdFlags) -> io::Result<Self> {
        let file = File::from(memfd_create(
            "memferry-workload",
            MFdFlags::MFD_CLOEXEC | flags,
        )?);
        file.set_len(size)?;
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        Self::map(file, size, path)
    }

    fn of_path(path: &Path, size: u64) -> Result<Self, WorkloadError> {
        let name = path.display();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(failed("open", &name))?;
        let length = file.metadata().map_err(failed("look at", &name))?.len();
        if length != 0 && length != size {
            // Somebody's file: it is not ours to cut or to grow.
            return Err(WorkloadError::Options(format!(
                "{name} exists and has {length} bytes, not {size}"
            )));
        }
        file.set_len(size)
            .map_err(failed("set the length of", &name))?;
        Self::map(file, size, name.to_string()).map_err(failed("map", &name))
    }

    fn map(file: File, size: u64, path: String) -> io::Result<Self> {
        let length = usize::try_from(size).map_err(io::Error::other)?;
        let mapping = Mapping::new(&file, length, Access::Write)?;
        Ok(Self {
            mapping,
            path,
            file,
        })
    }

    /// Puts `bytes` into a page.
    pub(super) fn write(
        &self,
        page: u64,
        bytes: &[u8; STAMPED_BYTES],
    ) -> Result<(), WorkloadError> {
        usize::try_from(page)
            .ok()
            .and_then(|page| {
                self.mapping
                    .span_mut(page.checked_mul(STAMPED_BYTES)?, STAMPED_BYTES)
            })
            .map(|mut span| span.fill_from(bytes))
            .ok_or_else(|| WorkloadError::Options(format!("page {page} is outside the memory")))
    }

    /// What a page holds.
    pub(super) fn read(&self, page: u64) -> Result<[u8; STAMPED_BYTES], WorkloadError> {
        let mut bytes = [0; STAMPED_BYTES];
        let read = self
            .file
            .read_exact_at(&mut bytes, page * STAMPED_BYTES as u64);
        read.map_err(failed("read", &self.path))?;
        Ok(bytes)
    }

    /// How much of it is mapped by huge pages, as the kernel says.
    pub(super) fn huge_bytes(&self) -> io::Result<u64> {
        pagemap::huge_bytes(&self.mapping)
    }
}

/// Why memory is not, or not all, in huge pages, and what helps.
pub(super) fn huge_pages_missing(options: &Options, huge: u64) -> String {
    let got = format!("{} of {} are in huge pages", Size(huge), Size(options.size));
    match &options.path {
        Some(path) => format!(
            "{got}: {} has to be on hugetlbfs, or on a tmpfs mounted with huge=advise",
            path.display()
        ),
        None => {
            let enabled = std::fs::read_to_string(SHMEM_ENABLED).unwrap_or_default();
            let pages = options.size / HUGE_PAGE_BYTES;
            format!(
                "{got}: {SHMEM_ENABLED} says {:?} and has to say \"advise\"; or reserve {pages} pages in /proc/sys/vm/nr_hugepages",
                chosen(&enabled)
            )
        }
    }
}

/// The word in brackets.
fn chosen(words: &str) -> &str {
    let (_, rest) = words.split_once('[').unwrap_or_default();
    rest.split(']').next().unwrap_or_default()
}

fn failed(what: &str, name: &impl std::fmt::Display) -> impl FnOnce(io::Error) -> WorkloadError {
    let what = format!("cannot {what} {name}");
    move |source| WorkloadError::Memory { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_word_is_the_one_in_brackets() {
        assert_eq!(chosen("always advise [never] deny\n"), "never");
        assert_eq!(chosen(""), "");
    }
}
