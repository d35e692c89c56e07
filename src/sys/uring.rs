//! An io_uring ring for zero-copy sends: one at a time, which may take several goes; its notice later.
//!
//! A send answers twice (io_uring_enter(2), `IORING_OP_SEND_ZC`): first with its result, and, if that
//! said `F_MORE`, later with a notice that the kernel has let go of the memory. Whether a notice follows
//! is told by `F_MORE` alone: failed sends may owe one, too.
//!
//! The ring is `SINGLE_ISSUER | DEFER_TASKRUN`. It belongs to the thread that first uses it, and notices
//! arrive only inside `io_uring_enter` with `GETEVENTS`: every function here that waits or collects makes
//! that call. Nothing here decides what may be sent or reused.
#![allow(unsafe_code)] // The submission queue and registration take raw memory; each one argued below.

use std::io;
use std::mem::{ManuallyDrop, align_of, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};

use super::msg::{Gather, empty_header};
use super::wake::Wake;
use crate::region::Mapping;

/// Not exported by the crate; from `linux/io_uring.h`.
const IORING_RECVSEND_FIXED_BUF: u16 = 1 << 2;
const IORING_SEND_ZC_REPORT_USAGE: u16 = 1 << 3;
const IORING_NOTIF_USAGE_ZC_COPIED: u32 = 1 << 31;
const IORING_ENTER_GETEVENTS: u32 = 1;
/// `io_uring_sqe.buf_index`, in units of two bytes. The crate sets it for `SendZc` only.
const SQE_BUF_INDEX: usize = 40 / size_of::<u16>();
const _: () = assert!(size_of::<squeue::Entry>() == 64);
const _: () = assert!(align_of::<squeue::Entry>() >= align_of::<u16>());

/// Sends that may be prepared at once: ours, and the watch on the wake.
const SUBMISSIONS: u32 = 4;

/// `user_data` of the watch on the wake. Sends are numbered modulo 2^32, so none has it.
const WAKE: u64 = u64::MAX;

/// Longest piece of one span in a send, in bytes; the kernel's own limit is below 2^31.
const SEND_BYTES_MAX: u32 = 1 << 30;

/// Longest buffer the kernel registers, in bytes.
pub const BUFFER_BYTES_MAX: usize = 1 << 30;

/// Most buffers one ring takes (`IORING_MAX_REG_BUFFERS`).
pub const BUFFERS_MAX: usize = 1 << 14;

/// One answer of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completion {
    /// The result of send `id`: bytes, or an error number.
    Sent {
        /// Which send.
        id: u32,
        /// Bytes taken, or the error number.
        result: Result<usize, i32>,
        /// A [`Completion::Released`] for it will follow: the memory is on loan until then.
        owed: bool,
    },
    /// The kernel has let go of the memory of send `id`.
    Released {
        /// Which send.
        id: u32,
        /// It was copied after all, as far as the kernel says (see [`Ring::reports_usage`]). Means
        /// nothing for a send that failed.
        copied: bool,
    },
}

/// How one send is to be made.
#[derive(Debug, Clone, Copy)]
pub struct Sending {
    /// Its number, which comes back with its answers.
    pub id: u32,
    /// The registered buffer that all of it is inside of.
    pub buffer: Option<u16>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Belongs to nobody yet.
    New,
    /// Belongs to the thread that used it first.
    Enabled,
    /// The kernel did not take an entry. It may still point to a message that is gone, so the ring is
    /// never entered again.
    Broken,
}

