//! Peers that are broken, hostile or gone: another version, garbage, somebody else's stream, kill -9.
//! Both sides end the attempt with a named error, and are as before.
#![allow(
    clippy::unwrap_used,
    reason = "also the helpers of a test end it by a panic"
)]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::Instant;

use common::fake::{
    FakeReceiver, FakeSender, Manners, call, connect, hear_receiver, mark, offer, read_preamble,
    say,
};
use common::memory::{MIB, PAGE, assert_same};
use common::{DEADLINE, Daemon, Pair, Stage, Writer, ended, listing};
use memferry::client::Connection;
use memferry::pages::PageRange;
use memferry::wire::{
    ACK_BYTES, DataHeader, Extent, ExtentKind, FrameHeader, FromReceiver, FromSender, HEADER_BYTES,
    Header, Hex128, OfferedRegion, Owner, PREAMBLE_BYTES, Preamble, Purpose, Status, StreamTotals,
    Table, crc32c,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// A sender with one live Region, and no receiver of its own.
fn sender_alone(stage: &Stage) -> (Daemon, Writer) {
    let mut sender = stage.sender();
    let writer = Writer::start(&stage.path("r"), 2 * MIB, "2MiB/s", MIB);
    let freeze = json!({"kind": "pid", "pid": writer.pid()});
    let region = json!({"name": "r", "path": writer.path, "tracker": "scan", "freeze": freeze});
    sender.call("region-add", region);
    (sender, writer)
}

/// Moves to `uri`, which cannot end well; checks exit code and code.
fn assert_fails(sender: &mut Daemon, uri: &str, exit: i32, code: &str) {
    let arguments = [
        "migrate",
        uri,
        "--progress",
        "none",
        "--set",
        "streams=2",
        "--set",
        "recover-timeout=0",
    ];
    let (ended, text) = ended(&sender.cli(&arguments));
    let last = sender.call("query-migrate", Value::Null);
    assert_eq!(last["error"]["x-code"], code, "{last:#}");
    assert_eq!(ended, Some(exit), "{text}");
    sender.assert_alive();
}

fn prepare(streams: Vec<StreamTotals>) -> FromSender {
    FromSender::Prepare {
        streams,
        blob: None,
    }
}

#[test]
fn a_receiver_of_another_version_is_refused_by_name() {
    let stage = Stage::new();
    let (mut sender, writer) = sender_alone(&stage);
    let fake = FakeReceiver::start(Manners::TurnsAway(Status::Version));
    assert_fails(&mut sender, &fake.uri, 8, "version");
    let last = sender.call("query-migrate", Value::Null);
    let desc = last["error"]["desc"].as_str().unwrap();
    assert!(desc.contains("8 to 9"), "{desc}");
    writer.assert_runs();
}

#[test]
fn a_receiver_of_the_version_before_is_asked_to_prepare_only_behind_the_freeze() {
    let stage = Stage::new();
    let mut sender = stage.sender();
    let path = stage.path("r");
    std::fs::write(&path, [7; 4096]).unwrap();
    sender.call("region-add", json!({"name": "r", "path": path}));
    let fake = FakeReceiver::start(Manners::NeverPrepared);
    sender.call("migrate", json!({"uri": fake.uri, "id": "r"}));
    fake.wait_said(|message| matches!(message, FromSender::Prepare { .. }));
    let seen = sender.call("query-migrate", Value::Null);
    assert_eq!(seen["status"], "completing", "{seen:#}");
    sender.call("migrate_cancel", json!({"id": "r"}));
}

#[test]
fn a_receiver_that_is_not_there_or_turns_away_or_speaks_garbage_fails_the_transfer() {
    let stage = Stage::new();
    let (mut sender, writer) = sender_alone(&stage);
    let gone = FakeReceiver::start(Manners::Silent).uri.clone();
    assert_fails(&mut sender, &gone, 4, "unreachable");
    for (manners, exit, code) in [
        (Manners::TurnsAway(Status::Busy), 8, "refused"),
        (Manners::Garbage, 4, "line-damage"),
        (Manners::IllegalAck, 4, "protocol"),
    ] {
        let fake = FakeReceiver::start(manners);
        assert_fails(&mut sender, &fake.uri, exit, code);
        writer.assert_runs();
    }
}

#[test]
fn a_receiver_that_says_nothing_is_given_up_after_the_stall_timeout() {
    let stage = Stage::new();
    let (mut sender, writer) = sender_alone(&stage);
    let fake = FakeReceiver::start(Manners::Silent);
    let order =
        json!({"uri": fake.uri, "id": "r", "stall-timeout": "300ms", "recover-timeout": "0"});
    sender.call("migrate", order);
    sender.wait_failed("r", "peer-silent");
    let fake = FakeReceiver::start(Manners::Acknowledges(0));
    let order =
        json!({"uri": fake.uri, "id": "r", "stall-timeout": "300ms", "recover-timeout": "0"});
    sender.call("migrate", order);
    // Which of the two it meets first is chance: no acknowledgement, or no heartbeat.
    let failed = sender.wait("r", "failed");
    let code = failed["error"]["x-code"].as_str().unwrap();
    assert!(
        ["stalled", "peer-silent", "peer-hung", "destination-slow"].contains(&code),
        "{failed:#}"
    );
    writer.assert_runs();
}

/// A receiver alone, its address, and what must hold at the end.
struct Alone {
    receiver: Daemon,
    uri: String,
    stage: Stage,
}

impl Alone {
    fn new() -> Self {
        let stage = Stage::new();
        let mut receiver = stage.receiver();
        let uri = receiver.uri();
        Self {
            receiver,
            uri,
            stage,
        }
    }

    fn assert_as_before(&mut self) {
        self.receiver.assert_alive();
        assert_eq!(listing(&self.stage.arrived()), [""; 0]);
    }

    /// An accepted attempt of `pages` pages with all its streams.
    fn attempt(&self, id: &str, pages: u64) -> (FakeSender, TcpStream) {
        let sender = FakeSender::offer(&self.uri, offer(id, pages * PAGE, 1));
        let stream = sender.stream(0);
        (sender, stream)
    }
}

fn is_over(stream: &mut TcpStream) -> bool {
    !matches!(stream.read(&mut [0]), Ok(1))
}

#[test]
fn a_sender_of_another_version_or_without_manners_is_turned_away() {
    let mut alone = Alone::new();
    let newer = Preamble {
        version: 9,
        version_oldest: 8,
        ..Preamble::new(Purpose::Conversation, Hex128::ZERO, 0)
    };
    let (mut stream, answer) = call(&alone.uri, newer);
    assert_eq!(answer.unwrap().status, Status::Version);
    assert!(is_over(&mut stream));

    for garbage in [
        &b"GET / HTTP/1.1\r\nHost: x\r\nUser-Agent: nobody in particular\r\n\r\n"[..],
        &[0; PREAMBLE_BYTES],
        &[0xff; 4096],
        &b"memferry"[..],
    ] {
        let mut stream = connect(&alone.uri);
        // It may hang up as soon as it has seen enough.
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        assert!(read_preamble(&mut stream).is_none());
    }
    alone.assert_as_before();
}

#[test]
fn a_conversation_that_begins_with_nonsense_ends_there() {
    let mut alone = Alone::new();
    let offer_of = |name: &str| {
        let mut message = json!(FromSender::Offer(offer("x", PAGE, 1)));
        message["regions"][0]["name"] = json!(name);
        FrameHeader::frame(&message)
    };
    let mut damaged = FrameHeader::frame(&FromSender::Alive {});
    damaged[20] ^= 1;
    let first_answer = |bytes: &[u8]| {
        let preamble = Preamble::new(Purpose::Conversation, Hex128::ZERO, 0);
        let (mut stream, answer) = call(&alone.uri, preamble);
        assert_eq!(answer.unwrap().status, Status::Ok);
        stream.write_all(bytes).unwrap();
        hear_receiver(&mut stream)
    };
    let accepted = first_answer(&offer_of("x"));
    assert!(matches!(accepted, Some(FromReceiver::Accept { .. })));
    for bytes in [
        offer_of("../x"),
        offer_of(""),
        FrameHeader::frame(&json!({"type": "future"})),
        FrameHeader::frame(&prepare(vec![])),
    ] {
        match first_answer(&bytes) {
            Some(FromReceiver::Refuse { code, .. }) => assert_eq!(code.as_str(), "protocol"),
            other => panic!("not answered with an error: {other:?}"),
        }
    }
    for bytes in [damaged, vec![0x55; 64]] {
        assert_eq!(first_answer(&bytes), None, "the line is to blame");
    }
    alone.receiver.wait_arrival("x", "failed");
    assert!(!alone.stage.path("x").exists());
    alone.assert_as_before();
}

#[test]
fn an_offer_beyond_the_limits_is_refused() {
    let mut alone = Alone::new();
    let good = offer("x", PAGE, 1);
    let region = |name: &str| OfferedRegion {
        name: name.parse().unwrap(),
        ..good.regions[0].clone()
    };
    let mut bad = Vec::new();
    for streams in [0, 257] {
        let mut offer = good.clone();
        offer.streams = streams;
        bad.push((offer, "protocol"));
    }
    for window in [0, u64::MAX] {
        let mut offer = good.clone();
        offer.window = window;
        bad.push((offer, "protocol"));
    }
    let mut twice = good.clone();
    twice.regions = vec![region("a"), region("a")];
    bad.push((twice, "protocol"));
    let mut none = good.clone();
    none.regions.clear();
    bad.push((none, "protocol"));
    let mut many = good.clone();
    many.regions = (0..5000).map(|n| region(&format!("r{n}"))).collect();
    bad.push((many, "protocol"));
    let mut huge = good.clone();
    huge.regions[0].length = u64::MAX;
    bad.push((huge, "too-large"));
    let mut full = good.clone();
    full.regions[0].length = 1 << 42;
    full.regions[0].data_bytes = u64::MAX;
    bad.push((full, "no-space"));
    for (offer, wanted) in bad {
        let (_, answer) = FakeSender::try_offer(&alone.uri, offer);
        let Some(FromReceiver::Refuse { code, .. }) = answer else {
            panic!("{wanted} was due: {answer:?}");
        };
        assert_eq!(code.as_str(), wanted);
    }
    alone.assert_as_before();
}

/// Sends a Region of one page, which is a hole, and has the receiver say that it is prepared.
fn carry_through(sender: &mut FakeSender, stream: &mut TcpStream) {
    stream.write_all(&packet(1, 1, |_| {})).unwrap();
    stream.write_all(&mark(1, 2)).unwrap();
    let mut acks = [0; 64];
    stream.read_exact(&mut acks).unwrap();
    let streams = vec![StreamTotals {
        packets: 2,
        bytes: 0,
    }];
    say(&mut sender.conversation, &prepare(streams));
    let answer = hear_receiver(&mut sender.conversation);
    assert_eq!(answer, Some(FromReceiver::Prepared {}));
}

#[test]
fn a_stream_without_the_right_token_epoch_and_number_is_turned_away() {
    let mut alone = Alone::new();
    let mut sender = FakeSender::offer(&alone.uri, offer("x", PAGE, 1));
    let (token, epoch) = (sender.token, sender.epoch);
    let foreign = Hex128::random().unwrap();
    for (stream, token, epoch, status) in [
        (0, foreign, epoch, Status::Token),
        (0, token, epoch + 1, Status::Epoch),
        (1, token, epoch, Status::Stream),
    ] {
        let (mut connection, answer) = sender.stream_as(stream, token, epoch);
        assert_eq!(answer, Some(status));
        assert!(is_over(&mut connection));
    }
    let mut stream = sender.stream(0);
    let (_, twice) = sender.stream_as(0, token, epoch);
    assert_eq!(twice, Some(Status::Stream));

    // None of it has harmed the attempt: it can still be carried through, here with a single hole.
    carry_through(&mut sender, &mut stream);
    drop((sender, stream));
    alone.receiver.wait_arrival("x", "failed");
    alone.assert_as_before();
}

#[test]
fn a_commit_to_more_than_was_prepared_is_refused_by_name() {
    let mut alone = Alone::new();
    let offer = offer("late", PAGE, 1);
    let nonce = offer.nonce;
    let mut sender = FakeSender::offer(&alone.uri, offer);
    let mut stream = sender.stream(0);
    carry_through(&mut sender, &mut stream);
    stream.write_all(&packet(2, 3, |_| {})).unwrap();
    stream.read_exact(&mut [0; ACK_BYTES]).unwrap();
    say(&mut sender.conversation, &FromSender::Commit { nonce });
    assert_eq!(sender.refusal(), "incomplete");
    assert!(is_over(&mut stream));
    alone.receiver.wait_arrival("late", "failed");
    alone.assert_as_before();
}

#[test]
fn a_sender_that_has_more_after_the_prepared_asks_again_and_commits_to_that() {
    let stage = Stage::new();
    let mut receiver = stage.receiver();
    let uri = receiver.uri();
    let offer = offer("more", PAGE, 1);
    let nonce = offer.nonce;
    let mut sender = FakeSender::offer(&uri, offer);
    let mut stream = sender.stream(0);
    carry_through(&mut sender, &mut stream);
    stream.write_all(&packet(2, 3, |_| {})).unwrap();
    stream.write_all(&mark(2, 4)).unwrap();
    stream.read_exact(&mut [0; 2 * ACK_BYTES]).unwrap();
    let streams = vec![StreamTotals {
        packets: 4,
        bytes: 0,
    }];
    say(&mut sender.conversation, &prepare(streams));
    let answer = hear_receiver(&mut sender.conversation);
    assert_eq!(answer, Some(FromReceiver::Prepared {}));
    say(&mut sender.conversation, &FromSender::Commit { nonce });
    let answer = hear_receiver(&mut sender.conversation);
    assert_eq!(answer, Some(FromReceiver::Committed {}));
    drop((sender, stream));
    receiver.wait_arrival("more", "completed");
}

#[test]
fn a_client_that_confirmed_is_asked_once_and_missed_when_it_has_left() {
    let mut alone = Alone::new();
    let mut client = Connection::connect(alone.receiver.socket()).unwrap();
    let ram = File::from(memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap());
    ram.set_len(PAGE).unwrap();
    client.send_fd("ram", ram.as_fd()).unwrap();
    let region = json!({"name": "confirmed", "fdname": "ram", "confirm": true});
    client.execute("region-add", region).unwrap();
    let mut sender = FakeSender::offer(&alone.uri, offer("confirmed", PAGE, 1));
    let mut stream = sender.stream(0);
    let confirms = std::thread::spawn(move || {
        while client.next_event(DEADLINE).unwrap().unwrap().data["status"] != "pre-switchover" {}
        let answer = json!({"id": "confirmed", "state": "pre-switchover"});
        client.execute("migrate-continue", answer).unwrap();
        client
    });
    carry_through(&mut sender, &mut stream);
    let client = confirms.join().unwrap();
    let streams = vec![StreamTotals {
        packets: 2,
        bytes: 0,
    }];
    let mut again = || {
        say(&mut sender.conversation, &prepare(streams.clone()));
        hear_receiver(&mut sender.conversation).unwrap()
    };
    assert_eq!(again(), FromReceiver::Prepared {}, "it is not asked again");
    drop(client);
    let deadline = Instant::now() + DEADLINE;
    let refused = loop {
        match again() {
            FromReceiver::Prepared {} => assert!(Instant::now() < deadline, "it is not missed"),
            other => break other,
        }
    };
    let FromReceiver::Refuse { code, desc } = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(code.as_str(), "refused");
    assert!(desc.as_str().contains("is gone"), "{desc}");
    alone.receiver.wait_arrival("confirmed", "failed");
}

/// A packet with one page that is a hole, changed by `spoil` before its checksums are made.
fn packet(iteration: u32, sequence: u64, spoil: impl Fn(&mut DataHeader)) -> Vec<u8> {
    let mut table = Table::default();
    table.extents.push(Extent {
        range: PageRange { first: 0, count: 1 },
        kind: ExtentKind::Hole,
    });
    let mut bytes = vec![0; HEADER_BYTES];
    table.encode(&mut bytes);
    let mut header = DataHeader {
        epoch: 0,
        iteration,
        sequence,
        region: 0,
        extents: 1,
        blocks: 0,
        payload: 0,
        packed: None,
        table_crc: crc32c(&bytes[HEADER_BYTES..]),
    };
    spoil(&mut header);
    bytes[..HEADER_BYTES].copy_from_slice(&Header::Data(header).encode());
    bytes
}

#[test]
fn a_damaged_or_illegal_packet_ends_the_attempt_by_name() {
    let mut alone = Alone::new();
    let mut flipped = packet(1, 1, |_| {});
    flipped[30] ^= 4;
    let mut flipped_table = packet(1, 1, |_| {});
    flipped_table[HEADER_BYTES + 1] ^= 4;
    let half = packet(1, 1, |_| {})[..HEADER_BYTES + 3].to_vec();
    let cases = [
        ("garbage", vec![0x55; 4096], "line-damage"),
        ("flipped", flipped, "line-damage"),
        ("table", flipped_table, "line-damage"),
        ("cut", half, "connection-lost"),
        ("region", packet(1, 1, |h| h.region = 1), "protocol"),
        ("epoch", packet(1, 1, |h| h.epoch = 1), "protocol"),
        ("iteration", packet(2, 1, |_| {}), "protocol"),
        ("sequence", packet(1, 2, |_| {}), "protocol"),
        ("payload", packet(1, 1, |h| h.payload = 4096), "protocol"),
    ];
    for (name, bytes, code) in cases {
        let (mut sender, mut stream) = alone.attempt(name, 1);
        stream.write_all(&bytes).unwrap();
        let _ = stream.shutdown(std::net::Shutdown::Write);
        assert_eq!(sender.refusal(), code, "{name}");
        alone.receiver.wait_arrival(name, "failed");
        alone.assert_as_before();
    }
}

#[test]
fn an_attempt_is_not_prepared_while_a_page_is_missing_or_the_counts_differ() {
    let mut alone = Alone::new();
    let both = [packet(1, 1, |_| {}), mark(1, 2).to_vec()].concat();
    let cases = [
        ("missing", mark(1, 1).to_vec(), 1, 0),
        ("packets", both.clone(), 3, 0),
        ("bytes", both, 2, 4096),
    ];
    for (id, frames, packets, bytes) in cases {
        let (mut sender, mut stream) = alone.attempt(id, 1);
        stream.write_all(&frames).unwrap();
        let mut acks = vec![0; frames.len() / HEADER_BYTES * 32];
        stream.read_exact(&mut acks).unwrap();
        let streams = vec![StreamTotals { packets, bytes }];
        say(&mut sender.conversation, &prepare(streams));
        assert_eq!(sender.refusal(), "incomplete", "{id}");
        alone.assert_as_before();
    }
}

#[test]
fn what_a_sender_says_out_of_place_commits_nothing() {
    let mut alone = Alone::new();
    for (id, code) in [
        ("commit", "protocol"),
        ("offer", "protocol"),
        ("prepare", "incomplete"),
    ] {
        let offer = offer(id, PAGE, 1);
        let message = match id {
            "commit" => FromSender::Commit { nonce: offer.nonce },
            "offer" => FromSender::Offer(offer.clone()),
            _ => prepare(vec![StreamTotals::default(); 300]),
        };
        let mut sender = FakeSender::offer(&alone.uri, offer);
        let _stream = sender.stream(0);
        say(&mut sender.conversation, &message);
        assert_eq!(sender.refusal(), code, "{id}");
        alone.assert_as_before();
    }
}

#[test]
fn an_inquiry_about_an_unknown_attempt_refuses_it_for_ever() {
    let mut alone = Alone::new();
    let offer = offer("x", PAGE, 1);
    let ask = |boot_id| {
        let preamble = Preamble::new(Purpose::Conversation, Hex128::ZERO, 0);
        let (mut stream, _) = call(&alone.uri, preamble);
        let nonce = offer.nonce;
        say(&mut stream, &FromSender::Inquire { nonce, boot_id });
        hear_receiver(&mut stream)
    };
    let other_boot = memferry::wire::BootId("another".into());
    let unknown = FromReceiver::Owner {
        owner: Owner::Unknown,
    };
    assert_eq!(ask(other_boot), Some(unknown));
    let rehearsal = memferry::wire::Offer {
        dry_run: true,
        ..offer.clone()
    };
    let (_, answer) = FakeSender::try_offer(&alone.uri, rehearsal);
    let Some(FromReceiver::Accept { boot_id, .. }) = answer else {
        panic!("{answer:?}");
    };
    let source = FromReceiver::Owner {
        owner: Owner::Source,
    };
    assert_eq!(ask(boot_id), Some(source));
    let (_, answer) = FakeSender::try_offer(&alone.uri, offer.clone());
    assert!(
        matches!(&answer, Some(FromReceiver::Refuse { code, .. }) if code.as_str() == "refused"),
        "{answer:?}"
    );
    alone.assert_as_before();
}

/// A pair with a live Region under way, slowly.
fn under_way() -> (Pair, Writer) {
    let mut pair = Pair::new();
    let writer = Writer::start(&pair.stage.path("r"), 4 * MIB, "2MiB/s", MIB);
    pair.add_live("r", &writer);
    let order = json!({"max-bandwidth": "2MiB/s", "packet-size": "64KiB", "streams": 2, "recover-timeout": "0"});
    pair.begin("r", order);
    let sent = |seen: &Value| seen["ram"]["transferred"].as_u64() > Some(MIB / 4);
    pair.sender.wait_until("r", sent);
    (pair, writer)
}

#[test]
fn a_receiver_that_dies_fails_the_transfer_and_leaves_nothing() {
    let (mut pair, writer) = under_way();
    pair.receiver.kill();
    pair.sender.wait_failed("r", "connection-lost");
    writer.assert_runs();
    assert_eq!(listing(&pair.stage.arrived()), [""; 0]);

    pair.receiver = pair.stage.receiver();
    pair.uri = pair.receiver.uri();
    pair.assert_nothing_happened(&[]);
    pair.transfer("r", json!({}));
    assert_same(&writer.path, &pair.destination("r"));
}

#[test]
fn a_sender_that_dies_leaves_nothing_and_can_begin_again() {
    let (mut pair, writer) = under_way();
    pair.sender.kill();
    let failed = pair.receiver.wait_arrival("r", "failed");
    assert_eq!(failed["error"]["x-code"], "connection-lost");
    writer.assert_runs();

    pair.sender = pair.stage.sender();
    pair.assert_nothing_happened(&[]);
    pair.add_live("r", &writer);
    pair.transfer("r", json!({}));
    assert_same(&writer.path, &pair.destination("r"));
}

#[test]
fn a_receiver_that_hangs_is_given_up_and_has_nothing_when_it_goes_on() {
    let mut pair = Pair::new();
    let writer = Writer::start(&pair.stage.path("r"), 4 * MIB, "2MiB/s", MIB);
    pair.add_live("r", &writer);
    let order = json!({"max-bandwidth": "2MiB/s", "packet-size": "64KiB", "stall-timeout": "500ms", "recover-timeout": "0"});
    pair.begin("r", order);
    let sent = |seen: &Value| seen["ram"]["transferred"].as_u64() > Some(MIB / 4);
    pair.sender.wait_until("r", sent);
    pair.receiver.signal(Signal::SIGSTOP);
    let failed = pair.sender.wait("r", "failed");
    let code = failed["error"]["x-code"].as_str().unwrap();
    assert!(
        ["stalled", "peer-silent", "peer-hung", "destination-slow"].contains(&code),
        "{failed:#}"
    );
    writer.assert_runs();
    pair.receiver.signal(Signal::SIGCONT);
    pair.receiver.wait_arrival("r", "failed");
    pair.assert_nothing_happened(&[]);
    pair.transfer("r", json!({}));
    assert_same(&writer.path, &pair.destination("r"));
}
