//! One transfer between real daemons over a relay, what is done to it, and what must hold afterwards.

use std::fs::{self, File};
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{Signal, kill};
use nix::sys::statvfs::statvfs;
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::common::memory::{MIB, PAGE, dense, noise};
use super::common::relay::{Act, Frame, Kind, Relay, Silence, Which};
use super::common::{DEADLINE, Daemon, Stage, Writer, listing, memferry};
use super::lab::{Clock, Elsewhere, Tmpfs, withdraw_memlock, without_ipc_lock};
use super::matrix::{FLIPS, Fault, Outcome, PACKET_BYTES, Process, Tracking};
use super::observe::{Footprint, cpu};

/// The transfers' stall timeout: what a hang may take to be noticed.
pub(crate) const STALL: Duration = Duration::from_secs(2);

/// How long faults last that nobody is to notice.
const SHORT: Duration = Duration::from_millis(400);

/// A dead peer is noticed within this.
const DEAD_NOTICED: Duration = Duration::from_secs(1);

/// Added to bounds on time, for a machine that does a lot besides.
const GRACE: Duration = Duration::from_secs(1);

/// When in a stall its cost is measured: begin and length, well within [`STALL`].
const STALL_WINDOW: (Duration, Duration) =
    (Duration::from_millis(150), Duration::from_millis(1200));

/// Most of a CPU that a stalled daemon may take.
const STALL_CPU_MAX: f64 = 0.01;

/// CPU time that a daemon may take for all a scene asks of it. Ten times what it takes; a loop that spins while
/// something hangs takes more.
const CPU_MAX: Duration = Duration::from_secs(2);

/// How far the time of day jumps, in seconds: a year.
const JUMP: i64 = 365 * 24 * 3600;

/// Names of the transfer, its Region, and of the transfer that must succeed after a failure.
const ID: &str = "r";
const AGAIN: &str = "again";

/// What is moved, and how.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) tracking: Tracking,
    pub(crate) bytes: u64,
    /// Parameters of `migrate`.
    pub(crate) parameters: Value,
    /// Which faults are to come: some need more than a directory.
    pub(crate) faults: Vec<Fault>,
}

/// What was measured on the way.
#[derive(Debug, Clone, Default)]
pub(crate) struct Measured {
    pub(crate) dead_noticed: Option<Duration>,
    pub(crate) hang_noticed: Option<Duration>,
    pub(crate) thawed: Option<Duration>,
    pub(crate) stall_cpu: Option<f64>,
    pub(crate) torn: u64,
    /// Why it failed, if it did.
    pub(crate) code: Option<String>,
}

/// A transfer under way. Fields are dropped in this order.
pub(crate) struct Scene {
    client: Option<Child>,
    relay: Relay,
    sender: Daemon,
    receiver: Daemon,
    writer: Option<Writer>,
    places: Places,
    setup: Setup,
    source: PathBuf,
    before: [Footprint; 2],
    cpu_before: [Duration; 2],
    restarted: [bool; 2],
    /// The writer was killed by us, or is stopped by us, or the source was cut.
    writer_killed: bool,
    shrunk: bool,
    indeterminate: bool,
    /// The sender was seen to live at another time.
    clock_jumped: bool,
    pub(crate) measured: Measured,
    stage: Stage,
}

/// Where the daemons run, as far as it is not where everything runs.
struct Places {
    elsewhere: Option<Elsewhere>,
    tmpfs: Option<Tmpfs>,
    clocks: Option<[Clock; 2]>,
}

impl Places {
    fn for_faults(faults: &[Fault], stage: &Stage, bytes: u64) -> Self {
        let any = |of: &[Fault]| of.iter().any(|fault| faults.contains(fault));
        Self {
            elsewhere: any(&[Fault::PartitionShort, Fault::PartitionLong]).then(Elsewhere::new),
            tmpfs: any(&[Fault::Full]).then(|| Tmpfs::mount(&stage.arrived(), bytes + 4 * MIB)),
            clocks: any(&[Fault::ClockJump]).then(|| {
                ["sender.clock", "receiver.clock"].map(|name| Clock::new(&stage.path(""), name))
            }),
        }
    }

