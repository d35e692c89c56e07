//! Connections break in every phase, and the transfer goes on with what is owed.
#![allow(
    clippy::unwrap_used,
    reason = "also the helpers of a test end it by a panic"
)]

#[path = "../common/mod.rs"]
mod common;
mod often;

use std::time::Instant;

use common::memory::{MIB, assert_same, dense};
use common::relay::{Act, Frame, Kind, Relay, Side, Silence, Which};
use common::{DEADLINE, Pair, Stage, Writer, listing};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// A pair over a bad line, with the Region `r` that a writer keeps writing.
fn live(size: u64) -> (Pair, Relay, Writer) {
    let mut pair = Pair::new();
    let relay = bad_line(&mut pair);
    let writer = Writer::start(&pair.stage.path("r"), size, "4MiB/s", size / 4);
    pair.add_live("r", &writer);
    (pair, relay, writer)
}

/// From here on the sender reaches the receiver over a bad line.
fn bad_line(pair: &mut Pair) -> Relay {
    let relay = Relay::start(&pair.uri);
    pair.uri = relay.local_uri();
    relay
}

/// Where nobody listens: a relay to there hangs up on who connects.
const NOBODY: &str = "tcp:127.0.0.1:1";

/// From now on nobody can connect, and nobody is connected.
fn close(relay: &Relay) {
    relay.retarget(NOBODY);
    relay.reset(Which::All);
}

/// Accepts the sender's frame with which so many bytes have passed on such a connection.
fn after(which: Which, bytes: u64) -> impl FnMut(&Frame) -> bool + Send {
    let mut passed = 0;
    move |frame| {
        let counts = frame.from == Side::Sender && which.covers(frame.stream);
        passed += if counts { frame.bytes as u64 } else { 0 };
        counts && passed > bytes
    }
}

/// Accepts this message.
fn says(name: &'static str) -> impl FnMut(&Frame) -> bool + Send {
    move |frame| frame.kind == Kind::Message(name.to_owned())
}

/// So slow that there is time to break something.
fn slow() -> Value {
    json!({"max-bandwidth": "8MiB/s", "packet-size": "64KiB", "window": "256KiB", "streams": 3})
}

/// The same, with one Iteration before the freeze; so the last one is long.
fn slow_and_frozen() -> Value {
    let mut order = slow();
    order["max-iterations"] = json!(1);
    order
}

fn sent(bytes: u64) -> impl Fn(&Value) -> bool {
    move |seen| seen["ram"]["transferred"].as_u64() >= Some(bytes)
}

fn interrupted(times: u64) -> impl Fn(&Value) -> bool {
    move |seen| seen["recoveries"].as_u64() >= Some(times)
}

/// After whatever happened: completed, and nothing is missing.
#[track_caller]
fn assert_arrived(pair: &mut Pair, writer: &Writer) -> Value {
    let seen = pair.sender.wait("r", "completed");
    assert!(writer.is_stopped());
    assert_same(&writer.path, &pair.destination("r"));
    assert_eq!(listing(&pair.stage.arrived()), ["r"]);
    seen
}

fn code(seen: &Value) -> &str {
    seen["interruption"]["x-code"].as_str().unwrap_or_default()
}

#[test]
fn a_lost_connection_of_any_kind_is_replaced() {
    for which in [Which::All, Which::Conversation, Which::Stream(1)] {
        let (mut pair, relay, writer) = live(4 * MIB);
        pair.begin("r", slow());
        pair.sender.wait_until("r", sent(MIB));
        relay.reset(which);
        let seen = assert_arrived(&mut pair, &writer);
        assert_eq!(seen["recoveries"], 1, "{which:?} {seen:#}");
        assert_eq!(code(&seen), "connection-lost", "{seen:#}");
    }
}

