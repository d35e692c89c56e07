//! Real daemons for tests: processes of the built binary in a directory of their own.
//!
//! Nothing here sleeps to let something happen. A daemon says that it is ready through
//! `NOTIFY_SOCKET`, states and events come over the control socket, and every wait has a deadline.
//! Processes end with the value that holds them, and at the latest with the thread of their test.
#![allow(dead_code, reason = "each test file uses its own part of this")]
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "helpers of tests end a test by a panic and tell what they saw"
)]

pub(crate) mod fake;
pub(crate) mod memory;
pub(crate) mod mount;
pub(crate) mod random;
pub(crate) mod relay;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use memferry::client::{ClientError, Connection};
use memferry::sys::process::die_with_parent;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Far longer than anything here takes on a busy machine; who waits that long has found a hang.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Pause between two looks at a state, unless an event comes first.
const LOOK: Duration = Duration::from_millis(20);

/// The binary under test.
pub(crate) fn memferry() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_memferry"));
    command.stdin(Stdio::null());
    die_with_parent(&mut command);
    command
}

/// The directory a test happens in, on memory. Removed at the end.
pub(crate) struct Stage(TempDir);

impl Stage {
    pub(crate) fn new() -> Self {
        let mut builder = tempfile::Builder::new();
        Self(builder.prefix("mf-").tempdir_in("/dev/shm").unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Where committed Regions appear.
    pub(crate) fn arrived(&self) -> PathBuf {
        self.path("arrived")
    }

    /// Writes a configuration file, and gives its path.
    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        fs::write(self.path(name), text).unwrap();
        self.path(name)
    }

    /// What every configuration of `who` begins with.
    pub(crate) fn common_config(&self, who: &str) -> String {
        let path = |suffix: &str| self.path(&format!("{who}.{suffix}"));
        format!(
            "[control]\nsocket = {:?}\n[state]\ndirectory = {:?}\nruntime-directory = {:?}\n",
            path("sock"),
            path("state"),
            path("run"),
        )
    }

    /// A sender; `tables` are added to its configuration.
    pub(crate) fn sender_with(&self, tables: &str) -> Daemon {
        let config = format!("{}{tables}", self.common_config("sender"));
        Daemon::start(self, "sender", "sender", &config, None)
    }

    pub(crate) fn sender(&self) -> Daemon {
        self.sender_with("")
    }

    /// A receiver; `keys` are added to `[receive]`.
    pub(crate) fn receiver_with(&self, listen: &str, keys: &str) -> Daemon {
        let config = format!(
            "{}[receive]\nlisten = [{listen:?}]\n{keys}\n",
            self.common_config("receiver")
        );
        let directory = format!("directory = {:?}", self.arrived());
        let config = if keys.contains("directory") {
            config
        } else {
            config + &directory
        };
        Daemon::start(self, "receiver", "receiver", &config, None)
    }

    pub(crate) fn receiver(&self) -> Daemon {
        self.receiver_with("tcp:127.0.0.1:0", "")
    }

    /// A unix socket for the peer protocol, whose address survives a restart of its receiver.
    pub(crate) fn peer_uri(&self) -> String {
        format!("unix:{}", self.path("peer.sock").display())
    }
}

/// A daemon that serves, and a connection to its control socket.
pub(crate) struct Daemon {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
    control: Connection,
}

impl Daemon {
    /// Starts `memferry ROLE` with the files of `who`, and returns once it says that it is ready. `user`:
    /// as this user.
    pub(crate) fn start(
        stage: &Stage,
        role: &str,
        who: &str,
        config: &str,
        user: Option<u32>,
    ) -> Self {
        Self::start_by(memferry(), stage, role, who, config, user)
    }

