//! A socket's error queue, and the other calls that zero copy needs: allowing it, the pending error,
//! what is not acknowledged, and the reset that brings lent memory back.
#![allow(unsafe_code)] // Socket options and messages that nix does not know; each one argued below.

use std::ffi::{c_int, c_void};
use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use super::msg::{Control, ControlMessages, byte_count, empty_header, invalid};

/// Room for a notice with the offender's address (44 bytes for IPv6) and a timestamp beside it.
const NOTICE_CONTROL: usize = 256;

/// From `linux/errqueue.h`; libc has neither.
const SO_EE_ORIGIN_ZEROCOPY: u8 = 5;
const SO_EE_CODE_ZEROCOPY_COPIED: u8 = 1;
/// From `linux/vm_sockets.h`; libc has neither.
const SOL_VSOCK: c_int = 287;
const VSOCK_RECVERR: c_int = 1;

/// Zero-copy sends `lo..=hi` (modulo 2^32) are released.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notice {
    /// First send.
    pub lo: u32,
    /// Last send; below `lo` if the range wraps.
    pub hi: u32,
    /// The kernel copied at least one of them after all.
    pub copied: bool,
}

/// One read of a socket's error queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queued {
    /// There was nothing in it.
    Nothing,
    /// Zero-copy sends are released.
    Released(Notice),
    /// Something that is not about zero copy: an ICMP error or a timestamp.
    Foreign,
}

/// Takes one message from the error queue; never blocks.
///
/// `InvalidData` if the message was cut or contradicts itself: then a release may be lost.
pub fn receive_notice(socket: BorrowedFd<'_>) -> io::Result<Queued> {
    let mut control = Control([0; NOTICE_CONTROL]);
    let mut header = empty_header();
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = control.0.len();
    // The flag, although today's kernels never block here: old ones did.
    let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
    // SAFETY: `control` is writable for the length given, and there is no iovec: notices carry no
    // payload, and that of foreign messages is not wanted.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    match byte_count(received) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Queued::Nothing),
        Err(error) => return Err(error),
    }
    if header.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(invalid("a message on the socket's error queue was cut"));
    }
    parse_notice(&control.0[..header.msg_controllen])
}

