//! Transfers of a small Region whose writer is hostile, while things go wrong, all of it drawn from a
//! seed. Each ends with the destination identical; or failed with the source complete, its writer running
//! and nothing at the destination. After a failure the same Region is moved once more, undisturbed.
//!
//! What the destination has to hold is the writer's own account of its newest write to every page, so a
//! page that is not right is told by the write that was lost.
//!
//! `MEMFERRY_HOSTILE_RUNS=1000` makes as many runs, `MEMFERRY_SEED` repeats those from a seed on.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "also the helpers of a test end it by a panic, and tell what led there"
)]

#[path = "../common/mod.rs"]
mod common;
mod plan;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use common::memory::assert_same;
use common::random::number;
use common::relay::{Act, Frame, Kind, Relay, Which};
use common::{DEADLINE, Daemon, Stage, Writer, listing};
use memferry::client::ClientError;
use memferry::workload::{Account, verify};
use nix::sys::signal::Signal;
use plan::{Fault, Plan, Tracker, When};
use serde_json::{Value, json};

/// Few enough for every `cargo test`.
const RUNS_DEFAULT: u64 = 24;

/// Between two looks at what the sender says.
const LOOK: Duration = Duration::from_millis(1);

/// What a faulty attempt may fail with. Everything else would be our mistake.
const HONEST_CODES: &[&str] = &[
    "connection-lost",
    "unreachable",
    "peer-silent",
    "peer-hung",
    "destination-slow",
    "stalled",
    "refused",
    "not-owner",
    "writer-gone",
    "exists",
    // Of a restarted sender that knows that it sent no commit.
    "sender-failed",
];

/// Two daemons with a relay between, for any number of runs.
struct World {
    sender: Daemon,
    receiver: Daemon,
    relay: Relay,
    stage: Stage,
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Completed,
    Cancelled,
    Failed(String),
    /// The sender was killed before it had sent the commit, and knows nothing of it any more.
    Forgotten,
}

/// One Region and who writes it.
struct Prey {
    name: String,
    writer: Option<Writer>,
    memory: PathBuf,
    account: PathBuf,
}

/// The Iteration that a frame belongs to; 0: to none.
fn iteration(frame: &Frame) -> u32 {
    match frame.kind {
        Kind::Packet { iteration } | Kind::Mark { iteration } => iteration,
        _ => 0,
    }
}

/// That memory holds what its writer wrote last.
#[track_caller]
fn assert_all_there(memory: &Path, account: &Account) {
    let found = verify(&File::open(memory).unwrap(), account).unwrap();
    let lost: Vec<_> = found.first.iter().map(ToString::to_string).collect();
    let (count, memory) = (found.count, memory.display());
    assert!(count == 0, "{count} writes are lost in {memory}: {lost:#?}");
}

impl World {
    fn new() -> Self {
        let stage = Stage::new();
        let mut receiver = stage.receiver();
        let relay = Relay::start(&receiver.uri());
        let sender = stage.sender();
        Self {
            sender,
            receiver,
            relay,
            stage,
        }
    }

    fn prey(&mut self, plan: &Plan) -> Prey {
        let name = format!("r{}", plan.seed);
        let memory = self.stage.path(&name);
        let account = self.stage.path(&format!("{name}.account"));
        let pattern = clap::ValueEnum::to_possible_value(&plan.pattern).unwrap();
        let mut more = vec!["--pattern", pattern.get_name()];
        more.extend(["--account", account.to_str().unwrap()]);
        if let Some(tracker) = plan.tracker.word() {
            let socket = self.sender.socket().to_str().unwrap();
            more.extend(["--register", socket, "--name", &name, "--tracker", tracker]);
        }
        let rate = format!("{}MiB/s", plan.rate);
        let writer = Writer::with(&memory, plan.size, &rate, plan.working_set, &more);
        if plan.tracker == Tracker::None {
            let region = json!({"name": name, "path": memory});
            self.sender.call("region-add", region);
        }
        Prey {
            name,
            writer: Some(writer),
            memory,
            account,
        }
    }

