//! Compressing and decompressing the payload of one packet, in buffers that are kept.

use std::fmt;
use std::io;

use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};
use zstd::bulk;

use crate::wire::{Algorithm, Packed, WireError, crc32c};

/// zstd's fastest regular level: a stream has one core at most, and the higher ones save little more.
const ZSTD_LEVEL: i32 = 1;

/// Compresses. One per stream.
pub(super) struct Encoder {
    lz4: CompressTable,
    zstd: Option<bulk::Compressor<'static>>,
    buffer: Vec<u8>,
    packed_bytes: usize,
}

impl Encoder {
    pub(super) fn new() -> Self {
        Self {
            lz4: CompressTable::default(),
            zstd: None,
            buffer: Vec::new(),
            packed_bytes: 0,
        }
    }

    /// Compresses `plain`, at most a packet's payload; `None` if that saves less than an eighth of it.
    pub(super) fn encode(&mut self, algorithm: Algorithm, plain: &[u8]) -> Option<Packed> {
        let bound = match algorithm {
            Algorithm::Lz4 => get_maximum_output_size(plain.len()),
            Algorithm::Zstd => zstd::zstd_safe::compress_bound(plain.len()),
        };
        if self.buffer.len() < bound {
            self.buffer.resize(bound, 0);
        }
        // What cannot be compressed, for whatever reason, goes as it is.
        let bytes = match algorithm {
            Algorithm::Lz4 => {
                compress_into_with_table(plain, &mut self.buffer, &mut self.lz4).ok()?
            }
            Algorithm::Zstd => {
                if self.zstd.is_none() {
                    self.zstd = bulk::Compressor::new(ZSTD_LEVEL).ok();
                }
                let compressor = self.zstd.as_mut()?;
                compressor
                    .compress_to_buffer(plain, &mut self.buffer[..])
                    .ok()?
            }
        };
        if bytes == 0 || bytes > plain.len() - plain.len() / 8 {
            return None;
        }
        self.packed_bytes = bytes;
        Some(Packed {
            algorithm,
            bytes: u32::try_from(bytes).ok()?,
            crc: crc32c(&self.buffer[..bytes]),
        })
    }

    /// What was compressed last.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer[..self.packed_bytes]
    }
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoder").finish_non_exhaustive()
    }
}

/// Decompresses. One per stream. The buffers grow to the largest packet that came.
#[derive(Default)]
pub(super) struct Decoder {
    zstd: Option<bulk::Decompressor<'static>>,
    packed: Vec<u8>,
    plain: Vec<u8>,
}

impl Decoder {
    /// Room for as many bytes as `packed` says, for [`decode`](Self::decode) to find.
    pub(super) fn room(&mut self, packed: &Packed) -> io::Result<&mut [u8]> {
        room(&mut self.packed, packed.bytes)
    }

    /// That what is in that room arrived as it was sent.
    pub(super) fn check(&self, packed: &Packed) -> Result<(), WireError> {
        let (expected, found) = (packed.crc, crc32c(&self.packed[..packed.bytes as usize]));
        match expected == found {
            true => Ok(()),
            false => Err(WireError::Damaged {
                frame: "compressed payload",
                expected,
                found,
            }),
        }
    }

    /// Decompresses it. `None`: it is not what the algorithm makes of exactly `payload` bytes.
    pub(super) fn decode(&mut self, packed: &Packed, payload: u32) -> io::Result<Option<&[u8]>> {
        let plain = room(&mut self.plain, payload)?;
        let bytes = &self.packed[..packed.bytes as usize];
        // Neither writes behind the end of `plain`, whatever the bytes say.
        let made = match packed.algorithm {
            Algorithm::Lz4 => decompress_into(bytes, plain).ok(),
            Algorithm::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(bulk::Decompressor::new()?),
                };
                zstd.decompress_to_buffer(bytes, plain).ok()
            }
        };
        Ok((made == Some(payload as usize)).then_some(plain))
    }
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder").finish_non_exhaustive()
    }
}

