//! The programs of docs/clients.md, as they stand there, against real daemons; and the example in Rust.
#![allow(
    clippy::unwrap_used,
    reason = "also the helpers of a test end it by a panic"
)]

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::Pair;
use common::memory::{PAGE, assert_same};
use memferry::sys::process::die_with_parent;
use serde_json::{Value, json};

/// A program that has registered its memory as Region `ram`.
struct Client {
    child: Child,
    path: PathBuf,
}

impl Client {
    fn start(pair: &Pair, command: &mut Command) -> Self {
        let path = pair.stage.path("ram");
        die_with_parent(command);
        let mut child = command
            .arg(pair.sender.socket())
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self { child, path }
    }

    /// The memfd that it keeps its memory in.
    fn memfd(&self, name: &str) -> PathBuf {
        let fds = fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap();
        let mut fds = fds.map(|entry| entry.unwrap().path());
        let is_it = |path: &PathBuf| {
            let target = fs::read_link(path).unwrap();
            target
                .to_str()
                .unwrap()
                .starts_with(&format!("/memfd:{name} "))
        };
        fds.find(is_it).unwrap()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program number `number`, from 1 on, behind what all of them begin with.
fn program(pair: &Pair, number: usize) -> Command {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/clients.md");
    let text = fs::read_to_string(docs).unwrap();
    let mut blocks = text
        .split("```python\n")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap());
    let begin = blocks.next().unwrap();
    let block = blocks.nth(number - 1).unwrap();
    let mut command = Command::new("python3");
    command.arg(pair.stage.write("program.py", &format!("{begin}\n{block}")));
    command
}

/// Waits until the program has written something, moves it, and compares.
fn moves(mut pair: Pair, kind: &str, memory: &Path) {
    let regions = pair.sender.call("query-regions", Value::Null);
    assert_eq!(regions[0]["tracker"]["kind"], kind, "{regions:#}");
    // It writes while it is moved, for at least a second pass.
    let done = pair.transfer("ram", json!({"max-bandwidth": "32MiB/s"}));
    let arrived = pair.destination("ram");
    assert_same(memory, &arrived);
    let mut count = [0; 8];
    let arrived = fs::File::open(arrived).unwrap();
    arrived.read_exact_at(&mut count, PAGE).unwrap();
    assert_ne!(u64::from_le_bytes(count), 0, "nothing was written");
    assert!(done["iterations"].as_array().unwrap().len() > 1);
}

#[test]
fn the_program_with_a_path_is_moved() {
    let pair = Pair::new();
    let client = Client::start(&pair, &mut program(&pair, 1));
    moves(pair, "scan", &client.path);
}

#[test]
fn the_program_that_the_kernel_tracks_is_moved() {
    let pair = Pair::new();
    let client = Client::start(&pair, &mut program(&pair, 2));
    moves(pair, "pagemap", &client.memfd("ram"));
}

#[test]
fn the_program_that_marks_is_moved_and_ends() {
    let pair = Pair::new();
    let mut client = Client::start(&pair, &mut program(&pair, 3));
    let ram = client.path.clone();
    moves(pair, "bitmap", &ram);
    assert!(client.child.wait().unwrap().success());
}

#[test]
fn the_example_in_rust_is_moved_and_ends() {
    let pair = Pair::new();
    // Beside the tests, where cargo builds examples before it runs them.
    let tests = std::env::current_exe().unwrap();
    let example = tests.ancestors().nth(2).unwrap().join("examples/writer");
    assert!(example.exists(), "cargo build --example writer");
    let mut client = Client::start(&pair, &mut Command::new(example));
    let ram = fs::File::open(client.memfd("ram")).unwrap();
    let held = format!("/proc/self/fd/{}", ram.as_raw_fd());
    moves(pair, "pagemap", Path::new(&held));
    assert!(client.child.wait().unwrap().success());
}
