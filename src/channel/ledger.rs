//! Which zero-copy sends the kernel has not released yet. Pure: no socket, no thread, no clock.
//!
//! The kernel numbers the successful, non-empty zero-copy calls of a socket from 0, modulo 2^32, and
//! reports them as inclusive ranges: merged, and not always in order (after a reset 6..=8 was seen
//! before 5..=5). A short send is one number; the rest of its bytes is a new one. So the ledger keeps
//! a *set*: a sum of range lengths would say "all back" too early once a range came twice.

use std::collections::VecDeque;
use std::ops::Range;

use super::Flush;

/// A release that does not fit what was lent. Believing it could reuse a page too early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the kernel released zero-copy sends {lo}..={hi}, which are not all on loan \
     (oldest on loan {oldest}, next to be lent {next})"
)]
pub struct LedgerError {
    /// First number of the range reported.
    pub lo: u32,
    /// Last number of the range reported.
    pub hi: u32,
    /// The oldest number that was on loan; equal to `next` if none was.
    pub oldest: u32,
    /// The number the next send gets.
    pub next: u32,
}

/// The zero-copy sends of one socket.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Everything below is back. Counted in 64 bits, so that order is plain; the kernel's number is
    /// the low half.
    oldest: u64,
    /// The number of the next send.
    next: u64,
    /// Ranges inside `oldest..next` that came back ahead of `oldest`: sorted, disjoint, not touching.
    /// Empty while releases come in order, so the steady case allocates nothing.
    early: VecDeque<Range<u64>>,
    /// Sends inside `oldest..next` and not in `early`.
    outstanding: u64,
    /// Released since the last [`Ledger::take_flush`].
    since_flush: Flush,
    /// Released before that.
    before: Flush,
}

impl Ledger {
    /// A ledger for a socket that has made no zero-copy send.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A ledger whose next send has the number `next`, for tests around the wrap.
    #[cfg(test)]
    pub(crate) fn starting_at(next: u32) -> Self {
        Self {
            oldest: u64::from(next),
            next: u64::from(next),
            ..Self::default()
        }
    }

    /// Registers one successful, non-empty zero-copy call and returns its number.
    ///
    /// # Panics
    /// With 2^32 - 1 numbers between the oldest loan and the next: one more could not be told apart.
    /// The socket's send buffer bounds the loans far below that.
    pub fn lend(&mut self) -> u32 {
        assert!(
            self.next - self.oldest < u64::from(u32::MAX),
            "zero-copy sends are numbered modulo 2^32 and too many are on loan"
        );
        let id = low_half(self.next);
        self.next += 1;
        self.outstanding += 1;
        id
    }

    /// Counts a send that asked for zero copy but was copied before the call returned: it has no
    /// number and nothing is owed for it.
    pub fn copied_at_once(&mut self) {
        self.since_flush.sends += 1;
        self.since_flush.copied += 1;
    }

    /// The kernel reports the sends `lo..=hi` (wrapping) as released; `copied` says that it copied at
    /// least one of them after all.
    ///
    /// On an error nothing has changed. The cost depends on the ranges that came out of order, never
    /// on `hi - lo`.
    pub fn released(&mut self, lo: u32, hi: u32, copied: bool) -> Result<(), LedgerError> {
        let fresh = self.take(lo, hi)?;
        self.since_flush.sends += fresh;
        self.since_flush.copied += if copied { fresh } else { 0 };
        Ok(())
    }

    /// The memory of a send that failed is back. It carried nothing, so it is not counted.
    pub fn forgiven(&mut self, id: u32) -> Result<(), LedgerError> {
        self.take(id, id).map(|_| ())
    }

    /// Takes `lo..=hi` (wrapping) off the loans, and says how many that are.
    fn take(&mut self, lo: u32, hi: u32) -> Result<u64, LedgerError> {
        let oldest = low_half(self.oldest);
        let error = LedgerError {
            lo,
            hi,
            oldest,
            next: low_half(self.next),
        };
        // At most 2^32 - 1 + 2^32 beyond `oldest`: no overflow. A number from before `oldest` wraps
        // to a huge distance and falls out at the comparison with `next`.
        let start = self.oldest + u64::from(lo.wrapping_sub(oldest));
        let end = start + u64::from(hi.wrapping_sub(lo)) + 1;
        if end > self.next {
            return Err(error);
        }
        if start == self.oldest {
            self.take_oldest(end).ok_or(error)?;
        } else {
            self.take_early(start, end).ok_or(error)?;
        }
        let fresh = end - start;
        self.outstanding -= fresh;
        Ok(fresh)
    }