    fn sender(&self, stage: &Stage, faults: &[Fault]) -> Daemon {
        let config = stage.common_config("sender");
        let mut command = memferry();
        if let Some(elsewhere) = &self.elsewhere {
            command = elsewhere.command(&command);
        }
        if faults.contains(&Fault::Memlock) {
            command = without_ipc_lock(&command);
        }
        if let Some([clock, _]) = &self.clocks {
            clock.give(&mut command);
        }
        Daemon::start_by(command, stage, "sender", "sender", &config, None)
    }

    fn receiver(&self, stage: &Stage) -> Daemon {
        let config = format!(
            "{}[receive]\nlisten = [\"tcp:127.0.0.1:0\"]\ndirectory = {:?}\n",
            stage.common_config("receiver"),
            stage.arrived()
        );
        let mut command = memferry();
        if let Some([_, clock]) = &self.clocks {
            clock.give(&mut command);
        }
        Daemon::start_by(command, stage, "receiver", "receiver", &config, None)
    }
}

fn is_final(status: &str) -> bool {
    ["completed", "failed", "cancelled"].contains(&status)
}

impl Scene {
    pub(crate) fn new(setup: Setup) -> Self {
        let stage = Stage::new();
        let faults = &setup.faults;
        let places = Places::for_faults(faults, &stage, setup.bytes);
        let mut receiver = places.receiver(&stage);
        let mut sender = places.sender(&stage, faults);
        let source = stage.path("source");
        let (size, rate) = (setup.bytes, "8MiB/s");
        // Its writer must not touch what may be cut off.
        let working_set = MIB.min(size / 2 / PAGE * PAGE);
        let writer = match setup.tracking {
            Tracking::None => {
                dense(&source, size, 1);
                None
            }
            Tracking::Scan => Some(Writer::start(&source, size, rate, working_set)),
            Tracking::Pagemap => {
                let socket = sender.socket().to_owned();
                Some(Writer::register(&source, size, rate, working_set, &socket))
            }
        };
        if setup.tracking != Tracking::Pagemap {
            add(&mut sender, &source, writer.as_ref());
        }
        let pids = [sender.pid(), receiver.pid()];
        let relay = Relay::start(&receiver.uri());
        // So that an Iteration never is too short for its writer to write.
        let late = Act::Late(Duration::from_millis(20));
        relay.damage(late, u64::MAX, |frame| {
            matches!(frame.kind, Kind::Mark { .. })
        });
        Self {
            client: None,
            relay,
            before: pids.map(Footprint::of),
            cpu_before: pids.map(cpu),
            sender,
            receiver,
            writer,
            places,
            setup,
            source,
            restarted: [false; 2],
            writer_killed: false,
            shrunk: false,
            indeterminate: false,
            clock_jumped: false,
            measured: Measured::default(),
            stage,
        }
    }

    fn uri(&self) -> String {
        let host = self
            .places
            .elsewhere
            .as_ref()
            .map_or(Ipv4Addr::LOCALHOST, Elsewhere::our_address);
        self.relay.uri(IpAddr::V4(host))
    }

