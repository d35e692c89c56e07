//! The receiver's account of one attempt: what has arrived, in which order, and whether it is all.
//!
//! Pure: streams tell it what came, it says whether that was allowed. It keeps rule 2 (no page of
//! Iteration n+1 before all of n) and the first half of rule 4 (what *prepared* needs).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::limits::PAGE_BYTES;
use crate::name::Name;
use crate::pages::{PageRange, SharedPageSet, pages_in};
use crate::wire::{DataHeader, MarkHeader, StreamTotals};

/// What a peer did that the protocol does not allow, or what is missing at the end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A frame of another epoch.
    #[error("stream {stream} sent a packet of epoch {found}, the attempt is at epoch {expected}")]
    Epoch {
        /// The stream.
        stream: u16,
        /// Its epoch.
        found: u32,
        /// The attempt's.
        expected: u32,
    },
    /// A frame was repeated, left out or swapped.
    #[error("stream {stream} sent packet {found} where packet {expected} was due")]
    Sequence {
        /// The stream.
        stream: u16,
        /// What came.
        found: u64,
        /// What was due.
        expected: u64,
    },
    /// A frame of an Iteration that is not the open one.
    #[error("stream {stream} sent a packet of iteration {found} while iteration {open} is open")]
    Iteration {
        /// The stream.
        stream: u16,
        /// The frame's.
        found: u32,
        /// The open one.
        open: u32,
    },
    /// A Region that was not offered.
    #[error("stream {stream} sent pages of region {region}, but {regions} were offered")]
    Region {
        /// The stream.
        stream: u16,
        /// The index.
        region: u32,
        /// How many there are.
        regions: usize,
    },
    /// The two sides count differently.
    #[error("stream {stream}: the sender counts {sent:?}, {received:?} arrived")]
    Totals {
        /// The stream.
        stream: u16,
        /// The sender's count.
        sent: StreamTotals,
        /// Ours.
        received: StreamTotals,
    },
    /// An Iteration was not ended on every stream.
    #[error("iteration {open} is not complete: {marked} of {streams} streams have ended it")]
    Open {
        /// The Iteration.
        open: u32,
        /// Streams that ended it.
        marked: u32,
        /// Streams there are.
        streams: usize,
    },
    /// Pages never arrived, or arrived damaged and were not sent again.
    #[error("region {name} is not complete: {missing} of its {pages} pages are missing or torn")]
    Incomplete {
        /// The Region.
        name: Name,
        /// Pages not there.
        missing: u64,
        /// Pages it has.
        pages: u64,
    },
}

/// A Region as it fills.
#[derive(Debug)]
pub struct Incoming {
    name: Name,
    bytes: u64,
    /// Carried, and the last copy was intact.
    intact: SharedPageSet,
    /// Payload was placed, intact or not: the memory is no longer a hole.
    written: SharedPageSet,
}

impl Incoming {
    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Payload is about to be placed in `range`; until it is found intact it counts as missing.
    pub fn placing(&self, range: PageRange) {
        self.written.insert(range);
        self.intact.remove(range);
    }

    /// The payload of `range` is in place and matches its checksum.
    pub fn intact(&self, range: PageRange) {
        self.intact.insert(range);
    }

    /// Whether some page of `range` ever had payload placed in it.
    #[must_use]
    pub fn was_written(&self, range: PageRange) -> bool {
        self.written.intersects(range)
    }
}

#[derive(Debug, Default)]
struct StreamState {
    packets: AtomicU64,
    bytes: AtomicU64,
    marked: AtomicU32,
}

/// One attempt as the receiver sees it. Streams share it without a lock: each field of a
/// `StreamState` is written by that stream alone.
#[derive(Debug)]
pub struct Assembly {
    epoch: u32,
    regions: Vec<Incoming>,
    streams: Vec<StreamState>,
    /// The last Iteration that every stream has ended.
    complete: AtomicU32,
    /// Streams that have ended the one after it.
    marks: AtomicU32,
}

impl Assembly {
    /// Nothing has arrived yet.
    #[must_use]
    pub fn new(epoch: u32, streams: u16, regions: impl IntoIterator<Item = (Name, u64)>) -> Self {
        let regions = regions.into_iter().map(|(name, bytes)| Incoming {
            name,
            bytes,
            intact: SharedPageSet::empty(pages_in(bytes)),
            written: SharedPageSet::empty(pages_in(bytes)),
        });
        Self {
            epoch,
            regions: regions.collect(),
            streams: std::iter::repeat_with(StreamState::default)
                .take(streams.into())
                .collect(),
            complete: AtomicU32::new(0),
            marks: AtomicU32::new(0),
        }
    }

