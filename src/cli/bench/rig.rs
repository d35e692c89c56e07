//! A sender and a receiver of our own, and one transfer after another between them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Sample;
use crate::cli::stage::{Process, Stage, StageError, local};
use crate::client::{ClientError, Connection};

/// How long a Region may take to get into the page tables, and transfers to end.
const DEADLINE: Duration = Duration::from_secs(600);
const LOOK_PAUSE: Duration = Duration::from_millis(5);
/// How often the memory of the daemons is looked at.
const MEMORY_PAUSE: Duration = Duration::from_millis(50);

/// Both daemons. Ends them when dropped.
#[derive(Debug)]
pub(super) struct Rig {
    pub(super) sender: Process,
    pub(super) receiver: Process,
    control: Connection,
    arrivals: Connection,
    uri: Value,
    transfers: u32,
}

/// What came of one or more transfers.
#[derive(Debug)]
pub(super) struct Transfer {
    pub(super) sample: Sample,
    /// The last `query-migrate` of the last of them.
    pub(super) last: Value,
    /// The most anonymous memory that either daemon was seen to have, in bytes.
    pub(super) own_memory: u64,
    /// Memory that the files which arrived had.
    pub(super) arrived_bytes: u64,
}

impl Rig {
    pub(super) fn start(stage: &Stage<'_>) -> Result<Self, StageError> {
        let receiver = stage.start("receiver", &stage.receiver_config())?;
        let mut arrivals = receiver.connect(stage)?;
        let listening = arrivals.execute("query-status", json!({}))?;
        let sender = stage.start("sender", &stage.sender_config())?;
        let control = sender.connect(stage)?;
        Ok(Self {
            sender,
            receiver,
            control,
            arrivals,
            uri: listening["listen"][0].clone(),
            transfers: 0,
        })
    }

    /// Another connection to the sender.
    pub(super) fn connect(&self, stage: &Stage<'_>) -> Result<Connection, StageError> {
        self.sender.connect(stage)
    }

    /// Adds files as Regions, tracked by `tracker`, and waits until their pages are in the sender's page
    /// tables.
    pub(super) fn add(
        &mut self,
        stage: &Stage<'_>,
        regions: &[String],
        tracker: &str,
    ) -> Result<(), StageError> {
        for region in regions {
            let path = stage.path(region);
            let add = json!({"name": region, "path": path, "tracker": {"kind": tracker}});
            self.control.execute("region-add", add)?;
        }
        wait_until_populated(&mut self.control, stage)
    }

    /// Prepares the file `memory` for the Region to arrive in.
    pub(super) fn prepare(
        &mut self,
        stage: &Stage<'_>,
        region: &str,
        memory: &str,
    ) -> Result<(), StageError> {
        let add = json!({"name": region, "path": stage.path(memory)});
        self.arrivals.execute("region-add", add)?;
        wait_until_populated(&mut self.arrivals, stage)
    }

    /// Moves a Region that was added, and forgets it on both sides.
    pub(super) fn migrate(
        &mut self,
        stage: &Stage<'_>,
        region: &str,
        parameters: &Value,
    ) -> Result<Transfer, StageError> {
        self.migrate_all(stage, &[&[region.to_owned()]], parameters)
    }

    /// Moves groups of Regions that were added, each group in a transfer of its own, all at once.
    pub(super) fn migrate_all(
        &mut self,
        stage: &Stage<'_>,
        groups: &[&[String]],
        parameters: &Value,
    ) -> Result<Transfer, StageError> {
        let before = (self.sender.cpu_time()?, self.receiver.cpu_time()?);
        let started = Instant::now();
        let mut ids = Vec::new();
        for regions in groups {
            self.transfers += 1;
            let id = format!("bench-{}", self.transfers);
            let mut order = parameters.clone();
            order["uri"] = self.uri.clone();
            order["id"] = json!(id);
            order["regions"] = json!(regions);
            self.control.execute("migrate", order)?;
            ids.push(id);
        }
        let (time, own_memory) = self.until_ended(stage, &ids, started)?;
        let mut last = Value::Null;
        for id in ids {
            last = self.control.execute("query-migrate", json!({"id": id}))?;
            if last["status"] != "completed" {
                let text = last["error"]["desc"].to_string();
                return Err(local("measure a transfer")(std::io::Error::other(text)));
            }
        }
        let sample = Sample {
            time,
            sender_cpu: self.sender.cpu_time()? - before.0,
            receiver_cpu: self.receiver.cpu_time()? - before.1,
        };
        let mut arrived_bytes = 0;
        for region in groups.iter().copied().flatten() {
            let arrived = stage.destination(region);
            if let Ok(meta) = arrived.metadata() {
                arrived_bytes += meta.blocks() * 512;
                let _ = fs::remove_file(arrived);
            }
            self.control
                .execute("region-del", json!({"name": region}))?;
            forget(&mut self.arrivals, region)?;
        }
        Ok(Transfer {
            sample,
            last,
            own_memory,
            arrived_bytes,
        })
    }

    /// Waits for the last of them; gives the time since `started` and the most memory seen.
    fn until_ended(
        &mut self,
        stage: &Stage<'_>,
        ids: &[String],
        started: Instant,
    ) -> Result<(Duration, u64), StageError> {
        let (mut left, mut own_memory) = (ids.len(), 0);
        let mut looked = started;
        while left > 0 {
            stage.check_interrupted()?;
            let event = self.control.next_event(MEMORY_PAUSE)?;
            left -= usize::from(event.is_some_and(|event| {
                let ended = ["completed", "failed", "cancelled"]
                    .iter()
                    .any(|end| event.data["status"] == *end);
                ended && ids.iter().any(|id| event.data["id"] == id.as_str())
            }));
            let now = Instant::now();
            if left > 0 && now - looked >= MEMORY_PAUSE {
                looked = now;
                own_memory = own_memory
                    .max(anonymous(&self.sender))
                    .max(anonymous(&self.receiver));
            }
            if now - started > DEADLINE {
                let error = std::io::ErrorKind::TimedOut;
                return Err(local("wait for a transfer")(error.into()));
            }
        }
        Ok((started.elapsed(), own_memory))
    }
}

/// Waits until a daemon has all it has of its Regions in its page tables. A receiver that does not say so
/// is not waited for.
fn wait_until_populated(control: &mut Connection, stage: &Stage<'_>) -> Result<(), StageError> {
    let started = Instant::now();
    while started.elapsed() < DEADLINE {
        stage.check_interrupted()?;
        let regions = control.execute("query-regions", json!({}))?;
        let populated = |shown: &Value| {
            shown["populated"].is_null() || shown["populated"] == shown["allocated"]
        };
        if regions.as_array().into_iter().flatten().all(populated) {
            break;
        }
        std::thread::sleep(LOOK_PAUSE);
    }
    Ok(())
}

/// The receiver forgets what has arrived; maybe it has not quite ended the attempt.
fn forget(arrivals: &mut Connection, region: &str) -> Result<(), StageError> {
    let started = Instant::now();
    loop {
        match arrivals.execute("region-del", json!({"name": region})) {
            Err(ClientError::Command { .. }) if started.elapsed() < Duration::from_secs(10) => {
                std::thread::sleep(LOOK_PAUSE);
            }
            done => return Ok(done.map(|_| ())?),
        }
    }
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
