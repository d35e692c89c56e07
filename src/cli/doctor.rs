//! `memferry doctor`: what this machine allows, found out by trying, and what to do about the rest.

use std::fmt::Display;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::args::DoctorArgs;
use super::exit::Exit;
use super::output;
use crate::channel::{Engine, memlock_limit, share, trial};
use crate::config::TransferParameters;
use crate::config::units::Size;
use crate::region::{Access, Mapping};
use crate::sys::uffd::Uffd;

/// Unread notices are charged to this; below it long Iterations ran out (20 KiB was the default up to 6.7).
const OPTMEM_BYTES_ENOUGH: u64 = 128 * 1024;

/// How a finding is to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    /// It works, but not as well as it could.
    Note,
    /// What was asked for does not work.
    Bad,
}

#[derive(Debug)]
struct Finding {
    what: &'static str,
    found: String,
    verdict: Verdict,
    /// What to do about it; empty if nothing.
    advice: String,
}

impl Finding {
    fn ok(what: &'static str, found: impl Display) -> Self {
        Self {
            what,
            found: found.to_string(),
            verdict: Verdict::Ok,
            advice: String::new(),
        }
    }

    fn note(what: &'static str, found: impl Display, advice: &str) -> Self {
        Self {
            verdict: Verdict::Note,
            advice: advice.to_owned(),
            ..Self::ok(what, found)
        }
    }

    fn bad(what: &'static str, found: impl Display, advice: &str) -> Self {
        Self {
            verdict: Verdict::Bad,
            ..Self::note(what, found, advice)
        }
    }
}

/// Prints what was found. 1 if something does not work at all.
pub(super) fn run(args: &DoctorArgs) -> Exit {
    let findings = examine(&args.directory);
    let bad = findings.iter().any(|found| found.verdict == Verdict::Bad);
    if args.json {
        let rows: Vec<Value> = findings.iter().map(to_json).collect();
        output::line(json!({"ok": !bad, "findings": rows}));
    } else {
        let rows: Vec<_> = findings.iter().map(to_row).collect();
        output::table(&rows);
    }
    if bad { Exit::Other } else { Exit::Done }
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Ok => "ok",
        Verdict::Note => "note",
        Verdict::Bad => "bad",
    }
}

fn to_row(finding: &Finding) -> Vec<String> {
    let told = match finding.advice.as_str() {
        "" => finding.found.clone(),
        advice => format!("{}: {advice}", finding.found),
    };
    vec![word(finding.verdict).into(), finding.what.into(), told]
}

fn to_json(finding: &Finding) -> Value {
    json!({
        "what": finding.what,
        "verdict": word(finding.verdict),
        "found": finding.found,
        "advice": finding.advice,
    })
}