    /// The same, where `command` is the binary, or something that becomes it.
    pub(crate) fn start_by(
        mut command: Command,
        stage: &Stage,
        role: &str,
        who: &str,
        config: &str,
        user: Option<u32>,
    ) -> Self {
        let config = stage.write(&format!("{who}.toml"), config);
        let log = stage.path(&format!("{who}.log"));
        let ready = stage.path(&format!("{who}.ready"));
        let _ = fs::remove_file(&ready);
        let notified = UnixDatagram::bind(&ready).unwrap();
        if let Some(user) = user {
            std::os::unix::fs::chown(&ready, Some(user), None).unwrap();
            command.uid(user);
        }
        command
            .arg(role)
            .arg("--config")
            .arg(config)
            .env("NOTIFY_SOCKET", &ready)
            .stdout(Stdio::null())
            .stderr(
                File::options()
                    .create(true)
                    .append(true)
                    .open(&log)
                    .unwrap(),
            );
        let mut child = command.spawn().unwrap();
        wait_until_ready(&mut child, &notified, &log);
        let socket = stage.path(&format!("{who}.sock"));
        let control = Connection::connect(&socket).unwrap();
        Self {
            child,
            socket,
            log,
            control,
        }
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn control(&mut self) -> &mut Connection {
        &mut self.control
    }

    /// Executes a command that must succeed.
    pub(crate) fn call(&mut self, command: &str, arguments: Value) -> Value {
        let shown = arguments.to_string();
        match self.control.execute(command, arguments) {
            Ok(answer) => answer,
            Err(error) => panic!("{command} {shown}: {error}"),
        }
    }

    /// Begins the transfer `r` of all Regions: with one Iteration before the freeze, whatever the rates are, so
    /// that the second one is the last; and with so much patience that nothing ends a wait by itself. `more` are
    /// parameters.
    pub(crate) fn begin_patiently(&mut self, uri: &str, more: Value) {
        let mut order = json!({"uri": uri, "id": "r", "stall-timeout": "1h", "max-iterations": 1});
        let Value::Object(more) = more else {
            panic!("parameters are an object")
        };
        order.as_object_mut().unwrap().extend(more);
        self.call("migrate", order);
    }

    /// Executes a command that must be refused; gives code and text.
    pub(crate) fn refusal(&mut self, command: &str, arguments: Value) -> (String, String) {
        match self.control.execute(command, arguments) {
            Err(ClientError::Command { code, desc, .. }) => (code, desc),
            other => panic!("{command} was to be refused: {other:?}"),
        }
    }

    /// Where a receiver listens first.
    pub(crate) fn uri(&mut self) -> String {
        let status = self.call("query-status", Value::Null);
        status["listen"][0].as_str().unwrap().to_owned()
    }

    pub(crate) fn assert_alive(&mut self) {
        assert_eq!(self.call("query-status", Value::Null)["running"], true);
    }

    /// Waits until `query-migrate` of `id` looks as wanted.
    pub(crate) fn wait_until(&mut self, id: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let seen = self.call("query-migrate", json!({"id": id}));
            if wanted(&seen) {
                return seen;
            }
            let status = seen["status"].as_str().unwrap_or_default();
            let ended = ["completed", "failed", "cancelled"].contains(&status);
            assert!(!ended && Instant::now() < deadline, "{seen:#}");
            self.control.next_event(LOOK).unwrap();
        }
    }

    /// Waits until the transfer `id` is in `status`.
    pub(crate) fn wait(&mut self, id: &str, status: &str) -> Value {
        self.wait_until(id, |seen| seen["status"] == status)
    }

    /// Waits until the transfer `id` has failed, and checks the code of its error.
    pub(crate) fn wait_failed(&mut self, id: &str, code: &str) -> Value {
        let seen = self.wait(id, "failed");
        assert_eq!(seen["error"]["x-code"], code, "{seen:#}");
        seen
    }

    /// Waits until a receiver, which learns of a transfer when it is offered, reports it ended so.
    pub(crate) fn wait_arrival(&mut self, id: &str, status: &str) -> Value {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let seen = self.control.execute("query-migrate", json!({"id": id}));
            if let Ok(seen) = seen
                && seen["status"] == status
            {
                return seen;
            }
            assert!(Instant::now() < deadline, "{}", self.log());
            self.control.next_event(LOOK).unwrap();
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits until it has ended by itself, as it was told to.
    pub(crate) fn wait_end(&mut self) {
        assert!(self.child.wait().unwrap().success());
    }

    /// A client verb, run as a process against this daemon.
    pub(crate) fn cli(&self, arguments: &[&str]) -> Output {
        let mut command = memferry();
        command.arg("--socket").arg(&self.socket).args(arguments);
        command.output().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.log.display(), self.log());
        }
    }
}

fn wait_until_ready(child: &mut Child, notified: &UnixDatagram, log: &Path) {
    notified
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    let deadline = Instant::now() + DEADLINE;
    let mut message = [0; 4096];
    loop {
        if let Ok(length) = notified.recv(&mut message) {
            let text = String::from_utf8_lossy(&message[..length]);
            if text.lines().any(|line| line == "READY=1") {
                return;
            }
        }
        let running = child.try_wait().unwrap().is_none() && Instant::now() < deadline;
        if !running {
            let _ = child.kill();
            panic!("not ready: {}", fs::read_to_string(log).unwrap_or_default());
        }
    }
}

/// A sender and a receiver that it can reach. Fields are dropped in this order.
pub(crate) struct Pair {
    pub(crate) sender: Daemon,
    pub(crate) receiver: Daemon,
    pub(crate) uri: String,
    pub(crate) stage: Stage,
}

impl Pair {
    pub(crate) fn new() -> Self {
        let stage = Stage::new();
        let receiver = stage.receiver();
        Self::of(stage, receiver)
    }

    pub(crate) fn of(stage: Stage, mut receiver: Daemon) -> Self {
        let sender = stage.sender();
        let uri = receiver.uri();
        Self {
            sender,
            receiver,
            uri,
            stage,
        }
    }

