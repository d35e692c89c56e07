//! How the scheduler treats a thread among others of the same priority.
#![allow(unsafe_code)] // `sched_setattr` has no wrapper in nix.

use std::io;

use nix::errno::Errno;
use nix::sys::prctl;

/// How long a thread runs before another one has its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slice {
    /// As short as the kernel has it: for threads that run for a moment and are waited for. From Linux 6.12
    /// on such a thread, when it wakes up, need not wait for the end of the slice of another; it gets no
    /// more of a CPU for it. Before, this changes nothing.
    Short,
    /// What every thread has, unless the one that started it has another.
    Usual,
}

impl Slice {
    /// Nanoseconds; 0 is for the kernel to choose.
    fn nanoseconds(self) -> u64 {
        match self {
            Self::Short => 100_000,
            Self::Usual => 0,
        }
    }
}

/// Has the calling thread, and those it starts, run in slices of that length.
pub fn set_slice(slice: Slice) -> io::Result<()> {
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
    attr.sched_runtime = slice.nanoseconds();
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

/// While it lives, the sleeps of its thread end when they should; otherwise the kernel may let them last 50 us
/// longer, to end several at once. See PR_SET_TIMERSLACK in prctl(2).
#[derive(Debug)]
pub struct Punctual {
    /// Nanoseconds; `None`: it cannot be changed.
    before: Option<u64>,
    /// It is the thread's that made it.
    _stays: std::marker::PhantomData<*const ()>,
}

impl Punctual {
    /// From now on, for the calling thread.
    #[must_use]
    pub fn begin() -> Self {
        let before = prctl::get_timerslack().ok();
        let before = before.and_then(|slack| u64::try_from(slack).ok());
        let _ = prctl::set_timerslack(1);
        Self {
            before,
            _stays: std::marker::PhantomData,
        }
    }
}

impl Drop for Punctual {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            let _ = prctl::set_timerslack(before);
        }
    }
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
            set_slice(Slice::Short).unwrap();
            set_slice(Slice::Usual).unwrap();
            assert_eq!(nice().as_deref(), Some("3"));
        };
        let thread = std::thread::Builder::new().name("sched".into());
        thread.spawn(run).unwrap().join().unwrap();
    }
}
