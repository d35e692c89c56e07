//! One transfer for a person: while it runs (`status`) and once it has ended (`migrate`, `demo`).

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::path::Path;

use serde_json::{Value, json};

use super::args::StatusArgs;
use super::output::{bytes, line, number, printable, seconds, table, text, wrap};
use crate::client::{ClientError, Connection};
use crate::config::units::Size;
use crate::name::Name;
use crate::sys::terminal;

/// What the values of the summary are indented by.
const INDENT: usize = 15;

/// Above this many passes the table shows the first and the last ones; `--json` has all.
const PASSES_SHOWN_MAX: usize = 12;

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
    let stdout = io::stdout();
    let columns = stdout
        .is_terminal()
        .then(|| terminal::columns(stdout.as_fd()).unwrap_or(80));
    // What is piped somewhere stays one line per fact.
    for text in summary(answer) {
        for part in wrap(&text, columns.unwrap_or(usize::MAX), INDENT) {
            line(part);
        }
    }
    let passes = passes(answer);
    if passes.len() > 1 {
        line("");
        table(&shortened(passes));
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
    if let Some(desc) = answer["interruption"]["desc"].as_str() {
        let times = number(&answer["recoveries"]);
        row(
            "interrupted",
            format!("{times:.0} ×, the last time: {}", printable(desc)),
        );
    }
    if let Some(told) = owner(status, answer) {
        row("owner", told.to_owned());
    }
    let total = number(&ram["total"]);
    row(
        "memory",
        match ram["remaining"].as_f64() {
            Some(left) => format!("{}, {} left", bytes(total), bytes(left.min(total))),
            None => bytes(total),
        },
    );
    if let Some(told) = pages(&answer["memory"]) {
        row("pages", told);
    }
    if let Some(time) = answer["total-time"].as_f64() {
        row("time", time_and_rate(status, total, time / 1e3));
    }
    if let Some(sent) = ram["transferred"].as_f64() {
        row("sent", sent_in_passes(sent, answer));
    }
    if let Some(pages @ 1..) = ram["torn"].as_u64() {
        let told = format!(
            "{pages} pages were written while they were sent, or damaged on the way, and came again"
        );
        row("repaired", told);
    }
    if let Some(pages @ 1..) = ram["unchanged"].as_u64() {
        let told =
            format!("{pages} times a page was written with what it held, and not sent again");
        row("unchanged", told);
    }
    if let Some(told) = convergence(answer) {
        row("writer", told);
    }
    if let Some(told) = downtime(answer) {
        row("downtime", told);
    }
    if answer["zero-copy"]["path"]
        .as_str()
        .is_some_and(|path| !path.is_empty())
    {
        row("zero-copy", zero_copy(&answer["zero-copy"]));
    }
    lines
}

/// In pages of which size what has arrived is, largest first. Only a receiver tells.
fn pages(memory: &Value) -> Option<String> {
    let mut sizes = BTreeMap::<u64, f64>::new();
    for region in memory.as_array()? {
        for (size, held) in region["page-sizes"].as_object()? {
            *sizes.entry(size.parse().ok()?).or_default() += number(held);
        }
    }
    let told = sizes
        .iter()
        .rev()
        .map(|(size, held)| format!("{} in pages of {}", bytes(*held), Size(*size)));
    Some(told.collect::<Vec<_>>().join(", ")).filter(|told| !told.is_empty())
}

/// Who has the memory now: what an operator wants to know first. Only a sender tells (rule 4).
fn owner(status: &str, answer: &Value) -> Option<&'static str> {
    answer["iterations"].as_array()?;
    match status {
        "completed" => Some("the receiver; the writer here stays stopped"),
        "failed" | "cancelled" => {
            Some("as before: nothing was moved, and the writer was not kept stopped")
        }
        "indeterminate" => Some("not known: the receiver has not answered the commit"),
        _ => None,
    }
}

