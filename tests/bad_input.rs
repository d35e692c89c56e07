//! What people and machines get wrong: configuration, sources, destinations, orders. Every mistake is a
//! named error, the daemons go on serving, the writer goes on writing, and nothing is left behind.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "also the helpers of a test end it by a panic, and say what they skip"
)]

mod common;

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use common::memory::{MIB, PAGE, dense, noise, sparse};
use common::{Daemon, Pair, Stage, Writer, ended, listing, memferry, skip};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde_json::{Value, json};

/// Slow enough that whatever is to happen during a transfer of a few MiB happens during it.
fn slowly() -> Value {
    json!({"max-bandwidth": "2MiB/s", "packet-size": "64KiB", "window": "256KiB", "streams": 2})
}

/// Under way: some of it has been sent, most of it has not.
fn wait_under_way(pair: &mut Pair, name: &str) {
    pair.sender.wait_until(name, |seen| {
        seen["ram"]["transferred"].as_u64() > Some(MIB / 4)
    });
}

/// A live Region of 4 MiB, with its writer.
fn live(pair: &mut Pair, name: &str) -> Writer {
    let writer = Writer::start(&pair.stage.path(name), 4 * MIB, "2MiB/s", MIB);
    pair.add_live(name, &writer);
    writer
}

/// Runs `memferry migrate` for the Region `name` to its end; gives exit code and what was printed.
fn migrate(pair: &Pair, name: &str) -> (Option<i32>, String) {
    let arguments = ["migrate", &pair.uri, "--region", name, "--progress", "none"];
    ended(&pair.sender.cli(&arguments))
}

/// Starts a daemon on a configuration that it must refuse.
fn refused_configuration(stage: &Stage, who: &str, text: &str) -> String {
    let path = stage.write("bad.toml", text);
    let run = memferry().arg(who).arg("--config").arg(&path).output();
    let (code, text) = ended(&run.unwrap());
    assert_eq!(code, Some(78), "{text}");
    let (code, same) = ended(&memferry().arg("check").arg(&path).output().unwrap());
    assert_eq!(code, Some(78), "{same}");
    text
}

#[test]
fn an_unknown_key_is_refused_with_its_line_and_a_suggestion() {
    let stage = Stage::new();
    let text = refused_configuration(
        &stage,
        "sender",
        "[transfer]\nintegrity = \"off\"\nsteams = 3\n",
    );
    assert!(text.contains("bad.toml:3"), "{text}");
    assert!(text.contains("did you mean \"streams\"?"), "{text}");
    let text = refused_configuration(
        &stage,
        "receiver",
        "[receive]\n\ndirectry = \"/dev/shm/x\"\n",
    );
    assert!(text.contains("bad.toml:3"), "{text}");
    assert!(text.contains("\"directory\""), "{text}");
}

#[test]
fn a_name_that_leaves_the_directory_is_refused_everywhere() {
    let mut pair = Pair::new();
    let toml = "[transfer]\n\n[[region]]\nname = \"../x\"\npath = \"/dev/shm/x\"\n";
    let text = refused_configuration(&pair.stage, "sender", toml);
    assert!(
        text.contains("bad.toml:4") && text.contains("../x"),
        "{text}"
    );

    let source = pair.stage.path("source");
    dense(&source, PAGE, 1);
    for name in ["../x", "a/b", ".x", ""] {
        let region = json!({"name": name, "path": source});
        let (code, desc) = pair.sender.refusal("region-add", region);
        assert_eq!(code, "invalid-argument", "{desc}");
    }
    pair.add("good", &source);
    let order = json!({"uri": pair.uri, "id": "../x"});
    assert_eq!(pair.sender.refusal("migrate", order).0, "invalid-argument");
    pair.assert_nothing_happened(&[]);
}

#[test]
fn a_source_that_cannot_be_had_is_named() {
    let stage = Stage::new();
    let missing = stage.path("missing");
    let toml = format!("[[region]]\nname = \"r\"\npath = {missing:?}\n");
    let mut sender = stage.sender_with(&toml);
    assert!(sender.log().contains(missing.to_str().unwrap()));
    assert_eq!(sender.call("query-regions", Value::Null), json!([]));

    let (code, desc) = sender.refusal("region-add", json!({"name": "r", "path": missing}));
    assert_eq!(code, "region-open");
    assert!(desc.contains(missing.to_str().unwrap()), "{desc}");
    let path = stage.path("");
    let (code, desc) = sender.refusal("region-add", json!({"name": "r", "path": path}));
    assert_eq!(code, "region-kind");
    assert!(desc.contains("directory"), "{desc}");
    let add = ["region", "add", "r", "--path", missing.to_str().unwrap()];
    let (code, text) = ended(&sender.cli(&add));
    assert_eq!(code, Some(1));
    assert!(text.contains(missing.to_str().unwrap()), "{text}");
    let (code, _) = sender.refusal("region-add", json!({"name": "r", "fdname": "none"}));
    assert_eq!(code, "no-descriptor");
    sender.assert_alive();
}

