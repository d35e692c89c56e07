//! Memory file systems of our own.

use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use super::{Pair, Stage};

/// A tmpfs on a directory of its own; unmounted at the end.
pub(crate) struct Mount(TempDir);

impl Mount {
    /// With options as mount(8) takes them. `None`, with a printed reason, where this is not allowed.
    pub(crate) fn tmpfs(options: &str) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(directory.path())
            .output();
        match mount {
            Ok(output) if output.status.success() => Some(Self(directory)),
            other => {
                eprintln!("skipped: a tmpfs cannot be mounted here: {other:?}");
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
