//! A configuration against the machine it is on: what would not stop a daemon, but surprise its operator.

use std::fmt;
use std::path::Path;

use super::error::{ConfigError, Problem, Warning};
use super::keys::Document;
use super::region::FreezeConfig;
use super::units::{Rate, Size};
use crate::freeze::{Cgroup, Process};

use super::{
    ControlConfig, ReceiverConfig, SenderConfig, ZeroCopyMode, load, parse_receiver, parse_sender,
};
use crate::channel::memlock_limit;

/// What `memferry check FILE` says about a file without mistakes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// "sender" or "receiver".
    pub kind: &'static str,
    /// What the daemon would do, one short line each.
    pub lines: Vec<String>,
    /// What its operator may want to know.
    pub warnings: Vec<Warning>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "a {} configuration without mistakes", self.kind)?;
        for line in &self.lines {
            writeln!(f, "  {line}")?;
        }
        for warning in &self.warnings {
            writeln!(f, "warning: {warning}")?;
        }
        Ok(())
    }
}

/// Reads a file of either kind; which one it is shows from its tables.
pub fn check_file(path: &Path) -> Result<Report, ConfigError> {
    load(path, |document| {
        if is_receiver(document)? {
            let (config, mut warnings) = parse_receiver(document)?;
            warnings.extend(receiver_warnings(&config));
            Ok(receiver_report(&config, warnings))
        } else {
            let (config, mut warnings) = parse_sender(document)?;
            warnings.extend(sender_warnings(&config));
            Ok(sender_report(&config, warnings))
        }
    })
}

fn is_receiver(document: &Document<'_>) -> Result<bool, ConfigError> {
    let sender = ["transfer", "region"]
        .into_iter()
        .find(|name| document.has(name));
    match (sender, document.has("receive")) {
        (None, true) => Ok(true),
        (Some(_), false) => Ok(false),
        (Some(name), true) => Err(ConfigError::new(Problem::KindUnclear(format!(
            "[{name}] belongs to a sender and [receive] to a receiver: each has a file of its own"
        )))),
        (None, false) => Err(ConfigError::new(Problem::KindUnclear(
            "neither a sender's nor a receiver's: add [transfer] or [receive], which may be empty"
                .to_owned(),
        ))),
    }
}

fn sender_report(config: &SenderConfig, warnings: Vec<Warning>) -> Report {
    let transfer = &config.transfer;
    let mut lines = vec![
        control_line(&config.control),
        format!(
            "{} streams, zero copy {}, packets of {}, window {}, bandwidth {}, integrity {}",
            transfer.streams,
            transfer.zero_copy.as_str(),
            Size(transfer.packet_size),
            Size(transfer.window),
            match transfer.max_bandwidth {
                0 => "unlimited".to_owned(),
                rate => Rate(rate).to_string(),
            },
            transfer.integrity.as_str(),
        ),
    ];
    lines.extend(config.regions.iter().map(|region| {
        format!(
            "region {}: {}, tracker {}, freeze {}",
            region.name,
            region.path.display(),
            region.tracker,
            region.freeze
        )
    }));
    Report {
        kind: "sender",
        lines,
        warnings,
    }
}

fn receiver_report(config: &ReceiverConfig, warnings: Vec<Warning>) -> Report {
    let receive = &config.receive;
    let listen: Vec<_> = receive.listen.iter().map(ToString::to_string).collect();
    Report {
        kind: "receiver",
        lines: vec![
            control_line(&config.control),
            format!("listens on {}", listen.join(", ")),
            format!(
                "regions of up to {} appear in {}, huge pages {}",
                Size(receive.max_region),
                receive.directory.display(),
                receive.huge_pages.as_str()
            ),
            match receive.numa_node {
                Some(node) => format!("memory from NUMA node {node}"),
                None => "memory from any NUMA node".to_owned(),
            },
        ],
        warnings,
    }
}

