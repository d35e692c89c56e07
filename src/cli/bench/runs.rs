//! One case after another: what the sides of a comparison are, and how they take turns.

use std::time::{Duration, Instant};

use serde_json::json;

use super::cases::{Case, Destination, How, MOUNT_PARTIES, Party};
use super::qemu::{Job, Qemu};
use super::report::{Measured, Side};
use super::rig::{Rig, Transfer};
use super::source::fill;
use super::statistics::Estimate;
use super::{GIB, Sample, iperf, raw_loop};
use crate::cli::interrupts::Interrupts;
use crate::cli::stage::{Stage, StageError, local};
use crate::config::units::Size;
use crate::name::Name;
use crate::pages::PageRange;
use crate::region::Region;

/// The Region that most cases move, and the memory it arrives in where that is prepared.
pub(super) const DENSE: &str = "dense";
pub(super) const PREPARED: &str = "prepared";

/// How often, and how long at most.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    pub(super) runs: u16,
    /// As many at least, however long they take.
    pub(super) runs_min: u16,
    /// No further run of a case begins after this.
    pub(super) time: Duration,
}

impl Pace {
    pub(super) fn goes_on(&self, done: u16, started: Instant) -> bool {
        done < self.runs && (done < self.runs_min || started.elapsed() < self.time)
    }
}

/// What is to be measured on.
#[derive(Debug)]
pub(super) struct Setting<'a> {
    pub(super) directory: &'a std::path::Path,
    pub(super) size: Size,
    pub(super) pace: Pace,
    /// Whether the directory gives huge pages.
    pub(super) huge: bool,
}

/// What the cases share.
#[derive(Debug)]
pub(super) struct Bench<'a> {
    pub(super) stage: Stage<'a>,
    pub(super) rig: Rig,
    pub(super) dense: Region,
    pub(super) pace: Pace,
    huge: bool,
    qemu: Option<Qemu>,
}

