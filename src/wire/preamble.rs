//! The first 64 bytes in each direction of every connection: who calls, with which token.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Hex128, VERSION, VERSION_OLDEST, WireError, check_crc, seal};
use crate::limits::STREAMS_MAX;

/// Length of a preamble.
pub const PREAMBLE_BYTES: usize = 64;

const MAGIC: [u8; 8] = *b"memferry";
const FRAME: &str = "connection preamble";

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    version: U16,
    version_oldest: U16,
    purpose: u8,
    status: u8,
    stream: U16,
    token: [u8; 16],
    epoch: U32,
    reserved: [u8; 24],
    crc: U32,
}

const _: () = assert!(size_of::<Raw>() == PREAMBLE_BYTES);

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The peer conversation: agree, prepare, commit, errors with text.
    Conversation,
    /// A stream of packets, numbered within its conversation.
    Stream(u16),
}

/// The receiver's answer to a caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Go on. Also what a caller puts into its own preamble.
    Ok,
    /// No version in common.
    Version,
    /// No conversation has this token.
    Token,
    /// The epoch is not the conversation's current one.
    Epoch,
    /// That stream number is out of range or connected already.
    Stream,
    /// The caller's address is not allowed here.
    Peer,
    /// The receiver takes no further transfers now.
    Busy,
}

const STATUSES: [Status; 7] = [
    Status::Ok,
    Status::Version,
    Status::Token,
    Status::Epoch,
    Status::Stream,
    Status::Peer,
    Status::Busy,
];

/// The opening of a connection, in either direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// The newest version the side speaks.
    pub version: u16,
    /// The oldest version the side speaks.
    pub version_oldest: u16,
    /// What the connection is for; the answer repeats it.
    pub purpose: Purpose,
    /// The answer; `Ok` from the caller.
    pub status: Status,
    /// What ties a stream to its conversation; zero for a conversation.
    pub token: Hex128,
    /// How often the attempt's connections were replaced; streams of an older epoch are dead.
    pub epoch: u32,
}

impl Preamble {
    /// A preamble of this build's versions.
    #[must_use]
    pub fn new(purpose: Purpose, token: Hex128, epoch: u32) -> Self {
        Self {
            version: VERSION,
            version_oldest: VERSION_OLDEST,
            purpose,
            status: Status::Ok,
            token,
            epoch,
        }
    }

    /// The receiver's answer to this caller.
    #[must_use]
    pub fn answer(&self, status: Status) -> Self {
        Self {
            version: VERSION,
            version_oldest: VERSION_OLDEST,
            status,
            ..*self
        }
    }

    /// The newest version that the side which sent this and we both speak.
    #[must_use]
    pub fn common_version(&self) -> u16 {
        self.version.min(VERSION)
    }

    /// The bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; PREAMBLE_BYTES] {
        let (purpose, stream) = match self.purpose {
            Purpose::Conversation => (1, 0),
            Purpose::Stream(index) => (2, index),
        };
        let raw = Raw {
            magic: MAGIC,
            version: self.version.into(),
            version_oldest: self.version_oldest.into(),
            purpose,
            status: self.status as u8,
            stream: stream.into(),
            token: self.token.0,
            epoch: self.epoch.into(),
            reserved: [0; 24],
            crc: 0.into(),
        };
        let mut bytes: [u8; PREAMBLE_BYTES] = zerocopy::transmute!(raw);
        seal(&mut bytes);
        bytes
    }

    /// Reads a preamble. The layout up to `version_oldest` and the place of the checksum never change,
    /// so that any two versions can tell each other that they do not match.
    pub fn decode(bytes: &[u8; PREAMBLE_BYTES]) -> Result<Self, WireError> {
        let raw: Raw = zerocopy::transmute!(*bytes);
        if raw.magic != MAGIC {
            let found = u64::from_be_bytes(raw.magic);
            return Err(WireError::illegal(
                FRAME,
                "magic",
                found,
                "expected \"memferry\": not a memferry peer",
            ));
        }
        check_crc(FRAME, bytes)?;
        let (newest, oldest) = (raw.version.get(), raw.version_oldest.get());
        // Before anything whose meaning a version could change.
        if newest < VERSION_OLDEST || oldest > VERSION {
            return Err(WireError::Version { oldest, newest });
        }
        let stream = raw.stream.get();
        let purpose = match (raw.purpose, stream) {
            (1, 0) => Purpose::Conversation,
            (2, index) if index < STREAMS_MAX => Purpose::Stream(index),
            (2, index) => {
                return Err(WireError::illegal(
                    FRAME,
                    "stream",
                    index,
                    "expected less than 256",
                ));
            }
            (other, _) => {
                return Err(WireError::illegal(
                    FRAME,
                    "purpose",
                    other,
                    "expected 1 or 2",
                ));
            }
        };
        let Some(&status) = STATUSES.get(usize::from(raw.status)) else {
            return Err(WireError::illegal(
                FRAME,
                "status",
                raw.status,
                "expected 0 to 6",
            ));
        };
        Ok(Self {
            version: newest,
            version_oldest: oldest,
            purpose,
            status,
            token: Hex128(raw.token),
            epoch: raw.epoch.get(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes_of_a_stream_preamble() {
        let preamble = Preamble::new(Purpose::Stream(3), Hex128(*b"0123456789abcdef"), 2);
        let bytes = preamble.encode();
        assert_eq!(&bytes[..16], b"memferry\x03\x00\x02\x00\x02\x00\x03\x00");
        assert_eq!(&bytes[16..36], b"0123456789abcdef\x02\x00\x00\x00");
        assert_eq!(bytes[36..60], [0; 24]);
        assert_eq!(bytes[60..], crate::wire::crc32c(&bytes[..60]).to_le_bytes());
        assert_eq!(Preamble::decode(&bytes), Ok(preamble));
    }

    #[test]
    fn garbage_damage_and_illegal_values_are_told_apart() {
        let good = Preamble::new(Purpose::Conversation, Hex128([0; 16]), 0).encode();
        assert!(matches!(
            Preamble::decode(&[b'G'; 64]),
            Err(WireError::Illegal { field: "magic", .. })
        ));
        let mut flipped = good;
        flipped[40] ^= 1;
        assert!(matches!(
            Preamble::decode(&flipped),
            Err(WireError::Damaged { .. })
        ));
        let mut wrong = good;
        wrong[12] = 9;
        seal(&mut wrong);
        assert!(matches!(
            Preamble::decode(&wrong),
            Err(WireError::Illegal {
                field: "purpose",
                ..
            })
        ));
    }

    #[test]
    fn versions_meet_where_their_ranges_overlap() {
        let read = |version, version_oldest, purpose| {
            let conversation = Preamble::new(Purpose::Conversation, Hex128([0; 16]), 0);
            let mut bytes = Preamble {
                version,
                version_oldest,
                ..conversation
            }
            .encode();
            bytes[12] = purpose;
            seal(&mut bytes);
            Preamble::decode(&bytes)
        };
        assert!(read(VERSION + 1, VERSION, 1).is_ok());
        let other = Err(WireError::Version {
            oldest: VERSION + 1,
            newest: VERSION + 5,
        });
        assert_eq!(read(VERSION + 5, VERSION + 1, 1), other);
        assert_eq!(
            read(VERSION + 5, VERSION + 1, 77),
            other,
            "versions come before everything else"
        );
    }
}
