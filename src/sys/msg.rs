//! `sendmsg` and `recvmsg` over raw spans, and their like for files.
//!
//! nix has these calls only for `IoSlice`, which is a `&[u8]`, and no `&[u8]` may exist over memory
//! that others write (rule 10). Here a [`Gather`] or [`Scatter`] holds the spans of one call; the
//! kernel does the reading and writing, and answers `EFAULT` where a mapping has lost its pages.
//!
//! Nothing here waits, retries or counts: that is the channels' business.
#![allow(unsafe_code)] // Raw system calls over raw memory; each one argued below.

use std::ffi::c_int;
use std::io;
use std::marker::PhantomData;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::limits::IOV_MAX;
use crate::region::{Span, SpanMut};

/// Descriptors in one message: the kernel's `SCM_MAX_FD`.
pub const FDS_MAX: usize = 253;

const CMSG_HEADER: usize = size_of::<libc::cmsghdr>();
const CMSG_ALIGN: usize = size_of::<usize>();
/// Room for [`FDS_MAX`] descriptors.
const FDS_CONTROL: usize =
    CMSG_HEADER + (FDS_MAX * size_of::<RawFd>()).next_multiple_of(CMSG_ALIGN);
// `ControlMessages` reads the headers bytewise and relies on this layout.
const _: () = assert!(CMSG_HEADER == 16 && CMSG_ALIGN == 8);
const _: () = assert!(offset_of!(libc::cmsghdr, cmsg_len) == 0);
const _: () = assert!(offset_of!(libc::cmsghdr, cmsg_level) == 8);
const _: () = assert!(offset_of!(libc::cmsghdr, cmsg_type) == 12);

/// Storage for the spans of one call, kept from call to call so that none of them allocates.
#[derive(Debug, Default)]
pub struct IovBuf(Vec<libc::iovec>);

// SAFETY: the pointers are those of the last call, and nothing reads them: `gather` and `scatter`
// clear the vector before they hand it out again.
unsafe impl Send for IovBuf {}

impl IovBuf {
    /// An empty buffer; allocates at first use.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// The spans of a write: at most [`IOV_MAX`] of them and at most `limit` bytes, without empty
    /// ones.
    pub fn gather<'a>(&'a mut self, spans: &[Span<'a>], limit: usize) -> Gather<'a> {
        self.0.clear();
        let mut left = limit;
        for span in spans {
            let span = span.take(left);
            if !span.is_empty() {
                self.0.push(libc::iovec {
                    iov_base: span.base().cast_mut().cast(),
                    iov_len: span.len(),
                });
                left -= span.len();
            }
            if left == 0 || self.0.len() == IOV_MAX {
                break;
            }
        }
        Gather {
            iov: &self.0,
            bytes: limit - left,
        }
    }

    /// The spans of a read: at most [`IOV_MAX`] of them, without empty ones.
    pub fn scatter<'a>(&'a mut self, spans: &'a [SpanMut<'_>]) -> Scatter<'a> {
        self.0.clear();
        let spans = spans.iter().filter(|span| !span.is_empty()).take(IOV_MAX);
        self.0.extend(spans.map(|span| libc::iovec {
            iov_base: span.base().cast(),
            iov_len: span.len(),
        }));
        Scatter {
            iov: &self.0,
            borrowed: PhantomData,
        }
    }
}

/// Memory that one call may read. Made by [`IovBuf::gather`], which establishes what the calls below
/// rely on: every entry is a Span that is borrowed for `'a`, so its owner keeps it mapped.
#[derive(Debug)]
pub struct Gather<'a> {
    iov: &'a [libc::iovec],
    bytes: usize,
}

impl Gather<'_> {
    /// Bytes in all.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// As the kernel takes them.
    pub(super) fn entries(&self) -> &[libc::iovec] {
        self.iov
    }
}

/// Memory that one call may write. Made by [`IovBuf::scatter`], which establishes what the calls
/// below rely on: every entry is a `SpanMut` that is borrowed for `'a`, so it stays valid for writes.
#[derive(Debug)]
pub struct Scatter<'a> {
    iov: &'a [libc::iovec],
    borrowed: PhantomData<&'a SpanMut<'a>>,
}

impl Scatter<'_> {
    /// Whether there is no room for a single byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.iov.is_empty()
    }
}

