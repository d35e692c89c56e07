//! What is typed: the verbs, their arguments, and their help texts. Nothing is decided here.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde_json::{Value, json};

use crate::config::units::{Rate, Size};
use crate::name::Name;
use crate::workload::{Pattern, TrackerChoice};

/// Where a sender listens unless told otherwise.
pub const SOCKET_DEFAULT: &str = "/run/memferry/sender.sock";

/// Moves live memory between hosts, while the program that owns it keeps writing.
///
/// The daemons are `memferry sender` and `memferry receiver`. Every other command talks to a daemon
/// through its control socket, or, like `demo` and `check`, needs none.
#[derive(Debug, Parser)]
#[command(name = "memferry", version, propagate_version = true, after_help = EXIT_CODES)]
pub struct Cli {
    /// Control socket of the daemon to talk to.
    #[arg(long, global = true, env = "MEMFERRY_SOCKET", value_name = "PATH", default_value = SOCKET_DEFAULT)]
    pub socket: PathBuf,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0 done                     5 cancelled
  1 other, or undecided      6 did not converge, or timed out
  2 usage                    7 verification failed
  3 daemon not reachable     8 refused by the peer
  4 transfer failed          9 out of resources
  78 configuration           130 interrupted; the transfer goes on";

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon that sends Regions, in the foreground.
    Sender(DaemonArgs),
    /// Run the daemon that receives Regions, in the foreground.
    Receiver(DaemonArgs),
    /// Add, remove or list the memory Regions a daemon knows.
    #[command(subcommand)]
    Region(RegionCommand),
    /// Move Regions to a receiver, show progress, and wait for the end.
    ///
    /// Ctrl-C asks the daemon to cancel and waits for that; a second Ctrl-C leaves the transfer
    /// running and exits with 130.
    Migrate(MigrateArgs),
    /// Show a transfer: the latest, or the one with this id.
    Status(StatusArgs),
    /// Cancel a transfer: the latest, or the one with this id. The source keeps running.
    Cancel(CancelArgs),
    /// Let a transfer stand still at the next moment that allows it: the latest, or the one with this id.
    /// The source keeps running, and what has arrived stays there.
    Pause(CancelArgs),
    /// Go on with a transfer that is paused, or that has lost its connections: now, and not when it would
    /// have tried again.
    Recover(RecoverArgs),
    /// Say on behalf of writers that stop themselves that they stand still, and stay so.
    ///
    /// For a transfer in `pre-switchover` whose writers (freeze `client`) were stopped by hand.
    Continue(ContinueArgs),
    /// Say who owns the Regions of an indeterminate transfer, when the receiver cannot.
    ///
    /// Look at the destination first: if it runs there and you say `source`, it runs twice.
    Resolve(ResolveArgs),
    /// Show the transfers of a daemon that have ended, also before its last restart.
    History(HistoryArgs),
    /// Write the final blob of a transfer, such as a machine's device state, to standard output. Of a
    /// receiver: name its socket.
    Blob(BlobArgs),
    /// Show the whole job on this host: receiver, sender and a busy writer, then compare every byte.
    Demo(DemoArgs),
    /// Measure this machine: transfers between real daemons, beside a loop that does nothing but move bytes.
    ///
    /// Runs alternate, and a figure comes with the interval it lies in. See docs/performance.md.
    Bench(BenchArgs),
    /// Run a writer that stamps pages at a steady rate and can be frozen; for trying things out.
    Workload(WorkloadArgs),
    /// Compare memory that a workload wrote with the account it kept, and name the writes that are lost.
    Verify(VerifyArgs),
    /// Let writers go on that a sender which has died had stopped. The sender starts it by itself, and
    /// its unit runs it once more after the end.
    #[command(hide = true)]
    Guardian(GuardianArgs),
    /// Check a configuration file, and whether this machine can do what it asks for.
    Check(CheckArgs),
    /// Show what this machine allows, and what to do about the rest. Exits with 1 if nothing can lend.
    ///
    /// Zero-copy engines are tried, not looked up.
    Doctor(DoctorArgs),
}

/// Arguments of the daemons.
#[derive(Debug, Args)]
pub struct DaemonArgs {
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
}