/// The first `bytes` of `buffer`, made longer if it has to be; memory that is not there is an error.
fn room(buffer: &mut Vec<u8>, bytes: u32) -> io::Result<&mut [u8]> {
    let bytes = bytes as usize;
    if let Some(more) = bytes.checked_sub(buffer.len()) {
        buffer
            .try_reserve_exact(more)
            .map_err(|_| io::ErrorKind::OutOfMemory)?;
        buffer.resize(bytes, 0);
    }
    Ok(&mut buffer[..bytes])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decoded(packed: &Packed, bytes: &[u8], payload: u32) -> Option<Vec<u8>> {
        let mut decoder = Decoder::default();
        decoder.room(packed).unwrap().copy_from_slice(bytes);
        let plain = decoder.decode(packed, payload).unwrap();
        plain.map(<[u8]>::to_vec)
    }

    fn text(bytes: usize) -> Vec<u8> {
        b"what is written again and again, and again "
            .iter()
            .copied()
            .cycle()
            .take(bytes)
            .collect()
    }

    fn as_u32(n: usize) -> u32 {
        n.try_into().unwrap()
    }

    #[test]
    fn both_algorithms_give_back_what_they_got_from_used_buffers_too() {
        let (mut encoder, mut decoder) = (Encoder::new(), Decoder::default());
        for &algorithm in Algorithm::ALL {
            for bytes in [4096, 1 << 20, 70_000, 65_534, 65_535] {
                let plain = text(bytes);
                let packed = encoder.encode(algorithm, &plain).unwrap();
                decoder
                    .room(&packed)
                    .unwrap()
                    .copy_from_slice(encoder.bytes());
                assert_eq!(decoder.check(&packed), Ok(()));
                let back = decoder.decode(&packed, as_u32(bytes)).unwrap();
                assert!(back == Some(&plain[..]), "{algorithm:?} {bytes}");
            }
        }
    }

    #[test]
    fn a_length_that_is_not_that_of_the_payload_is_refused_whichever_it_is() {
        for &algorithm in Algorithm::ALL {
            let mut encoder = Encoder::new();
            // A bomb: 16 MiB in a few hundred or thousand bytes.
            let packed = encoder.encode(algorithm, &vec![7; 16 << 20]).unwrap();
            let bytes = encoder.bytes();
            for payload in [4096, (16 << 20) - 1, (16 << 20) + 1] {
                assert_eq!(decoded(&packed, bytes, payload), None, "{algorithm:?}");
            }
            assert!(decoded(&packed, bytes, 16 << 20).is_some());
        }
    }

    #[test]
    fn what_is_not_worth_it_is_not_compressed() {
        let noise = noise(65_536);
        for &algorithm in Algorithm::ALL {
            assert_eq!(Encoder::new().encode(algorithm, &[]), None);
            assert_eq!(Encoder::new().encode(algorithm, &noise), None);
        }
    }

    /// Bytes of a xorshift generator.
    fn noise(bytes: usize) -> Vec<u8> {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        };
        (0..bytes).map(|_| next()).collect()
    }

    proptest! {
        #[test]
        fn any_content_comes_back_or_goes_plain(
            plain in prop::collection::vec(0_u8..4, 1..20_000),
            zstd: bool,
        ) {
            let algorithm = if zstd { Algorithm::Zstd } else { Algorithm::Lz4 };
            let mut encoder = Encoder::new();
            if let Some(packed) = encoder.encode(algorithm, &plain) {
                prop_assert!(packed.bytes < as_u32(plain.len()));
                let back = decoded(&packed, encoder.bytes(), as_u32(plain.len()));
                prop_assert_eq!(back, Some(plain));
            }
        }

        #[test]
        fn any_bytes_decode_or_fail_without_a_panic(
            bytes in prop::collection::vec(any::<u8>(), 1..2_000),
            at in any::<prop::sample::Index>(),
            flip in 0_u8..=255,
            payload in 1_u32..100_000,
            zstd: bool,
        ) {
            let algorithm = if zstd { Algorithm::Zstd } else { Algorithm::Lz4 };
            let garbage = Packed { algorithm, bytes: as_u32(bytes.len()), crc: 0 };
            let _ = decoded(&garbage, &bytes, payload);
            // What is nearly right gets further.
            let mut encoder = Encoder::new();
            let plain = text(payload as usize + 64);
            let packed = encoder.encode(algorithm, &plain).unwrap();
            let mut bytes = encoder.bytes().to_vec();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            let _ = decoded(&packed, &bytes, as_u32(plain.len()));
        }
    }
}
