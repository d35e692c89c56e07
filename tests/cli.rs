//! The client verbs as a user runs them, against a control socket with a scripted daemon behind it.
#![allow(
    clippy::unwrap_used,
    reason = "also the helpers of a test end it by a panic"
)]

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use memferry::control::{
    Access, Answer, Call, CommandError, CommandInfo, Commands, EventBus, Server,
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

/// A daemon that is told what `query-migrate` says, look by look; the last answer repeats.
struct Script {
    looks: Mutex<Vec<Value>>,
    /// What the next state is once `migrate_cancel` has come.
    cancelled: Option<Value>,
    calls: Mutex<Vec<(String, Value)>>,
    vanish: Option<CancellationToken>,
}

impl Commands for Script {
    fn table(&self) -> &'static [CommandInfo] {
        const fn info(name: &'static str) -> CommandInfo {
            CommandInfo { name, oob: false }
        }
        const TABLE: &[CommandInfo] = &[
            info("migrate"),
            info("migrate_cancel"),
            info("query-migrate"),
            info("query-regions"),
            info("region-add"),
            info("region-del"),
        ];
        TABLE
    }

    async fn execute(&self, call: Call) -> Result<Answer, CommandError> {
        let arguments = call.arguments.clone();
        self.calls
            .lock()
            .unwrap()
            .push((call.command.clone(), arguments));
        let answer = match call.command.as_str() {
            "migrate" if call.arguments["uri"] == "tcp:refused" => {
                Err(CommandError::new("exists", "the receiver has that Region"))
            }
            "migrate" => Ok(json!({"id": "t1"})),
            "migrate_cancel" => {
                if let Some(last) = &self.cancelled {
                    *self.looks.lock().unwrap() = vec![last.clone()];
                }
                Ok(json!({}))
            }
            "query-migrate" => {
                if let Some(vanish) = &self.vanish {
                    vanish.cancel();
                }
                let mut looks = self.looks.lock().unwrap();
                Ok(if looks.len() > 1 {
                    looks.remove(0)
                } else {
                    looks[0].clone()
                })
            }
            "query-regions" => Ok(json!([{"name": "vm", "size": 4096, "path": "/dev/shm/vm"}])),
            _ => Ok(json!({})),
        };
        answer.map(Answer::from)
    }
}

struct Daemon {
    _directory: tempfile::TempDir,
    socket: PathBuf,
    script: Arc<Script>,
    stop: CancellationToken,
    thread: Option<thread::JoinHandle<()>>,
}

impl Daemon {
    fn start(looks: Vec<Value>) -> Self {
        Self::scripted(looks, None, false)
    }