    /// Begins, lets go wrong what is to go wrong, and waits for the end. Also says whether it went wrong,
    /// or the transfer was faster.
    fn attempt(&mut self, plan: &Plan, prey: &mut Prey) -> (Outcome, bool) {
        let mut order = plan.parameters.clone();
        order["uri"] = json!(self.relay.local_uri());
        order["id"] = json!(prey.name);
        order["regions"] = json!([prey.name]);
        let armed = !matches!(plan.fault, Fault::Nothing | Fault::Refuse);
        if armed {
            self.hold(plan, prey, 0);
        }
        if plan.fault == Fault::Refuse {
            fs::write(self.destination(prey), b"somebody's").unwrap();
        }
        self.sender.call("migrate", order);
        let mut struck = plan.fault == Fault::Refuse;
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(frame) = self.relay.wait_held(Instant::now() + LOOK) {
                if self.is_time(plan, prey, &frame) {
                    struck = true;
                    self.strike(plan, prey);
                } else {
                    self.hold(plan, prey, iteration(&frame));
                    self.relay.release(Act::Pass);
                }
            }
            while self
                .sender
                .control()
                .next_event(Duration::ZERO)
                .unwrap()
                .is_some()
            {}
            if let Some(outcome) = self.outcome(prey) {
                return (outcome, struck);
            }
            assert!(
                Instant::now() < deadline,
                "no end of it: {}",
                self.sender.log()
            );
        }
    }

    /// Holds the frame with which it may go wrong; `after`: the last Iteration that was looked at.
    fn hold(&self, plan: &Plan, prey: &Prey, after: u32) {
        let when = plan.when;
        let data = fs::metadata(&prey.memory).unwrap().blocks() * 512;
        let (mut frames, mut sent) = (0, 0);
        self.relay.hold_next(move |frame| {
            frames += 1;
            sent += frame.payload as u64;
            let is = |name: &str| frame.kind == Kind::Message(name.to_owned());
            let here = match when {
                When::Frames(number) => frames > number,
                When::Sent(share) => frame.payload > 0 && sent * 100 >= data * share,
                When::Frozen => iteration(frame) > after,
                When::Message(name) => return is(name),
            };
            here || is("prepare")
        });
    }

    /// Whether this is the moment. Only the sender knows which Iteration is behind the freeze.
    fn is_time(&mut self, plan: &Plan, prey: &Prey, frame: &Frame) -> bool {
        if plan.when != When::Frozen || matches!(frame.kind, Kind::Message(_)) {
            return true;
        }
        let query = json!({"id": prey.name});
        self.sender.call("query-migrate", query)["status"] == "device"
    }

    fn outcome(&mut self, prey: &Prey) -> Option<Outcome> {
        let query = json!({"id": prey.name});
        let seen = match self.sender.control().execute("query-migrate", query) {
            Ok(seen) => seen,
            Err(ClientError::Command { code, .. }) if code == "no-such-transfer" => {
                return Some(Outcome::Forgotten);
            }
            Err(error) => panic!("{error}: {}", self.sender.log()),
        };
        match seen["status"].as_str().unwrap() {
            "completed" => Some(Outcome::Completed),
            "cancelled" => Some(Outcome::Cancelled),
            "failed" => {
                let code = seen["error"]["x-code"].as_str().unwrap();
                assert!(HONEST_CODES.contains(&code), "{seen:#}");
                Some(Outcome::Failed(code.to_owned()))
            }
            _ => None,
        }
    }

    /// Everything is held; now it happens.
    fn strike(&mut self, plan: &Plan, prey: &mut Prey) {
        match plan.fault {
            Fault::Nothing | Fault::Refuse => {}
            Fault::Cancel => {
                let query = json!({"id": prey.name});
                match self.sender.control().execute("migrate_cancel", query) {
                    Ok(_) => {}
                    Err(ClientError::Command { code, .. }) if code == "too-late" => {}
                    Err(error) => panic!("{error}"),
                }
            }
            Fault::CutOne => {
                let streams = plan.parameters["streams"].as_u64().unwrap();
                let victim = plan.victim % (streams + 1);
                self.relay.reset(match u16::try_from(victim).unwrap() {
                    0 => Which::Conversation,
                    number => Which::Stream(number - 1),
                });
            }
            Fault::CutAll => self.relay.reset(Which::All),
            Fault::KillReceiver => self.receiver.kill(),
            Fault::KillSender => self.sender.kill(),
            Fault::KillBoth => {
                self.sender.kill();
                self.receiver.kill();
            }
            Fault::KillWriter => prey.writer = None,
        }
        self.relay.release(Act::Pass);
        if matches!(plan.fault, Fault::KillReceiver | Fault::KillBoth) {
            self.receiver = self.stage.receiver();
            self.relay.retarget(&self.receiver.uri());
        }
        if matches!(plan.fault, Fault::KillSender | Fault::KillBoth) {
            self.sender = self.stage.sender();
        }
    }

    fn destination(&self, prey: &Prey) -> PathBuf {
        self.stage.arrived().join(&prey.name)
    }

    /// The destination is what the writer wrote, and the writer is not ours to continue.
    fn assert_moved(&self, plan: &Plan, prey: &Prey) {
        let destination = self.destination(prey);
        let account = Account::read(&prey.account).unwrap();
        assert_all_there(&destination, &account);
        // Also the page that was being written when the writer was stopped.
        assert_same(&prey.memory, &destination);
        if let Some(writer) = &prey.writer
            && plan.tracker != Tracker::None
        {
            assert!(plan.tracker == Tracker::Bitmap || writer.is_stopped());
            assert_eq!(Account::read(&prey.account).unwrap(), account, "it writes");
        }
    }

    /// Nothing is at the destination, and the source is complete and goes on.
    fn assert_stayed(&self, plan: &Plan, prey: &Prey) {
        assert!(!self.destination(prey).exists());
        let deadline = Instant::now() + DEADLINE;
        // What has no name yet goes with its attempt, which ends when the receiver has heard of it.
        while !listing(&self.stage.arrived()).is_empty() {
            assert!(Instant::now() < deadline, "{}", self.receiver.log());
            thread::yield_now();
        }
        let account = || Account::read(&prey.account).unwrap();
        let Some(writer) = &prey.writer else {
            return assert_all_there(&prey.memory, &account());
        };
        writer.assert_runs();
        let before = account();
        while plan.rate > 0 && account() == before {
            assert!(Instant::now() < deadline, "the writer does not write");
            thread::yield_now();
        }
        writer.stop();
        assert_all_there(&prey.memory, &account());
        writer.signal(Signal::SIGCONT);
    }

    /// What failed, once more; undisturbed it has to succeed.
    fn again(&mut self, plan: &Plan, prey: &mut Prey) {
        let Some(writer) = &prey.writer else {
            return;
        };
        let known = self.sender.call("query-regions", Value::Null);
        if known.as_array().unwrap().is_empty() {
            // The sender was killed, and with it what the writer had handed to it.
            let mut region = json!({"name": prey.name, "path": prey.memory});
            if plan.tracker != Tracker::None {
                region["tracker"] = json!("scan");
                region["freeze"] = json!({"kind": "pid", "pid": writer.pid()});
            }
            self.sender.call("region-add", region);
        }
        let mut plan = Plan {
            fault: Fault::Nothing,
            ..plan.clone()
        };
        plan.parameters["integrity"] = json!("crc32c");
        assert_eq!(self.attempt(&plan, prey).0, Outcome::Completed);
        self.assert_moved(&plan, prey);
    }

    fn run(&mut self, plan: &Plan) -> (Outcome, bool) {
        let mut prey = self.prey(plan);
        let (outcome, struck) = self.attempt(plan, &mut prey);
        self.relay.hold_none();
        self.relay.release(Act::Pass);
        if plan.fault == Fault::Refuse {
            let there = fs::read(self.destination(&prey)).unwrap();
            assert_eq!(there, b"somebody's");
            fs::remove_file(self.destination(&prey)).unwrap();
        }
        if outcome == Outcome::Completed {
            self.assert_moved(plan, &prey);
        } else {
            assert!(struck, "{outcome:?}");
            self.assert_stayed(plan, &prey);
            self.again(plan, &mut prey);
        }
        self.clear(&prey);
        (outcome, struck)
    }

    /// Makes room for the next run.
    fn clear(&mut self, prey: &Prey) {
        self.relay.reset(Which::All);
        let known = self.sender.call("query-regions", Value::Null);
        if !known.as_array().unwrap().is_empty() {
            self.sender.call("region-del", json!({"name": prey.name}));
        }
        for path in [&prey.memory, &prey.account, &self.destination(prey)] {
            // A Region whose writer was killed has not arrived.
            let _ = fs::remove_file(path);
        }
        assert_eq!(listing(&self.stage.arrived()), [""; 0]);
    }
}

