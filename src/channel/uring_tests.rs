//! What loans by io_uring must keep: the claims of `socket_tests`, and what is particular to a ring.

use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::socket_tests::{MUCH, SHORT, cpu_time, impatient, reset, run_under_memlock};
use super::suite::{Memory, patience, pattern, read_all, tcp_pair, unix_pair};
use super::{
    Channel, Features, Flush, Patience, Shutdown, SocketChannel, UringChannel, Woken, WriteFlags,
    writev_all,
};
use crate::region::{Region, Span, SpanMut};

const REGISTERED: WriteFlags = WriteFlags::ZERO_COPY.with(WriteFlags::REGISTERED);

fn channel(fd: OwnedFd, patience: Patience) -> UringChannel {
    UringChannel::new(fd, patience, Vec::new()).unwrap()
}

fn plain(fd: OwnedFd) -> SocketChannel {
    SocketChannel::new(fd, patience(), false).unwrap()
}

/// A channel whose peer does not read, with `memory` on loan: a send that is under way, of which the socket
/// has taken as many bytes as it does.
fn with_loans(memory: &Memory, address: &str) -> (UringChannel, OwnedFd, usize) {
    let (near, far) = tcp_pair(address);
    let mut channel = channel(near, impatient());
    let lent = channel.writev(&[memory.all()], &[], WriteFlags::ZERO_COPY);
    assert_eq!(lent.unwrap_err().kind(), io::ErrorKind::TimedOut);
    assert_eq!(channel.outstanding(), 1);
    let taken = channel.queued_bytes().unwrap();
    (channel, far, usize::try_from(taken).unwrap())
}

fn region(memory: &Memory) -> Arc<Region> {
    let fd = memory.file.try_clone().unwrap().into();
    Arc::new(Region::from_descriptor("r".parse().unwrap(), fd).unwrap())
}

#[test]
fn only_tcp_has_it_and_the_socket_comes_back() {
    let (near, far) = unix_pair();
    let (near, error) = UringChannel::new(near, patience(), Vec::new()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    let mut near = plain(near);
    writev_all(&mut near, &[Span::of_slice(b"x")], WriteFlags::NONE).unwrap();
    assert_eq!(read_all(&mut plain(far), 1).unwrap(), b"x");
    let tcp = channel(tcp_pair("127.0.0.1").0, patience());
    assert_eq!(
        tcp.features(),
        Features::SHUTDOWN.with(Features::WRITE_ZERO_COPY)
    );
}

#[test]
fn a_wake_ends_blocked_writes_and_flushes() {
    let memory = Memory::filled(MUCH, 1);
    let (near, far) = tcp_pair("127.0.0.1");
    let patience = patience();
    let wake = patience.wake.clone();
    let mut near = channel(near, patience);
    thread::scope(|scope| {
        let memory = &memory;
        let worker = scope.spawn(move || {
            let lend = WriteFlags::ZERO_COPY;
            let written = writev_all(&mut near, &[memory.all()], lend);
            assert!(Woken::is(&written.unwrap_err()));
            assert_eq!(near.outstanding(), 1);
            assert!(Woken::is(&near.flush().unwrap_err()));
        });
        // The peer's first byte says that the send has begun.
        let mut far = plain(far);
        assert!(far.wait_readable(Duration::from_secs(60)).unwrap());
        wake.wake();
        worker.join().unwrap();
    });
}

#[test]
fn a_wake_ends_a_flush_that_already_waits() {
    let memory = Memory::filled(MUCH, 1);
    let (lent, is_lent) = std::sync::mpsc::channel();
    thread::scope(|scope| {
        let memory = &memory;
        let worker = scope.spawn(move || {
            let (mut near, _far, _) = with_loans(memory, "127.0.0.1");
            near.patience_mut().stall_timeout = Duration::from_secs(60);
            lent.send(near.patience_mut().wake.clone()).unwrap();
            let before = cpu_time();
            assert!(Woken::is(&near.flush().unwrap_err()));
            assert!(cpu_time() - before < SHORT, "the wait spins");
        });
        is_lent.recv().unwrap().wake();
        worker.join().unwrap();
    });
}

#[test]
fn a_reset_fails_the_flush_with_all_memory_back_and_burns_no_cpu() {
    let memory = Memory::filled(MUCH, 1);
    for address in ["127.0.0.1", "::1"] {
        let (lent, is_lent) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            let memory = &memory;
            let waiter = scope.spawn(move || {
                let (mut near, far, _) = with_loans(memory, address);
                near.patience_mut().stall_timeout = Duration::from_secs(60);
                lent.send(far).unwrap();
                let before = cpu_time();
                let flushed = near.flush().unwrap_err();
                assert_eq!(flushed.kind(), io::ErrorKind::ConnectionReset);
                assert!(cpu_time() - before < SHORT, "the wait spins");
                assert_eq!(near.outstanding(), 0);
                assert_eq!(near.flush().unwrap(), Flush::NOTHING_OWED);
                let again = near.writev(&[memory.all()], &[], WriteFlags::ZERO_COPY);
                assert_eq!(again.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
                let read = near.readv(&[SpanMut::of_slice(&mut [0])], &mut Vec::new());
                assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
                assert_eq!(near.flush().unwrap(), Flush::NOTHING_OWED);
            });
            reset(is_lent.recv().unwrap());
            waiter.join().unwrap();
        });
        assert_eq!(Arc::strong_count(&memory.mapping), 1);
    }
}

