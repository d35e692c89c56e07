//! Configuration: TOML in, checked values out.
//!
//! What is typed is read once, through the tables of keys, into types whose values are within their
//! limits and fit together; code behind them does not ask again. The same table reads `[transfer]` and
//! the arguments of `migrate`. Nothing here opens a socket or a Region; the file `check` looks at the machine.

mod check;
mod cpus;
mod error;
mod keys;
mod receive;
mod region;
mod transfer;
pub mod units;

use std::path::{Path, PathBuf};

use nix::unistd::{Group, User, geteuid};

pub use check::{Report, check_file};
pub use cpus::{CpuList, CpuListError};
pub use error::{ConfigError, Place, Problem, Warning};
pub use receive::{
    HugePages, NamePattern, NamePatternError, PeerRange, PeerRangeError, ReceiveConfig,
};
pub use region::{FreezeConfig, KindError, RegionConfig, TrackerConfig};
pub use transfer::{Compression, Integrity, TransferParameters, WhenNotConverging, ZeroCopyMode};

use keys::{Choice, Document, Given, Key, Refusal, Table};
use region::RawRegion;

/// All of `sender.toml`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SenderConfig {
    /// The control socket.
    pub control: ControlConfig,
    /// How transfers are done, unless `migrate` says otherwise.
    pub transfer: TransferParameters,
    /// Regions that are there from the start.
    pub regions: Vec<RegionConfig>,
    /// Where things that outlive the daemon are kept.
    pub state: StateConfig,
    /// The log.
    pub log: LogConfig,
}

/// All of `receiver.toml`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiverConfig {
    /// The control socket.
    pub control: ControlConfig,
    /// What is taken, from whom, and where it goes.
    pub receive: ReceiveConfig,
    /// Where things that outlive the daemon are kept.
    pub state: StateConfig,
    /// The log.
    pub log: LogConfig,
}

/// The `[control]` table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlConfig {
    /// The control socket.
    pub socket: PathBuf,
    /// Users that may connect; our own and 0 are always among them.
    pub allow_uids: Vec<u32>,
    /// Groups whose members may connect.
    pub allow_gids: Vec<u32>,
}

/// The `[state]` table, the same for both daemons.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateConfig {
    /// The history of transfers; outlives a boot.
    pub directory: PathBuf,
    /// The journal: who owns what. Outlives the daemon, not the boot.
    pub runtime_directory: PathBuf,
}

/// The `[log]` table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// What is logged, in the syntax of `RUST_LOG`. Known to parse.
    pub filter: String,
    /// How a line looks.
    pub format: LogFormat,
}

/// How a line of the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Choice for LogFormat {
    const ALL: &'static [(&'static str, Self)] = &[("text", Self::Text), ("json", Self::Json)];
}

impl ControlConfig {
    fn new(socket: &str) -> Self {
        Self {
            socket: PathBuf::from(socket),
            allow_uids: always_allowed(),
            allow_gids: Vec::new(),
        }
    }
}

/// Root can do to us whatever it likes anyway, and a client started as our own user is what
/// `systemctl reload` runs.
fn always_allowed() -> Vec<u32> {
    let mut uids = vec![geteuid().as_raw(), 0];
    uids.dedup();
    uids
}

impl Default for SenderConfig {
    fn default() -> Self {
        Self {
            control: ControlConfig::new("/run/memferry/sender.sock"),
            transfer: TransferParameters::default(),
            regions: Vec::new(),
            state: StateConfig {
                directory: "/var/lib/memferry".into(),
                runtime_directory: "/run/memferry/sender".into(),
            },
            log: LogConfig::default(),
        }
    }
}

impl Default for ReceiverConfig {
    fn default() -> Self {
        Self {
            control: ControlConfig::new("/run/memferry/receiver.sock"),
            receive: ReceiveConfig::default(),
            state: StateConfig {
                directory: "/var/lib/memferry".into(),
                runtime_directory: "/run/memferry/receiver".into(),
            },
            log: LogConfig::default(),
        }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            filter: "info".to_owned(),
            format: LogFormat::Text,
        }
    }
}

