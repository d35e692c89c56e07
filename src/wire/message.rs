//! Messages of the peer conversation: a 16-byte frame header, then a JSON body.
//!
//! JSON because these are few, small, and read by people in captures; strict (`deny_unknown_fields`),
//! because a peer that says something we do not know is of another version and said so in its
//! preamble.

use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{BlobAccount, WireError, check_crc, crc32c, seal};
use crate::limits::{
    BLOB_PIECE_BYTES_MAX, BOOT_ID_BYTES_MAX, CODE_BYTES_MAX, DESC_BYTES_MAX, MESSAGE_BYTES_MAX,
};
use crate::name::Name;

/// Length of a frame header.
pub const FRAME_BYTES: usize = 16;
const FRAME: &str = "message header";
const BODY: &str = "message";

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 4],
    length: U32,
    body_crc: U32,
    crc: U32,
}

const _: () = assert!(size_of::<Raw>() == FRAME_BYTES);

/// 128 random bits: an attempt's nonce, or the token that ties a stream to its conversation. Written
/// as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hex128(pub [u8; 16]);

/// Proves that a stream belongs to a conversation.
pub type Token = Hex128;

impl Hex128 {
    /// No token: what a conversation's preamble carries.
    pub const ZERO: Self = Self([0; 16]);

    /// Fresh random bits from the kernel.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(std::io::Error::from)?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Hex128 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Hex128 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl TryFrom<String> for Hex128 {
    type Error = &'static str;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        const RULE: &str = "expected 32 hexadecimal digits";
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(RULE);
        }
        u128::from_str_radix(&text, 16)
            .map(|n| Self(n.to_be_bytes()))
            .map_err(|_| RULE)
    }
}

impl From<Hex128> for String {
    fn from(value: Hex128) -> Self {
        value.to_string()
    }
}

/// The kernel's `boot_id`: records under `/run` are only worth something on the boot they were
/// written on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BootId(pub Text<BOOT_ID_BYTES_MAX>);

/// A text of at most `MAX` bytes. What is longer is cut, on the way out and on the way in: a peer's
/// text ends up in logs, records and answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String")]
pub struct Text<const MAX: usize>(String);

impl<const MAX: usize> Text<MAX> {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<const MAX: usize> From<String> for Text<MAX> {
    fn from(mut text: String) -> Self {
        text.truncate(text.floor_char_boundary(MAX));
        Self(text)
    }
}

impl<const MAX: usize> From<&str> for Text<MAX> {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl<const MAX: usize> fmt::Display for Text<MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A Region as the sender describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct OfferedRegion {
    /// Its name at the destination.
    pub name: Name,
    /// Its length in bytes.
    pub length: u64,
    /// Bytes of it that are allocated at the source; holes stay holes.
    pub data_bytes: u64,
    /// The page size of the source's memory, in bytes.
    pub page_size: u64,
}

/// What the sender wants to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Offer {
    /// The attempt's id, for people.
    pub id: Name,
    /// The attempt's identity: ownership belongs to it.
    pub nonce: Hex128,
    /// The boot the sender runs on.
    pub boot_id: BootId,
    /// Streams the sender will open.
    pub streams: u16,
    /// Whether payload carries checksums.
    pub integrity: bool,
    /// Whether payload may be compressed; only towards a receiver of version 2.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub compression: bool,
    /// Bound on bytes sent but not acknowledged, per stream.
    pub window: u64,
    /// Longest silence before either side gives the other up, in ms.
    pub stall_timeout_ms: u64,
    /// How long a lost connection may take to come back before both sides give the attempt up, in ms; 0:
    /// it is not waited for.
    pub recover_timeout_ms: u64,
    /// Only ask whether this would be accepted.
    pub dry_run: bool,
    /// What is to be moved.
    pub regions: Vec<OfferedRegion>,
}

/// What the sender says when it has connected again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Resume {
    /// The attempt.
    pub nonce: Hex128,
    /// Proves that this is its sender: the token of the streams.
    pub token: Token,
    /// The epoch whose packets the sender wants to hear about.
    pub epoch: u32,
    /// The number of the Iteration that it will send next.
    pub iteration: u32,
}

