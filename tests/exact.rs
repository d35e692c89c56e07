//! Exact trackers between real processes: what the kernel's page tables or the writer's own bitmap say
//! was written is what is sent again, and nothing that was written is missing.
#![allow(
    clippy::unwrap_used,
    reason = "also the helpers of a test end it by a panic"
)]

mod common;

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use common::memory::{MIB, PAGE, assert_same, dense};
use common::relay::{Act, Kind, Relay};
use common::{DEADLINE, Pair, Writer};
use memferry::client::{Connection, Tracked, Tracking};
use memferry::name::Name;
use memferry::region::{Access, Mapping};
use memferry::workload::{Account, Newest, verify};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::{Value, json};

#[test]
fn a_registered_writer_is_moved_with_what_it_wrote_to_the_last_page() {
    for (streams, rate) in [(1, "40MiB/s"), (2, "0"), (8, "200MiB/s")] {
        let mut pair = Pair::new();
        let writer = Writer::register(
            &pair.stage.path("r"),
            8 * MIB,
            rate,
            2 * MIB,
            pair.sender.socket(),
        );
        let regions = pair.sender.call("query-regions", Value::Null);
        assert_eq!(regions[0]["tracker"]["kind"], "pagemap", "{regions:#}");
        let done = pair.transfer("r", json!({"streams": streams}));
        assert!(writer.is_stopped());
        assert_same(&writer.path, &pair.destination("r"));
        let passes = done["iterations"].as_array().unwrap();
        let sent: u64 = passes[1..]
            .iter()
            .map(|pass| pass["pages"].as_u64().unwrap())
            .sum();
        let most = passes.len() as u64 * 2 * MIB / PAGE;
        assert!(sent <= most, "later passes send what was written: {done:#}");
        if rate == "0" {
            assert_eq!(sent, 0, "nothing was written: {done:#}");
        }
    }
}

#[test]
fn a_writer_that_dies_ends_the_transfer_by_name() {
    let mut pair = Pair::new();
    let path = pair.stage.path("r");
    let writer = Writer::register(&path, 8 * MIB, "1MiB/s", MIB, pair.sender.socket());
    pair.begin("r", json!({"max-bandwidth": "4MiB/s"}));
    pair.sender.wait("r", "active");
    drop(writer);
    pair.sender.wait_failed("r", "writer-gone");
    pair.assert_nothing_happened(&[]);
}

/// A Region of `pages` pages whose writer, this test, shares a bitmap.
struct Marked {
    pair: Pair,
    memory: File,
    bitmap: File,
}

