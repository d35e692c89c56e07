//! `memferry workload`: a writer to be moved; `memferry verify`: whether all it wrote has arrived.

use std::fs::File;

use super::args::{VerifyArgs, WorkloadArgs};
use super::exit::Exit;
use super::output::{line, note};
use crate::workload::{self, Account, Options, Registration, WorkloadError};

pub(super) fn run(args: WorkloadArgs) -> Exit {
    let options = Options {
        size: args.size.0,
        dirty_rate: args.dirty_rate.0,
        working_set: args.working_set.0,
        path: args.path,
        pattern: args.pattern,
        huge_pages: args.huge_pages,
        account: args.account,
        // Content must not repeat from run to run by accident; which it is does not matter.
        seed: std::process::id().into(),
        register: args
            .register
            .zip(args.name)
            .map(|(socket, name)| Registration {
                socket,
                name,
                tracker: args.tracker,
            }),
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

pub(super) fn verify(args: &VerifyArgs) -> Exit {
    let file = args.file.display();
    let account = Account::read(&args.account).map(|account| {
        let found = File::open(&args.file).and_then(|file| workload::verify(&file, &account));
        found.map(|found| (account, found))
    });
    let (account, found) = match account {
        Ok(Ok(done)) => done,
        Ok(Err(error)) => {
            note(format_args!("memferry: cannot verify {file}: {error}"));
            return Exit::Other;
        }
        Err(error) => {
            let path = args.account.display();
            note(format_args!("memferry: cannot read {path}: {error}"));
            return Exit::Other;
        }
    };
    if let Some(page) = account.under_way {
        line(format_args!(
            "page {page} was being written when the writer stopped, and may hold anything"
        ));
    }
    for difference in &found.first {
        line(difference);
    }
    let pages = account.pages.len();
    if found.count == 0 {
        line(format_args!(
            "{pages} pages of {file} hold what was written last"
        ));
        return Exit::Done;
    }
    line(format_args!(
        "{} of {pages} pages of {file} do not hold what was written last",
        found.count
    ));
    Exit::Verification
}
