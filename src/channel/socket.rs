//! A connected stream socket: TCP over IPv4 and IPv6, AF_UNIX, vsock.
//!
//! With zero copy, pages are lent by `MSG_ZEROCOPY` and come back through the socket's error queue.
//! The rules kept here: every wait can be woken and has a deadline on lack of progress, no state of
//! the socket makes a wait spin, and a refusal to pin memory is drained, split or copied, never fatal.
//! What is on loan is `loans`' business, which number that is `ledger`'s.

use std::borrow::Cow;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{
    self, setsockopt,
    sockopt::{SndBuf, TcpNoDelay},
};

use super::copies;
use super::loans::Loans;
use super::wait::{self, GONE, Stall};
use super::{
    Channel, Features, Flush, Patience, Shutdown, Suspect, Woken, WriteFlags, refuse_descriptors,
    refuse_loan,
};
use crate::region::{Span, SpanMut};
use crate::sys::errqueue;
use crate::sys::msg::{self, IovBuf, Sending};
use crate::sys::wake::Wake;

/// Smallest piece that is still lent when the kernel refuses to pin more, in bytes. Pinning and the
/// notice cost as much as copying this much.
pub(super) const LEND_BYTES_MIN: usize = 64 * 1024;

/// How long a dropped channel waits for its memory after the reset.
pub(super) const DROP_PATIENCE: Duration = Duration::from_millis(100);

/// Pauses between looks at the error queue of a socket that can no longer be polled.
pub(super) const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(20);

/// A [`Channel`] over a connected stream socket.
///
/// Dropping it with memory on loan resets the connection, so that the memory comes back: `flush`
/// first if the data matters.
#[derive(Debug)]
pub struct SocketChannel {
    pub(super) fd: OwnedFd,
    pub(super) patience: Patience,
    features: Features,
    is_tcp: bool,
    zero_copy_refusal: Option<Cow<'static, str>>,
    loans: Loans,
    iov: IovBuf,
    /// Largest piece to lend, lowered when the kernel refuses and tried anew after each flush.
    lend_bytes_max: usize,
    /// Where that starts anew.
    lend_bytes_cap: usize,
    copied_by_us_bytes: u64,
    /// Times the kernel would not pin what was to be lent.
    refusals: u64,
    /// What ended the connection. Remembered, because the kernel tells it once.
    pub(super) lost: Option<Errno>,
    /// We threw the connection away ourselves.
    pub(super) is_reset: bool,
}

impl SocketChannel {
    /// A channel over the connected stream socket `fd`; `zero_copy` says whether it is wanted.
    ///
    /// Where the socket has no zero copy the channel works with plain sends, and
    /// [`zero_copy_refusal`](Self::zero_copy_refusal) says why. Fails if `fd` is not a socket.
    pub fn new(fd: OwnedFd, patience: Patience, zero_copy: bool) -> io::Result<Self> {
        let family = errqueue::family(fd.as_fd())?;
        let is_tcp = matches!(family, libc::AF_INET | libc::AF_INET6);
        if is_tcp {
            // Headers are small and must not wait for the payload of the next packet.
            setsockopt(&fd, TcpNoDelay, &true)?;
        }
        let mut features = Features::SHUTDOWN;
        if family == libc::AF_UNIX {
            features = features.with(Features::FD_PASS);
        }
        let mut zero_copy_refusal = None;
        if zero_copy {
            zero_copy_refusal = copies::request_zero_copy(fd.as_fd(), family);
            if zero_copy_refusal.is_none() {
                features = features.with(Features::WRITE_ZERO_COPY);
            }
        }
        Ok(Self {
            fd,
            patience,
            features,
            is_tcp,
            zero_copy_refusal,
            loans: Loans::default(),
            iov: IovBuf::new(),
            lend_bytes_max: usize::MAX,
            lend_bytes_cap: usize::MAX,
            copied_by_us_bytes: 0,
            refusals: 0,
            lost: None,
            is_reset: false,
        })
    }

    /// Why zero copy was asked for and is not there, in words for an operator.
    #[must_use]
    pub fn zero_copy_refusal(&self) -> Option<&str> {
        self.zero_copy_refusal.as_deref()
    }

    /// Bytes written with `ZERO_COPY` that this channel sent plainly, because the kernel would not pin
    /// even a small piece. `flush` counts each such send as copied.
    #[must_use]
    pub fn copied_by_us_bytes(&self) -> u64 {
        self.copied_by_us_bytes
    }

