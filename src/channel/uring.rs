//! A TCP socket whose loans go by io_uring: `SEND_ZC`, `SENDMSG_ZC`, and both with registered buffers.
//!
//! Everything but the loans is [`SocketChannel`]'s. One send is under way at a time, since two on one
//! socket may change places. The kernel carries on with it as the socket gets room, so a packet's payload
//! is one send with one notice. A send that a wake or a deadline has left under way is on loan as any other:
//! a reset ends it. Notices may be outstanding by the hundred, and come with the calls that send.
//!
//! The ring belongs to the thread that lends first. Used from another thread afterwards, the channel
//! answers with errors and keeps what is on loan mapped.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;

use super::copies;
use super::loans::Loans;
use super::registered::Registered;
use super::socket::{DROP_PATIENCE, LEND_BYTES_MIN, SocketChannel};
use super::wait::{Stall, poll_until};
use super::{
    Channel, Features, Flush, Patience, Shutdown, Suspect, Woken, WriteFlags, refuse_loan,
};
use crate::region::{Region, Span, SpanMut};
use crate::sys::errqueue;
use crate::sys::msg::IovBuf;
use crate::sys::uring::{Completion, Ring, Sending};

/// Most sends on loan at once. Each needs an entry in the completion queue for its notice and, while it
/// is under way, one for its result.
const LOANS_MAX: u32 = 512;

/// A [`Channel`] over a connected TCP socket that lends by io_uring.
///
/// Dropping it with memory on loan resets the connection; what does not come back then stays mapped and
/// registered until the process ends.
#[derive(Debug)]
pub struct UringChannel {
    socket: SocketChannel,
    ring: Ring,
    loans: Loans,
    /// A send has no result yet; how many bytes it has.
    under_way: Option<usize>,
    /// Sends that failed and whose notice is still to come.
    failed: Vec<u32>,
    registered: Registered,
    iov: IovBuf,
    /// Largest piece to lend, lowered when the kernel refuses and tried anew after each flush.
    lend_bytes_max: usize,
    /// Where that starts anew.
    lend_bytes_cap: usize,
    /// Times the kernel would not pin what was to be lent.
    refusals: u64,
    copied_by_us_bytes: u64,
}

impl UringChannel {
    /// A channel over the connected TCP socket `fd`. The memory of `regions` is registered at the first
    /// write with `REGISTERED`, as far as the kernel does that.
    ///
    /// Fails with the reason, and gives the socket back, where there is no such ring.
    pub fn new(
        fd: OwnedFd,
        patience: Patience,
        regions: Vec<Arc<Region>>,
    ) -> Result<Self, (OwnedFd, io::Error)> {
        let family = match errqueue::family(fd.as_fd()) {
            Ok(family) => family,
            Err(error) => return Err((fd, error)),
        };
        if !matches!(family, libc::AF_INET | libc::AF_INET6) {
            let text = "only TCP sockets have zero copy by io_uring";
            return Err((fd, io::Error::new(io::ErrorKind::Unsupported, text)));
        }
        let ring = match Ring::new(LOANS_MAX, &patience.wake) {
            Ok(ring) => ring,
            Err(error) => return Err((fd, error)),
        };
        // A copy of the descriptor, so that a failure below can give the socket back.
        let socket = fd
            .try_clone()
            .and_then(|copy| SocketChannel::new(copy, patience, false));
        match socket {
            Ok(socket) => Ok(Self {
                socket,
                ring,
                loans: Loans::default(),
                under_way: None,
                failed: Vec::new(),
                registered: Registered::of(regions),
                iov: IovBuf::new(),
                lend_bytes_max: usize::MAX,
                lend_bytes_cap: usize::MAX,
                refusals: 0,
                copied_by_us_bytes: 0,
            }),
            Err(error) => Err((fd, error)),
        }
    }

    /// Sends whose memory is not back.
    #[must_use]
    pub fn outstanding(&self) -> u64 {
        self.loans.outstanding()
    }

    /// Bytes written with `ZERO_COPY` that this channel sent plainly, because the kernel would not pin
    /// even a small piece.
    #[must_use]
    pub fn copied_by_us_bytes(&self) -> u64 {
        self.copied_by_us_bytes
    }

    /// What is registered, in bytes.
    #[must_use]
    pub fn registered_bytes(&self) -> u64 {
        self.registered.bytes()
    }

    /// How long waits last, for tests that need both.
    #[cfg(test)]
    pub(super) fn patience_mut(&mut self) -> &mut Patience {
        &mut self.socket.patience
    }

    /// A loan that the kernel knows nothing of and never gives back.
    #[cfg(test)]
    pub(super) fn lend_for_ever(&mut self) {
        self.loans.lend();
    }