#[test]
fn what_the_line_damages_is_found_and_sent_again() {
    let (mut pair, relay, writer) = live(8 * MIB);
    pair.begin("r", slow());
    let damages = [
        (Which::Stream(0), Act::Cut, 10),
        (Which::Stream(1), Act::FlipHead, 70),
        (Which::Stream(2), Act::Cut, 100_000),
        (Which::Stream(0), Act::FlipHead, 100_001),
        (Which::Conversation, Act::FlipHead, 3),
        (Which::Conversation, Act::Cut, 20),
        (Which::Stream(1), Act::FlipHead, 200_000),
    ];
    for (which, act, bytes) in damages {
        relay.damage(act, 1, after(which, bytes));
        pair.sender.wait_until("r", |seen| {
            relay.is_spent() || seen["status"] == "completed"
        });
        relay.heal();
    }
    let seen = assert_arrived(&mut pair, &writer);
    assert!(seen["recoveries"].as_u64() >= Some(2), "{seen:#}");
}

#[test]
fn every_flipped_bit_is_found_counted_and_repaired() {
    const FLIPS: u64 = 20;
    let mut pair = Pair::new();
    let relay = bad_line(&mut pair);
    let source = pair.stage.path("r");
    dense(&source, 8 * MIB, 1);
    pair.add("r", &source);
    let payload = |frame: &Frame| frame.payload > 0;
    relay.damage(Act::FlipPayload, FLIPS, payload);
    // Slow enough that most of it is still to come whenever the next trap is set, on a busy machine too.
    let mut slower = slow();
    slower["max-bandwidth"] = json!("2MiB/s");
    pair.begin("r", slower);
    // A packet is one block of 16 pages here.
    let torn = json!(16 * FLIPS);
    pair.sender
        .wait_until("r", |seen| seen["ram"]["torn"] == torn);
    for times in 1..=3 {
        relay.damage(Act::FlipHead, 1, payload);
        let seen = pair.sender.wait_until("r", interrupted(times));
        assert_eq!(code(&seen), "line-damage", "{seen:#}");
    }
    let seen = pair.sender.wait("r", "completed");
    assert_same(&source, &pair.destination("r"));
    assert!(relay.is_spent());
    assert_eq!(seen["ram"]["torn"], torn, "{seen:#}");
    assert_eq!(seen["recoveries"], 3, "{seen:#}");
}

#[test]
fn a_transfer_over_a_line_that_breaks_again_and_again_sends_little_twice() {
    let (mut pair, relay, writer) = live(16 * MIB);
    drop(writer);
    let source = pair.stage.path("still");
    dense(&source, 16 * MIB, 1);
    pair.add("still", &source);
    pair.begin(
        "still",
        // Slow enough that most of it is still to come whenever the next trap is set.
        json!({"packet-size": "64KiB", "streams": 2, "max-bandwidth": "6MiB/s"}),
    );
    for cut in 1..=5 {
        relay.damage(Act::Cut, 1, after(Which::All, MIB / 4));
        pair.sender.wait_until("still", |_| relay.is_spent());
        pair.sender.wait_until("still", interrupted(cut));
    }
    let seen = pair.sender.wait("still", "completed");
    assert_same(&source, &pair.destination("still"));
    let forwarded = relay.forwarded();
    assert!(forwarded < 24 * MIB, "{forwarded} bytes, {seen:#}");
}

#[test]
fn a_connection_lost_while_the_writer_stands_still_is_repaired_without_a_thaw() {
    let (mut pair, relay, writer) = live(8 * MIB);
    pair.begin("r", slow_and_frozen());
    // The state says that it is being stopped; that it stands still comes a moment later.
    pair.sender.wait_until("r", |_| writer.is_stopped());
    relay.reset(Which::All);
    let seen = pair.sender.wait_until("r", |seen| {
        assert!(writer.is_stopped());
        interrupted(1)(seen) && seen["status"] == "device"
    });
    assert_eq!(code(&seen), "connection-lost");
    assert_arrived(&mut pair, &writer);
}

