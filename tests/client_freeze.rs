//! Writers that stop themselves (freeze `client`): asked once, observed by their answers, and never two
//! owners or none whoever dies.
#![allow(
    clippy::unwrap_used,
    reason = "also the helpers of a test end it by a panic"
)]

mod common;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::fake::{FakeReceiver, Heard, Manners};
use common::memory::{PAGE, assert_same, dense};
use common::{DEADLINE, Daemon, Pair, Stage, ended};
use memferry::client::{Connection, Order, Stoppable};
use memferry::wire::{FromSender, Owner};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::{Value, json};

const PAGES: u64 = 256;

/// What a writer was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Order(Order),
    /// The connection was lost, and it goes on.
    Alone,
}

/// A thread that writes and marks pages all the time, as long as it may.
struct Writer {
    told: Receiver<Told>,
    writes: Arc<AtomicU64>,
    leave: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A Region of the writer: its memory and its bitmap.
struct Marked(File, File);

impl Marked {
    fn register(name: &str, path: &Path, control: &mut Connection) -> Self {
        dense(path, PAGES * PAGE, 1);
        let memory = File::options().read(true).write(true).open(path).unwrap();
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let bitmap = File::from(memfd_create("bitmap", flags).unwrap());
        bitmap.set_len(PAGES / 8).unwrap();
        fcntl(&bitmap, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
        control.send_fd("marks", bitmap.as_fd()).unwrap();
        let region = json!({
            "name": name,
            "path": path,
            "tracker": {"kind": "bitmap", "fdname": "marks"},
            "freeze": {"kind": "client"},
        });
        control.execute("region-add", region).unwrap();
        Self(memory, bitmap)
    }

    /// Marks a whole byte of pages: then nothing has to be read before it is written, and no mark of
    /// another page gets lost.
    fn write(&self, sequence: u64) {
        let page = sequence % PAGES;
        let stamp = sequence.to_ne_bytes();
        self.0.write_all_at(&stamp, page * PAGE).unwrap();
        self.1.write_all_at(&[0xff], page / 8).unwrap();
    }
}

impl Writer {
    /// Registers `regions` over one connection, and writes them.
    fn start(socket: &Path, regions: &[(&str, PathBuf)]) -> Self {
        let mut control = Connection::connect(socket).unwrap();
        let marked: Vec<_> = regions
            .iter()
            .map(|(name, path)| Marked::register(name, path, &mut control))
            .collect();
        let (tell, told) = mpsc::channel();
        let (writes, leave) = (
            Arc::new(AtomicU64::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let (counted, left) = (Arc::clone(&writes), Arc::clone(&leave));
        let thread = std::thread::spawn(move || {
            write_and_attend(Stoppable::new(control), &marked, &tell, &counted, &left);
        });
        Self {
            told,
            writes,
            leave,
            thread: Some(thread),
        }
    }

    /// Waits until it is told this, and nothing else.
    fn wait(&self, wanted: Told) {
        assert_eq!(self.told.recv_timeout(DEADLINE).unwrap(), wanted);
    }

    fn assert_runs(&self) {
        let (before, deadline) = (
            self.writes.load(Ordering::Relaxed),
            Instant::now() + DEADLINE,
        );
        while self.writes.load(Ordering::Relaxed) == before {
            assert!(Instant::now() < deadline, "it writes nothing");
            std::thread::yield_now();
        }
    }

    /// That nothing was written or told since it was told to stand still, or to end.
    fn assert_silent(&self, writes: u64) {
        assert_eq!(self.writes.load(Ordering::Relaxed), writes);
        assert!(self.told.try_recv().is_err());
    }

    fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.leave.store(true, Ordering::Relaxed);
        let _ = self.thread.take().unwrap().join();
    }
}

fn write_and_attend(
    mut sender: Stoppable,
    regions: &[Marked],
    tell: &Sender<Told>,
    writes: &AtomicU64,
    leave: &AtomicBool,
) {
    let mut last = Order::Write;
    let mut patience = Duration::ZERO;
    while !leave.load(Ordering::Relaxed) {
        let order = match sender.attend(patience) {
            Ok(order) => order,
            Err(_) => {
                let _ = tell.send(Told::Alone);
                Order::Write
            }
        };
        if order != last {
            let _ = tell.send(Told::Order(order));
            last = order;
        }
        patience = Duration::from_millis(5);
        if order == Order::Write {
            let sequence = writes.load(Ordering::Relaxed);
            regions.iter().for_each(|region| region.write(sequence));
            writes.store(sequence + 1, Ordering::Relaxed);
            patience = Duration::ZERO;
        }
    }
}

const STAND_STILL: Told = Told::Order(Order::StandStill);
const WRITE: Told = Told::Order(Order::Write);
const END: Told = Told::Order(Order::End);

#[test]
fn a_client_with_two_regions_is_asked_once_and_moved_to_its_last_write() {
    let mut pair = Pair::new();
    let paths = [pair.stage.path("a"), pair.stage.path("b")];
    let regions = [("a", paths[0].clone()), ("b", paths[1].clone())];
    let writer = Writer::start(pair.sender.socket(), &regions);
    let order = json!({"uri": pair.uri, "id": "both"});
    pair.sender.call("migrate", order);
    pair.sender.wait("both", "completed");
    // Where everything is fast, both have come when it looks.
    if writer.told.recv_timeout(DEADLINE).unwrap() != END {
        writer.wait(END);
    }
    writer.assert_silent(writer.writes());
    for (name, path) in regions {
        assert_same(&path, &pair.destination(name));
    }
}

/// One Region `r`, its writer, and a receiver that goes along as far as it is told to.
struct Half {
    sender: Daemon,
    fake: FakeReceiver,
    writer: Writer,
    stage: Stage,
}

impl Half {
    fn begin(manners: Manners) -> Self {
        let stage = Stage::new();
        let fake = FakeReceiver::start(manners);
        let mut sender = stage.sender();
        let writer = Writer::start(sender.socket(), &[("r", stage.path("r"))]);
        sender.begin_patiently(&fake.uri, json!({"streams": 1}));
        writer.wait(STAND_STILL);
        Self {
            sender,
            fake,
            writer,
            stage,
        }
    }
}

#[test]
fn a_client_goes_on_when_the_transfer_is_cancelled_or_fails() {
    let mut half = Half::begin(Manners::NeverPrepared);
    half.sender.wait("r", "completing");
    half.sender.call("migrate_cancel", json!({"id": "r"}));
    half.writer.wait(WRITE);
    half.sender.wait("r", "cancelled");
    half.writer.assert_runs();

    let half = Half::begin(Manners::NeverPrepared);
    half.fake
        .wait_said(|message| matches!(message, FromSender::Prepare { .. }));
    half.fake.hang_up();
    half.writer.wait(WRITE);
    half.writer.assert_runs();
}

#[test]
fn a_client_goes_on_at_once_when_the_sender_is_killed_before_its_second_answer() {
    let mut half = Half::begin(Manners::Acknowledges(1));
    half.fake
        .wait(|heard| matches!(heard, Heard::Mark { iteration: 2, .. }));
    half.writer.assert_silent(half.writer.writes());
    half.sender.kill();
    half.writer.wait(Told::Alone);
    half.writer.assert_runs();
}

#[test]
fn a_client_that_has_promised_goes_on_when_the_next_sender_knows_of_no_commit() {
    let stage = Stage::new();
    let fake = FakeReceiver::start(Manners::NeverPrepared);
    let mut sender = stage.sender();
    let mut client = Stoppable::new(plain(&stage, &sender));
    let order = json!({"uri": fake.uri, "id": "r", "stall-timeout": "1h"});
    sender.call("migrate", order);
    let deadline = Instant::now() + DEADLINE;
    while !format!("{client:?}").contains("promised: true") {
        assert!(Instant::now() < deadline, "{client:?}");
        client.attend(Duration::from_millis(20)).unwrap();
    }
    sender.kill();
    assert_eq!(client.attend(Duration::ZERO).unwrap(), Order::StandStill);
    let mut sender = stage.sender();
    while client.attend(Duration::from_millis(20)).unwrap() == Order::StandStill {
        assert!(Instant::now() < deadline, "{client:?}");
    }
    assert_eq!(client.attend(Duration::ZERO).unwrap(), Order::Write);
    sender.wait_failed("r", "sender-failed");
}

#[test]
fn a_client_of_a_commit_stays_stopped_until_the_next_sender_knows_the_owner() {
    for owner in [Owner::Source, Owner::Destination] {
        let mut half = Half::begin(Manners::NeverCommitted);
        half.fake
            .wait_said(|message| matches!(message, FromSender::Commit { .. }));
        let writes = half.writer.writes();
        half.sender.kill();
        half.sender = half.stage.sender();
        half.sender.wait("r", "indeterminate");
        half.writer.assert_silent(writes);
        half.fake.decide(owner);
        if owner == Owner::Source {
            half.writer.wait(WRITE);
            half.writer.assert_runs();
        } else {
            half.writer.wait(END);
            half.writer.assert_silent(writes);
        }
    }
}

/// A client that is a plain connection, and what it has registered.
fn plain(stage: &Stage, sender: &Daemon) -> Connection {
    let mut client = Connection::connect(sender.socket()).unwrap();
    let path = stage.path("r");
    dense(&path, 8 * PAGE, 1);
    let region = json!({"name": "r", "path": path, "freeze": "client"});
    client.execute("region-add", region).unwrap();
    client
}

/// The next event of this state that is meant for whoever registered a Region.
fn asked(client: &mut Connection, status: &str) {
    let deadline = Instant::now() + DEADLINE;
    while Instant::now() < deadline {
        if let Some(event) = client.next_event(Duration::from_millis(20)).unwrap()
            && event.data["status"] == status
        {
            assert_eq!(event.data["regions"], json!(["r"]), "{event:?}");
            return;
        }
    }
    panic!("{status} was not announced");
}

fn answer(client: &mut Connection, state: &str) -> Result<Value, memferry::client::ClientError> {
    client.execute("migrate-continue", json!({"id": "r", "state": state}))
}

#[test]
fn a_client_that_does_not_answer_one_of_its_questions_is_not_waited_for_for_ever() {
    let mut pair = Pair::new();
    let mut client = plain(&pair.stage, &pair.sender);
    for answers in [0, 1] {
        pair.begin("r", json!({"freeze-timeout": "300ms"}));
        asked(&mut client, "pre-switchover");
        if answers > 0 {
            answer(&mut client, "pre-switchover").unwrap();
            asked(&mut client, "completing");
        }
        let seen = pair.sender.wait_failed("r", "freeze-timeout");
        let text = seen["error"]["desc"].as_str().unwrap();
        let question = ["pre-switchover", "completing"][answers];
        assert!(text.contains(question) && text.contains('r'), "{text}");
        asked(&mut client, "active");
        asked(&mut client, "failed");
        pair.assert_nothing_happened(&[]);
    }
    // An answer to a question of the past counts for nothing.
    let late = answer(&mut client, "completing").unwrap_err();
    assert_eq!(late.code(), Some("not-waiting"));

    pair.begin("r", json!({}));
    asked(&mut client, "pre-switchover");
    let early = answer(&mut client, "completing").unwrap_err();
    assert_eq!(early.code(), Some("not-waiting"));
    answer(&mut client, "pre-switchover").unwrap();
    asked(&mut client, "completing");
    answer(&mut client, "completing").unwrap();
    asked(&mut client, "completed");
    assert_same(&pair.stage.path("r"), &pair.destination("r"));
}

#[test]
fn a_client_that_leaves_ends_the_transfer_and_later_ones_before_they_begin() {
    let mut pair = Pair::new();
    let mut client = plain(&pair.stage, &pair.sender);
    pair.begin("r", json!({"freeze-timeout": "1h"}));
    asked(&mut client, "pre-switchover");
    pair.sender.wait("r", "pre-switchover");
    drop(client);
    pair.sender.wait_failed("r", "writer-gone");
    pair.assert_nothing_happened(&[]);
    let refused = pair
        .sender
        .refusal("migrate", json!({"uri": pair.uri, "id": "again"}));
    assert_eq!(refused.0, "writer-gone");
}

#[test]
fn an_operator_can_answer_for_a_client() {
    let mut pair = Pair::new();
    let mut client = plain(&pair.stage, &pair.sender);
    let early = pair.sender.cli(&["continue", "r"]);
    assert_eq!(ended(&early).0, Some(1), "there is no transfer");
    pair.begin("r", json!({"freeze-timeout": "1h"}));
    asked(&mut client, "pre-switchover");
    pair.sender.wait("r", "pre-switchover");
    let (code, text) = ended(&pair.sender.cli(&["continue", "r"]));
    assert_eq!(code, Some(0), "{text}");
    pair.sender.wait("r", "completed");
    assert_same(&pair.stage.path("r"), &pair.destination("r"));
}