    /// Keeps what is on loan below about `bytes`: the kernel charges a call's whole length while it is
    /// under way, and what the socket queues until it is acknowledged.
    pub fn limit_loans(&mut self, bytes: usize) -> io::Result<()> {
        self.socket.limit_loans(bytes)?;
        self.lend_bytes_cap = (bytes / 4).max(LEND_BYTES_MIN);
        self.lend_bytes_max = self.lend_bytes_cap;
        Ok(())
    }

    /// Lends `iov`, or the first part of it where it does not go in one send. Where the kernel does not want to pin more
    /// (`ENOMEM`: the memlock limit of the user) it gets better when our loans come back; with none
    /// outstanding the piece is made smaller, and at last copied.
    fn lend(&mut self, iov: &[Span<'_>], registered: bool) -> io::Result<usize> {
        self.loans.hold(iov);
        if self.loans.outstanding() >= u64::from(LOANS_MAX) {
            // Half of them, so that this is not the case again at once.
            self.collect(u64::from(LOANS_MAX / 2))?;
        }
        let bytes = iov.iter().map(Span::len).fold(0, usize::saturating_add);
        if bytes == 0 {
            return Ok(0);
        }
        if self.under_way.is_some() {
            // Its caller was told that the stream is of no further use.
            return Err(io::Error::other(
                "a send that was given up is still under way",
            ));
        }
        loop {
            let errno = match self.send(iov, registered)? {
                Ok(sent) => return Ok(sent),
                Err(errno) => errno,
            };
            match errno {
                Errno::EINTR => continue,
                Errno::ENOMEM | Errno::ENOBUFS => self.refusals += 1,
                Errno::EINVAL if self.learn_from_refusal(iov, registered) => continue,
                errno => return Err(self.socket.note_loss(errno.into())),
            }
            if self.reap()? {
                continue;
            }
            if let Some(fewer) = self.loans.outstanding().checked_sub(1) {
                self.collect(fewer)?;
                continue;
            }
            let refused = bytes.min(self.lend_bytes_max);
            if refused / 2 >= LEND_BYTES_MIN {
                self.lend_bytes_max = refused / 2;
                continue;
            }
            let first = iov.iter().find(|span| !span.is_empty()).into_iter();
            let piece: Vec<_> = first.map(|span| span.take(refused)).collect();
            let sent = self.socket.writev(&piece, &[], WriteFlags::NONE)?;
            self.loans.copied_at_once();
            self.copied_by_us_bytes += sent as u64;
            return Ok(sent);
        }
    }

    /// Which of the things asked for an older kernel does not know; `false` if that cannot be it.
    fn learn_from_refusal(&mut self, iov: &[Span<'_>], registered: bool) -> bool {
        if registered && self.registered.gives_up_vectors(iov) {
            return true;
        }
        let knew = self.ring.reports_usage();
        self.ring.without_usage();
        knew
    }

    /// One send: its bytes, or what the kernel answered. An outer error is about the ring.
    fn send(&mut self, iov: &[Span<'_>], registered: bool) -> io::Result<Result<usize, Errno>> {
        if registered && self.registered.begin(&mut self.ring) {
            copies::make_room_for_huge_pages(self.socket.fd.as_fd())?;
        }
        self.ring.enable()?;
        let mut stall = Stall::begin(self.socket.patience.stall_timeout, self.queued_bytes());
        let (run, buffer) = self.registered.first_run(iov, registered);
        let gather = self.iov.gather(&run, self.lend_bytes_max);
        // On loan from the moment that the kernel knows of it.
        let id = self.loans.lend();
        self.under_way = Some(gather.bytes());
        let (socket, timeout) = (self.socket.fd.as_fd(), stall.until_look());
        self.ring
            .send(socket, &gather, Sending { id, buffer }, timeout)?;
        loop {
            let mut answer = None;
            while let Some(completion) = self.ring.take() {
                self.account(completion, &mut answer)?;
            }
            if let Some(answer) = answer {
                return Ok(answer);
            }
            self.wait(&mut stall, "sending")?;
        }
    }

    /// Waits for an answer of the kernel, as long as the wake and `stall` let it.
    fn wait(&mut self, stall: &mut Stall, what: &str) -> io::Result<()> {
        if self.socket.patience.wake.is_awake() {
            return Err(Woken::error());
        }
        let look = stall.next_look();
        self.ring
            .wait(look.saturating_duration_since(Instant::now()))?;
        if Instant::now() >= look {
            stall.check(self.queued_bytes(), what)?;
        }
        Ok(())
    }

    /// Takes one answer of the kernel into account; the result of the send under way goes to `answer`.
    fn account(
        &mut self,
        completion: Completion,
        answer: &mut Option<Result<usize, Errno>>,
    ) -> io::Result<()> {
        match completion {
            Completion::Sent { id, result, owed } => {
                let result = result.map_err(Errno::from_raw);
                let asked = self.under_way.take();
                if asked.is_some_and(|asked| result.is_ok_and(|sent| sent < asked)) {
                    self.note_hang_up()?;
                }
                *answer = Some(result);
                if !owed {
                    return self.loans.released(id, true, result.is_err());
                }
                if result.is_err() {
                    self.failed.push(id);
                }
                Ok(())
            }
            Completion::Released { id, copied } => {
                let failed = self.failed.iter().position(|of| *of == id);
                if let Some(at) = failed {
                    self.failed.swap_remove(at);
                }
                self.loans.released(id, copied, failed.is_some())
            }
        }
    }

    /// A send that came short has met an error, and kept it to itself.
    fn note_hang_up(&mut self) -> io::Result<()> {
        if let Some(error) = errqueue::take_error(self.socket.fd.as_fd())? {
            self.socket.note_loss(error);
        }
        let (socket, wake) = (self.socket.fd.as_fd(), &self.socket.patience.wake);
        let shown = poll_until(socket, PollFlags::empty(), wake, Instant::now());
        if matches!(shown, Ok(Some(shown)) if shown.contains(PollFlags::POLLHUP)) {
            self.socket.note_loss(Errno::ECONNRESET.into());
        }
        Ok(())
    }

    /// Takes the notices that are there; says whether there were any.
    fn reap(&mut self) -> io::Result<bool> {
        let before = self.loans.outstanding();
        self.ring.collect()?;
        while let Some(completion) = self.ring.take() {
            self.account(completion, &mut None)?;
        }
        Ok(self.loans.outstanding() < before)
    }

    /// Waits until at most `outstanding` sends are on loan.
    fn collect(&mut self, outstanding: u64) -> io::Result<()> {
        const WHAT: &str = "waiting for the kernel to release lent memory";
        let mut stall = Stall::begin(self.socket.patience.stall_timeout, self.queued_bytes());
        loop {
            if self.loans.is_broken() {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "a notice about lent memory contradicted itself; \
                     what the kernel still holds is not known",
                ));
            }
            if self.reap()? {
                stall.progressed();
            }
            if self.loans.outstanding() <= outstanding {
                return Ok(());
            }
            self.wait(&mut stall, WHAT)?;
        }
    }
}

impl Channel for UringChannel {
    fn features(&self) -> Features {
        self.socket.features().with(Features::WRITE_ZERO_COPY)
    }