/// `memferry region …`.
#[derive(Debug, Subcommand)]
pub enum RegionCommand {
    /// Make memory in a file known to the daemon.
    Add(RegionAddArgs),
    /// Forget a Region. Its memory stays as it is.
    Remove {
        /// Name of the Region.
        name: Name,
    },
    /// Take a Region that was committed from a receiver, once. Its file stays under its name.
    Take(TakeArgs),
    /// List the Regions.
    List {
        /// Print the daemon's answer as one line of JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Arguments of `memferry region add`.
#[derive(Debug, Args)]
pub struct RegionAddArgs {
    /// Name of the Region; the receiver uses it as the file name.
    pub name: Name,
    /// The file that is the memory: on shm, hugetlbfs, tmpfs or a disk.
    #[arg(long, value_name = "FILE")]
    pub path: PathBuf,
    /// How changed pages are found; none if not given.
    #[arg(long, value_enum, value_name = "KIND")]
    pub tracker: Option<TrackerKind>,
    /// How the writer is stopped for the last pass: none, pid=NUMBER to stop that process, or
    /// cgroup=/sys/fs/cgroup/NAME to freeze that control group.
    #[arg(long, value_name = "KIND[=ARG]", value_parser = parse_freeze)]
    pub freeze: Option<Freeze>,
}

/// Arguments of `memferry region take`.
#[derive(Debug, Args)]
pub struct TakeArgs {
    /// Name of the Region.
    pub name: Name,
    /// Copy it to this new file.
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Run this command instead, with the memory open as the descriptor MEMFERRY_REGION_FD.
    #[arg(
        last = true,
        value_name = "COMMAND",
        required_unless_present = "output",
        conflicts_with = "output"
    )]
    pub command: Vec<OsString>,
}

/// Arguments of `memferry blob`.
#[derive(Debug, Args)]
pub struct BlobArgs {
    /// Id of the transfer.
    pub id: Name,
    /// Write it to this new file instead.
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Delete it at the receiver once it is written.
    #[arg(long)]
    pub delete: bool,
}

/// Arguments of `memferry history`.
#[derive(Debug, Args)]
pub struct HistoryArgs {
    /// Print the daemon's answer as one line of JSON.
    #[arg(long)]
    pub json: bool,
}

/// How changed pages are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TrackerKind {
    /// They are not: nothing writes the memory while it moves.
    None,
    /// By comparing a hash of every page with that of the pass before.
    Scan,
}

/// How the writer is stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Freeze {
    /// Nothing writes.
    None,
    /// SIGSTOP to this process.
    Pid(u32),
    /// Freeze this control group.
    Cgroup(PathBuf),
}

impl Freeze {
    /// As the control socket wants it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        match self {
            Self::None => json!({"kind": "none"}),
            Self::Pid(pid) => json!({"kind": "pid", "pid": pid}),
            Self::Cgroup(path) => json!({"kind": "cgroup", "path": path}),
        }
    }
}

/// Arguments of `memferry migrate`.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// The receiver: tcp:HOST, tcp:HOST:PORT or unix:PATH. The port is 4440 if left out, and an IPv6
    /// address stands in brackets.
    pub uri: String,
    /// Name of this transfer, for `status` and `cancel`; made up if not given.
    #[arg(long)]
    pub id: Option<Name>,
    /// A Region to move; may be repeated. Without it, all of them.
    #[arg(long = "region", value_name = "NAME")]
    pub regions: Vec<Name>,
    /// A parameter for this transfer only, for example `--set max-bandwidth=300MiB/s`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = parse_setting)]
    pub settings: Vec<(String, Value)>,
    /// What belongs to the memory and is final once its writer stands still, such as a machine's device
    /// state: a file, or a pipe (/dev/stdin) that is closed then. It arrives with the commit.
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run")]
    pub final_blob: Option<PathBuf>,
    /// Return once the daemon has accepted the transfer, and print its id.
    #[arg(long, conflicts_with = "dry_run")]
    pub detach: bool,
    /// Agree with the receiver on what would be moved, and move nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// How progress is shown, on standard error.
    #[arg(long, value_enum, default_value_t = ProgressMode::Auto, value_name = "MODE")]
    pub progress: ProgressMode,
    /// End standard output with one line of JSON: the final state of the transfer.
    #[arg(long)]
    pub json: bool,
}

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ProgressMode {
    /// One moving line on a terminal, else a line per second.
    Auto,
    /// One line of JSON per second.
    Json,
    /// Not at all.
    None,
}

