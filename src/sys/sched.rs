//! How the scheduler treats a thread among others of the same priority.
#![allow(unsafe_code)] // `sched_setattr` has no wrapper in nix.

use std::io;

use nix::errno::Errno;

/// What a thread that moves much asks for, in nanoseconds. The default is around 3 ms.
const LONG_SLICE_NS: u64 = 20_000_000;

/// Has the calling thread run in long slices. It gets as much of a CPU as before, in fewer pieces; and a
/// thread that wakes up for a moment, such as one that answers a client, need not wait for the end of a
/// piece: from Linux 6.12 on it goes first. Before, this changes nothing.
pub fn run_in_long_slices() -> io::Result<()> {
    // SAFETY: all zeros is a valid `sched_attr`: plain integers.
    let mut attr: libc::sched_attr = unsafe { std::mem::zeroed() };
    let bytes = u32::try_from(size_of::<libc::sched_attr>()).map_err(|_| Errno::EINVAL)?;
    let (this_thread, no_flags) = (0, 0);
    // SAFETY: the kernel writes at most `bytes` bytes to `attr`, which has as many.
    let read = unsafe {
        libc::syscall(
            libc::SYS_sched_getattr,
            this_thread,
            &raw mut attr,
            bytes,
            no_flags,
        )
    };
    Errno::result(read)?;
    // The rest, such as a nice value, stays what it is.
    attr.sched_runtime = LONG_SLICE_NS;
    // SAFETY: the kernel only reads `attr`, whose length is stated in it.
    let set = unsafe {
        libc::syscall(
            libc::SYS_sched_setattr,
            this_thread,
            &raw const attr,
            no_flags,
        )
    };
    Errno::result(set)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slice_changes_and_the_nice_value_does_not() {
        let nice = || {
            // The 19th field; the name in the second one has no blank here.
            let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
            stat.split(' ').nth(18).map(str::to_owned)
        };
        let run = move || {
            // SAFETY: the call takes an integer, and changes this thread alone.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 3) };
            run_in_long_slices().unwrap();
            assert_eq!(nice().as_deref(), Some("3"));
        };
        let thread = std::thread::Builder::new().name("sched".into());
        thread.spawn(run).unwrap().join().unwrap();
    }
}
