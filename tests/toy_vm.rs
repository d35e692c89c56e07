//! The example machine, moved between two daemons while it runs.
#![allow(
    clippy::unwrap_used,
    reason = "also the helpers of a test end it by a panic"
)]

mod common;

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use common::Pair;
use memferry::sys::process::die_with_parent;
use serde_json::Value;

/// The example, which `cargo test` builds beside the tests.
fn toy_vm() -> Command {
    let tests = std::env::current_exe().unwrap();
    let path: PathBuf = tests.ancestors().nth(2).unwrap().join("examples/toy_vm");
    assert!(path.exists(), "cargo build --example toy_vm makes {path:?}");
    let mut command = Command::new(path);
    die_with_parent(&mut command);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

/// Ended with its test, also when it stands still.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_machine_goes_on_at_the_destination_from_the_very_step_it_was_stopped_at() {
    let mut pair = Pair::new();
    let mut command = toy_vm();
    command.args(["destination", "--receiver"]);
    let mut there = Machine(command.arg(pair.receiver.socket()).spawn().unwrap());
    let mut out = BufReader::new(there.0.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert_eq!(line, "prepared\n");

    let mut command = toy_vm();
    command
        .args(["source", "--sender"])
        .arg(pair.sender.socket());
    let mut here = Machine(command.args(["--uri", &pair.uri]).spawn().unwrap());
    let mut left = String::new();
    let mut told = here.0.stdout.take().unwrap();
    told.read_to_string(&mut left).unwrap();
    assert!(here.0.wait().unwrap().success());
    let left: Value = serde_json::from_str(&left).unwrap();
    let mut text = String::new();
    out.read_to_string(&mut text).unwrap();
    assert!(there.0.wait().unwrap().success());
    let shown: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(shown["right"], true, "{shown}");
    let arrived = shown["arrived"].as_array().unwrap();
    assert_eq!(shown["arrived"], left["left"]);
    assert_eq!(arrived.len(), 4);
    assert!(
        arrived
            .iter()
            .all(|steps| steps.as_u64().unwrap() >= 100_000)
    );

    let done = pair.sender.wait("toy-vm", "completed");
    assert_eq!(done["blob-size"], 4 * 8);
    assert!(done["iterations"].as_array().unwrap().len() > 1, "{done:#}");
}
