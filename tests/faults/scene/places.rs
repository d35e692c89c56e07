//! Where the daemons of a scene run, as far as it is not where everything runs.

use super::super::common::memory::MIB;
use super::super::common::{Daemon, Stage, memferry};
use super::super::lab::{Clock, Elsewhere, Tmpfs, without_ipc_lock};
use super::super::matrix::Fault;

/// Where the daemons run, as far as it is not where everything runs.
pub(super) struct Places {
    pub(super) elsewhere: Option<Elsewhere>,
    pub(super) tmpfs: Option<Tmpfs>,
    pub(super) clocks: Option<[Clock; 2]>,
}

impl Places {
    pub(super) fn for_faults(faults: &[Fault], stage: &Stage, bytes: u64) -> Self {
        let any = |of: &[Fault]| of.iter().any(|fault| faults.contains(fault));
        Self {
            elsewhere: any(&[
                Fault::PartitionShort,
                Fault::PartitionLong,
                Fault::DropShort,
                Fault::DropLong,
            ])
            .then(Elsewhere::new),
            tmpfs: any(&[Fault::Full]).then(|| Tmpfs::mount(&stage.arrived(), bytes + 4 * MIB)),
            clocks: any(&[Fault::ClockJump]).then(|| {
                ["sender.clock", "receiver.clock"].map(|name| Clock::new(&stage.path(""), name))
            }),
        }
    }

    pub(super) fn sender(&self, stage: &Stage, faults: &[Fault]) -> Daemon {
        let config = stage.common_config("sender");
        let mut command = memferry();
        if let Some(elsewhere) = &self.elsewhere {
            command = elsewhere.command(&command);
        }
        if faults.contains(&Fault::Memlock) {
            command = without_ipc_lock(&command);
        }
        if let Some([clock, _]) = &self.clocks {
            clock.give(&mut command);
        }
        Daemon::start_by(command, stage, "sender", "sender", &config, None)
    }

    pub(super) fn receiver(&self, stage: &Stage) -> Daemon {
        let config = format!(
            "{}[receive]\nlisten = [\"tcp:127.0.0.1:0\"]\ndirectory = {:?}\n",
            stage.common_config("receiver"),
            stage.arrived()
        );
        let mut command = memferry();
        if let Some([_, clock]) = &self.clocks {
            clock.give(&mut command);
        }
        Daemon::start_by(command, stage, "receiver", "receiver", &config, None)
    }
}
