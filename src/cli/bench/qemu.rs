//! The peer to be compared with: QEMU's multifd, moving the memory of a machine that does not run.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Sample;
use crate::cli::stage::{Process, Stage, StageError, local};
use crate::client::Connection;

const PROGRAM: &str = "qemu-system-x86_64";
const CHANNELS: u32 = 2;
const DEADLINE: Duration = Duration::from_secs(300);

/// An installed QEMU.
#[derive(Debug)]
pub(super) struct Qemu {
    pub(super) version: String,
}

/// Where it takes the memory from and brings it to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Job<'a> {
    pub(super) source: &'a Path,
    pub(super) destination: &'a Path,
    pub(super) bytes: u64,
    /// Whether its page tables are filled before it begins.
    pub(super) populated: bool,
}

impl Qemu {
    /// `None` if it is not installed.
    pub(super) fn find() -> Option<Self> {
        let output = Command::new(PROGRAM).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.split(' ').nth(3)?.to_owned();
        Some(Self { version })
    }

    /// Starts two machines without a processor that runs, and moves one's memory to the other. What the
    /// destination's file does not have yet is cold.
    pub(super) fn run(&self, stage: &Stage<'_>, job: Job<'_>) -> Result<Sample, StageError> {
        let from = start(stage, "qemu-from", job.source, job, &[])?;
        let to = start(
            stage,
            "qemu-to",
            job.destination,
            job,
            &["-incoming", "defer"],
        )?;
        let (mut source, mut destination) = (from.connect(stage)?, to.connect(stage)?);
        for side in [&mut source, &mut destination] {
            let on = |capability: &str| json!({"capability": capability, "state": true});
            let capabilities = json!({"capabilities": [on("multifd"), on("events")]});
            side.execute("migrate-set-capabilities", capabilities)?;
            let parameters = json!({"multifd-channels": CHANNELS});
            side.execute("migrate-set-parameters", parameters)?;
        }
        // Its own limit is 128 MiB/s.
        let unlimited = json!({"max-bandwidth": 1_u64 << 40});
        source.execute("migrate-set-parameters", unlimited)?;
        destination.execute("migrate-incoming", json!({"uri": "tcp:127.0.0.1:0"}))?;
        let listening = destination.execute("query-migrate", Value::Null)?;
        let port = listening["socket-address"][0]["port"]
            .as_str()
            .unwrap_or_default();

        let before = (from.cpu_time()?, to.cpu_time()?);
        let started = Instant::now();
        let uri = format!("tcp:127.0.0.1:{port}");
        source.execute("migrate", json!({"uri": uri}))?;
        until_completed(stage, &mut source, started)?;
        let time = started.elapsed();
        let moved = source.execute("query-migrate", Value::Null)?["ram"]["transferred"]
            .as_u64()
            .unwrap_or(0);
        if moved < job.bytes {
            let text = format!("it says that it moved {moved} of {} bytes", job.bytes);
            return Err(local("measure QEMU")(std::io::Error::other(text)));
        }
        Ok(Sample {
            time,
            sender_cpu: from.cpu_time()? - before.0,
            receiver_cpu: to.cpu_time()? - before.1,
        })
    }
}

fn start(
    stage: &Stage<'_>,
    who: &'static str,
    memory: &Path,
    job: Job<'_>,
    more: &[&str],
) -> Result<Process, StageError> {
    let bytes = job.bytes;
    let socket = escaped(&stage.socket(who));
    let memory = escaped(memory);
    let populated = if job.populated { "on" } else { "off" };
    let mut command = stage.command(who, &PathBuf::from(PROGRAM))?;
    command
        .args(["-accel", "tcg", "-nodefaults", "-display", "none", "-S"])
        .args(["-machine", "none,memory-backend=m", "-m"])
        .arg(format!("{}M", bytes >> 20))
        .arg("-object")
        .arg(format!(
            "memory-backend-file,id=m,size={bytes},mem-path={memory},share=on,prealloc={populated}"
        ))
        .arg("-qmp")
        .arg(format!("unix:{socket},server=on,wait=off"))
        .args(more);
    Stage::spawn(who, command)
}

/// A path as a value in its options, where a comma is the end of one.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

fn until_completed(
    stage: &Stage<'_>,
    source: &mut Connection,
    started: Instant,
) -> Result<(), StageError> {
    while started.elapsed() < DEADLINE {
        stage.check_interrupted()?;
        let Some(event) = source.next_event(Duration::from_millis(100))? else {
            continue;
        };
        match event.data["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed") => {
                let error = std::io::Error::other(stage.log("qemu-from"));
                return Err(local("measure QEMU")(error));
            }
            _ => {}
        }
    }
    Err(local("wait for QEMU")(std::io::ErrorKind::TimedOut.into()))
}