fn parse_notice(control: &[u8]) -> io::Result<Queued> {
    let mut any = false;
    for message in ControlMessages(control) {
        any = true;
        let of_error = matches!(
            (message.level, message.kind),
            (libc::SOL_IP, libc::IP_RECVERR)
                | (libc::SOL_IPV6, libc::IPV6_RECVERR)
                | (SOL_VSOCK, VSOCK_RECVERR)
        );
        if !of_error {
            continue;
        }
        let word = |at: usize| {
            let bytes = message.data.get(at..at + 4)?;
            Some(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        };
        let origin = message
            .data
            .get(offset_of!(libc::sock_extended_err, ee_origin));
        let code = message
            .data
            .get(offset_of!(libc::sock_extended_err, ee_code));
        let (Some(errno), Some(&origin), Some(&code), Some(lo), Some(hi)) = (
            word(offset_of!(libc::sock_extended_err, ee_errno)),
            origin,
            code,
            word(offset_of!(libc::sock_extended_err, ee_info)),
            word(offset_of!(libc::sock_extended_err, ee_data)),
        ) else {
            return Err(invalid(
                "a message on the socket's error queue is too short",
            ));
        };
        if origin != SO_EE_ORIGIN_ZEROCOPY {
            continue;
        }
        if errno != 0 {
            return Err(invalid("a zero-copy notice carries an error number"));
        }
        let copied = code & SO_EE_CODE_ZEROCOPY_COPIED != 0;
        return Ok(Queued::Released(Notice { lo, hi, copied }));
    }
    // Old kernels answered an empty queue with success and no control message.
    Ok(if any {
        Queued::Foreign
    } else {
        Queued::Nothing
    })
}

/// Allows `MSG_ZEROCOPY` on the socket; without it the kernel silently ignores the flag.
/// `EOPNOTSUPP` where the kind of socket has no zero copy.
pub fn allow_zero_copy(socket: BorrowedFd<'_>) -> io::Result<()> {
    let on: c_int = 1;
    // SAFETY: the option's value is a live int, and its length is given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ZEROCOPY,
            ptr::from_ref(&on).cast(),
            socket_length::<c_int>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The socket's address family: `AF_INET`, `AF_INET6`, `AF_UNIX`, `AF_VSOCK`.
pub fn family(socket: BorrowedFd<'_>) -> io::Result<c_int> {
    socket_option(socket, libc::SO_DOMAIN)
}

/// Takes the socket's pending error (`SO_ERROR`), which clears it: remember what it was.
pub fn take_error(socket: BorrowedFd<'_>) -> io::Result<Option<io::Error>> {
    let errno = socket_option(socket, libc::SO_ERROR)?;
    Ok((errno != 0).then(|| io::Error::from_raw_os_error(errno)))
}

fn socket_option(socket: BorrowedFd<'_>, option: c_int) -> io::Result<c_int> {
    let mut value: c_int = 0;
    let mut length = socket_length::<c_int>();
    // SAFETY: `value` is a live int, writable for the `length` given.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            ptr::from_mut(&mut value).cast::<c_void>(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Bytes in the socket's write queue that the peer's kernel has not acknowledged (`SIOCOUTQ`).
pub fn unacknowledged(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut queued: c_int = 0;
    // SAFETY: the request writes one int, and `queued` is one. `TIOCOUTQ` is `SIOCOUTQ`.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut queued) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::try_from(queued).unwrap_or(0))
}

/// Ends a TCP connection at once, by `connect` to `AF_UNSPEC`: throws the write queue away, sends RST,
/// and keeps the descriptor. `EINVAL` on other kinds of sockets.
///
/// Observed on Linux 6.18, IPv4 and IPv6, with 3.6 MB of lent pages queued to a peer that does not
/// read: all notices were on the error queue when the call returned, out of order (1..=3 before 0),
/// and could be read afterwards; sends that never left are reported as *not* copied. The peer reads
/// what had arrived and then gets `ECONNRESET`. Here, `SO_ERROR` is `ECONNRESET`, `poll` says
/// `POLLHUP` from then on, sends are `EPIPE`, reads `ENOTCONN`, and `SIOCOUTQ` is no longer a
/// meaningful number. The same works after the peer's RST and may be repeated.
///
/// `SO_LINGER` 0 and `close` would send the RST too, but lose the notices.
pub fn disconnect(socket: BorrowedFd<'_>) -> io::Result<()> {
    let unspecified = libc::sockaddr {
        sa_family: 0, // AF_UNSPEC
        sa_data: [0; 14],
    };
    let length = socket_length::<libc::sockaddr>();
    // SAFETY: the address is a live sockaddr of the length given.
    let result = unsafe { libc::connect(socket.as_raw_fd(), &raw const unspecified, length) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn socket_length<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).unwrap_or(libc::socklen_t::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    const CMSG_HEADER: usize = size_of::<libc::cmsghdr>();
    const CMSG_ALIGN: usize = size_of::<usize>();

    /// A control message as the kernel lays it out, with the offender's address behind the error.
    fn message(
        level: c_int,
        kind: c_int,
        errno: u32,
        origin: u8,
        code: u8,
        range: (u32, u32),
    ) -> Vec<u8> {
        let mut data = errno.to_ne_bytes().to_vec();
        data.extend([origin, 0, code, 0]);
        data.extend(range.0.to_ne_bytes());
        data.extend(range.1.to_ne_bytes());
        data.extend([0; 28]);
        let mut bytes = (CMSG_HEADER + data.len()).to_ne_bytes().to_vec();
        bytes.extend(level.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(CMSG_ALIGN), 0);
        bytes
    }

    #[test]
    fn notices_are_read_on_every_family() {
        for (level, kind) in [
            (libc::SOL_IP, libc::IP_RECVERR),
            (libc::SOL_IPV6, libc::IPV6_RECVERR),
            (SOL_VSOCK, VSOCK_RECVERR),
        ] {
            let notice = Notice {
                lo: u32::MAX,
                hi: 3,
                copied: true,
            };
            let bytes = message(level, kind, 0, 5, 1, (u32::MAX, 3));
            assert_eq!(parse_notice(&bytes).unwrap(), Queued::Released(notice));
        }
    }

    #[test]
    fn icmp_and_timestamps_are_not_notices() {
        let icmp = message(libc::SOL_IP, libc::IP_RECVERR, 111, 2, 3, (0, 0));
        assert_eq!(parse_notice(&icmp).unwrap(), Queued::Foreign);
        let mut stamped = message(libc::SOL_SOCKET, libc::SCM_TIMESTAMPING, 0, 0, 0, (0, 0));
        assert_eq!(parse_notice(&stamped).unwrap(), Queued::Foreign);
        stamped.extend(message(libc::SOL_IP, libc::IP_RECVERR, 0, 5, 0, (7, 9)));
        let notice = Notice {
            lo: 7,
            hi: 9,
            copied: false,
        };
        assert_eq!(parse_notice(&stamped).unwrap(), Queued::Released(notice));
        assert_eq!(parse_notice(&[]).unwrap(), Queued::Nothing);
    }

    #[test]
    fn notices_that_contradict_themselves_are_errors() {
        let failed = message(libc::SOL_IP, libc::IP_RECVERR, 5, 5, 0, (0, 0));
        assert!(parse_notice(&failed).is_err());
        let mut short = message(libc::SOL_IP, libc::IP_RECVERR, 0, 5, 0, (0, 0));
        short[..8].copy_from_slice(&(CMSG_HEADER + 12).to_ne_bytes());
        assert!(parse_notice(&short).is_err());
    }
}
