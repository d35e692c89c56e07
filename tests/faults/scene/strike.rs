//! What is done to a transfer under way.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::Signal;

use super::super::common::DEADLINE;
use super::super::common::relay::{Act, Frame, Side, Silence, Which};
use super::super::lab::{Elsewhere, withdraw_memlock};
use super::super::matrix::{FLIPS, Fault, Process};
use super::notice::within;
use super::writer::Live;
use super::{STALL, Scene, is_final};

/// How long faults last that nobody is to notice.
const SHORT: Duration = Duration::from_millis(400);

/// How far the time of day jumps, in seconds: a year.
pub(super) const JUMP: i64 = 365 * 24 * 3600;

impl Scene {
    /// Breaks something while `frame` is held, or after the end; lets it go on, and repairs.
    pub(crate) fn strike(&mut self, fault: Fault, frame: Option<&Frame>) {
        let struck = Instant::now();
        let stream = frame.and_then(|frame| frame.stream).unwrap_or(0);
        let mut act = Act::Pass;
        match fault {
            Fault::Kill(Process::Sender) => {
                let killed = SystemTime::now();
                self.sender.kill();
                self.relay.release(act);
                self.bury_sender(struck, killed);
            }
            Fault::Kill(Process::Receiver) => {
                let killed = SystemTime::now();
                self.receiver.kill();
                self.relay.release(act);
                self.noticed();
                self.dead_noticed(Side::Receiver, killed);
                self.restarted[1] = true;
                self.receiver = self.places.receiver(&self.stage);
                self.announced[1].clear();
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
                // A writer that was stopped by somebody else is left as it is: see ContinueWriter. One that stops
                // itself could not answer.
                if process != Process::Writer || self.stops_itself() {
                    self.signal(process, Signal::SIGCONT);
                }
            }
            Fault::Hang(process) => {
                let mut struck = struck;
                self.signal(process, Signal::SIGSTOP);
                self.relay.release(act);
                match process {
                    Process::Writer => {
                        let asks = ["pre-switchover", "completing"];
                        self.watch(|status| asks.contains(&status) || is_final(status));
                        struck = Instant::now();
                        self.noticed();
                    }
                    Process::Sender => {
                        self.watch_stall(&[1]);
                        self.receiver_noticed();
                    }
                    Process::Receiver => {
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
            Fault::FlipAlways => {
                self.flip_payloads(u64::MAX);
                // The held one is judged already, and may be the last that has some.
                if frame.is_some_and(|frame| frame.payload > 0) {
                    act = Act::FlipPayload;
                }
            }
            Fault::PauseShort => self.pause(Silence::Everything, SHORT),
            Fault::PauseLong => self.pause_until_noticed(struck, Silence::Everything),
            Fault::Deaf => self.pause_until_noticed(struck, Silence::TowardsReceiver),
            Fault::PartitionShort | Fault::DropShort => {
                self.cut(fault);
                self.relay.release(act);
                thread::sleep(SHORT);
                self.heal(fault);
            }
            Fault::PartitionLong | Fault::DropLong => {
                self.cut(fault);
                let struck = Instant::now();
                self.relay.release(act);
                self.watch_stall(&[0, 1]);
                self.noticed();
                self.measured.hang_noticed = Some(within(struck, STALL + STALL / 8));
                self.heal(fault);
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

    /// Packets get lost from now on, in one way or the other.
    fn cut(&self, fault: Fault) {
        match fault {
            Fault::DropShort | Fault::DropLong => self.elsewhere().drop_packets(),
            _ => self.elsewhere().cut(),
        }
    }

    fn heal(&self, fault: Fault) {
        match fault {
            Fault::DropShort | Fault::DropLong => self.elsewhere().pass_packets(),
            _ => self.elsewhere().heal(),
        }
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
        writer.signal(signal);
    }

    pub(super) fn stops_itself(&self) -> bool {
        self.writer.as_ref().is_some_and(Live::stops_itself)
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
}

/// Takes all the room there is.
fn fill(path: &Path) {
    let mut file = File::create(path).unwrap();
    let zeros = [0; 4096];
    while file.write_all(&zeros).is_ok() {}
}
