//! A wake-up that stays: one eventfd that every blocking wait of an attempt also listens to.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Ends every wait of the threads that share it, once and for good. Clones wake together.
#[derive(Debug, Clone)]
pub struct Wake(Arc<EventFd>);

impl Wake {
    /// A wake that has not happened yet. Fails only when the process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        let fd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self(Arc::new(fd)))
    }

    /// Wakes every waiter, now and later.
    pub fn wake(&self) {
        // The counter only overflows after 2^64 wakes, and then it is still readable: awake.
        let _ = self.0.write(1);
    }

    /// Whether `wake` was called.
    #[must_use]
    pub fn is_awake(&self) -> bool {
        self.wait(Duration::ZERO)
    }

    /// Sleeps until woken or until `timeout` has passed; says whether it was woken.
    pub fn wait(&self, timeout: Duration) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        matches!(poll(&mut fds, timeout), Ok(n) if n > 0)
    }
}

impl AsFd for Wake {
    /// Readable once woken; for use in a caller's own `poll`.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wake_reaches_clones_and_stays() {
        let wake = Wake::new().unwrap();
        let clone = wake.clone();
        assert!(!clone.is_awake());
        wake.wake();
        assert!(clone.is_awake());
        assert!(clone.wait(Duration::from_secs(60)));
    }
}
