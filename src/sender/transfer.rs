//! One attempt to move a set of Regions to one receiver. [`Transfer::run`] is the whole story.
//!
//! Up to the commit record any failure ends with the writer running and nothing at the destination;
//! behind it nothing thaws the writer until the receiver has said that it is not the owner (rule 4).

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::time::timeout;

use crate::config::{FreezeConfig, Integrity, TransferParameters, WhenNotConverging};
use crate::dirty::Tracker;
use crate::endpoint::Endpoint;
use crate::freeze::Freezer;
use crate::guardian::Guardian;
use crate::iteration::{Next, Plan, State};
use crate::journal::{CommitSent, Journal};
use crate::limits::PAGE_BYTES;
use crate::peer::{self, Conversation, PeerError};
use crate::region::RegionError;
use crate::stream::{Pace, Pass, Report, StreamError, StreamSetup};
use crate::sys::wake::Wake;
use crate::wire::{
    BootId, FromReceiver, FromSender, Hex128, Offer, OfferedRegion, Preamble, Purpose,
    StreamTotals, Token,
};

use super::crew::{Crew, REASON_WAIT};
use super::debt::{Debt, Source};
use super::error::TransferError;
use super::registry::{Registered, Tracking};
use super::standstill::Standstill;
use super::status::{Attempt, Downtime, IterationRow, Status, per_second};

/// How long a failing transfer takes to tell the receiver so.
const GOODBYE: Duration = Duration::from_secs(1);

type Talk = Conversation<FromSender, FromReceiver>;

/// What the writers do during an Iteration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writer {
    Runs,
    StandsStill,
}

/// How a transfer that got as far as the commit record ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The receiver owns the Regions; the record has served.
    Committed(Box<CommitSent>),
    /// The answer to the commit did not come: only the receiver knows.
    Indeterminate(Box<CommitSent>),
}

/// What a transfer needs from the daemon.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) endpoint: Endpoint,
    pub(super) regions: Vec<Registered>,
    pub(super) journal: Arc<Journal>,
    pub(super) guardian: Arc<Mutex<Guardian>>,
    pub(super) boot_id: BootId,
}

/// A transfer on its way.
pub(super) struct Transfer {
    attempt: Arc<Attempt>,
    parameters: TransferParameters,
    order: Order,
    nonce: Hex128,
    debt: Debt,
    iteration: u32,
    /// Bytes that were left when the last Iteration began.
    remaining_before: u64,
    /// Pages that the last Iteration found changed by reading them.
    changed_pages: u64,
    inspect_bytes_per_second: u64,
    totals: Vec<StreamTotals>,
    /// Where the conversation went: streams and inquiries go to the same receiver.
    reached: Endpoint,
    talk: Option<Talk>,
    receiver_boot_id: BootId,
    wake: Wake,
    crew: Crew,
    standstill: Standstill,
    downtime: Downtime,
}

impl Transfer {
    /// Prepares a transfer; talks to nobody yet.
    pub(super) fn new(attempt: Arc<Attempt>, order: Order) -> Result<Self, TransferError> {
        let parameters = attempt.parameters.clone();
        if parameters.when_not_converging == WhenNotConverging::Throttle {
            return Err(TransferError::NotServed(
                "when-not-converging = \"throttle\"",
            ));
        }
        let source = |registered: &Registered| {
            let region = Arc::clone(&registered.region);
            let live = registered.freeze != FreezeConfig::None;
            let tracker = match &registered.tracking {
                Tracking::None => Tracker::None,
                Tracking::Scan if live && parameters.integrity == Integrity::Off => {
                    return Err(TransferError::ScanWithoutIntegrity {
                        name: region.name().clone(),
                    });
                }
                Tracking::Scan => {
                    Tracker::scan(&region).map_err(TransferError::local("make fingerprints"))?
                }
                Tracking::Exact(exact) => Tracker::exact(Arc::clone(exact)),
            };
            Ok((region, tracker))
        };
        let sources: Arc<[Source]> = order.regions.iter().map(source).collect::<Result<_, _>>()?;
        let nonce = Hex128::random().map_err(TransferError::local("make a nonce"))?;
        let standstill = Standstill::new(nonce, Arc::clone(&order.guardian));
        let wake = Wake::new().map_err(TransferError::local("make an eventfd"))?;
        Ok(Self {
            debt: Debt::of_all(sources),
            nonce,
            attempt,
            parameters,
            iteration: 0,
            remaining_before: u64::MAX,
            changed_pages: 0,
            inspect_bytes_per_second: 0,
            totals: Vec::new(),
            reached: order.endpoint.clone(),
            talk: None,
            receiver_boot_id: BootId("".into()),
            crew: Crew::new(wake.clone()),
            wake,
            order,
            standstill,
            downtime: Downtime::default(),
        })
    }

