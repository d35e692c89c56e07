//! Looks at a writer's page table, which threads share where it is large.
//!
//! The range is cut in pieces, and whoever is free takes the next. The thread that wants to know takes pieces
//! too, and at the end waits only for those that others are in the middle of: the writer may be standing
//! still for this, and a helper that has to wait for a busy CPU must not make it stand longer.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crate::pages::{PageRange, PageSet};
use crate::sys::pagemap::{self, AddressRange, PageRegion};
use crate::sys::sched::{Slice, set_slice};

/// Runs fetched in one call: 24 KiB. More gains nothing, the walk itself dominates.
pub(super) const RUNS_PER_CALL: usize = 1024;

/// Length of a piece in bytes: some 20 us for one thread.
const PIECE_BYTES: u64 = 32 << 20;

/// How often it is looked whether the last pieces are done, before a thread sleeps until they are: it takes
/// them some 20 us, and a thread twice as long to wake up.
const LOOKS_AWAKE: u32 = 10_000;

/// Memory for every thread that looks, in bytes: in pages of 4 KiB a look at it takes a thread 150 to 400 us,
/// and a helper 50 us to wake up.
const BYTES_PER_THREAD: u64 = 512 << 20;

/// Most threads that look at once: the writer's memory lock is taken by each of them.
const THREADS_MAX: u64 = 8;

/// Looks at one range again and again. Its helpers are there from the beginning, because to start a thread
/// takes as long as its part of a look.
#[derive(Debug)]
pub(super) struct Looker {
    pagemap: Arc<OwnedFd>,
    range: AddressRange,
    call: Arc<Call>,
    helpers: Vec<JoinHandle<()>>,
    buffer: Vec<PageRegion>,
}

impl Looker {
    /// For a range of the address space of `pagemap`. Starts helpers if that is large.
    pub(super) fn new(pagemap: OwnedFd, range: AddressRange) -> Self {
        let call = Arc::new(Call::default());
        let helper = |_| {
            let call = Arc::clone(&call);
            let help = move || {
                // It must not push the thread aside that it is to help.
                let _ = set_slice(Slice::Usual);
                call.help();
            };
            // Without it the others do its part.
            thread::Builder::new()
                .name("mf-look".into())
                .spawn(help)
                .ok()
        };
        let helpers = (1..threads_for(range.len)).filter_map(helper).collect();
        Self {
            pagemap: Arc::new(pagemap),
            range,
            call,
            helpers,
            buffer: vec![PageRegion::default(); RUNS_PER_CALL],
        }
    }

    /// The address space that it looks at.
    pub(super) fn pagemap(&self) -> BorrowedFd<'_> {
        self.pagemap.as_fd()
    }

    /// The range.
    pub(super) fn range(&self) -> AddressRange {
        self.range
    }

    /// Adds to `found` what was written since it was last protected, and protects it again; gives how many
    /// pages that were. Pages of `found` count from the start of the range; `page_bytes` is the size of the
    /// writer's. After an error what was written is not known.
    pub(super) fn written_and_protect(
        &mut self,
        page_bytes: u64,
        found: &mut PageSet,
    ) -> io::Result<u64> {
        let look = Arc::new(Look {
            pagemap: Arc::clone(&self.pagemap),
            range: self.range,
            piece: PIECE_BYTES.next_multiple_of(page_bytes),
            state: Mutex::new(State {
                next: self.range.start,
                under_way: 0,
                found: std::mem::replace(found, PageSet::empty(0)),
                pages: 0,
                failed: None,
            }),
            nobody_at_work: Condvar::new(),
        });
        self.call.out(Called::To(Arc::clone(&look)));
        look.take_part(&mut self.buffer);
        for _ in 0..LOOKS_AWAKE {
            if look.lock().under_way == 0 {
                break;
            }
            std::hint::spin_loop();
        }
        let mut state = look.lock();
        while state.under_way > 0 {
            let waited = look.nobody_at_work.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
        // Nobody may take a piece any more, also of a look that failed.
        state.next = self.range.end();
        *found = std::mem::replace(&mut state.found, PageSet::empty(0));
        match state.failed.take() {
            Some(error) => Err(error),
            None => Ok(state.pages),
        }
    }
}

impl Drop for Looker {
    fn drop(&mut self) {
        self.call.out(Called::Off);
        for helper in self.helpers.drain(..) {
            let _ = helper.join();
        }
    }
}

/// What helpers wait for.
#[derive(Debug, Default)]
struct Call {
    called: Mutex<Called>,
    changed: Condvar,
}

#[derive(Debug, Default)]
enum Called {
    /// Nothing is to be done.
    #[default]
    Not,
    To(Arc<Look>),
    /// Nothing will be done any more.
    Off,
}

impl Call {
    fn out(&self, called: Called) {
        *self.called.lock().unwrap_or_else(PoisonError::into_inner) = called;
        self.changed.notify_all();
    }

