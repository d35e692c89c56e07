//! userfaultfd, used for one thing: asynchronous write-protection of our own memory.
//!
//! In this mode the kernel resolves a write to a protected page by itself and leaves a mark; nobody
//! waits for anybody, and no event is ever read. `PAGEMAP_SCAN` collects the marks.
#![allow(unsafe_code)] // nix and libc have neither the system call's wrapper nor the ioctls.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use crate::limits::PAGE_LEN;
use crate::region::Mapping;

// All numbers and layouts below are those of include/uapi/linux/userfaultfd.h (Linux 6.7).

/// The only version of the interface there is.
const UFFD_API: u64 = 0xAA;
/// Faults of the kernel itself are not handed to us, so no privilege is needed. A kernel that writes to
/// the memory for its owner (`read` into it) is seen nevertheless: asynchronous marks need no handler.
const UFFD_USER_MODE_ONLY: i32 = 1;

const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
/// Not only anonymous memory.
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// Pages that do not exist yet can be protected.
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// The kernel resolves the fault itself.
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;

const FEATURES: u64 = UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | UFFD_FEATURE_WP_UNPOPULATED
    | UFFD_FEATURE_WP_ASYNC;

const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
/// The bit in `uffdio_register.ioctls` that says write-protection works on the range.
const UFFDIO_WRITEPROTECT_BIT: u64 = 1 << 0x06;

/// `struct uffdio_api`.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`, which begins with a `struct uffdio_range`.
#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

const _: () = assert!(size_of::<UffdioApi>() == 24);
const _: () = assert!(size_of::<UffdioRegister>() == 32);

/// The ioctls, numbered from the type `0xAA`.
mod ioctls {
    use super::{UffdioApi, UffdioRegister};

    nix::ioctl_readwrite!(uffdio_api, 0xAA, 0x3F, UffdioApi);
    nix::ioctl_readwrite!(uffdio_register, 0xAA, 0x00, UffdioRegister);
}

/// A userfaultfd of this process, ready for asynchronous write-protection. What it tracks is tracked
/// until its last copy is closed, in whichever process that is.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// Opens one. `ENOSYS`, `EINVAL` or `EPERM`: this kernel, or its configuration, has none that we
    /// can use (asynchronous write-protection came with Linux 6.7).
    pub fn new() -> io::Result<Self> {
        // SAFETY: the call takes one integer and returns a new descriptor or an error.
        let fd =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) };
        let fd = i32::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
        // SAFETY: the kernel has just made this descriptor for us, and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut api = UffdioApi {
            api: UFFD_API,
            features: FEATURES,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes one `uffdio_api`, and `api` is one (its size is asserted
        // above); a feature it does not have is an error.
        unsafe { ioctls::uffdio_api(fd.as_raw_fd(), &raw mut api) }?;
        Ok(Self(fd))
    }

    /// Tracks writes through all of `mapping`, until it is unmapped. Nothing is protected by this
    /// alone: pages count as written until a scan protects them.
    pub fn track(&self, mapping: &Mapping) -> io::Result<()> {
        let Some(base) = mapping.address() else {
            return Ok(());
        };
        let mut register = UffdioRegister {
            start: base.addr().get() as u64,
            // Whole pages, of which a mapping always consists. A hugetlbfs file has no partial page.
            len: mapping.len().next_multiple_of(PAGE_LEN) as u64,
            mode: UFFDIO_REGISTER_MODE_WP,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes one `uffdio_register`, and `register` is one (its size is
        // asserted above). In asynchronous mode registering changes neither what the memory holds
        // nor whether an access to it succeeds.
        unsafe { ioctls::uffdio_register(self.0.as_raw_fd(), &raw mut register) }?;
        if register.ioctls & UFFDIO_WRITEPROTECT_BIT == 0 {
            return Err(Errno::EOPNOTSUPP.into());
        }
        Ok(())
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Uffd> for OwnedFd {
    fn from(uffd: Uffd) -> Self {
        uffd.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::Access;

    #[test]
    fn memory_that_cannot_be_write_protected_is_refused() {
        // A file on a disk or in /proc is neither anonymous, nor shmem, nor hugetlbfs.
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        let mapping = Mapping::new(&file, 4096, Access::Read).unwrap();
        let error = Uffd::new().unwrap().track(&mapping).unwrap_err();
        assert!(error.raw_os_error().is_some(), "{error}");
    }
}
