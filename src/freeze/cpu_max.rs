//! How much processor time a control group (version 2) may use.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Cgroup, FreezeError, Stopped};

/// Over what time the limit is kept, in µs: the kernel's default.
const PERIOD_US: u64 = 100_000;
/// Longest that the kernel takes.
const PERIOD_US_MAX: u64 = 1_000_000;
/// Least that the kernel gives within a period, in µs.
const QUOTA_US_MIN: u64 = 1_000;

/// The limit of a control group.
#[derive(Debug)]
pub(super) struct CpuMax {
    path: PathBuf,
    inode: u64,
    /// Processor time that it had used, and when that was.
    used: (Duration, Instant),
    /// The limit that is not ours, and how many processors it used under it; while there is one of ours.
    before: Option<(String, f64)>,
}

impl CpuMax {
    /// That of `cgroup`, if it has one that we may set. What it uses is measured from here on.
    pub(super) fn of(cgroup: &Cgroup) -> Result<Self, FreezeError> {
        Self::open(cgroup.path(), cgroup.inode())
    }

    fn open(path: &Path, inode: u64) -> Result<Self, FreezeError> {
        let mut limit = Self {
            path: path.to_owned(),
            inode,
            used: (Duration::ZERO, Instant::now()),
            before: None,
        };
        limit.used = (limit.used()?, Instant::now());
        let checked = fs::File::options()
            .read(true)
            .write(true)
            .open(path.join("cpu.max"));
        checked.map_err(|error| refused(path, error))?;
        Ok(limit)
    }

    /// What has to be remembered before the first [`Self::set`].
    pub(super) fn record(&mut self) -> Result<Stopped, FreezeError> {
        let text = self.read("cpu.max")?;
        let text = text.trim_end().to_owned();
        let (used, since) = self.used;
        let time = since.elapsed().as_secs_f64().max(f64::MIN_POSITIVE);
        let share = self.used()?.saturating_sub(used).as_secs_f64() / time;
        self.before = Some((text.clone(), share));
        Ok(Stopped::Slowed {
            path: self.path.clone(),
            inode: self.inode,
            cpu_max: text,
        })
    }

    /// Leaves it so much less of what it used, in percent.
    pub(super) fn set(&mut self, percent: u8) -> Result<(), FreezeError> {
        let share = self.before.as_ref().map_or(1.0, |(_, share)| *share);
        let share = share * f64::from(100 - percent.min(100)) / 100.0;
        let (quota, period) = quota(share);
        write(&self.path, self.inode, &format!("{quota} {period}"))
    }

    /// It may use as much as before.
    pub(super) fn end(&mut self) -> Result<(), FreezeError> {
        match self.before.take() {
            Some((text, _)) => {
                write(&self.path, self.inode, &text)?;
                self.used = (self.used()?, Instant::now());
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn used(&self) -> Result<Duration, FreezeError> {
        let text = self.read("cpu.stat")?;
        let us = text
            .lines()
            .find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok());
        us.map(Duration::from_micros)
            .ok_or_else(|| refused(&self.path, io::Error::other("cpu.stat has no usage_usec")))
    }

    fn read(&self, name: &str) -> Result<String, FreezeError> {
        let text = fs::read_to_string(self.path.join(name));
        text.map_err(|error| {
            refused(
                &self.path,
                io::Error::new(error.kind(), format!("{name}: {error}")),
            )
        })
    }
}

/// So many processors, as microseconds within a period that the kernel takes.
fn quota(processors: f64) -> (u64, u64) {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss
    )] // small, and cut to what the kernel takes
    let of = |us: u64| (processors * us as f64) as u64;
    if of(PERIOD_US) >= QUOTA_US_MIN {
        return (of(PERIOD_US), PERIOD_US);
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // cut, as above
    let period = (1000.0 / processors) as u64;
    (QUOTA_US_MIN, period.clamp(PERIOD_US, PERIOD_US_MAX))
}

/// Sets the limit of the group, if the path still means the same one; one that was removed needs none.
fn write(path: &Path, inode: u64, text: &str) -> Result<(), FreezeError> {
    let found = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found.map_err(|error| refused(path, error))?,
    };
    if found.ino() != inode {
        return Ok(());
    }
    fs::write(path.join("cpu.max"), text).map_err(|error| refused(path, error))
}

/// Gives a group of the journal its limit back.
pub(super) fn restore_recorded(path: &Path, inode: u64, text: &str) -> Result<(), FreezeError> {
    write(path, inode, text)
}

fn refused(path: &Path, source: io::Error) -> FreezeError {
    FreezeError::CpuMax {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory that looks like a control group which has used so much.
    fn group(used_us: u64) -> tempfile::TempDir {
        let group = tempfile::tempdir().unwrap();
        fs::write(group.path().join("cpu.max"), "max 250000\n").unwrap();
        use_up(&group, used_us);
        group
    }

    fn use_up(group: &tempfile::TempDir, us: u64) {
        let text = format!("usage_usec {us}\nuser_usec 0\n");
        fs::write(group.path().join("cpu.stat"), text).unwrap();
    }

    fn cpu_max(group: &tempfile::TempDir) -> String {
        fs::read_to_string(group.path().join("cpu.max")).unwrap()
    }

    fn open(group: &tempfile::TempDir) -> CpuMax {
        let inode = fs::metadata(group.path()).unwrap().ino();
        CpuMax::open(group.path(), inode).unwrap()
    }

    #[test]
    fn a_group_gets_less_than_it_used_and_then_what_it_had() {
        let group = group(5);
        let mut limit = open(&group);
        use_up(&group, 3_600_000_005);
        let record = limit.record().unwrap();
        let Some((_, used)) = limit.before.clone() else {
            panic!("nothing is remembered")
        };
        let mut quotas = Vec::new();
        for percent in [20, 90] {
            limit.set(percent).unwrap();
            let text = cpu_max(&group);
            let (quota, period) = text.split_once(' ').unwrap();
            assert_eq!(period, "100000");
            quotas.push(quota.parse::<f64>().unwrap() / 100_000.0 / used);
        }
        assert!((quotas[0] - 0.8).abs() < 0.01 && (quotas[1] - 0.1).abs() < 0.01);
        limit.end().unwrap();
        assert_eq!(cpu_max(&group), "max 250000");
        limit.set(50).unwrap();
        record.thaw().unwrap();
        assert_eq!(cpu_max(&group), "max 250000");
    }

    #[test]
    fn another_group_at_the_same_path_is_left_alone() {
        let group = group(0);
        let inode = fs::metadata(group.path()).unwrap().ino();
        restore_recorded(group.path(), inode + 1, "1000 100000").unwrap();
        assert_eq!(cpu_max(&group), "max 250000\n");
        restore_recorded(Path::new("/nonexistent/group"), 1, "1000 100000").unwrap();
    }

    #[test]
    fn every_share_is_a_limit_that_the_kernel_takes() {
        for (share, limit) in [
            (2.5, (250_000, 100_000)),
            (0.01, (1_000, 100_000)),
            (0.004, (1_000, 250_000)),
            (0.0, (1_000, 1_000_000)),
        ] {
            assert_eq!(quota(share), limit);
        }
    }

    #[test]
    fn a_group_without_a_limit_is_refused() {
        let group = group(0);
        fs::remove_file(group.path().join("cpu.max")).unwrap();
        let error = CpuMax::open(group.path(), 1).unwrap_err();
        assert_eq!(error.code(), "cannot-throttle", "{error}");
        assert!(error.to_string().contains("cpu.max"), "{error}");
    }
}
