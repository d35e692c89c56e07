//! The final blob: a few bytes that have to arrive with the Regions, such as a machine's device state.

use serde::{Deserialize, Serialize};

use super::crc32c;

/// What both sides must agree on before a blob is *prepared*.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlobAccount {
    /// Length in bytes.
    pub bytes: u64,
    /// CRC-32C of all of it.
    pub crc32c: u32,
}

impl BlobAccount {
    /// The account of a blob that is there as a whole.
    #[must_use]
    pub fn of(blob: &[u8]) -> Self {
        Self {
            bytes: blob.len() as u64,
            crc32c: crc32c(blob),
        }
    }
}

/// The account of a blob that comes piece by piece.
#[derive(Debug)]
pub struct BlobSum {
    bytes: u64,
    digest: crc_fast::Digest,
}

impl Default for BlobSum {
    fn default() -> Self {
        Self {
            bytes: 0,
            digest: crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi),
        }
    }
}

impl BlobSum {
    /// Adds the next piece.
    pub fn add(&mut self, piece: &[u8]) {
        self.bytes += piece.len() as u64;
        self.digest.update(piece);
    }

    /// Of all pieces so far.
    #[must_use]
    pub fn account(&self) -> BlobAccount {
        BlobAccount {
            bytes: self.bytes,
            crc32c: u32::try_from(self.digest.finalize()).expect("a CRC-32 has 32 bits"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_has_the_same_account_in_pieces_and_as_a_whole() {
        let mut sum = BlobSum::default();
        assert_eq!(sum.account(), BlobAccount::of(b""));
        sum.add(b"1234");
        sum.add(b"56789");
        assert_eq!(sum.account(), BlobAccount::of(b"123456789"));
        assert_eq!(sum.account().crc32c, 0xe306_9283);
    }
}