    /// `oldest..end` is back. `None`, without a change, if part of it was already.
    fn take_oldest(&mut self, end: u64) -> Option<()> {
        match self.early.front() {
            Some(front) if front.start < end => return None,
            Some(front) if front.start == end => {
                self.oldest = front.end;
                self.early.pop_front();
            }
            _ => self.oldest = end,
        }
        Some(())
    }

    /// `start..end` is back ahead of `oldest`. `None`, without a change, if part of it was already.
    fn take_early(&mut self, start: u64, end: u64) -> Option<()> {
        let at = self.early.partition_point(|range| range.end < start);
        let touches_left = match self.early.get(at) {
            Some(range) if range.end == start => true,
            Some(range) if range.start < end => return None,
            _ => false,
        };
        let right = if touches_left { at + 1 } else { at };
        let touches_right = match self.early.get(right) {
            Some(range) if range.start < end => return None,
            Some(range) => range.start == end,
            None => false,
        };
        match (touches_left, touches_right) {
            (true, true) => {
                self.early[at].end = self.early[right].end;
                self.early.remove(right);
            }
            (true, false) => self.early[at].end = end,
            (false, true) => self.early[right].start = start,
            (false, false) => self.early.insert(at, start..end),
        }
        Some(())
    }

    /// Sends that are not back yet.
    #[must_use]
    pub fn outstanding(&self) -> u64 {
        self.outstanding
    }

    /// Sends released since the last [`Ledger::take_flush`].
    #[must_use]
    pub fn since_flush(&self) -> Flush {
        self.since_flush
    }

    /// The counts since the last call; starts them again. `Flush::NOTHING_OWED` if nothing came back.
    pub fn take_flush(&mut self) -> Flush {
        self.before = self.totals();
        std::mem::take(&mut self.since_flush)
    }

    /// Sends released and copied since the ledger was made.
    #[must_use]
    pub fn totals(&self) -> Flush {
        Flush {
            sends: self.before.sends + self.since_flush.sends,
            copied: self.before.copied + self.since_flush.copied,
        }
    }
}

