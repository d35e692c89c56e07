//! The command line: what is typed, what is asked of a daemon, what is shown.
//!
//! Everything here is a client of the control socket. What other parts of the program do when called by
//! name (the daemons, `demo`, `workload`, `check`) is handed to them in one place.

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;

pub mod args;
pub mod exit;
mod migrate;
pub mod output;
pub mod progress;
mod region;
mod status;

use args::{Cli, Command};
use exit::Exit;
pub use status::print_summary;

/// Runs what the command line says. Usage errors end the process inside, with code 2.
#[must_use]
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    dispatch(&cli.socket, cli.command).into()
}

fn dispatch(socket: &Path, command: Command) -> Exit {
    let done = match command {
        Command::Region(command) => region::run(socket, &command).map(|()| Exit::Done),
        Command::Status(args) => status::run(socket, &args).map(|()| Exit::Done),
        Command::Cancel(args) => {
            let id = args.id.as_ref().map(|id| id.as_str());
            migrate::cancel(socket, id).map(|()| Exit::Done)
        }
        Command::Migrate(args) => migrate::run(socket, &args),
        Command::Sender(_)
        | Command::Receiver(_)
        | Command::Demo(_)
        | Command::Workload(_)
        | Command::Check(_) => return without_client(&command),
    };
    done.unwrap_or_else(|error| {
        output::note(format_args!("memferry: {error}"));
        Exit::of_error(&error)
    })
}

/// The verbs that are no clients of a running daemon.
fn without_client(command: &Command) -> Exit {
    output::note(format_args!("memferry: not wired: {command:?}"));
    Exit::Other
}