    /// Adds a Region that nobody writes.
    pub(crate) fn add(&mut self, name: &str, path: &Path) {
        self.sender
            .call("region-add", json!({"name": name, "path": path}));
    }

    /// Adds a Region that `writer` writes.
    pub(crate) fn add_live(&mut self, name: &str, writer: &Writer) {
        let freeze = json!({"kind": "pid", "pid": writer.pid()});
        let region =
            json!({"name": name, "path": writer.path, "tracker": "scan", "freeze": freeze});
        self.sender.call("region-add", region);
    }

    /// Starts a transfer of the Region `name`, which is also its id; `more` are parameters.
    pub(crate) fn begin(&mut self, name: &str, more: Value) {
        let mut order = json!({"uri": self.uri, "id": name, "regions": [name]});
        let Value::Object(more) = more else {
            panic!("parameters are an object")
        };
        order.as_object_mut().unwrap().extend(more);
        self.sender.call("migrate", order);
    }

    /// Moves the Region `name` to its completion.
    pub(crate) fn transfer(&mut self, name: &str, more: Value) -> Value {
        self.begin(name, more);
        self.sender.wait(name, "completed")
    }

    pub(crate) fn destination(&self, name: &str) -> PathBuf {
        self.stage.arrived().join(name)
    }

    /// What must hold after anything that went wrong: both daemons serve, and nothing is left behind.
    pub(crate) fn assert_nothing_happened(&mut self, before: &[String]) {
        self.sender.assert_alive();
        self.receiver.assert_alive();
        assert_eq!(listing(&self.stage.arrived()), before);
    }
}

/// Says that a test cannot be made here, where no harness keeps it back. Where everything has to be tested it fails.
pub(crate) fn skip(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "{why}");
    let test = std::thread::current();
    let test = test.name().unwrap_or_default();
    let told = format!("SKIPPED {test}: {why}\n");
    std::io::stderr().write_all(told.as_bytes()).unwrap();
}

/// Names in a directory, hidden ones too.
pub(crate) fn listing(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// A `memferry workload` whose memory is filled.
pub(crate) struct Writer {
    child: Child,
    pub(crate) path: PathBuf,
}

impl Writer {
    /// Writes at `rate` to the first `working_set` bytes of a new file of `size` bytes.
    pub(crate) fn start(path: &Path, size: u64, rate: &str, working_set: u64) -> Self {
        Self::with(path, size, rate, working_set, &[])
    }

    /// The same; the writer registers itself as Region `r` with the sender of this control socket.
    pub(crate) fn register(
        path: &Path,
        size: u64,
        rate: &str,
        working_set: u64,
        socket: &Path,
    ) -> Self {
        let more = ["--register", socket.to_str().unwrap(), "--name", "r"];
        Self::with(path, size, rate, working_set, &more)
    }

    /// The same, with `more` arguments.
    pub(crate) fn with(
        path: &Path,
        size: u64,
        rate: &str,
        working_set: u64,
        more: &[&str],
    ) -> Self {
        let mut command = memferry();
        command
            .args(["workload", "--dirty-rate", rate])
            .args(["--size", &size.to_string()])
            .args(["--working-set", &working_set.to_string()])
            .arg("--path")
            .arg(path)
            .args(more);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        assert!(line.contains("\"ready\""), "{line:?}");
        Self {
            child,
            path: path.to_owned(),
        }
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// The state letter in /proc.
    fn state(&self) -> char {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.state() == 'T'
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Stops it, and returns once it stands still.
    pub(crate) fn stop(&self) {
        self.signal(Signal::SIGSTOP);
        let deadline = Instant::now() + DEADLINE;
        while !self.is_stopped() {
            assert!(Instant::now() < deadline, "the writer does not stop");
            std::thread::yield_now();
        }
    }

    /// That it runs. What /proc says lags behind a signal a little, so this may look more than once.
    pub(crate) fn assert_runs(&self) {
        let deadline = Instant::now() + DEADLINE;
        while self.is_stopped() {
            assert!(Instant::now() < deadline, "the writer stands still");
            std::thread::yield_now();
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // SIGKILL also ends a stopped process.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Code and text of what a command printed and how it ended.
pub(crate) fn ended(output: &Output) -> (Option<i32>, String) {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

/// `Cpus_allowed_list` of every thread whose name begins so, as in proc_pid_status(5).
pub(crate) fn cpus_of_streams(pid: i32, threads: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let statuses =
        tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let streams = statuses.filter(|status| status.starts_with(&format!("Name:\t{threads}")));
    let cpus = |status: String| {
        let lines = status.lines();
        lines
            .filter_map(|line| line.strip_prefix("Cpus_allowed_list:\t"))
            .collect()
    };
    streams.map(cpus).collect()
}
