//! Cancelling in every state that can be reached from outside, and what decides who owns the memory
//! once the commit is on its way (rule 4).
#![allow(
    clippy::unwrap_used,
    reason = "also the helpers of a test end it by a panic"
)]

mod common;

use std::fs;
use std::path::PathBuf;

use common::fake::{FakeReceiver, Heard, Manners};
use common::memory::{MIB, assert_same, dense};
use common::{Daemon, Pair, Stage, Writer, ended, listing};
use memferry::freeze::{Freezer, Process, Writers};
use memferry::journal::{CommitSent, Decision, Journal, boot_id};
use memferry::name::Name;
use memferry::wire::{BootId, FromSender, Hex128, Owner};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// A sender with a live Region `r`, and a receiver that goes along as far as it is told to.
struct Half {
    sender: Daemon,
    fake: FakeReceiver,
    writer: Writer,
    stage: Stage,
}

impl Half {
    fn new(manners: Manners) -> Self {
        let stage = Stage::new();
        let fake = FakeReceiver::start(manners);
        let mut sender = stage.sender();
        let writer = Writer::start(&stage.path("r"), 2 * MIB, "2MiB/s", MIB);
        add_live(&mut sender, &writer);
        Self {
            sender,
            fake,
            writer,
            stage,
        }
    }

    /// Begins; a lost connection is a failure.
    fn begin(&mut self) {
        let more = json!({"streams": 2, "recover-timeout": "0"});
        self.sender.begin_patiently(&self.fake.uri, more);
    }

    fn cancel(&mut self) {
        self.sender.call("migrate_cancel", json!({"id": "r"}));
    }

    /// After a cancel that was in time: it is said, the writer runs, and the Region can go again.
    fn assert_cancelled(&mut self) {
        let seen = self.sender.wait("r", "cancelled");
        assert!(seen.get("error").is_none(), "{seen:#}");
        self.writer.assert_runs();
        self.sender.assert_alive();
        assert_eq!(records(&self.stage, "sender"), 0);
        let mut receiver = self.stage.receiver();
        let order = json!({"uri": receiver.uri(), "id": "again"});
        self.sender.call("migrate", order);
        self.sender.wait("again", "completed");
        assert!(self.writer.is_stopped());
        assert_same(&self.writer.path, &self.stage.arrived().join("r"));
    }

    /// As far as a commit that was sent and is not answered.
    fn commit_sent() -> Self {
        let mut half = Self::new(Manners::NeverCommitted);
        half.begin();
        half.fake
            .wait_said(|message| matches!(message, FromSender::Commit { .. }));
        half
    }

    /// That it is not known who owns the memory: the writer stands still, and nothing ends that.
    fn assert_undecided(&mut self) {
        self.sender.wait("r", "indeterminate");
        self.fake
            .wait_said(|message| matches!(message, FromSender::Inquire { .. }));
        assert!(self.writer.is_stopped());
        let (code, _) = self.sender.refusal("migrate_cancel", json!({"id": "r"}));
        assert_eq!(code, "too-late");
        assert_eq!(records(&self.stage, "sender"), 1);
    }

    fn assert_decided(&mut self, owner: Owner) {
        self.fake.decide(owner);
        if owner == Owner::Destination {
            self.sender.wait("r", "completed");
            assert!(self.writer.is_stopped());
        } else {
            self.sender.wait_failed("r", "not-owner");
            self.writer.assert_runs();
        }
        self.sender.assert_alive();
        assert_eq!(records(&self.stage, "sender"), 0);
    }
}

fn add_live(sender: &mut Daemon, writer: &Writer) {
    let freeze = json!({"kind": "pid", "pid": writer.pid()});
    let region = json!({"name": "r", "path": writer.path, "tracker": "scan", "freeze": freeze});
    sender.call("region-add", region);
}

fn runtime_directory(stage: &Stage, who: &str) -> PathBuf {
    stage.path(&format!("{who}.run"))
}

