//! Writers that are faster than the link, slowed down until they are not; and that they run as before
//! afterwards, whatever ends it.
#![allow(
    clippy::unwrap_used,
    reason = "also the helpers of a test end it by a panic"
)]

mod common;

use std::time::{Duration, Instant};

use common::memory::assert_same;
use common::{DEADLINE, Daemon, Pair, Writer};
use serde_json::{Value, json};

const KIB: u64 = 1024;

/// A process that is slowed down is stopped at least once in this time.
const SEVERAL_TURNS: Duration = Duration::from_millis(500);

/// A writer of a MiB that writes half of it again and again, many times as fast as [`slow_link`].
fn writer(pair: &Pair) -> Writer {
    Writer::start(&pair.stage.path("r"), 1024 * KIB, "200MiB/s", 512 * KIB)
}

/// A MiB a second, and a downtime in which no more than a few pages can be sent over it.
fn slow_link(when_not_converging: &str) -> Value {
    json!({
        "max-bandwidth": "1MiB/s",
        "downtime-limit": "10ms",
        "max-iterations": 100_000,
        "when-not-converging": when_not_converging,
    })
}

fn with(mut parameters: Value, more: Value) -> Value {
    let Value::Object(more) = more else {
        panic!("parameters are an object")
    };
    parameters.as_object_mut().unwrap().extend(more);
    parameters
}

fn percentage(seen: &Value) -> u64 {
    seen["cpu-throttle-percentage"].as_u64().unwrap_or(0)
}

/// Waits until the writer of `r` is slowed down a lot, and seen to be.
fn wait_throttled(sender: &mut Daemon, writer: &Writer) {
    let seen = sender.wait_until("r", |seen| percentage(seen) >= 60);
    assert_eq!(seen["convergence"]["verdict"], "not-converging", "{seen:#}");
    let deadline = Instant::now() + DEADLINE;
    while !writer.is_stopped() {
        assert!(Instant::now() < deadline, "nobody slows it down");
        std::thread::yield_now();
    }
}

/// Most time until a writer runs as before whose sender has died: a second, and another one because a busy
/// machine may let everybody wait.
const RELEASE_MAX: Duration = Duration::from_secs(2);

/// Waits until the writer has not been stopped for several turns; since when.
fn assert_full_speed(writer: &Writer) -> Instant {
    let deadline = Instant::now() + DEADLINE;
    let mut running_since = Instant::now();
    while running_since.elapsed() < SEVERAL_TURNS {
        if writer.is_stopped() {
            running_since = Instant::now();
        }
        assert!(Instant::now() < deadline, "it is slow still");
        std::thread::yield_now();
    }
    running_since
}

#[test]
fn a_writer_faster_than_the_link_converges_if_it_is_slowed_down_and_not_otherwise() {
    let mut pair = Pair::new();
    let (path, socket) = (pair.stage.path("r"), pair.sender.socket().to_owned());
    // By the tracker that knows by itself, where the kernel has it; the others here by reading.
    let writer = Writer::register(&path, 1024 * KIB, "40MiB/s", 512 * KIB, &socket);
    let link = json!({"max-bandwidth": "4MiB/s", "downtime-limit": "50ms"});
    let given_up = json!({"when-not-converging": "fail", "max-iterations": 6});
    pair.begin("r", with(link.clone(), given_up));
    pair.sender.wait_failed("r", "not-converged");
    assert_full_speed(&writer);

    let slowed = json!({"when-not-converging": "throttle", "max-iterations": 100_000});
    pair.begin("r", with(link, slowed));
    pair.sender.wait_until("r", |seen| percentage(seen) > 0);
    let seen = pair.sender.wait("r", "completed");
    assert_eq!(percentage(&seen), 0, "{seen:#}");
    let left = &seen["iterations"].as_array().unwrap();
    // The last pass is the one for which it stood still.
    let left = &left[left.len() - 2]["dirty-bytes"];
    assert!(left.as_u64().unwrap() <= 4096 * KIB / 10, "{seen:#}");
    assert_same(&writer.path, &pair.destination("r"));
}

#[test]
fn a_writer_runs_as_before_after_a_cancel_a_pause_and_a_failure() {
    let mut pair = Pair::new();
    let writer = writer(&pair);
    pair.add_live("r", &writer);
    pair.begin("r", slow_link("throttle"));
    wait_throttled(&mut pair.sender, &writer);
    pair.sender.call("migrate-pause", json!({"id": "r"}));
    let seen = pair.sender.wait("r", "paused");
    assert_eq!(percentage(&seen), 0);
    assert_full_speed(&writer);

    pair.sender.call("migrate-recover", json!({"id": "r"}));
    wait_throttled(&mut pair.sender, &writer);
    pair.sender.call("migrate_cancel", json!({"id": "r"}));
    pair.sender.wait("r", "cancelled");
    assert_full_speed(&writer);

    let no_patience = json!({"recover-timeout": 0});
    pair.begin("r", with(slow_link("throttle"), no_patience));
    wait_throttled(&mut pair.sender, &writer);
    pair.receiver.kill();
    pair.sender.wait("r", "failed");
    assert_full_speed(&writer);
}

#[test]
fn a_writer_runs_as_before_while_connections_are_lost_and_when_its_sender_is_killed() {
    let mut pair = Pair::new();
    let writer = writer(&pair);
    pair.add_live("r", &writer);
    pair.begin("r", slow_link("throttle"));
    wait_throttled(&mut pair.sender, &writer);
    let killed = Instant::now();
    pair.sender.kill();
    let late = assert_full_speed(&writer) - killed;
    assert!(late <= RELEASE_MAX, "it runs as before after {late:?}");

    pair.sender = pair.stage.sender();
    pair.add_live("r", &writer);
    pair.begin("r", slow_link("throttle"));
    wait_throttled(&mut pair.sender, &writer);
    pair.receiver.kill();
    pair.sender.wait("r", "paused");
    assert_full_speed(&writer);
}

#[test]
fn a_writer_that_cannot_be_slowed_down_is_an_error_before_anything_is_sent() {
    let mut pair = Pair::new();
    let writer = writer(&pair);
    let command =
        json!({"kind": "command", "freeze": ["true"], "thaw": ["true"], "done": ["true"]});
    for (freeze, named) in [(json!("client"), "client"), (command, "command")] {
        let region = json!({"name": "r", "path": writer.path, "tracker": "scan", "freeze": freeze});
        pair.sender.call("region-add", region);
        pair.begin("r", slow_link("throttle"));
        let seen = pair.sender.wait_failed("r", "cannot-throttle");
        let desc = seen["error"]["desc"].as_str().unwrap();
        assert!(desc.contains(named), "{desc}");
        assert_eq!(seen["ram"]["transferred"], 0);
        pair.sender.call("region-del", json!({"name": "r"}));
    }
    pair.assert_nothing_happened(&[]);
}
