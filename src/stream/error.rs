//! Why a stream ended before its attempt did.

use std::io;
use std::time::Duration;

use crate::assembly::Violation;
use crate::channel::{Channel, Suspect, Woken};
use crate::region::RegionError;
use crate::wire::WireError;

/// Why a stream failed.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The attempt was ended from our side; not a failure of the stream.
    #[error("ended from this side")]
    Ended,
    /// The peer closed the connection, or it broke.
    #[error("stream {stream}: the connection was lost: {source}")]
    Lost {
        /// The stream.
        stream: u16,
        /// What the kernel said.
        source: io::Error,
    },
    /// No progress for the stall timeout.
    #[error("stream {stream}: no progress for {seconds} s (stall-timeout): {waiting}: {}", .suspect.as_str())]
    Stalled {
        /// The stream.
        stream: u16,
        /// How long.
        seconds: f32,
        /// For what.
        waiting: &'static str,
        /// Who is to blame.
        suspect: Suspect,
    },
    /// Bytes that are not the protocol.
    #[error("stream {stream}: {source}")]
    Wire {
        /// The stream.
        stream: u16,
        /// What is wrong with them.
        source: WireError,
    },
    /// The peer broke a rule.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// The memory of a Region failed us.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The destination ran out of memory although it had promised enough.
    #[error(
        "no space is left for {origin}: the destination's memory was used by others since the start"
    )]
    NoSpace {
        /// The file.
        origin: String,
    },
    /// There is no memory to decompress a packet in.
    #[error("no memory for the buffers of a stream that decompresses: {source}")]
    NoBuffer {
        /// What was missing.
        source: io::Error,
    },
}

impl StreamError {
    /// Whether the connection is to blame, and another one may do better.
    #[must_use]
    pub fn is_loss(&self) -> bool {
        match self {
            Self::Lost { .. } | Self::Stalled { .. } => true,
            Self::Wire { source, .. } => matches!(source, WireError::Damaged { .. }),
            _ => false,
        }
    }

    /// The stable code under which this error is reported.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Ended => "cancelled",
            Self::Lost { .. } => "connection-lost",
            Self::Stalled { suspect, .. } => match suspect {
                Suspect::Unknown => "stalled",
                Suspect::Network => "peer-silent",
                Suspect::Peer => "peer-hung",
                Suspect::Destination => "destination-slow",
            },
            Self::Wire { source, .. } => source.code(),
            Self::Violation(_) => "protocol",
            Self::Region(error) => error.code(),
            Self::NoSpace { .. } | Self::NoBuffer { .. } => "no-space",
        }
    }

    /// What a failed channel call means for `stream`, which was `waiting` for something.
    pub(super) fn from_io(
        stream: u16,
        waiting: &'static str,
        stall_timeout: Duration,
        channel: &dyn Channel,
        source: io::Error,
    ) -> Self {
        if Woken::is(&source) {
            Self::Ended
        } else if source.kind() == io::ErrorKind::TimedOut {
            Self::Stalled {
                stream,
                seconds: stall_timeout.as_secs_f32(),
                waiting,
                suspect: channel.suspect(stall_timeout),
            }
        } else {
            Self::Lost { stream, source }
        }
    }
}
