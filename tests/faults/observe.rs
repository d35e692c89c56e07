//! What a process costs and holds, as /proc and the kernel's clocks tell it.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// CPU time of all threads of a process, ended ones too.
pub(crate) fn cpu(pid: i32) -> Duration {
    let clock = clock_getcpuclockid(Pid::from_raw(pid)).unwrap();
    clock_gettime(clock).unwrap().into()
}

/// Threads and descriptors of a process.
#[derive(Debug, Clone)]
pub(crate) struct Footprint {
    threads: Vec<String>,
    /// How many of each kind.
    descriptors: BTreeMap<String, usize>,
}

impl Footprint {
    pub(crate) fn of(pid: i32) -> Self {
        let threads = entries(pid, "task");
        // A thread may end while we look.
        let names = threads
            .iter()
            .filter_map(|task| fs::read_to_string(format!("{task}/comm")).ok());
        // The runtime keeps idle threads of its pool for a while; they belong to no transfer.
        let threads = names.filter(|name| !name.starts_with("tokio")).collect();
        let mut descriptors = BTreeMap::new();
        let own_pagemap = format!("/proc/{pid}/pagemap");
        for descriptor in entries(pid, "fd") {
            if let Ok(target) = fs::read_link(descriptor) {
                let target = target.to_string_lossy();
                // "socket:[123]": every socket is of one kind, whatever its number.
                let kind = target.split_once(":[").map_or(&*target, |(kind, _)| kind);
                *descriptors.entry(kind.to_owned()).or_default() += 1;
            }
        }
        // Opened once, with the first transfer, and kept.
        if let Some(count) = descriptors.get_mut(&own_pagemap) {
            *count -= 1;
        }
        Self {
            threads,
            descriptors,
        }
    }

    /// Whether it holds no more than `before` did. Less is no leak: who connected before may be gone.
    pub(crate) fn is_within(&self, before: &Self) -> bool {
        let had = |kind| before.descriptors.get(kind).copied().unwrap_or(0);
        self.threads.len() <= before.threads.len()
            && self
                .descriptors
                .iter()
                .all(|(kind, &count)| count <= had(kind))
    }
}

fn entries(pid: i32, directory: &str) -> Vec<String> {
    let directory = format!("/proc/{pid}/{directory}");
    fs::read_dir(directory)
        .unwrap()
        .flatten()
        .map(|entry| entry.path().to_string_lossy().into_owned())
        .collect()
}
