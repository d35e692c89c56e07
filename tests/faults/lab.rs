//! A place to break things in: network and mount namespaces of our own, so that nothing that is done to an
//! interface or a mount is seen by anybody else, and all of it goes with the processes.

use std::env;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};

use memferry::sys::process::die_with_parent;

const INSIDE: &str = "MEMFERRY_FAULTS_LAB";

/// Whether this process is in namespaces of its own.
pub(crate) fn is_inside() -> bool {
    env::var_os(INSIDE).is_some()
}

/// Runs this program again in namespaces of its own; returns where that cannot be.
pub(crate) fn enter() {
    if is_inside() {
        run("ip", &["link", "set", "lo", "up"]);
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let error = Command::new("unshare")
        .args(["--net", "--mount", "--"])
        .arg(env::current_exe().unwrap())
        .args(env::args_os().skip(1))
        .env(INSIDE, "1")
        .exec();
    panic!("cannot run unshare (package util-linux): {error}");
}

/// Runs a tool that must succeed.
fn run(program: &str, arguments: &[&str]) {
    let ended = Command::new(program).args(arguments).output();
    let ended = ended.unwrap_or_else(|error| panic!("cannot run {program}: {error}"));
    let problem = String::from_utf8_lossy(&ended.stderr);
    assert!(
        ended.status.success(),
        "{program} {arguments:?}: {}",
        problem.trim()
    );
}

/// Lowers the limit on locked memory of a process that runs.
pub(crate) fn withdraw_memlock(pid: i32, bytes: u64) {
    run(
        "prlimit",
        &[
            "--pid",
            &pid.to_string(),
            &format!("--memlock={bytes}:{bytes}"),
        ],
    );
}

/// `program` without the capability that lifts the limit on locked memory.
pub(crate) fn without_ipc_lock(program: &Command) -> Command {
    become_of("setpriv", &["--bounding-set", "-ipc_lock"], program)
}

/// A command that becomes `program` in the end, with the same process id.
fn become_of(wrapper: &str, arguments: &[&str], program: &Command) -> Command {
    let mut command = Command::new(wrapper);
    command
        .args(arguments)
        .arg(program.get_program())
        .args(program.get_args())
        .stdin(Stdio::null());
    die_with_parent(&mut command);
    command
}

/// A time of day of its own, for one process.
pub(crate) struct Clock {
    library: PathBuf,
    offset: PathBuf,
}

impl Clock {
    /// `name`: where in `directory` its files are.
    pub(crate) fn new(directory: &Path, name: &str) -> Self {
        let clock = Self {
            library: directory.join(format!("{name}.so")),
            offset: directory.join(name),
        };
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/faults/clock.c");
        let library = clock.library.to_str().unwrap();
        run("cc", &["-shared", "-fPIC", "-O1", "-o", library, source]);
        clock.jump(0);
        clock
    }

    /// From now on it is so many seconds later than it is.
    pub(crate) fn jump(&self, seconds: i64) {
        // One write of one word into a file that stays the same: a reader sees the old time or the new one.
        let mut options = File::options();
        options.create(true).write(true).truncate(false);
        let file = options.open(&self.offset).unwrap();
        file.write_all_at(&seconds.to_ne_bytes(), 0).unwrap();
    }

    /// Has `command` live by it.
    pub(crate) fn give(&self, command: &mut Command) {
        command.env("LD_PRELOAD", &self.library);
        command.env("MEMFERRY_CLOCK", &self.offset);
    }
}

/// A small tmpfs over a directory.
pub(crate) struct Tmpfs(PathBuf);

impl Tmpfs {
    pub(crate) fn mount(at: &Path, bytes: u64) -> Self {
        std::fs::create_dir(at).unwrap();
        let size = format!("size={bytes}");
        let path = at.to_str().unwrap();
        run("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", path]);
        Self(at.to_owned())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // What still has it open keeps it until its own end.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// Hardware addresses of our end of the line and of theirs.
const HARDWARE: [&str; 2] = ["02:00:00:00:00:01", "02:00:00:00:00:02"];
const NOBODY: &str = "02:00:00:00:00:99";

/// Another network namespace, connected to ours by a pair of virtual interfaces.
pub(crate) struct Elsewhere {
    /// Its only process.
    keeper: Child,
    number: u16,
}

impl Elsewhere {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicU16 = AtomicU16::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", "echo ready; exec sleep infinity"]);
        command.stdout(Stdio::piped());
        die_with_parent(&mut command);
        let mut keeper = command.spawn().unwrap();
        let mut line = String::new();
        let stdout = keeper.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let elsewhere = Self { keeper, number };
        let (near, far) = elsewhere.interfaces();
        let pid = elsewhere.keeper.id().to_string();
        run(
            "ip",
            &[
                "link",
                "add",
                &near,
                "address",
                HARDWARE[0],
                "type",
                "veth",
                "peer",
                "name",
                &far,
                "address",
                HARDWARE[1],
                "netns",
                &pid,
            ],
        );
        let at = |last| format!("{}/24", elsewhere.address(last));
        run("ip", &["addr", "add", &at(1), "dev", &near]);
        run("ip", &["link", "set", &near, "up"]);
        elsewhere.ip(&["addr", "add", &at(2), "dev", &far]);
        elsewhere.ip(&["link", "set", &far, "up"]);
        elsewhere.ip(&["link", "set", "lo", "up"]);
        elsewhere.heal();
        elsewhere
    }

    fn interfaces(&self) -> (String, String) {
        (format!("mfn{}", self.number), format!("mff{}", self.number))
    }

    fn address(&self, last: u8) -> Ipv4Addr {
        let [high, low] = self.number.to_be_bytes();
        Ipv4Addr::new(10, high, low, last)
    }

    /// Our address, as it is seen from there.
    pub(crate) fn our_address(&self) -> Ipv4Addr {
        self.address(1)
    }

    fn entered(&self) -> [String; 3] {
        [
            "--target".into(),
            self.keeper.id().to_string(),
            "--net".into(),
        ]
    }

    /// Runs a tool in there.
    fn inside(&self, program: &str, arguments: &[&str]) {
        let entered = self.entered();
        let mut all: Vec<&str> = entered.iter().map(String::as_str).collect();
        all.push(program);
        all.extend(arguments);
        run("nsenter", &all);
    }

    fn ip(&self, arguments: &[&str]) {
        self.inside("ip", arguments);
    }

    /// `program` in there.
    pub(crate) fn command(&self, program: &Command) -> Command {
        let inside = self.entered();
        let inside: Vec<&str> = inside.iter().map(String::as_str).collect();
        become_of("nsenter", &inside, program)
    }

    /// From now on no packet arrives, in either direction, and nobody is told: frames go to a hardware
    /// address that nobody has.
    pub(crate) fn cut(&self) {
        self.lead([NOBODY; 2]);
    }

    /// From now on no packet arrives, in either direction, and nobody is told: a firewall there drops all.
    pub(crate) fn drop_packets(&self) {
        let chain = |hook: &str| {
            format!(
                "add chain ip cut {hook} {{ type filter hook {hook} priority 0; policy drop; }}"
            )
        };
        let rules = format!("add table ip cut; {}; {}", chain("input"), chain("output"));
        self.inside("nft", &[&rules]);
    }

    /// The firewall lets packets through again.
    pub(crate) fn pass_packets(&self) {
        self.inside("nft", &["delete table ip cut"]);
    }

    /// Packets arrive again. Nobody has to find out whose address is where, which takes a second or fails.
    pub(crate) fn heal(&self) {
        self.lead(HARDWARE);
    }

    /// Where frames to us and to them go.
    fn lead(&self, [us, them]: [&str; 2]) {
        let (near, far) = self.interfaces();
        let (ours, theirs) = (self.address(1).to_string(), self.address(2).to_string());
        let entry = ["neigh", "replace"];
        let permanent = ["nud", "permanent"];
        let to_us = [&ours, "lladdr", us, "dev", &far];
        let to_them = [&theirs, "lladdr", them, "dev", &near];
        self.ip(&[&entry[..], &to_us, &permanent].concat());
        run("ip", &[&entry[..], &to_them, &permanent].concat());
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        // The namespace and both interfaces go with the last process in it.
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}