    /// On an error with `ZERO_COPY` nothing more was lent than earlier calls said.
    fn writev(
        &mut self,
        iov: &[Span<'_>],
        fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> io::Result<usize> {
        if !flags.contains(WriteFlags::ZERO_COPY) {
            return self.socket.writev(iov, fds, flags);
        }
        refuse_loan(self.features(), iov, fds)?;
        self.lend(iov, flags.contains(WriteFlags::REGISTERED))
    }

    fn readv(&mut self, iov: &[SpanMut<'_>], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        self.socket.readv(iov, fds)
    }

    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool> {
        self.socket.wait_readable(timeout)
    }

    /// See the trait, and [`SocketChannel`]'s: a lost connection is an error after the memory is back.
    fn flush(&mut self) -> io::Result<Flush> {
        if !self.loans.is_owed() && !self.loans.is_broken() {
            return Ok(Flush::NOTHING_OWED);
        }
        self.collect(0)?;
        if let Some(error) = errqueue::take_error(self.socket.fd.as_fd())? {
            self.socket.note_loss(error);
        }
        let counts = self.loans.settle();
        self.lend_bytes_max = self.lend_bytes_cap;
        match self.socket.lost {
            Some(errno) if !self.socket.is_reset => Err(errno.into()),
            _ => Ok(counts),
        }
    }

    fn shutdown(&mut self, how: Shutdown) -> io::Result<()> {
        self.socket.shutdown(how)
    }

    fn released(&self) -> Flush {
        self.loans.totals()
    }

    fn zero_copy_trouble(&self, all_copied: bool) -> Option<String> {
        let socket = self.socket.fd.as_fd();
        let trouble = copies::trouble(socket, self.refusals > 0, all_copied);
        let all: Vec<_> = self
            .registered
            .trouble()
            .into_iter()
            .chain(trouble)
            .collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    fn queued_bytes(&self) -> Option<u64> {
        self.socket.queued_bytes()
    }

    fn suspect(&self, quiet: Duration) -> Suspect {
        self.socket.suspect(quiet)
    }
}

impl Drop for UringChannel {
    /// With memory on loan: resets the connection and waits a moment for it. What does not come back
    /// stays mapped (see `loans`), and the ring stays, so that nothing of it is unregistered.
    fn drop(&mut self) {
        if self.loans.outstanding() > 0 && !self.loans.is_broken() {
            // Fails only where there is nothing to reset; then the wait below decides.
            let _ = self.shutdown(Shutdown::Reset);
            self.socket.patience.stall_timeout = DROP_PATIENCE;
            let _ = self.collect(0);
        }
        if self.loans.outstanding() > 0 || self.loans.is_broken() {
            self.ring.keep();
        }
    }
}
