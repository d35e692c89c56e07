//! What a local socket carries beside bytes: descriptors, and who is on the other end.
//!
//! nix's `recvmsg` is not enough here: once a message was truncated it hands out none of its control
//! messages, so descriptors the kernel did install would stay open for ever, and it returns plain
//! numbers instead of owned descriptors.
#![allow(unsafe_code)] // Control messages as the kernel lays them out; each block argued below.

use std::io::{self, IoSlice};
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// Space for the largest set of descriptors the kernel passes at once (`SCM_MAX_FD`, 253), in
/// words of eight bytes because a `cmsghdr` must be aligned.
const CONTROL_WORDS: usize = 160;

/// What one `receive` brought.
#[derive(Debug)]
pub struct Received {
    /// Bytes put in the buffer; 0 at the end of the stream.
    pub bytes: usize,
    /// Descriptors that came along, in order, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// Some descriptors were lost on the way, for instance because this process has too many open.
    pub fds_lost: bool,
}

/// `recvmsg` on a local socket, with the descriptors that accompany the bytes.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    let mut control = [0_u64; CONTROL_WORDS];
    let mut iov = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: `msghdr` is plain data for which all zeroes is a valid value.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = mem::size_of_val(&control) as _;

    // SAFETY: every pointer in `header` is to a local or to `buffer`, with its true length, and all
    // of them outlive the call.
    let got = unsafe {
        libc::recvmsg(
            socket.as_raw_fd(),
            &raw mut header,
            libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT,
        )
    };
    let bytes = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;

    let mut fds = Vec::new();
    // SAFETY: the kernel filled `control` and set `msg_controllen` to what it used; FIRSTHDR and
    // NXTHDR stay inside that.
    let mut message = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !message.is_null() {
        // SAFETY: not null, so it points to a whole header inside `control` (see above).
        let (level, kind, len) = unsafe {
            (
                (*message).cmsg_level,
                (*message).cmsg_type,
                (*message).cmsg_len as usize,
            )
        };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            // SAFETY: CMSG_LEN is arithmetic; CMSG_DATA points right behind the header.
            let (data, head) = unsafe { (libc::CMSG_DATA(message), libc::CMSG_LEN(0) as usize) };
            let count = len.saturating_sub(head) / mem::size_of::<libc::c_int>();
            for index in 0..count {
                // SAFETY: the kernel wrote `count` descriptors there; each was installed for us by
                // this very call, so nobody else owns it.
                fds.push(unsafe {
                    OwnedFd::from_raw_fd(ptr::read_unaligned(data.cast::<libc::c_int>().add(index)))
                });
            }
        }
        // SAFETY: as for CMSG_FIRSTHDR.
        message = unsafe { libc::CMSG_NXTHDR(&raw const header, message) };
    }
    Ok(Received {
        bytes,
        fds,
        fds_lost: header.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// Writes some of `bytes` to a local socket, `fds` with the first of them. A peer that is gone is an
/// error and no signal.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[impl AsRawFd]) -> io::Result<usize> {
    let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights };
    Ok(sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?)
}

/// The supplementary groups of the process that connected (`SO_PEERGROUPS`). The credentials
/// themselves name only its primary group, and an operator is usually in ours by membership.
pub fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<libc::gid_t>> {
    let mut groups = vec![0; 64];
    // The second try has the size the kernel asked for.
    for _ in 0..2 {
        let mut len = libc::socklen_t::try_from(mem::size_of_val(&groups[..])).unwrap_or(0);
        // SAFETY: `len` is the size in bytes of what `groups` owns, and the kernel writes no more.
        let failed = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut len,
            )
        } != 0;
        let error = io::Error::last_os_error();
        let count = len as usize / mem::size_of::<libc::gid_t>();
        groups.resize(count, 0);
        if !failed {
            return Ok(groups);
        }
        if error.raw_os_error() != Some(libc::ERANGE) {
            return Err(error);
        }
    }
    Err(io::Error::from_raw_os_error(libc::ERANGE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn descriptors_arrive_in_order_and_close_on_exec() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (a, _b) = UnixStream::pair().unwrap();
        assert_eq!(
            send(theirs.as_fd(), b" ", &[a.as_fd(), ours.as_fd()]).unwrap(),
            1
        );
        let mut buffer = [0; 16];
        let got = receive(ours.as_fd(), &mut buffer).unwrap();
        assert_eq!((got.bytes, got.fds.len(), got.fds_lost), (1, 2, false));
        let stat = |fd: BorrowedFd<'_>| nix::sys::stat::fstat(fd).unwrap().st_ino;
        assert_eq!(stat(got.fds[0].as_fd()), stat(a.as_fd()));
        assert_eq!(stat(got.fds[1].as_fd()), stat(ours.as_fd()));
        let flags = nix::fcntl::fcntl(&got.fds[0], nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, libc::FD_CLOEXEC);
    }

    #[test]
    fn plain_bytes_bring_no_descriptor_and_the_end_is_zero_bytes() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut buffer = [0; 16];
        let empty = receive(ours.as_fd(), &mut buffer).unwrap_err();
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
        theirs.write_all(b"abc").unwrap();
        let got = receive(ours.as_fd(), &mut buffer).unwrap();
        assert_eq!((got.bytes, got.fds.len()), (3, 0));
        drop(theirs);
        assert_eq!(receive(ours.as_fd(), &mut buffer).unwrap().bytes, 0);
    }

    #[test]
    fn groups_of_the_peer_are_ours_when_the_peer_is_us() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut want: Vec<_> = nix::unistd::getgroups()
            .unwrap()
            .into_iter()
            .map(nix::unistd::Gid::as_raw)
            .collect();
        let mut got = peer_groups(ours.as_fd()).unwrap();
        want.sort_unstable();
        got.sort_unstable();
        assert_eq!(got, want);
    }
}
