//! What only sockets do: loans, resets, waits that end, descriptors that travel.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{setsockopt, sockopt};
use nix::time::{ClockId, clock_gettime};

use super::suite::{Memory, patience, pattern, read_all, tcp_pair, unix_pair};
use super::{
    Channel, Features, Flush, Patience, Shutdown, SocketChannel, Woken, WriteFlags, writev_all,
};
use crate::region::{Span, SpanMut};

/// More than the buffers of both ends hold.
pub(super) const MUCH: usize = 8 << 20;

pub(super) const SHORT: Duration = Duration::from_millis(50);

pub(super) fn impatient() -> Patience {
    Patience {
        stall_timeout: SHORT,
        ..patience()
    }
}

fn channel(fd: OwnedFd, patience: Patience) -> SocketChannel {
    SocketChannel::new(fd, patience, true).unwrap()
}

/// A channel whose peer does not read, with as much of `memory` on loan as the socket takes.
fn with_loans(memory: &Memory, address: &str) -> (SocketChannel, OwnedFd, usize) {
    let (near, far) = tcp_pair(address);
    let mut channel = channel(near, impatient());
    let mut lent = 0;
    loop {
        match channel.writev(&[memory.all().skip(lent)], &[], WriteFlags::ZERO_COPY) {
            Ok(bytes) => lent += bytes,
            Err(error) if error.kind() == io::ErrorKind::TimedOut => break,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(channel.outstanding() > 0);
    (channel, far, lent)
}

/// Ends the connection by RST.
pub(super) fn reset(far: OwnedFd) {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&far, sockopt::Linger, &linger).unwrap();
    drop(far);
}

/// CPU time of this thread.
pub(super) fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .unwrap()
        .into()
}

#[test]
fn features_say_what_the_socket_can_do() {
    let tcp = channel(tcp_pair("127.0.0.1").0, patience());
    assert_eq!(
        tcp.features(),
        Features::SHUTDOWN.with(Features::WRITE_ZERO_COPY)
    );
    assert_eq!(tcp.zero_copy_refusal(), None);
    let unix = channel(unix_pair().0, patience());
    assert_eq!(unix.features(), Features::SHUTDOWN.with(Features::FD_PASS));
    assert!(unix.zero_copy_refusal().unwrap().contains("AF_UNIX"));
    let plain = SocketChannel::new(tcp_pair("::1").0, patience(), false).unwrap();
    assert_eq!(
        (plain.features(), plain.zero_copy_refusal()),
        (Features::SHUTDOWN, None)
    );
}

#[test]
fn three_descriptors_travel_and_are_distinct_and_usable() {
    let (near, far) = unix_pair();
    let (mut near, mut far) = (channel(near, patience()), channel(far, patience()));
    let files: Vec<File> = (0..3u8)
        .map(|i| {
            let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
            file.write_all_at(&[i], 0).unwrap();
            file
        })
        .collect();
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let empty = near.writev(&[], &fds, WriteFlags::NONE).unwrap_err();
    assert_eq!(empty.kind(), io::ErrorKind::InvalidInput);
    assert_eq!(
        near.writev(&[Span::of_slice(b"abc")], &fds, WriteFlags::NONE)
            .unwrap(),
        3
    );
    let mut came = Vec::new();
    let mut bytes = [0; 8];
    assert_eq!(
        far.readv(&[SpanMut::of_slice(&mut bytes)], &mut came)
            .unwrap(),
        3
    );
    let mut numbers: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
    numbers.extend(came.iter().map(AsRawFd::as_raw_fd));
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), 6);
    for (i, fd) in came.into_iter().enumerate() {
        let mut byte = [9];
        File::from(fd).read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(usize::from(byte[0]), i);
    }
}

#[test]
fn the_peers_shutdown_wakes_a_blocked_reader() {
    for (near, far) in [tcp_pair("127.0.0.1"), tcp_pair("::1"), unix_pair()] {
        let (mut near, mut far) = (channel(near, patience()), channel(far, patience()));
        let reader = thread::spawn(move || {
            far.readv(&[SpanMut::of_slice(&mut [0])], &mut Vec::new())
                .unwrap()
        });
        near.shutdown(Shutdown::Write).unwrap();
        assert_eq!(reader.join().unwrap(), 0);
    }
}