/// How long it took; for a transfer that is done, also how fast its memory moved altogether.
fn time_and_rate(status: &str, total: f64, time: f64) -> String {
    if status != "completed" || time <= 0.0 {
        return seconds(time);
    }
    let gib = f64::from(1 << 30);
    format!(
        "{}, {:.2} GiB of memory per second",
        seconds(time),
        total / time / gib
    )
}

/// The receiver counts no passes.
fn sent_in_passes(sent: f64, answer: &Value) -> String {
    match answer["iterations"].as_array().map_or(0, Vec::len) {
        0 => bytes(sent),
        1 => format!("{} in 1 pass", bytes(sent)),
        passes => format!("{} in {passes} passes", bytes(sent)),
    }
}

/// How fast it writes beside how fast that is sent, and what is done about it; as long as that matters.
fn convergence(answer: &Value) -> Option<String> {
    let found = &answer["convergence"];
    if answer["status"] != "active" {
        return None;
    }
    let (written, sent) = (found["dirty-rate"].as_f64()?, number(&found["bandwidth"]));
    let mut told = format!("{}/s, sent at {}/s: ", bytes(written), bytes(sent));
    told += &match (found["verdict"].as_str()?, found["ratio"].as_f64()) {
        ("converging", Some(ratio)) => format!("converging {ratio:.1}x"),
        ("converging", None) => "converging".to_owned(),
        _ => "not converging".to_owned(),
    };
    if let Some(percent) = answer["cpu-throttle-percentage"].as_f64() {
        told += &format!(", slowed down by {percent:.0} %");
    }
    Some(told)
}

/// How long the writer stood still, or would if it were stopped now.
fn downtime(answer: &Value) -> Option<String> {
    let ms = |us: f64| format!("{:.1}", us / 1e3);
    let Some(total) = answer["downtime-us"].as_f64() else {
        let (told, how) = match answer["downtime"].as_f64() {
            Some(downtime) => (downtime, ""),
            None => (answer["expected-downtime"].as_f64()?, " expected"),
        };
        return Some(format!("{told:.0} ms{how}"));
    };
    let parts = [
        "freeze", "scan", "send", "flush", "check", "blob", "prepare", "commit",
    ];
    let parts: Vec<_> = parts
        .iter()
        .filter_map(|part| {
            let us = answer["downtime-breakdown-us"][part].as_f64()?;
            Some(format!("{part} {}", ms(us)))
        })
        .collect();
    Some(match parts.as_slice() {
        [] => format!("{} ms", ms(total)),
        parts => format!("{} ms: {}", ms(total), parts.join(", ")),
    })
}