    /// A helper's life.
    fn help(&self) {
        let mut buffer = vec![PageRegion::default(); RUNS_PER_CALL];
        let mut called = self.called.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match &*called {
                Called::Off => return,
                Called::To(look) if look.has_pieces() => {
                    let look = Arc::clone(look);
                    drop(called);
                    look.take_part(&mut buffer);
                    called = self.called.lock().unwrap_or_else(PoisonError::into_inner);
                }
                Called::To(_) | Called::Not => {
                    let waited = self.changed.wait(called);
                    called = waited.unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }
}

/// A look under way.
#[derive(Debug)]
struct Look {
    pagemap: Arc<OwnedFd>,
    range: AddressRange,
    /// Bytes of a piece: none ends within a page of the writer.
    piece: u64,
    state: Mutex<State>,
    nobody_at_work: Condvar,
}

#[derive(Debug)]
struct State {
    /// The address at which the next piece begins.
    next: u64,
    /// Pieces that somebody has taken and not looked through yet.
    under_way: u32,
    found: PageSet,
    pages: u64,
    failed: Option<io::Error>,
}

impl Look {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks through pieces until there is none left.
    fn take_part(&self, buffer: &mut [PageRegion]) {
        while let Some(piece) = self.next_piece() {
            let mut turn = Turn {
                look: self,
                end: Err(io::Error::other("a thread that looked panicked")),
            };
            turn.end = pagemap::written_and_protect(self.pagemap.as_fd(), piece, buffer, |runs| {
                self.add(runs);
            });
        }
    }

    fn has_pieces(&self) -> bool {
        let state = self.lock();
        state.next < self.range.end() && state.failed.is_none()
    }

    fn next_piece(&self) -> Option<AddressRange> {
        let mut state = self.lock();
        let (start, end) = (state.next, self.range.end());
        if start >= end || state.failed.is_some() {
            return None;
        }
        // Pieces end at round addresses, as pages do.
        let end = (start + 1).next_multiple_of(self.piece).min(end);
        state.next = end;
        state.under_way += 1;
        Some(AddressRange {
            start,
            len: end - start,
        })
    }

    fn add(&self, runs: &[PageRegion]) {
        let mut state = self.lock();
        for run in runs.iter().filter(|run| run.start < run.end) {
            let run = PageRange::covering(run.start - self.range.start, run.end - run.start);
            state.found.insert(run);
            state.pages += run.count;
        }
    }
}

/// A piece in somebody's hands, given back even if that one panics.
struct Turn<'a> {
    look: &'a Look,
    end: io::Result<()>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.look.lock();
        if let Err(error) = std::mem::replace(&mut self.end, Ok(())) {
            state.failed.get_or_insert(error);
        }
        state.under_way -= 1;
        if state.under_way == 0 {
            self.look.nobody_at_work.notify_all();
        }
    }
}

/// How many threads look at `bytes` bytes.
fn threads_for(bytes: u64) -> u64 {
    let cpus = thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64);
    (bytes / BYTES_PER_THREAD).clamp(1, cpus.min(THREADS_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::PAGE_BYTES;

    /// Pieces as they are taken by one that does not look.
    fn pieces(range: AddressRange, page_bytes: u64) -> Vec<AddressRange> {
        let look = Look {
            pagemap: Arc::new(crate::sys::pagemap::own().unwrap().into()),
            range,
            piece: PIECE_BYTES.next_multiple_of(page_bytes),
            state: Mutex::new(State {
                next: range.start,
                under_way: 0,
                found: PageSet::empty(0),
                pages: 0,
                failed: None,
            }),
            nobody_at_work: Condvar::new(),
        };
        std::iter::from_fn(|| look.next_piece()).collect()
    }

    #[test]
    fn pieces_are_all_of_it_and_end_where_a_page_does() {
        const MIB: u64 = 1 << 20;
        for (start, len, page) in [
            (4 * PAGE_BYTES, 0, PAGE_BYTES),
            (7 * PAGE_BYTES, PAGE_BYTES, PAGE_BYTES),
            (6 * MIB, 300 * MIB, 2 * MIB),
            (1024 * MIB, 4096 * MIB, 1024 * MIB),
            (PAGE_BYTES, 129 * MIB, PAGE_BYTES),
        ] {
            let range = AddressRange { start, len };
            let all = pieces(range, page);
            let mut reached = start;
            for piece in &all {
                assert!(piece.start == reached && piece.len > 0);
                reached = piece.end();
                assert!(reached == range.end() || reached.is_multiple_of(page));
            }
            assert_eq!(reached, range.end());
        }
    }

    #[test]
    fn an_error_of_one_ends_the_look_of_all() {
        // A descriptor that knows nothing of pages.
        let other = std::fs::File::open("/dev/null").unwrap();
        let range = AddressRange {
            start: 1 << 40,
            len: 8 << 30,
        };
        let mut found = PageSet::empty(9);
        let mut looker = Looker::new(other.into(), range);
        let looked = looker.written_and_protect(PAGE_BYTES, &mut found);
        assert_eq!(looked.unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        let Called::To(look) = &*looker.call.called.lock().unwrap() else {
            panic!("8 GiB are looked at together");
        };
        assert!(!look.has_pieces(), "who comes late finds nothing to do");
        assert_eq!(found.pages(), 9, "it is given back");
    }
}
