//! After a commit whose answer was lost: asking the receiver until it says who owns the Regions, or
//! the operator does.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::endpoint::Endpoint;
use crate::freeze::FreezeError;
use crate::journal::{CommitSent, Journal};
use crate::peer::{self, Conversation, PeerError};
use crate::wire::{FromReceiver, FromSender, Owner, Preamble, Purpose, Token};

use super::error::TransferError;
use super::status::{Attempt, Status};

/// Pause between two inquiries.
const PAUSE: Duration = Duration::from_secs(1);

/// Asks until there is an answer, and says which. `None`: `shutdown` came first; the record stays, and
/// the next start of the daemon goes on asking.
pub(super) async fn resolve(
    attempt: &Attempt,
    record: &CommitSent,
    shutdown: &CancellationToken,
) -> Option<Owner> {
    attempt.enter(Status::Indeterminate);
    let mut told = false;
    loop {
        let asked = tokio::select! {
            biased;
            () = shutdown.cancelled() => return None,
            owner = attempt.decided() => {
                tracing::warn!(id = %attempt.id, ?owner, "the operator has decided who owns the regions");
                Ok(owner)
            }
            asked = ask(record, attempt.parameters.stall_timeout) => asked,
        };
        match asked {
            Ok(Owner::Destination) => return Some(Owner::Destination),
            Ok(Owner::Source) if !thaw(record).await => {}
            Ok(Owner::Source) => return Some(Owner::Source),
            Ok(Owner::Unknown) if !told => {
                tracing::error!(id = %attempt.id, "the receiver was booted since the commit and cannot know who owns the regions: look at the destination, and decide with `memferry resolve`");
                told = true;
            }
            Err(error) if !told => {
                tracing::warn!(id = %attempt.id, %error, "cannot ask the receiver who owns the regions; asking again every second");
                told = true;
            }
            Ok(Owner::Unknown) | Err(_) => {}
        }
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            _ = attempt.decided() => {}
            () = shutdown.cancelled() => return None,
        }
    }
}

async fn ask(record: &CommitSent, patience: Duration) -> Result<Owner, PeerError> {
    let endpoint: Endpoint = record.uri.parse().map_err(|error| {
        PeerError::Lost(std::io::Error::new(
            std::io::ErrorKind::InvalidInput,
            format!("{error}"),
        ))
    })?;
    let preamble = Preamble::new(Purpose::Conversation, Token::ZERO, 0);
    let (connection, _) = peer::connect(&endpoint, preamble, patience).await?;
    let mut talk = Conversation::<FromSender, FromReceiver>::start(connection, patience);
    let boot_id = record.receiver_boot_id.clone();
    talk.say(&FromSender::Inquire {
        nonce: record.nonce,
        boot_id,
    })
    .await?;
    match talk.hear().await? {
        FromReceiver::Owner { owner } => Ok(owner),
        _ => Err(PeerError::Turned(
            "it answered something else than was asked",
        )),
    }
}

/// Lets the writers go on; `false` if one of them could not be, and has to be tried again.
async fn thaw(record: &CommitSent) -> bool {
    let mut all = true;
    for writer in record.stopped.clone() {
        if let Err(error) = blocking(move || writer.thaw()).await {
            tracing::error!(id = %record.id, %error, "the writer could not be started again; trying again every second");
            all = false;
        }
    }
    all
}

/// The Regions have another owner: runs what is to be done then. If this sender dies meanwhile, the next
/// one does it again.
pub(super) async fn finish(record: &CommitSent) {
    for writer in record.stopped.iter().filter(|writer| writer.has_an_end()) {
        let writer = writer.clone();
        if let Err(error) = blocking(move || writer.finish()).await {
            tracing::error!(id = %record.id, %error, "what was to be done after the transfer was not");
        }
    }
}

async fn blocking(
    act: impl FnOnce() -> Result<(), FreezeError> + Send + 'static,
) -> Result<(), TransferError> {
    let acted = tokio::task::spawn_blocking(act).await;
    Ok(acted.map_err(|error| TransferError::local("run it")(error.into()))??)
}

/// Takes up what an earlier run of the daemon left undecided; records of another boot mean nothing.
pub(super) fn undecided(
    journal: &Journal,
    boot_id: &crate::wire::BootId,
) -> std::io::Result<Vec<CommitSent>> {
    let mut records = Vec::new();
    for record in journal.all::<CommitSent>()? {
        if record.boot_id == *boot_id {
            records.push(record);
        } else {
            journal.remove(record.nonce)?;
        }
    }
    Ok(records)
}
