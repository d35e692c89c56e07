//! Compressed payload between real daemons, on a line that damages and cuts it, and from senders that lie
//! about it.
#![allow(
    clippy::unwrap_used,
    reason = "also the helpers of a test end it by a panic"
)]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::fake::{FakeSender, offer};
use common::memory::{MIB, PAGE, assert_same, dense, noise};
use common::relay::{Act, Kind, Relay, Side};
use common::{DEADLINE, Pair, Stage, Writer, listing};
use memferry::pages::PageRange;
use memferry::wire::{
    ACK_BYTES, Ack, Algorithm, DataHeader, ExtentKind, HEADER_BYTES, Header, Packed, Table, crc32c,
};
use serde_json::{Value, json};

/// A file that compresses to about a third: words of which most repeat, and no page is zero.
fn words(path: &Path, length: u64) {
    let random = noise(length / 2, 5);
    let mut bytes: Vec<u8> = random
        .chunks(8)
        .flat_map(|noise| [&noise[..4], b"the same in all"].concat())
        .collect();
    bytes.resize(usize::try_from(length).unwrap(), 1);
    std::fs::write(path, bytes).unwrap();
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value}"))
}

#[track_caller]
fn assert_compressed(done: &Value) {
    let shown = &done["compression"];
    let (from, to) = (number(&shown["bytes"]), number(&shown["compressed-size"]));
    assert!(from > 0 && to < from, "{shown}");
    assert!(number(&shown["pages"]) >= from / PAGE, "{shown}");
    let rate = shown["compression-rate"].as_f64().unwrap();
    assert!(rate > 1.1, "{shown}");
}

#[test]
fn every_byte_arrives_with_every_algorithm() {
    let mut pair = Pair::new();
    let source = pair.stage.path("source");
    words(&source, 9 * MIB + 77);
    for algorithm in ["lz4", "zstd", "auto"] {
        for integrity in ["crc32c", "off"] {
            let name = format!("{algorithm}-{integrity}");
            pair.add(&name, &source);
            let order = json!({"compression": algorithm, "integrity": integrity, "streams": 2});
            let done = pair.transfer(&name, order);
            assert_same(&source, &pair.destination(&name));
            assert_eq!(done["compression"]["requested"], algorithm);
            assert_compressed(&done);
            let sent = number(&done["ram"]["transferred"]);
            assert!(sent < 8 * MIB, "{done:#}");
            assert_eq!(done["ram"]["normal-bytes"], 9 * MIB + 77);
            pair.sender.call("region-del", json!({"name": name}));
        }
    }
}

#[test]
fn a_live_writer_arrives_with_every_tracker() {
    for algorithm in ["lz4", "zstd"] {
        for tracker in ["scan", "pagemap"] {
            let mut pair = Pair::new();
            let path = pair.stage.path("r");
            let writer = match tracker {
                "scan" => {
                    let writer = Writer::start(&path, 8 * MIB, "20MiB/s", 2 * MIB);
                    pair.add_live("r", &writer);
                    writer
                }
                _ => Writer::register(&path, 8 * MIB, "20MiB/s", 2 * MIB, pair.sender.socket()),
            };
            let order = json!({"compression": algorithm, "streams": 2, "packet-size": "256KiB"});
            let done = pair.transfer("r", order);
            assert!(writer.is_stopped());
            assert_same(&writer.path, &pair.destination("r"));
            assert_eq!(done["compression"]["requested"], algorithm);
        }
    }
}

/// The memory of a live Region that only this test changes: the process named as its writer sleeps.
#[test]
fn what_is_written_between_passes_arrives_compressed() {
    let mut pair = Pair::new();
    let stand_in = Writer::start(&pair.stage.path("other"), PAGE, "0B/s", 0);
    let path = pair.stage.path("r");
    words(&path, 8 * MIB);
    let freeze = json!({"kind": "pid", "pid": stand_in.pid()});
    let region = json!({"name": "r", "path": path, "tracker": "scan", "freeze": freeze});
    pair.sender.call("region-add", region);
    // Slow enough that the first pass is still under way when everything below is written.
    pair.begin(
        "r",
        json!({"compression": "lz4", "max-bandwidth": "2MiB/s", "packet-size": "64KiB", "streams": 2, "downtime-limit": "1ms", "max-iterations": 3}),
    );
    pair.sender
        .wait_until("r", |seen| number(&seen["ram"]["transferred"]) > MIB / 2);
    let file = File::options().write(true).open(&path).unwrap();
    for at in [0, 3 * MIB + 5, 8 * MIB - 9000] {
        file.write_all_at(&b"written while it is moved ".repeat(300), at)
            .unwrap();
    }
    let done = pair.sender.wait("r", "completed");
    assert_same(&path, &pair.destination("r"));
    assert!(stand_in.is_stopped());
    assert_compressed(&done);
}