/// Records in a daemon's journal.
fn records(stage: &Stage, who: &str) -> usize {
    let records = listing(&runtime_directory(stage, who));
    records
        .iter()
        .filter(|name| name.ends_with(".json"))
        .count()
}

#[test]
fn a_cancel_in_setup_ends_the_transfer() {
    let mut half = Half::new(Manners::Silent);
    half.begin();
    half.fake.wait(|heard| *heard == Heard::Connection);
    half.sender.wait("r", "setup");
    half.cancel();
    half.assert_cancelled();
}

#[test]
fn a_cancel_while_active_ends_the_transfer_on_both_sides() {
    let mut pair = Pair::new();
    let writer = Writer::start(&pair.stage.path("r"), 2 * MIB, "2MiB/s", MIB);
    pair.add_live("r", &writer);
    // So slow that a thread is always waiting for its bandwidth; and that wait must end too.
    let order = json!({"max-bandwidth": "64KiB/s", "packet-size": "64KiB", "streams": 8, "stall-timeout": "1h"});
    pair.begin("r", order);
    pair.sender.wait("r", "active");
    let (code, text) = ended(&pair.sender.cli(&["cancel", "r"]));
    assert_eq!(code, Some(0), "{text}");
    let seen = pair.sender.wait("r", "cancelled");
    assert!(seen.get("error").is_none(), "{seen:#}");
    writer.assert_runs();
    let seen = pair.receiver.wait_arrival("r", "cancelled");
    assert_eq!(seen["error"]["x-code"], "cancelled");
    pair.assert_nothing_happened(&[]);
    // A second cancel, of what has ended, changes nothing.
    pair.sender.call("migrate_cancel", json!({"id": "r"}));
    pair.sender.wait("r", "cancelled");
}

#[test]
fn a_cancel_while_the_receiver_hangs_ends_the_transfer() {
    let mut pair = Pair::new();
    let writer = Writer::start(&pair.stage.path("r"), 4 * MIB, "2MiB/s", MIB);
    pair.add_live("r", &writer);
    let order = json!({"max-bandwidth": "1MiB/s", "packet-size": "64KiB", "stall-timeout": "1h"});
    pair.begin("r", order);
    pair.sender.wait("r", "active");
    pair.receiver.signal(Signal::SIGSTOP);
    pair.sender.call("migrate_cancel", json!({"id": "r"}));
    pair.sender.wait("r", "cancelled");
    writer.assert_runs();
    pair.receiver.signal(Signal::SIGCONT);
    pair.receiver.wait_arrival("r", "cancelled");
    pair.assert_nothing_happened(&[]);
}

#[test]
fn a_cancel_while_an_acknowledgement_is_awaited_ends_the_transfer() {
    let mut half = Half::new(Manners::Acknowledges(0));
    half.begin();
    // Both streams have sent all they have, and wait.
    for _ in 0..2 {
        half.fake
            .wait(|heard| matches!(heard, Heard::Mark { iteration: 1, .. }));
    }
    half.sender.wait("r", "active");
    half.cancel();
    half.assert_cancelled();
}

#[test]
fn a_cancel_in_device_thaws_the_writer() {
    let mut half = Half::new(Manners::Acknowledges(1));
    half.begin();
    half.fake
        .wait(|heard| matches!(heard, Heard::Mark { iteration: 2, .. }));
    half.sender.wait("r", "device");
    assert!(half.writer.is_stopped());
    half.cancel();
    half.assert_cancelled();
}

#[test]
fn a_sender_killed_while_the_writer_stands_still_leaves_it_running() {
    let mut half = Half::new(Manners::Acknowledges(1));
    half.begin();
    half.sender.wait("r", "device");
    half.fake
        .wait(|heard| matches!(heard, Heard::Mark { iteration: 2, .. }));
    assert!(half.writer.is_stopped());
    half.sender.kill();
    half.writer.assert_runs();
}

#[test]
fn a_cancel_in_completing_thaws_the_writer() {
    let mut half = Half::new(Manners::NeverPrepared);
    half.begin();
    half.fake
        .wait_said(|message| matches!(message, FromSender::Prepare { .. }));
    half.sender.wait("r", "completing");
    assert!(half.writer.is_stopped());
    half.cancel();
    half.assert_cancelled();
}