#[test]
fn a_loan_that_never_comes_back_ends_the_flush_by_the_stall_timeout_and_stays_mapped() {
    let memory = Memory::filled(4096, 1);
    let (near, far) = tcp_pair("127.0.0.1");
    let mut near = channel(near, patience());
    near.patience_mut().stall_timeout = Duration::from_millis(500);
    writev_all(&mut near, &[memory.all()], WriteFlags::ZERO_COPY).unwrap();
    near.lend_for_ever();
    reset(far);
    let before = cpu_time();
    assert_eq!(near.flush().unwrap_err().kind(), io::ErrorKind::TimedOut);
    assert!(cpu_time() - before < SHORT, "the wait spins");
    assert_eq!(near.outstanding(), 1);
    drop(near);
    assert_eq!(Arc::strong_count(&memory.mapping), 2);
}

#[test]
fn our_own_reset_brings_the_memory_back_and_the_peer_learns_of_it() {
    let memory = Memory::filled(MUCH, 1);
    let (mut near, far, lent) = with_loans(&memory, "127.0.0.1");
    assert_eq!(near.flush().unwrap_err().kind(), io::ErrorKind::TimedOut);
    near.shutdown(Shutdown::Reset).unwrap();
    assert!(near.flush().unwrap().sends > 0);
    assert_eq!(near.outstanding(), 0);
    assert_eq!(Arc::strong_count(&memory.mapping), 1);
    let error = read_all(&mut plain(far), lent).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
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
fn a_panic_with_memory_on_loan_leaves_nothing_on_loan() {
    let memory = Memory::filled(MUCH, 1);
    let (near, _far, _) = with_loans(&memory, "127.0.0.1");
    let panicked = catch_unwind(AssertUnwindSafe(move || {
        let _near = near;
        panic!("as planned");
    }));
    assert!(panicked.is_err());
    assert_eq!(Arc::strong_count(&memory.mapping), 1);
}

#[test]
fn in_the_hands_of_another_thread_it_fails_and_keeps_the_memory_mapped() {
    let memory = Memory::filled(MUCH, 1);
    let (mut near, _far, _) = with_loans(&memory, "127.0.0.1");
    thread::scope(|scope| {
        scope.spawn(move || {
            assert!(near.flush().is_err());
            drop(near);
        });
    });
    assert_eq!(Arc::strong_count(&memory.mapping), 2);
}

#[test]
fn memory_overwritten_before_a_flush_reaches_the_peer() {
    for flags in [WriteFlags::ZERO_COPY, REGISTERED] {
        let memory = Memory::filled(MUCH, b'a');
        let region = region(&memory);
        let (near, far) = tcp_pair("127.0.0.1");
        let mut near = UringChannel::new(near, impatient(), vec![Arc::clone(&region)]).unwrap();
        let span = region.mapping().span(0, MUCH).unwrap();
        let lent = writev_all(&mut near, &[span], flags);
        assert_eq!(lent.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(near.flush().unwrap_err().kind(), io::ErrorKind::TimedOut);
        let taken = usize::try_from(near.queued_bytes().unwrap()).unwrap();
        memory.fill(b'b');
        near.patience_mut().stall_timeout = Duration::from_secs(60);
        thread::scope(|scope| {
            let reader = scope.spawn(move || read_all(&mut plain(far), MUCH).unwrap());
            // The send is still under way, and goes on.
            near.flush().unwrap();
            let got = reader.join().unwrap();
            assert!(got[..taken].contains(&b'b'), "the pages were not on loan");
            assert!(got[taken..].iter().all(|&byte| byte == b'b'));
        });
    }
}

#[test]
fn memory_overwritten_after_a_flush_never_reaches_the_peer() {
    let bytes = pattern(MUCH);
    for (address, flags) in [("127.0.0.1", WriteFlags::ZERO_COPY), ("::1", REGISTERED)] {
        let memory = Memory::of(&bytes);
        let region = region(&memory);
        let (near, far) = tcp_pair(address);
        let mut near = UringChannel::new(near, patience(), vec![Arc::clone(&region)]).unwrap();
        let mut far = plain(far);
        thread::scope(|scope| {
            let reader = scope.spawn(move || read_all(&mut far, MUCH).unwrap());
            let mut sends = Flush::NOTHING_OWED;
            for offset in (0..MUCH).step_by(MUCH / 8) {
                let span = region.mapping().span(offset, MUCH / 8).unwrap();
                writev_all(&mut near, &[span], flags).unwrap();
                let flush = near.flush().unwrap();
                memory.fill_part(0xff, offset, MUCH / 8);
                assert!(flush.all_copied(), "loopback copies: {flush:?}");
                sends.sends += flush.sends;
                sends.copied += flush.copied;
            }
            assert!(reader.join().unwrap() == bytes);
            assert_eq!(near.released(), sends);
        });
        let registered = if flags == REGISTERED { MUCH as u64 } else { 0 };
        assert_eq!(near.registered_bytes(), registered);
    }
}

#[test]
fn a_source_truncated_under_a_loan_is_an_error_and_counts_no_send() {
    let memory = Memory::filled(1 << 20, 1);
    memory.truncate(0);
    let mut near = channel(tcp_pair("127.0.0.1").0, patience());
    let error = near
        .writev(&[memory.all()], &[], WriteFlags::ZERO_COPY)
        .unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    assert_eq!(near.flush().unwrap(), Flush::NOTHING_OWED);
    assert_eq!(near.outstanding(), 0);
}

#[test]
fn thousands_of_small_loans_come_back_each_once_and_in_order() {
    const SENDS: usize = 3000;
    let bytes = pattern(SENDS * 100);
    let memory = Memory::of(&bytes);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (far, _) = listener.accept().unwrap();
    let (mut near, mut far) = (channel(near.into(), patience()), plain(far.into()));
    thread::scope(|scope| {
        let memory = &memory;
        let writer = scope.spawn(move || {
            let mut most = 0;
            for n in 0..SENDS {
                let span = memory.mapping.span(n * 100, 100).unwrap();
                writev_all(&mut near, &[span], WriteFlags::ZERO_COPY).unwrap();
                most = most.max(near.outstanding());
            }
            let flush = near.flush().unwrap();
            assert_eq!(flush.sends, SENDS as u64);
            most
        });
        assert!(read_all(&mut far, SENDS * 100).unwrap() == bytes);
        let most = writer.join().unwrap();
        assert!((1..=512).contains(&most), "{most}");
    });
}

#[test]
fn spans_inside_outside_and_across_registered_memory_arrive_whole() {
    // Data, a hole, data: registered are only the two ends.
    let part = 256 * 1024;
    let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
    let data = pattern(part);
    file.set_len(3 * part as u64).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &data, 0).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &data, 2 * part as u64).unwrap();
    let whole = [data.clone(), vec![0; part], data].concat();
    let blocks = file.metadata().unwrap().blocks();
    let region = Region::from_descriptor("r".parse().unwrap(), file.try_clone().unwrap().into());
    let region = Arc::new(region.unwrap());
    let (near, far) = tcp_pair("127.0.0.1");
    let mut near = UringChannel::new(near, patience(), vec![Arc::clone(&region)]).unwrap();
    let mut far = plain(far);
    // Unaligned pieces: pairs inside a part, one across its end, one in the hole, unregistered memory.
    let other = Memory::filled(5000, 7);
    let cuts = [
        (13, 4096),
        (part - 100, 50),
        (part - 50, 99),
        (part + 4096, 8192),
        (2 * part, part),
    ];
    let mut spans: Vec<_> = cuts
        .iter()
        .map(|(offset, len)| region.mapping().span(*offset, *len).unwrap())
        .collect();
    spans.push(other.all());
    let mut wanted: Vec<u8> = cuts
        .iter()
        .flat_map(|(offset, len)| whole[*offset..offset + len].to_vec())
        .collect();
    wanted.extend([7; 5000]);
    let read = region.mapping().span(0, 1).unwrap();
    thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let first = read_all(&mut far, 1).unwrap();
            (first, read_all(&mut far, wanted.len()).unwrap() == wanted)
        });
        writev_all(&mut near, &[read], REGISTERED).unwrap();
        assert_eq!(near.registered_bytes(), 2 * part as u64);
        assert_eq!(
            file.metadata().unwrap().blocks(),
            blocks,
            "the hole was filled"
        );
        writev_all(&mut near, &spans, REGISTERED).unwrap();
        near.flush().unwrap();
        let (first, same) = reader.join().unwrap();
        assert!(first == whole[..1] && same);
    });
    assert_eq!(near.zero_copy_trouble(false), None);
}