/// A run of pages of one Region, as messages have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionRun {
    /// Index into the offer's Regions.
    pub region: u32,
    /// The first page.
    pub first: u64,
    /// How many.
    pub pages: u64,
}

/// What the sender put on one stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamTotals {
    /// Packets, marks included.
    pub packets: u64,
    /// Payload bytes.
    pub bytes: u64,
}

/// Messages from sender to receiver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "type",
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case",
    deny_unknown_fields
)]
pub enum FromSender {
    /// Opens an attempt.
    Offer(Offer),
    /// Takes an attempt up again whose connections were lost. Opens a conversation; the one before it is
    /// over.
    Resume(Resume),
    /// Everything was sent, the source is frozen: is all of it there?
    Prepare {
        /// What each stream carried, by stream number.
        streams: Vec<StreamTotals>,
        /// The final blob that was sent, if there is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        blob: Option<BlobAccount>,
    },
    /// The next piece of the final blob; a frame of its own, not JSON.
    #[serde(skip)]
    Blob(Vec<u8>),
    /// The receiver is to take the Regions over. Sent after it was recorded durably.
    Commit {
        /// The attempt.
        nonce: Hex128,
    },
    /// The attempt is over.
    Abort {
        /// Stable code.
        code: Text<CODE_BYTES_MAX>,
        /// For people.
        desc: Text<DESC_BYTES_MAX>,
    },
    /// Opens a conversation that only asks who owns an attempt's Regions.
    Inquire {
        /// The attempt.
        nonce: Hex128,
        /// The receiver's boot as it was when the attempt was agreed.
        boot_id: BootId,
    },
    /// Heartbeat.
    Alive {},
}

/// Who owns the Regions of an attempt, as the receiver knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Owner {
    /// The receiver: it holds the commit record.
    Destination,
    /// Not the receiver, and it never will be: the nonce is refused for ever.
    Source,
    /// The receiver runs on another boot and cannot know; only the operator can.
    Unknown,
}

/// Messages from receiver to sender.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "type",
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case",
    deny_unknown_fields
)]
pub enum FromReceiver {
    /// The offer is accepted; streams may connect with this token.
    Accept {
        /// For the streams' preambles.
        token: Token,
        /// The epoch of the connections to come.
        epoch: u32,
        /// The boot the receiver runs on: part of the agreement.
        boot_id: BootId,
    },
    /// The offer, or what came later, is refused; the attempt is over.
    Refuse {
        /// Stable code.
        code: Text<CODE_BYTES_MAX>,
        /// For people.
        desc: Text<DESC_BYTES_MAX>,
    },
    /// A stream was lost on the way to the receiver, which has ended the others: the attempt waits to be
    /// resumed.
    Interrupted {
        /// Stable code.
        code: Text<CODE_BYTES_MAX>,
        /// For people.
        desc: Text<DESC_BYTES_MAX>,
    },
    /// The attempt goes on: nothing that was sent before can arrive any more, and streams may connect.
    Resumed {
        /// Of the connections to come.
        epoch: u32,
        /// Packets and marks of each stream that were applied in the epoch that was asked for. Empty: that
        /// is not known any more, so none of those without an acknowledgement count.
        applied: Vec<u64>,
        /// Pages that are not in place or not intact; more may be named.
        missing: Vec<RegionRun>,
    },
    /// Everything is there and intact; a commit would be honoured.
    Prepared {},
    /// The Regions are the receiver's.
    Committed {},
    /// The answer to an inquiry.
    Owner {
        /// Who.
        owner: Owner,
    },
    /// Heartbeat.
    Alive {},
}

/// What follows a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// A message, as JSON.
    Message,
    /// A piece of the final blob, as it is.
    Blob,
}

impl FrameKind {
    fn magic(self) -> [u8; 4] {
        match self {
            Self::Message => *b"MFcv",
            Self::Blob => *b"MFbl",
        }
    }
}