#[test]
fn a_receiver_lost_before_the_commit_thaws_the_writer() {
    let mut half = Half::new(Manners::NeverPrepared);
    half.begin();
    half.fake
        .wait_said(|message| matches!(message, FromSender::Prepare { .. }));
    half.fake.hang_up();
    half.sender.wait_failed("r", "connection-lost");
    half.writer.assert_runs();
    assert_eq!(records(&half.stage, "sender"), 0);
}

#[test]
fn a_timeout_ends_the_transfer_with_its_own_exit_code() {
    let half = Half::new(Manners::NeverPrepared);
    let arguments = [
        "migrate",
        &half.fake.uri,
        "--progress",
        "none",
        "--set",
        "timeout=300ms",
    ];
    let (code, text) = ended(&half.sender.cli(&arguments));
    assert_eq!(code, Some(6), "{text}");
    half.writer.assert_runs();
}

#[test]
fn a_cancel_behind_the_commit_is_too_late_and_nothing_thaws() {
    let mut half = Half::commit_sent();
    let refused = half.sender.refusal("migrate_cancel", json!({"id": "r"}));
    assert_eq!(refused.0, "too-late");
    half.sender.wait("r", "completing");
    assert!(half.writer.is_stopped());
    half.fake.hang_up();
    half.assert_undecided();
    half.assert_decided(Owner::Source);

    // The Region is free again, and the writer is tracked as before.
    let mut receiver = half.stage.receiver();
    let order = json!({"uri": receiver.uri(), "id": "again"});
    half.sender.call("migrate", order);
    half.sender.wait("again", "completed");
    assert_same(&half.writer.path, &half.stage.arrived().join("r"));
}

#[test]
fn a_commit_that_was_honoured_but_not_answered_completes() {
    let mut half = Half::commit_sent();
    half.fake.hang_up();
    half.assert_undecided();
    let arguments = ["status", "r"];
    let (_, text) = ended(&half.sender.cli(&arguments));
    assert!(text.contains("indeterminate"), "{text}");
    half.assert_decided(Owner::Destination);
}

#[test]
fn a_receiver_of_another_boot_decides_nothing() {
    let mut half = Half::commit_sent();
    half.fake.decide(Owner::Unknown);
    half.fake.hang_up();
    half.sender.wait("r", "indeterminate");
    // It is asked again and again; what it says does not count.
    for _ in 0..2 {
        half.fake
            .wait_said(|message| matches!(message, FromSender::Inquire { .. }));
    }
    assert!(half.writer.is_stopped());
    half.sender.wait("r", "indeterminate");
    half.assert_decided(Owner::Source);
}

#[test]
fn the_operator_decides_when_the_receiver_is_gone_for_good() {
    for (owner, status) in [("source", "failed"), ("destination", "completed")] {
        let mut half = Half::commit_sent();
        let early = half.sender.cli(&["resolve", "r", owner]);
        assert_eq!(
            early.status.code(),
            Some(1),
            "there is still a conversation"
        );
        half.fake.hang_up();
        half.assert_undecided();
        let decided = half.sender.cli(&["resolve", "r", owner]);
        assert_eq!(decided.status.code(), Some(0), "{decided:?}");
        half.sender.wait("r", status);
        assert_eq!(half.writer.is_stopped(), owner == "destination");
        assert_eq!(records(&half.stage, "sender"), 0);
        half.sender.assert_alive();
    }
}

#[test]
fn the_command_line_says_that_it_is_not_decided() {
    let half = Half::new(Manners::NeverCommitted);
    let mut command = common::memferry();
    command.arg("--socket").arg(half.sender.socket()).args([
        "migrate",
        &half.fake.uri,
        "--json",
        "--progress",
        "none",
    ]);
    let running = std::thread::scope(|scope| {
        let running = scope.spawn(|| command.output().unwrap());
        half.fake
            .wait_said(|message| matches!(message, FromSender::Commit { .. }));
        half.fake.hang_up();
        running.join().unwrap()
    });
    assert_eq!(running.status.code(), Some(1));
    let last: Value = serde_json::from_slice(&running.stdout).unwrap();
    assert_eq!(last["status"], "indeterminate");
    assert!(half.writer.is_stopped());
}

