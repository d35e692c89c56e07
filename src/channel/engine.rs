//! Zero-copy engines: which there are, which of them work here, and the channel that uses one.
//!
//! What a kernel can do is tried, not read off its version: opcodes are listed by kernels that refuse
//! their flags, seccomp and sysctls forbid what was compiled in.

use std::fmt;
use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::within_host;
use super::{Channel, Features, Patience, SocketChannel, UringChannel, WriteFlags, writev_all};
use crate::limits::PAGE_BYTES;
use crate::region::Region;
use crate::sys::errqueue;
use crate::sys::wake::Wake;

/// A way to send without copying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// `MSG_ZEROCOPY` and the socket's error queue.
    MsgZerocopy,
    /// io_uring `SEND_ZC`.
    IoUring,
    /// io_uring with registered buffers.
    IoUringFixed,
}

impl Engine {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::MsgZerocopy, Self::IoUring, Self::IoUringFixed];

    /// Those that need no consent, best first. `SEND_ZC` takes a little less CPU per byte than
    /// `MSG_ZEROCOPY` where nothing is copied (0.34 to 0.42 s per GiB, `docs/zero-copy.md`), and its
    /// notices use up no `net.core.optmem_max`. Registered buffers pin the whole Region: only on request.
    const BEST: [Self; 2] = [Self::IoUring, Self::MsgZerocopy];

    /// The word for it in TOML, QMP and status.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MsgZerocopy => "msg-zerocopy",
            Self::IoUring => "io-uring",
            Self::IoUringFixed => "io-uring-fixed",
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How long each step of a trial may take.
const TRIAL_TIMEOUT: Duration = Duration::from_secs(2);

/// What a trial of an engine showed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trial {
    /// The kernel says of each send whether it was copied after all: it did so in the trial, which goes
    /// over loopback.
    pub reports_copies: bool,
}

/// A channel, and how it lends.
#[derive(Debug)]
pub struct Opened {
    /// The channel.
    pub channel: Box<dyn Channel>,
    /// What it lends with; nothing if it cannot lend.
    pub engine: Option<Engine>,
    /// Why it is not what was asked for; empty if it is.
    pub note: String,
    /// It does not leave this host, where kernels copy what is lent: to see that, little need be lent.
    pub within_host: bool,
}

/// What to lend with: found out before the first stream is opened, since a trial may take its time.
#[derive(Debug, Clone)]
pub struct Choice {
    wanted: Option<Engine>,
    /// Those that work, best first.
    engines: Vec<Engine>,
    /// Why it is not what was asked for.
    notes: Vec<String>,
}

impl Choice {
    /// The engine that is `wanted` and what has to do for it, or the best ones that work here. Blocks: for some
    /// milliseconds once per process, and for seconds while nothing gets through on loopback.
    #[must_use]
    pub fn of(wanted: Option<Engine>) -> Self {
        let (mut engines, mut notes) = (Vec::new(), Vec::new());
        let others = Engine::BEST
            .into_iter()
            .filter(|engine| Some(*engine) != wanted);
        for engine in wanted.into_iter().chain(others) {
            match tried(engine) {
                // Without the report nobody would notice that everything is copied.
                Ok(trial) if wanted.is_none() && !trial.reports_copies => {}
                Ok(_) => engines.push(engine),
                Err(refusal) if wanted.is_some() => notes.push(format!("{engine}: {refusal}")),
                Err(_) => {}
            }
            if !engines.is_empty() && wanted.is_some() {
                break;
            }
        }
        Self {
            wanted,
            engines,
            notes,
        }
    }
}

/// A channel over the connected socket `fd` that lends as was chosen, or not at all if nothing works. `regions`
/// are what it will send; `share` is what it may have pinned at once, in bytes, if that is little.
pub fn open(
    fd: OwnedFd,
    patience: Patience,
    choice: &Choice,
    regions: Vec<Arc<Region>>,
    share: Option<usize>,
) -> io::Result<Opened> {
    let mut fd = fd;
    let mut notes = Vec::new();
    let is_tcp = matches!(
        errqueue::family(fd.as_fd())?,
        libc::AF_INET | libc::AF_INET6
    );
    let within_host = is_tcp && within_host::is(fd.as_fd());
    if is_tcp {
        notes.extend(share.map(|share| {
            let share = share / 1024;
            format!("the memlock limit leaves this stream {share} KiB, so sends are small")
        }));
        notes.extend_from_slice(&choice.notes);
    }
    for &engine in choice.engines.iter().filter(|_| is_tcp) {
        let regions = match engine {
            // What follows does that.
            Engine::MsgZerocopy => break,
            Engine::IoUring => Vec::new(),
            Engine::IoUringFixed => regions.clone(),
        };
        match UringChannel::new(fd, patience.clone(), regions) {
            Ok(mut channel) => {
                share
                    .into_iter()
                    .try_for_each(|share| channel.limit_loans(share))?;
                return Ok(Opened {
                    channel: Box::new(channel),
                    engine: Some(engine),
                    note: notes.join("; "),
                    within_host,
                });
            }
            Err((back, error)) => {
                fd = back;
                if choice.wanted.is_some() {
                    notes.push(format!("{engine}: {error}"));
                }
            }
        }
    }
    let mut channel = SocketChannel::new(fd, patience, true)?;
    share
        .into_iter()
        .try_for_each(|share| channel.limit_loans(share))?;
    notes.extend(channel.zero_copy_refusal().map(str::to_owned));
    let lends = channel.features().contains(Features::WRITE_ZERO_COPY);
    Ok(Opened {
        channel: Box::new(channel),
        engine: lends.then_some(Engine::MsgZerocopy),
        note: notes.join("; "),
        within_host,
    })
}

