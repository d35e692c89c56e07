//! The two ends of a connection that exists in memory only.
//!
//! What is written with `ZERO_COPY` stays a reference until the receiver reads it or the kernel lets go
//! of it, which is at the flush or any time before; so a page that is used again too early shows. The
//! receiver has no thread of its own: it is run by the sender's end, when that waits for an
//! acknowledgement or by chance before.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use memferry::channel::{
    BufferChannel, Channel, Features, Flush, Shutdown, WriteFlags, read_exact_into, writev_all,
};
use memferry::region::{Mapping, Span, SpanMut};
use memferry::stream::IncomingStream;

use super::Arriving;
use super::random::Random;
use super::turns::Turns;

/// How the connections of a run misbehave.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Faults {
    /// Writes and reads are cut.
    short: bool,
    /// One connection in this many dies.
    deaths: Option<u64>,
    /// The kernel copies every send at once.
    copies: bool,
    /// There is zero copy at all.
    lends: bool,
}

impl Faults {
    pub(crate) fn draw(random: &mut Random) -> Self {
        Self {
            short: random.one_in(2),
            deaths: random.one_in(3).then(|| 2 + random.below(6)),
            copies: random.one_in(4),
            lends: !random.one_in(4),
        }
    }
}

/// A run of lent bytes: address of its mapping, offset, length, and the stream it is lent on.
type Loan = (usize, usize, usize, usize);

/// What the streams of an attempt have lent and not flushed.
#[derive(Debug, Default)]
pub(crate) struct Loans(Mutex<Vec<Loan>>);

impl Loans {
    fn lock(&self) -> MutexGuard<'_, Vec<Loan>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Rule 1: until it is flushed, nothing is lent again, on any stream.
    fn add(&self, (mapping, offset, length, stream): Loan) {
        let mut loans = self.lock();
        let twice = loans.iter().find(|(of, from, count, _)| {
            *of == mapping && *from < offset + length && offset < from + count
        });
        assert_eq!(twice, None, "lent on stream {stream} before it was back");
        loans.push((mapping, offset, length, stream));
    }

    fn give_back(&self, stream: usize) {
        self.lock().retain(|loan| loan.3 != stream);
    }
}

#[derive(Debug)]
enum Piece {
    Copied(VecDeque<u8>),
    Lent {
        owner: Arc<Mapping>,
        offset: usize,
        length: usize,
    },
}

/// Bytes on their way, in both directions.
#[derive(Debug, Default)]
struct Wire {
    forward: VecDeque<Piece>,
    back: VecDeque<u8>,
}

