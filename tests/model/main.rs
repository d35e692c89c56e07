//! A seeded model of an attempt: the real streams, trackers, plans and assembly over channels that write
//! short, release late and die, with a writer that changes pages at every moment between two steps. An attempt
//! whose connections died is resumed over others, or begun again.
//! Whatever happens, what the receiver holds after the last frozen pass is what the source holds.
//!
//! A run follows from its seed alone: the streams are threads, but only one of them runs at a time,
//! and which one goes on is drawn from the seed ([`turns`]). A failure prints the seed; with
//! `MEMFERRY_SEED=… MEMFERRY_MODEL_RUNS=1` the same run comes again. `MEMFERRY_MODEL_RUNS` alone makes
//! the search longer.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "also the helpers of a test end it by a panic, and tell what led there"
)]

mod channel;
#[path = "../common/random.rs"]
#[allow(dead_code, reason = "other tests use the rest of it")]
mod random;
mod turns;

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use memferry::assembly::Assembly;
use memferry::channel::{Channel, Engine, Features, Opened, Patience};
use memferry::dirty::{BitmapTracker, Exact, Tracker};
use memferry::iteration::{Plan, Run};
use memferry::limits::{PACKET_BYTES_MIN, PAGE_BYTES};
use memferry::name::Name;
use memferry::pages::{PageRange, pages_in};
use memferry::region::{Access, Region};
use memferry::stats::StreamStats;
use memferry::stream::{
    Destination, IncomingSetup, IncomingStream, Job, OutgoingStream, Owed, Pace, Pass, Report,
    StreamError, StreamSetup, Tell,
};
use memferry::sys::wake::Wake;
use memferry::wire::{Algorithm, StreamTotals};
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use channel::{Faults, Loans, SenderEnd};
use random::{Random, number};
use turns::{Turns, World};

const RUNS_DEFAULT: u64 = 200;

/// Attempts after which even the unluckiest run has got through.
const ATTEMPTS_MAX: u32 = 100;

fn memfd(bytes: u64) -> File {
    let file = File::from(
        memfd_create("model", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap(),
    );
    file.set_len(bytes).unwrap();
    file
}

fn name(index: usize) -> Name {
    format!("r{index}").parse().unwrap()
}

fn punch(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let signed = |n: u64| i64::try_from(n).unwrap();
    Ok(fallocate(file, flags, signed(offset), signed(bytes))?)
}

/// A Region at the source: its bytes, and the bitmap in which its writer marks pages.
struct Memory {
    file: File,
    marks: File,
    marked: Arc<Mutex<Exact>>,
}

impl Memory {
    fn new(bytes: u64) -> Self {
        let pages = pages_in(bytes);
        let marks = memfd(pages.div_ceil(64) * 8);
        let seal = FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK);
        fcntl(&marks, seal).unwrap();
        let tracker = BitmapTracker::new(marks.try_clone().unwrap().into(), pages).unwrap();
        Self {
            file: memfd(bytes),
            marks,
            marked: Arc::new(Mutex::new(Exact::Bitmap(tracker))),
        }
    }
}

/// Where a Region arrives.
#[derive(Debug)]
struct Arriving(Region);

impl Destination for Arriving {
    fn region(&self) -> &Region {
        &self.0
    }

    fn clear(&self, range: PageRange) -> io::Result<()> {
        punch(self.0.file(), range.offset(), range.bytes(self.0.bytes()))
    }
}

/// Who writes, and how that is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tracking {
    /// Nobody does.
    None,
    /// By reading. Needs checksums.
    Scan,
    /// The writer marks what it has written.
    Bitmap,
}

/// What is drawn once for a run.
#[derive(Debug)]
struct Shape {
    streams: u16,
    tracking: Tracking,
    integrity: bool,
    /// Whether pages that were marked are compared. Needs checksums.
    comparing: bool,
    compression: &'static [Algorithm],
    lends: bool,
    packet_bytes: u64,
    window: u64,
    faults: Faults,
}

