//! What one Iteration sends, cut into pieces; and whether there should be another one.
//!
//! Pure: no socket, no thread of its own, no clock. Streams pull pieces from the plan, so a slow
//! stream simply takes fewer; the plan itself never waits.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::limits::{BLOCK_PAGES, HUGE_PAGE_PAGES, PAGE_BYTES, PIECE_RUNS_MAX};
use crate::pages::PageRange;

/// Why a run is in the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// The receiver does not have it: it is sent whatever it holds.
    Owed,
    /// It may have been written: it is read, and sent if its fingerprint has changed.
    Inspect,
    /// It was written since the receiver got it, and is owed unless its fingerprint is still the same.
    Compare,
    /// It is owed and not allocated: it is sent as a hole, without being read.
    Hole,
}

/// A run of pages of one Region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Index of the Region in the attempt.
    pub region: u32,
    /// The pages.
    pub range: PageRange,
    /// Why.
    pub look: Look,
}

/// Pieces that a stream gets of a short plan: a stream that is held up leaves the others the rest.
const PIECES_PER_STREAM: u64 = 2;

/// Runs of one Region that make at most one packet.
#[derive(Debug, Default)]
pub struct Piece {
    /// Index of the Region in the attempt.
    pub region: u32,
    /// The pages in ascending order.
    pub runs: Vec<(PageRange, Look)>,
}

impl Piece {
    /// How many of its pages are looked at in this way.
    #[must_use]
    pub fn pages(&self, look: Look) -> u64 {
        let runs = self.runs.iter().filter(|(_, why)| *why == look);
        runs.map(|(range, _)| range.count).sum()
    }
}

/// All pages that one Iteration looks at, handed out piece by piece.
#[derive(Debug)]
pub struct Plan {
    iteration: u32,
    packet_pages: u64,
    runs: Vec<Run>,
    cursor: Mutex<Cursor>,
}

#[derive(Debug, Default)]
struct Cursor {
    run: usize,
    /// Pages of that run that were handed out.
    done: u64,
}

impl Plan {
    /// A plan over `runs`, grouped by Region and ascending within it, in pieces of at most
    /// `packet_bytes` of pages that may become payload; smaller ones if there is so little that some of
    /// the `streams` would have nothing to do.
    #[must_use]
    pub fn new(iteration: u32, packet_bytes: u64, streams: u16, runs: Vec<Run>) -> Self {
        let to_read = runs.iter().filter(|run| run.look != Look::Hole);
        let pages: u64 = to_read.map(|run| run.range.count).sum();
        let share = (pages / (u64::from(streams.max(1)) * PIECES_PER_STREAM))
            .next_multiple_of(BLOCK_PAGES)
            .max(BLOCK_PAGES);
        let packet_pages = (packet_bytes / PAGE_BYTES).min(share);
        assert!(
            packet_pages >= BLOCK_PAGES,
            "a packet holds at least one block"
        );
        assert!(
            runs.iter().all(|run| run.range.count > 0),
            "an empty run would end the plan early"
        );
        Self {
            iteration,
            packet_pages,
            runs,
            cursor: Mutex::default(),
        }
    }

    /// The Iteration's number, from 1.
    #[must_use]
    pub fn iteration(&self) -> u32 {
        self.iteration
    }

    /// Pages that are owed, also if it may turn out that the receiver has them.
    #[must_use]
    pub fn owed_pages(&self) -> u64 {
        self.runs
            .iter()
            .filter(|run| run.look != Look::Inspect)
            .map(|run| run.range.count)
            .sum()
    }

    /// Ends the Iteration early: what was not handed out is not.
    pub fn end(&self) {
        let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        *cursor = Cursor {
            run: self.runs.len(),
            done: 0,
        };
    }

    /// Fills `piece` with the next one; says whether there was one. Any thread may ask.
    pub fn next(&self, piece: &mut Piece) -> bool {
        // A panic elsewhere cannot leave the cursor half moved: it is two integers set at the end.
        let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        piece.runs.clear();
        let (mut at, mut done, mut room) = (cursor.run, cursor.done, self.packet_pages);
        while let Some(run) = self.runs.get(at) {
            let full = piece.runs.len() as u64 == PIECE_RUNS_MAX || room == 0;
            if full || (!piece.runs.is_empty() && piece.region != run.region) {
                break;
            }
            piece.region = run.region;
            let left = PageRange {
                first: run.range.first + done,
                count: run.range.count - done,
            };
            let taken = match run.look {
                Look::Hole => left.count.min(u64::from(u32::MAX)),
                Look::Owed | Look::Inspect | Look::Compare => cut(left, room, self.packet_pages),
            };
            if taken == 0 {
                break;
            }
            piece.runs.push((
                PageRange {
                    first: left.first,
                    count: taken,
                },
                run.look,
            ));
            if run.look != Look::Hole {
                room -= taken;
            }
            done += taken;
            if done == run.range.count {
                (at, done) = (at + 1, 0);
            }
        }
        *cursor = Cursor { run: at, done };
        !piece.runs.is_empty()
    }
}

