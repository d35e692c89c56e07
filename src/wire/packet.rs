//! Packets on a stream: a 64-byte header, a table of extents and checksums, then the payload.
//!
//! The header and the table are copied into the socket; the payload is lent. A packet names runs of
//! pages (extents) of one Region; zero pages and holes are extents without payload. A *mark* is a
//! header alone: it ends an Iteration on its stream and says what was sent before it.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Algorithm, Packed, WireError, check_crc, crc32c, seal};
use crate::limits::{
    BLOCK_PAGES, PACKET_BLOCKS_MAX, PACKET_BYTES_MAX, PACKET_EXTENTS_MAX, REGIONS_MAX,
};
use crate::pages::{PageRange, pages_in};

/// Length of a packet header.
pub const HEADER_BYTES: usize = 64;
const EXTENT_BYTES: usize = 16;
const MAGIC: [u8; 4] = *b"MFpk";
const KIND_DATA: u8 = 1;
const KIND_MARK: u8 = 2;
const FRAME: &str = "packet header";
const TABLE: &str = "packet table";

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 4],
    kind: u8,
    flags: u8,
    streams: U16,
    epoch: U32,
    iteration: U32,
    sequence: U64,
    region: U32,
    extents: U32,
    blocks: U32,
    payload: U32,
    table_crc: U32,
    bytes: U64,
    packed: U32,
    packed_crc: U32,
    crc: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawExtent {
    first: U64,
    pages: U32,
    kind: u8,
    reserved: [u8; 3],
}

const _: () = assert!(size_of::<Raw>() == HEADER_BYTES && size_of::<RawExtent>() == EXTENT_BYTES);

/// What a run of pages holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Payload follows.
    Data,
    /// Every byte is zero; no payload.
    Zero,
    /// Not allocated at the source (and so zero); no payload.
    Hole,
}

/// A run of pages and what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The pages.
    pub range: PageRange,
    /// What they hold.
    pub kind: ExtentKind,
}

/// The header of a packet with pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataHeader {
    /// The connection's epoch.
    pub epoch: u32,
    /// The Iteration the pages belong to, from 1.
    pub iteration: u32,
    /// Position on this stream, from 1, marks included.
    pub sequence: u64,
    /// Index into the offer's Regions.
    pub region: u32,
    /// Extents in the table.
    pub extents: u32,
    /// Checksums in the table; 0 with integrity off.
    pub blocks: u32,
    /// Bytes of payload, before they are compressed.
    pub payload: u32,
    /// How the payload travels; `None` is as it is.
    pub packed: Option<Packed>,
    /// Checksum of the table.
    pub table_crc: u32,
}

/// The header that ends an Iteration on a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MarkHeader {
    /// The connection's epoch.
    pub epoch: u32,
    /// The Iteration that ends.
    pub iteration: u32,
    /// Position on this stream; so the number of packets before it, plus 1.
    pub sequence: u64,
    /// Payload bytes on this stream since it opened.
    pub bytes: u64,
    /// Streams of this epoch; each of them ends the Iteration with a mark.
    pub streams: u16,
}

/// What a header announces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Header {
    /// Pages follow.
    Data(DataHeader),
    /// The Iteration is complete on this stream.
    Mark(MarkHeader),
}

impl DataHeader {
    /// Bytes of the table that follows the header.
    #[must_use]
    pub fn table_bytes(&self) -> usize {
        self.extents as usize * EXTENT_BYTES + self.blocks as usize * size_of::<u32>()
    }

    /// Bytes that follow the table.
    #[must_use]
    pub fn payload_on_wire(&self) -> u32 {
        self.packed.map_or(self.payload, |packed| packed.bytes)
    }
}