#[test]
fn a_wake_ends_blocked_writes_reads_and_flushes() {
    let memory = Memory::filled(MUCH, 1);
    for pair in [tcp_pair("127.0.0.1"), unix_pair()] {
        let (near, _far) = pair;
        let patience = patience();
        let wake = patience.wake.clone();
        let mut near = channel(near, patience);
        let lends = near.features().contains(Features::WRITE_ZERO_COPY);
        let (full, is_full) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            let memory = &memory;
            let worker = scope.spawn(move || {
                let flags = if lends {
                    WriteFlags::ZERO_COPY
                } else {
                    WriteFlags::NONE
                };
                // The first write fills the socket, so the rest blocks.
                let written = near.writev(&[memory.all()], &[], flags).unwrap();
                full.send(()).unwrap();
                let rest = writev_all(&mut near, &[memory.all().skip(written)], flags);
                assert!(Woken::is(&rest.unwrap_err()));
                let read = near.readv(&[SpanMut::of_slice(&mut [0])], &mut Vec::new());
                assert!(Woken::is(&read.unwrap_err()));
                assert!(Woken::is(
                    &near.wait_readable(Duration::from_secs(60)).unwrap_err()
                ));
                if near.outstanding() > 0 {
                    assert!(Woken::is(&near.flush().unwrap_err()));
                }
            });
            is_full.recv().unwrap();
            wake.wake();
            worker.join().unwrap();
        });
    }
}

#[test]
fn a_peer_that_does_not_read_ends_the_write_by_the_stall_timeout() {
    for (near, _far) in [tcp_pair("127.0.0.1"), unix_pair()] {
        let mut near = channel(near, impatient());
        let bytes = vec![1; MUCH];
        let error = writev_all(&mut near, &[Span::of_slice(&bytes)], WriteFlags::NONE).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(error.to_string().contains("not acknowledged"), "{error}");
    }
}

#[test]
fn a_silent_peer_is_not_readable_and_ends_a_read_by_the_stall_timeout() {
    let (near, _far) = tcp_pair("127.0.0.1");
    let mut near = channel(near, impatient());
    assert!(!near.wait_readable(Duration::ZERO).unwrap());
    assert!(!near.wait_readable(SHORT).unwrap());
    let error = near
        .readv(&[SpanMut::of_slice(&mut [0])], &mut Vec::new())
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
}

#[test]
fn a_reset_fails_the_flush_at_once_with_all_memory_back_and_burns_no_cpu() {
    let memory = Memory::filled(MUCH, 1);
    for address in ["127.0.0.1", "::1"] {
        let (mut near, far, _) = with_loans(&memory, address);
        near.patience_mut().stall_timeout = Duration::from_secs(60);
        let before = cpu_time();
        let waiter = thread::scope(|scope| {
            let near = &mut near;
            let waiter = scope.spawn(move || {
                let before = cpu_time();
                (near.flush(), cpu_time() - before)
            });
            reset(far);
            waiter.join().unwrap()
        });
        assert_eq!(waiter.0.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert!(waiter.1 < SHORT && cpu_time() - before < SHORT);
        assert_eq!(near.outstanding(), 0);
        assert_eq!(Arc::strong_count(&memory.mapping), 1);
        assert_eq!(near.flush().unwrap(), Flush::NOTHING_OWED);
        let again = near
            .writev(&[memory.all()], &[], WriteFlags::ZERO_COPY)
            .unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::ConnectionReset);
        let read = near
            .readv(&[SpanMut::of_slice(&mut [0])], &mut Vec::new())
            .unwrap_err();
        assert_eq!(read.kind(), io::ErrorKind::ConnectionReset);
    }
}