    /// Zero-copy sends not back.
    #[must_use]
    pub fn outstanding(&self) -> u64 {
        self.loans.outstanding()
    }

    /// How long waits last, for tests that need both.
    #[cfg(test)]
    pub(super) fn patience_mut(&mut self) -> &mut Patience {
        &mut self.patience
    }

    /// A loan that the kernel knows nothing of and never gives back.
    #[cfg(test)]
    pub(super) fn lend_for_ever(&mut self) {
        self.loans.lend();
    }

    /// Keeps what is on loan below about `bytes`: the kernel charges a call's whole length while it is
    /// under way, and what the socket queues until it is acknowledged.
    pub fn limit_loans(&mut self, bytes: usize) -> io::Result<()> {
        self.lend_bytes_cap = (bytes / 4).max(LEND_BYTES_MIN);
        self.lend_bytes_max = self.lend_bytes_cap;
        // The kernel doubles the number.
        Ok(setsockopt(&self.fd, SndBuf, &(bytes / 4))?)
    }

    /// Sends some of `iov`, at most `limit` bytes, waiting while the socket is full.
    fn send(
        &mut self,
        iov: &[Span<'_>],
        limit: usize,
        fds: &[BorrowedFd<'_>],
        sending: Sending,
    ) -> io::Result<usize> {
        let mut stall = None;
        loop {
            let gather = self.iov.gather(iov, limit);
            if gather.bytes() == 0 {
                // The kernel neither sends nor numbers an empty call.
                return Ok(0);
            }
            match msg::send(self.fd.as_fd(), &gather, fds, sending) {
                Ok(sent) => return Ok(sent),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => {
                        self.wait(PollFlags::POLLOUT, &mut stall, "sending")?;
                    }
                    _ => return Err(self.note_loss(error)),
                },
            }
        }
    }

    /// Lends some of `iov`. The kernel refuses with `ENOBUFS` for two reasons that it does not tell
    /// apart: too much memory pinned (`RLIMIT_MEMLOCK`, per user) or too many unread notices
    /// (`net.core.optmem_max`). Both get better when our loans come back; with none of ours
    /// outstanding no notice would ever come, so the piece is made smaller, and at last copied.
    fn lend(&mut self, iov: &[Span<'_>]) -> io::Result<usize> {
        self.loans.hold(iov);
        if self.loans.reap_is_due() {
            self.loans.reap(self.fd.as_fd())?;
        }
        loop {
            match self.send(iov, self.lend_bytes_max, &[], Sending::Lend) {
                Ok(0) => return Ok(0),
                Ok(sent) => {
                    self.loans.lend();
                    return Ok(sent);
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => return Err(error),
            }
            self.refusals += 1;
            if self.loans.reap(self.fd.as_fd())? {
                continue;
            }
            if let Some(fewer) = self.loans.outstanding().checked_sub(1) {
                self.collect(fewer)?;
                continue;
            }
            let bytes = iov.iter().map(Span::len).fold(0, usize::saturating_add);
            let refused = bytes.min(self.lend_bytes_max);
            if refused / 2 >= LEND_BYTES_MIN {
                self.lend_bytes_max = refused / 2;
                continue;
            }
            let sent = self.send(iov, refused, &[], Sending::Copy)?;
            self.loans.copied_at_once();
            self.copied_by_us_bytes += sent as u64;
            return Ok(sent);
        }
    }

    /// Waits until one of `events` shows or the connection hangs up, and takes notices meanwhile.
    /// `stall` lives as long as the caller's whole wait.
    pub(super) fn wait(
        &mut self,
        events: PollFlags,
        stall: &mut Option<Stall>,
        what: &str,
    ) -> io::Result<()> {
        let timeout = self.patience.stall_timeout;
        let called_again = stall.is_some();
        // Most waits are short, and the queue is only looked at in long ones.
        let stall = stall.get_or_insert_with(|| Stall::begin(timeout, None));
        if called_again {
            // The socket said it was ready and was not: the kernel is short of memory for it.
            self.pause()?;
            stall.check(self.queued_bytes(), what)?;
        }
        loop {
            let look = stall.next_look();
            match wait::poll_until(self.fd.as_fd(), events, &self.patience.wake, look)? {
                None => stall.check(self.queued_bytes(), what)?,
                Some(got) => match self.explain(got, events)? {
                    Cause::Ready => return Ok(()),
                    Cause::Released => stall.progressed(),
                    Cause::Unknown => {
                        self.pause()?;
                        stall.check(self.queued_bytes(), what)?;
                    }
                },
            }
        }
    }

    /// What woke a poll. `POLLERR` stays until its cause is taken away: notices are taken here, and so
    /// is the socket's error if no call of the caller would meet it.
    fn explain(&mut self, got: PollFlags, events: PollFlags) -> io::Result<Cause> {
        let released = got.contains(PollFlags::POLLERR) && self.loans.reap(self.fd.as_fd())?;
        if got.intersects(events | PollFlags::POLLHUP) {
            return Ok(Cause::Ready);
        }
        if released {
            return Ok(Cause::Released);
        }
        match errqueue::take_error(self.fd.as_fd())? {
            Some(error) => Err(self.note_loss(error)),
            None => Ok(Cause::Unknown),
        }
    }

    /// Keeps a loop that the kernel gives no reason to wait in from spinning.
    fn pause(&self) -> io::Result<()> {
        if self.patience.wake.wait(PAUSE_MIN) {
            return Err(Woken::error());
        }
        Ok(())
    }

    /// Waits until at most `outstanding` sends are on loan. A lost connection is noted, and its memory
    /// is waited for all the same.
    fn collect(&mut self, outstanding: u64) -> io::Result<()> {
        const WHAT: &str = "waiting for the kernel to release lent memory";
        let mut stall = Stall::begin(self.patience.stall_timeout, self.queued_bytes());
        // A hang-up shows at every poll, so from then on we look at the queue in intervals.
        let mut pause = None;
        loop {
            if self.loans.is_broken() {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "a notice about lent memory was lost or contradicted itself; \
                     what the kernel still holds is not known",
                ));
            }
            let progress = self.loans.reap(self.fd.as_fd())?;
            if self.loans.outstanding() <= outstanding {
                return Ok(());
            }
            if progress {
                stall.progressed();
            }
            if let Some(length) = pause {
                if self.patience.wake.wait(length) {
                    return Err(Woken::error());
                }
                pause = Some((length * 2).min(PAUSE_MAX));
                stall.check(self.queued_bytes(), WHAT)?;
                continue;
            }
            let look = stall.next_look();
            let wake = &self.patience.wake;
            match wait::poll_until(self.fd.as_fd(), PollFlags::empty(), wake, look)? {
                None => stall.check(self.queued_bytes(), WHAT)?,
                Some(_) if self.loans.reap(self.fd.as_fd())? => stall.progressed(),
                Some(_) => {
                    if let Some(error) = errqueue::take_error(self.fd.as_fd())? {
                        self.note_loss(error);
                    }
                    pause = Some(PAUSE_MIN);
                }
            }
        }
    }

    /// Remembers the first error that says the connection is gone, and returns it from then on.
    pub(super) fn note_loss(&mut self, error: io::Error) -> io::Error {
        let errno = error.raw_os_error().map(Errno::from_raw);
        match errno.filter(|errno| GONE.contains(errno)) {
            Some(errno) => (*self.lost.get_or_insert(errno)).into(),
            None => error,
        }
    }
}

/// What a poll found.
enum Cause {
    /// The caller's next call will not block.
    Ready,
    /// Lent memory came back.
    Released,
    /// An error that went away by itself, or a foreign message on the error queue.
    Unknown,
}

impl Channel for SocketChannel {
    fn features(&self) -> Features {
        self.features
    }

