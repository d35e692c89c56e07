//! Connections break in every phase, and the transfer goes on with what is owed.
#![allow(
    clippy::unwrap_used,
    reason = "also the helpers of a test end it by a panic"
)]

mod common;

use common::memory::{MIB, assert_same, dense};
use common::relay::{Damage, Relay, Which};
use common::{Pair, Writer};
use serde_json::{Value, json};

/// A pair over a bad line, with the Region `r` that a writer keeps writing.
fn live(size: u64) -> (Pair, Relay, Writer) {
    let mut pair = Pair::new();
    let relay = pair.over_a_relay();
    let writer = Writer::start(&pair.stage.path("r"), size, "8MiB/s", size / 4);
    pair.add_live("r", &writer);
    (pair, relay, writer)
}

fn sent(bytes: u64) -> impl Fn(&Value) -> bool {
    move |seen| seen["ram"]["transferred"].as_u64() >= Some(bytes)
}

fn recovered(times: u64) -> impl Fn(&Value) -> bool {
    move |seen| seen["recoveries"].as_u64() >= Some(times) && seen["status"] == "active"
}

/// After whatever happened: completed, and nothing is missing.
fn assert_arrived(pair: &mut Pair, writer: &Writer) -> Value {
    let seen = pair.sender.wait("r", "completed");
    assert!(writer.is_stopped());
    assert_same(&writer.path, &pair.destination("r"));
    seen
}

#[test]
fn a_lost_connection_of_any_kind_is_replaced_in_the_first_iteration() {
    for which in [Which::All, Which::Conversation, Which::Stream(1)] {
        let (mut pair, relay, writer) = live(16 * MIB);
        let order = json!({"max-bandwidth": "8MiB/s", "packet-size": "64KiB", "streams": 3});
        pair.begin("r", order);
        pair.sender.wait_until("r", sent(2 * MIB));
        relay.cut(which);
        let seen = pair.sender.wait_until("r", recovered(1));
        assert_eq!(
            seen["interruption"]["x-code"], "connection-lost",
            "{seen:#}"
        );
        let seen = assert_arrived(&mut pair, &writer);
        assert_eq!(seen["recoveries"], 1, "{which:?} {seen:#}");
    }
}
