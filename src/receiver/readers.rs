//! The threads that read the streams of one epoch.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};

use crate::channel::{Patience, SocketChannel};
use crate::peer::{self, Connection};
use crate::stream::{IncomingSetup, IncomingStream, StreamError};
use crate::sys::wake::Wake;

use super::prepared::Place;

/// How a stream ended.
pub(super) type StreamEnd = (u16, Result<(), StreamError>);

/// All of them.
#[derive(Debug)]
pub(super) struct Readers {
    wake: Wake,
    threads: Vec<thread::JoinHandle<()>>,
    /// Waits for the threads. Kept, so that whoever stops waiting for it can come back.
    ending: Option<JoinHandle<()>>,
    ends: mpsc::UnboundedReceiver<StreamEnd>,
    report_end: mpsc::UnboundedSender<StreamEnd>,
}

impl Readers {
    /// None yet.
    pub(super) fn new() -> io::Result<Self> {
        let (report_end, ends) = mpsc::unbounded_channel();
        Ok(Self {
            wake: Wake::new()?,
            threads: Vec::new(),
            ending: None,
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
        let report_end = self.report_end.clone();
        let run = move || {
            // The attempt may be over, and then nobody wants to know.
            let _ = report_end.send((stream, incoming.run()));
        };
        self.threads.push(
            thread::Builder::new()
                .name(format!("mf-recv-{stream}"))
                .spawn(run)?,
        );
        Ok(())
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.threads.len()
    }

    /// The next stream that ends. Dropping the future loses nothing.
    pub(super) async fn hear(&mut self) -> StreamEnd {
        // `self.report_end` keeps the channel open.
        self.ends
            .recv()
            .await
            .unwrap_or((0, Err(StreamError::Ended)))
    }

    /// Wakes the threads and waits until they have ended: from then on nothing of theirs is placed.
    pub(super) async fn end(&mut self) {
        self.wake.wake();
        let threads = std::mem::take(&mut self.threads);
        let join = move || {
            for thread in threads {
                if thread.join().is_err() {
                    tracing::error!("a stream's thread panicked");
                }
            }
        };
        let _ = self
            .ending
            .get_or_insert_with(|| spawn_blocking(join))
            .await;
        self.ending = None;
    }
}