#[test]
fn a_source_that_may_not_be_read_is_named() {
    const NOBODY: u32 = 65534;
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can start a sender as another user");
        return;
    }
    let stage = Stage::new();
    let secret = stage.path("secret");
    dense(&secret, PAGE, 1);
    use std::os::unix::fs::{PermissionsExt, chown};
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    chown(stage.path(""), Some(NOBODY), None).unwrap();
    let config = stage.common_config("sender");
    let mut sender = Daemon::start(&stage, "sender", "sender", &config, Some(NOBODY));
    let (code, desc) = sender.refusal("region-add", json!({"name": "r", "path": secret}));
    assert_eq!(code, "region-open");
    assert!(desc.contains(secret.to_str().unwrap()), "{desc}");
    assert!(desc.contains("ermission denied"), "{desc}");
    sender.assert_alive();
}

#[test]
fn a_source_cut_during_the_transfer_is_an_error_and_no_signal() {
    let mut pair = Pair::new();
    for (name, zero_copy) in [("lent", "msg-zerocopy"), ("plain", "off")] {
        let source = pair.stage.path(name);
        dense(&source, 4 * MIB, 1);
        pair.add(name, &source);
        let mut order = slowly();
        order["zero-copy"] = json!(zero_copy);
        pair.begin(name, order);
        wait_under_way(&mut pair, name);
        let file = File::options().write(true).open(&source).unwrap();
        file.set_len(PAGE).unwrap();
        let failed = pair.sender.wait_failed(name, "region-resized");
        let desc = failed["error"]["desc"].as_str().unwrap();
        assert!(desc.contains(source.to_str().unwrap()), "{desc}");
        assert!(desc.contains("4194304") && desc.contains("4096"), "{desc}");
        pair.receiver.wait_arrival(name, "failed");
        pair.assert_nothing_happened(&[]);
        // Resized back it is what was added, and can go.
        drop(file);
        dense(&source, 4 * MIB, 2);
        pair.transfer(name, json!({}));
        common::memory::assert_same(&source, &pair.destination(name));
        fs::remove_file(pair.destination(name)).unwrap();
    }
}

#[test]
fn a_source_with_a_page_that_cannot_be_read_is_named() {
    let mut pair = Pair::new();
    let image = pair.stage.path("image");
    let Some(disk) = common::mount::Mount::disk(&image, 16 * MIB) else {
        return;
    };
    let source = disk.path().join("r");
    dense(&source, 8 * MIB, 1);
    let file = File::open(&source).unwrap();
    file.sync_all().unwrap();
    // The disk loses most of what is on it, and the kernel forgets what it has read of it.
    let damaged = File::options().write(true).open(&image).unwrap();
    damaged.set_len(4 * MIB).unwrap();
    let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
    posix_fadvise(&file, 0, 0, advice).unwrap();
    pair.add("r", &source);
    pair.begin("r", json!({}));
    let failed = pair.sender.wait_failed("r", "region-read");
    let desc = failed["error"]["desc"].as_str().unwrap();
    assert!(desc.contains(source.to_str().unwrap()), "{desc}");
    assert!(desc.contains("nput/output error"), "{desc}");
    pair.receiver.wait_arrival("r", "failed");
    pair.assert_nothing_happened(&[]);
    pair.sender.call("region-del", json!({"name": "r"}));
}

/// Has the kernel take a page of a file for broken memory.
fn poison(path: &Path, page: u64) -> bool {
    const MADV_HWPOISON: &str = "100";
    let program = "import ctypes, mmap, sys\n\
        file = open(sys.argv[1], 'r+b')\n\
        memory = mmap.mmap(file.fileno(), 4096, offset=int(sys.argv[2]))\n\
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))\n\
        memory[0]\n\
        libc = ctypes.CDLL(None)\n\
        sys.exit(libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(4096), int(sys.argv[3])) != 0)";
    let mut python = Command::new("python3");
    python.args(["-c", program]).arg(path);
    python.args([&(page * PAGE).to_string(), MADV_HWPOISON]);
    python.status().is_ok_and(|status| status.success())
}