    /// Asks the receiver whether it would take the Regions, and sends nothing.
    pub(super) async fn rehearse(mut self) -> Result<(), TransferError> {
        self.agree(true).await?;
        Ok(())
    }

    /// Runs the transfer to its end, and leaves nothing behind whatever that end is.
    pub(super) async fn drive(mut self) -> Result<Outcome, TransferError> {
        let cancel = self.attempt.cancel.clone();
        let limit = self.parameters.timeout;
        let ready = tokio::select! {
            biased;
            () = cancel.cancelled() => Err(TransferError::Cancelled),
            () = expired(limit) => Err(TransferError::TimedOut { seconds: limit.unwrap_or_default().as_secs_f32() }),
            ready = self.run() => ready,
        };
        // Outside of the select: behind the record there is no cancel and no timeout any more.
        match ready.and_then(|()| self.record_commit()) {
            Ok(record) => Ok(self.commit(record).await),
            Err(error) => {
                self.undo(&error).await;
                Err(error)
            }
        }
    }

    /// Everything up to the commit, which either side may still refuse.
    async fn run(&mut self) -> Result<(), TransferError> {
        let (token, epoch) = self.agree(false).await?;
        self.open_streams(token, epoch).await?;
        self.debt.arm().await?;
        while !self.converged()? {
            self.iterate(Writer::Runs).await?;
        }
        self.freeze().await?;
        self.debt.harvest_frozen().await?;
        self.settle().await?;
        self.check_frozen().await?;
        self.prepare().await
    }

    /// Version, Regions, number of streams: the receiver says yes, or why not.
    async fn agree(&mut self, dry_run: bool) -> Result<(Token, u32), TransferError> {
        let patience = self.parameters.stall_timeout;
        let preamble = Preamble::new(Purpose::Conversation, Token::ZERO, 0);
        let connection = peer::connect(&self.order.endpoint, preamble, patience).await?;
        self.reached = peer::reached(&connection, &self.order.endpoint);
        let offer = FromSender::Offer(self.offer(dry_run)?);
        let talk = self.talk.insert(Talk::start(connection, patience));
        talk.say(&offer).await?;
        match talk.hear().await? {
            FromReceiver::Accept {
                token,
                epoch,
                boot_id,
            } => {
                self.receiver_boot_id = boot_id;
                Ok((token, epoch))
            }
            other => Err(unexpected(other)),
        }
    }

    fn offer(&self, dry_run: bool) -> Result<Offer, RegionError> {
        let describe = |(region, _): &Source| {
            Ok(OfferedRegion {
                name: region.name().clone(),
                length: region.bytes(),
                data_bytes: region.allocated_bytes()?,
                page_size: region.page_size(),
            })
        };
        Ok(Offer {
            id: self.attempt.id.clone(),
            nonce: self.nonce,
            boot_id: self.order.boot_id.clone(),
            streams: self.parameters.streams,
            integrity: self.parameters.integrity == Integrity::Crc32c,
            window: self.parameters.window,
            stall_timeout_ms: u64::try_from(self.parameters.stall_timeout.as_millis())
                .unwrap_or(u64::MAX),
            dry_run,
            regions: self
                .debt
                .sources()
                .iter()
                .map(describe)
                .collect::<Result<_, _>>()?,
        })
    }