/// A ring, and the buffers registered with it.
pub struct Ring {
    ring: ManuallyDrop<IoUring>,
    wake: Wake,
    state: State,
    reports_usage: bool,
    kept: bool,
    /// What is registered stays mapped as long as the ring knows it.
    registered: Vec<Arc<Mapping>>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("state", &self.state)
            .field("reports_usage", &self.reports_usage)
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// A ring with room for the answers of `sends` sends on loan, two each; its waits end when `wake`
    /// does. Needs Linux 6.1; older ones answer `EINVAL`, a forbidding `kernel.io_uring_disabled` `EPERM`.
    pub fn new(sends: u32, wake: &Wake) -> io::Result<Self> {
        let ring = IoUring::builder()
            // Disabled until its first use, which makes that thread the one it belongs to.
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_submit_all()
            .setup_cqsize(sends * 2)
            .build(SUBMISSIONS)?;
        if !ring.params().is_feature_nodrop() || !ring.params().is_feature_submit_stable() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self {
            ring: ManuallyDrop::new(ring),
            wake: wake.clone(),
            state: State::New,
            reports_usage: true,
            kept: false,
            registered: Vec::new(),
        })
    }

    /// Whether notices say if the kernel copied. Linux 6.1 cannot; it is found out by the first send.
    #[must_use]
    pub fn reports_usage(&self) -> bool {
        self.reports_usage
    }

    /// From now on sends do not ask for usage reports, which this kernel refuses.
    pub fn without_usage(&mut self) {
        self.reports_usage = false;
    }

    /// Begins to send all of `gather`, and waits up to `timeout` for an answer, of this send or an earlier
    /// one. The kernel goes on with it as the socket gets room, whenever the ring is waited on; it takes
    /// less only where the connection ends. One send at a time: two on one socket may change places.
    ///
    /// Its last packet buffer is closed (`MSG_EOR`): since Linux 6.10 a send that continues the buffer of
    /// the one before, and adds none of its own, is reported as copied although nothing was.
    ///
    /// The caller keeps the memory mapped until the send's [`Completion::Released`].
    pub fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        gather: &Gather<'_>,
        sending: Sending,
        timeout: Duration,
    ) -> io::Result<()> {
        self.enable()?;
        let usage = if self.reports_usage {
            IORING_SEND_ZC_REPORT_USAGE
        } else {
            0
        };
        let socket = Fd(socket.as_raw_fd());
        let flags = libc::MSG_WAITALL | libc::MSG_EOR | libc::MSG_NOSIGNAL;
        let mut header = empty_header();
        let entry = match gather.entries() {
            [only] => {
                let len = u32::try_from(only.iov_len)
                    .unwrap_or(u32::MAX)
                    .min(SEND_BYTES_MAX);
                opcode::SendZc::new(socket, only.iov_base.cast_const().cast(), len)
                    .buf_index(sending.buffer)
                    .flags(flags)
                    .zc_flags(usage)
                    .build()
            }
            several => {
                header.msg_iov = several.as_ptr().cast_mut();
                header.msg_iovlen = several.len();
                let fixed = sending.buffer.map_or(0, |_| IORING_RECVSEND_FIXED_BUF);
                let entry = opcode::SendMsgZc::new(socket, &raw const header)
                    .ioprio(usage | fixed)
                    .flags(flags.cast_unsigned())
                    .build();
                sending
                    .buffer
                    .map_or_else(|| entry.clone(), |index| with_buffer(entry.clone(), index))
            }
        };
        let entry = entry.user_data(u64::from(sending.id));
        let timeout = Timespec::from(timeout);
        let args = SubmitArgs::new().timespec(&timeout);
        // SAFETY: header and iovec are read while the call below submits the entry (`SUBMIT_STABLE`,
        // checked in `new`), and live longer. The payload is a Gather's: mapped for the call, and beyond
        // it the kernel holds its own references to the pages; that nobody reuses or unregisters them
        // before the release is kept by the channel's loans.
        unsafe { self.ring.submission().push(&entry) }.map_err(|_| io::ErrorKind::QuotaExceeded)?;
        loop {
            match self.ring.submitter().submit_with_args(1, &args) {
                Ok(_) => return Ok(()),
                // An error says that nothing was submitted: what went wrong behind that is not told. So
                // the call that is not interrupted submits the entry, which is never pushed twice.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.state = State::Broken;
                    return Err(error);
                }
            }
        }
    }

    /// Runs what the kernel has deferred, so that [`Ring::take`] sees all notices there are. Never waits.
    pub fn collect(&mut self) -> io::Result<()> {
        self.enable()?;
        // SAFETY: nothing is submitted and no argument is passed.
        match unsafe {
            self.ring
                .submitter()
                .enter::<libc::sigset_t>(0, 0, IORING_ENTER_GETEVENTS, None)
        } {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }

    /// Waits for an answer, the wake, or `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<()> {
        self.enable()?;
        let timeout = Timespec::from(timeout);
        let args = SubmitArgs::new().timespec(&timeout);
        match self.ring.submitter().submit_with_args(1, &args) {
            Err(error)
                if error.raw_os_error() != Some(libc::ETIME)
                    && error.kind() != io::ErrorKind::Interrupted =>
            {
                Err(error)
            }
            _ => Ok(()),
        }
    }

    /// The next answer that is there.
    pub fn take(&mut self) -> Option<Completion> {
        loop {
            let entry = self.ring.completion().next()?;
            let Ok(id) = u32::try_from(entry.user_data()) else {
                continue; // The wake: whoever waits looks at it.
            };
            let result = entry.result();
            return Some(if cqueue::notif(entry.flags()) {
                Completion::Released {
                    id,
                    copied: result.cast_unsigned() & IORING_NOTIF_USAGE_ZC_COPIED != 0,
                }
            } else {
                Completion::Sent {
                    id,
                    result: usize::try_from(result).map_err(|_| -result),
                    owed: cqueue::more(entry.flags()),
                }
            });
        }
    }

    /// Registers parts of `mapping`, each offset and length in bytes, at most [`BUFFER_BYTES_MAX`] long:
    /// pins them, and gives them numbers from 0 on. Once per ring.
    ///
    /// The kernel wants writable memory of no file system on a disk (`EFAULT`), and room under the memlock
    /// limit (`ENOMEM`). Holes among the parts would be filled.
    pub fn register(&mut self, parts: &[(Arc<Mapping>, usize, usize)]) -> io::Result<()> {
        self.enable()?;
        let mut buffers = Vec::with_capacity(parts.len());
        for (mapping, offset, len) in parts {
            let span = mapping
                .span(*offset, *len)
                .ok_or(io::ErrorKind::InvalidInput)?;
            buffers.push(libc::iovec {
                iov_base: span.base().cast_mut().cast(),
                iov_len: span.len(),
            });
        }
        // SAFETY: every buffer is inside a mapping that `registered` keeps mapped as long as the ring; the
        // kernel only reads them, since nothing but sends uses them.
        unsafe { self.ring.submitter().register_buffers(&buffers) }?;
        for (mapping, ..) in parts {
            if !self
                .registered
                .iter()
                .any(|held| Arc::ptr_eq(held, mapping))
            {
                self.registered.push(Arc::clone(mapping));
            }
        }
        Ok(())
    }

    /// Has the ring, and what is registered with it, stay until the process ends: sends may still use it.
    pub fn keep(&mut self) {
        self.kept = true;
        std::mem::forget(std::mem::take(&mut self.registered));
    }

    /// Makes the ring this thread's, and has it watch the wake, at first use.
    pub fn enable(&mut self) -> io::Result<()> {
        match self.state {
            State::Enabled => return Ok(()),
            State::Broken => return Err(io::Error::other("the io_uring ring is broken")),
            State::New => {}
        }
        self.ring.submitter().register_enable_rings()?;
        self.state = State::Enabled;
        let wake = Fd(self.wake.as_fd().as_raw_fd());
        let events = u32::from(libc::POLLIN.cast_unsigned());
        let watch = opcode::PollAdd::new(wake, events).build().user_data(WAKE);
        // SAFETY: the entry has no pointers, and `self.wake` keeps the descriptor open.
        unsafe { self.ring.submission().push(&watch) }.map_err(|_| io::ErrorKind::QuotaExceeded)?;
        self.ring.submit().map(|_| ())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if !self.kept {
            // SAFETY: this is the only place that drops it, and a value is dropped once.
            unsafe { ManuallyDrop::drop(&mut self.ring) };
        }
    }
}

/// `entry` with `buf_index` set, which the crate cannot do for `SendMsgZc`.
fn with_buffer(entry: squeue::Entry, index: u16) -> squeue::Entry {
    // SAFETY: an Entry is `repr(C)` over the kernel's `io_uring_sqe`: 64 bytes of integers, each bit
    // pattern valid, with the size checked above; the kernel fixes the place of `buf_index`.
    unsafe {
        let mut words: [u16; 32] = std::mem::transmute(entry);
        words[SQE_BUF_INDEX] = index;
        std::mem::transmute(words)
    }
}
