//! `memferry demo`: the whole job on this host, with real processes, and a comparison at the end.
//!
//! Everything it makes is in one directory under /dev/shm, and every process dies with it, so nothing
//! is left behind whichever way it ends.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::statvfs::statvfs;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::args::{DemoArgs, ProgressMode};
use super::exit::Exit;
use super::interrupts::Interrupts;
use super::migrate::Watch;
use super::output::{line, note};
use super::status::print_summary;
use crate::client::{ClientError, Connection};
use crate::config::units::Size;
use crate::workload::newest_stamp;

/// Memory that files can be made in, on every Linux.
const SHM: &str = "/dev/shm";
const REGION: &str = "demo";
/// How long a process of ours may take to be ready, apart from filling its memory.
const START_DEADLINE: Duration = Duration::from_secs(20);
const LOOK_PAUSE: Duration = Duration::from_millis(10);

/// Why the demo could not be shown.
#[derive(Debug, thiserror::Error)]
enum DemoError {
    #[error("interrupted")]
    Interrupted,
    #[error("the demo needs {needed} in {SHM}, which has {free} free: choose a smaller --size")]
    Room { needed: Size, free: Size },
    #[error("cannot {doing}: {source}")]
    Local { doing: String, source: io::Error },
    #[error("the {who} did not start:\n{log}")]
    Start { who: &'static str, log: String },
    #[error(transparent)]
    Client(#[from] ClientError),
}

impl DemoError {
    fn exit(&self) -> Exit {
        match self {
            Self::Interrupted => Exit::Cancelled,
            Self::Room { .. } => Exit::Resources,
            Self::Client(error) => Exit::of_error(error),
            Self::Local { .. } | Self::Start { .. } => Exit::Other,
        }
    }
}

fn local(doing: impl Into<String>) -> impl FnOnce(io::Error) -> DemoError {
    let doing = doing.into();
    move |source| DemoError::Local { doing, source }
}

pub(super) fn run(args: &DemoArgs) -> Exit {
    // A terminal that is closed is an interrupt too: what is in /dev/shm must not stay.
    let interrupts = Interrupts::new(&[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    show(args, interrupts.as_ref()).unwrap_or_else(|error| {
        note(format_args!("memferry: {error}"));
        error.exit()
    })
}

fn show(args: &DemoArgs, interrupts: Option<&Interrupts>) -> Result<Exit, DemoError> {
    let stage = Stage::set(args, interrupts)?;
    let receiver = stage.start("receiver", &stage.receiver_config())?;
    let mut arrivals = receiver.connect(&stage)?;
    let listening = arrivals.execute("query-status", json!({}))?;
    let sender = stage.start("sender", &stage.sender_config())?;
    let mut control = sender.connect(&stage)?;
    note(format_args!("filling {} and starting to write", args.size));
    // It registers its memory with the sender by itself, to be tracked by the kernel and frozen.
    let _writer = stage.start_writer(args)?;
    let order = json!({
        "uri": listening["listen"][0],
        "id": REGION,
        "streams": args.streams,
        "zero-copy": args.zero_copy,
    });
    control.execute("migrate", order)?;
    let mut watch = Watch::new(
        control,
        Some(REGION.to_owned()),
        ProgressMode::Auto,
        interrupts,
        "cancelling; press Ctrl-C again to end everything at once",
    );
    let Some(mut last) = watch.until_ended()? else {
        return Err(DemoError::Interrupted);
    };
    let identical = if last["status"] == "completed" {
        note("comparing every byte of the destination with the frozen source");
        let identical = stage.compare()?;
        last["identical"] = json!(identical);
        last["gib-per-second"] = gib_per_second(args.size.0, &last["total-time"]);
        last["writer-gap-us"] = stage.writer_gap(&mut arrivals, args.size.0)?;
        Some(identical)
    } else {
        None
    };
    report(&last, identical, args.json);
    Ok(match identical {
        Some(false) => Exit::Verification,
        _ => Exit::of_transfer(&last),
    })
}

fn report(last: &Value, identical: Option<bool>, as_json: bool) {
    if as_json {
        line(last);
        return;
    }
    print_summary(last);
    match identical {
        Some(true) => line("identical"),
        Some(false) => line("DIFFERENT: the destination is not what the source was"),
        None => {}
    }
}

fn gib_per_second(bytes: u64, total_ms: &Value) -> Value {
    #[expect(clippy::cast_precision_loss)] // shown to people
    let gib = bytes as f64 / f64::from(1 << 30);
    match total_ms.as_f64() {
        Some(ms) if ms > 0.0 => json!(gib / (ms / 1000.0)),
        _ => Value::Null,
    }
}

/// The directory everything happens in. Removed at the end.
struct Stage<'a> {
    directory: TempDir,
    interrupts: Option<&'a Interrupts>,
}

impl<'a> Stage<'a> {
    fn set(args: &DemoArgs, interrupts: Option<&'a Interrupts>) -> Result<Self, DemoError> {
        let room = statvfs(SHM).map_err(|errno| local(format!("look at {SHM}"))(errno.into()))?;
        let free = room.blocks_available().saturating_mul(room.fragment_size());
        let needed = args.size.0.saturating_mul(2);
        // A tmpfs mounted without a size limit has no blocks at all.
        if room.blocks() > 0 && free < needed {
            return Err(DemoError::Room {
                needed: Size(needed),
                free: Size(free),
            });
        }
        let directory = tempfile::Builder::new()
            .prefix("memferry-demo-")
            .tempdir_in(SHM)
            .map_err(local(format!("make a directory in {SHM}")))?;
        Ok(Self {
            directory,
            interrupts,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn source(&self) -> PathBuf {
        self.path("source")
    }

    fn destination(&self) -> PathBuf {
        self.path("arrived").join(REGION)
    }

    fn receiver_config(&self) -> String {
        let directory = self.path("arrived");
        format!(
            "[receive]\nlisten = [\"tcp:127.0.0.1:0\"]\ndirectory = {directory:?}\n{}",
            self.common_config("receiver")
        )
    }

    fn sender_config(&self) -> String {
        self.common_config("sender")
    }

    fn common_config(&self, who: &str) -> String {
        let (socket, state) = (
            self.path(&format!("{who}.sock")),
            self.path(&format!("{who}.state")),
        );
        let runtime = self.path(&format!("{who}.run"));
        format!(
            "[control]\nsocket = {socket:?}\n[state]\ndirectory = {state:?}\nruntime-directory = {runtime:?}\n"
        )
    }

    /// Starts a daemon of this very program.
    fn start(&self, who: &'static str, config: &str) -> Result<Process, DemoError> {
        let path = self.path(&format!("{who}.toml"));
        fs::write(&path, config).map_err(local(format!("write {}", path.display())))?;
        let mut command = self.command(who)?;
        command
            .arg(who)
            .arg("--config")
            .arg(path)
            .stdout(Stdio::null());
        let child = command.spawn().map_err(local(format!("start the {who}")))?;
        Ok(Process(child, who))
    }

    fn start_writer(&self, args: &DemoArgs) -> Result<Process, DemoError> {
        const WHO: &str = "writer";
        let mut command = self.command(WHO)?;
        command
            .arg("workload")
            .args([
                "--size",
                &args.size.to_string(),
                "--dirty-rate",
                &args.dirty_rate.to_string(),
            ])
            .args([
                "--working-set",
                &args.working_set.min(args.size).to_string(),
                "--path",
            ])
            .arg(self.source())
            .arg("--register")
            .arg(self.path("sender.sock"))
            .args(["--name", REGION])
            .stdout(Stdio::piped());
        let child = command.spawn().map_err(local("start the writer"))?;
        let mut writer = Process(child, WHO);
        let mut output = writer.0.stdout.take().ok_or_else(|| DemoError::Start {
            who: WHO,
            log: String::new(),
        })?;
        // Its first line says that the memory is filled. Only then is there something to move.
        let mut said = Vec::new();
        while !said.contains(&b'\n') {
            let mut fds = vec![PollFd::new(output.as_fd(), PollFlags::POLLIN)];
            fds.extend(
                self.interrupts
                    .map(|interrupts| PollFd::new(interrupts.as_fd(), PollFlags::POLLIN)),
            );
            let _ = poll(&mut fds, PollTimeout::NONE);
            self.check_interrupted()?;
            let mut bytes = [0; 1024];
            match output.read(&mut bytes) {
                Ok(0) => {
                    return Err(DemoError::Start {
                        who: WHO,
                        log: self.log(WHO),
                    });
                }
                Ok(n) => said.extend_from_slice(&bytes[..n]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(local("read from the writer")(error)),
            }
        }
        Ok(writer)
    }

    /// This program, in a process group of its own: Ctrl-C is ours to handle, in order.
    fn command(&self, who: &str) -> Result<Command, DemoError> {
        let program = std::env::current_exe().map_err(local("find this program"))?;
        let log = self.path(&format!("{who}.log"));
        let log = File::create(&log).map_err(local(format!("write {}", log.display())))?;
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).stderr(log).process_group(0);
        crate::sys::process::die_with_parent(&mut command);
        Ok(command)
    }

    fn log(&self, who: &str) -> String {
        fs::read_to_string(self.path(&format!("{who}.log"))).unwrap_or_default()
    }

    fn check_interrupted(&self) -> Result<(), DemoError> {
        match self.interrupts {
            Some(interrupts) if interrupts.take() => Err(DemoError::Interrupted),
            _ => Ok(()),
        }
    }

    /// Whether both files have the same bytes.
    fn compare(&self) -> Result<bool, DemoError> {
        let open =
            |path: &Path| File::open(path).map_err(local(format!("open {}", path.display())));
        let (source, destination) = (open(&self.source())?, open(&self.destination())?);
        let read = local("compare");
        let length = |file: &File| file.metadata().map(|meta| meta.len());
        let total = match (length(&source), length(&destination)) {
            (Ok(a), Ok(b)) if a == b => a,
            (Ok(_), Ok(_)) => return Ok(false),
            (Err(error), _) | (_, Err(error)) => return Err(read(error)),
        };
        let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        let mut offset = 0;
        while offset < total {
            self.check_interrupted()?;
            let step = usize::try_from((total - offset).min(1 << 20)).expect("at most a MiB");
            source
                .read_exact_at(&mut a[..step], offset)
                .map_err(local("read the source"))?;
            destination
                .read_exact_at(&mut b[..step], offset)
                .map_err(local("read the destination"))?;
            if a[..step] != b[..step] {
                return Ok(false);
            }
            offset += step as u64;
        }
        Ok(true)
    }

    /// From the writer's last stamp to the receiver's commit, in µs: the downtime as its victim saw it.
    fn writer_gap(&self, arrivals: &mut Connection, bytes: u64) -> Result<Value, DemoError> {
        let source = File::open(self.source()).map_err(local("open the source"))?;
        let last_write = newest_stamp(&source, bytes).map_err(local("read the source"))?;
        while let Some(event) = arrivals.next_event(START_DEADLINE)? {
            if event.data["status"] == "completed" {
                let committed_us = u64::try_from(event.at.as_micros()).unwrap_or(u64::MAX);
                let gap = last_write.map(|stamp| committed_us.saturating_sub(stamp.time_ns / 1000));
                return Ok(json!(gap));
            }
        }
        Ok(Value::Null)
    }
}

/// A process that ends with this value.
struct Process(Child, &'static str);

impl Process {
    /// Waits until the daemon serves its control socket.
    fn connect(&self, stage: &Stage<'_>) -> Result<Connection, DemoError> {
        let socket = stage.path(&format!("{}.sock", self.1));
        let started = Instant::now();
        loop {
            stage.check_interrupted()?;
            match Connection::connect(&socket) {
                Ok(connection) => return Ok(connection),
                Err(_) if started.elapsed() < START_DEADLINE && !self.has_ended() => {
                    std::thread::sleep(LOOK_PAUSE);
                }
                Err(_) => {
                    return Err(DemoError::Start {
                        who: self.1,
                        log: stage.log(self.1),
                    });
                }
            }
        }
    }

    fn has_ended(&self) -> bool {
        let pid = i32::try_from(self.0.id()).unwrap_or(i32::MAX);
        crate::sys::process::PidFd::open(pid).map_or(true, |pidfd| pidfd.has_ended())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // SIGKILL also ends a process that is stopped, as the writer is after the hand-over.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