#[test]
fn a_writer_waits_for_a_lost_connection_no_longer_than_the_freeze_timeout() {
    let (mut pair, relay, writer) = live(8 * MIB);
    let mut order = slow_and_frozen();
    order["freeze-timeout"] = json!("300ms");
    pair.begin("r", order);
    pair.sender.wait("r", "device");
    close(&relay);
    let lost = Instant::now();
    pair.sender.wait("r", "paused");
    while writer.is_stopped() {
        assert!(lost.elapsed() < DEADLINE);
    }
    assert_eq!(pair.sender.wait("r", "paused")["status"], "paused");
    relay.retarget(&pair.receiver.uri());
    assert_arrived(&mut pair, &writer);
}

#[test]
fn a_hand_over_is_repeated_whichever_word_of_it_was_lost() {
    for word in ["prepare", "prepared"] {
        let (mut pair, relay, writer) = live(2 * MIB);
        relay.damage(Act::Cut, 1, says(word));
        pair.begin("r", json!({"streams": 2}));
        let seen = assert_arrived(&mut pair, &writer);
        assert_eq!(seen["recoveries"], 1, "{word} {seen:#}");
    }
}

#[test]
fn a_receiver_that_is_late_with_its_prepared_is_asked_once_more() {
    for (times, ends) in [(1, "completed"), (2, "failed")] {
        let (mut pair, relay, writer) = live(2 * MIB);
        // Heartbeats get through all the time.
        relay.damage(Act::Swallow, times, says("prepared"));
        pair.begin("r", json!({"streams": 2, "stall-timeout": "500ms"}));
        let seen = pair.sender.wait("r", ends);
        assert!(relay.is_spent());
        assert_eq!(seen["recoveries"], 1, "{seen:#}");
        assert_eq!(code(&seen), "stalled", "{seen:#}");
        if ends == "completed" {
            assert_arrived(&mut pair, &writer);
        } else {
            assert_eq!(seen["error"]["x-code"], "stalled", "{seen:#}");
            writer.assert_runs();
            pair.receiver.wait_arrival("r", "failed");
            pair.assert_nothing_happened(&[]);
        }
    }
}

#[test]
fn a_resumption_whose_answer_is_lost_is_asked_for_again() {
    for word in ["resume", "resumed"] {
        let (mut pair, relay, writer) = live(4 * MIB);
        pair.begin("r", slow());
        pair.sender.wait_until("r", sent(MIB));
        relay.damage(Act::Cut, 1, says(word));
        relay.reset(Which::All);
        let seen = assert_arrived(&mut pair, &writer);
        assert!(relay.is_spent());
        assert_eq!(seen["recoveries"], 1, "one loss, two tries: {seen:#}");
    }
}

#[test]
fn a_transfer_begins_again_with_a_receiver_that_was_killed() {
    let stage = Stage::new();
    let receiver = stage.receiver_with(&stage.peer_uri(), "");
    let mut pair = Pair::of(stage, receiver);
    for when in ["active", "device"] {
        let writer = Writer::start(&pair.stage.path("r"), 8 * MIB, "4MiB/s", 2 * MIB);
        pair.add_live("r", &writer);
        pair.begin("r", slow_and_frozen());
        pair.sender.wait_until("r", sent(MIB));
        pair.sender.wait("r", when);
        pair.receiver.kill();
        pair.sender.wait("r", "paused");
        pair.receiver = pair.stage.receiver_with(&pair.uri, "");
        assert_arrived(&mut pair, &writer);
        pair.sender.call("region-del", json!({"name": "r"}));
        std::fs::remove_file(pair.destination("r")).unwrap();
        std::fs::remove_file(pair.stage.path("r")).unwrap();
    }
}

