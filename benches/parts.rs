//! What the parts of the data path cost, one by one: `cargo bench --bench parts`.
//!
//! A transfer pays for each of them per page, per block or per packet; `memferry bench` measures the whole.
#![allow(clippy::unwrap_used, reason = "a measurement ends by a panic")]

use std::cell::RefCell;
use std::fs::File;
use std::sync::Arc;

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use memferry::channel::ledger::Ledger;
use memferry::dirty::{Fingerprints, PagemapTracker};
use memferry::iteration::{Look, Piece, Plan, Run};
use memferry::limits::{BLOCK_LEN, PACKET_BYTES_DEFAULT, PAGE_BYTES, PAGE_LEN};
use memferry::pages::{PageRange, PageSet, pages_in};
use memferry::region::{Access, Mapping};
use memferry::stream::is_zero;
use memferry::sys::uffd::Uffd;
use memferry::wire::{self, DataHeader, Header, Table};
use nix::sys::memfd::{MFdFlags, memfd_create};

const GIB: u64 = 1 << 30;
const PACKET_PAGES: u64 = PACKET_BYTES_DEFAULT / PAGE_BYTES;

fn main() {
    divan::main();
}

/// Bytes that are no pattern, without asking the kernel for each.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    });
    words.flat_map(u64::to_le_bytes).take(len).collect()
}

/// Memory that is tracked by the kernel and that is all there.
struct Tracked {
    mapping: Arc<Mapping>,
    tracker: PagemapTracker,
    owed: PageSet,
}

