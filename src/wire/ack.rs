//! Acknowledgements, on the stream itself, from the receiver: this packet is applied, and these of its
//! pages did not match their checksum (torn) and stay owed.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{WireError, check_crc, crc32c, seal};
use crate::limits::PACKET_BLOCKS_MAX;
use crate::pages::PageRange;

/// Length of an acknowledgement.
pub const ACK_BYTES: usize = 32;
/// Length of one entry of its torn table.
pub const TORN_BYTES: usize = 16;
const MAGIC: [u8; 4] = *b"MFak";
const FRAME: &str = "acknowledgement";

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 4],
    epoch: U32,
    sequence: U64,
    iteration: U32,
    torn: U32,
    table_crc: U32,
    crc: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawTorn {
    first: U64,
    pages: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<Raw>() == ACK_BYTES && size_of::<RawTorn>() == TORN_BYTES);

/// One packet or mark is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ack {
    /// The connection's epoch.
    pub epoch: u32,
    /// The packet's position on the stream.
    pub sequence: u64,
    /// The packet's Iteration.
    pub iteration: u32,
    /// Entries of the torn table that follows.
    pub torn: u32,
    /// Checksum of that table.
    pub table_crc: u32,
}

impl Ack {
    /// The bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; ACK_BYTES] {
        let raw = Raw {
            magic: MAGIC,
            epoch: self.epoch.into(),
            sequence: self.sequence.into(),
            iteration: self.iteration.into(),
            torn: self.torn.into(),
            table_crc: self.table_crc.into(),
            crc: 0.into(),
        };
        let mut bytes: [u8; ACK_BYTES] = zerocopy::transmute!(raw);
        seal(&mut bytes);
        bytes
    }

    /// Reads an acknowledgement and checks its numbers against the limits.
    pub fn decode(bytes: &[u8; ACK_BYTES]) -> Result<Self, WireError> {
        check_crc(FRAME, bytes)?;
        let raw: Raw = zerocopy::transmute!(*bytes);
        if raw.magic != MAGIC {
            let found = u32::from_be_bytes(raw.magic);
            return Err(WireError::illegal(
                FRAME,
                "magic",
                found,
                "expected \"MFak\"",
            ));
        }
        if u64::from(raw.torn.get()) > PACKET_BLOCKS_MAX {
            return Err(WireError::illegal(
                FRAME,
                "torn",
                raw.torn.get(),
                "expected at most 4096",
            ));
        }
        Ok(Self {
            epoch: raw.epoch.get(),
            sequence: raw.sequence.get(),
            iteration: raw.iteration.get(),
            torn: raw.torn.get(),
            table_crc: raw.table_crc.get(),
        })
    }
}

/// The torn runs of one packet, as they follow an acknowledgement.
#[derive(Debug, Default)]
pub struct TornTable {
    bytes: Vec<u8>,
}

impl TornTable {
    /// Forgets the packet, keeps the memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    /// Adds a run: one block at most, so it is short.
    pub fn push(&mut self, range: PageRange) {
        let raw = RawTorn {
            first: range.first.into(),
            pages: u32::try_from(range.count)
                .expect("a block has few pages")
                .into(),
            reserved: 0.into(),
        };
        self.bytes.extend_from_slice(raw.as_bytes());
    }

    /// Entries.
    #[must_use]
    pub fn len(&self) -> u32 {
        u32::try_from(self.bytes.len() / TORN_BYTES).expect("a packet has few blocks")
    }

    /// Whether the packet arrived intact.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The bytes, to be sent.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Checksum of the bytes.
    #[must_use]
    pub fn crc(&self) -> u32 {
        crc32c(&self.bytes)
    }

    /// Room for the entries that `ack` announces, to be read into.
    pub fn buffer(&mut self, ack: &Ack) -> &mut [u8] {
        self.bytes.clear();
        self.bytes.resize(ack.torn as usize * TORN_BYTES, 0);
        &mut self.bytes
    }

    /// The runs that were read, each inside a Region of `pages` pages.
    pub fn decode(
        &self,
        ack: &Ack,
        pages: u64,
    ) -> Result<impl Iterator<Item = PageRange> + '_, WireError> {
        let found = crc32c(&self.bytes);
        if found != ack.table_crc {
            return Err(WireError::Damaged {
                frame: "torn table",
                expected: ack.table_crc,
                found,
            });
        }
        let read = |bytes: &[u8]| {
            let raw = RawTorn::ref_from_bytes(bytes).expect("the chunk has the entry's size");
            (raw.first.get(), u64::from(raw.pages.get()))
        };
        for (first, count) in self.bytes.chunks_exact(TORN_BYTES).map(read) {
            if PageRange::new(first, count, pages).is_none() {
                return Err(WireError::illegal(
                    "torn table",
                    "first",
                    first,
                    "it leaves its Region",
                ));
            }
        }
        Ok(self
            .bytes
            .chunks_exact(TORN_BYTES)
            .map(read)
            .map(|(first, count)| PageRange { first, count }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes_of_an_acknowledgement() {
        let mut torn = TornTable::default();
        torn.push(PageRange { first: 9, count: 2 });
        let ack = Ack {
            epoch: 1,
            sequence: 2,
            iteration: 3,
            torn: torn.len(),
            table_crc: torn.crc(),
        };
        let bytes = ack.encode();
        assert_eq!(
            &bytes[..24],
            b"MFak\x01\0\0\0\x02\0\0\0\0\0\0\0\x03\0\0\0\x01\0\0\0"
        );
        assert_eq!(torn.bytes(), b"\x09\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0");
        assert_eq!(Ack::decode(&bytes), Ok(ack));
        assert_eq!(
            torn.decode(&ack, 11).unwrap().collect::<Vec<_>>(),
            [PageRange { first: 9, count: 2 }]
        );
        assert!(torn.decode(&ack, 10).is_err(), "leaves the Region");
    }

    #[test]
    fn a_flipped_bit_is_damage() {
        let ack = Ack {
            epoch: 1,
            sequence: 2,
            iteration: 3,
            torn: 0,
            table_crc: 0,
        };
        let mut bytes = ack.encode();
        bytes[9] ^= 0x10;
        assert!(matches!(
            Ack::decode(&bytes),
            Err(WireError::Damaged { .. })
        ));
    }
}