fn examine(directory: &Path) -> Vec<Finding> {
    let mut findings = vec![kernel()];
    let engines: Vec<_> = Engine::ALL.into_iter().map(engine).collect();
    let none = engines.iter().all(|found| found.verdict != Verdict::Ok);
    findings.extend(engines);
    if none {
        findings.push(Finding::bad(
            "zero copy",
            "no engine works",
            "see the lines above; transfers use plain sends",
        ));
    }
    findings.extend([
        uring(),
        memlock(memlock_limit()),
        optmem(read_number("/proc/sys/net/core/optmem_max")),
        huge_pages(&read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        hugetlb(),
        numa(),
        mount(directory, &read("/proc/self/mountinfo")),
        pagemap(),
        cgroup(),
    ]);
    findings
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn read_number(path: &str) -> Option<u64> {
    read(path).trim().parse().ok()
}

fn kernel() -> Finding {
    Finding::ok("kernel", read("/proc/sys/kernel/osrelease").trim())
}

fn engine(engine: Engine) -> Finding {
    match trial(engine) {
        Ok(trial) if trial.reports_copies => Finding::ok(engine.as_str(), "works"),
        Ok(_) => Finding::note(
            engine.as_str(),
            "works, but this kernel does not say what it copied",
            "\"auto\" does not take it; Linux 6.2 or later",
        ),
        Err(error) => Finding::note(
            engine.as_str(),
            error,
            "not needed as long as another engine works",
        ),
    }
}

fn uring() -> Finding {
    match read_number("/proc/sys/kernel/io_uring_disabled") {
        Some(2) => Finding::note("io_uring", "forbidden", "sysctl kernel.io_uring_disabled=0"),
        Some(1) => Finding::note(
            "io_uring",
            "only for CAP_SYS_ADMIN and kernel.io_uring_group",
            "put the daemon's group into kernel.io_uring_group, or set kernel.io_uring_disabled=0",
        ),
        Some(_) => Finding::ok("io_uring", "allowed"),
        None => Finding::ok("io_uring", "no switch in this kernel"),
    }
}

fn memlock(limit: Option<u64>) -> Finding {
    let streams = TransferParameters::default().streams;
    let Some(bytes) = limit else {
        return Finding::ok("memlock", "unlimited");
    };
    let found = format!("{} for this user", Size(bytes));
    match share(limit, streams) {
        None => Finding::ok("memlock", found),
        Some(share) => Finding::note(
            "memlock",
            format!(
                "{found}, {} for each of {streams} streams",
                Size(share as u64)
            ),
            "sends are cut to fit, and Regions are not registered; raise it (LimitMEMLOCK=infinity, ulimit -l)",
        ),
    }
}

fn optmem(found: Option<u64>) -> Finding {
    let what = "net.core.optmem_max";
    match found {
        Some(bytes) if bytes >= OPTMEM_BYTES_ENOUGH => Finding::ok(what, Size(bytes)),
        Some(bytes) => Finding::note(
            what,
            Size(bytes),
            "notices of MSG_ZEROCOPY may use it up; sysctl net.core.optmem_max=1048576",
        ),
        None => Finding::ok(what, "not visible here"),
    }
}

/// The word in brackets is what is active.
fn huge_pages(shmem_enabled: &str) -> Finding {
    let what = "THP of shared memory";
    let active = shmem_enabled
        .split(['[', ']'])
        .nth(1)
        .unwrap_or("not there");
    match active {
        "always" | "within_size" | "advise" | "force" => Finding::ok(what, active),
        other => Finding::note(
            what,
            other,
            "applies to memfds; echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        ),
    }
}

fn hugetlb() -> Finding {
    let info = read("/proc/meminfo");
    let field = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name));
        line.map(|rest| rest.trim().to_owned()).unwrap_or_default()
    };
    let pool = field("HugePages_Total:");
    let free = field("HugePages_Free:");
    let size = field("Hugepagesize:");
    match pool.as_str() {
        "" | "0" => Finding::ok(
            "hugetlb pool",
            "empty (only needed for Regions on hugetlbfs)",
        ),
        pool => Finding::ok(
            "hugetlb pool",
            format!("{free} of {pool} pages of {size} free"),
        ),
    }
}

fn numa() -> Finding {
    let what = "NUMA nodes";
    match crate::sys::numa::allowed() {
        Ok(nodes) if nodes.len() > 1 => Finding::note(
            what,
            format!("memory may come from nodes {nodes:?}"),
            "receive.numa-node chooses one, cpus the CPUs of the streams",
        ),
        Ok(nodes) => Finding::ok(what, format!("memory may come from node {nodes:?} only")),
        Err(error) => Finding::ok(what, format!("not visible here: {error}")),
    }
}

/// A mount, as far as memory files are concerned.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mount<'a> {
    point: &'a str,
    kind: &'a str,
    /// When a tmpfs gives huge pages; `None` if its options do not say.
    pub(super) huge: Option<&'a str>,
}

