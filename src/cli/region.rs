//! `memferry region add|remove|list|take`.

use std::path::{self, Path};

use serde_json::{Value, json};

use super::args::{RegionAddArgs, RegionCommand, TrackerKind};
use super::exit::Exit;
use super::output::{bytes, line, table, text};
use super::take;
use crate::client::{ClientError, Connection};

pub(super) fn run(socket: &Path, command: &RegionCommand) -> Result<Exit, ClientError> {
    let mut connection = Connection::connect(socket)?;
    match command {
        RegionCommand::Take(args) => return take::region(connection, args),
        RegionCommand::Add(args) => {
            connection.execute("region-add", addition(args))?;
        }
        RegionCommand::Remove { name } => {
            connection.execute("region-del", json!({"name": name}))?;
        }
        RegionCommand::List { json } => {
            let answer = connection.execute("query-regions", json!({}))?;
            if *json {
                line(&answer);
            } else {
                table(&rows(&answer));
            }
        }
    }
    Ok(Exit::Done)
}

/// The arguments of `region-add`. The daemon has another working directory: the path is made absolute.
fn addition(args: &RegionAddArgs) -> Value {
    let path = path::absolute(&args.path).unwrap_or_else(|_| args.path.clone());
    let mut arguments = json!({"name": args.name, "path": path});
    if let Some(tracker) = args.tracker {
        let kind = match tracker {
            TrackerKind::None => "none",
            TrackerKind::Scan => "scan",
        };
        arguments["tracker"] = json!({"kind": kind});
    }
    if let Some(freeze) = &args.freeze {
        arguments["freeze"] = freeze.to_json();
    }
    arguments
}

/// A heading and one row per Region.
fn rows(answer: &Value) -> Vec<Vec<String>> {
    let heading = ["NAME", "SIZE", "PAGE", "TRACKER", "FREEZE", "PATH"];
    let mut rows = vec![heading.map(String::from).to_vec()];
    // Long lists come in parts, and then as a member.
    let list = answer.as_array().or_else(|| answer["regions"].as_array());
    for region in list.into_iter().flatten() {
        let amount = |member: &str| match region[member].as_f64() {
            Some(count) => bytes(count),
            None => "-".into(),
        };
        rows.push(vec![
            text(&region["name"]),
            amount("size"),
            amount("page-size"),
            kind(&region["tracker"]),
            kind(&region["freeze"]),
            text(&region["path"]),
        ]);
    }
    rows
}

/// `{kind: scan, …}` or just `scan`.
fn kind(value: &Value) -> String {
    text(value.get("kind").unwrap_or(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{Cli, Command};
    use clap::Parser;

    fn typed(arguments: &[&str]) -> Value {
        let line = ["memferry", "region", "add"].iter().chain(arguments);
        match Cli::try_parse_from(line).unwrap().command {
            Command::Region(RegionCommand::Add(args)) => addition(&args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_addition_has_what_was_typed_and_an_absolute_path() {
        assert_eq!(
            typed(&["vm", "--path", "/dev/shm/vm"]),
            json!({"name": "vm", "path": "/dev/shm/vm"})
        );
        let all = typed(&[
            "vm",
            "--path",
            "ram",
            "--tracker",
            "scan",
            "--freeze",
            "pid=7",
        ]);
        assert!(all["path"].as_str().unwrap().starts_with('/'));
        assert_eq!(all["tracker"], json!({"kind": "scan"}));
        assert_eq!(all["freeze"], json!({"kind": "pid", "pid": 7}));
    }

    #[test]
    fn both_shapes_of_a_list_make_rows() {
        let region =
            json!({"name": "vm", "size": 1 << 30, "tracker": {"kind": "scan"}, "freeze": "none"});
        let want = ["vm", "1.0 GiB", "-", "scan", "none", "-"];
        assert_eq!(rows(&json!([region]))[1], want);
        assert_eq!(rows(&json!({"regions": [region]}))[1], want);
    }
}
