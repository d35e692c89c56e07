//! Why a transfer failed, as the operator is told.

use std::io;
use std::time::Duration;

use serde_json::{Value, json};

use crate::affinity::AffinityError;
use crate::dirty::TrackerError;
use crate::freeze::FreezeError;
use crate::limits::BLOB_BYTES_MAX;
use crate::name::Name;
use crate::peer::PeerError;
use crate::region::RegionError;
use crate::stream::StreamError;

/// Why a transfer failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum TransferError {
    #[error("the transfer was cancelled")]
    Cancelled,
    #[error("{desc}")]
    Refused { code: String, desc: String },
    #[error(transparent)]
    Peer(#[from] PeerError),
    #[error("{desc}")]
    Interrupted { code: String, desc: String },
    #[error("{cause}; not recovered within {seconds} s (recover-timeout){last}")]
    NotRecovered {
        cause: Box<TransferError>,
        seconds: f32,
        last: String,
    },
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error(transparent)]
    Tracker(#[from] TrackerError),
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    #[error(
        "the client that registered {regions} has closed its connection: it was to be stopped through it"
    )]
    ClientGone { regions: String },
    #[error(
        "the client that registered {regions} did not answer {question:?} within {seconds} s (freeze-timeout)"
    )]
    ClientSilent {
        regions: String,
        question: &'static str,
        seconds: f32,
    },
    #[error("the sender died before the commit: nothing was moved, and the writer goes on")]
    SenderDied,
    #[error("not finished within the timeout of {seconds} s")]
    TimedOut { seconds: f32 },
    #[error(
        "{remaining} bytes are still dirty after {iterations} iterations, and when-not-converging is fail: allow more downtime (downtime-limit) or bandwidth, or slow the writer"
    )]
    NotConverging { iterations: u32, remaining: u64 },
    #[error(
        "the receiver has everything and did not become ready to take it over within {seconds} s (stall-timeout); if it writes to a disk, allow more"
    )]
    NotPrepared { seconds: f32 },
    #[error(
        "{pages} pages were written after the freeze: the process that was stopped is not the only writer, or none was named (freeze)"
    )]
    NotFrozen { pages: u64 },
    #[error(
        "{bytes} bytes keep arriving with another checksum than they left with: either the link damages data, or something writes the region although nothing should (tracker none)"
    )]
    Corrupt { bytes: u64 },
    #[error(
        "region {name}: tracker scan of a live writer needs integrity = \"crc32c\": without checksums a value that comes and goes between two scans is lost"
    )]
    ScanWithoutIntegrity { name: Name },
    #[error(
        "region {name}: its writer cannot be slowed down (when-not-converging = throttle), since it is stopped by freeze {freeze}: that is possible with freeze pid and cgroup"
    )]
    CannotThrottle { name: Name, freeze: String },
    #[error(
        "cannot read the final blob: {source}: a file is read whole, a pipe to its end within freeze-timeout"
    )]
    BlobUnread { source: io::Error },
    #[error("the final blob is longer than {BLOB_BYTES_MAX} bytes")]
    BlobTooLarge,
    #[error(transparent)]
    NoCpu(#[from] AffinityError),
    #[error("the receiver said {0} where the protocol has no place for it")]
    OutOfPlace(String),
    #[error("cannot {doing}: {source}")]
    Local {
        doing: &'static str,
        source: io::Error,
    },
}

impl TransferError {
    /// The stable code under which this error is reported.
    pub(super) fn code(&self) -> &str {
        match self {
            Self::Cancelled => "cancelled",
            Self::Refused { code, .. } | Self::Interrupted { code, .. } => code,
            Self::NotRecovered { cause, .. } => cause.code(),
            Self::Peer(error) => error.code(),
            Self::Stream(error) => error.code(),
            Self::Region(error) => error.code(),
            Self::Tracker(error) => error.code(),
            Self::Freeze(error) => error.code(),
            Self::ClientGone { .. } => "writer-gone",
            Self::ClientSilent { .. } => "freeze-timeout",
            Self::TimedOut { .. } => "timeout",
            Self::NotPrepared { .. } => "stalled",
            Self::NotConverging { .. } => "not-converged",
            Self::NotFrozen { .. } => "not-frozen",
            Self::Corrupt { .. } => "corrupt",
            Self::ScanWithoutIntegrity { .. } => "invalid-argument",
            Self::CannotThrottle { .. } => "cannot-throttle",
            Self::BlobUnread { .. } => "blob-read",
            Self::BlobTooLarge => "too-large",
            Self::NoCpu(_) => "no-such-cpu",
            Self::OutOfPlace(_) => "protocol",
            Self::SenderDied | Self::Local { .. } => "sender-failed",
        }
    }

    /// For `map_err`: what was tried.
    pub(super) fn local(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Local { doing, source }
    }

    /// Whether only connections were lost, or are of no use: the attempt can go on over others.
    pub(super) fn is_interruption(&self) -> bool {
        match self {
            // One that is late, and may be quicker when it is asked again.
            Self::Interrupted { .. } | Self::NotPrepared { .. } => true,
            Self::Peer(error) => error.is_loss(),
            Self::Stream(error) => error.is_loss(),
            _ => false,
        }
    }

    /// `cause` was not got over; `last` is what the last try met.
    pub(super) fn not_recovered(cause: Self, limit: Duration, last: Option<Self>) -> Self {
        Self::NotRecovered {
            cause: Box::new(cause),
            seconds: limit.as_secs_f32(),
            last: last.map_or_else(String::new, |error| format!(": {error}")),
        }
    }

    /// As `query-migrate` shows it.
    pub(super) fn to_json(&self) -> Value {
        json!({"class": "GenericError", "desc": self.to_string(), "x-code": self.code()})
    }
}
