//! `PROCMAP_QUERY`: what is mapped at one address of a process, in a microsecond and however many mappings it has.
//!
//! The descriptor is an open `/proc/<pid>/maps`.
#![allow(unsafe_code)] // nix and libc do not have the ioctl.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `struct procmap_query` of include/uapi/linux/fs.h (Linux 6.11), and so are all numbers below.
#[repr(C)]
#[derive(Default)]
struct ProcmapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

const PROCMAP_QUERY_BYTES: u64 = 104;
const _: () = assert!(size_of::<ProcmapQuery>() as u64 == PROCMAP_QUERY_BYTES);

const PROCMAP_QUERY_VMA_SHARED: u64 = 1 << 3;

/// The ioctl: `_IOWR('f', 17, struct procmap_query)`.
mod ioctls {
    use super::ProcmapQuery;

    nix::ioctl_readwrite!(procmap_query, b'f', 17, ProcmapQuery);
}

/// One mapping of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapped {
    /// Address of the first byte.
    pub start: u64,
    /// Address one past the last byte.
    pub end: u64,
    /// Whether what is written there is the file's.
    pub shared: bool,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
    /// Major and minor number of the file's device.
    pub device: (u64, u64),
    /// The file's number; 0 for no file.
    pub inode: u64,
}

/// What `maps` has at `address`: `ENOENT` if nothing is there, `ENOTTY` before Linux 6.11.
pub fn mapped_at(maps: BorrowedFd<'_>, address: u64) -> io::Result<Mapped> {
    let mut query = ProcmapQuery {
        size: PROCMAP_QUERY_BYTES,
        query_addr: address,
        ..ProcmapQuery::default()
    };
    // SAFETY: the kernel writes `query`, whose length is stated in it, and nothing else: no name is asked for.
    unsafe { ioctls::procmap_query(maps.as_raw_fd(), &raw mut query) }?;
    Ok(Mapped {
        start: query.vma_start,
        end: query.vma_end,
        shared: query.vma_flags & PROCMAP_QUERY_VMA_SHARED != 0,
        offset: query.vma_offset,
        device: (query.dev_major.into(), query.dev_minor.into()),
        inode: query.inode,
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_is_mapped_here_and_where_nothing_is() {
        let maps = File::open("/proc/self/maps").unwrap();
        let here = [0u8; 8];
        let address = here.as_ptr() as u64;
        match mapped_at(maps.as_fd(), address) {
            Ok(mapped) => {
                assert!((mapped.start..mapped.end).contains(&address));
                assert!(!mapped.shared && mapped.inode == 0, "{mapped:?}");
                let nothing = mapped_at(maps.as_fd(), 0).unwrap_err();
                assert_eq!(nothing.raw_os_error(), Some(libc::ENOENT));
            }
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOTTY)),
        }
    }
}
