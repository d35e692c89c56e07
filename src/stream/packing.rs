//! The compression of a sending stream: what it decides, and the buffers it decides about.

use std::time::Instant;

use crate::wire::{Algorithm, Packed};

use super::codec::Encoder;
use super::compression::{Carried, Compression, Way};

/// One per stream; for one packet after the other.
#[derive(Debug)]
pub(super) struct Packing {
    compression: Compression,
    encoder: Encoder,
    /// How the packet leaves that is being made; when that was begun, and done.
    way: Way,
    began: Instant,
    made: Instant,
}

impl Packing {
    pub(super) fn new(algorithms: &[Algorithm]) -> Self {
        Self {
            compression: Compression::new(algorithms),
            encoder: Encoder::new(),
            way: None,
            began: Instant::now(),
            made: Instant::now(),
        }
    }

    /// A packet is begun; says whether its payload is to be kept, to be compressed.
    pub(super) fn begin(&mut self, now: Instant) -> bool {
        self.began = now;
        self.way = self.compression.way(now);
        self.way.is_some()
    }

    /// Compresses the payload that was kept, if it was and if that pays.
    pub(super) fn pack(&mut self, kept: &[u8]) -> Option<Packed> {
        let packed = self
            .way
            .and_then(|algorithm| self.encoder.encode(algorithm, kept));
        self.made = Instant::now();
        packed
    }

    /// What it compressed last.
    pub(super) fn bytes(&self) -> &[u8] {
        self.encoder.bytes()
    }

    /// The packet has left, with so many bytes of payload.
    pub(super) fn sent(&mut self, payload: u64, packed: Option<Packed>) -> Carried {
        let is_poor = payload > 0 && self.way.is_some() && packed.is_none();
        self.compression
            .sent(self.way, payload, is_poor, (self.began, self.made))
    }

    /// A packet was acknowledged. Gives how packets leave from now on, if that has changed.
    pub(super) fn arrived(&mut self, packet: Carried, now: Instant) -> Option<Way> {
        self.compression.arrived(packet, now)
    }
}
