//! What every kind of channel must do, run over all of them; and what channel tests share.

use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{setsockopt, sockopt};

use super::fake::{FakeChannel, Script, Step};
use super::{
    BufferChannel, Channel, CommandChannel, Features, FileChannel, Flush, Patience, Shutdown,
    SocketChannel, UringChannel, WriteFlags, read_exact_into, writev_all,
};
use crate::region::{Access, Mapping, Span, SpanMut};
use crate::sys::wake::Wake;

/// Pieces and their length in the pattern: neither divides a page, and it overflows small buffers.
const PIECES: usize = 250;
const PIECE_BYTES: usize = 4194;

/// A region as another process would have it: a file, and our mapping of it.
pub(crate) struct Memory {
    pub(crate) file: File,
    pub(crate) mapping: Arc<Mapping>,
}

impl Memory {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
        file.write_all_at(bytes, 0).unwrap();
        let mapping = Mapping::new(&file, bytes.len(), Access::Read).unwrap();
        Self { file, mapping }
    }

    pub(crate) fn filled(len: usize, byte: u8) -> Self {
        Self::of(&vec![byte; len])
    }

    pub(crate) fn fill(&self, byte: u8) {
        self.fill_part(byte, 0, self.mapping.len());
    }

    pub(crate) fn fill_part(&self, byte: u8, offset: usize, len: usize) {
        self.file
            .write_all_at(&vec![byte; len], offset as u64)
            .unwrap();
    }

    pub(crate) fn truncate(&self, len: u64) {
        self.file.set_len(len).unwrap();
    }

    pub(crate) fn all(&self) -> Span<'_> {
        self.mapping.span(0, self.mapping.len()).unwrap()
    }
}

/// A patience that outlasts every test that is not about it.
pub(crate) fn patience() -> Patience {
    Patience {
        stall_timeout: Duration::from_secs(60),
        wake: Wake::new().unwrap(),
    }
}

/// Bytes that differ from piece to piece and from place to place.
pub(crate) fn pattern(len: usize) -> Vec<u8> {
    let byte = |i: usize| u8::try_from((i / PIECE_BYTES + i * 7) % 251).unwrap();
    (0..len).map(byte).collect()
}

pub(crate) fn read_all(channel: &mut dyn Channel, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let mut spans: Vec<_> = bytes
        .chunks_mut(PIECE_BYTES)
        .map(SpanMut::of_slice)
        .collect();
    let whole = read_exact_into(channel, &mut spans, &mut Vec::new())?;
    assert!(whole || len == 0, "the stream ended before its first byte");
    Ok(bytes)
}

/// A connected TCP pair whose buffers are too small for any test's data.
pub(crate) fn tcp_pair(address: &str) -> (OwnedFd, OwnedFd) {
    let listener = TcpListener::bind((address, 0)).unwrap();
    setsockopt(&listener, sockopt::RcvBuf, &(32 * 1024)).unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    setsockopt(&near, sockopt::SndBuf, &(64 * 1024)).unwrap();
    let (far, _) = listener.accept().unwrap();
    (near.into(), far.into())
}

/// A connected AF_UNIX pair, as small.
pub(crate) fn unix_pair() -> (OwnedFd, OwnedFd) {
    let (near, far) = UnixStream::pair().unwrap();
    setsockopt(&near, sockopt::SndBuf, &(32 * 1024)).unwrap();
    (near.into(), far.into())
}

/// Makes the reading end of a writing one that was ended.
type Turn = Box<dyn FnOnce(Box<dyn Channel>) -> Box<dyn Channel>>;

/// The two ends of a fresh channel.
enum Ends {
    /// Both at once.
    Live(Box<dyn Channel>, Box<dyn Channel>),
    /// First written and ended, then turned into its reading end.
    Turn(Box<dyn Channel>, Turn),
}

impl Ends {
    fn sockets((near, far): (OwnedFd, OwnedFd)) -> Self {
        Self::Live(
            Box::new(SocketChannel::new(near, patience(), true).unwrap()),
            Box::new(SocketChannel::new(far, patience(), false).unwrap()),
        )
    }