/// The header before a message or a piece of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the body is.
    pub kind: FrameKind,
    /// Length of the body in bytes.
    pub length: usize,
    body_crc: u32,
}

impl FrameHeader {
    /// A message with its header, ready to be written.
    #[must_use]
    pub fn frame(message: &impl Serialize) -> Vec<u8> {
        let body = serde_json::to_vec(message).expect("messages hold only strings and numbers");
        Self::with_body(FrameKind::Message, &body)
    }

    /// A piece of the final blob with its header, ready to be written. At most
    /// [`BLOB_PIECE_BYTES_MAX`] bytes.
    #[must_use]
    pub fn frame_blob(piece: &[u8]) -> Vec<u8> {
        Self::with_body(FrameKind::Blob, piece)
    }

    fn with_body(kind: FrameKind, body: &[u8]) -> Vec<u8> {
        let raw = Raw {
            magic: kind.magic(),
            length: u32::try_from(body.len())
                .expect("limits keep frames small")
                .into(),
            body_crc: crc32c(body).into(),
            crc: 0.into(),
        };
        let mut frame = Vec::with_capacity(FRAME_BYTES + body.len());
        frame.extend_from_slice(raw.as_bytes());
        seal(&mut frame);
        frame.extend_from_slice(body);
        frame
    }

    /// Reads a header and checks the length against its limit.
    pub fn decode(bytes: &[u8; FRAME_BYTES]) -> Result<Self, WireError> {
        let raw: Raw = zerocopy::transmute!(*bytes);
        check_crc(FRAME, bytes)?;
        let mut kinds = [FrameKind::Message, FrameKind::Blob].into_iter();
        let Some(kind) = kinds.find(|kind| kind.magic() == raw.magic) else {
            let found = u32::from_be_bytes(raw.magic);
            let rule = "expected \"MFcv\" or \"MFbl\"";
            return Err(WireError::illegal(FRAME, "magic", found, rule));
        };
        let length = raw.length.get();
        let (max, rule) = match kind {
            FrameKind::Message => (MESSAGE_BYTES_MAX as usize, "expected at most 2 MiB"),
            FrameKind::Blob => (BLOB_PIECE_BYTES_MAX, "expected at most 256 KiB"),
        };
        if length as usize > max {
            return Err(WireError::illegal(FRAME, "length", length, rule));
        }
        Ok(Self {
            kind,
            length: length as usize,
            body_crc: raw.body_crc.get(),
        })
    }

    /// Reads the body that follows this header.
    pub fn body<T: DeserializeOwned>(&self, body: &[u8]) -> Result<T, WireError> {
        self.check(body)?;
        serde_json::from_slice(body).map_err(|error| {
            WireError::illegal(
                BODY,
                "column",
                error.column() as u64,
                "the JSON is not a message of this version",
            )
        })
    }

    /// That `body` has the checksum of this header.
    pub fn check(&self, body: &[u8]) -> Result<(), WireError> {
        let found = crc32c(body);
        if found == self.body_crc {
            return Ok(());
        }
        Err(WireError::Damaged {
            frame: BODY,
            expected: self.body_crc,
            found,
        })
    }

