//! Trackers: which pages were written since they were last asked.
//!
//! A tracker only names pages. What was harvested is a debt of the attempt (rule 3), and whether a
//! page arrived is for the receiver to say. The set of trackers is closed, so it is an enum.

mod bitmap;
mod comparison;
mod error;
mod fingerprints;
mod look;
mod maps;
mod pagemap;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use bitmap::BitmapTracker;
pub use comparison::Comparison;
pub use error::TrackerError;
pub use fingerprints::{Change, Fingerprints};
pub use pagemap::{Memory, PagemapTracker};

use crate::iteration::{Look, Run};
use crate::limits::PAGE_BYTES;
use crate::pages::{PageRange, PageSet};
use crate::region::{Region, RegionError};

/// A tracker that knows what was written without reading it. It lives as long as the writer's
/// registration; attempts come and go.
#[derive(Debug)]
pub enum Exact {
    /// The kernel's page tables, through the writer's registered mapping; and the pages that are known
    /// to be allocated, since a hole that is punched leaves no trace in page tables.
    Pagemap(PagemapTracker, PageSet),
    /// A bitmap that the writer shares.
    Bitmap(BitmapTracker),
}

impl Exact {
    /// A new attempt begins, which owes everything: what was written before is of no interest.
    fn begin(&mut self, region: &Region) -> Result<(), TrackerError> {
        match self {
            Self::Pagemap(pagemap, allocated) => {
                pagemap.arm()?;
                // Behind the arming: what is allocated from here on is a write that is reported.
                *allocated = PageSet::empty(region.pages());
                Extents::of(region).each_part(all_of(region), |part, hole| {
                    if !hole {
                        allocated.insert(part);
                    }
                })?;
                Ok(())
            }
            Self::Bitmap(bitmap) => {
                bitmap.begin();
                Ok(())
            }
        }
    }

    /// Adds to `owed` what was written since the last time, and gives how many pages that were.
    fn harvest(&mut self, owed: &mut PageSet) -> Result<u64, TrackerError> {
        match self {
            Self::Pagemap(pagemap, allocated) => {
                // Apart from what is owed already: that may be a hole which was not sent yet.
                let mut written = PageSet::empty(owed.pages());
                let pages = pagemap.take(&mut written)?;
                allocated.union(&written);
                owed.union(&written);
                Ok(pages)
            }
            Self::Bitmap(bitmap) => Ok(bitmap.harvest(owed)),
        }
    }

    /// That nothing was written past it up to the last harvest: behind that, so that it also covers what was
    /// unmapped while that ran.
    fn check_sight(&self, region: &Region) -> Result<(), TrackerError> {
        let Self::Pagemap(pagemap, _) = self else {
            return Ok(());
        };
        // The list of mappings tells in microseconds what the page tables tell in milliseconds per GiB.
        match pagemap.check_memory(region.file().as_fd())? {
            Memory::Confirmed => Ok(()),
            Memory::NotVisible => pagemap.check_coverage(),
        }
    }

    /// The writer stands still: adds to `owed` what changed without a trace, as far as it can be seen.
    ///
    /// A punched hole is found by counting: walking a Region's extents costs milliseconds per GiB, the
    /// number of allocated blocks nothing. Only if that is not what it must be the walk is made.
    fn look_again(&self, region: &Region, owed: &mut PageSet) -> Result<(), TrackerError> {
        let Self::Pagemap(_, allocated) = self else {
            return Ok(());
        };
        if region.allocated_bytes()? == allocated.count() * PAGE_BYTES {
            return Ok(());
        }
        Extents::of(region).each_part(all_of(region), |part, hole| {
            for page in part.first..part.end() {
                if allocated.contains(page) == hole {
                    owed.insert(PageRange {
                        first: page,
                        count: 1,
                    });
                }
            }
        })?;
        Ok(())
    }

    /// The attempt has failed: what was harvested for it is dirty again (rule 3).
    fn restore(&mut self) {
        match self {
            // The page tables belong to the writer's registration, which only we read; and the next
            // attempt, of another nonce, owes everything.
            Self::Pagemap(..) => {}
            Self::Bitmap(bitmap) => bitmap.restore(),
        }
    }
}

/// An attempt's use of an exact tracker.
///
/// A harvest runs on a thread of its own, and one that a cancelled attempt left behind may come late:
/// what it took then would be missing from the next attempt. So it takes nothing once this has ended.
#[derive(Debug)]
pub struct Lease {
    exact: Arc<Mutex<Exact>>,
    ended: AtomicBool,
}

impl Lease {
    fn new(exact: Arc<Mutex<Exact>>) -> Self {
        Self {
            exact,
            ended: AtomicBool::new(false),
        }
    }