    /// On an error with `ZERO_COPY` nothing more was lent than earlier calls said.
    fn writev(
        &mut self,
        iov: &[Span<'_>],
        fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> io::Result<usize> {
        if flags.contains(WriteFlags::ZERO_COPY) {
            refuse_loan(self.features, iov, fds)?;
            return self.lend(iov);
        }
        refuse_descriptors(self.features, fds)?;
        if !fds.is_empty() && iov.iter().all(Span::is_empty) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "descriptors need at least one byte to travel with",
            ));
        }
        let sending = match flags.contains(WriteFlags::MORE) {
            true => Sending::CopyWithMore,
            false => Sending::Copy,
        };
        self.send(iov, usize::MAX, fds, sending)
    }

    fn readv(&mut self, iov: &[SpanMut<'_>], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        let takes_fds = self.features.contains(Features::FD_PASS);
        let mut stall = None;
        loop {
            let scatter = self.iov.scatter(iov);
            if scatter.is_empty() {
                return Ok(0);
            }
            let fds = takes_fds.then_some(&mut *fds);
            match msg::receive(self.fd.as_fd(), &scatter, fds) {
                // Once the error was taken the kernel calls a reset an end of stream. It is not.
                Ok(0) => return self.lost.map_or(Ok(0), |errno| Err(errno.into())),
                Ok(received) => return Ok(received),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => {
                        // The peer's end shows as POLLIN, too.
                        self.wait(PollFlags::POLLIN, &mut stall, "receiving")?;
                    }
                    _ => return Err(self.note_loss(error)),
                },
            }
        }
    }

    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool> {
        let events = PollFlags::POLLIN;
        let deadline = wait::after(timeout);
        loop {
            match wait::poll_until(self.fd.as_fd(), events, &self.patience.wake, deadline)? {
                None => return Ok(false),
                Some(got) => match self.explain(got, events)? {
                    Cause::Ready => return Ok(true),
                    Cause::Released => {}
                    Cause::Unknown => self.pause()?,
                },
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
        }
    }

    /// See the trait. Over TCP, released means that the peer's kernel has acknowledged the bytes, or
    /// that the connection is gone: so if it is gone this is an error (the data did not get through),
    /// but one that comes after all memory is back. Two errors leave memory on loan: `TimedOut` and
    /// [`Woken`]; then `shutdown(Reset)` and another `flush`, which speaks about the memory alone and
    /// succeeds once it is back.
    fn flush(&mut self) -> io::Result<Flush> {
        if !self.loans.is_owed() && !self.loans.is_broken() {
            return Ok(Flush::NOTHING_OWED);
        }
        self.collect(0)?;
        if let Some(error) = errqueue::take_error(self.fd.as_fd())? {
            self.note_loss(error);
        }
        let counts = self.loans.settle();
        self.lend_bytes_max = self.lend_bytes_cap;
        match self.lost {
            Some(errno) if !self.is_reset => Err(errno.into()),
            _ => Ok(counts),
        }
    }

    /// See the trait. May be repeated, also after the peer is gone.
    fn shutdown(&mut self, how: Shutdown) -> io::Result<()> {
        let how = match how {
            Shutdown::Read => socket::Shutdown::Read,
            Shutdown::Write => socket::Shutdown::Write,
            Shutdown::Reset => {
                self.is_reset = true;
                // What is waited for from now on is the kernel giving memory back; whoever ended our
                // waits before wants just that. Without a descriptor for it the old wake has to do.
                if let Ok(wake) = Wake::new() {
                    self.patience.wake = wake;
                }
                if self.is_tcp {
                    return errqueue::disconnect(self.fd.as_fd());
                }
                socket::Shutdown::Both
            }
        };
        match socket::shutdown(self.fd.as_raw_fd(), how) {
            Err(Errno::ENOTCONN) if self.is_reset || self.lost.is_some() => Ok(()),
            result => Ok(result?),
        }
    }

    fn released(&self) -> Flush {
        self.loans.totals()
    }

    fn zero_copy_trouble(&self, all_copied: bool) -> Option<String> {
        copies::trouble(self.fd.as_fd(), self.refusals > 0, all_copied)
    }

    fn queued_bytes(&self) -> Option<u64> {
        // After a reset the kernel's number means nothing.
        if self.is_reset {
            return None;
        }
        errqueue::unacknowledged(self.fd.as_fd()).ok()
    }

    fn suspect(&self, quiet: Duration) -> Suspect {
        Suspect::of(self.fd.as_fd(), quiet)
    }
}

impl Drop for SocketChannel {
    /// With memory on loan: resets the connection and waits a moment for it. What does not come back
    /// stays mapped; see `loans`.
    fn drop(&mut self) {
        if self.loans.outstanding() == 0 || self.loans.is_broken() {
            return;
        }
        // Fails only where there is nothing to reset; then the wait below decides.
        let _ = self.shutdown(Shutdown::Reset);
        let deadline = Instant::now() + DROP_PATIENCE;
        while self.loans.reap(self.fd.as_fd()).is_ok()
            && self.loans.outstanding() > 0
            && Instant::now() < deadline
        {
            thread::sleep(PAUSE_MIN);
        }
    }
}
