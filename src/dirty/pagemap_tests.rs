//! Against the real kernel. A machine without what they need says so and skips.

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::*;
use crate::limits::PAGE_LEN;
use crate::region::{Access, Mapping};
use crate::sys::msg::{IovBuf, readv};
use crate::sys::uffd::Uffd;

/// A writer in this process: a memfd, mapped and tracked.
pub(super) struct Writer {
    pub(super) file: fs::File,
    pub(super) mapping: Arc<Mapping>,
    pub(super) uffd: Uffd,
}

impl Writer {
    pub(super) fn new(pages: u64) -> Self {
        Self::of(
            memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap(),
            pages * PAGE_BYTES,
        )
    }

    fn of(memfd: OwnedFd, bytes: u64) -> Self {
        let file = fs::File::from(memfd);
        file.set_len(bytes).unwrap();
        let len = usize::try_from(bytes).unwrap();
        let mapping = Mapping::new(&file, len, Access::Write).unwrap();
        let uffd = Uffd::new().unwrap();
        uffd.track(&mapping).unwrap();
        Self {
            file,
            mapping,
            uffd,
        }
    }

    pub(super) fn address(&self) -> u64 {
        self.mapping.address().unwrap().addr().get() as u64
    }

    pub(super) fn write(&self, page: u64) {
        let offset = usize::try_from(page).unwrap() * PAGE_LEN + 17;
        self.mapping.span_mut(offset, 1).unwrap().fill_from(&[1]);
    }

    fn write_all(&self) {
        (0..self.pages()).for_each(|page| self.write(page));
    }

    fn pages(&self) -> u64 {
        self.mapping.len() as u64 / PAGE_BYTES
    }

    fn tracker(&self) -> PagemapTracker {
        let uffd = self.uffd.as_fd().try_clone_to_owned().unwrap();
        let bytes = self.mapping.len() as u64;
        PagemapTracker::new(own(), uffd, self.address(), bytes).unwrap()
    }

    fn armed(&self) -> PagemapTracker {
        let mut tracker = self.tracker();
        tracker.arm().unwrap();
        tracker
    }
}

pub(super) fn own() -> OwnedFd {
    pagemap::own().unwrap().into()
}

/// What a harvest finds, and that it says how much.
pub(super) fn harvest(tracker: &mut PagemapTracker) -> Vec<u64> {
    let mut owed = PageSet::empty(pages_of(tracker));
    let pages = tracker.harvest(&mut owed).unwrap();
    assert_eq!(pages, owed.count());
    owed.runs().flat_map(|run| run.first..run.end()).collect()
}

fn pages_of(tracker: &PagemapTracker) -> u64 {
    tracker.looker.range().len / PAGE_BYTES
}

pub(super) fn code<T: std::fmt::Debug>(result: Result<T, TrackerError>) -> &'static str {
    result.unwrap_err().code()
}

fn refused_descriptor(result: Result<PagemapTracker, TrackerError>) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.code(), "tracker-descriptor");
    error.to_string()
}

#[test]
fn a_large_region_is_looked_at_by_several_threads_and_nothing_is_missed() {
    let pages = (2 << 30) / PAGE_BYTES;
    let writer = Writer::new(pages);
    let mut tracker = writer.armed();
    let written: Vec<u64> = (0..pages).step_by(4099).collect();
    written.iter().for_each(|page| writer.write(*page));
    assert_eq!(harvest(&mut tracker), written);
    assert_eq!(harvest(&mut tracker), [0; 0]);
}

#[test]
fn every_write_is_seen_exactly_once() {
    let seed = getrandom::u64().unwrap();
    eprintln!("seed {seed:#x}");
    let mut state = seed | 1;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let writer = Writer::new(3000);
    // Half of it exists already, the rest is holes until it is written.
    (0..1500).for_each(|page| writer.write(page));
    let mut tracker = writer.armed();
    for _ in 0..200 {
        let mut model = BTreeSet::new();
        for _ in 0..random(100) {
            let (first, longest) = (random(3000), 1 << random(8));
            let count = 1 + random(longest);
            for page in first..(first + count).min(3000) {
                writer.write(page);
                model.insert(page);
            }
        }
        let found = harvest(&mut tracker);
        assert_eq!(found, Vec::from_iter(model), "seed {seed:#x}");
    }
}

#[test]
fn nothing_written_is_nothing_found_and_arming_forgets_what_came_before() {
    let writer = Writer::new(600);
    writer.write_all();
    let mut tracker = writer.armed();
    assert!(harvest(&mut tracker).is_empty());
    writer.write(7);
    tracker.arm().unwrap();
    assert!(harvest(&mut tracker).is_empty());
}