/// The mount that a directory, given without symbolic links, is on: by the longest mount point that leads
/// to it.
pub(super) fn mount_of<'a>(real: &Path, mountinfo: &'a str) -> Option<Mount<'a>> {
    // id parent major:minor root point options… - type source super-options
    let mounts = mountinfo.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let point = left.split(' ').nth(4)?;
        let mut right = right.split(' ');
        let kind = right.next()?;
        let options = right.nth(1).unwrap_or_default();
        let huge = options
            .split(',')
            .find_map(|option| option.strip_prefix("huge="));
        real.starts_with(point)
            .then_some(Mount { point, kind, huge })
    });
    mounts.max_by_key(|mount| mount.point.len())
}

/// What `directory` is on, and whether it gives huge pages.
fn mount(directory: &Path, mountinfo: &str) -> Finding {
    let what = "receive directory";
    let Ok(real) = directory.canonicalize() else {
        return Finding::note(
            what,
            format!("{} does not exist", directory.display()),
            "only a receiver needs it; name another with --directory",
        );
    };
    let Some(Mount { point, kind, huge }) = mount_of(&real, mountinfo) else {
        return Finding::ok(what, "its mount is not visible here");
    };
    let found = format!("{} is on {kind} {point}", real.display());
    match (kind, huge) {
        ("hugetlbfs", _) => Finding::ok(what, found),
        ("tmpfs", Some("advise" | "always" | "within_size")) => Finding::ok(
            what,
            format!("{found} with huge={}", huge.unwrap_or_default()),
        ),
        ("tmpfs", _) => Finding::note(
            what,
            format!("{found} without huge pages"),
            "arriving memory is allocated in pages of 4 KiB; mount it with huge=advise",
        ),
        _ => Finding::note(
            what,
            found,
            "Regions are memory: use a tmpfs with huge=advise",
        ),
    }
}

/// Tracks a page of our own, as a writer's library would.
fn pagemap() -> Finding {
    let what = "tracker pagemap";
    let tried = || -> std::io::Result<()> {
        let file = tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile())?;
        file.set_len(crate::limits::PAGE_BYTES)?;
        let mapping = Mapping::new(&file, crate::limits::PAGE_LEN, Access::Write)?;
        Uffd::new()?.track(&mapping)
    };
    match tried() {
        Ok(()) => Finding::ok(what, "works (userfaultfd, PAGEMAP_SCAN)"),
        Err(error) => Finding::note(
            what,
            error,
            "writers need Linux 6.7 and userfaultfd (vm.unprivileged_userfaultfd, /dev/userfaultfd); \
             otherwise use tracker bitmap or scan",
        ),
    }
}

fn cgroup() -> Finding {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return Finding::ok("cgroup v2", "mounted");
    }
    Finding::note(
        "cgroup v2",
        "not mounted on /sys/fs/cgroup",
        "freezing by cgroup does not work; use freeze by pid or client",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_are_too_small_come_with_the_setting_to_change() {
        let told = |finding: Finding| (finding.verdict, finding.advice);
        let small = told(memlock(Some(1 << 20)));
        assert_eq!(small.0, Verdict::Note);
        assert!(small.1.contains("LimitMEMLOCK"));
        assert_eq!(told(memlock(None)).0, Verdict::Ok);
        assert!(told(optmem(Some(20480))).1.contains("optmem_max=1048576"));
        assert_eq!(told(optmem(Some(131_072))).0, Verdict::Ok);
        let never = told(huge_pages("always within_size advise [never] deny force"));
        assert_eq!(never.0, Verdict::Note);
        assert_eq!(told(huge_pages("always [advise] never")).0, Verdict::Ok);
    }

    #[test]
    fn the_innermost_mount_counts() {
        let info = "1 0 0:1 / / rw - ext4 /dev/x rw\n\
                    2 1 0:2 / /proc rw - tmpfs none rw,size=1,huge=advise\n";
        assert_eq!(mount(Path::new("/proc/self"), info).verdict, Verdict::Ok);
        assert_eq!(mount(Path::new("/usr"), info).verdict, Verdict::Note);
        let bare = info.replace(",huge=advise", "");
        let found = mount(Path::new("/proc"), &bare);
        assert!(found.advice.contains("huge=advise"), "{found:?}");
    }
}
