//! Whole transfers with real daemons: what arrives is what was there, whatever its shape, whichever way
//! it goes, and the numbers that are reported are those of what happened.
#![allow(
    clippy::unwrap_used,
    reason = "also the helpers of a test end it by a panic"
)]

mod common;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use common::memory::{MIB, PAGE, assert_same, blocks, dense, noise, punch, sparse};
use common::{DEADLINE, Pair, Stage, Writer, cpus_of_streams, listing};
use serde_json::{Value, json};

fn number(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

/// What every completed transfer reports, however it went.
#[track_caller]
fn assert_sane(done: &Value, bytes: u64) {
    let ram = &done["ram"];
    assert_eq!(ram["total"], bytes, "{done:#}");
    assert_eq!(ram["remaining"], 0);
    assert!(number(&ram["transferred"]) >= number(&ram["normal-bytes"]));
    let iterations = done["iterations"].as_array().unwrap();
    assert!(!iterations.is_empty());
    assert_eq!(ram["dirty-sync-count"], iterations.len());
    for (pass, row) in (1u64..).zip(iterations) {
        assert_eq!(row["pass"], pass);
    }
    let payload: u64 = iterations.iter().map(|row| number(&row["bytes"])).sum();
    assert_eq!(payload, number(&ram["normal-bytes"]), "{done:#}");
    let downtime_us = number(&done["downtime-us"]);
    assert_eq!(done["downtime"], downtime_us / 1000);
    assert!(number(&done["total-time"]) >= downtime_us / 1000);
    let parts = done["downtime-breakdown-us"].as_object().unwrap();
    let sum: u64 = parts.values().map(number).sum();
    assert!(sum <= downtime_us, "{done:#}");
    assert!(done.get("error").is_none());
}

/// What is said about zero copy over TCP on loopback, where the kernel copies every such send.
#[track_caller]
fn assert_honest(done: &Value, mode: &str) {
    let shown = &done["zero-copy"];
    assert_eq!(shown["requested"], mode);
    let (path, reason) = (
        shown["path"].as_str().unwrap(),
        shown["reason"].as_str().unwrap(),
    );
    assert!(number(&shown["sends"]) >= number(&shown["copied"]));
    if mode == "off" {
        assert_eq!((path, reason), ("plain", ""));
        assert_eq!(shown["sends"], 0);
        return;
    }
    assert_eq!(shown["sends"], shown["copied"], "{shown}");
    assert_ne!(shown["sends"], 0);
    assert!(reason.contains("loopback"), "{shown}");
    // A stream that sent little has not fallen back yet.
    let engine = if mode == "auto" { "io-uring" } else { mode };
    assert!([engine, "plain"].contains(&path), "{shown}");
}

/// Streams × (an idle Region, a live one) with one zero-copy mode.
fn every_byte_arrives(mode: &str) {
    const SIZE: u64 = 6 * MIB;
    let mut pair = Pair::new();
    for streams in [1, 2, 8] {
        let idle = format!("idle-{streams}");
        let source = pair.stage.path(&idle);
        dense(&source, SIZE, streams);
        pair.add(&idle, &source);
        let done = pair.transfer(&idle, json!({"streams": streams, "zero-copy": mode}));
        assert_same(&source, &pair.destination(&idle));
        assert_sane(&done, SIZE);
        assert_honest(&done, mode);
        assert_eq!(done["ram"]["normal-bytes"], SIZE);

        let live = format!("live-{streams}");
        let writer = Writer::start(&pair.stage.path(&live), SIZE, "30MiB/s", 2 * MIB);
        pair.add_live(&live, &writer);
        // A limit this short makes it iterate, and the passes allowed are few, so that it ends.
        let done = pair.transfer(
            &live,
            json!({"streams": streams, "zero-copy": mode, "downtime-limit": "100us", "max-iterations": 4}),
        );
        assert!(writer.is_stopped(), "its memory has another owner now");
        assert_same(&writer.path, &pair.destination(&live));
        assert_sane(&done, SIZE);
        assert_honest(&done, mode);
        assert_ne!(done["downtime-us"], 0);
    }
}

#[test]
fn every_byte_arrives_with_auto() {
    every_byte_arrives("auto");
}

#[test]
fn every_byte_arrives_with_msg_zerocopy() {
    every_byte_arrives("msg-zerocopy");
}

#[test]
fn every_byte_arrives_with_io_uring() {
    every_byte_arrives("io-uring");
}

#[test]
fn every_byte_arrives_with_io_uring_fixed() {
    every_byte_arrives("io-uring-fixed");
}

#[test]
fn every_byte_arrives_with_plain_sends() {
    every_byte_arrives("off");
}

#[test]
fn over_a_unix_socket_every_mode_says_that_its_sends_are_plain() {
    let stage = Stage::new();
    let uri = stage.peer_uri();
    let receiver = stage.receiver_with(&uri, "");
    let mut pair = Pair::of(stage, receiver);
    let source = pair.stage.path("source");
    dense(&source, 2 * MIB, 1);
    for mode in ["auto", "msg-zerocopy", "io-uring", "io-uring-fixed", "off"] {
        pair.add(mode, &source);
        let done = pair.transfer(mode, json!({"zero-copy": mode, "streams": 2}));
        assert_same(&source, &pair.destination(mode));
        assert_sane(&done, 2 * MIB);
        let shown = &done["zero-copy"];
        assert_eq!(
            (&shown["path"], &shown["sends"]),
            (&json!("plain"), &json!(0))
        );
        let silent = shown["reason"].as_str().unwrap().is_empty();
        assert_eq!(silent, mode == "off", "{shown}");
        // Whoever forgets that it was handed over means it.
        pair.sender.call("region-del", json!({"name": mode}));
    }
}

#[test]
fn integrity_off_moves_an_idle_region_and_refuses_a_scanned_live_one() {
    let mut pair = Pair::new();
    let source = pair.stage.path("idle");
    dense(&source, 3 * MIB + 5, 1);
    pair.add("idle", &source);
    let done = pair.transfer("idle", json!({"integrity": "off", "streams": 2}));
    assert_same(&source, &pair.destination("idle"));
    assert_sane(&done, 3 * MIB + 5);

    let writer = Writer::start(&pair.stage.path("live"), MIB, "1MiB/s", MIB);
    pair.add_live("live", &writer);
    pair.begin("live", json!({"integrity": "off"}));
    pair.sender.wait_failed("live", "invalid-argument");
    writer.assert_runs();
}

/// Moves a file and compares; gives what was reported.
fn moves(pair: &mut Pair, name: &str, source: &Path) -> Value {
    pair.add(name, source);
    let done = pair.transfer(name, json!({"streams": 2}));
    assert_same(source, &pair.destination(name));
    assert_sane(&done, std::fs::metadata(source).unwrap().len());
    done
}

#[test]
fn an_empty_region_a_single_page_and_an_odd_length_arrive() {
    let mut pair = Pair::new();
    for (name, length) in [
        ("empty", 0),
        ("one-byte", 1),
        ("one-page", PAGE),
        ("odd", 37 * PAGE + 1),
        ("almost", 16 * PAGE - 1),
    ] {
        let source = pair.stage.path(name);
        dense(&source, length, 3);
        let done = moves(&mut pair, name, &source);
        assert_eq!(done["ram"]["normal-bytes"], length);
    }
}

#[test]
fn zeros_and_holes_stay_holes_at_the_destination() {
    let mut pair = Pair::new();
    let zeros = pair.stage.path("zeros");
    std::fs::write(&zeros, vec![0; usize::try_from(4 * MIB).unwrap()]).unwrap();
    let done = moves(&mut pair, "zeros", &zeros);
    assert_eq!(blocks(&pair.destination("zeros")), 0);
    assert_eq!(done["ram"]["normal-bytes"], 0);
    assert_eq!(done["ram"]["duplicate"], 4 * MIB / PAGE);

    let hole = pair.stage.path("hole");
    sparse(&hole, 3 * MIB + 7, &[]);
    moves(&mut pair, "hole", &hole);
    assert_eq!(blocks(&pair.destination("hole")), 0);

    let islands = pair.stage.path("islands");
    let at = [(5 * PAGE, 1), (MIB, 3 * PAGE), (7 * MIB - 100, 200)];
    sparse(&islands, 8 * MIB, &at);
    let before = blocks(&islands);
    moves(&mut pair, "islands", &islands);
    assert!(blocks(&pair.destination("islands")) <= before);
    assert_eq!(blocks(&islands), before, "reading it filled no hole");
}

#[test]
fn a_hundred_regions_arrive_together() {
    let mut pair = Pair::new();
    let names: Vec<String> = (0..100).map(|n| format!("r{n:03}")).collect();
    for (n, name) in (0..).zip(&names) {
        let source = pair.stage.path(name);
        dense(&source, n * 997, n);
        pair.add(name, &source);
    }
    let order = json!({"uri": pair.uri, "id": "all", "streams": 3});
    pair.sender.call("migrate", order);
    let done = pair.sender.wait("all", "completed");
    assert_eq!(done["regions"], json!(names));
    assert_eq!(listing(&pair.stage.arrived()), names);
    for name in &names {
        assert_same(&pair.stage.path(name), &pair.destination(name));
    }
    let arrived = pair.receiver.call("query-regions", Value::Null);
    assert_eq!(arrived.as_array().unwrap().len(), 100);
}

#[test]
fn a_memfd_a_sparse_file_and_a_live_one_go_together() {
    let mut pair = Pair::new();
    let bytes = noise(MIB + 3, 9);
    let memfd = nix::sys::memfd::memfd_create("ram", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
    let memfd = File::from(memfd.unwrap());
    memfd.write_all_at(&bytes, 0).unwrap();
    pair.sender.control().send_fd("ram", memfd.as_fd()).unwrap();
    pair.sender
        .call("region-add", json!({"name": "memfd", "fdname": "ram"}));
    drop(memfd);
    let islands = pair.stage.path("islands");
    sparse(&islands, 4 * MIB, &[(MIB, MIB / 2)]);
    pair.add("islands", &islands);
    let writer = Writer::start(&pair.stage.path("live"), 2 * MIB, "10MiB/s", MIB);
    pair.add_live("live", &writer);

    let order = json!({"uri": pair.uri, "id": "all", "streams": 2});
    pair.sender.call("migrate", order);
    let done = pair.sender.wait("all", "completed");
    assert_sane(&done, 7 * MIB + 3);
    assert_eq!(std::fs::read(pair.destination("memfd")).unwrap(), bytes);
    assert_same(&islands, &pair.destination("islands"));
    assert!(writer.is_stopped());
    assert_same(&writer.path, &pair.destination("live"));
    let arrival = pair.receiver.wait_arrival("all", "completed");
    assert_eq!(arrival["regions"], json!(["islands", "live", "memfd"]));
}

#[test]
fn max_bandwidth_keeps_the_rate() {
    let mut pair = Pair::new();
    let source = pair.stage.path("r");
    dense(&source, 4 * MIB, 1);
    pair.add("r", &source);
    let order =
        json!({"max-bandwidth": "8MiB/s", "packet-size": "64KiB", "window": "1MiB", "streams": 2});
    let done = pair.transfer("r", order);
    // All but the first packet had to be waited for; 10 ms may have been saved up before it.
    let least_ms = 1000 * (4 * MIB - 64 * 1024) / (8 * MIB) - 10;
    assert!(number(&done["total-time"]) >= least_ms, "{done:#}");
    assert_same(&source, &pair.destination("r"));
}

#[test]
fn two_transfers_run_at_the_same_time() {
    let mut pair = Pair::new();
    let slow = json!({"max-bandwidth": "2MiB/s", "streams": 1, "packet-size": "64KiB"});
    for name in ["a", "b"] {
        let source = pair.stage.path(name);
        dense(&source, 2 * MIB, name.len() as u64);
        pair.add(name, &source);
        pair.begin(name, slow.clone());
    }
    for name in ["a", "b"] {
        pair.sender
            .wait_until(name, |seen| seen["status"] == "active");
    }
    for name in ["b", "a"] {
        pair.sender.wait(name, "completed");
        assert_same(&pair.stage.path(name), &pair.destination(name));
    }
    let seen = pair.sender.call("query-migrate", Value::Null);
    assert_eq!(seen["id"], "b", "without an id it is the latest");
}

/// The memory of a live Region that only this test changes: the process named as its writer sleeps.
#[test]
fn what_is_zeroed_punched_and_filled_between_passes_arrives_so() {
    let mut pair = Pair::new();
    let stand_in = Writer::start(&pair.stage.path("other"), PAGE, "0B/s", 0);
    let path = pair.stage.path("r");
    let file = sparse(&path, 4 * MIB, &[(0, 3 * MIB)]);
    let freeze = json!({"kind": "pid", "pid": stand_in.pid()});
    let region = json!({"name": "r", "path": path, "tracker": "scan", "freeze": freeze});
    pair.sender.call("region-add", region);
    // Slow enough that the first pass is still under way when everything below has happened, wherever
    // in the Region it is by then.
    pair.begin(
        "r",
        json!({"max-bandwidth": "3MiB/s", "packet-size": "64KiB", "streams": 2, "downtime-limit": "1ms", "max-iterations": 3}),
    );
    pair.sender
        .wait_until("r", |seen| number(&seen["ram"]["transferred"]) > MIB);
    let zeros = vec![0; usize::try_from(MIB / 4).unwrap()];
    file.write_all_at(&zeros, 0).unwrap();
    punch(&file, MIB / 4, MIB / 4);
    file.write_all_at(&zeros, 2 * MIB).unwrap();
    punch(&file, 2 * MIB + MIB / 4, MIB / 4);
    file.write_all_at(&noise(MIB / 4, 77), 3 * MIB).unwrap();
    file.write_all_at(b"x", MIB - 1).unwrap();
    let done = pair.sender.wait("r", "completed");
    let first = &done["iterations"][0];
    assert!(done["iterations"].as_array().unwrap().len() >= 2, "{first}");
    assert_same(&path, &pair.destination("r"));
    assert!(stand_in.is_stopped());
    // 1 MiB of the 3 became zeros and a quarter was filled: no more than that may be allocated.
    let most = (2 * MIB + MIB / 4) / 512;
    assert!(blocks(&pair.destination("r")) <= most);
}

#[test]
fn a_region_is_complete_after_a_second_attempt_whatever_the_first_had_sent() {
    let mut pair = Pair::new();
    let writer = Writer::start(&pair.stage.path("r"), 4 * MIB, "8MiB/s", MIB);
    pair.add_live("r", &writer);
    pair.begin(
        "r",
        json!({"max-bandwidth": "4MiB/s", "packet-size": "64KiB"}),
    );
    pair.sender
        .wait_until("r", |seen| number(&seen["ram"]["transferred"]) > MIB);
    pair.sender.call("migrate_cancel", json!({"id": "r"}));
    pair.sender.wait("r", "cancelled");
    writer.assert_runs();
    assert_eq!(listing(&pair.stage.arrived()), [""; 0]);

    // The receiver forgets the first attempt by itself, and maybe only now.
    pair.receiver.wait_arrival("r", "cancelled");
    let done = pair.transfer("r", json!({"streams": 2}));
    assert_sane(&done, 4 * MIB);
    assert!(writer.is_stopped());
    assert_same(&writer.path, &pair.destination("r"));
}

#[test]
fn streams_run_on_the_cpus_they_are_given() {
    let mut pair = Pair::new();
    let source = pair.stage.path("pinned");
    dense(&source, 8 * MIB, 1);
    pair.add("pinned", &source);
    // So slow that it is under way for as long as anyone looks.
    let slow = json!({"cpus": "0", "streams": 2, "max-bandwidth": "64KiB/s"});
    pair.begin("pinned", slow);
    pair.sender.wait("pinned", "active");
    // A thread has its name before it has its CPUs.
    let started = Instant::now();
    while cpus_of_streams(pair.sender.pid(), "mf-send-") != ["0", "0"] {
        assert!(
            started.elapsed() < DEADLINE,
            "{:?}",
            cpus_of_streams(pair.sender.pid(), "mf-send-")
        );
        std::thread::yield_now();
    }
    pair.sender.call("migrate_cancel", json!({"id": "pinned"}));
    pair.sender.wait("pinned", "cancelled");

    pair.begin("pinned", json!({"cpus": "1023"}));
    let failed = pair.sender.wait_failed("pinned", "no-such-cpu");
    assert!(
        failed["error"]["desc"]
            .as_str()
            .unwrap()
            .contains("may use [0"),
        "{failed:#}"
    );
}
