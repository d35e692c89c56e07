//! What is handed over at the end, between real daemons: descriptors of Regions, the final blob, memory
//! that was prepared; and what is remembered of it.
#![allow(
    clippy::unwrap_used,
    reason = "also the helpers of a test end it by a panic"
)]

mod common;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use common::memory::{MIB, PAGE, dense, noise, punch, sparse};
use common::{DEADLINE, Daemon, Pair, Stage, Writer, ended, listing};
use memferry::client::{Connection, Event};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::{Value, json};

fn memfd(content: &[u8]) -> File {
    let mut file = File::from(memfd_create("test", MFdFlags::MFD_CLOEXEC).unwrap());
    file.write_all(content).unwrap();
    file
}

fn content(fd: OwnedFd) -> Vec<u8> {
    let mut bytes = Vec::new();
    File::from(fd).read_to_end(&mut bytes).unwrap();
    bytes
}

/// Takes something from a daemon that comes as a descriptor.
fn take(daemon: &mut Daemon, command: &str, arguments: Value) -> (Value, OwnedFd) {
    daemon.control().execute_for_fd(command, arguments).unwrap()
}

/// A receiver whose address survives its restart, and a sender.
fn pair() -> Pair {
    let stage = Stage::new();
    let uri = stage.peer_uri();
    let receiver = stage.receiver_with(&uri, "");
    Pair::of(stage, receiver)
}

impl Pair {
    fn restart_receiver(&mut self) {
        self.receiver.kill();
        let uri = self.stage.peer_uri();
        self.receiver = self.stage.receiver_with(&uri, "");
    }

    /// Adds a Region `r` of noise.
    fn add_noise(&mut self, bytes: u64) -> Vec<u8> {
        let path = self.stage.path("r");
        dense(&path, bytes, 1);
        self.add("r", &path);
        noise(bytes, 1)
    }

    /// Starts the transfer of `r` with a blob.
    fn begin_with_blob(&mut self, blob: &File) {
        self.sender.control().send_fd("blob", blob.as_fd()).unwrap();
        self.begin("r", json!({"final-fdname": "blob"}));
    }

    /// Prepares `memory` for the Region `r`.
    fn prepare(&mut self, memory: &File, confirm: bool) {
        let control = self.receiver.control();
        control.send_fd("ram", memory.as_fd()).unwrap();
        let region = json!({"name": "r", "fdname": "ram", "confirm": confirm});
        control.execute("region-add", region).unwrap();
    }

    /// What the receiver says about `r`.
    fn held(&mut self) -> Value {
        self.receiver.call("query-regions", Value::Null)[0].clone()
    }
}

#[test]
fn a_committed_region_is_taken_once_and_its_file_stays() {
    let mut pair = pair();
    let memory = pair.add_noise(MIB + 100);
    let (code, _) = pair.receiver.refusal("region-take", json!({"name": "r"}));
    assert_eq!(code, "region-unknown");
    pair.transfer("r", json!({}));
    // Also one that was committed by an earlier run of the daemon.
    pair.restart_receiver();
    let (answer, fd) = take(&mut pair.receiver, "region-take", json!({"name": "r"}));
    assert_eq!(answer, json!({"name": "r", "size": MIB + 100}));
    let file = File::from(fd);
    let inode = file.metadata().unwrap().ino();
    let mut bytes = vec![0; memory.len()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == memory);
    file.write_all_at(b"mine", 0).unwrap();
    assert_eq!(fs::metadata(pair.destination("r")).unwrap().ino(), inode);
    let (code, _) = pair.receiver.refusal("region-take", json!({"name": "r"}));
    assert_eq!(code, "region-taken");
    pair.receiver.call("region-del", json!({"name": "r"}));
    assert_eq!(listing(&pair.stage.arrived()), ["r"]);
}

