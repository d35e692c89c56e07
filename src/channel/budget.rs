//! How much memory may be pinned: what is known before the first send.

use std::fs;
use std::sync::OnceLock;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

/// A share of the limit that needs no care: more than a socket ever queues (`net.ipv4.tcp_wmem` is 4 MiB).
const ENOUGH_BYTES: u64 = 8 * 1024 * 1024;

/// Bytes this user may pin in all (`RLIMIT_MEMLOCK`), if that is limited. `CAP_IPC_LOCK` lifts the limit.
/// If it cannot be found out, nothing is limited beforehand: the kernel says when it refuses.
#[must_use]
pub fn memlock_limit() -> Option<u64> {
    // Others may change a limit at any time; what a process is capable of, only itself, and this one does not.
    static IS_LIMITED: OnceLock<bool> = OnceLock::new();
    if !IS_LIMITED.get_or_init(|| !has_ipc_lock().unwrap_or(true)) {
        return None;
    }
    let (soft, _) = getrlimit(Resource::RLIMIT_MEMLOCK).ok()?;
    (soft != RLIM_INFINITY).then_some(soft)
}

fn has_ipc_lock() -> Option<bool> {
    const CAP_IPC_LOCK: u32 = 14;
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = u64::from_str_radix(line?.trim(), 16).ok()?;
    Some(capabilities & (1 << CAP_IPC_LOCK) != 0)
}

/// What each of `streams` may have pinned, in bytes, if `limit` is too small to be left to the socket.
#[must_use]
pub fn share(limit: Option<u64>, streams: u16) -> Option<usize> {
    let share = limit? / u64::from(streams.max(1));
    usize::try_from(share).ok().filter(|_| share < ENOUGH_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_tight_limit_is_shared_out() {
        assert_eq!(share(None, 4), None);
        assert_eq!(share(Some(64 << 20), 4), None);
        assert_eq!(share(Some(1 << 20), 4), Some(256 << 10));
        assert_eq!(share(Some(4 << 20), 0), Some(4 << 20));
    }
}