    /// Orders the transfer, and holds the frame that `wanted` accepts.
    pub(crate) fn begin(&mut self, wanted: impl FnMut(&Frame) -> bool + Send + 'static) {
        self.relay.hold_next(wanted);
        let mut order = self.setup.parameters.clone();
        order["packet-size"] = json!(PACKET_BYTES.to_string());
        order["stall-timeout"] = json!(format!("{}ms", STALL.as_millis()));
        order["recover-timeout"] = json!(format!("{}ms", 2 * STALL.as_millis()));
        if !self.setup.faults.contains(&Fault::KillClient) {
            order["uri"] = json!(self.uri());
            order["id"] = json!(ID);
            order["regions"] = json!([ID]);
            self.sender.call("migrate", order);
            return;
        }
        let mut client = memferry();
        client.arg("--socket").arg(self.sender.socket());
        client.args(["migrate", &self.uri(), "--id", ID, "--region", ID]);
        client.args(["--progress", "none"]);
        for (key, value) in order.as_object().unwrap() {
            let value = value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned);
            client.arg("--set").arg(format!("{key}={value}"));
        }
        let client = client.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        self.client = Some(client.unwrap());
    }

    /// The held frame; `None` if the transfer ended without it.
    pub(crate) fn wait_held(&mut self) -> Option<Frame> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let soon = Instant::now() + Duration::from_millis(100);
            if let Some(frame) = self.relay.wait_held(soon) {
                return Some(frame);
            }
            assert!(Instant::now() < deadline, "nothing moves");
            match self.status() {
                Some(status) if is_final(&status) => return None,
                // A sender that was started again knows only what is undecided.
                None if self.restarted[0] => return None,
                _ => {}
            }
        }
    }

    /// Holds the next frame that `wanted` accepts.
    pub(crate) fn hold_next(&self, wanted: impl FnMut(&Frame) -> bool + Send + 'static) {
        self.relay.hold_next(wanted);
    }

    /// Where the transfer is; `None` while nobody has ordered it.
    pub(crate) fn status(&mut self) -> Option<String> {
        let seen = self.sender.control();
        let seen = seen.execute("query-migrate", json!({"id": ID})).ok()?;
        Some(seen["status"].as_str().unwrap().to_owned())
    }

    pub(crate) fn writer_stands_still(&self) -> bool {
        self.writer.as_ref().is_some_and(Writer::is_stopped)
    }

    /// Breaks something while `frame` is held, or after the end; lets it go on, and repairs.
    pub(crate) fn strike(&mut self, fault: Fault, frame: Option<&Frame>) {
        let struck = Instant::now();
        let stream = frame.and_then(|frame| frame.stream).unwrap_or(0);
        let mut act = Act::Pass;
        match fault {
            Fault::Kill(Process::Sender) => {
                self.sender.kill();
                self.relay.release(act);
                self.bury_sender(struck);
            }
            Fault::Kill(Process::Receiver) => {
                self.receiver.kill();
                self.relay.release(act);
                self.noticed();
                self.measured.dead_noticed = Some(within(struck, DEAD_NOTICED));
                self.restarted[1] = true;
                self.receiver = self.places.receiver(&self.stage);
                self.relay.retarget(&self.receiver.uri());
            }
            Fault::Kill(Process::Writer) => {
                self.signal_writer(Signal::SIGKILL);
                self.writer_killed = true;
            }
            Fault::Stop(process) => {
                self.signal(process, Signal::SIGSTOP);
                self.relay.release(act);
                thread::sleep(SHORT);
                // A writer that was stopped by somebody else is left as it is: see ContinueWriter.
                if process != Process::Writer {
                    self.signal(process, Signal::SIGCONT);
                }
            }
            Fault::Hang(process) => {
                self.signal(process, Signal::SIGSTOP);
                self.relay.release(act);
                match process {
                    Process::Sender => {
                        self.watch_stall(&[1]);
                        self.receiver_noticed();
                    }
                    _ => {
                        self.watch_stall(&[0]);
                        self.noticed();
                    }
                }
                self.measured.hang_noticed = Some(within(struck, STALL + STALL / 8));
                self.signal(process, Signal::SIGCONT);
            }
            Fault::ContinueWriter => self.signal_writer(Signal::SIGCONT),
            Fault::ResetStream => self.relay.reset(Which::Stream(stream)),
            Fault::ResetStreams => self.relay.reset(Which::Streams),
            Fault::ResetConversation => self.relay.reset(Which::Conversation),
            Fault::ResetAll => self.relay.reset(Which::All),
            Fault::Truncate => act = Act::Cut,
            Fault::Delay => act = Act::Late(SHORT),
            Fault::Duplicate => act = Act::Twice,
            Fault::FlipFrame => act = Act::FlipHead,
            Fault::FlipPayload => act = Act::FlipPayload,
            Fault::FlipMany => self.flip_payloads(FLIPS),
            Fault::FlipAlways => self.flip_payloads(u64::MAX),
            Fault::PauseShort => self.pause(Silence::Everything, SHORT),
            Fault::PauseLong => self.pause_until_noticed(struck, Silence::Everything),
            Fault::Deaf => self.pause_until_noticed(struck, Silence::TowardsReceiver),
            Fault::PartitionShort => {
                self.elsewhere().cut();
                self.relay.release(act);
                thread::sleep(SHORT);
                self.elsewhere().heal();
            }
            Fault::PartitionLong => {
                self.elsewhere().cut();
                let struck = Instant::now();
                self.relay.release(act);
                self.watch_stall(&[0, 1]);
                self.noticed();
                self.measured.hang_noticed = Some(within(struck, STALL + STALL / 8));
                self.elsewhere().heal();
            }
            Fault::Memlock => withdraw_memlock(self.sender.pid(), 64 << 10),
            Fault::Full => fill(&self.stage.arrived().join("filler")),
            Fault::ShrinkSource => {
                let file = File::options().write(true).open(&self.source).unwrap();
                file.set_len(self.setup.bytes / 2).unwrap();
                self.shrunk = true;
            }
            Fault::ClockJump => {
                let clocks = self
                    .places
                    .clocks
                    .as_ref()
                    .expect("they have clocks of their own");
                for (clock, seconds) in clocks.iter().zip([JUMP, -JUMP]) {
                    clock.jump(seconds);
                }
                if frame.is_some() {
                    // What it announces next says when it believes that to be.
                    self.relay.release(act);
                    let deadline = Instant::now() + DEADLINE;
                    while !self.clock_jumped {
                        assert!(Instant::now() < deadline, "its clock did not jump");
                        self.hear(DEADLINE);
                    }
                }
            }
            Fault::KillClient => {
                if let Some(mut client) = self.client.take() {
                    // After the end it has ended by itself.
                    let _ = client.kill();
                    client.wait().unwrap();
                }
            }
        }
        self.relay.release(act);
    }

    fn elsewhere(&self) -> &Elsewhere {
        let elsewhere = self.places.elsewhere.as_ref();
        elsewhere.expect("the sender is elsewhere")
    }

    fn signal(&self, process: Process, signal: Signal) {
        match process {
            Process::Sender => self.sender.signal(signal),
            Process::Receiver => self.receiver.signal(signal),
            Process::Writer => self.signal_writer(signal),
        }
    }

    fn signal_writer(&self, signal: Signal) {
        let writer = self.writer.as_ref().expect("the Region is live");
        kill(Pid::from_raw(writer.pid()), signal).unwrap();
    }

    fn flip_payloads(&self, count: u64) {
        let has_payload = |frame: &Frame| frame.payload > 0;
        self.relay.damage(Act::FlipPayload, count, has_payload);
    }

    fn pause(&self, silence: Silence, time: Duration) {
        self.relay.silence(silence);
        self.relay.release(Act::Pass);
        thread::sleep(time);
        self.relay.silence(Silence::Nothing);
    }

    fn pause_until_noticed(&mut self, struck: Instant, silence: Silence) {
        self.relay.silence(silence);
        self.relay.release(Act::Pass);
        self.watch_stall(&[0, 1]);
        self.noticed();
        self.measured.hang_noticed = Some(within(struck, STALL + STALL / 8));
        self.relay.silence(Silence::Nothing);
    }

    /// What a stall costs the daemons (0 the sender, 1 the receiver). Asks them nothing meanwhile.
    fn watch_stall(&mut self, daemons: &[usize]) {
        if !daemons.contains(&0) || self.status().is_some_and(|status| is_final(&status)) {
            // The sender does not answer, or there is nothing that could stall.
            if !daemons.contains(&1) {
                return;
            }
        }
        let pids = [self.sender.pid(), self.receiver.pid()];
        thread::sleep(STALL_WINDOW.0);
        let before: Vec<_> = daemons.iter().map(|&daemon| cpu(pids[daemon])).collect();
        let started = Instant::now();
        thread::sleep(STALL_WINDOW.1);
        let time = started.elapsed();
        for (&daemon, before) in daemons.iter().zip(before) {
            let took = cpu(pids[daemon]).saturating_sub(before);
            let share = took.as_secs_f64() / time.as_secs_f64();
            assert!(
                share <= STALL_CPU_MAX,
                "{} took {:.1} % of a CPU while nothing moved",
                ["the sender", "the receiver"][daemon],
                share * 100.0
            );
            let most = self.measured.stall_cpu.get_or_insert(0.0);
            *most = most.max(share);
        }
    }

    /// Waits until the sender knows that something is wrong, or is done.
    fn noticed(&mut self) {
        self.watch(|status| {
            is_final(status) || ["paused", "recover", "indeterminate"].contains(&status)
        });
    }

    /// Waits for a state of the transfer; asks only when the sender announces something.
    fn watch(&mut self, wanted: impl Fn(&str) -> bool) -> Value {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let seen = self.sender.call("query-migrate", json!({"id": ID}));
            let status = seen["status"].as_str().unwrap();
            self.indeterminate |= status == "indeterminate";
            if wanted(status) {
                // What it announced before may still be unread.
                while self.hear(Duration::ZERO) {}
                return seen;
            }
            assert!(Instant::now() < deadline, "{seen:#}");
            self.hear(Duration::from_secs(5));
        }
    }

    /// Takes in the sender's next event; `false`: there was none.
    fn hear(&mut self, timeout: Duration) -> bool {
        let event = self.sender.control().next_event(timeout).unwrap();
        if let Some(event) = &event {
            self.indeterminate |= event.data["status"] == "indeterminate";
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            self.clock_jumped |= event.at > now + GRACE;
        }
        event.is_some()
    }

    /// Waits until the receiver has ended the attempt, or has paused it.
    fn receiver_noticed(&mut self) -> String {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let seen = self
                .receiver
                .control()
                .execute("query-migrate", json!({"id": ID}));
            // A receiver that was started again knows nothing of it.
            let Ok(seen) = seen else {
                return "unknown".to_owned();
            };
            let status = seen["status"].as_str().unwrap();
            if !["setup", "active", "completing"].contains(&status) {
                return status.to_owned();
            }
            assert!(Instant::now() < deadline, "{seen:#}");
            self.receiver
                .control()
                .next_event(Duration::from_millis(20))
                .unwrap();
        }
    }

    /// After the sender's death: the writer goes on unless somebody else may own the memory, the receiver
    /// notices, and a new sender takes up what is undecided.
    fn bury_sender(&mut self, struck: Instant) {
        let undecided = records(&self.stage) > 0;
        let moved = self.is_visible();
        if let Some(writer) = self.writer.as_ref().filter(|_| !undecided && !moved) {
            writer.assert_runs();
            self.measured.thawed = Some(within(struck, Duration::from_secs(1)));
        }
        self.receiver_noticed();
        self.measured.dead_noticed = Some(within(struck, DEAD_NOTICED));
        assert_eq!(
            self.writer_stands_still(),
            self.writer.is_some() && (undecided || moved)
        );
        self.restarted[0] = true;
        // A new sender may have its answer before anybody can ask it.
        self.indeterminate |= undecided;
        self.sender = self.places.sender(&self.stage, &self.setup.faults);
    }

    fn is_visible(&self) -> bool {
        self.destination().exists()
    }

    fn destination(&self) -> PathBuf {
        self.stage.arrived().join(ID)
    }

    /// The end of the transfer, and everything that must hold then, whatever it is.
    pub(crate) fn conclude(&mut self) -> Outcome {
        self.relay.hold_none();
        let known = self.status().is_some();
        let outcome = if !known {
            // A sender that was started again and has nothing to decide.
            if self.is_visible() {
                Outcome::Identical
            } else {
                Outcome::Failed
            }
        } else {
            let seen = self.watch(is_final);
            self.measured.torn = seen["ram"]["torn"].as_u64().unwrap_or(0);
            match (seen["status"].as_str().unwrap(), self.indeterminate) {
                ("completed", false) => Outcome::Identical,
                ("completed", true) => Outcome::ResolvedDestination,
                ("failed", false) => {
                    let code = seen["error"]["x-code"].as_str().expect("it says why");
                    self.measured.code = Some(code.to_owned());
                    Outcome::Failed
                }
                ("failed", true) => {
                    assert_eq!(seen["error"]["x-code"], "not-owner", "{seen:#}");
                    Outcome::ResolvedSource
                }
                (other, _) => panic!("it ended as {other}: {seen:#}"),
            }
        };
        match outcome {
            Outcome::Identical | Outcome::ResolvedDestination => self.check_arrived(),
            Outcome::Failed | Outcome::ResolvedSource => self.check_stayed(),
        }
        self.check_daemons();
        outcome
    }

    /// The destination owns it: all of it is there, and its writer never goes on.
    fn check_arrived(&self) {
        if let Some(writer) = self.writer.as_ref().filter(|_| !self.writer_killed) {
            assert!(writer.is_stopped(), "two owners: the writer runs");
        }
        let source = fs::read(&self.source).unwrap();
        let mut arrived = fs::read(self.destination()).unwrap();
        assert_eq!(arrived.len() as u64, self.setup.bytes);
        // What was cut off at the source after it was sent is at the destination only.
        arrived.truncate(source.len());
        assert_same(&source, &arrived);
        if self.setup.tracking == Tracking::None {
            assert_same(&source, &noise(self.setup.bytes, 1)[..source.len()]);
        }
    }

    /// The source owns it: nothing is at the destination, the writer runs, and all of it can be moved again.
    fn check_stayed(&mut self) {
        assert!(!self.is_visible(), "two owners: it is at the destination");
        if let Some(writer) = self.writer.as_ref().filter(|_| !self.writer_killed) {
            writer.assert_runs();
        }
        self.receiver_noticed();
        self.wait_empty();
        if self.restarted[0] || self.writer_killed || self.shrunk {
            // A sender that was started again has forgotten it.
            let _ = self
                .sender
                .control()
                .execute("region-del", json!({"name": ID}));
            let writer = self.writer.as_ref().filter(|_| !self.writer_killed);
            add(&mut self.sender, &self.source, writer);
        }
        self.relay.heal();
        self.setup.bytes = fs::metadata(&self.source).unwrap().len();
        let order = json!({"uri": self.uri(), "id": AGAIN, "regions": [ID]});
        self.sender.call("migrate", order);
        self.sender.wait(AGAIN, "completed");
        self.check_arrived();
    }

    /// Waits until nothing of the attempt is left at the destination, hidden files and their memory neither.
    fn wait_empty(&self) {
        let directory = self.stage.arrived();
        let _ = fs::remove_file(directory.join("filler"));
        let deadline = Instant::now() + DEADLINE;
        loop {
            let left = listing(&directory);
            let room = statvfs(&directory).unwrap();
            // Of a file system of our own all must be free again. A child that somebody here is just starting has
            // copies of our descriptors for a moment, and holds what was removed.
            let is_free = self.places.tmpfs.is_none() || room.blocks_free() == room.blocks();
            if left.is_empty() && is_free {
                return;
            }
            assert!(Instant::now() < deadline, "left behind: {left:?}, {room:?}");
            thread::yield_now();
        }
    }

    /// The daemons serve, hold no more than before, took no more CPU time than their work is worth, and end in
    /// order when they are told to.
    fn check_daemons(&mut self) {
        for daemon in [0, 1] {
            let name = ["sender", "receiver"][daemon];
            let it = match daemon {
                0 => &mut self.sender,
                _ => &mut self.receiver,
            };
            it.assert_alive();
            let pid = it.pid();
            if !self.restarted[daemon] {
                let deadline = Instant::now() + DEADLINE;
                loop {
                    let now = Footprint::of(pid);
                    if now.is_within(&self.before[daemon]) {
                        break;
                    }
                    assert!(
                        Instant::now() < deadline,
                        "the {name} leaks: {:?}, now {now:?}",
                        self.before[daemon]
                    );
                    thread::sleep(Duration::from_millis(20));
                }
                let took = cpu(pid).saturating_sub(self.cpu_before[daemon]);
                assert!(took <= CPU_MAX, "the {name} took {took:?} of CPU time");
            }
            it.call("quit", Value::Null);
            it.wait_end();
            assert!(!it.log().contains("panicked"), "the {name} panicked");
        }
        if let Some(writer) = self.writer.as_ref().filter(|_| !self.writer_killed) {
            let state = kill(Pid::from_raw(writer.pid()), None);
            assert_eq!(state, Ok(()), "the writer is dead");
        }
    }
}