impl Header {
    /// The bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut raw = Raw::new_zeroed();
        raw.magic = MAGIC;
        match *self {
            Self::Data(h) => {
                raw.kind = KIND_DATA;
                raw.epoch = h.epoch.into();
                raw.iteration = h.iteration.into();
                raw.sequence = h.sequence.into();
                raw.region = h.region.into();
                raw.extents = h.extents.into();
                raw.blocks = h.blocks.into();
                raw.payload = h.payload.into();
                raw.table_crc = h.table_crc.into();
                if let Some(packed) = h.packed {
                    raw.flags = packed.algorithm.flag();
                    raw.packed = packed.bytes.into();
                    raw.packed_crc = packed.crc.into();
                }
            }
            Self::Mark(h) => {
                raw.kind = KIND_MARK;
                raw.epoch = h.epoch.into();
                raw.iteration = h.iteration.into();
                raw.sequence = h.sequence.into();
                raw.bytes = h.bytes.into();
                raw.streams = h.streams.into();
            }
        }
        let mut bytes: [u8; HEADER_BYTES] = zerocopy::transmute!(raw);
        seal(&mut bytes);
        bytes
    }

    /// Reads a header and checks its numbers against the limits.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        check_crc(FRAME, bytes)?;
        let raw: Raw = zerocopy::transmute!(*bytes);
        let illegal = |field, value: u64, rule| Err(WireError::illegal(FRAME, field, value, rule));
        if raw.magic != MAGIC {
            return illegal(
                "magic",
                u32::from_be_bytes(raw.magic).into(),
                "expected \"MFpk\"",
            );
        }
        let algorithm = Algorithm::of_flag(raw.flags);
        if raw.flags != 0 && (algorithm.is_none() || raw.kind != KIND_DATA) {
            return illegal(
                "flags",
                raw.flags.into(),
                "expected 0, in a packet also 1 or 2",
            );
        }
        if raw.iteration == 0 {
            return illegal("iteration", 0, "they count from 1");
        }
        if raw.sequence == 0 {
            return illegal("sequence", 0, "they count from 1");
        }
        let (epoch, iteration) = (raw.epoch.get(), raw.iteration.get());
        let sequence = raw.sequence.get();
        match raw.kind {
            KIND_MARK => Ok(Self::Mark(MarkHeader {
                epoch,
                iteration,
                sequence,
                bytes: raw.bytes.get(),
                streams: raw.streams.get(),
            })),
            KIND_DATA => {
                let (region, extents) = (raw.region.get(), raw.extents.get());
                let (blocks, payload) = (raw.blocks.get(), raw.payload.get());
                if region as usize >= REGIONS_MAX {
                    return illegal("region", region.into(), "more than any offer may have");
                }
                if extents == 0 || u64::from(extents) > PACKET_EXTENTS_MAX {
                    return illegal("extents", extents.into(), "expected 1 to 5120");
                }
                if u64::from(blocks) > PACKET_BLOCKS_MAX {
                    return illegal("blocks", blocks.into(), "expected at most 4096");
                }
                if u64::from(payload) > PACKET_BYTES_MAX {
                    return illegal("payload", payload.into(), "expected at most 16 MiB");
                }
                let packed = algorithm.map(|algorithm| Packed {
                    algorithm,
                    bytes: raw.packed.get(),
                    crc: raw.packed_crc.get(),
                });
                if let Some(Packed { bytes, .. }) = packed
                    && !(1..payload).contains(&bytes)
                {
                    return illegal(
                        "packed",
                        bytes.into(),
                        "expected 1 to less than the payload",
                    );
                }
                let table_crc = raw.table_crc.get();
                Ok(Self::Data(DataHeader {
                    epoch,
                    iteration,
                    sequence,
                    region,
                    extents,
                    blocks,
                    payload,
                    packed,
                    table_crc,
                }))
            }
            other => illegal("kind", other.into(), "expected 1 or 2"),
        }
    }
}

/// The parts of a run that one checksum covers: cut where a block of the Region ends.
pub fn blocks(range: PageRange) -> impl Iterator<Item = PageRange> {
    let mut first = range.first;
    std::iter::from_fn(move || {
        (first < range.end()).then(|| {
            let end = ((first / BLOCK_PAGES + 1) * BLOCK_PAGES).min(range.end());
            let block = PageRange {
                first,
                count: end - first,
            };
            first = end;
            block
        })
    })
}

/// The extents of a packet and the checksums of its payload. Reused from packet to packet.
#[derive(Debug, Default)]
pub struct Table {
    /// In ascending order, not overlapping.
    pub extents: Vec<Extent>,
    /// One per block of the data extents, in order; empty with integrity off.
    pub checksums: Vec<u32>,
}