impl Shape {
    fn draw(random: &mut Random) -> Self {
        let tracking = match random.below(8) {
            0 => Tracking::None,
            1..4 => Tracking::Scan,
            _ => Tracking::Bitmap,
        };
        let comparing = random.one_in(2);
        Self {
            streams: 1 + u16::try_from(random.below(4)).unwrap(),
            tracking,
            integrity: tracking == Tracking::Scan || comparing || random.one_in(2),
            comparing,
            compression: match random.below(3) {
                0 => &[],
                1 => &[Algorithm::Lz4],
                _ => &[Algorithm::Zstd],
            },
            lends: random.below(3) > 0,
            packet_bytes: PACKET_BYTES_MIN << random.below(3),
            window: PACKET_BYTES_MIN << random.below(4),
            faults: Faults::draw(random),
        }
    }
}

/// One attempt of a run, as `sender` conducts it.
struct Attempt<'a> {
    shape: &'a Shape,
    turns: Arc<Turns>,
    sources: Arc<[(Arc<Region>, Tracker)]>,
    destinations: Arc<[Arriving]>,
    assembly: Arc<Assembly>,
    streams: Vec<OutgoingStream>,
    owed: Arc<Owed>,
    iteration: u32,
    /// Iterations that were not interrupted.
    passes: u32,
    totals: Vec<StreamTotals>,
    torn_pages: u64,
    unchanged_pages: u64,
}

impl<'a> Attempt<'a> {
    fn new(shape: &'a Shape, turns: &Arc<Turns>, memory: &[Memory], epoch: u32) -> Self {
        let source = |(index, memory): (usize, &Memory)| {
            let fd = memory.file.try_clone().unwrap().into();
            let region = Region::from_descriptor(name(index), fd).unwrap();
            let tracker = match shape.tracking {
                Tracking::None => Tracker::None,
                Tracking::Scan => Tracker::scan(&region).unwrap(),
                Tracking::Bitmap if shape.comparing => {
                    Tracker::comparing(Arc::clone(&memory.marked), &region).unwrap()
                }
                Tracking::Bitmap => Tracker::exact(Arc::clone(&memory.marked)),
            };
            (Arc::new(region), tracker)
        };
        let sources: Arc<[_]> = memory.iter().enumerate().map(source).collect();
        let arriving = |(region, _): &(Arc<Region>, Tracker)| {
            let file = memfd(region.bytes());
            let region = Region::new(region.name().clone(), String::new(), file, Access::Write);
            Arriving(region.unwrap())
        };
        let destinations: Arc<[_]> = sources.iter().map(arriving).collect();
        let offered = sources.iter().map(|(r, _)| (r.name().clone(), r.bytes()));
        let assembly = Arc::new(Assembly::new(epoch, shape.streams, offered));
        let mut attempt = Self {
            shape,
            turns: Arc::clone(turns),
            owed: Arc::new(Owed::all_of(
                sources.iter().map(|(region, _)| region.pages()),
            )),
            sources,
            destinations,
            assembly,
            streams: Vec::new(),
            iteration: 0,
            totals: vec![StreamTotals::default(); shape.streams.into()],
            passes: 0,
            torn_pages: 0,
            unchanged_pages: 0,
        };
        attempt.open_streams(epoch);
        for (region, tracker) in &*attempt.sources {
            tracker.begin(region).unwrap();
        }
        attempt
    }

    /// The connections are lost: what the receiver has stays, and the rest is still owed.
    fn resume(&mut self, epoch: u32) {
        let streams = std::mem::take(&mut self.streams);
        let left: Vec<_> = (0..)
            .zip(streams)
            .map(|(index, stream)| (index, stream.abandon().unwrap()))
            .collect();
        let (mut applied, mut missing) = (self.assembly.frames_applied(), self.assembly.missing());
        if self.turns.draw(|random| random.one_in(4)) {
            // The answer to an earlier try was lost, and with it what it said.
            applied.clear();
        }
        if self.turns.draw(|random| random.one_in(4)) {
            // Runs may be joined.
            for run in &mut missing {
                let pages = self.sources[run.region as usize].0.pages();
                run.pages = (run.pages + 3).min(pages - run.first);
            }
        }
        self.owed.settle(&left, &applied, &missing);
        self.assembly = Arc::new(self.assembly.succeed(epoch, self.iteration + 1).unwrap());
        self.totals.fill(StreamTotals::default());
        self.open_streams(epoch);
    }

