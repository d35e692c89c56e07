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

/// Threads and descriptors of a process, by kind.
#[derive(Debug, Clone)]
pub(crate) struct Footprint {
    threads: BTreeMap<String, usize>,
    descriptors: BTreeMap<String, usize>,
}

impl Footprint {
    pub(crate) fn of(pid: i32) -> Self {
        let mut threads = BTreeMap::new();
        for task in entries(pid, "task") {
            // A thread may end while we look.
            let name = fs::read_to_string(format!("{task}/comm")).unwrap_or_default();
            // The runtime keeps idle threads of its pool for a while; they belong to no transfer.
            if !name.is_empty() && !name.starts_with("tokio") {
                *threads.entry(name.trim().to_owned()).or_default() += 1;
            }
        }
        let mut descriptors = BTreeMap::new();
        for descriptor in entries(pid, "fd") {
            if let Ok(target) = fs::read_link(descriptor) {
                let target = target.to_string_lossy();
                // "socket:[123]": every socket is of one kind, whatever its number.
                let kind = target.split_once(":[").map_or(&*target, |(kind, _)| kind);
                *descriptors.entry(kind.to_owned()).or_default() += 1;
            }
        }
        Self {
            threads,
            descriptors,
        }
    }
}

impl Footprint {
    /// Whether it holds no more than `before` did. Less is no leak: who connected before may be gone.
    pub(crate) fn is_within(&self, before: &Self) -> bool {
        let no_more = |now: &BTreeMap<String, usize>, before: &BTreeMap<String, usize>| {
            now.iter()
                .all(|(kind, count)| before.get(kind).is_some_and(|before| count <= before))
        };
        no_more(&self.threads, &before.threads) && no_more(&self.descriptors, &before.descriptors)
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
