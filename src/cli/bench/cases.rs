//! What is measured, and how good it must be.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::report::{Row, Side};
use super::rig::{Rig, Transfer};
use super::statistics::{Estimate, Target};
use super::{Sample, control, raw_loop};
use crate::cli::args::BenchArgs;
use crate::cli::interrupts::Interrupts;
use crate::cli::stage::{Stage, StageError, local};
use crate::config::units::{Rate, Size};
use crate::name::Name;
use crate::pages::PageRange;
use crate::region::Region;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// The Region that most cases move.
const DENSE: &str = "dense";
const WRITTEN: &str = "written";

/// One row.
#[derive(Debug)]
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) what: &'static str,
    unit: &'static str,
    target: Target,
    how: How,
}

/// How a row comes about.
#[derive(Debug, Clone, Copy)]
enum How {
    /// The throughput of one side as a multiple of the other's.
    Compare(Party, Party),
    /// 64 GiB that hold 256 MiB in islands, beside 256 MiB in one piece.
    Islands,
    /// Downtime of a Region that nobody writes.
    IdleDowntime,
    /// Downtime of a Region that is written in a loop.
    LoadDowntime,
    /// Memory of the daemons themselves.
    OwnMemory,
    /// Answers of the control socket at full rate.
    Control,
}

/// One side of a comparison, moving the same memory.
#[derive(Debug, Clone, Copy)]
enum Party {
    Raw {
        streams: usize,
    },
    Ours {
        streams: usize,
        integrity: &'static str,
        zero_copy: &'static str,
    },
}

const fn ours(streams: usize, integrity: &'static str, zero_copy: &'static str) -> Party {
    Party::Ours {
        streams,
        integrity,
        zero_copy,
    }
}

const fn raw(streams: usize) -> Party {
    Party::Raw { streams }
}

const fn case(
    name: &'static str,
    what: &'static str,
    unit: &'static str,
    target: Target,
    how: How,
) -> Case {
    Case {
        name,
        what,
        unit,
        target,
        how,
    }
}

/// All of them.
pub(super) const CASES: &[Case] = &[
    case(
        "same",
        "the raw loop beside itself: whether two identical programs pass here",
        "×",
        Target::AtLeast(1.0),
        How::Compare(raw(2), raw(2)),
    ),
    case(
        "cold",
        "2 streams, integrity off, beside the raw loop; destination memory is cold",
        "×",
        Target::AtLeast(0.9),
        How::Compare(ours(2, "off", "off"), raw(2)),
    ),
    case(
        "cold-checked",
        "the same with integrity on",
        "×",
        Target::AtLeast(0.8),
        How::Compare(ours(2, "crc32c", "off"), raw(2)),
    ),
    case(
        "one-stream",
        "1 stream, integrity off, beside the raw loop with one",
        "×",
        Target::AtLeast(0.9),
        How::Compare(ours(1, "off", "off"), raw(1)),
    ),
    case(
        "zero-copy",
        "zero copy asked for where the kernel copies, beside plain sends",
        "×",
        Target::AtLeast(0.95),
        How::Compare(ours(2, "crc32c", "auto"), ours(2, "crc32c", "off")),
    ),
    case(
        "islands",
        "64 GiB with 256 MiB in 1024 islands: its time as a multiple of that of 256 MiB in one piece",
        "×",
        Target::AtMost(1.3),
        How::Islands,
    ),
    case(
        "idle-downtime",
        "downtime of a region that nobody writes",
        "ms",
        Target::AtMost(1.0),
        How::IdleDowntime,
    ),
    case(
        "load-downtime",
        "downtime of 1 GiB of which 512 MiB are written in a loop at 200 MiB/s",
        "ms",
        Target::AtMost(4.0),
        How::LoadDowntime,
    ),
    case(
        "own-memory",
        "anonymous memory of the larger daemon, as a multiple of 32 MiB + 1/4096 of the region",
        "×",
        Target::AtMost(1.0),
        How::OwnMemory,
    ),
    case(
        "control",
        "99 of 100 answers to 50 clients that poll 10 times a second during transfers",
        "ms",
        Target::AtMost(5.0),
        How::Control,
    ),
];

/// What the cases share.
#[derive(Debug)]
pub(super) struct Bench<'a> {
    stage: Stage<'a>,
    rig: Rig,
    dense: Region,
    runs: u16,
}

