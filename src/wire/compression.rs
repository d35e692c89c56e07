//! How the payload of a packet is packed: which algorithms there are, and what a header says of it.

/// An algorithm that payload may be compressed with. Every receiver of version 2 knows all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// One LZ4 block, without a frame.
    Lz4,
    /// Zstandard frames (RFC 8878), without a dictionary.
    Zstd,
}

impl Algorithm {
    /// All of them, the cheapest first.
    pub const ALL: &'static [Self] = &[Self::Lz4, Self::Zstd];

    /// Its name, in TOML, QMP and texts.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    /// Its number in the `flags` of a packet.
    pub(super) fn flag(self) -> u8 {
        match self {
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    pub(super) fn of_flag(flag: u8) -> Option<Self> {
        Self::ALL.iter().copied().find(|known| known.flag() == flag)
    }
}

/// Payload that travels compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packed {
    /// With what.
    pub algorithm: Algorithm,
    /// Bytes of it on the wire: at least 1, and fewer than the payload has.
    pub bytes: u32,
    /// Checksum of those bytes: damage on the way is told from a peer that is wrong before they are
    /// decompressed.
    pub crc: u32,
}
