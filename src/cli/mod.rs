//! The command line: what is typed, what is asked of a daemon, what is shown.
//!
//! Everything here is a client of the control socket. What other parts of the program do when called by
//! name (the daemons, `demo`, `workload`, `check`) is handed to them in one place.

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;

pub mod args;
mod bench;
mod demo;
mod doctor;
pub mod exit;
mod history;
mod interrupts;
mod migrate;
pub mod output;
pub mod progress;
mod region;
mod stage;
mod status;
mod take;
mod workload;

use args::{Cli, Command};
use exit::Exit;

use crate::daemon::DaemonError;
pub use status::print_summary;

/// Runs what the command line says. Usage errors end the process inside, with code 2.
#[must_use]
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    dispatch(&cli.socket, cli.command).into()
}

fn dispatch(socket: &Path, command: Command) -> Exit {
    let done = match command {
        Command::Region(command) => region::run(socket, &command),
        Command::Blob(args) => take::blob(socket, &args),
        Command::History(args) => history::run(socket, &args).map(|()| Exit::Done),
        Command::Status(args) => status::run(socket, &args).map(|()| Exit::Done),
        Command::Cancel(args) => {
            let id = args.id.as_ref().map(|id| id.as_str());
            migrate::cancel(socket, id).map(|()| Exit::Done)
        }
        Command::Pause(args) => {
            let id = args.id.as_ref().map(|id| id.as_str());
            migrate::pause(socket, id).map(|()| Exit::Done)
        }
        Command::Recover(args) => migrate::recover(socket, &args).map(|()| Exit::Done),
        Command::Continue(args) => {
            let id = args.id.as_ref().map(|id| id.as_str());
            migrate::go_on(socket, id).map(|()| Exit::Done)
        }
        Command::Resolve(args) => migrate::resolve(socket, &args).map(|()| Exit::Done),
        Command::Migrate(args) => migrate::run(socket, &args),
        Command::Sender(args) => return daemon(crate::sender::run(&args.config)),
        Command::Receiver(args) => return daemon(crate::receiver::run(&args.config)),
        Command::Demo(args) => return demo::run(&args),
        Command::Bench(args) => return bench::run(&args),
        Command::Workload(args) => return workload::run(args),
        Command::Verify(args) => return workload::verify(&args),
        Command::Guardian(args) => return guardian(&args),
        Command::Check(args) => return check(&args.file),
        Command::Doctor(args) => return doctor::run(&args),
    };
    done.unwrap_or_else(|error| {
        output::note(format_args!("memferry: {error}"));
        if error.code() == Some(crate::control::code::COMMAND_NOT_FOUND) {
            // The two daemons answer different commands, and their sockets are easily mixed up.
            output::note(format_args!(
                "The daemon on {} does not know that command: name a sender's socket with --socket or MEMFERRY_SOCKET.",
                socket.display()
            ));
        }
        Exit::of_error(&error)
    })
}

/// How a daemon ended.
fn daemon(ended: Result<(), DaemonError>) -> Exit {
    let Err(error) = ended else { return Exit::Done };
    output::note(format_args!("memferry: {error}"));
    match error {
        DaemonError::Configuration(_) => Exit::Configuration,
        DaemonError::Setup { .. } => Exit::Other,
    }
}

/// Lets writers go on whose sender has died.
fn guardian(args: &args::GuardianArgs) -> Exit {
    let look = if args.now {
        crate::guardian::release
    } else {
        crate::guardian::keep_watch
    };
    match look(&args.runtime_directory) {
        Ok(()) => Exit::Done,
        Err(error) => {
            output::note(format_args!("memferry guardian: {error}"));
            Exit::Other
        }
    }
}

/// Says whether a configuration file makes sense, and what in it does not fit this machine.
fn check(file: &Path) -> Exit {
    match crate::config::check_file(file) {
        Ok(report) => {
            output::line(report);
            Exit::Done
        }
        Err(error) => {
            output::note(format_args!("memferry: {error}"));
            Exit::Configuration
        }
    }
}
