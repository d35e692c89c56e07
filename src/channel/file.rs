//! Files and pipes, read and written in order at the descriptor's position.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::PollFlags;
use nix::sys::stat::{SFlag, fstat};

use super::{Channel, Features, Patience, Shutdown, WriteFlags, refuse_all_but_plain, wait};
use crate::region::{Span, SpanMut};
use crate::sys::msg::{self, IovBuf};

/// A [`Channel`] over one descriptor to read, one to write, or both.
///
/// Waiting for a pipe ends as everywhere; a regular file is always ready, and its own waits for the
/// disk have no deadline.
#[derive(Debug)]
pub struct FileChannel {
    from: Option<OwnedFd>,
    to: Option<OwnedFd>,
    patience: Patience,
    iov: IovBuf,
}

impl FileChannel {
    /// A channel that reads `fd`.
    ///
    /// A pipe is made non-blocking, which everybody who shares its open file sees.
    pub fn reading(fd: OwnedFd, patience: Patience) -> io::Result<Self> {
        Self::new(Some(fd), None, patience)
    }

    /// A channel that writes `fd`; otherwise as [`FileChannel::reading`].
    pub fn writing(fd: OwnedFd, patience: Patience) -> io::Result<Self> {
        Self::new(None, Some(fd), patience)
    }

    /// A channel that reads `from` and writes `to`; otherwise as [`FileChannel::reading`].
    pub fn both(from: OwnedFd, to: OwnedFd, patience: Patience) -> io::Result<Self> {
        Self::new(Some(from), Some(to), patience)
    }

    fn new(from: Option<OwnedFd>, to: Option<OwnedFd>, patience: Patience) -> io::Result<Self> {
        for fd in [&from, &to].into_iter().flatten() {
            let kind = fstat(fd)?.st_mode & SFlag::S_IFMT.bits();
            if kind == SFlag::S_IFIFO.bits() {
                let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
                fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
            }
        }
        Ok(Self {
            from,
            to,
            patience,
            iov: IovBuf::new(),
        })
    }
}

impl Channel for FileChannel {
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
        let Some(to) = &self.to else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        loop {
            let gather = self.iov.gather(iov, usize::MAX);
            match msg::writev(to.as_fd(), &gather) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wait::ready(to.as_fd(), PollFlags::POLLOUT, &self.patience, "writing")?;
                }
                result => return result,
            }
        }
    }

    fn readv(&mut self, iov: &[SpanMut<'_>], _fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        let Some(from) = &self.from else {
            return Ok(0);
        };
        loop {
            let scatter = self.iov.scatter(iov);
            match msg::readv(from.as_fd(), &scatter) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wait::ready(from.as_fd(), PollFlags::POLLIN, &self.patience, "reading")?;
                }
                result => return result,
            }
        }
    }

    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool> {
        let Some(from) = &self.from else {
            return Ok(true);
        };
        let deadline = wait::after(timeout);
        let wake = &self.patience.wake;
        let got = wait::poll_until(from.as_fd(), PollFlags::POLLIN, wake, deadline)?;
        Ok(got.is_some())
    }

    /// Ending a direction closes its descriptor: the reader of a pipe sees the end.
    fn shutdown(&mut self, how: Shutdown) -> io::Result<()> {
        if how != Shutdown::Write {
            self.from = None;
        }
        if how != Shutdown::Read {
            self.to = None;
        }
        Ok(())
    }
}