#[test]
#[ignore = "costs the machine a page of its memory until it boots: not in CI, only by hand"]
fn a_source_page_that_goes_bad_during_the_transfer_is_named() {
    let mut pair = Pair::new();
    let source = pair.stage.path("r");
    dense(&source, 4 * MIB, 1);
    pair.add("r", &source);
    pair.begin("r", slowly());
    wait_under_way(&mut pair, "r");
    if !poison(&source, 4 * MIB / PAGE - 1) {
        return skip("this kernel poisons no pages (CONFIG_MEMORY_FAILURE)");
    }
    pair.sender.wait_failed("r", "region-read");
    pair.receiver.wait_arrival("r", "failed");
    pair.assert_nothing_happened(&[]);
}

#[test]
fn a_source_resized_before_the_transfer_is_an_error() {
    let mut pair = Pair::new();
    let source = pair.stage.path("r");
    for length in [0, PAGE + 1, 3 * MIB] {
        dense(&source, MIB, 1);
        pair.add("r", &source);
        let file = File::options().write(true).open(&source).unwrap();
        file.set_len(length).unwrap();
        pair.begin("r", json!({}));
        pair.sender.wait_failed("r", "region-resized");
        pair.sender.call("region-del", json!({"name": "r"}));
        pair.receiver.wait_arrival("r", "failed");
        pair.assert_nothing_happened(&[]);
    }
}

#[test]
fn a_region_larger_than_the_receiver_allows_is_refused() {
    let stage = Stage::new();
    let receiver = stage.receiver_with("tcp:127.0.0.1:0", "max-region = \"2MiB\"");
    let mut pair = Pair::of(stage, receiver);
    let writer = live(&mut pair, "r");
    let (code, text) = migrate(&pair, "r");
    assert_eq!(code, Some(8), "{text}");
    assert!(text.contains("receive.max-region"), "{text}");
    let last = pair.sender.call("query-migrate", Value::Null);
    assert_eq!(last["error"]["x-code"], "too-large");
    writer.assert_runs();
    pair.assert_nothing_happened(&[]);
}

#[test]
fn a_name_that_exists_at_the_destination_is_refused_and_kept() {
    let mut pair = Pair::new();
    let writer = live(&mut pair, "r");
    fs::write(pair.destination("r"), "somebody's").unwrap();
    let (code, text) = migrate(&pair, "r");
    assert_eq!(code, Some(8), "{text}");
    let last = pair.sender.call("query-migrate", Value::Null);
    assert_eq!(last["error"]["x-code"], "exists");
    writer.assert_runs();
    pair.assert_nothing_happened(&["r".to_owned()]);
    assert_eq!(fs::read(pair.destination("r")).unwrap(), b"somebody's");

    // A link that leads nowhere is in the way too, and is not followed.
    fs::remove_file(pair.destination("r")).unwrap();
    let elsewhere = pair.stage.path("elsewhere");
    std::os::unix::fs::symlink(&elsewhere, pair.destination("r")).unwrap();
    assert_eq!(migrate(&pair, "r").0, Some(8));
    assert!(!elsewhere.exists());
    pair.assert_nothing_happened(&["r".to_owned()]);
}

#[test]
fn a_name_taken_during_the_transfer_is_not_replaced() {
    let mut pair = Pair::new();
    let source = pair.stage.path("r");
    dense(&source, 2 * MIB, 1);
    pair.add("r", &source);
    pair.begin("r", slowly());
    wait_under_way(&mut pair, "r");
    fs::write(pair.destination("r"), "somebody's").unwrap();
    // Committed all the same: it is owned there, under its hidden name, and the log says so.
    pair.sender.wait("r", "completed");
    assert_eq!(fs::read(pair.destination("r")).unwrap(), b"somebody's");
    let hidden = listing(&pair.stage.arrived());
    assert_eq!(hidden.len(), 2, "{hidden:?}");
    common::memory::assert_same(&source, &pair.destination(&hidden[0]));
    assert!(pair.receiver.log().contains("final name"));
}

#[test]
fn a_destination_that_is_too_small_is_refused_before_anything_is_sent() {
    let Some(small) = common::mount::Mount::tmpfs("size=2M") else {
        return;
    };
    let mut pair = Pair::on(small.path());
    let writer = live(&mut pair, "r");
    let (code, text) = migrate(&pair, "r");
    assert_eq!(code, Some(9), "{text}");
    let last = pair.sender.call("query-migrate", Value::Null);
    assert_eq!(last["error"]["x-code"], "no-space");
    assert_eq!(last["ram"]["transferred"], 0);
    writer.assert_runs();
    // A hole needs no room.
    let hole = pair.stage.path("hole");
    sparse(&hole, 64 * MIB, &[(MIB, PAGE)]);
    pair.add("hole", &hole);
    pair.transfer("hole", json!({}));
    common::memory::assert_same(&hole, &small.path().join("hole"));
    pair.assert_nothing_happened(&[]);
    assert_eq!(listing(small.path()), ["hole"]);
}

