//! Freezing by control group and by command, between real processes, and who thaws when the sender dies.
#![allow(
    clippy::unwrap_used,
    reason = "also the helpers of a test end it by a panic"
)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Instant;

use common::fake::{FakeReceiver, Heard, Manners};
use common::memory::{MIB, assert_same};
use common::{DEADLINE, Daemon, Pair, Stage, Writer};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::{Value, json};

/// A control group with a writer in it; `None` where this machine lets us make none.
struct Group(PathBuf);

impl Group {
    fn new(name: &str, writer: &Writer) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mut mounts = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>());
        let mount = mounts.find(|mount| mount[2] == "cgroup2")?;
        let path = Path::new(mount[1]).join(format!("mf-test-{name}-{}", std::process::id()));
        fs::create_dir(&path).ok()?;
        let group = Self(path);
        fs::write(group.0.join("cgroup.procs"), writer.pid().to_string()).unwrap();
        Some(group)
    }

    fn freeze(&self) -> Value {
        json!({"kind": "cgroup", "path": self.0})
    }

    fn is_frozen(&self) -> bool {
        let events = fs::read_to_string(self.0.join("cgroup.events")).unwrap();
        events.contains("frozen 1")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        let deadline = Instant::now() + DEADLINE;
        while fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
}

/// Commands that stop a writer, and tell by files that they were run.
fn commands(stage: &Stage, writer: &Writer) -> Value {
    let run = |what: &str, signal: &str| {
        let note = stage.path(what);
        let text = format!(
            "kill -{signal} {}; echo {what} >> {}",
            writer.pid(),
            note.display()
        );
        json!(["sh", "-c", text])
    };
    json!({
        "kind": "command",
        "freeze": run("froze", "STOP"),
        "thaw": run("thawed", "CONT"),
        "done": run("done", "0"),
    })
}

/// How often a command was run.
fn times(stage: &Stage, what: &str) -> usize {
    fs::read_to_string(stage.path(what)).map_or(0, |text| text.lines().count())
}

