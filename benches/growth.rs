//! How the bookkeeping grows with the Region, up to 16 TiB, without the memory it is about:
//! `cargo bench --bench growth`. Where a time per GiB rises with the size, something is not linear.
#![allow(clippy::print_stdout, reason = "the table is what it is for")]
#![allow(clippy::unwrap_used, reason = "a measurement ends by a panic")]
#![allow(clippy::cast_precision_loss, reason = "shown to people")]

use std::hint::black_box;
use std::time::Instant;

use memferry::assembly::Assembly;
use memferry::iteration::{Look, Piece, Plan, Run};
use memferry::limits::PACKET_BYTES_DEFAULT;
use memferry::name::Name;
use memferry::pages::{PageRange, PageSet, pages_in};
use memferry::stream::Owed;
use memferry::wire::DataHeader;

const GIB: u64 = 1 << 30;
const SIZES: [u64; 5] = [1, 64, 1024, 4096, 16384];
/// One page of 2 MiB, the granularity at which scattered writes usually end.
const SCATTER: usize = 512;

fn main() {
    // `cargo test --benches` runs this too, and only wants to see that it runs.
    let sizes = if std::env::args().any(|arg| arg == "--bench") {
        &SIZES[..]
    } else {
        &SIZES[..2]
    };
    println!("ns per GiB of the Region, but for the last column, in bytes of memory per GiB\n");
    print!("{:>8}", "GiB");
    for name in [
        "all owed", "count", "cut+pay", "scatter", "plan", "cut", "arrive", "verdict", "missing",
        "bytes",
    ] {
        print!("{name:>10}");
    }
    println!();
    for &gib in sizes {
        row(gib);
    }
}

/// Runs `step`, prints what it took per GiB, and gives what it gave.
fn timed<T>(gib: u64, step: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let done = step();
    print!("{:>10.0}", started.elapsed().as_nanos() as f64 / gib as f64);
    done
}

fn row(gib: u64) {
    let bytes = gib * GIB;
    let pages = pages_in(bytes);
    print!("{gib:>8}");

    // A first Iteration: everything is owed, cut into packets, and paid as these are acknowledged.
    let owed = timed(gib, || Owed::all_of([pages]));
    timed(gib, || assert_eq!(owed.count(), pages));
    let all = PageRange {
        first: 0,
        count: pages,
    };
    let everything = vec![owed_run(all)];
    timed(gib, || {
        each_piece(everything.clone(), |piece| {
            let mut set = owed.of(0);
            piece.runs.iter().for_each(|(range, _)| set.remove(*range));
        });
        assert!(owed.of(0).is_empty());
    });

    // A later one: a page of every 2 MiB was written.
    let scattered = timed(gib, || {
        let mut set = PageSet::empty(pages);
        for first in (0..pages).step_by(SCATTER) {
            set.insert(PageRange { first, count: 1 });
        }
        set
    });
    let runs: Vec<_> = timed(gib, || scattered.runs().map(owed_run).collect());
    let plan_bytes = runs.len() * size_of::<Run>();
    timed(gib, || {
        each_piece(runs, |piece| {
            black_box(&piece.runs);
        });
    });
    drop(scattered);
    drop(owed);

    // The receiver's account of the first Iteration.
    let name = Name::new("simulated").unwrap();
    let assembly = Assembly::new(0, 1, [(name, bytes)]);
    timed(gib, || {
        let mut sequence = 0;
        each_piece(everything, |piece| {
            sequence += 1;
            let incoming = assembly.data(0, &header(sequence)).unwrap();
            for (range, _) in &piece.runs {
                incoming.placing(*range);
                incoming.intact(*range);
            }
        });
    });
    timed(gib, || assert_eq!(assembly.intact_bytes(), bytes));
    timed(gib, || assert!(assembly.missing().is_empty()));

    // Two sets at the receiver, one and the plan at the sender.
    let resident = 3 * pages.div_ceil(8) + plan_bytes as u64;
    println!("{:>10}", resident / gib);
}

fn owed_run(range: PageRange) -> Run {
    Run {
        region: 0,
        range,
        look: Look::Owed,
    }
}

fn each_piece(runs: Vec<Run>, mut each: impl FnMut(&Piece)) {
    let plan = Plan::new(1, PACKET_BYTES_DEFAULT, 1, runs);
    let mut piece = Piece::default();
    while plan.next(&mut piece) {
        each(&piece);
    }
}

fn header(sequence: u64) -> DataHeader {
    DataHeader {
        epoch: 0,
        iteration: 1,
        sequence,
        region: 0,
        extents: 1,
        blocks: 0,
        payload: u32::try_from(PACKET_BYTES_DEFAULT).unwrap(),
        packed: None,
        table_crc: 0,
    }
}