/// A sender that was killed behind the commit, and started again.
fn restarted(owner: Owner) {
    let mut half = Half::commit_sent();
    half.sender.kill();
    assert!(half.writer.is_stopped());
    assert_eq!(records(&half.stage, "sender"), 1);
    half.sender = half.stage.sender();
    half.assert_undecided();
    half.assert_decided(owner);
}

#[test]
fn a_restarted_sender_asks_on_and_thaws_what_stayed_its_own() {
    restarted(Owner::Source);
}

#[test]
fn a_restarted_sender_asks_on_and_completes_what_changed_hands() {
    restarted(Owner::Destination);
}

/// Its receiver may own the memory already: to give it to another one could make two owners.
#[test]
fn a_region_whose_owner_is_undecided_cannot_be_moved_not_even_after_a_restart() {
    let mut half = Half::commit_sent();
    half.fake.hang_up();
    half.assert_undecided();
    let elsewhere = json!({"uri": half.stage.peer_uri(), "id": "other"});
    let refused = half.sender.refusal("migrate", elsewhere.clone());
    assert_eq!(refused.0, "region-busy");

    half.sender.kill();
    half.sender = half.stage.sender();
    half.assert_undecided();
    add_live(&mut half.sender, &half.writer);
    let refused = half.sender.refusal("migrate", elsewhere.clone());
    assert_eq!(refused.0, "region-busy");
    let same_id = json!({"uri": half.stage.peer_uri(), "id": "r"});
    assert_eq!(half.sender.refusal("migrate", same_id).0, "id-in-use");
    half.assert_decided(Owner::Source);
    half.sender.call("migrate", elsewhere);
    half.sender.wait_failed("other", "unreachable");
}

#[test]
fn a_sender_stopped_while_undecided_keeps_its_record() {
    let mut half = Half::commit_sent();
    half.fake.hang_up();
    half.assert_undecided();
    half.sender.call("quit", Value::Null);
    half.sender.wait_end();
    assert!(half.writer.is_stopped());
    half.sender = half.stage.sender();
    half.assert_undecided();
    half.assert_decided(Owner::Destination);
}

/// What two daemons leave behind that died around a commit, made by hand: a stopped writer, the
/// sender's record, and the receiver's hidden file.
struct Remains {
    stage: Stage,
    writer: Writer,
    nonce: Hex128,
    hidden: PathBuf,
}

fn receivers_journal(stage: &Stage) -> Journal {
    Journal::open(&runtime_directory(stage, "receiver")).unwrap()
}

impl Remains {
    fn new(sender_boot: Option<BootId>) -> Self {
        let stage = Stage::new();
        let writer = Writer::start(&stage.path("r"), MIB, "1MiB/s", MIB);
        let process = std::sync::Arc::new(Process::open(writer.pid()).unwrap());
        let writers = Writers::of(&[Freezer::Pid(process)]).unwrap();
        let frozen = writers.freeze(common::DEADLINE).unwrap();
        let nonce = Hex128::random().unwrap();
        let record = CommitSent {
            nonce,
            id: "r".parse().unwrap(),
            uri: stage.peer_uri(),
            boot_id: sender_boot.unwrap_or_else(|| boot_id().unwrap()),
            receiver_boot_id: receivers_journal(&stage).boot_id().unwrap(),
            regions: vec!["r".parse().unwrap()],
            stopped: frozen.record(),
        };
        frozen.keep();
        let journal = Journal::open(&runtime_directory(&stage, "sender")).unwrap();
        journal.decide(nonce, record).unwrap();
        fs::create_dir(stage.arrived()).unwrap();
        let hidden = stage.arrived().join(format!(".memferry-{nonce}-0"));
        fs::copy(stage.path("r"), &hidden).unwrap();
        Self {
            stage,
            writer,
            nonce,
            hidden,
        }
    }

