//! What the daemons ask of the kernel, counted by strace in a run whose time does not count.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::cli::stage::{Process, Stage, StageError, local};

const PROGRAM: &str = "strace";
const DEADLINE: Duration = Duration::from_secs(20);
const LOOK_PAUSE: Duration = Duration::from_millis(5);
/// Calls that are named.
const SHOWN: usize = 5;

/// strace that follows all threads of a process.
#[derive(Debug)]
pub(super) struct Trace {
    tracer: Process,
    log: PathBuf,
}

/// Whether there is a tracer on this machine.
pub(super) fn is_installed() -> bool {
    let mut version = Command::new(PROGRAM);
    version.arg("-V").stdin(Stdio::null()).stdout(Stdio::null());
    version.status().is_ok_and(|status| status.success())
}

impl Trace {
    /// Counts all calls of `process` from now on.
    pub(super) fn count(
        stage: &Stage<'_>,
        who: &'static str,
        process: &Process,
    ) -> Result<Self, StageError> {
        Self::start(stage, who, process, &["-c"])
    }

    /// Writes down what `process` receives from now on.
    pub(super) fn received(
        stage: &Stage<'_>,
        who: &'static str,
        process: &Process,
    ) -> Result<Self, StageError> {
        Self::start(stage, who, process, &["-e", "trace=recvmsg"])
    }

    fn start(
        stage: &Stage<'_>,
        who: &'static str,
        process: &Process,
        options: &[&str],
    ) -> Result<Self, StageError> {
        let log = stage.path(&format!("{who}.trace"));
        let pid = process.pid();
        let mut command = stage.command(who, PROGRAM.as_ref())?;
        command.args(["-f", "-q"]).args(options);
        command.arg("-o").arg(&log).args(["-p", &pid.to_string()]);
        let tracer = Stage::spawn(who, command)?;
        let started = Instant::now();
        while !is_traced(pid) {
            stage.check_interrupted()?;
            if started.elapsed() > DEADLINE {
                let text = format!("strace does not attach: {}", stage.log(who));
                return Err(local("count system calls")(std::io::Error::other(text)));
            }
            std::thread::sleep(LOOK_PAUSE);
        }
        Ok(Self { tracer, log })
    }

    /// What it has written.
    fn end(self) -> Result<String, StageError> {
        self.tracer.quit()?;
        fs::read_to_string(&self.log).map_err(local("read what strace wrote"))
    }

    /// How many calls there were, and the most frequent ones in words.
    pub(super) fn calls(self) -> Result<(u64, String), StageError> {
        let mut rows = calls(&self.end()?);
        rows.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let total: u64 = rows.iter().map(|(_, count)| count).sum();
        let shown: Vec<_> = rows
            .iter()
            .take(SHOWN)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        Ok((total, format!("of {total}: {}", shown.join(", "))))
    }

    /// How many messages came from error queues of sockets.
    pub(super) fn notices(self) -> Result<u64, StageError> {
        Ok(notices(&self.end()?))
    }
}

/// Whether every thread is traced.
fn is_traced(pid: i32) -> bool {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return false;
    };
    tasks.flatten().all(|task| {
        let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
        let tracer = status
            .lines()
            .find_map(|line| line.strip_prefix("TracerPid:"));
        tracer.is_some_and(|pid| pid.trim() != "0")
    })
}

/// The rows of the table, which are `100.00 0.001 12 345 [errors] name`.
fn calls(table: &str) -> Vec<(String, u64)> {
    let row = |line: &str| {
        let mut words = line.split_whitespace();
        let count = words.nth(3)?.parse().ok()?;
        Some((words.next_back()?.to_owned(), count))
    };
    let rows = table.lines().filter_map(row);
    rows.filter(|(name, _)| name != "total").collect()
}

/// A call that found nothing ends in an error instead of in 0.
fn notices(log: &str) -> u64 {
    log.lines()
        .filter(|line| line.contains("MSG_ERRQUEUE") && line.ends_with("= 0"))
        .count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_read_with_and_without_errors() {
        let table = "% time     seconds  usecs/call     calls    errors syscall\n\
                     ------ ----------- ----------- --------- --------- ----------------\n\
                      80.00    0.008000           8      1000         3 read\n\
                      20.00    0.002000           2        20           sendmsg\n\
                     ------ ----------- ----------- --------- --------- ----------------\n\
                     100.00    0.010000          10      1020         3 total\n";
        let row = |name: &str, count| (name.to_owned(), count);
        assert_eq!(calls(table), [row("read", 1000), row("sendmsg", 20)]);
        assert_eq!(calls(""), []);
    }

    #[test]
    fn only_messages_that_came_are_notices() {
        let log = "7 recvmsg(5, {msg_name=NULL}, MSG_ERRQUEUE) = 0\n\
                   7 recvmsg(5, {msg_namelen=0}, MSG_ERRQUEUE) = -1 EAGAIN (Resource temporarily unavailable)\n\
                   7 recvmsg(5,  <unfinished ...>\n\
                   7 <... recvmsg resumed>{msg_name=NULL}, MSG_ERRQUEUE) = 0\n\
                   7 recvmsg(6, {msg_name=NULL}, 0) = 0\n";
        assert_eq!(notices(log), 2);
    }
}