fn wait_until(what: &str, seen: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !seen() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

fn add(sender: &mut Daemon, writer: &Writer, freeze: Value) {
    let region = json!({"name": "r", "path": writer.path, "tracker": "scan", "freeze": freeze});
    sender.call("region-add", region);
}

/// As far as the last Iteration, which the receiver does not acknowledge.
fn stand_still(sender: &mut Daemon, fake: &FakeReceiver) {
    sender.begin_patiently(&fake.uri, json!({"streams": 1}));
    fake.wait(|heard| matches!(heard, Heard::Mark { iteration: 2, .. }));
}

/// How many sockets a process has.
fn sockets(pid: i32) -> usize {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let links = open.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    links
        .filter(|link| link.to_string_lossy().starts_with("socket:"))
        .count()
}

#[test]
fn a_receiver_that_dies_between_its_prepared_and_the_commit_is_noticed_before_that() {
    let mut pair = Pair::new();
    let path = pair.stage.path("r");
    fs::write(&path, [7; 8192]).unwrap();
    let [begun, go, thawed] = ["begun", "go", "thawed"].map(|name| pair.stage.path(name));
    mkfifo(&go, Mode::S_IRWXU).unwrap();
    let shell = |text: String| json!(["sh", "-c", text]);
    // Nothing is owed, so the receiver has prepared when this begins.
    let freeze = format!("touch {}; cat {}", begun.display(), go.display());
    let commands = json!({
        "kind": "command",
        "freeze": shell(freeze),
        "thaw": shell(format!("touch {}", thawed.display())),
        "done": shell("true".into()),
    });
    let region = json!({"name": "r", "path": path, "freeze": commands});
    pair.sender.call("region-add", region);
    pair.begin(
        "r",
        json!({"recover-timeout": "0", "freeze-timeout": "60s", "stall-timeout": "2s"}),
    );
    wait_until("the freeze begins", || begun.exists());
    let sender = pair.sender.pid();
    let before = sockets(sender);
    pair.receiver.kill();
    // It hangs up once it has heard of it.
    wait_until("the sender knows", || sockets(sender) < before);
    fs::write(go, "").unwrap();
    pair.sender.wait_failed("r", "connection-lost");
    assert!(thawed.exists(), "the writer goes on");
    pair.sender.assert_alive();
}

#[test]
fn a_writer_in_a_control_group_is_moved() {
    let mut pair = Pair::new();
    let writer = Writer::start(&pair.stage.path("r"), 4 * MIB, "4MiB/s", MIB);
    let Some(group) = Group::new("moved", &writer) else {
        return;
    };
    add(&mut pair.sender, &writer, group.freeze());
    pair.transfer("r", json!({}));
    assert!(group.is_frozen());
    assert_same(&writer.path, &pair.destination("r"));
}

#[test]
fn a_control_group_goes_on_when_its_transfer_is_cancelled_and_when_its_sender_is_killed() {
    let stage = Stage::new();
    let writer = Writer::start(&stage.path("r"), 2 * MIB, "2MiB/s", MIB);
    let Some(group) = Group::new("killed", &writer) else {
        return;
    };
    let mut sender = stage.sender();
    add(&mut sender, &writer, group.freeze());
    let fake = FakeReceiver::start(Manners::Acknowledges(1));
    stand_still(&mut sender, &fake);
    assert!(group.is_frozen());
    sender.call("migrate_cancel", json!({"id": "r"}));
    sender.wait("r", "cancelled");
    wait_until("it is frozen still", || !group.is_frozen());

    stand_still(&mut sender, &fake);
    assert!(group.is_frozen());
    sender.kill();
    wait_until("nobody thaws it", || !group.is_frozen());
}

#[test]
fn a_writer_is_stopped_by_command_and_what_is_to_be_done_is_done() {
    let mut pair = Pair::new();
    let writer = Writer::start(&pair.stage.path("r"), 4 * MIB, "4MiB/s", MIB);
    let freeze = commands(&pair.stage, &writer);
    add(&mut pair.sender, &writer, freeze);
    pair.transfer("r", json!({}));
    assert!(writer.is_stopped());
    assert_same(&writer.path, &pair.destination("r"));
    let stage = &pair.stage;
    wait_until("nothing is done", || times(stage, "done") == 1);
    assert_eq!((times(stage, "froze"), times(stage, "thawed")), (1, 0));
}

#[test]
fn the_thaw_command_is_run_when_its_transfer_is_cancelled_and_when_its_sender_is_killed() {
    let stage = Stage::new();
    let writer = Writer::start(&stage.path("r"), 2 * MIB, "2MiB/s", MIB);
    let mut sender = stage.sender();
    add(&mut sender, &writer, commands(&stage, &writer));
    let fake = FakeReceiver::start(Manners::Acknowledges(1));
    stand_still(&mut sender, &fake);
    sender.call("migrate_cancel", json!({"id": "r"}));
    sender.wait("r", "cancelled");
    writer.assert_runs();
    assert_eq!((times(&stage, "thawed"), times(&stage, "done")), (1, 0));

    stand_still(&mut sender, &fake);
    assert!(writer.is_stopped());
    sender.kill();
    writer.assert_runs();
    wait_until("it is not run", || times(&stage, "thawed") == 2);
    assert_eq!(times(&stage, "done"), 0);
}

#[test]
fn a_freeze_command_that_fails_or_hangs_ends_the_transfer_with_the_writer_running() {
    let mut pair = Pair::new();
    let writer = Writer::start(&pair.stage.path("r"), 2 * MIB, "2MiB/s", MIB);
    for (text, code, said) in [
        (
            "echo no such machine >&2; exit 7",
            "freeze-failed",
            "no such machine",
        ),
        ("sleep 600", "freeze-timeout", "sleep 600"),
    ] {
        let mut freeze = commands(&pair.stage, &writer);
        let stop = format!("kill -STOP {}; {text}", writer.pid());
        freeze["freeze"] = json!(["sh", "-c", stop]);
        add(&mut pair.sender, &writer, freeze);
        pair.begin("r", json!({"freeze-timeout": "500ms"}));
        let seen = pair.sender.wait_failed("r", code);
        let desc = seen["error"]["desc"].as_str().unwrap();
        assert!(desc.contains(said), "{desc}");
        writer.assert_runs();
        pair.assert_nothing_happened(&[]);
        pair.sender.call("region-del", json!({"name": "r"}));
    }
    assert_eq!(times(&pair.stage, "thawed"), 2);
}

#[test]
fn what_cannot_be_frozen_is_refused_when_it_is_added() {
    let mut pair = Pair::new();
    let writer = Writer::start(&pair.stage.path("r"), MIB, "0", 0);
    let mut refused = |freeze: Value| {
        let region = json!({"name": "r", "path": writer.path, "freeze": freeze});
        pair.sender.refusal("region-add", region).0
    };
    let directory = writer.path.parent().unwrap();
    for path in [directory, Path::new("/nonexistent/group")] {
        assert_eq!(
            refused(json!({"kind": "cgroup", "path": path})),
            "freeze-refused"
        );
    }
    // Every process of this test is in it, the sender too.
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    if let Some(mount) = mounts.lines().find(|line| line.contains(" cgroup2 ")) {
        let root = mount.split(' ').nth(1).unwrap();
        assert_eq!(
            refused(json!({"kind": "cgroup", "path": root})),
            "freeze-refused"
        );
    }
    assert_eq!(
        refused(json!({"kind": "command", "freeze": ["a"]})),
        "invalid-argument"
    );
}

/// Starts processes until one has this number, which the kernel gives out in turn: it is told where to go on.
fn with_the_number_of(gone: i32, start: impl Fn() -> Child) -> Child {
    let deadline = Instant::now() + DEADLINE;
    loop {
        fs::write("/proc/sys/kernel/ns_last_pid", (gone - 1).to_string()).unwrap();
        let mut child = start();
        if i32::try_from(child.id()) == Ok(gone) {
            return child;
        }
        // Somebody else was faster.
        let _ = child.kill();
        let _ = child.wait();
        assert!(Instant::now() < deadline, "the number {gone} is not free");
    }
}

#[test]
fn a_process_that_got_the_number_of_the_writer_is_left_alone() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: choosing the number of a process takes root");
        return;
    }
    let mut pair = Pair::new();
    let writer = Writer::start(&pair.stage.path("r"), MIB, "0", 0);
    pair.add_live("r", &writer);
    let pid = writer.pid();
    drop(writer);
    let sleep = || Command::new("sleep").arg("600").spawn().unwrap();
    let mut bystander = with_the_number_of(pid, sleep);
    pair.begin("r", json!({}));
    pair.sender.wait_failed("r", "writer-gone");
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    assert!(stat.contains(") S "), "{stat}");
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    pair.assert_nothing_happened(&[]);
}