    /// The receiver's record, as it is before the first rename.
    fn commit(&self) {
        let moves = vec![(self.hidden.clone(), self.stage.arrived().join("r"))];
        let journal = receivers_journal(&self.stage);
        let boot_id = journal.boot_id().unwrap();
        let record = Decision::Committed {
            boot_id,
            id: Name::new("r").unwrap(),
            moves,
            blob: None,
        };
        journal.decide(self.nonce, record).unwrap();
    }

    fn receiver(&self) -> Daemon {
        self.stage.receiver_with(&self.stage.peer_uri(), "")
    }
}

#[test]
fn a_receiver_killed_behind_its_record_owns_the_regions_after_its_restart() {
    let remains = Remains::new(None);
    remains.commit();
    let mut sender = remains.stage.sender();
    sender.wait("r", "indeterminate");
    let mut receiver = remains.receiver();
    assert_eq!(listing(&remains.stage.arrived()), ["r"]);
    assert_same(&remains.writer.path, &remains.stage.arrived().join("r"));
    sender.wait("r", "completed");
    assert!(remains.writer.is_stopped());
    assert_eq!(records(&remains.stage, "sender"), 0);
    receiver.assert_alive();

    // The record stands, whatever comes: a second restart finds everything done.
    receiver.kill();
    fs::write(remains.stage.arrived().join("r"), "its new owner's").unwrap();
    let mut receiver = remains.receiver();
    receiver.assert_alive();
    let kept = fs::read(remains.stage.arrived().join("r")).unwrap();
    assert_eq!(kept, b"its new owner's");
}

#[test]
fn a_receiver_killed_before_its_record_owns_nothing_after_its_restart() {
    let remains = Remains::new(None);
    let mut sender = remains.stage.sender();
    sender.wait("r", "indeterminate");
    assert!(remains.writer.is_stopped());
    let mut receiver = remains.receiver();
    sender.wait_failed("r", "not-owner");
    remains.writer.assert_runs();
    assert_eq!(listing(&remains.stage.arrived()), [""; 0]);
    receiver.assert_alive();
    // And the refusal is for ever.
    let journal = Journal::open(&runtime_directory(&remains.stage, "receiver")).unwrap();
    let decided = journal.find::<Decision>(remains.nonce).unwrap();
    assert!(matches!(decided, Some(Decision::Refused { .. })));

    // The whole of it can go again.
    add_live(&mut sender, &remains.writer);
    let order = json!({"uri": remains.stage.peer_uri(), "id": "r"});
    sender.call("migrate", order);
    sender.wait("r", "completed");
    assert_same(&remains.writer.path, &remains.stage.arrived().join("r"));
}

#[test]
fn a_record_of_another_boot_means_nothing_to_the_sender() {
    let remains = Remains::new(Some(BootId("another".into())));
    let mut sender = remains.stage.sender();
    assert_eq!(sender.call("query-migrate", Value::Null), json!({}));
    assert_eq!(records(&remains.stage, "sender"), 0);
}

#[test]
fn a_live_receiver_killed_while_it_receives_owns_nothing_after_its_restart() {
    let stage = Stage::new();
    let receiver = stage.receiver_with(&stage.peer_uri(), "");
    let mut pair = Pair::of(stage, receiver);
    let source = pair.stage.path("r");
    dense(&source, 2 * MIB, 1);
    pair.add("r", &source);
    pair.begin(
        "r",
        json!({"max-bandwidth": "1MiB/s", "packet-size": "64KiB", "recover-timeout": "0"}),
    );
    pair.receiver.wait_arrival("r", "active");
    pair.receiver.kill();
    pair.sender.wait_failed("r", "connection-lost");
    pair.receiver = pair.stage.receiver_with(&pair.uri, "");
    pair.assert_nothing_happened(&[]);
    pair.transfer("r", json!({}));
    assert_same(&source, &pair.destination("r"));
}