    fn open_streams(&mut self, epoch: u32) {
        let wake = Wake::new().unwrap();
        let patience = Patience {
            stall_timeout: Duration::from_secs(60),
            wake: wake.clone(),
        };
        let setup = StreamSetup {
            regions: Arc::clone(&self.sources),
            owed: Arc::clone(&self.owed),
            integrity: self.shape.integrity,
            compression: self.shape.compression,
            window: self.shape.window,
            pace: Arc::new(Pace::new(0, Instant::now())),
            first_sends: Arc::default(),
            stall_timeout: patience.stall_timeout,
            wake,
            epoch,
        };
        let incoming = IncomingSetup {
            assembly: Arc::clone(&self.assembly),
            destinations: Arc::clone(&self.destinations),
            integrity: self.shape.integrity,
            compression: !self.shape.compression.is_empty(),
            received: Arc::default(),
        };
        let loans = Arc::new(Loans::default());
        for index in 0..self.shape.streams {
            let faults = self.shape.faults;
            let (end, other) = channel::pair(index.into(), &self.turns, faults, &loans);
            let receiver = IncomingStream::new(index, Box::new(other), &patience, &incoming);
            let sender = SenderEnd::new(end, receiver);
            let lends = self.shape.lends && sender.features().contains(Features::WRITE_ZERO_COPY);
            let opened = Opened {
                channel: Box::new(sender),
                engine: lends.then_some(Engine::MsgZerocopy),
                note: String::new(),
                within_host: index.is_multiple_of(2),
            };
            self.streams.push(OutgoingStream::new(
                index,
                opened,
                setup.clone(),
                Arc::new(StreamStats::default()),
                Tell(Box::new(|_| {})),
            ));
        }
    }

    /// All of it: some passes while the writer writes, one while it is frozen, and the verdict.
    fn run(&mut self) -> Result<(), StreamError> {
        if self.shape.tracking != Tracking::None {
            self.turns.set_writing(true);
            for _ in 0..self.turns.draw(|random| random.below(4)) {
                self.iterate()?;
            }
            self.turns.set_writing(false);
        }
        self.harvest();
        self.iterate()?;
        assert_eq!(self.owed.count(), 0, "nothing is torn while nothing writes");
        let changed = self.pass(Pass::Check)?.iter().map(|r| r.pages).sum::<u64>();
        assert_eq!(changed, 0, "nothing changes while nothing writes");
        assert_eq!(self.assembly.check(&self.totals), Ok(()));
        assert_eq!(self.assembly.close(&self.totals), Ok(()));
        Ok(())
    }