    /// The tracker, unless the attempt has ended. Ends are decided under the same lock.
    fn lock(&self) -> Option<MutexGuard<'_, Exact>> {
        // A panic while it was held is a bug that was reported; the trackers keep no state that could
        // be half changed.
        let exact = self.exact.lock().unwrap_or_else(PoisonError::into_inner);
        (!self.ended.load(Ordering::Relaxed)).then_some(exact)
    }
}

/// How a Region's writes are found.
#[derive(Debug)]
pub enum Tracker {
    /// Nothing writes: what was sent once stays sent.
    None,
    /// Everything is read on every pass, and what has another fingerprint than last time is sent.
    Scan(Fingerprints),
    /// Whoever knows is asked, until the attempt has ended; and what was written is compared with what
    /// was sent of it before, if that is wanted.
    Exact(Lease, Option<Comparison>),
}

impl Tracker {
    /// A scanner for `region` that has seen nothing yet.
    pub fn scan(region: &Region) -> std::io::Result<Self> {
        Ok(Self::Scan(Fingerprints::new(region.pages())?))
    }

    /// An attempt's use of a tracker that outlives it.
    #[must_use]
    pub fn exact(exact: Arc<Mutex<Exact>>) -> Self {
        Self::Exact(Lease::new(exact), None)
    }

    /// The same for pages of `region` that are not to be sent again if they are written with what they
    /// held. Only where checksums tell what the receiver has.
    pub fn comparing(exact: Arc<Mutex<Exact>>, region: &Region) -> std::io::Result<Self> {
        let comparison = Comparison::new(region.pages())?;
        Ok(Self::Exact(Lease::new(exact), Some(comparison)))
    }

    /// Whether writes are found by reading.
    #[must_use]
    pub fn is_scan(&self) -> bool {
        matches!(self, Self::Scan(_))
    }

