//! What a network interface can do.
#![allow(unsafe_code)] // An ioctl that nix does not know.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

/// From `linux/ethtool.h`; libc has neither.
const ETHTOOL_GSG: u32 = 0x18;

/// `struct ethtool_value`.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    value: u32,
}

/// Whether the interface sends from scattered pages (`ethtool -k`: scatter-gather). Without that the
/// kernel copies every send. Any socket does.
pub fn scatter_gather(socket: BorrowedFd<'_>, interface: &str) -> io::Result<bool> {
    let mut value = EthtoolValue {
        command: ETHTOOL_GSG,
        value: 0,
    };
    // SAFETY: all zero is a valid ifreq: an empty name and a null pointer.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let name = interface.as_bytes();
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = ptr::from_mut(&mut value).cast();
    // SAFETY: the request names a live `ethtool_value`, which is what the command reads and writes.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value.value != 0)
}
