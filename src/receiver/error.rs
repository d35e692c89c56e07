//! Why an attempt ended without a commit; the code and the text go to the sender.

use std::io;

use crate::assembly::Violation;
use crate::limits::BLOB_BYTES_MAX;
use crate::peer::PeerError;
use crate::region::RegionError;
use crate::stream::StreamError;
use crate::wire::{BlobAccount, FromSender};

use super::admission::Refusal;

/// Why an attempt ended without a commit.
#[derive(Debug, thiserror::Error)]
pub(super) enum AttemptError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("the sender ended the transfer: {desc}")]
    Aborted { code: String, desc: String },
    #[error(transparent)]
    Peer(#[from] PeerError),
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error(transparent)]
    Incomplete(#[from] Violation),
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error(
        "the final blob that arrived is not the one that was sent: {arrived:?} and {account:?}"
    )]
    Blob {
        arrived: Option<BlobAccount>,
        account: Option<BlobAccount>,
    },
    #[error("the final blob has {bytes} bytes or more, {BLOB_BYTES_MAX} are allowed")]
    BlobTooLarge { bytes: u64 },
    #[error("stream {0} ended before the transfer did")]
    StreamEnded(u16),
    #[error("the sender has connected again")]
    Superseded,
    #[error("the sender has given this transfer up")]
    GivenUp,
    #[error("the peer said {0} where the protocol has no place for it")]
    OutOfPlace(String),
    #[error("cannot {doing}: {source}")]
    Local {
        doing: &'static str,
        source: io::Error,
    },
}

impl AttemptError {
    pub(super) fn code(&self) -> &str {
        match self {
            Self::Refused(refusal) => refusal.code,
            Self::Aborted { code, .. } => code,
            Self::Peer(error) => error.code(),
            Self::Stream(error) => error.code(),
            Self::Incomplete(_) | Self::Blob { .. } => "incomplete",
            Self::BlobTooLarge { .. } => "too-large",
            Self::Region(error) => error.code(),
            Self::StreamEnded(_) | Self::Superseded => "connection-lost",
            Self::GivenUp => "cancelled",
            Self::OutOfPlace(_) => "protocol",
            Self::Local { .. } => "receiver-failed",
        }
    }

    /// Whether only connections were lost: the attempt can go on over others.
    pub(super) fn is_interruption(&self) -> bool {
        match self {
            Self::Peer(error) => error.is_loss(),
            Self::Stream(error) => error.is_loss(),
            Self::StreamEnded(_) | Self::Superseded => true,
            _ => false,
        }
    }

    pub(super) fn local(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Local { doing, source }
    }

    pub(super) fn out_of_place(message: &FromSender) -> Self {
        let text = serde_json::to_value(message).unwrap_or_default();
        Self::OutOfPlace(text["type"].to_string())
    }
}
