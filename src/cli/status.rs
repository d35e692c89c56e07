//! One transfer for a person: while it runs (`status`) and once it has ended (`migrate`, `demo`).

use std::path::Path;

use serde_json::{Value, json};

use super::args::StatusArgs;
use super::output::{bytes, line, number, printable, seconds, table, text};
use crate::client::{ClientError, Connection};
use crate::name::Name;

pub(super) fn run(socket: &Path, args: &StatusArgs) -> Result<(), ClientError> {
    let mut connection = Connection::connect(socket)?;
    let answer = connection.execute("query-migrate", query(args.id.as_ref().map(Name::as_str)))?;
    if args.json {
        line(&answer);
    } else {
        print_summary(&answer);
    }
    Ok(())
}

/// The arguments of a command about one transfer, or the latest.
pub(super) fn query(id: Option<&str>) -> Value {
    match id {
        Some(id) => json!({"id": id}),
        None => json!({}),
    }
}

/// Prints a `query-migrate` answer for a person, on standard output.
pub fn print_summary(answer: &Value) {
    for text in summary(answer) {
        line(text);
    }
    let passes = passes(answer);
    if passes.len() > 1 {
        line("");
        table(&passes);
    }
}

/// The lines of the summary, without the table of passes.
fn summary(answer: &Value) -> Vec<String> {
    let status = answer["status"].as_str();
    let Some(status) = status else {
        return vec!["no transfer yet".into()];
    };
    let ram = &answer["ram"];
    let mut lines = vec![match answer["id"].as_str() {
        Some(id) => format!("{}: {}", printable(id), printable(status)),
        None => printable(status),
    }];
    let mut row = |name: &str, value: String| lines.push(format!("  {name:<12} {value}"));

    if let Some(desc) = answer["error"]["desc"].as_str() {
        let code = answer["error"]["x-code"].as_str();
        let code = code.map(|code| format!(" [{}]", printable(code)));
        row("error", printable(desc) + &code.unwrap_or_default());
    }
    let total = number(&ram["total"]);
    row(
        "memory",
        format!(
            "{}, {} left",
            bytes(total),
            bytes(number(&ram["remaining"]))
        ),
    );
    let time = number(&answer["total-time"]) / 1e3;
    row("time", seconds(time));
    if time > 0.0 {
        let sent = number(&ram["transferred"]);
        let gib = f64::from(1 << 30);
        row(
            "sent",
            format!("{}, {:.2} GiB/s of memory", bytes(sent), total / time / gib),
        );
    }
    if let Some(downtime) = answer["downtime-us"].as_f64() {
        row("downtime", format!("{:.2} ms", downtime / 1e3));
    } else if let Some(downtime) = answer["downtime"].as_f64() {
        row("downtime", format!("{downtime:.0} ms"));
    } else if let Some(expected) = answer["expected-downtime"].as_f64() {
        row("downtime", format!("{expected:.0} ms expected"));
    }
    if answer["zero-copy"].is_object() {
        row("zero-copy", zero_copy(&answer["zero-copy"]));
    }
    lines
}

/// The path that is active, what it did, and why it is not the one that was asked for.
fn zero_copy(found: &Value) -> String {
    let sends = number(&found["sends"]);
    let copied = number(&found["copied"]);
    let mut told = text(&found["path"]);
    if found["requested"].is_string() && found["requested"] != found["path"] {
        told += &format!(" (asked for {})", text(&found["requested"]));
    }
    told += &format!(", {sends:.0} sends");
    if sends > 0.0 {
        told += &format!(", {:.0} % copied by the kernel", 100.0 * copied / sends);
    }
    match found["reason"].as_str() {
        Some(reason) if !reason.is_empty() => format!("{told}: {}", printable(reason)),
        _ => told,
    }
}

/// A heading and one row per pass.
fn passes(answer: &Value) -> Vec<Vec<String>> {
    let mut rows = vec![
        ["pass", "sent", "dirty after", "time"]
            .map(String::from)
            .to_vec(),
    ];
    for pass in answer["iterations"].as_array().into_iter().flatten() {
        rows.push(vec![
            text(&pass["pass"]),
            bytes(number(&pass["bytes"])),
            bytes(number(&pass["dirty-bytes"])),
            format!("{:.1} ms", number(&pass["time-us"]) / 1e3),
        ]);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_tells_what_was_moved_how_fast_and_by_which_path() {
        let answer = json!({
            "id": "t1", "status": "completed", "total-time": 2000, "downtime": 1, "downtime-us": 1234,
            "ram": {"total": 1_u64 << 31, "remaining": 0, "transferred": (1_u64 << 31) + (1 << 29)},
            "zero-copy": {"requested": "auto", "path": "msg-zerocopy", "sends": 200, "copied": 200,
                          "reason": "the kernel copies on loopback"},
            "iterations": [{"pass": 1, "bytes": 1_u64 << 31, "dirty-bytes": 4096, "time-us": 1900}],
        });
        assert_eq!(
            summary(&answer),
            [
                "t1: completed",
                "  memory       2.0 GiB, 0 B left",
                "  time         2.0 s",
                "  sent         2.5 GiB, 1.00 GiB/s of memory",
                "  downtime     1.23 ms",
                "  zero-copy    msg-zerocopy (asked for auto), 200 sends, 100 % copied by the kernel: \
                 the kernel copies on loopback",
            ]
        );
        assert_eq!(passes(&answer)[1], ["1", "2.0 GiB", "4.0 KiB", "1.9 ms"]);
    }

    #[test]
    fn a_failure_comes_with_its_reason_and_code() {
        let answer =
            json!({"status": "failed", "error": {"desc": "peer \x1b said no", "x-code": "exists"}});
        let lines = summary(&answer);
        assert_eq!(lines[0], "failed");
        assert_eq!(lines[1], "  error        peer ? said no [exists]");
    }

    #[test]
    fn no_transfer_is_said_in_words() {
        assert_eq!(summary(&json!({})), ["no transfer yet"]);
    }
}