    /// One connection and one thread per stream.
    async fn open_streams(&mut self, token: Token, epoch: u32) -> Result<(), TransferError> {
        let setup = StreamSetup {
            regions: Arc::clone(self.debt.sources()),
            integrity: self.parameters.integrity == Integrity::Crc32c,
            window: self.parameters.window,
            pace: Arc::new(Pace::new(self.parameters.max_bandwidth, Instant::now())),
            stall_timeout: self.parameters.stall_timeout,
            wake: self.wake.clone(),
            epoch,
        };
        for (stream, stats) in (0..).zip(&self.attempt.streams) {
            let preamble = Preamble::new(Purpose::Stream(stream), token, epoch);
            let connection = peer::connect(&self.reached, preamble, setup.stall_timeout).await?;
            self.crew
                .start(
                    connection,
                    setup.clone(),
                    self.parameters.zero_copy,
                    Arc::clone(stats),
                )
                .map_err(TransferError::local("start a stream"))?;
        }
        self.attempt.enter(Status::Active);
        Ok(())
    }

    /// Whether so little is left that the writer can be stopped for it.
    fn converged(&self) -> Result<bool, TransferError> {
        if self.iteration == 0 {
            return Ok(false);
        }
        let mut inspect_bytes = 0;
        for (region, tracker) in self.debt.sources().iter() {
            inspect_bytes += tracker.inspect_bytes(region)?;
        }
        let state = State {
            iterations: self.iteration,
            remaining_bytes: self.remaining_bytes()?,
            remaining_bytes_before: self.remaining_before,
            inspect_bytes,
            bytes_per_second: self.attempt.bytes_per_second(),
            inspect_bytes_per_second: self.inspect_bytes_per_second,
        };
        self.attempt.expect(state.expected_downtime());
        match state.next(
            self.parameters.downtime_limit,
            self.parameters.max_iterations,
        ) {
            Next::Iterate => Ok(false),
            Next::Freeze => Ok(true),
            Next::NotConverging
                if self.parameters.when_not_converging == WhenNotConverging::Fail =>
            {
                Err(TransferError::NotConverging {
                    iterations: self.iteration,
                    remaining: state.remaining_bytes,
                })
            }
            Next::NotConverging => {
                tracing::warn!(id = %self.attempt.id, remaining = state.remaining_bytes, "max-iterations reached: freezing with more left than the downtime limit allows");
                Ok(true)
            }
        }
    }

    /// What is still to be sent, as far as anyone can know: the debt, and for Regions whose writes are
    /// found by reading, as much as the last Iteration found.
    fn remaining_bytes(&self) -> Result<u64, RegionError> {
        let mut bytes = self.debt.bytes() + self.changed_pages * PAGE_BYTES;
        if self.iteration == 1 {
            // The first pass sent everything and so could find nothing: all of it may have changed.
            for ((region, tracker), registered) in
                self.debt.sources().iter().zip(&self.order.regions)
            {
                if registered.freeze != FreezeConfig::None {
                    bytes += tracker.inspect_bytes(region)?;
                }
            }
        }
        Ok(bytes)
    }

    /// One pass over what is owed or may have been written. When it ends, everything that was lent is
    /// released and everything that was sent is applied, on every stream.
    async fn iterate(&mut self, writer: Writer) -> Result<(), TransferError> {
        if self.iteration > 0 {
            self.remaining_before = self.remaining_bytes()?;
        }
        self.iteration += 1;
        let started = Instant::now();
        let plan = self
            .debt
            .plan(self.iteration, self.parameters.packet_size)
            .await?;
        let planned = plan.owed_pages();
        let reports = self.pass(plan, Pass::Send).await?;

        let time = started.elapsed();
        let pages: u64 = reports.iter().map(|report| report.pages).sum();
        self.changed_pages = pages.saturating_sub(planned);
        // Streams read and send side by side, so their rates add up; what each of them takes for
        // reading says nothing about the link, and the other way round.
        let read = reports
            .iter()
            .map(|report| rate(report.read_bytes, report.read_time));
        self.inspect_bytes_per_second = read.sum();
        let sent = reports
            .iter()
            .map(|report| rate(report.payload_bytes, report.send_time));
        self.totals = reports.iter().map(|report| report.totals).collect();
        self.debt
            .paid_except(reports.iter().flat_map(|report| &report.torn));
        let torn_pages = self.debt.pages();
        if writer == Writer::Runs {
            self.debt.harvest().await?;
        }
        self.attempt.iteration_ended(IterationRow {
            pass: self.iteration,
            payload_bytes: reports.iter().map(|report| report.payload_bytes).sum(),
            pages,
            torn_pages,
            dirty_bytes: self.remaining_bytes()?,
            bytes_per_second: sent.sum(),
            time,
            flush_time: reports
                .iter()
                .map(|report| report.flush_time)
                .max()
                .unwrap_or_default(),
        });
        Ok(())
    }