#[test]
fn what_cannot_be_registered_is_sent_unregistered_and_said() {
    let bytes = pattern(100_000);
    let on_disk = tempfile::tempfile_in(std::env::current_dir().unwrap()).unwrap();
    let sealed = File::from(
        memfd_create(c"test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap(),
    );
    for file in [&on_disk, &sealed] {
        std::os::unix::fs::FileExt::write_all_at(file, &bytes, 0).unwrap();
    }
    fcntl(
        &sealed,
        FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_FUTURE_WRITE),
    )
    .unwrap();
    for file in [on_disk, sealed] {
        let region = Region::from_descriptor("r".parse().unwrap(), file.into()).unwrap();
        let region = Arc::new(region);
        let (near, far) = tcp_pair("127.0.0.1");
        let mut near = UringChannel::new(near, patience(), vec![Arc::clone(&region)]).unwrap();
        let mut far = plain(far);
        thread::scope(|scope| {
            let reader = scope.spawn(move || read_all(&mut far, 100_000).unwrap());
            let span = region.mapping().span(0, bytes.len()).unwrap();
            writev_all(&mut near, &[span], REGISTERED).unwrap();
            assert!(near.flush().unwrap().sends > 0);
            assert!(reader.join().unwrap() == bytes);
        });
        let trouble = near.zero_copy_trouble(false).unwrap();
        assert!(trouble.contains("unregistered"), "{trouble}");
    }
}

