//! Channels: byte transports that can lend memory to the kernel.
//!
//! One trait, one file per kind. `flags` is a parameter of the one write call (there are no parallel
//! `_flags` variants), and zero copy is one of the flags. What a kind can do is asked, not assumed.
//!
//! The rule this module keeps (rule 1): between lending a Span and the `flush` that covers it, the
//! memory stays mapped. *When* to flush is the stream's business.

mod budget;
mod buffer;
mod command;
mod copies;
mod engine;
#[cfg(test)]
pub(crate) mod fake;
mod file;
pub mod ledger;
mod loans;
mod registered;
mod socket;
#[cfg(test)]
mod socket_tests;
#[cfg(test)]
pub(crate) mod suite;
mod suspect;
mod uring;
#[cfg(test)]
mod uring_tests;
mod wait;
pub mod within_host;

pub use budget::{memlock_limit, share};
pub use buffer::BufferChannel;
pub use command::CommandChannel;
pub use engine::{Choice, Engine, Opened, Trial, open, trial};
pub use file::FileChannel;
pub use socket::SocketChannel;
pub use suspect::Suspect;
pub use uring::UringChannel;

use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use crate::region::{Span, SpanMut};
use crate::sys::wake::Wake;

/// How a write is to be done. A set, so that flags can be combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteFlags(u32);

impl WriteFlags {
    /// A plain write: the bytes are copied before the call returns.
    pub const NONE: Self = Self(0);
    /// Lend the memory to the kernel instead of copying it; it must not be reused before `flush`.
    pub const ZERO_COPY: Self = Self(1);
    /// With `ZERO_COPY`: what the channel has registered may be sent from the registration. Registered
    /// pages are those the file had then: where a hole was punched since, they are not the file's any
    /// more. So only where that cannot be, or is found out.
    pub const REGISTERED: Self = Self(2);
    /// What belongs to it follows at once, so it need not leave on its own. A hint.
    pub const MORE: Self = Self(4);

    /// Both sets together.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` is set.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// What a channel can do. A set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(u32);

impl Features {
    /// Nothing beyond reading and writing.
    pub const NONE: Self = Self(0);
    /// Descriptors can travel with a write.
    pub const FD_PASS: Self = Self(1);
    /// `shutdown` ends the directions one by one, and wakes a blocked peer.
    pub const SHUTDOWN: Self = Self(2);
    /// It was made by a listener.
    pub const LISTEN: Self = Self(4);
    /// `WriteFlags::ZERO_COPY` is honoured. Whether the kernel really avoids the copy is only known
    /// from the counts of `flush`.
    pub const WRITE_ZERO_COPY: Self = Self(8);

    /// Whether all of `other` is there.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both sets together.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// What a `flush` saw: zero-copy sends released since the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flush {
    /// Zero-copy sends whose memory came back. A short write is one send, its rest another.
    pub sends: u64,
    /// Those of them that were copied after all, by the kernel or (where it would not pin the memory)
    /// by the channel. The kernel marks whole ranges, so this is a close estimate from above.
    pub copied: u64,
}

impl Flush {
    /// Nothing had been lent.
    pub const NOTHING_OWED: Self = Self {
        sends: 0,
        copied: 0,
    };

    /// There were zero-copy sends, and the kernel copied every one of them.
    #[must_use]
    pub fn all_copied(&self) -> bool {
        self.sends > 0 && self.copied == self.sends
    }
}

/// Which way to end a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shutdown {
    /// No more reading.
    Read,
    /// No more writing; the peer reads the end after what is queued.
    Write,
    /// Throw away what is queued and tell the peer so (TCP: RST). Lent memory comes back at once and
    /// can then be collected by `flush`.
    Reset,
}

/// What ends a blocked call early.
#[derive(Debug, Clone)]
pub struct Patience {
    /// Longest time without any progress (no byte moved, no release) before `TimedOut`.
    pub stall_timeout: Duration,
    /// Ends every wait with [`Woken`].
    pub wake: Wake,
}

/// The error inside an `io::Error` when a wait was ended through [`Patience::wake`].
#[derive(Debug, Clone, Copy)]
pub struct Woken;

impl Woken {
    /// As an `io::Error`. Its kind is not `Interrupted`, which callers retry.
    #[must_use]
    pub fn error() -> io::Error {
        io::Error::new(io::ErrorKind::ConnectionAborted, Self)
    }

    /// Whether `error` came from a wake.
    #[must_use]
    pub fn is(error: &io::Error) -> bool {
        error.get_ref().is_some_and(|inner| inner.is::<Self>())
    }
}

impl fmt::Display for Woken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the transfer was ended")
    }
}

impl std::error::Error for Woken {}

/// One byte transport, and the memory it has on loan to the kernel.
///
/// Every call blocks until it made progress, its patience ended, or the transport failed.
pub trait Channel: Send + fmt::Debug {
    /// What this channel can do.
    fn features(&self) -> Features;