#[test]
fn content_that_cannot_be_compressed_goes_plain_by_itself() {
    let mut pair = Pair::new();
    let source = pair.stage.path("noise");
    dense(&source, 24 * MIB, 1);
    pair.add("noise", &source);
    let done = pair.transfer("noise", json!({"compression": "auto", "streams": 1}));
    assert_same(&source, &pair.destination("noise"));
    let shown = &done["compression"];
    assert_eq!(
        (&shown["active"], &shown["pages"]),
        (&json!("off"), &json!(0))
    );
    assert!(number(&done["ram"]["transferred"]) >= 24 * MIB);
}

/// A pair with a relay between, and the Region `r` of words.
fn over_a_relay(length: u64) -> (Pair, Relay) {
    let mut pair = Pair::new();
    let relay = Relay::start(&pair.uri);
    pair.uri = relay.uri(Ipv4Addr::LOCALHOST.into());
    let source = pair.stage.path("r");
    words(&source, length);
    pair.add("r", &source);
    (pair, relay)
}

#[test]
fn damage_to_compressed_payload_is_found_and_sent_again() {
    for algorithm in ["lz4", "zstd"] {
        let (mut pair, relay) = over_a_relay(6 * MIB);
        relay.damage(Act::FlipPayload, 5, |frame| frame.payload > 0);
        let done = pair.transfer("r", json!({"compression": algorithm, "streams": 2}));
        assert_same(&pair.stage.path("r"), &pair.destination("r"));
        assert!(number(&done["ram"]["torn"]) > 0, "{done:#}");
        assert_eq!(done["recoveries"], 0, "the connections were kept");
        assert_compressed(&done);

        // Without checksums nothing is torn: the connection is not believed any more.
        let (mut pair, relay) = over_a_relay(6 * MIB);
        relay.damage(Act::FlipPayload, 1, |frame| frame.payload > 0);
        let order = json!({"compression": algorithm, "integrity": "off", "streams": 2});
        let done = pair.transfer("r", order);
        assert_same(&pair.stage.path("r"), &pair.destination("r"));
        assert_eq!(done["recoveries"], 1, "{done:#}");
        assert_eq!(done["interruption"]["x-code"], "line-damage");
    }
}

#[test]
fn a_compressed_transfer_that_is_cut_goes_on() {
    let (mut pair, relay) = over_a_relay(8 * MIB);
    let mut packets = 0;
    relay.hold_next(move |frame| {
        let packet = matches!(frame.kind, Kind::Packet { .. });
        packets += u32::from(packet && frame.from == Side::Sender);
        packet && packets == 10
    });
    pair.begin(
        "r",
        json!({"compression": "zstd", "streams": 2, "packet-size": "256KiB"}),
    );
    relay
        .wait_held(std::time::Instant::now() + DEADLINE)
        .unwrap();
    relay.release(Act::Cut);
    let done = pair.sender.wait("r", "completed");
    assert_same(&pair.stage.path("r"), &pair.destination("r"));
    assert_eq!(done["recoveries"], 1, "{done:#}");
    assert_compressed(&done);
}

/// A packet of `pages` pages from page 0, whose compressed payload is `bytes`.
fn packet(pages: u64, algorithm: Algorithm, bytes: &[u8], spoil: impl Fn(&mut Packed)) -> Vec<u8> {
    let mut table = Table::default();
    table.push_block(
        PageRange {
            first: 0,
            count: pages,
        },
        crc32c(&vec![7; usize::try_from(pages * PAGE).unwrap()]),
    );
    assert_eq!(table.extents[0].kind, ExtentKind::Data);
    let mut frame = vec![0; HEADER_BYTES];
    table.encode(&mut frame);
    let mut packed = Packed {
        algorithm,
        bytes: bytes.len().try_into().unwrap(),
        crc: crc32c(bytes),
    };
    spoil(&mut packed);
    let header = DataHeader {
        epoch: 0,
        iteration: 1,
        sequence: 1,
        region: 0,
        extents: 1,
        blocks: 1,
        payload: (pages * PAGE).try_into().unwrap(),
        packed: Some(packed),
        table_crc: crc32c(&frame[HEADER_BYTES..]),
    };
    frame[..HEADER_BYTES].copy_from_slice(&Header::Data(header).encode());
    frame.extend_from_slice(bytes);
    frame
}