/// Reads `sender.toml`. Warnings are about the machine and do not stop the daemon.
pub fn load_sender(path: &Path) -> Result<(SenderConfig, Vec<Warning>), ConfigError> {
    let (config, mut warnings) = load(path, parse_sender)?;
    warnings.extend(check::sender_warnings(&config));
    Ok((config, warnings))
}

/// Reads `receiver.toml`. Warnings are about the machine and do not stop the daemon.
pub fn load_receiver(path: &Path) -> Result<(ReceiverConfig, Vec<Warning>), ConfigError> {
    let (config, mut warnings) = load(path, parse_receiver)?;
    warnings.extend(check::receiver_warnings(&config));
    Ok((config, warnings))
}

/// Reads the file and hands its document to `parse`; every error names the file.
fn load<T>(
    path: &Path,
    parse: impl FnOnce(&Document<'_>) -> Result<T, ConfigError>,
) -> Result<T, ConfigError> {
    let read = |path| std::fs::read_to_string(path);
    let in_file = |error: ConfigError| error.in_file(path);
    let text = read(path).map_err(|error| in_file(ConfigError::new(Problem::Unreadable(error))))?;
    Document::parse(&text)
        .and_then(|document| parse(&document))
        .map_err(in_file)
}

fn parse_sender(document: &Document<'_>) -> Result<(SenderConfig, Vec<Warning>), ConfigError> {
    document.only(&SENDER_TABLES)?;
    let mut config = SenderConfig::default();
    let mut warnings = Vec::new();
    parse_control(document, &mut config.control, &mut warnings)?;
    if let Some(mut table) = document.table("transfer")? {
        table.read(transfer::KEYS, &mut config.transfer)?;
        if let Some((key, reason)) = config.transfer.disagreement() {
            return Err(table.mistake(key, reason));
        }
    }
    for table in document.tables("region")? {
        let region = parse_region(table, &config.regions)?;
        config.regions.push(region);
    }
    parse_rest(document, &mut config.state, &mut config.log)?;
    Ok((config, warnings))
}

fn parse_receiver(document: &Document<'_>) -> Result<(ReceiverConfig, Vec<Warning>), ConfigError> {
    document.only(&RECEIVER_TABLES)?;
    let mut config = ReceiverConfig::default();
    let mut warnings = Vec::new();
    parse_control(document, &mut config.control, &mut warnings)?;
    if let Some(mut table) = document.table("receive")? {
        table.read(receive::KEYS, &mut config.receive)?;
        if let Some((key, reason)) = config.receive.disagreement() {
            return Err(table.mistake(key, reason));
        }
    }
    parse_rest(document, &mut config.state, &mut config.log)?;
    Ok((config, warnings))
}

const SENDER_TABLES: [&str; 7] = [
    "control", "transfer", "region", "state", "tls", "metrics", "log",
];
const RECEIVER_TABLES: [&str; 6] = ["control", "receive", "state", "tls", "metrics", "log"];

fn parse_control(
    document: &Document<'_>,
    control: &mut ControlConfig,
    warnings: &mut Vec<Warning>,
) -> Result<(), ConfigError> {
    let Some(mut table) = document.table("control")? else {
        return Ok(());
    };
    let mut raw = RawControl::default();
    table.read(CONTROL_KEYS, &mut raw)?;
    if let Some(socket) = raw.socket {
        control.socket = socket;
    }
    let (uids, missing) = resolve(raw.users, |name| {
        Some(User::from_name(name).ok()??.uid.as_raw())
    });
    warnings.extend(missing.map(|name| missing_account("user", "allow-uids", &name)));
    for uid in uids {
        if !control.allow_uids.contains(&uid) {
            control.allow_uids.push(uid);
        }
    }
    let (gids, missing) = resolve(raw.groups, |name| {
        Some(Group::from_name(name).ok()??.gid.as_raw())
    });
    warnings.extend(missing.map(|name| missing_account("group", "allow-gids", &name)));
    control.allow_gids = gids;
    Ok(())
}

/// Numbers of the accounts that exist, and names of those that do not.
fn resolve(
    accounts: Vec<Account>,
    find: impl Fn(&str) -> Option<u32>,
) -> (Vec<u32>, impl Iterator<Item = String>) {
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    for account in accounts {
        match account {
            Account::Number(number) => found.push(number),
            Account::Name(name) => match find(&name) {
                Some(number) => found.push(number),
                None => missing.push(name),
            },
        }
    }
    (found, missing.into_iter())
}

fn missing_account(what: &str, key: &str, name: &str) -> Warning {
    Warning(format!(
        "control.{key}: there is no {what} {name:?} on this host; nobody is let in for it"
    ))
}

fn parse_region(
    mut table: Table<'_, '_>,
    before: &[RegionConfig],
) -> Result<RegionConfig, ConfigError> {
    let mut raw = RawRegion::default();
    table.read(region::KEYS, &mut raw)?;
    let name = raw
        .name
        .ok_or_else(|| table.lacks("name", "name = \"vm1\""))?;
    let path = raw
        .path
        .ok_or_else(|| table.lacks("path", "path = \"/dev/shm/vm1\""))?;
    if before.iter().any(|region| region.name == name) {
        let reason = format!("{name} is the name of an earlier [[region]]; each has its own");
        return Err(table.mistake("name", reason));
    }
    Ok(RegionConfig {
        name,
        path,
        tracker: raw.tracker,
        freeze: raw.freeze,
    })
}

/// The tables that both daemons have besides `[control]`.
fn parse_rest(
    document: &Document<'_>,
    state: &mut StateConfig,
    log: &mut LogConfig,
) -> Result<(), ConfigError> {
    if let Some(mut table) = document.table("state")? {
        table.read(STATE_KEYS, state)?;
    }
    if let Some(mut table) = document.table("log")? {
        table.read(LOG_KEYS, log)?;
    }
    if let Some(mut table) = document.table("metrics")? {
        table.read(METRICS_KEYS, &mut ())?;
    }
    match document.table("tls")? {
        Some(table) => table.must_be_empty(),
        None => Ok(()),
    }
}

/// A user or a group, as written.
#[derive(Debug)]
enum Account {
    Number(u32),
    Name(String),
}

impl Account {
    fn read(given: &Given<'_>) -> Result<Self, Refusal> {
        if given.value.is_string() {
            return Ok(Self::Name(given.text()?.to_owned()));
        }
        // The highest number means "unchanged" to the kernel and is nobody's.
        let number = given.count(0..=u64::from(u32::MAX) - 1)?;
        u32::try_from(number)
            .map(Self::Number)
            .map_err(Refusal::new)
    }
}

/// `[control]` while its keys are read: names are looked up afterwards.
#[derive(Debug, Default)]
struct RawControl {
    socket: Option<PathBuf>,
    users: Vec<Account>,
    groups: Vec<Account>,
}

const CONTROL_KEYS: &[Key<RawControl>] = &[
    Key {
        name: "socket",
        set: |to, given| given.path().map(|path| to.socket = Some(path)),
    },
    Key {
        name: "allow-uids",
        set: |to, given| given.list(Account::read).map(|users| to.users = users),
    },
    Key {
        name: "allow-gids",
        set: |to, given| given.list(Account::read).map(|groups| to.groups = groups),
    },
];

const STATE_KEYS: &[Key<StateConfig>] = &[
    Key {
        name: "directory",
        set: |to, given| given.path().map(|path| to.directory = path),
    },
    Key {
        name: "runtime-directory",
        set: |to, given| given.path().map(|path| to.runtime_directory = path),
    },
];

const LOG_KEYS: &[Key<LogConfig>] = &[
    Key {
        name: "filter",
        set: |to, given| {
            let filter = given.text()?;
            crate::log::parse_filter(filter).map_err(Refusal::new)?;
            to.filter = filter.to_owned();
            Ok(())
        },
    },
    Key {
        name: "format",
        set: |to, given| given.choice().map(|format| to.format = format),
    },
];

const METRICS_KEYS: &[Key<()>] = &[Key {
    name: "listen",
    set: |(), given| match given.text()? {
        "" => Ok(()),
        _ => Err(Refusal::not_served("\"\"")),
    },
}];

#[cfg(test)]
mod tests;