#[test]
fn a_final_blob_arrives_whole_and_outlives_its_receiver() {
    for bytes in [0, 1, 3 * MIB + 5] {
        let mut pair = pair();
        pair.add_noise(MIB);
        let blob = noise(bytes, 9);
        pair.begin_with_blob(&memfd(&blob));
        let done = pair.sender.wait("r", "completed");
        assert_eq!(done["blob-size"], bytes);
        let arrived = pair.receiver.wait_arrival("r", "completed");
        assert_eq!(arrived["blob-size"], bytes);
        pair.restart_receiver();
        for _ in 0..2 {
            let (answer, fd) = take(&mut pair.receiver, "blob-take", json!({"id": "r"}));
            assert_eq!(answer, json!({"id": "r", "size": bytes}));
            assert!(content(fd) == blob);
        }
        pair.receiver.call("blob-del", json!({"id": "r"}));
        let (code, _) = pair.receiver.refusal("blob-take", json!({"id": "r"}));
        assert_eq!(code, "no-blob");
        pair.restart_receiver();
        let (code, _) = pair.receiver.refusal("blob-take", json!({"id": "r"}));
        assert_eq!(code, "no-blob");
    }
}

#[test]
fn what_is_written_into_the_blob_until_the_freeze_arrives() {
    let mut pair = pair();
    pair.add_noise(4 * MIB);
    let (near, far) = nix::unistd::pipe().unwrap();
    let mut listener = Connection::connect(pair.sender.socket()).unwrap();
    pair.begin_with_blob(&File::from(near));
    // Who writes it may wait for the event: so that has to come before anything is read.
    let announced = |event: &Event| event.name == "MIGRATION" && event.data["status"] == "device";
    while !announced(&listener.next_event(DEADLINE).unwrap().expect("an event")) {}
    let mut far = File::from(far);
    far.write_all(b"the last word").unwrap();
    drop(far);
    pair.sender.wait("r", "completed");
    let (_, fd) = take(&mut pair.receiver, "blob-take", json!({"id": "r"}));
    assert_eq!(content(fd), b"the last word");
}

#[test]
fn a_blob_is_given_on_the_command_line() {
    let mut pair = pair();
    pair.add_noise(MIB);
    let (state, uri) = (pair.stage.write("state", "by hand"), pair.uri.clone());
    let arguments = |file: &Path| {
        let file = file.to_str().unwrap().to_owned();
        [
            uri.clone(),
            "--id=r".into(),
            "--progress=none".into(),
            "--final-blob".into(),
            file,
        ]
    };
    let migrate = |file: &Path| {
        let arguments = arguments(file);
        let mut all = vec!["migrate"];
        all.extend(arguments.iter().map(String::as_str));
        ended(&pair.sender.cli(&all))
    };
    let (code, said) = migrate(Path::new("/nonexistent/state"));
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("/nonexistent/state"), "{said}");
    let (code, said) = migrate(&state);
    assert_eq!(code, Some(0), "{said}");
    let (_, fd) = take(&mut pair.receiver, "blob-take", json!({"id": "r"}));
    assert_eq!(content(fd), b"by hand");
}

#[test]
fn a_blob_that_is_too_long_or_never_ends_fails_the_transfer_and_leaves_nothing() {
    let mut pair = pair();
    pair.add_noise(MIB);
    let long = memfd(&[]);
    long.set_len((64 << 20) + 1).unwrap();
    pair.begin_with_blob(&long);
    pair.sender.wait_failed("r", "too-large");
    let (near, _far) = nix::unistd::pipe().unwrap();
    pair.sender.control().send_fd("blob", near.as_fd()).unwrap();
    pair.begin(
        "r",
        json!({"final-fdname": "blob", "freeze-timeout": "200ms"}),
    );
    pair.sender.wait_failed("r", "blob-read");
    pair.receiver.wait_arrival("r", "failed");
    pair.assert_nothing_happened(&[]);
    let run = listing(&pair.stage.path("receiver.run"));
    assert!(run.iter().all(|name| !name.contains("blob")), "{run:?}");
    pair.transfer("r", json!({}));
}