/// What the kernel does with the memory of a send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sending {
    /// Copies it before the call returns.
    Copy,
    /// The same, and may hold it back for what follows at once (`MSG_MORE`).
    CopyWithMore,
    /// Keeps references to the pages until it reports them released (`MSG_ZEROCOPY`).
    Lend,
}

/// Sends some of `gather` without blocking, `fds` with its first byte.
///
/// The caller sees `WouldBlock`, `Interrupted` and `ENOBUFS`. More than [`FDS_MAX`] descriptors are
/// `InvalidInput`. A broken connection is `EPIPE`, never a signal.
pub fn send(
    socket: BorrowedFd<'_>,
    gather: &Gather<'_>,
    fds: &[BorrowedFd<'_>],
    sending: Sending,
) -> io::Result<usize> {
    if fds.len() > FDS_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "{} descriptors in one message, at most {FDS_MAX}",
                fds.len()
            ),
        ));
    }
    let mut control = Vec::new();
    if !fds.is_empty() {
        let data = size_of_val(fds);
        control.extend_from_slice(&(CMSG_HEADER + data).to_ne_bytes());
        control.extend_from_slice(&libc::SOL_SOCKET.to_ne_bytes());
        control.extend_from_slice(&libc::SCM_RIGHTS.to_ne_bytes());
        for fd in fds {
            control.extend_from_slice(&fd.as_raw_fd().to_ne_bytes());
        }
        control.resize(CMSG_HEADER + data.next_multiple_of(CMSG_ALIGN), 0);
    }
    let mut header = empty_header();
    header.msg_iov = gather.iov.as_ptr().cast_mut();
    header.msg_iovlen = gather.iov.len();
    if !control.is_empty() {
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = control.len();
    }
    let flags = libc::MSG_DONTWAIT
        | libc::MSG_NOSIGNAL
        | match sending {
            Sending::Copy => 0,
            Sending::CopyWithMore => libc::MSG_MORE,
            Sending::Lend => libc::MSG_ZEROCOPY,
        };
    // SAFETY: the iovec and control pointers are of live values of the lengths given, and `gather`
    // keeps the spans mapped for the call. Beyond the call the kernel holds its own references to
    // lent pages, so unmapping them cannot corrupt memory; what must not happen is reuse, and the
    // channel's ledger sees to that.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, flags) };
    byte_count(sent)
}

/// Receives some bytes without blocking; 0 is the end of the stream. With `fds`, descriptors that
/// came along are appended to it, close-on-exec; without, the kernel closes them.
///
/// If the kernel could not deliver all descriptors (too many, or our table is full), those that came
/// are closed and the error says so; the bytes are lost with them.
pub fn receive(
    socket: BorrowedFd<'_>,
    scatter: &Scatter<'_>,
    fds: Option<&mut Vec<OwnedFd>>,
) -> io::Result<usize> {
    let mut control = Control([0; FDS_CONTROL]);
    let mut header = empty_header();
    header.msg_iov = scatter.iov.as_ptr().cast_mut();
    header.msg_iovlen = scatter.iov.len();
    if fds.is_some() {
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = control.0.len();
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: `control` is writable for the length given, and `scatter` holds spans that stay valid
    // for writes during the call.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    let received = byte_count(received)?;
    let Some(fds) = fds else {
        return Ok(received);
    };
    let mut came = Vec::new();
    for message in ControlMessages(&control.0[..header.msg_controllen]) {
        if (message.level, message.kind) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            for raw in message.data.chunks_exact(size_of::<RawFd>()) {
                let raw = RawFd::from_ne_bytes([raw[0], raw[1], raw[2], raw[3]]);
                // SAFETY: the kernel has just installed this descriptor for this message, and the
                // message is read once: nobody else owns it.
                came.push(unsafe { OwnedFd::from_raw_fd(raw) });
            }
        }
    }
    if header.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(io::Error::other(format!(
            "descriptors sent by the peer could not all be received ({} came); \
             the limit on open files may be too low",
            came.len()
        )));
    }
    fds.append(&mut came);
    Ok(received)
}

/// Receives until `scatter` is full, blocking; fewer bytes only at the end of the stream.
pub fn receive_all(socket: BorrowedFd<'_>, scatter: &Scatter<'_>) -> io::Result<usize> {
    let mut header = empty_header();
    header.msg_iov = scatter.iov.as_ptr().cast_mut();
    header.msg_iovlen = scatter.iov.len();
    // SAFETY: `scatter` holds spans that stay valid for writes during the call.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_WAITALL) };
    byte_count(received)
}