fn add(sender: &mut Daemon, source: &Path, writer: Option<&Writer>) {
    let mut region = json!({"name": ID, "path": source});
    if let Some(writer) = writer {
        region["tracker"] = json!("scan");
        region["freeze"] = json!({"kind": "pid", "pid": writer.pid()});
    }
    sender.call("region-add", region);
}

/// Records of a commit that is not decided.
fn records(stage: &Stage) -> usize {
    let names = listing(&stage.path("sender.run"));
    names.iter().filter(|name| name.ends_with(".json")).count()
}

/// The time since `struck`, which must not be above `most` by more than a busy machine explains.
fn within(struck: Instant, most: Duration) -> Duration {
    let took = struck.elapsed();
    assert!(took <= most + GRACE, "noticed after {took:?}, not {most:?}");
    took
}

/// Takes all the room there is.
fn fill(path: &Path) {
    let mut file = File::create(path).unwrap();
    let zeros = [0; 4096];
    while file.write_all(&zeros).is_ok() {}
}

/// Compares without reading aloud what differs.
fn assert_same(source: &[u8], arrived: &[u8]) {
    assert_eq!(source.len(), arrived.len(), "lengths differ");
    let pages = source.chunks(4096).zip(arrived.chunks(4096)).enumerate();
    let differ: Vec<_> = pages.filter(|(_, (a, b))| a != b).collect();
    let numbers: Vec<_> = differ.iter().map(|(page, _)| page).collect();
    assert!(differ.is_empty(), "pages that differ: {numbers:?}");
}