#[test]
fn prepared_memory_is_written_in_place_with_zeros_for_holes() {
    for streams in [1, 4] {
        let mut pair = pair();
        let (path, length) = (pair.stage.path("r"), 3 * MIB + 77);
        let islands = [(0, PAGE), (MIB + 512, 9 * PAGE), (3 * MIB, 77)];
        let source = sparse(&path, length, &islands);
        source.write_all_at(&[0; 8192], 2 * MIB).unwrap();
        pair.add("r", &path);
        let ram = memfd(&vec![0xee; usize::try_from(length).unwrap()]);
        pair.prepare(&ram, false);
        assert_eq!(pair.held()["content"], "own");
        let inode = ram.metadata().unwrap().ino();
        pair.transfer("r", json!({"streams": streams}));
        let mut bytes = vec![1; usize::try_from(length).unwrap()];
        ram.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == fs::read(&path).unwrap());
        assert_eq!(ram.metadata().unwrap().len(), length);
        assert_eq!(listing(&pair.stage.arrived()), [""; 0]);
        assert_eq!(pair.held()["content"], "committed");
        let (_, fd) = take(&mut pair.receiver, "region-take", json!({"name": "r"}));
        assert_eq!(File::from(fd).metadata().unwrap().ino(), inode);
        // It serves one commit.
        pair.sender.call("region-del", json!({"name": "r"}));
        pair.add("r", &path);
        pair.begin("r", json!({}));
        pair.sender.wait_failed("r", "exists");
    }
}

#[test]
fn a_hole_of_prepared_memory_stays_one_where_the_source_has_nothing() {
    let mut pair = pair();
    let path = pair.stage.path("r");
    let source = sparse(&path, 8 * MIB, &[(MIB, PAGE)]);
    pair.add("r", &path);
    let ram = memfd(&[]);
    ram.set_len(8 * MIB).unwrap();
    pair.prepare(&ram, false);
    pair.transfer("r", json!({}));
    assert_eq!(
        ram.metadata().unwrap().blocks(),
        source.metadata().unwrap().blocks()
    );
}

#[test]
fn an_attempt_that_fails_leaves_prepared_memory_to_the_next() {
    let mut pair = pair();
    let path = pair.stage.path("r");
    dense(&path, 4 * MIB, 1);
    pair.add("r", &path);
    let ram = memfd(&vec![0xee; 4 << 20]);
    pair.prepare(&ram, false);
    pair.begin("r", json!({"max-bandwidth": "1MiB/s"}));
    pair.receiver.wait_arrival("r", "active");
    assert_eq!(pair.held()["content"], "undefined");
    let (code, _) = pair.receiver.refusal("region-del", json!({"name": "r"}));
    assert_eq!(code, "region-busy");
    pair.sender.call("migrate_cancel", json!({"id": "r"}));
    pair.receiver.wait_arrival("r", "cancelled");
    pair.sender.wait("r", "cancelled");
    assert_eq!(pair.held()["content"], "undefined");
    let (code, _) = pair.receiver.refusal("region-take", json!({"name": "r"}));
    assert_eq!(code, "not-committed");
    let source = File::options().write(true).open(&path).unwrap();
    punch(&source, 0, 2 * MIB);
    pair.transfer("r", json!({}));
    let mut bytes = vec![1; 4 << 20];
    ram.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == fs::read(&path).unwrap());
}

#[test]
fn prepared_memory_of_another_length_is_refused() {
    let mut pair = pair();
    pair.add_noise(MIB);
    pair.prepare(&memfd(&[0; 4096]), false);
    pair.begin("r", json!({}));
    let seen = pair.sender.wait_failed("r", "region-length");
    let desc = seen["error"]["desc"].as_str().unwrap();
    assert!(desc.contains("1048576") && desc.contains("4096"), "{desc}");
    assert_eq!(pair.held()["content"], "own");
    pair.assert_nothing_happened(&[]);
}

