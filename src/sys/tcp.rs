//! What the kernel knows of a TCP connection.
#![allow(unsafe_code)] // nix has no `TCP_INFO`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// Time since the peer's kernel acknowledged something the last time. An error on other kinds of sockets.
pub fn since_last_answer(socket: BorrowedFd<'_>) -> io::Result<Duration> {
    let info = info(socket)?;
    Ok(Duration::from_millis(info.tcpi_last_ack_recv.into()))
}

/// How long an answer of the peer's kernel takes, smoothed by ours. An error on other kinds of sockets.
pub fn round_trip(socket: BorrowedFd<'_>) -> io::Result<Duration> {
    let info = info(socket)?;
    Ok(Duration::from_micros(info.tcpi_rtt.into()))
}

/// `TCP_INFO`.
fn info(socket: BorrowedFd<'_>) -> io::Result<libc::tcp_info> {
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
    Ok(info)
}
