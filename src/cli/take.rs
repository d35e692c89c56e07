//! `memferry region take` and `memferry blob`: what a receiver hands out as a descriptor.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde_json::json;

use super::args::{BlobArgs, TakeArgs};
use super::exit::Exit;
use super::output::note;
use crate::client::{ClientError, Connection};
use crate::sys::file::seek;

/// Where the started command finds its descriptor.
const VARIABLE: &str = "MEMFERRY_REGION_FD";

/// Bytes copied at once.
const COPY_BYTES: usize = 1 << 20;

/// Takes a Region, and does with it what was asked for.
pub(super) fn region(mut connection: Connection, args: &TakeArgs) -> Result<Exit, ClientError> {
    let name = json!({"name": args.name});
    let (_, fd) = connection.execute_for_fd("region-take", name)?;
    // Nobody else may talk to the daemon through a connection that a command inherits.
    drop(connection);
    Ok(match &args.output {
        Some(path) => told(&format!("copy to {}", path.display()), copy(fd, path)),
        None => told("start the command", become_command(&fd, args)),
    })
}

/// Writes the final blob of a transfer to standard output or a file, and deletes it if that is wished.
pub(super) fn blob(socket: &Path, args: &BlobArgs) -> Result<Exit, ClientError> {
    let mut connection = Connection::connect(socket)?;
    let id = json!({"id": args.id});
    let (_, fd) = connection.execute_for_fd("blob-take", id.clone())?;
    let written = match &args.output {
        Some(path) => copy(fd, path),
        None => io::copy(&mut File::from(fd), &mut io::stdout().lock()).map(|_| ()),
    };
    if args.delete && written.is_ok() {
        connection.execute("blob-del", id)?;
    }
    Ok(told("write the blob", written))
}

fn told(doing: &str, result: io::Result<()>) -> Exit {
    match result {
        Ok(()) => Exit::Done,
        Err(error) => {
            note(format_args!("memferry: cannot {doing}: {error}"));
            Exit::Other
        }
    }
}

/// Copies what is allocated to a new file; holes stay holes.
fn copy(fd: OwnedFd, path: &Path) -> io::Result<()> {
    let from = File::from(fd);
    let to = File::create_new(path)?;
    let bytes = from.metadata()?.len();
    to.set_len(bytes)?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut offset = 0;
    while let Some(data) = seek(&from, offset, true)? {
        let end = seek(&from, data, false)?.unwrap_or(bytes);
        offset = data;
        while offset < end {
            let room = usize::try_from(end - offset).unwrap_or(COPY_BYTES);
            let got = from.read_at(&mut buffer[..room.min(COPY_BYTES)], offset)?;
            if got == 0 {
                return Ok(());
            }
            to.write_all_at(&buffer[..got], offset)?;
            offset += got as u64;
        }
    }
    Ok(())
}

/// Goes on as the command, which inherits the descriptor. Returns only if that fails.
fn become_command(fd: &OwnedFd, args: &TakeArgs) -> io::Result<()> {
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let (program, arguments) = args
        .command
        .split_first()
        .ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env(VARIABLE, fd.as_raw_fd().to_string());
    Err(command.exec())
}