#[test]
fn a_page_is_found_again_only_when_it_is_written_again() {
    let writer = Writer::new(600);
    let mut tracker = writer.armed();
    for _ in 0..3 {
        writer.write(599);
        assert_eq!(harvest(&mut tracker), [599]);
        assert!(harvest(&mut tracker).is_empty());
    }
}

#[test]
fn more_runs_than_one_call_brings_are_all_found() {
    let runs = 3 * crate::dirty::look::RUNS_PER_CALL as u64;
    let writer = Writer::new(2 * runs);
    let mut tracker = writer.armed();
    (0..runs).for_each(|run| writer.write(2 * run));
    let found = harvest(&mut tracker);
    assert_eq!(found, Vec::from_iter((0..runs).map(|run| 2 * run)));
}

#[test]
fn what_the_kernel_writes_for_the_writer_is_seen() {
    let writer = Writer::new(8);
    let mut tracker = writer.armed();
    let (from, mut to) = UnixStream::pair().unwrap();
    to.write_all(&[9; 100]).unwrap();
    let spans = [writer.mapping.span_mut(3 * PAGE_LEN, 100).unwrap()];
    let mut iov = IovBuf::default();
    assert_eq!(readv(from.as_fd(), &iov.scatter(&spans)).unwrap(), 100);
    assert_eq!(harvest(&mut tracker), [3]);
}

#[test]
fn a_hole_that_is_written_after_it_was_punched_is_seen() {
    let writer = Writer::new(64);
    writer.write_all();
    let mut tracker = writer.armed();
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&writer.file, punch, 10 * 4096, 20 * 4096).unwrap();
    // The hole itself is a blind spot; what is written into it is not.
    let _ = harvest(&mut tracker);
    writer.write(12);
    assert_eq!(harvest(&mut tracker), [12]);
}

#[test]
fn a_partial_last_page_belongs_to_the_region() {
    let memfd = memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap();
    let writer = Writer::of(memfd, 5 * PAGE_BYTES + 100);
    let mut tracker = writer.armed();
    writer.write(5);
    assert_eq!(harvest(&mut tracker), [5]);
}

#[test]
fn a_region_in_the_middle_of_a_mapping_is_seen_from_its_own_start() {
    let writer = Writer::new(2000);
    let uffd = writer.uffd.as_fd().try_clone_to_owned().unwrap();
    let (address, bytes) = (writer.address() + 700 * PAGE_BYTES, 300 * PAGE_BYTES);
    let mut tracker = PagemapTracker::new(own(), uffd, address, bytes).unwrap();
    tracker.arm().unwrap();
    for page in [0, 699, 700, 850, 999, 1000] {
        writer.write(page);
    }
    assert_eq!(harvest(&mut tracker), [0, 150, 299]);
}

#[test]
fn a_huge_page_is_dirty_as_a_whole() {
    const HUGE_PAGES: u64 = 512;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let memfd = memfd_create(c"test", flags).map(fs::File::from);
    let bytes = 4 * HUGE_PAGES * PAGE_BYTES;
    let mapped = memfd.map_err(io::Error::from).and_then(|file| {
        file.set_len(bytes)?;
        let len = usize::try_from(bytes).unwrap();
        Mapping::new(&file, len, Access::Write).map(|_| file)
    });
    let file = match mapped {
        Ok(file) => file,
        Err(error) => {
            eprintln!("skipped: no huge pages of 2 MiB here (vm.nr_hugepages): {error}");
            return;
        }
    };
    let writer = Writer::of(file.into(), bytes);
    writer.write_all();
    let mut tracker = writer.armed();
    assert!(harvest(&mut tracker).is_empty());
    writer.write(HUGE_PAGES + 3);
    let whole = Vec::from_iter(HUGE_PAGES..2 * HUGE_PAGES);
    assert_eq!(harvest(&mut tracker), whole);
    let memory = tracker.check_memory(writer.file.as_fd());
    assert_eq!(memory.unwrap(), Memory::Confirmed);
    assert!(harvest(&mut tracker).is_empty());

    // A region that ends inside a huge page cannot be tracked, and asking must end.
    let uffd = writer.uffd.as_fd().try_clone_to_owned().unwrap();
    let inside = PagemapTracker::new(own(), uffd, writer.address(), bytes - PAGE_BYTES);
    writer.write_all();
    assert_eq!(code(inside.unwrap().arm()), "tracker-failed");
}