#[test]
fn a_destination_that_others_fill_up_is_an_error_and_no_signal() {
    let Some(small) = common::mount::Mount::tmpfs("size=5M") else {
        return;
    };
    let mut pair = Pair::on(small.path());
    let writer = live(&mut pair, "r");
    pair.begin("r", slowly());
    wait_under_way(&mut pair, "r");
    // Takes what is left, and keeps it.
    let thief = small.path().join("thief");
    let _ = fs::write(&thief, noise(5 * MIB, 1));
    pair.sender.wait_failed("r", "no-space");
    writer.assert_runs();
    pair.receiver.wait_arrival("r", "failed");
    pair.assert_nothing_happened(&[]);
    assert_eq!(listing(small.path()), ["thief"]);
    fs::remove_file(&thief).unwrap();
    pair.transfer("r", json!({}));
    common::memory::assert_same(&writer.path, &small.path().join("r"));
}

#[test]
fn an_id_and_a_region_are_used_once_at_a_time() {
    let mut pair = Pair::new();
    let writer = live(&mut pair, "r");
    let other = pair.stage.path("other");
    dense(&other, PAGE, 1);
    pair.add("other", &other);
    pair.begin("r", slowly());
    wait_under_way(&mut pair, "r");

    let order = |id: &str, region: &str| json!({"uri": pair.uri, "id": id, "regions": [region]});
    let (same_id, same_region) = (order("r", "other"), order("x", "r"));
    let both = json!({"uri": pair.uri, "id": "x", "regions": ["other", "r"]});
    assert_eq!(pair.sender.refusal("migrate", same_id).0, "id-in-use");
    assert_eq!(pair.sender.refusal("migrate", same_region).0, "region-busy");
    assert_eq!(pair.sender.refusal("migrate", both).0, "region-busy");
    let remove = json!({"name": "r"});
    assert_eq!(pair.sender.refusal("region-del", remove).0, "region-busy");
    let again = json!({"name": "r", "path": other});
    assert_eq!(pair.sender.refusal("region-add", again).0, "region-exists");
    let (code, text) = migrate(&pair, "r");
    assert_eq!(code, Some(1), "{text}");
    // What was refused together with it was not taken.
    pair.transfer("other", json!({}));
    pair.sender.call("migrate_cancel", json!({"id": "r"}));
    pair.sender.wait("r", "cancelled");
    writer.assert_runs();
    pair.receiver.wait_arrival("r", "cancelled");
    pair.assert_nothing_happened(&["other".to_owned()]);
}

#[test]
fn a_name_that_is_just_arriving_is_refused_to_another_sender() {
    let mut pair = Pair::new();
    let source = pair.stage.path("r");
    dense(&source, 4 * MIB, 1);
    pair.add("r", &source);
    pair.begin("r", slowly());
    wait_under_way(&mut pair, "r");
    let config = pair.stage.common_config("second");
    let mut second = Daemon::start(&pair.stage, "sender", "second", &config, None);
    second.call("region-add", json!({"name": "r", "path": source}));
    second.call("migrate", json!({"uri": pair.uri, "id": "r2"}));
    second.wait_failed("r2", "busy");
    pair.sender.wait("r", "completed");
    common::memory::assert_same(&source, &pair.destination("r"));
}

#[test]
fn another_writer_than_the_frozen_one_is_found() {
    // Large enough that reading it takes far longer than the second writer's pauses.
    const SIZE: u64 = 48 * MIB;
    let mut pair = Pair::new();
    let stand_in = Writer::start(&pair.stage.path("other"), PAGE, "0B/s", 0);
    let writer = Writer::start(&pair.stage.path("r"), SIZE, "16MiB/s", SIZE);
    let freeze = json!({"kind": "pid", "pid": stand_in.pid()});
    let region = json!({"name": "r", "path": writer.path, "tracker": "scan", "freeze": freeze});
    pair.sender.call("region-add", region);
    let (code, text) = migrate(&pair, "r");
    assert_eq!(code, Some(4), "{text}");
    let last = pair.sender.call("query-migrate", Value::Null);
    assert_eq!(last["error"]["x-code"], "not-frozen", "{last:#}");
    stand_in.assert_runs();
    writer.assert_runs();
    pair.receiver
        .wait_arrival(last["id"].as_str().unwrap(), "failed");
    pair.assert_nothing_happened(&[]);
}
