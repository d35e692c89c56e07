//! The `memferry` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    memferry::cli::run()
}