#[test]
fn a_loan_missing_on_a_dead_socket_ends_the_flush_by_the_stall_timeout_without_spinning() {
    for ours in [false, true] {
        let (near, far) = tcp_pair("127.0.0.1");
        let mut near = channel(near, patience());
        near.patience_mut().stall_timeout = Duration::from_millis(500);
        near.lend_for_ever();
        if ours {
            near.shutdown(Shutdown::Reset).unwrap();
        } else {
            reset(far);
        }
        let before = cpu_time();
        assert_eq!(near.flush().unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(cpu_time() - before < SHORT, "the wait spins");
        assert_eq!(near.outstanding(), 1);
        near.patience_mut().wake.wake();
        assert!(Woken::is(&near.flush().unwrap_err()));
    }
}

#[test]
fn our_own_reset_brings_the_memory_back_and_the_peer_learns_of_it() {
    let memory = Memory::filled(MUCH, 1);
    for address in ["127.0.0.1", "::1"] {
        let (mut near, far, lent) = with_loans(&memory, address);
        assert_eq!(near.flush().unwrap_err().kind(), io::ErrorKind::TimedOut);
        near.shutdown(Shutdown::Reset).unwrap();
        near.shutdown(Shutdown::Reset).unwrap();
        assert!(near.flush().unwrap().sends > 0);
        assert_eq!(near.outstanding(), 0);
        assert_eq!(Arc::strong_count(&memory.mapping), 1);
        let mut far = channel(far, patience());
        let error = read_all(&mut far, lent).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}

#[test]
fn a_dropped_channel_takes_its_memory_back_first() {
    let memory = Memory::filled(MUCH, 1);
    let (near, _far, _) = with_loans(&memory, "127.0.0.1");
    assert_eq!(Arc::strong_count(&memory.mapping), 2);
    drop(near);
    assert_eq!(Arc::strong_count(&memory.mapping), 1);
}

#[test]
fn memory_overwritten_before_a_flush_reaches_the_peer() {
    let memory = Memory::filled(MUCH, b'a');
    let (mut near, far, lent) = with_loans(&memory, "127.0.0.1");
    assert_eq!(near.flush().unwrap_err().kind(), io::ErrorKind::TimedOut);
    memory.fill(b'b');
    let mut far = channel(far, patience());
    let got = read_all(&mut far, lent).unwrap();
    assert!(got.contains(&b'b'), "the pages were not on loan");
    near.flush().unwrap();
}

#[test]
fn memory_overwritten_after_a_flush_never_reaches_the_peer() {
    let bytes = pattern(MUCH);
    for address in ["127.0.0.1", "::1"] {
        let memory = Memory::of(&bytes);
        let (near, far) = tcp_pair(address);
        let (mut near, mut far) = (channel(near, patience()), channel(far, patience()));
        thread::scope(|scope| {
            let reader = scope.spawn(move || read_all(&mut far, MUCH).unwrap());
            let mut sends = Flush::NOTHING_OWED;
            for offset in (0..MUCH).step_by(MUCH / 8) {
                let span = memory.mapping.span(offset, MUCH / 8).unwrap();
                writev_all(&mut near, &[span], WriteFlags::ZERO_COPY).unwrap();
                let flush = near.flush().unwrap();
                memory.fill_part(0xff, offset, MUCH / 8);
                assert!(flush.all_copied(), "loopback copies: {flush:?}");
                sends.sends += flush.sends;
                sends.copied += flush.copied;
            }
            assert!(reader.join().unwrap() == bytes);
            assert_eq!(near.released(), sends);
        });
    }
}

#[test]
fn a_source_truncated_under_a_loan_is_an_error() {
    let memory = Memory::filled(1 << 20, 1);
    memory.truncate(0);
    let mut near = channel(tcp_pair("127.0.0.1").0, patience());
    let error = near
        .writev(&[memory.all()], &[], WriteFlags::ZERO_COPY)
        .unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    assert_eq!(near.flush().unwrap(), Flush::NOTHING_OWED);
}

/// What the test below starts again as another user.
const HELPER: &str = "channel::socket_tests::sends_under_a_small_memlock_limit";

#[test]
#[ignore = "a part of the test below, which runs it as a user who may pin little, in CI too"]
fn sends_under_a_small_memlock_limit() {
    let bytes = pattern(MUCH);
    let memory = Memory::of(&bytes);
    let (near, far) = tcp_pair("127.0.0.1");
    let (mut near, mut far) = (channel(near, patience()), channel(far, patience()));
    thread::scope(|scope| {
        let reader = scope.spawn(move || read_all(&mut far, MUCH).unwrap());
        writev_all(&mut near, &[memory.all()], WriteFlags::ZERO_COPY).unwrap();
        let flush = near.flush().unwrap();
        assert!(reader.join().unwrap() == bytes);
        assert!(flush.sends > 0);
        println!("copied-by-us={}", near.copied_by_us_bytes());
    });
}

/// Runs the ignored test `helper` as a user of its own who may pin `limit_bytes`; its output.
pub(super) fn run_under_memlock(helper: &str, limit_bytes: usize) -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can become a user with a memlock limit");
        return None;
    }
    // By descriptor: the other user may not be able to walk to the file.
    let exe = File::open(std::env::current_exe().unwrap()).unwrap();
    nix::fcntl::fcntl(
        &exe,
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
    )
    .unwrap();
    // The limit is per user, so a user of its own: another run must not use it up.
    static USERS: AtomicU32 = AtomicU32::new(0);
    let user = 2_000_000_000 + std::process::id() * 8 + USERS.fetch_add(1, Ordering::Relaxed);
    let output = Command::new("prlimit")
        .arg(format!("--memlock={limit_bytes}"))
        .args(["setpriv", "--clear-groups", "--regid=65534"])
        .arg(format!("--reuid={user}"))
        .arg(format!("/proc/self/fd/{}", exe.as_raw_fd()))
        .args([helper, "--exact", "--ignored", "--nocapture"])
        .current_dir("/")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Some(text.into_owned())
}

#[test]
fn a_small_memlock_limit_splits_or_copies_and_says_so() {
    for (limit_bytes, copied) in [(8 * 1024, MUCH), (512 * 1024, 0)] {
        let Some(text) = run_under_memlock(HELPER, limit_bytes) else {
            return;
        };
        assert!(
            text.contains(&format!("copied-by-us={copied}\n")),
            "{limit_bytes}: {text}"
        );
    }
}
