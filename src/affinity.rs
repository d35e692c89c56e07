//! On which CPUs the threads of streams run.

use std::io;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::config::CpuList;

/// Why a list of CPUs cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum AffinityError {
    /// None of them may be used.
    #[error("no CPU of cpus = \"{list}\" is one that this process may use: it may use {usable:?}")]
    None {
        /// As it was written.
        list: CpuList,
        /// The CPUs there are for us.
        usable: Vec<usize>,
    },
    /// The kernel does not say which those are.
    #[error("cannot ask for the CPUs of this process: {0}")]
    Unknown(#[source] io::Error),
}

/// Who asks, in the words of sched_setaffinity(2).
const THIS_THREAD: Pid = Pid::from_raw(0);

/// The CPUs of the list, out of those that we may use: `None` if any will do.
pub fn chosen(list: &CpuList) -> Result<Option<CpuSet>, AffinityError> {
    if list.is_any() {
        return Ok(None);
    }
    let ours = sched_getaffinity(THIS_THREAD);
    let ours = ours.map_err(|error| AffinityError::Unknown(error.into()))?;
    let usable: Vec<_> = (0..CpuSet::count())
        .filter(|&cpu| ours.is_set(cpu).unwrap_or(false))
        .collect();
    let chosen = list.choose(&usable);
    if chosen.is_empty() {
        return Err(AffinityError::None {
            list: list.clone(),
            usable,
        });
    }
    let mut set = CpuSet::new();
    for cpu in chosen {
        // Every one of them was in a set of the same size.
        let _ = set.set(cpu);
    }
    Ok(Some(set))
}

/// Keeps the calling thread on these CPUs. They were there when they were chosen; that they have gone since
/// is no reason to fail.
pub fn keep_to(cpus: Option<CpuSet>) {
    if let Some(Err(error)) = cpus.map(|cpus| sched_setaffinity(THIS_THREAD, &cpus)) {
        tracing::warn!(%error, "a stream runs on any CPU: its affinity could not be set");
    }
}
