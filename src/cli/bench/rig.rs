//! A sender and a receiver of our own, and one transfer after another between them.

use std::fs;
use std::time::{Duration, Instant};

use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::Sample;
use crate::cli::stage::{Process, Stage, StageError, local};
use crate::client::Connection;

/// How long a Region may take to get into the sender's page tables, and a transfer to end.
const DEADLINE: Duration = Duration::from_secs(600);
const LOOK_PAUSE: Duration = Duration::from_millis(5);

/// Both daemons. Ends them when dropped.
#[derive(Debug)]
pub(super) struct Rig {
    sender: Process,
    receiver: Process,
    control: Connection,
    uri: Value,
    transfers: u32,
}

/// What came of one transfer.
#[derive(Debug)]
pub(super) struct Transfer {
    pub(super) sample: Sample,
    /// The last `query-migrate`.
    pub(super) last: Value,
    /// The most anonymous memory that either daemon was seen to have, in bytes.
    pub(super) own_memory: u64,
}

impl Rig {
    pub(super) fn start(stage: &Stage<'_>) -> Result<Self, StageError> {
        let receiver = stage.start("receiver", &stage.receiver_config())?;
        let listening = receiver
            .connect(stage)?
            .execute("query-status", json!({}))?;
        let sender = stage.start("sender", &stage.sender_config())?;
        let control = sender.connect(stage)?;
        Ok(Self {
            sender,
            receiver,
            control,
            uri: listening["listen"][0].clone(),
            transfers: 0,
        })
    }

    /// Another connection to the sender.
    pub(super) fn connect(&self, stage: &Stage<'_>) -> Result<Connection, StageError> {
        self.sender.connect(stage)
    }

    /// Adds a file as a Region, and waits until its pages are in the sender's page tables.
    pub(super) fn add(&mut self, stage: &Stage<'_>, region: &str) -> Result<(), StageError> {
        let add = json!({"name": region, "path": stage.path(region)});
        self.control.execute("region-add", add)?;
        let started = Instant::now();
        while started.elapsed() < DEADLINE {
            stage.check_interrupted()?;
            let regions = self.control.execute("query-regions", json!({}))?;
            let shown = regions
                .as_array()
                .into_iter()
                .flatten()
                .find(|shown| shown["name"] == region);
            if shown.is_some_and(|shown| shown["populated"] == shown["allocated"]) {
                break;
            }
            std::thread::sleep(LOOK_PAUSE);
        }
        Ok(())
    }

    /// Moves a Region that was added, and forgets it on both sides.
    pub(super) fn migrate(
        &mut self,
        stage: &Stage<'_>,
        region: &str,
        parameters: &Value,
    ) -> Result<Transfer, StageError> {
        self.transfers += 1;
        let id = format!("bench-{}", self.transfers);
        let mut order = parameters.clone();
        order["uri"] = self.uri.clone();
        order["id"] = json!(id);
        order["regions"] = json!([region]);
        let before = (cpu_time(&self.sender)?, cpu_time(&self.receiver)?);
        let started = Instant::now();
        self.control.execute("migrate", order)?;
        let mut own_memory = 0;
        let time = loop {
            stage.check_interrupted()?;
            let event = self.control.next_event(Duration::from_millis(50))?;
            if let Some(event) = event
                && event.data["id"] == id.as_str()
                && ["completed", "failed", "cancelled"]
                    .iter()
                    .any(|end| event.data["status"] == *end)
            {
                break started.elapsed();
            }
            own_memory = own_memory
                .max(anonymous(&self.sender))
                .max(anonymous(&self.receiver));
            if started.elapsed() > DEADLINE {
                return Err(local("wait for a transfer")(
                    std::io::ErrorKind::TimedOut.into(),
                ));
            }
        };
        let last = self.control.execute("query-migrate", json!({"id": id}))?;
        if last["status"] != "completed" {
            let text = last["error"]["desc"].to_string();
            return Err(local("measure a transfer")(std::io::Error::other(text)));
        }
        let sample = Sample {
            time,
            sender_cpu: cpu_time(&self.sender)? - before.0,
            receiver_cpu: cpu_time(&self.receiver)? - before.1,
        };
        let _ = fs::remove_file(stage.destination(region));
        self.control
            .execute("region-del", json!({"name": region}))?;
        Ok(Transfer {
            sample,
            last,
            own_memory,
        })
    }
}

/// What a process has used so far, ended threads included.
fn cpu_time(process: &Process) -> Result<Duration, StageError> {
    let clock = clock_getcpuclockid(Pid::from_raw(process.pid()));
    let time = clock.and_then(clock_gettime);
    time.map(Duration::from)
        .map_err(|errno| local("ask for a daemon's CPU time")(errno.into()))
}

/// A process' anonymous memory in bytes.
fn anonymous(process: &Process) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
