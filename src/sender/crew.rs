//! The streams of one epoch: a thread each, and the one place where they meet the control plane.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc as jobs;
use std::thread;
use std::time::Duration;

use nix::sched::CpuSet;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};

use crate::affinity;
use crate::channel::{self, Choice, Engine, Opened, Patience, SocketChannel};
use crate::config::ZeroCopyMode;
use crate::dirty::Tracker;
use crate::iteration::Plan;
use crate::peer::{self, Connection};
use crate::stats::StreamStats;
use crate::stream::{InFlight, Job, OutgoingStream, Pass, Report, StreamError, StreamSetup, Tell};
use crate::sys::sched::{Slice, set_slice};
use crate::sys::wake::Wake;

/// What a stream's thread leaves: packets without an acknowledgement, once all memory is back.
type Left = io::Result<Vec<InFlight>>;

/// What all of them leave, by the number of their stream.
type Ended = io::Result<Vec<(u16, Vec<InFlight>)>>;

/// A stream's thread, and the queue that holds its next job.
#[derive(Debug)]
struct Member {
    stream: u16,
    jobs: jobs::SyncSender<Job>,
    thread: thread::JoinHandle<Left>,
}

/// All streams of an epoch.
#[derive(Debug)]
pub(super) struct Crew {
    members: Vec<Member>,
    /// Waits for the threads. Kept, so that whoever stops waiting for it can come back.
    ending: Option<JoinHandle<Ended>>,
    reports: mpsc::UnboundedReceiver<Result<Report, StreamError>>,
    report: mpsc::UnboundedSender<Result<Report, StreamError>>,
    wake: Wake,
    /// Where its threads run; `None` is anywhere.
    cpus: Option<CpuSet>,
}

impl Crew {
    /// No stream yet; all of them will run on these CPUs, or on any.
    pub(super) fn new(cpus: Option<CpuSet>) -> io::Result<Self> {
        let (report, reports) = mpsc::unbounded_channel();
        Ok(Self {
            members: Vec::new(),
            ending: None,
            reports,
            report,
            wake: Wake::new()?,
            cpus,
        })
    }

    /// One for the next epoch, without a stream yet.
    pub(super) fn successor(&self) -> io::Result<Self> {
        Self::new(self.cpus)
    }

    /// Ends every wait of its streams.
    pub(super) fn wake(&self) -> Wake {
        self.wake.clone()
    }

    /// Opens the way that was chosen, or plain sends, on a connection whose preamble was answered. The memory
    /// that may be locked is shared by `streams`.
    pub(super) fn open(
        &self,
        connection: Connection,
        setup: &StreamSetup,
        choice: Option<&Choice>,
        streams: u16,
    ) -> io::Result<Opened> {
        let patience = Patience {
            stall_timeout: setup.stall_timeout,
            wake: self.wake.clone(),
        };
        let fd = peer::into_descriptor(connection)?;
        let within_host = channel::within_host::keep_queue_short(fd.as_fd())?;
        let Some(choice) = choice else {
            return Ok(Opened {
                channel: Box::new(SocketChannel::new(fd, patience, false)?),
                engine: None,
                note: String::new(),
                within_host,
            });
        };
        // What is never sent from a registration is not registered either.
        let regions = setup
            .regions
            .iter()
            .filter(|(_, tracker)| setup.integrity || matches!(tracker, Tracker::None));
        let regions = regions.map(|(region, _)| Arc::clone(region));
        let share = channel::share(channel::memlock_limit(), streams);
        channel::open(fd, patience, choice, regions.collect(), share)
    }