/// The kernel's number of a send.
#[allow(clippy::cast_possible_truncation)] // Taking the low half is the purpose.
fn low_half(id: u64) -> u32 {
    id as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn nothing_lent_is_nothing_owed() {
        let mut ledger = Ledger::new();
        assert_eq!(ledger.take_flush(), Flush::NOTHING_OWED);
        assert!(!Flush::NOTHING_OWED.all_copied());
        assert!(ledger.released(0, 0, true).is_err());
    }

    #[test]
    fn a_range_may_wrap() {
        let mut ledger = Ledger::starting_at(u32::MAX - 1);
        let ids: Vec<u32> = (0..4).map(|_| ledger.lend()).collect();
        assert_eq!(ids, [u32::MAX - 1, u32::MAX, 0, 1]);
        ledger.released(u32::MAX, 0, true).unwrap();
        assert_eq!(ledger.outstanding(), 2);
        ledger.released(1, 1, false).unwrap();
        ledger.released(u32::MAX - 1, u32::MAX - 1, false).unwrap();
        assert_eq!(ledger.outstanding(), 0);
        assert_eq!(
            ledger.take_flush(),
            Flush {
                sends: 4,
                copied: 2
            }
        );
        assert_eq!(ledger.take_flush(), Flush::NOTHING_OWED);
        assert_eq!(
            ledger.totals(),
            Flush {
                sends: 4,
                copied: 2
            }
        );
    }

    #[test]
    fn a_reset_reports_the_later_range_first() {
        let mut ledger = Ledger::new();
        for _ in 0..9 {
            ledger.lend();
        }
        ledger.released(0, 4, true).unwrap();
        ledger.released(6, 8, false).unwrap();
        assert_eq!(ledger.outstanding(), 1);
        ledger.released(5, 5, false).unwrap();
        assert_eq!(ledger.outstanding(), 0);
    }

    #[test]
    fn a_repeated_or_unknown_range_is_an_error_and_changes_nothing() {
        let mut ledger = Ledger::new();
        for _ in 0..10 {
            ledger.lend();
        }
        ledger.released(3, 5, false).unwrap();
        for (lo, hi) in [
            (3, 3),
            (5, 6),
            (2, 3),
            (0, 9),
            (0, 3),
            (9, 10),
            (10, 10),
            (7, 6),
        ] {
            assert!(ledger.released(lo, hi, true).is_err(), "{lo}..={hi}");
        }
        assert!(ledger.released(0, u32::MAX, true).is_err());
        assert_eq!(ledger.outstanding(), 7);
        ledger.released(0, 2, false).unwrap();
        let error = ledger.released(1, 1, true).unwrap_err();
        assert_eq!((error.oldest, error.next), (6, 10));
        assert_eq!(
            ledger.since_flush(),
            Flush {
                sends: 6,
                copied: 0
            }
        );
    }

    #[test]
    fn sends_copied_at_once_are_counted_and_not_owed() {
        let mut ledger = Ledger::new();
        ledger.copied_at_once();
        assert_eq!(ledger.outstanding(), 0);
        assert!(ledger.take_flush().all_copied());
    }

    #[test]
    fn releases_in_order_keep_no_ranges() {
        let mut ledger = Ledger::starting_at(u32::MAX - 500);
        for _ in 0..1000 {
            let id = ledger.lend();
            ledger.released(id, id, false).unwrap();
        }
        assert_eq!(ledger.early.capacity(), 0);
    }

    /// One step of a history: lend some, or report a range relative to the numbers lent so far.
    #[derive(Debug, Clone)]
    enum Step {
        Lend(u8),
        Release { back: u32, len: u32, copied: bool },
        Flush,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (1u8..20).prop_map(Step::Lend),
            8 => (0u32..40, 0u32..8, any::<bool>())
                .prop_map(|(back, len, copied)| Step::Release { back, len, copied }),
            1 => (any::<u32>(), any::<u32>(), any::<bool>())
                .prop_map(|(back, len, copied)| Step::Release { back, len, copied }),
            1 => Just(Step::Flush),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_a_naive_set(
            first in prop_oneof![Just(0u32), (u32::MAX - 60)..=u32::MAX, any::<u32>()],
            steps in prop::collection::vec(step(), 0..200),
        ) {
            let mut ledger = Ledger::starting_at(first);
            let mut model: HashSet<u32> = HashSet::new();
            let mut next = first;
            let mut counts = Flush::default();
            let mut totals = Flush::default();
            for step in steps {
                match step {
                    Step::Lend(n) => for _ in 0..n {
                        prop_assert_eq!(ledger.lend(), next);
                        model.insert(next);
                        next = next.wrapping_add(1);
                    },
                    Step::Release { back, len, copied } => {
                        let lo = next.wrapping_sub(back);
                        let hi = lo.wrapping_add(len);
                        let known = (len as usize) < model.len()
                            && (0..=len).all(|i| model.contains(&lo.wrapping_add(i)));
                        prop_assert_eq!(ledger.released(lo, hi, copied).is_ok(), known);
                        if known {
                            for i in 0..=len {
                                model.remove(&lo.wrapping_add(i));
                            }
                            counts.sends += u64::from(len) + 1;
                            counts.copied += if copied { u64::from(len) + 1 } else { 0 };
                        }
                    }
                    Step::Flush => {
                        prop_assert_eq!(ledger.take_flush(), counts);
                        totals.sends += counts.sends;
                        totals.copied += counts.copied;
                        counts = Flush::default();
                    }
                }
                prop_assert_eq!(ledger.outstanding(), model.len() as u64);
                prop_assert_eq!(ledger.since_flush(), counts);
                prop_assert_eq!(ledger.totals().sends, totals.sends + counts.sends);
                prop_assert_eq!(ledger.totals().copied, totals.copied + counts.copied);
            }
        }
    }
}