/// How much of `left` fits into `room` pages of a packet, ending where a block ends unless the run ends
/// first: a block cut in two would cost two checksums and two short copies. A large packet ends where a
/// huge page or half of one does: the receiver makes one where that much of it comes at once.
fn cut(left: PageRange, room: u64, packet_pages: u64) -> u64 {
    if left.count <= room {
        return left.count;
    }
    let unit = [HUGE_PAGE_PAGES, HUGE_PAGE_PAGES / 2]
        .into_iter()
        .find(|unit| *unit <= packet_pages)
        .unwrap_or(BLOCK_PAGES);
    let aligned_end = (left.first + room) / unit * unit;
    aligned_end.saturating_sub(left.first)
}

/// A rest that takes no longer than this to send is not worth another Iteration: freezing, asking the
/// trackers and the commit take about as long.
const WORTH_ANOTHER: Duration = Duration::from_micros(500);

/// Answers that are waited for while the writer stands still, one after the other: that the last Iteration
/// was applied, *prepared*, *committed*.
const ANSWERS: u32 = 3;

/// What is known when an Iteration has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// Iterations so far.
    pub iterations: u32,
    /// Bytes owed now, or the best estimate of them.
    pub remaining_bytes: u64,
    /// The same when the Iteration before had ended.
    pub remaining_bytes_before: u64,
    /// Bytes of memory that the last Iteration must read before it knows what to send (`scan`).
    pub inspect_bytes: u64,
    /// Payload bytes per second, as measured.
    pub bytes_per_second: u64,
    /// Bytes read and compared per second, as measured.
    pub inspect_bytes_per_second: u64,
    /// How long an answer of the receiver takes.
    pub round_trip: Duration,
}

/// What to do after an Iteration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Another Iteration.
    Iterate,
    /// Little enough is left: freeze and send the rest.
    Freeze,
    /// The Iterations are used up.
    NotConverging,
}

impl State {
    /// How long the writer would stand still if it were frozen now: reading what has to be inspected,
    /// sending what is owed, and the answers that are waited for.
    #[must_use]
    pub fn expected_downtime(&self) -> Duration {
        seconds(self.remaining_bytes, self.bytes_per_second)
            + seconds(self.inspect_bytes, self.inspect_bytes_per_second)
            + self.round_trip * ANSWERS
    }

    /// Whether to go on. `scan` must read everything once more whatever happens, so that part of the
    /// downtime cannot be iterated away: what is compared with the limit is the part that can.
    ///
    /// The limit is what the writer may be made to wait, not what it has to: as long as every
    /// Iteration leaves at most half of what the one before left, another one costs less than it saves.
    #[must_use]
    pub fn next(&self, downtime_limit: Duration, max_iterations: u32) -> Next {
        let rest = seconds(self.remaining_bytes, self.bytes_per_second);
        let reading = seconds(self.inspect_bytes, self.inspect_bytes_per_second);
        let used_up = self.iterations >= max_iterations;
        if rest > downtime_limit {
            return if used_up {
                Next::NotConverging
            } else {
                Next::Iterate
            };
        }
        let shrinking = self.remaining_bytes <= self.remaining_bytes_before / 2;
        if shrinking && rest > WORTH_ANOTHER.max(reading) && !used_up {
            Next::Iterate
        } else {
            Next::Freeze
        }
    }
}

