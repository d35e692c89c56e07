//! The writer with a clock that is run by hand, and its signals in a process of its own.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use clap::ValueEnum;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde_json::Value;

use super::*;

fn options(path: Option<PathBuf>) -> Options {
    Options {
        size: 64 * 4096,
        dirty_rate: 64 << 20,
        working_set: 8 * 4096,
        path,
        pattern: Pattern::Loop,
        huge_pages: false,
        account: None,
        seed: 1,
        register: None,
    }
}

/// Every page is all of some write to it.
fn assert_whole(file: &File) {
    let mut page = [0; STAMPED_BYTES];
    for number in 0..64 {
        file.read_exact_at(&mut page, number * 4096).unwrap();
        let content = Content::of(&page, number, 1);
        assert!(matches!(content, Content::Write(_)), "{number}: {content}");
    }
}

/// Lines of JSON on `out`.
fn lines(out: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(out).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn the_file_is_filled_then_the_working_set_is_written_round_and_round() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory");
    let mut pauses = 0;
    let mut out = Vec::new();
    let summary = run(&options(Some(path.clone())), &mut out, |time, _| {
        std::thread::sleep(time);
        pauses += 1;
        if pauses > 20 {
            Pause::Stop
        } else {
            Pause::Over
        }
    });
    let summary = summary.unwrap();
    assert!(summary.writes > 8, "{summary:?}");
    let said = lines(&out);
    assert_eq!(said[0]["event"], "ready");
    assert_eq!(said[0]["bytes"], 64 * 4096);
    assert_eq!(said[0]["path"], path.to_str().unwrap());
    assert_eq!(said[1]["event"], "stopped");
    assert_eq!(said[1]["last-sequence"], summary.last_sequence);
    let file = File::open(&path).unwrap();
    let length = file.metadata().unwrap().len();
    assert_eq!(length, 64 * 4096);
    assert_whole(&file);
    let newest = newest_stamp(&file, length).unwrap().unwrap();
    assert_eq!(newest.sequence, summary.last_sequence);
    assert_eq!(newest.page, (summary.last_sequence - 1) % 8);
}

#[test]
fn every_pattern_leaves_what_its_account_says() {
    for pattern in Pattern::value_variants() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("memory");
        let options = Options {
            pattern: *pattern,
            account: Some(directory.path().join("account")),
            ..options(Some(path.clone()))
        };
        let mut pauses = 0;
        let summary = run(&options, &mut Vec::new(), |time, _| {
            std::thread::sleep(time);
            pauses += 1;
            if pauses > 10 {
                Pause::Stop
            } else {
                Pause::Over
            }
        });
        let last = summary.unwrap().last_sequence;
        assert!(last > 0);
        let mut account = Account::read(&options.account.unwrap()).unwrap();
        let newest = account.pages.iter().map(|newest| match newest {
            Newest::Nothing => 0,
            Newest::Stamp(sequence) | Newest::Zeros(sequence) => *sequence,
        });
        let newest = newest.max();
        // Its last write may have been of what was there.
        let is_last = newest == Some(last) || *pattern == Pattern::Rewrite && newest > Some(0);
        assert!(is_last, "{pattern:?}: {newest:?} of {last}");
        let file = File::options().read(true).write(true).open(path).unwrap();
        assert_eq!(verify(&file, &account).unwrap().count, 0, "{pattern:?}");
        // The filling is overwritten in this page, and one more write is lost.
        account.pages[63] = Newest::Stamp(last + 1);
        let found = verify(&file, &account).unwrap();
        assert_eq!(found.first[0].holds, Content::Write(0), "{pattern:?}");
    }
}

#[test]
fn how_much_is_in_huge_pages_is_said() {
    let mut out = Vec::new();
    let options = Options {
        size: 4 << 20,
        huge_pages: true,
        ..options(None)
    };
    run(&options, &mut out, |_, _| Pause::Stop).unwrap();
    let huge = lines(&out)[0]["huge-bytes"].as_u64().unwrap();
    assert!([0, 2 << 20, 4 << 20].contains(&huge), "{huge}");
}