    /// Starts stream `index`.
    pub(super) fn start(
        &mut self,
        index: u16,
        opened: Opened,
        setup: StreamSetup,
        stats: Arc<StreamStats>,
        tell: Tell,
    ) -> io::Result<()> {
        let stream = OutgoingStream::new(index, opened, setup, stats, tell);
        // One job is under way or waiting; the barrier between Iterations lets there be no second.
        let (jobs, next) = jobs::sync_channel(1);
        let report = self.report.clone();
        let cpus = self.cpus;
        let thread = thread::Builder::new()
            .name(format!("mf-send-{index}"))
            .spawn(move || {
                let _ = set_slice(Slice::Usual);
                affinity::keep_to(cpus);
                work(stream, &next, &report)
            })?;
        self.members.push(Member {
            stream: index,
            jobs,
            thread,
        });
        Ok(())
    }

    /// Hands every stream its part of `plan`.
    pub(super) fn begin(&self, plan: &Arc<Plan>, pass: Pass) {
        for member in &self.members {
            // A stream whose thread has ended has reported why, and that is what will be heard.
            let _ = member.jobs.send(Job {
                plan: Arc::clone(plan),
                pass,
                streams: self.len(),
            });
        }
    }

    /// How many reports there are to be heard after `begin`.
    pub(super) fn len(&self) -> u16 {
        u16::try_from(self.members.len()).expect("streams are limited to 256")
    }

    /// The next report of a stream. Dropping the future loses nothing.
    pub(super) async fn hear(&mut self) -> Result<Report, StreamError> {
        // `self.report` keeps the channel open.
        self.reports.recv().await.unwrap_or(Err(StreamError::Ended))
    }

    /// Ends the streams in an orderly way, if nothing is queued or lent, as after a barrier. Gives the
    /// packets that were not acknowledged, by stream; `Err`: some memory that was lent did not come back.
    pub(super) async fn finish(&mut self) -> Ended {
        let members = std::mem::take(&mut self.members);
        let ending = self
            .ending
            .get_or_insert_with(|| spawn_blocking(move || join(members)));
        let ended = ending.await;
        self.ending = None;
        ended?
    }

    /// Ends the streams now, and waits until what was lent is back, or kept mapped for good.
    pub(super) async fn abandon(&mut self) -> Ended {
        self.wake.wake();
        self.finish().await
    }
}

/// What streams lend with where `mode` is asked for; `None`: they do not.
pub(super) async fn choose(mode: ZeroCopyMode) -> io::Result<Option<Choice>> {
    let wanted = match mode {
        ZeroCopyMode::Off => return Ok(None),
        ZeroCopyMode::Auto => None,
        ZeroCopyMode::MsgZerocopy => Some(Engine::MsgZerocopy),
        ZeroCopyMode::IoUring => Some(Engine::IoUring),
        ZeroCopyMode::IoUringFixed => Some(Engine::IoUringFixed),
    };
    Ok(Some(spawn_blocking(move || Choice::of(wanted)).await?))
}

fn join(members: Vec<Member>) -> Ended {
    // All queues first: a thread ends when its own is gone.
    let threads: Vec<_> = members
        .into_iter()
        .map(|member| (member.stream, member.thread))
        .collect();
    let left = threads.into_iter().map(|(stream, thread)| {
        let left = thread.join();
        (
            stream,
            left.unwrap_or_else(|_| Err(io::Error::other("a stream's thread panicked"))),
        )
    });
    // Every thread is waited for, whatever the first error is.
    let left: Vec<(u16, Left)> = left.collect();
    left.into_iter()
        .map(|(stream, left)| Ok((stream, left?)))
        .collect()
}

/// A stream's thread: does jobs until there are none or one fails.
fn work(
    mut stream: OutgoingStream,
    jobs: &jobs::Receiver<Job>,
    report: &mpsc::UnboundedSender<Result<Report, StreamError>>,
) -> Left {
    while let Ok(job) = jobs.recv() {
        let result = stream.run(&job);
        let failed = result.is_err();
        // The attempt may be over, and then nobody wants to know.
        let _ = report.send(result);
        if failed {
            break;
        }
    }
    // Between two jobs nothing is queued or lent; then this only hangs up.
    stream.abandon()
}

/// How long the reason for a stream's failure may take to arrive on the conversation.
pub(super) const REASON_WAIT: Duration = Duration::from_millis(500);
