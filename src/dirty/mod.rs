//! Trackers: which pages were written since they were last asked.
//!
//! A tracker only names pages. What was harvested is a debt of the attempt (rule 3), and whether a
//! page arrived is for the receiver to say. The set of trackers is closed, so it is an enum.

mod bitmap;
mod error;
mod fingerprints;
mod maps;
mod pagemap;

pub use bitmap::BitmapTracker;
pub use error::TrackerError;
pub use fingerprints::{Change, Fingerprints};
pub use pagemap::{Memory, PagemapTracker};

use crate::iteration::{Look, Run};
use crate::pages::{PageRange, PageSet};
use crate::region::{Region, RegionError};

/// How a Region's writes are found.
#[derive(Debug)]
pub enum Tracker {
    /// Nothing writes: what was sent once stays sent.
    None,
    /// Everything is read on every pass, and what has another fingerprint than last time is sent.
    Scan(Fingerprints),
}

impl Tracker {
    /// A scanner for `region` that has seen nothing yet.
    pub fn scan(region: &Region) -> std::io::Result<Self> {
        Ok(Self::Scan(Fingerprints::new(region.pages())?))
    }

    /// Bytes that a pass over `region` reads only to find out whether they changed.
    pub fn inspect_bytes(&self, region: &Region) -> Result<u64, RegionError> {
        match self {
            Self::None => Ok(0),
            Self::Scan(_) => region.allocated_bytes(),
        }
    }

    /// The fingerprints, if this tracker compares content.
    #[must_use]
    pub fn fingerprints(&self) -> Option<&Fingerprints> {
        match self {
            Self::None => None,
            Self::Scan(fingerprints) => Some(fingerprints),
        }
    }

    /// Appends to `runs` what an Iteration has to look at: what is `owed`, and what may have been
    /// written since. Touches no page.
    pub fn plan(
        &self,
        index: u32,
        region: &Region,
        owed: &PageSet,
        runs: &mut Vec<Run>,
    ) -> Result<(), RegionError> {
        let mut push = |range, look| {
            runs.push(Run {
                region: index,
                range,
                look,
            })
        };
        match self {
            Self::None => {
                for range in owed.runs() {
                    each_part(region, range, |part, hole| {
                        push(part, if hole { Look::Hole } else { Look::Owed })
                    })?;
                }
            }
            Self::Scan(fingerprints) => {
                for (range, owed) in stretches(owed) {
                    each_part(region, range, |part, hole| match (owed, hole) {
                        (true, true) => push(part, Look::Hole),
                        (true, false) => push(part, Look::Owed),
                        // Data that was punched out since the receiver got it.
                        (false, true) => {
                            fingerprints.each_data_run(part, |gone| push(gone, Look::Hole))
                        }
                        (false, false) => push(part, Look::Inspect),
                    })?;
                }
            }
        }
        Ok(())
    }
}

/// Every page of the set's Region as runs that are (`true`) or are not in the set.
fn stretches(set: &PageSet) -> impl Iterator<Item = (PageRange, bool)> + '_ {
    let mut from = 0;
    let mut runs = set.runs().peekable();
    std::iter::from_fn(move || {
        let next = runs.peek().copied();
        let until = next.map_or_else(|| set.pages(), |run| run.first);
        if from < until {
            let gap = PageRange {
                first: from,
                count: until - from,
            };
            from = until;
            return Some((gap, false));
        }
        let run = runs.next()?;
        from = run.end();
        Some((run, true))
    })
}

/// Calls `each` for the allocated parts (`false`) and the holes (`true`) of `range`, in order.
fn each_part(
    region: &Region,
    range: PageRange,
    mut each: impl FnMut(PageRange, bool),
) -> Result<(), RegionError> {
    let mut from = range.first;
    while from < range.end() {
        let rest = PageRange {
            first: from,
            count: range.end() - from,
        };
        let data = region.next_data(rest)?;
        let hole_end = data.map_or_else(|| range.end(), |data| data.first);
        if from < hole_end {
            each(
                PageRange {
                    first: from,
                    count: hole_end - from,
                },
                true,
            );
        }
        from = hole_end;
        if let Some(data) = data {
            each(data, false);
            from = data.end();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::limits::PAGE_BYTES;
    use crate::name::Name;

    fn sparse(pages: u64, data: &[u64]) -> Region {
        let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(pages * PAGE_BYTES).unwrap();
        for page in data {
            file.write_all_at(&[1], page * PAGE_BYTES).unwrap();
        }
        Region::from_descriptor(Name::new("r").unwrap(), file.into()).unwrap()
    }

    fn planned(tracker: &Tracker, region: &Region, owed: &PageSet) -> Vec<(u64, u64, Look)> {
        let mut runs = Vec::new();
        tracker.plan(0, region, owed, &mut runs).unwrap();
        runs.iter()
            .map(|r| (r.range.first, r.range.count, r.look))
            .collect()
    }

    #[test]
    fn what_is_owed_is_split_into_data_and_holes() {
        let region = sparse(10, &[3, 4]);
        let all = planned(&Tracker::None, &region, &PageSet::full(10));
        assert_eq!(
            all,
            [(0, 3, Look::Hole), (3, 2, Look::Owed), (5, 5, Look::Hole)]
        );
        assert_eq!(planned(&Tracker::None, &region, &PageSet::empty(10)), []);
    }

    #[test]
    fn scan_inspects_data_that_is_not_owed_and_leaves_old_holes_alone() {
        let region = sparse(10, &[3, 4]);
        let scan = Tracker::scan(&region).unwrap();
        let mut owed = PageSet::empty(10);
        owed.insert(PageRange { first: 4, count: 2 });
        assert_eq!(
            planned(&scan, &region, &owed),
            [
                (3, 1, Look::Inspect),
                (4, 1, Look::Owed),
                (5, 1, Look::Hole)
            ]
        );
    }

    #[test]
    fn scan_sends_a_hole_where_data_was_punched_out() {
        let region = sparse(10, &[]);
        let scan = Tracker::scan(&region).unwrap();
        scan.fingerprints().unwrap().update(7, &[1; 4096]);
        assert_eq!(
            planned(&scan, &region, &PageSet::empty(10)),
            [(7, 1, Look::Hole)]
        );
    }
}
