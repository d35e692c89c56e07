//! `memferry migrate` and the verbs for a transfer under way: start it, show it, wait for its end.
//!
//! The daemon moves the memory whether or not anyone watches. Losing the daemon while waiting therefore
//! says nothing about the transfer: exit code 3, and `memferry status` tells once the daemon is back.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::args::{MigrateArgs, OwningSide, ProgressMode, RecoverArgs, ResolveArgs};
use super::exit::Exit;
use super::interrupts::Interrupts;
use super::output::{bytes, line, note, number, text};
use super::progress::Progress;
use super::status::{print_summary, query};
use crate::client::{ClientError, Connection};

/// Time between two looks at the transfer, in milliseconds. An event makes it sooner.
const LOOK_EVERY_MS: u16 = 200;

/// The same where nothing is shown: only in case the event of the end was dropped.
const LOOK_SILENTLY_EVERY_MS: u16 = 2000;

/// What the descriptor of the final blob is called towards the daemon.
const FINAL_BLOB: &str = "final-blob";

/// How long one look may take. Ctrl-C is not heard meanwhile.
const LOOK_DEADLINE: Duration = Duration::from_secs(5);

pub(super) fn run(socket: &Path, args: &MigrateArgs) -> Result<Exit, ClientError> {
    let mut connection = Connection::connect(socket)?;
    if let Some(path) = &args.final_blob {
        let blob = match File::open(path) {
            Ok(blob) => blob,
            Err(error) => {
                let path = path.display();
                note(format_args!(
                    "memferry: cannot open the final blob {path}: {error}"
                ));
                return Ok(Exit::Other);
            }
        };
        connection.send_fd(FINAL_BLOB, blob.as_fd())?;
    }
    // From here on Ctrl-C is a wish, not an end: the daemon may have accepted already.
    let interrupts = (!args.detach && !args.dry_run)
        .then(|| Interrupts::new(&[Signal::SIGINT]))
        .flatten();
    let accepted = connection.execute("migrate", request(args))?;
    if args.dry_run {
        print_plan(&accepted, args.json);
        return Ok(Exit::Done);
    }
    let id = accepted["id"].as_str().map(str::to_owned);
    let id = id.or_else(|| args.id.as_ref().map(ToString::to_string));
    if args.detach {
        if args.json {
            line(json!({"id": id}));
        } else {
            line(id.unwrap_or_default());
        }
        return Ok(Exit::Done);
    }
    connection.set_answer_deadline(LOOK_DEADLINE);
    let hint = "cancelling; press Ctrl-C again to leave the transfer running";
    let mut watch = Watch::new(connection, id, args.progress, interrupts.as_ref(), hint);
    let last = match watch.until_ended() {
        Ok(Some(last)) => last,
        Ok(None) => {
            let id = watch.id.as_deref().unwrap_or_default();
            note(format_args!("left running: see `memferry status {id}`"));
            return Ok(Exit::Interrupted);
        }
        Err(error) => {
            note("The transfer may still be running: ask again with `memferry status`.");
            return Err(error);
        }
    };
    if args.json {
        line(&last);
    } else {
        print_summary(&last);
    }
    if last["status"] == "indeterminate" {
        note(
            "The receiver was told to take over and has not said whether it did; the sender goes on asking, and \
             the writer stays stopped until there is an answer. See \"Indeterminate\" in docs/operating.md.",
        );
    }
    Ok(Exit::of_transfer(&last))
}

pub(super) fn cancel(socket: &Path, id: Option<&str>) -> Result<(), ClientError> {
    let mut connection = Connection::connect(socket)?;
    connection.execute("migrate_cancel", query(id)).map(|_| ())
}

pub(super) fn pause(socket: &Path, id: Option<&str>) -> Result<(), ClientError> {
    let mut connection = Connection::connect(socket)?;
    connection.execute("migrate-pause", query(id)).map(|_| ())
}

pub(super) fn recover(socket: &Path, args: &RecoverArgs) -> Result<(), ClientError> {
    let mut arguments = query(args.id.as_ref().map(|id| id.as_str()));
    if let Some(uri) = &args.uri {
        arguments["uri"] = json!(uri);
    }
    let mut connection = Connection::connect(socket)?;
    connection.execute("migrate-recover", arguments).map(|_| ())
}

pub(super) fn go_on(socket: &Path, id: Option<&str>) -> Result<(), ClientError> {
    let mut connection = Connection::connect(socket)?;
    let mut order = query(id);
    order["state"] = json!("pre-switchover");
    connection.execute("migrate-continue", order).map(|_| ())
}

pub(super) fn resolve(socket: &Path, args: &ResolveArgs) -> Result<(), ClientError> {
    let owner = match args.owner {
        OwningSide::Source => "source",
        OwningSide::Destination => "destination",
    };
    let mut connection = Connection::connect(socket)?;
    connection
        .execute("migrate-resolve", json!({"id": args.id, "owner": owner}))
        .map(|_| ())
}

/// The arguments of `migrate`. Parameters are members of it.
fn request(args: &MigrateArgs) -> Value {
    let mut arguments = json!({"uri": args.uri});
    for (key, value) in &args.settings {
        arguments[key] = value.clone();
    }
    if let Some(id) = &args.id {
        arguments["id"] = json!(id);
    }
    if !args.regions.is_empty() {
        arguments["regions"] = json!(args.regions);
    }
    if args.final_blob.is_some() {
        arguments["final-fdname"] = json!(FINAL_BLOB);
    }
    if args.dry_run {
        arguments["dry-run"] = json!(true);
    }
    arguments
}

