//! With the writer in another process, as it is in earnest. What is mapped where is also nobody else's
//! business there, so memory can be unmapped without meeting another test's.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, ChildStdout, Command, Stdio};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::tests::{Writer, code, harvest, own};
use super::*;
use crate::region::{Access, Mapping};
use crate::sys::scm;

/// A writer in another process: this very test binary, told by lines on its standard input.
struct OtherProcess {
    child: Child,
    answers: BufReader<ChildStdout>,
    tracker: PagemapTracker,
}

const OTHER_PROCESS: &str = "MEMFERRY_TEST_WRITER_SOCKET";
const OTHER_PROCESS_PAGES: u64 = 1024;

impl OtherProcess {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "dirty::pagemap::process_tests::other_process",
                "--nocapture",
            ])
            .env(OTHER_PROCESS, &path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let (socket, _) = listener.accept().unwrap();
        poll(
            &mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)],
            PollTimeout::NONE,
        )
        .unwrap();
        let mut address = [0; 8];
        let mut fds = scm::receive(socket.as_fd(), &mut address)
            .unwrap()
            .fds
            .into_iter();
        let (pagemap, uffd) = (fds.next().unwrap(), fds.next().unwrap());
        let bytes = OTHER_PROCESS_PAGES * PAGE_BYTES;
        let address = u64::from_ne_bytes(address);
        let mut tracker = PagemapTracker::new(pagemap, uffd, address, bytes).unwrap();
        tracker.arm().unwrap();
        Self {
            child,
            answers,
            tracker,
        }
    }

    /// Has it do something, and waits until it has.
    fn tell(&mut self, what: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{what}").unwrap();
        let mut line = String::new();
        while !line.ends_with("done\n") {
            line.clear();
            assert!(self.answers.read_line(&mut line).unwrap() > 0, "it ended");
        }
    }
}

impl Drop for OtherProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Not a test by itself: the other side of [`OtherProcess`].
#[test]
fn other_process() {
    let Some(path) = std::env::var_os(OTHER_PROCESS) else {
        return;
    };
    let writer = Writer::new(OTHER_PROCESS_PAGES);
    let socket = UnixStream::connect(path).unwrap();
    let pagemap = own();
    let fds = [pagemap.as_raw_fd(), writer.uffd.as_fd().as_raw_fd()];
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[io::IoSlice::new(&writer.address().to_ne_bytes())],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::empty(),
        None,
    )
    .unwrap();
    let mut writer = Some(writer);
    for line in io::stdin().lines() {
        let line = line.unwrap();
        match line.split_once(' ') {
            Some(("write", page)) => writer.as_ref().unwrap().write(page.parse().unwrap()),
            _ if line == "unmap" => drop(writer.take()),
            _ if line == "map" => {
                // The kernel gives the highest gap, which is where the old mapping was; what counts
                // is that something is there which is not tracked.
                let old = writer.take().unwrap();
                let file = old.file.try_clone().unwrap();
                let len = old.mapping.len();
                drop(old);
                std::mem::forget(Mapping::new(&file, len, Access::Write).unwrap());
            }
            _ => panic!("{line}"),
        }
        println!("done");
    }
}

#[test]
fn writes_of_another_process_are_seen() {
    let mut other = OtherProcess::start();
    assert!(harvest(&mut other.tracker).is_empty());
    other.tell("write 5");
    other.tell("write 1023");
    assert_eq!(harvest(&mut other.tracker), [5, 1023]);
    assert!(harvest(&mut other.tracker).is_empty());
}

#[test]
fn memory_that_was_unmapped_or_mapped_anew_is_blind_not_clean() {
    for what in ["unmap", "map"] {
        let mut other = OtherProcess::start();
        other.tell("write 5");
        other.tell(what);
        let mut owed = PageSet::empty(OTHER_PROCESS_PAGES);
        assert_eq!(
            code(other.tracker.harvest(&mut owed)),
            "tracker-blind",
            "{what}"
        );
        assert_eq!(
            code(other.tracker.check_coverage()),
            "tracker-blind",
            "{what}"
        );
    }
}

#[test]
fn a_writer_that_died_is_gone_not_clean() {
    let mut other = OtherProcess::start();
    other.tell("write 5");
    other.child.kill().unwrap();
    other.child.wait().unwrap();
    let mut owed = PageSet::empty(OTHER_PROCESS_PAGES);
    assert_eq!(code(other.tracker.harvest(&mut owed)), "writer-gone");
    assert_eq!(code(other.tracker.check_coverage()), "writer-gone");
    assert_eq!(code(other.tracker.arm()), "writer-gone");
}
