//! A Region of `sender.toml` or of `region-add`: what it is, how it is tracked, how its writer is stopped.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::keys::{Key, Refusal};
use crate::freeze::Commands;
use crate::name::Name;

/// One `[[region]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionConfig {
    /// Its name, on both sides.
    pub name: Name,
    /// The file that is its memory.
    pub path: PathBuf,
    /// How written pages are found.
    pub tracker: TrackerConfig,
    /// How its writer is stopped.
    pub freeze: FreezeConfig,
}

/// How written pages are found. As JSON `{"kind": "scan"}` or `"scan"`, in TOML the same two ways; the
/// kinds that need descriptors exist only over the control socket.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub enum TrackerConfig {
    /// Nothing writes while it is moved.
    #[default]
    None,
    /// A hash per page, compared in each Iteration.
    Scan,
    /// The kernel's page tables, through the writer's own registered mapping.
    Pagemap {
        /// Descriptor of the writer's `/proc/self/pagemap`, as named by `getfd`.
        pagemap_fdname: String,
        /// Its userfaultfd, as named by `getfd`.
        uffd_fdname: String,
        /// Where the Region is mapped in the writer.
        address: u64,
    },
    /// A bitmap that the writer shares.
    Bitmap {
        /// Descriptor of the bitmap's memory, as named by `getfd`.
        fdname: String,
    },
}

/// How the writer is stopped. As JSON `{"kind": "pid", "pid": 123}`, `{"kind": "none"}` or `"none"`,
/// in TOML the same ways; on the command line `none`, `pid=123` or `cgroup=/path`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub enum FreezeConfig {
    /// Nothing writes.
    #[default]
    None,
    /// It stops itself when it is asked to, over the connection that registered the Region.
    Client,
    /// SIGSTOP to the process with this id, greater than 0.
    Pid(i32),
    /// `cgroup.freeze` of the control group at this absolute path.
    Cgroup(PathBuf),
    /// Programs with their arguments.
    Command(Commands),
}

/// Why a text or JSON value is no tracker, or no way to freeze.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KindError {
    /// A kind that does not exist.
    #[error("there is no {what} {kind:?}: this version serves {served}")]
    Unknown {
        /// "tracker" or "freeze".
        what: &'static str,
        /// The kind.
        kind: String,
        /// What is served instead.
        served: &'static str,
    },
    /// Neither a text nor an object with a `kind`.
    #[error("{what} is a text or an object with a kind: write {served}")]
    Shape {
        /// "tracker" or "freeze".
        what: &'static str,
        /// What is served.
        served: &'static str,
    },
    /// A member that this kind does not have.
    #[error("{what} {kind:?} takes no {member:?}")]
    Member {
        /// "tracker" or "freeze".
        what: &'static str,
        /// The kind.
        kind: &'static str,
        /// The member.
        member: String,
    },
    /// A kind that needs descriptors, where none can be passed.
    #[error(
        "tracker {kind:?} needs descriptors of the writer: it is registered over the control socket, with {members}"
    )]
    Descriptors {
        /// The kind.
        kind: &'static str,
        /// What it takes.
        members: &'static str,
    },
    /// Freeze `client` where no client registers anything.
    #[error(
        "freeze \"client\" is for a program that registers its own region over the control socket; here use \"none\" or \"pid=1234\""
    )]
    Client,
    /// A process id that is missing or none.
    #[error(
        "freeze \"pid\" needs the process id, a number greater than 0: write pid=1234 or {{kind = \"pid\", pid = 1234}}"
    )]
    Pid,
    /// A control group that is missing, or whose path is not absolute.
    #[error(
        "freeze \"cgroup\" needs the absolute path of a control group: write cgroup=/sys/fs/cgroup/NAME or {{kind = \"cgroup\", path = \"/sys/fs/cgroup/NAME\"}}"
    )]
    Cgroup,
    /// Commands that are missing, or are no lists of texts.
    #[error(
        "freeze \"command\" needs the lists freeze and thaw, and may have done, each a program with its arguments: {{kind = \"command\", freeze = [\"/usr/bin/stop-it\", \"vm1\"], thaw = [\"/usr/bin/go-on\", \"vm1\"]}}"
    )]
    Command,
}

