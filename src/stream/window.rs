//! What a stream has sent and the receiver has not acknowledged. Pure.
//!
//! Three bounds: on bytes (the peer's memory and ours), and on packets and checksum blocks, so that all
//! acknowledgements fit the sockets' buffers and two sides that are both writing never wait for each
//! other.

use std::collections::VecDeque;

use crate::limits::{BLOCKS_UNACKNOWLEDGED_MAX, PACKETS_UNACKNOWLEDGED_MAX};
use crate::pages::PageRange;
use crate::wire::{Ack, WireError};

use super::compression::Carried;

/// A packet or mark under way.
#[derive(Debug)]
pub(super) struct Unacknowledged {
    pub(super) sequence: u64,
    pub(super) iteration: u32,
    /// Its Region, and its pages in ascending order; none for a mark.
    pub(super) pages: Option<(u32, Vec<PageRange>)>,
    pub(super) blocks: u64,
    pub(super) wire_bytes: u64,
    pub(super) memory_bytes: u64,
    /// How its payload left; none for a mark.
    pub(super) carried: Option<Carried>,
}

/// Packets under way, oldest first.
#[derive(Debug)]
pub(super) struct Window {
    bytes_max: u64,
    packets: VecDeque<Unacknowledged>,
    bytes: u64,
    blocks: u64,
}

impl Window {
    pub(super) fn new(bytes_max: u64) -> Self {
        Self {
            bytes_max,
            packets: VecDeque::new(),
            bytes: 0,
            blocks: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// Whether a packet may be sent beside those under way. One that is larger than the window goes
    /// alone.
    pub(super) fn has_room(&self, bytes: u64, blocks: u64) -> bool {
        self.bytes + bytes <= self.bytes_max
            && self.blocks + blocks <= BLOCKS_UNACKNOWLEDGED_MAX
            && self.packets.len() < PACKETS_UNACKNOWLEDGED_MAX
    }

    pub(super) fn sent(&mut self, packet: Unacknowledged) {
        self.bytes += packet.wire_bytes;
        self.blocks += packet.blocks;
        self.packets.push_back(packet);
    }

    /// What will not be acknowledged any more, because the connection is gone.
    pub(super) fn into_packets(self) -> impl Iterator<Item = Unacknowledged> {
        self.packets.into_iter()
    }

    /// The oldest packet, which `ack` must be about.
    pub(super) fn acknowledged(
        &mut self,
        ack: &Ack,
        epoch: u32,
    ) -> Result<Unacknowledged, WireError> {
        let illegal = |field, value, rule| {
            Err(WireError::Illegal {
                frame: "acknowledgement",
                field,
                value,
                rule,
            })
        };
        let Some(packet) = self
            .packets
            .pop_front()
            .filter(|packet| packet.sequence == ack.sequence)
        else {
            return illegal(
                "sequence",
                ack.sequence,
                "it is not that of the oldest packet",
            );
        };
        if ack.epoch != epoch {
            return illegal("epoch", ack.epoch.into(), "it is not the attempt's");
        }
        if ack.iteration != packet.iteration {
            return illegal("iteration", ack.iteration.into(), "it is not the packet's");
        }
        if u64::from(ack.torn) > packet.blocks {
            return illegal("torn", ack.torn.into(), "the packet has fewer blocks");
        }
        self.bytes -= packet.wire_bytes;
        self.blocks -= packet.blocks;
        Ok(packet)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(sequence: u64, wire_bytes: u64, blocks: u64) -> Unacknowledged {
        let pages = Some((
            0,
            vec![PageRange {
                first: 0,
                count: 16,
            }],
        ));
        Unacknowledged {
            sequence,
            iteration: 1,
            pages,
            blocks,
            wire_bytes,
            memory_bytes: 0,
            carried: None,
        }
    }

    fn ack(sequence: u64, torn: u32) -> Ack {
        Ack {
            epoch: 7,
            sequence,
            iteration: 1,
            torn,
            table_crc: 0,
        }
    }

    #[test]
    fn room_is_bounded_in_bytes_blocks_and_packets() {
        let mut window = Window::new(1000);
        assert!(window.has_room(1000, 1) && !window.has_room(1001, 1));
        window.sent(packet(1, 600, 2000));
        assert!(window.has_room(400, 48) && !window.has_room(401, 0) && !window.has_room(0, 49));
        window.acknowledged(&ack(1, 2000), 7).unwrap();
        assert!(window.is_empty() && window.has_room(1000, 2048));
        for sequence in 0..PACKETS_UNACKNOWLEDGED_MAX as u64 {
            assert!(window.has_room(1, 1));
            window.sent(packet(sequence, 1, 1));
        }
        assert!(!window.has_room(1, 1));
    }

    #[test]
    fn an_acknowledgement_that_lies_is_refused() {
        let refused = |ack: Ack| {
            let mut window = Window::new(1000);
            window.sent(packet(1, 10, 3));
            window.acknowledged(&ack, 7).is_err()
        };
        assert!(!refused(ack(1, 3)));
        assert!(refused(ack(2, 0)), "another packet");
        assert!(refused(ack(1, 4)), "more torn blocks than it has");
        assert!(
            refused(Ack {
                epoch: 8,
                ..ack(1, 0)
            }),
            "another epoch"
        );
        assert!(
            refused(Ack {
                iteration: 2,
                ..ack(1, 0)
            }),
            "another iteration"
        );
        assert!(
            Window::new(1).acknowledged(&ack(1, 0), 7).is_err(),
            "nothing is under way"
        );
    }
}