/// Writes some of `gather` at the descriptor's position.
pub fn writev(fd: BorrowedFd<'_>, gather: &Gather<'_>) -> io::Result<usize> {
    // SAFETY: `gather` keeps the spans mapped for the call, and the kernel is done with them after it.
    let written =
        unsafe { libc::writev(fd.as_raw_fd(), gather.iov.as_ptr(), iov_count(gather.iov)) };
    byte_count(written)
}

/// Reads some bytes at the descriptor's position; 0 is the end.
pub fn readv(fd: BorrowedFd<'_>, scatter: &Scatter<'_>) -> io::Result<usize> {
    // SAFETY: `scatter` holds spans that stay valid for writes during the call.
    let read = unsafe { libc::readv(fd.as_raw_fd(), scatter.iov.as_ptr(), iov_count(scatter.iov)) };
    byte_count(read)
}

/// Writes some of `gather` at `offset`, in bytes, and leaves the descriptor's position alone.
pub fn pwritev(fd: BorrowedFd<'_>, gather: &Gather<'_>, offset: u64) -> io::Result<usize> {
    let (iov, count) = (gather.iov.as_ptr(), iov_count(gather.iov));
    // SAFETY: `gather` keeps the spans mapped for the call, and the kernel is done with them after it.
    let written = unsafe { libc::pwritev(fd.as_raw_fd(), iov, count, file_offset(offset)?) };
    byte_count(written)
}

/// Reads some bytes at `offset`, in bytes, and leaves the descriptor's position alone; 0 is the end.
pub fn preadv(fd: BorrowedFd<'_>, scatter: &Scatter<'_>, offset: u64) -> io::Result<usize> {
    let (iov, count) = (scatter.iov.as_ptr(), iov_count(scatter.iov));
    // SAFETY: `scatter` holds spans that stay valid for writes during the call.
    let read = unsafe { libc::preadv(fd.as_raw_fd(), iov, count, file_offset(offset)?) };
    byte_count(read)
}

/// A control buffer, aligned as the kernel's headers are.
#[repr(align(8))]
pub(super) struct Control<const N: usize>(pub(super) [u8; N]);

/// The control messages of one `recvmsg`; stops at the first header that does not fit.
pub(super) struct ControlMessages<'a>(pub(super) &'a [u8]);

pub(super) struct ControlMessage<'a> {
    pub(super) level: c_int,
    pub(super) kind: c_int,
    pub(super) data: &'a [u8],
}

impl<'a> Iterator for ControlMessages<'a> {
    type Item = ControlMessage<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        let (&length, rest) = self.0.split_first_chunk::<8>()?;
        let (&level, rest) = rest.split_first_chunk::<4>()?;
        let (&kind, _) = rest.split_first_chunk::<4>()?;
        let length = usize::from_ne_bytes(length);
        let data = self.0.get(CMSG_HEADER..length)?;
        self.0 = self
            .0
            .get(length.next_multiple_of(CMSG_ALIGN)..)
            .unwrap_or(&[]);
        Some(ControlMessage {
            level: c_int::from_ne_bytes(level),
            kind: c_int::from_ne_bytes(kind),
            data,
        })
    }
}

pub(super) fn empty_header() -> libc::msghdr {
    // SAFETY: all zero is a valid msghdr: null pointers with zero lengths.
    unsafe { std::mem::zeroed() }
}

/// At most [`IOV_MAX`], as `gather` and `scatter` made it.
fn iov_count(iov: &[libc::iovec]) -> c_int {
    c_int::try_from(iov.len()).unwrap_or(c_int::MAX)
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| invalid("a file offset beyond 2^63"))
}

pub(super) fn byte_count(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

pub(super) fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gather_stops_at_the_limits() {
        let bytes = [7u8; 10];
        let mut buf = IovBuf::new();
        let spans = vec![Span::of_slice(&bytes); IOV_MAX + 5];
        assert_eq!(buf.gather(&spans, usize::MAX).bytes(), IOV_MAX * 10);
        assert_eq!(buf.gather(&spans, 25).bytes(), 25);
        assert_eq!(buf.gather(&spans, 0).bytes(), 0);
        let empty = Span::of_slice(&[]);
        let gather = buf.gather(&[empty, Span::of_slice(&bytes), empty], usize::MAX);
        assert_eq!((gather.bytes(), gather.iov.len()), (10, 1));
    }
}
