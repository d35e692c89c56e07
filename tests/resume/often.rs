//! A line that breaks again and again, by the clock.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::common::Pair;
use super::common::memory::{MIB, assert_same, dense};
use super::common::relay::{Act, Which};
use super::{bad_line, says};

/// Between two cuts.
const EVERY: Duration = Duration::from_millis(300);

/// Moves so much that nobody writes over a line that loses all connections every 300 ms; says how often that was.
#[expect(clippy::print_stdout, reason = "the figures are what it is run for")]
fn over_a_line_cut_every_300_ms(size: u64, more: Value) -> u32 {
    let mut pair = Pair::new();
    let relay = bad_line(&mut pair);
    let source = pair.stage.path("r");
    dense(&source, size, 1);
    pair.add("r", &source);
    let started = Instant::now();
    pair.begin("r", more);
    // Only as long as there is something to send: a cut that meets the commit may leave the source its owner.
    relay.hold_next(says("prepare"));
    let mut cuts = 0;
    while relay.wait_held(Instant::now() + EVERY).is_none() {
        let seen = pair.sender.call("query-migrate", json!({"id": "r"}));
        assert_ne!(seen["status"], "failed", "{seen:#}");
        relay.reset(Which::All);
        cuts += 1;
    }
    relay.release(Act::Pass);
    let seen = pair.sender.wait("r", "completed");
    let time = started.elapsed().as_secs_f64();
    assert_same(&source, &pair.destination("r"));
    // Also what was lost on its way to the relay was sent.
    let sent = seen["ram"]["transferred"].as_u64().unwrap();
    let ratio = sent.max(relay.forwarded()) as f64 / size as f64;
    println!(
        "{} MiB, {cuts} cuts, {time:.1} s, {ratio:.3} of the region sent",
        size / MIB
    );
    assert!(ratio <= 1.5, "{ratio}");
    cuts
}

#[test]
fn a_transfer_over_a_line_cut_every_300_ms_sends_at_most_half_of_it_twice() {
    // Small in proportion, the window too: what is under way is lost with each cut.
    let mut order = json!({"streams": 2, "max-bandwidth": "64MiB/s"});
    order["window"] = json!("1MiB");
    order["packet-size"] = json!("256KiB");
    let cuts = over_a_line_cut_every_300_ms(128 * MIB, order);
    assert!(cuts >= 3, "{cuts} cuts: it was too fast to be cut");
}

/// `MEMFERRY_RELAY_MIB=4096 cargo test --release --test resume -- --ignored --nocapture every_300_ms`
#[test]
#[ignore = "takes minutes and much memory in full size: CI runs the short one above; MEMFERRY_RELAY_MIB makes it smaller"]
fn a_large_transfer_over_a_line_cut_every_300_ms_sends_at_most_half_of_it_twice() {
    let size = std::env::var("MEMFERRY_RELAY_MIB").map_or(4096, |text| text.parse().unwrap()) * MIB;
    over_a_line_cut_every_300_ms(size, json!({"streams": 2}));
}
