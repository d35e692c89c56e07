//! Ctrl-C as something to read instead of the end of the process.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Signals that are read.
#[derive(Debug)]
pub(super) struct Interrupts(SignalFd);

impl Interrupts {
    /// `None` if that cannot be had; then the signals end the command as they always do.
    pub(super) fn new(signals: &[Signal]) -> Option<Self> {
        let mut set = SigSet::empty();
        signals.iter().for_each(|&signal| set.add(signal));
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).ok()?;
        // Blocked only now, so that a signal is never held back with nobody to read it.
        set.thread_block().ok()?;
        Some(Self(fd))
    }

    /// Whether one came since the last call.
    pub(super) fn take(&self) -> bool {
        loop {
            match self.0.read_signal() {
                Ok(found) => return found.is_some(),
                Err(Errno::EINTR) => {}
                Err(_) => return false,
            }
        }
    }
}

impl AsFd for Interrupts {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
