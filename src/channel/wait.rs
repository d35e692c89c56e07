//! How a channel waits: on one descriptor and the wake, with a deadline on lack of progress.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::{Patience, Woken};
use crate::sys::wake::Wake;

/// Looks at the socket's queue per stall timeout: a stall is noticed at most an eighth too late.
const LOOKS: u32 = 8;

/// Answers of a socket whose connection is gone. Others (`EFAULT`, `ENOMEM`) are about one call.
pub(super) const GONE: [Errno; 10] = [
    Errno::ECONNRESET,
    Errno::EPIPE,
    Errno::ETIMEDOUT,
    Errno::ENOTCONN,
    Errno::ECONNABORTED,
    Errno::ECONNREFUSED,
    Errno::EHOSTUNREACH,
    Errno::ENETUNREACH,
    Errno::EHOSTDOWN,
    Errno::ENETDOWN,
];

/// Waits for `events`, an error or a hang-up on `fd`, until `deadline` (`None`), or until woken
/// ([`Woken`]).
pub(super) fn poll_until(
    fd: BorrowedFd<'_>,
    events: PollFlags,
    wake: &Wake,
    deadline: Instant,
) -> io::Result<Option<PollFlags>> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [
            PollFd::new(fd, events),
            PollFd::new(wake.as_fd(), PollFlags::POLLIN),
        ];
        // ppoll and not poll: rounding to milliseconds would spin or oversleep near the deadline.
        match ppoll(&mut fds, Some(TimeSpec::from_duration(left)), None) {
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
            Ok(0) => return Ok(None),
            Ok(_) => {}
        }
        if fds[1].any() == Some(true) {
            return Err(Woken::error());
        }
        let got = fds[0].revents().unwrap_or(PollFlags::POLLERR);
        if got.contains(PollFlags::POLLNVAL) {
            return Err(Errno::EBADF.into());
        }
        return Ok(Some(got));
    }
}

/// Waits for `events` on `fd`, which has no queue to look into, as long as `patience` lasts.
pub(super) fn ready(
    fd: BorrowedFd<'_>,
    events: PollFlags,
    patience: &Patience,
    what: &str,
) -> io::Result<()> {
    let deadline = after(patience.stall_timeout);
    match poll_until(fd, events, &patience.wake, deadline)? {
        Some(_) => Ok(()),
        None => Err(stalled(patience.stall_timeout, what)),
    }
}

/// The moment `duration` from now; about a year where that is too far to name.
pub(super) fn after(duration: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(duration)
        .unwrap_or_else(|| now + Duration::from_secs(365 * 24 * 3600))
}

fn stalled(timeout: Duration, what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::TimedOut,
        format!("no progress for {timeout:?} while {what}"),
    )
}

/// The deadline on lack of progress. A queue that changes is progress, too: it gets shorter as the peer takes
/// bytes, and longer as the kernel carries on with a send.
#[derive(Debug)]
pub(super) struct Stall {
    timeout: Duration,
    deadline: Instant,
    queued_bytes: Option<u64>,
}

impl Stall {
    pub(super) fn begin(timeout: Duration, queued_bytes: Option<u64>) -> Self {
        Self {
            timeout,
            deadline: after(timeout),
            queued_bytes,
        }
    }

    pub(super) fn progressed(&mut self) {
        self.deadline = after(self.timeout);
    }

    /// When to call [`Stall::check`] next.
    pub(super) fn next_look(&self) -> Instant {
        self.deadline.min(after(self.timeout / LOOKS))
    }

    /// How long it is until then.
    pub(super) fn until_look(&self) -> Duration {
        self.next_look().saturating_duration_since(Instant::now())
    }

    /// `TimedOut` if the deadline has passed and `queued_bytes` is what it was at the last look.
    pub(super) fn check(&mut self, queued_bytes: Option<u64>, what: &str) -> io::Result<()> {
        let before = std::mem::replace(&mut self.queued_bytes, queued_bytes);
        if matches!((before, queued_bytes), (Some(before), Some(now)) if now != before) {
            self.progressed();
        }
        if Instant::now() < self.deadline {
            return Ok(());
        }
        Err(match queued_bytes {
            Some(bytes) => stalled(
                self.timeout,
                &format!("{what} ({bytes} bytes not acknowledged by the peer)"),
            ),
            None => stalled(self.timeout, what),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_that_changes_is_progress() {
        let mut stall = Stall::begin(Duration::ZERO, Some(100));
        stall.timeout = Duration::from_secs(60);
        stall.check(Some(99), "sending").unwrap();
        stall.deadline = Instant::now();
        stall.check(Some(101), "sending").unwrap();
        stall.check(Some(99), "sending").unwrap();
        stall.deadline = Instant::now();
        let error = stall.check(Some(99), "sending").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(error.to_string().contains("99 bytes"), "{error}");
    }

    #[test]
    fn an_endless_patience_is_allowed() {
        assert!(after(Duration::MAX) > Instant::now());
    }
}
