//! The streams of one attempt: a thread each, and the one place where they meet the control plane.

use std::io;
use std::sync::Arc;
use std::sync::mpsc as jobs;
use std::thread;
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use tokio::sync::mpsc;

use crate::channel::{self, Engine, Opened, Patience, SocketChannel};
use crate::config::{CpuList, ZeroCopyMode};
use crate::dirty::Tracker;
use crate::iteration::Plan;
use crate::peer::{self, Connection};
use crate::stats::StreamStats;
use crate::stream::{Job, OutgoingStream, Pass, Report, StreamError, StreamSetup, Tell};
use crate::sys::wake::Wake;

use super::error::TransferError;

/// A stream's thread, and the queue that holds its next job.
#[derive(Debug)]
struct Member {
    jobs: jobs::SyncSender<Job>,
    thread: thread::JoinHandle<()>,
}

/// All streams of an attempt.
#[derive(Debug)]
pub(super) struct Crew {
    members: Vec<Member>,
    reports: mpsc::UnboundedReceiver<Result<Report, StreamError>>,
    report: mpsc::UnboundedSender<Result<Report, StreamError>>,
    wake: Wake,
    /// Where its threads run; `None` is anywhere.
    cpus: Option<CpuSet>,
}

impl Crew {
    pub(super) fn new(wake: Wake, cpus: Option<CpuSet>) -> Self {
        let (report, reports) = mpsc::unbounded_channel();
        Self {
            members: Vec::new(),
            reports,
            report,
            wake,
            cpus,
        }
    }

    /// Starts a stream on a connection whose preamble was answered.
    pub(super) fn start(
        &mut self,
        connection: Connection,
        setup: StreamSetup,
        mode: ZeroCopyMode,
        streams: u16,
        stats: Arc<StreamStats>,
        tell: Tell,
    ) -> io::Result<()> {
        let index = u16::try_from(self.members.len()).expect("streams are limited to 256");
        let patience = Patience {
            stall_timeout: setup.stall_timeout,
            wake: self.wake.clone(),
        };
        let fd = peer::into_descriptor(connection)?;
        let wanted = match mode {
            ZeroCopyMode::Off => None,
            ZeroCopyMode::Auto => Some(None),
            ZeroCopyMode::MsgZerocopy => Some(Some(Engine::MsgZerocopy)),
            ZeroCopyMode::IoUring => Some(Some(Engine::IoUring)),
            ZeroCopyMode::IoUringFixed => Some(Some(Engine::IoUringFixed)),
        };
        let opened = match wanted {
            None => Opened {
                channel: Box::new(SocketChannel::new(fd, patience, false)?),
                engine: None,
                note: String::new(),
            },
            Some(wanted) => {
                // What is never sent from a registration is not registered either.
                let regions = setup
                    .regions
                    .iter()
                    .filter(|(_, tracker)| setup.integrity || matches!(tracker, Tracker::None));
                let regions = regions.map(|(region, _)| Arc::clone(region));
                let share = channel::share(channel::memlock_limit(), streams);
                channel::open(fd, patience, wanted, regions.collect(), share)?
            }
        };
        let stream = OutgoingStream::new(index, opened, setup, stats, tell);
        // One job is under way or waiting; the barrier between Iterations lets there be no second.
        let (jobs, next) = jobs::sync_channel(1);
        let report = self.report.clone();
        let cpus = self.cpus;
        let thread = thread::Builder::new()
            .name(format!("mf-send-{index}"))
            .spawn(move || {
                // The list was checked when the attempt began. CPUs that have gone since are no reason to fail.
                if let Some(Err(error)) = cpus.map(|cpus| sched_setaffinity(THIS_THREAD, &cpus)) {
                    tracing::warn!(%error, "a stream runs on any CPU: its affinity could not be set");
                }
                work(stream, &next, &report);
            })?;
        self.members.push(Member { jobs, thread });
        Ok(())
    }

    /// Hands every stream its part of `plan`.
    pub(super) fn begin(&self, plan: &Arc<Plan>, pass: Pass) {
        for member in &self.members {
            // A stream whose thread has ended has reported why, and that is what will be heard.
            let _ = member.jobs.send(Job {
                plan: Arc::clone(plan),
                pass,
            });
        }
    }

    /// How many reports there are to be heard after `begin`.
    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    /// The next report of a stream. Dropping the future loses nothing.
    pub(super) async fn hear(&mut self) -> Result<Report, StreamError> {
        // `self.report` keeps the channel open.
        self.reports.recv().await.unwrap_or(Err(StreamError::Ended))
    }

    /// Ends the streams in an orderly way: nothing is queued or lent after a barrier.
    pub(super) async fn finish(self) {
        let threads: Vec<_> = self
            .members
            .into_iter()
            .map(|member| member.thread)
            .collect();
        join(threads).await;
    }

    /// Ends the streams now. When this returns, what was lent is back, or kept mapped for good.
    pub(super) async fn abandon(self) {
        self.wake.wake();
        self.finish().await;
    }
}

async fn join(threads: Vec<thread::JoinHandle<()>>) {
    let join = move || {
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a stream's thread panicked");
            }
        }
    };
    let _ = tokio::task::spawn_blocking(join).await;
}

/// The CPUs that streams may run on, out of those that we may: `None` if any will do.
pub(super) fn affinity(list: &CpuList) -> Result<Option<CpuSet>, TransferError> {
    if list.is_any() {
        return Ok(None);
    }
    let ours = sched_getaffinity(THIS_THREAD)
        .map_err(|error| TransferError::local("ask for the CPUs of this process")(error.into()))?;
    let usable: Vec<_> = (0..CpuSet::count())
        .filter(|&cpu| ours.is_set(cpu).unwrap_or(false))
        .collect();
    let chosen = list.choose(&usable);
    if chosen.is_empty() {
        return Err(TransferError::NoCpu {
            list: list.clone(),
            usable,
        });
    }
    let mut set = CpuSet::new();
    for cpu in chosen {
        // Every one of them was in a set of the same size.
        let _ = set.set(cpu);
    }
    Ok(Some(set))
}

/// Who asks, in the words of sched_setaffinity(2).
const THIS_THREAD: Pid = Pid::from_raw(0);

/// A stream's thread: does jobs until there are none or one fails.
fn work(
    mut stream: OutgoingStream,
    jobs: &jobs::Receiver<Job>,
    report: &mpsc::UnboundedSender<Result<Report, StreamError>>,
) {
    while let Ok(job) = jobs.recv() {
        let result = stream.run(&job);
        let failed = result.is_err();
        // The attempt may be over, and then nobody wants to know.
        let _ = report.send(result);
        if failed {
            if let Err(error) = stream.abandon() {
                tracing::warn!(%error, "a stream could not be reset");
            }
            return;
        }
    }
}

/// How long the reason for a stream's failure may take to arrive on the conversation.
pub(super) const REASON_WAIT: Duration = Duration::from_millis(500);