#[test]
fn a_receiver_that_is_told_to_stop_ends_its_threads_and_the_transfer_begins_again() {
    let stage = Stage::new();
    let receiver = stage.receiver_with(&stage.peer_uri(), "");
    let mut pair = Pair::of(stage, receiver);
    let writer = Writer::start(&pair.stage.path("r"), 8 * MIB, "4MiB/s", 2 * MIB);
    pair.add_live("r", &writer);
    pair.begin("r", slow());
    pair.sender.wait_until("r", sent(MIB));
    pair.receiver.call("quit", Value::Null);
    pair.receiver.wait_end();
    let log = pair.receiver.log();
    assert!(log.contains("what was not committed is not kept"), "{log}");
    assert_eq!(listing(&pair.stage.arrived()), [""; 0]);
    let seen = pair.sender.wait("r", "paused");
    assert_eq!(code(&seen), "connection-lost", "{seen:#}");
    pair.receiver = pair.stage.receiver_with(&pair.uri, "");
    assert_arrived(&mut pair, &writer);
}

#[test]
fn a_sender_that_was_killed_can_begin_again_at_once() {
    let (mut pair, relay, writer) = live(8 * MIB);
    pair.begin("r", slow());
    pair.sender.wait_until("r", sent(MIB));
    pair.sender.kill();
    pair.receiver.wait_arrival("r", "paused");
    pair.sender = pair.stage.sender();
    pair.add_live("r", &writer);
    pair.begin("r", json!({}));
    assert_arrived(&mut pair, &writer);
    drop(relay);
}

#[test]
fn a_line_that_stays_broken_fails_the_transfer_on_both_sides_with_the_first_reason() {
    let (mut pair, relay, writer) = live(8 * MIB);
    let mut order = slow();
    order["recover-timeout"] = json!("500ms");
    order["stall-timeout"] = json!("500ms");
    pair.begin("r", order);
    pair.sender.wait_until("r", sent(MIB));
    close(&relay);
    let failed = pair.sender.wait_failed("r", "connection-lost");
    let desc = failed["error"]["desc"].as_str().unwrap();
    assert!(desc.contains("recover-timeout"), "{desc}");
    writer.assert_runs();
    pair.receiver.wait_arrival("r", "failed");
    pair.assert_nothing_happened(&[]);
}

#[test]
fn a_line_that_only_looks_alive_is_not_tried_for_ever() {
    let (mut pair, relay, writer) = live(8 * MIB);
    let mut order = slow();
    order["recover-timeout"] = json!("1s");
    order["streams"] = json!(1);
    // Every connection comes up, and no packet gets through.
    relay.damage(Act::Cut, u64::MAX, |frame| {
        matches!(frame.kind, Kind::Packet { .. })
    });
    pair.begin("r", order);
    pair.sender.wait_failed("r", "connection-lost");
    assert!(relay.connections() > 4);
    writer.assert_runs();
    pair.receiver.assert_alive();
}

#[test]
fn a_silent_network_interrupts_until_it_speaks_again() {
    let (mut pair, relay, writer) = live(8 * MIB);
    let mut order = slow();
    order["stall-timeout"] = json!("500ms");
    pair.begin("r", order);
    pair.sender.wait_until("r", sent(MIB));
    relay.silence(Silence::Everything);
    let seen = pair.sender.wait("r", "paused");
    // The line itself answers here, so it looks as if somebody hung; and the receiver may give up first.
    let blamed = ["peer-hung", "destination-slow", "connection-lost"];
    assert!(blamed.contains(&code(&seen)), "{seen:#}");
    relay.silence(Silence::Nothing);
    relay.reset(Which::All);
    assert_arrived(&mut pair, &writer);
}

#[test]
fn a_receiver_that_hangs_for_a_while_goes_on_where_it_was() {
    let (mut pair, _relay, writer) = live(8 * MIB);
    let mut order = slow();
    order["stall-timeout"] = json!("500ms");
    pair.begin("r", order);
    pair.sender.wait_until("r", sent(MIB));
    pair.receiver.signal(Signal::SIGSTOP);
    let seen = pair.sender.wait("r", "paused");
    assert!(
        ["peer-hung", "destination-slow"].contains(&code(&seen)),
        "{seen:#}"
    );
    pair.receiver.signal(Signal::SIGCONT);
    assert_arrived(&mut pair, &writer);
}