/// Says how to repeat a run that fails.
struct Told<'a>(&'a Plan);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let (plan, seed) = (self.0, self.0.seed);
            eprintln!("{plan:#?}\nto repeat: MEMFERRY_SEED={seed} MEMFERRY_HOSTILE_RUNS=1");
        }
    }
}

#[test]
fn a_hostile_writer_is_moved_whole_or_stays_whole() {
    // Short, since it is part of names.
    let first = number("MEMFERRY_SEED").unwrap_or_else(|| getrandom::u64().unwrap() >> 32);
    let runs = number("MEMFERRY_HOSTILE_RUNS").unwrap_or(RUNS_DEFAULT);
    println!("MEMFERRY_SEED={first} MEMFERRY_HOSTILE_RUNS={runs}");
    let mut world = World::new();
    let (mut armed, mut struck_count) = (0, 0);
    let mut by_fault = BTreeMap::<_, u64>::new();
    let mut by_writer = BTreeMap::<_, u64>::new();
    for seed in first..first + runs {
        let plan = Plan::draw(seed);
        let _told = Told(&plan);
        let (outcome, struck) = world.run(&plan);
        let moved = outcome == Outcome::Completed;
        armed += u64::from(plan.fault != Fault::Nothing);
        struck_count += u64::from(struck);
        let fault = if struck { plan.fault } else { Fault::Nothing };
        *by_fault.entry((fault, outcome)).or_default() += 1;
        let writer = format!("{:?} {:?}", plan.tracker, plan.pattern);
        *by_writer.entry((writer, moved)).or_default() += 1;
    }
    for ((fault, outcome), count) in &by_fault {
        println!("{count:5}  {fault:?}: {outcome:?}");
    }
    for ((writer, moved), count) in &by_writer {
        let end = if *moved {
            "moved whole"
        } else {
            "stayed whole, then moved"
        };
        println!("{count:5}  {writer}: {end}");
    }
    println!("of {armed} faults {struck_count} met their transfer");
    assert!(
        struck_count * 20 >= armed * 19,
        "too late: {struck_count} of {armed}"
    );
    if runs >= 500 {
        let ends: Vec<_> = by_fault.keys().map(|(_, outcome)| outcome).collect();
        for wanted in [Outcome::Completed, Outcome::Cancelled, Outcome::Forgotten] {
            assert!(ends.contains(&&wanted), "too easy: never {wanted:?}");
        }
    }
}