#[test]
fn descriptors_of_something_else_are_refused() {
    let writer = Writer::new(1);
    let uffd = || writer.uffd.as_fd().try_clone_to_owned().unwrap();
    let new = |pagemap, uffd| PagemapTracker::new(pagemap, uffd, writer.address(), 4096);
    let file = |path: &str| OwnedFd::from(fs::File::open(path).unwrap());
    let text = refused_descriptor(new(file("/dev/null"), uffd()));
    assert!(
        text.contains("page map") && text.contains("/dev/null"),
        "{text}"
    );
    let text = refused_descriptor(new(file("/proc/self/maps"), uffd()));
    assert!(text.contains("/maps"), "{text}");
    let text = refused_descriptor(new(own(), file("/dev/null")));
    assert!(
        text.contains("userfaultfd") && text.contains("/dev/null"),
        "{text}"
    );
    let eventfd = nix::sys::eventfd::EventFd::new().unwrap();
    let text = refused_descriptor(new(own(), eventfd.into()));
    assert!(text.contains("eventfd"), "{text}");
}

#[test]
fn addresses_that_make_no_sense_are_refused() {
    let writer = Writer::new(1);
    let new = |address, bytes| {
        let uffd = writer.uffd.as_fd().try_clone_to_owned().unwrap();
        code(PagemapTracker::new(own(), uffd, address, bytes))
    };
    assert_eq!(new(writer.address() + 1, 4096), "tracker-address");
    assert_eq!(new(u64::MAX - 4095, 8192), "tracker-address");
    assert_eq!(new(4096, u64::MAX), "tracker-address");
    // An address of the kernel.
    assert_eq!(new(u64::MAX - 8191, 4096), "tracker-failed");
    // Nothing is ever mapped there.
    assert_eq!(new(0, 4096), "tracker-blind");
}

#[test]
fn an_address_of_other_memory_is_refused() {
    let writer = Writer::new(16);
    let tracker = writer.tracker();
    let check = |tracker: &PagemapTracker, file: &fs::File| tracker.check_memory(file.as_fd());
    assert_eq!(check(&tracker, &writer.file).unwrap(), Memory::Confirmed);
    let other = Writer::new(16);
    assert_eq!(code(check(&tracker, &other.file)), "tracker-memory");

    // The second half of the memory is not the memory.
    let uffd = writer.uffd.as_fd().try_clone_to_owned().unwrap();
    let address = writer.address() + 8 * PAGE_BYTES;
    let half = PagemapTracker::new(own(), uffd, address, 8 * PAGE_BYTES).unwrap();
    let error = check(&half, &writer.file).unwrap_err();
    assert!(error.to_string().contains("memfd:test"), "{error}");

    // A file whose numbers cannot be compared.
    let proc = fs::File::open("/proc/self/maps").unwrap();
    assert_eq!(check(&tracker, &proc).unwrap(), Memory::NotVisible);
}

#[test]
fn memory_that_was_never_registered_is_refused() {
    let file = fs::File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(8192).unwrap();
    let mapping = Mapping::new(&file, 8192, Access::Write).unwrap();
    let address = mapping.address().unwrap().addr().get() as u64;
    let tracker = PagemapTracker::new(own(), Uffd::new().unwrap().into(), address, 8192);
    assert_eq!(code(tracker), "tracker-blind");
}

#[test]
fn a_userfaultfd_that_is_not_the_one_is_noticed_when_the_right_one_is_closed() {
    let Writer {
        mapping,
        uffd,
        file: _file,
    } = Writer::new(64);
    let address = mapping.address().unwrap().addr().get() as u64;
    let wrong = Uffd::new().unwrap().into();
    let mut tracker = PagemapTracker::new(own(), wrong, address, 64 * PAGE_BYTES).unwrap();
    tracker.arm().unwrap();
    drop(uffd);
    let mut owed = PageSet::empty(64);
    assert_eq!(code(tracker.harvest(&mut owed)), "tracker-blind");
    assert_eq!(code(tracker.check_coverage()), "tracker-blind");
}

#[test]
fn the_writer_may_close_its_own_descriptors() {
    let writer = Writer::new(64);
    let uffd = writer.uffd.as_fd().try_clone_to_owned().unwrap();
    let address = writer.address();
    let Writer {
        mapping,
        uffd: own_uffd,
        ..
    } = writer;
    let mut tracker = PagemapTracker::new(own(), uffd, address, 64 * PAGE_BYTES).unwrap();
    drop(own_uffd);
    tracker.arm().unwrap();
    mapping.span_mut(PAGE_LEN, 1).unwrap().fill_from(&[1]);
    assert_eq!(harvest(&mut tracker), [1]);
}