impl<'a> Bench<'a> {
    pub(super) fn new(
        setting: &Setting<'_>,
        interrupts: Option<&'a Interrupts>,
    ) -> Result<Self, StageError> {
        let bytes = setting.size.0;
        let needed = Size(bytes.max(GIB).saturating_mul(4));
        let stage = Stage::set(setting.directory, needed, interrupts)?;
        let rig = Rig::start(&stage)?;
        fill(&stage, DENSE, bytes, &[(0, bytes)])?;
        fill(&stage, PREPARED, bytes, &[(0, bytes)])?;
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
            pace: setting.pace,
            huge: setting.huge,
            qemu: Qemu::find(),
        })
    }

    pub(super) fn qemu_version(&self) -> Option<&str> {
        self.qemu.as_ref().map(|qemu| qemu.version.as_str())
    }

    /// What is measured, figure by figure.
    pub(super) fn measure(&mut self, case: &Case) -> Result<Vec<Measured>, StageError> {
        match case.how {
            How::Compare(destination, one, other) => self.compare(destination, one, other),
            How::Mount { huge } if huge == self.huge => {
                let (one, other) = MOUNT_PARTIES;
                self.compare(Destination::Cold, one, other)
            }
            How::Mount { huge: true } => Ok(vec![Measured::elsewhere(
                "on a tmpfs with huge=advise: mount -t tmpfs -o huge=advise none DIR; memferry bench --directory DIR",
            )]),
            How::Mount { huge: false } => Ok(vec![Measured::elsewhere(
                "on a tmpfs without huge pages: --directory /dev/shm",
            )]),
            How::Islands => self.islands(),
            How::Downtime { rate_mib, tracker } => self.downtime(rate_mib, tracker),
            How::OwnMemory(tracker) => self.own_memory(tracker),
            How::Control => self.control(),
            How::Streams => self.streams(),
            How::Regions => self.regions(),
            How::Attempts => self.attempts(),
            How::Traced => self.traced(),
            How::Iperf => Ok(vec![match iperf::run(&self.stage)? {
                Some(rate) => Measured::of(vec![rate]),
                None => Measured::elsewhere("iperf3 is not installed"),
            }]),
            How::Elsewhere(how) => {
                let rows = case.figures.iter();
                Ok(rows.map(|_| Measured::elsewhere(how)).collect())
            }
        }
    }

    fn compare(
        &mut self,
        destination: Destination,
        one: Party,
        other: Party,
    ) -> Result<Vec<Measured>, StageError> {
        let asked = [one, other];
        if self.qemu.is_none() && asked.iter().any(|side| matches!(side, Party::Qemu { .. })) {
            return Ok(vec![Measured::elsewhere(
                "qemu-system-x86_64 is not installed",
            )]);
        }
        let (ours, others, note) = self.alternate(
            |bench| bench.side(destination, one),
            |bench| bench.side(destination, other),
        )?;
        let gib = gib(self.dense.bytes());
        let mut measured = Measured::of(ratios(&others, &ours));
        measured.sides = Some([Side::of(&ours, gib), Side::of(&others, gib)]);
        measured.note = note;
        Ok(vec![measured])
    }

    /// Takes turns, and who begins changes. The first pair warms up and does not count.
    pub(super) fn alternate(
        &mut self,
        mut one: impl FnMut(&mut Self) -> Result<(Sample, String), StageError>,
        mut other: impl FnMut(&mut Self) -> Result<(Sample, String), StageError>,
    ) -> Result<(Vec<Sample>, Vec<Sample>, String), StageError> {
        let (mut ones, mut others) = (Vec::new(), Vec::new());
        let (_, mut note) = one(self)?;
        other(self)?;
        let started = Instant::now();
        let mut run = 0;
        while self.pace.goes_on(run, started) {
            let (first, second);
            if run % 2 == 1 {
                (first, note) = one(self)?;
                second = other(self)?.0;
            } else {
                second = other(self)?.0;
                (first, note) = one(self)?;
            }
            ones.push(first);
            others.push(second);
            run += 1;
        }
        Ok((ones, others, note))
    }

    /// As often as a case is to be measured.
    pub(super) fn repeat(
        &mut self,
        mut measure: impl FnMut(&mut Self) -> Result<(), StageError>,
    ) -> Result<(), StageError> {
        let started = Instant::now();
        let mut run = 0;
        while self.pace.goes_on(run, started) {
            measure(self)?;
            run += 1;
        }
        Ok(())
    }

    fn side(
        &mut self,
        destination: Destination,
        side: Party,
    ) -> Result<(Sample, String), StageError> {
        self.stage.check_interrupted()?;
        let cold = destination == Destination::Cold;
        match side {
            Party::Raw { streams } => {
                let (directory, prepared) = (self.stage.path(""), self.stage.path(PREPARED));
                let into = if cold {
                    raw_loop::Into::New(&directory)
                } else {
                    raw_loop::Into::Prepared(&prepared)
                };
                let sample = raw_loop::run(self.dense.mapping(), into, streams);
                Ok((sample.map_err(local("run the raw loop"))?, String::new()))
            }
            Party::Ours {
                streams,
                integrity,
                zero_copy,
            } => {
                let parameters =
                    json!({"streams": streams, "integrity": integrity, "zero-copy": zero_copy});
                let transfer = self.transfer(destination, DENSE, &parameters)?;
                let path = transfer.last["zero-copy"]["path"]
                    .as_str()
                    .unwrap_or_default();
                Ok((transfer.sample, path.to_owned()))
            }
            Party::Qemu { populated } => Ok((self.qemu(cold, populated)?, String::new())),
        }
    }

    fn qemu(&self, cold: bool, populated: bool) -> Result<Sample, StageError> {
        let qemu = self.qemu.as_ref().expect("only asked for where it is");
        let fresh = "fresh".to_owned();
        let destination = if cold { &fresh } else { PREPARED };
        if cold {
            fill(&self.stage, &fresh, self.dense.bytes(), &[])?;
        }
        let job = Job {
            source: &self.stage.path(DENSE),
            destination: &self.stage.path(destination),
            bytes: self.dense.bytes(),
            populated,
        };
        let sample = qemu.run(&self.stage, job);
        if cold {
            super::source::remove(&self.stage, [&fresh]);
        }
        sample
    }

    /// Moves a file of the stage.
    pub(super) fn transfer(
        &mut self,
        destination: Destination,
        region: &str,
        parameters: &serde_json::Value,
    ) -> Result<Transfer, StageError> {
        let regions = [region.to_owned()];
        self.rig.add(&self.stage, &regions, "none")?;
        if destination == Destination::Prepared {
            self.rig.prepare(&self.stage, region, PREPARED)?;
        }
        self.rig.migrate(&self.stage, region, parameters)
    }
}

/// The time of one side as a multiple of the other's, pair by pair.
pub(super) fn ratios(ones: &[Sample], others: &[Sample]) -> Vec<f64> {
    let pairs = ones.iter().zip(others);
    pairs
        .map(|(one, other)| one.time.as_secs_f64() / other.time.as_secs_f64())
        .collect()
}

pub(super) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    Estimate::of(values).map_or(0.0, |estimate| estimate.median)
}

#[expect(clippy::cast_precision_loss)] // shown to people
pub(super) fn gib(bytes: u64) -> f64 {
    bytes as f64 / GIB as f64
}
