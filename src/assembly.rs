//! The receiver's account of one attempt: what has arrived, in which order, and whether it is all.
//!
//! Pure: streams tell it what came, it says whether that was allowed. It keeps rule 2 (no page of
//! Iteration n+1 before all of n) and the first half of rule 4 (what *prepared* needs).
//!
//! What arrived belongs to the attempt, the account of how it arrived to one epoch of connections: the
//! counts of both sides start anew with each epoch.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::limits::{MISSING_RUNS_MAX, PAGE_BYTES};
use crate::name::Name;
use crate::pages::{PageRange, SharedPageSet, pages_in};
use crate::wire::{DataHeader, MarkHeader, RegionRun, StreamTotals};

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
    /// Marks that say different numbers of streams, or more than were offered.
    #[error("stream {stream} says that there are {found} streams, {known} are known")]
    Streams {
        /// The stream.
        stream: u16,
        /// Its number of them.
        found: u16,
        /// What another stream or the offer said.
        known: u32,
    },
    /// The sender wants to go on before where it was.
    #[error("the transfer was resumed at iteration {found} while iteration {open} is open")]
    Resumed {
        /// Where the sender wants to go on.
        found: u32,
        /// The open one.
        open: u32,
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
    /// A frame that came after the commit.
    #[error("stream {stream} sent packet {sequence} after the commit")]
    Closed {
        /// The stream.
        stream: u16,
        /// The frame.
        sequence: u64,
    },
    /// A frame has come and is not in place yet.
    #[error("stream {stream}: {applied} of the {received} packets that arrived are in place")]
    UnderWay {
        /// The stream.
        stream: u16,
        /// Frames in place.
        applied: u64,
        /// Frames that have come.
        received: u64,
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
    /// Frames that have come.
    packets: AtomicU64,
    /// Those of them that are in place.
    applied: AtomicU64,
    bytes: AtomicU64,
    marked: AtomicU32,
}

/// One epoch of an attempt as the receiver sees it. Streams share it without a lock: each field of a
/// `StreamState` is written by that stream alone.
#[derive(Debug)]
pub struct Assembly {
    epoch: u32,
    regions: Arc<[Incoming]>,
    streams: Vec<StreamState>,
    /// Streams the sender has in this epoch, as its first mark says; 0 before.
    expected: AtomicU32,
    /// The last Iteration that every stream has ended.
    complete: AtomicU32,
    /// Streams that have ended the one after it.
    marks: AtomicU32,
    /// The sender has committed: no frame is taken any more.
    closed: AtomicBool,
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
        Self::of(epoch, streams.into(), 1, regions.collect())
    }

    fn of(epoch: u32, streams: usize, iteration: u32, regions: Arc<[Incoming]>) -> Self {
        Self {
            epoch,
            regions,
            streams: std::iter::repeat_with(StreamState::default)
                .take(streams)
                .collect(),
            expected: AtomicU32::new(0),
            complete: AtomicU32::new(iteration - 1),
            marks: AtomicU32::new(0),
            closed: AtomicBool::new(false),
        }
    }

    /// The account of the next epoch: the connections of this one are gone, and nothing reads them any
    /// more. What has arrived stays; `iteration` is the one that comes next.
    pub fn succeed(&self, epoch: u32, iteration: u32) -> Result<Self, Violation> {
        let open = self.iterations() + 1;
        // Nobody gets that far; and so the numbers to come never overflow.
        if iteration < open || iteration > u32::MAX / 2 {
            let found = iteration;
            return Err(Violation::Resumed { found, open });
        }
        let regions = Arc::clone(&self.regions);
        Ok(Self::of(epoch, self.streams.len(), iteration, regions))
    }

    /// All of the frame is in place: what an acknowledgement says, whether it gets through or not.
    pub fn applied(&self, stream: u16, sequence: u64) {
        let state = &self.streams[usize::from(stream)];
        // With `close`: who sees this sees the pages.
        state.applied.store(sequence, Ordering::Release);
    }

    /// Whether nothing has come on `stream` in this epoch.
    #[must_use]
    pub fn is_unused(&self, stream: u16) -> bool {
        self.totals(stream).packets == 0
    }

    /// How many frames of each stream are in place.
    #[must_use]
    pub fn frames_applied(&self) -> Vec<u64> {
        let applied = |state: &StreamState| state.applied.load(Ordering::Acquire);
        self.streams.iter().map(applied).collect()
    }

    /// Pages that are not in place or not intact. If those are more than [`MISSING_RUNS_MAX`] runs, the
    /// gaps between them that are smallest are counted in.
    #[must_use]
    pub fn missing(&self) -> Vec<RegionRun> {
        let mut all: Vec<RegionRun> = Vec::new();
        let mut gap_max = 0;
        for (region, incoming) in (0..).zip(&*self.regions) {
            for PageRange { first, count } in incoming.intact.complement().runs() {
                let run = RegionRun {
                    region,
                    first,
                    pages: count,
                };
                join(&mut all, run, gap_max);
                while all.len() > MISSING_RUNS_MAX {
                    gap_max = gap_max * 2 + 1;
                    for run in std::mem::take(&mut all) {
                        join(&mut all, run, gap_max);
                    }
                }
            }
        }
        all
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
        let streams = self.expect(stream, header.streams)?;
        state.marked.store(header.iteration, Ordering::Relaxed);
        let marks = self.marks.fetch_add(1, Ordering::AcqRel) + 1;
        let last = marks == streams;
        if last {
            // The sender starts the next Iteration only after this mark is acknowledged, which is
            // after these stores, so no stream can see half of the change.
            self.marks.store(0, Ordering::Relaxed);
            self.complete.store(header.iteration, Ordering::Release);
        }
        Ok(last)
    }

    /// How many streams end an Iteration in this epoch; all of them have to say the same.
    fn expect(&self, stream: u16, found: u16) -> Result<u32, Violation> {
        let offered = u32::try_from(self.streams.len()).expect("streams are limited to 256");
        let said = u32::from(found);
        let known =
            match self
                .expected
                .compare_exchange(0, said, Ordering::Relaxed, Ordering::Relaxed)
            {
                Ok(_) if (1..=offered).contains(&said) => return Ok(said),
                Ok(_) => offered,
                Err(known) if known == said => return Ok(said),
                Err(known) => known,
            };
        Err(Violation::Streams {
            stream,
            found,
            known,
        })
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
        // First counted, then asked, and the other way round in `close`: whichever comes first, a frame
        // that is taken is in the count that the verdict reads.
        state.packets.store(sequence, Ordering::SeqCst);
        if self.closed.load(Ordering::SeqCst) {
            return Err(Violation::Closed { stream, sequence });
        }
        Ok(())
    }

    fn totals(&self, stream: u16) -> StreamTotals {
        let state = &self.streams[usize::from(stream)];
        StreamTotals {
            packets: state.packets.load(Ordering::SeqCst),
            bytes: state.bytes.load(Ordering::Relaxed),
        }
    }

    /// Whether everything is here: the counts agree on every stream, every frame is in place, no Iteration
    /// is open, and every page was carried and is intact. `sent` is the sender's count by stream number.
    ///
    /// A yes holds until the next frame comes, which [`Self::close`] finds out.
    pub fn check(&self, sent: &[StreamTotals]) -> Result<(), Violation> {
        self.counts_agree(sent)?;
        for region in &*self.regions {
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

    /// The sender commits to what [`Self::check`] said yes to, with the same counts: takes no frame any
    /// more, and says whether none has come since.
    ///
    /// Behind a yes nothing changes the memory, though the streams' threads may still wait for packets.
    pub fn close(&self, sent: &[StreamTotals]) -> Result<(), Violation> {
        self.closed.store(true, Ordering::SeqCst);
        self.counts_agree(sent)
    }

    /// Whether nothing has come since [`Self::check`] said yes to the same counts.
    #[must_use]
    pub fn is_still(&self, sent: &[StreamTotals]) -> bool {
        self.counts_agree(sent).is_ok()
    }

    fn counts_agree(&self, sent: &[StreamTotals]) -> Result<(), Violation> {
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
        for (stream, applied) in (0..).zip(self.frames_applied()) {
            let received = self.totals(stream).packets;
            if applied != received {
                return Err(Violation::UnderWay {
                    stream,
                    applied,
                    received,
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

/// Adds a run behind `all`; joins it to the last one if at most `gap_max` pages lie between.
fn join(all: &mut Vec<RegionRun>, run: RegionRun, gap_max: u64) {
    match all.last_mut() {
        Some(last)
            if last.region == run.region && run.first - (last.first + last.pages) <= gap_max =>
        {
            last.pages = run.first + run.pages - last.first;
        }
        _ => all.push(run),
    }
}

#[cfg(test)]
mod tests;