/// How long `bytes` take; a rate that could not be measured counts as 1 byte per second, so that
/// nothing divides by zero and nothing is believed to be fast.
fn seconds(bytes: u64, per_second: u64) -> Duration {
    #[expect(clippy::cast_precision_loss)] // an estimate
    let seconds = bytes as f64 / per_second.max(1) as f64;
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 4)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::PACKET_BYTES_MIN;

    fn run(region: u32, first: u64, count: u64, look: Look) -> Run {
        Run {
            region,
            range: PageRange { first, count },
            look,
        }
    }

    #[test]
    fn scattered_pages_share_a_packet_and_regions_do_not() {
        let runs = vec![
            run(0, 1, 1, Look::Owed),
            run(0, 9, 2, Look::Inspect),
            run(1, 0, 1, Look::Owed),
        ];
        let plan = Plan::new(1, 1 << 20, 1, runs);
        let mut piece = Piece::default();
        assert!(plan.next(&mut piece));
        assert_eq!((piece.region, piece.runs.len()), (0, 2));
        assert!(plan.next(&mut piece));
        assert_eq!((piece.region, piece.runs.len()), (1, 1));
        assert!(!plan.next(&mut piece));
    }

    /// How many pages each piece has.
    fn pieces(plan: &Plan) -> Vec<u64> {
        let mut piece = Piece::default();
        std::iter::from_fn(|| {
            plan.next(&mut piece)
                .then(|| piece.runs.iter().map(|(range, _)| range.count).sum())
        })
        .collect()
    }

    #[test]
    fn large_pieces_end_where_a_huge_page_does() {
        let runs = vec![run(0, 100, 4000, Look::Owed)];
        let plan = Plan::new(1, 4 << 20, 1, runs.clone());
        assert_eq!(pieces(&plan), [924, 1024, 1024, 1024, 4]);
        let plan = Plan::new(1, 1 << 20, 1, runs);
        assert_eq!(pieces(&plan)[..3], [156, 256, 256]);
    }

    #[test]
    fn a_short_plan_has_something_for_every_stream() {
        let runs = vec![
            run(0, 0, 256, Look::Owed),
            run(0, 4096, 1 << 20, Look::Hole),
        ];
        let plan = Plan::new(1, 4 << 20, 4, runs);
        assert_eq!(pieces(&plan)[..8], [32; 8]);
    }

    #[test]
    fn a_hole_of_any_size_is_one_run() {
        let plan = Plan::new(1, PACKET_BYTES_MIN, 1, vec![run(0, 0, 1 << 31, Look::Hole)]);
        let mut piece = Piece::default();
        assert!(plan.next(&mut piece));
        assert_eq!(
            piece.runs,
            [(
                PageRange {
                    first: 0,
                    count: 1 << 31
                },
                Look::Hole
            )]
        );
        assert!(!plan.next(&mut piece));
    }

    proptest! {
        #[test]
        fn every_page_is_handed_out_once_and_no_piece_is_too_large(
            gaps in prop::collection::vec((0u64..40, 1u64..200, 0u8..3), 1..40),
            packet_blocks in 1u64..8,
        ) {
            let mut first = 0;
            let mut runs = Vec::new();
            for (gap, count, look) in gaps {
                first += gap;
                let look = [Look::Owed, Look::Inspect, Look::Hole][usize::from(look)];
                runs.push(run(0, first, count, look));
                first += count;
            }
            let packet_pages = packet_blocks * BLOCK_PAGES;
            let plan = Plan::new(1, packet_pages * PAGE_BYTES, 1, runs.clone());
            let mut handed = Vec::new();
            let mut piece = Piece::default();
            while plan.next(&mut piece) {
                let payload: u64 = piece.runs.iter().filter(|r| r.1 != Look::Hole).map(|r| r.0.count).sum();
                prop_assert!(payload <= packet_pages);
                handed.extend(piece.runs.iter().copied());
            }
            let pages = |runs: Vec<(PageRange, Look)>| -> Vec<(u64, Look)> {
                runs.into_iter().flat_map(|(r, look)| (r.first..r.end()).map(move |p| (p, look))).collect()
            };
            prop_assert_eq!(pages(handed), pages(runs.iter().map(|r| (r.range, r.look)).collect()));
        }
    }

    #[test]
    fn it_freezes_when_the_rest_fits_the_limit_and_gives_up_when_passes_are_used_up() {
        let state = |remaining_bytes, iterations| State {
            iterations,
            remaining_bytes,
            remaining_bytes_before: remaining_bytes,
            inspect_bytes: 0,
            bytes_per_second: 1_000_000_000,
            inspect_bytes_per_second: 1,
            round_trip: Duration::ZERO,
        };
        let limit = Duration::from_millis(300);
        assert_eq!(state(300_000_000, 1).next(limit, 30), Next::Freeze);
        assert_eq!(state(300_000_001, 1).next(limit, 30), Next::Iterate);
        assert_eq!(state(300_000_001, 30).next(limit, 30), Next::NotConverging);
        assert_eq!(state(0, 1).next(Duration::ZERO, 1), Next::Freeze);
        let unmeasured = State {
            bytes_per_second: 0,
            ..state(u64::MAX, 1)
        };
        assert_eq!(unmeasured.next(limit, 30), Next::Iterate);
        let shrinking = State {
            remaining_bytes_before: 200_000_000,
            ..state(100_000_000, 2)
        };
        assert_eq!(
            shrinking.next(limit, 30),
            Next::Iterate,
            "another one halves it again"
        );
        assert_eq!(shrinking.next(limit, 2), Next::Freeze);
        let slowly = State {
            remaining_bytes_before: 199_000_000,
            ..shrinking
        };
        assert_eq!(slowly.next(limit, 30), Next::Freeze);
        let scanned = State {
            inspect_bytes: 1,
            ..shrinking
        };
        assert_eq!(
            scanned.next(limit, 30),
            Next::Freeze,
            "reading would take longer than it saves"
        );
        let far = State {
            round_trip: Duration::from_millis(10),
            ..state(100_000_000, 2)
        };
        assert_eq!(far.expected_downtime(), Duration::from_millis(130));
        let little = State {
            remaining_bytes_before: u64::MAX,
            ..state(400_000, 2)
        };
        assert_eq!(little.next(limit, 30), Next::Freeze);
    }
}
