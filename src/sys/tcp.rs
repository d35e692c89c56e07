//! What the kernel knows of a TCP connection.
#![allow(unsafe_code)] // nix has no `TCP_INFO`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// Time since the peer's kernel acknowledged something the last time (`TCP_INFO`). An error on other
/// kinds of sockets.
pub fn since_last_answer(socket: BorrowedFd<'_>) -> io::Result<Duration> {
    // SAFETY: `tcp_info` is a plain struct of integers, for which all zeros is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of_val(&info)).unwrap_or(0);
    // SAFETY: `info` is `length` bytes long, and the kernel writes at most so many.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Duration::from_millis(info.tcpi_last_ack_recv.into()))
}