impl Tracked {
    fn new(bytes: u64) -> Self {
        let file = File::from(memfd_create(c"bench", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(bytes).unwrap();
        let mapping = Mapping::new(&file, usize::try_from(bytes).unwrap(), Access::Write).unwrap();
        memferry::sys::file::populate(&mapping.whole(), Access::Write).unwrap();
        let uffd = Uffd::new().unwrap();
        uffd.track(&mapping).unwrap();
        let pagemap = memferry::sys::pagemap::own().unwrap();
        let address = mapping.address().unwrap().addr().get() as u64;
        let mut tracker = PagemapTracker::new(pagemap.into(), uffd.into(), address, bytes).unwrap();
        tracker.arm().unwrap();
        Self {
            mapping,
            tracker,
            owed: PageSet::empty(pages_in(bytes)),
        }
    }

    /// How many pages were written since the last time.
    fn take(&mut self) -> u64 {
        self.tracker.take(&mut self.owed).unwrap()
    }

    /// Writes into every page that is this far from the one before.
    fn write_every(&self, pages: usize) {
        for offset in (0..self.mapping.len()).step_by(pages * PAGE_LEN) {
            self.mapping.span_mut(offset, 1).unwrap().fill_from(&[1]);
        }
    }
}

/// Asking the kernel what was written of 1 GiB: one page of so many, or none (0).
#[divan::bench(args = [0, 1, 16, 256], sample_count = 20, sample_size = 1)]
fn harvest_gib(bencher: Bencher<'_, '_>, one_of: usize) {
    let tracked = RefCell::new(Tracked::new(GIB));
    bencher
        .with_inputs(|| {
            if one_of > 0 {
                tracked.borrow().write_every(one_of);
            }
        })
        .bench_local_values(|()| tracked.borrow_mut().take());
}

/// That all of 1 GiB is still tracked.
#[divan::bench(sample_count = 20, sample_size = 1)]
fn coverage_gib(bencher: Bencher<'_, '_>) {
    let tracked = Tracked::new(GIB);
    bencher.bench_local(|| tracked.tracker.check_coverage().unwrap());
}

/// What the writer pays: writing one page of so many of 1 GiB, all of which are protected.
#[divan::bench(args = [1, 16, 256], sample_count = 20, sample_size = 1)]
fn write_protected_gib(bencher: Bencher<'_, '_>, one_of: usize) {
    let tracked = RefCell::new(Tracked::new(GIB));
    bencher
        .with_inputs(|| tracked.borrow_mut().take())
        .bench_local_values(|_| tracked.borrow().write_every(one_of));
}

/// All packets of 1 GiB cut from a plan: one run, or one page of so many.
#[divan::bench(args = [1, 2, 16, 256])]
fn cut_gib(bencher: Bencher<'_, '_>, one_of: u64) {
    let pages = pages_in(GIB);
    let run = |first, count| Run {
        region: 0,
        range: PageRange { first, count },
        look: Look::Owed,
    };
    let runs: Vec<_> = if one_of == 1 {
        vec![run(0, pages)]
    } else {
        (0..pages / one_of).map(|n| run(n * one_of, 1)).collect()
    };
    bencher
        .with_inputs(|| Plan::new(1, PACKET_BYTES_DEFAULT, 1, runs.clone()))
        .counter(BytesCount::new(GIB))
        .bench_local_values(|plan| {
            let mut piece = Piece::default();
            while plan.next(&mut piece) {
                black_box(&piece);
            }
            plan
        });
}

/// The runs of a set over 1 GiB in which one page of so many is.
#[divan::bench(args = [1, 2, 16, 256])]
fn runs_gib(bencher: Bencher<'_, '_>, one_of: u64) {
    let pages = pages_in(GIB);
    let mut set = PageSet::empty(pages);
    for first in (0..pages).step_by(usize::try_from(one_of).unwrap()) {
        set.insert(PageRange { first, count: 1 });
    }
    bencher
        .counter(BytesCount::new(GIB))
        .bench_local(|| black_box(&set).runs().count());
}

fn header(table: &Table, bytes: &[u8]) -> DataHeader {
    DataHeader {
        epoch: 1,
        iteration: 1,
        sequence: 1,
        region: 0,
        extents: u32::try_from(table.extents.len()).unwrap(),
        blocks: u32::try_from(table.checksums.len()).unwrap(),
        payload: u32::try_from(PACKET_BYTES_DEFAULT).unwrap(),
        packed: None,
        table_crc: wire::crc32c(bytes),
    }
}

/// A packet's table: one run of 1 MiB, with its checksums.
fn table() -> Table {
    let mut table = Table::default();
    let range = PageRange {
        first: 0,
        count: PACKET_PAGES,
    };
    for block in wire::blocks(range) {
        table.push_block(block, 7);
    }
    table
}

#[divan::bench]
fn encode_packet(bencher: Bencher<'_, '_>) {
    let table = table();
    let mut out = Vec::new();
    bencher.counter(ItemsCount::new(1_u32)).bench_local(|| {
        out.clear();
        table.encode(&mut out);
        let header = Header::Data(header(&table, &out));
        black_box((header.encode(), out.len()))
    });
}

#[divan::bench]
fn decode_packet(bencher: Bencher<'_, '_>) {
    let mut bytes = Vec::new();
    table().encode(&mut bytes);
    let encoded = Header::Data(header(&table(), &bytes)).encode();
    let mut decoded = Table::default();
    bencher.counter(ItemsCount::new(1_u32)).bench_local(|| {
        let Header::Data(header) = Header::decode(black_box(&encoded)).unwrap() else {
            unreachable!("it was encoded as data");
        };
        decoded.decode(&bytes, &header, GIB, true).unwrap();
    });
}

/// 256 sends lent and released, one by one in order, or every second one first.
#[divan::bench(args = ["in order", "odd ones first"])]
fn ledger(bencher: Bencher<'_, '_>, order: &str) {
    const SENDS: u32 = 256;
    let step: usize = if order == "in order" { 1 } else { 2 };
    let mut ledger = Ledger::new();
    bencher.counter(ItemsCount::new(SENDS)).bench_local(|| {
        let first = ledger.lend();
        (1..SENDS).for_each(|_| {
            ledger.lend();
        });
        for start in (0..u32::try_from(step).unwrap()).rev() {
            for id in (start..SENDS).step_by(step) {
                let id = first.wrapping_add(id);
                ledger.released(id, id, true).unwrap();
            }
        }
        assert_eq!(ledger.outstanding(), 0);
    });
}

/// A block that is in the cache, as it is when it was just copied out of the Region.
#[divan::bench(args = ["zero", "data"])]
fn zero_test(bencher: Bencher<'_, '_>, content: &str) {
    let bytes = if content == "zero" {
        vec![0; BLOCK_LEN]
    } else {
        noise(BLOCK_LEN)
    };
    bencher.counter(BytesCount::new(BLOCK_LEN)).bench_local(|| {
        let pages = black_box(&bytes).chunks(PAGE_LEN);
        pages.filter(|page| is_zero(page)).count()
    });
}

#[divan::bench]
fn checksum(bencher: Bencher<'_, '_>) {
    let bytes = noise(BLOCK_LEN);
    bencher
        .counter(BytesCount::new(BLOCK_LEN))
        .bench_local(|| wire::crc32c(black_box(&bytes)));
}

#[divan::bench]
fn fingerprints(bencher: Bencher<'_, '_>) {
    let bytes = noise(BLOCK_LEN);
    let table = Fingerprints::new((BLOCK_LEN / PAGE_LEN) as u64).unwrap();
    bencher.counter(BytesCount::new(BLOCK_LEN)).bench_local(|| {
        for (page, bytes) in (0..).zip(black_box(&bytes).chunks(PAGE_LEN)) {
            black_box(table.update(page, bytes));
        }
    });
}