    fn pass(&mut self, pass: Pass) -> Result<Vec<Report>, StreamError> {
        let mut runs: Vec<Run> = Vec::new();
        for (index, (region, tracker)) in (0..).zip(&*self.sources) {
            tracker.plan(
                index,
                region,
                &self.owed.of(index),
                self.passes == 0,
                &mut runs,
            )?;
        }
        let plan = Arc::new(Plan::new(self.iteration, self.shape.packet_bytes, 1, runs));
        let (turns, streams) = (&self.turns, self.shape.streams);
        turns.begin(self.streams.len());
        let results: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = self
                .streams
                .iter_mut()
                .enumerate()
                .map(|(me, stream)| {
                    let plan = Arc::clone(&plan);
                    scope.spawn(move || {
                        let _turn = turns.enter(me);
                        stream.run(&Job {
                            plan,
                            pass,
                            streams,
                        })
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        results.into_iter().collect()
    }

    fn iterate(&mut self) -> Result<(), StreamError> {
        self.iteration += 1;
        let reports = self.pass(Pass::Send)?;
        self.totals = reports.iter().map(|report| report.totals).collect();
        self.passes += 1;
        self.unchanged_pages += reports.iter().map(|report| report.unchanged).sum::<u64>();
        // All that was owed has been carried: what still is arrived torn.
        self.torn_pages += self.owed.count();
        assert_eq!(self.assembly.iterations(), self.iteration);
        self.harvest();
        Ok(())
    }

    fn harvest(&mut self) {
        for (index, (region, tracker)) in (0..).zip(&*self.sources) {
            tracker.harvest(&mut self.owed.of(index)).unwrap();
            tracker.check_sight(region).unwrap();
        }
    }

    fn assert_identical(&self) {
        for ((source, _), destination) in self.sources.iter().zip(&*self.destinations) {
            for page in 0..source.pages() {
                let range = PageRange {
                    first: page,
                    count: 1,
                };
                let (mut a, mut b) = ([0; 4096], [0; 4096]);
                let sent = source.read(range, &mut a).unwrap();
                let arrived = destination.0.read(range, &mut b).unwrap();
                assert!(sent == arrived, "page {page} of {} is stale", source.name());
            }
        }
    }
}

/// Says how to repeat a run that fails.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if thread::panicking() {
            let seed = self.0;
            eprintln!("to repeat: MEMFERRY_SEED={seed} MEMFERRY_MODEL_RUNS=1");
        }
    }
}

/// What the runs met, so that a model which meets nothing is noticed.
#[derive(Debug, Default)]
struct Met {
    resumed: u64,
    failed_attempts: u64,
    torn_pages: u64,
    unchanged_pages: u64,
    completed: u64,
}

impl Met {
    /// Whether something never happened that the model is for.
    fn was_easy(&self) -> bool {
        [
            self.resumed,
            self.failed_attempts,
            self.torn_pages,
            self.unchanged_pages,
        ]
        .contains(&0)
    }
}

fn run(seed: u64, met: &mut Met) {
    let _seed = Seed(seed);
    let mut random = Random::new(seed);
    let shape = Shape::draw(&mut random);
    let memory: Vec<Memory> = (0..1 + random.below(3))
        .map(|_| {
            let partial = random.below(2) * random.below(PAGE_BYTES);
            Memory::new(random.below(80) * PAGE_BYTES + partial)
        })
        .collect();
    let turns = Arc::new(Turns::new(random, World::new(&memory)));
    turns.scribble(200);
    let mut epoch = 0;
    for _ in 0..ATTEMPTS_MAX {
        epoch += 1;
        let mut attempt = Attempt::new(&shape, &turns, &memory, epoch);
        let mut ended = attempt.run();
        while matches!(ended, Err(StreamError::Lost { .. }))
            && !turns.draw(|random| random.one_in(4))
        {
            met.resumed += 1;
            turns.set_writing(false);
            if shape.tracking != Tracking::None {
                turns.scribble(5);
            }
            epoch += 1;
            attempt.resume(epoch);
            ended = attempt.run();
        }
        met.torn_pages += attempt.torn_pages;
        met.unchanged_pages += attempt.unchanged_pages;
        match ended {
            Ok(()) => {
                attempt.assert_identical();
                met.completed += 1;
                return;
            }
            // The one thing that may go wrong here is that a connection breaks.
            Err(StreamError::Lost { .. }) => met.failed_attempts += 1,
            Err(error) => panic!("{error}"),
        }
        for stream in attempt.streams {
            let _ = stream.abandon();
        }
        for (_, tracker) in &*attempt.sources {
            tracker.restore();
        }
        if shape.tracking != Tracking::None {
            turns.scribble(5);
        }
    }
    panic!("{ATTEMPTS_MAX} attempts were not enough");
}

#[test]
fn after_the_last_frozen_pass_no_page_at_the_receiver_is_stale() {
    let first = number("MEMFERRY_SEED").unwrap_or_else(|| getrandom::u64().unwrap());
    let runs = number("MEMFERRY_MODEL_RUNS").unwrap_or(RUNS_DEFAULT);
    println!("MEMFERRY_SEED={first}");
    let mut met = Met::default();
    for run_number in 0..runs {
        run(first.wrapping_add(run_number), &mut met);
    }
    // What is rare may not have happened yet.
    while runs >= RUNS_DEFAULT && met.was_easy() && met.completed < 20 * runs {
        run(first.wrapping_add(met.completed), &mut met);
    }
    println!("{met:?}");
    assert!(runs < RUNS_DEFAULT || !met.was_easy(), "{met:?}");
}