/// The trial of an engine. Made once per process, unless nothing got through, which says nothing about the engine.
fn tried(engine: Engine) -> Result<Trial, String> {
    static TRIALS: [OnceLock<Result<Trial, String>>; 3] = [const { OnceLock::new() }; 3];
    let known = &TRIALS[engine as usize];
    if let Some(known) = known.get() {
        return known.clone();
    }
    match trial(engine) {
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Err(format!(
            "it could not be tried, since nothing gets through on loopback: {error}"
        )),
        tried => {
            let tried = tried.map_err(|error| error.to_string());
            known.get_or_init(|| tried).clone()
        }
    }
}

/// Sends a page over TCP to ourselves by `engine`, and waits until it is back.
pub fn trial(engine: Engine) -> io::Result<Trial> {
    let file = File::from(memfd_create(c"memferry-trial", MFdFlags::MFD_CLOEXEC)?);
    let page = vec![1; usize::try_from(PAGE_BYTES).unwrap_or(4096)];
    std::os::unix::fs::FileExt::write_all_at(&file, &page, 0)?;
    let name = "trial".parse().map_err(io::Error::other)?;
    let region = Region::from_descriptor(name, file.into()).map_err(io::Error::other)?;
    let region = Arc::new(region);
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let near = TcpStream::connect_timeout(&listener.local_addr()?, TRIAL_TIMEOUT)?;
    let near = OwnedFd::from(near);
    let (_far, _) = listener.accept()?;
    let patience = Patience {
        stall_timeout: TRIAL_TIMEOUT,
        wake: Wake::new()?,
    };
    let lend = |channel: &mut dyn Channel| {
        let span = region.mapping().span(0, page.len());
        let span = span.ok_or(io::ErrorKind::InvalidData)?;
        let flags = WriteFlags::ZERO_COPY.with(WriteFlags::REGISTERED);
        writev_all(channel, &[span], flags)?;
        channel.flush()
    };
    if engine == Engine::MsgZerocopy {
        let mut channel = SocketChannel::new(near, patience, true)?;
        if let Some(refusal) = channel.zero_copy_refusal() {
            return Err(io::Error::other(refusal.to_owned()));
        }
        let flush = lend(&mut channel)?;
        return Ok(Trial {
            reports_copies: flush.all_copied(),
        });
    }
    let regions = match engine {
        Engine::IoUringFixed => vec![Arc::clone(&region)],
        _ => Vec::new(),
    };
    let mut channel =
        UringChannel::new(near, patience, regions).map_err(|(_, error)| explained(error))?;
    let flush = lend(&mut channel).map_err(explained)?;
    if engine == Engine::IoUringFixed && channel.registered_bytes() == 0 {
        let why = channel.zero_copy_trouble(false).unwrap_or_default();
        return Err(io::Error::other(why));
    }
    Ok(Trial {
        reports_copies: flush.all_copied(),
    })
}

/// What an error of a ring means to an operator.
fn explained(error: io::Error) -> io::Error {
    let text = match error.raw_os_error() {
        Some(libc::EPERM) => {
            "io_uring is forbidden here (kernel.io_uring_disabled, or a seccomp filter)"
        }
        Some(libc::ENOSYS) => "this kernel has no io_uring",
        Some(libc::EINVAL) => "this kernel's io_uring is too old (Linux 6.1 is needed)",
        Some(libc::ENOMEM) => "the memlock limit is used up",
        _ => return error,
    };
    io::Error::other(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::suite::{patience, tcp_pair, unix_pair};

    #[test]
    fn every_engine_works_on_this_kernel() {
        for engine in Engine::ALL {
            assert!(trial(engine).unwrap().reports_copies, "{engine}");
        }
    }

    #[test]
    fn what_is_asked_for_is_opened_and_a_unix_socket_lends_nothing() {
        for engine in Engine::ALL {
            let (near, _far) = tcp_pair("127.0.0.1");
            let choice = Choice::of(Some(engine));
            let opened = open(near, patience(), &choice, Vec::new(), None).unwrap();
            assert_eq!((opened.engine, opened.note.as_str()), (Some(engine), ""));
        }
        let best = Choice::of(None);
        let opened = open(tcp_pair("::1").0, patience(), &best, Vec::new(), None).unwrap();
        assert_eq!(opened.engine, Some(Engine::IoUring));
        let (near, _far) = unix_pair();
        let choice = Choice::of(Some(Engine::IoUring));
        let opened = open(near, patience(), &choice, Vec::new(), None).unwrap();
        assert_eq!(opened.engine, None);
        assert!(opened.note.contains("AF_UNIX"), "{}", opened.note);
    }
}