/// What the test below starts again as another user.
const HELPER: &str = "channel::uring_tests::sends_under_a_small_memlock_limit";

#[test]
#[ignore = "a part of the test below, which runs it as a user who may pin little, in CI too"]
fn sends_under_a_small_memlock_limit() {
    let bytes = pattern(MUCH);
    let memory = Memory::of(&bytes);
    let region = region(&memory);
    for (flags, regions) in [
        (WriteFlags::ZERO_COPY, Vec::new()),
        (REGISTERED, vec![Arc::clone(&region)]),
    ] {
        let (near, far) = tcp_pair("127.0.0.1");
        let mut near = UringChannel::new(near, patience(), regions).unwrap();
        let mut far = plain(far);
        thread::scope(|scope| {
            let reader = scope.spawn(move || read_all(&mut far, MUCH).unwrap());
            let span = region.mapping().span(0, MUCH).unwrap();
            writev_all(&mut near, &[span], flags).unwrap();
            assert!(near.flush().unwrap().sends > 0);
            assert!(reader.join().unwrap() == bytes);
        });
        println!("copied-by-us={}", near.copied_by_us_bytes());
        let trouble = near.zero_copy_trouble(false).unwrap();
        assert!(trouble.contains("memlock"), "{trouble}");
    }
}

#[test]
fn a_small_memlock_limit_splits_or_copies_and_says_so() {
    for limit_bytes in [64 * 1024, 512 * 1024, 1024 * 1024] {
        let Some(text) = run_under_memlock(HELPER, limit_bytes) else {
            return;
        };
        println!("{limit_bytes}: {text}");
    }
}