    /// What a piece of a blob is to a side that never gets one.
    #[must_use]
    pub fn out_of_place(&self) -> WireError {
        let magic = u32::from_be_bytes(self.kind.magic());
        WireError::illegal(FRAME, "magic", magic, "expected \"MFcv\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes_of_a_message() {
        let frame = FrameHeader::frame(&FromSender::Commit {
            nonce: Hex128([0xab; 16]),
        });
        let body = br#"{"type":"commit","nonce":"abababababababababababababababab"}"#;
        assert_eq!(&frame[..8], b"MFcv\x3c\0\0\0");
        assert_eq!(frame[8..12], crc32c(body).to_le_bytes());
        assert_eq!(&frame[16..], body);
        let header = FrameHeader::decode(frame[..16].try_into().unwrap()).unwrap();
        assert_eq!(
            header.body::<FromSender>(&frame[16..]),
            Ok(FromSender::Commit {
                nonce: Hex128([0xab; 16])
            })
        );
    }

    #[test]
    fn heartbeats_and_answers_have_their_documented_form() {
        let text = |message: &FromReceiver| serde_json::to_string(message).unwrap();
        assert_eq!(text(&FromReceiver::Alive {}), r#"{"type":"alive"}"#);
        assert_eq!(text(&FromReceiver::Prepared {}), r#"{"type":"prepared"}"#);
        assert_eq!(
            text(&FromReceiver::Owner {
                owner: Owner::Destination
            }),
            r#"{"type":"owner","owner":"destination"}"#
        );
    }

    #[test]
    fn an_oversized_or_damaged_message_is_refused_before_its_body_is_read() {
        let mut raw = Raw {
            magic: *b"MFcv",
            length: u32::MAX.into(),
            body_crc: 0.into(),
            crc: 0.into(),
        };
        seal(raw.as_mut_bytes());
        let bytes = raw.as_bytes().try_into().unwrap();
        assert!(matches!(
            FrameHeader::decode(bytes),
            Err(WireError::Illegal {
                field: "length",
                ..
            })
        ));
        raw.length = 5.into();
        let bytes = raw.as_bytes().try_into().unwrap();
        assert!(matches!(
            FrameHeader::decode(bytes),
            Err(WireError::Damaged { .. })
        ));
    }

    #[test]
    fn an_offer_without_compression_is_one_of_version_1() {
        let offer = |compression| Offer {
            id: "a".parse().unwrap(),
            nonce: Hex128([1; 16]),
            boot_id: BootId("b".into()),
            streams: 1,
            integrity: true,
            compression,
            window: 1,
            stall_timeout_ms: 1,
            recover_timeout_ms: 0,
            dry_run: false,
            regions: Vec::new(),
        };
        for (compression, shown) in [(false, None), (true, Some(&serde_json::json!(true)))] {
            let json = serde_json::to_value(FromSender::Offer(offer(compression))).unwrap();
            assert_eq!(json.get("compression"), shown);
            let read: FromSender = serde_json::from_value(json).unwrap();
            assert_eq!(read, FromSender::Offer(offer(compression)));
        }
    }

    #[test]
    fn golden_bytes_of_a_piece_of_a_blob() {
        let frame = FrameHeader::frame_blob(b"123456789");
        assert_eq!(
            frame[..16],
            *b"MFbl\x09\0\0\0\x83\x92\x06\xe3\xc4\x05\xcc\xc0"
        );
        assert_eq!(&frame[16..], b"123456789");
        let header = FrameHeader::decode(frame[..16].try_into().unwrap()).unwrap();
        assert_eq!((header.kind, header.length), (FrameKind::Blob, 9));
        assert_eq!(header.check(b"123456789"), Ok(()));
        assert!(header.check(b"12345678?").is_err());
        let frame = FrameHeader::frame_blob(&vec![0; BLOB_PIECE_BYTES_MAX + 1]);
        assert!(FrameHeader::decode(frame[..16].try_into().unwrap()).is_err());
    }

    #[test]
    fn a_peers_text_is_cut_to_its_limit() {
        let desc = "é".repeat(DESC_BYTES_MAX);
        let text = format!(r#"{{"type":"refuse","code":"x","desc":"{desc}"}}"#);
        let FromReceiver::Refuse { desc, .. } = serde_json::from_str(&text).unwrap() else {
            panic!("another message");
        };
        assert_eq!(desc.as_str().len(), DESC_BYTES_MAX);
    }

    #[test]
    fn names_from_the_wire_are_checked() {
        let offer = r#"{"name":"../x","length":1,"data-bytes":1,"page-size":4096}"#;
        assert!(serde_json::from_str::<OfferedRegion>(offer).is_err());
        let unknown = r#"{"type":"alive","extra":1}"#;
        assert!(serde_json::from_str::<FromSender>(unknown).is_err());
    }
}