/// Copies bytes out of spans, by way of the kernel.
fn gather(spans: &[Span<'_>]) -> Vec<u8> {
    let mut bytes = vec![0; spans.iter().map(Span::len).sum()];
    let mut buffer = BufferChannel::new(u64::MAX).unwrap();
    writev_all(&mut buffer, spans, WriteFlags::NONE).unwrap();
    let into = &mut [SpanMut::of_slice(&mut bytes)];
    read_exact_into(&mut buffer, into, &mut Vec::new()).unwrap();
    bytes
}

/// Copies `bytes`, which fit, into spans.
fn scatter(bytes: &[u8], spans: &[SpanMut<'_>]) {
    let mut buffer = BufferChannel::new(u64::MAX).unwrap();
    writev_all(&mut buffer, &[Span::of_slice(bytes)], WriteFlags::NONE).unwrap();
    if !bytes.is_empty() {
        let read = buffer.readv(spans, &mut Vec::new()).unwrap();
        assert_eq!(read, bytes.len());
    }
}

fn room(spans: &[SpanMut<'_>]) -> usize {
    spans.iter().map(SpanMut::len).sum()
}

impl Piece {
    /// Its first `count` bytes, as they are in memory now.
    fn take(&mut self, count: usize) -> Vec<u8> {
        match self {
            Self::Copied(bytes) => bytes.drain(..count.min(bytes.len())).collect(),
            Self::Lent {
                owner,
                offset,
                length,
            } => {
                let count = count.min(*length);
                let bytes = gather(&[owner.span(*offset, count).unwrap()]);
                (*offset, *length) = (*offset + count, *length - count);
                bytes
            }
        }
    }

    /// The kernel lets go of it: what it holds now is what will arrive.
    fn release(&mut self) {
        if matches!(self, Self::Lent { .. }) {
            *self = Self::Copied(self.take(usize::MAX).into());
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::Copied(bytes) => bytes.is_empty(),
            Self::Lent { length, .. } => *length == 0,
        }
    }
}

/// What both ends have.
#[derive(Debug)]
pub(crate) struct End {
    me: usize,
    turns: Arc<Turns>,
    faults: Faults,
    loans: Arc<Loans>,
    wire: Arc<Mutex<Wire>>,
}

impl End {
    fn wire(&self) -> MutexGuard<'_, Wire> {
        self.wire.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn part_of(&self, bytes: usize) -> usize {
        match self.faults.short {
            true => self.turns.draw(|random| random.part_of(bytes)),
            false => bytes,
        }
    }
}

/// A connection for the thread `me`: what the sender's end is made of, and the receiver's end.
pub(crate) fn pair(
    me: usize,
    turns: &Arc<Turns>,
    faults: Faults,
    loans: &Arc<Loans>,
) -> (End, ReceiverEnd) {
    let wire = Arc::default();
    let end = || End {
        me,
        turns: Arc::clone(turns),
        faults,
        loans: Arc::clone(loans),
        wire: Arc::clone(&wire),
    };
    (end(), ReceiverEnd(end()))
}

/// The sender's end, with the stream of the receiver behind it.
#[derive(Debug)]
pub(crate) struct SenderEnd {
    end: End,
    receiver: IncomingStream<Arriving>,
    /// Bytes it still takes before it dies.
    life: Option<u64>,
    dead: bool,
    /// By ourselves: then a flush speaks about the memory alone.
    is_reset: bool,
    sends: u64,
    released: Flush,
}

impl SenderEnd {
    pub(crate) fn new(end: End, receiver: IncomingStream<Arriving>) -> Self {
        let deaths = end.faults.deaths;
        let life = end.turns.draw(|random| {
            let dies = deaths.is_some_and(|one_in| random.one_in(one_in));
            dies.then(|| random.below(200_000))
        });
        Self {
            end,
            receiver,
            life,
            dead: false,
            is_reset: false,
            sends: 0,
            released: Flush::NOTHING_OWED,
        }
    }

    /// The receiver works until it has read everything. Called between packets only: an end in the
    /// middle of one would be an error.
    fn run_receiver(&mut self) {
        if !self.dead {
            self.receiver.run().unwrap();
        }
    }

    fn reset() -> io::Error {
        io::Error::from_raw_os_error(libc::ECONNRESET)
    }
}

impl Channel for SenderEnd {
    fn features(&self) -> Features {
        match self.end.faults.lends {
            true => Features::SHUTDOWN.with(Features::WRITE_ZERO_COPY),
            false => Features::SHUTDOWN,
        }
    }

    fn writev(
        &mut self,
        iov: &[Span<'_>],
        _fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> io::Result<usize> {
        self.end.turns.step(self.end.me);
        let bytes: usize = iov.iter().map(Span::len).sum();
        let mut left = self.end.part_of(bytes);
        if let Some(life) = &mut self.life {
            if *life == 0 {
                self.dead = true;
            }
            left = left.min(usize::try_from(*life).unwrap());
            *life -= left as u64;
        }
        if self.dead {
            return Err(Self::reset());
        }
        let taken = left;
        let lend = flags.contains(WriteFlags::ZERO_COPY);
        self.sends += u64::from(lend);
        for span in iov {
            let span = span.take(left);
            left -= span.len();
            if span.is_empty() {
                continue;
            }
            let piece = if lend {
                let owner = Arc::clone(span.owner().unwrap());
                let offset = span.base().addr() - owner.span(0, 0).unwrap().base().addr();
                let length = span.len();
                let mapping = Arc::as_ptr(&owner).addr();
                let loan = (mapping, offset, length, self.end.me);
                self.end.loans.add(loan);
                let mut piece = Piece::Lent {
                    owner,
                    offset,
                    length,
                };
                if self.end.faults.copies || self.end.turns.draw(|random| random.one_in(4)) {
                    piece.release();
                }
                piece
            } else {
                Piece::Copied(gather(&[span]).into())
            };
            self.end.wire().forward.push_back(piece);
        }
        Ok(taken)
    }

    fn readv(&mut self, iov: &[SpanMut<'_>], _fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        self.end.turns.step(self.end.me);
        if self.dead {
            return Err(Self::reset());
        }
        let count = room(iov).min(self.end.wire().back.len());
        let count = self.end.part_of(count);
        let bytes: Vec<u8> = self.end.wire().back.drain(..count).collect();
        scatter(&bytes, iov);
        Ok(bytes.len())
    }

    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool> {
        self.end.turns.step(self.end.me);
        let now = !timeout.is_zero() || self.end.turns.draw(|random| random.one_in(2));
        if self.end.wire().back.is_empty() && now {
            self.run_receiver();
        }
        Ok(self.dead || !self.end.wire().back.is_empty())
    }

    fn flush(&mut self) -> io::Result<Flush> {
        self.end.turns.step(self.end.me);
        for piece in &mut self.end.wire().forward {
            piece.release();
        }
        self.end.loans.give_back(self.end.me);
        if self.dead && !self.is_reset {
            return Err(Self::reset());
        }
        let sends = std::mem::take(&mut self.sends);
        let copied = match self.end.faults.copies {
            true => sends,
            false => self.end.turns.draw(|random| random.below(sends + 1)),
        };
        self.released.sends += sends;
        self.released.copied += copied;
        Ok(Flush { sends, copied })
    }

    fn released(&self) -> Flush {
        self.released
    }

    fn shutdown(&mut self, _how: Shutdown) -> io::Result<()> {
        (self.dead, self.is_reset) = (true, true);
        Ok(())
    }
}

/// The receiver's end.
#[derive(Debug)]
pub(crate) struct ReceiverEnd(End);

impl Channel for ReceiverEnd {
    fn features(&self) -> Features {
        Features::SHUTDOWN
    }

    fn writev(
        &mut self,
        iov: &[Span<'_>],
        _fds: &[BorrowedFd<'_>],
        _flags: WriteFlags,
    ) -> io::Result<usize> {
        let bytes = gather(iov);
        let taken = self.0.part_of(bytes.len());
        self.0.wire().back.extend(&bytes[..taken]);
        Ok(taken)
    }

    fn readv(&mut self, iov: &[SpanMut<'_>], _fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        self.0.turns.step(self.0.me);
        let count = self.0.part_of(room(iov));
        let mut wire = self.0.wire();
        let Some(piece) = wire.forward.front_mut() else {
            return Ok(0);
        };
        let bytes = piece.take(count);
        if piece.is_empty() {
            wire.forward.pop_front();
        }
        drop(wire);
        scatter(&bytes, iov);
        Ok(bytes.len())
    }

    fn wait_readable(&mut self, _timeout: Duration) -> io::Result<bool> {
        Ok(true)
    }

    fn shutdown(&mut self, _how: Shutdown) -> io::Result<()> {
        Ok(())
    }
}