    fn tcp_v4() -> Self {
        Self::sockets(tcp_pair("127.0.0.1"))
    }

    fn tcp_v6() -> Self {
        Self::sockets(tcp_pair("::1"))
    }

    fn uring((near, far): (OwnedFd, OwnedFd)) -> Self {
        Self::Live(
            Box::new(UringChannel::new(near, patience(), Vec::new()).unwrap()),
            Box::new(SocketChannel::new(far, patience(), false).unwrap()),
        )
    }

    fn tcp_v4_uring() -> Self {
        Self::uring(tcp_pair("127.0.0.1"))
    }

    fn tcp_v6_uring() -> Self {
        Self::uring(tcp_pair("::1"))
    }

    fn unix() -> Self {
        Self::sockets(unix_pair())
    }

    fn pipe() -> Self {
        let (from, to) = nix::unistd::pipe().unwrap();
        Self::Live(
            Box::new(FileChannel::writing(to, patience()).unwrap()),
            Box::new(FileChannel::reading(from, patience()).unwrap()),
        )
    }

    fn file() -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        let to = file.reopen().unwrap();
        let writer = FileChannel::writing(to.into(), patience()).unwrap();
        Self::Turn(
            Box::new(writer),
            Box::new(move |_| {
                let from = file.reopen().unwrap();
                Box::new(FileChannel::reading(from.into(), patience()).unwrap())
            }),
        )
    }

    fn buffer() -> Self {
        let buffer = BufferChannel::new(16 << 20).unwrap();
        Self::Turn(Box::new(buffer), Box::new(|buffer| buffer))
    }

    fn command() -> Self {
        // Takes everything before it answers, so that writing first and reading then cannot block.
        let argv = ["sh", "-c", "f=$(mktemp) && cat >$f && cat $f; rm $f"];
        let command = CommandChannel::spawn(&argv, patience()).unwrap();
        Self::Turn(Box::new(command), Box::new(|command| command))
    }

    fn fake() -> Self {
        let (writer, reader) = FakeChannel::new(Script {
            steps: (1..40).map(|n| Step::Take(n * 1000)).collect(),
            ..Script::default()
        });
        Self::Turn(Box::new(writer), Box::new(|_| Box::new(reader)))
    }

    /// Writes with `write`, ends the stream, and reads with `read`, at the same time where possible.
    fn run<T: Send>(
        self,
        write: impl FnOnce(&mut dyn Channel) + Send,
        read: impl FnOnce(&mut dyn Channel) -> T + Send,
    ) -> T {
        match self {
            Self::Live(mut writer, mut reader) => thread::scope(|scope| {
                scope.spawn(move || {
                    write(&mut *writer);
                    writer.shutdown(Shutdown::Write).unwrap();
                });
                read(&mut *reader)
            }),
            Self::Turn(mut writer, turn) => {
                write(&mut *writer);
                writer.shutdown(Shutdown::Write).unwrap();
                read(&mut *turn(writer))
            }
        }
    }

    fn writer(self) -> Box<dyn Channel> {
        match self {
            Self::Live(writer, reader) => {
                // The peer stays, so that only the channel itself can refuse.
                std::mem::forget(reader);
                writer
            }
            Self::Turn(writer, _) => writer,
        }
    }
}

fn the_pattern_arrives_whole(ends: Ends) {
    let bytes = pattern(PIECES * PIECE_BYTES);
    let got = ends.run(
        |writer| {
            let spans: Vec<_> = bytes.chunks(PIECE_BYTES).map(Span::of_slice).collect();
            writev_all(writer, &spans, WriteFlags::NONE).unwrap();
        },
        |reader| read_all(reader, bytes.len()).unwrap(),
    );
    assert!(got == bytes);
}