impl<'a> Bench<'a> {
    pub(super) fn new(
        args: &BenchArgs,
        interrupts: Option<&'a Interrupts>,
    ) -> Result<Self, StageError> {
        let needed = Size(args.size.0.max(GIB).saturating_mul(3));
        let stage = Stage::set(&args.directory, needed, interrupts)?;
        let rig = Rig::start(&stage)?;
        fill(&stage, DENSE, args.size.0, &[(0, args.size.0)])?;
        let name = Name::new(DENSE).expect("a legal name");
        let dense = Region::open(name, &stage.path(DENSE))
            .map_err(|error| local("map the source")(std::io::Error::other(error)))?;
        dense.populate(PageRange {
            first: 0,
            count: dense.pages(),
        });
        Ok(Self {
            stage,
            rig,
            dense,
            runs: args.runs,
        })
    }

    pub(super) fn measure(&mut self, case: &Case) -> Result<Row, StageError> {
        let mut sides = None;
        let (values, note) = match case.how {
            How::Compare(one, other) => {
                let (ours, others, note) =
                    self.alternate(|bench| bench.side(one), |bench| bench.side(other))?;
                let ratios = ratios(&others, &ours);
                let gib = gib(self.dense.bytes());
                sides = Some([Side::of(&ours, gib), Side::of(&others, gib)]);
                (ratios, note)
            }
            How::Islands => self.islands()?,
            How::IdleDowntime => self.idle_downtime()?,
            How::LoadDowntime => self.load_downtime()?,
            How::OwnMemory => self.own_memory()?,
            How::Control => self.control()?,
        };
        let estimate = Estimate::of(values).expect("at least one run");
        Ok(Row {
            case: case.name,
            what: case.what,
            unit: case.unit,
            target: case.target,
            estimate,
            sides,
            note,
        })
    }

    /// Takes turns, and who begins changes. The first pair warms up and does not count.
    fn alternate(
        &mut self,
        mut one: impl FnMut(&mut Self) -> Result<(Sample, String), StageError>,
        mut other: impl FnMut(&mut Self) -> Result<(Sample, String), StageError>,
    ) -> Result<(Vec<Sample>, Vec<Sample>, String), StageError> {
        let (mut ones, mut others, mut note) = (Vec::new(), Vec::new(), String::new());
        for run in 0..=self.runs {
            let (first, second);
            if run % 2 == 0 {
                (first, note) = one(self)?;
                second = other(self)?.0;
            } else {
                second = other(self)?.0;
                (first, note) = one(self)?;
            }
            if run > 0 {
                ones.push(first);
                others.push(second);
            }
        }
        Ok((ones, others, note))
    }

    fn side(&mut self, side: Party) -> Result<(Sample, String), StageError> {
        self.stage.check_interrupted()?;
        match side {
            Party::Raw { streams } => {
                let directory = self.stage.path("");
                let sample = raw_loop::run(self.dense.mapping(), &directory, streams);
                Ok((sample.map_err(local("run the raw loop"))?, String::new()))
            }
            Party::Ours {
                streams,
                integrity,
                zero_copy,
            } => {
                let parameters =
                    json!({"streams": streams, "integrity": integrity, "zero-copy": zero_copy});
                let transfer = self.transfer(DENSE, &parameters)?;
                let path = transfer.last["zero-copy"]["path"]
                    .as_str()
                    .unwrap_or_default();
                Ok((transfer.sample, path.to_owned()))
            }
        }
    }

    fn transfer(&mut self, region: &str, parameters: &Value) -> Result<Transfer, StageError> {
        self.rig.add(&self.stage, region)?;
        self.rig.migrate(&self.stage, region, parameters)
    }