    /// The epoch of its connections.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Iterations that are complete.
    #[must_use]
    pub fn iterations(&self) -> u32 {
        self.complete.load(Ordering::Acquire)
    }

    /// A packet with pages has arrived on `stream`; gives its Region. Nothing of it may be applied
    /// before this said yes.
    pub fn data(&self, stream: u16, header: &DataHeader) -> Result<&Incoming, Violation> {
        self.frame(stream, header.epoch, header.iteration, header.sequence)?;
        let region = header.region;
        let Some(incoming) = self.regions.get(region as usize) else {
            return Err(Violation::Region {
                stream,
                region,
                regions: self.regions.len(),
            });
        };
        self.streams[usize::from(stream)]
            .bytes
            .fetch_add(header.payload.into(), Ordering::Relaxed);
        Ok(incoming)
    }

    /// `stream` has ended its part of an Iteration; says whether it was the last one to do so.
    pub fn mark(&self, stream: u16, header: &MarkHeader) -> Result<bool, Violation> {
        self.frame(stream, header.epoch, header.iteration, header.sequence)?;
        let state = &self.streams[usize::from(stream)];
        let received = self.totals(stream);
        let sent = StreamTotals {
            packets: header.sequence,
            bytes: header.bytes,
        };
        if sent != received {
            return Err(Violation::Totals {
                stream,
                sent,
                received,
            });
        }
        state.marked.store(header.iteration, Ordering::Relaxed);
        let marks = self.marks.fetch_add(1, Ordering::AcqRel) + 1;
        let last = marks as usize == self.streams.len();
        if last {
            // The sender starts the next Iteration only after this mark is acknowledged, which is
            // after these stores, so no stream can see half of the change.
            self.marks.store(0, Ordering::Relaxed);
            self.complete.store(header.iteration, Ordering::Release);
        }
        Ok(last)
    }

    /// What every frame must satisfy.
    fn frame(
        &self,
        stream: u16,
        epoch: u32,
        iteration: u32,
        sequence: u64,
    ) -> Result<(), Violation> {
        if epoch != self.epoch {
            return Err(Violation::Epoch {
                stream,
                found: epoch,
                expected: self.epoch,
            });
        }
        let state = &self.streams[usize::from(stream)];
        let expected = state.packets.load(Ordering::Relaxed) + 1;
        if sequence != expected {
            return Err(Violation::Sequence {
                stream,
                found: sequence,
                expected,
            });
        }
        let open = self.iterations() + 1;
        if iteration != open || state.marked.load(Ordering::Relaxed) == open {
            return Err(Violation::Iteration {
                stream,
                found: iteration,
                open,
            });
        }
        state.packets.store(sequence, Ordering::Relaxed);
        Ok(())
    }

    fn totals(&self, stream: u16) -> StreamTotals {
        let state = &self.streams[usize::from(stream)];
        StreamTotals {
            packets: state.packets.load(Ordering::Relaxed),
            bytes: state.bytes.load(Ordering::Relaxed),
        }
    }

    /// Whether all of it is here: the counts agree on every stream, no Iteration is open, and every
    /// page was carried and is intact. `sent` is the sender's count by stream number.
    pub fn verdict(&self, sent: &[StreamTotals]) -> Result<(), Violation> {
        let streams = self.streams.len();
        let open = self.iterations() + 1;
        let marked = self.marks.load(Ordering::Acquire);
        if marked != 0 || sent.len() != streams {
            return Err(Violation::Open {
                open,
                marked,
                streams,
            });
        }
        for (stream, &sent) in (0..).zip(sent) {
            let received = self.totals(stream);
            if sent != received {
                return Err(Violation::Totals {
                    stream,
                    sent,
                    received,
                });
            }
        }
        for region in &self.regions {
            let pages = pages_in(region.bytes);
            let missing = pages - region.intact.count();
            if missing > 0 {
                return Err(Violation::Incomplete {
                    name: region.name.clone(),
                    missing,
                    pages,
                });
            }
        }
        Ok(())
    }