fn the_pattern_arrives_whole_with_zero_copy_where_it_is_offered(ends: Ends) {
    let bytes = pattern(PIECES * PIECE_BYTES);
    let memory = Memory::of(&bytes);
    let got = ends.run(
        |writer| {
            let piece = |i| memory.mapping.span(i * PIECE_BYTES, PIECE_BYTES).unwrap();
            let spans: Vec<_> = (0..PIECES).map(piece).collect();
            if writer.features().contains(Features::WRITE_ZERO_COPY) {
                writev_all(writer, &spans, WriteFlags::ZERO_COPY).unwrap();
                assert!(writer.flush().unwrap().sends > 0);
                assert_eq!(writer.flush().unwrap(), Flush::NOTHING_OWED);
                memory.fill(0);
            } else {
                let refused = writer.writev(&spans, &[], WriteFlags::ZERO_COPY);
                assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::Unsupported);
                writev_all(writer, &spans, WriteFlags::NONE).unwrap();
            }
        },
        |reader| read_all(reader, bytes.len()).unwrap(),
    );
    assert!(got == bytes);
}

fn an_end_before_the_first_byte_is_no_error(ends: Ends) {
    let ended = ends.run(
        |_| {},
        |reader| {
            assert!(reader.wait_readable(Duration::from_secs(60)).unwrap());
            let mut byte = [0];
            read_exact_into(reader, &mut [SpanMut::of_slice(&mut byte)], &mut Vec::new()).unwrap()
        },
    );
    assert!(!ended);
}

fn an_end_in_the_middle_is_an_error(ends: Ends) {
    let bytes = pattern(1000);
    let error = ends.run(
        |writer| writev_all(writer, &[Span::of_slice(&bytes)], WriteFlags::NONE).unwrap(),
        |reader| read_all(reader, 1001).unwrap_err(),
    );
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert!(error.to_string().contains("1000 bytes"), "{error}");
}

fn a_source_that_was_truncated_is_an_error_and_not_a_signal(ends: Ends) {
    let memory = Memory::filled(8192, 1);
    memory.truncate(0);
    let error = ends
        .writer()
        .writev(&[memory.all()], &[], WriteFlags::NONE)
        .unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
}

fn descriptors_are_refused_before_anything_is_written(ends: Ends) {
    let memory = Memory::filled(10, 1);
    let got = ends.run(
        |writer| {
            let fds = [memory.file.as_fd()];
            if !writer.features().contains(Features::FD_PASS) {
                let refused = writer.writev(&[memory.all()], &fds, WriteFlags::NONE);
                assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::Unsupported);
            }
            let refused = writer.writev(&[memory.all()], &fds, WriteFlags::ZERO_COPY);
            assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidInput);
            let ownerless = [Span::of_slice(b"x")];
            let refused = writer.writev(&ownerless, &[], WriteFlags::ZERO_COPY);
            assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidInput);
            writev_all(writer, &[Span::of_slice(b"end")], WriteFlags::NONE).unwrap();
        },
        |reader| read_all(reader, 3).unwrap(),
    );
    assert_eq!(got, b"end");
}

fn nothing_lent_is_nothing_owed(ends: Ends) {
    let mut writer = ends.writer();
    assert_eq!(writer.flush().unwrap(), Flush::NOTHING_OWED);
    writev_all(&mut *writer, &[Span::of_slice(b"copied")], WriteFlags::NONE).unwrap();
    assert_eq!(writer.flush().unwrap(), Flush::NOTHING_OWED);
}

macro_rules! suite {
    ($($kind:ident)*) => { $(
        mod $kind {
            suite!(@tests $kind:
                the_pattern_arrives_whole
                the_pattern_arrives_whole_with_zero_copy_where_it_is_offered
                an_end_before_the_first_byte_is_no_error
                an_end_in_the_middle_is_an_error
                a_source_that_was_truncated_is_an_error_and_not_a_signal
                descriptors_are_refused_before_anything_is_written
                nothing_lent_is_nothing_owed
            );
        }
    )* };
    (@tests $kind:ident: $($claim:ident)*) => { $(
        #[test]
        fn $claim() {
            super::$claim(super::Ends::$kind());
        }
    )* };
}

suite!(tcp_v4 tcp_v6 tcp_v4_uring tcp_v6_uring unix pipe file buffer command fake);
