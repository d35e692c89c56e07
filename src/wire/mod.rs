//! The bytes of the protocol, and nothing else: no socket, no thread, no clock.
//!
//! `docs/protocol.md` is normative; the golden bytes in the tests here hold this code to it. Every
//! number that arrives is compared with a limit before it becomes a value of these types, so code
//! behind them does not ask again (rule 7).

mod ack;
mod blob;
mod compression;
mod message;
mod packet;
mod preamble;

pub use ack::{ACK_BYTES, Ack, TORN_BYTES, TornTable};
pub use blob::{BlobAccount, BlobSum};
pub use compression::{Algorithm, Packed};
pub use message::{
    BootId, FRAME_BYTES, FrameHeader, FrameKind, FromReceiver, FromSender, Hex128, Offer,
    OfferedRegion, Owner, RegionRun, Resume, StreamTotals, Text, Token,
};
pub use packet::{DataHeader, Extent, ExtentKind, HEADER_BYTES, Header, MarkHeader, Table, blocks};
pub use preamble::{PREAMBLE_BYTES, Preamble, Purpose, Status};

/// The protocol version this build speaks. It also talks to the one before it.
pub const VERSION: u16 = 3;

/// The oldest version this build talks to.
pub const VERSION_OLDEST: u16 = 2;

/// The first version whose receivers can be asked to prepare more than once.
pub const VERSION_PREPARE_AHEAD: u16 = 3;

/// What is wrong with bytes from a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The checksum of the frame itself does not match: damaged on the way. The connection cannot be
    /// trusted any more, the peer can.
    #[error("a {frame} was damaged on the way: checksum {found:#010x}, expected {expected:#010x}")]
    Damaged {
        /// Which frame.
        frame: &'static str,
        /// The checksum it carries.
        expected: u32,
        /// The checksum of what arrived.
        found: u32,
    },
    /// The peer speaks other versions of the protocol.
    #[error(
        "the peer speaks protocol versions {oldest} to {newest}, this side {VERSION_OLDEST} to {VERSION}: upgrade the older one"
    )]
    Version {
        /// Its oldest.
        oldest: u16,
        /// Its newest.
        newest: u16,
    },
    /// The frame is intact and says something that is not allowed: the peer is wrong.
    #[error("the peer sent an illegal {frame}: {field} is {value}, {rule}")]
    Illegal {
        /// Which frame.
        frame: &'static str,
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it should have been.
        rule: &'static str,
    },
}

impl WireError {
    fn illegal(
        frame: &'static str,
        field: &'static str,
        value: impl Into<u64>,
        rule: &'static str,
    ) -> Self {
        Self::Illegal {
            frame,
            field,
            value: value.into(),
            rule,
        }
    }

    /// The stable code under which this error is reported.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Damaged { .. } => "line-damage",
            Self::Version { .. } => "version",
            Self::Illegal { .. } => "protocol",
        }
    }
}

/// The checksum of everything here: CRC-32C (Castagnoli), as in iSCSI and ext4.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes);
    u32::try_from(crc).expect("a CRC-32 has 32 bits")
}

/// Compares the checksum in the last four bytes of a fixed frame with that of the bytes before.
fn check_crc(frame: &'static str, bytes: &[u8]) -> Result<(), WireError> {
    let (body, crc) = bytes
        .split_last_chunk::<4>()
        .expect("a fixed frame is longer than its checksum");
    let (expected, found) = (u32::from_le_bytes(*crc), crc32c(body));
    if expected == found {
        Ok(())
    } else {
        Err(WireError::Damaged {
            frame,
            expected,
            found,
        })
    }
}

/// Writes the checksum of a fixed frame into its last four bytes.
fn seal(bytes: &mut [u8]) {
    let (body, crc) = bytes
        .split_last_chunk_mut::<4>()
        .expect("a fixed frame is longer than its checksum");
    *crc = crc32c(body).to_le_bytes();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_crc_32c() {
        // The check value of CRC-32/ISCSI in the catalogue of parametrised CRC algorithms.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }
}