    /// Has every stream do its part of a plan; their reports are ordered by nothing but completion,
    /// except that totals are put in the streams' order.
    async fn pass(&mut self, plan: Arc<Plan>, pass: Pass) -> Result<Vec<Report>, TransferError> {
        let talk = under_way(&mut self.talk)?;
        self.crew.begin(&plan, pass);
        let mut reports = Vec::with_capacity(self.crew.len());
        while reports.len() < self.crew.len() {
            tokio::select! {
                report = self.crew.hear() => match report {
                    Ok(report) => reports.push(report),
                    Err(error) => return Err(reason(error, talk).await),
                },
                message = talk.hear() => return Err(unexpected(message?)),
            }
        }
        reports.sort_by_key(|report| report.stream);
        Ok(reports)
    }

    /// Stops the writers, and waits until they are seen to stand still.
    async fn freeze(&mut self) -> Result<(), TransferError> {
        self.attempt.enter(Status::Device);
        let freezers: Vec<Freezer> = self
            .order
            .regions
            .iter()
            .map(|registered| registered.freezer.clone())
            .collect();
        self.standstill
            .freeze(freezers, self.parameters.freeze_timeout)
            .await?;
        self.downtime.freeze = self.standstill.elapsed();
        Ok(())
    }

    /// The last Iteration, again for what arrives damaged: nothing writes now, so what does not match
    /// its checksum was changed on the way.
    async fn settle(&mut self) -> Result<(), TransferError> {
        let (mut least, mut progress) = (u64::MAX, Instant::now());
        // What is found by reading is not known before it is read.
        let mut unread = self.scans();
        while unread || self.debt.pages() > 0 {
            self.iterate(Writer::StandsStill).await?;
            unread = false;
            let owed = self.debt.pages();
            // Half of it, not one page: a peer must not be able to keep the writer frozen page by page.
            if owed <= least / 2 {
                (least, progress) = (owed, Instant::now());
            } else if progress.elapsed() > self.parameters.stall_timeout {
                return Err(TransferError::Corrupt {
                    bytes: owed * PAGE_BYTES,
                });
            }
        }
        self.downtime.send = self.standstill.elapsed() - self.downtime.freeze;
        Ok(())
    }

    /// Whether writes to some Region are found by reading it.
    fn scans(&self) -> bool {
        let mut trackers = self.debt.sources().iter().map(|(_, tracker)| tracker);
        trackers.any(|tracker| tracker.fingerprints().is_some())
    }

    /// Reads once more what is tracked by reading: what was frozen must not have written.
    async fn check_frozen(&mut self) -> Result<(), TransferError> {
        let started = Instant::now();
        for (region, _) in self.debt.sources().iter() {
            region.check_length()?;
        }
        if self.scans() {
            let plan = self
                .debt
                .plan(self.iteration, self.parameters.packet_size)
                .await?;
            let reports = self.pass(plan, Pass::Check).await?;
            let pages = reports.iter().map(|report| report.pages).sum();
            if pages > 0 {
                return Err(TransferError::NotFrozen { pages });
            }
        }
        self.downtime.check = started.elapsed();
        Ok(())
    }

    /// The receiver counts the same as we do, and has everything.
    async fn prepare(&mut self) -> Result<(), TransferError> {
        self.attempt.enter(Status::Completing);
        let started = Instant::now();
        let streams = self.totals.clone();
        let talk = under_way(&mut self.talk)?;
        talk.say(&FromSender::Prepare { streams }).await?;
        // Heartbeats are no progress, and the writer stands still meanwhile.
        let patience = self.parameters.stall_timeout;
        // While the receiver makes itself ready, every tracker is asked once more.
        let (answer, written) = tokio::join!(timeout(patience, talk.hear()), self.debt.harvest());
        match written? {
            0 => {}
            pages => return Err(TransferError::NotFrozen { pages }),
        }
        match answer {
            Ok(message) => match message? {
                FromReceiver::Prepared {} => {}
                other => return Err(unexpected(other)),
            },
            Err(_) => {
                return Err(TransferError::NotPrepared {
                    seconds: patience.as_secs_f32(),
                });
            }
        }
        // The last look before the point of no return.
        self.standstill.check()?;
        self.downtime.prepare = started.elapsed();
        Ok(())
    }