    /// Whether it knows by itself what was written.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        matches!(self, Self::Exact(..))
    }

    /// Whether to ask it takes next to no time: some 5 us for a GiB, where page tables take a hundred times as long.
    #[must_use]
    pub fn answers_at_once(&self) -> bool {
        self.lease()
            .is_none_or(|exact| matches!(*exact, Exact::Bitmap(_)))
    }

    /// Pages that are owed and that the next Iteration compares first.
    #[must_use]
    pub fn comparable_pages(&self) -> u64 {
        self.comparison().map_or(0, Comparison::pages)
    }

    fn comparison(&self) -> Option<&Comparison> {
        match self {
            Self::None | Self::Scan(_) => None,
            Self::Exact(_, comparison) => comparison.as_ref(),
        }
    }

    /// Bytes that a pass over `region` reads only to find out whether they changed.
    pub fn inspect_bytes(&self, region: &Region) -> Result<u64, RegionError> {
        match self {
            Self::None | Self::Exact(..) => Ok(0),
            Self::Scan(_) => region.allocated_bytes(),
        }
    }

    /// The fingerprints, if this tracker compares content.
    #[must_use]
    pub fn fingerprints(&self) -> Option<&Fingerprints> {
        match self {
            Self::None => None,
            Self::Scan(fingerprints) => Some(fingerprints),
            Self::Exact(_, comparison) => comparison.as_ref().map(|c| &c.fingerprints),
        }
    }

    /// An attempt begins, which owes every page. To be called before the first page is read.
    pub fn begin(&self, region: &Region) -> Result<(), TrackerError> {
        self.lease().map_or(Ok(()), |mut exact| exact.begin(region))
    }

    /// Adds to `owed` what was written since the last time, and gives how many pages that were. What
    /// is found by reading is not known before it is read. It is all there is once [`Self::check_sight`]
    /// has said so, too.
    pub fn harvest(&self, owed: &mut PageSet) -> Result<u64, TrackerError> {
        self.ask(owed, |exact, owed| exact.harvest(owed))
    }

    /// That the tracker saw everything up to the last harvest.
    pub fn check_sight(&self, region: &Region) -> Result<(), TrackerError> {
        self.lease()
            .map_or(Ok(()), |exact| exact.check_sight(region))
    }

    /// The writer stands still: adds to `owed` what the tracker is blind to and what can be seen now,
    /// such as punched holes.
    pub fn look_again(&self, region: &Region, owed: &mut PageSet) -> Result<(), TrackerError> {
        self.ask(owed, |exact, owed| exact.look_again(region, owed))
    }

    /// Has an exact tracker add to `owed`, and remembers what is to be compared of it.
    fn ask<T: Default>(
        &self,
        owed: &mut PageSet,
        ask: impl FnOnce(&mut Exact, &mut PageSet) -> Result<T, TrackerError>,
    ) -> Result<T, TrackerError> {
        let Some(mut exact) = self.lease() else {
            return Ok(T::default());
        };
        let Some(comparison) = self.comparison() else {
            return ask(&mut exact, owed);
        };
        let before = owed.clone();
        let answer = ask(&mut exact, owed)?;
        comparison.harvested(&before, owed);
        Ok(answer)
    }

    /// The attempt has failed: what was harvested for it is dirty again (rule 3).
    pub fn restore(&self) {
        if let Self::Exact(lease, _) = self
            && let Some(mut exact) = lease.lock()
        {
            lease.ended.store(true, Ordering::Relaxed);
            exact.restore();
        }
    }

    fn lease(&self) -> Option<MutexGuard<'_, Exact>> {
        match self {
            Self::None | Self::Scan(_) => None,
            Self::Exact(lease, _) => lease.lock(),
        }
    }

    /// Appends to `runs` what an Iteration has to look at: what is `owed`, and what may have been
    /// written since. In the `first` one everything is owed, holes included. Touches no page. What is to
    /// be compared is so in the Iteration that is planned now, or not at all.
    pub fn plan(
        &self,
        index: u32,
        region: &Region,
        owed: &PageSet,
        first: bool,
        runs: &mut Vec<Run>,
    ) -> Result<(), RegionError> {
        let mut extents = Extents::of(region);
        let mut push = |range, look| {
            runs.push(Run {
                region: index,
                range,
                look,
            })
        };
        let again = self.comparison().map(Comparison::take);
        match self {
            // What is owed later was written, or arrived torn: it is data, and a page that was
            // punched out meanwhile reads as zeros.
            Self::None | Self::Exact(..) if !first => match again {
                None => owed.runs().for_each(|range| push(range, Look::Owed)),
                Some(again) => {
                    for (part, known) in owed.runs().flat_map(|range| again.parts(range)) {
                        push(part, if known { Look::Compare } else { Look::Owed });
                    }
                }
            },
            Self::None | Self::Exact(..) => {
                for range in owed.runs() {
                    extents.each_part(range, |part, hole| {
                        push(part, if hole { Look::Hole } else { Look::Owed });
                    })?;
                }
            }
            Self::Scan(fingerprints) => {
                for (range, owed) in owed.parts(all_of(region)) {
                    extents.each_part(range, |part, hole| match (owed, hole) {
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

/// Every page of it.
fn all_of(region: &Region) -> PageRange {
    PageRange {
        first: 0,
        count: region.pages(),
    }
}

/// Tells data from holes along a Region, front to back.
///
/// The kernel finds the end of an extent by walking its pages. What was found is remembered, so that
/// any number of ranges inside one extent cost one walk.
#[derive(Debug)]
struct Extents<'a> {
    region: &'a Region,
    /// The data extent found last; empty at the end of the Region if there is none any more.
    data: PageRange,
}

impl<'a> Extents<'a> {
    fn of(region: &'a Region) -> Self {
        let data = PageRange { first: 0, count: 0 };
        Self { region, data }
    }

    /// Calls `each` for the allocated parts (`false`) and the holes (`true`) of `range`, in order.
    /// Ranges come in ascending order.
    fn each_part(
        &mut self,
        range: PageRange,
        mut each: impl FnMut(PageRange, bool),
    ) -> Result<(), RegionError> {
        let mut from = range.first;
        while from < range.end() {
            if from >= self.data.end() {
                let pages = self.region.pages();
                let rest = PageRange {
                    first: from,
                    count: pages - from,
                };
                let none = PageRange {
                    first: pages,
                    count: 0,
                };
                self.data = self.region.next_data(rest)?.unwrap_or(none);
            }
            let hole = from < self.data.first;
            let until = if hole {
                self.data.first
            } else {
                self.data.end()
            }
            .min(range.end());
            each(
                PageRange {
                    first: from,
                    count: until - from,
                },
                hole,
            );
            from = until;
        }
        Ok(())
    }
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
        tracker
            .plan(0, region, owed, owed.count() == owed.pages(), &mut runs)
            .unwrap();
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
    fn what_is_harvested_is_compared_once_and_what_was_owed_before_is_not() {
        let bitmap = File::from(memfd_create(c"bitmap", MFdFlags::MFD_ALLOW_SEALING).unwrap());
        bitmap.set_len(8).unwrap();
        use nix::fcntl::{FcntlArg, SealFlag, fcntl};
        fcntl(&bitmap, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
        let marks = BitmapTracker::new(bitmap.try_clone().unwrap().into(), 10).unwrap();
        let exact = Arc::new(Mutex::new(Exact::Bitmap(marks)));
        let region = sparse(10, &[3, 4]);
        let tracker = Tracker::comparing(exact, &region).unwrap();
        tracker.begin(&region).unwrap();
        let mut owed = PageSet::empty(10);
        owed.insert(PageRange { first: 4, count: 1 });
        let harvest = |owed: &mut PageSet| {
            bitmap.write_all_at(&[0b11_1000], 0).unwrap();
            tracker.harvest(owed).unwrap();
        };
        harvest(&mut owed);
        assert_eq!(tracker.comparable_pages(), 2);
        assert_eq!(
            planned(&tracker, &region, &owed),
            [
                (3, 1, Look::Compare),
                (4, 1, Look::Owed),
                (5, 1, Look::Compare)
            ]
        );
        harvest(&mut owed);
        assert_eq!(planned(&tracker, &region, &owed), [(3, 3, Look::Owed)]);
        let mut owed = PageSet::empty(10);
        harvest(&mut owed);
        let mut runs = Vec::new();
        tracker
            .plan(0, &region, &PageSet::full(10), true, &mut runs)
            .unwrap();
        assert!(runs.iter().all(|run| run.look != Look::Compare), "{runs:?}");
        assert_eq!(planned(&tracker, &region, &owed), [(3, 3, Look::Owed)]);
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

    #[test]
    fn a_hole_punched_past_the_registered_mapping_is_found_when_the_writer_stands_still() {
        let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(100 * PAGE_BYTES).unwrap();
        for page in 10..20 {
            file.write_all_at(&[1], page * PAGE_BYTES).unwrap();
        }
        let bytes = usize::try_from(100 * PAGE_BYTES).unwrap();
        let mapping =
            crate::region::Mapping::new(&file, bytes, crate::region::Access::Write).unwrap();
        let uffd = crate::sys::uffd::Uffd::new().unwrap();
        uffd.track(&mapping).unwrap();
        let address = mapping.address().unwrap().addr().get() as u64;
        let pagemap = crate::sys::pagemap::own().unwrap().into();
        let pagemap = PagemapTracker::new(pagemap, uffd.into(), address, 100 * PAGE_BYTES).unwrap();
        let exact = Exact::Pagemap(pagemap, PageSet::empty(100));
        let tracker = Tracker::exact(Arc::new(Mutex::new(exact)));
        let fd = file.try_clone().unwrap().into();
        let region = Region::from_descriptor(Name::new("r").unwrap(), fd).unwrap();

        tracker.begin(&region).unwrap();
        let mut owed = PageSet::empty(100);
        mapping.span_mut(0, 1).unwrap().fill_from(&[7]);
        assert_eq!(tracker.harvest(&mut owed).unwrap(), 1);
        tracker.look_again(&region, &mut owed).unwrap();
        assert_eq!(
            owed.runs()
                .map(|run| (run.first, run.count))
                .collect::<Vec<_>>(),
            [(0, 1)]
        );

        use nix::fcntl::{FallocateFlags, fallocate};
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, punch, 12 * 4096, 3 * 4096).unwrap();
        let mut owed = PageSet::empty(100);
        tracker.harvest(&mut owed).unwrap();
        tracker.look_again(&region, &mut owed).unwrap();
        assert_eq!(
            owed.runs()
                .map(|run| (run.first, run.count))
                .collect::<Vec<_>>(),
            [(12, 3)]
        );
    }

    #[test]
    fn a_late_harvest_of_an_ended_attempt_takes_nothing_from_the_next() {
        use nix::fcntl::{FcntlArg, SealFlag, fcntl};
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let bitmap = File::from(memfd_create(c"bitmap", flags).unwrap());
        bitmap.write_all_at(&[4, 0, 0, 0, 0, 0, 0, 0], 0).unwrap();
        fcntl(&bitmap, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
        let marks = BitmapTracker::new(bitmap.into(), 10).unwrap();
        let exact = Arc::new(Mutex::new(Exact::Bitmap(marks)));
        let region = sparse(10, &[]);

        let first = Tracker::exact(Arc::clone(&exact));
        first.begin(&region).unwrap();
        assert_eq!(first.harvest(&mut PageSet::empty(10)).unwrap(), 1);
        first.restore();
        let next = Tracker::exact(exact);
        next.begin(&region).unwrap();
        assert_eq!(first.harvest(&mut PageSet::empty(10)).unwrap(), 0);
        let mut owed = PageSet::empty(10);
        assert_eq!(next.harvest(&mut owed).unwrap(), 1);
        assert!(owed.contains(2));
    }
}
