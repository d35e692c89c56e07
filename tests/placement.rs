//! Which memory Regions arrive in.
#![allow(clippy::unwrap_used, reason = "a test ends by a panic")]

mod common;

use common::Pair;
use common::memory::{assert_same, blocks, dense, sparse};
use common::mount::Mount;
use serde_json::json;

const MIB: u64 = 1 << 20;
const HUGE: u64 = 2 * MIB;

/// Blocks of 512 bytes, as stat(2) counts them.
const fn in_blocks(bytes: u64) -> u64 {
    bytes / 512
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