fn compressed(algorithm: Algorithm, plain: &[u8]) -> Vec<u8> {
    match algorithm {
        Algorithm::Lz4 => lz4_flex::block::compress(plain),
        Algorithm::Zstd => zstd::bulk::compress(plain, 1).unwrap(),
    }
}

/// An accepted attempt of four pages with its stream.
fn attempt(uri: &str, id: &str, compression: bool) -> (FakeSender, TcpStream) {
    let offer = memferry::wire::Offer {
        compression,
        ..offer(id, 4 * PAGE, 1)
    };
    let sender = FakeSender::offer(uri, offer);
    let stream = sender.stream(0);
    (sender, stream)
}

#[test]
fn a_compressed_packet_that_lies_ends_the_attempt_and_nothing_else() {
    let stage = Stage::new();
    let mut receiver = stage.receiver();
    let uri = receiver.uri();
    let page = vec![7; usize::try_from(PAGE).unwrap()];
    for &algorithm in Algorithm::ALL {
        let good = compressed(algorithm, &page);
        // 64 MiB where a page is announced.
        let bomb = compressed(algorithm, &vec![7; 64 << 20]);
        let bomb = &bomb[..bomb.len().min(4000)];
        let cases: [(&str, bool, u64, &[u8]); 6] = [
            ("unasked", false, 1, &good),
            ("short", true, 2, &good),
            (
                "long",
                true,
                1,
                &compressed(algorithm, &[&page[..], b"x"].concat()),
            ),
            ("bomb", true, 1, bomb),
            ("garbage", true, 1, &[0xa5; 100]),
            ("nothing", true, 1, b"\0"),
        ];
        for (name, offered, pages, bytes) in cases {
            let name = format!("{name}-{}", algorithm.as_str());
            let (mut sender, mut stream) = attempt(&uri, &name, offered);
            stream
                .write_all(&packet(pages, algorithm, bytes, |_| {}))
                .unwrap();
            assert_eq!(sender.refusal(), "protocol", "{name}");
            receiver.wait_arrival(&name, "failed");
            receiver.assert_alive();
            assert_eq!(listing(&stage.arrived()), [""; 0]);
        }
        for (name, bytes) in [("none", 0), ("all", 4096), ("huge", u32::MAX)] {
            let name = format!("{name}-{}", algorithm.as_str());
            let (mut sender, mut stream) = attempt(&uri, &name, true);
            let frame = packet(1, algorithm, &good, |packed| packed.bytes = bytes);
            stream.write_all(&frame).unwrap();
            assert_eq!(sender.refusal(), "protocol", "{name}");
            receiver.wait_arrival(&name, "failed");
        }
    }
    receiver.assert_alive();
}

#[test]
fn a_compressed_packet_is_placed_or_torn_and_acknowledged_so() {
    let stage = Stage::new();
    let mut receiver = stage.receiver();
    let uri = receiver.uri();
    let pages = vec![7; usize::try_from(4 * PAGE).unwrap()];
    let other = vec![8; pages.len()];
    for &algorithm in Algorithm::ALL {
        let good = compressed(algorithm, &pages);
        let wrong = compressed(algorithm, &other);
        let cases: [(&str, Vec<u8>, u32); 3] = [
            ("whole", packet(4, algorithm, &good, |_| {}), 0),
            (
                "damaged",
                packet(4, algorithm, &good, |packed| packed.crc ^= 1),
                1,
            ),
            ("other", packet(4, algorithm, &wrong, |_| {}), 1),
        ];
        for (name, frame, torn) in cases {
            let name = format!("{name}-{}", algorithm.as_str());
            let (_sender, mut stream) = attempt(&uri, &name, true);
            stream.write_all(&frame).unwrap();
            let mut bytes = [0; ACK_BYTES];
            stream.read_exact(&mut bytes).unwrap();
            assert_eq!(Ack::decode(&bytes).unwrap().torn, torn, "{name}");
        }
    }
}