#[test]
fn fewer_streams_than_asked_for_are_a_slower_transfer() {
    let (mut pair, relay, writer) = live(2 * MIB);
    relay.damage(Act::Cut, u64::MAX, |frame| {
        frame.kind == Kind::Preamble && frame.stream >= Some(2)
    });
    pair.begin("r", json!({"streams": 4}));
    let seen = assert_arrived(&mut pair, &writer);
    assert_eq!(seen["streams"], 2, "{seen:#}");
}

#[test]
fn a_paused_transfer_stands_still_until_it_is_to_go_on() {
    for lost in [false, true] {
        let (mut pair, relay, writer) = live(8 * MIB);
        pair.begin("r", slow());
        pair.sender.wait_until("r", sent(MIB));
        assert_eq!(pair.sender.cli(&["pause", "r"]).status.code(), Some(0));
        let seen = pair.sender.wait("r", "paused");
        let at_pause = seen["ram"]["transferred"].clone();
        writer.assert_runs();
        if lost {
            relay.reset(Which::All);
            pair.receiver.wait_arrival("r", "paused");
        }
        let seen = pair.sender.call("query-migrate", json!({"id": "r"}));
        assert_eq!(seen["status"], "paused");
        assert_eq!(seen["ram"]["transferred"], at_pause);
        assert_eq!(pair.sender.cli(&["recover", "r"]).status.code(), Some(0));
        assert_arrived(&mut pair, &writer);
        let (code, _) = pair.sender.refusal("migrate-pause", json!({"id": "r"}));
        assert_eq!(code, "not-active");
        let (code, _) = pair.sender.refusal("migrate-recover", json!({"id": "r"}));
        assert_eq!(code, "not-paused");
    }
}

#[test]
fn a_lost_transfer_goes_on_at_another_address_of_its_receiver() {
    let (mut pair, relay, writer) = live(8 * MIB);
    pair.begin("r", slow());
    pair.sender.wait_until("r", sent(MIB));
    close(&relay);
    pair.sender.wait("r", "paused");
    let direct = pair.receiver.uri();
    pair.sender
        .call("migrate-recover", json!({"id": "r", "uri": direct}));
    assert_arrived(&mut pair, &writer);
}

#[test]
fn a_cancel_ends_a_transfer_that_waits() {
    for held in [false, true] {
        let (mut pair, relay, writer) = live(8 * MIB);
        pair.begin("r", slow());
        pair.sender.wait_until("r", sent(MIB));
        if held {
            pair.sender.call("migrate-pause", json!({"id": "r"}));
        } else {
            close(&relay);
        }
        pair.sender.wait("r", "paused");
        pair.sender.call("migrate_cancel", json!({"id": "r"}));
        pair.sender.wait("r", "cancelled");
        writer.assert_runs();
        relay.retarget(&pair.receiver.uri());
        // And the receiver has room for it again.
        pair.begin("r", json!({}));
        assert_arrived(&mut pair, &writer);
    }
}

#[test]
fn a_tracked_writer_loses_no_page_over_a_bad_line() {
    let mut pair = Pair::new();
    let relay = bad_line(&mut pair);
    let path = pair.stage.path("r");
    let socket = pair.sender.socket().to_owned();
    let writer = Writer::register(&path, 8 * MIB, "8MiB/s", 2 * MIB, &socket);
    pair.begin("r", slow());
    for times in 1..=4 {
        pair.sender
            .wait_until("r", |seen| seen["status"] == "active");
        let at = pair.sender.call("query-migrate", json!({"id": "r"}));
        let at = at["ram"]["transferred"].as_u64().unwrap();
        pair.sender.wait_until("r", sent(at + MIB / 4));
        relay.reset(if times % 2 == 0 {
            Which::All
        } else {
            Which::Stream(0)
        });
        pair.sender.wait_until("r", interrupted(times));
    }
    assert_arrived(&mut pair, &writer);
}