/// What would be done. The receiver was asked, and nothing was sent.
fn print_plan(plan: &Value, as_json: bool) {
    if as_json {
        line(plan);
    } else {
        plan_lines(plan).iter().for_each(line);
    }
}

fn plan_lines(plan: &Value) -> Vec<String> {
    let regions = plan["regions"].as_array().into_iter().flatten();
    let names: Vec<_> = regions.map(text).collect();
    let mut lines = vec![
        format!("regions     {}", names.join(", ")),
        format!("total       {}", bytes(number(&plan["total"]))),
        "parameters".to_owned(),
    ];
    let parameters = plan["parameters"].as_object().into_iter().flatten();
    lines.extend(parameters.map(|(name, value)| format!("  {name:<20}  {}", text(value))));
    lines.push("The receiver would take them. Nothing was sent.".to_owned());
    lines
}

/// One transfer being watched.
pub(super) struct Watch<'a> {
    connection: Connection,
    id: Option<String>,
    progress: Progress,
    interrupts: Option<&'a Interrupts>,
    cancel_asked: bool,
    /// What is said at the first Ctrl-C about the second.
    second_interrupt: &'static str,
}

impl<'a> Watch<'a> {
    pub(super) fn new(
        connection: Connection,
        id: Option<String>,
        mode: ProgressMode,
        interrupts: Option<&'a Interrupts>,
        second_interrupt: &'static str,
    ) -> Self {
        let progress = Progress::new(mode);
        Self {
            connection,
            id,
            progress,
            interrupts,
            cancel_asked: false,
            second_interrupt,
        }
    }

    /// The last `query-migrate`; nothing if the user left the transfer to itself.
    pub(super) fn until_ended(&mut self) -> Result<Option<Value>, ClientError> {
        let ended = self.watch();
        self.progress.finish();
        ended
    }

    fn watch(&mut self) -> Result<Option<Value>, ClientError> {
        loop {
            let answer = self
                .connection
                .execute("query-migrate", query(self.id.as_deref()))?;
            self.progress.show(&answer);
            if has_ended(&answer) {
                return Ok(Some(answer));
            }
            if self.interrupted() {
                if self.cancel_asked {
                    return Ok(None);
                }
                self.ask_to_cancel()?;
            }
        }
    }

    fn ask_to_cancel(&mut self) -> Result<(), ClientError> {
        self.cancel_asked = true;
        self.progress.say(self.second_interrupt);
        let asked = self
            .connection
            .execute("migrate_cancel", query(self.id.as_deref()));
        match asked {
            Ok(_) => Ok(()),
            // It may be too late for that. The transfer then ends by itself, and soon.
            Err(ClientError::Command { desc, .. }) => {
                self.progress.say(&format!("not cancelled: {desc}"));
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Waits for the time to look again, an event, or Ctrl-C; says whether it was Ctrl-C.
    fn interrupted(&mut self) -> bool {
        // Events only tell that something has changed; `query-migrate` says what.
        while let Ok(Some(_)) = self.connection.next_event(Duration::ZERO) {}
        let mut fds = vec![PollFd::new(self.connection.as_fd(), PollFlags::POLLIN)];
        if let Some(interrupts) = self.interrupts {
            fds.push(PollFd::new(interrupts.as_fd(), PollFlags::POLLIN));
        }
        let pause = match self.progress.is_shown() {
            true => LOOK_EVERY_MS,
            false => LOOK_SILENTLY_EVERY_MS,
        };
        // An interrupted wait is only a short one.
        let _ = poll(&mut fds, PollTimeout::from(pause));
        self.interrupts.is_some_and(Interrupts::take)
    }
}

fn has_ended(answer: &Value) -> bool {
    matches!(
        answer["status"].as_str(),
        Some("completed" | "failed" | "cancelled" | "indeterminate")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{Cli, Command};
    use clap::Parser;

    fn typed(arguments: &[&str]) -> Value {
        let line = ["memferry", "migrate"].iter().chain(arguments);
        match Cli::try_parse_from(line).unwrap().command {
            Command::Migrate(args) => request(&args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_request_has_what_was_typed_and_nothing_else() {
        assert_eq!(typed(&["tcp:h:1"]), json!({"uri": "tcp:h:1"}));
        assert_eq!(
            typed(&[
                "unix:/x",
                "--id",
                "a",
                "--region",
                "r1",
                "--region",
                "r2",
                "--set",
                "streams=8",
                "--set",
                "max-bandwidth=1GiB/s",
                "--dry-run",
            ]),
            json!({"uri": "unix:/x", "id": "a", "regions": ["r1", "r2"], "streams": 8,
                   "max-bandwidth": "1GiB/s", "dry-run": true})
        );
    }

    #[test]
    fn a_plan_reads_as_lines() {
        let plan = json!({"id": "t", "dry-run": true, "regions": ["a", "b"], "total": 3 << 20,
                          "parameters": {"streams": 4, "zero-copy": "auto", "timeout": null}});
        assert_eq!(
            plan_lines(&plan),
            [
                "regions     a, b",
                "total       3.0 MiB",
                "parameters",
                "  streams               4",
                "  timeout               -",
                "  zero-copy             auto",
                "The receiver would take them. Nothing was sent.",
            ]
        );
    }

    #[test]
    fn only_final_states_end_the_wait() {
        for status in [
            "setup",
            "active",
            "pre-switchover",
            "device",
            "completing",
            "cancelling",
            "paused",
            "recover",
        ] {
            assert!(!has_ended(&json!({"status": status})), "{status}");
        }
        for status in ["completed", "failed", "cancelled", "indeterminate"] {
            assert!(has_ended(&json!({"status": status})), "{status}");
        }
    }
}