/// Arguments of `memferry status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Id of the transfer.
    pub id: Option<Name>,
    /// Print the daemon's answer as one line of JSON.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `memferry recover`.
#[derive(Debug, Args)]
pub struct RecoverArgs {
    /// Id of the transfer.
    pub id: Option<Name>,
    /// Another address of the same receiver.
    #[arg(long)]
    pub uri: Option<String>,
}

/// Arguments of `memferry cancel` and `memferry pause`.
#[derive(Debug, Args)]
pub struct CancelArgs {
    /// Id of the transfer.
    pub id: Option<Name>,
}

/// Arguments of `memferry continue`.
#[derive(Debug, Args)]
pub struct ContinueArgs {
    /// Id of the transfer.
    pub id: Option<Name>,
}

/// Arguments of `memferry resolve`.
#[derive(Debug, Args)]
pub struct ResolveArgs {
    /// The transfer's id.
    pub id: Name,
    /// Who owns its Regions.
    pub owner: OwningSide,
}

/// A side of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OwningSide {
    /// The source: the writer goes on there.
    Source,
    /// The destination: the writer stays stopped.
    Destination,
}

/// Arguments of `memferry demo`. Sizes and rates as in the configuration: `64MiB`, `300MiB/s`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Size of the Region to move.
    #[arg(long, default_value = "1GiB")]
    pub size: Size,
    /// Streams to move it with.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=i64::from(crate::limits::STREAMS_MAX)))]
    pub streams: u16,
    /// How much the writer writes meanwhile.
    #[arg(long, default_value = "256MiB/s", value_name = "RATE")]
    pub dirty_rate: Rate,
    /// How much of the Region the writer writes to.
    #[arg(long, default_value = "128MiB", value_name = "SIZE")]
    pub working_set: Size,
    /// How the sender finds what is written; by default pagemap where the kernel can, else scan.
    #[arg(long, value_enum, value_name = "KIND")]
    pub tracker: Option<TrackerChoice>,
    /// Zero-copy engine: auto, msg-zerocopy, io-uring, io-uring-fixed or off.
    #[arg(long, default_value = "auto", value_name = "MODE")]
    pub zero_copy: String,
    /// End standard output with one line of JSON: the final state, and what the comparison found.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `memferry bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure; may be repeated. Without it, everything.
    #[arg(long = "case", value_name = "NAME")]
    pub cases: Vec<String>,
    /// Be done in two minutes: less memory, and too few runs for most verdicts.
    #[arg(long)]
    pub quick: bool,
    /// Size of the Region that is moved; by default 1GiB, or 256MiB to be quick.
    #[arg(long)]
    pub size: Option<Size>,
    /// Pairs of runs for each comparison; six or more give an interval of 95 %. By default as many as take
    /// about 20 seconds, at least six and at most nine.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub runs: Option<u16>,
    /// Where both sides keep their memory. Huge pages need a tmpfs that is mounted with huge=advise.
    #[arg(long, default_value = "/dev/shm", value_name = "DIRECTORY")]
    pub directory: PathBuf,
    /// Draw the figures, as an SVG image.
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Print everything as one line of JSON.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `memferry workload`.
#[derive(Debug, Args)]
pub struct WorkloadArgs {
    /// Size of the memory.
    #[arg(long)]
    pub size: Size,
    /// How much to write per second.
    #[arg(long, value_name = "RATE")]
    pub dirty_rate: Rate,
    /// How much of the memory to write to.
    #[arg(long, value_name = "SIZE")]
    pub working_set: Size,
    /// File to keep the memory in; without it, memory without a name.
    #[arg(long, value_name = "FILE")]
    pub path: Option<PathBuf>,
    /// In which order pages are written.
    #[arg(long, value_enum, value_name = "PATTERN", default_value_t)]
    pub pattern: Pattern,
    /// Have the memory in huge pages; says how much of it is.
    #[arg(long)]
    pub huge_pages: bool,
    /// File for an account of the newest write of every page, for `memferry verify`.
    #[arg(long, value_name = "FILE")]
    pub account: Option<PathBuf>,
    /// Control socket of the sender to register the memory with.
    #[arg(long, value_name = "SOCKET", requires = "name")]
    pub register: Option<PathBuf>,
    /// Name of the Region to register.
    #[arg(long, requires = "register")]
    pub name: Option<Name>,
    /// How the sender finds what is written; by default pagemap where the kernel can, else scan.
    #[arg(long, value_enum, value_name = "KIND", requires = "register")]
    pub tracker: Option<TrackerChoice>,
}

