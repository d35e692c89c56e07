//! `memferry workload`: a writer to be moved.

use super::args::WorkloadArgs;
use super::exit::Exit;
use super::output::note;
use crate::workload::{self, Options, Registration, WorkloadError};

pub(super) fn run(args: WorkloadArgs) -> Exit {
    let options = Options {
        size: args.size.0,
        dirty_rate: args.dirty_rate.0,
        working_set: args.working_set.0,
        path: args.path,
        // Content must not repeat from run to run by accident; which it is does not matter.
        seed: std::process::id().into(),
        register: args
            .register
            .zip(args.name)
            .map(|(socket, name)| Registration { socket, name }),
    };
    match workload::run_until_signal(&options, &mut std::io::stdout().lock()) {
        Ok(_) => Exit::Done,
        Err(error) => {
            note(format_args!("memferry: {error}"));
            match error {
                WorkloadError::Options(_) => Exit::Usage,
                WorkloadError::Memory { .. } => Exit::Resources,
                WorkloadError::Register(error) => Exit::of_error(&error),
            }
        }
    }
}