const TRACKERS_SERVED: &str = "\"none\", \"scan\", \"pagemap\" and \"bitmap\"";
const FREEZES_SERVED: &str = "\"none\", \"client\", \"pid=1234\", \"cgroup=/sys/fs/cgroup/NAME\" and {kind = \"command\", …}";

/// Takes `kind` out of a text or an object; the rest of the object is returned with it.
fn kind(
    value: Value,
    what: &'static str,
    served: &'static str,
) -> Result<(String, Map<String, Value>), KindError> {
    match value {
        Value::String(kind) => Ok((kind, Map::new())),
        Value::Object(mut members) => match members.remove("kind") {
            Some(Value::String(kind)) => Ok((kind, members)),
            _ => Err(KindError::Shape { what, served }),
        },
        _ => Err(KindError::Shape { what, served }),
    }
}

/// Takes a text out of the members.
fn text(members: &mut Map<String, Value>, name: &str) -> Option<String> {
    members.remove(name)?.as_str().map(str::to_owned)
}

fn no_more(
    members: &Map<String, Value>,
    what: &'static str,
    kind: &'static str,
) -> Result<(), KindError> {
    match members.keys().next() {
        None => Ok(()),
        Some(member) => Err(KindError::Member {
            what,
            kind,
            member: member.clone(),
        }),
    }
}

fn unknown(what: &'static str, kind: &str, served: &'static str) -> KindError {
    KindError::Unknown {
        what,
        // An error text must not carry a megabyte of somebody's input.
        kind: kind.chars().take(64).collect(),
        served,
    }
}

impl TryFrom<Value> for TrackerConfig {
    type Error = KindError;

    fn try_from(value: Value) -> Result<Self, KindError> {
        let (kind, mut members) = kind(value, "tracker", TRACKERS_SERVED)?;
        match kind.as_str() {
            "none" => no_more(&members, "tracker", "none").map(|()| Self::None),
            "scan" => no_more(&members, "tracker", "scan").map(|()| Self::Scan),
            "pagemap" => {
                let lacking = KindError::Descriptors {
                    kind: "pagemap",
                    members: "pagemap-fdname, uffd-fdname and address",
                };
                let pagemap_fdname = text(&mut members, "pagemap-fdname");
                let uffd_fdname = text(&mut members, "uffd-fdname");
                let address = members
                    .remove("address")
                    .and_then(|address| address.as_u64());
                no_more(&members, "tracker", "pagemap")?;
                match (pagemap_fdname, uffd_fdname, address) {
                    (Some(pagemap_fdname), Some(uffd_fdname), Some(address)) => Ok(Self::Pagemap {
                        pagemap_fdname,
                        uffd_fdname,
                        address,
                    }),
                    _ => Err(lacking),
                }
            }
            "bitmap" => {
                let fdname = text(&mut members, "fdname");
                no_more(&members, "tracker", "bitmap")?;
                let lacking = KindError::Descriptors {
                    kind: "bitmap",
                    members: "fdname",
                };
                fdname.map(|fdname| Self::Bitmap { fdname }).ok_or(lacking)
            }
            other => Err(unknown("tracker", other, TRACKERS_SERVED)),
        }
    }
}

impl TryFrom<Value> for FreezeConfig {
    type Error = KindError;

    fn try_from(value: Value) -> Result<Self, KindError> {
        let (kind, mut members) = kind(value, "freeze", FREEZES_SERVED)?;
        if let Some(pid) = kind.strip_prefix("pid=") {
            let pid = pid.parse().ok().filter(|pid| *pid > 0);
            no_more(&members, "freeze", "pid")?;
            return pid.map(Self::Pid).ok_or(KindError::Pid);
        }
        if let Some(path) = kind.strip_prefix("cgroup=") {
            no_more(&members, "freeze", "cgroup")?;
            return cgroup(path.to_owned());
        }
        match kind.as_str() {
            "none" => no_more(&members, "freeze", "none").map(|()| Self::None),
            "client" => no_more(&members, "freeze", "client").map(|()| Self::Client),
            "pid" => {
                let pid = members.remove("pid").and_then(|pid| pid.as_i64());
                no_more(&members, "freeze", "pid")?;
                let pid = pid.and_then(|pid| i32::try_from(pid).ok());
                let pid = pid.filter(|pid| *pid > 0).ok_or(KindError::Pid)?;
                Ok(Self::Pid(pid))
            }
            "cgroup" => {
                let path = text(&mut members, "path").ok_or(KindError::Cgroup)?;
                no_more(&members, "freeze", "cgroup")?;
                cgroup(path)
            }
            "command" => {
                let mut list = |name: &str| match members.remove(name) {
                    None => Ok(Vec::new()),
                    Some(list) => serde_json::from_value(list).map_err(|_| KindError::Command),
                };
                let commands = Commands {
                    freeze: list("freeze")?,
                    thaw: list("thaw")?,
                    done: list("done")?,
                };
                no_more(&members, "freeze", "command")?;
                let whole = |argv: &Vec<String>| argv.first().is_some_and(|name| !name.is_empty());
                let complete = whole(&commands.freeze) && whole(&commands.thaw);
                if !complete || !(commands.done.is_empty() || whole(&commands.done)) {
                    return Err(KindError::Command);
                }
                Ok(Self::Command(commands))
            }
            other => Err(unknown("freeze", other, FREEZES_SERVED)),
        }
    }
}