    /// Bytes in place and intact, over all Regions; the last page of a Region counts in full.
    #[must_use]
    pub fn intact_bytes(&self) -> u64 {
        self.regions
            .iter()
            .map(|region| region.intact.count() * PAGE_BYTES)
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assembly(streams: u16) -> Assembly {
        Assembly::new(5, streams, [(Name::new("r").unwrap(), 4 * PAGE_BYTES)])
    }

    fn data(iteration: u32, sequence: u64) -> DataHeader {
        DataHeader {
            epoch: 5,
            iteration,
            sequence,
            region: 0,
            extents: 1,
            blocks: 1,
            payload: 4096,
            table_crc: 0,
        }
    }

    fn mark(iteration: u32, sequence: u64, bytes: u64) -> MarkHeader {
        MarkHeader {
            epoch: 5,
            iteration,
            sequence,
            bytes,
        }
    }

    fn range(first: u64, count: u64) -> PageRange {
        PageRange { first, count }
    }

    #[test]
    fn a_complete_attempt_is_prepared() {
        let all = assembly(2);
        all.data(0, &data(1, 1)).unwrap().intact(range(0, 1));
        all.data(1, &data(1, 1)).unwrap().intact(range(1, 3));
        assert!(!all.mark(0, &mark(1, 2, 4096)).unwrap());
        assert!(all.mark(1, &mark(1, 2, 4096)).unwrap());
        let totals = StreamTotals {
            packets: 2,
            bytes: 4096,
        };
        assert_eq!(all.verdict(&[totals, totals]), Ok(()));
        assert_eq!(all.intact_bytes(), 4 * PAGE_BYTES);
        let other = StreamTotals {
            packets: 3,
            bytes: 4096,
        };
        assert!(matches!(
            all.verdict(&[totals, other]),
            Err(Violation::Totals { stream: 1, .. })
        ));
        assert!(all.verdict(&[totals]).is_err(), "a stream is missing");
    }

    #[test]
    fn torn_or_missing_pages_are_not_prepared() {
        let all = assembly(1);
        let region = all.data(0, &data(1, 1)).unwrap();
        region.intact(range(0, 4));
        region.placing(range(2, 1));
        assert!(region.was_written(range(0, 4)) && !region.was_written(range(3, 1)));
        all.mark(0, &mark(1, 2, 4096)).unwrap();
        let totals = StreamTotals {
            packets: 2,
            bytes: 4096,
        };
        assert!(matches!(
            all.verdict(&[totals]),
            Err(Violation::Incomplete {
                missing: 1,
                pages: 4,
                ..
            })
        ));
    }

    #[test]
    fn no_page_of_the_next_iteration_before_every_stream_ended_this_one() {
        let all = assembly(2);
        all.mark(0, &mark(1, 1, 0)).unwrap();
        assert!(matches!(
            all.data(0, &data(2, 2)),
            Err(Violation::Iteration {
                found: 2,
                open: 1,
                ..
            })
        ));
        assert!(matches!(
            all.data(0, &data(1, 2)),
            Err(Violation::Iteration {
                found: 1,
                open: 1,
                ..
            })
        ));
        assert!(matches!(
            all.verdict(&[]),
            Err(Violation::Open {
                open: 1,
                marked: 1,
                ..
            })
        ));
        all.mark(1, &mark(1, 1, 0)).unwrap();
        assert!(all.data(0, &data(2, 2)).is_ok());
        assert!(matches!(
            all.data(1, &data(3, 2)),
            Err(Violation::Iteration { .. })
        ));
    }

    #[test]
    fn repeated_lost_stale_and_foreign_frames_are_refused() {
        let all = assembly(1);
        all.data(0, &data(1, 1)).unwrap();
        assert!(matches!(
            all.data(0, &data(1, 1)),
            Err(Violation::Sequence {
                found: 1,
                expected: 2,
                ..
            })
        ));
        assert!(matches!(
            all.data(0, &data(1, 3)),
            Err(Violation::Sequence { found: 3, .. })
        ));
        let stale = DataHeader {
            epoch: 4,
            ..data(1, 2)
        };
        assert!(matches!(
            all.data(0, &stale),
            Err(Violation::Epoch { found: 4, .. })
        ));
        let foreign = DataHeader {
            region: 1,
            ..data(1, 2)
        };
        assert!(matches!(
            all.data(0, &foreign),
            Err(Violation::Region { region: 1, .. })
        ));
    }

    #[test]
    fn a_mark_that_counts_otherwise_is_refused() {
        let all = assembly(1);
        all.data(0, &data(1, 1)).unwrap();
        assert!(matches!(
            all.mark(0, &mark(1, 2, 1)),
            Err(Violation::Totals { .. })
        ));
    }
}
