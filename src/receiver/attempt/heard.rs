//! What the sender says, and what it means when it is not what was due.

use tokio::time::timeout;

use crate::peer::PeerError;
use crate::stream::StreamError;
use crate::wire::FromSender;

use super::super::entry::{Entry, Return};
use super::super::error::AttemptError;
use super::{REASON_WAIT, Talk};

/// The next message; unless the sender has come back on another connection, or nobody will.
pub(super) async fn hear(
    talk: &mut Talk,
    back: &mut Return,
    entry: &Entry,
) -> Result<FromSender, AttemptError> {
    tokio::select! {
        message = talk.hear() => Ok(message?),
        () = back.came() => Err(AttemptError::Superseded),
        () = entry.given_up() => Err(AttemptError::GivenUp),
    }
}

/// What a message means that is not the one that was due.
pub(super) fn unexpected(message: Result<FromSender, PeerError>) -> AttemptError {
    match message {
        Ok(FromSender::Abort { code, desc }) => aborted(&code, &desc),
        Ok(other) => AttemptError::out_of_place(&other),
        Err(error) => error.into(),
    }
}

/// Why a stream ended. If its connection did, the sender may just be telling us; an error of our own is
/// news to the sender, who waits for it.
pub(super) async fn failure(
    stream: u16,
    end: Result<(), StreamError>,
    talk: &mut Talk,
) -> AttemptError {
    match end {
        Ok(()) | Err(StreamError::Lost { .. }) => {}
        Err(error) => return error.into(),
    }
    match timeout(REASON_WAIT, talk.hear()).await {
        Ok(Ok(FromSender::Abort { code, desc })) => aborted(&code, &desc),
        _ => match end {
            Ok(()) => AttemptError::StreamEnded(stream),
            Err(error) => error.into(),
        },
    }
}

pub(super) fn aborted(code: &impl ToString, desc: &impl ToString) -> AttemptError {
    AttemptError::Aborted {
        code: code.to_string(),
        desc: desc.to_string(),
    }
}