    fn scripted(looks: Vec<Value>, cancelled: Option<Value>, vanishes: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("sender.sock");
        let stop = CancellationToken::new();
        let script = Arc::new(Script {
            looks: Mutex::new(looks),
            cancelled,
            calls: Mutex::default(),
            vanish: vanishes.then(|| stop.clone()),
        });
        let server = Server::bind(&socket, Access::default()).unwrap();
        let serving = server.serve(script.clone(), EventBus::new(), stop.clone());
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(serving);
        });
        Self {
            _directory: directory,
            socket,
            script,
            stop,
            thread: Some(thread),
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("memferry"));
        command.arg("--socket").arg(&self.socket).args(arguments);
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn calls(&self, name: &str) -> Vec<Value> {
        let calls = self.script.calls.lock().unwrap();
        let named = calls.iter().filter(|(command, _)| command == name);
        named.map(|(_, arguments)| arguments.clone()).collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn active() -> Value {
    json!({"id": "t1", "status": "active", "ram": {"total": 100, "remaining": 50}})
}

#[test]
fn migrate_json_ends_with_one_line_and_progress_stays_on_standard_error() {
    let last = json!({"id": "t1", "status": "completed", "downtime-us": 5, "ram": {"total": 100}});
    let daemon = Daemon::start(vec![active(), last.clone()]);
    let output = daemon.run(&[
        "migrate",
        "tcp:h",
        "--set",
        "streams=3",
        "--json",
        "--progress=json",
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert_eq!(serde_json::from_str::<Value>(&out(&output)).unwrap(), last);
    assert_eq!(out(&output).lines().count(), 1);
    for line in err(&output).lines() {
        assert!(serde_json::from_str::<Value>(line).unwrap()["status"].is_string());
    }
    assert_eq!(
        daemon.calls("migrate"),
        [json!({"uri": "tcp:h", "streams": 3})]
    );
    assert_eq!(daemon.calls("query-migrate")[0], json!({"id": "t1"}));
}

#[test]
fn the_exit_code_says_how_the_transfer_ended() {
    for (last, code) in [
        (
            json!({"status": "failed", "error": {"desc": "gone", "x-code": "connection-lost"}}),
            4,
        ),
        (json!({"status": "cancelled"}), 5),
        (
            json!({"status": "failed", "error": {"desc": "slow", "x-code": "not-converged"}}),
            6,
        ),
        (json!({"status": "indeterminate"}), 1),
    ] {
        let output =
            Daemon::start(vec![last.clone()]).run(&["migrate", "tcp:h", "--progress", "none"]);
        assert_eq!(output.status.code(), Some(code), "{last}: {}", err(&output));
        if let Some(desc) = last["error"]["desc"].as_str() {
            assert!(out(&output).contains(desc));
        }
    }
    let daemon = Daemon::start(vec![active()]);
    let output = daemon.run(&["migrate", "tcp:refused"]);
    assert_eq!(output.status.code(), Some(8));
    assert_eq!(err(&output), "memferry: the receiver has that Region\n");
    assert_eq!(out(&output), "");
}

#[test]
fn detach_prints_the_id_and_does_not_wait() {
    let daemon = Daemon::start(vec![active()]);
    let output = daemon.run(&["migrate", "tcp:h", "--detach"]);
    assert_eq!(
        (output.status.code(), out(&output).as_str()),
        (Some(0), "t1\n")
    );
    assert_eq!(daemon.calls("query-migrate").len(), 0);
}

/// Starts a `migrate` that never ends by itself, and returns once it shows progress.
fn watching(daemon: &Daemon) -> (Child, BufReader<std::process::ChildStderr>) {
    let mut child = daemon
        .command(&["migrate", "tcp:h", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    wait_for(&mut stderr, "active");
    (child, stderr)
}

fn wait_for(stderr: &mut impl BufRead, text: &str) {
    let mut line = String::new();
    while !line.contains(text) {
        line.clear();
        assert_ne!(
            stderr.read_line(&mut line).unwrap(),
            0,
            "no {text:?} before the end"
        );
    }
}

fn interrupt(child: &Child) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
}

#[test]
fn the_first_interrupt_cancels_and_waits_for_it() {
    let cancelled = json!({"id": "t1", "status": "cancelled"});
    let daemon = Daemon::scripted(vec![active()], Some(cancelled.clone()), false);
    let (mut child, mut stderr) = watching(&daemon);
    interrupt(&child);
    wait_for(&mut stderr, "cancelling");
    let mut stdout = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut stdout)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(5));
    assert_eq!(serde_json::from_str::<Value>(&stdout).unwrap(), cancelled);
    assert_eq!(daemon.calls("migrate_cancel"), [json!({"id": "t1"})]);
}

#[test]
fn the_second_interrupt_leaves_the_transfer_running() {
    let daemon = Daemon::start(vec![active()]);
    let (mut child, mut stderr) = watching(&daemon);
    interrupt(&child);
    wait_for(&mut stderr, "cancelling");
    interrupt(&child);
    wait_for(&mut stderr, "left running: see `memferry status t1`");
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn a_daemon_that_is_not_there_or_goes_away_is_exit_code_3() {
    let daemon = Daemon::scripted(vec![active()], None, true);
    let output = daemon.run(&["migrate", "tcp:h"]);
    assert_eq!(output.status.code(), Some(3), "{}", err(&output));
    assert!(
        err(&output).contains("may still be running"),
        "{}",
        err(&output)
    );
    drop(daemon);

    let nowhere = tempfile::tempdir().unwrap();
    let output = Command::new(assert_cmd::cargo::cargo_bin!("memferry"))
        .env("MEMFERRY_SOCKET", nowhere.path().join("none"))
        .arg("status")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(
        err(&output).contains("no daemon listens on"),
        "{}",
        err(&output)
    );
}

#[test]
fn queries_print_the_daemons_answer_or_a_table() {
    let daemon = Daemon::start(vec![active()]);
    let output = daemon.run(&["status", "t1", "--json"]);
    assert_eq!(
        serde_json::from_str::<Value>(&out(&output)).unwrap(),
        active()
    );
    assert!(out(&daemon.run(&["status"])).starts_with("t1: active\n"));
    let list = out(&daemon.run(&["region", "list"]));
    assert!(
        list.starts_with("NAME") && list.contains("/dev/shm/vm"),
        "{list}"
    );
    let list: Value =
        serde_json::from_str(&out(&daemon.run(&["region", "list", "--json"]))).unwrap();
    assert_eq!(list[0]["name"], "vm");
    assert!(
        daemon
            .run(&["region", "add", "vm", "--path", "x"])
            .status
            .success()
    );
    assert!(daemon.run(&["region", "remove", "vm"]).status.success());
    assert_eq!(daemon.calls("region-del"), [json!({"name": "vm"})]);
    let output = daemon.run(&["region", "add", "../x", "--path", "x"]);
    assert_eq!(output.status.code(), Some(2), "{}", err(&output));
}

#[test]
fn a_closed_pipe_changes_no_exit_code() {
    let last = json!({"id": "t1", "status": "cancelled"});
    let daemon = Daemon::start(vec![last]);
    let mut child = daemon
        .command(&["migrate", "tcp:h"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    drop(child.stderr.take());
    assert_eq!(child.wait().unwrap().code(), Some(5));
}
