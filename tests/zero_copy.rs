//! Zero copy as an operator meets it: asked for where it cannot be, under a tight limit, and examined.
#![allow(
    clippy::unwrap_used,
    reason = "also the helpers of a test end it by a panic"
)]

mod common;

use std::time::Instant;

use common::memory::{assert_same, dense};
use common::{DEADLINE, Pair, Stage, memferry};
use memferry::client::Connection;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const ENGINES: [&str; 3] = ["msg-zerocopy", "io-uring", "io-uring-fixed"];

#[test]
fn every_engine_falls_back_on_loopback_and_says_why() {
    const SIZE: u64 = 128 * MIB;
    let mut pair = Pair::new();
    let source = pair.stage.path("source");
    dense(&source, SIZE, 1);
    let mut listener = Connection::connect(pair.sender.socket()).unwrap();
    for mode in ENGINES.into_iter().chain(["auto"]) {
        pair.add(mode, &source);
        let done = pair.transfer(mode, json!({"zero-copy": mode, "streams": 1}));
        assert_same(&source, &pair.destination(mode));
        // The same file is moved again, which is not refused once the region is forgotten.
        pair.sender.call("region-del", json!({"name": mode}));
        let shown = &done["zero-copy"];
        assert_eq!(shown["path"], "plain", "{shown}");
        assert_eq!(shown["fallbacks"], 1, "{shown}");
        assert!(
            shown["reason"].as_str().unwrap().contains("loopback"),
            "{shown}"
        );
        // A window of eight sends decides; some more are under way by then.
        let sends = shown["sends"].as_u64().unwrap();
        assert!((8..64).contains(&sends), "{shown}");
        assert_eq!(shown["copied"], shown["sends"]);
        let event = fallback_of(&mut listener, mode);
        let engine = if mode == "auto" { "io-uring" } else { mode };
        assert_eq!(event["from"], engine, "{event}");
        assert_eq!(
            (&event["to"], &event["stream"]),
            (&json!("plain"), &json!(0))
        );
        assert!(event["reason"].as_str().unwrap().contains("loopback"));
    }
}

/// The event that the transfer `id` fell back.
fn fallback_of(listener: &mut Connection, id: &str) -> Value {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let event = listener.next_event(left).unwrap();
        let event = event.expect("the fallback is announced");
        if event.name == "ZEROCOPY_FALLBACK" && event.data["id"] == id {
            return event.data;
        }
    }
}

#[test]
fn under_a_memlock_limit_of_1_mib_every_engine_completes_and_says_why() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can start a sender as a user with a memlock limit");
        return;
    }
    const SIZE: u64 = 48 * MIB;
    // The limit is per user, so a user of its own: another run must not use it up.
    let user = 1_900_000_000 + std::process::id();
    let stage = Stage::new();
    let mut receiver = stage.receiver();
    let uri = receiver.uri();
    let source = stage.path("source");
    dense(&source, SIZE, 1);
    let open = |path: &std::path::Path| std::os::unix::fs::chown(path, Some(user), None).unwrap();
    open(&source);
    open(source.parent().unwrap());
    let config = format!("{}[transfer]\nstreams = 2\n", stage.common_config("sender"));
    // What is started in between inherits it; other tests run as root, whom it does not bind.
    let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
    setrlimit(Resource::RLIMIT_MEMLOCK, MIB, hard).unwrap();
    let mut sender = common::Daemon::start(&stage, "sender", "sender", &config, Some(user));
    setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard).unwrap();
    for mode in ENGINES {
        sender.call("region-add", json!({"name": mode, "path": source}));
        let order = json!({"uri": uri, "id": mode, "regions": [mode], "zero-copy": mode});
        sender.call("migrate", order);
        let done = sender.wait(mode, "completed");
        assert_same(&source, &stage.arrived().join(mode));
        // The same file is moved again, which is not refused once the region is forgotten.
        sender.call("region-del", json!({"name": mode}));
        let shown = &done["zero-copy"];
        assert!(
            shown["reason"].as_str().unwrap().contains("memlock"),
            "{shown}"
        );
    }
}

#[test]
fn the_doctor_tells_what_works_here() {
    let output = memferry()
        .args(["doctor", "--json", "--directory", "/dev/shm"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["ok"], true);
    let found = |what: &str| {
        let findings = told["findings"].as_array().unwrap();
        let found = findings.iter().find(|found| found["what"] == what);
        found.unwrap_or_else(|| panic!("{what}: {told:#}")).clone()
    };
    for engine in ENGINES {
        assert_eq!(found(engine)["verdict"], "ok", "{told:#}");
    }
    for what in [
        "kernel",
        "memlock",
        "net.core.optmem_max",
        "io_uring",
        "cgroup v2",
    ] {
        assert_ne!(found(what)["found"], "");
    }
    let table = memferry().arg("doctor").output().unwrap();
    assert!(String::from_utf8_lossy(&table.stdout).contains("msg-zerocopy"));
}
