//! The threads that read the streams of one epoch.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::sched::CpuSet;
use tokio::sync::mpsc;

use crate::affinity;
use crate::channel::{Patience, SocketChannel};
use crate::peer::{self, Connection};
use crate::stream::{IncomingSetup, IncomingStream, StreamError};
use crate::sys::sched::{Slice, set_slice};
use crate::sys::wake::Wake;

use super::prepared::Place;

/// How a stream ended.
pub(super) type StreamEnd = (u16, Result<(), StreamError>);

/// All of them.
#[derive(Debug)]
pub(super) struct Readers {
    wake: Wake,
    cpus: Option<CpuSet>,
    /// Threads that were started since the last end.
    started: usize,
    /// Those of them that have not said their last word.
    at_work: usize,
    ends: mpsc::UnboundedReceiver<StreamEnd>,
    report_end: mpsc::UnboundedSender<StreamEnd>,
}

impl Readers {
    /// None yet; all of them will run on these CPUs, or on any.
    pub(super) fn new(cpus: Option<CpuSet>) -> io::Result<Self> {
        let (report_end, ends) = mpsc::unbounded_channel();
        Ok(Self {
            wake: Wake::new()?,
            cpus,
            started: 0,
            at_work: 0,
            ends,
            report_end,
        })
    }

    /// Starts the thread of a stream.
    pub(super) fn start(
        &mut self,
        stream: u16,
        connection: Connection,
        stall_timeout: Duration,
        setup: &Arc<IncomingSetup<Place>>,
    ) -> io::Result<()> {
        let patience = Patience {
            stall_timeout,
            wake: self.wake.clone(),
        };
        let channel =
            SocketChannel::new(peer::into_descriptor(connection)?, patience.clone(), false)?;
        let mut incoming = IncomingStream::new(stream, Box::new(channel), &patience, setup);
        let mut last_word = LastWord {
            stream,
            end: Err(StreamError::Ended),
            report: self.report_end.clone(),
        };
        let cpus = self.cpus;
        let run = move || {
            let _ = set_slice(Slice::Usual);
            affinity::keep_to(cpus);
            last_word.end = incoming.run();
            // Whoever hears it may rely on the memory being let go of.
            drop(incoming);
            drop(last_word);
        };
        thread::Builder::new()
            .name(format!("mf-recv-{stream}"))
            .spawn(run)?;
        (self.started, self.at_work) = (self.started + 1, self.at_work + 1);
        Ok(())
    }

    /// How many were started since the last end.
    pub(super) fn len(&self) -> usize {
        self.started
    }

    /// The next stream that ends. Dropping the future loses nothing.
    pub(super) async fn hear(&mut self) -> StreamEnd {
        // `self.report_end` keeps the channel open.
        let end = self.ends.recv().await;
        self.at_work -= 1;
        end.unwrap_or((0, Err(StreamError::Ended)))
    }

    /// Wakes the threads and waits until the last has said how it ended: from then on nothing of theirs is
    /// placed.
    pub(super) async fn end(&mut self) {
        self.wake.wake();
        while self.at_work > 0 {
            let _ = self.hear().await;
        }
        self.started = 0;
    }
}

/// How a thread ended, told even if it panics.
#[derive(Debug)]
struct LastWord {
    stream: u16,
    end: Result<(), StreamError>,
    report: mpsc::UnboundedSender<StreamEnd>,
}

impl Drop for LastWord {
    fn drop(&mut self) {
        let end = std::mem::replace(&mut self.end, Err(StreamError::Ended));
        // The attempt may be over, and then nobody wants to know.
        let _ = self.report.send((self.stream, end));
    }
}
