//! File systems of our own.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use super::{Pair, Stage};

/// A file system on a directory of its own; unmounted at the end.
pub(crate) struct Mount(TempDir);

impl Mount {
    /// A tmpfs, with options as mount(8) takes them. `None`, with a printed reason, where this is not allowed.
    pub(crate) fn tmpfs(options: &str) -> Option<Self> {
        Self::of(&["-t", "tmpfs", "-o", options, "tmpfs"])
    }

    /// A disk of so many bytes in the new file `image`; `None` as above.
    pub(crate) fn disk(image: &Path, bytes: u64) -> Option<Self> {
        File::create(image).unwrap().set_len(bytes).unwrap();
        let made = Command::new("mkfs.ext2").arg("-q").arg(image).output();
        if !made.is_ok_and(|made| made.status.success()) {
            eprintln!("skipped: no file system can be made here: mkfs.ext2 (package e2fsprogs)");
            return None;
        }
        Self::of(&["-o", "loop", image.to_str().unwrap()])
    }

    fn of(what: &[&str]) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        match mount.args(what).arg(directory.path()).output() {
            Ok(output) if output.status.success() => Some(Self(directory)),
            other => {
                eprintln!("skipped: {what:?} cannot be mounted here: {other:?}");
                None
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Pair {
    /// Daemons of which the receiver puts Regions into `directory`.
    pub(crate) fn on(directory: &Path) -> Self {
        let stage = Stage::new();
        let more = format!("directory = {directory:?}");
        let receiver = stage.receiver_with("tcp:127.0.0.1:0", &more);
        let pair = Self::of(stage, receiver);
        fs::create_dir_all(pair.stage.arrived()).unwrap();
        pair
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // What still has it open keeps it until its own end.
        let mut command = Command::new("umount");
        let _ = command.arg("--lazy").arg(self.0.path()).status();
    }
}