/// Waits for an event that asks whether `r` may go on.
fn wait_question(client: &mut Connection) {
    loop {
        let event = client.next_event(DEADLINE).unwrap().unwrap();
        if event.data["status"] == "pre-switchover" {
            assert_eq!(event.data["id"], "r");
            assert_eq!(event.data["regions"], json!(["r"]));
            return;
        }
    }
}

#[test]
fn a_client_that_wants_to_confirm_is_asked_before_the_commit() {
    let mut pair = pair();
    pair.add_noise(MIB);
    let ram = memfd(&vec![0xee; 1 << 20]);
    pair.prepare(&ram, true);
    pair.begin("r", json!({}));
    wait_question(pair.receiver.control());
    // Nothing waits for the answer with a writer stopped.
    assert_eq!(
        pair.sender.call("query-migrate", json!({}))["status"],
        "active"
    );
    let answer = json!({"id": "r", "state": "pre-switchover"});
    // Nobody else may say so.
    let mut other = Connection::connect(pair.receiver.socket()).unwrap();
    assert!(other.execute("migrate-continue", answer.clone()).is_err());
    pair.receiver.call("migrate-continue", answer);
    pair.sender.wait("r", "completed");
    assert_eq!(pair.held()["content"], "committed");
}

#[test]
fn a_client_that_leaves_instead_of_confirming_refuses_the_transfer() {
    let mut pair = pair();
    let memory = pair.stage.path("r");
    let writer = Writer::start(&memory, MIB, "1MiB/s", MIB / 2);
    pair.add_live("r", &writer);
    let mut client = Connection::connect(pair.receiver.socket()).unwrap();
    let ram = memfd(&vec![0xee; 1 << 20]);
    client.send_fd("ram", ram.as_fd()).unwrap();
    let region = json!({"name": "r", "fdname": "ram", "confirm": true});
    client.execute("region-add", region).unwrap();
    pair.begin("r", json!({}));
    wait_question(&mut client);
    drop(client);
    pair.sender.wait_failed("r", "refused");
    assert!(!writer.is_stopped());
    assert_eq!(pair.held()["content"], "undefined");
}

#[test]
fn history_and_what_was_handed_over_survive_a_restart() {
    let mut pair = pair();
    for who in ["sender", "receiver"] {
        fs::create_dir(pair.stage.path(&format!("{who}.state"))).unwrap();
    }
    let path = pair.stage.path("r");
    dense(&path, MIB, 1);
    let toml = format!("[[region]]\nname = \"r\"\npath = {path:?}\n");
    pair.sender.kill();
    pair.sender = pair.stage.sender_with(&toml);
    pair.begin("r", json!({"uri": "unix:/nobody"}));
    pair.sender.wait("r", "failed");
    pair.transfer("r", json!({}));
    pair.receiver.wait_arrival("r", "completed");
    pair.restart_receiver();
    pair.sender.kill();
    pair.sender = pair.stage.sender_with(&toml);
    let history = pair.sender.call("query-history", Value::Null);
    let statuses: Vec<_> = history
        .as_array()
        .unwrap()
        .iter()
        .map(|t| &t["status"])
        .collect();
    assert_eq!(statuses, ["failed", "completed"]);
    let done = &history[1];
    assert!(done["downtime-breakdown-us"]["commit"].is_u64(), "{done:#}");
    assert!(done["ended"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!(history[0]["error"]["x-code"], "unreachable");
    let history = pair.receiver.call("query-history", Value::Null);
    assert_eq!(history[0]["status"], "completed");
    // The same file, under whatever name it is added.
    let again = json!({"uri": pair.uri, "regions": ["r"]});
    assert_eq!(pair.sender.refusal("migrate", again).0, "region-moved");
    pair.add("r2", &path);
    let again = json!({"uri": pair.uri, "regions": ["r2"]});
    assert_eq!(pair.sender.refusal("migrate", again).0, "region-moved");
    let out = pair.sender.cli(&["history"]);
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(
        text.contains("completed") && text.contains("failed"),
        "{text}"
    );
}
