//! One transfer between real daemons over a relay. What is done to it, when that is noticed, and what must hold
//! afterwards are the files beside this one.

mod conclude;
mod notice;
mod places;
mod strike;
mod writer;

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use super::common::memory::dense;
use super::common::relay::{Act, Frame, Kind, Relay};
use super::common::{DEADLINE, Daemon, Stage, memferry};
use super::lab::Elsewhere;
use super::matrix::{Fault, PACKET_BYTES, Tracking};
use super::observe::{Footprint, cpu};

use places::Places;
use writer::Live;

/// The transfers' stall timeout: what a hang may take to be noticed.
pub(crate) const STALL: Duration = Duration::from_secs(2);

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
    /// How long the kernel took to end a connection of a killed process.
    pub(crate) dead_ended: Option<Duration>,
    /// How long it took from there until the other side knew.
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
    writer: Option<Live>,
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
    /// What the sender and the receiver have announced, and when.
    announced: [Vec<(String, SystemTime)>; 2],
    /// The sender was seen to live at another time.
    clock_jumped: bool,
    pub(crate) measured: Measured,
    stage: Stage,
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
        if setup.tracking == Tracking::None {
            dense(&source, setup.bytes, 1);
        }
        let writer = Live::start(setup.tracking, &source, setup.bytes, &sender, &stage);
        if matches!(setup.tracking, Tracking::None | Tracking::Scan) {
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
            announced: Default::default(),
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
        // Of one that stops itself it is the sign that it hangs.
        order["freeze-timeout"] = json!(format!("{}ms", STALL.as_millis()));
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
        self.living_writer().is_some_and(Live::stands_still)
    }

    /// The writer, unless we have killed it.
    fn living_writer(&self) -> Option<&Live> {
        self.writer.as_ref().filter(|_| !self.writer_killed)
    }

    fn is_visible(&self) -> bool {
        self.destination().exists()
    }

    fn destination(&self) -> PathBuf {
        self.stage.arrived().join(ID)
    }
}

fn add(sender: &mut Daemon, source: &Path, writer: Option<&Live>) {
    let mut region = json!({"name": ID, "path": source});
    if let Some(writer) = writer {
        region["tracker"] = json!("scan");
        region["freeze"] = json!({"kind": "pid", "pid": writer.pid()});
    }
    sender.call("region-add", region);
}