/// Arguments of `memferry verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The memory, or what has arrived of it.
    pub file: PathBuf,
    /// The account that its workload kept, which must not be writing now.
    #[arg(long, value_name = "FILE")]
    pub account: PathBuf,
}

/// Arguments of `memferry guardian`.
#[derive(Debug, Args)]
pub struct GuardianArgs {
    /// The sender's runtime directory.
    pub runtime_directory: PathBuf,
    /// Look at once, instead of when standard input ends.
    #[arg(long)]
    pub now: bool,
}

/// Arguments of `memferry check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Configuration file of a sender or a receiver.
    pub file: PathBuf,
}

/// Arguments of `memferry doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Directory that a receiver is to use.
    #[arg(long, value_name = "DIRECTORY", default_value = "/dev/shm")]
    pub directory: PathBuf,
    /// Print one line of JSON.
    #[arg(long)]
    pub json: bool,
}

/// `KEY=VALUE`: a number or true/false as such, everything else as text. The daemon knows the keys.
fn parse_setting(text: &str) -> Result<(String, Value), String> {
    let Some((key, value)) = text.split_once('=').filter(|(key, _)| !key.is_empty()) else {
        return Err("write it as KEY=VALUE".into());
    };
    if ["uri", "id", "regions", "dry-run", "final-fdname"].contains(&key) {
        return Err(format!("{key} has an argument of its own"));
    }
    let parsed = serde_json::from_str(value)
        .ok()
        .filter(|value: &Value| value.is_number() || value.is_boolean());
    Ok((key.to_owned(), parsed.unwrap_or_else(|| value.into())))
}

fn parse_freeze(text: &str) -> Result<Freeze, String> {
    let (kind, argument) = match text.split_once('=') {
        Some((kind, argument)) => (kind, Some(argument)),
        None => (text, None),
    };
    match (kind, argument) {
        ("none", None) => Ok(Freeze::None),
        ("client", None) => Err(
            "client is for a program that registers its own Region; for a file use pid=NUMBER"
                .into(),
        ),
        ("pid", Some(pid)) => match pid.parse() {
            Ok(pid) if pid > 0 => Ok(Freeze::Pid(pid)),
            _ => Err(format!("{pid:?} is not a process id")),
        },
        ("cgroup", Some(path)) if path.starts_with('/') => Ok(Freeze::Cgroup(path.into())),
        ("cgroup", _) => Err("write it as cgroup=/sys/fs/cgroup/NAME".into()),
        ("pid", None) => Err("write it as pid=NUMBER".into()),
        ("command", _) => Err("commands can be given in the configuration file only".into()),
        _ => Err("use none, pid=NUMBER or cgroup=/sys/fs/cgroup/NAME".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn settings_keep_numbers_and_booleans_and_quote_the_rest() {
        for (text, want) in [
            ("streams=4", json!(4)),
            ("max-bandwidth=300MiB/s", json!("300MiB/s")),
            ("throttle=true", json!(true)),
            ("tls-name=", json!("")),
            ("x=a=b", json!("a=b")),
            ("x=[1]", json!("[1]")),
            ("x=null", json!("null")),
            ("x=\"q\"", json!("\"q\"")),
        ] {
            assert_eq!(parse_setting(text).unwrap().1, want, "{text}");
        }
        for bad in ["", "streams", "=4", "uri=tcp:x", "dry-run=false"] {
            assert!(parse_setting(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn freezes_are_understood_or_explained() {
        assert_eq!(parse_freeze("pid=1234"), Ok(Freeze::Pid(1234)));
        assert_eq!(parse_freeze("none"), Ok(Freeze::None));
        let cgroup = parse_freeze("cgroup=/sys/fs/cgroup/x").unwrap();
        assert_eq!(
            cgroup.to_json(),
            json!({"kind": "cgroup", "path": "/sys/fs/cgroup/x"})
        );
        for bad in [
            "pid",
            "pid=0",
            "pid=-1",
            "pid=x",
            "cgroup",
            "cgroup=x",
            "none=1",
            "client",
            "command=x",
            "",
        ] {
            assert!(parse_freeze(bad).is_err(), "{bad}");
        }
    }
}
