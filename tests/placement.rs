//! Which memory Regions arrive in.
#![allow(clippy::unwrap_used, reason = "a test ends by a panic")]

mod common;

use std::time::Instant;

use common::memory::{assert_same, blocks, dense, sparse};
use common::mount::Mount;
use common::{DEADLINE, Pair, Stage, cpus_of_streams, memferry};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const HUGE: u64 = 2 * MIB;

/// Blocks of 512 bytes, as stat(2) counts them.
const fn in_blocks(bytes: u64) -> u64 {
    bytes / 512
}

/// What the receiver has seen of the memory of its one Region, which is known a moment after the commit; that
/// both questions are answered alike.
fn observed(pair: &mut Pair, id: &str) -> Value {
    let started = Instant::now();
    loop {
        let region = pair.receiver.call("query-regions", Value::Null)[0].take();
        if region["page-sizes"].is_object() {
            let seen = pair.receiver.call("query-migrate", json!({"id": id}));
            for key in ["page-sizes", "numa-nodes"] {
                assert_eq!(seen["memory"][0][key], region[key], "{seen:#}");
            }
            return region;
        }
        assert!(started.elapsed() < DEADLINE, "{region:#}");
        std::thread::yield_now();
    }
}

#[test]
fn memory_comes_from_the_node_that_is_named_and_streams_run_on_the_cpus_that_are() {
    let stage = Stage::new();
    let receiver = stage.receiver_with("tcp:127.0.0.1:0", "numa-node = 0\ncpus = \"0\"");
    let mut pair = Pair::of(stage, receiver);
    let path = pair.stage.path("r");
    dense(&path, 8 * MIB, 1);
    pair.add("r", &path);
    pair.begin("r", json!({"max-bandwidth": "4MiB/s", "streams": 2}));
    pair.sender.wait("r", "active");
    let started = Instant::now();
    while cpus_of_streams(pair.receiver.pid(), "mf-recv-") != ["0", "0"] {
        assert!(started.elapsed() < DEADLINE);
        std::thread::yield_now();
    }
    // While it arrives.
    let held = loop {
        let seen = pair.receiver.call("query-migrate", json!({"id": "r"}));
        let held = seen["memory"][0]["allocated"].as_u64().unwrap();
        if held > 0 {
            break held;
        }
        assert!(started.elapsed() < DEADLINE);
    };
    assert!(held < 8 * MIB, "it is looked at while it arrives");
    let maps = std::fs::read_to_string(format!("/proc/{}/numa_maps", pair.receiver.pid())).unwrap();
    assert!(maps.contains(" prefer:0 file="), "{maps}");
    pair.sender.wait("r", "completed");
    assert_same(&path, &pair.destination("r"));
    let region = observed(&mut pair, "r");
    assert_eq!(region["page-sizes"], json!({"4096": 8 * MIB}));
    assert_eq!(region["numa-nodes"], json!({"0": 8 * MIB}));
}

#[test]
fn a_receiver_that_is_to_use_a_node_that_is_not_there_does_not_start() {
    let stage = Stage::new();
    let config = format!(
        "{}[receive]\nnuma-node = 7\n",
        stage.common_config("receiver")
    );
    let config = stage.write("receiver.toml", &config);
    let run = |verb: &[&str]| {
        let output = memferry().args(verb).arg(&config).output().unwrap();
        let (out, err) = (output.stdout, output.stderr);
        (
            output.status.success(),
            String::from_utf8([out, err].concat()).unwrap(),
        )
    };
    let (started, told) = run(&["receiver", "--config"]);
    assert!(
        !started && told.contains("receive.numa-node") && told.contains("[0]"),
        "{told}"
    );
    let (checked, told) = run(&["check"]);
    assert!(
        checked && told.contains("warning: receive.numa-node"),
        "{told}"
    );
}

#[test]
fn dense_memory_comes_in_huge_pages_and_islands_cost_what_they_hold() {
    let Some(mount) = Mount::tmpfs("size=96M,huge=advise") else {
        return;
    };
    let mut pair = Pair::on(mount.path());
    let path = pair.stage.path("mixed");
    let mut islands = vec![(HUGE, 3 * HUGE), (20 * HUGE, HUGE / 2)];
    islands.extend((30..40).map(|n| (n * HUGE + MIB, 256 << 10)));
    sparse(&path, 64 * HUGE, &islands);
    pair.add("mixed", &path);
    pair.transfer("mixed", json!({"streams": 2}));
    let arrived = mount.path().join("mixed");
    assert_same(&path, &arrived);
    assert_eq!(
        blocks(&arrived),
        in_blocks(4 * HUGE + 10 * (256 << 10)),
        "four huge pages, and islands page by page"
    );
    let seen = pair.receiver.wait_arrival("mixed", "completed");
    assert_eq!(seen["huge-pages"], true);
    let sizes = json!({"4096": 10 * (256 << 10), "2097152": 4 * HUGE});
    assert_eq!(observed(&mut pair, "mixed")["page-sizes"], sizes);
    let told = pair.receiver.cli(&["status"]);
    let told = String::from_utf8(told.stdout).unwrap();
    assert!(
        told.contains("8.0 MiB in pages of 2MiB, 2.5 MiB in pages of 4KiB"),
        "{told}"
    );
}

#[test]
fn without_room_for_what_huge_pages_leave_unused_memory_comes_page_by_page() {
    let Some(mount) = Mount::tmpfs("size=12M,huge=advise") else {
        return;
    };
    let mut pair = Pair::on(mount.path());
    let path = pair.stage.path("tight");
    // Each of them would take a huge page: 16 MiB, where there are 12.
    let islands: Vec<_> = (0..8).map(|n| (n * HUGE, MIB + 4096)).collect();
    sparse(&path, 16 * HUGE, &islands);
    pair.add("tight", &path);
    pair.transfer("tight", json!({"streams": 2}));
    let arrived = mount.path().join("tight");
    assert_same(&path, &arrived);
    assert_eq!(blocks(&arrived), in_blocks(8 * (MIB + 4096)));
}

#[test]
fn a_mount_without_huge_pages_is_found_out_and_will_do() {
    let Some(mount) = Mount::tmpfs("size=16M,huge=never") else {
        return;
    };
    let mut pair = Pair::on(mount.path());
    let path = pair.stage.path("r");
    dense(&path, 2 * HUGE + 4096, 1);
    pair.add("r", &path);
    pair.transfer("r", json!({}));
    assert_same(&path, &mount.path().join("r"));
    let seen = pair.receiver.wait_arrival("r", "completed");
    assert_eq!(seen["huge-pages"], false);
}
