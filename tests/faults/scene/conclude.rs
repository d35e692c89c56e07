//! What must hold at the end of a scene.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::kill;
use nix::sys::statvfs::statvfs;
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::super::common::memory::noise;
use super::super::common::{DEADLINE, listing};
use super::super::matrix::{Outcome, Tracking};
use super::super::observe::{Footprint, cpu};
use super::{AGAIN, ID, Scene, add, is_final};

/// CPU time that a daemon may take for all a scene asks of it. Ten times what it takes; a loop that spins while
/// something hangs takes more.
const CPU_MAX: Duration = Duration::from_secs(2);

impl Scene {
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
        if let Some(writer) = self.living_writer() {
            assert!(writer.stands_still(), "two owners: the writer runs");
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
        if let Some(writer) = self.living_writer() {
            writer.assert_runs();
        }
        self.receiver_noticed();
        self.wait_empty();
        if self.restarted[0] || self.writer_killed || self.shrunk {
            if !self.restarted[0] {
                self.check_footprint(0);
            }
            // A sender that was started again has forgotten it.
            let _ = self
                .sender
                .control()
                .execute("region-del", json!({"name": ID}));
            let writer = self.writer.as_ref().filter(|_| !self.writer_killed);
            add(&mut self.sender, &self.source, writer);
            // It may be tracked and stopped in another way than before.
            self.before[0] = Footprint::of(self.sender.pid());
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

    /// The daemon holds no more than before, or soon will.
    fn check_footprint(&self, daemon: usize) {
        let pid = [self.sender.pid(), self.receiver.pid()][daemon];
        let deadline = Instant::now() + DEADLINE;
        loop {
            let now = Footprint::of(pid);
            if now.is_within(&self.before[daemon]) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "the {} leaks: {:?}, now {now:?}",
                ["sender", "receiver"][daemon],
                self.before[daemon]
            );
            thread::sleep(Duration::from_millis(20));
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
                self.check_footprint(daemon);
                let took = cpu(pid).saturating_sub(self.cpu_before[daemon]);
                assert!(took <= CPU_MAX, "the {name} took {took:?} of CPU time");
            }
            let it = match daemon {
                0 => &mut self.sender,
                _ => &mut self.receiver,
            };
            it.call("quit", Value::Null);
            it.wait_end();
            assert!(!it.log().contains("panicked"), "the {name} panicked");
        }
        if let Some(writer) = self.living_writer() {
            let state = kill(Pid::from_raw(writer.pid()), None);
            assert_eq!(state, Ok(()), "the writer is dead");
        }
    }
}

/// Compares without reading aloud what differs.
fn assert_same(source: &[u8], arrived: &[u8]) {
    assert_eq!(source.len(), arrived.len(), "lengths differ");
    let pages = source.chunks(4096).zip(arrived.chunks(4096)).enumerate();
    let differ: Vec<_> = pages.filter(|(_, (a, b))| a != b).collect();
    let numbers: Vec<_> = differ.iter().map(|(page, _)| page).collect();
    assert!(differ.is_empty(), "pages that differ: {numbers:?}");
}