    /// Writes some of `iov` and says how many bytes were taken.
    ///
    /// With `ZERO_COPY` the memory is on loan until the next `flush`; the channel keeps it mapped.
    /// Spans without an owner, or descriptors, together with `ZERO_COPY` are refused
    /// (`InvalidInput`) before anything is written; so is `ZERO_COPY` on a channel without
    /// `WRITE_ZERO_COPY`, and descriptors on one without `FD_PASS` (`Unsupported`).
    fn writev(
        &mut self,
        iov: &[Span<'_>],
        fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> io::Result<usize>;

    /// Reads some bytes into `iov`; 0 is the end of the stream, or an `iov` without room. Descriptors that came along are
    /// appended to `fds`.
    fn readv(&mut self, iov: &[SpanMut<'_>], fds: &mut Vec<OwnedFd>) -> io::Result<usize>;

    /// Waits up to `timeout` for something to read (or the end of the stream); says whether there is.
    /// Not bounded by the stall timeout: the caller decides what an idle peer means.
    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool>;

    /// Returns once every lent Span is back: from here on the kernel reads none of our pages. Counts
    /// since the last flush; `NOTHING_OWED` if nothing was lent since.
    ///
    /// After `TimedOut` and [`Woken`] memory is still on loan; `shutdown(Reset)` and another `flush`
    /// bring it back. A lost connection is an error that comes after the memory is back.
    fn flush(&mut self) -> io::Result<Flush> {
        Ok(Flush::NOTHING_OWED)
    }

    /// Ends the channel, or one direction of it.
    fn shutdown(&mut self, how: Shutdown) -> io::Result<()>;

    /// Zero-copy sends that are back, since the channel was made. Does not look for new ones.
    fn released(&self) -> Flush {
        Flush::NOTHING_OWED
    }

    /// What keeps zero copy from working as it was asked for, in words for an operator; `None` if
    /// nothing does. Where the kernel has copied every send, the reason as far as it can be found.
    fn zero_copy_trouble(&self, all_copied: bool) -> Option<String> {
        let _ = all_copied;
        None
    }

    /// Bytes accepted from us that the peer's kernel has not confirmed, where that can be known. A
    /// falling number is progress on a slow link.
    fn queued_bytes(&self) -> Option<u64> {
        None
    }

    /// Who is to blame if nothing has moved for `quiet`.
    fn suspect(&self, quiet: Duration) -> Suspect {
        let _ = quiet;
        Suspect::Unknown
    }
}

/// Spans that a call after a short write is given: the rest of the one that was cut, and some more.
const REST_SPANS: usize = 16;

/// Writes all of `iov`, however many short writes that takes. With `ZERO_COPY` everything is *queued*
/// when it returns, not sent. Does not allocate.
///
/// On an error some of it may have been written: the stream is then of no further use.
pub fn writev_all<C: Channel + ?Sized>(
    channel: &mut C,
    iov: &[Span<'_>],
    flags: WriteFlags,
) -> io::Result<()> {
    let mut rest = iov;
    let mut done_bytes = 0; // of the first span in `rest`
    while let Some(first) = rest.first() {
        if first.len() == done_bytes {
            rest = &rest[1..];
            done_bytes = 0;
            continue;
        }
        let written = if done_bytes == 0 {
            channel.writev(rest, &[], flags)?
        } else {
            let mut some = [first.skip(done_bytes); REST_SPANS];
            let count = rest.len().min(REST_SPANS);
            some[1..count].copy_from_slice(&rest[1..count]);
            channel.writev(&some[..count], &[], flags)?
        };
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        done_bytes += written;
        while let Some(first) = rest.first()
            && done_bytes >= first.len()
        {
            done_bytes -= first.len();
            rest = &rest[1..];
        }
    }
    Ok(())
}

/// Fills all of `iov`, and says so; `false` is an end of the stream before the first byte. Descriptors
/// that came along are appended to `fds`. The spans are advanced past what was read. Does not
/// allocate.
///
/// An end of the stream in the middle is `UnexpectedEof`.
pub fn read_exact_into<C: Channel + ?Sized>(
    channel: &mut C,
    iov: &mut [SpanMut<'_>],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<bool> {
    let mut rest = iov;
    let mut total_bytes: usize = 0;
    loop {
        let full = rest.iter().take_while(|span| span.is_empty()).count();
        rest = &mut rest[full..];
        if rest.is_empty() {
            return Ok(true);
        }
        let read = channel.readv(rest, fds)?;
        if read == 0 && total_bytes == 0 {
            return Ok(false);
        }
        if read == 0 {
            let wanted: usize = rest.iter().map(SpanMut::len).sum();
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("the stream ended after {total_bytes} bytes, {wanted} before the end"),
            ));
        }
        total_bytes += read;
        let mut left = read;
        for span in rest.iter_mut() {
            let taken = left.min(span.len());
            span.advance(taken);
            left -= taken;
            if left == 0 {
                break;
            }
        }
    }
}

/// The checks every kind makes before a write without `ZERO_COPY`.
fn refuse_descriptors(features: Features, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if fds.is_empty() || features.contains(Features::FD_PASS) {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        "this channel cannot pass descriptors",
    ))
}

/// The checks every kind makes before a write with `ZERO_COPY`.
fn refuse_loan(features: Features, iov: &[Span<'_>], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if !fds.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "descriptors cannot travel with a zero-copy write",
        ));
    }
    if iov.iter().any(|span| span.owner().is_none()) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "memory without an owner cannot be lent to the kernel",
        ));
    }
    if !features.contains(Features::WRITE_ZERO_COPY) {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "this channel has no zero copy",
        ));
    }
    Ok(())
}

/// The checks of the kinds that have neither zero copy nor descriptors.
fn refuse_all_but_plain(
    features: Features,
    iov: &[Span<'_>],
    fds: &[BorrowedFd<'_>],
    flags: WriteFlags,
) -> io::Result<()> {
    if flags.contains(WriteFlags::ZERO_COPY) {
        return refuse_loan(features, iov, fds);
    }
    refuse_descriptors(features, fds)
}
