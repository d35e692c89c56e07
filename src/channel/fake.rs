//! A scripted channel for tests: short writes, failures, late and unordered releases.
//!
//! It models loans faithfully: what was written with `ZERO_COPY` is read from memory when it is
//! released, or when the peer looks before that. So a page that was reused too early shows.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::ledger::Ledger;
use super::{
    BufferChannel, Channel, Features, Flush, Shutdown, WriteFlags, read_exact_into,
    refuse_all_but_plain, refuse_loan, writev_all,
};
use crate::region::{Mapping, Span, SpanMut};

/// What one `writev` does. Without a step left it takes everything.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Step {
    /// Takes at most this many bytes.
    Take(usize),
    /// Fails with this errno and takes nothing.
    Fail(i32),
}

/// When loans come back.
#[derive(Debug, Default)]
pub(crate) enum Release {
    /// All at the next flush.
    #[default]
    AtFlush,
    /// These ranges `(lo, hi, copied)` at the next flushes; a flush that is left without the ones it
    /// needs is `TimedOut`.
    Scripted(VecDeque<(u32, u32, bool)>),
}

/// What the fake is to do.
#[derive(Debug, Default)]
pub(crate) struct Script {
    pub(crate) steps: VecDeque<Step>,
    pub(crate) release: Release,
    /// The connection is reset once this many bytes were taken.
    pub(crate) dies_at_byte: Option<u64>,
}

/// One piece of the stream.
#[derive(Debug)]
enum Piece {
    Copied(Vec<u8>),
    Lent {
        id: u32,
        owner: Arc<Mapping>,
        offset: usize,
        len: usize,
    },
}

#[derive(Debug, Default)]
struct State {
    script: Script,
    ledger: Ledger,
    pieces: Vec<Piece>,
    taken_bytes: u64,
    read_bytes: usize,
    ended: bool,
    dead: bool,
}

/// The writing end.
#[derive(Debug)]
pub(crate) struct FakeChannel(Arc<Mutex<State>>);

/// What arrived at the other end.
#[derive(Debug)]
pub(crate) struct FakePeer(Arc<Mutex<State>>);

impl FakeChannel {
    pub(crate) fn new(script: Script) -> (Self, FakePeer) {
        let state = Arc::new(Mutex::new(State {
            script,
            ..State::default()
        }));
        (Self(Arc::clone(&state)), FakePeer(state))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

/// The bytes as they are in memory now. Through a buffer channel, so that the kernel reads them.
fn read_now(spans: &[Span<'_>]) -> io::Result<Vec<u8>> {
    let mut buffer = BufferChannel::new(u64::MAX)?;
    writev_all(&mut buffer, spans, WriteFlags::NONE)?;
    let mut bytes = vec![0; spans.iter().map(Span::len).sum()];
    read_exact_into(
        &mut buffer,
        &mut [SpanMut::of_slice(&mut bytes)],
        &mut Vec::new(),
    )?;
    Ok(bytes)
}

impl Piece {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Copied(bytes) => bytes.clone(),
            Self::Lent {
                owner, offset, len, ..
            } => read_now(&[owner.span(*offset, *len).unwrap()]).unwrap(),
        }
    }
}

impl State {
    /// The kernel lets go of sends `lo..=hi`: this is the last moment at which it read them.
    fn release(&mut self, lo: u32, hi: u32, copied: bool) -> io::Result<()> {
        self.ledger
            .released(lo, hi, copied)
            .map_err(io::Error::other)?;
        for piece in &mut self.pieces {
            if let Piece::Lent { id, .. } = piece
                && id.wrapping_sub(lo) <= hi.wrapping_sub(lo)
            {
                *piece = Piece::Copied(piece.bytes());
            }
        }
        Ok(())
    }

    fn oldest_loan(&self) -> Option<u32> {
        self.pieces.iter().find_map(|piece| match piece {
            Piece::Lent { id, .. } => Some(*id),
            Piece::Copied(_) => None,
        })
    }
}

impl FakePeer {
    /// Everything taken so far; of what is on loan, what the memory says now.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let state = self.0.lock().unwrap();
        state.pieces.iter().flat_map(Piece::bytes).collect()
    }
}

impl Channel for FakeChannel {
    fn features(&self) -> Features {
        Features::SHUTDOWN.with(Features::WRITE_ZERO_COPY)
    }