impl Marked {
    fn new(pages: u64) -> Self {
        let mut pair = Pair::new();
        let path = pair.stage.path("r");
        dense(&path, pages * PAGE, 1);
        let memory = File::options().read(true).write(true).open(&path).unwrap();
        let bitmap = memfd_create(
            "bitmap",
            MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
        );
        let bitmap = File::from(bitmap.unwrap());
        bitmap.set_len(pages.div_ceil(64) * 8).unwrap();
        fcntl(&bitmap, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
        pair.sender
            .control()
            .send_fd("marks", bitmap.as_fd())
            .unwrap();
        let tracker = json!({"kind": "bitmap", "fdname": "marks"});
        pair.sender.call(
            "region-add",
            json!({"name": "r", "path": path, "tracker": tracker}),
        );
        Self {
            pair,
            memory,
            bitmap,
        }
    }

    /// Writes a page, and marks it behind that.
    fn write(&self, page: u64) {
        self.memory.write_all_at(b"written", page * PAGE).unwrap();
        self.mark(page);
    }

    /// Writes to a page what it holds, and marks it.
    fn write_same(&self, page: u64) {
        let mut bytes = [0; 4096];
        self.memory.read_exact_at(&mut bytes, page * PAGE).unwrap();
        self.memory.write_all_at(&bytes, page * PAGE).unwrap();
        self.mark(page);
    }

    fn mark(&self, page: u64) {
        let mut byte = [0];
        self.bitmap.read_exact_at(&mut byte, page / 8).unwrap();
        byte[0] |= 1 << (page % 8);
        self.bitmap.write_all_at(&byte, page / 8).unwrap();
    }

    fn marks(&self) -> Vec<u64> {
        let mut bytes = vec![0; usize::try_from(self.bitmap.metadata().unwrap().len()).unwrap()];
        self.bitmap.read_exact_at(&mut bytes, 0).unwrap();
        let pages = (0u64..).zip(bytes.iter());
        pages
            .flat_map(|(byte, bits)| {
                (0..8)
                    .filter(move |bit| bits >> bit & 1 == 1)
                    .map(move |bit| byte * 8 + bit)
            })
            .collect()
    }
}

#[test]
fn marked_pages_are_sent_and_their_marks_are_taken() {
    let mut marked = Marked::new(200);
    marked.write(7);
    marked.write(199);
    marked.pair.transfer("r", json!({}));
    assert_eq!(marked.marks(), [0; 0]);
    assert_same(&marked.pair.stage.path("r"), &marked.pair.destination("r"));
}

/// The relay holds the mark that ends this Iteration on the one stream.
fn hold_mark(relay: &Relay, wanted: u32) {
    relay.hold_next(move |frame| frame.kind == Kind::Mark { iteration: wanted });
}

fn wait_held(relay: &Relay) {
    let held = relay.wait_held(Instant::now() + DEADLINE);
    assert!(held.is_some(), "the transfer does not come that far");
}

/// One stream, and as many passes as it takes.
fn skipping() -> Value {
    json!({"streams": 1, "skip-unchanged": true, "downtime-limit": "1us"})
}

#[test]
fn a_page_that_is_written_with_what_it_held_is_not_sent_again() {
    let mut marked = Marked::new(200);
    let relay = Relay::start(&marked.pair.uri);
    marked.pair.uri = relay.local_uri();
    hold_mark(&relay, 1);
    marked.pair.begin("r", skipping());
    wait_held(&relay);
    (0..200).for_each(|page| marked.write_same(page));
    marked.write(7);
    relay.release(Act::Pass);
    let done = marked.pair.sender.wait("r", "completed");
    let ram = &done["ram"];
    assert_eq!(
        (&ram["unchanged"], &ram["normal"]),
        (&json!(199), &json!(201)),
        "{done:#}"
    );
    assert_same(&marked.pair.stage.path("r"), &marked.pair.destination("r"));
}

#[test]
fn what_was_under_way_when_the_line_broke_is_sent_whatever_it_holds() {
    let mut marked = Marked::new(200);
    let relay = Relay::start(&marked.pair.uri);
    marked.pair.uri = relay.local_uri();
    hold_mark(&relay, 1);
    marked.pair.begin("r", skipping());
    wait_held(&relay);
    marked.write(7);
    // It was compared, and its new content is known here and lost on the way.
    relay.hold_next(|frame| frame.kind == Kind::Packet { iteration: 2 });
    relay.release(Act::Pass);
    wait_held(&relay);
    relay.release(Act::Cut);
    let done = marked.pair.sender.wait("r", "completed");
    assert_eq!(done["ram"]["unchanged"], 0, "{done:#}");
    assert_eq!(done["recoveries"], 1, "{done:#}");
    assert_same(&marked.pair.stage.path("r"), &marked.pair.destination("r"));
}

#[test]
fn most_of_a_writer_that_repeats_itself_is_not_sent_again() {
    for tracker in ["pagemap", "bitmap"] {
        let mut pair = Pair::new();
        let relay = Relay::start(&pair.uri);
        pair.uri = relay.local_uri();
        let (path, account) = (pair.stage.path("r"), pair.stage.path("account"));
        let mut more = vec!["--register", pair.sender.socket().to_str().unwrap()];
        more.extend(["--name", "r", "--tracker", tracker, "--pattern", "rewrite"]);
        more.extend(["--account", account.to_str().unwrap()]);
        let writer = Writer::with(&path, 8 * MIB, "64MiB/s", 4 * MIB, &more);
        hold_mark(&relay, 1);
        pair.begin("r", skipping());
        wait_held(&relay);
        // Two rounds and more, in which a quarter of the working set becomes something else.
        let newest = || {
            let pages = Account::read(&account).unwrap().pages;
            let written = pages.iter().map(|newest| match newest {
                Newest::Stamp(sequence) => *sequence,
                Newest::Nothing | Newest::Zeros(_) => 0,
            });
            written.max().unwrap()
        };
        let (before, deadline) = (newest(), Instant::now() + DEADLINE);
        while newest() < before + 2 * 1024 {
            assert!(Instant::now() < deadline, "the writer does not write");
            std::thread::yield_now();
        }
        relay.release(Act::Pass);
        let done = pair.sender.wait("r", "completed");
        let count = |key: &str| done["ram"][key].as_u64().unwrap();
        assert!(count("unchanged") > 256, "{tracker} {done:#}");
        let found = verify(
            &File::open(pair.destination("r")).unwrap(),
            &Account::read(&account).unwrap(),
        );
        assert_eq!(found.unwrap().count, 0, "{tracker}");
        assert_same(&path, &pair.destination("r"));
        drop(writer);
    }
}

#[test]
fn without_checksums_nothing_can_be_skipped() {
    let mut marked = Marked::new(10);
    let order = json!({"uri": marked.pair.uri, "skip-unchanged": true, "integrity": "off"});
    let (code, text) = marked.pair.sender.refusal("migrate", order);
    assert_eq!(code, "invalid-argument", "{text}");
    assert!(
        text.contains("skip-unchanged") && text.contains("integrity"),
        "{text}"
    );
}

#[test]
fn pages_that_are_written_in_every_pass_are_left_for_the_last_one() {
    const OFTEN: Range<u64> = 0..8;
    let mut marked = Marked::new(64);
    let relay = Relay::start(&marked.pair.uri);
    marked.pair.uri = relay.local_uri();
    hold_mark(&relay, 1);
    let order = json!({"streams": 1, "downtime-limit": "1us", "max-iterations": 4});
    marked.pair.begin("r", order);
    // In each of the first three passes some pages are written that are written in each, and some others.
    for pass in 1..=3 {
        wait_held(&relay);
        let seldom = u64::from(pass) * 8;
        OFTEN
            .chain(seldom..seldom + 8)
            .for_each(|page| marked.write(page));
        if pass < 3 {
            hold_mark(&relay, pass + 1);
        }
        relay.release(Act::Pass);
    }
    let done = marked.pair.sender.wait("r", "completed");
    assert_same(&marked.pair.stage.path("r"), &marked.pair.destination("r"));
    let passes = done["iterations"].as_array().unwrap().iter();
    let row = |pass: &Value| ["pages", "left"].map(|key| pass[key].as_u64().unwrap());
    assert_eq!(
        Vec::from_iter(passes.map(row)),
        // The second one is a fourth of the first: where passes shrink nothing is left.
        [[64, 0], [16, 0], [8, 8], [8, 8], [8, 0]],
        "{done:#}"
    );
}

#[test]
fn the_marks_of_a_failed_transfer_come_back() {
    let mut marked = Marked::new(200);
    marked.write(7);
    marked.write(150);
    // A receiver that has the name already is met after the trackers were begun, or not: both ways
    // nothing may be forgotten. One that goes away is met for certain after the first pass.
    marked.pair.begin("r", json!({"max-bandwidth": "1MiB/s"}));
    marked.pair.sender.wait("r", "active");
    marked
        .pair
        .sender
        .call("migrate_cancel", json!({"id": "r"}));
    marked.pair.sender.wait("r", "cancelled");
    assert_eq!(marked.marks(), [7, 150]);
    let refused = {
        let freeze = json!({"kind": "pid", "pid": std::process::id()});
        let tracker = json!({"kind": "bitmap", "fdname": "again"});
        let sender = &mut marked.pair.sender;
        sender
            .control()
            .send_fd("again", marked.bitmap.as_fd())
            .unwrap();
        let path = marked.pair.stage.path("r");
        sender.refusal(
            "region-add",
            json!({"name": "s", "path": path, "tracker": tracker, "freeze": freeze}),
        )
    };
    assert_eq!(refused.0, "invalid-argument", "{}", refused.1);
    marked.pair.transfer("r", json!({}));
    assert_same(&marked.pair.stage.path("r"), &marked.pair.destination("r"));
}

#[test]
fn descriptors_that_are_something_else_are_refused_when_they_are_registered() {
    let mut marked = Marked::new(64);
    let path = marked.pair.stage.path("r");
    let sender = &mut marked.pair.sender;
    let mut add = |tracker: Value| {
        sender
            .refusal(
                "region-add",
                json!({"name": "s", "path": path, "tracker": tracker}),
            )
            .0
    };
    let pagemap =
        json!({"kind": "pagemap", "pagemap-fdname": "x", "uffd-fdname": "y", "address": 4096});
    assert_eq!(add(pagemap), "no-descriptor");
    assert_eq!(
        add(json!({"kind": "bitmap", "fdname": "x"})),
        "no-descriptor"
    );
    assert_eq!(add(json!({"kind": "pagemap"})), "invalid-argument");
    let short = File::from(
        memfd_create("short", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap(),
    );
    short.set_len(4).unwrap();
    fcntl(&short, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    let mut with = |name: &str, tracker: Value| {
        let sender = &mut marked.pair.sender;
        sender.control().send_fd(name, short.as_fd()).unwrap();
        if tracker["kind"] == "pagemap" {
            sender.control().send_fd("uffd", short.as_fd()).unwrap();
        }
        sender
            .refusal(
                "region-add",
                json!({"name": "s", "path": path, "tracker": tracker}),
            )
            .0
    };
    assert_eq!(
        with("b", json!({"kind": "bitmap", "fdname": "b"})),
        "bitmap-size"
    );
    let pagemap =
        json!({"kind": "pagemap", "pagemap-fdname": "p", "uffd-fdname": "uffd", "address": 4096});
    assert_eq!(with("p", pagemap), "tracker-descriptor");
    marked.pair.sender.assert_alive();
}

#[test]
fn an_address_with_other_memory_than_the_region_is_refused_when_it_is_registered() {
    let pair = Pair::new();
    let memory = |name: &str| {
        let file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(MIB).unwrap();
        file
    };
    let (ours, other) = (memory("ours"), memory("other"));
    let mapping = Mapping::new(&other, usize::try_from(MIB).unwrap(), Access::Write).unwrap();
    let tracking = Tracking::Pagemap(Tracked::new(&mapping).unwrap());
    let mut writer = Connection::connect(pair.sender.socket()).unwrap();
    let name = Name::new("r").unwrap();
    let refused = writer.register(&name, ours.as_fd(), &tracking, json!({"kind": "client"}));
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("memfd:other"), "{refused}");
    writer
        .register(&name, other.as_fd(), &tracking, json!({"kind": "client"}))
        .unwrap();
}
