//! One attempt to move a set of Regions to one receiver. [`Transfer::run`] is the whole story; its
//! chapters are the files beside this one.
//!
//! A connection that is lost on the way is replaced (`recovery`), and the story goes on where it was.
//! Up to the commit record any other failure ends with the writer running and nothing at the destination;
//! behind it nothing thaws the writer until the receiver has said that it is not the owner (rule 4).

mod blob;
mod handover;
mod opening;
mod passes;
mod recovery;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::time::timeout;

use crate::affinity;
use crate::config::{FreezeConfig, Integrity, TransferParameters, WhenNotConverging};
use crate::dirty::Tracker;
use crate::endpoint::Endpoint;
use crate::guardian::Guardian;
use crate::journal::{CommitSent, Journal, Proposal};
use crate::peer::{Conversation, PeerError};
use crate::rates::Rates;
use crate::stream::StreamError;
use crate::wire::{BootId, FromReceiver, FromSender, Hex128, StreamTotals, Token};

use blob::{Blob, Spent};
use recovery::Clock;

use super::crew::{Crew, REASON_WAIT};
use super::debt::{Debt, Source};
use super::error::TransferError;
use super::registry::{Registered, Tracking};
use super::slowdown::Slowdown;
use super::standstill::Standstill;
use super::status::{Attempt, Downtime, Status};

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
    /// What receivers know the daemon by.
    pub(super) identity: BootId,
}

/// A transfer on its way.
pub(super) struct Transfer {
    attempt: Arc<Attempt>,
    parameters: TransferParameters,
    order: Order,
    nonce: Hex128,
    /// Proves to the receiver that connections are this attempt's.
    token: Token,
    /// Counts how often the connections were replaced.
    epoch: u32,
    debt: Debt,
    /// The last Iteration that was begun.
    iteration: u32,
    /// Iterations of this nonce that carried all that there was.
    passes: u32,
    /// The last Iteration was one of them: nothing that was known is older.
    caught_up: bool,
    /// Bytes that were left when the last Iteration began.
    remaining_before: u64,
    /// Pages that the last Iteration found changed by reading them.
    changed_pages: u64,
    /// Of the pages that were compared last, the share that had changed.
    changed_share: f64,
    inspect_bytes_per_second: u64,
    rates: Rates,
    /// How long the last Iteration took.
    time_before: Duration,
    /// When trackers that know by themselves were asked the last time.
    asked: Instant,
    /// They were asked while the writers stood still, and nothing was sent since.
    asked_last: bool,
    /// The Iteration after which the receiver said, over these connections, that it is prepared.
    prepared_after: Option<u32>,
    /// How long an answer of the receiver takes.
    round_trip: Duration,
    totals: Vec<StreamTotals>,
    /// Where the conversation went: streams and inquiries go to the same receiver.
    reached: Endpoint,
    talk: Option<Talk>,
    /// The protocol version that the receiver speaks with us.
    version: u16,
    receiver_boot_id: BootId,
    crew: Crew,
    clock: Clock,
    /// If writers may be slowed down.
    slowdown: Option<Slowdown>,
    standstill: Standstill,
    /// The commit record as it was to be when the writers were stopped.
    proposal: Option<Proposal<CommitSent>>,
    blob: Option<Blob>,
    spent_blob: Option<Spent>,
    downtime: Downtime,
}

impl Transfer {
    /// Prepares a transfer; talks to nobody yet.
    pub(super) fn new(attempt: Arc<Attempt>, order: Order) -> Result<Self, TransferError> {
        let parameters = attempt.parameters.clone();
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
                Tracking::Exact(exact) if parameters.skip_unchanged => {
                    Tracker::comparing(Arc::clone(exact), &region)
                        .map_err(TransferError::local("make fingerprints"))?
                }
                Tracking::Exact(exact) => Tracker::exact(Arc::clone(exact)),
            };
            Ok((region, tracker))
        };
        let sources: Arc<[Source]> = order.regions.iter().map(source).collect::<Result<_, _>>()?;
        let nonce = Hex128::random().map_err(TransferError::local("make a nonce"))?;
        let standstill = Standstill::new(nonce, Arc::clone(&attempt), Arc::clone(&order.guardian));
        let cpus = affinity::chosen(&parameters.cpus)?;
        let slowdown = match parameters.when_not_converging {
            WhenNotConverging::Throttle => {
                let guardian = Arc::clone(&order.guardian);
                Some(Slowdown::new(
                    Arc::clone(&attempt),
                    guardian,
                    &order.regions,
                )?)
            }
            WhenNotConverging::Freeze | WhenNotConverging::Fail => None,
        };
        Ok(Self {
            debt: Debt::of_all(sources),
            nonce,
            attempt,
            token: Token::ZERO,
            epoch: 0,
            iteration: 0,
            passes: 0,
            caught_up: false,
            remaining_before: u64::MAX,
            changed_pages: 0,
            changed_share: 1.0,
            inspect_bytes_per_second: 0,
            rates: Rates::default(),
            time_before: Duration::ZERO,
            asked: Instant::now(),
            asked_last: false,
            prepared_after: None,
            round_trip: Duration::ZERO,
            totals: vec![StreamTotals::default(); parameters.streams.into()],
            reached: order.endpoint.clone(),
            talk: None,
            version: 0,
            receiver_boot_id: BootId("".into()),
            crew: Crew::new(cpus).map_err(TransferError::local("make an eventfd"))?,
            clock: Clock::new(),
            parameters,
            order,
            slowdown,
            standstill,
            proposal: None,
            blob: None,
            spent_blob: None,
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
        self.agree(false).await?;
        self.debt.arm().await?;
        self.asked = Instant::now();
        loop {
            match self.carry().await {
                Err(error) if error.is_interruption() => self.recover(error).await?,
                ended => return ended,
            }
        }
    }

    /// From wherever it is to *prepared*, as long as no connection is lost.
    async fn carry(&mut self) -> Result<(), TransferError> {
        if self.crew.len() == 0 {
            self.open_streams().await?;
            self.attempt.enter(Status::Active);
        }
        if !self.standstill.is_frozen() {
            loop {
                self.hold().await?;
                if !self.converged()? {
                    self.iterate(Writer::Runs).await?;
                } else if self.can_prepare_ahead() {
                    self.prepare_ahead().await?;
                } else if self.attempt.begin_freeze() {
                    break;
                }
            }
            self.at_full_speed();
            self.freeze().await?;
        }
        self.settle().await?;
        self.check_frozen().await?;
        self.send_blob().await?;
        self.prepare().await
    }

    /// Back to where it was: the writer first.
    async fn undo(mut self, error: &TransferError) {
        self.at_full_speed();
        self.standstill.thaw().await;
        self.debt.restore();
        if let Some(talk) = &self.talk {
            let abort = FromSender::Abort {
                code: error.code().into(),
                desc: error.to_string().into(),
            };
            let _ = timeout(GOODBYE, talk.say(&abort)).await;
        }
        if let Err(error) = self.crew.abandon().await {
            tracing::warn!(id = %self.attempt.id, %error, "memory that was lent did not come back, and stays mapped");
        }
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
        FromReceiver::Interrupted { code, desc } => TransferError::Interrupted {
            code: code.to_string(),
            desc: desc.to_string(),
        },
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
        && let Ok(Ok(message)) = timeout(REASON_WAIT, talk.hear()).await
    {
        return unexpected(message);
    }
    error.into()
}