    fn writev(
        &mut self,
        iov: &[Span<'_>],
        fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> io::Result<usize> {
        let lend = flags.contains(WriteFlags::ZERO_COPY);
        if lend {
            refuse_loan(self.features(), iov, fds)?;
        } else {
            refuse_all_but_plain(self.features(), iov, fds, flags)?;
        }
        let mut state = self.state();
        if state.dead || state.ended {
            return Err(io::Error::from_raw_os_error(libc::EPIPE));
        }
        let mut left = match state.script.steps.pop_front() {
            None => usize::MAX,
            Some(Step::Take(bytes)) => bytes,
            Some(Step::Fail(errno)) => return Err(io::Error::from_raw_os_error(errno)),
        };
        if let Some(dies_at) = state.script.dies_at_byte {
            let room = usize::try_from(dies_at - state.taken_bytes).unwrap();
            if room == 0 {
                state.dead = true;
                return Err(io::Error::from_raw_os_error(libc::ECONNRESET));
            }
            left = left.min(room);
        }
        let taken: Vec<Span<'_>> = iov
            .iter()
            .map(|span| {
                let span = span.take(left);
                left -= span.len();
                span
            })
            .filter(|span| !span.is_empty())
            .collect();
        let bytes = taken.iter().map(Span::len).sum();
        if bytes == 0 {
            return Ok(0);
        }
        if lend {
            let id = state.ledger.lend();
            for span in taken {
                let owner = Arc::clone(span.owner().unwrap());
                let offset = span.base().addr() - owner.span(0, 0).unwrap().base().addr();
                let len = span.len();
                state.pieces.push(Piece::Lent {
                    id,
                    owner,
                    offset,
                    len,
                });
            }
        } else {
            state.pieces.push(Piece::Copied(read_now(&taken)?));
        }
        state.taken_bytes += bytes as u64;
        Ok(bytes)
    }

    fn readv(&mut self, _iov: &[SpanMut<'_>], _fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        Ok(0)
    }

    fn wait_readable(&mut self, _timeout: Duration) -> io::Result<bool> {
        Ok(true)
    }

    fn flush(&mut self) -> io::Result<Flush> {
        let mut state = self.state();
        while let Some(oldest) = state.oldest_loan() {
            match &mut state.script.release {
                Release::AtFlush => state.release(oldest, oldest, false)?,
                Release::Scripted(ranges) => match ranges.pop_front() {
                    Some((lo, hi, copied)) => state.release(lo, hi, copied)?,
                    None if state.dead => state.release(oldest, oldest, false)?,
                    None => return Err(io::ErrorKind::TimedOut.into()),
                },
            }
        }
        let counts = state.ledger.take_flush();
        if state.dead && counts != Flush::NOTHING_OWED {
            return Err(io::Error::from_raw_os_error(libc::ECONNRESET));
        }
        Ok(counts)
    }

    fn shutdown(&mut self, how: Shutdown) -> io::Result<()> {
        let mut state = self.state();
        state.ended |= how != Shutdown::Read;
        if how == Shutdown::Reset {
            state.script.release = Release::AtFlush;
        }
        Ok(())
    }
}

impl Channel for FakePeer {
    fn features(&self) -> Features {
        Features::NONE
    }

    fn writev(&mut self, _: &[Span<'_>], _: &[BorrowedFd<'_>], _: WriteFlags) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Reads what was taken; a stream that is not there yet is its end.
    fn readv(&mut self, iov: &[SpanMut<'_>], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        let bytes = self.bytes();
        let mut state = self.0.lock().unwrap();
        let mut buffer = BufferChannel::new(u64::MAX)?;
        let rest = &bytes[state.read_bytes..];
        writev_all(&mut buffer, &[Span::of_slice(rest)], WriteFlags::NONE)?;
        let read = buffer.readv(iov, fds)?;
        state.read_bytes += read;
        Ok(read)
    }

    fn wait_readable(&mut self, _timeout: Duration) -> io::Result<bool> {
        Ok(true)
    }

    fn shutdown(&mut self, _how: Shutdown) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::suite::Memory;

    #[test]
    fn a_page_reused_before_its_flush_reaches_the_peer_and_one_reused_after_does_not() {
        let memory = Memory::filled(4096, b'a');
        let (mut channel, peer) = FakeChannel::new(Script::default());
        writev_all(&mut channel, &[memory.all()], WriteFlags::ZERO_COPY).unwrap();
        memory.fill(b'b');
        assert_eq!(peer.bytes(), vec![b'b'; 4096]);
        assert_eq!(
            channel.flush().unwrap(),
            Flush {
                sends: 1,
                copied: 0
            }
        );
        memory.fill(b'c');
        assert_eq!(peer.bytes(), vec![b'b'; 4096]);
    }

    #[test]
    fn releases_follow_the_script_and_a_missing_one_ends_the_flush() {
        let memory = Memory::filled(100, b'a');
        let (mut channel, peer) = FakeChannel::new(Script {
            steps: [Step::Take(10), Step::Take(20)].into(),
            release: Release::Scripted([(1, 2, true)].into()),
            ..Script::default()
        });
        writev_all(&mut channel, &[memory.all()], WriteFlags::ZERO_COPY).unwrap();
        assert_eq!(channel.flush().unwrap_err().kind(), io::ErrorKind::TimedOut);
        memory.fill(b'b');
        assert_eq!(peer.bytes(), [vec![b'b'; 10], vec![b'a'; 90]].concat());
        channel.shutdown(Shutdown::Reset).unwrap();
        assert_eq!(
            channel.flush().unwrap(),
            Flush {
                sends: 3,
                copied: 2
            }
        );
    }

    #[test]
    fn a_death_takes_the_bytes_before_it_and_fails_the_flush() {
        let memory = Memory::filled(100, b'a');
        let (mut channel, peer) = FakeChannel::new(Script {
            steps: [Step::Fail(libc::ENOBUFS)].into(),
            dies_at_byte: Some(60),
            ..Script::default()
        });
        let refused = writev_all(&mut channel, &[memory.all()], WriteFlags::ZERO_COPY);
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::ENOBUFS));
        let died = writev_all(&mut channel, &[memory.all()], WriteFlags::ZERO_COPY);
        assert_eq!(died.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(peer.bytes().len(), 60);
        assert!(channel.flush().is_err());
        assert_eq!(channel.flush().unwrap(), Flush::NOTHING_OWED);
    }
}
