//! A channel into memory: what is written is read back, in order. Never blocks.
//!
//! The memory is a memfd and not a `Vec`, so that the kernel does the copying: a source whose file was
//! truncated is then `EFAULT` and not a signal, and no reference to live pages is needed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{Channel, Features, Shutdown, WriteFlags, refuse_all_but_plain};
use crate::region::{Span, SpanMut};
use crate::sys::msg::{self, IovBuf};

/// A [`Channel`] that keeps what is written until it is read. Reading past that is the end of the
/// stream.
#[derive(Debug)]
pub struct BufferChannel {
    memory: OwnedFd,
    bytes_max: u64,
    written_bytes: u64,
    read_bytes: u64,
    write_ended: bool,
    read_ended: bool,
    iov: IovBuf,
}

impl BufferChannel {
    /// An empty buffer that takes at most `bytes_max` bytes in its life; beyond, writes are
    /// `StorageFull`.
    pub fn new(bytes_max: u64) -> io::Result<Self> {
        Ok(Self {
            memory: memfd_create(c"memferry-buffer", MFdFlags::MFD_CLOEXEC)?,
            bytes_max,
            written_bytes: 0,
            read_bytes: 0,
            write_ended: false,
            read_ended: false,
            iov: IovBuf::new(),
        })
    }

    /// Bytes written so far.
    #[must_use]
    pub fn written_bytes(&self) -> u64 {
        self.written_bytes
    }
}

impl Channel for BufferChannel {
    fn features(&self) -> Features {
        Features::SHUTDOWN
    }

    fn writev(
        &mut self,
        iov: &[Span<'_>],
        fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> io::Result<usize> {
        refuse_all_but_plain(self.features(), iov, fds, flags)?;
        if self.write_ended {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let room = self.bytes_max - self.written_bytes;
        let gather = self
            .iov
            .gather(iov, usize::try_from(room).unwrap_or(usize::MAX));
        if gather.bytes() == 0 {
            if room == 0 && !iov.iter().all(Span::is_empty) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            return Ok(0);
        }
        let written = msg::pwritev(self.memory.as_fd(), &gather, self.written_bytes)?;
        self.written_bytes += written as u64;
        Ok(written)
    }

    fn readv(&mut self, iov: &[SpanMut<'_>], _fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        let scatter = self.iov.scatter(iov);
        if self.read_ended || scatter.is_empty() {
            return Ok(0);
        }
        let read = msg::preadv(self.memory.as_fd(), &scatter, self.read_bytes)?;
        self.read_bytes += read as u64;
        Ok(read)
    }

    fn wait_readable(&mut self, _timeout: Duration) -> io::Result<bool> {
        Ok(true) // there are bytes, or it is the end
    }

    fn shutdown(&mut self, how: Shutdown) -> io::Result<()> {
        self.write_ended |= how != Shutdown::Read;
        self.read_ended |= how != Shutdown::Write;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_buffer_says_so() {
        let mut buffer = BufferChannel::new(3).unwrap();
        let span = [Span::of_slice(b"abcde")];
        assert_eq!(buffer.writev(&span, &[], WriteFlags::NONE).unwrap(), 3);
        let error = buffer.writev(&span, &[], WriteFlags::NONE).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(buffer.written_bytes(), 3);
    }
}
