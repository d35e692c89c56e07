//! The limit to be compared with: threads that write memory to sockets and threads that read it into
//! other memory, and nothing else. No protocol, no checks, no second look.

use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use super::Sample;
use crate::region::{Access, Mapping, SpanMut};
use crate::sys::file::{advise_huge_pages, populate};
use crate::sys::msg::{self, IovBuf};

/// Bytes per system call. Larger ones are no faster, smaller ones are slower.
const CALL_BYTES: usize = 4 << 20;

/// Where it all goes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Into<'a> {
    /// To a new file in this directory, whose memory is cold.
    New(&'a Path),
    /// To this file, whose memory is there, and in the page tables before the time counts.
    Prepared(&'a Path),
}

/// Moves all of `source` over loopback.
pub(super) fn run(source: &Arc<Mapping>, into: Into<'_>, streams: usize) -> io::Result<Sample> {
    let destination = match into {
        Into::New(directory) => {
            let file = tempfile::tempfile_in(directory)?;
            file.set_len(source.len() as u64)?;
            let destination = Mapping::new(&file, source.len(), Access::Write)?;
            advise_huge_pages(&destination);
            destination
        }
        Into::Prepared(path) => {
            let file = File::options().read(true).write(true).open(path)?;
            let destination = Mapping::new(&file, source.len(), Access::Write)?;
            populate(&destination.whole(), Access::Write)?;
            destination
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut pairs = Vec::new();
    for _ in 0..streams {
        let sending = TcpStream::connect(listener.local_addr()?)?;
        pairs.push((sending, listener.accept()?.0));
    }
    let share = source.len() / streams;
    let started = Instant::now();
    let (sender_cpu, receiver_cpu) = thread::scope(|scope| {
        let mut senders = Vec::new();
        let mut receivers = Vec::new();
        for (index, (sending, receiving)) in pairs.iter().enumerate() {
            let range = share * index..share * (index + 1);
            let (from, to) = (range.clone(), range);
            let destination = &destination;
            senders.push(scope.spawn(move || send(sending, source, from)));
            receivers.push(scope.spawn(move || receive(receiving, destination, to)));
        }
        let sum = |threads: Vec<thread::ScopedJoinHandle<'_, io::Result<Duration>>>| {
            threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
                })
                .sum::<io::Result<Duration>>()
        };
        Ok::<_, io::Error>((sum(senders)?, sum(receivers)?))
    })?;
    Ok(Sample {
        time: started.elapsed(),
        sender_cpu,
        receiver_cpu,
    })
}

fn send(
    socket: &TcpStream,
    source: &Arc<Mapping>,
    range: std::ops::Range<usize>,
) -> io::Result<Duration> {
    let mut iov = IovBuf::new();
    let mut at = range.start;
    while at < range.end {
        let len = CALL_BYTES.min(range.end - at);
        let span = source.span(at, len).ok_or(io::ErrorKind::InvalidInput)?;
        at += msg::writev(socket.as_fd(), &iov.gather(&[span], usize::MAX))?;
    }
    own_cpu_time()
}

fn receive(
    socket: &TcpStream,
    destination: &Arc<Mapping>,
    range: std::ops::Range<usize>,
) -> io::Result<Duration> {
    let mut iov = IovBuf::new();
    let mut at = range.start;
    while at < range.end {
        let len = CALL_BYTES.min(range.end - at);
        let span: SpanMut<'_> = destination
            .span_mut(at, len)
            .ok_or(io::ErrorKind::InvalidInput)?;
        match msg::receive_all(socket.as_fd(), &iov.scatter(&[span]))? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            received => at += received,
        }
    }
    own_cpu_time()
}

/// What this thread has used so far.
fn own_cpu_time() -> io::Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}