fn cgroup(path: String) -> Result<FreezeConfig, KindError> {
    let path = PathBuf::from(path);
    if path.is_absolute() {
        Ok(FreezeConfig::Cgroup(path))
    } else {
        Err(KindError::Cgroup)
    }
}

impl From<TrackerConfig> for Value {
    fn from(tracker: TrackerConfig) -> Self {
        match tracker {
            TrackerConfig::Pagemap {
                pagemap_fdname,
                uffd_fdname,
                address,
            } => json!({
                "kind": "pagemap",
                "pagemap-fdname": pagemap_fdname,
                "uffd-fdname": uffd_fdname,
                "address": address,
            }),
            TrackerConfig::Bitmap { fdname } => json!({"kind": "bitmap", "fdname": fdname}),
            simple => json!({ "kind": simple.to_string() }),
        }
    }
}

impl From<FreezeConfig> for Value {
    fn from(freeze: FreezeConfig) -> Self {
        match freeze {
            FreezeConfig::None => json!({ "kind": "none" }),
            FreezeConfig::Client => json!({ "kind": "client" }),
            FreezeConfig::Pid(pid) => json!({ "kind": "pid", "pid": pid }),
            FreezeConfig::Cgroup(path) => json!({ "kind": "cgroup", "path": path }),
            FreezeConfig::Command(Commands { freeze, thaw, done }) => {
                json!({ "kind": "command", "freeze": freeze, "thaw": thaw, "done": done })
            }
        }
    }
}

impl FromStr for TrackerConfig {
    type Err = KindError;
    fn from_str(text: &str) -> Result<Self, KindError> {
        Value::from(text).try_into()
    }
}

impl FromStr for FreezeConfig {
    type Err = KindError;
    fn from_str(text: &str) -> Result<Self, KindError> {
        Value::from(text).try_into()
    }
}

impl fmt::Display for TrackerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Scan => "scan",
            Self::Pagemap { .. } => "pagemap",
            Self::Bitmap { .. } => "bitmap",
        })
    }
}

impl fmt::Display for FreezeConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Client => f.write_str("client"),
            Self::Pid(pid) => write!(f, "pid={pid}"),
            Self::Cgroup(path) => write!(f, "cgroup={}", path.display()),
            Self::Command(_) => f.write_str("command"),
        }
    }
}

/// A `[[region]]` while its keys are read.
#[derive(Debug, Default)]
pub(super) struct RawRegion {
    pub(super) name: Option<Name>,
    pub(super) path: Option<PathBuf>,
    pub(super) tracker: TrackerConfig,
    pub(super) freeze: FreezeConfig,
}

