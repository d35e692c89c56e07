//! The width of a terminal: nix has no safe form of `TIOCGWINSZ`.
#![allow(unsafe_code)] // An ioctl that nix has no safe form of.

use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Columns of the terminal behind `fd`; `None` if it is none or does not know.
#[must_use]
pub fn columns(fd: BorrowedFd<'_>) -> Option<usize> {
    // SAFETY: `winsize` is four integers, for which all zeroes is a valid value.
    let mut size: libc::winsize = unsafe { mem::zeroed() };
    // SAFETY: the kernel writes one `winsize`, and `size` is one.
    let failed = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) } != 0;
    (!failed && size.ws_col > 0).then_some(usize::from(size.ws_col))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn what_is_no_terminal_has_no_width() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(columns(null.as_fd()), None);
    }
}