    fn islands(&mut self) -> Result<(Vec<f64>, String), StageError> {
        let islands: Vec<_> = (0..1024)
            .map(|island| (island * 64 * MIB, MIB / 4))
            .collect();
        fill(&self.stage, "islands", 64 * GIB, &islands)?;
        fill(&self.stage, "piece", 256 * MIB, &[(0, 256 * MIB)])?;
        let parameters = json!({"streams": 2});
        let moving = |region: &'static str| {
            let parameters = parameters.clone();
            move |bench: &mut Self| Ok((bench.transfer(region, &parameters)?.sample, String::new()))
        };
        let (sparse, dense, note) = self.alternate(moving("islands"), moving("piece"))?;
        Ok((ratios(&sparse, &dense), note))
    }

    fn idle_downtime(&mut self) -> Result<(Vec<f64>, String), StageError> {
        let mut values = Vec::new();
        for _ in 0..self.runs {
            let transfer = self.transfer(DENSE, &json!({"streams": 2}))?;
            values.push(downtime_ms(&transfer.last));
        }
        Ok((values, String::new()))
    }

    fn load_downtime(&mut self) -> Result<(Vec<f64>, String), StageError> {
        let (mut values, mut passes) = (Vec::new(), Vec::new());
        for _ in 0..self.runs {
            let rate = Rate(200 * MIB);
            let writer = self
                .stage
                .start_writer(WRITTEN, Size(GIB), rate, Size(GIB / 2), None)?;
            let transfer = self
                .rig
                .migrate(&self.stage, WRITTEN, &json!({"streams": 2}))?;
            drop(writer);
            let _ = std::fs::remove_file(self.stage.source());
            values.push(downtime_ms(&transfer.last));
            passes.push(
                transfer.last["ram"]["dirty-sync-count"]
                    .as_f64()
                    .unwrap_or(0.0),
            );
        }
        let passes = Estimate::of(passes).map_or(0.0, |estimate| estimate.median);
        Ok((values, format!("{passes} iterations")))
    }

    fn own_memory(&mut self) -> Result<(Vec<f64>, String), StageError> {
        #[expect(clippy::cast_precision_loss)]
        let share = |bytes: u64, allowed: u64| bytes as f64 / allowed as f64;
        let allowed = 32 * MIB + self.dense.bytes() / 4096;
        let mut values = Vec::new();
        for _ in 0..self.runs {
            let transfer = self.transfer(DENSE, &json!({}))?;
            values.push(share(transfer.own_memory, allowed));
        }
        Ok((values, String::new()))
    }

    fn control(&mut self) -> Result<(Vec<f64>, String), StageError> {
        let mut values = Vec::new();
        for _ in 0..self.runs {
            self.rig.add(&self.stage, DENSE)?;
            let connections = (0..50)
                .map(|_| self.rig.connect(&self.stage))
                .collect::<Result<Vec<_>, _>>()?;
            let stop = AtomicBool::new(false);
            let Self { stage, rig, .. } = self;
            let answers = thread::scope(|scope| {
                let polls = scope.spawn(|| control::poll(connections, &stop));
                let transfer = rig.migrate(stage, DENSE, &json!({"streams": 2}));
                stop.store(true, Ordering::Relaxed);
                let answers = polls.join().unwrap_or_else(|_| Ok(Vec::new()));
                transfer?;
                Ok::<_, StageError>(answers?)
            })?;
            values.push(percentile_99(answers).as_secs_f64() * 1e3);
        }
        Ok((values, String::new()))
    }
}

/// The time of one side as a multiple of the other's, pair by pair.
fn ratios(ones: &[Sample], others: &[Sample]) -> Vec<f64> {
    let pairs = ones.iter().zip(others);
    pairs
        .map(|(one, other)| one.time.as_secs_f64() / other.time.as_secs_f64())
        .collect()
}

fn downtime_ms(last: &Value) -> f64 {
    last["downtime-us"].as_f64().unwrap_or(f64::INFINITY) / 1e3
}

fn percentile_99(mut answers: Vec<Duration>) -> Duration {
    answers.sort();
    answers
        .get(answers.len() * 99 / 100)
        .copied()
        .unwrap_or_default()
}

#[expect(clippy::cast_precision_loss)] // shown to people
fn gib(bytes: u64) -> f64 {
    bytes as f64 / GIB as f64
}

/// Makes a file of `bytes` bytes with random data in `extents` (offset and length), holes elsewhere.
fn fill(
    stage: &Stage<'_>,
    name: &str,
    bytes: u64,
    extents: &[(u64, u64)],
) -> Result<(), StageError> {
    let path = stage.path(name);
    let doing = format!("write {}", path.display());
    let write = || -> std::io::Result<()> {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)?;
        file.set_len(bytes)?;
        let region = Region::new(
            Name::new(name).expect("a legal name"),
            doing.clone(),
            file.try_clone()?,
            crate::region::Access::Write,
        )
        .map_err(std::io::Error::other)?;
        // Both sides of a comparison have it on the pages that the directory gives; islands would each be
        // rounded up to a huge page, and there would be eight times the data.
        if extents.len() == 1 {
            crate::sys::file::advise_huge_pages(region.mapping());
        }
        let mut noise = Box::<[u8]>::from(vec![0; 1 << 18]);
        for &(offset, length) in extents {
            region.populate(PageRange::covering(offset, length));
            let mut at = offset;
            while at < offset + length {
                stage.check_interrupted().map_err(std::io::Error::other)?;
                getrandom::fill(&mut noise).map_err(std::io::Error::other)?;
                let step = noise
                    .len()
                    .min(usize::try_from(offset + length - at).unwrap_or(usize::MAX));
                file.write_all_at(&noise[..step], at)?;
                at += step as u64;
            }
        }
        Ok(())
    };
    write().map_err(local(doing.clone()))
}