/// Every key of `[[region]]`.
pub(super) const KEYS: &[Key<RawRegion>] = &[
    Key {
        name: "name",
        set: |to, given| {
            to.name = Some(Name::new(given.text()?).map_err(Refusal::new)?);
            Ok(())
        },
    },
    Key {
        name: "path",
        set: |to, given| given.path().map(|path| to.path = Some(path)),
    },
    Key {
        name: "tracker",
        set: |to, given| {
            to.tracker = given.value.clone().try_into().map_err(Refusal::new)?;
            Ok(())
        },
    },
    Key {
        name: "freeze",
        set: |to, given| {
            to.freeze = given.value.clone().try_into().map_err(Refusal::new)?;
            match to.freeze {
                FreezeConfig::Client => Err(Refusal::new(KindError::Client)),
                _ => Ok(()),
            }
        },
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    fn tracker(value: Value) -> Result<TrackerConfig, String> {
        serde_json::from_value(value).map_err(|error| error.to_string())
    }

    fn freeze(value: Value) -> Result<FreezeConfig, String> {
        serde_json::from_value(value).map_err(|error| error.to_string())
    }

    #[test]
    fn kinds_are_objects_or_bare_texts() {
        assert_eq!(tracker(json!("none")), Ok(TrackerConfig::None));
        assert_eq!(tracker(json!({"kind": "scan"})), Ok(TrackerConfig::Scan));
        assert_eq!(freeze(json!("none")), Ok(FreezeConfig::None));
        let pid = freeze(json!({"kind": "pid", "pid": 7}));
        assert_eq!(pid, Ok(FreezeConfig::Pid(7)));
        assert_eq!("pid=7".parse(), Ok(FreezeConfig::Pid(7)));
    }

    #[test]
    fn what_is_shown_reads_back_the_same() {
        for freeze in [
            FreezeConfig::None,
            FreezeConfig::Client,
            FreezeConfig::Pid(1234),
            FreezeConfig::Cgroup("/sys/fs/cgroup/x".into()),
        ] {
            assert_eq!(freeze.to_string().parse(), Ok(freeze.clone()));
            assert_eq!(Value::from(freeze.clone()).try_into(), Ok(freeze));
        }
        for tracker in [TrackerConfig::None, TrackerConfig::Scan] {
            assert_eq!(tracker.to_string().parse(), Ok(tracker.clone()));
            assert_eq!(Value::from(tracker.clone()).try_into(), Ok(tracker));
        }
        let command = json!({"kind": "command", "freeze": ["a", "b"], "thaw": ["c"], "done": []});
        assert_eq!(Value::from(freeze(command.clone()).unwrap()), command);
        let pagemap =
            json!({"kind": "pagemap", "pagemap-fdname": "p", "uffd-fdname": "u", "address": 4096});
        assert_eq!(Value::from(tracker(pagemap.clone()).unwrap()), pagemap);
        let bitmap = json!({"kind": "bitmap", "fdname": "b"});
        assert_eq!(Value::from(tracker(bitmap.clone()).unwrap()), bitmap);
    }

    #[test]
    fn what_this_version_does_not_serve_is_named() {
        for kind in ["pagemap", "bitmap"] {
            let text = tracker(json!(kind)).unwrap_err();
            assert!(
                text.contains(kind) && text.contains("control socket"),
                "{text}"
            );
        }
        let text = tracker(json!("magic")).unwrap_err();
        assert!(text.contains("there is no tracker \"magic\""), "{text}");
    }

    #[test]
    fn refuses_members_and_numbers_that_make_no_sense() {
        for value in [
            json!(7),
            json!({}),
            json!({"kind": 3}),
            json!({"kind": "none", "pid": 3}),
            json!({"kind": "pid"}),
            json!({"kind": "pid", "pid": 0}),
            json!({"kind": "pid", "pid": -1}),
            json!({"kind": "pid", "pid": 4_294_967_297_u64}),
            json!({"kind": "pid", "pid": 3, "path": "x"}),
            json!("pid"),
            json!("pid=0"),
            json!("pid=-5"),
            json!("pid=x"),
            json!("cgroup"),
            json!("cgroup=x"),
            json!({"kind": "cgroup"}),
            json!({"kind": "cgroup", "path": "x"}),
            json!({"kind": "cgroup", "path": "/x", "pid": 3}),
            json!("command"),
            json!({"kind": "command", "freeze": ["a"]}),
            json!({"kind": "command", "freeze": ["a"], "thaw": "b"}),
            json!({"kind": "command", "freeze": ["a"], "thaw": [""]}),
            json!({"kind": "command", "freeze": ["a"], "thaw": ["b"], "path": "/x"}),
        ] {
            assert!(freeze(value.clone()).is_err(), "{value}");
        }
        let text = tracker(json!({"kind": "scan", "x": 1})).unwrap_err();
        assert!(text.contains("takes no \"x\""), "{text}");
    }
}