/// The path that is active, what it did, and why it is not the one that was asked for.
fn zero_copy(found: &Value) -> String {
    let sends = number(&found["sends"]);
    let copied = number(&found["copied"]);
    let path = match found["path"].as_str() {
        Some("plain") => "plain sends".to_owned(),
        _ => text(&found["path"]),
    };
    let asked = text(&found["requested"]);
    let mut told = match asked.as_str() {
        "-" => path,
        "off" if path == "plain sends" => "off".to_owned(),
        asked if asked == path => path,
        asked => format!("{path} (asked for {asked})"),
    };
    if sends > 0.0 {
        told += &format!(
            ", {sends:.0} zero-copy sends of which {:.0} % were copied",
            100.0 * copied / sends
        );
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

/// The heading, the first and the last rows of a long table.
fn shortened(mut rows: Vec<Vec<String>>) -> Vec<Vec<String>> {
    if rows.len() > 1 + PASSES_SHOWN_MAX {
        let half = PASSES_SHOWN_MAX / 2;
        rows.splice(1 + half..rows.len() - half, [vec!["…".to_owned()]]);
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
            "downtime-breakdown-us": {"freeze": 100, "commit": 200},
            "ram": {"total": 1_u64 << 31, "remaining": 0, "transferred": (1_u64 << 31) + (1 << 29)},
            "zero-copy": {"requested": "auto", "path": "msg-zerocopy", "sends": 200, "copied": 200,
                          "reason": "the kernel copies on loopback"},
            "iterations": [{"pass": 1, "bytes": 1_u64 << 31, "dirty-bytes": 4096, "time-us": 1900}],
        });
        assert_eq!(
            summary(&answer),
            [
                "t1: completed",
                "  owner        the receiver; the writer here stays stopped",
                "  memory       2.0 GiB, 0 B left",
                "  time         2.0 s, 1.00 GiB of memory per second",
                "  sent         2.5 GiB in 1 pass",
                "  downtime     1.2 ms: freeze 0.1, commit 0.2",
                "  zero-copy    msg-zerocopy (asked for auto), 200 zero-copy sends of which 100 % were \
                 copied: the kernel copies on loopback",
            ]
        );
        assert_eq!(passes(&answer)[1], ["1", "2.0 GiB", "4.0 KiB", "1.9 ms"]);
    }

    #[test]
    fn a_transfer_under_way_says_whether_it_gets_ahead_of_the_writer() {
        let told = |status: &str, verdict: Value, throttle: Value| {
            let answer = json!({
                "status": status, "convergence": verdict, "cpu-throttle-percentage": throttle,
            });
            convergence(&answer)
        };
        let ahead = json!({"verdict": "converging", "ratio": 3.12, "dirty-rate": 1024.0, "bandwidth": 3215.0});
        assert_eq!(
            told("active", ahead.clone(), Value::Null).as_deref(),
            Some("1.0 KiB/s, sent at 3.1 KiB/s: converging 3.1x")
        );
        assert_eq!(told("completed", ahead, Value::Null), None);
        assert_eq!(told("active", Value::Null, Value::Null), None);
        let behind = json!({"verdict": "not-converging", "ratio": 0.5, "dirty-rate": 10.0, "bandwidth": 5.0});
        assert_eq!(
            told("active", behind, json!(40)).as_deref(),
            Some("10 B/s, sent at 5 B/s: not converging, slowed down by 40 %")
        );
    }

    #[test]
    fn pages_are_told_by_their_size_over_all_regions() {
        let region =
            |small: u64, huge: u64| json!({"page-sizes": {"4096": small, "2097152": huge}});
        assert_eq!(
            pages(&json!([region(4096, 2 << 20), region(8192, 4 << 20)])).as_deref(),
            Some("6.0 MiB in pages of 2MiB, 12.0 KiB in pages of 4KiB")
        );
        assert_eq!(pages(&json!([{"page-sizes": {}}])), None);
        assert_eq!(pages(&Value::Null), None);
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
    fn plain_sends_are_called_that() {
        let told = |requested: &str, reason: &str| {
            zero_copy(
                &json!({"requested": requested, "path": "plain", "sends": 0, "reason": reason}),
            )
        };
        assert_eq!(told("off", ""), "off");
        assert_eq!(told("auto", "why"), "plain sends (asked for auto): why");
    }

    #[test]
    fn a_long_table_keeps_its_beginning_and_its_end() {
        let rows = |count: usize| (0..=count).map(|n| vec![n.to_string()]).collect::<Vec<_>>();
        assert_eq!(shortened(rows(12)), rows(12));
        let short = shortened(rows(31));
        assert_eq!(short.len(), 14);
        assert_eq!(short[6..9].concat(), ["6", "…", "26"]);
        assert_eq!(short[13], ["31"]);
    }

    #[test]
    fn what_a_receiver_does_not_count_is_left_out() {
        let answer =
            json!({"id": "t", "status": "active", "ram": {"total": 1024, "transferred": 512}});
        assert_eq!(
            summary(&answer),
            [
                "t: active",
                "  memory       1.0 KiB",
                "  sent         512 B"
            ]
        );
    }

    #[test]
    fn no_transfer_is_said_in_words() {
        assert_eq!(summary(&json!({})), ["no transfer yet"]);
    }
}
