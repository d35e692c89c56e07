//! The durable records of a hand-over, killed before each of its writes: whatever is left behind, the
//! writer either runs, or a record says that it may have another owner.
#![allow(
    clippy::unwrap_used,
    reason = "also the helpers of a test end it by a panic"
)]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use common::{DEADLINE, Stage, Writer, skip};
use memferry::freeze::{Freezer, Process, Writers};
use memferry::guardian::{self, Asked, Guardian};
use memferry::journal::{CommitSent, Journal, boot_id};
use memferry::wire::Hex128;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Tells the child where to keep its records, and whom to stop.
const DIRECTORY: &str = "MEMFERRY_TEST_DIRECTORY";
const WRITER: &str = "MEMFERRY_TEST_WRITER";

/// Every call that changes a file or a directory, or stops a process.
const CALLS: &[&str] = &[
    "openat",
    "write",
    "mkdir",
    "link",
    "linkat",
    "rename",
    "renameat",
    "renameat2",
    "unlink",
    "unlinkat",
    "pidfd_send_signal",
];

const NONCE: Hex128 = Hex128([9; 16]);

fn freezer(pid: i32) -> Freezer {
    Freezer::Pid(Arc::new(Process::open(pid).unwrap()))
}

/// What a sender writes down from before the freeze to behind the commit record, in its order.
#[test]
#[ignore = "a part of the test below, which runs it again and again, in CI too"]
fn hand_over() {
    let directory = PathBuf::from(std::env::var_os(DIRECTORY).unwrap());
    let freezers = [freezer(std::env::var(WRITER).unwrap().parse().unwrap())];
    let journal = Journal::open(&directory).unwrap();
    // The child it starts is this program again, which has no test of that name, and ends.
    let mut guardian = Guardian::start(&directory).unwrap();
    let writers = Writers::of(&freezers).unwrap();
    let stopped = writers.record();
    let asked = Asked {
        id: "r".parse().unwrap(),
        regions: vec!["r".parse().unwrap()],
    };
    guardian.note(NONCE, stopped.clone(), asked).unwrap();
    let record = CommitSent {
        nonce: NONCE,
        id: "r".parse().unwrap(),
        uri: "tcp:127.0.0.1:1".to_owned(),
        boot_id: boot_id().unwrap(),
        receiver_boot_id: boot_id().unwrap(),
        regions: Vec::new(),
        stopped,
    };
    let proposal = journal.propose(record).unwrap();
    let frozen = writers.freeze(DEADLINE).unwrap();
    proposal.decide(&journal, NONCE).unwrap();
    frozen.keep();
    guardian.forget(NONCE);
}

/// Runs it until it is killed before the `nth` such call; `false` if there was none.
fn is_killed(call: &str, nth: u32, directory: &Path, writer: &Writer) -> bool {
    let inject = format!("inject={call}:signal=KILL:when={nth}");
    let status = Command::new("strace")
        .args(["-f", "-qq", "-o", "/dev/null", "-e"])
        .arg(format!("trace={call}"))
        .arg("-e")
        .arg(inject)
        .arg(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "hand_over", "--test-threads=1"])
        .env(DIRECTORY, directory)
        .env(WRITER, writer.pid().to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    !status.success()
}

#[test]
fn a_sender_killed_before_any_of_its_writes_leaves_one_owner() {
    let mut strace = Command::new("strace");
    if strace.arg("-V").stdout(Stdio::null()).status().is_err() {
        return skip("strace is not installed");
    }
    let stage = Stage::new();
    let writer = Writer::start(&stage.path("r"), 4096, "0", 0);
    let (mut running, mut undecided) = (0, 0);
    for call in CALLS {
        for nth in 1.. {
            let directory = stage.path(&format!("{call}-{nth}"));
            kill(Pid::from_raw(writer.pid()), Signal::SIGCONT).unwrap();
            writer.assert_runs();
            if !is_killed(call, nth, &directory, &writer) {
                break;
            }
            guardian::release(&directory).unwrap();
            let recorded = directory.exists()
                && Journal::at(&directory)
                    .find::<CommitSent>(NONCE)
                    .unwrap()
                    .is_some();
            if recorded {
                assert!(writer.is_stopped(), "{call} {nth}: two owners");
                undecided += 1;
            } else {
                writer.assert_runs();
                running += 1;
            }
            // What the next sender finds does not keep it from starting.
            Journal::open(&directory).unwrap();
            let given_up = Guardian::start(&directory).unwrap().given_up().unwrap();
            assert!(
                !recorded || given_up.is_empty(),
                "{call} {nth}: {given_up:?}"
            );
        }
    }
    assert!(
        running > 10 && undecided > 2,
        "{running} left running, {undecided} undecided"
    );
}