fn control_line(control: &ControlConfig) -> String {
    format!(
        "control socket {} for uids {:?} and gids {:?}",
        control.socket.display(),
        control.allow_uids,
        control.allow_gids
    )
}

pub(super) fn sender_warnings(config: &SenderConfig) -> Vec<Warning> {
    let mut warnings = Vec::new();
    warnings.extend(socket_warning(&config.control));
    warnings.extend(missing("state.directory", &config.state.directory));
    warnings.extend(missing(
        "state.runtime-directory",
        &config.state.runtime_directory,
    ));
    for region in &config.regions {
        let key = format!("region {}", region.name);
        warnings.extend(missing(&key, &region.path));
        warnings.extend(freeze_warning(&key, &region.freeze));
    }
    let transfer = &config.transfer;
    if transfer.zero_copy != ZeroCopyMode::Off {
        let lent = u64::from(transfer.streams) * transfer.window;
        warnings.extend(memlock_warning(lent, memlock_limit()));
    }
    warnings
}

pub(super) fn receiver_warnings(config: &ReceiverConfig) -> Vec<Warning> {
    let mut warnings = Vec::new();
    warnings.extend(socket_warning(&config.control));
    warnings.extend(missing("state.directory", &config.state.directory));
    warnings.extend(missing(
        "state.runtime-directory",
        &config.state.runtime_directory,
    ));
    warnings.extend(missing("receive.directory", &config.receive.directory));
    let refused = config.receive.check_numa_node().err();
    warnings.extend(refused.map(|error| Warning(format!("receive.numa-node: {error}"))));
    warnings
}

/// What would be found when the Region is added, or not before the freeze.
fn freeze_warning(key: &str, freeze: &FreezeConfig) -> Option<Warning> {
    let refused = match freeze {
        FreezeConfig::None | FreezeConfig::Client => None,
        FreezeConfig::Pid(pid) => Process::open(*pid).err(),
        FreezeConfig::Cgroup(path) => Cgroup::open(path).err(),
        FreezeConfig::Command(commands) => {
            let programs = [&commands.freeze, &commands.thaw, &commands.done];
            let mut programs = programs.into_iter().filter_map(|argv| argv.first());
            // A name without a slash is looked for in the daemon's own PATH.
            return programs.find_map(|program| {
                program
                    .contains('/')
                    .then(|| missing(key, program.as_ref()))?
            });
        }
    };
    refused.map(|error| Warning(format!("{key}: {error}")))
}

fn socket_warning(control: &ControlConfig) -> Option<Warning> {
    missing("control.socket", control.socket.parent()?)
}

fn missing(key: &str, path: &Path) -> Option<Warning> {
    let missing = matches!(path.try_exists(), Ok(false));
    missing.then(|| Warning(format!("{key}: {} does not exist", path.display())))
}

/// `lent` is streams × window: the most that can be on loan to the kernel, which pins it.
fn memlock_warning(lent: u64, limit: Option<u64>) -> Option<Warning> {
    let limit = limit.filter(|limit| *limit < lent)?;
    Some(Warning(format!(
        "the memlock limit of this process ({}) is below streams × window ({}): zero-copy sends will be refused by the \
         kernel and copied instead. Raise it (LimitMEMLOCK=infinity in the unit, ulimit -l), or lower \
         transfer.window",
        Size(limit),
        Size(lent)
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_low_memlock_limit_is_told_with_the_setting_to_look_at() {
        let text = memlock_warning(64 << 20, Some(8 << 20)).unwrap().0;
        assert!(text.contains("8MiB") && text.contains("64MiB") && text.contains("LimitMEMLOCK"));
        assert_eq!(memlock_warning(64 << 20, Some(64 << 20)), None);
        assert_eq!(memlock_warning(64 << 20, None), None);
    }

    #[test]
    fn only_what_is_missing_is_told() {
        assert_eq!(missing("x", Path::new("/")), None);
        assert!(missing("x", Path::new("/nonexistent/y")).is_some());
    }
}