    /// The point of no return: from here on only the receiver can say who owns the Regions, and the
    /// writers stay stopped whatever becomes of this process.
    fn record_commit(&mut self) -> Result<CommitSent, TransferError> {
        if !self.attempt.begin_commit() {
            return Err(TransferError::Cancelled);
        }
        let record = CommitSent {
            nonce: self.nonce,
            id: self.attempt.id.clone(),
            uri: self.reached.to_string(),
            boot_id: self.order.boot_id.clone(),
            receiver_boot_id: self.receiver_boot_id.clone(),
            regions: self.attempt.regions.clone(),
            stopped: self.standstill.record(),
        };
        let written = self.order.journal.decide(self.nonce, record);
        let record = written.map_err(TransferError::local("record the commit"))?;
        self.standstill.keep();
        Ok(record)
    }

    async fn commit(mut self, record: CommitSent) -> Outcome {
        let started = Instant::now();
        let nonce = self.nonce;
        let answer = async {
            let talk = under_way(&mut self.talk)?;
            talk.say(&FromSender::Commit { nonce }).await?;
            talk.hear().await
        };
        let answer = answer.await;
        let now = Instant::now();
        self.crew.finish().await;
        match answer {
            Ok(FromReceiver::Committed {}) => {
                self.downtime.commit = now - started;
                self.downtime.total = now - self.standstill.since();
                self.attempt.set_downtime(self.downtime);
                Outcome::Committed(Box::new(record))
            }
            // Even a refusal is not taken at its word here: the inquiry makes it one for ever.
            answer => {
                tracing::warn!(id = %self.attempt.id, ?answer, "the commit was sent, and its answer did not come");
                Outcome::Indeterminate(Box::new(record))
            }
        }
    }

    /// Back to where it was: the writer first.
    async fn undo(self, error: &TransferError) {
        self.standstill.thaw().await;
        self.debt.restore();
        if let Some(talk) = &self.talk {
            let abort = FromSender::Abort {
                code: error.code().into(),
                desc: error.to_string().into(),
            };
            let _ = timeout(GOODBYE, talk.say(&abort)).await;
        }
        self.crew.abandon().await;
        if let Some(talk) = self.talk {
            talk.farewell().await;
        }
    }
}

/// The conversation, which `agree` has started.
fn under_way(talk: &mut Option<Talk>) -> Result<&mut Talk, PeerError> {
    talk.as_mut()
        .ok_or_else(|| PeerError::Lost(std::io::ErrorKind::NotConnected.into()))
}

/// A rate over what a stream did, 0 if it did nothing.
fn rate(bytes: u64, time: Duration) -> u64 {
    if bytes == 0 {
        0
    } else {
        per_second(bytes, time)
    }
}

async fn expired(limit: Option<Duration>) {
    match limit {
        Some(limit) => tokio::time::sleep(limit).await,
        None => std::future::pending().await,
    }
}

/// What a message means that is not the one that was due.
fn unexpected(message: FromReceiver) -> TransferError {
    match message {
        FromReceiver::Refuse { code, desc } => refused(&code, &desc),
        other => {
            let text = serde_json::to_value(other).unwrap_or_default();
            TransferError::OutOfPlace(text["type"].to_string())
        }
    }
}

fn refused(code: &impl ToString, desc: &impl ToString) -> TransferError {
    TransferError::Refused {
        code: code.to_string(),
        desc: desc.to_string(),
    }
}

/// Why a stream failed. If its connection did, the receiver may just be telling us.
async fn reason(error: StreamError, talk: &mut Talk) -> TransferError {
    if matches!(error, StreamError::Lost { .. })
        && let Ok(Ok(FromReceiver::Refuse { code, desc })) = timeout(REASON_WAIT, talk.hear()).await
    {
        return refused(&code, &desc);
    }
    error.into()
}