#[test]
fn without_a_path_the_memory_is_found_under_proc() {
    let mut out = Vec::new();
    let mut opened = None;
    // The reader sees what the writer's own mapping holds.
    let quiet = Options {
        dirty_rate: 0,
        working_set: 0,
        ..options(None)
    };
    run(&quiet, &mut out, |_, _| {
        let fds = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let memfd = fds.map(|entry| entry.path()).find(|path| {
            std::fs::read_link(path)
                .is_ok_and(|to| to.to_string_lossy().contains("memferry-workload"))
        });
        opened = memfd.map(|path| File::open(path).unwrap());
        Pause::Stop
    })
    .unwrap();
    assert!(
        lines(&out)[0]["path"]
            .as_str()
            .unwrap()
            .starts_with("/proc/")
    );
    let file = opened.unwrap();
    assert_whole(&file);
}

#[test]
fn a_closed_output_does_not_end_it() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    }
    assert!(run(&options(None), &mut Closed, |_, _| Pause::Stop).is_ok());
}

#[test]
fn a_file_of_another_size_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("somebodys");
    std::fs::write(&path, b"precious").unwrap();
    let error = run(&options(Some(path.clone())), &mut Vec::new(), |_, _| {
        Pause::Stop
    });
    assert!(matches!(error, Err(WorkloadError::Options(_))), "{error:?}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn options_that_do_not_fit_are_refused() {
    for change in [
        |options: &mut Options| options.size = 0,
        |options: &mut Options| options.size = 4097,
        |options: &mut Options| options.working_set = 65 * 4096,
        |options: &mut Options| options.working_set = 100,
        |options: &mut Options| options.working_set = 0,
        |options: &mut Options| options.huge_pages = true,
    ] {
        let mut options = options(None);
        change(&mut options);
        let error = run(&options, &mut Vec::new(), |_, _| Pause::Stop);
        assert!(
            matches!(error, Err(WorkloadError::Options(_))),
            "{options:?}"
        );
    }
}

/// The child of the test below: signals reach a whole process. On its own it does nothing.
#[test]
fn child_that_writes_until_a_signal() {
    if let Some(path) = std::env::var_os("MEMFERRY_TEST_WORKLOAD") {
        let options = Options {
            dirty_rate: 4 << 20,
            ..options(Some(path.into()))
        };
        run_until_signal(&options, &mut io::stderr()).unwrap();
    }
}

#[test]
fn a_stopped_writer_does_not_catch_up_and_a_signal_ends_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory");
    // The test harness has another thread, which would take the signals; so it starts with them blocked.
    let mut child = Command::new("env")
        .arg("--block-signal=TERM,CONT")
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "workload::tests::child_that_writes_until_a_signal",
        ])
        .args(["--test-threads=1", "--nocapture"])
        .env("MEMFERRY_TEST_WORKLOAD", &path)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = Pid::from_raw(child.id().try_into().unwrap());
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut next = || serde_json::from_str::<Value>(&said.next().unwrap().unwrap()).unwrap();
    assert_eq!(next()["event"], "ready");
    // 4 MiB/s for 400 ms would be 400 pages; stopped for all but moments of it, it writes far fewer.
    let started = Instant::now();
    kill(pid, Signal::SIGSTOP).unwrap();
    std::thread::sleep(Duration::from_millis(400));
    let stopped = started.elapsed();
    kill(pid, Signal::SIGCONT).unwrap();
    kill(pid, Signal::SIGTERM).unwrap();
    let last = next();
    assert!(child.wait().unwrap().success());
    assert_eq!(last["event"], "stopped");
    let writes = last["writes"].as_u64().unwrap();
    let rest = u64::try_from((started.elapsed() - stopped).as_millis()).unwrap();
    assert!(writes <= rest + 100, "{writes} pages in {rest} ms");
}
