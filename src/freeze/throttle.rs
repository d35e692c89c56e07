//! Slowing writers down that are faster than the streams, without stopping them.
//!
//! A control group is given less processor time (`cpu.max`); a process is stopped and continued in turn.
//! Dropping a [`Throttle`] lets them run as before.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::cpu_max::CpuMax;
use super::{FreezeError, Freezer, Process, Stopped};

/// A process runs for a part of this and stands still for the rest: short enough that a program with
/// people in front of it seems slow and not hung.
const PERIOD: Duration = Duration::from_millis(100);

/// The writers of some Regions, each once.
#[derive(Debug)]
pub struct Throttle {
    groups: Vec<CpuMax>,
    processes: Vec<Arc<Process>>,
    turns: Option<Turns>,
}

impl Throttle {
    /// Checks that groups have what is needed; from here on it is measured how much they use. What is
    /// stopped in another way than by SIGSTOP or as a group is none of its business.
    pub fn of(freezers: &[Freezer]) -> Result<Self, FreezeError> {
        let mut throttle = Self {
            groups: Vec::new(),
            processes: Vec::new(),
            turns: None,
        };
        for (index, freezer) in freezers.iter().enumerate() {
            if freezers[..index].iter().any(|other| other.is(freezer)) {
                continue;
            }
            match freezer {
                Freezer::None | Freezer::Command(_) => {}
                Freezer::Pid(process) => throttle.processes.push(Arc::clone(process)),
                Freezer::Cgroup(cgroup) => throttle.groups.push(CpuMax::of(cgroup)?),
            }
        }
        Ok(throttle)
    }

    /// What has to be remembered before the first [`Self::set`]: how they run now.
    pub fn record(&mut self) -> Result<Vec<Stopped>, FreezeError> {
        let mut records = Vec::new();
        for group in &mut self.groups {
            records.push(group.record()?);
        }
        for process in &self.processes {
            records.push(process.record());
        }
        Ok(records)
    }

    /// Keeps them from running for so much of the time that they used, in percent.
    pub fn set(&mut self, percent: u8) -> Result<(), FreezeError> {
        for group in &mut self.groups {
            group.set(percent)?;
        }
        match &self.turns {
            Some(turns) => turns.percent.store(percent, Ordering::Relaxed),
            None if self.processes.is_empty() => {}
            None => self.turns = Some(Turns::begin(self.processes.clone(), percent)?),
        }
        Ok(())
    }

    /// Lets them run as before.
    pub fn end(&mut self) {
        drop(self.turns.take());
        for group in &mut self.groups {
            if let Err(error) = group.end() {
                tracing::error!(%error, "a control group stays slowed down");
            }
        }
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.end();
    }
}

/// A thread that stops and continues processes. Dropping it leaves them running.
#[derive(Debug)]
struct Turns {
    percent: Arc<AtomicU8>,
    /// Nothing is ever sent: that it is gone is what ends the thread.
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Turns {
    fn begin(processes: Vec<Arc<Process>>, percent: u8) -> Result<Self, FreezeError> {
        let percent = Arc::new(AtomicU8::new(percent));
        let (end, ended) = mpsc::channel();
        let share = Arc::clone(&percent);
        let thread = thread::Builder::new()
            .name("mf-throttle".to_owned())
            .spawn(move || take_turns(&processes, &share, &ended))
            .map_err(FreezeError::ThrottleThread)?;
        Ok(Self {
            percent,
            end: Some(end),
            thread: Some(thread),
        })
    }
}

impl Drop for Turns {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // A panic in it has continued what it had stopped.
            let _ = thread.join();
        }
    }
}

fn take_turns(processes: &[Arc<Process>], percent: &AtomicU8, end: &Receiver<()>) {
    let ended = |time| end.recv_timeout(time) != Err(RecvTimeoutError::Timeout);
    loop {
        let still = PERIOD * percent.load(Ordering::Relaxed).into() / 100;
        if ended(PERIOD - still) {
            return;
        }
        let _stopped = Halted::new(processes);
        if ended(still) {
            return;
        }
    }
}

/// Processes that were stopped for a moment.
struct Halted<'a>(Vec<&'a Process>);

impl<'a> Halted<'a> {
    fn new(processes: &'a [Arc<Process>]) -> Self {
        let mut halted = Self(Vec::with_capacity(processes.len()));
        for process in processes {
            // One that somebody else has stopped is not ours to continue; one that has ended is
            // noticed by whoever freezes it.
            let runs = matches!(process.running_thread(), Ok(Some(_)));
            if runs && process.signal(libc::SIGSTOP).is_ok() {
                halted.0.push(process);
            }
        }
        halted
    }
}

impl Drop for Halted<'_> {
    fn drop(&mut self) {
        for process in &self.0 {
            if let Err(error) = process.thaw() {
                tracing::error!(?process, %error, "the writer could not be started again");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};
    use std::time::Instant;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(20);

    struct Sleeper(Child);

    impl Sleeper {
        fn start() -> Self {
            Self(Command::new("sleep").arg("600").spawn().unwrap())
        }

        fn process(&self) -> Arc<Process> {
            Arc::new(Process::open(self.0.id().cast_signed()).unwrap())
        }

        /// Whether it comes to be seen like this.
        fn comes_to_be(&self, stopped: bool) -> bool {
            let (process, started) = (self.process(), Instant::now());
            loop {
                if process.running_thread().unwrap().is_none() == stopped {
                    return true;
                }
                if started.elapsed() > TIMEOUT {
                    return false;
                }
                thread::yield_now();
            }
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_process_takes_turns_until_the_end_and_then_runs() {
        let sleeper = Sleeper::start();
        let freezer = Freezer::Pid(sleeper.process());
        let mut throttle = Throttle::of(&[freezer.clone(), Freezer::None, freezer]).unwrap();
        assert_eq!(throttle.record().unwrap().len(), 1, "one process");
        for percent in [50, 99] {
            throttle.set(percent).unwrap();
            for stopped in [true, false, true, false] {
                assert!(sleeper.comes_to_be(stopped), "{percent} {stopped}");
            }
        }
        assert!(sleeper.comes_to_be(true));
        drop(throttle);
        assert!(sleeper.comes_to_be(false));
        // The thread is joined: nothing stops it any more.
        let writers = super::super::Writers::of(&[Freezer::Pid(sleeper.process())]).unwrap();
        let frozen = writers.freeze(TIMEOUT);
        assert_eq!(frozen.unwrap().record().len(), 1);
    }

    #[test]
    fn a_process_that_somebody_else_has_stopped_stays_so() {
        let sleeper = Sleeper::start();
        sleeper.process().signal(libc::SIGSTOP).unwrap();
        assert!(sleeper.comes_to_be(true));
        let process = [sleeper.process()];
        drop(Halted::new(&process));
        assert!(process[0].running_thread().unwrap().is_none());
    }
}