impl Table {
    /// Forgets the packet, keeps the memory.
    pub fn clear(&mut self) {
        self.extents.clear();
        self.checksums.clear();
    }

    /// Adds pages after everything added before; joins the run before it if that has the same kind.
    pub fn push(&mut self, range: PageRange, kind: ExtentKind) {
        if let Some(last) = self.extents.last_mut()
            && last.kind == kind
            && last.range.end() == range.first
            && last.range.count + range.count <= u64::from(u32::MAX)
        {
            last.range.count += range.count;
            return;
        }
        self.extents.push(Extent { range, kind });
    }

    /// Adds data pages that lie in one block, with their checksum. They join the run before only where
    /// a block begins: the receiver cuts runs at those places, and nowhere else, to check them.
    pub fn push_block(&mut self, range: PageRange, checksum: u32) {
        self.checksums.push(checksum);
        if range.first.is_multiple_of(BLOCK_PAGES) {
            self.push(range, ExtentKind::Data);
        } else {
            self.extents.push(Extent {
                range,
                kind: ExtentKind::Data,
            });
        }
    }

    /// The runs that have payload.
    pub fn data(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.extents
            .iter()
            .filter(|e| e.kind == ExtentKind::Data)
            .map(|e| e.range)
    }

    /// Appends the table's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        for extent in &self.extents {
            let raw = RawExtent {
                first: extent.range.first.into(),
                pages: u32::try_from(extent.range.count)
                    .expect("`push` keeps runs to 32 bits")
                    .into(),
                kind: match extent.kind {
                    ExtentKind::Data => 0,
                    ExtentKind::Zero => 1,
                    ExtentKind::Hole => 2,
                },
                reserved: [0; 3],
            };
            out.extend_from_slice(raw.as_bytes());
        }
        for checksum in &self.checksums {
            out.extend_from_slice(&checksum.to_le_bytes());
        }
    }

    /// Reads the table that `header` announces, for a Region of `region_bytes`. `bytes` has exactly
    /// `header.table_bytes()`; `integrity` says whether payload carries checksums.
    pub fn decode(
        &mut self,
        bytes: &[u8],
        header: &DataHeader,
        region_bytes: u64,
        integrity: bool,
    ) -> Result<(), WireError> {
        self.clear();
        let found = crc32c(bytes);
        if found != header.table_crc {
            return Err(WireError::Damaged {
                frame: TABLE,
                expected: header.table_crc,
                found,
            });
        }
        let illegal = |field, value: u64, rule| Err(WireError::illegal(TABLE, field, value, rule));
        let (extents, checksums) = bytes.split_at(header.extents as usize * EXTENT_BYTES);
        let (mut payload, mut block_count, mut free_from) = (0, 0, 0);
        for raw in extents.chunks_exact(EXTENT_BYTES) {
            let raw = RawExtent::ref_from_bytes(raw).expect("the chunk has the extent's size");
            let (first, pages) = (raw.first.get(), u64::from(raw.pages.get()));
            let Some(range) = PageRange::new(first, pages, pages_in(region_bytes)) else {
                return illegal("extent", first, "it is empty or leaves its Region");
            };
            if first < free_from {
                return illegal("extent", first, "extents must ascend without overlap");
            }
            free_from = range.end();
            let kind = match raw.kind {
                0 => ExtentKind::Data,
                1 => ExtentKind::Zero,
                2 => ExtentKind::Hole,
                other => return illegal("extent kind", other.into(), "expected 0, 1 or 2"),
            };
            if kind == ExtentKind::Data {
                payload += range.bytes(region_bytes);
                block_count += (range.end() - 1) / BLOCK_PAGES - range.first / BLOCK_PAGES + 1;
            }
            self.extents.push(Extent { range, kind });
        }
        if payload != u64::from(header.payload) {
            return illegal(
                "payload",
                header.payload.into(),
                "it is not what the extents add up to",
            );
        }
        let expected_blocks = if integrity { block_count } else { 0 };
        if expected_blocks != u64::from(header.blocks) {
            return illegal(
                "blocks",
                header.blocks.into(),
                "it is not what the extents add up to",
            );
        }
        self.checksums.extend(
            checksums
                .chunks_exact(4)
                .map(|c| u32::from_le_bytes(c.try_into().expect("four bytes"))),
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::PAGE_BYTES;

    fn range(first: u64, count: u64) -> PageRange {
        PageRange { first, count }
    }

    fn sample() -> (Header, DataHeader, Table, Vec<u8>) {
        let mut table = Table::default();
        table.push(range(14, 4), ExtentKind::Data);
        table.push(range(18, 2), ExtentKind::Zero);
        table.push(range(20, 1000), ExtentKind::Hole);
        table.checksums = vec![0x1111_1111, 0x2222_2222];
        let mut bytes = Vec::new();
        table.encode(&mut bytes);
        let header = DataHeader {
            epoch: 1,
            iteration: 2,
            sequence: 3,
            region: 4,
            extents: 3,
            blocks: 2,
            payload: 4 * 4096,
            packed: None,
            table_crc: crc32c(&bytes),
        };
        (Header::Data(header), header, table, bytes)
    }

    #[test]
    fn golden_bytes_of_a_packet() {
        let (header, data, table, table_bytes) = sample();
        let bytes = header.encode();
        assert_eq!(
            &bytes[..24],
            b"MFpk\x01\0\0\0\x01\0\0\0\x02\0\0\0\x03\0\0\0\0\0\0\0"
        );
        assert_eq!(
            &bytes[24..40],
            b"\x04\0\0\0\x03\0\0\0\x02\0\0\0\x00\x40\0\0"
        );
        assert_eq!(bytes[40..44], crc32c(&table_bytes).to_le_bytes());
        assert_eq!(bytes[44..60], [0; 16]);
        assert_eq!(bytes[60..], crc32c(&bytes[..60]).to_le_bytes());
        assert_eq!(&table_bytes[..16], b"\x0e\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0");
        assert_eq!(
            &table_bytes[16..32],
            b"\x12\0\0\0\0\0\0\0\x02\0\0\0\x01\0\0\0"
        );
        assert_eq!(
            &table_bytes[32..48],
            b"\x14\0\0\0\0\0\0\0\xe8\x03\0\0\x02\0\0\0"
        );
        assert_eq!(&table_bytes[48..], b"\x11\x11\x11\x11\x22\x22\x22\x22");
        assert_eq!(Header::decode(&bytes), Ok(header));
        let mut read = Table::default();
        read.decode(&table_bytes, &data, 2000 * PAGE_BYTES, true)
            .unwrap();
        assert_eq!(read.extents, table.extents);
        assert_eq!(read.checksums, table.checksums);
    }

    #[test]
    fn golden_bytes_of_a_compressed_packet() {
        for (algorithm, flag) in [(Algorithm::Lz4, 1), (Algorithm::Zstd, 2)] {
            let packed = Packed {
                algorithm,
                bytes: 0x0123,
                crc: 0x4433_2211,
            };
            let (plain, data, ..) = sample();
            let header = Header::Data(DataHeader {
                packed: Some(packed),
                ..data
            });
            let (bytes, plain) = (header.encode(), plain.encode());
            assert_eq!(bytes[..5], plain[..5]);
            assert_eq!(bytes[5], flag);
            assert_eq!(bytes[6..52], plain[6..52]);
            assert_eq!(&bytes[52..60], b"\x23\x01\0\0\x11\x22\x33\x44");
            assert_eq!(bytes[60..], crc32c(&bytes[..60]).to_le_bytes());
            assert_eq!(Header::decode(&bytes), Ok(header));
        }
    }

    #[test]
    fn a_compressed_length_that_saves_nothing_or_is_nothing_is_refused() {
        let (_, data, ..) = sample();
        let decoded = |payload, bytes| {
            let packed = Packed {
                algorithm: Algorithm::Lz4,
                bytes,
                crc: 0,
            };
            let packed = Some(packed);
            let header = DataHeader {
                payload,
                packed,
                ..data
            };
            Header::decode(&Header::Data(header).encode())
        };
        assert!(decoded(4096, 4095).is_ok() && decoded(4096, 1).is_ok());
        for (payload, bytes) in [(4096, 0), (4096, 4096), (4096, u32::MAX), (0, 0), (0, 1)] {
            let refused = decoded(payload, bytes).unwrap_err();
            assert_eq!(refused.code(), "protocol", "{payload} {bytes}");
        }
    }

    #[test]
    fn flags_that_no_algorithm_has_and_flags_of_a_mark_are_refused() {
        let (data, ..) = sample();
        let mark = Header::Mark(MarkHeader {
            epoch: 0,
            iteration: 1,
            sequence: 1,
            bytes: 0,
            streams: 1,
        });
        for (header, flags) in [(data, 3), (data, 0x81), (mark, 1), (mark, 2)] {
            let mut bytes = header.encode();
            bytes[5] = flags;
            seal(&mut bytes);
            assert!(matches!(
                Header::decode(&bytes),
                Err(WireError::Illegal { field: "flags", .. })
            ));
        }
    }

    #[test]
    fn golden_bytes_of_a_mark() {
        let header = Header::Mark(MarkHeader {
            epoch: 0,
            iteration: 7,
            sequence: 8,
            bytes: 0x0102_0304,
            streams: 3,
        });
        let bytes = header.encode();
        assert_eq!(
            &bytes[..24],
            b"MFpk\x02\0\x03\0\0\0\0\0\x07\0\0\0\x08\0\0\0\0\0\0\0"
        );
        assert_eq!(&bytes[44..52], b"\x04\x03\x02\x01\0\0\0\0");
        assert_eq!(Header::decode(&bytes), Ok(header));
    }

    #[test]
    fn blocks_end_where_the_regions_blocks_end() {
        let cut: Vec<_> = blocks(range(14, 20)).collect();
        assert_eq!(cut, [range(14, 2), range(16, 16), range(32, 2)]);
    }

    #[test]
    fn a_table_that_disagrees_with_its_header_or_region_is_refused() {
        let (_, data, _, bytes) = sample();
        let mut table = Table::default();
        let mut check = |header: DataHeader, region_pages: u64, integrity| {
            table
                .decode(&bytes, &header, region_pages * PAGE_BYTES, integrity)
                .is_err()
        };
        assert!(!check(data, 1020, true));
        assert!(check(data, 1019, true), "leaves the Region");
        assert!(
            check(data, 1020, false),
            "checksums although integrity is off"
        );
        assert!(
            check(
                DataHeader {
                    payload: 4096,
                    ..data
                },
                1020,
                true
            ),
            "payload does not add up"
        );
        assert!(
            check(
                DataHeader {
                    table_crc: 0,
                    ..data
                },
                1020,
                true
            ),
            "damaged"
        );
    }

    #[test]
    fn overlapping_extents_are_refused() {
        let table = Table {
            extents: vec![
                Extent {
                    range: range(5, 2),
                    kind: ExtentKind::Zero,
                },
                Extent {
                    range: range(6, 1),
                    kind: ExtentKind::Zero,
                },
            ],
            checksums: vec![],
        };
        let mut bytes = Vec::new();
        table.encode(&mut bytes);
        let (_, data, ..) = sample();
        let header = DataHeader {
            extents: 2,
            blocks: 0,
            payload: 0,
            table_crc: crc32c(&bytes),
            ..data
        };
        let error = Table::default()
            .decode(&bytes, &header, 100 * PAGE_BYTES, true)
            .unwrap_err();
        assert_eq!(error.code(), "protocol");
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_without_a_panic(
            bytes in prop::array::uniform32(any::<u8>()),
            tail in prop::array::uniform32(any::<u8>()),
            table in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut frame = [0; HEADER_BYTES];
            frame[..32].copy_from_slice(&bytes);
            frame[32..].copy_from_slice(&tail);
            frame[..4].copy_from_slice(&MAGIC);
            seal(&mut frame);
            let decoded = Header::decode(&frame);
            if let Ok(Header::Data(header)) = decoded {
                prop_assert!(u64::from(header.payload_on_wire()) <= PACKET_BYTES_MAX);
            }
            if let Ok(Header::Data(header)) = decoded
                && table.len() >= header.table_bytes()
            {
                let bytes = &table[..header.table_bytes()];
                let header = DataHeader { table_crc: crc32c(bytes), ..header };
                let _ = Table::default().decode(bytes, &header, 1 << 30, true);
            }
        }
    }
}
